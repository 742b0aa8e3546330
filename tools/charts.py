"""Pictures as SVG, drawn by matplotlib in one style: as files, or inline in a page.

On a page report.js shows the values under the pointer, and colours are those of report.css: what is drawn in one of COLOURS
takes the page's variable for it, in the light and the dark.
"""

import io
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import cycler
import numpy as np

from blockattn import disk

Point = tuple[int, float]

COLOURS = ('#2b66b1', '#c2651d', '#2f8a5b', '#8456ad', '#a3365f', '#6f7410')   # the light ones of report.css: --s0, ...
_SOFT, _RULE = '#5d646d', '#dcdfe3'
_VARIABLES = {colour: f'--s{i}' for i, colour in enumerate(COLOURS)} | {_SOFT: '--soft', _RULE: '--rule'}
STYLE = {
    'svg.fonttype': 'none', 'svg.hashsalt': 'blockattn', 'font.family': 'DejaVu Sans', 'font.size': 11,
    'axes.grid': True, 'axes.grid.axis': 'y', 'grid.color': _RULE, 'figure.facecolor': 'none', 'axes.facecolor': 'none',
    **{f'axes.spines.{side}': False for side in ('left', 'right', 'top', 'bottom')},
    **dict.fromkeys(('xtick.color', 'ytick.color', 'axes.labelcolor', 'text.color'), _SOFT),
    'xtick.major.size': 0, 'ytick.major.size': 0, 'lines.linewidth': 1.6,
    'axes.prop_cycle': cycler.cycler(linestyle=('-', '--')) * cycler.cycler(color=COLOURS),
}
AGAIN = 'context computed again for every prompt'   # an axis
MAX_COLUMNS = 60   # of a heat map
MAX_POINTS = 600   # that the pointer can find on a curve
SMOOTH_FROM = 100   # points from which on a running mean is drawn
_LARGEST = 1e300   # beyond it the span of an axis overflows


def draw(width: int, height: int, paint, **margins) -> str:
  """The SVG, for a page, of a figure of this size in pixels that `paint(axes)` has drawn in; margins in pixels."""
  def on_axes(figure):
    paint(figure.add_axes((margins['left'] / width, margins['bottom'] / height,
                           1 - (margins['left'] + margins['right']) / width,
                           1 - (margins['bottom'] + margins['top']) / height)))

  svg = _svg(width, height, on_axes)
  for colour, variable in _VARIABLES.items():
    svg = svg.replace(colour, f'var({variable})')
  return svg[svg.index('<svg'):]


def _svg(width, height, paint, **how) -> str:
  import matplotlib.figure  # only those who draw need it
  with matplotlib.rc_context(STYLE):
    figure = matplotlib.figure.Figure((width / 72, height / 72), **how)   # SVG's unit is the point
    paint(figure)
    out = io.StringIO()
    figure.savefig(out, format='svg', metadata=dict.fromkeys(('Creator', 'Date', 'Format', 'Type')))
  return out.getvalue()


# Files.

def write(path: pathlib.Path, svg: str) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  disk.write_text(path, svg)


def logarithmic(series: Mapping[str, Sequence[tuple[float, float]]], title: str, x: str, y: str) -> str:
  """Lines by name over axes that are both logarithmic."""
  def paint(figure):
    axes = figure.subplots()
    for name, points in series.items():
      if points:
        axes.loglog(*zip(*points), marker='o', markersize=4, label=name)
    ticks = sorted({at for points in series.values() for at, _ in points})
    axes.set_xticks(ticks, [f'{tick:,}' for tick in ticks], minor=False)
    axes.set_xticks([], minor=True)
    axes.set(title=title, xlabel=x, ylabel=y)
    figure.legend(loc='outside right center')

  return _svg(640, 400, paint, layout='constrained', facecolor='white')


def tradeoff(points: Mapping[str, tuple[float, float]], x: str, y: str) -> str:
  """Named points, {name: (a share, what is left at it)}; those of a family, NAME_NUMBER or NAME:NUMBER, have one colour."""
  def paint(figure):
    axes, families = figure.subplots(), {}
    for name, point in points.items():
      families.setdefault(name.rstrip('0123456789.').rstrip('_:'), []).append(point)
    for name, own in families.items():
      axes.plot(*zip(*sorted(own)), marker='o', markersize=5, label=name)
    axes.set(xlabel=x, ylabel=y, ylim=(0, None))
    axes.xaxis.set_major_formatter('{x:.0%}')
    figure.legend(loc='outside right center')

  return _svg(640, 400, paint, layout='constrained', facecolor='white')


