"""The runner of every benchmark: answers items in batches, keeps each answer at once, and sums up.

A run's folder holds

  run.json            what decides an answer: model, mode, options; written first
  predictions.jsonl   a line per item, appended as answers come
  summary.json        means with bootstrap confidence intervals; written at the end, in one move

A run that is started again in the same folder answers what is missing. A line that a killed run left unfinished is
dropped; a run.json that says otherwise, or an item whose prompt is another one now, is an error.

Every average is a mean of means over items; its interval, percentiles of means over items of each task drawn with
replacement, says how far the figure depends on the choice of items, nothing more.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from blockattn import disk, metrics
from blockattn.blocks import Continued
from blockattn.data.example import Example
from blockattn.errors import UserError

RUN, PREDICTIONS, SUMMARY = 'run.json', 'predictions.jsonl', 'summary.json'
RESAMPLES = 2000
LEVEL = 0.95
SEED = 0
_VERSION = 2      # of the code: to be raised where the same run would be answered or scored otherwise than before
_LISTED = 20      # ids of items that are too long, in the summary
_ROW = {'id': str, 'task': str, 'prediction': str, 'scores': {str: disk.NUMBER}, 'key': str}   # what each line has

Answer = Callable[..., list[str]]   # (prompts: Sequence[list[list[int]]], *, max_new: int, stop: tuple) -> texts


@dataclasses.dataclass(frozen=True)
class Item:
  """One question of a benchmark."""
  id: str   # unique in the run
  task: str   # what its score is averaged over first
  example: Example   # blocks and prompt, a chat template already around them
  max_new: int   # most tokens of the answer
  stop: tuple[str, ...] = ()   # the answer ends before any of these texts
  references: tuple[str, ...] = ()   # accepted answers
  part: str = ''   # a part of the task that is also averaged on its own, such as a range of lengths; '' for none
  facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)   # what else its score depends on


@dataclasses.dataclass(frozen=True)
class Averages:
  """What is averaged over tasks, by name. An average is left out where one of its tasks has no item."""
  # Groups of tasks: the mean over the groups of the mean over a group's tasks. Tasks: the mean over all their items.
  macro: Mapping[str, Sequence[Sequence[str]]] = dataclasses.field(default_factory=dict)
  pooled: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, eq=False)
class _Prompt:
  item: Item
  tokens: np.ndarray   # int32 [n]
  lengths: tuple[int, ...]   # of its blocks
  continued: tuple[bool, ...]   # which of them go on with the one before
  key: str   # a hash of all that is asked

  def blocks(self) -> list[list[int]]:
    parts = np.split(self.tokens, np.cumsum(self.lengths)[:-1])
    return [(Continued if goes_on else list)(part.tolist()) for goes_on, part in zip(self.continued, parts, strict=True)]


def run(items: Sequence[Item], *, prompt: Callable[[Example], list[list[int]]], answer: Answer,
        score: Callable[[Item, str], dict[str, float]], out: str | os.PathLike, facts: Mapping[str, Any], batch: int,
        more: Mapping[str, Any] | None = None, averages: Averages | None = None,
        fits: Callable[[Item, Sequence[int]], bool] | None = None,
        progress: Callable[[int, int], None] | None = None) -> dict:
  """Answers and scores items, and sums up.

  Args:
    prompt: a prompt's tokens by block, as `encode.Encoder.prompt` gives them.
    answer: called with (prompts, max_new=, stop=) for at most `batch` prompts, the shortest first; gives their answers.
    score: of one answer, by measure, each 0 to 1; every item of a task has the same measures, the main one first.
    out: the run's folder, made if absent.
    facts: what decides an answer apart from the prompt; JSON values.
    more: what else the summary's facts should say; no reason to refuse a folder.
    averages: None: a macro average over all tasks.
    fits: called with (item, tokens of each of its blocks); items that do not fit are left out and counted. None: all do.
    progress: called with (items done, all).

  Returns:
    `summarize`'s, with 'too_long', 'facts' and 'seconds' (of this start only).

  Raises ValueError: no item is left, two items have one id, or the folder holds another run."""
  start = time.perf_counter()
  prompts, too_long = _prompts(items, prompt, fits)
  out = pathlib.Path(out)
  by_id = {p.item.id: p for p in prompts}

  def make(names):
    group = [by_id[name] for name in names]
    made = answer([p.blocks() for p in group], max_new=group[0].item.max_new, stop=group[0].item.stop)
    return [_row(p, said, score) for p, said in zip(group, made, strict=True)]

  rows = kept_rows(out, dict(facts) | {'version': _VERSION}, {p.item.id: p.key for p in prompts},
                   lambda names: _batches([by_id[name] for name in names], batch), make, progress=progress)
  summary = summarize(rows, averages)
  summary |= {'too_long': {'n': len(too_long), 'ids': too_long[:_LISTED]}, 'facts': dict(facts) | dict(more or {}),
              'seconds': round(time.perf_counter() - start, 3)}
  metrics.write_json(out / SUMMARY, summary)
  return summary


def _prompts(items, prompt, fits):
  """([_Prompt] in the order of the items, ids of those that do not fit)."""
  found, too_long, seen = [], [], set()
  for item in items:
    if item.id in seen:
      raise UserError(f'two items have the id {item.id!r}; ids name the answers of a run and must differ')
    seen.add(item.id)
    blocks = prompt(item.example)
    lengths, continued = tuple(map(len, blocks)), tuple(isinstance(block, Continued) for block in blocks)
    if fits is not None and not fits(item, lengths):
      too_long.append(item.id)
      continue
    tokens = np.fromiter((token for block in blocks for token in block), np.int32)
    asked = repr((lengths, continued, item.max_new, item.stop)).encode() + tokens.tobytes()
    found.append(_Prompt(item, tokens, lengths, continued, hashlib.sha256(asked).hexdigest()[:16]))
  if not found:
    raise UserError(f'nothing to answer: of {len(seen)} items {len(too_long)} are too long for the model or --max-length')
  return found, too_long


def _batches(prompts: Sequence[_Prompt], batch: int) -> Iterator[list[str]]:
  """Ids of prompts that are asked alike, by length: the shortest first within each kind."""
  kinds = {}
  for p in sorted(prompts, key=lambda p: len(p.tokens)):
    kinds.setdefault((p.item.max_new, p.item.stop), []).append(p.item.id)
  yield from (names[i:i + batch] for names in kinds.values() for i in range(0, len(names), batch))


def _row(p, said, score):
  item, part = p.item, {'part': p.item.part} if p.item.part else {}
  return {'id': item.id, 'task': item.task, **part, 'prediction': said, 'references': list(item.references),
          'scores': score(item, said), 'tokens': len(p.tokens), 'blocks': len(p.lengths), 'key': p.key}


# Rows that are kept.

def kept_rows(out: pathlib.Path | None, facts: Mapping[str, Any], keys: Mapping[Any, str],
              batches: Callable[[list], Iterable[Sequence]], make: Callable[[Sequence], Iterable[dict]], *,
              file: str = PREDICTIONS, form: Mapping = _ROW, by: str = 'id',
              progress: Callable[[int, int], None] | None = None) -> list[dict]:
  """A row for each key, in their order: those that a run before left, and the others, on the disk as they are made.

  Args:
    out: a folder, made if absent; None: nothing is kept.
    facts: what decides a row beside its key; JSON values, in run.json.
    keys: by what names a row, a hash of all that is asked.
    batches: of the names that lack a row.
    make: of a batch, its rows.
    file: of the rows, in the folder; each of the `form` of disk.check_form, and named by its value at `by`.
    progress: called with (rows, all).

  Raises ValueError: what is there is another run's, naming what differs."""
  rows = {} if out is None else _resumed(out, facts, keys, out / file, form, by)
  for names in batches([name for name in keys if name not in rows]):
    if progress:
      progress(len(rows), len(keys))
    new = {row[by]: row for row in make(names)}
    if out is not None:
      with open(out / file, 'a', encoding='utf-8') as stream:
        stream.writelines(json.dumps(row, ensure_ascii=False) + '\n' for row in new.values())
    rows |= new
  if progress:
    progress(len(keys), len(keys))
  return [rows[name] for name in keys]


