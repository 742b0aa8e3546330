"""Contexts cut anew: where cuts fall in an example, what files are cut to, and the settings that decide it."""

import dataclasses

import data_cases
import pytest

from blockattn.data import encode, json_lines, sources, stdlib
from blockattn.data.example import Example, recut
from blockattn.segmentation import cutter, granularity
from blockattn.train import inputs

EXAMPLE = Example(('<s>one. ', 'two. three.', ' four.</s>'), 'who? ', 'me', 'x', gold=(1,),
                           template=((), ((0, 3),), (), ((6, 10),), (), ()))


class EveryFive:
  """Cuts after every fifth character, and counts the texts it was given."""

  def __init__(self, fingerprint='five'):
    self.fingerprint, self.seen = fingerprint, 0

  def __call__(self, texts):
    self.seen += len(texts)
    return [list(range(5, len(text), 5)) for text in texts]


def test_blocks_gold_and_template_follow_the_cuts():
  cut = recut(EXAMPLE, [2, 8, 13, 27, 40])   # in '<s>', behind 'one. ', behind 'two. ', in '</s>', nowhere
  assert cut.blocks == ('<s>one.', ' two.', ' three. four.</s>')
  assert cut.gold == (1, 2) and cut.template == ((), ((0, 3),), (), ((13, 17),), (), ())
  assert (cut.prompt, cut.response) == (EXAMPLE.prompt, EXAMPLE.response)


@pytest.mark.parametrize('cuts', [(), (0,), (5, 11), tuple(range(40))])
def test_no_text_and_no_range_of_the_template_is_lost(cuts):
  cut = recut(EXAMPLE, cuts)
  assert ''.join(cut.blocks) == ''.join(EXAMPLE.blocks) and all(cut.blocks)
  written = [''.join(block[a:b] for a, b in own) for block, own in zip(cut.blocks, cut.template[1:])]
  assert ''.join(written) == '<s></s>'


@pytest.mark.parametrize('continued, said', [((), (1, 3)), ((1, 2), (1, 2, 3))])
def test_what_begins_with_a_passage_goes_on_with_none(continued, said):
  passages = Example(('one two. ', 'three. ', 'four. five.'), 'q', 'r', 'i', continued=continued)
  cut = recut(passages, [4, 16, 22])   # in the first, at the end of the second, in the third
  assert cut.blocks == ('one', ' two. three.', ' four.', ' five.') and cut.continued == said
  parts = encode.EncodedParts([], ([1] * 4, [2] * 4, [3] * 3), [4], [5], 1, (False,) * 3, (False,) * 3,
                              tuple(i in continued for i in range(3)))
  assert encode.recut(parts, 2).continued == (False, True, bool(continued), True, bool(continued), True)


def test_an_example_that_says_nothing_of_gold_stays_so():
  plain = dataclasses.replace(EXAMPLE, gold=None, template=())
  assert recut(plain, [4]).gold is None and recut(plain, [4]).template == ()


def test_files_are_cut_as_they_are_read(tmp_path):
  data_cases.write_lines(tmp_path / 'a.jsonl', map(data_cases.passages_line, range(70)))
  options = sources.FileOptions(256, max_blocks=200)
  rows = lambda cutter: sources.FileRows(str(tmp_path / 'a.jsonl'), data_cases.tiny_tokenizer(), options, cutter=cutter)
  given, cut, other = rows(None), rows(EveryFive()), rows(EveryFive('of another version'))
  docs = lambda source: [found for piece in range(len(source)) for found in source.examples(piece, json_lines.Report())]
  for (_, plain), (example, doc) in zip(docs(given), docs(cut), strict=True):
    assert len(doc.lengths) == -(-len(''.join(example.blocks)) // 5) + 1 > len(plain.lengths)   # with the reader
    assert doc.tokens[slice(*doc.answer)].tolist() == plain.tokens[slice(*plain.answer)].tolist()
  assert len({*given.fingerprint().values(), *cut.fingerprint().values(), *other.fingerprint().values()}) == 3


def test_a_share_of_the_pages_is_cut():
  members = tuple(stdlib.Member(f'member{i}', '()', 'Text.', f'Returns the number {i} of a thing.') for i in range(4))
  containers = (stdlib.Container('class', 'Thing', 'pkg.Thing', 'Doc.', 'Holds a thing.', members),) * 2
  rows = lambda share, cutter: sources.PageRows(containers, stdlib.PageStyle(renamed=0.0, split_words=0),
                                                data_cases.tiny_tokenizer(), length=2048, max_blocks=384, cutter=cutter,
                                                cut_share=share)
  plain, some = rows(0.0, EveryFive()), rows(0.5, EveryFive())
  count = 20 * some.pages_per_row
  cut = [some.is_cut(i) for i in range(count)]
  assert 0.2 * count < sum(cut) < 0.8 * count and not any(plain.is_cut(i) for i in range(count))
  assert all(len(set(cut[i:i + some.pages_per_row])) == 1 for i in range(0, count, some.pages_per_row))
  for is_cut, before, after in zip(cut, plain.pages(range(count)), some.pages(range(count))):
    assert (len(after.lengths) > len(before.lengths)) == is_cut


def test_the_fingerprint_is_of_the_files_and_of_the_wish(tmp_path):
  def of(content='{}', **wish):
    (tmp_path / 'config.json').write_text(content)
    (tmp_path / 'README.md').write_text(str(wish))
    return cutter.Cutter(str(tmp_path), granularity.wanted(**wish)).fingerprint
  assert of() == of()
  assert len({of(), of('{"a": 1}'), of(target=512), of(target=512, maximum=600)}) == 4


def test_two_ways_to_cut_are_refused():
  assert inputs.load_cutter(inputs.PromptData(), None) is None
  with pytest.raises(ValueError, match="block_tokens=64 and config.data.segmenter='tiny' both say where blocks end"):
    inputs.PromptData(segmenter='tiny', block_tokens=64)


def test_a_segmenter_that_is_not_there_is_named(tmp_path):
  with pytest.raises(FileNotFoundError, match='nothing'):
    inputs.load_cutter(inputs.PromptData(segmenter=str(tmp_path / 'nothing')), None)
