"""Opponents of the segmenter: ways to cut a text that need no training, behind one interface.

A cutter is a callable (text) -> cuts, strictly increasing character offsets 0 < cut < len(text); the blocks between them
join to the text whatever the library behind a cutter does with white space: where it drops white space, the white
space stays at the end of the earlier block, as in the gold segmentations. Cutters do not know the candidates of the
measures. Whoever compares them moves each cut to its nearest candidate (`measures.nearest`), so that nobody is punished
for cutting inside of a sentence or beside a line end.

A `Baseline` builds cutters from its options (its granularity) and lists the options that are worth trying. Libraries
are those of the extra `text`.
"""

import collections
import dataclasses
import functools
import itertools
import math
import re
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from blockattn import errors
from blockattn.errors import UserError
from blockattn.segmentation import markers, outline

Cutter = Callable[[str], list[int]]
Embed = Callable[[Sequence[str]], np.ndarray]    # n texts -> [n, D]
TokenStarts = Callable[[str], Sequence[int]]     # a text -> the offset of each token

SIZES = (100, 200, 400, 800, 1600, 3200, 6400, 12800, 25600)   # characters
RULE = (r'\n\n+', r'---+', r'===+', r'\n\t', r'\n')            # Block-Attention's separators, strongest first
STOPWORDS = frozenset(
    "a about above after again all also am an and any are as at be because been before being below between both but by "
    "can could did do does doing down during each few for from further had has have having he her here hers him his how "
    "i if in into is it its itself just me more most my no nor not now of off on once only or other our out over own s "
    "same she should so some such t than that the their them then there these they this those through to too under "
    "until up us very was we were what when where which while who whom why will with would you your".split())


@dataclasses.dataclass(frozen=True)
class Baseline:
  """A way to cut."""
  what: str   # one line for a legend
  build: Callable[..., Cutter]   # (**options) -> cutter
  grid: tuple[dict[str, Any], ...] = ({},)   # options to choose among, from fine to coarse
  by_count: bool = False   # choose those whose number of cuts is nearest to the gold one, not those with the best measure


def baselines(embedders: dict[str, Embed] | None = None, token_starts: TokenStarts | None = None) -> dict[str, Baseline]:
  """All baselines by name; each embedder (None: the hashed bag of words) gives an embedding valley, and without
  `token_starts`, where a text's tokens start, there is no fixed length in tokens."""
  sizes = _grid(size=SIZES)
  ways = {
      'no cut': Baseline('the text as one block', lambda: lambda text: []),
      'every candidate': Baseline('a cut after every sentence and every line', lambda: sentences(1)),
      'random': Baseline('each candidate with one probability, so many cuts as the gold has', random_candidates,
                         _grid(rate=[0.4 * 0.8 ** i for i in range(28)]), by_count=True),
      'fixed characters': Baseline('every `size` characters', fixed_characters, sizes),
      'sentences': Baseline('every `count` sentences or lines', sentences,
                            _grid(count=(2, 4, 8, 16, 32, 64, 128, 256))),
      'blank lines': Baseline('every run of two or more line ends', blank_lines),
      'separator rule': Baseline(r'\n\n, ---, ===, \n\t, \n, pieces merged up to `size` characters', separator_rule,
                                 _grid(kinds=(1, len(RULE)), size=(0, *SIZES))),
      'headings': Baseline('Markdown, underlined, LaTeX and numbered headings, the deepest level whose sections average '
                           '`average` characters', headings, _grid(average=(0, 350, 700, 1400, 2800, 5600, 11200))),
      'langchain recursive': Baseline('RecursiveCharacterTextSplitter', langchain_recursive, sizes),
      'semchunk': Baseline('semchunk, sizes in characters', semchunk_chunks, sizes),
      'chonkie recursive': Baseline('chonkie RecursiveChunker', chonkie_recursive, sizes),
      'texttiling': Baseline("nltk's TextTiling, pseudo-sentences of `w` words, windows of `k` of them", texttiling,
                             _grid(w=(10, 20, 40, 80, 160), k=(10,))),
  }
  if token_starts is not None:
    ways['fixed tokens'] = Baseline('every `size` tokens', functools.partial(fixed_tokens, token_starts),
                                    _grid(size=(32, 64, 128, 256, 512, 1024, 2048, 4096)))
  for name, embed in (embedders or {'hashed words': hashed_words}).items():
    ways[f'valleys ({name})'] = Baseline(
        'the deepest valleys of the similarity of neighbouring windows, one per `size` characters',
        functools.partial(embedding_valleys, embed), _grid(window=(400, 1600), size=SIZES[1:]))
  return ways


def _grid(**values: Sequence) -> tuple[dict[str, Any], ...]:
  """Every combination of the values, the last name's changing fastest."""
  return tuple(dict(zip(values, chosen)) for chosen in itertools.product(*values.values()))


