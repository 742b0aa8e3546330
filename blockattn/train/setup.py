"""What every trainer does before its first step: a config becomes a mesh, a model, a data stream and an optimizer."""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from blockattn import blocks, errors, mesh as mesh_lib, optim, trace, tree
from blockattn.data import chat_template, encode, sources, stdlib, store, stream, teacher_logits as taught_lib
from blockattn.hf import config as hf_config, convert, files
from blockattn.kernels import api, tiles
from blockattn.models import classifier, flops, lora, sizes, spec, transformer, weights
from blockattn.segmentation import cutter as segment_cutter, granularity
from blockattn.train import loop

SINK_TEXTS = ('\n', '\n\n', ' ', '.', ',')


def placement(config) -> mesh_lib.Placement:
  """The mesh over all devices of all processes, with the config's rules."""
  return mesh_lib.Placement(mesh_lib.make_mesh(dict(config.mesh)), mesh_lib.as_rules(config.rules))


def teacher_placement(config, place) -> mesh_lib.Placement:
  """The same mesh with the teacher's rules: config.teacher.rules in place of those of the same names.

  Raises:
    ValueError: they place the rows of a batch, or the tokens of a row, elsewhere than the student's do.
  """
  rules = dict(mesh_lib.as_rules(config.rules)) | dict(mesh_lib.as_rules(config.teacher.rules))
  other = mesh_lib.Placement(place.mesh, tuple(rules.items()))
  for axis in ('batch', 'tokens'):
    if other.mesh_axes(axis) != place.mesh_axes(axis):
      raise ValueError(f'config.teacher.rules places {axis!r} on {other.mesh_axes(axis)}, config.rules on '
                       f'{place.mesh_axes(axis)}: teacher and student read the same batch, so that both must be the same')
  return other


