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
_CHUNK = 1024      # slots of the cache whose scores exist at a time, at least
_SCORES = 1 << 16  # of a head and row that may exist at a time: a token that is read alone reads them in one piece


@jax.jit
def attend_cached(q_BTNH: Array, k_BKHS: Array, v_BKSH: Array, visible_BS: Array,
                  below: tuple[Array, Array] | None = None) -> tuple[Array, Array]:
  """Softmax attention of every query to all visible keys, chunk after chunk: memory is O(T), whatever S.

  Args:
    q_BTNH: queries. Query head n reads key/value head n // (N / K). The scale H ** -0.5 is applied inside.
    k_BKHS, v_BKSH: the cache, in the order in which the products read it.
    visible_BS: bool, the slots of the cache that the queries of a row may read.
    below: (number_BS, reads_BT), int32, where not all queries read as much: of these slots query t reads those of numbers
      below reads_BT[:, t].

  Returns:
    (out_BTNH, lse_BTN), float32. A row without a visible key has output 0 and logsumexp -inf.

  Raises:
    ValueError: shapes do not fit together.
  """
  B, T, N, H = q_BTNH.shape
  K, S = v_BKSH.shape[1:3]
  if k_BKHS.shape != (B, K, H, S) or v_BKSH.shape != (B, K, S, H) or visible_BS.shape != (B, S) or K == 0 or N % K:
    raise UserError(f'q {q_BTNH.shape}, k {k_BKHS.shape}, v {v_BKSH.shape}, visible {visible_BS.shape}: they must be '
                    '[B, T, N, H], [B, K, H, S], [B, K, S, H] and [B, S], N a multiple of K')
  G, chunk = N // K, min(S, max(_CHUNK, _SCORES // T))
  # M: the queries, each with the heads that share a key/value head.
  q_BKMH = q_BTNH.reshape(B, T, K, G, H).swapaxes(1, 2).reshape(B, K, T * G, H)
  whole = lambda x, axis: jnp.pad(x, [(0, -S % chunk if at == axis else 0) for at in range(x.ndim)])
  k_BKHS, v_BKSH, visible_BS = whole(k_BKHS, 3), whole(v_BKSH, 2), whole(visible_BS, 1)
  dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32, precision=precision(q_BKMH.dtype))

  def step(carry, start):
    acc, peak, total = carry
    part = lambda x, axis: x if chunk == S else lax.dynamic_slice_in_dim(x, start, chunk, axis)
    v, seen_B1S = part(v_BKSH, 2), part(visible_BS, 1)[:, None]
    if below is not None:
      number_BS, reads_BT = below
      seen_B1S = jnp.repeat(seen_B1S & (part(whole(number_BS, 1), 1)[:, None] < reads_BT[..., None]), G, axis=1)
    scores = dot('bkmh,bkhs->bkms', q_BKMH, part(k_BKHS, 3)) * H ** -0.5
    scores = jnp.where(seen_B1S[:, None], scores, MASKED)
    new_peak = jnp.maximum(peak, scores.max(axis=-1))
    decay, weights = jnp.exp(peak - new_peak), jnp.exp(scores - new_peak[..., None])
    update = dot('bkms,bksh->bkmh', weights.astype(v.dtype), v)
    return (acc * decay[..., None] + update, new_peak, total * decay + weights.sum(axis=-1)), None

  per_query = q_BKMH.shape[:-1]
  start = jnp.zeros(q_BKMH.shape, jnp.float32), jnp.full(per_query, MASKED, jnp.float32), jnp.zeros(per_query, jnp.float32)
  (acc, peak, total), _ = lax.scan(step, start, jnp.arange(0, S, chunk))
  seen = peak > MASKED / 2
  total = jnp.where(seen, total, 1)
  out = jnp.where(seen[..., None], acc / total[..., None], 0)
  lse = jnp.where(seen, peak + jnp.log(total), -jnp.inf)
  by_query = lambda x: x.reshape(B, K, T, G, *x.shape[3:]).swapaxes(1, 2).reshape(B, T, N, *x.shape[3:])
  return by_query(out), by_query(lse)


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
