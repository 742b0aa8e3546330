"""A profiler trace of some steps of a run: what the devices and the host did when, under the names of the model's parts.

The folder holds what `jax.profiler` writes: open it with TensorBoard and xprof (`pip install xprof tensorboard`), or its
`*.trace.json.gz` at ui.perfetto.dev. The parts are jax.named_scope's: embed, attention, mlp, norm, and those of the step
around the model. And how long something was compiled, which no measurement of speed should count.
"""

import contextlib
import os
import pathlib
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from blockattn.errors import UserError


def parse_steps(text: str, last: int) -> tuple[int, int] | None:
  """'10:15' -> (10, 15), the steps 10 to 14: the first one included, the end not, as in a Python slice. '' -> None.

  Args:
    last: the run's last step; steps count from 1.

  Raises:
    ValueError: anything else, an empty range, or steps that the run does not have.
  """
  if not text:
    return None
  match = re.fullmatch(r'(\d+):(\d+)', text.strip())
  if not match:
    raise UserError(f'profile={text!r}: give the first step and the one to stop before, such as 10:15')
  start, stop = int(match[1]), int(match[2])
  if not 1 <= start < stop <= last + 1:
    raise UserError(f'profile={text!r}: the run has the steps 1 to {last}; give FIRST:END with 1 <= FIRST < END <= '
                    f'{last + 1} (the step END is not traced any more)')
  return start, stop


@contextlib.contextmanager
def compiling() -> Iterator[Callable[[], float]]:
  """`seconds()`: what JAX has spent on tracing and compiling in this process within the block so far."""
  spans = []   # (start, end), apart from each other

  def heard(event, duration_secs, **_):
    if event.startswith('/jax/core/compile/'):
      end = time.perf_counter()
      start = end - duration_secs
      while spans and spans[-1][1] > start:   # a function that is traced within another one's trace
        start = min(start, spans.pop()[0])
      spans.append((start, end))

  jax.monitoring.register_event_duration_secs_listener(heard)
  try:
    yield lambda: sum(end - start for start, end in spans)
  finally:
    jax.monitoring.unregister_event_duration_listener(heard)


class Profiler:
  """Traces the steps start to stop - 1 of a run; the compilation of the first step is outside unless start is 1.

  Args:
    folder: made when the trace starts; a later trace of the same run is put beside an earlier one.
    steps: (start, stop), see `parse_steps`; None: nothing is traced.
  """

  def __init__(self, folder: str | os.PathLike, steps: tuple[int, int] | None):
    self._folder, self._steps, self._tracing = pathlib.Path(folder), steps, False

  @contextlib.contextmanager
  def step(self, number: int, state: Any) -> Iterator[None]:
    """Around the work of step `number` on the host. `state`: arrays that are ready when the steps before it are done, so
    that the devices' part of the trace begins and ends with a step as well."""
    if self._steps is None:
      yield
      return
    start, stop = self._steps
    if start <= number < stop and not self._tracing:
      jax.block_until_ready(state)
      options = jax.profiler.ProfileOptions()
      options.python_tracer_level = 0   # every Python call of the threads that prepare batches: slow, and most of the file
      jax.profiler.start_trace(str(self._folder), profiler_options=options)
      self._tracing = True
    elif number >= stop and self._tracing:
      jax.block_until_ready(state)
      self._stop()
    with jax.profiler.StepTraceAnnotation('train', step_num=number):
      yield

  def _stop(self):
    self._tracing = False
    jax.profiler.stop_trace()

  def __enter__(self) -> 'Profiler':
    return self

  def __exit__(self, *_):
    if self._tracing:   # the run ends within the range, by itself or not: what there is is kept
      self._stop()
