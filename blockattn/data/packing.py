"""Packing documents into rows of a fixed number of tokens, and joining their blocks. Pure functions on numpy arrays.

A document never straddles rows. A row is bounded in tokens and in blocks, because every block gets sink tokens in front
of it and the length of the rows with sinks is fixed too (`blocks.padded_length`).
"""

from collections.abc import Sequence

import jax
import numpy as np
import numpy.typing as npt

from blockattn import blocks as blocks_lib
from blockattn.data import encode
from blockattn.errors import UserError


def plan_rows(sizes: npt.ArrayLike, counts: npt.ArrayLike, *, length: int, max_blocks: int,
              window: int = 64) -> list[list[int]]:
  """Which documents stand in which row: first fit over the last rows that are open.

  Documents are placed in the given order, each in the oldest open row that has room for it. At most `window` rows are
  open; when a further one is needed, the fullest is closed. Rows are in the order in which they were opened.

  Args:
    sizes: tokens of each document.
    counts: blocks of each document.
    length, max_blocks: bounds of a row.
    window: open rows; 1 keeps the documents in order.

  Returns:
    For each row the indices of its documents, ascending; every document exactly once.

  Raises:
    ValueError: a document does not fit into an empty row.
  """
  sizes, counts = np.asarray(sizes, np.int64), np.asarray(counts, np.int64)
  big = np.flatnonzero((sizes > length) | (counts > max_blocks))
  if big.size:
    i = big[0]
    raise UserError(f'document {i} has {sizes[i]} tokens in {counts[i]} blocks; a row holds {length} tokens in '
                    f'{max_blocks} blocks: leave it out with encode.fit, or make rows longer')
  rows, opened = [], []                                  # opened: row numbers, oldest first
  room, places = np.zeros(0, np.int64), np.zeros(0, np.int64)
  for doc, (size, count) in enumerate(zip(sizes.tolist(), counts.tolist(), strict=True)):
    fits = (room >= size) & (places >= count)
    at = int(fits.argmax()) if fits.any() else -1
    if at < 0:
      if len(opened) == window:
        fullest = int(room.argmin())
        del opened[fullest]
        room, places = np.delete(room, fullest), np.delete(places, fullest)
      opened.append(len(rows))
      rows.append([])
      room, places = np.append(room, length), np.append(places, max_blocks)
    rows[opened[at]].append(doc)
    room[at] -= size
    places[at] -= count
  return rows


def padding_share(sizes: Sequence[int], rows: Sequence[Sequence[int]], length: int) -> float:
  """The share of all rows' tokens that is padding, 0 to 1."""
  used = sum(int(sizes[doc]) for row in rows for doc in row)
  return 1.0 - used / (len(rows) * length) if rows else 0.0


def layout_row(docs: Sequence[Sequence[int]], length: int, *, shared_first: bool = False) -> blocks_lib.BlockLayout:
  """The layout of one row: `blocks.from_lengths` of these documents, arrays [T]."""
  return jax.tree.map(lambda x: x[0], blocks_lib.from_lengths([docs], length, shared_first=shared_first))


def pack_row(docs: Sequence[encode.EncodedDoc], length: int, *, shared_first: bool = False) -> dict:
  """One row of packed documents.

  Args:
    docs: documents, in order, `length` tokens at most in all; none gives a row of padding.
    length: T.
    shared_first: see `layout_row`.

  Returns:
    tokens int32 [T]; layout, from `layout_row`; targets int32 [T], the next token of the same document, else 0; loss bool
    [T], true where the next token is an answer token; text bool [T], true where there is a next token in the document;
    gold bool [T], the blocks that are known to hold the answer; continued bool [T], those whose text goes on with that of
    the block before.

  Raises:
    ValueError: the documents are longer than the row.
  """
  total = sum(len(doc.tokens) for doc in docs)
  if total > length:
    raise UserError(f'{len(docs)} documents of {total} tokens in all do not fit into a row of {length}')
  tokens, targets = np.zeros(length, np.int32), np.zeros(length, np.int32)
  loss, text, gold, continued = (np.zeros(length, bool) for _ in range(4))
  start = 0
  for doc in docs:
    stop = start + len(doc.tokens)
    tokens[start:stop], targets[start:stop - 1], text[start:stop - 1] = doc.tokens, doc.tokens[1:], True
    # The token before an answer token predicts it; the first token of a document is predicted by nothing.
    loss[start + max(doc.answer[0], 1) - 1:start + doc.answer[1] - 1] = True
    for of_row, of_blocks in ((gold, doc.gold), (continued, doc.continued)):
      if of_blocks:
        of_row[start:stop] = np.repeat(of_blocks, doc.lengths)
    start = stop
  layout = layout_row([doc.lengths for doc in docs], length, shared_first=shared_first)
  return {'tokens': tokens, 'layout': layout, 'targets': targets, 'loss': loss, 'text': text, 'gold': gold,
          'continued': continued}


def join_blocks(layout: blocks_lib.BlockLayout, most: int, seed: Sequence[int]) -> blocks_lib.BlockLayout:
  """The layout of a row, arrays [T], with the context blocks of each document joined in groups of 1 to `most`.

  The size of the groups is drawn for each document, log-evenly; its last group may be smaller. A shared prefix stays alone.
  """
  doc, inner = layout.doc, layout.block.copy()
  group = ((most + 1) ** np.random.default_rng(seed).random(int(doc.max(initial=0)) + 1)).astype(inner.dtype)[doc]
  prefixed = np.isin(doc, doc[layout.shared]).astype(inner.dtype)
  inner -= prefixed
  joined = np.where(layout.reader, -(-inner // group), inner // group) + prefixed
  return layout.replace(block=np.where(layout.shared, 0, joined))
