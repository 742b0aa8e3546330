"""Answers over cached blocks against the masked forward pass of the same prompt."""

import contextlib
import dataclasses
import re

import data_cases
import hf_cases
import jax
import numpy as np
import pytest
import tokenizers

from blockattn import blocks
from blockattn.data import encode, prompts
from blockattn.inference import cache, engine as engine_lib, plan, pool, stopwatch
from blockattn.inference.engine import Engine
from blockattn.inference.plan import Request
from blockattn.models import decode, transformer
from blockattn.models.transformer import Compute

SINKS = {'qwen3_tied': (48, 49), 'qwen3_bias': (), 'llama_rope': (3, 3, 3), 'llama_bias': (48,)}
STOP = 0
# model, position scheme, devices, dtype, implementation of attention
CASES = [('qwen3_tied', 'sequential', 1, 'float32', 'xla'), ('llama_rope', 'local', 1, 'float32', 'reference'),
         ('qwen3_bias', 'sequential', 8, 'float32', 'reference'), ('llama_rope', 'local', 3, 'float32', 'reference'),
         ('llama_bias', 'local', 1, 'bfloat16', 'reference'), ('qwen3_tied', 'sequential', 1, 'bfloat16', 'reference')]


def model(name):
  """(cfg, float32 parameters), with learned sinks where the model's sinks are no tokens of it."""
  cfg = dataclasses.replace(hf_cases.MODELS[name], learned_sinks=sum(s >= 48 for s in SINKS[name]), max_positions=2048)
  return cfg, hf_cases.random_params(cfg, 'float32')


@pytest.fixture(scope='module')
def words(tmp_path_factory):
  folder = hf_cases.write_tokenizer(tmp_path_factory.mktemp('tokenizer'), 48)
  return tokenizers.Tokenizer.from_file(str(folder / 'tokenizer.json'))


@pytest.fixture(scope='module')
def subject(words):
  """An engine for tests that do not look at what others have left in its pool."""
  return engine('qwen3_tied', words)


def engine(name, words, positions='sequential', devices=1, dtype='float32', impl='reference', shared=False, form=(), **more):
  cfg, params = model(name)
  options = blocks.BlockOptions(SINKS[name], positions, max_blocks=1, shared_first=shared, **dict(form))
  more = dict(stop_ids=(STOP,), device_tokens=1024) | more
  return Engine(params, cfg, Compute(dtype=dtype, impl=impl), options, words, devices=jax.devices()[:devices], **more)


def masked_logits(name, prompt, positions, dtype='float32', shared=False):
  """Of the token after the prompt, from one masked forward pass."""
  cfg, params = model(name)
  return masked(params, cfg, Compute(dtype=dtype, impl='reference'), blocks.BlockOptions(SINKS[name], positions, 8, shared),
                prompt)


def masked(params, cfg, compute, options, prompt, seam=None):
  lengths = [list(map(len, prompt))]
  layout = blocks.from_lengths([lengths], 256)
  tokens = np.zeros((1, 256), np.int32)
  tokens[0, :sum(lengths[0])] = np.concatenate(prompt)
  continued = np.zeros((1, 256), bool)
  continued[0, :sum(lengths[0])] = np.repeat([isinstance(own, blocks.Continued) for own in prompt], lengths[0])
  tokens, layout, index = _block_mode(tokens, layout, options, seam, continued=continued)
  x_BTD = _apply(params, tokens, layout, cfg, compute)
  return np.asarray(transformer.logits(params, x_BTD[0, int(index[0, sum(lengths[0]) - 1])], cfg))


def masked_answers(params, cfg, tokens, layout):
  """Twelve greedy tokens behind each prompt, read in one masked forward pass."""
  start = decode.prefill(params, tokens, layout, cfg, Compute(impl='reference'), 12)
  return np.asarray(decode.greedy(params, *start, cfg=cfg, compute=Compute(impl='reference'), length=12,
                                  stop_ids=np.array([STOP]), vocab=48)).tolist()


