"""Compiles the attention kernels for accelerators that this machine does not have, and says what the compilers say.

  python -m tools.aot v5e v6e --length 8192              forward, dq and dkv for TPUs: length of the static schedule
  python -m tools.aot v5e --peer                         beside it the same of JAX's splash attention, causal
  python -m tools.aot h200 --length 65536 --json         registers, spills, serialised wgmma

Needs the compilers: pip install -e .[kernels-ci]. Nothing runs on a device.

For a TPU, `bundles` counts the instruction bundles (about cycles) from a kernel's first matrix instruction to its last:
the work of one step on a tile that needs the mask (`partial`), or on one that does not (`full`); `mxu` is the share of the
matrix units' issue slots that they fill. For a GPU, `registers` is what a thread starts with, `spills` the bytes stored.
"""

import argparse
import contextlib
import importlib.util
import inspect
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

from blockattn.errors import UserError
from tools import arguments

ROOT = pathlib.Path(__file__).resolve().parents[1]
TPUS = {'v5e': 'v5e:2x2', 'v5p': 'v5p:2x2x1', 'v6e': 'v6e:2x2'}
GPUS = ('h200',)
BODIES = ('partial', 'full')   # of the TPU kernels; 'peer' stands for splash attention
# What the compiler asks about the device.
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 151397597184
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H200 141GB HBM3e"
"""


def missing_compiler(target: str) -> str | None:
  """What to install to compile for `target`, None if it is there."""
  module = 'libtpu' if target in TPUS else 'jax_plugins.xla_cuda13'
  with contextlib.suppress(ModuleNotFoundError):
    if importlib.util.find_spec(module):
      return None
  return f'{target} needs {module}: pip install -e .[kernels-ci]'


# In the child process: one compilation, whose report the parent reads from its output and from dumped files.

def _compile(options, body):
  import jax
  import jax.numpy as jnp
  from jax.experimental import topologies
  from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding

  from blockattn import blocks
  from blockattn.kernels import gpu, schedule, tiles as tile_sizes, tpu

  target = options.targets[0]
  if target in TPUS:
    topology = topologies.get_topology_desc(platform='tpu', topology_name=TPUS[target])
    platform, impl, attention = 'tpu', 'tpu', tpu
    if body in BODIES:   # one of the two bodies alone, to count its bundles
      tpu._choose = lambda _, masked, whole: whole() if body == 'full' else masked()
  else:
    topology = topologies.get_topology_desc(platform='cuda', topology_name='', target_config=H200, topology='1x1x1')
    platform, impl, attention = 'cuda', 'gpu', gpu
  device = topology.devices[0]
  N, K, H = options.shape
  sizes = options.tiles or tile_sizes.default(impl, impl, options.length, H)   # an implementation's name is its platform's
  abstract = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device))
  layout = jax.tree.map(lambda x: abstract((options.rows, options.length), x.dtype), blocks.from_lengths([[[8]]], 8))
  q, k = (abstract((options.rows, options.length, heads, H), jnp.dtype(options.dtype)) for heads in (N, K))

  if body == 'peer':
    forward, inputs = _splash(options, sizes), [abstract((x.shape[2], x.shape[1], H), x.dtype) for x in (q, k, k)]
  else:
    forward = lambda q, k, v, layout: attention.attention(q, k, v, schedule.token_marks(layout),
                                                          tile_sizes.Tiles(*sizes))[0]
    inputs = [q, k, k, layout]

  def both(inputs, grad):
    out, pull = jax.vjp(lambda q, k, v: forward(q, k, v, *inputs[3:]), *inputs[:3])
    return out, pull(grad)

  facts = {'device_kind': device.device_kind, 'num_cores': 132 if platform == 'cuda' else 1}
  if 'platform' in inspect.signature(AbstractDevice).parameters:
    facts['platform'] = platform
  with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ('x',), abstract_device=AbstractDevice(**facts))):
    lowered = jax.jit(forward).lower(*inputs) if options.forward else jax.jit(both).lower(inputs, inputs[0])
  memory = lowered.compile().memory_analysis()
  temporary = getattr(memory, 'temp_size_in_bytes', None) if platform == 'tpu' else None   # unknown for the GPU
  print(json.dumps({'tiles': list(sizes), 'temporary_bytes': temporary, 'jax': jax.__version__}))


def _splash(options, sizes):
  """JAX's splash attention, full causal, whose tile does the same products as ours."""
  from jax.experimental.pallas.ops.tpu import splash_attention as splash
  query, key = sizes
  tiles = splash.splash_attention_kernel.BlockSizes(
      block_q=query, block_kv=key, block_kv_compute=key, block_q_dkv=query, block_kv_dkv=key,
      block_kv_dkv_compute=key, block_q_dq=query, block_kv_dq=key)
  masks = splash.splash_attention_mask
  heads = masks.MultiHeadMask([masks.CausalMask((options.length, options.length))] * options.shape[0])
  return splash.splash_attention_kernel.make_splash_mha(heads, head_shards=1, q_seq_shards=1, block_sizes=tiles)


