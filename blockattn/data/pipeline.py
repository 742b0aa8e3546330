"""From files or the embedded corpus to the batches of one process.

A source is a random-access sequence of packed rows: `FileRows` reads files, `PageRows` the documentation of Python's
standard library, `Mixture` several sources. `batches` shuffles and batches a source with grain.

The order of rows is one stream: the epochs of the source one after the other, each shuffled with its own seed. Global
batch n is rows n * batch ... (n + 1) * batch - 1 of the stream, and a process takes those of them that its devices hold.
What a step trains on is therefore a function of (source, batch, seed, step) alone: it is the same for any number of
processes, and the state of the iterator is one integer, the next step. With it goes a fingerprint of the source, so that
a run does not go on with other data than it began with.

A batch may hold the end of one epoch and the beginning of the next. Rows that are left over at the end of the last
epoch, fewer than a batch, are dropped, or filled up with rows of padding: see `remainder`.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import logging
import os
import pathlib
import platform
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import grain
import numpy as np

from blockattn import locks
from blockattn.data import encode, packing, stdlib, text as text_lib
from blockattn.errors import UserError

REMAINDERS = ('drop', 'pad')
_FORMAT = 2            # of the cache; part of every key
_CUT_SEED = 7
_PROBED_PAGES = 64     # pages from which PageRows guesses how many fill a row
_ARRAYS = {'tokens': np.int32, 'ends': np.int64, 'lengths': np.int32, 'gold': bool, 'block_ends': np.int64,
           'answers': np.int32}
_CUT_AT_A_TIME = 64    # examples that a cutter is given together
_SHOWN = 3             # names in an error
_log = logging.getLogger(__name__)


class DataChanged(UserError):
  """The data is not that of the checkpoint that a run goes on from."""


class UnreadableRow(UserError):
  """A row of a source cannot be made; says where it comes from."""


@dataclasses.dataclass(frozen=True)
class FileOptions:
  """How files become rows. Everything but `shared_first` and `window` is part of the cache's key.

  Attributes:
    length: T, tokens of a row and at most of a document.
    max_blocks: blocks of a row and at most of a document.
    too_long: 'drop' or 'cut', see `encode.fit`.
    chat: see `text.read_examples`.
    template: see `text.read_examples`.
    bos: see `encode.Encoder`.
    block_tokens: 0 for the blocks that are given, else blocks of so many tokens, see `encode.recut`.
    shared_first: see `packing.pack_row`.
    window: see `packing.plan_rows`.
  """
  length: int
  max_blocks: int = 384
  too_long: str = 'drop'
  chat: bool = False
  template: text_lib.QuestionTemplate | None = None
  bos: str = 'auto'
  block_tokens: int = 0
  shared_first: bool = False
  window: int = 64


class DocStore:
  """Encoded documents of one file, memory-mapped: a read-only sequence of `EncodedDoc`.

  Attributes:
    report: of the file's lines.
    built: whether they were encoded just now, rather than found in the cache.
    key: see `store_key`.
  """

  def __init__(self, folder: pathlib.Path, file: str, *, built: bool = False):
    self.built, self.key = built, folder.name
    meta = json.loads((folder / 'meta.json').read_text())
    for name, size in meta['bytes'].items():
      if (folder / f'{name}.npy').stat().st_size != size:
        raise UserError(f'{folder}/{name}.npy is cut off or changed')
    self.report = text_lib.Report.from_json(meta['report'])
    # The same bytes may since have got another name.
    self.report.listed = [dataclasses.replace(bad, file=file) for bad in self.report.listed]
    self._arrays = {name: np.load(folder / f'{name}.npy', mmap_mode='r' if meta['docs'] else None) for name in _ARRAYS}
    if any(len(self._arrays[name]) != meta['docs'] for name in ('ends', 'block_ends', 'answers')):
      raise UserError(f'{folder}: its arrays disagree')

  def __len__(self):
    return len(self._arrays['ends'])

  def __getitem__(self, i: int) -> encode.EncodedDoc:
    start, block_start = (int(self._arrays[name][i - 1]) if i else 0 for name in ('ends', 'block_ends'))
    stop, block_stop = int(self._arrays['ends'][i]), int(self._arrays['block_ends'][i])
    return encode.EncodedDoc(np.asarray(self._arrays['tokens'][start:stop]),
                             tuple(self._arrays['lengths'][block_start:block_stop].tolist()),
                             tuple(self._arrays['answers'][i].tolist()),
                             tuple(self._arrays['gold'][block_start:block_stop].tolist()))

  @functools.cached_property
  def sizes(self) -> np.ndarray:
    """Tokens of each document."""
    return np.diff(self._arrays['ends'], prepend=0)

  @functools.cached_property
  def counts(self) -> np.ndarray:
    """Blocks of each document."""
    return np.diff(self._arrays['block_ends'], prepend=0)

  @property
  def block_lengths(self) -> np.ndarray:
    """Tokens of each block of every document."""
    return self._arrays['lengths']


class _Growing:
  """A .npy file that is appended to. numpy pads the header so that the first axis can grow in place."""

  def __init__(self, path, dtype, row=()):
    self._file, self._dtype, self._row, self._count = open(path, 'wb'), np.dtype(dtype), row, 0
    self._header()

  def _header(self):
    np.lib.format.write_array_header_1_0(self._file, {
        'descr': np.lib.format.dtype_to_descr(self._dtype), 'fortran_order': False, 'shape': (self._count, *self._row)})

  def append(self, rows):
    rows = np.asarray(rows, self._dtype)
    self._file.write(rows.tobytes())
    self._count += len(rows)

  def close(self):
    self._file.seek(0)
    self._header()
    self._file.seek(0, os.SEEK_END)
    size = self._file.tell()
    self._file.close()
    return size


def _write_store(docs, report, folder):
  files = {name: _Growing(folder / f'{name}.npy', dtype, (2,) if name == 'answers' else ())
           for name, dtype in _ARRAYS.items()}
  end = block_end = count = 0
  for doc in docs:
    end, block_end, count = end + len(doc.tokens), block_end + len(doc.lengths), count + 1
    gold = doc.gold or (False,) * len(doc.lengths)
    for name, rows in (('tokens', doc.tokens), ('ends', [end]), ('lengths', doc.lengths), ('gold', gold),
                       ('block_ends', [block_end]), ('answers', [doc.answer])):
      files[name].append(rows)
  sizes = {name: file.close() for name, file in files.items()}
  (folder / 'meta.json').write_text(json.dumps({'docs': count, 'bytes': sizes, 'report': report.to_json()}))


class Cutter(Protocol):
  """Cuts texts into blocks, in place of those that are given.

  Attributes:
    fingerprint: of everything that decides the cuts; part of the cache's key.
  """
  fingerprint: str

  def __call__(self, texts: Sequence[str]) -> Sequence[Sequence[int]]:
    """The cuts of each text: strictly increasing character offsets."""


def _recut_all(examples, cutter):
  """The examples with the contexts cut by `cutter`, some at a time."""
  while some := list(itertools.islice(examples, _CUT_AT_A_TIME)):
    cuts = cutter([''.join(example.blocks) for example in some])
    yield from (text_lib.recut(example, own) for example, own in zip(some, cuts, strict=True))


def store_key(file: str, encoder_print: str, options: FileOptions, cutter: Cutter | None = None) -> str:
  """The cache's key: a hash of the file's bytes and compression, the tokenizer, the options and the cutter."""
  with open(file, 'rb') as stream:
    content = hashlib.file_digest(stream, 'sha256').hexdigest()
  decisive = dataclasses.replace(options, shared_first=False, window=0)
  facts = (_FORMAT, file.endswith('.gz'), content, encoder_print, decisive, *([cutter.fingerprint] if cutter else []))
  return hashlib.sha256(repr(facts).encode()).hexdigest()[:32]


def open_store(file: str, tokenizer: Any, encoder: encode.Encoder, options: FileOptions, cache: str | os.PathLike, *,
               strict: bool = False, progress: Callable[[str, int], None] | None = None,
               cutter: Cutter | None = None) -> DocStore:
  """The encoded documents of a file, from the cache if it has them, else encoded and put there.

  The store is written under another name and renamed when it is whole. Of several processes that want the same one, the
  first makes it and the others wait; where the cache's filesystem has no locks all make it, and one of them wins. A store
  that is damaged is written anew.

  Raises:
    text.BadLineError: `strict`, and the file has a malformed line.
  """
  folder = pathlib.Path(cache) / store_key(file, encoder.fingerprint, options, cutter)
  store = _load_store(folder, file)
  if store is None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locks.held(folder.with_name(f'.{folder.name}.lock'), wait=True):
      store = _load_store(folder, file, mend=True)   # another process may have made it meanwhile
      if store is None:
        _build_store(folder, file, tokenizer, encoder, options, strict, progress, cutter)
        store = DocStore(folder, file, built=True)
  if strict and store.report.listed:
    raise text_lib.BadLineError(store.report.listed[0])
  return store


def _load_store(folder, file, *, mend=False):
  """None if there is none, or none that is whole; `mend`: clears the remains of such a one away."""
  if not folder.exists():
    return None
  try:
    return DocStore(folder, file)
  except (OSError, ValueError, KeyError, TypeError) as error:
    if mend:
      _log.warning('cached documents are damaged (%s); encoding them anew', error)
      shutil.rmtree(folder, ignore_errors=True)
    return None


def _build_store(folder, file, tokenizer, encoder, options, strict, progress, cutter):
  report = text_lib.Report()
  examples = text_lib.read_examples(file, report=report, strict=strict, chat=options.chat, template=options.template,
                                    tokenizer=tokenizer, progress=progress)
  if cutter is not None:
    examples = _recut_all(examples, cutter)
  docs = encode.encode_examples(examples, encoder, length=options.length, max_blocks=options.max_blocks,
                                too_long=options.too_long, block_tokens=options.block_tokens, report=report)
  work = folder.with_name(f'{folder.name}.tmp-{uuid.uuid4().hex}')   # not tempfile's, which are of one user alone
  try:
    work.mkdir()
    _write_store(docs, report, work)
    try:
      os.rename(work, folder)
    except OSError:
      if not folder.exists():
        raise
  finally:
    shutil.rmtree(work, ignore_errors=True)


class FileRows:
  """Packed rows of files: a source.

  Args:
    files: see `text.find_files`.
    tokenizer: from `encode.load_tokenizer`.
    options: `FileOptions`.
    cache: folder for encoded documents, made if absent. Each file is cached on its own.
    strict: raise at the first malformed line.
    progress: called with (file, bytes of it read so far) while a file is encoded.
    cutter: cuts the contexts, in place of the blocks that are given; None: these.

  Attributes:
    files, stores: the files in order, and their `DocStore`s.
    report: the files' reports added up.
    plan: for each row the numbers of its documents.

  Raises:
    text.BadLineError: `strict` and a line is malformed.
    ValueError: not one document is left.
  """

  def __init__(self, files: str | Sequence[str], tokenizer: Any, options: FileOptions, cache: str | os.PathLike, *,
               strict: bool = False, progress: Callable[[str, int], None] | None = None,
               encoder: encode.Encoder | None = None, cutter: Cutter | None = None):
    encoder = encoder or encode.Encoder(tokenizer, bos=options.bos)
    self.options = options
    self.length = options.length
    self.files = text_lib.find_files(files)
    self.stores = [open_store(file, tokenizer, encoder, options, cache, strict=strict, progress=progress, cutter=cutter)
                   for file in self.files]
    self.report = sum((store.report for store in self.stores), text_lib.Report())
    self.sizes = np.concatenate([store.sizes for store in self.stores])
    if not len(self.sizes):
      raise UserError(f'{", ".join(self.files)}: no document to train on\n{self.report.summary()}')
    self._starts = np.cumsum([0, *map(len, self.stores)])
    counts = np.concatenate([store.counts for store in self.stores])
    self.plan = packing.plan_rows(self.sizes, counts, length=options.length, max_blocks=options.max_blocks,
                                  window=options.window)

  def __len__(self):
    return len(self.plan)

  def doc(self, i: int) -> encode.EncodedDoc:
    """Document i, counted over all files."""
    store = int(np.searchsorted(self._starts, i, side='right')) - 1
    return self.stores[store][i - int(self._starts[store])]

  def __getitem__(self, row: int) -> dict:
    docs = [self.doc(i) for i in self.plan[row]]
    return packing.pack_row(docs, self.length, shared_first=self.options.shared_first)

  def where(self, row: int) -> str:
    """The documents of a row, each with its file, for an error."""
    stores = (np.searchsorted(self._starts, self.plan[row], side='right') - 1).tolist()
    return ', '.join(f'{self.files[store]} (document {i - int(self._starts[store])})'
                     for i, store in zip(self.plan[row], stores, strict=True))

  def fingerprint(self) -> dict[str, str]:
    """What the rows are made of, by name: of each file its bytes and all that decides how they are encoded."""
    return {file: store.key for file, store in zip(self.files, self.stores, strict=True)}


class PageRows:
  """Packed rows of pages of the embedded corpus: a source.

  Row i draws the pages i * K ... i * K + K - 1 and packs, in order, those that still fit; K is a little more than
  fills a row. A row depends on its number and the arguments alone.

  Args:
    containers: tuple of `stdlib.Container`.
    style: `stdlib.PageStyle`.
    tokenizer: from `encode.load_tokenizer`.
    length: T.
    max_blocks: blocks of a row.
    rows: rows of an epoch. There is no end of pages; a training run asks for as many rows as it needs.
    first_page: number of row 0's first page; different ranges of one corpus are different questions.
    pages_per_row: K; None to guess it from some pages' lengths.
    block_tokens: 0 for the pages' own blocks, else blocks of so many tokens, see `encode.recut`.
    shared_first: see `packing.pack_row`.
    cutter, cut_share: cuts the pages of this share of the rows, drawn by their numbers, in place of the pages' blocks.

  Raises:
    ValueError: the row is so short, or the bound on blocks so low, that no page fits.
  """

  def __init__(self, containers: Sequence[stdlib.Container], style: stdlib.PageStyle, tokenizer: Any, *, length: int,
               max_blocks: int = 384, rows: int = 1_000_000, first_page: int = 0, pages_per_row: int | None = None,
               block_tokens: int = 0, shared_first: bool = False, encoder: encode.Encoder | None = None,
               cutter: Cutter | None = None, cut_share: float = 0.0):
    self._cutter, self._cut_share = cutter, cut_share if cutter else 0.0
    self.length, self.max_blocks, self.shared_first = length, max_blocks, shared_first
    self.block_tokens = block_tokens
    self._containers, self._style, self._rows, self._first = tuple(containers), style, rows, first_page
    self._facts = (_FORMAT, length, max_blocks, style, first_page, block_tokens, shared_first, self._cut_share,
                   cutter.fingerprint if cutter else '')
    self._encoder = encoder or encode.Encoder(tokenizer)
    self.pages_per_row = pages_per_row or 1
    self.pages_per_row = pages_per_row or self._guess()

  def _guess(self):
    docs = self.pages(range(self._first, self._first + _PROBED_PAGES))
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

  def cut_examples(self, numbers: Sequence[int]) -> list[text_lib.Example]:
    """The pages of these numbers as text, the share of the cutter in its blocks."""
    drawn = [self.example(i) for i in numbers]
    chosen = [i for i, number in enumerate(numbers) if self.is_cut(number)]
    for i, example in zip(chosen, _recut_all(iter([drawn[i] for i in chosen]), self._cutter)):
      drawn[i] = example
    return drawn

  def is_cut(self, number: int) -> bool:
    """Whether the cutter makes the blocks of page `number`: of all pages of a row, or of none, so that it is called
    for few rows."""
    row = number // self.pages_per_row
    return self._cut_share > 0 and np.random.default_rng([_CUT_SEED, row]).random() < self._cut_share

  def example(self, number: int) -> text_lib.Example:
    """Page `number` as text."""
    page = stdlib.make_page(number, self._containers, self._style)
    return text_lib.Example(tuple(page['blocks']), page['prompt'], page['response'], page['id'],
                            (page['response'].strip(),), tuple(page['gold']))

  def __len__(self):
    return self._rows

  def __getitem__(self, row: int) -> dict:
    return packing.pack_row(self.docs(row), self.length, shared_first=self.shared_first)

  def docs(self, row: int) -> list[encode.EncodedDoc]:
    """The documents of a row."""
    first = self._first + int(row) * self.pages_per_row
    room, places, chosen = self.length, self.max_blocks, []
    for doc in self.pages(range(first, first + self.pages_per_row)):
      if len(doc.tokens) <= room and len(doc.lengths) <= places:
        room, places = room - len(doc.tokens), places - len(doc.lengths)
        chosen.append(doc)
    return chosen

  def where(self, row: int) -> str:
    """The pages of a row, for an error."""
    first = self._first + int(row) * self.pages_per_row
    return f'pages {first} to {first + self.pages_per_row - 1} of the standard library'

  def fingerprint(self) -> dict[str, str]:
    """As of `FileRows`; the library's documentation is another one in every version of Python."""
    facts = (*self._facts, self.pages_per_row, self._encoder.fingerprint, self._containers)
    digest = hashlib.sha256(repr(facts).encode()).hexdigest()[:32]
    return {"pages of Python's standard library": f'{digest}, Python {platform.python_version()}'}


