"""A Llama in a GGUF file, as a folder in the Hugging Face format: python -m tools.gguf_model FILE.gguf FOLDER

Weights of any type that the package `gguf` can read become bfloat16; tokenizer and chat template come from the file. It may
be given as its parts, FILE.gguf.part*, in the order of their names.
"""

import json
import pathlib
import re
import sys
import tempfile

import ml_dtypes
import numpy as np
import safetensors.numpy
import tokenizers

from blockattn.errors import UserError
from tools import arguments

_ARCHITECTURE, _PRE_TOKENIZERS = 'llama', ('smollm',)
_LAYER = {'attn_q': 'self_attn.q_proj', 'attn_k': 'self_attn.k_proj', 'attn_v': 'self_attn.v_proj',
          'attn_output': 'self_attn.o_proj', 'ffn_gate': 'mlp.gate_proj', 'ffn_up': 'mlp.up_proj',
          'ffn_down': 'mlp.down_proj', 'attn_norm': 'input_layernorm', 'ffn_norm': 'post_attention_layernorm'}
_TOP = {'token_embd.weight': 'model.embed_tokens.weight', 'output_norm.weight': 'model.norm.weight',
        'output.weight': 'lm_head.weight'}
_SPECIAL = (3, 4)   # types of tokens: control, user defined


def to_hf(path: pathlib.Path, folder: pathlib.Path) -> dict:
  """Writes the folder; returns {'parameters', 'file', 'bytes'}.

  Raises:
    ImportError: the package gguf is not installed.
    FileNotFoundError: there is no such file, and no parts of it.
    ValueError: the model is no Llama, or its tokenizer splits words in a way that is not known here.
  """
  parts = [path] if path.is_file() else sorted(path.parent.glob(f'{path.name}.part*'))
  if not parts:
    raise FileNotFoundError(f'{path}: no such file, and no {path.name}.part* beside it')
  if len(parts) == 1 and parts[0] == path:
    return _write(path, folder)
  with tempfile.TemporaryDirectory() as whole:
    joined = pathlib.Path(whole) / path.name
    joined.write_bytes(b''.join(part.read_bytes() for part in parts))
    return _write(joined, folder)


def _write(path, folder):
  import gguf
  reader = gguf.GGUFReader(path)
  said = lambda key, default=None: reader.fields[key].contents() if key in reader.fields else default
  name, pre = said('general.architecture'), said('tokenizer.ggml.pre')
  if name != _ARCHITECTURE or pre not in _PRE_TOKENIZERS:
    raise UserError(f'{path}: architecture {name!r} with pre-tokenizer {pre!r}; only {_ARCHITECTURE} with '
                    f'{" or ".join(_PRE_TOKENIZERS)} is read, convert others with their own tools')
  of = lambda key: said(f'llama.{key}')
  heads, kv_heads, width = of('attention.head_count'), of('attention.head_count_kv'), of('embedding_length')
  tensors = {}
  for tensor in reader.tensors:
    values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
    if match := re.fullmatch(r'blk\.(\d+)\.(\w+)\.weight', tensor.name):
      values = _unpaired(values, {'attn_q': heads, 'attn_k': kv_heads}.get(match[2]))
    key = f'model.layers.{match[1]}.{_LAYER[match[2]]}.weight' if match else _TOP[tensor.name]
    tensors[key] = np.ascontiguousarray(values.astype(ml_dtypes.bfloat16))
  folder.mkdir(parents=True, exist_ok=True)
  ids = {f'{kind}_token_id': said(f'tokenizer.ggml.{key}_token_id')
         for kind, key in (('bos', 'bos'), ('eos', 'eos'), ('pad', 'padding'))}
  config = {'architectures': ['LlamaForCausalLM'], 'model_type': 'llama', 'vocab_size': len(said('tokenizer.ggml.tokens')),
            'hidden_size': width, 'intermediate_size': of('feed_forward_length'), 'num_hidden_layers': of('block_count'),
            'num_attention_heads': heads, 'num_key_value_heads': kv_heads, 'head_dim': width // heads,
            'max_position_embeddings': of('context_length'), 'rms_norm_eps': of('attention.layer_norm_rms_epsilon'),
            'rope_theta': said('llama.rope.freq_base', 10000.0), 'hidden_act': 'silu', 'attention_bias': False,
            'mlp_bias': False, 'tie_word_embeddings': 'lm_head.weight' not in tensors, 'torch_dtype': 'bfloat16', **ids}
  safetensors.numpy.save_file(tensors, folder / 'model.safetensors', metadata={'format': 'pt'})
  _tokenizer(said).save(str(folder / 'tokenizer.json'))
  text = said('tokenizer.ggml.tokens')
  names = {key.removesuffix('_id'): text[i] for key, i in ids.items() if i is not None}
  for file, value in (('config.json', config), ('generation_config.json', ids), ('tokenizer_config.json', {
      'tokenizer_class': 'PreTrainedTokenizerFast', 'chat_template': said('tokenizer.chat_template'),
      'model_max_length': of('context_length'), 'clean_up_tokenization_spaces': False, **names})):
    (folder / file).write_text(json.dumps({k: v for k, v in value.items() if v is not None}, indent=1) + '\n')
  return {'parameters': sum(x.size for x in tensors.values()), 'file': path.name, 'bytes': path.stat().st_size}


def _unpaired(values, heads):
  """Rows of queries and keys in the order of Hugging Face's rotary positions: GGUF has the two of a pair side by side."""
  if heads is None:
    return values
  return values.reshape(heads, values.shape[0] // heads // 2, 2, -1).swapaxes(1, 2).reshape(values.shape)


def _tokenizer(said):
  texts = said('tokenizer.ggml.tokens')
  merges = [tuple(merge.split(' ')) for merge in said('tokenizer.ggml.merges')]
  made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={text: i for i, text in enumerate(texts)}, merges=merges))
  made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
      tokenizers.pre_tokenizers.Digits(individual_digits=True),
      tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
  made.decoder = tokenizers.decoders.ByteLevel()
  special = [text for text, kind in zip(texts, said('tokenizer.ggml.token_type'), strict=True) if kind in _SPECIAL]
  made.add_special_tokens([tokenizers.AddedToken(text, special=True, normalized=False) for text in special])
  return made


def main(argv=None) -> int:
  parser = arguments.Parser(prog='python -m tools.gguf_model', description=__doc__)
  parser.add_argument('file', type=pathlib.Path)
  parser.add_argument('folder', type=pathlib.Path)
  options = parser.parse_args(argv)
  return arguments.run('gguf_model', lambda: print(to_hf(options.file, options.folder)))


if __name__ == '__main__':
  sys.exit(main())
