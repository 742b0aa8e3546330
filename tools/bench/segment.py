"""The `segment` command of tools.bench: how well and how fast texts are cut, by the segmenter and by its opponents.

Everybody's granularity is chosen on the validation files, never on the test files, once for the whole corpus and once
for each category; the latter, a granularity that knows the category, is the stronger opponent. It is chosen for the
exact F1 (macro over categories), and once more for Pk. The random one takes the rate of the gold cuts. Cuts are moved to
their nearest candidate before they are measured. See blockattn.segmentation.measures for the measures.

With hints removed, headings' marks, numbering and blank lines are taken out of the texts, and everybody is tuned again.
"""

import collections
import dataclasses
import functools
import math
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from blockattn import disk
from blockattn.errors import UserError
from blockattn.segmentation import granularity, markers, measures, segmenter as segmenter_lib, splitters
from blockattn.segmentation.semanticseg import hints as hints_lib, schema
from tools import arguments, charts
from tools.bench import measuring

SEGMENTER = 'segmenter'
OBJECTIVES = ('f1', 'pk')          # what a granularity is chosen for
SCOPES = ('corpus', 'category')    # what it is chosen on
HEADS = {'f1': 'F1 exact', 'near_f1': 'F1 ±1', 'pk': 'Pk', 'window_diff': 'WindowDiff', 'similarity': 'B'}
LIBRARIES = ('langchain-text-splitters', 'semchunk', 'chonkie', 'nltk', 'numpy', 'jax')


@dataclasses.dataclass(frozen=True)
class Text:
  """A document as it is measured."""
  category: str
  text: str
  cuts: tuple[int, ...]
  candidates: np.ndarray


def load(folders: Sequence[str | pathlib.Path], split: str, limit: int | None, hints: str) -> list[Text]:
  """The texts of a split; of each category at most `limit`, evenly spread over its documents.

  Raises:
    ValueError: no file is of that split.
  """
  paths = [file.path for file in schema.find(folders) if file.split == split]
  if not paths:
    raise UserError(f'{", ".join(map(str, folders))}: no file {split}_*.jsonl or .jsonl.gz here')
  by_category = collections.defaultdict(list)
  for document in schema.read(paths, strict=True):
    by_category[document.category].append(document)
  return [as_text(document, hints) for category in sorted(by_category)
          for document in spread(by_category[category], limit)]


