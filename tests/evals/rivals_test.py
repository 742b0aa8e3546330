"""Rivals against their papers' computation, written down once more in float64, document by document."""

import dataclasses
import re

import data_cases
import hf_cases
import jax
import numpy as np
import pytest

from blockattn import blocks
from blockattn.data import encode
from blockattn.evals import gap, rivals
from blockattn.models.transformer import Compute, ModelConfig

CFG = ModelConfig('llama', vocab=24, width=16, layers=2, heads=4, kv_heads=2, head_dim=8, mlp=16)
PARAMS = hf_cases.random_params(CFG, 'float32', seed=3)
BARE = blocks.BlockOptions((), 'sequential', max_blocks=1)
PREFIX = (7, 5, 7)
NEW = 3
NOBODY = np.array([CFG.vocab], np.int32)   # no token ends an answer


@pytest.fixture(scope='module', params=[0, 1])
def docs(request):
  rng = np.random.default_rng(request.param)
  lengths = [*(tuple(rng.integers(1, 12, size=rng.integers(2, 6))) for _ in range(3)), ()]
  lengths = [(*map(int, own), 5) for own in lengths]   # the question has two tokens, the answer three
  return [encode.EncodedDoc(rng.integers(1, CFG.vocab, size=sum(own), dtype=np.int32), own, (sum(own) - 3, sum(own)),
                            continued=tuple(i > 0 for i in range(len(own)))) for own in lengths]


def subject(reading, options=BARE, mode='block'):
  return gap.Subject(PARAMS, CFG, Compute(impl='xla'), mode, options, reading=reading)


def read(model, docs, max_new=0):
  """(logits of the tokens of every last block, greedy answers)."""
  rows = gap._rows(docs, len(docs))
  hidden, said = gap._read(model, rows, rows, max_new, NOBODY)
  last = [np.asarray(x, np.float64)[len(doc.tokens) - doc.lengths[-1]:len(doc.tokens)]
          for x, doc in zip(hidden, docs, strict=True)]
  return [x @ PARAMS['head'].T.astype(np.float64) for x in last], said


# The model once more.

def norm(x, scale):
  return x / np.sqrt((x ** 2).mean(axis=-1, keepdims=True) + CFG.norm_eps) * scale


def layer_of(index):
  return jax.tree.map(lambda w: np.asarray(w[index], np.float64), PARAMS['layers'])


def embed(tokens):
  return PARAMS['embed'].astype(np.float64)[tokens]


def qkv(x, index, position):
  """Queries and keys rotated; [tokens, heads, 8], those of keys and values repeated for their queries."""
  w = layer_of(index)
  h = norm(x, w['attn_norm'])
  angle = np.asarray(position)[:, None, None] * CFG.rope_theta ** (-np.arange(4) / 4)
  turn = np.exp(1j * angle)

  def rotated(name):
    y = np.einsum('td,dnh->tnh', h, w[name])
    y = (y[..., :4] + 1j * y[..., 4:]) * turn
    return np.concatenate([y.real, y.imag], axis=-1)

  twice = lambda y: np.repeat(y, 2, axis=1)
  return rotated('q'), twice(rotated('k')), twice(np.einsum('td,dnh->tnh', h, w['v']))


def behind(x, index, out):
  """The residual stream behind a layer, from what its attention gives."""
  w = layer_of(index)
  x = x + np.einsum('tnh,nhd->td', out, w['o'])
  h = norm(x, w['mlp_norm'])
  gate = h @ w['gate']
  return x + (gate / (1 + np.exp(-gate)) * (h @ w['up'])) @ w['down']


def attend(q, k, v, seen, temperature=1.0):
  """(output, logsumexp) of every query over the keys that it sees."""
  scores = np.where(seen[None], np.einsum('tnh,snh->nts', q, k) / np.sqrt(8) / temperature, -np.inf)
  peak = np.maximum(scores.max(axis=-1, keepdims=True, initial=-np.inf), -1e9)
  weights = np.exp(scores - peak)
  total = weights.sum(axis=-1)
  with np.errstate(divide='ignore'):
    lse = np.log(total) + peak[..., 0]
  return np.einsum('nts,snh->tnh', weights / np.maximum(total, 1e-300)[..., None], v), lse.T


def states(tokens, position):
  """(keys, values) of every layer, of tokens that are read causally, alone."""
  x, kept, causal = embed(tokens), [], np.tri(len(tokens), dtype=bool)
  for index in range(CFG.layers):
    q, k, v = qkv(x, index, position)
    kept.append((k, v))
    x = behind(x, index, attend(q, k, v, causal)[0])
  return kept


def blocks_of(tokens, lengths):
  """(tokens, their places) of every block but the last, and of the last."""
  places = np.split(np.arange(len(tokens)), np.cumsum(lengths)[:-1])
  return [(tokens[at], at) for at in places[:-1]], (tokens[places[-1]], places[-1])


def logits(x):
  return norm(x, PARAMS['final_norm'].astype(np.float64)) @ PARAMS['head'].T.astype(np.float64)


