"""A student in transformers, with torch: over blocks that were read before, or in one masked forward pass.

  from transformers import AutoModelForCausalLM
  from blockattn import hf
  from blockattn.hf import config
  model = AutoModelForCausalLM.from_pretrained(folder)
  options = config.block_options(config.read_meta(folder))

  states = {}                                   # keep it: what it holds is not read again
  hf.cached_generate(model, prompt, options, cache=states, max_new_tokens=64)

  inputs = hf.block_inputs([prompt], options)   # the same tokens, every block read again
  with hf.block_attention(model, inputs.layout):
    model(**inputs.tensors()).logits
    model.generate(**inputs.tensors(), max_new_tokens=64)

A prompt is the token ids of each context block and, last, of the question (`data.encode.Encoder.prompt`). Both ways
give what transformers' generate gives: the prompt with its sinks, then the answer. Models are what `hf.config` reads:
Qwen3, Qwen2.5 and Llama with plain full attention. Nothing here computes with jax, which would take a GPU's memory from
torch.
"""

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterator, MutableMapping, Sequence
from typing import Any

import jax
import numpy as np

from blockattn.blocks import BlockLayout, BlockOptions, check_cacheable, place_prompt, prompt_layout, sees
from blockattn.errors import UserError
from blockattn.hf import config

try:
  import torch
  from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
except ImportError as error:
  raise ImportError(f"{__name__} runs models with torch; install it: pip install 'blockattn[torch]'") from error

NAME = 'block_sdpa'   # of our attention in transformers, as in from_pretrained(..., attn_implementation=NAME)

Model = Any   # LlamaForCausalLM or another family's, of which the annotations of transformers deny that they generate
Prompt = Sequence[Sequence[int]]
State = tuple[tuple[torch.Tensor, torch.Tensor], ...]   # of each layer (k, v), both [1, K, n, H]


# Prompts.


@dataclasses.dataclass(frozen=True)
class BlockInputs:
  """What one forward pass over whole prompts takes, each a tensor [B, T]; shorter prompts are padded on the left.

  Attributes:
    input_ids, position_ids: int64, sinks included.
    attention_mask: int64, 0 on padding. It does not say who attends to whom inside of a prompt: `layout` does.
    layout: BlockLayout of tensors.
  """
  input_ids: torch.Tensor
  position_ids: torch.Tensor
  attention_mask: torch.Tensor
  layout: BlockLayout

  def tensors(self) -> dict[str, torch.Tensor]:
    """The arguments of the model's forward and of `generate`. All three are needed, even for a single prompt."""
    return {'input_ids': self.input_ids, 'position_ids': self.position_ids, 'attention_mask': self.attention_mask}


def block_inputs(prompts: Sequence[Prompt], options: BlockOptions, *, seam: int | None = None,
                 device: torch.device | str = 'cpu') -> BlockInputs:
  """Prompts as the rows of one masked forward pass.

  Args:
    prompts: see the top of this file.
    options: see `config.block_options`.
    seam: tokens of a seam, see `BlockOptions`; None: as the options say. The copies stand among the tokens.
    device: of the tensors.

  Raises:
    ValueError: no prompt, or an empty block.
  """
  if not prompts:
    raise UserError('no prompt to read; give at least one')
  placed = [place_prompt(prompt, options.with_seam(seam)) for prompt in prompts]
  lengths = [[len(block.tokens) for block in row] for row in placed]
  length = max(map(sum, lengths))
  padding = [length - sum(row) for row in lengths]
  layout = prompt_layout(placed, length, options.shared_first)
  left_padded = lambda x: torch.from_numpy(np.stack([np.roll(row, n) for row, n in zip(x, padding)])).to(device)
  layout = jax.tree.map(left_padded, layout).replace(position=left_padded(layout.position).long())
  tokens = [[0] * n + [token for block in row for token in block.tokens] for row, n in zip(placed, padding)]
  return BlockInputs(torch.tensor(tokens, device=device), layout.position, (layout.doc != 0).long(), layout)


# Blocks that were read before.


