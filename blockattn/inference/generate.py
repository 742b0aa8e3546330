"""Answers over cached blocks.

An `Engine` looks every context block of a prompt up in the device's pool, then in host memory and on disk, and computes
what is nowhere, blocks of like length together; it rotates the cached keys to their places, reads the last block against
them, and continues it token by token. What it computes is what the masked forward pass of the same prompt computes.

All shapes come from a few sizes (`padded`), so after a while nothing is compiled any more.
"""

import collections
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from blockattn import blocks as blocks_lib, trace
from blockattn.data import encode
from blockattn.errors import UserError
from blockattn.inference import cache as cache_lib, pool as pool_lib, sampling as sampling_lib
from blockattn.models import decode, transformer

_SHORTEST = 32   # tokens of a block, a last block, an answer: no array is smaller


@dataclasses.dataclass(frozen=True)
class Request:
  """A prompt and how to answer it.

  Attributes:
    prompt: token ids of each context block and, last, of the question, without sinks; none is empty.
    max_new: most tokens of the answer.
    stop: the answer ends before any of these texts, and at an end-of-text token.
    temperature, top_k, top_p, seed: see `sampling.Sampling`.
    shared: the first context block is a shared prefix, which the others read.
  """
  prompt: Sequence[Sequence[int]]
  max_new: int = 256
  stop: tuple[str, ...] = ()
  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  seed: int = 0
  shared: bool = False


@dataclasses.dataclass(frozen=True)
class Block:
  """What became of a context block: its tokens, sinks included, and where its state was, 'device', 'memory', 'disk', or
  nowhere: 'computed'."""
  tokens: int
  found: str


@dataclasses.dataclass(frozen=True)
class Answer:
  """
  Attributes:
    text: without stop text and special tokens.
    tokens: ids of the answer, those of a stop text included, an end-of-text token not.
    ended: 'token', 'text' or 'length'.
    blocks: of each context block.
    seconds: 'first_token' from the start of the request's batch to its first token on the host; 'decode' from there to its
      last; neither has what was compiled meanwhile: 'compile'. Of an engine that is `timed` also the parts of the first.
  """
  text: str
  tokens: tuple[int, ...]
  ended: str
  blocks: tuple[Block, ...]
  seconds: dict[str, float]


def padded(tokens: int) -> int:
  """The length of the array that so many tokens of a block, a last block or an answer stand in."""
  return decode.bucket(tokens, _SHORTEST)


@dataclasses.dataclass(frozen=True)
class _Place:
  """A prompt's context block: its key, its tokens with sinks, where it starts."""
  key: str
  tokens: tuple[int, ...]
  start: int
  prefix: str   # the key of the shared prefix it reads; ''


@dataclasses.dataclass(frozen=True)
class _Plan:
  """A request on its way."""
  number: int
  request: Request
  places: tuple[_Place, ...]
  question: tuple[int, ...]   # with sinks
  start: int                  # of the question


class _Clock:
  """Seconds since it was made, without those that `compiled()` says were spent on compiling."""

  def __init__(self, compiled: Callable[[], float]):
    self.compiled, self._start = compiled, time.perf_counter()

  def seconds(self) -> float:
    return time.perf_counter() - self._start - self.compiled()