_apply = jax.jit(transformer.apply, static_argnums=(3, 4))
_block_mode = jax.jit(blocks.block_mode, static_argnums=2)


@pytest.mark.parametrize('positions, template, adds_bos', [
    ('sequential', None, False), ('local', None, True), ('local', data_cases.CHATML, False),
    ('sequential', data_cases.TRIMMING, True)])
def test_passages_in_another_order_are_all_found_again(positions, template, adds_bos):
  tokenizer = data_cases.tiny_tokenizer(template, adds_bos=adds_bos)
  cfg = dataclasses.replace(hf_cases.MODELS['llama_rope'], vocab=len(tokenizer), max_positions=2048)
  params, options = hf_cases.random_params(cfg, 'float32'), blocks.BlockOptions((3, 3), positions, max_blocks=8)
  compute = Compute(impl='reference')
  asked = Engine(params, cfg, compute, options, tokenizer, stop_ids=(), device_tokens=1024)
  lines = {name: {'passages': [{'title': '', 'text': text} for text in name], 'question': f'{name}?', 'answers': ['x']}
           for name in ('ABC', 'BCA', 'CBA', 'CA', 'B')}
  for name, line in lines.items():
    example = prompts.parse_record(line, where='f:1', chat=bool(template), tokenizer=tokenizer,
                                  template=prompts.CHAT if template else prompts.PLAIN)
    prompt = encode.Encoder(tokenizer).prompt(example)
    found = asked.prepare([Request(prompt)])[0]
    assert len(found) == len(name) + (template is not None or adds_bos)   # a header
    assert {block.found for block in found} == ({'computed'} if name == 'ABC' else {'device'})
    np.testing.assert_allclose(asked.logits(Request(prompt)), masked(params, cfg, compute, options, prompt), atol=1e-4)


def random_prompt(rng, context=(1, 2, 4)):
  """Blocks of sizes that all fall into one bucket, so that few programs are compiled."""
  sizes = rng.integers(1, 29, size=rng.choice(context) + 1).tolist()
  return [(list if i == 2 else blocks.Continued)(rng.integers(1, 48, size=n).tolist()) for i, n in enumerate(sizes)]


def rms(x):
  return float(np.sqrt(np.mean(np.square(x))))


@pytest.mark.parametrize('name, positions, devices, dtype, impl', CASES)
def test_cached_logits_are_those_of_the_masked_forward_pass(words, name, positions, devices, dtype, impl):
  rng = np.random.default_rng(devices)
  ways = (False, True) if positions == 'local' else (False,)
  subjects = [engine(name, words, positions, devices, dtype, impl, shared) for shared in ways]
  prompts = [[rng.integers(1, 48, size=9).tolist()], *(random_prompt(rng, (2, 4)) for _ in range(5))]
  prompts += [[*reversed(prompt[:-1]), prompt[-1]] for prompt in prompts[-2:]]   # the same blocks in another order
  off, own = [], []
  for i, prompt in enumerate(prompts):
    shared = i % len(subjects)
    cached = subjects[shared].logits(Request(prompt, max_new=1))
    exact = masked_logits(name, prompt, positions, shared=bool(shared))
    if dtype == 'float32':
      np.testing.assert_allclose(cached, exact, atol=1e-4)
    off.append(cached - exact)
    own.append(masked_logits(name, prompt, positions, dtype, shared=bool(shared)) - exact)
  # bfloat16 rounds, here as there: reading blocks from a cache adds nothing to what it costs anyway.
  assert rms(np.stack(off)) <= 1.25 * rms(np.stack(own)) + 1e-5


SEAM = 40   # longer than any block
FORMS = {'seam': {}, 'tails': {'tail_ids': (5, 6)}, 'links': {'tail_ids': (5, 6), 'links': True},
         'overlap': {'hide_starts': True, 'overlap': 2}, 'long_overlap': {'hide_starts': True, 'overlap': 20},
         'hidden': {'hide_starts': True}, 'hidden_links': {'tail_ids': (5, 6), 'links': True, 'hide_starts': True}}


