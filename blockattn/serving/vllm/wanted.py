"""The half of the connector where requests are scheduled: which blocks a prompt needs, and where they are."""

import collections
import concurrent.futures
import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vllm.sampling_params import SamplingParams
from vllm.v1.request import Request

from blockattn import blocks as blocks_lib
from blockattn.errors import UserError
from blockattn.inference.cache import Keys, State, Store
from blockattn.models.transformer import ModelConfig
from blockattn.serving.vllm.messages import Catch, Caught, Load, Step, slots_of
from blockattn.serving.vllm.student import BLOCKS, HIDDEN

_OWN = 'block-'      # what the ids of our own requests begin with
_TRIES = 3           # times that a block is computed for nothing before its prompts are given up
_READERS = 4         # threads that read the disk
_SAVING = 1 << 30    # bytes of states that may wait for it

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Block:
  """A context block of a prompt.

  Attributes:
    key, tokens: of its state.
    hidden: how many of them, the first, stand in no prompt.
    at: place of the next among the prompt's.
    position: rotary position of that one.
  """
  key: str
  tokens: tuple[int, ...]
  hidden: int
  at: int
  position: int

  @property
  def stop(self) -> int:
    """Place behind its last token."""
    return self.at + len(self.tokens) - self.hidden


@dataclasses.dataclass
class Prompt:
  """A request whose context is blocks.

  Attributes:
    context: tokens of its context.
    states: of its blocks, by key, as far as they have come, until they are in its pages.
    computed: keys of the blocks that it had computed.
    fault: why it cannot be answered.
  """
  blocks: tuple[Block, ...] = ()
  context: int = 0
  states: dict[str, State] = dataclasses.field(default_factory=dict)
  computed: set[str] = dataclasses.field(default_factory=set)
  fault: str = ''


def read_prompt(said: Mapping[str, Any], tokens: Sequence[int], options: blocks_lib.BlockOptions, keys: Keys) -> Prompt:
  """The blocks of a prompt, of which this is said.

  vLLM counts positions from the prompt's start. Where a student's question stands elsewhere (local positions), its blocks
  are moved by as much as the question is: attention depends on distances only.

  Raises:
    ValueError: the lengths are not those of the prompt, or its blocks do not begin as the student's do.
  """
  lengths, hidden = said[BLOCKS], said.get(HIDDEN)
  if not all(type(n) is int and n > 0 for n in lengths) or sum(lengths) != len(tokens):
    raise UserError(f'"{BLOCKS}" {list(lengths)} are no lengths of the blocks of a prompt of {len(tokens)} tokens')
  see, count = 'see blockattn.serving.vllm.student.place', len(lengths) - 1
  hidden = [[]] * count if hidden is None else hidden
  if not (isinstance(hidden, list) and len(hidden) == count and all(isinstance(start, list) for start in hidden) and
          all(type(n) is int and n >= 0 for start in hidden for n in start)):
    raise UserError(f'"{HIDDEN}" {hidden} are no lists of tokens, one for each of {count} context blocks; {see}')
  if [bool(start) for start in hidden] != [options.hide_starts and i > 0 for i in range(count)]:
    raise UserError(f'"{HIDDEN}" {hidden}: this student hides the start of '
                    f'{"every context block but the first" if options.hide_starts else "no block"}; {see}')
  unseen = [len(start) for start in hidden] + [0]
  whole = [length + start for length, start in zip(lengths, unseen)]
  starts = blocks_lib.block_positions(whole, options.positions, unseen=unseen)
  moved = sum(lengths[:-1]) - starts[-1]
  found, at = [], 0
  for length, before, start in zip(lengths, [*hidden, []], starts):
    own = (*before, *tokens[at:at + length])
    if own[:1] != options.sink_ids[:1] and options.sink_ids:
      raise UserError(f'the block of {length} tokens at token {at} does not begin with the sinks {options.sink_ids} of this '
                      f'student; {see}')
    found.append(Block(keys.of(own), own, len(before), at, start + moved + len(before)))
    at += length
  return Prompt(tuple(found[:-1]), found[-1].at)


