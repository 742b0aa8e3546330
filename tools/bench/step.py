"""The `step` and `memory` commands of tools.bench: what a training step costs, in time and in memory."""

import dataclasses
import functools
import operator
import resource
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from blockattn import blocks, losses, mesh, optim
from blockattn.data import encode, packing
from blockattn.errors import UserError
from blockattn.models import flops, lora, sizes, spec, transformer
from blockattn.train import distill, finetune, held_out, inputs, job, loop
from configs.variants import VARIANTS
from tools import arguments
from tools.bench import measuring, torch_step

TOP_K = 64   # tokens of a stored teacher
LOW_RANK = lora.LoraOptions(rank=16)
DROP = 0.2
DISTILLED, STORED, TUNED, BLOCK = 'distillation', 'distillation, stored teacher', 'block fine-tuning', 'block mode only'
LORA = 'distillation, LoRA student of rank 16'
# Distillation and the method's family beside it. All rows of the on-policy step are the student's own: a run's share less.
# What torch_step.py does, too.
ALL_FULL, ALL_BLOCK = 'full fine-tuning, loss on all tokens', 'block mode only, loss on all tokens'
ALL_LORA, UNDROPPED = 'LoRA of rank 16, loss on all tokens', 'distillation without block dropout'
_ALL_TOKENS = {'finetune.text_weight': 1.0}
BESIDE_TORCH = (ALL_FULL, ALL_BLOCK, ALL_LORA, UNDROPPED)
FAMILY = {name: keys for name, keys in VARIANTS.items() if name != 'plain'} | {
    'on_policy': {'distill.on_policy.share': 1.0}}


