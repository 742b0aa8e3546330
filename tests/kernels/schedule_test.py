"""The tile schedule against the dense mask: nothing missed, nothing visited in vain, nothing wrongly called full."""

import functools

import jax
import layout_cases
import numpy as np
import pytest
from hypothesis import example, given, settings
from jax.extend import core

from blockattn import blocks
from blockattn.kernels import gpu, schedule, tpu, xla
from blockattn.kernels.tiles import Tiles, default

ROWS, LENGTH = 2, 64
TILES = [Tiles(8, 8), Tiles(16, 8), Tiles(8, 32), Tiles(64, 64)]
several = settings(max_examples=40, deadline=None, derandomize=True, database=None)

dense_mask = jax.jit(blocks.may_attend)
list_visits = jax.jit(xla.list_visits)
list_work = jax.jit(tpu.list_work, static_argnums=1)
list_tiles = jax.jit(gpu.list_tiles)
every_owner = jax.jit(schedule.every_owner)


@functools.partial(jax.jit, static_argnums=1)
def tile_masks(layout, tiles):
  return schedule.tile_masks(schedule.token_marks(layout), tiles)


@jax.jit
def mask_by_marks(layout):
  marks = schedule.token_marks(layout)
  return jax.vmap(lambda q, k: schedule.pair_mask(q[:, :, None], k[:, None], 0, 0))(marks.query, marks.key)


