"""Sources: random-access sequences of packed rows, of files or of the documentation of Python's standard library.

A source has `length` (tokens of a row), `fingerprint()` (what its rows are made of) and `where(row)` (for errors); what a
training run reads of it, and in which order, is `stream.batches`.
"""

import hashlib
import os
import platform
from collections.abc import Sequence
from typing import Any

import numpy as np

from blockattn.data import encode, json_lines, packing, stdlib, store
from blockattn.data.example import Example
from blockattn.data.store import Cutter, FileOptions
from blockattn.errors import UserError

_ROWS = 1_000_000      # of an epoch of pages, of which there is no end
_CUT_SEED = 7
_PROBED_PAGES = 64     # from which PageRows guesses how many pages fill a row


class FileRows:
  """Packed rows of files: a source.

  Args:
    files: see `json_lines.find_files`.
    tokenizer: from `encode.load_tokenizer`.
    options: `FileOptions`.
    cache: folder for encoded documents, made if absent. Each file is cached on its own.
    strict: raise at the first malformed line.
    cutter: cuts the contexts, in place of the blocks that are given; None: these.

  Attributes:
    files, stores: the files in order, and their `DocStore`s.
    report: the files' reports added up.
    plan: for each row the numbers of its documents.

  Raises:
    json_lines.BadLineError: `strict` and a line is malformed.
    ValueError: not one document is left.
  """

  def __init__(self, files: str | Sequence[str], tokenizer: Any, options: FileOptions, cache: str | os.PathLike, *,
               strict: bool = False, cutter: Cutter | None = None):
    encoder = encode.Encoder(tokenizer, bos=options.bos)
    self.options = options
    self.length = options.length
    self.files = json_lines.find_files(files)
    self.stores = [store.open_store(file, tokenizer, encoder, options, cache, strict=strict, cutter=cutter)
                   for file in self.files]
    self.report = sum((one.report for one in self.stores), json_lines.Report())
    self.sizes = np.concatenate([one.sizes for one in self.stores])
    if not len(self.sizes):
      raise UserError(f'{", ".join(self.files)}: no document to train on\n{self.report.summary()}')
    self._starts = np.cumsum([0, *map(len, self.stores)])
    counts = np.concatenate([one.counts for one in self.stores])
    self.plan = packing.plan_rows(self.sizes, counts, length=options.length, max_blocks=options.max_blocks,
                                  window=options.window)

  def __len__(self):
    return len(self.plan)

  def doc(self, i: int) -> encode.EncodedDoc:
    """Document i, counted over all files."""
    number = int(np.searchsorted(self._starts, i, side='right')) - 1
    return self.stores[number][i - int(self._starts[number])]

  def __getitem__(self, row: int) -> dict:
    docs = [self.doc(i) for i in self.plan[row]]
    return packing.pack_row(docs, self.length, shared_first=self.options.shared_first)

  def where(self, row: int) -> str:
    """The documents of a row, each with its file, for an error."""
    numbers = (np.searchsorted(self._starts, self.plan[row], side='right') - 1).tolist()
    return ', '.join(f'{self.files[number]} (document {i - int(self._starts[number])})'
                     for i, number in zip(self.plan[row], numbers, strict=True))

  def fingerprint(self) -> dict[str, str]:
    """What the rows are made of, by name: of each file its bytes and all that decides how they are encoded."""
    return {file: one.key for file, one in zip(self.files, self.stores, strict=True)}


