"""The `ttft` command of tools.bench: time to the first token over cached blocks, against full prefill of the same model.

A prompt of T tokens is context blocks of random length and a last block. In turn, sample by sample: full attention over
the whole prompt (`full`); the blocks' states all, every second one and none on the device (`all`, `half`, `none`); all in
host memory, the same in 8 bits, and all on disk (`memory`, `int8`, `disk`; files were just written, so that the operating
system has them in memory too); and full prefill by transformers with torch, from the same weights (`torch`). All give the
first token on the host. Times are minima; a ratio is the time of `full` over the other's.

The limit is what arithmetic and memory traffic alone take: 2 operations per weight and token, 4 N H L per pair of query and
key that the mask allows; every weight and every key and value once. Rates are those of the machine's own matmul and copy in
the same run, or what --peak-tflops and --bandwidth-gbs say.
"""

import dataclasses
import functools
import gc
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from blockattn import blocks as blocks_lib, loading
from blockattn.errors import UserError
from blockattn.hf import convert
from blockattn.inference import cache as cache_lib, engine as engine_lib, plan, stopwatch
from blockattn.kernels import api
from blockattn.models import flops, sizes, spec, transformer
from tools import arguments, charts
from tools.bench import measuring

SMALL = transformer.ModelConfig('qwen3', vocab=8192, width=256, layers=4, heads=4, kv_heads=2, head_dim=64, mlp=768,
                                rope_theta=1e6, qk_norm=True, tied=True, max_positions=1 << 18)
STATES = ('all', 'half', 'none', 'memory', 'int8', 'disk')
SPLIT = ('all', 'memory')   # whose time is taken part by part
PARTS = ('find', 'read', 'choose')
DEFAULT = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
FULL, TORCH = 'full', 'torch'
_SINKS = (10, 10, 10, 10)
_PATIENCE = 60.0   # seconds after which a way is not sampled again


@dataclasses.dataclass(frozen=True)
class Prompt:
  """Token ids of the context blocks and, last, of the question."""
  blocks: tuple[tuple[int, ...], ...]

  @property
  def tokens(self) -> int:
    return sum(map(len, self.blocks))

  def with_sinks(self) -> list[int]:
    """Tokens of each block, sinks included."""
    return [len(block) + len(_SINKS) for block in self.blocks]


def make_prompt(length: int, block: int, last: int, vocab: int) -> Prompt:
  """A prompt of `length` tokens, its context in blocks of 0.5 to 1.5 times `block`; the same for the same arguments."""
  rng = np.random.default_rng(length)
  lengths = [*measuring.random_lengths(rng, length - last, max(1, round((length - last) / block))), last]
  return Prompt(tuple(tuple(rng.integers(16, vocab, size=n).tolist()) for n in lengths))


# What is timed. Each way is () -> seconds of one first token.

