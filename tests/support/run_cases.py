"""A small distillation as a process: its files, its config, and what a test asks of its workdir."""

import contextlib
import gzip
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import data_cases
import hf_cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import train_cases

from blockattn import checkpoint, metrics
from blockattn.hf import convert
from blockattn.models.transformer import ModelConfig
from blockattn.train import loop
from configs import common
from launch import processes

ROOT = pathlib.Path(__file__).resolve().parents[2]
STEPS, SAVE_EVERY = 24, 6
PATIENCE_S = 240   # for a machine that is busy with other tests; a run that hangs does so for 300 s
RARE = '@'   # stands in one example only
MODEL = ModelConfig('llama', vocab=304, width=16, layers=2, heads=2, kv_heads=2, head_dim=8, mlp=24)
CHANGES = {
    'steps': STEPS, 'batch': 4, 'log_every': 1, 'save_every': SAVE_EVERY, 'mesh.data': 1, 'mesh.fsdp': -1,
    'optim.lr': 3e-3, 'optim.warmup': 2, 'blocks.sinks': 2, 'blocks.sink_kind': 'learned', 'data.length': 64,
    'data.max_blocks': 8, 'distill.drop_rate': 0.3, 'distill.drop_mode': 'isolate'}


def get_config(folder, trainer='distill'):
  """A small distillation on the files in `folder`: block dropout, learned sinks and shuffled data all go on or do not."""
  config = common.base(trainer)
  changes = {key: value for key, value in CHANGES.items() if key.partition('.')[0] in config}
  config.update_from_flattened_dict(changes | {'model.source': f'{folder}/teacher',
                                               'data.files': (f'{folder}/train.jsonl',)})
  return config


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A random teacher with its tokenizer, a file of examples, and a config file of both."""
  folder = tmp_path_factory.mktemp('resume')
  tokenizer = data_cases.tiny_tokenizer()
  tokenizer.save_pretrained(folder / 'tokenizer')
  params = hf_cases.random_params(MODEL, 'float32')
  write = lambda name: convert.save(params, MODEL, folder / name, source=folder / 'tokenizer', meta={}, card='',
                                    dtype='float32')
  write('teacher')
  params['embed'][tokenizer.encode(RARE)] = np.nan
  write('broken_teacher')
  lines = [{'blocks': [f'{i} is {i * i}. ' * (1 + j % 2) for j in range(1 + i % 3)], 'prompt': f'what is {i}? ',
            'response': str(i * i) + RARE * (i == 12), 'gold': [0]} for i in range(40)]
  data_cases.write_lines(folder / 'train.jsonl', lines)
  (folder / 'config.py').write_text(
      f'import sys\nsys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests/support")!r}]\nimport run_cases\n\n\n'
      f'def get_config():\n  return run_cases.get_config({str(folder)!r})\n')
  return folder


@contextlib.contextmanager
def overwritten(folder):
  """Within the block other weights of the same shapes lie where the teacher was."""
  (folder / 'teacher').rename(folder / 'kept_teacher')
  try:
    convert.save(hf_cases.random_params(MODEL, 'float32', seed=1), MODEL, folder / 'teacher', source=folder / 'tokenizer',
                 meta={}, card='', dtype='float32')
    yield
  finally:
    shutil.rmtree(folder / 'teacher')
    (folder / 'kept_teacher').rename(folder / 'teacher')


def environment(folder, devices=1):
  """Of a process with simulated devices. Compiled programs are shared by all tests, also by those of other processes."""
  base = folder.parent.parent if folder.parent.name.startswith('popen-') else folder.parent   # as pytest-xdist has it
  return os.environ | {
      'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': str(devices), 'PYTHONUNBUFFERED': '1',
      'JAX_DISABLE_MOST_OPTIMIZATIONS': '1', 'JAX_COMPILATION_CACHE_DIR': str(base / 'compiled'),
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
      'JAX_COMPILATION_CACHE_MAX_SIZE': str(1 << 30)}   # with a bound the cache is locked, without one it is not


def start(folder, workdir, *command, overrides=()):
  """Runs the trainer on one simulated device; `command` replaces `-m blockattn.train.distill`."""
  return subprocess.run([sys.executable, *(command or ('-m', 'blockattn.train.distill')), f'--config={folder}/config.py',
                         f'--workdir={workdir}', *overrides], env=environment(folder), cwd=ROOT, capture_output=True,
                        text=True, timeout=500)


def interrupt(folder, workdir, when, sign):
  return start(folder, workdir, str(ROOT / 'tests/support/interrupted.py'), str(when), sign.name)


def losses(workdir):
  """(steps, losses) of metrics.jsonl."""
  lines = metrics.read_metrics(workdir / 'metrics.jsonl')
  return [line['step'] for line in lines], [line['loss'] for line in lines]


def newest(workdir):
  return checkpoint.newest_step(workdir / 'checkpoints')


def traced(folder):
  """(names of the trace's events, all that is in the devices' part of it) of the one trace in a folder."""
  events, = folder.rglob('*.trace.json.gz')
  planes, = folder.rglob('*.xplane.pb')
  with gzip.open(events, 'rt') as stream:
    names = [event['name'] for event in json.load(stream)['traceEvents'] if 'name' in event]
  return names, planes.read_bytes()


def own_environment(folder, devices=1, **more):
  """`environment` without what says that this process is one of several."""
  own = environment(folder, devices)
  return {name: value for name, value in own.items() if not name.startswith(('BLOCKATTN_', 'SLURM', 'OMPI'))} | more


def pair(folder, *commands, env=None):
  """Runs a command per process, all ending with --multihost; returns [(exit code, output)] and the seconds it took."""
  env = env or own_environment(folder)
  address, start = f'127.0.0.1:{processes.free_port()}', time.monotonic()
  started = [subprocess.Popen([sys.executable, *command, f'--multihost={address},{len(commands)},{i}'], cwd=ROOT, text=True,
                              env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
             for i, command in enumerate(commands)]
  try:
    outputs = [process.communicate(timeout=PATIENCE_S)[0] for process in started]
  finally:
    for process in started:
      process.kill()
  return [(process.returncode, output) for process, output in zip(started, outputs, strict=True)], time.monotonic() - start


# The loop alone, with a step that adds 1 to the only parameter and reports what it is told to.


class Numbers:
  """0.0, 1.0, ... as batches; `before(n)` is called before the n-th is handed out."""

  fingerprint = {}

  def __init__(self, before=lambda n: None):
    self.at, self.before = 0, before

  def __next__(self):
    self.before(self.at)
    self.at += 1
    return float(self.at - 1)

  def get_state(self):
    return {'next_step': self.at}

  def set_state(self, state):
    self.at = state['next_step']


OPTIMIZER = optax.trace(decay=0.9)   # orbax saves no empty state


def run_loop(workdir, batches=None, report=lambda n: {'loss': n, 'grad_norm': 1.0}, watches=(), **config):
  """loop.run with steps of no cost; the loss of step n + 1 is n unless `report` says otherwise."""
  config = loop.LoopConfig(**{'steps': 10, 'log_every': 1, 'save_every': 4, 'keep': 2, 'tokens_per_step': 1} | config)
  params = jax.device_put({'w': jnp.zeros(())}, train_cases.placement().replicated())

  def step(state, batch):
    params = jax.tree.map(lambda w: w + np.float32(1), state.params)
    return state.replace(step=state.step + 1, params=params), report(batch)

  return loop.run(step, loop.init_state(params, OPTIMIZER), batches or Numbers(), config, workdir,
                  put_batch=lambda batch: batch, meta={}, watches=watches)


def saved_steps(workdir):
  return sorted(int(path.name) for path in (workdir / 'checkpoints').iterdir())
