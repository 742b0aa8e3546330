"""Reading a prompt and continuing it, one token at a time, against a cache of keys and values.

A prompt is read in one masked forward pass, or, where the states of its context blocks are known already, only its last
block is, against them: a `Context`. `greedy` is the plain way to continue a prompt that was read in one masked forward
pass; it stores no blocks.
"""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from blockattn import blocks
from blockattn.kernels import api, cached
from blockattn.models import transformer, weights as weights_lib

Array = jax.Array


def bucket(n: int, least: int) -> int:
  """The smallest of least, 1.5 least, 2 least, 3 least, 4 least, ... that is not below n: few sizes, few compilations.

  `least` is a power of two.
  """
  size = least
  while size < n:
    size = max(size + 1, size * 3 // 2) if size & (size - 1) == 0 else size // 3 * 4
  return size


@flax.struct.dataclass
class Cache:
  """Keys and values of every layer, and who may be read.

  Attributes:
    k, v: [L, B, K, H, S] and [L, B, K, S, H], keys rotated; S has room for the tokens to come.
    visible: bool [B, S], the keys that the next token, a token of the prompt's last block, may attend to.
    position: int32 [B], the next token's rotary position.
    used: int32, slots in use, the same for every row.
  """
  k: Array
  v: Array
  visible: Array
  position: Array
  used: Array


@flax.struct.dataclass
class Context:
  """Keys and values that were there before the tokens that are read now; they are never written to.

  Attributes:
    k, v: [L, B, K, H, S] and [L, B, K, S, H], keys rotated.
    visible: bool [B, S], what every token of the row may attend to, or, with a number, some of them.
    number: int32 [B, S], of the prompt's block that a slot is of, where a token reads those below its own number in its
      layout (`BlockLayout.block`); None: every token reads all that is visible.
    axis: name of the mesh axis over which S is sharded, inside of a shard_map; None where it is whole.
  """
  k: Array
  v: Array
  visible: Array
  number: Array | None = None
  axis: str | None = flax.struct.field(pytree_node=False, default=None)


def read(params: Any, tokens: Array, layout: blocks.BlockLayout, cfg: transformer.ModelConfig, compute: transformer.Compute,
         context: Context | None = None) -> tuple[Array, tuple[Array, Array]]:
  """The forward pass that keeps what a cache needs.

  Args:
    tokens, layout: [B, T].
    context: what all tokens read beside what `layout` allows them.

  Returns:
    (x_BTD after the final norm, (k, v)), keys not rotated, each [L, B, T, K, H].
  """
  keep = lambda inside, *_: (inside.k, inside.v)
  if context is None:
    return transformer.apply_keeping(params, tokens, layout, cfg, compute, keep)
  below = None if context.number is None else (context.number, layout.block)

  def attend(q, k, v, *known):
    own = api.block_attention_and_lse(q, k, v, layout, impl=compute.impl, tiles=compute.tiles)
    return _beside(q, known, context, own, below)

  x_BTD = transformer.embed(params, tokens, cfg, compute)
  return transformer.run_layers(params, x_BTD, layout.position, cfg, compute, attend, keep=keep,
                                beside=(context.k, context.v))


def _beside(q, known, context, own, below=None):
  """Attention to a layer's (k, v) of the context, merged with `own`, (output, logsumexp) of attention to other keys.

  `below` as of `cached.attend_cached`; None: the queries read all that is visible, as the last block's do.
  """
  parts = jax.tree.map(lambda x: x[None], cached.attend_cached(q, *known, context.visible, below))
  if context.axis is not None:   # every device has read its own part of the context
    parts = jax.tree.map(lambda x: jax.lax.all_gather(x[0], context.axis), parts)
  every = jax.tree.map(lambda x, y: jnp.concatenate([x, y.astype(x.dtype)[None]]), parts, own)
  return cached.merge(*every)[0].astype(q.dtype)


def prefill(params: Any, tokens: Array, layout: blocks.BlockLayout, cfg: transformer.ModelConfig,
            compute: transformer.Compute, room: int, context: Context | None = None) -> tuple[Array, Cache]:
  """Reads the prompt, or of a prompt whose context blocks are known its last block, with seams and links its readers.

  Args:
    tokens, layout: [B, T], one document per row, its last block being the prompt's; padding after it.
    room: how many tokens may follow.
    context: the context blocks before these tokens, if these are the readers alone.

  Returns:
    (x_BD, Cache): the hidden state of each row's last token, after the final norm.
  """
  x_BTD, states = read(params, tokens, layout, cfg, compute, context)
  last = jnp.max(jnp.where(layout.doc != 0, jnp.arange(tokens.shape[1]), 0), axis=1)
  return start(x_BTD, states, layout, last, cfg, room)


def start(x_BTD: Array, states: tuple[Array, Array], layout: blocks.BlockLayout, last: Array, cfg: transformer.ModelConfig,
          room: int) -> tuple[Array, Cache]:
  """What a prompt is continued from, behind one of its tokens.

  Args:
    x_BTD, states: from `read`.
    last: int32 [B], the token of each row that is continued, of its last block; what stands behind it is not read.
    room: how many tokens may follow.

  Returns:
    (x_BD, Cache), see `prefill`.
  """
  rows, length = layout.doc.shape
  each, (k, v) = jnp.arange(rows), states
  grow = lambda x: jnp.pad(x, [(0, 0), (0, 0), (0, room), (0, 0), (0, 0)])
  k, v = as_read(grow(rotate_keys(k, layout.position, cfg)), grow(v))
  visible = _seen_by_next(layout, last) & (jnp.arange(length) <= last[:, None])
  cache = Cache(k=k, v=v, visible=jnp.pad(visible, ((0, 0), (0, room))),
                position=layout.position[each, last] + 1, used=jnp.asarray(length, jnp.int32))
  return x_BTD[each, last], cache


def rotate_keys(k: Array, position: Array, cfg: transformer.ModelConfig) -> Array:
  """Keys [L, B, S, K, H] rotated to their positions [B, S]."""
  angles = transformer.rotary_angles(position, cfg)
  return jax.vmap(transformer.rotate, in_axes=(0, None))(k, angles)


def as_read(k: Array, v: Array) -> tuple[Array, Array]:
  """Keys and values [L, B, S, K, H] in the order in which `cached.attend_cached` reads them."""
  return k.transpose(0, 1, 3, 4, 2), v.swapaxes(2, 3)


def _seen_by_next(layout, last):
  """What one more token of the last token's block would see: bool [B, T]."""
  return blocks.sees(jax.tree.map(lambda x: jnp.take_along_axis(x, last[:, None], axis=1), layout), layout)


def extend(params: Any, tokens: Array, cache: Cache, cfg: transformer.ModelConfig, compute: transformer.Compute,
           context: Context | None = None) -> tuple[Array, Cache]:
  """One more token per row.

  Args:
    tokens: int32 [B].
    context: what the prompt was read with.

  Returns:
    (x_BD, Cache).
  """
  slot = cache.used
  visible = cache.visible.at[:, slot].set(True)
  angles = transformer.rotary_angles(cache.position[:, None], cfg)

  def layer(x_B1D, scanned):
    weights, k_cache, v_cache, *known = scanned
    stored = []
    def attend(q, k, v):
      keys = jax.lax.dynamic_update_slice_in_dim(k_cache, k.transpose(0, 2, 3, 1), slot, axis=3)
      values = jax.lax.dynamic_update_slice_in_dim(v_cache, v.swapaxes(1, 2), slot, axis=2)
      stored.append((keys, values))
      own = cached.attend_cached(q, keys, values, visible)
      return own[0].astype(q.dtype) if context is None else _beside(q, known, context, own)
    x_B1D, _ = transformer.decoder_layer(x_B1D, weights_lib.cast(weights, compute.dtype), angles, cfg, compute, attend)
    return x_B1D, stored[0]

  x_B1D = transformer.embed(params, tokens[:, None], cfg, compute)
  scanned = (params['layers'], cache.k, cache.v) + (() if context is None else (context.k, context.v))
  x_B1D, (k, v) = jax.lax.scan(layer, x_B1D, scanned)
  cache = Cache(k=k, v=v, visible=visible, position=cache.position + 1, used=slot + 1)
  return transformer.final_norm(params, x_B1D, cfg)[:, 0], cache


@functools.partial(jax.jit, static_argnames=('cfg', 'compute', 'length', 'vocab'))
def greedy(params: Any, x_BD: Array, cache: Cache, *, cfg: transformer.ModelConfig, compute: transformer.Compute,
           length: int, stop_ids: Array, vocab: int) -> Array:
  """The most probable continuation, token by token.

  Args:
    x_BD, cache: from `prefill` or `start`, with room for `length` tokens.
    length: most tokens to generate.
    stop_ids: int32 [n], n > 0, the tokens that end an answer.
    vocab: tokens from this id on are never produced (sinks, padding of the table).

  Returns:
    int32 [B, length]; after a row's first of stop_ids, all stop_ids[0].
  """
  head_VD = jax.tree.map(lambda w: w[:vocab], transformer.head_of(params, cfg))   # Int8 is two arrays
  choose = lambda x: jnp.argmax(transformer.project(head_VD, x), axis=-1).astype(jnp.int32)
  stops = lambda token: jnp.isin(token, stop_ids)

  def step(carry):
    token, answer, n, cache = carry
    answer = answer.at[:, n].set(token)
    x_BD, cache = extend(params, token, cache, cfg, compute)
    token = jnp.where(stops(token), stop_ids[0], choose(x_BD))   # once stopped, stopped for ever
    return token, answer, n + 1, cache

  def goes_on(carry):
    token, _, n, _ = carry
    return (n < length) & ~jnp.all(stops(token))

  # A row of padding has nothing to say.
  token = jnp.where(jnp.any(cache.visible, axis=1), choose(x_BD), stop_ids[0])
  answer = jnp.full((x_BD.shape[0], length), stop_ids[0], jnp.int32)
  return jax.lax.while_loop(goes_on, step, (token, answer, jnp.int32(0), cache))[1]
