"""The points of a sweep as runs: one command each, with a workdir named by what the point changes.

    python -m launch.sweep --config configs/tiny.py --workdir runs/sweep                       # lists the commands
    python -m launch.sweep --config configs/tiny.py --workdir runs/sweep --points dropout      # another sweep of the file
    python -m launch.sweep --config configs/tiny.py --workdir runs/sweep --run local
    python -m launch.sweep --config configs/distill.py:model=qwen3_4b --workdir /shared/runs/sinks --run slurm \
        --sbatch "--nodes=4 --ntasks-per-node=8 --gpus-per-node=8" --config.data.files=/shared/train.jsonl
    python -m tools.compare --sweep runs/sweep

A config file has, beside get_config, `sweep(add)` or `sweep(add, arg)`, which calls `add({'blocks.sinks': 4}, seed=1)` for
every point: dotted keys of the config and their values. `arg` is the text of --points. Further --config.KEY=VALUE are of
every point.

All points are checked before the first starts: keys and types on the locked config, the values by the trainer that the
config is for, and that the command line says exactly what was meant. Points that are finished are skipped, so that the same
command goes on with what is left. A point that fails is reported and does not stop the others.

--run local runs one point after the other (--processes and --devices: see launch/processes.py), each with its output in
WORKDIR/POINT/log.txt; slurm submits launch/slurm.sbatch once per point that is not queued yet; jobset applies
launch/jobset.yaml, or the file of --jobset, once per point, with its name and its command.

The exit code is 0; 1 if a point failed or could not be submitted; 2 if the config, its sweep or a workdir is refused;
75 if SIGTERM came and the point under way was saved.
"""

import dataclasses
import hashlib
import importlib
import importlib.util
import inspect
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import yaml

from blockattn import disk, options as options_lib
from blockattn.errors import UserError
from blockattn.train import command, job, loop, workdir as workdir_lib
from tools import arguments

HERE = pathlib.Path(__file__).resolve().parent
MAX_NAME = 120       # characters of a point's folder; longer ones end in a hash
TAIL = 5             # lines of a failed point's log that are shown
EXIT_PREEMPTED = loop.EXIT_PREEMPTED


@dataclasses.dataclass(frozen=True)
class Point:
  """One run of a sweep.

  Attributes:
    name: of its folder: 'blocks.sinks=4,seed=1', or 'base' for the config as it is.
    workdir: its folder.
    changes: {dotted key: value}.
    command: what Python is given: ('-m', 'blockattn.train.distill', '--config=...', ...).
    steps: of the run.
    step: of its newest checkpoint, None without one.
    finished: whether nothing is left to do: the last step is saved, or held-out figures ended the run before.
  """
  name: str
  workdir: pathlib.Path
  changes: Mapping[str, Any]
  command: tuple[str, ...]
  steps: int
  step: int | None
  finished: bool = False


def read_points(path: str, arg: str = '') -> list[dict[str, Any]]:
  """What the `sweep` of a config file adds, in its order.

  Args:
    path: config file, with or without ':ARGUMENT' of its get_config.
    arg: for a sweep that takes one.

  Raises:
    FileNotFoundError: no such file.
    ValueError: no sweep, a sweep without a point, twice the same point, or an argument for a sweep that takes none.
  """
  file = pathlib.Path(path.partition(':')[0])
  if not file.is_file():
    raise FileNotFoundError(f'{file}: no such config file')
  spec = importlib.util.spec_from_file_location(f'sweep_of_{file.stem}', file)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  if not hasattr(module, 'sweep'):
    raise UserError(f"{file} has no sweep; write `def sweep(add):` beside get_config, with add({{'blocks.sinks': 4}}) for "
                    'every point')
  points = []
  takes_arg = len(inspect.signature(module.sweep).parameters) > 1
  if arg and not takes_arg:
    raise UserError(f'--points {arg}: the sweep of {file} takes no argument; write `def sweep(add, arg):`')
  module.sweep(_adder(points), *([arg] if takes_arg else []))
  if not points:
    raise UserError(f'{file}: its sweep{f" with the argument {arg!r}" if arg else ""} adds no point')
  for point in points:
    if points.count(point) > 1:
      raise UserError(f'{file}: its sweep adds {point_name(point)} twice')
  return points


