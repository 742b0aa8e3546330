"""Output matching against a dense model in numpy, in float64, and the same numbers wherever they are computed."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import train_cases

from blockattn import blocks, losses
from blockattn.models import lora, transformer
from blockattn.train import distill, job
from configs import common

CFG = train_cases.MODEL
FORM = blocks.BlockOptions((0, 0), 'sequential', train_cases.MAX_BLOCKS)
GOAL = distill.DistillOptions(drop_rate=0.5, drop_mode='remove', match_weight=0.7, chunk=16)
KEY = jax.random.key(3)


def attention_outputs(params, tokens, layout):
  """[L, B, T, D]: what attention adds to the residual stream, computed with whole T x T matrices."""
  mask, position = np.asarray(blocks.may_attend(layout)), np.asarray(layout.position)
  norm = lambda x, scale: x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + CFG.norm_eps) * scale
  angle = position[..., None] * CFG.rope_theta ** (-2.0 * np.arange(CFG.head_dim // 2) / CFG.head_dim)

  def rotate(x):
    low, high = np.split(x, 2, axis=-1)
    cos, sin = np.cos(angle)[:, :, None], np.sin(angle)[:, :, None]
    return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)

  x, outputs = params['embed'][np.asarray(tokens)], []
  for i in range(CFG.layers):
    w = {name: value[i] for name, value in params['layers'].items()}
    h = norm(x, w['attn_norm'])
    q, k, v = (np.einsum('btd,dnh->btnh', h, w[name]) for name in 'qkv')
    k, v = (np.repeat(part, CFG.heads // CFG.kv_heads, axis=2) for part in (rotate(k), v))
    score = np.exp(np.einsum('btnh,bsnh->bnts', rotate(q), k) / np.sqrt(CFG.head_dim)) * mask[:, None]
    share = score / np.maximum(score.sum(axis=-1, keepdims=True), 1e-300)
    outputs.append(np.einsum('bnts,bsnh,nhd->btd', share, v, w['o'], optimize=True))
    x = x + outputs[-1]
    h = norm(x, w['mlp_norm'])
    gate = h @ w['gate']
    x = x + (gate / (1 + np.exp(-gate)) * (h @ w['up'])) @ w['down']
  return np.stack(outputs)


def dense_match(student, teacher, batch):
  """The sum over the loss tokens of the relative squared distance, a mean over layers."""
  dropped = blocks.drop_blocks(batch['layout'], KEY, rate=GOAL.drop_rate, mode=GOAL.drop_mode, positions=FORM.positions)
  mask = np.asarray(distill.loss_mask(batch, dropped, GOAL))
  tokens, layout, index = blocks.block_mode(batch['tokens'], dropped, FORM)
  own = attention_outputs(student, tokens, layout)
  wanted = attention_outputs(teacher, batch['tokens'], blocks.as_one_block(batch['layout']))
  total = 0.0
  for row, places in enumerate(np.asarray(index)):
    for layer in range(CFG.layers):
      read = mask[row]
      unit = np.mean(np.sum(wanted[layer, row, read] ** 2, axis=-1))
      total += np.sum((own[layer, row, places][read] - wanted[layer, row, read]) ** 2) / unit / CFG.layers
  return total


def sums_of(remat='none', attach=None):
  """jitted (student, frozen, batch) -> (grads of the sum of distances, all sums): by the losses with it and without."""
  compute = transformer.Compute(impl='xla', tiles=(16, 16), remat=remat)
  model = distill.transformer_model(CFG, compute)
  models = distill.Models(model, model, FORM, attach)

  def match(params, frozen, batch):
    goal = lambda weight: dataclasses.replace(GOAL, match_weight=weight, weights=losses.TokenWeights(form='none'))
    without, sums = (distill.loss_sums(params, frozen, batch, KEY, models, goal(weight)) for weight in (0.0, 100.0))
    return (sums['loss'] - without['loss']) / 100, sums
  return jax.jit(jax.grad(match, has_aux=True))


@functools.cache
def case():
  """(student, teacher, batch, grads, sums)."""
  student, teacher, batch = train_cases.params(seed=1), train_cases.params(), train_cases.batch(5)
  return (student, teacher, batch, *sums_of()(student, job.Frozen(teacher), batch))


def in_float64(tree):
  return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def test_the_distance_and_its_gradient_are_those_of_a_dense_model():
  student, teacher, batch, grads, sums = case()
  student, teacher = in_float64((student, teacher))
  expected = dense_match(student, teacher, batch)
  assert expected / sums['tokens'] > 0.1
  np.testing.assert_allclose(sums['match'], expected, rtol=1e-5)
  rng = np.random.default_rng(0)
  for _ in range(3):
    way = jax.tree.map(lambda x: rng.standard_normal(x.shape), student)
    moved = lambda step, way=way: dense_match(jax.tree.map(lambda x, d: x + step * d, student, way), teacher, batch)
    slope = (moved(1e-6) - moved(-1e-6)) / 2e-6
    ours = sum(jax.tree.leaves(jax.tree.map(lambda g, d: np.sum(np.asarray(g, np.float64) * d), grads, way)))
    np.testing.assert_allclose(ours, slope, rtol=1e-4)


def test_it_is_a_part_of_the_loss():
  """Weighted as the rest is: in units of a loss token's weight."""
  student, teacher, batch, _, sums = case()
  model = distill.transformer_model(CFG, transformer.Compute(impl='xla', tiles=(16, 16)))
  plain = jax.jit(lambda goal_weights: [distill.loss_sums(
      student, job.Frozen(teacher), batch, KEY, distill.Models(model, model, FORM),
      dataclasses.replace(GOAL, match_weight=weight, weights=losses.TokenWeights(form='none')))
      for weight in goal_weights], static_argnums=0)
  without, half = plain((0.0, 0.5))
  np.testing.assert_allclose(half['loss'] - without['loss'], 0.5 * sums['match'], rtol=1e-4)
  assert 'match' not in without and half['weight'] == without['weight'] == half['tokens']


