"""config.json <-> ModelConfig.

Reading takes the keys of transformers 5 (`rope_parameters`, `dtype`) and of transformers 4 (`rope_theta`,
`rope_scaling`, `torch_dtype`); writing writes both, so that older serving code reads the export too. What the model
code does not compute is refused by name before any weight is read.
"""

import dataclasses
import os
import pathlib
from typing import Any

from blockattn import disk, errors
from blockattn.blocks import BlockOptions
from blockattn.errors import UserError
from blockattn.hf import files
from blockattn.models.classifier import ClassifierConfig
from blockattn.models.transformer import Llama3Rope, ModelConfig

ARCHITECTURES = {'qwen3': 'Qwen3ForCausalLM', 'qwen2': 'Qwen2ForCausalLM', 'llama': 'LlamaForCausalLM'}
CLASSIFIERS = {'qwen3': 'Qwen3ForTokenClassification', 'qwen2': 'Qwen2ForTokenClassification',
               'llama': 'LlamaForTokenClassification'}

# Key -> the values that change nothing, and what to tell whoever has another one.
HARMLESS = {
    'hidden_act': ((None, 'silu', 'swish'), "supported is 'silu'"),
    'use_sliding_window': ((None, False), 'supported is full attention only (false)'),
    'partial_rotary_factor': ((None, 1), 'supported is rotary over whole heads (1.0)'),
    'quantization_config': ((None,), 'supported are float32, bfloat16 and float16 weights; dequantize them first'),
    'num_experts': ((None, 0), 'supported are dense models only'),
    'num_local_experts': ((None, 0), 'supported are dense models only'),
    'attn_logit_softcapping': ((None,), 'supported are plain softmax logits'),
    'final_logit_softcapping': ((None,), 'supported are plain logits'),
    'is_encoder_decoder': ((None, False), 'supported are decoders only'),
    'auto_map': ((None,), 'code of a checkpoint is never run; remove the key if the model is plain Qwen or Llama'),
}

SINKS_STAND = 'in front of every block'   # part of what an export says of its blocks
# Fields of BlockOptions that older students do not speak of.
LATER = {'shared_first': bool, 'tail_ids': [int], 'links': bool, 'seam': int, 'align': int, 'hide_starts': bool,
         'overlap': int}

LLAMA_THETA = 10000.0   # of configs from before the key
# Keys that count something, and may not say 0.
COUNTS = ('vocab_size', 'hidden_size', 'num_hidden_layers', 'num_attention_heads', 'num_key_value_heads', 'head_dim',
          'intermediate_size', 'max_position_embeddings', 'unit_tokens')

LLAMA3_KEYS = {'factor': 'factor', 'low_freq_factor': 'low_freq_factor', 'high_freq_factor': 'high_freq_factor',
               'original_max_position_embeddings': 'original_length'}


def read(folder: os.PathLike | str) -> ModelConfig:
  """The architecture of a Hugging Face folder, learned sinks (see `convert.save`) included, or of one of wrappers
  (`convert.save_wrappers`); of a token-classification model a `ClassifierConfig`.

  Raises:
    FileNotFoundError: no config.json.
    ValueError: naming the file, key and value that is missing, malformed or unsupported.
  """
  files.check_kind(pathlib.Path(folder))
  if (pathlib.Path(folder) / files.WRAPPERS).exists():
    return _read_wrapped(pathlib.Path(folder))
  path = pathlib.Path(folder) / 'config.json'
  cfg = from_dict(files.read_json(path), str(path))
  meta = read_meta(folder)
  if not meta:
    return cfg
  where = str(pathlib.Path(folder) / files.META)
  sinks = _require(meta, 'learned_sinks', int, where)
  if not 0 <= sinks < cfg.vocab:
    raise UserError(f'{where}: learned_sinks is {sinks}, of {cfg.vocab} rows of the embedding')
  return dataclasses.replace(cfg, vocab=cfg.vocab - sinks, learned_sinks=sinks)


def _read_wrapped(folder):
  """The architecture of the model that wrappers stand beside, with rows for them."""
  meta = read_meta(folder)
  disk.check_form(meta, {'source': str, 'learned_sinks': int}, str(folder / files.META))
  return dataclasses.replace(read(files.locate(meta['source'])), learned_sinks=meta['learned_sinks'])


