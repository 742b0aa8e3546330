"""How well a text was cut: measures of one document, of a category of documents, and the mean over categories.

A document's cuts are strictly increasing character offsets, its candidates the offsets where a cut may be made. m
candidates divide a text into m + 1 units; all measures but the exact ones count in units, so that a long sentence
weighs what a short one weighs. A cut that is no candidate is compared by its offset in the exact measures and moves to
the nearest candidate (the earlier of two) for the others; cuts that meet there become one.

  exact          precision, recall and F1 of the offsets
  near           the same where a cut may also match a gold cut one candidate away; one to one, as many pairs as possible
  pk             Beeferman et al. 1999: the share of pairs of units, k apart, of which one segmentation says that they lie
                 in one block and the other that they do not
  window_diff    Pevzner & Hearst 2002: the share of those pairs between which the numbers of cuts differ
  similarity     Fournier 2013, boundary similarity B with n_t = 2: 1 - (misses + near misses / 2) / (misses + near
                 misses + matches), where a near miss is a pair of cuts one candidate apart

k is fixed for a document by its gold cuts: half the mean length of a gold block in units, rounded, at least 2 (but at
most m). A document without a gold cut is one block, so k is half of it; any cut in it counts against its precision and
its windows, and its B is 0 (without any predicted cut: B 1, pk and window_diff 0). A document without candidates has
none of the last three measures.

Precision, recall and F1 of a category are micro (pairs and cuts summed over its documents), the other measures means
over its documents; `macro` is the mean over categories.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from blockattn.errors import UserError

MEASURES = ('precision', 'recall', 'f1', 'near_precision', 'near_recall', 'near_f1', 'pk', 'window_diff', 'similarity')


@dataclasses.dataclass(frozen=True)
class Pairs:
  """Cuts in the gold segmentation, in the predicted one, and pairs of the two that belong together."""
  gold: int = 0
  predicted: int = 0
  matched: int = 0

  def __add__(self, other: 'Pairs') -> 'Pairs':
    return Pairs(self.gold + other.gold, self.predicted + other.predicted, self.matched + other.matched)

  @property
  def precision(self) -> float:
    return self.matched / self.predicted if self.predicted else float(not self.gold)

  @property
  def recall(self) -> float:
    return self.matched / self.gold if self.gold else float(not self.predicted)

  @property
  def f1(self) -> float:
    """2 matched / (gold + predicted); 1 where there is no cut to find and none was made."""
    cuts = self.gold + self.predicted
    return 2 * self.matched / cuts if cuts else 1.0


@dataclasses.dataclass(frozen=True)
class Measured:
  """The measures of one document; the last three are nan for a document without candidates."""
  exact: Pairs
  near: Pairs
  pk: float
  window_diff: float
  similarity: float


def measure(gold: Sequence[int], predicted: Sequence[int], candidates: np.ndarray) -> Measured:
  """Compares predicted cuts with the gold ones.

  Args:
    gold, predicted: offsets, strictly increasing.
    candidates: int64 [m], strictly increasing offsets.

  Raises ValueError: cuts that do not increase strictly."""
  right, said = _offsets('gold', gold), _offsets('predicted', predicted)
  exact = Pairs(len(right), len(said), len(np.intersect1d(right, said, assume_unique=True)))
  count = len(candidates)
  if not count:
    return Measured(exact, exact, math.nan, math.nan, math.nan)
  right, said = nearest(right, candidates), nearest(said, candidates)
  k = window(len(right), count)
  return Measured(exact, Pairs(len(right), len(said), matches(right, said, within=1)),
                  pk(right, said, count, k), window_diff(right, said, count, k), similarity(right, said))


def _offsets(name, cuts) -> np.ndarray:
  cuts = np.asarray(cuts, np.int64)
  if (np.diff(cuts) <= 0).any():
    raise UserError(f'{name} cuts do not increase strictly: {cuts[:-1][np.diff(cuts) <= 0][:3]} is followed by '
                    'the same or a smaller offset; sort them and drop doubles')
  return cuts


def nearest(cuts: Sequence[int] | np.ndarray, candidates: np.ndarray) -> np.ndarray:
  """Indices of the candidates nearest to the cuts: int64, strictly increasing; of two as near the earlier."""
  return np.unique(nearest_to_each(cuts, candidates)) if len(candidates) else np.zeros(0, np.int64)


def nearest_to_each(cuts: Sequence[int] | np.ndarray, candidates: np.ndarray) -> np.ndarray:
  """For each cut the index of the candidate, of one at least, nearest to it, int64; of two as near the earlier."""
  after = np.minimum(np.searchsorted(candidates, cuts), len(candidates) - 1)
  before = np.maximum(after - 1, 0)
  return np.where(np.abs(candidates[before] - cuts) <= np.abs(candidates[after] - cuts), before, after)


def matches(gold: np.ndarray, predicted: np.ndarray, within: int) -> int:
  """Most pairs of a gold and a predicted index that lie at most `within` apart, each index in one pair only.

  From left to right, the two leftmost indices that are left over are paired if they are near enough, else the smaller
  one is given up: on a line with one tolerance for all, no other matching has more pairs.
  """
  i = j = pairs = 0
  while i < len(gold) and j < len(predicted):
    distance = gold[i] - predicted[j]
    pairs += abs(distance) <= within
    i, j = i + (distance <= within), j + (distance >= -within)
  return int(pairs)


def window(gold_cuts: int, candidates: int) -> int:
  """k of pk and window_diff: half the mean gold block in units, rounded, at least 2, at most `candidates`."""
  return min(candidates, max(2, round((candidates + 1) / (gold_cuts + 1) / 2)))


def _between(gold, predicted, count, k):
  """Cuts between units i and i + k of count + 1 for every i, in the gold and in the predicted segmentation; cut i stands in
  front of unit i + 1."""
  made = np.zeros((2, count + 1), np.int64)
  made[0, gold + 1] = made[1, predicted + 1] = 1
  before = np.cumsum(made, axis=1)
  return before[:, k:] - before[:, :-k]


def pk(gold: np.ndarray, predicted: np.ndarray, count: int, k: int) -> float:
  """Pk over the count + 1 - k pairs of units; cuts are indices of candidates. 0 is best."""
  in_gold, in_predicted = _between(gold, predicted, count, k)
  return float(np.mean((in_gold > 0) != (in_predicted > 0)))


def window_diff(gold: np.ndarray, predicted: np.ndarray, count: int, k: int) -> float:
  """WindowDiff over the count + 1 - k pairs of units; cuts are indices of candidates. 0 is best."""
  in_gold, in_predicted = _between(gold, predicted, count, k)
  return float(np.mean(in_gold != in_predicted))


def similarity(gold: np.ndarray, predicted: np.ndarray) -> float:
  """Boundary similarity B (n_t = 2) of two strictly increasing arrays of candidates' indices; 1 is best.

  Equal to segeval.boundary_similarity, which takes time in proportion to the candidates and not to the cuts. Near
  misses are taken from left to right among the cuts that only one segmentation has.
  """
  matched = len(np.intersect1d(gold, predicted, assume_unique=True))
  single = np.setxor1d(gold, predicted, assume_unique=True)
  from_gold = np.isin(single, gold)
  near, i = 0, 0
  while i + 1 < len(single):
    pair = single[i + 1] - single[i] == 1 and from_gold[i] != from_gold[i + 1]
    near, i = near + pair, i + 1 + pair
  missed = len(single) - 2 * near
  edits = missed + near + matched
  return float(1 - (missed + near / 2) / edits) if edits else 1.0


def summary(documents: Iterable[Measured]) -> dict[str, float]:
  """MEASURES of a category, with the number of its documents (one at least), of their gold cuts and predicted ones."""
  documents = list(documents)
  if not documents:
    raise UserError('a category without documents has no measures; leave it out')
  exact, near = sum((d.exact for d in documents), Pairs()), sum((d.near for d in documents), Pairs())
  means = {name: _mean([getattr(d, name) for d in documents]) for name in ('pk', 'window_diff', 'similarity')}
  return {'documents': len(documents), 'gold': exact.gold, 'predicted': exact.predicted,
          'precision': exact.precision, 'recall': exact.recall, 'f1': exact.f1, 'near_precision': near.precision,
          'near_recall': near.recall, 'near_f1': near.f1, **means}


def _mean(values: Sequence[float]) -> float:
  """The mean of the values that are numbers; nan where none is."""
  values = [value for value in values if not math.isnan(value)]
  return math.fsum(values) / len(values) if values else math.nan


def macro(by_category: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
  """MEASURES as means over categories."""
  return {name: _mean([values[name] for values in by_category.values()]) for name in MEASURES}
