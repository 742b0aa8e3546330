"""Examples in, answers out: an engine with what is asked of it alike."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from blockattn.data import chat_template, encode, prompts
from blockattn.data.example import Example, check_continued
from blockattn.errors import UserError
from blockattn.inference import engine as engine_lib, stopwatch
from blockattn.inference.plan import Request


@dataclasses.dataclass(frozen=True)
class Session:
  """
  Attributes:
    engine: answers.
    encoder: makes token ids of examples.
    like: a request whose prompt is replaced.
  """
  engine: engine_lib.Engine
  encoder: encode.Encoder
  like: Request

  def prepare(self, example: Example) -> tuple[engine_lib.Block, ...]:
    """Has the states of the example's blocks ready, see `Engine.prepare`."""
    return self.engine.prepare([self._request(example)])[0]

  def answer(self, example: Example,
             on_text: Callable[[int, str], None] | None = None) -> tuple[engine_lib.Answer, stopwatch.Stopwatch]:
    """The answer, and how long it took."""
    request = self._request(example)
    with stopwatch.running() as watch:
      return self.engine.generate([request], on_text, watch)[0], watch

  def _request(self, example):
    return dataclasses.replace(self.like, prompt=self.encoder.prompt(example))


def ask(blocks: Sequence[str], question: str, tokenizer: Any, chat: bool, continued: Sequence[int] = ()) -> Example:
  """The example that asks this about the blocks, of which those of the numbers `continued` go on with the one before.

  Raises:
    ValueError: the question was no UTF-8; a number of no block that stands behind another.
  """
  try:
    question.encode()
  except UnicodeEncodeError as error:   # bytes of the command line or of standard input that stand for no character
    raise UserError(f'the question is no UTF-8 text (character {error.start}); write it in UTF-8') from None
  template = prompts.CHAT if chat else prompts.PLAIN
  example = Example(tuple(blocks), template.question.format(question=question), response='', id=question,
                    continued=check_continued(continued, len(blocks)))
  return chat_template.wrap_in_turn(example, tokenizer) if chat else example