@torch.no_grad()
def cached_generate(model: Model, prompt: Prompt, options: BlockOptions, *, seam: int | None = None,
                    cache: MutableMapping[str, State] | None = None, **generate_kwargs: Any) -> Any:
  """`model.generate` where the context blocks' keys and values are read once and then only moved to their place.

  Args:
    model: Qwen3, Qwen2.5 or Llama for causal language modelling, of transformers.
    prompt: one prompt, see the top of this file. Several at once are the masked pass's work (`block_inputs`).
    options: see `config.block_options`.
    seam: tokens of a seam, see `BlockOptions`; None: as the options say. What `cache` holds serves any of them.
    cache: where states are looked up, and put after they were computed; a dict, or anything that behaves like one and
      keeps tensors as they are. What it holds belongs to this model with these weights and this dtype. Blocks that read a
      shared prefix are kept together with it.
    **generate_kwargs: passed on to `model.generate`, such as max_new_tokens, do_sample or streamer.

  Returns:
    What `model.generate` returns for the whole prompt, sinks included and every token once: tokens int64 [1, T + new].

  Raises:
    ValueError: a model or prompt that cannot be read in blocks; options with a shared prefix and positions other than
      'local'; several beams or answers.
  """
  _check_one_answer(model, generate_kwargs)
  past = prefill_blocks(model, prompt, options, seam=seam, cache=cache)
  inputs = cached_inputs(prompt, options, seam=seam, device=model.device)
  # With ids, positions and mask of the whole prompt, generate cuts off what the cache holds, and goes on counting from
  # the last position, whatever the cache's length is.
  return model.generate(**inputs.tensors(), past_key_values=past, use_cache=True, **generate_kwargs)


def cached_inputs(prompt: Prompt, options: BlockOptions, *, seam: int | None = None,
                  device: torch.device | str = 'cpu') -> BlockInputs:
  """A prompt as it is read on behind the cache of `prefill_blocks`, in which copies stand for their originals: every token
  once, and attention_mask is 0 for those that none but their own block sees. Arguments and errors as in `block_inputs`."""
  inputs, at = block_inputs([prompt], options, seam=0, device=device), 0
  for block in place_prompt(prompt, options.with_seam(seam)):
    if not block.copy:
      start, stop = block.unseen
      inputs.attention_mask[:, at + start:at + stop] = 0
      inputs.position_ids[:, at:at + len(block.tokens)] = torch.arange(block.start, block.start + len(block.tokens))
      at += len(block.tokens)
  return inputs


@torch.no_grad()
def prefill_blocks(model: Model, prompt: Prompt, options: BlockOptions, *, seam: int | None = None,
                   cache: MutableMapping[str, State] | None = None) -> DynamicCache:
  """Keys and values of a prompt's context blocks, each at its place. Arguments and errors as in `cached_generate`.

  Returns:
    A DynamicCache of all tokens before the question's sinks, to be read on with `cached_inputs`. It shares no memory with
    `cache`.
  """
  _check_model(model)
  check_cacheable(options)
  *placed, _ = place_prompt(prompt, options.with_seam(seam))
  cache = {} if cache is None else cache
  decoder, states, unseen, prefix, copies = model.get_decoder(), [], [], None, None
  for block in placed:
    if block.reads is not None:   # all that stands before it and is not hidden
      seen = [_replaced(*one) for one in zip(states, unseen, strict=True)]
      state = _read_block(decoder, block.tokens, seen, model.device, block.start)
      if block.copy:
        copies = state
      else:
        states.append(state)
        unseen.append(block.unseen)
      continue
    before = prefix.tokens if prefix else ()
    key = _state_key(block.tokens, before)
    state = cache[key] if key in cache else None
    if state is None:
      state = cache[key] = _read_block(decoder, block.tokens, states[:1] if prefix else [], model.device, len(before))
    state = _moved(state, block.start - len(before), decoder.rotary_emb.inv_freq)
    states.append(state if copies is None else _replaced(state, block.seam, copies))
    unseen.append(block.unseen)
    prefix, copies = placed[0] if options.shared_first else None, None
  return _joined(states, model.config)


def _check_model(model):
  """Raises ValueError, naming the key, for an architecture or attention that `config.from_dict` refuses."""
  # How weights are stored is no matter of attention.
  raw = {key: value for key, value in model.config.to_dict().items() if key != 'quantization_config'}
  config.from_dict(raw, where=f'the config of this {type(model).__name__}')


def _check_one_answer(model, generate_kwargs):
  given = generate_kwargs.get('generation_config') or model.generation_config
  for name in ('num_beams', 'num_return_sequences'):
    value = generate_kwargs.get(name) or getattr(given, name)
    if value not in (None, 1):
      raise UserError(f'{name}={value}: over cached blocks there is one answer at a time; set it to 1, or generate '
                      'under block_attention')


