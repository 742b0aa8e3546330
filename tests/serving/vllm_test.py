"""Students in vLLM against our engine and against the masked forward pass of the same prompts.

In a virtual environment that has vLLM: python -m pytest -n 0 tests/serving
"""

import dataclasses
import errno
import functools
import os
import pathlib

import hf_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from blockattn import blocks
from blockattn.hf import config, convert
from blockattn.inference import cache
from blockattn.inference.engine import Engine
from blockattn.inference.plan import Request
from blockattn.models import transformer
from blockattn.models.transformer import Compute, Llama3Rope, ModelConfig

os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING='0', VLLM_CPU_KVCACHE_SPACE='1', VLLM_NO_USAGE_STATS='1',
                  VLLM_LOGGING_LEVEL='ERROR', HF_HUB_OFFLINE='1', VLLM_CPU_OMP_THREADS_BIND='nobind')
vllm = pytest.importorskip('vllm')
from blockattn.serving.vllm import student as student_lib  # noqa: E402  needs it

pytestmark = pytest.mark.vllm
VOCAB, NEW, LENGTH = 64, 8, 512
COMPUTE = Compute(impl='reference')
# vLLM's attention on a CPU knows heads of 32, and more.
LLAMA = ModelConfig('llama', vocab=VOCAB, width=64, layers=2, heads=4, kv_heads=2, head_dim=32, mlp=48, norm_eps=1e-5,
                    rope_theta=1e4, rope_scaling=Llama3Rope(8.0, 1.0, 4.0, 64), max_positions=LENGTH)
QWEN = ModelConfig('qwen3', vocab=VOCAB, width=48, layers=3, heads=4, kv_heads=2, head_dim=32, mlp=48, rope_theta=1e6,
                   qk_norm=True, tied=True, max_positions=LENGTH)
STUDENTS = {
    'llama, sinks': (LLAMA, blocks.BlockOptions((7, 7, 7, 7), 'sequential', 8)),
    'qwen, local': (QWEN, blocks.BlockOptions((), 'local', 8)),
    'llama, hidden starts': (LLAMA, blocks.BlockOptions((), 'sequential', 8, hide_starts=True)),
    'qwen, hidden sinks, local': (QWEN, blocks.BlockOptions((7, 7), 'local', 8, hide_starts=True)),
    'llama, overlap': (LLAMA, blocks.BlockOptions((), 'sequential', 8, hide_starts=True, overlap=5)),
    'qwen, learned sinks': (QWEN, blocks.BlockOptions((VOCAB, VOCAB + 1), 'sequential', 8)),
    'llama, learned sinks, local, tails, aligned': (
        LLAMA, blocks.BlockOptions((VOCAB, VOCAB + 1), 'local', 8, tail_ids=(VOCAB + 2,), align=16)),
}


@dataclasses.dataclass(frozen=True)
class Student:
  cfg: ModelConfig
  params: dict
  options: blocks.BlockOptions
  folder: pathlib.Path


def export(cfg, options, folder):
  cfg = dataclasses.replace(cfg, learned_sinks=len({token for token in options.own_ids if token >= cfg.vocab}))
  params = hf_cases.random_params(cfg, 'float32')
  convert.save(params, cfg, folder / 'student', source=hf_cases.write_tokenizer(folder / 'source', cfg.vocab),
               meta={'blocks': config.blocks_meta(options)}, card='', dtype='float32')
  return Student(cfg, params, options, folder / 'student')


@pytest.fixture(scope='module', params=STUDENTS)
def student(request, tmp_path_factory):
  return export(*STUDENTS[request.param], tmp_path_factory.mktemp('student'))


@pytest.fixture(scope='module')
def server(student, tmp_path_factory):
  """vLLM with a budget of 64 tokens per step, which some blocks are longer than."""
  server = serve(student, tmp_path_factory.mktemp('blocks'))
  yield server
  server.close()


@dataclasses.dataclass(frozen=True)
class Server:
  """A running vLLM with its store, and where that has its files."""
  llm: object
  wanted: object
  folder: pathlib.Path

  @property
  def counts(self):
    return self.wanted._store.counts

  def flush(self):
    self.wanted._saver.submit(bool).result()
    self.wanted._store.flush()

  def close(self):
    self.llm.llm_engine.engine_core.shutdown()


def serve(student, folder, store=None, **more):
  transfer = {'kv_connector': 'BlockConnector', 'kv_connector_module_path': 'blockattn.serving.vllm.connector',
              'kv_role': 'kv_both', 'kv_connector_extra_config': store or {'folder': str(folder)}}
  more = dict(dtype='float32', enforce_eager=True, max_model_len=LENGTH, max_num_seqs=8, max_num_batched_tokens=64,
              block_size=32, max_logprobs=VOCAB + 8, kv_transfer_config=transfer,
              scheduler_cls='blockattn.serving.vllm.scheduler.BlockScheduler', logprobs_mode='processed_logprobs',
              logits_processors=['blockattn.serving.vllm.unsaid:Unsaid']) | more
  llm = vllm.LLM(model=str(student.folder), **more)
  return Server(llm, llm.llm_engine.engine_core.engine_core.scheduler.connector.wanted, folder)


