"""Block attention on NVIDIA's Hopper GPUs: Pallas Mosaic GPU kernels that walk run-time lists of tiles.

Every thread block owns one tile of one head (of queries in the forward and the dq kernel, of keys in the dkv kernel) and
streams the other side's tiles from its list: one warpgroup copies (TMA), two compute (wgmma), 64 rows of the tile each.
The lists are computed on the device from the layout, so one compiled program serves all layouts; tiles that need no mask
stand at their end and have a loop of their own. Heavy tiles start first.

Scores are in base 2: scale * log2(e) is applied in the exponent. Axis names in this file beside the project's: T the rows
of a warpgroup's score tile, S its columns; M the marks of a token (see schedule.py).
"""

import dataclasses
import functools
import inspect
import math
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from blockattn.errors import UserError
from blockattn.kernels import cached, schedule
from blockattn.kernels.reference import MASKED, kept, mean_slope
from blockattn.kernels.tiles import Tiles

Array = jax.Array
HEAD_DIMS = (64, 128)
DTYPES = (jnp.bfloat16, jnp.float16)
_ROWS = 64       # of a warpgroup: what one wgmma instruction multiplies
_COMPUTE = 2     # warpgroups that compute; one more copies
_COPY_REGISTERS, _COMPUTE_REGISTERS = 24, 240   # per thread; 128 * (24 + 2 * 240) fit into the 65,536 of a multiprocessor
_MULTIPROCESSORS = 132   # of an H100 SXM and an H200
_SCORES = plgpu.Layout.WGMMA
_PER_ROW, _PER_COLUMN = _SCORES.reduce(1), _SCORES.reduce(0)


@flax.struct.dataclass
class TileLists:
  """For every tile of one side, the owners of all batch rows, the tiles of the other side that it visits.

  Attributes:
    index: int32 [owners, m], first the tiles that need the mask, then those that do not; the rest is not to be read.
    partial: int32 [owners], how many need the mask.
    total: int32 [owners], how many there are.
    order: int32 [owners], the owners, those with most visits first.
  """
  index: Array
  partial: Array
  total: Array
  order: Array


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


def attention(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, marks: schedule.Marks, tiles: Tiles, cut: Cut | None = None,
              interpret: Any = None
              ) -> tuple[Array, Array]:
  """Softmax attention over the keys that the marks allow.

  Args:
    q_BTNH, k_BSKH, v_BSKH: as `api.block_attention` takes them, already checked, but for T, which may differ from S.
    marks: schedule.Marks of T queries and S keys.
    tiles: (128, key tile) of the forward pass; the backward pass takes tiles of 128 by 64. Of a part of a row T and its
      first query must be multiples of 128, and S of both sizes.
    cut: Cut, how the keys of a row's readers are divided over thread blocks; by default `_cut`.
    interpret: parameters of Pallas' GPU interpreter, to run the kernels on any platform.

  Returns:
    ([B, T, N, H] in q's dtype, the logsumexp of each query's scores, float32 [B, T, N]); both are zero for a query that
    sees no key.

  Raises:
    ValueError: a dtype, a head width or tiles that the kernels do not know, a part that they do not divide, or another
      GPU than Hopper.
  """
  T, H = q_BTNH.shape[1], q_BTNH.shape[3]
  lacking = lacks(jax.devices()[0]) if interpret is None and jax.default_backend() == 'gpu' else None
  if lacking:
    raise UserError(f'{lacking}; use impl="xla"')
  if q_BTNH.dtype not in DTYPES or H not in HEAD_DIMS:
    raise UserError(f'{q_BTNH.dtype} with head_dim {H}: the GPU kernels take bfloat16 and float16 and head_dim '
                    f'{" or ".join(map(str, HEAD_DIMS))}; use impl="xla"')
  if tiles.query != _COMPUTE * _ROWS or tiles.key % _ROWS:
    raise UserError(f'tiles {tuple(tiles)}: the GPU kernels take {_COMPUTE * _ROWS} queries by a multiple of {_ROWS} keys')
  q, k, v, marks = schedule.whole_tiles(q_BTNH, k_BSKH, v_BSKH, marks, Tiles(tiles.query, max(tiles)))
  B, length, N, _ = q.shape
  cut = _cut(B, length, N, k.shape[1]) if cut is None else cut
  how = _How(tiles.key, cut, interpret)
  out, lse = _attention(how, q, k, v, (marks.query, marks.key), _lists(marks, tiles))
  return out[:, :T], lse[:, :T]


