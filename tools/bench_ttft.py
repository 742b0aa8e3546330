"""Time to the first token over cached blocks, against full prefill of the same model: `python -m tools.bench ttft`.

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
import html
import math
import pathlib
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from blockattn import blocks as blocks_lib, metrics
from blockattn.errors import UserError
from blockattn.hf import convert
from blockattn.inference import cache as cache_lib, engine as engine_lib, plan, pool, stopwatch
from blockattn.kernels import api
from blockattn.models import decode, flops, sizes, spec, transformer

SMALL = transformer.ModelConfig('qwen3', vocab=8192, width=256, layers=4, heads=4, kv_heads=2, head_dim=64, mlp=768,
                                rope_theta=1e6, qk_norm=True, tied=True, max_positions=1 << 18)
STATES = ('all', 'half', 'none', 'memory', 'int8', 'disk')
SPLIT = ('all', 'memory')   # whose time is taken part by part
PARTS = ('find', 'fill', 'gather', 'read', 'choose')
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
  count = max(1, round((length - last) / block))
  weights = rng.uniform(0.5, 1.5, count)
  stops = np.round(np.cumsum(weights) / weights.sum() * (length - last)).astype(int)
  lengths = [*np.diff(stops, prepend=0).tolist(), last]
  return Prompt(tuple(tuple(rng.integers(16, vocab, size=n).tolist()) for n in lengths))


# What is timed. Each way is (get ready, seconds of one first token).

@dataclasses.dataclass
class Model:
  params: dict
  cfg: transformer.ModelConfig
  compute: transformer.Compute

  def engine(self, prompt: Prompt, store=None) -> engine_lib.Engine:
    room = sum(-(-n // 16) * 16 for n in prompt.with_sinks())
    options = blocks_lib.BlockOptions(_SINKS, 'sequential', max_blocks=1)
    return engine_lib.Engine(self.params, self.cfg, self.compute, options, _tokenizer(), stop_ids=(), store=store,
                             device_tokens=room)


def _tokenizer():
  """Decodes nothing: no text is asked for."""
  return tokenizers.Tokenizer(tokenizers.models.WordLevel({'?': 0}, unk_token='?'))


def ways(model: Model, prompt: Prompt, folder: pathlib.Path, states=STATES) -> dict:
  """{name: (get ready, run)} of `full` and of these states. Run gives seconds."""
  request = plan.Request(prompt.blocks, max_new=1)
  some = plan.Request((*prompt.blocks[:-1:2], prompt.blocks[-1]), max_new=1)
  # With its sinks as many tokens as torch reads.
  whole = plan.Request((sum(prompt.blocks, ())[len(_SINKS):],), max_new=1)
  first = lambda engine, asked: timed(engine, asked).first_token
  device = model.engine(prompt)

  def only(prepared):
    device.forget()
    if prepared is not None:
      device.prepare([prepared])

  found = {FULL: (lambda: None, lambda: first(device, whole))}
  for name, prepared in (('all', request), ('half', some), ('none', None)):
    if name in states:
      found[name] = (functools.partial(only, prepared), lambda: first(device, request))
  stores = {'memory': lambda: cache_lib.Store(1 << 40), 'int8': lambda: cache_lib.Store(1 << 40, quantize='int8'),
            'disk': lambda: cache_lib.Store(0, folder / 'states', 1 << 40)}
  for name in (name for name in stores if name in states):
    store = stores[name]()
    engine = model.engine(prompt, store)
    engine.prepare([request])
    store.flush()
    found[name] = (engine.forget, lambda engine=engine: first(engine, request))
  return found


def timed(engine: engine_lib.Engine, request: plan.Request, *, wait: bool = False) -> stopwatch.Stopwatch:
  """How long an answer takes; `wait`: its parts too."""
  with stopwatch.running(wait=wait) as watch:
    engine.generate([request], on_part=watch)
  return watch


def torch_way(model: Model, prompt: Prompt, folder: pathlib.Path):
  """(get ready, run) of full prefill by transformers.

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
  peer = peer.to(device).eval()
  tokens = torch.tensor([sum(prompt.blocks, ())], device=device)

  @torch.no_grad()
  def run():
    start = time.perf_counter()
    int(peer(tokens, use_cache=True, logits_to_keep=1).logits[0, -1].argmax())
    return time.perf_counter() - start

  return (lambda: None), run


def _source(folder):
  """The least that an export takes from where a model came from: a tokenizer."""
  source = folder / 'source'
  source.mkdir(exist_ok=True)
  _tokenizer().save(str(source / 'tokenizer.json'))
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


def measure(chosen: dict, samples: int) -> dict[str, list[float]]:
  """Seconds of each way, in turns, after one run each that compiles."""
  for ready, run in chosen.values():
    ready()
    run()
  times = {name: [] for name in chosen}
  for _ in range(samples):
    for name, (ready, run) in chosen.items():
      if sum(times[name]) < _PATIENCE:
        ready()
        times[name].append(run())
  return times


