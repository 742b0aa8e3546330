"""What a config would run: its keys, the model's parameters and where they go, and the memory that a device needs.

  python -m tools.show --config configs/distill.py:model=qwen3_4b,ctx=32768 --devices 64 [--config.key=value ...]

Everything comes from shapes: no device and no network is touched, so a laptop can look at the largest model.
--devices says how many devices there will be (a mesh axis of -1 takes what is left), --json FILE keeps the result.
The architecture is that of config.model.source if this is a folder here, else config.model.size and .fields.

The memory of a device is estimated row by row. P is the number of parameters that the rules leave on a device; b, the
rows that it computes at a time, is batch / accumulate / devices of the 'batch' rule; T is the tokens of a row, and T' =
T + sinks * max_blocks those of the student's rows; size() is that of a dtype. N, K, F and V are a device's share.

  parameters     P size(model.dtype)
  optimizer      Adam's two moments: 2 P size(model.dtype)
  gradients      P size(model.dtype), twice if accumulate > 1: the sum so far, and the slice at hand
  teacher        P size(teacher.dtype); distillation only
  cast           remat 'none' and 'dots' keep all layers' weights in compute.dtype for the backward pass
  saved          activations from the forward to the backward pass, as JAX's own differentiation lists them; attention
                 counts as a fused kernel that keeps q, k, v, its output and one float32 per query and head. Roughly,
                 in units of L b T' size(compute.dtype): remat 'full' D; 'dots' 3 D + (N + 2 K) H + 2 F; 'none' every
                 intermediate value of a layer. Fine-tuning in mode 'both' counts both views.
  hidden         last hidden states [b, T, D] of student (as they are, in loss order, gradient) and teacher (two)
  batch          the arrays of the global batch's rows on this device
  loss: logits   float32 [b, chunk, V]: logits and log-probabilities of student and teacher and the student's gradient,
                 5 in all; 3 in fine-tuning, and of the segmenter, whose are [b, T, 2]
  loss: head     the output matrix: where a rule cuts it along 'embed', the whole of it and of its gradient in
                 model.dtype, and of the teacher's; and a copy in compute.dtype if that is another one
  layer: values  the layer at work in the backward pass: all its intermediate values, whose room its gradients take over
  layer: weights one transformer layer's, as for the head
  total          the rows above 'loss' and the larger one of 'loss' and 'layer', which are never there together

Compared with the compiler's count (CPU, float32, Qwen3-0.6B cut to 8 layers, ctx=2048, 8 devices; distillation with
each remat, tensor=2, accumulate=2, a small vocabulary, and fine-tuning) parameters, optimizer, teacher and batch are
exact, and the rest is between 8% too low and 12% too high. Kernels' scratch space and fragmentation come on top.
"""

import dataclasses
import json
import math
import os
import pathlib
import sys

import jax
import jax.numpy as jnp
import rich.console
import rich.table
from absl import flags
from jax.extend.core import Var
from jax.sharding import AbstractMesh, AxisType
from ml_collections import config_flags

from blockattn import blocks, mesh as mesh_lib, optim, tree
from blockattn.data import packing
from blockattn.hf import config as hf_config
from blockattn.models import segmenter, spec as spec_lib, transformer
from blockattn.train import distill, finetune, segment, setup

_GB = 1e9


def describe(config, devices: int) -> dict:
  """Everything that is printed.

  Args:
    config: of a trainer: with a `distill`, a `finetune` or a `segment` part.
    devices: how many there will be.

  Returns:
    {'config', 'model', 'mesh': {axis: size}, 'parameters': [{'name', 'shape', 'axes', 'mesh_axes', 'count', 'bytes'}],
    'total': {'count', 'bytes'}, 'per_device': {row of the module's docstring: bytes}, 'rows':
    {'per_device', 'at_a_time', 'tokens', 'student_tokens'}, 'warnings': [str]}. 'bytes' of parameters are those of all
    devices together.

  Raises:
    ValueError: the config cannot run, naming the key or the parameter.
  """
  cfg, place = student(config), placement(config, devices)
  specs = transformer.spec(cfg)
  _check(config, cfg, place, specs)
  parameters = parameter_rows(specs, place, config.model.dtype)
  return {'config': json.loads(config.to_json_best_effort()), 'model': dataclasses.asdict(cfg),
          'mesh': dict(place.mesh.shape), 'parameters': parameters,
          'total': {key: sum(row[key] for row in parameters) for key in ('count', 'bytes')},
          'per_device': per_device(config, cfg, place), 'rows': _rows(config, place),
          'warnings': _warnings(config, cfg)}


