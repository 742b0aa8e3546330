"""Greedy decoding against the forward pass of the whole text, computed again for every new token."""

import dataclasses

import hf_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blockattn import blocks
from blockattn.models import decode, transformer
from blockattn.models.transformer import Compute, Llama3Rope, ModelConfig

CFG = ModelConfig('qwen3', vocab=30, width=16, layers=2, heads=4, kv_heads=2, head_dim=8, mlp=16, qk_norm=True,
                  learned_sinks=2)
COMPUTE = Compute(impl='reference')
VOCAB = 26    # the last four ids of the table are never to be produced
SINKS = (30, 31)
NEW = 5
NEVER = np.array([-1])   # no token has this id
LENGTH = 32   # of every forward pass, so that few programs are compiled
PROMPTS = ((5, 4, 3), (7, 2), (4,), (6, 1, 2, 1))
MODES = {'full': None, 'block': blocks.BlockOptions((), 'sequential', 4),
         'sinks': blocks.BlockOptions(SINKS, 'sequential', 4), 'sinks_local': blocks.BlockOptions(SINKS, 'local', 4)}


@pytest.fixture(scope='module')
def params():
  params = hf_cases.random_params(CFG, 'float32')
  params['head'][VOCAB:] *= 4   # what may not be produced is what would be most often
  return params


def greedy(params, tokens, layout, stop_ids):
  start = prefill(params, tokens, layout, CFG, COMPUTE, NEW)
  return decode.greedy(params, *start, cfg=CFG, compute=COMPUTE, length=NEW, stop_ids=stop_ids, vocab=VOCAB)


def prompt_tokens():
  rng = np.random.default_rng(3)
  return [rng.integers(1, VOCAB, size=sum(doc)).tolist() for doc in PROMPTS]


def rows_of(texts, options, more=0, shared_first=False):
  """tokens, layout and index of these texts, one per row; `more` of their tokens continue the prompt's last block."""
  lengths = [[(*doc[:-1], doc[-1] + more)] for doc in PROMPTS[:len(texts)]]
  layout = blocks.from_lengths(lengths, LENGTH, shared_first=shared_first)
  tokens = np.zeros((len(texts), LENGTH), np.int32)
  for row, text in zip(tokens, texts, strict=True):
    row[:len(text)] = text
  if options is None:
    return tokens, jax.tree.map(np.asarray, blocks.as_one_block(layout)), np.tile(np.arange(LENGTH), (len(texts), 1))
  tokens, layout, index = blocks.block_mode(tokens, layout, options)
  cut = lambda x: np.asarray(x)[:, :LENGTH]
  assert not np.any(np.asarray(layout.doc)[:, LENGTH:])
  return cut(tokens), jax.tree.map(cut, layout), np.asarray(index)


apply = jax.jit(transformer.apply, static_argnums=(3, 4))
prefill = jax.jit(decode.prefill, static_argnums=(3, 4, 5))
extend = jax.jit(decode.extend, static_argnums=(3, 4))


def last_states(params, texts, options, more, shared_first=False):
  """The hidden state of each text's last token, from a forward pass over all of it."""
  tokens, layout, index = rows_of(texts, options, more, shared_first)
  x_BTD = np.asarray(apply(params, tokens, layout, CFG, COMPUTE))
  return np.stack([x_TD[at[len(text) - 1]] for x_TD, at, text in zip(x_BTD, index, texts, strict=True)])


def recomputed(params, options):
  """Greedy answers without a cache, and whether a forbidden token was ever the most probable."""
  texts, forbidden = prompt_tokens(), False
  for more in range(NEW):
    scores = last_states(params, texts, options, more) @ params['head'].T
    forbidden |= bool(np.any(scores.argmax(axis=-1) >= VOCAB))
    texts = [[*text, int(token)] for text, token in zip(texts, scores[:, :VOCAB].argmax(axis=-1), strict=True)]
  return np.array([text[-NEW:] for text in texts]), forbidden


@pytest.mark.parametrize('options', MODES.values(), ids=MODES)
def test_greedy_is_the_whole_forward_pass_for_every_token(params, options):
  expected, forbidden = recomputed(params, options)
  tokens, layout, _ = rows_of(prompt_tokens(), options)
  np.testing.assert_array_equal(greedy(params, tokens, layout, stop_ids=NEVER), expected)
  assert forbidden and len(np.unique(expected)) > 4, 'the case has to be a hard one'


