"""Documents that stand twice in a corpus, word for word or nearly, and above all on both sides of a split.

Texts are compared by their words, without case, punctuation and spacing. Two texts are the same ('exact') if the words
are; they are near duplicates if the Jaccard similarity of their sets of five-word shingles, |A & B| / |A | B|, reaches a
threshold. Candidates come from MinHash signatures in a locality-sensitive index (Broder 1997; Leskovec, Rajaraman and
Ullman, Mining of Massive Datasets, ch. 3), and a second reading counts their similarity exactly, so chance decides
only whether a pair is looked at: with the bands below, one of similarity 0.8 is missed once in 20,000, one of 0.7
once in 100. It is the same chance at every run.

MinHash and the index are datasketch's: pure Python and numpy, a tenth of the time goes into it. Memory is about 2 kB a
document, and the shingles of the candidates.
"""

import dataclasses
import hashlib
import itertools
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from blockattn import errors
from blockattn.errors import UserError
from blockattn.segmentation.semanticseg import schema

THRESHOLD = 0.8
WIDTH = 5             # words of a shingle
BANDS = (25, 5)       # of the index: a pair of similarity s is looked at with probability 1 - (1 - s^5)^25
_SEED = 1
_BATCH = 4096         # shingles hashed together; bounds the memory for a long text
_SPACELESS = '\u3040-\u30ff\u3400-\u9fff'   # kana and Chinese characters: each counts as a word
_WORD = re.compile(rf'[{_SPACELESS}]|[^\W{_SPACELESS}]+')

Place = tuple[str, str, str]   # (split, category, id): names a document
Documents = Callable[[], Iterable[tuple[str, schema.Document]]]   # the same (split, document) pairs at every call


@dataclasses.dataclass(frozen=True, order=True)
class Pair:
  """Two documents that are the same, `a` in the earlier split of test, validation, train, then by category and id."""
  a: Place
  b: Place
  similarity: float    # Jaccard, 1.0 for the same words
  exact: bool


def words_of(text: str) -> list[str]:
  """The words of a text, case folded; a text without any is one word."""
  return _WORD.findall(text.casefold()) or [text]


def digest_of(words: list[str]) -> bytes:
  return hashlib.blake2b(' '.join(words).encode(), digest_size=16).digest()


def shingles_of(words: list[str]) -> np.ndarray:
  """The set of WIDTH neighbouring words as 64-bit hashes: uint64, sorted, each once. A shorter text is one shingle."""
  hashes = np.fromiter((zlib.crc32(word.encode()) for word in words), np.uint64, len(words))
  width = min(WIDTH, len(hashes))
  count = len(hashes) - width + 1
  mixed = np.zeros(count, np.uint64)
  for i in range(width):
    # Multiplying by an odd number near 2^64 / golden ratio and folding the upper bits down mixes in the next word.
    mixed = (mixed + hashes[i:i + count]) * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(29)
  return np.unique(mixed)


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
  """|A & B| / |A | B| of two sets as `shingles_of` gives them."""
  both = len(np.intersect1d(a, b, assume_unique=True))
  return both / (len(a) + len(b) - both)


def signature(shingles: np.ndarray) -> Any:
  """A datasketch.MinHash of a set of shingles, the same on every machine."""
  datasketch = _datasketch()
  result = datasketch.MinHash(num_perm=BANDS[0] * BANDS[1], seed=_SEED, hashfunc=int, scheme='affine64')
  for start in range(0, len(shingles), _BATCH):
    result.update_batch(shingles[start:start + _BATCH].tolist())
  return result


def find(documents: Documents, *, threshold: float = THRESHOLD) -> list[Pair]:
  """All pairs of duplicates, sorted: of texts with the same words every one with the first of them.

  Args:
    documents: called twice, gives the same (split, document) pairs both times; ids are unique within a split and
      category.
    threshold: similarity from which two texts are near duplicates, above 0.5 (the index would miss many below) to 1.

  Raises ValueError: a threshold out of range; ImportError: datasketch is not installed."""
  if not 0.5 < threshold <= 1:
    raise UserError(f'threshold {threshold}: give a similarity above 0.5, at most 1')
  first, same, candidates = _candidates(documents())
  places = set(itertools.chain.from_iterable(candidates))
  shingles = {place: shingles_of(words_of(document.text)) for split, document in documents()
              if (place := (split, document.category, document.id)) in places}
  near = [(a, b, jaccard(shingles[a], shingles[b])) for a, b in candidates]
  return sorted([_pair(first[digest], place, 1.0, True) for digest, place in same]
                + [_pair(a, b, similarity, False) for a, b, similarity in near if similarity >= threshold])


def _candidates(documents):
  """({digest: first place}, [(digest, other place)] of the same words, pairs of places to compare)."""
  first, same, candidates = {}, [], []
  index = _datasketch().MinHashLSH(num_perm=BANDS[0] * BANDS[1], params=BANDS)
  for split, document in documents:
    place, words = (split, document.category, document.id), words_of(document.text)
    digest = digest_of(words)
    if first.setdefault(digest, place) != place:
      same.append((digest, place))
      continue
    hashed = signature(shingles_of(words))
    candidates += [(other, place) for other in index.query(hashed)]
    index.insert(place, hashed)
  return first, same, candidates


def _pair(a, b, similarity, exact):
  rank = lambda place: (-schema.SPLITS.index(place[0]), *place[1:])   # test, validation, train
  first, second = sorted((a, b), key=rank)
  return Pair(first, second, similarity, exact)


def dropped(pairs: Iterable[Pair]) -> frozenset[tuple[str, str]]:
  """(category, id) of training documents that are, word for word or nearly, in validation or test."""
  pairs = list(pairs)
  found = {pair.b[1:] for pair in pairs if pair.b[0] == 'train' and pair.a[0] != 'train'}
  # Of texts with the same words only the first was compared with others; what holds for it holds for all.
  for pair in pairs:
    both = {pair.a[1:], pair.b[1:]}
    if pair.exact and pair.a[0] == pair.b[0] == 'train' and both & found:
      found |= both
  return frozenset(found)


def counts_of(pairs: Iterable[Pair]) -> Iterator[tuple[str, str, int, int]]:
  """(category, splits such as 'test-train', exact pairs, near pairs), sorted; a pair of categories is 'a, b'."""
  counts = {}
  for pair in pairs:
    category = ', '.join(sorted({pair.a[1], pair.b[1]}))
    counts.setdefault((category, f'{pair.a[0]}-{pair.b[0]}'), [0, 0])[not pair.exact] += 1
  return ((*key, *row) for key, row in sorted(counts.items()))


def to_json(pairs: Iterable[Pair]) -> list[dict]:
  return [{'a': list(pair.a), 'b': list(pair.b), 'similarity': round(pair.similarity, 4), 'exact': pair.exact}
          for pair in pairs]


def _datasketch():
  return errors.library('datasketch', 'finding duplicates', 'semanticseg')
