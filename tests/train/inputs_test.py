"""The data section of a config as sources: entries of files, their shares, modes and texts."""

import contextlib
import itertools

import data_cases
import jax
import numpy as np
import pyarrow
import pytest
import source_cases
from pyarrow import parquet

from blockattn import mesh
from blockattn.data import stream, tables
from blockattn.train import command, finetune, inputs
from launch import sweep

tokenizer = source_cases.tokenizer
TINY = '--config=configs/tiny.py:baseline'


def test_shares_of_the_entries():
  shares = lambda *files: [(round(share, 6), [one.path for one in origins])
                           for share, origins in inputs.shares(inputs.PromptData(files=files))]
  weighted = lambda path, weight: {'path': path, 'weight': weight}
  assert shares('a', 'b') == [(1, ['a', 'b'])]
  assert shares('a', weighted('b', 0.3), 'c', {'path': 'd', 'mode': 'full'}) == [(0.7, ['a', 'c', 'd']), (0.3, ['b'])]
  assert shares(weighted('a', 2), weighted('b', 6)) == [(0.25, ['a']), (0.75, ['b'])]
  with pytest.raises(ValueError, match='the weights are 1 in all and leave nothing for c: they are shares of the rows'):
    shares(weighted('a', 0.4), weighted('b', 0.6), 'c')
  with pytest.raises(ValueError, match="has 'mod'; did you mean 'mode'"):
    shares({'path': 'a', 'mod': 'full'})
  data = inputs.PromptData(files=('a', {'path': 'b', 'columns': {'y': 'text'}}), columns={'x': 'text'})
  [(_, origins)] = inputs.shares(data)
  assert [dict(one.columns) for one in origins] == [{'x': 'text'}, {'y': 'text'}]


def test_entries_on_the_command_line_in_a_file_and_in_a_sweep(tmp_path):
  entry = {'path': 'b.parquet', 'weight': 0.3, 'mode': 'full', 'columns': {'context': 'blocks'}}
  wanted = ('a.jsonl', entry)
  config, _ = command.read_config([TINY, '--config.data.files=a.jsonl', f'--config.data.files={entry}'])
  assert finetune.read(config).data.files == wanted
  again, _ = command.read_config([TINY, f'--config.data.files={sweep.value_text(wanted)}'])
  assert finetune.read(again).data.files == wanted
  (tmp_path / 'a.yaml').write_text('data.columns: {context: blocks}\ndata.files: [a.jsonl, {path: b.parquet, weight: 0.3, '
                                   'mode: full, columns: {context: blocks}}]\n')
  written, _ = command.read_config([TINY, f'--overrides={tmp_path}/a.yaml'])
  data = finetune.read(written).data
  assert data.files == wanted and data.columns == {'context': 'blocks'}
  run = tmp_path / 'config.json'
  run.write_text(config.to_json_best_effort())
  assert finetune.read(command.read_config([TINY, f'--overrides={run}'])[0]).data.files == wanted


def test_columns_of_fields_on_the_command_line_in_a_file_and_in_a_sweep(tmp_path):
  columns = {'context': 'blocks', 'answers.text': 'answers'}
  (tmp_path / 'a.yaml').write_text('data.columns: {context: blocks, answers.text: answers}\n')
  for arg in (f'--config.data.columns={columns}', f'--config.data.columns={sweep.value_text(columns)}',
              f'--overrides={tmp_path}/a.yaml'):
    config, _ = command.read_config([TINY, arg, '--config.data.files=a.jsonl'])
    [(_, [one])] = inputs.shares(finetune.read(config).data)
    assert one.columns == columns
  for both in ({'a': 'blocks', 'a.b': 'prompt'}, {'a.b': 'blocks', 'a': 'prompt'}):
    with pytest.raises(ValueError, match="holds 'a' or 'a.b', not both; columns of both kinds are given in an entry"):
      command.read_config([TINY, f'--config.data.columns={both}'])


@pytest.fixture
def data(tmp_path):
  data_cases.write_lines(tmp_path / 'questions.jsonl', [data_cases.passages_line(i) for i in range(30)])
  texts = [{'body': ''.join(f'Paragraph {j} of text {i}.\n\n' for j in range(40))} for i in range(12)]
  parquet.write_table(pyarrow.Table.from_pylist(texts), tmp_path / 'texts.parquet', row_group_size=5)
  text = {'path': str(tmp_path / 'texts.parquet'), 'columns': {'body': 'text'}}
  files = (str(tmp_path / 'questions.jsonl'), text | {'weight': 0.25, 'mode': 'full'}, text | {'weight': 0.25})
  return inputs.PromptData(files=files, length=256, max_blocks=16, chat=False, segment=inputs.CutOptions(target=32))


def take(source, count):
  with contextlib.closing(stream.batches(source, batch=4, seed=0)) as batches:
    return list(itertools.islice(batches, count))


