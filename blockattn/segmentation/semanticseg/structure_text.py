"""Blocks from the headings of Markdown, reStructuredText, LaTeX and HTML.

Each builder is a function `(text, options) -> blocks`; the blocks join to the text, of HTML to the text that remains
without its tags. Which level of headings cuts is chosen per document, see `structure_cuts.choose_level`.
"""

import html.parser
import re

import markdown_it

from blockattn.segmentation.semanticseg.structure_cuts import (
    DEFAULT,
    Heading,
    NoStructure,
    Options,
    cut_at_headings,
    line_starts,
)

_FRONT_MATTER = re.compile(r'(---|\+\+\+)[ \t]*(?:\r\n|\n|\r)(?s:.*?)(?:\r\n|\n|\r)\1[ \t]*(?:\r\n|\n|\r|\Z)')
_RULE = re.compile(r'([!-/:-@\[-`{-~])\1*[ \t]*')   # a line of one punctuation mark
_SECTIONS = ('part', 'chapter', 'section', 'subsection', 'subsubsection', 'paragraph', 'subparagraph')
_LATEX_HIDDEN = re.compile(r'\\begin\{(verbatim|Verbatim|lstlisting|minted|alltt|comment)(\*?)\}.*?(?:\\end\{\1\2\}|\Z)'
                           r'|\\verb\*?([^\w\s*])[^\r\n]*?(?:\3|(?=[\r\n])|\Z)'
                           r'|\\[\\%]|%[^\r\n]*', re.S)
_LATEX_SECTION = re.compile(rf'^[ \t]*\\(?:ol)?({"|".join(_SECTIONS)})\*?[ \t]*(?:\[[^\[\]]*\])?[ \t]*\{{', re.M)


def markdown(text: str, options: Options = DEFAULT) -> list[str]:
  """Cuts CommonMark at its headings (`#` and underlined ones), not at those in code, lists, quotes or front matter."""
  return cut_at_headings(text, markdown_headings(text), options)


def markdown_headings(text: str) -> list[Heading]:
  front = _FRONT_MATTER.match(text)
  start = front.end() if front else 0   # a parser takes its last --- for the underline of a heading
  body = text[start:]
  lines = [start + offset for offset in line_starts(body)]
  tokens = markdown_it.MarkdownIt('commonmark').disable('inline').parse(body)
  return [Heading(lines[token.map[0]], int(token.tag[1:]))
          for token in tokens if token.type == 'heading_open' and token.level == 0]


def rst(text: str, options: Options = DEFAULT) -> list[str]:
  """Cuts reStructuredText at its section titles."""
  return cut_at_headings(text, rst_headings(text), options)


def rst_headings(text: str) -> list[Heading]:
  """Titles by the rules of docutils: an underline of one mark at least as long as the title, an equal overline perhaps;
  a style (mark, overlined or not) is of the level at which it first comes. docutils itself does not say at which line a
  title stands, and stops at directives that it does not know."""
  starts = line_starts(text)
  lines = [text[a:b].rstrip('\r\n') for a, b in zip(starts, [*starts[1:], len(text)], strict=True)]
  styles, headings = {}, []
  i = 0
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
  return headings


def _is_title(title, underline):
  match = _RULE.fullmatch(underline)
  return bool(title and match and len(underline.rstrip()) >= len(title) and not _RULE.fullmatch(title))


def latex(text: str, options: Options = DEFAULT) -> list[str]:
  r"""Cuts LaTeX at \part .. \subparagraph that start a line, not at those in comments or verbatim."""
  return cut_at_headings(text, latex_headings(text), options)


def latex_headings(text: str) -> list[Heading]:
  shown = _LATEX_HIDDEN.sub(lambda match: re.sub(r'[^\r\n]', ' ', match[0]), text)
  return [Heading(match.start(), _SECTIONS.index(match[1])) for match in _LATEX_SECTION.finditer(shown)]


def html_page(text: str, options: Options = DEFAULT) -> list[str]:
  """Cuts the text of an HTML page at <h1> .. <h6>; the blocks join to `html_text(text)[0]`."""
  return cut_at_headings(*html_text(text), options)


def html_text(text: str) -> tuple[str, list[Heading]]:
  """The text of a page, paragraphs between blank lines, and its headings at offsets of that text.

  Raises:
    NoStructure: the parser cannot read it.
  """
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
    self.parts, self.headings = [], []
    self.length = 0
    self.ends = 0          # line ends wanted before the next text
    self.space = False     # a blank wanted before the next text
    self.hidden = 0
    self.pre = 0
    self.level = 0         # of a heading that was opened and has no text yet

  def handle_starttag(self, tag, attrs):
    if tag in self.HIDDEN:
      self.hidden += 1
    self._apart(tag)
    self.pre += tag == 'pre'
    if tag in ('td', 'th'):
      self.space = True
    if re.fullmatch('h[1-6]', tag):
      self.level = int(tag[1])
    if tag == 'li':
      self._write('- ')

  def handle_startendtag(self, tag, attrs):
    self._apart(tag)   # <svg/> hides nothing

  def handle_endtag(self, tag):
    if tag in self.HIDDEN:
      self.hidden = max(0, self.hidden - 1)
    self._apart(tag)
    if tag == 'pre':
      self.pre = max(0, self.pre - 1)
    if re.fullmatch('h[1-6]', tag):
      self.level = 0

  def handle_data(self, data):
    if self.hidden:
      return
    if self.pre:
      self._write(data)
      return
    words = data.split()
    if not words:
      self.space = self.space or bool(data)
      return
    self.space = self.space or data[0].isspace()
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
