"""Block attention on TPUs: Pallas Mosaic kernels whose grid is the list of tiles to visit.

The list is computed on the device from the layout (`list_work`), lies in scalar memory and steers the copies:
its length is the size of the grid, so tiles that nobody may see cost nothing, not even an empty step, and one compiled
program serves all layouts. Each kernel has two bodies; tiles in which every pair is allowed take the one without a mask.

Scores are in base 2: the float32 products are multiplied by log2(e) / sqrt(H). Queries scaled beforehand would save that
multiplication, and be rounded once more, an error that grows with the scores. What belongs to a query is kept in HBM as a
row of lanes, without padding, and spread over columns in VMEM where the kernel needs it so, once per tile.

Axis names in this file beside the project's: in a kernel T are the queries of a tile and S its keys, L the 128 lanes that
hold copies of one value, M the marks of a token (see schedule.py).
"""

import functools
import math
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from blockattn.errors import UserError
from blockattn.kernels import schedule
from blockattn.kernels.reference import MASKED, kept, mean_slope, precision
from blockattn.kernels.tiles import Tiles

Array = jax.Array
FLAG_BITS = 3
FIRST, LAST, PARTIAL = 1, 2, 4   # PARTIAL: the tile needs the mask
_LANES = 128
_LIST_BYTES = 768 * 1024   # of the 1 MiB of scalar memory, for the two lists of work


@flax.struct.dataclass
class WorkList:
  """Tiles to visit one after the other, grouped by the tile of one side, the owner.

  Attributes:
    owner: int32 [most visits], batch row * tiles of the owner's side + tile.
    other: int32 [most visits], tile of the other side << FLAG_BITS | FIRST (visit of this owner) | LAST | PARTIAL.
    count: int32, the visits; what follows in the lists is not to be read.
  """
  owner: Array
  other: Array
  count: Array


@flax.struct.dataclass
class Work:
  """The same visits in two orders: `by_query` for outputs of queries, `by_key` for outputs of keys."""
  by_query: WorkList
  by_key: WorkList


def attention(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, marks: schedule.Marks, tiles: Tiles, interpret: bool = False
              ) -> tuple[Array, Array]:
  """Softmax attention over the keys that the marks allow.

  Args:
    q_BTNH, k_BSKH, v_BSKH: as `api.block_attention` takes them, already checked, but for T, which may differ from S.
    marks: schedule.Marks of T queries and S keys.
    tiles: tile sizes, multiples of 128; cut down to T where they are larger. Of a part of a row T and its first query must
      be multiples of the query tile, and S of the key tile.
    interpret: run the kernels in Pallas' interpreter, on any platform and with tiles of any multiple of 8.

  Returns:
    ([B, T, N, H] in q's dtype, the logsumexp of each query's scores, float32 [B, T, N]); both are zero for a query that
    sees no key.

  Raises:
    ValueError: the tiles are no multiples of 128, do not divide the part, or are so small that the list of work does not
      fit into scalar memory; or heads are wider than 128 and no multiple of it.
  """
  T, H = q_BTNH.shape[1], q_BTNH.shape[3]
  if H > _LANES and H % _LANES:
    raise UserError(f'head_dim {H}: on a TPU it must be at most {_LANES} or a multiple of it; use impl="xla"')
  tiles = schedule.clamp_tiles(tiles, T, multiple=8 if interpret else _LANES)
  *arrays, marks = schedule.whole_tiles(q_BTNH, k_BSKH, v_BSKH, marks, tiles)
  work = list_work(marks, tiles)
  _check_list(work.by_query.owner.size, tiles, q_BTNH.shape)
  out, lse = _attention(tiles, interpret, *(x.swapaxes(1, 2) for x in arrays), (marks.query, marks.key), work,
                        schedule.first_query(marks)[None])
  return out.swapaxes(1, 2)[:, :T], lse.swapaxes(1, 2)[:, :T]


