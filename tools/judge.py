"""How good a model's answers are on a benchmark: over blocks, with full attention, or both side by side.

  python -m tools.judge longbench runs/qwen3 --data THUDM/LongBench --mode both --out runs/longbench
  python -m tools.judge locomo exported/qwen3_4b --data locomo10.json --out runs/locomo --limit 50
  python -m tools.judge qa blockattn/assets/tiny_teacher --data test.jsonl --mode full --out runs/qa

MODEL is a folder in the Hugging Face format, a hub name, or a trainer's work directory. Sinks and positions of block mode
are those that it was trained with; in full mode a prompt is one block. Answers are greedy. --out gets a folder per mode
with predictions.jsonl and summary.json; starting the same command again answers what is missing, --limit and --tasks may
differ then. tools.compare sets two such folders side by side.

The model has to fit on one device. The exit code is 0; 2 if model, data or options are refused (data at a malformed line of
a benchmark's, of any with --strict); 130 if it was stopped.
"""

import argparse
import dataclasses
import functools
import pathlib
import sys
from collections.abc import Callable, Sequence

import rich.console

from blockattn import metrics
from blockattn.data import encode, tables
from blockattn.evals import answers, gap, locomo, longbench, qa
from blockattn.hf import files
from blockattn.inference import cache as cache_lib, engine as engine_lib, plan, pool
from blockattn.segmentation import cutter
from tools import arguments, compare, evaluate
from tools.generate import cutting

MODES = (*gap.MODES, 'both')
_DEVICE_TOKENS = 32768   # of block states, at first
_LENGTH_SPARED = 8       # this part of the positions is left to sinks and chat template where a prompt is truncated
_QA_MAX_NEW = 64


# Answers.


def answerer(subject: gap.Subject, tokenizer, *, batch: int, store: cache_lib.Store | None = None) -> answers.Answer:
  """Greedy answers of a model in its mode, over cached blocks.

  Room in device memory starts at _DEVICE_TOKENS tokens and doubles when a prompt needs more.
  """
  options = subject.options if subject.mode == 'block' else dataclasses.replace(subject.options.bare, shared_first=False)
  make = functools.partial(engine_lib.Engine, subject.params, subject.cfg, subject.compute, options, tokenizer,
                           stop_ids=files.stop_ids(tokenizer.name_or_path, tokenizer.eos_token_id), store=store,
                           batch=batch)
  room, engine = _DEVICE_TOKENS, None

  def answer(prompts, *, max_new, stop):
    nonlocal room, engine
    if subject.mode == 'full':
      prompts = [[[token for tokens in prompt for token in tokens]] for prompt in prompts]
    need = max(_room_for(prompt, options) for prompt in prompts)
    if engine is None or need > room:
      while room < need:
        room *= 2
      engine = None   # its memory goes before other is taken
      engine = make(device_tokens=room)
    requests = [plan.Request(prompt, max_new=max_new, stop=stop) for prompt in prompts]
    return [made.text for made in engine.generate(requests)]

  return answer


def _room_for(prompt, options):
  """Tokens of device memory that a prompt's context takes at most, whole pages that nobody else uses included."""
  return sum(pool.padded(len(tokens) + options.most_placed) for tokens in prompt[:-1])


# Items.


@dataclasses.dataclass(frozen=True)
class Benchmark:
  """What a benchmark needs from the runner.

  Attributes:
    items: the questions.
    score, averages: see `answers.run`.
    note: lines to print at the end, such as malformed lines; ''.
  """
  items: Sequence[answers.Item]
  score: Callable[[answers.Item, str], dict[str, float]]
  averages: answers.Averages | None = None
  note: str = ''


def load_longbench(options, tokenizer, subject, records) -> Benchmark:
  cut = None if options.segmenter == 'none' else cutting(options.segmenter, options.target_tokens, tokenizer)
  lengths, positions = longbench.load_prompts()[1], subject.cfg.max_positions
  items = []
  for task, own in records.items():
    room = positions - positions // _LENGTH_SPARED - lengths[task.removesuffix(longbench.EVEN)]
    items += longbench.make_items(task, own, tokenizer, cut=cut, chat=options.chat,
                                  max_length=options.max_length or max(2, room))
  return Benchmark(items, longbench.score, longbench.averages(list(records)))


