"""The runs in a folder and their checkpoints: how far they are, what they measured, what tells them apart.

  python -m tools.runs runs
  python -m tools.runs runs --verify
  python -m tools.runs runs --delete sinks4/checkpoints/2000     # this step
  python -m tools.runs runs --delete sinks4                      # the whole run

DIR is a work directory of a trainer, or a folder with some of them, at whatever depth. A row per run: whether it is at work,
how far it is, its last loss, its best step on held-out documents, and the keys in which the configs differ. A row per
checkpoint: its age and size, the loss and the held-out figure at it. WORKDIR/best is what conversion and evaluation take.

--verify reads every checkpoint and compares it with its checksums. --delete deletes the run or the step that it names, and
refuses a run that is at work. The exit code is 0; 1 if a checkpoint is damaged; 2 if DIR holds no run, or --delete names
nothing that may be deleted.
"""

import json
import math
import os
import pathlib
import shutil
import sys
import time
from collections.abc import Sequence

import rich.console

from blockattn import checkpoint, disk, locks, metrics, options as options_lib
from blockattn.errors import UserError
from blockattn.loading import BEST, CHECKPOINTS
from blockattn.train import workdir as workdir_lib
from tools import arguments


def find(folder: str | os.PathLike) -> list[pathlib.Path]:
  """The work directories of trainers in a folder, itself included.

  Raises:
    FileNotFoundError: there is none.
  """
  folder = pathlib.Path(folder)
  found = sorted(path.parent for path in folder.rglob('config.json') if _is_run(path.parent))
  if not found:
    raise FileNotFoundError(f'{folder}: no run in it, that is no folder with a config.json and checkpoints, metrics or a '
                            'run.json; give the --workdir of a trainer, or the folder above')
  return found


def _is_run(folder):
  return any((folder / name).exists() for name in (CHECKPOINTS, metrics.FILE_NAME, 'run.json'))


def describe(workdir: pathlib.Path, now: float) -> dict:
  """What a run is: {'config', 'state': 'at work', 'finished', 'stopped' or 'not started', 'step', 'steps', 'age': seconds
  since the last line of metrics, 'loss', 'figure', 'best': [step, value], 'checkpoints': [{'folder', 'step', 'age', 'bytes',
  'loss', 'value'}]}; what is not known is None."""
  config = disk.read_json(workdir / 'config.json', {'steps': int})
  lines = metrics.read_metrics(workdir / metrics.FILE_NAME) if (workdir / metrics.FILE_NAME).exists() else []
  losses = {line['step']: line['loss'] for line in lines if 'loss' in line}
  kept, saved = checkpoint.steps(workdir / BEST), checkpoint.steps(workdir / CHECKPOINTS)
  best = checkpoint.load_meta(workdir / BEST, kept[-1])['eval'] if kept else None
  figure = None if best is None else best['figure']
  values = {line['step']: line[f'eval/{figure}'] for line in lines if f'eval/{figure}' in line}
  finished = checkpoint.is_finished(workdir / CHECKPOINTS, config['steps']) if saved else False
  state = ('at work' if locks.is_held(workdir / workdir_lib.LOCK) else 'finished' if finished else
           'stopped' if lines or saved else 'not started')
  return {'config': config, 'state': state, 'step': lines[-1]['step'] if lines else max(saved, default=0),
          'steps': config['steps'], 'age': now - lines[-1]['time'] if lines else None,
          'loss': losses[max(losses)] if losses else None, 'figure': figure,
          'best': None if best is None else [kept[-1], best['value']],
          'checkpoints': [_step(workdir / name / str(step), now, losses, values)
                          for name, steps in ((CHECKPOINTS, saved), (BEST, kept)) for step in steps]}


def _step(path, now, losses, values):
  """A checkpoint; its loss is that of the last line before it, its held-out figure likewise."""
  step, size = int(path.name), sum(file.stat().st_size for file in path.rglob('*') if file.is_file())
  before = lambda known: known[max(at)] if (at := [one for one in known if one <= step]) else None
  return {'folder': path.parent.name, 'step': step, 'age': now - path.stat().st_mtime, 'bytes': size,
          'loss': before(losses), 'value': before(values)}


