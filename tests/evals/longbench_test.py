"""LongBench: scores computed by hand and by the published packages; prompts of every task, their blocks and truncation."""

import importlib.util
import json
import random
import re
import zipfile

import data_cases
import pytest

from blockattn.data import encode, json_lines
from blockattn.data.example import Example
from blockattn.evals import answers, longbench, scores

needs_jieba = pytest.mark.skipif(importlib.util.find_spec('jieba') is None, reason='needs jieba')


# Scores.


@pytest.mark.parametrize('prediction, answer, expected', [
    ('The cat sat.', 'a cat', 2 / 3),                # cat sat | cat: 2 * 1 / (2 + 1)
    ('Cat, cat dog', 'cat cat mouse', 4 / 6),        # two cats of three words each
    ('dog', 'cat', 0),
    ('the', 'a', 0),                                 # nothing is left of either: no common word, unlike SQuAD
    ('', '', 0)])
def test_f1(prediction, answer, expected):
  assert scores.qa_f1(prediction, answer) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize('prediction, answer, expected', [
    # Cut at full stops: [the cat] and [sat on, and an empty sentence is dropped]. Words once each.
    # Reference: the cat | sat. Prediction: the cat sat. {the, cat} + {sat} = 3 of 3 and of 3.
    ('the cat sat', 'the cat.sat', 1.0),
    # Order counts: of "cat the" and "the cat" one word is common: 1/2, 1/2.
    ('cat the', 'the cat', 0.5),
    # Repeated words count once: {a} of {a}, {a}: 1, where Google's rouge_score has 2 * (1 * 1/2) / (3/2) = 2/3.
    ('a a', 'a', 1.0),
    # The longest is "the gunman": 2 of the answer's 3 words, 2 of the prediction's 4.
    ('police killed the gunman', 'the gunman police', 2 * (2 / 3 * 2 / 4) / (2 / 3 + 2 / 4)),
    # The union over sentences of the prediction, for the reference w1 w2 w3 w4 w5: "w1 w2" and "w1 w3 w5" together are
    # 4 of 5; the prediction has w1 w2 w6 w7 w8 w3 w9 w5: 4 of 8.
    ('w1 w2 w6 w7 w8.w1 w3 w8 w9 w5', 'w1 w2 w3 w4 w5', 2 * (4 / 5 * 4 / 8) / (4 / 5 + 4 / 8)),
    # Case and punctuation other than full stops are left: "Cat," is no "cat".
    ('Cat, dog', 'cat dog', 0.5),
    # "a.\n": a line end behind the last full stop is an empty word, here and there: {a, ''} of {a, ''}.
    ('a.\n', 'a.\n', 1.0),
    # ... and here only in the prediction: {a} of {a, ''} and of {a}.
    ('a.\n', 'a.', 2 * (1 / 2 * 1) / (3 / 2)),
    ('', 'a', 0.0), ('...', 'a', 0.0), ('a', '', 0.0)])   # refused by the package, counted 0
def test_rouge_l(prediction, answer, expected):
  assert scores.rouge_l(prediction, answer) == pytest.approx(expected, abs=1e-7)   # 1e-8 is added below the line


def test_among_equal_subsequences_the_packages_is_taken():
  # "a b" and "b a": from the ends, a is not b; both ways leave one word, so the second text is shortened: "b" is found.
  assert scores.common_subsequence(['a', 'b'], ['b', 'a']) == ['b']
  assert scores.common_subsequence('x a b c y'.split(), 'a c b c'.split()) == ['a', 'b', 'c']
  assert scores.common_subsequence(['a'], ['b']) == scores.common_subsequence([], ['b']) == []


def test_rouge_l_is_that_of_the_package():
  rouge = pytest.importorskip('rouge')
  draw, words = random.Random(3), 'the a cat sat on. mat. dog ran . up U.S. \n , cat. the. ...'.split(' ')
  nonzero = 0
  for _ in range(300):
    said, right = (' '.join(draw.choices(words, k=draw.randrange(25))) for _ in range(2))
    try:
      expected = rouge.Rouge().get_scores([said], [right], avg=True)['rouge-l']['f']
    except ValueError:
      expected = 0.0   # "Hypothesis is empty."
    nonzero += expected > 0
    assert scores.rouge_l(said, right) == pytest.approx(expected, abs=1e-12), (said, right)
  assert nonzero > 200


