"""The same training on every mesh: how far apart its losses are, and whether checkpoints pass from one mesh to another.

  python -m tools.meshes [--steps 20] [--json FILE]

A short block distillation of a small random model on pages of Python's standard library, with block dropout and token
weights, runs on one device, on eight simulated devices in every shape of the mesh, and as two and four processes of two
devices each, which talk over loopback. Printed is how far each run's losses are from those of one device, at most and as a
part of the loss. Then one run passes through many meshes and numbers of processes: it is sent SIGTERM after a few steps and
started again on the next mesh, and its losses are compared too. Exits with 1 if anything is more than 1e-5 apart.
"""

import itertools
import math
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time

import jax

from blockattn import mesh, metrics
from blockattn.hf import convert
from blockattn.models import spec, transformer
from configs import tiny
from tools import arguments

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONFIG = ('--config=configs/tiny.py', '--config.batch=8', '--config.data.length=256', '--config.data.max_blocks=32',
          '--config.data.pages.questions=(1,1)', '--config.data.segmenter=', '--config.optim.warmup=2',
          '--config.optim.lr=1e-3', '--config.log_every=1', '--config.save_every=1000', '--config.compute.tiles=(16,16)',
          '--config.distill.drop_rate=0.3', '--config.distill.weights.form=relu', '--config.blocks.sinks=4',
          '--config.chunk=64')
# Eight heads: every axis of the mesh may have eight devices.
MODEL = transformer.ModelConfig('llama', vocab=2048, width=64, layers=2, heads=8, kv_heads=8, head_dim=8, mlp=128)
# The passing run: (processes, devices of each, shape of the mesh), as many steps on each as on the next.
CHAIN = ((1, 8, (2, 2, 2, 1)), (2, 2, (2, 2, 1, 1)), (1, 1, (1, 1, 1, 1)), (4, 2, (4, 1, 1, 2)), (1, 8, (1, 2, 2, 2)))


def shapes(devices: int) -> list[tuple[int, ...]]:
  """All sizes of the mesh's axes that multiply to so many devices."""
  divisors = [n for n in range(1, devices + 1) if devices % n == 0]
  return [shape for shape in itertools.product(divisors, repeat=len(mesh.AXES)) if math.prod(shape) == devices]


def command(workdir, steps, processes, devices, shape) -> list[str]:
  sizes = [f'--config.mesh.{axis}={size}' for axis, size in zip(mesh.AXES, shape, strict=True)]
  sizes.append(f'--config.model.source={workdir.parent / "teacher"}')
  return [sys.executable, '-m', 'launch.processes', '--processes', str(processes), '--devices', str(devices), '-m',
          'blockattn.train.distill', *CONFIG, f'--config.steps={steps}', *sizes, f'--workdir={workdir}']


def start(workdir, *where) -> subprocess.Popen:
  env = os.environ | {'PYTHONPATH': str(ROOT), 'JAX_COMPILATION_CACHE_DIR': str(workdir.parent / 'compiled'),
                      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0', 'JAX_DISABLE_MOST_OPTIMIZATIONS': '1'}
  return subprocess.Popen(command(workdir, *where), cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True)


def write_teacher(folder):
  """MODEL with random values and the tiny teacher's tokenizer, in the Hugging Face format."""
  convert.save(spec.init(transformer.spec(MODEL), jax.random.key(0), 'float32'), MODEL, folder, source=tiny.TEACHER, meta={},
               card='', dtype='float32')


def finish(process, expected: int = 0):
  """Waits for a run. Raises RuntimeError with its last lines if it ends otherwise than expected."""
  output = process.communicate()[0]
  if process.returncode != expected:
    raise RuntimeError(f'exit code {process.returncode}, expected {expected}: {" ".join(process.args)}\n{output[-4000:]}')
  return output


def losses(workdir) -> dict[int, float]:
  path = workdir / metrics.FILE_NAME
  return {line['step']: line['loss'] for line in metrics.read_metrics(path)} if path.exists() else {}


def apart(workdir, reference) -> float:
  """The largest difference of two runs' losses, as a part of the loss.

  Raises:
    RuntimeError: a step is missing or stands twice.
  """
  steps = [line['step'] for line in metrics.read_metrics(workdir / metrics.FILE_NAME)]
  if steps != sorted(reference):
    raise RuntimeError(f'{workdir}: steps {steps}, expected {sorted(reference)}')
  return max(abs(loss / reference[step] - 1) for step, loss in losses(workdir).items())


def passing_run(workdir, steps) -> list[str]:
  """One run that moves from mesh to mesh; returns where it was saved."""
  saved = []
  for number, where in enumerate(CHAIN):
    process, last = start(workdir, steps, *where), number == len(CHAIN) - 1
    until = (number + 1) * steps // len(CHAIN)
    while not last and process.poll() is None and max(losses(workdir), default=0) < until:
      time.sleep(0.05)
    if not last:
      process.send_signal(signal.SIGTERM)
    output = finish(process, 0 if last else 75)
    saved += [f'step {step} on {name(*where)}' for step in re.findall(r'SIGTERM: saved step (\d+)', output)[:1]]
  return saved


def name(processes, devices, shape) -> str:
  sizes = ' x '.join(f'{axis}={size}' for axis, size in zip(mesh.AXES, shape, strict=True) if size > 1) or 'one device'
  return sizes if processes == 1 else f'{processes} processes: {sizes}'


def run(args) -> int:
  places = [(1, 1, (1, 1, 1, 1)), *((1, 8, shape) for shape in shapes(8)),
            *((2, 2, shape) for shape in ((4, 1, 1, 1), (1, 4, 1, 1), (2, 1, 2, 1), (2, 1, 1, 2))),
            *((4, 2, shape) for shape in ((8, 1, 1, 1), (2, 2, 2, 1), (4, 1, 1, 2)))]
  results, differences = {}, []
  print('| mesh | largest difference of a loss / the loss |\n|---|---|')

  def compare(workdir, key, shown):
    results[key] = losses(workdir)
    differences.append(apart(workdir, results['one device']))
    print(f'| {shown} | {differences[-1]:.1e} |', flush=True)

  with tempfile.TemporaryDirectory(prefix='meshes') as folder:
    folder = pathlib.Path(folder)
    write_teacher(folder / 'teacher')
    for number, where in enumerate(places):
      finish(start(folder / str(number), args.steps, *where))
      compare(folder / str(number), name(*where), name(*where))
    saved = passing_run(folder / 'passing', args.steps)
    compare(folder / 'passing', 'passing', f'one run, moved: {"; ".join(saved)}; the rest on {name(*CHAIN[-1])}')
  low, high = (most(results['one device'].values()) for most in (min, max))
  print(f'\nlosses from {low:.3f} to {high:.3f}; at most {max(differences):.1e} apart over {args.steps} steps')
  if args.json:
    metrics.write_json(args.json, results)
  return 0 if max(differences) <= 1e-5 else 1


def main(argv: list[str] | None = None) -> int:
  parser = arguments.Parser(prog='python -m tools.meshes', description=__doc__)
  arguments.add_numbers(parser, steps=(20, 'of each run'))
  parser.add_argument('--json', type=pathlib.Path, metavar='FILE', help='losses of every run')
  args = parser.parse_args(argv)
  return arguments.run('meshes', lambda: run(args))


if __name__ == '__main__':
  sys.exit(main())