def read_again(tokens, kept, again, question):
  """The question's logits behind context states, of which those at places `again` are computed anew."""
  at = np.array(sorted({*again, *question}))
  x, seen = embed(tokens[at]), np.arange(len(tokens)) <= at[:, None]
  for index, (keys, values) in enumerate(kept):
    q, k, v = qkv(x, index, at)
    keys, values = keys.copy(), values.copy()
    keys[at], values[at] = k, v
    x = behind(x, index, attend(q, keys, values, seen)[0])
  return logits(x)[-len(question):]


def joined(parts):
  """States of parts of a text -> of the text."""
  return [tuple(np.concatenate(x) for x in zip(*layer, strict=True)) for layer in zip(*parts, strict=True)]


def block_states(tokens, lengths):
  context, last = blocks_of(tokens, lengths)
  return joined([states(*block) for block in [*context, last]])


def epic(tokens, lengths, count):
  context, (_, question) = blocks_of(tokens, lengths)
  again = [place for _, at in context[1:] for place in at[:count]]
  return read_again(tokens, block_states(tokens, lengths), again, question)


def hidden(tokens, lengths):
  """Behind the first block their first tokens are left out of the text once they have been read."""
  context, (question, _) = blocks_of(tokens, lengths)
  text, parts, start = np.zeros(0, int), [], 0
  for own, at in context:
    gone = int(at[0] > 0)
    parts.append([(k[gone:], v[gone:]) for k, v in states(own, start - gone + np.arange(len(own)))])
    text, start = np.append(text, own[gone:]), start + len(own) - gone
  places = start + np.arange(len(question))
  return read_again(np.append(text, question), joined([*parts, states(question, places)]), (), places)


def overlap(tokens, lengths, count):
  context, last = blocks_of(tokens, lengths)
  parts, before = [], np.zeros(0, int)
  for own, at in context:
    both = states(np.concatenate([before, own]), at[0] - len(before) + np.arange(len(before) + len(own)))
    parts.append([(k[len(before):], v[len(before):]) for k, v in both])
    before = own[-count:]
  return read_again(tokens, joined([*parts, states(*last)]), (), last[1])


def cacheblend(tokens, lengths, share):
  own, full = block_states(tokens, lengths), states(tokens, np.arange(len(tokens)))
  _, (_, question) = blocks_of(tokens, lengths)
  count = int(share * len(tokens[:question[0]]) + 1e-6)
  apart = sum(((x - y) ** 2).sum(axis=(1, 2)) for x, y in zip(own[1], full[1], strict=True))
  return read_again(tokens, own, np.argsort(-apart[:question[0]], kind='stable')[:count], question)


def star(tokens, lengths):
  context, last = blocks_of(tokens, lengths)
  anchored = [states(*block) for block in context[:1]]
  for own, at in context[1:]:
    anchor, first = context[0]
    both = states(np.concatenate([anchor, own]), np.concatenate([first, at]))
    anchored.append([(k[len(anchor):], v[len(anchor):]) for k, v in both])
  return read_again(tokens, joined([*anchored, states(*last)]), (), last[1])


def ape(tokens, lengths, temperature, scale, prefix=PREFIX):
  context, (question, _) = blocks_of(tokens, lengths)
  prefix = np.array(prefix, int)
  front = len(prefix)
  parts = [states(np.concatenate([prefix, own]), np.arange(front + len(own))) for own, _ in context]
  parts = [[(k[front:], v[front:]) for k, v in part] for part in parts]
  nothing = [(np.zeros((0, 4, 8)),) * 2] * CFG.layers
  read_first, far = states(prefix, np.arange(front)), joined([nothing, *parts])
  start = max([front, *(front + len(own) for own, _ in context)])
  x, causal = embed(question), np.tri(len(question), dtype=bool)
  for index in range(CFG.layers):
    q, k, v = qkv(x, index, start + np.arange(len(question)))
    k, v = (np.concatenate([old, new]) for old, new in zip(read_first[index], (k, v), strict=True))
    near, lse_near = attend(q, k, v, np.concatenate([np.ones((len(question), front), bool), causal], axis=1))
    there = np.ones((len(question), len(far[index][0])), bool)
    context_out, lse = attend(q, *far[index], there, temperature)
    weight = np.exp(scale * lse) / (np.exp(scale * lse) + np.exp(lse_near))
    x = behind(x, index, weight[..., None] * context_out + (1 - weight[..., None]) * near)
  return logits(x)


APE = dataclasses.replace(BARE, sink_ids=PREFIX, positions='local')
CASES = {
    'epic': (rivals.Epic(2), BARE.with_seam(2), lambda *doc: epic(*doc, 2)),
    'hidden': (rivals.Hidden(), dataclasses.replace(BARE, hide_starts=True), hidden),
    'overlap': (rivals.Overlap(3), rivals.Overlap(3).options(None), lambda *doc: overlap(*doc, 3)),
    'star': (rivals.Star(), rivals.Star().options(None), star),
    'ape': (rivals.Ape(0.7, 0.8, 3), APE, lambda *doc: ape(*doc, 0.7, 0.8)),
    'ape_sharp': (rivals.Ape(1.2, 1.3, 3), APE, lambda *doc: ape(*doc, 1.2, 1.3)),
    'cacheblend': (rivals.CacheBlend(0.3), BARE, lambda *doc: cacheblend(*doc, 0.3)),
}