def test_rouge_l_of_long_sentences_does_not_give_up():
  long = ' '.join(f'w{i}' for i in range(1000))
  assert scores.rouge_l(long + ' x', long + ' y') == pytest.approx(1000 / 1001)
  rouge = pytest.importorskip('rouge')
  with pytest.raises(RecursionError):
    rouge.Rouge().get_scores([long + ' x'], [long + ' y'])


@pytest.mark.parametrize('prediction, answer, expected', [
    ('It is a Date.', 'Date', 1.0),
    ('Date or Animal', 'Date', 1 / 2),              # two classes stand there
    ('Animal', 'Date', 0.0),
    ('Other food', 'Other food', 1.0),              # "food" stands there too, as a part of the right name
    ('food', 'Other food', 0.0)])
def test_classification(prediction, answer, expected):
  assert scores.classification(prediction, answer, ['Date', 'food', 'Animal', 'Other food']) == expected
  assert scores.classification(prediction, answer, None) == 0.0


@pytest.mark.parametrize('classes, expected', [
    (['Ot', 'food', 'Other food'], 1 / 2),            # Ot goes, so food is passed over: food, Other food
    (['Other food', 'Ot', 'food'], 1 / 2),            # the same behind the right name
    (['Ot', 'her', 'food', 'Other food'], 1 / 2),     # Ot goes, her is passed over, food goes: her, Other food
    (['Ot', 'Date', 'food', 'Other food'], 1 / 2),    # Ot goes, Date is passed over, as it should be, food goes
    (['Ot', 'her'], 0.0)])                            # the right name is none of the classes
def test_the_class_behind_a_removed_one_is_passed_over(classes, expected):
  assert scores.classification('Other food, Date', 'Other food', classes) == expected


@pytest.mark.parametrize('score, prediction, answer, expected', [
    (scores.count, 'There are 7 paragraphs.', '7', 1.0),
    (scores.count, '7 or 8, I say 7', '7', 2 / 3),                      # each number counts, as often as it is said
    (scores.count, '07', '7', 0.0),                                     # digit for digit
    (scores.count, 'seven', '7', 0.0),
    (scores.retrieval, 'Paragraph 12', 'Paragraph 12', 1.0),
    (scores.retrieval, 'Paragraph 1, not 12', 'Paragraph 12', 1 / 2),
    (scores.retrieval, '12', 'Paragraph 1', 0.0),
    (scores.retrieval_zh, '段落3', '段落3', 1.0),
    (scores.retrieval_zh, '答案是段落3，不是段落13', '段落13', 1 / 2)])
def test_counts_and_retrieval(score, prediction, answer, expected):
  assert score(prediction, answer) == pytest.approx(expected)


def test_an_answer_of_another_task_is_named():
  with pytest.raises(ValueError, match="'seven' is not of the form Paragraph"):
    scores.retrieval('7', 'seven')


@pytest.mark.parametrize('prediction, answer, expected', [
    ('return x\nnext line', 'return x', 1.0),                           # the first line
    ('\n\nreturn x', 'return x', 1.0),                                  # line ends before it go
    ('# a comment\n// another\n```\nreturn x', 'return x', 1.0),        # comments and fences are passed over ...
    ('x = 1  # one', 'x = 1  # one', 0.0),                              # ... also where they end a line of code
    ('    return x', 'return x', 0.8),                                  # 2 * 8 / 20
    ('abcd', 'bcde', 0.75),                                             # 2 * 3 / 8
    ('aab', 'ab', 0.8), ('abx', 'yab', 0.67),                           # 2/3 in whole per cents
    ('', '', 1.0), ('', 'x', 0.0), ('x', '', 0.0)])
def test_code_similarity(prediction, answer, expected):
  assert scores.code_similarity(prediction, answer) == expected


def test_code_similarity_is_difflibs():
  # In an answer of 200 characters and more difflib looks up none that makes up more than a per cent of it. Here that is
  # every one, so nothing matches; in a shorter answer "a a" does: 2 * 3 / (4 + 100).
  answer = 'a ' * 120
  assert scores.code_similarity('xa a', answer) == 0.0 and scores.code_similarity('xa a', answer[:100]) == 0.06
  fuzz = pytest.importorskip('fuzzywuzzy.fuzz')
  if fuzz.SequenceMatcher.__module__ != 'difflib':
    pytest.skip('python-Levenshtein is installed, and fuzzywuzzy has other numbers with it')
  draw = random.Random(4)
  for length in (5, 40, 230):
    for _ in range(20):
      said, right = (''.join(draw.choices('abc()=_ ', k=draw.randrange(1, length))) for _ in range(2))
      assert scores.code_similarity(said, right) == fuzz.ratio(said, right) / 100, (said, right)


