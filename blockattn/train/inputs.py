"""What a training reads: the data section of a config as sources of packed rows, and the batches of one process."""

import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping, Sequence

import jax

from blockattn import errors, loading, mesh as mesh_lib
from blockattn.data import chat_template, encode, packing, sources, stdlib, stream, tables
from blockattn.errors import UserError
from blockattn.segmentation import cutter as segment_cutter, granularity, splitters

KINDS = ('files', 'pages')
_TEXT_BLOCK = 512   # tokens of a block of a text that no segmenter cuts
_CHARACTERS = 4     # of a token, as the rule that cuts it then counts
_JOIN_SEED = 11
_WATCHED = 32       # rows in which overlaps are looked for


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
  """Prompts of blocks, with answers, and texts.

  Attributes:
    kind: 'files', or 'pages' of Python's standard library
    files: JSON lines, parquet, Arrow: files, folders or globs; datasets: a folder of save_to_disk, or hub:OWNER/NAME. An
      entry is a path, or a dict with a path and with weight (share of the rows), mode (block, full), columns, name, split,
      see data/tables.py
    columns: a file's name of a column -> ours, in all entries that say none: {'context': 'blocks', 'question': 'prompt'}
    max_blocks: most blocks of a row
    shared_first: a document's first block is a prefix that all its blocks read: needs local positions
    block_tokens: 0: the blocks that are given; else blocks of so many tokens, cut anywhere
    join_blocks: random granularity: context blocks are joined in groups of 1 to so many, drawn for a document each time that
      it is read; 1: never
    chat: wrap plain examples in the chat template; None: if there is one
    eval_files: held-out documents, as `files`, or 'pages:validation' of the standard library; empty: none, see config.eval
    template_args: of the chat template, 'enable_thinking=true,...'; see data/chat_template.py for what is default
    too_long: 'drop', or 'cut': leave out context blocks without the answer
    workers: threads that read and encode ahead of the training
    segmenter: cuts new blocks: a folder, a hub name, or 'tiny', the embedded one; empty: those given, and of texts without a
      question paragraphs of about segment.target tokens
    segment: how fine the segmenter cuts
    pages: of stdlib.PageStyle
  """
  kind: str = 'files'
  files: tuple[str | Mapping, ...] = ()
  columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
  max_blocks: int = 64
  shared_first: bool = False
  block_tokens: int = 0
  join_blocks: int = 1
  chat: bool | None = None
  eval_files: tuple[str | Mapping, ...] = ()
  template_args: str = ''
  too_long: str = 'drop'
  workers: int = 2
  segmenter: str = ''
  segment: CutOptions = CutOptions()
  pages: stdlib.PageStyle = stdlib.PageStyle()

  def __post_init__(self):
    super().__post_init__()
    errors.check_choice('config.data.kind', self.kind, KINDS)
    errors.check_choice('config.data.too_long', self.too_long, encode.TOO_LONG)
    errors.check_number('config.data.max_blocks', self.max_blocks, 1, 2 ** 24)
    errors.check_number('config.data.block_tokens', self.block_tokens, 0)
    errors.check_number('config.data.join_blocks', self.join_blocks, 1)
    errors.check_number('config.data.workers', self.workers, 1, 256)
    shares(self)
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


def shares(data: PromptData) -> list[tuple[float, list[tables.Origin]]]:
  """[(share of the rows, what they are from)]: of each entry of data.files that has a weight, and of all others together.

  Raises:
    ValueError: an entry that says what it is in no known way, or weights that leave nothing for the others.
  """
  origins = [tables.origin(entry, data.columns) for entry in data.files]
  rest = [one for one in origins if one.weight is None]
  weighted = [(one.weight, [one]) for one in origins if one.weight is not None]
  total = sum(weight for weight, _ in weighted)
  if rest and total >= 1:
    raise UserError(f'config.data.files: the weights are {total:g} in all and leave nothing for {rest[0].path}: they are '
                    'shares of the rows; give every entry one, or less than 1 in all')
  return [(1 - total, rest)] + weighted if rest else [(weight / total, one) for weight, one in weighted]


def file_options(data: PromptData, tokenizer) -> sources.FileOptions:
  """How files become rows."""
  return sources.FileOptions(length=data.length, max_blocks=data.max_blocks, too_long=data.too_long,
                             chat=chat_template.wants_chat(data.chat, tokenizer), block_tokens=data.block_tokens,
                             shared_first=data.shared_first)


