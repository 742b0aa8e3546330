"""Encoded documents of a file on disk, made once and mapped into memory by whoever needs them.

A store is a folder of .npy files whose name is a hash of all that decides its documents (`store_key`): the file's bytes, the
tokenizer, the options, and the cutter where one cuts the contexts.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import logging
import os
import pathlib
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from blockattn import locks
from blockattn.data import encode, json_lines, prompts
from blockattn.data.example import Example, recut
from blockattn.errors import UserError

FORMAT = 2             # of the documents; part of every key and fingerprint
_ARRAYS = {'tokens': np.int32, 'ends': np.int64, 'lengths': np.int32, 'gold': bool, 'block_ends': np.int64,
           'answers': np.int32}
_CUT_AT_A_TIME = 64    # examples that a cutter is given together
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class FileOptions:
  """How files become rows. Everything but `shared_first` and `window` is part of the cache's key.

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
    fingerprint: of everything that decides the cuts; part of the cache's key.
  """
  fingerprint: str

  def __call__(self, texts: Sequence[str]) -> Sequence[Sequence[int]]:
    """The cuts of each text: strictly increasing character offsets."""


def recut_all(examples: Iterable[Example], cutter: Cutter) -> Iterator[Example]:
  """The examples with the contexts cut by `cutter`, some at a time."""
  waiting = iter(examples)
  while some := list(itertools.islice(waiting, _CUT_AT_A_TIME)):
    cuts = cutter([''.join(example.blocks) for example in some])
    yield from (recut(example, own) for example, own in zip(some, cuts, strict=True))


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
    self.report = json_lines.Report.from_json(meta['report'])
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


def store_key(file: str, encoder_print: str, options: FileOptions, cutter: Cutter | None = None) -> str:
  """The cache's key: a hash of the file's bytes and compression, the tokenizer, the options and the cutter."""
  with open(file, 'rb') as stream:
    content = hashlib.file_digest(stream, 'sha256').hexdigest()
  decisive = dataclasses.replace(options, shared_first=False, window=0)
  facts = (FORMAT, file.endswith('.gz'), content, encoder_print, decisive, *([cutter.fingerprint] if cutter else []))
  return hashlib.sha256(repr(facts).encode()).hexdigest()[:32]


def open_store(file: str, tokenizer: Any, encoder: encode.Encoder, options: FileOptions, cache: str | os.PathLike, *,
               strict: bool = False, progress: Callable[[str, int], None] | None = None,
               cutter: Cutter | None = None) -> DocStore:
  """The encoded documents of a file, from the cache if it has them, else encoded and put there.

  The store is written under another name and renamed when it is whole. Of several processes that want the same one, the
  first makes it and the others wait; where the cache's filesystem has no locks all make it, and one of them wins. A store
  that is damaged is written anew.

  Raises:
    json_lines.BadLineError: `strict`, and the file has a malformed line.
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
    raise json_lines.BadLineError(store.report.listed[0])
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
  report = json_lines.Report()
  examples = prompts.read_examples(file, report=report, strict=strict, chat=options.chat, template=options.template,
                                    tokenizer=tokenizer, progress=progress)
  if cutter is not None:
    examples = recut_all(examples, cutter)
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