@needs_jieba
def test_chinese_scores():
  # jieba: 我们 | 去 | 公园 | 。 and 他们 | 去 | 公园: punctuation goes, 2 common words of 3 and 3.
  assert scores.qa_f1_zh('我们去公园。', '他们去公园') == pytest.approx(2 / 3)
  assert scores.qa_f1_zh('ＡＢ', '。') == 0
  # As ROUGE-L, "。" stays a word and no full stop: [我们 去 公园 。] | [他们 去 公园]: 2/3 and 2/4.
  assert scores.rouge_l_zh('我们去公园。', '他们去公园') == pytest.approx(2 * (2 / 3 * 2 / 4) / (2 / 3 + 2 / 4), abs=1e-7)


def item(task, references, classes=()):
  return answers.Item('x', task, Example((), 'q', '', 'x'), 8, references=tuple(references), facts={'classes': classes})


def test_a_task_takes_the_best_answer_and_maybe_the_first_line():
  assert longbench.score(item('hotpotqa', ['dog', 'cat sat', 'cat']), 'cat') == {'score': 1.0}
  assert longbench.score(item('hotpotqa', []), 'cat') == {'score': 0.0}
  said = '\n\nDate\nAnimal'
  assert longbench.score(item('trec', ['Date'], ['Date', 'Animal']), said) == {'score': 1.0}
  for task in ('triviaqa', 'samsum'):
    assert longbench.score(item(task, ['Date']), said)['score'] == pytest.approx(1.0)
  # Others are scored whole: 2 * 1 / (2 + 1) and {Date} of {Date, Animal}.
  for task in ('musique', 'gov_report', 'qasper_e'):
    assert longbench.score(item(task, ['Date']), said)['score'] == pytest.approx(2 / 3)


def test_metrics_of_the_tasks():
  by_score = {}
  for task, known in longbench.TASKS.items():
    by_score.setdefault(known.score.__name__, []).append(task)
  assert by_score == {
      'qa_f1': ['narrativeqa', 'qasper', 'multifieldqa_en', 'hotpotqa', '2wikimqa', 'musique', 'triviaqa'],
      'qa_f1_zh': ['multifieldqa_zh'], 'rouge_l_zh': ['dureader', 'vcsum'],
      'rouge_l': ['gov_report', 'qmsum', 'multi_news', 'samsum'], 'classification': ['trec', 'lsht'],
      'count': ['passage_count'], 'retrieval': ['passage_retrieval_en'], 'retrieval_zh': ['passage_retrieval_zh'],
      'code_similarity': ['lcc', 'repobench-p']}
  assert [t for t in longbench.TASKS if longbench.TASKS[t].first_line] == ['trec', 'triviaqa', 'samsum', 'lsht']
  assert [t for t in longbench.TASKS if not longbench.TASKS[t].chat] == [
      'trec', 'triviaqa', 'samsum', 'lsht', 'lcc', 'repobench-p']


def test_published_averages():
  """The Chinese and English averages of the published table, from its row of ChatGLM3-6B-32k."""
  row = {'single-document QA': (40.3, 62.3), 'multi-document QA': (46.6, 44.8), 'summarization': (29.5, 17.8),
         'few-shot': (68.1, 42.0), 'code': (56.2, 56.2), 'synthetic': (50.5, 94.0)}
  rows = [{'task': task, 'tokens': 1, 'blocks': 1, 'scores': {'score': row[known.category][known.language == 'zh']}}
          for task, known in longbench.TASKS.items()]
  made = answers.summarize(rows, longbench.averages(list(longbench.TASKS)))['averages']
  assert made['english']['score']['mean'] == pytest.approx(48.5, abs=0.05)
  assert made['chinese']['score']['mean'] == pytest.approx(52.8, abs=0.06)
  assert made['english few-shot']['score']['mean'] == pytest.approx(68.1)
  # With some of the tasks only their own averages are there.
  some = answers.summarize([r for r in rows if r['task'] in ('lcc', 'repobench-p', 'trec')],
                           longbench.averages(['lcc', 'repobench-p', 'trec']))['averages']
  assert set(some) == {'macro', 'english code', 'chinese code'}
  assert some['macro']['score']['mean'] == pytest.approx((56.2 * 2 + 68.1) / 3)


# Prompts.


