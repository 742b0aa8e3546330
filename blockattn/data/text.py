"""Prompts as documents: reading JSON lines into examples of blocks, prompt and response.

A line is one of three forms, recognised by its keys:

  {"passages": [{"title", "text"}, ...], "question", "answers": [...]}   every passage is a block; the first answer is
                                                                         trained on, all are kept for evaluation
  {"blocks": [...], "prompt", "response"}                                taken as it stands
  {"messages": [{"role", "content"}, ...]}                               a chat; the last assistant message in words is
                                                                         the response, every message before it a block

The first two may hold "answers" (accepted strings) and "gold" (indices of the blocks that hold the answer), every line
an "id"; other keys are ignored. Of a chat, the prompt starts at the last user message before the response; messages
after the response have no answer and are left out. A content may be a list of text parts, which are joined by line ends; a
system message may be empty; "tool_calls", messages of the role "tool" and the line's "tools" go to the chat template.

What every prompt of a kind begins with, a chat's system message or all that the template writes in front of the context, is
a part of its own, `Example.header`: the blocks behind it are the same texts wherever they stand. The prompt of a line is
what `wrap_in_turn` or the template's generation prompt asks with, in training as in inference; a chat whose response does
not go on from there is refused.

Text that a chat template writes is told apart from text that somebody wrote (`Example.template`): only the former may
turn into special tokens, so a passage that holds the characters "<|im_end|>" cannot end a turn.

Reasons for which a line is refused, each counted on its own: 'bad JSON', 'invalid UTF-8', 'NUL character', 'not an
object', 'unknown form', 'missing key', 'wrong type', 'empty text', 'empty answers', 'empty blocks', 'bad gold',
'unknown role', 'content part', 'no assistant message', 'no user message', 'tool calls', 'chat template', 'other prompt'.
"""

import collections
import dataclasses
import datetime
import glob
import gzip
import itertools
import json
import pathlib
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from blockattn.errors import UserError

SUFFIXES = ('.jsonl', '.jsonl.gz')
ROLES = ('system', 'user', 'assistant', 'tool')
LISTED = 100           # malformed lines a report lists; the rest are counted only
TEMPLATE_ARGS = {'enable_thinking': False}   # of templates that know them: a student answers at once
# What a template takes for today: a prompt must not depend on the day on which it is rendered. Llama's own choice.
_TODAY = datetime.datetime(2024, 7, 26)
_OPEN, _CLOSE = '\ue000', '\ue001'   # private-use characters around the number of a message in a marked rendering


@dataclasses.dataclass(frozen=True)
class Example:
  """A prompt with its answer.

  Attributes:
    blocks: texts of the context blocks.
    prompt: text of the last block before the answer.
    response: the answer, trained on.
    id: from the line, else 'file:line'.
    answers: accepted strings, for evaluation.
    gold: indices of the context blocks that hold the answer; None if the line does not say.
    template: for the header, each context block, the prompt and the response the (start, stop) character ranges that a
      chat template wrote. () if none did.
    header: text in front of the context, a block of its own; '' for none.
  """
  blocks: tuple[str, ...]
  prompt: str
  response: str
  id: str
  answers: tuple[str, ...] = ()
  gold: tuple[int, ...] | None = None
  template: tuple[tuple[tuple[int, int], ...], ...] = ()
  header: str = ''

  @property
  def texts(self) -> tuple[str, ...]:
    """Header, context blocks, prompt, response."""
    return self.header, *self.blocks, self.prompt, self.response


def before_spaces(text: str, cuts: Iterable[int]) -> list[int]:
  """The cuts, those between a space and a word moved in front of the space.

  In running text a space is the beginning of the next word's token. A cut behind it would leave a token of its own, which
  no reader of the whole text has.
  """
  follows = lambda cut: cut < len(text) and text[cut - 1:cut] == ' ' and not text[cut].isspace()
  return list(dict.fromkeys(int(cut) - (cut > 1 and follows(cut)) for cut in cuts))


def pieces(text: str, cuts: Iterable[int]) -> list[str]:
  """The text cut into blocks at these offsets, see `before_spaces`; joined they are the text, and none is empty."""
  inside = sorted({cut for cut in before_spaces(text, cuts) if 0 < cut < len(text)})
  return [text[a:b] for a, b in itertools.pairwise([0, *inside, len(text)])] if text else []


