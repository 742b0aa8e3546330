"""Numbers of a run: written to files, timed, shown on a line.

`metrics.jsonl` holds one JSON object per line: `step`, `time` (seconds since the epoch) and the scalars by name.
JSON has no NaN and no infinity, so these are written as null; `read_metrics` gives NaN for it.
"""

import collections
import contextlib
import functools
import json
import math
import os
import pathlib
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TextIO

import rich.console
import rich.progress

from blockattn import disk, errors
from blockattn.errors import UserError

FILE_NAME = 'metrics.jsonl'
RESERVED = ('step', 'time')


class MetricWriter:
  """Writes scalars to `metrics.jsonl`, TensorBoard event files and, when asked, Weights & Biases.

  Only process 0 writes; on every other process all methods do nothing. The values are Python floats: the caller
  fetches them from the device, at best one step late so that the next step is already running, and calls `write` with
  the step that they belong to.

  Args:
    workdir: folder of the run; made if absent. Event files go to `workdir/tensorboard`.
    process_index: `jax.process_index()` of the caller.
    tensorboard: whether to write event files.
    resume_step: the step that the run continues from, 0 for a fresh start. Lines of later steps, left by a run that
      went on after its last checkpoint, are dropped, so that no step stands twice. None appends and drops nothing.
    wandb_project: name of a Weights & Biases project; needs the `log` extra. None writes nothing there.
  """

  def __init__(self, workdir: str | os.PathLike, process_index: int = 0, tensorboard: bool = True, *,
               resume_step: int | None = None, wandb_project: str | None = None):
    self._sinks, self._open = [], contextlib.ExitStack()
    if process_index != 0:
      return
    workdir = pathlib.Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / FILE_NAME
    truncate(path, resume_step)
    if tensorboard:
      self._sinks.append(self._open.enter_context(_event_files(workdir / 'tensorboard', resume_step)))
    if wandb_project is not None:
      self._sinks.append(self._open.enter_context(_wandb_run(wandb_project, workdir)))
    self._sinks.insert(0, self._open.enter_context(_lines(path)))

  def write(self, step: int, scalars: Mapping[str, float]):
    """Writes the scalars of one step; they are on disk when it returns.

    Raises:
      ValueError: a scalar is called 'step' or 'time'.
      TypeError: a value is not a number.
    """
    values = _as_floats(scalars) if self._sinks else {}
    now = time.time()
    for sink in self._sinks:
      sink(int(step), now, values)

  def close(self):
    """Flushes and closes; further writes are ignored."""
    self._sinks = []
    self._open.close()

  def __enter__(self) -> 'MetricWriter':
    return self

  def __exit__(self, *exc):
    self.close()


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
  """The lines of a `metrics.jsonl`, oldest first, numbers that are not finite as NaN.

  A last line without its newline, left by a killed process, is skipped.

  Raises:
    ValueError: a line is no JSON object of numbers with a step; names the file and the line.
  """
  lines = disk.read_text(path).split('\n')[:-1]
  return [_parse(line, f'{path}:{number}') for number, line in enumerate(lines, start=1) if line.strip()]


def measured_speed(workdir: pathlib.Path) -> float:
  """Steps a second of a run, as it last measured them.

  Raises:
    ValueError: it never did, which takes two steps after a start.
  """
  speeds = [line['steps_per_s'] for line in read_metrics(workdir / FILE_NAME) if 'steps_per_s' in line]
  if not speeds:
    raise UserError(f'{workdir / FILE_NAME}: no steps_per_s, which is measured from the second step after a start on: give '
                    'the run more steps')
  return speeds[-1]


def write_json(path: pathlib.Path, value: Any):
  """Writes JSON in one move: a reader never sees half of it. Numbers that are not finite are null there."""
  disk.write_text(path, json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False) + '\n')