@pytest.mark.parametrize('mode, shared_first', [*((mode, False) for mode in MODES), ('sinks_local', True)])
def test_cached_states_are_those_of_the_whole_forward_pass(params, mode, shared_first):
  options = MODES[mode]
  texts = prompt_tokens()
  x_BD, cache = prefill(params, *rows_of(texts, options, 0, shared_first)[:2], CFG, COMPUTE, NEW)
  np.testing.assert_allclose(x_BD, last_states(params, texts, options, 0, shared_first), atol=1e-4)
  for more in (1, 2):
    new = np.arange(len(texts), dtype=np.int32) + more
    texts = [[*text, int(token)] for text, token in zip(texts, new, strict=True)]
    x_BD, cache = extend(params, new, cache, CFG, COMPUTE)
    np.testing.assert_allclose(x_BD, last_states(params, texts, options, more, shared_first), atol=1e-4)
  assert int(cache.used) == LENGTH + 2


def test_an_answer_ends_with_its_stop_token(params):
  options = MODES['sinks']
  tokens, layout, _ = rows_of(prompt_tokens(), options)
  free = np.asarray(greedy(params, tokens, layout, stop_ids=NEVER))
  stops = np.array([free[0, 1], free[1, 2]])   # an answer ends with any of them
  stopped = np.asarray(greedy(params, tokens, layout, stop_ids=stops))
  for got, plain in zip(stopped, free, strict=True):
    ends = np.flatnonzero(np.isin(plain, stops))[:1]
    length = int(ends[0]) + 1 if ends.size else NEW
    np.testing.assert_array_equal(got[:length], plain[:length])
    assert np.all(got[length:] == stops[0])
  assert np.any(stopped[0] != free[0])


def test_rows_of_padding_change_nothing(params):
  tokens, layout, _ = rows_of(prompt_tokens(), MODES['sinks'])
  expected = greedy(params, tokens, layout, stop_ids=NEVER)
  blank = lambda x: np.concatenate([x[:2], np.zeros_like(x[2:])])   # as the last batch of an evaluation is filled up
  got = greedy(params, blank(tokens), jax.tree.map(blank, layout), stop_ids=NEVER)
  np.testing.assert_array_equal(got[:2], expected[:2])
  x_BD, cache = prefill(params, blank(tokens), jax.tree.map(blank, layout), CFG, COMPUTE, NEW)
  x_BD, _ = extend(params, jnp.zeros(len(PROMPTS), jnp.int32), cache, CFG, COMPUTE)
  assert np.all(np.isfinite(x_BD))


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('scaling', [None, Llama3Rope(8.0, 1.0, 4.0, 64)])
def test_keys_are_read_from_their_pages_as_if_they_stood_rotated_in_a_row(scaling, dtype):
  cfg = dataclasses.replace(CFG, rope_scaling=scaling)
  rng, rows, count, page = np.random.default_rng(5), 2, 24, 16
  k, v = (jnp.asarray(rng.normal(size=(cfg.layers, 40, page, cfg.kv_heads, cfg.head_dim)), dtype) for _ in range(2))
  pages = np.stack([rng.permutation(40)[:count] for _ in range(rows)]).astype(np.int32)
  position = rng.integers(0, 5000, (rows, count * page)).astype(np.int32)
  angles = transformer.rotary_angles(position, cfg)
  context = decode.Context(k, v, jnp.asarray(pages), angles, jnp.ones(position.shape, bool))
  read = jax.jit(lambda layer, start: decode.slots_of(context, layer)(start, 8 * page))
  gathered = jax.jit(decode.gather)(context)

  def same(got, wanted):
    assert got.dtype == dtype
    np.testing.assert_allclose(got.astype('float32'), wanted.astype('float32'), rtol=0,
                               atol=0 if dtype == 'bfloat16' else 1e-6)

  for layer in range(cfg.layers):
    whole = [x[layer][pages].reshape(rows, -1, *x.shape[3:]) for x in (k, v)]
    whole = decode.as_read(transformer.rotate(whole[0], angles), whole[1])
    for start in (0, 3 * page, (count - 8) * page):
      slots = slice(start, start + 8 * page)
      for part, wanted in zip(read(layer, start), (whole[0][..., slots], whole[1][..., slots, :]), strict=True):
        same(part, wanted)
    for part, wanted in zip((gathered.k[layer], gathered.v[layer]), whole, strict=True):
      same(part, wanted)


@pytest.mark.parametrize('least, steps, sizes', [(32, 2, {1: 32, 32: 32, 33: 48, 49: 64, 65: 96, 97: 128, 4097: 6144}),
                                                 (1, 2, {1: 1, 2: 2, 3: 3, 4: 4, 5: 6, 7: 8, 9: 12}),
                                                 (32, 4, {1: 32, 33: 40, 64: 64, 65: 80, 129: 160, 225: 256, 257: 320})])
def test_arrays_have_few_sizes(least, steps, sizes):
  assert {n: decode.bucket(n, least, steps) for n in sizes} == sizes