def _lists(marks, tiles):
  def lists(tiles, turn=lambda mask: mask):
    touched, full = map(turn, schedule.tile_masks(marks, tiles))
    return list_tiles(schedule.every_owner(touched), full)

  return Lists(forward=lists(tiles), dq=lists(Tiles(tiles.query, _ROWS)),
               dkv=lists(Tiles(_ROWS, tiles.query), lambda mask: mask.swapaxes(1, 2)),
               first_query=schedule.first_query(marks)[None])


def _cut(rows, queries, heads, keys) -> Cut:
  """Pieces for the query tiles of each row's last 512 tokens, so many that two fall to each multiprocessor if these tiles
  read everything, and that a piece then still has eight tiles of keys."""
  tile = _COMPUTE * _ROWS
  owners = rows * min(4, queries // tile)
  pieces = min(2 * _MULTIPROCESSORS // max(owners * heads, 1), keys // tile // 8)
  return Cut(owners, pieces) if pieces > 1 else Cut()


def list_tiles(visited: Array, full: Array) -> TileLists:
  """One list per tile of the masks' second axis, from `every_owner` and `full`; swap their axes for the other side."""
  flat = lambda x: x.reshape(-1, x.shape[2])
  visited, full = flat(visited), flat(full)
  total = visited.sum(axis=1, dtype=jnp.int32)
  rank = jnp.where(visited, full.astype(jnp.int32), 2)
  return TileLists(index=jnp.argsort(rank, axis=1, stable=True).astype(jnp.int32),
                   partial=total - full.sum(axis=1, dtype=jnp.int32), total=total,
                   order=jnp.argsort(-total, stable=True).astype(jnp.int32))


def piece(n: Any, order: Any, total: Any, cut: Cut) -> tuple[Array, Array, Array]:
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


def lacks(device: Any) -> str | None:
  """What the kernels need and a GPU does not have, None if nothing."""
  capability = str(device.compute_capability)
  if capability.partition('.')[0] == '9':   # wgmma exists on Hopper only
    return None
  return f'{device.device_kind} has compute capability {capability}; impl="gpu" needs 9.0 (H100, H200)'


@dataclasses.dataclass(frozen=True)
class _How:
  """What the kernels are specialised to, beside shapes."""
  key_tile: int
  cut: Cut
  interpret: Any


@flax.struct.dataclass
class Lists:
  """TileLists of the three kernels, and the index in the row of the first query, int32 [1]."""
  forward: TileLists
  dq: TileLists
  dkv: TileLists
  first_query: Array


def _primal(how, q_BTNH, k_BSKH, v_BSKH, marks, lists) -> tuple[Array, Array]:
  return _forward(how, q_BTNH, k_BSKH, v_BSKH, marks, lists)[0]


_attention = jax.custom_vjp(_primal, nondiff_argnums=(0,))


# Small differences between jax 0.10 and later, and between the device and its interpreter, end here.

def _load(ref, layout):
  """A vector from global or shared memory, spread over a warpgroup's registers in `layout`."""
  index = inspect.signature(plgpu.load).parameters.get('idx')   # jax 0.10 wants one, later ones warn of it
  all_of_it = ((),) if index and index.default is index.empty else ()
  return plgpu.load(ref, *all_of_it, layout=layout, optimized=False)


def _product(how, x, y_ref, shape):
  """x @ y in float32. x: a reference to shared memory or a value in registers."""
  if how.interpret is not None:   # the interpreter knows no wgmma
    return jnp.dot(x[...], y_ref[...], preferred_element_type=jnp.float32)
  def multiply(acc):
    plgpu.wgmma(acc, x, y_ref)
    return acc[...]
  return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))


def _product_transposed(how, x_ref, y_ref, shape):
  """x @ y.T in float32."""
  if how.interpret is not None:
    return jnp.dot(x_ref[...], y_ref[...].T, preferred_element_type=jnp.float32)
  return _product(how, x_ref, y_ref.transpose((1, 0)), shape)


def _add_product(how, acc, x, y_ref, meanwhile=lambda: None):
  """acc + x @ y; `meanwhile` runs while the product is under way."""
  if how.interpret is not None:
    meanwhile()
    return acc + jnp.dot(x, y_ref[...], preferred_element_type=jnp.float32)
  def multiply(acc_ref):
    plgpu.wgmma(acc_ref, x, y_ref)
    meanwhile()
  return pl.run_state(multiply)(plgpu.ACC.init(acc))


def _zeros(shape):
  layout = _SCORES if len(shape) == 2 else _PER_ROW
  return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)