def run_child(*command: str, **environ: str) -> tuple[dict, str]:
  """(the last JSON object that a module with arguments prints, its whole output); it compiles in a process of its own.

  Raises:
    RuntimeError: it fails; the message ends with what the compiler said.
  """
  environ = os.environ | {'JAX_PLATFORMS': 'cpu', 'TPU_SKIP_MDS_QUERY': '1',
                          'ALLOW_MULTIPLE_LIBTPU_LOAD': '1'} | environ   # several compilations at once
  done = subprocess.run([sys.executable, '-m', *command], capture_output=True, text=True, env=environ, cwd=ROOT)
  output, found = done.stdout + done.stderr, [line for line in done.stdout.splitlines() if line.startswith('{"')]
  if done.returncode or not found:
    raise RuntimeError(f'the compilation failed:\n{output[-3000:]}')
  return json.loads(found[-1]), output


_KERNEL = re.compile(r'block_attention_(?:forward|dq|dkv)|splash_\w+')
_KIND = (('dkv', 'dkv'), ('dq', 'dq'), ('forward', 'forward'), ('fwd', 'forward'), ('splash', 'forward'))


def _schedules(folder):
  """{kernel: {'bundles', 'mxu'}} from the dumped utilisation of the matrix units, bundle by bundle."""
  found = {}
  for path in folder.glob('*final_hlo-static-per-bundle-utilization*'):
    if not (name := _KERNEL.search(path.name)):
      continue
    lines = path.read_text().splitlines()
    slots = next(int(line.split()[0]) for line in lines if re.fullmatch(r'[\d ]+', line.strip()))   # of the matrix units
    used = [int(line.split()[0]) for line in lines if re.fullmatch(r'(\s*\d+){10}\s*', line)][1:]
    active = [i for i, count in enumerate(used) if count]
    if active:
      bundles = active[-1] - active[0] + 1
      kind = next(kind for part, kind in _KIND if part in name[0])
      found[kind] = {'bundles': bundles, 'mxu': round(sum(used) / bundles / slots, 2)}
  return found


def _ptxas(output):
  """{kernel: {'registers', 'spills', 'serialised'}} from ptxas' messages."""
  found = {}
  for name, text in re.findall(r"Compiling entry function 'block_attention_(\w+?)_mosaic_gpu_kernel'(.*?Used \d+ registers)",
                               output, re.DOTALL):
    number = lambda pattern, text=text: int(re.search(pattern, text)[1])
    found[name] = {'registers': number(r'Used (\d+)'), 'spills': number(r'(\d+) bytes spill stores'),
                   'serialised': bool(re.search(rf'C75\d\d[^\n]*block_attention_{name}', output))}
  return found


