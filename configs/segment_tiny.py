"""The tiny segmenter: a Qwen3 of a few layers with a two-way head, which cuts any text on a CPU.

    python -m tools.tiny_segmenter_tokenizer "$BLOCKATTN_DATA"/seg/train_*.jsonl.gz --out runs/segmenter_tokenizer
    python -m blockattn.train.segment --config configs/segment_tiny.py --workdir runs/segmenter \
        --config.data.tokenizer=runs/segmenter_tokenizer
    python -m blockattn.train.segment --config configs/segment_tiny.py:stage=2 --workdir runs/segmenter2 \
        --config.model.source=runs/segmenter/best --config.data.tokenizer=runs/segmenter_tokenizer
    python -m blockattn.train.segment --config configs/segment_tiny.py:stage=3 --workdir runs/segmenter3 \
        --config.model.source=runs/segmenter2/best --config.data.tokenizer=runs/segmenter_tokenizer
    python -m tools.fit_outline runs/segmenter3/best --data "$BLOCKATTN_DATA"/seg
    (and the files of runs/segmenter3/best to blockattn/assets/tiny_segmenter, configs/segment_tiny.md as README.md)

The second stage reads, too, how alike the words on both sides of a candidate are (`segment.read.cohesion`); the third sees
more surfaces, talk with a date or a number in front of every block among them. A training with all of it from the start
has not been tried.

Reads the SemanticSeg files of the folder that BLOCKATTN_DATA names. A position of the model is a whole unit, a line or a
sentence: its first 14 tokens, its last 3 and 6 from between, side by side. A row of 256 positions is some 15,000
characters of text.
"""

import os
import pathlib

from blockattn.errors import UserError
from configs import common

SEGMENTER = pathlib.Path(__file__).resolve().parents[1] / 'blockattn' / 'assets' / 'tiny_segmenter'


def get_config(arg=''):
  arg = common.parse_arg(arg, steps=0, stage=1)
  if arg.stage not in (1, 2, 3):
    raise UserError(f'config argument stage={arg.stage}: there are 1, 2 and 3')
  config = common.base('segment')
  data = os.path.join(os.environ.get('BLOCKATTN_DATA', 'data'), 'seg')
  config.steps = arg.steps or {1: 1600, 2: 600, 3: 500}[arg.stage]
  config.batch = 16
  config.save_every = {1: 200, 2: 100, 3: 125}[arg.stage]
  config.log_every = 20
  if arg.stage > 1:
    config.model.source = str(SEGMENTER)
    config.seed = {2: 2, 3: 4}[arg.stage]   # other variants of the documents, in another order
  else:
    config.model.fields = dict(family='qwen3', vocab=8192, width=192, layers=5, heads=6, kv_heads=2, head_dim=32, mlp=512,
                               norm_eps=1e-6, rope_theta=10000.0, max_positions=4096, qk_norm=True, tied=True)
  config.optim.lr = {1: 2e-3, 2: 1e-3, 3: 6e-4}[arg.stage]
  config.optim.final_lr = 0.02
  config.optim.warmup = 100 if arg.stage == 1 else 30
  config.optim.b2 = 0.98
  config.optim.weight_decay = 0.05
  config.data.tokenizer = str(SEGMENTER)
  config.data.length = 256
  config.data.files = (os.path.join(data, 'train_*.jsonl.gz'),)
  config.segment.read.style = 'pooled'
  config.segment.read.head = 14
  config.segment.read.tail = 3
  config.segment.read.middle = 6
  config.segment.read.ahead = 4
  config.segment.eval_files = (os.path.join(data, 'validation_*.jsonl.gz'),)
  config.segment.eval_every = config.save_every
  config.segment.eval_rows = 12
  if arg.stage > 1:
    config.segment.read.cohesion = True
    config.segment.draw.mosaic = {2: 0.2, 3: 0.12}[arg.stage]   # texts whose topic changes every few lines
  if arg.stage == 3:
    config.segment.draw.variation = 0.4
  return config
