"""Requests with blocks, and what vLLM is given in their place. Needs no vLLM."""

import asyncio
import json
import sys
import types

import data_cases
import pytest
import serving_docs

from blockattn import blocks
from blockattn.data import encode
from blockattn.data.json_lines import Malformed
from blockattn.hf import config
from blockattn.serving.vllm import __main__ as command, front, student

OPTIONS = blocks.BlockOptions((3, 3), 'sequential', 8)
ASKED = {'role': 'user', 'content': [{'type': 'text', 'text': text} for text in ('One.\n', 'Two.\n', 'Which?')]}


def forms(template=data_cases.CHATML):
  tokenizer = data_cases.tiny_tokenizer(template)
  return front.Forms(OPTIONS, tokenizer, encode.Encoder(tokenizer))


def read_back(prompt_tokens, lengths):
  """The blocks' texts; every block begins with the sinks."""
  texts, at = [], 0
  for length in lengths:
    tokens = prompt_tokens[at:at + length]
    assert tuple(tokens[:2]) == OPTIONS.sink_ids
    texts.append(data_cases.tiny_tokenizer().decode(tokens[2:]))
    at += length
  assert at == len(prompt_tokens)
  return texts


def chat(body):
  params = forms().rewrite(front.CHAT, body)['kv_transfer_params']
  return read_back(params['prompt_token_ids'], params[student.BLOCKS])


def plain(body):
  out = forms(None).rewrite(front.PLAIN, body)
  return read_back(out['prompt'], out['kv_transfer_params'][student.BLOCKS])


def test_parts_of_a_message_are_blocks():
  assert chat({'messages': [ASKED]}) == [
      '<|im_start|>user\n', 'One.\n', 'Two.\n', 'Which?<|im_end|>\n<|im_start|>assistant\n']


