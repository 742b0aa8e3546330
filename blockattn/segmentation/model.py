"""The segmenter: a backbone of models/transformer and a two-way head, "no cut" and "cut", on its last hidden states.

The checkpoint is Hugging Face's token-classification layout of the backbone's family (`Qwen3ForTokenClassification`,
`LlamaForTokenClassification`: `score.weight` [2, D], `score.bias` [2]), which hf/convert reads and writes. Attention is
causal inside a document of the layout, as there.
"""

import dataclasses

import jax
import jax.numpy as jnp

from blockattn import blocks
from blockattn.errors import UserError
from blockattn.models import spec as spec_lib, transformer
from blockattn.models.transformer import Compute, ModelConfig

LABELS = 2
IGNORED = -100   # the label of a position that is not trained on, as in torch


def architecture(backbone: ModelConfig, unit_tokens: int = 0) -> ModelConfig:
  """The backbone with a two-way head in place of its output matrix.

  Args:
    unit_tokens: 0, or tokens that are read at one position (`data.markers`, style 'pooled').
  """
  return dataclasses.replace(backbone, labels=LABELS, unit_tokens=unit_tokens)


def spec(cfg: ModelConfig):
  """The parameter tree as ParamSpec.

  Raises:
    ValueError: the architecture is not a segmenter's.
  """
  if cfg.labels != LABELS:
    raise UserError(f'a model with {cfg.labels} classes is no segmenter, which has {LABELS}: cut and no cut')
  return transformer.spec(cfg)


def from_backbone(params, cfg: ModelConfig, key):
  """A language model's parameters as a segmenter's, with a new head.

  Args:
    params: tree of the language model, with or without an output matrix of its own.
    cfg: the segmenter's architecture.
    key: of the head's first values.

  Returns:
    Tree of `spec(cfg)`, backbone arrays as they are.
  """
  head = {name: leaf for name, leaf in spec(cfg).items() if name in ('score', 'score_bias')}
  backbone = {name: leaf for name, leaf in params.items() if name != 'head'}
  return backbone | spec_lib.init(head, key, params['final_norm'].dtype)


def apply(params, tokens, layout, cfg: ModelConfig, compute: Compute, read_BM=None):
  """Float32 logits [B, M, 2] of the positions `read_BM`, int32 [B, M]; of all positions if it is None.

  Every document of the layout is read as one block: blocks are what a segmenter is to find.
  """
  x_BTD = transformer.apply(params, tokens, blocks.as_one_block(layout), cfg, compute)
  if read_BM is not None:
    x_BTD = jnp.take_along_axis(x_BTD, read_BM[..., None], axis=1)
  return transformer.project(x_BTD, params['score']) + params['score_bias'].astype(jnp.float32)


def log_odds(logits):
  """log p(cut) / (1 - p(cut)) of logits [..., 2]."""
  return logits[..., 1] - logits[..., 0]


def loss_sums(logits, labels, cut_weight: float):
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