def split(model: Model, prompt: Prompt, samples: int, states=STATES) -> dict:
  """{'all' and 'memory', if they are among the states: {part: seconds}}, each part's minimum; 'rotate': within 'gather'."""
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
  rotate = jax.jit(decode.rotate_keys, static_argnums=2)
  cfg, length = model.cfg, pool.padded(sum(prompt.with_sinks()[:-1]))
  k = jnp.zeros((cfg.layers, 1, length, cfg.kv_heads, cfg.head_dim), model.compute.dtype)
  position = jnp.arange(length, dtype=jnp.int32)[None]
  parts['rotate'] = _fastest(lambda: rotate(k, position, cfg), samples)
  return parts


def _fastest(call, samples):
  jax.block_until_ready(call())
  times = []
  for _ in range(samples):
    start = time.perf_counter()
    jax.block_until_ready(call())
    times.append(time.perf_counter() - start)
  return min(times)


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
  n = 2048 if jax.default_backend() == 'cpu' else 8192
  a, x = jnp.ones((n, n), args.dtype), jnp.ones(1 << 26, 'float32')
  dot, copy = jax.jit(jnp.dot), jax.jit(lambda x: x + 1)
  return {'flops': args.peak_tflops * 1e12 if args.peak_tflops else 2 * n ** 3 / _fastest(lambda: dot(a, a), 5),
          'bytes': args.bandwidth_gbs * 1e9 if args.bandwidth_gbs else 2 * x.nbytes / _fastest(lambda: copy(x), 5)}


# Reporting.

def lines_of(result: dict) -> list[str]:
  """Lines of a markdown table."""
  lines, full = [], min(result['seconds'][FULL])
  for name, times in result['seconds'].items():
    low = min(times)
    limit = result['limit'].get(name)
    of_limit = f'{100 * limit / low:.0f} %' if limit else ''
    lines.append(f'| {result["tokens"]:,} | {name} | {1e3 * low:.1f} | {full / low:.2f} | {of_limit} | {len(times)} |')
  return lines


def parts_lines(result: dict) -> list[str]:
  lines = []
  for name in (name for name in SPLIT if name in result['parts']):
    cells = ' | '.join(f'{1e3 * result["parts"][name][part]:.1f}' for part in ('find', 'gather', 'read', 'choose'))
    lines.append(f'| {result["tokens"]:,} | {name} | {cells} | {1e3 * result["parts"]["rotate"]:.1f} |')
  return lines


_WIDE, _HIGH, _PAD = 640, 400, 60
_COLOURS = {FULL: '#b2182b', TORCH: '#ef8a62', 'none': '#969696', 'half': '#6baed6', 'all': '#08519c', 'memory': '#238b45',
            'int8': '#74c476', 'disk': '#807dba'}


def picture(results: list[dict], title: str) -> str:
  """Seconds to the first token against tokens of the prompt, both logarithmic, as SVG."""
  points = {name: [(r['tokens'], min(r['seconds'][name])) for r in results if name in r['seconds']] for name in _COLOURS}
  points = {name: own for name, own in points.items() if own}
  every = [p for own in points.values() for p in own]
  (x0, x1), (y0, y1) = ((min(v), max(v)) for v in ([p[0] for p in every], [10 ** math.floor(math.log10(min(
      p[1] for p in every))), 10 ** math.ceil(math.log10(max(p[1] for p in every)))]))
  place = lambda v, low, high, a, b: a + (math.log(v / low) / (math.log(high / low) or 1)) * (b - a)
  X = lambda v: place(v, x0, x1, _PAD, _WIDE - 110)
  Y = lambda v: place(v, y0, y1, _HIGH - 50, 40)
  parts = [f'<text x="{_PAD}" y="22" font-size="14" font-weight="600">{html.escape(title)}</text>']
  for power in range(round(math.log10(y0)), round(math.log10(y1)) + 1):
    y = Y(10.0 ** power)
    parts.append(f'<line x1="{_PAD}" x2="{_WIDE - 110}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>'
                 f'<text x="{_PAD - 6}" y="{y + 4:.1f}" text-anchor="end">{10.0 ** power:g} s</text>')
  for result in results:
    parts.append(f'<text x="{X(result["tokens"]):.1f}" y="{_HIGH - 32}" text-anchor="middle">'
                 f'{result["tokens"] / 1024:g}k</text>')
  parts.append(f'<text x="{(_PAD + _WIDE - 110) / 2}" y="{_HIGH - 12}" text-anchor="middle">tokens of the prompt</text>')
  last = None
  for name, own in sorted(points.items(), key=lambda item: -item[1][-1][1]):
    path = ' '.join(f'{X(x):.1f},{Y(y):.1f}' for x, y in own)
    parts.append(f'<polyline points="{path}" fill="none" stroke="{_COLOURS[name]}" stroke-width="2"/>')
    parts += [f'<circle cx="{X(x):.1f}" cy="{Y(y):.1f}" r="3" fill="{_COLOURS[name]}"/>' for x, y in own]
    y = Y(own[-1][1]) + 4 if last is None else max(Y(own[-1][1]) + 4, last + 14)   # labels do not overlap
    last = y
    parts.append(f'<text x="{X(own[-1][0]) + 8:.1f}" y="{y:.1f}" fill="{_COLOURS[name]}">{name}</text>')
  return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDE} {_HIGH}" width="{_WIDE}" height="{_HIGH}" '
          'font-family="system-ui, sans-serif" font-size="12"><rect width="100%" height="100%" fill="#fff"/>'
          + '\n'.join(parts) + '</svg>\n')


