"""Times attention with several tile sizes, and prints rows for blockattn/kernels/tiles.py.

  python -m tools.tune                                        this machine's implementation, T=4096 and 16384
  python -m tools.tune --impl tpu --length 8192 65536 --head-dim 64 128 --dtype bfloat16

Forward and backward together, in turn, the minimum of the samples. A size that an implementation refuses is left out.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np

from blockattn import blocks
from blockattn.kernels import api

CANDIDATES = {'xla': [(q, k) for q in (64, 128, 256, 512) for k in (64, 128, 256, 512)],
              'tpu': [(q, k) for q in (128, 256, 512, 1024) for k in (128, 256, 512, 1024)],
              'gpu': [(128, k) for k in (64, 128)]}


def tune(impl: str, length: int, block: int, shape, dtype: str, samples: int) -> dict[tuple[int, int], float]:
  """{tiles: milliseconds of a forward and backward pass} over the sizes that work, fastest first."""
  heads, kv_heads, head_dim = shape
  random = np.random.default_rng(0)
  sizes = random.uniform(0.5, 1.5, max(1, length // block))
  lengths = np.diff(np.round(np.cumsum(sizes) / sizes.sum() * length).astype(int), prepend=0)
  layout = blocks.from_lengths([[lengths[lengths > 0].tolist()]], length)
  q, k, v, grad = (jnp.asarray(random.standard_normal((1, length, n, head_dim)), dtype)
                   for n in (heads, kv_heads, kv_heads, heads))
  runs = {}
  for tiles in CANDIDATES[impl]:
    if max(tiles) <= length:
      run = _forward_and_backward(impl, tiles)
      try:
        jax.block_until_ready(run(q, k, v, grad, layout))
        runs[tiles] = run
      except (ValueError, jax.errors.JaxRuntimeError) as error:
        print(f'# {tiles}: {str(error).splitlines()[0][:100]}', flush=True)
  best = dict.fromkeys(runs, float('inf'))
  for _ in range(samples):
    for tiles, run in runs.items():
      start = time.perf_counter()
      jax.block_until_ready(run(q, k, v, grad, layout))
      best[tiles] = min(best[tiles], 1e3 * (time.perf_counter() - start))
  return dict(sorted(best.items(), key=lambda item: item[1]))


def _forward_and_backward(impl, tiles):
  @jax.jit
  def run(q, k, v, grad, layout):
    out, pull = jax.vjp(lambda q, k, v: api.block_attention(q, k, v, layout, impl=impl, tiles=tiles), q, k, v)
    return out, pull(grad)
  return run


def main(argv=None) -> None:
  parser = argparse.ArgumentParser(prog='python -m tools.tune', description=__doc__,
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
  impl = api.resolve(args.impl or 'auto', platform)
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
