"""A trained model from wherever it is: a folder in the Hugging Face format, a hub name, or a trainer's work directory.

Of a work directory the best checkpoint on held-out documents is meant, or the newest if none was kept;
`WORKDIR/checkpoints/STEP` names another one. Whatever takes a model, for training, evaluation, export or questions, finds it
here.
"""

import dataclasses
import os
import pathlib
from typing import Any

import jax

from blockattn import blocks as blocks_lib, checkpoint, mesh
from blockattn.data import chat_template, encode
from blockattn.errors import UserError
from blockattn.hf import config as hf_config, convert, files
from blockattn.models import classifier, lora, spec, transformer

CHECKPOINTS, BEST = 'checkpoints', 'best'   # folders of a work directory


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


@dataclasses.dataclass(frozen=True)
class Origin:
  """A model before any of its weights is read.

  Attributes:
    cfg: its architecture, learned sinks included.
    meta: what its blockattn.json or its checkpoint says; empty for a folder of other people.
    folder: in the Hugging Face format, or the work directory.
    step: of a work directory, the checkpoint that is meant; None: the newest.
    is_run: whether it is a work directory.
  """
  cfg: transformer.ModelConfig
  meta: dict
  folder: pathlib.Path
  step: int | None
  is_run: bool

  def read(self, dtype: str, placement: mesh.Placement | None = None) -> Any:
    """Its parameters, those of a LoRA student merged; without a placement on the first device of this process."""
    if self.is_run:
      placement = placement or mesh.Placement(mesh.make_mesh({}, jax.local_devices()[:1]))
      return load_run(self.folder, dtype, placement, self.step)[1]
    if placement is None:
      return convert.load(self.folder, dtype)[1]
    return convert.load(self.folder, dtype, mesh=placement.mesh, rules=placement.rules)[1]

  def check_optimizer(self, like: Any):
    """Raises ValueError if `read_optimizer` would refuse this; reads no values."""
    checkpoint.check_opt_state(self._moments(), like, self.step)

  def read_optimizer(self, like: Any) -> Any:
    """The optimizer's state of a run's checkpoint. `like`: its tree, for shapes and places.

    Raises:
      ValueError: it is no run, or its state is another one.
    """
    return checkpoint.load_opt_state(self._moments(), checkpoint.abstract_like(like), self.step)

  def _moments(self) -> pathlib.Path:
    """The folder of the checkpoints that hold the optimizer's state."""
    if not self.is_run:
      raise UserError(f'{self.folder} is no work directory of a run, and holds no optimizer\'s moments')
    folder = self.folder / CHECKPOINTS
    if self.step is not None and self.step not in checkpoint.steps(folder):
      raise UserError(f'{self.folder}: its best step, {self.step}, is kept without the moments; name one that has them, '
                      f'{folder}/STEP')
    return folder


def find(name: str | os.PathLike) -> Origin:
  """The model of this name: folder, hub name, work directory (see `checkpoint_of`), or WORKDIR/checkpoints/STEP.

  Raises:
    FileNotFoundError, ValueError: naming the file and the key at fault.
  """
  workdir, step = _run_of(name)
  if workdir is not None:
    checkpoints, step = checkpoint_of(workdir, step)
    meta = checkpoint.load_meta(checkpoints, step)
    return Origin(model_of(meta), meta, workdir, step, is_run=True)
  folder = files.locate(name)
  return Origin(hf_config.read(folder), hf_config.read_meta(folder), folder, None, is_run=False)


def is_here(name: str | os.PathLike) -> bool:
  """Whether `find` needs no network."""
  return bool(name) and pathlib.Path(name).expanduser().is_dir()


def _run_of(name) -> tuple[pathlib.Path | None, int | None]:
  """(work directory, the step that is named) of a model's name; (None, None) if it is no run's."""
  path = pathlib.Path(name).expanduser()
  if name and (path / CHECKPOINTS).is_dir():
    return path, None
  if path.parent.name in (CHECKPOINTS, BEST) and path.name.isdecimal() and path.is_dir():
    return path.parent.parent, int(path.name)
  return None, None


