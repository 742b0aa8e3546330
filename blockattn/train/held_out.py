"""Whether a model gets better while it trains: figures of held-out documents, the best step, an end to what stands still.

The figures are those of evals.gap, on one document per row, measured where the run computes, all of its processes taking
part. Beside the model in block and in full mode stand the weights that it started from, in full mode and under the block
mask without sinks: what blocks cost, and how much of it is made good.
"""

import dataclasses
import functools
import hashlib
import itertools
import math
import pathlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from blockattn import checkpoint, errors
from blockattn.data import encode, json_lines, tables
from blockattn.data.example import Example
from blockattn.errors import UserError
from blockattn.evals import gap, pages
from blockattn.loading import BEST
from blockattn.train import inputs, loop

DISTANCES, SCORES = ('kl', 'ce'), ('exact_match', 'substring', 'f1')
FIGURES = tuple(f'{mode}/{measure}' for mode in ('block', 'full') for measure in DISTANCES + SCORES)
_TOLD = ('block/kl', 'closed/kl', 'block/ce', 'block/f1', 'full/ce', 'full/f1')   # in a line: three beside what decides
START_FULL, START_BLOCK = 'start_full', 'start_block'   # names of subjects: the weights that training started from


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalOptions:
  """
  Attributes:
    every: steps between two evaluations; the last step has one, too
    rows: documents, as many of each entry of data.eval_files
    batch: documents per forward pass, or the next number that the devices divide
    answers: documents whose greedy answers are scored; 0: none
    max_new: most tokens of such an answer
    best: figure whose best step is kept in WORKDIR/best: block/kl, block/f1, full/ce, ...; empty: block/kl, without a
      teacher block/ce, where only full attention is trained full/ce
    patience: evaluations without a better one after which the run ends; 0: it does not
  """
  every: int = 500
  rows: int = 256
  batch: int = 8
  answers: int = 32
  max_new: int = 32
  best: str = ''
  patience: int = 0

  def __post_init__(self):
    for name, low in {'every': 1, 'rows': 1, 'batch': 1, 'answers': 0, 'max_new': 1, 'patience': 0}.items():
      errors.check_number(f'config.eval.{name}', getattr(self, name), low)
    errors.check_choice('config.eval.best', self.best, ('', *FIGURES))
    if self.best.endswith(SCORES) and not self.answers:
      raise UserError(f'config.eval.best={self.best!r} is a score of answers, and config.eval.answers=0 wants none')


def figure_of(best: str, modes: Sequence[str], teacher: bool) -> str:
  """The figure that config.eval.best means in a run that measures these modes, with or without a teacher.

  Raises:
    ValueError: it is one that the run does not measure.
  """
  best = best or f'{modes[0]}/{"kl" if teacher else "ce"}'
  mode, measure = best.split('/')
  if mode not in modes:
    raise UserError(f'config.eval.best={best!r}: this run measures {" and ".join(modes)} attention only')
  if measure == 'kl' and not teacher:
    raise UserError(f'config.eval.best={best!r}: no teacher is at work here; choose {mode}/ce')
  return best


def less_is_better(figure: str) -> bool:
  return figure.rpartition('/')[2] in DISTANCES


class HeldOut(NamedTuple):
  """Documents that nothing is trained on, with their examples, and the text that ends an answer, if there is one."""
  docs: list[encode.EncodedDoc]
  examples: list[Example]
  stop: str | None


