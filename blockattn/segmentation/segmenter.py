"""A segmenter at work: for every candidate of a text the log-odds that it is a cut.

A text of any length is read in windows that overlap, so that each decision has text in front of it: window n + 1 begins
with the last units of window n and decides on what lies behind them. Short texts share a row, as packed documents that
do not see each other. Rows are computed in batches of few shapes, so few programs are compiled, and divided over all
devices.
"""

import dataclasses
import functools
import itertools
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from blockattn import blocks, disk, errors, mesh as mesh_lib
from blockattn.data import encode, packing
from blockattn.errors import UserError
from blockattn.hf import config as hf_config, convert, files
from blockattn.models import classifier
from blockattn.models.transformer import Compute
from blockattn.segmentation import markers, model
from blockattn.segmentation.outline import Shift

EMBEDDED = pathlib.Path(__file__).resolve().parents[1] / 'assets' / 'tiny_segmenter'
SHORTEST_ROW = 128        # tokens; rows are as long as this times a power of two, or as a window
_CHARACTERS = 2_000_000   # of texts that are tokenized at a time

# What blockattn.json must and may say of a segmenter.
_NEEDED = {'markers': str, 'length': int}
_MAY = {**dict.fromkeys(('head', 'tail', 'inner', 'middle', 'ahead'), int), 'separators': str, 'cohesion': bool,
        'overlap': disk.NUMBER, 'threshold': disk.NUMBER,
        'outline': {'average': [[disk.NUMBER]], 'chosen': [[disk.NUMBER]], 'since': [disk.NUMBER], 'until': [disk.NUMBER]}}


@dataclasses.dataclass(frozen=True)
class Scored:
  """What is known of one text.

  Attributes:
    candidates: int64 [m], character offsets, strictly increasing, 0 < c < len(text).
    log_odds: float32 [m], log p(cut) / (1 - p(cut)) at each.
    tokens: int64 [m + 1], the text's tokens up to each candidate, and in all.
  """
  candidates: np.ndarray
  log_odds: np.ndarray
  tokens: np.ndarray


@dataclasses.dataclass(frozen=True)
class Window:
  """Units first ... stop - 1 of text `text`, read together, to decide on the candidates in front of new ... decided - 1."""
  text: int
  first: int
  new: int
  decided: int
  stop: int


@dataclasses.dataclass(frozen=True)
class Options:
  """
  Attributes:
    read: `markers.ReadOptions`, as the model was trained.
    length: tokens of a window.
    overlap: share of a window that stands in the one before.
    threshold: log-odds above which a candidate is a cut, if nothing else is asked for.
    outline: what is added to the log-odds of headings, by what they are in the whole text.
  """
  read: markers.ReadOptions
  length: int
  overlap: float = 0.25
  threshold: float = 0.0
  outline: Shift | None = None

  def __post_init__(self):
    if not 0 <= self.overlap <= 0.75:
      raise UserError(f'overlap={self.overlap}; give a share of the window from 0 to 0.75')
    if math.isnan(self.threshold):
      raise UserError('threshold=nan: log-odds are needed; give a number')
    if self.length < 2 * self.read.longest + 4 * self.read.ahead:
      raise UserError(f'length={self.length}: a window must have room for two units of {self.read.longest} tokens; make '
                      'windows longer, or units shorter (head, tail)')


def options_of(folder: pathlib.Path, **overrides) -> Options:
  """The options that blockattn.json of a folder says; of a folder without one, those of a marker model.

  Raises:
    ValueError: the file says something that is not known.
  """
  said = hf_config.read_meta(folder).get('segmenter', {'markers': 'text', 'length': 8192})
  place = f'{folder / files.META}: segmenter'
  disk.check_form(said, _NEEDED | {name: form for name, form in _MAY.items() if name in said}, place)
  errors.check_choice(f'{place}: markers', said['markers'], markers.STYLES)
  pick: Callable[[Any], dict[str, Any]] = lambda cls: {n: said[n] for n in cls.__dataclass_fields__ if n in said}
  try:
    shift: dict[str, Any] = {'outline': Shift(**said['outline'])} if 'outline' in said else {}
    read = markers.ReadOptions(style=said['markers'], **pick(markers.ReadOptions))
    return Options(read, **pick(Options) | shift | overrides)
  except (TypeError, ValueError) as error:
    own = str(error).removeprefix('config.segment.read.')   # the keys of the file, not of a config
    raise UserError(f'{place}: {own}') from error