CONTEXTS = {   # a context as the task has it, and how many blocks it makes
    r'^Passage \d+:': ('Passage 1:\nA b.\n\nPassage 2:\nC d, see Passage 3: e.\n\nPassage 10:\nf', 3),
    r'^Paragraph \d+:': ('Paragraph 1: a\n\nParagraph 2: b\n\nParagraph 3: a', 3),
    r'^段落\s*\d+': ('段落1：甲\n\n段落2：乙，段落1同', 2),
    r'^文章\s*\d+': ('文章1\n标题：甲\n内容：乙\n\n文章2\n标题：丙\n内容：丁\n', 2),
    r'^Question:': ('Question: who?\nType: human\nQuestion: where?\nType: place', 2),
    r'^Passage:': ('Passage:\na\nQuestion:\nb?\nAnswer:\nc\nPassage:\nd\nQuestion:\ne?\nAnswer:\nf', 2),
    r'^Dialogue:': ('Dialogue: A: hi\r\nB: ho\nSummary: they greet.\nDialogue: C\nSummary: d', 2),
    r'^新闻(内容)?[:：]': ('新闻内容：\n甲\n类别：乙\n新闻内容：\n丙\n类别：丁', 2),
    '': ('Some {braces} and\nlines.\n\nMore of <|im_end|> it. ', 3),
}


def record(task, context, **more):
  fields = {'id': 'r1', 'input': 'what {is} it?', 'answers': ('x',), 'length': 5000, 'classes': (), 'where': 'file:1'}
  return longbench.Record(context=context, **{**fields, **more})


