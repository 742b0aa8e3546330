"""A LoRA student as an adapter in PEFT's format: the trained difference alone, to be added to the model it started from.

PEFT keeps, beside a matrix [out, in] of torch, `lora_A` [R, in] and `lora_B` [out, R]; the difference is alpha / R times
lora_B lora_A, as ours.
"""

import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from blockattn import metrics
from blockattn.errors import UserError
from blockattn.hf import convert, files, names
from blockattn.models import lora, transformer

WEIGHTS = 'adapter_model.safetensors'


def save(trained: Any, cfg: transformer.ModelConfig, options: lora.LoraOptions, folder: os.PathLike | str, *, base: str,
         source: os.PathLike | str, meta: dict, card: str, dtype: str, overwrite: bool = False) -> None:
  """Writes the adapter, whole or not at all.

  Args:
    trained: tree of lora.spec.
    base: folder or hub name of the model that it adds to, for whoever loads it.
    source: folder whose tokenizer and licence files are copied.
    meta: what blockattn.json shall say about block attention.
    card: text of README.md.
    dtype: of the weights in the file, 'float32' or 'bfloat16'.

  Raises:
    FileExistsError: the folder is not empty.
    ValueError: the student has learned sinks.
  """
  check(cfg, options)
  meta = convert.check_meta(meta, cfg)
  with files.new_folder(pathlib.Path(folder), overwrite) as new:
    files.write_shard(new / WEIGHTS, tensors(jax.device_get(trained), cfg, dtype))
    metrics.write_json(new / files.ADAPTER, to_dict(cfg, options, base))
    files.write_companions(new, pathlib.Path(source), meta, card)


def check(cfg: transformer.ModelConfig, options: lora.LoraOptions | None):
  """Raises ValueError if a student cannot be an adapter."""
  if options is None:
    raise UserError('this run trained every parameter, and has no adapter: export the model, to_hf')
  if cfg.learned_sinks:
    raise UserError(f'this student has {cfg.learned_sinks} learned sinks, embeddings that the model it adds to has not: '
                    'export it merged, to_hf, or train one with blocks.sink_kind=token')


def tensors(trained: Any, cfg: transformer.ModelConfig, dtype: str) -> dict[str, np.ndarray]:
  """PEFT's names -> arrays."""
  found = {}
  for key, slot in names.slots(cfg).items():
    pair = trained['layers'].get(slot.name.removeprefix('layers/'))
    if pair is None:
      continue
    down, up = (np.asarray(pair[side][slot.layer]).astype(jnp.dtype(dtype)) for side in ('down', 'up'))
    rank = up.shape[0]
    module = f'base_model.model.{key.removesuffix(".weight")}'
    found[f'{module}.lora_A.weight'] = np.ascontiguousarray(down.reshape(-1, rank).T)
    found[f'{module}.lora_B.weight'] = np.ascontiguousarray(up.reshape(rank, -1).T)
  return found


def to_dict(cfg: transformer.ModelConfig, options: lora.LoraOptions, base: str) -> dict:
  """The adapter_config.json."""
  modules = {slot.name: key.split('.')[-2] for key, slot in names.slots(cfg).items()}
  return {'peft_type': 'LORA', 'task_type': 'CAUSAL_LM', 'base_model_name_or_path': base, 'r': options.rank,
          'lora_alpha': int(options.alpha) if float(options.alpha).is_integer() else options.alpha, 'lora_dropout': 0.0,
          'target_modules': [modules[f'layers/{name}'] for name in options.targets], 'bias': 'none',
          'fan_in_fan_out': False, 'inference_mode': True}
