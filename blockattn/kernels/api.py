"""The entrance to block attention: checks the arguments and calls the chosen implementation."""

import functools
import importlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from blockattn import blocks
from blockattn.errors import UserError
from blockattn.kernels import context_parallel, reference, schedule, tiles as tile_sizes

Array = jax.Array
IMPLS = ('reference', 'xla', 'tpu', 'gpu')
_HOME = {'tpu': 'tpu', 'gpu': 'gpu'}   # implementations that run on one platform only
KEPT, kept = reference.KEPT, reference.kept   # of what a forward pass gives, for policies of jax.checkpoint
_FASTEST = {'tpu': 'tpu'}              # what 'auto' means; 'gpu' is left out until it has been run on a GPU


def resolve(impl: str, platform: str) -> str:
  """The implementation that `impl` means on `platform` ('cpu', 'gpu' or 'tpu'); log it once at start.

  Raises:
    ValueError: `impl` is neither 'auto' nor the name of an implementation, or it does not run on the platform.
  """
  if impl == 'auto':
    return _FASTEST.get(platform, 'xla')
  if impl not in IMPLS:
    raise UserError(f'attention impl {impl!r} does not exist; use one of {", ".join(("auto",) + IMPLS)}')
  if _HOME.get(impl, platform) != platform:
    raise UserError(f'attention impl {impl!r} does not run on {platform}; use impl="auto" or impl="xla"')
  return impl


def _kernels(impl: str) -> Any:
  """The module of an implementation. Pallas for GPUs takes a second to import, which most processes have no use for."""
  return importlib.import_module(f'blockattn.kernels.{impl}')


class Choice(NamedTuple):
  """An implementation, and why it is that one; as text, the line that every run starts with."""
  impl: str
  why: str

  def __str__(self):
    return f'attention: {self.impl} ({self.why})'


def choose(impl: str, device: Any) -> Choice:
  """What `impl` means on a device of JAX's, of which it reads platform, device_kind and compute_capability.

  Raises:
    ValueError: as `resolve`, or the device is a GPU that the GPU kernels are not for.
  """
  chosen = resolve(impl, device.platform)
  lacking = _kernels('gpu').lacks(device) if device.platform == 'gpu' else None
  if chosen == 'gpu' and lacking:
    raise UserError(f'{lacking}; use impl="auto" or impl="xla"')
  if impl != 'auto':
    return Choice(chosen, 'as asked')
  if device.platform != 'gpu':
    return Choice(chosen, f'auto on {device.platform}')
  return Choice(chosen, 'auto on gpu: ' + (lacking or f'impl="gpu" runs on {device.device_kind} only if asked for'))


@jax.named_scope('block_attention')
def block_attention(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, layout: blocks.BlockLayout, *, impl: str = 'auto',
                    tiles: tuple[int, int] | None = None, platform: str | None = None) -> Array:
  """Attention of each query to the keys that `blocks.may_attend` allows.

  Args:
    q_BTNH: queries, T == S. Query head n reads key/value head n // (N / K). The scale H ** -0.5 is applied inside.
    k_BSKH, v_BSKH: keys and values, in the queries' dtype.
    layout: BlockLayout of [B, T] arrays, traced or not: new boundaries never recompile.
    impl: 'reference' (dense, quadratic in memory), 'xla' (everywhere), 'tpu', 'gpu' (Hopper), or 'auto', see `resolve`.
    tiles: (query_tile, key_tile) in tokens, by default `tiles.default`; one must divide the other.
    platform: JAX's name of what it is compiled for; by default that of this process.

  Returns:
    [B, T, N, H] in q's dtype; exactly zero, with zero gradients, in padding rows.

  Raises:
    ValueError: the implementation is unknown, or shapes, dtypes or tiles do not fit together.
  """
  return _attention(q_BTNH, k_BSKH, v_BSKH, layout, impl, tiles, platform)[0]


def block_attention_and_lse(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, layout: blocks.BlockLayout, *,
                            impl: str = 'auto', tiles: tuple[int, int] | None = None) -> tuple[Array, Array]:
  """`block_attention` and what it takes to merge it with attention over other keys (`cached.merge`).

  Returns:
    (out_BTNH, the logsumexp of each query's scores, float32 [B, T, N], -inf in padding rows).
  """
  out, lse = _attention(q_BTNH, k_BSKH, v_BSKH, layout, impl, tiles, None)
  return out, jnp.where((layout.doc != 0)[..., None], lse, -jnp.inf)


def _attention(q_BTNH, k_BSKH, v_BSKH, layout, impl, tiles, platform):
  check_arguments(q_BTNH, k_BSKH, v_BSKH, layout)
  platform = platform or jax.default_backend()
  impl = resolve(impl, platform)
  if impl == 'reference':
    return reference.attention(q_BTNH, k_BSKH, v_BSKH, layout)
  marks = schedule.token_marks(layout)
  return _kernels(impl).attention(q_BTNH, k_BSKH, v_BSKH, marks, _tiles(tiles, impl, platform, q_BTNH))


