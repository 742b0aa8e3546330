"""The names and shapes of Hugging Face checkpoints against those of our parameter tree: one table for all families.

A row says which axes our parameter has (without the leading layer axis, letters as in blocks.py) and which axes the
Hugging Face tensor has, each a product of ours: `DNH` against `NH D` is torch's [out, in] matrix whose rows are N heads
of H. Both directions are read off the same row. No row permutes rotary halves: ours are Hugging Face's.
"""

import dataclasses
import math

import numpy as np

from blockattn import tree
from blockattn.errors import UserError
from blockattn.models import classifier
from blockattn.models.transformer import ModelConfig

EMBED = 'model.embed_tokens.weight'
HEAD = 'lm_head.weight'
LAYER = 'model.layers.{layer}.'

TABLE = (
    # Hugging Face name                        ours                 our axes  their axes
    (EMBED, 'embed', 'VD', 'V D'),
    (LAYER + 'input_layernorm.weight', 'layers/attn_norm', 'D', 'D'),
    (LAYER + 'self_attn.q_proj.weight', 'layers/q', 'DNH', 'NH D'),
    (LAYER + 'self_attn.k_proj.weight', 'layers/k', 'DKH', 'KH D'),
    (LAYER + 'self_attn.v_proj.weight', 'layers/v', 'DKH', 'KH D'),
    (LAYER + 'self_attn.o_proj.weight', 'layers/o', 'NHD', 'D NH'),
    (LAYER + 'self_attn.q_proj.bias', 'layers/q_bias', 'NH', 'NH'),
    (LAYER + 'self_attn.k_proj.bias', 'layers/k_bias', 'KH', 'KH'),
    (LAYER + 'self_attn.v_proj.bias', 'layers/v_bias', 'KH', 'KH'),
    (LAYER + 'self_attn.o_proj.bias', 'layers/o_bias', 'D', 'D'),
    (LAYER + 'self_attn.q_norm.weight', 'layers/q_norm', 'H', 'H'),
    (LAYER + 'self_attn.k_norm.weight', 'layers/k_norm', 'H', 'H'),
    (LAYER + 'post_attention_layernorm.weight', 'layers/mlp_norm', 'D', 'D'),
    (LAYER + 'mlp.gate_proj.weight', 'layers/gate', 'DF', 'F D'),
    (LAYER + 'mlp.up_proj.weight', 'layers/up', 'DF', 'F D'),
    (LAYER + 'mlp.down_proj.weight', 'layers/down', 'FD', 'D F'),
    (LAYER + 'mlp.gate_proj.bias', 'layers/gate_bias', 'F', 'F'),
    (LAYER + 'mlp.up_proj.bias', 'layers/up_bias', 'F', 'F'),
    (LAYER + 'mlp.down_proj.bias', 'layers/down_bias', 'D', 'D'),
    ('model.norm.weight', 'final_norm', 'D', 'D'),
    (HEAD, 'head', 'VD', 'V D'),
    ('units.weight', 'units', 'PDE', 'P D E'),     # ours: transformers reads such a model by inputs_embeds
    ('score.weight', 'score', 'CD', 'C D'),        # of token classification, C classes
    ('score.bias', 'score_bias', 'C', 'C'),
)


@dataclasses.dataclass(frozen=True)
class Slot:
  """Where one Hugging Face tensor lives in our tree.

  Attributes:
    key: its Hugging Face name.
    name: our parameter, 'layers/q'.
    layer: index on our parameter's leading axis, None where it has none.
    shape: our shape of this tensor, without the layer axis.
    axes: letters of `shape`.
    groups: for each Hugging Face axis the letters whose product it is.
  """
  key: str
  name: str
  layer: int | None
  shape: tuple[int, ...]
  axes: str
  groups: tuple[str, ...]

  @property
  def hf_shape(self) -> tuple[int, ...]:
    size = dict(zip(self.axes, self.shape, strict=True))
    return tuple(math.prod(size[letter] for letter in group) for group in self.groups)

  def to_hf(self, x: np.ndarray) -> np.ndarray:
    """Our tensor, `shape`, as one of `hf_shape`; contiguous, since safetensors stores the memory as it lies."""
    order = [self.axes.index(letter) for letter in ''.join(self.groups)]
    return np.ascontiguousarray(x.transpose(order).reshape(self.hf_shape))

  def from_hf(self, y: np.ndarray) -> np.ndarray:
    """A tensor of `hf_shape` as a view of ours, `shape`."""
    letters = ''.join(self.groups)
    order = [self.axes.index(letter) for letter in letters]
    split = y.reshape([self.shape[i] for i in order])
    return split.transpose([letters.index(letter) for letter in self.axes])


def is_buffer(key: str) -> bool:
  """Whether old checkpoints hold this though it is no parameter: rotary frequencies, which config.json says."""
  return key.endswith('.rotary_emb.inv_freq')


def slots(cfg: ModelConfig) -> dict[str, Slot]:
  """Every tensor of the Hugging Face checkpoint of this architecture, by name, in the order of the files.

  Learned sinks are no tensor of their own there: the vocabulary is longer, so the slots of embed and head have
  V + learned_sinks rows.
  """
  shapes = {name: spec.shape for name, spec in tree.named_leaves(classifier.spec(cfg))}
  rows = [row for row in TABLE if row[1] in shapes]
  unmapped = set(shapes) - {row[1] for row in rows} - {'sinks'}
  if unmapped:
    raise UserError(f'parameters without a Hugging Face name: {sorted(unmapped)}; add them to hf/names.py TABLE')
  top = [_slot(row, None, shapes, cfg) for row in rows if not row[1].startswith('layers/')]
  layers = [_slot(row, layer, shapes, cfg)
            for layer in range(cfg.layers) for row in rows if row[1].startswith('layers/')]
  return {slot.key: slot for slot in [top[0], *layers, *top[1:]]}


def _slot(row, layer, shapes, cfg):
  pattern, name, axes, theirs = row
  shape = shapes[name] if layer is None else shapes[name][1:]
  if axes[0] == 'V':
    shape = (cfg.vocab + cfg.learned_sinks, *shape[1:])
  return Slot(pattern.format(layer=layer), name, layer, shape, axes, tuple(theirs.split()))