def read_meta(folder: os.PathLike | str) -> dict:
  """What blockattn.json of an exported folder says (sinks, positions, teacher, ...); empty for other folders."""
  path = pathlib.Path(folder) / files.META
  return files.read_json(path) if path.exists() else {}


def block_options(meta: dict, where: str = files.META) -> BlockOptions:
  """Sinks and positions that a student was trained with, from what its blockattn.json says (`read_meta`).

  A model that was never trained with blocks, so that "blocks" is missing or null, reads without sinks.

  Raises:
    ValueError: naming `where` and the keys that are needed; or the student is one of before `SINKS_STAND`, whose first
      block had no sinks.
  """
  said = meta['blocks'] if 'blocks' in meta else None
  if said is None:
    return BlockOptions(sink_ids=(), positions='sequential', max_blocks=1)
  form = {'sink_ids': [int], 'positions': str, 'max_blocks': int} | {key: kind for key, kind in LATER.items() if key in said}
  disk.check_form(said, form, f'{where}: "blocks"')
  try:
    fields: dict[str, Any] = {key: tuple(said[key]) if kind == [int] else said[key] for key, kind in form.items()}
    options = BlockOptions(**fields)
  except ValueError as error:
    raise UserError(f'{where}: "blocks": {error}') from error
  if options.sink_ids and said.get('sinks_stand') != SINKS_STAND:
    raise UserError(f'{where}: this student was trained with sinks in front of every block but the first; now they '
                    'stand in front of every block. Train it again, or read it with the version of blockattn that made it')
  return options


def blocks_meta(options: BlockOptions) -> dict:
  """What `block_options` reads back."""
  return dataclasses.asdict(options) | {'sinks_stand': SINKS_STAND}


def from_dict(raw: dict, where: str = 'config.json') -> ModelConfig:
  """The architecture described by a config.json; of a token-classification model a `ClassifierConfig`.

  Args:
    raw: the parsed file.
    where: its path, for error messages.

  Raises:
    ValueError: a key is missing, has the wrong type, or a value that is not supported.
  """
  family = _require(raw, 'model_type', str, where)
  if family not in ARCHITECTURES:
    raise _unsupported(where, 'model_type', family, f'supported are {", ".join(ARCHITECTURES)}')
  _check_harmless(raw, where)
  need = lambda key: _require(raw, key, int, where)
  # Absent keys mean what they mean to transformers' class; where its guess would be a gamble, the key is required.
  _check_ranges(raw, where)
  heads, width = need('num_attention_heads'), need('hidden_size')
  theta, scaling = _rope(raw, where)
  classes = {'labels': _labels(raw, where)} if CLASSIFIERS[family] in (raw.get('architectures') or ()) else {}
  if classes and raw.get('unit_tokens') is not None:
    classes['unit_tokens'] = need('unit_tokens')
  return _named(
      where, family=family, vocab=need('vocab_size'), width=width, layers=need('num_hidden_layers'), heads=heads,
      kv_heads=heads if family == 'llama' and raw.get('num_key_value_heads') is None else need('num_key_value_heads'),
      head_dim=width // heads if family != 'qwen3' and raw.get('head_dim') is None else need('head_dim'),
      mlp=need('intermediate_size'), norm_eps=_require(raw, 'rms_norm_eps', float, where),
      rope_theta=theta, rope_scaling=scaling,
      qk_norm=family == 'qwen3', attention_bias=family == 'qwen2' or _flag(raw, 'attention_bias', where),
      mlp_bias=family == 'llama' and _flag(raw, 'mlp_bias', where), tied=_flag(raw, 'tie_word_embeddings', where),
      max_positions=need('max_position_embeddings'), **classes)


def _check_ranges(raw, where):
  for key in COUNTS:
    if raw.get(key) is not None:
      errors.check_number(f'{where}: {key}', _require(raw, key, int, where), 1)
  errors.check_number(f'{where}: rms_norm_eps', _require(raw, 'rms_norm_eps', float, where), above=0)


