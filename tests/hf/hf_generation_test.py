"""An exported student in transformers, over cached blocks and in one masked pass, against our own forward pass."""

import dataclasses
import functools
import json
import pathlib
import re
import subprocess
import sys
import threading

import hf_cases
import jax
import numpy as np
import pytest

from blockattn import blocks, hf
from blockattn.blocks import BlockOptions
from blockattn.hf import config, convert
from blockattn.models import decode, transformer

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
from blockattn.hf import generation  # noqa: E402  needs both

TOLERANCE = 1e-4     # float32 on both sides, logits between 1 and 20
COMPUTE = transformer.Compute(impl='reference')
ROWS, TEXT = 4, 40   # of every forward pass of ours, so that few programs are compiled
LENGTH = TEXT + 4 * 8   # the most that is inserted for 4 blocks
NEW = 6
END = 0   # the end-of-text token of the exported tokenizer
LENGTHS = ((5, 4, 3), (7, 2), (4,), (6, 1, 2, 1))
SINKS = (48, 49)   # the learned ones: every model of hf_cases has a vocabulary of 48
MODES = {'plain': BlockOptions((), 'sequential', 4), 'local': BlockOptions((), 'local', 4),
         'sinks': BlockOptions(SINKS, 'sequential', 4), 'sinks_local': BlockOptions(SINKS, 'local', 4)}
MORE = {'hidden': BlockOptions((), 'sequential', 4, hide_starts=True),
        'hidden_all': BlockOptions(SINKS, 'local', 4, tail_ids=SINKS[1:], links=True, seam=2, align=4, hide_starts=True),
        'overlap': BlockOptions((), 'sequential', 4, hide_starts=True, overlap=5),
        'overlap_local': BlockOptions(SINKS, 'local', 4, hide_starts=True, overlap=3, seam=2),
        'hidden_seam': BlockOptions((), 'local', 4, seam=2, hide_starts=True),
        'seam': BlockOptions(SINKS, 'sequential', 4, seam=1), 'seam_local': BlockOptions(SINKS[:1], 'local', 4, seam=6),
        'tails': BlockOptions((), 'local', 4, tail_ids=SINKS, seam=2),
        'links': BlockOptions(SINKS[:1], 'sequential', 4, tail_ids=SINKS[1:], links=True, seam=2, align=4),
        'links_local': BlockOptions((), 'local', 4, tail_ids=SINKS, links=True)}
EVERY_MODE = pytest.mark.parametrize('options', MODES.values(), ids=MODES)
ALL_MODES = pytest.mark.parametrize('options', (MODES | MORE).values(), ids=MODES | MORE)


def make_prompt(lengths, seed=3):
  rng = np.random.default_rng(seed)
  return [(list if i == 2 else blocks.Continued)(rng.integers(1, 48, size=n).tolist()) for i, n in enumerate(lengths)]


PROMPTS = [make_prompt(lengths, seed) for seed, lengths in enumerate(LENGTHS, start=50)]   # whose answers vary


@dataclasses.dataclass(frozen=True)
class Student:
  """One model on both sides."""
  cfg: transformer.ModelConfig
  params: dict
  model: object
  folder: pathlib.Path


def export(cfg, folder, options):
  params = hf_cases.random_params(cfg, 'float32')
  convert.save(params, cfg, folder / 'student', source=hf_cases.write_tokenizer(folder / 'source', cfg.vocab),
               meta={'blocks': None if options is None else config.blocks_meta(options)}, card='', dtype='float32')
  return Student(cfg, params, read(folder / 'student'), folder / 'student')


def read(folder, **kwargs):
  return transformers.AutoModelForCausalLM.from_pretrained(folder, **{'dtype': torch.float32} | kwargs).eval()


@pytest.fixture(scope='module', params=['qwen3_tied', 'llama_rope'])
def student(request, tmp_path_factory):
  cfg = dataclasses.replace(hf_cases.MODELS[request.param], learned_sinks=2)
  return export(cfg, tmp_path_factory.mktemp(request.param), MODES['sinks'])


@pytest.fixture(scope='module')
def qwen(tmp_path_factory):
  cfg = dataclasses.replace(hf_cases.MODELS['qwen3_tied'], learned_sinks=2)
  return export(cfg, tmp_path_factory.mktemp('qwen'), MODES['sinks_local'])


