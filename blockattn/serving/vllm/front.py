"""Blocks in requests to vLLM's OpenAI-compatible server: `--middleware blockattn.serving.vllm.front.BlockFront`.

A request that says its blocks is given the tokens that the engine's own prompts have, chat template and sinks included; any
other goes on as it came. What is read, of chat completions (completions in brackets):

  content parts   the texts of the last message's "content" are a block each, the last of them is the question
  documents       [{"title", "text"}, ...], a block each in front of the last message [of "prompt"]
  segment         {"target": tokens, "min", "max"}: the texts in front of the question, or a single text, are cut
  [blocks         lengths of the blocks of a "prompt" of token ids without sinks, that of the question last]
  continued       numbers of the blocks whose text goes on with that of the one before, the first being 0; those that are cut
                  say so themselves

`/blocks` is a page of what became of blocks. vLLM itself offers what is needed: a chat request that brings its token ids in
`kv_transfer_params` is not rendered again.
"""

import asyncio
import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from blockattn import blocks as blocks_lib, loading
from blockattn.data import chat_template, encode, prompts
from blockattn.data.example import Example, check_continued, cut_texts
from blockattn.data.json_lines import Malformed
from blockattn.errors import UserError
from blockattn.hf import config
from blockattn.segmentation import api
from blockattn.serving.vllm import student

CHAT, PLAIN, PAGE = '/v1/chat/completions', '/v1/completions', '/blocks'
SEGMENT = {'target': 'target_tokens', 'min': 'min_tokens', 'max': 'max_tokens'}
_PAGE = pathlib.Path(__file__).with_name('page.html')


@dataclasses.dataclass(frozen=True)
class Forms:
  """How a student's requests become prompts.

  Attributes:
    options: of its blocks.
    tokenizer: of transformers, chat template set as in training.
    encoder: of it.
  """
  options: blocks_lib.BlockOptions
  tokenizer: Any
  encoder: encode.Encoder

  @classmethod
  def of(cls, folder: str) -> 'Forms':
    tokenizer, _ = loading.prompts_of(config.read_meta(folder), folder)
    return cls(student.read_options(folder), tokenizer, encode.Encoder(tokenizer))

  def rewrite(self, path: str, body: dict) -> dict | None:
    """The request as vLLM takes it; None: as it is.

    Raises:
      ValueError: its blocks cannot be read.
    """
    prompt = self.prompt(path, body)
    if prompt is None:
      return None
    tokens, said = student.place(prompt, self.options)
    rest = {key: value for key, value in body.items() if key not in ('documents', 'segment', 'blocks', 'continued')}
    params = (body.get('kv_transfer_params') or {}) | said
    if path == CHAT:
      return rest | {'kv_transfer_params': params | {'prompt_token_ids': tokens}}
    return rest | {'prompt': tokens, 'kv_transfer_params': params}

  def prompt(self, path: str, body: Mapping[str, Any]) -> list[list[int]] | None:
    """Token ids, without sinks, of each context block of a request and, last, of the question; None: it has no blocks.

    Raises:
      ValueError: its blocks cannot be read.
    """
    return self._chat(body) if path == CHAT else self._plain(body)

  def _chat(self, body):
    messages = body.get('messages')
    if not isinstance(messages, list) or not messages or not isinstance(messages[-1], dict):
      return None   # vLLM says what is wrong with it
    *before, last = messages
    texts = _texts(last.get('content'))
    if texts is None or len(texts) == 1 and not _says_blocks(body):
      return None
    if last.get('role') != 'user':
      raise UserError('the last message has to be one of the user to have blocks')
    if not getattr(self.tokenizer, 'chat_template', None):
      raise UserError(f'the student has no chat template, and so no chat: ask {PLAIN}, with a "prompt" and "documents"')
    example = chat_template.wrap_in_turn(self._example(texts, body), self.tokenizer, [_flat(m) for m in before])
    return self.encoder.prompt(example)

  def _plain(self, body):
    prompt = body.get('prompt')
    if isinstance(prompt, str) and _says_blocks(body):
      return self.encoder.prompt(self._example([prompt], body))
    lengths = body.get('blocks')
    if lengths is None:
      return None
    if not isinstance(prompt, list) or not isinstance(lengths, list) or not all(type(n) is int for n in [*prompt, *lengths]):
      raise UserError('"blocks" are the lengths of the blocks of a "prompt" of token ids')
    if sum(lengths) != len(prompt) or min(lengths, default=0) < 1:
      raise UserError(f'"blocks" {lengths}: give the lengths, from 1 on, of all blocks of the {len(prompt)} tokens')
    continued = _continued(body, len(lengths) - 1)
    ends = [sum(lengths[:i + 1]) for i in range(len(lengths))]
    return [(blocks_lib.Continued if i in continued else list)(prompt[end - n:end])
            for i, (end, n) in enumerate(zip(ends, lengths))]

  def _example(self, texts: Sequence[str], body: Mapping[str, Any]) -> Example:
    *context, question = [*self._documents(body.get('documents')), *texts]
    said = _continued(body, len(context))
    kept = [i for i, text in enumerate(context) if text]
    context, continued = [context[i] for i in kept], tuple(n for n, i in enumerate(kept) if n and i in said)
    if body.get('segment') is not None:
      if said:
        raise UserError('"continued" beside "segment": what is cut goes on by itself; leave one of them out')
      whole = not context   # a single text, whose last part asks
      context, continued = self._cut(context or [question], body['segment'])
      *context, question = (context or ['']) if whole else [*context, question]
    return Example(tuple(context), question, '', '', continued=continued)

  def _documents(self, documents):
    if documents is None:
      return []
    if not isinstance(documents, list) or not all(isinstance(d, dict) and type(d.get('text')) is str for d in documents):
      raise UserError('"documents" is a list of {"title": ..., "text": ...}; "title" may be left out')
    form = lambda title: prompts.PLAIN.passage if title.strip() else prompts.PLAIN.untitled
    return [form(d.get('title') or '').format(title=d.get('title') or '', text=d['text']) for d in documents]

  def _cut(self, texts, said):
    if not isinstance(said, dict) or set(said) - set(SEGMENT) or not all(type(n) is int for n in said.values()):
      raise UserError(f'"segment" is {{"target": tokens}}, with "min" and "max" if you like, not {said}')
    wishes = {SEGMENT[key]: value for key, value in said.items()}
    cut = api.segment_many(texts, tokenizer=self.tokenizer, **wishes)
    return cut_texts(texts, [[start for start, _ in spans] for spans in cut])


