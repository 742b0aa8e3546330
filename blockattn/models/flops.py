"""How many floating-point operations a model needs, and how many a device can do: what MFU is made of.

Model FLOPs utilisation (MFU) is the share of the devices' peak that goes into operations which the model itself needs (the
PaLM report, arXiv 2204.02311, appendix B). Counted are the products of matrices, an addition and a multiplication each:

  layers      2 per token and weight of a matrix; lookups, norms and biases are left out
  attention   4 N H per layer and pair of tokens of which the mask lets one attend to the other (PaLM counts all T T pairs)
  head        2 V D per token that has a loss

and the backward pass as twice the forward pass. Padding, what the backward pass computes again (remat), and what a kernel
computes without need count for nothing, so that none of them makes a run look faster.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from blockattn import blocks as blocks_lib
from blockattn.models import classifier, spec as spec_lib, transformer

# Dense bfloat16 peak of a device in TFLOP/s, by what its JAX `device_kind` begins with; of several that fit, the longest.
# TPUs: the "TPU v4", "v5e", "v5p" and "v6e" pages of the Cloud TPU documentation. GPUs: NVIDIA's data sheets of A100,
# H100, H200 and the Blackwell architecture brief (HGX B200), without sparsity.
PEAK_TFLOPS = {
    'TPU v4': 275.0,
    'TPU v5 lite': 197.0, 'TPU v5e': 197.0,
    'TPU v5': 459.0, 'TPU v5p': 459.0,
    'TPU v6 lite': 918.0, 'TPU v6e': 918.0,
    'NVIDIA A100': 312.0,
    'NVIDIA H100': 989.4, 'NVIDIA H100 PCIe': 756.5, 'NVIDIA H100 NVL': 835.5,
    'NVIDIA H200': 989.4, 'NVIDIA H200 NVL': 835.5,
    'NVIDIA B200': 2250.0,
}


def peak(device_kind: str) -> float | None:
  """FLOP/s of a device of this kind in bfloat16; None if it is not known (CPUs)."""
  fits = [name for name in PEAK_TFLOPS if device_kind.startswith(name)]
  return PEAK_TFLOPS[max(fits, key=len)] * 1e12 if fits else None


class Seen(NamedTuple):
  """What a forward pass has to do with a batch.

  Attributes:
    tokens: that are no padding.
    pairs: of a query and a key that it attends to.
  """
  tokens: float
  pairs: float


@dataclasses.dataclass(frozen=True)
class Flops:
  """Operations of some passes over a batch.

  Attributes:
    layers: in the weights of the layers.
    attention: between queries, keys and values.
    head: for each token that has a loss.
  """
  layers: float
  attention: float
  head: float

  def __add__(self, other: 'Flops') -> 'Flops':
    return Flops(self.layers + other.layers, self.attention + other.attention, self.head + other.head)

  def times(self, factor: float) -> 'Flops':
    """Of so many times as many tokens; the head's are per token."""
    return Flops(factor * self.layers, factor * self.attention, self.head)

  def total(self, loss_tokens: float) -> float:
    return self.layers + self.attention + self.head * loss_tokens


def layer_weights(cfg: transformer.ModelConfig) -> int:
  """Weights of the matrices that every token passes through."""
  specs = classifier.spec(cfg)
  matrices = {name: leaf for name, leaf in specs['layers'].items() if leaf.std is not None}
  return spec_lib.count([matrices, specs.get('units', {})])


def head_weights(cfg: transformer.ModelConfig) -> int:
  """Weights of the output matrix, or of the classes' one."""
  return (cfg.labels if isinstance(cfg, classifier.ClassifierConfig) else cfg.vocab) * cfg.width


def forward(cfg: transformer.ModelConfig, seen: Seen) -> Flops:
  """One forward pass. A head of a few classes reads every token, and is counted with the layers."""
  weights, head = layer_weights(cfg), 2.0 * head_weights(cfg)
  body = Flops(2.0 * weights * seen.tokens, 4.0 * cfg.layers * cfg.heads * cfg.head_dim * seen.pairs, head)
  if isinstance(cfg, classifier.ClassifierConfig):
    return dataclasses.replace(body, layers=body.layers + head * seen.tokens, head=0.0)
  return body


def trained(once: Flops, *, frozen: bool = False) -> Flops:
  """Forward and backward pass, of the forward pass `once`.

  `frozen`: the weights get no gradient themselves (LoRA, whose own small matrices are not counted): what goes back through
  them to the activations is one product in place of two.
  """
  weights = 2 if frozen else 3
  return Flops(weights * once.layers, 3 * once.attention, weights * once.head)


# Pairs, counted on the host from where the blocks are.


@dataclasses.dataclass(frozen=True)
class Blocks:
  """The blocks of a batch in the order in which they stand, each attribute an array [blocks].

  Attributes:
    sizes: tokens.
    first: whether it is the first one of its document.
    reader, shared: as in BlockLayout.
    continued: whether its text goes on with that of the block before.
  """
  sizes: np.ndarray
  first: np.ndarray
  reader: np.ndarray
  shared: np.ndarray
  continued: np.ndarray