class Segmenter:
  """A loaded segmenter.

  Args:
    params, cfg: from `hf.convert.load`, of a token-classification model with two classes.
    tokenizer: `tokenizers.Tokenizer`.
    options: `Options`.
    place: where it runs; by default on all devices, the rows divided.
    dtype: of activations.
    batch_tokens: tokens of a batch on each device.
  """

  def __init__(self, params, cfg, tokenizer, options: Options, *, place: mesh_lib.Placement | None = None,
               dtype: str = 'float32', batch_tokens: int = 8192):
    if not model.is_segmenter(cfg):
      raise UserError(f'params are of {hf_config.architecture(cfg)}; give a token-classification model with two classes')
    if cfg.unit_tokens != options.read.unit_tokens:
      raise UserError(f'the model reads {cfg.unit_tokens} tokens at a position, the options {options.read.unit_tokens}: '
                      f'{files.META} (markers, head, tail) and config.json (unit_tokens) do not belong together')
    encode.check_tokenizer(tokenizer, cfg.vocab, 'segmenter')
    self.cfg, self.options = cfg, options
    self.reader = markers.Reader(tokenizer, options.read)
    self._place = place or mesh_lib.Placement(mesh_lib.make_mesh({'data': -1}))
    self._params = params
    self._batch_tokens = batch_tokens
    compute = Compute(dtype=dtype, placement=self._place)
    everywhere = self._place.replicated()
    self._predict = jax.jit(lambda params, tokens, layout: model.log_odds(
        model.apply(params, tokens, layout, cfg, compute)), out_shardings=everywhere)
    self._hidden = jax.jit(lambda params, tokens, layout: classifier.hidden(
        params, tokens, layout, cfg, compute).astype(jnp.float32), out_shardings=everywhere)

  @classmethod
  def load(cls, name: os.PathLike | str, *, dtype: str = 'float32', place: mesh_lib.Placement | None = None,
           batch_tokens: int = 8192, **overrides) -> 'Segmenter':
    """A segmenter from a Hugging Face folder or hub name.

    Args:
      overrides: of `Options`: length, overlap, threshold.

    Raises:
      FileNotFoundError: no such folder, or one without a tokenizer.
      ValueError: it is no token-classification model with two classes, or its files do not fit together.
    """
    folder = files.locate(name)
    if not (folder / 'tokenizer.json').is_file():
      raise FileNotFoundError(f'{folder} holds no tokenizer.json; give the folder that the segmenter was exported to')
    cfg = hf_config.read(folder)
    if not model.is_segmenter(cfg):
      raise UserError(f'{folder}/config.json is of {hf_config.architecture(cfg)}; a segmenter is a token-classification '
                      'model with two classes')
    options = options_of(folder, **overrides)
    place = place or mesh_lib.Placement(mesh_lib.make_mesh({'data': -1}))
    cfg, params = convert.load(folder, dtype, mesh=place.mesh, rules=place.rules)
    tokenizer = disk.read_tokenizer(folder / 'tokenizer.json')
    return cls(params, cfg, tokenizer, options, place=place, dtype=dtype, batch_tokens=batch_tokens)

  def score(self, texts: Sequence[str], progress: Callable[[int], None] | None = None) -> list[Scored]:
    """The candidates of each text and their log-odds.

    Args:
      texts: any texts; long ones are read in windows, short ones together.
      progress: called with the characters that are done so far.
    """
    done, out = 0, []
    for group in _groups(texts):
      report = None if progress is None else lambda new, before=done: progress(before + new)
      out += self._score(group, report)
      done += sum(map(len, group))
      if progress is not None:
        progress(done)
    return out

  def token_ends(self, texts: Sequence[str]) -> list[np.ndarray]:
    """For each text the ends of the model's tokens, non-decreasing int64 character offsets."""
    return self.reader.token_ends(texts)

  def embed(self, texts: Sequence[str]) -> np.ndarray:
    """The backbone's last hidden state of each text, read as one unit alone: float32 [n, D]. None may be empty."""
    out, parts = np.zeros((len(texts), self.cfg.width), np.float32), self.reader.alone(texts)
    for i, states in self._compute(parts, self._hidden):
      out[i] = states[-1]
    return out

  def _score(self, texts, progress):
    places = [markers.candidates(text, self.options.read.separators) for text in texts]
    units = [self.reader.units(markers.split(text, cuts)) if text else None
             for text, cuts in zip(texts, places, strict=True)]
    odds = [np.zeros(len(cuts), np.float32) for cuts in places]
    done = 0
    for window, values in self._decide(units):
      odds[window.text][window.new - 1:window.decided - 1] = values
      if progress is not None:
        cuts = places[window.text]
        end = cuts[window.decided - 1] if window.decided <= len(cuts) else len(texts[window.text])
        done += int(end - cuts[window.new - 1])
        progress(done)
    if self.options.outline is not None:
      odds = [self.options.outline.apply(text, cuts, values) for text, cuts, values in zip(texts, places, odds, strict=True)]
    return [Scored(cuts, values, np.cumsum(u.counts) if u else np.zeros(1, np.int64))
            for cuts, values, u in zip(places, odds, units, strict=True)]

  def _decide(self, units) -> Iterator[tuple[Window, np.ndarray]]:
    """(window, log-odds of what it decides) of every window of the texts, in any order."""
    plan = [w for i, u in enumerate(units) if u is not None and len(u) > 1 for w in self._windows(i, u)]
    parts = [self.reader.read(units[w.text], w.first, w.stop, w.stop == len(units[w.text])) for w in plan]
    for i, odds in self._compute([tokens for tokens, _ in parts], self._predict):
      window, read = plan[i], parts[i][1]
      yield window, odds[read[window.new - window.first:window.decided - window.first]]

  def _compute(self, parts, function) -> Iterator[tuple[int, np.ndarray]]:
    """(number of the part, what `function` gives at each of its positions) of every part, in any order."""
    # A window of words whose tokens joined otherwise than they were counted may be longer than windows are.
    length = max([self.options.length, *map(len, parts)])
    rows = packing.plan_rows([len(part) for part in parts], [1] * len(parts), length=length,
                             max_blocks=self.options.length)
    for length, some in self._batches(rows, parts):
      starts = [list(itertools.accumulate((len(parts[i]) for i in row), initial=0)) for row in some]
      tokens = np.zeros((len(some), length, *classifier.position_shape(self.cfg)), np.int32)
      for at, row in enumerate(some):
        for i, start in zip(row, starts[at]):
          tokens[at, start:start + len(parts[i])] = parts[i]
      layout = blocks.from_lengths([[[len(parts[i])] for i in row] for row in some], length)
      values = np.asarray(function(self._params, *self._place.put_batch((tokens, layout))))
      yield from ((i, values[at, start:start + len(parts[i])]) for at, row in enumerate(some)
                  for i, start in zip(row, starts[at]))

  def _windows(self, text, units) -> Iterator[Window]:
    length, wait = self.options.length, self.options.read.ahead - 1
    first, new = 0, 1
    while new < len(units):
      stop = self.reader.fit(units, first, length)
      decided = stop if stop == len(units) else stop - wait
      yield Window(text, first, new, decided, stop)
      # The next window begins with what fits into the overlap, one unit at least, but decides on something new.
      behind = np.cumsum(units.sizes[first:decided][::-1])
      shared = max(1, int(np.searchsorted(behind, self.options.overlap * length, side='right')))
      first, new = max(first + 1, decided - shared), decided

  def _batches(self, rows, parts) -> Iterator[tuple[int, list]]:
    """(tokens of a row, rows) of every batch; the rows of a batch are about as long, the longest come first."""
    by_length = {}
    for row in rows:
      tokens = sum(len(parts[i]) for i in row)
      length = SHORTEST_ROW << max(0, math.ceil(tokens / SHORTEST_ROW) - 1).bit_length()
      by_length.setdefault(max(tokens, min(length, self.options.length)), []).append(row)
    devices = self._place.size('batch')
    for length, group in sorted(by_length.items(), reverse=True):
      full = devices * max(1, self._batch_tokens // length)
      whole = len(group) - len(group) % full
      for start in range(0, whole, full):
        yield length, group[start:start + full]
      rest = group[whole:]
      few = devices if len(rest) <= full // 2 else full
      for start in range(0, len(rest), few):
        yield length, rest[start:start + few] + [[]] * (few - len(rest[start:start + few]))


def _groups(texts):
  """The texts in their order, in groups of about _CHARACTERS."""
  groups, size = [], 0
  for text in texts:
    if not groups or size + len(text) > _CHARACTERS:
      groups.append([])
      size = 0
    groups[-1].append(text)
    size += len(text)
  return groups


@functools.cache
def embedded() -> Segmenter:
  """The segmenter that comes with the package."""
  return Segmenter.load(EMBEDDED)