def list_work(marks: schedule.Marks, tiles: Tiles) -> Work:
  """The work of all rows."""
  touched, full = schedule.tile_masks(marks, tiles)
  n, m = touched.shape[1:]
  most = most_visits(n, m) if marks.first_query is None else n * m
  swap = lambda x: x.swapaxes(1, 2)
  return Work(by_query=_flat_list(schedule.every_owner(touched), full, most),
              by_key=_flat_list(schedule.every_owner(swap(touched)), swap(full), most))


def _flat_list(visited, full, most):
  """WorkList of [B, n owners, m] masks, for at most `most` visits per row."""
  rows, n, m = visited.shape
  counts = visited.sum(axis=2, dtype=jnp.int32).reshape(-1)
  ends = jnp.cumsum(counts)
  step = jnp.arange(rows * most, dtype=jnp.int32)
  owner = jnp.minimum(jnp.searchsorted(ends, step, side='right').astype(jnp.int32), rows * n - 1)
  nth = step - (ends - counts)[owner]
  tile = jnp.argsort(~visited, axis=2, stable=True).astype(jnp.int32).reshape(rows * n, m)[owner, jnp.minimum(nth, m - 1)]
  flag = lambda where, value: jnp.where(where, value, 0)
  flags = (flag(nth == 0, FIRST) | flag(nth == counts[owner] - 1, LAST) |
           flag(~full.reshape(rows * n, m)[owner, tile], PARTIAL))
  return WorkList(owner=owner, other=(tile << FLAG_BITS) | flags, count=ends[-1])


