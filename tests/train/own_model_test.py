"""The method on a model that is not ours: examples/own_model.py."""

import numpy as np
import pytest

from examples import own_model


@pytest.mark.slow
@pytest.mark.usefixtures('standard_promotion')   # optax
def test_a_model_of_the_readers_own_learns_to_read_blocks():
  history = own_model.main(steps=40)
  assert np.all(np.isfinite(history)) and np.mean(history[-5:]) < 0.7 * np.mean(history[:5])
