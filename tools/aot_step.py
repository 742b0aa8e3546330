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

import json
import math
import os
import pathlib
import re
import subprocess
import sys
import tempfile

from tools import aot


def devices_of(topology: str) -> int:
  """'v5e:4x4' -> 16.

  Raises:
    ValueError: the text is no slice of a known TPU.
  """
  kind, _, shape = topology.partition(':')
  if kind not in aot.TPUS or not re.fullmatch(r'\d+(x\d+){1,2}', shape):
    raise ValueError(f'--aot={topology}: give a TPU slice such as {" or ".join(aot.TPUS.values())}')
  return math.prod(map(int, shape.split('x')))


def compile_for(topology: str, config) -> dict:
  """Compiles the step in a process of its own.

  Returns:
    {'topology', 'device' (JAX's name of its kind), 'memory': {'arguments', 'temporaries', 'total'}}, bytes of a device.

  Raises:
    ValueError: no such slice, or the compiler is not installed.
    RuntimeError: the compilation failed; ends with what the compiler said.
  """
  devices_of(topology)
  if (missing := aot.missing_compiler(topology.partition(':')[0])) is not None:
    raise ValueError(missing)
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / 'config.json'
    path.write_text(config.to_json_best_effort())
    environment = os.environ | {'JAX_PLATFORMS': 'cpu', 'TPU_SKIP_MDS_QUERY': '1', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1'}
    done = subprocess.run([sys.executable, '-m', 'tools.aot_step', topology, str(path)], capture_output=True, text=True,
                          env=environment, cwd=pathlib.Path(__file__).resolve().parents[1])
  found = [line for line in done.stdout.splitlines() if line.startswith('{"memory"')]
  if done.returncode or not found:
    raise RuntimeError(f'--aot={topology}: the step does not compile:\n{(done.stdout + done.stderr)[-3000:]}')
  return {'topology': topology} | json.loads(found[-1])


# In the child process.


def _compile(topology, config):
  import jax
  from jax.experimental import topologies

  from blockattn import mesh as mesh_lib
  from tools import show

  jax.default_backend = lambda: 'tpu'   # what kernels.api asks; the process itself computes nothing
  devices = topologies.get_topology_desc(platform='tpu', topology_name=topology).devices
  place = mesh_lib.Placement(mesh_lib.make_mesh(dict(config.mesh), devices), mesh_lib.as_rules(config.rules))
  cfg = show.student(config)
  memory = _step(config, cfg, place).compile().memory_analysis()
  held, passing = memory.argument_size_in_bytes, memory.temp_size_in_bytes
  new = memory.output_size_in_bytes - memory.alias_size_in_bytes
  total = held + passing + new + memory.generated_code_size_in_bytes
  print(json.dumps({'memory': {'arguments': held, 'temporaries': passing, 'total': total},
                    'device': devices[0].device_kind}))


def _step(config, cfg, place):
  """The lowered step."""
  import jax
  import jax.numpy as jnp
  import optax

  from blockattn import optim
  from blockattn.train import loop, setup
  from tools import show

  step_fn, frozen = _trainer(config, cfg, place)
  settings = setup.optim_config(config)
  optimizer = optim.make_optimizer(settings)
  params = _abstract(show.trained(config, cfg), config.model.dtype, place)
  moments = jax.eval_shape(optimizer.init, params)
  placed = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
  moments = optax.tree_map_params(optimizer, lambda x, p: placed(x, p.sharding), moments, params,
                                  transform_non_params=lambda x: placed(x, place.replicated()))
  state = loop.TrainState(jax.ShapeDtypeStruct((), jnp.int32, sharding=place.replicated()), params, moments)
  return step_fn(optimizer, optim.learning_rate(settings)).lower(state, frozen, _batch(config, cfg, place))


def _abstract(specs, dtype, place):
  from blockattn.models import spec
  spec.shardings(specs, place.mesh, place.rules)   # which says what cannot be divided
  return spec.abstract(specs, dtype, place)


def _trainer(config, cfg, place):
  """((optimizer, learning rate) -> jitted step, the abstract `frozen`)."""
  import dataclasses

  from blockattn import blocks
  from blockattn.models import transformer
  from blockattn.train import distill, finetune, segment, setup

  compute = setup.compute(config, place)
  if 'segment' in config:
    return (lambda *optimizer: segment.make_step(cfg, compute, segment.options_of(config), *optimizer)), None
  b, low_rank = config.blocks, setup.lora_options(config)
  sinks = range(cfg.vocab, cfg.vocab + b.sinks) if b.sink_kind == 'learned' else (0,) * b.sinks
  options = blocks.BlockOptions(tuple(sinks), b.positions, config.data.max_blocks,
                                config.data.shared_first)
  whole = dataclasses.replace(cfg, learned_sinks=0)
  base = lambda: _abstract(transformer.spec(whole), config.model.dtype, place)
  if 'finetune' in config:
    make = lambda *optimizer: finetune.make_step(cfg, compute, options, finetune.options_of(config), *optimizer, low_rank)
    return make, base() if low_rank.rank else None
  other = setup.teacher_placement(config, place)
  reading = setup.compute(config, other, dtype=config.teacher.compute_dtype, remat='none')
  models = distill.Models(cfg, whole, compute, reading, options, low_rank)
  teacher = None if config.teacher.logits else _teacher(config, whole, other)
  frozen = distill.Frozen(teacher, (teacher or base()) if low_rank.rank else None)
  return (lambda *optimizer: distill.make_step(models, distill.options_of(config), *optimizer)), frozen


def _teacher(config, cfg, place):
  import jax

  from blockattn.models import spec, transformer, weights
  specs = transformer.spec(cfg)
  if config.teacher.dtype != 'int8':
    return _abstract(specs, config.teacher.dtype, place)
  arrays = jax.eval_shape(lambda params: weights.quantize(params, config.teacher.compute_dtype),
                          spec.abstract(specs, config.model.dtype))
  shardings = weights.quantized_shardings(spec.shardings(specs, place.mesh, place.rules))
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), arrays, shardings)


def _batch(config, cfg, place):
  """The arrays of a global batch."""
  import jax
  import numpy as np

  from blockattn.data import packing
  from blockattn.models import classifier
  row = packing.pack_row([], config.data.length)
  if 'segment' in config:
    units = (config.data.length, *classifier.position_shape(cfg))
    row = {'tokens': np.zeros(units, np.int32), 'layout': row['layout'], 'labels': np.zeros(config.data.length, np.int32)}
  elif 'distill' in config and config.teacher.logits:
    one, most = np.zeros(config.data.length, np.float32), np.zeros((config.data.length, config.teacher.top_k), np.float32)
    row['teacher'] = {'ids': most.astype(np.int32), 'log_p': most, 'target_log_p': one, 'blocked_log_p': one}
  abstract = lambda x: jax.ShapeDtypeStruct((config.batch, *x.shape), x.dtype,
                                            sharding=place.sharding(('batch', *(None,) * x.ndim)))
  return jax.tree.map(abstract, row)


def main(argv=None):
  from ml_collections import ConfigDict
  topology, path = sys.argv[1:] if argv is None else argv
  _compile(topology, ConfigDict(json.loads(pathlib.Path(path).read_text())))


if __name__ == '__main__':
  main()