def _library(name: str):
  return errors.library(name, 'this baseline', 'text')


# Cuts from pieces.

def inner(offsets: Sequence[int], text: str) -> list[int]:
  """The offsets that are cuts of the text: each once, sorted, without its ends."""
  return sorted(set(offsets) - {0, len(text)})


def behind_space(offsets: Sequence[int], text: str) -> list[int]:
  """Cuts moved behind the white space that follows them: it belongs to the earlier block."""
  space = re.compile(r'\s*')
  return inner([match.end() for offset in offsets if (match := space.match(text, offset))], text)


def starts(pieces: Sequence[str], text: str) -> list[int]:
  """Offsets of pieces that follow one another in the text, but for white space that was dropped between them; ValueError if
  a piece is not there, or other text was lost."""
  found, end = [], 0
  for piece in pieces:
    start = text.find(piece, end)
    if start < 0 or text[end:start].strip():
      raise UserError(f'the piece {piece[:40]!r} does not follow character {end}: the splitter changed the text')
    found.append(start)
    end = start + len(piece)
  return found


def merged(cuts: Sequence[int], length: int, size: int) -> list[int]:
  """Fewer cuts: neighbouring pieces are joined from the left as long as they have at most `size` characters."""
  kept, start = [], 0
  for cut, end in itertools.pairwise([*cuts, length]):
    if end - start > size:
      kept.append(cut)
      start = cut
  return kept


# Lengths and chance.

def fixed_characters(size: int) -> Cutter:
  return lambda text: list(range(size, len(text), size))


def fixed_tokens(token_starts: TokenStarts, size: int) -> Cutter:
  return lambda text: inner(token_starts(text)[size::size], text)


def sentences(count: int) -> Cutter:
  """Every `count` units of the separator regex, which are sentences and lines."""
  return lambda text: markers.candidates(text)[count - 1::count].tolist()


def random_candidates(rate: float, seed: int = 0) -> Cutter:
  """Each candidate with probability `rate`; the same text is always cut in the same way."""
  draw = lambda text: np.random.default_rng([seed, zlib.crc32(text.encode(errors='surrogatepass'))])
  cut = lambda text, places: places[draw(text).random(len(places)) < rate].tolist()
  return lambda text: cut(text, markers.candidates(text))


# Separators and headings.

def blank_lines() -> Cutter:
  """After every run of two or more line ends, with blanks between them."""
  return lambda text: _behind(r'(?:\r\n?|\n)(?:[ \t\f]*(?:\r\n?|\n))+', text)


def _behind(pattern, text):
  return inner([match.end() for match in re.finditer(pattern, text)], text)


def separator_rule(size: int, kinds: int = len(RULE)) -> Cutter:
  """Block-Attention's rule (arXiv 2409.15355): after each of the first `kinds` separators of RULE, then `merged`."""
  return lambda text: merged(_behind('|'.join(RULE[:kinds]), text), len(text), size)


def headings(average: int, least: int = outline.SHORT) -> Cutter:
  """See `outline.cuts`."""
  return lambda text: outline.cuts(outline.heading_lines(text), len(text), average, least)


# Libraries.

def langchain_recursive(size: int) -> Cutter:
  """RecursiveCharacterTextSplitter with its default separators, kept at the end of the piece before."""
  splitter = _library('langchain_text_splitters').RecursiveCharacterTextSplitter(
      chunk_size=size, chunk_overlap=0, keep_separator='end', strip_whitespace=False)
  return lambda text: behind_space(starts(splitter.split_text(text), text), text)


def semchunk_chunks(size: int) -> Cutter:
  chunk = _library('semchunk').chunk
  return lambda text: behind_space([start for start, _ in chunk(text, size, len, memoize=False, offsets=True)[1]], text)


def chonkie_recursive(size: int) -> Cutter:
  """RecursiveChunker with its default rules; it counts characters, so it loads no tokenizer."""
  chunker = _library('chonkie').RecursiveChunker(tokenizer='character', chunk_size=size)

  def cut(text):
    clean = re.sub(r'[\ud800-\udfff]', '?', text)   # its compiled part takes no half surrogates
    return behind_space(starts([chunk.text for chunk in chunker.chunk(clean)], clean), text)

  return cut


