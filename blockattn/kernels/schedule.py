"""Which tiles of the score matrix hold anything to compute. Everything here is traced: new boundaries never recompile.

A row's mask is never built. Instead every token gets two query marks and two key marks, and

    may_attend(t, s)  =  s <= t  and  (key_marks[0, s] >= query_marks[0, t]  or  key_marks[1, s] >= query_marks[1, t])

  query mark                                    key mark                                                says
  0: number of the token's block                number of the token's block                             own block
  1: 4 * document + (1 for a reader, else 2)    4 * document + (2 if shared, else 0 if hidden, else 1)  reading

Documents and blocks stand in order, so numbers never decrease along a row, and for s <= t `>=` holds exactly in the same
block, or in the same document if the key offers what the query may take. In padding the marks are NO_QUERY, above all key
marks, and NO_KEY, below all query marks. Of a tile of keys wholly before a tile of queries, some pair is allowed exactly if
the largest key mark reaches the smallest query mark for one of the two. `touched` and `full` below are exact, not bounds,
for every layout whose documents and blocks are in order (any of its tokens may have been removed), apart from one case
that costs nothing: a diagonal tile of one single token is called partial though it is full.

Tiles of unequal size are put together from granules, squares of the smaller size. Sizes of arrays: [B, T] per token,
[B, T / granule, T / granule] per tile, nothing else.
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from blockattn import blocks
from blockattn.errors import UserError
from blockattn.kernels.tiles import Tiles

MARKS = 2   # of a token, on either side
NO_QUERY = jnp.iinfo(jnp.int32).max
NO_KEY = -1


@flax.struct.dataclass
class Marks:
  """Which of some queries may attend to which of some keys. The queries are a row's, a part of it, or stand behind it.

  Attributes:
    query: int32 [B, MARKS, T].
    key: int32 [B, MARKS, S].
    first_query: int32, traced or not, the index of the first query, the keys' being 0 to S - 1; S if all keys are before all
      queries. None: queries and keys are those of one whole row, T == S.
  """
  query: jax.Array
  key: jax.Array
  first_query: jax.Array | None = None


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
class WorkList:
  """Tiles to visit one after the other, grouped by the tile of one side, the owner.

  Attributes:
    owner: int32 [most visits], batch row * tiles of the owner's side + tile.
    other: int32 [most visits], tile of the other side << FLAG_BITS | FIRST (visit of this owner) | LAST | PARTIAL.
    count: int32, the visits; what follows in the lists is not to be read.
  """
  owner: jax.Array
  other: jax.Array
  count: jax.Array


@flax.struct.dataclass
class TileLists:
  """For every tile of one side, the owners of all batch rows, the tiles of the other side that it visits.

  Attributes:
    index: int32 [owners, m], first the tiles that need the mask, then those that do not; the rest is not to be read.
    partial: int32 [owners], how many need the mask.
    total: int32 [owners], how many there are.
    order: int32 [owners], the owners, those with most visits first.
  """
  index: jax.Array
  partial: jax.Array
  total: jax.Array
  order: jax.Array


@dataclasses.dataclass(frozen=True)
class Cut:
  """How the longest lists of a TileLists are cut into pieces that can be worked on at the same time (split-K).

  Attributes:
    owners: how many lists, from the front of `order`.
    pieces: of each.
  """
  owners: int = 0
  pieces: int = 1

  @property
  def spare(self) -> int:
    """Pieces beyond one per list."""
    return self.owners * (self.pieces - 1)


FLAG_BITS = 3
FIRST, LAST, PARTIAL = 1, 2, 4   # PARTIAL: the tile needs the mask


@flax.struct.dataclass
class Work:
  """The same visits in two orders: `by_query` for outputs of queries, `by_key` for outputs of keys."""
  by_query: WorkList
  by_key: WorkList


@flax.struct.dataclass
class Schedule:
  """Visits to tiles that need the mask (`partial`) and to tiles in which every pair is allowed (`full`)."""
  partial: Visits
  full: Visits


def clamp_tiles(tiles: Tiles, length: int, multiple: int = 8) -> Tiles:
  """The tiles cut down to a row of `length` tokens, with one still dividing the other.

  Raises:
    ValueError: a size is not positive or no multiple of `multiple`, or neither divides the other.
  """
  small, large = min(tiles), max(tiles)
  if small < 1 or large % small:
    raise UserError(f'tiles {tuple(tiles)}: sizes must be positive and one must divide the other, as in (128, 256)')
  if small % multiple:
    raise UserError(f'tiles {tuple(tiles)}: here sizes must be multiples of {multiple}')
  small = min(small, _round_up(length, multiple))
  large = min(_round_up(large, small), _round_up(length, small))
  return Tiles(small, large) if tiles.query <= tiles.key else Tiles(large, small)


def _round_up(x, multiple):
  return -(-x // multiple) * multiple


def pad_tokens(x, tiles: Tiles, axis: int, value=0):
  """Pads a token axis to whole tiles."""
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, -x.shape[axis] % max(tiles))
  return jnp.pad(x, widths, constant_values=value)


def token_marks(layout: blocks.BlockLayout) -> Marks:
  """The marks of whole rows: see the head of this file."""
  doc = jnp.asarray(layout.doc)
  number = jnp.cumsum(blocks.block_starts(layout), axis=1, dtype=jnp.int32)
  offers = 4 * doc + jnp.where(layout.shared, 2, jnp.where(layout.hidden, 0, 1))
  takes = 4 * doc + jnp.where(layout.reader, 1, 2)
  stack = lambda of_block, of_doc, nobody: jnp.stack(
      [jnp.where(doc != 0, x, nobody) for x in (of_block, of_doc)], axis=1).astype(jnp.int32)
  return Marks(stack(number, takes, NO_QUERY), stack(number, offers, NO_KEY))


def pair_mask(query_marks, key_marks, query_start, key_start):
  """The mask of one tile: bool [queries, keys].

  Args:
    query_marks, key_marks: [MARKS, queries, 1] and [MARKS, 1, keys], slices of `token_marks`.
    query_start, key_start: index in the row of the first query and of the first key.
  """
  query_index = query_start + jnp.arange(query_marks.shape[1])
  key_index = key_start + jnp.arange(key_marks.shape[2])
  # A reduction, not comparisons in a row: XLA's CPU backend then computes the mask once, and the softmax that follows stays
  # vectorised (three times faster).
  reached = (key_marks >= query_marks).any(axis=0)
  return reached & (key_index[None, :] <= query_index[:, None])


def tile_masks(marks: Marks, tiles: Tiles):
  """(touched, full): bool [B, query tiles, key tiles] each.

  touched: some query of the tile may attend to some key of it. full: every query may attend to every key.
  T must be a multiple of the query tile, S of the key tile and the first query of the smaller of them, see `whole_tiles`.
  """
  granule = min(tiles)
  first = 0 if marks.first_query is None else marks.first_query // granule
  index = (first + jnp.arange(marks.query.shape[2] // granule)[None], jnp.arange(marks.key.shape[2] // granule)[None])
  touched, full = _touched(marks, index, granule), _full(marks, index, granule)
  rows, n, m = touched.shape[0], tiles.query // granule, tiles.key // granule
  split = lambda x: x.reshape(rows, x.shape[1] // n, n, x.shape[2] // m, m)
  return split(touched).any(axis=(2, 4)), split(full).all(axis=(2, 4))


def _touched(marks, index, granule):
  touched = _pairs(jnp.less_equal, _least(marks.query, granule), _most(marks.key, granule)).any(axis=1)
  # On the diagonal every token that is there sees itself.
  present = _most(marks.key[:, 0], granule) != NO_KEY
  on_diagonal = _pairs(jnp.equal, *index) & present[:, None]
  return (touched & _pairs(jnp.greater, *index)) | on_diagonal


def _full(marks, index, granule):
  """Before the diagonal, one document on both sides, and no pair of different blocks of which the key is hidden, or of
  which the key is not shared and the query does not read. The key's block differs if its number is smaller."""
  (of_query, takes), (of_key, offers) = marks.query.swapaxes(0, 1), marks.key.swapaxes(0, 1)
  query_doc, key_doc = takes >> 2, offers >> 2   # of padding more, and less, than all others
  one_doc = (_pairs(jnp.equal, _most(query_doc, granule), _least(key_doc, granule)) &
             _pairs(jnp.equal, _least(query_doc, granule), _most(key_doc, granule)))
  not_reader, not_shared, hidden = takes & 3 == 2, offers & 3 < 2, offers & 3 == 0
  first = lambda where: _least(jnp.where(where, of_key, NO_QUERY), granule)
  unseen = _pairs(jnp.greater, _most(of_query, granule), first(hidden))
  unread = _pairs(jnp.greater, _most(jnp.where(not_reader, of_query, NO_KEY), granule), first(not_shared))
  return _pairs(jnp.greater, *index) & one_doc & ~unseen & ~unread