@pytest.mark.parametrize('form, name, positions, devices, shared', [
    ('seam', 'qwen3_tied', 'sequential', 1, False), ('seam', 'llama_rope', 'local', 3, True),
    ('tails', 'llama_rope', 'local', 1, False), ('links', 'qwen3_tied', 'sequential', 8, False),
    ('links', 'llama_rope', 'local', 1, False), ('links', 'qwen3_tied', 'local', 1, True),
    ('hidden', 'qwen3_bias', 'sequential', 1, False), ('hidden', 'llama_rope', 'local', 3, True),
    ('hidden_links', 'llama_rope', 'sequential', 1, False), ('overlap', 'qwen3_tied', 'sequential', 1, False),
    ('overlap', 'llama_rope', 'local', 3, True), ('long_overlap', 'qwen3_bias', 'sequential', 1, False)])
def test_what_is_read_again_beside_cached_blocks(words, form, name, positions, devices, shared):
  """Seams of no token, of some and of whole blocks, chosen anew for every prompt, tails and links; the states stay."""
  rng, (cfg, params) = np.random.default_rng(7), model(name)
  subject = engine(name, words, positions, devices, shared=shared, form=FORMS[form])
  options = blocks.BlockOptions(SINKS[name], positions, 8, shared, seam=SEAM, **FORMS[form])
  prompts, off = [[[9] * 3, blocks.Continued([4, 5, 6]), [7, 8]], random_prompt(rng, (3, 4))], []
  for prompt in prompts:
    for seam in (0, 1, 3, SEAM):
      exact = masked(params, cfg, Compute(impl='reference'), options, prompt, np.int32(seam))
      asked = Request(prompt, max_new=1, seam=seam)
      np.testing.assert_allclose(subject.logits(asked), exact, atol=1e-4, err_msg=f'{seam}')
      off.append(exact)
    assert {block.found for block in subject.prepare([asked])[0]} == {'device'}
  assert np.abs(off[-1] - off[-4]).max() > 1e-3, 'the case has to be a hard one'


def test_pages_that_nobody_sees_are_not_read():
  options = blocks.BlockOptions((), 'sequential', 8, hide_starts=True, overlap=2 * pool.PAGE + 3)
  made = plan.make(0, Request([[1] * 100, blocks.Continued([2] * 50), [3]]), options, cache.Keys(b''))
  pages = {block.key: {0: np.arange(pool.pages_of(len(block.tokens))) + 100 * i} for i, block in enumerate(made.context)}
  found, position, visible, _ = plan.context_arrays([made], 1, pages.__getitem__, 1)
  np.testing.assert_array_equal(position[visible], np.arange(150))
  assert found[0, :12].tolist() == [*range(7), 102, 103, 104, 105, 0]   # the overlap is two pages and three tokens


def test_answers_with_seams_are_those_of_the_masked_forward_pass(words):
  rng, (cfg, params) = np.random.default_rng(8), model('llama_rope')
  form = {'tail_ids': (5,), 'links': True, 'seam': 3, 'align': 4}
  prompts = [random_prompt(rng, (n,)) for n in (1, 3, 4)]
  layout = blocks.from_lengths([[list(map(len, p))] for p in prompts], 256)
  tokens = np.zeros((3, 256), np.int32)
  for row, prompt in zip(tokens, prompts, strict=True):
    row[:sum(map(len, prompt))] = np.concatenate(prompt)
  subject, want = engine('llama_rope', words, 'local', form=form), {}
  for seam in (0, 3):
    options = blocks.BlockOptions(SINKS['llama_rope'], 'local', 8, **form)
    made = masked_answers(params, cfg, *_block_mode(tokens, layout, options, np.int32(seam))[:2])
    want[seam] = [[t for t in row if t != STOP] for row in made]
  got = lambda requests: [list(answer.tokens) for answer in subject.generate(requests)]
  assert got([Request(prompt, max_new=12) for prompt in prompts]) == want[3] != want[0]
  assert got([Request(prompt, max_new=12, seam=0) for prompt in prompts]) == want[0]
  mixed = [Request(prompt, max_new=12, seam=seam) for prompt, seam in zip(prompts, (3, 0, 3), strict=True)]   # in one batch
  assert got(mixed) == [want[3][0], want[0][1], want[3][2]]


