"""What every config shares. A config file's `get_config(arg)` starts from `base()`; every key stands here once."""

import ml_collections
from ml_collections import config_dict

from blockattn import mesh, tree


def parse_arg(arg, **defaults):
  """'model=qwen3_4b,ctx=32768' -> values of the types of `defaults`.

  Raises:
    ValueError: a name that is not among the defaults, or a value that is not of its type.
  """
  values = dict(defaults)
  for part in filter(None, (arg or '').split(',')):
    name, equals, value = part.partition('=')
    if name not in defaults:
      raise ValueError(f'config argument {name!r}: {tree.did_you_mean(name, defaults)}')
    kind = type(defaults[name])
    try:
      values[name] = _BOOLS[value.lower()] if kind is bool else kind(value)
    except (KeyError, ValueError):
      raise ValueError(f'config argument {part!r}: {name} takes {kind.__name__}') from None
    if kind is not bool and not equals:
      raise ValueError(f'config argument {name!r} needs a value: {name}=...')
  return ml_collections.ConfigDict(values)


_BOOLS = {'': True, '1': True, 'true': True, '0': False, 'false': False}


def base():
  """Keys that both trainers read. Locked: a config file that sets a key which does not exist is an error."""
  config = ml_collections.ConfigDict()
  config.seed = 0                  # first values, order of the data, block dropout; 0 to 4294967295
  config.steps = 1000              # optimizer steps
  config.batch = 16                # rows of a global batch
  config.accumulate = 1            # slices that a batch is computed in, one after the other
  config.chunk = 512               # tokens per row whose logits exist at a time
  config.log_every = 10            # steps between two lines of metrics
  config.save_every = 500          # steps between two checkpoints
  config.keep = 2                  # checkpoints to keep
  config.peak_tflops = 0.0         # of a device, for MFU; 0: known by its kind, and no MFU where it is not (CPUs)
  config.profile = ''              # steps whose trace is written into WORKDIR/profile: '10:15' are 10 to 14
  config.wandb = ''                # project of Weights & Biases (extra `log`); empty: none

  config.model = ml_collections.ConfigDict()
  config.model.source = ''         # Hugging Face folder or hub name; empty: random values of the size below
  config.model.size = ''           # a name in blockattn/models/sizes.py; empty: all fields below
  config.model.fields = ml_collections.ConfigDict()   # of ModelConfig, replacing those of the size
  config.model.dtype = 'float32'   # of the trained parameters and the optimizer

  config.compute = ml_collections.ConfigDict()        # of transformer.Compute
  config.compute.dtype = 'float32'   # of activations: float32, bfloat16
  config.compute.impl = 'auto'     # attention: reference, xla, tpu, gpu; auto: see kernels.api
  config.compute.tiles = ()        # (query tile, key tile); empty: by device
  config.compute.remat = 'none'    # what the backward pass computes again: none, dots (all but matmuls), full
  config.compute.sent = -1         # rows over 'context': queries of a row that are sent to far keys, at most; -1: 1 in 64

  config.mesh = ml_collections.ConfigDict({'data': -1, 'fsdp': 1, 'tensor': 1, 'context': 1})   # -1: all that is left
  config.rules = mesh.RULES        # logical axis -> mesh axes

  config.optim = ml_collections.ConfigDict()          # of optim.OptimConfig
  config.optim.lr = 1e-4           # peak learning rate
  config.optim.final_lr = 0.1      # end of the cosine, as a fraction of lr
  config.optim.warmup = 100        # steps of linear warm-up; the first has lr / warmup
  config.optim.b1 = 0.9            # of Adam: decay of the mean of gradients
  config.optim.b2 = 0.95           # of Adam: decay of the mean of their squares
  config.optim.eps = 1e-8          # of Adam: added to the root of the latter
  config.optim.weight_decay = 0.0  # decoupled, of matrices only
  config.optim.clip = 1.0          # gradient norm above which gradients are scaled down; 0: never
  config.optim.mu_dtype = ''       # of Adam's first moment: float32, bfloat16; empty: that of the parameters

  config.blocks = ml_collections.ConfigDict()         # block mode, see blocks.BlockOptions
  config.blocks.sinks = 4          # sink tokens in front of every block
  config.blocks.sink_kind = 'token'   # 'token': an existing one; 'learned': new embedding rows
  config.blocks.sink_text = ''     # the token of kind 'token', and where learned ones start; empty: the line end
  config.blocks.positions = 'sequential'   # 'sequential', or 'local': every context block starts at 0

  config.data = ml_collections.ConfigDict()
  config.data.kind = 'files'       # 'files', or 'pages' of Python's standard library
  config.data.tokenizer = ''       # folder or hub name; empty: model.source
  config.data.length = 4096        # tokens of a row, T
  config.data.max_blocks = 64      # most blocks of a row
  config.data.shared_first = False   # a document's first block is a prefix that all its blocks read: needs local positions
  config.data.block_tokens = 0     # 0: the blocks that are given; else blocks of so many tokens, cut anywhere
  config.data.files = ()           # JSON lines: files, folders or globs; with commas between them on the command line
  config.data.chat = config_dict.placeholder(bool)   # wrap plain examples in the chat template; unset: if there is one
  config.data.template_args = ''   # of the chat template, 'enable_thinking=true,...'; see data/chat_template.py
  config.data.strict = False       # stop at the first malformed line instead of counting it
  config.data.too_long = 'drop'    # or 'cut': leave out context blocks without the answer
  config.data.cache = '.cache/blockattn'   # encoded documents
  config.data.segmenter = ''       # cuts new blocks: a folder, a hub name, or 'tiny', the embedded one; empty: those given
  config.data.segment = ml_collections.ConfigDict()
  config.data.segment.target = 0   # wanted length of a block in the model's tokens; 0: where the text has one
  config.data.segment.minimum = 0  # least length of a block; 0: see segmentation/granularity.py
  config.data.segment.maximum = 0  # greatest length of a block; 0: likewise
  config.data.segment.pages = 1.0  # kind 'pages': share of the pages that it cuts
  config.data.pages = ml_collections.ConfigDict()     # of stdlib.PageStyle
  config.data.pages.members = (2, 4)   # fewest and most members of a page
  config.data.pages.questions = (1, 1)   # fewest and most questions of a page
  config.data.pages.doc_chars = 40   # characters of what follows a docstring's first sentence
  config.data.pages.renamed = 0.7  # share of pages whose names are made up
  config.data.pages.split_words = 3   # words of a sentence's end in the block of its name; 0: whole sentences
  config.data.pages.seed = 0       # other pages
  return config.lock()


