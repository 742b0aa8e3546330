r"""Where a text may be cut, and what a segmenter reads of it: candidates, and the tokens of a text with its markers.

A separator regex proposes the candidates: after each run of line ends, and behind the end of a sentence. They divide
a text into units, text[c_i:c_{i+1}] with c_0 = 0; candidate i stands in front of unit i. What the model reads is the
units in order with a marker in front of each and one at the end:

    <cut 0> unit 0 <cut 1> unit 1 ... <cut m> unit m <cut m+1>

The decision on candidate i is read at marker i + 1, where a causal model has seen the unit behind the candidate. Marker
0 stands in front of the text and marker m + 1 behind it; neither is a candidate.

Styles:
  text: a marker is the words `<cut i>`, tokenised like any other; the decision is read at its last token.
  token: a marker is one special token.
  none: no marker; the decision is read at the last token of the unit.
  pooled: no marker, and a unit is one position of the model, which reads its tokens side by side: the last token of the
    unit before it, its first tokens, how many are left out, some of these, its last tokens, and, if wanted, how much the
    words behind the candidate are those in front of it (`cohesion`). Tens of thousands of characters are then a few hundred
    positions, and a decision may wait for further units behind the candidate (`ahead`).
"""

import dataclasses
import hashlib
import itertools
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from blockattn import errors, options as options_lib
from blockattn.errors import UserError

STYLES = ('text', 'token', 'none', 'pooled')
CUT_TOKEN = '<|cut|>'
GAP_TOKENS = ('<|gap_1|>', '<|gap_2|>', '<|gap_3|>', '<|gap_4|>')   # 1-7, 8-31, 32-127, more tokens left out

COHESION = (2, 4, 8, 16)   # units on either side of a candidate whose words are compared
LEVELS = 24                # of a similarity

_CHUNK = 4096   # units that are tokenized at a time
_BLANKS, _LINE_ENDS = ' \t', '\n\r\v\f\x85\u2028\u2029'
_LINE_END = r'(?:\r\n|[\n\r\v\f\x85\u2028\u2029])'
_CLOSING = r'["\'”’»›)\]}*_」』】）》〉]'
# No branch looks at a character more than a few times: a megabyte of dots or blanks stays linear.
SEPARATORS = (
    rf'{_LINE_END}(?:[^\S\n\r\v\f\x85\u2028\u2029]*+{_LINE_END})*+'                     # line ends, blank lines
    rf'|(?:(?<=[.!?…।॥؟۔։።])|(?<=[.!?…।॥؟۔։።]{_CLOSING})|(?<=[.!?…।॥؟۔։።]{_CLOSING}{{2}}))'   # a sentence's end and
    r'[^\S\n\r\v\f\x85\u2028\u2029]++(?![\n\r\v\f\x85\u2028\u2029])'                    # the white space behind it
    rf'|(?<=[。！？｡]){_CLOSING}*+[^\S\n\r\v\f\x85\u2028\u2029]*+(?![。！？｡…\n\r\v\f\x85\u2028\u2029])')


def candidates(text: str, separators: str = SEPARATORS) -> np.ndarray:
  """Places where any text may be cut: the ends of all matches, maybe empty ones, of the regular expression.

  Returns:
    int64 [m], strictly increasing offsets c with 0 < c < len(text).
  """
  ends = {match.end() for match in re.finditer(separators, text)}
  return np.array(sorted(ends - {0, len(text)}), np.int64)