@pytest.mark.parametrize('name', CASES)
def test_scores_and_answers_are_those_of_the_paper(docs, name):
  reading, options, paper = CASES[name]
  got, said = read(subject(reading, options), docs, NEW)
  bare, _ = read(subject(gap.Reading()), docs)
  for doc, own in zip(docs, got, strict=True):
    np.testing.assert_allclose(own, paper(doc.tokens, doc.lengths), atol=1e-4, rtol=1e-4)
  assert max(np.abs(own - plain).max() for own, plain in zip(got, bare, strict=True)) > 1e-2
  for doc, tokens in zip(docs, np.asarray(said), strict=True):
    text, lengths = doc.tokens[:doc.answer[0]], (*doc.lengths[:-1], doc.lengths[-1] - 3)
    for token in tokens:
      assert token == paper(text, lengths)[-1].argmax()
      text, lengths = np.append(text, token), (*lengths[:-1], lengths[-1] + 1)


@pytest.mark.parametrize('reading, options, like', [
    (rivals.CacheBlend(1.0), BARE, subject(gap.Reading(), mode='full')),
    (rivals.CacheBlend(0.0), BARE, subject(gap.Reading())),
    (rivals.Epic(50), BARE.with_seam(50), subject(gap.Reading(), mode='full')),
    (rivals.Epic(0), BARE, subject(gap.Reading())),
    (rivals.Ape(1.0, 1.0, 0), dataclasses.replace(APE, sink_ids=()),
     subject(gap.Reading(), dataclasses.replace(BARE, positions='local'))),
])
def test_limits(docs, reading, options, like):
  (got, said), (wanted, answers) = (read(model, docs, NEW) for model in (subject(reading, options), like))
  for own, other in zip(got, wanted, strict=True):
    np.testing.assert_allclose(own, other, atol=1e-4, rtol=1e-4)
  np.testing.assert_array_equal(said, answers)


def test_the_share_that_is_computed_again(docs):
  context = sum(sum(doc.lengths[:-1]) for doc in docs)
  share = lambda reading, options=BARE, mode='block': gap.recomputed(docs, subject(reading, options, mode))
  assert share(gap.Reading(), mode='full') == share(rivals.CacheBlend(1.0)) == 1
  nothing = [gap.Reading(), rivals.Star(), rivals.Ape(0.9, 0.9, 3), rivals.CacheBlend(0.0), rivals.Epic(0)]
  assert [share(reading) for reading in nothing] == [0] * 5
  assert share(rivals.CacheBlend(0.3)) == sum(int(0.3 * sum(doc.lengths[:-1]) + 1e-6) for doc in docs) / context
  seams = sum(min(2, length) for doc in docs for length in doc.lengths[1:-1])
  assert share(rivals.Epic(2), BARE.with_seam(2)) == seams / context


def test_rivals_are_asked_for_by_name_and_numbers():
  found = rivals.parse('epic:8,star,ape:0.9:1:0,cacheblend:0.15')
  assert list(found.values()) == [rivals.Epic(8), rivals.Star(), rivals.Ape(0.9, 1.0, 0), rivals.CacheBlend(0.15)]
  tokenizer = data_cases.tiny_tokenizer()
  made = rivals.subjects(found, subject(gap.Reading(), mode='full'), tokenizer)
  assert list(made) == ['teacher_epic:8', 'teacher_star', 'teacher_ape:0.9:1:0', 'teacher_cacheblend:0.15']
  assert [one.options.positions for one in made.values()] == ['sequential', 'sequential', 'local', 'sequential']
  assert made['teacher_epic:8'].options.seam == 8 and made['teacher_star'].options.shared_first
  assert {one.mode for one in made.values()} == {'block'}


@pytest.mark.parametrize('text, message', [
    ('epik:8', '--rivals epik:8: give some of epic:tokens, star, ape:temperature:scale:prefix, cacheblend:share'),
    ('star,', '--rivals : give some of'), ('epic', '--rivals epic: give'), ('star:1', '--rivals star:1: give'),
    ('epic:2.5', '--rivals epic:2.5: give'), ('overlap:1025', '--rivals overlap: tokens=1025; give a number from 0 to 1024'),
    ('epic:-1', '--rivals epic: tokens=-1; give a number from 0'),
    ('cacheblend:15', '--rivals cacheblend: share=15.0; give a number from 0 to 1'),
    ('ape:0:1:4', '--rivals ape: temperature=0.0; give a number above 0'), ('ape:1:nan:4', '--rivals ape: scale=nan; give'),
    ('ape:1:1', '--rivals ape:1:1: give'),
])
def test_what_is_malformed_is_said_in_one_line(text, message):
  with pytest.raises(ValueError, match='^' + re.escape(message)) as refused:
    rivals.parse(text)
  assert '\n' not in str(refused.value)