def _add_lora(config):
  config.lora = ml_collections.ConfigDict()             # of lora.LoraOptions
  config.lora.rank = 0             # train a difference of this rank to a frozen model; 0: train all parameters
  config.lora.alpha = 16.0         # the difference counts alpha / rank times
  config.lora.targets = ('q', 'k', 'v', 'o', 'gate', 'up', 'down')   # matrices that get a difference


def add_distill(config):
  """Keys of blockattn.train.distill."""
  with config.unlocked():
    _add_lora(config)
    config.teacher = ml_collections.ConfigDict()
    config.teacher.dtype = 'float32'          # of its frozen parameters: float32, bfloat16, int8 (matrices of 8 bits)
    config.teacher.compute_dtype = 'float32'  # of its activations
    config.teacher.rules = ()                 # logical axis -> mesh axes, where they differ from config.rules
    config.teacher.logits = ''                # folder of blockattn.train.teach: what it says, computed before; no teacher
    config.teacher.top_k = 64                 # tokens of each position that blockattn.train.teach keeps
    config.distill = ml_collections.ConfigDict()        # of distill.DistillOptions
    config.distill.drop_rate = 0.2            # block dropout, per context block
    config.distill.drop_mode = 'lift'         # lift, isolate, merge, remove
    config.distill.loss_over = 'readers'      # readers, text, answer
    config.distill.temperature = 1.0          # of both distributions in the KL, which counts temperature^2 times
    config.distill.ce_weight = 0.0            # of cross-entropy beside the KL
    config.distill.weights = ml_collections.ConfigDict()   # of losses.TokenWeights
    config.distill.weights.form = 'relu'      # relu, exp, none
    config.distill.weights.source = 'student'   # whose block-mode probability makes the gap: student, teacher
    config.distill.weights.floor = 0.1        # weight of a token without a gap, of relu
    config.distill.weights.cap = 5.0          # nats above which a gap counts no more


def add_finetune(config):
  """Keys of blockattn.train.finetune; the defaults are block fine-tuning (arXiv 2409.15355)."""
  with config.unlocked():
    _add_lora(config)
    config.finetune = ml_collections.ConfigDict()       # of finetune.FinetuneOptions
    config.finetune.mode = 'both'             # full, block, both
    config.finetune.text_weight = 0.0         # of every text token
    config.finetune.prompt_weight = 0.0       # more, on the last block's tokens in front of the answer
    config.finetune.answer_weight = 1.0       # more, on answer tokens


def add_segment(config):
  """Keys of blockattn.train.segment."""
  with config.unlocked():
    config.segment = ml_collections.ConfigDict()
    config.segment.markers = 'text'           # text, token, none, pooled: see segmentation/markers.py
    config.segment.head = 1024                # tokens that are read of a long unit: the first
    config.segment.tail = 256                 # tokens that are read of a long unit: the last
    config.segment.inner = 0                  # the first of a unit that does not begin a line; 0: head
    config.segment.middle = 0                 # of what lies between, so many tokens spread over it (pooled)
    config.segment.cohesion = False           # read with each unit how like its surroundings are (pooled)
    config.segment.ahead = 1                  # units behind a candidate that are read before it is decided on
    config.segment.cut_weight = 1.0           # of a cut in the loss
    config.segment.eval_files = ()            # validation documents
    config.segment.eval_every = 200           # steps between two measurements of F1; 0: never
    config.segment.eval_rows = 16             # rows of every category, and as many without hints
    config.segment.export_dtype = 'bfloat16'  # of the best parameters, in WORKDIR/best
    config.segment.draw = ml_collections.ConfigDict()   # of labelled.DrawOptions
    config.segment.draw.temperature = 4.0     # 1: categories as often as they come; a large one: all alike
    config.segment.draw.variants = 4          # texts that are made of each document
    config.segment.draw.bare = 0.4            # probability that a variant loses all surface hints
    config.segment.draw.hints = 0.3           # else, that it loses those of a kind
    config.segment.draw.variation = 0.3       # of each change of a surface
    config.segment.draw.short = 0.2           # that an excerpt ends after 4 to 60 units
    config.segment.draw.mosaic = 0.08         # that a text is made of short excerpts of several documents
    config.segment.draw.join = 0.5            # that an excerpt continues the text before it
    config.segment.draw.skip = 0.1            # share of units inside blocks that are left out
    config.segment.draw.drop = 0.1            # share of the tokens of a pooled unit that are read as nothing
    config.segment.draw.tolerance = 0         # candidates so near to a cut are not trained on
