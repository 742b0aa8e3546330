"""The store of block states: what is kept, what is dropped, and what other processes and a broken disk do to it."""

import dataclasses
import errno
import os
import pathlib
import subprocess
import sys
import textwrap
import time

import hf_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from blockattn import mesh as mesh_lib, tree
from blockattn.inference import cache
from blockattn.models import spec, transformer

CFG = hf_cases.MODELS['qwen3_tied']
SHAPE = (2, 5, 2, 4)   # L, n, K, H
BYTES = 2 * 4 * int(np.prod(SHAPE))
FOLDERS = [str(pathlib.Path(__file__).parent), str(pathlib.Path(__file__).parents[1] / 'support')]   # of this module


def state(seed, dtype='float32', tokens=5):
  rng = np.random.default_rng(seed)
  draw = lambda: rng.standard_normal((2, tokens, 2, 4)).astype(jnp.dtype(dtype))
  return cache.State(draw(), draw())


def key(i):
  return cache.Keys(b'model').of([i])


def same(a, b):
  return all(np.array_equal(x, b.arrays()[name]) and x.dtype == b.arrays()[name].dtype for name, x in a.arrays().items())


def files(folder):
  return sorted(path for path in folder.rglob('*') if path.is_file())


# Keys.


def test_everything_that_decides_a_state_is_in_its_key():
  params = hf_cases.random_params(CFG, 'float32')
  nudged = jax.tree.map(np.copy, params)
  nudged['layers']['o'][1, 0, 0, 0] = np.nextafter(nudged['layers']['o'][1, 0, 0, 0], np.float32(9))
  swapped = jax.tree.map(np.copy, params)
  swapped['embed'][[3, 7]] = swapped['embed'][[7, 3]]   # the same bits in other places
  other = [cache.keys_of(params, CFG, 'bfloat16'), cache.keys_of(params, CFG, 'float32', 'int8'),
           cache.keys_of(nudged, CFG, 'float32'), cache.keys_of(swapped, CFG, 'float32'),
           cache.keys_of(params, dataclasses.replace(CFG, rope_theta=2e6), 'float32')]
  keys = cache.keys_of(params, CFG, 'float32')
  found = [keys.of([1, 2]), keys.of([2, 1]), keys.of([1]), keys.of([1, 2, 0]), keys.of([1, 2], prefix=keys.of([9])),
           *(k.of([1, 2]) for k in other)]
  assert len(set(found)) == len(found)
  assert keys.of((1, 2)) == cache.keys_of(params, CFG, 'float32').of(np.array([1, 2])) == found[0]


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_a_model_has_the_same_fingerprint_on_every_mesh_and_in_every_dtype(dtype):
  params = hf_cases.random_params(CFG, dtype)
  place = mesh_lib.Placement(mesh_lib.make_mesh({'fsdp': 2, 'tensor': 2, 'data': 2}))
  shardings = jax.tree.map(lambda x: x.sharding, spec.abstract(transformer.spec(CFG), dtype, place))
  assert tree.fingerprint(jax.device_put(params, shardings)) == tree.fingerprint(params)
  if dtype == 'bfloat16':
    assert tree.fingerprint(jax.tree.map(lambda x: x.astype('float32'), params)) == tree.fingerprint(params)


# Memory and disk.


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('quantize', cache.QUANTIZE)
def test_a_state_comes_back_from_memory_and_from_disk(tmp_path, dtype, quantize):
  with cache.Store(folder=tmp_path, quantize=quantize) as store:
    store.put(key(1), state(1, dtype))
    kept, where = store.get(key(1))
    assert where == 'memory' and store.get(key(2)) is None
  with cache.Store(folder=tmp_path) as later:
    again, where = later.get(key(1))
    assert where == 'disk' and same(kept, again) and later.get(key(1))[1] == 'memory'
  assert same(kept, state(1, dtype)) == (quantize == 'none')


