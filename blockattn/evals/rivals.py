"""Rivals of block distillation that need no training: the teacher's weights, read in other ways.

They differ in what of the context is computed again when a question is asked, and in how its states are read. `gap.measure`
takes them as any subject, so that documents, measures and greedy answers are the same. Each class says how we read its
paper; positions are those of the paper, whatever the student's are. Made to be right, not fast: what a prompt would take
from a cache is computed here, too.

  epic:8              seams of 8 tokens; epic:0 are the bare blocks
  star                the first block is an anchor
  ape:0.9:0.9:4       parallel blocks behind one prefix of 4 line ends; temperature and scale of the context
  cacheblend:0.15     the 15 % of the context's tokens that blocks change most
  hidden              the first token of every block but the first is not read
  overlap:64          blocks that go on with the one before are read behind its last 64 tokens

KVLink (arXiv 2502.16002) and Block-Attention's fine-tuning (arXiv 2409.15355) need a training: configs with
`blocks.tail_kind=link`, and blockattn.train.finetune.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from blockattn import blocks, errors
from blockattn.data import encode
from blockattn.errors import UserError
from blockattn.evals import gap
from blockattn.models import decode, transformer

Array = jax.Array
_BARE = blocks.BlockOptions((), 'sequential', max_blocks=1)   # gap.measure sets max_blocks


@dataclasses.dataclass(frozen=True)
class Rival(gap.Reading):
  """One way to read; its fields are the numbers that it is asked for with."""

  def options(self, tokenizer: Any) -> blocks.BlockOptions:
    """Of block mode."""
    return _BARE


@dataclasses.dataclass(frozen=True)
class Epic(Rival):
  """EPIC (arXiv 2410.15332), as we read it: the first `tokens` of every block but the first are computed again, reading all
  that stands before them, and are read in place of the cached ones. A seam (`BlockOptions.seam`) that nobody trained."""
  tokens: int

  def __post_init__(self):
    errors.check_number('--rivals epic: tokens', self.tokens, 0)

  def options(self, tokenizer):
    return _BARE.with_seam(self.tokens)


@dataclasses.dataclass(frozen=True)
class Hidden(Rival):
  """What a student trained with hidden starts (`BlockOptions.hide_starts`) begins as. Nobody's but ours."""

  def options(self, tokenizer):
    return dataclasses.replace(_BARE, hide_starts=True)


@dataclasses.dataclass(frozen=True)
class Overlap(Rival):
  """What a student trained with overlaps (`BlockOptions.overlap`) of so many tokens begins as. Nobody's but ours."""
  tokens: int

  def __post_init__(self):
    errors.check_number('--rivals overlap: tokens', self.tokens, 0, 1024)

  def options(self, tokenizer):
    return dataclasses.replace(_BARE, hide_starts=True, overlap=self.tokens)


@dataclasses.dataclass(frozen=True)
class Star(Rival):
  """Star Attention (arXiv 2411.17116), as we read it: every block is read behind a copy of the first, its anchor, and the
  copy is dropped. The anchor sees nothing but itself, so that all copies are the first block: a shared prefix. Nothing is
  computed again, but the states of a block hold behind this first block, and at this place, alone."""

  def options(self, tokenizer):
    return dataclasses.replace(_BARE, shared_first=True)


@dataclasses.dataclass(frozen=True)
class Ape(Rival):
  """APE (arXiv 2502.05431), as we read it: every block is read behind one prefix, at the positions right after it; the
  question starts behind the longest. Its tokens, and the answer's, read prefix and question as ever. Their scores in the
  context are divided by `temperature`, and the logsumexp of these is multiplied by `scale` before the two parts are merged.
  The prefix is ours: so many line ends, which a model may take amiss."""
  temperature: float
  scale: float
  prefix: int

  def __post_init__(self):
    errors.check_number('--rivals ape: temperature', self.temperature, above=0)
    errors.check_number('--rivals ape: scale', self.scale, above=0)
    errors.check_number('--rivals ape: prefix', self.prefix, 0)

  def options(self, tokenizer):
    prefix = encode.plain(tokenizer).encode('\n' * self.prefix, add_special_tokens=False).ids
    return dataclasses.replace(_BARE, sink_ids=tuple(prefix), positions='local')

  def __call__(self, params, view, cfg, compute, room):
    tokens, layout, index, last = view   # the prefix stands in front of every block, as sinks do
    each = jnp.arange(len(tokens))[:, None]
    prefix = jnp.ones(tokens.shape, bool).at[each, index].set(False, mode='drop') & (layout.doc != 0)
    copy = prefix & (layout.block > 0)
    layout = blocks.with_positions(layout.replace(doc=jnp.where(copy & layout.reader, 0, layout.doc)), 'local')
    k, v = decode.read(params, tokens, layout, cfg, compute)[1]
    context = (layout.doc != 0) & ~layout.reader & ~prefix
    own = layout.replace(doc=jnp.where(context | copy, 0, layout.doc))
    # By number 0 the question reads it, and the prefix, which is in block 0, does not.
    beside = _context((k / self.temperature, v), layout, context, jnp.zeros_like(layout.block), cfg, self.scale)
    return gap.read(params, (tokens, own, index, last), cfg, compute, room, beside)


