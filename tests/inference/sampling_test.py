"""Choosing tokens, and the text that they make."""

import hf_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from blockattn.inference import sampling


def settings(rows, temperature=1.0, top_k=0, top_p=1.0, seeds=None):
  fill = lambda value, dtype: np.full(rows, value, dtype)
  seeds = np.arange(rows, dtype=np.uint32) if seeds is None else np.asarray(seeds, np.uint32)
  return sampling.Sampling(fill(temperature, np.float32), fill(top_k, np.int32), fill(top_p, np.float32), seeds)


LOGITS = np.array([1.0, 3.0, 2.5, -1.0, 0.0, 3.0], np.float32)


def drawn(rows=4000, n=0, **how):
  logits = jnp.asarray(np.tile(LOGITS, (rows, 1)))
  return np.asarray(jax.jit(sampling.choose)(logits, settings(rows, **how), jnp.int32(n)))


def expected(kept, temperature=1.0):
  weights = np.where(np.isin(np.arange(6), kept), np.exp(LOGITS / temperature), 0)
  return weights / weights.sum()


@pytest.mark.parametrize('how, kept, temperature', [
    (dict(), range(6), 1.0), (dict(temperature=2.0), range(6), 2.0), (dict(top_k=3), (1, 5, 2), 1.0),
    (dict(top_k=2), (1, 5), 1.0), (dict(top_p=0.5), (1, 5), 1.0), (dict(top_p=1e-6), (1,), 1.0),
    (dict(top_k=3, top_p=0.8), (1, 5, 2), 1.0),   # after top-k the three have 0.38, 0.38 and 0.23
    (dict(top_k=3, top_p=0.7), (1, 5), 1.0),
])
def test_tokens_are_drawn_with_their_probabilities(how, kept, temperature):
  shares = np.bincount(drawn(**how), minlength=6) / 4000
  np.testing.assert_allclose(shares, expected(list(kept), temperature), atol=0.03)
  assert set(np.flatnonzero(shares)) <= set(kept)


def test_zero_temperature_and_no_sampling_take_the_first_of_the_most_probable():
  assert set(drawn(rows=8, temperature=0.0)) == {1}
  assert np.asarray(sampling.choose(jnp.asarray(LOGITS[None]), None, jnp.int32(0))).tolist() == [1]


def test_a_draw_is_its_seeds_and_its_number():
  assert np.array_equal(drawn(rows=50), drawn(rows=50))
  assert not np.array_equal(drawn(rows=50), drawn(rows=50, n=1))
  assert np.array_equal(drawn(rows=50)[10:20], drawn(rows=10, seeds=np.arange(10, 20)))


@pytest.fixture(scope='module')
def words(tmp_path_factory):
  folder = hf_cases.write_tokenizer(tmp_path_factory.mktemp('tokenizer'), 48)
  return tokenizers.Tokenizer.from_file(str(folder / 'tokenizer.json'))


def bytes_tokenizer():
  """Every byte a token: characters come in parts."""
  alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  return tokenizer


def written(tokenizer, tokens, stop=(), stop_ids=()):
  """(pieces, writer) of tokens, as far as they are asked for."""
  writer, pieces = sampling.Writer(tokenizer, stop_ids, stop), []
  for token in tokens:
    pieces.append(writer.push(token))
    if writer.ended:
      break
  return [*pieces, writer.finish()], writer


def test_a_character_comes_when_it_is_whole():
  tokenizer = bytes_tokenizer()
  text = 'né → 🙂!'
  pieces, writer = written(tokenizer, tokenizer.encode(text).ids)
  assert ''.join(pieces) == writer.text == text and '\ufffd' not in ''.join(pieces)
  assert writer.ended == ''
  pieces, writer = written(tokenizer, tokenizer.encode(text).ids[:-3])   # the answer ends inside of a character
  assert writer.text == 'né → \ufffd' and ''.join(pieces) == writer.text


@pytest.mark.parametrize('stop, text, tokens', [
    (('\n\n',), 'one\ntwo', 9), (('two',), 'one\n', 7), (('no such',), 'one\ntwo\n\nthree', 14), (('x', 'e'), 'on', 3),
    (('\n\nthrow', 'ee'), 'one\ntwo\n\nthr', 14), (('o', 'one'), '', 1)])
def test_nothing_of_a_stop_text_is_given_out(stop, text, tokens):
  tokenizer = bytes_tokenizer()
  pieces, writer = written(tokenizer, tokenizer.encode('one\ntwo\n\nthree').ids, stop)
  assert ''.join(pieces) == writer.text == text
  assert len(writer.tokens) == tokens
  assert writer.ended == ('' if tokens == 14 and stop == ('no such',) else 'text')


def test_an_end_token_ends(words):
  pieces, writer = written(words, [5, 6, 0, 7], stop_ids=(0,))
  assert writer.ended == 'token' and writer.tokens == [5, 6] and ''.join(pieces) == writer.text
  assert writer.text.split() == ['word5', 'word6']
