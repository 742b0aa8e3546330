"""Blocks of text and who may attend to whom.

Axis names, used as suffixes everywhere in the project (`x_BTD`, `q_BTNH`):

  B batch row   T token (query)   S token (key)   D model width   N query head   K key/value head
  H head width  F mlp width       V vocabulary    L layer

A `BlockLayout` says everything that attention needs to know about a batch of packed documents. `may_attend` is the one
definition of the mask; the dense reference, the tile schedule, every kernel and the cache are derived from it:

  query  0  1  2  3  4  5  6  7      the picture of a doc of three blocks, two context blocks
  key 0  1                           ("0 1 2" and "3 4") and the question ("5 6 7"), which reads
      1  1  1                        everything before it: rows are queries, columns are keys.
      2  1  1  1
      3  .  .  .  1
      4  .  .  .  1  1
      5  1  1  1  1  1  1
      6  1  1  1  1  1  1  1
      7  1  1  1  1  1  1  1  1

What others call their method is a layout too; `print(picture(...))` draws it:

  full attention              as_one_block(from_lengths([[[2, 2, 2]]], 6))
  Block-Attention             from_lengths([[[2, 2, 2]]], 6)
  Star Attention              from_lengths([[[1, 2, 2, 1]]], 6, shared_first=True)
  parallel context windows    from_lengths([[[2, 2, 2]]], 6, positions='local')
  KVLink                      with_readers(from_lengths([[[2, 1, 2, 1, 2]]], 8), (1, 3))

In Star Attention the first block is the anchor that every later block reads. KVLink's link tokens are blocks of their own,
here 1 and 3, behind the documents 0 and 2: they read everything before them, the documents read only themselves. Links, tail
tokens within blocks and seam readers are what `block_mode` inserts beside sinks, see `insert`.
"""

import dataclasses
import itertools
from collections.abc import Collection, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from blockattn import errors
from blockattn.errors import UserError

Array = jax.Array   # or, on the host, numpy's
Field = Any         # an array of jax's, on the host of numpy's, in a model of transformers of torch's

POSITION_SCHEMES = ('sequential', 'local')
DROP_MODES = ('lift', 'isolate', 'merge', 'remove')
ROOMS = 4   # sizes that the student's rows have, at most: a step is compiled for each that is met


class BlockLayout(flax.struct.PyTreeNode):
  """Per-token facts, each an array [B, T].

  Attributes:
    doc: int32, which packed document of the row, 1, 2, ... in order; 0 = padding, or a token that was removed.
    block: int32, index of the block inside its document.
    position: int32, rotary position.
    reader: bool, the token's block reads all earlier visible blocks of its document.
    hidden: bool, the token's block is invisible to every other block.
    shared: bool, the token's block is visible to every later block.
  """
  doc: Field
  block: Field
  position: Field
  reader: Field
  hidden: Field
  shared: Field


def from_lengths(rows: Sequence[Sequence[Sequence[int]]], length: int, *, shared_first: bool = False,
                 positions: str = 'sequential') -> BlockLayout:
  """The layout of packed documents, built on the host.

  Args:
    rows: for each row of the batch its documents, for each document the lengths of its blocks, in tokens. The last
      block of every document is a reader.
    length: T; what the documents leave free is padding at the end of the row.
    shared_first: the first block of every document of two or more blocks is a shared prefix.
    positions: 'sequential' or 'local', see `with_positions`.

  Returns:
    BlockLayout of numpy arrays [len(rows), length].

  Raises:
    ValueError: a row is longer than `length`, a block is empty, a level of nesting is missing, or the position scheme is
      unknown.
  """
  if not all(np.iterable(docs) and all(map(np.iterable, docs)) for docs in rows):
    raise UserError(f'rows must be rows of documents of lengths of blocks, such as [[[3, 3]]], got {rows}; one document in '
                    'one row takes three brackets')
  shape = (len(rows), length)
  ints = {name: np.zeros(shape, np.int32) for name in ('doc', 'block', 'position')}
  flags = {name: np.zeros(shape, bool) for name in ('reader', 'hidden', 'shared')}
  for b, docs in enumerate(rows):
    start = 0
    for d, sizes in enumerate(docs, start=1):
      for i, (size, position) in enumerate(zip(sizes, block_positions(sizes, positions, shared_first))):
        if size < 1:
          raise UserError(f'row {b}, document {d}: block {i} has {size} tokens; drop empty blocks first')
        stop, last = start + size, i == len(sizes) - 1
        if stop > length:
          raise UserError(f'row {b} holds {sum(map(sum, docs))} tokens, but T is {length}; drop documents, or make rows '
                          'longer')
        ints['doc'][b, start:stop] = d
        ints['block'][b, start:stop] = i
        ints['position'][b, start:stop] = np.arange(position, position + size)
        flags['reader'][b, start:stop] = last
        start = stop
  layout = BlockLayout(**ints, **flags)
  return share_first(layout) if shared_first else layout


