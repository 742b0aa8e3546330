"""One self-contained page about a run: python -m tools.report WORKDIR writes WORKDIR/report.html.

Any run has one: of every trainer and of the storing of a teacher, while it goes on and after it was stopped. Every part
comes from a file of the workdir and is left out where the file is absent:

  run.json, config.json  how the run was started: the command, commit, versions and devices; the resolved config
  metrics.jsonl          how far it has come; curves of every scalar, also of the parts of a run in direct subfolders, drawn
                         together; scalars of one family (the KL by position, F1 by category) as a map over the steps
  summary.json           {model: {"exact_match", "f1", "substring" (0 to 1), "ce", "kl" (nats), "n"}, ...,
                         "intervals": {column: {"low", "high"}}, "closed": {column: {"mean", "low", "high"}}, the share of
                         what blocks cost, "seconds": {part: seconds}, any other facts}; others are compared with the model
                         `teacher_full`
  layout.json            {"lengths": [tokens per block], "mask": ["1..", "11.", ...]}: who attends to whom in one row
  segmented.jsonl        a line per text: {"id": str, "blocks": [str]}, as a segmenter cut it
  examples.jsonl         a line per example: {"blocks": [str], "prompt": str, "response": str, "answers": {model: str}}
  meta.json, bias.json   of blockattn.train.teach: whose logits were stored and how, and what the kept ones hold of the KL
"""

import json
import math
import os
import pathlib
import re
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

from blockattn import disk, metrics
from blockattn.errors import UserError
from tools import arguments, charts, pages

REFERENCE = 'teacher_full'
BEFORE = 'teacher_block'   # the teacher's weights under the block mask
MODEL_NAMES = {
    'teacher_full': 'Teacher, full attention',
    'teacher_block': "The teacher's weights, blocks",
    'teacher_overlap': "The teacher's weights, blocks that overlap",
    'student_full': 'Student, full attention',
    'student_block': 'Student, blocks',
    'block_finetuned': 'Blocks, fine-tuned',
}
# Known columns of the table, in order: title, and whether more is better (+1), less is (-1), or neither (0).
COLUMNS = {'exact_match': ('Exact match', 1), 'f1': ('F1', 1), 'substring': ('Contains answer', 1),
           'ce': ('CE, nats', -1), 'kl': ('KL to teacher, nats', -1), 'recomputed': ('Context computed again', 0),
           'n': ('Questions', 0)}
SHARES = ('exact_match', 'f1', 'substring', 'recomputed')
NO_CURVE = ('seconds_left',)   # shown while the run goes on, says nothing afterwards
FIRST = ('loss', 'train/loss')
SPEED = ('tokens_per_s', 'steps_per_s', 'mfu')
KL_BY_POSITION = 'KL to the teacher by the position in a row, nats'
MAX_CELLS = 128
MAX_EXAMPLES = 20
MAX_CHARS = 20000
_FAR = 1e11   # seconds; no clock shows a later time


def render(workdir: str | os.PathLike) -> pathlib.Path:
  """Writes `report.html` into the workdir, in one move, and returns its path.

  Raises:
    FileNotFoundError: there is no such folder, or it holds none of the files that a report is made of.
    ValueError: one of the files is broken; names it, and the line where there are lines.
  """
  workdir = pathlib.Path(workdir)
  if not workdir.is_dir():
    raise FileNotFoundError(f'no folder {workdir}; name the workdir of a run')
  parts = {name: part(workdir) for name, part in PARTS.items()}
  if not any(parts.values()):
    raise FileNotFoundError(f'{workdir} holds nothing to report: expected at least one of metrics.jsonl, summary.json, '
                            'layout.json, segmented.jsonl, examples.jsonl, bias.json, config.json, as runs leave them')
  path = workdir / 'report.html'
  disk.write_text(path, page(workdir, **parts))
  return path


def page(workdir: pathlib.Path, **parts) -> str:
  return pages.render('report.html', title=workdir.resolve().name, run=run_facts(workdir), styles=('report.css',),
                      script='report.js', **parts)


def model_name(key: str) -> str:
  return MODEL_NAMES.get(key, key.replace('_', ' '))


# Files.

def _read_json(path: pathlib.Path, form: Any = dict) -> dict[str, Any] | None:
  """The object in a JSON file, see `disk.check_form`; None if there is no such file."""
  if not path.exists():
    return None
  return disk.read_json(path, form)


