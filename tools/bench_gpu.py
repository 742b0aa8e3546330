"""The part of tools.bench that runs on a GPU: our kernels against what a user would pick instead there.

Effective TFLOP/s count the pairs that the mask allows (4 H operations per pair and query head forward, 3.5 times that with
the backward pass), so a full causal peer is charged with what it computes for nothing. Percent are of a bfloat16 matrix
product measured in the same run. Flex's mask of tiles is built outside the timed calls.
"""

import dataclasses
import functools
import importlib.util
import json
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from blockattn import blocks
from blockattn.kernels import api, tiles as tile_sizes
from blockattn.models import flops

LENGTHS, BLOCKS, LAST = (8192, 32768, 65536, 131072), (512, 1024, 2048), (128, 512)
MODES = ('forward', 'forward+backward')
OURS = 'ours'
_BACKWARD = 2.5   # operations of the backward pass in those of the forward pass: five products for two


def add_gpu(commands, make_case, machine) -> None:
  parser = commands.add_parser('gpu', help='our kernels on a GPU against torch, cuDNN and tokamax')
  parser.add_argument('--length', type=int, nargs='+', default=LENGTHS, help='tokens of the prompt (default %(default)s)')
  parser.add_argument('--block', type=int, nargs='+', default=BLOCKS, help='mean tokens of a block (default %(default)s)')
  parser.add_argument('--last', type=int, nargs='+', default=LAST, help='tokens of the last block (default %(default)s)')
  parser.add_argument('--shape', type=int, nargs=3, default=(32, 8, 128), metavar=('N', 'K', 'H'),
                      help='query heads, key/value heads, width (default %(default)s)')
  parser.add_argument('--impl', default='gpu', help='of ours (default %(default)s)')
  parser.add_argument('--key-tile', type=int, help='of the forward kernel (default: that of kernels/tiles.py)')
  parser.add_argument('--samples', type=int, default=5, help='samples per peer and mode (default %(default)s)')
  parser.add_argument('--json', type=pathlib.Path, metavar='FILE', help='write every sample and the machine to FILE')
  parser.set_defaults(run=lambda args: run(args, make_case, machine), cores=1, devices=1)


def run(args, make_case, machine) -> None:
  facts, peak = machine(args), matmul_peak()
  print(f'{facts["jax_devices"][0]}, {facts["versions"]}, bfloat16 matrix product {peak:.0f} TFLOP/s\n'
        f'{facts["attention"]}\n')
  print('| T, block, last | mode | who | ms | effective TFLOP/s | % of peak | time / ours |\n|---|---|---|---|---|---|---|')
  results, (N, K, H) = [], args.shape
  for length in args.length:
    for block in args.block:
      for last in args.last:
        inputs = make_inputs(make_case(length, blocks_of(length, block, last), H, N, K, last))
        where = {'length': length, 'block': block, 'last': last}
        for mode in MODES:
          best = None
          for name, peer in peers(args.impl, args.key_tile).items():
            row = where | {'mode': mode, 'peer': name} | measure(peer, inputs, mode, args.samples, peak)
            best = row['ms'] if name == OURS else best
            print(f'| {length}, {block}, {last} | {mode} | {name} | {_cells(row, best)} |', flush=True)
            results.append(row)
  if args.json:
    args.json.write_text(json.dumps({'machine': facts, 'peak_tflops': peak, 'results': results}, indent=1) + '\n')


def _cells(row, ours):
  if 'skipped' in row:
    return f'- | - | - | {row["skipped"]}'
  return f'{row["ms"]:.3f} | {row["tflops"]:.0f} | {row["percent"]:.0f} | {row["ms"] / ours:.2f}'


def blocks_of(length: int, block: int, last: int) -> int:
  """Blocks of a prompt whose context blocks have `block` tokens on average."""
  return max(2, round((length - last) / block) + 1)


