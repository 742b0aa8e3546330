"""Speed of this project against its peers, measured in one run on one machine.

  python -m tools.bench attention --quick                      less than a minute
  python -m tools.bench attention --json attention.json        some minutes; one core
  python -m tools.bench attention --cores 2 --devices 2        two cores; the heads divided over two CPU devices
  python -m tools.bench step                                   a distillation step against block fine-tuning
  python -m tools.bench memory                                 the loss's peak memory against T and V
  python -m tools.bench overhead                               what the loop, its data and its metrics add to a step
  python -m tools.bench gpu                                    our kernels on a GPU against torch, cuDNN and tokamax
  python -m tools.bench segment --data FOLDER                  where texts are cut, against splitters
  python -m tools.bench ttft                                   time to the first token over cached blocks

Every peer computes the same numbers (this is checked) from the same arrays. Peers take turns, sample by sample, so that
a change of the machine's load hits all of them; ratios are between minima. A peer that cannot run is named with the
reason. Torch is optional.
"""

import argparse
import dataclasses
import datetime
import functools
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import statistics
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from blockattn import blocks
from blockattn.errors import UserError
from blockattn.kernels import api
from tools import arguments, bench_gpu, bench_overhead, bench_segment, bench_step, bench_ttft

MODES = ('forward', 'forward+backward')
OURS = 'ours'


class CannotRun(Exception):
  """A peer that is left out; the message is the reason that the table gives."""


@dataclasses.dataclass(frozen=True)
class Case:
  """One prompt: `length` tokens cut in `blocks` blocks, the last one of `last` tokens, the others of random length."""
  length: int
  blocks: int
  head_dim: int
  heads: int = 8
  kv_heads: int = 2
  last: int = 512

  def lengths(self) -> list[int]:
    """Tokens per block; the same for the same case."""
    if self.blocks == 1:
      return [self.length]
    weights = np.random.default_rng(0).uniform(0.5, 1.5, self.blocks - 1)
    stops = np.round(np.cumsum(weights) / weights.sum() * (self.length - self.last)).astype(int)
    return [*np.diff(stops, prepend=0).tolist(), self.last]

  def __str__(self):
    return f'T={self.length} blocks={self.blocks} H={self.head_dim}'


QUICK = (Case(1024, 8, 64, last=128),)
DEFAULT = (Case(4096, 8, 64), Case(8192, 16, 64), Case(8192, 16, 128), Case(16384, 32, 64), Case(32768, 64, 64))


@dataclasses.dataclass
class Inputs:
  """The arrays of a case in numpy: q [1, T, N, H], k and v [1, T, K, H], the gradient of the output, and the layout."""
  case: Case
  q: np.ndarray
  k: np.ndarray
  v: np.ndarray
  grad: np.ndarray
  layout: blocks.BlockLayout

  def mask(self) -> np.ndarray:
    """Who may attend: bool [T, T]."""
    return np.asarray(jax.jit(blocks.may_attend)(self.layout))[0]


def make_inputs(case: Case) -> Inputs:
  random = np.random.default_rng(0)
  shapes = [(1, case.length, heads, case.head_dim) for heads in (case.heads, case.kv_heads, case.kv_heads, case.heads)]
  arrays = [random.standard_normal(shape, dtype=np.float32) for shape in shapes]
  return Inputs(case, *arrays, layout=blocks.from_lengths([[case.lengths()]], case.length))


# Peers. Each is a function (inputs) -> {mode: call}; a call runs once, waits, and returns the output [1, T, N, H].

@functools.cache
def _jitted(attend):
  """(forward, forward and backward) of `attend(q, k, v, context)`; context is an argument, as it is in training."""
  def both(q, k, v, grad, context):
    out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, context), q, k, v)
    return out, pull(grad)

  return jax.jit(attend), jax.jit(both)


def jax_calls(attend, inputs, context):
  forward, both = _jitted(attend)
  q, k, v, grad, context = jax.tree.map(jnp.asarray, (inputs.q, inputs.k, inputs.v, inputs.grad, context))
  return {'forward': lambda: jax.block_until_ready(forward(q, k, v, context)),
          'forward+backward': lambda: jax.block_until_ready(both(q, k, v, grad, context))[0]}


