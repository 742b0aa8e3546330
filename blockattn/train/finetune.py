"""Cross-entropy training: pretraining (mode 'full') and block fine-tuning (mode 'both', arXiv 2409.15355).

`python -m blockattn.train.finetune --config configs/finetune.py --workdir runs/x`
"""

import dataclasses

import jax
import jax.numpy as jnp

from blockattn import blocks, errors, losses, optim, options as options_lib
from blockattn.errors import UserError
from blockattn.evals import gap
from blockattn.models import flops, lora, transformer
from blockattn.train import command, held_out, inputs, job, loop, workdir as workdir_lib

MODES = ('full', 'block', 'both')


@dataclasses.dataclass(frozen=True)
class FinetuneOptions:
  """
  Attributes:
    mode: 'full' attention, 'block' attention, or 'both': every example once in each
    text_weight: weight of every text token; 0 leaves text out
    prompt_weight: added on the tokens of the last block in front of the answer
    answer_weight: added on answer tokens
    chunk: tokens per row whose logits exist at a time.
    accumulate: slices that a batch is computed in.
    seed: of how many seam tokens a step has.
  """
  mode: str = 'both'
  text_weight: float = 0.0
  prompt_weight: float = 0.0
  answer_weight: float = 1.0
  chunk: int = options_lib.not_a_key(default=job.CHUNK)
  accumulate: int = options_lib.not_a_key(default=1)
  seed: int = options_lib.not_a_key(default=0)

  def __post_init__(self):
    errors.check_choice('config.finetune.mode', self.mode, MODES)
    for name in ('text_weight', 'prompt_weight', 'answer_weight'):
      errors.check_number(f'config.finetune.{name}', getattr(self, name), 0)
    if self.text_weight + self.prompt_weight + self.answer_weight <= 0:
      raise UserError('all token weights of finetune are 0: there is nothing to learn')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(job.PromptOptions):
  """
  Attributes:
    finetune: what is learned; the defaults are block fine-tuning (arXiv 2409.15355)
  """
  finetune: FinetuneOptions

  def __post_init__(self):
    super().__post_init__()
    held_out.figure_of(self.eval.best, measured_modes(self.finetune), teacher=False)


def measured_modes(options: FinetuneOptions) -> tuple[str, ...]:
  """Modes whose figures on held-out documents say something of the training, the one that it is for first."""
  return ('full',) if options.mode == 'full' else ('block', 'full')


def read(config) -> Options:
  return job.read(Options, config)


def token_weights(batch, options: FinetuneOptions):
  """Weight of each position's next token: float32 [B, T]."""
  text = batch['text']
  prompt = text & batch['layout'].reader & ~batch['loss']
  return (options.text_weight * text + options.prompt_weight * prompt
          + options.answer_weight * batch['loss']).astype(jnp.float32)


def loss_sums(params, batch, cfg, compute, block_options, options: FinetuneOptions, seam=None):
  """Cross-entropy sums over the modes asked for, see losses.cross_entropy_sums."""
  views = []
  if options.mode in ('full', 'both'):
    views.append((batch['tokens'], blocks.as_one_block(batch['layout']), None))
  if options.mode in ('block', 'both'):
    views.append(blocks.block_mode(batch['tokens'], batch['layout'], block_options, seam, batch.get('room'),
                                   batch['continued']))
  weight = token_weights(batch, options)
  total = []
  for tokens, layout, index in views:
    x_BTD = transformer.apply(params, tokens, layout, cfg, compute)
    if index is not None:
      x_BTD = jnp.take_along_axis(x_BTD, index[..., None], axis=1)
    with jax.named_scope('loss'):
      total.append(losses.cross_entropy_sums(transformer.head_function(params, cfg), x_BTD, batch['targets'], weight,
                                             options.chunk, compute.row_parts))
  return jax.tree.map(lambda *sums: sum(sums), *total)


