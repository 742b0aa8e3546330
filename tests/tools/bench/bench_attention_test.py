"""tools.bench attention, and tools.tune: what can be wrong without a clock."""

import pytest

from tools import tune
from tools.bench import attention


def test_a_case_has_the_blocks_that_it_says():
  lengths = attention.Case(4096, 8, 64).lengths()
  assert len(lengths) == 8 and sum(lengths) == 4096 and lengths[-1] == 512 and min(lengths) > 0


def test_tuning_tries_every_size_that_fits_and_sorts_them(monkeypatch):
  monkeypatch.setitem(tune.CANDIDATES, 'xla', [(16, 16), (32, 16), (48, 32), (256, 256)])
  times = tune.tune('xla', 64, 32, (2, 1, 8), 'float32', samples=2)
  assert set(times) == {(16, 16), (32, 16)}   # sizes that do not nest, and sizes beyond the row, are left out
  assert list(times.values()) == sorted(times.values())


def test_every_peer_of_jax_computes_what_ours_does():
  case = attention.Case(128, 4, 16, heads=16, kv_heads=8, last=32)   # over all devices of the tests
  inputs = attention.make_inputs(case)
  peers = {name: peer for name, peer in attention.peers(case.heads).items() if peer.module == 'jax' and not peer.full}
  calls = {name: attention.prepare(peer, inputs, limit_gib=1.0) for name, peer in peers.items()}
  expected = calls.pop(attention.OURS)['forward'].output()
  for name, by_mode in calls.items():
    assert attention.check_output(name, by_mode['forward'], expected) < 1e-5
  with pytest.raises(attention.CannotRun, match='would take 0.0 GiB'):
    attention.prepare(peers['jax dense'], inputs, limit_gib=0.0)
