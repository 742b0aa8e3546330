"""How far a student is from its teacher, on questions with answers: in block and in full attention.

  python -m tools.evaluate exported/qwen3_4b --teacher Qwen/Qwen3-4B --data test.jsonl --out runs/eval
  python -m tools.evaluate runs/tiny --teacher blockattn/assets/tiny_teacher --data pages --limit 200

MODEL and TEACHER are folders in the Hugging Face format, hub names, or work directories of a trainer (the best checkpoint).
Sinks and positions of block mode are those that the model was trained with: `blocks` in its blockattn.json or in its
checkpoint; a model without runs in block mode without sinks, at sequential positions. The teacher reads in full attention.
Prompts are made as in training, with the chat template or without. --data takes JSON lines, parquet or Arrow files in the
forms of blockattn.data.prompts, or `pages`: pages about classes of Python's standard library that no training of this
project sees; `pages:validation` are those that settings may be chosen by.

Prints exact match, substring and token F1 of greedy answers, cross-entropy and KL to the teacher on the answer's tokens
(in nats), each with its interval from resampled documents, and the latter two by distance from the start of the block.
Beside the student in block mode stand the teacher's weights under the same block mask, without sinks: what blocks cost
before any training, and how much of it the student makes good. --seams 0,2,4 adds the student with seams of so many tokens
(blocks.BlockOptions.seam): the dial between time to the first token and quality. --rivals adds the teacher's weights, read
in ways of others that need no training (blockattn.evals.rivals). `recomputed` is the share of the context's tokens that is
computed again for every prompt, whatever is cached.

--out keeps the figures of every document in DIR/documents.jsonl as they come, with all answers; starting the same command
again goes on. DIR/summary.json has the means; tools.report turns DIR into a page. The model has to fit on one device.
The exit code is 0; 2 if models, data (with --strict its first malformed line) or options are refused; 130 if it was stopped.
"""

import itertools
import json
import os
import pathlib
import sys
import time
from collections.abc import Sequence

import rich.console

from blockattn import disk, metrics
from blockattn.data import encode, json_lines, prompts, tables
from blockattn.errors import UserError
from blockattn.evals import answers, gap, pages, rivals
from blockattn.evals.gap import BEFORE, STUDENT, TEACHER
from blockattn.inference import cache as cache_lib
from tools import arguments, charts, compare, report as report_page

COLUMNS = {'exact_match': '{:.1%}', 'substring': '{:.1%}', 'f1': '{:.1%}', 'ce': '{:.4f}', 'kl': '{:.4f}',
           'recomputed': '{:.1%}', 'n': '{}'}
_PAGES_BY_DEFAULT = 200


def file_docs(files: Sequence[str], tokenizer, *, chat: bool = False, strict: bool = False, limit: int | None = None):
  """(documents, their examples, json_lines.Report of the lines) of files; at most `limit` examples are read.

  Raises:
    json_lines.BadLineError: `strict`, and a line is malformed.
    ValueError: not one example is left.
  """
  report = json_lines.Report()
  lines = prompts.read_examples(files, report=report, strict=strict, chat=chat, tokenizer=tokenizer)
  examples = list(itertools.islice(lines, limit))
  if not examples:
    raise UserError(f'{", ".join(map(str, files))}: no example to evaluate\n{report.summary()}')
  docs = [encode.whole(parts) for parts in encode.Encoder(tokenizer).parts(examples)]
  report.docs = len(docs)
  return docs, examples, report


def weights_key(subject: gap.Subject) -> str:
  """Tells parameters, architecture and dtype of activations apart."""
  return cache_lib.keys_of(subject.params, subject.cfg, subject.compute.dtype).model.decode()[:32]


