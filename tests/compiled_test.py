"""Programs that a later process takes from the user's cache folder."""

import os
import subprocess
import sys

import jax
import pytest
import run_cases
import tiny_run

from blockattn import compiled

CHOICE = 'JAX_COMPILATION_CACHE_DIR'
OURS = 'blockattn/compiled'   # in the cache folder


def start(workdir, cache):
  """What a run of the trainers' command says that keeps all it compiles, and says what it need not compile."""
  env = run_cases.own_environment(workdir.parent) | {'XDG_CACHE_HOME': str(cache), 'JAX_LOG_COMPILES': '1'}
  del env[CHOICE]
  ran = subprocess.run([sys.executable, tiny_run.__file__, f'--config={tiny_run.__file__}', f'--workdir={workdir}',
                        '--config.mesh.data=1', '--config.mesh.tensor=1'], env=env, cwd=run_cases.ROOT, text=True,
                       capture_output=True, timeout=run_cases.PATIENCE_S)
  assert ran.returncode == 0, ran.stderr
  return ran.stderr


@pytest.mark.slow
def test_a_second_process_takes_what_the_first_has_compiled_and_can_be_read(tmp_path):
  hit, broken = "Persistent compilation cache hit for 'jit_step'", 'Error reading persistent compilation cache entry'
  assert hit not in start(tmp_path / 'first', tmp_path / 'cache')
  for kept in (tmp_path / 'cache' / OURS).glob('*-cache'):
    if not kept.name.startswith('jit_step'):
      kept.write_bytes(kept.read_bytes()[:100])   # as of a process that was killed while it wrote
  said = start(tmp_path / 'second', tmp_path / 'cache')
  assert hit in said and broken in said
  assert run_cases.losses(tmp_path / 'first') == run_cases.losses(tmp_path / 'second')


@pytest.fixture
def chosen(tmp_path, monkeypatch):
  """The folder that JAX keeps programs in, in a process whose user has chosen none."""
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  monkeypatch.delenv(CHOICE, raising=False)
  names = 'jax_compilation_cache_dir', *compiled.SETTINGS
  before = {name: jax.config.values[name] for name in names}
  jax.config.update(names[0], None)
  yield lambda: jax.config.values[names[0]]
  for name, value in before.items():
    jax.config.update(name, value)


def test_a_folder_of_the_users_own(tmp_path, chosen):
  jax.config.update('jax_compilation_cache_dir', str(tmp_path / 'mine'))
  settings = dict(jax.config.values)
  compiled.keep()
  assert jax.config.values == settings and not (tmp_path / 'blockattn').exists()


def test_a_bound_of_the_users_own(tmp_path, chosen, monkeypatch):
  monkeypatch.setenv('JAX_COMPILATION_CACHE_MAX_SIZE', '5')
  jax.config.update('jax_compilation_cache_max_size', 5)   # as JAX does when it starts
  compiled.keep()
  assert chosen() == str(tmp_path / OURS) and jax.config.values['jax_compilation_cache_max_size'] == 5


@pytest.mark.parametrize('broken', ['', 'blockattn', OURS, f'{OURS}/.lockfile'])
def test_a_place_that_cannot_be_written_is_no_error(tmp_path, chosen, monkeypatch, broken):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  path = tmp_path / 'cache' / broken
  if broken.endswith('.lockfile'):
    path.mkdir(parents=True)
  else:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
  compiled.keep()
  assert chosen() is None


def test_a_user_without_a_home(chosen, monkeypatch):
  monkeypatch.delenv('XDG_CACHE_HOME')
  monkeypatch.setattr(os.path, 'expanduser', lambda path: path)   # as for a user whom the system does not know
  compiled.keep()
  assert chosen() is None
