"""Pages about classes of Python's standard library that no training of this project sees, with a question each."""

import dataclasses
from typing import Any

from blockattn.data import encode, sources, stdlib
from blockattn.data.example import Example

SPLITS = {'pages': 'test', 'pages:validation': 'validation'}   # name on command lines -> split of data.stdlib
STOP = '\n'   # a page may ask several questions, one after the other
_LONG = 1 << 24   # no page is too long for a row


def load(tokenizer: Any, count: int, *, split: str = 'test',
         style: stdlib.PageStyle | None = None) -> tuple[list[encode.EncodedDoc], list[Example]]:
  """(documents, examples) of `count` pages with the library's own names; pages 0, 1, ... depend on the style alone, by
  default that of a config."""
  style = dataclasses.replace(style or stdlib.PageStyle(), renamed=0.0, questions=(1, 1), seed=1)
  source = sources.PageRows(stdlib.split_containers(stdlib.read_containers(), split), style, tokenizer, length=_LONG,
                            max_blocks=_LONG)
  return source.pages(range(count)), [source.example(i) for i in range(count)]
