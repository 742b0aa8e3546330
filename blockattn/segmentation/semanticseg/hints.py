r"""Surface hints: what lets a cut be read off the page instead of understood, and texts without it.

Hints are found in the whole text, wherever they stand, never by where its cuts are: taking marks away at the cuts only
would mark the cuts. Titles stay, as plain lines; nothing is rewritten, every change is a deletion.

blank: every run of line ends becomes its first line end (with white space, zero-width space or form feed between).
heading: `#`..`######` of Markdown (closing ones and `{#id}` too), `= x =`..`====== x ======` of wikis and AsciiDoc,
  underlines and overlines of reStructuredText and setext, horizontal rules, the `---` and `+++` of front matter,
  `\section{}` and its kin (also \olsection, \chapter, \part, \paragraph), `<h1>`..`<h6>` tags, `.SH`, `.SS`, `=head1`,
  `**` around a whole line or title.
label: lines that only name a place: `\label{section-..}`, `\olfileid{..}`, `\phantomsection`, d2l's ":label:`..`",
  `.. _name:`, `<a name=..></a>`.
number: `CHAPTER IX.`, `Part Two:`, `Item 7.`, `Note 3 -`, `Section 5:`, `Act 3`, `ACT I. SCENE 2.`, `§ 12-34.01`, the
  numbering of headings (`3.2`, `IV.`), a numeral alone between blank lines; a line of nothing else goes as a whole.
question: `Q:`, `A:`, `Question 3:`, `Answer:`, in texts that have both; in medical the detached ` ?` behind a question.
time (chat, talk): `[10:21]` before a message (threads are sorted by their first message, so that time jumps back at a
  cut), and lines that only say when a session took place.
rule (code): lines that are a comment of nothing but `-`, `=`, `*`, `#`, `/` or `~`.
mail (email): header lines, mbox `From ` lines, `On .. wrote:`, `-----Original Message-----`, `>` before quoted lines.

Left alone: fenced and verbatim code (but for its blank lines), indentation, capitals, stage directions, speakers' names,
`(a)`, `(1)` and other numbering of paragraphs and lists, whatever stands inside a sentence.
"""

import bisect
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from blockattn.errors import UserError

TEXT = ('blank', 'heading', 'label', 'number', 'question')
TALK = ('blank', 'time')
# Kinds by category; any other category is text.
KINDS = {
    'code': ('blank', 'rule'), 'chat': TALK, 'conversations': TALK, 'conversations_locomo': TALK, 'meetings': TALK,
    'transcripts': TALK, 'email': ('blank', 'mail', 'heading', 'question'),
}

_LONGEST = 300   # characters of a heading's line; a longer one is a paragraph
_EDGE = '\u200b\ufeff'   # characters without width that do not count as white space in Python
_END = r'(?>\r\n|\n|\r)'
_BLANK = re.compile(rf'({_END})(?:(?:[^\S\r\n]|[{_EDGE}])*{_END})+')
_LINE = re.compile(r'[^\r\n]+')
_SPACE = re.compile(rf'[\s{_EDGE}]*')

# All patterns below are matched at a line's start with the line's end as the end of the string.
_FENCE = re.compile(r' {0,3}(`{3,}(?=[^`]*$)|~{3,})[ \t]*(.*)$')
_ATX = re.compile(r' {0,3}(?:#{1,6}(?:[ \t]+|$)|##{1,5}(?=[^#\s!]))+')
_ATX_END = re.compile(r'(?:[ \t]+#+)?(?:[ \t]*\{[#.:][^{}]{0,80}\})?[ \t]*$')
_WIKI = re.compile(r'(={1,6})[ \t]*(?=[^=\s])(?![^\r\n]*[\\$])')
_UNDERLINE = re.compile(r' {0,3}([-=~^_*+#"\'.:<>])\1+[ \t]*$')
_SPACED_RULE = re.compile(r' {0,3}([-*])(?:[ \t]*\1){2,}[ \t]*$')
_TAGS = re.compile(r'</?[hH][1-6](?:\s[^<>]{0,200})?>')
_MACRO = re.compile(r'\.(?:SH|SS|Sh|Ss)[ \t]+"?|=head[1-6][ \t]+')
_BOLD = re.compile(r'(?:\*\*|__|\[\*\*|\(\*\*)(?=\S)([^*_\r\n]{1,120}?)(?:\*\*\]|\*\*\)|\*\*|__)[ \t]*$')
_SECTION = re.compile(r'\\(?:ol)?(?:part|chapter|(?:sub){0,2}section|(?:sub)?paragraph)\*?[ \t]*(?:\[[^\[\]]{0,300}\])?\{')
_LABEL = re.compile(r'\\label\{(?:s|ss|sec|sect|section|subsec|subsection|ch|chap|chapter|part|app)\b[^{}]{0,200}\}\s*$'
                    r'|\\olfileid(?:\{[^{}]{0,80}\}){1,4}\s*$|\\phantomsection\s*$|:label:`[^`]{0,200}`\s*$'
                    r'|\.\. _[^:\r\n]{1,200}:[ \t]*$|(?:<a (?:name|id)="[^"<>]{0,200}"\s*/?>(?:</a>)?\s*)+$', re.I)
