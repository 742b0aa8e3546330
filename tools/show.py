"""What a config would run: its keys, the model's parameters and where they go, and the memory that a device needs.

  python -m tools.show --config configs/distill.py:model=qwen3_4b,ctx=32768 --devices 64 [--config.key=value ...]
  python -m tools.show --config configs/distill.py:model=qwen3_4b,ctx=32768 --mesh data=2,fsdp=32 --device v5p
  python -m tools.show --config configs/distill.py:model=qwen3_0_6b,ctx=4096 --mesh fsdp=16 --aot v5e:4x4

Everything comes from shapes: no device and no network is touched, so a laptop can look at the largest model.
--devices says how many devices there will be (a mesh axis of -1 takes what is left), --mesh AXIS=SIZE,... replaces
config.mesh (axes left out are 1) and says so too; --json FILE keeps the result. What the mesh cannot cut evenly (heads, mlp,
vocabulary, rows of the batch, tokens of a row) is an error, with what to change, and exit status 2: here, not when a job has
waited in a queue. --device (one of v4 v5e v5p v6e a100 h100 h200 b200) adds an estimate of the time of a step, and says if
memory does not suffice; see tools/show_step.py for what is in it. --aot TOPOLOGY compiles the step for a TPU slice that need
not be there (extra `kernels-ci`), and prints the compiler's count of memory beside the estimate; see tools/aot_step.py.
The architecture is that of config.model.source if this is a folder here, else config.model.size and .fields.

The memory of a device is estimated row by row. P is the number of parameters that the rules leave on a device; b, the
rows that it computes at a time, is batch / accumulate / devices of the 'batch' rule; T is the tokens of a row, and T' =
T + sinks * max_blocks those of the student's rows, a device's share of them where the 'tokens' rule cuts rows; size() is
that of a dtype. N, K, F and V are a device's share.

  parameters     P size(model.dtype); of a LoRA student those that it trains, here and in the rows that follow
  optimizer      Adam's two moments: 2 P size(model.dtype)
  gradients      P size(model.dtype), and P float32 more if accumulate > 1: the slice at hand, and the sum so far
  teacher        its parameters in teacher.dtype, placed by teacher.rules; distillation only, none if teacher.logits has
                 what it says
  frozen         what a LoRA student adds to, in model.dtype; 0 where that is the teacher
  cast           remat 'none' and 'dots' keep all layers' weights in compute.dtype for the backward pass
  saved          activations from the forward to the backward pass, as JAX's own differentiation lists them; attention
                 counts as a fused kernel that keeps q, k, v, its output and one float32 per query and head. Roughly,
                 in units of L b T' size(compute.dtype): remat 'full' D; 'dots' 3 D + (N + 2 K) H + 2 F; 'none' every
                 intermediate value of a layer, and where rows are cut the keys and values of all of their parts.
                 Fine-tuning in mode 'both' counts both views.
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
exact, and the rest is between 8% too low and 12% too high. The compiler for TPUs takes more: for Qwen3-0.6B on v5e:4x4
(distillation, jax 0.10.2) the total is 9% above the estimate at ctx=4096, chunk=64, 38% at ctx=32768, context=2,
accumulate=2, chunk=256, and 43% at ctx=4096, chunk=512, where logits take some 8 copies in place of 5. So leave room, or
let --aot count.
"""

import dataclasses
import json
import math
import pathlib
import sys

import jax
import jax.numpy as jnp
import rich.console
import rich.table
from absl import flags
from jax.extend.core import Var

from blockattn import mesh as mesh_lib, metrics, options as options_lib, tree
from blockattn.errors import UserError
from blockattn.models import classifier, flops, spec as spec_lib, transformer
from blockattn.train import command, job
from tools import aot_step, arguments, show_step

_GB = 1e9


def describe(config, devices: int, device: str | None = None, **assumed) -> dict:
  """Everything that is printed.

  Args:
    config: of a trainer.
    devices: how many there will be.
    device: of which kind, one of show_step.DEVICES.
    assumed: `mfu` and `links` of show_step.estimate.

  Returns:
    {'config', 'model', 'mesh': {axis: size}, 'parameters': [{'name', 'shape', 'axes', 'mesh_axes', 'count', 'bytes'}],
    'total': {'count', 'bytes'}, 'per_device': {row of the module's docstring: bytes}, 'rows':
    {'per_device', 'at_a_time', 'tokens', 'student_tokens'}, 'step': see show_step.estimate, 'warnings': [str]}. 'bytes' of
    parameters are those of all devices together.

  Raises:
    ValueError: the config cannot run, naming the key or the parameter.
  """
  kind = None if device is None else show_step.DEVICES[device]
  options, made = build(config, devices, kind.platform if kind else 'cpu')
  parameters, memory = parameter_rows(made, options.model.dtype), per_device(options, made)
  return {'config': options_lib.as_json(options), 'model': dataclasses.asdict(made.cfg),
          'mesh': dict(made.placement.mesh.shape), 'parameters': parameters,
          'total': {key: sum(row[key] for row in parameters) for key in ('count', 'bytes')},
          'per_device': memory, 'rows': _rows(options, made),
          'step': show_step.estimate(options, made, kind, **assumed),
          'warnings': _warnings(made) + _too_large(memory['total'], device, kind)}


