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
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from blockattn import blocks
from blockattn.kernels import schedule
from blockattn.kernels.reference import MASKED
from blockattn.kernels.tiles import Tiles

HEAD_DIMS = (64, 128)
DTYPES = (jnp.bfloat16, jnp.float16)
_ROWS = 64       # of a warpgroup: what one wgmma instruction multiplies
_COMPUTE = 2     # warpgroups that compute; one more copies
_COPY_REGISTERS, _COMPUTE_REGISTERS = 24, 240   # per thread; 128 * (24 + 2 * 240) fit into the 65,536 of a multiprocessor
_SCORES = plgpu.Layout.WGMMA
_PER_ROW, _PER_COLUMN = _SCORES.reduce(1), _SCORES.reduce(0)


def attention(q_BTNH, k_BSKH, v_BSKH, layout: blocks.BlockLayout, tiles: Tiles, interpret=None):
  """Softmax attention over the keys that `blocks.may_attend` allows; T == S.

  Args:
    q_BTNH, k_BSKH, v_BSKH: as `api.block_attention` takes them, already checked.
    layout: BlockLayout of [B, T] arrays.
    tiles: (128, key tile) of the forward pass; the backward pass takes tiles of 128 by 64.
    interpret: parameters of Pallas' GPU interpreter, to run the kernels on any platform.

  Returns:
    [B, T, N, H] in q's dtype.

  Raises:
    ValueError: a dtype, a head width or tiles that the kernels do not know, or another GPU than Hopper.
  """
  return _attention(*_prepare(q_BTNH, k_BSKH, v_BSKH, layout, tiles, interpret))[:, :q_BTNH.shape[1]]


def attention_and_lse(q_BTNH, k_BSKH, v_BSKH, layout: blocks.BlockLayout, tiles: Tiles, interpret=None):
  """(what `attention` returns, the logsumexp of each query's scores, float32 [B, T, N], 0 in padding). No gradients."""
  T = q_BTNH.shape[1]
  out, (*_, lse_BNT) = _forward(*_prepare(q_BTNH, k_BSKH, v_BSKH, layout, tiles, interpret))
  return out[:, :T], lse_BNT.swapaxes(1, 2)[:, :T] * math.log(2)


def _prepare(q_BTNH, k_BSKH, v_BSKH, layout, tiles, interpret):
  """The arguments of `_attention`, padded to whole tiles."""
  H = q_BTNH.shape[3]
  if interpret is None and jax.default_backend() == 'gpu':
    _check_device(jax.devices()[0])
  if q_BTNH.dtype not in DTYPES or H not in HEAD_DIMS:
    raise ValueError(f'{q_BTNH.dtype} with head_dim {H}: the GPU kernels take bfloat16 and float16 and head_dim '
                     f'{" or ".join(map(str, HEAD_DIMS))}; use impl="xla"')
  if tiles.query != _COMPUTE * _ROWS or tiles.key % _ROWS:
    raise ValueError(f'tiles {tuple(tiles)}: the GPU kernels take {_COMPUTE * _ROWS} queries by a multiple of {_ROWS} keys')
  whole = Tiles(tiles.query, max(tiles))
  layout = schedule.pad_layout(layout, whole)
  q, k, v = (schedule.pad_tokens(x, whole, axis=1) for x in (q_BTNH, k_BSKH, v_BSKH))

  def masks(tiles):
    touched, full = schedule.tile_masks(layout, tiles)
    return schedule.visited_tiles(touched), full

  narrow, wide = Tiles(tiles.query, _ROWS), Tiles(_ROWS, tiles.query)
  swap = lambda x: x.swapaxes(1, 2)
  lists = Lists(forward=schedule.list_tiles(*masks(tiles)), dq=schedule.list_tiles(*masks(narrow)),
                dkv=schedule.list_tiles(*map(swap, masks(wide))))
  return _How(tiles.key, interpret), q, k, v, schedule.token_marks(layout), lists


def _check_device(device):
  if str(device.compute_capability).partition('.')[0] != '9':   # wgmma exists on Hopper only
    raise ValueError(f'{device.device_kind} has compute capability {device.compute_capability}; the GPU kernels need 9.0 '
                     '(H100, H200); use impl="xla"')


@dataclasses.dataclass(frozen=True)
class _How:
  """What the kernels are specialised to, beside shapes."""
  key_tile: int
  interpret: Any


@flax.struct.dataclass
class Lists:
  """schedule.TileLists of the three kernels."""
  forward: schedule.TileLists
  dq: schedule.TileLists
  dkv: schedule.TileLists


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(how, q_BTNH, k_BSKH, v_BSKH, marks, lists):
  return _forward(how, q_BTNH, k_BSKH, v_BSKH, marks, lists)[0]