def compile_for(target: str, arguments: list[str], bodies: tuple[str, ...] = BODIES) -> dict:
  """One target: {'target', 'tiles', 'temporary_bytes', 'jax', 'kernels': {kernel: {...}}}.

  Raises:
    RuntimeError: a compilation failed; the message ends with what the compiler said.
  """
  result = compile_once(target, arguments)
  if target in GPUS:
    return result
  kernels = {}
  for body in bodies:
    with tempfile.TemporaryDirectory() as dump:
      run_child('tools.aot', target, *arguments, '--child', body,
                LIBTPU_INIT_ARGS=f'--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true')
      for kernel, figures in _schedules(pathlib.Path(dump)).items():
        kernels.setdefault(kernel, {})[body] = figures
  return result | {'kernels': kernels}


def compile_once(target: str, arguments: list[str]) -> dict:
  """The same, but of TPU kernels nothing is said about their bodies."""
  report, output = run_child('tools.aot', target, *arguments, '--child', 'both', MOSAIC_GPU_DUMP_PTXAS='1')
  return {'target': target} | report | {'kernels': _ptxas(output)}


def _arguments(argv):
  numbers = lambda count: lambda text: _numbers(text, count)
  parser = arguments.Parser(prog='python -m tools.aot', description=__doc__)
  parser.add_argument('targets', nargs='+', choices=[*TPUS, *GPUS])
  parser.add_argument('--shape', type=numbers(3), default=(32, 8, 128), metavar='N,K,H',
                      help='query heads, key/value heads, width; the default is that of Qwen3-4B and Llama-3.1-8B')
  arguments.add_numbers(parser, length=(8192, 'tokens of a row'), rows=(1, 'rows of the batch'))
  parser.add_argument('--dtype', default='bfloat16', help='(default %(default)s)')
  parser.add_argument('--tiles', type=numbers(2), metavar='QUERY,KEY', help='default: those of kernels/tiles.py')
  parser.add_argument('--forward', action='store_true', help='the forward kernel only')
  parser.add_argument('--peer', action='store_true', help='TPUs: splash attention beside ours')
  parser.add_argument('--json', action='store_true', help='one JSON line per target')
  parser.add_argument('--child', choices=('both', *BODIES, 'peer'), help=argparse.SUPPRESS)
  return parser.parse_args(argv)


def _numbers(text, count):
  numbers = tuple(int(x) for x in text.split(',') if x.isdigit())
  if len(numbers) != count:
    raise argparse.ArgumentTypeError(f'{text!r}: give {count} numbers, separated by commas')
  return numbers


def _forwarded(options):
  join = lambda numbers: ','.join(map(str, numbers))
  given = ['--shape', join(options.shape), '--length', str(options.length), '--rows', str(options.rows),
           '--dtype', options.dtype]
  return given + (['--tiles', join(options.tiles)] if options.tiles else []) + (['--forward'] if options.forward else [])


def run(options) -> None:
  for target in options.targets:
    if (missing := missing_compiler(target)) is not None:
      raise UserError(missing)
    result = compile_for(target, _forwarded(options), (*BODIES, 'peer') if options.peer else BODIES)
    print(json.dumps(result) if options.json else _text(result))


def main(argv=None) -> int:
  options = _arguments(argv)
  if options.child:
    _compile(options, options.child)
    return 0
  return arguments.run('aot', lambda: run(options), mendable=(RuntimeError,))


def _text(result):
  lines = ['{target}, jax {jax}, tiles {tiles}'.format(**result)]
  if result['temporary_bytes'] is not None:
    lines[0] += f', {result["temporary_bytes"] / 2 ** 20:.0f} MiB of temporaries'
  for kernel, figures in result['kernels'].items():
    say = lambda d: ', '.join(f'{k} {v}' for k, v in d.items())
    parts = (f'{k}: {say(v)}' if isinstance(v, dict) else f'{k} {v}' for k, v in figures.items())
    lines.append(f'  {kernel:8} ' + '; '.join(parts))
  return '\n'.join(lines)


if __name__ == '__main__':
  sys.exit(main())
