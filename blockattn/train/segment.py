"""Training of the segmenter: cross-entropy on the decisions, from documents whose cuts are known.

`python -m blockattn.train.segment --config configs/segment_tiny.py --workdir runs/segmenter`

Every `segment.eval_every` steps the F1 of exact cuts is measured on a fixed part of the validation files, as they are and
with all surface hints removed, at the threshold that is best for both together. What scores best stands in
`WORKDIR/best`, a Hugging Face folder that `blockattn.segmentation.segmenter` loads; its blockattn.json holds the threshold
and the measures.
"""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from blockattn import blocks, disk, errors, loading, optim
from blockattn.data import encode
from blockattn.errors import UserError
from blockattn.hf import card as card_lib, config as hf_config, convert, files
from blockattn.models import classifier, flops, spec
from blockattn.segmentation import labelled, markers, model
from blockattn.segmentation.semanticseg import hints, schema
from blockattn.train import command, inputs, job, loop, workdir as workdir_lib

_ONE_BLOCK = blocks.BlockOptions(sink_ids=(), positions='sequential', max_blocks=1)   # a text, with nothing beside it


@dataclasses.dataclass(frozen=True)
class SegmentOptions:
  """
  Attributes:
    read: how a text becomes tokens, see markers.ReadOptions
    cut_weight: weight of a cut in the loss; 1 of a candidate that is none
    eval_files: validation documents
    eval_every: steps between two measurements of F1; 0: never
    eval_rows: rows of every category, and as many without hints
    export_dtype: of the best parameters, in WORKDIR/best
    draw: how rows are drawn from documents, see segmentation/rows.py
  """
  read: markers.ReadOptions = markers.ReadOptions()
  cut_weight: float = 1.0
  eval_files: tuple[str, ...] = ()
  eval_every: int = 200
  eval_rows: int = 16
  export_dtype: str = 'bfloat16'
  draw: labelled.DrawOptions = dataclasses.field(kw_only=True)

  def __post_init__(self):
    errors.check_number('config.segment.cut_weight', self.cut_weight, above=0)
    errors.check_number('config.segment.eval_every', self.eval_every, 0)
    errors.check_number('config.segment.eval_rows', self.eval_rows, 1)
    errors.check_choice('config.segment.export_dtype', self.export_dtype, job.DTYPES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(job.Options):
  """
  Attributes:
    segment: what is learned from which texts
  """
  segment: SegmentOptions

  def __post_init__(self):
    super().__post_init__()
    if self.model.train_only:
      raise UserError(f'config.model.train_only={self.model.train_only!r}: a segmenter has no blocks to wrap')


def read(config) -> Options:
  return job.read(Options, config)


@dataclasses.dataclass(frozen=True)
class Validation:
  """Rows that are measured during training.

  Attributes:
    rows: as from `labelled.windows`.
    names: for each row its category, with a mark for texts without hints.
  """
  rows: list
  names: list


def make_step(cfg, compute, cut_weight: float, slices: int, optimizer, learning_rate):
  """See `loop.make_step`; nothing is frozen."""
  def loss_sums(params, frozen, batch, key):
    del frozen, key
    logits = model.apply(params, batch['tokens'], batch['layout'], cfg, compute)
    return model.loss_sums(logits, batch['labels'], cut_weight)

  return loop.make_step(loss_sums, _measure, optimizer, learning_rate, slices=slices)


def _measure(sums):
  return {'ce': sums['ce'] / jnp.maximum(sums['tokens'], 1), 'recall': sums['found'] / jnp.maximum(sums['cuts'], 1),
          'candidates': sums['tokens']}


def best_threshold(odds, labels, names) -> tuple[float, dict]:
  """The threshold on the log-odds with the best macro F1.

  Args:
    odds: float [n], of all candidates.
    labels: int [n], 1 for a cut.
    names: str [n], the group of each.

  Returns:
    (threshold, {group: F1 there}); of equal thresholds the lowest.
  """
  grid = np.linspace(-6, 6, 97)
  scores = {str(name): _f1_on_grid(odds[names == name], labels[names == name], grid) for name in np.unique(names)}
  at = int(np.argmax(np.mean(list(scores.values()), axis=0)))
  return float(grid[at]), {name: float(f1[at]) for name, f1 in scores.items()}


def _f1_on_grid(odds, labels, grid):
  above = lambda chosen: len(chosen) - np.searchsorted(np.sort(chosen), grid, side='right')
  predicted, matched, gold = above(odds), above(odds[labels == 1]), int(np.sum(labels == 1))
  return np.where(predicted + gold == 0, 1.0, 2 * matched / np.maximum(predicted + gold, 1))


class Watch(loop.Watch):
  """Measures F1 on validation rows every few steps, and keeps the best parameters as a Hugging Face folder.

  Args:
    validation: `Validation`.
    every: steps between two measurements, 0 for never.
    steps: of the run; the last one is always measured.
    batch: rows of a global batch.
    own_rows: those of them that this process holds, see inputs.own_rows.
    predict: jitted (params, batch) -> log-odds [B, T], on every process.
    put_batch: host batch -> device batch.
    keep: (params, meta) -> None, called with what is best so far.
    best: (step, F1) of what is kept already; None: nothing.
  """

  def __init__(self, validation, *, every, steps, batch, own_rows, predict, put_batch, keep, best=None):
    self._own_rows = own_rows
    self._validation, self._every, self._steps, self._batch = validation, every, steps, batch
    self._predict, self._put_batch, self._keep, self.best = predict, put_batch, keep, best

  def due(self, step: int) -> bool:
    return bool(self._every and self._validation.rows) and (step % self._every == 0 or step == self._steps)

  def __call__(self, step, state):
    threshold, scores = self.measure(state.params)
    plain, bare = (float(np.mean([f1 for name, f1 in scores.items() if name.endswith('*') is starred]))
                   for starred in (False, True))
    f1 = (plain + bare) / 2
    if f1 > (self.best[1] if self.best else 0.0):
      self.best = step, f1
      self._keep(state.params, {'step': step, 'threshold': threshold, 'f1': plain, 'f1_without_hints': bare})
    found = {'val_f1': plain, 'val_f1_without_hints': bare, 'val_threshold': threshold}
    return loop.held_out_line(step, self.best, {'mean_f1': f1} | found), found | {
        f'val_f1/{name.replace("*", "/without_hints")}': value for name, value in scores.items()}

  def measure(self, params) -> tuple[float, dict]:
    """(threshold, {category, or category* without hints: F1})."""
    odds, labels, names = [], [], []
    rows = self._validation.rows
    for start in range(0, len(rows), self._batch):
      part = [rows[min(i, len(rows) - 1)] for i in range(start, start + self._batch)]   # the last batch is filled up
      stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *(part[row] for row in self._own_rows))
      predicted = np.asarray(self._predict(params, self._put_batch(stacked)))
      for i in range(min(self._batch, len(rows) - start)):
        known = part[i]['labels'] >= 0
        odds.append(predicted[i][known])
        labels.append(part[i]['labels'][known])
        names += [self._validation.names[start + i]] * int(known.sum())
    return best_threshold(np.concatenate(odds), np.concatenate(labels), np.array(names))