def in_tiles(mask, tiles):
  """[B, T, T] -> [B, query tiles, key tiles, pairs of a tile]."""
  rows, length, _ = mask.shape
  mask = mask.reshape(rows, length // tiles.query, tiles.query, length // tiles.key, tiles.key)
  return mask.swapaxes(2, 3).reshape(rows, length // tiles.query, length // tiles.key, -1)


def packed(*rows, **kwargs):
  return blocks.from_lengths(rows, LENGTH, **kwargs)


@several
@given(layout_cases.layouts(ROWS, LENGTH))
def test_marks_say_what_may_attend_says(layout):
  np.testing.assert_array_equal(mask_by_marks(layout), dense_mask(layout))


@pytest.mark.parametrize('tiles', TILES, ids=str)
@several
@given(layout=layout_cases.layouts(ROWS, LENGTH))
@example(layout=packed([[16, 16, 8, 8]], [[64]]))
@example(layout=packed([[8, 8, 24, 16]], [[8] * 8], shared_first=True))
@example(layout=packed([], [[1] * 64]))
def test_tile_masks_are_exact(tiles, layout):
  pairs = in_tiles(np.asarray(dense_mask(layout)), tiles)
  touched, full = tile_masks(layout, tiles)
  np.testing.assert_array_equal(touched, pairs.any(axis=-1))
  np.testing.assert_array_equal(full, pairs.all(axis=-1))


@pytest.mark.parametrize('tiles', TILES[:3], ids=str)
def test_every_attribute_of_a_block_reaches_the_schedule(tiles):
  """Whole tiles of each kind: shared, hidden, removed, lifted, so that full tiles of each kind occur."""
  for kind in layout_cases.KINDS:
    for shared_first in (False, True):
      doc = [(16, 'context'), (16, kind), (16, 'context'), (16, 'context')]
      rows = [(0, [(doc, shared_first)]), (0, [(doc[:2], shared_first), (doc[2:], False)])]
      layout = layout_cases.build(rows, LENGTH)
      pairs = in_tiles(np.asarray(dense_mask(layout)), tiles)
      touched, full = tile_masks(layout, tiles)
      np.testing.assert_array_equal(touched, pairs.any(axis=-1), err_msg=kind)
      np.testing.assert_array_equal(full, pairs.all(axis=-1), err_msg=kind)


@several
@given(layout_cases.layouts(ROWS, LENGTH))
def test_visits_list_the_tiles_of_the_masks_in_order(layout):
  touched, full = map(np.asarray, tile_masks(layout, TILES[0]))
  for axes in ((0, 1, 2), (0, 2, 1)):   # key tiles of each query tile, and query tiles of each key tile
    visits = list_visits(touched.transpose(axes), full.transpose(axes))
    for listed, mask in ((visits.partial, touched & ~full), (visits.full, full)):
      mask = mask.transpose(axes)
      np.testing.assert_array_equal(listed.count, mask.sum(axis=-1))
      for b, i in np.ndindex(*mask.shape[:2]):
        np.testing.assert_array_equal(listed.index[b, i][:listed.count[b, i]], np.flatnonzero(mask[b, i]))


@pytest.mark.parametrize('tiles', TILES, ids=str)
@several
@given(layout=layout_cases.layouts(ROWS, LENGTH))
@example(layout=packed([], [[64]]))
def test_work_lists_hold_each_tile_once_and_every_owner(tiles, layout):
  """Both orders hold the touched tiles, and the first tile for owners that visit no other."""
  touched, full = map(np.asarray, tile_masks(layout, tiles))
  rows, n, m = touched.shape
  work = list_work(schedule.token_marks(layout), tiles)
  for listed, axes in ((work.by_query, (0, 1, 2)), (work.by_key, (0, 2, 1))):
    owner, other = (np.asarray(x)[:int(listed.count)] for x in (listed.owner, listed.other))
    assert (np.diff(owner) >= 0).all() and len(listed.owner) == rows * tpu.most_visits(n, m)
    own = touched.transpose(axes)
    at = owner // own.shape[1], owner % own.shape[1], other >> tpu.FLAG_BITS
    assert_visits(at, own)
    np.testing.assert_array_equal(other & tpu.PARTIAL == 0, full.transpose(axes)[at])
    changes = np.diff(owner) > 0
    np.testing.assert_array_equal(other & tpu.FIRST != 0, np.concatenate([[True], changes]))
    np.testing.assert_array_equal(other & tpu.LAST != 0, np.concatenate([changes, [True]]))


@several
@given(layout=layout_cases.layouts(ROWS, LENGTH))
def test_tile_lists_say_what_the_masks_say(layout):
  touched, full = map(np.asarray, tile_masks(layout, TILES[1]))
  for axes in ((0, 1, 2), (0, 2, 1)):
    visited = np.asarray(every_owner(touched.transpose(axes)))
    assert_visits(np.nonzero(visited), touched.transpose(axes))
    visit, whole = (x.reshape(-1, x.shape[2]) for x in (visited, full.transpose(axes)))
    lists = list_tiles(visited, full.transpose(axes))
    np.testing.assert_array_equal(lists.total, visit.sum(axis=1))
    assert (np.diff(lists.total[lists.order]) <= 0).all() and sorted(lists.order.tolist()) == list(range(len(visit)))
    for owner, (partial, total) in enumerate(zip(lists.partial.tolist(), lists.total.tolist())):
      np.testing.assert_array_equal(lists.index[owner, :partial], np.flatnonzero(visit[owner] & ~whole[owner]))
      np.testing.assert_array_equal(lists.index[owner, partial:total], np.flatnonzero(whole[owner]))


@pytest.mark.parametrize('cut', [gpu.Cut(), gpu.Cut(1, 4), gpu.Cut(3, 2)], ids=str)
@several
@given(layout=layout_cases.layouts(ROWS, LENGTH))
def test_pieces_make_up_the_lists(cut, layout):
  """Every entry of every list once, and the longest lists are those that are cut."""
  touched, full = tile_masks(layout, TILES[1])
  lists = list_tiles(every_owner(touched), full)
  pieces = [tuple(map(int, gpu.piece(n, lists.order, lists.total, cut))) for n in range(len(lists.order) + cut.spare)]
  entries = sorted((owner, i) for owner, first, count in pieces for i in range(first, first + count))
  assert entries == [(owner, i) for owner, total in enumerate(lists.total.tolist()) for i in range(total)]
  longest = np.repeat(lists.order[:cut.owners], cut.pieces).tolist()
  assert [owner for owner, _, _ in pieces[:len(longest)]] == longest


@pytest.mark.parametrize('tiles', TILES[:3], ids=str)
@several
@given(layout=layout_cases.layouts(ROWS, LENGTH))
def test_a_part_of_the_queries(tiles, layout):
  """The second half of the queries: their rows of the masks, and every owner on both lists."""
  half = LENGTH // 2
  marks = schedule.token_marks(layout)
  part = schedule.Marks(marks.query[:, :, half:], marks.key, half)
  whole = [np.asarray(x)[:, half // tiles.query:] for x in tile_masks(layout, tiles)]
  assert_part(part, tiles, *whole)


@pytest.mark.parametrize('tiles', TILES[:3], ids=str)
@several
@given(layout=layout_cases.layouts(ROWS, LENGTH))
def test_queries_behind_all_keys(tiles, layout):
  """The first half's keys, read by the second half's queries, some of which are left out."""
  half = LENGTH // 2
  marks = schedule.token_marks(layout)
  left_out = np.arange(half) % 7 == 3
  part = schedule.Marks(np.where(left_out, schedule.NO_QUERY, marks.query[:, :, half:]), marks.key[:, :, :half], half)
  allowed = np.asarray(dense_mask(layout))[:, half:, :half] & ~left_out[:, None]
  pairs = allowed.reshape(ROWS, half // tiles.query, tiles.query, half // tiles.key, tiles.key)
  assert_part(part, tiles, pairs.any(axis=(2, 4)), pairs.all(axis=(2, 4)))


def assert_part(part, tiles, touched, full):
  for result, wanted in zip(jax.jit(schedule.tile_masks, static_argnums=1)(part, tiles), (touched, full)):
    np.testing.assert_array_equal(result, wanted)
  work = list_work(part, tiles)
  for listed, axes in ((work.by_query, (0, 1, 2)), (work.by_key, (0, 2, 1))):
    owner, other = (np.asarray(x)[:int(listed.count)] for x in (listed.owner, listed.other))
    own = touched.transpose(axes)
    assert_visits((owner // own.shape[1], owner % own.shape[1], other >> tpu.FLAG_BITS), own)


def assert_visits(at, touched):
  """Indices of visits: each touched tile once, and the first tile of owners that have none."""
  found = np.zeros(touched.shape, int)
  np.add.at(found, at, 1)
  lonely = ~touched.any(axis=2)
  wanted = touched.copy()
  wanted[:, :, 0] |= lonely
  np.testing.assert_array_equal(found, wanted)


def test_boundaries_are_traced():
  count = jax.jit(lambda layout: schedule.tile_masks(schedule.token_marks(layout), TILES[0])[0].sum())
  one, many = count(packed([[64]], [[64]])), count(packed([[8] * 8], [[8] * 8]))
  assert (one, many) == (2 * 36, 2 * 15)
  assert count._cache_size() == 1


def test_nothing_grows_with_the_square_of_the_tokens():
  """The largest array of the whole schedule is per token or per tile."""
  length, tiles = 2048, Tiles(256, 256)
  layout = blocks.from_lengths([[[length]]], length)
  jaxpr = jax.make_jaxpr(lambda marks: (xla.list_visits(*schedule.tile_masks(marks, tiles)),
                                        tpu.list_work(marks, tiles)))(schedule.token_marks(layout))
  assert max(array_sizes(jaxpr.jaxpr)) <= 16 * length


def array_sizes(jaxpr):
  """The number of elements of every array of a jaxpr."""
  for equation in jaxpr.eqns:
    yield from (variable.aval.size for variable in equation.outvars)
    for inner in core.jaxprs_in_params(equation.params):
      yield from array_sizes(inner)


@pytest.mark.parametrize('tiles, length, clamped', [
    ((128, 128), 4096, (128, 128)), ((128, 128), 100, (104, 104)), ((512, 128), 200, (256, 128)),
    ((128, 512), 200, (128, 256)), ((64, 64), 1, (8, 8)), ((256, 64), 40, (40, 40))])
def test_clamp_tiles(tiles, length, clamped):
  assert schedule.clamp_tiles(Tiles(*tiles), length) == clamped


@pytest.mark.parametrize('tiles', [(0, 8), (24, 16)])
def test_tiles_that_do_not_nest_are_refused(tiles):
  with pytest.raises(ValueError, match='divide'):
    schedule.clamp_tiles(Tiles(*tiles), 64)


def test_padding_makes_whole_tiles_that_nobody_visits():
  tiles, x = Tiles(8, 16), np.ones((1, 9, 1, 4))
  *arrays, marks = schedule.whole_tiles(x, x, x, schedule.token_marks(blocks.from_lengths([[[5, 4]]], 9)), tiles)
  assert {x.shape for x in arrays} == {(1, 16, 1, 4)}
  touched, full = schedule.tile_masks(marks, tiles)
  assert touched.tolist() == [[[True], [True]]] and not full.any()


@pytest.mark.parametrize('impl, platform', [('xla', 'cpu'), ('xla', 'gpu'), ('xla', 'tpu'), ('xla', 'metal'), ('tpu', 'tpu'),
                                            ('gpu', 'gpu')])
@pytest.mark.parametrize('length', [256, 32768])
@pytest.mark.parametrize('head_dim', [32, 128, 256])
def test_default_tiles_nest(impl, platform, length, head_dim):
  tiles = default(impl, platform, length, head_dim)
  assert schedule.clamp_tiles(tiles, 10 ** 6) == tiles
