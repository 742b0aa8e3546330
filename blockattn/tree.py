"""Trees whose leaves have names: 'layers/q'."""

import difflib

import jax


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
