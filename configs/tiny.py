"""Block distillation of the tiny teacher on documentation pages: what the demo runs.

    python -m blockattn.train.distill --config configs/tiny.py --workdir runs/tiny

The blocks are cut two words before each sentence's end, so that a question has to be matched across two of them.
`configs/tiny.py:baseline` is block fine-tuning on the same batches (for blockattn.train.finetune), for half as many
steps: each costs more, and the demo has to end within minutes.
"""

import pathlib

import blockattn
from configs import common

TEACHER = pathlib.Path(blockattn.__file__).parent / 'assets' / 'tiny_teacher'


def get_config(arg=''):
  arg = common.parse_arg(arg, baseline=False)
  config = common.base()
  config.steps = 120 if arg.baseline else 240
  config.batch = 8
  config.save_every = 100
  config.model.source = str(TEACHER)
  config.optim.lr = 2e-3
  config.optim.final_lr = 0.05
  config.optim.warmup = 10
  config.optim.b2 = 0.98
  config.data.kind = 'pages'
  config.data.length = 384
  config.data.max_blocks = 24
  config.blocks.sinks = 1
  if arg.baseline:
    common.add_finetune(config)
  else:
    common.add_distill(config)
  return config
