"""Compiles the attention kernels for accelerators that this machine does not have, and says what the compilers say.

  python -m tools.aot v5e v6e --length 8192              forward, dq and dkv for TPUs: length of the static schedule
  python -m tools.aot v5e --peer                         beside it the same of JAX's splash attention, causal
  python -m tools.aot h200 --length 65536 --json         registers, spills, serialised wgmma

Needs the compilers: pip install -e .[kernels-ci]. Nothing runs on a device.

For a TPU, `bundles` counts the instruction bundles (about cycles) from a kernel's first matrix instruction to its last:
the work of one step on a tile that needs the mask (`partial`), or on one that does not (`full`); `mxu` is the share of the
matrix units' issue slots that they fill. For a GPU, `registers` is what a thread starts with, `spills` the bytes stored.
"""

import contextlib
import importlib.util
import json
import os
import pathlib
import pickle
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable

from blockattn.errors import UserError
from tools import aot_kernels, arguments
from tools.aot_kernels import BODIES, GPUS, TPUS, Problem

ROOT = pathlib.Path(__file__).resolve().parents[1]
_CHILD = ('import json, pickle, sys; call, args = pickle.loads(bytes.fromhex(sys.argv[1])); '
          'print(json.dumps(call(*args)))')


def missing_compiler(target: str) -> str | None:
  """What to install to compile for `target`, None if it is there."""
  module = 'libtpu' if target in TPUS else 'jax_plugins.xla_cuda13'
  with contextlib.suppress(ModuleNotFoundError):
    if importlib.util.find_spec(module):
      return None
  return f'{target} needs {module}: pip install -e .[kernels-ci]'


def run_child(call: Callable[..., dict], target: str, *args, **environ: str) -> tuple[dict, str]:
  """(what `call(target, *args)` gives, all that was printed), in a process of its own, for compilers of devices that are not
  there.

  Raises:
    RuntimeError: it fails; the message names the target, and ends with what the compiler said.
  """
  environ = os.environ | {'JAX_PLATFORMS': 'cpu', 'TPU_SKIP_MDS_QUERY': '1',
                          'ALLOW_MULTIPLE_LIBTPU_LOAD': '1'} | environ   # several compilations at once
  asked = pickle.dumps((call, (target, *args))).hex()
  done = subprocess.run([sys.executable, '-c', _CHILD, asked], capture_output=True, text=True, env=environ, cwd=ROOT)
  output = done.stdout + done.stderr
  if done.returncode:
    raise RuntimeError(f'{target}: the compilation failed:\n{output[-3000:]}')
  return json.loads(done.stdout.splitlines()[-1]), output


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


def compile_for(target: str, problem: Problem, bodies: tuple[str, ...] = BODIES) -> dict:
  """One target: {'target', 'tiles', 'temporary_bytes', 'jax', 'kernels': {kernel: {...}}}.

  Raises:
    RuntimeError: a compilation failed; the message ends with what the compiler said.
  """
  result = compile_once(target, problem)
  for body in bodies if target in TPUS else ():
    with tempfile.TemporaryDirectory() as dump:
      run_child(aot_kernels.compile_kernels, target, problem, body,
                LIBTPU_INIT_ARGS=f'--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true')
      for kernel, figures in _schedules(pathlib.Path(dump)).items():
        result['kernels'].setdefault(kernel, {})[body] = figures
  return result


def compile_once(target: str, problem: Problem) -> dict:
  """The same, but of TPU kernels nothing is said about their bodies."""
  report, output = run_child(aot_kernels.compile_kernels, target, problem, MOSAIC_GPU_DUMP_PTXAS='1')
  return {'target': target, **report, 'kernels': _ptxas(output)}


def run(options) -> None:
  problem = Problem(options.shape, options.length, options.dtype)
  for target in options.targets:
    if (missing := missing_compiler(target)) is not None:
      raise UserError(missing)
    result = compile_for(target, problem, (*BODIES, 'peer') if options.peer else BODIES)
    print(json.dumps(result) if options.json else _text(result))


def _text(result):
  lines = ['{target}, jax {jax}, tiles {tiles}'.format(**result)]
  if result['temporary_bytes'] is not None:
    lines[0] += f', {result["temporary_bytes"] / 2 ** 20:.0f} MiB of temporaries'
  for kernel, figures in result['kernels'].items():
    say = lambda d: ', '.join(f'{k} {v}' for k, v in d.items())
    parts = (f'{k}: {say(v)}' if isinstance(v, dict) else f'{k} {v}' for k, v in figures.items())
    lines.append(f'  {kernel:8} ' + '; '.join(parts))
  return '\n'.join(lines)


def main(argv=None) -> int:
  parser = arguments.Parser(prog='python -m tools.aot', description=__doc__)
  parser.add_argument('targets', nargs='+', choices=[*TPUS, *GPUS])
  parser.add_argument('--shape', type=_shape, default=Problem.shape, metavar='N,K,H',
                      help='query heads, key/value heads, width; the default is that of Qwen3-4B and Llama-3.1-8B')
  arguments.add_numbers(parser, length=(Problem.length, 'tokens of a row'))
  parser.add_argument('--dtype', default=Problem.dtype, help='of queries, keys and values')
  parser.add_argument('--peer', action='store_true', help='TPUs: splash attention beside ours')
  parser.add_argument('--json', action='store_true', help='one JSON line per target')
  options = parser.parse_args(argv)
  return arguments.run('aot', lambda: run(options), mendable=(RuntimeError,))


def _shape(text):
  N, K, H = map(int, text.split(','))
  return N, K, H


if __name__ == '__main__':
  sys.exit(main())
