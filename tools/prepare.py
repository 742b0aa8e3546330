"""Reads, checks and encodes files of examples, and says what a training run would see.

  python -m tools.prepare train/*.jsonl.gz --config configs/distill.py:model=qwen3_4b,ctx=32768
  python -m tools.prepare train/*.jsonl.gz --tokenizer Qwen3-4B --length 32768 --cache ~/.cache/blockattn

Prints a table with a line per file and the malformed lines. Encoded documents stay in the config's cache, or in --cache: a
run with the same files, tokenizer, length and options starts in seconds. The exit code is 0; 1 with --strict at the first
malformed line; 2 if a file, the tokenizer or an option must be mended, or no document is left.
"""

import contextlib
import dataclasses
import os
import sys
import tempfile
import time
from collections.abc import Sequence

import numpy as np
import rich.progress

from blockattn.data import encode, json_lines, packing
from blockattn.data.store import open_store
from blockattn.errors import UserError
from blockattn.train import command, inputs, job
from tools import arguments

_COLUMNS = ('file', 'lines', 'examples', 'bad', 'too long', 'cut', 'docs', 'tokens', 'tokens/s', 'rows', 'padding')


def read_data(args, more: Sequence[str]) -> tuple[inputs.PromptData, str]:
  """(the data of the training, as the command line says; the folder or name of its model).

  Raises:
    ValueError: an unknown key; no files, tokenizer or length.
  """
  data, source = inputs.PromptData(), ''
  if args.config:
    options = job.options_of(command.read_config([f'--config={args.config}', *more])[0])
    data, source = options.data, options.model.source
    if not isinstance(data, inputs.PromptData):
      raise UserError(f'--config {args.config}: this training reads no prompts')
  given = {'files': tuple(args.files), 'tokenizer': args.tokenizer, 'length': args.length, 'strict': args.strict,
           'cache': args.cache}
  data = dataclasses.replace(data, **{name: value for name, value in given.items() if value})
  missing = {'files': not data.files, '--tokenizer': not (data.tokenizer or source),
             '--length': not (args.config or args.length)}
  if any(missing.values()):
    raise UserError(f'give {", ".join(name for name, lacks in missing.items() if lacks)}, or a --config that says so')
  return data, source


def prepare_files(files, tokenizer, options, cache, *, strict, console, cutter=None):
  """Encodes the files behind a progress bar: a list of (file, DocStore, seconds)."""
  encoder = encode.Encoder(tokenizer, bos=options.bos)
  columns = (*rich.progress.Progress.get_default_columns(), rich.progress.DownloadColumn())
  with rich.progress.Progress(*columns, console=console, transient=True) as bar:
    whole = bar.add_task('all files', total=sum(map(os.path.getsize, files)))
    prepared, done = [], 0
    for file in files:
      start = time.perf_counter()
      bar.update(whole, description=os.path.basename(file))
      progress = lambda _, read, done=done: bar.update(whole, completed=done + read)
      store = open_store(file, tokenizer, encoder, options, cache, strict=strict, progress=progress, cutter=cutter)
      prepared.append((file, store, time.perf_counter() - start))
      done += os.path.getsize(file)
      bar.update(whole, completed=done)
  return prepared


def _row(name, report, sizes, counts, seconds, options):
  rows = packing.plan_rows(sizes, counts, length=options.length, max_blocks=options.max_blocks, window=options.window)
  tokens = int(sizes.sum())
  rate = f'{tokens / seconds:,.0f}' if seconds else 'cached'
  numbers = (report.lines, report.examples, report.bad.total(), report.dropped.total(), report.cut, len(sizes), tokens)
  padding = f'{packing.padding_share(sizes, rows, options.length):.1%}' if rows else '-'
  return (name, *(f'{n:,}' for n in numbers), rate, f'{len(rows):,}', padding)


def make_table(prepared, options):
  """The table, a line per file and one for all of them packed together."""
  table = arguments.table(*_COLUMNS)
  for file, store, seconds in prepared:
    table.add_row(*_row(os.path.basename(file), store.report, store.sizes, store.counts, store.built and seconds,
                        options))
  report = sum((store.report for _, store, _ in prepared), json_lines.Report())
  sizes, counts = (np.concatenate([getattr(store, name) for _, store, _ in prepared]) for name in ('sizes', 'counts'))
  built = all(store.built for _, store, _ in prepared)
  table.add_section()
  table.add_row(*_row('all', report, sizes, counts, built and sum(seconds for *_, seconds in prepared), options))
  return table, report


def run(args, more) -> int:
  out, err = arguments.console(), arguments.console(stderr=True)
  data, model = read_data(args, more)
  files = json_lines.find_files(list(data.files))
  tokenizer = inputs.load_tokenizer(data, model)
  options, cutter = inputs.file_options(data, tokenizer), inputs.load_cutter(data, tokenizer)
  with contextlib.ExitStack() as stack:
    kept = args.config or args.cache
    cache = data.cache if kept else stack.enter_context(tempfile.TemporaryDirectory(prefix='prepare-'))
    prepared = prepare_files(files, tokenizer, options, os.path.expanduser(cache), strict=data.strict, console=err,
                             cutter=cutter)
    table, report = make_table(prepared, options)
    out.print(table)
    out.print(report.summary())
  if not report.docs:
    raise UserError(f'not one document to train on in {report.lines:,} lines of {", ".join(files)}')
  return 0


def main(argv=None) -> int:
  parser = arguments.Parser(prog='python -m tools.prepare', description=__doc__)
  parser.add_argument('files', nargs='*', help='.jsonl or .jsonl.gz files, folders, globs (default: config.data.files)')
  parser.add_argument('--config', metavar='FILE[:ARG]', help='the config of the training: gives all that is not given here; '
                      '--config.data.KEY=VALUE changes it')
  parser.add_argument('--tokenizer', help='a local folder, or a name on the hub')
  parser.add_argument('--length', type=arguments.positive, help='tokens of a row')
  parser.add_argument('--strict', action='store_true', help='stop at the first malformed line')
  parser.add_argument('--cache', help='folder that keeps the encoded documents (default: that of the config; without one '
                      'none is kept)')
  args, more = parser.parse_known_args(argv)
  if any(not arg.startswith('--config.') for arg in more) or (more and not args.config):
    parser.error(f'unrecognized arguments: {" ".join(more)}')
  return arguments.run('prepare', lambda: run(args, more))


if __name__ == '__main__':
  sys.exit(main())
