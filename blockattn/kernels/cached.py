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
Read = Callable[[Array | int, int], tuple[Array, Array]]   # (first slot, slots) -> (k_BKHS, v_BKSH)


def attend_cached(q_BTNH: Array, read: Read, visible_BS: Array, below: tuple[Array, Array] | None = None, *, tile: int = 256
                  ) -> tuple[Array, Array]:
  """Softmax attention of every query to all visible keys, tile after tile up to the last one that is visible in any row:
  memory is O(T), whatever S, and time follows what is cached, not the room for it.

  Args:
    q_BTNH: queries. Query head n reads key/value head n // (N / K). The scale H ** -0.5 is applied inside.
    read: the keys and values of some slots of the cache, in the order in which the products read them, wherever they stand;
      see `slots_of`.
    visible_BS: bool, the slots of the cache that the queries of a row may read.
    below: (number_BS, reads_BT), int32, where not all queries read as much: of these slots query t reads those of numbers
      below reads_BT[:, t].
    tile: slots whose scores exist at a time.

  Returns:
    (out_BTNH, lse_BTN), float32. A row without a visible key has output 0 and logsumexp -inf.

  Raises:
    ValueError: shapes do not fit together.
  """
  B, T, N, H = q_BTNH.shape
  S = visible_BS.shape[1]
  size = min(S, tile)
  k_shape, v_shape = (x.shape for x in jax.eval_shape(lambda: read(0, size)))
  K = k_shape[1]
  if k_shape != (B, K, H, size) or v_shape != (B, K, size, H) or visible_BS.shape != (B, S) or K == 0 or N % K:
    raise UserError(f'q {q_BTNH.shape}, k {k_shape}, v {v_shape}, visible {visible_BS.shape}: they must be '
                    f'[B, T, N, H], [B, K, H, {size}], [B, K, {size}, H] and [B, S], N a multiple of K')
  G = N // K
  # M: the queries, each with the heads that share a key/value head.
  q_BKMH = q_BTNH.reshape(B, T, K, G, H).swapaxes(1, 2).reshape(B, K, T * G, H)
  dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32, precision=precision(q_BKMH.dtype))

  def step(j, carry):
    acc, peak, total = carry
    start = jnp.minimum(j * size, S - size)   # the last tile overlaps the one before it
    own = functools.partial(lax.dynamic_slice_in_dim, start_index=start, slice_size=size, axis=1)
    k_BKHS, v_BKSH = read(start, size)
    seen_BMS = (own(visible_BS) & (start + jnp.arange(size) >= j * size))[:, None]
    if below is not None:
      seen_BMS = jnp.repeat(seen_BMS & (own(below[0])[:, None] < below[1][..., None]), G, axis=1)
    scores = dot('bkmh,bkhs->bkms', q_BKMH, k_BKHS) * H ** -0.5
    scores = jnp.where(seen_BMS[:, None], scores, MASKED)
    new_peak = jnp.maximum(peak, scores.max(axis=-1))
    decay, weights = jnp.exp(peak - new_peak), jnp.exp(scores - new_peak[..., None])
    update = dot('bkms,bksh->bkmh', weights.astype(v_BKSH.dtype), v_BKSH)
    return acc * decay[..., None] + update, new_peak, total * decay + weights.sum(axis=-1)

  per_query = q_BKMH.shape[:-1]
  start = jnp.zeros(q_BKMH.shape, jnp.float32), jnp.full(per_query, MASKED, jnp.float32), jnp.zeros(per_query, jnp.float32)
  used = jnp.max(jnp.where(visible_BS, jnp.arange(S) + 1, 0))
  acc, peak, total = lax.fori_loop(0, (used + size - 1) // size, step, start)
  seen = peak > MASKED / 2
  total = jnp.where(seen, total, 1)
  out = jnp.where(seen[..., None], acc / total[..., None], 0)
  lse = jnp.where(seen, peak + jnp.log(total), -jnp.inf)
  by_query = lambda x: x.reshape(B, K, T, G, *x.shape[3:]).swapaxes(1, 2).reshape(B, T, N, *x.shape[3:])
  return by_query(out), by_query(lse)


def slots_of(k_LBKHS: Array, v_LBKSH: Array, layer: Array | int) -> Read:
  """Of a layer of caches that stand in the order of reading, keys rotated."""
  def read(start, size):
    k = lax.dynamic_slice(k_LBKHS, (layer, 0, 0, 0, start), (1, *k_LBKHS.shape[1:4], size))
    v = lax.dynamic_slice(v_LBKSH, (layer, 0, 0, start, 0), (1, *v_LBKSH.shape[1:3], size, v_LBKSH.shape[4]))
    return k[0], v[0]

  return read


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