# Small differences between jax 0.10 and 0.11, and between the device and its interpreter, end here.

def _load(ref, layout):
  """A vector from global or shared memory, spread over a warpgroup's registers in `layout`."""
  index = ((),) if inspect.signature(plgpu.load).parameters['idx'].default is inspect.Parameter.empty else ()
  return plgpu.load(ref, *index, layout=layout, optimized=False)


def _transposed(ref):
  return ref.transpose((1, 0)) if hasattr(ref, 'transpose') else plgpu.transpose_ref(ref, (1, 0))


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
  return _product(how, x_ref, _transposed(y_ref), shape)


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
  """What a thread block owns: batch row, head, tile, and its list of tiles of the other side."""

  def __init__(self, lists, per_row):
    owner = lists.order[lax.axis_index('tile')]
    self.head, self.warpgroup = lax.axis_index('head'), lax.axis_index('warpgroup')
    self.row, self.tile = lax.div(owner, jnp.int32(per_row)), lax.rem(owner, jnp.int32(per_row))
    self.partial, self.total = lists.partial[owner], lists.total[owner]
    self._index, self._owner = lists.index, owner

  def other(self, n):
    """The n-th tile of the list."""
    return self._index[self._owner, n]

  def key_tile(self, n, size, share):
    """Where in the keys the n-th tile is, for a block of queries whose head shares its keys with `share` heads."""
    return self.row, pl.ds(self.other(n) * size, size), lax.div(self.head, jnp.int32(share))

  def rows(self, warpgroup):
    """The first of a warpgroup's rows."""
    return (self.tile * _COMPUTE + warpgroup) * _ROWS


def _call(how, kernel, name, outputs, inputs, lists, heads, scratch):
  """Runs `kernel(lists, *inputs, *outputs, *scratch)` for every head and tile."""
  def entry(index, partial, total, order, *refs):
    kernel(schedule.TileLists(index, partial, total, order), *refs)

  entry.__name__ = name   # what profilers show
  more = {} if how.interpret is None else {'interpret': how.interpret}
  run = plgpu.kernel(
      entry, out_type=outputs, scratch_types=scratch, num_threads=_COMPUTE + 1, thread_name='warpgroup',
      grid=(lists.order.shape[0], heads), grid_names=('tile', 'head'),   # heads vary fastest
      compiler_params=plgpu.CompilerParams(approx_math=True), **more)
  return run(lists.index, lists.partial, lists.total, lists.order, *inputs)


def _tile_memory(slots, rows, head_dim, dtype):
  """Shared memory for `slots` tiles, swizzled as wgmma reads them."""
  swizzled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
  return plgpu.SMEM((slots, rows, head_dim), dtype, transforms=swizzled)


def _barriers(arrivals, count):
  return plgpu.Barrier(num_arrivals=arrivals, num_barriers=count)


def _stream(how, count, stages, copies, ready, free):
  """The copying warpgroup's loop: step n's copies go to slot n % stages once the computing ones have freed it.

  Args:
    copies: (n, slot) -> list of lists of (source, destination), one inner list per pair of barriers.
    ready, free: barriers per inner list: arrived at by its copies, and by the computing warpgroups.
  """
  plgpu.set_max_registers(_COPY_REGISTERS, action='decrease')

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


