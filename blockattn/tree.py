"""Trees whose leaves have names: 'layers/q'; and what tells trees of arrays apart."""

import difflib
import functools
import hashlib

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec


def _name(path):
  return '/'.join(str(getattr(k, 'key', getattr(k, 'name', getattr(k, 'idx', k)))) for k in path)


def named_leaves(tree, is_leaf=None):
  """[(name, leaf), ...] in the tree's order."""
  return [(_name(path), leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0]]


def map_named(fn, tree, *rest, is_leaf=None):
  """Like jax.tree.map, with the leaf's name as the first argument of `fn`."""
  return jax.tree_util.tree_map_with_path(lambda path, *leaves: fn(_name(path), *leaves), tree, *rest, is_leaf=is_leaf)


def did_you_mean(name, known):
  """The end of an error message about an unknown name: the nearest known one, else all of them."""
  near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
  return f'did you mean {near[0]!r}?' if near else f'known: {", ".join(sorted(known))}'


# Facts about all arrays of a tree, computed where the arrays are.


def fingerprint(tree) -> str:
  """A hash over the values of a tree's arrays, their names, shapes and places, hexadecimal.

  The same on every mesh and in every process, and for bfloat16 and float32 arrays of equal values. It tells models apart; it
  is no defence against somebody who makes two models collide.
  """
  named = dict(named_leaves(tree))
  sums = jax.device_get(_everywhere(_bit_sums, tree)(named))
  return fingerprint_of({name: (x.shape, sums[name]) for name, x in named.items()})


def fingerprint_of(facts) -> str:
  """The `fingerprint` of arrays that need not be there at the same time: {name: (shape, bit_sums)}."""
  digest = hashlib.sha256()
  for name, (shape, (first, second)) in sorted(facts.items()):
    digest.update(f'{name} {shape} {first} {second};'.encode())
  return digest.hexdigest()


def not_finite(tree) -> list[str]:
  """The names of the arrays that hold a NaN or an infinity."""
  named = dict(named_leaves(tree))
  return [name for name, whole in jax.device_get(_everywhere(_all_finite, tree)(named)).items() if not whole]


def _everywhere(fn, tree):
  """`fn` compiled so that every process has the whole of what it gives."""
  sharding = getattr(jax.tree.leaves(tree)[0], 'sharding', None)
  return _jitted(fn, NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else None)


@functools.cache
def _jitted(fn, sharding):
  return jax.jit(fn, out_shardings=sharding)


def _all_finite(named):
  return {name: jnp.all(jnp.isfinite(x)) for name, x in named.items()}


def _bit_sums(named):
  return {name: bit_sums(x) for name, x in named.items()}


def bit_sums(x):
  """Two sums, modulo 2^32, over the array's bits mixed with their places. The mixing is MurmurHash3's finaliser."""
  unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
  bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
  if x.dtype == jnp.bfloat16:   # the upper half of float32; a cast of very small numbers might give zero
    bits = bits << 16
  place = jnp.zeros(x.shape, jnp.uint32)
  for axis, size in enumerate(x.shape):
    place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)

  def mixed(seed):
    h = bits ^ ((place + jnp.uint32(seed)) * jnp.uint32(0x9E3779B1))
    for multiplier, shift in ((0x85EBCA6B, 16), (0xC2B2AE35, 13)):
      h = (h ^ (h >> shift)) * jnp.uint32(multiplier)
    return jnp.sum(h ^ (h >> 16), dtype=jnp.uint32)

  return mixed(1), mixed(0x68E31DA4)
