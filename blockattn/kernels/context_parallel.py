"""Context parallelism: attention of rows whose tokens are sharded over devices.

Each device has its own queries, keys and values: a part of every row. What a block of context reads lies in its own part,
or ends in the part before; only readers reach further back. So a device takes over the keys and values of the part before
its own, and the queries that read beyond it, the far queries, are sent to all the others instead: everybody attends with
them to its own keys, and the outputs are merged by their logsumexp. What is communicated grows with the part and with the
readers, not with the row. Where there are more far queries than may be sent, as in causal attention over whole documents,
the row's keys and values are gathered; this is decided from the layout when it is known, in one compiled program.

Axis names in this file beside the project's: R the far queries, T the queries of a device, S the keys of the row.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from blockattn import blocks
from blockattn.kernels import cached, schedule
from blockattn.kernels.tiles import Tiles, dividing

Array = jax.Array
_ROUND = 128   # what far queries are rounded up to: the widest smallest tile of a kernel


def attention(run: Callable[..., tuple[Array, Array]], q_BTNH: Array, k_BTKH: Array, v_BTKH: Array,
              layout: blocks.BlockLayout, *, axes: tuple[str, ...], others: tuple[str, ...] = (), tiles: Tiles,
              own_tiles: Tiles | None = None, far_queries: int | None = None) -> Array:
  """On one device, inside a shard_map: attention of its own queries.

  Args:
    run: (q, k, v, schedule.Marks, Tiles) -> (out, logsumexp), one of the kernels.
    q_BTNH, k_BTKH, v_BTKH, layout: this device's part of the rows.
    axes: mesh axes that the rows are sharded over.
    others: further mesh axes over which layouts may differ.
    tiles: for these kernels; made as much smaller as the parts ask for.
    own_tiles: the same, to be taken as they are.
    far_queries: how many of a row may be sent to the keys, see `most_far_queries`; 0: keys and values are always gathered.

  Returns:
    out_BTNH.

  Raises:
    ValueError: the tiles do not divide a part.
  """
  T, devices = q_BTNH.shape[1], lax.axis_size(axes)
  S, here = T * devices, lax.axis_index(axes)
  far_queries = most_far_queries(T, S, far_queries)
  sized = lambda queries, keys: own_tiles or dividing(tiles, queries, keys)
  gather = lambda x: lax.all_gather(x, axes, axis=1, tiled=True)
  marks = schedule.token_marks(jax.tree.map(gather, layout))   # of the whole row
  mine = part(marks.query, here, T)

  def gathered(q, k, v):
    return run(q, gather(k), gather(v), schedule.Marks(mine, marks.key, here * T), sized(T, S))[0]

  def sharded(q, k, v):
    near, near_lse = _near(run, axes, devices, q, k, v, mine, marks.key, sized(T, 2 * T))
    return _far(run, axes, q, k, v, near, near_lse, marks, beyond, far_queries,
                dividing(own_tiles or tiles, far_queries, T))

  if devices <= 2 or not far_queries:
    return gathered(q_BTNH, k_BTKH, v_BTKH)
  beyond = reach_beyond(marks, T)
  most = lax.pmax(beyond.sum(axis=1).max(), (*axes, *others))   # one answer for all, whose branches communicate
  return lax.cond(most <= far_queries, sharded, gathered, q_BTNH, k_BTKH, v_BTKH)


def most_far_queries(part_length: int, length: int, wanted: int | None = None) -> int:
  """How many queries of a row may be sent, in whole tiles; by default one in 64, about a long prompt's readers."""
  wanted = length // 64 if wanted is None else wanted
  return min(part_length, -(-wanted // _ROUND) * _ROUND)


def part(x_BMS: Array, number: Array | int, length: int) -> Array:
  """Part `number` of the last axis, of `length` tokens."""
  return lax.dynamic_slice_in_dim(x_BMS, number * length, length, axis=2)


def reach_beyond(marks: schedule.Marks, length: int) -> Array:
  """bool [B, S]: which queries of the rows may attend to keys before the part of `length` tokens that precedes their own."""
  B, M, S = marks.key.shape
  most = lax.cummax(marks.key.reshape(B, M, -1, length).max(axis=3), axis=2)   # key mark of a part or one before it
  before = jnp.pad(most, ((0, 0), (0, 0), (2, 0)), constant_values=schedule.NO_KEY)[:, :, :S // length]
  return (jnp.repeat(before, length, axis=2) >= marks.query).any(axis=1)


def _near(run, axes, devices, q, k, v, query_marks, key_marks, tiles):
  """Attention to the keys of the own part and of the one before: (out, its logsumexp, -inf in padding)."""
  T, here = q.shape[1], lax.axis_index(axes)
  pass_on = lambda x: lax.ppermute(x, axes, [(i, i + 1) for i in range(devices - 1)])
  wider = lambda x: jnp.concatenate([pass_on(x), x], axis=1)
  # The first device is handed nothing, and has marks before the row's that nobody reads.
  padded = jnp.pad(key_marks, ((0, 0), (0, 0), (T, 0)), constant_values=schedule.NO_KEY)
  keys = lax.dynamic_slice_in_dim(padded, here * T, 2 * T, axis=2)
  out, lse = run(q, wider(k), wider(v), schedule.Marks(query_marks, keys, T), tiles)
  return out, jnp.where((query_marks[:, 0] != schedule.NO_QUERY)[..., None], lse, -jnp.inf)


def _far(run, axes, q, k, v, near, near_lse, marks, beyond, far_queries, tiles):
  """`near` with the queries that read beyond it completed by what they read of the other parts."""
  T, here = q.shape[1], lax.axis_index(axes)
  index_BR = jnp.argsort(~beyond, axis=1, stable=True)[:, :far_queries]
  exists = jnp.arange(far_queries) < beyond.sum(axis=1)[:, None]
  at = index_BR - here * T
  mine = exists & (at >= 0) & (at < T)
  pick = lambda x: jnp.take_along_axis(x, jnp.clip(at, 0, T - 1).reshape(*at.shape, *[1] * (x.ndim - 2)), axis=1)
  spread = lambda mask: mask[..., None, None]
  everybodys_q = lax.psum(jnp.where(spread(mine), pick(q), 0), axes)

  # A query has read its own part and the one before.
  reads = exists & (index_BR // T >= here + 2)
  query_marks = jnp.take_along_axis(marks.query, index_BR[:, None], axis=2)
  query_marks = jnp.where(reads[:, None], query_marks, schedule.NO_QUERY)
  keys = part(marks.key, here, T)
  out, lse = run(everybodys_q, k, v, schedule.Marks(query_marks, keys, T), tiles)
  sees = (keys.max(axis=2, keepdims=True) >= query_marks).any(axis=1)
  lse = jnp.where(sees[..., None], lse, -jnp.inf)

  own_lse = jnp.where(mine[..., None], pick(near_lse), -jnp.inf)
  whole = cached.merge_over(axes, jnp.stack([out, pick(near)]), jnp.stack([lse, own_lse]))
  rows = jnp.arange(q.shape[0])[:, None]
  return near.at[rows, jnp.where(mine, at, T)].set(whole.astype(near.dtype), mode='drop')