def read(data: inputs.PromptData, count: int, tokenizer: Any) -> HeldOut:
  """`count` documents of data.eval_files, cut and encoded as those of the training, as many of each entry.

  Raises:
    ValueError: not one is left.
  """
  each, split = -(-count // len(data.eval_files)), pages.SPLITS.get(str(data.eval_files[0]))
  if split and len(data.eval_files) == 1:
    docs, examples = pages.load(tokenizer, count, split=split)
    whole = [(example, doc) for example, doc in zip(examples, docs, strict=True)
             if len(doc.tokens) <= data.length and len(doc.lengths) <= data.max_blocks]
  else:
    rows_of = inputs.file_reader(data, tokenizer)
    by_entry = [list(itertools.islice(_documents(rows_of([tables.origin(entry, data.columns)])), each))
                for entry in data.eval_files]
    # In turns, so that the first ones are of all entries; those without a question last, for they have no answer.
    whole = [pair for some in itertools.zip_longest(*by_entry) for pair in some if pair is not None][:count]
    whole = sorted(whole, key=lambda pair: pair[0].is_text)
  if not whole:
    raise UserError(f'config.data.eval_files={data.eval_files}: not one document with an answer fits into '
                    f'config.data.length={data.length} tokens and config.data.max_blocks={data.max_blocks} blocks')
  return HeldOut([doc for _, doc in whole], [example for example, _ in whole], pages.STOP if split else None)


def _documents(source) -> Iterable[tuple[Example, encode.EncodedDoc]]:
  report = json_lines.Report()
  for piece in range(len(source)):
    yield from ((example, doc) for example, doc in source.examples(piece, report) if doc.answer[0] < doc.answer[1])


class Evaluation(loop.Watch):
  """Measures held-out documents every few steps, keeps the best parameters, and ends a run that gets no better.

  What was best stands in every checkpoint, and what a run that is gone on with from there needs of WORKDIR/best stays: it
  ends as if nothing had happened.

  Args:
    held_out: what is measured.
    options: how often, and for how long without a better one.
    steps: of the run; the last one is always measured.
    figure: of FIGURES, by which steps are compared.
    subjects: trained parameters -> {mode: the model in it}.
    start: the weights that training starts from, by name; let go when they have been measured.
    teacher: what the KL is to; None: there is none.
    tokenizer: of the model.
    batch, put: see gap.measure.
    keep: (params, step, what to say of it) -> None, writes what is best so far into `folder`.
    folder: WORKDIR/best.
  """

  def __init__(self, held_out: HeldOut, options: EvalOptions, *, steps: int, figure: str,
               subjects: Callable[[Any], Mapping[str, gap.Subject]], start: Mapping[str, gap.Subject],
               teacher: gap.Subject | None, tokenizer: Any, batch: int, put: gap.Put,
               keep: Callable[[Any, int, dict], None], folder: pathlib.Path):
    self._held_out, self._options, self._steps, self.figure = held_out, options, steps, figure
    self._subjects, self._start, self._teacher, self._tokenizer = subjects, start, teacher, tokenizer
    self._batch, self._put, self._keep, self._folder = batch, put, keep, folder
    self._of = _fingerprint(held_out, options, figure)
    self._answered = min(options.answers, sum(not example.is_text for example in held_out.examples))
    self._best: tuple[int, float] | None = None   # step, value
    self._since, self._recorded = 0, []   # recorded: bests of the last checkpoints
    self._rows: list[dict] = []   # of the start

  def begin(self, step, meta):
    said = meta.get('eval') or {}
    if said.get('of') == self._of and said['step'] in checkpoint.steps(self._folder):
      self._best, self._since, self._recorded = (said['step'], said['value']), said['since'], [said['step']]
    # What was kept after the checkpoint will be kept again, and what other documents were best for says nothing here.
    self._drop(lambda kept: kept != (self._best or (None,))[0])
    if step < self._steps and not self.stopped and self._start:
      self._rows = self._measure(self._start)
    self._start = {}

  @property
  def stopped(self) -> str:
    return why_stopped(self._said(), self._options.patience, self._folder)

  def due(self, step):
    return step % self._options.every == 0 or step == self._steps

  def __call__(self, step, state):
    began = time.perf_counter()
    found = self.figures(self._measure(self._subjects(state.params)))
    value = found[self.figure]
    if math.isfinite(value) and (self._best is None or self._is_better(value, self._best[1])):
      self._best, self._since = (step, value), 0
      self._keep(state.params, step, {'figure': self.figure, 'value': value})
      self._drop(lambda kept: kept not in (step, *self._recorded))
    else:
      self._since += 1
    others = [name for name in _TOLD if name in found and name != self.figure]
    told = {name: found[name] for name in (self.figure, *others[:3])}
    best = math.nan if self._best is None else self._best[1]
    found |= {'best': best, 'seconds': time.perf_counter() - began}
    return loop.held_out_line(step, self._best, told), {f'eval/{name}': x for name, x in found.items()}

  def _is_better(self, value, best):
    return value < best if less_is_better(self.figure) else value > best

  def meta(self):
    if self._best is None:
      return {}
    # A checkpoint is begun when the one before it stands: these two are what a run may go on from.
    self._recorded = [*self._recorded[-1:], self._best[0]]
    return {'eval': self._said() | {'stopped': bool(self.stopped)}}

  def _said(self) -> dict:
    """What checkpoints say, {} while nothing is best."""
    if self._best is None:
      return {}
    return {'of': self._of, 'figure': self.figure, 'step': self._best[0], 'value': self._best[1], 'since': self._since}

  def end(self):
    self._drop(lambda kept: kept != (self._best or (None,))[0])

  def _drop(self, which):
    if jax.process_index() == 0:
      for step in filter(which, checkpoint.steps(self._folder)):
        checkpoint.remove(self._folder, step)

  def _measure(self, subjects) -> list[dict]:
    """Rows of gap.measure, the first ones with scores of answers."""
    docs, examples, stop = self._held_out
    count = self._answered
    measure = lambda part, max_new: gap.measure(
        subjects, self._teacher, docs[part], examples[part], self._tokenizer, batch=self._batch, max_new=max_new, stop=stop,
        put=self._put) if docs[part] else []
    return measure(slice(count), self._options.max_new) + measure(slice(count, None), 0)

  def figures(self, rows: Sequence[dict]) -> dict[str, float]:
    """From the model's rows {'block/kl', 'full/f1', 'start_full/ce', 'closed/kl', 'block/kl_by_distance/16',
    'block/kl_by_blocks/4', ...: figure}."""
    modes = list(rows[0]['models'])
    if self._rows:
      rows = [row | {'models': start['models'] | row['models']} for start, row in zip(self._rows, rows, strict=True)]
    distances = DISTANCES[self._teacher is None:]
    found, whole, scored = {}, gap.figures(rows), rows[:self._options.answers]
    for measures, part in ((distances, rows), (SCORES, scored)):
      for name, own in (gap.figures(part) if part else {}).items():
        found |= {f'{name}/{m}': own[m] for m in measures if m in own}
      if part and {START_FULL, START_BLOCK, 'block'} <= set(part[0]['models']):
        closed = gap.share_closed(part, START_FULL, START_BLOCK, 'block')
        found |= {f'closed/{m}': closed[m]['mean'] for m in measures if m in closed}
    by_blocks = {}
    for row, doc in zip(rows, self._held_out.docs, strict=True):
      by_blocks.setdefault(1 << (len(doc.lengths).bit_length() - 1), []).append(row)   # 1, 2 to 3, 4 to 7, ...
    parts = {low: gap.figures(part) for low, part in sorted(by_blocks.items())}
    for mode, measure in itertools.product(modes, distances):
      found |= {f'{mode}/{measure}_by_distance/{at["from"]}': at[measure] for at in whole[mode]['by_distance']}
      found |= {f'{mode}/{measure}_by_blocks/{low}': own[mode][measure] for low, own in parts.items()}
    return found


def why_stopped(said: Mapping[str, Any], patience: int, folder: pathlib.Path) -> str:
  """Why a run is at its end whose newest checkpoint says this of its figures; '' if it is not. `folder`: WORKDIR/best."""
  if not said or not patience or said['since'] < patience:
    return ''
  return (f'{said["since"]} evaluations in a row found {said["figure"]} no better than at step {said["step"]}, '
          f'{said["value"]:.4g} (config.eval.patience={patience}); that step stands in {folder}')


def _fingerprint(held_out, options, figure) -> str:
  """Of all that decides the figure, but the model."""
  digest = hashlib.sha256(repr((figure, options.answers, options.max_new, held_out.stop)).encode())
  for doc, example in zip(held_out.docs, held_out.examples, strict=True):
    digest.update(repr((doc.lengths, doc.continued, tuple(doc.answer), example.answers, example.response)).encode())
    digest.update(np.asarray(doc.tokens, np.int32).tobytes())
  return digest.hexdigest()[:16]


def make(options, made, tokenizer: Any, workdir, *, student: Callable[[Any], Any], compute, start: gap.Subject,
         teacher: gap.Subject | None = None, modes: Sequence[str] = ('block', 'full'), meta: dict) -> list[loop.Watch]:
  """The `Evaluation` of a run, [] without data.eval_files.

  Args:
    options: a job.PromptOptions.
    made: the job.Job.
    student: trained parameters -> the student's.
    compute: how it computes.
    start: the weights that training starts from, with full attention.
    teacher: what the KL is to, with full attention; None: nothing is at hand.
    modes: that are measured, the first by default the one by which steps are compared.
    meta: what checkpoints say of the model.
  """
  if not options.data.eval_files:
    return []
  placement, folder = made.placement, pathlib.Path(workdir) / BEST
  ways = placement.size('batch')
  batch = -(-options.eval.batch // ways) * ways
  own = np.asarray(inputs.own_rows(placement, batch))
  model = functools.partial(gap.Subject, cfg=made.cfg, compute=_whole_rows(compute), options=made.blocks)
  whole = lambda subject: dataclasses.replace(subject, compute=_whole_rows(subject.compute))
  is_teacher, start = teacher is start, whole(start)
  teacher = start if is_teacher else teacher and whole(teacher)   # the same Subject, so that gap.measure runs it once
  bare = dataclasses.replace(start, mode='block', options=start.options.bare)

  def subjects(params):
    params = student(params)
    return {mode: model(params, mode=mode) for mode in modes}

  return [Evaluation(
      read(options.data, options.eval.rows, tokenizer), options.eval, steps=options.steps,
      figure=figure_of(options.eval.best, modes, teacher is not None), subjects=subjects,
      start={START_FULL: start, START_BLOCK: bare} if 'block' in modes else {}, teacher=teacher,
      tokenizer=tokenizer, batch=batch, put=lambda rows: placement.put_batch(jax.tree.map(lambda x: x[own], rows)),
      keep=lambda params, step, found: checkpoint.save_params(folder, params, meta | {'step': step, 'eval': found}, step),
      folder=folder)]


def _whole_rows(compute):
  """No row is cut over devices: those of documents have many lengths, and tokens of an answer come one by one."""
  if compute.row_parts == 1:
    return compute
  rules = tuple((name, None if name == 'tokens' else rule) for name, rule in compute.placement.rules)
  return dataclasses.replace(compute, placement=dataclasses.replace(compute.placement, rules=rules))
