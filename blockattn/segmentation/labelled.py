"""Documents with known cuts -> rows that a segmenter is trained and validated on.

A row is a dict of numpy arrays: tokens int32 [T], or [T, P] where a position is a whole unit; layout, a BlockLayout of
arrays [T] whose documents are the parts that are read apart; labels int32 [T], at the position where a decision is read 1
for a cut and 0 for none, IGNORED elsewhere: also in front of a part, where nothing is decided, and within `tolerance`
candidates of a cut.

Training rows are drawn, row i from (seed, i) alone: excerpts that start at any line, so that a window's start is no cut;
excerpts of several documents in one text, where the change of the document is a cut; hints taken away, surfaces
changed and units left out at random. Validation rows are the documents as they are, in windows one after the other.
"""

import collections
import dataclasses
import hashlib
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from blockattn import errors, options as options_lib
from blockattn.data import packing
from blockattn.errors import UserError
from blockattn.segmentation import markers, measures, variation
from blockattn.segmentation.model import IGNORED
from blockattn.segmentation.semanticseg import hints

_ROWS = 10_000_000   # of an epoch; there is no end of them


@dataclasses.dataclass(frozen=True)
class DrawOptions:
  """
  Attributes:
    length: T, positions of a row.
    temperature: a document is of category c with a probability ~ n_c^(1 / temperature), n_c the category's characters:
      1 takes them as they come, a large one all categories alike.
    variants: texts that are made of each document, the first as it is. They are encoded once and kept in memory.
    bare: probability that a variant but the first loses all its surface hints.
    hints: else, the probability that it loses those of a kind.
    variation: probability of each change of a variant's surface, see `variation.vary`.
    short: probability that an excerpt ends after 4 to 60 units, instead of with the row or the document.
    mosaic: probability that a text is made of excerpts of 3 to 12 units of documents of one category.
    join: probability that an excerpt continues the text before it, instead of being read apart.
    skip: share of the units, of those that begin no block, that are left out, in half of the excerpts.
    drop: share of the tokens of a pooled unit that are read as nothing, in half of the rows.
    tolerance: candidates so near to a cut are not trained on.
  """
  length: int = options_lib.not_a_key()
  temperature: float = 4.0
  variants: int = 4
  bare: float = 0.4
  hints: float = 0.3
  variation: float = 0.3
  short: float = 0.2
  mosaic: float = 0.08
  join: float = 0.5
  skip: float = 0.1
  drop: float = 0.1
  tolerance: int = 0

  def __post_init__(self):
    where = 'config.segment.draw.'
    errors.check_number(f'{where}temperature', self.temperature, above=0)
    errors.check_number(f'{where}variants', self.variants, 1)
    errors.check_number(f'{where}tolerance', self.tolerance, 0)
    for name in ('bare', 'hints', 'variation', 'short', 'mosaic', 'join', 'skip', 'drop'):
      errors.check_number(where + name, getattr(self, name), 0, 1)


@dataclasses.dataclass(frozen=True)
class Coded:
  """A text as units with their labels."""
  units: markers.Units   # n units
  labels: np.ndarray   # int32 [n], of the candidate in front of each; IGNORED for the first
  starts: Any = ()   # int64, the units that begin a line, 0 among them; () of a part of a text
  moved: int = 0   # gold cuts that were no candidates, and went to the nearest one

  def __len__(self):
    return len(self.units)

  def take(self, numbers: np.ndarray) -> 'Coded':
    """The text that these units make."""
    return Coded(self.units.take(numbers), self.labels[numbers])

  def then(self, other: 'Coded') -> 'Coded':
    """This text with another one behind it: the change is a cut."""
    return Coded(markers.joined([self.units, other.units]), np.concatenate([self.labels, [1], other.labels[1:]]))


def code(blocks: Sequence[str], reader: markers.Reader, tolerance: int = 0) -> Coded:
  """The text that the blocks make, as units with labels."""
  text = ''.join(blocks)
  candidates = markers.candidates(text, reader.options.separators)
  labels, moved = labels_of(blocks, candidates, tolerance)
  starts = [0] + [i for i, at in enumerate(candidates.tolist(), start=1) if text[at - 1] in '\n\r']
  return Coded(reader.units(markers.split(text, candidates)), np.concatenate([[IGNORED], labels]).astype(np.int32),
               np.array(starts, np.int64), moved)


