"""Corrects a segmenter for headings: what it says of them is raised or lowered by what they are in the whole text.

  python -m tools.fit_outline FOLDER --data DATA/seg

FOLDER is an exported segmenter; DATA/seg holds {split}_{category}.jsonl[.gz]. A logistic regression on training documents
finds what is added to the log-odds of headings by rank and length of their sections (segmentation/outline.py); then the
threshold is the lowest within --tolerance of the best exact F1, macro over categories, mean of validation documents as they
are and without hints, lower in short texts. Both are written into FOLDER/blockattn.json.
"""

import dataclasses
import pathlib
import sys

import numpy as np

from blockattn import mesh, metrics
from blockattn.hf import files
from blockattn.segmentation import granularity, measures, outline, splitters
from blockattn.segmentation.segmenter import Segmenter
from tools import arguments
from tools.bench import segment as bench

THRESHOLDS = np.arange(-1.5, 1.75, 0.25)


def score(segmenter, texts) -> list[np.ndarray]:
  return [scored.log_odds for scored in segmenter.score([text.text for text in texts])]


def fit(texts, log_odds) -> outline.Shift:
  found = [outline.levels(text.text, text.candidates) for text in texts]
  return outline.fit(found, log_odds, [np.isin(text.candidates, text.cuts) for text in texts])


def f1_by_threshold(texts, log_odds) -> np.ndarray:
  """Exact F1, macro over categories, at every one of THRESHOLDS."""
  known = {text.text: (text.candidates, values) for text, values in zip(texts, log_odds, strict=True)}
  cutter = lambda threshold: lambda text: granularity.own_cuts(*known[text], threshold).tolist()
  way = splitters.Baseline('', cutter, tuple({'threshold': threshold} for threshold in THRESHOLDS.tolist()))
  found = bench.measure(way, texts, lambda category: range(len(THRESHOLDS)))
  return np.array([measures.macro(found[option])['f1'] for option in range(len(THRESHOLDS))])


def lowest_threshold(f1: np.ndarray, tolerance: float) -> float:
  return float(THRESHOLDS[np.flatnonzero(f1 >= f1.max() - tolerance)[0]])


def run(options) -> None:
  meta = files.read_json(options.folder / files.META)
  mesh.use_cpu_cores(8)
  segmenter = Segmenter.load(options.folder, outline=None)
  load = lambda split, limit, hints: bench.load([options.data], split, limit, hints)
  training = load('train', options.limit, 'kept')
  shift = fit(training, score(segmenter, training))
  before, after = [], []
  for texts in (load('validation', None, hints) for hints in ('kept', 'removed')):
    plain = score(segmenter, texts)
    raised = [shift.apply(text.text, text.candidates, values) for text, values in zip(texts, plain, strict=True)]
    before.append(f1_by_threshold(texts, plain))
    after.append(f1_by_threshold(texts, raised))
  threshold = lowest_threshold(np.mean(after, axis=0), options.tolerance)
  print('validation F1, and without hints, by threshold: before, after')
  for row in zip(THRESHOLDS, *before, *after):
    print(f'{row[0]:6.2f}   {row[1]:.4f} {row[2]:.4f}   {row[3]:.4f} {row[4]:.4f}' + ('  <-' if row[0] == threshold else ''))
  meta['segmenter'] |= {'outline': dataclasses.asdict(shift), 'threshold': threshold}
  metrics.write_json(options.folder / files.META, meta)


def main(argv: list[str] | None = None) -> int:
  parser = arguments.Parser(prog='python -m tools.fit_outline', description=__doc__)
  parser.add_argument('folder', type=pathlib.Path, help='an exported segmenter')
  parser.add_argument('--data', type=pathlib.Path, required=True, help='folder of {split}_{category}.jsonl[.gz]')
  arguments.add_numbers(parser, limit=(80, 'training documents of a category'),
                        tolerance=(0.005, 'of the F1 that a low threshold may cost'))
  options = parser.parse_args(argv)
  return arguments.run('fit_outline', lambda: run(options), mendable=(KeyError,))


if __name__ == '__main__':
  sys.exit(main())