@dataclasses.dataclass(frozen=True)
class Mixture:
  """Rows of several sources in proportion to `weights`, each source shuffled and repeated on its own.

  The weights are shares of rows, kept at every point of the stream. A mixture has no epochs and no length.
  """
  sources: tuple[Any, ...]
  weights: tuple[float, ...]

  def __post_init__(self):
    if len(self.sources) != len(self.weights) or not self.sources or min(self.weights) <= 0:
      raise UserError(f'{len(self.sources)} sources with weights {self.weights}: give every source a positive weight, '
                      'and leave out those that are not wanted')
    if len({source.length for source in self.sources}) > 1:
      raise UserError(f'sources of rows of different lengths {[s.length for s in self.sources]}; use one length')

  @property
  def length(self) -> int:
    return self.sources[0].length

  def fingerprint(self) -> dict[str, str]:
    """As of `FileRows`, with the number of the source in front of each name."""
    return {f'source {i}: {name}': value for i, source in enumerate(self.sources)
            for name, value in fingerprint(source).items()}


class Batches(Iterator):
  """The batches of one process, from `batches`. The state is the next step and the source's fingerprint.

  Attributes:
    fingerprint: of the source, name -> value.
  """

  def __init__(self, dataset, start_step: int, source_print: dict[str, str]):
    self._iterator = iter(dataset)
    self.fingerprint = source_print
    self.set_state({'next_step': start_step})

  def __next__(self) -> dict:
    batch = next(self._iterator)
    self._step += 1
    return batch

  def get_state(self) -> dict:
    """{'next_step': the step whose batch `next` gives, 'source': its fingerprint}."""
    return {'next_step': self._step, 'source': self.fingerprint}

  def set_state(self, state: dict):
    """Goes to a step, forwards or backwards; nothing is read on the way.

    Raises:
      ValueError: no such state or step.
      DataChanged: the state is that of other data.
    """
    step = state['next_step'] if isinstance(state, dict) and 'next_step' in state else None
    if type(step) is not int or step < 0 or state.keys() - {'next_step', 'source'}:
      raise UserError(f"the state of the data is {{'next_step': an integer from 0}}, not {state!r}")
    if 'source' in state:   # a checkpoint of before there were fingerprints says nothing
      _check_same(state['source'], self.fingerprint)
    try:
      self._iterator.set_state({'next_index': step})
    except IndexError as error:
      raise UserError(f'step {step} is behind the last batch; train for more epochs') from error
    self._step = step

  def close(self):
    """Ends the thread that reads ahead."""
    self._iterator.close()


