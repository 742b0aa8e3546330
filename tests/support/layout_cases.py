"""Random layouts for the tests of blocks and kernels: every kind of block that a layout can say."""

import numpy as np
from hypothesis import strategies as st

from blockattn import blocks

KINDS = ('context', 'lifted', 'isolated', 'hidden', 'removed', 'holes')
KIND = st.sampled_from(('context',) * 6 + KINDS)
BLOCK = st.tuples(st.one_of(st.just(1), st.integers(1, 24)), KIND)
DOC = st.tuples(st.lists(BLOCK, min_size=1, max_size=6), st.booleans())
ROW = st.tuples(st.integers(0, 5), st.lists(DOC, max_size=4))


def build(rows, length: int) -> blocks.BlockLayout:
  """A layout from rows (padding in front, documents), documents (blocks, first one is shared), blocks (size, kind).

  The last block of a document is a reader. What does not fit is cut off, so a document may end without one.
  """
  shape = (len(rows), length)
  fields = {name: np.zeros(shape, np.int32) for name in ('doc', 'block', 'position')}
  fields |= {name: np.zeros(shape, bool) for name in ('reader', 'hidden', 'shared')}
  for b, (at, docs) in enumerate(rows):
    for d, (doc, shared_first) in enumerate(docs, start=1):
      for i, (size, kind) in enumerate(doc):
        last = i == len(doc) - 1
        where = slice(at, at + size)
        fields['doc'][b, where] = 0 if kind == 'removed' and not last else d
        fields['block'][b, where] = i
        fields['reader'][b, where] = last or kind in ('lifted', 'isolated')
        fields['hidden'][b, where] = not last and kind in ('hidden', 'isolated')
        fields['shared'][b, where] = shared_first and i == 0
        if kind == 'holes':
          fields['doc'][b, at + 1:min(at + size, length):3] = 0
        at += size
  return blocks.BlockLayout(**fields)


def layouts(rows: int, length: int):
  """Strategy of layouts [rows, length]."""
  return st.lists(ROW, min_size=rows, max_size=rows).map(lambda drawn: build(drawn, length))


def shipped_layouts(rows: int, length: int):
  """Strategy of (layout, shared first) as `blocks.from_lengths` makes them for training, nothing dropped yet."""
  doc = st.lists(st.integers(1, 9), min_size=1, max_size=6)
  row = st.lists(doc, min_size=1, max_size=4).map(lambda docs: _fitting(docs, length))
  return st.tuples(st.lists(row, min_size=rows, max_size=rows), st.booleans()).map(
      lambda drawn: blocks.from_lengths(drawn[0], length, shared_first=drawn[1]))


def _fitting(docs, length):
  kept = []
  for doc in docs:
    if sum(map(sum, kept)) + sum(doc) <= length:
      kept.append(doc)
  return kept


def naive_mask(layout: blocks.BlockLayout) -> np.ndarray:
  """`blocks.may_attend` in loops of Python."""
  doc, block, reader, hidden, shared = (
      np.asarray(getattr(layout, name)) for name in ('doc', 'block', 'reader', 'hidden', 'shared'))
  rows, length = doc.shape
  mask = np.zeros((rows, length, length), bool)
  for b in range(rows):
    for t in range(length):
      for s in range(t + 1):
        same_doc = doc[b, t] == doc[b, s] != 0
        reads = reader[b, t] and not hidden[b, s]
        mask[b, t, s] = same_doc and (block[b, t] == block[b, s] or shared[b, s] or reads)
  return mask
