"""What a training step of a config costs on each of its devices: operations, traffic between devices, and time.

  operations     what the model needs (models/flops.py), by device. Assumed are full rows: one document each, of max_blocks
                 blocks that are equally long; and as loss tokens those of reading blocks (loss_over 'readers' or 'answer',
                 or no weight on text), block dropout with its mean, else all
  received       bytes that a device receives from others in a step, at least: an all-gather or reduce-scatter of x bytes
                 over n devices x (n - 1) / n, an all-reduce twice that
    weights      where a rule cuts the model width ('embed'): the matrices before the forward and before the backward
                 pass, and the teacher's once, in the smaller of the dtypes they are kept and computed in; per slice of the
                 batch (accumulate). Of an embedding that is no head, rows are looked up where they are
    gradients    in the smaller of model.dtype and compute.dtype: a reduce-scatter over the devices that share a parameter
                 and the batch, an all-reduce over those that share the batch only; per slice
    activations  where a rule cuts heads or mlp ('tensor'): two all-reduces per layer, forward and backward, and in between
                 if remat is 'full'; the teacher's two. Where one cuts tokens ('context'): keys and values of each layer,
                 gathered for a forward pass, and their gradients back; in block mode without readers among the context
                 blocks (kernels/context_parallel.py) those of the part before, and all-reduces of the queries that are sent
                 and of what they read (float32)
  time           the longer one of the operations at --mfu of the peak (dense bfloat16) and of the bytes at the bandwidth of
                 all of a device's links, as if one hid behind the other completely
  MFU            what the operations then are of the peak in that time: at most --mfu, less where links are the bound

It is an estimate with an assumption in it (--mfu), not a measurement: kernels, remat, stalls for data and everything that
XLA does not overlap are in that one number. Links are those inside a TPU slice, or NVLink inside a node; between nodes or
slices there is less (--link_gbs).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from blockattn import mesh as mesh_lib, tree
from blockattn.kernels import context_parallel
from blockattn.models import classifier, flops, spec as spec_lib, transformer
from blockattn.train import job


@dataclasses.dataclass(frozen=True)
class Device:
  """
  Attributes:
    kind: JAX's name of it, for its peak in models/flops.py.
    memory: bytes.
    links: bytes per second that it receives over all its links, TPU: half of the published bidirectional bandwidth.
  """
  kind: str
  memory: float
  links: float

  @property
  def platform(self) -> str:
    """JAX's name for it."""
    return 'tpu' if self.kind.startswith('TPU') else 'gpu'


# Sources as of flops.PEAK_TFLOPS.
DEVICES = {
    'v4': Device('TPU v4', 32e9, 300e9),
    'v5e': Device('TPU v5 lite', 16e9, 200e9),
    'v5p': Device('TPU v5p', 95e9, 600e9),
    'v6e': Device('TPU v6 lite', 32e9, 400e9),
    'a100': Device('NVIDIA A100', 80e9, 300e9),
    'h100': Device('NVIDIA H100', 80e9, 450e9),
    'h200': Device('NVIDIA H200', 141e9, 450e9),
    'b200': Device('NVIDIA B200', 180e9, 900e9),
}


def estimate(options: job.Options, made: job.Job, device: Device | None, *, mfu: float = 0.4,
             links: float | None = None) -> dict:
  """A row per quantity of the module's docstring.

  Args:
    device: None: nothing is said about time.
    mfu: share of the peak that operations are assumed to reach.
    links: bytes per second, in place of the device's.

  Returns:
    {'flops': of a device, 'received': {part: bytes}, and with a device 'peak' (FLOP/s), 'assumed_mfu', 'links', 'seconds',
    'seconds_of_operations' (at the assumed MFU), 'seconds_of_links', 'mfu', 'tokens_per_s' (of all devices)}.
  """
  devices = math.prod(made.placement.mesh.shape.values())
  needed, received = operations(options, made) / devices, received_bytes(options, made)
  found = {'flops': needed, 'received': received}
  if device is None:
    return found
  peak = flops.peak(device.kind)
  links = links or device.links
  computing, sending = needed / (mfu * peak), sum(received.values()) / links
  seconds = max(computing, sending)
  return found | {'peak': peak, 'assumed_mfu': mfu, 'links': links, 'seconds': seconds,
                  'seconds_of_operations': computing, 'seconds_of_links': sending, 'mfu': needed / peak / seconds,
                  'tokens_per_s': options.batch * options.data.length / seconds}


