"""Reads, checks and encodes files of examples, and says what a training run would see.

  python -m tools.prepare train/*.jsonl.gz --config configs/distill.py:model=qwen3_4b,ctx=32768
  python -m tools.prepare train/*.parquet --tokenizer Qwen3-4B --length 32768

Prints a table with a line per file, the malformed lines, how long documents, blocks and answers are, and the first document
as the model reads it. Nothing is kept: a training encodes while it runs. The exit code is 0; 2 if a file, with --strict its
first malformed line, the tokenizer or an option must be mended, or no document is left.
"""

import concurrent.futures
import dataclasses
import functools
import os
import sys
import time
from collections.abc import Sequence

import numpy as np
import rich.progress
import rich.table
import rich.text

from blockattn.data import encode, json_lines, packing, stream
from blockattn.errors import UserError
from blockattn.train import command, inputs, job
from tools import arguments

_COLUMNS = ('file', 'lines', 'examples', 'bad', 'left out', 'cut', 'docs', 'tokens', 'tokens/s', 'rows', 'padding')
_PERCENTILES = (5, 50, 95, 99, 100)
_SHOWN = 400   # characters of a block of the example


@dataclasses.dataclass(frozen=True)
class Read:
  """What has been read of a table.

  Attributes:
    report: of its lines.
    sizes, counts, answers: tokens, blocks and answer tokens of each document.
    blocks: tokens of each context block.
    continued: how many context blocks of each document go on with the one before.
    first: its first document; None: there is none.
    seconds: that it took.
  """
  report: json_lines.Report
  sizes: np.ndarray
  counts: np.ndarray
  answers: np.ndarray
  blocks: np.ndarray
  continued: np.ndarray
  first: encode.EncodedDoc | None
  seconds: float = 0.0


def joined(reads: Sequence[Read], seconds: float) -> Read:
  """Several, in order."""
  arrays = {name: np.concatenate([np.zeros(0, np.int32), *(getattr(read, name) for read in reads)])
            for name in ('sizes', 'counts', 'answers', 'blocks', 'continued')}
  return Read(sum((read.report for read in reads), json_lines.Report()), **arrays, seconds=seconds,
              first=next((read.first for read in reads if read.first), None))


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
  given = {'files': tuple(args.files), 'tokenizer': args.tokenizer, 'length': args.length, 'strict': args.strict}
  data = dataclasses.replace(data, **{name: value for name, value in given.items() if value})
  missing = {'files': not data.files, '--tokenizer': not (data.tokenizer or source),
             '--length': not (args.config or args.length)}
  if any(missing.values()):
    raise UserError(f'give {", ".join(name for name, lacks in missing.items() if lacks)}, or a --config that says so')
  return data, source


def read_piece(source, piece: int) -> Read:
  """What a piece of a `sources.FileRows` holds."""
  report = json_lines.Report()
  docs = [doc for _, doc in source.examples(piece, report, quiet=True)]
  ints = lambda values: np.fromiter(values, np.int32)
  return Read(report, ints(len(doc.tokens) for doc in docs), ints(len(doc.lengths) for doc in docs),
              ints(doc.answer[1] - doc.answer[0] for doc in docs), ints(n for doc in docs for n in doc.lengths[:-1]),
              ints(sum(doc.continued[:-1]) for doc in docs), docs[0] if docs else None)


def read_all(source, workers: int, console) -> list[tuple[str, Read]]:
  """Reads the tables of a source or mixture behind a progress bar: [(name of a table, what it holds)]."""
  found, parts = [], stream.parts_of(source)
  columns = (*rich.progress.Progress.get_default_columns(), rich.progress.DownloadColumn())
  with rich.progress.Progress(*columns, console=console, transient=True) as bar:
    task = bar.add_task('all files', total=sum(table.bytes for part in parts for table, _ in part.tables))
    for part in parts:
      first = 0
      for table, full in part.tables:
        name, reads, shown, start = table.name + ' (full)' * full, [], False, time.perf_counter()
        bar.update(task, description=os.path.basename(name))
        for read in _ahead(functools.partial(read_piece, part), range(first, first + table.pieces), workers):
          reads.append(dataclasses.replace(read, first=None) if shown else read)   # one document is enough to keep
          shown = shown or read.first is not None
          bar.advance(task, table.bytes / table.pieces)
        first += table.pieces
        found.append((name, joined(reads, time.perf_counter() - start)))
  return found


def _ahead(function, numbers, workers):
  """`map` in threads."""
  pool = concurrent.futures.ThreadPoolExecutor(workers)
  try:
    yield from pool.map(function, numbers)
  finally:
    pool.shutdown(cancel_futures=True)


def _row(name, read, options):
  rows = packing.plan_rows(read.sizes, read.counts, length=options.length, max_blocks=options.max_blocks)
  tokens, report = int(read.sizes.sum()), read.report
  numbers = (report.lines, report.examples, report.bad.total(), report.dropped.total(), report.cut, len(read.sizes), tokens,
             int(tokens / max(read.seconds, 1e-9)), len(rows))
  padding = f'{packing.padding_share(read.sizes, rows, options.length):.1%}' if rows else '-'
  return (name, *(f'{n:,}' for n in numbers), padding)


