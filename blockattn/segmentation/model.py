"""The segmenter: `models.classifier` with two classes, "no cut" and "cut", and its loss.

Attention is causal inside a document of the layout, as in Hugging Face's token classification.
"""

import jax
import jax.numpy as jnp

from blockattn import blocks
from blockattn.models import classifier, spec as spec_lib
from blockattn.models.classifier import ClassifierConfig
from blockattn.models.transformer import Compute, ModelConfig

LABELS = 2
IGNORED = -100   # the label of a position that is not trained on, as in torch


def architecture(backbone: ModelConfig, unit_tokens: int = 0) -> ClassifierConfig:
  """The backbone with a two-way head in place of its output matrix; `unit_tokens` are read at one position (`markers`, style
  'pooled'), or one for 0."""
  return classifier.of_backbone(backbone, LABELS, unit_tokens)


def is_segmenter(cfg: ModelConfig) -> bool:
  """Whether it has the two classes, cut and no cut."""
  return isinstance(cfg, ClassifierConfig) and cfg.labels == LABELS


def from_backbone(params, cfg: ClassifierConfig, key):
  """A language model's parameters, with or without an output matrix of its own, as a segmenter's: the backbone's arrays as
  they are, with a new head drawn from `key`."""
  head = {name: leaf for name, leaf in classifier.spec(cfg).items() if name in ('score', 'score_bias')}
  backbone = {name: leaf for name, leaf in params.items() if name != 'head'}
  return backbone | spec_lib.init(head, key, params['final_norm'].dtype)


def apply(params, tokens, layout, cfg: ClassifierConfig, compute: Compute) -> jax.Array:
  """Float32 logits [B, T, 2]; arguments as of `classifier.hidden`. Every document of the layout is read as one block: blocks
  are what a segmenter is to find."""
  return classifier.logits(params, tokens, blocks.as_one_block(layout), cfg, compute)


def log_odds(logits: jax.Array) -> jax.Array:
  """log p(cut) / (1 - p(cut)) of logits [..., 2]."""
  return logits[..., 1] - logits[..., 0]


def loss_sums(logits: jax.Array, labels: jax.Array, cut_weight: float) -> dict[str, jax.Array]:
  """Sums of the weighted cross-entropy, see train/loop.accumulate.

  Args:
    logits: float32 [..., 2].
    labels: int32 [...], 1 at a cut, 0 at a candidate without, IGNORED elsewhere.
    cut_weight: of a cut; 1 of a candidate without.

  Returns:
    {'loss', 'weight'}: sums, whose quotient is the loss; {'ce', 'tokens', 'cuts', 'found'}: the cross-entropy and the
    number of labelled positions, that of cuts, and that of cuts that are more likely than not.
  """
  known, cut = labels >= 0, labels == 1
  logp = jax.nn.log_softmax(logits)
  ce = jnp.where(known, -jnp.where(cut, logp[..., 1], logp[..., 0]), 0.0)
  weight = jnp.where(known, jnp.where(cut, cut_weight, 1.0), 0.0)
  count = lambda mask: jnp.sum(mask, dtype=jnp.float32)
  return {'loss': jnp.sum(ce * weight), 'weight': jnp.sum(weight), 'ce': jnp.sum(ce), 'tokens': count(known),
          'cuts': count(cut), 'found': count(cut & (log_odds(logits) > 0))}
