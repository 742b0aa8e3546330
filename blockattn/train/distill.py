"""Block distillation: a frozen full-attention teacher guides a block-attention student of the same weights.

`python -m blockattn.train.distill --config configs/distill.py --workdir runs/x`

One forward pass of the teacher, one forward and one backward pass of the student (arXiv 2605.15913; what the paper
leaves open is a config key, see README).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from blockattn import blocks, errors, loading, losses, mesh as mesh_lib, optim, options as options_lib
from blockattn.data import encode, teacher_logits
from blockattn.errors import UserError
from blockattn.evals import gap
from blockattn.hf import convert, files
from blockattn.models import flops, lora, spec, transformer, weights
from blockattn.train import (
    command,
    held_out,
    inputs,
    job,
    loop,
    matching,
    on_policy as on_policy_lib,
    workdir as workdir_lib,
)

LOSS_OVER = ('readers', 'text', 'answer')


@dataclasses.dataclass(frozen=True)
class DistillOptions:
  """
  Attributes:
    drop_rate: block dropout, per context block
    drop_mode: lift, isolate, merge, remove: see blocks.drop_blocks
    loss_over: readers: all tokens of reading blocks, lifted ones included; text: all text tokens; answer
    divergence: from the teacher's distribution: forward, reverse (both KL), jsd: see losses.divergence
    temperature: of both distributions in the divergence, which counts temperature^2 times
    ce_weight: of cross-entropy on the data, beside the divergence
    match_weight: of the distance between both attention outputs, see train/matching.py; 0: none
    weights: how much a token counts, see losses.TokenWeights
    on_policy: answers of the student's own in the batch, see train/on_policy.py
    chunk: tokens per row whose logits exist at a time.
    accumulate: slices that a batch is computed in.
    seed: of block dropout.
  """
  drop_rate: float = 0.2
  drop_mode: str = 'lift'
  loss_over: str = 'readers'
  divergence: str = 'forward'
  temperature: float = 1.0
  ce_weight: float = 0.0
  match_weight: float = 0.0
  weights: losses.TokenWeights = losses.TokenWeights()
  on_policy: on_policy_lib.OnPolicyOptions = on_policy_lib.OnPolicyOptions()
  chunk: int = options_lib.not_a_key(default=job.CHUNK)
  accumulate: int = options_lib.not_a_key(default=1)
  seed: int = options_lib.not_a_key(default=0)

  def __post_init__(self):
    errors.check_choice('config.distill.drop_mode', self.drop_mode, blocks.DROP_MODES)
    errors.check_choice('config.distill.loss_over', self.loss_over, LOSS_OVER)
    errors.check_choice('config.distill.divergence', self.divergence, losses.DIVERGENCES)
    if self.weights.on == 'ce' and not self.ce_weight:
      raise UserError("config.distill.weights.on='ce' weights the cross-entropy, which config.distill.ce_weight=0.0 leaves "
                      'out; give it a weight above 0')
    errors.check_number('config.distill.drop_rate', self.drop_rate, 0, 1)
    errors.check_number('config.distill.temperature', self.temperature, above=0)
    errors.check_number('config.distill.ce_weight', self.ce_weight, 0)
    errors.check_number('config.distill.match_weight', self.match_weight, 0)
    errors.check_number('config.distill.weights.floor', self.weights.floor, 0)
    errors.check_number('config.distill.weights.cap', self.weights.cap, above=0)


@dataclasses.dataclass(frozen=True)
class TeacherOptions:
  """
  Attributes:
    source: folder, hub name or work directory of another model with the same tokens; empty: model.source
    size: its name in blockattn/models/sizes.py, for tools.show, where source is no folder here
    dtype: of its frozen parameters: float32, bfloat16, int8 (matrices of 8 bits)
    compute_dtype: of its activations
    rules: logical axis -> mesh axes, where they differ from config.rules
    logits: offline distillation: folder of blockattn.train.teach, what it says, computed before; no teacher
    top_k: tokens of each position that blockattn.train.teach keeps
  """
  source: str = ''
  size: str = ''
  dtype: str = 'float32'
  compute_dtype: str = 'float32'
  rules: tuple = ()
  logits: str = ''
  top_k: int = 64

  def __post_init__(self):
    errors.check_choice('config.teacher.dtype', self.dtype, (*job.DTYPES, 'int8'))
    errors.check_choice('config.teacher.compute_dtype', self.compute_dtype, job.DTYPES)
    errors.check_number('config.teacher.top_k', self.top_k, 1)
    mesh_lib.check_rules('config.teacher.rules', self.rules)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(job.PromptOptions):
  """
  Attributes:
    teacher: the frozen model, which is model.source with full attention, or another one
    distill: the method, arXiv 2605.15913 as we read it
  """
  teacher: TeacherOptions
  distill: DistillOptions

  def __post_init__(self):
    super().__post_init__()
    if not self.model.source:
      raise UserError('config.model.source is empty: distillation needs a trained teacher, a Hugging Face folder or name')
    on_teacher = self.low_rank.rank and not self.teacher.logits and not self.teacher.source
    if self.export_every and on_teacher and self.teacher.dtype != self.model.dtype:
      raise UserError(f'config.export_every={self.export_every}: what is trained is added to the teacher in '
                      f'{self.teacher.dtype} here, not to the weights in {self.model.dtype}; export afterwards, with '
                      'tools.convert to_hf')
    held_out.figure_of(self.eval.best, gap.MODES[::-1], teacher=not self.teacher.logits)
    for name, value in (('match_weight', self.distill.match_weight), ('on_policy.share', self.distill.on_policy.share)):
      if value and self.teacher.logits:
        raise UserError(f'config.distill.{name}={value} needs a teacher at work, and config.teacher.logits='
                        f'{self.teacher.logits!r} stands in its place; leave one of them out')


def read(config) -> Options:
  return job.read(Options, config)


@dataclasses.dataclass(frozen=True)
class Model:
  """A language model as two functions. Any will do; `transformer_model` makes that of models/transformer.

  Attributes:
    apply: (params, tokens [B, T], layout) -> hidden states [B, T, D]. What attends to what is `blocks.may_attend` of the
      layout, and a token's place in its document `layout.position`.
    head: params -> a function from hidden states [..., D] to float32 logits [..., V] that JAX can pass on, such as
      jax.tree_util.Partial(project, matrix): the loss calls it on some tokens at a time.
    keeping: `apply` that also gives what a function makes of every layer, see `transformer.apply_keeping`: only output
      matching asks for it.
    place: tells the compiler where an array [B, T, D] lives.
  """
  apply: Callable[[Any, jax.Array, blocks.BlockLayout], jax.Array]
  head: Callable[[Any], Callable[[jax.Array], jax.Array]]
  keeping: Callable[..., tuple[jax.Array, Any]] | None = None
  place: Callable[[jax.Array], jax.Array] = lambda x_BTD: x_BTD

  def read(self, params, tokens, layout, keep: transformer.Keep | None = None, beside=()) -> tuple[jax.Array, Any]:
    """(hidden states, what `keep` made of every layer, None without one)."""
    if keep is None:
      return self.apply(params, tokens, layout), None
    if self.keeping is None:
      raise UserError('config.distill.match_weight compares what attention gives in every layer of models/transformer.py; a '
                      'model of your own says nothing of its layers: leave it 0')
    return self.keeping(params, tokens, layout, keep, beside)


def transformer_model(cfg: transformer.ModelConfig, compute: transformer.Compute) -> Model:
  return Model(lambda params, tokens, layout: transformer.apply(params, tokens, layout, cfg, compute),
               lambda params: transformer.head_function(params, cfg),
               lambda params, tokens, layout, keep, beside: transformer.apply_keeping(params, tokens, layout, cfg, compute,
                                                                                      keep, beside),
               functools.partial(transformer.constrain, compute=compute))


@dataclasses.dataclass(frozen=True)
class Models:
  """What a step closes over.

  Attributes:
    student, teacher: the models.
    blocks: how block mode looks to the student.
    attach: (frozen base, trained parameters) -> the student's parameters; None: they are what is trained.
    row_parts: devices that the tokens of a row are divided over.
    seam_drawn: whether each step draws how many seam tokens it has, see `blocks.draw_seam`.
  """
  student: Model
  teacher: Model
  blocks: blocks.BlockOptions
  attach: Callable[[Any, Any], Any] | None = None
  row_parts: int = 1
  seam_drawn: bool = False


def loss_mask(batch, dropped: blocks.BlockLayout, options: DistillOptions):
  """Which positions count: bool [B, T]. `dropped` is the layout after block dropout, before sinks, its seam tokens
  readers."""
  present = dropped.doc != 0
  if options.loss_over == 'answer':
    mask = batch['loss']
  elif options.loss_over == 'text':
    mask = batch['text']
  else:
    mask = batch['text'] & dropped.reader
  if options.drop_mode in ('isolate', 'remove'):
    mask = mask & ~(_answer_lost(batch, dropped) & batch['layout'].reader)
  return mask & present


def _answer_lost(batch, dropped):
  """True in every document whose last block can no longer see a block that its answer is known to stand in."""
  doc = batch['layout'].doc
  gone = batch['gold'] & ((dropped.doc == 0) | dropped.hidden)
  rows = jnp.arange(doc.shape[0])[:, None]
  lost = jnp.zeros((doc.shape[0], doc.shape[1] + 1), bool).at[rows, doc].max(gone)   # by document number
  return jnp.take_along_axis(lost, doc, axis=1)


def loss_sums(params, frozen: job.Frozen, batch, key, models: Models, options: DistillOptions):
  """The sums of losses.distillation_sums for one batch; the loss is differentiable in params."""
  layout, position = batch['layout'], batch['layout'].position
  if options.drop_rate > 0:
    layout = blocks.drop_blocks(layout, key, rate=options.drop_rate, mode=options.drop_mode,
                                positions=models.blocks.positions)
  seam = blocks.draw_seam(models.blocks, key) if models.seam_drawn else models.blocks.seam
  again = blocks.first_tokens(layout, seam) if models.blocks.seam else False
  mask = loss_mask(batch, layout.replace(reader=layout.reader | again), options)
  tokens, student_layout, index = blocks.block_mode(batch['tokens'], layout, models.blocks, seam, batch.get('room'),
                                                     batch['continued'])
  match = matching.Match(index, tokens.shape[1], mask, models.student.place) if options.match_weight else None
  if 'teacher' in batch:
    teacher, wanted = losses.StoredTeacher(**batch['teacher']), ()
  else:
    teacher, wanted = teacher_reading(frozen.teacher, batch, models.teacher, positions=models.blocks.positions,
                                      blocked=options.weights.source == 'teacher', keep=match and match.wanted)
  student = params if models.attach is None else models.attach(frozen.base, params)
  with jax.named_scope('student'):
    x_student, distances = models.student.read(student, tokens, student_layout, match and matching.distance, wanted or ())
  x_student = jnp.take_along_axis(x_student, index[..., None], axis=1)
  with jax.named_scope('loss'):
    return losses.distillation_sums(losses.Reading(models.student.head(student), x_student), teacher,
                                    batch['targets'], position, mask, weights=options.weights,
                                    temperature=options.temperature, ce_weight=options.ce_weight, chunk=options.chunk,
                                    kind=options.divergence, document=batch['layout'].doc,
                                    match=match and match.of_text(distances), match_weight=options.match_weight,
                                    parts=models.row_parts)


@jax.named_scope('teacher')
def teacher_reading(teacher, batch, model: Model, *, positions: str, blocked: bool,
                    keep: transformer.Keep | None = None) -> tuple[losses.Reading, Any]:
  """The teacher's reading with full attention, and, if it is wanted `blocked` too, under the block mask, without sinks; and
  what `keep` makes of every layer with full attention. No gradient."""
  layout = batch['layout']
  read = lambda layout, keep=None: jax.lax.stop_gradient(model.read(teacher, batch['tokens'], layout, keep))
  x_BTD, kept = read(blocks.as_one_block(layout), keep)
  blocked_BTD = read(blocks.with_positions(layout, positions))[0] if blocked else None
  return losses.Reading(model.head(teacher), x_BTD, blocked_BTD), kept


def make_step(models: Models, options: DistillOptions, optimizer, learning_rate):
  """See `loop.make_step`; what is frozen is a `job.Frozen`."""
  sums = lambda params, frozen, batch, key: loss_sums(params, frozen, batch, key, models, options)
  return loop.make_step(sums, _measure, optimizer, learning_rate, slices=options.accumulate, seed=options.seed)


def _measure(sums):
  tokens = jnp.maximum(sums['tokens'], 1)
  mean_weight = sums['weight_sum'] / tokens
  spread = jnp.sqrt(jnp.maximum(sums['weight_sq'] / tokens - mean_weight ** 2, 0)) / jnp.maximum(mean_weight, 1e-9)
  # A bin that no token of the batch falls into has no KL.
  kl_at = jnp.where(sums['tokens_at'] > 0, sums['kl_at'] / jnp.maximum(sums['tokens_at'], 1), jnp.nan)
  return {'kl': sums['kl'] / tokens, 'ce': sums['ce'] / tokens, 'teacher_ce': sums['teacher_ce'] / tokens,
          'gap': sums['gap'] / tokens, 'weight_mean': mean_weight, 'weight_spread': spread,
          'weight_at_floor': sums['at_floor'] / tokens, 'weight_at_cap': sums['at_cap'] / tokens,
          'loss_tokens': sums['tokens'], **({'match': sums['match'] / tokens} if 'match' in sums else {}),
          **{f'kl_pos_{i}': kl_at[i] for i in range(losses.POSITION_BINS)}}


def step_flops(options: Options, cut: flops.Blocks, cfg, teacher=None) -> flops.Flops:
  """The operations that both models need in a step, by where the blocks of the batch are; block dropout counts with its
  mean. `teacher`: its ModelConfig; None: `cfg`, as that of the student."""
  goal = options.distill
  student = flops.in_blocks(cut, **job.inserted(options.blocks, cut), drop_rate=goal.drop_rate, drop_mode=goal.drop_mode)
  total = flops.trained(flops.forward(cfg, student), frozen=options.low_rank.rank > 0)
  if options.teacher.logits:   # no teacher is at work
    return total
  total += flops.forward(teacher or cfg, flops.as_one_block(cut))
  return total + flops.forward(teacher or cfg, flops.in_blocks(cut)) if goal.weights.source == 'teacher' else total


def loss_tokens(goal: DistillOptions, cut: flops.Blocks, seams: float = 0.0) -> float:
  """How many tokens have a loss; `seams`: tokens of seams, all blocks together."""
  everything, last = float(cut.sizes.sum()), float(cut.sizes[-1])
  lifted = goal.drop_rate if goal.drop_mode in ('lift', 'isolate') else 0.0
  readers = last + lifted * (everything - last) + (1 - lifted) * seams
  return {'text': everything, 'readers': readers, 'answer': last}[goal.loss_over]


def teacher_placement(options: Options, placement: mesh_lib.Placement) -> mesh_lib.Placement:
  """The same mesh with the teacher's rules: teacher.rules in place of those of the same names.

  Raises:
    ValueError: they place the rows of a batch, or the tokens of a row, elsewhere than the student's do.
  """
  rules = dict(placement.rules) | dict(options.teacher.rules)
  other = mesh_lib.Placement(placement.mesh, tuple(rules.items()))
  for axis in ('batch', 'tokens'):
    if other.mesh_axes(axis) != placement.mesh_axes(axis):
      raise UserError(f'config.teacher.rules places {axis!r} on {other.mesh_axes(axis)}, config.rules on '
                      f'{placement.mesh_axes(axis)}: teacher and student read the same batch, so both must be the same')
  return other


def teacher_compute(options: Options, placement: mesh_lib.Placement, platform: str) -> transformer.Compute:
  """How the teacher computes, at its own placement: it keeps nothing for a backward pass."""
  return job.compute_of(options.compute, placement, platform, dtype=options.teacher.compute_dtype, remat='none')


def teacher_shardings(options: TeacherOptions, cfg, placement: mesh_lib.Placement):
  """Raises ValueError, naming the parameter, if one cannot be cut evenly."""
  plain = spec.shardings(transformer.spec(cfg), placement.mesh, placement.rules)
  return weights.quantized_shardings(plain) if options.dtype == 'int8' else plain


def teacher_model(options: Options) -> job.ModelOptions:
  """The model that teaches: that of teacher.source, else the one that is trained."""
  source = options.teacher.source
  return job.ModelOptions(source=source, size=options.teacher.size, dtype=options.model.dtype) if source else options.model


def teacher_config(cfg: transformer.ModelConfig, student: transformer.ModelConfig, source: str) -> transformer.ModelConfig:
  """The architecture that teaches: `cfg` without learned sinks, and with as many rows for tokens as the student has. Models
  of one tokenizer may have more, for no token.

  Raises:
    ValueError: it has fewer.
  """
  if cfg.vocab < student.vocab:
    raise UserError(f'config.teacher.source={source!r} has {cfg.vocab} rows for tokens, and the student {student.vocab}: it '
                    'cannot say how likely the last ones are')
  return dataclasses.replace(cfg, learned_sinks=0, vocab=student.vocab)


def as_teacher(params, options: TeacherOptions, vocab: int | None = None):
  """A copy of a model's parameters, learned sinks left out, in teacher.dtype; 'int8': matrices of 8 bits, see
  models/weights.py, all else in the dtype of its activations. `vocab`: rows for tokens that it keeps; None: all."""
  params = {name: p[:vocab] if name in ('embed', 'head') else p for name, p in job.base_params(params).items()}
  if options.dtype == 'int8':
    return weights.quantize(params, options.compute_dtype)
  return jax.tree.map(lambda p: jnp.array(p, options.dtype, copy=True), params)


def teacher_from(params, cfg, options: TeacherOptions, placement: mesh_lib.Placement):
  """`as_teacher` of real parameters, whose buffers training reuses.

  Args:
    params: placed by any rules.
    cfg: from `teacher_config`.
    placement: the teacher's.
  """
  make = functools.partial(as_teacher, options=options, vocab=cfg.vocab)
  return jax.jit(make, out_shardings=teacher_shardings(options, cfg, placement))(params)


def load_teacher(options: Options, cfg, tokenizer, placement: mesh_lib.Placement):
  """(the teacher's parameters; which weights they are, see convert.weights_facts).

  Args:
    cfg: from `teacher_config`.
    tokenizer: the student's.
    placement: the teacher's.

  Raises:
    ValueError: tokens of the teacher are others than the student's, or a check of `job.load_model` fails.
  """
  model = teacher_model(options)
  if options.teacher.source:
    encode.check_same_tokens(tokenizer, encode.load_tokenizer(loading.tokenizer_of(model.source)),
                             str(tokenizer.name_or_path), model.source)
  params = job.load_language_model(dataclasses.replace(options, model=model), placement, job.model_config(model))
  return teacher_from(params, cfg, options.teacher, placement), convert.weights_facts(params)


def abstract_teacher(options: Options, cfg, placement: mesh_lib.Placement):
  """The teacher's parameters as abstract arrays."""
  params = spec.abstract(transformer.spec(cfg), options.model.dtype)
  arrays = jax.eval_shape(functools.partial(as_teacher, options=options.teacher), params)
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), arrays,
                      teacher_shardings(options.teacher, cfg, placement))


