"""The optimizer: AdamW or Muon with warm-up and cosine decay, clipping, and a decay mask, as one optax chain."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import optax
import optax.contrib

from blockattn import errors, options, tree
from blockattn.errors import UserError
from blockattn.models import weights

NAMES = ('adamw', 'muon')
_ADAMS_RMS = 0.2   # about the root mean square of AdamW's updates, at which Muon takes AdamW's learning rates


@dataclasses.dataclass(frozen=True)
class OptimConfig:
  """
  Attributes:
    steps: total optimizer steps.
    name: adamw; muon: the matrices of the layers by Muon (arXiv 2502.16982), all else by AdamW
    decay_steps: the step at which the cosine ends, and behind which the rate stays; 0: config.steps
    lr: peak learning rate
    final_lr: end of the cosine, as a fraction of lr
    warmup: steps of linear warm-up: the first has lr / warmup, as has the only one of 0
    b1: of Adam and Muon: decay of the mean of gradients
    b2: of Adam: decay of the mean of their squares
    eps: of Adam: added to the root of the latter
    weight_decay: decoupled, of matrices only: norms, biases and sinks are spared
    clip: global gradient norm above which gradients are scaled down; 0: never
    mu_dtype: of the first moment: float32, bfloat16; empty: that of the parameters, as of Adam's second always
  """
  steps: int = options.not_a_key()
  name: str = 'adamw'
  decay_steps: int = 0
  lr: float = 1e-4
  final_lr: float = 0.1
  warmup: int = 100
  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.0
  clip: float = 1.0
  mu_dtype: str = ''

  def __post_init__(self):
    errors.check_number('config.steps', self.steps, 1, 2 ** 31 - 1)
    errors.check_choice('config.optim.name', self.name, NAMES)
    errors.check_number('config.optim.decay_steps', self.decay_steps, 0, 2 ** 31 - 1, hint='; 0: config.steps')
    errors.check_number('config.optim.warmup', self.warmup, 0, below=self.schedule_steps,
                        hint=f', which is config.{"optim.decay_steps" if self.decay_steps else "steps"}')
    for name in ('lr', 'weight_decay', 'clip'):
      errors.check_number(f'config.optim.{name}', getattr(self, name), 0)
    for name in ('b1', 'b2'):
      errors.check_number(f'config.optim.{name}', getattr(self, name), 0, below=1)
    errors.check_number('config.optim.eps', self.eps, above=0)
    errors.check_number('config.optim.final_lr', self.final_lr, 0, 1)
    if self.mu_dtype not in ('', 'float32', 'bfloat16'):
      raise UserError(f'config.optim.mu_dtype={self.mu_dtype!r}; choose float32 or bfloat16, or leave it empty')

  @property
  def schedule_steps(self) -> int:
    return self.decay_steps or self.steps


def learning_rate(config: OptimConfig) -> optax.Schedule:
  """Finished steps -> learning rate of the next."""
  # The ramp begins at the first step of it, not at 0: a step without a rate would cost as much as any other.
  ramp = max(config.warmup, 1)
  return optax.warmup_cosine_decay_schedule(config.lr / ramp, config.lr, ramp - 1, config.schedule_steps,
                                            config.lr * config.final_lr)


def decays(name: str) -> bool:
  """Whether weight decay applies to the parameter of this name."""
  leaf = name.rsplit('/', 1)[-1]
  return not (leaf.endswith(('norm', 'bias')) or leaf == 'sinks')


def make_optimizer(config: OptimConfig) -> optax.GradientTransformation:
  mask = lambda params: tree.map_named(lambda name, _: decays(name), params)
  rate, mu_dtype = learning_rate(config), config.mu_dtype or None
  if config.name == 'muon':
    rule = optax.contrib.muon(rate, beta=config.b1, eps=config.eps, weight_decay=config.weight_decay, mu_dtype=mu_dtype,
                              adam_b1=config.b1, adam_b2=config.b2, consistent_rms=_ADAMS_RMS,
                              muon_weight_dimension_numbers=matrices)
  else:
    rule = optax.adamw(rate, b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay, mask=mask,
                       mu_dtype=mu_dtype)
  return optax.chain(optax.clip_by_global_norm(config.clip) if config.clip else optax.identity(), rule)


def matrices(params: Any) -> Any:
  """The tree with the axes of each matrix of the layers, as Muon makes it orthogonal, and None for all else: what a product
  sums over, against the rest. Layers are matrices of their own."""
  def axes(name, p):
    folder, _, leaf = name.rpartition('/')
    summed = weights.CONTRACTED.get(leaf) if folder == 'layers' else None
    return None if summed is None else optax.contrib.MuonDimensionNumbers(
        tuple(range(1, 1 + summed)), tuple(range(1 + summed, p.ndim)))
  return tree.map_named(axes, params)


# The optimizer's state.


def map_moments(fn: Callable, optimizer: optax.GradientTransformation, state: Any, params: Any, other: Callable) -> Any:
  """The state with `fn(moment, its parameter)` in place of each moment, and `other(value)` of all else (counts)."""
  masked = lambda x: isinstance(x, optax.MaskedNode)   # a parameter that another rule moves
  return optax.tree_map_params(optimizer, lambda x, p: x if masked(x) else fn(x, p), state, params,
                               transform_non_params=other, is_leaf=masked)


def restart_schedule(state: Any, first: Any) -> Any:
  """The state with the schedule's counts of `first`, the state at step 0; moments and their own counts stay."""
  is_schedule = lambda x: isinstance(x, optax.ScaleByScheduleState)
  return jax.tree.map(lambda old, new: new if is_schedule(new) else old, state, first, is_leaf=is_schedule)