def recut(example: Example, cuts: Sequence[int]) -> Example:
  """The same context in other blocks.

  Args:
    cuts: offsets into the joined context, strictly increasing, see `before_spaces`; those inside of a chat template's
      text, and those outside of the context, are left out.

  Returns:
    The example with its context cut there. A new block is gold if it holds some of a gold one.
  """
  whole = ''.join(example.blocks)
  starts = [0, *itertools.accumulate(map(len, example.blocks))]
  header, *parts = example.template or [()] * len(example.texts)
  ranges = [(start + a, start + b) for start, own in zip(starts, parts[:-2]) for a, b in own]
  kept = [cut for cut in before_spaces(whole, cuts) if 0 < cut < len(whole) and not any(a < cut < b for a, b in ranges)]
  spans = list(itertools.pairwise([0, *kept, len(whole)])) if whole else []
  clipped = lambda a, b: tuple((max(x, a) - a, min(y, b) - a) for x, y in ranges if x < b and y > a)
  gold = example.gold and tuple(i for i, (a, b) in enumerate(spans)
                                if any(starts[g] < b and starts[g + 1] > a for g in example.gold))
  template = (header, *(clipped(a, b) for a, b in spans), *parts[-2:]) if example.template else ()
  return dataclasses.replace(example, blocks=tuple(whole[a:b] for a, b in spans), gold=gold, template=template)


@dataclasses.dataclass(frozen=True)
class QuestionTemplate:
  """How the passages form becomes text: `str.format` strings over {title}, {text}, {question}, {answer}."""
  passage: str = '{title}\n{text}\n\n'
  untitled: str = '{text}\n\n'
  question: str = 'Question: {question}\nAnswer:'
  response: str = ' {answer}'

  def __post_init__(self):
    for field in dataclasses.fields(self):
      try:
        getattr(self, field.name).format(title='', text='', question='', answer='')
      except (KeyError, IndexError, ValueError) as error:
        raise UserError(f'question template {field.name!r}: {error!r}; use {{title}}, {{text}}, {{question}} or '
                        '{answer}, and double any other brace') from error


PLAIN = QuestionTemplate()
CHAT = QuestionTemplate(question='Answer with a few words from the passages above.\n\nQuestion: {question}',
                        response='{answer}')


@dataclasses.dataclass(frozen=True)
class BadLine:
  file: str
  line: int        # from 1
  reason: str      # one of the reasons in the module's docstring
  detail: str = ''

  def __str__(self):
    return f'{self.file}:{self.line}: {self.reason}' + (f': {self.detail}' if self.detail else '')


class BadLineError(UserError):
  """The first malformed line of a strict reading; its message is 'file:line: reason: detail'."""

  def __init__(self, bad: BadLine):
    super().__init__(f'{bad}; correct the line, or read without strict to leave it out')
    self.bad = bad


class Malformed(ValueError):
  """A line that is no example; `read_examples` turns it into a BadLine."""

  def __init__(self, reason: str, detail: str = ''):
    super().__init__(f'{reason}: {detail}')
    self.reason = reason
    self.detail = detail.encode(errors='backslashreplace').decode()   # a quoted half surrogate could not be printed


