"""The `attention` command of tools.bench: block attention on CPUs against dense, causal and torch attention."""

import contextlib
import dataclasses
import functools
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from blockattn import blocks
from blockattn.errors import UserError
from blockattn.kernels import api
from tools import arguments
from tools.bench import measuring

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
    return [*measuring.random_lengths(np.random.default_rng(0), self.length - self.last, self.blocks - 1), self.last]

  def __str__(self):
    return f'T={self.length} blocks={self.blocks} H={self.head_dim}'


QUICK = (Case(1024, 8, 64, last=128),)
DEFAULT = (Case(4096, 8, 64), Case(8192, 16, 64), Case(8192, 16, 128), Case(16384, 32, 64), Case(32768, 64, 64))


@dataclasses.dataclass(frozen=True)
class Inputs:
  """A case on the device: q [1, T, N, H], k and v [1, T, K, H] and the gradient of the output; its layout."""
  case: Case
  arrays: tuple[jax.Array, ...]
  layout: blocks.BlockLayout

  def mask(self) -> np.ndarray:
    """Who may attend: bool [T, T]."""
    return np.asarray(jax.jit(blocks.may_attend)(self.layout))[0]


def make_inputs(case: Case, dtype='float32') -> Inputs:
  heads = (case.heads, case.kv_heads, case.kv_heads, case.heads)
  arrays = tuple(jax.random.normal(key, (1, case.length, n, case.head_dim), dtype)
                 for key, n in zip(jax.random.split(jax.random.key(0), 4), heads))
  return Inputs(case, arrays, jax.tree.map(jnp.asarray, blocks.from_lengths([[case.lengths()]], case.length)))


class Call(NamedTuple):
  """A pass of a peer: `start` begins it and returns what `wait` waits for and `as_jax` makes [1, T, N, H] of."""
  start: Callable[[], Any]
  wait: Callable[[Any], Any]
  as_jax: Callable[[Any], jax.Array]

  def __call__(self):
    return self.wait(self.start())

  def output(self) -> jax.Array:
    return self.as_jax(self.start())


@dataclasses.dataclass(frozen=True)
class Peer:
  """Somebody who computes the same attention.

  Attributes:
    build: (inputs, mode) -> Call.
    what: one line for the legend of the table.
    full: whether it computes full causal attention, whatever the blocks are: not the same numbers.
    bytes_per_pair: memory for each pair of tokens (all heads), beyond the inputs: what makes long prompts impossible.
    missing: {mode: why it is not there}.
    module: the package it needs.
  """
  build: Callable[[Inputs, str], Call]
  what: str = ''
  full: bool = False
  bytes_per_pair: float = 0
  missing: dict[str, str] = dataclasses.field(default_factory=dict)
  module: str = 'jax'


# Peers.

@functools.cache
def _programs(attend):
  """(forward, forward and backward) of `attend(q, k, v, context)`; context is an argument, as it is in training."""
  def both(q, k, v, grad, context):
    out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, context), q, k, v)
    return out, pull(grad)

  return jax.jit(attend), jax.jit(both)


def jax_call(attend, inputs: Inputs, mode: str, context=None, dtype=None) -> Call:
  """`attend(q, k, v, context)`; by default the context is the layout, and the dtype that of the inputs."""
  q, k, v, grad = (x if dtype is None else x.astype(dtype) for x in inputs.arrays)
  context = inputs.layout if context is None else context
  forward, both = _programs(attend)
  if mode == 'forward':
    return Call(lambda: forward(q, k, v, context), jax.block_until_ready, lambda out: out)
  return Call(lambda: both(q, k, v, grad, context), jax.block_until_ready, lambda out: out[0])


def torch_call(attend, inputs: Inputs, mode: str) -> Call:
  """`attend(q, k, v)` of tensors [1, N, T, H] where the inputs are."""
  import torch
  *tensors, grad = [torch.from_dlpack(x).transpose(1, 2).contiguous() for x in inputs.arrays]
  leaves = [x.detach().requires_grad_(mode != 'forward') for x in tensors]

  def call():
    out = attend(*leaves)
    if mode != 'forward':
      torch.autograd.grad(out, leaves, grad)
    return out

  wait = lambda out: torch.cuda.synchronize() if grad.is_cuda else None
  return Call(call, wait, lambda out: jnp.from_dlpack(out.detach().transpose(1, 2).contiguous()))