def build(options: Options, placement: mesh_lib.Placement, cfg: transformer.ModelConfig, *, platform: str, sink: int = 0,
          teacher_cfg: transformer.ModelConfig | None = None) -> job.Job:
  """The distillation of a model, see job.Job; arguments as of finetune.build.

  Args:
    teacher_cfg: of the model of teacher.source; None: found as tools.show does, without a network.
  """
  goal, low_rank, length, stored = options.distill, options.low_rank, options.data.length, bool(options.teacher.logits)
  own = not options.teacher.source
  reader = cfg if own or stored else teacher_cfg or job.architecture_here(teacher_model(options), 'config.teacher')
  reader = teacher_config(reader, cfg, options.teacher.source)
  student, form = job.block_options(options, cfg, sink)
  padded = blocks.padded_length(length, form)
  on_policy_lib.check(goal.on_policy, form)
  if goal.match_weight and (reader.layers, reader.width) != (cfg.layers, cfg.width):
    raise UserError(f'config.distill.match_weight={goal.match_weight} compares layer by layer, and config.teacher.source='
                    f'{options.teacher.source!r} has {reader.layers} layers of width {reader.width}, the student '
                    f'{cfg.layers} of {cfg.width}; leave it 0')
  other = teacher_placement(options, placement)
  job.check_batch(options, placement, platform, padded)
  job.check_model(student, placement)
  job.check_model(reader, other, 'query heads of the teacher')
  compute, reading = job.compute_of(options.compute, placement, platform), teacher_compute(options, other, platform)
  attach = (lambda base, params: lora.attach(base, params, low_rank)) if low_rank.rank else None
  models = Models(transformer_model(student, compute), transformer_model(reader, reading), form, attach, compute.row_parts,
                  form.seam > 0 and options.blocks.seam_drawn)
  optimizer, specs = optim.make_optimizer(options.optim), job.trained_specs(student, low_rank)
  teacher, base = None if stored else abstract_teacher(options, reader, other), job.base_of(options, student, placement)
  return job.Job(
      placement=placement, cfg=student, blocks=form, specs=specs, optimizer=optimizer,
      step=make_step(models, goal, optimizer, optim.learning_rate(options.optim)),
      state=job.abstract_state(specs, options.model.dtype, optimizer, placement),
      frozen=job.Frozen(teacher, teacher if base and teacher and own else base),
      batch=job.abstract_batch(options, placement, **(
          {'teacher': teacher_logits.empty(length, options.teacher.top_k)} if stored else {})),
      views=(job.View(padded, near=not (goal.drop_rate > 0 and goal.drop_mode in ('lift', 'isolate') or form.seam
                                        or form.links)),),
      teacher=None if stored else job.Teacher(reader, other, options.teacher.dtype, options.teacher.compute_dtype),
      flops=lambda cut: step_flops(options, cut, student, reader),
      loss_tokens=lambda cut: loss_tokens(goal, cut, float(np.sum(job.inserted(options.blocks, cut)['seams']))),
      logits=options.chunk, label='distilling',
      meta=job.model_meta(student, form, options.model.source, 'distill', low_rank))


