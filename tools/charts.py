"""Curves over training steps as inline SVG; tools/report.css gives them their looks, tools/report.js their hover."""

import html
import json
import math
from collections.abc import Sequence

Point = tuple[int, float]

COLOURS = 6   # as many as report.css has
MAX_COLUMNS = 60   # of a heat map
MAX_POINTS = 600
SMOOTH_FROM = 100   # points from which on a running mean is drawn


def chart(name: str, series: dict[str, list[Point]], colours: dict[str, int], wide: bool) -> str:
  """One scalar of every run that has it, as a figure with axes and values under the pointer."""
  finite = {run: [p for p in points if math.isfinite(p[1])] for run, points in series.items()}
  lost = sum(len(points) for points in series.values()) - sum(map(len, finite.values()))
  finite = {run: points for run, points in finite.items() if points}
  notes = [f'{lost} values are not finite and leave gaps.'] if lost else []
  if not finite:
    return f'<figure><h3>{html.escape(name)}</h3><figcaption>No value is finite ({lost} values).</figcaption></figure>'
  frame = Frame([p for points in finite.values() for p in points], *((960, 300) if wide else (470, 210)))
  smooth = any(len(points) >= SMOOTH_FROM for points in finite.values())
  if smooth:
    notes.append('Line: running mean; behind it: every value.')
  drawn = ''.join(draw_series(frame, series[run], colours[run], smooth) for run in finite)
  return '\n'.join([
      f'<figure><h3>{html.escape(name)}</h3>', f'<div class="chart" data-chart="{html.escape(hover(frame, finite))}">',
      f'<svg viewBox="0 0 {frame.width} {frame.height}" role="img" aria-label="{html.escape(name)} by step">',
      axes(frame), drawn, f'<line class="cursor" y1="{frame.top}" y2="{frame.bottom}" x1="0" x2="0"/></svg>',
      '<div class="tip"></div></div>', f'<figcaption>{" ".join(notes)}</figcaption></figure>'])


class Frame:
  """The plot area: from steps and values to places in the picture."""
  left, top = 56, 10

  def __init__(self, points: Sequence[Point], width: int, height: int):
    self.width, self.height, self.right, self.bottom = width, height, width - 12, height - 34
    steps, values = [p[0] for p in points], [p[1] for p in points]
    self.lo, self.hi = min(steps), max(steps)
    self.y_ticks = ticks(min(values), max(values), 5 if height > 250 else 4)
    x_ticks = ticks(self.lo, self.hi, 8 if width > 600 else 5)
    self.x_ticks = [t for t in x_ticks if self.lo <= t <= self.hi and t % 1 == 0]
    self.low, self.high = min(self.y_ticks[0], min(values)), max(self.y_ticks[-1], max(values))
    if self.low == self.high:   # one value, in the middle
      room = abs(self.low) / 2 or 0.5
      self.low, self.high = self.low - room, self.high + room

  def x(self, step: float) -> float:
    return self.left + (step - self.lo) / ((self.hi - self.lo) or 1) * (self.right - self.left)

  def y(self, value: float) -> float:
    # Shares of the two ends, not of their difference, which overflows for values near the largest float.
    part = (value / 2 - self.low / 2) / ((self.high / 2 - self.low / 2) or 1)
    return self.bottom - part * (self.bottom - self.top)


def ticks(low: float, high: float, count: int) -> list[float]:
  """About `count` round numbers that span low..high."""
  span = high - low
  if not (span > 1e-12 * max(abs(low), abs(high)) and math.isfinite(span)):
    return [low] if low == high else [low, high]
  rough = span / count
  power = 10.0 ** math.floor(math.log10(rough))
  step = next((m * power for m in (1, 2, 2.5, 5) if m * power >= rough * (1 - 1e-9)), 10 * power)
  first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
  return [float(f'{i * step:.12g}') for i in range(first, last + 1)]


def tick_label(value: float) -> str:
  if value and (abs(value) >= 1e6 or abs(value) < 1e-4):
    return f'{value:.1e}'.replace('e-0', 'e-').replace('e+0', 'e').replace('e+', 'e')
  return f'{value:,.6g}'