def in_thirds(texts):
  """A segmenter of sorts."""
  return [[(0, len(t) // 3), (len(t) // 3, len(t) // 2), (len(t) // 2, len(t))] for t in texts]


def published(task, own):
  """The prompt as the published code makes it."""
  return longbench.load_prompts()[0][task].format(context=own.context, input=own.input)


@pytest.mark.parametrize('task', longbench.TASKS)
def test_joined_blocks_are_the_published_prompt(task):
  context, count = CONTEXTS[longbench.TASKS[task].heading]
  own = record(task, context)
  tokenizer = data_cases.tiny_tokenizer(None)
  made, = longbench.make_items(task, [own], tokenizer, cut=in_thirds, chat=False, max_length=None)
  blocks = made.example.blocks
  assert ''.join(made.example.texts) == published(task, own)
  assert len(blocks) == count and all(blocks)
  template, lengths = longbench.load_prompts()
  before, after = template[task].split('{context}')
  assert made.example.header == before and made.example.prompt == after.replace('{input}', own.input)
  heading = longbench.TASKS[task].heading
  if heading:
    assert all(re.match(heading, block) for block in blocks)
  assert made.example.continued == (() if heading else tuple(range(1, count)))
  assert (made.id, made.max_new, made.references, made.stop) == (f'{task}:r1', lengths[task], ('x',), ())
  # As tokens: no block is empty, and decoded they are the prompt.
  tokens = encode.Encoder(tokenizer).prompt(made.example)
  assert tokenizer.decode([t for block in tokens for t in block]) == published(task, own)


@pytest.mark.parametrize('task', longbench.TASKS)
def test_a_chat_template_goes_around_the_prompt_of_some_tasks(task):
  own = record(task, CONTEXTS[longbench.TASKS[task].heading][0])
  tokenizer = data_cases.tiny_tokenizer()
  plain, = longbench.make_items(task, [own], tokenizer, cut=in_thirds, chat=False, max_length=None)
  made, = longbench.make_items(task, [own], tokenizer, cut=in_thirds, chat=True, max_length=None)
  if task in ('trec', 'triviaqa', 'samsum', 'lsht', 'lcc', 'repobench-p'):
    assert made == plain
    return
  whole = tokenizer.apply_chat_template([{'role': 'user', 'content': published(task, own)}], tokenize=False,
                                        add_generation_prompt=True)
  assert ''.join(made.example.texts) == whole and made.example.blocks == plain.example.blocks
  assert made.example.header == '<|im_start|>user\n' + plain.example.header
  # Special tokens stand where the template wrote them, and nowhere else.
  tokens = encode.Encoder(tokenizer).prompt(made.example)
  start, end = tokenizer.convert_tokens_to_ids(['<|im_start|>', '<|im_end|>'])
  flat = [t for block in tokens for t in block]
  assert (flat.count(start), flat.count(end)) == (2, 1) and end in tokens[-1] and tokens[0][0] == start


def test_a_context_without_headings_is_cut_by_the_segmenter_or_not_at_all():
  own = [record('hotpotqa', 'Passage 1:\nonly one, so no division', id='a'), record('hotpotqa', '', id='b'),
         record('hotpotqa', 'Passage 1:\na\nPassage 2:\nb', id='c')]
  make = lambda cut: [len(i.example.blocks) for i in longbench.make_items(
      'hotpotqa', own, data_cases.tiny_tokenizer(None), cut=cut, chat=False, max_length=None)]
  assert make(in_thirds) == [3, 0, 2] and make(None) == [1, 0, 2]
  seen = []
  make(lambda texts: seen.extend(texts) or in_thirds(texts))
  assert seen == [own[0].context]   # the others need none


def published_truncation(prompt, tokenizer, most):
  ids = tokenizer(prompt, truncation=False)['input_ids']
  if len(ids) <= most:
    return prompt
  half = int(most / 2)
  return (tokenizer.decode(ids[:half], skip_special_tokens=True)
          + tokenizer.decode(ids[-half:], skip_special_tokens=True))


@pytest.mark.parametrize('adds_bos', [False, True])
@pytest.mark.parametrize('task', ['hotpotqa', 'narrativeqa', 'samsum', 'multi_news'])
def test_truncation_is_the_published_one(task, adds_bos):
  tokenizer = data_cases.tiny_tokenizer(None, adds_bos=adds_bos)
  context = ''.join(f'Passage {i}:\nThe answer in passage {i} is {i * i}.\n\n' for i in range(1, 30))
  own = record(task, context)
  total = len(tokenizer(published(task, own))['input_ids'])
  for most in (total, total - 1, 401, 260, 90, 21, 3):
    made, = longbench.make_items(task, [own], tokenizer, cut=in_thirds, chat=False, max_length=most)
    whole = ''.join(made.example.texts)
    assert whole == published_truncation(published(task, own), tokenizer, most), most
    assert made.example.prompt and all(made.example.blocks)
    if task == 'narrativeqa' and most == 401:   # one block begins where the middle went
      assert len(made.example.continued) == len(made.example.blocks) - 2 > 0


def test_what_truncation_leaves():
  tokenizer = data_cases.tiny_tokenizer(None)
  context = ''.join(f'Passage {i}:\nThe answer in passage {i} is {i * i}.\n\n' for i in range(1, 30))
  own = record('hotpotqa', context)
  make = lambda most: longbench.make_items('hotpotqa', [own], tokenizer, cut=None, chat=False, max_length=most)[0].example
  made, whole = make(500), make(None)
  assert made.prompt == whole.prompt and made.blocks[0] == whole.blocks[0]
  # Where the middle went there is a cut: no block has the beginning of one passage and the end of another.
  assert made.blocks[-1] == whole.blocks[-1]
  inner = [block for block in made.blocks if block not in whole.blocks]
  assert len(inner) == 2 and any(block.startswith(inner[0]) for block in whole.blocks)
  assert any(block.endswith(inner[1]) for block in whole.blocks)
  # Less room than the question takes: its end is the question, and what stays before it is the beginning of the header.
  short = make(40)
  assert whole.prompt.endswith(short.prompt) and len(short.prompt) < len(whole.prompt)
  assert short.header and whole.header.startswith(short.header) and not short.blocks
  with pytest.raises(ValueError, match='--max-length 1'):
    make(1)


def test_truncation_never_breaks_a_character():
  tokenizer = data_cases.tiny_tokenizer(None)   # every byte of these is a token
  own = record('vcsum', '会议' * 50)
  for most in range(100, 112):
    made, = longbench.make_items('vcsum', [own], tokenizer, cut=None, chat=False, max_length=most)
    whole = ''.join(made.example.texts)
    assert '\ufffd' not in whole and set(whole) <= set(published('vcsum', own))


@pytest.mark.data
def test_with_a_real_tokenizer(data_dir):
  tokenizer = encode.load_tokenizer(data_dir / 'tokenizers' / 'qwen3')
  context = '\n'.join(f'Passage {i}:\nNaïve café number {i}. 你好，世界！' for i in range(200))
  own = record('hotpotqa', context)
  made, = longbench.make_items('hotpotqa', [own], tokenizer, cut=None, chat=False, max_length=1000)
  whole = ''.join(made.example.texts)
  assert whole == published_truncation(published('hotpotqa', own), tokenizer, 1000)
  assert abs(len(tokenizer(whole)['input_ids']) - 1000) < 5
  templates = json.loads((data_dir / 'longbench' / 'dataset2prompt.json').read_text())
  assert longbench.load_prompts() == (templates, json.loads((data_dir / 'longbench' / 'dataset2maxlen.json').read_text()))


def test_every_template_has_its_places():
  templates, lengths = longbench.load_prompts()
  assert set(templates) == set(lengths) == set(longbench.TASKS)
  for template in templates.values():
    assert template.count('{context}') == 1 and re.findall(r'[{}]', template.replace('{context}', '')) in ([], ['{', '}'])
    assert template.index('{context}') < (template + '{input}').index('{input}')
  assert all(task.removesuffix('_e') in longbench.TASKS for task in longbench.EVEN_TASKS) and len(longbench.EVEN_TASKS) == 13


# Data.


def line(**more):
  return {'_id': 'i0', 'input': 'q', 'context': 'c', 'answers': ['a', 'b'], 'length': 4000, 'dataset': 'trec',
          'language': 'en', 'all_classes': ['a', 'z']} | more


def test_data_from_folder_and_archive(tmp_path):
  lines = [line(), line(_id='i1', all_classes=None, context='half a \ud83d surrogate, \0 and all')]
  data_cases.write_lines(tmp_path / 'trec.jsonl', lines)
  made = longbench.read_records(tmp_path, 'trec')
  assert [(r.id, r.answers, r.classes, r.length) for r in made] == [('i0', ('a', 'b'), ('a', 'z'), 4000),
                                                                    ('i1', ('a', 'b'), (), 4000)]
  assert made[1].context == 'half a ? surrogate, \0 and all' and made[1].where == f'{tmp_path}/trec.jsonl:2'
  assert longbench.read_records(tmp_path, 'trec', limit=1) == made[:1]
  (tmp_path / 'zipped').mkdir()
  with zipfile.ZipFile(tmp_path / 'zipped' / 'data.zip', 'w') as file:
    file.write(tmp_path / 'trec.jsonl', 'data/trec.jsonl')
  for place in (tmp_path / 'zipped', tmp_path / 'zipped' / 'data.zip'):
    zipped = longbench.read_records(place, 'trec')
    assert [r.context for r in zipped] == [r.context for r in made] and zipped[1].where.endswith('data/trec.jsonl:2')
  with pytest.raises(FileNotFoundError, match='no lcc.jsonl in it'):
    longbench.read_records(tmp_path / 'zipped', 'lcc')
  with pytest.raises(FileNotFoundError, match='no lcc.jsonl, data/lcc.jsonl or data.zip'):
    longbench.read_records(tmp_path, 'lcc')
  with pytest.raises(ValueError, match='no zip file, or a damaged one'):
    longbench.read_records(tmp_path / 'trec.jsonl', 'trec')


def test_items_of_a_task_with_parts_by_length(tmp_path):
  data_cases.write_lines(tmp_path / 'lcc_e.jsonl', [line(), line(_id='i1', length=9000)])
  records = longbench.read_records(tmp_path, 'lcc_e')
  items = longbench.make_items('lcc_e', records, data_cases.tiny_tokenizer(), cut=None, chat=True, max_length=None)
  assert [(i.task, i.part, i.max_new) for i in items] == [('lcc_e', '4-8k', 64), ('lcc_e', '8k+', 64)]


@pytest.mark.parametrize('name', ['/nowhere/at/all', './nowhere', 'nowhere'])
def test_data_that_is_nowhere(name):
  with pytest.raises(FileNotFoundError, match='no name on the hub'):
    longbench.read_records(name, 'lcc')


@pytest.mark.parametrize('bad, message', [
    (b'{', 'trec.jsonl:2: bad JSON'), (b'[]', 'trec.jsonl:2: not an object'),
    ({'_id': 'x'}, 'trec.jsonl:2: missing key: "input"'), (line(answers='a'), 'trec.jsonl:2: wrong type: "answers" is str'),
    (line(answers=[1]), r'trec.jsonl:2: wrong type: "answers"\[0\] is int'),
    (line(all_classes='a'), 'wrong type: "all_classes" is str')])
def test_a_malformed_line_stops_the_reading(tmp_path, bad, message):
  data_cases.write_lines(tmp_path / 'trec.jsonl', [line(), bad])
  with pytest.raises(json_lines.BadLineError, match=message):
    longbench.read_records(tmp_path, 'trec')


def test_unknown_tasks_are_named():
  with pytest.raises(ValueError, match="no task 'musique_e'; it has narrativeqa, .*LongBench-E has qasper_e"):
    longbench.read_records('.', 'musique_e')
