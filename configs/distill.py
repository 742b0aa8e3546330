"""Block distillation of a published model into itself, on files of prompts with answers.

    python -m tools.show --config configs/distill.py:model=qwen3_4b,ctx=32768 --devices 64
    python -m tools.prepare train/ --tokenizer Qwen/Qwen3-4B --length 32768 --max-blocks 256 --chat \
        --cache .cache/blockattn
    python -m blockattn.train.distill --config configs/distill.py:model=qwen3_4b,ctx=32768 \
        --config.data.files=train/ --workdir runs/qwen3_4b
    python -m tools.convert to_hf runs/qwen3_4b exported/qwen3_4b

`model` is a name of the table below (the default is Qwen3-4B-Instruct-2507), `ctx` the tokens of a packed row, T. A
folder in place of the hub's model: --config.model.source=FOLDER; `model.size` then only tells tools.show the shapes.

What has been run: the same trainer with the small models of configs/tiny.py. This config has been looked at with
tools.show and not been run at full size: learning rate, warm-up, batch and number of steps are our choice within what
is usual for continued training at this size, and are to be tuned. The method's constants are those of
configs/common.py.

The batch of 64 rows gives each of 64 devices one; a step is 2M tokens at ctx=32768. On fewer devices,
--config.accumulate=8 (8 devices, one row each at a time) computes the same steps but for the draws of block dropout.
"""

from blockattn import tree
from configs import common

HUB = {
    'qwen3_0_6b': 'Qwen/Qwen3-0.6B',
    'qwen3_1_7b': 'Qwen/Qwen3-1.7B',
    'qwen3_4b': 'Qwen/Qwen3-4B',
    'qwen3_4b_instruct_2507': 'Qwen/Qwen3-4B-Instruct-2507',
    'qwen3_8b': 'Qwen/Qwen3-8B',
    'llama32_1b': 'meta-llama/Llama-3.2-1B-Instruct',
    'llama31_8b': 'meta-llama/Llama-3.1-8B-Instruct',
}


def get_config(arg=''):
  arg = common.parse_arg(arg, model='qwen3_4b_instruct_2507', ctx=32768)
  config = published(arg.model, arg.ctx)
  common.add_distill(config)
  config.teacher.dtype = 'bfloat16'
  config.teacher.compute_dtype = 'bfloat16'
  return config


def published(model, ctx):
  """What block distillation and fine-tuning of a published model share."""
  if model not in HUB:
    raise ValueError(f'config argument model={model!r}: {tree.did_you_mean(model, HUB)}')
  config = common.base()
  config.steps = 500
  config.save_every = 100
  config.batch = 64
  config.chunk = 512   # with a vocabulary of 152k: 0.3 GB of float32 logits per row and model
  config.model.source = HUB[model]
  config.model.size = model
  config.model.dtype = 'float32'   # bfloat16 would round away most updates at this learning rate
  config.compute.dtype = 'bfloat16'
  config.compute.remat = 'full'
  config.mesh.data = 1     # with slow links between hosts: the number of hosts, so that weights travel inside one
  config.mesh.fsdp = -1
  config.optim.lr = 1e-5
  config.optim.warmup = 25
  config.data.length = ctx
  config.data.max_blocks = max(8, ctx // 128)   # blocks of 128 tokens on average; sinks take 3% of the row then
  config.data.chat = True
  return config
