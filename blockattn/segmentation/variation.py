r"""Other surfaces of the same document: how lines are wrapped, how headings are written, what stands between blocks.

A segmenter that has seen one house style per source learns the style. Each function takes the blocks of a document (or
of a part of it) and gives as many blocks back, none empty, each still ending in a line end if it did before.
"""

import re
from collections.abc import Sequence

import numpy as np

STYLES = ('hash', 'underline', 'wiki', 'latex', 'numbered', 'plain', 'capitals', 'bold', 'html', 'colon', 'none')
TEXTUAL = ('papers', 'manuals', 'specs', 'web_text', 'wiki', 'textbooks', 'newsletters', 'math_latex', 'books', 'finance',
           'legal')
PROSE = ('books', 'wiki', 'papers', 'finance', 'medical', 'textbooks', 'web_text', 'meetings', 'newsletters')
MARKS = ('\n\n', '\n\n', '\n\n', '\n\n\n', '\n---\n', '\n\n* * *\n\n', '\n\n=====\n\n', '\n\f\n')
TALK = ('chat', 'conversations', 'meetings', 'drama')
MONTHS = ('January', 'February', 'March', 'April', 'May', 'June', 'July', 'August', 'September', 'October', 'November',
          'December')
UNJOINED = ('code', 'chat', 'drama', 'legal', 'newsletters')
_SENTENCE_END = re.compile(r'(?<=[.!?"”])[\r\n]+')
_BLANK_LINES = re.compile(r'(\r\n|[\r\n])(?:[ \t]*[\r\n])+')
_BETWEEN = re.compile(r'(?<=[.!?])(["”’)]?) +(?=[A-Z“"])')
_HASH = re.compile(r'(#{1,6})[ \t]+(\S.*?)[ \t]*#*[ \t]*')
_LATEX = re.compile(r'\\(chapter|section|subsection|subsubsection)\*?\{([^{}]+)\}[ \t]*')
_RULE = re.compile(r'([=\-~^"*+#`])\1{2,}[ \t]*')
_FENCE = re.compile(r'[ \t]*(?:```|~~~)')
_LATEX_LEVEL = {'chapter': 1, 'section': 2, 'subsection': 3, 'subsubsection': 4}
_UNDERLINES = '=-~^"'
_WRAPPED = re.compile(r'(?<=[\w,;.’”")])\n(?=[a-z(“"A-Z])')


def vary(blocks: Sequence[str], category: str, rng: np.random.Generator, rate: float) -> tuple[str, ...]:
  """The blocks with each kind of variation made with probability `rate` (the rarer ones with a part of it)."""
  blocks = tuple(blocks)
  if rng.random() < rate / 3:
    blocks = mark(blocks, MARKS[rng.integers(len(MARKS))])
  if category in TALK and rng.random() < rate:
    blocks = occasions(mark(blocks, '\n\n' if rng.random() < 0.7 else '\n'), rng)
  if category in PROSE and rng.random() < rate / 3:
    blocks = sentences(blocks)
  if category in TEXTUAL:
    if rng.random() < rate:
      blocks = headings(blocks, STYLES[rng.integers(len(STYLES))])
    if rng.random() < rate:
      blocks = wrap(blocks, int(rng.integers(50, 120)) if rng.random() < 0.5 else 0)
  if category not in UNJOINED and rng.random() < rate / 8:
    blocks = tuple(_SENTENCE_END.sub(' ', block) for block in blocks)   # paragraphs run on in one line
  for change in (lambda block: block.replace('\r\n', '\n').replace('\n', '\r\n'),
                 lambda block: re.sub(r'(?<=\S)\n(?=\S)', '\n\n', block),   # a blank line between any two
                 str.lower):
    if rng.random() < rate / 8:
      blocks = tuple(map(change, blocks))
  return blocks


def mark(blocks: Sequence[str], separator: str) -> tuple[str, ...]:
  """The separator behind every block, and no blank line anywhere else: what a text without headings may do."""
  dense = [_BLANK_LINES.sub(r'\1', block) for block in blocks]
  return (*(block.rstrip() + separator for block in dense[:-1]), dense[-1])


def occasions(blocks: Sequence[str], rng: np.random.Generator) -> tuple[str, ...]:
  """A line in front of every block that says when it was or which it is, as in records of talk over days; or none."""
  style, first = rng.integers(8), rng.integers(1, 400)
  days = first + np.cumsum(rng.integers(0, 20, len(blocks)))
  return tuple(f'{_occasion(style, i, int(day), rng)}{block}' for i, (block, day) in enumerate(zip(blocks, days), start=1))


