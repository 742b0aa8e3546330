"""The memory that a training step of a config needs on a device, estimated from shapes.

The memory of a device is estimated row by row. P is the number of parameters that the rules leave on a device; b, the
rows that it computes at a time, is batch / accumulate / devices of the 'batch' rule; T is the tokens of a row, and T' =
T + (sinks + tails + seam + overlap + align - 1) * max_blocks those of the student's rows, a device's share of them where the
'tokens' rule cuts rows; size() is that of a dtype. N, K, F and V are a device's share.

  parameters     P size(model.dtype); of a LoRA student those that it trains, here and in the rows that follow
  optimizer      Adam's two moments: 2 P size(model.dtype); Muon has one of each matrix that it moves
  gradients      P size(model.dtype), and P float32 more if accumulate > 1: the slice at hand, and the sum so far
  teacher        its parameters in teacher.dtype, placed by teacher.rules; distillation only, none if teacher.logits has
                 what it says
  frozen         what a LoRA student adds to, in model.dtype; 0 where that is the teacher, too
  cast           remat 'none' and 'dots' keep all layers' weights in compute.dtype for the backward pass
  saved          activations from the forward to the backward pass, as JAX's own differentiation lists them; attention
                 counts as a fused kernel that keeps q, k, v, its output and one float32 per query and head. Roughly,
                 in units of L b T' size(compute.dtype): remat 'full' D; 'dots' 2 D + 2 (N + K) H + 2 F; 'none' every
                 intermediate value of a layer, and where rows are cut the keys and values of all of their parts.
                 Fine-tuning in mode 'both' counts both views. With remat 'offload' the inputs of all layers are in the
                 host's memory, which is not counted.
  matching       distill.match_weight: what the teacher's attention gave, L b T' D size(teacher.compute_dtype), and with
                 remat 'none' what the student's gave
  hidden         last hidden states [b, T, D] of student (as they are, in loss order, gradient) and teacher (two)
  batch          the arrays of the global batch's rows on this device
  loss: logits   float32 [b, chunk, V]: logits and log-probabilities of student and teacher and the student's gradient,
                 5 in all; 3 in fine-tuning, and of the segmenter, whose are [b, T, 2]
  loss: head     the output matrix: where a rule cuts it along 'embed', the whole of it and of its gradient in
                 model.dtype, and of the teacher's; and a copy in compute.dtype if that is another one
  layer: values  the layer at work in the backward pass: all its intermediate values, whose room its gradients take over
  layer: weights one transformer layer's, as for the head
  total          the rows above 'loss' and the larger one of 'loss' and 'layer', which are never there together

Compared with the compiler's count (CPU, float32, Qwen3-0.6B cut to 8 layers, ctx=2048, 8 devices; distillation with
each remat, tensor=2, accumulate=2, a small vocabulary, and fine-tuning) parameters, optimizer, teacher and batch are
exact, and the rest is between 8% too low and 12% too high; what 'dots' keeps has changed since. The compiler for TPUs
takes more: for Qwen3-0.6B on v5e:4x4 (distillation, jax 0.10.2) the total is 9% above the estimate at ctx=4096,
chunk=64, 38% at ctx=32768, context=2, accumulate=2, chunk=256, and 43% at ctx=4096, chunk=512, where logits take some 8
copies in place of 5. So leave room, or let --aot count.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.extend.core import Var

from blockattn.kernels import api
from blockattn.models import classifier, flops, spec as spec_lib, transformer
from blockattn.train import job


def rows(options: job.Options, made: job.Job) -> dict[str, int]:
  """Of the batch on a device, and those that it computes at a time; tokens of a row, and of one of the student's."""
  count = options.batch // made.placement.size('batch')
  return {'per_device': count, 'at_a_time': count // options.accumulate, 'tokens': options.data.length,
          'student_tokens': made.padded}