def answers(server, student, prompts, new=NEW):
  """(greedy tokens, log-probabilities of the first) of each prompt, all asked at once."""
  tokens, said = zip(*(student_lib.place(prompt, student.options) for prompt in prompts))
  sampling = [vllm.SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True, logprobs=5,
                                  extra_args={'kv_transfer_params': own}) for own in said]
  out = server.llm.generate([{'prompt_token_ids': own} for own in tokens], sampling, use_tqdm=False)
  return [(list(o.outputs[0].token_ids), {t: x.logprob for t, x in o.outputs[0].logprobs[0].items()}) for o in out]


def engine(student, compute=COMPUTE, **more):
  words = tokenizers.Tokenizer.from_file(str(student.folder / 'tokenizer.json'))
  return Engine(student.params, student.cfg, compute, student.options, words, stop_ids=(), device_tokens=4096, **more)


def pool(seed, lengths=(5, 33, 1, 64, 90, 17)):
  rng = np.random.default_rng(seed)
  return [rng.integers(8, VOCAB, size=n).tolist() for n in lengths]


def prompts(seed, count):
  """Of blocks of a pool in any order, some of them twice, some as if they went on, and questions of their own."""
  rng, parts = np.random.default_rng(seed), pool(seed)
  kind = lambda: rng.choice([list, blocks.Continued])
  pick = lambda: [kind()(parts[i]) for i in rng.integers(0, len(parts), size=rng.integers(0, 5))]
  return [[*pick(), rng.integers(8, VOCAB, size=rng.integers(1, 40)).tolist()] for _ in range(count)]


def is_seen(student, prompt):
  """Of each context block whether others see any of it."""
  return [block.hidden[1] < len(block.tokens) for block in blocks.place_prompt(prompt, student.options)[:-1]]


def read(student, prompts):
  """What is read for the context blocks of which others see any."""
  placed = [block for prompt in prompts for block in blocks.place_prompt(prompt, student.options)[:-1]]
  return {block.tokens for block in placed if block.hidden[1] < len(block.tokens)}


def masked(student, prompt):
  """Log-probabilities of the token after the prompt, from one masked forward pass."""
  placed, tokens = blocks.place_prompt(prompt, student.options), np.zeros((1, LENGTH), np.int32)
  row = [token for block in placed for token in block.tokens]
  tokens[0, :len(row)] = row
  x_BTD = _apply(student.params, tokens, blocks.prompt_layout([placed], LENGTH), student.cfg, COMPUTE)
  logits = transformer.logits(student.params, x_BTD[0, len(row) - 1], student.cfg)
  return np.asarray(jax.nn.log_softmax(jnp.asarray(logits, jnp.float32)))


_apply = functools.partial(jax.jit, static_argnums=(3, 4))(transformer.apply)


def agree(student, asked, found, new=NEW):
  expected = engine(student).generate([Request(prompt, max_new=new) for prompt in asked])
  for prompt, (tokens, first), answer in zip(asked, found, expected, strict=True):
    whole = masked(student, prompt)
    np.testing.assert_allclose([first[t] for t in first], [whole[t] for t in first], atol=1e-4)
    assert tokens == list(answer.tokens)


# Servers of their own, of which a process has one at a time: in front of those that share one.


@pytest.mark.parametrize('dtype, tolerance', [('float32', 2e-6), ('bfloat16', 1.5e-2)])
def test_states_are_those_of_the_engine(tmp_path, dtype, tolerance):
  student, asked = export(*STUDENTS['llama, sinks'], tmp_path), prompts(5, 2)
  served = serve(student, tmp_path / 'blocks', dtype=dtype)
  answers(served, student, asked)
  served.flush()
  ours = cache.Store()
  params = jax.tree.map(lambda x: jnp.asarray(x, dtype), student.params)
  made = engine(dataclasses.replace(student, params=params), store=ours, compute=Compute(dtype, impl='reference'))
  made.prepare([Request(prompt, max_new=NEW) for prompt in asked])
  assert set(ours._memory) == set(served.wanted._store._memory) and ours._memory
  for key, state in ours._memory.items():
    theirs = served.wanted._store._memory[key]
    for name, x in state.arrays().items():
      y = theirs.arrays()[name]
      assert x.dtype == y.dtype == jnp.dtype(dtype) and x.shape == y.shape
      x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
      assert np.linalg.norm(x - y) < tolerance * np.linalg.norm(x)
  served.close()


