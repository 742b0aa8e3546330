"""The training step of a config, compiled for a TPU slice that need not be there: what tools.show --aot prints.

Compiled is what the trainer would run: forward and backward pass, optimizer and all traffic between devices, at the config's
mesh over the devices of the slice (v5e:4x4, v6e:16x16, v5p:4x4x4: chips), with the kernels for TPUs. It needs the compiler
(pip install -e .[kernels-ci]) and some GB of memory and minutes for published sizes, not a TPU.

The compiler counts, per device:

  arguments      parameters, optimizer, teacher and the batch; the new state takes the place of the old one
  temporaries    all that lives during the step only: activations, gradients, logits, gathered weights
  total          both, and the program itself

and refuses a program that does not fit into a device's memory; then its message is the error.
"""

import math
import re

from jax.experimental import topologies

from blockattn.errors import UserError
from blockattn.train import job
from tools import aot


def devices_of(topology: str) -> int:
  """'v5e:4x4' -> 16.

  Raises:
    ValueError: the text is no slice of a known TPU.
  """
  kind, _, shape = topology.partition(':')
  if kind not in aot.TPUS or not re.fullmatch(r'\d+(x\d+){1,2}', shape):
    raise UserError(f'--aot={topology}: give a TPU slice such as {" or ".join(aot.TPUS.values())}')
  return math.prod(map(int, shape.split('x')))


def compile_for(topology: str, options: job.Options) -> dict:
  """Compiles the step in a process of its own.

  Returns:
    {'topology', 'device' (JAX's name of its kind), 'memory': {'arguments', 'temporaries', 'total'}}, bytes of a device.

  Raises:
    ValueError: no such slice, or the compiler is not installed.
    RuntimeError: the compilation failed; ends with what the compiler said.
  """
  devices_of(topology)
  if (missing := aot.missing_compiler(topology.partition(':')[0])) is not None:
    raise UserError(missing)
  return {'topology': topology} | aot.run_child(_compile, topology, options)[0]


def _compile(topology, options):
  """In the child process."""
  devices = topologies.get_topology_desc(platform='tpu', topology_name=topology).devices
  made = job.module_of(options).build(options, job.make_placement(options, devices), job.architecture_here(options.model),
                                      platform='tpu')
  memory = made.step.lower(made.state, made.frozen, made.batch).compile().memory_analysis()
  held, passing = memory.argument_size_in_bytes, memory.temp_size_in_bytes
  new = memory.output_size_in_bytes - memory.alias_size_in_bytes
  total = held + passing + new + memory.generated_code_size_in_bytes
  return {'memory': {'arguments': held, 'temporaries': passing, 'total': total}, 'device': devices[0].device_kind}
