"""Which tiles of the score matrix hold anything to compute. Everything here is traced: new boundaries never recompile.

A row's mask is never built. Instead every token gets three query marks and three key marks, and

    may_attend(t, s)  =  s <= t  and  query_marks[c, t] == key_marks[c, s] for some c

  c   query mark                    key mark                        says
  0   number of the token's block   number of the token's block     a token sees its own block
  1   document                      document, of shared tokens      everybody sees what is shared
  2   document, of readers          document, unless hidden         a reader sees what is not hidden

Where a token does not take part in a rule (and everywhere in padding) its mark is NO_QUERY or NO_KEY, which agree with
nothing. Marks never decrease along a row, because documents and blocks stand in order; so of a tile of keys wholly
before a tile of queries the largest key mark is at most the smallest query mark, and the tile holds an allowed pair
exactly if these two agree for some c. `touched` and `full` below are exact, not bounds, for every layout whose
documents and blocks are in order (any of its tokens may have been removed), apart from one case that costs nothing: a
diagonal tile of one single token is called partial though it is full.

Tiles of unequal size are put together from granules, squares of the smaller size. Sizes of arrays: [B, T] per token,
[B, T / granule, T / granule] per tile, nothing else.
"""

import flax.struct
import jax
import jax.numpy as jnp

from blockattn import blocks
from blockattn.kernels.tiles import Tiles

NO_QUERY = -1
NO_KEY = -2
NOTHING = -3


@flax.struct.dataclass
class Visits:
  """For each tile of one side the tiles of the other side to visit, in ascending order.

  Attributes:
    index: int32 [B, n, m], the tiles to visit first; what follows the first `count` entries is not to be read.
    count: int32 [B, n].
  """
  index: jax.Array
  count: jax.Array


@flax.struct.dataclass
class Schedule:
  """Visits to tiles that need the mask (`partial`) and to tiles in which every pair is allowed (`full`)."""
  partial: Visits
  full: Visits


def clamp_tiles(tiles: Tiles, length: int) -> Tiles:
  """The tiles cut down to a row of `length` tokens, with one still dividing the other.

  Raises:
    ValueError: a size is not positive, or neither divides the other.
  """
  small, large = min(tiles), max(tiles)
  if small < 1 or large % small:
    raise ValueError(f'tiles {tuple(tiles)}: sizes must be positive and one must divide the other, as in (128, 256)')
  small = min(small, _round_up(length, 8))
  large = min(_round_up(large, small), _round_up(length, small))
  return Tiles(small, large) if tiles.query <= tiles.key else Tiles(large, small)


def _round_up(x, multiple):
  return -(-x // multiple) * multiple


def pad_tokens(x, tiles: Tiles, axis: int):
  """Pads a token axis with zeros to whole tiles (in a layout: with padding rows)."""
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, -x.shape[axis] % max(tiles))
  return jnp.pad(x, widths)


def pad_layout(layout: blocks.BlockLayout, tiles: Tiles) -> blocks.BlockLayout:
  """The layout with padding rows up to whole tiles."""
  return jax.tree.map(lambda x: pad_tokens(jnp.asarray(x), tiles, axis=1), layout)


def token_marks(layout: blocks.BlockLayout):
  """(query_marks, key_marks), int32 [B, 3, T] each: see the head of this file."""
  doc, shared = jnp.asarray(layout.doc), jnp.asarray(layout.shared)
  present = doc != 0
  number = jnp.cumsum(blocks.block_starts(layout), axis=1, dtype=jnp.int32)
  mark = lambda value, where, otherwise: jnp.where(where & present, value, otherwise)
  query = [(number, True), (doc, True), (doc, layout.reader)]
  key = [(number, True), (doc, shared), (doc, ~layout.hidden)]
  stack = lambda pairs, otherwise: jnp.stack([mark(*pair, otherwise) for pair in pairs], axis=1).astype(jnp.int32)
  return stack(query, NO_QUERY), stack(key, NO_KEY)