def _plain(values: dict[str, Any]) -> dict[str, Any]:
  return {name: value for name, value in values.items() if isinstance(value, (str, int, float))}


# The head of the page.

def run_facts(workdir: pathlib.Path) -> dict[str, Any]:
  run = _read_json(workdir / 'run.json') or {}
  shown = progress(workdir)
  for name, value in run.items():
    if name == 'devices' and isinstance(value, list):
      shown[name] = f'{len(value)}: {value[0]}{", …" * (len(value) > 1)}' if value else 'none'
    elif name == 'attention' and isinstance(value, dict):
      shown[name] = f'{value.get("impl")} ({value.get("why")})'
    else:
      shown[name] = ' '.join(map(str, value)) if isinstance(value, list) else value
  if (workdir / 'profile').is_dir():
    shown['profile'] = f'traces of {len(list((workdir / "profile").rglob("*.xplane.pb")))} host(s) in profile/'
  return _plain(shown)


def progress(workdir: pathlib.Path) -> dict[str, str]:
  """How far the run has come, by what it has logged; nothing where this is no folder of a training."""
  path, config = workdir / metrics.FILE_NAME, _read_json(workdir / 'config.json') or {}
  lines = metrics.read_metrics(path) if path.exists() else []
  steps = config['steps'] if disk.is_number(config.get('steps')) else None
  if not lines:
    return {'state': f'no step of {steps:,} is logged'} if steps and (workdir / 'run.json').exists() else {}
  last = max(line['step'] for line in lines)
  of = '' if steps is None else f' of {steps:,}'
  state = 'finished' if steps is not None and last >= steps else 'not finished'
  shown = {'state': f'step {last:,}{of}' + (f', {state}' if of else '')}
  times = [line['time'] for line in lines if disk.is_number(line.get('time')) and 0 < line['time'] < _FAR]
  if times:
    form = '%Y-%m-%d %H:%M:%S'
    shown['logged'] = ' to '.join(dict.fromkeys(time.strftime(form, time.gmtime(t)) for t in (times[0], times[-1]))) + ' UTC'
  return shown


# The table of models, and where the time went.

def summary_part(workdir: pathlib.Path) -> dict[str, Any] | None:
  summary = _read_json(workdir / 'summary.json')
  if not summary:
    return None
  models = {k: v for k, v in summary.items() if isinstance(v, dict) and set(v) & set(COLUMNS)}
  seconds = summary['seconds'] if isinstance(summary.get('seconds'), dict) else {}
  closed = summary['closed'] if isinstance(summary.get('closed'), dict) else {}
  rest = {k: v for k, v in summary.items() if k not in models and k not in ('seconds', 'closed')}
  plain = {k: f'{v:g}' if disk.is_number(v) else v for k, v in rest.items() if disk.is_number(v) or isinstance(v, str)}
  nested = {k: v for k, v in rest.items() if k not in plain}
  return {'models': model_table(models) if models else None,
          'sentences': [sentence for sentence in (verdict(models), closed_shares(closed)) if sentence],
          'facts': {k.replace('_', ' '): v for k, v in plain.items()},
          'more': json.dumps(nested, indent=2) if nested else '', 'seconds': time_bars(seconds)}


def model_table(models: dict[str, dict[str, Any]]) -> dict[str, Any]:
  """{'head': names of the columns, 'rows': {'name', 'cells', 'reference'} each, 'notes': on small figures}."""
  known = [c for c in COLUMNS if any(c in m for m in models.values())]
  others = sorted({c for m in models.values() for c, v in m.items() if disk.is_number(v)} - set(COLUMNS))
  reference = models.get(REFERENCE)
  intervals = {key: m['intervals'] if isinstance(m.get('intervals'), dict) else {} for key, m in models.items()}
  difference_to = lambda m, c: None if m is reference else (reference or {}).get(c)
  rows = [{'name': model_name(key), 'reference': key == REFERENCE,
           'cells': [cell(c, m.get(c), difference_to(m, c), intervals[key].get(c)) for c in known + others]}
          for key, m in models.items()]
  notes = ['difference to the teacher with full attention'] * bool(reference and len(models) > 1)
  notes += ['in brackets, the interval from resampled documents'] * any(intervals.values())
  return {'head': [COLUMNS[c][0] for c in known] + [c.replace('_', ' ') for c in others], 'rows': rows, 'notes': notes}