def _check_same(before: dict[str, str], now: dict[str, str]):
  kinds = {'is new': now.keys() - before.keys(), 'is gone': before.keys() - now.keys(),
           'has changed, or what reads it (the tokenizer, the segmenter, Python itself)':
           {name for name in now.keys() & before.keys() if now[name] != before[name]}}
  told = [f'{name} {kind}' for kind, names in kinds.items() for name in sorted(names)]
  if told:
    more = f'; and {len(told) - _SHOWN} more' if len(told) > _SHOWN else ''
    raise DataChanged(f'this run was trained on other data: {"; ".join(told[:_SHOWN])}{more}. Put the data back as it was '
                      'to go on, or begin anew with another --workdir')


def batches(source: Any, *, batch: int, seed: int, rows: Sequence[int] | None = None, start_step: int = 0,
            epochs: int | None = None, shuffle: bool = True, remainder: str = 'drop', prefetch: int = 2) -> Batches:
  """The batches that one process sees.

  Args:
    source: `FileRows`, `PageRows`, `Mixture`, or any random-access source of rows with `length`. If it has
      `fingerprint()`, other data is refused later; if it has `where(row)`, a row that cannot be read is named by that.
    batch: rows of the global batch, B.
    seed: of the shuffling, 0 to 2**32 - 1.
    rows: which of the B rows of each global batch are read, numbers from 0, ascending; None: all.
    start_step: the first step.
    epochs: how often the source is gone through; None: without end.
    shuffle: every epoch in another order; False: in the source's.
    remainder: what becomes of the rows, fewer than a batch, at the end of the last epoch: 'drop', or 'pad' with rows of
      padding (document 0, no target), so that an evaluation sees every row once.
    prefetch: batches that a thread prepares ahead; 0: none, no thread. There are no worker processes: what goes wrong
      while a batch is prepared is raised when it is asked for.

  Returns:
    Iterator of batches: dicts of numpy arrays as from `packing.pack_row`, with a leading axis of len(rows) rows.

  Raises:
    ValueError: the arguments do not go together.
  """
  if remainder not in REMAINDERS:
    raise UserError(f'remainder={remainder!r}; choose one of {", ".join(REMAINDERS)}')
  own = range(batch) if rows is None else tuple(rows)
  if batch < 1 or not own or sorted({*own}) != [*own] or own[0] < 0 or own[-1] >= batch:
    raise UserError(f'rows {own} of a batch of {batch}: give some of its rows, each once, ascending')
  stream = _stream(source, seed, epochs, shuffle)
  if epochs is None:
    steps = np.iinfo(np.int64).max // batch
  else:
    steps = len(stream) // batch if remainder == 'drop' else -(-len(stream) // batch)
  if steps == 0:
    raise UserError(f'{len(stream)} rows are less than one batch of {batch}: use a smaller batch, more epochs, or '
                    "remainder='pad'")
  padding = functools.partial(packing.pack_row, (), source.length)

  def step_batch(step):
    return _stack([stream[i] if i < len(stream) else padding() for i in (step * batch + row for row in own)])

  options = grain.ReadOptions(num_threads=1 if prefetch else 0, prefetch_buffer_size=prefetch)
  return Batches(grain.MapDataset.range(steps).map(step_batch).to_iter_dataset(options), start_step, fingerprint(source))


