"""Records of tables (see `tables`) as examples of blocks, prompt and response.

A record, or line, is one of four forms, recognised by its keys:

  {"passages": [{"title", "text"}, ...], "question", "answers": [...]}   every passage is a block; the first answer is
                                                                         trained on, all are kept for evaluation
  {"blocks": [...], "prompt", "response"}                                taken as it stands
  {"messages": [{"role", "content"}, ...]}                               a chat; the last assistant message in words is
                                                                         the response, every message before it a block
  {"text"}                                                               a text without a question, for whoever goes on
                                                                         training: one block, to be cut into blocks

The first two may hold "answers" (accepted strings), "gold" (indices of the blocks that hold the answer) and "continued" (of
those whose text goes on with that of the block before), every line an "id"; other keys are ignored. Of a chat, the prompt
starts at the last user message before the response; messages after the response have no answer and are left out. A content
may be a list of text parts, which are joined by line ends; a system message may be empty; "tool_calls", messages of the
role "tool" and the line's "tools" go to the chat template.

What every prompt of a kind begins with, a chat's system message or all that the template writes in front of the context, is
a part of its own, `Example.header`: the blocks behind it are the same texts wherever they stand. The prompt of a line is
what `wrap_in_turn` or the template's generation prompt asks with, in training as in inference; a chat whose response does
not go on from there is refused.

Reasons for which a line is refused, beside those of `json_lines` and `chat_template`: 'unknown form', 'empty answers',
'empty blocks', 'bad gold', 'bad continued'.
"""

import dataclasses
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from blockattn.data import chat_template, json_lines, tables
from blockattn.data.example import Example
from blockattn.data.json_lines import Malformed, check_text, get_answers, get_text, get_value
from blockattn.errors import UserError


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


def read_examples(files: str | pathlib.Path | Sequence[str | pathlib.Path], *, report: json_lines.Report | None = None,
                  strict: bool = False, chat: bool | None = False, template: QuestionTemplate | None = None,
                  tokenizer: Any = None) -> Iterator[Example]:
  """Reads examples, file by file, line by line.

  Args:
    files: see `tables.find_files`.
    report: counts lines, examples and malformed lines as they are read.
    strict: raise at the first malformed line instead of counting it.
    chat: wrap blocks and prompt of the first two forms into one user turn of the tokenizer's chat template; None: if it
      has one.
    template: texts of the passages form; None: CHAT with `chat`, else PLAIN.
    tokenizer: a transformers tokenizer with a chat template; needed for `chat` and for lines with messages.

  Raises:
    BadLineError: a malformed line, if `strict`.
    ValueError: a chat template is needed and there is none, or a file cannot be read.
  """
  chat = chat_template.wants_chat(chat, tokenizer)
  report = json_lines.Report() if report is None else report
  for file in tables.find_files(files):
    parse = lambda number, record, file=file: parse_record(record, where=f'{file}:{number}', chat=chat, template=template,
                                                           tokenizer=tokenizer)
    for _, example in json_lines.parsed(tables.in_order(file), parse, file, lambda number: number, report, strict=strict):
      yield example


def parse_record(record: dict | Malformed, *, where: str, chat: bool = False, template: QuestionTemplate | None = None,
                 tokenizer: Any = None, texts: bool = False) -> Example:
  """A record of a table as an example.

  Args:
    record: a JSON object; what is wrong with one that is none is raised.
    where: 'file:line', the id of a line that has none.
    chat, template, tokenizer: as in `read_examples`.
    texts: take the last form, which asks nothing, too.

  Raises:
    Malformed: the line is no example.
    ValueError: a chat template is needed and there is none.
  """
  if isinstance(record, Malformed):
    raise record
  forms = [form for form in ('passages', 'blocks', 'messages') if form in record] or ['text'] * (texts and 'text' in record)
  if len(forms) != 1:
    raise Malformed('unknown form', 'a line has exactly one of the keys "passages", "blocks", "messages"'
                    + ', "text"' * texts + (f', not {forms}' if forms else f'; it has {sorted(record)[:8]}'))
  name = record.get('id')
  name = str(name) if isinstance(name, str | int) and str(name).strip() else where
  check_text(name, 'id')
  if forms == ['text']:
    return Example((get_text(record, 'text'),), '', '', name)
  if forms == ['messages']:
    return chat_template.from_messages(record, name, tokenizer)
  template = template or (CHAT if chat else PLAIN)
  example = _from_passages(record, name, template) if forms == ['passages'] else _from_blocks(record, name)
  return chat_template.wrap_in_turn(example, tokenizer) if chat else example


def _of_blocks(record, count) -> dict[str, Any]:
  """What is said of blocks by their indices, as fields of an Example."""
  return {'gold': _indices(record, 'gold', 0, count), 'continued': _indices(record, 'continued', 1, count) or ()}


def _indices(record, key, least, count):
  if record.get(key) is None:
    return None
  found = record[key]
  if not isinstance(found, list) or any(type(i) is not int or not least <= i < count for i in found):
    which = f'from {least} to {count - 1}' if count > least else 'of blocks behind the first, and there is one block'
    raise Malformed(f'bad {key}', f'"{key}" must list indices {which}, not {repr(found)[:80]}')
  return tuple(sorted(set(found)))


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
  answers = get_answers(record)
  return Example(tuple(blocks), template.question.format(question=question),
                 template.response.format(answer=answers[0]), name, answers, **_of_blocks(record, len(blocks)))


def _from_blocks(record, name):
  blocks = get_value(record, 'blocks', list)
  if not blocks:
    raise Malformed('empty blocks', '"blocks" is empty')
  for i, block in enumerate(blocks):
    check_text(block, f'"blocks"[{i}]', 'empty blocks')
  response = get_text(record, 'response', empty='empty answers')
  answers = get_answers(record) if 'answers' in record else (response.strip(),)
  return Example(tuple(blocks), get_text(record, 'prompt'), response, name, answers, **_of_blocks(record, len(blocks)))