def _least(x, granule):
  """Minimum per granule of the last axis."""
  return x.reshape(*x.shape[:-1], -1, granule).min(axis=-1)


def _most(x, granule):
  """Maximum per granule of the last axis."""
  return x.reshape(*x.shape[:-1], -1, granule).max(axis=-1)


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


def most_visits(n: int, m: int) -> int:
  """Tiles that a causal triangle of n query tiles by m key tiles touches: no row of a batch makes more visits."""
  return sum(-(-(i + 1) * m // n) for i in range(n))


def every_owner(visited):
  """`visited` [B, n, m] with the first of the m tiles on every list of the n that is empty: a kernel that writes a tile of
  its output at the tile's visits then writes all of it. The mask of what is added allows nothing."""
  lonely = ~visited.any(axis=2)
  return visited.at[:, :, 0].set(visited[:, :, 0] | lonely)


def whole_tiles(q_BTNH, k_BSKH, v_BSKH, marks: Marks, tiles: Tiles):
  """(q, k, v, marks) as the kernels compute them: whole rows are padded to whole tiles, a part of a row must be some.

  Raises:
    ValueError: the tiles do not divide the part or the row.
  """
  if marks.first_query is not None:
    length, row = q_BTNH.shape[1], k_BSKH.shape[1]
    if length % tiles.query or row % tiles.key:
      raise UserError(f'{length} queries, {row} keys: the queries of a part of a row must be a multiple of the query tile '
                      f'{tiles.query}, and its keys of the key tile {tiles.key}; choose tiles that divide them')
    return q_BTNH, k_BSKH, v_BSKH, marks.replace(first_query=jnp.asarray(marks.first_query, jnp.int32))
  q, k, v = (pad_tokens(x, tiles, axis=1) for x in (q_BTNH, k_BSKH, v_BSKH))
  return q, k, v, Marks(pad_tokens(marks.query, tiles, 2, NO_QUERY), pad_tokens(marks.key, tiles, 2, NO_KEY))


def first_query(marks: Marks):
  return jnp.int32(0) if marks.first_query is None else marks.first_query


def list_work(marks: Marks, tiles: Tiles) -> Work:
  """The work of all rows."""
  touched, full = tile_masks(marks, tiles)
  n, m = touched.shape[1:]
  most = most_visits(n, m) if marks.first_query is None else n * m
  swap = lambda x: x.swapaxes(1, 2)
  return Work(by_query=_flat_list(every_owner(touched), full, most),
              by_key=_flat_list(every_owner(swap(touched)), swap(full), most))


def list_tiles(visited, full) -> TileLists:
  """One list per tile of the masks' second axis, from `every_owner` and `full`; swap their axes for the other side."""
  flat = lambda x: x.reshape(-1, x.shape[2])
  visited, full = flat(visited), flat(full)
  total = visited.sum(axis=1, dtype=jnp.int32)
  rank = jnp.where(visited, full.astype(jnp.int32), 2)
  return TileLists(index=jnp.argsort(rank, axis=1, stable=True).astype(jnp.int32),
                   partial=total - full.sum(axis=1, dtype=jnp.int32), total=total,
                   order=jnp.argsort(-total, stable=True).astype(jnp.int32))


def piece(n, order, total, cut: Cut):
  """The n-th piece of a TileLists' work: (owner, first entry of its list, entries). Arrays may be references to memory.

  The first `cut.owners * cut.pieces` are those of the lists that are cut, list by list.
  """
  if not cut.spare:
    return order[n], jnp.int32(0), total[order[n]]
  n = jnp.int32(n)
  long = n < cut.owners * cut.pieces
  owner = order[jnp.where(long, lax.div(n, jnp.int32(cut.pieces)), n - cut.spare)]
  nth, pieces = jnp.where(long, lax.rem(n, jnp.int32(cut.pieces)), 0), jnp.where(long, jnp.int32(cut.pieces), 1)
  first, stop = lax.div(total[owner] * nth, pieces), lax.div(total[owner] * (nth + 1), pieces)
  return owner, first, stop - first


def _flat_list(visited, full, most):
  """WorkList of [B, n owners, m] masks, for at most `most` visits per row."""
  rows, n, m = visited.shape
  counts = visited.sum(axis=2, dtype=jnp.int32).reshape(-1)
  ends = jnp.cumsum(counts)
  step = jnp.arange(rows * most, dtype=jnp.int32)
  owner = jnp.minimum(jnp.searchsorted(ends, step, side='right').astype(jnp.int32), rows * n - 1)
  nth = step - (ends - counts)[owner]
  tile = _compact(visited).index.reshape(rows * n, m)[owner, jnp.minimum(nth, m - 1)]
  flag = lambda where, value: jnp.where(where, value, 0)
  flags = (flag(nth == 0, FIRST) | flag(nth == counts[owner] - 1, LAST) |
           flag(~full.reshape(rows * n, m)[owner, tile], PARTIAL))
  return WorkList(owner=owner, other=(tile << FLAG_BITS) | flags, count=ends[-1])
