"""The `gpu` command of tools.bench: our kernels on a GPU against what a user would pick instead there.

Effective TFLOP/s count the pairs that the mask allows (4 H operations per pair and query head forward, 3.5 times that with
the backward pass), so a full causal peer is charged with what it computes for nothing. Percent are of a bfloat16 matrix
product measured in the same run. Flex's mask of tiles is built outside the timed calls.
"""

import functools
import importlib.util
import itertools
import statistics

import jax
import jax.numpy as jnp

from blockattn.kernels import api
from blockattn.models import flops
from tools import arguments
from tools.bench import attention, measuring
from tools.bench.attention import MODES, OURS, Case, Inputs, Peer, jax_call

LENGTHS, BLOCKS, LAST = (8192, 32768, 65536, 131072), (512, 1024, 2048), (128, 512)
_BACKWARD = 2.5   # operations of the backward pass in those of the forward pass: five products for two


def add(commands) -> None:
  parser = measuring.add_command(commands, 'gpu', 'our kernels on a GPU against torch, cuDNN and tokamax', run, cores=None)
  for name, default, text in (('length', LENGTHS, 'tokens of the prompt'), ('block', BLOCKS, 'mean tokens of a block'),
                              ('last', LAST, 'tokens of the last block')):
    parser.add_argument(f'--{name}', type=int, nargs='+', default=default, help=f'{text}')
  parser.add_argument('--shape', type=int, nargs=3, default=(32, 8, 128), metavar=('N', 'K', 'H'),
                      help='query heads, key/value heads, width')
  parser.add_argument('--impl', default='gpu', help='of ours')
  arguments.add_numbers(parser, samples=(5, 'samples per peer and mode'))


def run(args) -> None:
  facts, peak = measuring.machine(impl=args.impl), measuring.matmul_rate() / 1e12
  print(measuring.describe(facts, f'bfloat16 matrix product {peak:.0f} TFLOP/s\n'))
  print(measuring.head('T, block, last', 'mode', 'who', 'ms', 'effective TFLOP/s', '% of peak', 'time / ours'))
  results, (N, K, H) = [], args.shape
  for length, block, last in itertools.product(args.length, args.block, args.last):
    inputs = attention.make_inputs(Case(length, blocks_of(length, block, last), H, N, K, last), 'bfloat16')
    for mode in MODES:
      best = None
      for name, peer in peers(args.impl).items():
        row = {'length': length, 'block': block, 'last': last, 'mode': mode, 'peer': name}
        row |= measure(peer, inputs, mode, args.samples, peak)
        best = row['ms'] if name == OURS else best
        print(measuring.row(f'{length}, {block}, {last}', mode, name, *_cells(row, best)), flush=True)
        results.append(row)
  measuring.keep(args, facts, peak_tflops=peak, results=results)


def _cells(row, ours):
  if 'skipped' in row:
    return '-', '-', '-', row['skipped']
  return f'{row["ms"]:.3f}', f'{row["tflops"]:.0f}', f'{row["percent"]:.0f}', f'{row["ms"] / ours:.2f}'


def blocks_of(length: int, block: int, last: int) -> int:
  """Blocks of a prompt whose context blocks have `block` tokens on average."""
  return max(2, round((length - last) / block) + 1)


def measure(peer: Peer, inputs: Inputs, mode: str, samples: int, peak: float, expected: jax.Array | None = None) -> dict:
  """{'ms' (the median), 'samples', 'tflops', 'percent', 'difference'}, or {'skipped': why}.

  Args:
    peak: TFLOP/s that `percent` is of.
    expected: the output that it should have; 'difference' is the largest one.
  """
  try:
    with attention.one_line():
      call = peer.build(inputs, mode)
      seconds = measuring.seconds_of(call.start, samples, call.wait)
      different = None if expected is None or mode != 'forward' else attention.difference(call.output(), expected)
  except attention.CannotRun as reason:
    return {'skipped': str(reason)}
  case, middle = inputs.case, statistics.median(seconds)
  useful = 4 * case.head_dim * case.heads * flops.in_blocks(flops.one_document(case.lengths())).pairs
  tflops = useful * (1 if mode == 'forward' else 1 + _BACKWARD) / middle / 1e12
  row = {'ms': 1e3 * middle, 'samples': [1e3 * s for s in seconds], 'tflops': tflops, 'percent': 100 * tflops / peak}
  return row if different is None else row | {'difference': different}


# Peers.

def peers(impl: str) -> dict[str, Peer]:
  """By name; ours is the first."""
  return {OURS: Peer(lambda *x: jax_call(_ours(impl), *x)),
          'torch flex': Peer(lambda *x: _with_cuda(attention.torch_flex, *x)),
          'tokamax': Peer(lambda *x: jax_call(_tokamax(), *x)),
          'torch SDPA causal': Peer(lambda *x: _with_cuda(_torch_causal, *x), full=True),
          'cuDNN causal (jax)': Peer(lambda *x: jax_call(_cudnn_causal, *x), full=True),
          'Pallas causal (jax)': Peer(lambda *x: jax_call(_pallas_causal, *x, dtype=jnp.float16), full=True)}


@functools.cache   # so that the blocks of a prompt, which are an argument, compile nothing anew
def _ours(impl):
  return functools.partial(api.block_attention, impl=impl)


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


def _with_cuda(build, inputs, mode):
  if importlib.util.find_spec('torch') is None:
    raise RuntimeError('torch is not installed')
  import torch
  if not torch.cuda.is_available():
    raise RuntimeError('this torch has no CUDA')
  return build(inputs, mode)


def _torch_causal(inputs, mode):
  import torch
  sdpa = torch.nn.functional.scaled_dot_product_attention
  return attention.torch_call(lambda q, k, v: sdpa(q, k, v, is_causal=True, enable_gqa=True), inputs, mode)