def model(width: int, layers: int, vocab: int) -> transformer.ModelConfig:
  """Raises ValueError if the width is not made of heads of 64."""
  if width < 64 or width % 64:
    raise UserError(f'--width {width}: heads are 64 wide; give a multiple of 64')
  return transformer.ModelConfig('qwen3', vocab=vocab, width=width, layers=layers, heads=width // 64,
                                 kv_heads=max(1, width // 256), head_dim=64, mlp=3 * width, qk_norm=True, tied=True)


def make_batch(rows: int, length: int, count: int, question: int, answer: int, vocab: int) -> dict:
  """One document per row: `count` context blocks of random lengths, then a question and its answer."""
  random = np.random.default_rng(0)
  packed = []
  for _ in range(rows):
    lengths = (*measuring.random_lengths(random, length - question - answer, count), question + answer)
    tokens = random.integers(vocab, size=length).astype(np.int32)
    continued = tuple(i > 0 for i in range(len(lengths)))
    doc = encode.EncodedDoc(tokens, lengths, (length - answer, length), continued=continued)
    packed.append(packing.pack_row([doc], length))
  return jax.tree.map(lambda *x: jnp.asarray(np.stack(x)), *packed)


def stored_teacher(batch, vocab: int) -> dict:
  """As data.teacher_logits.StoredLogits gives it, of a teacher that says the same everywhere."""
  shape = batch['tokens'].shape
  log_p = jnp.log(0.9 * jax.nn.softmax(-jnp.arange(TOP_K) / 8.0))
  return {'ids': jnp.broadcast_to(jnp.arange(TOP_K) * (vocab // TOP_K), (*shape, TOP_K)),
          'log_p': jnp.broadcast_to(log_p, (*shape, TOP_K)), 'target_log_p': jnp.full(shape, -3.0),
          'blocked_log_p': jnp.full(shape, -4.0)}


@dataclasses.dataclass(frozen=True)
class Step:
  """Attributes:
    made: the training.
    params: () -> what is trained, at its start.
    frozen, batch: the step's other arguments.
    flops: that the models need in a step, by the number of loss tokens.
    rewrite: what is done to a batch before its step, see loop.run; None: nothing.
  """
  made: job.Job
  params: Callable
  frozen: job.Frozen
  batch: dict
  flops: Callable[[float], float]
  rewrite: Callable | None = None

  def state(self) -> loop.TrainState:
    return loop.init_state(self.params(), self.made.optimizer)

  def put(self, batch) -> dict:
    return self.made.placement.put_batch(jax.device_get(batch))


def make_steps(cfg, batch, placement, compute: transformer.Compute, *, dtype='float32', max_blocks: int,
               chunk: int = job.CHUNK) -> dict[str, Callable[[], Step]]:
  """The steps by name, each made when it is called: one whole optimizer step on the same batch.

  Args:
    compute: of both models; the teacher's keeps nothing for a backward pass.
    dtype: of the trained parameters. The teacher has that of the activations.
    max_blocks: of a row.
  """
  rows, length = batch['tokens'].shape
  shared = dict(
      steps=1000, batch=rows, chunk=chunk, model=job.ModelOptions(source='random values', dtype=dtype), compute=compute,
      mesh=job.MeshOptions(), blocks=job.BlockModeOptions(), optim=optim.OptimConfig(steps=1000, warmup=1),
      data=inputs.PromptData(length=length, max_blocks=max_blocks), eval=held_out.EvalOptions())
  whole = lambda: job.init_params(transformer.spec(cfg), placement, 0, dtype)

  def step(trainer, options, frozen=job.Frozen, more=None):
    made = trainer.build(options, placement, cfg, platform=placement.platform)
    own = isinstance(options, distill.Options) and options.distill.on_policy.share
    read = batch | (more or {})
    cut = flops.blocks_of(*jax.device_get((read['layout'], read['continued'])))
    return Step(made, lambda: job.init_params(made.specs, placement, 0, dtype), frozen(), read, made.flops(cut).total,
                distill.rewriter(options, made, _tokenizer(), None) if own else None)

  def distilled(low_rank=lora.NONE, precision=compute.dtype, stored=False, **keys):
    options = changed(distill.Options(
        **shared, lora=low_rank, distill=distill.DistillOptions(drop_rate=DROP, chunk=chunk),
        teacher=distill.TeacherOptions(dtype=precision, compute_dtype=compute.dtype, logits='stored' if stored else '',
                                       top_k=TOP_K)), traverse_util.unflatten_dict(keys, sep='.'))
    if stored:
      return step(distill, options, more={'teacher': stored_teacher(batch, cfg.vocab)})
    teacher = distill.teacher_from(whole(), cfg, options.teacher, placement)
    return step(distill, options, lambda: job.Frozen(teacher, teacher if options.low_rank.rank else None),
                {'layout': read_as(batch['layout'], options.data)})

  def tuned(mode, low_rank=lora.NONE, **keys):
    options = finetune.Options(**shared, lora=low_rank, finetune=finetune.FinetuneOptions(mode, chunk=chunk))
    options = changed(options, traverse_util.unflatten_dict(keys, sep='.'))
    return step(finetune, options, lambda: job.Frozen(base=whole() if low_rank.rank else None))

  return {
      DISTILLED: distilled,
      'distillation, teacher of 8 bits': lambda: distilled(precision='int8'),
      STORED: lambda: distilled(stored=True),
      LORA: lambda: distilled(LOW_RANK),
      TUNED: lambda: tuned('both'),
      'full fine-tuning': lambda: tuned('full'),
      BLOCK: lambda: tuned('block'),
      **{name: functools.partial(distilled, **keys) for name, keys in FAMILY.items()},
      ALL_FULL: lambda: tuned('full', **_ALL_TOKENS),
      ALL_BLOCK: lambda: tuned('block', **_ALL_TOKENS),
      ALL_LORA: lambda: tuned('full', LOW_RANK, **_ALL_TOKENS),
      UNDROPPED: lambda: distilled(**{'distill.drop_rate': 0.0})}


def changed(options, nested: dict):
  """Options with other values in some of their sections, all set before any is checked against another."""
  return dataclasses.replace(options, **{name: changed(getattr(options, name), value) if isinstance(value, dict) else value
                                         for name, value in nested.items()})


def read_as(layout, data: inputs.PromptData):
  """The layout [B, T] of a batch that is read with these options."""
  if data.shared_first:
    layout = blocks.share_first(layout)
  if data.join_blocks == 1:
    return layout
  rows = [jax.tree.map(operator.itemgetter(i), jax.device_get(layout)) for i in range(layout.doc.shape[0])]
  joined = [packing.join_blocks(row, data.join_blocks, (i,)) for i, row in enumerate(rows)]
  return jax.tree.map(lambda *x: jnp.asarray(np.stack(x)), *joined)


def _tokenizer():
  """For answers of random tokens, whose text nobody reads."""
  import tokenizers
  import transformers  # slow to import
  one = tokenizers.Tokenizer(tokenizers.models.WordLevel({'?': 0}, unk_token='?'))
  return transformers.PreTrainedTokenizerFast(tokenizer_object=one)


def calls_of(steps: dict[str, Callable[[], Step]]) -> dict:
  """name -> call; each runs a step on from where its last one ended, and waits for it."""
  made = {name: make() for name, make in steps.items()}
  states = {name: step.state() for name, step in made.items()}
  batches = {name: step.put(step.batch) for name, step in made.items()}

  def call(name):
    one, batch = made[name], batches[name]
    if one.rewrite is not None:
      batch = one.put(one.rewrite(states[name].params, jax.device_get(batch), 0)[0])
    states[name], values = one.made.step(states[name], one.frozen, batch)
    return jax.block_until_ready(values)

  return {name: functools.partial(call, name) for name in steps}


def step(args) -> None:
  cfg = sizes.get(args.size) if args.size else model(args.width, args.layers, args.vocab)
  batch = make_batch(args.rows, args.length, args.blocks, args.question, args.answer, cfg.vocab)
  place = mesh.Placement(mesh.make_mesh({'data': -1}))
  steps = make_steps(cfg, batch, place, transformer.Compute(remat=args.remat), max_blocks=args.blocks + 1, chunk=args.chunk)
  unit, own = TUNED, [name for name in steps if name not in FAMILY and name not in BESIDE_TORCH]
  if args.torch:
    unit, own = ALL_FULL, BESIDE_TORCH
  elif args.variants:
    unit, own = DISTILLED, (DISTILLED, *FAMILY)
  calls = calls_of({name: make for name, make in steps.items() if name in own and args.only in name})
  if args.torch:
    peers = torch_step.calls(cfg, batch, LOW_RANK, 1e-5)
    calls |= {name: make() for name, make in peers.items() if args.only in name}
  if not calls:
    raise UserError(f'--only {args.only!r}: no such step; there are {", ".join(own)}')
  unit = unit if unit in calls else next(iter(calls))
  for call in calls.values():
    call()
  times, facts = measuring.take_turns(calls, args.samples, args.seconds), measuring.machine(args.cores)
  print(measuring.describe(facts, (
      f'{spec.count(transformer.spec(cfg)) / 1e6:.1f}M parameters, {args.rows} rows of T={args.length}, {args.blocks} '
      f'context blocks, question {args.question}, answer {args.answer}\n')))
  print(measuring.head('step', 'min ms', 'median ms', f'time / {unit}'))
  for name, seconds in times.items():
    print(measuring.row(name, *measuring.milliseconds(seconds), f'{min(seconds) / min(times[unit]):.2f}'))
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20
  print(f'\npeak memory of the process: {peak:.2f} GiB')
  measuring.keep(args, facts, seconds=times, peak_gib=peak)


def loss_memory(rows: int, length: int, width: int, vocab: int, chunk: int) -> int:
  """Bytes that the compiled distillation loss and its gradient need beside inputs and outputs."""
  hidden = jax.ShapeDtypeStruct((rows, length, width), jnp.float32)
  head = jax.ShapeDtypeStruct((vocab, width), jnp.float32)
  tokens, mask = (jax.ShapeDtypeStruct((rows, length), kind) for kind in (jnp.int32, bool))

  def loss(student_head, student, teacher_head, teacher, targets, mask):
    by = lambda head: jax.tree_util.Partial(transformer.project, head)
    student, teacher = losses.Reading(by(student_head), student), losses.Reading(by(teacher_head), teacher)
    sums = losses.distillation_sums(student, teacher, targets, targets, mask, weights=losses.TokenWeights(), temperature=1.0,
                                    ce_weight=0.0, chunk=chunk)
    return sums['loss'] / sums['weight']

  compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(head, hidden, head, hidden, tokens, mask).compile()
  return compiled.memory_analysis().temp_size_in_bytes


def memory(args) -> None:
  """Prints the memory of the loss for growing T and V, chunked and with all logits at once."""
  facts, rows = measuring.machine(args.cores), []
  print(measuring.describe(facts, (
      f'distillation loss and its gradient, one row, D={args.width}, float32, chunk {args.chunk}\n')))
  print(measuring.head('T', 'V', 'chunked MiB', 'all at once MiB'))
  for length in args.lengths:
    for vocab in args.vocabs:
      small, whole = (loss_memory(1, length, args.width, vocab, chunk) / 2**20 for chunk in (args.chunk, length))
      rows.append({'T': length, 'V': vocab, 'chunked_mib': small, 'whole_mib': whole})
      print(measuring.row(length, vocab, f'{small:.0f}', f'{whole:.0f}'), flush=True)
  measuring.keep(args, facts, rows=rows)


def add(commands) -> None:
  parser = measuring.add_command(commands, 'step', 'a distillation step against block fine-tuning on the same batch', step,
                                 cores=2)
  arguments.add_numbers(
      parser, rows=(1, 'rows of the batch'), length=(4096, 'T'), blocks=(16, 'context blocks'), question=(64, 'tokens'),
      answer=(64, 'tokens'), width=(512, 'model width'), layers=(6, 'layers'), vocab=(16384, 'vocabulary'),
      chunk=(job.CHUNK, 'loss chunk'), samples=(5, 'samples per step'),
      seconds=(60, 'a step that ran so long is not sampled again'))
  parser.add_argument('--size', help=f'shapes of a published model, for width, layers, vocab: {", ".join(sizes.SIZES)}')
  parser.add_argument('--only', default='', metavar='TEXT', help='steps with TEXT in their name')
  parser.add_argument('--torch', action='store_true', help='against steps in torch, of transformers and peft')
  parser.add_argument('--remat', default=transformer.Compute.remat, choices=transformer.REMAT)
  parser.add_argument('--variants', action='store_true',
                      help='the method\'s family, configs/variants.py, each against plain distillation')

  parser = measuring.add_command(commands, 'memory', 'peak memory of the chunked loss against T and V', memory, cores=2)
  parser.add_argument('--lengths', type=int, nargs='+', default=[4096, 8192, 16384, 32768])
  parser.add_argument('--vocabs', type=int, nargs='+', default=[32768, 151936])
  arguments.add_numbers(parser, width=(256, 'model width'), chunk=(job.CHUNK, 'loss chunk'))
