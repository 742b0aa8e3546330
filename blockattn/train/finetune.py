"""Cross-entropy training: pretraining (mode 'full') and block fine-tuning (mode 'both', arXiv 2409.15355).

`python -m blockattn.train.finetune --config configs/finetune.py --workdir runs/x`
"""

import dataclasses

import jax
import jax.numpy as jnp

from blockattn import blocks, errors, losses, optim
from blockattn.models import lora, transformer
from blockattn.train import command, loop, setup

MODES = ('full', 'block', 'both')


@dataclasses.dataclass(frozen=True)
class FinetuneOptions:
  """
  Attributes:
    mode: 'full' attention, 'block' attention, or 'both': every example once in each.
    text_weight: weight of every text token; 0 leaves text out.
    prompt_weight: added on the tokens of the last block in front of the answer.
    answer_weight: added on answer tokens.
    chunk: tokens per row whose logits exist at a time.
    accumulate: slices that a batch is computed in.
  """
  mode: str
  text_weight: float
  prompt_weight: float
  answer_weight: float
  chunk: int
  accumulate: int

  def __post_init__(self):
    if self.mode not in MODES:
      raise ValueError(f'config.finetune.mode={self.mode!r}; choose one of {", ".join(MODES)}')
    for name in ('text_weight', 'prompt_weight', 'answer_weight'):
      errors.check_number(f'config.finetune.{name}', getattr(self, name), 0)
    if self.text_weight + self.prompt_weight + self.answer_weight <= 0:
      raise ValueError('all token weights of finetune are 0: there is nothing to learn')


def token_weights(batch, options: FinetuneOptions):
  """Weight of each position's next token: float32 [B, T]."""
  text = batch['text']
  prompt = text & batch['layout'].reader & ~batch['loss']
  return (options.text_weight * text + options.prompt_weight * prompt
          + options.answer_weight * batch['loss']).astype(jnp.float32)


def loss_sums(params, batch, cfg, compute, block_options, options: FinetuneOptions):
  """Cross-entropy sums over the modes asked for, see losses.cross_entropy_sums."""
  views = []
  if options.mode in ('full', 'both'):
    views.append((batch['tokens'], blocks.as_one_block(batch['layout']), None))
  if options.mode in ('block', 'both'):
    views.append(blocks.block_mode(batch['tokens'], batch['layout'], block_options))
  weight = token_weights(batch, options)
  total = []
  for tokens, layout, index in views:
    x_BTD = transformer.apply(params, tokens, layout, cfg, compute)
    if index is not None:
      x_BTD = jnp.take_along_axis(x_BTD, index[..., None], axis=1)
    with jax.named_scope('loss'):
      total.append(losses.cross_entropy_sums(transformer.head_of(params, cfg), x_BTD, batch['targets'], weight,
                                             options.chunk, compute.row_parts))
  return jax.tree.map(lambda *sums: sum(sums), *total)


def make_step(cfg, compute, block_options, options: FinetuneOptions, optimizer, learning_rate,
              low_rank: lora.LoraOptions = lora.NONE):
  """See `loop.make_step`; frozen are the parameters that a LoRA student adds to, else None."""
  def sums(params, frozen, batch, key):
    del key
    params = lora.attach(frozen, params, low_rank) if low_rank.rank else params
    return loss_sums(params, batch, cfg, compute, block_options, options)

  return loop.make_step(sums, _measure, optimizer, learning_rate, slices=options.accumulate)


def _measure(sums):
  return {'ce': sums['ce'] / jnp.maximum(sums['tokens'], 1), 'loss_tokens': sums['tokens']}


def run(config, workdir):
  """Trains as the config says; returns (ModelConfig, params, BlockOptions); of LoRA, the trained params alone."""
  options, optim_config = options_of(config), setup.optim_config(config)
  place = setup.placement(config)
  setup.check_batch(config, place)
  compute = setup.compute(config, place)
  low_rank, frozen = setup.lora_options(config), None
  loop.save_run_facts(workdir, config)
  tokenizer = setup.model_tokenizer(config)
  source = setup.rows(config, tokenizer)
  cfg, params = setup.load_model(config, place)
  weights = setup.source_weights(config, params)
  cfg, block_options = setup.block_options(config, cfg, tokenizer)
  params = setup.add_sink_rows(params, cfg, tokenizer, config.blocks.sink_text, place)
  if low_rank.rank:
    frozen = {name: p for name, p in params.items() if name != 'sinks'}
    params = setup.lora_start(params, cfg, low_rank, config, place)
  optimizer = optim.make_optimizer(optim_config)
  step_fn = make_step(cfg, compute, block_options, options, optimizer, optim.learning_rate(optim_config), low_rank)
  meta = setup.model_meta(cfg, block_options if options.mode != 'full' else None, config.model.source, 'finetune', low_rank,
                          setup.prompt_meta(config, tokenizer), weights)
  state = loop.run(lambda state, batch: step_fn(state, frozen, batch), loop.init_state(params, optimizer),
                   setup.batches(config, source), setup.loop_config(config, f'fine-tuning ({options.mode})', cfg), workdir,
                   put_batch=place.put_batch, meta=meta)
  return cfg, state.params, block_options


def options_of(config) -> FinetuneOptions:
  setup.check_config(config, 'finetune')
  return FinetuneOptions(**dict(config.finetune), chunk=config.chunk, accumulate=config.accumulate)


if __name__ == '__main__':
  command.main(run, 'finetune')