def fingerprint(source: Any) -> dict[str, str]:
  """What a source is made of, name -> value; {} for one that does not say."""
  return source.fingerprint() if hasattr(source, 'fingerprint') else {}


class _Readable:
  """A source whose errors say of which row they are."""

  def __init__(self, source):
    self._source = source

  def __len__(self):
    return len(self._source)

  def __getitem__(self, row):
    try:
      return self._source[row]
    except Exception as error:
      place = self._source.where(row) if hasattr(self._source, 'where') else type(self._source).__name__
      raise UnreadableRow(f'row {row} of the data, {place}, cannot be read: {type(error).__name__}: {error}') from error


def _stack(rows):
  return grain.experimental.batch_and_pad(rows, batch_size=len(rows))


def _stream(source, seed, epochs, shuffle):
  """The rows of all epochs, in order, as a grain dataset."""
  if isinstance(source, Mixture):
    if epochs is not None:
      raise UserError('a mixture has no epochs: leave epochs None and bound the steps')
    # Seeds far apart: grain shuffles epoch e with seed + e, and two sources must not share an order.
    seeds = np.random.SeedSequence(seed).generate_state(len(source.sources))
    parts = [_stream(part, int(s), None, shuffle) for part, s in zip(source.sources, seeds, strict=True)]
    return grain.MapDataset.mix(parts, list(source.weights))
  if len(source) == 0:
    raise UserError('the source has no rows')
  rows = grain.MapDataset.source(_Readable(source))
  if shuffle:
    rows = rows.shuffle(seed=int(np.random.SeedSequence(seed).generate_state(1)[0]))
  return rows.repeat(epochs)


