"""What block attention is: dense, float32, quadratic in memory. Every other implementation is tested against it."""

import jax
import jax.numpy as jnp
from jax import lax

from blockattn import blocks

MASKED = -1e30   # finite, so that a row without any visible key makes no NaN


def precision(dtype):
  """Of matrix products of `dtype`, for every implementation: matrix units round float32 to bfloat16 or TF32 if nobody asks
  for more, and in the scores that costs the more the larger they are."""
  return lax.Precision.HIGHEST if dtype == jnp.float32 else None


def attention(q_BTNH, k_BSKH, v_BSKH, layout: blocks.BlockLayout):
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
