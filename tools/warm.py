"""Computes the states of a corpus' blocks before anybody asks, for servers and engines that read the same store.

  python -m tools.warm corpus --model exported --store ~/blocks
  python -m tools.warm faq.jsonl notes/*.txt --model exported --store ~/blocks --whole

A document is a text file, or a line {"title", "text"} of JSON lines; "title" may be left out. Of a folder, all files of
these kinds below it are read. Each is cut and encoded as a request to the server that gives it in "documents" would have it,
with `"segment": {"target": 512}` or what --target, --min and --max say; with --whole as one without "segment". So the server
finds every block; the dtype has to be the server's, which is bfloat16 unless it was told otherwise.

States that the store has are not computed again: the same command goes on where an earlier one ended.
The exit code is 0; 2 if model, a file or an option is refused, or the store cannot be written to; 130 if it was stopped.
"""

import collections
import dataclasses
import os
import pathlib
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence

import rich.progress

from blockattn import loading
from blockattn.blocks import Continued
from blockattn.data import encode, json_lines
from blockattn.errors import UserError
from blockattn.hf import files as hf_files
from blockattn.inference import cache, engine as engine_lib, plan
from blockattn.serving.vllm import front, student
from tools import arguments

TEXTS = ('.txt', '.md', '.rst')
_GIB = 1 << 30
_TOGETHER = 64   # blocks that are looked up together, at least


@dataclasses.dataclass(frozen=True)
class Document:
  """As a request has it; its file, line if there are several, and bytes there."""
  said: dict
  where: str
  size: int


def documents(file: str) -> Iterator[Document]:
  """Those of a file.

  Raises:
    ValueError: it is no UTF-8, or a line is no document.
  """
  if not file.endswith(json_lines.SUFFIXES):
    raw = pathlib.Path(file).read_bytes()
    try:
      yield Document({'text': raw.decode()}, file, len(raw))
    except UnicodeDecodeError as error:
      raise UserError(f'{file}: no UTF-8 text (byte {error.start})') from error
    return
  for number, line in json_lines.numbered_lines(file):
    where = f'{file}:{number}'
    try:
      yield Document(json_lines.load_object(line), where, len(line))
    except json_lines.Malformed as error:
      raise UserError(f'{where}: {error}') from error


def request_of(document: Document, segment: dict | None, chat: bool) -> tuple[str, dict]:
  """(path, body) of a request about the document."""
  said = {'documents': [document.said], 'segment': segment}
  asked = {'messages': [{'role': 'user', 'content': '?'}]} if chat else {'prompt': '?'}
  return front.CHAT if chat else front.PLAIN, said | asked


def warm(files: Sequence[str], forms: front.Forms, chat: bool, segment: dict | None, engine: engine_lib.Engine,
         store: cache.Store, room: int, bar: Callable[[int], None]) -> collections.Counter:
  """Has the states of all blocks in the store; counts 'documents', 'tokens' and blocks by what became of them.

  Args:
    room: most tokens of a block.
    bar: told the bytes that were read.

  Raises:
    ValueError: naming the document at fault; what stands in front of it is in the store.
    OSError: the store cannot be written to.
  """
  counts, waiting, overlap = collections.Counter(), [], forms.options.overlap

  def compute():
    for block, in engine.prepare([plan.Request([block, block[:1]], max_new=1) for block in waiting]):
      counts.update({block.found: 1, 'tokens': block.tokens})
    waiting.clear()
    check_written(store)

  for document in (document for file in files for document in documents(file)):
    try:
      blocks = forms.prompt(*request_of(document, segment, chat))[:-1]
    except (UserError, json_lines.Malformed) as error:
      raise UserError(f'{document.where}: {error}') from error
    if (longest := max(map(len, blocks), default=0)) > room:
      raise UserError(f'{document.where}: a block of {longest:,} tokens, and there is room for {room:,}: have it cut, '
                      'without --whole, or give more --device-tokens, as far as the model has positions')
    # What is hidden in front of a block is no less a part of its state: the overlap and the block, as one, have the same.
    waiting += [[*before[-overlap:], *block] if overlap and isinstance(block, Continued) else block
                for before, block in zip([[], *blocks], blocks)]
    if len(waiting) >= _TOGETHER:
      compute()
    counts['documents'] += 1
    bar(document.size)
  compute()
  store.flush()
  check_written(store)
  return counts


