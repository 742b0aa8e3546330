"""The headings of a text: where its outline says that a person would cut.

At which level a person cuts depends on the whole text: on the highest levels that it has, and on how long the sections of
each are. A segmenter that reads windows sees neither, so what it says of headings is corrected by what they are in the text
(`levels`, `Shift`).
"""

import dataclasses
import re
from collections.abc import Sequence

import markdown_it
import numpy as np

from blockattn.errors import UserError
from blockattn.segmentation.semanticseg import structure_text

# Characters of a section, and of one that is joined to the next: what builders of documents from structure go by, too.
AVERAGE, SHORT = structure_text.DEFAULT.average, structure_text.DEFAULT.shortest

_RANKS = 7      # of a level, 0 for no heading
_RIDGE = 0.1    # of the penalty in `fit`, _RIDGE / 2 times the sum of squares
_STEPS = 25     # of a length: 0 for none, then half powers of two from 2 ** 5 characters on

_HEADING = r'''(?mx)^(?:
    (?P<marks>\#{1,6}|={2,6})[ \t]+\S.*                                             # Markdown, wiki
  | [^\S\n]*\\(?P<latex>part|chapter|(?:ol)?(?:sub)*section)\*?[\[{].*
  | (?=\S).{1,120}\r?\n(?P<mark>[=\-~^"'*+\#`])(?P=mark){2,}[ \t]*\r?$            # setext, reStructuredText
  | (?P<number>\d{1,2}(?:\.\d{1,2})*)\.?[ \t]+[A-Z][^.!?\n]{0,80}$
  | (?P<word>(?i:part|book|chapter|act|item|article|appendix|scene|section|note|§))[ \t]*(?:\d|[IVXLC]+\b).{0,150}$
)'''
_WORDS = {'part': 1, 'book': 1}   # the others are one level below


def heading_lines(text: str) -> list[tuple[int, int]]:
  """(offset, level) of every line that looks like a heading, outside of fenced code; level 1 is highest."""
  fences = _fences(text)
  opens, underlines, found = [start for start, _ in fences], [], []
  for match in re.finditer(_HEADING, text):
    fence = np.searchsorted(opens, match.start(), 'right') - 1
    if fence < 0 or match.start() >= fences[fence][1]:
      found.append((match.start(), _level(match, underlines)))
  return found


def _fences(text: str) -> list[tuple[int, int]]:
  """(start, stop) of fenced code, as CommonMark has it: a longer fence ends it, one with a word does not."""
  if '```' not in text and '~~~' not in text:
    return []
  lines = [*structure_text.line_starts(text), len(text)]
  tokens = markdown_it.MarkdownIt('commonmark').disable('inline').parse(text)
  return [(lines[token.map[0]], lines[min(token.map[1], len(lines) - 1)])
          for token in tokens if token.type == 'fence' and token.map]


def _level(match: re.Match, underlines: list[str]) -> int:
  """Underlines rank in the order in which a document uses them."""
  said = match.groupdict()
  if mark := said['mark']:
    underlines += [mark] if mark not in underlines else []
    return underlines.index(mark) + 1
  if latex := said['latex']:
    return 1 if latex in ('part', 'chapter') else 2 + latex.count('sub')
  if number := said['number']:
    return number.count('.') + 1
  return len(said['marks']) if said['marks'] else _WORDS.get(said['word'].lower(), 2)


def cuts(lines: Sequence[tuple[int, int]], length: int, average: int = AVERAGE, least: int = SHORT) -> list[int]:
  """Cuts of a text at its headings: of the deepest level whose sections average `average` characters, else of the highest.

  Args:
    lines: `heading_lines` of the text.
    length: of the text.
    least: a section of fewer characters, such as a lone heading, is joined to the next one.
  """
  chosen = []
  for level in sorted({level for _, level in lines}):
    kept, start = [], 0
    for offset in sorted({offset for offset, depth in lines if depth <= level} - {0, length}):
      if offset - start >= least:
        kept.append(offset)
        start = offset
    if chosen and length / (len(kept) + 1) < average:
      break
    chosen = kept
  return chosen


@dataclasses.dataclass(frozen=True)
class Levels:
  """What the outline says of the headings among some places of a text, int arrays [n], n the headings.

  Sections of fewer than SHORT characters do not count as sections. Lengths are 1 plus the number of half powers of two above
  32 characters.
  """
  place: np.ndarray   # which place
  rank: np.ndarray   # of its level among those of the text: 2 is the highest that cuts, 1 those above, such as a title's
  average: np.ndarray   # length of the sections that headings of its level and above make
  since: np.ndarray   # length of the text since the last of these, or the beginning
  until: np.ndarray   # and up to the next one, or the end
  chosen: np.ndarray   # whether `cuts` cuts there