def _finite(value):
  if isinstance(value, Mapping):
    return {key: _finite(inner) for key, inner in value.items()}
  if isinstance(value, (list, tuple)):
    return [_finite(inner) for inner in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value


def truncate(path: str | os.PathLike, last_step: int | None):
  """Drops the lines of steps after `last_step` (None: none) and a half-written last line, atomically.

  The file is replaced in one move, so a process killed here leaves the old file or the new one. No file is no error.
  """
  path = pathlib.Path(path)
  if not path.exists():
    return
  text = disk.read_text(path)
  whole = text.split('\n')[:-1]
  kept = [line for number, line in enumerate(whole, start=1) if line.strip() and
          (last_step is None or _parse(line, f'{path}:{number}')['step'] <= last_step)]
  new = ''.join(line + '\n' for line in kept)
  if new != text:
    disk.write_text(path, new)


def _parse(line: str, place: str) -> dict[str, Any]:
  try:
    entry = disk.parse_json(line, place, {'step': int})
    # Runs of before wrote texts where there is null now.
    entry = {name: math.nan if value in (None, 'NaN', 'Infinity', '-Infinity') else value for name, value in entry.items()}
    disk.check_form(entry, {str: disk.NUMBER}, place)
  except ValueError as error:
    raise UserError(f'{error}; repair or delete the line') from error
  return entry


def _as_floats(scalars: Mapping[str, float]) -> dict[str, float]:
  values = {}
  for name, value in scalars.items():
    if name in RESERVED:
      raise UserError(f'a metric must not be called {name!r}: the line has a field of that name')
    try:
      values[name] = float(value)
    except (TypeError, ValueError) as e:
      raise TypeError(f'metric {name!r} is {value!r}; pass a Python float, one number per name') from e
  return values


# Where scalars go: each gives what is called with a step, its time and its scalars.


@contextlib.contextmanager
def _lines(path: pathlib.Path):
  with path.open('a', encoding='utf-8', buffering=1) as file:
    yield lambda step, now, values: file.write(
        json.dumps(_finite({'step': step, 'time': round(now, 3)} | values), allow_nan=False) + '\n')


@contextlib.contextmanager
def _event_files(folder: pathlib.Path, resume_step: int | None):
  # Imported here: who only reads metrics.jsonl needs neither tensorboardX nor protobuf.
  import tensorboardX

  def write(step, now, values):
    for name, value in values.items():
      if math.isfinite(value):   # it would warn of every other one
        board.add_scalar(name, value, step, walltime=now)

  purge = None if resume_step is None else resume_step + 1   # the viewer drops events from this step on
  with tensorboardX.SummaryWriter(str(folder), purge_step=purge) as board:
    yield write


@contextlib.contextmanager
def _wandb_run(project: str, workdir: pathlib.Path):
  """The W&B run of this workdir, with its config; its id is kept in a file so that a resumed run goes on in the same one."""
  wandb = errors.library('wandb', f'wandb_project={project!r}', 'log')
  id_file = workdir / 'wandb_id.txt'
  if not id_file.exists():
    id_file.write_text(uuid.uuid4().hex[:12] + '\n')
  config = workdir / 'config.json'
  run = wandb.init(project=project, name=workdir.resolve().name, dir=str(workdir), id=id_file.read_text().strip(),
                   resume='allow', config=disk.read_json(config) if config.exists() else None)
  run.define_metric('*', step_metric='step')   # W&B's own step may not go back, ours does on a resume
  if run.offline:
    _log_again(run, workdir / FILE_NAME)
  yield lambda step, now, values: run.log(values | {'step': step})
  run.finish()


def _log_again(run, path: pathlib.Path):
  """Gives a run that is kept on disk, to be sent later, all lines of `metrics.jsonl`, in place of the folders of earlier
  starts: these hold steps that were dropped since. What has been sent stays."""
  own = pathlib.Path(run.dir).parent
  earlier = [folder for folder in own.parent.glob(f'offline-run-*-{run.id}') if folder != own]
  if not path.exists() or any(next(folder.glob('*.synced'), None) for folder in earlier):
    return
  for entry in read_metrics(path):
    run.log({name: value for name, value in entry.items() if name != 'time'})
  for folder in earlier:
    shutil.rmtree(folder, ignore_errors=True)


class StepClock:
  """Speed over the last steps, and the time left.

  The first step, which compiles, starts the clock and is not counted.

  Args:
    total_steps: the step at which the run ends.
    window: number of steps that the speed is averaged over.
    peak_flops: FLOP/s of all devices together, for the MFU (see models/flops.py); 0: not known.
    now: source of seconds.
  """

  def __init__(self, total_steps: int, window: int = 50, peak_flops: float = 0.0,
               now: Callable[[], float] = time.perf_counter):
    self._total, self._peak, self._now = total_steps, peak_flops, now
    self._ticks = collections.deque(maxlen=window + 1)   # (step, seconds, tokens so far, operations so far)
    self._paused = 0.0

  def tick(self, step: int, tokens: int, flops: float = 0.0):
    """Says that `step` is done, that it processed `tokens` tokens, and that these need so many operations: over all
    hosts."""
    _, _, tokens_before, flops_before = self._ticks[-1] if self._ticks else (0, 0, 0, 0.0)
    self._ticks.append((step, self._now() - self._paused, tokens_before + tokens, flops_before + flops))

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """What runs inside (an evaluation, a checkpoint) does not count as training time."""
    start = self._now()
    try:
      yield
    finally:
      self._paused += self._now() - start

  def rates(self) -> dict[str, float]:
    """`steps_per_s`, `tokens_per_s`, `seconds_left`, and `mfu` (0 to 1) where operations and the peak are known; empty
    until two steps are done."""
    if len(self._ticks) < 2:
      return {}
    (step0, time0, tokens0, flops0), (step, now, tokens, flops) = self._ticks[0], self._ticks[-1]
    seconds = max(now - time0, 1e-9)
    speed = (step - step0) / seconds
    left = max(self._total - step, 0) / speed if speed > 0 else math.inf
    rates = {'steps_per_s': speed, 'tokens_per_s': (tokens - tokens0) / seconds, 'seconds_left': left}
    return rates | ({'mfu': (flops - flops0) / seconds / self._peak} if self._peak and flops > flops0 else {})


class ProgressLine:
  """A progress bar on a terminal; elsewhere (a log file, a pipe) a plain line every `every_s` seconds.

  Args:
    total_steps: the step at which the run ends.
    label: what stands in front of the bar.
    every_s: least seconds between two plain lines; the first and the last step are always shown.
    stream: where to write; standard output by default.
    enabled: False shows nothing, for every process but the first.
    now: source of seconds.
  """

  def __init__(self, total_steps: int, label: str = 'train', *, every_s: float = 10.0, stream: TextIO | None = None,
               enabled: bool = True, now: Callable[[], float] = time.monotonic):
    self._total, self._label, self._every, self._now = total_steps, label, every_s, now
    self._stream = sys.stdout if stream is None else stream
    self._enabled, self._last_line, self._bar = enabled, -math.inf, None
    if enabled and self._stream.isatty():
      self._bar = _bar(self._stream)
      self._task = self._bar.add_task(label, total=total_steps, facts='')
      self._bar.start()

  def update(self, step: int, scalars: Mapping[str, float]):
    """Shows the step with the `loss`, `tokens_per_s`, `mfu` and `seconds_left` found in `scalars`, other names are
    ignored."""
    if not self._enabled:
      return
    if self._bar is not None:
      self._bar.update(self._task, completed=step, facts=_facts(scalars))
    elif step >= self._total or self._now() - self._last_line >= self._every:
      self._last_line = self._now()
      print(f'{self._label} {step}/{self._total}  {_facts(scalars)}'.rstrip(), file=self._stream, flush=True)

  def say(self, text: str):
    """Prints a line, above the bar where there is one."""
    if not self._enabled:
      return
    if self._bar is not None:
      self._bar.console.print(text, markup=False, highlight=False)
    else:
      print(text, file=self._stream, flush=True)

  def close(self):
    """Leaves the bar as it stands and gives the terminal back."""
    if self._bar is not None:
      self._bar.stop()
    self._bar, self._enabled = None, False

  def __enter__(self) -> 'ProgressLine':
    return self

  def __exit__(self, *exc):
    self.close()


@contextlib.contextmanager
def counting(label: str, *, stream: TextIO | None = None, enabled: bool = True) -> Iterator[Callable[[int, int], None]]:
  """`show(done, of)`: a `ProgressLine` with the time left, of work whose size is known when it begins."""
  with contextlib.ExitStack() as stack:
    @functools.cache
    def begun(of):
      return stack.enter_context(ProgressLine(of, label, stream=stream, enabled=enabled)), StepClock(of)

    def show(done, of):
      line, clock = begun(of)
      clock.tick(done, 0)
      line.update(done, {name: value for name, value in clock.rates().items() if name == 'seconds_left'})

    yield show


def _bar(stream: TextIO) -> rich.progress.Progress:
  columns = (rich.progress.TextColumn('{task.description}'), rich.progress.BarColumn(),
             rich.progress.MofNCompleteColumn(), rich.progress.TextColumn('{task.fields[facts]}', markup=False))
  return rich.progress.Progress(*columns, console=rich.console.Console(file=stream))


def _facts(scalars: Mapping[str, float]) -> str:
  forms = {'loss': '{:.4f}'.format, 'tokens_per_s': short_count, 'mfu': '{:.1%}'.format, 'seconds_left': short_time}
  words = {'loss': 'loss {}', 'tokens_per_s': '{} tokens/s', 'mfu': '{} MFU', 'seconds_left': '{} left'}
  return '  '.join(words[name].format(form(scalars[name])) for name, form in forms.items() if name in scalars)


def short_count(value: float) -> str:
  """A count for the eye: 950, 31.2k, 4.05M, 1.20B."""
  for bound, divisor, form in ((1e3, 1, '{:.0f}'), (1e5, 1e3, '{:.1f}k'), (1e6, 1e3, '{:.0f}k'), (1e9, 1e6, '{:.2f}M')):
    if value < bound * (1 - 5e-4):   # 999.6 rounds to 1.0k, not to 1000
      return form.format(value / divisor)
  return f'{value / 1e9:.2f}B'


def short_time(seconds: float) -> str:
  """A time span for the eye: 8s, 1m32s, 3h05m, 2d04h; `?` when it is not known."""
  if not math.isfinite(seconds):
    return '?'
  s = round(seconds)
  if s < 60:
    return f'{s}s'
  if s < 3600:
    return f'{s // 60}m{s % 60:02d}s'
  if s < 86400:
    return f'{s // 3600}h{s % 3600 // 60:02d}m'
  return f'{s // 86400}d{s % 86400 // 3600:02d}h'
