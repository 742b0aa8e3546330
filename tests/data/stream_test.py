"""The order of rows, batches, and the state that a run goes on from."""

import itertools
import json
import os

import data_cases
import jax
import numpy as np
import pytest
import source_cases
from source_cases import OPTIONS

from blockattn.data import sources, stream

tokenizer, folder, files = source_cases.tokenizer, source_cases.folder, source_cases.files
containers, pages = source_cases.containers, source_cases.pages


@pytest.fixture(params=['files', 'pages'])
def source(request):
  return request.getfixturevalue(request.param)


def take(source, count, start_step=0, **kwargs):
  it = stream.batches(source, **{'batch': 4, 'seed': 3} | kwargs)
  it.set_state({'next_step': start_step})
  try:
    return list(itertools.islice(it, count))
  finally:
    it.close()


def row_ids(batches):
  """What tells rows apart: their tokens."""
  return [row.tobytes() for batch in batches for row in batch['tokens']]


def test_a_batch(source):
  [batch] = take(source, 1)
  shape = (4, source.length)
  assert sorted(batch) == ['gold', 'layout', 'loss', 'targets', 'text', 'tokens']
  assert all(x.shape == shape for x in jax.tree.leaves(batch))
  assert {name: x.dtype.name for name, x in batch.items() if name != 'layout'} == {
      'tokens': 'int32', 'targets': 'int32', 'loss': 'bool', 'text': 'bool', 'gold': 'bool'}
  assert (batch['loss'] <= batch['text']).all() and (batch['text'] <= (batch['layout'].doc > 0)).all()
  assert batch['loss'].any(axis=1).all()


@pytest.mark.parametrize('step', [0, 1, 7])
def test_resuming_gives_the_same_batches(source, step):
  straight = take(source, 12)
  data_cases.assert_same(take(source, 12 - step, start_step=step), straight[step:])
  it = stream.batches(source, batch=4, seed=3)
  first = [next(it) for _ in range(9)]
  assert it.get_state() == {'next_step': 9, 'source': it.fingerprint}
  assert it.fingerprint and json.loads(json.dumps(it.get_state())) == it.get_state()
  it.set_state({'next_step': step})   # back, with batches read ahead
  data_cases.assert_same([next(it) for _ in range(12 - step)], straight[step:])
  data_cases.assert_same(first, straight[:9])
  assert it.get_state()['next_step'] == 12
  it.close()


@pytest.mark.parametrize('count', [2, 4])
def test_any_number_of_processes_sees_the_same_global_batches(source, count):
  whole = take(source, 6)
  parts = [take(source, 6, rows=range(i * 4 // count, (i + 1) * 4 // count)) for i in range(count)]
  glued = [jax.tree.map(lambda *rows: np.concatenate(rows), *step) for step in zip(*parts, strict=True)]
  data_cases.assert_same(glued, whole)


def test_seeds_and_orders(files):
  orders = [row_ids(take(files, 3, seed=seed)) for seed in (3, 4)]
  assert orders[0] != orders[1]


def test_an_epoch_holds_every_row_once(files):
  n = len(files)
  assert n % 4, 'the test is about batches that straddle epochs'
  ids = row_ids(take(files, n))   # four epochs
  epochs = [ids[i:i + n] for i in range(0, 4 * n, n)]
  every = sorted(files[i]['tokens'].tobytes() for i in range(n))
  assert all(sorted(epoch) == every for epoch in epochs)
  assert len({tuple(epoch) for epoch in epochs}) == 4   # each in another order


def test_what_does_not_go_together(files):
  cases = [
      ('some of its rows, each once, ascending', files, {'rows': [1, 0]}),
      ('some of its rows', files, {'rows': [1, 1]}),
      ('some of its rows', files, {'rows': [3, 4]}),
      ('some of its rows', files, {'rows': []}),
      ('a batch of 0', files, {'batch': 0}),
      ('the source has no rows', [], {}),
      ("next_step': an integer from 0.*not.*-1", files, {'start_step': -1}),
  ]
  for match, source, kwargs in cases:
    with pytest.raises(ValueError, match=match):
      take(source, 1, **kwargs)
  it = stream.batches(files, batch=4, seed=0)
  it.set_state({'next_step': 1})   # as it was saved before there were fingerprints
  for state in (5, None, {}, {'next_step': 1.0}, {'next_step': True}, {'next_index': 1}, {'next_step': 1, 'more': 2}):
    with pytest.raises(ValueError, match='the state of the data is'):
      it.set_state(state)


def reopen(path, tokenizer, tmp_path):
  source = sources.FileRows(path, tokenizer, OPTIONS, tmp_path / 'cache')
  return stream.batches(source, batch=2, seed=0)


def test_other_data_is_refused_and_named(tokenizer, tmp_path):
  paths = [data_cases.write_lines(tmp_path / name, map(data_cases.passages_line, range(5)))
           for name in ('a.jsonl', 'b.jsonl')]
  begun = reopen(paths, tokenizer, tmp_path)
  begun.set_state({'next_step': 3})
  state = json.loads(json.dumps(begun.get_state()))
  os.utime(paths[0])   # touched, not changed
  again = reopen(paths, tokenizer, tmp_path)
  again.set_state(state)
  assert again.get_state() == state
  lines = [*map(data_cases.passages_line, range(4)), data_cases.passages_line(7)]
  size = os.path.getsize(paths[1])
  data_cases.write_lines(tmp_path / 'b.jsonl', lines)
  assert os.path.getsize(paths[1]) == size   # only its content tells
  with pytest.raises(stream.DataChanged, match=f'{paths[1]} has changed.* Put the data back as it was') as refused:
    reopen(paths, tokenizer, tmp_path).set_state(state)
  assert 'a.jsonl' not in str(refused.value) and 'another --workdir' in str(refused.value)
  with pytest.raises(stream.DataChanged, match=f'{paths[1]} is gone'):
    reopen(paths[:1], tokenizer, tmp_path).set_state(state)
  with pytest.raises(stream.DataChanged, match='a.jsonl has changed, or what reads it'):
    reopen(paths, data_cases.tiny_tokenizer(data_cases.TRIMMING), tmp_path).set_state(state)


def test_a_row_that_cannot_be_read_is_named(folder, tokenizer, tmp_path, monkeypatch):
  """Out of the thread that reads ahead, and only once the batch is asked for."""
  source = sources.FileRows(str(folder), tokenizer, OPTIONS, tmp_path)
  first = [stream.row_numbers(source, count, seed=0) for count in (3, 2)]
  row = int(np.setdiff1d(*first)[0])   # the third of the stream
  bad = int(source.plan[row][0])
  file = source.files[0] if bad < len(source.stores[0]) else source.files[1]
  doc = sources.FileRows.doc
  monkeypatch.setattr(sources.FileRows, 'doc', lambda self, i: doc(self, i) if i != bad else {}['lost'])
  it = stream.batches(source, batch=1, seed=0)
  next(it), next(it)
  with pytest.raises(stream.UnreadableRow, match=rf'row {row} of the data, .*{file} \(document \d+\).*, cannot be read'):
    next(it)