def _adder(points: list) -> Callable:
  def add(changes: Mapping[str, Any] | None = None, /, **more):
    points.append(dict(changes or {}) | more)
  return add


def point_name(changes: Mapping[str, Any]) -> str:
  """The folder of a point: what it changes, in letters that any file system and shell takes."""
  text = ','.join(f'{key}={value_text(value)}' for key, value in changes.items()) or 'base'
  safe = re.sub(r'[^A-Za-z0-9._=,+-]', '_', text)
  if safe == text and len(text) <= MAX_NAME:
    return text
  return f'{safe[:MAX_NAME]}-{_hash(text)}'


def value_text(value: Any) -> str:
  """A value as the command line takes it."""
  if isinstance(value, bool):
    return str(value).lower()
  if isinstance(value, (tuple, list)):
    text = ','.join(map(value_text, value))
    return text if command.read_list(text) == tuple(value) else repr(tuple(value))
  return str(value)


def _hash(text: str) -> str:
  return hashlib.sha256(text.encode()).hexdigest()[:8]


def plan(path: str, workdir: pathlib.Path, arg: str = '', common: Sequence[str] = ()) -> list[Point]:
  """The points of a config's sweep, all checked.

  Args:
    path: FILE or FILE:ARGUMENT of the config.
    workdir: folder of the sweep.
    arg: of the sweep.
    common: '--config.KEY=VALUE' of every point.

  Raises:
    FileNotFoundError, ValueError: names the point and the key at fault.
    NotADirectoryError: the workdir is a file.
  """
  if workdir.exists() and not workdir.is_dir():
    raise NotADirectoryError(f'{workdir} is a file; name a folder for the points')
  return [_checked(path, workdir, changes, common) for changes in read_points(path, arg)]


def _checked(path, workdir, changes, common) -> Point:
  name = point_name(changes)
  for arg in common:
    key = arg.lstrip('-').removeprefix('config.').partition('=')[0]
    if key in changes:
      raise UserError(f'{arg}: the sweep sets {key} itself')
  args = [f'--config={path}', *common, *(f'--config.{key}={value_text(value)}' for key, value in changes.items())]
  try:
    config = parse(args)
    _check_meant(config, path, common, changes)
    options = job.options_of(config)
    command.check_local(options)
    step = workdir_lib.newest_step(workdir / name, options)
    finished = bool(job.finished(options, workdir / name))
  except (ValueError, KeyError, TypeError) as error:
    raise UserError(f'point {name}: {error.args[0] if error.args else error}') from error
  words = ('-m', type(options).__module__, *args, f'--workdir={workdir / name}')
  return Point(name, workdir / name, changes, words, options.steps, step, finished)


def parse(args: Sequence[str]):
  """The config that a trainer makes of these arguments.

  Raises:
    ValueError: an unknown key, or a value that is not of its type.
  """
  return command.read_config(args)[0]


def _check_meant(config, path, common, changes):
  """The command line must give what the sweep says: it turns texts into values in its own way."""
  meant = parse([f'--config={path}', *common])
  meant.update_from_flattened_dict({key: command.without_dots(value) for key, value in changes.items()})   # checks types
  wrong = options_lib.different([options_lib.flat(one.to_dict()) for one in (meant, config)])
  if wrong:
    raise UserError(f'{", ".join(wrong)}: the command line cannot say this value; change it in get_config, by an argument')


# Running.

@dataclasses.dataclass
class Signals:
  """SIGTERM and SIGINT, handed on to the point that runs.

  Attributes:
    came: the signal, None so far.
    child: what runs.
  """
  came: int | None = None
  child: subprocess.Popen | None = None

  def __call__(self, sign, _):
    self.came = sign
    if self.child is not None and self.child.poll() is None:
      self.child.send_signal(sign)


