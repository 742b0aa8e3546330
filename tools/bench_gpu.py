"""The part of tools.bench that runs on a GPU: our kernels against what a user would pick instead there.

Effective TFLOP/s count the pairs that the mask allows (4 H operations per pair and query head forward, 3.5 times that with
the backward pass), so a full causal peer is charged with what it computes for nothing. Percent are of a bfloat16 matrix
product measured in the same run.
"""

import importlib.util
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np

from blockattn import blocks
from blockattn.kernels import api, tiles as tile_sizes
from blockattn.models import flops

LENGTHS, BLOCKS, LAST = (8192, 32768, 65536, 131072), (512, 1024, 2048), (128, 512)
OURS = 'ours'
_BACKWARD = 2.5   # operations of the backward pass in those of the forward pass: five products for two


def add_gpu(commands, make_case, machine, take_turns) -> None:
  parser = commands.add_parser('gpu', help='our kernels on a GPU against torch and cuDNN')
  parser.add_argument('--length', type=int, nargs='+', default=LENGTHS, help='tokens of the prompt (default %(default)s)')
  parser.add_argument('--block', type=int, nargs='+', default=BLOCKS, help='mean tokens of a block (default %(default)s)')
  parser.add_argument('--last', type=int, nargs='+', default=LAST, help='tokens of the last block (default %(default)s)')
  parser.add_argument('--shape', type=int, nargs=3, default=(32, 8, 128), metavar=('N', 'K', 'H'),
                      help='query heads, key/value heads, width (default %(default)s)')
  parser.add_argument('--impl', default='gpu', help='of ours (default %(default)s)')
  parser.add_argument('--key-tile', type=int, help='of the forward kernel (default: that of kernels/tiles.py)')
  parser.add_argument('--samples', type=int, default=5, help='samples per peer and mode (default %(default)s)')
  parser.add_argument('--json', type=pathlib.Path, metavar='FILE', help='write every sample and the machine to FILE')
  parser.set_defaults(run=lambda args: run(args, make_case, machine, take_turns), cores=1, devices=1)


def run(args, make_case, machine, take_turns) -> None:
  facts, peak = machine(args), matmul_peak()
  print(f'{facts["jax_devices"][0]}, {facts["versions"]}, bfloat16 matrix product {peak:.0f} TFLOP/s\n'
        f'{facts["attention"]}\n')
  print('| T, block, last | mode | who | ms | effective TFLOP/s | % of peak | time / ours |\n|---|---|---|---|---|---|---|')
  results, (N, K, H) = [], args.shape
  for length in args.length:
    for block in args.block:
      for last in args.last:
        case = make_case(length, max(2, round((length - last) / block) + 1), H, N, K, last)
        rows = measure(case, args, take_turns, peak)
        results += [{'length': length, 'block': block, 'last': last} | row for row in rows]
        for row in rows:
          cells = (f'{row["ms"]:.3f} | {row["tflops"]:.0f} | {row["percent"]:.0f} | {row["ratio"]:.2f}' if 'ms' in row
                   else f'- | - | - | {row["skipped"]}')
          print(f'| {length}, {block}, {last} | {row["mode"]} | {row["peer"]} | {cells} |', flush=True)
  if args.json:
    args.json.write_text(json.dumps({'machine': facts, 'peak_tflops': peak, 'results': results}, indent=1) + '\n')


def matmul_peak(size: int | None = None) -> float:
  """TFLOP/s of a square bfloat16 product, the best of ten."""
  size = size or (8192 if jax.default_backend() == 'gpu' else 512)
  x = jnp.ones((size, size), jnp.bfloat16)
  product = jax.jit(lambda x: x @ x)
  return 2 * size ** 3 / min(_timed(lambda: jax.block_until_ready(product(x)), 10)) / 1e12


def _timed(call, samples):
  call()
  times = []
  for _ in range(samples):
    start = time.perf_counter()
    call()
    times.append(time.perf_counter() - start)
  return times


