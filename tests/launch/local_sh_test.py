"""What launch/local.sh does before and after an installation; none is made here."""

import os
import pathlib
import shutil
import stat
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
NEEDED = ('bash', 'dirname', 'cat', 'grep', 'cmp', 'rm', 'touch')
pytestmark = pytest.mark.skipif(shutil.which('bash') is None, reason='needs bash')


@pytest.fixture
def checkout(tmp_path):
  """A checkout that holds no more than the launcher looks at."""
  folder = tmp_path / 'check out'   # with a space, as a user may have it
  (folder / 'launch').mkdir(parents=True)
  shutil.copy(ROOT / 'launch' / 'local.sh', folder / 'launch')
  shutil.copy(ROOT / 'setup.py', folder)
  return folder


def executable(path, text):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(text)
  path.chmod(path.stat().st_mode | stat.S_IXUSR)


def bare_path(folder):
  """A PATH with the basic commands and no Python."""
  folder.mkdir()
  for name in NEEDED:
    (folder / name).symlink_to(shutil.which(name))
  return folder


def run(checkout, *args, cwd=None, **env):
  clean = {k: v for k, v in os.environ.items() if k not in ('PYTHON', 'BLOCKATTN_EXTRAS', 'JAX_PLATFORMS',
                                                            'BLOCKATTN_TEST_DEVICE', 'PYTHONPATH', 'XLA_FLAGS')}
  return subprocess.run([shutil.which('bash'), str(checkout / 'launch' / 'local.sh'), *args], cwd=cwd or checkout,
                        env=clean | env, capture_output=True, text=True, timeout=60)


def pretend_installed(checkout, extras='', name='.venv'):
  """An environment that the launcher takes for a finished one; its Python says how it was called, pip leaves a file."""
  venv = checkout / name
  executable(venv / 'bin' / 'python', '#!/bin/sh\ncase "$*" in *pip*install*) echo "$*" >> "$0.pip"; esac\n'
             'echo "args: $*"\necho "cwd: $PWD"\necho "path: $PYTHONPATH"\necho "platforms: ${JAX_PLATFORMS-unset}"\n')
  (venv / 'pyvenv.cfg').write_text('home = here\nversion = 3.11.7\n')
  key = f"extras '{extras}' in {checkout.resolve()}\nversion = 3.11.7\n" + (checkout / 'setup.py').read_text()
  (venv / f'installed-{extras or "base"}').write_text(key)
  return venv


def pip_calls(venv):
  log = venv / 'bin' / 'python.pip'
  return log.read_text() if log.exists() else ''


def test_usage():
  for arg in ('--help', '-h', 'help'):
    result = run(ROOT, arg)
    assert result.returncode == 0 and 'usage: launch/local.sh' in result.stdout
  result = run(ROOT)
  assert result.returncode == 2 and 'usage:' in result.stderr


def test_a_machine_without_python_is_told_what_to_do(checkout, tmp_path):
  result = run(checkout, '-c', 'pass', PATH=str(bare_path(tmp_path / 'bin')))
  assert result.returncode != 0 and 'no Python >= 3.11 found' in result.stderr and 'apt-get' in result.stderr


def test_a_wrong_python_is_named(checkout):
  result = run(checkout, '-c', 'pass', PYTHON='/nowhere/python')
  assert result.returncode != 0 and 'PYTHON=/nowhere/python' in result.stderr


def test_a_missing_venv_module_is_named(checkout, tmp_path):
  python = tmp_path / 'python-of-debian'
  executable(python, f'#!/bin/sh\ncase "$*" in *ensurepip*) exit 1; esac\nexec "{sys.executable}" "$@"\n')
  result = run(checkout, '-c', 'pass', PYTHON=str(python))
  assert result.returncode != 0 and 'apt-get install python3-venv' in result.stderr
  assert not (checkout / '.venv').exists()


def test_a_finished_installation_starts_at_once_from_any_folder(checkout, tmp_path):
  venv = pretend_installed(checkout)
  result = run(checkout, '-m', 'blockattn.train', 'two words', cwd=tmp_path, PYTHONPATH='/mine')
  assert result.stdout.splitlines() == [
      'args: -m blockattn.train two words', f'cwd: {tmp_path}', f'path: {checkout}:/mine', 'platforms: unset']
  assert (result.returncode, pip_calls(venv)) == (0, '')
  assert 'args: -m tools.demo --steps=3' in run(checkout, 'demo', '--steps=3').stdout
  assert 'args: -m launch.sweep --config x' in run(checkout, 'sweep', '--config', 'x').stdout
  for several in (('--processes', '2', '--devices', '4', '-m', 'x'), ('--devices=4', 'x.py')):
    assert f'args: -m launch.processes {" ".join(several)}\n' in run(checkout, *several).stdout