def run_local(points: Sequence[Point], wrap: Sequence[str] = ()) -> int:
  """Runs points one after the other. Returns the exit status.

  Args:
    wrap: what stands between Python and a point's command, such as ('-m', 'launch.processes', '--processes', '2').
  """
  signals, failed = Signals(), []
  old = {sign: signal.signal(sign, signals) for sign in (signal.SIGTERM, signal.SIGINT)}
  try:
    for number, point in enumerate(points, start=1):
      say(f'{number}/{len(points)} {point.name}: {"from the start" if point.step is None else f"from step {point.step}"}')
      try:
        code = _run_one([sys.executable, *wrap, *point.command], point.workdir / 'log.txt', signals)
      except OSError as error:   # the folder cannot be made, or the command is too long for the system
        failed.append(point)
        say(f'{point.name}: FAILED to start: {error}')
        continue
      if signals.came is not None:
        say(f'stopped at {point.name}, code {code}; the same command goes on')
        return code if code == EXIT_PREEMPTED else 128 + signals.came
      if code:
        failed.append(point)
        say(f'{point.name}: FAILED with code {code}, see {point.workdir / "log.txt"}:\n{_tail(point.workdir / "log.txt")}')
  finally:
    for sign, handler in old.items():
      signal.signal(sign, handler)
  return _summary(points, failed, 'finished')


def _run_one(command, log: pathlib.Path, signals: Signals) -> int:
  log.parent.mkdir(parents=True, exist_ok=True)
  with log.open('ab') as out:
    signals.child = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    if signals.came is not None:   # while it was started, and not yet known
      signals(signals.came, None)
    code = signals.child.wait()
  return code if code >= 0 else 128 - code


def _tail(log: pathlib.Path) -> str:
  return '\n'.join(f'    {line}' for line in log.read_text(encoding='utf-8', errors='replace').splitlines()[-TAIL:])


def _summary(points, failed, done) -> int:
  if failed:
    say(f'{len(failed)} of {len(points)} points failed: {" ".join(point.name for point in failed)}')
    return 1
  say(f'{len(points)} points {done}')
  return 0


def run_slurm(points: Sequence[Point], options: Sequence[str] = ()) -> int:
  """Submits a job per point that is not queued; `options` are sbatch's. Returns the exit status.

  Raises:
    FileNotFoundError: there is no Slurm here.
  """
  queue = subprocess.run(['squeue', '--noheader', '--format=%k'], capture_output=True, text=True, check=True).stdout
  queued, failed = {line.strip() for line in queue.splitlines()}, []
  for point in points:
    where = str(point.workdir.resolve())
    if where in queued:
      say(f'{point.name}: queued already')
      continue
    # The comment says in the queue whose job it is, so that no workdir gets two.
    said, wrong = _told(['sbatch', '--parsable', f'--job-name={point.name}', f'--comment={where}',
                         f'--output={where}/slurm-%j.log', *options, str(HERE / 'slurm.sbatch'), *_absolute(point)],
                        folder=point.workdir)
    failed += [point] if wrong else []
    say(f'{point.name}: {f"FAILED to submit: {wrong}" if wrong else f"job {said}"}')
  return _summary(points, failed, 'submitted')


def _told(command: Sequence[str], text: str = '', folder: pathlib.Path | None = None) -> tuple[str, str]:
  """(what a command says, '') or ('', why it failed); a `folder` is made first."""
  try:
    if folder is not None:
      folder.mkdir(parents=True, exist_ok=True)
    result = subprocess.run(command, input=text, capture_output=True, text=True)
  except OSError as error:   # the folder cannot be made, or the command is too long for the system
    return '', str(error)
  return ('', result.stderr.strip() or f'code {result.returncode}') if result.returncode else (result.stdout.strip(), '')


def _absolute(point: Point) -> list[str]:
  return [f'--workdir={point.workdir.resolve()}' if arg.startswith('--workdir=') else arg for arg in point.command]


