"""Operations of a model and pairs of tokens, counted against matrices and masks that exist."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from blockattn import blocks
from blockattn.models import flops, sizes, spec, transformer
from blockattn.segmentation import model

TINY = transformer.ModelConfig('qwen3', vocab=48, width=24, layers=2, heads=4, kv_heads=2, head_dim=16, mlp=40, qk_norm=True,
                               tied=True)
ROWS = [[[3, 2, 4], [5]], [[1], [2, 6, 1, 3]], [[4, 4]]]   # documents of each row, blocks of each document
LENGTH = 16


def layout(rows=ROWS, **options):
  return blocks.from_lengths(rows, LENGTH, **options)


def blocks_of(one, continued=(1, 2, 3)):
  """Those of a layout, where the blocks of these numbers go on."""
  return flops.blocks_of(one, np.isin(one.block, continued))


def seen_by_the_mask(layout):
  return flops.Seen(float((np.asarray(layout.doc) != 0).sum()), float(np.asarray(blocks.may_attend(layout)).sum()))


def with_sinks(layout, sinks):
  options = blocks.BlockOptions((7,) * sinks, 'sequential', 8)
  return blocks.block_mode(np.zeros(layout.doc.shape, np.int32), layout, options)[1]


@pytest.mark.parametrize('shared_first', [False, True])
@pytest.mark.parametrize('sinks', [0, 3])
def test_pairs_are_those_of_the_mask(sinks, shared_first):
  one = layout(shared_first=shared_first)
  cut = blocks_of(one)
  assert flops.as_one_block(cut) == seen_by_the_mask(blocks.as_one_block(one))
  assert flops.in_blocks(cut, sinks=sinks) == seen_by_the_mask(with_sinks(one, sinks))


@pytest.mark.parametrize('tails, links', [(0, False), (2, False), (2, True)])
@pytest.mark.parametrize('shared_first', [False, True])
def test_pairs_of_what_is_inserted_are_those_of_the_mask(tails, links, shared_first):
  one, mean = layout(shared_first=shared_first), np.zeros(2)
  cut, tokens = blocks_of(one), np.zeros(one.doc.shape, np.int32)
  options = blocks.BlockOptions((7,), 'sequential', 8, tail_ids=(8,) * tails, links=links, seam=3)
  for seam in range(4):
    seen = seen_by_the_mask(blocks.block_mode(tokens, one, options, seam)[1])
    assert flops.in_blocks(cut, sinks=1, tails=tails, links=links, seams=flops.seams(cut, seam)) == seen
    mean += np.array(seen).astype(float) / 4
  over = dataclasses.replace(options, sink_ids=(), seam=0, overlap=2, hide_starts=True)
  for continued in ((1, 2, 3), (2, 3)):
    seen = seen_by_the_mask(blocks.block_mode(tokens, one, over, continued=np.isin(one.block, continued))[1])
    ahead = flops.overlaps(blocks_of(one, continued), 2)
    counted = flops.in_blocks(cut, tails=tails, links=links, overlaps=ahead)
    assert ahead.any() and counted.tokens == seen.tokens
    if not shared_first and 1 in continued:   # else some starts are hidden, which counts as read
      assert counted.pairs == seen.pairs
  drawn = flops.seams(cut, 3, drawn=True)
  assert drawn.sum() > 0 and flops.in_blocks(cut, sinks=1, tails=tails, links=links, seams=drawn).tokens == mean[0]


@pytest.mark.parametrize('lengths', [[7], [1, 1], [5, 3, 9], [16, 16, 16, 2]])
def test_pairs_of_one_document(lengths):
  expected = seen_by_the_mask(blocks.from_lengths([[lengths]], sum(lengths)))
  assert flops.in_blocks(flops.one_document(lengths)) == expected


@pytest.mark.parametrize('mode, sinks, shared_first', [
    *itertools.product(('lift', 'isolate', 'merge'), (0, 2), (False, True)), ('remove', 0, False), ('remove', 0, True)])
def test_block_dropout_counts_the_mean_over_its_draws(mode, sinks, shared_first, monkeypatch):
  """Every draw there is, by its probability."""
  rate, one = 0.3, layout([[[2, 1, 3, 4, 2]]], shared_first=shared_first)
  mean = np.zeros(2)
  for coins in itertools.product((False, True), repeat=4):   # the last block, the reader, has none
    drop = np.append(coins, False)
    monkeypatch.setattr(blocks, '_coin_per_block', lambda layout, key, rate, drop=drop: drop[layout.block])
    drawn = blocks.drop_blocks(one, None, rate=rate, mode=mode, positions='sequential')
    mean += np.prod(np.where(coins, rate, 1 - rate)) * np.array(seen_by_the_mask(with_sinks(drawn, sinks)))
  counted = flops.in_blocks(blocks_of(one), sinks=sinks, drop_rate=rate, drop_mode=mode)
  np.testing.assert_allclose(counted, mean, rtol=1e-6)


def test_rows_without_a_document():
  cut = blocks_of(blocks.from_lengths([[], []], 4))
  merged = flops.in_blocks(cut, drop_rate=0.5, drop_mode='merge')
  assert flops.as_one_block(cut) == flops.in_blocks(cut, sinks=4) == merged == (0, 0)


def test_a_forward_pass_is_what_its_matrices_take():
  """The compiler's own count of the matrix products, for full attention over every pair."""
  T, D, H, N = 32, TINY.width, TINY.head_dim, TINY.heads
  once = flops.forward(TINY, flops.Seen(T, T * T))
  assert once.layers == 2 * T * 2 * (D * (4 + 2 + 2) * 16 + 4 * 16 * D + 3 * D * 40)
  assert once.attention == 4 * N * H * 2 * T * T and once.head == 2 * 48 * D
  assert once.total(5) == once.layers + once.attention + 5 * once.head

  tokens, layout = np.zeros((1, T), np.int32), blocks.from_lengths([[[T]]], T)
  compute = transformer.Compute(impl='reference')
  run = lambda params: transformer.logits(params, transformer.apply(params, tokens, layout, TINY, compute), TINY)
  assert dots(jax.make_jaxpr(run)(spec.abstract(transformer.spec(TINY), 'float32')).jaxpr) == once.total(T)