def whole_run(options: job.Options, step: dict, devices: int) -> dict:
  """Of the training whose step is `estimate`d.

  Returns:
    {'steps', 'rows': that are read, 'tokens': of them, 'flops': of all devices, and with a device 'hours', 'device_hours'};
    what is beside the steps (compiling, checkpoints, evaluations) is not in it.
  """
  rows = options.steps * options.batch
  found = {'steps': options.steps, 'rows': rows, 'tokens': rows * options.data.length,
           'flops': options.steps * devices * step['flops']}
  if 'seconds' not in step:
    return found
  hours = options.steps * step['seconds'] / 3600
  return found | {'hours': hours, 'device_hours': hours * devices}


def operations(options: job.Options, made: job.Job) -> float:
  """Of a step, over all devices."""
  length = options.data.length
  count = min(made.blocks.max_blocks, length)
  cut = flops.one_document(np.diff(np.linspace(0, length, count + 1).round()))
  return options.batch * made.flops(cut).total(made.loss_tokens(cut))


def received_bytes(options: job.Options, made: job.Job) -> dict[str, float]:
  """Bytes that a device receives in a step, at least, by part."""
  place, cfg, compute = made.placement, made.cfg, options.compute
  local, kept = jnp.dtype(compute.dtype).itemsize, jnp.dtype(options.model.dtype).itemsize
  rows = options.batch / place.size('batch') / options.accumulate
  passes = [_Pass(cfg, place, view.tokens, min(local, kept), 1, context_parallel=view.near and compute.far_queries != 0)
            for view in made.views]
  if made.teacher:
    sizes = [jnp.dtype(dtype).itemsize for dtype in (made.teacher.dtype, made.teacher.compute_dtype)]
    passes.append(_Pass(made.teacher.cfg, made.teacher.placement, options.data.length, min(sizes), 0))
  again = 1 if compute.remat in ('full', 'offload') else 0
  weights = activations = 0.0
  for one in passes:
    cfg, forwards = one.cfg, 1 + one.backward * again
    weights += one.size * sum(_received(one.place, leaf) for leaf in _gathered(cfg)) * (1 + one.backward)
    state = rows * one.tokens / one.place.size('tokens') * local
    tensor, context = one.place.size('mlp'), one.place.size('tokens')
    activations += cfg.layers * state * cfg.width * 2 * 2 * _part(tensor) * (forwards + one.backward)
    shared, heads = (n / one.place.size('kv_heads') * cfg.head_dim for n in (cfg.kv_heads, cfg.heads))
    if one.context_parallel and context > 2:
      far = rows * context_parallel.most_far_queries(one.tokens // context, one.tokens, compute.far_queries)
      read = state * 2 * shared + far * 2 * heads * _part(context) * (local + 4)
    else:
      read = state * context * 2 * shared * _part(context)
    activations += cfg.layers * read * (forwards + one.backward)
  slices = options.accumulate
  return {'weights': slices * weights, 'gradients': slices * min(local, kept) * gradient_elements(made.specs, place),
          'activations': slices * activations}


@dataclasses.dataclass(frozen=True)
class _Pass:
  """Rows of so many tokens through a model that `place` places, its weights of `size` bytes; `backward`: 1 or 0 times.
  `context_parallel`: of rows over devices only the last block reads further back than the part before."""
  cfg: transformer.ModelConfig
  place: mesh_lib.Placement
  tokens: int
  size: int
  backward: int
  context_parallel: bool = False


def gradient_elements(specs, place) -> float:
  """Numbers received to add up the gradients."""
  total = 0.0
  rows = set(place.mesh_axes('batch')) | set(place.mesh_axes('tokens'))
  ways = lambda axes: math.prod(place.mesh.shape[m] for m in axes)
  for leaf in jax.tree.leaves(specs, is_leaf=_is_spec):
    cut = {m for axis in leaf.axes if axis is not None for m in place.mesh_axes(axis)}
    whole = math.prod(leaf.shape) / ways(cut - rows)
    total += whole * _part(ways(cut & rows)) + 2 * whole / ways(cut & rows) * _part(ways(rows - cut))
  return total


def _gathered(cfg):
  """The parameters that are needed whole; of an embedding that is no head, rows are looked up where they are."""
  is_head = cfg.tied and not isinstance(cfg, classifier.ClassifierConfig)
  return [leaf for name, leaf in tree.named_leaves(classifier.spec(cfg), is_leaf=_is_spec) if name != 'embed' or is_head]


def _received(place, leaf):
  """Elements of a parameter that a device gathers: all that its rule cuts along the model width."""
  ways = place.size('embed') if 'embed' in leaf.axes else 1
  others = math.prod(place.size(axis) for axis in leaf.axes if axis not in (None, 'embed'))
  return math.prod(leaf.shape) / others * _part(ways)


def _part(ways):
  return (ways - 1) / ways


def _is_spec(x):
  return isinstance(x, spec_lib.ParamSpec)
