"""Block distillation from end to end on what every machine has: python -m tools.demo [--workdir runs/demo]

Loads the tiny teacher, builds documentation pages from Python's own standard library, distils a block-attention student,
fine-tunes the baseline on the same batches, evaluates both on held-out classes and modules, exports the student in the
Hugging Face format, answers three questions and writes report.html. Nothing is downloaded. Started again in the same
workdir, it goes on where it was stopped.
"""

import argparse
import contextlib
import dataclasses
import json
import pathlib
import shutil
import sys
import time

import jax
import rich.console
import rich.table

from blockattn import blocks, compiled, mesh, metrics
from blockattn.data import stdlib
from blockattn.evals import gap, pages
from blockattn.hf import card as card_lib, convert
from blockattn.train import command, distill, finetune, inputs, job
from configs import tiny
from tools import arguments, evaluate, report

QUESTIONS = 3
SEGMENTED = 4   # pages in the report
MODELS = ('teacher_full', 'student_block_before', 'student_block_after', 'block_finetuned')


def run(workdir, docs: int, steps: int | None, console):
  """The whole demo. Returns the summary that it also writes to `summary.json`."""
  workdir, seconds = pathlib.Path(workdir), {}

  @contextlib.contextmanager
  def part(name, text):
    console.print(f'[bold]{text}')
    start = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - start, 1)

  config, baseline = tiny.get_config(), tiny.get_config('baseline')
  if steps is not None:
    config.steps = baseline.steps = steps
    config.optim.warmup = baseline.optim.warmup = min(config.optim.warmup, steps // 2)
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
    cfg, student, form = distill.run(options, workdir)
  with part('finetune', 'The baseline: block fine-tuning on the same batches'):
    finetuned = finetune.run(finetune.read(baseline), workdir / 'block_finetuned')[1]
  subjects = make_subjects(options, cfg, student, finetuned, form)
  documents, examples = pages.load(tokenizer, docs, style=options.data.pages)
  with part('evaluate', f'Asking each model {docs} questions about classes and modules that no training page showed'):
    summary = evaluate.evaluate_all(subjects, subjects['teacher_full'], documents, examples, tokenizer, batch=docs,
                                    max_new=24, stop=pages.STOP, out=workdir / 'evaluation')
  with part('export', 'Exporting the student in the Hugging Face format'):
    export(workdir / 'student', student, cfg, form, options, prompt, summary)
  summary['seconds'] = seconds
  metrics.write_json(workdir / 'summary.json', summary)
  shutil.copyfile(workdir / 'evaluation' / 'examples.jsonl', workdir / 'examples.jsonl')
  write_layout(workdir, form, documents[0])
  show_answers(workdir, console)
  console.print(table(summary))
  return summary


def make_subjects(options, cfg, student, finetuned, form):
  """Teacher and students by the names of the summary, on one device. The untrained student has no sinks: it never saw
  one."""
  first = jax.local_devices()[0]
  one = mesh.Placement(mesh.make_mesh({}, [first]))
  compute = job.compute_of(options.compute, None, one.platform)
  teacher_cfg = job.model_config(options.model)
  teacher = job.load_language_model(options, one, teacher_cfg)
  student, finetuned = jax.device_put((student, finetuned), first)
  plain = form.bare
  subject = lambda params, cfg, mode, form: gap.Subject(params, cfg, compute, mode, form)
  return {'teacher_full': subject(teacher, teacher_cfg, 'full', plain),
          'student_block_before': subject(teacher, teacher_cfg, 'block', plain),
          'student_block_after': subject(student, cfg, 'block', form),
          'block_finetuned': subject(finetuned, cfg, 'block', form)}


def export(folder, params, cfg, form, options, prompt, summary):
  score = lambda name: f'{summary[name]["exact_match"]:.1%} exact match, KL to the teacher {summary[name]["kl"]:.3f} nats'
  source = pathlib.Path(options.model.source)
  meta = job.model_meta(cfg, form, source.name, 'distill', prompt=prompt)
  card = card_lib.text(cfg, meta, source, title='Tiny block-attention student', facts={
      'command': '`./launch/local.sh demo`',
      'teacher, full attention': score('teacher_full'),
      'the same weights under the block mask': score('student_block_before'),
      'this student under the block mask': score('student_block_after')})
  convert.save(params, cfg, folder, source=source, meta=meta, card=card, dtype='float32', overwrite=True)


def write_layout(workdir, options, page):
  """layout.json for the report."""
  layout = blocks.from_lengths([[list(page.lengths)]], len(page.tokens))
  if options.most_added:
    wide = dataclasses.replace(options, max_blocks=len(page.lengths))
    _, layout, _ = blocks.block_mode(page.tokens[None], layout, wide)
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


def show_answers(workdir, console):
  """Prints the first questions with every model's answer."""
  for row in _read_lines(workdir / 'examples.jsonl')[:QUESTIONS]:
    console.rule(style='dim')
    for i, text in enumerate(row['blocks']):
      console.print(f'[dim]block {i}[/] ', end='')
      console.print(text.strip().replace('\n', ' | ')[:110], markup=False, highlight=False)
    console.print(row['prompt'].removesuffix('Answer:').strip(), markup=False, highlight=False, style='bold')
    for name in MODELS:
      right = row['answers'][name] == row['response'].strip()
      console.print(f'  {report.MODEL_NAMES[name]:30} [{"green" if right else "red"}]{row["answers"][name]}[/]',
                    highlight=False)
  console.rule(style='dim')


def table(summary):
  out = rich.table.Table('', 'exact match', 'CE, nats', 'KL to teacher, nats', box=None)
  for name in MODELS:
    row = summary[name]
    out.add_row(report.MODEL_NAMES[name], f'{row["exact_match"]:.1%}', f'{row["ce"]:.3f}', f'{row["kl"]:.3f}')
  return out


def conclusion(summary, workdir, page, elapsed) -> str:
  """What was learned, and what to run next."""
  score = {name: 100 * summary[name]['exact_match'] for name in MODELS}
  lost = score['teacher_full'] - score['student_block_before']
  return (f'Reading one block at a time costs the teacher {lost:.1f} points; the distilled student is '
          f'{score["teacher_full"] - score["student_block_after"]:.1f} points from the teacher, the fine-tuned baseline '
          f'{score["teacher_full"] - score["block_finetuned"]:.1f}. {elapsed:.0f} s in all.\n'
          f'Look at {page}.\n'
          'Next:\n'
          f'  ./launch/local.sh -m tools.evaluate {workdir / "student"} --teacher {_relative(tiny.TEACHER)} --data pages\n'
          '  ./launch/local.sh -m blockattn.train.distill --config configs/tiny.py --workdir runs/x '
          '--config.distill.drop_mode=isolate\n'
          '  ./launch/local.sh -m tools.show --config configs/distill.py:model=qwen3_4b,ctx=32768 --devices 64')


def _relative(path):
  path = pathlib.Path(path)
  return path.relative_to(pathlib.Path.cwd()) if path.is_relative_to(pathlib.Path.cwd()) else path


def main(argv=None) -> int:
  parser = arguments.Parser(prog='python -m tools.demo', description=__doc__,
                            formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--workdir', default='runs/demo')
  parser.add_argument('--docs', type=int, default=256, help='questions of the evaluation')
  parser.add_argument('--steps', type=int, help='training steps of each model (default: as in configs/tiny.py)')
  args = parser.parse_args(argv)
  console = rich.console.Console(width=min(120, rich.console.Console().width))
  start = time.perf_counter()
  command.quiet_libraries()
  compiled.keep()
  try:
    summary = run(args.workdir, args.docs, args.steps, console)
    page = report.render(args.workdir)
  except (ValueError, FileNotFoundError, FloatingPointError) as error:
    print(f'error: {error}', file=sys.stderr)
    return 1
  console.print(conclusion(summary, pathlib.Path(args.workdir), page, time.perf_counter() - start), highlight=False)
  return 0


if __name__ == '__main__':
  sys.exit(main())