def prompt_meta(data: PromptData, tokenizer) -> dict:
  """How prompts were made in training, so that the model is asked the same way."""
  chat = data.kind == 'files' and chat_template.wants_chat(data.chat, tokenizer)
  return {'chat': chat, 'template_args': data.template_args}


def load_rows(data: PromptData, tokenizer):
  """The source of packed rows, or the mixture of some. Malformed lines are printed when they are met."""
  if data.kind == 'pages':
    return page_rows(data, tokenizer, split='train')
  tell = (lambda bad: print(f'left out: {bad}', file=sys.stderr, flush=True)) if jax.process_index() == 0 else None
  source = file_rows(data, tokenizer, tell=tell)
  for part in stream.parts_of(source):
    part.check()
  return source


def file_rows(data: PromptData, tokenizer, tell=None):
  """The rows of data.files; `tell`: see sources.FileRows."""
  if not data.files:
    raise UserError('config.data.files is empty: give JSON lines, parquet or Arrow files, e.g. '
                    '--config.data.files=train.jsonl,more/')
  weights, origins = zip(*shares(data))
  parts = [*map(file_reader(data, tokenizer, tell), origins)]
  return stream.Mixture(tuple(parts), weights) if len(parts) > 1 else parts[0]


def file_reader(data: PromptData, tokenizer, tell=None) -> Callable[[Sequence[tables.Origin]], sources.FileRows]:
  """What makes sources of origins, all of which share what takes seconds to load: the encoder and the segmenter."""
  return functools.partial(
      sources.FileRows, tokenizer=tokenizer, options=file_options(data, tokenizer), strict=data.strict,
      cutter=load_cutter(data, tokenizer), text_cutter=TextRule(data.segment.target or _TEXT_BLOCK), tell=tell,
      encoder=encode.Encoder(tokenizer))


class TextRule:
  """Cuts texts at blank lines and other separators, into blocks of at most so many tokens where it finds some; by the rule
  of arXiv 2409.15355, see splitters.separator_rule."""

  def __init__(self, tokens: int):
    self._cut, self.fingerprint = splitters.separator_rule(tokens * _CHARACTERS), f'separators, {tokens} tokens'

  def __call__(self, texts):
    return list(map(self._cut, texts))


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


def batches(options, source, placement: mesh_lib.Placement, add: Callable[[int, dict], dict] | None = None):
  """This process's rows of the global batches, see stream.batches."""
  workers = 1 if getattr(options.data, 'segmenter', '') else getattr(options.data, 'workers', 1)   # one model cuts at a time
  return stream.batches(source, batch=options.batch, seed=options.seed, rows=own_rows(placement, options.batch),
                        workers=workers, changes=[change for change in (joiner(options), add) if change])


def overlap_watch(overlap: int) -> Callable[[dict], None]:
  """What looks at host batches, and says so, once, if blocks are to overlap by so many tokens and none of many goes on with
  the one before. The first process does."""
  rows = 0 if overlap and jax.process_index() == 0 else None   # looked at; None: nothing more to look for

  def look(batch):
    nonlocal rows
    if rows is None:
      return
    rows += len(batch['tokens'])
    if batch['continued'].any():
      rows = None
    elif rows >= _WATCHED:
      print(f'config.blocks.overlap={overlap}, and in {rows} rows no block goes on with the one before: say which do with '
            '"continued" in the data (docs/data.md), or train without an overlap', file=sys.stderr, flush=True)
      rows = None

  return look


def joiner(options) -> Callable[[int, dict], dict] | None:
  """What joins the blocks of a row, see packing.join_blocks; None if none are joined."""
  most = getattr(options.data, 'join_blocks', 1)
  return Joiner(most, options.seed) if most > 1 else None


@dataclasses.dataclass(frozen=True)
class Joiner:
  """Joins blocks as the number of a row in the stream decides."""
  most: int
  seed: int

  def fingerprint(self) -> dict[str, str]:
    return {'config.data.join_blocks': str(self.most)}

  def __call__(self, number, row):
    return row | {'layout': packing.join_blocks(row['layout'], self.most, (_JOIN_SEED, self.seed, number))}


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
