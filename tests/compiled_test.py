"""Programs that a later process takes from the user's cache folder."""

import os

import jax
import pytest

from blockattn import compiled

CHOICE = 'JAX_COMPILATION_CACHE_DIR'
OURS = 'blockattn/compiled'   # in the cache folder


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


def test_a_folder_in_the_users_cache(tmp_path, chosen):
  compiled.keep('cpu')
  assert chosen() is None
  compiled.keep('gpu')
  assert chosen() == str(tmp_path / OURS) and (tmp_path / OURS).stat().st_mode & 0o777 == 0o700


def test_a_folder_of_the_users_own(tmp_path, chosen):
  jax.config.update('jax_compilation_cache_dir', str(tmp_path / 'mine'))
  settings = dict(jax.config.values)
  compiled.keep('gpu')
  assert jax.config.values == settings and not (tmp_path / 'blockattn').exists()


def test_a_bound_of_the_users_own(tmp_path, chosen, monkeypatch):
  monkeypatch.setenv('JAX_COMPILATION_CACHE_MAX_SIZE', '5')
  jax.config.update('jax_compilation_cache_max_size', 5)   # as JAX does when it starts
  compiled.keep('gpu')
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
  compiled.keep('gpu')
  assert chosen() is None


def test_a_user_without_a_home(chosen, monkeypatch):
  monkeypatch.delenv('XDG_CACHE_HOME')
  monkeypatch.setattr(os.path, 'expanduser', lambda path: path)   # as for a user whom the system does not know
  compiled.keep('gpu')
  assert chosen() is None
