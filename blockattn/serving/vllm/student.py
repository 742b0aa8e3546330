"""What serving has to know of an exported student, all of it from its folder."""

import os
import pathlib
from collections.abc import Sequence

import jax

from blockattn import blocks
from blockattn.errors import UserError
from blockattn.hf import config, convert, files
from blockattn.inference import cache
from blockattn.models.transformer import ModelConfig

# What a request's kv_transfer_params say: the lengths of its blocks as they stand in the prompt, sinks included, that of the
# question last; and, of students that hide starts, the tokens that each context block begins with in front of those.
BLOCKS, HIDDEN = 'blocks', 'hidden'


def read_options(folder: os.PathLike | str) -> blocks.BlockOptions:
  """How the student reads blocks.

  Raises:
    ValueError: it was not trained with blocks, or in a way whose blocks are no prefix that vLLM could take over.
  """
  where = f'{folder}/{files.META}'
  meta = config.read_meta(folder)
  if not meta.get('blocks'):
    raise UserError(f'{where} says nothing of blocks: name a student that was trained with them and exported (python -m '
                    'tools.convert to_hf), or serve this model with plain `vllm serve`')
  options = config.block_options(meta, where)
  # Each of these reads earlier blocks from between the blocks, or has states that depend on more than the block.
  links = options.links and options.tail_ids
  for key, has in {'links': links, 'seam': options.seam, 'shared_first': options.shared_first}.items():
    if has:
      raise UserError(f'{where}: "{key}" is not served by vLLM yet; answer with tools.generate, or train without it')
  return options


def read_keys(folder: os.PathLike | str, dtype: str, quantize: str = 'none') -> tuple[ModelConfig, cache.Keys]:
  """(architecture, keys of its blocks), which are those of an engine whose parameters and activations are `dtype`."""
  with jax.default_device(jax.local_devices(backend='cpu')[0]):   # an accelerator's memory is vLLM's
    cfg, fingerprint = config.read(folder), convert.fingerprint(pathlib.Path(folder), dtype)
  return cfg, cache.keys_from(fingerprint, cfg, dtype, quantize)


def place(prompt: Sequence[Sequence[int]], options: blocks.BlockOptions) -> tuple[list[int], dict[str, list]]:
  """A prompt as vLLM takes it: `prompt_token_ids`, and what `kv_transfer_params` say of its blocks.

  A hidden start stands in no page and takes no position, so it is no token of vLLM's prompt; nor is a block of nothing else.

  Args:
    prompt: token ids of each context block and, last, of the question, without sinks.

  Raises:
    ValueError: no block, or an empty one.
  """
  seen, hidden = [], []
  for block in blocks.place_prompt(prompt, options):
    stop = block.hidden[1]
    if stop < len(block.tokens):
      seen.append(block.tokens[stop:])
      hidden.append(list(block.tokens[:stop]))
  params = {BLOCKS: [len(tokens) for tokens in seen]} | ({HIDDEN: hidden[:-1]} if options.hide_starts else {})
  return [token for tokens in seen for token in tokens], params
