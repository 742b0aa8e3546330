"""LoCoMo: the published file as items, its five rules of scoring with the arithmetic, and the real data if they are here."""

import gzip
import json

import data_cases
import pytest

from blockattn.data import encode
from blockattn.evals import answers, locomo

pytest.importorskip('nltk')
PLAIN = data_cases.tiny_tokenizer(None)


def turn(speaker, said, **more):
  return {'speaker': speaker, 'dia_id': 'D1:1', 'text': said} | more


def sample(name='conv-1', questions=None):
  """Two people, three sessions; of the fourth only the date is there, as in the published file."""
  return {'sample_id': name, 'conversation': {
      'speaker_a': 'Ann', 'speaker_b': 'Bo',
      'session_1_date_time': '1 May, 2023', 'session_1': [turn('Ann', 'I ran.'), turn('Bo', 'Look', blip_caption='a dog')],
      'session_10_date_time': '9 May, 2023', 'session_10': [turn('Ann', 'Last one.')],
      'session_2_date_time': '2 May, 2023', 'session_2': [turn('Bo', 'Rain')],
      'session_11_date_time': '10 May, 2023'}, 'qa': questions or [
          {'question': 'What did Ann do?', 'answer': 'ran', 'evidence': ['D1:1'], 'category': 4},
          {'question': 'When did it rain?', 'answer': 2023, 'evidence': ['D2:1'], 'category': 2},
          {'question': 'What did Bo run?', 'adversarial_answer': 'a race', 'evidence': [], 'category': 5},
          {'question': 'Which things?', 'answer': 'dogs, rain', 'evidence': [], 'category': 1},
          {'question': 'Would Ann swim?', 'answer': 'Likely no; she runs', 'evidence': [], 'category': 3}]}


@pytest.fixture
def file(tmp_path):
  path = tmp_path / 'locomo10.json'
  path.write_text(json.dumps([sample(), sample('conv-2')]))
  return path


def items_of(path, **more):
  return locomo.make_items(locomo.read_conversations(path), **{'tokenizer': PLAIN, 'chat': False} | more)


def test_sessions_are_blocks(file):
  items = items_of(file)
  assert [item.id for item in items] == [f'conv-{c}/{n}' for c in (1, 2) for n in range(5)]
  assert [item.task for item in items[:5]] == ['single-hop', 'temporal', 'adversarial', 'multi-hop', 'open-domain']
  for item in items:
    first, second, last = item.example.blocks
    assert 'Ann and Bo' in item.example.header and first == 'Date: 1 May, 2023\nAnn: I ran.\nBo: Look [shows a dog]\n\n'
    assert second == 'Date: 2 May, 2023\nBo: Rain\n\n' and '9 May, 2023\nAnn: Last one.' in last   # 10 comes after 2
    assert all(len(tokens) for tokens in encode.Encoder(PLAIN).prompt(item.example))
  # All questions about a conversation share its blocks.
  assert len({item.example.blocks for item in items}) == 1 and len({item.example.prompt for item in items[:5]}) == 5
  assert items[0].example.prompt.endswith('Question: What did Ann do?\nShort answer:')
  assert 'approximate date' in items[1].example.prompt and items[1].references == ('2023',)
  assert items[4].references == ('Likely no; she runs',)


def test_adversarial_questions_offer_two_answers(file):
  offers = {item.id: item for item in items_of(file) if item.task == 'adversarial'}
  for item in offers.values():
    a, b = item.facts['offered']
    assert {a, b} == {locomo.ABSENT, 'a race'} and f'(a) {a} (b) {b}.' in item.example.prompt
  many = [sample(f'c{i}', [sample()['qa'][2]]) for i in range(40)]
  file.write_text(json.dumps(many))
  first = [item.facts['offered'][0] == locomo.ABSENT for item in items_of(file)]
  assert 10 < sum(first) < 30
  assert [item.facts for item in items_of(file)] == [item.facts for item in items_of(file)]


