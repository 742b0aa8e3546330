"""What the tests of training share: a random model of two layers, and batches of packed documents."""

import jax
import numpy as np

from blockattn import mesh as mesh_lib, optim
from blockattn.data import encode, packing
from blockattn.models import spec, transformer

VOCAB, LENGTH, ROWS, MAX_BLOCKS = 96, 48, 8, 32   # with a sink for each block 80 tokens: eights in two halves
MODEL = transformer.ModelConfig('llama', vocab=VOCAB, width=16, layers=2, heads=4, kv_heads=2, head_dim=8, mlp=24,
                                rope_theta=1e4)
OPTIM = optim.OptimConfig(lr=1e-2, final_lr=0.1, warmup=0, steps=100, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.01,
                          clip=1.0)


def placement(devices=1, **shape) -> mesh_lib.Placement:
  return mesh_lib.Placement(mesh_lib.make_mesh(shape, jax.devices()[:devices]))


def params(cfg=MODEL, seed=0, place=None):
  """Random parameters, norms and biases included, placed by the default rules."""
  rng = np.random.default_rng(seed)
  specs = transformer.spec(cfg)
  place = place or placement()
  values = jax.tree.map(lambda s: (s.fill + rng.standard_normal(s.shape) * (s.std or 0.1)).astype(np.float32), specs)
  return jax.device_put(values, spec.shardings(specs, place.mesh, place.rules))


def document(rng, blocks: int, answer: int = 2) -> encode.EncodedDoc:
  """A document of random tokens: context blocks of 2 to 6 tokens, a question of 3, the answer; the first is gold, the others
  go on."""
  lengths = (*rng.integers(2, 7, blocks - 1).tolist(), 3 + answer)
  size = sum(lengths)
  tokens = rng.integers(1, VOCAB, size).astype(np.int32)
  return encode.EncodedDoc(tokens, lengths, (size - answer, size), (blocks > 1, *(False,) * (blocks - 1)),
                           (False, *(True,) * (blocks - 1)))


def batch(seed=0, rows=ROWS, blocks=(1, 2, 3, 4)) -> dict:
  """Rows of as many documents as fit, of `blocks` blocks each; the answers of each row have another length."""
  rng = np.random.default_rng(seed)
  packed = []
  for row in range(rows):
    docs = [document(rng, int(rng.choice(blocks)), answer=1 + row % 4) for _ in range(6)]
    fits = np.cumsum([len(doc.tokens) for doc in docs]) <= LENGTH
    packed.append(packing.pack_row([doc for doc, fit in zip(docs, fits, strict=True) if fit], LENGTH))
  return jax.tree.map(lambda *x: np.stack(x), *packed)


class Stream:
  """`make` of 0, 1, ... with a state, as loop.run wants its batches."""
  fingerprint = {}

  def __init__(self, make=batch):
    self._make, self._step = make, 0

  def __next__(self):
    self._step += 1
    return self._make(self._step - 1)

  def get_state(self):
    return {'next_step': self._step}

  def set_state(self, state):
    self._step = state['next_step']
