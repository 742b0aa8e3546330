"""How long the parts of an answer take, from outside of the engine: `engine.generate(requests, on_part=watch)`."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from blockattn import trace


class Stopwatch:
  """Seconds of each part, without those that were spent on compiling. Made by `running`.

  Attributes:
    parts: {part: seconds}; only with `wait` is each part's time its own.
  """

  def __init__(self, compiled: Callable[[], float], wait: bool):
    self.parts: dict[str, float] = {}
    self._compiled, self._wait, self._start, self._last = compiled, wait, time.perf_counter(), 0.0

  def __call__(self, part: str, arrays: Any) -> None:
    if self._wait or self._compiled():   # else what is computed while the next part is compiled would count for nothing
      jax.block_until_ready(arrays)
    now = time.perf_counter() - self._start - self._compiled()
    self.parts[part] = self.parts.get(part, 0.0) + now - self._last
    self._last = now

  @property
  def compile(self) -> float:
    return self._compiled()

  @property
  def decode(self) -> float:
    """After the first token."""
    return self.parts.get('decode', 0.0)

  @property
  def first_token(self) -> float:
    """Until the first token is on the host."""
    return sum(self.parts.values()) - self.decode


@contextlib.contextmanager
def running(*, wait: bool = False) -> Iterator[Stopwatch]:
  """A watch that was started now; `wait`: for the devices after each part, so that each has its own time."""
  with trace.compiling() as compiled:
    yield Stopwatch(compiled, wait)