def build(config, devices: int, platform: str) -> tuple[job.Options, job.Job]:
  """What a config would run, on devices that need not exist."""
  trainer = job.module(job.trainer_of(config))
  options = trainer.read(config)
  return options, trainer.build(options, job.abstract_placement(options, devices), job.architecture_here(options.model),
                                platform=platform)


def _warnings(made):
  rows, known = max(view.tokens for view in made.views), made.cfg.max_positions
  if rows <= known:
    return []
  return [f'rows of {rows} tokens, sinks included, are longer than the {known} positions that the model '
          'was made for: documents that are as long meet positions it has not seen']


def _too_large(total, name, device):
  if device is None or total <= device.memory:
    return []
  return [f'{_gigabytes(total)} are more than the {device.memory / _GB:.0f} GB of a {name}: use more devices, or see '
          'config.mesh, config.accumulate, config.compute.remat and config.chunk']


def parameter_rows(made: job.Job, dtype: str) -> list[dict]:
  """A row of `describe` per parameter."""
  size, names = jnp.dtype(dtype).itemsize, lambda axis: None if axis is None else '+'.join(made.placement.mesh_axes(axis))
  return [{'name': name, 'shape': list(spec.shape), 'axes': list(spec.axes),
           'mesh_axes': [names(axis) or None for axis in spec.axes],
           'count': math.prod(spec.shape), 'bytes': math.prod(spec.shape) * size}
          for name, spec in tree.named_leaves(made.specs, is_leaf=lambda x: isinstance(x, spec_lib.ParamSpec))]


# Memory.


def _rows(options, made):
  rows = options.batch // made.placement.size('batch')
  return {'per_device': rows, 'at_a_time': rows // options.accumulate, 'tokens': options.data.length,
          'student_tokens': made.padded}


