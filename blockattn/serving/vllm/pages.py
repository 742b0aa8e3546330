"""The half of the connector where the model runs: states out of and into vLLM's pages.

Every attention backend of vLLM writes keys and values through `do_kv_cache_update`, whatever the form of its pages. What it
is given there is caught, and states are written by calling it, so that no form has to be known here.
"""

import collections
import time
from typing import Any

import ml_dtypes
import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.models.utils import extract_layer_index

from blockattn.inference.cache import State
from blockattn.serving.vllm.messages import Catch, Caught, Load, Step


class Pages:
  """The pages of one rank.

  Args:
    layers: the attention layers of the model by name.
  """

  def __init__(self, vllm_config: VllmConfig, layers: dict[str, Any]):
    self._layers = [layers[name] for name in sorted(layers, key=extract_layer_index)]
    parallel = vllm_config.parallel_config
    self._rank, self._ranks = parallel.rank % parallel.tensor_parallel_size, parallel.tensor_parallel_size
    hf, model = vllm_config.model_config.hf_config, vllm_config.model_config
    # The very table that the model's layers use: get_rope gives the same object for the same arguments.
    self._rope = get_rope(model.get_head_size(), max_position=hf.max_position_embeddings, is_neox_style=True,
                          rope_parameters=hf.rope_parameters, dtype=model.dtype)
    self._step = Step()
    self._parts = collections.defaultdict(list)   # (key, layer's number) -> [(k, v)], rotated, of the tokens so far
    self._rows: list[slice] | None = None         # of the batch, for each catch of the step
    self._whole: dict[str, State] = {}
    self._seconds = 0.0
    self._write = [layer.impl.do_kv_cache_update for layer in self._layers]
    for number, layer in enumerate(self._layers):
      layer.impl.do_kv_cache_update = self._listening(number)

  def begin(self, step: Step) -> None:
    self._step, self._rows = step, None
    for catch in step.catches:
      if not catch.start:   # also of a request that starts again after its pages were taken
        for number in range(len(self._layers)):
          self._parts.pop((catch.key, number), None)

  def load(self) -> None:
    """Writes the step's states to their pages."""
    loads = self._step.loads
    if not loads:
      return
    start = time.monotonic()
    device = self._rope.cos_sin_cache.device
    position = np.concatenate([np.arange(load.position, load.position + len(load.slots)) for load in loads])
    slots = torch.from_numpy(np.concatenate([load.slots for load in loads])).to(device)
    table = self._rope.cos_sin_cache[torch.from_numpy(position).to(device)]
    for number, (layer, write) in enumerate(zip(self._layers, self._write)):
      k, v = (torch.cat([self._part(load, name, number) for load in loads]).to(device) for name in ('k', 'v'))
      dtype = self._rope.cos_sin_cache.dtype
      write(layer, rotate(k, table).to(dtype), v.to(dtype), layer.kv_cache, slots)
    self._seconds += time.monotonic() - start

  def _part(self, load: Load, name: str, number: int) -> torch.Tensor:
    """Keys or values of a layer, [n, K, H], of this rank's heads."""
    x, scale = getattr(load.state, name), getattr(load.state, f'{name}_scale')
    heads = x.shape[2] // self._ranks
    mine = np.s_[number, :, self._rank * heads:(self._rank + 1) * heads]
    part = to_torch(x[mine][load.first:])
    return part if scale is None else part.float() * torch.from_numpy(scale[mine])

  def _listening(self, number):
    """The writer of a layer, which also keeps what the step wants to catch."""
    write = self._write[number]

    def update(layer, key, value, kv_cache, slots):
      if self._step.catches:
        self._rows = self._rows or [_rows(catch, slots) for catch in self._step.catches]   # the same in every layer
        for catch, rows in zip(self._step.catches, self._rows):
          self._parts[catch.key, number].append((key[rows].clone(), value[rows].clone()))
      return write(layer, key, value, kv_cache, slots)

    return update

  def end(self) -> None:
    """Makes states of the blocks that are read to their end."""
    for catch in self._step.catches:
      if catch.last:
        self._whole[catch.key] = self._state(catch.key)
    self._step = Step(broken=self._step.broken)

  def _state(self, key) -> State:
    layers = [[torch.cat(x) for x in zip(*self._parts.pop((key, number)))] for number in range(len(self._layers))]
    table = self._rope.cos_sin_cache[:len(layers[0][0])]
    return State(np.stack([to_numpy(unrotate(k, table).to(k.dtype)) for k, _ in layers]),
                 np.stack([to_numpy(v) for _, v in layers]))

  def take_caught(self) -> Caught | None:
    """The states that were made since the last call."""
    whole, self._whole = self._whole, {}
    return Caught({key: {self._rank: state} for key, state in whole.items()}) if whole else None

  def take_counted(self) -> dict[str, float]:
    """As `Wanted.take_counted`."""
    seconds, self._seconds = self._seconds, 0.0
    return {'load_seconds': seconds} if seconds else {}

  def take_broken(self) -> set[int]:
    broken, self._step.broken = self._step.broken, set()
    return broken


def _rows(catch: Catch, slots: torch.Tensor) -> slice:
  """The rows of a batch, whose tokens go to `slots`, that hold the tokens of a catch: a request's stand together."""
  first = int((slots == int(catch.slots[0])).nonzero()[0])
  return slice(first, first + len(catch.slots))


def rotate(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
  """Keys [n, K, H] at the positions of `table` [n, H], cosines and sines; float32."""
  cos, sin = table.float()[:, None].chunk(2, dim=-1)
  low, high = x.float().chunk(2, dim=-1)
  return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)


def unrotate(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
  """The inverse of `rotate`, also of a table that was rounded, so that a pair's squares do not add up to one."""
  cos, sin = table.float().chunk(2, dim=-1)
  square = cos * cos + sin * sin
  return rotate(x, torch.cat([cos / square, -sin / square], dim=-1))


def to_torch(x: np.ndarray) -> torch.Tensor:
  """numpy knows bfloat16 by name only, torch's is another: the bits go over as integers."""
  x = np.ascontiguousarray(x)
  return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16) if x.dtype == ml_dtypes.bfloat16 else torch.from_numpy(x)


def to_numpy(x: torch.Tensor) -> np.ndarray:
  x = x.contiguous().cpu()
  return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if x.dtype == torch.bfloat16 else x.numpy()