def _state_key(tokens, before):
  """Everything that decides a block's state in one model: its tokens, and the shared prefix before it."""
  digest = hashlib.sha256()
  for part in (before, tokens):
    digest.update(len(part).to_bytes(8, 'little') + np.asarray(part, '<i8').tobytes())
  return digest.hexdigest()


def _read_block(decoder, tokens, before: Sequence[State], device, start: int) -> State:
  """Keys and values of tokens that read what is `before` them, from position `start` on."""
  past = _joined(before, decoder.config)
  skip = past.get_seq_length()
  position = torch.arange(start, start + len(tokens), device=device)[None]
  decoder(input_ids=torch.tensor([tokens], device=device), position_ids=position, past_key_values=past, use_cache=True)
  own = lambda x: x[..., skip:, :].clone() if skip else x
  return tuple((own(keys), own(values)) for keys, values, *_ in past)


def _replaced(state: State, where: tuple[int, int], copies: State | None = None) -> State:
  """The state with copies in place of the tokens `where`, or, None, without them."""
  start, stop = where
  cut = lambda x, *own: torch.cat([x[..., :start, :], *own, x[..., stop:, :]], dim=-2)
  if start == stop:
    return state
  if copies is None:
    return tuple((cut(k), cut(v)) for k, v in state)
  return tuple((cut(k, own_k), cut(v, own_v)) for (k, v), (own_k, own_v) in zip(state, copies))


def _moved(state: State, distance: int, frequencies) -> State:
  """The state of a block that starts `distance` positions further on."""
  if not distance:
    return state
  # In float64, since the angle of a late block is many turns; and without the factor that some rotary embeddings put
  # on cos and sin, since the keys have it already.
  angle = distance * frequencies.detach().double().cpu()
  return tuple((_rotate(keys, angle.cos().float(), angle.sin().float()), values) for keys, values in state)


def _rotate(keys, cos, sin):
  cos, sin = cos.to(keys.device), sin.to(keys.device)
  low, high = keys.float().chunk(2, dim=-1)
  return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1).to(keys.dtype)


def _joined(states: Sequence[State], model_config) -> DynamicCache:
  past = DynamicCache(config=model_config)
  for layer, parts in enumerate(zip(*states)):
    keys, values = zip(*parts)
    past.update(torch.cat(keys, dim=-2), torch.cat(values, dim=-2), layer)
  return past


# One masked forward pass.


@contextlib.contextmanager
def block_attention(model: Model, layout: BlockLayout) -> Iterator[None]:
  """While it is open, every forward pass of `model` attends as `layout` says.

  A pass reads the rows of `layout` from their start, or continues them behind a cache (decoding; new tokens belong to
  the last block of their row). Several beams or answers per row are fine. A pass that does not fit raises ValueError:
  other lengths, positions or padding than the layout's, so nothing is ever masked by a layout that is not its own. The
  model's attention implementation is changed meanwhile, for other threads, too.

  Args:
    model: Qwen3, Qwen2.5 or Llama of transformers.
    layout: BlockLayout [B, T] of tensors or arrays, padding on either side (left for generate), such as that of
      `block_inputs` or, for packed documents, of `blocks.from_lengths`.

  Raises:
    ValueError: the model's architecture is not supported.
    RuntimeError: the model reads under another layout already.
  """
  _check_model(model)
  register_block_attention()
  layouts, key = AttentionMaskInterface()[NAME].layouts, id(model.config)
  if key in layouts:
    raise RuntimeError('this model reads under another layout already; leave that block_attention first')
  before = model.config._attn_implementation
  layouts[key] = jax.tree.map(lambda x: x if torch.is_tensor(x) else torch.from_numpy(np.array(x)), layout)
  try:
    model.set_attn_implementation(NAME)
    yield
  finally:
    del layouts[key]
    model.set_attn_implementation(before or 'sdpa')


