"""What a config would run: its keys, the model's parameters and where they go, and the memory that a device needs.

  python -m tools.show --config configs/distill.py:model=qwen3_4b,ctx=32768 --devices 64 [--config.key=value ...]
  python -m tools.show --config configs/distill.py:model=qwen3_4b,ctx=32768 --mesh data=2,fsdp=32 --device v5p
  python -m tools.show --config configs/distill.py:model=qwen3_0_6b,ctx=4096 --mesh fsdp=16 --aot v5e:4x4

Everything comes from shapes: no device and no network is touched, so a laptop can look at the largest model.
--devices says how many devices there will be (a mesh axis of -1 takes what is left), --mesh AXIS=SIZE,... replaces
config.mesh (axes left out are 1) and says so too; --json FILE keeps the result. What the mesh cannot cut evenly (heads, mlp,
vocabulary, rows of the batch, tokens of a row) is an error, with what to change, and exit status 2: here, not when a job has
waited in a queue. --device (one of v4 v5e v5p v6e a100 h100 h200 b200) adds an estimate of the time of a step and of the
whole run, and says if memory does not suffice; what is counted stands in tools/show_step.py and tools/show_memory.py. --aot
TOPOLOGY compiles the step for a TPU slice that need not be there (extra `kernels-ci`), and prints the compiler's count of
memory beside the estimate; see tools/aot_step.py.
The architecture is that of config.model.source if this is a folder here, else config.model.size and .fields.
"""

import dataclasses
import json
import math
import pathlib
import sys
from collections.abc import Sequence

import jax.numpy as jnp
import rich.console
import rich.table

from blockattn import mesh as mesh_lib, metrics, options as options_lib, tree
from blockattn.errors import UserError
from blockattn.models import spec as spec_lib
from blockattn.train import command, job
from tools import aot_step, arguments, show_memory, show_step

_GB = 1e9


def describe(options: job.Options, devices: int, device: str | None = None, **assumed) -> dict:
  """Everything that is printed.

  Args:
    options: of a trainer.
    devices: how many there will be.
    device: of which kind, one of show_step.DEVICES.
    assumed: `mfu` and `links` of show_step.estimate.

  Returns:
    {'config', 'model', 'mesh': {axis: size}, 'parameters': [{'name', 'shape', 'axes', 'mesh_axes', 'count', 'bytes'}],
    'total': {'count', 'bytes'}, 'per_device' and 'rows': see show_memory, 'step': see show_step.estimate, 'run': see
    show_step.whole_run, 'warnings': [str]}. 'bytes' of parameters are those of all devices together.

  Raises:
    ValueError: the config cannot run, naming the key or the parameter.
  """
  kind = None if device is None else show_step.DEVICES[device]
  made = build(options, devices, kind.platform if kind else 'cpu')
  parameters, memory = parameter_rows(made, options.model.dtype), show_memory.per_device(options, made)
  step = show_step.estimate(options, made, kind, **assumed)
  return {'config': options_lib.as_json(options), 'model': dataclasses.asdict(made.cfg),
          'mesh': dict(made.placement.mesh.shape), 'parameters': parameters,
          'total': {key: sum(row[key] for row in parameters) for key in ('count', 'bytes')},
          'per_device': memory, 'rows': show_memory.rows(options, made),
          'step': step, 'run': show_step.whole_run(options, step, devices),
          'warnings': _warnings(options, made) + _too_large(memory['total'], device, kind)}


def build(options: job.Options, devices: int, platform: str) -> job.Job:
  """What a config would run, on devices that need not exist."""
  return job.module_of(options).build(options, job.abstract_placement(options, devices),
                                      job.architecture_here(options.model), platform=platform)


def _warnings(options, made):
  length, known = options.data.length, made.cfg.max_positions
  most = length + made.blocks.most_positions(min(made.blocks.max_blocks, length))
  if most <= known:
    return []
  return [f'rows of {length} tokens, which take {most} positions with what is inserted, are longer than the {known} that '
          'the model was made for: documents that are as long meet positions it has not seen']


def _too_large(total, name, device):
  if device is None or total <= device.memory:
    return []
  return [f'{_gigabytes(total)} are more than the {device.memory / _GB:.0f} GB of a {name}: use more devices, or see '
          'config.mesh, config.accumulate, config.compute.remat and config.chunk']


def parameter_rows(made: job.Job, dtype: str) -> list[dict]:
  size, names = jnp.dtype(dtype).itemsize, lambda axis: None if axis is None else '+'.join(made.placement.mesh_axes(axis))
  return [{'name': name, 'shape': list(spec.shape), 'axes': list(spec.axes),
           'mesh_axes': [names(axis) or None for axis in spec.axes],
           'count': math.prod(spec.shape), 'bytes': math.prod(spec.shape) * size}
          for name, spec in tree.named_leaves(made.specs, is_leaf=lambda x: isinstance(x, spec_lib.ParamSpec))]


# Printing.


def print_description(shown: dict, console: rich.console.Console):
  config = options_lib.flat({'config': shown['config']})
  console.print('\n'.join(f'{key} = {json.dumps(value)}' for key, value in config.items()))
  console.print(parameter_table(shown))
  console.print(memory_table(shown))
  console.print(step_table(shown))
  console.print(run_table(shown))
  for warning in shown['warnings']:
    console.print(f'warning: {warning}')


