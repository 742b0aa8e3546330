"""The transformer: who can influence whom, measured by gradients; a plain numpy model beside it; parameters, sizes."""

import dataclasses
import functools

import hf_cases
import jax
import jax.numpy as jnp
import layout_cases
import numpy as np
import pytest
from hypothesis import example, given, settings, strategies as st

from blockattn import blocks, mesh as mesh_lib, tree
from blockattn.models import lora, sizes, spec as spec_lib, transformer
from blockattn.models.transformer import Compute, ModelConfig

ALL = pytest.mark.parametrize('name', hf_cases.MODELS)
# Every switch at once.
FULL = ModelConfig('qwen3', vocab=40, width=16, layers=3, heads=4, kv_heads=2, head_dim=6, mlp=24, qk_norm=True,
                   attention_bias=True, mlp_bias=True, learned_sinks=2)
REFERENCE = Compute(impl='reference')

# Information flow.

LENGTH = 20
BLOCK = st.tuples(st.integers(1, 4), st.sampled_from(layout_cases.KINDS))
DOCS = st.lists(st.tuples(st.lists(BLOCK, min_size=1, max_size=6), st.booleans()), min_size=1, max_size=3)
SHORT_BLOCKS = st.tuples(st.integers(0, 2), DOCS).map(lambda row: layout_cases.build([row], LENGTH))
EVERY_KIND = (1, [([(2, kind) for kind in (*layout_cases.KINDS, 'context')], True)])
SMALL = ModelConfig('llama', vocab=LENGTH * LENGTH, width=8, layers=1, heads=2, kv_heads=1, head_dim=4, mlp=8)


@functools.partial(jax.jit, static_argnums=(2, 3))
def influence(params, layout, cfg, compute):
  """|d out[t] / d in[s]|, summed over the width: [T, T].

  All rows are the same document with embeddings of their own; row t is asked for its output t, so that one backward
  pass gives the whole matrix.
  """
  layout = jax.tree.map(lambda x: jnp.broadcast_to(x, (LENGTH, LENGTH)), layout)
  tokens = jnp.arange(LENGTH * LENGTH, dtype=jnp.int32).reshape(LENGTH, LENGTH)
  direction = jax.random.normal(jax.random.key(1), (cfg.width,))

  def outputs(embed):
    x_BTD = transformer.apply(params | {'embed': embed}, tokens, layout, cfg, compute)
    return jnp.einsum('ttd,d->', x_BTD, direction)

  one_document = params['embed'][:LENGTH]
  grads = jax.grad(outputs)(jnp.tile(one_document, (LENGTH, 1)))
  return jnp.abs(grads.reshape(LENGTH, LENGTH, cfg.width)).sum(axis=-1)


def closure(mask, layers):
  """Who can influence whom through so many layers; a token always keeps its own state."""
  step = (mask | np.eye(len(mask), dtype=bool)).astype(int)
  return np.linalg.matrix_power(step, layers) > 0


@pytest.mark.parametrize('impl, layers', [('reference', 1), ('xla', 3)])
@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(layout=SHORT_BLOCKS)
@example(layout=layout_cases.build([EVERY_KIND], LENGTH))
@example(layout=blocks.from_lengths([[(4, 3, 5), (2, 4)]], LENGTH))
@example(layout=blocks.from_lengths([[(3, 4, 4, 5)]], LENGTH, shared_first=True))
def test_influence_is_what_may_attend_allows(impl, layers, layout):
  cfg = dataclasses.replace(SMALL, layers=layers)
  params = hf_cases.random_params(cfg, 'float32')
  seen = closure(layout_cases.naive_mask(layout)[0], layers)
  layout = blocks.with_positions(layout, 'sequential')
  tiles = None if impl == 'reference' else (8, 8)
  np.testing.assert_array_equal(influence(params, layout, cfg, Compute(impl=impl, tiles=tiles)) != 0, seen)


# A plain model beside it.

def naive_norm(x, scale, eps):
  return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * scale


