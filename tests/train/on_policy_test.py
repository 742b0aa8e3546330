"""Rows whose answers are the student's own: what the engine says in block mode, put where the answers stood."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import train_cases

from blockattn import blocks, checkpoint, optim
from blockattn.data import encode, packing
from blockattn.inference import engine as engine_lib
from blockattn.models import lora, transformer
from blockattn.train import distill, job, loop, on_policy

CFG, END = train_cases.MODEL, 7
FORM = blocks.BlockOptions((0,), 'sequential', train_cases.MAX_BLOCKS, hide_starts=True, overlap=2)
COMPUTE = transformer.Compute(impl='xla', tiles=(16, 16))
OPTIONS = on_policy.OnPolicyOptions(share=0.6, max_new=3, temperature=1.0)


def documents():
  """A row's: of several blocks, one without an answer, one of a single block."""
  rng = np.random.default_rng(0)
  doc = lambda lengths, answer: encode.EncodedDoc(
      rng.integers(8, train_cases.VOCAB, sum(lengths)).astype(np.int32), lengths, answer,
      continued=tuple(i == 1 for i in range(len(lengths))))
  return [doc((4, 3, 9), (11, 15)), doc((5, 6), (11, 11)), doc((8,), (3, 8))]


def batch_of(*rows):
  return jax.tree.map(lambda *x: np.stack(x), *(packing.pack_row(row, train_cases.LENGTH) for row in rows))


def test_what_is_asked():
  docs = documents()
  batch = batch_of(docs, docs)
  first, last = on_policy.asked_in(batch, [1])
  tokens = batch['tokens'][1].tolist()
  assert first == on_policy.Asked(1, 0, 16, 11, 15, (tokens[:4], tokens[4:7], tokens[7:11]))
  assert [isinstance(part, blocks.Continued) for part in first.prompt] == [False, True, False]
  assert last == on_policy.Asked(1, 27, 35, 30, 35, (tokens[27:30],))


@pytest.mark.parametrize('said, ended', [((50,), 'token'), ((), 'token'), ((50, 51, 52, 53), 'length'),
                                         ((50, 51, 52), 'token'), ((50, 51), 'length')])
def test_an_answer_takes_the_place_of_the_one_that_was_given(said, ended):
  """The row is that of a document with this answer, of which nothing that follows is predicted."""
  docs = documents()
  batch = batch_of(docs)
  asked = on_policy.asked_in(batch, [0])[:1]
  new = on_policy.with_answers(batch, asked, [engine_lib.Answer('', said, ended, ())])
  end_token = int(docs[0].tokens[14])
  answer = [*said, *[end_token] * (ended == 'token')]
  tokens, end = docs[0].tokens.copy(), 11 + len(answer)
  tokens[11:] = end_token
  tokens[11:end] = answer
  expected = batch_of([encode.EncodedDoc(tokens, docs[0].lengths, (11, end)), *docs[1:]])
  expected['text'][0, end - 1:16] = False
  expected['targets'][0, end - 1:16] = 0
  for name in ('tokens', 'targets', 'loss', 'text', 'gold'):
    np.testing.assert_array_equal(new[name], expected[name], err_msg=name)
  assert new['layout'] is batch['layout']
  np.testing.assert_array_equal(batch['tokens'], batch_of(docs)['tokens'])   # the old one is not touched


def engine(attach=None):
  one = tokenizers.Tokenizer(tokenizers.models.WordLevel({'?': 0}, unk_token='?'))
  return on_policy.engine_maker(CFG, COMPUTE, FORM, one, (END,), length=train_cases.LENGTH, rows=8, attach=attach)


def rewritten(params, batch, step, options=OPTIONS, attach=None):
  return on_policy.rewritten(params, batch, step, options=options, seed=5, engine=engine(attach))


@jax.jit
def greedy(params, batch):
  """The token that the student finds likeliest behind every text token, in a forward pass of training."""
  tokens, layout, index = blocks.block_mode(batch['tokens'], batch['layout'], FORM, continued=batch['continued'])
  x_BTD = transformer.apply(params, tokens, layout, CFG, COMPUTE)
  return transformer.logits(params, jnp.take_along_axis(x_BTD, index[..., None], axis=1), CFG).argmax(axis=-1)


def answers_that_end(batch):
  """A batch whose answers end with a token of END."""
  asked = on_policy.asked_in(batch, range(len(batch['tokens'])))
  batch = {**batch, 'tokens': batch['tokens'].copy(), 'targets': batch['targets'].copy()}
  for one in asked:
    batch['tokens'][one.row, one.end - 1] = batch['targets'][one.row, one.end - 2] = END
  return batch