def share_first(layout: BlockLayout) -> BlockLayout:
  """The first block of every document of two or more blocks becomes a prefix that all blocks of the document read."""
  return layout.replace(shared=(layout.doc != 0) & (layout.block == 0) & ~layout.reader)


def block_positions(lengths: Sequence[int], scheme: str, shared_first: bool = False, readers: Collection[int] = (),
                    unseen: Sequence[int] = ()) -> list[int]:
  """Position of the first token of each block: what `with_positions` gives a document of which the last block and those of
  the numbers `readers` read, and of whose blocks the first `unseen` tokens are read by their own block alone."""
  errors.check_choice('positions', scheme, POSITION_SCHEMES)
  if scheme == 'sequential':
    unseen = unseen or [0] * len(lengths)
    seen = [length - count for length, count in zip(lengths, unseen, strict=True)]
    return [start - count for start, count in zip(itertools.accumulate(seen, initial=0), unseen)]
  starts, longest, read = [], 0, 0
  for i, length in enumerate(lengths):
    if i in readers or i == len(lengths) - 1:
      starts.append(max(longest, read))
      read = starts[-1] + length
    else:
      starts.append(lengths[0] if shared_first and i else 0)
      longest = max(longest, starts[-1] + length)
  return starts


def with_readers(layout: BlockLayout, numbers: Sequence[int]) -> BlockLayout:
  """The blocks of these numbers, in every document, read all blocks before them, as the last one does."""
  return layout.replace(reader=layout.reader | np.isin(layout.block, numbers) & (layout.doc != 0))


def sees(query: BlockLayout, key: BlockLayout) -> Field:
  """Who may attend to whom, the order of the tokens apart: the one line of the mask.

  Operators alone, so that it serves numpy, jax and torch: the fields of `query` and `key` broadcast against each other.
  """
  same_doc = (query.doc == key.doc) & (query.doc != 0)
  return same_doc & ((query.block == key.block) | key.shared | (query.reader & ~key.hidden))


def may_attend(layout: BlockLayout) -> Array:
  """The mask: bool [B, T, S], true where query t may attend to key s. A padding row attends to nothing."""
  index = jnp.arange(layout.doc.shape[1])
  query, key = jax.tree.map(lambda x: x[:, :, None], layout), jax.tree.map(lambda x: x[:, None, :], layout)
  return (index <= index[:, None]) & sees(query, key)


def picture(layout: BlockLayout, row: int = 0) -> str:
  """The mask of one batch row in characters: '1' where a query (row) sees a key (column), '.' where it does not."""
  mask = np.asarray(may_attend(jax.tree.map(lambda x: x[row:row + 1], layout)))[0]
  return '\n'.join(' '.join('1' if seen else '.' for seen in line) for line in mask)


def as_one_block(layout: BlockLayout) -> BlockLayout:
  """The teacher's layout: the same documents, each one block at positions 0, 1, ...: plain causal attention.

  The teacher never sees sinks, so `layout` must be the layout before `insert`.
  """
  nothing = jnp.zeros_like(layout.hidden)
  one = layout.replace(block=jnp.zeros_like(layout.block), reader=layout.doc != 0, hidden=nothing, shared=nothing)
  return with_positions(one, 'sequential')


