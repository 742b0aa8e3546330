"""One suite for every implementation of block attention: the float32 reference says what is right."""

import collections
import functools
import math
import re
import types

import jax
import jax.numpy as jnp
import layout_cases
import numpy as np
import pytest
from hypothesis import example, given, settings, strategies as st
from jax.experimental.pallas import mosaic_gpu as plgpu

from blockattn import blocks
from blockattn.kernels import api, cached, context_parallel, gpu, schedule, tpu, xla
from blockattn.kernels.tiles import Tiles, dividing

B, T, N, K, H = 2, 44, 4, 2, 16   # T is not a multiple of any tile
CASES = {   # (impl, tiles, dtype)
    'xla-8x8': ('xla', (8, 8), 'float32'),
    'xla-16x8': ('xla', (16, 8), 'float32'),
    'xla-8x32': ('xla', (8, 32), 'float32'),
    'xla-one-tile': ('xla', None, 'float32'),
    'xla-bfloat16': ('xla', (8, 16), 'bfloat16'),
    'tpu-8x8': ('tpu', (8, 8), 'float32'),
    'tpu-16x8': ('tpu', (16, 8), 'float32'),
    'tpu-8x32-bfloat16': ('tpu', (8, 32), 'bfloat16'),
}
gpu_interpreter = pytest.mark.skipif(not hasattr(plgpu, 'InterpretGPUParams'),
                                     reason='this jax has no public interpreter for GPU kernels')
several = settings(max_examples=20, deadline=None, derandomize=True, database=None)
every_case = pytest.mark.parametrize('case', CASES)
# The GPU's interpreter is too slow for this suite; see test_gpu_kernels_in_the_interpreter.
every_impl = pytest.mark.parametrize('impl', [impl for impl in api.IMPLS if impl != 'gpu'])


def attention(impl, tiles):
  """f(q, k, v, layout), in Pallas' interpreter where the kernels' own device is absent."""
  if impl == 'tpu' and jax.default_backend() != 'tpu':
    return lambda q, k, v, layout: tpu.attention(q, k, v, schedule.token_marks(layout), Tiles(*tiles), interpret=True)[0]
  return functools.partial(api.block_attention, impl=impl, tiles=tiles if jax.default_backend() == 'cpu' else None)


@functools.cache
def with_lse(impl):
  if impl == 'tpu':
    return jax.jit(lambda q, k, v, layout: tpu.attention(q, k, v, schedule.token_marks(layout), Tiles(8, 8), interpret=True))
  return jax.jit(functools.partial(api.block_attention_and_lse, impl=impl, tiles=(8, 8)))


def tolerance(dtype, expected):
  """Largest allowed difference from the float32 reference, which starts from the same inputs.

  A value passes through at most four roundings to `dtype` (the weights, the gradient of the scores, the output, and the
  output as the backward pass reads it), and through float32 sums of T terms; both are relative to the largest value.
  """
  rounding = 4 * float(jnp.finfo(dtype).eps) + T * float(jnp.finfo('float32').eps)
  return rounding * max(1.0, float(np.abs(expected).max()))


@functools.cache
def compiled(impl, tiles, dtype):
  """f(layout, q, k, v, grad) -> float32 (output, dq, dk, dv) of inputs rounded to `dtype`, one program per case."""
  @jax.jit
  def run(layout, *arrays):
    *inputs, grad = (x.astype(dtype) for x in arrays)
    out, pull = jax.vjp(lambda *x: attention(impl, tiles)(*x, layout), *inputs)
    assert out.dtype == inputs[0].dtype
    return [x.astype(jnp.float32) for x in (out, *pull(grad))]
  return run


@functools.cache
def arrays(rows=B, length=T, dtype='float32'):
  """q, k, v and the gradient of the output, rounded to `dtype`, in float32."""
  random = np.random.default_rng(0)
  shapes = [(rows, length, heads, H) for heads in (N, K, K, N)]
  return [np.asarray(random.normal(size=shape).astype(jnp.dtype(dtype)), np.float32) for shape in shapes]


@every_case
@several
@given(layout=layout_cases.layouts(B, T))
@example(layout=blocks.from_lengths([[[10, 1, 1, 20, 12]], [[8, 8], [16], [5]]], T, shared_first=True))
@example(layout=blocks.from_lengths([[], [[1] * T]], T))
def test_agrees_with_the_reference(case, layout):
  impl, tiles, dtype = CASES[case]
  results = compiled(impl, tiles, dtype)(layout, *arrays(dtype=dtype))
  expected = compiled('reference', None, 'float32')(layout, *arrays(dtype=dtype))
  for name, result, wanted in zip(('output', 'dq', 'dk', 'dv'), results, expected):
    np.testing.assert_allclose(result, wanted, rtol=0, atol=tolerance(dtype, wanted), err_msg=name)