def _ours(q, k, v, layout):
  devices = jax.devices()
  if len(devices) == 1:
    return api.block_attention(q, k, v, layout)
  mesh = jax.sharding.Mesh(np.array(devices), ('tensor',))
  return api.block_attention_on_mesh(q, k, v, layout, mesh, head_axes=('tensor',))


def ours(inputs):
  return jax_calls(_ours, inputs, inputs.layout)


def full_causal(inputs):
  return jax_calls(_ours, inputs, blocks.as_one_block(inputs.layout))


def _dense(q, k, v, mask):
  return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation='xla')


def jax_dense(inputs):
  return jax_calls(_dense, inputs, inputs.mask()[None, None])


def _torch_calls(attend, inputs):
  import torch
  arrays = (inputs.q, inputs.k, inputs.v, inputs.grad)
  *tensors, grad = [torch.from_numpy(x).transpose(1, 2).contiguous() for x in arrays]   # [1, N, T, H]
  as_ours = lambda out: out.detach().transpose(1, 2).numpy()

  def forward():
    with torch.no_grad():
      return as_ours(attend(*tensors))

  def both():
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = attend(*leaves)
    out.backward(grad)
    return as_ours(out)

  return {'forward': forward, 'forward+backward': both}


def torch_mask(inputs):
  import torch
  mask = torch.from_numpy(inputs.mask().copy())
  sdpa = torch.nn.functional.scaled_dot_product_attention
  return _torch_calls(lambda q, k, v: sdpa(q, k, v, attn_mask=mask, enable_gqa=True), inputs)


def torch_split(inputs):
  """What one writes by hand: a causal call per block, one call for the last block, boundaries known on the host."""
  import torch
  sdpa = torch.nn.functional.scaled_dot_product_attention
  lengths = inputs.case.lengths()
  stripe = torch.ones(lengths[-1], inputs.case.length, dtype=torch.bool).tril(inputs.case.length - lengths[-1])

  def attend(q, k, v):
    parts = list(zip(*(x.split(lengths, dim=2) for x in (q, k, v))))
    outs = [sdpa(*part, is_causal=True, enable_gqa=True) for part in parts[:-1]]
    return torch.cat([*outs, sdpa(parts[-1][0], k, v, attn_mask=stripe, enable_gqa=True)], dim=2)

  return _torch_calls(attend, inputs)


def torch_flex(inputs):
  """Compiled flex_attention; the mask of tiles is built outside the timed calls."""
  import torch
  from torch.nn.attention import flex_attention as flex
  torch._dynamo.reset()
  number = torch.from_numpy(inputs.layout.block[0].copy())
  reader = torch.from_numpy(inputs.layout.reader[0].copy())
  sees = lambda b, h, t, s: (s <= t) & ((number[t] == number[s]) | reader[t])
  length = inputs.case.length
  mask = flex.create_block_mask(sees, None, None, length, length, device='cpu')
  compiled = torch.compile(flex.flex_attention, dynamic=False)
  forward = _torch_calls(lambda q, k, v: compiled(q, k, v, block_mask=mask, enable_gqa=True), inputs)['forward']
  return {'forward': forward}


@dataclasses.dataclass(frozen=True)
class Peer:
  """Somebody who computes the same attention.

  Attributes:
    what: one line for the legend of the table.
    build: (inputs) -> {mode: call}.
    bytes_per_pair: memory for each pair of tokens (all heads), beyond the inputs: what makes long prompts impossible.
    missing: {mode: why it is not there}.
    same_output: False for one that computes another mask, for scale.
    module: the package it needs.
  """
  what: str
  build: Callable
  bytes_per_pair: float = 0
  missing: dict[str, str] = dataclasses.field(default_factory=dict)
  same_output: bool = True
  module: str = 'jax'


def peers(heads: int) -> dict[str, Peer]:
  """The peers by name; `ours` is first."""
  return {
      OURS: Peer('blockattn.kernels.api.block_attention, one program for every layout', ours),
      'full causal': Peer('the same with the prompt as one block: what full attention costs', full_causal,
                          same_output=False),
      'jax dense': Peer('jax.nn.dot_product_attention with the mask', jax_dense, bytes_per_pair=13 * heads),
      'torch mask': Peer('torch scaled_dot_product_attention with the mask', torch_mask, bytes_per_pair=8,
                         module='torch'),
      'torch split': Peer('torch scaled_dot_product_attention in a Python loop over blocks', torch_split,
                          module='torch'),
      'torch flex': Peer('torch.compile(flex_attention) with the mask', torch_flex, bytes_per_pair=12, module='torch',
                         missing={'forward+backward': 'flex_attention has no CPU backward'}),
  }


