"""The order in which the rows of a source are trained on, and the batches of one process.

The order of rows is one stream: the epochs of the source one after the other, each shuffled with its own seed. Global
batch n is rows n * batch ... (n + 1) * batch - 1 of the stream, and a process takes those of them that its devices hold.
What a step trains on is therefore a function of (source, batch, seed, step) alone: it is the same for any number of
processes, and the state of the iterator is one integer, the next step. With it goes a fingerprint of the source, so that
a run does not go on with other data than it began with.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np

from blockattn.errors import UserError

_SHOWN = 3      # names in an error
_PREFETCH = 2   # batches that a thread prepares ahead


class DataChanged(UserError):
  """The data is not that of the checkpoint that a run goes on from."""


class UnreadableRow(UserError):
  """A row of a source cannot be made; says where it comes from."""


class Batches(Iterator):
  """The batches of one process, from `batches`. The state is the next step and the source's fingerprint.

  Attributes:
    fingerprint: of the source, name -> value.
  """

  def __init__(self, dataset: grain.IterDataset, source_print: dict[str, str]):
    self._iterator, self._step = iter(dataset), 0
    self.fingerprint = source_print

  def __next__(self) -> dict:
    batch = next(self._iterator)
    self._step += 1
    return batch

  def get_state(self) -> dict:
    """{'next_step': the step whose batch `next` gives, 'source': its fingerprint}."""
    return {'next_step': self._step, 'source': self.fingerprint}

  def set_state(self, state: dict):
    """Goes to a step, forwards or backwards; nothing is read on the way.

    Raises:
      ValueError: no such state or step.
      DataChanged: the state is that of other data.
    """
    step = state['next_step'] if isinstance(state, dict) and 'next_step' in state else None
    if type(step) is not int or step < 0 or state.keys() - {'next_step', 'source'}:
      raise UserError(f"the state of the data is {{'next_step': an integer from 0}}, not {state!r}")
    if 'source' in state:   # a checkpoint of before there were fingerprints says nothing
      _check_same(state['source'], self.fingerprint)
    self._iterator.set_state({'next_index': step})
    self._step = step

  def close(self):
    """Ends the thread that reads ahead."""
    self._iterator.close()


def _check_same(before: dict[str, str], now: dict[str, str]):
  kinds = {'is new': now.keys() - before.keys(), 'is gone': before.keys() - now.keys(),
           'has changed, or what reads it (the tokenizer, the segmenter, Python itself)':
           {name for name in now.keys() & before.keys() if now[name] != before[name]}}
  told = [f'{name} {kind}' for kind, names in kinds.items() for name in sorted(names)]
  if told:
    more = f'; and {len(told) - _SHOWN} more' if len(told) > _SHOWN else ''
    raise DataChanged(f'this run was trained on other data: {"; ".join(told[:_SHOWN])}{more}. Put the data back as it was '
                      'to go on, or begin anew with another --workdir')


def batches(source: Any, *, batch: int, seed: int, rows: Sequence[int] | None = None) -> Batches:
  """The batches that one process sees, without end; a thread prepares them ahead, and what goes wrong there is raised when
  the batch is asked for.

  Args:
    source: any random-access source of rows, see `data.sources`. If it has `fingerprint()`, other data is refused later; if
      it has `where(row)`, a row that cannot be read is named by that.
    batch: rows of the global batch, B.
    seed: of the shuffling, 0 to 2**32 - 1.
    rows: which of the B rows of each global batch are read, numbers from 0, ascending; None: all.

  Returns:
    Iterator of batches: dicts of numpy arrays as from `packing.pack_row`, with a leading axis of len(rows) rows.

  Raises:
    ValueError: the arguments do not go together, or the source has no rows.
  """
  own = range(batch) if rows is None else tuple(rows)
  if batch < 1 or not own or sorted({*own}) != [*own] or own[0] < 0 or own[-1] >= batch:
    raise UserError(f'rows {own} of a batch of {batch}: give some of its rows, each once, ascending')
  if len(source) == 0:
    raise UserError('the source has no rows; give files with documents')
  stream = _stream(_Readable(source), seed)

  def step_batch(step):
    return grain.experimental.batch_and_pad([stream[step * batch + row] for row in own], batch_size=len(own))

  steps = grain.MapDataset.range(np.iinfo(np.int64).max // batch)
  ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=_PREFETCH)
  return Batches(steps.map(step_batch).to_iter_dataset(ahead), fingerprint(source))


def fingerprint(source: Any) -> dict[str, str]:
  """What a source is made of, name -> value; {} for one that does not say."""
  return source.fingerprint() if hasattr(source, 'fingerprint') else {}


class _Readable:
  """A source whose errors say of which row they are."""

  def __init__(self, source):
    self._source = source

  def __len__(self):
    return len(self._source)

  def __getitem__(self, row):
    try:
      return self._source[row]
    except Exception as error:
      place = self._source.where(row) if hasattr(self._source, 'where') else type(self._source).__name__
      raise UnreadableRow(f'row {row} of the data, {place}, cannot be read: {type(error).__name__}: {error}') from error


def _stream(source, seed):
  """The rows of all epochs, in order, as a grain dataset."""
  return grain.MapDataset.source(source).shuffle(seed=int(np.random.SeedSequence(seed).generate_state(1)[0])).repeat()


def row_numbers(source: Any, count: int, seed: int) -> np.ndarray:
  """Which rows of a source stand in the first `count` rows of its shuffled stream: int64, ascending, each once."""
  if count >= len(source):
    return np.arange(len(source))
  numbers = _stream(range(len(source)), seed)
  return np.unique([numbers[i] for i in range(count)])
