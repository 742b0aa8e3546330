"""GGUF files of Llama, Qwen2 and Qwen3, read as the Hugging Face folder of the same model would be.

The package `gguf` dequantizes the weights, one tensor at a time; config, tokenizer and chat template come from the metadata.
What is read fits together before any weight is, or is refused. A file may come in pieces: FILE.gguf.part*, in the order of
their names, or llama.cpp's NAME-00001-of-0000N.gguf, of which one is named.
"""

import contextlib
import dataclasses
import glob
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers
import yaml
from tokenizers import decoders, models, pre_tokenizers, processors

from blockattn import disk, errors, metrics
from blockattn.errors import UserError
from blockattn.hf import card, config, convert, files, names
from blockattn.models import transformer
from blockattn.models.transformer import Llama3Rope, ModelConfig

TYPES = ('F32', 'F16', 'BF16', 'Q8_0', 'Q4_0', 'Q4_1', 'Q5_0', 'Q5_1', 'Q2_K', 'Q3_K', 'Q4_K', 'Q5_K', 'Q6_K')
# How a text is cut before it is merged into tokens: the pattern of numbers, by which the two differ; smollm has no pattern.
NUMBERS = {'smollm': None, 'llama-bpe': r'\p{N}{1,3}', 'qwen2': r'\p{N}'}

_EMBED, _ROPE = 'token_embd.weight', 'rope_freqs.weight'
_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5   # types of tokens
_COUNTS = {'hidden_size': 'embedding_length', 'num_hidden_layers': 'block_count', 'intermediate_size': 'feed_forward_length',
           'num_attention_heads': 'attention.head_count', 'num_key_value_heads': 'attention.head_count_kv',
           'max_position_embeddings': 'context_length'}
_IDS = {'bos': 'bos', 'eos': 'eos', 'pad': 'padding', 'unk': 'unknown'}
_ANEW = "make the file anew with llama.cpp's convert_hf_to_gguf.py, or convert the Hugging Face folder that it was made of"


@dataclasses.dataclass(frozen=True)
class Model:
  """A GGUF file that is open.

  Attributes:
    cfg: its architecture.
    said: its metadata.
    stored: what lies in it, by Hugging Face's name.
    tokenizer: a `tokenizers.Tokenizer`.
    tensors: the reader's, by Hugging Face's name.
    dequantize: (a tensor's data, its type) -> its values, float32.
  """
  cfg: ModelConfig
  said: Mapping[str, Any]
  stored: Mapping[str, files.Stored]
  tokenizer: tokenizers.Tokenizer
  tensors: Mapping[str, Any]
  dequantize: Callable[[Any, Any], np.ndarray]


@contextlib.contextmanager
def opened(path: os.PathLike | str) -> Iterator[Model]:
  """The model in a file.

  Raises:
    FileNotFoundError: there is no such file, or a piece of it is missing.
    ValueError: it is damaged, or something in it is not read here; names the file, the key and the remedy.
    ImportError: the package `gguf` is not installed.
  """
  with tempfile.TemporaryDirectory() as scratch:
    pieces = _pieces(pathlib.Path(path).expanduser(), pathlib.Path(scratch))
    library = errors.library('gguf', f'reading {path}', 'gguf')
    yield _model(library, pieces[0], [_read(library, piece) for piece in pieces])


def load(model: Model, dtype: str, report: convert.Report | None = None, place: convert.Place = convert.on_device) -> Any:
  """The parameter tree, as `convert.load` gives that of a folder."""
  read = lambda slots: ((slot, tensor(model, slot.key)) for slot in slots)
  return convert.assemble(model.cfg, model.stored, read, dtype, place, report)