def facts_of(subjects: dict[str, gap.Subject], tokenizer) -> dict:
  """What of subjects and tokenizer decides figures: the facts of `gap.measure`."""
  shared = lambda s: (id(s.params), s.cfg, s.compute.dtype)
  keys = {which: weights_key(s) for which, s in {shared(s): s for s in subjects.values()}.items()}   # each model's once
  way = lambda s: {} if s.reading == gap.Reading() else {'reading': repr(s.reading)}
  what = lambda s: {'weights': keys[shared(s)], 'impl': s.compute.impl} | gap.block_facts(s.options) | way(s)
  return {'tokenizer': encode.Encoder(tokenizer).fingerprint, 'models': {name: what(s) for name, s in subjects.items()}}


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
    What gap.summarize returns, 'recomputed' of each subject, 'closed': gap.share_closed of the student in block mode,
    'seconds': {'evaluate': seconds, of this start}, and the facts: what summary.json holds.
  """
  start = time.perf_counter()
  with metrics.counting('evaluating', stream=stream) as progress:
    rows = gap.measure(subjects, teacher, docs, examples, tokenizer, batch=batch, max_new=max_new, stop=stop, out=out,
                       facts=facts_of(subjects, tokenizer), progress=progress)
  summary = gap.summarize(rows)
  for name, subject in subjects.items():
    summary[name]['recomputed'] = gap.recomputed(docs, subject)
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
  console = console or arguments.console()
  results = {name: value for name, value in summary.items() if isinstance(value, dict) and 'intervals' in value}
  table = arguments.table('model', *(name.replace('_', ' ') for name in COLUMNS))
  for name, result in results.items():
    table.add_row(name, *(_cell(form, result[column], result['intervals'].get(column)) for column, form in COLUMNS.items()))
  console.print(table)
  console.print(f'[{answers.LEVEL:.0%} interval of {answers.RESAMPLES:,} resamples of the documents]')
  for measure, share in summary.get('closed', {}).items():
    name = measure.replace('_', ' ')
    console.print(f'{name}: {STUDENT} makes good {compare.percent(share)} % of what blocks cost {TEACHER}')
  console.print(_distance_table(results))


def _cell(form, value, interval):
  shown = form.format(value)
  return shown if interval is None else f'{shown}\n[{form.format(interval["low"])}, {form.format(interval["high"])}]'


def _distance_table(results):
  """A row per distance, a column per subject: CE / KL."""
  names = (f'{name}\nCE / KL'.replace('_', '\n', 1) for name in results)   # or else long names are cut off
  table = arguments.table('tokens from\nblock start', 'answer\ntokens', *names, left=0)
  rows = {name: {row['from']: row for row in result['by_distance']} for name, result in results.items()}
  for low, some in sorted(next(iter(rows.values())).items()):
    cells = [by_distance[low] for by_distance in rows.values()]   # the same documents, hence the same distances
    table.add_row(f'{low}+', f'{some["tokens"]:,}', *(f'{cell["ce"]:.4f} / {cell["kl"]:.4f}' for cell in cells))
  return table


def _arguments(argv):
  parser = arguments.Parser(prog='python -m tools.evaluate', description=__doc__)
  parser.add_argument('model', help='the student: Hugging Face folder, hub name, or work directory')
  parser.add_argument('--teacher', required=True, help='the same of the teacher')
  parser.add_argument('--data', required=True, nargs='+',
                      help=f'JSON lines, parquet or Arrow files, folders, globs; or {" or ".join(pages.SPLITS)}')
  parser.add_argument('--modes', default='full,block', help='of the student')
  parser.add_argument('--seams', help='of the student in block mode, tokens of a seam: numbers with commas between them')
  parser.add_argument('--rivals', metavar='NAME:NUMBER...,...', help='ways to read the teacher in blocks without training, '
                      'such as epic:8,star,ape:0.9:0.9:4,cacheblend:0.15')
  parser.add_argument('--limit', type=arguments.positive, help=f'most examples (default: all; of pages {_PAGES_BY_DEFAULT})')
  arguments.add_numbers(parser, batch=(8, 'documents at a time'), max_new=(64, 'most tokens of an answer'))
  parser.add_argument('--stop', help='text that ends an answer beside the end-of-text token (default: none; of pages a '
                                     'line end)')
  arguments.add_prompts(parser)
  parser.add_argument('--strict', action='store_true', help='stop at the first malformed line')
  arguments.add_computing(parser)
  parser.add_argument('--out', help='folder for documents.jsonl, summary.json and examples.jsonl')
  parser.add_argument('--plot', type=pathlib.Path, help='SVG file: KL over the share of the context that is computed again')
  return parser.parse_args(argv)


def _seams(text):
  parts = text.split(',') if text else []
  if not all(part.isdecimal() for part in parts):
    raise UserError(f'--seams {text}: give numbers of tokens with commas between them, such as 0,2,4')
  return list(dict.fromkeys(map(int, parts)))


def run(options) -> None:
  console, err = arguments.console(), arguments.console(stderr=True)
  modes = options.modes.split(',')
  if not set(modes) <= set(gap.MODES):
    raise UserError(f'--modes {options.modes}: choose from {", ".join(gap.MODES)}')
  seams, others = _seams(options.seams), rivals.parse(options.rivals) if options.rivals else {}
  split = pages.SPLITS.get(options.data[0]) if len(options.data) == 1 else None
  files = None if split else tables.find_files(options.data)   # before models are loaded
  compute = arguments.compute_of(options, err)
  subjects, teacher, tokenizer = gap.load_pair(options.model, options.teacher, modes, compute,
                                             seams=seams, template_args=options.template_args, chat=options.chat)
  subjects |= rivals.subjects(others, teacher, tokenizer)
  if files is None:
    docs, examples = pages.load(tokenizer, options.limit or _PAGES_BY_DEFAULT, split=split)
    report, stop = json_lines.Report(), options.stop or pages.STOP
  else:
    chat = next(subject.chat for name, subject in subjects.items() if name != TEACHER)
    docs, examples, report = file_docs(files, tokenizer, chat=chat, strict=options.strict, limit=options.limit)
    stop = options.stop
  facts = {'model': options.model, 'teacher': options.teacher, 'data': ' '.join(options.data), 'dtype': options.dtype,
           'impl': compute.impl, 'malformed_lines': report.bad.total()}
  summary = evaluate_all(subjects, teacher, docs, examples, tokenizer, batch=options.batch, max_new=options.max_new,
                         stop=stop, out=options.out, facts=facts, stream=err.file)
  print_table(summary, console)
  if options.plot:
    points = {name: (summary[name]['recomputed'], summary[name]['kl']) for name in subjects}
    charts.write(options.plot, charts.tradeoff(points, charts.AGAIN, 'KL to the teacher, nats'))
  if report.bad:
    console.print(report.summary())


def main(argv: list[str] | None = None) -> int:
  options = _arguments(argv)
  return arguments.run('evaluate', lambda: run(options), stopped=(
      f'what is done stands in {options.out}, start the same command again to go on' if options.out
      else 'with --out DIR a second start goes on'))


if __name__ == '__main__':
  sys.exit(main())
