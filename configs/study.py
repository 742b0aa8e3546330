"""The study of one real model: SmolLM2-135M-Instruct in blocks, on real documents, every part of the method changed once.

    python -m tools.smollm2 models/smollm2
    python -m tools.study --model models/smollm2 --data "$BLOCKATTN_DATA" --workdir runs/study --plan
    python -m tools.study --model models/smollm2 --data "$BLOCKATTN_DATA" --workdir runs/study

tools.study trains the points below one by one, and evaluates each. What it finds trained is not trained again, so that a
cluster may do that part, once a first start has written runs/study/train.jsonl (`--only untrained` does):

    python -m launch.sweep --config configs/study.py --points parts --workdir runs/study/students/parts --run local \
        --config.model.source=models/smollm2 --config.data.files=runs/study/train.jsonl

Low-rank students: on two cores a step costs two thirds of one of all weights, and 230 thousand tokens moved a student of
rank 16 at this rate. Everything else is the method's default. `baseline` is block fine-tuning on the same batches, for
blockattn.train.finetune; `ctx` the tokens of a row; `pages` reads the embedded task of configs/tiny.py in short rows, in
place of files: what the demo does with this model.
"""

from blockattn import blocks, tree
from blockattn.errors import UserError
from configs import common, distill, tiny, variants

TARGET = 256   # tokens of a block, about
# Kinds of text that students are trained on, and kinds that only held-out documents are of.
KNOWN = ('books', 'code', 'drama', 'finance', 'manuals', 'math_latex', 'newsletters', 'papers', 'specs')
NEW = ('legal', 'meetings', 'textbooks', 'web_text', 'wiki')

# Keys that differ from the config, by group and row. UNTRAINED are forms of block mode that the model reads as it is.
_READ = {'blocks.hide_starts': False}
UNTRAINED = {
    'untrained': {
        'bare': _READ,
        '1_sink': _READ | {'blocks.sinks': 1},
        '4_sinks': _READ | {'blocks.sinks': 4},
    },
    'untrained_forms': {
        'hidden_starts': {},
        '1_hidden_sink': {'blocks.sinks': 1},
        '8_sinks': _READ | {'blocks.sinks': 8},
        'space': _READ | {'blocks.sinks': 1, 'blocks.sink_text': ' '},
        'local': _READ | {'blocks.positions': 'local'},
    },
    'overlaps': {f'overlap_{count}': {'blocks.overlap': count} for count in (16, 32, 64, 128)},
}
_OTHERS = ('weighted', 'dropout', 'read_starts', 'overlap')   # of the embedded task's variants those that stand above
POINTS = {
    'parts': {
        'distilled': {},
        'read_starts': _READ,
        'one_sink': _READ | {'blocks.sinks': 1},
        'overlap': {'blocks.overlap': 64},
        'no_dropout': {'distill.drop_rate': 0.0},
        'no_weights': {'distill.weights.form': 'none'},
    },
    'rates': {f'rate_{rate:g}': {'optim.lr': rate} for rate in (1e-3, 3e-3)},
    'baseline': {'finetuned': {}},
    'baseline_time': {'finetuned_time': {}},   # for as many seconds as `distilled`
    'forms': {
        'long_overlap': {'blocks.overlap': 128},
        **{f'drop_{mode}': {'distill.drop_mode': mode} for mode in blocks.DROP_MODES if mode != 'lift'},
        'weights_exp': {'distill.weights.form': 'exp'},
        'loss_over_text': {'distill.loss_over': 'text'},
        'with_ce': {'distill.ce_weight': 0.5},
        'full_rank': {'lora.rank': 0, 'optim.lr': 2e-5},
    },
    'sinks': {
        'hidden_sinks_4': {'blocks.sinks': 4},
        'sinks_4': _READ | {'blocks.sinks': 4},
        'learned_1': _READ | {'blocks.sink_kind': 'learned', 'blocks.sinks': 1},
        'learned_4': _READ | {'blocks.sink_kind': 'learned', 'blocks.sinks': 4},
    },
    # Learned sinks are there to be trained.
    'variants': {name: keys | ({'lora.rank': 0} if 'model.train_only' in keys else {})
                 for name, keys in variants.VARIANTS.items() if keys and name not in _OTHERS},
}
SEEDS = {'parts': 3, 'baseline': 3, 'baseline_time': 3}   # of the main rows; the others have one


def get_config(arg=''):
  arg = common.parse_arg(arg, baseline=False, ctx=1152, pages=False)
  config = common.base('finetune' if arg.baseline else 'distill')
  config.model.source = distill.HUB['smollm2_135m']
  config.model.size = 'smollm2_135m'
  config.steps = 50
  config.batch = 4
  config.accumulate = 2   # a row for each of two cores: a fifth of what four rows take is memory enough
  config.log_every = 1
  config.save_every = 10
  config.lora.rank = 16
  config.optim.lr = 3e-4
  config.optim.warmup = 5
  config.data.chat = False   # texts are no turns of a chat
  config.data.length = arg.ctx
  config.data.max_blocks = 12
  config.data.segmenter = 'tiny'
  config.data.segment.target = TARGET
  if arg.pages:
    tiny.pages(config)
    config.data.length = 480
    config.steps = 24
    config.save_every = 8
    config.optim.lr = 1e-3
  return config


def sweep(add, arg='parts'):
  arg = arg or 'parts'
  if arg not in POINTS or arg == 'baseline_time':   # which has steps that only a clock knows
    raise UserError(f'sweep argument {arg!r}: {tree.did_you_mean(arg, POINTS)}')
  for seed in range(SEEDS.get(arg, 1)):
    for keys in POINTS[arg].values():
      add(keys, seed=seed)