def naive_frequencies(cfg):
  """One pair at a time, by wavelength, as Llama 3.1's own code has it."""
  frequencies = []
  for i in range(0, cfg.head_dim, 2):
    frequency = 1.0 / cfg.rope_theta ** (i / cfg.head_dim)
    if cfg.rope_scaling is not None:
      s, wavelength = cfg.rope_scaling, 2 * np.pi / frequency
      if wavelength > s.original_length / s.low_freq_factor:
        frequency /= s.factor
      elif wavelength >= s.original_length / s.high_freq_factor:
        smooth = (s.original_length / wavelength - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
        frequency = (1 - smooth) * frequency / s.factor + smooth * frequency
    frequencies.append(frequency)
  return np.array(frequencies)


def naive_rotate(x_TH, positions, cfg):
  """Every pair as a complex number, turned by its angle."""
  half = cfg.head_dim // 2
  turned = (x_TH[:, :half] + 1j * x_TH[:, half:]) * np.exp(1j * np.outer(positions, naive_frequencies(cfg)))
  return np.concatenate([turned.real, turned.imag], axis=-1)


def naive_attention(h_TD, w, mask_TS, positions, cfg):
  out_TD = np.zeros_like(h_TD)
  for n in range(cfg.heads):
    shared = n // (cfg.heads // cfg.kv_heads)
    q, k, v = (h_TD @ w[name][:, head] for name, head in (('q', n), ('k', shared), ('v', shared)))
    if cfg.attention_bias:
      q, k, v = q + w['q_bias'][n], k + w['k_bias'][shared], v + w['v_bias'][shared]
    if cfg.qk_norm:
      q, k = naive_norm(q, w['q_norm'], cfg.norm_eps), naive_norm(k, w['k_norm'], cfg.norm_eps)
    q, k = naive_rotate(q, positions, cfg), naive_rotate(k, positions, cfg)
    for t in range(len(q)):
      keys = np.flatnonzero(mask_TS[t])
      if keys.size:
        scores = k[keys] @ q[t] / np.sqrt(cfg.head_dim)
        weights = np.exp(scores - scores.max())
        out_TD[t] += weights / weights.sum() @ v[keys] @ w['o'][n]
  return out_TD + w['o_bias'] if cfg.output_bias else out_TD


def naive_mlp(h_TD, w, cfg):
  gate, up = h_TD @ w['gate'], h_TD @ w['up']
  if cfg.mlp_bias:
    gate, up = gate + w['gate_bias'], up + w['up_bias']
  down = gate / (1 + np.exp(-gate)) * up @ w['down']
  return down + w['down_bias'] if cfg.mlp_bias else down


def naive_logits(params, tokens, mask_TS, positions, cfg):
  """Logits [T, V] of one row in float64, layer by layer, head by head, token by token."""
  params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  table = np.concatenate([params['embed'], params['sinks']]) if cfg.learned_sinks else params['embed']
  x_TD = table[tokens]
  for i in range(cfg.layers):
    w = {name: values[i] for name, values in params['layers'].items()}
    x_TD = x_TD + naive_attention(naive_norm(x_TD, w['attn_norm'], cfg.norm_eps), w, mask_TS, positions, cfg)
    x_TD = x_TD + naive_mlp(naive_norm(x_TD, w['mlp_norm'], cfg.norm_eps), w, cfg)
  x_TD = naive_norm(x_TD, params['final_norm'], cfg.norm_eps)
  return x_TD @ (params['embed'] if cfg.tied else params['head']).T


@functools.partial(jax.jit, static_argnums=(3, 4))
def logits(params, tokens, layout, cfg, compute=REFERENCE):
  return transformer.logits(params, transformer.apply(params, tokens, layout, cfg, compute), cfg)


def padded(tokens, layout, length):
  """Rows made longer, so that one compiled program serves a test's layouts."""
  pad = lambda x: np.pad(np.asarray(x), ((0, 0), (0, length - x.shape[1])))
  return pad(tokens), jax.tree.map(pad, layout)


@ALL
def test_teacher_and_student_are_the_plain_model(name):
  cfg = dataclasses.replace(hf_cases.MODELS[name], learned_sinks=2 if name in ('qwen3_tied', 'llama_rope') else 0)
  params = hf_cases.random_params(cfg, 'float32')
  sinks = (cfg.vocab, cfg.vocab + 1) if cfg.learned_sinks else (3,)
  docs = ((5, 4, 3), (6, 2))
  total, length = sum(map(sum, docs)), 32
  layout = blocks.from_lengths([docs], 22, positions='local')
  tokens = np.random.default_rng(1).integers(cfg.vocab, size=(1, 22), dtype=np.int32)
  run = lambda tokens, layout: np.asarray(logits(params, *padded(tokens, layout, length), cfg))[0]
  close = functools.partial(np.testing.assert_allclose, atol=1e-4, rtol=1e-4)

  # The teacher: each document by itself under the plain causal mask, whatever its blocks and their positions.
  teacher, start = run(tokens, blocks.as_one_block(layout)), 0
  for size in map(sum, docs):
    own = tokens[0, start:start + size]
    plain = naive_logits(params, own, np.tril(np.ones((size, size), bool)), np.arange(size), cfg)
    assert np.abs(plain).max() > 1, 'logits too small for the comparison to mean anything'
    close(teacher[start:start + size], plain)
    start += size

  # A document of one block is in block mode, without sinks, what it is for the teacher.
  one_block = blocks.from_lengths([[(sum(doc),) for doc in docs]], 22)
  options = blocks.BlockOptions(sinks, 'local', max_blocks=5)
  student_tokens, student_layout, index = blocks.block_mode(tokens, one_block, dataclasses.replace(options, sink_ids=()))
  np.testing.assert_array_equal(run(student_tokens, student_layout)[index[0]][:total], teacher[:total])

  # The student: sinks, the block mask, local positions.
  student_tokens, student_layout, index = blocks.block_mode(tokens, layout, options)
  mask = layout_cases.naive_mask(student_layout)[0]
  plain = naive_logits(params, np.asarray(student_tokens)[0], mask, np.asarray(student_layout.position)[0], cfg)
  student = run(student_tokens, student_layout)
  close(student[:len(plain)], plain)
  assert np.abs(student[index[0]][5:12] - teacher[5:12]).max() > 0.1   # tokens that miss what the teacher sees


# How it is computed never changes what is computed.

@functools.partial(jax.jit, static_argnums=(3, 4))
def value_and_gradients(params, tokens, layout, cfg, compute):
  def loss(params):
    x_BTD = transformer.apply(params, tokens, layout, cfg, compute)
    present = (layout.doc != 0)[..., None]
    return jnp.sum(jnp.where(present, jnp.sin(transformer.logits(params, x_BTD, cfg)), 0)), x_BTD
  return jax.value_and_grad(loss, has_aux=True)(params)


def block_case(cfg):
  """Two packed rows in block mode with two sinks."""
  layout = blocks.from_lengths([[(5, 4, 3), (4, 3)], [(9, 6)]], 20)
  tokens = np.random.default_rng(2).integers(cfg.vocab, size=layout.doc.shape, dtype=np.int32)
  return blocks.block_mode(tokens, layout, blocks.BlockOptions((cfg.vocab, cfg.vocab + 1), 'sequential', 6))[:2]


def test_remat_and_impl_change_nothing():
  params = hf_cases.random_params(FULL, 'float32')
  case = block_case(FULL)
  (expected, expected_x), expected_grads = value_and_gradients(params, *case, FULL, REFERENCE)
  for name, grad in tree.named_leaves(expected_grads):
    assert np.any(grad), f'{name} is not used'
  for compute in (Compute(impl='xla'), Compute(impl='xla', remat='none'), Compute(impl='reference', remat='full'),
                  Compute(impl='reference', remat='offload')):
    (value, x_BTD), grads = value_and_gradients(params, *case, FULL, compute)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(x_BTD, expected_x, atol=1e-4)
    for (name, got), want in zip(tree.named_leaves(grads), jax.tree.leaves(expected_grads), strict=True):
      np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max(), rtol=1e-3, err_msg=name)