@dataclasses.dataclass(frozen=True)
class ReadOptions:
  """How a text becomes tokens.

  Attributes:
    style: of the markers, see the module's docstring.
    head, tail: a unit of more tokens is read as its first `head` and its last `tail` tokens, which makes long prose
      cheap and lets a window hold more text. Between them stands one of GAP_TOKENS, if the tokenizer has them, that
      says how many are left out. The text style reads no gaps: what is left out is simply missing.
    inner: the head of a unit that does not begin a line; 0: as of any other.
    middle: of the tokens that are left out so many, evenly spaced, are read after all; in the pooled style only.
    ahead: units behind a candidate that are read before it is decided on; more than 1 in the pooled style only.
    cohesion: a pooled unit is read with the levels of `cohesion_levels`, too.
    separators: the regular expression of the candidates.
  """
  style: str = 'text'
  head: int = 1024
  tail: int = 256
  inner: int = 0
  middle: int = 0
  ahead: int = 1
  cohesion: bool = False
  separators: str = options_lib.not_a_key(default=SEPARATORS)

  def __post_init__(self):
    errors.check_choice('config.segment.read.style', self.style, STYLES)
    for name, least in (('head', 1), ('tail', 1), ('inner', 0), ('middle', 0), ('ahead', 1)):
      errors.check_number(f'config.segment.read.{name}', getattr(self, name), least)
    for name, none in (('middle', 0), ('ahead', 1), ('cohesion', False)):
      if (value := getattr(self, name)) != none and self.style != 'pooled':
        raise UserError(f'{name}={value} with marker style {self.style!r}; give {name}={none}, or read units pooled')
    try:
      re.compile(self.separators)
    except re.error as error:
      raise UserError(f'separators={self.separators!r} is no regular expression: {error}') from error

  @property
  def longest(self) -> int:
    """Most positions of a unit."""
    return 1 if self.style == 'pooled' else max(self.head, self.inner) + self.tail + 1

  @property
  def unit_tokens(self) -> int:
    """Tokens of a position, 0 where a position is one token."""
    return self.own_tokens + len(COHESION) * self.cohesion if self.style == 'pooled' else 0

  @property
  def own_tokens(self) -> int:
    """Those of them that stand in the text, or for what is left out."""
    return 1 + self.head + 1 + self.middle + self.tail


@dataclasses.dataclass(frozen=True)
class Units:
  """The units of a text as the model reads them."""
  ids: Any   # tokens of each unit: int32 arrays of different lengths, or, in the pooled style, one integer array [n, P]
  texts: tuple[str, ...]   # for each unit what stands in `ids`; () but in the text style
  sizes: np.ndarray   # int64 [n], positions of each unit
  counts: np.ndarray   # int64 [n], tokens of each whole unit

  def __len__(self):
    return len(self.ids)

  def take(self, numbers: np.ndarray) -> 'Units':
    """The units of these numbers."""
    texts = self.texts and _pick(self.texts, numbers)
    return Units(_pick(self.ids, numbers), texts, self.sizes[numbers], self.counts[numbers])


def _pick(items, numbers) -> Any:
  return items[numbers] if isinstance(items, np.ndarray) else tuple(items[i] for i in numbers.tolist())


def _chain(parts) -> Any:
  return np.concatenate(parts) if isinstance(parts[0], np.ndarray) else tuple(itertools.chain(*parts))


def joined(texts: Sequence[Units]) -> Units:
  """The units of texts, one behind the other."""
  return Units(*(_chain([getattr(units, field.name) for units in texts]) for field in dataclasses.fields(Units)))