def _resumed(out, facts, keys, path, form, by):
  """{name: row} of the keys that are there already; makes the folder and its run.json."""
  facts = json.loads(json.dumps(facts))   # tuples are lists in a file
  if not (out / RUN).exists():
    if path.exists():
      raise UserError(f'{path}: there is no {RUN} beside it that says whose answers these are; name another folder')
    out.mkdir(parents=True, exist_ok=True)
    metrics.write_json(out / RUN, facts)
  there = disk.read_json(out / RUN)
  said = lambda values, key: f'{values[key]!r:.100}' if key in values else 'not there'
  differs = [f'{key} was {said(there, key)} and is {said(facts, key)}' for key in sorted({*there, *facts})
             if key not in there or key not in facts or there[key] != facts[key]]
  if differs:
    raise UserError(f'{out / RUN}: the answers there come from another run: {"; ".join(differs)}; name another folder, '
                    'or delete this one')
  if path.exists():
    os.truncate(path, path.read_bytes().rfind(b'\n') + 1)   # less the line that a killed run was writing
  rows = {row[by]: row for row in _read_rows(path, form) if row[by] in keys}   # there may be more
  other = [name for name, row in rows.items() if row['key'] != keys[name]]
  if other:
    raise UserError(f'{path}: {len(other)} items, first {other[0]!r}, were asked with another prompt than '
                    'now; the data or how they are cut have changed, name another folder or delete this one')
  return rows


def read_predictions(folder: str | os.PathLike) -> list[dict]:
  """The rows of a run's predictions, an unfinished last line left out; [] where there are none. Raises ValueError: a line is
  not one of a run, naming file and line."""
  return _read_rows(pathlib.Path(folder) / PREDICTIONS, _ROW)


