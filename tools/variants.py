"""What the choices of a distillation are worth on the demo's task, each trained for the same time.

  python -m tools.variants --workdir runs/variants                                     all of them, three seeds
  python -m tools.variants --workdir runs/variants --only plain,on_policy --seconds 30 --seeds 1 --docs 32

A variant is configs/tiny.py (the forward divergence, unweighted, with half as much cross-entropy) without its overlap,
which would leave little to tell apart, at the rate that it takes then, and with the keys of configs/variants.py changed. A
short run of each says how long a step takes; a training then has as many steps as fit into --seconds, compiling apart, its
learning rate falling over just these. All are asked the same questions about classes and modules that no training page
showed. In DIR stand a folder per training, table.md, and results.json; started again in DIR, what is there is not done
again.

The seed decides the order of the pages and, where there is one, the draw of the student's answers; every student starts as
the teacher.
"""

import functools
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from blockattn import disk, loading, mesh, metrics
from blockattn.errors import UserError
from blockattn.evals import gap, pages
from blockattn.train import command, distill, inputs, job
from configs import tiny
from configs.variants import VARIANTS
from tools import arguments, evaluate
from tools.bench import measuring

_MAX_NEW = 24   # of an answer


def options_of(name: str, seed: int, steps: int, log_every: int = 20) -> distill.Options:
  """The training of a variant."""
  config = tiny.get_config()
  config.distill.on_policy.max_new = _MAX_NEW
  config.update_from_flattened_dict(tiny.NO_OVERLAP | VARIANTS[name])
  config.seed, config.steps, config.save_every, config.log_every = seed, steps, steps, log_every
  config.optim.warmup = min(config.optim.warmup, steps // 2)
  return distill.read(config)


def seconds_per_step(folder: pathlib.Path, name: str, probe: int) -> float:
  """Of a variant, from a run that is made for it if there is none: `probe` steps, and as many that are timed."""
  distill.run(options_of(name, 0, 2 * probe, probe), folder)
  speed = [line['steps_per_s'] for line in metrics.read_metrics(folder / metrics.FILE_NAME) if 'steps_per_s' in line]
  # A line's speed is that of all steps so far but the first: the programs of the first answers are compiled in these.
  spent = [steps / per_s for steps, per_s in zip((probe - 1, 2 * probe - 1), speed, strict=True)]
  return (spent[1] - spent[0]) / probe


def trained(folder: pathlib.Path, name: str, seed: int, steps: int, ask) -> dict[str, Any]:
  """What came of one training: of an earlier start, if it ended there."""
  path = folder / 'result.json'
  if path.is_file():
    return disk.read_json(path, {'variant': str, 'steps': int, 'kl': float, 'exact_match': float})
  options = options_of(name, seed, steps)
  form = distill.run(options, folder)[2]
  own = ask(name, form, folder)
  result = {'variant': name, 'seed': seed, 'steps': steps, 'seconds': steps / metrics.measured_speed(folder),
            'kl': own['kl'], 'exact_match': own['exact_match']}
  metrics.write_json(path, result)
  return result


def examiner(docs: int, batch: int):
  """(name, form, work directory) of a student -> its figures on the questions."""
  options = options_of('plain', 0, 1)
  tokenizer = inputs.load_tokenizer(options.data, options.model.source)
  one = mesh.Placement(mesh.make_mesh({}, jax.local_devices()[:1]))
  compute, cfg = job.compute_of(options.compute, None, one.platform), job.model_config(options.model)
  bare = job.block_options(options, cfg, 0)[1]
  teacher = gap.Subject(job.load_language_model(options, one, cfg), cfg, compute, 'full', bare)
  documents, examples = pages.load(tokenizer, docs, style=options.data.pages)

  def ask(name, form, folder):
    own, params, _ = loading.load_run(folder, 'float32', one)
    subject = gap.Subject(params, own, compute, 'block', form)
    return evaluate.evaluate_all({name: subject}, teacher, documents, examples, tokenizer, batch=batch, max_new=_MAX_NEW,
                                 stop=pages.STOP)[name]
  return ask


def table(results: Sequence[Mapping]) -> str:
  """Markdown: a row per variant, means over the seeds and standard deviations."""
  lines = [measuring.head('variant', 'seeds', 'steps', 'seconds', 'KL, nats', 'exact match, %')]
  for name in VARIANTS:
    own = [result for result in results if result['variant'] == name]
    if own:
      spread = lambda key, form, scale=1.0, own=own: ' ± '.join(
          format(scale * float(of([result[key] for result in own])), form) for of in (np.mean, np.std))
      mean = lambda key, own=own: f'{np.mean([result[key] for result in own]):.0f}'
      lines.append(measuring.row(name, len(own), mean('steps'), mean('seconds'), spread('kl', '.4f'),
                                 spread('exact_match', '.1f', 100.0)))
  return '\n'.join(lines)


def run(options) -> None:
  unknown = [name for name in options.only if name not in VARIANTS]
  if unknown:
    raise UserError(f'--only {",".join(unknown)}: choose from {", ".join(VARIANTS)}')
  command.quiet_libraries()
  job.use_cpu_cores(options_of('plain', 0, 1))
  folder, results = pathlib.Path(options.workdir), []
  ask = functools.cache(lambda: examiner(options.docs, options.docs))
  timed = lambda name: seconds_per_step(folder / name / f'probe_{options.probe}', name, options.probe)
  steps = {name: max(2, round(options.seconds / timed(name))) for name in options.only}
  for seed in range(options.seeds):   # a table of fewer seeds is one, too
    for name in options.only:
      results.append(trained(folder / name / f'{steps[name]}_steps_seed_{seed}', name, seed, steps[name],
                             lambda *student: ask()(*student)))
      metrics.write_json(folder / 'results.json', results)
      disk.write_text(folder / 'table.md', table(results) + '\n')
  print(table(results))


def main(argv: Sequence[str] | None = None) -> int:
  parser = arguments.Parser(prog='python -m tools.variants', description=__doc__)
  parser.add_argument('--workdir', metavar='DIR', default='runs/variants')
  parser.add_argument('--only', metavar='NAMES', default=list(VARIANTS), type=lambda text: text.split(','),
                      help='of the variants, with commas')
  arguments.add_numbers(parser, seconds=(120, 'of each training'), seeds=(3, 'trainings of each variant'),
                        docs=(256, 'questions of the evaluation'),
                        probe=(20, 'steps that say how long one takes, after as many that do not'))
  options = parser.parse_args(argv)
  if options.probe < 2:
    parser.error('--probe takes two steps or more: the first of a run, which compiles, is not timed')
  return arguments.run('variants', lambda: run(options),
                       stopped=f'what is done stands in {options.workdir}, start the same command again to go on')


if __name__ == '__main__':
  sys.exit(main())