def test_tasks_and_limit(file):
  assert [i.id for i in items_of(file, limit=1)] == [f'conv-1/{n}' for n in range(5)]
  some = items_of(file, tasks=['temporal', 'adversarial'])
  assert [i.id for i in some] == ['conv-1/1', 'conv-1/2', 'conv-2/1', 'conv-2/2']
  with pytest.raises(ValueError, match='no category tempral; it has multi-hop, temporal'):
    items_of(file, tasks=['tempral'])


def test_the_last_sessions_go_where_the_prompt_is_too_long(file):
  whole = items_of(file)[0].example
  for count in (1, 2, 3):
    room = sum(map(len, whole.blocks[:count])) + len(whole.prompt)
    made = items_of(file, fits=lambda e, room=room: sum(map(len, e.blocks)) + len(e.prompt) <= room, tasks=['single-hop'])[0]
    assert made.example.blocks == whole.blocks[:count] and made.facts['sessions_left_out'] == 3 - count
  assert len(items_of(file, fits=lambda e: False)[0].example.blocks) == 1   # the runner will say that it does not fit


def test_a_chat_template_goes_around_it(file):
  tokenizer = data_cases.tiny_tokenizer()
  plain, chat = items_of(file)[0].example, items_of(file, tokenizer=tokenizer, chat=True)[0].example
  whole = tokenizer.apply_chat_template([{'role': 'user', 'content': ''.join(plain.texts)}],
                                        tokenize=False, add_generation_prompt=True)
  assert ''.join(chat.texts) == whole and chat.blocks == plain.blocks and chat.header.endswith(plain.header)


@pytest.mark.parametrize('change, message', [
    (lambda s: s.pop('qa'), "conversation 1: not of the published form .KeyError: 'qa'"),
    (lambda s: s['conversation']['session_2'][0].pop('text'), "conversation 1: .*'text'"),
    (lambda s: [s['conversation'].pop(f'session_{n}') for n in (1, 2, 10)], "'session_1'"),
    (lambda s: s['qa'][3].update(category=6), 'conversation 1, question 3: category 6'),
    (lambda s: s['qa'][0].pop('answer'), 'question 0: lacks')])
def test_what_is_malformed_is_named(tmp_path, change, message):
  bad = sample('conv-2')
  change(bad)
  (tmp_path / 'locomo10.json').write_text(json.dumps([sample(), bad]))
  with pytest.raises(ValueError, match=message):
    locomo.read_conversations(tmp_path)


def test_where_data_are(tmp_path, file):
  packed = tmp_path / 'other.json.gz'
  packed.write_bytes(gzip.compress(file.read_bytes()))
  assert locomo.read_conversations(packed) == locomo.read_conversations(file) == locomo.read_conversations(tmp_path)
  packed.write_bytes(packed.read_bytes()[:40])
  with pytest.raises(ValueError, match='other.json.gz: no JSON, or cut off'):
    locomo.read_conversations(packed)
  file.write_text('[' * 100_000)
  with pytest.raises(ValueError, match='locomo10.json: no JSON'):
    locomo.read_conversations(file)
  file.write_text('{}')
  with pytest.raises(ValueError, match='a list of conversations'):
    locomo.read_conversations(file)
  file.unlink()
  for place in (file, tmp_path):
    with pytest.raises(FileNotFoundError, match='locomo10.json or locomo10.json.gz here'):
      locomo.read_conversations(place)


def score(task, prediction, reference, offered=()):
  item = answers.Item('x', task, None, 8, references=(reference,), facts={'offered': offered})
  return locomo.score(item, prediction)['score']


