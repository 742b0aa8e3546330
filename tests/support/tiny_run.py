"""A run whose steps cost nothing, as one process or as several, for the tests: what happens to it says BLOW.

    BLOW=kill:9:1 python tests/support/tiny_run.py --config=tests/support/tiny_run.py --workdir=... [--multihost=...]

Everything but the model is the trainers': the command line, the mesh, the data, the loop, the checkpoints. A batch is rows
of two parts of the mesh, each shared by two devices. WORKDIR/rows says which rows were read in which step.
"""

import json
import os
import pathlib
import resource
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from blockattn.train import command, inputs, job, loop, workdir as workdir_lib
from configs import common

STEPS, SAVE_EVERY = 16, 4
ROWS, BATCH, WIDTH = 44, 4, 1 << 16   # rows of the source, of a batch; parameters, a quarter MiB


def get_config():
  config = common.section(job.Options)
  config.update_from_flattened_dict({
      'steps': STEPS, 'optim.warmup': 0, 'batch': BATCH, 'log_every': 1, 'save_every': SAVE_EVERY,
      'mesh.data': 2, 'mesh.tensor': 2, 'seed': 5})
  return config


class Numbered:
  """Rows that know their numbers; one of them may be unreadable."""
  length = 1

  def __init__(self, unreadable=-1):
    self._unreadable = unreadable

  def __len__(self):
    return ROWS

  def __getitem__(self, row):
    if row == self._unreadable:
      raise OSError(f'{os.devnull}: stale file handle')
    return {'number': np.int32(row), 'x': np.float32(np.random.default_rng(row).standard_normal())}

  def fingerprint(self):
    return {'numbers': str(ROWS)}

  def where(self, row):
    return f'numbers.txt ({row})'


class Blows:
  """What happens at the reading of batch `at`, in process `index`."""

  def __init__(self, text):
    self.kind, *numbers = (text or 'none').split(':')
    self.at, self.index = [*map(int, numbers), *(-1, 0)[len(numbers):]]

  def strike(self, step, workdir):
    if step != self.at or jax.process_index() != self.index:
      return
    if self.kind in ('late', 'limit', 'fill'):   # once the checkpoint that was begun stands
      last = (step - 1) // SAVE_EVERY * SAVE_EVERY
      while not any(pathlib.Path(workdir).glob(f'checkpoints/{last}/checksums-*')):
        time.sleep(0.01)
    if self.kind == 'interrupt':
      os.kill(os.getpid(), signal.SIGINT)
    if self.kind in ('kill', 'late'):
      os.kill(os.getpid(), signal.SIGKILL)
    if self.kind == 'stop':
      (pathlib.Path(workdir) / 'stopped').touch()
      time.sleep(600)
    if self.kind == 'limit':   # no file may grow beyond this: writing fails as on a full disk
      resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
    if self.kind == 'fill':
      fill(pathlib.Path(workdir) / 'filler', leave=1 << 15)


def fill(path, leave):
  """Takes what is free on a disk but for some bytes."""
  size = os.statvfs(path.parent).f_bavail * os.statvfs(path.parent).f_frsize - leave
  path.write_bytes(b'x' * max(size, 0))


def run(options, workdir):
  blows = Blows(os.environ.get('BLOW'))
  signal.signal(signal.SIGINT, signal.default_int_handler)   # a shell starts what runs in the background without it
  place = job.make_placement(options)
  workdir_lib.save_run_facts(workdir, options)
  batches = inputs.batches(options, Numbered(blows.at if blows.kind == 'unreadable' else -1), place)
  notes = pathlib.Path(workdir) / 'rows'
  notes.mkdir(parents=True, exist_ok=True)
  name = notes / f'{time.time()}-{jax.process_index()}-of-{jax.process_count()}.jsonl'
  optimizer, seen = optax.trace(decay=0.9), Seen() if blows.kind == 'watch' else None

  def put_batch(batch):
    step = batches.get_state()['next_step']
    if seen is None:
      with open(name, 'a') as file:
        file.write(json.dumps([step, batch['number'].tolist()]) + '\n')
    blows.strike(step, workdir)
    return place.put_batch(batch)

  @jax.jit
  def step(state, batch):
    distance, grads = jax.value_and_grad(lambda w: jnp.mean((batch['x'] - w.mean()) ** 2))(state.params['w'])
    updates, opt_state = optimizer.update({'w': grads}, state.opt_state)
    params = jax.tree.map(lambda w, u: w - u * np.float32(0.1 * WIDTH), state.params, updates)
    loss = jnp.where(state.step + 1 == (blows.at if blows.kind == 'nan' else -1), jnp.nan, distance)
    return state.replace(step=state.step + 1, params=params, opt_state=opt_state), {
        'loss': loss, 'grad_norm': jnp.sqrt(jnp.sum(grads ** 2))}

  values = np.random.default_rng(0).standard_normal(WIDTH).astype(np.float32)   # random: zeros would be packed to nothing
  params = jax.make_array_from_callback((WIDTH,), place.sharding(('vocab',)), lambda part: values[part])
  loop.run(step, loop.init_state({'w': params}, optimizer), batches, loop.LoopConfig(
      steps=options.steps, log_every=options.log_every, save_every=options.save_every, keep=options.keep,
      tokens_per_step=options.batch * options.data.length, label='tiny'), workdir, put_batch=put_batch, meta={},
      watches=[seen] if seen is not None else ())
  if seen is not None:
    print(json.dumps({'rss': seen.rss, 'compiled': seen.compiled}))


class Seen(loop.Watch):
  """Notes the memory of the process and the number of compilations, a few times in a run."""

  def __init__(self):
    self.rss, self.compiled, self._count = {}, {}, 0
    jax.monitoring.register_event_duration_secs_listener(self._heard)

  def _heard(self, event, duration, **kwargs):
    self._count += event == '/jax/core/compile/backend_compile_duration'

  def due(self, step):
    return step % 500 == 0

  def __call__(self, step, state):
    resident = int(pathlib.Path('/proc/self/statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE')
    self.rss[step], self.compiled[step] = resident, self._count
    return '', {}


if __name__ == '__main__':
  command.main(job.Options, run)
