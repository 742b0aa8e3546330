"""Attention to keys that are cached, and the merging of attention over parts of the keys.

The tokens of a prompt's last block, one or some hundreds at a time, read everything that was cached before them. Attention
to cached blocks and attention within the last block (`api.block_attention_and_lse`) give their outputs with the logsumexp
of their scores; `merge` puts them together.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from blockattn.errors import UserError
from blockattn.kernels.reference import MASKED, precision

Array = jax.Array
_CHUNK = 1024   # slots of the cache whose scores exist at a time


@jax.jit
def attend_cached(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, visible_BS: Array,
                  below: tuple[Array, Array] | None = None) -> tuple[Array, Array]:
  """Softmax attention of every query to all visible keys, chunk after chunk: memory is O(T), whatever S.

  Args:
    q_BTNH: queries. Query head n reads key/value head n // (N / K). The scale H ** -0.5 is applied inside.
    k_BSKH, v_BSKH: the cache.
    visible_BS: bool, the slots of the cache that the queries of a row may read.
    below: (number_BS, reads_BT), int32, where not all queries read as much: of these slots query t reads those of numbers
      below reads_BT[:, t].

  Returns:
    (out_BTNH, lse_BTN), float32. A row without a visible key has output 0 and logsumexp -inf.

  Raises:
    ValueError: shapes do not fit together.
  """
  B, T, N, H = q_BTNH.shape
  S, K = k_BSKH.shape[1:3]
  if k_BSKH.shape != (B, S, K, H) or v_BSKH.shape != k_BSKH.shape or visible_BS.shape != (B, S) or K == 0 or N % K:
    raise UserError(f'q {q_BTNH.shape}, k {k_BSKH.shape}, v {v_BSKH.shape}, visible {visible_BS.shape}: they must be '
                    '[B, T, N, H], [B, S, K, H] twice and [B, S], N a multiple of K')
  chunk = min(_CHUNK, S)
  chunks = lambda x: jnp.pad(x, [(0, 0), (0, -S % chunk)] + [(0, 0)] * (x.ndim - 2)).reshape(
      B, -1, chunk, *x.shape[2:]).swapaxes(0, 1)
  q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
  number_BS, reads_BT = below or (None, None)
  dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32, precision=precision(q_BTKGH.dtype))

  def step(carry, chunk):
    acc, peak, total = carry
    k_BSKH, v_BSKH, visible_BS, number_BS = chunk
    scores = dot('btkgh,bskh->btkgs', q_BTKGH, k_BSKH) * H ** -0.5
    seen = visible_BS[:, None, None, None]
    if number_BS is not None and reads_BT is not None:
      seen = seen & (number_BS[:, None, None, None] < reads_BT[:, :, None, None, None])
    scores = jnp.where(seen, scores, MASKED)
    new_peak = jnp.maximum(peak, scores.max(axis=-1))
    decay, weights = jnp.exp(peak - new_peak), jnp.exp(scores - new_peak[..., None])
    update = dot('btkgs,bskh->btkgh', weights.astype(v_BSKH.dtype), v_BSKH)
    return (acc * decay[..., None] + update, new_peak, total * decay + weights.sum(axis=-1)), None

  per_query = q_BTKGH.shape[:-1]
  start = jnp.zeros(q_BTKGH.shape, jnp.float32), jnp.full(per_query, MASKED, jnp.float32), jnp.zeros(per_query, jnp.float32)
  (acc, peak, total), _ = lax.scan(step, start, jax.tree.map(chunks, (k_BSKH, v_BSKH, visible_BS, number_BS)))
  seen = peak > MASKED / 2
  total = jnp.where(seen, total, 1)
  out = jnp.where(seen[..., None], acc / total[..., None], 0)
  lse = jnp.where(seen, peak + jnp.log(total), -jnp.inf)
  return out.reshape(B, T, N, H), lse.reshape(B, T, N)


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