def test_blocks_are_computed_without_communication_and_read_with_it():
  cfg, params = model('qwen3_tied')
  mesh, compute = pool.make_mesh(jax.devices()), Compute(impl='xla')
  held = pool.Pool(cfg, 'float32', mesh, 1024)
  rows, pages = (np.zeros((8, 32), np.int32), np.full(8, 32, np.int32)), np.zeros((8, 2), np.int32)
  none = np.zeros((8, 0), np.int32), np.int32(0)
  how = dict(cfg=cfg, compute=compute, mesh=mesh)
  fill = pool._fill.lower(params, held.k, held.v, *rows, pages, *none, **how).compile().as_text()
  context = held.context(np.zeros((1, 8), np.int32), np.zeros((1, 128), np.int32), np.ones((1, 128), bool), None, cfg)
  one = np.array([9], np.int32)
  read = engine_lib._read.lower(params, np.zeros((1, 32), np.int32), one, one, None, context, room=32,
                                **how).compile().as_text()
  collectives = re.compile(r'all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter')
  assert not collectives.search(fill)
  assert set(collectives.findall(read)) == {'all-gather'}


def test_a_block_is_found_where_it_was_left(words, tmp_path):
  rng = np.random.default_rng(1)
  prompt = [rng.integers(1, 48, size=n).tolist() for n in (20, 30, 25, 6)]
  exact = masked_logits('qwen3_tied', prompt, 'sequential')
  other = [rng.integers(1, 48, size=100).tolist(), [5]]
  with cache.Store(memory_bytes=1 << 20, folder=tmp_path) as store:
    subject = engine('qwen3_tied', words, store=store, device_tokens=128)
    found = lambda request: [block.found for block in subject.generate([request])[0].blocks]
    asked = Request(prompt, max_new=1)
    assert found(asked) == ['computed'] * 3
    assert found(asked) == ['device'] * 3
    assert found(Request([prompt[0], prompt[2], prompt[1], [7]], max_new=1)) == ['device'] * 3   # in another order
    assert found(Request([prompt[1], prompt[0], [7]], max_new=1)) == ['device'] * 2   # the first one too
    assert found(Request(other, max_new=1)) == ['computed']   # and takes the pages of the others
    assert found(asked) == ['memory'] * 3
    np.testing.assert_allclose(subject.logits(asked), exact, atol=1e-4)
  with cache.Store(memory_bytes=0, folder=tmp_path) as store:
    later = engine('qwen3_tied', words, store=store)
    np.testing.assert_allclose(later.logits(asked), exact, atol=1e-4)
    assert store.counts.disk == 3 and store.counts.missing == 0
  with cache.Store(memory_bytes=1 << 20, folder=tmp_path) as store:   # other weights, other states
    cfg, params = model('qwen3_tied')
    params['layers']['v'] = params['layers']['v'] * np.float32(1 + 2 ** -20)
    options = blocks.BlockOptions(SINKS['qwen3_tied'], 'sequential', 1)
    stranger = Engine(params, cfg, Compute(impl='reference'), options, words, stop_ids=(STOP,), store=store,
                      device_tokens=1024)
    assert [block.found for block in stranger.generate([asked])[0].blocks] == ['computed'] * 3