def make_step(cfg, compute, block_options, options: FinetuneOptions, optimizer, learning_rate,
              low_rank: lora.LoraOptions = lora.NONE, seam_drawn: bool = False):
  """See `loop.make_step`; what is frozen is a `job.Frozen`."""
  def sums(params, frozen, batch, key):
    seam = blocks.draw_seam(block_options, key) if seam_drawn else None
    params = lora.attach(frozen.base, params, low_rank) if low_rank.rank else params
    return loss_sums(params, batch, cfg, compute, block_options, options, seam)

  return loop.make_step(sums, _measure, optimizer, learning_rate, slices=options.accumulate, seed=options.seed)


def _measure(sums):
  return {'ce': sums['ce'] / jnp.maximum(sums['tokens'], 1), 'loss_tokens': sums['tokens']}


def step_flops(options: Options, cut: flops.Blocks, cfg) -> flops.Flops:
  """The operations that the model needs in a step, by where the blocks of the batch are."""
  mode = options.finetune.mode
  views = [flops.as_one_block(cut)] * (mode != 'block') + [
      flops.in_blocks(cut, **job.inserted(options.blocks, cut))] * (mode != 'full')
  return flops.trained(flops.forward(cfg, flops.Seen(*map(sum, zip(*views, strict=True)))), frozen=options.low_rank.rank > 0)


def build(options: Options, placement, cfg, *, platform: str, sink: int = 0) -> job.Job:
  """The training of a model, see job.Job.

  Args:
    cfg: the model that training starts from.
    platform: JAX's name of what will compute.
    sink: the token that sinks are, see job.sink_of; any where only shapes matter.
  """
  goal, low_rank, length = options.finetune, options.low_rank, options.data.length
  student, form = job.block_options(options, cfg, sink)
  padded = blocks.padded_length(length, form)
  job.check_batch(options, placement, platform, padded)
  job.check_model(student, placement)
  optimizer, specs = optim.make_optimizer(options.optim), job.trained_specs(student, low_rank)
  step = make_step(student, job.compute_of(options.compute, placement, platform), form, goal, optimizer,
                   optim.learning_rate(options.optim), low_rank, form.seam > 0 and options.blocks.seam_drawn)
  views = (job.View(length),) * (goal.mode != 'block') + (
      job.View(padded, near=not (form.seam or form.links)),) * (goal.mode != 'full')
  tokens = lambda cut: float(cut.sizes.sum() if goal.text_weight else cut.sizes[-1])
  return job.Job(
      placement=placement, cfg=student, blocks=form, specs=specs, optimizer=optimizer, step=step,
      state=job.abstract_state(specs, options.model.dtype, optimizer, placement),
      frozen=job.Frozen(base=job.base_of(options, student, placement)), batch=job.abstract_batch(options, placement),
      views=views, teacher=None, flops=lambda cut: step_flops(options, cut, student),
      loss_tokens=lambda cut: tokens(cut) * len(views), logits=options.chunk, label=f'fine-tuning ({goal.mode})',
      meta=job.model_meta(student, form if goal.mode != 'full' else None, options.model.source, 'finetune', low_rank))


def run(options: Options, workdir):
  """Trains; returns (ModelConfig, params, BlockOptions); of LoRA, the trained params alone."""
  placement = job.make_placement(options)
  workdir_lib.save_run_facts(workdir, options)
  cfg = job.model_config(options.model)
  tokenizer = job.load_tokenizer(options, cfg)
  sink = job.sink_of(options.blocks, tokenizer)
  made = build(options, placement, cfg, platform=placement.platform, sink=sink)
  job.check_moments(made, options)
  source = inputs.load_rows(options.data, tokenizer)
  params = job.load_language_model(options, placement, cfg)
  meta = {'source_weights': job.source_weights(options, params), 'prompt': inputs.prompt_meta(options.data, tokenizer)}
  compute = job.compute_of(options.compute, placement, placement.platform)
  start = gap.Subject(params, cfg, compute, 'full', made.blocks)
  params, base = job.student_params(options, made.cfg, params, sink, placement)
  watches = job.make_watches(made, options, tokenizer, workdir, base=base, compute=compute, start=start,
                             modes=measured_modes(options.finetune), meta=meta)
  del start
  params = job.train(made, options, params, job.Frozen(base=base), source, workdir, meta, watches)
  return made.cfg, params, made.blocks


if __name__ == '__main__':
  command.main(Options, run)