@dataclasses.dataclass
class Report:
  """What became of the lines: lines == examples + sum(bad.values()), examples == docs + sum(dropped.values()).

  Attributes:
    lines: non-empty lines read.
    examples: well-formed ones.
    bad: malformed lines by reason.
    listed: the first LISTED malformed lines.
    docs: examples that were encoded and kept.
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
    """Several lines for a log: counts by reason, then the listed lines."""
    counts = ', '.join(f'{count} {reason}' for reason, count in (self.bad + self.dropped).most_common())
    head = f'{self.lines} lines, {self.examples} examples, {self.docs} docs'
    return '\n'.join([f'{head}; left out: {counts}' if counts else head, *map(str, self.listed)])


def find_files(patterns: str | pathlib.Path | Sequence[str | pathlib.Path]) -> list[str]:
  """The files that paths, folders (all .jsonl and .jsonl.gz below) and globs name, each once, in sorted order each.

  Raises:
    FileNotFoundError: a pattern names nothing.
    ValueError: a file is neither .jsonl nor .jsonl.gz.
  """
  if isinstance(patterns, str | pathlib.Path):
    patterns = [patterns]
  files = {}
  for pattern in map(str, patterns):
    path = pathlib.Path(pattern).expanduser()
    if path.is_dir():
      found = sorted(str(p) for p in path.rglob('*') if p.name.endswith(SUFFIXES) and p.is_file())
    elif path.is_file():
      found = [str(path)]
    else:
      found = sorted(p for p in glob.glob(str(path), recursive=True) if pathlib.Path(p).is_file())
    if not found:
      raise FileNotFoundError(f'{pattern}: no {" or ".join(SUFFIXES)} file here; give a file, a folder or a glob')
    files.update(dict.fromkeys(found))
  for file in files:
    if not file.endswith(SUFFIXES):
      raise UserError(f'{file}: not a JSON lines file; its name must end in {" or ".join(SUFFIXES)}')
  return list(files)


def read_examples(files: str | pathlib.Path | Sequence[str | pathlib.Path], *, report: Report | None = None,
                  strict: bool = False, chat: bool | None = False, template: QuestionTemplate | None = None,
                  tokenizer: Any = None, progress: Callable[[str, int], None] | None = None) -> Iterator[Example]:
  """Reads examples, file by file, line by line.

  Args:
    files: see `find_files`.
    report: counts lines, examples and malformed lines as they are read.
    strict: raise at the first malformed line instead of counting it.
    chat: wrap blocks and prompt of the first two forms into one user turn of the tokenizer's chat template; None: if it
      has one.
    template: texts of the passages form; None: CHAT with `chat`, else PLAIN.
    tokenizer: a transformers tokenizer with a chat template; needed for `chat` and for lines with messages.
    progress: called with (file, bytes of it read so far).

  Raises:
    BadLineError: a malformed line, if `strict`.
    ValueError: a chat template is needed and there is none, or a file's compression is damaged.
  """
  chat = wants_chat(chat, tokenizer)
  template = template or (CHAT if chat else PLAIN)
  report = Report() if report is None else report
  for file in find_files(files):
    for number, line in numbered_lines(file, progress):
      report.lines += 1
      try:
        example = parse_line(line, where=f'{file}:{number}', chat=chat, template=template, tokenizer=tokenizer)
      except Malformed as error:
        bad = BadLine(file, number, error.reason, error.detail)
        if strict:
          raise BadLineError(bad) from error
        report.add_bad(bad)
        continue
      report.examples += 1
      yield example


def numbered_lines(file: str, progress: Callable[[str, int], None] | None = None) -> Iterator[tuple[int, bytes]]:
  """(number from 1, bytes) of every line that is not blank."""
  with open(file, 'rb') as raw:
    stream = gzip.GzipFile(fileobj=raw) if file.endswith('.gz') else raw
    try:
      for number, line in enumerate(stream, start=1):
        if number == 1:
          line = line.removeprefix(b'\xef\xbb\xbf')   # the byte order mark that some editors write
        if progress and number % 64 == 0:
          progress(file, raw.tell())
        if line.strip():
          yield number, line
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
      raise UserError(f'{file}: its compressed data is damaged or cut off ({error}); fetch the file again') from error


def parse_line(line: bytes | str, *, where: str, chat: bool = False, template: QuestionTemplate = PLAIN,
               tokenizer: Any = None) -> Example:
  """One line as an example.

  Args:
    line: a JSON object.
    where: 'file:line', the id of a line that has none.
    chat, template, tokenizer: as in `read_examples`.

  Raises:
    Malformed: the line is no example.
    ValueError: a chat template is needed and there is none.
  """
  record = load_object(line)
  forms = [form for form in ('passages', 'blocks', 'messages') if form in record]
  if len(forms) != 1:
    raise Malformed('unknown form', 'a line has exactly one of the keys "passages", "blocks", "messages"'
                    + (f', not {forms}' if forms else f'; it has {sorted(record)[:8]}'))
  name = record.get('id')
  name = str(name) if isinstance(name, str | int) and str(name).strip() else where
  check_text(name, 'id')
  if forms == ['messages']:
    return _from_messages(record, name, tokenizer)
  example = _from_passages(record, name, template) if forms == ['passages'] else _from_blocks(record, name)
  return wrap_in_turn(example, tokenizer) if chat else example


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


def _answers(record):
  answers = get_value(record, 'answers', list)
  if not answers:
    raise Malformed('empty answers', 'the list is empty')
  return tuple(check_text(answer, f'"answers"[{i}]', 'empty answers') for i, answer in enumerate(answers))


def _gold(record, count):
  if record.get('gold') is None:
    return None
  gold = record['gold']
  if not isinstance(gold, list) or any(type(i) is not int or not 0 <= i < count for i in gold):
    raise Malformed('bad gold', f'"gold" must list indices below {count}, not {str(gold)[:80]}')
  return tuple(sorted(set(gold)))


def _from_passages(record, name, template):
  passages = get_value(record, 'passages', list)
  if not passages:
    raise Malformed('empty blocks', '"passages" is empty')
  blocks = []
  for i, passage in enumerate(passages):
    if not isinstance(passage, dict):
      raise Malformed('wrong type', f'"passages"[{i}] is {type(passage).__name__}, not dict')
    title = get_text(passage, 'title', f'"passages"[{i}]["title"]', empty=None)
    text = get_text(passage, 'text', f'"passages"[{i}]["text"]', empty='empty blocks')
    blocks.append((template.passage if title.strip() else template.untitled).format(title=title, text=text))
  question = get_text(record, 'question')
  answers = _answers(record)
  return Example(tuple(blocks), template.question.format(question=question),
                 template.response.format(answer=answers[0]), name, answers, _gold(record, len(blocks)))


def _from_blocks(record, name):
  blocks = get_value(record, 'blocks', list)
  if not blocks:
    raise Malformed('empty blocks', '"blocks" is empty')
  for i, block in enumerate(blocks):
    check_text(block, f'"blocks"[{i}]', 'empty blocks')
  response = get_text(record, 'response', empty='empty answers')
  answers = _answers(record) if 'answers' in record else (response.strip(),)
  return Example(tuple(blocks), get_text(record, 'prompt'), response, name, answers, _gold(record, len(blocks)))


# Chat templates. A template is a program over the messages, so what it writes around a message can only be found by
# running it: once on the messages, once on markers in their place. The marked rendering, split at its markers, is the
# text of the template; the true rendering must then be this text with the contents in between, or the line is refused.


def wants_chat(wanted: bool | None, tokenizer: Any) -> bool:
  """Whether prompts are wrapped in the chat template; `wanted` None: if the tokenizer has one."""
  if wanted:
    _need_chat_template(tokenizer, 'chat=True')
  return bool(tokenizer is not None and tokenizer.chat_template) if wanted is None else wanted


def _need_chat_template(tokenizer, what):
  if tokenizer is None or not tokenizer.chat_template:
    raise UserError(f'{what} needs a tokenizer with a chat template; use the tokenizer of an instruction-tuned model, '
                    'put a chat_template.jinja into its folder, or do without (--config.data.chat=false, --no-chat; lines '
                    'with "passages" or "blocks")')


def set_template_args(tokenizer: Any, said: str = '') -> None:
  """Gives the tokenizer's chat template its arguments, for good: whatever renders with it renders with them, on every day.

  Args:
    said: 'NAME=VALUE,...', values in JSON or plain text; those of TEMPLATE_ARGS that the template knows hold if they are not
      given.

  Raises:
    ValueError: an argument that the template does not know.
  """
  given = {}
  for part in filter(None, said.split(',')):
    name, equals, value = part.partition('=')
    if not equals or not name.isidentifier():
      raise UserError(f'template arguments {said!r}: write NAME=VALUE,..., such as enable_thinking=true')
    given[name] = _value(value)
  templates = tokenizer.chat_template
  knows = lambda name: any(re.search(rf'\b{name}\b', t) for t in
                           (templates.values() if isinstance(templates, Mapping) else [templates or '']))
  for name in given:
    if not knows(name):
      raise UserError(f'template argument {name!r}: the chat template of {tokenizer.name_or_path or "this tokenizer"} does '
                      'not know it; leave it out')
  values = {name: value for name, value in TEMPLATE_ARGS.items() if knows(name)} | given
  head = ''.join(f'{{%- set {name} = {json.dumps(value)} -%}}' for name, value in sorted(values.items()))
  with_head = lambda t: _fixed_date(t) + head + t
  if templates:
    tokenizer.chat_template = ({name: with_head(t) for name, t in templates.items()} if isinstance(templates, Mapping)
                               else with_head(templates))


def _fixed_date(template):
  """What to write in front of a template that asks for today's date, so that it gets _TODAY."""
  formats = set(re.findall(r"""strftime_now\(\s*["']([^"']*)["']\s*\)""", template))
  if not formats:
    return ''
  dates = json.dumps({form: _TODAY.strftime(form) for form in sorted(formats)})
  return f'{{%- macro strftime_now(format) -%}}{{{{ {dates}[format] }}}}{{%- endmacro -%}}'


