"""Block distillation of a published model into itself, on files of prompts with answers.

    python -m tools.show --config configs/distill.py:model=qwen3_4b,ctx=32768 --devices 64
    python -m tools.prepare train/ --config configs/distill.py:model=qwen3_4b,ctx=32768
    python -m blockattn.train.distill --config configs/distill.py:model=qwen3_4b,ctx=32768 \
        --config.data.files=train/ --workdir runs/qwen3_4b
    python -m tools.convert to_hf runs/qwen3_4b exported/qwen3_4b --dtype bfloat16

`model` is a name of the table below (the default is Qwen3-4B-Instruct-2507), `ctx` the tokens of a packed row, T. A
folder in place of the hub's model: --config.model.source=FOLDER; `model.size` then only tells tools.show the shapes.

What has been run: the same trainer with the small models of configs/tiny.py. This config has been looked at with
tools.show and not been run at full size: learning rate, warm-up, batch and number of steps are our choice within what
is usual for continued training at this size, and are to be tuned. The method's constants are those of
configs/common.py.

Where the contexts are long texts that a segmenter cuts, let the blocks overlap: it made good more than training did for the
one real model that was tried (docs/study.md). --config.data.segmenter=tiny --config.blocks.overlap=64

`sweep` has the sweeps that the method's open constants ask for: sinks (the default), dropout, weights, lr, and goal, which
is other losses, output matching and on-policy rows, each against the plain divergence:

    python -m launch.sweep --config configs/distill.py:model=qwen3_4b --points dropout --workdir runs/dropout \
        --config.data.files=train/ --run slurm --sbatch "--nodes=8 --ntasks-per-node=8 --gpus-per-node=8"

The batch of 64 rows gives each of 64 devices one; a step is 2M tokens at ctx=32768. On fewer devices,
--config.accumulate=8 (8 devices, one row each at a time) computes the same steps but for the draws of block dropout.
"""

from blockattn import blocks, tree
from blockattn.errors import UserError
from configs import common, variants

HUB = {
    'smollm2_135m': 'HuggingFaceTB/SmolLM2-135M-Instruct',
    'qwen3_0_6b': 'Qwen/Qwen3-0.6B',
    'qwen3_1_7b': 'Qwen/Qwen3-1.7B',
    'qwen3_4b': 'Qwen/Qwen3-4B',
    'qwen3_4b_instruct_2507': 'Qwen/Qwen3-4B-Instruct-2507',
    'qwen3_8b': 'Qwen/Qwen3-8B',
    'qwen25_0_5b': 'Qwen/Qwen2.5-0.5B-Instruct',
    'qwen25_1_5b': 'Qwen/Qwen2.5-1.5B-Instruct',
    'qwen25_7b': 'Qwen/Qwen2.5-7B-Instruct',
    'llama32_1b': 'meta-llama/Llama-3.2-1B-Instruct',
    'llama31_8b': 'meta-llama/Llama-3.1-8B-Instruct',
}


def get_config(arg=''):
  arg = common.parse_arg(arg, model='qwen3_4b_instruct_2507', ctx=32768)
  config = prompts(common.base('distill'), arg.model, arg.ctx)
  config.teacher.dtype = 'bfloat16'
  config.teacher.compute_dtype = 'bfloat16'
  return config


def sweep(add, arg='sinks'):
  points = {
      'sinks': variants.SINKS,
      'dropout': [{'distill.drop_rate': 0.0}] + [{'distill.drop_rate': rate, 'distill.drop_mode': mode}
                                                 for mode in blocks.DROP_MODES for rate in (0.1, 0.2, 0.4)],
      'weights': [{'distill.weights.form': form} for form in ('none', 'relu', 'exp')],
      'variants': list(variants.VARIANTS.values()),
      'lr': [{'optim.lr': lr} for lr in (5e-6, 1e-5, 2e-5, 4e-5)],
  }
  arg = arg or 'sinks'
  if arg not in points:
    raise UserError(f'sweep argument {arg!r}: {tree.did_you_mean(arg, points)}')
  for point in points[arg]:
    add(point)


def prompts(config, model, ctx):
  """`published`, for a language model and prompts of blocks."""
  published(config, model, ctx)
  config.data.max_blocks = max(8, ctx // 128)   # blocks of 128 tokens on average
  return config


def published(config, model, ctx):
  """Sets what every training of a published model shares, and returns the config."""
  if model not in HUB:
    raise UserError(f'config argument model={model!r}: {tree.did_you_mean(model, HUB)}')
  config.steps = 500
  config.save_every = 100
  config.batch = 64
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
  return config