block_mode = jax.jit(blocks.block_mode, static_argnums=2)
may_attend = jax.jit(blocks.may_attend)


def shared(options):
  return dataclasses.replace(options, shared_first=True)


def rows_of(prompts, options):
  """(tokens, layout) of our forward pass: ROWS rows, of which the first are the prompts, padding behind each."""
  lengths = [[tuple(map(len, prompt))] for prompt in prompts] + [[]] * (ROWS - len(prompts))
  layout = blocks.from_lengths(lengths, TEXT, shared_first=options.shared_first)
  tokens, continued = np.zeros((ROWS, TEXT), np.int32), np.zeros((ROWS, TEXT), bool)
  for row, goes_on, prompt in zip(tokens, continued, prompts):
    row[:sum(map(len, prompt))] = [token for block in prompt for token in block]
    goes_on[:sum(map(len, prompt))] = [isinstance(block, blocks.Continued) for block in prompt for _ in block]
  tokens, layout, _ = block_mode(tokens, layout, options, continued=continued)
  fit = lambda x: np.pad(np.asarray(x), [(0, 0), (0, LENGTH - x.shape[1])])
  return fit(tokens), jax.tree.map(fit, layout)


@functools.partial(jax.jit, static_argnums=3)
def logits_of(params, tokens, layout, cfg):
  return transformer.logits(params, transformer.apply(params, tokens, layout, cfg, COMPUTE), cfg)


def our_logits(student, prompts, options):
  """Of each prompt [T, V], T with its sinks."""
  tokens, layout = rows_of(prompts, options)
  scores = np.asarray(logits_of(student.params, tokens, layout, student.cfg))
  assert np.abs(scores).max() > 1, 'logits too small for the comparison to mean anything'
  return [row[doc != 0] for row, doc, _ in zip(scores, layout.doc, prompts)]


def our_answers(student, prompts, options):
  """int32 [B, NEW], END behind an answer that ended."""
  tokens, layout = rows_of(prompts, options)
  start = decode.prefill(student.params, tokens, layout, student.cfg, COMPUTE, NEW)
  return np.asarray(decode.greedy(student.params, *start, cfg=student.cfg, compute=COMPUTE, length=NEW,
                                  stop_ids=np.array([END]), vocab=student.cfg.vocab))[:len(prompts)]


def masked_logits(model, prompts, options, vocab=48):
  inputs = hf.block_inputs(prompts, options)
  with torch.no_grad(), hf.block_attention(model, inputs.layout):
    scores = model(**inputs.tensors()).logits.float().numpy()[..., :vocab]
  return [row[mask != 0] for row, mask in zip(scores, inputs.attention_mask.numpy(), strict=True)]


def cached_logits(model, prompt, options, cache=None, vocab=48):
  """Of the question's tokens, its sinks included."""
  inputs = hf.cached_inputs(prompt, options)
  past = hf.prefill_blocks(model, prompt, options, cache=cache)
  start = past.get_seq_length()
  with torch.no_grad():
    out = model(inputs.input_ids[:, start:], inputs.attention_mask, position_ids=inputs.position_ids[:, start:],
                past_key_values=past)
  return out.logits[0].float().numpy()[:, :vocab]


def padded(answer):
  return np.pad(answer, (0, NEW - len(answer)), constant_values=END)


def cached_answer(model, prompt, options, **kwargs):
  out = hf.cached_generate(model, prompt, options, max_new_tokens=NEW, do_sample=False, **kwargs)
  inputs = hf.cached_inputs(prompt, options)
  assert torch.equal(out[:, :inputs.input_ids.shape[1]], inputs.input_ids)
  return padded(out[0, inputs.input_ids.shape[1]:].numpy())


def masked_answers(model, prompts, options, **kwargs):
  inputs = hf.block_inputs(prompts, options)
  with hf.block_attention(model, inputs.layout):
    out = model.generate(**inputs.tensors(), **{'max_new_tokens': NEW, 'do_sample': False, **kwargs})
  return np.stack([padded(row) for row in out[:, inputs.input_ids.shape[1]:].numpy()])


# Prompts and masks.


