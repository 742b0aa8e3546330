"""Prompts from JSON lines of every form, and what is said of lines that are none."""

import json
import re

import data_cases
import pytest
from data_cases import ANSWER, CHAT, GOOD, MESSAGE
from hypothesis import given, settings, strategies as st

from blockattn.data import json_lines, prompts
from blockattn.data.example import Example


def test_passages_become_blocks(tmp_path):
  line = {'passages': [{'title': 'Rivers', 'text': 'The Rhine.'}, {'title': ' ', 'text': 'Untitled {braces}.'}],
          'question': 'Which river?', 'answers': ['Rhine', 'the Rhine'], 'gold': [0, 0]}
  [example], report = data_cases.read(data_cases.write_lines(tmp_path / 'a.jsonl', [line]))
  assert example == Example(('Rivers\nThe Rhine.\n\n', 'Untitled {braces}.\n\n'),
                                     'Question: Which river?\nAnswer:', ' Rhine', f'{tmp_path}/a.jsonl:1',
                                     ('Rhine', 'the Rhine'), (0,))
  assert (report.lines, report.examples, report.bad.total()) == (1, 1, 0)


def test_blocks_are_taken_as_they_stand(tmp_path):
  line = GOOD | {'id': 7, 'comment': None, 'continued': [1]}
  [example], _ = data_cases.read(data_cases.write_lines(tmp_path / 'a.jsonl', [line]))
  assert example == Example(('one', 'two'), 'which?', ' one', '7', ('one',), continued=(1,))


def test_own_question_template(tmp_path):
  template = prompts.QuestionTemplate(passage='# {title}: {text}', question='{{{question}}}', response='{answer}!')
  path = data_cases.write_lines(tmp_path / 'a.jsonl', [data_cases.passages_line(1, passages=1, words=1)])
  [example], _ = data_cases.read(path, template=template)
  assert data_cases.joined(example) == '# Title 1.0: passage 0 about 1 {what is 1?}answer 1!'
  with pytest.raises(ValueError, match=r"'question'.*KeyError.*use \{title\}"):
    prompts.QuestionTemplate(question='{query}')


def test_a_chat_becomes_a_block_per_message(tmp_path):
  later = {'messages': CHAT['messages'] + [{'role': 'user', 'content': 'Thanks.'}]}
  examples, _ = data_cases.read(data_cases.write_lines(tmp_path / 'a.jsonl', [CHAT, later]))
  turn = '<|im_start|>{}\n{}<|im_end|>\n'
  for example in examples:
    assert example.header == turn.format('system', 'Be brief.')
    assert example.blocks == (turn.format('user', 'Hello'), turn.format('assistant', 'Hi.'))
    assert example.prompt == turn.format('user', 'Who?') + '<|im_start|>assistant\n'
    assert (example.response, example.answers) == ('Me.<|im_end|>\n', ('Me.',))
    assert data_cases.from_template(example)[-2:] == [['<|im_start|>user\n', '<|im_end|>\n<|im_start|>assistant\n'],
                                           ['<|im_end|>\n']]