def test_earlier_messages_stand_in_front():
  before = [{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': [{'type': 'text', 'text': 'Hello'}]},
            {'role': 'assistant', 'content': 'Hi.'}]
  header, *rest = chat({'messages': [*before, ASKED]})
  assert header == ('<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n'
                    '<|im_start|>assistant\nHi.<|im_end|>\n<|im_start|>user\n')
  assert rest == chat({'messages': [ASKED]})[1:]


def test_documents_are_blocks():
  documents = [{'title': 'A', 'text': 'One.'}, {'text': 'Two.'}]
  message = {'role': 'user', 'content': 'Which?'}
  assert chat({'messages': [message], 'documents': documents})[1:3] == ['A\nOne.\n\n', 'Two.\n\n']
  assert plain({'prompt': 'Which?', 'documents': documents}) == ['A\nOne.\n\n', 'Two.\n\n', 'Which?']


def test_texts_are_cut_by_the_segmenter():
  text = ''.join(f'This is sentence {i} of a text about birds. ' for i in range(40))
  found = plain({'prompt': text, 'segment': {'target': 100, 'max': 200}})
  assert len(found) > 2 and ''.join(found) == text
  parts = [{'type': 'text', 'text': part} for part in (text, 'Which?')]
  found = chat({'messages': [{'role': 'user', 'content': parts}], 'segment': {'target': 100}})
  assert len(found) > 3 and ''.join(found[1:-1]) == text and found[-1].startswith('Which?<|im_end|>')


@pytest.mark.parametrize('sinks, blocks_, said, tokens', [
    ((), [[10, 11], [12], [13, 14], [15]], {student.BLOCKS: [2, 1, 1], student.HIDDEN: [[], [13]]}, [10, 11, 14, 15]),
    ((3, 3), [[10], [12], [13]], {student.BLOCKS: [3, 1, 3], student.HIDDEN: [[], [3, 3]]}, [3, 3, 10, 12, 3, 3, 13]),
    ((), [[10], [12]], {student.BLOCKS: [1, 1], student.HIDDEN: [[]]}, [10, 12])])
def test_hidden_starts_are_told_apart_from_the_prompt(sinks, blocks_, said, tokens):
  """A block of which nothing else is left stands nowhere."""
  options = blocks.BlockOptions(sinks, 'sequential', 8, hide_starts=True)
  assert student.place(blocks_, options) == (tokens, said)


def test_what_the_segmenter_cut_goes_on():
  """And no document goes on with another, nor with what a chat template writes in front of it."""
  options = blocks.BlockOptions((), 'sequential', 8, hide_starts=True, overlap=4)
  text = ''.join(f'This is sentence {i} of a text about birds. ' for i in range(40))
  body = {'documents': [{'text': text}, {'text': 'One.'}], 'segment': {'target': 100, 'max': 200}}
  tokenizer = data_cases.tiny_tokenizer(data_cases.CHATML)
  made = front.Forms(options, tokenizer, encode.Encoder(tokenizer))
  prompt = made.prompt(front.CHAT, body | {'messages': [{'role': 'user', 'content': 'Which?'}]})
  assert len(prompt) > 5
  goes_on = [isinstance(block, blocks.Continued) for block in prompt]
  assert goes_on == [False, False, *[True] * (len(prompt) - 4), False, False]
  _, said = student.place(prompt, options)
  assert [len(start) for start in said[student.HIDDEN]] == [0, 1, *[4] * (len(prompt) - 4), 1]
  assert said[student.HIDDEN][2] == prompt[1][-4:]
  single = made.prompt(front.PLAIN, {'prompt': text, 'segment': {'target': 100}})
  assert [isinstance(block, blocks.Continued) for block in single] == [False, *[True] * (len(single) - 2), False]


def test_blocks_that_go_on_are_named():
  texts = [{'type': 'text', 'text': text} for text in ('One.', '', 'Two.', 'Three.', 'Which?')]
  goes_on = lambda prompt: [isinstance(block, blocks.Continued) for block in prompt]
  chat_body = {'messages': [{'role': 'user', 'content': texts}], 'continued': [1, 3]}
  assert goes_on(forms().prompt(front.CHAT, chat_body)) == [False, False, False, True, False]   # behind the header
  ids = {'prompt': [10, 11, 12, 13], 'blocks': [1, 1, 2], 'continued': [1]}
  assert goes_on(forms().prompt(front.PLAIN, ids)) == [False, True, False]
  assert 'continued' not in forms().rewrite(front.PLAIN, ids)


def test_lengths_of_token_ids():
  out = forms().rewrite(front.PLAIN, {'prompt': [10, 11, 12, 13], 'blocks': [1, 3], 'max_tokens': 2})
  assert out == {'prompt': [3, 3, 10, 3, 3, 11, 12, 13], 'max_tokens': 2, 'kv_transfer_params': {student.BLOCKS: [3, 5]}}


@pytest.mark.parametrize('path, body', [
    (front.CHAT, {'messages': [{'role': 'user', 'content': 'Hello'}]}), (front.CHAT, {'messages': []}), (front.CHAT, {}),
    (front.CHAT, {'messages': [{'role': 'user', 'content': [{'type': 'text', 'text': 'Hello'}]}]}),
    (front.CHAT, {'messages': [{'role': 'user', 'content': [{'type': 'image_url'}, {'type': 'text', 'text': 'Hello'}]}]}),
    (front.PLAIN, {'prompt': 'Hello'}), (front.PLAIN, {'prompt': [1, 2]}), (front.PLAIN, {'prompt': ['a', 'b']})])
def test_other_requests_go_on_as_they_came(path, body):
  assert forms().rewrite(path, body) is None


@pytest.mark.parametrize('path, body, line', [
    (front.PLAIN, {'prompt': [1, 2], 'blocks': [1, 2]}, 'give the lengths, from 1 on, of all blocks of the 2 tokens'),
    (front.PLAIN, {'prompt': [1, 2], 'blocks': [2, 0]}, 'give the lengths, from 1 on'),
    (front.PLAIN, {'prompt': 'a b', 'blocks': [2]}, 'of a "prompt" of token ids'),
    (front.PLAIN, {'prompt': [1, 2], 'blocks': [1, 1], 'continued': [1]}, 'of the 1 blocks in front of the question, not'),
    (front.PLAIN, {'prompt': [1, 2], 'blocks': [1, 1], 'continued': 0}, 'in front of the question, not 0'),
    (front.PLAIN, {'prompt': 'a', 'documents': [{'text': 'b'}] * 2, 'continued': [1], 'segment': {'target': 9}}, 'leave'),
    (front.PLAIN, {'prompt': 'a', 'documents': ['b']}, '"documents" is a list of'),
    (front.PLAIN, {'prompt': 'a', 'segment': 512}, '"segment" is {"target": tokens}'),
    (front.PLAIN, {'prompt': '', 'segment': {'target': 512}}, 'a prompt must be a list of blocks, none of them empty'),
    (front.PLAIN, {'prompt': 'a', 'segment': {'target': 10, 'min': 20}}, '20'),
    (front.CHAT, {'messages': [{**ASKED, 'role': 'assistant'}]}, 'has to be one of the user'),
    (front.CHAT, {'messages': [{'role': 'user', 'content': [{'type': 'image_url'}]}, ASKED]}, 'are texts')])
def test_what_cannot_be_read_is_refused_in_a_line(path, body, line):
  with pytest.raises((ValueError, Malformed), match=line):
    forms().rewrite(path, body)


def test_a_student_without_a_chat_template_is_asked_completions():
  with pytest.raises(ValueError, match='ask /v1/completions, with a "prompt" and "documents"'):
    forms(None).rewrite(front.CHAT, {'messages': [ASKED]})


@pytest.mark.parametrize('sent, status', [
    (b'{"prompt": [10, 11, 12], "blocks": [1, 2]}', 200), (b'{"prompt": "a"}', 200), (b'no JSON', 200), (b'[]', 200),
    (b'{"prompt": [10], "blocks": [2]}', 400)])
def test_the_middleware(sent, status):
  seen, answered = {}, []

  async def app(scope, receive, send):
    seen.update(body=(await receive())['body'], headers=dict(scope['headers']), then=await receive())
    await send({'type': 'http.response.start', 'status': 200, 'headers': []})

  async def ask():
    middle = front.BlockFront(app)
    middle._forms = forms()
    parts = [{'type': 'http.request', 'body': sent[:5], 'more_body': True},
             {'type': 'http.request', 'body': sent[5:]}, {'type': 'http.disconnect'}]

    async def receive():
      return parts.pop(0)

    async def send(message):
      answered.append(message)

    state = types.SimpleNamespace()
    await middle({'type': 'http', 'method': 'POST', 'path': front.PLAIN, 'headers': [(b'content-length', b'5')],
                  'app': state}, receive, send)

  asyncio.run(ask())
  assert answered[0]['status'] == status
  if status == 400:
    assert 'give the lengths' in json.loads(answered[1]['body'])['error']['message']
  else:
    assert int(seen['headers'][b'content-length']) == len(seen['body']) and seen['then']['type'] == 'http.disconnect'
    assert (b'"blocks": [3, 4]' in seen['body']) == (b'blocks' in sent) and (b'blocks' in sent or seen['body'] == sent)


@pytest.mark.parametrize('key, is_read', [(b'key', True), (b'guessed', False)])
def test_requests_without_the_servers_key_are_not_read(key, is_read):
  read, headers = [], [(b'authorization', b'Bearer ' + key)]

  class Guard:
    """As vLLM's, which stands further in."""

    def verify_token(self, headers):
      return headers.get('Authorization') == 'Bearer key'

  class Between:
    app = Guard()

    async def __call__(self, scope, receive, send):
      pass

  async def receive():
    read.append(1)
    return {'type': 'http.request', 'body': b'{"prompt": "a"}'}

  middle = front.BlockFront(Between())
  middle._forms = forms()
  asyncio.run(middle({'type': 'http', 'method': 'POST', 'path': front.PLAIN, 'headers': headers}, receive, None))
  assert bool(read) == is_read


def test_a_page_shows_what_became_of_blocks():
  answered = []

  async def send(message):
    answered.append(message)

  asyncio.run(front.BlockFront(None)({'type': 'http', 'method': 'GET', 'path': front.PAGE, 'headers': []}, None, send))
  assert answered[0]['status'] == 200 and b"fetch('metrics')" in answered[1]['body']


def test_nodes_of_llamaindex_are_blocks(monkeypatch):
  """By the documents' snippet; its package cannot be installed beside vLLM."""
  pytest.importorskip('llama_index.core')
  sent = {}

  class OpenAI:
    def __init__(self, **_):
      self.chat = types.SimpleNamespace(completions=types.SimpleNamespace(create=lambda **body: sent.update(body)))

  monkeypatch.setitem(sys.modules, 'openai', types.SimpleNamespace(OpenAI=OpenAI))
  exec(next(code for code in serving_docs.snippets() if 'llama_index' in code), {})
  found = chat(sent | sent.pop('extra_body'))
  assert found[1:3] == ['The bridge was built in 1932.\n\n', 'It is 1149 m long.\n\n'] and len(found) == 4


def test_the_command_is_that_of_vllm():
  made = command.arguments('exported', {'memory_bytes': 1}, ['--port', '1'])
  assert made[:2] == ['serve', 'exported'] and made[-2:] == ['--port', '1']
  assert json.loads(made[3])['kv_connector_extra_config'] == {'memory_bytes': 1}


@pytest.mark.parametrize('change, line', [
    ({'blocks': None}, 'says nothing of blocks'), ({'seam': 2}, '"seam" is not served'),
    ({'links': True, 'tail_ids': (5,)}, '"links" is not served'), ({'shared_first': True}, '"shared_first" is not served')])
def test_students_that_cannot_be_served_are_refused(tmp_path, change, line):
  said = config.blocks_meta(OPTIONS) | change
  (tmp_path / 'blockattn.json').write_text(json.dumps({'blocks': said if 'blocks' not in change else None}))
  with pytest.raises(ValueError, match=line):
    student.read_options(tmp_path)
