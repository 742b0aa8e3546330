"""The folder of a run: who is at work in it, what it is a run of, and whether another config may go on with it."""

import contextlib
import pathlib
import subprocess
import sys
from collections.abc import Collection

import jax

from blockattn import checkpoint, disk, loading, locks, metrics, options as options_lib
from blockattn.errors import UserError
from blockattn.kernels import api

LOCK = 'run.lock'   # file of a workdir, held by the run that is at work in it
# Keys that do not change what is learned, but for the last bits of its sums; with a dot, all that stand below.
_FREE_TO_CHANGE = ('log_every', 'save_every', 'keep', 'chunk', 'mesh.', 'rules', 'teacher.rules', 'compute.impl',
                   'compute.tiles', 'compute.remat', 'compute.far_queries', 'data.workers', 'wandb', 'peak_tflops',
                   'profile', 'data.eval_files', 'eval.', 'export_every')


@contextlib.contextmanager
def only_run_in(workdir):
  """Within the block no other run that asks for this is at work in the workdir; made if absent.

  Raises:
    ValueError: another run is; names its process and host.
  """
  if jax.process_index() != 0:   # of several processes one asks for all
    yield
    return
  workdir = pathlib.Path(workdir)
  workdir.mkdir(parents=True, exist_ok=True)
  with contextlib.ExitStack() as stack:
    try:
      stack.enter_context(locks.held(workdir / LOCK))
    except locks.Held as other:
      raise UserError(f'{workdir}: another run is at work here ({other}). Wait for its end, end it, or use another '
                      '--workdir') from None
    yield


def computing(impl: str) -> dict:
  """What computes here, and the implementation of attention that `impl` means on it, see `api.choose`."""
  device = jax.devices()[0]
  return {'platform': device.platform, 'devices': [str(d) for d in jax.devices()],
          'attention': api.choose(impl, device)._asdict()}


def save_run_facts(workdir, options):
  """Writes config.json, the config that the options were read from, and run.json: the command, the git commit, the versions
  and what computes.

  A workdir that holds a checkpoint of another config is refused: resuming under a changed config would silently be
  neither run. Where and how it is computed, and what is written of it, may change: see _FREE_TO_CHANGE.

  Raises:
    ValueError: names the keys that differ.
  """
  if jax.process_index() != 0:
    return
  workdir = pathlib.Path(workdir)
  workdir.mkdir(parents=True, exist_ok=True)
  newest_step(workdir, options)
  metrics.write_json(workdir / 'config.json', options_lib.as_json(options))
  metrics.write_json(workdir / 'run.json', {'command': sys.argv, 'commit': git_commit(), 'jax': jax.__version__}
                     | computing(options.compute.impl))


def newest_step(workdir: pathlib.Path, options) -> int | None:
  """The step of the newest checkpoint of a workdir, None without one.

  Raises:
    ValueError: it is of another config than that of the options; names the keys that differ. A key that the workdir's config
      lacks is newer than it, and counts as its default: runs that were begun before it did just that.
  """
  step = checkpoint.newest_step(workdir / loading.CHECKPOINTS)
  if step is None or not (workdir / 'config.json').exists():
    return None
  check_config(workdir, options)
  return step


def check_config(workdir: pathlib.Path, options, *, free: Collection[str] = ()) -> None:
  """Refuses options that are not those of a run, but for keys that may change while it goes on, and for `free` ones.

  Raises:
    ValueError, FileNotFoundError: see newest_step; or there is no config.json.
  """
  old = options_lib.flat(options_lib.default_json(type(options))) | options_lib.flat(disk.read_json(workdir / 'config.json'))
  changed = {key: values for key, values in differing(old, options_lib.as_json(options)).items() if key not in free}
  if changed:
    said = '; '.join(f'{key} was {old!r} and is {new!r}' for key, (old, new) in changed.items())
    ended = _schedule_steps(old)
    longer = (f'; to go on with other steps, keep the schedule of those that were done: --config.optim.decay_steps={ended}'
              if changed.keys() & {'steps', 'optim.decay_steps'} else '')
    raise UserError(f'{workdir} holds a run with another config: {said}. Use a new --workdir, or the old values{longer}')


def differing(old: dict, new: dict) -> dict[str, tuple]:
  """{dotted key: (old value, new value)} where resolved configs differ, but for keys that may change while a run goes on.

  So may `steps`, as long as the learning rate of the steps that were done stays what it was: the schedule ends where it did.
  """
  old, new = options_lib.flat(old), options_lib.flat(new)
  same_schedule = _schedule_steps(old) == _schedule_steps(new)
  return {k: (old.get(k), new.get(k)) for k in sorted(old.keys() | new.keys())
          if old.get(k) != new.get(k) and not _is_free(k) and not (same_schedule and k in ('steps', 'optim.decay_steps'))}


def _schedule_steps(flat: dict) -> int | None:
  """Where the learning rate's schedule ends, see optim.OptimConfig; configs of before `decay_steps` say it by `steps`."""
  return flat.get('optim.decay_steps') or flat.get('steps')


def _is_free(key):
  return any(key == free or (free.endswith('.') and key.startswith(free)) for free in _FREE_TO_CHANGE)


def git_commit() -> str | None:
  """The commit of the checkout that this file belongs to, with '+' if files differ from it; None outside of git."""
  git = ['git', '-C', str(pathlib.Path(__file__).parent)]
  try:
    commit = subprocess.run([*git, 'rev-parse', 'HEAD'], capture_output=True, text=True, check=True).stdout.strip()
    changed = subprocess.run([*git, 'status', '--porcelain', '-uno'], capture_output=True, text=True, check=True).stdout
  except (OSError, subprocess.CalledProcessError):
    return None
  return commit + ('+' if changed.strip() else '')
