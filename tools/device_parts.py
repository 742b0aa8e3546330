"""What tools.device measures, a part per process: python -m tools.device_parts PART FILE. See there.

A case that fails is written down with its traceback and the next one starts; one that stands in FILE already is left alone.
"""

import dataclasses
import functools
import json
import os
import pathlib
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
import types
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from blockattn import blocks, metrics
from blockattn.kernels import api
from tools import arguments, device

ROOT = pathlib.Path(__file__).resolve().parents[1]


class Record:
  """The cases of one part, written to its file one by one."""

  def __init__(self, path: pathlib.Path, name: str):
    self.path, self.start = path, time.monotonic()
    self.found = {'part': name} | device.read(path)
    self.found['cases'] = {case: value for case, value in self.found.get('cases', {}).items() if 'error' not in value}

  def measure(self, case: str, call: Callable[[], dict]) -> dict | None:
    """What `call()` gives, or gave earlier, or None if it fails."""
    if case in self.found['cases']:
      return self.found['cases'][case]
    try:
      value = call()
    except Exception:
      value = {'error': traceback.format_exc()[-4000:]}
    self.add(case, value)
    return None if 'error' in value else value

  def add(self, case: str, value: dict):
    self.found['cases'][case] = value
    metrics.write_json(self.path, self.found)
    shown = value['error'].strip().splitlines()[-1] if 'error' in value else json.dumps(value)
    print(f'{case}: {shown[:300]}', flush=True)


def attention_impl(options, record: Record) -> str:
  """--impl; by default `gpu` if the part `tests` has passed, or, where it has not been run, if one layout agrees here."""
  platform = jax.default_backend()
  if options.impl or platform != 'gpu':
    return api.resolve(options.impl or 'auto', platform)
  tests = device.read(record.path.with_name('tests.json')).get('state')
  if tests is None:
    agrees = record.measure('gpu kernels against the reference', _agrees)
    return 'gpu' if agrees and agrees['difference'] < 0.05 else 'xla'
  return 'gpu' if tests == 'done' else 'xla'


def _agrees():
  shape = lambda heads: (1, 1024, heads, 128)
  keys = jax.random.split(jax.random.key(0), 3)
  q, k, v = (jax.random.normal(key, shape(heads), jnp.bfloat16) for key, heads in zip(keys, (4, 2, 2)))
  layout = blocks.from_lengths([[[300, 400, 324]]], 1024)
  out = {impl: api.block_attention(q, k, v, layout, impl=impl).astype(jnp.float32) for impl in ('gpu', 'reference')}
  return {'difference': float(jnp.abs(out['gpu'] - out['reference']).max())}


# card


def card(options, record: Record):
  record.measure('facts', _facts)
  record.measure('matmul', lambda: {'tflops': _peak(options.toy)})
  record.measure('copies', lambda: _copies(options.toy))


def _facts():
  from tools.bench import measuring
  one = jax.devices()[0]
  asked = 'name,driver_version,memory.total,clocks.max.sm,clocks.sm,clocks.mem,power.limit,temperature.gpu'
  try:
    said = subprocess.run(['nvidia-smi', f'--query-gpu={asked}', '--format=csv,noheader'], capture_output=True, text=True,
                          timeout=20).stdout.strip()
  except (OSError, subprocess.TimeoutExpired):
    said = None
  return measuring.machine() | {
      'kind': one.device_kind, 'capability': str(getattr(one, 'compute_capability', '')), 'nvidia-smi': said, 'asked': asked,
      'impl': api.resolve('auto', jax.default_backend())}


def _peak(toy):
  from tools.bench import measuring
  return measuring.matmul_rate(256 if toy else None) / 1e12


def _copies(toy):
  """GB/s: on the device, counting bytes read and written; between host and device, counting them once."""
  from tools.bench import measuring
  x = jnp.asarray(np.random.default_rng(0).standard_normal(1 << (16 if toy else 28), np.float32))
  copy, host = jax.jit(lambda x: x + 1), np.asarray(x)
  best = lambda call, wait: x.nbytes / min(measuring.seconds_of(call, 5, wait)) / 1e9
  return {'device': 2 * best(lambda: copy(x), jax.block_until_ready),
          'to the device': best(lambda: jax.device_put(host), jax.block_until_ready),
          'to the host': best(lambda: np.asarray(x + 0), lambda x: x)}