class Engine:
  """A model with its caches. Not for several threads at a time.

  Args:
    params, cfg, compute: the model; params are copied to every device of `devices` if they are not there.
    options: BlockOptions of block mode, as in training.
    tokenizer: `tokenizers.Tokenizer`, or a transformers fast tokenizer.
    stop_ids: tokens that end an answer.
    device_tokens: room in device memory for so many tokens of block states, over all devices; a token takes 2 L K H values
      of compute.dtype, and the context of the batch at hand stands there once more.
    store: `cache.Store`, where states go beside the device; None: nowhere.
    devices: which share the context of every prompt; the first of the process, if none are given.
    batch: most requests that are answered together.
    fill_tokens: most tokens of blocks that are computed together on a device, if one block is not longer.
    timed: wait after each part, so that `Answer.seconds` has the parts of 'first_token' too: 'find' (look up, and load what
      the host has), 'fill' (compute what is missing), 'gather' (bring the context together, its keys rotated), 'read' (the
      last block), 'choose' (the first token).
  """

  def __init__(self, params, cfg: transformer.ModelConfig, compute: transformer.Compute,
               options: blocks_lib.BlockOptions, tokenizer: Any, *, stop_ids: Sequence[int], device_tokens: int = 32768,
               store: cache_lib.Store | None = None, devices: Sequence[jax.Device] | None = None, batch: int = 8,
               fill_tokens: int = 8192, timed: bool = False):
    self._mesh = pool_lib.make_mesh(jax.local_devices()[:1] if devices is None else devices)
    self._params = jax.device_put(params, NamedSharding(self._mesh, PartitionSpec()))
    self._cfg, self._compute, self._options = cfg, compute, options
    self._tokenizer = getattr(tokenizer, 'backend_tokenizer', tokenizer)
    encode.check_ids(options.sink_ids, cfg.vocab + cfg.learned_sinks, self._tokenizer, 'sinks')
    encode.check_ids(stop_ids, cfg.vocab, self._tokenizer, 'end of an answer')
    self._stop_ids, self._batch, self._fill_tokens, self._timed = tuple(stop_ids), batch, fill_tokens, timed
    self._pool = pool_lib.Pool(cfg, compute.dtype, self._mesh, device_tokens)
    self._store = store
    self._unsaved: list[tuple[str, int]] = []   # (key, tokens) in the pool that the store has not been given yet
    self._keys = cache_lib.keys_of(self._params, cfg, compute.dtype, store.quantize if store is not None else 'none')

  def generate(self, requests: Sequence[Request], on_text: Callable[[int, str], None] | None = None) -> list[Answer]:
    """Answers requests, in batches, in the order in which they come.

    Args:
      on_text: called with a request's number and the text of its answer that is new, as it is made.

    Raises:
      ValueError: a request cannot be answered; nothing is computed then.
    """
    plans = [self._plan(i, request) for i, request in enumerate(requests)]
    return [answer for group in self._batches(plans) for answer in self._answer(group, on_text)]

  def logits(self, request: Request) -> np.ndarray:
    """Float32 [V], of the first token of the answer."""
    x_BD = self._read_prompts([self._plan(0, request)], _Clock(lambda: 0.0))[0]
    self._save()
    return np.asarray(_project(self._params, x_BD, cfg=self._cfg))[0]

  def prepare(self, requests: Sequence[Request]) -> list[tuple[Block, ...]]:
    """Has the states of the requests' context blocks ready, as far as the caches hold them, before the requests come.

    Their questions may be any token. Raises as `generate`.
    """
    out = []
    for group in self._batches([self._plan(i, request) for i, request in enumerate(requests)]):
      found = self._ready({place.key: place for plan in group for place in plan.places})
      self._save()
      out += [tuple(found[place.key] for place in plan.places) for plan in group]
    jax.block_until_ready(self._pool.k)
    return out

  def forget(self) -> None:
    """Empties the device's pool; the store keeps what it has."""
    tokens = self._pool.pages * self._pool.devices * self._pool.page
    self._unsaved.clear()
    self._pool = None   # its memory has to be free before it is asked for again
    self._pool = pool_lib.Pool(self._cfg, self._compute.dtype, self._mesh, tokens)

  # Planning, on the host.

  def _plan(self, number, request) -> _Plan:
    _check(number, request, self._options, self._cfg, self._tokenizer)
    *context, question = ((*self._options.sink_ids, *map(int, tokens)) for tokens in request.prompt)
    local = self._options.positions == 'local'
    first = self._keys.of(context[0]) if request.shared and context else ''
    places, start, end = [], 0, 0
    for i, tokens in enumerate(context):
      prefix = first if i else ''
      at = (len(context[0]) if prefix else 0) if local else start
      places.append(_Place(self._keys.of(tokens, prefix), tokens, at, prefix))
      start, end = start + len(tokens), max(end, at + len(tokens))
    plan = _Plan(number, request, tuple(places), question, end if local else start)
    self._check_size(plan)
    return plan

  def _check_size(self, plan):
    most = plan.start + len(plan.question) + plan.request.max_new
    if most > self._cfg.max_positions:
      raise UserError(f'request {plan.number}: the prompt and its answer take {most} positions, the model has '
                      f'{self._cfg.max_positions}; shorten the prompt or max_new')
    pages, room = self._pages([plan]), self._pool.pages * self._pool.devices
    if pages > room or max([self._pool.pages_of(len(p.tokens)) for p in plan.places], default=0) > self._pool.pages:
      page = self._pool.page
      raise UserError(f'request {plan.number}: its context takes {pages * page} tokens of device memory, in whole pages, '
                      f'there is room for {room * page} on {self._pool.devices} devices; give more device_tokens')

  def _pages(self, plans) -> int:
    """Pages of the blocks of these requests, each counted once, a shared prefix once on every device."""
    copies = {place.prefix for plan in plans for place in plan.places}
    sizes = {place.key: len(place.tokens) for plan in plans for place in plan.places}
    return sum(self._pool.pages_of(n) * (self._pool.devices if key in copies else 1) for key, n in sizes.items())

  def _batches(self, plans) -> Iterator[list[_Plan]]:
    group = []
    for plan in plans:
      full = len(group) == self._batch
      if group and (full or self._pages([*group, plan]) > self._pool.pages * self._pool.devices):
        yield group
        group = []
      group.append(plan)
    if group:
      yield group

  # One batch.

  def _answer(self, plans, on_text) -> list[Answer]:
    with trace.compiling() as compiled:
      return self._answer_timed(plans, on_text, _Clock(compiled))

  def _answer_timed(self, plans, on_text, clock) -> list[Answer]:
    x_BD, cache, context, (found, seconds) = self._read_prompts(plans, clock)
    rows = x_BD.shape[0]
    sampling = _sampling([plan.request for plan in plans], rows)
    how = dict(cfg=self._cfg, compute=self._compute, mesh=self._mesh)
    token = jax.block_until_ready(_first(self._params, x_BD, sampling, cfg=self._cfg))
    first = clock.seconds()
    if self._timed:
      seconds['choose'] = first - sum(seconds.values())
    seconds['first_token'] = first
    writers = [sampling_lib.Writer(self._tokenizer, self._stop_ids, plan.request.stop) for plan in plans]
    most, ends = max(plan.request.max_new for plan in plans), [0.0] * len(plans)
    for n in range(1, most + 1):
      current = token
      if n < most:   # the device works on the next token while the host looks at this one
        token, cache = _next(self._params, current, cache, context, sampling, np.int32(n), **how)
      for i, value in enumerate(np.asarray(current)[:len(plans)].tolist()):
        if ends[i]:
          continue
        new = writers[i].push(value)
        if writers[i].ended or n == plans[i].request.max_new:
          new += writers[i].finish()
          ends[i] = clock.seconds()
        if new and on_text is not None:
          on_text(plans[i].number, new)
      if n == 1:
        self._save()   # not before the first token is out
      if all(ends):
        break
    seconds['compile'] = clock.compiled()
    return [Answer(writer.text, tuple(writer.tokens), writer.ended or 'length',
                   tuple(found[place.key] for place in plan.places), seconds | {'decode': max(0.0, end - first)})
            for plan, writer, end in zip(plans, writers, ends, strict=True)]

  def _read_prompts(self, plans, clock):
    """(x_BD, decode.Cache, decode.Context or None, ({key: Block}, seconds by part))."""
    seconds, before = {}, clock.seconds()

    def passed(part, arrays):
      nonlocal before
      if self._timed or clock.compiled():   # else what is computed while the next part is compiled would count for nothing
        jax.block_until_ready(arrays)
      if self._timed:
        seconds[part] = clock.seconds() - before
        before = clock.seconds()

    places = {place.key: place for plan in plans for place in plan.places}
    found = self._ready(places, passed)
    rows = decode.bucket(len(plans), 1)
    context = self._context(plans, rows)
    passed('gather', context)
    tokens = np.zeros((rows, padded(max(len(plan.question) for plan in plans))), np.int32)
    for row, plan in zip(tokens, plans, strict=False):
      row[:len(plan.question)] = plan.question
    column = lambda values: np.array([*values, *[0] * (rows - len(plans))], np.int32)
    room = padded(max(plan.request.max_new for plan in plans))
    x_BD, cache = _read(self._params, tokens, column(len(p.question) for p in plans), column(p.start for p in plans),
                        context, room=room, cfg=self._cfg, compute=self._compute, mesh=self._mesh)
    passed('read', x_BD)
    return x_BD, cache, context, (found, seconds)

  def _ready(self, places, passed=lambda part, arrays: None) -> dict[str, Block]:
    """Has every block's state in the pool; returns what became of each."""
    self._save()   # what an interrupted answer left, before its pages may go
    try:
      found, missing = self._find(places)
      passed('find', self._pool.k)
      self._fill(missing, places)
      passed('fill', self._pool.k)
      self._unsaved += [(key, block.tokens) for key, block in found.items() if block.found == 'computed']
    except BaseException:
      self.forget()   # keys may hold pages that nothing was written to
      raise
    return found

  def _find(self, places):
    """({key: Block}, {(key, device): pages} of what is missing). What the host has is loaded."""
    prefixes = {place.prefix for place in places.values()}
    found, missing, load = {}, {}, [0] * self._pool.devices
    room = [self._pool.room(device, places) for device in range(self._pool.devices)]
    shape = lambda key: (self._cfg.layers, len(places[key].tokens), self._cfg.kv_heads, self._cfg.head_dim)
    state_of = functools.cache(lambda key: None if self._store is None else self._store.get(key, shape(key)))
    for key in [*(key for key in places if key in prefixes), *(key for key in places if key not in prefixes)]:
      tokens = len(places[key].tokens)
      size = self._pool.pages_of(tokens)
      if key in prefixes:
        where = range(self._pool.devices)
      else:
        at = self._pool.find(key)
        where = (_home(size, load, room) if at is None else at[0],)
      for device in where:
        load[device] += size
        if self._pool.find(key, device) is not None:
          found.setdefault(key, Block(tokens, 'device'))
          continue
        pages = self._pool.take(key, device, size, places)
        room[device] -= size
        if (got := state_of(key)) is None:
          found[key] = Block(tokens, 'computed')
          missing[key, device] = pages
        else:
          found[key] = Block(tokens, got[1])
          self._pool.load(got[0], device, pages, padded(got[0].tokens))
    return found, missing

  def _fill(self, missing, places):
    """Computes the missing blocks, blocks of like length and of one prefix together, prefixes first."""
    groups = collections.defaultdict(list)
    prefixes = {place.prefix for place in places.values()}
    for (key, device), pages in missing.items():
      place = places[key]
      groups[key not in prefixes, place.prefix, padded(len(place.tokens))].append((place.tokens, device, pages))
    for (_, prefix, length), members in sorted(groups.items()):
      self._fill_group(members, length, prefix, places)

  def _fill_group(self, members, length, prefix, places):
    devices = self._pool.devices
    queues = [[m for m in members if m[1] == d] for d in range(devices)]
    most = max(1, self._fill_tokens // length)
    while any(queues):
      now, queues = [queue[:most] for queue in queues], [queue[most:] for queue in queues]
      rows = decode.bucket(max(map(len, now)), 1)
      tokens = np.zeros((devices * rows, length), np.int32)
      lengths = np.zeros(devices * rows, np.int32)
      pages = np.full((devices * rows, length // self._pool.page), self._pool.pages, np.int32)
      for device, queue in enumerate(now):
        for row, (own, _, where) in enumerate(queue, start=device * rows):
          tokens[row, :len(own)], lengths[row], pages[row, :len(where)] = own, len(own), where
      self._pool.fill(self._params, (tokens, lengths, pages), self._cfg, self._compute,
                      self._prefix_pages(places[prefix] if prefix else None))

  def _prefix_pages(self, place):
    if place is None:
      return np.zeros((self._pool.devices, 0), np.int32), np.int32(0)
    width = padded(len(place.tokens)) // self._pool.page
    pages = np.zeros((self._pool.devices, width), np.int32)
    for device, row in enumerate(pages):
      where = self._pool.find(place.key, device)[1]
      row[:len(where)] = where
    return pages, np.int32(len(place.tokens))

  def _context(self, plans, rows) -> decode.Context | None:
    """The states of every prompt's blocks, or None where no prompt has one."""
    if not any(plan.places for plan in plans):
      return None
    devices, page = self._pool.devices, self._pool.page
    lists = [[[] for _ in range(devices)] for _ in range(rows)]   # (page, first position, tokens) of each row and device
    for row, plan in zip(lists, plans, strict=False):
      for place in plan.places:
        device, pages = self._pool.find(place.key)
        row[device] += [(p, place.start + i * page, min(page, len(place.tokens) - i * page)) for i, p in enumerate(pages)]
    width = decode.bucket(max(len(own) for row in lists for own in row) * page, 8 * page) // page
    pages, first, used = (np.zeros((rows, devices, width), np.int32) for _ in range(3))
    for b, row in enumerate(lists):
      for d, own in enumerate(row):
        if own:
          pages[b, d, :len(own)], first[b, d, :len(own)], used[b, d, :len(own)] = np.array(own).T
    slot = np.arange(page, dtype=np.int32)
    visible = (slot < used[..., None]).reshape(rows, -1)
    position = np.where(visible, (first[..., None] + slot).reshape(rows, -1), 0).astype(np.int32)
    return self._pool.gather(pages.reshape(rows, -1), position, visible, self._cfg)

  def _save(self):
    """Hands what was computed to the store."""
    while self._unsaved:
      key, tokens = self._unsaved.pop()
      if self._store is not None:
        device, pages = self._pool.find(key)
        self._store.put(key, cache_lib.State(*self._pool.fetch(device, pages, tokens, padded(tokens))))


def _home(size, load, room) -> int:
  """The device for a new block: of those with room the one with the least to read."""
  able = [device for device, free in enumerate(room) if free >= size]
  if not able:
    raise UserError('the blocks of a batch cannot be laid out over the devices; give more device_tokens')
  return min(able, key=load.__getitem__)


def _check(number, request, options, cfg, tokenizer):
  where = f'request {number}: '
  if not request.prompt or not all(len(tokens) for tokens in request.prompt):
    raise UserError(where + 'a prompt is a list of blocks, none of them empty, the question last')
  encode.check_ids([token for tokens in request.prompt for token in tokens], cfg.vocab, tokenizer, f'request {number}')
  if request.max_new < 1:
    raise UserError(where + f'max_new={request.max_new}; an answer has at least one token')
  if any(not stop for stop in request.stop):
    raise UserError(where + 'an empty stop text would end every answer at once')
  if not 0 <= request.temperature < math.inf or request.top_k < 0 or not 0 < request.top_p <= 1:
    raise UserError(where + f'temperature={request.temperature}, top_k={request.top_k}, top_p={request.top_p}: give a '
                    'finite temperature and a top_k from 0 on, a top_p above 0 and up to 1')
  if request.shared and len(request.prompt) > 2 and options.positions != 'local':
    raise UserError(where + 'with a shared prefix and sequential positions a block lies at another distance from the '
                    'prefix in every prompt, so its state cannot be cached; use a model of positions "local", or give '
                    'the prefix as an ordinary block')


def _sampling(requests, rows) -> sampling_lib.Sampling | None:
  """None if every request wants the most probable token."""
  if not any(request.temperature for request in requests):
    return None
  requests = [*requests, *[Request(prompt=())] * (rows - len(requests))]
  take = lambda name, dtype: np.array([getattr(request, name) for request in requests], dtype)
  seed = np.array([request.seed % 2**32 for request in requests], np.uint32)
  return sampling_lib.Sampling(take('temperature', np.float32), take('top_k', np.int32), take('top_p', np.float32), seed)


def _context_specs(context):
  kv = PartitionSpec(None, None, pool_lib.AXIS)
  return None if context is None else decode.Context(kv, kv, pool_lib.PAGES, context.axis)


@functools.partial(jax.jit, static_argnames=('room', 'cfg', 'compute', 'mesh'))
def _read(params, tokens, lengths, first_position, context, *, room, cfg, compute, mesh):
  """decode.prefill of the last blocks: tokens [B, T], of `lengths`, from these positions on."""
  def here(params, tokens, lengths, first_position, context):
    layout = pool_lib.one_block(lengths, first_position, tokens.shape[1])
    return decode.prefill(params, tokens, layout, cfg, compute, room, context)

  every = PartitionSpec()
  return pool_lib.on_mesh(mesh, here, (every, every, every, every, _context_specs(context)), every)(
      params, tokens, lengths, first_position, context)


@functools.partial(jax.jit, static_argnames=('cfg', 'compute', 'mesh'), donate_argnames=('cache',))
def _next(params, token, cache, context, sampling, n, *, cfg, compute, mesh):
  """(the answer's token n, decode.Cache), after its token n - 1."""
  def here(params, token, cache, context):
    return decode.extend(params, token, cache, cfg, compute, context)

  every = PartitionSpec()
  x_BD, cache = pool_lib.on_mesh(mesh, here, (every, every, every, _context_specs(context)), every)(
      params, token, cache, context)
  return sampling_lib.choose(transformer.logits(params, x_BD, cfg), sampling, n), cache


@functools.partial(jax.jit, static_argnames='cfg')
def _first(params, x_BD, sampling, *, cfg):
  return sampling_lib.choose(transformer.logits(params, x_BD, cfg), sampling, jnp.int32(0))


@functools.partial(jax.jit, static_argnames='cfg')
def _project(params, x_BD, *, cfg):
  return transformer.logits(params, x_BD, cfg)
