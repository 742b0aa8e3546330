"""Where rows come from: JSON lines, parquet, Arrow and Hugging Face datasets, each as a table of records.

A table is read in pieces, each alone and in any order, so that whoever shuffles them has neither all of a file in memory
nor has to wait until it is read: a JSON lines file by ranges of bytes, parquet by row groups, Arrow files and datasets
where they are mapped into memory. A compressed JSON lines file can only be read from its beginning: its text is put into an
unnamed file (in TMPDIR) when it is opened. Who wants the records in order, perhaps the first ones only, takes `in_order`.

A record is a dict as JSON lines hold it: its columns are named as `Origin.columns` says, and nulls are left out.
"""

import dataclasses
import gzip
import hashlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from blockattn import disk, errors, hub, options, tree
from blockattn.data import json_lines
from blockattn.data.json_lines import Malformed
from blockattn.errors import UserError

MODES = ('block', 'full')
HUB = 'hub:'
SUFFIXES = (*json_lines.SUFFIXES, '.parquet', '.arrow', '.feather')
PIECE = 1 << 18        # bytes of a piece
_GROUP = 1 << 28       # bytes of the largest row group: so much is read to have some of its rows
_LOOKED_AT = 64        # rows of a parquet file, to guess the size of all
_PARTS = 16            # pieces of a row group at most: each costs reading the whole group
_SAMPLES = 256         # places of a large file that its fingerprint is made of
_COLUMNS = ('passages', 'blocks', 'messages', 'text', 'question', 'prompt', 'response', 'answers', 'gold', 'continued', 'id',
            'tools')
_LISTS = ('blocks', 'answers')   # a column of texts becomes lists of one


@dataclasses.dataclass(frozen=True)
class Origin:
  """One entry of `data.files`.

  Attributes:
    path: a file, a folder, a glob; a folder of `datasets`' save_to_disk; or hub:OWNER/NAME, a dataset of the hub, with
      @REVISION behind it where it is not to be its newest.
    weight: share of the rows that are trained on; None: what the others leave.
    mode: 'block', or 'full': the context is one block with the question, read with full attention.
    columns: their name of a column -> ours; 'answers.text' is a field of a column.
    name: configuration of a dataset of the hub.
    split: of a dataset.
  """
  path: str
  weight: float | None = None
  mode: str = 'block'
  columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
  name: str = ''
  split: str = 'train'

  def __post_init__(self):
    errors.check_choice(f'config.data.files: mode of {self.path}', self.mode, MODES)
    if self.weight is not None:
      errors.check_number(f'config.data.files: weight of {self.path}', self.weight, above=0)
    for theirs, ours in self.columns.items():
      if ours not in _COLUMNS:
        raise UserError(f'columns={{{theirs!r}: {ours!r}}}: no such column is read; {tree.did_you_mean(ours, _COLUMNS)}')
    disk.check_local([f'config.data.files={self.path}'])


def origin(entry: str | Mapping[str, Any] | Origin, columns: Mapping[str, str] = {}) -> Origin:
  """The `Origin` of an entry, a path or a dict; `columns` are those of an entry that says none. In a config, whose names
  have no dots, {'answers': {'text': ...}} stands for {'answers.text': ...}."""
  if isinstance(entry, Origin):
    return entry
  columns = options.flat(dict(columns))
  if isinstance(entry, str | os.PathLike):
    return Origin(os.fspath(entry), columns=columns)
  known = [field.name for field in dataclasses.fields(Origin)]
  if not isinstance(entry, Mapping):
    raise UserError(f"config.data.files: {entry!r} is neither a path nor a dict of {', '.join(known)}")
  for key in entry:
    if key not in known:
      raise UserError(f'config.data.files: {dict(entry)} has {key!r}; {tree.did_you_mean(key, known)}')
  if not isinstance(entry.get('path'), str):
    raise UserError(f"config.data.files: {dict(entry)} has no 'path'; name a file, a folder or {HUB}OWNER/NAME")
  said: dict[str, Any] = {'columns': columns} | dict(entry)
  return Origin(**said)