_WORDS = ('one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|fifteen|sixteen|seventeen|'
          'eighteen|nineteen|twenty|thirty|forty|fifty|first|second|third|fourth|fifth|sixth|seventh|eighth|ninth|tenth|'
          'eleventh|twelfth|thirteenth|fourteenth|fifteenth|sixteenth|seventeenth|eighteenth|nineteenth|twentieth|'
          'thirtieth|last')
_NUMERAL = (rf'(?:\d+(?:[.-]\d+)*[A-Za-z]?(?:-\d+)?|[IVXLCDM]+(?:-[A-Z])?|[ivxlcdm]+(?=[ \t]*(?:[.:—–-]|$))|[A-Z]|'
            rf'(?i:(?:the[ \t]+)?(?:{_WORDS})(?:[ -](?:{_WORDS}))?))(?!\w|[.-]\d)')
_PLACES = ('chapter|chap|part|book|phase|volume|vol|section|sec|article|art|item|note|appendix|annex|title|subtitle|'
           'subchapter|subpart|division|act|scene|canto|lecture|schedule|unit|lesson|module')
_PLACE = '(?:' + '|'.join(f'{p.capitalize()}|{p.upper()}' for p in _PLACES.split('|')) + ')'
# A number in front of a title: what follows is the end of the line, or starts as a title does.
_BREAK = rf'[ \t{_EDGE}]*[.:,—–~)-]*[ \t{_EDGE}]*(?:[—–~-]+[ \t]*)?'
_TITLE = r'(?=$|[\r\n"“‘\'(\[*`_<]|[^\W\d_a-z]|\d)'
_COUNTED = re.compile(rf'[ \t]*(?:{_PLACE}\.?[ \t]*(?:[ \t]|\r\n?|\n){_NUMERAL}{_BREAK})+{_TITLE}')
_PARAGRAPH = re.compile(r'[ \t]*§+[ \t]*\d[\w.-]*+(?:(?:,|[ \t](?:to|and|through|[—–-])(?=[ \t]))[ \t]*§*[ \t]*\d[\w.-]*+)*'
                        rf'{_BREAK}{_TITLE}')
_MARKED_NUMBER = re.compile(r'(?:(?:\d{1,3}(?:\.\d{1,3})+[.):]?|\d{1,3}[.):]?|[IVXLC]+[.):]|[A-Z][.)])[ \t]+)+'
                            r'(?=["“(\[*`]|[^\W\d_a-z])')
_PLAIN_NUMBER = re.compile(r'[ \t]*(?:\d{1,3}(?:\.\d{1,3})*[.):—]|\d{1,3}(?:\.\d{1,3})+(?=[ \t])|\d{1,2}-[ivx]+\.|'
                           r'(?:[IVX]+|[IVXLC]{2,})(?:[.):—]|$))(?:[ \t]*[—–-]+)?[ \t]*'
                           r'(?=$|["“‘\'(\[]|[^\W\d_a-z])')