def make_table(found: Sequence[tuple[str, Read]], together: Read, options) -> rich.table.Table:
  """A line per table and one for all of them packed together."""
  table = arguments.table(*_COLUMNS)
  for name, read in found:
    table.add_row(*_row(os.path.basename(name), read, options))
  table.add_section()
  table.add_row(*_row('all', together, options))
  return table


def make_percentiles(read: Read) -> rich.table.Table:
  """How long things are."""
  table = rich.table.Table('', *(rich.table.Column('max' if p == 100 else f'p{p}', justify='right') for p in _PERCENTILES))
  for name, values in (('blocks of a document', read.counts), ('of these go on with another', read.continued),
                       ('tokens of a document', read.sizes), ('tokens of a context block', read.blocks),
                       ('tokens of an answer', read.answers)):
    if len(values):
      table.add_row(name, *(f'{int(x):,}' for x in np.percentile(values, _PERCENTILES, method='higher')))
  return table


def render(doc: encode.EncodedDoc, tokenizer) -> rich.text.Text:
  """A document block by block, its special tokens in colour, what has a loss between ⟦ and ⟧."""
  shown, start = rich.text.Text(), 0
  pieces = lambda a, b: [tokenizer.decode([int(i)]) if int(i) in special else int(i) for i in doc.tokens[a:b]]
  special = set(tokenizer.all_special_ids)
  for number, size in enumerate(doc.lengths):
    last = number == len(doc.lengths) - 1
    goes_on = not last and any(doc.continued[number:number + 1])
    shown.append(f'── block {number}, {size} tokens' + ', goes on with the one before' * goes_on
                 + ', reads all before it' * last + ' ──\n', 'dim')
    answer = doc.answer[0] if last else start + size
    _append(shown, pieces(start, answer), tokenizer, '')
    if last:
      shown.append('⟦', 'bold green')
      _append(shown, pieces(answer, doc.answer[1]), tokenizer, 'green')
      shown.append('⟧', 'bold green')
      _append(shown, pieces(doc.answer[1], start + size), tokenizer, '')
    shown.append('\n')
    start += size
  return shown


def _append(shown, pieces, tokenizer, style):
  """Runs of ordinary tokens as text, the middle of long ones left out, and special ones as they are called."""
  run = []
  for piece in [*pieces, '']:
    if isinstance(piece, int):
      run.append(piece)
      continue
    text, run = tokenizer.decode(run) if run else '', []
    shown.append(text if len(text) <= _SHOWN else f'{text[:_SHOWN // 2]} … {text[-_SHOWN // 2:]}', style)
    shown.append(piece, 'bold magenta')


def _print_problems(report, console):
  for title, counter, of in (('malformed lines', report.bad, report.lines),
                             ('examples left out', report.dropped, report.examples)):
    if counter:
      reasons = ', '.join(f'{n} {reason}' for reason, n in counter.most_common())
      console.print(f'{title}: {reasons} ({counter.total() / of:.1%})')
  for line in report.malformed():
    console.print(f'  {line}')


def run(args, more) -> int:
  out, err = arguments.console(), arguments.console(stderr=True)
  data, model = read_data(args, more)
  tokenizer = inputs.load_tokenizer(data, model)
  source = inputs.file_rows(data, tokenizer)
  found = read_all(source, 1 if data.segmenter else data.workers, err)
  read = joined([own for _, own in found], sum(own.seconds for _, own in found))
  out.print(make_table(found, read, inputs.file_options(data, tokenizer)))
  _print_problems(read.report, out)
  if not read.report.docs:
    raise UserError(f'not one document to train on in {read.report.lines:,} lines of '
                    f'{", ".join(name for name, _ in found)}')
  out.print(make_percentiles(read))
  out.print('The first document, with a loss between ⟦ and ⟧ (more of it by options of the trainer):')
  out.print(render(read.first, tokenizer))
  return 0


def main(argv=None) -> int:
  parser = arguments.Parser(prog='python -m tools.prepare', description=__doc__)
  parser.add_argument('files', nargs='*', help='JSON lines, parquet or Arrow files, folders, globs; folders of '
                      'save_to_disk; hub:OWNER/NAME (default: config.data.files)')
  parser.add_argument('--config', metavar='FILE[:ARG]', help='the config of the training: gives all that is not given here; '
                      '--config.data.KEY=VALUE changes it')
  parser.add_argument('--tokenizer', help='a local folder, or a name on the hub')
  parser.add_argument('--length', type=arguments.positive, help='tokens of a row')
  parser.add_argument('--strict', action='store_true', help='stop at the first malformed line')
  given = sys.argv[1:] if argv is None else argv
  more = [arg for arg in given if arg.startswith('--config.')]   # to argparse one with a space in its value is a file
  args = parser.parse_args([arg for arg in given if arg not in more])
  if more and not args.config:
    parser.error(f'unrecognized arguments: {" ".join(more)}')
  return arguments.run('prepare', lambda: run(args, more))


if __name__ == '__main__':
  sys.exit(main())
