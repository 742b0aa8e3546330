"""Times attention with several tile sizes, and prints rows for blockattn/kernels/tiles.py.

  python -m tools.tune                                        this machine's implementation, T=4096 and 16384
  python -m tools.tune --impl tpu --length 8192 65536 --head-dim 64 128 --dtype bfloat16

Forward and backward together, in turn, the minimum of the samples. A size that an implementation refuses is left out.
"""

import functools
import sys

import jax

from blockattn.kernels import api
from tools import arguments
from tools.bench import attention, measuring

CANDIDATES = {'xla': [(q, k) for q in (64, 128, 256, 512) for k in (64, 128, 256, 512)],
              'tpu': [(q, k) for q in (128, 256, 512, 1024) for k in (128, 256, 512, 1024)],
              'gpu': [(128, k) for k in (64, 128)]}


def tune(impl: str, length: int, block: int, shape, dtype: str, samples: int) -> dict[tuple[int, int], float]:
  """{tiles: milliseconds of a forward and backward pass} over the sizes that work, fastest first."""
  heads, kv_heads, head_dim = shape
  case = attention.Case(length, max(1, length // block), head_dim, heads, kv_heads, last=min(block, length))
  inputs = attention.make_inputs(case, dtype)
  calls = {}
  for tiles in CANDIDATES[impl]:
    if max(tiles) <= length:
      call = attention.jax_call(functools.partial(_attend, impl, tiles), inputs, 'forward+backward')
      try:
        call()
        calls[tiles] = call
      except (ValueError, jax.errors.JaxRuntimeError) as error:
        print(f'# {tiles}: {str(error).splitlines()[0][:100]}', flush=True)
  times = measuring.take_turns(calls, samples, seconds=float('inf'))
  return dict(sorted(((tiles, 1e3 * min(seconds)) for tiles, seconds in times.items()), key=lambda item: item[1]))


def _attend(impl, tiles, q, k, v, layout):
  return api.block_attention(q, k, v, layout, impl=impl, tiles=tiles)


def run(args) -> None:
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


def main(argv=None) -> int:
  parser = arguments.Parser(prog='python -m tools.tune', description=__doc__)
  parser.add_argument('--impl', choices=sorted(CANDIDATES), help='default: what "auto" means here')
  parser.add_argument('--length', type=int, nargs='+', default=[4096, 16384], help='tokens of a row')
  parser.add_argument('--head-dim', type=int, nargs='+', default=[128], help='of queries, keys and values')
  parser.add_argument('--heads', type=int, nargs=2, default=(8, 2), metavar=('N', 'K'), help='of queries, and of keys')
  arguments.add_numbers(parser, block=(512, 'mean tokens of a block'), samples=(5, 'of each size'))
  arguments.add_computing(parser, impl=None)
  args = parser.parse_args(argv)
  return arguments.run('tune', lambda: run(args))


if __name__ == '__main__':
  sys.exit(main())
