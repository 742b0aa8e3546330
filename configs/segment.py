"""The segmenter on a published backbone: Qwen3 with a two-way head, trained on SemanticSeg files.

    python -m tools.show --config configs/segment.py:model=qwen3_4b,ctx=32768 --devices 64
    python -m blockattn.train.segment --config configs/segment.py:model=qwen3_4b,ctx=32768 \
        --config.data.files="DATA/train_*.jsonl.gz" --config.segment.eval_files="DATA/validation_*.jsonl.gz" \
        --workdir runs/segmenter_qwen3_4b

`model` is qwen3_0_6b or qwen3_4b (or another of configs/distill.py), `ctx` the tokens of a row. Markers are the words
`<cut i>`, tokenised like any other, as the released Qwen3-4B segmenter has them. WORKDIR/best is a Hugging Face folder of
the best parameters so far (Qwen3ForTokenClassification), which tools.segment takes as --model.

What has been run: the same trainer with the small model of configs/segment_tiny.py. This config has been looked at with
tools.show and its shapes are tested; learning rate, batch and steps are our choice within what is usual at this size.
"""

from configs import common, distill


def get_config(arg=''):
  arg = common.parse_arg(arg, model='qwen3_4b', ctx=32768)
  config = distill.published(common.base('segment'), arg.model, arg.ctx)
  config.steps = 1000
  config.optim.warmup = 50
  config.segment.eval_every = 100
  config.segment.draw.variants = 2
  return config
