"""What block attention is: dense, float32, quadratic in memory. Every other implementation is tested against it."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from blockattn import blocks

Array = jax.Array
# The score of a pair that is not allowed; finite, so that a row without any visible key makes no NaN. In a softmax over one
# tile after the other a query that has seen nothing so far has peak MASKED and weights of 1; its first real key makes the
# decay of those sums zero.
MASKED = -1e30
KEPT = 'block_attention'   # what jax.checkpoint knows a forward pass's results by, see `kept`


def precision(dtype: jnp.dtype) -> lax.Precision | None:
  """Of matrix products of `dtype`, for every implementation: matrix units round float32 to bfloat16 or TF32 if nobody asks
  for more, and in the scores that costs the more the larger they are."""
  return lax.Precision.HIGHEST if dtype == jnp.float32 else None


def kept(out: Array, lse: Array) -> tuple[Array, Array]:
  """The results of a forward pass, under a name by which a policy of jax.checkpoint may keep them: a backward pass that has
  both, queries, keys and values computes no attention again."""
  return checkpoint_name(out, KEPT), checkpoint_name(lse, KEPT)


def mean_slope(out_XH: Array, grad_XH: Array, grad_lse_X: Array) -> Array:
  """Per query the sum over its keys of weight * d loss / d weight, which the derivative of the softmax subtracts from each
  slope; that of the logsumexp adds weight * d loss / d logsumexp."""
  return jnp.sum(out_XH.astype(jnp.float32) * grad_XH.astype(jnp.float32), axis=-1) - grad_lse_X


def attention(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, layout: blocks.BlockLayout) -> tuple[Array, Array]:
  """Softmax attention over the keys that `blocks.may_attend` allows; T == S.

  Args:
    q_BTNH: queries; query head n reads key/value head n // (N / K).
    k_BSKH, v_BSKH: keys and values.
    layout: BlockLayout of [B, T] arrays.

  Returns:
    ([B, T, N, H] in q's dtype, the logsumexp of each query's scores, float32 [B, T, N]). The output of a padding row is
    exactly zero, and so are its gradients; its logsumexp is -inf.
  """
  B, T, N, H = q_BTNH.shape
  K = k_BSKH.shape[2]
  q, k, v = (x.astype(jnp.float32) for x in (q_BTNH, k_BSKH, v_BSKH))
  q = q.reshape(B, T, K, N // K, H)
  allowed = blocks.may_attend(layout)[:, None, None]
  scores = jnp.einsum('btkgh,bskh->bkgts', q, k, precision='highest') * H ** -0.5
  scores = jnp.where(allowed, scores, MASKED)
  weights = jax.nn.softmax(scores, axis=-1)
  weights = jnp.where(allowed, weights, 0)
  out = jnp.einsum('bkgts,bskh->btkgh', weights, v, precision='highest')
  lse = jax.nn.logsumexp(scores, axis=-1, where=allowed)
  return out.reshape(B, T, N, H).astype(q_BTNH.dtype), jnp.moveaxis(lse, 3, 1).reshape(B, T, N)