def _rows(x_T, columns):
  """[T] -> [T, columns]."""
  return lax.broadcast_in_dim(x_T, (x_T.shape[0], columns), [0])


def _columns(x_S, rows):
  """[S] -> [rows, S]."""
  return lax.broadcast_in_dim(x_S, (rows, x_S.shape[0]), [1])


def _allowed(row_marks, column_marks, row_start, column_start, rows_are_queries):
  """The mask [T, S] of a warpgroup's tile. row_marks: [T] values; column_marks: references [S] to memory."""
  shape = row_marks[0].shape[0], column_marks[0].shape[0]
  at = lambda axis, start: plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=_SCORES) + start
  row, column = at(0, row_start), at(1, column_start)
  pairs = [(_rows(r, shape[1]), _columns(_load(c, _PER_COLUMN), shape[0])) for r, c in zip(row_marks, column_marks)]
  if rows_are_queries:
    reached, causal = [key >= query for query, key in pairs], column <= row
  else:
    reached, causal = [key >= query for key, query in pairs], row <= column
  return functools.reduce(jnp.logical_or, reached) & causal


def _walk(block, step, carry, share=1):
  """Runs `step(n, carry, masked)` over the block's list, each tile `share` times: those that need the mask stand first."""
  carry = lax.fori_loop(0, block.partial * share, functools.partial(step, masked=True), carry)
  return lax.fori_loop(block.partial * share, block.total * share, functools.partial(step, masked=False), carry)


class _Block:
  """What a thread block owns: batch row, head, tile, and a piece of its list of tiles of the other side."""

  def __init__(self, lists, per_row, cut):
    n = lax.axis_index('tile')
    owner, self._first, self.total = piece(n, lists.order, lists.total, cut)
    self.head, self.warpgroup = lax.axis_index('head'), lax.axis_index('warpgroup')
    self.row, self.tile = lax.div(owner, jnp.int32(per_row)), lax.rem(owner, jnp.int32(per_row))
    self.partial = lax.clamp(jnp.int32(0), lists.partial[owner] - self._first, self.total)
    self._index, self._owner = lists.index, owner
    self.is_piece, self.nth = n < cut.owners * cut.pieces, n   # of a list that is cut

  def other(self, n):
    """The n-th tile of the piece."""
    return self._index[self._owner, self._first + n]

  def key_tile(self, n, size, share):
    """Where in the keys the n-th tile is, for a block of queries whose head shares its keys with `share` heads."""
    return self.row, pl.ds(self.other(n) * size, size), lax.div(self.head, jnp.int32(share))

  def rows(self, warpgroup):
    """The first of a warpgroup's rows."""
    return (self.tile * _COMPUTE + warpgroup) * _ROWS

  def write(self, whole, piece):
    """Calls `whole()`, or for a piece of a list `piece(rows)`, rows of the tile; `piece` is None if no list is cut."""
    if piece is None:
      whole()
      return
    pl.when(jnp.logical_not(self.is_piece))(whole)
    pl.when(self.is_piece)(lambda: piece(pl.ds(self.warpgroup * _ROWS, _ROWS)))


class _Source(NamedTuple):
  """What a kernel reads of global memory. The last line of arrays is the backward pass's, None in the forward kernel."""
  first_query: Any   # [1]
  q: Any             # [B, T, N, H]
  k: Any             # [B, S, K, H]
  v: Any
  grad: Any
  lse: Any           # [B, N, T]
  mean: Any
  q_marks: Any       # [B, M, T]
  k_marks: Any       # [B, M, S]


class _Results(NamedTuple):
  """What a kernel of query tiles writes; None: it makes no such thing, or no list is cut."""
  out: Any                 # [B, T, N, H]: the attention, or the gradient of q
  lse: Any = None          # [B, N, T]
  out_pieces: Any = None   # [pieces, rows of a tile, N, H]
  lse_pieces: Any = None   # [pieces, N, rows of a tile]