class Reader:
  """Turns units into tokens of a `tokenizers.Tokenizer`. Text that looks like a special token is read as text. Raises
  ValueError: the style is 'token' and the tokenizer has no CUT_TOKEN."""

  def __init__(self, tokenizer: Any, options: ReadOptions):
    self.options, self._tokenizer = options, tokenizer
    self._tokenizer.encode_special_tokens = True
    self._tokenizer.no_truncation()
    self._tokenizer.no_padding()
    self._gaps = [tokenizer.token_to_id(token) for token in GAP_TOKENS]
    self._cut = tokenizer.token_to_id(CUT_TOKEN)
    if options.style == 'token' and self._cut is None:
      raise UserError(f'the tokenizer has no token {CUT_TOKEN}: add it, or use the marker style text or none')
    self._marker_ends = np.zeros(1, np.int64)   # tokens of the first n markers

  def fingerprint(self) -> str:
    """A hash of all that decides the tokens of a text."""
    return hashlib.sha256(repr((self.options, self._tokenizer.to_str())).encode()).hexdigest()[:32]

  def units(self, texts: Sequence[str]) -> Units:
    """The units of one text, in order; `texts` are none of them empty."""
    chunks, before, last = [], '\n', 0
    for start in range(0, max(1, len(texts)), _CHUNK):   # what the tokenizer says of a token takes a hundred times its id
      chunk = texts[start:start + _CHUNK]
      encodings = self._encode([_encodable(text) for text in chunk])
      all_ids = [e.ids or [0] for e in encodings]   # some normalizers leave nothing of a unit
      chunks.append(self._units(chunk, encodings, all_ids, before, last))
      before, last = (chunk[-1], all_ids[-1][-1]) if chunk else (before, last)
    return joined(chunks)

  def _units(self, texts, encodings, all_ids, before, last) -> Units:
    """The units of a piece of a text, behind the text `before` and the token `last`."""
    o, counts = self.options, np.array([len(ids) for ids in all_ids], np.int64)
    if o.style == 'pooled':
      return Units(self._pool(all_ids, last), (), np.ones(len(texts), np.int64), counts)
    begins_line = lambda before: before.rstrip(_BLANKS)[-1:] in _LINE_ENDS
    heads = [o.head if begins_line(text) or not o.inner else o.inner for text in (before, *texts[:-1])]
    ids = tuple(self._shorten(own, head) for own, head in zip(all_ids, heads, strict=True))
    kept = ()
    if o.style == 'text':
      kept = tuple(self._shorten_text(text, e, head) for text, e, head in zip(texts, encodings, heads, strict=True))
    return Units(ids, kept, np.array([len(i) for i in ids], np.int64), counts)

  def token_ends(self, texts: Sequence[str]) -> list[np.ndarray]:
    """For each text the ends of its tokens, int64 character offsets; several tokens of one character end alike."""
    encodings = self._encode([_encodable(text) for text in texts])
    return [np.array([end for _, end in encoding.offsets], np.int64) for encoding in encodings]

  def alone(self, texts: Sequence[str]) -> list[np.ndarray]:
    """For each text the tokens of it as a unit of its own, in front of which and behind which nothing stands."""
    units = self.units(texts)
    if self.options.style == 'pooled':
      units.ids[:, 0] = 0
    return [self.read(units, i, i + 1)[0] for i in range(len(units))]

  def fit(self, units: Units, first: int, room: int) -> int:
    """The end of the longest run of units from `first` on that takes at most `room` positions. Raises ValueError: not even
    one unit fits."""
    sizes = units.sizes[first:first + room]   # a unit is one position at least
    self._need_markers(len(sizes) + 1)
    cost = np.cumsum(sizes) + self._marker_ends[2:len(sizes) + 2] + self.options.ahead - 1
    count = int(np.searchsorted(cost, room, side='right'))
    if count == 0:
      raise UserError(f'a window of {room} tokens is too short for a unit of {units.sizes[first]}: make windows longer, '
                      'or units shorter')
    return first + count

  def read(self, units: Units, first: int, stop: int, ended: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """What the model reads of units first ... stop - 1, whose markers count from 0.

    Args:
      ended: the text ends behind the last unit, so that decisions need not wait for further ones.

    Returns:
      (tokens int32 [n], or [n, P] in the pooled style; read int64 [m]): `read[k]` is the position at which the decision
      on the candidate in front of unit first + k is read: the last token of the marker behind that unit, or of the unit
      itself. m is stop - first, less the units that an earlier end leaves undecided.
    """
    if self.options.style == 'text':
      return self._read_text(units.texts[first:stop])
    ids, sizes, wait = units.ids[first:stop], units.sizes[first:stop], self.options.ahead - 1
    if self.options.style == 'pooled':
      own = ids.astype(np.int32)
      if self.options.cohesion:
        own = np.concatenate([own, cohesion_levels(own[:, 1:])], axis=1)
      tokens = np.concatenate([own, np.zeros((wait if ended else 0, own.shape[1]), np.int32)])
      return tokens, np.arange(wait, len(tokens), dtype=np.int64)
    if self.options.style == 'none':
      return np.concatenate(ids), np.cumsum(sizes) - 1
    marker = np.array([self._cut], np.int32)
    return np.concatenate([marker, *(part for i in ids for part in (i, marker))]), np.cumsum(sizes + 1)

  def _read_text(self, texts):
    parts, ends, length = ['<cut 0>'], [], len('<cut 0>')
    for number, text in enumerate(texts, start=1):
      parts += [text, f'<cut {number}>']
      length += len(parts[-2]) + len(parts[-1])
      ends.append(length)
    encoding = self._tokenizer.encode(_encodable(''.join(parts)), add_special_tokens=False)
    starts = np.array([start for start, _ in encoding.offsets], np.int64)
    # A token that begins in front of a marker's end is its last one, even where it runs on into the text.
    return np.array(encoding.ids, np.int32), np.searchsorted(starts, ends, side='left') - 1

  def _need_markers(self, count):
    """Makes room in the table of how many tokens the first n markers have."""
    known = len(self._marker_ends) - 1
    if count <= known:
      return
    numbers, style = range(known, 2 * count), self.options.style
    new = [len(e) for e in self._encode([f'<cut {i}>' for i in numbers])] if style == 'text' else [
        int(style == 'token')] * len(numbers)
    self._marker_ends = np.concatenate([self._marker_ends, self._marker_ends[-1] + np.cumsum(new)])

  def _encode(self, texts):
    return self._tokenizer.encode_batch(texts, add_special_tokens=False)

  def _pool(self, all_ids, before):
    o = self.options
    small = self._tokenizer.get_vocab_size() <= 1 << 16
    out = np.zeros((len(all_ids), o.own_tokens), np.uint16 if small else np.int32)
    for row, ids in zip(out, all_ids, strict=True):
      first, last = ids[:o.head], ids[-o.tail:]
      row[0], before = before, ids[-1]
      row[1:1 + len(first)] = first
      left_out = ids[o.head:max(o.head, len(ids) - o.tail)]
      row[1 + o.head] = self._gap(len(left_out)) or 0
      if len(left_out) > o.middle:   # evenly spaced
        left_out = [left_out[(2 * i + 1) * len(left_out) // (2 * o.middle)] for i in range(o.middle)]
      row[2 + o.head:2 + o.head + len(left_out)] = left_out
      row[len(row) - len(last):] = last
    return out

  def _gap(self, out):
    """The token that says that `out` tokens are left out; None if none are, or if the tokenizer has no such token."""
    return None if out <= 0 else self._gaps[min(max(out.bit_length() - 2, 1) // 2, 3)]

  def _shorten(self, ids, head):
    if len(ids) <= head + self.options.tail:
      return np.array(ids, np.int32)
    gap = self._gap(len(ids) - head - self.options.tail)
    return np.array(ids[:head] + ([] if gap is None else [gap]) + ids[-self.options.tail:], np.int32)

  def _shorten_text(self, text, encoding, head):
    if len(encoding) <= head + self.options.tail:
      return text
    return text[:encoding.offsets[head - 1][1]] + text[encoding.offsets[-self.options.tail][0]:]


def cohesion_levels(ids: np.ndarray) -> np.ndarray:
  """How alike the words are on both sides of each unit's beginning, for every width in COHESION.

  The cosine between the sums of the units in front and behind, a token of a unit counting log(1 + times) log(n / units that
  have it): what TextTiling compares (Hearst 1997), with weights. Its root is given in levels from 1, nothing in common, to
  LEVELS; 0 where nothing stands in front. Only the given units are looked at, so that a window's beginning is a text's.

  Args:
    ids: int [n, P], the tokens of each unit, 0 for none.

  Returns:
    int32 [n, len(COHESION)].
  """
  n = len(ids)
  found, words = np.unique(ids, return_inverse=True)
  counts = np.bincount((np.arange(n)[:, None] * len(found) + words.reshape(ids.shape)).ravel(), minlength=n * len(found))
  counts = counts.reshape(n, len(found)).astype(np.float32)
  counts[:, found == 0] = 0
  held = np.count_nonzero(counts, axis=0)
  weights = np.log1p(counts) * np.log(n / np.maximum(held, 1)).astype(np.float32)
  sums = np.concatenate([np.zeros((1, len(found)), np.float32), np.cumsum(weights, axis=0)])
  at, levels = np.arange(n), np.zeros((n, len(COHESION)), np.int32)
  for column, width in enumerate(COHESION):
    front = sums[at] - sums[np.maximum(at - width, 0)]
    behind = sums[np.minimum(at + width, n)] - sums[at]
    size = np.linalg.norm(front, axis=1) * np.linalg.norm(behind, axis=1)
    cosine = np.einsum('nv,nv->n', front, behind) / np.where(size > 0, size, 1)
    levels[:, column] = 1 + np.minimum(np.sqrt(np.clip(cosine, 0, 1)) * LEVELS, LEVELS - 1)
  levels[:1] = 0
  return levels


def split(text: str, cuts: Sequence[int] | np.ndarray) -> list[str]:
  """The parts of a text between neighbouring cuts."""
  bounds = [0, *map(int, cuts), len(text)]
  return [text[a:b] for a, b in zip(bounds[:-1], bounds[1:], strict=True)]


def _encodable(text):
  """The text with each half surrogate, which UTF-8 cannot express, as one replacement character."""
  return re.sub('[\ud800-\udfff]', '\ufffd', text)