def cell(column: str, value: Any, reference: Any, interval: Any = None) -> dict[str, str]:
  """A value of the table with its interval, its difference to the reference, and whether that is good or bad."""
  if not disk.is_number(value):
    return {'text': '–' if value is None else value}
  shown = {'text': figure(column, value)}
  if isinstance(interval, dict) and disk.is_number(interval.get('low')) and disk.is_number(interval.get('high')):
    shown['interval'] = f'[{figure(column, interval["low"])}, {figure(column, interval["high"])}]'
  if disk.is_number(reference) and column not in ('n', 'recomputed') and math.isfinite(value - reference):
    difference = value - reference
    better = difference * (COLUMNS[column][1] if column in COLUMNS else 0)
    shown |= {'difference': figure(column, difference, signed=True),
              'verdict': 'good' if better > 0 else 'bad' if better < 0 else ''}
  return shown


def figure(column: str, value: float, signed: bool = False) -> str:
  """A number as its column shows it: shares in percent (their differences in points), counts whole."""
  if not math.isfinite(value):
    return 'not finite'
  if column in SHARES:
    text = f'{abs(value) * 100:.1f}' + ('' if signed else ' %')
  elif column == 'n' or isinstance(value, int):
    text = f'{abs(value):,}'
  else:
    text = f'{abs(value):.3f}' if abs(value) < 1000 else f'{abs(value):,.0f}'
  sign = '−' if value < 0 else '+' if signed else ''
  return sign + text


def verdict(models: dict[str, dict[str, Any]]) -> str:
  """How much of the accuracy that blocks cost each training gives back, and how far to trust the figures."""
  scores = {k: m['exact_match'] for k, m in models.items() if disk.is_number(m.get('exact_match'))}
  if not {BEFORE, REFERENCE} <= set(scores):
    return ''
  gap = scores[REFERENCE] - scores[BEFORE]
  trained = {k: s for k, s in scores.items() if not k.startswith('teacher_')}   # or else a rival
  if not (gap > 0 and trained):
    return ''
  shares = ', '.join(f'{model_name(k)}: {(s - scores[BEFORE]) / gap:.0%}' for k, s in trained.items())
  sizes = [m['n'] for m in models.values() if disk.is_number(m.get('n')) and m['n'] > 0]
  trust = f' One standard error of a share is at most {50 / math.sqrt(min(sizes)):.1f} points.' if sizes else ''
  return f'Of the exact match lost to blocks ({gap * 100:.1f} points), training gives back: {shares}.{trust}'


def closed_shares(closed: dict[str, Any]) -> str:
  """How much of what blocks cost the student makes good, by measure."""
  shares = [f'{COLUMNS[c][0] if c in COLUMNS else c} {v["mean"]:.0%} [{v["low"]:.0%}, {v["high"]:.0%}]'
            for c, v in closed.items()
            if isinstance(v, dict) and all(disk.is_number(v.get(k)) for k in ('mean', 'low', 'high'))]
  return f'What the student in block mode makes good of what blocks cost: {"; ".join(shares)}.' if shares else ''


def time_bars(seconds: dict[str, Any]) -> list[tuple[str, str, float]]:
  """(part, time, its share of the longest in percent)."""
  spent = {part: value for part, value in seconds.items() if disk.is_number(value) and math.isfinite(value)}
  longest = max(spent.values(), default=0)
  return [(part.replace('_', ' '), _seconds(value), 100 * max(value, 0) / longest)
          for part, value in spent.items()] if longest > 0 else []


def _seconds(value: float) -> str:
  return f'{value:.1f}s' if value < 10 else metrics.short_time(value)


# Curves.

def curves_part(workdir: pathlib.Path) -> dict[str, Any] | None:
  curves = read_curves(workdir)
  if not curves:
    return None
  runs = sorted({run for series in curves.values() for run in series})
  colours = {run: i % len(charts.COLOURS) for i, run in enumerate(runs)}
  grouped = families(curves)
  single = sorted(set(curves) - {name for names in grouped.values() for name in names},
                  key=lambda name: (_curve_rank(name), name))
  maps = [(title + (f', {run}' if run else ''), charts.heat_map(rows))
          for title, names in grouped.items() for run in runs
          if (rows := {_row_name(name, names): curves[name][run] for name in names if run in curves[name]})]
  return {'colours': colours, 'maps': maps,
          'charts': [(name, charts.chart(curves[name], colours, wide=i == 0)) for i, name in enumerate(single)]}


