"""Chat templates: a chat, or a prompt in one user turn, as the template renders it, cut into header, blocks and prompt.

A template is a program over the messages, so what it writes around a message can only be found by running it: once on the
messages, once on markers in their place. The marked rendering, split at its markers, is the text of the template; the true
rendering must then be this text with the contents in between, or the line is refused.

Text that a template writes is told apart from text that somebody wrote (`Example.template`): only the former may turn into
special tokens, so a passage that holds the characters "<|im_end|>" cannot end a turn.

Reasons for which a chat is refused, beside those of `json_lines`: 'unknown role', 'content part', 'no assistant message',
'no user message', 'tool calls', 'chat template', 'other prompt', 'empty answers', 'empty blocks'.
"""

import dataclasses
import datetime
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from blockattn.data.example import Example
from blockattn.data.json_lines import Malformed, get_answers, get_text, get_value
from blockattn.errors import UserError

ROLES = ('system', 'user', 'assistant', 'tool')
TEMPLATE_ARGS = {'enable_thinking': False}   # of templates that know them: a student answers at once
# What a template takes for today: a prompt must not depend on the day on which it is rendered. Llama's own choice.
_TODAY = datetime.datetime(2024, 7, 26)
_OPEN, _CLOSE = '\ue000', '\ue001'   # private-use characters around the number of a message in a marked rendering


def wants_chat(wanted: bool | None, tokenizer: Any) -> bool:
  """Whether prompts are wrapped in the chat template; `wanted` None: if the tokenizer has one."""
  if wanted:
    _need(tokenizer, 'chat=True')
  return bool(tokenizer is not None and tokenizer.chat_template) if wanted is None else wanted


def _need(tokenizer, what):
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


def wrap_in_turn(example: Example, tokenizer: Any, before: Sequence[dict[str, Any]] = ()) -> Example:
  """The example's header, blocks and prompt as one user turn.

  What the template writes before the turn's content goes in front of the header, what it writes after, up to and with the
  generation prompt, behind the prompt. Header, blocks and prompt joined are the template's rendering byte for byte.

  Args:
    before: messages of earlier turns, which go in front of the header, too.
  """
  _need(tokenizer, 'wrap_in_turn')
  own = example.texts[:-1]
  whole = ''.join(own)
  pieces, _ = split_rendering([*before, {'role': 'user', 'content': whole}], tokenizer, generation=True)
  *earlier, content, after = pieces
  parts = [[(text, False)] for text in _trim(own, whole, content)]
  parts[0][:0] = [(text, i % 2 == 0) for i, text in enumerate(earlier)]
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


def from_messages(record: dict, name: str, tokenizer: Any) -> Example:
  """The example of a line with "messages", or Malformed; see `prompts`."""
  messages = _checked_messages(get_value(record, 'messages', list))
  tools = get_value(record, 'tools', list) if record.get('tools') is not None else None
  _need(tokenizer, f'{name}: a line with "messages"')
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
  example = Example((), '', '', name, get_answers(record) if 'answers' in record else (said,))
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