def dense(inputs, allowed, rounded=lambda x: x):
  """(output, dq, dk, dv) in float64; `rounded` does to a value what storing or multiplying it in the inputs' dtype does."""
  q, k, v, grad = (x.astype(np.float64) for x in inputs)
  grouped = lambda x: x.reshape(*k.shape[:3], -1, k.shape[3])   # the query heads by the key head that they share
  q, grad = grouped(q), grouped(grad)
  scores = np.where(allowed[:, None, None], np.einsum('btkgh,bskh->bkgts', q, k) * k.shape[3] ** -0.5, -1e30)
  weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
  total = weights.sum(axis=-1, keepdims=True)
  out = rounded(np.einsum('bkgts,bskh->btkgh', rounded(weights), v) / np.moveaxis(total, 3, 1))
  weights /= total
  mean = np.einsum('btkgh,btkgh->bkgt', out, grad)
  slopes = rounded(weights * (np.einsum('btkgh,bskh->bkgts', grad, v) - mean[..., None])) * k.shape[3] ** -0.5
  dq, dk = np.einsum('bkgts,bskh->btkgh', slopes, k), np.einsum('bkgts,btkgh->bskh', slopes, q)
  dv = np.einsum('bkgts,btkgh->bskh', rounded(weights), grad)
  heads = lambda x: x.reshape(inputs[0].shape)
  return heads(out), heads(rounded(dq)), rounded(dk), rounded(dv)


@pytest.mark.parametrize('impl', ['xla', 'tpu', pytest.param('gpu', marks=gpu_interpreter)])
def test_large_scores_cost_no_precision(impl):
  """In bfloat16 errors are those of the roundings that cannot be saved. Of queries or scores none may be rounded again: such
  an error grows with the scores and is, by the softmax, one of the weights."""
  length = 256
  random = np.random.default_rng(0)
  q, k, v, grad = (random.normal(size=(1, length, heads, 64)).astype('bfloat16') for heads in (2, 1, 1, 2))
  layout = blocks.from_lengths([[[70, 90, 96]]], length)

  @jax.jit
  def run(q, k, v, grad):
    out, pull = jax.vjp(lambda *x: attend(*x, layout), q, k, v)
    return out, *pull(grad)

  attend = attention(impl, (64, 64))
  if impl == 'gpu':
    attend = lambda *x: gpu.attention(*x[:3], schedule.token_marks(layout), Tiles(128, 64),
                                      interpret=plgpu.InterpretGPUParams())[0]
  error = lambda x, wanted: np.sqrt(np.mean((np.asarray(x, np.float64) - wanted) ** 2))
  for spread in (36,) if impl == 'gpu' else (1, 9, 36):   # standard deviation of the scores; that interpreter is slow
    inputs = (q * spread).astype('bfloat16'), k, v, grad
    allowed = layout_cases.naive_mask(layout)
    exact, best = dense(inputs, allowed), dense(inputs, allowed, lambda x: x.astype('bfloat16').astype(np.float64))
    for part, result, least, wanted in zip(('output', 'dq', 'dk', 'dv'), run(*inputs), best, exact):
      assert error(result, wanted) <= 1.1 * error(least, wanted), f'{part}, scores of {spread}'


def test_float32_is_not_rounded_by_matrix_units():
  """Every product of the programs that XLA makes asks for float32; the default is bfloat16 on a TPU and TF32 on a GPU."""
  layout = blocks.from_lengths([[[9, 20, 8]], [[10], [5, 6, 7]]], T)

  def both(impl):
    return lambda *x: jax.vjp(lambda *x: attention(impl, (8, 8))(*x, layout), *x)[1](x[0])

  attend_cached = lambda q, k, v: cached.merge(*(part[None] for part in cached.attend_cached(
      q, cached.slots_of(k.transpose(0, 2, 3, 1)[None], v.swapaxes(1, 2)[None], 0), jnp.ones((B, T), bool))))
  for run in (both('reference'), both('xla'), attend_cached):
    text = jax.jit(run).lower(*arrays()[:3]).as_text()
    products = [line for line in text.splitlines() if 'dot_general' in line]
    assert len(products) >= 3 and all(line.count('HIGHEST') == 2 for line in products)


@every_impl
@several
@given(layout=layout_cases.layouts(B, T))
def test_padding_rows_are_exactly_zero(impl, layout):
  nobody = np.asarray(layout.doc) == 0
  run = compiled(impl, None if impl == 'reference' else (8, 8), 'float32')
  for name, result in zip(('output', 'dq', 'dk', 'dv'), run(layout, *arrays())):
    np.testing.assert_array_equal(np.asarray(result)[nobody], 0, err_msg=name)
    assert np.isfinite(result).all(), name


