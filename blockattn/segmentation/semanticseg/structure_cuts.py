"""What all builders from structure share: headings of several levels, short sections, works that are too long."""

import dataclasses
import math
import re
from collections.abc import Iterable, Sequence

from blockattn.errors import UserError

LINE_END = re.compile(r'\r\n|\n|\r')


class NoStructure(ValueError):
  """A text that shows no place to cut it; the message says why."""


@dataclasses.dataclass(frozen=True)
class Heading:
  """Where a section starts: character offset of its line, and its level, the smaller the higher."""
  offset: int
  level: int


@dataclasses.dataclass(frozen=True)
class Options:
  """Sizes in characters.

  Attributes:
    average: the level of headings is the deepest of the three highest whose sections are still so long on average.
    shortest: a section with less text than that is joined to the next one.
    longest: a longer work becomes several documents.
    smallest: the last of several documents is joined to the one before it if it is smaller and there is room.
  """
  average: int = 700
  shortest: int = 120
  longest: int = 115_000
  smallest: int = 16_000

  def __post_init__(self):
    if not 0 <= self.shortest <= self.longest or not 0 <= self.smallest <= self.longest or self.average < 0:
      raise UserError(f'{self}: shortest and smallest must lie between 0 and longest, average must not be negative')


DEFAULT = Options()


def line_starts(text: str) -> list[int]:
  """Character offsets at which the lines of the text start; the last may be empty."""
  return [0, *(match.end() for match in LINE_END.finditer(text))]


def cut_at(text: str, offsets: Iterable[int]) -> list[str]:
  """The text cut at offsets in any order; those at its ends cut nothing."""
  cuts = sorted({offset for offset in offsets if 0 < offset < len(text)})
  return [text[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(text)], strict=True)] if text else []


def cut_at_headings(text: str, headings: Sequence[Heading], options: Options) -> list[str]:
  """The text cut at the headings of the level that `choose_level` takes, and above.

  Raises:
    NoStructure: there is no heading.
  """
  if not headings:
    raise NoStructure('no headings')
  return cut_at_level(text, headings, choose_level(text, headings, options))


def cut_at_level(text: str, headings: Sequence[Heading], level: int) -> list[str]:
  return cut_at(text, (heading.offset for heading in headings if heading.level <= level))


def choose_level(text: str, headings: Sequence[Heading], options: Options) -> int:
  """The deepest of the three highest levels whose sections still average so many characters, else the highest of them.

  Sections are counted after the short ones are joined; levels that leave one section, such as a title's, do not count.
  """
  levels = sorted({heading.level for heading in headings})
  sections = {level: len(join_short(cut_at_level(text, headings, level), options.shortest)) for level in levels}
  cutting = [level for level in levels if sections[level] > 1][:3] or levels[:1]
  return max([level for level in cutting if len(text) >= options.average * sections[level]], default=cutting[0])


def join_short(blocks: Sequence[str], shortest: int) -> list[str]:
  """Blocks with less text than `shortest` (white space at the ends not counted) joined to the next, the last one to the
  one before it. Blocks without any text never stay alone."""
  joined, waiting = [], ''
  for block in blocks:
    waiting += block
    if len(waiting.strip()) >= max(1, shortest):
      joined.append(waiting)
      waiting = ''
  if waiting and joined:
    joined[-1] += waiting
  elif waiting:
    joined.append(waiting)
  return joined


def split_work(blocks: Sequence[str], options: Options) -> list[list[str]]:
  """Consecutive documents of about equal size, none longer than `longest` unless a single block is."""
  total = sum(map(len, blocks))
  if total <= options.longest:
    return [list(blocks)]
  target = total / math.ceil(total / options.longest)
  parts, size = [[]], 0
  for block in blocks:
    if parts[-1] and (size >= target or size + len(block) > options.longest):
      parts.append([])
      size = 0
    parts[-1].append(block)
    size += len(block)
  if len(parts) > 1 and size < options.smallest and size + sum(map(len, parts[-2])) <= options.longest:
    tail = parts.pop()
    parts[-1] += tail
  return parts
