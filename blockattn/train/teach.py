"""The teacher's part of a block distillation, computed once: its likeliest tokens for every token of every row.

`python -m blockattn.train.teach --config configs/distill.py --workdir logits/x`, and then
`python -m blockattn.train.distill --config configs/distill.py --config.teacher.logits=logits/x --workdir runs/x`

Written are the rows that a training of this config reads, in their order, `teacher.top_k` tokens of each position; several
trainings share them, as long as the rows are the same (the teacher, data, blocks and seed are; sinks, dropout, loss,
optimizer may differ, and a training may end sooner). The training then needs no teacher: it costs what fine-tuning in block
mode does. What is lost is measured here: the KL between the teacher with full attention and under the block mask, whole and
from so many tokens.
"""

import contextlib
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from blockattn import losses, metrics
from blockattn.data import teacher_logits
from blockattn.errors import UserError
from blockattn.train import command, distill, inputs, job

PART_ROWS = 256
BIAS_AT = (1, 4, 16, 64, 256)   # numbers of tokens whose KL is compared with the whole
BIAS_BATCHES = 4


def finished(options: distill.Options, workdir) -> str:
  """See job.finished.

  Raises:
    ValueError: the folder was begun for something else.
  """
  folder, total = pathlib.Path(workdir), options.steps * options.batch
  if (folder / teacher_logits.META).is_file():
    distill.check_teacher_logits(folder, teacher_logits.read_meta(folder), distill.teacher_facts(options))
  return '' if len(_done(options, folder)) < total else (
      f'finished already: all {total} rows are in {folder}; train with --config.teacher.logits={folder}')


def _done(options, folder) -> set[int]:
  """The rows of these options that are in the folder."""
  rows = {row for rows in teacher_logits.written_rows(folder).values() for row in rows}
  return rows & {*range(options.steps * options.batch)}


