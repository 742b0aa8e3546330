"""Tile sizes by implementation, platform, row length and head width. Each row says where it was measured."""

from typing import NamedTuple


class Tiles(NamedTuple):
  """Sizes in tokens; one must divide the other."""
  query: int
  key: int


def smallest(impl: str) -> int:
  """What a row under context parallelism is cut into multiples of, in tokens."""
  return 128 if impl in ('tpu', 'gpu') else 16


def default(impl: str, platform: str, length: int, head_dim: int) -> Tiles:
  """The tiles for rows of `length` tokens: the first row of the table that is not too small for them.

  `impl` is one of kernels.api, `platform` JAX's: 'cpu', 'gpu', 'tpu'; an unknown one is treated as a GPU.
  """
  longest = widest = 10 ** 9
  rows = {   # (length up to, head_dim up to, tiles)
      ('xla', 'cpu'): (
          # One core of an AMD EPYC (AVX-512), jax 0.10.2, float32, forward + backward: at T=256 (16 rows of documents
          # of about 80 tokens) 64 is 20% faster than 128; at T=1k-8k 128 is 8-30% faster than 64 and 256.
          (512, widest, Tiles(64, 64)),
          (longest, widest, Tiles(128, 128)),
      ),
      # Not measured; sizes that fill a matrix unit.
      ('xla', 'gpu'): ((longest, widest, Tiles(256, 256)),),
      ('xla', 'tpu'): ((longest, 128, Tiles(512, 512)), (longest, widest, Tiles(256, 256))),
      # Compiled, not run: a size at which the static schedule keeps the matrix units of v5e busy.
      ('tpu', 'tpu'): ((longest, widest, Tiles(512, 512)),),
      # Compiled for sm_90a, not run: the largest without spills in the forward kernel.
      ('gpu', 'gpu'): ((longest, widest, Tiles(128, 128)),),
  }
  return next(tiles for up_to, width, tiles in rows.get((impl, platform), rows['xla', 'gpu'])
              if length <= up_to and head_dim <= width)


def dividing(tiles: Tiles, length: int, row: int) -> Tiles:
  """These tiles halved until the query tile divides `length` and both divide `row`, as long as they are halves of 16."""
  query, key = tiles
  least = smallest('xla')
  while query > least and (length % query or row % query):
    query //= 2
  while key > least and row % key:
    key //= 2
  return Tiles(query, key)