class Table(Protocol):
  """Records that are read in pieces.

  Attributes:
    name: in errors, such as the file's path.
    fingerprint: of its content.
    columns: names of columns, see `Origin`.
    pieces: how many there are.
    bytes: of all of them, about.
  """
  name: str
  fingerprint: str
  columns: Mapping[str, str]
  pieces: int
  bytes: int

  def read(self, piece: int) -> Iterator[tuple[Any, dict | Malformed]]:
    """(place, its record or what is wrong with it) of every row of a piece, in order."""
    ...

  def line(self, place: Any) -> int:
    """The row's number in the file, from 1."""
    ...


def open_tables(source: Origin, piece: int = PIECE) -> list[Table]:
  """The tables that an origin names, each a file or a dataset; `piece`: bytes of a piece.

  Raises:
    FileNotFoundError: it names nothing.
    ValueError: a file that cannot be read, or one without a column that `Origin.columns` names.
  """
  folder = pathlib.Path(source.path).expanduser()
  if source.path.startswith(HUB) or any((folder / name).is_file() for name in ('dataset_dict.json', 'state.json')):
    return [_dataset(source, piece)]
  return [_open_file(file, source.columns, piece) for file in find_files(source.path)]


def in_order(file: str) -> Iterator[tuple[int, dict | Malformed]]:
  """(number from 1, its record or what is wrong with it) of every row of a file; no more of it is read than is asked for."""
  if file.endswith(json_lines.SUFFIXES):
    yield from ((number, _record(line, {})) for number, line in json_lines.numbered_lines(file))
    return
  for table in open_tables(Origin(file)):
    yield from ((table.line(place), record) for piece in range(table.pieces) for place, record in table.read(piece))


def find_files(patterns: str | pathlib.Path | Sequence[str | pathlib.Path]) -> list[str]:
  """`json_lines.find_files` of all kinds of files."""
  return json_lines.find_files(patterns, SUFFIXES)


def _open_file(file, columns, piece):
  try:
    if file.endswith(json_lines.SUFFIXES):
      return JsonLines(file, columns, piece)
    return _parquet(file, columns, piece) if file.endswith('.parquet') else _arrow(file, columns, piece)
  except UserError:
    raise
  except (ValueError, OSError) as error:   # what pyarrow raises of a file that is none
    if getattr(error, 'errno', None):   # of the system, which says what is the matter
      raise
    raise UserError(f'{file}: cannot be read ({_line(error)}); it is cut off or of another kind: write it again') from error