def run_jobsets(points: Sequence[Point], file: pathlib.Path) -> int:
  """Applies a JobSet per point. Returns the exit status; errors as of `jobset`."""
  failed = []
  documents = {point.name: jobset(file, point) for point in points}   # all of them, before the first is applied
  for point in points:
    said, wrong = _told(['kubectl', 'apply', '-f', '-'], documents[point.name])
    failed += [point] if wrong else []
    say(f'{point.name}: {f"FAILED: {wrong}" if wrong else said}')
  return _summary(points, failed, 'applied')


def jobset(file: pathlib.Path, point: Point) -> str:
  """The documents of a JobSet file, as YAML, with the point's name and command in place of the file's own.

  Raises:
    ValueError: the file is no YAML, or has not one JobSet with one container.
  """
  try:
    documents = [d for d in yaml.safe_load_all(disk.read_text(file)) if d]
  except yaml.YAMLError as error:
    raise UserError(f'{file} is no YAML: {" ".join(str(error).split())}') from error
  sets = [d for d in documents if isinstance(d, dict) and d.get('kind') == 'JobSet']
  try:
    [one] = sets
    one['metadata']['name'] = kubernetes_name(one['metadata']['name'], point.name)
    [container] = one['spec']['replicatedJobs'][0]['template']['spec']['template']['spec']['containers']
    container['args'] = [*point.command, '--multihost=auto']
  except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
    raise UserError(f'{file}: expected one JobSet with a name, whose first replicated job has one container') from error
  return yaml.safe_dump_all(documents, sort_keys=False)


def kubernetes_name(prefix: str, name: str) -> str:
  """A name that Kubernetes takes, with the number of a pod behind it: letters, digits, hyphens; at most 40 of them."""
  plain = re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')
  return f'{f"{prefix}-{plain}"[:31].rstrip("-")}-{_hash(name)}'


def say(text: str):
  print(text, file=sys.stderr, flush=True)


def _arguments(argv: Sequence[str] | None):
  parser = arguments.Parser(prog='python -m launch.sweep', description=__doc__, allow_abbrev=False)
  parser.add_argument('--config', required=True, metavar='FILE[:ARG]', help='config file with a sweep')
  parser.add_argument('--workdir', required=True, type=pathlib.Path, help='folder of the sweep, a folder per point in it')
  parser.add_argument('--points', default='', metavar='ARG', help='argument of the sweep')
  parser.add_argument('--run', choices=('local', 'slurm', 'jobset'), help='run the points (default: list the commands)')
  parser.add_argument('--processes', type=arguments.positive, default=1, help='local: processes of each run')
  parser.add_argument('--devices', type=arguments.positive, help='local: simulated CPU devices of each process')
  parser.add_argument('--sbatch', default='', metavar='OPTIONS', help='slurm: more options of sbatch')
  parser.add_argument('--jobset', type=pathlib.Path, default=HERE / 'jobset.yaml', metavar='FILE', help='jobset: your own')
  options, common = parser.parse_known_args(argv)
  for arg in common:
    if not re.match(r'--config\.[^=]+=', arg):
      parser.error(f'{arg}: no such option; values of the config are given as --config.KEY=VALUE')
  return options, common


def run(options, common: Sequence[str]) -> int:
  points = plan(options.config, options.workdir, options.points, common)
  left = [point for point in points if not point.finished]
  for point in points:
    if point.finished:
      say(f'{point.name}: finished, {point.step} steps')
  if options.run and not left:
    say('all points are finished')
    return 0
  if options.run == 'local':
    several = options.processes > 1 or options.devices is not None
    return run_local(left, ['-m', 'launch.processes', f'--processes={options.processes}',
                            f'--devices={options.devices or 1}'] if several else [])
  if options.run == 'slurm':
    return run_slurm(left, shlex.split(options.sbatch))
  if options.run == 'jobset':
    return run_jobsets(left, options.jobset)
  for point in left:
    print(shlex.join(['python', *point.command]))
  return 0


def main(argv: Sequence[str] | None = None) -> int:
  options, common = _arguments(argv)
  return arguments.run('sweep', lambda: run(options, common), mendable=(subprocess.CalledProcessError,))


if __name__ == '__main__':
  os.environ['PYTHONPATH'] = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get('PYTHONPATH', '')]))
  sys.exit(main())
