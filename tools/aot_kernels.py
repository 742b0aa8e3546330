"""What tools.aot runs in a process of its own: the attention kernels, compiled for a device that is not there."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding

from blockattn import blocks
from blockattn.kernels import gpu, schedule, tiles as tile_sizes, tpu

TPUS = {'v5e': 'v5e:2x2', 'v5p': 'v5p:2x2x1', 'v6e': 'v6e:2x2'}
GPUS = ('h200',)
BODIES = ('partial', 'full')   # of the TPU kernels; 'peer' stands for splash attention
# What the compiler asks about the device.
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 151397597184
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H200 141GB HBM3e"
"""


@dataclasses.dataclass(frozen=True)
class Problem:
  """Attention of a row; the shape is query heads, key/value heads, width: by default that of Qwen3-4B and Llama-3.1-8B."""
  shape: tuple[int, int, int] = (32, 8, 128)
  length: int = 8192
  dtype: str = 'bfloat16'


def compile_kernels(target: str, problem: Problem, body: str = '') -> dict:
  """{'tiles', 'temporary_bytes', 'jax'} of a forward and backward pass.

  Args:
    body: of BODIES, or 'peer'; '': ours as they are.
  """
  if target in TPUS:
    topology = topologies.get_topology_desc(platform='tpu', topology_name=TPUS[target])
    platform, impl, attention = 'tpu', 'tpu', tpu
    if body in BODIES:   # one of the two bodies alone, to count its bundles
      tpu._choose = lambda _, masked, whole: whole() if body == 'full' else masked()
  else:
    topology = topologies.get_topology_desc(platform='cuda', topology_name='', target_config=H200, topology='1x1x1')
    platform, impl, attention = 'cuda', 'gpu', gpu
  device = topology.devices[0]
  N, K, H = problem.shape
  sizes = tile_sizes.default(impl, impl, problem.length, H)   # an implementation's name is its platform's
  abstract = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device))
  layout = jax.tree.map(lambda x: abstract((1, problem.length), x.dtype), blocks.from_lengths([[[8]]], 8))
  q, k = (abstract((1, problem.length, heads, H), jnp.dtype(problem.dtype)) for heads in (N, K))

  if body == 'peer':
    forward, inputs = _splash(problem, sizes), [abstract((x.shape[2], x.shape[1], H), x.dtype) for x in (q, k, k)]
  else:
    forward = lambda q, k, v, layout: attention.attention(q, k, v, schedule.token_marks(layout),
                                                          tile_sizes.Tiles(*sizes))[0]
    inputs = [q, k, k, layout]

  def both(inputs, grad):
    out, pull = jax.vjp(lambda q, k, v: forward(q, k, v, *inputs[3:]), *inputs[:3])
    return out, pull(grad)

  facts = {'device_kind': device.device_kind, 'num_cores': 132 if platform == 'cuda' else 1}
  if 'platform' in inspect.signature(AbstractDevice).parameters:
    facts['platform'] = platform
  with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ('x',), abstract_device=AbstractDevice(**facts))):
    memory = jax.jit(both).lower(inputs, inputs[0]).compile().memory_analysis()
  temporary = getattr(memory, 'temp_size_in_bytes', None) if platform == 'tpu' else None   # unknown for the GPU
  return {'tiles': list(sizes), 'temporary_bytes': temporary, 'jax': jax.__version__}


def _splash(problem, sizes):
  """JAX's splash attention, full causal, whose tile does the same products as ours."""
  from jax.experimental.pallas.ops.tpu import splash_attention as splash
  query, key = sizes
  tiles = splash.splash_attention_kernel.BlockSizes(
      block_q=query, block_kv=key, block_kv_compute=key, block_q_dkv=query, block_kv_dkv=key,
      block_kv_dkv_compute=key, block_q_dq=query, block_kv_dq=key)
  masks = splash.splash_attention_mask
  heads = masks.MultiHeadMask([masks.CausalMask((problem.length, problem.length))] * problem.shape[0])
  return splash.splash_attention_kernel.make_splash_mha(heads, head_shards=1, q_seq_shards=1, block_sizes=tiles)
