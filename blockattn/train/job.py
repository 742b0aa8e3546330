"""From a config to a training: `read` makes options of it, a trainer's `build` makes a `Job` of them, `train` runs it.

Reading touches no device and no file, and makes every check that needs neither. Building takes a placement, whose devices
need not exist, and gives functions and shapes; tools.show and ahead-of-time compiling stop there. What is left, loading and
placing parameters, is done by the functions below `Loading`.
"""

import dataclasses
import importlib.util
import pathlib
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AbstractMesh, AxisType

from blockattn import blocks, checkpoint, disk, errors, loading, mesh as mesh_lib, optim, options as options_lib, trace, tree
from blockattn.data import encode, packing
from blockattn.errors import UserError
from blockattn.hf import config as hf_config, convert
from blockattn.kernels import api, tiles
from blockattn.models import classifier, flops, lora, sizes, spec as spec_lib, transformer
from blockattn.models.lora import LoraOptions  # `lora` names a field below
from blockattn.train import export, held_out, inputs, loop, workdir as workdir_lib

DTYPES = ('float32', 'bfloat16')
# Tokens of a row whose logits exist at a time: a chunk with one loss token costs as much as a full one, answers are short.
CHUNK = 128
SINK_KINDS = ('token', 'learned')
TAIL_KINDS = ('block', 'link')
TRAIN_ONLY = ('', 'wrappers')
SINK_TEXTS = ('\n', '\n\n', ' ', '.', ',')
_FROM_1 = ('vocab', 'width', 'layers', 'heads', 'kv_heads', 'head_dim', 'mlp', 'max_positions')


