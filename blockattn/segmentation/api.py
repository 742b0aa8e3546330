"""Text in, blocks out: `segment` and `segment_many`, which the package itself offers too."""

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

from blockattn.data import encode
from blockattn.segmentation import granularity, segmenter


def segment(text: str, *, threshold: float | None = None, depth: int | None = None, target_tokens: int | None = None,
            min_tokens: int | None = None, max_tokens: int | None = None, model: Any = None,
            tokenizer: Any = None) -> list[tuple[int, int]]:
  """The blocks of one text as (start, stop) character offsets; for the arguments see `segment_many`."""
  return segment_many([text], threshold=threshold, depth=depth, target_tokens=target_tokens, min_tokens=min_tokens,
                      max_tokens=max_tokens, model=model, tokenizer=tokenizer)[0]


def segment_many(texts: Sequence[str], *, threshold: float | None = None, depth: int | None = None,
                 target_tokens: int | None = None, min_tokens: int | None = None, max_tokens: int | None = None,
                 model: Any = None, tokenizer: Any = None,
                 progress: Callable[[int], None] | None = None) -> list[list[tuple[int, int]]]:
  """Cuts texts where a person would.

  The blocks of a text follow each other without gap or overlap from 0 to its length: joined, they are the text. An
  empty text has none. Tokens are those of a block encoded alone by `tokenizer`: give that of the model that will read it.

  Args:
    texts: strings in any language, of any length; they are scored in batches.
    threshold: cut where the probability of a cut is at least this; None: what the model was tuned to.
    depth: cut every block longer than `max_tokens` (every block, if that is not given) again at its best place, up to
      `depth` times. Blocks may still be longer then.
    target_tokens: wanted length of a block; of all cuts those with the best sum of log-odds near it are taken.
    min_tokens, max_tokens: bounds that always hold (a text shorter than `min_tokens` is one block), if need be by cuts
      inside a sentence or a word. With a target their defaults are a quarter of it and twice it.
    model: None: the segmenter that comes with the package; a folder or a hub name; or an object that has `score`,
      `token_ends` and `options.threshold` as `blockattn.segmentation.segmenter.Segmenter` has them.
    tokenizer: counts tokens: a folder or hub name, a transformers fast tokenizer, a `tokenizers.Tokenizer`, or a function
      text -> number; None: the segmenter's own, of which a text has more or less than of a language model's.
    progress: called with the number of characters scored so far.

  Returns:
    For each text a list of (start, stop).

  Raises:
    ValueError: the wishes contradict each other, or a single character has more tokens than `max_tokens`.
    TypeError: a text is no string.
    FileNotFoundError: there is no such model.
  """
  if isinstance(texts, str):
    raise TypeError('segment_many takes a list of texts; for one text use segment')
  for i, text in enumerate(texts := list(texts)):
    if not isinstance(text, str):
      raise TypeError(f'text {i} is {type(text).__name__}, not str')
  want = granularity.wanted(threshold=threshold, depth=depth, target=target_tokens, minimum=min_tokens,
                            maximum=max_tokens)
  model = load_segmenter(model)
  want = granularity.for_model(want, model)
  reader = None if tokenizer is None else encode.token_ends(tokenizer)
  return [granularity.blocks_of(text, scored, want, model.token_ends, reader)
          for text, scored in zip(texts, model.score(texts, progress=progress), strict=True)]


def load_segmenter(model: Any = None) -> Any:
  """The segmenter of a folder or hub name, read once per process; None: the embedded one; an object stays itself."""
  if model is None:
    return segmenter.embedded()
  return _load(os.fspath(model)) if isinstance(model, str | os.PathLike) else model


@functools.cache
def _load(name):
  return segmenter.Segmenter.load(name)
