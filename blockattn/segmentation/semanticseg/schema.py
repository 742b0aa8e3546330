"""A document that somebody cut into blocks: one JSON object a line.

  {"id": "peps/pep-0008", "category": "specs", "source": "github.com/python/peps:peps/pep-0008.rst",
   "license": "CC0-1.0", "blocks": ["Introduction\\n\\n", "Code lay-out\\n\\n", ...]}

The text is the blocks joined, so a document cannot disagree with its cuts. Files are named {split}_{category}.jsonl or
.jsonl.gz; a large one may come in parts, {split}_{category}-00001-of-00010.jsonl.gz. Other keys of a line are ignored.

Reasons for which a line is refused, each counted on its own: 'bad JSON', 'invalid UTF-8', 'NUL character', 'not an
object', 'missing key', 'wrong type', 'empty text' (of the id, category, source or licence: a row without a licence is
not to be passed on), 'empty blocks' (none), 'empty block' (nothing but white space), 'other category' (than the file's
name says), 'duplicate id' (within a split).
"""

import dataclasses
import functools
import gzip
import io
import itertools
import json
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence

from blockattn import disk
from blockattn.data import json_lines
from blockattn.errors import UserError

SPLITS = ('train', 'validation', 'test')
KEYS = ('id', 'category', 'source', 'license', 'blocks')
_NAME = re.compile(rf'({"|".join(SPLITS)})_([a-z0-9_]+?)(?:-\d+-of-\d+)?\.jsonl(?:\.gz)?')


@dataclasses.dataclass(frozen=True)
class Document:
  """A text and its blocks."""
  id: str   # unique within a split
  category: str   # the kind of text, such as 'books'
  source: str   # where it is from
  license: str   # under which it may be passed on
  blocks: tuple[str, ...]   # pieces of the text, none of them blank

  @property
  def text(self) -> str:
    return ''.join(self.blocks)

  @property
  def cuts(self) -> tuple[int, ...]:
    """Character offsets where one block ends and the next starts: len(blocks) - 1 of them, strictly increasing."""
    return tuple(itertools.accumulate(map(len, self.blocks[:-1])))


@dataclasses.dataclass(frozen=True)
class File:
  """A file of documents, of one split and one category, as its name says."""
  path: str
  split: str
  category: str


def name_of(path: str | os.PathLike) -> File:
  """What a file's name says of it; ValueError if that is not {split}_{category}.jsonl, or .jsonl.gz."""
  match = _NAME.fullmatch(os.path.basename(path))
  if match is None:
    raise UserError(f'{path}: the name must be {{split}}_{{category}}.jsonl or .jsonl.gz, the split one of '
                    f'{", ".join(SPLITS)}, the category of a-z, 0-9 and _')
  return File(os.fspath(path), *match.groups())


def find(patterns: str | pathlib.Path | Sequence[str | pathlib.Path],
         categories: Sequence[str] | None = None) -> list[File]:
  """The files that paths, folders and globs name, by category, split and path; those of some categories only if asked.
  Raises FileNotFoundError: a pattern names nothing; ValueError: a file's name says no split, or there is no file of a
  category."""
  files = [name_of(path) for path in json_lines.find_files(patterns)]
  found = {file.category for file in files}
  missing = sorted(set(categories or ()) - found)
  if missing:
    raise UserError(f'no files of {", ".join(missing)} here; there are {", ".join(sorted(found))}')
  kept = [file for file in files if not categories or file.category in categories]
  return sorted(kept, key=lambda file: (file.category, SPLITS.index(file.split), file.path))


def read(paths: str | pathlib.Path | Sequence[str | pathlib.Path], report: json_lines.Report | None = None, *,
         strict: bool = False) -> Iterator[Document]:
  """The documents of files, see `json_lines.find_files`. Ids differ within a split; files whose names say none are one.

  Args:
    report: counts lines, documents (`examples`) and bad lines as they are read.
    strict: raise at the first bad line instead of counting it.

  Raises BadLineError: a bad line, if `strict`; ValueError: a file's compression is damaged."""
  return (document for _, _, document in read_numbered(paths, report, strict=strict))


def read_numbered(paths: str | pathlib.Path | Sequence[str | pathlib.Path], report: json_lines.Report | None = None, *,
                  strict: bool = False) -> Iterator[tuple[str, int, Document]]:
  """As `read`, each document with its file and the number of its line, from 1."""
  report = json_lines.Report() if report is None else report
  seen = {}
  for file in json_lines.find_files(paths):
    match = _NAME.fullmatch(os.path.basename(file))
    split, category = match.groups() if match else ('', None)
    parse_here = functools.partial(_parse_in, file, category, seen.setdefault(split, {}))
    for number, document in json_lines.parsed_lines(file, parse_here, report, strict=strict):
      yield file, number, document


def _parse_in(file, category, ids, number, line) -> Document:
  """`parse`, of a line of a file whose name says its category; `ids` are those of its split, with where they stand."""
  document = parse(line)
  if category not in (None, document.category):
    raise json_lines.Malformed('other category', f'{document.category!r} in a file of {category!r}')
  check_new(document, ids.setdefault(document.id, (file, number)), (file, number))
  return document


def check_new(document: Document, first: tuple[str, int], here: tuple[str, int]):
  """Refuses a document whose id was first seen at another (file, line) than here."""
  if first != here:
    raise json_lines.Malformed('duplicate id', f'{document.id!r} is also at {first[0]}:{first[1]}')


def parse(line: bytes | str) -> Document:
  """One line as a document, or json_lines.Malformed, with a reason and a detail."""
  record = json_lines.load_object(line)
  values = [json_lines.get_text(record, key) for key in KEYS[:-1]]
  blocks = json_lines.get_value(record, 'blocks', list)
  if not blocks:
    raise json_lines.Malformed('empty blocks', '"blocks" is empty')
  return Document(*values, blocks=tuple(json_lines.check_text(block, f'"blocks"[{i}]', 'empty block')
                                        for i, block in enumerate(blocks)))


def to_line(document: Document) -> str:
  """The document as one line of JSON, without its end."""
  return json.dumps(dataclasses.asdict(document), ensure_ascii=False)


def write(path: str | os.PathLike, documents: Iterable[Document]) -> int:
  """Writes documents to a .jsonl or .jsonl.gz file, which appears when it is whole; returns how many there were.

  The same documents give the same bytes: the compressed form holds neither a name nor a time.
  """
  path = pathlib.Path(path)
  if not path.name.endswith(json_lines.SUFFIXES):
    raise UserError(f'{path}: the name must end in {" or ".join(json_lines.SUFFIXES)}')
  path.parent.mkdir(parents=True, exist_ok=True)
  count = 0
  with disk.replacing(path) as raw:
    binary = gzip.GzipFile(filename='', fileobj=raw, mode='wb', mtime=0) if path.name.endswith('.gz') else raw
    with io.TextIOWrapper(binary, encoding='utf-8', newline='\n') as stream:
      for document in documents:
        stream.write(to_line(document) + '\n')
        count += 1
  return count
