"""The optimizer: AdamW with warm-up and cosine decay, clipping, and a decay mask, as one optax chain."""

import dataclasses

import optax

from blockattn import tree


@dataclasses.dataclass(frozen=True)
class OptimConfig:
  """
  Attributes:
    lr: peak learning rate.
    final_lr: where the cosine ends, as a fraction of lr.
    warmup: steps of linear warm-up.
    steps: total optimizer steps; the cosine ends here.
    b1, b2, eps: of Adam.
    weight_decay: decoupled; matrices only, norms, biases and sinks are spared.
    clip: global gradient norm above which gradients are scaled down.
    mu_dtype: of Adam's first moment, 'float32' or 'bfloat16'; empty: that of the parameters, as of the second always.
  """
  lr: float
  final_lr: float
  warmup: int
  steps: int
  b1: float
  b2: float
  eps: float
  weight_decay: float
  clip: float
  mu_dtype: str = ''

  def __post_init__(self):
    if not 0 <= self.warmup < max(self.steps, 1):
      raise ValueError(f'optim.warmup={self.warmup} must be at least 0 and below steps={self.steps}')
    if self.mu_dtype not in ('', 'float32', 'bfloat16'):
      raise ValueError(f'optim.mu_dtype={self.mu_dtype!r}; choose float32 or bfloat16, or leave it empty')


def learning_rate(config: OptimConfig):
  """step -> learning rate."""
  return optax.warmup_cosine_decay_schedule(0.0 if config.warmup else config.lr, config.lr, config.warmup,
                                            config.steps, config.lr * config.final_lr)


def decays(name: str) -> bool:
  """Whether weight decay applies to the parameter of this name."""
  leaf = name.rsplit('/', 1)[-1]
  return not (leaf.endswith(('norm', 'bias')) or leaf == 'sinks')


def make_optimizer(config: OptimConfig) -> optax.GradientTransformation:
  mask = lambda params: tree.map_named(lambda name, _: decays(name), params)
  return optax.chain(
      optax.clip_by_global_norm(config.clip),
      optax.adamw(learning_rate(config), b1=config.b1, b2=config.b2, eps=config.eps,
                  weight_decay=config.weight_decay, mask=mask, mu_dtype=config.mu_dtype or None))