def _value(said):
  try:
    value = json.loads(said)
  except ValueError:
    return said
  return value if isinstance(value, bool | int | float | str) else said


def _render(tokenizer, messages, generation, tools=None):
  try:
    return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=generation)
  except Exception as error:   # a template raises what it likes: jinja2 errors, TypeErrors, its own refusals
    raise Malformed('chat template', str(error)[:200]) from error


def probe(tokenizer: Any) -> str:
  """What the chat template makes of a small chat: tells templates apart that only their surroundings make differ."""
  try:
    return _render(tokenizer, [{'role': 'user', 'content': 'a'}], True)
  except Malformed as error:
    return str(error)


def split_rendering(messages: Sequence[dict[str, Any]], tokenizer: Any, *, generation: bool = False, tools: Any = None):
  """Renders a chat and tells the template's text from the contents.

  Args:
    messages: {'role', 'content'}, also 'reasoning_content', 'tool_calls' for templates that know them.
    tokenizer: a transformers tokenizer with a chat template.
    generation: end with the generation prompt.
    tools: definitions for the template.

  Returns:
    (pieces, owners): template and content texts in turn, template first and last, which joined are the rendering byte
    for byte; and for each content piece the index of its message.

  Raises:
    Malformed: the template refuses the messages, or changes their contents by more than white space at the ends.
  """
  rendering = _render(tokenizer, messages, generation, tools)
  for variant in (messages, _apart_from_thoughts(messages)):
    found = _align(variant, rendering, tokenizer, generation, tools)
    if found:
      return found
  raise Malformed('chat template', 'it rewrites the contents of the messages, so that they cannot be told from its own')