def test_blocks_outlive_the_server(tmp_path):
  student, asked = export(*STUDENTS['llama, sinks'], tmp_path), prompts(4, 6)
  first = serve(student, tmp_path / 'blocks')
  found = answers(first, student, asked)
  first.close()
  second = serve(student, tmp_path / 'blocks')
  assert answers(second, student, asked) == [(tokens, pytest.approx(first, abs=1e-5)) for tokens, first in found]
  assert second.counts.missing == 0 and second.counts.disk > 0
  second.close()


def test_prompts_whose_pages_were_taken_have_their_blocks_again(tmp_path, monkeypatch):
  """Pages for two prompts and not for their answers, and a store that keeps nothing: no memory, and a disk that is full."""
  from vllm.v1.core.sched.scheduler import Scheduler
  taken, take = [], Scheduler._preempt_request
  monkeypatch.setattr(Scheduler, '_preempt_request', lambda self, request, *a, **k: (taken.append(request.request_id),
                                                                                     take(self, request, *a, **k))[1])
  student, parts = export(*STUDENTS['qwen, local'], tmp_path), pool(6)
  monkeypatch.setattr(cache, '_save', no_room)
  served = serve(student, None, {'memory_bytes': 0, 'folder': str(tmp_path / 'blocks')}, num_gpu_blocks_override=18)
  asked = [[parts[3], parts[4], parts[1], [9, 10 + i]] for i in range(3)] + [[parts[4], parts[1], parts[0], [9]]]
  agree(student, asked, answers(served, student, asked, 100), 100)
  assert taken
  # Some go in the middle; the others never know.
  for i, prompt in enumerate(prompts(7, 4)):
    tokens, said = student_lib.place(prompt, student.options)
    served.llm.llm_engine.add_request(f'gone-{i}', {'prompt_token_ids': tokens}, vllm.SamplingParams(
        max_tokens=50, extra_args={'kv_transfer_params': said}))
  for i in range(4):
    served.llm.llm_engine.step()
    served.llm.llm_engine.abort_request([f'gone-{i}'])
  agree(student, prompts(7, 4), answers(served, student, prompts(7, 4)))
  assert not served.wanted._prompts and not served.wanted._waiting
  assert 'No space left' in str(served.wanted._store.fault)
  served.close()


def no_room(path, state):
  raise OSError(errno.ENOSPC, 'No space left on device', str(path))


def test_states_in_8_bits_have_an_error_that_is_told(tmp_path):
  student, asked = export(*STUDENTS['llama, sinks'], tmp_path), prompts(10, 12)
  served = serve(student, None, {'quantize': 'int8'})
  agree(student, asked, answers(served, student, asked))   # computed now, not rounded
  served.flush()
  off = [first[t] - masked(student, prompt)[t] for prompt, (_, first) in zip(asked, answers(served, student, asked))
         for t in first]
  counts = served.counts
  assert 0 < counts.int8_error / counts.int8_blocks < 0.01 and 1e-5 < np.abs(off).max() < 0.3
  served.close()


@pytest.mark.slow
def test_a_thousand_requests_are_answered_as_by_the_engine(tmp_path):
  student, asked = export(*STUDENTS['llama, sinks'], tmp_path), prompts(11, 1000)
  served = serve(student, tmp_path / 'blocks', max_num_seqs=64, max_num_batched_tokens=1024)
  found = answers(served, student, asked)
  expected = engine(student).generate([Request(prompt, max_new=NEW) for prompt in asked])
  assert [tokens for tokens, _ in found] == [list(answer.tokens) for answer in expected]
  served.close()


def test_two_ranks_have_half_of_the_heads_each(tmp_path):
  student = export(*STUDENTS['llama, sinks'], tmp_path)
  served = serve(student, tmp_path / 'blocks', tensor_parallel_size=2)
  for seed in (8, 8):   # computed, and found
    agree(student, prompts(seed, 4), answers(served, student, prompts(seed, 4)))
  served.close()


def test_a_model_without_blocks_is_refused(tmp_path):
  student = export(*STUDENTS['llama, sinks'], tmp_path)
  (student.folder / 'blockattn.json').unlink()
  with pytest.raises(ValueError, match='says nothing of blocks: name a student'):
    serve(student, tmp_path / 'blocks')


def test_another_scheduler_is_refused(tmp_path):
  student = export(*STUDENTS['llama, sinks'], tmp_path)
  with pytest.raises(ValueError, match='--scheduler-cls blockattn.serving.vllm.scheduler.BlockScheduler'):
    serve(student, tmp_path / 'blocks', scheduler_cls=None)


# One server for each student.


