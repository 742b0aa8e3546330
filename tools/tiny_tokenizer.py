"""Trains the tokenizer of the tiny teacher on documentation pages of Python's standard library.

`python -m tools.tiny_tokenizer OUT [--vocab 1024] [--pages 12000]`

A byte-level BPE whose pieces never span a word boundary, a digit or a line end, so that a name is cut into the same
tokens where it stands in a page and where it stands in an answer.
"""

import pathlib
import sys

from blockattn.data import stdlib
from tools import arguments

EOS = '<|endoftext|>'
PIECES = r' ?\p{L}+|\p{N}|_+| ?[^\s\p{L}\p{N}_]+|\s'


def page_texts(count):
  """The text of `count` training pages, half of them with made-up names."""
  containers = stdlib.split_containers(stdlib.read_containers(), 'train')
  style = stdlib.PageStyle(renamed=0.5, split_words=0, seed=1)
  for i in range(count):
    page = stdlib.make_page(i, containers, style)
    yield ''.join(page['blocks']) + page['prompt'] + page['response']


def train(texts, vocab, *, pieces=PIECES, specials=(), **trainer):
  """A transformers tokenizer of `vocab` tokens; token 0 ends a text, `specials` follow it.

  Args:
    pieces: regular expression of what a token never goes beyond.
    trainer: further arguments of tokenizers' BpeTrainer.
  """
  import tokenizers
  import transformers
  from tokenizers import decoders, models, pre_tokenizers, trainers
  bpe = tokenizers.Tokenizer(models.BPE())
  bpe.pre_tokenizer = pre_tokenizers.Sequence([
      pre_tokenizers.Split(tokenizers.Regex(pieces), 'isolated'),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
  bpe.decoder = decoders.ByteLevel()
  bpe.train_from_iterator(texts, trainers.BpeTrainer(
      vocab_size=vocab, special_tokens=[EOS, *specials], show_progress=False,
      initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **trainer))
  return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=EOS, pad_token=EOS,
                                              clean_up_tokenization_spaces=False)


def save(tokenizer, folder: pathlib.Path) -> None:
  tokenizer.save_pretrained(folder)
  print(f'{folder}: {len(tokenizer)} tokens')


def main(argv=None) -> int:
  parser = arguments.Parser(prog='python -m tools.tiny_tokenizer', description=__doc__)
  parser.add_argument('out', type=pathlib.Path)
  arguments.add_numbers(parser, vocab=(1024, 'tokens'), pages=(12000, 'to read'))
  args = parser.parse_args(argv)
  return arguments.run('tiny_tokenizer', lambda: save(train(page_texts(args.pages), args.vocab), args.out))


if __name__ == '__main__':
  sys.exit(main())