# The command.

def load_model(args) -> Model:
  cfg = SMALL if args.model == 'small' else sizes.get(args.model, max_positions=1 << 18)
  compute = transformer.Compute(dtype=args.dtype, impl=api.choose(args.impl, jax.devices()[0]).impl)
  init = jax.jit(lambda: spec.init(transformer.spec(cfg), jax.random.key(0), args.dtype))
  return Model(init(), cfg, compute)


def ttft(args, set_up, machine) -> None:
  """Times first tokens, and prints the tables."""
  set_up(args)
  model, rate = load_model(args), None
  facts, results = machine(args), []
  itemsize = jnp.dtype(args.dtype).itemsize
  off = check(model, make_prompt(min(args.lengths), args.block, args.last, model.cfg.vocab))
  rate = rates(args)
  print(f'{facts["cpu"]}, {args.cores} of {facts["cpus"]} cores, {facts["jax_devices"]}, load {facts["load"][0]:.1f}, '
        f'{facts["versions"]}\n{facts["attention"]}\n'
        f'model {args.model}, {args.dtype}, random weights; blocks of about {args.block} tokens, '
        f'the last of {args.last}, {len(_SINKS)} sinks; cache {bytes_per_token(model.cfg, itemsize):,} bytes per token, '
        f'{bytes_per_token(model.cfg, 1):,} in int8\nlogits over cached blocks are {off:.1g} standard deviations off the '
        f'masked forward pass; rates {rate["flops"] / 1e12:.3g} TFLOP/s, {rate["bytes"] / 1e9:.3g} GB/s\n\n'
        '| tokens | states | ms | full / this | limit / this | samples |\n|---|---|---|---|---|---|', flush=True)
  with tempfile.TemporaryDirectory() as folder:
    for length in args.lengths:
      result = measure_length(model, length, rate, args, pathlib.Path(folder))
      results.append(result)
      print('\n'.join(lines_of(result)), flush=True)
      if args.json:
        metrics.write_json(args.json, {'machine': facts, 'rates': rate, 'results': results,
                                       'model': dataclasses.asdict(model.cfg), 'dtype': args.dtype})
  print('\nparts of the time to the first token, in ms; rotating keys is part of gather\n\n'
        '| tokens | states | find and load | gather | last block | first token | rotate |\n|---|---|---|---|---|---|---|')
  print('\n'.join(line for result in results for line in parts_lines(result)))
  if args.plot:
    args.plot.write_text(picture(results, f'Time to the first token, {args.model}, {facts["cpu"]}'))


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
    seconds = measure(chosen, args.samples)
    del chosen
    gc.collect()
    parts = split(model, prompt, args.samples, args.states)
  needed = cost(model.cfg, prompt.with_sinks(), jnp.dtype(model.compute.dtype).itemsize)
  limit = {name: max(own[what] / rate[what] for what in rate) for name, own in needed.items()}
  return {'tokens': prompt.tokens, 'blocks': len(prompt.blocks) - 1, 'seconds': seconds, 'parts': parts, 'limit': limit}


def add_ttft(commands, set_up, machine) -> None:
  parser = commands.add_parser('ttft', help='time to the first token over cached blocks, against full prefill')
  default = '(default %(default)s)'
  parser.add_argument('--model', default='small', help=f'small, or one of {", ".join(sizes.SIZES)} {default}')
  parser.add_argument('--lengths', type=int, nargs='+', default=list(DEFAULT), metavar='T', help='tokens of the prompts '
                      '(default 1024 to 65536)')
  parser.add_argument('--block', type=int, default=512, help=f'mean tokens of a context block {default}')
  parser.add_argument('--last', type=int, default=128, help=f'tokens of the last block {default}')
  parser.add_argument('--samples', type=int, default=3, help=f'of each way, fewer of slow ones {default}')
  parser.add_argument('--dtype', choices=('float32', 'bfloat16'), default='float32', help=default)
  parser.add_argument('--impl', default='auto', help=f'of attention {default}')
  parser.add_argument('--states', nargs='+', choices=STATES, default=STATES, help='of the context blocks, beside full '
                      'prefill (default: all)')
  parser.add_argument('--no-torch', action='store_true', help='leave transformers with torch out')
  parser.add_argument('--peak-tflops', type=float, help='what the device can compute (default: what a matmul reaches)')
  parser.add_argument('--bandwidth-gbs', type=float, help='of its memory (default: what a copy reaches)')
  parser.add_argument('--cores', type=int, default=1, help=f'cores that everybody may use {default}')
  parser.add_argument('--json', type=pathlib.Path, metavar='FILE', help='every sample')
  parser.add_argument('--plot', type=pathlib.Path, metavar='FILE.svg', help='seconds against tokens')
  parser.set_defaults(devices=1, run=lambda args: ttft(args, set_up, machine))
