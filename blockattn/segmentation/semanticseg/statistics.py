"""What a corpus of blocks holds: documents, characters, tokens, blocks and their lengths, licences.

Tokens of a document are those of its blocks, each encoded alone, as training and caching encode them.
"""

import collections
import dataclasses
import functools
import itertools
import operator
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from blockattn.data import encode
from blockattn.segmentation.semanticseg import schema

QUANTILES = (5, 25, 50, 75, 95)   # percent
WANTED = (2_000, 32_000)          # tokens of a document, both included
ALL = 'all'
_BATCH = 64   # documents encoded together

Key = tuple[str, str]   # (category, split)


@dataclasses.dataclass(frozen=True)
class Measured:
  """Lengths of a set of documents."""
  block_characters: np.ndarray   # int64 [blocks]
  block_tokens: np.ndarray | None   # int64 [blocks], or None without a tokenizer
  document_tokens: np.ndarray | None   # int64 [documents], or None
  licenses: collections.Counter   # documents by licence

  def __add__(self, other: 'Measured') -> 'Measured':
    join = lambda a, b: None if a is None or b is None else np.concatenate([a, b])
    return Measured(np.concatenate([self.block_characters, other.block_characters]),
                    join(self.block_tokens, other.block_tokens), join(self.document_tokens, other.document_tokens),
                    self.licenses + other.licenses)

  def to_json(self) -> dict[str, Any]:
    """Counts and quantiles; what needs tokens is None without."""
    tokens = self.document_tokens
    inside = None if tokens is None else int(((tokens >= WANTED[0]) & (tokens <= WANTED[1])).sum())
    return {'documents': self.licenses.total(), 'characters': int(self.block_characters.sum()),
            'tokens': None if tokens is None else int(tokens.sum()), 'blocks': len(self.block_characters),
            'block_characters': quantiles(self.block_characters), 'block_tokens': quantiles(self.block_tokens),
            'documents_of_2k_to_32k_tokens': inside, 'licenses': dict(sorted(self.licenses.items()))}


def quantiles(lengths: np.ndarray | None) -> dict[str, int] | None:
  """{'5': ..., '95': ...}: the smallest length that at least so many percent do not exceed; None for no lengths."""
  if lengths is None or not len(lengths):
    return None
  values = np.percentile(lengths, QUANTILES, method='inverted_cdf')
  return {str(percent): int(value) for percent, value in zip(QUANTILES, values, strict=True)}


def measure(documents: Iterable[schema.Document], encoder: encode.Encoder | None = None) -> Measured:
  """Reads documents and measures them, with tokens if there is an encoder."""
  characters, tokens, sums, licenses = [], [], [], collections.Counter()
  documents = iter(documents)
  while batch := list(itertools.islice(documents, _BATCH)):
    licenses.update(document.license for document in batch)
    blocks = [block for document in batch for block in document.blocks]
    characters += map(len, blocks)
    if encoder:
      lengths = [len(ids) for ids in encoder.texts(blocks)]
      tokens += lengths
      rest = iter(lengths)
      sums += [sum(itertools.islice(rest, len(document.blocks))) for document in batch]
  counted = lambda lengths: np.array(lengths, np.int64) if encoder else None
  return Measured(np.array(characters, np.int64), counted(tokens), counted(sums), licenses)


def to_json(measured: Mapping[Key, Measured]) -> dict[str, dict[str, Any]]:
  """{category: {split: counts}}, with the sums over splits, over categories and over both; in order, totals last."""
  summed, result = collections.defaultdict(list), {}
  for (category, split), value in measured.items():
    for key in itertools.product((category, ALL), (split, ALL)):
      summed[key].append(value)
  place = lambda key: (key[0] == ALL, key[0], (*schema.SPLITS, ALL).index(key[1]))
  for category, split in sorted(summed, key=place):
    result.setdefault(category, {})[split] = functools.reduce(operator.add, summed[category, split]).to_json()
  return result


def to_markdown(statistics: Mapping[str, Mapping[str, Any]]) -> str:
  """Two tables from `to_json`: a line per category and split, and the licences of every category."""
  head = ['category', 'split', 'documents', 'characters', 'tokens', 'blocks', 'blocks a document',
          *(f'characters of a block, {percent}%' for percent in QUANTILES), 'documents of 2k-32k tokens']
  number = lambda value: '-' if value is None else f'{value:,}'
  rows, licenses = [], []
  for category, splits in statistics.items():
    for split, values in splits.items():
      spread = values['block_characters'] or {}
      mean = f"{values['blocks'] / values['documents']:.1f}" if values['documents'] else '-'
      rows.append((category, split, *(number(values[key]) for key in ('documents', 'characters', 'tokens', 'blocks')), mean,
                   *(number(spread.get(str(percent))) for percent in QUANTILES),
                   number(values['documents_of_2k_to_32k_tokens'])))
    if category != ALL:
      licenses += [(category, license, number(count)) for license, count in splits[ALL]['licenses'].items()]
  return _table(head, rows) + '\n' + _table(['category', 'licence', 'documents'], licenses)


def _table(head, rows):
  """A Markdown table, the first two columns aligned left."""
  line = lambda cells: '| ' + ' | '.join(str(cell).replace('|', '\\|') for cell in cells) + ' |\n'
  return line(head) + line(['---'] * 2 + ['---:'] * (len(head) - 2)) + ''.join(map(line, rows))
