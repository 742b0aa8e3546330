"""The device mesh and the rules that place arrays on it.

Every array axis has a logical name ('batch', 'mlp', ...). A rules table, which is data in the config, maps logical
names to mesh axes. One device is the mesh of sizes 1: there is no second code path.
"""

import contextlib
import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax.linen import spmd
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from blockattn import tree
from blockattn.errors import UserError

_DEVICE_COUNT_FLAG = 'xla_force_host_platform_device_count'
AXES = ('data', 'fsdp', 'tensor', 'context')

# Logical axes of parameters and activations. 'embed' is the model width D of a parameter; activations keep it whole.
RULES = (
    ('batch', ('data', 'fsdp')),
    ('vocab', 'tensor'),
    ('heads', 'tensor'),
    ('kv_heads', 'tensor'),
    ('mlp', 'tensor'),
    ('embed', 'fsdp'),
    ('layers', None),
    ('head_dim', None),
    ('tokens', 'context'),
    ('width', None),
)


def check_rules(key: str, rules: Sequence[Any]) -> None:
  """Raises ValueError, naming the key, if rules are no pairs of a logical axis and what it is mapped to, each axis once."""
  for rule in rules:
    if not _is_rule(rule):
      raise UserError(f"{key}: {rule!r} is no rule; give pairs such as ('mlp', 'tensor'), ('batch', ('data', 'fsdp')) or "
                      "('mlp', None)")
  names = [name for name, _ in rules]
  for name in names:
    if names.count(name) > 1:
      raise UserError(f'{key}: the logical axis {name!r} has {names.count(name)} rules; keep one')


def _is_rule(rule):
  if not isinstance(rule, tuple) or len(rule) != 2:
    return False
  name, axes = rule
  axes = axes if isinstance(axes, tuple) else () if axes is None else (axes,)
  return all(isinstance(text, str) for text in (name, *axes))


def make_mesh(shape: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
  """A mesh over all devices.

  Args:
    shape: size by axis name; axes left out are 1, at most one may be -1 (whatever devices are left).
    devices: default jax.devices().

  Raises:
    ValueError: an unknown axis, a size below 1, two sizes of -1, or sizes that do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = mesh_sizes(shape, len(devices))
  return Mesh(np.asarray(devices).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def mesh_sizes(shape: Mapping[str, int], devices: int) -> tuple[int, ...]:
  """The size of every axis, in order, over so many devices; arguments and errors as of `make_mesh`."""
  unknown = set(shape) - set(AXES)
  if unknown:
    raise UserError(f'mesh: unknown axes {sorted(unknown)}; the axes are {", ".join(AXES)}')
  sizes = [shape[axis] if axis in shape else 1 for axis in AXES]
  if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
    raise UserError(f'mesh {_describe(sizes)}: sizes are 1 or more, and at most one of them is -1, all that is left')
  if -1 in sizes:
    known = math.prod(s for s in sizes if s != -1)
    sizes = [max(1, devices // known) if s == -1 else s for s in sizes]
  if math.prod(sizes) != devices:
    raise UserError(f'mesh {_describe(sizes)} needs {math.prod(sizes)} devices, here are {devices}; '
                    'change config.mesh (one axis may be -1: all that is left)')
  return tuple(sizes)


def use_cpu_cores(rows: int) -> None:
  """Makes a CPU device of every core that this process may use, as many as divide `rows`, the rows of a batch.

  XLA runs a loop, such as that over the tiles of block attention, on one core of a CPU device; a mesh over one device
  per core has them all at work. To be called before the first computation. Nothing is done after it, where the user has
  chosen a number (JAX_NUM_CPU_DEVICES or --xla_force_host_platform_device_count), or in a run of several processes.
  """
  chosen = jax.config.values['jax_num_cpu_devices'] != -1 or _DEVICE_COUNT_FLAG in os.environ.get('XLA_FLAGS', '')
  if chosen or jax.distributed.is_initialized():
    return
  cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
  devices = max(n for n in range(1, cores + 1) if rows % n == 0)
  with contextlib.suppress(RuntimeError):   # the devices exist already
    jax.config.update('jax_num_cpu_devices', devices)


def _describe(sizes):
  return ' x '.join(f'{axis}={size}' for axis, size in zip(AXES, sizes, strict=True))


@dataclasses.dataclass(frozen=True)
class Placement:
  """A mesh with its rules table. Hashable, so that jitted functions may close over it or take it as static.

  Raises:
    ValueError: a rule names an axis that the mesh does not have, or a logical name has two rules.
  """
  mesh: Mesh
  rules: tuple = RULES

  def __post_init__(self):
    check_rules('config.rules', self.rules)
    for name, rule in self.rules:
      for axis in _mesh_axes(rule):
        if axis not in self.mesh.shape:
          raise UserError(f'config.rules: {name!r} is mapped to {axis!r}, which is no axis of the mesh; '
                          + tree.did_you_mean(axis, self.mesh.shape))

  @property
  def platform(self) -> str:
    """JAX's name of what the devices are: 'cpu', 'gpu' or 'tpu'."""
    return self.mesh.devices.flat[0].platform

  def spec(self, axes: Sequence[str | None]) -> PartitionSpec:
    """PartitionSpec of an array whose axes have these logical names.

    Raises:
      ValueError: a name without a rule, or two axes of the array that want the same mesh axis.
    """
    known = dict(self.rules)
    for axis in axes:
      if axis is not None and axis not in known:
        raise UserError(f'no rule for the logical axis {axis!r}; rules name {", ".join(known)}')
    wanted = [m for axis in axes if axis is not None for m in _mesh_axes(known[axis])]
    if len(wanted) != len(set(wanted)):
      raise UserError(f'rules place two of the axes {tuple(axes)} on the same mesh axis: {wanted}')
    return spmd.logical_to_mesh_axes(tuple(axes), self.rules) or PartitionSpec()

  def sharding(self, axes: Sequence[str | None]) -> NamedSharding:
    return NamedSharding(self.mesh, self.spec(axes))

  def mesh_axes(self, axis: str) -> tuple[str, ...]:
    """The mesh axes that the rules give to this logical name."""
    return _mesh_axes(dict(self.rules)[axis])

  def size(self, axis: str) -> int:
    """Into how many parts the rules cut an array axis of this logical name."""
    return math.prod(self.mesh.shape[m] for m in self.mesh_axes(axis))

  def check_divisible(self, name: str, shape: Sequence[int], axes: Sequence[str | None]) -> None:
    """Raises ValueError, naming the parameter, if an axis cannot be cut evenly."""
    for size, axis in zip(shape, axes, strict=True):
      if axis is not None and size % self.size(axis):
        raise UserError(f'{name}: axis {axis!r} of size {size} cannot be cut into {self.size(axis)} parts; change '
                        f'config.mesh, or map {axis!r} to None in config.rules')

  def constrain(self, x: jax.Array, *axes: str | None) -> jax.Array:
    """Tells the compiler where an intermediate array lives."""
    return jax.lax.with_sharding_constraint(x, self.sharding(axes))

  def put_batch(self, batch: Any) -> Any:
    """This process's rows [b, T] of every array of the tree -> global arrays, rows cut by the 'batch' rule."""
    def put(x):
      sharding = self.sharding(('batch',) + (None,) * (np.ndim(x) - 1))
      return jax.make_array_from_process_local_data(sharding, np.asarray(x))
    return jax.tree.map(put, batch)

  def replicated(self) -> NamedSharding:
    return NamedSharding(self.mesh, PartitionSpec())


def _mesh_axes(rule):
  if rule is None:
    return ()
  return (rule,) if isinstance(rule, str) else tuple(rule)
