"""The training loop, the only one: a function that every trainer calls with its own step."""

import dataclasses
import math
import os
import pathlib
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from blockattn import checkpoint, errors, loading, metrics, multihost, optim, trace
from blockattn.errors import UserError
from blockattn.hf import convert
from blockattn.models import flops as flops_lib

EXIT_PREEMPTED = 75   # EX_TEMPFAIL: saved, start me again


@flax.struct.dataclass
class TrainState:
  """What a checkpoint holds of the model: `step` counts finished optimizer steps."""
  step: Any
  params: Any
  opt_state: Any


class NotFinite(errors.UserError, FloatingPointError):
  """The loss or the gradient of a step is NaN or infinite."""


class Preempted(SystemExit):
  """SIGTERM or Ctrl-C came; the state is saved and the process ends with code 75 or 130."""


class Watch:
  """What looks at the state of a run now and then, in time that does not count as training. This one never does.

  Of several processes all call it, at the same steps.

  Attributes:
    stopped: why the run is to end before its last step; empty: it is not.
  """
  stopped = ''

  def begin(self, step: int, meta: dict):
    """Called before the first step, with the `meta` of the checkpoint that the run goes on from, {} without one."""

  def due(self, step: int) -> bool:
    """Whether it is to be called after this step."""
    return False

  def __call__(self, step: int, state: TrainState) -> tuple[str, dict[str, float]]:
    """(what a line says of it, scalars to write); empty: nothing, none."""
    return '', {}

  def meta(self) -> dict:
    """What a checkpoint that is written now says of it, for `begin`."""
    return {}

  def end(self):
    """Called when the last checkpoint of a finished run stands."""


@dataclasses.dataclass(frozen=True)
class LoopConfig:
  """
  Attributes:
    steps: optimizer steps in all.
    log_every: steps between two lines of metrics; the line holds means over these steps.
    save_every: steps between two checkpoints.
    keep: checkpoints to keep.
    tokens_per_step: text tokens of a global batch, for tokens/s.
    label: of the progress line.
    flops: this process's rows of a batch -> the operations that a step needs for the whole batch, for MFU; None: not
      counted.
    peak_flops: FLOP/s of all devices together.
    profile: (start, stop) of the steps to trace into WORKDIR/profile, see trace.parse_steps; None: none.
    wandb: project of Weights & Biases; None: nothing is sent.
  """
  steps: int
  log_every: int
  save_every: int
  keep: int
  tokens_per_step: int
  label: str = 'train'
  flops: Callable[[Any], flops_lib.Flops] | None = None
  peak_flops: float = 0.0
  profile: tuple[int, int] | None = None
  wandb: str | None = None

  def __post_init__(self):
    for name in ('steps', 'log_every', 'save_every', 'keep'):
      errors.check_number(f'config.{name}', getattr(self, name), 1)


def init_state(params, optimizer) -> TrainState:
  """The state at step 0: moments are placed like the parameters that they belong to, all else on every device."""
  one = jax.tree.leaves(params)[0].sharding
  everywhere = NamedSharding(one.mesh, PartitionSpec()) if isinstance(one, NamedSharding) else one
  # jit alone would put the zeros that the moments start from on one device: they depend on no parameter.
  shardings = optim.map_moments(lambda _, p: p.sharding, optimizer, jax.eval_shape(optimizer.init, params), params,
                                lambda _: everywhere)
  return TrainState(step=jax.device_put(jnp.zeros((), jnp.int32), everywhere), params=params,
                    opt_state=jax.jit(optimizer.init, out_shardings=shardings)(params))


