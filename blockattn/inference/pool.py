"""Block states in device memory: pages of a fixed number of tokens, and the programs that fill them.

One array for keys (not rotated) and one for values, [L, pages, page tokens, K, H], allocated once. A block takes whole
pages, anywhere; a prompt's context is a list of pages, so nothing is copied when blocks come and go, and no shape depends
on a block. Over several devices the pages are divided: a block lives on one of them (a shared prefix on each), is computed
there without communication, and is read there by every query (`decode.Context.axis`).
"""

import collections
import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from blockattn import blocks
from blockattn.errors import UserError
from blockattn.inference import cache as cache_lib
from blockattn.models import decode, transformer

AXIS = 'context'
EVERYWHERE, ROWS, PAGES, VALUES, KEYS = (
    PartitionSpec(*axes) for axes in ((), (AXIS,), (None, AXIS), (None,) * 3 + (AXIS,), (None,) * 4 + (AXIS,)))
PAGE = 16   # tokens: a block wastes half of this on average


def padded(tokens: int) -> int:
  """The length of the array that so many tokens of a block, a last block or an answer stand in, in whole pages."""
  return decode.bucket(tokens, 2 * PAGE)


def pages_of(tokens: int) -> int:
  """Pages that so many tokens of a block take."""
  return -(-tokens // PAGE)


def make_mesh(devices: Sequence[Any]) -> Mesh:
  return Mesh(np.asarray(devices), (AXIS,), axis_types=(AxisType.Auto,))


class Pool:
  """The pages, and which key holds which; least recently used keys are the first to lose theirs.

  Args:
    dtype: of the states, that of activations.
    mesh: from `make_mesh`.
    tokens: how many the pages hold in all, over all devices.

  Raises:
    ValueError: not one page on each device.
  """

  def __init__(self, cfg: transformer.ModelConfig, dtype: str, mesh: Mesh, tokens: int):
    self.pages, self.devices, self.mesh = tokens // (PAGE * mesh.size), mesh.size, mesh
    if self.pages < 1:
      raise UserError(f'room for {tokens} tokens is not a page of {PAGE} tokens on each of {mesh.size} devices; give more')
    shape = (cfg.layers, mesh.size * self.pages, PAGE, cfg.kv_heads, cfg.head_dim)
    self._zeros = _zeros(shape, dtype, NamedSharding(mesh, PAGES))
    self._allocate()

  def _allocate(self):
    self.k, self.v = self._zeros(), self._zeros()
    self._free = [list(range(self.pages - 1, -1, -1)) for _ in range(self.devices)]
    self._held = [collections.OrderedDict() for _ in range(self.devices)]   # key -> its pages, on each device

  def clear(self) -> None:
    """Frees every page. The arrays are made anew: a program that failed may have taken the old ones."""
    self.k.delete()   # their memory has to be free before it is asked for again
    self.v.delete()
    self._allocate()

  def where(self, key: str) -> dict[int, np.ndarray]:
    """{device: pages} of a key, which is now the last to go."""
    there = {device: held[key] for device, held in enumerate(self._held) if key in held}
    for device in there:
      self._held[device].move_to_end(key)
    return there

  def room(self, device: int, pinned: Collection[str]) -> int:
    """Pages that could be had on a device without those of pinned keys."""
    return len(self._free[device]) + sum(len(p) for key, p in self._held[device].items() if key not in pinned)

  def take(self, key: str, device: int, count: int, pinned: Collection[str]) -> np.ndarray:
    """Pages for a new key, taken from those that were not used for longest.

    Raises:
      MemoryError: the pinned keys leave too few.
    """
    free, held = self._free[device], self._held[device]
    while len(free) < count:
      old = next((key for key in held if key not in pinned), None)
      if old is None:
        raise MemoryError(f'{count} pages are wanted on device {device}, {len(free)} are left')
      free.extend(held.pop(old).tolist())
    held[key] = np.array([free.pop() for _ in range(count)], np.int32)
    return held[key]

  def fill(self, params: Any, rows: tuple[np.ndarray, ...], cfg: transformer.ModelConfig, compute: transformer.Compute,
           prefix: tuple[np.ndarray, np.int32]) -> None:
    """Computes blocks and keeps their states.

    Args:
      rows: (tokens int32 [D R, T], lengths int32 [D R], pages int32 [D R, T / page]), rows of a device one after the other.
        A page that is not to be kept is `self.pages`.
      prefix: (pages int32 [D, n], tokens of the shared prefix), n = 0 without one.
    """
    self.k, self.v = _fill(params, self.k, self.v, *rows, *prefix, cfg=cfg, compute=compute, mesh=self.mesh)

  def load(self, state: cache_lib.State, device: int, pages: np.ndarray) -> None:
    """Writes a state from the host to pages."""
    length = padded(state.tokens)
    pad = lambda x: np.pad(x, [(0, 0), (0, length - x.shape[1]), (0, 0), (0, 0)])
    where = np.full((self.devices, length // PAGE), self.pages, np.int32)
    where[device, :len(pages)] = pages
    self.k, self.v = _load(self.k, self.v, pad(state.k), pad(state.v), state.k_scale, state.v_scale, where, mesh=self.mesh)

  def fetch(self, device: int, pages: np.ndarray, tokens: int) -> cache_lib.State:
    """The state of a block of so many tokens, on the host."""
    where = np.zeros(padded(tokens) // PAGE, np.int32)
    where[:len(pages)] = device * self.pages + pages
    found = jax.device_get(_fetch(self.k, self.v, where))
    return cache_lib.State(*(x.reshape(x.shape[0], -1, *x.shape[3:])[:, :tokens] for x in found))

  def context(self, pages: np.ndarray, position: np.ndarray, visible: np.ndarray, number: np.ndarray | None,
              cfg: transformer.ModelConfig) -> decode.Context:
    """The context of a batch of prompts; of use until pages are written to.

    Args:
      pages: int32 [B, D n], of each device n.
      position, visible, number: int32, bool and int32 [B, D n page]; see `decode.Context`.
    """
    there = jax.tree.map(jnp.asarray, (pages, _angles(position, cfg=cfg, mesh=self.mesh), visible, number))
    return decode.Context(self.k, self.v, *there, axis=None if self.devices == 1 else AXIS)


@functools.cache   # a pool like one before it compiles nothing
def _zeros(shape, dtype, sharding):
  return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)


def on_mesh(mesh: Mesh, fn: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
  """`fn` on each device on its own part; `fn` itself where there is one device."""
  # check_vma=False: loops start from zeros, which the check would want marked per device.
  return fn if mesh.size == 1 else jax.shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


@functools.partial(jax.jit, static_argnames=('cfg', 'compute', 'mesh'), donate_argnames=('k_pool', 'v_pool'))
def _fill(params, k_pool, v_pool, tokens, lengths, pages, prefix_pages, prefix_tokens, *, cfg, compute, mesh):
  def here(params, k_pool, v_pool, tokens, lengths, pages, prefix_pages, prefix_tokens):
    rows, length = tokens.shape
    layout = one_block(lengths, prefix_tokens, length)
    context = None
    if prefix_pages.shape[1]:
      slots = prefix_pages.shape[1] * k_pool.shape[2]
      position = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32), (1, slots))
      context = decode.Context(k_pool, v_pool, *jax.tree.map(lambda x: jnp.repeat(x, rows, axis=0), (
          prefix_pages, transformer.rotary_angles(position, cfg), position < prefix_tokens)))
    _, kv = decode.read(params, tokens, layout, cfg, compute, context)
    paged = (x.reshape(x.shape[0], *pages.shape, k_pool.shape[2], *x.shape[3:]) for x in kv)
    return tuple(pool.at[:, pages].set(x.astype(pool.dtype), mode='drop')
                 for pool, x in zip((k_pool, v_pool), paged, strict=True))

  return on_mesh(mesh, here, (EVERYWHERE, PAGES, PAGES, ROWS, ROWS, ROWS, ROWS, EVERYWHERE), (PAGES, PAGES))(
      params, k_pool, v_pool, tokens, lengths, pages, prefix_pages, prefix_tokens)


def one_block(lengths: jax.Array, ahead: jax.Array | int, length: int) -> blocks.BlockLayout:
  """The layout of rows that are each one block of `lengths` tokens [B], whose positions are so far `ahead` of their places:
  [B, T], [B, 1] or a number."""
  at = jnp.arange(length, dtype=jnp.int32)[None]
  valid = at < lengths[:, None]
  none = jnp.zeros_like(valid)
  position = jnp.where(valid, at + ahead, 0)
  return blocks.BlockLayout(doc=valid.astype(jnp.int32), block=jnp.zeros_like(position), position=position, reader=valid,
                            hidden=none, shared=none)


@functools.partial(jax.jit, static_argnames='mesh', donate_argnames=('k_pool', 'v_pool'))
def _load(k_pool, v_pool, k, v, k_scale, v_scale, pages, *, mesh):
  def here(k_pool, v_pool, k, v, k_scale, v_scale, pages):
    def put(pool, x, scale):
      x = x if scale is None else x.astype(jnp.float32) * scale
      paged = x.astype(pool.dtype).reshape(x.shape[0], -1, *pool.shape[2:])
      return pool.at[:, pages[0]].set(paged, mode='drop')
    return put(k_pool, k, k_scale), put(v_pool, v, v_scale)

  return on_mesh(mesh, here, (PAGES, PAGES, *[EVERYWHERE] * 4, ROWS), (PAGES, PAGES))(
      k_pool, v_pool, k, v, k_scale, v_scale, pages)


@jax.jit
def _fetch(k_pool, v_pool, pages):
  return k_pool[:, pages], v_pool[:, pages]


@functools.partial(jax.jit, static_argnames=('cfg', 'mesh'))
def _angles(position, *, cfg, mesh):
  return on_mesh(mesh, functools.partial(transformer.rotary_angles, cfg=cfg), (PAGES,), (PAGES, PAGES))(position)