def test_the_larger_installation_serves_the_smaller_command_but_not_the_other_way(checkout):
  venv = pretend_installed(checkout, 'dev')
  assert run(checkout, '-c', 'pass').returncode == 0 and pip_calls(venv) == ''
  shutil.rmtree(venv)
  venv = pretend_installed(checkout)
  result = run(checkout, 'lint')
  assert 'args: -m ruff check .' in result.stdout and '--editable .[dev]' in pip_calls(venv)


def test_the_demo_of_a_model_of_four_bits_installs_what_reads_them(checkout):
  venv = pretend_installed(checkout)
  assert run(checkout, 'demo', '--model', 'models/smollm2').returncode == 0 and pip_calls(venv) == ''
  result = run(checkout, 'demo', '--docs=4', '--model', 'smollm2')
  assert 'args: -m tools.demo --docs=4 --model smollm2' in result.stdout and '--editable .[gguf]' in pip_calls(venv)


def test_documents_and_types_are_made_in_the_checkout(checkout, tmp_path):
  pretend_installed(checkout, 'dev')
  commands = {('docs',): 'mkdocs build --strict --quiet', ('docs', 'serve'): 'mkdocs serve', ('types',): 'pyright'}
  for args, command in commands.items():
    result = run(checkout, *args, cwd=tmp_path)
    assert f'args: -m {command}' in result.stdout and f'cwd: {checkout}' in result.stdout


@pytest.mark.parametrize('device, args, platforms', [('0', '-n auto', 'cpu'), ('1', '-n 0', 'unset')])
def test_only_tests_are_held_to_the_cpu(checkout, tmp_path, device, args, platforms):
  pretend_installed(checkout, 'dev')
  result = run(checkout, 'test', '-k', 'x', cwd=tmp_path, BLOCKATTN_TEST_DEVICE=device)
  assert f'args: -m pytest {args} --dist worksteal -k x' in result.stdout
  assert f'cwd: {checkout}' in result.stdout and f'platforms: {platforms}' in result.stdout


def test_a_change_of_setup_installs_again_once(checkout):
  venv = pretend_installed(checkout)
  with (checkout / 'setup.py').open('a') as f:
    f.write('# changed\n')
  assert run(checkout, '-c', 'pass').returncode == 0
  assert '--editable .' in pip_calls(venv)
  before = pip_calls(venv)
  assert run(checkout, '-c', 'pass').returncode == 0 and pip_calls(venv) == before


def test_a_failed_installation_is_not_taken_for_a_finished_one(checkout):
  venv = pretend_installed(checkout)
  with (checkout / 'setup.py').open('a') as f:
    f.write('# changed\n')
  executable(venv / 'bin' / 'python', '#!/bin/sh\ncase "$*" in *install*) echo no network >&2; exit 1; esac\n')
  result = run(checkout, '-c', 'pass')
  assert result.returncode != 0 and 'no network' in result.stderr and 'pip could not install' in result.stderr
  assert (venv / 'installing').exists() and not (venv / 'installed-base').exists()
  result = run(checkout, '-c', 'pass', PYTHON='/nowhere/python')
  assert 'interrupted; starting over' in result.stderr and result.returncode != 0


def test_vllm_has_an_environment_of_its_own(checkout, tmp_path):
  venv = pretend_installed(checkout, 'vllm-ci', '.venv-vllm')
  result = run(checkout, 'test-vllm', '-x', cwd=tmp_path)
  assert 'args: -m pytest -m vllm tests/serving -x' in result.stdout and 'platforms: cpu' in result.stdout
  assert f'cwd: {checkout}' in result.stdout and (result.returncode, pip_calls(venv)) == (0, '')
  (venv / 'installed-vllm-ci').unlink()
  assert run(checkout, 'test-vllm').returncode == 0 and '--editable .[vllm-ci]' in pip_calls(venv)
  assert 'uninstall' in pip_calls(venv) and 'torchvision' in pip_calls(venv)


def test_where_vllm_cannot_be_installed_the_exit_code_says_so(checkout):
  venv = pretend_installed(checkout, 'vllm-ci', '.venv-vllm')
  (venv / 'installed-vllm-ci').unlink()
  executable(venv / 'bin' / 'python', '#!/bin/sh\ncase "$*" in *install*) echo no wheel >&2; exit 1; esac\n')
  result = run(checkout, 'test-vllm')
  assert result.returncode == 69 and 'no wheel' in result.stderr and 'pip could not install' in result.stderr
  executable(venv / 'bin' / 'python', '#!/bin/sh\nexit 1\n')
  assert run(checkout, 'test-vllm', BLOCKATTN_VLLM=str(venv)).returncode == 1   # a test that failed


@pytest.mark.skipif(shutil.which('shellcheck') is None, reason='shellcheck is not installed')
def test_shellcheck():
  scripts = [*sorted((ROOT / 'launch').glob('*.sh')), *(ROOT / 'launch').glob('*.sbatch'), ROOT / '.ci' / 'run']
  result = subprocess.run(['shellcheck', *map(str, scripts)], capture_output=True, text=True)
  assert result.returncode == 0, result.stdout