def _call(how, kernel, name, source, results, lists, heads, scratch, cut=Cut()):
  """Runs `kernel(how, lists, source, results, scratch)` for every head and every piece of the lists.

  Args:
    source, results, scratch: NamedTuples, of arrays, of shapes and dtypes, and of memory; the kernel gets references.
  """
  inputs, tree = jax.tree.flatten((lists, source))

  def entry(*refs):
    given, made, memory = refs[:len(inputs)], refs[len(inputs):-1], refs[-1]
    kernel(how, *jax.tree.unflatten(tree, given), jax.tree.unflatten(jax.tree.structure(results), made), memory)

  entry.__name__ = name   # what profilers show
  more = {} if how.interpret is None else {'interpret': how.interpret}
  run = plgpu.kernel(
      entry, out_type=jax.tree.leaves(results), scratch_types=[scratch], num_threads=_COMPUTE + 1, thread_name='warpgroup',
      grid=(lists.order.shape[0] + cut.spare, heads), grid_names=('tile', 'head'),   # heads vary fastest
      compiler_params=plgpu.CompilerParams(approx_math=True), **more)
  return jax.tree.unflatten(jax.tree.structure(results), run(*inputs))


def _tile_memory(slots, rows, head_dim, dtype):
  """Shared memory for `slots` tiles, swizzled as wgmma reads them."""
  swizzled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
  return plgpu.SMEM((slots, rows, head_dim), dtype, transforms=swizzled)


def _barriers(arrivals, count):
  return plgpu.Barrier(num_arrivals=arrivals, num_barriers=count)


# Parts that the kernels share. `memory` is a kernel's scratch memory: tiles and barriers, each with a slot per warpgroup for
# what it owns, and a slot per stage for what streams through.

def _divide_labour(block, compute, copy):
  """The computing warpgroups run `compute()`, the copying one `copy()`."""
  @pl.when(block.warpgroup < _COMPUTE)
  def _():
    plgpu.set_max_registers(_COMPUTE_REGISTERS, action='increase')
    compute()

  @pl.when(block.warpgroup == _COMPUTE)
  def _():
    plgpu.set_max_registers(_COPY_REGISTERS, action='decrease')
    copy()


def _begin_own(block, sources, tiles, is_ready):
  """Starts to copy the warpgroup's rows of `sources` to its tiles: (the first row, the rows)."""
  start = block.rows(block.warpgroup)
  rows = pl.ds(start, _ROWS)
  for source, tile in zip(sources, tiles, strict=True):
    plgpu.copy_gmem_to_smem(source.at[block.row, rows, block.head], tile, is_ready)
  return start, rows


def _marks_of(block, marks, rows):
  """Of the warpgroup's own rows, in registers."""
  return [_load(marks.at[block.row, m, rows], _PER_ROW) for m in range(schedule.MARKS)]


def _mask_keys(block, source, own_marks, first_row, tile_start, scores_TS):
  """The scores of queries and the tile of keys at `tile_start`, MASKED where the marks forbid."""
  keys = [source.k_marks.at[block.row, m, pl.ds(tile_start, scores_TS.shape[1])] for m in range(schedule.MARKS)]
  return jnp.where(_allowed(own_marks, keys, first_row, tile_start, True), scores_TS, MASKED)


def _stream(how, count, stages, copies, ready, free):
  """The copying warpgroup's loop: step n's copies go to slot n % stages once the computing ones have freed it.

  Args:
    copies: (n, slot) -> list of lists of (source, destination), one inner list per pair of barriers.
    ready, free: barriers per inner list: arrived at by its copies, and by the computing warpgroups.
  """
  @pl.loop(0, count)
  def _(n):
    slot = lax.rem(n, jnp.int32(stages))
    for group, is_ready, is_free in zip(copies(n, slot), ready, free, strict=True):
      pl.when(n >= stages)(lambda is_free=is_free: plgpu.barrier_wait(is_free.at[slot]))
      for source, destination in group:
        plgpu.copy_gmem_to_smem(source, destination, is_ready.at[slot])

  if how.interpret is not None:   # the interpreter wants every arrival observed
    @pl.loop(lax.max(jnp.int32(0), count - stages), count)
    def _(n):
      for is_free in free:
        plgpu.barrier_wait(is_free.at[lax.rem(n, jnp.int32(stages))])


def _piece_shape(how, like):
  """Of the results of the pieces of the lists that are cut, for a result [B, T, N, H]; None if none is."""
  if not how.cut.spare:
    return None
  return jax.ShapeDtypeStruct((how.cut.owners * how.cut.pieces, _COMPUTE * _ROWS, *like.shape[2:]), like.dtype)


def _own_tiles(how, lists, x_BTNH):
  """(x as tiles, the numbers of those whose lists are cut)."""
  return x_BTNH.reshape(-1, _COMPUTE * _ROWS, *x_BTNH.shape[2:]), lists.order[:how.cut.owners]


# The forward kernel: one warpgroup multiplies while the other takes exponentials, by turns.