def _named(where, **fields):
  """The config; what it refuses is said with the file's name."""
  try:
    return (ClassifierConfig if 'labels' in fields else ModelConfig)(**fields)
  except ValueError as error:
    raise UserError(f'{where}: {error}') from error


def check_language_model(cfg: ModelConfig, name: os.PathLike | str):
  """Raises ValueError of a segmenter, or another model that gives classes instead of next tokens."""
  if isinstance(cfg, ClassifierConfig):
    raise UserError(f'{name} is a segmenter ({architecture(cfg)}): it cuts texts, see tools.segment and --segmenter, and '
                    f'predicts no tokens; name a model of {ARCHITECTURES[cfg.family]}')


def _labels(raw, where):
  """Classes of a token-classification head; transformers says two if the file says nothing."""
  if raw.get('id2label') is not None:
    return len(_require(raw, 'id2label', dict, where))
  return 2 if raw.get('num_labels') is None else _require(raw, 'num_labels', int, where)


def architecture(cfg: ModelConfig) -> str:
  """The Hugging Face class of this architecture."""
  return (CLASSIFIERS if isinstance(cfg, ClassifierConfig) else ARCHITECTURES)[cfg.family]


def to_dict(cfg: ModelConfig, dtype: str, token_ids: dict) -> dict:
  """The config.json of this architecture.

  Args:
    cfg: architecture; its learned sinks count as vocabulary.
    dtype: of the weights beside it, 'bfloat16' or 'float32'.
    token_ids: bos_token_id, eos_token_id and pad_token_id, each int, list or None. They are written even if None:
      the Llama class would otherwise assume 1 and 2.

  Raises:
    ValueError: the family's Hugging Face class has no such architecture.
  """
  check_exportable(cfg)
  out = {
      'architectures': [architecture(cfg)], 'model_type': cfg.family, 'dtype': dtype, 'torch_dtype': dtype,
      'vocab_size': cfg.vocab + cfg.learned_sinks, 'hidden_size': cfg.width, 'num_hidden_layers': cfg.layers,
      'num_attention_heads': cfg.heads, 'num_key_value_heads': cfg.kv_heads, 'head_dim': cfg.head_dim,
      'intermediate_size': cfg.mlp, 'hidden_act': 'silu', 'rms_norm_eps': cfg.norm_eps,
      'max_position_embeddings': cfg.max_positions, 'attention_dropout': 0.0,
      'tie_word_embeddings': cfg.tied, 'initializer_range': 0.02, 'use_cache': True, **_rope_to_dict(cfg),
      **{key: token_ids[key] for key in files.TOKEN_IDS}}
  if isinstance(cfg, ClassifierConfig):
    names = {i: f'LABEL_{i}' for i in range(cfg.labels)}
    out |= {'id2label': {str(i): name for i, name in names.items()}, 'label2id': {name: i for i, name in names.items()},
            **({'unit_tokens': cfg.unit_tokens} if cfg.unit_tokens else {})}
  if cfg.family != 'qwen2':   # whose class has no switch: q, k and v have a bias
    out |= {'attention_bias': cfg.attention_bias}
  if cfg.family == 'llama':
    return out | {'mlp_bias': cfg.mlp_bias}
  return out | {'use_sliding_window': False, 'sliding_window': None, 'max_window_layers': cfg.layers}


def check_exportable(cfg: ModelConfig):
  """Raises ValueError, naming the field, if the family's Hugging Face class cannot express the architecture."""
  family = cfg.family
  if cfg.qk_norm != (family == 'qwen3'):
    raise UserError(f'qk_norm={cfg.qk_norm} does not exist in {ARCHITECTURES[family]}; export it as '
                    f"family={'llama' if family == 'qwen3' else 'qwen3'!r}")
  if family == 'qwen2' and not cfg.attention_bias:
    raise UserError("attention_bias=False does not exist in Qwen2ForCausalLM; export it as family='llama'")
  if family != 'llama' and cfg.mlp_bias:
    raise UserError(f"mlp_bias=True does not exist in {ARCHITECTURES[family]}; supported by family='llama' only")
  if family == 'llama' and cfg.width % cfg.heads:
    raise UserError(f'LlamaForCausalLM refuses width {cfg.width} that is no multiple of heads {cfg.heads}')