def per_device(options: job.Options, made: job.Job) -> dict[str, int]:
  """Bytes on one device by row of the docstring above, 'total' included."""
  place, compute = made.placement, options.compute
  own, local, at_a_time = device_bytes(made.state.params), share(made.cfg, place), rows(options, made)['at_a_time']
  parts, size = place.size('tokens'), jnp.dtype(compute.dtype).itemsize
  views = [view.tokens // parts for view in made.views]
  length = options.data.length // parts
  others = at_a_time * 2 * local.kv_heads * made.cfg.head_dim * (parts - 1) * size
  logits = min(made.logits, length) * flops.head_weights(local) // local.width
  held = {
      'parameters': own,
      'optimizer': device_bytes(made.state.opt_state),
      'gradients': own + (device_bytes(made.state.params, 'float32') if options.accumulate > 1 else 0),
      'teacher': device_bytes(made.frozen.teacher),
      'frozen': 0 if made.frozen.base is made.frozen.teacher else device_bytes(made.frozen.base),
      'cast': cast_bytes(options, made),
      'saved': sum(saved_bytes(local, compute.dtype, compute.remat, at_a_time, tokens)
                   + (others * tokens * made.cfg.layers if compute.remat == 'none' else 0) for tokens in views),
      'matching': matching_bytes(options, made, at_a_time),
      'hidden': at_a_time * length * size * (3 * len(views) * made.cfg.width + (2 * made.teacher.cfg.width if made.teacher
                                                                               else 0)),
      'batch': device_bytes(made.batch),
  }
  loss = {
      'loss: logits': 4 * at_a_time * logits * (5 if made.teacher else 3),
      'loss: head': head_bytes(options, made, local),
  }
  one = dataclasses.replace(local, layers=1)
  layer = {
      'layer: values': saved_bytes(one, compute.dtype, 'none', at_a_time, max(views)) + 2 * others * max(views),
      'layer: weights': whole_bytes(spec_lib.count(transformer.spec(one)['layers']), options, place),
  }
  total = sum(held.values()) + max(sum(loss.values()), sum(layer.values()))
  return held | loss | layer | {'total': total}


def device_bytes(arrays, dtype: str | None = None) -> int:
  """Bytes of a device's part of abstract arrays with shardings; `dtype`: as if they were of this one."""
  return sum(math.prod(x.sharding.shard_shape(x.shape)) * jnp.dtype(dtype or x.dtype).itemsize
             for x in jax.tree.leaves(arrays))


def share(cfg, place) -> transformer.ModelConfig:
  """The model that one device computes: its share of heads, mlp and vocabulary."""
  heads = place.size('kv_heads')
  return dataclasses.replace(cfg, heads=cfg.heads // heads, kv_heads=cfg.kv_heads // heads,
                             mlp=cfg.mlp // place.size('mlp'), vocab=cfg.vocab // place.size('vocab'))


def whole_bytes(count, options, place) -> int:
  """Bytes of weights and their gradient while they are whole along the model width, beside a device's part of them."""
  kept, used = options.model.dtype, options.compute.dtype
  gathered = 2 * jnp.dtype(kept).itemsize if place.size('embed') > 1 else 0
  return count * (gathered + (jnp.dtype(used).itemsize if used != kept else 0))


def head_bytes(options, made, local) -> int:
  """Bytes of the output matrices of student and teacher while they are whole."""
  teacher = made.teacher
  copies = teacher and (made.placement.size('embed') > 1 or teacher.dtype != teacher.compute_dtype)
  return whole_bytes(flops.head_weights(local), options, made.placement) + (
      flops.head_weights(share(teacher.cfg, made.placement)) * jnp.dtype(teacher.compute_dtype).itemsize if copies else 0)


def matching_bytes(options, made, rows) -> int:
  if not (made.teacher and options.distill.match_weight):
    return 0
  kept = [made.teacher.compute_dtype] + [options.compute.dtype] * (options.compute.remat == 'none')
  tokens = sum(view.tokens for view in made.views) // made.placement.size('tokens')
  return made.cfg.layers * rows * tokens * made.cfg.width * sum(jnp.dtype(dtype).itemsize for dtype in kept)


def cast_bytes(options, made) -> int:
  if options.compute.remat in ('full', 'offload') or options.compute.dtype == options.model.dtype:
    return 0
  layers = job.abstract_params(transformer.spec(made.cfg)['layers'], options.compute.dtype, made.placement)
  return device_bytes(layers)


def saved_bytes(cfg, dtype: str, remat: str, rows: int, tokens: int) -> int:
  """Bytes of the values that differentiating the model keeps from its forward to its backward pass, less parameters.

  Args:
    cfg: what one device computes.
    dtype, remat: of Compute.
    rows, tokens: B and T on this device.
  """
  compute = transformer.Compute(dtype=dtype, remat=remat)
  params = spec_lib.abstract(classifier.spec(cfg), 'float32')
  position = jax.ShapeDtypeStruct((rows, tokens), jnp.int32)
  inputs = jax.ShapeDtypeStruct((rows, tokens, *classifier.position_shape(cfg)), jnp.int32)

  def residuals(params, tokens, position_BT):
    forward = lambda params: transformer.run_layers(params, classifier.embed(params, tokens, cfg, compute), position_BT, cfg,
                                                    compute, _fused_attention)[0]
    return jax.vjp(forward, params)[1]

  jaxpr = jax.make_jaxpr(residuals)(params, inputs, position).jaxpr
  # Parameters, and their copies in compute.dtype, also as the two-axis matrices that `transformer.dense` multiplies by.
  weights = {p.shape for p in jax.tree.leaves(params)} | {
      (*p.shape[:1], math.prod(p.shape[1:i]), math.prod(p.shape[i:])) for p in jax.tree.leaves(params)
      for i in range(2, len(p.shape))}
  kept = {var for var in jaxpr.outvars if isinstance(var, Var) and var.aval.shape not in weights
          and var.aval.memory_space != jax.memory.Space.Host}
  return sum(math.prod(var.aval.shape) * var.aval.dtype.itemsize for var in kept)


@jax.custom_vjp
def _fused_attention(q_BTNH, k_BTKH, v_BTKH):
  """Stands for a kernel in a trace of shapes: its result has the right shape, and it keeps what a kernel keeps."""
  return q_BTNH


def _fused_forward(q, k, v):
  out, lse = api.kept(q + 1, jnp.zeros(q.shape[:-1], jnp.float32))
  return out, (q, k, v, out, lse)


def _fused_backward(kept, out_BTNH):
  return out_BTNH, kept[1], kept[2]


_fused_attention.defvjp(_fused_forward, _fused_backward)
