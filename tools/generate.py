"""Answers a question over blocks of text whose states are cached.

  python -m tools.generate exported/qwen3_4b report.md notes.txt --question 'Who wrote the report?' --cache ~/blocks
  python -m tools.generate exported/qwen3_4b book.txt --segmenter tiny --target-tokens 512      # asks for questions
  python -m tools.generate exported/qwen3_4b questions.jsonl --limit 5
  python -m tools.generate blockattn/assets/tiny_teacher pages --limit 3

MODEL is a folder in the Hugging Face format, a hub name, or a trainer's work directory. Every text file ("-": standard
input) is one block, or, with --segmenter, as many as it is cut into. JSON lines, parquet and Arrow files, in the forms of
blockattn.data.prompts, hold their own blocks and questions; with --question or --interactive it is asked about the blocks of
the first line. `pages` are those of tools.evaluate: classes of Python's standard library that no training of this project
sees. Without a question the blocks are read, and then questions line by line until the end of the input (Ctrl-D) or /quit;
/help lists the commands. Ctrl-C ends an answer, and at the prompt the program.

The answer goes to standard output as it is made; what became of the blocks, the time to the first token and tokens per
second go to standard error, without the time of compiling, which the first answer of a size waits for and which is said
apart. --cache keeps states for the next time.
The exit code is 0; 2 if model, files (at a malformed line) or options are refused; 130 if it was stopped.
"""

import argparse
import collections
import dataclasses
import functools
import itertools
import pathlib
import sys
from collections.abc import Iterator, Sequence

import jax
import rich.table

import blockattn
from blockattn import loading, tree
from blockattn.data import encode, prompts, tables
from blockattn.data.example import Example, cut_texts
from blockattn.errors import UserError
from blockattn.evals import pages
from blockattn.inference import cache as cache_lib, engine as engine_lib, plan, session as session_lib, stopwatch
from blockattn.segmentation import cutter
from tools import arguments

_GIB = 1 << 30
_SOME_PAGES = 3
COMMANDS = {'/blocks': "where the blocks' states are", '/help': 'this list', '/quit': 'the end, as Ctrl-D'}


# Prompts.


def cutting(segmenter: str, target_tokens: int | None, tokenizer):
  """`blockattn.segment_many` with this segmenter: a folder, a hub name, or the name of the embedded one.

  Lengths are in tokens of `tokenizer`, that of the model that answers.
  """
  model = None if segmenter == cutter.EMBEDDED else segmenter
  return functools.partial(blockattn.segment_many, model=model, target_tokens=target_tokens, tokenizer=tokenizer)


def read_texts(files: Sequence[str]) -> list[str]:
  """Text files; one without a line end at its end gets it, so that words stay apart.

  Raises:
    ValueError: a file that is no UTF-8, or is empty.
  """
  texts = []
  for file in files:
    raw = sys.stdin.buffer.read() if file == '-' else pathlib.Path(file).read_bytes()
    try:
      texts.append(raw.decode('utf-8'))
    except UnicodeDecodeError as error:
      raise UserError(f'{file}: no UTF-8 text (byte {error.start})') from error
    if not texts[-1]:
      raise UserError(f'{file}: the file is empty')
    if not texts[-1].endswith(('\n', '\r')):
      texts[-1] = prompts.PLAIN.untitled.format(text=texts[-1])
  return texts


def blocks_of(texts: Sequence[str], cut=None) -> tuple[tuple[str, ...], tuple[int, ...]]:
  """The blocks of texts, and the numbers of those that go on with the one before.

  Args:
    cut: texts -> for each its blocks as (start, stop); None: a text is a block.
  """
  return cut_texts(texts, [()] * len(texts) if cut is None else [[start for start, _ in spans] for spans in cut(texts)])


# What is said about it.


def block_table(blocks: Sequence[engine_lib.Block]) -> rich.table.Table:
  table = rich.table.Table('block', 'tokens', 'state', box=None, padding=(0, 2, 0, 0))
  for i, block in enumerate(blocks):
    table.add_row(str(i), f'{block.tokens:,}', block.found)
  return table