def run(options: distill.Options, workdir):
  """Writes the folder `workdir`; what a run that was stopped has written stays."""
  goal, positions, folder = options.distill, options.blocks.positions, pathlib.Path(workdir)
  if finished(options, folder):
    return
  placement = job.make_placement(options)
  teacher_placement = distill.teacher_placement(options, placement)
  job.check_batch(options, placement, placement.platform)
  student = job.model_config(options.model)
  tokenizer, model = job.load_tokenizer(options, student), distill.teacher_model(options)
  cfg = distill.teacher_config(job.model_config(model), student, model.source)
  source = inputs.load_rows(options.data, tokenizer)
  done, total, first = _done(options, folder), options.steps * options.batch, jax.process_index() == 0
  if first and done:
    print(f'going on: {len(done)} of {total} rows are in {folder}')
  if options.teacher.top_k >= cfg.vocab:
    raise UserError(f'config.teacher.top_k={options.teacher.top_k}: the vocabulary has {cfg.vocab} tokens; keep fewer')
  teacher, weights = distill.load_teacher(options, cfg, tokenizer, teacher_placement)
  _claim(folder, options, weights)
  compute = distill.teacher_compute(options, teacher_placement, placement.platform)
  model = distill.transformer_model(cfg, compute)
  say = functools.partial(teacher_says, model=model, options=goal, top_k=options.teacher.top_k, positions=positions)
  say = jax.jit(say, out_shardings=placement.sharding(('batch',)))
  measure = jax.jit(functools.partial(bias_sums, model=model, vocab=cfg.vocab, options=goal, positions=positions,
                                      row_parts=compute.row_parts))
  own, sums, batches = inputs.own_rows(placement, options.batch), [], inputs.batches(options, source, placement)
  steps = max(1, PART_ROWS // options.batch)   # of a part
  with contextlib.closing(batches), metrics.counting('teaching', enabled=first) as show:
    for part, begin in enumerate(range(0, options.steps, steps)):
      numbers = range(begin * options.batch, min(begin + steps, options.steps) * options.batch)
      if done.issuperset(numbers):
        continue
      if batches.get_state()['next_step'] != begin:
        batches.set_state({'next_step': begin})
      records = {}
      for start in numbers[::options.batch]:
        rows = next(batches)
        batch = placement.put_batch(rows)
        if len(sums) < BIAS_BATCHES:
          sums.append(jax.device_get(measure(teacher, batch)))
        records |= _records(say(teacher, batch), rows, own, start, cfg.vocab)
        show(start + options.batch, total)
      teacher_logits.write_part(folder, f'part-{part:05d}-{jax.process_index():04d}', records)
  if sums and first:
    bias = bias_of(sums)
    print(bias_table(bias), flush=True)
    metrics.write_json(folder / 'bias.json', bias)


def _records(said, rows, own, start, vocab) -> dict[int, dict]:
  """{number in the stream: arrays to write} of the rows of a batch, the places `own`, that this process answers for."""
  held = {name: _held(x) for name, x in said.items()}
  row = lambda place: jax.tree.map(lambda x: x[own.index(place)], rows)
  return {start + place: teacher_logits.record(row(place), {name: x[place] for name, x in held.items()}, vocab)
          for place in sorted(next(iter(held.values())))}


def _held(x) -> dict[int, np.ndarray]:
  """{row: its values} of the rows of a global array that this process alone answers for."""
  held = {}
  for shard in x.addressable_shards:
    if shard.replica_id == 0:
      first = shard.index[0].start or 0
      held |= {first + i: row for i, row in enumerate(np.asarray(shard.data))}
  return held


def _claim(folder, options, weights):
  """Says in a new folder what it is made for and from; one that was begun with other weights is refused."""
  if (folder / teacher_logits.META).is_file():
    distill.check_teacher_weights(folder, options, weights)
  elif jax.process_index() == 0:
    folder.mkdir(parents=True, exist_ok=True)
    metrics.write_json(folder / teacher_logits.META, distill.teacher_facts(options) | {'source_weights': weights})


def teacher_says(teacher, batch, *, model: distill.Model, options, top_k, positions) -> dict:
  """Arrays [B, T, ...] of data/teacher_logits.py for a batch, `options.chunk` tokens of each row at a time."""
  reading, _ = distill.teacher_reading(teacher, batch, model, positions=positions,
                                       blocked=options.weights.source == 'teacher')

  def chunk(inputs):
    x_BTD, blocked_BTD, targets = inputs
    logits = reading.head(x_BTD)
    log_p, ids = jax.lax.top_k(jax.nn.log_softmax(logits / options.temperature), top_k)
    said = {'ids': ids.astype(jnp.int32), 'log_p': log_p, 'target_log_p': losses.log_prob(logits, targets)}
    if blocked_BTD is not None:
      said['blocked_log_p'] = losses.log_prob(reading.head(blocked_BTD), targets)
    return said

  return losses.map_chunks(chunk, (reading.x_BTD, reading.blocked_BTD, batch['targets']), options.chunk)


def bias_sums(teacher, batch, *, model: distill.Model, vocab, options, positions, row_parts) -> dict:
  """Sums over text tokens: 'tokens', 'kl' of the teacher from itself under the block mask, and for each of BIAS_AT the KL
  from so many tokens and the probability that is left for the rest."""
  reading, _ = distill.teacher_reading(teacher, batch, model, positions=positions, blocked=True)
  sizes = [k for k in BIAS_AT if k < vocab]

  def chunk(head, states, per_token, mask):
    del per_token
    m = mask.astype(jnp.float32)
    full, block = map(head, states)
    log_p, ids = jax.lax.top_k(jax.nn.log_softmax(full / options.temperature), max(sizes))
    sums = {'tokens': jnp.sum(m), 'kl': jnp.sum(m * losses.divergence(full, block, options.temperature))}
    for k in sizes:
      rest = 1 - jnp.sum(jnp.exp(log_p[..., :k]), axis=-1)
      kl = losses.divergence_of_top(log_p[..., :k], ids[..., :k], block, options.temperature)
      sums |= {f'kl_{k}': jnp.sum(m * kl), f'rest_{k}': jnp.sum(m * rest)}
    return sums

  return losses.sum_over_tokens(chunk, reading.head, (reading.x_BTD, reading.blocked_BTD), batch['targets'], batch['text'],
                                options.chunk, row_parts)


def bias_of(sums) -> dict:
  """{'kl': nats per token, 'tokens': of how many, 'top': {K: {'kl', 'rest'}}} of the sums of some batches."""
  total = {name: float(sum(part[name] for part in sums)) for name in sums[0]}
  tokens = max(total['tokens'], 1.0)
  sizes = [str(k) for k in BIAS_AT if f'rest_{k}' in total]
  return {'kl': total['kl'] / tokens, 'tokens': tokens,
          'top': {k: {'kl': total[f'kl_{k}'] / tokens, 'rest': total[f'rest_{k}'] / tokens} for k in sizes}}


def bias_table(bias) -> str:
  lines = [f'KL(full attention || block mask) of the teacher: {bias["kl"]:.4f} nats per token, {bias["tokens"]:.0f} tokens',
           *(f'  from {k:>4} tokens and the rest: {top["kl"]:.4f} ({top["kl"] / max(bias["kl"], 1e-9):.1%}), '
             f'probability of the rest {top["rest"]:.4f}' for k, top in bias['top'].items())]
  return '\n'.join(lines)


if __name__ == '__main__':
  command.main(distill.Options, run, finished)