def labels_of(blocks: Sequence[str], candidates: np.ndarray, tolerance: int = 0) -> tuple[np.ndarray, int]:
  """The labels of a text's candidates.

  Returns:
    (int32 [m]: 1 a cut, 0 none, IGNORED within `tolerance` candidates of a cut; the number of cuts that were no candidates,
    and went to the nearest one, the earlier of two).
  """
  labels = np.zeros(len(candidates), np.int32)
  cuts = np.fromiter(itertools.accumulate(map(len, blocks[:-1])), np.int64)
  if not len(candidates) or not len(cuts):
    return labels, len(cuts)   # a text without candidates has no place for its cuts
  nearest = measures.nearest_to_each(cuts, candidates)
  for shift in range(-tolerance, tolerance + 1):
    near = nearest + shift
    labels[near[(near >= 0) & (near < len(labels))]] = IGNORED
  labels[nearest] = 1
  return labels, int(np.sum(candidates[nearest] != cuts))


def moved_cuts(documents: Sequence[Any], separators: str = markers.SEPARATORS) -> dict[str, tuple[int, int]]:
  """For each category how many gold cuts are no candidates, and how many there are in all."""
  counts = collections.defaultdict(lambda: np.zeros(2, np.int64))
  for document in documents:
    moved = labels_of(document.blocks, markers.candidates(document.text, separators))[1]
    counts[document.category] += (moved, len(document.blocks) - 1)
  return {category: (int(moved), int(cuts)) for category, (moved, cuts) in sorted(counts.items())}


def place_labels(coded: Coded, reader: markers.Reader, first: int, stop: int, ended: bool):
  """(tokens [n] or [n, P], labels int32 [n]) of units first ... stop - 1; the first unit is not decided on."""
  tokens, read = reader.read(coded.units, first, stop, ended)
  labels = np.full(len(tokens), IGNORED, np.int32)
  labels[read[1:]] = coded.labels[first + 1:first + len(read)]
  return tokens, labels


def pack(parts: Sequence[tuple[np.ndarray, np.ndarray]], length: int) -> dict:
  """One row of parts, each (tokens, labels), that are read apart; at least one."""
  sizes = [len(tokens) for tokens, _ in parts]
  free = length - sum(sizes)
  pad = lambda arrays, fill: np.concatenate([*arrays, np.full((free, *arrays[0].shape[1:]), fill, np.int32)])
  return {'tokens': pad([tokens for tokens, _ in parts], 0), 'labels': pad([labels for _, labels in parts], IGNORED),
          'layout': packing.layout_row([[size] for size in sizes], length)}