PASSAGES = data_cases.passages_line(1)
MALFORMED = [
    (b'{"prompt": "a", "prompt": "b"}', 'key twice'),
    (b'{"blocks": ["a"', 'bad JSON'), (b'nonsense', 'bad JSON'), (b'[' * 100_000, 'bad JSON'),
    (b'{"n": ' + b'1' * 5000 + b'}', 'bad JSON'), (b'{"prompt": "\xff"}', 'invalid UTF-8'),
    (b'{"blocks": ["\\ud800"], "prompt": "q", "response": "r"}', 'invalid UTF-8'),
    (b'{"blocks": ["\0"]}', 'NUL character'), (GOOD | {'prompt': 'a\0b'}, 'NUL character'),
    ([GOOD], 'not an object'), (None, 'not an object'), ('text', 'not an object'),
    ({}, 'unknown form'), ({'text': 'x', '\ud800': 1}, 'unknown form'), (GOOD | CHAT, 'unknown form'),
    ({'blocks': ['a'], 'prompt': 'q'}, 'missing key'), ({'blocks': ['a'], 'response': 'r'}, 'missing key'),
    ({k: v for k, v in PASSAGES.items() if k != 'question'}, 'missing key'),
    ({k: v for k, v in PASSAGES.items() if k != 'answers'}, 'missing key'),
    (PASSAGES | {'passages': [{'title': 'a'}]}, 'missing key'), ({'messages': [{'role': 'user'}]}, 'missing key'),
    (GOOD | {'blocks': 'one'}, 'wrong type'), (GOOD | {'blocks': ['a', 1]}, 'wrong type'),
    (GOOD | {'prompt': None}, 'wrong type'), (GOOD | {'response': ['r']}, 'wrong type'),
    (PASSAGES | {'passages': ['a']}, 'wrong type'), (PASSAGES | {'passages': {}}, 'wrong type'),
    (PASSAGES | {'answers': 'a'}, 'wrong type'), (PASSAGES | {'answers': [1]}, 'wrong type'),
    ({'messages': {}}, 'wrong type'), ({'messages': ['x']}, 'wrong type'),
    ({'messages': [{'role': 'user', 'content': [{'type': 'text', 'text': 1}]}, ANSWER]}, 'wrong type'),
    ({'messages': [{'role': 'user', 'content': [{'type': 'image_url', 'image_url': 'x'}]}, ANSWER]}, 'content part'),
    ({'messages': [MESSAGE, {'role': 'assistant', 'content': None}]}, 'wrong type'),
    (GOOD | {'prompt': ' \n'}, 'empty text'), (PASSAGES | {'question': ''}, 'empty text'),
    (PASSAGES | {'answers': []}, 'empty answers'), (PASSAGES | {'answers': ['a', ' ']}, 'empty answers'),
    (GOOD | {'response': ''}, 'empty answers'),
    ({'messages': [MESSAGE, {'role': 'assistant', 'content': ''}]}, 'empty answers'),
    (GOOD | {'blocks': []}, 'empty blocks'), (GOOD | {'blocks': ['a', ' ']}, 'empty blocks'),
    (PASSAGES | {'passages': []}, 'empty blocks'),
    (PASSAGES | {'passages': [{'title': 'a', 'text': ''}]}, 'empty blocks'),
    ({'messages': [{'role': 'user', 'content': ''}, ANSWER]}, 'empty blocks'),
    (PASSAGES | {'gold': [3]}, 'bad gold'), (PASSAGES | {'gold': [-1]}, 'bad gold'),
    (PASSAGES | {'gold': '0'}, 'bad gold'), (GOOD | {'gold': [True]}, 'bad gold'),
    (GOOD | {'continued': [0]}, 'bad continued'), (PASSAGES | {'continued': True}, 'bad continued'),
    ({'messages': [{'role': 'narrator', 'content': 'x'}, ANSWER]}, 'unknown role'),
    ({'messages': []}, 'no assistant message'), ({'messages': [MESSAGE]}, 'no assistant message'),
    ({'messages': [{'role': 'system', 'content': 'x'}, ANSWER]}, 'no user message'),
    ({'messages': [MESSAGE, ANSWER | {'tool_calls': [{'name': 'f'}]}]}, 'tool calls'),
    ({'messages': [MESSAGE, {'role': 'assistant', 'tool_calls': [{'name': 'f', 'arguments': '{'}]}, ANSWER]}, 'tool calls'),
    ({'messages': [MESSAGE, ANSWER], 'tools': [{'name': '<|im_end|>'}]}, 'tool calls'),
]


@pytest.mark.parametrize('line, reason', MALFORMED, ids=[f'{i}-{reason}' for i, (_, reason) in enumerate(MALFORMED)])
def test_malformed_lines_are_named(tmp_path, line, reason):
  path = data_cases.write_lines(tmp_path / 'a.jsonl', [GOOD, b'  ', line, GOOD])
  examples, report = data_cases.read(path)
  assert len(examples) == 2 and (report.lines, report.examples, dict(report.bad)) == (3, 2, {reason: 1})
  [bad] = report.listed
  assert (bad.file, bad.line, bad.reason) == (path, 3, reason)
  assert str(bad).isprintable() and f'{path}:3: {reason}' in report.summary()
  with pytest.raises(json_lines.BadLineError, match=re.escape(f'{path}:3: {reason}')):
    data_cases.read(path, strict=True)


few = settings(max_examples=40, deadline=None, derandomize=True, database=None)
JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
                        st.sampled_from(['blocks', 'prompt', 'response', 'passages', 'messages', 'role', 'content',
                                         'title', 'text', 'question', 'answers', 'gold', 'continued', 'id']),
                        inner, max_size=4),
                    max_leaves=12)


@few
@given(st.lists(JSON.map(lambda x: json.dumps(x).encode()) | st.binary(max_size=20)
                | st.just(json.dumps(GOOD).encode()), max_size=8))
def test_nothing_is_lost_in_reading(tmp_path_factory, lines):
  path = data_cases.write_lines(tmp_path_factory.mktemp('lines') / 'a.jsonl', lines)
  examples, report = data_cases.read(path)
  whole = b'\n'.join(lines).removeprefix(b'\xef\xbb\xbf').split(b'\n')
  assert report.lines == sum(bool(line.strip()) for line in whole)
  assert report.lines == len(examples) + report.bad.total() and len(examples) == report.examples
  assert len(report.listed) == report.bad.total()


def test_chats_need_a_template(tmp_path):
  path = data_cases.write_lines(tmp_path / 'a.jsonl', [CHAT])
  for tokenizer in (None, data_cases.tiny_tokenizer(template=None)):
    with pytest.raises(ValueError, match='a.jsonl:1: a line with "messages" needs a tokenizer with a chat template'):
      list(prompts.read_examples(path, tokenizer=tokenizer))
    with pytest.raises(ValueError, match='chat=True needs'):
      list(prompts.read_examples(path, tokenizer=tokenizer, chat=True))