def student(config) -> transformer.ModelConfig:
  """The trained model's architecture, learned sinks included.

  Raises:
    ValueError: the source is no folder here, and no size stands beside it.
  """
  model, sinks = config.model, config.blocks
  if model.source and pathlib.Path(model.source).expanduser().is_dir():
    cfg = hf_config.read(pathlib.Path(model.source).expanduser())
  elif model.size or dict(model.fields):
    cfg = setup.architecture(model)
  else:
    raise ValueError(f'config.model.source={model.source!r} is no folder here, and nothing is downloaded: set '
                     'config.model.size to the name of its architecture in blockattn/models/sizes.py')
  if 'segment' in config:
    return segmenter.architecture(cfg, segment.read_options(config).unit_tokens)
  return dataclasses.replace(cfg, learned_sinks=sinks.sinks) if sinks.sink_kind == 'learned' else cfg


def placement(config, devices: int) -> mesh_lib.Placement:
  """The config's mesh and rules over `devices` devices that need not exist.

  Raises:
    ValueError: an unknown mesh axis, or sizes that do not multiply to `devices`.
  """
  sizes = mesh_lib.mesh_sizes(dict(config.mesh), devices)
  rules = tuple((name, tuple(rule) if isinstance(rule, (list, tuple)) else rule) for name, rule in config.rules)
  mesh = AbstractMesh(sizes, mesh_lib.AXES, axis_types=(AxisType.Auto,) * len(sizes))
  return mesh_lib.Placement(mesh, rules)


def _check(config, cfg, place, specs):
  """What training checks at its start, and here costs nothing."""
  spec_lib.shardings(specs, place.mesh, place.rules)
  place.check_divisible('query heads', (cfg.heads,), ('kv_heads',))   # attention cuts both along this rule
  setup.check_batch(config, place)
  setup.optim_config(config)
  if 'distill' in config:
    distill.options_of(config)
  elif 'finetune' in config:
    finetune.FinetuneOptions(**dict(config.finetune), chunk=config.chunk, accumulate=config.accumulate)
  elif 'segment' in config:
    segment.options_of(config)
  else:
    raise ValueError('config has no `distill`, `finetune` or `segment` part; see configs/common.py')


def _warnings(config, cfg):
  rows = student_tokens(config)
  if rows <= cfg.max_positions:
    return []
  return [f'rows of {rows} tokens, sinks included, are longer than the {cfg.max_positions} positions that the model '
          'was made for: documents that are as long meet positions it has not seen']


def parameter_rows(specs, place, dtype) -> list[dict]:
  """A row of `describe` per parameter."""
  size = _size(dtype)
  return [{'name': name, 'shape': list(spec.shape), 'axes': list(spec.axes),
           'mesh_axes': [None if axis is None else '+'.join(place.mesh_axes(axis)) or None for axis in spec.axes],
           'count': math.prod(spec.shape), 'bytes': math.prod(spec.shape) * size}
          for name, spec in tree.named_leaves(specs, is_leaf=_is_spec)]


def _is_spec(x):
  return isinstance(x, spec_lib.ParamSpec)


# Memory.


def student_tokens(config) -> int:
  """T', the tokens of a row in block mode; T for the segmenter, which has none."""
  if 'segment' in config:
    return config.data.length
  return blocks.padded_length(config.data.length, config.blocks.sinks, config.data.max_blocks)


def _rows(config, place):
  rows = config.batch // place.size('batch')
  return {'per_device': rows, 'at_a_time': rows // config.accumulate, 'tokens': config.data.length,
          'student_tokens': student_tokens(config)}


def per_device(config, cfg, place) -> dict[str, int]:
  """Bytes on one device by row of the module's docstring, 'total' included."""
  has_teacher, specs = 'distill' in config, transformer.spec(cfg)
  own = sharded_bytes(specs, place, config.model.dtype)
  rows, local, views = _rows(config, place), share(cfg, place), _views(config)
  hidden = rows['at_a_time'] * config.data.length * cfg.width * _size(config.compute.dtype)
  held = {
      'parameters': own,
      'optimizer': optimizer_bytes(config, specs, place),
      'gradients': own * (2 if config.accumulate > 1 else 1),
      'teacher': sharded_bytes(_teacher_specs(cfg), place, config.teacher.dtype) if has_teacher else 0,
      'cast': cast_bytes(config, specs, place),
      'saved': sum(saved_bytes(local, config.compute.dtype, config.compute.remat, rows['at_a_time'], tokens)
                   for tokens in views),
      'hidden': hidden * (5 if has_teacher else 3 * len(views)),
      'batch': rows['per_device'] * sum(x.nbytes for x in jax.tree.leaves(packing.pack_row([], config.data.length))),
  }
  loss = {
      'loss: logits': 4 * rows['at_a_time'] * _logits_of_a_row(config, local) * (5 if has_teacher else 3),
      'loss: head': head_bytes(config, local, place),
  }
  one = dataclasses.replace(local, layers=1)
  layer = {
      'layer: values': saved_bytes(one, config.compute.dtype, 'none', rows['at_a_time'], max(views)),
      'layer: weights': whole_bytes(spec_lib.count(transformer.spec(one)['layers']), config, place),
  }
  total = sum(held.values()) + max(sum(loss.values()), sum(layer.values()))
  return held | loss | layer | {'total': total}