def test_answers_are_those_of_the_engine_and_of_the_masked_pass(student, server):
  asked = prompts(0, 12)
  agree(student, asked, answers(server, student, asked))
  assert server.counts.missing == len(read(student, asked))   # each once, for all who wait for it
  again = prompts(0, 20)[12:]   # the same blocks in other orders
  agree(student, again, answers(server, student, again))
  assert server.counts.missing == len(read(student, asked + again))   # an overlap makes another block of it


def test_blocks_of_the_engine_are_served(student, server):
  asked = prompts(1, 4)
  with cache.Store(folder=server.folder) as store:
    made = engine(student, store=store)
    made.prepare([Request(prompt, max_new=NEW) for prompt in asked])
    store.flush()
  before = server.counts.missing, server.counts.disk
  agree(student, asked, answers(server, student, asked))
  assert server.counts.missing == before[0] and server.counts.disk > before[1]


def test_the_engine_reads_blocks_that_were_served(student, server):
  asked = prompts(2, 4)
  answers(server, student, asked)
  server.flush()
  with cache.Store(folder=server.folder) as store:
    found = engine(student, store=store).prepare([Request(prompt, max_new=NEW) for prompt in asked])
  pairs = [pair for prompt, own in zip(asked, found) for pair in zip(own, is_seen(student, prompt))]
  assert {block.found for block, is_read in pairs if is_read} == {'disk'}


def test_one_text_with_and_without_blocks_has_two_answers(student, server):
  """vLLM's own prefix cache holds states of both."""
  prompt = [*pool(3)[3:5], pool(3)[1]]
  tokens, _ = student_lib.place(prompt, student.options)
  plain = lambda: list(server.llm.generate([{'prompt_token_ids': tokens}], vllm.SamplingParams(
      temperature=0.0, max_tokens=1, logprobs=5), use_tqdm=False)[0].outputs[0].logprobs[0].items())
  first = {t: x.logprob for t, x in plain()}
  agree(student, [prompt], answers(server, student, [prompt]))
  assert {t: x.logprob for t, x in plain()} == pytest.approx(first, abs=1e-5)
  agree(student, [prompt], answers(server, student, [prompt]))
  layout = blocks.from_lengths([[[len(tokens)]]], LENGTH)
  row = np.zeros((1, LENGTH), np.int32)
  row[0, :len(tokens)] = tokens
  x_BTD = _apply(student.params, row, layout, student.cfg, COMPUTE)
  logits = transformer.logits(student.params, x_BTD[0, len(tokens) - 1], student.cfg)
  whole = np.asarray(jax.nn.log_softmax(logits))
  np.testing.assert_allclose([first[t] for t in first], [whole[t] for t in first], atol=1e-4)


def test_only_what_was_reused_counts_as_cached(student, server):
  a, b, *_ = pool(9)
  for context, reused in (([a], [0]), ([a, b, b], [1, 0, 1]), ([b, a], [1, 1])):
    tokens, said = student_lib.place([*context, [9]], student.options)
    sampling = vllm.SamplingParams(max_tokens=1, extra_args={'kv_transfer_params': said})
    out = server.llm.generate([{'prompt_token_ids': tokens}], sampling, use_tqdm=False)[0]
    lengths = said[student_lib.BLOCKS]
    assert out.num_cached_tokens == sum(n for n, is_reused in zip(lengths, reused) if is_reused)


def test_blocks_that_differ_in_their_first_token_have_their_own_answers(student, server):
  """Also where it is hidden, so that vLLM's prefix cache does not see it."""
  first, second, *_ = pool(12)
  for token in (8, 9, 8):
    prompt = [first, [token, *second], [10]]
    agree(student, [prompt], answers(server, student, [prompt]))


@pytest.mark.parametrize('said', [{'blocks': lengths} for lengths in ([3, 5], [0, 10], [-1, 11], ['a'], 7, [10, 0])] + [
    {'blocks': [5, 5], 'hidden': hidden} for hidden in (7, [7], [[8]], [[], []], [['a']])])
def test_what_is_said_wrongly_of_blocks_ends_in_an_error(student, server, said):
  sampling = vllm.SamplingParams(max_tokens=2, extra_args={'kv_transfer_params': said})
  out = server.llm.generate([{'prompt_token_ids': list(range(8, 18))}], sampling, use_tqdm=False)[0]
  assert out.outputs[0].finish_reason == 'error'


def test_log_probabilities_of_the_prompt_end_in_an_error(student, server):
  tokens, said = student_lib.place([[8, 9], [10]], student.options)
  sampling = vllm.SamplingParams(max_tokens=2, prompt_logprobs=1, extra_args={'kv_transfer_params': said})
  out = server.llm.generate([{'prompt_token_ids': tokens}], sampling, use_tqdm=False)[0]
  assert out.outputs[0].finish_reason == 'error'