def pair_mask(query_marks, key_marks, query_start, key_start):
  """The mask of one tile: bool [queries, keys].

  Args:
    query_marks, key_marks: [3, queries] and [3, keys], slices of `token_marks`.
    query_start, key_start: index in the row of the first query and of the first key.
  """
  query_index = query_start + jnp.arange(query_marks.shape[1])
  key_index = key_start + jnp.arange(key_marks.shape[1])
  # A reduction, not three comparisons in a row: XLA's CPU backend then computes the mask once, and the softmax that
  # follows stays vectorised (three times faster).
  agree = (query_marks[:, :, None] == key_marks[:, None, :]).any(axis=0)
  return agree & (key_index[None, :] <= query_index[:, None])


def tile_masks(layout: blocks.BlockLayout, tiles: Tiles):
  """(touched, full): bool [B, query tiles, key tiles] each.

  touched: some query of the tile may attend to some key of it. full: every query may attend to every key.
  T must be a multiple of both sizes, see `pad_layout`.
  """
  granule = min(tiles)
  query_marks, key_marks = token_marks(layout)
  touched, full = _touched(query_marks, key_marks, granule), _full(query_marks, key_marks, granule)
  rows, n, m = touched.shape[0], tiles.query // granule, tiles.key // granule
  split = lambda x: x.reshape(rows, x.shape[1] // n, n, x.shape[2] // m, m)
  return split(touched).any(axis=(2, 4)), split(full).all(axis=(2, 4))


def _touched(query_marks, key_marks, granule):
  first_query = _least(query_marks, query_marks != NO_QUERY, granule)
  last_key = _most(key_marks, key_marks != NO_KEY, granule)
  touched = _pairs(jnp.equal, first_query, last_key).any(axis=1)
  # On the diagonal every token that is there sees itself.
  present = _most(query_marks[:, 0], query_marks[:, 0] != NO_QUERY, granule) != NOTHING
  index = jnp.arange(present.shape[1])[None]
  on_diagonal = _pairs(jnp.equal, index, index) & present[:, :, None]
  return (touched & _pairs(jnp.greater, index, index)) | on_diagonal


def _full(query_marks, key_marks, granule):
  """Before the diagonal, one document on both sides, and no pair of different blocks of which the key is hidden, or of
  which the key is not shared and the query does not read. The key's block differs if its number is smaller."""
  number, doc = query_marks[:, 0], query_marks[:, 1]
  everywhere = jnp.ones(doc.shape, bool)
  first_doc, last_doc = _least(doc, everywhere, granule), _most(doc, everywhere, granule)
  whole = (first_doc == last_doc) & (first_doc != NO_QUERY)
  one_doc = _pairs(jnp.equal, first_doc, last_doc) & _pairs(jnp.logical_and, whole, whole)
  not_shared = key_marks[:, 1] == NO_KEY
  hidden = not_shared & (key_marks[:, 2] == NO_KEY)
  not_reader = query_marks[:, 2] == NO_QUERY
  unseen = _pairs(jnp.greater, _most(number, everywhere, granule), _least(number, hidden, granule))
  unread = _pairs(jnp.greater, _most(number, not_reader, granule), _least(number, not_shared, granule))
  index = jnp.arange(doc.shape[1] // granule)[None]
  return _pairs(jnp.greater, index, index) & one_doc & ~unseen & ~unread


def _least(x, where, granule):
  """Minimum per granule of the last axis over the tokens of `where`, or a value above all marks."""
  return jnp.where(where, x, jnp.iinfo(jnp.int32).max).reshape(*x.shape[:-1], -1, granule).min(axis=-1)


def _most(x, where, granule):
  """Maximum per granule of the last axis over the tokens of `where`, or NOTHING."""
  return jnp.where(where, x, NOTHING).reshape(*x.shape[:-1], -1, granule).max(axis=-1)


def _pairs(relation, query, key):
  """`relation` of every query granule with every key granule: [.., n], [.., n] -> [.., n, n]."""
  return relation(query[..., :, None], key[..., None, :])


def list_visits(touched, full) -> Schedule:
  """For each query tile the key tiles to visit, from the masks of `tile_masks`.

  For the opposite, the query tiles that visit a key tile, swap the last two axes of both masks.
  """
  return Schedule(partial=_compact(touched & ~full), full=_compact(full))


def _compact(mask):
  index = jnp.argsort(~mask, axis=-1, stable=True).astype(jnp.int32)
  return Visits(index=index, count=mask.sum(axis=-1, dtype=jnp.int32))