def _apart_from_thoughts(messages):
  """Contents with <think> ... </think> as two keys, which is what templates that know thoughts make of them."""
  apart = []
  for message in messages:
    thoughts, end, content = message['content'].partition('</think>')
    if end and message['role'] == 'assistant':
      message = {**message, 'content': content, 'reasoning_content': thoughts.split('<think>')[-1]}
    apart.append(message)
  return apart


def _align(messages, rendering, tokenizer, generation, tools):
  """The result of `split_rendering`, or None if the rendering is not the template's text around the contents."""
  # Beside tool calls a template asks whether there are words at all.
  slots = [(i, key) for i, message in enumerate(messages) for key in ('reasoning_content', 'content')
           if key in message and (message[key] or 'tool_calls' not in message)]
  marked = [dict(message) for message in messages]
  for n, (i, key) in enumerate(slots):
    marked[i][key] = f'{_OPEN}{n}{_CLOSE}'
  parts = re.split(f'{_OPEN}([0-9]+){_CLOSE}', _render(tokenizer, marked, generation, tools))
  shown = [int(n) for n in parts[1::2]]
  expected = [n for n, (_, key) in enumerate(slots) if key == 'content' or n in shown]   # old thoughts may be left out
  if shown != expected:
    return None
  at = len(parts[0])
  for k, n in enumerate(shown):
    i, key = slots[n]
    content = messages[i][key]
    trimmed = (content, content.strip(), content.strip('\n'), content.lstrip(), content.rstrip(), content.lstrip('\n'))
    after = parts[2 * k + 2]
    fits = [c for c in trimmed if rendering.startswith(c + after, at)]
    if not fits:
      return None
    parts[2 * k + 1] = fits[0]
    at += len(fits[0] + after)
  return (parts, [slots[n][0] for n in shown]) if ''.join(parts) == rendering else None


