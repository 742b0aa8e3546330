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

from blockattn.errors import UserError
from blockattn.kernels import cached as append, schedule
from blockattn.kernels.reference import MASKED
from blockattn.kernels.tiles import Tiles

HEAD_DIMS = (64, 128)
DTYPES = (jnp.bfloat16, jnp.float16)
_ROWS = 64       # of a warpgroup: what one wgmma instruction multiplies
_COMPUTE = 2     # warpgroups that compute; one more copies
_COPY_REGISTERS, _COMPUTE_REGISTERS = 24, 240   # per thread; 128 * (24 + 2 * 240) fit into the 65,536 of a multiprocessor
_MULTIPROCESSORS = 132   # of an H100 SXM and an H200
_SCORES = plgpu.Layout.WGMMA
_PER_ROW, _PER_COLUMN = _SCORES.reduce(1), _SCORES.reduce(0)


def attention(q_BTNH, k_BSKH, v_BSKH, marks: schedule.Marks, tiles: Tiles, cut=None, interpret=None):
  """Softmax attention over the keys that the marks allow.

  Args:
    q_BTNH, k_BSKH, v_BSKH: as `api.block_attention` takes them, already checked, but for T, which may differ from S.
    marks: schedule.Marks of T queries and S keys.
    tiles: (128, key tile) of the forward pass; the backward pass takes tiles of 128 by 64. Of a part of a row T and its
      first query must be multiples of 128, and S of both sizes.
    cut: schedule.Cut, how the keys of a row's readers are divided over thread blocks; by default `_cut`.
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
  cut = _cut(*q.shape[:3], k.shape[1]) if cut is None else cut
  how = _How(tiles.key, cut, interpret)
  out, lse = _attention(how, q, k, v, (marks.query, marks.key), _lists(marks, tiles))
  return out[:, :T], lse[:, :T]


def _lists(marks, tiles):
  def lists(tiles, turn=lambda mask: mask):
    touched, full = map(turn, schedule.tile_masks(marks, tiles))
    return schedule.list_tiles(schedule.every_owner(touched), full)

  return Lists(forward=lists(tiles), dq=lists(Tiles(tiles.query, _ROWS)),
               dkv=lists(Tiles(_ROWS, tiles.query), lambda mask: mask.swapaxes(1, 2)),
               first_query=schedule.first_query(marks)[None])


def _cut(rows, queries, heads, keys) -> schedule.Cut:
  """Pieces for the query tiles of each row's last 512 tokens, so many that two fall to each multiprocessor if these tiles
  read everything, and that a piece then still has eight tiles of keys."""
  tile = _COMPUTE * _ROWS
  owners = rows * min(4, queries // tile)
  pieces = min(2 * _MULTIPROCESSORS // max(owners * heads, 1), keys // tile // 8)
  return schedule.Cut(owners, pieces) if pieces > 1 else schedule.Cut()


def lacks(device) -> str | None:
  """What the kernels need and a GPU does not have, None if nothing."""
  capability = str(device.compute_capability)
  if capability.partition('.')[0] == '9':   # wgmma exists on Hopper only
    return None
  return f'{device.device_kind} has compute capability {capability}; impl="gpu" needs 9.0 (H100, H200)'


@dataclasses.dataclass(frozen=True)
class _How:
  """What the kernels are specialised to, beside shapes."""
  key_tile: int
  cut: schedule.Cut
  interpret: Any


@flax.struct.dataclass
class Lists:
  """schedule.TileLists of the three kernels, and the index in the row of the first query, int32 [1]."""
  forward: schedule.TileLists
  dq: schedule.TileLists
  dkv: schedule.TileLists
  first_query: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(how, q_BTNH, k_BSKH, v_BSKH, marks, lists):
  return _forward(how, q_BTNH, k_BSKH, v_BSKH, marks, lists)[0]


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
    owner, self._first, self.total = schedule.piece(n, lists.order, lists.total, cut)
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


def _call(how, kernel, name, outputs, inputs, lists, heads, scratch, cut):
  """Runs `kernel(lists, *inputs, outputs, *scratch)` for every head and every piece of the lists."""
  def entry(index, partial, total, order, *refs):
    first, last = len(inputs), len(inputs) + len(outputs)
    kernel(schedule.TileLists(index, partial, total, order), *refs[:first], refs[first:last], *refs[last:])

  entry.__name__ = name   # what profilers show
  more = {} if how.interpret is None else {'interpret': how.interpret}
  run = plgpu.kernel(
      entry, out_type=outputs, scratch_types=scratch, num_threads=_COMPUTE + 1, thread_name='warpgroup',
      grid=(lists.order.shape[0] + cut.spare, heads), grid_names=('tile', 'head'),   # heads vary fastest
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


def _piece_shape(how, like):
  """Of the results of the pieces of the lists that are cut, for a result [B, T, N, H]."""
  return jax.ShapeDtypeStruct((how.cut.owners * how.cut.pieces, _COMPUTE * _ROWS, *like.shape[2:]), like.dtype)


def _own_tiles(how, lists, x_BTNH):
  """(x as tiles, the numbers of those whose lists are cut)."""
  return x_BTNH.reshape(-1, _COMPUTE * _ROWS, *x_BTNH.shape[2:]), lists.order[:how.cut.owners]


def _merge_forward(how, lists, out_BTNH, lse_BNT, out_pieces, lse_pieces):
  """Puts the results of the pieces in their places."""
  cut, (B, N, T) = how.cut, lse_BNT.shape
  parts = lambda x: x.reshape(cut.owners, cut.pieces, *x.shape[1:]).swapaxes(0, 1)
  # MASKED times a factor is no number to subtract from itself: fused with the subtraction it is rounded once only.
  natural = jnp.where(lse_pieces > MASKED / 2, lse_pieces * math.log(2), -jnp.inf)
  out, lse = append.merge(parts(out_pieces), parts(natural).swapaxes(2, 3))
  lse = jnp.where(jnp.isfinite(lse), lse / math.log(2), 0)
  tiles, owners = _own_tiles(how, lists, out_BTNH)
  per_row = T // tiles.shape[1]
  lse_BNIT = lse_BNT.reshape(B, N, per_row, -1).at[owners // per_row, :, owners % per_row].set(lse.swapaxes(1, 2))
  return tiles.at[owners].set(out.astype(tiles.dtype)).reshape(out_BTNH.shape), lse_BNIT.reshape(lse_BNT.shape)


def _forward(how, q_BTNH, k_BSKH, v_BSKH, marks, lists):
  B, T, N, H = q_BTNH.shape
  share, dtype, S = N // k_BSKH.shape[2], q_BTNH.dtype, how.key_tile
  stages, scale = 2, H ** -0.5 * math.log2(math.e)

  def kernel(lists, first_query, q, k, v, q_marks, k_marks, outputs, q_s, k_s, v_s, lse_s, q_ready, k_ready, v_ready, k_free,
             v_free, turn):
    block = _Block(lists, T // (_COMPUTE * _ROWS), how.cut)
    out, lse, *pieces = outputs
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
      pl.when(block.total > 0)(lambda: plgpu.barrier_wait(k_ready.at[0]))
      first_row = first_query[0] + start
      pl.when(block.warpgroup == 1)(pass_turn)   # one warpgroup multiplies while the other takes exponentials

      def step(n, carry, masked):
        acc_TH, peak_T, total_T = carry
        slot, tile_start = slot_of(n), block.other(n) * S
        scores_TS = _product_transposed(how, mine, k_s.at[slot], (_ROWS, S)) * scale
        pass_turn()
        plgpu.barrier_arrive(k_free.at[slot])
        if masked:
          keys = [k_marks.at[block.row, m, pl.ds(tile_start, S)] for m in range(schedule.MARKS)]
          scores_TS = jnp.where(_allowed(own_marks, keys, first_row, tile_start, True), scores_TS, MASKED)
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
      # A piece that saw nothing must weigh nothing when it is merged; in padding the backward pass wants 0.
      unseen = jnp.where(block.is_piece, jnp.float32(MASKED), jnp.float32(0))
      lse_s[block.warpgroup, :] = jnp.where(seen, peak_T + jnp.log(total_T) * math.log2(math.e), unseen)
      plgpu.commit_smem()

      def write(to, lse_to):
        plgpu.copy_smem_to_gmem(mine, to)
        plgpu.copy_smem_to_gmem(lse_s.at[block.warpgroup], lse_to)

      def whole():
        write(out.at[block.row, own_rows, block.head], lse.at[block.row, block.head, own_rows])

      def piece(rows):
        write(pieces[0].at[block.nth, rows, block.head], pieces[1].at[block.nth, block.head, rows])

      block.write(whole, piece if pieces else None)
      plgpu.wait_smem_to_gmem(0)

    @pl.when(block.warpgroup == _COMPUTE)
    def _():
      def copies(n, slot):
        at = block.key_tile(n, S, share)
        return [[(k.at[at], k_s.at[slot])], [(v.at[at], v_s.at[slot])]]
      _stream(how, block.total, stages, copies, (k_ready, v_ready), (k_free, v_free))

  outputs = [jax.ShapeDtypeStruct(q_BTNH.shape, dtype), jax.ShapeDtypeStruct((B, N, T), jnp.float32)]
  if how.cut.spare:
    pieces = _piece_shape(how, q_BTNH)
    outputs += [pieces, jax.ShapeDtypeStruct((pieces.shape[0], N, pieces.shape[1]), jnp.float32)]
  scratch = [_tile_memory(_COMPUTE, _ROWS, H, dtype), _tile_memory(stages, S, H, dtype), _tile_memory(stages, S, H, dtype),
             plgpu.SMEM((_COMPUTE, _ROWS), jnp.float32), _barriers(1, _COMPUTE), _barriers(1, stages), _barriers(1, stages),
             _barriers(_COMPUTE, stages), _barriers(_COMPUTE, stages), _barriers(_COMPUTE, 1)]
  inputs = lists.first_query, q_BTNH, k_BSKH, v_BSKH, *marks
  out, lse, *pieces = _call(how, kernel, 'block_attention_forward', outputs, inputs, lists.forward, N, scratch, how.cut)
  if pieces:
    out, lse = _merge_forward(how, lists.forward, out, lse, *pieces)
  return (out, lse.swapaxes(1, 2) * math.log(2)), (q_BTNH, k_BSKH, v_BSKH, marks, lists, out, lse)


def _dq(how, q_BTNH, k_BSKH, v_BSKH, marks, lists, lse_BNT, mean_BNT, grad_BTNH):
  T, N, H = q_BTNH.shape[1:]
  share, dtype, S = N // k_BSKH.shape[2], q_BTNH.dtype, _ROWS
  stages, scale = 3, H ** -0.5 * math.log2(math.e)

  def kernel(lists, first_query, q, k, v, grad, lse, mean, q_marks, k_marks, outputs, q_s, grad_s, k_s, v_s, own_ready,
             ready, free):
    block = _Block(lists, T // (_COMPUTE * _ROWS), how.cut)
    dq, *pieces = outputs

    @pl.when(block.warpgroup < _COMPUTE)
    def _():
      plgpu.set_max_registers(_COMPUTE_REGISTERS, action='increase')
      mine, my_grad, start = q_s.at[block.warpgroup], grad_s.at[block.warpgroup], block.rows(block.warpgroup)
      own_rows, is_ready = pl.ds(start, _ROWS), own_ready.at[block.warpgroup]
      plgpu.copy_gmem_to_smem(q.at[block.row, own_rows, block.head], mine, is_ready)
      plgpu.copy_gmem_to_smem(grad.at[block.row, own_rows, block.head], my_grad, is_ready)
      own_marks = [_load(q_marks.at[block.row, m, own_rows], _PER_ROW) for m in range(schedule.MARKS)]
      lse_T, mean_T = (_load(x.at[block.row, block.head, own_rows], _PER_ROW) for x in (lse, mean))
      first_row = first_query[0] + start
      plgpu.barrier_wait(is_ready)

      def step(n, acc_TH, masked):
        slot, tile_start = lax.rem(n, jnp.int32(stages)), block.other(n) * S
        plgpu.barrier_wait(ready.at[slot])
        scores_TS = _product_transposed(how, mine, k_s.at[slot], (_ROWS, S)) * scale
        if masked:
          keys = [k_marks.at[block.row, m, pl.ds(tile_start, S)] for m in range(schedule.MARKS)]
          scores_TS = jnp.where(_allowed(own_marks, keys, first_row, tile_start, True), scores_TS, MASKED)
        weights_TS = jnp.exp2(scores_TS - _rows(lse_T, S))
        slopes_TS = weights_TS * (_product_transposed(how, my_grad, v_s.at[slot], (_ROWS, S)) - _rows(mean_T, S))
        acc_TH = _add_product(how, acc_TH, slopes_TS.astype(dtype), k_s.at[slot])
        plgpu.barrier_arrive(free.at[slot])
        return acc_TH

      acc_TH = _walk(block, step, _zeros((_ROWS, H)))
      mine[...] = (acc_TH * H ** -0.5).astype(dtype)
      plgpu.commit_smem()
      write = functools.partial(plgpu.copy_smem_to_gmem, mine)
      piece = lambda rows: write(pieces[0].at[block.nth, rows, block.head])
      block.write(lambda: write(dq.at[block.row, own_rows, block.head]), piece if pieces else None)
      plgpu.wait_smem_to_gmem(0)

    @pl.when(block.warpgroup == _COMPUTE)
    def _():
      def copies(n, slot):
        at = block.key_tile(n, S, share)
        return [[(k.at[at], k_s.at[slot]), (v.at[at], v_s.at[slot])]]
      _stream(how, block.total, stages, copies, (ready,), (free,))

  own, streamed = _tile_memory(_COMPUTE, _ROWS, H, dtype), _tile_memory(stages, S, H, dtype)
  scratch = [own, own, streamed, streamed, _barriers(2, _COMPUTE), _barriers(2, stages), _barriers(_COMPUTE, stages)]
  inputs = lists.first_query, q_BTNH, k_BSKH, v_BSKH, grad_BTNH, lse_BNT, mean_BNT, *marks
  outputs = [jax.ShapeDtypeStruct(q_BTNH.shape, dtype)] + ([_piece_shape(how, q_BTNH)] if how.cut.spare else [])
  dq_BTNH, *pieces = _call(how, kernel, 'block_attention_dq', outputs, inputs, lists.dq, N, scratch, how.cut)
  if pieces:
    tiles, owners = _own_tiles(how, lists.dq, dq_BTNH)
    whole = pieces[0].reshape(how.cut.owners, how.cut.pieces, *tiles.shape[1:]).sum(axis=1, dtype=jnp.float32)
    dq_BTNH = tiles.at[owners].set(whole.astype(dtype)).reshape(dq_BTNH.shape)
  return dq_BTNH


def _dkv(how, q_BTNH, k_BSKH, v_BSKH, marks, lists, lse_BNT, mean_BNT, grad_BTNH):
  """Scores are keys by queries here, so that both sums over queries have their left side in registers."""
  N, H = q_BTNH.shape[2:]
  S, K = k_BSKH.shape[1:3]
  dtype, Q = q_BTNH.dtype, _ROWS
  share = N // K
  stages, scale = 2, H ** -0.5 * math.log2(math.e)

  def kernel(lists, first_query, q, k, v, grad, lse, mean, q_marks, k_marks, outputs, k_s, v_s, q_s, grad_s, lse_s, mean_s,
             marks_s, own_ready, ready, free):
    block = _Block(lists, S // (_COMPUTE * _ROWS), schedule.Cut())
    dk, dv = outputs
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
      first_row = start - first_query[0]   # counted from the first query
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
          scores_TS = jnp.where(_allowed(own_marks, queries, first_row, tile_start, False), scores_TS, MASKED)
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
  inputs = lists.first_query, q_BTNH, k_BSKH, v_BSKH, grad_BTNH, lse_BNT, mean_BNT, *marks
  return _call(how, kernel, 'block_attention_dkv', [jax.ShapeDtypeStruct(k_BSKH.shape, dtype)] * 2, inputs, lists.dkv, K,
               scratch, schedule.Cut())


def _backward(how, saved, grads):
  *inputs, out_BTNH, lse_BNT = saved
  grad_BTNH, grad_lse_BTN = grads
  # sum over the keys of weight * d loss / d weight: what the derivative of the softmax subtracts; that of the logsumexp
  # adds weight * d loss / d logsumexp
  mean_BNT = jnp.einsum('btnh,btnh->bnt', out_BTNH.astype(jnp.float32), grad_BTNH.astype(jnp.float32))
  mean_BNT -= grad_lse_BTN.swapaxes(1, 2)
  dk, dv = _dkv(how, *inputs, lse_BNT, mean_BNT, grad_BTNH)
  return _dq(how, *inputs, lse_BNT, mean_BNT, grad_BTNH), dk, dv, None, None


_attention.defvjp(_forward, _backward)