@pytest.mark.parametrize('task, prediction, reference, expected', [
    # Stems: paint -> paint, sunsets -> sunset. Without the, and: [paint, sunset] | [paint, sunset].
    ('single-hop', 'painting and the sunsets', 'Paints a sunset', 1.0),
    ('single-hop', 'cats ran', 'the cat', 2 / 3),                     # cat ran | cat: 2 * 1 / 3
    ('single-hop', '1,000 dogs', '1000 dog', 1.0),                    # commas go
    ('single-hop', 'and the', 'a', 0.0),                              # nothing is left
    ('single-hop', '\n  ran \nQuestion: and so on', 'ran', 1.0),      # the first line
    ('temporal', '7 May, 2023', '7 May 2023', 1.0),
    ('temporal', 'May 2023', '7 May 2023', 4 / 5),                    # 2 of 2 and of 3
    # Before the semicolon: [like, no] | [like, no]; with what is behind it 2 of 2 and of 4 would be common.
    ('open-domain', 'likely no', 'Likely no; she runs', 1.0),
    ('single-hop', 'likely no', 'Likely no; she runs', 2 * 2 / (2 + 4)),
    # Parts at commas: dogs is right, rain is best matched by "the rain fell" with 2 * 1 / (2 + 1): their mean.
    ('multi-hop', 'the rain fell, a dog', 'dogs, rain', (1 + 2 / 3) / 2),
    ('multi-hop', 'dogs rain', 'dogs, rain', 2 / 3),                  # one part: 2 * 1 / (2 + 1) for each
    ('multi-hop', 'dogs', 'dogs, rain', 1 / 2),
    ('multi-hop', 'dogs, cats, rain', 'dogs', 1.0)])                  # parts too many cost nothing
def test_rules_of_four_categories(task, prediction, reference, expected):
  assert score(task, prediction, reference) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize('prediction, first, second', [   # where the refusal is offered first, and second
    ('a', 1, 0), ('(A)', 1, 0), ('b', 0, 1), (' (b)\n(a)', 0, 1),
    ('x', 0, 1), ('yes', 0, 1),                               # any other letter or three is the second, as published
    ('(a) Not mentioned in it', 1, 1), ('No information available', 1, 1), ('It is NOT MENTIONED.', 1, 1),
    ('(a) a race', 0, 0), ('I do not know', 0, 0), ('', 0, 0)])
def test_the_rule_of_adversarial_questions(prediction, first, second):
  assert score('adversarial', prediction, 'a race', (locomo.ABSENT, 'a race')) == first
  assert score('adversarial', prediction, 'a race', ('a race', locomo.ABSENT)) == second


@pytest.mark.parametrize('prediction, first', [
    ('Answer: (a)', 1), ('The answer is (B).', 0), ('(a) a race', 1), ('(a) or (b)', 0), ('a', 1), ('x', 0),
    ('Not mentioned', 1)])
def test_letters_may_stand_anywhere(prediction, first):
  """Where the refusal is offered first. As published "Answer: (a)" is no choice, and "(a) or (b)" is none in any way."""
  item = answers.Item('x', 'adversarial', None, 8, references=('',), facts={'offered': (locomo.ABSENT, 'a race')})
  assert locomo.score(item, prediction, 'anywhere')['score'] == first
  assert locomo.score(item, prediction)['score'] == (first if len(prediction) < 3 or 'Not' in prediction else 0)


def test_overall_is_over_all_questions():
  counts = {'multi-hop': 1, 'temporal': 1, 'open-domain': 1, 'single-hop': 3, 'adversarial': 4}
  rows = [{'task': task, 'tokens': 1, 'blocks': 1, 'scores': {'score': float(task in ('single-hop', 'temporal'))}}
          for task, n in counts.items() for _ in range(n)]
  made = {name: own['score']['mean'] for name, own in answers.summarize(rows, locomo.averages())['averages'].items()}
  assert made == pytest.approx({'macro': 2 / 5, 'overall': 4 / 10, 'overall without adversarial': 4 / 6})


@pytest.mark.data
def test_the_real_data(data_dir):
  conversations = locomo.read_conversations(data_dir / 'noncommercial' / 'locomo')
  items = locomo.make_items(conversations, PLAIN, chat=False)
  counts = {}
  for item in items:
    counts[item.task] = counts.get(item.task, 0) + 1
  assert counts == {'multi-hop': 282, 'temporal': 321, 'open-domain': 96, 'single-hop': 841, 'adversarial': 446}
  assert [len(c.sessions) for c in conversations] == [19, 19, 32, 29, 29, 28, 31, 30, 25, 30]
  # Its own answers are right by every rule.
  for item in items:
    said = locomo.ABSENT if item.task == 'adversarial' else item.references[0].split(';')[0]
    if item.task == 'single-hop':
      said = item.references[0]
    assert locomo.score(item, said)['score'] == pytest.approx(1.0) or not locomo.stems(said), item.id
