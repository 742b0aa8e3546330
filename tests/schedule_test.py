"""The tile schedule against the dense mask: nothing missed, nothing visited in vain, nothing wrongly called full."""

import functools

import jax
import layout_cases
import numpy as np
import pytest
from hypothesis import example, given, settings
from jax.extend import core

from blockattn import blocks
from blockattn.kernels import schedule
from blockattn.kernels.tiles import Tiles, default

ROWS, LENGTH = 2, 64
TILES = [Tiles(8, 8), Tiles(16, 8), Tiles(8, 32), Tiles(64, 64)]
several = settings(max_examples=40, deadline=None, derandomize=True, database=None)

dense_mask = jax.jit(blocks.may_attend)
tile_masks = jax.jit(schedule.tile_masks, static_argnums=1)
list_visits = jax.jit(schedule.list_visits)
list_work = jax.jit(schedule.list_work)
list_tiles = jax.jit(schedule.list_tiles)
visited_tiles = jax.jit(schedule.visited_tiles)


@jax.jit
def mask_by_marks(layout):
  query_marks, key_marks = schedule.token_marks(layout)
  return jax.vmap(lambda q, k: schedule.pair_mask(q[:, :, None], k[:, None], 0, 0))(query_marks, key_marks)


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
  """Both orders hold the touched tiles, and diagonal ones for sides that nobody else visits."""
  touched, full = map(np.asarray, tile_masks(layout, tiles))
  rows, n, m = touched.shape
  start = lambda size: np.arange(size) * (LENGTH // size)
  on_diagonal = ((start(n)[:, None] < start(m) + LENGTH // m) & (start(m) < start(n)[:, None] + LENGTH // n))[None]
  work = list_work(touched, full)
  for listed, axes in ((work.by_query, (0, 1, 2)), (work.by_key, (0, 2, 1))):
    owner, other = (np.asarray(x)[:int(listed.count)] for x in (listed.owner, listed.other))
    assert (np.diff(owner) >= 0).all() and len(listed.owner) == rows * schedule.most_visits(n, m)
    assert set(owner) == set(range(rows * (m if axes[1] == 2 else n)))
    own, spare = (x.transpose(axes) for x in (touched, np.broadcast_to(on_diagonal, touched.shape)))
    at = owner // own.shape[1], owner % own.shape[1], other >> schedule.FLAG_BITS
    assert len(set(zip(*at))) == len(owner) and own[at].sum() == own.sum() and (own | spare)[at].all()
    np.testing.assert_array_equal(other & schedule.PARTIAL == 0, full.transpose(axes)[at])
    changes = np.diff(owner) > 0
    np.testing.assert_array_equal(other & schedule.FIRST != 0, np.concatenate([[True], changes]))
    np.testing.assert_array_equal(other & schedule.LAST != 0, np.concatenate([changes, [True]]))


@several
@given(layout=layout_cases.layouts(ROWS, LENGTH))
def test_tile_lists_say_what_the_masks_say(layout):
  touched, full = map(np.asarray, tile_masks(layout, TILES[1]))
  visited = np.asarray(visited_tiles(touched))
  assert visited.any(axis=1).all() and visited.any(axis=2).all()
  for axes in ((0, 1, 2), (0, 2, 1)):
    visit, whole = (x.transpose(axes).reshape(-1, x.transpose(axes).shape[2]) for x in (visited, full))
    lists = list_tiles(visited.transpose(axes), full.transpose(axes))
    np.testing.assert_array_equal(lists.total, visit.sum(axis=1))
    assert (np.diff(lists.total[lists.order]) <= 0).all() and sorted(lists.order.tolist()) == list(range(len(visit)))
    for owner, (partial, total) in enumerate(zip(lists.partial.tolist(), lists.total.tolist())):
      np.testing.assert_array_equal(lists.index[owner, :partial], np.flatnonzero(visit[owner] & ~whole[owner]))
      np.testing.assert_array_equal(lists.index[owner, partial:total], np.flatnonzero(whole[owner]))


@pytest.mark.parametrize('cut', [schedule.Cut(), schedule.Cut(1, 4), schedule.Cut(3, 2)], ids=str)
@several
@given(layout=layout_cases.layouts(ROWS, LENGTH))
def test_pieces_make_up_the_lists(cut, layout):
  """Every entry of every list once, and the longest lists are those that are cut."""
  touched, full = tile_masks(layout, TILES[1])
  lists = list_tiles(visited_tiles(touched), full)
  pieces = [tuple(map(int, schedule.piece(n, lists.order, lists.total, cut))) for n in range(len(lists.order) + cut.spare)]
  entries = sorted((owner, i) for owner, first, count in pieces for i in range(first, first + count))
  assert entries == [(owner, i) for owner, total in enumerate(lists.total.tolist()) for i in range(total)]
  longest = np.repeat(lists.order[:cut.owners], cut.pieces).tolist()
  assert [owner for owner, _, _ in pieces[:len(longest)]] == longest


@functools.partial(jax.jit, static_argnames='count')
def work_of_part(touched, full, first, count):
  return schedule.list_work(touched, full, (first, count))


@pytest.mark.parametrize('tiles', TILES[:3], ids=str)
@several
@given(layout=layout_cases.layouts(ROWS, LENGTH))
def test_work_of_a_part_of_the_queries(tiles, layout):
  """By query the part's rows of the masks, by key every key once."""
  touched, full = map(np.asarray, tile_masks(layout, tiles))
  n, m = touched.shape[1] // 2, touched.shape[2]
  work = work_of_part(touched, full, n, n)
  visited = np.asarray(visited_tiles(touched))[:, n:]
  for listed, per_row, axes in ((work.by_query, n, (0, 1, 2)), (work.by_key, m, (0, 2, 1))):
    owner, other = (np.asarray(x)[:int(listed.count)] for x in (listed.owner, listed.other))
    found = np.zeros(visited.transpose(axes).shape, bool)
    found[owner // per_row, owner % per_row, other >> schedule.FLAG_BITS] = True
    assert found.sum() == len(owner) and set(owner) == set(range(ROWS * per_row))
    extra = found.transpose(axes) & ~visited   # keys that nobody visits, listed at the first query tile
    assert (found.transpose(axes) | ~visited).all()
    assert not extra[:, 1:].any() and not (extra[:, 0] & visited.any(axis=1)).any()
  assert int(work.by_query.count) == visited.sum()


def test_boundaries_are_traced():
  count = functools.partial(jax.jit(lambda layout: schedule.tile_masks(layout, TILES[0])[0].sum()))
  one, many = count(packed([[64]], [[64]])), count(packed([[8] * 8], [[8] * 8]))
  assert (one, many) == (2 * 36, 2 * 15)
  assert count.func._cache_size() == 1


def test_nothing_grows_with_the_square_of_the_tokens():
  """The largest array of the whole schedule is per token or per tile."""
  length, tiles = 2048, Tiles(256, 256)
  layout = blocks.from_lengths([[[length]]], length)
  masks = lambda layout: schedule.tile_masks(layout, tiles)
  jaxpr = jax.make_jaxpr(lambda layout: (schedule.token_marks(layout), schedule.list_visits(*masks(layout)),
                                         schedule.list_work(*masks(layout))))(layout)
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
  layout = schedule.pad_layout(blocks.from_lengths([[[5, 4]]], 9), Tiles(8, 16))
  assert layout.doc.shape == (1, 16)
  touched, full = schedule.tile_masks(layout, Tiles(8, 16))
  assert touched.tolist() == [[[True], [True]]] and not full.any()


@pytest.mark.parametrize('impl, platform', [('xla', 'cpu'), ('xla', 'gpu'), ('xla', 'tpu'), ('xla', 'metal'), ('tpu', 'tpu'),
                                            ('gpu', 'gpu')])
@pytest.mark.parametrize('length', [256, 32768])
@pytest.mark.parametrize('head_dim', [32, 128, 256])
def test_default_tiles_nest(impl, platform, length, head_dim):
  tiles = default(impl, platform, length, head_dim)
  assert schedule.clamp_tiles(tiles, 10 ** 6) == tiles
