"""Qwen3, Qwen2.5 and Llama 3.x as pure functions over stacked parameters.

`apply(params, tokens, layout, cfg, compute)` gives the hidden states after the final norm; `logits` multiplies them by
the head. Teacher and student are this same function: the teacher's layout is `blocks.as_one_block`.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from blockattn import blocks, errors, mesh as mesh_lib, options
from blockattn.errors import UserError
from blockattn.kernels import api
from blockattn.models import weights as weights_lib
from blockattn.models.spec import ParamSpec

Array = jax.Array
Params = Any                     # a tree of `spec`, of arrays and matrices of models.weights
Angles = tuple[Array, Array]     # cosines and sines, see `rotary_angles`
Attend = Callable[..., Array]    # (q_BTNH, k_BTKH, v_BTKH, ...) -> o_BTNH
FAMILIES = ('qwen3', 'qwen2', 'llama')
REMAT = ('none', 'dots', 'full', 'offload')
_LAYER_INPUT, _PRODUCT = 'layer_input', 'product'   # by which remat 'offload' and 'dots' find them


class Inside(NamedTuple):
  """What a layer makes on its way.

  Attributes:
    k, v: [B, T, K, H], what a cache would keep: keys not yet rotated, which are the same wherever the token stands.
    out: [B, T, D], what its attention adds to the residual stream.
  """
  k: Array
  v: Array
  out: Array


Keep = Callable[..., Any]        # (Inside, ...) -> what is kept of a layer


@dataclasses.dataclass(frozen=True)
class Llama3Rope:
  """Rotary scaling of Llama 3.1 and 3.2: low frequencies are slowed down by `factor`, with a smooth passage."""
  factor: float
  low_freq_factor: float
  high_freq_factor: float
  original_length: int


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """The architecture; names follow the axis legend in blocks.py."""
  family: str                       # one of FAMILIES: decides the Hugging Face class it is exported as
  vocab: int                        # V
  width: int                        # D
  layers: int                       # L
  heads: int                        # N
  kv_heads: int                     # K
  head_dim: int                     # H, independent of D / N
  mlp: int                          # F
  norm_eps: float = 1e-6
  rope_theta: float = 10000.0
  rope_scaling: Llama3Rope | None = None
  qk_norm: bool = False             # RMSNorm over each head of q and k (Qwen3)
  attention_bias: bool = False      # of q, k and v, and of o but in Qwen2
  mlp_bias: bool = False
  tied: bool = False                # the head is the embedding
  max_positions: int = 4096
  learned_sinks: int = 0            # extra embedding rows, of sinks and tails, for the token ids V, V + 1, ...

  def __post_init__(self):
    if self.family not in FAMILIES:
      raise UserError(f'model family {self.family!r}; choose one of {", ".join(FAMILIES)}')
    if self.heads % self.kv_heads:
      raise UserError(f'{self.heads} query heads cannot share {self.kv_heads} key/value heads evenly')
    if self.head_dim % 2:
      raise UserError(f'head_dim {self.head_dim} is odd; rotary positions need pairs')

  @property
  def output_bias(self) -> bool:
    return self.attention_bias and self.family != 'qwen2'


def without_sinks(cfg: ModelConfig) -> ModelConfig:
  """The architecture of the model that a student with learned sinks began as."""
  return dataclasses.replace(cfg, learned_sinks=0)


@dataclasses.dataclass(frozen=True)
class Compute:
  """How to compute, which never changes what is computed.

  Attributes:
    dtype: of activations: float32, bfloat16
    impl: attention: reference, xla, tpu, gpu; auto: see kernels.api
    tiles: (query tile, key tile); None: by device
    remat: what the backward pass computes again: none, dots (all but the products of `dense` and attention), full, offload:
      as full, and what each layer starts from waits in the host's memory (TPU and GPU)
    far_queries: context parallelism: queries of a row that are sent to far keys, at most; None: 1 in 64
    placement: the mesh with its rules; None: one device.
    platform: JAX's name of what computes, 'cpu', 'gpu' or 'tpu', which need not be here; None: that of this process.
  """
  dtype: str = 'float32'
  impl: str = 'auto'
  tiles: tuple[int, int] | None = None
  remat: str = 'dots'
  far_queries: int | None = None
  placement: mesh_lib.Placement | None = options.not_a_key(default=None)
  platform: str | None = options.not_a_key(default=None)

  def __post_init__(self):
    errors.check_choice('config.compute.remat', self.remat, REMAT)
    if self.far_queries is not None:
      errors.check_number('config.compute.far_queries', self.far_queries, 0)
    for size in self.tiles or ():
      errors.check_number('config.compute.tiles', size, 1)
    if len(self.tiles or (0, 0)) != 2:
      raise UserError(f'config.compute.tiles={self.tiles}; give two numbers, of a query tile and of a key tile: 128,128')

  @property
  def row_parts(self) -> int:
    """Devices that the tokens of a row are sharded over (context parallelism)."""
    return 1 if self.placement is None else self.placement.size('tokens')


def spec(cfg: ModelConfig) -> dict[str, Any]:
  """The parameter tree as ParamSpec. Matrices start at std 1/sqrt(fan-in), those that write into the residual stream
  at 1/sqrt(2 L fan-in); a tied embedding starts small enough to be a head."""
  D, N, K, H, F, L, V = cfg.width, cfg.heads, cfg.kv_heads, cfg.head_dim, cfg.mlp, cfg.layers, cfg.vocab
  stacked = lambda shape, axes, **kw: ParamSpec((L, *shape), ('layers', *axes), **kw)
  reads = D ** -0.5
  writes = lambda fan_in: (2 * L * fan_in) ** -0.5
  layers = {
      'attn_norm': stacked((D,), ('width',), fill=1.0),
      'q': stacked((D, N, H), ('embed', 'heads', 'head_dim'), std=reads),
      'k': stacked((D, K, H), ('embed', 'kv_heads', 'head_dim'), std=reads),
      'v': stacked((D, K, H), ('embed', 'kv_heads', 'head_dim'), std=reads),
      'o': stacked((N, H, D), ('heads', 'head_dim', 'embed'), std=writes(N * H)),
      'mlp_norm': stacked((D,), ('width',), fill=1.0),
      'gate': stacked((D, F), ('embed', 'mlp'), std=reads),
      'up': stacked((D, F), ('embed', 'mlp'), std=reads),
      'down': stacked((F, D), ('mlp', 'embed'), std=writes(F)),
  }
  if cfg.attention_bias:
    layers |= {'q_bias': stacked((N, H), ('heads', 'head_dim')), 'k_bias': stacked((K, H), ('kv_heads', 'head_dim')),
               'v_bias': stacked((K, H), ('kv_heads', 'head_dim'))}
  if cfg.output_bias:
    layers |= {'o_bias': stacked((D,), ('width',))}
  if cfg.qk_norm:
    layers |= {'q_norm': stacked((H,), ('head_dim',), fill=1.0), 'k_norm': stacked((H,), ('head_dim',), fill=1.0)}
  if cfg.mlp_bias:
    layers |= {'gate_bias': stacked((F,), ('mlp',)), 'up_bias': stacked((F,), ('mlp',)),
               'down_bias': stacked((D,), ('width',))}
  specs = {'embed': ParamSpec((V, D), ('vocab', 'embed'), std=reads if cfg.tied else 1.0),
           'layers': layers, 'final_norm': ParamSpec((D,), ('width',), fill=1.0)}
  if not cfg.tied:
    specs['head'] = ParamSpec((V, D), ('vocab', 'embed'), std=reads)
  if cfg.learned_sinks:
    specs['sinks'] = ParamSpec((cfg.learned_sinks, D), (None, 'width'), std=reads if cfg.tied else 1.0)
  return specs


def apply(params: Params, tokens: Array, layout: blocks.BlockLayout, cfg: ModelConfig, compute: Compute) -> Array:
  """Hidden states after the final norm.

  Args:
    params: tree of `spec(cfg)`, in any float dtype; used in compute.dtype.
    tokens: int32 [B, T].
    layout: BlockLayout [B, T].

  Returns:
    x_BTD in compute.dtype.
  """
  return apply_embedded(params, embed(params, tokens, cfg, compute), layout, cfg, compute)


def apply_embedded(params: Params, x_BTD: Array, layout: blocks.BlockLayout, cfg: ModelConfig, compute: Compute) -> Array:
  """`apply` to embeddings x_BTD in place of tokens."""
  return run_layers(params, x_BTD, layout.position, cfg, compute, _attention(layout, compute))[0]


def apply_keeping(params: Params, tokens: Array, layout: blocks.BlockLayout, cfg: ModelConfig, compute: Compute, keep: Keep,
                  beside: tuple[Array, ...] = ()) -> tuple[Array, Any]:
  """`apply`, and what `keep` makes of every layer, see `run_layers`."""
  x_BTD = embed(params, tokens, cfg, compute)
  return run_layers(params, x_BTD, layout.position, cfg, compute, _attention(layout, compute), keep=keep, beside=beside)


def _attention(layout, compute) -> Attend:
  return lambda q, k, v, *_: _attend(q, k, v, layout, compute)


def run_layers(params: Params, x_BTD: Array, position: Array, cfg: ModelConfig, compute: Compute, attend: Attend, *,
               keep: Keep | None = None, beside: tuple[Array, ...] = ()) -> tuple[Array, Any]:
  """All layers and the final norm, with any attention.

  Args:
    x_BTD: embeddings, from `embed`.
    position: int32 [B, T].
    attend: (q_BTNH, k_BTKH, v_BTKH, *each of `beside`) -> o_BTNH, queries and keys already rotated.
    keep: (Inside, *each of `beside`) -> what to return of a layer; None: nothing.
    beside: arrays [L, ...] that attention takes too, each layer its own part.

  Returns:
    (x_BTD, what was kept of the layers, stacked along a first axis L, or None).
  """
  angles = rotary_angles(position, cfg)

  def layer(x_BTD, scanned):
    weights, own = scanned
    weights = weights_lib.cast(weights, compute.dtype)
    x_BTD, inside = decoder_layer(x_BTD, weights, angles, cfg, compute, lambda *qkv: attend(*qkv, *own))
    return x_BTD, None if keep is None else keep(inside, *own)

  x_BTD = constrain(x_BTD, compute)
  with jax.named_scope('layer'):
    x_BTD, kept = jax.lax.scan(_remat(layer, compute.remat), x_BTD, (params['layers'], tuple(beside)))
  return final_norm(params, x_BTD, cfg), kept


def final_norm(params: Params, x: Array, cfg: ModelConfig) -> Array:
  return rms_norm(x, params['final_norm'], cfg.norm_eps)


def decoder_layer(x_BTD: Array, w: Params, angles: Angles, cfg: ModelConfig, compute: Compute, attend: Attend
                  ) -> tuple[Array, Inside]:
  """One transformer layer.

  Args:
    x_BTD: residual stream.
    w: the layer's parameters, without the leading L axis.
    angles: (cos, sin) from `rotary_angles`.
    attend: (q_BTNH, k_BTKH, v_BTKH) -> o_BTNH, queries and keys already rotated.

  Returns:
    (x_BTD, Inside): the new residual stream, and what was made on the way to it.
  """
  h = rms_norm(x_BTD, w['attn_norm'], cfg.norm_eps)
  with jax.named_scope('attention'):
    q, k, v = dense(h, w['q']), dense(h, w['k']), dense(h, w['v'])
    if cfg.attention_bias:
      q, k, v = q + w['q_bias'], k + w['k_bias'], v + w['v_bias']
    if cfg.qk_norm:
      q, k = rms_norm(q, w['q_norm'], cfg.norm_eps), rms_norm(k, w['k_norm'], cfg.norm_eps)
    out = dense(attend(rotate(q, angles), rotate(k, angles), v), w['o'], contract=2)
  out = out + w['o_bias'] if cfg.output_bias else out
  x_BTD = constrain(x_BTD + out, compute)
  h = rms_norm(x_BTD, w['mlp_norm'], cfg.norm_eps)
  return constrain(x_BTD + _mlp(h, w, cfg), compute), Inside(k, v, out)


def dense(x: Array, w: weights_lib.Matrix, *, contract: int = 1, out: Any = None) -> Array:
  """x times w over the last `contract` axes of x and the first of w, accumulated and returned in dtype `out` if given.

  w is an array, or a matrix of models.weights: of 8 bits, whose products are scaled by output channel, or of low rank beside
  a frozen one.

  As one product of two matrices: with several token axes XLA's CPU backend writes transposed copies for the gradient
  of w, which makes the backward pass of a layer more than twice as slow.
  """
  return checkpoint_name(_product(x, w, contract, out), _PRODUCT)


def _product(x, w, contract, out=None):
  if isinstance(w, weights_lib.LowRank):
    low = _product(_product(x, w.down, contract), w.up, 1)
    return _product(x, w.base, contract, out) + w.factor * low
  if isinstance(w, weights_lib.Int8):
    product = _product(x, w.values.astype(x.dtype), contract, out)
    return product * w.scale.reshape(w.scale.shape[contract:]).astype(product.dtype)
  tokens, features = x.shape[:x.ndim - contract], w.shape[contract:]
  inner = math.prod(w.shape[:contract])
  product = jnp.dot(x.reshape(-1, inner), w.reshape(inner, -1), preferred_element_type=out)
  return product.reshape(*tokens, *features)


def head_of(params: Params, cfg: ModelConfig) -> weights_lib.Matrix:
  """The output matrix [V, D]."""
  return params['embed'] if cfg.tied else params['head']


@jax.named_scope('head')
def project(head_VD: weights_lib.Matrix, x: Array) -> Array:
  """Float32 logits [..., V] of hidden states [..., D]."""
  turned = jax.tree.map(jnp.transpose, head_VD)   # Int8 is two arrays
  return dense(x, weights_lib.cast(turned, x.dtype), out=jnp.float32)


def head_function(params: Params, cfg: ModelConfig) -> jax.tree_util.Partial:
  """Hidden states -> float32 logits, as a pytree of the head."""
  return jax.tree_util.Partial(project, head_of(params, cfg))


def logits(params: Params, x: Array, cfg: ModelConfig) -> Array:
  """Float32 logits [..., V] of hidden states [..., D]."""
  return project(head_of(params, cfg), x)


@jax.named_scope('mlp')
def _mlp(h, w, cfg):
  gate, up = dense(h, w['gate']), dense(h, w['up'])
  if cfg.mlp_bias:
    gate, up = gate + w['gate_bias'], up + w['up_bias']
  down = dense(jax.nn.silu(gate) * up, w['down'])
  return down + w['down_bias'] if cfg.mlp_bias else down


def _attend(q, k, v, layout, compute):
  if compute.placement is None:
    return api.block_attention(q, k, v, layout, impl=compute.impl, tiles=compute.tiles,
                               platform=compute.platform)
  place = compute.placement
  context_axes = place.mesh_axes('tokens') if compute.row_parts > 1 else ()
  return api.block_attention_on_mesh(q, k, v, layout, place.mesh, batch_axes=place.mesh_axes('batch'),
                                     head_axes=place.mesh_axes('kv_heads'), context_axes=context_axes, impl=compute.impl,
                                     tiles=compute.tiles, far_queries=compute.far_queries, platform=compute.platform)


@jax.named_scope('embed')
def embed(params: Params, tokens: Array, cfg: ModelConfig, compute: Compute) -> Array:
  """Embeddings [..., D] in compute.dtype of token ids int32 [...]."""
  x = weights_lib.rows(_whole_rows(params['embed'], compute), jnp.minimum(tokens, cfg.vocab - 1)).astype(compute.dtype)
  if cfg.learned_sinks:
    sinks = jnp.take(params['sinks'], jnp.maximum(tokens - cfg.vocab, 0), axis=0).astype(compute.dtype)
    x = jnp.where((tokens >= cfg.vocab)[..., None], sinks, x)
  return x


def _whole_rows(table, compute):
  """The table whole along the model width on every device: looking up parts of rows, and cutting the result by the batch
  afterwards, the compiler would bring all activations to all devices."""
  if compute.placement is None or compute.placement.size('embed') == 1:
    return table
  return jax.tree.map(lambda w: compute.placement.constrain(w, 'vocab', 'width'), weights_lib.cast(table, compute.dtype))


def constrain(x_BTD: Array, compute: Compute) -> Array:
  return x_BTD if compute.placement is None else compute.placement.constrain(x_BTD, 'batch', 'tokens', 'width')


def _remat(layer, remat):
  if remat == 'none':
    return layer
  policies = jax.checkpoint_policies
  if remat == 'offload':
    named = lambda x_BTD, scanned: layer(checkpoint_name(x_BTD, _LAYER_INPUT), scanned)
    policy = policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[], names_which_can_be_offloaded=[_LAYER_INPUT], offload_src='device',
        offload_dst='pinned_host')
    return jax.checkpoint(named, policy=policy, prevent_cse=False)
  saved = policies.save_only_these_names(_PRODUCT, api.KEPT) if remat == 'dots' else None
  return jax.checkpoint(layer, policy=saved, prevent_cse=False)


@jax.named_scope('norm')
def rms_norm(x: Array, scale: Array, eps: float) -> Array:
  """Root-mean-square norm (arXiv 1910.07467) over the last axis, computed in float32."""
  x32 = x.astype(jnp.float32)
  normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
  return normed.astype(x.dtype) * scale.astype(x.dtype)


def rotary_frequencies(cfg: ModelConfig) -> Array:
  """Radians per position of each rotary pair: float32 [H / 2].

  Plain: theta^(-2i/H) (arXiv 2104.09864). Llama 3: wavelengths above original_length / low_freq_factor are stretched
  by `factor`, those below original_length / high_freq_factor are kept, those between are interpolated
  (Llama 3.1 model card; transformers' `llama3` rope type).
  """
  i = jnp.arange(cfg.head_dim // 2, dtype=jnp.float32)
  frequency = cfg.rope_theta ** (-2.0 * i / cfg.head_dim)
  if cfg.rope_scaling is None:
    return frequency
  s = cfg.rope_scaling
  turns = s.original_length * frequency / (2 * math.pi)   # full turns over the original context
  keep = jnp.clip((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor), 0.0, 1.0)
  return keep * frequency + (1.0 - keep) * frequency / s.factor


def rotary_angles(position: Array, cfg: ModelConfig) -> Angles:
  """(cos, sin), each float32 [B, T, H / 2]."""
  angle = position.astype(jnp.float32)[..., None] * rotary_frequencies(cfg)
  return jnp.cos(angle), jnp.sin(angle)


def rotate(x: Array, angles: Angles) -> Array:
  """Rotates x [B, T, heads, H] by its positions; the pairs are (i, i + H/2), as in Hugging Face checkpoints."""
  cos, sin = (a[:, :, None, :] for a in angles)
  low, high = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1).astype(x.dtype)
