"""Attention to keys that are cached, and the merging of attention over parts of the keys.

The tokens of a prompt's last block, one or some hundreds at a time, read everything that was cached before them. The keys
are many and the queries few, so the keys are cut in splits that can be computed at the same time (split-K); each gives its
output with the logsumexp of its scores, and `merge` puts them together. Merging the same way, attention to cached blocks
and attention within the last block (`api.block_attention_and_lse`) make up the whole.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from blockattn.errors import UserError
from blockattn.kernels.reference import MASKED, precision


@functools.partial(jax.jit, static_argnames=('splits', 'chunk'))
def attend_cached(q_BTNH, k_BSKH, v_BSKH, visible_BS, *, splits: int = 1, chunk: int = 1024):
  """Softmax attention of every query to all visible keys.

  Args:
    q_BTNH: queries. Query head n reads key/value head n // (N / K). The scale H ** -0.5 is applied inside.
    k_BSKH, v_BSKH: the cache.
    visible_BS: bool, the slots of the cache that the queries of a row may read.
    splits: parts of the cache that are computed side by side; 1 where a device has one core.
    chunk: slots whose scores exist at a time, per split; memory is O(T * chunk * splits).

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
  chunk = min(chunk, -(-S // splits))
  pad = -S % (splits * chunk)
  cut = lambda x: jnp.moveaxis(jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2)).reshape(
      B, splits, -1, chunk, *x.shape[2:]), (1, 2), (0, 1))
  q = q_BTNH.reshape(B, T, K, N // K, H)
  out, lse = jax.vmap(functools.partial(_attend_split, q))((cut(k_BSKH), cut(v_BSKH), cut(visible_BS)))
  return merge(out.reshape(splits, B, T, N, H), lse.reshape(splits, B, T, N))


def _attend_split(q_BTKGH, chunks):
  """One split, chunk after chunk: (out [B, T, K, G, H], lse [B, T, K, G])."""
  dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32, precision=precision(q_BTKGH.dtype))

  def step(carry, chunk):
    acc, peak, total = carry
    k_BSKH, v_BSKH, visible_BS = chunk
    scores = dot('btkgh,bskh->btkgs', q_BTKGH, k_BSKH) * q_BTKGH.shape[-1] ** -0.5
    scores = jnp.where(visible_BS[:, None, None, None], scores, MASKED)
    new_peak = jnp.maximum(peak, scores.max(axis=-1))
    # A query that has seen nothing so far has peak MASKED and weights of 1; its first real key makes `decay` zero.
    decay, weights = jnp.exp(peak - new_peak), jnp.exp(scores - new_peak[..., None])
    update = dot('btkgs,bskh->btkgh', weights.astype(v_BSKH.dtype), v_BSKH)
    return (acc * decay[..., None] + update, new_peak, total * decay + weights.sum(axis=-1)), None

  per_query = q_BTKGH.shape[:-1]
  start = jnp.zeros(q_BTKGH.shape, jnp.float32), jnp.full(per_query, MASKED, jnp.float32), jnp.zeros(per_query, jnp.float32)
  (acc, peak, total), _ = lax.scan(step, start, chunks)
  seen = peak > MASKED / 2
  total = jnp.where(seen, total, 1)
  return jnp.where(seen[..., None], acc / total[..., None], 0), jnp.where(seen, peak + jnp.log(total), -jnp.inf)


def merge(out_PBTNH, lse_PBTN):
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


def merge_over(axes, out_PBTNH, lse_PBTN):
  """out_BTNH of `merge` over the parts of all devices of these mesh axes, each of which has some; inside a shard_map."""
  peak = lax.pmax(lax.stop_gradient(lse_PBTN).max(axis=0), axes)
  out, total = lax.psum(_weighted(out_PBTNH, lse_PBTN, peak), axes)
  return out / jnp.where(total > 0, total, 1)[..., None]


def _weighted(out_PBTNH, lse_PBTN, peak_BTN):
  """Sums of the parts by their weights, and of the weights; both zero where no part has a key."""
  weights = jnp.exp(lse_PBTN - jnp.where(jnp.isfinite(peak_BTN), peak_BTN, 0))
  out = out_PBTNH.astype(jnp.float32)
  return jnp.einsum('pbtn,pbtnh->btnh', weights, out, precision=precision(out.dtype)), weights.sum(axis=0)
