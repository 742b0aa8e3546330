"""The command line of the trainers: `--config FILE[:ARG] --workdir DIR [--config.key=value ...]`."""

import contextlib
import errno
import os
import pathlib
import platform
import re
import sys
import traceback

import jax
from flax import traverse_util

from blockattn import checkpoint, disk, multihost, tree
from blockattn.train import loop, setup


def quiet_libraries():
  """Keeps what libraries say in passing (orbax at every save, jax about absent TPUs) out of the progress line."""
  from absl import logging
  logging.set_verbosity(logging.WARNING)


def main(run):
  """Command line of a trainer: `--config FILE[:ARG] --workdir DIR [--multihost WHERE] [--profile FIRST:END]
  [--config.key=value ...]`."""
  from absl import app, flags
  from ml_collections import config_flags
  config = config_flags.DEFINE_config_file('config', None, 'Config file, with an optional :argument.', lock_config=True)
  workdir = flags.DEFINE_string('workdir', None, 'Folder of the run: checkpoints, metrics, the resolved config.')
  where = flags.DEFINE_string('multihost', None, 'One of several processes of a run: auto, or ADDRESS:PORT,N,I (where '
                              'process 0 is reached, the number of processes, the number of this one).')
  profile = flags.DEFINE_string('profile', None, 'FIRST:END, such as 10:15: writes a trace of these steps, END not '
                                'included, into WORKDIR/profile; short for --config.profile.')
  flags.mark_flags_as_required(['config', 'workdir'])

  def start(argv):
    if len(argv) > 1:
      raise app.UsageError(f'unexpected arguments: {argv[1:]}')
    quiet_libraries()
    if profile.value is not None:
      config.value.profile = profile.value
    with _errors_as_a_line():
      check_local(config.value)
      setup.check_reports(config.value)
    with _errors_as_a_line(), multihost.joined(where.value), _errors_as_a_line():
      setup.use_cpu_cores(config.value)
      check_hosts(config.value, workdir.value)
      with loop.only_run_in(workdir.value):
        run(config.value, workdir.value)

  def parse(argv):
    try:
      check_overrides(argv)
    except (ValueError, FileNotFoundError) as error:
      _stop(error)
    return app.parse_flags_with_usage(argv)

  app.run(start, flags_parser=parse)


@contextlib.contextmanager
def _errors_as_a_line():
  try:
    yield
  except (ValueError, FileNotFoundError, loop.NotFinite) as error:
    if not _is_ours(error):
      raise
    _stop(error)
  except checkpoint.NotSaved as error:
    if multihost.is_started():
      _stop(error)   # the processes end together, without waiting for their threads either
    print(f'error: {error}', file=sys.stderr, flush=True)
    os._exit(1)   # else threads of the write that failed would tell of it once more, with a traceback as the last words
  except OSError as error:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
      raise
    _stop(f'{error}: make room there, then start the same command again to go on from the newest checkpoint')


def check_local(config):
  """Raises ValueError if a value of the config is a path on another machine; names the key."""
  for key, value in loop.flat(loop.resolved(config)).items():
    disk.check_local(f'config.{key}={one}' for one in (value if isinstance(value, list) else [value]))


def check_hosts(config, workdir):
  """In a run of several processes, checks that all run the same, before anything is loaded or compiled.

  Raises:
    ValueError: names what differs.
  """
  facts = {f'config.{key}': value for key, value in loop.flat(loop.resolved(config)).items()}
  multihost.check_equal('config', facts | {
      'workdir': str(workdir), 'git commit': loop.git_commit(), 'Python': platform.python_version(),
      'jax': jax.__version__})
  if multihost.is_started():   # the devices are asked for only now: hosts of different versions may fail over them
    multihost.check_equal('devices', {'local devices': jax.local_device_count(),
                                      'kind of device': jax.local_devices()[0].device_kind})


def _stop(error):
  sys.exit(f'error: {error}')   # to stderr, exit code 1


def _is_ours(error) -> bool:
  """Whether a line of this package raised the error on purpose: its text says what to do, and a traceback adds nothing."""
  innermost = traceback.extract_tb(error.__traceback__)[-1]
  package = pathlib.Path(__file__).resolve().parents[1]
  return pathlib.Path(innermost.filename).resolve().is_relative_to(package) and innermost.line.startswith('raise ')


def check_overrides(argv):
  """Checks the command line's config file, the names of its overrides and its paths; config_flags is short with the first
  two.

  Raises:
    FileNotFoundError: no such config file.
    ValueError: a path is on another machine, the config file refuses its argument, or a --config.KEY is no key; names
      the nearest.
  """
  from absl import flags
  from ml_collections import ConfigDict, config_flags
  disk.check_local(argv)
  override = re.compile(r'--?(?:no)?config\.([^=\[]+)')
  plain, values = [arg for arg in argv if not override.match(arg)], flags.FlagValues()
  flag = config_flags.DEFINE_config_file('config', flag_values=values, sys_argv=plain)
  try:
    values(plain, known_only=True)
  except flags.Error as error:   # a get_config that raised, with its traceback as text
    kind, _, text = str(error).strip().splitlines()[-1].partition(': ')
    if kind != 'ValueError':
      return   # no text for the user: let absl print all of it
    raise ValueError(text) from None
  if flag.value is None:
    return   # absl says that it is required
  if not isinstance(flag.value, ConfigDict):
    raise FileNotFoundError(f'{values["config"].config_filename}: no such config file')
  for name in (match[1] for match in map(override.match, argv) if match):
    _check_key(name, flag.value.to_dict())


def _check_key(name, config):
  known = traverse_util.flatten_dict(config, keep_empty_nodes=True, sep='.')
  if name in known or any(key.startswith(f'{name}.') for key in known):
    return
  same = [key for key in known if key.rsplit('.')[-1] == name.rsplit('.')[-1]]   # the right key of the wrong section
  hint = f'did you mean {same[0]!r}?' if len(same) == 1 else tree.did_you_mean(name, known)
  raise ValueError(f'--config.{name}: no such key; {hint}')