def _check_harmless(raw, where):
  for key, (allowed, supported) in HARMLESS.items():
    if raw.get(key) not in allowed:
      raise _unsupported(where, key, raw[key], supported)
  kinds = set(raw.get('layer_types') or ()) - {'full_attention'}
  if kinds:
    raise _unsupported(where, 'layer_types', sorted(kinds), "supported is 'full_attention' in every layer")


def _rope(raw, where):
  """(theta, scaling), from whichever of the three keys are there; they must not contradict each other."""
  said = {key: _rope_dict(raw[key], f'{where}: {key}') for key in ('rope_parameters', 'rope_scaling') if raw.get(key)}
  thetas = {key: theta for key, (theta, _) in said.items() if theta is not None}
  if raw.get('rope_theta') is not None:
    thetas['rope_theta'] = _require(raw, 'rope_theta', float, where)
  scalings = {key: scaling for key, (_, scaling) in said.items()}
  if len(set(thetas.values())) > 1 or len(set(scalings.values())) > 1:
    raise UserError(f'{where}: the rotary keys contradict each other: theta {thetas}, scaling {scalings}; keep one')
  if not thetas and raw['model_type'] == 'llama':
    thetas['rope_theta'] = LLAMA_THETA
  if not thetas:
    raise UserError(f'{where}: key rope_theta is missing (or rope_parameters with a rope_theta)')
  errors.check_number(f'{where}: rope_theta', min(thetas.values()), above=0)
  return next(iter(thetas.values())), next(iter(scalings.values()), None)


def _rope_dict(rope, where):
  """(theta or None, Llama3Rope or None) of one `rope_parameters` or `rope_scaling` value."""
  if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
    raise UserError(f'{where}={rope!r} is not supported; supported is one flat set of rotary keys for all layers')
  theta = None if rope.get('rope_theta') is None else _require(rope, 'rope_theta', float, where)
  kind = rope.get('rope_type') or rope.get('type') or 'default'
  if kind not in ('default', 'llama3'):
    raise _unsupported(where, 'rope_type', kind, 'supported are default and llama3')
  if rope.get('partial_rotary_factor') not in (None, 1):
    supported = HARMLESS['partial_rotary_factor'][1]
    raise _unsupported(where, 'partial_rotary_factor', rope['partial_rotary_factor'], supported)
  own = set(LLAMA3_KEYS) if kind == 'llama3' else set()
  unknown = set(rope) - own - {'rope_type', 'type', 'rope_theta', 'partial_rotary_factor'}
  if unknown:
    raise UserError(f'{where}: keys {sorted(unknown)} are not supported with rope_type {kind!r}')
  if kind == 'default':
    return theta, None
  numbers = {field: _require(rope, key, float, where) for key, field in LLAMA3_KEYS.items()}
  for key, field in LLAMA3_KEYS.items():
    errors.check_number(f'{where}: {key}', numbers[field], above=0)
  length = numbers.pop('original_length')
  if not length.is_integer():
    raise UserError(f'{where}: original_max_position_embeddings={length} is no whole number')
  return theta, Llama3Rope(**numbers, original_length=int(length))


def _rope_to_dict(cfg):
  scaling = None
  if cfg.rope_scaling is not None:
    scaling = {'rope_type': 'llama3', **{key: getattr(cfg.rope_scaling, field) for key, field in LLAMA3_KEYS.items()}}
  return {'rope_parameters': {**(scaling or {'rope_type': 'default'}), 'rope_theta': cfg.rope_theta},
          'rope_theta': cfg.rope_theta, 'rope_scaling': scaling}


def _require(raw, key, kind, where):
  if raw.get(key) is None:
    raise UserError(f'{where}: key {key} is missing')
  value = raw[key]
  accepted = (int, float) if kind is float else kind
  if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
    raise UserError(f'{where}: {key}={value!r} should be of type {kind.__name__}')
  return kind(value)


def _flag(raw, key, where):
  """A switch; absent is false, as in both classes."""
  return raw.get(key) is not None and _require(raw, key, bool, where)


def _unsupported(where, key, value, supported):
  return ValueError(f'{where}: {key}={value!r} is not supported; {supported}')