def blocks_of(layout: blocks_lib.BlockLayout, continued: np.ndarray | None = None) -> Blocks:
  """The blocks of rows, of numpy arrays [B, T] as from `data.packing.pack_row`, before block dropout and sinks; without
  `continued` none goes on with the one before."""
  doc, block = np.asarray(layout.doc), np.asarray(layout.block)
  continued = np.zeros(doc.shape, bool) if continued is None else continued
  there = np.flatnonzero(doc)
  # Numbered over all rows, so that the end of a row ends a document.
  number = (doc + (np.arange(len(doc), dtype=doc.dtype) * (doc.shape[1] + 1))[:, None]).ravel()[there]
  new_doc = np.diff(number, prepend=0) != 0
  starts = np.flatnonzero(new_doc | (np.diff(block.ravel()[there], prepend=-1) != 0))
  at = there[starts]
  said = (np.asarray(field).ravel()[at] for field in (layout.reader, layout.shared, continued))
  return Blocks(np.diff(starts, append=len(there)).astype(float), new_doc[starts], *said)


def one_document(lengths) -> Blocks:
  """A document of blocks of these lengths, one text, the last one a reader."""
  sizes, index = np.asarray(lengths, float), np.arange(len(lengths))
  return Blocks(sizes, index == 0, index == len(sizes) - 1, np.zeros(len(sizes), bool), index > 0)


def as_one_block(blocks: Blocks) -> Seen:
  """Full causal attention inside each document."""
  return Seen(float(blocks.sizes.sum()), float((_own(blocks.sizes) + blocks.sizes * _before(blocks.sizes, blocks)).sum()))


def seams(blocks: Blocks, most: int, *, drawn: bool = False) -> np.ndarray:
  """Seam tokens of each block (`blocks.first_tokens`); `drawn`: the mean over seams of 0 to `most` tokens."""
  mean = np.mean([np.minimum(seam, blocks.sizes) for seam in (range(most + 1) if drawn else (most,))], axis=0)
  return np.where(blocks.first | blocks.reader | blocks.shared, 0.0, mean)


def overlaps(blocks: Blocks, most: int) -> np.ndarray:
  """Tokens of the block before that each block reads first (`blocks.BlockOptions.overlap`)."""
  before = np.minimum(np.append(0.0, blocks.sizes)[:-1], most)
  takes = blocks.continued & ~(blocks.first | blocks.reader | blocks.shared | np.append(True, blocks.shared)[:-1])
  return np.where(takes, before, 0.0)


def in_blocks(blocks: Blocks, *, sinks: int = 0, tails: int = 0, links: bool = False, seams: np.ndarray | float = 0.0,
              overlaps: np.ndarray | float = 0.0, drop_rate: float = 0.0, drop_mode: str = 'lift') -> Seen:
  """Block attention as `blocks.may_attend` allows it, with `sinks` tokens in front of every block, tails or links behind all
  but the last, `overlaps` tokens in front of each that it alone sees, and `seams` tokens of each read again; under block
  dropout (`blocks.drop_blocks`) the mean over its draws.

  Where blocks are merged, tails are counted like sinks, and an overlap and a seam for every block that is left. Overlaps are
  taken for whole where the block before was dropped."""
  tail = np.where(np.append(blocks.first[1:], True), 0.0, tails) if len(blocks.sizes) else blocks.sizes
  text, sink = blocks.sizes, sinks + (0.0 if links else tail)
  link = tail if links else 0.0 * tail
  fixed = blocks.reader | blocks.shared
  rate = np.where(fixed, 0.0, drop_rate)
  if drop_mode == 'merge':   # a boundary vanishes, and its sinks; not behind a reader, a shared block or at the start
    rate = np.where(blocks.first | np.append(True, fixed[:-1]), 0.0, rate)
    own = _in_merged_blocks(blocks, text, sink + link, rate)
    seams, overlaps = (1 - rate) * seams, (1 - rate) * overlaps + 0.0 * text
    pairs = seams * _before(text + sink + link, blocks) + _own(overlaps) + overlaps * (text + sink)
    return Seen(own.tokens + float((seams + overlaps).sum()), own.pairs + float(pairs.sum()))
  size = text + sink
  visible = 1 - rate if drop_mode in ('isolate', 'remove') else np.ones(len(rate))
  present = 1 - rate if drop_mode == 'remove' else np.ones(len(rate))
  reads = np.where(blocks.reader, 1.0, rate if drop_mode in ('lift', 'isolate') else 0.0)
  before, shared = _before((size + link) * visible, blocks), _before(size * blocks.shared, blocks)
  pairs = _own(size) + size * (reads * before + (1 - reads) * shared)
  again, ahead = (1 - reads) * seams, (1 - reads) * overlaps
  pairs += again * before + (1 - reads) * _own(seams) + link * (before + size * visible) + _own(link)
  pairs += (1 - reads) * (_own(overlaps) + overlaps * size)
  return Seen(float((present * (size + link + again + ahead)).sum()), float((present * pairs).sum()))


def _in_merged_blocks(blocks, text, sink, rate):
  size = text + (1 - rate) * sink   # mean over the draws
  before, shared = _before(size, blocks), _before(size * blocks.shared, blocks)
  group, joined = np.zeros(len(text)), 0.0   # tokens of the merged block in front of each: it goes on where merged
  for i in range(len(text)):
    group[i] = joined
    joined = size[i] + rate[i] * joined
  apart = _own(text + sink) + (text + sink) * np.where(blocks.reader, before, shared)
  merged = _own(text) + text * (group + shared)
  return Seen(float(size.sum()), float(((1 - rate) * apart + rate * merged).sum()))


def _own(size):
  return size * (size + 1) / 2


def _before(values, blocks):
  """Sums of values >= 0 over the earlier blocks of each block's document."""
  total = np.cumsum(values) - values
  return total - np.maximum.accumulate(np.where(blocks.first, total, 0.0)) if len(values) else total