def test_int8_is_within_half_a_step_of_each_channel():
  exact = state(3, tokens=40)
  exact.v[:, :, 0, 1] = 0   # a channel of zeros has no scale of its own
  stored = cache.quantized(exact)
  for name in ('k', 'v'):
    scale = getattr(stored, f'{name}_scale')
    assert getattr(stored, name).dtype == np.int8 and scale.shape == (2, 1, 2, 4)
    off = np.abs(getattr(stored, name) * scale - getattr(exact, name))
    assert np.all(off <= scale * 0.5001)
    np.testing.assert_allclose(scale[:, 0], np.maximum(np.abs(getattr(exact, name)).max(1), 1e-30) / 127, atol=1e-30)
  error = cache.relative_error(exact, stored)
  wrong = np.concatenate([(getattr(stored, n) * getattr(stored, f'{n}_scale') - getattr(exact, n)).ravel() for n in 'kv'])
  right = np.concatenate([exact.k.ravel(), exact.v.ravel()])
  assert error == pytest.approx(np.sqrt(np.sum(wrong ** 2) / np.sum(right ** 2)), rel=1e-4) and 0 < error < 0.01
  store = cache.Store(quantize='int8')
  store.put(key(1), exact)
  assert store.counts.int8_blocks == 1 and store.counts.int8_error == pytest.approx(error)


def test_memory_lets_go_of_what_was_not_used_for_longest():
  store = cache.Store(memory_bytes=3 * BYTES)
  for i in range(3):
    store.put(key(i), state(i))
  assert store.get(key(0))
  store.put(key(3), state(3))
  assert [store.get(key(i)) is not None for i in range(4)] == [True, False, True, True]
  store.put(key(9), state(9, tokens=50))   # more than all the room: kept nowhere, and nothing else goes for it
  assert store.get(key(9)) is None and store.get(key(3))
  store.put(key(3), state(3))   # the same again takes no more room
  assert store.get(key(0)) and store.get(key(2)) and store.counts.evicted_memory == 1


def test_the_disk_lets_go_of_what_was_not_used_for_longest(tmp_path):
  size = None
  with cache.Store(memory_bytes=0, folder=tmp_path) as store:
    for i in range(4):
      store.put(key(i), state(i))
    store.flush()
    size = files(tmp_path)[0].stat().st_size
    for i in range(4):
      os.utime(tmp_path / key(i)[:2] / f'{key(i)}.safetensors', (1000 + i, 1000 + i))
    assert store.get(key(0))   # used now
  stale, fresh = (tmp_path / key(1)[:2] / name for name in ('.a.tmp', '.b.tmp'))
  for path in (stale, fresh):
    path.write_text('half')
  os.utime(stale, (1000, 1000))
  with cache.Store(memory_bytes=0, folder=tmp_path, disk_bytes=3 * size) as store:
    store.put(key(7), state(7))
    store.flush()
    assert [store.get(key(i)) is not None for i in (0, 1, 2, 3, 7)] == [True, False, False, True, True]
    assert store.counts.evicted_disk == 2
  assert fresh.exists() and not stale.exists()   # what nobody finishes goes, what somebody may be writing stays


def test_a_changed_byte_anywhere_is_a_miss_and_the_file_goes(tmp_path):
  with cache.Store(memory_bytes=0, folder=tmp_path) as store:
    store.put(key(1), state(1))
    store.flush()
    path = files(tmp_path)[0]
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    damaged = [whole[:n] for n in (0, 7, 100, len(whole) - 1)] + [whole + b'x']
    for at in [0, 8, *rng.integers(8, len(whole), size=60)]:
      damaged.append(whole[:at] + bytes([whole[at] ^ 1 << int(rng.integers(8))]) + whole[at + 1:])
    survived = 0
    for i, data in enumerate(damaged, start=1):
      path.write_bytes(data)
      found = store.get(key(1))
      assert found is None or same(found[0], state(1))   # a flipped blank of the header may mean the same
      survived += found is not None
      assert path.exists() == (found is not None)
      assert store.counts.corrupt == i - survived
    assert survived <= 3
    path.write_bytes(whole)
    assert same(store.get(key(1))[0], state(1))
    store.put(key(1), state(1))