@every_impl
@several
@given(layout=layout_cases.layouts(B, T), t=st.integers(0, T - 1))
def test_gradients_flow_exactly_where_the_mask_allows(impl, layout, t):
  """Token t's output alone: zero gradient by the keys and values that it does not see, and by no other value."""
  q, k, v, grad = arrays()
  only_t = np.zeros_like(grad)
  only_t[:, t] = grad[:, t]
  run = compiled(impl, None if impl == 'reference' else (8, 8), 'float32')
  _, dq, dk, dv = (np.abs(x).max(axis=(2, 3)) for x in run(layout, q, k, v, only_t))
  sees = layout_cases.naive_mask(layout)[:, t]
  assert not dq[np.arange(T)[None].repeat(B, 0) != t].any()
  assert not dk[~sees].any()
  np.testing.assert_array_equal(dv != 0, sees)


@every_impl
@several
@given(layout=layout_cases.layouts(B, T))
def test_the_logsumexp_of_the_scores(impl, layout):
  q, k, v, _ = arrays()
  out, lse = with_lse(impl)(q, k, v, layout)
  lse = np.where((np.asarray(layout.doc) != 0)[..., None], lse, -np.inf)   # the interpreted kernels leave that to the api
  run = compiled(impl, None if impl == 'reference' else (8, 8), 'float32')
  np.testing.assert_array_equal(out, run(layout, *arrays())[0])
  scores = np.einsum('btngh,bsnh->btngs', q.reshape(B, T, K, N // K, H), k) * H ** -0.5
  weights = np.where(layout_cases.naive_mask(layout)[:, :, None, None], np.exp(scores), 0)
  with np.errstate(divide='ignore'):
    np.testing.assert_allclose(lse, np.log(weights.sum(axis=-1)).reshape(B, T, N), rtol=0, atol=1e-5)


@every_impl
@several
@given(layout=layout_cases.layouts(B, T))
def test_gradients_of_the_logsumexp(impl, layout):
  """With those of the output, as merging needs them; in padding, where it is minus infinity, none are asked for."""
  q, k, v, grad = arrays()
  slope = np.where((np.asarray(layout.doc) != 0)[..., None], grad[..., 0], 0).astype(np.float32)
  for name, result, wanted in zip('qkv', pulled(impl)(layout, q, k, v, grad, slope),
                                  pulled('reference')(layout, q, k, v, grad, slope)):
    np.testing.assert_allclose(result, wanted, rtol=0, atol=tolerance('float32', wanted), err_msg=name)


@functools.cache
def pulled(impl):
  return jax.jit(lambda layout, q, k, v, *grads: jax.vjp(lambda *x: with_lse(impl)(*x, layout), q, k, v)[1](grads))


@every_impl
def test_what_a_token_does_not_see_cannot_change_it(impl):
  doc = [(9, 'context'), (7, 'isolated'), (5, 'removed'), (12, 'context')]
  layout = layout_cases.build([(2, [(doc, True)])] * B, T)
  q, k, v, grad = arrays()
  run = compiled(impl, None if impl == 'reference' else (8, 8), 'float32')
  before = run(layout, q, k, v, grad)[0]
  seen = layout_cases.naive_mask(layout)
  for t in (3, 15, 20, 34):
    shout = np.where(seen[:, t, :, None, None], 0, 1e4).astype(np.float32)
    after = run(layout, q, k + shout, v + shout, grad)[0]
    np.testing.assert_array_equal(after[:, t], before[:, t])


@every_case
def test_is_deterministic_and_never_recompiles_for_new_boundaries(case):
  run = compiled(*CASES[case])
  layouts = [blocks.from_lengths(rows, T) for rows in ([[[T]], [[4] * 11]], [[[1, 43]], [[20], [20]]], [[], []])]
  first = run(layouts[0], *arrays())
  for layout in layouts:
    run(layout, *arrays())
  for one, again in zip(first, run(layouts[0], *arrays())):
    np.testing.assert_array_equal(one, again)
  assert run._cache_size() == 1


@pytest.mark.parametrize('impl', ['xla'])   # of the others the compiler's count says nothing in an interpreter
def test_memory_grows_linearly_with_the_length(impl):
  def temporary_bytes(length):
    shapes = [jax.ShapeDtypeStruct((1, length, heads, H), jnp.float32) for heads in (N, K, K, N)]
    layout = blocks.from_lengths([[[length]]], length)
    run = compiled(impl, (64, 64), 'float32')
    return run.lower(layout, *shapes).compile().memory_analysis().temp_size_in_bytes
  short, long = temporary_bytes(1024), temporary_bytes(4096)
  assert long < 5 * short
  assert long < 4 * 4096 * 4096   # less than one float32 matrix of scores


def test_inside_a_layer_scan_with_remat():
  layout = blocks.from_lengths([[[9, 20, 8]], [[10], [5, 6, 7]]], T)
  q, k, v, grad = arrays()

  @functools.partial(jax.jit, static_argnums=0)
  def gradients(impl, q, k, v):
    def layer(x, scale):
      return x + api.block_attention(x * scale, k, v, layout, impl=impl, tiles=(16, 16)), None
    stack = lambda q: jax.lax.scan(jax.checkpoint(layer), q, jnp.arange(1.0, 4.0))[0]
    return jax.grad(lambda q: (stack(q) * grad).sum())(q)

  expected = gradients('reference', q, k, v)
  np.testing.assert_allclose(gradients('xla', q, k, v), expected, rtol=0, atol=3 * tolerance('float32', expected))


def test_the_schedule_is_computed_once_for_all_layers():
  """The compiler moves it out of the loop over layers, so that nobody has to compute it beforehand and hand it down."""
  length = 256
  layout = blocks.from_lengths([[[100, 156]], [[256]]], length)
  inputs = [jax.ShapeDtypeStruct((2, length, heads, H), jnp.float32) for heads in (N, K, K)]

  def loss(q, k, v, layout):
    layer = lambda x, _: (x + api.block_attention(x, k, v, layout, impl='xla', tiles=(64, 64)), None)
    return jax.lax.scan(layer, q, None, length=3)[0].sum()

  program = jax.jit(jax.grad(loss)).lower(*inputs, jax.tree.map(jnp.asarray, layout)).compile().as_text()
  sorting = [part for part in re.split(r'\n(?=%|ENTRY)', program) if ' sort(' in part]   # one part per computation
  assert len(sorting) == 1 and sorting[0].startswith('ENTRY')


@pytest.mark.skipif(jax.device_count() < 4, reason='needs four devices')
def test_on_a_mesh_each_device_computes_its_part():
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ('data', 'tensor'))
  layout = blocks.from_lengths([[[9, 20, 8]], [[10], [5, 6, 7]]], T)
  split = functools.partial(api.block_attention_on_mesh, mesh=mesh, batch_axes=('data',), head_axes=('tensor',))

  @jax.jit
  def run(layout, *arrays):
    out, pull = jax.vjp(lambda q, k, v: split(q, k, v, layout, impl='xla', tiles=(8, 8)), *arrays[:3])
    return out, *pull(arrays[3])

  place = lambda x, *axes: jax.device_put(x, jax.NamedSharding(mesh, jax.P(*axes)))
  inputs = [place(x, 'data', None, 'tensor') for x in arrays()]
  layout = jax.tree.map(lambda x: place(x, 'data'), layout)
  for result, wanted in zip(run(layout, *inputs), compiled('reference', None, 'float32')(layout, *arrays())):
    np.testing.assert_allclose(result, wanted, rtol=0, atol=tolerance('float32', wanted))
  program = run.lower(layout, *inputs).compile().as_text()
  assert not any(word in program for word in ('all-gather', 'all-reduce', 'all-to-all', 'collective-permute'))


@pytest.mark.skipif(jax.device_count() < 8, reason='needs eight devices')
@pytest.mark.parametrize('impl, far', [('xla', 0), ('xla', 16), ('xla', None), ('tpu', 16)])
@several
@given(layout=layout_cases.layouts(B, 64))
@example(layout=blocks.from_lengths([[[40, 8, 16]], [[2, 30], [3, 20, 9]]], 64))   # blocks over parts, readers at all places
@example(layout=blocks.from_lengths([[[12, 12, 12, 13, 15]], [[16, 16, 31, 1]]], 64, shared_first=True))
def test_context_parallelism_gives_the_same(impl, far, layout):
  """Rows over two, tokens over four devices; outputs and gradients."""
  inputs = arrays(length=64)
  for result, wanted in zip(sharded(impl, far)(layout, *inputs), compiled('reference', None, 'float32')(layout, *inputs)):
    np.testing.assert_allclose(result, wanted, rtol=0, atol=tolerance('float32', wanted))


@several
@given(layout=layout_cases.layouts(B, 64))
def test_who_reads_beyond_the_part_before(layout):
  mask = layout_cases.naive_mask(layout)
  for length in (8, 16, 32):
    before = np.arange(64) < np.maximum(np.arange(64)[:, None] // length - 1, 0) * length
    beyond = context_parallel.reach_beyond(schedule.token_marks(layout), length)
    np.testing.assert_array_equal(beyond, (mask & before).any(axis=-1))


@pytest.mark.skipif(jax.device_count() < 8, reason='needs eight devices')
def test_what_is_communicated_grows_with_the_part_and_the_readers():
  """Bytes of the collectives of the branch for block mode, by device, against those that gather the row."""
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:8]), ('context',))
  place = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, jax.P(None, 'context')))
  layout = jax.tree.map(lambda x: place((1, 8192), x.dtype), blocks.from_lengths([[[8192]]], 8192))
  inputs = [place((1, 8192, heads, 64), jnp.float32) for heads in (4, 4, 4)]
  attend = lambda far: jax.jit(lambda layout, *x: api.block_attention_on_mesh(
      *x, layout, mesh, context_axes=('context',), impl='xla', tiles=(128, 128), far_queries=far))
  sizes = {far: collectives(attend(far).lower(layout, *inputs).compile().as_text()) for far in (0, 128)}
  row = 8192 * 4 * 64 * 4
  assert sizes[0]['all-gather'] == 2 * row
  assert sizes[128]['collective-permute'] == 2 * row / 8
  assert sizes[128]['all-reduce'] == 2 * 128 * 4 * 64 * 4