def dots(jaxpr, times=1):
  """Operations of all matrix products of a jaxpr, those of a scan as often as it runs them."""
  total = 0
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == 'dot_general':
      (contracting, _), _ = eqn.params['dimension_numbers']
      total += times * 2 * eqn.outvars[0].aval.size * np.prod([eqn.invars[0].aval.shape[i] for i in contracting])
    inner = times * (eqn.params['length'] if eqn.primitive.name == 'scan' else 1)
    total += sum(dots(part.jaxpr if hasattr(part, 'jaxpr') else part, inner) for part in eqn.params.values()
                 if hasattr(part, 'eqns') or hasattr(part, 'jaxpr'))
  return total


def test_training_is_three_forward_passes_and_less_for_frozen_weights():
  once = flops.forward(TINY, flops.Seen(10, 40))
  assert flops.trained(once) == once + once + once
  frozen = flops.trained(once, frozen=True)
  assert (frozen.layers, frozen.attention, frozen.head) == (2 * once.layers, 3 * once.attention, 2 * once.head)


def test_six_operations_per_parameter_and_token():
  """The rule of thumb, for a published size: 6 N per token, N without the embedding."""
  cfg = sizes.get('llama31_8b')
  per_token = flops.trained(flops.forward(cfg, flops.Seen(1, 0))).total(1)
  matrices = spec.count(transformer.spec(cfg)) - cfg.vocab * cfg.width
  assert per_token == pytest.approx(6 * matrices, rel=1e-4)


def test_the_head_of_a_segmenter_reads_every_position():
  cfg = model.architecture(TINY, unit_tokens=3)
  once, plain = (flops.forward(c, flops.Seen(10, 40)) for c in (cfg, TINY))
  assert once.head == 0
  assert once.layers == plain.layers + 2 * 10 * (3 * 24 * 24 + 2 * 24)


@pytest.mark.parametrize('kind, tflops', [
    ('TPU v4', 275), ('TPU v5 lite', 197), ('TPU v5', 459), ('TPU v5p', 459), ('TPU v6 lite', 918),
    ('NVIDIA A100-SXM4-80GB', 312), ('NVIDIA H100 80GB HBM3', 989.4), ('NVIDIA H100 PCIe', 756.5), ('NVIDIA H200', 989.4),
    ('NVIDIA B200', 2250)])
def test_peaks_by_kind_of_device(kind, tflops):
  assert flops.peak(kind) == tflops * 1e12


@pytest.mark.parametrize('kind', ['cpu', 'NVIDIA GeForce RTX 4090', 'TPU v3', ''])
def test_an_unknown_device_has_no_peak(kind):
  assert flops.peak(kind) is None
