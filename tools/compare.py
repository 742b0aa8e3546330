"""Two runs of tools.judge side by side, or the points of a sweep.

  python -m tools.compare runs/longbench/full runs/longbench/block
  python -m tools.compare runs/a/block runs/b/block --json difference.json
  python -m tools.compare --sweep runs/sweep --html sweep.html

A and B are folders with predictions.jsonl and summary.json of the same benchmark. Per task, over the items that both
answered: both means, the mean difference B - A with a bootstrap interval (items are drawn, each with both its scores, so
that what makes an item easy for both does not widen it), and how many items B answers better, alike and worse. Items that
only one of them answered are counted and said, and so are items that were not asked alike.

--sweep DIR: every folder in DIR that a trainer worked in is a point (see launch/sweep.py). A row per point: the keys in
which the points' configs differ, how far it is, the last value of its scalars, and the best of those measured on
held-out data. The points are ranked by what they measured on the same held-out documents; never by a training loss, which
other sinks, dropout, weights or data make another quantity.
--html FILE has the same table and every scalar's curves.

The exit code is 0; 2 if a folder holds no run, or the two have no item in common.
"""

import json
import math
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence

import rich.console
import rich.table

from blockattn import checkpoint, disk, metrics, options as options_lib
from blockattn.errors import UserError
from blockattn.evals import answers
from blockattn.loading import CHECKPOINTS
from tools import arguments, report

_RANKING = ('eval/block/kl', 'eval/block/ce', 'eval/full/ce', 'val_f1')   # the first that all points measured
_LISTED = 5   # ids that are said of each kind of mismatch
_HELD_OUT = ('data.eval_files', 'eval.rows', 'eval.answers', 'eval.max_new', 'segment.eval_files', 'segment.eval_rows')
_SHOWN_BEST = ('eval/block/kl', 'eval/block/ce', 'eval/full/ce', 'eval/closed/kl', 'eval/block/f1')   # likewise
_SWEEP_SCALARS = ('loss', 'kl', 'ce', 'teacher_ce', 'recall', 'tokens_per_s')   # of the table on the terminal


def compare(a: str | os.PathLike, b: str | os.PathLike, measure: str | None = None) -> dict:
  """What the runs in two folders have to do with each other.

  Args:
    a, b: folders of runs.
    measure: what is compared; None: of each task its first one.

  Returns:
    {'a', 'b': facts of the run, 'differs': {fact: [in a, in b]}, 'tasks': {task: {'n', 'measure', 'a', 'b', 'difference':
    {'mean', 'low', 'high'}, 'wins', 'ties', 'losses'}}, 'macro': the difference as a mean over tasks, 'only_a', 'only_b',
    'other_prompt': ids}; wins are items that b answers better. 'macro' is absent if there is one task, or tasks have
    different measures.

  Raises:
    FileNotFoundError, ValueError: a folder without a run, no common item, or a measure that a task lacks.
  """
  a, b = pathlib.Path(a), pathlib.Path(b)
  ours, theirs = _rows(a), _rows(b)
  common = [name for name in ours if name in theirs]
  facts = [disk.read_json(folder / answers.RUN, {'mode': str, 'model': str}) for folder in (a, b)]
  values = {key: [own.get(key) for own in facts] for key in sorted({*facts[0], *facts[1]})}
  differs = {key: [x, y] for key, (x, y) in values.items() if x != y}
  if not common:
    raise UserError(f'{a} and {b} have no item in common, first {next(iter(ours))!r} and {next(iter(theirs))!r}; compare '
                    f'runs of one benchmark ({differences(differs)})')
  pairs = {}
  for name in common:
    pairs.setdefault(ours[name]['task'], []).append((ours[name], theirs[name]))
  sampled, tasks = {}, {}
  for task, own in sorted(pairs.items()):
    tasks[task], sampled[task] = _task(task, own, measure)
  every = answers.Averages(macro={'macro': [[task] for task in sampled]})
  macro = [answers.interval(x) for x in answers.average_over(sampled, {}, every)['macro'].values()]
  return {'a': facts[0] | {'folder': str(a)}, 'b': facts[1] | {'folder': str(b)}, 'differs': differs, 'tasks': tasks,
          **({'macro': macro[0]} if len(tasks) > 1 and macro else {}),
          'only_a': sorted(set(ours) - set(theirs)), 'only_b': sorted(set(theirs) - set(ours)),
          'other_prompt': [name for name in common if ours[name]['key'] != theirs[name]['key']]}