def collectives(program):
  """Bytes of the float32 results with four axes, what heads have, by kind of collective."""
  found = collections.Counter()
  for line in program.splitlines():
    if match := re.search(r'= (.*?) (all-gather|all-reduce|collective-permute)(?:-start)?\(', line):
      for shape in re.findall(r'f32\[(\d+(?:,\d+){3})\]', match[1]):
        found[match[2]] += 4 * math.prod(map(int, shape.split(',')))
  return found


@functools.cache
def sharded(impl, far):
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:8]).reshape(2, 2, 2), ('data', 'context', 'more'))

  @jax.jit
  def run(layout, *arrays):
    attend = lambda *x: api.block_attention_on_mesh(*x, layout, mesh, batch_axes=('data',), impl='xla',
                                                    context_axes=('context', 'more'), tiles=(8, 16), far_queries=far)
    if impl == 'tpu' and jax.default_backend() != 'tpu':
      kernel = functools.partial(context_parallel.attention, functools.partial(tpu.attention, interpret=True),
                                 axes=('context', 'more'), others=('data',), far_queries=far, tiles=None,
                                 own_tiles=Tiles(8, 16))
      spec = jax.P('data', ('context', 'more'))
      attend = lambda *x: jax.shard_map(kernel, mesh=mesh, in_specs=(spec,) * 4, out_specs=spec, check_vma=False)(*x, layout)
    out, pull = jax.vjp(attend, *arrays[:3])
    return out, *pull(arrays[3])
  return run