_QUESTION = re.compile(r'[ \t]*(?:Q|Question|QUESTION)(?:[ \t]*\d{1,4})?[ \t]*[:.][ \t]+(?=\S)')
_ANSWER = re.compile(r'[ \t]*(?:A|Answer|ANSWER)(?:[ \t]*\d{1,4})?[ \t]*[:.][ \t]+(?=\S)')
_DETACHED = re.compile(r'(?:[ \t]+\?)+[ \t]*$')
_TIME = re.compile(r'[ \t]*[\[(]?\d{1,2}:\d\d(?::\d\d)?(?:[ \t]?[APap]\.?[Mm]\.?)?(?:[\])][ \t]*|[ \t]+(?=<))')
_SESSION = re.compile(r'[ \t]*\d{1,2}:\d\d(?:[ \t]?[ap]m)?(?:[ \t]+on)?[ \t]+\d{1,2}[ \t]+[A-Z][a-z]+,?[ \t]+\d{4}[ \t]*$')
_CODE_RULE = re.compile(r'[ \t]*(?:#[ \t]?|//[ \t]?|;+[ \t]?|%+[ \t]?)([-=*#/~_+])\1{3,}[ \t]*(?:#|//)?$'
                        r'|[ \t]*/\*+[ \t]?([-=*#~_+])\2*[ \t]?\*/[ \t]*$')
_MAIL_HEADER = re.compile(r'(?:From|To|Cc|CC|Bcc|Date|Sent|Subject|Reply-To|Message-I[Dd]|In-Reply-To|References|'
                          r'MIME-Version|Content-[A-Z][a-z-]+|X-[\w-]+|Return-Path|Received|List-[\w-]+|Sender):(?:[ \t]|$)')
_MAIL_LINE = re.compile(r'From \S+.*\d\d:\d\d|[ \t>]*On .{1,200} wrote:[ \t]*$|[ \t]*-+ ?Original Message ?-+[ \t]*$'
                        r'|[ \t]*-+ ?Forwarded [Mm]essage.{0,20}-+[ \t]*$')
_MAIL_QUOTE = re.compile(r'(?:>[ \t]?)+')
_VERBATIM = re.compile(r'\\begin\{(verbatim|Verbatim|lstlisting|minted|alltt)\*?\}.*?(?:\\end\{\1\*?\}|\Z)', re.S)


def remove_hints(blocks: Sequence[str], category: str) -> tuple[str, ...]:
  """The same blocks without any surface hint; see the module's table.

  A block of nothing but hints keeps them, so that none becomes empty. Hints that others hid are removed as well: the
  result is one that removing hints again leaves as it is.

  Args:
    blocks: texts that join to the document; none empty, nor is one of the result.
    category: decides which kinds are looked for, see `KINDS`.
  """
  blocks, before = tuple(blocks), None
  while blocks != before:   # ends, because whatever differs is shorter
    before, blocks = blocks, without(blocks, category, kinds_of(category))
  return blocks


def random_hints(blocks: Sequence[str], category: str, rng: Any, rate: float) -> tuple[str, ...]:
  """The same blocks, each kind of hint removed from the whole document with probability `rate`, else left in it: one draw
  of the numpy Generator or random.Random for every kind of the category."""
  return without(blocks, category, [kind for kind in kinds_of(category) if rng.random() < rate])


def kinds_of(category: str) -> tuple[str, ...]:
  return KINDS.get(category, TEXT)


def without(blocks: Sequence[str], category: str, kinds: Sequence[str]) -> tuple[str, ...]:
  """The blocks after one pass that deletes the hints of the given kinds, as they are seen with all hints in place."""
  if not all(blocks):
    raise UserError(f'block {list(map(bool, blocks)).index(False)} of {len(blocks)} is empty; leave it out')
  if not kinds:
    return tuple(blocks)
  text = ''.join(blocks)
  codes = np.frombuffer(text.encode('utf-32-le', 'surrogatepass'), np.uint32)
  kept = np.ones(len(codes), bool)
  for _, start, stop in find_hints(text, category, kinds):
    kept[start:stop] = False
  found, start = [], 0
  for block in blocks:
    part = slice(start, start + len(block))
    rest = codes[part][kept[part]].tobytes().decode('utf-32-le', 'surrogatepass')
    if not rest or block.strip() and not rest.strip():
      rest = _BLANK.sub(r'\1', block) if 'blank' in kinds else block
    found.append(rest)
    start = part.stop
  return tuple(found)


# Lines.

def _line_end(text, stop):
  """The position behind the line end at `stop`."""
  return stop + (2 if text.startswith('\r\n', stop) else int(stop < len(text)))


def _touch(text, before, after):
  """True if no blank line stands between two lines."""
  return _line_end(text, before[1]) == after[0]


