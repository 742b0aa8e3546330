"""How far a student is from its teacher, on questions with answers: in block and in full attention.

  python -m tools.evaluate exported/qwen3_4b --teacher Qwen/Qwen3-4B --data test.jsonl --out runs/eval
  python -m tools.evaluate runs/tiny --teacher blockattn/assets/tiny_teacher --data pages --limit 200

MODEL and TEACHER are folders in the Hugging Face format, hub names, or work directories of a trainer (the newest
checkpoint). Sinks and positions of block mode are those that the model was trained with: `blocks` in its blockattn.json
or in its checkpoint; a model without runs in block mode without sinks, at sequential positions. The teacher reads in
full attention. Prompts are made as in training, with the chat template or without. --data takes JSON lines in the forms of
blockattn.data.prompts, or `pages`: pages about classes of Python's standard library that no training of this project sees;
`pages:validation` are those that settings may be chosen by.

Prints exact match, substring and token F1 of greedy answers, cross-entropy and KL to the teacher on the answer's tokens
(in nats), each with its interval from resampled documents, and the latter two by distance from the start of the block.
Beside the student in block mode stand the teacher's weights under the same block mask, without sinks: what blocks cost
before any training, and how much of it the student makes good.

--out keeps the figures of every document in DIR/documents.jsonl as they come, with all answers; starting the same command
again goes on. DIR/summary.json has the means; tools.report turns DIR into a page. The model has to fit on one device.
The exit code is 0; 1 with --strict at the first malformed line; 2 if models, data or options are refused; 130 if it was
stopped.
"""

import argparse
import itertools
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Sequence

import jax
import rich.console
import rich.table

from blockattn import disk, metrics
from blockattn.data import encode, json_lines, prompts
from blockattn.errors import UserError
from blockattn.evals import answers, gap
from blockattn.evals.gap import BEFORE, STUDENT, TEACHER
from blockattn.inference import cache as cache_lib
from blockattn.kernels import api
from blockattn.models import transformer
from blockattn.train import inputs
from tools import arguments, compare, report as report_page

PAGES = {'pages': 'test', 'pages:validation': 'validation'}   # --data -> split of blockattn.data.stdlib
PAGE_STOP = '\n'   # a page may ask several questions, one after the other
COLUMNS = {'exact_match': '{:.1%}', 'substring': '{:.1%}', 'f1': '{:.1%}', 'ce': '{:.4f}', 'kl': '{:.4f}', 'n': '{}'}
_PAGES_BY_DEFAULT = 200


def add_prompt_arguments(parser):
  """--chat and --template-args, the same in all commands that ask a model."""
  parser.add_argument('--chat', action=argparse.BooleanOptionalAction, help="the tokenizer's chat template around prompts "
                      '(default: as in the training of the model; of other models, if the tokenizer has one)')
  parser.add_argument('--template-args', metavar='NAME=VALUE,...', help='of the chat template, such as enable_thinking=true '
                      '(default: as in training; enable_thinking=false where the template knows it)')


def file_docs(files: Sequence[str], tokenizer, *, chat: bool = False, strict: bool = False, limit: int | None = None):
  """(documents, their examples, json_lines.Report of the lines) of JSON lines files; at most `limit` examples are read.

  Raises:
    json_lines.BadLineError: `strict`, and a line is malformed.
    ValueError: not one example is left.
  """
  report = json_lines.Report()
  lines = prompts.read_examples(files, report=report, strict=strict, chat=chat, tokenizer=tokenizer)
  examples = list(itertools.islice(lines, limit))
  if not examples:
    raise UserError(f'{", ".join(map(str, files))}: no example to evaluate\n{report.summary()}')
  docs = [encode.fit(parts)[0] for parts in encode.Encoder(tokenizer).parts(examples)]
  report.docs = len(docs)
  return docs, examples, report


def page_docs(tokenizer, limit: int, *, split: str = 'test', data: inputs.PromptData | None = None):
  """(documents, examples) of `limit` held-out pages with the library's own names, one question each.

  The pages of numbers 0, 1, ... depend on the style in `data` alone: by default that of a config.
  """
  source = inputs.page_rows(data or inputs.PromptData(), tokenizer, split=split,
                       own_blocks=True, renamed=0.0, questions=(1, 1), seed=1)
  return source.pages(range(limit)), [source.example(i) for i in range(limit)]