def test_one_stream_of_questions_in_blocks_and_texts_in_both_modes(data, tokenizer):
  batches = take(inputs.load_rows(data, tokenizer), 10)
  kinds = {'questions': [], 'full': [], 'texts': []}
  for batch in batches:
    names = []
    for tokens, loss, block, doc in zip(batch['tokens'], batch['loss'], batch['layout'].block, batch['layout'].doc):
      text = tokenizer.decode(tokens[doc == 1])
      names.append('questions' if 'Question:' in text else 'texts' if block.max() else 'full')
      kinds[names[-1]].append((tokens, loss, block, doc))
    assert sorted(names) == ['full', 'questions', 'questions', 'texts']
  for _, loss, block, doc in kinds['full']:
    assert not block.any() and (loss == (np.append(doc[1:], 0) == doc) & (doc > 0)).all()   # all but what begins a document
  for tokens, loss, block, doc in kinds['texts']:
    for number in range(1, doc.max() + 1):
      own = doc == number
      assert (loss[own][:-1] == (block[own] == block[own].max())[:-1]).all() and not loss[own][-1]
      assert tokenizer.decode(tokens[own & (block == 0)]).endswith('.\n\n')   # cut between paragraphs


def test_a_full_row_is_read_as_full_attention_reads_it(data, tokenizer):
  batches = take(inputs.load_rows(data, tokenizer), 2)
  batch, i = next((batch, i) for batch in batches for i in range(4) if not batch['layout'].block[i].any())
  layout = jax.tree.map(lambda x: x[i], batch['layout'])
  assert layout.reader[layout.doc > 0].all()   # so that the last block, which is all of it, reads everything before it
  starts = np.flatnonzero(np.diff(layout.doc, prepend=0) > 0)
  assert (layout.position[starts] == 0).all()


def test_the_same_rows_on_every_number_of_hosts(data, tokenizer):
  source = inputs.load_rows(data, tokenizer)
  whole = take(source, 4)
  for count in (2, 4):
    parts = []
    for process in range(count):
      rows = range(process * 4 // count, (process + 1) * 4 // count)
      with contextlib.closing(stream.batches(inputs.load_rows(data, tokenizer), batch=4, seed=0, rows=rows)) as batches:
        parts.append(list(itertools.islice(batches, 4)))
    data_cases.assert_same([jax.tree.map(lambda *x: np.concatenate(x), *step) for step in zip(*parts)], whole)


def test_batches_of_a_job(data, tokenizer):
  options = finetune.read(command.read_config([TINY, '--config.batch=4', '--config.data.length=256'])[0])
  placement = mesh.Placement(mesh.make_mesh({'data': 1}, jax.devices()[:1]))
  with contextlib.closing(inputs.batches(options, inputs.load_rows(data, tokenizer), placement)) as batches:
    assert next(batches)['tokens'].shape == (4, 256)
    assert {'the shares of the sources'} < batches.fingerprint.keys()


def test_overlaps_of_nothing_are_told(capsys):
  batch = lambda goes_on: {'tokens': np.zeros((16, 4)), 'continued': np.full((16, 4), goes_on)}
  for overlap, batches, told in ((8, (False, False, False), 1), (8, (False, True, False), 0), (0, (False, False), 0)):
    look = inputs.overlap_watch(overlap)
    for goes_on in batches:
      look(batch(goes_on))
    assert capsys.readouterr().err.count('in 32 rows no block goes on with the one before') == told


def test_a_job_with_random_granularity(data, tokenizer):
  placement = mesh.Placement(mesh.make_mesh({'data': 1}, jax.devices()[:1]))

  def read(most, state=None):
    options = finetune.read(command.read_config([
        TINY, '--config.batch=4', '--config.data.length=256', f'--config.data.join_blocks={most}'])[0])
    with contextlib.closing(inputs.batches(options, inputs.load_rows(data, tokenizer), placement)) as batches:
      if state:
        batches.set_state(state)
      return [next(batches), batches.get_state(), next(batches)]

  (first, _, _), (joined, state, after) = read(1), read(64)
  np.testing.assert_array_equal(joined['tokens'], first['tokens'])
  assert joined['layout'].block.sum() < first['layout'].block.sum()
  assert 'config.data.join_blocks' in state['source']
  data_cases.assert_same([read(64, state)[0]], [after])
  with pytest.raises(stream.DataChanged, match='config.data.join_blocks has changed'):
    read(3, state)


def test_no_files():
  with pytest.raises(ValueError, match='config.data.files is empty: give JSON lines, parquet or Arrow files'):
    inputs.load_rows(inputs.PromptData(), None)
  with pytest.raises(FileNotFoundError, match=r'nothing.parquet: no .jsonl, .jsonl.gz, .parquet, .arrow or .feather file'):
    tables.open_tables(tables.Origin('nothing.parquet'))