@pytest.mark.parametrize('shared', [False, True])
@EVERY_MODE
def test_inputs_and_masks_are_those_of_blocks(options, shared):
  options = dataclasses.replace(options, shared_first=shared)
  rng = np.random.default_rng(5)
  for seed in range(12):
    prompts = [make_prompt(rng.integers(1, 6, size=rng.integers(1, 5)), seed) for _ in range(3)]
    got = hf.block_inputs(prompts, options)
    for row, prompt in enumerate(prompts):
      length = int(got.attention_mask[row].sum())
      tokens, layout = rows_of([prompt], options)
      assert np.count_nonzero(layout.doc) == length and not got.attention_mask[row, :-length].any()
      np.testing.assert_array_equal(got.input_ids[row, -length:], tokens[0, :length])
      np.testing.assert_array_equal(got.position_ids[row, -length:], layout.position[0, :length])
      for field in dataclasses.fields(layout):
        values = getattr(got.layout, field.name)[row].numpy()
        np.testing.assert_array_equal(values[-length:], getattr(layout, field.name)[0, :length], err_msg=field.name)
        assert not values[:-length].any(), field.name

      # Three new tokens are like three more tokens of the question; those of the shortest row come after padding, too.
      longer = [*prompt[:-1], [*prompt[-1], 1, 2, 3]]
      expected = np.asarray(may_attend(rows_of([longer], options)[1]))[0, :length + 3, :length + 3]
      total = got.input_ids.shape[1]
      index = torch.arange(total + 3)
      mask = generation.may_attend(got.layout, index, index)[row].numpy()
      np.testing.assert_array_equal(mask[total - length:, total - length:], expected)
      assert not mask[:, :total - length].any() and not mask[:total - length].any()
      np.testing.assert_array_equal(generation.may_attend(got.layout, index[-2:], index[1:])[row], mask[-2:, 1:])


def test_masks_of_packed_documents_and_dropped_blocks_are_those_of_blocks():
  layout = blocks.from_lengths([[(4, 5, 2, 3), (6, 4, 7)], [(12, 5, 5), (2, 3)], [], []], LENGTH, shared_first=True)
  dropped = (layout.doc != 0) & ~layout.reader & ~layout.shared & (layout.block == 2)
  for changes in ({'reader': layout.reader | dropped}, {'reader': layout.reader | dropped, 'hidden': dropped},
                  {'doc': np.where(dropped, 0, layout.doc)}):   # lifted, isolated, removed
    changed = layout.replace(**changes)
    assert not np.array_equal(may_attend(changed), may_attend(layout))
    tensors, index = jax.tree.map(torch.tensor, changed), torch.arange(LENGTH)
    np.testing.assert_array_equal(generation.may_attend(tensors, index, index), np.asarray(may_attend(changed)))


def test_a_packed_batch_reads_as_ours(qwen):
  layout = blocks.from_lengths([[(9, 7, 5), (6, 4)], [(12, 10)], [], []], LENGTH, positions='local')
  tokens = np.random.default_rng(1).integers(48, size=layout.doc.shape, dtype=np.int32)
  ours = logits_of(qwen.params, tokens, layout, qwen.cfg)
  valid = layout.doc != 0
  with torch.no_grad(), hf.block_attention(qwen.model, layout):   # arrays, padding on the right, with and without cache
    for use_cache in (True, False):
      theirs = qwen.model(torch.from_numpy(tokens).long(), position_ids=torch.tensor(layout.position).long(),
                          use_cache=use_cache).logits.numpy()
      np.testing.assert_allclose(theirs[valid][:, :48], np.asarray(ours)[valid], atol=TOLERANCE, rtol=0)


# Both ways against ours.


@ALL_MODES
def test_logits_are_ours(student, options):
  expected = our_logits(student, PROMPTS, options)
  for prompt, ours, masked in zip(PROMPTS, expected, masked_logits(student.model, PROMPTS, options), strict=True):
    np.testing.assert_allclose(masked, ours, atol=TOLERANCE, rtol=0)
    cached = cached_logits(student.model, prompt, options)
    assert len(cached) == len(prompt[-1]) + len(options.sink_ids)
    np.testing.assert_allclose(cached, ours[-len(cached):], atol=TOLERANCE, rtol=0)


