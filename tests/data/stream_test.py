"""The order of rows, batches, and the state that a run goes on from."""

import itertools
import json
import os
import time

import data_cases
import jax
import numpy as np
import pytest
import source_cases
from source_cases import OPTIONS

from blockattn.data import encode, json_lines, packing, sources, stream

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
  assert sorted(batch) == ['continued', 'gold', 'layout', 'loss', 'targets', 'text', 'tokens']
  assert all(x.shape == shape for x in jax.tree.leaves(batch))
  assert {name: x.dtype.name for name, x in batch.items() if name != 'layout'} == {
      'tokens': 'int32', 'targets': 'int32', 'loss': 'bool', 'text': 'bool', 'gold': 'bool', 'continued': 'bool'}
  assert (batch['loss'] <= batch['text']).all() and (batch['text'] <= (batch['layout'].doc > 0)).all()
  assert batch['loss'].any(axis=1).all()


@pytest.mark.parametrize('step', [0, 1, 7])
def test_resuming_gives_the_same_batches(source, step):
  straight = take(source, 12)
  data_cases.assert_same(take(source, 12 - step, start_step=step), straight[step:])
  it = stream.batches(source, batch=4, seed=3)
  first = [next(it) for _ in range(9)]
  assert it.get_state() | {'at': 0} == {'next_step': 9, 'at': 0, 'source': it.fingerprint}
  assert it.fingerprint and json.loads(json.dumps(it.get_state())) == it.get_state()
  states = [it.get_state()]
  for start in (step, 9):   # back, with batches read ahead; and to where it was, by its state
    it.set_state(states[0] if start == 9 else {'next_step': start})
    data_cases.assert_same([next(it) for _ in range(12 - start)], straight[start:])
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


@pytest.fixture
def several(folder, tokenizer, monkeypatch):
  """Files that are read in several goes an epoch."""
  monkeypatch.setattr(sources, 'TOGETHER', 2)
  source = sources.FileRows(str(folder), tokenizer, OPTIONS)
  assert len(source) // source.together >= 3
  return source


def documents(batches):
  """The tokens of every document, in the order of the rows."""
  return [row[doc == number].tobytes() for batch in batches for row, doc in zip(batch['tokens'], batch['layout'].doc)
          for number in range(1, doc.max() + 1)]


def test_an_epoch_holds_every_document_once(several):
  every = {doc.tokens.tobytes() for piece in range(len(several)) for _, doc in several.examples(piece, json_lines.Report())}
  found = documents(take(several, 60, batch=1))
  epochs = [found[i:i + 40] for i in range(0, 120, 40)]
  assert len(every) == 40 and all(set(epoch) == every for epoch in epochs)
  assert len({tuple(epoch) for epoch in epochs}) == 3   # each in another order
  packed = take(several, 20)
  assert np.mean([batch['layout'].doc > 0 for batch in packed]) > 0.6   # 40 documents, at most three of a row


def test_rows_of_pieces_go_on_from_every_step(several):
  it = stream.batches(several, batch=3, seed=1)
  states, made = [], []
  for _ in range(25):
    states.append(json.loads(json.dumps(it.get_state())))
    made.append(next(it))
  it.close()
  assert len({state['at'][0][0] for state in states}) > 5   # several goes, several epochs
  for step in (0, 1, 9, 17, 24):
    for state in (states[step], {'next_step': step}):
      again = stream.batches(several, batch=3, seed=1, workers=3)
      again.set_state(state)
      data_cases.assert_same([next(again) for _ in range(min(3, 25 - step))], made[step:step + 3])
      assert again.get_state() == (states[step + 3] if step + 3 < 25 else again.get_state())
      again.close()


def test_encoding_goes_on_ahead_of_the_training_and_no_further(several, monkeypatch):
  """Of a file much larger than what is read: memory is bounded, and the first batch does not wait."""
  reads, real = [], sources.FileRows.read
  monkeypatch.setattr(sources.FileRows, 'read', lambda self, pieces, seed: reads.append(1) or real(self, pieces, seed))
  it = stream.batches(several, batch=1, seed=0)
  next(it)
  time.sleep(0.5)
  assert len(reads) < 20
  it.close()


