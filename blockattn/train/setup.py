"""What every trainer does before its first step: a config becomes a mesh, a model, a data stream and an optimizer."""

import dataclasses

import jax
import jax.numpy as jnp

from blockattn import blocks, mesh as mesh_lib, optim
from blockattn.data import encode, pipeline, stdlib
from blockattn.hf import convert
from blockattn.kernels import api
from blockattn.models import sizes, spec, transformer
from blockattn.train import loop


def placement(config) -> mesh_lib.Placement:
  """The mesh over all devices of all processes, with the config's rules."""
  rules = tuple((name, tuple(rule) if isinstance(rule, (list, tuple)) else rule) for name, rule in config.rules)
  return mesh_lib.Placement(mesh_lib.make_mesh(dict(config.mesh)), rules)


def compute(config, place, **overrides) -> transformer.Compute:
  """config.compute with the attention implementation resolved, once."""
  options = dict(config.compute) | overrides
  options['impl'] = api.resolve(options['impl'], jax.default_backend())
  options['tiles'] = tuple(options['tiles']) or None
  return transformer.Compute(placement=place, **options)


def architecture(model) -> transformer.ModelConfig:
  """The ModelConfig of a config that starts from random values: a named size, with fields replaced."""
  fields = {name: value for name, value in dict(model.fields).items()}
  if model.size:
    return sizes.get(model.size, **fields)
  return transformer.ModelConfig(**fields)


def load_model(config, place, dtype=None):
  """Model of config.model: the Hugging Face folder or hub name `model.source`, or random values if it is empty.

  Returns:
    (ModelConfig, params) with params in `dtype`, by default config.model.dtype, placed by the rules.
  """
  dtype = dtype or config.model.dtype
  if config.model.source:
    return convert.load(config.model.source, dtype, mesh=place.mesh, rules=place.rules)
  cfg = architecture(config.model)
  return cfg, init_params(cfg, place, config.seed, dtype)


def init_params(cfg, place, seed, dtype):
  specs = transformer.spec(cfg)
  shardings = spec.shardings(specs, place.mesh, place.rules)
  return jax.jit(lambda key: spec.init(specs, key, dtype), out_shardings=shardings)(jax.random.key(seed))


def block_options(config, cfg, tokenizer) -> tuple[transformer.ModelConfig, blocks.BlockOptions]:
  """The student's ModelConfig and BlockOptions from config.blocks.

  Raises:
    ValueError: sink_text is not a single token of the tokenizer, or the sink kind is unknown.
  """
  b = config.blocks
  if b.sink_kind == 'learned':
    ids = tuple(range(cfg.vocab, cfg.vocab + b.sinks))
    cfg = dataclasses.replace(cfg, learned_sinks=b.sinks)
  elif b.sink_kind == 'token':
    ids = (single_token(tokenizer, b.sink_text),) * b.sinks
  else:
    raise ValueError(f"config.blocks.sink_kind={b.sink_kind!r}; choose 'token' or 'learned'")
  return cfg, blocks.BlockOptions(sink_ids=ids, positions=b.positions, max_blocks=config.data.max_blocks)


def single_token(tokenizer, text) -> int:
  ids = tokenizer.encode(text, add_special_tokens=False)
  if len(ids) != 1:
    raise ValueError(f'config.blocks.sink_text={text!r} is {len(ids)} tokens of this tokenizer; a sink is one token')
  return ids[0]


def student_start(teacher, cfg, config, tokenizer, place):
  """The student's first parameters: a copy of the teacher's in config.model.dtype, with rows for learned sinks."""
  copy = jax.jit(lambda params: jax.tree.map(lambda p: jnp.array(p, config.model.dtype, copy=True), params))
  return add_sink_rows(copy(teacher), cfg, tokenizer, config.blocks.sink_text, place)


def add_sink_rows(params, cfg, tokenizer, text, place):
  """Learned sinks start as copies of the embedding of `text`'s token."""
  if not cfg.learned_sinks:
    return params
  sharding = place.sharding((None, 'width'))
  row = single_token(tokenizer, text)
  start = jax.jit(lambda e: jnp.tile(e[row], (cfg.learned_sinks, 1)), out_shardings=sharding)(params['embed'])
  return params | {'sinks': start}


def optim_config(config) -> optim.OptimConfig:
  return optim.OptimConfig(steps=config.steps, **dict(config.optim))


def loop_config(config, label) -> loop.LoopConfig:
  return loop.LoopConfig(steps=config.steps, log_every=config.log_every, save_every=config.save_every, keep=config.keep,
                         tokens_per_step=config.batch * config.data.length, label=label)


def model_meta(cfg, options: blocks.BlockOptions | None, source: str, kind: str) -> dict:
  """What a checkpoint says of its model: enough to export it and to run it."""
  return {'model': dataclasses.asdict(cfg), 'source': str(source), 'kind': kind,
          'blocks': None if options is None else dataclasses.asdict(options)}


def tokenizer(config):
  return encode.load_tokenizer(config.data.tokenizer or config.model.source)


def rows(config, tokenizer):
  """The source of packed rows that config.data describes."""
  data = config.data
  if data.kind == 'pages':
    return pages(data, tokenizer, held_out=False)
  if data.kind != 'files':
    raise ValueError(f"config.data.kind={data.kind!r}; choose 'files' or 'pages'")
  if not data.files:
    raise ValueError('config.data.files is empty: give JSON lines files, e.g. --config.data.files=train.jsonl,more/')
  options = pipeline.FileOptions(length=data.length, max_blocks=data.max_blocks, too_long=data.too_long, chat=data.chat)
  return pipeline.FileRows(list(data.files), tokenizer, options, data.cache, strict=data.strict)


def pages(data, tokenizer, *, held_out: bool, **style):
  """Pages of Python's standard library, of its training or its held-out containers; `style` replaces fields."""
  containers = tuple(stdlib.split_containers(stdlib.read_containers(), held_out))
  page_style = stdlib.PageStyle(**{name: tuple(v) if isinstance(v, (list, tuple)) else v
                                   for name, v in (dict(data.pages) | style).items()})
  return pipeline.PageRows(containers, page_style, tokenizer, length=data.length, max_blocks=data.max_blocks)


def batches(config, source):
  """This process's batches of the global batches, see pipeline.batches."""
  return pipeline.batches(source, batch=config.batch, seed=config.seed, process_index=jax.process_index(),
                          process_count=jax.process_count())


def check_batch(config, place):
  """Raises ValueError if the global batch cannot be cut over the mesh in config.accumulate slices."""
  parts = place.size('batch') * config.accumulate
  if config.batch % parts:
    raise ValueError(f'config.batch={config.batch} must be a multiple of {parts}: {place.size("batch")} devices share '
                     f'the rows, in config.accumulate={config.accumulate} slices')


def main(run):
  """Command line of a trainer: `--config FILE[:ARG] --workdir DIR [--config.key=value ...]`."""
  from absl import app, flags
  from ml_collections import config_flags
  config = config_flags.DEFINE_config_file('config', None, 'Config file, with an optional :argument.', lock_config=True)
  workdir = flags.DEFINE_string('workdir', None, 'Folder of the run: checkpoints, metrics, the resolved config.')
  flags.mark_flags_as_required(['config', 'workdir'])

  def start(argv):
    if len(argv) > 1:
      raise app.UsageError(f'unexpected arguments: {argv[1:]}')
    run(config.value, workdir.value)

  app.run(start)