def _read_rows(path, form):
  rows = []
  for number, line in enumerate(path.read_bytes().split(b'\n')[:-1] if path.exists() else (), start=1):
    try:
      rows.append(disk.parse_json(line, f'{path}:{number}', form))
      if not rows[-1].get('scores', True):
        raise UserError(f'{path}:{number} has no scores')
    except ValueError as error:
      raise UserError(f'{error}; delete the line, and it will be answered again') from error
  return rows


# Summing up.

def summarize(rows: Sequence[Mapping], averages: Averages | None = None) -> dict:
  """Means of a run's rows with their intervals.

  Returns:
    {'n', 'tasks': {task: {'n', 'tokens', 'blocks', measure: {'mean', 'low', 'high'}}}, 'parts': {task: {part: {'n',
    measure: ...}}}, 'averages': {name: {measure: ...}}, 'bootstrap': {...}}; 'tokens' and 'blocks' are means over
    prompts. An average has the measures that all its tasks have.
  """
  tasks, parts = {}, {}
  for row in rows:
    tasks.setdefault(row['task'], []).append(row)
    if 'part' in row:
      parts.setdefault(row['task'], {}).setdefault(row['part'], []).append(row)
  sampled = {task: sampled_means(own, task) for task, own in sorted(tasks.items())}
  if averages is None:
    averages = Averages(macro={'macro': [[task] for task in sampled]})
  averaged = average_over(sampled, {task: len(own) for task, own in tasks.items()}, averages)
  intervals = lambda means: {measure: interval(x) for measure, x in means.items()}
  mean_of = lambda key, own: round(float(np.mean([row[key] for row in own])), 1)
  return {
      'n': len(rows),
      'tasks': {task: {'n': len(tasks[task]), 'tokens': mean_of('tokens', tasks[task]),
                       'blocks': mean_of('blocks', tasks[task])} | intervals(means) for task, means in sampled.items()},
      'parts': {task: {part: {'n': len(own)} | intervals(sampled_means(own, task + part))
                       for part, own in sorted(by_part.items())} for task, by_part in sorted(parts.items())},
      'averages': {name: intervals(means) for name, means in averaged.items()},
      'bootstrap': {'resamples': RESAMPLES, 'level': LEVEL, 'seed': SEED},
  }


def sampled_means(rows: Sequence[Mapping], name: str) -> dict[str, np.ndarray]:
  """Of each measure the mean over the rows, and behind it RESAMPLES means over rows drawn with replacement.

  The draws depend on `name` and the number of rows alone: a task's interval is the same whatever else is there.
  """
  measures = list(rows[0]['scores'])
  values_NM = np.array([[row['scores'][m] for m in measures] for row in rows], np.float64)
  return dict(zip(measures, resampled(values_NM, np.ones_like(values_NM), name), strict=True))


def resampled(sums_NM: np.ndarray, counts_NM: np.ndarray, name: str) -> np.ndarray:
  """[M, 1 + RESAMPLES] of M measures of N items, each a sum over so many: the mean, and means of items drawn with
  replacement. The draws depend on `name` and N alone."""
  rng, count = np.random.default_rng([SEED, zlib.crc32(name.encode())]), len(sums_NM)
  draws = (rng.integers(count, size=count) for _ in range(RESAMPLES))
  return np.stack([means(sums_NM, counts_NM), *(means(sums_NM[at], counts_NM[at]) for at in draws)]).T


def means(sums_NM: np.ndarray, counts_NM: np.ndarray) -> np.ndarray:
  """[M] of measures of N items, each a sum over so many."""
  return sums_NM.sum(axis=0) / np.maximum(counts_NM.sum(axis=0), 1)


def interval(means: np.ndarray) -> dict[str, float]:
  """{'mean', 'low', 'high'} from a mean with its resampled ones behind it."""
  low, high = np.quantile(means[1:], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
  return {'mean': float(means[0]), 'low': float(low), 'high': float(high)}


def average_over(sampled: Mapping[str, Mapping[str, np.ndarray]], counts: Mapping[str, int],
                 averages: Averages) -> dict[str, dict[str, np.ndarray]]:
  """The averages whose tasks are all there: means as of `sampled_means`, for each measure that all their tasks have."""
  found = {}
  for name, groups in {**averages.macro, **{name: [tasks] for name, tasks in averages.pooled.items()}}.items():
    tasks = [task for group in groups for task in group]
    if not tasks or not set(tasks) <= set(sampled):
      continue
    weights = counts if name in averages.pooled else dict.fromkeys(tasks, 1)
    found[name] = {
        measure: np.mean([np.average([sampled[task][measure] for task in group], 0, [weights[task] for task in group])
                          for group in groups], axis=0)
        for measure in sampled[tasks[0]] if all(measure in sampled[task] for task in tasks)}
  return found