def matmul_peak(size: int | None = None) -> float:
  """TFLOP/s of a square bfloat16 product of random matrices, the best of ten; zeros would be faster than any real data."""
  size = size or (8192 if jax.default_backend() == 'gpu' else 512)
  x, y = (jax.random.normal(key, (size, size), jnp.bfloat16) for key in jax.random.split(jax.random.key(0)))
  product = jax.jit(jnp.dot)
  return 2 * size ** 3 / min(seconds_of(lambda: product(x, y), jax.block_until_ready, 10)) / 1e12


def seconds_of(call, wait, samples: int) -> list[float]:
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


@dataclasses.dataclass
class Inputs:
  """A case on the device: q [1, T, N, H], k and v [1, T, K, H], the gradient of the output, in bfloat16; its layout."""
  case: Any
  arrays: tuple[jax.Array, ...]
  layout: blocks.BlockLayout
  lengths: list[int]


def make_inputs(case) -> Inputs:
  keys = jax.random.split(jax.random.key(0), 4)
  heads = (case.heads, case.kv_heads, case.kv_heads, case.heads)
  arrays = tuple(jax.random.normal(key, (1, case.length, n, case.head_dim), jnp.bfloat16) for key, n in zip(keys, heads))
  layout = jax.tree.map(jnp.asarray, blocks.from_lengths([[case.lengths()]], case.length))
  return Inputs(case, arrays, layout, case.lengths())


@dataclasses.dataclass(frozen=True)
class Peer:
  """Attributes:
    build: (inputs, mode) -> (call, wait, as_jax); `as_jax` makes a JAX array [1, T, N, H] of the output.
    full: whether it computes full causal attention, whatever the blocks are: not the same numbers.
  """
  build: Callable
  full: bool = False


def peers(impl: str, key_tile: int | None = None) -> dict[str, Peer]:
  """By name; ours is the first."""
  return {OURS: Peer(lambda *x: _jax_calls(_ours(impl, key_tile), *x)),
          'torch flex': Peer(_torch_flex),
          'tokamax': Peer(lambda *x: _jax_calls(_tokamax(), *x)),
          'torch SDPA causal': Peer(_torch_causal, full=True),
          'cuDNN causal (jax)': Peer(lambda *x: _jax_calls(_cudnn_causal, *x), full=True),
          'Pallas causal (jax)': Peer(lambda *x: _jax_calls(_pallas_causal, *x, dtype=jnp.float16), full=True)}


def measure(peer: Peer, inputs: Inputs, mode: str, samples: int, peak: float, expected: jax.Array | None = None) -> dict:
  """{'ms' (the median), 'samples', 'tflops', 'percent', 'difference'}, or {'skipped': why}.

  Args:
    peak: TFLOP/s that `percent` is of.
    expected: the output that it should have; 'difference' is the largest one.
  """
  try:
    call, wait, as_jax = peer.build(inputs, mode)
    seconds = seconds_of(call, wait, samples)
    different = None if expected is None or mode != 'forward' else _difference(as_jax(call()), expected)
  except Exception as error:   # a peer that fails is a line of the report
    return {'skipped': f'{type(error).__name__}: {(str(error).strip().splitlines() or [""])[0][:160]}'}
  case = inputs.case
  useful = 4 * case.head_dim * case.heads * flops.in_blocks(flops.one_document(inputs.lengths)).pairs
  tflops = useful * (1 if mode == 'forward' else 1 + _BACKWARD) / statistics.median(seconds) / 1e12
  row = {'ms': 1e3 * statistics.median(seconds), 'samples': [1e3 * s for s in seconds], 'tflops': tflops,
         'percent': 100 * tflops / peak}
  return row if different is None else row | {'difference': different}


@jax.jit
def _largest(x, y):
  return jnp.abs(x.astype(jnp.float32) - y.astype(jnp.float32)).max()


def _difference(out, expected):
  return float(_largest(out, expected))


def output(peer: Peer, inputs: Inputs) -> jax.Array:
  call, _, as_jax = peer.build(inputs, 'forward')
  return as_jax(call())


@functools.cache   # so that the blocks of a prompt, which are an argument, compile nothing anew
def _ours(impl, key_tile):
  tiles = None if key_tile is None else tile_sizes.Tiles(128, key_tile)
  return lambda q, k, v, layout: api.block_attention(q, k, v, layout, impl=impl, tiles=tiles)


