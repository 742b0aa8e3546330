"""Named model sizes, as published in the models' config.json files."""

import dataclasses
from typing import Any

from blockattn import tree
from blockattn.errors import UserError
from blockattn.models.transformer import Llama3Rope, ModelConfig


def _qwen3(width, layers, heads, mlp, *, tied, theta=1e6, max_positions=40960):
  return ModelConfig('qwen3', vocab=151936, width=width, layers=layers, heads=heads, kv_heads=8, head_dim=128, mlp=mlp,
                     norm_eps=1e-6, rope_theta=theta, qk_norm=True, tied=tied, max_positions=max_positions)


def _qwen25(width, layers, heads, kv_heads, mlp, *, vocab=151936, tied=True):
  """The instruct models; those without instructions have more positions at some sizes."""
  return ModelConfig('qwen2', vocab=vocab, width=width, layers=layers, heads=heads, kv_heads=kv_heads,
                     head_dim=width // heads, mlp=mlp, norm_eps=1e-6, rope_theta=1e6, attention_bias=True, tied=tied,
                     max_positions=32768)


def _llama(width, layers, heads, head_dim, mlp, *, tied, factor):
  return ModelConfig('llama', vocab=128256, width=width, layers=layers, heads=heads, kv_heads=8, head_dim=head_dim,
                     mlp=mlp, norm_eps=1e-5, rope_theta=5e5, rope_scaling=Llama3Rope(factor, 1.0, 4.0, 8192),
                     tied=tied, max_positions=131072)


SIZES = {
    'smollm2_135m': ModelConfig('llama', vocab=49152, width=576, layers=30, heads=9, kv_heads=3, head_dim=64, mlp=1536,
                                norm_eps=1e-5, rope_theta=1e5, tied=True, max_positions=8192),
    'qwen3_0_6b': _qwen3(1024, 28, 16, 3072, tied=True),
    'qwen3_1_7b': _qwen3(2048, 28, 16, 6144, tied=True),
    'qwen3_4b': _qwen3(2560, 36, 32, 9728, tied=True),
    'qwen3_4b_instruct_2507': _qwen3(2560, 36, 32, 9728, tied=True, theta=5e6, max_positions=262144),
    'qwen3_8b': _qwen3(4096, 36, 32, 12288, tied=False),
    'qwen25_0_5b': _qwen25(896, 24, 14, 2, 4864),
    'qwen25_1_5b': _qwen25(1536, 28, 12, 2, 8960),
    'qwen25_7b': _qwen25(3584, 28, 28, 4, 18944, vocab=152064, tied=False),
    'llama32_1b': _llama(2048, 16, 32, 64, 8192, tied=True, factor=32.0),
    'llama31_8b': _llama(4096, 32, 32, 128, 14336, tied=False, factor=8.0),
}


def get(name: str, **overrides: Any) -> ModelConfig:
  """The named size, with fields replaced. Raises ValueError naming the nearest size."""
  if name not in SIZES:
    raise UserError(f'no model size {name!r}; {tree.did_you_mean(name, SIZES)}')
  return dataclasses.replace(SIZES[name], **overrides)