def with_positions(layout: BlockLayout, scheme: str, unseen: Array | None = None) -> BlockLayout:
  """Numbers the tokens anew.

  'sequential': one count over the document, sinks included. 'local': every context block starts at 0, or right after
  the shared prefix, as it does in a cache of blocks; a reader starts after the longest block before it, a further
  reader after the one before. Removed tokens and padding take no position (theirs is 0).

  Args:
    unseen: bool [B, T], first tokens of blocks that are read by their own block alone. The one count leaves them out, and
      they are numbered backwards from what follows in their block: what others see stands without a gap, as it does in
      pages of a cache that leaves them out.
  """
  errors.check_choice('positions', scheme, POSITION_SCHEMES)
  valid = layout.doc != 0
  if scheme == 'sequential' and unseen is not None:
    ahead = _in_block(unseen, block_numbers(layout)) - offsets(layout)
    position = _rank(valid & ~unseen, layout.doc) - jnp.where(unseen, ahead, 0)
  elif scheme == 'sequential':
    position = _rank(valid, layout.doc)
  else:
    position = _local_positions(layout, valid)
  return layout.replace(position=jnp.where(valid, position, 0).astype(jnp.int32))


def _rank(member, doc):
  """How many members of its own document stand before each token: int32 [B, T]."""
  member = _whole(member)
  before = jnp.cumsum(member, axis=1) - member
  return before - _running_max(jnp.where(_doc_starts(doc), before, 0))


def _doc_starts(doc):
  """True at the first token of each document (removed tokens inside a document have doc 0)."""
  seen = _running_max(doc)
  return doc > jnp.pad(seen, ((0, 0), (1, 0)))[:, :-1]


def _whole(x):
  return jnp.asarray(x).astype(jnp.int32)


def _running_max(x):
  return jax.lax.cummax(jnp.asarray(x), axis=1)


def _local_positions(layout, valid):
  doc = jnp.asarray(layout.doc)
  # Values of an earlier document must not reach a later one: lift each document's values above the last one's.
  lift = _running_max(doc) * (4 * doc.shape[1])
  max_so_far = lambda values, where: _running_max(jnp.where(where, values + lift, lift)) - lift
  offset = offsets(layout)
  shared, reader = jnp.asarray(layout.shared) & valid, jnp.asarray(layout.reader) & valid
  prefix = _rank(shared, doc)
  context = jnp.where(shared, prefix, prefix + offset)
  # A reader's start is max-plus over the readers before it: each starts after the longest context block so far and
  # after the previous reader. Subtracting the count of reader tokens turns that into one running maximum.
  read_before = _rank(reader, doc)
  longest = max_so_far(context + 1, valid & ~reader)
  shift = 2 * doc.shape[1]   # keeps the values positive, above the floor that max_so_far fills in
  start = max_so_far(longest - read_before + shift, reader) - shift
  return jnp.where(reader, start + read_before, context)


def block_starts(layout: BlockLayout) -> Array:
  """True at the first remaining token of each block: bool [B, T]."""
  doc, block = jnp.asarray(layout.doc), jnp.asarray(layout.block)
  # Blocks are contiguous apart from removed tokens, so a running maximum of (doc, block) finds the first of each.
  key = jnp.where(doc != 0, doc * (doc.shape[1] + 1) + block + 1, 0)
  return key > jnp.pad(_running_max(key), ((0, 0), (1, 0)))[:, :-1]


def block_numbers(layout: BlockLayout) -> Array:
  """Number of each token's block in its row: int32 [B, T]."""
  return jnp.clip(jnp.cumsum(block_starts(layout), axis=1, dtype=jnp.int32) - 1, 0)


def _in_block(member, number):
  """How many members the block of each token has, of which `number` is the row's block: int32 [B, T]."""
  b = jnp.arange(number.shape[0])[:, None]
  return jnp.take_along_axis(jnp.zeros_like(number).at[b, number].add(_whole(member)), number, axis=1)


def offsets(layout: BlockLayout) -> Array:
  """How many remaining tokens of its own block stand before each token: int32 [B, T]."""
  doc = jnp.asarray(layout.doc)
  rank = jnp.cumsum(doc != 0, axis=1, dtype=jnp.int32) - 1
  return rank - _running_max(jnp.where(block_starts(layout), rank, 0))