def test_int8_states_come_back_within_their_bound(words):
  rng = np.random.default_rng(2)
  prompts = [random_prompt(rng, (2, 4)) for _ in range(4)]
  off, size, found = [], [], 0
  store = cache.Store(quantize='int8')
  subject = engine('qwen3_tied', words, store=store)
  for prompt in prompts:
    subject.prepare([Request(prompt)])
    subject.forget()
    got, found = subject.logits(Request(prompt, max_new=1)), found + len(prompt) - 1
    assert store.counts.memory == found
    exact = masked_logits('qwen3_tied', prompt, 'sequential')
    off.append(got - exact)
    size.append(exact)
  assert 1e-5 < rms(np.stack(off)) / rms(np.stack(size)) < 0.03


def test_answers_do_not_depend_on_their_neighbours(words):
  rng = np.random.default_rng(3)
  requests = [Request(random_prompt(rng, (i,)), max_new=4 + i, temperature=t, top_k=k, top_p=p, seed=i)
              for i, (t, k, p) in enumerate([(1.5, 0, 0.9), (1.0, 0, 1.0), (0.7, 20, 1.0), (0, 3, 0.5)])]
  subject = engine('llama_rope', words, 'local')
  together = subject.generate(requests)
  alone = [subject.generate([request])[0] for request in requests]
  assert [a.tokens for a in together] == [a.tokens for a in alone]
  assert all(len(a.tokens) == r.max_new or a.ended == 'token' for a, r in zip(together, requests, strict=True))
  reseeded = subject.generate([dataclasses.replace(requests[1], seed=99)])[0]
  assert reseeded.tokens != together[1].tokens


def test_greedy_answers_are_those_of_the_masked_forward_pass(subject):
  rng = np.random.default_rng(4)
  cfg, params = model('qwen3_tied')
  prompts = [random_prompt(rng) for _ in range(3)]
  layout = blocks.from_lengths([[list(map(len, p))] for p in prompts], 256)
  tokens = np.zeros((3, 256), np.int32)
  for row, prompt in zip(tokens, prompts, strict=True):
    row[:sum(map(len, prompt))] = np.concatenate(prompt)
  tokens, layout, _ = blocks.block_mode(tokens, layout, blocks.BlockOptions(SINKS['qwen3_tied'], 'sequential', 8))
  want = masked_answers(params, cfg, tokens, layout)
  got = subject.generate([Request(prompt, max_new=12) for prompt in prompts])
  for row, answer in zip(want, got, strict=True):
    assert list(answer.tokens) == [t for t in row if t != STOP]


def test_streamed_text_is_the_answer_and_ends_before_stop_texts(words):
  prompt = [[4, 5, 6], [7, 8]]
  subject = engine('llama_bias', words)
  whole = subject.generate([Request(prompt, max_new=10)])[0]
  heard = []
  assert whole.ended == 'length' and len(whole.tokens) == 10
  stop = words.decode([whole.tokens[4]])
  first = [words.decode([token]) for token in whole.tokens].index(stop)
  cut = subject.generate([Request(prompt, max_new=10, stop=('never', stop))],
                         on_text=lambda i, text: heard.append((i, text)))
  assert cut[0].ended == 'text' and stop not in cut[0].text.split()
  assert ''.join(text for _, text in heard) == cut[0].text
  assert cut[0].text.split() == whole.text.split()[:first]
  assert cut[0].tokens == whole.tokens[:first + 1]


@contextlib.contextmanager
def compilations():
  names, on = [], [True]
  jax.monitoring.register_event_duration_secs_listener(
      lambda name, seconds, **_: names.append(name) if on[0] and 'backend_compile' in name else None)
  yield names
  on[0] = False


