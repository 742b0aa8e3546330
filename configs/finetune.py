"""Fine-tuning of a published model on the answers of the same files: the baseline of block distillation.

    python -m tools.show --config configs/finetune.py:model=qwen3_4b,ctx=32768,mode=both --devices 64
    python -m blockattn.train.finetune --config configs/finetune.py:model=qwen3_4b,ctx=32768,mode=both \
        --config.data.files=train/ --workdir runs/qwen3_4b_finetune
    python -m tools.convert to_hf runs/qwen3_4b_finetune exported/qwen3_4b_finetune --dtype bfloat16

`mode=both` is block fine-tuning (arXiv 2409.15355): every example once in full and once in block attention, two forward
and two backward passes. `mode=block` leaves out the full pass, `mode=full` is plain cross-entropy. `model`, `ctx`,
the batch and the learning rate are those of configs/distill.py, so that runs compare. As there, nothing has been run at
full size yet.
"""

from configs import common, distill


def get_config(arg=''):
  arg = common.parse_arg(arg, model='qwen3_4b_instruct_2507', ctx=32768, mode='both')
  config = distill.prompts(common.base('finetune'), arg.model, arg.ctx)
  config.finetune.mode = arg.mode
  return config