def weights_key(subject: gap.Subject) -> str:
  """Tells parameters, architecture and dtype of activations apart."""
  return cache_lib.keys_of(subject.params, subject.cfg, subject.compute.dtype).model.decode()[:32]


def evaluate_all(subjects: dict[str, gap.Subject], teacher: gap.Subject, docs, examples, tokenizer, *, batch: int,
                 max_new: int, stop: str | None = None, out: str | os.PathLike | None = None,
                 facts: dict | None = None, stream=None) -> dict:
  """Evaluates every subject.

  Args:
    subjects, teacher, docs, examples, tokenizer, batch, max_new, stop: as for gap.measure.
    out: folder, made if absent: what gap.measure leaves there, summary.json, and examples.jsonl for tools.report.
    facts: more keys of the summary, numbers or strings.
    stream: of the progress line; None: standard output.

  Returns:
    What gap.summarize returns, 'closed': gap.share_closed of the student in block mode, 'seconds': {'evaluate': seconds, of
    this start}, and the facts: what summary.json holds.
  """
  start = time.perf_counter()
  what = lambda s: {'weights': weights_key(s), 'impl': s.compute.impl, 'sink_ids': s.options.sink_ids,
                    'positions': s.options.positions, 'shared_first': s.options.shared_first}
  decides = {'tokenizer': encode.Encoder(tokenizer).fingerprint, 'models': {name: what(s) for name, s in subjects.items()}}
  with metrics.counting('evaluating', stream=stream) as progress:
    rows = gap.measure(subjects, teacher, docs, examples, tokenizer, batch=batch, max_new=max_new, stop=stop, out=out,
                       facts=decides, progress=progress)
  summary = gap.summarize(rows)
  if {BEFORE, STUDENT} <= set(subjects):
    summary['closed'] = gap.share_closed(rows, TEACHER, BEFORE, STUDENT)
  summary |= {'seconds': {'evaluate': round(time.perf_counter() - start, 3)}} | (facts or {})
  if out is not None:
    metrics.write_json(pathlib.Path(out) / 'summary.json', summary)
    write_examples(pathlib.Path(out), examples, rows)
  return summary


def write_examples(folder: pathlib.Path, examples, rows) -> None:
  """examples.jsonl for tools.report: the first documents, with every subject's answer."""
  shown = [{'blocks': list(example.blocks), 'prompt': example.prompt, 'response': example.response,
            'answers': {name: own['prediction'].strip() for name, own in row['models'].items()}}
           for example, row in zip(examples[:report_page.MAX_EXAMPLES], rows, strict=False)]
  disk.write_text(folder / 'examples.jsonl', ''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in shown))


def print_table(summary: dict, console: rich.console.Console | None = None):
  """Prints the figures of every subject of a summary with their intervals, what the student makes good, and
  cross-entropy and KL by distance."""
  console = console or compare.make_console()
  results = {name: value for name, value in summary.items() if isinstance(value, dict) and 'exact_match' in value}
  right = lambda name: rich.table.Column(name, justify='right')
  table = rich.table.Table('model', *(right(name.replace('_', ' ')) for name in COLUMNS))
  for name, result in results.items():
    table.add_row(name, *(_cell(form, result[column], result['intervals'].get(column)) for column, form in COLUMNS.items()))
  console.print(table)
  console.print(f'[{answers.LEVEL:.0%} interval of {answers.RESAMPLES:,} resamples of the documents]')
  for measure, share in summary.get('closed', {}).items():
    name = measure.replace('_', ' ')
    console.print(f'{name}: {STUDENT} makes good {compare.percent(share)} % of what blocks cost {TEACHER}')
  console.print(_distance_table(results, right))


def _cell(form, value, interval):
  shown = form.format(value)
  return shown if interval is None else f'{shown}\n[{form.format(interval["low"])}, {form.format(interval["high"])}]'


def _distance_table(results, right):
  """A row per distance, a column per subject: CE / KL."""
  table = rich.table.Table(right('tokens from\nblock start'), right('answer\ntokens'),
                           *(right(f'{name}\nCE / KL') for name in results))
  rows = {name: {row['from']: row for row in result['by_distance']} for name, result in results.items()}
  for low, some in sorted(next(iter(rows.values())).items()):
    cells = [by_distance[low] for by_distance in rows.values()]   # the same documents, hence the same distances
    table.add_row(f'{low}+', f'{some["tokens"]:,}', *(f'{cell["ce"]:.4f} / {cell["kl"]:.4f}' for cell in cells))
  return table


