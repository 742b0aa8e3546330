"""Packing documents into rows of a fixed number of tokens. Pure functions on numpy arrays.

A document never straddles rows. A row is bounded in tokens and in blocks, because every block gets sink tokens in front
of it and the length of the rows with sinks is fixed too (`blocks.padded_length`).
"""

from collections.abc import Sequence

import numpy as np

from blockattn import blocks as blocks_lib
from blockattn.data import encode
from blockattn.errors import UserError


def plan_rows(sizes: Sequence[int], counts: Sequence[int], *, length: int, max_blocks: int,
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


def pack_row(docs: Sequence[encode.EncodedDoc], length: int, *, shared_first: bool = False) -> dict:
  """One row of packed documents.

  Args:
    docs: documents, in order, `length` tokens at most in all; none gives a row of padding.
    length: T.
    shared_first: the first block of every document of two or more blocks is a shared prefix.

  Returns:
    tokens int32 [T]; layout, a BlockLayout of arrays [T] at sequential positions, the same as `blocks.from_lengths`
    gives but without a device; targets int32 [T], the next token of the same document, else 0; loss bool [T], true
    where the next token is an answer token; text bool [T], true where there is a next token in the document; gold bool
    [T], the blocks that are known to hold the answer.

  Raises:
    ValueError: the documents are longer than the row.
  """
  total = sum(len(doc.tokens) for doc in docs)
  if total > length:
    raise UserError(f'{len(docs)} documents of {total} tokens in all do not fit into a row of {length}')
  ints = {name: np.zeros(length, np.int32) for name in ('tokens', 'targets', 'doc', 'block', 'position')}
  flags = {name: np.zeros(length, bool) for name in ('loss', 'text', 'gold', 'reader', 'hidden', 'shared', 'sink')}
  start = 0
  for number, doc in enumerate(docs, start=1):
    own = slice(start, start + len(doc.tokens))
    ints['tokens'][own], ints['doc'][own] = doc.tokens, number
    ints['block'][own] = np.repeat(np.arange(len(doc.lengths)), doc.lengths)
    ints['position'][own] = np.arange(len(doc.tokens))
    ints['targets'][own.start:own.stop - 1] = doc.tokens[1:]
    flags['text'][own.start:own.stop - 1] = True
    # The token before an answer token predicts it; the first token of a document is predicted by nothing.
    flags['loss'][start + max(doc.answer[0], 1) - 1:start + doc.answer[1] - 1] = True
    flags['reader'][own.stop - doc.lengths[-1]:own.stop] = True
    if doc.gold:
      flags['gold'][own] = np.repeat(doc.gold, doc.lengths)
    if shared_first and len(doc.lengths) > 1:
      flags['shared'][start:start + doc.lengths[0]] = True
    start = own.stop
  layout = blocks_lib.BlockLayout(**{name: (ints | flags)[name] for name in
                                     ('doc', 'block', 'position', 'reader', 'hidden', 'shared', 'sink')})
  return {'tokens': ints['tokens'], 'layout': layout, 'targets': ints['targets'], 'loss': flags['loss'],
          'text': flags['text'], 'gold': flags['gold']}
