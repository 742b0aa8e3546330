"""Blocks of what people say to each other: transcripts with annotated topics, e-mail messages and threads."""

import email
import email.message
import email.policy
import email.utils
import json
import re

from blockattn.segmentation.semanticseg import structure_text
from blockattn.segmentation.semanticseg.structure_text import LINE_END, NoStructure, cut_at

_ENVELOPE = re.compile(r'^From \S.*\d\d:\d\d.*(?:\r\n|\n|\r)', re.M)
_ATTRIBUTION = re.compile(r'^(?P<quoted>[> \t]*)(?:On\b[^\r\n]{1,200}(?:\r?\n[> \t]*[^\r\n]{1,200})?\bwrote:|'
                          r'-{2,} ?Original Message ?-{2,}|-{2,} ?Forwarded message ?-{2,}|_{20,}(?=\r?\n[> \t]*From:))'
                          r'[ \t]*$', re.M | re.I)
_REPLY_WORDS = re.compile(r'^(?:(?:re|fwd?|aw|sv|wg)(?:\[\d+\])?:\s*|\[[^\]]{1,40}\]\s*)+', re.I)


def transcript(text: str) -> list[str]:
  """Cuts a transcript where the topic changes.

  The JSON object holds "turns", a list of {"speaker", "text", "topic"}; a turn without a topic goes on with the one before,
  and a speaker may be missing. The blocks join to lines 'speaker: text'. Raises NoStructure: no JSON of that form, or all of
  one topic."""
  blocks, topic = [], None
  for number, turn in enumerate(_turns(text)):
    said, speaker, new = turn.get('text'), turn.get('speaker', ''), turn.get('topic', topic)
    if not isinstance(said, str) or not isinstance(speaker, str):
      raise NoStructure(f'turn {number}: "text" and "speaker" must be strings')
    if not blocks or new != topic:
      blocks.append('')
    blocks[-1] += f'{speaker}: ' * bool(speaker) + ' '.join(said.split()) + '\n'
    topic = new
  if len(blocks) < 2:
    raise NoStructure('not more than one topic')
  return blocks


def _turns(text):
  try:
    values = json.loads(text)
  except (ValueError, RecursionError) as error:
    raise NoStructure(f'bad JSON: {error}') from error
  turns = values.get('turns') if isinstance(values, dict) else None
  if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
    raise NoStructure('no transcript: it needs "turns", a list of objects with "speaker", "text" and "topic"')
  return turns


def message(text: str) -> list[str]:
  """Cuts a message (an .eml file) where it starts to repeat older ones below the answer, at every level of quoting.

  Quotes with answers between them stay with their answers: an answer alone could not be understood. The blocks join to the
  sender, date and subject, and the text of the message. Raises NoStructure: no message is quoted as a whole."""
  rendered = _render(text)
  starts = [match.start() for match in _ATTRIBUTION.finditer(rendered)
            if _only_quotes(rendered[match.end():], match['quoted'], match[0])]
  if not starts:
    raise NoStructure('no message in it is quoted as a whole')
  return cut_at(rendered, starts)


def _only_quotes(rest, quoted, attribution):
  """True if all below is quoted more deeply than the attribution, or the attribution is of a kind that quotes all below."""
  if not re.search(r'wrote:\s*$', attribution, re.I):
    return True
  marks = lambda line: line[:len(line) - len(line.lstrip('> \t'))].count('>')
  deeper = [marks(line) > quoted.count('>') for line in LINE_END.split(rest) if line.strip('> \t')]
  return any(deeper) and all(deeper[:len(deeper) - deeper[::-1].index(True)])


def threads(text: str) -> list[list[str]]:
  """The threads of an mbox file, in order of their first messages; a block is a message.

  Messages belong together by the ids that they refer to, those without any by their subject. Raises NoStructure: there is no
  mbox envelope, or no thread of more than one message."""
  envelopes = list(_ENVELOPE.finditer(text))
  if not envelopes:
    raise NoStructure('no mbox: no line "From sender date" before a message')
  stops = [match.start() for match in envelopes[1:]] + [len(text)]
  messages = [text[match.end():stop] for match, stop in zip(envelopes, stops, strict=True)]
  grouped = {}
  for item, root in zip(messages, _roots(map(_parse, messages)), strict=True):
    grouped.setdefault(root, []).append(_render(item))
  found = [blocks for blocks in grouped.values() if len(blocks) > 1]
  if not found:
    raise NoStructure('no thread of more than one message')
  return found


def _roots(parsed):
  """A key of its thread for each message."""
  roots, keys = {}, []   # roots: message id or subject -> key
  for number, item in enumerate(parsed):
    ids, own = (re.findall(r'<[^<>\s]+>', ' '.join(_header(item, name) for name in names))
                for names in (('References', 'In-Reply-To'), ('Message-ID',)))
    subject = _REPLY_WORDS.sub('', _header(item, 'Subject').strip()).lower()
    subjects = [subject] if subject else []
    keys.append(next((roots[name] for name in ids or subjects if name in roots), number))
    for name in [*ids, *own, *subjects]:
      roots.setdefault(name, keys[-1])
  return keys


def _header(item, name):
  try:
    return str(item.get(name, ''))
  except (ValueError, LookupError, AttributeError, TypeError):   # the parser's, on odd headers
    return ''


def _parse(text) -> email.message.EmailMessage:
  return email.message_from_bytes(text.encode('utf-8', 'surrogateescape'), policy=email.policy.default)


def _render(text):
  """'From: ..', 'Date: ..', 'Subject: ..', a blank line and the text of a message; HTML only if there is nothing else."""
  try:
    item = _parse(text)
    head = ''.join(f'{name}: {" ".join(str(item[name]).split())}\n' for name in ('From', 'Date', 'Subject') if item[name])
    part = item.get_body(preferencelist=('plain', 'html'))
    body = '' if part is None else _decoded(part)
    if part is not None and part.get_content_subtype() == 'html':
      body = structure_text.html_text(body)[0]
  except (ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:   # the parser's, on odd headers
    raise NoStructure(f'a message that cannot be read: {type(error).__name__}: {error}') from error
  return f'{head}\n{body.strip()}\n\n'


def _decoded(part):
  data = part.get_payload(decode=True) or b''
  try:
    return data.decode(part.get_content_charset('utf-8'), 'replace')
  except LookupError:   # a charset that nobody knows
    return data.decode('utf-8', 'replace')
