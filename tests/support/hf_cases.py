"""Small models and tokenizer folders that the Hugging Face tests share."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from blockattn.hf import convert
from blockattn.models import classifier
from blockattn.models.transformer import Llama3Rope, ModelConfig

# Together they flip every switch; head_dim is never D / N, so that a mixed-up reshape cannot pass.
MODELS = {
    'qwen3_tied': ModelConfig('qwen3', vocab=48, width=24, layers=2, heads=4, kv_heads=2, head_dim=16, mlp=40,
                              rope_theta=1e6, qk_norm=True, tied=True),
    'qwen3_bias': ModelConfig('qwen3', vocab=48, width=20, layers=2, heads=3, kv_heads=3, head_dim=8, mlp=24,
                              rope_theta=1e4, qk_norm=True, attention_bias=True),
    'qwen2_tied': ModelConfig('qwen2', vocab=48, width=24, layers=2, heads=4, kv_heads=2, head_dim=6, mlp=40,
                              rope_theta=1e6, attention_bias=True, tied=True),
    'llama_rope': ModelConfig('llama', vocab=48, width=24, layers=3, heads=6, kv_heads=2, head_dim=8, mlp=32,
                              norm_eps=1e-5, rope_theta=1e4, rope_scaling=Llama3Rope(8.0, 1.0, 4.0, 64)),
    'llama_bias': ModelConfig('llama', vocab=48, width=24, layers=2, heads=4, kv_heads=1, head_dim=10, mlp=32,
                              rope_theta=5e5, attention_bias=True, mlp_bias=True, tied=True),
}


def random_params(cfg: ModelConfig, dtype: str, seed: int = 0):
  """Numpy parameters, every one of them random: a norm of ones or a bias of zeros would hide mistakes."""
  rng = np.random.default_rng(seed)
  draw = lambda spec: (spec.fill + 0.3 * rng.standard_normal(spec.shape)).astype(jnp.dtype(dtype))
  return jax.tree.map(draw, classifier.spec(cfg))


def write_tokenizer(folder: pathlib.Path, size: int) -> pathlib.Path:
  """A folder with a word tokenizer of `size` tokens and the files that belong to one."""
  folder.mkdir(parents=True, exist_ok=True)
  vocab = {'<|endoftext|>': 0, **{f'word{i}': i for i in range(1, size)}}
  tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token='<|endoftext|>'))
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  tokenizer.add_special_tokens(['<|endoftext|>'])
  tokenizer.save(str(folder / 'tokenizer.json'))
  settings = {'tokenizer_class': 'PreTrainedTokenizerFast', 'eos_token': '<|endoftext|>', 'added_tokens_decoder': {}}
  (folder / 'tokenizer_config.json').write_text(json.dumps(settings))
  (folder / 'generation_config.json').write_text(json.dumps({'eos_token_id': 0, 'temperature': 0.7, 'do_sample': True}))
  (folder / 'chat_template.jinja').write_text('{{ messages[0].content }}')
  (folder / 'LICENSE').write_text('Apache-2.0')
  return folder


def save_model(folder, tokenizer, blocks_meta, seed=0):
  """A random Llama with this tokenizer in the Hugging Face format; returns (folder, cfg, params)."""
  source = folder.with_name(f'{folder.name}_tokenizer')
  tokenizer.save_pretrained(source)
  cfg = ModelConfig('llama', vocab=len(tokenizer), width=16, layers=1, heads=2, kv_heads=1, head_dim=8,
                                mlp=16, max_positions=512)
  params = random_params(cfg, 'float32', seed)
  convert.save(params, cfg, folder, source=source, meta=blocks_meta, card='', dtype='float32')
  return folder, cfg, params