def make_reader(options: Options, folder, vocab: int) -> markers.Reader:
  tokenizer = disk.read_tokenizer(pathlib.Path(folder) / 'tokenizer.json')
  encode.check_tokenizer(tokenizer, vocab, str(folder))
  return markers.Reader(tokenizer, options.segment.read)


def read_validation(options: Options, reader) -> Validation:
  """The rows that are measured: as they are, and without hints; none without segment.eval_files."""
  s = options.segment
  if not s.eval_files:
    return Validation([], [])
  documents = list(schema.read(list(s.eval_files)))
  bare = [dataclasses.replace(d, blocks=hints.remove_hints(d.blocks, d.category))
          for d in labelled.some(documents, s.eval_rows)]
  make = functools.partial(labelled.validation_rows, reader=reader, length=options.data.length,
                           per_category=s.eval_rows)
  rows, names = make(documents)
  bare_rows, bare_names = make(bare)
  return Validation(rows + bare_rows, names + [name + '*' for name in bare_names])


def load_model(options: Options, placement, cfg: Any) -> tuple[classifier.ClassifierConfig, Any]:
  """(ModelConfig, params) of options.model, which is a `cfg`: a segmenter as it is, a language model with a new head, or
  random values.

  Raises:
    ValueError: the model at model.source reads units otherwise than segment.read says.
  """
  reading = options.segment.read
  P = reading.unit_tokens
  if not options.model.source:
    cfg = model.architecture(cfg, P)
    return cfg, job.init_params(classifier.spec(cfg), placement, options.seed, options.model.dtype)
  params = job.load_model(options, placement, cfg)
  known = model.is_segmenter(cfg)
  if known and reading.cohesion and cfg.unit_tokens == reading.own_tokens:
    cfg, params = _with_cohesion(cfg, params, P)
  reads = cfg.unit_tokens if known else 0
  if reads != P:
    raise UserError(f'{options.model.source} reads {reads} tokens at a position, config.segment.read (style, head, tail) '
                    f'says {P}; make them agree')
  if known:
    return cfg, params
  cfg = model.architecture(cfg)
  shardings = spec.shardings(classifier.spec(cfg), placement.mesh, placement.rules)
  return cfg, jax.device_put(model.from_backbone(params, cfg, jax.random.key(options.seed)), shardings)


def _with_cohesion(cfg, params, unit_tokens):
  """A segmenter that was trained without cohesion, which reads it but makes nothing of it yet."""
  more = [(0, unit_tokens - cfg.unit_tokens), (0, 0), (0, 0)]
  units = jax.jit(lambda x: jnp.pad(x, more), out_shardings=params['units'].sharding)(params['units'])
  return dataclasses.replace(cfg, unit_tokens=unit_tokens), params | {'units': units}