# tests


def tests(options, record: Record):
  """Each test is a case; all run in this process."""
  import pytest
  os.environ |= {} if options.toy else {'BLOCKATTN_TEST_DEVICE': '1'}
  which = ['-k', 'resolve'] if options.toy else ['-m', 'device']
  deselected = [f'--deselect=tests/{case}' for case in record.found['cases']]
  os.chdir(ROOT)
  arguments = ['-q', '-p', 'no:cacheprovider', '-p', 'no:xdist', *which, *deselected]
  code = pytest.main(['tests/kernels/kernels_test.py', *arguments], plugins=[_Outcomes(record)])
  if code not in (0, 5) and not device.failures(record.found):   # 5: none was left to run
    record.add('pytest', {'error': f'pytest ended with code {code} and no test failed'})


class _Outcomes:
  def __init__(self, record):
    self._record = record

  def pytest_runtest_logreport(self, report):
    if report.when == 'call' or report.outcome != 'passed' and report.when == 'setup':
      value = {'outcome': report.outcome, 'seconds': round(report.duration, 2)}
      self._record.add(report.nodeid.removeprefix('tests/'),
                       value | ({'error': report.longreprtext[-4000:]} if report.failed else {}))


# kernels


def kernels(options, record: Record):
  """A case per length, blocks, pass and peer; the most telling block length first."""
  from tools.bench import attention, gpu
  shape, lengths, sizes, last = ((4, 2, 64), (256,), (64,), 32) if options.toy else ((32, 8, 128), (8192, 65536),
                                                                                      (1024, 512, 2048), 512)
  impl = 'gpu' if jax.default_backend() == 'gpu' else api.resolve('auto', jax.default_backend())
  peak = record.measure('matmul', lambda: {'tflops': _peak(options.toy)})
  for block in sizes:
    for length in lengths:
      case = attention.Case(length, gpu.blocks_of(length, block, last), shape[2], shape[0], shape[1], last)
      inputs, expected = attention.make_inputs(case, 'bfloat16'), None
      for name, peer in gpu.peers(impl).items():
        if peer.full and block != sizes[0]:
          continue   # it computes the same whatever the blocks are
        for mode in gpu.MODES:
          measure = functools.partial(gpu.measure, peer, inputs, mode, 5, peak['tflops'],
                                      None if peer.full else expected)
          found = record.measure(f'T={length} block={block} last={last} {mode} {name}',
                                 lambda m=measure, required=name == gpu.OURS: _checked(m(), required))
          if name == gpu.OURS and mode == 'forward' and found:
            expected = peer.build(inputs, 'forward').output()


def _checked(row, required):
  """A peer that cannot run is a result; a kernel of ours that cannot is a failure."""
  return {'error': row['skipped']} if required and 'skipped' in row else row


# ttft


def ttft(options, record: Record):
  """A case per length."""
  from tools.bench import ttft as bench
  impl = attention_impl(options, record)
  small = dict(model='small', dtype='float32', lengths=[256]) if options.toy else dict(
      model='qwen3_4b', dtype='bfloat16', lengths=[8192, 65536, 32768])
  args = types.SimpleNamespace(**small, impl=impl, block=64 if options.toy else 1024, last=32 if options.toy else 512,
                               samples=1 if options.toy else 3, states=('all', 'half', 'none'), no_torch=True,
                               **dict.fromkeys(('peak_tflops', 'bandwidth_gbs'), 1.0 if options.toy else None))
  model = bench.load_model(args)
  rate = record.measure('rates', lambda: bench.rates(args))
  for length in args.lengths:
    def measure(length=length):
      with tempfile.TemporaryDirectory() as folder:
        return {'impl': impl} | bench.measure_length(model, length, rate, args, pathlib.Path(folder))
    record.measure(f'{args.model} {args.dtype} T={length} block={args.block} last={args.last}', measure)


# step