@pytest.mark.parametrize('axes', [{}, {'data': 2, 'tensor': 2, 'context': 2}])
@pytest.mark.parametrize('options', [lora.NONE, lora.LoraOptions(rank=2)])
def test_remat_of_all_but_dots_multiplies_nothing_again(options, axes):
  """Attention included, on one device and on a mesh. Of a matrix of low rank the first product, a few numbers a token, is
  made again."""
  cfg = dataclasses.replace(FULL, learned_sinks=0)
  tokens = jnp.zeros((2, 32), jnp.int32)
  layout = jax.tree.map(lambda x: jnp.concatenate([x, x]), blocks.from_lengths([[(8, 8, 16)]], 32))
  placement = mesh_lib.Placement(mesh_lib.make_mesh(axes, jax.local_devices()[:8 if axes else 1]))
  whole = spec_lib.abstract(transformer.spec(cfg), 'float32')
  trained = spec_lib.abstract(lora.spec(cfg, options), 'float32') if options.rank else whole

  def products(remat):
    compute = Compute(impl='xla', remat=remat, tiles=(8, 8), placement=placement)

    def run(trained, frozen):
      params = lora.attach(frozen, trained, options) if options.rank else trained
      return transformer.apply(params, tokens, layout, cfg, compute).sum()

    return str(jax.make_jaxpr(jax.grad(run))(trained, whole)).count('dot_general')

  again = len(options.targets) if options.rank else 0
  assert products('none') + again == products('dots') < products('full')