def figures(answer: engine_lib.Answer, watch: stopwatch.Stopwatch) -> str:
  """One line: time to the first token, tokens per second, where the blocks were."""
  after = max(len(answer.tokens) - 1, 0)
  rate = f'{after / watch.decode:.1f} tokens/s' if after and watch.decode else 'no more tokens'
  where = collections.Counter(block.found for block in answer.blocks)
  tokens = sum(block.tokens for block in answer.blocks)
  found = ', '.join(f'{n} {name}' for name, n in where.most_common()) or 'none'
  compiled = f'; besides, {watch.compile:.1f} s of compiling' if watch.compile else ''
  return (f'first token {watch.first_token:.3f} s, {rate}, {len(answer.tokens)} tokens; {len(answer.blocks)} '
          f'blocks of {tokens:,} tokens: {found}{compiled}')


# The command.


def answer(session: session_lib.Session, example: Example, console) -> engine_lib.Answer:
  """Prints the answer as it is made, then its figures."""
  made, watch = session.answer(example, on_text=lambda _, text: print(text, end='', flush=True))
  print(flush=True)
  console.print(figures(made, watch))
  return made


def questions(stream, console) -> Iterator[str]:
  """Lines of a stream, blank ones left out, with a prompt where a person types them."""
  while True:
    if stream.isatty():
      console.print('> ', end='')
    line = stream.readline()
    if not line:
      if stream.isatty():
        console.print()   # Ctrl-D leaves the cursor behind the prompt
      return
    if line.strip():
      yield line.strip()


def converse(session: session_lib.Session, ask, stream, console) -> None:
  """Reads the blocks, then answers one question after the other. `ask` makes an example of a question."""
  say = console.print
  say(block_table(session.prepare(ask('?'))))
  for question in questions(stream, console):
    if question == '/quit':
      return
    if question == '/blocks':
      say(block_table(session.prepare(ask('?'))))
    elif question == '/help':
      say('\n'.join(f'{name:8} {what}' for name, what in COMMANDS.items()))
    elif question.startswith('/') and ' ' not in question:
      say(f'generate: no command {question}; {tree.did_you_mean(question, COMMANDS)}')
    else:
      _answer(session, ask, question, console, stops=stream.isatty())


def _answer(session, ask, question, console, stops):
  """One question of many: what is wrong with it, or Ctrl-C where a person typed it, ends this answer only."""
  try:
    answer(session, ask(question), console)
  except ValueError as error:
    console.print(f'generate: {error}')
  except KeyboardInterrupt:
    if not stops:
      raise
    print(flush=True)
    console.print('generate: stopped; /quit or Ctrl-D ends the program')


def run(options, stream, console) -> None:
  lines = [file for file in options.files if file.endswith(tables.SUFFIXES)]
  if lines and len(lines) < len(options.files):
    raise UserError('give either JSON lines or text files')
  if options.target_tokens and options.segmenter is None:
    raise UserError(f'--target-tokens {options.target_tokens} is the length of the blocks that --segmenter cuts; give that '
                    'too')
  if '-' in options.files and options.question is None:
    raise UserError('standard input cannot be a text and the questions; give --question')
  split = pages.SPLITS.get(options.files[0]) if len(options.files) == 1 else None
  if lines:
    tables.find_files(lines)
  texts = [] if lines or split else read_texts(options.files)   # before the model is loaded
  compute = arguments.compute_of(options, console)
  model = loading.load(options.model, options.dtype, template_args=options.template_args, chat=options.chat)
  examples = read_examples(options, model, lines, split)
  if examples:
    blocks, continued = examples[0].blocks, examples[0].continued
  else:
    cut = None if options.segmenter is None else cutting(options.segmenter, options.target_tokens, model.tokenizer)
    blocks, continued = blocks_of(texts, cut)
  with _store(options) as store:
    stop = (*options.stop, *([pages.STOP] if split else []))
    like = plan.Request((), max_new=options.max_new, stop=stop, temperature=options.temperature, top_k=options.top_k,
                        top_p=options.top_p, seed=options.seed, seam=options.seam)
    session = session_lib.Session(make_engine(options, model, compute, store), encode.Encoder(model.tokenizer), like)
    ask = functools.partial(session_lib.ask, blocks, tokenizer=model.tokenizer, chat=model.chat, continued=continued)
    if options.question is not None:
      console.print(block_table(answer(session, ask(options.question), console).blocks))
    elif examples and not options.interactive:
      for example in examples:
        console.print(f'{example.id}: {example.prompt.strip()}')
        answer(session, example, console)
    else:
      converse(session, ask, stream, console)
    if store.counts.int8_blocks:
      console.print(f'8-bit states are {store.counts.int8_error / store.counts.int8_blocks:.2%} off, root mean square')