def step(options, record: Record):
  """A case per model and kind of step."""
  from blockattn import mesh
  from blockattn.models import sizes, transformer
  from tools.bench import step as bench
  impl = attention_impl(options, record)
  place = mesh.Placement(mesh.make_mesh({}, jax.devices()[:1]))
  compute = transformer.Compute(dtype='float32' if options.toy else 'bfloat16', impl=impl, remat='full')
  most = (bench.DISTILLED, bench.TUNED, bench.STORED, bench.BLOCK, bench.LORA)
  if options.toy:
    cases = [('toy', bench.model(64, 1, 256), 256, 'float32', most[:1])]
  else:
    small, large = sizes.get('qwen3_0_6b'), sizes.get('qwen3_4b')
    cases = [('qwen3_0_6b', small, 8192, 'float32', most[:3]), ('qwen3_4b', large, 8192, 'bfloat16', (bench.LORA,)),
             ('qwen3_4b', large, 8192, 'bfloat16', most[:2]), ('qwen3_0_6b', small, 8192, 'float32', most[3:])]
  peak = record.measure('matmul', lambda: {'tflops': _peak(options.toy)})
  for name, cfg, length, dtype, kinds in cases:
    count = 4 if options.toy else 16
    batch = bench.make_batch(1, length, count, 16 if options.toy else 64, 16 if options.toy else 256, cfg.vocab)
    made = bench.make_steps(cfg, batch, place, compute, dtype=dtype, max_blocks=count + 1)
    for kind in kinds:
      record.measure(f'{name} T={length} {dtype} parameters, {kind}',
                     lambda make=made[kind]: {'impl': impl} | _time_step(make(), peak['tflops'], 2 if options.toy else 5))


def _time_step(made, peak, samples):
  state = made.state()
  start = time.perf_counter()
  compiled = made.made.step.lower(state, made.frozen, made.batch).compile()
  compiling, memory, seconds = time.perf_counter() - start, compiled.memory_analysis(), []
  for _ in range(samples + 1):
    start = time.perf_counter()
    state, values = jax.block_until_ready(compiled(state, made.frozen, made.batch))
    seconds.append(time.perf_counter() - start)
  used = {name: getattr(memory, f'{name}_size_in_bytes', None) for name in ('argument', 'temp', 'output', 'alias')}
  middle = statistics.median(seconds[1:])
  flops = made.flops(float(values['loss_tokens']))
  return {'ms': 1e3 * middle, 'samples': [1e3 * s for s in seconds[1:]], 'flops': flops, 'tflops': flops / middle / 1e12,
          'of the matmul, %': 100 * flops / middle / 1e12 / peak, 'compiled in s': compiling, 'bytes': used,
          'loss': float(values['loss'])}


# train


@dataclasses.dataclass(frozen=True)
class Plan:
  """A training, and what is asked of the model before and after it: arguments of the trainer and of tools.evaluate."""
  model: str
  trainer: list[str]
  evaluation: list[str]


def train(options, record: Record):
  """Distils a model until a quarter of the time is left, evaluates before and after, and packs the run for its report."""
  work = pathlib.Path(tempfile.gettempdir()) / f'blockattn-{"toy" if options.toy else "device"}-run'
  if not record.found['cases']:   # what lies there is of another OUT, perhaps of another model
    shutil.rmtree(work, ignore_errors=True)
  work.mkdir(exist_ok=True)
  impl = attention_impl(options, record)
  if options.model and record.measure('model', lambda: _to_hf(options.model, work / 'model')) is None:
    return
  plan = _plan(options, work, impl)
  record.measure('before', lambda: _evaluate(plan, plan.model, work / 'before'))
  left = options.seconds - (time.monotonic() - record.start)
  record.measure('training', lambda: _train(plan, work / 'run', 0.7 * left))
  record.measure('after', lambda: _evaluate(plan, work / 'run', work / 'after'))
  record.measure('packed', lambda: _pack(work, record.path.with_name('train.tar.gz')))


