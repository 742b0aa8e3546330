"""The `decode` command of tools.bench: tokens per second after a cached prompt, against transformers with torch.

A prompt of T tokens is one context block and a last block, without sinks, so that block attention is full attention and both
sides answer the same; its states are ready before the clock starts. So many requests ask it at once, each with a copy of its
own. In turn, sample by sample: the engine (`ours`), and `generate` of transformers over a DynamicCache (`torch`), from the
same weights. Counted are the tokens behind the first, with the copy of the context that they read. The limit is what memory
traffic alone takes: every weight, every key and every value once a token, at the rate of the machine's own copy or what
--bandwidth-gbs says.
"""

import copy
import pathlib
import tempfile

import jax.numpy as jnp
import numpy as np

from blockattn import blocks as blocks_lib
from blockattn.errors import UserError
from blockattn.inference import engine as engine_lib, plan, pool
from blockattn.models import flops
from tools import arguments
from tools.bench import measuring, ttft

OURS = 'ours'


def our_way(model: ttft.Model, prompt: ttft.Prompt, rows: int, new: int):
  """((seconds that `new` tokens of each request take behind the first) as a way, the answer's tokens but the last)."""
  engine = engine_lib.Engine(
      model.params, model.cfg, model.compute, blocks_lib.BlockOptions((), 'sequential', max_blocks=1), ttft.no_tokenizer(),
      stop_ids=(), batch=rows, device_tokens=pool.PAGE * sum(pool.pages_of(len(block)) for block in prompt.blocks))
  requests = [plan.Request(prompt.blocks, max_new=new + 1)] * rows
  engine.prepare(requests)
  answers = engine.generate(requests)   # compiles
  return lambda: ttft.timed(engine, *requests).decode, answers[0].tokens[:-1]


def torch_way(model: ttft.Model, prompt: ttft.Prompt, rows: int, new: int, folder: pathlib.Path):
  """The same of transformers.

  Raises:
    ImportError: torch is missing.
  """
  import torch
  peer = ttft.torch_model(model, folder)
  peer.generation_config.eos_token_id = None   # as long an answer as ours
  tokens = torch.tensor([sum(prompt.blocks, ())], device=peer.device)
  with torch.no_grad():
    cache = peer(tokens[:, :-1], use_cache=True, logits_to_keep=1).past_key_values
  cache.batch_repeat_interleave(rows)
  asked = tokens.repeat(rows, 1)
  own = []

  def answer():
    return peer.generate(asked, attention_mask=torch.ones_like(asked), past_key_values=own.pop(), max_new_tokens=new,
                         do_sample=False)

  def way():
    own.append(copy.deepcopy(cache))
    return measuring.clocked(answer)

  own.append(copy.deepcopy(cache))
  return way, tuple(answer()[0, prompt.tokens:].tolist())


def same(ours: tuple[int, ...], theirs: tuple[int, ...]) -> int:
  """How many tokens two answers begin with alike.

  Raises:
    ValueError: none.
  """
  count = int(np.cumprod([a == b for a, b in zip(ours, theirs, strict=True)]).sum())
  if not count:
    raise UserError(f'ours begins with the token {ours[0]}, that of torch with {theirs[0]}: they do not compute the same')
  return count


def limit(cfg, tokens: int, rows: int, itemsize: int, rate: float) -> float:
  """Seconds that reading all that a step needs takes at so many bytes a second."""
  weights = (flops.layer_weights(cfg) + flops.head_weights(cfg)) * itemsize
  return (weights + rows * tokens * ttft.bytes_per_token(cfg, itemsize)) / rate


def decode(args) -> None:
  model, facts, results = ttft.load_model(args), measuring.machine(args.cores, args.impl), []
  itemsize, new = jnp.dtype(args.dtype).itemsize, args.new
  prompt = ttft.make_prompt(args.length, args.length - args.last, args.last, model.cfg.vocab)
  rate = args.bandwidth_gbs * 1e9 if args.bandwidth_gbs else measuring.copy_rate()
  print(measuring.describe(facts, f'model {args.model}, {args.dtype}, {new} tokens behind a prompt of {args.length}; '
                           f'{rate / 1e9:.3g} GB/s\n'))
  print(measuring.head('requests', 'by', 'tokens/s', 'ms per step', 'of the limit', 'same tokens', 'samples'), flush=True)
  with tempfile.TemporaryDirectory() as folder:
    for rows in args.requests:
      ways, said = {}, {}
      ways[OURS], said[OURS] = our_way(model, prompt, rows, new)
      if not args.no_torch:
        ways[ttft.TORCH], said[ttft.TORCH] = torch_way(model, prompt, rows, new, pathlib.Path(folder))
      alike = {name: same(said[OURS], tokens) for name, tokens in said.items()}
      seconds = measuring.take_turns(ways, args.samples, float('inf'), timed=lambda way: way())
      least = limit(model.cfg, args.length, rows, itemsize, rate)
      for name, times in seconds.items():
        step = min(times) / new
        print(measuring.row(rows, name, f'{rows / step:.1f}', f'{1e3 * step:.1f}', f'{100 * least / step:.0f} %',
                            f'{alike[name]} of {new}', len(times)), flush=True)
      results.append({'requests': rows, 'seconds': seconds, 'limit': least, 'same': alike})
      measuring.keep(args, facts, bandwidth=rate, results=results)


def add(commands) -> None:
  parser = measuring.add_command(commands, 'decode', 'tokens per second after a cached prompt', decode, cores=2,
                                 devices=False)
  ttft.add_model(parser)
  arguments.add_numbers(parser, length=(4096, 'tokens of the prompt'), last=(128, 'tokens of its last block'),
                        new=(32, 'tokens that are timed'), samples=(5, 'of each'))
  parser.add_argument('--requests', type=arguments.positive, nargs='+', default=[1, 8], metavar='N',
                      help='at a time (default 1 and 8)')