def teacher_facts(options: Options) -> dict:
  """What a training that reads stored logits must agree with, see train/teach.py."""
  return {'source': teacher_model(options).source, 'length': options.data.length, 'temperature': options.distill.temperature,
          'top_k': options.teacher.top_k, 'positions': options.blocks.positions,
          'blocked': options.distill.weights.source == 'teacher'}


def check_teacher_logits(folder, found: dict, wanted: dict):
  """Raises ValueError, naming the first fact in which a folder of stored logits is not what is wanted."""
  for name, value in wanted.items():
    if found[name] != value:
      raise UserError(f'{folder} was written for {name}={found[name]!r}, this config says {value!r}; use another folder, '
                      'or the config that it was written for')


def check_teacher_weights(folder, options: Options, facts: dict):
  """Raises ValueError if a folder of stored logits is from other weights than the teacher's are."""
  convert.check_same_weights(teacher_logits.read_meta(folder).get('source_weights'), facts, f'{folder}',
                             teacher_model(options).source, 'run blockattn.train.teach into a new folder')


def stored_teacher(options: Options) -> teacher_logits.StoredLogits | None:
  """What adds to the rows what teacher.logits has of a teacher, if it names a folder."""
  folder = options.teacher.logits
  if not folder:
    return None
  found, wanted = teacher_logits.read_meta(folder), teacher_facts(options)
  wanted['top_k'] = found['top_k']   # the training takes what is there
  if not wanted['blocked']:
    del wanted['blocked']   # there, and not looked at
  check_teacher_logits(folder, found, wanted)
  return teacher_logits.StoredLogits(folder, options.steps * options.batch)


