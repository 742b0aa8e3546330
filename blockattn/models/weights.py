"""Weights that are not one plain array: 8-bit matrices, and frozen matrices with a trained low-rank part.

Each stands where an array would in a parameter tree; `transformer.dense` multiplies by any of them. Leading axes that a
scan takes apart (layers) come first in every array of both.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

Array = jax.Array

# Axes that a product sums over, counted behind the layers: all other axes are output channels.
CONTRACTED = {'q': 1, 'k': 1, 'v': 1, 'o': 2, 'gate': 1, 'up': 1, 'down': 1}


@flax.struct.dataclass
class Int8:
  """A matrix of 8-bit integers with a scale per output channel: values * scale is the matrix.

  Attributes:
    values: int8 of the matrix's shape, -127 to 127.
    scale: float32, the same shape with 1 for every axis that a product sums over.
  """
  values: Any
  scale: Any


@flax.struct.dataclass
class LowRank:
  """A frozen matrix and a trained difference of low rank (LoRA, arXiv 2106.09685): base + factor * down up.

  Attributes:
    base: the matrix [..., in axes, out axes], an array or Int8; no gradient goes into it.
    down: [..., in axes, R].
    up: [..., R, out axes].
    factor: alpha / R.
  """
  base: Any
  down: Any
  up: Any
  factor: float = flax.struct.field(pytree_node=False)


Matrix = Array | Int8 | LowRank


def is_int8(w: Any) -> bool:
  return isinstance(w, Int8)


def to_int8(w: Array, axes: tuple[int, ...]) -> Int8:
  """Symmetric rounding to the nearest of 255 levels, by output channel: at most scale / 2 off in every entry.

  Args:
    w: float array.
    axes: those that a product sums over.
  """
  w = w.astype(jnp.float32)
  scale = jnp.max(jnp.abs(w), axis=axes, keepdims=True) / 127
  values = jnp.round(w / jnp.where(scale > 0, scale, 1))
  return Int8(values.astype(jnp.int8), scale)


def quantize(params: dict[str, Any], dtype: Any) -> dict[str, Any]:
  """The tree of a language model with its matrices in 8 bits, everything else (norms, biases, sinks) in `dtype`.

  The embedding and the head have a scale per token of the vocabulary, which is an output channel of the head.
  """
  cast = lambda x: x.astype(dtype)
  layers = {name: to_int8(w, tuple(range(1, 1 + CONTRACTED[name]))) if name in CONTRACTED else cast(w)
            for name, w in params['layers'].items()}
  rest = {name: to_int8(w, (1,)) if name in ('embed', 'head') else cast(w)
          for name, w in params.items() if name != 'layers'}
  return rest | {'layers': layers}


def quantized_shardings(shardings: dict[str, Any]) -> dict[str, Any]:
  """Where the arrays of a quantised tree go: values as the matrix, scales cut along the output channels only.

  Args:
    shardings: tree of NamedSharding, of the parameters as they were.
  """
  def both(sharding, axes):
    spec = [*sharding.spec, *[None] * 8]   # a PartitionSpec may leave out trailing axes
    kept = [None if axis in axes else spec[axis] for axis in range(max(len(sharding.spec), axes[-1] + 1))]
    return Int8(sharding, jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*kept)))

  layers = {name: both(s, tuple(range(1, 1 + CONTRACTED[name]))) if name in CONTRACTED else s
            for name, s in shardings['layers'].items()}
  rest = {name: both(s, (1,)) if name in ('embed', 'head') else s for name, s in shardings.items() if name != 'layers'}
  return rest | {'layers': layers}


def cast(tree: Any, dtype: Any) -> Any:
  """Every float array of the tree in `dtype`; 8-bit matrices stay what they are."""
  return jax.tree.map(lambda w: w if is_int8(w) else w.astype(dtype), tree, is_leaf=is_int8)


def rows(table: Array | Int8, index: Array) -> Array:
  """table[index] along the first axis, of an array or of Int8."""
  if isinstance(table, Int8):
    return jnp.take(table.values, index, axis=0).astype(jnp.float32) * jnp.take(table.scale, index, axis=0)
  return jnp.take(table, index, axis=0)