def drop_blocks(layout: BlockLayout, key: Array, *, rate: float, mode: str, positions: str) -> BlockLayout:
  """Block dropout: with probability `rate`, each context block is changed so that the student learns to live with it.

  Args:
    layout: before sinks are inserted. Readers and shared blocks are never dropped.
    key: typed PRNG key.
    rate: probability per context block, 0 to 1.
    mode: 'lift': the block becomes a reader and stays visible. 'isolate': it becomes a reader and is hidden from all
      others, so that what they see stays what inference caches. 'merge': its boundary to the previous block is
      removed (a document's first block has none and is kept). 'remove': its tokens are taken out of the context.
    positions: scheme for numbering the tokens of the new layout.
  """
  errors.check_choice('mode', mode, DROP_MODES)
  doc, block = jnp.asarray(layout.doc), jnp.asarray(layout.block)
  coins = _coin_per_block(layout, key, rate)
  dropped = coins & (doc != 0) & ~jnp.asarray(layout.reader) & ~jnp.asarray(layout.shared)
  if mode == 'lift':
    layout = layout.replace(reader=layout.reader | dropped)
  elif mode == 'isolate':
    layout = layout.replace(reader=layout.reader | dropped, hidden=layout.hidden | dropped)
  elif mode == 'remove':
    layout = layout.replace(doc=jnp.where(dropped, 0, doc))
  else:
    # A boundary vanishes where a dropped block starts behind another context block of its document.
    starts = block_starts(layout) & dropped & (block > 0)
    fixed = jnp.asarray(layout.shared) | jnp.asarray(layout.reader)
    after_fixed = jnp.pad(fixed, ((0, 0), (1, 0)))[:, :-1]
    layout = layout.replace(block=block - _rank_inclusive(starts & ~after_fixed, doc))
  return with_positions(layout, positions)


def _rank_inclusive(member, doc):
  return _rank(member, doc) + member.astype(jnp.int32)


def _coin_per_block(layout, key, rate):
  """One Bernoulli(rate) draw per block, repeated over its tokens: bool [B, T]."""
  doc = jnp.asarray(layout.doc)
  draws = jax.random.bernoulli(key, rate, doc.shape)
  return jnp.take_along_axis(draws, block_numbers(layout), axis=1)


@dataclasses.dataclass(frozen=True)
class BlockOptions:
  """How block mode looks to a model: decided at training, and but for `seam` the same for ever after.

  Attributes:
    sink_ids: token ids inserted in front of every block; their number is the number of sinks.
    positions: scheme, see `with_positions`.
    max_blocks: most blocks in a row of packed documents: bounds the room that sinks take.
    shared_first: the first block of every document or prompt of two or more blocks is a prefix that all its blocks read.
    tail_ids: token ids inserted behind every block but the last.
    links: the tail is a block of its own that reads all before it (KVLink); else part of the block in front of it.
    seam: of every context block but the first so many text tokens are read again, behind what stands before them; it may be
      chosen anew for every prompt, since no state of a block depends on it.
    align: blocks but the last are made a multiple of so many tokens by repeating the first sink.
    hide_starts: the sinks of every context block but a document's first, or without any its first token, are read by their
      own block alone, and take none of the `sequential` positions. A model that gives much attention to the first token of
      all makes one of that kind in every block; so a reader meets one of them. No state of a block depends on it.
    overlap: a context block that goes on with the text of the one before it is read behind the last tokens of that, so many,
      which are hidden as its start is. Its state depends on them, too, and on nothing else. Of a prompt those go on that
      are `Continued`, of rows those that `continued` says, see `insert`.
  """
  sink_ids: tuple[int, ...]
  positions: str
  max_blocks: int
  shared_first: bool = False
  tail_ids: tuple[int, ...] = ()
  links: bool = False
  seam: int = 0
  align: int = 1
  hide_starts: bool = False
  overlap: int = 0

  def __post_init__(self):
    errors.check_choice('positions', self.positions, POSITION_SCHEMES)
    if self.max_blocks < 1 or min(self.own_ids, default=0) < 0:
      raise UserError(f'max_blocks={self.max_blocks}, sink_ids={self.sink_ids}, tail_ids={self.tail_ids}: blocks are '
                      'counted from 1, ids from 0')
    if self.overlap < 0 or self.overlap and not self.hide_starts:
      raise UserError(f'overlap={self.overlap}, hide_starts={self.hide_starts}: an overlap has 0 tokens or more, which are '
                      'hidden as starts are')
    if self.seam < 0 or self.align < 1 or self.align > 1 and not self.sink_ids:
      raise UserError(f'seam={self.seam}, align={self.align}: a seam has 0 tokens or more, blocks are aligned to 1 token or '
                      'more, above 1 by repeating a sink, of which there must be one')

  @property
  def own_ids(self) -> tuple[int, ...]:
    """The tokens that are inserted."""
    return (*self.sink_ids, *self.tail_ids)

  @property
  def most_placed(self) -> int:
    """Most tokens that are inserted for a block and are not copies beside it."""
    return len(self.own_ids) + self.align - 1 + self.overlap

  def most_positions(self, count: int) -> int:
    """Most positions that what is inserted takes in a document of so many blocks. Copies have those of their originals;
    hidden tokens take none, or, `local`, are part of blocks of which the longest counts."""
    fronts = min(count, 2) if self.hide_starts else count
    return (fronts * (len(self.sink_ids) + self.align - 1) + (count - 1) * len(self.tail_ids)
            + (self.overlap if self.positions == 'local' else 0))

  @property
  def most_added(self) -> int:
    """Most tokens that are inserted for a block."""
    return self.most_placed + self.seam

  @property
  def bare(self) -> 'BlockOptions':
    """The same without anything inserted: for a model that never saw it."""
    return dataclasses.replace(self, sink_ids=(), tail_ids=(), links=False, seam=0, align=1, hide_starts=False, overlap=0)

  def with_seam(self, seam: int | None) -> 'BlockOptions':
    """The same with so many tokens of a seam; None: with those that it has."""
    return self if seam is None else dataclasses.replace(self, seam=seam)

  def front(self, tokens: Field) -> Field:
    """How many sinks stand in front of a block but the last of so many text tokens, an overlap included; int or array."""
    count = len(self.sink_ids)
    return count + -(count + tokens + (0 if self.links else len(self.tail_ids))) % self.align