def make_step(loss_sums, measure, optimizer, learning_rate, *, slices: int, seed: int = 0):
  """A jitted training step; the old state's buffers are reused.

  Args:
    loss_sums: (params, frozen, batch, key) -> dict of sums over tokens, differentiable in params; the loss of a batch is
      sums['loss'] / sums['weight'].
    measure: sums of a batch -> dict of scalars to report, beside loss, grad_norm and lr.
    optimizer: optax transformation.
    learning_rate: step -> learning rate, to report.
    slices: see `accumulate`.
    seed: of `key`, which is another one for every step and slice.

  Returns:
    (state, frozen, batch) -> (state, metrics). `frozen` is any tree of arrays that loss_sums reads and nothing trains.
  """
  def step(state, frozen, batch):
    step_key = jax.random.fold_in(jax.random.key(seed), state.step)

    def sums_and_grads(params, batch, part):
      def loss(params):
        sums = loss_sums(params, frozen, batch, jax.random.fold_in(step_key, part))
        return sums['loss'], sums
      grads, sums = jax.grad(loss, has_aux=True)(params)
      return sums, grads

    sums, grads = accumulate(sums_and_grads, state.params, batch, slices)
    weight = jnp.maximum(sums['weight'], 1e-9)   # a batch without loss tokens must not divide by zero
    grads = jax.tree.map(lambda g: g.astype(jnp.float32) / weight, grads)
    common = {'loss': sums['loss'] / weight, 'grad_norm': optax.tree.norm(grads), 'lr': learning_rate(state.step)}
    with jax.named_scope('optimizer'):
      grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, state.params)   # which the optimizer's state follows
      updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
      params = optax.apply_updates(state.params, updates)
    return TrainState(step=state.step + 1, params=params, opt_state=opt_state), measure(sums) | common

  return jax.jit(step, donate_argnums=0)


def accumulate(sums_and_grads, params, batch, parts: int):
  """Sums of a batch computed in `parts` equal slices of its rows, one after the other.

  Args:
    sums_and_grads: (params, batch, part index) -> (sums, grads of sums['loss']). Because the loss is a sum over tokens
      divided at the end by the sum of weights, slices add up to exactly the whole batch.
    batch: tree of arrays whose first axis is a multiple of `parts`.

  Returns:
    (sums, grads); of several slices in float32 at least: in bfloat16 each slice would be rounded to the size of the sum.
  """
  if parts == 1:
    return sums_and_grads(params, batch, 0)
  rows = jax.tree.leaves(batch)[0].shape[0]
  if rows % parts:
    raise UserError(f'a batch of {rows} rows cannot be cut into accumulate={parts} equal parts')
  # Interleaved slices: every device keeps its own rows in every slice.
  slices = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(rows // parts, parts, *x.shape[1:]), 1, 0), batch)
  shapes = jax.eval_shape(sums_and_grads, params, jax.tree.map(lambda x: x[0], slices), 0)
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.promote_types(s.dtype, jnp.float32)), shapes)

  def add(total, x):
    made = sums_and_grads(params, x[1], x[0])
    return jax.tree.map(lambda whole, part: whole + part.astype(whole.dtype), total, made), None

  return jax.lax.scan(add, zeros, (jnp.arange(parts), slices))[0]


