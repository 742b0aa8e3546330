"""What all measurements have in common: the machine and its cores, the clock, random prompts, tables and files."""

import datetime
import importlib.metadata
import importlib.util
import os
import pathlib
import platform
import time
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

from blockattn import metrics
from blockattn.kernels import api
from tools import arguments

VERSIONS = ('jax', 'jaxlib', 'torch', 'numpy')


# The command line.

def add_command(commands, name: str, text: str, run: Callable, *, cores: int | None = 1, devices: bool = True):
  """The parser of one command, `run(args)`; with --cores unless there are None to keep to."""
  parser = commands.add_parser(name, help=text)
  parser.set_defaults(run=run, cores=cores, devices=1)
  parser.add_argument('--json', type=pathlib.Path, metavar='FILE', help='write every sample and the machine to FILE')
  if cores is not None:
    arguments.add_numbers(parser, cores=(cores, 'cores that everybody may use'))
    if devices:
      arguments.add_numbers(parser, devices=(1, 'CPU devices of JAX'))
  return parser


def set_up(args) -> None:
  """Keeps the process on `args.cores` cores and makes `args.devices` CPU devices; before the first computation."""
  if args.cores is None:
    return
  if hasattr(os, 'sched_setaffinity'):
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:args.cores])
  jax.config.update('jax_num_cpu_devices', args.devices)
  if importlib.util.find_spec('torch') is not None:
    import torch
    torch.set_num_threads(args.cores)


def machine(cores: int | None = None, impl: str = 'auto', libraries: Iterable[str] = VERSIONS) -> dict:
  """What the numbers depend on."""
  installed = {distribution.name.lower(): distribution.version for distribution in importlib.metadata.distributions()}
  info = pathlib.Path('/proc/cpuinfo')
  lines = info.read_text().splitlines() if info.exists() else []
  names = [line.split(':', 1)[1].strip() for line in lines if line.startswith('model name')]
  return {
      'date': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
      'platform': platform.platform(), 'python': platform.python_version(),
      'versions': {name: installed.get(name) for name in libraries},
      'cpu': names[0] if names else platform.processor(), 'cpus': os.cpu_count(), 'cores_used': cores or os.cpu_count(),
      'jax_devices': [str(device) for device in jax.devices()], 'load': os.getloadavg(),
      'attention': str(api.choose(impl, jax.devices()[0])),
  }


# The clock.

def take_turns(calls: dict, samples: int, seconds: float, timed: Callable | None = None) -> dict:
  """Seconds of each call, measured in turn; one that has used up `seconds` stops early, after one sample at least.

  Args:
    timed: call -> seconds of it; None: by the clock around it.
  """
  times = {name: [] for name in calls}
  for _ in range(samples):
    for name, call in calls.items():
      if not times[name] or sum(times[name]) < seconds:
        times[name].append((timed or clocked)(call))
        time.sleep(0.02)   # threads of one peer that spin after their work must not slow the next
  return times


def clocked(call: Callable) -> float:
  start = time.perf_counter()
  call()
  return time.perf_counter() - start


def seconds_of(call: Callable, samples: int, wait: Callable = jax.block_until_ready) -> list[float]:
  """Seconds of one `call()`, so many samples of as many calls in a row as make the clock's and the launch's share small.

  Args:
    call: starts the work and returns what `wait` waits for.
  """
  def many(count):
    start = time.perf_counter()
    for _ in range(count):
      result = call()
    wait(result)
    return (time.perf_counter() - start) / count

  many(1)   # compiles
  count = max(1, min(100, round(0.03 / min(many(1), many(1)))))
  return [many(count) for _ in range(samples)]


def matmul_rate(size: int | None = None, dtype: str = 'bfloat16') -> float:
  """FLOP/s of a square product of random matrices, the best of ten; zeros would be faster than any real data."""
  size = size or (2048 if jax.default_backend() == 'cpu' else 8192)
  x, y = (jax.random.normal(key, (size, size), dtype) for key in jax.random.split(jax.random.key(0)))
  product = jax.jit(jnp.dot)
  return 2 * size ** 3 / min(seconds_of(lambda: product(x, y), 10))


def copy_rate(size: int = 1 << 26) -> float:
  """Bytes per second that a device reads and writes when it copies so many numbers, the best of five."""
  x, copy = jnp.asarray(np.random.default_rng(0).standard_normal(size, np.float32)), jax.jit(lambda x: x + 1)
  return 2 * x.nbytes / min(seconds_of(lambda: copy(x), 5))


# Prompts.

def random_lengths(random: np.random.Generator, tokens: int, count: int) -> list[int]:
  """`count` lengths of 0.5 to 1.5 times their mean, of so many tokens together."""
  weights = random.uniform(0.5, 1.5, count)
  stops = np.round(np.cumsum(weights) / weights.sum() * tokens).astype(int)
  return np.diff(stops, prepend=0).tolist()


# Tables, in Markdown, and files.

def describe(facts: dict, more: str = '') -> str:
  """The lines above a table."""
  return (f'{facts["cpu"]}, {facts["cores_used"]} of {facts["cpus"]} cores, {", ".join(facts["jax_devices"])}, '
          f'load {facts["load"][0]:.1f}, {facts["versions"]}\n{facts["attention"]}\n{more}\n')


def head(*names: str) -> str:
  return f'{row(*names)}\n{"|---" * len(names)}|'


def row(*cells) -> str:
  return f'| {" | ".join(map(str, cells))} |'


def milliseconds(seconds: list[float]) -> tuple[str, str]:
  """The least and the median."""
  return f'{1e3 * min(seconds):.1f}', f'{1e3 * float(np.median(seconds)):.1f}'


def keep(args, facts: dict, **results) -> None:
  """Writes what there is so far to --json, with the machine and the arguments."""
  if args.json:
    args.json.parent.mkdir(parents=True, exist_ok=True)
    given = {name: str(value) if isinstance(value, pathlib.Path) else value for name, value in vars(args).items()
             if not callable(value)}
    metrics.write_json(args.json, {'machine': facts, 'arguments': given, **results})