def families(curves: Iterable[str]) -> dict[str, list[str]]:
  """Scalars of one kind that are many, by a title: the KL by position, and what has one name before a slash; of held-out
  figures, eval/..., those by distance from the block's start or by number of blocks."""
  found = {}
  for name in sorted(curves):
    head, slash, _ = name.rpartition('/') if name.count('/') == 3 else name.partition('/')
    if name.startswith('eval/') and name.count('/') < 3:
      continue
    if re.fullmatch(r'kl_pos_\d+', name):
      found.setdefault(KL_BY_POSITION, []).append(name)
    elif slash and name not in FIRST:
      found.setdefault(f'{head}, by part', []).append(name)
  # From the end of a row to its start, as one reads a plot upwards.
  order = {title: names[::-1] if title == KL_BY_POSITION else sorted(names, key=_from, reverse=True) if '_by_' in title
           else names for title, names in found.items()}
  return {title: names for title, names in order.items() if len(names) > 3 or title.startswith('eval/')}


def _from(name: str) -> int:
  """The lower edge of the tokens or blocks that a scalar is of."""
  return int(name.rpartition('/')[2])


def _row_name(name: str, family: Sequence[str]) -> str:
  if name.startswith('eval/'):
    return f'from {_from(name)}'
  if not name.startswith('kl_pos_'):
    return name.partition('/')[2].replace('/', ', ').replace('_', ' ')
  at, count = int(name.rpartition('_')[2]), 1 + max(int(other.rpartition('_')[2]) for other in family)
  share = lambda halvings: f'1/{2 ** halvings}' if halvings else 'end'   # see losses.position_bin
  return f'{share(count - at)} to {share(count - at - 1)}' if at else f'start to {share(count - 1)}'


def read_curves(workdir: pathlib.Path) -> dict[str, dict[str, list[charts.Point]]]:
  """Points by scalar and by run: the workdir itself is the run '', a subfolder with metrics has its own name."""
  files = {'': workdir / metrics.FILE_NAME}
  files |= {path.parent.name: path for path in sorted(workdir.glob(f'*/{metrics.FILE_NAME}'))}
  curves = {}
  for run, path in files.items():
    for name, points in read_scalars(path).items():
      curves.setdefault(name, {})[run] = points
  return curves


def read_scalars(path: pathlib.Path) -> dict[str, list[charts.Point]]:
  """Points by scalar of a metrics.jsonl; {} if there is none."""
  series = {}
  for entry in metrics.read_metrics(path) if path.exists() else ():
    for name, value in entry.items():
      if name not in metrics.RESERVED + NO_CURVE and disk.is_number(value):
        series.setdefault(name, []).append((entry['step'], float(value)))
  return series


def _curve_rank(name: str) -> int:
  """The loss first, then what is measured in nats or is right or wrong, then facts of the step; speed last."""
  if name in FIRST:
    return 0
  if name in SPEED:
    return 4
  if name.startswith('eval/'):
    return 1
  return 1 if name in ('kl', 'ce', 'teacher_ce', 'gap', 'recall') or name.startswith('val_') else 2 if 'loss' in name else 3


# The mask.

def mask_part(workdir: pathlib.Path) -> dict[str, Any] | None:
  path = workdir / 'layout.json'
  layout = _read_json(path, {'lengths': [int], 'mask': (str, list)})
  if layout is None:
    return None
  lengths, mask = layout['lengths'], _mask_rows(layout['mask'], path)
  if not all(n > 0 for n in lengths) or sum(lengths) > len(mask):
    raise UserError(f'{path}: lengths must be positive and sum to at most the {len(mask)} rows of the mask')
  factor = math.ceil(len(mask) / MAX_CELLS)
  return {'svg': charts.mask_map(lengths, mask, factor), 'lengths': lengths, 'tokens': len(mask), 'factor': factor,
          'colours': len(charts.COLOURS)}


