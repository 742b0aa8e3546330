"""What a training reads: the data section of a config as a source of packed rows, and the batches of one process."""

import dataclasses

import jax
import numpy as np

from blockattn import errors, loading, mesh as mesh_lib
from blockattn.data import chat_template, encode, sources, stdlib, store, stream
from blockattn.errors import UserError
from blockattn.segmentation import cutter as segment_cutter, granularity

KINDS = ('files', 'pages')


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataOptions:
  """
  Attributes:
    tokenizer: folder, hub name or work directory; empty: model.source
    length: tokens of a row, T
    files: JSON lines: files, folders or globs; with commas between them on the command line
    strict: stop at the first malformed line instead of counting it
  """
  tokenizer: str = ''
  length: int = 4096
  files: tuple[str, ...] = ()
  strict: bool = False

  def __post_init__(self):
    errors.check_number('config.data.length', self.length, 2, 2 ** 24)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CutOptions:
  """
  Attributes:
    target: wanted length of a block in the model's tokens; None: where the text has one
    minimum: least length of a block; None: see segmentation/granularity.py
    maximum: greatest length of a block; None: likewise
    pages: kind 'pages': share of the pages that it cuts
  """
  target: int | None = None
  minimum: int | None = None
  maximum: int | None = None
  pages: float = 1.0

  def __post_init__(self):
    for name in ('target', 'minimum', 'maximum'):
      if getattr(self, name) is not None:
        errors.check_number(f'config.data.segment.{name}', getattr(self, name), 1)
    errors.check_number('config.data.segment.pages', self.pages, 0, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptData(DataOptions):
  """Prompts of blocks, with answers.

  Attributes:
    kind: 'files', or 'pages' of Python's standard library
    max_blocks: most blocks of a row
    shared_first: a document's first block is a prefix that all its blocks read: needs local positions
    block_tokens: 0: the blocks that are given; else blocks of so many tokens, cut anywhere
    chat: wrap plain examples in the chat template; None: if there is one
    template_args: of the chat template, 'enable_thinking=true,...'; see data/chat_template.py for what is default
    too_long: 'drop', or 'cut': leave out context blocks without the answer
    cache: folder for encoded documents
    segmenter: cuts new blocks: a folder, a hub name, or 'tiny', the embedded one; empty: those given
    segment: how fine the segmenter cuts
    pages: of stdlib.PageStyle
  """
  kind: str = 'files'
  max_blocks: int = 64
  shared_first: bool = False
  block_tokens: int = 0
  chat: bool | None = None
  template_args: str = ''
  too_long: str = 'drop'
  cache: str = '.cache/blockattn'
  segmenter: str = ''
  segment: CutOptions = CutOptions()
  pages: stdlib.PageStyle = stdlib.PageStyle()

  def __post_init__(self):
    super().__post_init__()
    errors.check_choice('config.data.kind', self.kind, KINDS)
    errors.check_choice('config.data.too_long', self.too_long, encode.TOO_LONG)
    errors.check_number('config.data.max_blocks', self.max_blocks, 1, 2 ** 24)
    errors.check_number('config.data.block_tokens', self.block_tokens, 0)
    if self.segmenter and self.block_tokens:
      raise UserError(f'config.data.block_tokens={self.block_tokens} and config.data.segmenter={self.segmenter!r} both '
                      'say where blocks end; leave one of them out')
    if self.segmenter:
      fineness(self.segment)   # which refuses bounds that contradict each other


def fineness(cut: CutOptions) -> granularity.Granularity:
  """How fine the segmenter cuts."""
  return granularity.wanted(target=cut.target, minimum=cut.minimum, maximum=cut.maximum)


def load_tokenizer(data: PromptData, source: str):
  """data.tokenizer, or that of the model `source`, with the arguments of its chat template."""
  return encode.load_tokenizer(loading.tokenizer_of(data.tokenizer or source), data.template_args)


def file_options(data: PromptData, tokenizer) -> store.FileOptions:
  """How files become rows."""
  return store.FileOptions(length=data.length, max_blocks=data.max_blocks, too_long=data.too_long,
                           chat=chat_template.wants_chat(data.chat, tokenizer), block_tokens=data.block_tokens,
                           shared_first=data.shared_first)


def prompt_meta(data: PromptData, tokenizer) -> dict:
  """How prompts were made in training, so that the model is asked the same way."""
  chat = data.kind == 'files' and chat_template.wants_chat(data.chat, tokenizer)
  return {'chat': chat, 'template_args': data.template_args}


def load_rows(data: PromptData, tokenizer):
  """The source of packed rows."""
  if data.kind == 'pages':
    return page_rows(data, tokenizer, split='train')
  if not data.files:
    raise UserError('config.data.files is empty: give JSON lines files, e.g. --config.data.files=train.jsonl,more/')
  source = sources.FileRows(list(data.files), tokenizer, file_options(data, tokenizer), data.cache, strict=data.strict,
                            cutter=load_cutter(data, tokenizer))
  if jax.process_index() == 0 and source.report.docs < source.report.lines:
    print(source.report.summary())
  return source


def load_cutter(data: PromptData, tokenizer):
  """What cuts contexts in place of the given blocks; None without a segmenter. Lengths count the tokens of `tokenizer`,
  which is the model's."""
  if not data.segmenter:
    return None
  # Each process cuts its own texts.
  placement = mesh_lib.Placement(mesh_lib.make_mesh({'data': -1}, jax.local_devices()))
  return segment_cutter.Cutter(data.segmenter, fineness(data.segment), placement, tokenizer)


def page_rows(data: PromptData, tokenizer, *, split: str, own_blocks: bool = False, **style):
  """Pages of Python's standard library, of the containers of a split; `style` replaces fields of data.pages. `own_blocks`:
  no segmenter cuts any of them."""
  containers = stdlib.split_containers(stdlib.read_containers(), split)
  return sources.PageRows(containers, dataclasses.replace(data.pages, **style), tokenizer, length=data.length,
                           max_blocks=data.max_blocks, block_tokens=data.block_tokens, shared_first=data.shared_first,
                           cutter=None if own_blocks else load_cutter(data, tokenizer), cut_share=data.segment.pages)


def needed_rows(options, source) -> np.ndarray:
  """Numbers of the source's rows that a training reads, ascending."""
  return stream.row_numbers(source, options.steps * options.batch, options.seed)


def batches(options, source, placement: mesh_lib.Placement):
  """This process's rows of the global batches, see stream.batches."""
  return stream.batches(source, batch=options.batch, seed=options.seed, rows=own_rows(placement, options.batch))


def own_rows(placement: mesh_lib.Placement, batch: int) -> list[int]:
  """The rows of a global batch that the devices of this process hold, ascending.

  Processes that share a row, because 'tensor' or 'context' goes over several of them, all hold and read it.

  Raises:
    ValueError: two processes hold some rows together and others alone.
  """
  held = {}
  for device, (part,) in placement.sharding(('batch',)).devices_indices_map((batch,)).items():
    held.setdefault(device.process_index, set()).update(range(batch)[part])
  distinct = {frozenset(rows) for rows in held.values()}
  if sum(map(len, distinct)) > batch:
    raise UserError('config.mesh lets some processes share a part of their rows only: the devices of a process, '
                    f'{jax.local_device_count()} here, must divide tensor * context, or be a multiple of it')
  return sorted(held[jax.process_index()])