# Options.


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions:
  """
  Attributes:
    source: Hugging Face folder or hub name, or work directory of a run, see loading.find; empty: random values of the
      size below
    size: a name in blockattn/models/sizes.py; empty: all fields below
    fields: of ModelConfig, replacing those of the size
    dtype: of the trained parameters and the optimizer: float32, bfloat16
    keep_moments: source is a work directory whose optimizer's moments are gone on with, too
    train_only: 'wrappers': learned sinks and tails, beside frozen weights; empty: everything, or as lora says
  """
  source: str = ''
  size: str = ''
  fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  dtype: str = 'float32'
  keep_moments: bool = False
  train_only: str = ''

  def __post_init__(self):
    errors.check_choice('config.model.dtype', self.dtype, DTYPES)
    errors.check_choice('config.model.train_only', self.train_only, TRAIN_ONLY)
    if self.keep_moments and not self.source:
      raise UserError('config.model.keep_moments goes on with the moments of a run: config.model.source names none')
    limits: dict[str, dict[str, Any]] = dict.fromkeys(_FROM_1, {'low': 1}) | {'learned_sinks': {'low': 0}} | dict.fromkeys(
        ('norm_eps', 'rope_theta'), {'above': 0})
    for name in self.fields.keys() & limits.keys():
      errors.check_number(f'config.model.fields.{name}', self.fields[name], **limits[name])
    if self.fields or self.size:
      architecture(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshOptions:
  """Sizes of the mesh's axes; -1: all devices that are left.

  Attributes:
    data: data parallelism, of copies of the parameters
    fsdp: data parallelism, of parameters that are cut over the devices
    tensor: tensor parallelism: heads, mlp and vocabulary are cut
    context: context parallelism: the tokens of a row are cut
  """
  data: int = -1
  fsdp: int = 1
  tensor: int = 1
  context: int = 1

  def __post_init__(self):
    for axis, size in self.sizes.items():
      if size != -1:
        errors.check_number(f'config.mesh.{axis}', size, 1, hint=', or -1: all devices that are left')

  @property
  def sizes(self) -> dict[str, int]:
    return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockModeOptions:
  """
  Attributes:
    sinks: sink tokens in front of every block
    sink_kind: 'token': an existing one; 'learned': new embedding rows
    sink_text: the token of kind 'token', and where learned ones start; empty: the line end
    positions: 'sequential', or 'local': every context block starts at 0
    tails: learned tokens behind every block but the last
    tail_kind: 'block': they are part of the block in front of them (KV Packet); 'link': they read all before them (KVLink)
    seam: first tokens of a context block that are read again behind the blocks before it, at most
    seam_drawn: each step has its own number of them, from 0 to seam; else it is always seam
    align: blocks but the last are made a multiple of so many tokens by more sinks; serving engines' pages have 16
    hide_starts: sinks of a context block but the first, or without any its first token, are read by their own block alone
    overlap: last tokens of the block before, which a context block reads first and no other sees, if the row says that it
      goes on with that one's text
  """
  sinks: int = 0
  sink_kind: str = 'token'
  sink_text: str = ''
  positions: str = 'sequential'
  tails: int = 0
  tail_kind: str = 'block'
  seam: int = 0
  seam_drawn: bool = True
  align: int = 1
  hide_starts: bool = True
  overlap: int = 0

  def __post_init__(self):
    for name in ('sinks', 'tails', 'seam', 'overlap'):
      errors.check_number(f'config.blocks.{name}', getattr(self, name), 0, 1024)
    if self.overlap and not self.hide_starts:
      raise UserError(f'config.blocks.overlap={self.overlap} is hidden as starts are, and config.blocks.hide_starts is '
                      'false: set it true, or the overlap to 0')
    errors.check_number('config.blocks.align', self.align, 1, 1024)
    errors.check_choice('config.blocks.tail_kind', self.tail_kind, TAIL_KINDS)
    if self.align > 1 and not self.sinks:
      raise UserError(f'config.blocks.align={self.align} fills blocks up with sinks: config.blocks.sinks is 0')
    if (self.sink_kind == 'learned' or self.sink_text and not self.tails) and not self.sinks:
      raise UserError(f'config.blocks.sink_kind={self.sink_kind!r}, sink_text={self.sink_text!r}: there are no sinks, '
                      'config.blocks.sinks is 0')
    errors.check_choice('config.blocks.sink_kind', self.sink_kind, SINK_KINDS)
    errors.check_choice('config.blocks.positions', self.positions, blocks.POSITION_SCHEMES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """What every trainer reads.

  Attributes:
    seed: first values, order of the data, block dropout; 0 to 4294967295
    steps: optimizer steps
    batch: rows of a global batch
    accumulate: gradient accumulation: slices that a batch is computed in, one after the other
    log_every: steps between two lines of metrics
    save_every: steps between two checkpoints
    keep: checkpoints to keep
    peak_tflops: of a device, for MFU; 0: known by its kind, and no MFU where it is not (CPUs)
    profile: steps whose trace is written into WORKDIR/profile: '10:15' are 10 to 14
    wandb: project of Weights & Biases (extra `log`); empty: none
    model: what is trained
    compute: how it is computed, see transformer.Compute
    mesh: sizes of the mesh's axes; -1: all that is left
    rules: logical axis -> mesh axes
    optim: see optim.OptimConfig
    data: what is read
  """
  seed: int = 0
  steps: int = 1000
  batch: int = 16
  accumulate: int = 1
  log_every: int = 10
  save_every: int = 500
  keep: int = 2
  peak_tflops: float = 0.0
  profile: str = ''
  wandb: str = ''
  model: ModelOptions
  compute: transformer.Compute
  mesh: MeshOptions
  rules: tuple = mesh_lib.RULES
  optim: optim.OptimConfig
  data: inputs.DataOptions

  def __post_init__(self):
    errors.check_number('config.seed', self.seed, 0, below=2 ** 32)   # JAX reads 32 bits, and would take 2 ** 32 for 0
    for name in ('steps', 'batch', 'accumulate', 'log_every', 'save_every', 'keep'):
      errors.check_number(f'config.{name}', getattr(self, name), 1)
    # What a step reads is numbered in 32 bits.
    errors.check_number('config.batch * config.data.length', self.batch * self.data.length, 1, 2 ** 31 - 1,
                        hint=' tokens of a step')
    errors.check_number('config.peak_tflops', self.peak_tflops, 0,
                        hint=', the TFLOP/s of a device; 0: as its kind says')
    errors.check_choice('config.compute.dtype', self.compute.dtype, DTYPES)
    errors.check_choice('config.compute.impl', self.compute.impl, ('auto', *api.IMPLS))
    trace.parse_steps(self.profile, self.steps)
    if self.wandb and importlib.util.find_spec('wandb') is None:
      raise UserError(f'config.wandb={self.wandb!r} needs Weights & Biases: pip install "blockattn[log]"')


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptOptions(Options):
  """What the trainers of language models read, too.

  Attributes:
    chunk: tokens per row whose logits exist at a time
    export_every: steps between two exports to WORKDIR/exports/step_N, Hugging Face folders; 0: none
    blocks: block mode, see blocks.BlockOptions
    eval: measuring on data.eval_files while it trains
    lora: see lora.LoraOptions
  """
  chunk: int = CHUNK
  export_every: int = 0
  blocks: BlockModeOptions
  data: inputs.PromptData
  eval: held_out.EvalOptions
  lora: LoraOptions

  def __post_init__(self):
    super().__post_init__()
    errors.check_number('config.chunk', self.chunk, 1)
    errors.check_number('config.export_every', self.export_every, 0)
    if not self.data.eval_files and (self.eval.best or self.eval.patience):
      raise UserError(f'config.eval.best={self.eval.best!r} and config.eval.patience={self.eval.patience} need held-out '
                      'documents: give config.data.eval_files')
    if self.model.train_only:
      self._check_wrappers()
    if self.lora.rank and not self.lora.targets:
      raise UserError('config.lora.targets=(): name at least one')
    if self.lora.rank and not self.model.source:
      raise UserError(f'config.lora.rank={self.lora.rank} trains a difference to a model: config.model.source names none')
    if self.lora.rank and self.optim.name == 'muon':
      raise UserError(f'config.lora.rank={self.lora.rank} trains small factors of matrices, and Muon is for whole ones: '
                      'config.optim.name=adamw')
    if self.lora.rank and self.model.keep_moments:
      raise UserError(f'config.lora.rank={self.lora.rank} begins with new matrices, for which no moments are kept: leave '
                      'config.model.keep_moments out')

  def _check_wrappers(self):
    b, said = self.blocks, f'config.model.train_only={self.model.train_only!r}'
    if self.lora.rank:
      raise UserError(f'{said} and config.lora.rank={self.lora.rank} say what is trained; leave one of them out')
    if not self.model.source:
      raise UserError(f'{said} trains tokens around the blocks of a model: config.model.source names none')
    if not b.tails and not (b.sinks and b.sink_kind == 'learned'):
      raise UserError(f"{said} leaves nothing to train: give config.blocks.tails, or config.blocks.sink_kind='learned'")

  @property
  def low_rank(self) -> LoraOptions:
    """What is trained beside frozen weights; of rank 0, the weights are trained."""
    return lora.WRAPPERS if self.model.train_only else self.lora


# The section by which a config is told, and the module of blockattn.train that reads it.
TRAINERS = ('distill', 'finetune', 'segment')


def trainer_of(config) -> str:
  """The trainer that a config is for: the one whose section it has.

  Raises:
    ValueError: it has none of these sections, or several.
  """
  found = [name for name in TRAINERS if name in config]
  if len(found) != 1:
    raise UserError(f'the config has keys of {", ".join(found) or "no trainer"}; a config is for one of '
                    f'{", ".join(TRAINERS)}: make it with configs.common.base')
  return found[0]


def module(trainer: str) -> types.ModuleType:
  """The module of one of TRAINERS, which has `Options`, `read`, `build` and `run`."""
  return importlib.import_module(f'{__package__}.{trainer}')


def options_of(config) -> Options:
  """The options of a config, as the trainer that it is for reads them."""
  return module(trainer_of(config)).read(config)


def module_of(options: Options) -> types.ModuleType:
  """The module of the trainer that such options are for."""
  return sys.modules[type(options).__module__]


def read(cls: type, config) -> Any:
  """The `Options` of a trainer that a config says.

  Raises:
    ValueError: the config is for another trainer, or a value is refused; names the key.
  """
  for name in TRAINERS:
    if name in options_lib.keys(cls) and name not in config:
      raise UserError(f'the config has no keys config.{name}; it is for blockattn.train.{trainer_of(config)}')
  shared = {name: config[name] for name in ('steps', 'accumulate', 'seed', 'chunk') if name in config}
  return options_lib.read(cls, config, length=config['data']['length'], **shared)


# Building.


@flax.struct.dataclass
class Frozen:
  """Parameters that a step reads and does not train.

  Attributes:
    teacher: the teacher's; None where what it says is stored with the rows.
    base: what a LoRA student adds to, the same arrays as the teacher's where that is the same model; else None.
  """
  teacher: Any = None
  base: Any = None


@dataclasses.dataclass(frozen=True)
class View:
  """A forward pass over a row.

  Attributes:
    tokens: of the row, sinks included.
    near: only the last block reads further back than its own beginning.
  """
  tokens: int
  near: bool = False


@dataclasses.dataclass(frozen=True)
class Teacher:
  """A frozen model at work in every step."""
  cfg: transformer.ModelConfig
  placement: mesh_lib.Placement
  dtype: str           # of its parameters
  compute_dtype: str   # of its activations


@dataclasses.dataclass(frozen=True)
class Job:
  """A training, less all values.

  Attributes:
    placement: of the batch and the trained parameters.
    cfg: the trained model, learned sinks included.
    blocks: how block mode looks to it.
    specs: the trained parameters as ParamSpec.
    optimizer: optax transformation.
    step: jitted (state, frozen, batch) -> (state, metrics).
    state, frozen, batch: its arguments as abstract arrays with their shardings; the batch is the global one.
    views: the trained model's forward passes over a row.
    teacher: the teacher at work; None: there is none.
    loss_tokens: where the blocks of a batch are -> how many tokens have a loss, all views together.
    flops: likewise -> the operations that the models need in a step.
    logits: positions of a row whose logits exist at a time.
    label: of the progress line.
    meta: what a checkpoint says of the model: enough to export it and to run it.
  """
  placement: mesh_lib.Placement
  cfg: transformer.ModelConfig
  blocks: blocks.BlockOptions
  specs: Any
  optimizer: optax.GradientTransformation
  step: Callable
  state: loop.TrainState
  frozen: Frozen
  batch: dict
  views: tuple[View, ...]
  teacher: Teacher | None
  loss_tokens: Callable[[flops.Blocks], float]
  flops: Callable[[flops.Blocks], flops.Flops]
  logits: int
  label: str
  meta: dict

  @property
  def padded(self) -> int:
    """Tokens of a row in block mode."""
    return blocks.padded_length(self.batch['tokens'].shape[1], self.blocks)


def make_placement(options: Options, devices=None) -> mesh_lib.Placement:
  """The mesh over all devices of all processes, or over those that are given, with the options' rules.

  Raises:
    ValueError: it cannot be made of them, or compute.remat is 'offload' and they do not reach the host's memory.
  """
  if devices is None and options.compute.remat == 'offload' and not _reach_host_memory(jax.local_devices()[0]):
    raise UserError(f"config.compute.remat='offload' needs memory of the host that devices reach (pinned_host), which a "
                    f'{jax.local_devices()[0].device_kind} does not; use full')
  return mesh_lib.Placement(mesh_lib.make_mesh(options.mesh.sizes, devices), options.rules)


def _reach_host_memory(device) -> bool:
  return any(memory.kind == 'pinned_host' for memory in device.addressable_memories())


def abstract_placement(options: Options, devices: int) -> mesh_lib.Placement:
  """`make_placement` over so many devices that need not exist."""
  shape = mesh_lib.mesh_sizes(options.mesh.sizes, devices)
  abstract: Any = AbstractMesh(shape, mesh_lib.AXES, axis_types=(AxisType.Auto,) * len(shape))   # a Mesh but for its devices
  return mesh_lib.Placement(abstract, options.rules)


def compute_of(compute: transformer.Compute, placement, platform: str, **changes) -> transformer.Compute:
  """How to compute at a place, the attention implementation resolved."""
  return dataclasses.replace(compute, placement=placement, platform=platform, impl=api.resolve(compute.impl, platform),
                             **changes)


def architecture(model: ModelOptions) -> transformer.ModelConfig:
  """The ModelConfig of options that start from random values: a named size, with fields replaced.

  Raises:
    ValueError: a field that does not exist, or, without a size, one that is missing; or an unknown size.
  """
  known = {field.name: field for field in dataclasses.fields(transformer.ModelConfig)}
  for name in model.fields:
    if name not in known:
      raise UserError(f'config.model.fields.{name}: no such field; {tree.did_you_mean(name, known)}')
  missing = [name for name, field in known.items() if field.default is dataclasses.MISSING and name not in model.fields]
  if missing and not model.size:
    raise UserError(f'config.model.fields lacks {", ".join(missing)}; give them, or a config.model.size to start from, '
                    'or a config.model.source')
  return sizes.get(model.size, **model.fields) if model.size else transformer.ModelConfig(**model.fields)


def model_config(model: ModelOptions) -> transformer.ModelConfig:
  """The ModelConfig of the model that training starts from, before any weight is read."""
  return loading.find(model.source).cfg if model.source else architecture(model)


def architecture_here(model: ModelOptions, where: str = 'config.model') -> transformer.ModelConfig:
  """`model_config` without a network: of a model that is not on this disk, from the size that stands beside its name in
  `where`, a section of the config.

  Raises:
    ValueError: the source is no folder here, and no size stands beside it.
  """
  if loading.is_here(model.source):
    return loading.find(model.source).cfg
  if model.size or model.fields:
    return architecture(model)
  raise UserError(f'{where}.source={model.source!r} is no folder here, and nothing is downloaded: set '
                  f'{where}.size to the name of its architecture in blockattn/models/sizes.py')


def block_options(options: PromptOptions, cfg, sink: int) -> tuple[transformer.ModelConfig, blocks.BlockOptions]:
  """The student's ModelConfig and how block mode looks to it; `sink` is the token of sinks that are one.

  Raises:
    ValueError: the model has learned sinks, and the config asks for others.
  """
  b = options.blocks
  learned = b.sinks if b.sink_kind == 'learned' else 0
  if cfg.learned_sinks and cfg.learned_sinks != learned + b.tails:
    raise UserError(f'config.model.source={options.model.source!r} has {cfg.learned_sinks} learned sinks, and '
                    f'config.blocks says {b.sinks} of kind {b.sink_kind!r} and {b.tails} tails; go on with its own: '
                    f'--config.blocks.sink_kind=learned --config.blocks.sinks={cfg.learned_sinks - b.tails}')
  rows = tuple(range(cfg.vocab, cfg.vocab + learned + b.tails))
  return dataclasses.replace(cfg, learned_sinks=len(rows)) if rows else cfg, blocks.BlockOptions(
      sink_ids=rows[:learned] if learned else (sink,) * b.sinks, positions=b.positions, max_blocks=options.data.max_blocks,
      shared_first=options.data.shared_first, tail_ids=rows[learned:], links=b.tail_kind == 'link' and b.tails > 0,
      seam=b.seam, align=b.align, hide_starts=b.hide_starts, overlap=b.overlap)


def inserted(b: BlockModeOptions, cut: flops.Blocks) -> dict[str, Any]:
  """What flops.in_blocks takes beside the blocks of a batch. Hidden starts, a token or so of a block, count as read."""
  return {'sinks': b.sinks, 'tails': b.tails, 'links': b.tail_kind == 'link', 'overlaps': flops.overlaps(cut, b.overlap),
          'seams': flops.seams(cut, b.seam, drawn=b.seam_drawn)}


def check_model(cfg, placement, name: str = 'query heads'):
  """Raises ValueError, naming the parameter, if a model cannot be cut evenly at a place."""
  spec_lib.shardings(classifier.spec(cfg), placement.mesh, placement.rules)
  placement.check_divisible(name, (cfg.heads,), ('kv_heads',))   # attention cuts both along this rule


def abstract_state(specs, dtype: str, optimizer, placement) -> loop.TrainState:
  """The TrainState of parameters, moments placed like them; see loop.init_state."""
  params = abstract_params(specs, dtype, placement)
  placed = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
  moments = []
  # Within a trace, or the zeros that optax makes on the way would want a device.
  jax.eval_shape(lambda: moments.append(optim.map_moments(
      lambda x, p: placed(x, p.sharding), optimizer, jax.eval_shape(optimizer.init, params), params,
      lambda x: placed(x, placement.replicated()))))
  return loop.TrainState(jax.ShapeDtypeStruct((), jnp.int32, sharding=placement.replicated()), params, *moments)


def abstract_params(specs, dtype: str, placement):
  """Raises ValueError, naming the parameter, if one cannot be cut evenly."""
  spec_lib.shardings(specs, placement.mesh, placement.rules)
  return spec_lib.abstract(specs, dtype, placement)


def abstract_batch(options: Options, placement, **more) -> dict:
  """The arrays of a global batch, from those of an empty row and what a trainer replaces in it or adds."""
  abstract = lambda x: jax.ShapeDtypeStruct((options.batch, *np.shape(x)), x.dtype,
                                            sharding=placement.sharding(('batch', *(None,) * np.ndim(x))))
  return jax.tree.map(abstract, packing.pack_row([], options.data.length) | more)


def base_of(options: PromptOptions, cfg, placement):
  """What a LoRA student adds to, or wrappers, abstract; None of another one."""
  if not options.low_rank.rank:
    return None
  return abstract_params(transformer.spec(transformer.without_sinks(cfg)), options.model.dtype, placement)


def trained_specs(cfg, low_rank: LoraOptions = lora.NONE):
  """The trained parameters as ParamSpec: the model's, or those of a LoRA student."""
  return lora.spec(cfg, low_rank) if low_rank.rank else transformer.spec(cfg)


def model_meta(cfg, form: blocks.BlockOptions | None, source: str, kind: str, low_rank: LoraOptions = lora.NONE,
               prompt: dict | None = None, weights: dict | None = None) -> dict:
  """What a checkpoint says of its model. `prompt`: see inputs.prompt_meta; `weights`: see `source_weights`."""
  return {'model': dataclasses.asdict(cfg), 'source': str(source), 'source_weights': weights, 'kind': kind,
          'blocks': None if form is None else hf_config.blocks_meta(form),
          'lora': dataclasses.asdict(low_rank) if low_rank.rank else None, 'prompt': prompt}


def check_batch(options: Options, placement, platform: str, padded: int | None = None):
  """Raises ValueError if the global batch cannot be cut over the mesh, in options.accumulate slices, or rows of T or of
  `padded` tokens not into parts of whole tiles."""
  ways, b = placement.size('tokens'), getattr(options, 'blocks', None)
  added = [f'config.blocks.{name}' for name in ('sinks', 'tails', 'seam', 'overlap')
           if name == 'sinks' or getattr(b, name, 0)]
  added += ['config.blocks.align - 1'] if b and b.align > 1 else []
  added = added[0] if len(added) == 1 else f'({" + ".join(added)})'
  step = row_multiple(options, placement, platform)
  for what, length in (('config.data.length', options.data.length),
                       (f'config.data.length + {added} * config.data.max_blocks', padded)):
    if length is not None and length % step:
      raise UserError(f'{what} = {length} must be a multiple of {step}: {ways} devices (config.mesh) share a row, each '
                      f'whole tiles of at least {step // ways} tokens')
  check_batch_divides(options, placement)


def row_multiple(options: Options, placement, platform: str) -> int:
  """Rows that devices share are a multiple of so many tokens: whole tiles for each."""
  ways = placement.size('tokens')
  return ways * tiles.smallest(api.resolve(options.compute.impl, platform)) if ways > 1 else 1


def check_batch_divides(options: Options, placement):
  """The last of `check_batch`."""
  if next_batch(options, placement) != options.batch:
    raise UserError(f'config.batch={options.batch} must be a multiple of {_rows_at_a_time(options, placement)}: '
                    f'{placement.size("batch")} devices share the rows, in config.accumulate={options.accumulate} slices; '
                    'change one of them, or put devices on the tensor or the context axis (config.mesh)')


def next_batch(options: Options, placement) -> int:
  """The smallest batch from options.batch on that divides."""
  return -(-options.batch // _rows_at_a_time(options, placement)) * _rows_at_a_time(options, placement)


def _rows_at_a_time(options, placement):
  return placement.size('batch') * options.accumulate


# Loading.


# What decides held-out figures, and may be another thing when a run is started again.
_MEASURED = ('data.eval_files', 'eval.best', 'eval.rows', 'eval.answers', 'eval.max_new')


def finished(options: Options, workdir) -> str:
  """What there is to say of a workdir in which these options have nothing left to do; '' of any other. Nothing is loaded.

  Raises:
    ValueError: it holds a run of another config.
  """
  workdir = pathlib.Path(workdir)
  step = workdir_lib.newest_step(workdir, options)
  if step is None:
    return ''
  stopped = '' if step >= options.steps else _stopped(options, workdir, step)
  return loop.finished(workdir, step, options.steps, stopped) if stopped or step >= options.steps else ''


def _stopped(options, workdir, step) -> str:
  """Why held-out figures ended the run at its newest step; '' if they did not, or if others are asked for now."""
  if not isinstance(options, PromptOptions) or not options.data.eval_files:
    return ''
  before, now = map(options_lib.flat, (disk.read_json(workdir / 'config.json'), options_lib.as_json(options)))
  if any(before.get(key) != now[key] for key in _MEASURED):
    return ''
  said = checkpoint.load_meta(workdir / loading.CHECKPOINTS, step).get('eval') or {}
  return held_out.why_stopped(said, options.eval.patience, workdir / loading.BEST)


def use_cpu_cores(options: Options) -> None:
  """One CPU device per core, where the mesh is left to divide a batch over all devices; before the first computation."""
  if options.mesh == MeshOptions():
    mesh_lib.use_cpu_cores(max(1, options.batch // options.accumulate))


def load_tokenizer(options: PromptOptions, cfg: transformer.ModelConfig):
  """The tokenizer of the data, once it is known that the model `cfg` has a row for each of its tokens.

  Raises:
    ValueError: it has not; names the first of them.
  """
  loaded = inputs.load_tokenizer(options.data, options.model.source)
  encode.check_tokenizer(loaded, cfg.vocab, str(loaded.name_or_path), cfg.learned_sinks)
  return loaded


def sink_of(b: BlockModeOptions, tokenizer) -> int:
  """The token that sinks are, or that they and tails start as: that of sink_text, or of the first of SINK_TEXTS that is a
  single one; 0 without any.

  Raises:
    ValueError: there is no such token.
  """
  for candidate in ([b.sink_text] if b.sink_text else SINK_TEXTS) if b.sinks or b.tails else ():
    ids = tokenizer.encode(candidate, add_special_tokens=False)
    if len(ids) == 1:
      if candidate != (b.sink_text or SINK_TEXTS[0]) and jax.process_index() == 0:
        print(f'config.blocks.sink_text: {candidate!r}, which is one token of this tokenizer')
      return ids[0]
  if b.sinks or b.tails:
    raise UserError(f'config.blocks.sink_text={b.sink_text!r} is {len(ids)} tokens of this tokenizer; a sink is one token: '
                    'leave it empty to have one chosen')
  return 0


def load_model(options: Options, placement, cfg: transformer.ModelConfig):
  """The parameters that training starts from: those of model.source, or random values if that is empty; in model.dtype,
  placed by the rules.

  Args:
    cfg: from `model_config`.

  Raises:
    ValueError: a document may be longer than the model has positions for: it would train on some it was not made for.
  """
  model = options.model
  if options.data.length > cfg.max_positions and not classifier.position_shape(cfg):   # of a unit a position is no token
    raise UserError(f'config.data.length={options.data.length}: documents may be as long, and the model has '
                    f'{cfg.max_positions} positions (max_position_embeddings of its config.json); give a smaller length, '
                    'or a model with more')
  if model.source:
    return loading.find(model.source).read(model.dtype, placement)
  return init_params(classifier.spec(cfg), placement, options.seed, model.dtype)


def load_language_model(options: PromptOptions, placement, cfg: transformer.ModelConfig):
  """`load_model`; raises ValueError, too, if it is a segmenter."""
  hf_config.check_language_model(cfg, options.model.source or 'config.model')
  return load_model(options, placement, cfg)


def init_params(specs, placement, seed: int, dtype: str):
  shardings = spec_lib.shardings(specs, placement.mesh, placement.rules)
  return jax.jit(lambda key: spec_lib.init(specs, key, dtype), out_shardings=shardings)(jax.random.key(seed))


def source_weights(options: Options, params) -> dict | None:
  """Which weights model.source holds, from the parameters as they were loaded; None of random ones."""
  return convert.weights_facts(params) if options.model.source else None


def student_params(options: PromptOptions, cfg, params, sink: int, placement):
  """(what is trained, at its start; what a LoRA student adds to, None of another one), from the model's parameters.

  Args:
    cfg: the student. Its learned sinks and tails go on from those of the model, or start as the embedding of the token
      `sink`.
  """
  start, low_rank = params, options.low_rank
  if low_rank.rank:
    pairs = {name: own for name, own in lora.spec(cfg, low_rank).items() if name == 'layers'}
    start = init_params(pairs, placement, options.seed, options.model.dtype) if pairs else {}
  if 'sinks' in params:
    start = start | {'sinks': params['sinks']}
  elif cfg.learned_sinks:
    copies = jax.jit(lambda e: jnp.tile(e[sink], (cfg.learned_sinks, 1)), out_shardings=placement.sharding((None, 'width')))
    start = start | {'sinks': copies(params['embed'])}
  return start, base_params(params) if low_rank.rank else None


def base_params(params):
  """Those of the model without learned sinks, as a teacher and what a LoRA student adds to have none."""
  return {name: p for name, p in params.items() if name != 'sinks'}


def check_moments(made: Job, options: Options):
  """Raises ValueError if `first_state` would, for the moments that model.keep_moments asks for; reads no values."""
  if not options.model.keep_moments:
    return
  try:
    loading.find(options.model.source).check_optimizer(made.state.opt_state)
  except UserError as error:
    raise UserError(f'config.model.keep_moments: {error}; leave it out to begin with new moments') from error


def first_state(made: Job, options: Options, params) -> loop.TrainState:
  """The state at step 0. With model.keep_moments the optimizer's moments are those of the run that model.source names, and
  only its schedule begins anew.

  Raises:
    ValueError: they are of another optimizer or of other parameters, or there are none.
  """
  state, source = loop.init_state(params, made.optimizer), options.model.source
  if not options.model.keep_moments:
    return state
  kept = loading.find(source).read_optimizer(state.opt_state)
  return dataclasses.replace(state, opt_state=optim.restart_schedule(kept, state.opt_state))


def loop_config(options: Options, made: Job) -> loop.LoopConfig:
  """The loop's settings; operations are counted where the device's peak is known."""
  count, peak = None, options.peak_tflops * 1e12 or flops.peak(jax.devices()[0].device_kind) or 0.0
  if peak:
    # The other processes' rows need about as much as this one's.
    count = lambda batch: made.flops(flops.blocks_of(batch['layout'], batch.get('continued'))).times(
        options.batch / len(batch['tokens']))
  return loop.LoopConfig(steps=options.steps, log_every=options.log_every, save_every=options.save_every, keep=options.keep,
                         tokens_per_step=options.batch * options.data.length, label=made.label, flops=count,
                         peak_flops=peak * jax.device_count(), wandb=options.wandb or None,
                         profile=trace.parse_steps(options.profile, options.steps))


def make_watches(made: Job, options: PromptOptions, tokenizer, workdir, *, base, compute: transformer.Compute, meta: dict,
                 **measured) -> list[loop.Watch]:
  """What looks at a language model while it trains: held-out figures, then exports, each where the options want it.

  Args:
    base: what a student adds to that trains a part alone, None of another one.
    compute, measured: see held_out.make.
    meta: what checkpoints say besides made.meta.
  """
  low_rank, meta = options.low_rank, made.meta | meta
  student = (lambda params: lora.attach(base, params, low_rank)) if low_rank.rank else lambda params: params
  merged = jax.jit(lambda base, params: lora.merge(base, params, low_rank))
  whole = (lambda params: merged(base, params)) if low_rank.rank else lambda params: params
  return [*held_out.make(options, made, tokenizer, workdir, student=student, compute=compute, meta=meta, **measured),
          *export.make(options, made, workdir, whole=whole, meta=meta)]


def put_batch(made: Job, options: Options, batch: dict) -> dict:
  """The global batch on its devices, with the room that its blocks take. Several processes, of which each knows its own
  rows alone, take the most."""
  put = made.placement.put_batch(batch)
  if jax.process_count() > 1 or not made.blocks.most_added:
    return put
  return put | {'room': blocks.room_of(batch['layout'], made.blocks,
                                       row_multiple(options, made.placement, made.placement.platform))}


def train(made: Job, options: Options, params, frozen: Frozen, source, workdir, meta: dict, watches=(), add=None,
          rewrite=None):
  """Runs a job on values; returns the trained parameters.

  Args:
    params: what is trained, at its start.
    source: of packed rows.
    meta: what checkpoints say besides made.meta.
    watches, rewrite: see loop.run.
    add: see stream.batches.
  """
  look = inputs.overlap_watch(made.blocks.overlap)

  def put(batch):
    look(batch)
    return put_batch(made, options, batch)

  state = loop.run(lambda state, batch: made.step(state, frozen, batch), first_state(made, options, params),
                   inputs.batches(options, source, made.placement, add), loop_config(options, made), workdir,
                   put_batch=put, meta=made.meta | meta, watches=watches, rewrite=rewrite)
  return state.params
