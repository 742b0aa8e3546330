"""Answers over cached blocks.

An `Engine` looks every context block of a prompt up in the device's pool, then in host memory and on disk, and computes
what is nowhere, blocks of like length together; it reads the last block against them, their keys rotated to their places as
they are read, and continues it token by token, against a copy that is rotated once. What it computes is what the masked
forward pass of the same prompt computes. What is to be done is decided in `plan`.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from blockattn import blocks as blocks_lib
from blockattn.data import encode
from blockattn.errors import UserError
from blockattn.inference import cache as cache_lib, plan as plan_lib, pool as pool_lib, sampling as sampling_lib
from blockattn.inference.plan import Plan, Request
from blockattn.inference.pool import PAGE, padded, pages_of
from blockattn.models import decode, transformer

# What there is to do for a batch: look up, and load what the host has; compute what is missing; read the last block; have
# the first token on the host; and the others.
PARTS = ('find', 'fill', 'read', 'choose', 'decode')
_nothing = lambda part, arrays: None


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
  """
  text: str
  tokens: tuple[int, ...]
  ended: str
  blocks: tuple[Block, ...]


class Engine:
  """A model with its caches. Not for several threads at a time.

  Args:
    params, cfg, compute: the model; params are copied to every device of `devices` if they are not there.
    options: BlockOptions of block mode, as in training; `seam` as it is wanted, and for a prompt as its request says.
    tokenizer: `tokenizers.Tokenizer`, or a transformers fast tokenizer.
    stop_ids: tokens that end an answer.
    device_tokens: room in device memory for so many tokens of block states, over all devices; a token takes 2 L K H values
      of compute.dtype, and the context of a batch that gets more than one token stands there once more.
    store: `cache.Store`, where states go beside the device; None: nowhere.
    devices: which share the context of every prompt; the first of the process, if none are given.
    batch: most requests that are answered together.
    fill_tokens: most tokens of blocks that are computed together on a device, if one block is not longer.

  Raises:
    ValueError: tokens that the model has no rows for; options under which no state can be used twice.
  """

  def __init__(self, params: Any, cfg: transformer.ModelConfig, compute: transformer.Compute,
               options: blocks_lib.BlockOptions, tokenizer: Any, *, stop_ids: Sequence[int], device_tokens: int = 32768,
               store: cache_lib.Store | None = None, devices: Sequence[Any] | None = None, batch: int = 8,
               fill_tokens: int = 8192):
    blocks_lib.check_cacheable(options)
    self._mesh = pool_lib.make_mesh(jax.local_devices()[:1] if devices is None else devices)
    self._params = jax.device_put(params, NamedSharding(self._mesh, pool_lib.EVERYWHERE))
    self._cfg, self._compute, self._options = cfg, compute, options
    self._tokenizer = getattr(tokenizer, 'backend_tokenizer', tokenizer)
    encode.check_ids(options.own_ids, cfg.vocab + cfg.learned_sinks, self._tokenizer, 'sinks')
    encode.check_ids(stop_ids, cfg.vocab, self._tokenizer, 'end of an answer')
    self._stop_ids, self._batch, self._fill_tokens = tuple(stop_ids), batch, fill_tokens
    self._pool = pool_lib.Pool(cfg, compute.dtype, self._mesh, device_tokens)
    self._store = store
    self._unsaved: list[tuple[str, int]] = []   # (key, tokens) in the pool that the store has not been given yet
    self._keys = cache_lib.keys_of(self._params, cfg, compute.dtype, store.quantize if store is not None else 'none')

  def generate(self, requests: Sequence[Request], on_text: Callable[[int, str], None] | None = None,
               on_part: Callable[[str, Any], None] = _nothing) -> list[Answer]:
    """Answers requests, in batches, in the order in which they come.

    Args:
      on_text: called with a request's number and the text of its answer that is new, as it is made.
      on_part: called after each of PARTS of a batch, with arrays that are ready when the device is done with it.

    Raises:
      ValueError: a request cannot be answered; nothing is computed then.
    """
    return [answer for group in self._groups(requests) for answer in self._answer(group, on_text, on_part)]

  def logits(self, request: Request) -> np.ndarray:
    """Float32 [V], of the first token of the answer."""
    plans = [self._plan(0, request)]
    self._ready(plan_lib.blocks_of(plans))
    x_BD = self._read_prompts(plans)[0]
    self._save()
    return np.asarray(_logits(self._params, x_BD, cfg=self._cfg))[0]

  def prepare(self, requests: Sequence[Request]) -> list[tuple[Block, ...]]:
    """Has the states of the requests' context blocks ready, as far as the caches hold them, before the requests come.

    Their questions may be any token. Raises as `generate`.
    """
    out = []
    for group in self._groups(requests):
      found = self._ready(plan_lib.blocks_of(group))
      self._save()
      out += [tuple(found[block.key] for block in plan.context) for plan in group]
    jax.block_until_ready(self._pool.k)
    return out

  def forget(self) -> None:
    """Empties the device's pool; the store keeps what it has."""
    self._unsaved.clear()
    self._pool.clear()

  # Planning, on the host.

  def _groups(self, requests):
    plans = [self._plan(i, request) for i, request in enumerate(requests)]
    room = self._pool.pages * self._pool.devices
    return plan_lib.batches(plans, self._batch, lambda group: plan_lib.pages_in_all(group, self._pool.devices) <= room)

  def _plan(self, number, request) -> Plan:
    plan = plan_lib.make(number, request, self._options, self._keys)
    encode.check_ids([token for tokens in request.prompt for token in tokens], self._cfg.vocab, self._tokenizer,
                     f'request {number}')
    most = plan.question.start + len(plan.question.tokens) + request.max_new
    if most > self._cfg.max_positions:
      raise UserError(f'request {number}: the prompt and its answer take {most} positions, the model has '
                      f'{self._cfg.max_positions}; shorten the prompt or max_new')
    devices = self._pool.devices
    pages, room = plan_lib.pages_in_all([plan], devices), self._pool.pages * devices
    largest = max((pages_of(len(block.tokens)) for block in plan.context), default=0)
    if pages > room or largest > self._pool.pages:
      raise UserError(f'request {number}: its context takes {pages * PAGE} tokens of device memory, in whole pages, '
                      f'there is room for {room * PAGE} on {devices} devices; give more device_tokens')
    return plan

  # One batch.

  def _answer(self, plans, on_text, on_part) -> list[Answer]:
    found = self._ready(plan_lib.blocks_of(plans), on_part)
    x_BD, cache, context = self._read_prompts(plans, on_part)
    sampling = plan_lib.sampling([plan.request for plan in plans], x_BD.shape[0])
    how = dict(cfg=self._cfg, compute=self._compute, mesh=self._mesh)
    token = jax.block_until_ready(_first(self._params, x_BD, sampling, cfg=self._cfg))
    on_part('choose', token)
    writers = [sampling_lib.Writer(self._tokenizer, self._stop_ids, plan.request.stop) for plan in plans]
    most, unfinished = max(plan.request.max_new for plan in plans), set(range(len(plans)))
    if context is not None and most > 1:
      context = _gather(context, mesh=self._mesh)
    for n in range(1, most + 1):
      current = token
      if n < most:   # the device works on the next token while the host looks at this one
        token, cache = _next(self._params, current, cache, context, sampling, np.int32(n), **how)
      values = np.asarray(current).tolist()
      for i in sorted(unfinished):
        new = writers[i].push(values[i])
        if writers[i].ended or n == plans[i].request.max_new:
          new += writers[i].finish()
          unfinished.remove(i)
        if new and on_text is not None:
          on_text(plans[i].number, new)
      if n == 1:
        self._save()   # not before the first token is out
      if not unfinished:
        break
    on_part('decode', current)
    return [Answer(writer.text, tuple(writer.tokens), writer.ended or 'length',
                   tuple(found[block.key] for block in plan.context)) for plan, writer in zip(plans, writers, strict=True)]

  def _read_prompts(self, plans, on_part=_nothing):
    """(x_BD, decode.Cache, decode.Context or None) after the last blocks; the context's states are in the pool."""
    rows, context = decode.bucket(len(plans), 1), None
    tokens, lengths, ahead, reads = plan_lib.reader_arrays(plans, rows)
    if any(plan.context for plan in plans):
      pages, position, visible, number = plan_lib.context_arrays(plans, rows, self._pool.where, self._pool.devices)
      number = None if reads is None else number   # the last blocks read all of it
      context = self._pool.context(pages, position, visible, number, self._cfg)
    room = padded(max(plan.request.max_new for plan in plans))
    x_BD, cache = _read(self._params, tokens, lengths, ahead, reads, context, room=room, cfg=self._cfg,
                        compute=self._compute, mesh=self._mesh)
    on_part('read', x_BD)
    return x_BD, cache, context

  def _ready(self, blocks, on_part=_nothing) -> dict[str, Block]:
    """Has every block's state in the pool; returns what became of each."""
    self._save()   # what an interrupted answer left, before its pages may go
    try:
      found, missing = self._find(blocks)
      on_part('find', self._pool.k)
      for fill in plan_lib.fills(missing, blocks, devices=self._pool.devices, unused=self._pool.pages,
                                 most_tokens=self._fill_tokens):
        self._pool.fill(self._params, fill.rows, self._cfg, self._compute, self._prefix_pages(blocks.get(fill.prefix)))
      on_part('fill', self._pool.k)
      self._unsaved += [(key, block.tokens) for key, block in found.items() if block.found == 'computed']
    except BaseException:
      self.forget()   # keys may hold pages that nothing was written to
      raise
    return found

  def _find(self, blocks):
    """({key: Block}, {(key, device): pages} of what is missing). What the host has is loaded."""
    prefixes = {block.prefix for block in blocks.values()}
    found, missing, load = {}, {}, [0] * self._pool.devices
    room = [self._pool.room(device, blocks) for device in range(self._pool.devices)]
    for key, block in blocks.items():
      tokens = len(block.tokens)
      size, there = pages_of(tokens), self._pool.where(key)
      wanted = range(self._pool.devices) if key in prefixes else list(there)[:1] or [plan_lib.home(size, load, room)]
      absent = [device for device in wanted if device not in there]
      state = self._stored(key, tokens) if absent else None
      found[key] = Block(tokens, 'device' if not absent else 'computed' if state is None else state[1])
      for device in wanted:
        load[device] += size
      for device in absent:
        pages = self._pool.take(key, device, size, blocks)
        room[device] -= size
        if state is None:
          missing[key, device] = pages
        else:
          self._pool.load(state[0], device, pages)
    return found, missing

  def _stored(self, key, tokens):
    """(state, where it was) of a block in the store; None."""
    cfg = self._cfg
    return None if self._store is None else self._store.get(key, (cfg.layers, tokens, cfg.kv_heads, cfg.head_dim))

  def _prefix_pages(self, prefix):
    if prefix is None:
      return np.zeros((self._pool.devices, 0), np.int32), np.int32(0)
    pages = np.zeros((self._pool.devices, padded(len(prefix.tokens)) // PAGE), np.int32)
    for device, where in self._pool.where(prefix.key).items():
      pages[device, :len(where)] = where
    return pages, np.int32(len(prefix.tokens))

  def _save(self):
    """Hands what was computed to the store."""
    while self._unsaved:
      key, tokens = self._unsaved.pop()
      if self._store is not None:
        device, pages = next(iter(self._pool.where(key).items()))
        self._store.put(key, self._pool.fetch(device, pages, tokens))


@functools.partial(jax.jit, static_argnames=('room', 'cfg', 'compute', 'mesh'))
def _read(params, tokens, lengths, ahead, reads, context, *, room, cfg, compute, mesh):
  """decode.prefill of the readers, see `plan.reader_arrays`."""
  def here(params, tokens, lengths, ahead, reads, context):
    layout = pool_lib.one_block(lengths, ahead, tokens.shape[1])
    if reads is not None:   # numbers that never decrease, and all are readers: they read one another causally
      layout = layout.replace(block=reads)
    return decode.prefill(params, tokens, layout, cfg, compute, room, context)

  every = pool_lib.EVERYWHERE
  return pool_lib.on_mesh(mesh, here, (every, every, every, every, every, pool_lib.PAGES), every)(
      params, tokens, lengths, ahead, reads, context)


@functools.partial(jax.jit, static_argnames='mesh')
def _gather(context, *, mesh):
  return pool_lib.on_mesh(mesh, decode.gather, (pool_lib.PAGES,), _gathered_specs(context))(context)


def _gathered_specs(context):
  specs: Any = pool_lib.KEYS, pool_lib.VALUES, pool_lib.PAGES
  return None if context is None else decode.Gathered(*specs, axis=context.axis)


@functools.partial(jax.jit, static_argnames=('cfg', 'compute', 'mesh'), donate_argnames=('cache',))
def _next(params, token, cache, context, sampling, n, *, cfg, compute, mesh):
  """(the answer's token n, decode.Cache), after its token n - 1."""
  def here(params, token, cache, context):
    return decode.extend(params, token, cache, cfg, compute, context)

  every = pool_lib.EVERYWHERE
  x_BD, cache = pool_lib.on_mesh(mesh, here, (every, every, every, _gathered_specs(context)), every)(
      params, token, cache, context)
  return sampling_lib.choose(transformer.logits(params, x_BD, cfg), sampling, n), cache


@functools.partial(jax.jit, static_argnames='cfg')
def _first(params, x_BD, sampling, *, cfg):
  return sampling_lib.choose(transformer.logits(params, x_BD, cfg), sampling, jnp.int32(0))


_logits = jax.jit(transformer.logits, static_argnames='cfg')