def _logits_of_a_row(config, local):
  if local.labels:
    return config.data.length * local.labels
  return min(config.chunk, config.data.length) * local.vocab


def _size(dtype):
  return jnp.dtype(dtype).itemsize


def _teacher_specs(cfg):
  return transformer.spec(dataclasses.replace(cfg, learned_sinks=0))


def _views(config):
  """Tokens of each of the student's forward passes."""
  if 'finetune' not in config or config.finetune.mode == 'block':
    return [student_tokens(config)]
  return [config.data.length] + [student_tokens(config)] * (config.finetune.mode == 'both')


def sharded_bytes(specs, place, dtype) -> int:
  """Bytes of a device's part of the parameters."""
  return _size(dtype) * sum(math.prod(place.sharding(spec.axes).shard_shape(spec.shape))
                    for spec in jax.tree.leaves(specs, is_leaf=_is_spec))


def optimizer_bytes(config, specs, place) -> int:
  """Bytes of a device's part of the optimizer's state; what belongs to a parameter is placed like it."""
  optimizer = optim.make_optimizer(setup.optim_config(config))
  state = jax.eval_shape(optimizer.init, spec_lib.abstract(specs, config.model.dtype))
  shardings = tree.named_leaves(spec_lib.shardings(specs, place.mesh, place.rules))
  total = 0
  for name, leaf in tree.named_leaves(state):
    owner = next((sharding for param, sharding in shardings if name.endswith(f'/{param}')), place.replicated())
    total += math.prod(owner.shard_shape(leaf.shape)) * leaf.dtype.itemsize
  return total