class _ForwardMemory(NamedTuple):
  q: Any
  k: Any
  v: Any
  lse: Any
  q_ready: Any
  k_ready: Any
  v_ready: Any
  k_free: Any
  v_free: Any
  turn: Any


def _forward(how, q_BTNH, k_BSKH, v_BSKH, marks, lists):
  B, T, N, H = q_BTNH.shape
  dtype, stages = q_BTNH.dtype, 2
  out_pieces = _piece_shape(how, q_BTNH)
  lse_pieces = out_pieces and jax.ShapeDtypeStruct((out_pieces.shape[0], N, out_pieces.shape[1]), jnp.float32)
  results = _Results(jax.ShapeDtypeStruct(q_BTNH.shape, dtype), jax.ShapeDtypeStruct((B, N, T), jnp.float32), out_pieces,
                     lse_pieces)
  streamed, arrived, freed = _tile_memory(stages, how.key_tile, H, dtype), _barriers(1, stages), _barriers(_COMPUTE, stages)
  memory = _ForwardMemory(
      q=_tile_memory(_COMPUTE, _ROWS, H, dtype), k=streamed, v=streamed, lse=plgpu.SMEM((_COMPUTE, _ROWS), jnp.float32),
      q_ready=_barriers(1, _COMPUTE), k_ready=arrived, v_ready=arrived, k_free=freed, v_free=freed,
      turn=_barriers(_COMPUTE, 1))
  source = _Source(lists.first_query, q_BTNH, k_BSKH, v_BSKH, None, None, None, *marks)
  made = _call(how, _forward_kernel, 'block_attention_forward', source, results, lists.forward, N, memory, how.cut)
  out, lse = kept(*(_merge_forward(how, lists.forward, made) if how.cut.spare else made[:2]))
  return (out, lse.swapaxes(1, 2) * math.log(2)), (q_BTNH, k_BSKH, v_BSKH, marks, lists, out, lse)