def _rows(folder):
  rows = answers.read_predictions(folder)
  if not rows:
    raise FileNotFoundError(f'{folder}: no {answers.PREDICTIONS} with answers; give the folder of one mode of a run of '
                            'tools.judge')
  return {row['id']: row for row in rows}


def differences(differs: Mapping[str, Sequence]) -> str:
  return '; '.join(f'{key}: {x!r} in A, {y!r} in B' for key, (x, y) in differs.items()) or 'run alike'


def _task(task, pairs, measure):
  """(figures of a task, {measure: resampled mean differences})."""
  name = measure or next(iter(pairs[0][0]['scores']))
  for pair in pairs:
    for row in pair:
      if name not in row['scores']:
        raise UserError(f'{row["id"]}: no measure {name!r}; there are {", ".join(row["scores"])}')
  scores = [(one['scores'][name], other['scores'][name]) for one, other in pairs]
  differences = [y - x for x, y in scores]
  sampled = answers.sampled_means([{'scores': {name: d}} for d in differences], task)
  mean = lambda values: sum(values) / len(values)
  figures = {'n': len(pairs), 'measure': name, 'a': mean([x for x, _ in scores]), 'b': mean([y for _, y in scores]),
             'difference': answers.interval(sampled[name]), 'wins': sum(d > 0 for d in differences),
             'ties': sum(d == 0 for d in differences), 'losses': sum(d < 0 for d in differences)}
  return figures, sampled


def percent(value: Mapping[str, float], sign: str = '') -> str:
  """'mean [low, high]' in per cent; sign '+' writes plus signs too."""
  mean, low, high = (format(100 * value[key], f'{sign}.1f') for key in ('mean', 'low', 'high'))
  return f'{mean} [{low}, {high}]'


def print_comparison(result: Mapping, console: rich.console.Console) -> None:
  """A row per task, the mean over tasks, and what does not match."""
  table = arguments.table('task', 'measure', 'n', 'A', 'B', 'B − A', 'better', 'alike', 'worse', left=2)
  for task, own in result['tasks'].items():
    table.add_row(task, own['measure'].replace('_', ' '), f'{own["n"]:,}', f'{100 * own["a"]:.1f}', f'{100 * own["b"]:.1f}',
                  percent(own['difference'], '+'), f'{own["wins"]:,}', f'{own["ties"]:,}', f'{own["losses"]:,}')
  if 'macro' in result:
    table.add_section()
    table.add_row('macro', '', '', '', '', percent(result['macro'], '+'))
  for name in 'ab':
    console.print(f'{name.upper()}: {result[name]["folder"]} ({result[name]["mode"]}, model {result[name]["model"][:8]})')
  console.print(differences(result['differs']))
  console.print(table)
  for key, said in (('only_a', 'only A answered'), ('only_b', 'only B answered'),
                    ('other_prompt', 'another prompt in A than in B')):
    if result[key]:
      first = ', '.join(result[key][:_LISTED])
      console.print(f'{said}: {len(result[key]):,} items ({first}{", ..." if len(result[key]) > _LISTED else ""})')


# The points of a sweep.