def _arguments(argv):
  parser = arguments.Parser(prog='python -m tools.evaluate', description=__doc__,
                            formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('model', help='the student: Hugging Face folder, hub name, or work directory')
  parser.add_argument('--teacher', required=True, help='the same of the teacher')
  parser.add_argument('--data', required=True, nargs='+', help=f'JSON lines: files, folders, globs; or {" or ".join(PAGES)}')
  parser.add_argument('--modes', default='full,block', help='of the student (default: %(default)s)')
  parser.add_argument('--limit', type=positive, help=f'most examples (default: all; of pages {_PAGES_BY_DEFAULT})')
  parser.add_argument('--batch', type=positive, default=8, help='documents at a time (default: %(default)s)')
  parser.add_argument('--max-new', type=positive, default=64, help='most tokens of an answer (default: %(default)s)')
  parser.add_argument('--stop', help='text that ends an answer beside the end-of-text token (default: none; of pages a '
                                     'line end)')
  add_prompt_arguments(parser)
  parser.add_argument('--strict', action='store_true', help='stop at the first malformed line')
  parser.add_argument('--dtype', choices=('float32', 'bfloat16'), default='float32', help='(default: %(default)s)')
  parser.add_argument('--impl', default='auto', help='of attention (default: %(default)s)')
  parser.add_argument('--out', help='folder for documents.jsonl, summary.json and examples.jsonl')
  return parser.parse_args(argv)


def positive(value):
  if not value.isdigit() or int(value) < 1:
    raise argparse.ArgumentTypeError(f'{value!r} is not a number from 1 on')
  return int(value)


def amount(value):
  """A number from 0 on that is one: neither NaN nor without end."""
  try:
    number = float(value)
  except ValueError:
    number = math.nan
  if not 0 <= number < math.inf:
    raise argparse.ArgumentTypeError(f'{value!r} is not a number from 0 on')
  return number


def run(options, console, err) -> dict:
  """The command, options as from the command line. Returns the summary."""
  modes = options.modes.split(',')
  if not set(modes) <= set(gap.MODES):
    raise UserError(f'--modes {options.modes}: choose from {", ".join(gap.MODES)}')
  split = PAGES.get(options.data[0]) if len(options.data) == 1 else None
  files = None if split else json_lines.find_files(options.data)   # before models are loaded
  attention = api.choose(options.impl, jax.devices()[0])
  err.print(str(attention))
  subjects, teacher, tokenizer = gap.load_pair(options.model, options.teacher, modes,
                                                        transformer.Compute(dtype=options.dtype, impl=attention.impl),
                                                        template_args=options.template_args, chat=options.chat)
  if files is None:
    docs, examples = page_docs(tokenizer, options.limit or _PAGES_BY_DEFAULT, split=split)
    report, stop = json_lines.Report(), options.stop or PAGE_STOP
  else:
    chat = next(subject.chat for name, subject in subjects.items() if name != TEACHER)
    docs, examples, report = file_docs(files, tokenizer, chat=chat, strict=options.strict, limit=options.limit)
    stop = options.stop
  facts = {'model': options.model, 'teacher': options.teacher, 'data': ' '.join(options.data), 'dtype': options.dtype,
           'impl': attention.impl, 'malformed_lines': report.bad.total()}
  summary = evaluate_all(subjects, teacher, docs, examples, tokenizer, batch=options.batch, max_new=options.max_new,
                         stop=stop, out=options.out, facts=facts, stream=err.file)
  print_table(summary, console)
  if report.bad:
    console.print(report.summary())
  return summary


def main(argv: list[str] | None = None) -> int:
  """The command line. Returns the exit status."""
  options = _arguments(argv)
  err = compare.make_console(stderr=True)
  try:
    run(options, compare.make_console(), err)
  except json_lines.BadLineError as error:
    err.print(str(error))
    return 1
  except (OSError, ValueError) as error:
    err.print(f'evaluate: {arguments.line_of(error)}')
    return 2
  except KeyboardInterrupt:
    err.print('evaluate: stopped; ' + (f'what is done stands in {options.out}, start the same command again to go on'
                                       if options.out else 'with --out DIR a second start goes on'))
    return 130
  return 0


if __name__ == '__main__':
  sys.exit(main())
