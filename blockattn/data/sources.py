"""Sources: what rows of packed documents are made of, files or the documentation of Python's standard library.

A source has `length` (tokens of a row), `fingerprint()` (what its rows are made of), and either rows that are read one by
one, `source[number]` and `where(number)` for errors, or pieces of some documents, `read(pieces, seed)`, of which some
together give rows. What a training run reads of it, and in which order, is `stream.batches`.
"""

import dataclasses
import hashlib
import itertools
import platform
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from blockattn.data import encode, json_lines, packing, prompts, stdlib, tables
from blockattn.data.example import Example, recut
from blockattn.errors import UserError

FORMAT = 4             # of the rows of files; part of their fingerprint
TOGETHER = 32          # rows, about, that are packed at a time
_CHARACTERS = 4        # of a token, to guess how many bytes fill a row
_ROWS = 1_000_000      # of an epoch of pages, of which there is no end
_CUT_SEED = 7
_PAGES = 3             # format of the documents of pages; part of their fingerprint
_PROBED_PAGES = 64     # from which PageRows guesses how many pages fill a row
_PROBED = 1000         # examples after which no document is looked for any more
_CUT_AT_A_TIME = 64    # examples that a cutter is given together


@dataclasses.dataclass(frozen=True)
class FileOptions:
  """How files become rows.

  Attributes:
    length: T, tokens of a row and at most of a document.
    max_blocks: blocks of a row and at most of a document.
    too_long: 'drop' or 'cut', see `encode.fit`.
    chat: see `prompts.read_examples`.
    template: see `prompts.read_examples`.
    bos: see `encode.Encoder`.
    block_tokens: 0 for the blocks that are given, else blocks of so many tokens, see `encode.recut`.
    shared_first: see `packing.pack_row`.
    window: see `packing.plan_rows`.
  """
  length: int
  max_blocks: int
  too_long: str = 'drop'
  chat: bool = False
  template: prompts.QuestionTemplate | None = None
  bos: str = 'auto'
  block_tokens: int = 0
  shared_first: bool = False
  window: int = 64


class Cutter(Protocol):
  """Cuts texts into blocks, in place of those that are given.

  Attributes:
    fingerprint: of everything that decides the cuts; part of the rows'.
  """
  fingerprint: str

  def __call__(self, texts: Sequence[str]) -> Sequence[Any]:
    """The cuts of each text: strictly increasing character offsets."""
    ...


def recut_all(examples: Iterable[Example], cutter: Cutter) -> Iterator[Example]:
  """The examples with the contexts cut by `cutter`, some at a time."""
  waiting = iter(examples)
  while some := list(itertools.islice(waiting, _CUT_AT_A_TIME)):
    cuts = cutter([''.join(example.blocks) for example in some])
    yield from (recut(example, own) for example, own in zip(some, cuts, strict=True))


