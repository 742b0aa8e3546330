"""Block distillation of a model of your own: two functions are all that the method asks of it.

    python -m examples.own_model

`apply` gives hidden states for tokens and their layout; `head` gives what turns hidden states into logits. The model
below is a Flax NNX module of one layer. The teacher reads whole documents; the student starts as its copy and reads blocks.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from blockattn import blocks, optim
from blockattn.data import encode, packing
from blockattn.kernels import api
from blockattn.train import distill, job, loop

VOCAB, WIDTH, HEADS, LENGTH, ROWS = 64, 32, 2, 64, 8


class Reader(nnx.Module):
  def __init__(self, rngs: nnx.Rngs):
    self.tokens, self.places = nnx.Embed(VOCAB, WIDTH, rngs=rngs), nnx.Embed(LENGTH, WIDTH, rngs=rngs)
    self.qkv, self.mlp = nnx.Linear(WIDTH, 3 * WIDTH, rngs=rngs), nnx.Linear(WIDTH, WIDTH, rngs=rngs)
    self.out = nnx.Linear(WIDTH, VOCAB, rngs=rngs)

  def __call__(self, tokens, layout):
    x = self.tokens(tokens) + self.places(layout.position)
    q, k, v = (part.reshape(*tokens.shape, HEADS, -1) for part in jnp.split(self.qkv(x), 3, axis=-1))
    x += api.block_attention(q, k, v, layout).reshape(x.shape)
    return x + self.mlp(nnx.gelu(x))


def random_batch(random):
  """Rows of one document each: three context blocks, then a question of six tokens with its answer."""
  doc = lambda: encode.EncodedDoc(random.integers(1, VOCAB, 36).astype(np.int32), (10, 10, 10, 6), (34, 36))
  return jax.tree.map(lambda *x: np.stack(x), *(packing.pack_row([doc()], LENGTH - 8) for _ in range(ROWS)))


def main(steps=60) -> list[float]:
  """Distils on random documents; returns the KL of every step."""
  module, teacher = nnx.split(Reader(nnx.Rngs(0)))
  model = distill.Model(
      apply=lambda params, tokens, layout: nnx.merge(module, params)(tokens, layout),
      head=lambda params: jax.tree_util.Partial(lambda out, x: x @ out.kernel + out.bias, nnx.merge(module, params).out))
  settings = optim.OptimConfig(steps=steps, lr=3e-3, warmup=5)
  models = distill.Models(model, model, blocks.BlockOptions(sink_ids=(0,), positions='sequential', max_blocks=8))
  optimizer, rate, history = optim.make_optimizer(settings), optim.learning_rate(settings), []
  step = distill.make_step(models, distill.DistillOptions(drop_rate=0.1), optimizer, rate)
  state = loop.init_state(jax.tree.map(jnp.copy, teacher), optimizer)
  for seed in range(steps):
    state, values = step(state, job.Frozen(teacher), random_batch(np.random.default_rng(seed)))
    history.append(float(values['kl']))
  return history


if __name__ == '__main__':
  print(*(f'step {i}: KL {kl:.4f}' for i, kl in enumerate(main(), start=1)), sep='\n')
