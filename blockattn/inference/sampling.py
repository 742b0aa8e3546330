"""The next token from logits, and the text that tokens make as they come."""

from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class Sampling:
  """How each row of a batch chooses.

  Attributes:
    temperature: float32 [B]; 0: the most probable token.
    top_k: int32 [B], only so many of the most probable; 0: all.
    top_p: float32 [B], only the most probable that together have this probability, after `top_k`; 1: all.
    seed: uint32 [B]. What a row draws depends on its own seed and logits, not on its neighbours.
  """
  temperature: Any
  top_k: Any
  top_p: Any
  seed: Any


def choose(logits_BV: jax.Array, sampling: Sampling | None, n: jax.Array | int) -> jax.Array:
  """The n-th token of each row's answer: int32 [B].

  Args:
    logits_BV: float32.
    sampling: None: the most probable token of every row.
    n: int32, tokens of the answer so far.
  """
  best = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
  if sampling is None:
    return best
  drawn = jax.vmap(_draw, in_axes=(0, 0, None))(logits_BV, sampling, n)
  return jnp.where(sampling.temperature > 0, drawn, best)


def _draw(logits_V, sampling, n):
  """Temperature, then top-k, then top-p, as transformers orders them."""
  scaled = logits_V / jnp.where(sampling.temperature > 0, sampling.temperature, 1)
  order = jnp.argsort(-scaled)   # stable: of equal ones the smaller id comes first
  scaled = scaled[order]
  rank = jnp.arange(len(scaled))
  kept = (rank < sampling.top_k) | (sampling.top_k == 0)
  probability = jax.nn.softmax(jnp.where(kept, scaled, -jnp.inf))
  before = jnp.cumsum(probability) - probability
  kept &= (before < sampling.top_p) | (rank == 0)
  key = jax.random.fold_in(jax.random.key(sampling.seed), n)
  return order[jax.random.categorical(key, jnp.where(kept, scaled, -jnp.inf))].astype(jnp.int32)


class Writer:
  """An answer's text as its tokens come.

  Text is given out as soon as it is sure: a character when its last byte is there, and what may be the beginning of a stop
  string when it turns out not to be.

  Args:
    tokenizer: `tokenizers.Tokenizer`.
    stop_ids: tokens that end an answer.
    stop: texts that end an answer; they are no part of it.
  """

  def __init__(self, tokenizer: Any, stop_ids: Sequence[int], stop: Sequence[str]):
    from tokenizers import decoders
    self.tokens: list[int] = []
    self.ended = ''   # 'token' or 'text', once it has
    self._tokenizer, self._stop_ids, self._stop = tokenizer, frozenset(stop_ids), tuple(stop)
    self._stream = decoders.DecodeStream(skip_special_tokens=True)
    self._text, self._given = '', 0

  def push(self, token: int) -> str:
    """One more token; returns the text that is new and sure."""
    if token in self._stop_ids:
      self.ended = 'token'
      return ''
    self.tokens.append(token)
    self._text += self._stream.step(self._tokenizer, token) or ''
    found = [at for at in (self._text.find(stop, max(0, self._given - len(stop))) for stop in self._stop) if at >= 0]
    if found:
      self._text, self.ended = self._text[:min(found)], 'text'
    return self._give(len(self._text) if found else len(self._text) - self._held())

  def _held(self):
    """How many last characters may begin a stop string."""
    return max((n for stop in self._stop for n in range(1, len(stop)) if self._text.endswith(stop[:n])), default=0)

  def _give(self, until):
    new = self._text[self._given:until]
    self._given = max(self._given, until)
    return new

  def finish(self) -> str:
    """The text that was held back; a character whose last bytes never came is the replacement character."""
    if self.ended != 'text':
      whole = self._tokenizer.decode(self.tokens, skip_special_tokens=True)
      found = [at for at in map(whole.find, self._stop) if at >= 0]
      self._text = whole[:min(found)] if found else whole
    return self._give(len(self._text))

  @property
  def text(self) -> str:
    """The answer so far; whole after `finish`."""
    return self._text