def test_bfloat16_is_float32_to_its_rounding():
  """Results of bfloat16 have 8 significant bits: each is wrong by a factor of up to 1 + 2^-8 / 2. A path from the
  embedding to the output goes through one such number for the embedding and two for the final norm and its scale, and
  per layer through 2 norms, 2 scales, q, k or v, a rotation, a head norm and its scale, the attention, its output, gate
  or up, silu, their product, down, 7 parameters or biases on these and 2 sums of the residual stream: 23."""
  params = hf_cases.random_params(FULL, 'float32')
  case = block_case(FULL)
  present = np.asarray(case[1].doc) != 0
  run = jax.jit(transformer.apply, static_argnums=(3, 4))
  exact, rounded = (run(params, *case, FULL, dataclasses.replace(REFERENCE, dtype=d)) for d in ('float32', 'bfloat16'))
  assert rounded.dtype == jnp.bfloat16
  exact, rounded = np.asarray(exact)[present], np.asarray(rounded.astype(jnp.float32))[present]
  error = np.sqrt(np.mean((rounded - exact) ** 2) / np.mean(exact ** 2))
  assert 2.0 ** -10 < error < (3 + 23 * FULL.layers) * 2.0 ** -9
  head = params['head']
  assert transformer.project(head, jnp.asarray(rounded[0], jnp.bfloat16)).dtype == jnp.float32


def test_a_mesh_changes_nothing():
  cfg = dataclasses.replace(FULL, heads=4, kv_heads=2, mlp=24, vocab=40)
  params = hf_cases.random_params(cfg, 'float32')
  tokens, layout = (jax.tree.map(lambda x: jnp.concatenate([x, x[::-1]]), x) for x in block_case(cfg))
  placement = mesh_lib.Placement(mesh_lib.make_mesh({'data': 2, 'fsdp': 2, 'tensor': 2}))
  specs = transformer.spec(cfg)
  placed = jax.device_put(params, spec_lib.shardings(specs, placement.mesh, placement.rules))
  assert placed['layers']['q'].addressable_shards[0].data.shape == (3, 8, 2, 6)   # embed over fsdp, heads over tensor
  got = logits(placed, *placement.put_batch((tokens, layout)), cfg, Compute(impl='xla', placement=placement))
  np.testing.assert_allclose(got, logits(params, tokens, layout, cfg), atol=1e-4)


@pytest.mark.parametrize('change, message', [
    ({'family': 'gpt2'}, "model family 'gpt2'; choose one of qwen3, qwen2, llama"),
    ({'kv_heads': 3}, '4 query heads cannot share 3 key/value heads evenly'),
    ({'head_dim': 7}, 'head_dim 7 is odd; rotary positions need pairs')])