@dataclasses.dataclass(frozen=True)
class PlacedBlock:
  """A block of a prompt, or one that is inserted between them.

  Attributes:
    tokens: sinks, overlap and tail included.
    start: position of the first, which those that no other block sees share with tokens before them (sequential).
    reads: of a reader, how many of the prompt's blocks it reads, beside the readers before it; None: it reads itself alone,
      and a shared prefix.
    copy: its tokens are seam tokens of the block behind it, at the same positions.
    seam: (start, stop) of the tokens that stand in the copy before it.
    hidden: (start, stop) of the tokens that no other block sees: a hidden start, the overlap, and those of the seam.
  """
  tokens: tuple[int, ...]
  start: int
  reads: int | None = None
  copy: bool = False
  seam: tuple[int, int] = (0, 0)
  hidden: tuple[int, int] = (0, 0)

  @property
  def unseen(self) -> tuple[int, int]:
    """(start, stop) of the tokens that no other block sees where copies have taken the place of the seam."""
    (start, stop), (copied, end) = self.hidden, self.seam
    return (start, copied) if copied < end else (start, stop)


class Continued(list):
  """Token ids of a block of a prompt whose text goes on with that of the one before, see `BlockOptions.overlap`. Slices and
  copies are plain lists. A prompt's first block has nothing to go on with, and the last one, which reads all, needs none."""


def place_prompt(prompt: Sequence[Sequence[int]], options: BlockOptions) -> tuple[PlacedBlock, ...]:
  """The blocks of a prompt with what is inserted, in order, the last that of the question.

  Args:
    prompt: token ids of each context block and, last, of the question; `Continued` of a block that goes on.

  Raises:
    ValueError: no block, or an empty one.
  """
  if not len(prompt) or not all(len(tokens) for tokens in prompt):
    raise UserError('a prompt must be a list of blocks, none of them empty, the question last; got '
                    f'{[len(tokens) for tokens in prompt]} tokens: drop empty blocks first')
  *context, question = [tuple(map(int, tokens)) for tokens in prompt]
  goes_on = [isinstance(tokens, Continued) for tokens in prompt]
  own, tail = [], () if options.links else options.tail_ids   # all but the copies
  for i, text in enumerate(context):
    overlaps = options.overlap and i > options.shared_first and goes_on[i]
    before, seam = context[i - 1][-options.overlap:] if overlaps else (), min(options.seam, len(text)) if i else 0
    sinks = options.front(len(before) + len(text))
    inserted = (*options.sink_ids[:1] * (sinks - len(options.sink_ids)), *options.sink_ids, *before)
    front = len(inserted)
    copied = (front, front + seam) if seam else (0, 0)
    hidden = (0, max(front + seam, 1)) if options.hide_starts and i else copied
    own.append(PlacedBlock((*inserted, *text, *tail), 0, seam=copied, hidden=hidden))
    if options.links and options.tail_ids:
      own.append(PlacedBlock(options.tail_ids, 0, reads=i + 1))
  own.append(PlacedBlock((*options.sink_ids, *question), 0, reads=len(context)))
  readers = [i for i, block in enumerate(own) if block.reads is not None]
  unseen = [stop - start for start, stop in (block.unseen for block in own)]
  lengths = [len(block.tokens) for block in own]
  starts = block_positions(lengths, options.positions, options.shared_first, readers, unseen)
  placed, before = [], 0   # blocks of the prompt
  for block, start in zip(own, starts, strict=True):
    first, stop = block.seam
    if first < stop:
      placed.append(PlacedBlock(block.tokens[first:stop], start + first, reads=before, copy=True))
    placed.append(dataclasses.replace(block, start=start))
    before += block.reads is None
  return tuple(placed)