def build(options: Options, placement, cfg, *, platform: str) -> job.Job:
  """The training of a segmenter on the backbone `cfg`, see job.Job."""
  length, reading = options.data.length, options.segment.read
  cfg = model.architecture(cfg, reading.unit_tokens)
  job.check_batch(options, placement, platform)
  job.check_model(cfg, placement)
  optimizer, specs = optim.make_optimizer(options.optim), classifier.spec(cfg)
  position = (length, *classifier.position_shape(cfg))
  batch = job.abstract_batch(options, placement, tokens=np.zeros(position, np.int32), labels=np.zeros(length, np.int32))
  return job.Job(
      placement=placement, cfg=cfg, blocks=_ONE_BLOCK, specs=specs, optimizer=optimizer,
      step=make_step(cfg, job.compute_of(options.compute, placement, platform), options.segment.cut_weight,
                     options.accumulate, optimizer, optim.learning_rate(options.optim)),
      state=job.abstract_state(specs, options.model.dtype, optimizer, placement), frozen=job.Frozen(),
      batch={name: batch[name] for name in ('tokens', 'layout', 'labels')}, views=(job.View(length),), teacher=None,
      flops=lambda cut: flops.trained(flops.forward(cfg, flops.as_one_block(cut))),
      loss_tokens=lambda cut: 0.0,   # the head is counted with the layers
      logits=length, label='segmenter',
      meta=job.model_meta(cfg, None, options.model.source, 'segment') | {'segmenter': read_meta(options)})


def run(options: Options, workdir):
  """Trains; returns (ModelConfig, params)."""
  placement = job.make_placement(options)
  workdir_lib.save_run_facts(workdir, options)
  cfg = job.model_config(options.model)
  made = build(options, placement, cfg, platform=placement.platform)
  job.check_moments(made, options)
  source = files.locate(loading.tokenizer_of(options.data.tokenizer or options.model.source))
  reader = make_reader(options, source, cfg.vocab)
  documents = read_documents(options)
  _report_moved(documents)
  rows = labelled.DrawnRows(documents, reader, options.segment.draw, options.seed)
  validation = read_validation(options, reader)
  cfg, params = load_model(options, placement, cfg)
  best, compute = pathlib.Path(workdir) / loading.BEST, job.compute_of(options.compute, placement, placement.platform)
  predict = jax.jit(lambda params, batch: model.log_odds(model.apply(
      params, batch['tokens'], batch['layout'], cfg, compute)), out_shardings=placement.replicated())
  watch = Watch(validation, every=options.segment.eval_every, steps=options.steps, batch=options.batch,
                own_rows=inputs.own_rows(placement, options.batch), predict=predict, put_batch=placement.put_batch,
                keep=functools.partial(_keep, cfg=cfg, folder=best, source=source, options=options), best=_best_so_far(best))
  meta = {'source': options.model.source or str(source)}
  return cfg, job.train(made, options, params, job.Frozen(), rows, workdir, meta, [watch])


def read_documents(options: Options) -> list[schema.Document]:
  if not options.data.files:
    raise UserError('config.data.files is empty: give SemanticSeg files, e.g. --config.data.files="DATA/train_*.jsonl.gz"')
  return list(schema.read(list(options.data.files), strict=options.data.strict))


def _report_moved(documents):
  """Says which categories have gold cuts where none can be made, from a look at some documents of each."""
  moved = labelled.moved_cuts(labelled.some(documents, 20))
  lost = [f'{category}: {count} of {cuts}' for category, (count, cuts) in moved.items() if count]
  if lost and jax.process_index() == 0:
    print(f'gold cuts that are no candidates, and count as the nearest: {", ".join(lost)}')


def read_meta(options: Options) -> dict:
  """What an exported segmenter says of how it reads a text."""
  r = options.segment.read
  return {'markers': r.style, 'head': r.head, 'tail': r.tail, 'inner': r.inner, 'middle': r.middle, 'ahead': r.ahead,
          'cohesion': r.cohesion, 'length': options.data.length}


def _keep(params, measured, *, cfg, folder, source, options):
  meta = {'kind': 'segment', 'segmenter': read_meta(options) | measured}
  origin = options.model.source or None
  card = card_lib.text(cfg, meta | {'source': origin}, origin and files.locate(loading.tokenizer_of(origin)), facts=measured)
  convert.save(params, cfg, folder, source=source, meta=meta, card=card, dtype=options.segment.export_dtype, overwrite=True)


def _best_so_far(folder):
  """(step, F1) of what an interrupted run has kept already, None if it has kept nothing."""
  if not (folder / files.META).exists():
    return None
  kept = hf_config.read_meta(folder)['segmenter']
  return kept['step'], (kept['f1'] + kept['f1_without_hints']) / 2


if __name__ == '__main__':
  command.main(Options, run)