def share(cfg, place) -> transformer.ModelConfig:
  """The model that one device computes: its share of heads, mlp and vocabulary."""
  heads = place.size('kv_heads')
  return dataclasses.replace(cfg, heads=cfg.heads // heads, kv_heads=cfg.kv_heads // heads,
                             mlp=cfg.mlp // place.size('mlp'), vocab=cfg.vocab // place.size('vocab'))


def whole_bytes(count, config, place) -> int:
  """Bytes of weights and their gradient while they are whole along the model width, beside a device's part of them."""
  gathered = 2 * _size(config.model.dtype) if place.size('embed') > 1 else 0
  cast = _size(config.compute.dtype) if config.compute.dtype != config.model.dtype else 0
  return count * (gathered + cast)


def head_bytes(config, local, place) -> int:
  """Bytes of the output matrices of student and teacher while they are whole."""
  count = (local.labels or local.vocab) * local.width
  copies = 'distill' in config and (place.size('embed') > 1 or config.teacher.dtype != config.teacher.compute_dtype)
  return whole_bytes(count, config, place) + (count * _size(config.teacher.compute_dtype) if copies else 0)


def cast_bytes(config, specs, place) -> int:
  if config.compute.remat == 'full' or config.compute.dtype == config.model.dtype:
    return 0
  return sharded_bytes(specs['layers'], place, config.compute.dtype)


def saved_bytes(cfg, dtype: str, remat: str, rows: int, tokens: int) -> int:
  """Bytes of the values that differentiating the model keeps from its forward to its backward pass, less parameters.

  Args:
    cfg: what one device computes.
    dtype, remat: of Compute.
    rows, tokens: B and T on this device.
  """
  compute = transformer.Compute(dtype=dtype, remat=remat)
  params = spec_lib.abstract(transformer.spec(cfg), 'float32')
  position = jax.ShapeDtypeStruct((rows, tokens), jnp.int32)
  inputs = jax.ShapeDtypeStruct((rows, tokens, *((cfg.unit_tokens,) if cfg.unit_tokens else ())), jnp.int32)

  def residuals(params, tokens, position_BT):
    forward = lambda params: transformer.run_layers(params, tokens, position_BT, cfg, compute, _fused_attention,
                                                    keep_kv=False)[0]
    return jax.vjp(forward, params)[1]

  jaxpr = jax.make_jaxpr(residuals)(params, inputs, position).jaxpr
  weights = {p.shape for p in jax.tree.leaves(params)}   # parameters, and their copies in compute.dtype
  kept = {var for var in jaxpr.outvars if isinstance(var, Var) and var.aval.shape not in weights}
  return sum(math.prod(var.aval.shape) * var.aval.dtype.itemsize for var in kept)


@jax.custom_vjp
def _fused_attention(q_BTNH, k_BTKH, v_BTKH):
  """Stands for a kernel in a trace of shapes: its result has the right shape, and it keeps what a kernel keeps."""
  return q_BTNH


def _fused_forward(q, k, v):
  return q, (q, k, v, q + 1, jnp.zeros(q.shape[:-1], jnp.float32))


def _fused_backward(kept, out_BTNH):
  return out_BTNH, kept[1], kept[2]


_fused_attention.defvjp(_fused_forward, _fused_backward)


# Printing.


def print_description(shown: dict, console: rich.console.Console):
  """Prints what `describe` returned."""
  console.print('\n'.join(f'{key} = {json.dumps(value)}' for key, value in _flat(shown['config'])))
  console.print(parameter_table(shown))
  console.print(memory_table(shown))
  for warning in shown['warnings']:
    console.print(f'warning: {warning}')


def _flat(config, prefix='config'):
  for key, value in config.items():
    if isinstance(value, dict) and value:
      yield from _flat(value, f'{prefix}.{key}')
    else:
      yield f'{prefix}.{key}', value


def parameter_table(shown: dict) -> rich.table.Table:
  right = lambda name: rich.table.Column(name, justify='right')
  table = rich.table.Table('parameter', 'shape', 'axes', 'mesh axes', right('count'), right('bytes'))
  for row in shown['parameters']:
    table.add_row(row['name'], ' '.join(map(str, row['shape'])), ' '.join(axis or '-' for axis in row['axes']),
                  ' '.join(axis or '-' for axis in row['mesh_axes']), f'{row["count"]:,}', _gigabytes(row['bytes']))
  table.add_section()
  table.add_row('total', '', '', '', f'{shown["total"]["count"]:,}', _gigabytes(shown['total']['bytes']))
  return table


def memory_table(shown: dict) -> rich.table.Table:
  mesh, rows = ' x '.join(f'{axis}={size}' for axis, size in shown['mesh'].items()), shown['rows']
  table = rich.table.Table('memory of a device', rich.table.Column('estimate', justify='right'),
                           title=f'{mesh}; {rows["per_device"]} rows on a device, {rows["at_a_time"]} at a time, of '
                                 f'{rows["tokens"]} tokens, {rows["student_tokens"]} with sinks')
  for name, size in shown['per_device'].items():
    if name == 'total':
      table.add_section()
    table.add_row(name, _gigabytes(size))
  return table


def _gigabytes(size):
  return f'{size / _GB:.2f} GB' if size >= 1e7 else f'{size / 1e6:.2f} MB'


# Command line.


def main(argv: list[str] | None = None) -> int:
  """The command line. Returns the exit status: 2 for a config that cannot run."""
  argv = sys.argv if argv is None else ['tools.show', *argv]
  values = flags.FlagValues()   # its own, so that main can be called twice in a process
  config = config_flags.DEFINE_config_file('config', None, 'Config file, with an optional :argument.', lock_config=True,
                                           flag_values=values, sys_argv=argv)
  devices = flags.DEFINE_integer('devices', 1, 'How many devices there will be.', lower_bound=1, flag_values=values)
  out = flags.DEFINE_string('json', None, 'File to keep the result in.', flag_values=values)
  show_help = flags.DEFINE_bool('help', False, 'This text.', short_name='h', flag_values=values)
  err = rich.console.Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
  try:
    setup.check_overrides(argv)
    rest = values(argv)[1:]
    if show_help.value:
      print(__doc__)
      return 0
    if rest or config.value is None:
      raise ValueError(f'unexpected arguments {rest}' if rest else '--config=FILE is missing')
    shown = describe(config.value, devices.value)
    if out.value:
      _write(pathlib.Path(out.value), shown)
  except (flags.Error, ValueError, KeyError, AttributeError, TypeError, OSError) as error:
    err.print(f'show: {error.args[0] if isinstance(error, KeyError) else error}')
    return 2
  print_description(shown, rich.console.Console(width=None if sys.stdout.isatty() else 150, markup=False,
                                                highlight=False, soft_wrap=True))
  return 0


def _write(path, shown):
  partial = path.with_name(f'{path.name}.tmp')
  partial.write_text(json.dumps(shown, indent=2) + '\n', encoding='utf-8')
  os.replace(partial, path)


if __name__ == '__main__':
  sys.exit(main())
