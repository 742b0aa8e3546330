"""One self-contained page that shows where texts are cut; written by tools.segment --html.

The text stands in coloured blocks, the probability of a cut at the margin of each line that is a candidate. Sliders
choose a threshold or a target length: the page holds the log-odds and computes the cuts anew, with the steps of
blockattn/segmentation/granularity.py in JavaScript. It fetches nothing, and text is only ever shown as text.
"""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from blockattn import disk
from blockattn.segmentation import forced, granularity
from tools import pages

SMALLEST_TARGET = 32   # tokens; the slider's left end


@dataclasses.dataclass(frozen=True)
class PageText:
  """A text as the page needs it, divided into pieces at all places where it may be cut.

  Attributes:
    id: shown.
    pieces: n + 1 strings, joined the text.
    gains: log-odds of a cut behind piece i < n; below -100 at a place that is no candidate.
    lengths: tokens up to the end of each piece.
    cuts: indices of the places where the command cut.
  """
  id: str
  pieces: list[str]
  gains: list[float]
  lengths: list[int]
  cuts: list[int]


def page_text(name: str, text: str, scored: Any, blocks: Sequence[tuple[int, int]],
              token_ends: forced.TokenEnds, reader: forced.TokenEnds | None = None) -> PageText:
  """What the page needs of a scored text and of the blocks that the command made of it.

  Args:
    token_ends: the segmenter's.
    reader: of the tokenizer in whose tokens lengths are counted; None: the segmenter's.
  """
  tokens = scored.tokens if reader is None else granularity.tokens_of_units(text, scored.candidates, reader)
  total, limit = int(tokens[-1]), granularity.MAX_LOG_ODDS
  places = forced.Places(np.asarray(scored.candidates, np.int64), np.asarray(tokens[:-1], np.int64),
                              np.clip(np.asarray(scored.log_odds, np.float64), -limit, limit))
  smallest = granularity.Granularity(target=SMALLEST_TARGET).bounds(total)
  places = forced.with_forced(text, places, total, smallest[1] - smallest[0], reader or token_ends)
  cuts = np.array([start for start, _ in blocks[1:]], np.int64)
  places += _cut_places(cuts, places, len(text), total)
  edges = [0, *places.offsets.tolist(), len(text)]
  return PageText(name, [text[a:b] for a, b in zip(edges[:-1], edges[1:])],
                  [float(f'{gain:.4f}') for gain in places.gains], [*places.lengths.tolist(), total],
                  np.searchsorted(places.offsets, cuts).tolist())


def _cut_places(cuts, places, length, total):
  """The command's cuts as places; forced ones, that `places` may lack, with about their number of tokens."""
  tokens = np.interp(cuts, [0, *places.offsets, length], [0, *places.lengths, total]).astype(np.int64)
  return forced.Places(cuts, tokens, np.full(len(cuts), -forced.INSIDE_COST))


def write(path: str | os.PathLike, texts: Sequence[PageText], want: granularity.Granularity):
  disk.write_text(path, render(texts, want))


def render(texts: Sequence[PageText], want: granularity.Granularity) -> str:
  limit = granularity.MAX_LOG_ODDS
  data = {'texts': [dataclasses.asdict(text) for text in texts], 'wish': describe(want), 'smallest': SMALLEST_TARGET,
          'logOdds': min(max(want.log_odds, -limit), limit), 'target': want.target or 512, 'weight': want.weight}
  return pages.render('segment_page.html', title=texts[0].id if len(texts) == 1 else f'{len(texts)} texts', data=data,
                      styles=('report.css', 'segment_page.css'), script='segment_page.js')


def describe(want: granularity.Granularity) -> str:
  """The granularity in words."""
  threshold = 0.5 if want.threshold is None else want.threshold
  words = [f'about {want.target:,} tokens'] if want.target else [
      f'threshold {threshold:.3g}{", lower in short texts" if want.adaptive else ""}']
  words += [f'depth {want.depth}'] if want.depth else []
  words += [f'{name} {value:,}' for name, value in (('min', want.minimum), ('max', want.maximum)) if value]
  return ', '.join(words)