def test_another_users_files_are_hits_and_what_cannot_be_read_stays(tmp_path, monkeypatch):
  def refuse(path, *_, **__):
    raise PermissionError(errno.EPERM, 'not the owner', str(path))

  tmp_path.chmod(0o777)
  with cache.Store(memory_bytes=0, folder=tmp_path) as store:
    store.put(key(1), state(1))
    store.flush()
    path = files(tmp_path)[0]
    assert path.parent.stat().st_mode & 0o777 == 0o777   # others may write where they may write above
    monkeypatch.setattr(os, 'utime', refuse)   # as on a mount that is only read
    assert same(store.get(key(1))[0], state(1))
    monkeypatch.setattr(cache.safetensors, 'safe_open', refuse)
    assert store.get(key(1)) is None and path.exists() and store.counts.corrupt == 0


def test_what_is_no_state_of_the_model_is_a_miss(tmp_path):
  k = np.zeros(SHAPE, np.float32)
  others = [{'k': k}, {'k': k, 'w': k}, {'k': k, 'v': k[:1]}, {'k': k[0], 'v': k[0]}, {'k': k, 'v': k, 'k_scale': k},
            {'k': k.astype(np.int8), 'v': k.astype(np.int8)}, {'k': k[:, :4], 'v': k[:, :4]}]
  with cache.Store(memory_bytes=0, folder=tmp_path) as store:
    for i, arrays in enumerate(others):
      path = tmp_path / key(i)[:2] / f'{key(i)}.safetensors'
      path.parent.mkdir(exist_ok=True)
      metadata = {'format': cache.FORMAT, 'checksum': cache._checksum(arrays)}
      path.write_bytes(safetensors.numpy.save(arrays, metadata=metadata))
      assert store.get(key(i), SHAPE) is None and not path.exists()
      os.mkfifo(path)   # to open it would be to wait for somebody who writes to it
      assert store.get(key(i)) is None and path.exists()
    assert store.counts.corrupt == len(others)


def test_nonsense_is_refused(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(NotADirectoryError, match='file'):
    cache.Store(folder=tmp_path / 'file')
  with pytest.raises(ValueError, match="quantize='int4'"):
    cache.Store(quantize='int4')
  with pytest.raises(ValueError, match='disk_bytes=-1'):
    cache.Store(disk_bytes=-1)


def test_a_full_disk_costs_one_warning(tmp_path):
  code = f'''
    import resource, sys, warnings
    sys.path[:0] = {FOLDERS!r}
    import cache_test
    from blockattn.inference import cache
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))   # of every file: writing on fails with an OSError
    with warnings.catch_warnings(record=True) as caught:
      warnings.simplefilter('always')
      with cache.Store(folder={str(tmp_path)!r}) as store:
        for i in range(30):
          store.put(cache_test.key(i), cache_test.state(i, tokens=100))
        store.flush()
        assert all(store.get(cache_test.key(i))[1] == 'memory' for i in range(30))
    assert [w.category for w in caught] == [RuntimeWarning], caught
    print(caught[0].message)
  '''
  done = subprocess.run([sys.executable, '-c', textwrap.dedent(code)], capture_output=True, text=True, timeout=120)
  assert done.returncode == 0, done.stderr
  assert str(tmp_path) in done.stdout and 'memory only' in done.stdout
  assert not files(tmp_path)


def hammer(folder, seconds):
  """Writes and reads the same few keys, in a folder too small for them, until the time is up."""
  rng, end, hits = np.random.default_rng(os.getpid()), time.monotonic() + seconds, 0
  with cache.Store(memory_bytes=0, folder=folder, disk_bytes=4 * 50_000) as store:
    while time.monotonic() < end:
      i = int(rng.integers(8))
      found = store.get(key(i))
      hits += found is not None
      assert found is None or same(found[0], state(i, tokens=400)), 'half a block'
      store.put(key(i), state(i, tokens=400))
    store.flush()
    assert not store.counts.corrupt and hits, (store.counts, hits)


def test_processes_that_share_a_folder_never_see_half_a_block(tmp_path):
  code = f'import sys; sys.path[:0] = {FOLDERS!r}\n'
  code += f'import cache_test; cache_test.hammer({str(tmp_path)!r}, 3)'
  workers = [subprocess.Popen([sys.executable, '-c', code], stderr=subprocess.PIPE, text=True) for _ in range(3)]
  for worker in workers:
    _, err = worker.communicate(timeout=120)
    assert worker.returncode == 0, err
  assert all(path.suffix == '.safetensors' for path in files(tmp_path))
