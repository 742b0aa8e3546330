"""Questions over blocks from files: tasks, ids, stops, and the scores."""

import data_cases
import pyarrow
import pytest
from pyarrow import parquet

from blockattn.data import json_lines, tables
from blockattn.evals import answers, qa

PLAIN = data_cases.tiny_tokenizer(None)


def read(files, **more):
  return qa.read_items(files, **{'tokenizer': PLAIN, 'chat': False, 'max_new': 8, 'stop': ('\n',)} | more)


@pytest.fixture
def files(tmp_path):
  blocks = {'blocks': ['one ', 'two '], 'prompt': 'count:', 'response': ' three'}
  return [data_cases.write_lines(tmp_path / 'hotpot.jsonl', [data_cases.passages_line(i) for i in range(3)]),
          data_cases.write_lines(tmp_path / 'own.jsonl.gz', [blocks, b'{', {**blocks, 'answers': ['3', 'three']}])]


def test_a_task_per_file(files):
  items, report = read(files)
  # A line without an id is named by its number; the folder plays no part.
  assert [item.id for item in items] == ['hotpot:q0', 'hotpot:q1', 'hotpot:q2', 'own:1', 'own:3']
  assert [item.task for item in items] == ['hotpot'] * 3 + ['own'] * 2
  assert (report.lines, report.examples, dict(report.bad)) == (6, 5, {'bad JSON': 1})
  first, last = items[0], items[-1]
  assert first.example.blocks[0].startswith('Title 0.0\n') and first.example.prompt == 'Question: what is 0?\nAnswer:'
  assert (first.references, first.max_new, first.stop) == (('answer 0', 'the answer 0'), 8, ('\n',))
  assert items[3].references == ('three',) and last.references == ('3', 'three')


def test_tasks_and_limit(files):
  assert [i.id for i in read(files, limit=1)[0]] == ['hotpot:q0', 'own:1']
  assert [i.id for i in read(files, tasks=['own'])[0]] == ['own:1', 'own:3']
  with pytest.raises(ValueError, match='no task hotpt here; there are hotpot, own'):
    read(files, tasks=['hotpt'])
  with pytest.raises(json_lines.BadLineError, match='own.jsonl.gz:2'):
    read(files, strict=True)


def test_files_of_one_name_are_refused(files, tmp_path):
  (tmp_path / 'new').mkdir()
  other = data_cases.write_lines(tmp_path / 'new' / 'own.jsonl', [data_cases.passages_line(0)])
  with pytest.raises(ValueError, match='have the same name'):
    read([*files, other])


def test_parquet_is_read_as_json_lines_are(files, tmp_path):
  rows = [data_cases.passages_line(i) for i in range(2)]
  parquet.write_table(pyarrow.Table.from_pylist([row | {'id': None} for row in rows]), tmp_path / 'other.parquet')
  items, _ = read(tables.find_files(tmp_path))
  assert [item.id for item in items if item.task == 'other'] == ['other:1', 'other:2']
  assert {item.task for item in items} == {'hotpot', 'own', 'other'}


def test_a_chat_template_goes_around_it(files):
  tokenizer = data_cases.tiny_tokenizer()
  example = read(files, tokenizer=tokenizer, chat=True)[0][0].example
  assert example.header == '<|im_start|>user\n' and example.prompt.endswith('<|im_start|>assistant\n')


@pytest.mark.parametrize('prediction, expected', [
    ('The Eiffel Tower.', (1, 1, 1)),                    # after normalisation
    ('it is the Eiffel tower', (0, 1, 2 * 2 / (4 + 2))),
    ('eiffel', (0, 0, 2 / 3)),
    ('La Tour', (1, 1, 1)),                              # the best of two
    ('', (0, 0, 0))])
def test_scores(prediction, expected):
  item = answers.Item('x', 't', None, 8, references=('Eiffel tower', 'la tour'))
  made = qa.score(item, prediction)
  assert list(made) == ['exact_match', 'substring', 'f1'] and tuple(made.values()) == pytest.approx(expected)


@pytest.mark.parametrize('prediction, substring', [('', 1), ('The!', 1), ('anything', 0)])
def test_an_answer_of_which_the_normalisation_leaves_nothing(prediction, substring):
  """best_subspan_em gives it to every prediction, see the module's docstring."""
  assert qa.score(answers.Item('x', 't', None, 8, references=('The',)), prediction)['substring'] == substring


@pytest.mark.data
def test_the_real_data(data_dir):
  found = json_lines.find_files(data_dir / 'qa' / 'test_*.jsonl.gz')
  items, report = read(found, limit=20)
  assert len({item.id for item in items}) == len(items) == 20 * len(found) >= 160 and not report.bad
  assert all(qa.score(item, item.references[0]) == {'exact_match': 1, 'substring': 1, 'f1': 1} for item in items)
