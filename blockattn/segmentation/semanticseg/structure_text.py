"""Blocks from the headings of Markdown, reStructuredText, LaTeX and HTML, and what all builders from structure share.

A reader of headings is a function text -> (text, headings), of HTML the text that remains without its tags.
`cut_at_headings` chooses per document at which level to cut; short sections are joined, works that are too long divided.
"""

import dataclasses
import html.parser
import math
import re
from collections.abc import Iterable, Sequence

import markdown_it

from blockattn.errors import UserError
from blockattn.segmentation import markers

LINE_END = re.compile(r'\r\n|\n|\r')
_FRONT_MATTER = re.compile(r'(---|\+\+\+)[ \t]*(?:\r\n|\n|\r)(?s:.*?)(?:\r\n|\n|\r)\1[ \t]*(?:\r\n|\n|\r|\Z)')
_RULE = re.compile(r'([!-/:-@\[-`{-~])\1*[ \t]*')   # a line of one punctuation mark
_SECTIONS = ('part', 'chapter', 'section', 'subsection', 'subsubsection', 'paragraph', 'subparagraph')
_LATEX_HIDDEN = re.compile(r'\\begin\{(verbatim|Verbatim|lstlisting|minted|alltt|comment)(\*?)\}.*?(?:\\end\{\1\2\}|\Z)'
                           r'|\\verb\*?([^\w\s*])[^\r\n]*?(?:\3|(?=[\r\n])|\Z)'
                           r'|\\[\\%]|%[^\r\n]*', re.S)
_LATEX_SECTION = re.compile(rf'^[ \t]*\\(?:ol)?({"|".join(_SECTIONS)})\*?[ \t]*(?:\[[^\[\]]*\])?[ \t]*\{{', re.M)


class NoStructure(ValueError):
  """A text that shows no place to cut it; the message says why."""


@dataclasses.dataclass(frozen=True)
class Heading:
  """Where a section starts."""
  offset: int   # of its line, in characters
  level: int   # the smaller the higher


@dataclasses.dataclass(frozen=True)
class Options:
  """Sizes in characters."""
  average: int = 700   # the level of headings is the deepest of the three highest whose sections average so much
  shortest: int = 120   # a section with less text is joined to the next one
  longest: int = 115_000   # a longer work becomes several documents
  smallest: int = 16_000   # the last of several documents is joined to the one before it if smaller and there is room

  def __post_init__(self):
    if not 0 <= self.shortest <= self.longest or not 0 <= self.smallest <= self.longest or self.average < 0:
      raise UserError(f'{self}: shortest and smallest must lie between 0 and longest, average must not be negative')


DEFAULT = Options()


def line_starts(text: str) -> list[int]:
  """Character offsets at which the lines of the text start; the last may be empty."""
  return [0, *(match.end() for match in LINE_END.finditer(text))]


def cut_at(text: str, offsets: Iterable[int]) -> list[str]:
  """The text cut at offsets in any order; those at its ends cut nothing."""
  return markers.split(text, sorted({offset for offset in offsets if 0 < offset < len(text)})) if text else []


def cut_at_headings(text: str, headings: Sequence[Heading], options: Options = DEFAULT) -> list[str]:
  """The text cut at the headings of one level and above: the deepest of the three highest levels whose sections average
  `options.average` characters, else the highest of them.

  Sections are counted after the short ones are joined; levels that leave one section, such as a title's, do not count.
  Raises NoStructure: there is no heading."""
  if not headings:
    raise NoStructure('no headings')
  levels = sorted({heading.level for heading in headings})
  cut = {level: cut_at(text, (h.offset for h in headings if h.level <= level)) for level in levels}
  sections = {level: len(join_short(blocks, options.shortest)) for level, blocks in cut.items()}
  cutting = [level for level in levels if sections[level] > 1][:3] or levels[:1]
  return cut[max([level for level in cutting if len(text) >= options.average * sections[level]], default=cutting[0])]


def join_short(blocks: Sequence[str], shortest: int) -> list[str]:
  """Blocks with less text than `shortest` (white space at the ends not counted) joined to the next, the last one to the
  one before it. Blocks without any text never stay alone."""
  joined, waiting = [], ''
  for block in blocks:
    waiting += block
    if len(waiting.strip()) >= max(1, shortest):
      joined.append(waiting)
      waiting = ''
  return [*joined[:-1], ''.join([*joined[-1:], waiting])] if joined or waiting else []


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
    parts[-2:] = [parts[-2] + parts[-1]]
  return parts


# Readers of headings.

def markdown(text: str) -> tuple[str, list[Heading]]:
  """The text and its CommonMark headings (`#` and underlined ones), not those in code, lists, quotes or front matter."""
  front = _FRONT_MATTER.match(text)
  start = front.end() if front else 0   # a parser takes its last --- for the underline of a heading
  body = text[start:]
  lines = [start + offset for offset in line_starts(body)]
  tokens = markdown_it.MarkdownIt('commonmark').disable('inline').parse(body)
  return text, [Heading(lines[token.map[0]], int(token.tag[1:]))
                for token in tokens if token.type == 'heading_open' and token.level == 0 and token.map]