def levels(text: str, places: np.ndarray) -> Levels:
  """The headings that begin at some of the places, ascending offsets in the text."""
  lines, length, rank = heading_lines(text), len(text), 1
  offsets, depths = np.array(lines, np.int64).reshape(-1, 2).T
  columns = []
  for depth in np.unique(depths):
    inside = depths <= depth
    gaps = np.diff(offsets[inside], prepend=0, append=length)
    sections = np.count_nonzero(gaps >= SHORT)
    rank += rank > 1 or sections > 1
    here = np.flatnonzero(depths[inside] == depth)
    of_level = (min(rank, _RANKS - 1), _steps(length / max(1, sections)))
    columns.append([offsets[inside][here], *(np.full(len(here), x) for x in of_level), _steps(gaps[here]),
                    _steps(gaps[here + 1])])
  at, *found = np.concatenate(columns, axis=1) if columns else np.zeros((5, 0), np.int64)
  order = np.argsort(at)
  order = order[np.isin(at[order], places)]   # a heading may begin where there is no candidate
  rank, average, since, until = (column[order] for column in found)
  return Levels(np.searchsorted(places, at[order]), rank, average, since, until,
                np.isin(at[order], cuts(lines, length)).astype(np.int64))


def _steps(length):
  return 1 + np.clip(2 * (np.log2(np.maximum(length, 1)) - 5), 0, _STEPS - 2).astype(np.int64)


@dataclasses.dataclass(frozen=True)
class Shift:
  """By how much log-odds of headings are raised: a sum over what `Levels` says, as JSON holds it. Raises ValueError: a list
  has not as many numbers as there are ranks, steps and answers."""
  average: Sequence[Sequence[float]]   # by rank, then by step of the average length
  chosen: Sequence[Sequence[float]]   # by rank, then by whether it is
  since: Sequence[float]   # by step
  until: Sequence[float]

  def __post_init__(self):
    for name, shape in _SHAPES.items():
      if np.shape(getattr(self, name)) != shape:
        raise UserError(f'outline: {name} must be numbers of shape {shape}, not {np.shape(getattr(self, name))}')

  def apply(self, text: str, places: np.ndarray, log_odds: np.ndarray) -> np.ndarray:
    """The log-odds of places in a text, float32 [n], with those of headings raised."""
    found = levels(text, places)
    table = lambda name: np.asarray(getattr(self, name), np.float32)
    raised = log_odds.copy()
    raised[found.place] += (table('average')[found.rank, found.average] + table('chosen')[found.rank, found.chosen]
                            + table('since')[found.since] + table('until')[found.until])
    return raised


_SHAPES = {'average': (_RANKS, _STEPS), 'chosen': (_RANKS, 2), 'since': (_STEPS,), 'until': (_STEPS,)}


def fit(found: Sequence[Levels], log_odds: Sequence[np.ndarray], cut: Sequence[np.ndarray]) -> Shift:
  """The Shift under which log-odds say best which headings are cuts: logistic regression with a penalty, by Newton's method.

  Args:
    found, log_odds, cut: of each text the Levels, and of all its places the log-odds and whether there is a cut.

  Raises ValueError: there are no headings."""
  rows = np.concatenate([_indices(f) for f in found])
  if not len(rows):
    raise UserError('no headings in these texts; give texts that have some')
  start = np.concatenate([odds[f.place] for f, odds in zip(found, log_odds, strict=True)]).astype(np.float64)
  label = np.concatenate([c[f.place] for f, c in zip(found, cut, strict=True)]).astype(np.float64)
  used, columns = np.unique(rows, return_inverse=True)   # a number that no heading asks for stays 0
  design = np.zeros((len(rows), len(used)))
  design[np.arange(len(rows))[:, None], columns.reshape(rows.shape)] = 1
  weights = np.zeros(len(used))
  for _ in range(50):
    p = 1 / (1 + np.exp(-(start + design @ weights)))
    slope = design.T @ (p - label) + _RIDGE * weights
    curve = (design.T * (p * (1 - p))) @ design + _RIDGE * np.eye(len(used))
    step = np.linalg.solve(curve, slope)
    weights -= step
    if np.abs(step).max() < 1e-6:
      break
  ends = np.cumsum([np.prod(shape) for shape in _SHAPES.values()])
  flat = np.zeros(ends[-1])
  flat[used] = weights.round(3)
  parts = np.split(flat, ends[:-1])
  return Shift(**{name: part.reshape(shape).tolist() for (name, shape), part in zip(_SHAPES.items(), parts, strict=True)})


def _indices(found: Levels) -> np.ndarray:
  """Which numbers of a Shift, as one flat list, are added up for each heading: [n, 4]."""
  first = np.cumsum([0, *(np.prod(shape) for shape in _SHAPES.values())])
  own = (found.rank * _STEPS + found.average, found.rank * 2 + found.chosen, found.since, found.until)
  return np.stack([start + index for start, index in zip(first, own)], axis=1)