def _mask_rows(mask: Any, path: pathlib.Path) -> list[str]:
  """Rows without spaces; the mask may be a list of rows or one text, as blocks.picture makes it."""
  lines = mask.splitlines() if isinstance(mask, str) else mask
  disk.check_form(lines, [str], f"{path}: 'mask'")
  rows = [''.join(line.split()) for line in lines]
  for i, row in enumerate(rows):
    if len(row) != len(rows) or set(row) - {'1', '.'}:
      raise UserError(f"{path}: mask row {i} must be {len(rows)} characters '1' or '.', as there are {len(rows)} rows")
  if not rows:
    raise UserError(f'{path}: the mask has no rows')
  return rows


# Examples.

def segmented_part(workdir: pathlib.Path) -> dict[str, Any] | None:
  article = lambda value: {'id': value['id'], 'count': len(value['blocks']), 'blocks': _clip(value['blocks'])}
  return _articles(workdir / 'segmented.jsonl', article, {'id': (str, int), 'blocks': [str]})


def examples_part(workdir: pathlib.Path) -> dict[str, Any] | None:
  return _articles(workdir / 'examples.jsonl', _example, {'blocks': [str], 'prompt': str, 'response': str,
                                                          'answers': {str: str}})


def _articles(path, article, form):
  """{'shown': `article(object)` of the first lines of a file, 'note': if it has more}; None without any."""
  if not path.exists():
    return None
  lines = [(i, line) for i, line in enumerate(disk.read_text(path).split('\n'), start=1) if line.strip()]
  shown = [article(disk.parse_json(line, f'{path}:{i}', form)) for i, line in lines[:MAX_EXAMPLES]]
  note = f'The first {MAX_EXAMPLES} of {len(lines)}.' if len(lines) > MAX_EXAMPLES else ''
  return {'shown': shown, 'note': note} if shown else None


def _example(value):
  answers = [(model_name(model), answer, _same(answer, value['response'])) for model, answer in value['answers'].items()]
  return value | {'blocks': _clip(value['blocks']), 'answers': answers}


def _same(answer: str, expected: str) -> bool:
  return str(answer).strip().casefold() == str(expected).strip().casefold()


def _clip(blocks: Sequence[str]) -> list[str]:
  """The blocks, cut off with a note after MAX_CHARS characters in all."""
  shown, left = [], MAX_CHARS
  for i, text in enumerate(blocks):
    if len(text) > left:
      shown.append(f'{text[:left]}\n… {sum(map(len, blocks[i:])) - left:,} more characters')
      break
    shown.append(text)
    left -= len(text)
  return shown


# Stored logits.

def bias_part(workdir: pathlib.Path) -> dict[str, Any] | None:
  path = workdir / 'bias.json'
  bias = _read_json(path, {'kl': disk.NUMBER, 'tokens': disk.NUMBER, 'top': {str: {'kl': disk.NUMBER, 'rest': disk.NUMBER}}})
  if not bias:
    return None
  rows = [(count, f'{top["kl"]:.4f}', f'{top["kl"] / max(bias["kl"], 1e-9):.1%}', f'{top["rest"]:.4f}')
          for count, top in sorted(bias['top'].items(), key=lambda item: (len(item[0]), item[0]))]   # numbers, by size
  meta = {k.replace('_', ' '): v for k, v in (_read_json(workdir / 'meta.json') or {}).items()}
  return bias | {'rows': rows, 'meta': _plain(meta)}


# The config.

def config_part(workdir: pathlib.Path) -> dict[str, str]:
  """The text of the config of the run and of its parts, by file."""
  files = [workdir / 'config.json', *sorted(workdir.glob('*/config.json'))]
  shown = [(path.relative_to(workdir), _read_json(path)) for path in files]
  return {str(name): json.dumps(config, indent=2) for name, config in shown
          if config and (name.parent == pathlib.Path() or (workdir / name.parent / metrics.FILE_NAME).exists())}


PARTS = {'summary': summary_part, 'curves': curves_part, 'mask': mask_part, 'segmented': segmented_part,
         'examples': examples_part, 'bias': bias_part, 'configs': config_part}   # of report.html


def main(argv: list[str] | None = None) -> int:
  parser = arguments.Parser(prog='python -m tools.report', description=__doc__)
  parser.add_argument('workdir', help='folder of a run')
  options = parser.parse_args(argv)
  return arguments.run('report', lambda: print(render(options.workdir)))


if __name__ == '__main__':
  sys.exit(main())