def test_answers_are_what_the_student_says_in_training():
  """Greedy answers over cached blocks are the likeliest tokens of the masked forward pass of the row that holds them."""
  params, batch = train_cases.params(), answers_that_end(train_cases.batch(2))
  options = on_policy.OnPolicyOptions(share=1.0, max_new=3, temperature=0.0)
  new, told = rewritten(params, batch, 0, options)
  best = np.asarray(greedy(params, new))
  np.testing.assert_array_equal(best[new['loss']], new['targets'][new['loss']])
  changed = (new['tokens'] != batch['tokens']).any(axis=1)
  assert changed.all() and told['on_policy_s'] > 0 and told['on_policy_tokens'] > len(changed)
  assert new['loss'].sum() <= batch['loss'].sum() and not (new['text'] & ~batch['text']).any()


@pytest.mark.slow
def test_a_step_is_a_function_of_its_number():
  params, batch = train_cases.params(), answers_that_end(train_cases.batch(2))
  first, again, later = (rewritten(params, batch, step)[0] for step in (4, 4, 5))
  jax.tree.map(np.testing.assert_array_equal, first, again)
  rows = lambda new: set(np.flatnonzero((new['tokens'] != batch['tokens']).any(axis=1)).tolist())
  assert rows(first) <= set(on_policy.chosen_rows(OPTIONS, 5, 4, 8)) and 0 < len(rows(first)) < 8
  assert not np.array_equal(first['tokens'], later['tokens'])


def test_rows_are_chosen_by_their_share_in_one_of_so_many_steps():
  options = on_policy.OnPolicyOptions(share=0.25, every=3)
  counts = np.array([len(on_policy.chosen_rows(options, 0, step, 40)) for step in range(600)])
  assert not counts[1::3].any() and not counts[2::3].any() and 9 < counts[::3].mean() < 11
  new, told = on_policy.rewritten(None, train_cases.batch(0), 1, options=options, seed=0, engine=pytest.fail)
  assert told == {'on_policy_s': 0.0, 'on_policy_tokens': 0.0}
  jax.tree.map(np.testing.assert_array_equal, new, train_cases.batch(0))


def test_a_lora_student_says_what_its_merged_model_says():
  base, options = train_cases.params(), lora.LoraOptions(rank=2, targets=('v', 'up'))
  rng = np.random.default_rng(0)
  trained = jax.tree.map(lambda s: rng.standard_normal(s.shape).astype(np.float32) * 0.3, lora.spec(CFG, options))
  batch, always = answers_that_end(train_cases.batch(2)), on_policy.OnPolicyOptions(share=1.0, max_new=3, temperature=0.0)
  own = rewritten(trained, batch, 0, always, attach=lambda params: lora.attach(base, params, options))[0]
  merged = rewritten(jax.tree.map(jnp.asarray, lora.merge(base, trained, options)), batch, 0, always)[0]
  assert (own['tokens'] == merged['tokens']).mean() > 0.99   # rounding may turn a close choice
  assert not np.array_equal(own['tokens'], rewritten(base, batch, 0, always)[0]['tokens'])


@pytest.mark.slow
@pytest.mark.usefixtures('standard_promotion')   # optax
def test_a_run_goes_on_as_if_it_had_not_been_stopped(tmp_path):
  model, optimizer = distill.transformer_model(CFG, COMPUTE), optim.make_optimizer(train_cases.OPTIM)
  step = distill.make_step(distill.Models(model, model, FORM), distill.DistillOptions(chunk=16), optimizer,
                           optim.learning_rate(train_cases.OPTIM))
  teacher, place, seen = train_cases.params(), train_cases.placement(), []
  options = on_policy.OnPolicyOptions(share=1.0, max_new=3)
  make = lambda number: answers_that_end(train_cases.batch(number, blocks=(3,)))   # few shapes

  def train(folder, steps):
    def rewrite(params, batch, step):
      seen.append(rewritten(params, batch, step, options))
      return seen[-1]
    config = loop.LoopConfig(steps=steps, log_every=1, save_every=1, keep=1, tokens_per_step=1)
    return loop.run(lambda state, batch: step(state, job.Frozen(teacher), batch),
                    loop.init_state(train_cases.params(seed=1), optimizer), train_cases.Stream(make), config, folder,
                    put_batch=place.put_batch, meta={}, rewrite=rewrite)

  straight = train(tmp_path / 'straight', 4)
  train(tmp_path / 'stopped', 2)
  again = train(tmp_path / 'stopped', 4)
  jax.tree.map(np.testing.assert_array_equal, straight.params, again.params)
  assert len(seen) == 8 and all(told['on_policy_tokens'] > 0 for _, told in seen)
  line = (tmp_path / 'straight' / 'metrics.jsonl').read_text()
  assert '"on_policy_s"' in line and checkpoint.newest_step(tmp_path / 'stopped' / 'checkpoints') == 4


def test_where_it_cannot_be(monkeypatch):
  shared = blocks.BlockOptions((0,), 'sequential', 8, shared_first=True)
  with pytest.raises(ValueError, match="with shared_first, positions must be 'local'"):
    on_policy.check(OPTIONS, shared)
  on_policy.check(on_policy.OnPolicyOptions(), shared)
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  with pytest.raises(ValueError, match='share=0.6 generates in one process, and this run has 2; train in one'):
    on_policy.check(OPTIONS, FORM)
