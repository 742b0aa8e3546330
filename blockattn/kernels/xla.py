"""Block attention in plain XLA: a loop over query tiles, and for each a loop over the key tiles that it has to visit.

The number of visits is known at run time only, so the cost follows the layout while one compiled program serves all
layouts. Memory is O(T * tile): the backward pass computes the scores again from the saved logsumexp.

Axis names in this file beside the project's: I step (a batch row and a query tile), M the queries of a tile times the
query heads of one key/value head. S stands for the keys of one tile where the axis B is absent.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from blockattn.kernels import schedule
from blockattn.kernels.reference import MASKED, kept, mean_slope, precision
from blockattn.kernels.tiles import Tiles

Array = jax.Array


@flax.struct.dataclass
class Visits:
  """For each tile of one side the tiles of the other side to visit, in ascending order.

  Attributes:
    index: int32 [B, n, m], the tiles to visit first; what follows the first `count` entries is not to be read.
    count: int32 [B, n].
  """
  index: Array
  count: Array


@flax.struct.dataclass
class Schedule:
  """Visits to tiles that need the mask (`partial`) and to tiles in which every pair is allowed (`full`)."""
  partial: Visits
  full: Visits


def attention(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, marks: schedule.Marks, tiles: Tiles
              ) -> tuple[Array, Array]:
  """Softmax attention over the keys that the marks allow.

  Args:
    q_BTNH, k_BSKH, v_BSKH: as `api.block_attention` takes them, already checked, but for T, which may differ from S.
    marks: schedule.Marks of T queries and S keys.
    tiles: tile sizes; cut down to T where they are larger. Of a part of a row T and its first query must be multiples of
      the query tile, and S of the key tile.

  Returns:
    ([B, T, N, H] in q's dtype, the logsumexp of each query's scores, float32 [B, T, N]); both are zero for a query that
    sees no key.
  """
  T = q_BTNH.shape[1]
  tiles = schedule.clamp_tiles(tiles, T)
  *arrays, marks = schedule.whole_tiles(q_BTNH, k_BSKH, v_BSKH, marks, tiles)
  visits = list_visits(*schedule.tile_masks(marks, tiles))
  out, lse = _attention(tiles, *arrays, (marks.query, marks.key), visits, schedule.first_query(marks))
  return out[:, :T], lse[:, :T]


def list_visits(touched: Array, full: Array) -> Schedule:
  """For each query tile the key tiles to visit, from the masks of `tile_masks`.

  For the opposite, the query tiles that visit a key tile, swap the last two axes of both masks.
  """
  return Schedule(partial=_compact(touched & ~full), full=_compact(full))


def _compact(mask):
  index = jnp.argsort(~mask, axis=-1, stable=True).astype(jnp.int32)
  return Visits(index=index, count=mask.sum(axis=-1, dtype=jnp.int32))


def _primal(tiles, q_BTNH, k_BSKH, v_BSKH, marks, visits, first_query) -> tuple[Array, Array]:
  return _forward(tiles, q_BTNH, k_BSKH, v_BSKH, marks, visits, first_query)[0]


_attention = jax.custom_vjp(_primal, nondiff_argnums=(0,))


def _dot(x, y, contract_x, contract_y):
  """Batched over the leading axis (K), one axis of each summed over in float32."""
  return lax.dot_general(x, y, (((contract_x,), (contract_y,)), ((0,), (0,))), precision=precision(x.dtype),
                         preferred_element_type=jnp.float32)


def _query_tiles(x_BTN, heads, tile):
  """[B, T, N, ..] -> [I, K, M, ..]."""
  B, T, N, *rest = x_BTN.shape
  x = x_BTN.reshape(B, T // tile, tile, heads, N // heads, *rest)
  return jnp.moveaxis(x, 2, 4).reshape(-1, heads, (N // heads) * tile, *rest)


def _from_query_tiles(x_IKMH, length, tile):
  """[I, K, M, H] -> [B, T, N, H]."""
  _, K, M, H = x_IKMH.shape
  x = jnp.moveaxis(x_IKMH.reshape(-1, length // tile, K, M // tile, tile, H), 4, 2)
  return x.reshape(-1, length, K * (M // tile), H)


def _steps(tiles, marks, visits, first_query):
  """(row, first query, query marks, visits) of every step: a pytree with a leading axis I."""
  B, _, T = marks[0].shape
  n = T // tiles.query
  query_marks = marks[0].reshape(B, schedule.MARKS, n, tiles.query, 1).swapaxes(1, 2)
  flat = lambda x: x.reshape(B * n, *x.shape[2:])
  step = jnp.arange(B * n)
  return step // n, first_query + step % n * tiles.query, flat(query_marks), jax.tree.map(flat, visits)


def _keys(x_BKSH, row, start, tiles):
  """The key tile at `start` of batch row `row`: [K, S, H]."""
  _, K, _, H = x_BKSH.shape
  return lax.dynamic_slice(x_BKSH, (row, 0, start, 0), (1, K, tiles.key, H))[0]


def _key_marks(marks, row, start, tiles):
  return lax.dynamic_slice(marks[1], (row, 0, start), (1, schedule.MARKS, tiles.key))[0, :, None]


def _add_keys(x_BKHS, update_KHS, row, start):
  """Adds to the key tile at `start` of batch row `row`."""
  old = lax.dynamic_slice(x_BKHS, (row, 0, 0, start), (1, *update_KHS.shape))
  return lax.dynamic_update_slice(x_BKHS, old + update_KHS[None], (row, 0, 0, start))


def _visit(body, visits, carry):
  """Runs `body(masked, tile, carry)` over the tiles to visit: those that need the mask, then those that do not."""
  loops = [(True, visits.partial), (False, visits.full)]
  if visits.full.index.shape[-1] == 1:
    # A row of one key tile has no full tile worth a loop, and XLA would hoist both bodies out of their loops.
    loops = [(True, Visits(visits.full.index, visits.partial.count + visits.full.count))]
  for masked, listed in loops:
    carry = lax.fori_loop(0, listed.count, lambda n, c, m=masked, v=listed: body(m, v.index[n], c), carry)
  return carry


def _scores(tiles, q_KMH, k_KSH, mask):
  """Scaled scores [K, M, S] of a tile, in float32; `mask` is None or the arguments of `schedule.pair_mask`."""
  scores_KMS = _dot(q_KMH, k_KSH, 2, 2) * q_KMH.shape[-1] ** -0.5
  if mask is None:
    return scores_KMS
  allowed = jnp.tile(schedule.pair_mask(*mask), (q_KMH.shape[1] // tiles.query, 1))
  return jnp.where(allowed[None], scores_KMS, MASKED)


def _forward(tiles, q_BTNH, k_BSKH, v_BSKH, marks, visits, first_query):
  T = q_BTNH.shape[1]
  H = q_BTNH.shape[3]
  k_BKSH, v_BKSH = k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2)

  def query_tile(_, inputs):
    q_KMH, (row, query_start, query_marks, listed) = inputs

    def key_tile(masked, j, carry):
      acc_KMH, peak_KM, total_KM = carry
      start = j * tiles.key
      mask = (query_marks, _key_marks(marks, row, start, tiles), query_start, start) if masked else None
      scores_KMS = _scores(tiles, q_KMH, _keys(k_BKSH, row, start, tiles), mask)
      new_peak = jnp.maximum(peak_KM, scores_KMS.max(axis=-1))
      weights = jnp.exp(scores_KMS - new_peak[..., None])
      decay = jnp.exp(peak_KM - new_peak)
      update = _dot(weights.astype(v_BKSH.dtype), _keys(v_BKSH, row, start, tiles), 2, 1)
      return acc_KMH * decay[..., None] + update, new_peak, total_KM * decay + weights.sum(axis=-1)

    per_query = q_KMH.shape[:2]
    carry = (jnp.zeros((*per_query, H), jnp.float32), jnp.full(per_query, MASKED, jnp.float32),
             jnp.zeros(per_query, jnp.float32))
    acc, peak, total = _visit(key_tile, listed, carry)
    seen = peak > MASKED / 2
    total = jnp.where(seen, total, 1)
    out = jnp.where(seen[..., None], acc / total[..., None], 0).astype(q_BTNH.dtype)
    return None, (out, jnp.where(seen, peak + jnp.log(total), 0))

  q_IKMH = _query_tiles(q_BTNH, k_BSKH.shape[2], tiles.query)
  _, (out, logsumexp) = lax.scan(query_tile, None, (q_IKMH, _steps(tiles, marks, visits, first_query)))
  out_BTNH, logsumexp = kept(_from_query_tiles(out, T, tiles.query), logsumexp)
  lse_BTN = _from_query_tiles(logsumexp[..., None], T, tiles.query)[..., 0]
  return (out_BTNH, lse_BTN), (q_BTNH, k_BSKH, v_BSKH, marks, visits, first_query, out_BTNH, logsumexp)


def _backward(tiles, saved, grads):
  """One pass over the same visits. Gradients of keys and values are summed transposed, [B, K, H, S]: as a matmul with
  the small side transposed they cost XLA's CPU backend half of what the direct form costs."""
  q_BTNH, k_BSKH, v_BSKH, marks, visits, first_query, out_BTNH, logsumexp = saved
  grad_BTNH, grad_lse_BTN = grads
  T, H = q_BTNH.shape[1], q_BTNH.shape[3]
  B, S, K, _ = k_BSKH.shape
  k_BKSH, v_BKSH = k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2)
  by_tile = functools.partial(_query_tiles, heads=K, tile=tiles.query)
  mean = mean_slope(out_BTNH, grad_BTNH, grad_lse_BTN)

  def query_tile(carry, inputs):
    q_KMH, grad_KMH, lse_KM, mean_KM, (row, query_start, query_marks, listed) = inputs
    dtype = q_KMH.dtype

    def key_tile(masked, j, carry):
      dq_KMH, dk_BKHS, dv_BKHS = carry
      start = j * tiles.key
      mask = (query_marks, _key_marks(marks, row, start, tiles), query_start, start) if masked else None
      k_KSH, v_KSH = _keys(k_BKSH, row, start, tiles), _keys(v_BKSH, row, start, tiles)
      weights_KMS = jnp.exp(_scores(tiles, q_KMH, k_KSH, mask) - lse_KM[..., None])
      dscores_KMS = (weights_KMS * (_dot(grad_KMH, v_KSH, 2, 2) - mean_KM[..., None])).astype(dtype)
      dk_BKHS = _add_keys(dk_BKHS, _dot(q_KMH, dscores_KMS, 1, 1), row, start)
      dv_BKHS = _add_keys(dv_BKHS, _dot(grad_KMH, weights_KMS.astype(dtype), 1, 1), row, start)
      return dq_KMH + _dot(dscores_KMS, k_KSH, 2, 1), dk_BKHS, dv_BKHS

    dq, *carry = _visit(key_tile, listed, (jnp.zeros(q_KMH.shape, jnp.float32), *carry))
    return tuple(carry), (dq * H ** -0.5).astype(dtype)

  zeros = jnp.zeros((B, K, H, S), jnp.float32)
  inputs = (by_tile(q_BTNH), by_tile(grad_BTNH), logsumexp, by_tile(mean), _steps(tiles, marks, visits, first_query))
  (dk, dv), dq = lax.scan(query_tile, (zeros, zeros), inputs)
  dk, dv = (jnp.moveaxis(x, 3, 1).astype(q_BTNH.dtype) for x in (dk * H ** -0.5, dv))
  return _from_query_tiles(dq, T, tiles.query), dk, dv, None, None, None


_attention.defvjp(_forward, _backward)