class FileRows:
  """Packed rows of tables: a source of pieces.

  Nothing is encoded beforehand: `read` reads, cuts, encodes and packs some pieces, in whatever thread calls it. Malformed
  lines are counted in `report` and told of when they are met.

  Args:
    origins: `tables.Origin`s, which say the mode of each file; or a path, or paths.
    tokenizer: from `encode.load_tokenizer`.
    options: `FileOptions`.
    strict: raise at the first malformed line.
    cutter: cuts the contexts, in place of the blocks that are given; None: these.
    text_cutter: cuts texts without a question, if `cutter` does not; None: they are one block.
    tell: called with each malformed line when it is met first, for so many as reports list.
    encoder: the tokenizer's, of which several may share one: it takes seconds to make.

  Attributes:
    tables: (table, whether its documents are read with full attention), in order.
    together: pieces that are read together.
    report: what became of the lines that have been read; of an epoch's if each piece was read once.

  Raises:
    FileNotFoundError: a path names nothing.
    ValueError: a file cannot be read, or lacks a column.
  """

  def __init__(self, origins: str | Sequence[str | tables.Origin], tokenizer: Any, options: FileOptions, *,
               strict: bool = False, cutter: Cutter | None = None, text_cutter: Cutter | None = None,
               tell: Callable[[json_lines.BadLine], None] | None = None, encoder: encode.Encoder | None = None):
    self.options, self.length = options, options.length
    self._tokenizer, self._encoder = tokenizer, encoder or encode.Encoder(tokenizer, bos=options.bos)
    self._cutter, self._text_cutter, self._strict, self._tell = cutter, cutter or text_cutter, strict, tell
    self._lock, self.report, self._told = threading.Lock(), json_lines.Report(), set()
    filled = TOGETHER * options.length * _CHARACTERS   # bytes
    named = [tables.origin(one) for one in ([origins] if isinstance(origins, str | tables.Origin) else origins)]
    opened = [tables.open_tables(one, min(tables.PIECE, max(filled // 16, 1 << 10))) for one in named]
    self.tables = [(table, one.mode == 'full') for one, some in zip(named, opened) for table in some]
    self._firsts = np.cumsum([0, *map(len, opened)])[:-1]   # of each origin
    self._starts = np.cumsum([0, *(table.pieces for table, _ in self.tables)])
    self.together = max(1, round(filled * len(self) / max(sum(table.bytes for table, _ in self.tables), 1)))

  def check(self):
    """Reads until there is a document, and the first rows of each origin's columns, so that what is wrong with all of them
    is said before a training starts.

    Raises:
      json_lines.BadLineError: a line read was malformed, if `strict`.
      ValueError: the first rows of a table have not the form, or not one of a thousand examples gives a document.
    """
    found = []
    for first in self._firsts:
      table, _ = self.tables[first]
      report = json_lines.Report()
      if isinstance(table, tables.Columns) and table.pieces:
        found += self.examples(int(self._starts[first]), report, quiet=True)
        if report.lines and not report.examples:
          raise UserError(f'{report.listed[0]}; so are {report.lines} rows, all that were looked at: correct the column, or '
                          'say with columns which is which')
    report = json_lines.Report()
    for piece in np.random.default_rng(0).permutation(len(self)):   # of all files, as a training reads them
      if found or report.examples >= _PROBED:
        break
      found += itertools.islice(self.examples(int(piece), report, quiet=True), 1)
    if not found:
      told = ': '.join(report.summary().splitlines()[:2])
      raise UserError(f'{", ".join(table.name for table, _ in self.tables)}: no document to train on: {told}' + (
          f'; rows have config.data.length={self.length} tokens and config.data.max_blocks={self.options.max_blocks} blocks'
          if report.dropped else ''))

  def __len__(self):
    return int(self._starts[-1])

  def examples(self, piece: int, report: json_lines.Report, *,
               quiet: bool = False) -> Iterator[tuple[Example, encode.EncodedDoc]]:
    """(example, a document of it), in order, of a piece; `report` counts its lines, `quiet`: tells of none."""
    number = int(np.searchsorted(self._starts, piece, side='right')) - 1
    (table, full), o = self.tables[number], self.options
    parse = lambda place, record: prompts.parse_record(record, where=table.name, chat=o.chat, template=o.template,
                                                       tokenizer=self._tokenizer, texts=True)
    rows = table.read(piece - int(self._starts[number]))
    found = json_lines.parsed(rows, parse, table.name, table.line, report, strict=self._strict,
                              tell=None if quiet else self._tell_once)
    return encode.encode_examples(self._cut((example for _, example in found), full), self._encoder, report,
                                  length=o.length, max_blocks=o.max_blocks, too_long=o.too_long,
                                  block_tokens=o.block_tokens, full=full)

  def _tell_once(self, bad):
    with self._lock:
      new = bad not in self._told and len(self._told) < json_lines.LISTED
      self._told |= {bad} if new else set()
    if new and self._tell is not None:
      self._tell(bad)

  def _cut(self, examples, full):
    """Those in blocks of ours; of a context that is read with full attention there is one block, however it is cut."""
    if full:
      return examples
    if self._cutter is not None:
      return recut_all(examples, self._cutter)
    if self._text_cutter is None or self.options.block_tokens:
      return examples
    return itertools.chain.from_iterable(
        recut_all(some, self._text_cutter) if is_text else some
        for is_text, some in itertools.groupby(examples, lambda example: example.is_text))

  def read(self, pieces: Sequence[int], seed: Sequence[int]) -> list[list[encode.EncodedDoc]]:
    """The documents of each row that some pieces fill, in an order by `seed`."""
    report, docs = json_lines.Report(), []
    for piece in sorted(pieces):
      docs += [doc for _, doc in self.examples(piece, report)]
    with self._lock:
      self.report += report
    docs = [docs[i] for i in np.random.default_rng(seed).permutation(len(docs))]
    plan = packing.plan_rows([len(doc.tokens) for doc in docs], [len(doc.lengths) for doc in docs], length=self.length,
                             max_blocks=self.options.max_blocks, window=self.options.window)
    return [[docs[i] for i in row] for row in plan]

  def pack(self, docs: Sequence[encode.EncodedDoc]) -> dict:
    """The row of these documents."""
    return packing.pack_row(docs, self.length, shared_first=self.options.shared_first)

  def fingerprint(self) -> dict[str, str]:
    """What the rows are made of, by name: of each table its content and all that decides how it is encoded."""
    cutters = [cutter and cutter.fingerprint for cutter in (self._cutter, self._text_cutter)]
    facts = (FORMAT, self.options, self._encoder.fingerprint, cutters, self.together, len(self))
    prints: dict[str, dict[str, None]] = {}   # of a table that is read in several ways one for each
    for table, full in self.tables:
      said = repr((table.fingerprint, sorted(table.columns.items()), full, facts))
      prints.setdefault(f'{table.name}{" in full" * full}', {})[hashlib.sha256(said.encode()).hexdigest()[:32]] = None
    return {f'{name} ({i})' if i > 1 else name: one for name, own in prints.items() for i, one in enumerate(own, 1)}


def page_example(number: int, containers: Sequence[stdlib.Container], style: stdlib.PageStyle) -> Example:
  """A page of the embedded corpus as text, see `stdlib.make_page`: one text, cut inside of its sentences."""
  page = stdlib.make_page(number, containers, style)
  return Example(tuple(page['blocks']), page['prompt'], page['response'], page['id'], (page['response'].strip(),),
                 tuple(page['gold']), continued=tuple(range(1, len(page['blocks']))))


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
    self._facts = (_PAGES, length, max_blocks, style, 0, block_tokens, shared_first, self._cut_share,
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
    return [encode.whole(cut(parts)) for parts in self._encoder.parts(drawn)]

  def cut_examples(self, numbers: Sequence[int]) -> list[Example]:
    """The pages of these numbers as text, the share of the cutter in its blocks."""
    drawn = [self.example(i) for i in numbers]
    if self._cutter is None:
      return drawn
    chosen = [i for i, number in enumerate(numbers) if self.is_cut(number)]
    for i, example in zip(chosen, recut_all([drawn[i] for i in chosen], self._cutter)):
      drawn[i] = example
    return drawn

  def is_cut(self, number: int) -> bool:
    """Whether the cutter makes the blocks of page `number`: of all pages of a row, or of none, so that it is called
    for few rows."""
    row = number // self.pages_per_row
    return self._cut_share > 0 and np.random.default_rng([_CUT_SEED, row]).random() < self._cut_share

  def example(self, number: int) -> Example:
    """Page `number` as text."""
    return page_example(number, self._containers, self._style)

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