def _tiles(tiles, impl, platform, x_BTNH):
  if tiles is None:
    tiles = tile_sizes.default(impl, platform, length=x_BTNH.shape[1], head_dim=x_BTNH.shape[3])
  return tile_sizes.Tiles(*tiles)


def block_attention_on_mesh(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, layout: blocks.BlockLayout, mesh: Mesh, *,
                            batch_axes: tuple[str, ...] = (), head_axes: tuple[str, ...] = (),
                            context_axes: tuple[str, ...] = (), impl: str = 'auto',
                            tiles: tuple[int, int] | None = None, far_queries: int | None = None,
                            platform: str | None = None) -> Array:
  """`block_attention` with the batch, the heads and the sequence sharded over a mesh, each device on its own part.

  The tile loop runs over batch rows one after the other, so automatic sharding would gather them; here every device
  loops over its own rows and heads, and nothing is communicated. How a sharded sequence is read (context
  parallelism), kernels/context_parallel.py says.

  Args:
    mesh: the mesh; axes that are in none of the next three hold copies.
    batch_axes: mesh axes that divide B.
    head_axes: mesh axes that divide both N and K.
    context_axes: mesh axes that divide T (context parallelism), into multiples of the tiles; not for impl 'reference'.
      Tiles that are not given are as large as divides.
    far_queries: of a sharded row, how many queries that read far back are sent to the keys; if there are more, the keys
      and values are brought to the queries. None: `context_parallel.most_far_queries`.
    platform: as of `block_attention`.

  Raises:
    ValueError: as `block_attention`, or an axis does not divide its dimension.
  """
  check_arguments(q_BTNH, k_BSKH, v_BSKH, layout)
  _check_divides(mesh, batch_axes, 'batch rows', q_BTNH.shape[0])
  _check_divides(mesh, head_axes, 'query heads', q_BTNH.shape[2])
  _check_divides(mesh, head_axes, 'key/value heads', k_BSKH.shape[2])
  _check_divides(mesh, context_axes, 'tokens', q_BTNH.shape[1])
  heads = PartitionSpec(batch_axes or None, context_axes or None, head_axes or None, None)
  tokens = PartitionSpec(batch_axes or None, context_axes or None)
  attend = lambda q, k, v, part: block_attention(q, k, v, part, impl=impl, tiles=tiles, platform=platform)
  if context_axes:
    platform = platform or jax.default_backend()
    impl = resolve(impl, platform)
    if impl == 'reference':
      raise UserError(f'attention impl {impl!r} cannot divide the sequence over {context_axes}; use impl="xla"')
    own = None if tiles is None else _tiles(tiles, impl, platform, q_BTNH)
    attend = jax.named_scope('block_attention')(functools.partial(
        context_parallel.attention, _kernels(impl).attention, axes=context_axes, others=batch_axes,
        far_queries=far_queries, tiles=_tiles(None, impl, platform, q_BTNH), own_tiles=own))
  # check_vma=False: the loops of the kernel start from zeros, which the check would want marked per device.
  return jax.shard_map(attend, mesh=mesh, in_specs=(heads, heads, heads, tokens), out_specs=heads,
                       check_vma=False)(q_BTNH, k_BSKH, v_BSKH, layout)


def _check_divides(mesh, axes, what, size):
  missing = [axis for axis in axes if axis not in mesh.shape]
  if missing:
    raise UserError(f'mesh axis {missing[0]!r} does not exist; the mesh has {", ".join(mesh.shape)}')
  ways = 1
  for axis in axes:
    ways *= mesh.shape[axis]
  if size % ways:
    raise UserError(f'{size} {what} cannot be divided over mesh axes {axes} of {ways} devices; '
                    'use smaller axes or leave them out')


def check_arguments(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, layout: blocks.BlockLayout) -> None:
  """Raises ValueError, saying what to change, where shapes or dtypes do not fit together."""
  shapes = f'q {q_BTNH.shape}, k {k_BSKH.shape}, v {v_BSKH.shape}'
  if not q_BTNH.ndim == k_BSKH.ndim == v_BSKH.ndim == 4:
    raise UserError(f'{shapes}: queries must be [B, T, N, H], keys and values [B, T, K, H]')
  B, T, N, H = q_BTNH.shape
  K = k_BSKH.shape[2]
  if k_BSKH.shape != v_BSKH.shape or k_BSKH.shape != (B, T, K, H):
    raise UserError(f'{shapes}: keys and values must be [B={B}, T={T}, K, H={H}] as the queries are')
  if K == 0 or N % K:
    raise UserError(f'{N} query heads cannot share {K} key/value heads; N must be a multiple of K')
  if not q_BTNH.dtype == k_BSKH.dtype == v_BSKH.dtype:
    raise UserError(f'dtypes differ: q {q_BTNH.dtype}, k {k_BSKH.dtype}, v {v_BSKH.dtype}; cast them to one')
  for name in ('doc', 'block', 'reader', 'hidden', 'shared'):
    shape = getattr(layout, name).shape
    if shape != (B, T):
      raise UserError(f'layout.{name} has shape {shape}, but the queries want [B={B}, T={T}]; '
                      'pad the layout and the tokens alike')