def test_architectures_that_cannot_be(change, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(FULL, **change)


def test_unknown_remat_is_refused():
  with pytest.raises(ValueError, match="remat='some'; choose one of none, dots, full"):
    Compute(remat='some')


# Parameters.

@ALL
def test_parameters_are_as_the_spec_says(name):
  specs = transformer.spec(hf_cases.MODELS[name])
  params = jax.eval_shape(lambda: spec_lib.init(specs, jax.random.key(0), 'bfloat16'))
  facts = lambda x: (x.shape, x.dtype)
  assert jax.tree.map(facts, params) == jax.tree.map(facts, spec_lib.abstract(specs, 'bfloat16'))
  assert spec_lib.count(specs) == sum(x.size for x in jax.tree.leaves(params))


@functools.partial(jax.jit, static_argnums=(1, 2))
def first_values(key, cfg, names):
  layers = transformer.spec(cfg)['layers']
  params = spec_lib.init({'layers': {name: layers[name] for name in names}}, key, 'float32')
  return params['layers']


def test_first_values_depend_on_the_key_and_the_name_alone():
  names = ('attn_norm', 'down', 'o_bias', 'up')
  full = first_values(jax.random.key(0), FULL, names)
  few = first_values(jax.random.key(0), dataclasses.replace(FULL, attention_bias=False), ('attn_norm', 'up'))
  other = first_values(jax.random.key(1), FULL, names)
  for name, values in few.items():
    np.testing.assert_array_equal(values, full[name])
  assert all(np.any(full[name] != other[name]) for name in ('down', 'up'))
  assert np.any(full['down'].ravel() != full['up'].ravel())
  assert np.all(full['attn_norm'] == 1) and not np.any(full['o_bias'])
  for name, fan_in in {'up': FULL.width, 'down': 2 * FULL.layers * FULL.mlp}.items():
    np.testing.assert_allclose(np.std(full[name]), fan_in ** -0.5, rtol=0.1)


def test_shardings_and_axes_that_cannot_be_cut():
  mesh = mesh_lib.make_mesh({'fsdp': 2, 'tensor': 4})
  cfg = dataclasses.replace(FULL, kv_heads=4)
  shardings = spec_lib.shardings(transformer.spec(cfg), mesh, mesh_lib.RULES)
  assert shardings['layers']['down'].spec == jax.sharding.PartitionSpec(None, 'tensor', 'fsdp')
  assert shardings['sinks'].is_fully_replicated
  abstract = spec_lib.abstract(transformer.spec(cfg), 'float32', mesh_lib.Placement(mesh))
  assert abstract['layers']['down'].sharding == shardings['layers']['down']
  with pytest.raises(ValueError, match="layers/k: axis 'kv_heads' of size 2 cannot be cut into 4 parts; change"):
    spec_lib.shardings(transformer.spec(FULL), mesh, mesh_lib.RULES)


def test_shape_and_axes_belong_together():
  with pytest.raises(ValueError, match=r"shape \(2, 3\) and axes \('vocab',\) differ in length"):
    spec_lib.ParamSpec((2, 3), ('vocab',))


# Named sizes.

def by_arithmetic(vocab, width, layers, heads, kv_heads, head_dim, mlp, *, tied, qk_norm, bias):
  attention = width * head_dim * (2 * heads + 2 * kv_heads) + (2 * head_dim if qk_norm else 0) + (
      head_dim * (heads + 2 * kv_heads) if bias else 0)
  return layers * (attention + 3 * width * mlp + 2 * width) + width + vocab * width * (1 if tied else 2)


@pytest.mark.parametrize('size, published, facts', [
    ('smollm2_135m', 134_515_008, (49152, 576, 30, 9, 3, 64, 1536)),
    ('qwen3_0_6b', 596_049_920, (151936, 1024, 28, 16, 8, 128, 3072)),
    ('qwen3_1_7b', 1_720_574_976, (151936, 2048, 28, 16, 8, 128, 6144)),
    ('qwen3_4b', 4_022_468_096, (151936, 2560, 36, 32, 8, 128, 9728)),
    ('qwen3_4b_instruct_2507', 4_022_468_096, (151936, 2560, 36, 32, 8, 128, 9728)),
    ('qwen3_8b', 8_190_735_360, (151936, 4096, 36, 32, 8, 128, 12288)),
    ('qwen25_0_5b', 494_032_768, (151936, 896, 24, 14, 2, 64, 4864)),
    ('qwen25_1_5b', 1_543_714_304, (151936, 1536, 28, 12, 2, 128, 8960)),
    ('qwen25_7b', 7_615_616_512, (152064, 3584, 28, 28, 4, 128, 18944)),
    ('llama32_1b', 1_235_814_400, (128256, 2048, 16, 32, 8, 64, 8192)),
    ('llama31_8b', 8_030_261_248, (128256, 4096, 32, 32, 8, 128, 14336))])
def test_sizes_have_as_many_parameters_as_published(size, published, facts):
  cfg = sizes.get(size)
  assert spec_lib.count(transformer.spec(cfg)) == published
  assert by_arithmetic(*facts, tied=cfg.tied, qk_norm=cfg.family == 'qwen3', bias=cfg.family == 'qwen2') == published


def test_no_size_is_left_out():
  (parametrized,) = test_sizes_have_as_many_parameters_as_published.pytestmark
  assert {size for size, *_ in parametrized.args[1]} == set(sizes.SIZES)


def test_sizes_by_name():
  assert sizes.get('qwen3_4b', layers=2).layers == 2
  with pytest.raises(ValueError, match="no model size 'qwen3_0.6b'; did you mean 'qwen3_0_6b'?"):
    sizes.get('qwen3_0.6b')
  with pytest.raises(ValueError, match='known: llama31_8b, llama32_1b'):
    sizes.get('zebra')