@pytest.mark.parametrize('impl', ['xla', 'tpu'])
@several
@given(layout=layout_cases.layouts(B, 64))
def test_parts_of_the_queries_make_up_the_whole(impl, layout):
  """What each device of a sharded sequence computes: its queries' outputs and gradients, and its share of the keys'."""
  inputs = arrays(length=64)
  parts = [part_of(impl)(first, layout, *inputs) for first in (0, 16, 32, 48)]
  out, dq = (np.concatenate([part[i] for part in parts], axis=1) for i in (0, 1))
  dk, dv = (sum(part[i] for part in parts) for i in (2, 3))
  expected = compiled('reference', None, 'float32')(layout, *inputs)
  for name, result, wanted in zip(('output', 'dq', 'dk', 'dv'), (out, dq, dk, dv), expected):
    np.testing.assert_allclose(result, wanted, rtol=0, atol=tolerance('float32', wanted), err_msg=name)


@functools.cache
def part_of(impl):
  """f(first, layout, q, k, v, grad) for the 16 queries from `first` on."""
  attend = xla.attention if impl == 'xla' else functools.partial(tpu.attention, interpret=jax.default_backend() != 'tpu')

  def part(q, k, v, layout, first):
    marks = schedule.token_marks(layout)
    own = jax.lax.dynamic_slice_in_dim(marks.query, first, 16, axis=2)
    return attend(q, k, v, schedule.Marks(own, marks.key, first), Tiles(8, 16))[0]

  @jax.jit
  def run(first, layout, q, k, v, grad):
    q, grad = (jax.lax.dynamic_slice_in_dim(x, first, 16, axis=1) for x in (q, grad))
    out, pull = jax.vjp(lambda *x: part(*x, layout, first), q, k, v)
    return out, *pull(grad)
  return run


@pytest.mark.skipif(jax.device_count() < 4, reason='needs four devices')
def test_what_cannot_be_divided_over_the_sequence_is_refused():
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ('context',))
  layout = blocks.from_lengths([[], []], T)
  with pytest.raises(ValueError, match=r'11 queries, \d+ keys: .* must be a multiple of the query tile 8'):
    jax.eval_shape(lambda *x: api.block_attention_on_mesh(*x, layout, mesh, context_axes=('context',), impl='xla',
                                                          tiles=(8, 8)), *arrays()[:3])
  with pytest.raises(ValueError, match='cannot divide the sequence'):
    api.block_attention_on_mesh(*arrays()[:3], layout, mesh, context_axes=('context',), impl='reference')