def _assemble(parts):
  """Text and template ranges of [(text, whether the template wrote it), ...]."""
  text, ranges = '', []
  for part, from_template in parts:
    if from_template and part:
      ranges.append((len(text), len(text) + len(part)))
    text += part
  return text, tuple(ranges)


def wrap_in_turn(example: Example, tokenizer: Any) -> Example:
  """The example's header, blocks and prompt as one user turn.

  What the template writes before the turn's content goes in front of the header, what it writes after, up to and with the
  generation prompt, behind the prompt. Header, blocks and prompt joined are the template's rendering byte for byte.
  """
  _need_chat_template(tokenizer, 'wrap_in_turn')
  own = example.texts[:-1]
  whole = ''.join(own)
  pieces, _ = split_rendering([{'role': 'user', 'content': whole}], tokenizer, generation=True)
  before, content, after = pieces
  parts = [[(text, False)] for text in _trim(own, whole, content)]
  parts[0].insert(0, (before, True))
  parts[-1].append((after, True))
  return _with_parts(example, [*map(_assemble, parts), (example.response, ())])


def _with_parts(example, made):
  """The example with these texts of `Example.texts`, each with its ranges."""
  (header, *blocks, prompt, response), template = zip(*made)
  return dataclasses.replace(example, header=header, blocks=tuple(blocks), prompt=prompt, response=response,
                             template=template)


def _trim(texts, whole, content):
  """`texts`, which joined are `whole`, less the white space at both ends that a template left out of `content`."""
  start = whole.index(content)
  stop = start + len(content)
  trimmed, at = [], 0
  for text in texts:
    trimmed.append(text[max(start - at, 0):max(stop - at, 0)])
    at += len(text)
  return trimmed


def _from_messages(record, name, tokenizer):
  messages = _checked_messages(get_value(record, 'messages', list))
  tools = get_value(record, 'tools', list) if record.get('tools') is not None else None
  _need_chat_template(tokenizer, f'{name}: a line with "messages"')
  _check_no_special(messages, tools, tokenizer)
  roles = [message['role'] for message in messages]
  answers = [i for i, message in enumerate(messages) if message['role'] == 'assistant' and 'tool_calls' not in message]
  if not answers:
    if 'assistant' in roles:
      raise Malformed('tool calls', 'every assistant message calls tools; the response is the last one that does not')
    raise Malformed('no assistant message', f'the roles are {roles[:8]}')
  answer = answers[-1]
  if 'user' not in roles[:answer]:
    raise Malformed('no user message', 'before the last assistant message')
  ask = answer - 1 - roles[:answer][::-1].index('user')
  header, texts = _message_texts(messages[:answer + 1], tokenizer, tools)
  prompt, response = _apart_at([part for parts in texts[ask:] for part in parts],
                               _prompt_length(messages[:answer], tokenizer, tools, [header, *texts], ask))
  made = [part for part in map(_assemble, texts[:ask]) if part[0]]
  said = messages[answer]['content'].split('</think>')[-1].strip()
  example = Example((), '', '', name, _answers(record) if 'answers' in record else (said,))
  return _with_parts(example, [_assemble(header), *made, _assemble(prompt), _assemble(response)])


def _prompt_length(messages, tokenizer, tools, texts, ask):
  """Characters from the question, message `ask`, to the end of what these messages are answered after."""
  joined = lambda parts: ''.join(text for own in parts for text, _ in own)
  whole, asked = joined(texts), _render(tokenizer, messages, True, tools)
  if not whole.startswith(asked):
    wrong = next(i for i, (a, b) in enumerate(zip(asked, whole + '\0')) if a != b)
    raise Malformed('other prompt', f'the template asks with {asked[-40:]!r}, but this response begins otherwise, at '
                    f'{whole[wrong:wrong + 20]!r}; for answers with thoughts set template_args to enable_thinking=true')
  return len(asked) - len(joined(texts[:ask + 1]))


def _apart_at(parts, length):
  """Parts as of `_message_texts` in two, `length` characters in the first."""
  first, second = [], []
  for text, from_template in parts:
    first.append((text[:length], from_template))
    second.append((text[length:], from_template))
    length = max(length - len(text), 0)
  return first, second


