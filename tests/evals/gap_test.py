"""Answers, and the gap between a model and its teacher against a computation token by token."""

import dataclasses
import json
import re

import hf_cases
import jax
import numpy as np
import pytest

from blockattn import blocks
from blockattn.data import encode
from blockattn.data.example import Example
from blockattn.evals import gap, scores
from blockattn.models import transformer
from blockattn.models.transformer import Compute, ModelConfig

CFG = ModelConfig('llama', vocab=24, width=16, layers=2, heads=2, kv_heads=1, head_dim=8, mlp=16)
COMPUTE = Compute(impl='reference')
OPTIONS = blocks.BlockOptions((3, 4), 'local', max_blocks=1)   # max_blocks is set by the documents
# Lengths of the blocks, and of the answer at the end; the long reader reaches several distance bins.
DOCS = (((5, 4, 6), 2), ((3, 2, 4, 40), 20), ((6, 3, 9), 1), ((2, 8, 5), 3), ((4, 4, 4, 8), 4))
LENGTH = 64


class Words:
  """As much of a tokenizer as an evaluation needs: token 7 reads 'w7'."""
  eos_token_id, name_or_path = 0, ''

  def id_to_token(self, token):
    return f'w{token}'

  def decode(self, tokens, skip_special_tokens):
    assert skip_special_tokens
    return ' '.join(f'w{token}' for token in tokens)


@pytest.fixture(scope='module')
def docs():
  rng = np.random.default_rng(5)
  make = lambda lengths, answer: encode.EncodedDoc(
      rng.integers(1, CFG.vocab, size=sum(lengths), dtype=np.int32), lengths, (sum(lengths) - answer, sum(lengths)))
  return [make(*doc) for doc in DOCS]


def subject(mode, seed=0):
  return gap.Subject(hf_cases.random_params(CFG, 'float32', seed), CFG, COMPUTE, mode, OPTIONS)


apply = jax.jit(transformer.apply, static_argnums=(3, 4))


def log_probabilities(model, doc):
  """log p of every token at every position of one document [n, V], in its mode."""
  layout = blocks.from_lengths([[doc.lengths]], LENGTH)
  tokens = np.zeros((1, LENGTH), np.int32)
  tokens[0, :len(doc.tokens)] = doc.tokens
  index = np.arange(LENGTH)
  if model.mode == 'full':
    layout = blocks.as_one_block(layout)
    grow = lambda x: np.pad(np.asarray(x), ((0, 0), (0, 8)))   # as long as with sinks: one program for both
    tokens, layout = grow(tokens), jax.tree.map(grow, layout)
  else:
    tokens, layout, index = blocks.block_mode(tokens, layout, dataclasses.replace(OPTIONS, max_blocks=4))
    index = np.asarray(index)[0]
  x_BTD = apply(model.params, tokens, layout, CFG, COMPUTE)
  logits = (np.asarray(x_BTD)[0][index] @ model.params['head'].T).astype(np.float64)[:len(doc.tokens)]
  return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def direct(student, teacher, docs):
  """(distance from the start of its block, cross-entropy, KL) of every answer token: [tokens, 3]."""
  rows = []
  for doc in docs:
    log_q, log_p = log_probabilities(student, doc), log_probabilities(teacher, doc)
    for target in range(*doc.answer):
      t = target - 1
      rows.append((target - sum(doc.lengths[:-1]), -log_q[t, doc.tokens[target]],
                   np.sum(np.exp(log_p[t]) * (log_p[t] - log_q[t]))))
  return np.array(rows)


def assert_figures(figures, rows):
  np.testing.assert_allclose([figures['ce'], figures['kl']], rows[:, 1:].mean(axis=0), rtol=1e-4, atol=1e-6)
  assert sum(row['tokens'] for row in figures['by_distance']) == len(rows)
  edges = [*gap.BINS, np.inf]
  for row in figures['by_distance']:
    low, high = row['from'], edges[edges.index(row['from']) + 1]
    mine = rows[(rows[:, 0] >= low) & (rows[:, 0] < high)]
    assert row['tokens'] == len(mine) > 0
    np.testing.assert_allclose([row['ce'], row['kl']], mine[:, 1:].mean(axis=0), rtol=1e-4, atol=1e-6)


def figures_of(subjects, teacher, docs, batch):
  """The summary of one greedy token per document, by subject."""
  return gap.summarize(gap.measure(subjects, teacher, docs, examples_of(docs), Words(), batch=batch, max_new=1))


def one_gap(student, teacher, docs, batch):
  return figures_of({'it': student}, teacher, docs, batch)['it']


def test_gap_is_what_it_says(docs):
  student, teacher = subject('block', seed=1), subject('full')
  rows = direct(student, teacher, docs)
  assert len(rows) == sum(answer for _, answer in DOCS) and rows[:, 2].min() > 1e-3
  # Three batches, the last one not full; with several subjects, each gets its own figures.
  figures = figures_of({'student': student, 'teacher': teacher}, teacher, docs, batch=2)
  assert list(figures) == ['student', 'teacher'] and len(figures['student']['by_distance']) >= 4
  assert_figures(figures['student'], rows)
  assert_figures(figures['teacher'], direct(teacher, teacher, docs))
  assert_figures(one_gap(student, teacher, docs[::-1][:2], batch=2), direct(student, teacher, docs[::-1][:2]))