def per_device(options: job.Options, made: job.Job) -> dict[str, int]:
  """Bytes on one device by row of the module's docstring, 'total' included."""
  place, compute = made.placement, options.compute
  own, rows, local = device_bytes(made.state.params), _rows(options, made)['at_a_time'], share(made.cfg, place)
  parts, size = place.size('tokens'), jnp.dtype(compute.dtype).itemsize
  views = [view.tokens // parts for view in made.views]
  length = options.data.length // parts
  others = rows * 2 * local.kv_heads * made.cfg.head_dim * (parts - 1) * size
  logits = min(made.logits, length) * flops.head_weights(local) // local.width
  held = {
      'parameters': own,
      'optimizer': device_bytes(made.state.opt_state),
      'gradients': own + (device_bytes(made.state.params, 'float32') if options.accumulate > 1 else 0),
      'teacher': device_bytes(made.frozen.teacher),
      'frozen': 0 if made.teacher else device_bytes(made.frozen.base),
      'cast': cast_bytes(options, made),
      'saved': sum(saved_bytes(local, compute.dtype, compute.remat, rows, tokens)
                   + (others * tokens * made.cfg.layers if compute.remat == 'none' else 0) for tokens in views),
      'hidden': rows * length * made.cfg.width * size * (5 if made.teacher else 3 * len(views)),
      'batch': device_bytes(made.batch),
  }
  loss = {
      'loss: logits': 4 * rows * logits * (5 if made.teacher else 3),
      'loss: head': head_bytes(options, made, local),
  }
  one = dataclasses.replace(local, layers=1)
  layer = {
      'layer: values': saved_bytes(one, compute.dtype, 'none', rows, max(views)) + 2 * others * max(views),
      'layer: weights': whole_bytes(spec_lib.count(transformer.spec(one)['layers']), options, place),
  }
  total = sum(held.values()) + max(sum(loss.values()), sum(layer.values()))
  return held | loss | layer | {'total': total}


def device_bytes(arrays, dtype: str | None = None) -> int:
  """Bytes of a device's part of abstract arrays with shardings; `dtype`: as if they were of this one."""
  return sum(math.prod(x.sharding.shard_shape(x.shape)) * jnp.dtype(dtype or x.dtype).itemsize
             for x in jax.tree.leaves(arrays))


def share(cfg, place) -> transformer.ModelConfig:
  """The model that one device computes: its share of heads, mlp and vocabulary."""
  heads = place.size('kv_heads')
  return dataclasses.replace(cfg, heads=cfg.heads // heads, kv_heads=cfg.kv_heads // heads,
                             mlp=cfg.mlp // place.size('mlp'), vocab=cfg.vocab // place.size('vocab'))


def whole_bytes(count, options, place) -> int:
  """Bytes of weights and their gradient while they are whole along the model width, beside a device's part of them."""
  kept, used = options.model.dtype, options.compute.dtype
  gathered = 2 * jnp.dtype(kept).itemsize if place.size('embed') > 1 else 0
  return count * (gathered + (jnp.dtype(used).itemsize if used != kept else 0))


def head_bytes(options, made, local) -> int:
  """Bytes of the output matrices of student and teacher while they are whole."""
  count, teacher = flops.head_weights(local), made.teacher
  copies = teacher and (made.placement.size('embed') > 1 or teacher.dtype != teacher.compute_dtype)
  return whole_bytes(count, options, made.placement) + (
      count * jnp.dtype(teacher.compute_dtype).itemsize if copies else 0)


def cast_bytes(options, made) -> int:
  if options.compute.remat == 'full' or options.compute.dtype == options.model.dtype:
    return 0
  layers = job.abstract_params(transformer.spec(made.cfg)['layers'], options.compute.dtype, made.placement)
  return device_bytes(layers)


def saved_bytes(cfg, dtype: str, remat: str, rows: int, tokens: int) -> int:
  """Bytes of the values that differentiating the model keeps from its forward to its backward pass, less parameters.

  Args:
    cfg: what one device computes.
    dtype, remat: of Compute.
    rows, tokens: B and T on this device.
  """
  compute = transformer.Compute(dtype=dtype, remat=remat)
  params = spec_lib.abstract(classifier.spec(cfg), 'float32')
  position = jax.ShapeDtypeStruct((rows, tokens), jnp.int32)
  inputs = jax.ShapeDtypeStruct((rows, tokens, *classifier.position_shape(cfg)), jnp.int32)

  def residuals(params, tokens, position_BT):
    forward = lambda params: transformer.run_layers(params, classifier.embed(params, tokens, cfg, compute), position_BT, cfg,
                                                    compute, _fused_attention, keep_kv=False)[0]
    return jax.vjp(forward, params)[1]

  jaxpr = jax.make_jaxpr(residuals)(params, inputs, position).jaxpr
  # Parameters, and their copies in compute.dtype, also as the two-axis matrices that `transformer.dense` multiplies by.
  weights = {p.shape for p in jax.tree.leaves(params)} | {
      (*p.shape[:1], math.prod(p.shape[1:i]), math.prod(p.shape[i:])) for p in jax.tree.leaves(params)
      for i in range(2, len(p.shape))}
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
  console.print(step_table(shown))
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
  if 'compiled' in shown:
    table.add_section()
    for name, size in shown['compiled']['memory'].items():
      table.add_row(f'{shown["compiled"]["topology"]}, compiled: {name}', _gigabytes(size))
  return table


def step_table(shown: dict) -> rich.table.Table:
  step = shown['step']
  table = rich.table.Table('a training step on each device', rich.table.Column('estimate', justify='right'))
  table.add_row('operations that the model needs', f'{step["flops"] / 1e12:.1f} TFLOP')
  for part, size in step['received'].items():
    table.add_row(f'received: {part}', _gigabytes(size))
  if 'seconds' in step:
    table.add_section()
    table.add_row(f'operations at {step["assumed_mfu"]:.0%} of {step["peak"] / 1e12:.0f} TFLOP/s (assumed)',
                  _seconds(step['seconds_of_operations']))
    table.add_row(f'traffic at {step["links"] / 1e9:.0f} GB/s', _seconds(step['seconds_of_links']))
    table.add_row('a step, the longer of both', _seconds(step['seconds']))
    table.add_row('tokens per second of all devices', f'{step["tokens_per_s"]:,.0f}')
    table.add_row('MFU', f'{step["mfu"]:.1%}')
  return table


def _seconds(value):
  return f'{value:.2f} s' if value >= 1 else f'{1e3 * value:.2f} ms'


def _gigabytes(size):
  return f'{size / _GB:.2f} GB' if size >= 1e7 else f'{size / 1e6:.2f} MB'


# Command line.


def main(argv: list[str] | None = None) -> int:
  """The command line. Returns the exit status: 2 for a config that cannot run. If only its batch does not fit, one that
  does is shown."""
  argv = sys.argv[1:] if argv is None else argv
  values = flags.FlagValues()   # its own, so that main can be called twice in a process
  devices = flags.DEFINE_integer('devices', None, 'How many devices there will be; default: as many as --mesh says, or 1.',
                                 lower_bound=1, flag_values=values)
  mesh = flags.DEFINE_string('mesh', None, 'AXIS=SIZE,... in place of config.mesh; axes left out are 1, one may be -1.',
                             flag_values=values)
  device = flags.DEFINE_enum('device', None, sorted(show_step.DEVICES), 'The kind of device, for times.', flag_values=values)
  mfu = flags.DEFINE_float('mfu', 0.4, 'Share of the peak that operations are assumed to reach.', lower_bound=0.01,
                           upper_bound=1.0, flag_values=values)
  links = flags.DEFINE_float('link_gbs', None, 'GB/s that a device receives; default: all links of its kind.',
                             lower_bound=0.001, flag_values=values)
  topology = flags.DEFINE_string('aot', None, 'TPU slice such as v5e:4x4 to compile the step for.', flag_values=values)
  out = flags.DEFINE_string('json', None, 'File to keep the result in.', flag_values=values)
  err = rich.console.Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
  try:
    if command.HELP & set(argv):
      print(__doc__)
      return 0
    config, rest = command.read_config(argv)
    rest = values(['tools.show', *rest])[1:]
    if rest:
      raise UserError(f'unexpected arguments {rest}')
    path, overrides, _ = command.take_files(argv)
    arguments.check_outputs({'json': out.value, 'config': path.partition(':')[0], 'overrides': overrides})
    if mesh.value is not None:
      config.mesh = parse_mesh(mesh.value)
    count = devices.value or mesh_devices(mesh.value, config, topology.value)
    wrong = round_batch_up(config, count)
    shown = describe(config, count, device.value, mfu=mfu.value, links=links.value and links.value * _GB)
    if topology.value:
      shown['compiled'] = aot_step.compile_for(topology.value, config)
    if out.value:
      metrics.write_json(pathlib.Path(out.value), shown)
  except (flags.Error, ValueError, KeyError, AttributeError, TypeError, OSError, RuntimeError) as error:
    err.print(f'show: {error.args[0] if isinstance(error, KeyError) else error}')
    return 2
  print_description(shown, rich.console.Console(width=None if sys.stdout.isatty() else 150, markup=False,
                                                highlight=False, soft_wrap=True))
  if wrong:
    err.print(f'show: {wrong}; shown is --config.batch={config.batch}')
    return 2
  return 0


def round_batch_up(config, devices: int) -> str:
  """Makes config.batch one that the devices can share, so that there is something to show. Returns what was wrong."""
  options = job.module(job.trainer_of(config)).read(config)
  placement = job.abstract_placement(options, devices)
  try:
    job.check_batch_divides(options, placement)
  except ValueError as error:
    config.batch = job.next_batch(options, placement)
    return str(error)
  return ''


def parse_mesh(text: str) -> dict[str, int]:
  """'data=8,fsdp=32' -> the size of every axis.

  Raises:
    ValueError: a part that is no AXIS=SIZE, or an axis that does not exist or stands twice.
  """
  sizes = {}
  for part in text.split(','):
    axis, _, size = part.strip().partition('=')
    if axis not in mesh_lib.AXES:
      raise UserError(f'--mesh={text}: no axis {axis!r}; {tree.did_you_mean(axis, mesh_lib.AXES)}')
    if axis in sizes or not (size.isdigit() and int(size) or size == '-1'):
      raise UserError(f'--mesh={text}: give every axis once, as {axis}=SIZE, a number from 1 (or one -1 with --devices)')
    sizes[axis] = int(size)
  return dict.fromkeys(mesh_lib.AXES, 1) | sizes


def mesh_devices(mesh: str | None, config, topology: str | None) -> int:
  """As many devices as the TPU slice has or --mesh names, 1 without them."""
  if topology is not None:
    return aot_step.devices_of(topology)
  if mesh is None:
    return 1
  if -1 in dict(config.mesh).values():
    raise UserError(f'--mesh={mesh} has a -1, all devices that are left: say how many there are, --devices=N')
  return math.prod(dict(config.mesh).values())


if __name__ == '__main__':
  sys.exit(main())