@dataclasses.dataclass
class Model:
  params: dict
  cfg: transformer.ModelConfig
  compute: transformer.Compute

  def engine(self, prompt: Prompt, store=None) -> engine_lib.Engine:
    room = sum(-(-n // 16) * 16 for n in prompt.with_sinks())
    options = blocks_lib.BlockOptions(_SINKS, 'sequential', max_blocks=1)
    return engine_lib.Engine(self.params, self.cfg, self.compute, options, no_tokenizer(), stop_ids=(), store=store,
                             device_tokens=room)


def no_tokenizer():
  """Decodes nothing: no text is asked for."""
  return tokenizers.Tokenizer(tokenizers.models.WordLevel({'?': 0}, unk_token='?'))


def ways(model: Model, prompt: Prompt, folder: pathlib.Path, states=STATES) -> dict:
  """{name: way} of `full` and of these states."""
  request = plan.Request(prompt.blocks, max_new=1)
  some = plan.Request((*prompt.blocks[:-1:2], prompt.blocks[-1]), max_new=1)
  # With its sinks as many tokens as torch reads.
  whole = plan.Request((sum(prompt.blocks, ())[len(_SINKS):],), max_new=1)
  device = model.engine(prompt)

  def with_states_of(prepared):
    device.forget()
    if prepared is not None:
      device.prepare([prepared])
    return timed(device, request).first_token

  def from_store(engine):
    engine.forget()
    return timed(engine, request).first_token

  found = {FULL: lambda: timed(device, whole).first_token}
  for name, prepared in (('all', request), ('half', some), ('none', None)):
    found[name] = functools.partial(with_states_of, prepared)
  stores = {'memory': lambda: cache_lib.Store(1 << 40), 'int8': lambda: cache_lib.Store(1 << 40, quantize='int8'),
            'disk': lambda: cache_lib.Store(0, folder / 'states', 1 << 40)}
  for name in stores.keys() & set(states):
    store = stores[name]()
    engine = model.engine(prompt, store)
    engine.prepare([request])
    store.flush()
    found[name] = functools.partial(from_store, engine)
  return {name: found[name] for name in (FULL, *STATES) if name == FULL or name in states}


def timed(engine: engine_lib.Engine, *requests: plan.Request, wait: bool = False) -> stopwatch.Stopwatch:
  """How long answers take; `wait`: their parts too."""
  with stopwatch.running(wait=wait) as watch:
    engine.generate(requests, on_part=watch)
  return watch


def torch_way(model: Model, prompt: Prompt, folder: pathlib.Path):
  """The way of transformers: full prefill.

  Raises:
    ImportError: torch is missing.
  """
  import torch
  peer = torch_model(model, folder)
  tokens = torch.tensor([sum(prompt.blocks, ())], device=peer.device)

  @torch.no_grad()
  def first():
    return int(peer(tokens, use_cache=True, logits_to_keep=1).logits[0, -1].argmax())

  return lambda: measuring.clocked(first)


def torch_model(model: Model, folder: pathlib.Path):
  """The model in transformers, by way of `folder`.

  Raises:
    ImportError: torch is missing.
  """
  import torch
  import transformers
  exported = folder / 'model'
  if not exported.exists():
    convert.save(model.params, model.cfg, exported, source=_source(folder), meta={}, card='',
                 dtype=str(model.params['embed'].dtype))
  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  peer = transformers.AutoModelForCausalLM.from_pretrained(exported, dtype=getattr(torch, model.compute.dtype))
  return peer.to(device).eval()


def _source(folder):
  """The least that an export takes from where a model came from: a tokenizer."""
  source = folder / 'source'
  source.mkdir(exist_ok=True)
  no_tokenizer().save(str(source / 'tokenizer.json'))
  (source / 'tokenizer_config.json').write_text('{}')
  (source / 'generation_config.json').write_text('{}')
  return source


def check(model: Model, prompt: Prompt) -> float:
  """The largest difference between logits over cached blocks and those of the masked forward pass, over their spread.

  Raises:
    ValueError: it is more than rounding.
  """
  lengths = [list(map(len, prompt.blocks))]
  layout = blocks_lib.from_lengths([lengths], prompt.tokens)
  options = blocks_lib.BlockOptions(_SINKS, 'sequential', max_blocks=len(prompt.blocks))
  tokens, layout, index = blocks_lib.block_mode(np.array([sum(prompt.blocks, ())], np.int32), layout, options)
  masked = jax.jit(transformer.apply, static_argnums=(3, 4))(model.params, tokens, layout, model.cfg, model.compute)
  masked = np.asarray(transformer.logits(model.params, masked[0, int(index[0, -1])], model.cfg))
  cached = model.engine(prompt).logits(plan.Request(prompt.blocks, max_new=1))
  off = float(np.abs(cached - masked).max() / masked.std())
  if off > (1e-3 if model.compute.dtype == 'float32' else 0.2):
    raise UserError(f'logits over cached blocks are {off:.2g} standard deviations off those of the masked forward pass')
  return off


def split(model: Model, prompt: Prompt, samples: int, states=STATES) -> dict:
  """{'all' and 'memory', if they are among the states: {part: seconds}}, each part's minimum."""
  parts = {}
  for name in (name for name in SPLIT if name in states):
    store = cache_lib.Store(1 << 40) if name == 'memory' else None
    engine = model.engine(prompt, store)
    request = plan.Request(prompt.blocks, max_new=1)
    engine.prepare([request])
    found = []
    for _ in range(samples + 1):   # the first one compiles
      if store is not None:
        engine.forget()
      found.append(timed(engine, request, wait=True).parts)
    parts[name] = {part: min(seconds[part] for seconds in found[1:]) for part in PARTS}
  return parts


# The limit.

def cost(cfg, lengths: list[int], itemsize: int) -> dict[str, dict[str, float]]:
  """{'full', 'none', 'all': {'flops', 'bytes'}} of a first token; lengths are tokens of each block, the question last."""
  weights, head = flops.layer_weights(cfg), flops.head_weights(cfg)
  prompt, context = flops.one_document(lengths), flops.one_document(lengths[:-1])
  whole, blocked = flops.as_one_block(prompt), flops.in_blocks(prompt)
  reading = flops.Seen(lengths[-1], whole.pairs - flops.as_one_block(context).pairs)
  operations = lambda seen: flops.forward(cfg, seen).total(1)
  moved = (weights + head) * itemsize + whole.tokens * bytes_per_token(cfg, itemsize)
  return {name: {'flops': operations(seen), 'bytes': moved}
          for name, seen in ((FULL, whole), ('none', blocked), ('all', reading))}


def bytes_per_token(cfg, itemsize: int) -> int:
  return 2 * cfg.layers * cfg.kv_heads * cfg.head_dim * itemsize


def rates(args) -> dict[str, float]:
  """Operations and bytes per second, as given, or of a product of two matrices and of a copy."""
  return {'flops': args.peak_tflops * 1e12 if args.peak_tflops else measuring.matmul_rate(dtype=args.dtype),
          'bytes': args.bandwidth_gbs * 1e9 if args.bandwidth_gbs else measuring.copy_rate()}


# Reporting.

def lines_of(result: dict) -> list[str]:
  lines, full = [], min(result['seconds'][FULL])
  for name, times in result['seconds'].items():
    low, limit = min(times), result['limit'].get(name)
    lines.append(measuring.row(f'{result["tokens"]:,}', name, f'{1e3 * low:.1f}', f'{full / low:.2f}',
                               f'{100 * limit / low:.0f} %' if limit else '', len(times)))
  return lines


def parts_lines(result: dict) -> list[str]:
  return [measuring.row(f'{result["tokens"]:,}', name, *(f'{1e3 * parts[part]:.1f}' for part in PARTS))
          for name, parts in result['parts'].items()]


def picture(results: list[dict], title: str) -> str:
  """Seconds to the first token against tokens of the prompt, both logarithmic, as SVG."""
  names = (FULL, TORCH, *STATES)
  series = {name: [(r['tokens'], min(r['seconds'][name])) for r in results if name in r['seconds']] for name in names}
  return charts.logarithmic(series, title, 'tokens of the prompt', 'seconds')


# The command.

def load_model(args) -> Model:
  """The model that --model names, in --dtype."""
  compute = transformer.Compute(dtype=args.dtype, impl=api.choose(args.impl, jax.devices()[0]).impl)
  if loading.is_here(args.model):
    loaded = loading.load(args.model, args.dtype)
    return Model(loaded.params, loaded.cfg, compute)
  cfg = SMALL if args.model == 'small' else sizes.get(args.model, max_positions=1 << 18)
  init = jax.jit(lambda: spec.init(transformer.spec(cfg), jax.random.key(0), args.dtype))
  return Model(init(), cfg, compute)


def ttft(args) -> None:
  model, facts, results = load_model(args), measuring.machine(args.cores, args.impl), []
  itemsize = jnp.dtype(args.dtype).itemsize
  off = check(model, make_prompt(min(args.lengths), args.block, args.last, model.cfg.vocab))
  rate = rates(args)
  print(measuring.describe(facts, (
      f'model {args.model}, {args.dtype}; blocks of about {args.block} tokens, '
      f'the last of {args.last}, {len(_SINKS)} sinks; cache {bytes_per_token(model.cfg, itemsize):,} bytes per token, '
      f'{bytes_per_token(model.cfg, 1):,} in int8\nlogits over cached blocks are {off:.1g} standard deviations off the '
      f'masked forward pass; rates {rate["flops"] / 1e12:.3g} TFLOP/s, {rate["bytes"] / 1e9:.3g} GB/s\n')))
  print(measuring.head('tokens', 'states', 'ms', 'full / this', 'limit / this', 'samples'), flush=True)
  with tempfile.TemporaryDirectory() as folder:
    for length in args.lengths:
      results.append(measure_length(model, length, rate, args, pathlib.Path(folder)))
      print('\n'.join(lines_of(results[-1])), flush=True)
      measuring.keep(args, facts, rates=rate, results=results, cfg=dataclasses.asdict(model.cfg))
  print('\nparts of the time to the first token, in ms\n')
  print(measuring.head('tokens', 'states', 'find and load', 'last block', 'first token'))
  print('\n'.join(line for result in results for line in parts_lines(result)))
  if args.plot:
    charts.write(args.plot, picture(results, f'Time to the first token, {args.model}, {facts["cpu"]}'))


def measure_length(model, length, rate, args, folder) -> dict:
  """Everything of one length: {'tokens', 'blocks', 'seconds', 'parts', 'limit'}.

  Args:
    rate: of `rates`.
    args: block, last, samples, states, no_torch, as from the command line.
    folder: for what has to be written.
  """
  prompt = make_prompt(length, args.block, args.last, model.cfg.vocab)
  with tempfile.TemporaryDirectory(dir=folder) as own:
    chosen = ways(model, prompt, pathlib.Path(own), args.states)
    if not args.no_torch:
      chosen[TORCH] = torch_way(model, prompt, folder)
    for way in chosen.values():
      way()   # compiles
    seconds = measuring.take_turns(chosen, args.samples, _PATIENCE, timed=lambda way: way())
    del chosen
    gc.collect()
    parts = split(model, prompt, args.samples, args.states)
  needed = cost(model.cfg, prompt.with_sinks(), jnp.dtype(model.compute.dtype).itemsize)
  limit = {name: max(own[what] / rate[what] for what in rate) for name, own in needed.items()}
  return {'tokens': prompt.tokens, 'blocks': len(prompt.blocks) - 1, 'seconds': seconds, 'parts': parts, 'limit': limit}


def add(commands) -> None:
  parser = measuring.add_command(commands, 'ttft', 'time to the first token over cached blocks, against full prefill', ttft,
                                 devices=False)
  add_model(parser)
  parser.add_argument('--lengths', type=int, nargs='+', default=list(DEFAULT), metavar='T', help='tokens of the prompts '
                      '(default 1024 to 65536)')
  arguments.add_numbers(parser, block=(512, 'mean tokens of a context block'), last=(128, 'tokens of the last block'),
                        samples=(3, 'of each way, fewer of slow ones'))
  parser.add_argument('--states', nargs='+', choices=STATES, default=STATES, help='of the context blocks, beside full '
                      'prefill (default: all)')
  parser.add_argument('--peak-tflops', type=float, help='what the device can compute (default: what a matmul reaches)')
  parser.add_argument('--plot', type=pathlib.Path, metavar='FILE.svg', help='seconds against tokens')


def add_model(parser) -> None:
  """The model and how it computes, whether torch is a peer, and what the machine's memory can do."""
  parser.add_argument('--model', default='small', help='random weights: small, or one of '
                      f'{", ".join(sizes.SIZES)}; or a folder')
  arguments.add_computing(parser)
  parser.add_argument('--no-torch', action='store_true', help='leave transformers with torch out')
  parser.add_argument('--bandwidth-gbs', type=float, help='of the memory (default: what a copy reaches)')
