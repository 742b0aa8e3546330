"""Attention to keys that are cached, and the merging of attention over parts of the keys.

The tokens of a prompt's last block, one or some hundreds at a time, read everything that was cached before them. Attention
to cached blocks and attention within the last block (`api.block_attention_and_lse`) give their outputs with the logsumexp
of their scores; `merge` puts them together.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from blockattn.errors import UserError
from blockattn.kernels.reference import MASKED, precision

Array = jax.Array
Read = Callable[[Array, int], tuple[Array, Array]]   # (first slot, slots) -> (k, v), each [B, slots, K, H]
_SCORES = 1 << 18   # of a tile, over all heads and queries: what a core's own memory holds
_LEAST, _MOST = 8, 10   # powers of two, of a tile's slots


def attend_cached(q_BTNH: Array, read: Read, visible_BS: Array, below: tuple[Array, Array] | None = None
                  ) -> tuple[Array, Array]:
  """Softmax attention of every query to all visible keys, tile after tile up to the last one that is visible in any row:
  memory is O(T), whatever S, and time follows what is cached, not the room for it.

  The query heads of one key/value head and all queries are the columns of one product per tile. Keys are its rows, so that
  maxima and sums run over rows, which vectorises on every platform.

  Args:
    q_BTNH: queries. Query head n reads key/value head n // (N / K). The scale H ** -0.5 is applied inside.
    read: the keys and values of some slots of the cache, wherever they stand; see `slots_of`. Their number is a power of two
      from 256 on, or S.
    visible_BS: bool, the slots of the cache that the queries of a row may read.
    below: (number_BS, reads_BT), int32, where not all queries read as much: of these slots query t reads those of numbers
      below reads_BT[:, t].

  Returns:
    (out_BTNH, lse_BTN), float32. A row without a visible key has output 0 and logsumexp -inf.

  Raises:
    ValueError: shapes do not fit together.
  """
  B, T, N, H = q_BTNH.shape
  S = visible_BS.shape[1]
  size = min(S, 1 << max(_LEAST, min(_MOST, (_SCORES // (T * N)).bit_length() - 1)))
  k_shape, v_shape = (x.shape for x in jax.eval_shape(lambda: read(jnp.int32(0), size)))
  K = k_shape[2]
  if k_shape != (B, size, K, H) or v_shape != k_shape or visible_BS.shape != (B, S) or K == 0 or N % K:
    raise UserError(f'q {q_BTNH.shape}, k {k_shape}, v {v_shape}, visible {visible_BS.shape}: they must be '
                    f'[B, T, N, H], [B, {size}, K, H] twice and [B, S], N a multiple of K')
  q_BKHM = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 4, 3, 1).reshape(B, K, H, -1)
  dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32, precision=precision(q_BTNH.dtype))

  def tile(j, carry):
    acc_BKHM, peak_BKM, total_BKM = carry
    start = jnp.minimum(j * size, S - size)   # the last tile overlaps the one before it
    own = functools.partial(lax.dynamic_slice_in_dim, start_index=start, slice_size=size, axis=1)
    k_BSKH, v_BSKH = read(start, size)
    seen_BSM = (own(visible_BS) & (start + jnp.arange(size) >= j * size))[..., None]
    if below is not None:
      seen_BSM = jnp.tile(seen_BSM & (own(below[0])[..., None] < below[1][:, None]), (1, 1, N // K))
    scores_BKSM = dot('bskh,bkhm->bksm', k_BSKH, q_BKHM) * H ** -0.5
    scores_BKSM = jnp.where(seen_BSM[:, None], scores_BKSM, MASKED)
    new_peak = jnp.maximum(peak_BKM, scores_BKSM.max(axis=2))
    decay, weights_BKSM = jnp.exp(peak_BKM - new_peak), jnp.exp(scores_BKSM - new_peak[:, :, None])
    update = dot('bskh,bksm->bkhm', v_BSKH, weights_BKSM.astype(v_BSKH.dtype))
    return acc_BKHM * decay[:, :, None] + update, new_peak, total_BKM * decay + weights_BKSM.sum(axis=2)

  per_query = q_BKHM.shape[:2] + q_BKHM.shape[3:]
  start = jnp.zeros(q_BKHM.shape, jnp.float32), jnp.full(per_query, MASKED, jnp.float32), jnp.zeros(per_query, jnp.float32)
  used = jnp.max(jnp.where(visible_BS, jnp.arange(S) + 1, 0))
  acc, peak, total = lax.fori_loop(0, (used + size - 1) // size, tile, start)
  seen = peak > MASKED / 2
  total = jnp.where(seen, total, 1)
  out = jnp.where(seen[:, :, None], acc / total[:, :, None], 0)
  lse = jnp.where(seen, peak + jnp.log(total), -jnp.inf)
  by_token = lambda x: x.reshape(B, K, -1, N // K, T).transpose(0, 4, 1, 3, 2).reshape(B, T, N, -1)
  return by_token(out), by_token(lse)[..., 0]


def slots_of(k_BSKH: Array, v_BSKH: Array) -> Read:
  """Of a cache that is two arrays, keys rotated."""
  part = functools.partial(lax.dynamic_slice_in_dim, axis=1)
  return lambda start, size: (part(k_BSKH, start, size), part(v_BSKH, start, size))


def merge(out_PBTNH: Array, lse_PBTN: Array) -> tuple[Array, Array]:
  """Attention over all keys from P attentions over parts of them, disjoint.

  Args:
    out_PBTNH: what the parts give.
    lse_PBTN: the logsumexp of each part's scores, -inf for a part without a key.

  Returns:
    (out_BTNH, lse_BTN), float32.
  """
  peak = lse_PBTN.max(axis=0)
  out, total = _weighted(out_PBTNH, lse_PBTN, peak)
  total = jnp.where(total > 0, total, 1)
  return out / total[..., None], peak + jnp.log(total)


def merge_over(axes: str | tuple[str, ...], out_PBTNH: Array, lse_PBTN: Array) -> Array:
  """out_BTNH of `merge` over the parts of all devices of these mesh axes, each of which has some; inside a shard_map."""
  peak = lax.pmax(lax.stop_gradient(lse_PBTN).max(axis=0), axes)
  out, total = lax.psum(_weighted(out_PBTNH, lse_PBTN, peak), axes)
  return out / jnp.where(total > 0, total, 1)[..., None]


def _weighted(out_PBTNH, lse_PBTN, peak_BTN):
  """Sums of the parts by their weights, and of the weights; both zero where no part has a key."""
  weights = jnp.exp(lse_PBTN - jnp.where(jnp.isfinite(peak_BTN), peak_BTN, 0))
  out = out_PBTNH.astype(jnp.float32)
  return jnp.einsum('pbtn,pbtnh->btnh', weights, out, precision=precision(out.dtype)), weights.sum(axis=0)