def run(step_fn, state: TrainState, batches, config: LoopConfig, workdir, *, put_batch, meta: dict,
        watches: Sequence[Watch] = (), rewrite=None) -> TrainState:
  """Trains until config.steps, from the newest checkpoint in the workdir if there is one.

  Metrics are fetched one step late, so that the device never waits for the host.

  Args:
    step_fn: jitted (state, batch) -> (state, metrics), metrics a dict of scalars with 'loss' and 'grad_norm'.
    state: TrainState at step 0, also the shapes and shardings to restore into.
    batches: iterator with `get_state() -> dict`, `set_state(dict)` and `fingerprint`; one item per step.
    put_batch: host batch -> device batch.
    meta: JSON saved with every checkpoint: what the model is, and under 'source_weights' what it began from.
    watches: what looks at the state now and then.
    rewrite: (params, host batch, finished steps) -> (the host batch to train on, scalars to report); None: as it is read.

  Returns:
    The state after the last step, or after the one at which a watch ended the run.

  Raises:
    NotFinite: the loss or gradient norm of a step was NaN or Inf; the last good checkpoint is kept.
    Preempted: SIGTERM or Ctrl-C came; the state is saved; exit code 75 or 130.
    checkpoint.NotSaved: a checkpoint could not be written; those before it stand.
    checkpoint.Damaged: the newest checkpoint is not what was written.
    ValueError: the newest checkpoint is of other data, or began from other weights.
  """
  folder = pathlib.Path(workdir) / loading.CHECKPOINTS
  multihost.check_equal('data', batches.fingerprint)
  with checkpoint.Checkpoints(folder, keep=config.keep) as saved, \
      multihost.failing_ends_all(agreed=(NotFinite, Preempted)), _Signals() as signals:
    state, step, before = _resume(saved, state, batches, meta)
    for watch in watches:
      watch.begin(step, before)
    stopped = lambda: next((watch.stopped for watch in watches if watch.stopped), '')
    first = jax.process_index() == 0
    with metrics.MetricWriter(workdir, jax.process_index(), resume_step=step, wandb_project=config.wandb) as writer, \
        metrics.ProgressLine(config.steps, config.label, enabled=first) as progress, \
        trace.Profiler(pathlib.Path(workdir) / 'profile', config.profile if first else None) as profiler:
      report = _Reporter(config, writer, progress)
      if step >= config.steps or stopped():
        progress.say(finished(workdir, step, config.steps, stopped()))
      elif step:
        progress.say(f'going on from step {step} of {config.steps}, saved in {folder}')
      while step < config.steps and not stopped():
        with profiler.step(step + 1, state):
          batch, more = next(batches), {}
          if rewrite is not None:
            batch, more = rewrite(state.params, batch, step)
          state, values = step_fn(state, put_batch(batch))
        step += 1
        report.queue(step, values | more, batch)
        for watch in watches:
          if watch.due(step):
            with report.pause():
              said, seen = watch(step, state)
            if said:
              progress.say(f'step {step}: {said}')
            if seen:
              writer.write(step, seen)
        last, stop = step == config.steps or bool(stopped()), signals.stop(step)
        if last or stop or step % config.save_every == 0:
          with report.pause():   # raises before a state that is not finite could be saved
            seen = {key: value for watch in watches for key, value in watch.meta().items()}
            saved.save(step, state.params, state.opt_state, batches.get_state(), meta | {'step': step} | seen)
        if stopped():
          progress.say(f'ended at step {step} of {config.steps}: {stopped()}')
        saved.check()   # a write in the background that failed ends the run now, and not at the next one
        if stop and not last:
          saved.wait()
          name, code = ('Ctrl-C', errors.EXIT_INTERRUPTED) if signals.interrupted else ('SIGTERM', EXIT_PREEMPTED)
          progress.say(f'{name}: saved step {step} in {folder}; start the same command again to go on')
          raise Preempted(code)
    saved.wait()
    for watch in watches:
      watch.end()
  return state


def finished(workdir, step: int, steps: int, stopped: str = '') -> str:
  """What is said of a run with nothing left to do; `stopped`: why before its last step."""
  more = stopped if step < steps else (
      'To train longer, give a larger --config.steps and say where its schedule ended (--config.optim.decay_steps), or '
      f'begin a new --workdir from it with --config.model.source={workdir}')
  return f'finished already: step {step} of {steps} is saved in {pathlib.Path(workdir) / loading.CHECKPOINTS}. {more}'


def held_out_line(step: int, best: tuple[int, float] | None, figures: Mapping[str, float]) -> str:
  """What a watch says of figures, the first of which decides: 'held out block/kl 0.1234 (best), block/ce 1.1, ...'.

  Args:
    best: (step, value) of the best so far, this step included; None: none was any good.
  """
  (name, value), *more = figures.items()
  standing = 'no best yet' if best is None else 'best' if best[0] == step else f'best is {best[1]:.4g} of step {best[0]}'
  return ', '.join([f'held out {name} {value:.4g} ({standing})', *(f'{name} {x:.4g}' for name, x in more)])


def _resume(saved, state, batches, meta):
  newest = saved.newest()
  if newest is None:
    return state, 0, {}
  with multihost.timed(f'restoring step {newest}'):
    saved.verify(newest)
    batches.set_state(saved.data(newest))   # refuses other data before the large items are read
    before = saved.meta(newest)
    for weights, model in (('source_weights', 'source'), ('teacher_weights', 'teacher')):
      convert.check_same_weights(before.get(weights), meta.get(weights), f'step {newest} in {saved.folder}', meta.get(model),
                                 'begin again with a new --workdir')
    params, opt_state = saved.restore(newest, state.params, state.opt_state)
  step = jax.device_put(jnp.asarray(newest, jnp.int32), state.step.sharding)
  return TrainState(step=step, params=params, opt_state=opt_state), newest, before