def check_cacheable(options: BlockOptions) -> None:
  """Raises ValueError where the state of a block depends on more than the block and the shared prefix."""
  if options.shared_first and options.positions != 'local':
    raise UserError("with shared_first, positions must be 'local' for states to be used twice, got "
                    f'{options.positions!r}: the distance between prefix and block depends on the blocks between them; '
                    'train with local positions, or read every prompt in one masked pass')


def prompt_layout(rows: Sequence[Sequence[PlacedBlock]], length: int, shared_first: bool = False) -> BlockLayout:
  """The layout of one masked pass over placed prompts, a row each: numpy arrays [len(rows), length]."""
  layout = from_lengths([[[len(block.tokens) for block in row]] for row in rows], length, shared_first=shared_first)
  for b, row in enumerate(rows):
    at = 0
    for block in row:
      stop = at + len(block.tokens)
      layout.position[b, at:stop] = np.arange(block.start, block.start + len(block.tokens))
      layout.reader[b, at:stop] = block.reads is not None
      layout.hidden[b, at + block.hidden[0]:at + block.hidden[1]] = True
      at = stop
  return layout


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Room:
  """For how many blocks each row of a batch has room. As a node of a pytree it has no leaves: a jitted function is compiled
  for each room once."""
  blocks: int


def room_of(layout: BlockLayout, options: BlockOptions, multiple: int = 1) -> Room:
  """The smallest of ROOMS rooms, evenly spaced up to `max_blocks`, that every row's blocks fit into.

  Args:
    layout: of numpy arrays [B, T], before insertions.
    multiple: the student's rows have a multiple of so many tokens, as those of `max_blocks` have.
  """
  T = layout.doc.shape[1]
  number = np.where(layout.doc != 0, layout.doc * (T + 1) + layout.block, -1)
  starts = (np.diff(number, axis=1, prepend=-1) != 0) & (number >= 0)
  most, needed = options.max_blocks, int(starts.sum(axis=1).max(initial=0))
  rooms = (-(-most * i // ROOMS) for i in range(1, ROOMS))
  return Room(next((room for room in rooms if room >= needed and (T + options.most_added * room) % multiple == 0), most))


def block_mode(tokens: Array, layout: BlockLayout, options: BlockOptions, seam: Array | int | None = None,
               room: Room | None = None, continued: Array | None = None) -> tuple[Array, BlockLayout, Array]:
  """Tokens, layout and index of a student's forward pass, see `insert`; `room`: of the rows, None: the largest."""
  options = dataclasses.replace(options, max_blocks=room.blocks) if room else options
  layout = share_first(layout) if options.shared_first else layout
  if not options.most_added:
    index = jnp.broadcast_to(jnp.arange(layout.doc.shape[1], dtype=jnp.int32), layout.doc.shape)
    unseen = first_tokens(layout, 1) if options.hide_starts else None
    layout = layout if unseen is None else layout.replace(hidden=layout.hidden | unseen)
    return tokens, with_positions(layout, options.positions, unseen), index
  return insert(tokens, layout, options, padded_length(layout.doc.shape[1], options), seam, continued)


def padded_length(length: int, options: BlockOptions) -> int:
  """T of the student's rows when every one of at most `max_blocks` blocks gets all that may be inserted."""
  return length + options.most_added * options.max_blocks


def sink_tokens(vocab: int, count: int) -> dict[int, str]:
  """{id: text}: the tokens as which learned sinks and tails are exported."""
  return {vocab + i: f'<|sink_{i}|>' for i in range(count)}


def draw_seam(options: BlockOptions, key: Array) -> Array:
  """How many seam tokens a step trains with: int32, each number from 0 to options.seam as often."""
  return jax.random.randint(jax.random.fold_in(key, 1), (), 0, options.seam + 1)   # not the bits of block dropout


def first_tokens(layout: BlockLayout, count: Array | int) -> Array:
  """The first tokens, so many (traced or not), of every context block but a document's first and a shared one: of text the
  seam, what is read again behind all that stands before the block. bool [B, T]."""
  offset, valid = offsets(layout), jnp.asarray(layout.doc) != 0
  first = _rank(valid, layout.doc) == offset   # nothing of the document stands before the block
  return valid & (offset < count) & ~first & ~jnp.asarray(layout.reader) & ~jnp.asarray(layout.shared)


def _overlap(layout: BlockLayout, most: int, continued: Array) -> Array:
  """Of the last tokens of blocks, so many, that stand in front of the next block, too, how far in front: 1 for the last one;
  0 of all others. int32 [B, T]. Hidden and shared blocks give none, and those take none that are readers, shared, a
  document's first, or not `continued`, or of which the block before was removed."""
  valid = jnp.asarray(layout.doc) != 0
  rest = _in_block(valid, block_numbers(layout)) - offsets(layout)
  takes = jnp.where(first_tokens(layout, 1) & continued, layout.block, 0)
  taken = _at_next_block(takes, layout) == jnp.asarray(layout.block) + 1
  return jnp.where(valid & taken & (rest <= most) & ~jnp.asarray(layout.hidden) & ~jnp.asarray(layout.shared), rest, 0)


def _at_next_block(values: Array, layout: BlockLayout) -> Array:
  """The value, 0 or more, at the first token of the block behind each token's in its row; 0: there is none. int32 [B, T]."""
  number, starts = block_numbers(layout), block_starts(layout)
  b, at_start = jnp.arange(number.shape[0])[:, None], jnp.where(starts, _whole(values), 0)
  by_block = jnp.zeros((number.shape[0], number.shape[1] + 1), jnp.int32).at[b, number].max(at_start)
  return jnp.take_along_axis(by_block, number + 1, axis=1)


def insert(tokens: Array, layout: BlockLayout, options: BlockOptions, length: int, seam: Array | int | None = None,
           continued: Array | None = None) -> tuple[Array, BlockLayout, Array]:
  """Puts into the rows what is not text:

    in front of every block    sinks, so that a block is made of the same tokens wherever it stands
    behind the sinks           the overlap: the last tokens of the block before, which this block alone reads
    behind all but the last    the tail, in the block, or, a link, as a block of its own that reads all before it
    before the sinks           the seam: the block's first text tokens once more, as a block of its own that reads all before
                               it; what reads the block sees these copies and not the originals, which the rest of the
                               block goes on reading, so that its states depend on nothing but the block

  Copies have the positions of their originals; all else is counted. Readers and shared blocks have no seam, and neither has
  a document's first block; of these alone others see the start, where starts are hidden.

  Args:
    tokens: int32 [B, T].
    layout: BlockLayout [B, T] without any of this.
    length: static length of the result, see `padded_length`. What does not fit is cut off, so the caller bounds the
      number of blocks per row.
    seam: tokens of a seam, traced or not, up to options.seam, which is the default.
    continued: bool [B, T], the token's block goes on with the text of the block before; of use where blocks overlap.

  Returns:
    tokens [B, length], layout [B, length], and `index` int32 [B, T]: where each text token went, a seam token's being its
    copy. `x[index]` along the token axis aligns anything computed on the result with the text tokens.

  Raises:
    ValueError: blocks overlap, and no mask of that form says which of them go on.
  """
  goes_on = jnp.asarray(False if continued is None else continued)
  if options.overlap and (goes_on.shape != layout.doc.shape or goes_on.dtype != bool):
    raise UserError(f'overlap={options.overlap}: say with `continued`, bool {layout.doc.shape}, of each token whether its '
                    'block goes on with the one before; rows of data/packing.py have it')
  tokens, doc = jnp.asarray(tokens), jnp.asarray(layout.doc)
  rows, old_length = doc.shape
  b = jnp.arange(rows)[:, None]
  starts, offset = block_starts(layout), offsets(layout)
  sinks, tail, before = len(options.sink_ids), len(options.tail_ids), 0   # tokens of overlaps
  seams, links = int(options.seam > 0), int(options.links and tail > 0)   # blocks beside every block
  front, copies, copied, ends = sinks, 0, jnp.zeros(doc.shape, bool), jnp.zeros(doc.shape, bool)
  number = block_numbers(layout)
  if options.seam:
    copied = first_tokens(layout, options.seam if seam is None else seam)
    copies = _in_block(copied, number)
  if options.overlap:
    overlap = _overlap(layout, options.overlap, goes_on)
    counts = jnp.zeros((rows, old_length + 1), jnp.int32).at[b, number + 1].add(_whole(overlap > 0))
    before = jnp.take_along_axis(counts, number, axis=1)
  if tail or options.align > 1:
    size, last = _in_block(doc != 0, number), _in_last_block(doc, number)
    ends = (doc != 0) & (offset == size - 1) & ~last & (tail > 0)
    front = jnp.where(last, sinks, options.front(size + before))
  front = front + before
  index = jnp.arange(old_length, dtype=jnp.int32) + jnp.cumsum(_whole(starts) * (front + copies), axis=1)
  index = index + tail * (jnp.cumsum(ends, axis=1, dtype=jnp.int32) - _whole(ends))
  first = _running_max(jnp.where(starts, index, 0))   # of its block

  # Every slot takes its facts from a text token, `source`, and those of none, old_length, are padding.
  put = lambda x, where, at, value: x.at[b, jnp.where(where, at, length)].set(value, mode='drop')
  each = jnp.broadcast_to(jnp.arange(old_length, dtype=jnp.int32), doc.shape)
  nowhere = jnp.zeros((rows, length), bool)
  source = put(jnp.full((rows, length), old_length, jnp.int32), True, index, each)
  inserted, behind = jnp.full((rows, length), -1, jnp.int32), nowhere
  for i in range(1, sinks + options.align):   # counted from the text on
    where, at = starts & (i <= front - before), index - before - i
    source = put(source, where, at, each)
    inserted = put(inserted, where, at, options.sink_ids[max(sinks - i, 0)])
  if options.overlap:
    where, at = overlap > 0, _at_next_block(index, layout) - overlap
    source, inserted = put(source, where, at, _at_next_block(each, layout)), put(inserted, where, at, tokens)
  for i, tail_id in enumerate(options.tail_ids, start=1):
    source = put(source, ends, index + i, each)
    inserted, behind = put(inserted, ends, index + i, tail_id), put(behind, ends, index + i, True)
  at_copy, copy, original = first - front - copies + offset, nowhere, nowhere
  if options.seam:
    copy, original = put(nowhere, copied, at_copy, True), put(nowhere, copied, index, True)
    source = put(source, copied, at_copy, each)
  take = lambda x: jnp.take_along_axis(jnp.pad(jnp.asarray(x), ((0, 0), (0, 1))), source, axis=1)

  apart, block = copy | behind if links else copy, take(layout.block)   # apart: blocks of their own
  if seams + links:   # the seam before a block, the block, and the link behind it take the place of its number
    block = (1 + seams + links) * block + seams * _whole(~copy) + links * _whole(behind)
  new = BlockLayout(doc=take(doc), block=block, position=jnp.zeros((rows, length), jnp.int32),
                    reader=take(layout.reader) | apart, hidden=take(layout.hidden) | original,
                    shared=take(layout.shared) & ~apart)
  unseen = None
  if options.hide_starts:   # what is inserted in front of a block, or, if nothing is, its first token
    starting = (inserted >= 0) & ~behind | first_tokens(new, 1) & ~original
    unseen = first_tokens(new, length) & starting
    new = new.replace(hidden=new.hidden | unseen)
  position = with_positions(new.replace(doc=jnp.where(copy, 0, new.doc)), options.positions, unseen).position
  if options.seam:
    of_text = jnp.take_along_axis(position, jnp.minimum(index, length - 1), axis=1)
    position, index = jnp.where(copy, take(of_text), position), jnp.where(copied, at_copy, index)
  return jnp.where(inserted < 0, take(tokens), inserted), new.replace(position=position), index


def _in_last_block(doc, number):
  """True in the last block of each document, of which `number` is the row's block."""
  b = jnp.arange(doc.shape[0])[:, None]
  most = jnp.zeros((doc.shape[0], doc.shape[1] + 1), jnp.int32).at[b, doc].max(number)
  return (doc != 0) & (number == jnp.take_along_axis(most, doc, axis=1))
