"""Training steps compiled for TPU slices that are not there, through tools.show.

Needs the compiler (extra `kernels-ci`, which .ci/run installs); what needs none is in show_test.py.
"""

import pytest

from blockattn.train import job
from configs import finetune
from tools import aot, aot_step, show

pytestmark = pytest.mark.aot
FIELDS = dict(family='qwen3', vocab=1024, width=128, layers=2, heads=4, kv_heads=2, head_dim=128, mlp=256, qk_norm=True,
              tied=True)


@pytest.fixture(autouse=True)
def compiler():
  if (missing := aot.missing_compiler('v5e')) is not None:
    pytest.skip(missing)


def small_options(**changes):
  config = finetune.get_config('mode=block')
  config.model.size = config.model.source = ''
  with config.model.fields.unlocked():
    config.model.fields.update(FIELDS)
  config.update_from_flattened_dict({
      'data.length': 256, 'data.max_blocks': 8, 'batch': 4, 'chunk': 128, 'mesh.fsdp': 2, 'mesh.tensor': 2} | changes)
  return job.options_of(config)


@pytest.mark.slow
def test_the_compiler_counts_what_is_held_as_the_estimate_does():
  options = small_options()
  compiled = aot_step.compile_for('v5e:2x2', options)
  memory, shown = compiled['memory'], show.describe(options, 4)['per_device']
  held = sum(shown[row] for row in ('parameters', 'optimizer', 'teacher', 'frozen', 'batch'))
  assert compiled['device'] == 'TPU v5 lite'
  assert memory['arguments'] == pytest.approx(held, rel=0.02)
  assert 0 < memory['temporaries'] and memory['total'] >= memory['arguments'] + memory['temporaries']


def test_what_does_not_compile_ends_with_what_the_compiler_said():
  with pytest.raises(RuntimeError, match='(?s)^v5e:2x2: the compilation failed:.*needs 3 devices, here are 4'):
    aot_step.compile_for('v5e:2x2', small_options(**{'mesh.fsdp': 3, 'mesh.tensor': 1}))