def _says_blocks(body):
  return any(body.get(key) is not None for key in ('documents', 'segment'))


def _continued(body, blocks):
  said = body.get('continued')
  return check_continued(() if said is None else said, blocks)


def _texts(content) -> list[str] | None:
  """A message's texts; None: there is something else in it."""
  if isinstance(content, str):
    return [content]
  if not isinstance(content, list) or not content:
    return None
  texts = [part['text'] for part in content
           if isinstance(part, dict) and part.get('type') == 'text' and isinstance(part.get('text'), str)]
  return texts if len(texts) == len(content) else None


def _flat(message):
  """A message in front of the last, as templates take it."""
  texts = _texts(message.get('content')) if isinstance(message, dict) else None
  if texts is None or message.get('tool_calls'):
    raise UserError('with blocks, the messages before the last are texts')
  return {**message, 'content': ''.join(texts)}


class BlockFront:
  """The middleware. It reads the student's folder at the first request, in a thread beside the server's."""

  def __init__(self, app: Any):
    self._app, self._forms = app, None
    self._lock = asyncio.Lock()

  async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
    if scope['type'] == 'http' and (scope['method'], scope['path']) == ('GET', PAGE):
      await _answer(send, 200, b'text/html; charset=utf-8', _PAGE.read_bytes())
      return
    path = next((path for path in (CHAT, PLAIN) if scope['type'] == 'http' and scope['path'].endswith(path)), None)
    if path is None or scope['method'] != 'POST' or not _is_admitted(self._app, scope):
      await self._app(scope, receive, send)
      return
    body = await _read(receive)
    try:
      async with self._lock:
        if self._forms is None:
          self._forms = await asyncio.to_thread(Forms.of, scope['app'].state.vllm_config.model_config.model)
      body = await asyncio.to_thread(_rewritten, self._forms, path, body)
    except (UserError, Malformed) as error:
      await _refuse(send, str(error))
      return
    length = [(b'content-length', str(len(body)).encode())]
    scope = {**scope, 'headers': [pair for pair in scope['headers'] if pair[0] != b'content-length'] + length}
    await self._app(scope, _once(body, receive), send)


def _is_admitted(app: Any, scope: Any) -> bool:
  """Whether a request has the server's key, if it has one: the server asks for it further in, after this."""
  while app is not None and not hasattr(app, 'verify_token'):
    app = getattr(app, 'app', None)
  headers = {name.decode('latin-1').title(): value.decode('latin-1') for name, value in scope['headers']}
  return app is None or app.verify_token(headers)


def _rewritten(forms: Forms, path: str, body: bytes) -> bytes:
  try:
    request = json.loads(body)
  except ValueError:
    return body   # vLLM says what is wrong with it
  changed = forms.rewrite(path, request) if isinstance(request, dict) else None
  return body if changed is None else json.dumps(changed).encode()


async def _read(receive) -> bytes:
  body, more = b'', True
  while more:
    message = await receive()
    body, more = body + message.get('body', b''), message.get('more_body', False)
  return body


def _once(body, receive):
  """`receive` of a request whose body was read already; then it tells of the client's going, as before."""
  messages = [{'type': 'http.request', 'body': body, 'more_body': False}]

  async def again():
    return messages.pop() if messages else await receive()

  return again


async def _refuse(send, line):
  body = json.dumps({'error': {'message': line, 'type': 'BadRequestError', 'param': None, 'code': 400}}).encode()
  await _answer(send, 400, b'application/json', body)


async def _answer(send, status, kind, body):
  headers = [(b'content-type', kind), (b'content-length', str(len(body)).encode())]
  await send({'type': 'http.response.start', 'status': status, 'headers': headers})
  await send({'type': 'http.response.body', 'body': body})
