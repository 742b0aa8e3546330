"""Block distillation of the tiny teacher on documentation pages: what the demo runs.

    python -m blockattn.train.distill --config configs/tiny.py --workdir runs/tiny

The blocks are cut three words before each sentence's end, so that a question has to be matched across two of them, and
overlap. Lengths, rates and weights were chosen on pages of the validation split (`--data pages:validation`), among some
dozen settings. `configs/tiny.py:baseline` is block fine-tuning on the same batches (for blockattn.train.finetune), for a
third of the steps, each of which costs more. The sweep, of sinks or of `--points dropout`, takes about a minute for every
point on two cores:

    python -m launch.sweep --config configs/tiny.py --workdir runs/tiny_sweep --run local
"""

import pathlib

import blockattn
from blockattn import blocks
from blockattn.errors import UserError
from configs import common, variants

NO_OVERLAP = {'blocks.overlap': 0, 'optim.lr': 3e-3}   # much more is to be learned then
TEACHER = pathlib.Path(blockattn.__file__).parent / 'assets' / 'tiny_teacher'


def get_config(arg=''):
  arg = common.parse_arg(arg, baseline=False)
  config = common.base('finetune' if arg.baseline else 'distill')
  config.steps = 50 if arg.baseline else 150
  config.batch = 4
  config.chunk = 32
  config.save_every = 50
  config.model.source = str(TEACHER)
  config.optim.lr = 3e-4
  config.optim.final_lr = 0.05
  config.optim.warmup = 10
  config.optim.b2 = 0.98
  pages(config)
  config.data.length = 960
  if arg.baseline:
    config.finetune.prompt_weight = 1.0   # the answers of all questions but the last stand in the prompt
  else:
    config.distill.ce_weight = 0.5
  return config


def pages(config):
  """Sets what every training on the embedded task shares."""
  config.data.kind = 'pages'
  config.compute.tiles = (64, 64)   # the documents of a row are short
  config.blocks.overlap = 8         # a quarter of a block, about
  config.data.max_blocks = 48
  config.data.segmenter = 'tiny'        # cuts one row of pages in twenty as plain text
  config.data.segment.target = 48        # they are short
  config.data.segment.pages = 0.05
  config.data.pages.questions = (3, 4)   # all that a page has: most to learn per token
  if 'distill' in config:
    # Weighting tokens by their gap, and block dropout, cost so short a run two to eight points of exact match.
    config.distill.weights.form = 'none'
    config.distill.drop_rate = 0.0


def sweep(add, arg=''):
  if arg not in ('', 'sinks', 'dropout'):
    raise UserError(f"sweep argument {arg!r}; choose 'sinks' or 'dropout'")
  if arg == 'dropout':
    add({'distill.drop_rate': 0.0})
    for mode in blocks.DROP_MODES:
      add({'distill.drop_rate': 0.2, 'distill.drop_mode': mode})
  else:
    for point in variants.SINKS:
      add(point | NO_OVERLAP)   # overlaps need hidden starts