def _ours(q, k, v, layout):
  devices = jax.devices()
  if len(devices) == 1:
    return api.block_attention(q, k, v, layout)
  mesh = jax.sharding.Mesh(np.array(devices), ('tensor',))
  return api.block_attention_on_mesh(q, k, v, layout, mesh, head_axes=('tensor',))


def _full_causal(inputs, mode):
  return jax_call(_ours, inputs, mode, blocks.as_one_block(inputs.layout))


def _dense(q, k, v, mask):
  return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation='xla')


def _jax_dense(inputs, mode):
  return jax_call(_dense, inputs, mode, jnp.asarray(inputs.mask()[None, None]))


def _torch_mask(inputs, mode):
  import torch
  mask = torch.from_numpy(inputs.mask().copy())
  sdpa = torch.nn.functional.scaled_dot_product_attention
  return torch_call(lambda q, k, v: sdpa(q, k, v, attn_mask=mask, enable_gqa=True), inputs, mode)


def _torch_split(inputs, mode):
  """What one writes by hand: a causal call per block, one call for the last block, boundaries known on the host."""
  import torch
  sdpa = torch.nn.functional.scaled_dot_product_attention
  lengths = inputs.case.lengths()
  stripe = torch.ones(lengths[-1], inputs.case.length, dtype=torch.bool).tril(inputs.case.length - lengths[-1])

  def attend(q, k, v):
    parts = list(zip(*(x.split(lengths, dim=2) for x in (q, k, v))))
    outs = [sdpa(*part, is_causal=True, enable_gqa=True) for part in parts[:-1]]
    return torch.cat([*outs, sdpa(parts[-1][0], k, v, attn_mask=stripe, enable_gqa=True)], dim=2)

  return torch_call(attend, inputs, mode)


@functools.cache
def _flex(length, last, device):
  """(compiled flex_attention, builder of its mask, the tensor that holds each token's block)."""
  import torch
  from torch.nn.attention import flex_attention as flex
  number, build = torch.zeros(length, dtype=torch.int32, device=device), flex.create_block_mask
  if device == 'cuda':
    build = torch.compile(build)
  else:
    torch._dynamo.reset()
  sees = lambda b, h, t, s: (s <= t) & ((number[t] == number[s]) | (t >= length - last))
  return (torch.compile(flex.flex_attention, dynamic=False),
          lambda: build(sees, None, None, length, length, device=device), number)


def torch_flex(inputs: Inputs, mode: str) -> Call:
  """Compiled flex_attention; the mask of tiles is built outside the timed calls."""
  import torch
  lengths = torch.tensor(inputs.case.lengths())
  attend, build, number = _flex(inputs.case.length, int(lengths[-1]), 'cuda' if jax.default_backend() == 'gpu' else 'cpu')
  number.copy_(torch.repeat_interleave(torch.arange(len(lengths)), lengths))
  mask = build()
  return torch_call(lambda q, k, v: attend(q, k, v, block_mask=mask, enable_gqa=True), inputs, mode)


def peers(heads: int) -> dict[str, Peer]:
  """The peers by name; `ours` is first."""
  return {
      OURS: Peer(functools.partial(jax_call, _ours), 'blockattn.kernels.api.block_attention, one program for every layout'),
      'full causal': Peer(_full_causal, 'the same with the prompt as one block: what full attention costs', full=True),
      'jax dense': Peer(_jax_dense, 'jax.nn.dot_product_attention with the mask', bytes_per_pair=13 * heads),
      'torch mask': Peer(_torch_mask, 'torch scaled_dot_product_attention with the mask', bytes_per_pair=8, module='torch'),
      'torch split': Peer(_torch_split, 'torch scaled_dot_product_attention in a Python loop over blocks', module='torch'),
      'torch flex': Peer(torch_flex, 'torch.compile(flex_attention) with the mask', bytes_per_pair=12, module='torch',
                         missing={'forward+backward': 'flex_attention has no CPU backward'}),
  }