def test_no_gap_to_itself_in_batches_of_any_size(docs):
  model = subject('block')
  figures = one_gap(model, dataclasses.replace(model), docs, batch=len(docs))   # read twice: not the same object
  assert figures['kl'] == 0 and all(row['kl'] == 0 for row in figures['by_distance'])
  assert_figures(figures, direct(model, model, docs))


def test_documents_without_an_answer_have_no_gap(docs):
  blank = dataclasses.replace(docs[0], answer=(len(docs[0].tokens),) * 2)
  figures = one_gap(subject('block', 1), subject('full'), [blank], batch=2)
  assert (figures['ce'], figures['kl'], figures['by_distance']) == (0, 0, [])


def written(model, doc, stop_ids=(0,), new=3):
  """The greedy answer to a document's prompt, every token from a forward pass of its own."""
  start, answer = doc.answer[0], []
  while len(answer) < new:
    lengths = (*doc.lengths[:-1], start - sum(doc.lengths[:-1]) + len(answer))
    text = encode.EncodedDoc(np.array([*doc.tokens[:start], *answer], np.int32), lengths, doc.answer)
    answer.append(int(log_probabilities(model, text)[-1].argmax()))
    if answer[-1] in stop_ids:
      return answer[:-1]
  return answer


def words(answers):
  return [Words().decode(tokens, skip_special_tokens=True) for tokens in answers]


@pytest.mark.parametrize('mode', gap.MODES)
def test_answers_are_those_of_a_forward_pass_for_every_token(docs, mode, monkeypatch):
  """The prompt was read with another answer behind it, which must not be seen."""
  model = subject(mode, seed=1)
  whole = [written(model, doc) for doc in docs]
  stop = whole[0][1]   # a second token that ends answers
  ended = [written(model, doc, (0, stop)) for doc in docs]
  assert len({tuple(answer) for answer in whole}) > 1 and ended != whole
  said = lambda: [row['models']['it']['prediction'] for row in measure(docs, examples_of(docs), {'it': model})]
  assert said() == words(whole)
  monkeypatch.setattr(gap.files, 'stop_ids', lambda *_: (0, stop))
  assert said() == words(ended)


def measure(docs, examples, subjects=None, **more):
  """Rows of a student in block mode against a teacher."""
  subjects = subjects or {'it': subject('block', seed=1)}
  return gap.measure(subjects, subject('full'), docs, examples, Words(), **{'batch': 2, 'max_new': 3} | more)


def examples_of(docs, answers=('x',)):
  return [Example(('a', 'b'), 'q', 'x', f'id{i}', answers) for i in range(len(docs))]


def test_an_answer_ends_before_the_stop_text(docs):
  said = {stop: [row['models']['it']['prediction'] for row in measure(docs, examples_of(docs), stop=stop)]
          for stop in (None, ' ')}
  assert said[' '] == [answer.split(' ')[0] for answer in said[None]] != said[None]


def test_a_token_without_a_row_is_refused(docs):
  wrong = dataclasses.replace(docs[1], tokens=np.where(np.arange(len(docs[1].tokens)) == 3, CFG.vocab, docs[1].tokens))
  with pytest.raises(ValueError, match='it: id1: token .* has the id 24, and the model has 24 rows'):
    measure([docs[0], wrong], examples_of(docs[:2]))


def test_rows_and_their_means(docs):
  student, teacher = subject('block', seed=1), subject('full')
  given = [written(student, doc) for doc in docs]
  said = words(given)
  # Right to the letter, right but for the accepted case, one word of the answer, wrong, and an answer without a list.
  answers = [(f' {said[0]} ', 'x'), (said[1].upper(),), (said[2].split()[0],), ('nonsense',), ()]
  examples = [Example(('a', 'b'), 'q', said[4], f'id{i}', a) for i, a in enumerate(answers)]
  rows = measure(docs, examples)
  assert [row['id'] for row in rows] == [example.id for example in examples]
  own = [row['models']['it'] for row in rows]
  assert [one['prediction'] for one in own] == said
  assert [one['scores']['exact_match'] for one in own] == [1, 0, len(given[2]) == 1, 0, 1]
  assert rows[0]['answers'] == [f' {said[0]} ', 'x'] and rows[4]['answers'] == [said[4]]
  for doc, one in zip(docs, own, strict=True):   # each document's own sums, in a batch as alone
    alone = one_gap(student, teacher, [doc], batch=1)
    tokens = sum(count for _, count, _, _ in one['by_distance'])
    np.testing.assert_allclose(sum(kl for *_, kl in one['by_distance']) / tokens, alone['kl'], rtol=1e-4)

  figures = gap.summarize(rows)['it']
  scored = [scores.score(s, a or (said[4],)) for s, a in zip(said, answers, strict=True)]
  assert figures['n'] == 5
  for name in ('exact_match', 'substring', 'f1'):
    np.testing.assert_allclose(figures[name], np.mean([score[name] for score in scored]))
  assert figures['substring'] == 0.8
  whole = one_gap(student, teacher, docs, batch=2)
  np.testing.assert_allclose([figures['ce'], figures['kl']], [whole['ce'], whole['kl']], rtol=1e-5)
  assert [row['tokens'] for row in figures['by_distance']] == [row['tokens'] for row in whole['by_distance']]
  for name, interval in figures['intervals'].items():
    assert interval['low'] <= figures[name] == interval['mean'] <= interval['high'] and interval['low'] < interval['high']


