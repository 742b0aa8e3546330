"""The optimizer: AdamW with warm-up and cosine decay, clipping, and a decay mask, as one optax chain."""

import dataclasses

import optax

from blockattn import errors, options, tree
from blockattn.errors import UserError


@dataclasses.dataclass(frozen=True)
class OptimConfig:
  """
  Attributes:
    steps: total optimizer steps; the cosine ends here.
    lr: peak learning rate
    final_lr: end of the cosine, as a fraction of lr
    warmup: steps of linear warm-up: the first has lr / warmup, as has the only one of 0
    b1: of Adam: decay of the mean of gradients
    b2: of Adam: decay of the mean of their squares
    eps: of Adam: added to the root of the latter
    weight_decay: decoupled, of matrices only: norms, biases and sinks are spared
    clip: global gradient norm above which gradients are scaled down; 0: never
    mu_dtype: of Adam's first moment: float32, bfloat16; empty: that of the parameters, as of the second always
  """
  steps: int = options.not_a_key()
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
    errors.check_number('config.optim.warmup', self.warmup, 0, below=self.steps, hint=', which is config.steps')
    for name in ('lr', 'weight_decay', 'clip'):
      errors.check_number(f'config.optim.{name}', getattr(self, name), 0)
    for name in ('b1', 'b2'):
      errors.check_number(f'config.optim.{name}', getattr(self, name), 0, below=1)
    errors.check_number('config.optim.eps', self.eps, above=0)
    errors.check_number('config.optim.final_lr', self.final_lr, 0, 1)
    if self.mu_dtype not in ('', 'float32', 'bfloat16'):
      raise UserError(f'config.optim.mu_dtype={self.mu_dtype!r}; choose float32 or bfloat16, or leave it empty')


def learning_rate(config: OptimConfig):
  """Finished steps -> learning rate of the next."""
  # The ramp begins at the first step of it, not at 0: a step without a rate would cost as much as any other.
  ramp = max(config.warmup, 1)
  return optax.warmup_cosine_decay_schedule(config.lr / ramp, config.lr, ramp - 1, config.steps,
                                            config.lr * config.final_lr)


def decays(name: str) -> bool:
  """Whether weight decay applies to the parameter of this name."""
  leaf = name.rsplit('/', 1)[-1]
  return not (leaf.endswith(('norm', 'bias')) or leaf == 'sinks')


def make_optimizer(config: OptimConfig) -> optax.GradientTransformation:
  mask = lambda params: tree.map_named(lambda name, _: decays(name), params)
  return optax.chain(
      optax.clip_by_global_norm(config.clip) if config.clip else optax.identity(),
      optax.adamw(learning_rate(config), b1=config.b1, b2=config.b2, eps=config.eps,
                  weight_decay=config.weight_decay, mask=mask, mu_dtype=config.mu_dtype or None))
