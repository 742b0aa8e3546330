"""A trained model from wherever it is: a folder in the Hugging Face format, a hub name, or a trainer's work directory."""

import dataclasses
import os
import pathlib
from typing import Any

import jax

from blockattn import blocks as blocks_lib, checkpoint, mesh, tree
from blockattn.data import chat_template, encode
from blockattn.errors import UserError
from blockattn.hf import config as hf_config, convert, files
from blockattn.models import classifier, lora, spec, transformer


@dataclasses.dataclass(frozen=True)
class Loaded:
  """A language model and all that is needed to ask it.

  Attributes:
    cfg: its architecture.
    params: its parameters, those of a LoRA student merged.
    tokenizer: fast tokenizer of transformers.
    blocks: sinks and positions of block mode, as in training; of a model that never saw blocks, none and sequential.
    chat: whether its prompts are put into the tokenizer's chat template.
    stop_ids: tokens that end an answer.
  """
  cfg: transformer.ModelConfig
  params: Any
  tokenizer: Any
  blocks: blocks_lib.BlockOptions
  chat: bool
  stop_ids: tuple[int, ...]


def load(path: str | os.PathLike, dtype: str = 'float32', *, template_args: str | None = None,
         chat: bool | None = None) -> Loaded:
  """A model on the first device of this process.

  Args:
    path: folder, hub name, or work directory, of which the newest checkpoint is taken.
    dtype: of the parameters.
    template_args, chat: see `prompts_of`.

  Raises:
    FileNotFoundError, ValueError: naming the file and the key at fault.
  """
  workdir = pathlib.Path(path)
  if (workdir / 'checkpoints').is_dir():
    hf_config.check_language_model(model_of(checkpoint.load_meta(workdir / 'checkpoints')), workdir)
    cfg, params, meta = load_run(workdir, dtype, mesh.Placement(mesh.make_mesh({}, jax.local_devices()[:1])))
    source = tokenizer_of(workdir, meta)
  else:
    source = files.locate(path)
    hf_config.check_language_model(hf_config.read(source), source)
    cfg, params = convert.load(source, dtype)
    meta = hf_config.read_meta(source)
  options = hf_config.block_options(meta, where=str(path))
  tokenizer, chat = prompts_of(meta, source, template_args, chat)
  encode.check_tokenizer(tokenizer, cfg.vocab, str(path), cfg.learned_sinks)
  encode.check_ids(options.own_ids, cfg.vocab + cfg.learned_sinks, tokenizer, f'{path}: sinks')
  return Loaded(cfg, params, tokenizer, options, chat, files.stop_ids(tokenizer.name_or_path, tokenizer.eos_token_id))


def prompts_of(meta: dict, tokenizer: str | os.PathLike, template_args: str | None = None,
               chat: bool | None = None) -> tuple[Any, bool]:
  """(tokenizer, whether prompts get its chat template) of a model: as said, else as in its training, else if its tokenizer
  has one.

  Args:
    meta: what the model's folder or checkpoint says.
    tokenizer: folder or hub name.
  """
  trained = meta.get('prompt') or {}
  loaded = encode.load_tokenizer(tokenizer, trained.get('template_args', '') if template_args is None else template_args)
  return loaded, chat_template.wants_chat(trained.get('chat') if chat is None else chat, loaded)


# Work directories.


def load_run(workdir: str | os.PathLike, dtype: str, placement: mesh.Placement, step: int | None = None,
             source: str | None = None) -> tuple[transformer.ModelConfig, Any, dict]:
  """(ModelConfig, parameters, meta) of a trainer's checkpoint, a LoRA student merged with the model that it started from.

  Args:
    dtype: of the parameters.
    step: default: the newest.
    source: of a LoRA run, the model that it started from, if it is no longer where the run found it.

  Raises:
    FileNotFoundError, ValueError: naming the folder and what it lacks.
  """
  checkpoints = pathlib.Path(workdir) / 'checkpoints'
  meta = checkpoint.load_meta(checkpoints, step)
  cfg = model_of(meta)
  load_tree = lambda specs, dtype: checkpoint.load_params(checkpoints, spec.abstract(specs, dtype, placement), step)
  if not meta.get('lora'):   # checkpoints from before LoRA do not speak of it
    return cfg, load_tree(classifier.spec(cfg), dtype), meta
  options = lora.LoraOptions(**meta['lora'])
  trained, source = load_tree(lora.spec(cfg, options), 'float32'), source or meta['source']
  try:
    base_cfg, base = _load_base(source, dtype, placement, meta.get('source_weights'))
  except FileNotFoundError as error:
    raise FileNotFoundError(f'{workdir} holds a LoRA student, to be merged with the model that it started from: {error}'
                            ) from error
  if base_cfg != dataclasses.replace(cfg, learned_sinks=0):
    raise UserError(f'{workdir} holds a LoRA student of another model than {source}: {base_cfg} there, {cfg} in the '
                    'checkpoint; name the one that it started from')
  convert.check_same_weights(meta.get('source_weights'), convert.weights_facts(base), f'the LoRA student in {workdir}',
                             source, 'name the folder that has them with --source of tools.convert')
  return cfg, jax.tree.map(lambda x: x.astype(dtype), lora.merge(base, trained, options)), meta


def _load_base(source, dtype, placement, said):
  """(ModelConfig, parameters) that a LoRA student adds to."""
  load_in = lambda dtype: convert.load(source, dtype, mesh=placement.mesh, rules=placement.rules)
  cfg, params = load_in(dtype)
  if said and said['dtype'] != dtype and tree.fingerprint(params) != said['fingerprint']:
    return load_in(said['dtype'])   # of float32 weights, one of the two was rounded: compared as in training
  return cfg, params


def model_of(meta: dict) -> transformer.ModelConfig:
  """The ModelConfig that a checkpoint's meta describes."""
  fields = dict(meta['model'])
  if fields['rope_scaling'] is not None:
    fields['rope_scaling'] = transformer.Llama3Rope(**fields['rope_scaling'])
  return classifier.from_fields(fields)


def tokenizer_of(workdir: pathlib.Path, meta: dict) -> str | pathlib.Path:
  """Where a run's tokenizer is: as in training."""
  if (workdir / 'hf').is_dir():
    return workdir / 'hf'
  if (workdir / 'config.json').is_file():
    said = files.read_json(workdir / 'config.json')
    return said['data']['tokenizer'] or said['model']['source']
  return meta['source']