def value_maps(panels: Mapping[str, Mapping[str, Mapping[str, float]]], bold: str = '') -> str:
  """Tables of values from 0 to 1, {title: {row: {column: value}}}, the darker the larger; the row `bold` stands out."""
  def paint(figure):
    from matplotlib import colors
    shades = colors.LinearSegmentedColormap.from_list('', ('white', COLOURS[0]))
    for axes, (title, rows) in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels.items()):
      values = np.array([list(row.values()) for row in rows.values()])
      axes.imshow(values, shades, aspect='auto', vmin=0, vmax=1)
      axes.grid(visible=False)
      axes.set_title(title, loc='left')
      columns = list(next(iter(rows.values())))
      axes.set_xticks(range(len(columns)), columns, rotation=35, ha='left')
      axes.xaxis.tick_top()
      axes.set_yticks(range(len(rows)), rows)
      for (line, column), value in np.ndenumerate(values):
        axes.text(column, line, f'{value:.2f}', ha='center', va='center', color='white' if value > 0.55 else 'black',
                  weight='bold' if list(rows)[line] == bold else 'normal')

  lines = sum(len(rows) + 5 for rows in panels.values())
  columns = max(len(row) for rows in panels.values() for row in rows.values())
  return _svg(max(660, 230 + 58 * columns), 24 * lines, paint, layout='constrained', facecolor='white')


# Curves.

def chart(series: dict[str, list[Point]], colours: dict[str, int], wide: bool) -> dict[str, Any]:
  """One scalar of every run that has it: {'svg', 'hover' (JSON for report.js), 'note'}; the first two absent if nothing is
  finite."""
  finite = {run: [p for p in points if math.isfinite(p[1])] for run, points in series.items()}
  lost = sum(len(points) for points in series.values()) - sum(map(len, finite.values()))
  finite = {run: points for run, points in finite.items() if points}
  if not finite:
    return {'note': f'No value is finite ({lost} values).'}
  steps = [step for points in finite.values() for step, _ in points]
  first, last, smooth = min(steps), max(steps), any(len(points) >= SMOOTH_FROM for points in finite.values())
  width, height = (960, 300) if wide else (470, 210)
  left, right = 64, width - 12

  def paint(axes):
    from matplotlib import ticker
    for run in finite:
      _curve(axes, series[run], COLOURS[colours[run]])
    axes.set_xlim(first, last if last > first else first + 1)
    axes.set_xlabel('step')
    axes.xaxis.set_major_locator(ticker.MaxNLocator(8 if wide else 5, integer=True))
    axes.yaxis.set_major_locator(ticker.MaxNLocator(5 if wide else 4))
    for axis in (axes.xaxis, axes.yaxis):
      axis.set_major_formatter(ticker.StrMethodFormatter('{x:,.6g}'))

  notes = [f'{lost} values are not finite and leave gaps.'] * bool(lost)
  notes += ['Line: running mean; behind it: every value.'] * smooth
  lines = {run: [(s, v, f'step {s:,}') for s, v in points[::math.ceil(len(points) / MAX_POINTS)]]
           for run, points in finite.items()}
  return {'svg': draw(width, height, paint, left=left, right=12, top=10, bottom=38), 'note': ' '.join(notes),
          'hover': hover(lines, left, right, width, first, last)}


def _curve(axes, points, colour):
  """The curve of one run; values that are not finite interrupt it."""
  steps, values = np.array(points, np.float64).T
  values = np.where(np.isfinite(values), np.clip(values, -_LARGEST, _LARGEST), np.nan)
  if len(points) >= SMOOTH_FROM:
    axes.plot(steps, values, color=colour, linewidth=1, alpha=0.3)
    values = running_mean(values)
  axes.plot(steps, values, color=colour, marker='o' if len(points) <= 30 else None, markersize=4)


def running_mean(values: np.ndarray) -> np.ndarray:
  """Exponential mean over about a thirtieth of the points, corrected for its start; it skips what is no number."""
  decay = 1 - 1 / max(2, len(values) / 30)
  total, weight, means = 0.0, 0.0, []
  for value in values:
    if not math.isnan(value):
      total, weight = decay * total + (1 - decay) * value, decay * weight + (1 - decay)
    means.append(total / weight if not math.isnan(value) else math.nan)
  return np.array(means)


def hover(series: dict[str, Sequence[tuple[float, float, str]]], left: int, right: int, width: int, first: float,
          last: float) -> str:
  """What report.js needs to show values: where `first` and `last` are drawn, and (place, value, its name) of the points."""
  shown = lambda points: [[x, float(f'{value:.5g}'), name] for x, value, name in points]
  lines = [{'name': run, 'points': shown(points)} for run, points in series.items()]
  place = {'left': left, 'right': right, 'width': width, 'lo': first, 'hi': last}
  return json.dumps(place | {'series': lines}, separators=(',', ':'), allow_nan=False)