def file_print(file: str) -> str:
  """A hash of a file's size and bytes; of a large file's, those of some places."""
  size = os.path.getsize(file)
  digest = hashlib.sha256(str(size).encode())
  with open(file, 'rb') as stream:
    if size <= _SAMPLES << 16:
      digest.update(hashlib.file_digest(stream, 'sha256').digest())
    else:
      for i in range(_SAMPLES):
        stream.seek((size - (1 << 16)) * i // (_SAMPLES - 1))
        digest.update(stream.read(1 << 16))
  return digest.hexdigest()[:32]


# JSON lines.


class JsonLines:
  """A file of JSON lines: a `Table` whose pieces are the lines that begin in so many bytes."""

  def __init__(self, file: str, columns: Mapping[str, str] = {}, piece: int = PIECE):
    self.name, self.fingerprint = file, file_print(file)
    self.columns, self._piece, self._path = columns, piece, file
    if file.endswith('.gz'):
      self._text = _decompressed(file)
      self._path = f'/proc/self/fd/{self._text.fileno()}'   # every reader has a position of its own
    self.bytes = os.path.getsize(self._path)
    self.pieces = max(1, -(-self.bytes // piece))
    self._before = {0: 0}   # lines in front of a piece, of those that are known

  def read(self, piece: int) -> Iterator[tuple[Any, dict | Malformed]]:
    start, stop, count = piece * self._piece, (piece + 1) * self._piece, 0
    with open(self._path, 'rb') as stream:
      if start:
        stream.seek(start - 1)
        stream.readline()   # which begins in an earlier piece
      at = stream.tell()
      while at < stop and (line := stream.readline()):
        at, count = at + len(line), count + 1
        line = line.removeprefix(json_lines.MARK) if at == len(line) else line
        if line.strip():
          yield (piece, count), _record(line, self.columns)
    if piece in self._before:
      self._before[piece + 1] = self._before[piece] + count

  def line(self, place):
    piece, count = place
    if piece not in self._before:
      with open(self._path, 'rb') as stream:
        rest, lines = piece * self._piece - 1, 1
        while rest and (some := stream.read(min(rest, PIECE))):
          rest, lines = rest - len(some), lines + some.count(b'\n')
      self._before[piece] = lines
    return self._before[piece] + count


def _record(line, columns):
  try:
    return _mapped(json_lines.load_object(line), columns)
  except Malformed as error:
    return error


def _decompressed(file):
  """An unnamed file of what a compressed one holds."""
  text = tempfile.TemporaryFile(prefix='blockattn-')
  with json_lines.naming_damage(file), gzip.open(file) as stream:
    shutil.copyfileobj(stream, text, 1 << 20)
  text.flush()
  return text


# Columns.


class Columns:
  """Arrow data: a `Table` whose pieces are ranges of rows of a group, such as parquet's row groups.

  Args:
    name, fingerprint: of the table.
    groups: (rows, bytes) of each.
    get: (group, its first row, the row behind its last) -> a pyarrow table or record batch.
    piece: bytes of a piece.
    parts: pieces of a group at most.
  """

  def __init__(self, name: str, fingerprint: str, columns: Mapping[str, str], groups: Sequence[tuple[int, int]],
               get: Callable[[int, int, int], Any], piece: int, parts: int | None = None):
    self.name, self.fingerprint, self.columns, self._get = name, fingerprint, columns, get
    self.bytes = sum(size for _, size in groups)
    self._pieces, first = [], 1
    for group, (rows, size) in enumerate(groups):
      count = max(1, min(-(-size // piece), rows, parts or rows))
      edges = [rows * i // count for i in range(count + 1)]
      self._pieces += [(group, a, b, first + a) for a, b in zip(edges, edges[1:]) if a < b]
      first += rows
    self.pieces = len(self._pieces)

  def read(self, piece: int) -> Iterator[tuple[Any, dict | Malformed]]:
    group, start, stop, first = self._pieces[piece]
    try:
      records = self._get(group, start, stop).to_pylist()
    except (ValueError, OSError) as error:
      raise UserError(f'{self.name}:{first}: rows cannot be read ({_line(error)}); the file is damaged: fetch or write it '
                      'again') from error
    for number, record in enumerate(records, first):
      try:
        yield number, _mapped(_without_nulls(record), self.columns)
      except Malformed as error:
        yield number, error

  def line(self, place):
    return place


def _parquet(file, columns, piece):
  library = _library('pyarrow.parquet', file)
  with library.ParquetFile(file) as opened:
    meta, wanted = opened.metadata, _wanted(file, opened.schema_arrow.names, columns)
    first = next(opened.iter_batches(_LOOKED_AT, range(min(meta.num_row_groups, 1)), wanted, use_threads=False), None)
  # A text that stands in many rows is stored once: what rows take in memory is seen by looking at some.
  each = first.nbytes / len(first) if first else 0
  groups = [(group.num_rows, max(group.total_byte_size, int(each * group.num_rows)))
            for group in map(meta.row_group, range(meta.num_row_groups))]
  for number, (_, size) in enumerate(groups):
    if size > _GROUP:
      raise UserError(f'{file}: row group {number} has {size >> 20} MB, and is read whole to have some of its rows: write '
                      'the file with smaller ones (pyarrow.parquet.write_table(..., row_group_size=1000))')

  def get(group, start, stop):
    with library.ParquetFile(file) as opened:
      return opened.read_row_group(group, columns=wanted, use_threads=False).slice(start, stop - start)

  return Columns(file, file_print(file), columns, groups, get, piece, _PARTS)


def _arrow(file, columns, piece):
  """The file format, feather version 2 included, by its record batches; the stream format as one table."""
  library = _library('pyarrow', file)
  mapped = library.memory_map(file)
  try:
    reader = library.ipc.open_file(mapped)
  except library.ArrowInvalid:
    mapped.seek(0)
    table = library.ipc.open_stream(mapped).read_all()
    table = table.select(_wanted(file, table.column_names, columns))
    groups = [(table.num_rows, table.nbytes)]
    return Columns(file, file_print(file), columns, groups, lambda _, a, b: table.slice(a, b - a), piece)
  wanted = _wanted(file, reader.schema.names, columns)
  batches = map(reader.get_batch, range(reader.num_record_batches))
  groups = [(batch.num_rows, batch.nbytes) for batch in batches]
  # A compressed batch is decompressed whole; the reader of a mapped file may be shared.
  get = lambda group, a, b: reader.get_batch(group).select(wanted).slice(a, b - a)
  return Columns(file, file_print(file), columns, groups, get, piece, _PARTS)


def _dataset(source, piece):
  library = _library('datasets', source.path)
  name, shown = source.path.removeprefix(HUB), source.path
  try:
    if source.path.startswith(HUB):
      shown = ':'.join(filter(None, (source.path, source.name, source.split)))
      repo, revision = hub.split(name)
      with hub.explained(f'{source.path}: nothing'):
        loaded = library.load_dataset(repo, source.name or None, split=source.split, revision=revision)
    else:
      loaded = library.load_from_disk(os.path.expanduser(name))
  except ValueError as error:
    raise UserError(f'{shown}: datasets cannot load it ({_line(error)}); give the entry the right name and split') from error
  if isinstance(loaded, dict):
    if source.split not in loaded:
      raise UserError(f"{shown}: no split {source.split!r}; give {{'path': {source.path!r}, 'split': ...}} of "
                      f'{", ".join(loaded)}')
    loaded, shown = loaded[source.split], f'{shown}:{source.split}'
  loaded = loaded.select_columns(_wanted(shown, loaded.column_names, source.columns)).with_format('arrow')
  size = loaded.data.nbytes * len(loaded) // max(loaded.data.num_rows, 1)
  get = lambda _, start, stop: loaded[start:stop]
  # Not datasets' own fingerprint, which is another one in every cache.
  some = sorted({len(loaded) * i // _SAMPLES for i in range(_SAMPLES)} if len(loaded) else ())
  content = hashlib.sha256(repr((len(loaded), [get(0, i, i + 1).to_pylist() for i in some])).encode()).hexdigest()[:32]
  return Columns(shown, content, source.columns, [(len(loaded), size)], get, piece)


def _library(name, what):
  return errors.library(name, f'{what}: reading it', 'data')


def _wanted(file, names, columns):
  """Of a table's columns those that are read."""
  roots = [theirs.partition('.')[0] if theirs not in names else theirs for theirs in columns]
  for theirs, root in zip(columns, roots):
    if root not in names:
      raise UserError(f'{file}: no column {theirs!r}, which columns reads as {columns[theirs]!r}; '
                      f'{tree.did_you_mean(root, names)}')
  wanted = [name for name in names if name in roots or (name in _COLUMNS and name not in columns.values())]
  if not {'passages', 'blocks', 'messages', 'text'} & ({*wanted} - {*roots} | {*columns.values()}):
    raise UserError(f'{file}: its columns are {", ".join(names)}, none of which is "passages", "blocks", "messages" or '
                    f"\"text\"; say which is: columns={{{names[0] if names else 'context'!r}: 'blocks', ...}}")
  return wanted


def _mapped(record, columns) -> dict:
  """A record with our names of the columns; a text in place of a list is its only element."""
  if not columns:
    return record
  mapped = {name: value for name, value in record.items()
            if name not in columns and name not in columns.values()}
  for theirs, ours in columns.items():
    value = _field(record, theirs)
    mapped[ours] = [value] if ours in _LISTS and isinstance(value, str) else value
  return mapped


def _field(record, path):
  value = record
  for name in [path] if path in record else path.split('.'):
    if not isinstance(value, dict) or name not in value:
      raise Malformed('missing key', f'"{path}", see columns; the row has {sorted(record)[:8]}')
    value = value[name]
  return value


def _without_nulls(value) -> Any:
  if isinstance(value, dict):
    return {name: _without_nulls(part) for name, part in value.items() if part is not None}
  return [_without_nulls(part) for part in value] if isinstance(value, list) else value


def _line(error):
  return ' '.join(str(error).split())[:200]