def rst(text: str) -> tuple[str, list[Heading]]:
  """The text and its titles by the rules of docutils: an underline of one mark at least as long as the title, an equal
  overline perhaps; a style (mark, overlined or not) is of the level at which it first comes. docutils itself does not say
  at which line a title stands, and stops at directives that it does not know."""
  starts = line_starts(text)
  lines = [text[a:b].rstrip('\r\n') for a, b in zip(starts, [*starts[1:], len(text)], strict=True)]
  styles, headings, i = {}, [], 0
  while i < len(lines) - 1:
    over = i + 2 < len(lines) and _is_title(lines[i + 1].strip(), lines[i + 2]) and lines[i] == lines[i + 2]
    blank_before = i == 0 or not lines[i - 1].strip()
    plain = not over and lines[i][:1].strip() and _is_title(lines[i].rstrip(), lines[i + 1])
    if blank_before and (over or plain):
      level = styles.setdefault((lines[i + 1 + over][0], over), len(styles))
      headings.append(Heading(starts[i], level))
      i += 2 + over
    else:
      i += 1
  return text, headings


def _is_title(title, underline):
  match = _RULE.fullmatch(underline)
  return bool(title and match and len(underline.rstrip()) >= len(title) and not _RULE.fullmatch(title))


def latex(text: str) -> tuple[str, list[Heading]]:
  r"""The text and its \part .. \subparagraph that start a line, not those in comments or verbatim."""
  shown = _LATEX_HIDDEN.sub(lambda match: re.sub(r'[^\r\n]', ' ', match[0]), text)
  return text, [Heading(match.start(), _SECTIONS.index(match[1])) for match in _LATEX_SECTION.finditer(shown)]


def html_text(text: str) -> tuple[str, list[Heading]]:
  """The text of a page without its tags, paragraphs between blank lines, and its <h1> .. <h6>. Raises NoStructure: the
  parser cannot read it."""
  page = _Page()
  try:
    page.feed(text)
    page.close()
  except AssertionError as error:   # how the parser says that a declaration makes no sense
    raise NoStructure(f'no HTML: {error}') from error
  plain = ''.join(page.parts).rstrip()
  return plain + '\n' * bool(plain), page.headings


class _Page(html.parser.HTMLParser):
  """Collects text: white space as a browser shows it, line ends where elements stand apart."""

  HIDDEN = frozenset({'script', 'style', 'template', 'title', 'noscript', 'svg'})
  APART = {**dict.fromkeys(('p', 'h1', 'h2', 'h3', 'h4', 'h5', 'h6', 'ul', 'ol', 'dl', 'table', 'pre', 'blockquote',
                            'section', 'article', 'header', 'footer', 'main', 'nav', 'aside', 'figure', 'hr', 'form'), 2),
           **dict.fromkeys(('div', 'li', 'dt', 'dd', 'tr', 'br', 'caption', 'figcaption', 'thead', 'tbody', 'option'), 1)}

  def __init__(self):
    super().__init__(convert_charrefs=True)
    self.parts, self.headings, self.length = [], [], 0
    self.hidden = self.pre = 0   # how deep in such elements
    self.ends, self.space = 0, False   # line ends, and a blank, wanted before the next text
    self.level = 0   # of a heading that was opened and has no text yet

  def handle_starttag(self, tag, attrs):
    self.hidden += tag in self.HIDDEN
    self._apart(tag)
    self.pre += tag == 'pre'
    self.space |= tag in ('td', 'th')
    if re.fullmatch('h[1-6]', tag):
      self.level = int(tag[1])
    if tag == 'li':
      self._write('- ')

  def handle_startendtag(self, tag, attrs):
    self._apart(tag)   # <svg/> hides nothing

  def handle_endtag(self, tag):
    self.hidden = max(0, self.hidden - (tag in self.HIDDEN))
    self._apart(tag)
    self.pre = max(0, self.pre - (tag == 'pre'))
    if re.fullmatch('h[1-6]', tag):
      self.level = 0

  def handle_data(self, data):
    if self.pre and not self.hidden:
      self._write(data)
    elif data and not self.hidden:
      self.space |= data[0].isspace()
      if words := data.split():
        self._write(' '.join(words))
        self.space = data[-1].isspace()

  def _apart(self, tag):
    self.ends = max(self.ends, self.APART.get(tag, 0))

  def _write(self, piece):
    if self.length and self.ends:
      piece = '\n' * self.ends + piece
    elif self.length and self.space and not self.parts[-1].endswith((' ', '\n')):
      piece = ' ' + piece
    if self.level:
      skipped = len(piece) - len(piece.lstrip('\n '))
      self.headings.append(Heading(self.length + skipped, self.level))
      self.level = 0
    self.parts.append(piece)
    self.length += len(piece)
    self.ends, self.space = 0, False