# Measuring.

def prepare(peer: Peer, inputs: Inputs, limit_gib: float) -> dict[str, Callable]:
  """The peer's calls, compiled and run once.

  Raises:
    CannotRun: with the reason.
  """
  if importlib.util.find_spec(peer.module) is None:
    raise CannotRun(f'{peer.module} is not installed')
  if peer.module == 'torch' and jax.default_backend() != 'cpu':
    raise CannotRun(f'runs on the CPU, ours on {jax.default_backend()}')
  needed = peer.bytes_per_pair * inputs.case.length ** 2 / 2 ** 30
  if needed > limit_gib:
    raise CannotRun(f'would take {needed:.1f} GiB, the limit is {limit_gib:g}')
  try:
    calls = peer.build(inputs)
    for call in calls.values():
      call()
  except Exception as error:   # a peer that fails is a line of the report, not the end of the run
    raise CannotRun(f'{type(error).__name__}: {str(error).strip().splitlines()[0][:100]}') from error
  return calls


def check_output(name: str, call: Callable, expected: np.ndarray) -> float:
  """The largest difference from our output; an error where it is more than rounding."""
  error = float(np.abs(np.asarray(call()) - expected).max())
  if not error < 1e-4:
    raise UserError(f'{name} computes something else than ours: largest difference {error}')
  return error


def take_turns(calls: dict[str, Callable], samples: int, seconds: float) -> dict[str, list[float]]:
  """Seconds of each call, measured in turn; one that has used up `seconds` stops early, after one sample at least."""
  times = {name: [] for name in calls}
  for _ in range(samples):
    for name, call in calls.items():
      if not times[name] or sum(times[name]) < seconds:
        start = time.perf_counter()
        call()
        times[name].append(time.perf_counter() - start)
        time.sleep(0.02)   # threads of one peer that spin after their work must not slow the next
  return times


def measure(case: Case, chosen: dict[str, Peer], args) -> list[dict]:
  """One result per mode and peer: {case, mode, peer, ms: [..]} or {case, mode, peer, skipped: reason}."""
  inputs = make_inputs(case)
  ready, reasons, errors = {}, {}, {}
  for name, peer in chosen.items():
    try:
      ready[name] = prepare(peer, inputs, args.memory_gib)
    except CannotRun as reason:
      reasons[name] = str(reason)
  if OURS not in ready:
    raise RuntimeError(f'{case}: our own kernel cannot run: {reasons[OURS]}')
  expected = np.asarray(ready[OURS]['forward']())
  for name, calls in ready.items():
    if chosen[name].same_output:
      errors[name] = check_output(name, calls['forward'], expected)
  results = []
  for mode in MODES:
    calls = {name: by_mode[mode] for name, by_mode in ready.items() if mode in by_mode}
    times = take_turns(calls, args.samples, args.seconds)
    for name, peer in chosen.items():
      result = {'case': dataclasses.asdict(case), 'mode': mode, 'peer': name}
      if name in times:
        result |= {'ms': [1e3 * t for t in times[name]], 'max_error': errors.get(name)}
      else:
        result |= {'skipped': reasons.get(name) or peer.missing[mode]}
      results.append(result)
  return results


# Reporting.

def table(case: Case, results: list[dict]) -> str:
  """Lines of a markdown table: milliseconds, and the ratio of each peer's time to ours (more than 1: slower)."""
  lines = []
  for mode in MODES:
    rows = [result for result in results if result['mode'] == mode]
    base = min(rows[0]['ms'])
    for row in rows:
      if 'ms' in row:
        low, middle = min(row['ms']), statistics.median(row['ms'])
        cells = f'{low:.1f} | {middle:.1f} | {low / base:.2f}'
      else:
        cells = f'- | - | {row["skipped"]}'
      lines.append(f'| {case} | {mode} | {row["peer"]} | {cells} |')
  return '\n'.join(lines)