def _code(text, lines) -> list[tuple[int, int]]:
  """Fenced and verbatim code: spans of whole lines, fences included. A fence that nothing closes is none."""
  spans, opened, hopeless = [], None, set()
  for i, (start, stop) in enumerate(lines):
    match = _FENCE.match(text, start, min(stop, start + _LONGEST)) if text[start] in ' `~' else None
    if not match:
      continue
    mark, info = match[1], match[2]
    if opened is None:
      if mark[0] not in hopeless and not _underlines(text, lines, i, mark, info):
        opened = (start, mark, i)
    elif mark[0] == opened[1][0] and len(mark) >= len(opened[1]) and not info:
      spans.append((opened[0], stop))
      opened = None
  if opened is not None:
    hopeless.add(opened[1][0])
  return sorted(spans + [match.span() for match in _VERBATIM.finditer(text)])


def _underlines(text, lines, i, mark, info):
  """True if a line of ~ is a heading's underline rather than a fence."""
  if mark[0] != '~' or info or len(mark) < 4 or not i or not _touch(text, lines[i - 1], lines[i]):
    return False
  return lines[i - 1][1] - lines[i - 1][0] <= len(mark)


def find_hints(text: str, category: str, kinds: Sequence[str]) -> Iterator[tuple[str, int, int]]:
  """(kind, start, stop) in characters of what to delete; spans may overlap."""
  if 'blank' in kinds:
    yield from (('blank', match.end(1), match.end()) for match in _BLANK.finditer(text))
  # (start, stop without the line end) of every line that is not blank.
  lines = [m.span() for m in _LINE.finditer(text) if not _SPACE.fullmatch(text, *m.span())]
  for start, stop in lines:
    if 'rule' in kinds and _CODE_RULE.match(text, start, stop):
      yield 'rule', start, _line_end(text, stop)
    if 'time' in kinds and _SESSION.match(text, start, stop):
      yield 'time', start, _line_end(text, stop)
    elif 'time' in kinds and (match := _TIME.match(text, start, stop)) and match.end() < stop:
      yield 'time', start, match.end()
    if 'mail' in kinds and (_MAIL_HEADER.match(text, start, stop)
                            or _MAIL_LINE.match(text, start, min(stop, start + _LONGEST))):
      yield 'mail', start, _line_end(text, stop)
    elif 'mail' in kinds and (match := _MAIL_QUOTE.match(text, start, stop)):
      yield 'mail', start, match.end()
  if {'heading', 'label', 'number', 'question'} & set(kinds):
    yield from (hint for hint in _text_hints(text, lines, category) if hint[0] in kinds)


def _text_hints(text, lines, category):
  """Hints of running text: ('heading' | 'label' | 'number' | 'question', start, stop)."""
  code = _code(text, lines)
  begins = [start for start, _ in code]
  inside = lambda start: (at := bisect.bisect_right(begins, start) - 1) >= 0 and start < code[at][1]
  indices = [i for i, (start, _) in enumerate(lines) if not inside(start)]
  rules = {i for i in indices if _is_rule(text, lines, i)}
  titles = {i: title for i in indices if i not in rules and (title := _marked_title(text, *lines[i])) is not None}
  has_questions = all(any(mark.match(text, *lines[i]) for i in indices) for mark in (_QUESTION, _ANSWER))
  for i in indices:
    start, stop = lines[i]
    if i in rules:
      yield 'heading', start, _line_end(text, stop)
    elif _LABEL.match(text, start, min(stop, start + 4 * _LONGEST)):
      yield 'label', start, _line_end(text, stop)
    else:
      yield from _line_hints(text, start, stop, titles.get(i), i + 1 in rules,
                             not titles and not rules and _alone(text, lines, i))
      if has_questions and (match := _QUESTION.match(text, start, stop) or _ANSWER.match(text, start, stop)):
        yield 'question', start, match.end()
      if category == 'medical' and (match := _DETACHED.search(text, max(start, stop - 20), stop)):
        yield 'question', *match.span()


