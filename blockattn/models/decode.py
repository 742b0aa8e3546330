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


def bucket(n: int, least: int, steps: int = 2) -> int:
  """The smallest of a few sizes, `steps` in every doubling from `least` on, that is not below n: few compilations.

  Both are powers of two: least, 1.5 least, 2 least, 3 least, 4 least, ... with two steps.
  """
  size = least
  while size < n:
    size += max(1, (1 << size.bit_length() - 1) // steps)
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
  """Keys and values that were there before the tokens that are read now, in pages, wherever they stand; they are never
  written to, and read in their place.

  Attributes:
    k, v: [L, pages, page, K, H], keys not rotated.
    pages: int32 [B, n], those of each row: slots S = n page.
    angles: (cos, sin) float32 [B, S, H / 2] of the slots' positions.
    visible: bool [B, S], what every token of the row may attend to, or, with a number, some of them.
    number: int32 [B, S], of the prompt's block that a slot is of, where a token reads those below its own number in its
      layout (`BlockLayout.block`); None: every token reads all that is visible.
    axis: name of the mesh axis over which S is sharded, inside of a shard_map; None where it is whole.
    scale: what the logsumexp of scores in the context is multiplied by before it is merged with that of other keys; 1 on
      several devices.
  """
  k: Array
  v: Array
  pages: Array
  angles: transformer.Angles
  visible: Array
  number: Array | None = None
  axis: str | None = flax.struct.field(pytree_node=False, default=None)
  scale: float = flax.struct.field(pytree_node=False, default=1.0)


@flax.struct.dataclass
class Gathered:
  """A context in the form in which `extend` reads it, token after token: see `gather`.

  Attributes:
    k, v: as of `Cache`.
    visible, axis, scale: as of `Context`.
  """
  k: Array
  v: Array
  visible: Array
  axis: str | None = flax.struct.field(pytree_node=False, default=None)
  scale: float = flax.struct.field(pytree_node=False, default=1.0)


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

  def attend(q, k, v, layer):
    own = api.block_attention_and_lse(q, k, v, layout, impl=compute.impl, tiles=compute.tiles)
    return _beside(q, slots_of(context, layer), context, own, _tile(compute), below)

  x_BTD = transformer.embed(params, tokens, cfg, compute)
  return transformer.run_layers(params, x_BTD, layout.position, cfg, compute, attend, keep=keep,
                                beside=(jnp.arange(cfg.layers),))


def _beside(q, slots, context, own, tile, below=None):
  """Attention to the context's slots in a layer, merged with `own`, (output, logsumexp) of attention to other keys.

  `tile` and `below` as of `cached.attend_cached`; None: the queries read all that is visible, as the last block's do.
  """
  out, lse = cached.attend_cached(q, slots, context.visible, below, tile=tile)
  parts = out[None], lse[None] * context.scale
  if context.axis is not None:   # every device has read its own part of the context
    parts = jax.tree.map(lambda x: jax.lax.all_gather(x[0], context.axis), parts)
  every = jax.tree.map(lambda x, y: jnp.concatenate([x, y.astype(x.dtype)[None]]), parts, own)
  return cached.merge(*every)[0].astype(q.dtype)


def slots_of(context: Context, layer: Array) -> cached.Read:
  """The context in a layer as attention reads it. Keys are rotated as a tile of them is read: who reads the context once
  needs no copy of it."""
  page = context.k.shape[2]

  def read(start, size):
    part = lambda x, start, size: jax.lax.dynamic_slice_in_dim(x, start, size, axis=1)
    pages = part(context.pages, start // page, size // page)
    k, v = (x.at[layer, pages].get(mode='clip').reshape(-1, size, *x.shape[3:]) for x in (context.k, context.v))
    return as_read(transformer.rotate(k, jax.tree.map(lambda x: part(x, start, size), context.angles)), v)

  return read


def gather(context: Context) -> Gathered:
  """A context for many tokens that are read one by one: keys are rotated once, not for every token."""
  whole = lambda layer: slots_of(context, layer)(0, context.visible.shape[1])
  k, v = jax.lax.map(whole, jnp.arange(len(context.k)))
  return Gathered(k, v, context.visible, axis=context.axis, scale=context.scale)


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
  angles = transformer.rotary_angles(layout.position, cfg)
  k, v = as_read(grow(jax.vmap(transformer.rotate, in_axes=(0, None))(k, angles)), grow(v))
  visible = _seen_by_next(layout, last) & (jnp.arange(length) <= last[:, None])
  cache = Cache(k=k, v=v, visible=jnp.pad(visible, ((0, 0), (0, room))),
                position=layout.position[each, last] + 1, used=jnp.asarray(length, jnp.int32))
  return x_BTD[each, last], cache


def as_read(k: Array, v: Array) -> tuple[Array, Array]:
  """Keys and values [..., S, K, H] as `cached.attend_cached` reads them: [..., K, H, S] and [..., K, S, H]."""
  return jnp.moveaxis(k, -3, -1), v.swapaxes(-3, -2)


def _tile(compute):
  """Slots whose scores exist at a time: so many as a core's own memory holds; elsewhere a step costs more than memory."""
  return 256 if (compute.platform or jax.default_backend()) == 'cpu' else 4096


def _seen_by_next(layout, last):
  """What one more token of the last token's block would see: bool [B, T]."""
  return blocks.sees(jax.tree.map(lambda x: jnp.take_along_axis(x, last[:, None], axis=1), layout), layout)


def extend(params: Any, tokens: Array, cache: Cache, cfg: transformer.ModelConfig, compute: transformer.Compute,
           context: Gathered | None = None) -> tuple[Array, Cache]:
  """One more token per row.

  Args:
    tokens: int32 [B].
    context: what the prompt was read with, from `gather`.

  Returns:
    (x_BD, Cache).
  """
  slot = cache.used
  visible = cache.visible.at[:, slot].set(True)
  angles = transformer.rotary_angles(cache.position[:, None], cfg)

  # Caches are carried: of a stacked array that it walks over a scan copies each layer's part, read whole or not.
  def layer(carry, scanned):
    x_B1D, k_cache, v_cache = carry
    weights, index = scanned
    stored = []

    def attend(q, k, v):
      k, v = as_read(k, v)
      keys = jax.lax.dynamic_update_slice(k_cache, k[None], (index, 0, 0, 0, slot))
      values = jax.lax.dynamic_update_slice(v_cache, v[None], (index, 0, 0, slot, 0))
      stored.append((keys, values))
      own = cached.attend_cached(q, cached.slots_of(keys, values, index), visible, tile=_tile(compute))
      if context is None:
        return own[0].astype(q.dtype)
      return _beside(q, cached.slots_of(context.k, context.v, index), context, own, _tile(compute))

    x_B1D, _ = transformer.decoder_layer(x_B1D, weights_lib.cast(weights, compute.dtype), angles, cfg, compute, attend)
    return (x_B1D, *stored[0]), None

  x_B1D = transformer.embed(params, tokens[:, None], cfg, compute)
  (x_B1D, k, v), _ = jax.lax.scan(layer, (x_B1D, cache.k, cache.v), (params['layers'], jnp.arange(cfg.layers)))
  cache = Cache(k=k, v=v, visible=visible, position=cache.position + 1, used=slot + 1)
  return transformer.final_norm(params, x_B1D, cfg)[:, 0], cache


@functools.partial(jax.jit, static_argnames=('cfg', 'compute', 'length', 'vocab'))
def greedy(params: Any, x_BD: Array, cache: Cache, context: Gathered | None = None, *, cfg: transformer.ModelConfig,
           compute: transformer.Compute, length: int, stop_ids: Array, vocab: int) -> Array:
  """The most probable continuation, token by token.

  Args:
    x_BD, cache: from `prefill` or `start`, with room for `length` tokens.
    context: what the prompt was read with, from `gather`.
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
    x_BD, cache = extend(params, token, cache, cfg, compute, context)
    token = jnp.where(stops(token), stop_ids[0], choose(x_BD))   # once stopped, stopped for ever
    return token, answer, n + 1, cache

  def goes_on(carry):
    token, _, n, _ = carry
    return (n < length) & ~jnp.all(stops(token))

  # A row of padding has nothing to say.
  token = jnp.where(jnp.any(cache.visible, axis=1), choose(x_BD), stop_ids[0])
  answer = jnp.full((x_BD.shape[0], length), stop_ids[0], jnp.int32)
  return jax.lax.while_loop(goes_on, step, (token, answer, jnp.int32(0), cache))[1]
