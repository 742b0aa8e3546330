"""Block distillation of the tiny teacher on documentation pages: what the demo runs.

    python -m blockattn.train.distill --config configs/tiny.py --workdir runs/tiny

The blocks are cut two words before each sentence's end, so that a question has to be matched across two of them.
`configs/tiny.py:baseline` is block fine-tuning on the same batches (for blockattn.train.finetune), for a third as many
steps: each costs more, and the demo has to end within minutes.
"""

import pathlib

import blockattn
from configs import common

TEACHER = pathlib.Path(blockattn.__file__).parent / 'assets' / 'tiny_teacher'


def get_config(arg=''):
  arg = common.parse_arg(arg, baseline=False)
  config = common.base()
  config.steps = 90 if arg.baseline else 300
  config.batch = 8
  config.save_every = 100
  config.model.source = str(TEACHER)
  config.optim.lr = 1.2e-3
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
    # So short a run learns most from the answers alone; the floor keeps what the teacher already answers in place.
    config.distill.loss_over = 'answer'
    config.distill.drop_rate = 0.1
    config.distill.weights.floor = 0.5
  return config