def _occasion(style, number, day, rng):
  year, month, date = 2010 + day // 372, day // 31 % 12, day % 31 + 1
  hour, minute = rng.integers(24), rng.integers(60)
  return ('', '', f'{date} {MONTHS[month]} {year}\n', f'{MONTHS[month]} {date}, {year}\n',
          f'{year}-{month + 1:02}-{date:02} {hour:02}:{minute:02}\n',
          f'{hour % 12 + 1}:{minute:02} {"am" if hour < 12 else "pm"}, {MONTHS[month]} {date}\n',
          f'Session {number}\n', f'--- {MONTHS[month][:3]} {date} {hour:02}:{minute:02} ---\n')[style]


def sentences(blocks: Sequence[str]) -> tuple[str, ...]:
  """A line for each sentence, and no blank lines."""
  return tuple(_BETWEEN.sub(r'\1\n', _BLANK_LINES.sub(r'\1', _WRAPPED.sub(' ', block))) for block in blocks)


def wrap(blocks: Sequence[str], width: int) -> tuple[str, ...]:
  """Paragraphs in lines of about `width` characters, in one line each for 0; indented lines and lists are left alone."""
  unwrapped = tuple(_WRAPPED.sub(' ', block) for block in blocks)
  if not width:
    return unwrapped
  breaks = re.compile(r'(?<=[^\s]{2})(?<!^)[ ](?=\S)')
  return tuple(''.join(_wrap_line(line, width, breaks) for line in block.splitlines(keepends=True)) for block in unwrapped)


def _wrap_line(line, width, breaks):
  if len(line) <= width or line[0] in ' \t|#>-*+\\`' or line[0].isdigit():
    return line
  out, start, last = [], 0, None
  for match in breaks.finditer(line):
    if match.start() - start > width and last is not None:
      out.append(line[start:last] + '\n')
      start = last + 1
    last = match.start()
  return ''.join(out) + line[start:]


def headings(blocks: Sequence[str], style: str) -> tuple[str, ...]:
  """Marked headings, wherever they stand, in another style, or without them; those of code fences are left alone."""
  counters, underlines = [0] * 7, {}
  restyled = tuple(''.join(_restyled(block.splitlines(keepends=True), style, counters, underlines)) for block in blocks)
  return tuple(new if new.strip() else old for new, old in zip(restyled, blocks, strict=True))


def _restyled(lines, style, counters, underlines):
  fenced, i = False, 0
  while i < len(lines):
    line = lines[i].rstrip('\r\n')
    end = lines[i][len(line):]
    fenced ^= bool(_FENCE.match(line))
    found = None if fenced else _heading(line, lines[i + 1] if i + 1 < len(lines) else '', underlines)
    if found is None:
      yield lines[i]
      i += 1
    else:
      level, title, used = found
      end = lines[i + used - 1][len(lines[i + used - 1].rstrip('\r\n')):]
      i += used
      if style != 'none':
        yield _write(style, level, title, counters) + end
      while style == 'none' and i < len(lines) and not lines[i].strip():   # nor the blank lines behind it
        i += 1


def _heading(line, after, underlines):
  """(level, title, lines it takes) of a heading, None of any other line."""
  if match := _HASH.fullmatch(line):
    return len(match[1]), match[2], 1
  if match := _LATEX.fullmatch(line):
    return _LATEX_LEVEL[match[1]], match[2], 1
  after = after.rstrip('\r\n')
  rule = _RULE.fullmatch(after)
  if rule and line and not line[0].isspace() and not _RULE.fullmatch(line) and abs(len(after.rstrip()) - len(line)) <= 4:
    level = underlines.setdefault(rule[1], min(len(underlines) + 1, 5))
    return level, line.strip(), 2
  return None


def _write(style, level, title, counters):
  counters[level] += 1
  counters[level + 1:] = [0] * (6 - level)
  number = '.'.join(str(max(n, 1)) for n in counters[min(2, level):level + 1])
  rule = _UNDERLINES[min(level, 5) - 1] * max(3, len(title))
  latex = {level: name for name, level in _LATEX_LEVEL.items()}
  return {
      'hash': f'{"#" * level} {title}', 'underline': f'{title}\n{rule}', 'wiki': f'{"=" * level} {title} {"=" * level}',
      'latex': f'\\{latex[min(level, 4)]}{{{title}}}', 'numbered': f'{number} {title}', 'plain': title,
      'capitals': title.upper(), 'bold': f'**{title}**', 'html': f'<h{level}>{title}</h{level}>', 'colon': f'{title}:',
  }[style]