def test_what_is_computed_again_is_the_same():
  student, teacher, batch, grads, sums = case()
  again, other = sums_of('full')(student, job.Frozen(teacher), batch)
  np.testing.assert_allclose(other['match'], sums['match'], rtol=1e-6)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), again, grads)


def test_a_lora_student_gets_the_gradient_of_its_matrices():
  """At the start `up` is 0, so that the student is its base, and the gradient of `up` is down^T times the matrix's."""
  student, teacher, batch, grads, sums = case()
  options = lora.LoraOptions(rank=3, targets=('q', 'down'))
  specs = lora.spec(CFG, options)
  rng = np.random.default_rng(1)
  trained = jax.tree.map(lambda s: jnp.asarray(rng.standard_normal(s.shape) * (s.std or 0.0), jnp.float32), specs)
  attach = lambda base, params: lora.attach(base, params, options)
  own, other = sums_of(attach=attach)(trained, job.Frozen(teacher, student), batch)
  np.testing.assert_allclose(other['match'], sums['match'], rtol=1e-5)
  for name, expected in (('q', 'ldr,ldnh->lrnh'), ('down', 'lfr,lfd->lrd')):
    up = options.factor * np.einsum(expected, trained['layers'][name]['down'], grads['layers'][name])
    np.testing.assert_allclose(own['layers'][name]['up'], up, rtol=1e-3, atol=1e-3)


def test_a_model_that_says_nothing_of_its_layers_is_refused():
  model = distill.Model(lambda params, tokens, layout: None, lambda params: None)
  with pytest.raises(ValueError, match='a model of your own says nothing of its layers: leave it 0'):
    distill.loss_sums(None, job.Frozen(), train_cases.batch(0), KEY, distill.Models(model, model, FORM), GOAL)


@pytest.mark.parametrize('key', ['match_weight', 'on_policy.share'])
def test_stored_logits_are_refused(key):
  config = common.base('distill')
  config.model.source, config.teacher.logits = 'teacher', 'logits/x'
  config.update_from_flattened_dict({f'distill.{key}': 1.0})
  with pytest.raises(ValueError, match=f"config.distill.{key}=1.0 needs a teacher at work, and config.teacher.logits="
                                       "'logits/x' stands in its place"):
    distill.read(config)
