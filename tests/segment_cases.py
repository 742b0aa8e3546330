"""A segmenter without a model, for tests of what stands around one: blank lines are likely cuts, sentences are not."""

import dataclasses
import types

import numpy as np

from blockattn.data import markers


@dataclasses.dataclass(frozen=True)
class Scored:
  candidates: np.ndarray   # int64 [m]
  log_odds: np.ndarray     # float32 [m]
  tokens: np.ndarray       # int64 [m + 1]


class StandIn:
  """Has what `blockattn.segment` asks of a model; `batches` records the number of texts of each call."""

  def __init__(self, threshold=0.0):
    self.batches = []
    self.options = types.SimpleNamespace(threshold=threshold)

  def score(self, texts, progress=None):
    self.batches.append(len(texts))
    done, scored = 0, []
    for text in texts:
      scored.append(score_text(text))
      done += len(text)
      if progress:
        progress(done)
    return scored

  def token_ends(self, texts):
    return words_as_tokens(texts)


def score_text(text):
  candidates = markers.candidates(text)
  odds = [4.0 if text[:c].endswith(('\n\n', '\r\n\r\n')) else -2.0 if text[c - 1] in '\r\n' else -5.0 for c in candidates]
  jitter = (np.arange(len(candidates)) * 7919 % 101) / 50 - 1
  edges = [0, *candidates.tolist(), len(text)]
  counts = [len(ends) for ends in words_as_tokens(text[a:b] for a, b in zip(edges[:-1], edges[1:]))]
  return Scored(candidates, (np.array(odds) + jitter).astype(np.float32), np.cumsum(counts).astype(np.int64))


def words_as_tokens(pieces):
  """The ends of tokens of up to three characters, of which only the first may be a blank."""
  ends = []
  for piece in pieces:
    found, start = [], 0
    for i in range(1, len(piece) + 1):
      if i == len(piece) or i - start == 3 or piece[i] == ' ':
        found.append(i)
        start = i
    ends.append(np.array(found, np.int64))
  return ends
