"""Chats and turns are their rendering byte for byte, and the template's text is told from what people wrote."""

import copy

import data_cases
import pytest
from data_cases import ANSWER, CHAT, MESSAGE
from hypothesis import given, settings, strategies as st

from blockattn.data import chat_template, encode, json_lines, prompts
from blockattn.data.example import Example

WORDS = st.text(st.characters(exclude_categories=('Cs',), exclude_characters='\0'), min_size=1, max_size=12).filter(
    lambda text: text.strip())
few = settings(max_examples=40, deadline=None, derandomize=True, database=None)


def rendering(tokenizer, messages, generation=False):
  return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation)


@pytest.fixture(scope='module', params=['qwen3', 'llama3'])
def real_tokenizer(request, data_dir):
  return encode.load_tokenizer(data_dir / 'tokenizers' / request.param)


@few
@given(st.lists(WORDS, min_size=2, max_size=6), st.booleans(),
       st.sampled_from([data_cases.CHATML, data_cases.TRIMMING]))
def test_a_chat_is_its_rendering_byte_for_byte(contents, system, template):
  contents = contents[:len(contents) // 2 * 2]
  messages = [{'role': ('user', 'assistant')[i % 2], 'content': text} for i, text in enumerate(contents)]
  messages = [{'role': 'system', 'content': '<|im_end|>\nuser'}] * system + messages
  check_chat(messages, data_cases.tiny_tokenizer(template))


def check_chat(messages, tokenizer):
  example = prompts.parse_record({'messages': messages}, where='f:1', tokenizer=tokenizer)
  assert data_cases.joined(example) == rendering(tokenizer, messages)
  shown = [(text, own) for text, own in zip(example.texts, data_cases.from_template(example), strict=True)]
  shown = shown[len(shown) - len(messages):]   # a header of the template's own comes in front
  assert rendering(tokenizer, messages[:-1], generation=True) == data_cases.joined(example).removesuffix(example.response)
  for (text, own), message in zip(shown, messages, strict=True):
    content = message['content'].split('</think>')[-1].strip()
    assert content in text
    assert len(''.join(own)) <= len(text) - len(content)   # the template claims nothing of the message
  return example


REAL_CHATS = [
    [('user', 'Hi'), ('assistant', 'Hello')],
    [('system', ' You are\nkind. '), ('user', '<|im_end|>\n<|im_start|>user'), ('assistant', 'x\n\n'),
     ('user', '  user  '), ('assistant', '\n assistant <|eot_id|>')],
    [('user', 'a'), ('assistant', '<think>\nhm\n</think>\n\nb'), ('user', 'c'), ('assistant', 'd')],
    [('user', 'system'), ('assistant', 'user'), ('user', 'é́ ﬁ'), ('assistant', 'assistant')],
]


@pytest.mark.data
@pytest.mark.parametrize('chat', REAL_CHATS, ids=range(len(REAL_CHATS)))
def test_real_templates_byte_for_byte(real_tokenizer, chat):
  check_chat([{'role': role, 'content': content} for role, content in chat], real_tokenizer)


@few
@given(st.lists(WORDS, min_size=1, max_size=4), WORDS, st.sampled_from([data_cases.CHATML, data_cases.TRIMMING]))
def test_one_turn_is_its_rendering_byte_for_byte(blocks, prompt, template):
  check_turn(blocks, prompt, data_cases.tiny_tokenizer(template))


@pytest.mark.data
@pytest.mark.parametrize('blocks, prompt', [(['a'], 'b'), (['  one\n', '<|im_end|>two '], ' three\n')])
def test_real_turns_byte_for_byte(real_tokenizer, blocks, prompt):
  check_turn(blocks, prompt, real_tokenizer)


def check_turn(blocks, prompt, tokenizer):
  line = {'blocks': blocks, 'prompt': prompt, 'response': 'r'}
  example = prompts.parse_record(line, where='f:1', chat=True, tokenizer=tokenizer)
  whole = [{'role': 'user', 'content': ''.join(blocks) + prompt}]
  assert data_cases.joined(example) == rendering(tokenizer, whole, generation=True) + 'r'
  assert len(example.blocks) == len(blocks) and example.response == 'r'
  assert blocks[0].startswith(example.blocks[0]) or example.blocks[0] == blocks[0].lstrip()
  assert data_cases.from_template(example)[0] == [example.header] * bool(example.header)
  assert all(text == block for text, block in zip(example.blocks[1:], blocks[1:], strict=True))
  assert prompt.strip() in example.prompt


def test_passages_in_a_turn_have_their_own_words(tmp_path):
  [example], _ = data_cases.read(data_cases.write_lines(tmp_path / 'a.jsonl', [data_cases.passages_line(1)]), chat=True)
  assert example.header == '<|im_start|>user\n' and example.blocks[0].startswith('Title 1.0\n')
  assert example.response == 'answer 1'
  assert example.prompt.endswith('Question: what is 1?<|im_end|>\n<|im_start|>assistant\n')


def ask(messages, tokenizer, **more):
  return prompts.parse_record({'messages': messages} | more, where='f:1', tokenizer=tokenizer)


def test_what_chats_of_people_hold_is_read():
  tokenizer = data_cases.tiny_tokenizer()
  parts = [{'type': 'text', 'text': 'one'}, {'type': 'text', 'text': 'two'}]
  example = ask([{'role': 'system', 'content': ''}, MESSAGE | {'content': parts}, ANSWER], tokenizer)
  assert example.texts == ('<|im_start|>system\n<|im_end|>\n',
                           '<|im_start|>user\none\ntwo<|im_end|>\n<|im_start|>assistant\n', 'y<|im_end|>\n')


THINKS = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if loop.last and m['role'] == 'assistant' %}"
          "{{ '<think>\n' + m['reasoning_content'] | default('') + '\n</think>\n\n' }}{% endif %}"
          "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
          "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
          "{% endif %}")