@pytest.mark.parametrize('length, row, tiles', [(8448, 33792, (256, 512)), (512, 4096, (512, 512)), (48, 96, (16, 32)),
                                                (1000, 3000, (16, 16))])
def test_tiles_of_a_part_divide_it(length, row, tiles):
  assert dividing(Tiles(512, 512), length, row) == tiles


def test_mesh_axes_that_do_not_divide_are_refused():
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ('data',))
  three = jax.sharding.AbstractMesh((3,), ('tensor',))
  layout = blocks.from_lengths([[], []], T)
  with pytest.raises(ValueError, match="'rows' does not exist; the mesh has data"):
    api.block_attention_on_mesh(*arrays()[:3], layout, mesh, batch_axes=('rows',))
  with pytest.raises(ValueError, match='4 query heads cannot be divided'):
    api.block_attention_on_mesh(*arrays()[:3], layout, three, head_axes=('tensor',))


gpu_layouts = {
    'one document': lambda length: blocks.from_lengths([[[40, 1, 70, length - 121]]], length, shared_first=True),
    'several documents': lambda length: blocks.from_lengths([[[30, 50], [64], [length - 200, 20, 30]]], length),
    'every kind of block': lambda length: layout_cases.build(
        [(2, [([(60, kind) for kind in ('context', 'isolated', 'hidden', 'holes')] + [(20, 'context')], True)])], length),
}


@gpu_interpreter
@pytest.mark.parametrize('name, cut', [*((name, gpu.Cut()) for name in gpu_layouts),
                                       ('every kind of block', gpu.Cut(owners=1, pieces=3))])
def test_gpu_kernels_in_the_interpreter(name, cut):
  """Lists, copies, barriers and arithmetic; matrix products are plain ones there."""
  length, heads, shared, width = 250, 2, 1, 64
  random = np.random.default_rng(1)
  q, k, v, grad = (random.normal(size=(1, length, n, width)).astype('bfloat16') for n in (heads, shared, shared, heads))
  layout = gpu_layouts[name](length)

  def run(attend, dtype):
    out, pull = jax.vjp(attend, *(jnp.asarray(x, dtype) for x in (q, k, v)))
    return [np.asarray(x, np.float32) for x in (out, *pull(jnp.asarray(grad, dtype)))]

  # Tile sizes that differ between the passes, and more visits than there are buffers.
  kernels = jax.jit(lambda *x: gpu.attention(*x, schedule.token_marks(layout), Tiles(128, 64), cut=cut,
                                             interpret=plgpu.InterpretGPUParams())[0])
  expected = run(lambda *x: api.block_attention(*x, layout, impl='reference'), jnp.float32)
  for part, result, wanted in zip(('output', 'dq', 'dk', 'dv'), run(kernels, jnp.bfloat16), expected):
    np.testing.assert_allclose(result, wanted, rtol=0, atol=tolerance('bfloat16', wanted), err_msg=part)


@gpu_interpreter
def test_a_part_of_the_queries_in_the_gpu_interpreter():
  """The second of three tiles, its keys in more pieces than it has tiles of keys."""
  length, first, width = 384, 128, 64
  random = np.random.default_rng(1)
  q, k, v = (random.normal(size=(1, length, heads, width)).astype('bfloat16') for heads in (2, 1, 1))
  grad = np.zeros((1, length, 2, width), 'bfloat16')
  grad[:, first:first + 128] = random.normal(size=(1, 128, 2, width))
  layout = gpu_layouts['every kind of block'](length)

  def run(attend, q, grad, dtype):
    out, pull = jax.vjp(attend, *(jnp.asarray(x, dtype) for x in (q, k, v)))
    return [np.asarray(x, np.float32) for x in (out, *pull(jnp.asarray(grad, dtype)))]

  own = slice(first, first + 128)
  marks = schedule.token_marks(layout)
  marks = schedule.Marks(marks.query[:, :, own], marks.key, first)
  kernels = jax.jit(lambda *x: gpu.attention(*x, marks, Tiles(128, 64), cut=gpu.Cut(1, 5),
                                             interpret=plgpu.InterpretGPUParams())[0])
  results = run(kernels, q[:, own], grad[:, own], jnp.bfloat16)
  expected = run(lambda *x: api.block_attention(*x, layout, impl='reference'), q, grad, jnp.float32)
  expected[:2] = (x[:, own] for x in expected[:2])
  for part, result, wanted in zip(('output', 'dq', 'dk', 'dv'), results, expected):
    np.testing.assert_allclose(result, wanted, rtol=0, atol=tolerance('bfloat16', wanted), err_msg=part)