def load_locomo(options, tokenizer, subject, conversations) -> Benchmark:
  encoder = encode.Encoder(tokenizer)

  @functools.lru_cache(maxsize=4096)   # all questions about a conversation share its sessions
  def count(text, ranges):
    return len(encoder.texts([text], [ranges])[0])

  def fits(example):
    texts = example.texts[:-1]
    lengths = [count(*of) for of in zip(texts, example.template[:-1] or [()] * len(texts))]
    lengths[0] += encoder.bos is not None
    lengths = [n for n in lengths if n]
    return _fits(subject, options.max_length, locomo.MAX_NEW, lengths)

  items = locomo.make_items(conversations, tokenizer, chat=options.chat, tasks=options.tasks, limit=options.limit, fits=fits)
  shorter = sum(item.facts['sessions_left_out'] > 0 for item in items)
  note = f'{shorter} of {len(items)} prompts lack the last sessions, which did not fit' if shorter else ''
  score = functools.partial(locomo.score, letters=options.letters)
  return Benchmark(items, score, locomo.averages(), note)


def load_qa(options, tokenizer, subject, files) -> Benchmark:
  stop = tuple(options.stop) if options.stop is not None else () if options.chat else qa.STOP
  items, report = qa.read_items(files, tokenizer, chat=options.chat, max_new=options.max_new, stop=stop,
                                tasks=options.tasks, limit=options.limit, strict=options.strict)
  report.docs = report.examples
  return Benchmark(items, qa.score, note=report.summary() if report.bad else '')


def _fits(subject, max_length, max_new, lengths):
  """Whether a prompt is no longer than asked for, and its positions, sinks and answer included, are the model's.

  The same in both modes, so that they answer the same items.
  """
  tokens, added = sum(lengths), subject.options.most_positions(len(lengths))
  return tokens <= (max_length or tokens) and tokens + added + max_new <= subject.cfg.max_positions


# What is read before the model is.


def _longbench_records(options):
  tasks = options.tasks or list(longbench.TASKS)
  return {task: longbench.read_records(options.data[0], task, options.limit) for task in tasks}


SOURCES = {   # benchmark -> (reads data, makes items of it)
    'longbench': (_longbench_records, load_longbench),
    'locomo': (lambda options: locomo.read_conversations(options.data[0]), load_locomo),
    'qa': (lambda options: tables.find_files(options.data), load_qa),
}


# The command.


def run(options, make_answerer=answerer) -> None:
  console, err = arguments.console(), arguments.console(stderr=True)
  read, load = SOURCES[options.benchmark]
  data = read(options)
  compute = arguments.compute_of(options, err)
  modes = gap.MODES if options.mode == 'both' else (options.mode,)
  subject, tokenizer = gap.load(options.model, modes[0], compute, options.template_args, options.chat)
  chat = subject.chat
  options = argparse.Namespace(**vars(options) | {'chat': chat})
  benchmark = load(options, tokenizer, subject, data)
  encoder = encode.Encoder(tokenizer)
  longest = None if options.benchmark == 'longbench' else options.max_length   # longbench: before the chat template
  fits = lambda item, lengths: _fits(subject, longest, item.max_new, lengths)
  weights = evaluate.weights_key(subject)
  for mode in modes:
    judged = dataclasses.replace(subject, mode=mode)
    store = cache_lib.Store(folder=options.cache, quantize=options.quantize)
    with store, metrics.counting(mode, stream=err.file) as progress:
      summary = answers.run(
          benchmark.items, prompt=encoder.prompt, answer=make_answerer(
              judged, tokenizer, batch=options.batch, store=store if options.cache or options.quantize != 'none' else None),
          score=benchmark.score, out=pathlib.Path(options.out) / mode,
          facts=_facts(options, judged, weights, encoder.fingerprint),
          more={'name': options.model, 'data': ' '.join(options.data), 'chat': chat}, batch=options.batch,
          averages=benchmark.averages, fits=fits, progress=progress)
    console.print(f'{options.benchmark}, {mode}')
    print_summary(summary, console)
  if len(modes) > 1:
    console.print('block − full')
    compare.print_comparison(compare.compare(*(pathlib.Path(options.out) / mode for mode in gap.MODES)), console)
  if benchmark.note:
    console.print(benchmark.note)


def _facts(options, subject, weights, tokenizer):
  """What decides an answer beside the prompt. Chat template, truncation and cuts are in the prompt."""
  facts = {'benchmark': options.benchmark, 'model': weights, 'tokenizer': tokenizer, 'mode': subject.mode,
           'dtype': subject.compute.dtype, 'impl': subject.compute.impl}
  if options.benchmark == 'locomo' and options.letters != 'alone':
    facts |= {'letters': options.letters}   # of its scores
  if subject.mode == 'block':
    facts |= gap.block_facts(subject.options) | {'quantize': options.quantize}
  return facts


