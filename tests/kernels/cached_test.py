"""Attention to cached keys against a dense computation, and merging against attention over everything at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from blockattn import blocks
from blockattn.kernels import api, cached

B, S, N, K, H = 2, 37, 4, 2, 8
several = settings(max_examples=15, deadline=None, derandomize=True, database=None)


def arrays(queries, dtype='float32', keys=S):
  random = np.random.default_rng(3)
  shapes = [(B, queries, N, H), (B, keys, K, H), (B, keys, K, H)]
  return [jnp.asarray(random.normal(size=shape), dtype) for shape in shapes]


@jax.jit
def attend(q, k, v, *more):
  """Of keys and values in the order of all other attention."""
  return cached.attend_cached(q, cached.slots_of(k.transpose(0, 2, 3, 1)[None], v.swapaxes(1, 2)[None], 0), *more)


def dense(q, k, v, visible):
  """(output, logsumexp) in float64."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  k, v = (np.repeat(x, N // K, axis=2) for x in (k, v))
  scores = np.einsum('btnh,bsnh->btns', q, k) * H ** -0.5
  weights = np.exp(scores) * np.asarray(visible)[:, None, None]
  total = weights.sum(axis=-1)
  with np.errstate(divide='ignore', invalid='ignore'):
    return np.nan_to_num(np.einsum('btns,bsnh->btnh', weights, v) / total[..., None]), np.log(total)


@pytest.mark.parametrize('queries, keys', [(1, S), (5, S), (1, 9000), (300, 1025)])   # one tile; some, and a part
@several
@given(seed=st.integers(0, 99), share=st.sampled_from([0.0, 0.2, 1.0]))
def test_agrees_with_a_dense_computation(queries, keys, seed, share):
  visible = np.random.default_rng(seed).random((B, keys)) < share
  q, k, v = arrays(queries, keys=keys)
  out, lse = attend(q, k, v, jnp.asarray(visible))
  assert out.dtype == lse.dtype == jnp.float32
  for result, wanted in zip((out, lse), dense(q, k, v, visible)):
    np.testing.assert_allclose(result, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize('queries, keys', [(5, S), (70, 2100)])
def test_queries_that_read_blocks_of_some_numbers_only(queries, keys):
  random = np.random.default_rng(1)
  q, k, v = arrays(queries, keys=keys)
  visible = random.random((B, keys)) < 0.8
  number, reads = random.integers(0, 4, (B, keys)), np.arange(queries)[None].repeat(B, axis=0) % 5
  out, lse = attend(q, k, v, jnp.asarray(visible), (jnp.asarray(number), jnp.asarray(reads)))
  for t in range(5):   # of those behind, nothing new
    wanted = dense(q[:, t:t + 1], k, v, visible & (number < reads[:, t:t + 1]))
    for result, own in zip((out, lse), wanted):
      np.testing.assert_allclose(result[:, t:t + 1], own, rtol=0, atol=1e-5)


def test_bfloat16_is_summed_in_float32():
  q, k, v = arrays(3, 'bfloat16')
  visible = np.ones((B, S), bool)
  out, lse = attend(q, k, v, jnp.asarray(visible))
  expected = dense(q, k, v, visible)
  np.testing.assert_allclose(out, expected[0], rtol=0, atol=float(jnp.finfo('bfloat16').eps))   # of the weights alone
  np.testing.assert_allclose(lse, expected[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize('last', [1, 7, 30])
@pytest.mark.parametrize('impl', ['reference', 'xla'])
def test_cached_blocks_and_the_last_block_make_the_whole(impl, last):
  """A prompt's last block read in two parts, as cached inference reads it, against one masked forward pass."""
  lengths = [10, 1, 37 - 11 - last, last] if last < 26 else [37 - last, last]
  _, k, v = arrays(1)
  q = arrays(S)[0]
  layout = blocks.from_lengths([[lengths]] * B, S)
  whole = api.block_attention(q, k, v, layout, impl='reference')[:, -last:]
  own = blocks.from_lengths([[[last]]] * B, last)
  tail = [x[:, -last:] for x in (q, k, v)]
  parts = [attend(tail[0], k[:, :-last], v[:, :-last], jnp.ones((B, S - last), bool)),
           api.block_attention_and_lse(*tail, own, impl=impl, tiles=(8, 8))]
  out, lse = cached.merge(*map(jnp.stack, zip(*parts)))
  np.testing.assert_allclose(out, whole, rtol=0, atol=1e-5)
  everything = dense(q[:, -1:], k, v, np.ones((B, S)))[1]   # what the last token of all reads
  np.testing.assert_allclose(lse[:, -1:], everything, rtol=0, atol=1e-5)


def test_merging_does_not_depend_on_the_order_and_survives_empty_parts():
  q, k, v = arrays(2)
  visible = np.arange(S) % 3 == np.arange(3)[:, None]
  parts = [attend(q, k, v, jnp.asarray(np.broadcast_to(x, (B, S)))) for x in (*visible, np.zeros(S, bool))]
  whole = attend(q, k, v, jnp.ones((B, S), bool))
  for order in ((0, 1, 2, 3), (3, 2, 0, 1)):
    for result, wanted in zip(cached.merge(*map(jnp.stack, zip(*(parts[i] for i in order)))), whole):
      np.testing.assert_allclose(result, wanted, rtol=0, atol=1e-5)
  nothing, lse = cached.merge(*map(jnp.stack, zip(parts[3], parts[3])))
  assert not nothing.any() and (lse == -jnp.inf).all()


def test_memory_does_not_hold_all_scores():
  shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, 256, 8, 64), (1, 16384, 2, 64), (1, 16384, 2, 64))]
  lowered = attend.lower(*shapes, jax.ShapeDtypeStruct((1, 16384), jnp.bool_))
  assert lowered.compile().memory_analysis().temp_size_in_bytes < 256 * 8 * 16384 * 4 / 2


def test_what_stands_behind_the_last_visible_key_is_not_read():
  """A cache has room for more than it holds; its time is that of what it holds."""
  q, k, v = arrays(1, keys=12288)
  visible = np.arange(12288) <= np.array([[70], [4096]])
  wrong = k.at[:, 8192:].set(np.nan)   # tiles of their own
  for result, wanted in zip(attend(q, wrong, v, jnp.asarray(visible)), dense(q, k, v, visible)):
    np.testing.assert_allclose(result, wanted, rtol=0, atol=1e-5)


def test_shapes_that_do_not_fit_are_refused():
  q, k, v = arrays(2)
  with pytest.raises(ValueError, match=r'N a multiple of K'):
    attend(q[:, :, :3], k, v, jnp.ones((B, S), bool))
  with pytest.raises(ValueError, match=r'visible \(1, 37\)'):
    attend(q, k, v, jnp.ones((1, S), bool))
