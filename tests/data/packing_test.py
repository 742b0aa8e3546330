"""Documents in rows."""


import data_cases
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from blockattn import blocks as blocks_lib
from blockattn.data import encode, packing, prompts

few = settings(max_examples=40, deadline=None, derandomize=True, database=None)


def make_docs(shapes):
  """A document of distinct tokens for each tuple of block lengths; the answer is the last token or two."""
  docs, first = [], 1
  for lengths in shapes:
    n = sum(lengths)
    docs.append(encode.EncodedDoc(np.arange(first, first + n, dtype=np.int32), tuple(lengths),
                                  (n - min(2, lengths[-1]), n)))
    first += n
  return docs


SHAPES = st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=4), min_size=1, max_size=12)


@few
@given(SHAPES, st.integers(24, 40), st.integers(4, 9), st.integers(1, 5))
def test_every_token_of_every_document_stands_in_the_rows_once(shapes, length, max_blocks, window):
  docs = make_docs(shapes)
  sizes, counts = [len(doc.tokens) for doc in docs], [len(doc.lengths) for doc in docs]
  plan = packing.plan_rows(sizes, counts, length=length, max_blocks=max_blocks, window=window)
  assert sorted(i for row in plan for i in row) == list(range(len(docs)))
  assert all(row == sorted(row) and row for row in plan)
  assert all(sum(sizes[i] for i in row) <= length and sum(counts[i] for i in row) <= max_blocks for row in plan)
  rows = [packing.pack_row([docs[i] for i in row], length) for row in plan]
  placed = np.concatenate([row['tokens'][row['layout'].doc > 0] for row in rows])
  assert sorted(placed.tolist()) == list(range(1, sum(sizes) + 1))
  assert packing.padding_share(sizes, plan, length) == pytest.approx(
      np.mean([row['layout'].doc == 0 for row in rows]))


def test_first_fit():
  plan = lambda window: packing.plan_rows([6, 7, 4, 3, 9, 2], [1] * 6, length=10, max_blocks=10, window=window)
  assert plan(64) == [[0, 2], [1, 3], [4], [5]]
  assert plan(1) == [[0], [1], [2, 3], [4], [5]]
  assert packing.plan_rows([1] * 5, [2] * 5, length=10, max_blocks=4) == [[0, 1], [2, 3], [4]]
  assert packing.plan_rows([], [], length=10, max_blocks=4) == []
  with pytest.raises(ValueError, match='document 1 has 11 tokens in 1 blocks; a row holds 10 tokens in 4 blocks'):
    packing.plan_rows([1, 11], [1, 1], length=10, max_blocks=4)


@pytest.mark.parametrize('shared_first', [False, True])
def test_rows_have_the_layout_of_their_lengths(shared_first):
  shapes = [(3, 2, 4), (5,), (1, 1)]
  row = packing.pack_row(make_docs(shapes), 20, shared_first=shared_first)
  expected = blocks_lib.from_lengths([shapes], 20, shared_first=shared_first)
  for name in ('doc', 'block', 'position', 'reader', 'hidden', 'shared'):
    got, want = getattr(row['layout'], name), getattr(expected, name)[0]
    assert got.dtype == want.dtype and np.array_equal(got, want), name


def test_targets_are_the_next_tokens_and_loss_is_on_the_answer():
  tokenizer = data_cases.tiny_tokenizer()
  examples = [prompts.parse_record(data_cases.passages_line(i), where='f:1') for i in range(3)]
  docs = [encode.fit(parts)[0] for parts in encode.Encoder(tokenizer).parts(examples)]
  row = packing.pack_row(docs, 1000)
  for number, (example, doc) in enumerate(zip(examples, docs, strict=True), start=1):
    mine = row['layout'].doc == number
    assert np.array_equal(row['tokens'][mine], doc.tokens)
    assert np.array_equal(row['targets'][mine], [*doc.tokens[1:], 0])
    assert tokenizer.decode(row['targets'][mine & row['loss']]) == example.response + '<|im_end|>'
    assert tokenizer.decode(row['tokens'][mine & row['loss']]) == ':' + example.response   # what predicts it
    assert row['text'][mine].tolist() == [True] * (len(doc.tokens) - 1) + [False]
  padding = row['layout'].doc == 0
  assert not (row['loss'] | row['text'] | row['targets'].astype(bool) | row['tokens'].astype(bool))[padding].any()


def test_rows_at_their_bounds():
  empty = packing.pack_row([], 8)
  assert not any(np.any(x) for x in (empty['tokens'], empty['loss'], empty['text'], empty['layout'].doc))
  whole = packing.pack_row(make_docs([(8,)]), 8)
  assert whole['text'].sum() == 7 and whole['targets'][-1] == 0
  answer_only = encode.EncodedDoc(np.array([5, 6], np.int32), (2,), (0, 2))
  assert packing.pack_row([answer_only], 3)['loss'].tolist() == [True, False, False]   # nothing predicts the first
  with pytest.raises(ValueError, match='1 documents of 8 tokens in all do not fit into a row of 7'):
    packing.pack_row(make_docs([(8,)]), 7)


def joined_lengths(layout):
  """The lengths of the blocks of each document of a row."""
  blocks = [layout.block[layout.doc == doc] for doc in range(1, layout.doc.max() + 1)]
  assert all((np.diff(block) >= 0).all() and set(block) == set(range(block.max() + 1)) for block in blocks)
  return [tuple(np.bincount(block)) for block in blocks]


@few
@given(SHAPES, st.integers(1, 5), st.booleans(), st.integers(0, 2 ** 32))
def test_joined_blocks_are_groups_of_one_size_in_each_document(shapes, most, shared_first, seed):
  shapes = [tuple(shape) for shape in shapes]
  length = sum(map(sum, shapes)) + 2
  row = packing.pack_row(make_docs(shapes), length, shared_first=shared_first)['layout']
  found = packing.join_blocks(row, most, (seed,))
  for name in ('doc', 'position', 'reader', 'hidden', 'shared'):
    np.testing.assert_array_equal(getattr(found, name), getattr(row, name))

  def in_groups(shape, size):
    first, context = shape[:shared_first and len(shape) > 1], shape[shared_first and len(shape) > 1:-1]
    return *first, *(sum(context[i:i + size]) for i in range(0, len(context), size)), shape[-1]
  for shape, joined in zip(shapes, joined_lengths(found), strict=True):
    assert joined in [in_groups(shape, size) for size in range(1, most + 1)]


def test_sizes_of_groups_are_drawn_log_evenly():
  row = packing.pack_row(make_docs([(1,) * 17] * 300), 17 * 300)['layout']
  counts = np.bincount([len(lengths) - 1 for lengths in joined_lengths(packing.join_blocks(row, 4, (3, 1)))], minlength=17)
  expected = 300 * np.diff(np.log(range(1, 6))) / np.log(5)   # of groups of 1, 2, 3, 4: 16, 8, 6, 4 blocks
  assert np.abs(counts[[16, 8, 6, 4]] - expected).max() < 30 and counts.sum() == 300