def texttiling(w: int, k: int) -> Cutter:
  """TextTiling (Hearst 1997) of nltk, with its default smoothing and cut-off.

  It cuts at blank lines only; where a text has none, every line end counts as one. A text that is too short for it
  stays whole.
  """
  module = _library('nltk.tokenize.texttiling')

  def cut(text):
    lines = text if re.search(r'\n[ \t\r]*\n', text) else text.replace('\n', '\n\n')
    tiler = module.TextTilingTokenizer(w=w, k=k, stopwords=STOPWORDS)
    tiler.MAX_TEXT_LEN = len(lines)                                    # its limit is for the part that we replace
    tiler._block_comparison = functools.partial(block_comparison, k)   # the same numbers, not in quadratic time
    try:
      pieces = tiler.tokenize(lines)
    except (ValueError, ZeroDivisionError):   # no paragraph, fewer scores than the smoothing needs, or none
      return []
    offsets = starts(pieces, lines)
    if lines is not text:
      offsets = [offset - lines.count('\n', 0, offset) // 2 for offset in offsets]
    return behind_space(offsets, text)

  return cut


def block_comparison(k: int, sequences: Sequence[Any], table: Any = None) -> list[float]:
  """Similarity of the words on both sides of each gap between pseudo-sentences, as nltk's `_block_comparison`, without
  its table: len(sequences) - 1 cosines.

  Args:
    k: pseudo-sentences on each side; fewer near the ends.
    sequences: nltk's TokenSequences: `wrdindex_list` holds (word, offset) pairs.
  """
  words = [[word for word, _ in sequence.wrdindex_list] for sequence in sequences]
  gaps, scores = len(words) - 1, []
  for gap in range(gaps):
    side = gap + 1 if gap < k - 1 else gaps - gap if gap > gaps - k else k
    left, right = (collections.Counter(itertools.chain(*words[start:start + side])) for start in (gap - side + 1, gap + 1))
    dot = sum(count * right[word] for word, count in left.items() if word in right)
    norms = math.sqrt(sum(n * n for n in left.values()) * sum(n * n for n in right.values()))
    scores.append(dot / norms if norms else 0.0)
  return scores


# Embeddings.

def hashed_words(texts: Sequence[str], width: int = 512) -> np.ndarray:
  """An embedding without a model: counts of words (no stop words), hashed to `width` columns: float32 [n, width]."""
  found = np.zeros((len(texts), width), np.float32)
  for row, text in enumerate(texts):
    words = [word for word in re.findall(r'\w+', text.lower()) if word not in STOPWORDS]
    np.add.at(found[row], [zlib.crc32(word.encode(errors='surrogatepass')) % width for word in words], 1)
  return found


def embedding_valleys(embed: Embed, window: int, size: int) -> Cutter:
  """Cuts at the deepest valleys of similarity, round(len(text) / size) - 1 of them.

  The units between candidates are embedded one by one. The embedding of a window is the mean over its units, weighted by
  their characters; the windows of a candidate are the units that start at most `window` characters before it and those
  that end at most `window` characters behind it (one unit at least). A valley's depth is that of TextTiling: the climb to
  the next peak on the left plus the one on the right.
  """
  def cut(text):
    places = markers.candidates(text)
    count = min(round(len(text) / size) - 1, len(places))
    if count < 1:
      return []
    edges = np.array([0, *places, len(text)])
    depth = valley_depths(window_similarities(np.asarray(embed(markers.split(text, places)), np.float64), edges, window))
    deepest = np.argsort(-depth, kind='stable')[:count]
    return sorted(places[deepest[depth[deepest] > 0]].tolist())

  return cut


def window_similarities(units_UD: np.ndarray, edges: np.ndarray, window: int) -> np.ndarray:
  """Cosine of the windows of so many characters on both sides of each inner edge of U units with ends `edges`, offsets
  [U + 1]: [U - 1], 0 where a window's embedding is zero."""
  sums = np.concatenate([np.zeros_like(units_UD[:1]), np.cumsum(units_UD * np.diff(edges)[:, None], 0)])
  index = np.arange(1, len(edges) - 1)
  left = np.minimum(np.searchsorted(edges, edges[index] - window), index - 1)
  right = np.maximum(np.searchsorted(edges, edges[index] + window, 'right') - 1, index + 1)
  before, after = sums[index] - sums[left], sums[right] - sums[index]
  norms = np.linalg.norm(before, axis=1) * np.linalg.norm(after, axis=1)
  return np.divide((before * after).sum(1), norms, out=np.zeros(len(index)), where=norms > 0)


def valley_depths(values: np.ndarray) -> np.ndarray:
  """Climb from each local minimum to the peaks on both sides, 0 at places that are none (of a plateau: its first)."""
  def climbs(values):
    peaks = np.array(values, np.float64)
    for i in np.flatnonzero(values[:-1] >= values[1:]) + 1:
      peaks[i] = peaks[i - 1]
    return peaks - values

  left, right = climbs(values), climbs(values[::-1])[::-1]
  lower = np.concatenate([[True], values[1:] < values[:-1]]) & np.concatenate([values[:-1] <= values[1:], [True]])
  return np.where(lower, left + right, 0.0)
