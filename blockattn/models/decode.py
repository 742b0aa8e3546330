"""Greedy decoding, one token at a time, against a dense cache of keys and values.

This is the plain way to continue a prompt that was read in one masked forward pass. It stores no blocks.
"""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from blockattn.kernels import api, append
from blockattn.models import transformer


@flax.struct.dataclass
class Cache:
  """Keys and values of every layer, and who may be read.

  Attributes:
    k, v: [L, B, S, K, H], keys rotated; S has room for the tokens to come.
    visible: bool [B, S], the keys that the next token, a token of the prompt's last block, may attend to.
    position: int32 [B], the next token's rotary position.
    used: int32, slots in use, the same for every row.
  """
  k: Any
  v: Any
  visible: Any
  position: Any
  used: Any


def prefill(params, tokens, layout, cfg, compute, room: int):
  """Reads the prompt.

  Args:
    tokens, layout: [B, T], one document per row, its last block being the prompt's; padding after it.
    room: how many tokens may follow.

  Returns:
    (x_BD, Cache): the hidden state of each row's last token, after the final norm.
  """
  attend = lambda q, k, v: api.block_attention(q, k, v, layout, impl=compute.impl, tiles=compute.tiles)
  x_BTD, (k, v) = transformer.run_layers(params, tokens, layout.position, cfg, compute, attend, keep_kv=True)
  rows, length = tokens.shape
  last = jnp.max(jnp.where(layout.doc != 0, jnp.arange(length), 0), axis=1)
  grow = lambda x: jnp.pad(x, [(0, 0), (0, 0), (0, room), (0, 0), (0, 0)])
  each = jnp.arange(rows)
  cache = Cache(k=grow(k), v=grow(v), visible=jnp.pad(_seen_by_next(layout, last), ((0, 0), (0, room))),
                position=layout.position[each, last] + 1, used=jnp.asarray(length, jnp.int32))
  return x_BTD[each, last], cache


def _seen_by_next(layout, last):
  """What one more token of the last token's block would see: bool [B, T]. The last line of `blocks.may_attend`."""
  at_last = lambda x: jnp.take_along_axis(x, last[:, None], axis=1)
  same_doc = (layout.doc == at_last(layout.doc)) & (layout.doc != 0)
  own_block = layout.block == at_last(layout.block)
  return same_doc & (own_block | layout.shared | (at_last(layout.reader) & ~layout.hidden))


def extend(params, tokens, cache: Cache, cfg, compute):
  """One more token per row.

  Args:
    tokens: int32 [B].

  Returns:
    (x_BD, Cache).
  """
  slot = cache.used
  visible = cache.visible.at[:, slot].set(True)
  angles = transformer.rotary_angles(cache.position[:, None], cfg)

  def layer(x_B1D, scanned):
    weights, k_cache, v_cache = scanned
    stored = []
    def attend(q, k, v):
      stored[:] = [k_cache.at[:, slot].set(k[:, 0]), v_cache.at[:, slot].set(v[:, 0])]
      return append.attend_cached(q, *stored, visible)[0].astype(q.dtype)
    x_B1D, _ = transformer.decoder_layer(x_B1D, transformer.cast(weights, compute), angles, cfg, compute, attend)
    return x_B1D, tuple(stored)

  x_B1D = transformer.embed(params, tokens[:, None], cfg, compute)
  x_B1D, (k, v) = jax.lax.scan(layer, x_B1D, (params['layers'], cache.k, cache.v))
  cache = Cache(k=k, v=v, visible=visible, position=cache.position + 1, used=slot + 1)
  return transformer.final_norm(params, x_B1D, cfg)[:, 0], cache


@functools.partial(jax.jit, static_argnames=('cfg', 'compute', 'length', 'vocab'))
def greedy(params, tokens, layout, *, cfg, compute, length: int, stop_id, vocab: int):
  """The most probable continuation, token by token.

  Args:
    tokens, layout: [B, T], see `prefill`.
    length: most tokens to generate.
    stop_id: the token that ends an answer.
    vocab: tokens from this id on are never produced (sinks, padding of the table).

  Returns:
    int32 [B, length]; after a row's stop_id, all stop_id.
  """
  head_VD = transformer.head_of(params, cfg)[:vocab]
  choose = lambda x: jnp.argmax(transformer.project(x, head_VD), axis=-1).astype(jnp.int32)

  def step(carry):
    token, answer, n, cache = carry
    answer = answer.at[:, n].set(token)
    x_BD, cache = extend(params, token, cache, cfg, compute)
    token = jnp.where(token == stop_id, stop_id, choose(x_BD))   # once stopped, stopped for ever
    return token, answer, n + 1, cache

  def goes_on(carry):
    token, _, n, _ = carry
    return (n < length) & jnp.any(token != stop_id)

  x_BD, cache = prefill(params, tokens, layout, cfg, compute, length)
  # A row of padding has nothing to say.
  token = jnp.where(jnp.any(layout.doc != 0, axis=1), choose(x_BD), stop_id)
  answer = jnp.full((tokens.shape[0], length), stop_id, jnp.int32)
  return jax.lax.while_loop(goes_on, step, (token, answer, jnp.int32(0), cache))[1]