def _line_hints(text, start, stop, title, underlined, alone):
  """Marks and numbering of one line; `title` is where the title of a marked heading stands, in several pieces maybe."""
  marks = title[0] if title else []
  at, end = title[1] if title else (start, stop)
  if at >= end and title:
    marks = [(start, _line_end(text, stop))]   # a heading without a title
  yield from (('heading', *mark) for mark in marks)
  match = _COUNTED.match(text, at, end) or _PARAGRAPH.match(text, at, end)
  if not match and text[at:end].strip().capitalize() in _PLACE_NAMES:   # 'Item' on one line and '7.' on the next
    match = _COUNTED.match(text, at, min(len(text), end + _LONGEST))
  if not match and (title or underlined):
    match = _MARKED_NUMBER.match(text, at, end)
  if not match and alone and stop - start <= _LONGEST // 2:
    match = _PLAIN_NUMBER.match(text, at, end)
  if match:
    nothing_else = not title and (match.end() == len(text) or text[match.end()] in '\r\n')
    yield 'number', at, _line_end(text, match.end()) if nothing_else else match.end()


_PLACE_NAMES = frozenset(place.capitalize() for place in _PLACES.split('|'))


def _marked_title(text, start, stop):
  """(spans of the marks, span of the title) of a heading that a mark shows, None of any other line."""
  first = text[start]
  if (first in '# ' and (match := _ATX.match(text, start, stop))
      and (end := _ATX_END.search(text, max(match.end() - 1, stop - _LONGEST), stop))):
    marks, at, to = [(start, match.end()), end.span()], match.end(), max(match.end(), end.start())
    bold = _BOLD.match(text, at, to)   # ** around the whole title counts among the marks
    return ([*marks, (at, bold.start(1)), (bold.end(1), to)], bold.span(1)) if bold else (marks, (at, to))
  if stop - start > 4 * _LONGEST:
    return None
  if first == '\\' and (match := _SECTION.match(text, start, stop)):
    close = _closing_brace(text, match.end())
    return None if close is None else ([(start, match.end()), (close, close + 1)], (match.end(), close))
  if first in '.=' and (match := _MACRO.match(text, start, stop)):
    end = stop - text.endswith('"', start, stop)
    return [(start, match.end()), (end, stop)], (match.end(), end)
  if first == '=' and (match := _WIKI.match(text, start, stop)):
    line = text[match.end():stop].rstrip()
    closed = line.endswith(match[1])
    if not closed and (len(match[1]) < 2 or not match[0].endswith((' ', '\t'))):
      return None   # half an equation rather than a title
    end = match.end() + len(line.rstrip('=').rstrip() if closed else line)
    return [(start, match.end()), (end, stop)], (match.end(), end)
  if first in '*_[(' and (match := _BOLD.match(text, start, stop)):
    return [(start, match.start(1)), (match.end(1), stop)], match.span(1)
  if '<h' in text[start:stop].lower() or '</h' in text[start:stop].lower():
    tags = [match.span() for match in _TAGS.finditer(text, start, stop)]
    opened = tags and text[start:tags[0][0]].strip() == ''
    return (tags, (tags[0][1], tags[1][0] if len(tags) > 1 else stop)) if opened else None
  return None


def _closing_brace(text, position):
  """Where the brace closes that was opened before `position`, within reach of a title; None if it does not."""
  depth = 1
  for match in re.compile(r'\\.|[{}]', re.S).finditer(text, position, position + 2 * _LONGEST):
    depth += {'{': 1, '}': -1}.get(match[0], 0)
    if not depth:
      return match.start()
  return None


def _is_rule(text, lines, i):
  """True for a line that is only an underline, an overline, a horizontal rule or the border of front matter."""
  start, stop = lines[i]
  if _SPACED_RULE.match(text, start, min(stop, start + _LONGEST)):
    return True
  match = _UNDERLINE.match(text, start, min(stop, start + _LONGEST))
  if not match:
    return False
  size = len(match[0].strip())
  if size >= 3 and (match[1] in '=+' or match[1] == '_' and _alone(text, lines, i)):
    return True   # other lines of _ are there to be filled in, or to tell footnotes from a table
  beside = [j for j in (i - 1, i + 1) if 0 <= j < len(lines) and _touch(text, *sorted((lines[i], lines[j])))]
  least = 2 if match[1] in '-=' else 4
  return match[1] != '_' and size >= least and any(lines[j][1] - lines[j][0] <= size for j in beside)


def _alone(text, lines, i):
  """True if blank lines, or the text's ends, stand before and after line i."""
  return ((i == 0 or not _touch(text, lines[i - 1], lines[i])) and
          (i + 1 == len(lines) or not _touch(text, lines[i], lines[i + 1])))