class _Reporter:
  """Fetches the metrics of a step while the next one runs, checks them, and writes means every few steps."""

  def __init__(self, config, writer, progress):
    self._config, self._writer, self._progress = config, writer, progress
    self._clock = metrics.StepClock(config.steps, peak_flops=config.peak_flops)
    self._waiting, self._window = None, []

  def queue(self, step, values, batch):
    """Takes the metrics of a step that the devices have just begun, and reports those of the step before."""
    work = None if self._config.flops is None else self._config.flops(batch)   # on the host, while the devices compute
    self.flush()
    self._waiting = (step, values, work)

  def pause(self):
    """For what is not training: reports the step that the devices are at, and stops the clock within the block."""
    self.flush()
    return self._clock.paused()

  def flush(self):
    if self._waiting is None:
      return
    step, values, work = self._waiting
    self._waiting = None
    values = {name: float(value) for name, value in jax.device_get(values).items()}
    _check_finite(step, values)
    flops = 0.0 if work is None else work.total(values['loss_tokens'] if work.head else 0.0)
    self._clock.tick(step, self._config.tokens_per_step, flops)
    self._window.append(values)
    rates = self._clock.rates()
    self._progress.update(step, values | rates)
    if step % self._config.log_every == 0 or step == self._config.steps:
      means = {name: _mean([v[name] for v in self._window]) for name in values}
      self._writer.write(step, means | rates)
      self._window = []


def _mean(values):
  """Of those that are numbers: NaN says that a step had nothing to measure."""
  known = [value for value in values if not math.isnan(value)]
  return sum(known) / len(known) if known else math.nan


def _check_finite(step, values):
  bad = [name for name in ('loss', 'grad_norm') if not math.isfinite(values[name])]
  if bad:
    what = ', '.join(f'{name} = {values[name]}' for name in bad)
    raise NotFinite(f'step {step}: {what}. The last good checkpoint is kept; look at the batch of step {step}, '
                    'lower optim.lr, or lower optim.clip')


class _Signals:
  """Within the block, SIGTERM and Ctrl-C ask for an end after the step under way, rather than ending the process.

  In a run of several processes, which have to stop at the same step, JAX notices SIGTERM and says when; Ctrl-C is handed on
  to it. A second Ctrl-C ends the process at once.
  """
  ONE_PRESS_S = 1.0   # a launcher hands on the Ctrl-C that the terminal has sent to us already

  def __init__(self):
    self._terminated, self._pressed, self._old = False, None, {}

  @property
  def interrupted(self) -> bool:
    return self._pressed is not None

  def stop(self, step: int) -> bool:
    """Whether to stop after this step; to be asked at every step."""
    if multihost.is_started():
      return multihost.preempted(step)
    return self._terminated or self.interrupted

  def __enter__(self):
    handlers = {signal.SIGTERM: self._terminate, signal.SIGINT: self._interrupt}
    if multihost.is_started():
      del handlers[signal.SIGTERM]
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:   # as the shell starts what runs in the background
      del handlers[signal.SIGINT]
    try:
      self._old = {sign: signal.signal(sign, handler) for sign, handler in handlers.items()}
    except ValueError:   # not the main thread: whoever runs us there handles signals
      pass
    return self

  def _terminate(self, *_):
    self._terminated = True

  def _interrupt(self, *_):
    now = time.monotonic()
    if self._pressed is None:
      self._pressed = now
      print('Ctrl-C: saving after the step under way; again to end at once', file=sys.stderr, flush=True)
      if multihost.is_started():
        os.kill(os.getpid(), signal.SIGTERM)
    elif now - self._pressed > self.ONE_PRESS_S:
      print('Ctrl-C: ended without saving; the same command goes on from the newest checkpoint', file=sys.stderr, flush=True)
      os._exit(errors.EXIT_INTERRUPTED)   # whatever is being written is finished or removed by the next start

  def __exit__(self, *_):
    for sign, handler in self._old.items():
      signal.signal(sign, handler)