def test_nothing_is_compiled_after_warm_up(words):
  rng = np.random.default_rng(5)
  sizes = ((20, 28, 7), (29, 4, 30, 9), (9, 17, 25, 3))   # with sinks no more than 32
  prompts = [[rng.integers(1, 48, size=n).tolist() for n in own] for own in sizes]
  jax.clear_caches()
  subject = engine('qwen3_tied', words, store=cache.Store())
  with compilations() as seen:
    subject.generate([Request(p, max_new=9) for p in prompts[:1]])
    subject.forget()
    subject.generate([Request(p, max_new=9) for p in prompts[:1]])   # loads from memory
    warm = len(seen)
    assert warm > 3   # that the counting counts
    for prompt in prompts:
      subject.generate([Request(prompt, max_new=int(rng.integers(1, 30)))])
  assert len(seen) - warm <= 2   # two and three missing blocks are computed together: rows of two more sizes
  with compilations() as seen:
    for prompt in prompts:
      fresh = [rng.permutation(block).tolist() for block in prompt]
      subject.generate([Request(fresh, max_new=int(rng.integers(1, 30)))])
  assert not seen


@pytest.mark.parametrize('change, message', [
    (dict(prompt=[]), 'request 1: a prompt must be a list of blocks'), (dict(prompt=[[1], []]), 'none of them empty'),
    (dict(prompt=[[1], [48]]), 'token .* has the id 48, and the model has 48 rows'), (dict(prompt=[[-1]]), 'the id -1'),
    (dict(max_new=0), 'at least one token'), (dict(seam=-1), 'seam=-1'),
    (dict(stop=('',)), 'empty stop'), (dict(top_p=0.0), 'top_p=0.0'),
    (dict(temperature=-1.0), 'temperature=-1.0'), (dict(temperature=float('nan')), 'temperature=nan'),
    (dict(max_new=3000), 'the model has 2048'), (dict(prompt=[[1] * 1500, [1]]), 'device_tokens'),
])
def test_what_cannot_be_answered_is_said_before_anything_is_computed(subject, change, message):
  good = Request([[1, 2], [3]], max_new=2)
  with compilations() as seen, pytest.raises(ValueError, match=message):
    subject.generate([good, dataclasses.replace(good, **change)])
  assert not seen


def test_a_shared_prefix_at_sequential_positions_is_refused(words):
  with pytest.raises(ValueError, match="positions must be 'local'"):
    engine('qwen3_tied', words, shared=True)


def test_a_watch_hears_every_part_of_an_answer(subject):
  with stopwatch.running(wait=True) as watch:
    subject.generate([Request([[4, 5, 6], [7, 8]], max_new=3)], on_part=watch)
  assert tuple(watch.parts) == engine_lib.PARTS and min(watch.parts.values()) >= 0
  assert watch.first_token == pytest.approx(sum(watch.parts.values()) - watch.decode) and watch.compile >= 0


def test_an_interrupted_prefill_leaves_no_block_behind(words, monkeypatch):
  subject = engine('qwen3_tied', words)
  asked = Request([[4, 5, 6], [7, 8]], max_new=1)
  with monkeypatch.context() as patch:
    patch.setattr('blockattn.inference.pool._fill', lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
      subject.generate([asked])
  assert subject.generate([asked])[0].blocks[0].found == 'computed'
  np.testing.assert_allclose(subject.logits(asked), masked_logits('qwen3_tied', asked.prompt, 'sequential'), atol=1e-4)


def test_an_interrupted_answer_loses_no_state(words):
  store = cache.Store()
  subject = engine('qwen3_tied', words, store=store)
  asked = Request([[4, 5, 6], [7, 8]], max_new=3)
  with pytest.raises(KeyboardInterrupt):
    subject.generate([asked], on_text=lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
  assert subject.generate([asked])[0].blocks[0].found == 'device'
  subject.forget()
  assert subject.generate([asked])[0].blocks[0].found == 'memory'


def test_more_requests_than_the_device_holds_are_answered_in_turns(words):
  rng = np.random.default_rng(6)
  prompts = [[rng.integers(1, 48, size=40).tolist(), rng.integers(1, 48, size=5).tolist()] for _ in range(5)]
  small, large = (engine('qwen3_tied', words, device_tokens=n).generate([Request(p, max_new=3) for p in prompts])
                  for n in (112, 1024))
  assert [a.tokens for a in small] == [a.tokens for a in large]