def tensor(model: Model, key: str) -> np.ndarray:
  """One tensor by its Hugging Face name, float32."""
  x = model.dequantize(model.tensors[key].data, model.tensors[key].tensor_type)
  heads = {'q_proj': model.cfg.heads, 'k_proj': model.cfg.kv_heads}.get(key.split('.')[-2])
  if model.cfg.family != 'llama' or heads is None:
    return x
  # Of Llama, the two rows that are rotated together lie side by side; ours, as Hugging Face's, half a head apart.
  return x.reshape(heads, -1, 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def write_companions(model: Model, folder: pathlib.Path, dtype: str):
  """What lies beside the weights: config, tokenizer, generation config, and a card with the licence."""
  said, texts = model.said, model.said['tokenizer.ggml.tokens']
  ids = {f'{name}_token_id': said.get(f'tokenizer.ggml.{key}_token_id') for name, key in _IDS.items()}
  stops = [i for i in dict.fromkeys((ids['eos_token_id'], said.get('tokenizer.ggml.eot_token_id'))) if i is not None]
  metrics.write_json(folder / 'config.json', config.to_dict(model.cfg, dtype, ids))
  metrics.write_json(folder / 'generation_config.json', _given({
      **{key: ids[key] for key in files.TOKEN_IDS}, 'eos_token_id': stops if len(stops) > 1 else next(iter(stops), None)}))
  model.tokenizer.save(str(folder / 'tokenizer.json'))
  metrics.write_json(folder / 'tokenizer_config.json', _given({
      'tokenizer_class': 'PreTrainedTokenizerFast', 'chat_template': said.get('tokenizer.chat_template'),
      'model_max_length': model.cfg.max_positions, 'clean_up_tokenization_spaces': False,
      **{key.removesuffix('_id'): texts[i] for key, i in ids.items() if i is not None}}))
  head = _given({'license': said.get('general.license'), 'language': said.get('general.languages')})
  (folder / files.CARD).write_text(f'---\n{yaml.safe_dump(head, allow_unicode=True)}---\n', encoding='utf-8')


def to_folder(path: os.PathLike | str, folder: os.PathLike | str, dtype: str | None = None):
  """Writes the model as a Hugging Face folder. `dtype`: None: the one that rounds nothing. Raises as `opened`."""
  with opened(path) as model, tempfile.TemporaryDirectory() as companions:
    source, dtype = pathlib.Path(companions), dtype or convert.dtype_for(convert.dtypes(model.stored))
    write_companions(model, source, dtype)
    meta = {'kind': 'from_hf', 'blocks': None, 'source': pathlib.Path(path).name}
    convert.save(load(model, dtype, place=lambda name, host: host), model.cfg, folder, source=source, meta=meta, dtype=dtype,
                 card=card.text(model.cfg, meta, source))


def make_tokenizer(said: Mapping[str, Any], rows: int, where: str) -> tokenizers.Tokenizer:
  """The tokenizer that the metadata describes, of a model whose embedding has so many rows.

  Raises:
    ValueError: something is missing, or of another length, or the words are split in a way that is not known here.
  """
  texts, kinds, merges, pre = (_need(said, f'tokenizer.ggml.{key}', form, where) for key, form in (
      ('tokens', [str]), ('token_type', [int]), ('merges', [str]), ('pre', str)))
  if pre not in NUMBERS:
    raise UserError(f'{where}: tokenizer.ggml.pre={pre!r} splits words in a way that is not known here (known are '
                    f'{", ".join(NUMBERS)}); convert the Hugging Face folder that the file was made of')
  if not len(texts) == len(kinds) == rows == len(set(texts)):
    raise UserError(f'{where}: tokenizer.ggml.tokens has {len(texts)} entries ({len(set(texts))} different ones), '
                    f'tokenizer.ggml.token_type {len(kinds)}, and {_EMBED} {rows} rows; {_ANEW}')
  for key in said:
    if key.startswith('tokenizer.ggml.') and key.endswith('_token_id'):
      errors.check_number(f'{where}: {key}', _need(said, key, int, where), 0, rows - 1)
  # Behind the tokens come those that fill the embedding up.
  used = max((i for i, kind in enumerate(kinds) if kind != _UNUSED), default=-1) + 1
  try:
    made = tokenizers.Tokenizer(models.BPE(
        vocab={text: i for i, text in enumerate(texts[:used])}, merges=[tuple(merge.split(' ')) for merge in merges],
        ignore_merges=pre == 'llama-bpe'))
  except Exception as error:   # of no other class
    raise UserError(f'{where}: tokenizer.ggml.merges do not fit tokenizer.ggml.tokens '
                    f'({str(error).splitlines()[0]}); {_ANEW}') from error
  if pre == 'qwen2':
    made.normalizer = tokenizers.normalizers.NFC()
  made.pre_tokenizer, made.decoder = _splitter(NUMBERS[pre]), decoders.ByteLevel()
  added = lambda of: [tokenizers.AddedToken(text, special=of == _CONTROL, normalized=False)
                      for text, kind in zip(texts[:used], kinds) if kind == of]
  made.add_special_tokens(added(_CONTROL))
  made.add_tokens(added(_USER_DEFINED))
  bos = said.get('tokenizer.ggml.bos_token_id')
  if said.get('tokenizer.ggml.add_bos_token', pre == 'llama-bpe') and bos is not None:
    made.post_processor = processors.TemplateProcessing(
        single=[texts[bos], '$A'], pair=[texts[bos], '$A', f'{texts[bos]}:1', '$B:1'], special_tokens=[(texts[bos], bos)])
  return made


def _splitter(numbers):
  if numbers is None:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
  pattern = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + numbers +
             r'| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+')
  return pre_tokenizers.Sequence([pre_tokenizers.Split(tokenizers.Regex(pattern), 'isolated'),
                                  pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


# Files.


def _pieces(path, scratch) -> list[pathlib.Path]:
  """The files that one name stands for; parts are put together in `scratch`."""
  found = [path]
  if split := re.fullmatch(r'(.+)-\d{5}-of-(\d{5})\.gguf', path.name):
    found = [path.with_name(f'{split[1]}-{i:05d}-of-{split[2]}.gguf') for i in range(1, int(split[2]) + 1)]
  elif not path.is_file() and (parts := sorted(path.parent.glob(f'{glob.escape(path.name)}.part*'))):
    found = [scratch / path.name]
    with found[0].open('wb') as whole:
      for part in parts:
        with part.open('rb') as piece:
          shutil.copyfileobj(piece, whole)
  for piece in found:
    if not piece.is_file():
      raise FileNotFoundError(f'{piece}: no such file, and no {piece.name}.part* beside it')
  return found


def _read(library, path) -> tuple[dict[str, Any], dict[str, Any]]:
  """(metadata, the reader's tensors by name) of a file."""
  try:
    reader = library.GGUFReader(path)
    if reader.byte_order != 'I':
      raise ValueError('its bytes are in the order of other machines')
    return {key: field.contents() for key, field in reader.fields.items()}, {x.name: x for x in reader.tensors}
  except (ValueError, LookupError, TypeError, OverflowError) as error:
    raise UserError(f'{path} is no whole GGUF file ({error}); get it again, or a newer version of gguf') from error


def _model(library, path, read) -> Model:
  """The model in files that were read, of which the first holds the metadata."""
  said, where = read[0][0], str(path)
  tensors = {name: x for _, part in read for name, x in part.items()}
  if said.get('split.count', 1) != len(read):
    raise UserError(f'{where}: split.count={said["split.count"]!r}, of which {len(read)} is here; give all their own names, '
                    'NAME-00001-of-0000N.gguf, in one folder')
  stored = {name: files.Stored(path, tuple(reversed(x.shape.tolist())), _dtype(x)) for name, x in tensors.items()}
  cfg = _config(said, stored, where)
  if _ROPE in stored:
    cfg = dataclasses.replace(cfg, rope_scaling=_llama3(cfg, tensors[_ROPE].data, where))
    del stored[_ROPE]
  known = library.get_tensor_name_map(library.MODEL_ARCH[cfg.family.upper()], cfg.layers)
  slots = {known.get_name(key, try_suffixes=('.weight', '.bias')): slot for key, slot in names.slots(cfg).items()}
  try:
    convert.check_stored(slots, stored, path, 'the metadata', TYPES)
  except UserError as error:
    raise UserError(f'{error}; {_ANEW}') from error
  key_of = {name: slot.key for name, slot in slots.items()}
  return Model(cfg, said, {key_of[name]: at for name, at in stored.items()}, make_tokenizer(said, cfg.vocab, where),
               {key_of[name]: tensors[name] for name in stored}, library.dequantize)


def _dtype(x) -> str:
  """The type of a tensor; norms and biases are float32 whatever they were, so that the numbers say whether it was more."""
  name = x.tensor_type.name
  return 'BF16' if name == 'F32' and x.data.ndim == 1 and not (x.data.view(np.uint32) & 0xffff).any() else name


# Metadata.


def _need(said, key, form, where, default=None) -> Any:
  if key not in said and default is None:
    raise UserError(f'{where}: {key} is missing; {_ANEW}')
  disk.check_form(said.get(key, default), form, f'{where}: {key}')
  return said.get(key, default)


def _config(said, stored, where) -> ModelConfig:
  """The architecture, as `config.from_dict` checks it; without the scaling of Llama 3, which a tensor says."""
  family = said.get('general.architecture')
  if family not in config.ARCHITECTURES:
    raise UserError(f'{where}: general.architecture={family!r}; read are {", ".join(config.ARCHITECTURES)}: name a model of '
                    'these')
  need = lambda key, form, default=None: _need(said, f'{family}.{key}', form, where, default)
  scaled = {key: value for key, value in said.items()
            if key.startswith(f'{family}.rope.scal') and value not in ('none', 0, 1)}
  if scaled:
    raise UserError(f'{where}: {scaled} is not computed here; read are positions as they are, and those of Llama 3 '
                    f'({_ROPE}): name a file of the model without it')
  raw = {key: need(name, int) for key, name in _COUNTS.items()}
  errors.check_number(f'{where}: {family}.block_count', raw['num_hidden_layers'], 1, len(stored),
                      hint=f', as it has that many tensors; {_ANEW}')
  head_dim = need('attention.key_length', int, raw['hidden_size'] // max(raw['num_attention_heads'], 1))
  turned = need('rope.dimension_count', int, head_dim)
  return config.from_dict(raw | {
      'model_type': family, 'vocab_size': (stored[_EMBED].shape if _EMBED in stored else (1,))[0], 'head_dim': head_dim,
      'rms_norm_eps': _shortest(need('attention.layer_norm_rms_epsilon', disk.NUMBER)),
      'rope_theta': _shortest(need('rope.freq_base', disk.NUMBER, config.LLAMA_THETA)),
      'partial_rotary_factor': turned / max(head_dim, 1), 'tie_word_embeddings': 'output.weight' not in stored,
      'attention_bias': 'blk.0.attn_q.bias' in stored, 'mlp_bias': 'blk.0.ffn_gate.bias' in stored}, where)


def _shortest(x: float) -> float:
  """The number that was meant: 1e-5 has become the float32 next to it."""
  return float(str(np.float32(x)))


def _llama3(cfg: ModelConfig, factors: Sequence[float], where: str) -> Llama3Rope:
  """The scaling of which a file has only what it divides each frequency by. All of Llama 3's differ in one number.

  Raises:
    ValueError: it is none of theirs.
  """
  scaling = Llama3Rope(float(np.max(factors)), 1.0, 4.0, 8192)
  plain, scaled = (np.asarray(transformer.rotary_frequencies(dataclasses.replace(cfg, rope_scaling=s)))
                   for s in (None, scaling))
  if np.shape(factors) != plain.shape or not np.allclose(plain / scaled, factors, rtol=1e-4):
    raise UserError(f'{where}: {_ROPE} is not that of a Llama 3 (low_freq_factor 1, high_freq_factor 4, 8192 positions); '
                    'convert the Hugging Face folder that the file was made of')
  return scaling


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
  return {key: value for key, value in values.items() if value is not None}