def axes(frame: Frame) -> str:
  lines = []
  for value in frame.y_ticks:
    y, label = frame.y(value), tick_label(value) if len(frame.y_ticks) > 1 else f'{value:,.4g}'
    lines.append(f'<line class="grid" x1="{frame.left}" x2="{frame.right}" y1="{y:.1f}" y2="{y:.1f}"/>'
                 f'<text x="{frame.left - 7}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
  for step in frame.x_ticks:
    lines.append(f'<text x="{frame.x(step):.1f}" y="{frame.bottom + 16}" text-anchor="middle">{tick_label(step)}</text>')
  middle = (frame.left + frame.right) / 2
  return '\n'.join(lines) + f'<text x="{middle}" y="{frame.height - 3}" text-anchor="middle">step</text>'


def draw_series(frame: Frame, points: Sequence[Point], colour: int, smooth: bool) -> str:
  """The curve of one run; values that are not finite interrupt it."""
  if smooth and len(points) >= SMOOTH_FROM:
    return (polyline(frame, thin(points), f'raw s{colour}')
            + polyline(frame, running_mean(points)[::max(1, len(points) // MAX_POINTS)], f'line s{colour}'))
  dots = ''
  if len(points) <= 30:
    dots = ''.join(f'<circle class="dot f{colour}" cx="{frame.x(s):.1f}" cy="{frame.y(v):.1f}" r="2.2"/>'
                   for s, v in points if math.isfinite(v))
  return polyline(frame, thin(points), f'line s{colour}') + dots


def polyline(frame: Frame, points: Sequence[Point], css: str) -> str:
  commands, pen = [], 'M'
  for step, value in points:
    if math.isfinite(value):
      commands.append(f'{pen}{frame.x(step):.1f} {frame.y(value):.1f}')
      pen = 'L'
    else:
      pen = 'M'
  return f'<path class="{css}" d="{"".join(commands)}"/>'


def thin(points: Sequence[Point]) -> Sequence[Point]:
  """About MAX_POINTS points that keep the peaks: of each stretch its lowest, its highest, and what is no number."""
  if len(points) <= MAX_POINTS:
    return points
  size = math.ceil(2 * len(points) / MAX_POINTS)
  kept = []
  for start in range(0, len(points), size):
    stretch = points[start:start + size]
    finite = [p for p in stretch if math.isfinite(p[1])]
    ends = [min(finite, key=lambda p: p[1]), max(finite, key=lambda p: p[1])] if finite else []
    gap = [p for p in stretch if not math.isfinite(p[1])][:1]
    kept += sorted(dict.fromkeys(ends + gap))
  return kept


def running_mean(points: Sequence[Point]) -> list[Point]:
  """Exponential mean over about a thirtieth of the points, corrected for its start; it skips what is not finite."""
  decay = 1 - 1 / max(2, len(points) / 30)
  total, weight, means = 0.0, 0.0, []
  for step, value in points:
    if math.isfinite(value):
      total, weight = decay * total + (1 - decay) * value, decay * weight + (1 - decay)
    means.append((step, total / weight if math.isfinite(value) else value))
  return means


def hover(frame: Frame, series: dict[str, Sequence[Point]]) -> str:
  """What report.js needs to show values: the geometry, and the points, as JSON."""
  lines = [{'name': run, 'points': [[s, float(f'{v:.5g}')] for s, v in thin(points)]} for run, points in series.items()]
  place = {name: getattr(frame, name) for name in ('left', 'right', 'width', 'lo', 'hi')}
  return json.dumps(place | {'series': lines}, separators=(',', ':'), allow_nan=False)


def heat_map(title: str, rows: dict[str, Sequence[Point]]) -> str:
  """One line of cells per name over the steps, the darker the larger; a cell is the mean of its steps. Behind each line its
  last value."""
  steps = sorted({step for points in rows.values() for step, _ in points})
  each = math.ceil(len(steps) / MAX_COLUMNS)
  columns = [steps[i:i + each] for i in range(0, len(steps), each)]
  table = {name: _column_means(points, columns) for name, points in rows.items()}
  known = [value for values in table.values() for value in values if value is not None]
  if not known:
    return f'<figure class="heat"><h3>{html.escape(title)}</h3><figcaption>No value is finite.</figcaption></figure>'
  low, high = min(known), max(known)
  left, right, height = 190, 870, 18
  width, drawn = (right - left) / len(columns), []
  for y, (name, values) in enumerate(table.items()):
    top = y * height
    drawn.append(f'<text x="{left - 8}" y="{top + 13}" text-anchor="end">{html.escape(name)}</text>')
    for x, value in enumerate(values):
      if value is not None:
        share = (value - low) / ((high - low) or 1)
        what = html.escape(f'{name}, {_span(columns[x])}: {value:.4g}')
        drawn.append(f'<g><title>{what}</title><rect class="f0" x="{left + x * width:.2f}" y="{top}" width="{width:.2f}" '
                     f'height="{height - 1}" opacity="{0.08 + 0.92 * share:.2f}"/></g>')
    last = [value for value in values if value is not None][-1:]
    drawn.append(f'<text x="{right + 8}" y="{top + 13}">{"".join(f"{value:.4g}" for value in last)}</text>')
  bottom = len(table) * height
  ends = ((left, 'start', steps[0]), (right, 'end', steps[-1]))
  drawn += [f'<text x="{x}" y="{bottom + 14}" text-anchor="{anchor}">step {step:,}</text>' for x, anchor, step in ends]
  return '\n'.join([
      f'<figure class="heat"><h3>{html.escape(title)}</h3>', '<div class="wide">',
      f'<svg viewBox="0 0 960 {bottom + 20}" role="img" aria-label="{html.escape(title)} by step">', *drawn, '</svg></div>',
      f'<figcaption>From {low:.3g} (pale) to {high:.3g} (dark); empty where nothing was measured. On the right: the last '
      'value.</figcaption></figure>'])


def _column_means(points: Sequence[Point], columns: Sequence[Sequence[int]]) -> list[float | None]:
  values = {step: value for step, value in points if math.isfinite(value)}
  found = [[values[step] for step in column if step in values] for column in columns]
  return [sum(own) / len(own) if own else None for own in found]


def _span(steps: Sequence[int]) -> str:
  return f'step {steps[0]:,}' if len(steps) == 1 else f'steps {steps[0]:,} to {steps[-1]:,}'