def read_sweep(folder: str | os.PathLike) -> dict:
  """What the points in a folder changed and what came of it.

  Returns:
    {'keys': those in which configs differ, 'ranked_by': a held-out scalar, None where the points have none in common,
    'why': what is to be said of that, 'points': [{'name', 'changes': {key: value}, 'step', 'steps', 'state': 'finished',
    'unfinished' or 'not started', 'final': {scalar: last value}, 'best': {scalar: {'value', 'step'}}}]}, the best first, and
    without a rank by the changes. `step` is that of the last metrics.

  Raises:
    FileNotFoundError: no point there.
    ValueError: a broken file, which it names.
  """
  folder = pathlib.Path(folder)
  configs = {path.parent.name: options_lib.flat(disk.read_json(path, {'steps': int}))
             for path in sorted(folder.glob('*/config.json'))}
  if not configs:
    raise FileNotFoundError(f'{folder}: no point of a sweep in it, that is no folder with a config.json; give the '
                            '--workdir of launch.sweep')
  keys = options_lib.different([*configs.values()])
  points = [_point(folder / name, config, {key: config.get(key) for key in keys}) for name, config in configs.items()]
  points = sorted(points, key=lambda p: [_order(value) for value in p['changes'].values()])
  figure, why = _rank(points, keys, [config.get('eval.best') for config in configs.values()])
  if figure is not None:
    sign = 1 if _less_is_better(figure) else -1
    points = sorted(points, key=lambda p: sign * p['best'][figure]['value'] if figure in p['best'] else math.inf)
  return {'keys': keys, 'ranked_by': figure, 'why': why, 'points': points}


def _rank(points, keys, wanted):
  """(the held-out scalar that points are ranked by, or None; what to say of it)."""
  if other := [key for key in keys if key in _HELD_OUT]:
    return None, f'not ranked: the points measured other held-out documents ({", ".join(other)})'
  measured = [point['best'].keys() for point in points if point['best']]
  common = [name for name in _RANKING if measured and all(name in own for own in measured)]
  said = f'eval/{wanted[0]}'
  if len(set(wanted)) == 1 and measured and all(said in own for own in measured):
    common.insert(0, said)
  if not common:
    return None, ('not ranked: nothing was measured on held-out documents, and training losses are of other quantities '
                  'where sinks, dropout, weights or data differ; give config.data.eval_files')
  return common[0], f'ranked by the best {common[0]} on held-out documents'


def _order(value):
  """Numbers by size, in front of all else by its text."""
  return (0, value, '') if isinstance(value, (int, float)) else (1, 0, json.dumps(value))


def _point(folder, config, changes) -> dict:
  series = report.read_scalars(folder / metrics.FILE_NAME)
  last = max((points[-1][0] for points in series.values()), default=0)
  best = {}
  for name, values in series.items():
    finite = [(step, value) for step, value in values if math.isfinite(value)]
    if _is_validation(name) and finite:
      step, value = (min if _less_is_better(name) else max)(finite, key=lambda point: point[1])
      best[name] = {'value': value, 'step': step}
  # Finished is what has its last checkpoint: lines may be ahead of it.
  finished = checkpoint.is_finished(folder / CHECKPOINTS, config['steps'])
  state = 'finished' if finished else 'unfinished' if series else 'not started'
  return {'name': folder.name, 'changes': changes, 'step': last, 'steps': config['steps'],
          'state': state, 'final': {name: values[-1][1] for name, values in series.items()}, 'best': best}


def _is_validation(name):
  """Whole measures, 'val_f1' and 'eval/block/f1', not their parts, 'val_f1/code' and 'eval/block/kl_by_blocks/4', nor what
  they were measured at."""
  if name.startswith('eval/'):
    return name.count('/') == 2 and not name.startswith('eval/start')
  return name.startswith('val') and '/' not in name.removeprefix('val/') and not name.endswith('threshold')


def _less_is_better(name):
  closed = name.startswith('eval/closed/')   # a share, of whatever
  return not closed and any(part in name for part in ('loss', 'ce', 'kl', 'perplexity', 'pk'))