def _forward_kernel(how, lists, source, results, memory):
  block = _Block(lists, source.q.shape[1] // (_COMPUTE * _ROWS), how.cut)
  share, (stages, S, _) = source.q.shape[2] // source.k.shape[2], memory.k.shape

  def copies(n, slot):
    at = block.key_tile(n, S, share)
    return [[(source.k.at[at], memory.k.at[slot])], [(source.v.at[at], memory.v.at[slot])]]

  _divide_labour(block, lambda: _forward_compute(how, block, source, results, memory),
                 lambda: _stream(how, block.total, stages, copies, (memory.k_ready, memory.v_ready),
                                 (memory.k_free, memory.v_free)))


def _forward_compute(how, block, source, results, memory):
  (stages, S, H), dtype = memory.k.shape, source.q.dtype
  scale = H ** -0.5 * math.log2(math.e)
  mine, is_ready = memory.q.at[block.warpgroup], memory.q_ready.at[block.warpgroup]
  slot_of = lambda n: lax.rem(n, jnp.int32(stages))

  def pass_turn():
    plgpu.barrier_arrive(memory.turn)
    plgpu.barrier_wait(memory.turn)

  start, rows = _begin_own(block, [source.q], [mine], is_ready)
  own_marks = _marks_of(block, source.q_marks, rows)
  plgpu.barrier_wait(is_ready)
  pl.when(block.total > 0)(lambda: plgpu.barrier_wait(memory.k_ready.at[0]))
  first_row = source.first_query[0] + start
  pl.when(block.warpgroup == 1)(pass_turn)

  def step(n, carry, masked):
    slot, tile_start = slot_of(n), block.other(n) * S
    scores_TS = _product_transposed(how, mine, memory.k.at[slot], (_ROWS, S)) * scale
    pass_turn()
    plgpu.barrier_arrive(memory.k_free.at[slot])
    if masked:
      scores_TS = _mask_keys(block, source, own_marks, first_row, tile_start, scores_TS)
    acc_TH, peak_T, total_T, weights_TS = _softmax_step(how, scores_TS, carry, dtype)
    plgpu.barrier_arrive(memory.turn)
    plgpu.barrier_wait(memory.v_ready.at[slot])
    plgpu.barrier_wait(memory.turn)

    def await_next_keys():
      pl.when(n + 1 < block.total)(lambda: plgpu.barrier_wait(memory.k_ready.at[slot_of(n + 1)]))

    acc_TH = _add_product(how, acc_TH, weights_TS, memory.v.at[slot], await_next_keys)
    plgpu.barrier_arrive(memory.v_free.at[slot])
    return acc_TH, peak_T, total_T

  nothing = plgpu.layout_cast(jnp.full((_ROWS,), MASKED, jnp.float32), _PER_ROW)
  carry = _walk(block, step, (_zeros((_ROWS, H)), nothing, _zeros((_ROWS,))))
  pl.when(block.warpgroup == 0)(pass_turn)
  _forward_finish(block, rows, carry, results, mine, memory.lse)


def _softmax_step(how, scores_TS, carry, dtype):
  """(the sums so far on the scale of the new peak, the peak, the total, the weights of this tile in `dtype`); see
  reference.MASKED for queries that have seen nothing."""
  acc_TH, peak_T, total_T = carry
  new_peak = jnp.maximum(peak_T, scores_TS.max(axis=1))
  decay = jnp.exp2(peak_T - new_peak)
  weights_TS = jnp.exp2(scores_TS - _rows(new_peak, scores_TS.shape[1]))
  acc_TH = acc_TH * _rows(decay, acc_TH.shape[1])
  total_T = total_T * decay + weights_TS.sum(axis=1)
  weights_TS = weights_TS.astype(dtype)
  if how.interpret is not None:
    return acc_TH, new_peak, total_T, weights_TS
  # All of the softmax is done before the turn is passed on.
  acc_TH, total_T, new_peak, weights_TS = lax.optimization_barrier((acc_TH, total_T, new_peak, weights_TS))
  return acc_TH, new_peak, total_T, weights_TS


def _forward_finish(block, rows, carry, results, mine, lse_memory):
  """Writes the outputs of the warpgroup's rows by way of shared memory; `mine` held its queries."""
  acc_TH, peak_T, total_T = carry
  seen = peak_T > MASKED / 2
  total_T = jnp.where(seen, total_T, 1.0)
  mine[...] = (acc_TH * _rows(jnp.where(seen, 1 / total_T, 0.0), acc_TH.shape[1])).astype(mine.dtype)
  # A piece that saw nothing must weigh nothing when it is merged; in padding the backward pass wants 0.
  unseen = jnp.where(block.is_piece, jnp.float32(MASKED), jnp.float32(0))
  lse_memory[block.warpgroup, :] = jnp.where(seen, peak_T + jnp.log(total_T) * math.log2(math.e), unseen)
  plgpu.commit_smem()

  def write(out, lse):
    plgpu.copy_smem_to_gmem(mine, out)
    plgpu.copy_smem_to_gmem(lse_memory.at[block.warpgroup], lse)

  def whole():
    write(results.out.at[block.row, rows, block.head], results.lse.at[block.row, block.head, rows])

  def piece(rows):
    write(results.out_pieces.at[block.nth, rows, block.head], results.lse_pieces.at[block.nth, block.head, rows])

  block.write(whole, piece if results.out_pieces is not None else None)
  plgpu.wait_smem_to_gmem(0)


def _merge_forward(how, lists, made: _Results):
  """(out, lse) with the results of the pieces in their places."""
  cut, (B, N, T) = how.cut, made.lse.shape
  parts = lambda x: x.reshape(cut.owners, cut.pieces, *x.shape[1:]).swapaxes(0, 1)
  # MASKED times a factor is no number to subtract from itself: fused with the subtraction it is rounded once only.
  natural = jnp.where(made.lse_pieces > MASKED / 2, made.lse_pieces * math.log(2), -jnp.inf)
  out, lse = cached.merge(parts(made.out_pieces), parts(natural).swapaxes(2, 3))
  lse = jnp.where(jnp.isfinite(lse), lse / math.log(2), 0)
  tiles, owners = _own_tiles(how, lists, made.out)
  per_row = T // tiles.shape[1]
  lse_BNIT = made.lse.reshape(B, N, per_row, -1).at[owners // per_row, :, owners % per_row].set(lse.swapaxes(1, 2))
  return tiles.at[owners].set(out.astype(tiles.dtype)).reshape(made.out.shape), lse_BNIT.reshape(made.lse.shape)


# The gradient of the queries.

class _DqMemory(NamedTuple):
  q: Any
  grad: Any
  k: Any
  v: Any
  own_ready: Any
  ready: Any
  free: Any


def _dq(how, lists, source: _Source):
  N, H = source.q.shape[2:]
  dtype, stages = source.q.dtype, 3
  own, streamed = _tile_memory(_COMPUTE, _ROWS, H, dtype), _tile_memory(stages, _ROWS, H, dtype)
  memory = _DqMemory(q=own, grad=own, k=streamed, v=streamed, own_ready=_barriers(2, _COMPUTE), ready=_barriers(2, stages),
                     free=_barriers(_COMPUTE, stages))
  results = _Results(jax.ShapeDtypeStruct(source.q.shape, dtype), out_pieces=_piece_shape(how, source.q))
  made = _call(how, _dq_kernel, 'block_attention_dq', source, results, lists.dq, N, memory, how.cut)
  if not how.cut.spare:
    return made.out
  tiles, owners = _own_tiles(how, lists.dq, made.out)
  whole = made.out_pieces.reshape(how.cut.owners, how.cut.pieces, *tiles.shape[1:]).sum(axis=1, dtype=jnp.float32)
  return tiles.at[owners].set(whole.astype(dtype)).reshape(made.out.shape)


def _dq_kernel(how, lists, source, results, memory):
  block = _Block(lists, source.q.shape[1] // (_COMPUTE * _ROWS), how.cut)
  share, (stages, S, _) = source.q.shape[2] // source.k.shape[2], memory.k.shape

  def copies(n, slot):
    at = block.key_tile(n, S, share)
    return [[(source.k.at[at], memory.k.at[slot]), (source.v.at[at], memory.v.at[slot])]]

  _divide_labour(block, lambda: _dq_compute(how, block, source, results, memory),
                 lambda: _stream(how, block.total, stages, copies, (memory.ready,), (memory.free,)))


def _dq_compute(how, block, source, results, memory):
  stages, S, H = memory.k.shape
  scale = H ** -0.5 * math.log2(math.e)
  mine, my_grad, is_ready = (x.at[block.warpgroup] for x in (memory.q, memory.grad, memory.own_ready))
  start, rows = _begin_own(block, [source.q, source.grad], [mine, my_grad], is_ready)
  own_marks = _marks_of(block, source.q_marks, rows)
  lse_T, mean_T = (_load(x.at[block.row, block.head, rows], _PER_ROW) for x in (source.lse, source.mean))
  first_row = source.first_query[0] + start
  plgpu.barrier_wait(is_ready)

  def step(n, acc_TH, masked):
    slot, tile_start = lax.rem(n, jnp.int32(stages)), block.other(n) * S
    plgpu.barrier_wait(memory.ready.at[slot])
    scores_TS = _product_transposed(how, mine, memory.k.at[slot], (_ROWS, S)) * scale
    if masked:
      scores_TS = _mask_keys(block, source, own_marks, first_row, tile_start, scores_TS)
    weights_TS = jnp.exp2(scores_TS - _rows(lse_T, S))
    slopes_TS = weights_TS * (_product_transposed(how, my_grad, memory.v.at[slot], (_ROWS, S)) - _rows(mean_T, S))
    acc_TH = _add_product(how, acc_TH, slopes_TS.astype(mine.dtype), memory.k.at[slot])
    plgpu.barrier_arrive(memory.free.at[slot])
    return acc_TH

  acc_TH = _walk(block, step, _zeros((_ROWS, H)))
  mine[...] = (acc_TH * H ** -0.5).astype(mine.dtype)
  plgpu.commit_smem()
  write = functools.partial(plgpu.copy_smem_to_gmem, mine)
  piece = lambda rows: write(results.out_pieces.at[block.nth, rows, block.head])
  block.write(lambda: write(results.out.at[block.row, rows, block.head]), piece if results.out_pieces is not None else None)
  plgpu.wait_smem_to_gmem(0)


# The gradients of keys and values: scores are keys by queries, so that both sums over queries have their left side in
# registers.

class _DkvMemory(NamedTuple):
  k: Any
  v: Any
  q: Any
  grad: Any
  lse: Any
  mean: Any
  marks: Any   # of queries
  own_ready: Any
  ready: Any
  free: Any


class _DkvResults(NamedTuple):
  dk: Any
  dv: Any


def _dkv(how, lists, source: _Source) -> _DkvResults:
  K, H = source.k.shape[2:]
  dtype, stages, Q = source.q.dtype, 2, _ROWS
  own, streamed = _tile_memory(_COMPUTE, _ROWS, H, dtype), _tile_memory(stages, Q, H, dtype)
  per_query = plgpu.SMEM((stages, Q), jnp.float32)
  memory = _DkvMemory(
      k=own, v=own, q=streamed, grad=streamed, lse=per_query, mean=per_query,
      marks=plgpu.SMEM((stages, schedule.MARKS, Q), jnp.int32), own_ready=_barriers(2, _COMPUTE),
      ready=_barriers(4 + schedule.MARKS, stages), free=_barriers(_COMPUTE, stages))
  results = _DkvResults(*[jax.ShapeDtypeStruct(source.k.shape, dtype)] * 2)
  return _call(how, _dkv_kernel, 'block_attention_dkv', source, results, lists.dkv, K, memory)


def _dkv_kernel(how, lists, source, results, memory):
  block = _Block(lists, source.k.shape[1] // (_COMPUTE * _ROWS), Cut())
  share, (stages, Q, _) = source.q.shape[2] // source.k.shape[2], memory.q.shape
  # The query heads that share a key head are steps of their own.
  tile_of = lambda n: block.other(lax.div(n, jnp.int32(share)))
  head_of = lambda n: block.head * share + lax.rem(n, jnp.int32(share))

  def copies(n, slot):
    rows, head = pl.ds(tile_of(n) * Q, Q), head_of(n)
    return [[(x.at[block.row, rows, head], to.at[slot])
             for x, to in ((source.q, memory.q), (source.grad, memory.grad))] +
            [(x.at[block.row, head, rows], to.at[slot])
             for x, to in ((source.lse, memory.lse), (source.mean, memory.mean))] +
            [(source.q_marks.at[block.row, m, rows], memory.marks.at[slot, m]) for m in range(schedule.MARKS)]]

  _divide_labour(block, lambda: _dkv_compute(how, block, source, results, memory, tile_of, share),
                 lambda: _stream(how, block.total * share, stages, copies, (memory.ready,), (memory.free,)))


def _dkv_compute(how, block, source, results, memory, tile_of, share):
  (stages, Q, H), dtype = memory.q.shape, source.q.dtype
  scale = H ** -0.5 * math.log2(math.e)
  my_k, my_v, is_ready = (x.at[block.warpgroup] for x in (memory.k, memory.v, memory.own_ready))
  start, rows = _begin_own(block, [source.k, source.v], [my_k, my_v], is_ready)
  first_row = start - source.first_query[0]   # counted from the first query
  plgpu.barrier_wait(is_ready)

  def step(n, carry, masked):
    dk_TH, dv_TH = carry
    slot, tile_start = lax.rem(n, jnp.int32(stages)), tile_of(n) * Q
    plgpu.barrier_wait(memory.ready.at[slot])
    scores_TS = _product_transposed(how, my_k, memory.q.at[slot], (_ROWS, Q)) * scale
    if masked:
      own_marks = _marks_of(block, source.k_marks, rows)   # not before the loop: the two sums take every register
      queries = [memory.marks.at[slot, m] for m in range(schedule.MARKS)]
      scores_TS = jnp.where(_allowed(own_marks, queries, first_row, tile_start, False), scores_TS, MASKED)
    weights_TS = jnp.exp2(scores_TS - _columns(_load(memory.lse.at[slot], _PER_COLUMN), _ROWS))
    dv_TH = _add_product(how, dv_TH, weights_TS.astype(dtype), memory.grad.at[slot])
    slopes_TS = _product_transposed(how, my_v, memory.grad.at[slot], (_ROWS, Q))
    slopes_TS = weights_TS * (slopes_TS - _columns(_load(memory.mean.at[slot], _PER_COLUMN), _ROWS))
    dk_TH = _add_product(how, dk_TH, slopes_TS.astype(dtype), memory.q.at[slot])
    plgpu.barrier_arrive(memory.free.at[slot])
    return dk_TH, dv_TH

  dk_TH, dv_TH = _walk(block, step, (_zeros((_ROWS, H)), _zeros((_ROWS, H))), share)
  my_k[...] = (dk_TH * H ** -0.5).astype(dtype)
  my_v[...] = dv_TH.astype(dtype)
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(my_k, results.dk.at[block.row, rows, block.head])
  plgpu.copy_smem_to_gmem(my_v, results.dv.at[block.row, rows, block.head])
  plgpu.wait_smem_to_gmem(0)


def _backward(how, saved, grads):
  q_BTNH, k_BSKH, v_BSKH, marks, lists, out_BTNH, lse_BNT = saved
  grad_BTNH, grad_lse_BTN = grads
  mean_BNT = mean_slope(out_BTNH, grad_BTNH, grad_lse_BTN).swapaxes(1, 2)
  source = _Source(lists.first_query, q_BTNH, k_BSKH, v_BSKH, grad_BTNH, lse_BNT, mean_BNT, *marks)
  dk, dv = _dkv(how, lists, source)
  return _dq(how, lists, source), dk, dv, None, None


_attention.defvjp(_forward, _backward)
