"""Times attention with several tile sizes, and prints rows for blockattn/kernels/tiles.py.

  python -m tools.tune                                        this machine's implementation, T=4096 and 16384
  python -m tools.tune --impl tpu --length 8192 65536 --head-dim 64 128 --dtype bfloat16

Forward and backward together, in turn, the minimum of the samples. A size that an implementation refuses is left out.
"""

import argparse
import dataclasses
import functools

import jax
import jax.numpy as jnp

from blockattn.kernels import api
from tools import arguments, bench

CANDIDATES = {'xla': [(q, k) for q in (64, 128, 256, 512) for k in (64, 128, 256, 512)],
              'tpu': [(q, k) for q in (128, 256, 512, 1024) for k in (128, 256, 512, 1024)],
              'gpu': [(128, k) for k in (64, 128)]}


def tune(impl: str, length: int, block: int, shape, dtype: str, samples: int) -> dict[tuple[int, int], float]:
  """{tiles: milliseconds of a forward and backward pass} over the sizes that work, fastest first."""
  heads, kv_heads, head_dim = shape
  inputs = bench.make_inputs(bench.Case(length, max(1, length // block), head_dim, heads, kv_heads, last=min(block, length)))
  inputs = dataclasses.replace(inputs, **{name: getattr(inputs, name).astype(jnp.dtype(dtype)) for name in 'qkv'},
                               grad=inputs.grad.astype(jnp.dtype(dtype)))
  calls = {}
  for tiles in CANDIDATES[impl]:
    if max(tiles) <= length:
      attend = functools.partial(_attend, impl, tiles)
      try:
        call = bench.jax_calls(attend, inputs, inputs.layout)['forward+backward']
        call()
        calls[tiles] = call
      except (ValueError, jax.errors.JaxRuntimeError) as error:
        print(f'# {tiles}: {str(error).splitlines()[0][:100]}', flush=True)
  times = bench.take_turns(calls, samples, seconds=float('inf'))
  return dict(sorted(((tiles, 1e3 * min(seconds)) for tiles, seconds in times.items()), key=lambda item: item[1]))


def _attend(impl, tiles, q, k, v, layout):
  return api.block_attention(q, k, v, layout, impl=impl, tiles=tiles)


def main(argv=None) -> None:
  parser = arguments.Parser(prog='python -m tools.tune', description=__doc__,
                            formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--impl', choices=sorted(CANDIDATES), help='default: what "auto" means here')
  parser.add_argument('--length', type=int, nargs='+', default=[4096, 16384], help='(default %(default)s)')
  parser.add_argument('--block', type=int, default=512, help='mean tokens of a block (default %(default)s)')
  parser.add_argument('--head-dim', type=int, nargs='+', default=[128], help='(default %(default)s)')
  parser.add_argument('--heads', type=int, nargs=2, default=(8, 2), metavar=('N', 'K'), help='(default %(default)s)')
  parser.add_argument('--dtype', default='float32', help='(default %(default)s)')
  parser.add_argument('--samples', type=int, default=5, help='(default %(default)s)')
  args = parser.parse_args(argv)
  platform = jax.default_backend()
  impl = api.choose(args.impl or 'auto', jax.devices()[0]).impl
  print(f'# {jax.devices()[0].device_kind}, jax {jax.__version__}, {args.dtype}, forward + backward, '
        f'{args.heads[0]} and {args.heads[1]} heads, blocks of about {args.block}', flush=True)
  for head_dim in args.head_dim:
    for length in args.length:
      times = tune(impl, length, args.block, (*args.heads, head_dim), args.dtype, args.samples)
      (query, key), fastest = next(iter(times.items()))
      others = ', '.join(f'{q}x{k} {ms / fastest:.2f}' for (q, k), ms in list(times.items())[1:6])
      print(f"('{impl}', '{platform}'): ({length}, {head_dim}, Tiles({query}, {key})),   # {fastest:.1f} ms; {others}",
            flush=True)


if __name__ == '__main__':
  main()