def sweep_columns(sweep: Mapping, every: bool = False) -> tuple[list[str], list[list[str]]]:
  """(head, a row per point) of the table; `every` scalar, or the losses and what was validated."""
  measured = dict.fromkeys(name for point in sweep['points'] for name in point['final'])
  is_plain = lambda name: not _is_validation(name) and name.count('/') < 3
  final = [name for name in measured if (every and is_plain(name)) or name in _SWEEP_SCALARS]
  best = [name for name in measured if _is_validation(name) and (every or '/' not in name or name in _SHOWN_BEST)]
  if sweep['ranked_by'] in best:
    best = [sweep['ranked_by'], *(name for name in best if name != sweep['ranked_by'])]
  rows = []
  for point in sweep['points']:
    done = point['state'] if point['state'] == 'finished' else f'{point["step"]:,} of {point["steps"]:,}'
    rows.append([*(_shown(point['changes'][key]) for key in sweep['keys']), done,
                 *(_shown(point['final'].get(name)) for name in final),
                 *(_shown_best(point['best'].get(name)) for name in best)])
  return [*sweep['keys'], 'done', *final, *(f'best {name} (step)' for name in best)], rows


def _shown_best(best) -> str:
  return '-' if best is None else f'{_shown(best["value"])} ({best["step"]:,})'


def _shown(value) -> str:
  if value is None:
    return '-'
  if isinstance(value, float):
    return f'{value:.5g}'
  return value if isinstance(value, str) else json.dumps(value)


def sweep_page(folder: str | os.PathLike, sweep: Mapping) -> str:
  """The table with every scalar, and the curves, as a page of its own."""
  folder = pathlib.Path(folder)
  head, rows = sweep_columns(sweep, every=True)
  head, rows = ['point', *head], [[point['name'], *row] for point, row in zip(sweep['points'], rows, strict=True)]
  return report.page(folder, points=(head, rows), curves=report.curves_part(folder))


def print_sweep(sweep: Mapping, console: rich.console.Console) -> None:
  head, rows = sweep_columns(sweep)
  table = arguments.table(*head, left=len(sweep['keys']))
  for column in table.columns:
    column.overflow = 'fold'
  for row in rows:
    table.add_row(*row)
  console.print(table)
  states = [point['state'] for point in sweep['points']]
  console.print(f'{len(states)} points, {states.count("finished")} finished; {sweep["why"]}')


def _arguments(argv: Sequence[str] | None):
  parser = arguments.Parser(prog='python -m tools.compare', description=__doc__)
  parser.add_argument('a', nargs='?', help='folder of a run')
  parser.add_argument('b', nargs='?', help='folder of the other')
  parser.add_argument('--measure', help='what is compared (default: of each task its first measure)')
  parser.add_argument('--sweep', metavar='DIR', help='the points of a sweep instead')
  parser.add_argument('--html', metavar='FILE', help='with --sweep: write a page with the table and curves here')
  parser.add_argument('--json', metavar='FILE', help='write the comparison here too')
  options = parser.parse_args(argv)
  if options.sweep:
    if options.a or options.measure:
      parser.error('--sweep DIR goes with --html and --json alone')
  elif options.b is None or options.html:
    parser.error('give two folders of runs; or --sweep DIR, and --html only with it')
  return options


def run(options) -> None:
  names = (('*/config.json', f'*/{metrics.FILE_NAME}') if options.sweep
           else (answers.RUN, answers.PREDICTIONS, answers.SUMMARY))
  arguments.check_outputs({'html': options.html, 'json': options.json, 'files': [
      os.path.join(folder, name) for folder in (options.a, options.b, options.sweep) if folder for name in names]})
  result = read_sweep(options.sweep) if options.sweep else compare(options.a, options.b, options.measure)
  if options.html:
    disk.write_text(options.html, sweep_page(options.sweep, result))
  if options.json:
    metrics.write_json(options.json, result)
  (print_sweep if options.sweep else print_comparison)(result, arguments.console())


def main(argv: Sequence[str] | None = None) -> int:
  options = _arguments(argv)
  return arguments.run('compare', lambda: run(options))


if __name__ == '__main__':
  sys.exit(main())
