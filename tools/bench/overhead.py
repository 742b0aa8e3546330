"""The `overhead` command of tools.bench: what the training loop adds to its steps with data and metrics, saving apart."""

import itertools
import tempfile
import time

import jax

from blockattn.train import finetune, inputs, job, loop
from configs import tiny
from tools import arguments
from tools.bench import measuring

WARM_UP = 5   # steps of the loop that are not counted: the first ones compile and fill the buffer of batches


def prepare(args):
  """Block fine-tuning of the tiny teacher on pages of the standard library: (options, its job, make a state, source)."""
  config = tiny.get_config('baseline')
  config.data.segmenter = ''   # it would be another model at work
  config.optim.warmup = 0   # which may be longer than the few steps here
  config.steps, config.log_every, config.batch = args.steps + WARM_UP, args.log_every, args.batch
  options = finetune.read(config)
  placement, cfg = job.make_placement(options), job.model_config(options.model)
  tokenizer, params = job.load_tokenizer(options, cfg), job.load_language_model(options, placement, cfg)
  made = finetune.build(options, placement, cfg, platform=placement.platform, sink=job.sink_of(options.blocks, tokenizer))
  copy = jax.jit(lambda params: jax.tree.map(lambda p: p + 0, params))   # a step uses its state up
  return (options, made, lambda: loop.init_state(copy(params), made.optimizer), inputs.load_rows(options.data, tokenizer))


def alone(made, state, batches) -> float:
  """Seconds per step over batches that lie on the devices."""
  start = time.perf_counter()
  for batch in batches:
    state, values = made.step(state, made.frozen, batch)
  jax.block_until_ready((state, values))
  return (time.perf_counter() - start) / len(batches)


def in_the_loop(options, made, state, source) -> float:
  """Seconds per step of loop.run, which reads its batches, checks and writes metrics, and shows progress."""
  look = _Look((WARM_UP, options.steps))
  batches = inputs.batches(options, source, made.placement)
  settings = loop.LoopConfig(steps=options.steps, log_every=options.log_every, save_every=options.steps, keep=1,
                             tokens_per_step=options.batch * options.data.length, label='overhead')
  with tempfile.TemporaryDirectory() as workdir:
    loop.run(lambda state, batch: made.step(state, made.frozen, batch), state, batches, settings, workdir,
             put_batch=made.placement.put_batch, meta={}, watches=[look])
  batches.close()
  return (look.seen[options.steps] - look.seen[WARM_UP]) / (options.steps - WARM_UP)


class _Look(loop.Watch):
  """When some steps had been done."""

  def __init__(self, steps):
    self._steps, self.seen = steps, {}

  def due(self, step):
    return step in self._steps

  def __call__(self, step, state):
    jax.block_until_ready(state)
    self.seen[step] = time.perf_counter()
    return '', {}


def overhead(args) -> None:
  options, made, new_state, source = prepare(args)
  stream = inputs.batches(options, source, made.placement)
  batches = [made.placement.put_batch(batch) for batch in itertools.islice(stream, WARM_UP, options.steps)]   # the loop's
  stream.close()
  alone(made, new_state(), batches[:2])
  ways = {'alone': lambda: alone(made, new_state(), batches),
          'in the loop': lambda: in_the_loop(options, made, new_state(), source)}
  times = measuring.take_turns(ways, args.samples, float('inf'), timed=lambda way: way())
  facts, base = measuring.machine(args.cores), min(times['alone'])
  print(measuring.describe(facts, f'{args.steps} steps of {args.batch} rows of T={options.data.length}, a line of metrics '
                           f'every {args.log_every}\n'))
  print(measuring.head('step', 'min ms', 'median ms', 'added'))
  for name, seconds in times.items():
    print(measuring.row(name, *measuring.milliseconds(seconds), f'{min(seconds) / base - 1:+.1%}'))
  measuring.keep(args, facts, seconds=times)


def add(commands) -> None:
  parser = measuring.add_command(commands, 'overhead', 'what the training loop, with its data and metrics, adds to a step',
                                 overhead, cores=2)
  arguments.add_numbers(parser, steps=(20, 'steps per sample'), batch=(4, 'rows'), samples=(3, 'samples'),
                        log_every=(10, 'steps per line of metrics'))