def random_layout(seed: int, length: int) -> blocks.BlockLayout:
  """Documents of blocks of every kind, from one token to a few hundred."""
  random = np.random.default_rng(seed)
  docs, left = [], length - int(random.integers(100))
  while left > 0:
    sizes = [int(min(left, 1 + random.integers(1, 300) * random.integers(2))) for _ in range(random.integers(1, 9))]
    docs.append(([(size, str(random.choice(('context', *layout_cases.KINDS)))) for size in sizes], bool(random.integers(2))))
    left -= sum(sizes)
  return layout_cases.build([(int(random.integers(20)), docs)], length)


@functools.cache
def on_device(impl, dtype, cut=None):
  """f(layout, q, k, v, grad) -> float32 (output, dq, dk, dv); `cut` divides the lists of the GPU kernels so."""
  def attend(q, k, v, layout):
    if cut is None:
      return api.block_attention(q, k, v, layout, impl=impl)
    return gpu.attention(q, k, v, schedule.token_marks(layout), Tiles(128, 128), cut=cut)[0]

  @jax.jit
  def run(layout, *arrays):
    *inputs, grad = (x.astype(dtype) for x in arrays)
    out, pull = jax.vjp(lambda *x: attend(*x, layout), *inputs)
    return [x.astype(jnp.float32) for x in (out, *pull(grad))]
  return run


@pytest.mark.device
@pytest.mark.parametrize('width', [64, 128])
@pytest.mark.parametrize('cut', [None, gpu.Cut(owners=4, pieces=3)], ids=['whole', 'split'])
@pytest.mark.parametrize('name', [*gpu_layouts, *range(6)])
def test_kernels_on_their_device(name, cut, width):
  """The accelerator's own kernels against the float32 reference, twice, bit for bit the same: named and random layouts, the
  lists of the last readers whole and divided over thread blocks."""
  impl, length, heads, shared = jax.default_backend(), 1500, 8, 2
  if cut is not None and impl != 'gpu':
    pytest.skip('only the GPU kernels divide lists')
  random = np.random.default_rng(1)
  shapes = [(1, length, n, width) for n in (heads, shared, shared, heads)]
  arrays = [random.normal(size=shape).astype('bfloat16') for shape in shapes]
  layout = jax.tree.map(jnp.asarray, random_layout(name, length) if isinstance(name, int) else gpu_layouts[name](length))
  expected = on_device('reference', 'float32')(layout, *arrays)
  results, again = (on_device(impl, 'bfloat16', cut)(layout, *arrays) for _ in range(2))
  for part, result, same, wanted in zip(('output', 'dq', 'dk', 'dv'), results, again, expected):
    np.testing.assert_allclose(result, wanted, rtol=0, atol=tolerance('bfloat16', wanted), err_msg=part)
    np.testing.assert_array_equal(result, same, err_msg=part)


@pytest.mark.parametrize('attend, platform, target', [
    (lambda *x: tpu.attention(*x, Tiles(128, 256))[0], 'tpu', 'tpu_custom_call'),
    (lambda *x: gpu.attention(*x, Tiles(128, 128))[0], 'cuda', 'mosaic_gpu')], ids=['tpu', 'gpu'])
def test_kernels_lower_for_their_platform(attend, platform, target):
  """Forward, dq and dkv as kernels, from a machine without the device."""
  shapes = [jax.ShapeDtypeStruct((2, 300, heads, 128), jnp.bfloat16) for heads in (N, K, K)]
  layout = blocks.from_lengths([[], []], 300)
  both = lambda q, k, v, layout: jax.vjp(lambda *x: attend(*x, schedule.token_marks(layout)), q, k, v)[1](q)
  checks = [jax.export.DisabledSafetyCheck.custom_call(name) for name in ('mosaic_gpu_v2', 'tpu_custom_call')]
  exported = jax.export.export(jax.jit(both), platforms=[platform], disabled_checks=checks)(*shapes, layout)
  calls = exported.mlir_module().count(f'@{target}') + exported.mlir_module().count(f'call_target_name = "{target}')
  assert calls == 3


@pytest.mark.parametrize('platform, fastest', [('cpu', 'xla'), ('gpu', 'xla'), ('tpu', 'tpu')])
def test_resolve(platform, fastest):
  assert api.resolve('auto', platform) == fastest
  assert api.resolve('reference', platform) == 'reference'
  with pytest.raises(ValueError, match='auto, reference, xla'):
    api.resolve('dense', platform)


def test_kernels_are_refused_elsewhere():
  with pytest.raises(ValueError, match='\'tpu\' does not run on gpu; use impl="auto" or impl="xla"'):
    api.resolve('tpu', 'gpu')