# Mixtures.


@pytest.fixture
def mixture(several, pages):
  return stream.Mixture((several, Letters()), (0.7, 0.3))


class Letters(list):
  """A source of rows that are read one by one, as long as those of the files."""

  def __init__(self):
    row = lambda i: encode.EncodedDoc(np.full(9, i, np.int32), (4, 5), (6, 9))
    super().__init__(packing.pack_row([row(i)], OPTIONS.length) for i in range(10))


def share(batches):
  """Of rows of Letters, whose tokens are all the same."""
  return np.mean([len(set(row[:9].tolist())) == 1 for batch in batches for row in batch['tokens']])


def test_shares_of_a_mixture(mixture):
  made = take(mixture, 50)
  assert share(made) == 0.3 and all(share(made[:n]) == pytest.approx(0.3, abs=1 / (4 * n)) for n in range(1, 50))
  uneven = stream.schedule((0.55, 0.25, 0.2))
  assert np.bincount(uneven).tolist() == [550, 250, 200]
  drift = [np.abs(np.bincount(uneven[:n], minlength=3) - n * np.array([0.55, 0.25, 0.2])).max() for n in range(1, 1000)]
  assert max(drift) <= 1


def test_a_mixture_goes_on_and_is_the_same_for_all_processes(mixture):
  it = stream.batches(mixture, batch=4, seed=5)
  made = [next(it) for _ in range(9)]
  state = json.loads(json.dumps(it.get_state()))
  rest = [next(it) for _ in range(6)]
  it.close()
  again = stream.batches(mixture, batch=4, seed=5)
  for where, wanted in ((state, rest), ({'next_step': 2}, made[2:])):
    again.set_state(where)
    data_cases.assert_same([next(again) for _ in wanted], wanted)
  again.close()
  parts = [take(mixture, 9, seed=5, rows=[2 * i, 2 * i + 1]) for i in range(2)]
  glued = [jax.tree.map(lambda *rows: np.concatenate(rows), *step) for step in zip(*parts, strict=True)]
  data_cases.assert_same(glued, made)


def test_the_first_source_of_a_mixture_has_the_order_that_it_has_alone(several):
  letters = Letters()
  mixed = [row for row in row_ids(take(stream.Mixture((letters, several), (0.5, 0.5)), 6)) if len(set(row[:9])) < 9]
  alone = row_ids(take(letters, 3))
  assert [row for row in mixed if row in set(alone)] == alone


def test_shares_that_are_none(several):
  for weights in ((0.5,), (0.5, 0.6), (1.0, 0.0), (0.9999, 0.0001)):
    with pytest.raises(ValueError, match='give each one from 0.001, 1 in all'):
      stream.Mixture((several, several), weights)


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
  source = sources.FileRows(path, tokenizer, OPTIONS)
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


def test_a_row_that_cannot_be_read_is_named(pages, monkeypatch):
  """Out of the thread that reads ahead, and only once the batch is asked for."""
  first = [int(stream._order(pages, 0)[i]) for i in range(3)]
  docs = sources.PageRows.docs
  monkeypatch.setattr(sources.PageRows, 'docs', lambda self, row: docs(self, row) if row != first[2] else {}['lost'])
  it = stream.batches(pages, batch=1, seed=0)
  next(it), next(it)
  with pytest.raises(stream.UnreadableRow, match=rf'row {first[2]} of the data, pages \d+ to .*, cannot be read'):
    next(it)


def test_what_goes_wrong_in_a_piece_is_raised(several, monkeypatch):
  monkeypatch.setattr(sources.FileRows, 'read', lambda self, pieces, seed: {}['lost'])
  with pytest.raises(KeyError, match='lost'):
    take(several, 1)
  monkeypatch.setattr(sources.FileRows, 'read', lambda self, pieces, seed: [])
  with pytest.raises(ValueError, match='a.jsonl.*: a whole epoch without a document'):
    take(several, 1)