def use_cpu_cores(config) -> None:
  """One CPU device per core, where the mesh is left to divide a batch over all devices; before the first computation."""
  if sorted(dict(config.mesh).values()) == [-1, 1, 1, 1] and config.batch > 0 and config.accumulate > 0:
    mesh_lib.use_cpu_cores(max(1, config.batch // config.accumulate))


def compute(config, place, **overrides) -> transformer.Compute:
  """config.compute with the attention implementation resolved, once."""
  options = dict(config.compute) | overrides
  options['impl'] = api.resolve(options['impl'], jax.default_backend())
  options['tiles'] = tuple(options['tiles']) or None
  options['sent'] = None if options['sent'] == -1 else options['sent']
  return transformer.Compute(placement=place, **options)


def architecture(model) -> transformer.ModelConfig:
  """The ModelConfig of a config that starts from random values: a named size, with fields replaced.

  Raises:
    ValueError: a field that does not exist, or, without a size, one that is missing.
    KeyError: an unknown size.
  """
  fields, known = dict(model.fields), {field.name: field for field in dataclasses.fields(transformer.ModelConfig)}
  for name in fields:
    if name not in known:
      raise ValueError(f'config.model.fields.{name}: no such field; {tree.did_you_mean(name, known)}')
  missing = [name for name, field in known.items() if field.default is dataclasses.MISSING and name not in fields]
  if missing and not model.size:
    raise ValueError(f'config.model.fields lacks {", ".join(missing)}; give them, or a config.model.size to start from, '
                     'or a config.model.source')
  if model.size:
    return sizes.get(model.size, **fields)
  return transformer.ModelConfig(**fields)


def model_config(config) -> transformer.ModelConfig:
  """The ModelConfig of config.model, before any weight is read."""
  return hf_config.read(files.locate(config.model.source)) if config.model.source else architecture(config.model)


def load_model(config, place, dtype=None):
  """Model of config.model: the Hugging Face folder or hub name `model.source`, or random values if it is empty.

  Returns:
    (ModelConfig, params) with params in `dtype`, by default config.model.dtype, placed by the rules.

  Raises:
    ValueError: the model is a segmenter, and the config not for one; or a document may be longer than it has positions for.
  """
  dtype, cfg = dtype or config.model.dtype, model_config(config)
  _check_model(config, cfg, config.model.source or 'config.model')
  if config.model.source:
    return convert.load(config.model.source, dtype, mesh=place.mesh, rules=place.rules)
  return cfg, init_params(cfg, place, config.seed, dtype)


def _check_model(config, cfg, name):
  if 'segment' not in config:
    hf_config.check_language_model(cfg, name)
  check_positions(config, cfg)


def check_positions(config, cfg):
  """Raises ValueError if a document may be longer than the model has positions for: it would train on positions that it
  was not made for. A segmenter that reads units has a position for each of them, not for a token."""
  if config.data.length > cfg.max_positions and not classifier.position_shape(cfg):
    raise ValueError(f'config.data.length={config.data.length}: documents may be as long, and the model has '
                     f'{cfg.max_positions} positions (max_position_embeddings of its config.json); give a smaller length, '
                     'or a model with more')


def init_params(cfg, place, seed, dtype):
  specs = classifier.spec(cfg)
  shardings = spec.shardings(specs, place.mesh, place.rules)
  return jax.jit(lambda key: spec.init(specs, key, dtype), out_shardings=shardings)(jax.random.key(seed))


def block_options(config, cfg, tokenizer) -> tuple[transformer.ModelConfig, blocks.BlockOptions]:
  """The student's ModelConfig and BlockOptions from config.blocks.

  Raises:
    ValueError: sink_text is not a single token of the tokenizer, or the kind of sinks is no good.
  """
  b = config.blocks
  if b.sink_kind == 'learned':
    ids = tuple(range(cfg.vocab, cfg.vocab + b.sinks))
    cfg = dataclasses.replace(cfg, learned_sinks=b.sinks)
  elif b.sink_kind == 'token':
    ids = (sink_token(tokenizer, b.sink_text),) * b.sinks if b.sinks else ()
  else:
    raise ValueError(f"config.blocks.sink_kind={b.sink_kind!r}; choose 'token' or 'learned'")
  return cfg, blocks.BlockOptions(sink_ids=ids, positions=b.positions, max_blocks=config.data.max_blocks,
                                  shared_first=config.data.shared_first)


def sink_token(tokenizer, text: str) -> int:
  """The token of `text`; '': of the first of SINK_TEXTS that is a single one.

  Raises:
    ValueError: there is no such token.
  """
  for candidate in [text] if text else SINK_TEXTS:
    ids = tokenizer.encode(candidate, add_special_tokens=False)
    if len(ids) == 1:
      if candidate != (text or SINK_TEXTS[0]) and jax.process_index() == 0:
        print(f'config.blocks.sink_text: {candidate!r}, which is one token of this tokenizer')
      return ids[0]
  raise ValueError(f'config.blocks.sink_text={text!r} is {len(ids)} tokens of this tokenizer; a sink is one token: leave it '
                   'empty to have one chosen')


def teacher_from(params, cfg, config, place):
  """The teacher's parameters: a copy of the student's first ones, whose buffers training reuses.

  Args:
    params: in config.model.dtype, placed by the student's rules.
    cfg: their ModelConfig, without learned sinks.
    place: the teacher's, from `teacher_placement`.

  Returns:
    The tree in config.teacher.dtype; 'int8': matrices of 8 bits, see models/weights.py, all else in the dtype of
    its activations.
  """
  shardings = spec.shardings(transformer.spec(cfg), place.mesh, place.rules)
  if config.teacher.dtype == 'int8':
    quantize = functools.partial(weights.quantize, dtype=config.teacher.compute_dtype)
    return jax.jit(quantize, out_shardings=weights.quantized_shardings(shardings))(params)
  copy = lambda params: jax.tree.map(lambda p: jnp.array(p, config.teacher.dtype, copy=True), params)
  return jax.jit(copy, out_shardings=shardings)(params)


def source_weights(config, params) -> dict | None:
  """Which weights config.model.source holds, from the parameters as they were loaded; None of random ones."""
  return convert.weights_facts(params) if config.model.source else None


def teacher_facts(config) -> dict:
  """What a training that reads stored logits must agree with, see train/teach.py."""
  return {'source': str(config.model.source), 'length': config.data.length, 'temperature': config.distill.temperature,
          'top_k': config.teacher.top_k, 'positions': config.blocks.positions,
          'blocked': config.distill.weights.source == 'teacher'}


def check_taught(folder, found: dict, wanted: dict):
  """Raises ValueError, naming the first fact in which a folder of stored logits is not what is wanted."""
  for name, value in wanted.items():
    if found[name] != value:
      raise ValueError(f'{folder} was written for {name}={found[name]!r}, this config says {value!r}; use another folder, '
                       'or the config that it was written for')


def check_taught_weights(folder, config, weights: dict):
  """Raises ValueError if a folder of stored logits is from other weights than those of config.model.source."""
  convert.check_same_weights(taught_lib.read_meta(folder).get('source_weights'), weights, f'{folder}', config.model.source,
                             'run blockattn.train.teach into a new folder')


def needed_rows(config, source) -> np.ndarray:
  """Numbers of the source's rows that the training reads, ascending."""
  return stream.row_numbers(source, config.steps * config.batch, config.seed)


def taught(config, source):
  """The source, with what config.teacher.logits has of a teacher, if it names a folder."""
  folder = config.teacher.logits
  if not folder:
    return source
  found, wanted = taught_lib.read_meta(folder), teacher_facts(config)
  wanted['top_k'] = found['top_k']   # the training takes what is there
  if not wanted['blocked']:
    del wanted['blocked']   # there, and not looked at
  check_taught(folder, found, wanted)
  return taught_lib.TaughtRows(source, folder, needed_rows(config, source))


def lora_options(config) -> lora.LoraOptions:
  """Raises ValueError if they are no good, or if there is no model to add to."""
  options = lora.LoraOptions(**dict(config.lora))
  if options.rank and not config.model.source:
    raise ValueError(f'config.lora.rank={options.rank} trains a difference to a model: config.model.source names none')
  return options


def lora_start(params, cfg, options: lora.LoraOptions, config, place):
  """What a LoRA student trains, at its start.

  Args:
    params: those that it starts from, with rows for learned sinks if cfg has any.
  """
  specs = lora.spec(cfg, options)
  shardings = spec.shardings(specs, place.mesh, place.rules)
  start = jax.jit(lambda key: spec.init(specs, key, config.model.dtype), out_shardings=shardings)
  sinks = {'sinks': params['sinks']} if cfg.learned_sinks else {}
  return start(jax.random.key(config.seed)) | sinks


def add_sink_rows(params, cfg, tokenizer, text, place):
  """Learned sinks start as copies of the embedding of `text`'s token."""
  if not cfg.learned_sinks:
    return params
  sharding = place.sharding((None, 'width'))
  row = sink_token(tokenizer, text)
  start = jax.jit(lambda e: jnp.tile(e[row], (cfg.learned_sinks, 1)), out_shardings=sharding)(params['embed'])
  return params | {'sinks': start}


def optim_config(config) -> optim.OptimConfig:
  return optim.OptimConfig(steps=config.steps, **dict(config.optim))


def loop_config(config, label, cfg=None) -> loop.LoopConfig:
  """The loop's settings from the config's.

  Args:
    cfg: the trained model's ModelConfig, to count operations for MFU; None: not counted.

  Raises:
    ValueError: a number below 1, a bad config.profile or config.wandb.
  """
  check_reports(config)
  count, peak = None, 0.0
  if cfg is not None:
    peak = config.peak_tflops * 1e12 or flops.peak(jax.devices()[0].device_kind) or 0.0
  if peak:
    of_blocks = step_flops(config, cfg)
    # The other processes' rows need about as much as this one's.
    count = lambda batch: of_blocks(flops.blocks_of(batch['layout'])).times(config.batch / len(batch['tokens']))
  return loop.LoopConfig(steps=config.steps, log_every=config.log_every, save_every=config.save_every, keep=config.keep,
                         tokens_per_step=config.batch * config.data.length, label=label, flops=count,
                         peak_flops=peak * jax.device_count() if peak else 0.0, wandb=config.wandb or None,
                         profile=trace.parse_steps(config.profile, config.steps))


def check_reports(config):
  """Checks what a run reports to whom, before anything is loaded.

  Raises:
    ValueError: config.profile is no range of the run's steps, or config.wandb asks for a package that is not installed.
  """
  trace.parse_steps(config.profile, config.steps)
  if config.wandb and importlib.util.find_spec('wandb') is None:
    raise ValueError(f'config.wandb={config.wandb!r} needs Weights & Biases: pip install "blockattn[log]"')


def step_flops(config, cfg) -> Callable[[flops.Blocks], flops.Flops]:
  """The operations that the model needs in a training step, by where the blocks of the batch are; block dropout counts
  with its mean."""
  frozen = 'lora' in config and config.lora.rank > 0
  sinks = config.blocks.sinks

  def segmenter(cut):
    return flops.trained(flops.forward(cfg, flops.as_one_block(cut)))

  def finetune(cut):
    mode = config.finetune.mode
    views = [flops.as_one_block(cut)] * (mode != 'block') + [flops.in_blocks(cut, sinks=sinks)] * (mode != 'full')
    return flops.trained(flops.forward(cfg, flops.Seen(*map(sum, zip(*views, strict=True)))), frozen=frozen)

  def distill(cut):
    d = config.distill
    student = flops.in_blocks(cut, sinks=sinks, drop_rate=d.drop_rate, drop_mode=d.drop_mode)
    total = flops.trained(flops.forward(cfg, student), frozen=frozen)
    if not config.teacher.logits:
      total += flops.forward(cfg, flops.as_one_block(cut))
    if d.weights.source == 'teacher':
      total += flops.forward(cfg, flops.in_blocks(cut))
    return total

  return segmenter if 'segment' in config else distill if 'distill' in config else finetune


def model_meta(cfg, options: blocks.BlockOptions | None, source: str, kind: str,
               low_rank: lora.LoraOptions = lora.NONE, prompt: dict | None = None, weights: dict | None = None) -> dict:
  """What a checkpoint says of its model: enough to export it and to run it. `prompt`: see `prompt_meta`; `weights`: see
  `source_weights`."""
  return {'model': dataclasses.asdict(cfg), 'source': str(source), 'source_weights': weights, 'kind': kind,
          'blocks': None if options is None else hf_config.blocks_meta(options),
          'lora': dataclasses.asdict(low_rank) if low_rank.rank else None, 'prompt': prompt}


def prompt_meta(config, tokenizer) -> dict:
  """How prompts were made in training, so that the model is asked the same way."""
  data = config.data
  chat = data.kind == 'files' and chat_template.wants_chat(data.chat, tokenizer)
  return {'chat': chat, 'template_args': data.template_args}


def tokenizer(config):
  """config.data.tokenizer, with the arguments of its chat template."""
  return encode.load_tokenizer(config.data.tokenizer or config.model.source, config.data.template_args)


def model_tokenizer(config):
  """`tokenizer`, once it is known that config.model has a row for each of its tokens.

  Raises:
    ValueError: it has not; names the first of them.
  """
  cfg, loaded = model_config(config), tokenizer(config)
  encode.check_tokenizer(loaded, cfg.vocab, str(loaded.name_or_path), cfg.learned_sinks)
  return loaded


def file_options(data, tokenizer) -> store.FileOptions:
  """How files become rows, from a config.data."""
  return store.FileOptions(length=data.length, max_blocks=data.max_blocks, too_long=data.too_long,
                              chat=chat_template.wants_chat(data.chat, tokenizer), block_tokens=data.block_tokens,
                              shared_first=data.shared_first)


def rows(config, tokenizer):
  """The source of packed rows that config.data describes."""
  data = config.data
  if data.kind == 'pages':
    return pages(data, tokenizer, split='train')
  if data.kind != 'files':
    raise ValueError(f"config.data.kind={data.kind!r}; choose 'files' or 'pages'")
  if not data.files:
    raise ValueError('config.data.files is empty: give JSON lines files, e.g. --config.data.files=train.jsonl,more/')
  source = sources.FileRows(list(data.files), tokenizer, file_options(data, tokenizer), data.cache, strict=data.strict,
                             cutter=cutter(data, tokenizer))
  if jax.process_index() == 0 and source.report.docs < source.report.lines:
    print(source.report.summary())
  return source


def cutter(data, tokenizer):
  """What cuts contexts in place of the given blocks, None if config.data.segmenter is empty. Lengths count the tokens of
  `tokenizer`, which is the model's.

  Raises:
    ValueError: the bounds contradict each other, or blocks of a fixed length are asked for too.
  """
  if not data.segmenter:
    return None
  if data.block_tokens:
    raise ValueError(f'config.data.block_tokens={data.block_tokens} and config.data.segmenter={data.segmenter!r} both '
                     'say where blocks end; leave one of them out')
  asked = {name: data.segment[name] or None for name in ('target', 'minimum', 'maximum')}
  place = mesh_lib.Placement(mesh_lib.make_mesh({'data': -1}, jax.local_devices()))   # each process cuts its own texts
  return segment_cutter.Cutter(data.segmenter, granularity.wanted(**asked), place, tokenizer)


def pages(data, tokenizer, *, split: str, own_blocks: bool = False, **style):
  """Pages of Python's standard library, of the containers of a split; `style` replaces fields. `own_blocks`: no segmenter
  cuts any of them."""
  containers = stdlib.split_containers(stdlib.read_containers(), split)
  return sources.PageRows(containers, page_style(data, **style), tokenizer, length=data.length, max_blocks=data.max_blocks,
                           block_tokens=data.block_tokens, shared_first=data.shared_first,
                           cutter=None if own_blocks else cutter(data, tokenizer), cut_share=data.segment.pages)


def page_style(data, **style) -> stdlib.PageStyle:
  return stdlib.PageStyle(**{name: tuple(v) if isinstance(v, (list, tuple)) else v
                             for name, v in (dict(data.pages) | style).items()})


def batches(config, source):
  """This process's rows of the global batches, see stream.batches."""
  return stream.batches(source, batch=config.batch, seed=config.seed, rows=own_rows(placement(config), config.batch))


def own_rows(place, batch: int) -> list[int]:
  """The rows of a global batch that the devices of this process hold, ascending.

  Processes that share a row, because 'tensor' or 'context' goes over several of them, all hold and read it.

  Raises:
    ValueError: two processes hold some rows together and others alone.
  """
  held = {}
  for device, (part,) in place.sharding(('batch',)).devices_indices_map((batch,)).items():
    held.setdefault(device.process_index, set()).update(range(batch)[part])
  distinct = {frozenset(rows) for rows in held.values()}
  if sum(map(len, distinct)) > batch:
    raise ValueError('config.mesh lets some processes share a part of their rows only: the devices of a process, '
                     f'{jax.local_device_count()} here, must divide tensor * context, or be a multiple of it')
  return sorted(held[jax.process_index()])


def check_batch(config, place, platform: str | None = None):
  """Raises ValueError if the global batch cannot be cut over the mesh, of devices of JAX's `platform` (default: those here),
  in config.accumulate slices."""
  _check_length(config, place.size('tokens'), platform or jax.default_backend())
  check_batch_divides(config, place)


def check_batch_divides(config, place):
  """The last of `check_batch`."""
  parts = _parts(config, place)
  if config.batch % parts:
    raise ValueError(f'config.batch={config.batch} must be a multiple of {parts}: {place.size("batch")} devices share '
                     f'the rows, in config.accumulate={config.accumulate} slices; change one of them, or put devices on '
                     'the tensor or the context axis (config.mesh)')


def next_batch(config, place) -> int:
  """The smallest batch from config.batch on that divides."""
  return -(-config.batch // _parts(config, place)) * _parts(config, place)


def _parts(config, place):
  return max(1, place.size('batch') * config.accumulate)


def _check_length(config, ways, platform):
  """Raises ValueError if rows, with and without sinks, cannot be cut into `ways` parts of whole tiles."""
  impl = config.compute.impl
  tile = tiles.smallest(api.resolve(impl, platform) if impl == 'auto' else impl)
  data, step = config.data, ways * tile
  padded = blocks.padded_length(data.length, config.blocks.sinks, data.max_blocks)
  for what, length in (('config.data.length', data.length),
                       ('config.data.length + config.blocks.sinks * config.data.max_blocks', padded)):
    if ways > 1 and length % step:
      raise ValueError(f'{what} = {length} must be a multiple of {step}: {ways} devices (config.mesh) share a row, each '
                       f'whole tiles of at least {tile} tokens')


def check_config(config, trainer: str):
  """Checks what can be said of a config before a device or a file is touched; the first thing that a trainer does.

  Args:
    trainer: the section that it reads: 'distill', 'finetune' or 'segment'.

  Raises:
    ValueError: the config is for another trainer, or a value is out of its range; names the key.
  """
  check_section(config, trainer)
  check_numbers(config)
  choices = {'model.dtype': ('float32', 'bfloat16'), 'compute.dtype': ('float32', 'bfloat16')}
  if trainer == 'distill':
    choices |= {'teacher.dtype': ('float32', 'bfloat16', 'int8'), 'teacher.compute_dtype': ('float32', 'bfloat16')}
  if trainer == 'segment':
    choices |= {'segment.export_dtype': ('float32', 'bfloat16')}
  flat = loop.flat(config.to_dict())
  for key, known in choices.items():
    if flat[key] not in known:
      raise ValueError(f'config.{key}={flat[key]!r}; choose one of {", ".join(known)}')
  optim_config(config)
  if 'lora' in config:
    lora_options(config)
  loop_config(config, trainer)


# The ranges of the numbers that no dataclass answers for, as arguments of errors.check_number. Seeds: JAX reads 32 bits of
# one, and would take 2 ** 32 for 0.
_FROM_1, _FROM_0, _SHARE = {'low': 1}, {'low': 0}, {'low': 0, 'high': 1}
_RANGES = {
    'seed': {'low': 0, 'below': 2 ** 32}, 'batch': _FROM_1, 'accumulate': _FROM_1, 'chunk': _FROM_1,
    'peak_tflops': _FROM_0 | {'hint': ', the TFLOP/s of a device; 0: as its kind says'},
    'compute.sent': {'low': -1, 'hint': ' queries, or -1'},
    'blocks.sinks': {'low': 0, 'high': 1024},
    'data.length': {'low': 2, 'high': 2 ** 24}, 'data.max_blocks': {'low': 1, 'high': 2 ** 24}, 'data.block_tokens': _FROM_0,
    'data.segment.target': _FROM_0, 'data.segment.minimum': _FROM_0, 'data.segment.maximum': _FROM_0,
    'data.segment.pages': _SHARE, 'teacher.top_k': _FROM_1,
    'segment.head': _FROM_1, 'segment.tail': _FROM_1, 'segment.inner': _FROM_0, 'segment.middle': _FROM_0,
    'segment.ahead': _FROM_1, 'segment.eval_every': _FROM_0, 'segment.eval_rows': _FROM_1,
    'model.fields.norm_eps': {'above': 0}, 'model.fields.rope_theta': {'above': 0},
    **{f'model.fields.{name}': _FROM_1 for name in (
        'vocab', 'width', 'layers', 'heads', 'kv_heads', 'head_dim', 'mlp', 'max_positions')},
    'model.fields.learned_sinks': _FROM_0}


def check_numbers(config):
  """Raises ValueError, naming the key, if a number that no dataclass answers for is out of its range."""
  flat = loop.flat(config.to_dict())
  for key, limits in _RANGES.items():
    if key in flat:
      errors.check_number(f'config.{key}', flat[key], **limits)
  for axis, size in config.mesh.items():
    if size != -1:
      errors.check_number(f'config.mesh.{axis}', size, 1, hint=', or -1: all devices that are left')
  for size in config.compute.tiles:
    errors.check_number('config.compute.tiles', size, 1)
  if len(config.compute.tiles) not in (0, 2):
    raise ValueError(f'config.compute.tiles={config.compute.tiles}; give two numbers, of a query tile and of a key tile: '
                     '128,128')
  # What a step reads is numbered in 32 bits.
  errors.check_number('config.batch * config.data.length', config.batch * config.data.length, 1, 2 ** 31 - 1,
                      hint=' tokens of a step')
  page_style(config.data)


def check_section(config, name):
  """Raises ValueError if the config lacks the keys of the trainer `name`: it was written for another one."""
  if name not in config:
    others = [key for key in ('distill', 'finetune', 'segment') if key in config]
    hint = f'; it is for blockattn.train.{others[0]}' if others else f': call common.add_{name} in its get_config'
    raise ValueError(f'the config has no keys config.{name}{hint}')
