"""Places where a text may be cut if it must be: behind white space, or between any two characters that a reader tells apart.

They are offered beside the candidates where these alone cannot keep the bounds of `granularity`.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import regex

from blockattn.errors import UserError

# What a cut costs, in nats, at a place that is no candidate: they are used only where the bounds leave no other way.
SPACE_COST = 1e4    # behind white space
INSIDE_COST = 1e6   # between any two characters
LONGEST_CLUSTER = 32   # characters that a reader takes for one, marks and all; Unicode's stream-safe text has no longer ones

_SPACES = np.array([9, 10, 11, 12, 13, 28, 29, 30, 31, 32, 133, 5760, *range(8192, 8199), *range(8200, 8203), 8232, 8233,
                    8287, 12288], np.uint32)   # white space that may end a line, so not the no-break spaces
# What may belong to a character that a reader sees as one: \\r\\n, a pair of surrogates, and, with their neighbours, the
# characters that Unicode's rules for grapheme clusters name: marks, joiners, flags, parts of Hangul syllables.
_JOINING = r'[^\p{GCB=Other}\p{GCB=Control}\p{GCB=CR}\p{GCB=LF}]'
_ANY = r'(?:[\ud800-\udbff][\udc00-\udfff]|[^\r\n])'
_STRETCH = regex.compile(rf'\r\n|{_ANY}?(?:{_JOINING}++{_ANY}?)++|[\ud800-\udbff][\udc00-\udfff]')
_CLUSTER = regex.compile(r'(?:[\ud800-\udbff](?=[\udc00-\udfff]))?\X')

# The ends of the tokens of each text, as character offsets into it: non-decreasing int64 [tokens], the last its length.
TokenEnds = Callable[[Sequence[str]], Sequence[np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Places:
  """Where a cut may stand: offsets int64 [n], lengths up to there int64 [n], and the gain of cutting there float [n]."""
  offsets: np.ndarray
  lengths: np.ndarray
  gains: np.ndarray

  def __add__(self, other: 'Places') -> 'Places':
    """Both, in order; at the same offset the higher gain counts."""
    offsets, lengths, gains = (np.concatenate([getattr(self, name), getattr(other, name)])
                               for name in ('offsets', 'lengths', 'gains'))
    order = np.lexsort([-gains, offsets])
    order = order[np.diff(offsets[order], prepend=-1) > 0]
    return Places(offsets[order], lengths[order], gains[order])

  def __getitem__(self, index) -> 'Places':
    return Places(self.offsets[index], self.lengths[index], self.gains[index])


def offers(text: str, candidates: Places, total: int, bounds: tuple[int, int],
           token_ends: TokenEnds | None) -> Iterator[tuple[Places, int, int]]:
  """(places, minimum, maximum), ever more places; with the last there is always a chain of cuts. `total` is the text's
  length, `bounds` are (minimum, maximum) of a block."""
  minimum, maximum = bounds
  yield candidates, minimum, maximum
  # Between places at most maximum - minimum apart a block can always end in its bounds.
  places = with_forced(text, candidates, total, maximum - minimum, token_ends)
  yield places, minimum, maximum
  every = _inner_places(text, forced_places(text), _gaps(candidates, len(text), total, 0), token_ends)
  yield places + _spaces(every) + _even(every, total, maximum), minimum, maximum
  places = candidates + every
  yield places, minimum, maximum
  longest = int(np.diff(places.lengths, prepend=0, append=total).max())
  yield places, max(minimum - longest, 0), maximum
  yield places, 0, max(maximum, longest)


def with_forced(text: str, places: Places, total: int, room: int, token_ends: TokenEnds | None) -> Places:
  """The places, white space in the gaps between them longer than `room`, and characters in those that still are."""
  gaps = _gaps(places, len(text), total, room)
  if not len(gaps):
    return places
  forced = forced_places(text)
  places += _spaces(_inner_places(text, forced, gaps, token_ends))
  blobs = _inner_places(text, forced, _gaps(places, len(text), total, room), token_ends)
  # The first character of each quarter of the room is enough, and keeps a megabyte of base64 quick.
  return places + blobs[np.diff(blobs.lengths // max(1, room // 4), prepend=-1) > 0]


def _gaps(places, stop, total, room) -> np.ndarray:
  """int64 [gaps, 4]: (start, stop, length at start, length at stop) between neighbouring places over `room` apart."""
  offsets = np.concatenate([[0], places.offsets, [stop]])
  lengths = np.concatenate([[0], places.lengths, [total]])
  wide = np.diff(lengths) > room
  return np.stack([offsets[:-1], offsets[1:], lengths[:-1], lengths[1:]], 1)[wide]


def _spaces(places):
  return places[places.gains >= -SPACE_COST]


def _even(places, total, maximum):
  """The places next to those that cut the text into the fewest blocks of equal length."""
  if not len(places.offsets):
    return places
  blocks = math.ceil(total / maximum)
  wanted = np.arange(1, blocks, dtype=np.int64) * total // blocks
  around = np.searchsorted(places.lengths, wanted)[:, None] + np.arange(-2, 3)
  return places[np.unique(np.clip(around, 0, len(places.offsets) - 1))]


def _inner_places(text, forced, gaps, token_ends) -> Places:
  """Every place strictly inside the gaps where a cut may be forced; with tokens, white space and the ends of tokens."""
  offsets, gains = forced
  if not len(gaps):
    return Places(offsets[:0], offsets[:0], gains[:0])
  gap = np.searchsorted(gaps[:, 0], offsets, side='right') - 1
  inside = (gap >= 0) & (offsets > gaps[gap, 0]) & (offsets < gaps[gap, 1])
  offsets, gains, gap = offsets[inside], gains[inside], gap[inside]
  start, _, low, high = gaps[gap].T
  if token_ends is None:
    if (gaps[:, 1] - gaps[:, 0] != gaps[:, 3] - gaps[:, 2]).any():
      raise UserError('lengths are not characters; bounds then need token_ends, to count inside a wide gap')
    return Places(offsets, low + offsets - start, gains)
  ends = token_ends([text[start:stop] for start, stop, _, _ in gaps.tolist()])
  counts = np.array([len(e) for e in ends])
  ends, first = np.concatenate(ends) + np.repeat(gaps[:, 0], counts), np.cumsum(counts) - counts   # as offsets; before each
  done = np.searchsorted(ends, offsets, side='right')
  at_end = (done > first[gap]) & (ends[done - 1] == offsets)
  lengths = np.minimum(low + done - first[gap] + ~at_end, high)   # a divided token counts to the left
  usable = at_end | (gains >= -SPACE_COST)
  return Places(offsets[usable], lengths[usable], gains[usable])


def forced_places(piece: str) -> tuple[np.ndarray, np.ndarray]:
  """Where a piece of text may be cut if it must be: offsets int64 [n] between two characters, but not of \\r\\n or a
  surrogate pair, and their gains float [n], -SPACE_COST behind white space, else -INSIDE_COST. None is inside a grapheme
  cluster (a character with its marks, a flag, a Hangul syllable in parts) of up to LONGEST_CLUSTER characters."""
  codes = np.frombuffer(piece.encode('utf-32-le', 'surrogatepass'), np.uint32)
  before, after = codes[:-1], codes[1:]
  gains = np.where(np.isin(before, _SPACES) & ~np.isin(after, _SPACES), -SPACE_COST, -INSIDE_COST)
  whole = np.ones(len(before), bool)
  whole[inside_clusters(piece) - 1] = False
  offsets = np.flatnonzero(whole) + 1
  return offsets.astype(np.int64), gains[offsets - 1]


def inside_clusters(text: str) -> np.ndarray:
  """The offsets that divide what a reader takes for one character, ascending int64."""
  found = []
  for stretch in _STRETCH.finditer(text):
    for cluster in _CLUSTER.finditer(text, *stretch.span()):
      if 1 < cluster.end() - cluster.start() <= LONGEST_CLUSTER:
        found += range(cluster.start() + 1, cluster.end())
  return np.array(found, np.int64)