class DrawnRows:
  """Training rows of `semanticseg.schema.Document`s: a source for `stream.batches`. Raises ValueError: no documents, or rows
  too short for the longest unit that the reader reads."""

  def __init__(self, documents: Sequence[Any], reader: markers.Reader, options: DrawOptions, seed: int):
    self._documents = list(documents)
    self._by_category = collections.defaultdict(list)
    for number, document in enumerate(self._documents):
      self._by_category[document.category].append(number)
    if not self._documents:
      raise UserError('no documents to train on: give SemanticSeg files that hold some (config.data.files)')
    self._least = 3 * reader.options.longest + reader.options.ahead   # positions that a text is begun in
    if options.length <= self._least:
      raise UserError(f'config.data.length={options.length} is too short: three units of up to config.segment.read.head + '
                      f'tail = {reader.options.longest - 1} tokens have to fit; give more than {self._least}, or a smaller '
                      'config.segment.read.head and tail')
    self.length, self._reader, self._options, self._seed = options.length, reader, options, seed
    self._coded = {}
    self.categories = sorted(self._by_category)
    sizes = [sum(len(block) for i in self._by_category[c] for block in self._documents[i].blocks) for c in self.categories]
    weights = np.array(sizes, np.float64) ** (1 / options.temperature)
    self.shares = weights / weights.sum()

  def __len__(self):
    return _ROWS

  def __getitem__(self, row: int) -> dict:
    rng = np.random.default_rng((self._seed, int(row)))
    parts, room, category = [], self.length, self._category(rng)
    while room > self._least:
      coded, ended = self._text(category, room, rng)
      stop = self._reader.fit(coded.units, 0, room)
      part = place_labels(coded, self._reader, 0, stop, ended and stop == len(coded))
      if len(part[0]) > room:
        break   # words whose tokens join otherwise than they were counted
      parts.append(part)
      room -= len(part[0])
      category = category if rng.random() < 0.6 else self._category(rng)
    packed = pack(parts, self.length)
    if packed['tokens'].ndim == 2 and rng.random() < 0.5:
      packed['tokens'][rng.random(packed['tokens'].shape) < self._options.drop] = 0
    return packed

  def fingerprint(self) -> dict[str, str]:
    """What the rows are made of, by name: the documents of each category, and what reads them."""
    digests = {category: hashlib.sha256() for category in self.categories}
    for document in self._documents:
      digests[document.category].update(repr((document.id, document.blocks)).encode())
    return {f'documents of category {category!r}': digest.hexdigest()[:32] for category, digest in digests.items()} | {
        'the tokenizer': self._reader.fingerprint()}

  def _category(self, rng):
    return self.categories[rng.choice(len(self.categories), p=self.shares)]

  def _text(self, category, room, rng) -> tuple[Coded, bool]:
    """An excerpt, maybe with others behind it, and whether it ends where its last document does."""
    mosaic = rng.random() < self._options.mosaic
    text, ended = self._excerpt(category, mosaic, rng)
    while text.units.sizes.sum() < room and (mosaic or rng.random() < self._options.join):
      category = category if mosaic or rng.random() < 0.6 else self._category(rng)
      more, ended = self._excerpt(category, mosaic, rng)
      text = text.then(more)
    return text, ended

  def _excerpt(self, category, mosaic, rng):
    numbers = self._by_category[category]
    coded = self._variant(numbers[rng.integers(len(numbers))], int(rng.integers(self._options.variants)))
    starts = coded.starts
    most = self.length if rng.random() >= self._options.short else int(rng.integers(4, 60))
    most = int(rng.integers(3, 13)) if mosaic else most
    # Not so near to the end that next to nothing follows.
    last = np.searchsorted(starts, max(len(coded) - most // 2, 0), side='right')
    first = 0 if rng.random() < 0.25 else int(starts[rng.integers(max(1, last))])
    stop = min(first + most, len(coded))
    if stop < len(coded):   # whole lines, so that another text can follow
      stop = int(starts[min(np.searchsorted(starts, stop), len(starts) - 1)])
      stop = stop if stop > first else len(coded)
    numbers = np.arange(first, stop)
    if rng.random() < 0.5:
      numbers = numbers[(coded.labels[numbers] != 0) | (rng.random(len(numbers)) >= self._options.skip)]
    return coded.take(numbers), stop == len(coded)

  def _variant(self, number, variant) -> Coded:
    """The text of a variant of a document."""
    if (number, variant) not in self._coded:
      document, o = self._documents[number], self._options
      blocks, rng = document.blocks, np.random.default_rng((self._seed, number, variant))
      if variant:
        blocks = variation.vary(blocks, document.category, rng, o.variation)
        bare = rng.random() < o.bare
        blocks = hints.random_hints(blocks, document.category, rng, 1.0 if bare else o.hints)
      self._coded[number, variant] = code(blocks, self._reader, o.tolerance)
    return self._coded[number, variant]


def windows(document: Any, reader: markers.Reader, length: int) -> list[dict]:
  """A document's rows, windows that overlap by what a decision waits for."""
  coded = code(document.blocks, reader)
  rows, first = [], 0
  while first < len(coded):
    stop = reader.fit(coded.units, first, length)
    ended = stop == len(coded)
    tokens, labels = place_labels(coded, reader, first, stop, ended)
    rows.append(pack([(tokens[:length], labels[:length])], length))
    first = stop if ended else max(first + 1, stop - reader.options.ahead)
  return rows


def validation_rows(documents: Sequence[Any], reader: markers.Reader, length: int,
                    per_category: int) -> tuple[list[dict], list[str]]:
  """(Windows of every category, at most `per_category` of each, taken evenly from its documents; the category of each)."""
  grouped = collections.defaultdict(list)
  for document in some(documents, per_category):
    grouped[document.category].append(windows(document, reader, length))
  rows, names = [], []
  for category, windowed in sorted(grouped.items()):
    # One window of every document, then a second of each, ...: the beginnings do not crowd out the rest.
    turns = (row for rows in itertools.zip_longest(*windowed) for row in rows if row is not None)
    taken = list(itertools.islice(turns, per_category))
    rows += taken
    names += [category] * len(taken)
  return rows, names


def some(documents: Sequence[Any], per_category: int) -> list[Any]:
  """At most `per_category` documents of each category, evenly taken."""
  grouped = collections.defaultdict(list)
  for document in documents:
    grouped[document.category].append(document)
  return [doc for docs in grouped.values() for doc in docs[::max(1, len(docs) // per_category)][:per_category]]
