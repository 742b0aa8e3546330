"""A prompt with its answer as text: what is read from files, cut anew, and encoded."""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from blockattn.errors import UserError


@dataclasses.dataclass(frozen=True)
class Example:
  """A prompt with its answer.

  Attributes:
    blocks: texts of the context blocks.
    prompt: text of the last block before the answer.
    response: the answer, trained on; '' of a text without a question, whose last block takes its place.
    id: from the line, else 'file:line'.
    answers: accepted strings, for evaluation.
    gold: indices of the context blocks that hold the answer; None if the line does not say.
    template: for the header, each context block, the prompt and the response the (start, stop) character ranges that a
      chat template wrote. () if none did.
    header: text in front of the context, a block of its own; '' for none.
    continued: numbers of the context blocks whose text goes on with that of the one before: where one text was cut.
  """
  blocks: tuple[str, ...]
  prompt: str
  response: str
  id: str
  answers: tuple[str, ...] = ()
  gold: tuple[int, ...] | None = None
  template: tuple[tuple[tuple[int, int], ...], ...] = ()
  header: str = ''
  continued: tuple[int, ...] = ()

  @property
  def is_text(self) -> bool:
    """Whether it is a text without a question."""
    return not self.response

  @property
  def texts(self) -> tuple[str, ...]:
    """Header, context blocks, prompt, response."""
    return self.header, *self.blocks, self.prompt, self.response


def check_continued(numbers: Any, blocks: int) -> tuple[int, ...]:
  """The numbers, which must be a list or tuple of those of context blocks behind another, of so many. Raises ValueError."""
  if not isinstance(numbers, list | tuple) or not all(type(i) is int and 1 <= i < blocks for i in numbers):
    raise UserError(f'"continued" lists numbers from 1 on of the {blocks} blocks in front of the question, not '
                    f'{numbers!r:.80}')
  return tuple(numbers)


def before_spaces(text: str, cuts: Iterable[int]) -> list[int]:
  """The cuts, those between a space and a word moved in front of the space.

  In running text a space is the beginning of the next word's token. A cut behind it would leave a token of its own, which
  no reader of the whole text has.
  """
  follows = lambda cut: cut < len(text) and text[cut - 1:cut] == ' ' and not text[cut].isspace()
  return list(dict.fromkeys(int(cut) - (cut > 1 and follows(cut)) for cut in cuts))


def pieces(text: str, cuts: Iterable[int]) -> list[str]:
  """The text cut into blocks at these offsets, see `before_spaces`; joined they are the text, and none is empty."""
  inside = sorted({cut for cut in before_spaces(text, cuts) if 0 < cut < len(text)})
  return [text[a:b] for a, b in itertools.pairwise([0, *inside, len(text)])] if text else []


def cut_texts(texts: Sequence[str], cuts: Sequence[Iterable[int]]) -> tuple[tuple[str, ...], tuple[int, ...]]:
  """(blocks, numbers of those that go on with the one before) of texts that are each cut at these offsets, see `pieces`."""
  found = [pieces(text, own) for text, own in zip(texts, cuts, strict=True)]
  firsts = set(itertools.accumulate(map(len, found), initial=0))
  blocks = tuple(itertools.chain.from_iterable(found))
  return blocks, tuple(i for i in range(len(blocks)) if i not in firsts)


def recut(example: Example, cuts: Sequence[int]) -> Example:
  """The same context in other blocks.

  Args:
    cuts: offsets into the joined context, strictly increasing, see `before_spaces`; those inside of a chat template's
      text, and those outside of the context, are left out.

  Returns:
    The example with its context cut there. A new block is gold if it holds some of a gold one, and goes on with the one
    before it, unless it begins where a block did that does not.
  """
  whole = ''.join(example.blocks)
  starts = [0, *itertools.accumulate(map(len, example.blocks))]
  header, *parts = example.template or [()] * len(example.texts)
  ranges = [(start + a, start + b) for start, own in zip(starts, parts[:-2]) for a, b in own]
  kept = [cut for cut in before_spaces(whole, cuts) if 0 < cut < len(whole) and not any(a < cut < b for a, b in ranges)]
  spans = list(itertools.pairwise([0, *kept, len(whole)])) if whole else []
  clipped = lambda a, b: tuple((max(x, a) - a, min(y, b) - a) for x, y in ranges if x < b and y > a)
  gold = example.gold and tuple(i for i, (a, b) in enumerate(spans)
                                if any(starts[g] < b and starts[g + 1] > a for g in example.gold))
  template = (header, *(clipped(a, b) for a, b in spans), *parts[-2:]) if example.template else ()
  apart = {0, *before_spaces(whole, [starts[i] for i in range(1, len(example.blocks)) if i not in example.continued])}
  return dataclasses.replace(example, blocks=tuple(whole[a:b] for a, b in spans), gold=gold, template=template,
                             continued=tuple(i for i, (a, _) in enumerate(spans) if a not in apart))
