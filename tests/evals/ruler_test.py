"""Made questions: that the answer stands in the text, where the id says, and can be found there by a program."""

import collections
import itertools
import re

import pytest

from blockattn.data import prompts
from blockattn.evals import ruler
from tools import ruler as tool

SHAPES = (ruler.Shape('needles', 600, 8, keys=3, values=2, queries=2), ruler.Shape('needles', 300, 1, keys=1),
          ruler.Shape('variables', 400, 5, hops=3), ruler.Shape('words', 700, 4))


def count(texts):
  return [len(text.split()) + 1 for text in texts]


def solve(kind, text, prompt, answer):
  """The pieces of the answer, found in the text."""
  if kind == 'needles':
    said = re.findall(r'The number of (\S+) is (\d+)\.', text)
    asked = re.search(r'give for (.*)\?', prompt)[1].split(' and ')
    return sorted(number for name, number in said if name in asked)
  if kind == 'variables':
    value = re.search(r'above are (\d+)', prompt)[1]
    names = []
    for name, of in re.findall(r'Let (\w+) be (\w+)\.', text):   # in the order of the text, which is that of the chain
      names += [name] if of in (value, *names) else []
    return sorted(names)
  return sorted(word for word, _ in collections.Counter(text.split()).most_common(len(answer)))


@pytest.mark.parametrize('shape', SHAPES, ids=lambda shape: shape.name)
def test_the_answer_can_be_found_in_the_text(shape):
  for index in range(5):
    row = ruler.make(index, shape, count)
    answer = row['answers'][0].split(', ')
    assert row == ruler.make(index, shape, count) and row['response'] == f' {row["answers"][0]}'
    assert solve(shape.kind, ''.join(row['blocks']), row['prompt'], answer) == sorted(answer)
    assert len(row['blocks']) == shape.blocks and max(row['gold']) < shape.blocks
    sizes = [sum(count(block.splitlines())) for block in row['blocks']]
    assert 0.85 * shape.tokens <= sum(sizes) <= shape.tokens and max(sizes) - min(sizes) < 60
    places = [tuple(map(int, place.split('+'))) for place in row['id'].rpartition('@')[2].split(',')]
    assert sorted({block for block, _ in places}) == row['gold']
    pieces = [row['blocks'][block][offset:].partition('\n')[0] for block, offset in places]
    assert all(any(part in piece for piece in pieces) for part in answer)
  assert len({ruler.make(i, shape, count)['response'] for i in range(5)}) == 5


def test_of_common_words_each_stands_more_often_than_the_next():
  row = ruler.make(0, ruler.Shape('words', 6000, 4, words=4), count)
  words, counts = zip(*collections.Counter(' '.join(row['blocks']).split()).most_common(5), strict=True)
  assert ', '.join(words[:4]) == row['answers'][0]
  assert all(a > b for a, b in itertools.pairwise(counts))


def test_a_text_that_is_too_short():
  with pytest.raises(ValueError, match=r'needles_k40_v1_q1_100_b4: what has to stand in the text takes 280 tokens; give'):
    ruler.make(0, ruler.Shape('needles', 100, 4, keys=40), count)
  with pytest.raises(ValueError, match='queries'):
    ruler.Shape('needles', queries=5)


def test_the_tool_writes_what_the_readers_read(tmp_path, capsys):
  assert tool.main([str(tmp_path), '--tokenizer', 'blockattn/assets/tiny_teacher', '--tokens', '900', '--blocks', '2', '3',
                    '--count', '2']) == 0
  files = sorted(tmp_path.iterdir())
  assert [file.name for file in files] == [f'{kind}_900_b{blocks}.jsonl' for kind in (
      'needles_k4_v1_q1', 'variables_h4', 'words_w3') for blocks in (2, 3)]
  for file in files:
    examples = list(prompts.read_examples([str(file)]))
    assert len(examples) == 2 and all(len(e.blocks) == int(file.stem[-1]) and e.gold for e in examples)
  assert 'needles_k4_v1_q1_900_b2.jsonl: 2 questions' in capsys.readouterr().out