class Wanted:
  """What prompts want and what becomes of it.

  Args:
    page: tokens of one of vLLM's pages.
    submit: adds a request to the scheduler.
  """

  def __init__(self, options: blocks_lib.BlockOptions, cfg: ModelConfig, keys: Keys, store: Store, page: int):
    self._options, self._cfg, self._keys, self._store, self._page = options, cfg, keys, store, page
    self.submit: Callable[[Request], None] | None = None
    self._prompts: dict[str, Prompt] = {}
    self._waiting: dict[str, Prompt] = {}   # those of them that gather states
    self._own: dict[str, Request] = {}   # requests of ours by id
    self._reading: dict[str, concurrent.futures.Future] = {}
    self._readers = concurrent.futures.ThreadPoolExecutor(_READERS, thread_name_prefix='blockattn-store')
    self._saving: dict[str, State] = {}   # on their way into the store
    self._saver = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix='blockattn-save')
    self._tries = collections.Counter()
    self._loads: list[Load] = []
    self._broken: set[int] = set()
    self._counted = collections.Counter()

  def arrived(self, request: Request) -> None:
    """A request that is new to the scheduler."""
    said = request.kv_transfer_params or {}
    if said.get(BLOCKS) is None:
      return
    try:
      if request.skip_reading_prefix_cache:
        raise UserError('log-probabilities of the prompt would need its blocks read again; ask without them')
      prompt = read_prompt(said, request.prompt_token_ids or (), self._options, self._keys)
    except (TypeError, ValueError) as error:
      prompt = Prompt(fault=str(error))
      request.skip_reading_prefix_cache = False   # or vLLM would not ask, and answer with full attention
    # The same tokens have other states in other blocks: vLLM's own prefix cache has to tell them apart.
    starts = [(block.at, *block.tokens[:block.hidden]) for block in prompt.blocks]
    mode = request.request_id if prompt.fault else [*starts, prompt.context]
    request.cache_salt = f'{request.cache_salt or ""} {BLOCKS} {mode}'
    request.block_hashes.clear()
    request.update_block_hashes()
    self._prompts[request.request_id] = prompt
    self._gather(request, prompt)

  def matched(self, request: Request, computed: int) -> int | None:
    """How many tokens behind the `computed` ones will be there; None: ask again."""
    prompt = self._prompts.get(request.request_id)
    if prompt is None or computed >= prompt.context and not prompt.fault:
      return 0
    if not prompt.fault:
      self._gather(request, prompt)
    if prompt.fault:
      log.error('request %s: %s', request.request_id, prompt.fault)
      return max(0, request.num_tokens - 1 - computed)   # pages that are then found to be broken
    return prompt.context - computed if all(block.key in prompt.states for block in prompt.blocks) else None

  def _gather(self, request, prompt):
    """Asks for the states that the prompt has not got."""
    self._waiting[request.request_id] = prompt
    for block in prompt.blocks:
      if block.key not in prompt.states and _OWN + block.key not in self._own:
        self._look_up(block, request, prompt)

  def _look_up(self, block, request, prompt):
    if (state := self._saving.get(block.key)) is not None:
      self._counted['blocks_memory'] += 1
      self._deliver(block.key, state)
    elif block.key not in self._reading:
      cfg = self._cfg
      shape = cfg.layers, len(block.tokens), cfg.kv_heads, cfg.head_dim
      self._reading[block.key] = self._readers.submit(self._store.get, block.key, shape)
    elif self._reading[block.key].done():
      found = self._reading.pop(block.key).result()
      if found is not None:
        self._counted[f'blocks_{found[1]}'] += 1
        self._deliver(block.key, found[0])
      elif self._tries[block.key] == _TRIES:
        prompt.fault = f'its block at token {block.at} was computed {_TRIES} times, and never came'
      else:
        prompt.computed.add(block.key)
        self._compute(block, request)

  def _deliver(self, key, state):
    self._tries.pop(key, None)
    for prompt in self._waiting.values():
      if any(block.key == key for block in prompt.blocks):
        prompt.states[key] = state

  def _compute(self, block, request):
    """Has a block read as a request of its own, for all who wait for it."""
    self._tries[block.key] += 1
    sampling = SamplingParams(max_tokens=1, temperature=0.0, skip_reading_prefix_cache=True)   # or nothing is caught
    own = Request(
        _OWN + block.key, list(block.tokens), sampling, None, client_index=request.client_index, priority=request.priority,
        arrival_time=request.arrival_time, cache_salt=block.key, block_hasher=request._block_hasher)
    self._own[own.request_id] = own
    assert self.submit is not None
    self.submit(own)

  def allocated(self, request: Request, pages: list[int], external: int) -> None:
    """A request has its pages; the last `external` tokens that it counts as computed are to come from here."""
    prompt = self._prompts.get(request.request_id)
    self._waiting.pop(request.request_id, None)
    if prompt is None or not external:
      return
    if prompt.fault:
      last = request.num_tokens - 1
      self._broken.update(pages[(last - external) // self._page:-(-last // self._page)])
      return
    first, reused = prompt.context - external, external
    for block in prompt.blocks:
      start = max(first, block.at)
      if start < block.stop:
        if block.key in prompt.computed:
          prompt.computed.remove(block.key)   # a second time in the same prompt it is reused
          reused -= block.stop - start
        slots, skip = slots_of(pages, self._page, start, block.stop), start - block.at
        state = prompt.states[block.key]
        self._loads.append(Load(state, block.hidden + skip, block.position + skip, slots))
        self._counted['loaded_bytes'] += state.nbytes
    prompt.states = {}
    stats = request.prefill_stats
    if stats is not None and not request.num_preemptions:   # vLLM took all that comes from here for reused
      stats.set(stats.num_prompt_tokens, stats.num_local_cached_tokens, reused)

  def step(self, scheduled: dict[str, int], pages_of: Callable[[str], list[int]]) -> Step:
    """What the worker has to do.

    Args:
      scheduled: tokens of each request of the step.
      pages_of: a request's.
    """
    out = Step(self._loads, [], self._broken)
    self._loads, self._broken = [], set()
    for name in scheduled.keys() & self._own.keys():
      own = self._own[name]
      start, length = own.num_computed_tokens, own.num_prompt_tokens
      stop = min(length, start + scheduled[name])
      if start < stop:
        slots = slots_of(pages_of(name), self._page, start, stop)
        out.catches.append(Catch(name.removeprefix(_OWN), start, slots, stop == length))
    return out

  def caught(self, caught: Caught) -> None:
    """States that the workers have made."""
    for key, state in caught.whole().items():
      self._counted['blocks_computed'] += 1
      self._deliver(key, state)
      if sum(held.nbytes for held in list(self._saving.values())) < _SAVING:   # else it is computed again when it is wanted
        self._saving[key] = state
        self._saver.submit(self._save, key, state)   # which may wait for a slow disk

  def _save(self, key, state):
    try:
      self._store.put(key, state)
    finally:
      self._saving.pop(key, None)

  def finished(self, request: Request) -> None:
    for held in (self._own, self._prompts, self._waiting):
      held.pop(request.request_id, None)

  def take_counted(self) -> dict[str, int]:
    """What was counted since the last call, by the names of `metrics.COUNTED`."""
    counted, self._counted = dict(self._counted), collections.Counter()
    return counted

  def close(self) -> None:
    self._readers.shutdown(wait=True)
    self._saver.shutdown(wait=True)
    self._store.close()