def rewriter(options: Options, made: job.Job, tokenizer, base):
  """What puts the student's own answers into a batch, see `loop.run`; None if none are wanted.

  Args:
    base: what a LoRA student adds to.
  """
  goal, place = options.distill.on_policy, made.placement
  if not goal.share:
    return None
  attach = (lambda params: lora.attach(base, params, options.low_rank)) if options.low_rank.rank else None
  engine = on_policy_lib.engine_maker(
      made.cfg, job.compute_of(options.compute, None, place.platform), made.blocks, tokenizer,
      files.stop_ids(tokenizer.name_or_path, tokenizer.eos_token_id), length=options.data.length,
      rows=max(1, options.batch // options.accumulate // place.size('batch')), attach=attach)
  return functools.partial(on_policy_lib.rewritten, options=goal, seed=options.seed, engine=engine)


def run(options: Options, workdir):
  """Trains; returns (ModelConfig, params, BlockOptions) of the student; of LoRA, the trained params alone, as its
  checkpoints hold them."""
  placement = job.make_placement(options)
  workdir_lib.save_run_facts(workdir, options)
  cfg = job.model_config(options.model)
  tokenizer = job.load_tokenizer(options, cfg)
  sink = job.sink_of(options.blocks, tokenizer)
  own, stored = not options.teacher.source, options.teacher.logits
  made = build(options, placement, cfg, platform=placement.platform, sink=sink,
               teacher_cfg=None if own or stored else job.model_config(teacher_model(options)))
  job.check_moments(made, options)
  add, source = stored_teacher(options), inputs.load_rows(options.data, tokenizer)
  params = job.load_language_model(options, placement, cfg)
  meta = {'source_weights': job.source_weights(options, params), 'prompt': inputs.prompt_meta(options.data, tokenizer)}
  reader, teacher, facts = made.teacher, None, meta['source_weights']
  if reader is None and own:
    check_teacher_weights(stored, options, facts)
  elif reader is None:   # it is not read here: what its folder of logits says is all that is known of it
    facts = teacher_logits.read_meta(stored).get('source_weights')
  elif own:
    teacher = teacher_from(params, reader.cfg, options.teacher, reader.placement)
  else:
    teacher, facts = load_teacher(options, reader.cfg, tokenizer, reader.placement)
  if not own:
    meta |= {'teacher': options.teacher.source, 'teacher_weights': facts}
  compute = job.compute_of(options.compute, placement, placement.platform)
  at_work = None if reader is None else gap.Subject(
      teacher, reader.cfg, teacher_compute(options, reader.placement, placement.platform), 'full', made.blocks)
  start = at_work if own and at_work else gap.Subject(params, cfg, compute, 'full', made.blocks)
  params, base = job.student_params(options, made.cfg, params, sink, placement)
  frozen = job.Frozen(teacher, teacher if base and teacher and own else base)
  watches = job.make_watches(made, options, tokenizer, workdir, base=frozen.base, compute=compute, start=start,
                             teacher=at_work, meta=meta)
  del start
  params = job.train(made, options, params, frozen, source, workdir, meta, watches, add=add,
                     rewrite=rewriter(options, made, tokenizer, frozen.base))
  return made.cfg, params, made.blocks


if __name__ == '__main__':
  command.main(Options, run)