def spread(values: Sequence, limit: int | None) -> list:
  """At most `limit` of the values, evenly spaced, in order."""
  if limit is None or len(values) <= limit:
    return list(values)
  return [values[i * len(values) // limit] for i in range(limit)]


def as_text(document: schema.Document, hints: str) -> Text:
  if hints == 'removed':
    document = dataclasses.replace(document, blocks=tuple(hints_lib.remove_hints(document.blocks, document.category)))
  return Text(document.category, document.text, document.cuts, markers.candidates(document.text))


# The segmenter as one of the ways to cut.

def ways_to_cut(segmenter, scores: Mapping[str, Any], token_starts, remember: bool) -> dict[str, splitters.Baseline]:
  """The baselines, and the segmenter if there is one.

  Args:
    scores: what the segmenter said of each text.
    remember: keep what was computed of the text at hand.
  """
  embedders = {'hashed words': splitters.hashed_words}
  if hasattr(segmenter, 'embed'):
    embedders['backbone'] = segmenter.embed
  if remember:
    embedders = {name: remembered(embed) for name, embed in embedders.items()}
    token_starts = token_starts and functools.lru_cache(maxsize=1)(token_starts)
  ways = splitters.baselines(embedders, token_starts)
  if segmenter is None:
    return ways
  own_cuts = lambda scored, log_odds: granularity.own_cuts(scored.candidates, scored.log_odds, log_odds).tolist()
  cutter = lambda log_odds: lambda text: own_cuts(scores[text], log_odds)
  grid = tuple({'log_odds': float(value)} for value in np.linspace(-6, 6, 49))
  own = splitters.Baseline('cuts whose log-odds reach a threshold, lower in short texts', cutter, grid)
  return {SEGMENTER: own, **ways}


def read_tokenizer(folder: pathlib.Path) -> splitters.TokenStarts:
  tokenizer = disk.read_tokenizer(folder / 'tokenizer.json')
  return lambda text: [start for start, _ in tokenizer.encode(text, add_special_tokens=False).offsets]


def remembered(embed: splitters.Embed) -> splitters.Embed:
  """The same embedding; asked again for the texts of the last call, it does not compute again."""
  last = functools.lru_cache(maxsize=1)(lambda texts: embed(texts))
  return lambda texts: last(tuple(texts))


# Measuring and choosing.

Results = dict[int, dict[str, dict[str, float]]]   # by option, by category: measures.summary


def measure(way: splitters.Baseline, texts: Iterable[Text], wanted: Callable[[str], Iterable[int]]) -> Results:
  """Measures of the options (indices into the way's grid) that are wanted for each category."""
  cutters, found = {}, collections.defaultdict(lambda: collections.defaultdict(list))
  for text in texts:
    for option in wanted(text.category):
      if option not in cutters:
        cutters[option] = way.build(**way.grid[option])
      moved = text.candidates[measures.nearest(cutters[option](text.text), text.candidates)]
      found[option][text.category].append(measures.measure(text.cuts, moved, text.candidates))
  return {option: {category: measures.summary(documents) for category, documents in by_category.items()}
          for option, by_category in found.items()}


def choose(way: splitters.Baseline, results: Results, objective: str) -> dict[str, int]:
  """The best option for each category, and for the corpus under the key ''; of equals the finer."""
  categories = sorted(results[0])
  chosen = {category: best(way, {option: {category: found[category]} for option, found in results.items()}, objective)
            for category in categories}
  return {'': best(way, results, objective), **chosen}


def best(way: splitters.Baseline, results: Results, objective: str) -> int:
  """The option with the highest macro F1, with the lowest macro Pk, or with the gold number of cuts."""
  def badness(option):
    if way.by_count:
      gold, predicted = (sum(found[key] for found in results[option].values()) for key in ('gold', 'predicted'))
      return abs(math.log((predicted + 1) / (gold + 1)))
    value = measures.macro(results[option])[objective]
    return value if objective == 'pk' else -value

  return min(results, key=badness)


def compare(ways: dict[str, splitters.Baseline], validation: list[Text], test: list[Text], log=print) -> list[dict]:
  """Tunes every way on the validation texts and measures it on the test texts.

  Returns:
    A row for each way, objective and scope: {name, objective, scope, options, by_category, macro}. `options` is that of
    the corpus, or {category: options}; a category without validation texts takes the corpus's.
  """
  rows = []
  for name, way in ways.items():
    start = time.perf_counter()
    tuned = measure(way, validation, lambda category: range(len(way.grid)))   # noqa: B023
    chosen = {objective: choose(way, tuned, objective) for objective in OBJECTIVES}
    option = lambda objective, scope, category: (
        chosen[objective]['' if scope == 'corpus' or category not in chosen[objective] else category])   # noqa: B023
    pairs = [(objective, scope) for objective in OBJECTIVES for scope in SCOPES]
    found = measure(way, test, lambda category: {option(*pair, category) for pair in pairs})   # noqa: B023
    for objective, scope in pairs:
      options = {category: option(objective, scope, category) for category in sorted({text.category for text in test})}
      by_category = {category: found[index][category] for category, index in options.items()}
      rows.append({'name': name, 'objective': objective, 'scope': scope, 'by_category': by_category,
                   'macro': measures.macro(by_category),
                   'options': way.grid[chosen[objective]['']] if scope == 'corpus' else
                   {category: way.grid[index] for category, index in options.items()}})
    log(f'{name}: {len(way.grid)} options, {time.perf_counter() - start:.0f} s')
  return rows


def speeds(ways: dict[str, splitters.Baseline], rows: list[dict], segmenter, texts: list[str], args) -> dict:
  """Characters per second of each way on the same texts, from the fastest of a few passes, all taking turns."""
  calls = {}
  for row in rows:
    if (row['objective'], row['scope']) == ('f1', 'corpus'):
      cutter = ways[row['name']].build(**row['options'])
      calls[row['name']] = lambda cutter=cutter: [cutter(text) for text in texts]
  if SEGMENTER in calls:
    calls[SEGMENTER] = lambda: segmenter.score(texts)
    calls[SEGMENTER]()   # compiles
  times = measuring.take_turns(calls, args.samples, args.seconds)
  return {name: sum(map(len, texts)) / min(seconds) for name, seconds in times.items()}


# Reporting.

def table(head: Sequence[str], lines: Iterable[Sequence]) -> str:
  """Numbers between -10 and 10 with three digits."""
  cell = lambda value: f'{value:.3f}' if isinstance(value, float) and abs(value) < 10 else value
  return '\n'.join([measuring.head(*head), *(measuring.row(*map(cell, line)) for line in lines)])


def pick(rows: list[dict], **wanted) -> list[dict]:
  return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def overview(rows: list[dict], speed: dict[str, float]) -> str:
  """Macro measures of every way, tuned for F1; beside them Pk when tuned for Pk."""
  lines = []
  for row in pick(rows, objective='f1'):
    other, = pick(rows, objective='pk', scope=row['scope'], name=row['name'])
    options = ' '.join(f'{key}={value:.3g}' if isinstance(value, float) else f'{key}={value}'
                       for key, value in row['options'].items()) if row['scope'] == 'corpus' else 'by category'
    lines.append([row['name'], row['scope'], *(row['macro'][key] for key in HEADS), other['macro']['pk'],
                  f'{speed[row["name"]]:.3g}', options])
  return table(['who', 'tuned on', *HEADS.values(), 'Pk, tuned for Pk', 'characters/s', 'options'], lines)


def by_category(rows: list[dict], key: str, scope: str) -> str:
  """One measure: a line for each category, a column for each way."""
  chosen = pick(rows, scope=scope, objective='pk' if key == 'pk' else 'f1')
  lines = [[category, *(row['by_category'][category][key] for row in chosen)] for category in chosen[0]['by_category']]
  return table([HEADS[key], *(row['name'] for row in chosen)], [*lines, ['macro', *(row['macro'][key] for row in chosen)]])


def margins(rows: list[dict]) -> str:
  """How far the segmenter (tuned on the corpus) is ahead of the best baseline, and where it is behind."""
  lines = []
  for key, sign in (('f1', 1), ('pk', -1)):
    ours, = pick(rows, name=SEGMENTER, objective=key, scope='corpus')
    for scope in SCOPES:
      others = [row for row in pick(rows, objective=key, scope=scope) if row['name'] != SEGMENTER]
      first = max(others, key=lambda row: sign * row['macro'][key])
      lead = sign * (ours['macro'][key] - first['macro'][key])
      behind = {}
      for category, found in ours['by_category'].items():
        rival = max(others, key=lambda row: sign * row['by_category'][category][key])
        gap = sign * (rival['by_category'][category][key] - found[key])
        if gap > 0:
          behind[category] = f'{category} {100 * gap:.1f} ({rival["name"]})'
      lines.append(f'{HEADS[key]}: {100 * lead:+.1f} points to the best baseline tuned on the {scope} ({first["name"]}); '
                   f'behind the best of a category in: {", ".join(behind.values()) or "none"}')
  return '\n'.join(lines)


def report(hints: str, rows: list[dict], speed: dict[str, float]) -> str:
  parts = [f'## Hints {hints}: macro over categories', overview(rows, speed)]
  if pick(rows, name=SEGMENTER):
    parts.append(margins(rows))
  for scope in SCOPES:
    for key in HEADS:
      parts += [f'### {HEADS[key]} by category, hints {hints}, tuned for {"Pk" if key == "pk" else "F1"} on the {scope}',
                by_category(rows, key, scope)]
  return '\n\n'.join(parts)


def picture(rows_by_hints: dict[str, list[dict]]) -> str:
  """A map of the exact F1 as SVG: ways against categories, one panel for each state of the hints."""
  panels = {}
  for hints, rows in rows_by_hints.items():
    rows = sorted(pick(rows, objective='f1', scope='category'), key=lambda row: -row['macro']['f1'])
    panels[f'Exact boundary F1, hints {hints}, granularity tuned by category'] = {
        row['name']: {category: found['f1'] for category, found in {'macro': row['macro'], **row['by_category']}.items()}
        for row in rows}
  return charts.value_maps(panels, bold=SEGMENTER)


def segment(args) -> None:
  if args.plot and args.plot.suffix != '.svg':
    raise UserError(f'--plot {args.plot}: the picture is drawn as SVG; name it {args.plot.with_suffix(".svg")}')
  segmenter = segmenter_lib.Segmenter.load(args.segmenter) if args.segmenter else None
  token_starts = read_tokenizer(args.tokenizer) if args.tokenizer else None
  facts = measuring.machine(args.cores, libraries=LIBRARIES)
  print(measuring.describe(facts))
  log = lambda text: print(text, file=sys.stderr, flush=True)
  all_rows, all_speeds = {}, {}
  for hints in ('kept', 'removed'):
    validation = load(args.data, 'validation', args.tune_limit, hints)
    test = load(args.data, 'test', args.limit, hints)
    every = list(dict.fromkeys(text.text for text in [*validation, *test]))
    scores = dict(zip(every, segmenter.score(every), strict=True)) if segmenter else {}
    rows = compare(ways_to_cut(segmenter, scores, token_starts, remember=True), validation, test, log)
    timed = [text.text for category in sorted({text.category for text in test})
             for text in spread([text for text in test if text.category == category], args.speed_limit)]
    log(f'speed on {len(timed)} texts')
    speed = speeds(ways_to_cut(segmenter, scores, token_starts, remember=False), rows, segmenter, timed, args)
    all_rows[hints], all_speeds[hints] = rows, speed
    print(f'\n{len(validation)} validation and {len(test)} test texts; speed on {len(timed)} texts of '
          f'{sum(map(len, timed))} characters\n\n{report(hints, rows, speed)}', flush=True)
    measuring.keep(args, facts, characters_per_s=all_speeds, rows=all_rows)
    if args.plot:
      charts.write(args.plot, picture(all_rows))


def add(commands) -> None:
  parser = measuring.add_command(commands, 'segment', 'where and how fast texts are cut, against splitters', segment)
  parser.add_argument('--data', nargs='+', required=True, metavar='FOLDER', help='folders of {split}_{category}.jsonl[.gz]')
  parser.add_argument('--segmenter', metavar='FOLDER', help='a segmenter to compare with')
  parser.add_argument('--tokenizer', type=pathlib.Path, metavar='FOLDER',
                      help='with tokenizer.json, for the fixed length in tokens')
  parser.add_argument('--limit', type=int, metavar='N', help='measured texts of a category (default: all)')
  arguments.add_numbers(parser, tune_limit=(30, 'validation texts of a category'),
                        speed_limit=(2, 'texts of a category that are timed'), samples=(3, 'passes over the timed texts'),
                        seconds=(10.0, 'a way that has run for so long is not timed again'))
  parser.add_argument('--plot', type=pathlib.Path, metavar='FILE.svg', help='a map of F1 by category')
