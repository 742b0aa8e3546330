"""Block distillation: a frozen full-attention teacher guides a block-attention student of the same weights.

`python -m blockattn.train.distill --config configs/distill.py --workdir runs/x`

One forward pass of the teacher, one forward and one backward pass of the student (arXiv 2605.15913; what the paper
leaves open is a config key, see README).
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from blockattn import blocks, errors, losses, optim
from blockattn.models import lora, transformer
from blockattn.train import command, loop, setup

LOSS_OVER = ('readers', 'text', 'answer')


@dataclasses.dataclass(frozen=True)
class DistillOptions:
  """
  Attributes:
    drop_rate: probability of block dropout per context block.
    drop_mode: see blocks.drop_blocks.
    loss_over: 'readers': all tokens of reading blocks, lifted ones included. 'text': all text tokens. 'answer'.
    weights: token weighting.
    temperature: of both distributions in the KL, which counts temperature^2 times.
    ce_weight: of cross-entropy on the data, beside the KL.
    chunk: tokens per row whose logits exist at a time.
    accumulate: slices that a batch is computed in.
    seed: of block dropout.
  """
  drop_rate: float
  drop_mode: str
  loss_over: str
  weights: losses.TokenWeights
  temperature: float
  ce_weight: float
  chunk: int
  accumulate: int
  seed: int

  def __post_init__(self):
    if self.drop_mode not in blocks.DROP_MODES:
      raise ValueError(f'config.distill.drop_mode={self.drop_mode!r}; choose one of {", ".join(blocks.DROP_MODES)}')
    if self.loss_over not in LOSS_OVER:
      raise ValueError(f'config.distill.loss_over={self.loss_over!r}; choose one of {", ".join(LOSS_OVER)}')
    errors.check_number('config.distill.drop_rate', self.drop_rate, 0, 1)
    errors.check_number('config.distill.temperature', self.temperature, above=0)
    errors.check_number('config.distill.ce_weight', self.ce_weight, 0)
    errors.check_number('config.distill.weights.floor', self.weights.floor, 0)
    errors.check_number('config.distill.weights.cap', self.weights.cap, above=0)


@dataclasses.dataclass(frozen=True)
class Models:
  """Static facts of both models: what a step closes over."""
  student: transformer.ModelConfig
  teacher: transformer.ModelConfig
  student_compute: transformer.Compute
  teacher_compute: transformer.Compute
  blocks: blocks.BlockOptions
  low_rank: lora.LoraOptions = lora.NONE


@flax.struct.dataclass
class Frozen:
  """Parameters that a step reads and does not train.

  Attributes:
    teacher: the teacher's; None where what it says is stored with the rows.
    base: what a LoRA student adds to, the same arrays as the teacher's where there is one; else None.
  """
  teacher: Any = None
  base: Any = None


def loss_mask(batch, dropped: blocks.BlockLayout, options: DistillOptions):
  """Which positions count: bool [B, T]. `dropped` is the layout after block dropout, before sinks."""
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


def loss_sums(params, frozen: Frozen, batch, key, models: Models, options: DistillOptions):
  """The sums of losses.distillation_sums for one batch; differentiable in params."""
  layout, position = batch['layout'], batch['layout'].position
  if 'teacher' in batch:
    teacher = losses.StoredTeacher(**batch['teacher'])
  else:
    teacher = teacher_reading(frozen.teacher, batch, models.teacher, models.teacher_compute,
                              positions=models.blocks.positions, blocked=options.weights.source == 'teacher')
  if options.drop_rate > 0:
    layout = blocks.drop_blocks(layout, key, rate=options.drop_rate, mode=options.drop_mode,
                                positions=models.blocks.positions)
  mask = loss_mask(batch, layout, options)
  tokens, student_layout, index = blocks.block_mode(batch['tokens'], layout, models.blocks)
  student = lora.attach(frozen.base, params, models.low_rank) if models.low_rank.rank else params
  with jax.named_scope('student'):
    x_student = transformer.apply(student, tokens, student_layout, models.student, models.student_compute)
  x_student = jnp.take_along_axis(x_student, index[..., None], axis=1)
  with jax.named_scope('loss'):
    return losses.distillation_sums(losses.Reading(transformer.head_of(student, models.student), x_student), teacher,
                                    batch['targets'], position, mask, weights=options.weights,
                                    temperature=options.temperature, ce_weight=options.ce_weight, chunk=options.chunk,
                                    parts=models.student_compute.row_parts)


@jax.named_scope('teacher')
def teacher_reading(teacher, batch, cfg, compute, *, positions: str, blocked: bool) -> losses.Reading:
  """The teacher's reading with full attention, and, if it is wanted `blocked` too, under the block mask, without sinks. No
  gradient."""
  layout = batch['layout']
  read = lambda layout: jax.lax.stop_gradient(transformer.apply(teacher, batch['tokens'], layout, cfg, compute))
  return losses.Reading(transformer.head_of(teacher, cfg), read(blocks.as_one_block(layout)),
                        read(blocks.with_positions(layout, positions)) if blocked else None)


def make_step(models: Models, options: DistillOptions, optimizer, learning_rate):
  """See `loop.make_step`; what is frozen is a `Frozen`."""
  sums = lambda params, frozen, batch, key: loss_sums(params, frozen, batch, key, models, options)
  return loop.make_step(sums, _measure, optimizer, learning_rate, slices=options.accumulate, seed=options.seed)


def _measure(sums):
  tokens = jnp.maximum(sums['tokens'], 1)
  mean_weight = sums['weight'] / tokens
  spread = jnp.sqrt(jnp.maximum(sums['weight_sq'] / tokens - mean_weight ** 2, 0)) / jnp.maximum(mean_weight, 1e-9)
  # A bin that no token of the batch falls into has no KL.
  kl_at = jnp.where(sums['tokens_at'] > 0, sums['kl_at'] / jnp.maximum(sums['tokens_at'], 1), jnp.nan)
  return {'kl': sums['kl'] / tokens, 'ce': sums['ce'] / tokens, 'teacher_ce': sums['teacher_ce'] / tokens,
          'gap': sums['gap'] / tokens, 'weight_mean': mean_weight, 'weight_spread': spread,
          'weight_at_floor': sums['at_floor'] / tokens, 'weight_at_cap': sums['at_cap'] / tokens,
          'loss_tokens': sums['tokens']} | {f'kl_pos_{i}': kl_at[i] for i in range(losses.POSITION_BINS)}


def run(config, workdir):
  """Trains as the config says; returns (ModelConfig, params, BlockOptions) of the student.

  The params of a LoRA student are the trained ones alone, as its checkpoints hold them.
  """
  options, optim_config, low_rank = options_of(config), setup.optim_config(config), setup.lora_options(config)
  if not config.model.source:
    raise ValueError('config.model.source is empty: distillation needs a trained teacher, a Hugging Face folder or name')
  place = setup.placement(config)
  setup.check_batch(config, place)
  teacher_place = setup.teacher_placement(config, place)
  loop.save_run_facts(workdir, config)
  tokenizer = setup.model_tokenizer(config)
  source = setup.taught(config, setup.rows(config, tokenizer))
  teacher_cfg, params = setup.load_model(config, place)
  weights = setup.source_weights(config, params)
  if config.teacher.logits:
    setup.check_taught_weights(config.teacher.logits, config, weights)
  cfg, block_options = setup.block_options(config, teacher_cfg, tokenizer)
  models = Models(
      student=cfg, teacher=teacher_cfg, student_compute=setup.compute(config, place),
      teacher_compute=setup.compute(config, teacher_place, dtype=config.teacher.compute_dtype, remat='none'),
      blocks=block_options, low_rank=low_rank)
  frozen = Frozen(None if config.teacher.logits else setup.teacher_from(params, teacher_cfg, config, teacher_place))
  params = setup.add_sink_rows(params, cfg, tokenizer, config.blocks.sink_text, place)
  if low_rank.rank:
    frozen = frozen.replace(base=frozen.teacher or {name: p for name, p in params.items() if name != 'sinks'})
    params = setup.lora_start(params, cfg, low_rank, config, place)
  optimizer = optim.make_optimizer(optim_config)
  step_fn = make_step(models, options, optimizer, optim.learning_rate(optim_config))
  state = loop.run(lambda state, batch: step_fn(state, frozen, batch), loop.init_state(params, optimizer),
                   setup.batches(config, source), setup.loop_config(config, 'distilling', cfg), workdir,
                   put_batch=place.put_batch,
                   meta=setup.model_meta(cfg, block_options, config.model.source, 'distill', low_rank,
                                         setup.prompt_meta(config, tokenizer), weights))
  return cfg, state.params, block_options


def options_of(config) -> DistillOptions:
  setup.check_config(config, 'distill')
  fields = dict(config.distill)
  weights = losses.TokenWeights(**dict(fields.pop('weights')))
  return DistillOptions(**fields, weights=weights, chunk=config.chunk, accumulate=config.accumulate, seed=config.seed)


if __name__ == '__main__':
  command.main(run, 'distill')