@ALL_MODES
def test_greedy_answers_are_ours(student, options):
  expected = our_answers(student, PROMPTS, options)
  assert len(np.unique(expected)) > 4, 'the case has to be a hard one'
  np.testing.assert_array_equal(masked_answers(student.model, PROMPTS, options), expected)
  for prompt, ours in zip(PROMPTS, expected, strict=True):
    np.testing.assert_array_equal(cached_answer(student.model, prompt, options), ours)


def test_the_comparison_can_fail(qwen):
  options = MODES['sinks_local']
  expected = our_logits(qwen, PROMPTS[:1], options)[0][-1]
  for other in (MODES['sinks'], MODES['local']):
    assert np.abs(cached_logits(qwen.model, PROMPTS[0], other)[-1] - expected).max() > 100 * TOLERANCE


def test_random_layouts(qwen):
  rng = np.random.default_rng(11)
  for seed in range(9):
    options = list((MODES | MORE).values())[seed]
    prompt = make_prompt(rng.integers(1, 7, size=rng.integers(1, 6)), seed)
    ours = our_logits(qwen, [prompt], options)[0]
    cached = cached_logits(qwen.model, prompt, options)
    np.testing.assert_allclose(masked_logits(qwen.model, [prompt], options)[0], ours, atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(cached, ours[-len(cached):], atol=TOLERANCE, rtol=0)


def test_eager_attention_reads_cached_blocks_as_well(qwen):
  eager = read(qwen.folder, attn_implementation='eager')
  options = MODES['sinks_local']
  expected = our_answers(qwen, PROMPTS, options)
  for prompt, ours in zip(PROMPTS, expected, strict=True):
    np.testing.assert_array_equal(cached_answer(eager, prompt, options), ours)


@EVERY_MODE
def test_bfloat16_cached_is_as_near_to_float32_as_masked(student, options):
  """Moving a rounded key rounds it once more, as often as the masked pass rounds it when it is rotated there."""
  model = read(student.folder, dtype=torch.bfloat16)
  error = lambda got, ours: float(np.sqrt(np.mean((got - ours[-len(got):]) ** 2)))
  expected = our_logits(student, PROMPTS, options)
  masked = [error(got, ours) for got, ours in zip(masked_logits(model, PROMPTS, options), expected, strict=True)]
  cached = [error(cached_logits(model, prompt, options), ours) for prompt, ours in zip(PROMPTS, expected, strict=True)]
  assert 0 < np.mean(masked) < 1
  assert np.mean(cached) < 2 * np.mean(masked)
  assert hf.prefill_blocks(model, PROMPTS[0], options).layers[0].keys.dtype == torch.bfloat16


# The cache of states.


class Counting(dict):
  """A cache that counts what is put into it."""
  writes = 0

  def __setitem__(self, key, value):
    self.writes += 1
    super().__setitem__(key, value)


@EVERY_MODE
def test_states_are_used_again_in_any_order(student, options):
  first, a, b, c, question = make_prompt((4, 6, 5, 3, 4))
  cache = Counting()
  orders = [[first, a, b, c, question], [first, c, a, b, question[:2]], [first, b, question], [first, a, a, question]]
  for prompt in orders:
    np.testing.assert_array_equal(cached_answer(student.model, prompt, options, cache=cache),
                                  cached_answer(student.model, prompt, options))
    assert cache.writes == 4
  kept = {key: [tuple(x.clone() for x in layer) for layer in state] for key, state in cache.items()}
  expected = our_answers(student, orders, options)
  for prompt, ours in zip(orders, expected, strict=True):
    np.testing.assert_array_equal(cached_answer(student.model, prompt, options, cache=cache), ours)
  # Nor does a seam ask for other states.
  for seam in (1, 6):
    answer = cached_answer(student.model, orders[0], options, cache=cache, seam=seam)
    np.testing.assert_array_equal(answer, our_answers(student, orders[:1], dataclasses.replace(options, seam=seam))[0])
    assert cache.writes == 4
  # A block that comes first is the same block.
  cached_answer(student.model, [a, first, question], options, cache=cache)
  assert cache.writes == 4
  for key, state in kept.items():
    assert all(torch.equal(x, y) for old, new in zip(state, cache[key]) for x, y in zip(old, new)), 'written to'


def test_a_cache_may_forget(qwen):
  class Forgetful(dict):
    def __setitem__(self, key, value):
      pass
  options = MODES['sinks_local']
  cached_answer(qwen.model, PROMPTS[0], options, cache=Forgetful())


def test_a_shared_prefix_is_read_by_every_block(student):
  cache = Counting()
  prompts = [make_prompt(lengths, seed) for seed, lengths in enumerate(((4, 6, 5, 3), (5, 3)))]
  prompts.append([prompts[0][0], prompts[0][2], prompts[0][1], prompts[1][1]])
  for options in (shared(MODES['local']), shared(MODES['sinks_local'])):
    ours = our_logits(student, prompts, options)
    answers = our_answers(student, prompts, options)
    for masked, logits in zip(masked_logits(student.model, prompts, options), ours, strict=True):
      np.testing.assert_allclose(masked, logits, atol=TOLERANCE, rtol=0)
    for prompt, logits, answer in zip(prompts, ours, answers, strict=True):
      cached = cached_logits(student.model, prompt, options, cache=cache)
      np.testing.assert_allclose(cached, logits[-len(cached):], atol=TOLERANCE, rtol=0)
      np.testing.assert_array_equal(cached_answer(student.model, prompt, options, cache=cache), answer)
  # In each mode two prefixes, which sinks stand in front of too, and two further blocks.
  assert cache.writes == 2 * 2 + 2 * 2
  blocks_alone = Counting(cache)
  cached_answer(student.model, prompts[0], MODES['local'], cache=blocks_alone)
  assert blocks_alone.writes == 2, 'a block read behind a prefix is not the block read alone'


def test_a_shared_prefix_at_sequential_positions_is_refused_by_the_cache_alone(qwen):
  options = shared(MODES['sinks'])
  with pytest.raises(ValueError, match="positions must be 'local'.*masked pass"):
    hf.cached_generate(qwen.model, PROMPTS[0], options, max_new_tokens=2)
  ours = our_logits(qwen, PROMPTS, options)
  for masked, logits in zip(masked_logits(qwen.model, PROMPTS, options), ours, strict=True):
    np.testing.assert_allclose(masked, logits, atol=TOLERANCE, rtol=0)


# generate under a layout.


@pytest.mark.parametrize('kwargs', [{'use_cache': False}, {'cache_implementation': 'static'},
                                    {'prompt_lookup_num_tokens': 3}], ids=lambda kwargs: next(iter(kwargs)))
def test_other_ways_to_generate_give_the_same(qwen, kwargs):
  # Assisted decoding takes one row at a time; the repeated tokens are what it looks up.
  prompts = [[[7, 8, 9, 7, 8], [9, 7, 8, 9], [3, 7, 8]], [[7, 8], [9]], [[5]]]
  for options in (MODES['sinks'], MODES['sinks_local']):
    expected = our_answers(qwen, prompts, options)
    for prompt, ours in zip(prompts, expected, strict=True):
      np.testing.assert_array_equal(masked_answers(qwen.model, [prompt], options, **kwargs)[0], ours)
    if 'prompt_lookup_num_tokens' not in kwargs:
      np.testing.assert_array_equal(masked_answers(qwen.model, prompts, options, **kwargs), expected)


def test_beams_and_several_answers_per_row(qwen):
  options = MODES['sinks_local']
  inputs = hf.block_inputs(PROMPTS, options)
  how = dict(max_new_tokens=NEW, num_beams=3, num_return_sequences=2, do_sample=False, return_dict_in_generate=True,
             output_scores=True)
  with hf.block_attention(qwen.model, inputs.layout):
    together = qwen.model.generate(**inputs.tensors(), **how)
  for i, prompt in enumerate(PROMPTS):
    alone = hf.block_inputs([prompt], options)
    with hf.block_attention(qwen.model, alone.layout):
      out = qwen.model.generate(**alone.tensors(), **how)
    np.testing.assert_allclose(together.sequences_scores[2 * i:2 * i + 2], out.sequences_scores, atol=TOLERANCE)
  for name in ('num_beams', 'num_return_sequences'):
    with pytest.raises(ValueError, match=f'{name}=2.*block_attention'):
      hf.cached_generate(qwen.model, PROMPTS[0], options, max_new_tokens=2, **{name: 2})


def test_options_of_generate_reach_it(qwen):
  options = MODES['sinks_local']
  out = hf.cached_generate(qwen.model, PROMPTS[0], options, max_new_tokens=3, do_sample=False, output_logits=True,
                           return_dict_in_generate=True)
  expected = our_logits(qwen, PROMPTS[:1], options)[0][-1]
  np.testing.assert_allclose(out.logits[0][0, :48].numpy(), expected, atol=TOLERANCE, rtol=0)
  seeded = lambda: (torch.manual_seed(1), hf.cached_generate(qwen.model, PROMPTS[0], options, max_new_tokens=NEW,
                                                             do_sample=True, temperature=2.0, top_k=0))[1]
  assert torch.equal(seeded(), seeded())
  with pytest.raises(ValueError, match='not_an_option'):
    hf.cached_generate(qwen.model, PROMPTS[0], options, max_new_tokens=2, not_an_option=1)


def test_a_pass_that_does_not_fit_the_layout_is_refused(qwen):
  model, inputs = qwen.model, hf.block_inputs(PROMPTS[:2], MODES['sinks_local'])
  tensors = inputs.tensors()
  with torch.no_grad(), hf.block_attention(model, inputs.layout):
    with pytest.raises(ValueError, match='tokens 0 to 3 does not fit the layout'):
      model(tensors['input_ids'][:, :3])
    with pytest.raises(ValueError, match='batch of 3 under a layout of 2 rows'):
      model(tensors['input_ids'][[0, 1, 1]])
    with pytest.raises(ValueError, match='position_ids are not those'):
      model(tensors['input_ids'], attention_mask=tensors['attention_mask'])
    with pytest.raises(ValueError, match='disagree about padding'):
      model(**tensors | {'attention_mask': torch.ones_like(tensors['attention_mask'])})
    with pytest.raises(RuntimeError, match='under another layout already'), hf.block_attention(model, inputs.layout):
      pass
    with pytest.raises(ValueError, match='under a layout'):
      hf.prefill_blocks(model, PROMPTS[0], MODES['sinks'])
    model(**tensors)   # none of that has changed anything


def test_the_attention_is_put_back_whatever_happens(qwen):
  model, inputs = qwen.model, hf.block_inputs(PROMPTS[:1], MODES['sinks'])
  assert model.config._attn_implementation == 'sdpa'
  with pytest.raises(KeyError), hf.block_attention(model, inputs.layout):
    assert model.config._attn_implementation == generation.NAME
    raise KeyError
  assert model.config._attn_implementation == 'sdpa'
  assert not transformers.AttentionMaskInterface()[generation.NAME].layouts


def test_two_models_read_under_their_own_layouts_from_any_thread(qwen):
  other = read(qwen.folder)
  mine, theirs = (hf.block_inputs(PROMPTS[i:i + 1], MODES['sinks']) for i in (0, 3))
  got = {}
  with torch.no_grad(), hf.block_attention(qwen.model, mine.layout), hf.block_attention(other, theirs.layout):
    run = lambda name, model, inputs: got.update({name: model(**inputs.tensors()).logits.detach()[0, :, :48].numpy()})
    threads = [threading.Thread(target=run, args=args) for args in (('a', qwen.model, mine), ('b', other, theirs))]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
  for name, i in (('a', 0), ('b', 3)):
    np.testing.assert_allclose(got[name], our_logits(qwen, PROMPTS[i:i + 1], MODES['sinks'])[0], atol=TOLERANCE, rtol=0)


def test_without_a_layout_the_attention_refuses_to_run(qwen):
  hf.register_block_attention()
  hf.register_block_attention()
  model = read(qwen.folder, attn_implementation='block_sdpa')
  with pytest.raises(ValueError, match='has no layout; run the model under'):
    model(torch.tensor([[1, 2, 3]]))
  options = MODES['sinks']
  np.testing.assert_array_equal(masked_answers(model, PROMPTS, options), our_answers(qwen, PROMPTS, options))


# What a folder says, and what is refused.


def test_options_are_read_from_the_exported_folder(qwen, tmp_path):
  assert config.block_options(config.read_meta(qwen.folder)) == MODES['sinks_local']
  assert config.block_options({}) == config.block_options({'blocks': None}) == BlockOptions((), 'sequential', 1)
  assert json.loads((qwen.folder / 'blockattn.json').read_text())['learned_sinks'] == 2


@pytest.mark.parametrize('changes, key', [
    ({'use_sliding_window': True, 'sliding_window': 8, 'max_window_layers': 0}, 'use_sliding_window'),
    ({'rope_parameters': {'rope_type': 'dynamic', 'factor': 2.0, 'rope_theta': 1e4}}, 'dynamic'),
])
def test_attention_that_is_not_full_is_refused(changes, key):
  small = dict(vocab_size=48, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
               num_key_value_heads=1, head_dim=8)
  model = transformers.AutoModelForCausalLM.from_config(transformers.Qwen3Config(**small, **changes))
  with pytest.raises(ValueError, match=key):
    hf.cached_generate(model, PROMPTS[0], MODES['plain'], max_new_tokens=1)
  with pytest.raises(ValueError, match=key), hf.block_attention(model, hf.block_inputs(PROMPTS, MODES['plain']).layout):
    pass


def test_another_architecture_is_refused():
  model = transformers.AutoModelForCausalLM.from_config(transformers.GPT2Config(n_layer=1, n_embd=8, n_head=1,
                                                                                vocab_size=48))
  with pytest.raises(ValueError, match="model_type='gpt2'"):
    hf.prefill_blocks(model, PROMPTS[0], MODES['plain'])


def test_prompts_without_tokens_are_refused():
  with pytest.raises(ValueError, match='none of them empty, the question last; got .1, 0, 1. tokens'):
    hf.block_inputs([[[1], [], [2]]], MODES['plain'])
  with pytest.raises(ValueError, match='none of them empty, the question last; got .. tokens'):
    hf.block_inputs([[]], MODES['plain'])
  with pytest.raises(ValueError, match='no prompt'):
    hf.block_inputs([], MODES['plain'])


def test_torch_is_loaded_only_when_it_is_asked_for(monkeypatch):
  code = "import sys; from blockattn import hf; assert 'torch' not in sys.modules and not hasattr(hf, 'nothing')"
  subprocess.run([sys.executable, '-c', code], check=True)
  monkeypatch.delitem(sys.modules, 'blockattn.hf.generation')
  monkeypatch.delattr(hf, 'generation')
  monkeypatch.setitem(sys.modules, 'torch', None)
  with pytest.raises(ImportError, match=r"pip install 'blockattn\[torch\]'"):
    hf.cached_generate  # noqa: B018  asking for it is what loads torch


def test_the_example_answers_both_ways(tmp_path, capsys):
  from tools import agree, generate_torch
  teacher = str(pathlib.Path(__file__).parents[2] / 'blockattn' / 'assets' / 'tiny_teacher')
  files = [tmp_path / 'a.txt', tmp_path / 'b.md']
  for i, file in enumerate(files):
    file.write_text(f'class Tool{i}:\n  """Does a number of things."""\n')
  more = ['--max-new', '4']
  assert generate_torch.main([teacher, *map(str, files), '--question', 'What is Tool1?', *more]) == 0
  assert 'both ways give the same tokens' in capsys.readouterr().out

  assert agree.main([teacher, *map(str, files)]) == 0   # and so at every position, of which bfloat16 moves a few
  assert re.search(r'ours, float32 +│ transformers, float32 +│ +100.00%', capsys.readouterr().out)
  assert agree.main([teacher, str(tmp_path / 'no.txt')]) == 2 and 'no.txt' in capsys.readouterr().err

  lines = tmp_path / 'questions.jsonl'
  texts = [file.read_text() for file in files]
  lines.write_text(''.join(json.dumps({'blocks': order, 'prompt': 'What?', 'response': '-'}) + '\n'
                           for order in (texts, texts[::-1])))
  assert generate_torch.main([teacher, str(lines), *more]) == 0
  assert '2 blocks, 0 of them read now' in capsys.readouterr().out

  for wrong in ([str(lines), '--question', 'x'], [str(files[0])], [str(tmp_path / 'no.txt'), '--question', 'x']):
    assert generate_torch.main([teacher, *wrong, *more]) == 2
  assert generate_torch.main([str(tmp_path), str(files[0]), '--question', 'x']) == 2
  assert f'{tmp_path}: no tokenizer.json in this folder' in capsys.readouterr().err
