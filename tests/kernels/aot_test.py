"""The kernels compiled for TPUs and GPUs on a machine without either: what fits, what spills, how full the schedule is.

Needs the compilers (extra `kernels-ci`, which .ci/run installs); skipped without.
"""

import jax
import pytest

from tools import aot

pytestmark = pytest.mark.aot
LONG = 65536   # tokens; heads and widths below are those of Qwen3-4B and Llama-3.1-8B (32 and 8 of 128), and others


@pytest.fixture(autouse=True)
def compilers(request):
  target = request.node.callspec.params['target']
  if (missing := aot.missing_compiler(target)) is not None:
    pytest.skip(missing)


@pytest.mark.slow
# The common shape on every target; what takes more memory on one of each generation, of v5e and v5p alternately.
@pytest.mark.parametrize('target, dtype, width', [
    *((target, 'bfloat16', 128) for target in aot.TPUS), ('v5e', 'float32', 64), ('v6e', 'float32', 64),
    ('v5p', 'bfloat16', 256), ('v6e', 'bfloat16', 256)])
def test_long_rows_compile_for_tpus_in_linear_memory(target, dtype, width):
  """Forward and backward within the core's scalar and vector memory, which the compiler checks."""
  result = aot.compile_once(target, aot.Problem((32, 8, width), LONG, dtype))
  queries = LONG * 32 * width * (2 if dtype == 'bfloat16' else 4)
  # What changes its layout between [B, T, N, H] and [B, N, T, H]: q, k, v, out and their gradients; of 64 columns, compilers
  # from jax 0.11 on pad some to the 128 lanes.
  assert result['temporary_bytes'] < (8 if width >= 128 else 12) * queries
  assert result['temporary_bytes'] < 2 * LONG * LONG   # not the bfloat16 scores of one head


@pytest.mark.slow
@pytest.mark.parametrize('target, least', [('v5e', {'forward': 1.03, 'dq': 1.05, 'dkv': 0.98}),
                                           ('v6e', {'forward': 1.05, 'dq': 1.05, 'dkv': 1.05})])
def test_schedules_are_shorter_than_those_of_splash_attention(target, least):
  """A tile without mask against a tile of JAX's own kernel, in bundles, which leaves scaling to its caller. v5e's backward
  kernels are bound by its matrix units: nearly every slot is taken, so that there is nothing to win."""
  kernels = aot.compile_for(target, aot.Problem((8, 2, 128)), ('full', 'peer'))['kernels']
  for kernel, ratio in least.items():
    full, peer = kernels[kernel]['full'], kernels[kernel]['peer']
    assert peer['bundles'] >= ratio * full['bundles'], kernel
    assert ratio >= 1 or full['mxu'] >= 0.97, kernel


@pytest.mark.skipif(jax.__version_info__ >= (0, 12), reason='that compiler spills; the extra gpu stops before it')
@pytest.mark.parametrize('target', aot.GPUS)
@pytest.mark.parametrize('width', [64, 128])
def test_gpu_kernels_do_not_spill(target, width):
  kernels = aot.compile_once(target, aot.Problem((32, 8, width), LONG))['kernels']
  allowed = {'forward': 0, 'dq': 0, 'dkv': 8 if width == 128 else 0}   # bytes, once per visit to a tile with a mask
  assert {name: figures['spills'] <= allowed[name] for name, figures in kernels.items()} == dict.fromkeys(allowed, True)
  assert not any(figures['serialised'] for figures in kernels.values())