def _plan(options, work, impl) -> Plan:
  steps = 3 if options.toy else 10 ** 6   # without an end: what time allows, at a rate that stays
  for_ever = [f'--config.steps={steps}', f'--config.save_every={steps}', '--config.log_every=5',
              '--config.optim.final_lr=1.0']
  if not options.model:
    from configs import tiny
    return Plan(str(tiny.TEACHER), ['--config=configs/tiny.py', *for_ever, '--config.batch=64'],
                ['--data', 'pages', '--limit', '256', '--batch', '128', '--max-new', '24'])
  length, blocks, batch, asked, new = (64, 8, 4, 4, 4) if options.toy else (2048, 32, 32, 96, 32)
  model, files = str(work / 'model'), [str(path) for path in sorted(options.data.glob('train*.jsonl*'))]
  trainer = [f'--config=configs/distill.py:model=llama32_1b,ctx={length}', *for_ever, f'--config.model.source={model}',
             f'--config.compute.impl={impl}', '--config.compute.remat=none', f'--config.batch={batch}',
             '--config.optim.lr=3e-4', f'--config.optim.warmup={min(20, steps - 1)}', '--config.lora.rank=8',
             f'--config.chunk={min(128, length)}', '--config.data.too_long=cut', f'--config.data.max_blocks={blocks}',
             *(f'--config.data.files={path}' for path in files)]
  tests = map(str, sorted(options.data.glob('test*.jsonl*')))
  evaluation = f'--limit {asked} --batch {min(32, asked)} --max-new {new} --dtype bfloat16 --impl {impl}'
  return Plan(model, trainer, ['--data', *tests, *evaluation.split()])


def _to_hf(path, folder):
  from blockattn.hf import gguf
  if pathlib.Path(path).is_dir():
    if not folder.exists():
      folder.symlink_to(pathlib.Path(path).resolve(), target_is_directory=True)
    return {'folder': path}
  gguf.to_folder(path, folder, 'bfloat16')
  return {'file': path}


def _python(*arguments, **how):
  return subprocess.Popen([sys.executable, '-m', *map(str, arguments)], cwd=ROOT, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, **how, env=os.environ | {
                              'PYTHONUNBUFFERED': '1', 'XLA_PYTHON_CLIENT_PREALLOCATE': 'true'})


def _evaluate(plan, model, out):
  done = _python('tools.evaluate', model, '--teacher', plan.model, '--out', out, *plan.evaluation)
  said = done.communicate()[0]
  if done.returncode:
    raise RuntimeError(f'tools.evaluate ended with code {done.returncode}:\n{said[-2000:]}')
  return json.loads((out / 'summary.json').read_text())


def _train(plan, workdir, seconds):
  """Trains for so many seconds; SIGTERM makes the trainer save and end."""
  start = time.monotonic()
  trainer = _python('blockattn.train.distill', '--workdir', workdir, *plan.trainer)
  try:
    said, _ = trainer.communicate(timeout=seconds)
  except subprocess.TimeoutExpired:
    trainer.send_signal(signal.SIGTERM)
    said, _ = trainer.communicate()
  if trainer.returncode not in (0, 75):
    raise RuntimeError(f'the trainer ended with code {trainer.returncode}:\n{said[-2000:]}')
  lines = list(metrics.read_metrics(workdir / metrics.FILE_NAME))
  return {'seconds': round(time.monotonic() - start, 1), 'steps': lines[-1]['step'], 'first': lines[0], 'last': lines[-1]}


def _pack(work, path):
  """Everything that a report is made of, and what was trained; not the optimizer's state."""
  with tarfile.open(path, 'w:gz') as packed:
    for file in sorted(work.rglob('*')):
      name = file.relative_to(work)
      if file.is_file() and name.parts[0] in ('run', 'before', 'after') and 'opt_state' not in name.parts:
        packed.add(file, str(name))
  return {'file': path.name, 'bytes': path.stat().st_size}


PARTS = {part.__name__: part for part in (card, tests, kernels, ttft, step, train)}


def main(argv=None) -> int:
  parser = arguments.Parser(prog='python -m tools.device_parts', description=__doc__)
  parser.add_argument('part', choices=PARTS)
  parser.add_argument('path', type=pathlib.Path)
  parser.add_argument('--seconds', type=float, default=600.0)
  parser.add_argument('--toy', action='store_true')
  parser.add_argument('--impl')
  parser.add_argument('--model')
  parser.add_argument('--data', type=pathlib.Path)
  options = parser.parse_args(argv)
  record = Record(options.path, options.part)
  PARTS[options.part](options, record)
  return 1 if device.failures(record.found) else 0


if __name__ == '__main__':
  sys.exit(main())
