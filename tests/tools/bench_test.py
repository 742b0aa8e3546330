"""The parts of the measuring tools that can be wrong without a clock."""

from tools import bench, tune


def test_a_case_has_the_blocks_that_it_says():
  lengths = bench.Case(4096, 8, 64).lengths()
  assert len(lengths) == 8 and sum(lengths) == 4096 and lengths[-1] == 512 and min(lengths) > 0


def test_tuning_tries_every_size_that_fits_and_sorts_them(monkeypatch):
  monkeypatch.setitem(tune.CANDIDATES, 'xla', [(16, 16), (32, 16), (48, 32), (256, 256)])
  times = tune.tune('xla', 64, 32, (2, 1, 8), 'float32', samples=2)
  assert set(times) == {(16, 16), (32, 16)}   # sizes that do not nest, and sizes beyond the row, are left out
  assert list(times.values()) == sorted(times.values())