def measure(case, args, take_turns, peak) -> list[dict]:
  """A row per mode and peer: {'mode', 'peer', 'ms', 'tflops', 'percent', 'ratio'} or {'mode', 'peer', 'skipped'}."""
  random = np.random.default_rng(0)
  shapes = [(1, case.length, heads, case.head_dim) for heads in (case.heads, case.kv_heads, case.kv_heads, case.heads)]
  arrays = [random.standard_normal(shape, dtype=np.float32) for shape in shapes]
  useful = 4 * case.head_dim * case.heads * flops.in_blocks(flops.one_document(case.lengths())).pairs
  rows = []
  for mode, factor in (('forward', 1), ('forward+backward', 1 + _BACKWARD)):
    calls, skipped = {}, {}
    for name, build in peers(args).items():
      try:
        call = build(case, arrays, mode)
        call()
        calls[name] = _repeated(call)
      except Exception as error:   # a peer that fails is a line of the report; ours is not
        if name == OURS:
          raise
        skipped[name] = f'{type(error).__name__}: {(str(error).strip().splitlines() or [""])[0][:90]}'
    times = take_turns({name: call for name, (call, _) in calls.items()}, args.samples, 60)
    best = {name: min(seconds) / calls[name][1] for name, seconds in times.items()}
    for name, seconds in best.items():
      tflops = factor * useful / seconds / 1e12
      rows.append({'mode': mode, 'peer': name, 'ms': 1e3 * seconds, 'tflops': tflops, 'percent': 100 * tflops / peak,
                   'ratio': seconds / best[OURS]})
    rows += [{'mode': mode, 'peer': name, 'skipped': reason} for name, reason in skipped.items()]
  return rows


def _repeated(call):
  """(a function of so many calls that the clock's and the launch's share is small, how many)."""
  once = min(_timed(call, 2))
  count = max(1, min(50, round(0.03 / once)))

  def many():
    for _ in range(count):
      call()
  return many, count


def peers(args):
  """(case, arrays, mode) -> call, by name. Every call waits for its result."""
  return {OURS: lambda *x: _jax_call(lambda q, k, v, layout: _ours(args, q, k, v, layout), *x),
          'cuDNN causal (jax)': lambda *x: _jax_call(_cudnn_causal, *x),
          'Pallas causal (jax)': lambda *x: _jax_call(_pallas_causal, *x, dtype=jnp.float16),
          'torch flex': _torch_flex, 'torch SDPA causal': _torch_causal}


def _ours(args, q, k, v, layout):
  tiles = None if args.key_tile is None else tile_sizes.Tiles(128, args.key_tile)
  return api.block_attention(q, k, v, layout, impl=args.impl, tiles=tiles)


def _cudnn_causal(q, k, v, layout):
  return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation='cudnn')


def _pallas_causal(q, k, v, layout):
  """JAX's own Mosaic GPU kernel, with tiles that its file tries; it takes float16 only and has no causal
  backward pass."""
  from jax.experimental.pallas.ops.gpu import attention_mgpu
  config = attention_mgpu.TuningConfig(block_q=64, block_kv=128, max_concurrent_steps=2, causal=True)
  return attention_mgpu.attention(q, k, v, config)


def _jax_call(attend, case, arrays, mode, dtype=jnp.bfloat16):
  layout = jax.tree.map(jnp.asarray, blocks.from_lengths([[case.lengths()]], case.length))
  q, k, v, grad = (jnp.asarray(x, dtype) for x in arrays)
  if mode == 'forward':
    forward = jax.jit(attend)
    return lambda: jax.block_until_ready(forward(q, k, v, layout))

  @jax.jit
  def both(q, k, v, grad, layout):
    out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, layout), q, k, v)
    return out, pull(grad)
  return lambda: jax.block_until_ready(both(q, k, v, grad, layout))


def _torch_call(attend, arrays, mode):
  import torch
  *tensors, grad = [torch.from_numpy(x).to('cuda', torch.bfloat16).transpose(1, 2).contiguous() for x in arrays]

  def call():
    leaves = [x.detach().requires_grad_(mode != 'forward') for x in tensors]
    out = attend(*leaves)
    if mode != 'forward':
      out.backward(grad)
    torch.cuda.synchronize()
  return call


def _need_torch():
  if importlib.util.find_spec('torch') is None:
    raise RuntimeError('torch is not installed')
  import torch
  if not torch.cuda.is_available():
    raise RuntimeError('this torch has no CUDA')


def _torch_flex(case, arrays, mode):
  """Compiled flex_attention; its mask of tiles is built outside the timed calls."""
  _need_torch()
  import torch
  from torch.nn.attention import flex_attention as flex
  lengths = torch.tensor(case.lengths())
  number = torch.repeat_interleave(torch.arange(len(lengths)), lengths).cuda()
  first_reader = case.length - case.last
  sees = lambda b, h, t, s: (s <= t) & ((number[t] == number[s]) | (t >= first_reader))
  mask = torch.compile(flex.create_block_mask)(sees, None, None, case.length, case.length, device='cuda')
  compiled = torch.compile(flex.flex_attention, dynamic=False)
  return _torch_call(lambda q, k, v: compiled(q, k, v, block_mask=mask, enable_gqa=True), arrays, mode)


def _torch_causal(case, arrays, mode):
  _need_torch()
  import torch
  sdpa = torch.nn.functional.scaled_dot_product_attention
  return _torch_call(lambda q, k, v: sdpa(q, k, v, is_causal=True, enable_gqa=True), arrays, mode)
