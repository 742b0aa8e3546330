"""A transformer that gives classes in place of next tokens, as Hugging Face's token classification does.

The checkpoint is that of the backbone's family (`Qwen3ForTokenClassification`, ...: `score.weight` [C, D], `score.bias` [C],
C classes). Ours is that a position may be several tokens read side by side: their embeddings go through one matrix each
(`units.weight` [P, D, D]) and are added. transformers reads such a model by `inputs_embeds`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from blockattn.models import transformer
from blockattn.models.spec import ParamSpec
from blockattn.models.transformer import Compute, ModelConfig


@dataclasses.dataclass(frozen=True)
class ClassifierConfig(ModelConfig):
  """The backbone's architecture, and what stands at its two ends.

  Attributes:
    labels: C.
    unit_tokens: P, tokens that are read at one position; 0: a position is one token.
  """
  labels: int = 2
  unit_tokens: int = 0


def of_backbone(cfg: ModelConfig, labels: int, unit_tokens: int = 0) -> ClassifierConfig:
  """The architecture with classes in place of its output matrix."""
  fields = {field.name: getattr(cfg, field.name) for field in dataclasses.fields(ModelConfig)}
  return ClassifierConfig(**fields, labels=labels, unit_tokens=unit_tokens)


def from_fields(fields: dict) -> ModelConfig:
  """The architecture of `dataclasses.asdict`: a classifier if it has classes."""
  own = {name: fields[name] for name in ('labels', 'unit_tokens') if fields.get(name)}
  plain = {name: value for name, value in fields.items() if name not in ('labels', 'unit_tokens')}
  return ClassifierConfig(**plain, **own) if own else ModelConfig(**plain)


def position_shape(cfg: ModelConfig) -> tuple[int, ...]:
  """Of the token ids of one position: (P,), or () where it is one token, as of every language model."""
  return (cfg.unit_tokens,) if isinstance(cfg, ClassifierConfig) and cfg.unit_tokens else ()


def spec(cfg: ModelConfig) -> dict[str, Any]:
  """The parameter tree as ParamSpec, of a classifier or of a language model."""
  specs = transformer.spec(cfg)
  if not isinstance(cfg, ClassifierConfig):
    return specs
  specs.pop('head', None)
  C, D, P = cfg.labels, cfg.width, cfg.unit_tokens
  if P:
    specs['units'] = ParamSpec((P, D, D), (None, 'embed', 'width'), std=(P * D) ** -0.5)
  return specs | {'score': ParamSpec((C, D), (None, 'embed'), std=D ** -0.5), 'score_bias': ParamSpec((C,), (None,))}


def hidden(params, tokens, layout, cfg: ClassifierConfig, compute: Compute) -> jax.Array:
  """Hidden states after the final norm, x_BTD in compute.dtype.

  Args:
    params: tree of `spec(cfg)`, in any float dtype.
    tokens: int32 [B, T, *position_shape(cfg)].
    layout: BlockLayout [B, T].
  """
  return transformer.apply_embedded(params, embed(params, tokens, cfg, compute), layout, cfg, compute)


def embed(params, tokens, cfg: ModelConfig, compute: Compute) -> jax.Array:
  """Embeddings x_BTD in compute.dtype of tokens int32 [B, T, *position_shape(cfg)]."""
  x = transformer.embed(params, tokens, cfg, compute)
  if not position_shape(cfg):
    return x
  with jax.named_scope('embed'):
    return transformer.dense(x, params['units'].astype(compute.dtype), contract=2)


def logits(params, tokens, layout, cfg: ClassifierConfig, compute: Compute) -> jax.Array:
  """Float32 logits [B, T, C]; arguments as of `hidden`."""
  x_BTD = hidden(params, tokens, layout, cfg, compute)
  return transformer.project(params['score'], x_BTD) + params['score_bias'].astype(jnp.float32)
