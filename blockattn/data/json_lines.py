"""Reading JSON lines: files, the objects of their lines, checks that say what is wrong, and a report of what became of them.

Reasons for which a line is refused, each counted on its own: 'bad JSON', 'key twice', 'invalid UTF-8', 'NUL character',
'not an object', 'missing key', 'wrong type', 'empty text', and those of whoever reads the objects (`data.prompts`).
"""

import collections
import contextlib
import dataclasses
import glob
import gzip
import json
import pathlib
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from blockattn.errors import UserError

P = TypeVar('P')
R = TypeVar('R')
T = TypeVar('T')

SUFFIXES = ('.jsonl', '.jsonl.gz')
MARK = b'\xef\xbb\xbf'   # of the byte order, which some editors write in front of a text
LISTED = 100   # malformed lines a report lists; the rest are counted only


@dataclasses.dataclass(frozen=True)
class BadLine:
  file: str
  line: int        # from 1
  reason: str      # of a few, to be counted by
  detail: str = ''

  def __str__(self):
    return f'{self.file}:{self.line}: {self.reason}' + (f': {self.detail}' if self.detail else '')


class BadLineError(UserError):
  """The first malformed line of a strict reading; its message is 'file:line: reason: detail'."""

  def __init__(self, bad: BadLine):
    super().__init__(f'{bad}; correct the line, or read without strict to leave it out')
    self.bad = bad


class Malformed(ValueError):
  """A line that is not of the form that is read; its reader makes a BadLine of it."""

  def __init__(self, reason: str, detail: str = ''):
    super().__init__(f'{reason}: {detail}')
    self.reason = reason
    self.detail = detail.encode(errors='backslashreplace').decode()   # a quoted half surrogate could not be printed


@dataclasses.dataclass
class Report:
  """What became of the lines: lines == examples + sum(bad.values()), of the examples sum(dropped.values()) gave no document.

  Attributes:
    lines: non-empty lines read.
    examples: well-formed ones.
    bad: malformed lines by reason.
    listed: the first LISTED malformed lines.
    docs: documents that examples were encoded to, a long text to several.
    dropped: examples that were not, by reason ('too long', 'too many blocks').
    cut: kept examples that lost context blocks to fit.
  """
  lines: int = 0
  examples: int = 0
  bad: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  listed: list[BadLine] = dataclasses.field(default_factory=list)
  docs: int = 0
  dropped: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  cut: int = 0

  def add_bad(self, bad: BadLine):
    self.bad[bad.reason] += 1
    if len(self.listed) < LISTED:
      self.listed.append(bad)

  def __add__(self, other: 'Report') -> 'Report':
    return Report(self.lines + other.lines, self.examples + other.examples, self.bad + other.bad,
                  (self.listed + other.listed)[:LISTED], self.docs + other.docs, self.dropped + other.dropped,
                  self.cut + other.cut)

  def to_json(self) -> dict:
    return {**dataclasses.asdict(self), 'bad': dict(self.bad), 'dropped': dict(self.dropped)}

  @classmethod
  def from_json(cls, values: dict) -> 'Report':
    return cls(**{**values, 'bad': collections.Counter(values['bad']),
                  'dropped': collections.Counter(values['dropped']),
                  'listed': [BadLine(**bad) for bad in values['listed']]})

  def summary(self) -> str:
    """Several lines for a log: counts by reason, then the listed lines, and how many are not listed."""
    counts = ', '.join(f'{count} {reason}' for reason, count in (self.bad + self.dropped).most_common())
    head = f'{self.lines} lines, {self.examples} examples, {self.docs} docs'
    return '\n'.join([f'{head}; left out: {counts}' if counts else head, *self.malformed()])

  def malformed(self) -> list[str]:
    """The listed lines, and how many are not listed."""
    more = self.bad.total() - len(self.listed)
    return [*map(str, self.listed), *([f'... and {more} more'] if more else [])]


def find_files(patterns: str | pathlib.Path | Sequence[str | pathlib.Path],
               suffixes: Sequence[str] = SUFFIXES) -> list[str]:
  """The files that paths, folders (all files of these suffixes below) and globs name, each once, in sorted order each.

  Raises:
    FileNotFoundError: a pattern names nothing.
    ValueError: a file has another suffix.
  """
  suffixes = tuple(suffixes)
  any_of = f'{", ".join(suffixes[:-1])} or {suffixes[-1]}'
  if isinstance(patterns, str | pathlib.Path):
    patterns = [patterns]
  files = {}
  for pattern in map(str, patterns):
    path = pathlib.Path(pattern).expanduser()
    if path.is_dir():
      found = sorted(str(p) for p in path.rglob('*') if p.name.endswith(suffixes) and p.is_file())
    elif path.is_file():
      found = [str(path)]
    else:
      found = sorted(p for p in glob.glob(str(path), recursive=True) if pathlib.Path(p).is_file())
    if not found:
      raise FileNotFoundError(f'{pattern}: no {any_of} file here; give a file, a folder or a glob')
    files.update(dict.fromkeys(found))
  for file in files:
    if not file.endswith(suffixes):
      raise UserError(f'{file}: of no kind that is read here; its name must end in {any_of}')
  return list(files)