def read_examples(options, model: loading.Loaded, lines: Sequence[str], split: str | None) -> list[Example]:
  """Those of files of examples, or pages of a split; [] where text files are asked about."""
  if split:
    return pages.load(model.tokenizer, options.limit or _SOME_PAGES, split=split)[1]
  limit = 1 if options.question or options.interactive else options.limit
  return examples_of(lines, model.tokenizer, model.chat, limit) if lines else []


def examples_of(lines: Sequence[str], tokenizer, chat: bool, limit: int | None) -> list[Example]:
  """The first examples of files, see `tables.find_files`.

  Raises:
    ValueError: a line is malformed, or there is none.
  """
  found = list(itertools.islice(prompts.read_examples(lines, strict=True, chat=chat, tokenizer=tokenizer), limit))
  if not found:
    raise UserError(f'{", ".join(lines)}: no example')
  return found


def make_engine(options, model: loading.Loaded, compute, store) -> engine_lib.Engine:
  devices = jax.local_devices()
  if options.devices > len(devices):
    raise UserError(f'--devices {options.devices}: there are {len(devices)} here')
  blocks = model.blocks
  if options.shared_first is not None:
    blocks = dataclasses.replace(blocks, shared_first=options.shared_first)
  return engine_lib.Engine(model.params, model.cfg, compute, blocks, model.tokenizer, stop_ids=model.stop_ids,
                           device_tokens=options.device_tokens, store=store, devices=devices[:options.devices])


def _store(options) -> cache_lib.Store:
  return cache_lib.Store(int(options.memory_gib * _GIB), options.cache, int(options.cache_gib * _GIB),
                         'int8' if options.int8 else 'none')


def _arguments(argv):
  parser = arguments.Parser(prog='python -m tools.generate', description=__doc__)
  parser.add_argument('model', help='Hugging Face folder, hub name, or work directory')
  parser.add_argument('files', nargs='+', help='text files; or JSON lines, parquet or Arrow files; or pages')
  parser.add_argument('--question', help='what to ask; without it questions are read from standard input')
  parser.add_argument('--interactive', action='store_true', help='ask about the blocks of the first JSON line')
  parser.add_argument('--limit', type=arguments.positive, help='most questions of JSON lines (default: all)')
  parser.add_argument('--segmenter', help=f'cuts text files: a folder, a hub name, or {cutter.EMBEDDED}')
  parser.add_argument('--target-tokens', type=arguments.positive,
                      help="length of its blocks in the model's tokens (default: what it finds)")
  arguments.add_prompts(parser)
  parser.add_argument('--shared-first', action=argparse.BooleanOptionalAction, help='the first block is a prefix that all '
                      'blocks read (default: as in training); needs local positions')
  parser.add_argument('--seam', type=int, help='first tokens of every block that are read again behind the blocks before it '
                      '(default: as in training)')
  parser.add_argument('--stop', action='append', default=[], help='text that ends an answer; may be given again')
  parser.add_argument('--top-k', type=int, default=0, help='of so many tokens only (default: all)')
  parser.add_argument('--seed', type=int, default=0, help='of what is drawn')
  parser.add_argument('--cache', help='folder that keeps the states of blocks')
  parser.add_argument('--int8', action='store_true', help='keep states in 8 bits beside the device')
  arguments.add_numbers(
      parser, max_new=(256, 'most tokens of an answer'), temperature=(0.0, '0: the most probable token'),
      top_p=(1.0, 'of this probability together'), cache_gib=(64.0, 'bound of the folder of --cache'),
      memory_gib=(4.0, 'bound of states in host memory'), device_tokens=(32768, 'room for states on the devices'),
      devices=(1, 'that share the context'))
  arguments.add_computing(parser)
  return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
  options = _arguments(argv)
  sys.stdin.reconfigure(errors='surrogateescape')   # a line that is no UTF-8 ends nothing: `asked` says so
  return arguments.run('generate', lambda: run(options, sys.stdin, arguments.console(stderr=True)))


if __name__ == '__main__':
  sys.exit(main())