def _check_no_special(messages, tools, tokenizer):
  """What a template writes out beside contents counts as its own text, so that it must hold no special token."""
  beside = json.dumps([tools, [message.get('tool_calls') for message in messages]], ensure_ascii=False)
  for token in tokenizer.added_tokens_decoder.values():
    if token.special and token.content in beside:
      raise Malformed('tool calls', f'they hold the special token {token.content}')


def _content(message, role, what):
  """A message's content as text."""
  content, calls = message.get('content'), bool(message.get('tool_calls'))
  if calls and content is None:
    return ''
  if isinstance(content, list):
    for i, part in enumerate(content):
      if not isinstance(part, dict) or part.get('type') != 'text':
        kind = part.get('type') if isinstance(part, dict) else type(part).__name__
        raise Malformed('content part', f'{what}["content"][{i}] is {str(kind)[:40]!r}; only "text" is read')
    texts = [get_text(part, 'text', f'{what}["content"][{i}]["text"]', None) for i, part in enumerate(content)]
    message = {'content': '\n'.join(texts)}
  empty = None if calls or role in ('system', 'tool') else 'empty answers' if role == 'assistant' else 'empty blocks'
  return get_text(message, 'content', f'{what}["content"]', empty)


def _tool_calls(message, what):
  """A message's calls, arguments as objects, which all templates take."""
  calls = []
  for i, call in enumerate(get_value(message, 'tool_calls', list, what)):
    function = call.get('function', call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get('name'), str):
      raise Malformed('tool calls', f'{what}[{i}] names no function')
    arguments = function.get('arguments', {})
    try:
      arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError as error:
      raise Malformed('tool calls', f'{what}[{i}]: its arguments are no JSON ({error})') from error
    calls.append({'type': 'function', 'function': {'name': function['name'], 'arguments': arguments}})
  return calls


def _checked_messages(messages):
  checked = []
  for i, message in enumerate(messages):
    what = f'"messages"[{i}]'
    if not isinstance(message, dict):
      raise Malformed('wrong type', f'{what} is {type(message).__name__}, not dict')
    role = get_text(message, 'role', f'{what}["role"]')
    if role not in ROLES:
      raise Malformed('unknown role', f'{what}: {role!r} is none of {", ".join(ROLES)}')
    checked.append({'role': role, 'content': _content(message, role, what)})
    if message.get('tool_calls'):
      checked[-1]['tool_calls'] = _tool_calls(message, f'{what}["tool_calls"]')
    if message.get('reasoning_content') is not None:
      checked[-1]['reasoning_content'] = get_text(message, 'reasoning_content', f'{what}["reasoning_content"]', empty=None)
  return checked


def _message_texts(messages, tokenizer, tools):
  """(parts of the header, for each message its parts), parts [(text, whether the template wrote it)] that joined are the
  rendering.

  The template's text between two messages is cut behind what it writes at the end of a message, where that can be
  told, else it goes to the later message. What stands between the question and the answer belongs to the question. The
  header is a system message at the beginning; else what stands before the first message and not before later ones of its
  role, where that can be told.
  """
  pieces, owners = split_rendering(messages, tokenizer, tools=tools)
  closing = pieces[-1]
  texts = [[] for _ in messages]
  texts[0].append((pieces[0], True))
  last = len(messages) - 1
  for k, owner in enumerate(owners):
    texts[owner].append((pieces[2 * k + 1], False))
    between = pieces[2 * k + 2]
    follower = owners[k + 1] if k + 1 < len(owners) else last
    if follower == owner or follower == last:
      texts[owner].append((between, True))
    else:
      cut = len(closing) if between.startswith(closing) else 0
      texts[owner].append((between[:cut], True))
      texts[follower].append((between[cut:], True))
  if messages[0]['role'] == 'system':
    return texts[0], [[], *texts[1:]]
  before = pieces[0]
  for message, parts in zip(messages[1:], texts[1:]):
    opening = parts[0][0] if parts else ''
    if message['role'] == messages[0]['role'] and opening and before.endswith(opening):
      texts[0][0] = (opening, True)
      return [(before.removesuffix(opening), True)], texts
  return [], texts
