"""Output matching: what attention adds to the residual stream, the student's against the teacher's, layer by layer.

As in the attention transfer of LoLCATs (arXiv 2410.10254), which has linear attention give what softmax attention gave, by
the squared error of the outputs of each layer. Ours are the outputs behind the projection, [B, T, D]: what the rest of the
model meets, however the heads share the work, and no wider than the model. The teacher's of all layers are kept for the
step; the student's are compared where they are computed, and only a number per token leaves its layers.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from blockattn.models import transformer

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Match:
  """How text tokens [B, T] and the student's tokens [B, T'] belong together, sinks being nobody's.

  Attributes:
    index: int32 [B, T], see `blocks.insert`.
    length: T'.
    mask: bool [B, T], the loss tokens.
    place: tells the compiler where an array [B, T', D] lives.
  """
  index: Array
  length: int
  mask: Array
  place: Callable[[Array], Array]

  def wanted(self, inside: transformer.Inside) -> tuple[Array, Array]:
    """Of a layer of the teacher's: (its output where the student has the same token [B, T', D], 0 at others; its mean square
    over the loss tokens of each row [B]).

    The mean is a row's, so that the slices of a batch add up to the whole."""
    rows, length = self.index.shape
    source = jnp.full((rows, self.length), length).at[jnp.arange(rows)[:, None], self.index].set(
        jnp.arange(length), mode='drop')
    placed = jnp.take_along_axis(inside.out, source[..., None], axis=1, mode='fill', fill_value=0)
    squares = jnp.sum(jnp.square(inside.out.astype(jnp.float32)), axis=-1)
    mean = jnp.sum(squares, axis=1, where=self.mask) / jnp.maximum(jnp.sum(self.mask, axis=1, dtype=jnp.float32), 1)
    return self.place(placed), jnp.where(mean > 0, mean, 1.0)

  def of_text(self, distances_LBT: Array) -> Array:
    """Float32 [B, T]: the mean over the layers of what `distance` gave, at the text tokens."""
    return jnp.take_along_axis(jnp.mean(distances_LBT, axis=0), self.index, axis=1)


def distance(inside: transformer.Inside, wanted_BTD: Array, mean_square_B: Array) -> Array:
  """Float32 [B, T']: the squared distance of a layer's output from the one that is wanted, in units of its mean square."""
  return _squared_distance(inside.out, wanted_BTD) / mean_square_B[:, None]


# Its backward pass takes the difference again, rather than have every layer keep it in float32.
@functools.partial(jax.checkpoint, prevent_cse=False)
def _squared_distance(x, y):
  return jnp.sum(jnp.square(x.astype(jnp.float32) - y.astype(jnp.float32)), axis=-1)