def test_a_second_start_goes_on(docs, tmp_path):
  examples, seen, calls = examples_of(docs), [], []

  class Stops(Words):
    """Is pulled the plug at the third batch, two documents each."""
    def decode(self, tokens, skip_special_tokens):
      calls.append(tokens)
      if len(calls) == 5:
        raise KeyboardInterrupt
      return super().decode(tokens, skip_special_tokens)

  student, teacher = {'it': subject('block', seed=1)}, subject('full')
  run = lambda tokenizer, docs=docs, **more: gap.measure(
      student, teacher, docs, examples[:len(docs)], tokenizer, out=tmp_path, **{'batch': 2, 'max_new': 3} | more)
  with pytest.raises(KeyboardInterrupt):
    run(Stops(), progress=lambda *at: seen.append(at))
  lines = lambda: [json.loads(line)['document'] for line in (tmp_path / gap.DOCUMENTS).read_text().splitlines()]
  assert lines() == [1, 4, 2, 0] and seen == [(0, 5), (2, 5), (4, 5)]   # the longest first
  with open(tmp_path / gap.DOCUMENTS, 'a') as file:
    file.write('{"document": 0, "id')   # killed while it wrote
  calls.clear()
  again, whole = run(Stops(), batch=3), measure(docs, examples)
  assert len(calls) == 1 and sorted(lines()) == [0, 1, 2, 3, 4]
  for row, wanted in zip(again, whole, strict=True):   # sums of batches of another size are rounded in another order
    sums = [one['models']['it'].pop('by_distance') for one in (row, wanted)]
    np.testing.assert_allclose(*sums, rtol=1e-4)
  assert again == whole
  assert len(run(Stops(), docs[:2])) == 2 and len(calls) == 1
  with pytest.raises(ValueError, match='run.json: .*max_new was 3 and is 4.*another folder'):
    run(Words(), max_new=4)
  with pytest.raises(ValueError, match='1 items, first 1, were asked with another prompt'):
    run(Words(), [docs[0], docs[0]])
  with pytest.raises(ValueError, match='1 items, first 1, were asked with another prompt'):
    run(Words(), [docs[0], dataclasses.replace(docs[1], continued=tuple(i > 0 for i in range(len(docs[1].lengths))))])


def test_the_share_that_is_made_good():
  """Four documents of one answer token each; KL 2 nats before, 0.5 after, but for noise; the teacher's own is 0."""
  def row(noise, right):
    one = lambda kl, right: {'prediction': '', 'scores': {'exact_match': right}, 'by_distance': [[1, 1, 1.0, kl]]}
    return {'models': {'t': one(0.0, 1.0), 'before': one(2 + noise, right), 'after': one(0.5 + noise, 1.0)}}
  rows = [row(noise, right) for noise, right in zip((-0.05, 0.05, -0.05, 0.05), (1.0, 1.0, 1.0, 0.0), strict=True)]
  shares = gap.share_closed(rows, 't', 'before', 'after')
  assert list(shares) == ['kl']   # CE is the same, and one lost match in four may be chance
  assert shares['kl']['mean'] == pytest.approx(0.75) and 0.7 < shares['kl']['low'] < 0.75 < shares['kl']['high'] < 0.8


def test_what_cannot_be_evaluated(docs):
  with pytest.raises(ValueError, match="evaluation mode 'blocks'; choose one of full, block"):
    subject('blocks')
  run = lambda docs, examples, **more: measure(docs, examples, {'it': subject('block')}, **more)
  with pytest.raises(ValueError, match=re.escape('5 documents but 0 examples')):
    run(docs, [])
  with pytest.raises(ValueError, match='nothing to evaluate: no document was left'):
    run([], [])
  with pytest.raises(ValueError, match='id0: a text without a question'):
    run([dataclasses.replace(docs[0], answer=(9, 15))], examples_of(docs[:1]))
  # 49 tokens, of them 20 of the answer, two sinks in front of four blocks: 29 + 4060 + 8 = 4097.
  with pytest.raises(ValueError, match='1 of 5 documents are too long for it: id1 takes 4097 positions, .* model has 4096'):
    run(docs, examples_of(docs), max_new=4060)