def most_visits(n: int, m: int) -> int:
  """Tiles that a causal triangle of n query tiles by m key tiles touches: no row of a batch makes more visits."""
  return sum(-(-(i + 1) * m // n) for i in range(n))


def _check_list(visits, tiles, shape):
  room = _LIST_BYTES // 8
  if visits > room:
    raise UserError(f'tiles {tuple(tiles)} make up to {visits} visits possible in {shape[0]} rows of {shape[1]} tokens; '
                    f'the scalar memory of a TPU core holds {room}. Use larger tiles or fewer rows per device')


def _primal(tiles, interpret, q_BNTH, k_BKSH, v_BKSH, marks, work, first_query) -> tuple[Array, Array]:
  return _forward(tiles, interpret, q_BNTH, k_BKSH, v_BKSH, marks, work, first_query)[0]


_attention = jax.custom_vjp(_primal, nondiff_argnums=(0, 1))


def _dot(x, y, contract_x, contract_y):
  """Of two matrices, in float32."""
  return lax.dot_general(x, y, (((contract_x,), (contract_y,)), ((), ())), precision=precision(x.dtype),
                         preferred_element_type=jnp.float32)


def _scores(x, y):
  """Of queries and keys in either order, in base 2."""
  return _dot(x, y, 1, 1) * (math.log2(math.e) * x.shape[1] ** -0.5)


class _Steps(NamedTuple):
  """What lies in scalar memory: a WorkList, and the index in the row of the first query, [1]."""
  owner: Any
  other: Any
  first_query: Any


class _Grid:
  """The grid of one kernel, and where the tiles of each step lie.

  The axes are heads (of the side that owns the steps), steps, and for keys as owners the query heads that share them.
  `owner_is_query`: the steps are grouped by query tile, else by key tile.
  """

  def __init__(self, tiles, q_shape, k_shape, work, first_query, owner_is_query):
    self.tiles, self.owner_is_query = tiles, owner_is_query
    _, self.N, T, self.H = q_shape
    _, self.K, S, _ = k_shape
    self.share = self.N // self.K
    self.per_row = T // tiles.query if owner_is_query else S // tiles.key
    self.steps, self.count = _Steps(work.owner, work.other, first_query), work.count
    self.grid = (self.N, self.count) if owner_is_query else (self.K, self.count, self.share)

  def _query_head(self, at):
    return at[0] if self.owner_is_query else at[0] * self.share + at[2]

  def _key_head(self, at):
    return lax.div(at[0], jnp.int32(self.share)) if self.owner_is_query else at[0]

  def tile_numbers(self, step, steps):
    """(batch row, query tile, key tile) of a step."""
    row, own = lax.div(steps.owner[step], jnp.int32(self.per_row)), lax.rem(steps.owner[step], jnp.int32(self.per_row))
    its = lax.shift_right_logical(steps.other[step], FLAG_BITS)
    return (row, own, its) if self.owner_is_query else (row, its, own)

  def _spec(self, shape, place):
    """place: (row, query tile, key tile, query head, key head) -> block index."""
    def index(*args):
      at, steps = args[:-3], _Steps(*args[-3:])
      return place(*self.tile_numbers(at[1], steps), self._query_head(at), self._key_head(at))
    return pl.BlockSpec(shape, index)

  def queries(self):
    return self._spec((None, None, self.tiles.query, self.H), lambda b, i, j, n, k: (b, n, i, 0))

  def keys(self):
    return self._spec((None, None, self.tiles.key, self.H), lambda b, i, j, n, k: (b, k, j, 0))

  def per_query(self):
    """Of [B, N, query tiles, 1, query tile]: one float per query and head."""
    return self._spec((None, None, None, 1, self.tiles.query), lambda b, i, j, n, k: (b, n, i, 0, 0))

  def query_marks(self):
    return self._spec((None, schedule.MARKS, self.tiles.query), lambda b, i, j, n, k: (b, 0, i))

  def key_marks(self):
    return self._spec((None, schedule.MARKS, self.tiles.key), lambda b, i, j, n, k: (b, 0, j))

  def call(self, kernel, name, inputs, out_shape, scratch, interpret):
    """inputs: (block spec, array) each; out_shape: (block spec, shape and dtype) each; scratch: (shape, dtype) each."""
    spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=3, grid=self.grid, in_specs=[spec for spec, _ in inputs],
        out_specs=[spec for spec, _ in out_shape], scratch_shapes=[pltpu.VMEM(*x) for x in scratch])
    semantics = ('parallel',) + ('arbitrary',) * (len(self.grid) - 1)   # heads may go to different cores
    return pl.pallas_call(
        lambda owner, other, first_query, *refs: kernel(self, _Steps(owner, other, first_query), *refs),
        grid_spec=spec, out_shape=[shape for _, shape in out_shape], name=name,
        compiler_params=pltpu.CompilerParams(dimension_semantics=semantics),
        interpret=interpret)(*self.steps, *(x for _, x in inputs))


def _visit(grid, steps, columns_MXL, rows_MX, body):
  """Calls `body(mask)` for this step's tile; `mask` replaces the scores that are not allowed.

  The marks of the owner, whose tokens are the rows of the scores, are given as columns; those of the other side as rows.
  """
  _, i, j = grid.tile_numbers(pl.program_id(1), steps)
  offset = j * grid.tiles.key - i * grid.tiles.query - steps.first_query[0]
  mask = functools.partial(_mask, grid, offset, columns_MXL, rows_MX)
  partial = (steps.other[pl.program_id(1)] & PARTIAL) != 0
  _choose(partial, lambda: body(mask), lambda: body(lambda scores: scores))


def _choose(partial, masked, whole):
  pl.when(partial)(masked)
  pl.when(jnp.logical_not(partial))(whole)


def _mask(grid, offset, columns_MXL, rows_MX, scores):
  """offset: the tile's first key from its first query, in tokens."""
  down, across = (lax.broadcasted_iota(jnp.int32, scores.shape, axis) for axis in (0, 1))
  pairs = [(_wide(columns_MXL[m], scores.shape[1]), rows_MX[m:m + 1]) for m in range(schedule.MARKS)]
  if grid.owner_is_query:
    reached, causal = [key >= query for query, key in pairs], across + offset <= down
  else:
    reached, causal = [key >= query for key, query in pairs], down + offset <= across
  return jnp.where(functools.reduce(jnp.logical_or, reached) & causal, scores, MASKED)


def _columns(rows_nX):
  """What is a row of lanes becomes a column, in every lane: [n, X] -> [n, X, L], n at most 8."""
  n, size = rows_nX.shape
  columns = jnp.concatenate([rows_nX, jnp.zeros((8 - n, size), rows_nX.dtype)]).T
  return jnp.stack([jnp.broadcast_to(columns[:, c:c + 1], (size, _LANES)) for c in range(n)])


def _wide(x_XL, width):
  """Copies for more lanes, or fewer: [X, L] -> [X, width]."""
  return x_XL[:, :width] if width <= _LANES else jnp.tile(x_XL, (1, width // _LANES))


def _is_first(steps):
  return (steps.other[pl.program_id(1)] & FIRST) != 0


def _is_last(steps):
  return (steps.other[pl.program_id(1)] & LAST) != 0


def _forward_kernel(grid, steps, q, k, v, q_marks, k_marks, out, lse, acc_TH, peak_TL, total_TL, marks_MTL):
  @pl.when(_is_first(steps))
  def _():
    acc_TH[...] = jnp.zeros_like(acc_TH)
    peak_TL[...] = jnp.full_like(peak_TL, MASKED)
    total_TL[...] = jnp.zeros_like(total_TL)
    marks_MTL[...] = _columns(q_marks[...])

  def body(mask):
    scores_TS = mask(_scores(q[...], k[...]))
    peak = jnp.maximum(peak_TL[...], scores_TS.max(axis=1, keepdims=True))
    decay = jnp.exp2(peak_TL[...] - peak)
    weights_TS = jnp.exp2(scores_TS - _wide(peak, grid.tiles.key))
    total_TL[...] = total_TL[...] * decay + weights_TS.sum(axis=1, keepdims=True)
    peak_TL[...] = peak
    acc_TH[...] = acc_TH[...] * _wide(decay, grid.H) + _dot(weights_TS.astype(v.dtype), v[...], 1, 0)

  _visit(grid, steps, marks_MTL, k_marks, body)

  @pl.when(_is_last(steps))
  def _():
    seen = peak_TL[...] > MASKED / 2
    total = jnp.where(seen, total_TL[...], 1)
    out[...] = jnp.where(_wide(seen, grid.H), acc_TH[...] / _wide(total, grid.H), 0).astype(out.dtype)
    lse[...] = jnp.where(seen, peak_TL[...] + jnp.log2(total), 0).T[:1]


def _forward(tiles, interpret, q_BNTH, k_BKSH, v_BKSH, marks, work, first_query):
  B, N, T, H = q_BNTH.shape
  grid = _Grid(tiles, q_BNTH.shape, k_BKSH.shape, work.by_query, first_query, owner_is_query=True)
  inputs = [(grid.queries(), q_BNTH), (grid.keys(), k_BKSH), (grid.keys(), v_BKSH),
            (grid.query_marks(), marks[0]), (grid.key_marks(), marks[1])]
  outputs = [(grid.queries(), jax.ShapeDtypeStruct(q_BNTH.shape, q_BNTH.dtype)),
             (grid.per_query(), jax.ShapeDtypeStruct((B, N, T // tiles.query, 1, tiles.query), jnp.float32))]
  per_query = ((tiles.query, _LANES), jnp.float32)
  scratch = [((tiles.query, H), jnp.float32), per_query, per_query, ((schedule.MARKS, tiles.query, _LANES), jnp.int32)]
  out, lse = kept(*grid.call(_forward_kernel, 'block_attention_forward', inputs, outputs, scratch, interpret))
  return (out, lse.reshape(B, N, T) * math.log(2)), (q_BNTH, k_BKSH, v_BKSH, marks, work, first_query, out, lse)


def _dq_kernel(grid, steps, q, k, v, grad, lse, mean, q_marks, k_marks, dq, acc_TH, lse_TL, mean_TL, marks_MTL):
  @pl.when(_is_first(steps))
  def _():
    acc_TH[...] = jnp.zeros_like(acc_TH)
    lse_TL[...] = _columns(lse[...])[0]
    mean_TL[...] = _columns(mean[...])[0]
    marks_MTL[...] = _columns(q_marks[...])

  def body(mask):
    weights_TS = jnp.exp2(mask(_scores(q[...], k[...])) - _wide(lse_TL[...], grid.tiles.key))
    slopes_TS = weights_TS * (_dot(grad[...], v[...], 1, 1) - _wide(mean_TL[...], grid.tiles.key))
    acc_TH[...] += _dot(slopes_TS.astype(k.dtype), k[...], 1, 0)

  _visit(grid, steps, marks_MTL, k_marks, body)

  @pl.when(_is_last(steps))
  def _():
    dq[...] = (acc_TH[...] * grid.H ** -0.5).astype(dq.dtype)


def _dkv_kernel(grid, steps, q, k, v, grad, lse, mean, q_marks, k_marks, dk, dv, dk_acc_SH, dv_acc_SH, marks_MSL):
  """Scores are keys by queries here, so that both sums over queries are plain matmuls."""
  @pl.when(_is_first(steps) & (pl.program_id(2) == 0))
  def _():
    dk_acc_SH[...] = jnp.zeros_like(dk_acc_SH)
    dv_acc_SH[...] = jnp.zeros_like(dv_acc_SH)
    marks_MSL[...] = _columns(k_marks[...])

  def body(mask):
    weights_ST = jnp.exp2(mask(_scores(k[...], q[...])) - lse[...])
    dv_acc_SH[...] += _dot(weights_ST.astype(grad.dtype), grad[...], 1, 0)
    slopes_ST = weights_ST * (_dot(v[...], grad[...], 1, 1) - mean[...])
    dk_acc_SH[...] += _dot(slopes_ST.astype(q.dtype), q[...], 1, 0)

  _visit(grid, steps, marks_MSL, q_marks, body)

  @pl.when(_is_last(steps) & (pl.program_id(2) == grid.share - 1))
  def _():
    dk[...] = (dk_acc_SH[...] * grid.H ** -0.5).astype(dk.dtype)
    dv[...] = dv_acc_SH[...].astype(dv.dtype)


def _backward(tiles, interpret, saved, grads):
  q_BNTH, k_BKSH, v_BKSH, marks, work, first_query, out_BNTH, lse = saved
  grad_BNTH, grad_lse_BNT = grads
  H = q_BNTH.shape[3]
  mean = mean_slope(out_BNTH, grad_BNTH, grad_lse_BNT).reshape(lse.shape)
  like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)

  def inputs(grid):
    return [(grid.queries(), q_BNTH), (grid.keys(), k_BKSH), (grid.keys(), v_BKSH), (grid.queries(), grad_BNTH),
            (grid.per_query(), lse), (grid.per_query(), mean), (grid.query_marks(), marks[0]), (grid.key_marks(), marks[1])]

  grid = _Grid(tiles, q_BNTH.shape, k_BKSH.shape, work.by_query, first_query, owner_is_query=True)
  per_query = ((tiles.query, _LANES), jnp.float32)
  scratch = [((tiles.query, H), jnp.float32), per_query, per_query, ((schedule.MARKS, tiles.query, _LANES), jnp.int32)]
  dq, = grid.call(_dq_kernel, 'block_attention_dq', inputs(grid), [(grid.queries(), like(q_BNTH))], scratch, interpret)

  grid = _Grid(tiles, q_BNTH.shape, k_BKSH.shape, work.by_key, first_query, owner_is_query=False)
  scratch = [((tiles.key, H), jnp.float32)] * 2 + [((schedule.MARKS, tiles.key, _LANES), jnp.int32)]
  outputs = [(grid.keys(), like(k_BKSH)), (grid.keys(), like(v_BKSH))]
  dk, dv = grid.call(_dkv_kernel, 'block_attention_dkv', inputs(grid), outputs, scratch, interpret)
  return dq, dk, dv, None, None, None


_attention.defvjp(_forward, _backward)
