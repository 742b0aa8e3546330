"""Trains the tokenizer of the tiny segmenter on the documents of a SemanticSeg folder.

`python -m tools.tiny_segmenter_tokenizer DATA/train_*.jsonl.gz --out OUT [--vocab 8192] [--chars 2000000]`

A byte-level BPE. Runs of line ends, of tabs and of blanks are pieces of their own, so that the surface of a separator
(how many line ends, how deep the next line is indented) survives as tokens; numbers are cut into three digits at most.
"""

import collections
import pathlib
import sys

from blockattn.segmentation import markers
from blockattn.segmentation.semanticseg import schema
from tools import arguments, tiny_tokenizer

PIECES = r' ?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|[\r\n]+|\t+| +(?!\S)| +|\s'


def category_texts(files, chars):
  """Texts of the files' documents, `chars` characters at most of each category."""
  taken = collections.Counter()
  for file in files:
    for document in schema.read(file):
      if taken[document.category] < chars:
        taken[document.category] += len(document.text)
        yield document.text


def train(texts, vocab):
  """A transformers tokenizer of `vocab` tokens; token 0 ends a text, the marker and the gaps follow it."""
  return tiny_tokenizer.train(texts, vocab, pieces=PIECES, specials=(markers.CUT_TOKEN, *markers.GAP_TOKENS),
                              max_token_length=24)


def run(args) -> None:
  tiny_tokenizer.save(train(category_texts(sorted(args.files), args.chars), args.vocab), args.out)


def main(argv=None) -> int:
  parser = arguments.Parser(prog='python -m tools.tiny_segmenter_tokenizer', description=__doc__)
  parser.add_argument('files', nargs='+')
  parser.add_argument('--out', type=pathlib.Path, required=True)
  arguments.add_numbers(parser, vocab=(8192, 'tokens'), chars=(2_000_000, 'of each category'))
  args = parser.parse_args(argv)
  return arguments.run('tiny_segmenter_tokenizer', lambda: run(args))


if __name__ == '__main__':
  sys.exit(main())
