"""Pages about classes of Python's standard library that no training of this project sees, with a question each."""

import dataclasses
from typing import Any

from blockattn.data import encode, sources, stdlib
from blockattn.data.example import Example

SPLITS = {'pages': 'test', 'pages:validation': 'validation'}   # name on command lines -> split of data.stdlib
STOP = '\n'   # a page may ask several questions, one after the other


def load(tokenizer: Any, count: int, *, split: str = 'test',
         style: stdlib.PageStyle | None = None) -> tuple[list[encode.EncodedDoc], list[Example]]:
  """(documents, examples) of `count` pages with the library's own names; pages 0, 1, ... depend on the style alone, by
  default that of a config."""
  style = dataclasses.replace(style or stdlib.PageStyle(), renamed=0.0, questions=(1, 1), seed=1)
  containers = stdlib.split_containers(stdlib.read_containers(), split)
  examples = [sources.page_example(number, containers, style) for number in range(count)]
  return [encode.whole(parts) for parts in encode.Encoder(tokenizer).parts(examples)], examples
