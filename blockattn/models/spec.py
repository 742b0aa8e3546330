"""Parameters as data: one tree of `ParamSpec` gives abstract shapes, shardings and the first values."""

import dataclasses
import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp

from blockattn import mesh as mesh_lib, tree
from blockattn.errors import UserError


@dataclasses.dataclass(frozen=True)
class ParamSpec:
  """One parameter.

  Attributes:
    axes: the logical name of each axis, which the rules table maps to mesh axes.
    std: standard deviation of the normal first values; None: `fill` everywhere.
    fill: the constant first value where std is None.
  """
  shape: tuple[int, ...]
  axes: tuple[str | None, ...]
  std: float | None = None
  fill: float = 0.0

  def __post_init__(self):
    if len(self.shape) != len(self.axes):
      raise UserError(f'shape {self.shape} and axes {self.axes} differ in length')


def _is_spec(x):
  return isinstance(x, ParamSpec)


def abstract(specs: Any, dtype: Any, placement: mesh_lib.Placement | None = None) -> Any:
  """The tree as jax.ShapeDtypeStruct, with shardings if a placement is given."""
  def leaf(spec):
    sharding = None if placement is None else placement.sharding(spec.axes)
    return jax.ShapeDtypeStruct(spec.shape, jnp.dtype(dtype), sharding=sharding)
  return jax.tree.map(leaf, specs, is_leaf=_is_spec)


def shardings(specs: Any, mesh: jax.sharding.Mesh, rules: tuple) -> Any:
  """The tree as NamedShardings. Raises ValueError where an axis does not divide evenly, naming the parameter."""
  placement = mesh_lib.Placement(mesh, rules)
  for name, spec in tree.named_leaves(specs, is_leaf=_is_spec):
    placement.check_divisible(name, spec.shape, spec.axes)
  return jax.tree.map(lambda spec: placement.sharding(spec.axes), specs, is_leaf=_is_spec)


def init(specs: Any, key: jax.Array, dtype: Any) -> Any:
  """First values. Each parameter's values depend on the key and its own name only."""
  def leaf(name, spec):
    if spec.std is None:
      return jnp.full(spec.shape, spec.fill, dtype)
    own_key = jax.random.fold_in(key, zlib.crc32(name.encode()))
    return (jax.random.normal(own_key, spec.shape) * spec.std).astype(dtype)
  return tree.map_named(leaf, specs, is_leaf=_is_spec)


def count(specs: Any) -> int:
  """Number of parameters."""
  return sum(math.prod(spec.shape) for spec in jax.tree.leaves(specs, is_leaf=_is_spec))