# Maps.

def _cells(axes, colours: np.ndarray):
  """Cells [rows, columns] of red, green, blue and opacity, each 0 to 1."""
  axes.imshow(colours, aspect='auto', interpolation='none')
  axes.grid(visible=False)


def heat_map(rows: dict[str, Sequence[Point]]) -> dict[str, Any]:
  """One line of cells per name over the steps, the darker the larger; a cell is the mean of its steps. Behind each line its
  last value. The result is as `chart`'s."""
  steps = sorted({step for points in rows.values() for step, _ in points})
  each = math.ceil(len(steps) / MAX_COLUMNS)
  columns = [steps[i:i + each] for i in range(0, len(steps), each)]
  table = np.array([_column_means(points, columns) for points in rows.values()])
  known = np.isfinite(table)
  if not known.any():
    return {'note': 'No value is finite.'}
  low, high = table[known].min(), table[known].max()
  left, right, width, height = 190, 870, 960, 18 * len(rows) + 20

  def paint(axes):
    from matplotlib import colors
    shades = np.zeros((*table.shape, 4))
    shades[..., :3] = colors.to_rgb(COLOURS[0])
    shades[..., 3] = np.where(known, 0.08 + 0.92 * (table - low) / ((high - low) or 1), 0)
    _cells(axes, shades)
    axes.set_yticks(range(len(rows)), rows)
    ends = sorted({0, len(columns) - 1})
    axes.set_xticks(ends, [f'step {steps[-1 if end else 0]:,}' for end in ends])
    for y, values in enumerate(table):
      last = values[np.isfinite(values)][-1:]
      axes.text(1.01, y, ''.join(f'{value:.4g}' for value in last), transform=axes.get_yaxis_transform(), va='center')

  names = [f'step {c[0]:,}' if len(c) == 1 else f'steps {c[0]:,} to {c[-1]:,}' for c in columns]
  lines = {name: [(i + 0.5, float(v), names[i]) for i, v in enumerate(values) if math.isfinite(v)]
           for name, values in zip(rows, table, strict=True)}
  note = f'From {low:.3g} (pale) to {high:.3g} (dark); empty where nothing was measured. On the right: the last value.'
  return {'svg': draw(width, height, paint, left=left, right=width - right, top=0, bottom=20), 'note': note,
          'hover': hover({name: points for name, points in lines.items() if points}, left, right, width, 0, len(columns))}


def _column_means(points: Sequence[Point], columns: Sequence[Sequence[int]]) -> list[float]:
  values = {step: value for step, value in points if math.isfinite(value)}
  found = [[values[step] for step in column if step in values] for column in columns]
  return [sum(some) / len(some) if some else math.nan for some in found]


def mask_map(lengths: Sequence[int], mask: Sequence[str], factor: int) -> str:
  """Square cells, `factor` tokens wide, in the colour of the key's block; paler where only some of them are read."""
  cells = mask_cells(lengths, mask, factor)

  def paint(axes):
    from matplotlib import colors
    palette = np.array([*map(colors.to_rgb, COLOURS), colors.to_rgb(_SOFT)])
    axes.set_axis_off()
    _cells(axes, np.concatenate([palette[cells[..., 0].astype(int)], cells[..., 1:]], axis=-1))
    if len(lengths) <= 40:   # hairlines between blocks, unless there are too many to see anything else
      for edge in np.cumsum(lengths)[:-1] / factor - 0.5:
        axes.axhline(edge, color=_SOFT, linewidth=0.5)
        axes.axvline(edge, color=_SOFT, linewidth=0.5)

  return draw(480, 480, paint, left=0, right=0, top=0, bottom=0)


def mask_cells(lengths: Sequence[int], mask: Sequence[str], factor: int) -> np.ndarray:
  """[n, n, 2]: the cell's colour, an index into COLOURS or their number for grey, and its opacity, 0 in padding."""
  allowed = np.array([[character == '1' for character in row] for row in mask], float)
  tokens, size = len(mask), math.ceil(len(mask) / factor)
  starts = np.arange(0, tokens, factor)
  count = np.minimum(factor, tokens - starts)
  share = np.add.reduceat(np.add.reduceat(allowed, starts, 0), starts, 1) / np.outer(count, count)
  block = np.repeat(np.arange(len(lengths)), lengths)
  block = np.pad(block, (0, tokens - len(block)), constant_values=-1)[starts]   # padding belongs to none
  grey = (share == 0) | (block < 0)
  colour = np.where(grey, len(COLOURS), np.broadcast_to(block % len(COLOURS), (size, size)))
  there = (block >= 0)[:, None] & (block >= 0)
  return np.stack([colour, np.where(grey, 0.12 * there, share)], axis=-1)
