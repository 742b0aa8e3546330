"""tools.bench step and overhead: that what they time can be made and run, without a clock."""

import argparse
import dataclasses

import jax
import jax.numpy as jnp
import pytest
import train_cases

from blockattn.models import transformer
from tools.bench import overhead, step, torch_step


@pytest.mark.slow
@pytest.mark.usefixtures('standard_promotion')   # as the tool runs
def test_every_step_can_be_made():
  cfg = step.model(64, 1, 128)
  batch = step.make_batch(1, 64, 2, 8, 8, 128)
  steps = step.make_steps(cfg, batch, train_cases.placement(), transformer.Compute(), max_blocks=3, chunk=32)
  made = {name: make() for name, make in steps.items()}
  assert all(one.flops(10.0) > 0 for one in made.values()) and step.FAMILY.keys() <= made.keys()
  dtypes = lambda name: {leaf.dtype.name for leaf in jax.tree.leaves(made[name].frozen.teacher)}
  assert dtypes(step.DISTILLED) == {'float32'} and 'int8' in dtypes('distillation, teacher of 8 bits')
  assert made[step.STORED].frozen.teacher is None and 'teacher' in made[step.STORED].batch


def test_the_peers_in_torch_learn():
  pytest.importorskip('torch')
  cfg = step.model(64, 1, 128)
  calls = torch_step.calls(cfg, step.make_batch(2, 64, 2, 8, 8, 128), step.LOW_RANK, 1e-2)
  assert {torch_step.FULL, torch_step.DISTILLED} <= calls.keys()
  for name in (torch_step.FULL, torch_step.DISTILLED):
    one = calls[name]()
    losses = [one() for _ in range(8)]
    assert losses[0] > losses[-1] > 0, name


@pytest.mark.slow
@pytest.mark.usefixtures('standard_promotion')   # optax
def test_the_loop_that_is_timed_goes_through():
  options, made, new_state, source = overhead.prepare(argparse.Namespace(steps=2, log_every=2, batch=8))
  values = {'loss': jnp.float32(1), 'grad_norm': jnp.float32(1), 'loss_tokens': jnp.float32(1)}
  nothing = dataclasses.replace(made, step=lambda state, frozen, batch: (state.replace(step=state.step + 1), values))
  assert overhead.in_the_loop(options, nothing, new_state(), source) > 0