def machine(args) -> dict:
  """What the numbers depend on."""
  versions = {}
  for package in ('jax', 'jaxlib', 'torch', 'numpy'):
    try:
      versions[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      versions[package] = None
  info = pathlib.Path('/proc/cpuinfo')
  names = [line.split(':', 1)[1].strip() for line in info.read_text().splitlines() if line.startswith('model name')] \
      if info.exists() else []
  impl = getattr(args, 'impl', 'auto')   # the other commands leave it to the device
  return {
      'date': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
      'platform': platform.platform(), 'python': platform.python_version(), 'versions': versions,
      'cpu': names[0] if names else platform.processor(), 'cpus': os.cpu_count(), 'cores_used': args.cores,
      'jax_devices': [str(device) for device in jax.devices()], 'load': os.getloadavg(),
      'attention': str(api.choose(impl, jax.devices()[0])),
  }


def set_up(args) -> None:
  """Keeps the process on `args.cores` cores and makes `args.devices` CPU devices; before the first computation."""
  if hasattr(os, 'sched_setaffinity'):
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:args.cores])
  jax.config.update('jax_num_cpu_devices', args.devices)
  if importlib.util.find_spec('torch') is not None:
    import torch
    torch.set_num_threads(args.cores)


def attention(args) -> None:
  """Times block attention and its peers, and prints the table."""
  set_up(args)
  cases = QUICK if args.quick else [Case(*case) for case in args.case] if args.case else DEFAULT
  if args.quick:
    args.samples, args.seconds = min(args.samples, 3), min(args.seconds, 1.0)
  facts, results = machine(args), []
  print(f'{facts["cpu"]}, {args.cores} of {facts["cpus"]} cores, {args.devices} JAX devices, '
        f'load {facts["load"][0]:.1f}, {facts["versions"]}\n{facts["attention"]}\n')
  for name, peer in peers(cases[0].heads).items():
    print(f'{name}: {peer.what}')
  print('\n| case | mode | who | min ms | median ms | time / ours |\n|---|---|---|---|---|---|', flush=True)
  for case in cases:
    measured = measure(case, peers(case.heads), args)
    results += measured
    print(table(case, measured), flush=True)
  if args.json:
    args.json.write_text(json.dumps({'machine': facts, 'results': results}, indent=1) + '\n')


def _case(text: str) -> tuple[int, int, int]:
  length, count, head_dim = (int(part) for part in text.split(','))
  return length, count, head_dim


def add_attention(commands) -> None:
  parser = commands.add_parser('attention', help='block attention against dense, causal and torch attention')
  parser.add_argument('--quick', action='store_true', help='one short prompt, less than a minute')
  parser.add_argument('--case', type=_case, action='append', metavar='T,BLOCKS,H',
                      help='a prompt to measure instead of the default ones; may be repeated')
  parser.add_argument('--samples', type=int, default=7, help='samples per peer and mode (default %(default)s)')
  parser.add_argument('--seconds', type=float, default=10.0,
                      help='a peer that has run for so long in a mode is not sampled again (default %(default)s)')
  parser.add_argument('--memory-gib', type=float, default=4.0,
                      help='a peer that would need more is skipped (default %(default)s)')
  parser.add_argument('--cores', type=int, default=1, help='cores that everybody may use (default %(default)s)')
  parser.add_argument('--devices', type=int, default=1,
                      help='CPU devices that our heads are divided over; must divide 2 (default %(default)s)')
  parser.add_argument('--json', type=pathlib.Path, metavar='FILE', help='write every sample and the machine to FILE')
  parser.set_defaults(run=attention)


def main() -> None:
  parser = arguments.Parser(prog='python -m tools.bench', description=__doc__,
                            formatter_class=argparse.RawDescriptionHelpFormatter)
  commands = parser.add_subparsers(required=True, metavar='command')
  add_attention(commands)
  bench_step.add_step(commands, set_up, machine, take_turns)
  bench_step.add_memory(commands, set_up, machine)
  bench_overhead.add_overhead(commands, set_up, machine)
  bench_gpu.add_gpu(commands, Case, machine)
  bench_segment.add_segment(commands, set_up, machine, take_turns)
  bench_ttft.add_ttft(commands, set_up, machine)
  args = parser.parse_args()
  try:
    args.run(args)
  except ValueError as error:
    sys.exit(f'bench: {error}')


if __name__ == '__main__':
  main()