@functools.cache
def _tokamax():
  """Its GPU kernels with the first key of each query, which its public function does not take; the forward pass skips tiles
  in front of it, the backward pass (0.0.17) does not.

  Raises:
    ImportError: tokamax, or something that it imports, is not installed.
  """
  from tokamax._src.ops.attention import base, pallas_mosaic_gpu
  attend = pallas_mosaic_gpu.PallasMosaicGpuFlashAttention()

  def call(q, k, v, layout):
    start = jnp.where(layout.reader[0], 0, _first(layout)).astype(jnp.int32)
    return attend(q, k, v, mask=base.Mask(k_start=start, is_causal=True))
  return call


def _first(layout):
  """The first token of each token's block, of a row of one document."""
  index = jnp.arange(layout.block.shape[1])
  return jax.lax.cummax(jnp.where(jnp.diff(layout.block[0], prepend=-1) != 0, index, 0))


def _cudnn_causal(q, k, v, layout):
  return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation='cudnn')


def _pallas_causal(q, k, v, layout):
  """JAX's own Mosaic GPU kernel, with tiles that its file tries; it takes float16 only and has no causal
  backward pass."""
  from jax.experimental.pallas.ops.gpu import attention_mgpu
  config = attention_mgpu.TuningConfig(block_q=64, block_kv=128, max_concurrent_steps=2, causal=True)
  return attention_mgpu.attention(q, k, v, config)


@functools.cache
def _programs(attend):
  def both(q, k, v, grad, layout):
    out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, layout), q, k, v)
    return out, pull(grad)

  return jax.jit(attend), jax.jit(both)


def _jax_calls(attend, inputs, mode, dtype=jnp.bfloat16):
  q, k, v, grad = (x.astype(dtype) for x in inputs.arrays)
  forward, both = _programs(attend)
  if mode == 'forward':
    return lambda: forward(q, k, v, inputs.layout), jax.block_until_ready, lambda out: out
  return lambda: both(q, k, v, grad, inputs.layout), jax.block_until_ready, lambda out: out[0]


def _torch_calls(attend, inputs, mode):
  import torch
  *tensors, grad = [torch.from_dlpack(x).transpose(1, 2).contiguous() for x in inputs.arrays]
  leaves = [x.detach().requires_grad_(mode != 'forward') for x in tensors]

  def call():
    out = attend(*leaves)
    if mode != 'forward':
      torch.autograd.grad(out, leaves, grad)
    return out

  return call, lambda out: torch.cuda.synchronize(), lambda out: jnp.from_dlpack(out.detach().transpose(1, 2).contiguous())


def _need_torch():
  if importlib.util.find_spec('torch') is None:
    raise RuntimeError('torch is not installed')
  import torch
  if not torch.cuda.is_available():
    raise RuntimeError('this torch has no CUDA')


@functools.cache
def _flex(length, last):
  """(compiled flex_attention, compiled builder of its mask, the tensor that holds each token's block)."""
  import torch
  from torch.nn.attention import flex_attention as flex
  number = torch.zeros(length, dtype=torch.int32, device='cuda')
  sees = lambda b, h, t, s: (s <= t) & ((number[t] == number[s]) | (t >= length - last))
  build = torch.compile(flex.create_block_mask)
  return (torch.compile(flex.flex_attention, dynamic=False),
          lambda: build(sees, None, None, length, length, device='cuda'), number)


def _torch_flex(inputs, mode):
  _need_torch()
  import torch
  attend, build, number = _flex(inputs.case.length, inputs.case.last)
  lengths = torch.tensor(inputs.lengths)
  number.copy_(torch.repeat_interleave(torch.arange(len(lengths)), lengths))
  mask = build()
  return _torch_calls(lambda q, k, v: attend(q, k, v, block_mask=mask, enable_gqa=True), inputs, mode)


def _torch_causal(inputs, mode):
  _need_torch()
  import torch
  sdpa = torch.nn.functional.scaled_dot_product_attention
  return _torch_calls(lambda q, k, v: sdpa(q, k, v, is_causal=True, enable_gqa=True), inputs, mode)