@dataclasses.dataclass(frozen=True)
class CacheBlend(Rival):
  """CacheBlend (arXiv 2405.16444), as we read it: the first layer is computed for all tokens, with full attention. Those
  whose keys and values in the second are farthest (sum of squares) from the cached ones, `share` of the context's, rounded
  down, are computed again in all further layers, reading all before them; the others keep their states. The paper's gradual
  choice over several layers is left out. What is reported as computed again is `share`: the first layer is not in it."""
  share: float

  def __post_init__(self):
    errors.check_number('--rivals cacheblend: share', self.share, 0, 1)

  def recomputed(self, lengths, options):
    return int(self._count(np.int32(sum(lengths))))

  def _count(self, tokens):
    # One product in float32: the same on the host and on a device.
    return (tokens.astype('float32') * np.float32(self.share)).astype('int32')

  def __call__(self, params, view, cfg, compute, room):
    tokens, layout, index, last = view
    context = (layout.doc != 0) & ~layout.reader
    again = self._chosen(_deviation(params, tokens, layout, cfg, compute), context)
    # In the second pass every token that is computed again is a block and a reader of its own, numbered by its place, and
    # reads of the cached ones those of lower numbers; so does the question.
    place = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    own = layout.replace(doc=jnp.where(context & ~again, 0, layout.doc), reader=jnp.ones_like(layout.reader),
                         block=jnp.where(layout.reader, tokens.shape[1], place))
    states = decode.read(params, tokens, layout, cfg, compute)[1]
    beside = _context(states, layout, context & ~again, place, cfg)
    return gap.read(params, (tokens, own, index, last), cfg, compute, room, beside)

  def _chosen(self, deviation, context):
    """Which tokens are computed again: bool [B, T]."""
    order = jnp.argsort(jnp.where(context, -deviation, jnp.inf), axis=1)
    return context & (jnp.argsort(order, axis=1) < self._count(context.sum(axis=1))[:, None])


def _deviation(params, tokens, layout, cfg, compute) -> Array:
  """How far the keys and values that blocks give are from those of full attention, behind one layer: float32 [B, T]."""
  two = {**params, 'layers': jax.tree.map(lambda x: x[:2], params['layers'])}
  kept, full = (decode.read(two, tokens, form, cfg, compute)[1] for form in (layout, blocks.as_one_block(layout)))
  apart = lambda x, y: jnp.square((x[-1] - y[-1]).astype(jnp.float32)).sum(axis=(-2, -1))
  k, v = map(apart, kept, full)
  return k + v


def _context(states: tuple[Array, Array], layout: blocks.BlockLayout, visible: Array, number: Array,
             cfg: transformer.ModelConfig, scale: float = 1.0) -> decode.Context:
  """What was read of a row, to be read again beside other tokens of it; each token is a page."""
  k, v = (x.reshape(len(x), -1, 1, *x.shape[3:]) for x in states)
  pages = jnp.arange(layout.doc.size, dtype=jnp.int32).reshape(layout.doc.shape)
  return decode.Context(k, v, pages, transformer.rotary_angles(layout.position, cfg), visible, number, scale=scale)


_KINDS = {'epic': Epic, 'star': Star, 'ape': Ape, 'cacheblend': CacheBlend, 'hidden': Hidden,
          'overlap': Overlap}
_FORMS = ', '.join(':'.join((name, *(field.name for field in dataclasses.fields(kind)))) for name, kind in _KINDS.items())


def parse(text: str) -> dict[str, Rival]:
  """Rivals by how they are asked for, with commas between them. Raises ValueError: one is malformed, or not known."""
  found = {}
  for asked in text.split(','):
    name, *numbers = asked.split(':')
    try:
      fields = dataclasses.fields(_KINDS[name])
      values = [(int if field.type is int else float)(number) for field, number in zip(fields, numbers, strict=True)]
    except (KeyError, ValueError) as error:
      raise UserError(f'--rivals {asked}: give some of {_FORMS}, with numbers behind the colons and commas between '
                      'them, such as epic:8,star') from error
    found[asked] = _KINDS[name](*values)
  return found


def subjects(found: dict[str, Rival], teacher: gap.Subject, tokenizer: Any) -> dict[str, gap.Subject]:
  """The teacher's weights, read by each of the rivals that `parse` found."""
  return {f'teacher_{asked}': dataclasses.replace(teacher, mode='block', options=rival.options(tokenizer), reading=rival)
          for asked, rival in found.items()}