def row_numbers(source: Any, count: int, seed: int) -> np.ndarray:
  """Which rows of a source stand in the first `count` rows of its shuffled stream: int64, ascending, each once."""
  if count >= len(source):
    return np.arange(len(source))
  numbers = _stream(range(len(source)), seed, None, True)
  return np.unique([numbers[i] for i in range(count)])


def describe(source: Any, *, rows: int = 32) -> dict:
  """Statistics of a source.

  Args:
    source: `FileRows` (exact), `PageRows` (estimated from its first rows) or `Mixture`.
    rows: how many rows of a `PageRows` are looked at.

  Returns:
    docs, tokens, rows, padding (share of all tokens), blocks_per_doc (mean), block_tokens and doc_tokens (quantiles by
    name: min, p10, p50, p90, max), and for files lines, examples, cut, and the counters bad and dropped by reason. For
    a mixture a list under 'sources' and the 'weights'.
  """
  if isinstance(source, Mixture):
    return {'sources': [describe(part, rows=rows) for part in source.sources], 'weights': list(source.weights)}
  if isinstance(source, FileRows):
    report = source.report
    lengths = np.concatenate([store.block_lengths for store in source.stores])
    extra = {'lines': report.lines, 'examples': report.examples, 'cut': report.cut, 'bad': dict(report.bad),
             'dropped': dict(report.dropped)}
    return _statistics(source.sizes, lengths, len(source), source.length) | extra
  docs = [doc for row in range(min(rows, len(source))) for doc in source.docs(row)]
  return _statistics([len(doc.tokens) for doc in docs], [n for doc in docs for n in doc.lengths],
                     min(rows, len(source)), source.length)


def _statistics(sizes, lengths, rows, length):
  quantiles = lambda x: dict(zip(('min', 'p10', 'p50', 'p90', 'max'),
                                 np.quantile(x, (0, .1, .5, .9, 1)).round().astype(int).tolist(), strict=True))
  tokens = int(np.sum(sizes))
  return {'docs': len(sizes), 'tokens': tokens, 'rows': rows, 'padding': 1 - tokens / (rows * length),
          'blocks_per_doc': len(lengths) / len(sizes), 'block_tokens': quantiles(lengths),
          'doc_tokens': quantiles(sizes)}