# Measuring.

def prepare(peer: Peer, inputs: Inputs, limit_gib: float) -> dict[str, Call]:
  """The peer's calls by mode, compiled and run once.

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
  with one_line():
    calls = {mode: peer.build(inputs, mode) for mode in MODES if mode not in peer.missing}
    for call in calls.values():
      call()
  return calls


@contextlib.contextmanager
def one_line():
  """Within the block a failure is a line of the report, not the end of the run: CannotRun."""
  try:
    yield
  except Exception as error:
    raise CannotRun(f'{type(error).__name__}: {(str(error).strip().splitlines() or [""])[0][:160]}') from error


def check_output(name: str, call: Call, expected: jax.Array) -> float:
  """The largest difference from our output; an error where it is more than rounding."""
  error = difference(call.output(), expected)
  if not error < 1e-4:
    raise UserError(f'{name} computes something else than ours: largest difference {error}')
  return error


def difference(out: jax.Array, expected: jax.Array) -> float:
  return float(_largest_difference(out, expected))


@jax.jit
def _largest_difference(x, y):
  return jnp.abs(x.astype(jnp.float32) - y.astype(jnp.float32)).max()


def measure(case: Case, chosen: dict[str, Peer], args) -> list[dict]:
  """One result per mode and peer: {case, mode, peer, ms: [..]} or {case, mode, peer, skipped: reason}."""
  inputs, ready, reasons = make_inputs(case), {}, {}
  for name, peer in chosen.items():
    try:
      ready[name] = prepare(peer, inputs, args.memory_gib)
    except CannotRun as reason:
      reasons[name] = str(reason)
  if OURS not in ready:
    raise RuntimeError(f'{case}: our own kernel cannot run: {reasons[OURS]}')
  expected = ready[OURS]['forward'].output()
  errors = {name: check_output(name, calls['forward'], expected) for name, calls in ready.items() if not chosen[name].full}
  results = []
  for mode in MODES:
    times = measuring.take_turns({name: calls[mode] for name, calls in ready.items() if mode in calls}, args.samples,
                                 args.seconds)
    for name, peer in chosen.items():
      found = ({'ms': [1e3 * t for t in times[name]], 'max_error': errors.get(name)} if name in times
               else {'skipped': reasons.get(name) or peer.missing[mode]})
      results.append({'case': dataclasses.asdict(case), 'mode': mode, 'peer': name} | found)
  return results


def table(case: Case, results: list[dict]) -> str:
  """Lines of a table: milliseconds, and the ratio of each peer's time to ours (more than 1: slower)."""
  base = {result['mode']: min(result['ms']) for result in results if result['peer'] == OURS}
  cells = lambda result: ('-', '-', result['skipped']) if 'skipped' in result else (
      f'{min(result["ms"]):.1f}', f'{np.median(result["ms"]):.1f}', f'{min(result["ms"]) / base[result["mode"]]:.2f}')
  return '\n'.join(measuring.row(case, result['mode'], result['peer'], *cells(result)) for result in results)


def attention(args) -> None:
  cases = QUICK if args.quick else DEFAULT
  if args.quick:
    args.samples, args.seconds = min(args.samples, 3), min(args.seconds, 1.0)
  facts, results = measuring.machine(args.cores), []
  print(measuring.describe(facts))
  for name, peer in peers(cases[0].heads).items():
    print(f'{name}: {peer.what}')
  print('\n' + measuring.head('case', 'mode', 'who', 'min ms', 'median ms', 'time / ours'), flush=True)
  for case in cases:
    measured = measure(case, peers(case.heads), args)
    results += measured
    print(table(case, measured), flush=True)
  measuring.keep(args, facts, results=results)


def add(commands) -> None:
  parser = measuring.add_command(commands, 'attention', 'block attention against dense, causal and torch attention',
                                 attention)
  parser.add_argument('--quick', action='store_true', help='one short prompt, less than a minute')
  arguments.add_numbers(parser, samples=(7, 'samples per peer and mode'),
                        seconds=(10.0, 'a peer that has run for so long in a mode is not sampled again'),
                        memory_gib=(4.0, 'a peer that would need more is skipped'))
