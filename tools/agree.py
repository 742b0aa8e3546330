"""How often our model and that of transformers, with torch, find the same token likeliest: at every position of some texts.

  python -m tools.agree blockattn/assets/tiny_teacher pages --limit 20
  python -m tools.agree Qwen/Qwen3-0.6B notes.txt report.md

MODEL is a folder in the Hugging Face format or a hub name. Both read the texts with full attention, given the tokens before
each position, in float32 and in bfloat16, so that one early difference does not count for all tokens behind it, as it does
where answers are compared. `pages` are those of tools.evaluate. The exit code is 0; 2 if model or files are refused.
"""

import itertools
import sys
from collections.abc import Sequence

import jax
import numpy as np

from blockattn import blocks
from blockattn.data import encode
from blockattn.evals import pages
from blockattn.hf import convert, files as hf_files
from blockattn.models import decode, transformer
from tools import arguments, generate

DTYPES = ('float32', 'bfloat16')
_SHORTEST = 256   # tokens of a row: few shapes, few compilations


def ours(folder, texts: Sequence[np.ndarray], dtype: str) -> np.ndarray:
  """Our likeliest tokens at every position of the texts, one text after the other."""
  cfg, params = convert.load(folder, dtype)
  compute = transformer.Compute(dtype=dtype, impl='xla')
  read = jax.jit(lambda tokens, layout: transformer.logits(params, transformer.apply(params, tokens, layout, cfg, compute),
                                                           cfg).argmax(axis=-1))
  found = []
  for tokens in texts:
    length = decode.bucket(len(tokens), _SHORTEST)
    row = np.zeros((1, length), np.int32)
    row[0, :len(tokens)] = tokens
    found.append(np.asarray(read(row, blocks.from_lengths([[(len(tokens),)]], length)))[0, :len(tokens)])
  return np.concatenate(found)


def theirs(folder, texts: Sequence[np.ndarray], dtype: str) -> np.ndarray:
  """The same of transformers."""
  import torch
  import transformers
  model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), local_files_only=True)
  with torch.no_grad():
    return np.concatenate([model.eval()(torch.tensor(tokens[None], dtype=torch.long)).logits[0].argmax(dim=-1).numpy()
                           for tokens in texts])


def run(options) -> None:
  """Prints the share of positions with the same token of every two ways."""
  folder = hf_files.locate(options.model)
  tokenizer = encode.load_tokenizer(folder)
  if options.files == ['pages']:
    texts = [doc.tokens for doc in pages.load(tokenizer, options.limit)[0]]
  else:
    texts = [np.array(tokens, np.int32) for tokens in encode.Encoder(tokenizer).texts(generate.read_texts(options.files))]
  found = {f'{name}, {dtype}': way(folder, texts, dtype)
           for name, way in (('ours', ours), ('transformers', theirs)) for dtype in DTYPES}
  table, console = arguments.table('', '', 'same token', left=2), arguments.console()
  for a, b in itertools.combinations(found, 2):
    table.add_row(a, b, f'{np.mean(found[a] == found[b]):.2%}')
  console.print(table)
  console.print(f'{sum(map(len, texts)):,} positions of {len(texts)} texts')


def main(argv: list[str] | None = None) -> int:
  parser = arguments.Parser(prog='python -m tools.agree', description=__doc__)
  parser.add_argument('model', help='Hugging Face folder or hub name')
  parser.add_argument('files', nargs='+', help='text files; or pages')
  arguments.add_numbers(parser, limit=(20, 'pages'))
  options = parser.parse_args(argv)
  return arguments.run('agree', lambda: run(options))


if __name__ == '__main__':
  sys.exit(main())
