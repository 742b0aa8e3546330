"""The tiny teacher: a Llama of under a million parameters that reads documentation pages and answers from them.

    python -m blockattn.train.finetune --config configs/tiny_teacher.py --workdir runs/tiny_teacher
    python -m tools.convert to_hf runs/tiny_teacher blockattn/assets/tiny_teacher --dtype float32 \
        --source blockattn/assets/tiny_teacher --card configs/tiny_teacher.md --overwrite
    python -m blockattn.train.finetune --config configs/tiny_teacher.py:second --workdir runs/tiny_teacher_second
    (and tools.convert again, from runs/tiny_teacher_second)

Plain cross-entropy in full attention, from random values. Pages under other names make copying the first thing that
helps; finding the sentence that the question repeats comes after it: a fifth of the answers are right at step 1,750, seven
in ten at step 2,750. The tokenizer in the folder was made by `python -m tools.tiny_tokenizer`.
"""

from configs import common, tiny


def get_config(arg=''):
  arg = common.parse_arg(arg, second=False)
  config = common.base('finetune')
  config.steps = 800 if arg.second else 5000
  config.batch = 8
  config.chunk = 64
  config.save_every = 250
  config.log_every = 20
  if arg.second:
    config.model.source = str(tiny.TEACHER)
    config.seed = 1
    config.data.pages.seed = 2   # other pages
  else:
    config.model.fields = dict(family='llama', vocab=1024, width=128, layers=4, heads=4, kv_heads=2, head_dim=32, mlp=320,
                               norm_eps=1e-6, rope_theta=10000.0, max_positions=2048)
  config.compute.impl = 'auto'
  config.optim.lr = 1.5e-3 if arg.second else 3e-3
  config.optim.final_lr = 0.05
  config.optim.warmup = 150
  config.optim.b2 = 0.98
  config.optim.weight_decay = 0.01
  config.data.kind = 'pages'
  config.data.tokenizer = str(tiny.TEACHER)
  config.data.length = 512
  config.data.max_blocks = 32
  config.data.pages.questions = (1, 3)
  config.data.pages.split_words = 0   # blocks do not matter here: attention is full
  config.finetune.mode = 'full'
  config.finetune.text_weight = 0.3
  config.finetune.prompt_weight = 2.0   # the answers of all questions but the last stand in the prompt
  config.finetune.answer_weight = 6.0
  return config