class PageRows:
  """Packed rows of pages of the embedded corpus: a source.

  Row i draws the pages i * K ... i * K + K - 1 and packs, in order, those that still fit; K, guessed from some pages'
  lengths, is a little more than fills a row. A row depends on its number and the arguments alone. There is no end of pages.

  Args:
    containers: tuple of `stdlib.Container`.
    style: `stdlib.PageStyle`.
    tokenizer: from `encode.load_tokenizer`.
    length: T.
    max_blocks: blocks of a row.
    block_tokens: 0 for the pages' own blocks, else blocks of so many tokens, see `encode.recut`.
    shared_first: see `packing.pack_row`.
    cutter, cut_share: cuts the pages of this share of the rows, drawn by their numbers, in place of the pages' blocks.

  Raises:
    ValueError: the row is so short, or the bound on blocks so low, that no page fits.
  """

  def __init__(self, containers: Sequence[stdlib.Container], style: stdlib.PageStyle, tokenizer: Any, *, length: int,
               max_blocks: int, block_tokens: int = 0, shared_first: bool = False, cutter: Cutter | None = None,
               cut_share: float = 0.0):
    self._cutter, self._cut_share = cutter, cut_share if cutter else 0.0
    self.length, self.max_blocks, self.shared_first = length, max_blocks, shared_first
    self.block_tokens = block_tokens
    self._containers, self._style = tuple(containers), style
    self._facts = (store.FORMAT, length, max_blocks, style, 0, block_tokens, shared_first, self._cut_share,
                   cutter.fingerprint if cutter else '')
    self._encoder = encode.Encoder(tokenizer)
    self.pages_per_row = 1   # while some are looked at
    self.pages_per_row = self._guess()

  def _guess(self):
    docs = self.pages(range(_PROBED_PAGES))
    fitting = [doc for doc in docs if len(doc.tokens) <= self.length and len(doc.lengths) <= self.max_blocks]
    if not fitting:
      shortest = min(docs, key=lambda doc: len(doc.tokens))
      raise UserError(f'no page fits into a row of {self.length} tokens and {self.max_blocks} blocks: the shortest of '
                      f'{len(docs)} has {len(shortest.tokens)} tokens in {len(shortest.lengths)} blocks; make rows '
                      'longer, or pages shorter (PageStyle.members, doc_chars)')
    by_tokens = self.length / np.mean([len(doc.tokens) for doc in fitting])
    by_blocks = self.max_blocks / np.mean([len(doc.lengths) for doc in fitting])
    return int(1.2 * min(by_tokens, by_blocks) * len(docs) / len(fitting)) + 2

  def pages(self, numbers: Sequence[int]) -> list[encode.EncodedDoc]:
    """The encoded pages of these numbers."""
    drawn = self.cut_examples(numbers)
    cut = lambda parts: encode.recut(parts, self.block_tokens) if self.block_tokens else parts
    return [encode.fit(cut(parts))[0] for parts in self._encoder.parts(drawn)]

  def cut_examples(self, numbers: Sequence[int]) -> list[Example]:
    """The pages of these numbers as text, the share of the cutter in its blocks."""
    drawn = [self.example(i) for i in numbers]
    chosen = [i for i, number in enumerate(numbers) if self.is_cut(number)]
    for i, example in zip(chosen, store.recut_all([drawn[i] for i in chosen], self._cutter)):
      drawn[i] = example
    return drawn

  def is_cut(self, number: int) -> bool:
    """Whether the cutter makes the blocks of page `number`: of all pages of a row, or of none, so that it is called
    for few rows."""
    row = number // self.pages_per_row
    return self._cut_share > 0 and np.random.default_rng([_CUT_SEED, row]).random() < self._cut_share

  def example(self, number: int) -> Example:
    """Page `number` as text."""
    page = stdlib.make_page(number, self._containers, self._style)
    return Example(tuple(page['blocks']), page['prompt'], page['response'], page['id'],
                            (page['response'].strip(),), tuple(page['gold']))

  def __len__(self):
    return _ROWS

  def __getitem__(self, row: int) -> dict:
    return packing.pack_row(self.docs(row), self.length, shared_first=self.shared_first)

  def docs(self, row: int) -> list[encode.EncodedDoc]:
    """The documents of a row."""
    first = int(row) * self.pages_per_row
    room, places, chosen = self.length, self.max_blocks, []
    for doc in self.pages(range(first, first + self.pages_per_row)):
      if len(doc.tokens) <= room and len(doc.lengths) <= places:
        room, places = room - len(doc.tokens), places - len(doc.lengths)
        chosen.append(doc)
    return chosen

  def where(self, row: int) -> str:
    """The pages of a row, for an error."""
    first = int(row) * self.pages_per_row
    return f'pages {first} to {first + self.pages_per_row - 1} of the standard library'

  def fingerprint(self) -> dict[str, str]:
    """As of `FileRows`; the library's documentation is another one in every version of Python."""
    facts = (*self._facts, self.pages_per_row, self._encoder.fingerprint, self._containers)
    digest = hashlib.sha256(repr(facts).encode()).hexdigest()[:32]
    return {"pages of Python's standard library": f'{digest}, Python {platform.python_version()}'}
