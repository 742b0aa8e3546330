"""Chunked token losses against the formula over whole rows, their memory, and the optimizer."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blockattn import losses, optim
from blockattn.models import transformer

B, T, D, V = 2, 12, 6, 11
CHUNKS = (4, 5, 64)   # dividing T, not dividing it, more than there is
WEIGHTS = {'relu': losses.TokenWeights(cap=0.7), 'relu_teacher': losses.TokenWeights(source='teacher', floor=0.3),
           'exp': losses.TokenWeights('exp', cap=0.5), 'exp_teacher': losses.TokenWeights('exp', 'teacher'),
           'none': losses.TokenWeights('none'), 'on_ce': losses.TokenWeights(on='ce'),
           'on_kl_of_documents': losses.TokenWeights(on='kl', mean='document'),
           'softmax_of_documents': losses.TokenWeights('exp', 'teacher', cap=0.5, mean='document')}


def draw(*shape, seed=0, scale=1.0):
  return (scale * np.random.default_rng((seed, *shape)).standard_normal(shape)).astype(np.float32)


def case(student_vocab=V + 3, teacher_vocab=V):
  """heads, hidden, targets of a distillation; logits of a few nats, tables padded to different sizes."""
  heads = {'student': draw(student_vocab, D, seed=1), 'teacher': draw(teacher_vocab, D, seed=2)}
  hidden = {'student': draw(B, T, D, seed=3), 'teacher': draw(B, T, D, seed=4), 'teacher_block': draw(B, T, D, seed=5)}
  targets = np.random.default_rng(6).integers(min(student_vocab, teacher_vocab), size=(B, T), dtype=np.int32)
  return heads, hidden, targets


DOCUMENTS = np.array([[1] * 5 + [2] * 4 + [0] * 3, [1] * 9 + [2] * 3], np.int32)
POSITIONS = np.random.default_rng(8).integers(T, size=(B, T), dtype=np.int32)
MASKS = {'all': np.ones((B, T), bool), 'none': np.zeros((B, T), bool), 'one': np.arange(B * T).reshape(B, T) == 15,
         'some': np.random.default_rng(7).random((B, T)) < 0.4,
         'one_row': np.arange(B)[:, None] * np.ones((1, T), bool) == 1}


def by(head):
  """Logits of hidden states by a matrix."""
  return jax.tree_util.Partial(transformer.project, head)


@functools.partial(jax.jit, static_argnames=('weights', 'kind', 'chunk'))
def _chunked(heads, hidden, targets, mask, temperature, ce_weight, *, weights, kind, chunk):
  def loss(heads, hidden):
    student = losses.Reading(by(heads['student']), hidden['student'])
    teacher = losses.Reading(by(heads['teacher']), hidden['teacher'], hidden.get('teacher_block'))
    sums = losses.distillation_sums(student, teacher, targets, POSITIONS, mask, chunk=chunk, temperature=temperature,
                                    weights=weights, ce_weight=ce_weight, kind=kind, document=DOCUMENTS)
    return sums['loss'], sums
  return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(heads, hidden)


def chunked(heads, hidden, targets, mask, weights, temperature=1.0, ce_weight=0.3, chunk=5, kind='forward'):
  """((loss, sums), gradients with respect to heads and hidden); compiled once per weights, kind and chunk."""
  if weights.source == 'student':
    hidden = {name: x for name, x in hidden.items() if name != 'teacher_block'}
  return _chunked(heads, hidden, targets, mask, temperature, ce_weight, weights=weights, kind=kind, chunk=chunk)


def log_softmax(logits):
  logits = np.asarray(logits, np.float64)
  logits = logits - logits.max(axis=-1, keepdims=True)
  return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def naive_divergence(kind, p, q):
  """Of log-probabilities [V]."""
  kl = lambda a, b: float(np.sum(np.exp(a) * (a - b)))
  middle = np.log((np.exp(p) + np.exp(q)) / 2)
  return {'forward': kl(p, q), 'reverse': kl(q, p), 'jsd': (kl(p, middle) + kl(q, middle)) / 2}[kind]


def naive_sums(heads, hidden, targets, mask, weights, temperature, ce_weight, kind='forward'):
  """The sums by the formula, in float64, token by token."""
  vocab = min(len(heads['student']), len(heads['teacher']))
  sums = dict.fromkeys(('weight_sum', 'weight_sq', 'at_floor', 'at_cap', 'tokens', 'kl', 'ce', 'teacher_ce', 'gap'), 0.0)
  sums |= {'kl_at': np.zeros(losses.POSITION_BINS), 'tokens_at': np.zeros(losses.POSITION_BINS)}
  found = []   # (document, w, divergence, cross-entropy)
  for at in zip(*np.nonzero(mask), strict=True):
    logits = {name: heads[name.split('_')[0]][:vocab].astype(np.float64) @ x_BTD[at] for name, x_BTD in hidden.items()}
    student, teacher = logits['student'], logits['teacher']
    blocked = logits['teacher_block'] if weights.source == 'teacher' else student
    p, q = log_softmax(teacher / temperature), log_softmax(student / temperature)
    x = targets[at]
    gap = log_softmax(teacher)[x] - log_softmax(blocked)[x]
    w = {'relu': weights.floor + min(max(gap, 0), weights.cap), 'exp': np.exp(min(gap, weights.cap)),
         'none': 1.0}[weights.form]
    kl, ce = naive_divergence('forward', p, q), -log_softmax(student)[x]
    found.append(((at[0], DOCUMENTS[at]), w, temperature ** 2 * naive_divergence(kind, p, q), ce_weight * ce))
    for name, value in {'weight_sum': w, 'weight_sq': w * w, 'tokens': 1.0, 'kl': kl, 'at_floor': gap <= 0,
                        'at_cap': gap >= weights.cap, 'ce': ce, 'teacher_ce': -log_softmax(teacher)[x], 'gap': gap}.items():
      sums[name] += value
    at_bin = next(i for i in range(7, -1, -1) if i == 0 or POSITIONS[at] >= T * 2.0 ** (i - 8))
    sums['kl_at'][at_bin] += kl
    sums['tokens_at'][at_bin] += 1
  return sums | naive_loss(found, weights, sums)


def naive_loss(found, weights, sums):
  if weights.mean == 'document':
    means = {document: np.mean([w for other, w, *_ in found if other == document]) for document, *_ in found}
    found = [(document, w / means[document], *terms) for document, w, *terms in found]
  loss = sum((w if weights.on != 'ce' else 1) * kl + (w if weights.on != 'kl' else 1) * ce for _, w, kl, ce in found)
  whole = weights.on == 'both' and weights.mean == 'batch'
  return {'loss': loss, 'weight': sums['weight_sum'] if whole else sums['tokens']}


@pytest.mark.parametrize('weights, kind', [*((w, 'forward') for w in WEIGHTS.values()),
                                           (WEIGHTS['relu'], 'reverse'), (WEIGHTS['relu'], 'jsd')],
                         ids=[*WEIGHTS, 'reverse', 'jsd'])
def test_distillation_is_the_formula(weights, kind):
  heads, hidden, targets = case()
  for (name, mask), (temperature, ce_weight) in itertools.product(MASKS.items(), [(1.0, 0.0), (2.5, 0.3)]):
    (_, sums), _ = chunked(heads, hidden, targets, mask, weights, temperature, ce_weight, kind=kind)
    expected = naive_sums(heads, hidden, targets, mask, weights, temperature, ce_weight, kind)
    assert sums.keys() == expected.keys()
    for key in sums:
      np.testing.assert_allclose(sums[key], expected[key], rtol=2e-5, atol=1e-5, err_msg=f'{name}: {key}')


@functools.partial(jax.jit, static_argnames='kind')
@functools.partial(jax.grad, argnums=(0, 1))
def dense_gradients(student_head, x_BTD, fixed, targets, weight, temperature, ce_weight, kind):
  """Gradients of the loss with all logits at once and the weights (of the divergence, of the cross-entropy) constant."""
  student, teacher = x_BTD @ student_head[:V].T, fixed
  p, q = (jax.nn.log_softmax(x / temperature) for x in (teacher, student))
  m = jnp.log((jnp.exp(p) + jnp.exp(q)) / 2)
  kl = lambda a, b: jnp.sum(jnp.exp(a) * (a - b), axis=-1)
  found = {'forward': lambda: kl(p, q), 'reverse': lambda: kl(q, p), 'jsd': lambda: (kl(p, m) + kl(q, m)) / 2}[kind]()
  ce = -jnp.take_along_axis(jax.nn.log_softmax(student), targets[..., None], axis=-1)[..., 0]
  return jnp.sum(weight[0] * temperature ** 2 * found + weight[1] * ce_weight * ce)


@pytest.mark.parametrize('weights, kind', [*((w, 'forward') for w in WEIGHTS.values()),
                                           (WEIGHTS['relu'], 'reverse'), (WEIGHTS['relu'], 'jsd')],
                         ids=[*WEIGHTS, 'reverse', 'jsd'])
def test_weights_and_teacher_carry_no_gradient(weights, kind):
  heads, hidden, targets = case()
  mask, temperature, ce_weight = MASKS['some'], 1.7, 0.3
  _, grads = chunked(heads, hidden, targets, mask, weights, temperature, ce_weight, kind=kind)

  log_p = {name: log_softmax(hidden[name] @ heads[name.split('_')[0]][:V].T) for name in hidden}
  picked = {name: np.take_along_axis(x, targets[..., None], axis=-1)[..., 0] for name, x in log_p.items()}
  gap = picked['teacher'] - picked['teacher_block' if weights.source == 'teacher' else 'student']
  weight = mask * np.asarray(losses.token_weight(jnp.asarray(gap, jnp.float32), weights))
  if weights.mean == 'document':
    for row, document in {(row, DOCUMENTS[row, t]) for row, t in zip(*np.nonzero(mask))}:
      there = mask[row] & (DOCUMENTS[row] == document)
      weight[row, there] /= weight[row, there].mean()
  weight = [weight if weights.on in (name, 'both') else mask.astype(np.float32) for name in ('kl', 'ce')]
  expected = dense_gradients(heads['student'], hidden['student'], hidden['teacher'] @ heads['teacher'].T, targets,
                             weight, temperature, ce_weight, kind)
  np.testing.assert_allclose(grads[0]['student'], expected[0], rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(grads[1]['student'], expected[1], rtol=1e-4, atol=1e-5)
  assert not np.any(grads[1]['student'][~mask])
  assert not np.any(grads[0]['teacher']) and not np.any(grads[0]['student'][V:])
  assert not any(np.any(g) for name, g in grads[1].items() if name != 'student')


@functools.partial(jax.jit, static_argnames='chunk')
def cross_entropy(head, x_BTD, targets, weight, *, chunk):
  def loss(head, x_BTD):
    sums = losses.cross_entropy_sums(by(head), x_BTD, targets, weight, chunk)
    return sums['loss'], sums
  return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(head, x_BTD)


@jax.jit
@functools.partial(jax.value_and_grad, argnums=(0, 1))
def dense_cross_entropy(head, x_BTD, targets, weight):
  log_p = jax.nn.log_softmax(x_BTD @ head.T)
  return -jnp.sum(weight * jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0])


@pytest.mark.parametrize('chunk', CHUNKS)
def test_chunks_sum_up_to_the_whole(chunk):
  heads, hidden, targets = case()
  head, x_BTD = heads['student'], hidden['student']
  for name, mask in MASKS.items():
    weight = (mask * (0.5 + np.abs(draw(B, T)))).astype(np.float32)
    (loss, sums), grads = cross_entropy(head, x_BTD, targets, weight, chunk=chunk)
    expected, expected_grads = dense_cross_entropy(head, x_BTD, targets, weight)
    np.testing.assert_allclose(loss, expected, rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(sums['weight'], weight.sum(), rtol=1e-6)
    np.testing.assert_allclose(sums['ce'], dense_cross_entropy(head, x_BTD, targets, mask.astype(np.float32))[0],
                               rtol=1e-5)
    assert int(sums['tokens']) == mask.sum()
    for got, want in zip(grads, expected_grads, strict=True):
      np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5, err_msg=name)


def test_chunks_without_a_loss_token_are_not_computed():
  """A token function that counts its calls: the first chunks hold the loss tokens, the others are skipped."""
  calls = []
  def token_fn(heads, hidden, per_token, mask):
    jax.debug.callback(lambda: calls.append(1))
    return {'sum': jnp.sum(jnp.where(mask, hidden[..., 0], 0) * heads)}

  x_BTD = draw(B, T, D)
  run = jax.jit(lambda x, mask: losses.sum_over_tokens(token_fn, jnp.float32(2.0), x, {}, mask, 3))
  for name, chunks in {'all': 4, 'none': 0, 'one': 1, 'one_row': 4}.items():
    total = run(x_BTD, MASKS[name])['sum']
    jax.effects_barrier()
    assert len(calls) == chunks, name
    np.testing.assert_allclose(total, 2 * (x_BTD[..., 0] * MASKS[name]).sum(), rtol=1e-5, atol=1e-6)
    calls.clear()


@pytest.mark.parametrize('name', [name for name, w in WEIGHTS.items() if w.on == 'both' or w.mean == 'document'])
def test_normalised_weights_have_mean_one(name):
  """Where KL + CE of every token is the same, their weighted mean is that number, whatever the weights."""
  heads, hidden, targets = case()
  weights = WEIGHTS[name]
  hidden['student'] = np.zeros((B, T, D), np.float32)   # every token has the same probability
  (_, sums), _ = chunked(heads, hidden, targets, MASKS['some'], weights, 1.0, 1e6)
  np.testing.assert_allclose(sums['loss'] / sums['weight'], 1e6 * np.log(V), rtol=1e-4)
  mean, mean_square = sums['weight_sum'] / sums['tokens'], sums['weight_sq'] / sums['tokens']
  assert mean > 0 and (mean_square > 1.01 * mean ** 2) == (weights.form != 'none')


@pytest.mark.parametrize('form, expected', [
    ('relu', [0.1, 0.1, 1.1, 5.1, 5.1]), ('exp', [np.exp(-2), 1, np.e, np.exp(5), np.exp(5)]), ('none', [1] * 5)])
def test_weight_forms(form, expected):
  gap = jnp.asarray([-2.0, 0.0, 1.0, 5.0, 80.0])
  np.testing.assert_allclose(losses.token_weight(gap, losses.TokenWeights(form)), expected, rtol=1e-6)
  assert not np.any(jax.grad(lambda g: losses.token_weight(g, losses.TokenWeights(form)).sum())(gap))


def test_kl():
  logits = 4 * draw(50, V)
  for temperature in (0.5, 1.0, 3.0):
    assert np.all(losses.divergence(logits, logits + 7.0, temperature) <= 1e-5)   # a constant changes no probability
    kl = losses.divergence(logits, logits[::-1], temperature)
    assert np.all(kl >= 0) and np.all(np.isfinite(kl))
  np.testing.assert_array_equal(losses.divergence(logits, logits, 1.0), 0)
  # Two outcomes by hand: p = (3/4, 1/4), q = (1/2, 1/2).
  kl = losses.divergence(jnp.log(jnp.asarray([3.0, 1.0])), jnp.zeros(2), 1.0)
  np.testing.assert_allclose(kl, 0.75 * np.log(1.5) + 0.25 * np.log(0.5), rtol=1e-6)


def test_either_table_may_be_the_larger():
  weights, mask = WEIGHTS['relu_teacher'], MASKS['some']
  heads, hidden, targets = case(student_vocab=V, teacher_vocab=V + 5)
  (_, sums), _ = chunked(heads, hidden, targets, mask, weights)
  expected = naive_sums(heads, hidden, targets, mask, weights, 1.0, 0.3)
  np.testing.assert_allclose(sums['loss'], expected['loss'], rtol=2e-5)


def temporary_bytes(length, vocab, width, chunk, weights):
  """What the compiled loss and its gradient need beside their arguments and results."""
  f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  rows = lambda dtype: jax.ShapeDtypeStruct((1, length), dtype)
  heads = {'student': f32(vocab, width), 'teacher': f32(vocab, width)}
  hidden = {'student': f32(1, length, width), 'teacher': f32(1, length, width)}
  lowered = _chunked.lower(heads, hidden, rows(jnp.int32), rows(jnp.bool_), 1.0, 0.0, weights=weights,
                           kind='forward', chunk=chunk)
  return lowered.compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize('mean', losses.WEIGHT_MEANS)
def test_logits_of_a_row_never_exist(mean):
  """Twice the tokens and twice the vocabulary: not the logits, nor a copy of the heads for every chunk."""
  length, vocab, width, chunk = 512, 2048, 32, 16
  weights = losses.TokenWeights(mean=mean)
  small, large = (temporary_bytes(times * length, times * vocab, width, chunk, weights) for times in (1, 2))
  of_row, of_heads = 4 * length * vocab, 2 * 4 * vocab * width
  assert small < of_row / 2
  assert large - small < min(of_row / 2, length // chunk * of_heads / 4)


def test_logits_are_made_once_and_only_what_is_trained_gets_a_gradient():
  """Products with a frozen head: logits and the gradient of the hidden states; with one that is trained, its own too."""
  heads, hidden, targets = case()
  def loss(x_BTD, head, of='loss'):
    return losses.cross_entropy_sums(by(head), x_BTD, targets, jnp.ones((B, T)), 5)[of]

  def products(argnums):
    return str(jax.make_jaxpr(jax.grad(loss, argnums))(hidden['student'], heads['student'])).count('dot_general')

  assert products(0) == 2 and products((0, 1)) == 3
  with pytest.raises(TypeError, match="only 'loss' has a gradient"):
    jax.grad(loss)(hidden['student'], heads['student'], 'ce')


def test_the_gradient_of_a_head_of_few_bits_is_added_up_in_float32():
  """1,024 chunks of one token, each of a gradient of 1: in bfloat16 the sum would stay at 256."""
  x_BTD, weight = jnp.ones((1, 1024, 1), jnp.bfloat16), jnp.full((1, 1024), 2.0)
  loss = lambda head: losses.cross_entropy_sums(by(head), x_BTD, jnp.zeros((1, 1024), int), weight, 1)['loss']
  grad = jax.grad(loss)(jnp.zeros((2, 1), jnp.bfloat16))
  assert grad.dtype == jnp.bfloat16
  np.testing.assert_array_equal(grad, [[-1024], [1024]])


@pytest.mark.parametrize('kwargs', [{'form': 'rleu'}, {'source': 'nobody'}, {'on': 'lk'}, {'mean': 'row'}])
def test_unknown_weights_are_refused(kwargs):
  (value,) = kwargs.values()
  with pytest.raises(ValueError, match=f"token weight {next(iter(kwargs))} '{value}'; choose one of"):
    losses.TokenWeights(**kwargs)


@pytest.mark.parametrize('kwargs', [{'source': 'teacher'}, {'on': 'ce'}, {'mean': 'document'}])
def test_what_would_have_no_effect_without_weights_is_refused(kwargs):
  with pytest.raises(ValueError, match="token weight form 'none' has no source"):
    losses.TokenWeights('none', **kwargs)


def test_the_top_of_a_teacher_gives_a_lower_bound_that_grows_to_the_whole():
  heads, hidden, _ = case(V, V)
  teacher, student = (hidden[name] @ heads[name].T for name in ('teacher', 'student'))
  whole = losses.divergence(teacher, student, 2.0)
  log_p = log_softmax(teacher / 2.0)
  order = np.argsort(-log_p, axis=-1)
  before = np.zeros((B, T))
  for k in (1, 2, 5, V // 2, V - 1):
    ids = order[..., :k]
    got = losses.divergence_of_top(np.take_along_axis(log_p, ids, -1).astype(np.float32), ids, student, 2.0)
    p = np.exp(np.take_along_axis(log_p, ids, -1))
    log_q = np.take_along_axis(log_softmax(student / 2.0), ids, -1)
    rest, q_rest = 1 - p.sum(-1), 1 - np.exp(log_q).sum(-1)
    expected = (p * (np.log(p) - log_q)).sum(-1) + rest * (np.log(rest) - np.log(q_rest))
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4)
    assert np.all(got <= whole + 1e-4) and np.all(got >= before - 1e-4)
    before = np.asarray(got)
  np.testing.assert_allclose(before, whole, rtol=1e-3, atol=1e-4)   # one token left: nothing is joined


@pytest.mark.parametrize('ce_weight', (0.0, 0.5))
def test_the_gradient_is_as_large_at_any_temperature(ce_weight):
  """Near the teacher, KL at temperature T is its value at 1 over T^2; what stands beside it does not depend on T."""
  heads, hidden, targets = case(V, V)
  hidden['student'] = np.zeros((B, T, D), np.float32)
  hidden['teacher'] = 1e-2 * hidden['teacher']
  norm = {}
  for temperature in (1.0, 4.0):
    (_, sums), grads = chunked(heads, hidden, targets, MASKS['all'], WEIGHTS['none'], temperature, ce_weight)
    norm[temperature] = np.linalg.norm(grads[1]['student'])
  np.testing.assert_allclose(norm[4.0], norm[1.0], rtol=2e-2)


def test_the_top_of_a_teacher_is_finite_where_nothing_is_left():
  """A student that is sure, a teacher that is sure, and rows of padding, which hold zeros."""
  sure = np.full((1, 4), -1e4, np.float32)
  sure[0, 2] = 1e4
  ids = np.array([[2, 1]])
  for log_p in ([[0.0, -1e4]], [[np.log(0.6), np.log(0.4)]], [[0.0, 0.0]]):
    value, grad = jax.value_and_grad(lambda x, log_p=log_p: losses.divergence_of_top(
        jnp.array(log_p, jnp.float32), ids, x, 1.0).sum())(jnp.asarray(sure))
    assert np.isfinite(value) and np.all(np.isfinite(grad)), log_p


def test_what_is_stored_of_a_teacher_trains_as_the_teacher_does():
  """With all but one of its tokens nothing is lost; sums and gradients are those of the teacher at work."""
  heads, hidden, targets = case(V, V)
  mask, weights = MASKS['some'], losses.TokenWeights('relu', 'teacher', 0.1, 5.0)
  (loss, sums), grads = chunked(heads, hidden, targets, mask, weights, 1.5, 0.3)
  log_p = {name: log_softmax(hidden[name] @ heads['teacher'].T) for name in ('teacher', 'teacher_block')}
  warm = log_softmax(hidden['teacher'] @ heads['teacher'].T / 1.5)
  ids = np.argsort(-warm, axis=-1)[..., :V - 1]
  pick = lambda x: np.take_along_axis(x, targets[..., None], -1)[..., 0].astype(np.float32)
  stored = losses.StoredTeacher(ids, np.take_along_axis(warm, ids, -1).astype(np.float32), pick(log_p['teacher']),
                                pick(log_p['teacher_block']))

  def of_stored(head, x_BTD):
    sums = losses.distillation_sums(losses.Reading(by(head), x_BTD), stored, targets, POSITIONS, mask, weights=weights,
                                    temperature=1.5, ce_weight=0.3, chunk=5)
    return sums['loss'], sums
  (again, stored_sums), own = jax.jit(jax.value_and_grad(of_stored, argnums=(0, 1), has_aux=True))(
      heads['student'], hidden['student'])
  np.testing.assert_allclose(again, loss, rtol=1e-4)
  for name in sums:
    np.testing.assert_allclose(stored_sums[name], sums[name], rtol=1e-3, atol=1e-3, err_msg=name)
  np.testing.assert_allclose(own[0], grads[0]['student'], rtol=1e-3, atol=2e-4)
  np.testing.assert_allclose(own[1], grads[1]['student'], rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize('chunk', (1, 4, 5, T, T + 3))
def test_mapping_over_chunks_gives_every_token_in_its_place(chunk):
  x = draw(B, T, D)
  places = np.arange(B * T, dtype=np.float32).reshape(B, T)
  got = losses.map_chunks(lambda x: {'sum': x[0].sum(-1) + x[1]}, (x, places), chunk)
  np.testing.assert_allclose(got['sum'], x.sum(-1) + places, rtol=1e-6)


# The optimizer.

def optim_config(**changes):
  values = {'lr': 1e-2, 'final_lr': 0.1, 'warmup': 4, 'steps': 20, 'b1': 0.9, 'b2': 0.95, 'eps': 1e-8,
            'weight_decay': 0.1, 'clip': 1.0}
  return optim.OptimConfig(**values | changes)


@functools.partial(jax.jit, static_argnums=2)
def first_update(grads, params, config):
  optimizer = optim.make_optimizer(config)
  return optimizer.update(grads, optimizer.init(params), params)[0]


@pytest.mark.usefixtures('standard_promotion')
def test_schedule():
  """By the number of finished steps: the first of four warm-up steps has a quarter of the peak, the fourth all of it."""
  steps = jnp.asarray([0, 1, 3, 12, 21, 50])
  rate = jax.jit(lambda warmup: optim.learning_rate(optim_config(warmup=warmup, steps=21))(steps), static_argnums=0)
  np.testing.assert_allclose(rate(4), [2.5e-3, 5e-3, 1e-2, 5.5e-3, 1e-3, 1e-3], rtol=1e-5)
  np.testing.assert_array_equal(rate(0), rate(1))
  np.testing.assert_allclose(rate(0)[jnp.asarray([0, 4])], [1e-2, 1e-3], rtol=1e-5)


@pytest.mark.parametrize('warmup, steps', [(-1, 20), (20, 20), (1, 1)])
def test_warmup_must_end_before_training(warmup, steps):
  message = f'config.optim.warmup={warmup}; give a number from 0 below {steps}, which is config.steps'
  with pytest.raises(ValueError, match=message):
    optim_config(warmup=warmup, steps=steps)


@pytest.mark.parametrize('name, decays', [
    ('embed', True), ('head', True), ('layers/q', True), ('layers/down', True), ('layers/q_norm', False),
    ('layers/attn_norm', False), ('final_norm', False), ('layers/q_bias', False), ('sinks', False)])
def test_what_decays(name, decays):
  assert optim.decays(name) is decays


@pytest.mark.usefixtures('standard_promotion')
def test_only_matrices_shrink_without_a_gradient():
  params = {'embed': jnp.ones((3, 2)), 'sinks': jnp.ones((1, 2)), 'layers': {'q': jnp.ones((2, 2)),
            'q_bias': jnp.ones(2), 'attn_norm': jnp.ones(2)}}
  updates = first_update(jax.tree.map(jnp.zeros_like, params), params, optim_config(warmup=0))
  for shrinks in (updates['embed'], updates['layers']['q']):
    np.testing.assert_allclose(shrinks, -1e-2 * 0.1, rtol=1e-5)
  assert not any(np.any(still) for still in (updates['sinks'], updates['layers']['q_bias'],
                                             updates['layers']['attn_norm']))


@pytest.mark.usefixtures('standard_promotion')
def test_gradients_are_clipped_by_their_global_norm():
  params = {'a': jnp.zeros(3), 'b': jnp.zeros(4)}
  # With a huge eps Adam's first step is the clipped gradient times lr / eps.
  grads = {'a': jnp.full(3, 30.0), 'b': jnp.full(4, -40.0)}
  updates = first_update(grads, params, optim_config(warmup=0, eps=1e4, clip=2.0))
  norm = np.sqrt(sum(np.sum(np.square(u)) for u in jax.tree.leaves(updates)))
  np.testing.assert_allclose(norm, 2.0 * 1e-2 / 1e4, rtol=1e-3)
  off = first_update(grads, params, optim_config(warmup=0, eps=1e4, clip=0.0))
  np.testing.assert_allclose(off['b'], 40.0 * 1e-2 / 1e4, rtol=1e-2)


@pytest.mark.usefixtures('standard_promotion')
def test_the_first_step_of_the_warm_up_learns_at_the_rate_that_is_reported():
  config = optim_config(warmup=4, weight_decay=0.0, clip=0.0)
  update = first_update({'q': jnp.ones(2)}, {'q': jnp.ones(2)}, config)   # Adam's first step is one of length lr
  np.testing.assert_allclose(update['q'], -optim.learning_rate(config)(0), rtol=1e-5)
  np.testing.assert_allclose(update['q'], -1e-2 / 4, rtol=1e-5)


@pytest.mark.usefixtures('standard_promotion')
def test_the_first_moment_may_be_kept_in_fewer_bits():
  params = {'q': jnp.ones((3, 2))}
  half = optim.make_optimizer(optim_config(mu_dtype='bfloat16')).init(params)[1][0]
  assert half.mu['q'].dtype == jnp.bfloat16 and half.nu['q'].dtype == jnp.float32
  assert optim.make_optimizer(optim_config()).init(params)[1][0].mu['q'].dtype == jnp.float32
  with pytest.raises(ValueError, match="optim.mu_dtype='float16'; choose float32 or bfloat16, or leave it empty"):
    optim_config(mu_dtype='float16')


def test_the_loss_of_two_heads_is_that_of_the_sums():
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  student, teacher = (draw(2, 9, 8), draw(16, 8)), (draw(2, 9, 8), draw(16, 8))
  targets, mask = jnp.asarray(rng.integers(16, size=(2, 9))), jnp.asarray(rng.random((2, 9)) < 0.7)
  log_p, log_q = (jax.nn.log_softmax(x @ head.T) for x, head in (teacher, student))
  at = lambda x: jnp.take_along_axis(x, targets[..., None], axis=-1)[..., 0]
  weight = mask.astype(jnp.float32) * losses.token_weight(at(log_p) - at(log_q), losses.TokenWeights())
  want = jnp.sum(weight * jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)) / jnp.sum(weight)
  of = lambda teacher, mask: losses.distillation_loss(student, teacher, targets, mask, chunk=4)
  loss = jax.jit(jax.value_and_grad(of))
  got, gradient = loss(teacher, mask)
  np.testing.assert_allclose(got, want, rtol=1e-5)
  assert not any(np.any(x) for x in jax.tree.leaves(gradient))
  assert loss(teacher, jnp.zeros_like(mask))[0] == 0
  with pytest.raises(ValueError, match="weights.source must be 'student' here, got 'teacher'"):
    losses.distillation_loss(student, teacher, targets, mask, weights=losses.TokenWeights(source='teacher'))
  with pytest.raises(ValueError, match="weights.mean='document' needs to know which document"):
    losses.distillation_loss(student, teacher, targets, mask, weights=losses.TokenWeights(mean='document'))


@pytest.mark.usefixtures('standard_promotion')
def test_behind_its_schedule_the_rate_stays():
  config = optim_config(warmup=4, steps=50, decay_steps=21)
  rates = jax.jit(optim.learning_rate(config))(jnp.asarray([3, 12, 21, 49]))
  np.testing.assert_allclose(rates, [1e-2, 5.5e-3, 1e-3, 1e-3], rtol=1e-5)
  with pytest.raises(ValueError, match='optim.warmup=21; give a number from 0 below 21, which is config.optim.decay_steps'):
    optim_config(warmup=21, steps=50, decay_steps=21)


# Muon.

MUON = {'name': 'muon', 'warmup': 0, 'weight_decay': 0.0, 'clip': 0.0, 'b1': 0.0}


@pytest.mark.usefixtures('standard_promotion')
def test_muon_moves_every_layers_matrix_alike_in_all_directions_and_the_rest_by_adam():
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
  params = {'embed': draw(5, 8), 'layers': {'q': draw(2, 8, 2, 3), 'o': draw(2, 2, 3, 8), 'attn_norm': draw(2, 8)}}
  update = first_update(jax.tree.map(lambda p: 1e-3 * p, params), params, optim_config(**MUON))
  for matrices in (update['layers']['q'].reshape(2, 8, 6), update['layers']['o'].reshape(2, 6, 8)):
    lengths = np.linalg.svd(matrices, compute_uv=False) / (1e-2 * 0.2 * np.sqrt(8))   # AdamW's root mean square
    assert np.all((0.6 < lengths) & (lengths < 1.3)), lengths
  np.testing.assert_allclose(np.abs(update['embed']), 1e-2, rtol=1e-3)   # Adam's first step is one of length lr
  np.testing.assert_allclose(np.abs(update['layers']['attn_norm']), 1e-2, rtol=1e-3)
