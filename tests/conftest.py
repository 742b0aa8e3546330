"""One setting for every test: strict numerics, eight simulated devices, and what is skipped where it cannot run."""

import atexit
import os
import pathlib
import shutil
import tempfile

import jax
import pytest

ON_DEVICE, SLOW = (os.environ.get(name, '') not in ('', '0') for name in ('BLOCKATTN_TEST_DEVICE', 'BLOCKATTN_SLOW'))

# All of these take effect only before the first computation, hence at import.
jax.config.update('jax_numpy_dtype_promotion', 'strict')
# Compiled programs are shared by the workers of a run, and by tests that make the same program anew; they go with the run.
if 'PYTEST_XDIST_WORKER' not in os.environ:   # workers have the folder of the process that started them
  os.environ['BLOCKATTN_TEST_PROGRAMS'] = tempfile.mkdtemp(prefix='blockattn-tests-')
  atexit.register(shutil.rmtree, os.environ['BLOCKATTN_TEST_PROGRAMS'], ignore_errors=True)
jax.config.update('jax_compilation_cache_dir', os.environ['BLOCKATTN_TEST_PROGRAMS'])
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.05)   # below, a file costs as much as it saves
if not ON_DEVICE:
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_num_cpu_devices', 8)
  # Models this small spend most of their time in the compiler. What is compiled for other devices is so in processes of
  # its own, with all optimizations.
  jax.config.update('jax_disable_most_optimizations', True)
  if jax.__version_info__ < (0, 11):   # later XLAs do not know the flag, and refuse it
    # Compiles in half the time; also in the processes that tests start.
    os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} --xla_cpu_use_fusion_emitters=false'


def data_folder() -> pathlib.Path | None:
  """The folder of real documents that BLOCKATTN_DATA names, or None where there is none."""
  name = os.environ.get('BLOCKATTN_DATA', '')
  return pathlib.Path(name) if name and pathlib.Path(name).is_dir() else None


def pytest_collection_modifyitems(items):
  """Skips tests marked `device` on a machine without one, `data` without the documents, and `slow` unless asked for."""
  for item in items:
    if item.get_closest_marker('device') and not ON_DEVICE:
      item.add_marker(pytest.mark.skip(reason='needs an accelerator: set BLOCKATTN_TEST_DEVICE=1'))
    if item.get_closest_marker('slow') and not SLOW:
      item.add_marker(pytest.mark.skip(reason='takes long: set BLOCKATTN_SLOW=1'))
    if item.get_closest_marker('data') and data_folder() is None:
      item.add_marker(pytest.mark.skip(reason='needs real documents: set BLOCKATTN_DATA to their folder'))


def pytest_runtest_teardown(item):
  """Frees compiled programs before there are too many: each takes some 15 memory maps, of which Linux gives a process
  65,530, and LLVM ends a process that gets none."""
  item.session.ended = getattr(item.session, 'ended', 0) + 1
  maps = pathlib.Path('/proc/self/maps')
  if item.session.ended % 10 == 0 and maps.exists() and maps.read_bytes().count(b'\n') > 30_000:
    jax.clear_caches()


@pytest.fixture(scope='session')
def data_dir() -> pathlib.Path:
  """The folder of real documents; a test that asks for it is skipped where it is absent."""
  folder = data_folder()
  if folder is None:
    pytest.skip('needs real documents: set BLOCKATTN_DATA to their folder')
  return folder


@pytest.fixture
def standard_promotion():
  """For tests that run optax: its bias correction mixes int32 counts with Python floats, which strict refuses."""
  with jax.numpy_dtype_promotion('standard'):
    yield