def show(folder: pathlib.Path, runs: dict[pathlib.Path, dict], console: rich.console.Console) -> None:
  """A table of the runs and one of their checkpoints."""
  keys = options_lib.different([options_lib.flat(run['config']) for run in runs.values()])
  table = arguments.table('run', 'state', 'step', 'last line', 'loss', 'held out', 'best (step)', *keys, left=2)
  steps = arguments.table('checkpoint', 'age', 'size', 'loss', 'held out')
  for workdir, run in runs.items():
    name = str(workdir.relative_to(folder)) if workdir != folder else workdir.resolve().name
    flat = options_lib.flat(run['config'])
    best = '-' if run['best'] is None else f'{_number(run["best"][1])} ({run["best"][0]:,})'
    table.add_row(name, run['state'], f'{run["step"]:,} of {run["steps"]:,}', _age(run['age']), _number(run['loss']),
                  run['figure'] or '-', best, *(json.dumps(flat.get(key)) for key in keys))
    for one in run['checkpoints']:
      steps.add_row(f'{name}/{one["folder"]}/{one["step"]}', _age(one['age']), metrics.short_count(one['bytes']) + 'B',
                    _number(one['loss']), _number(one['value']))
  for shown in (table, steps):
    for column in shown.columns:
      column.overflow = 'fold'
    console.print(shown)
  console.print('losses are those of training, of other quantities where sinks, dropout, weights or data differ')


def _number(value) -> str:
  return '-' if value is None or math.isnan(value) else f'{value:.5g}'


def _age(seconds) -> str:
  return '-' if seconds is None else metrics.short_time(max(seconds, 0))


def verify(runs: Sequence[pathlib.Path], console: rich.console.Console) -> int:
  """Checks every checkpoint of the runs; the number of those that are damaged, each said."""
  damaged = checked = 0
  for workdir in runs:
    for name in (CHECKPOINTS, BEST):
      for step in checkpoint.steps(workdir / name):
        checked += 1
        try:
          checkpoint.verify(workdir / name, step)
        except checkpoint.Damaged as error:
          damaged += 1
          console.print(arguments.printable(f'DAMAGED: {error}'))
  console.print(f'{checked} checkpoints read, {damaged} damaged')
  return damaged


def delete(folder: pathlib.Path, name: str) -> pathlib.Path:
  """Deletes a run in a folder, or a step of one, WORKDIR/checkpoints/STEP; returns its path.

  Raises:
    ValueError: it is neither, the run is at work, or it stands outside of the folder.
  """
  path = folder / name
  step = int(path.name) if path.parent.name in (CHECKPOINTS, BEST) and path.name.isdigit() else None
  workdir = path if step is None else path.parent.parent
  inside = workdir.resolve().is_relative_to(folder.resolve())
  if not inside or not (workdir / 'config.json').is_file() or not _is_run(workdir):
    raise UserError(f'--delete {name}: no run in {folder}, and no step of one; name it as the table does: RUN, '
                    f'RUN/{CHECKPOINTS}/STEP or RUN/{BEST}/STEP')
  if step is not None and step not in checkpoint.steps(path.parent):
    raise UserError(f'--delete {name}: no such step; there are {checkpoint.steps(path.parent)}')
  try:
    with locks.held(workdir / workdir_lib.LOCK):
      shutil.rmtree(workdir) if step is None else checkpoint.remove(path.parent, step)
  except locks.Held as other:
    raise UserError(f'--delete {name}: a run is at work there ({other}); end it first') from None
  return path


def _arguments(argv):
  parser = arguments.Parser(prog='python -m tools.runs', description=__doc__)
  parser.add_argument('folder', metavar='DIR', type=pathlib.Path, help='work directory of a trainer, or a folder with some')
  parser.add_argument('--verify', action='store_true', help='read every checkpoint and check it')
  parser.add_argument('--delete', metavar='RUN[/checkpoints/STEP]', help='delete this run in DIR, or this step of it')
  parser.add_argument('--json', metavar='FILE', help='write what is shown here too')
  return parser.parse_args(argv)


def run(options) -> int:
  console = arguments.console()
  if options.delete:
    console.print(f'deleted {delete(options.folder, options.delete)}')
    return 0
  found = find(options.folder)
  arguments.check_outputs({'json': options.json, 'files': [workdir / name for workdir in found
                                                           for name in ('config.json', 'run.json', metrics.FILE_NAME)]})
  if options.verify:
    return 1 if verify(found, console) else 0
  described = {workdir: describe(workdir, time.time()) for workdir in found}
  show(options.folder, described, console)
  if options.json:
    metrics.write_json(options.json, {str(workdir): one for workdir, one in described.items()})
  return 0


def main(argv: Sequence[str] | None = None) -> int:
  options = _arguments(argv)
  return arguments.run('runs', lambda: run(options))


if __name__ == '__main__':
  sys.exit(main())
