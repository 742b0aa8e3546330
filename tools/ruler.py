"""Writes questions that a program makes: needles, traced variables, common words, by length and number of blocks.

  python -m tools.ruler OUT --tokenizer MODEL                                         512 to 8192 tokens, 2 to 64 blocks
  python -m tools.ruler OUT --tokenizer MODEL --kinds needles --keys 8 --values 2 --tokens 4096 --blocks 8 32
  python -m tools.judge qa MODEL OUT/*.jsonl                                          asks them: a task per file

One file of JSON lines per kind, length and number of blocks, of the blocks form of blockattn.data.prompts, which
tools.evaluate, tools.judge and the trainers' held-out evaluation read. Each id says in which block the pieces of the answer
stand and how far behind its start. Nothing but the documentation of Python's standard library is read.
"""

import json
import pathlib
import sys

from blockattn import disk
from blockattn.data import encode
from blockattn.evals import ruler
from tools import arguments


def write(out: pathlib.Path, shape: ruler.Shape, number: int, tokenizer) -> pathlib.Path:
  """The file of a shape's first questions."""
  made = encode.plain(tokenizer)
  count = lambda texts: [len(one.ids) + 1 for one in made.encode_batch_fast(list(texts), add_special_tokens=False)]   # + \n
  out.mkdir(parents=True, exist_ok=True)
  path = out / f'{shape.name}.jsonl'
  disk.write_text(path, ''.join(json.dumps(ruler.make(index, shape, count)) + '\n' for index in range(number)))
  return path


def run(options) -> None:
  tokenizer = encode.load_tokenizer(options.tokenizer)
  own = {name: getattr(options, name) for name in ('keys', 'values', 'queries', 'hops', 'words')}
  for kind in options.kinds:
    for tokens in options.tokens:
      for blocks in options.blocks:
        path = write(options.out, ruler.Shape(kind, tokens, blocks, **own), options.count, tokenizer)
        print(f'{path}: {options.count} questions')


def main(argv=None) -> int:
  parser = arguments.Parser(prog='python -m tools.ruler', description=__doc__)
  parser.add_argument('out', type=pathlib.Path)
  parser.add_argument('--tokenizer', required=True, help='folder or hub name; its tokens are counted')
  parser.add_argument('--kinds', nargs='+', choices=ruler.KINDS, default=list(ruler.KINDS))
  parser.add_argument('--tokens', type=arguments.positive, nargs='+', default=[512, 1024, 2048, 4096, 8192])
  parser.add_argument('--blocks', type=arguments.positive, nargs='+', default=[2, 8, 32, 64])
  arguments.add_numbers(parser, count=(100, 'questions of each file'), keys=(4, 'needles: keys to tell apart'),
                        values=(1, 'needles: numbers of each key'), queries=(1, 'needles: keys that are asked for'),
                        hops=(4, 'variables: links of a chain'), words=(3, 'words: how many are asked for'))
  options = parser.parse_args(argv)
  return arguments.run('ruler', lambda: run(options))


if __name__ == '__main__':
  sys.exit(main())
