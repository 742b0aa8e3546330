"""What an engine has to do for its requests: plain functions of requests, lengths and pages, on the host.

All shapes come from a few sizes (`decode.bucket`), so that after a while nothing is compiled any more.
"""

import collections
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from blockattn import blocks as blocks_lib
from blockattn.errors import UserError
from blockattn.inference import cache as cache_lib, sampling as sampling_lib
from blockattn.inference.pool import PAGE, padded, pages_of
from blockattn.models import decode


@dataclasses.dataclass(frozen=True)
class Request:
  """A prompt and how to answer it.

  Attributes:
    prompt: token ids of each context block and, last, of the question, without sinks; none is empty.
    max_new: most tokens of the answer.
    stop: the answer ends before any of these texts, and at an end-of-text token.
    temperature, top_k, top_p, seed: see `sampling.Sampling`.
    seam: tokens of a seam, see `blocks.BlockOptions`, for this prompt; None: as the engine's options say.
  """
  prompt: Sequence[Sequence[int]]
  max_new: int = 256
  stop: tuple[str, ...] = ()
  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  seed: int = 0
  seam: int | None = None

  def __post_init__(self):
    if self.max_new < 1:
      raise UserError(f'max_new={self.max_new}; an answer has at least one token')
    if self.seam is not None and self.seam < 0:
      raise UserError(f'seam={self.seam}; a seam has 0 tokens or more')
    if not all(self.stop):
      raise UserError('an empty stop text would end every answer at once; leave it out')
    if not 0 <= self.temperature < math.inf or self.top_k < 0 or not 0 < self.top_p <= 1:
      raise UserError(f'temperature={self.temperature}, top_k={self.top_k}, top_p={self.top_p}: give a finite temperature '
                      'and a top_k from 0 on, a top_p above 0 and up to 1')


@dataclasses.dataclass(frozen=True)
class ContextBlock:
  """A context block of a prompt: the key of its state, its tokens, sinks included, the position of the first, the key of
  the shared prefix that it reads, '' without one, and (start, stop) of the tokens whose copies are read in their place."""
  key: str
  tokens: tuple[int, ...]
  start: int
  prefix: str
  hidden: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Plan:
  """A request with its number, its context and its readers, the last of which is the question, see `blocks.place_prompt`."""
  number: int
  request: Request
  context: tuple[ContextBlock, ...]
  readers: tuple[blocks_lib.PlacedBlock, ...]

  @property
  def question(self) -> blocks_lib.PlacedBlock:
    return self.readers[-1]


def make(number: int, request: Request, options: blocks_lib.BlockOptions, keys: cache_lib.Keys) -> Plan:
  """The plan of a request.

  Raises:
    ValueError: its prompt is no list of blocks.
  """
  try:
    placed = blocks_lib.place_prompt(request.prompt, options.with_seam(request.seam))
  except ValueError as error:
    raise UserError(f'request {number}: {error}') from error
  context, readers = ([block for block in placed if (block.reads is not None) == reads] for reads in (False, True))
  first = keys.of(context[0].tokens) if options.shared_first and context else ''
  prefixes = ['', *[first] * (len(context) - 1)]
  return Plan(number, request, tuple(
      ContextBlock(keys.of(block.tokens, prefix), block.tokens, block.start, prefix, block.hidden)
      for block, prefix in zip(context, prefixes)), tuple(readers))


def blocks_of(plans: Sequence[Plan]) -> dict[str, ContextBlock]:
  """The context blocks of these requests by key, shared prefixes first: what reads one is computed after it."""
  found = {block.key: block for plan in plans for block in plan.context}
  prefixes = {block.prefix for block in found.values()}
  return dict(sorted(found.items(), key=lambda item: item[0] not in prefixes))


def pages_in_all(plans: Sequence[Plan], devices: int) -> int:
  """Pages of the blocks of these requests, each counted once, a shared prefix once on every device."""
  found = blocks_of(plans)
  copies = {block.prefix for block in found.values()}
  return sum(pages_of(len(block.tokens)) * (devices if key in copies else 1) for key, block in found.items())


def batches(plans: Sequence[Plan], most: int, fits: Callable[[Sequence[Plan]], bool]) -> Iterator[list[Plan]]:
  """The plans in order, at most so many together, and no more than fit."""
  group = []
  for plan in plans:
    if group and (len(group) == most or not fits([*group, plan])):
      yield group
      group = []
    group.append(plan)
  if group:
    yield group


@dataclasses.dataclass(frozen=True)
class Fill:
  """Blocks that are computed together; rows of a device stand one after the other.

  Attributes:
    prefix: the key of the shared prefix that all of them read, ''.
    rows: (tokens int32 [D R, T], lengths int32 [D R], pages int32 [D R, T / PAGE]), see `pool.Pool.fill`.
  """
  prefix: str
  rows: tuple[np.ndarray, np.ndarray, np.ndarray]