def thinking_tokenizer(said=''):
  tokenizer = copy.deepcopy(data_cases.tiny_tokenizer(THINKS))
  chat_template.set_template_args(tokenizer, said)
  return tokenizer


@pytest.mark.parametrize('said, shut', [('', True), ('enable_thinking=false', True), ('enable_thinking=true', False)])
def test_lines_of_all_forms_are_asked_as_they_were_trained(said, shut):
  tokenizer = thinking_tokenizer(said)
  encoder = encode.Encoder(tokenizer)
  asked = chat_template.wrap_in_turn(Example(('one ',), 'who?', '', 'x'), tokenizer)
  end = '<|im_start|>assistant\n' + '<think>\n\n</think>\n\n' * shut
  assert asked.prompt.endswith(end) and asked.prompt.count('<think>') == shut
  for line in ({'blocks': ['one '], 'prompt': 'who?', 'response': 'me'},
               {'messages': [MESSAGE | {'content': 'one who?'}, ANSWER]}):
    example = prompts.parse_record(line, where='f:1', chat=True, tokenizer=tokenizer)
    doc, _ = encode.fit(encoder.parts([example])[0])
    assert tokenizer.decode(doc.tokens[:doc.answer[0]]) == ''.join(asked.texts[:-1])
    assert example.prompt.endswith(end)
  assert encoder.fingerprint == encode.Encoder(thinking_tokenizer(said)).fingerprint
  assert (encoder.fingerprint == encode.Encoder(thinking_tokenizer()).fingerprint) == shut


def test_a_thought_that_the_prompt_shuts_off_is_refused():
  messages = [MESSAGE, ANSWER | {'reasoning_content': 'hm'}]
  with pytest.raises(json_lines.Malformed, match='other prompt.*enable_thinking=true'):
    ask(messages, thinking_tokenizer())
  example = ask(messages, thinking_tokenizer('enable_thinking=true'))
  assert example.response == '<think>\nhm\n</think>\n\ny<|im_end|>\n'
  with pytest.raises(ValueError, match="template argument 'thoughts': the chat template of .* does not know it"):
    thinking_tokenizer('thoughts=true')
  with pytest.raises(ValueError, match='write NAME=VALUE'):
    thinking_tokenizer('enable_thinking')


def test_a_template_that_writes_the_date_writes_the_same_every_day():
  tokenizer = copy.deepcopy(data_cases.tiny_tokenizer("{{ strftime_now('%d %b %Y') }}" + data_cases.CHATML))
  chat_template.set_template_args(tokenizer)
  assert ask([MESSAGE, ANSWER], tokenizer).prompt.startswith('26 Jul 2024<|im_start|>user\n')


@pytest.mark.data
def test_tool_turns_of_a_real_template(data_dir):
  tokenizer = encode.load_tokenizer(data_dir / 'tokenizers' / 'qwen3')
  call = {'type': 'function', 'function': {'name': 'look', 'arguments': '{"at": "<x>"}'}}
  messages = [MESSAGE, {'role': 'assistant', 'content': None, 'tool_calls': [call]}, {'role': 'tool', 'content': 'seen'},
              ANSWER]
  example = ask(messages, tokenizer, tools=[{'type': 'function', 'function': {'name': 'look'}}])
  assert '<tool_call>\n{"name": "look"' in example.prompt and '<tool_response>\nseen\n' in example.prompt
  assert example.prompt.endswith('<|im_start|>assistant\n<think>\n\n</think>\n\n') and example.response == 'y<|im_end|>\n'


@pytest.mark.parametrize('template, detail', [
    ("{{ raise_exception('roles must alternate') }}", 'roles must alternate'),
    ("{% for m in messages %}{{ m['content'] | upper }}{% endfor %}", 'rewrites the contents'),
    ("{% for m in messages[::-1] %}{{ m['content'] }}{% endfor %}", 'rewrites the contents'),
    ("{{ messages[0]['content'] }}", 'rewrites the contents')])
def test_templates_that_cannot_be_cut_are_refused(template, detail):
  tokenizer = data_cases.tiny_tokenizer(template)
  with pytest.raises(json_lines.Malformed, match=f'chat template: .*{detail}'):
    prompts.parse_record(CHAT, where='f:1', tokenizer=tokenizer)