def _forward(how, q_BTNH, k_BSKH, v_BSKH, marks, lists):
  B, T, N, H = q_BTNH.shape
  share, dtype, S = N // k_BSKH.shape[2], q_BTNH.dtype, how.key_tile
  stages, scale = 2, H ** -0.5 * math.log2(math.e)

  def kernel(lists, q, k, v, q_marks, k_marks, out, lse, q_s, k_s, v_s, lse_s, q_ready, k_ready, v_ready, k_free, v_free,
             turn):
    block = _Block(lists, per_row=T // (_COMPUTE * _ROWS))
    slot_of = lambda n: lax.rem(n, jnp.int32(stages))

    def pass_turn():
      plgpu.barrier_arrive(turn)
      plgpu.barrier_wait(turn)

    @pl.when(block.warpgroup < _COMPUTE)
    def _():
      plgpu.set_max_registers(_COMPUTE_REGISTERS, action='increase')
      mine, start = q_s.at[block.warpgroup], block.rows(block.warpgroup)
      own_rows = pl.ds(start, _ROWS)
      plgpu.copy_gmem_to_smem(q.at[block.row, own_rows, block.head], mine, q_ready.at[block.warpgroup])
      own_marks = [_load(q_marks.at[block.row, m, own_rows], _PER_ROW) for m in range(schedule.MARKS)]
      plgpu.barrier_wait(q_ready.at[block.warpgroup])
      plgpu.barrier_wait(k_ready.at[0])
      pl.when(block.warpgroup == 1)(pass_turn)   # one warpgroup multiplies while the other takes exponentials

      def step(n, carry, masked):
        acc_TH, peak_T, total_T = carry
        slot, tile_start = slot_of(n), block.other(n) * S
        scores_TS = _product_transposed(how, mine, k_s.at[slot], (_ROWS, S)) * scale
        pass_turn()
        plgpu.barrier_arrive(k_free.at[slot])
        if masked:
          keys = [k_marks.at[block.row, m, pl.ds(tile_start, S)] for m in range(schedule.MARKS)]
          scores_TS = jnp.where(_allowed(own_marks, keys, start, tile_start, True), scores_TS, MASKED)
        new_peak = jnp.maximum(peak_T, scores_TS.max(axis=1))
        # A query that has seen nothing so far has peak MASKED and weights of 1; its first real key makes `decay` zero.
        decay = jnp.exp2(peak_T - new_peak)
        weights_TS = jnp.exp2(scores_TS - _rows(new_peak, S))
        acc_TH = acc_TH * _rows(decay, H)
        total_T = total_T * decay + weights_TS.sum(axis=1)
        weights_TS = weights_TS.astype(dtype)
        if how.interpret is None:
          # All of the softmax is done before the turn is passed on.
          acc_TH, total_T, new_peak, weights_TS = lax.optimization_barrier((acc_TH, total_T, new_peak, weights_TS))
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(v_ready.at[slot])
        plgpu.barrier_wait(turn)

        def await_next_keys():
          pl.when(n + 1 < block.total)(lambda: plgpu.barrier_wait(k_ready.at[slot_of(n + 1)]))

        acc_TH = _add_product(how, acc_TH, weights_TS, v_s.at[slot], await_next_keys)
        plgpu.barrier_arrive(v_free.at[slot])
        return acc_TH, new_peak, total_T

      nothing = plgpu.layout_cast(jnp.full((_ROWS,), MASKED, jnp.float32), _PER_ROW)
      acc_TH, peak_T, total_T = _walk(block, step, (_zeros((_ROWS, H)), nothing, _zeros((_ROWS,))))
      pl.when(block.warpgroup == 0)(pass_turn)
      seen = peak_T > MASKED / 2
      total_T = jnp.where(seen, total_T, 1.0)
      mine[...] = (acc_TH * _rows(jnp.where(seen, 1 / total_T, 0.0), H)).astype(dtype)
      lse_s[block.warpgroup, :] = jnp.where(seen, peak_T + jnp.log(total_T) * math.log2(math.e), 0.0)
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(mine, out.at[block.row, own_rows, block.head])
      plgpu.copy_smem_to_gmem(lse_s.at[block.warpgroup], lse.at[block.row, block.head, own_rows])
      plgpu.wait_smem_to_gmem(0)

    @pl.when(block.warpgroup == _COMPUTE)
    def _():
      def copies(n, slot):
        at = block.key_tile(n, S, share)
        return [[(k.at[at], k_s.at[slot])], [(v.at[at], v_s.at[slot])]]
      _stream(how, block.total, stages, copies, (k_ready, v_ready), (k_free, v_free))

  outputs = [jax.ShapeDtypeStruct(q_BTNH.shape, dtype), jax.ShapeDtypeStruct((B, N, T), jnp.float32)]
  scratch = [_tile_memory(_COMPUTE, _ROWS, H, dtype), _tile_memory(stages, S, H, dtype), _tile_memory(stages, S, H, dtype),
             plgpu.SMEM((_COMPUTE, _ROWS), jnp.float32), _barriers(1, _COMPUTE), _barriers(1, stages), _barriers(1, stages),
             _barriers(_COMPUTE, stages), _barriers(_COMPUTE, stages), _barriers(_COMPUTE, 1)]
  out, lse = _call(how, kernel, 'block_attention_forward', outputs, (q_BTNH, k_BSKH, v_BSKH, *marks), lists.forward, N,
                   scratch)
  return out, (q_BTNH, k_BSKH, v_BSKH, marks, lists, out, lse)


def _dq(how, q_BTNH, k_BSKH, v_BSKH, marks, lists, lse_BNT, mean_BNT, grad_BTNH):
  T, N, H = q_BTNH.shape[1:]
  share, dtype, S = N // k_BSKH.shape[2], q_BTNH.dtype, _ROWS
  stages, scale = 3, H ** -0.5 * math.log2(math.e)

  def kernel(lists, q, k, v, grad, lse, mean, q_marks, k_marks, dq, q_s, grad_s, k_s, v_s, own_ready, ready, free):
    block = _Block(lists, per_row=T // (_COMPUTE * _ROWS))

    @pl.when(block.warpgroup < _COMPUTE)
    def _():
      plgpu.set_max_registers(_COMPUTE_REGISTERS, action='increase')
      mine, my_grad, start = q_s.at[block.warpgroup], grad_s.at[block.warpgroup], block.rows(block.warpgroup)
      own_rows, is_ready = pl.ds(start, _ROWS), own_ready.at[block.warpgroup]
      plgpu.copy_gmem_to_smem(q.at[block.row, own_rows, block.head], mine, is_ready)
      plgpu.copy_gmem_to_smem(grad.at[block.row, own_rows, block.head], my_grad, is_ready)
      own_marks = [_load(q_marks.at[block.row, m, own_rows], _PER_ROW) for m in range(schedule.MARKS)]
      lse_T, mean_T = (_load(x.at[block.row, block.head, own_rows], _PER_ROW) for x in (lse, mean))
      plgpu.barrier_wait(is_ready)

      def step(n, acc_TH, masked):
        slot, tile_start = lax.rem(n, jnp.int32(stages)), block.other(n) * S
        plgpu.barrier_wait(ready.at[slot])
        scores_TS = _product_transposed(how, mine, k_s.at[slot], (_ROWS, S)) * scale
        if masked:
          keys = [k_marks.at[block.row, m, pl.ds(tile_start, S)] for m in range(schedule.MARKS)]
          scores_TS = jnp.where(_allowed(own_marks, keys, start, tile_start, True), scores_TS, MASKED)
        weights_TS = jnp.exp2(scores_TS - _rows(lse_T, S))
        slopes_TS = weights_TS * (_product_transposed(how, my_grad, v_s.at[slot], (_ROWS, S)) - _rows(mean_T, S))
        acc_TH = _add_product(how, acc_TH, slopes_TS.astype(dtype), k_s.at[slot])
        plgpu.barrier_arrive(free.at[slot])
        return acc_TH

      acc_TH = _walk(block, step, _zeros((_ROWS, H)))
      mine[...] = (acc_TH * H ** -0.5).astype(dtype)
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(mine, dq.at[block.row, own_rows, block.head])
      plgpu.wait_smem_to_gmem(0)

    @pl.when(block.warpgroup == _COMPUTE)
    def _():
      def copies(n, slot):
        at = block.key_tile(n, S, share)
        return [[(k.at[at], k_s.at[slot]), (v.at[at], v_s.at[slot])]]
      _stream(how, block.total, stages, copies, (ready,), (free,))

  own, streamed = _tile_memory(_COMPUTE, _ROWS, H, dtype), _tile_memory(stages, S, H, dtype)
  scratch = [own, own, streamed, streamed, _barriers(2, _COMPUTE), _barriers(2, stages), _barriers(_COMPUTE, stages)]
  inputs = q_BTNH, k_BSKH, v_BSKH, grad_BTNH, lse_BNT, mean_BNT, *marks
  return _call(how, kernel, 'block_attention_dq', [jax.ShapeDtypeStruct(q_BTNH.shape, dtype)], inputs, lists.dq, N,
               scratch)[0]


def _dkv(how, q_BTNH, k_BSKH, v_BSKH, marks, lists, lse_BNT, mean_BNT, grad_BTNH):
  """Scores are keys by queries here, so that both sums over queries have their left side in registers."""
  T, N, H = q_BTNH.shape[1:]
  K, dtype, Q = k_BSKH.shape[2], q_BTNH.dtype, _ROWS
  share = N // K
  stages, scale = 2, H ** -0.5 * math.log2(math.e)

  def kernel(lists, q, k, v, grad, lse, mean, q_marks, k_marks, dk, dv, k_s, v_s, q_s, grad_s, lse_s, mean_s,
             marks_s, own_ready, ready, free):
    block = _Block(lists, per_row=T // (_COMPUTE * _ROWS))
    # The query heads that share a key head are steps of their own.
    tile_of = lambda n: block.other(lax.div(n, jnp.int32(share)))
    head_of = lambda n: block.head * share + lax.rem(n, jnp.int32(share))

    @pl.when(block.warpgroup < _COMPUTE)
    def _():
      plgpu.set_max_registers(_COMPUTE_REGISTERS, action='increase')
      my_k, my_v, start = k_s.at[block.warpgroup], v_s.at[block.warpgroup], block.rows(block.warpgroup)
      own_rows, is_ready = pl.ds(start, _ROWS), own_ready.at[block.warpgroup]
      plgpu.copy_gmem_to_smem(k.at[block.row, own_rows, block.head], my_k, is_ready)
      plgpu.copy_gmem_to_smem(v.at[block.row, own_rows, block.head], my_v, is_ready)
      plgpu.barrier_wait(is_ready)

      def step(n, carry, masked):
        dk_TH, dv_TH = carry
        slot, tile_start = lax.rem(n, jnp.int32(stages)), tile_of(n) * Q
        plgpu.barrier_wait(ready.at[slot])
        scores_TS = _product_transposed(how, my_k, q_s.at[slot], (_ROWS, Q)) * scale
        if masked:
          # Not before the loop: every register is taken by the two sums.
          own_marks = [_load(k_marks.at[block.row, m, own_rows], _PER_ROW) for m in range(schedule.MARKS)]
          queries = [marks_s.at[slot, m] for m in range(schedule.MARKS)]
          scores_TS = jnp.where(_allowed(own_marks, queries, start, tile_start, False), scores_TS, MASKED)
        weights_TS = jnp.exp2(scores_TS - _columns(_load(lse_s.at[slot], _PER_COLUMN), _ROWS))
        dv_TH = _add_product(how, dv_TH, weights_TS.astype(dtype), grad_s.at[slot])
        slopes_TS = _product_transposed(how, my_v, grad_s.at[slot], (_ROWS, Q))
        slopes_TS = weights_TS * (slopes_TS - _columns(_load(mean_s.at[slot], _PER_COLUMN), _ROWS))
        dk_TH = _add_product(how, dk_TH, slopes_TS.astype(dtype), q_s.at[slot])
        plgpu.barrier_arrive(free.at[slot])
        return dk_TH, dv_TH

      dk_TH, dv_TH = _walk(block, step, (_zeros((_ROWS, H)), _zeros((_ROWS, H))), share)
      my_k[...] = (dk_TH * H ** -0.5).astype(dtype)
      my_v[...] = dv_TH.astype(dtype)
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(my_k, dk.at[block.row, own_rows, block.head])
      plgpu.copy_smem_to_gmem(my_v, dv.at[block.row, own_rows, block.head])
      plgpu.wait_smem_to_gmem(0)

    @pl.when(block.warpgroup == _COMPUTE)
    def _():
      def copies(n, slot):
        rows, head = pl.ds(tile_of(n) * Q, Q), head_of(n)
        return [[(x.at[block.row, rows, head], x_s.at[slot]) for x, x_s in ((q, q_s), (grad, grad_s))] +
                [(x.at[block.row, head, rows], x_s.at[slot]) for x, x_s in ((lse, lse_s), (mean, mean_s))] +
                [(q_marks.at[block.row, m, rows], marks_s.at[slot, m]) for m in range(schedule.MARKS)]]
      _stream(how, block.total * share, stages, copies, (ready,), (free,))

  own, streamed = _tile_memory(_COMPUTE, _ROWS, H, dtype), _tile_memory(stages, Q, H, dtype)
  per_query = plgpu.SMEM((stages, Q), jnp.float32)
  scratch = [own, own, streamed, streamed, per_query, per_query, plgpu.SMEM((stages, schedule.MARKS, Q), jnp.int32),
             _barriers(2, _COMPUTE), _barriers(4 + schedule.MARKS, stages),
             _barriers(_COMPUTE, stages)]
  inputs = q_BTNH, k_BSKH, v_BSKH, grad_BTNH, lse_BNT, mean_BNT, *marks
  return _call(how, kernel, 'block_attention_dkv', [jax.ShapeDtypeStruct(k_BSKH.shape, dtype)] * 2, inputs, lists.dkv, K,
               scratch)


def _backward(how, saved, grad_BTNH):
  *inputs, out_BTNH, lse_BNT = saved
  # sum over the keys of weight * d loss / d weight: what the derivative of the softmax subtracts
  mean_BNT = jnp.einsum('btnh,btnh->bnt', out_BTNH.astype(jnp.float32), grad_BTNH.astype(jnp.float32))
  dk, dv = _dkv(how, *inputs, lse_BNT, mean_BNT, grad_BTNH)
  return _dq(how, *inputs, lse_BNT, mean_BNT, grad_BTNH), dk, dv, None, None


_attention.defvjp(_forward, _backward)
