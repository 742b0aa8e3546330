"""The `step` and `memory` commands of tools.bench: what a training step costs, in time and in memory."""

import dataclasses
import functools
import json
import operator
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from blockattn import blocks, losses, mesh, optim
from blockattn.data import encode, packing
from blockattn.models import flops, lora, spec, transformer, weights
from blockattn.train import distill, finetune, loop

SINKS = 4
TOP_K = 64   # tokens of a stored teacher
LOW_RANK = lora.LoraOptions(rank=16)
DROP = 0.2
DISTILLED, STORED, TUNED, BLOCK = 'distillation', 'distillation, stored teacher', 'block fine-tuning', 'block mode only'
LORA = 'distillation, LoRA student of rank 16'


def model(width: int, layers: int, vocab: int) -> transformer.ModelConfig:
  return transformer.ModelConfig('qwen3', vocab=vocab, width=width, layers=layers, heads=width // 64,
                                 kv_heads=max(1, width // 256), head_dim=64, mlp=3 * width, qk_norm=True, tied=True)


def make_batch(rows: int, length: int, count: int, question: int, answer: int, vocab: int) -> dict:
  """One document per row: `count` context blocks of random lengths, then a question and its answer."""
  random = np.random.default_rng(0)
  packed = []
  for _ in range(rows):
    weights = random.uniform(0.5, 1.5, count)
    stops = np.round(np.cumsum(weights) / weights.sum() * (length - question - answer)).astype(int)
    lengths = (*np.diff(stops, prepend=0).tolist(), question + answer)
    tokens = random.integers(vocab, size=length).astype(np.int32)
    packed.append(packing.pack_row([encode.EncodedDoc(tokens, lengths, (length - answer, length))], length))
  return jax.tree.map(lambda *x: jnp.asarray(np.stack(x)), *packed)


def stored_teacher(batch, vocab: int) -> dict:
  """As data.taught.TaughtRows gives it, of a teacher that says the same everywhere."""
  shape = batch['tokens'].shape
  log_p = jnp.log(0.9 * jax.nn.softmax(-jnp.arange(TOP_K) / 8.0))
  return {'ids': jnp.broadcast_to(jnp.arange(TOP_K) * (vocab // TOP_K), (*shape, TOP_K)),
          'log_p': jnp.broadcast_to(log_p, (*shape, TOP_K)), 'target_log_p': jnp.full(shape, -3.0),
          'blocked_log_p': jnp.full(shape, -4.0)}


@dataclasses.dataclass(frozen=True)
class Step:
  """Attributes:
    run: jitted (state, frozen, batch) -> (state, metrics).
    start: () -> the parameters that are trained.
    frozen, batch: its other arguments.
    flops: that the model needs in a step, by the number of loss tokens.
  """
  run: Callable
  start: Callable
  frozen: Any
  batch: dict
  flops: Callable[[float], float]

  def state(self) -> loop.TrainState:
    return loop.init_state(self.start(), OPTIMIZER)


OPTIM = optim.OptimConfig(lr=1e-4, final_lr=0.1, warmup=1, steps=1000, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.0, clip=1.0)
OPTIMIZER = optim.make_optimizer(OPTIM)


def make_steps(cfg, batch, compute: transformer.Compute, *, dtype='float32', max_blocks: int, loss_over: str = 'readers',
               chunk: int = 512) -> dict[str, Callable[[], Step]]:
  """The steps by name, each made when it is called: one whole optimizer step on the same batch.

  Args:
    compute: of both models; the teacher's keeps nothing for a backward pass.
    dtype: of the trained parameters. The teacher has that of the activations.
    max_blocks: of a row.
  """
  options, rate = blocks.BlockOptions((0,) * SINKS, 'sequential', max_blocks), optim.learning_rate(OPTIM)
  start = lambda dtype=dtype: jax.jit(lambda key: spec.init(transformer.spec(cfg), key, dtype))(jax.random.key(0))
  teacher = functools.cache(lambda: start(compute.dtype))
  models = distill.Models(cfg, cfg, compute, dataclasses.replace(compute, remat='none'), options)
  goal = distill.DistillOptions(
      drop_rate=DROP, drop_mode='lift', loss_over=loss_over, weights=losses.TokenWeights(), temperature=1.0, ce_weight=0.0,
      chunk=chunk, accumulate=1, seed=0)
  cut = flops.blocks_of(jax.device_get(batch['layout']))
  full, inside = flops.as_one_block(cut), flops.in_blocks(cut, sinks=SINKS)
  dropped = flops.in_blocks(cut, sinks=SINKS, drop_rate=DROP, drop_mode='lift')
  count = lambda *views, frozen=False: functools.reduce(operator.add, [
      flops.trained(flops.forward(cfg, seen), frozen=frozen) for seen in views])
  read = flops.forward(cfg, full)

  def distillation(frozen, needed, low_rank=lora.NONE, rows=batch, trained=start):
    made = distill.make_step(dataclasses.replace(models, low_rank=low_rank), goal, OPTIMIZER, rate)
    return Step(made, trained, frozen, rows, needed.total)

  def adapted():
    trained = lambda: spec.init(lora.spec(cfg, LOW_RANK), jax.random.key(1), 'float32')
    return distillation(distill.Frozen(teacher(), teacher()), count(dropped, frozen=True) + read, LOW_RANK, trained=trained)

  def tuned(mode, *views):
    made = finetune.make_step(cfg, compute, options, finetune.FinetuneOptions(
        mode, text_weight=0.0, prompt_weight=0.0, answer_weight=1.0, chunk=chunk, accumulate=1), OPTIMIZER, rate)
    return Step(made, start, None, batch, count(*views).total)

  return {
      DISTILLED: lambda: distillation(distill.Frozen(teacher()), count(dropped) + read),
      'distillation, teacher of 8 bits': lambda: distillation(
          distill.Frozen(weights.quantize(teacher(), compute.dtype)), count(dropped) + read),
      STORED: lambda: distillation(distill.Frozen(), count(dropped),
                                   rows=batch | {'teacher': stored_teacher(batch, cfg.vocab)}),
      LORA: adapted,
      TUNED: lambda: tuned('both', full, inside),
      'full fine-tuning': lambda: tuned('full', full),
      BLOCK: lambda: tuned('block', inside)}


def calls_of(steps: dict[str, Callable[[], Step]]) -> dict:
  """name -> call; each runs a step on from where its last one ended, and waits for it."""
  made = {name: make() for name, make in steps.items()}
  states = {name: step.state() for name, step in made.items()}

  def call(name):
    states[name], values = made[name].run(states[name], made[name].frozen, made[name].batch)
    return jax.block_until_ready(values)

  return {name: functools.partial(call, name) for name in steps}


def step(args, set_up, machine, take_turns) -> None:
  """Times a distillation step against fine-tuning steps on the same batch, and prints the table."""
  set_up(args)
  cfg = model(args.width, args.layers, args.vocab)
  batch = make_batch(args.rows, args.length, args.blocks, args.question, args.answer, args.vocab)
  place = mesh.Placement(mesh.make_mesh({}, jax.devices()[:1]))
  compute = transformer.Compute(placement=place, remat=args.remat)
  calls = calls_of(make_steps(cfg, batch, compute, max_blocks=args.blocks + 1, loss_over=args.loss_over, chunk=args.chunk))
  for call in calls.values():
    call()
  times = take_turns(calls, args.samples, args.seconds)
  base = min(times[TUNED])
  facts = machine(args)
  print(f'{facts["cpu"]}, {args.cores} of {facts["cpus"]} cores, load {facts["load"][0]:.1f}, {facts["versions"]}\n'
        f'{facts["attention"]}\n'
        f'{spec.count(transformer.spec(cfg)) / 1e6:.1f}M parameters, {args.rows} rows of T={args.length}, {args.blocks} '
        f'context blocks, question {args.question}, answer {args.answer}, {SINKS} sinks\n\n'
        '| step | min ms | median ms | time / block fine-tuning |\n|---|---|---|---|')
  for name, seconds in times.items():
    print(f'| {name} | {1e3 * min(seconds):.0f} | {1e3 * float(np.median(seconds)):.0f} | {min(seconds) / base:.2f} |')
  if args.json:
    shown = {k: v for k, v in vars(args).items() if isinstance(v, (int, float, str))}
    args.json.write_text(json.dumps({'machine': facts, 'arguments': shown, 'seconds': times}, indent=1) + '\n')


def loss_memory(rows: int, length: int, width: int, vocab: int, chunk: int) -> int:
  """Bytes that the compiled distillation loss and its gradient need beside inputs and outputs."""
  hidden = jax.ShapeDtypeStruct((rows, length, width), jnp.float32)
  head = jax.ShapeDtypeStruct((vocab, width), jnp.float32)
  tokens, mask = (jax.ShapeDtypeStruct((rows, length), kind) for kind in (jnp.int32, bool))

  def loss(student_head, student, teacher_head, teacher, targets, mask):
    student, teacher = losses.Reading(student_head, student), losses.Reading(teacher_head, teacher)
    sums = losses.distillation_sums(student, teacher, targets, targets, mask, weights=losses.TokenWeights(), temperature=1.0,
                                    ce_weight=0.0, chunk=chunk)
    return sums['loss'] / sums['weight']

  compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(head, hidden, head, hidden, tokens, mask).compile()
  return compiled.memory_analysis().temp_size_in_bytes


def memory(args, set_up, machine) -> None:
  """Prints the memory of the loss for growing T and V, chunked and with all logits at once."""
  set_up(args)
  facts, rows = machine(args), []
  print(f'{facts["cpu"]}, {facts["versions"]}\n'
        f'distillation loss and its gradient, one row, D={args.width}, float32, chunk {args.chunk}\n\n'
        '| T | V | chunked MiB | all at once MiB |\n|---|---|---|---|')
  for length in args.lengths:
    for vocab in args.vocabs:
      small, whole = (loss_memory(1, length, args.width, vocab, chunk) / 2**20 for chunk in (args.chunk, length))
      rows.append({'T': length, 'V': vocab, 'chunked_mib': small, 'whole_mib': whole})
      print(f'| {length} | {vocab} | {small:.0f} | {whole:.0f} |', flush=True)
  if args.json:
    args.json.write_text(json.dumps({'machine': facts, 'rows': rows}, indent=1) + '\n')


def add_step(commands, set_up, machine, take_turns) -> None:
  parser = commands.add_parser('step', help='a distillation step against block fine-tuning on the same batch')
  for name, value, text in (('rows', 1, 'rows of the batch'), ('length', 4096, 'T'), ('blocks', 16, 'context blocks'),
                            ('question', 64, 'tokens'), ('answer', 64, 'tokens'), ('width', 512, 'model width'),
                            ('layers', 6, 'layers'), ('vocab', 16384, 'vocabulary'), ('chunk', 512, 'loss chunk'),
                            ('samples', 5, 'samples per step'), ('seconds', 60, 'a step that ran so long is not sampled '
                             'again'), ('cores', 2, 'cores'), ('devices', 1, 'JAX devices')):
    parser.add_argument(f'--{name}', type=int, default=value, help=f'{text} (default %(default)s)')
  parser.add_argument('--remat', default='none', choices=transformer.REMAT)
  parser.add_argument('--loss-over', dest='loss_over', default='readers', choices=distill.LOSS_OVER)
  parser.add_argument('--json', type=pathlib.Path, metavar='FILE')
  parser.set_defaults(run=lambda args: step(args, set_up, machine, take_turns))


def add_memory(commands, set_up, machine) -> None:
  parser = commands.add_parser('memory', help='peak memory of the chunked loss against T and V')
  parser.add_argument('--lengths', type=int, nargs='+', default=[4096, 8192, 16384, 32768])
  parser.add_argument('--vocabs', type=int, nargs='+', default=[32768, 151936])
  parser.add_argument('--width', type=int, default=256)
  parser.add_argument('--chunk', type=int, default=512)
  parser.add_argument('--cores', type=int, default=2)
  parser.add_argument('--devices', type=int, default=1)
  parser.add_argument('--json', type=pathlib.Path, metavar='FILE')
  parser.set_defaults(run=lambda args: memory(args, set_up, machine))