@pytest.mark.parametrize('dtype, head_dim, tiles, says', [
    ('float32', 64, (128, 128), 'float32 with head_dim 64: .* use impl="xla"'),
    ('bfloat16', 96, (128, 128), 'bfloat16 with head_dim 96: .* use impl="xla"'),
    ('bfloat16', 64, (64, 128), '128 queries by a multiple of 64 keys')])
def test_what_a_gpu_cannot_do_is_said(dtype, head_dim, tiles, says):
  layout = blocks.from_lengths([[], []], 256)
  shapes = [jax.ShapeDtypeStruct((B, 256, heads, head_dim), jnp.dtype(dtype)) for heads in (N, K, K)]
  with pytest.raises(ValueError, match=says):
    jax.eval_shape(lambda *x: gpu.attention(*x, schedule.token_marks(layout), Tiles(*tiles)), *shapes)


def device(platform, kind=None, capability=None):
  return types.SimpleNamespace(platform=platform, device_kind=kind or platform, compute_capability=capability)


H200, B200 = device('gpu', 'NVIDIA H200', '9.0'), device('gpu', 'NVIDIA B200', '10.0')


@pytest.mark.parametrize('impl, where, says', [
    ('auto', device('cpu'), 'xla (auto on cpu)'), ('auto', device('tpu'), 'tpu (auto on tpu)'),
    ('auto', B200, 'xla (auto on gpu: NVIDIA B200 has compute capability 10.0; impl="gpu" needs 9.0 (H100, H200))'),
    ('auto', H200, 'xla (auto on gpu: impl="gpu" runs on NVIDIA H200 only if asked for)'),
    ('gpu', H200, 'gpu (as asked)'), ('xla', B200, 'xla (as asked)'), ('reference', device('tpu'), 'reference (as asked)')])
def test_a_run_says_which_attention_computes_and_why(impl, where, says):
  assert str(api.choose(impl, where)) == f'attention: {says}'


@pytest.mark.parametrize('capability', ['8.0', '10.0'])
def test_other_gpus_are_refused(capability, monkeypatch):
  other, refusal = device('gpu', 'NVIDIA X', capability), f'NVIDIA X has compute capability {capability}; .* use impl='
  with pytest.raises(ValueError, match=refusal):
    api.choose('gpu', other)
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  monkeypatch.setattr(jax, 'devices', lambda: [other])
  with pytest.raises(ValueError, match=refusal):   # and where nobody chose at the start
    gpu.attention(*[jnp.zeros((1, 128, 1, 64), jnp.bfloat16)] * 3, None, Tiles(128, 128))


@pytest.mark.parametrize('length, head_dim, tiles, says', [
    (256, 192, (128, 128), 'head_dim 192: .* use impl="xla"'),
    (256, 128, (64, 64), r'tiles \(64, 64\): here sizes must be multiples of 128'),
    (65536, 128, (128, 128), 'the scalar memory of a TPU core holds 98304. Use larger tiles')])
def test_what_a_tpu_cannot_do_is_said(length, head_dim, tiles, says):
  layout = blocks.from_lengths([[], []], length)
  with pytest.raises(ValueError, match=says):
    jax.eval_shape(lambda *x: tpu.attention(*x, schedule.token_marks(layout), Tiles(*tiles)),
                   *(jax.ShapeDtypeStruct((B, length, heads, head_dim), jnp.float32) for heads in (N, K, K)))


@pytest.mark.parametrize('q, k, v, layout, says', [
    ((B, T, 3, H), (B, T, 2, H), (B, T, 2, H), (B, T), 'N must be a multiple of K'),
    ((B, T, N, H), (B, T, K, 8), (B, T, K, 8), (B, T), 'keys and values must be'),
    ((B, T, N, H), (B, T, K, H), (B, T, 1, H), (B, T), 'keys and values must be'),
    ((B, T, N, H), (B, T + 1, K, H), (B, T + 1, K, H), (B, T), 'keys and values must be'),
    ((B, T, H), (B, T, H), (B, T, H), (B, T), r'must be \[B, T, N, H\]'),
    ((B, T, N, H), (B, T, K, H), (B, T, K, H), (B, T + 4), 'pad the layout and the tokens alike'),
])
def test_wrong_shapes_are_refused(q, k, v, layout, says):
  zeros = [jnp.zeros(shape) for shape in (q, k, v)]
  with pytest.raises(ValueError, match=says):
    api.block_attention(*zeros, blocks.from_lengths([[]] * layout[0], layout[1]))


def test_mixed_dtypes_are_refused():
  q, k, v, _ = (jnp.asarray(x) for x in arrays())
  with pytest.raises(ValueError, match='cast them to one'):
    api.block_attention(q.astype(jnp.bfloat16), k, v, blocks.from_lengths([[], []], T))
