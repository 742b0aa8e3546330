"""LoRA (arXiv 2106.09685): a student that trains a low-rank difference to every matrix of a frozen model.

The trained tree holds, for each matrix, `down` [L, in axes, R] and `up` [L, R, out axes], and the learned sinks and tails if
there are any; of `WRAPPERS` these alone. It is all that the optimizer and the checkpoints know of; `attach` puts it onto the
frozen parameters, `merge` makes one model of both.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from blockattn import errors, tree
from blockattn.errors import UserError
from blockattn.models import transformer, weights
from blockattn.models.spec import ParamSpec


@dataclasses.dataclass(frozen=True)
class LoraOptions:
  """
  Attributes:
    rank: R; 0: every parameter is trained, and none of this applies.
    alpha: the difference is alpha / rank times the product of the two matrices.
    targets: names of the matrices, of models.weights.CONTRACTED; none: see `WRAPPERS`.
  """
  rank: int = 0
  alpha: float = 16.0
  targets: tuple[str, ...] = tuple(weights.CONTRACTED)

  def __post_init__(self):
    object.__setattr__(self, 'targets', tuple(self.targets))
    errors.check_number('config.lora.rank', self.rank, 0, hint='; 0: no LoRA')
    errors.check_number('config.lora.alpha', self.alpha, above=0)
    unknown = [name for name in self.targets if name not in weights.CONTRACTED]
    if unknown:
      raise UserError(f'config.lora.targets={self.targets}: {tree.did_you_mean(str(unknown[0]), weights.CONTRACTED)}')

  @property
  def factor(self) -> float:
    return self.alpha / self.rank


NONE = LoraOptions()
WRAPPERS = LoraOptions(rank=1, targets=())   # no matrix: the learned sinks and tails beside a frozen model


def spec(cfg: transformer.ModelConfig, options: LoraOptions) -> dict[str, Any]:
  """The trained tree as ParamSpec: `down` starts at std 1/sqrt(fan-in), `up` at 0, so that the student starts as the
  frozen model."""
  whole = transformer.spec(cfg)
  layers = {}
  for name in options.targets:
    matrix, contracted = whole['layers'][name], 1 + weights.CONTRACTED[name]
    (L, *_), (layer, *_) = matrix.shape, matrix.axes
    fan_in = math.prod(matrix.shape[1:contracted])
    layers[name] = {
        'down': ParamSpec((*matrix.shape[:contracted], options.rank), (*matrix.axes[:contracted], None), std=fan_in ** -0.5),
        'up': ParamSpec((L, options.rank, *matrix.shape[contracted:]), (layer, None, *matrix.axes[contracted:]))}
  sinks = {'sinks': whole['sinks']} if cfg.learned_sinks else {}
  return sinks | ({'layers': layers} if layers else {})


def attach(frozen: dict[str, Any], trained: dict[str, Any], options: LoraOptions) -> dict[str, Any]:
  """The student's parameters for `transformer.apply`: the frozen ones, no gradient, with the trained difference."""
  frozen = jax.lax.stop_gradient(frozen)
  layers = frozen['layers'] | {
      name: weights.LowRank(frozen['layers'][name], pair['down'], pair['up'], options.factor)
      for name, pair in trained.get('layers', {}).items()}
  sinks = {name: value for name, value in trained.items() if name != 'layers'}
  return frozen | sinks | {'layers': layers}


def merge(frozen: dict[str, Any], trained: dict[str, Any], options: LoraOptions) -> dict[str, Any]:
  """One model: base + alpha / rank * down up, computed in float32, in the dtype of the base.

  Args:
    frozen: the parameters that the training started from, plain arrays.
  """
  def add(base, pair):
    layers, rank = pair['up'].shape[:2]
    down = pair['down'].astype(jnp.float32).reshape(layers, -1, rank)
    up = pair['up'].astype(jnp.float32).reshape(layers, rank, -1)
    difference = options.factor * jnp.matmul(down, up, precision='highest').reshape(base.shape)
    return (base.astype(jnp.float32) + difference).astype(base.dtype)

  layers = frozen['layers'] | {name: add(frozen['layers'][name], pair)
                               for name, pair in trained.get('layers', {}).items()}
  sinks = {name: value.astype(frozen['embed'].dtype) for name, value in trained.items() if name != 'layers'}
  return frozen | sinks | {'layers': layers}
