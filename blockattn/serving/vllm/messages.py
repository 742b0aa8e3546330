"""What the two halves of the connector tell each other, step by step."""

import dataclasses

import numpy as np
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorWorkerMetadata

from blockattn.inference.cache import State


@dataclasses.dataclass(frozen=True)
class Load:
  """Tokens of a state that go into pages.

  Attributes:
    state: of a whole block.
    first: the first of its tokens to load, up to the last.
    position: rotary position of that token.
    slots: int64, where each token goes.
  """
  state: State
  first: int
  position: int
  slots: np.ndarray


@dataclasses.dataclass(frozen=True)
class Catch:
  """Tokens of a block that are read in this step, `start` to `start + len(slots)`; `last`: the block ends with them."""
  key: str
  start: int
  slots: np.ndarray
  last: bool


@dataclasses.dataclass
class Step(KVConnectorMetadata):
  """What there is to do in a step; `broken`: pages of requests that have to end in an error."""
  loads: list[Load] = dataclasses.field(default_factory=list)
  catches: list[Catch] = dataclasses.field(default_factory=list)
  broken: set[int] = dataclasses.field(default_factory=set)


@dataclasses.dataclass
class Caught(KVConnectorWorkerMetadata):
  """States of blocks that were read, by key and rank: each rank has its heads."""
  states: dict[str, dict[int, State]]

  def aggregate(self, other: 'Caught') -> 'Caught':
    for key, parts in other.states.items():
      self.states.setdefault(key, {}).update(parts)
    return self

  def whole(self) -> dict[str, State]:
    """The states with all heads."""
    join = lambda parts, name: np.concatenate([getattr(parts[rank], name) for rank in sorted(parts)], axis=2)
    return {key: State(join(parts, 'k'), join(parts, 'v')) for key, parts in self.states.items()}


def slots_of(pages: list[int], page: int, start: int, stop: int) -> np.ndarray:
  """Where tokens `start` to `stop` of a request stand, whose pages of `page` tokens these are."""
  at = np.arange(start, stop, dtype=np.int64)
  return np.asarray(pages, np.int64)[at // page] * page + at % page