def load(path: str | os.PathLike, dtype: str = 'float32', *, template_args: str | None = None,
         chat: bool | None = None) -> Loaded:
  """A model on the first device of this process.

  Args:
    path: see `find`.
    dtype: of the parameters.
    template_args, chat: see `prompts_of`.

  Raises:
    FileNotFoundError, ValueError: naming the file and the key at fault.
  """
  origin = find(path)
  cfg = origin.cfg
  hf_config.check_language_model(cfg, path)
  params = origin.read(dtype)
  options = hf_config.block_options(origin.meta, where=str(path))
  tokenizer, chat = prompts_of(origin.meta, tokenizer_of(path), template_args, chat)
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


def checkpoint_of(workdir: str | os.PathLike, step: int | None = None) -> tuple[pathlib.Path, int | None]:
  """(folder of checkpoints, step) that stands for a run: that step; else the best on held-out documents, if the run kept
  one, else the newest (None)."""
  newest, best = pathlib.Path(workdir) / CHECKPOINTS, pathlib.Path(workdir) / BEST
  kept = checkpoint.steps(best)   # none in the folder of a segmenter, which is a Hugging Face one
  if step is None and kept:
    return best, kept[-1]
  return (best if step in kept and step not in checkpoint.steps(newest) else newest), step


def load_run(workdir: str | os.PathLike, dtype: str, placement: mesh.Placement, step: int | None = None,
             source: str | None = None) -> tuple[transformer.ModelConfig, Any, dict]:
  """(ModelConfig, parameters, meta) of a trainer's checkpoint, a LoRA student merged with the model that it started from.

  Args:
    dtype: of the parameters.
    step: default: see `checkpoint_of`.
    source: of a LoRA run, the model that it started from (`find`), if it is no longer where the run found it.

  Raises:
    FileNotFoundError, ValueError: naming the folder and what it lacks.
  """
  checkpoints, step = checkpoint_of(workdir, step)
  meta = checkpoint.load_meta(checkpoints, step)
  cfg = model_of(meta)
  load_tree = lambda specs, dtype: checkpoint.load_params(checkpoints, spec.abstract(specs, dtype, placement), step)
  if not meta.get('lora'):   # checkpoints from before LoRA do not speak of it
    return cfg, load_tree(classifier.spec(cfg), dtype), meta
  options = lora.LoraOptions(**meta['lora'])
  trained, source = load_tree(lora.spec(cfg, options), 'float32'), source or meta['source']
  try:
    origin = find(source)
    base, facts = convert.read_as_made(lambda dtype: origin.read(dtype, placement), dtype, meta.get('source_weights'))
  except FileNotFoundError as error:
    raise FileNotFoundError(f'{workdir} holds a LoRA student, to be merged with the model that it started from: {error}'
                            ) from error
  if transformer.without_sinks(origin.cfg) != transformer.without_sinks(cfg):
    raise UserError(f'{workdir} holds a LoRA student of another model than {source}: {origin.cfg} there, {cfg} in the '
                    'checkpoint; name the one that it started from')
  convert.check_same_weights(meta.get('source_weights'), facts, f'the LoRA student in {workdir}', source,
                             'name the folder that has them with --source of tools.convert')
  return cfg, jax.tree.map(lambda x: x.astype(dtype), lora.merge(base, trained, options)), meta


def model_of(meta: dict) -> transformer.ModelConfig:
  """The ModelConfig that a checkpoint's meta describes."""
  fields = dict(meta['model'])
  if fields['rope_scaling'] is not None:
    fields['rope_scaling'] = transformer.Llama3Rope(**fields['rope_scaling'])
  return classifier.from_fields(fields)


def tokenizer_of(name: str | os.PathLike) -> str | os.PathLike:
  """Where the tokenizer of a model is: with a folder or hub name it is that; a run's is the one of its training."""
  workdir, step = _run_of(name)
  if workdir is None:
    return name
  if (workdir / 'hf').is_dir():
    return workdir / 'hf'
  if (workdir / 'config.json').is_file():
    said = files.read_json(workdir / 'config.json')
    return tokenizer_of(said['data']['tokenizer'] or said['model']['source'])
  return tokenizer_of(checkpoint.load_meta(*checkpoint_of(workdir, step))['source'])