def parameter_table(shown: dict) -> rich.table.Table:
  table = arguments.table('parameter', 'shape', 'axes', 'mesh axes', 'count', 'bytes', left=4)
  for row in shown['parameters']:
    names = (' '.join(axis or '-' for axis in row[key]) for key in ('axes', 'mesh_axes'))
    table.add_row(row['name'], ' '.join(map(str, row['shape'])), *names, f'{row["count"]:,}', _gigabytes(row['bytes']))
  table.add_section()
  table.add_row('total', '', '', '', f'{shown["total"]["count"]:,}', _gigabytes(shown['total']['bytes']))
  return table


def memory_table(shown: dict) -> rich.table.Table:
  mesh, rows = ' x '.join(f'{axis}={size}' for axis, size in shown['mesh'].items()), shown['rows']
  table = arguments.table('memory of a device', 'estimate', title=(
      f'{mesh}; {rows["per_device"]} rows on a device, {rows["at_a_time"]} at a time, of {rows["tokens"]} tokens, '
      f'{rows["student_tokens"]} with sinks'))
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
  table = arguments.table('a training step on each device', 'estimate')
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


def run_table(shown: dict) -> rich.table.Table:
  run, step = shown['run'], shown['step']
  table = arguments.table('the whole run', 'estimate')
  table.add_row('steps', f'{run["steps"]:,}')
  table.add_row('rows that are read, as often as the data has to be gone through', f'{run["rows"]:,}')
  table.add_row('tokens of them', f'{run["tokens"]:,}')
  table.add_row('operations that the models need', f'{run["flops"]:.3g} FLOP')
  if 'hours' in run:
    table.add_row(f'time at {step["assumed_mfu"]:.0%} of the peak (assumed), steps alone', f'{run["hours"]:.1f} h')
    table.add_row('device hours', f'{run["device_hours"]:,.1f}')
  return table


def _seconds(value):
  return f'{value:.2f} s' if value >= 1 else f'{1e3 * value:.2f} ms'


def _gigabytes(size):
  return f'{size / _GB:.2f} GB' if size >= 1e7 else f'{size / 1e6:.2f} MB'


# Command line.


def read(args, config_args: Sequence[str]) -> job.Options:
  """What --config says, with the other values given, over the mesh of --mesh."""
  values = [f'--config={args.config}', *(f'--overrides={file}' for file in args.overrides), *config_args]
  config, rest = command.read_config(values)
  if rest:
    raise UserError(f'unexpected arguments {rest}')
  options = job.options_of(config)
  return dataclasses.replace(options, mesh=job.MeshOptions(**parse_mesh(args.mesh))) if args.mesh is not None else options


def round_batch_up(options: job.Options, devices: int) -> tuple[job.Options, str]:
  """(the options with a batch that the devices can share, so that there is something to show; what was wrong)."""
  placement = job.abstract_placement(options, devices)
  try:
    job.check_batch_divides(options, placement)
  except ValueError as error:
    return dataclasses.replace(options, batch=job.next_batch(options, placement)), str(error)
  return options, ''


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


def mesh_devices(options: job.Options, args) -> int:
  """As many devices as are said, as the TPU slice has, or as --mesh names; 1 without them."""
  if args.devices or args.aot:
    return args.devices or aot_step.devices_of(args.aot)
  if args.mesh is None:
    return 1
  if -1 in options.mesh.sizes.values():
    raise UserError(f'--mesh={args.mesh} has a -1, all devices that are left: say how many there are, --devices=N')
  return math.prod(options.mesh.sizes.values())


def run(args, config_args: Sequence[str]) -> int:
  arguments.check_outputs({'json': args.json, 'config': args.config.partition(':')[0]})
  options = read(args, config_args)
  devices = mesh_devices(options, args)
  options, wrong = round_batch_up(options, devices)
  shown = describe(options, devices, args.device, mfu=args.mfu, links=args.link_gbs and args.link_gbs * _GB)
  if args.aot:
    shown['compiled'] = aot_step.compile_for(args.aot, options)
  if args.json:
    metrics.write_json(args.json, shown)
  print_description(shown, arguments.console())
  if wrong:
    raise UserError(f'{wrong}; shown is --config.batch={options.batch}')
  return 0


def main(argv: list[str] | None = None) -> int:
  """The command line. Returns the exit status: 2 for a config that cannot run. If only its batch does not fit, one that
  does is shown."""
  parser = arguments.Parser(prog='python -m tools.show', description=__doc__, allow_abbrev=False)
  add = parser.add_argument
  add('--config', required=True, metavar='FILE[:ARG]', help='of the training; --config.KEY=VALUE changes it')
  add('--overrides', action='append', default=[], metavar='FILE', help='values of the config, as for the trainers')
  add('--devices', type=arguments.positive, help='how many there will be (default: as many as --mesh says, or 1)')
  add('--mesh', metavar='AXIS=SIZE,...', help='in place of config.mesh; axes left out are 1, one may be -1')
  add('--device', choices=sorted(show_step.DEVICES), help='the kind of device, for times')
  add('--mfu', type=arguments.amount, default=0.4, help='share of the peak that operations are assumed to reach')
  add('--link_gbs', type=arguments.amount, help='GB/s that a device receives (default: all links of its kind)')
  add('--aot', metavar='TOPOLOGY', help='TPU slice such as v5e:4x4 to compile the step for')
  add('--json', type=pathlib.Path, metavar='FILE', help='to keep the result in')
  args, config_args = parser.parse_known_args(argv)
  return arguments.run('show', lambda: run(args, config_args), mendable=(RuntimeError,))


if __name__ == '__main__':
  sys.exit(main())