def register_block_attention() -> None:
  """Makes the attention 'block_sdpa' known to transformers, for from_pretrained(..., attn_implementation=NAME).

  It is torch's scaled_dot_product_attention under a layout, which `block_attention` gives it; without one it refuses
  to run. Registering twice does nothing.
  """
  if NAME in AttentionMaskInterface():
    return
  mask, sdpa = _LayoutMask({}), AttentionInterface()['sdpa']

  def attend(module, query, key, value, attention_mask, position_ids=None, **kwargs):
    if module.layer_idx == 0 and position_ids is not None and attention_mask is not None:
      mask.check_positions(module.config, position_ids, attention_mask)
    return sdpa(module, query, key, value, attention_mask, position_ids=position_ids, **kwargs)

  AttentionMaskInterface.register(NAME, mask)
  AttentionInterface.register(NAME, attend)


@dataclasses.dataclass(frozen=True)
class _LayoutMask:
  """What transformers calls for the mask of a forward pass.

  Attributes:
    layouts: the layout of each model that reads under one, by the id of its config: the one thing of a model that a
      mask function is given.
  """
  layouts: dict[int, BlockLayout]

  def __call__(self, batch_size, q_length, kv_length, q_offset=0, kv_offset=0, attention_mask=None, config=None,
               device='cpu', **unused):
    """The mask, bool [B, 1, Q, S]. Padding attends to itself, since softmax over nothing is no number."""
    layout = self._layout(config, batch_size)
    start, length = int(q_offset), layout.doc.shape[1]
    if start < length and not (start == 0 and q_length >= length):
      raise UserError(f'a pass over tokens {start} to {start + q_length} does not fit the layout of {length} tokens; '
                      'read the whole prompt of block_inputs at once (without prefill_chunk_size), then go on')
    if start == 0 and attention_mask is not None:
      self._check_padding(attention_mask, layout)
    queries = torch.arange(start, start + q_length, device=device)
    keys = torch.arange(int(kv_offset), int(kv_offset) + kv_length, device=device)
    layout = jax.tree.map(lambda x: x.to(device), layout)
    return (may_attend(layout, queries, keys) | (queries[:, None] == keys))[:, None]

  def _layout(self, config, batch):
    if id(config) not in self.layouts:
      raise UserError(f'attention {NAME!r} has no layout; run the model under `with block_attention(model, layout)`, '
                      "or, for plain full attention, model.set_attn_implementation('sdpa')")
    layout = self.layouts[id(config)]
    rows = layout.doc.shape[0]
    if batch % rows:
      raise UserError(f'a batch of {batch} under a layout of {rows} rows; make the layout from these prompts')
    # Beams and several answers: transformers repeats every row in place.
    return jax.tree.map(lambda x: x.repeat_interleave(batch // rows, 0), layout)

  @staticmethod
  def _check_padding(attention_mask, layout):
    given = attention_mask[:, :layout.doc.shape[1]].bool().cpu()
    if not torch.equal(given, (layout.doc != 0).cpu()):
      raise UserError('attention_mask and layout disagree about padding; pass all of **block_inputs(...).tensors(), '
                      'since generate takes pad tokens inside of a prompt for padding where attention_mask is missing')

  def check_positions(self, config, position_ids, mask):
    """Raises ValueError if a pass that starts with the layout has other positions than the layout.

    `mask` is that of the pass: where its first token sees more than the first key, it goes on behind a cache.
    """
    if id(config) not in self.layouts:   # the caller has given a mask of four axes, which is then all that counts
      return
    length = self.layouts[id(config)].doc.shape[1]
    if position_ids.shape[1] < length or mask[0, 0, 0, 1:].any():
      return
    layout, given = self._layout(config, mask.shape[0]), position_ids[:, :length].cpu()
    if not torch.all((given == layout.position.cpu()) | (layout.doc.cpu() == 0)):
      raise UserError('position_ids are not those of the layout; pass all of **block_inputs(...).tensors()')


def may_attend(layout: BlockLayout, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
  """Part of the mask, by the rule of `blocks.may_attend`, for tokens of the layout and for new ones.

  Args:
    layout: tensors [B, T].
    queries, keys: int64 [Q], [S], indices of tokens; those from T on are new ones of the row's last block.

  Returns:
    bool [B, Q, S].
  """
  length = layout.doc.shape[1]
  index = torch.arange(length, device=queries.device)
  last = torch.where(layout.doc != 0, index, 0).amax(1, keepdim=True)
  at = lambda where: jax.tree.map(lambda x: x.gather(1, torch.where(where < length, where, last)), layout)
  query = jax.tree.map(lambda x: x[:, :, None], at(queries))
  key = jax.tree.map(lambda x: x[:, None, :], at(keys))
  return (keys <= queries[:, None]) & sees(query, key)
