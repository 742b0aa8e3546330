"""The order in which the rows of sources are trained on, and the batches of one process.

The order of rows is one stream. Of one source it is its epochs one after the other: the numbers of its rows, or of its
pieces (see `data.sources`), each epoch shuffled with its own seed; pieces are read some together, in threads ahead of the
training, and their rows follow each other. A mixture takes each row from the source whose share is furthest behind. Global
batch n is rows n * batch ... (n + 1) * batch - 1 of the stream, and a process takes those of them that its devices hold.

What a step trains on is therefore a function of (sources, seed, batch, step) alone: it is the same for any number of
processes, and the state of the iterator is the next step and how far it has come in each source, which is the same in all
of them, too. With it goes a fingerprint of the sources, so that a run does not go on with other data than it began with.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import jax
import numpy as np

from blockattn.errors import UserError

_SHOWN = 3      # names in an error
_PREFETCH = 2   # batches that a thread prepares ahead
_CYCLE = 1000   # rows after which the sources of a mixture follow each other as before


class DataChanged(UserError):
  """The data is not that of the checkpoint that a run goes on from."""


class UnreadableRow(UserError):
  """A row of a source cannot be made; says where it comes from."""


@dataclasses.dataclass(frozen=True)
class Mixture:
  """Several sources, a share of the rows from each.

  Attributes:
    sources: see `data.sources`.
    weights: their shares, above 0; their sum is 1.
  """
  sources: tuple
  weights: tuple[float, ...]

  def __post_init__(self):
    if len(self.sources) != len(self.weights) or abs(sum(self.weights) - 1) > 1e-6 or min(self.weights) < 1 / _CYCLE:
      raise UserError(f'a mixture of {len(self.sources)} sources has the shares {self.weights}; give each one from '
                      f'{1 / _CYCLE}, 1 in all')

  def fingerprint(self) -> dict[str, str]:
    """Of each source, and the shares."""
    named = {f'{name} (source {i + 1})': value for i, source in enumerate(self.sources)
             for name, value in fingerprint(source).items()}
    return named | {'the shares of the sources': repr(self.weights)}


def parts_of(source: Any) -> tuple:
  """The sources of a mixture; of a source, itself."""
  return source.sources if isinstance(source, Mixture) else (source,)


def fingerprint(source: Any) -> dict[str, str]:
  """What a source or mixture is made of, name -> value; {} for one that does not say."""
  return source.fingerprint() if hasattr(source, 'fingerprint') else {}


def schedule(weights: Sequence[float]) -> np.ndarray:
  """Which source each row of a cycle is from: int [_CYCLE], always that which is furthest behind its share."""
  counts, chosen = np.zeros(len(weights)), []
  for row in range(1, _CYCLE + 1):
    chosen.append(int(np.argmax(np.asarray(weights) * row - counts)))
    counts[chosen[-1]] += 1
  return np.array(chosen)


# One source.


def _order(source, seed) -> Any:
  """The numbers of all epochs, in order."""
  shuffled = grain.MapDataset.range(len(source)).shuffle(seed=int(np.random.SeedSequence(seed).generate_state(1)[0]))
  return shuffled.repeat()


class _Rows:
  """The rows of a source that are read one by one."""

  def __init__(self, source, seed):
    self._source, self._order, self._at = source, _order(source, seed), 0

  def next(self, wanted: bool) -> dict | None:
    """The next row; None if it is not wanted, and then nothing is read."""
    number, self._at = int(self._order[self._at]), self._at + 1
    if not wanted:
      return None
    try:
      return self._source[number]
    except Exception as error:
      place = self._source.where(number) if hasattr(self._source, 'where') else type(self._source).__name__
      raise UnreadableRow(f'row {number} of the data, {place}, cannot be read: {type(error).__name__}: {error}') from error

  def state(self) -> list[int]:
    return [self._at, 0]

  def go(self, rows: int, state: Sequence[int] | None):
    """To where `rows` have been read, which was `state`."""
    self._at = rows

  def close(self):
    pass


class _PackedRows:
  """The rows of a source of pieces. The state is (how often pieces were read, how many rows of the last are taken)."""

  def __init__(self, source, seed, workers):
    self._source = source
    together = min(source.together, len(source))
    self._reads = -(-len(source) // together)   # of an epoch
    ahead = grain.ReadOptions(num_threads=workers, prefetch_buffer_size=workers)
    reads = grain.MapDataset.range(np.iinfo(np.int64).max).map(_reader(source, seed, together, self._reads))
    self._ahead = iter(reads.to_iter_dataset(ahead))
    self._at, self._taken, self._rows = 0, 0, None

  def next(self, wanted):
    empty = 0
    while self._rows is None or self._taken == len(self._rows):
      empty += self._rows is not None and not self._rows
      if empty > self._reads:
        raise UserError(f'{", ".join(fingerprint(self._source))}: a whole epoch without a document')
      self._at, self._taken, self._rows = self._at + (self._rows is not None), 0, next(self._ahead)
    self._taken += 1
    return self._source.pack(self._rows[self._taken - 1]) if wanted else None

  def state(self):
    return [self._at, self._taken]

  def go(self, rows, state):
    self._at, self._taken, self._rows = (state[0] if state else 0), 0, None
    self._ahead.set_state({'next_index': self._at})
    for _ in range(state[1] if state else rows):   # without a state all is read again
      self.next(wanted=False)

  def close(self):
    self._ahead.close()


def _reader(source, seed, together, reads):
  """number -> the rows of the pieces that are read together then; of an epoch there are `reads`."""
  order, size = _order(source, seed), len(source)

  def read(number):
    epoch, part = divmod(int(number), reads)
    first, last = (epoch * size + min(i * together, size) for i in (part, part + 1))
    return source.read([int(order[i]) for i in range(first, last)], (*seed, int(number)))

  return read


# Batches.


class _Stream(Iterator):
  """The batches of one process, made when they are asked for; what a thread of `Batches` goes through."""

  def __init__(self, source, batch, seed, own, workers, changes):
    self._batch, self._own, self._changes, self._step = batch, frozenset(own), changes, 0
    self._schedule = schedule(source.weights if isinstance(source, Mixture) else (1.0,))
    # The first has the order that it has alone.
    self._parts = [_PackedRows(part, (seed, i), workers) if hasattr(part, 'read') else
                   _Rows(part, (seed, i) if i else seed) for i, part in enumerate(parts_of(source))]

  def __next__(self):
    rows = []
    for number in range(self._step * self._batch, (self._step + 1) * self._batch):
      wanted = number - self._step * self._batch in self._own
      row = self._parts[self._schedule[number % _CYCLE]].next(wanted)
      if wanted:
        for change in self._changes:
          row = change(number, row)
        rows.append(row)
    self._step += 1
    return jax.tree.map(lambda *x: np.stack(x), *rows)

  def get_state(self):
    return {'next_step': self._step, 'at': [part.state() for part in self._parts]}

  def set_state(self, state):
    self._step = state['next_step']
    cycles, rest = divmod(self._step * self._batch, _CYCLE)
    for i, part in enumerate(self._parts):
      count = cycles * (self._schedule == i).sum() + (self._schedule[:rest] == i).sum()
      part.go(int(count), state['at'][i] if 'at' in state else None)

  def close(self):
    for part in self._parts:
      part.close()


class Batches(Iterator):
  """The batches of one process, from `batches`. The state is the next step, how far it has come, and the sources'
  fingerprint.

  Attributes:
    fingerprint: of the sources, name -> value.
  """

  def __init__(self, stream: _Stream, source_print: dict[str, str]):
    self._stream, self.fingerprint = stream, source_print
    self._ahead = grain.experimental.ThreadPrefetchDatasetIterator(stream, _PREFETCH)

  def __next__(self) -> dict:
    return next(self._ahead)

  def get_state(self) -> dict:
    """{'next_step': the step whose batch `next` gives, 'at': where in each source, 'source': the fingerprint}."""
    return self._ahead.get_state() | {'source': self.fingerprint}

  def set_state(self, state: dict):
    """Goes to a step, forwards or backwards. Nothing is read on the way if the state says where in each source that is, or
    its rows are read one by one.

    Raises:
      ValueError: no such state or step.
      DataChanged: the state is that of other data.
    """
    step = state['next_step'] if isinstance(state, dict) and 'next_step' in state else None
    if type(step) is not int or step < 0 or state.keys() - {'next_step', 'at', 'source'}:
      raise UserError(f"the state of the data is {{'next_step': an integer from 0}}, not {state!r}")
    if 'source' in state:   # a checkpoint of before there were fingerprints says nothing
      _check_same(state['source'], self.fingerprint)
    self._ahead.set_state({name: value for name, value in state.items() if name != 'source'})

  def close(self):
    """Ends the threads that read ahead."""
    self._ahead.close()
    self._stream.close()


def _check_same(before: dict[str, str], now: dict[str, str]):
  kinds = {'is new': now.keys() - before.keys(), 'is gone': before.keys() - now.keys(),
           'has changed, or what reads it (the tokenizer, the segmenter, Python itself)':
           {name for name in now.keys() & before.keys() if now[name] != before[name]}}
  told = [f'{name} {kind}' for kind, names in kinds.items() for name in sorted(names)]
  if told:
    more = f'; and {len(told) - _SHOWN} more' if len(told) > _SHOWN else ''
    raise DataChanged(f'this run was trained on other data: {"; ".join(told[:_SHOWN])}{more}. Put the data back as it was '
                      'to go on, or begin anew with another --workdir')


def batches(source: Any, *, batch: int, seed: int, rows: Sequence[int] | None = None, workers: int = 2,
            changes: Sequence[Callable[[int, dict], dict]] = ()) -> Batches:
  """The batches that one process sees, without end; a thread prepares them ahead, and what goes wrong there is raised when
  the batch is asked for.

  Args:
    source: see `data.sources`, or any sequence of rows; or a `Mixture`. If it has `fingerprint()`, other data is refused
      later; if it has `where(row)`, a row that cannot be read is named by that.
    batch: rows of the global batch, B.
    seed: of the shuffling, 0 to 2**32 - 1.
    rows: which of the B rows of each global batch are read, numbers from 0, ascending; None: all.
    workers: threads that read and encode pieces ahead.
    changes: (number of a row in the stream, row) -> row, one after the other.

  Returns:
    Iterator of batches: dicts of numpy arrays as from `packing.pack_row`, with a leading axis of len(rows) rows.

  Raises:
    ValueError: the arguments do not go together, or the source has no rows.
  """
  own = range(batch) if rows is None else tuple(rows)
  if batch < 1 or not own or sorted({*own}) != [*own] or own[0] < 0 or own[-1] >= batch:
    raise UserError(f'rows {own} of a batch of {batch}: give some of its rows, each once, ascending')
  if any(len(part) == 0 for part in parts_of(source)):
    raise UserError('the source has no rows; give files with documents')
  print_ = functools.reduce(lambda found, one: found | fingerprint(one), (source, *changes), {})
  return Batches(_Stream(source, batch, seed, own, workers, changes), print_)