def fills(missing: Mapping[tuple[str, int], np.ndarray], blocks: Mapping[str, ContextBlock], *, devices: int,
          unused: int, most_tokens: int) -> Iterator[Fill]:
  """How missing blocks are computed: those of like length and of one prefix together, prefixes first.

  Args:
    missing: {(key, device): pages}.
    unused: the number that stands for no page.
    most_tokens: together on a device, if one block is not longer.
  """
  prefixes = {block.prefix for block in blocks.values()}
  groups = collections.defaultdict(lambda: [[] for _ in range(devices)])
  for (key, device), pages in missing.items():
    block = blocks[key]
    groups[key not in prefixes, block.prefix, padded(len(block.tokens))][device].append((block.tokens, pages))
  for (_, prefix, length), queues in sorted(groups.items()):
    most = max(1, most_tokens // length)
    for first in range(0, max(map(len, queues)), most):
      now = [queue[first:first + most] for queue in queues]
      yield Fill(prefix, _fill_rows(now, length, decode.bucket(max(map(len, now)), 1), unused))


def _fill_rows(queues, length, rows, unused):
  tokens = np.zeros((len(queues) * rows, length), np.int32)
  lengths = np.zeros(len(queues) * rows, np.int32)
  pages = np.full((len(queues) * rows, length // PAGE), unused, np.int32)
  for device, queue in enumerate(queues):
    for row, (own, where) in enumerate(queue, start=device * rows):
      tokens[row, :len(own)], lengths[row], pages[row, :len(where)] = own, len(own), where
  return tokens, lengths, pages


def context_arrays(plans: Sequence[Plan], rows: int, where: Callable[[str], Mapping[int, np.ndarray]],
                   devices: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
  """Where the context of each prompt is: (pages, position, visible, number) as `pool.Pool.context` takes them. Pages that
  nobody sees, such as a long overlap's, are not among them.

  Args:
    where: key -> {device: pages}, on one device at least.
  """
  # (page, first position, tokens, block's number, start and stop of what is hidden) of each row and device
  lists = [[[] for _ in range(devices)] for _ in range(rows)]
  for row, plan in zip(lists, plans, strict=False):
    for number, block in enumerate(plan.context):
      device, pages = next(iter(where(block.key).items()))
      for page, at in zip(pages, itertools.count(step=PAGE)):
        size = min(PAGE, len(block.tokens) - at)
        start, stop = (x - at for x in block.hidden)
        if not start <= 0 < size <= stop:
          row[device].append((page, block.start + at, size, number, start, stop))
  width = decode.bucket(max(len(own) for row in lists for own in row) * PAGE, 8 * PAGE) // PAGE
  pages, first, used, number, start, stop = arrays = [np.zeros((rows, devices, width), np.int32) for _ in range(6)]
  for b, row in enumerate(lists):
    for d, own in enumerate(row):
      for x, values in zip(arrays, zip(*own)):
        x[b, d, :len(own)] = values
  slot = np.arange(PAGE, dtype=np.int32)
  flat = lambda x: np.broadcast_to(x, (rows, devices, width, PAGE)).reshape(rows, -1)
  start, stop = start[..., None], stop[..., None]
  used = flat(slot < used[..., None])
  position = np.where(used, flat(first[..., None] + slot), 0).astype(np.int32)
  return pages.reshape(rows, -1), position, used & ~flat((start <= slot) & (slot < stop)), flat(number[..., None])


def reader_arrays(plans: Sequence[Plan], rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
  """(tokens [rows, T], lengths [rows], position of the first token [rows, 1], None), int32, of the last blocks; with other
  readers in front of them how far each position is ahead of the token's place [rows, T], and how many context blocks it
  reads [rows, T]."""
  length = max(sum(len(reader.tokens) for reader in plan.readers) for plan in plans)
  length = decode.bucket(length, 2 * PAGE, steps=4)   # finer than elsewhere: padding would read the whole context too
  tokens, ahead, reads = (np.zeros((rows, length), np.int32) for _ in range(3))
  lengths = np.zeros(rows, np.int32)
  for i, plan in enumerate(plans):
    for reader in plan.readers:
      own = slice(lengths[i], lengths[i] + len(reader.tokens))
      tokens[i, own], ahead[i, own], reads[i, own] = reader.tokens, reader.start - lengths[i], reader.reads or 0
      lengths[i] += len(reader.tokens)
  if all(len(plan.readers) == 1 for plan in plans):
    return tokens, lengths, ahead[:, :1], None
  return tokens, lengths, ahead, reads


def sampling(requests: Sequence[Request], rows: int) -> sampling_lib.Sampling | None:
  """None if every request wants the most probable token."""
  if not any(request.temperature for request in requests):
    return None
  requests = [*requests, *[Request(prompt=())] * (rows - len(requests))]
  take = lambda name, dtype: np.array([getattr(request, name) for request in requests], dtype)
  seed = np.array([request.seed % 2**32 for request in requests], np.uint32)
  return sampling_lib.Sampling(take('temperature', np.float32), take('top_k', np.int32), take('top_p', np.float32), seed)


def home(size: int, load: Sequence[int], room: Sequence[int]) -> int:
  """The device for a new block: of those with room the one with the least to read.

  Raises:
    ValueError: none has room.
  """
  able = [device for device, free in enumerate(room) if free >= size]
  if not able:
    raise UserError('the blocks of a batch cannot be laid out over the devices; give more device_tokens')
  return min(able, key=load.__getitem__)
