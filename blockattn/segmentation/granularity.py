"""How fine a text is cut: from candidates and the log-odds of a cut there to cuts.

Lengths are counted in tokens or in characters, whatever the caller gives: `lengths[i]` is the length of the text up to
candidate i, `lengths[m]` that of the whole text. Three ways, see `Granularity`:

  threshold  every candidate whose probability reaches it; the one that a model was tuned to is moved in short texts
  depth      then, up to `depth` times, one more cut inside every block that is longer than a limit
  bounds     the best sum of log-odds under hard bounds, with a soft target length, by dynamic programming

Cuts never divide a line end of two characters or a surrogate pair; blocks are the text between neighbouring cuts.
"""

import collections
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from blockattn.errors import UserError, check_number
from blockattn.segmentation import markers
from blockattn.segmentation.forced import SPACE_COST, Places, TokenEnds, forced_places, inside_clusters, offers

MAX_LOG_ODDS = 50.0
SHORT = 100   # candidates of a text whose threshold is half its own
COUNTED = 400   # places of a text whose blocks are all counted, if nothing else keeps the bounds
ROUNDS = 6   # of choosing cuts anew because a block has other tokens than the sum of its units


@dataclasses.dataclass(frozen=True)
class Granularity:
  """What the user wants.

  With `depth`: see `cuts_by_depth`; `maximum` is its limit. Without, and without target and bounds: `threshold` alone.
  Else the chain of blocks with the highest

    sum over cuts of (log p/(1-p) - log threshold/(1-threshold))  -  weight * sum over blocks of |length/target - 1|

  (no second sum without a target) among those whose blocks all have minimum <= length <= maximum, see `cuts_in_bounds`.

  Raises ValueError: a value is out of its range, the bounds and the target are not in order, or `depth` has a target.
  """
  threshold: float | None = None   # from which probability on a cut is wanted for its own sake; None: 0.5, or a model's own
  depth: int = 0   # rounds of cutting again
  target: int | None = None   # wanted length of a block; None: no wish
  minimum: int | None = None   # no block is shorter; None: a quarter of the target, or no bound without one
  maximum: int | None = None   # no block is longer; None: twice the target, or no bound without one
  # What a block pays, in nats, for being nothing or twice as long as the target. 6 lets a better cut (log-odds that are 3
  # above those of its neighbours) move the two blocks beside it by a quarter of the target.
  weight: float = 6.0
  adaptive: bool = False   # the threshold is that of a long text; it is lowered in a short one, see `adapted`

  def __post_init__(self):
    if self.threshold is not None:
      check_number('threshold', self.threshold, 0, 1)
    check_number('depth', self.depth, 0)
    check_number('weight', self.weight, 0)
    if self.depth and self.target is not None:
      raise UserError(f'depth={self.depth} and target={self.target}: choose one of the two')
    named = {name: value for name in ('minimum', 'target', 'maximum') if (value := getattr(self, name)) is not None}
    for name, value in named.items():
      check_number(name, value, 1)
    if [*named.values()] != sorted(named.values()):
      raise UserError(', '.join(f'{name}={value}' for name, value in named.items())
                      + ': needed are minimum <= target <= maximum')

  @property
  def log_odds(self) -> float:
    """Of the threshold."""
    return 0.0 if self.threshold is None else logit(self.threshold)

  def gains(self, log_odds: np.ndarray) -> np.ndarray:
    """What cuts of these log-odds add to the sum, float64, none without end."""
    clip = lambda odds: np.clip(odds, -MAX_LOG_ODDS, MAX_LOG_ODDS)
    return clip(log_odds.astype(np.float64)) - clip(self.log_odds)

  def pull(self, otherwise: int) -> tuple[int, float]:
    """The target with its weight; without a target another length that has none."""
    return (self.target, self.weight) if self.target else (otherwise, 0.0)

  @property
  def bounded(self) -> bool:
    return self.depth == 0 and (self.target, self.minimum, self.maximum) != (None, None, None)

  def bounds(self, total: int) -> tuple[int, int]:
    """(minimum, maximum) that a text of this length can keep.

    Blocks of these bounds can make up the text if k * minimum <= total <= k * maximum for some number k of blocks. If
    there is none, the maximum stands and the minimum is lowered as far as it must: to total // ceil(total / maximum).
    """
    quarter = max(1, (self.target or 0) // 4)
    minimum = self.minimum or min(quarter, self.maximum or quarter)
    maximum = self.maximum or max(2 * self.target if self.target else total, minimum, 1)
    blocks = math.ceil(total / maximum)
    return (minimum if blocks * minimum <= total else total // blocks), maximum


def wanted(**wishes: Any) -> Granularity:
  """The granularity with these attributes; those that are None keep their defaults."""
  return Granularity(**{name: value for name, value in wishes.items() if value is not None})


def for_model(granularity: Granularity, model: Any) -> Granularity:
  """With the model's own threshold, `model.options.threshold` in log-odds, adapted to each text, if none is asked for."""
  if granularity.threshold is not None:
    return granularity
  return dataclasses.replace(granularity, threshold=probability(model.options.threshold), adaptive=True)


def adapted(granularity: Granularity, log_odds: np.ndarray) -> Granularity:
  """The granularity for one text: an adaptive threshold is lowered towards the one that this text's own probabilities say
  has the best F1, by SHORT / (SHORT + candidates) of the way.

  One threshold for all texts is too high for those where nothing is sure: where every cut has a probability of 0.3, the most
  is found by cutting at all of them. The best expected F1, which is at twice the best threshold (Lipton, Elkan and
  Naryanaswamy 2014), is known from the probabilities as far as these can be trusted; over the many unlikely candidates of a
  long text they add up to more than is there. Bounds have no use for it: they say how many cuts there are.
  """
  if not granularity.adaptive or granularity.bounded or not len(log_odds):
    return dataclasses.replace(granularity, adaptive=False)
  p = np.sort(1 / (1 + np.exp(-np.clip(log_odds, -MAX_LOG_ODDS, MAX_LOG_ODDS))))[::-1]
  f1 = 2 * np.cumsum(p) / (np.arange(1, len(p) + 1) + p.sum())
  best = min(logit(float(f1.max()) / 2), granularity.log_odds)
  share = SHORT / (SHORT + len(p))
  moved = granularity.log_odds + share * (best - granularity.log_odds)
  return dataclasses.replace(granularity, threshold=probability(moved), adaptive=False)


def own_cuts(candidates: np.ndarray, log_odds: np.ndarray, threshold: float) -> np.ndarray:
  """Those of a text's candidates that a model cuts at whose own threshold, in log-odds, is this one: see `for_model`."""
  own = adapted(Granularity(threshold=probability(threshold), adaptive=True), log_odds)
  return candidates[log_odds >= own.log_odds]


def blocks_of(text: str, scored: Any, granularity: Granularity, token_ends: TokenEnds,
              reader: TokenEnds | None = None) -> list[tuple[int, int]]:
  """The (start, stop) of the blocks between the `cuts_of` a text."""
  return to_blocks(cuts_of(text, scored, granularity, token_ends, reader), len(text))


def cuts_of(text: str, scored: Any, granularity: Granularity, token_ends: TokenEnds,
            reader: TokenEnds | None = None) -> np.ndarray:
  """The cuts of a text.

  Args:
    scored: what a segmenter says of it: `candidates` int64 [m], `log_odds` [m], `tokens` int64 [m + 1].
    granularity: lengths are in tokens.
    token_ends: the segmenter's.
    reader: of the tokenizer in whose tokens lengths are counted; None: the segmenter's.
  """
  inside = inside_clusters(text)   # such as a mark behind a blank
  kept = ~np.isin(scored.candidates, inside)
  candidates, log_odds = scored.candidates[kept], scored.log_odds[kept]
  tokens = scored.tokens[np.append(kept, True)]
  if reader is not None and (granularity.bounded or granularity.depth):
    tokens = tokens_of_units(text, candidates, reader)
  return cuts_in_tokens(text, candidates, log_odds, tokens, granularity, reader or token_ends)


def tokens_of_units(text: str, candidates: np.ndarray, token_ends: TokenEnds) -> np.ndarray:
  """The tokens up to each candidate, and in all, each unit encoded alone: int64 [m + 1]."""
  return np.cumsum(_counts(token_ends, markers.split(text, candidates) if text else []) or [0], dtype=np.int64)


def _counts(token_ends, pieces) -> list[int]:
  """Tokens of each piece of text alone."""
  return [len(ends) for ends in token_ends(pieces)] if pieces else []


def choose_cuts(text: str, candidates: np.ndarray, log_odds: np.ndarray, lengths: np.ndarray, granularity: Granularity,
                token_ends: TokenEnds | None = None) -> np.ndarray:
  """The cuts of a text at the wanted granularity.

  Args:
    candidates: int64 [m], strictly increasing offsets, 0 < c < len(text).
    log_odds: float [m], log p/(1-p) of a cut there; infinities are allowed.
    lengths: int64 [m + 1], length of the text up to each candidate and of all of it.
    token_ends: needed for bounds if lengths are not characters: the tokens of a piece of text.

  Returns:
    int64 offsets of the cuts, strictly increasing. Candidates all of them, unless bounds asked for others.

  Raises ValueError: the arrays do not fit each other or the text."""
  candidates, log_odds, lengths = np.asarray(candidates, np.int64), np.asarray(log_odds), np.asarray(lengths, np.int64)
  _check(text, candidates, log_odds, lengths)
  if granularity.bounded:
    return cuts_in_bounds(text, candidates, log_odds, lengths, granularity, token_ends)
  granularity = adapted(granularity, log_odds)
  wanted = log_odds >= granularity.log_odds
  if granularity.depth:
    wanted = cuts_by_depth(wanted, log_odds, lengths, depth=granularity.depth, limit=granularity.maximum or 0,
                           minimum=granularity.minimum or 0)
  return candidates[wanted]


def cuts_in_tokens(text: str, candidates: np.ndarray, log_odds: np.ndarray, tokens: np.ndarray, granularity: Granularity,
                   token_ends: TokenEnds) -> np.ndarray:
  """`choose_cuts` with bounds that hold for the tokens of every block when it is tokenised alone.

  A tokenizer makes of a block some tokens more or less than the sum of those of its units. Where that breaks a bound, the
  bound is drawn tighter by as much, doubled in each round, and the cuts are chosen anew, at most ROUNDS times. If that does
  not help either, every block that there could be is counted, in texts of up to COUNTED places. Where there is no way to
  keep both bounds, the maximum goes before the minimum: what is too long is divided in the middle until it is not. Raises
  ValueError: a single character, with its marks, has more tokens than the maximum."""
  cuts = choose_cuts(text, candidates, log_odds, tokens, granularity, token_ends)
  if not granularity.bounded or not text:
    return cuts
  minimum, maximum = low, high = granularity.bounds(int(tokens[-1]))
  found = []   # (tokens over the maximum, tokens under the minimum, round, cuts)
  for step in range(ROUNDS):
    counts = _counts(token_ends, markers.split(text, cuts))
    over = max(max(counts) - maximum, 0)
    under = max(minimum - min(counts), 0) if len(cuts) else 0
    found.append((over, under, step, cuts))
    if not over and not under:
      break
    high = max(high - (over << step), 1)
    low = min(low + (under << step), high)
    target = granularity.target and min(max(granularity.target, low), high)
    tighter = dataclasses.replace(granularity, minimum=low, maximum=high, target=target)
    cuts = choose_cuts(text, candidates, log_odds, tokens, tighter, token_ends)
  best = min(found, key=lambda entry: entry[:3])
  wished = granularity.bounds(0)[0]   # which the sum of the units may only seem to rule out
  for least in dict.fromkeys([wished, minimum] if best[0] or best[1] else [wished] if wished > minimum else []):
    exact = _counted_chain(text, candidates, log_odds, granularity, least, maximum, token_ends)
    if exact is not None:
      return exact
  return best[-1] if not best[0] else _torn(text, best[-1], maximum, token_ends)


def _counted_chain(text, candidates, log_odds, granularity, minimum, maximum, token_ends):
  """The best cuts of which every block, counted alone, keeps the bounds; None if there are none, or too many places."""
  offsets, gains = forced_places(text)
  if len(offsets) > COUNTED:
    return None
  places = Places(candidates, candidates, granularity.gains(log_odds)) + Places(offsets, offsets, gains)
  at, gains = [0, *places.offsets.tolist(), len(text)], [0.0, *places.gains.tolist(), 0.0]
  upto = np.searchsorted(token_ends([text])[0], at, side='right')   # about; the blocks are counted below
  target, weight = granularity.pull(1)
  value, parent = [0.0] + [-math.inf] * (len(at) - 1), [0] * len(at)
  for j in range(1, len(at)):
    near = [i for i in range(int(np.searchsorted(upto, upto[j] - 2 * maximum - 8)), j) if value[i] > -math.inf]
    for i, count in zip(near, _counts(token_ends, [text[at[i]:at[j]] for i in near]), strict=True):
      reached = value[i] + gains[j] - weight * abs(count / target - 1)
      if minimum <= count <= maximum and reached > value[j]:
        value[j], parent[j] = reached, i
  if value[-1] == -math.inf:
    return None
  return np.array([at[i + 1] for i in _walk_back(parent, len(at) - 1)], np.int64)


def _torn(text, cuts, maximum, token_ends) -> np.ndarray:
  """The cuts, and more in every block of over `maximum` tokens, each where it divides a block best."""
  offsets, gains = forced_places(text)
  todo, starts = to_blocks(cuts, len(text))[::-1], []
  while todo:
    a, b = todo.pop()
    [count] = _counts(token_ends, [text[a:b]])
    if count <= maximum:
      starts.append(a)
      continue
    first, stop = np.searchsorted(offsets, a, side='right'), np.searchsorted(offsets, b)
    if first == stop:
      raise UserError(f'blocks of at most {maximum} tokens cannot hold {text[a:b]!r}, which has {count}: ask for a maximum '
                      f'of at least {count}')
    middle = (a + b) / 2
    inside = offsets[first:stop]
    near = inside[(np.abs(inside - middle) <= (b - a) / 6) & (gains[first:stop] >= -SPACE_COST)]
    among = near if len(near) else inside
    cut = int(among[np.argmin(np.abs(among - middle))])
    todo += [(cut, b), (a, cut)]
  return np.array(starts[1:], np.int64)


def _check(text, candidates, log_odds, lengths):
  m = len(candidates)
  if (candidates.shape, log_odds.shape, lengths.shape) != ((m,), (m,), (m + 1,)):
    raise UserError(f'candidates {candidates.shape}, log_odds {log_odds.shape}, lengths {lengths.shape}: expected '
                    '[m], [m] and [m + 1]')
  steps = np.diff(candidates, prepend=0, append=len(text))
  if m and steps.min() < 1:
    raise UserError(f'candidates must be strictly increasing and inside the text of {len(text)} characters; '
                    f'see number {int(np.argmin(steps))}')
  if np.isnan(log_odds).any():
    raise UserError(f'log_odds: number {int(np.argmax(np.isnan(log_odds)))} is not a number')
  if np.diff(lengths, prepend=0).min() < 0:
    raise UserError('lengths must not decrease: they count the text up to each candidate, then all of it')


def to_blocks(cuts: Sequence[int] | np.ndarray, length: int) -> list[tuple[int, int]]:
  """(start, stop) of each block of a text of this length; none if it is empty."""
  edges = [0, *map(int, cuts), length]
  return list(zip(edges[:-1], edges[1:])) if length else []


def logit(p: float) -> float:
  """log p/(1-p); infinite at 0 and 1."""
  return math.log(p) - math.log1p(-p) if 0 < p < 1 else math.copysign(math.inf, p - 0.5)


def probability(log_odds: float) -> float:
  """Of which these are the log-odds: the inverse of `logit`."""
  return 1 / (1 + math.exp(-log_odds))


def cuts_by_depth(wanted: np.ndarray, log_odds: np.ndarray, lengths: np.ndarray, *, depth: int, limit: int,
                  minimum: int) -> np.ndarray:
  """The cuts `wanted`, bool [m], and more inside long blocks, in up to `depth` rounds.

  In each round every block longer than `limit` gets one more cut: at the candidate inside it with the highest log-odds,
  of equal ones the one nearest to the block's middle, provided that both parts are at least `minimum` long. A block
  without such a candidate stays. After all rounds a block may still be longer than `limit`. Every round keeps the cuts
  before it, so depths are nested, and a block has at most 2^depth parts.
  """
  wanted = wanted.copy()
  for _ in range(depth):
    edges = np.concatenate([[-1], np.flatnonzero(wanted), [len(wanted)]])   # candidate -1 is the start, m the end
    at = np.concatenate([[0], lengths[edges[1:]]])
    long = np.flatnonzero((np.diff(at) > limit) & (np.diff(edges) > 1))
    for b in long:
      inside = np.arange(edges[b] + 1, edges[b + 1])
      inside = inside[(lengths[inside] - at[b] >= minimum) & (at[b + 1] - lengths[inside] >= minimum)]
      best = inside[log_odds[inside] == log_odds[inside].max(initial=-np.inf)]
      if len(best):
        wanted[best[np.argmin(np.abs(2 * lengths[best] - at[b] - at[b + 1]))]] = True
  return wanted


# Hard bounds.

def cuts_in_bounds(text: str, candidates: np.ndarray, log_odds: np.ndarray, lengths: np.ndarray,
                   granularity: Granularity, token_ends: TokenEnds | None = None) -> np.ndarray:
  """The best cuts such that every block keeps the bounds, see `Granularity` for what is best.

  The bounds are kept whatever the text is. If candidates alone cannot keep them, further places are offered, first
  white space in the gaps between candidates that are too wide, then characters in what is still too wide, then all of
  the text; a cut there costs so much that there are no more of them than needed. Exceptions, which no cuts could avoid:

    - a text that is shorter than the minimum is one block; and where no number of blocks of these bounds gives the
      text's length, the minimum is lowered to the highest that does (see `Granularity.bounds`);
    - the minimum goes before the maximum does where a line end or a surrogate pair stands in the way of both;
    - a character of more tokens than the maximum is a block of its own.

  Arguments, result: see `choose_cuts`. Linear in the number of places offered: a second for a text of 10 MB.
  """
  total = int(lengths[-1])
  if not total or len(text) < 2:
    return np.zeros(0, np.int64)
  offered = Places(candidates, lengths[:-1], granularity.gains(log_odds))
  for places, minimum, maximum in offers(text, offered, total, granularity.bounds(total), token_ends):
    target, weight = granularity.pull(maximum)
    chain = best_chain([*places.lengths.tolist(), total], places.gains.tolist(), target=min(target, maximum),
                       minimum=minimum, maximum=maximum, weight=weight)
    if chain is not None:
      return places.offsets[chain]
  raise AssertionError('the last offer, every place and no minimum, always has a chain')


def best_chain(lengths: Sequence[int], gains: Sequence[float], *, target: int, minimum: int, maximum: int,
               weight: float) -> list[int] | None:
  """The chain of cuts with the highest sum of gains less weight * sum over blocks of |length/target - 1|.

  With L the lengths (0 at the start), the best value of a chain that ends with a cut at place j is
    V[j] = gain[j] + max over i with minimum <= L[j] - L[i] <= maximum of V[i] - weight * |(L[j] - L[i])/target - 1|.
  Short of the target the penalty falls with L[i], beyond it it rises: so the maximum is that of V[i] - s L[i] over one
  sliding window and of V[i] + s L[i] over another, s = weight/target, and two queues of falling keys give both in
  constant time a place. tools/segment_page.js has the same steps in the same order.

  Args:
    lengths: [n + 1], not decreasing: up to each place, then of all.
    gains: [n].
    target: between minimum and maximum.

  Returns:
    Indices of the chosen places, or None if no chain keeps the bounds.
  """
  at, slope, end = [0, *lengths], weight / target, len(gains) + 1
  value, parent = [0.0] + [-math.inf] * end, [0] * (end + 1)
  near, far = collections.deque(), collections.deque()   # (key, place): blocks up to the target, and longer ones
  entered = moved = 0   # places before `entered` have been in `near`, those before `moved` have gone on to `far`
  for j in range(1, end + 1):
    here = at[j]
    while entered < j and at[entered] <= here - minimum:
      _push(near, value[entered] - slope * at[entered], entered)
      entered += 1
    while moved < entered and at[moved] < here - target:
      _push(far, value[moved] + slope * at[moved], moved)
      moved += 1
    while near and near[0][1] < moved:
      near.popleft()
    while far and at[far[0][1]] < here - maximum:
      far.popleft()
    short = near[0][0] + slope * (here - target) if near else -math.inf
    long = far[0][0] - slope * (here - target) if far else -math.inf
    if max(short, long) > -math.inf:
      i = (near if short >= long else far)[0][1]
      parent[j] = i
      value[j] = value[i] - slope * abs(here - at[i] - target) + (gains[j - 1] if j < end else 0.0)
  return _walk_back(parent, end) if value[end] > -math.inf else None


def _push(queue, key, place):
  """Appends a place to a queue of falling keys: it makes those before it with a lower key useless."""
  if key > -math.inf:
    while queue and queue[-1][0] <= key:
      queue.pop()
    queue.append((key, place))


def _walk_back(parent, end):
  chain, j = [], parent[end]
  while j:
    chain.append(j - 1)
    j = parent[j]
  return chain[::-1]