def numbered_lines(file: str) -> Iterator[tuple[int, bytes]]:
  """(number from 1, bytes) of every line that is not blank; of standard input, if the file is '-'."""
  with contextlib.nullcontext(sys.stdin.buffer) if file == '-' else open(file, 'rb') as raw, naming_damage(file):
    for number, line in enumerate(gzip.GzipFile(fileobj=raw) if file.endswith('.gz') else raw, start=1):
      line = line.removeprefix(MARK) if number == 1 else line
      if line.strip():
        yield number, line


@contextlib.contextmanager
def naming_damage(file: str) -> Iterator[None]:
  """Within the block, damaged compression is an error that names the file."""
  try:
    yield
  except (EOFError, gzip.BadGzipFile, zlib.error) as error:
    raise UserError(f'{file}: its compressed data is damaged or cut off ({error}); fetch the file again') from error


def parsed_lines(file: str, parse: Callable[[int, bytes], T], report: Report, *,
                 strict: bool = False) -> Iterator[tuple[int, T]]:
  """`parsed` of the lines of a file that are not blank: (number, what `parse(number, line)` makes of it)."""
  return parsed(numbered_lines(file), parse, file, lambda number: number, report, strict=strict)


def parsed(rows: Iterable[tuple[P, R]], parse: Callable[[P, R], T], file: str, line: Callable[[P], int], report: Report, *,
           strict: bool = False, tell: Callable[[BadLine], None] | None = None) -> Iterator[tuple[P, T]]:
  """(place, what `parse(place, row)` makes of it) of every row, those that it refuses with Malformed left out.

  Args:
    rows: (place, row).
    file: that they are from.
    line: the number in it of the row at a place, from 1.
    report: counts lines, examples and malformed lines as they are read.
    strict: raise BadLineError at the first malformed line instead of counting it.
    tell: called with each malformed line that is listed.
  """
  for place, row in rows:
    report.lines += 1
    try:
      found = parse(place, row)
    except Malformed as error:
      if not strict and len(report.listed) >= LISTED:   # counted only: a row's number may have to be looked for
        report.bad[error.reason] += 1
        continue
      bad = BadLine(file, line(place), error.reason, error.detail)
      if strict:
        raise BadLineError(bad) from error
      report.add_bad(bad)
      if tell is not None:
        tell(bad)
      continue
    report.examples += 1
    yield place, found


def load_object(line: bytes | str) -> dict:
  """The JSON object of a line, or Malformed."""
  try:
    text = line.decode() if isinstance(line, bytes) else line
  except UnicodeDecodeError as error:
    raise Malformed('invalid UTF-8', f'byte {error.start} of the line') from error
  if '\0' in text:
    raise Malformed('NUL character', f'character {text.index(chr(0))} of the line')
  try:
    record = json.loads(text, object_pairs_hook=_distinct)
  except Malformed:
    raise
  except (ValueError, RecursionError) as error:
    raise Malformed('bad JSON', str(error)[:200]) from error
  if not isinstance(record, dict):
    raise Malformed('not an object', f'a {type(record).__name__}')
  return record


def _distinct(pairs):
  """A JSON object; of a key that stands there twice, json would take the last value without a word."""
  record = dict(pairs)
  if len(record) < len(pairs):
    names = [name for name, _ in pairs]
    twice = next(name for name in names if names.count(name) > 1)
    raise Malformed('key twice', f'{twice[:80]!r}; leave one of them out')
  return record


def get_value(record: dict, key: str, kind: type, what: str | None = None) -> Any:
  """The value of a key, which must be there and of this type, or Malformed; `what` names it in the message."""
  what = what or f'"{key}"'
  if key not in record:
    raise Malformed('missing key', what)
  if not isinstance(record[key], kind):
    raise Malformed('wrong type', f'{what} is {type(record[key]).__name__}, not {kind.__name__}')
  return record[key]


def check_text(value: Any, what: str, empty: str | None = None) -> str:
  """The value if it is text that a tokenizer can take; `empty` is the reason to give if it is blank."""
  if not isinstance(value, str):
    raise Malformed('wrong type', f'{what} is {type(value).__name__}, not str')
  if '\0' in value:
    raise Malformed('NUL character', what)
  try:
    value.encode()
  except UnicodeEncodeError as error:   # half of a surrogate pair, written as an escape
    raise Malformed('invalid UTF-8', f'{what}, character {error.start}') from error
  if empty and not value.strip():
    raise Malformed(empty, what)
  return value


def get_text(record: dict, key: str, what: str | None = None, empty: str | None = 'empty text') -> str:
  """The text of a key, or Malformed, see `check_text`."""
  return check_text(get_value(record, key, str, what), what or f'"{key}"', empty)


def get_answers(record: dict) -> tuple[str, ...]:
  """The accepted answers of a line, or Malformed."""
  answers = get_value(record, 'answers', list)
  if not answers:
    raise Malformed('empty answers', 'the list is empty')
  return tuple(check_text(answer, f'"answers"[{i}]', 'empty answers') for i, answer in enumerate(answers))