def print_summary(summary: dict, console: rich.console.Console) -> None:
  """A row per task and average: every measure in per cent, with its interval."""
  tasks, averages = summary['tasks'], summary['averages']
  measures = list(dict.fromkeys(m for values in tasks.values() for m in values if m not in ('n', 'tokens', 'blocks')))
  table = arguments.table('task', 'n', 'tokens', 'blocks', *(m.replace('_', ' ') for m in measures))
  cells = lambda values: [compare.percent(values[m]) if m in values else '' for m in measures]
  for name, values in tasks.items():
    table.add_row(name, f'{values["n"]:,}', f'{values["tokens"]:,.0f}', f'{values["blocks"]:,.0f}', *cells(values))
    for part, own in summary['parts'].get(name, {}).items():
      table.add_row(f'  {part}', f'{own["n"]:,}', '', '', *cells(own))
  table.add_section()
  for name, values in averages.items():
    table.add_row(name, '', '', '', *cells(values))
  console.print(table)
  boot, too_long = summary['bootstrap'], summary['too_long']
  console.print(f'in per cent; [{boot["level"]:.0%} interval of {boot["resamples"]:,} resamples of the items]'
                + (f'; {too_long["n"]:,} items are too long and left out' if too_long['n'] else ''))


def _arguments(argv):
  parser = arguments.Parser(prog='python -m tools.judge', description=__doc__)
  common = argparse.ArgumentParser(add_help=False)
  common.add_argument('model', help='Hugging Face folder, hub name, or work directory')
  common.add_argument('--data', required=True, nargs='+', help='longbench: folder, data.zip or hub name; locomo: '
                      'locomo10.json or its folder; qa: JSON lines, parquet or Arrow files, folders, globs')
  common.add_argument('--out', required=True, help='folder for MODE/summary.json and MODE/predictions.jsonl')
  common.add_argument('--mode', choices=MODES, default='block', help='of attention')
  common.add_argument('--tasks', nargs='+', help='tasks, categories or names of files (default: all)')
  common.add_argument('--limit', type=arguments.positive, help='most items per task (default: all)')
  arguments.add_numbers(common, batch=(8, 'prompts at a time'))
  common.add_argument('--max-length', type=arguments.positive,
                      help='most tokens of a prompt; longbench: its middle goes, locomo: its last sessions, qa: the '
                           "question is left out (default: the model's positions)")
  arguments.add_prompts(common)
  arguments.add_computing(common)
  common.add_argument('--cache', metavar='DIR', help='keep block states here, for later runs too (default: device only)')
  common.add_argument('--quantize', choices=cache_lib.QUANTIZE, default='none',
                      help='of block states beside the device')
  benchmarks = parser.add_subparsers(dest='benchmark', required=True)
  long = benchmarks.add_parser('longbench', parents=[common], help='LongBench v1, TASK_e of LongBench-E')
  long.add_argument('--segmenter', default=cutter.EMBEDDED,
                    help='cuts contexts that no heading divides: folder, hub name, or none (default: the embedded one)')
  long.add_argument('--target-tokens', type=arguments.positive, help="wanted length of its blocks, in the model's tokens")
  talks = benchmarks.add_parser('locomo', parents=[common], help='LoCoMo')
  talks.add_argument('--letters', choices=locomo.LETTERS, default='alone', help='where (a) or (b) counts as a choice in the '
                     'answer to an adversarial question; alone is the published rule')
  short = benchmarks.add_parser('qa', parents=[common], help='any questions over blocks')
  arguments.add_numbers(short, max_new=(_QA_MAX_NEW, 'most tokens of an answer'))
  short.add_argument('--stop', action='append', help='text that ends an answer (default: a line end without chat template)')
  short.add_argument('--strict', action='store_true', help='stop at the first malformed line')
  options = parser.parse_args(argv)
  if options.benchmark != 'qa' and len(options.data) > 1:
    parser.error(f'{options.benchmark} takes one --data')
  return options


def main(argv: list[str] | None = None, make_answerer=answerer) -> int:
  """`make_answerer` takes the place of `answerer`."""
  options = _arguments(argv)
  return arguments.run('judge', lambda: run(options, make_answerer), stopped=(
      f'what is answered stands in {options.out}, start the same command again to go on'))


if __name__ == '__main__':
  sys.exit(main())