def check_written(store: cache.Store) -> None:
  """Raises OSError if the store no longer writes."""
  if store.fault is not None:
    raise OSError(f'the store cannot be written to ({store.fault}); mend it or name another --store, and the same command '
                  'goes on')


def run(options, console) -> None:
  files = json_lines.find_files(options.files, (*json_lines.SUFFIXES, *TEXTS))
  segment = None if options.whole else {name: value for name in front.SEGMENT if (value := getattr(options, name))}
  compute = arguments.compute_of(options, console)
  student.read_options(hf_files.locate(options.model))   # refused before anything is loaded
  model = loading.load(options.model, options.dtype, template_args=options.template_args, chat=options.chat)
  forms = front.Forms(model.blocks, model.tokenizer, encode.Encoder(model.tokenizer))
  columns = (*rich.progress.Progress.get_default_columns(), rich.progress.DownloadColumn())
  with warnings.catch_warnings(), rich.progress.Progress(*columns, console=console, transient=True) as bar, \
       cache.Store(0, options.store, int(options.store_gib * _GIB), 'int8' if options.int8 else 'none') as store:
    warnings.simplefilter('ignore', RuntimeWarning)   # of a disk that fails: here it is an error
    engine = engine_lib.Engine(model.params, model.cfg, compute, model.blocks, model.tokenizer, stop_ids=model.stop_ids,
                               device_tokens=options.device_tokens, store=store, batch=_TOGETHER)
    task = bar.add_task('reading', total=sum(map(os.path.getsize, files)))
    room = min(options.device_tokens, model.cfg.max_positions) - model.blocks.most_placed - 1
    counts = warm(files, forms, model.chat, segment, engine, store, room, lambda size: bar.advance(task, size))
  found = sum(counts[where] for where in ('disk', 'device', 'memory'))
  console.print(f'{counts["documents"]:,} documents, {found + counts["computed"]:,} blocks of {counts["tokens"]:,} tokens: '
                f'{counts["computed"]:,} computed, {found:,} were there')
  if store.counts.evicted_disk:
    console.print(f'{store.counts.evicted_disk:,} files had to go: the store is full; give more --store-gib')
  if store.counts.int8_blocks:
    console.print(f'8-bit states are {store.counts.int8_error / store.counts.int8_blocks:.2%} off, root mean square')


def main(argv: list[str] | None = None) -> int:
  parser = arguments.Parser(prog='python -m tools.warm', description=__doc__)
  parser.add_argument('files', nargs='+', help='text files, JSON lines, or folders of them')
  parser.add_argument('--model', required=True, help='the exported student')
  parser.add_argument('--store', required=True, metavar='FOLDER', help="the server's --blocks")
  parser.add_argument('--whole', action='store_true', help='a document is a block; else it is cut by the segmenter')
  parser.add_argument('--min', type=arguments.positive, metavar='TOKENS', help='shortest block (default: a quarter of the '
                      'target)')
  parser.add_argument('--max', type=arguments.positive, metavar='TOKENS', help='longest block (default: twice the target)')
  parser.add_argument('--int8', action='store_true', help='as the server with --blocks-int8')
  arguments.add_prompts(parser)
  arguments.add_numbers(parser, target=(512, 'length of a block'), store_gib=(64.0, 'bound of the store'),
                        device_tokens=(32768, 'room for states on the device'))
  arguments.add_computing(parser)
  parser.set_defaults(dtype='bfloat16')
  options = parser.parse_args(argv)
  return arguments.run('warm', lambda: run(options, arguments.console(stderr=True)), stopped='the same command goes on')


if __name__ == '__main__':
  sys.exit(main())
