"""Layouts: who may attend to whom, positions, sinks and block dropout, each against plain Python."""

import functools
import re

import jax
import layout_cases
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from blockattn import blocks

ROWS, T, LENGTH = 2, 40, 64
several = settings(max_examples=30, deadline=None, derandomize=True, database=None)
layouts = layout_cases.layouts(ROWS, T)
shipped = layout_cases.shipped_layouts(ROWS, T)

with_positions = jax.jit(blocks.with_positions, static_argnums=1)
drop_blocks = jax.jit(blocks.drop_blocks, static_argnames=('mode', 'positions'))
insert_sinks = jax.jit(blocks.insert_sinks, static_argnames=('sink_ids', 'length', 'positions'))
may_attend = jax.jit(blocks.may_attend)


def mask_of(rows, length, **kwargs):
  return np.array(may_attend(blocks.from_lengths(rows, length, **kwargs)))


def causal(length):
  return np.tril(np.ones((length, length), bool))


def runs(layout, row):
  """The blocks of a row in order: lists of token indices, removed tokens and padding left out."""
  found = {}
  for t, (doc, block) in enumerate(zip(np.asarray(layout.doc)[row], np.asarray(layout.block)[row])):
    if doc:
      found.setdefault((int(doc), int(block)), []).append(t)
  return found


def fields(layout, *names):
  return [np.asarray(getattr(layout, name)) for name in names]


# Who may attend.

@several
@given(layouts)
def test_may_attend_is_its_definition(layout):
  np.testing.assert_array_equal(may_attend(layout), layout_cases.naive_mask(layout))


def test_picture_is_the_one_of_the_docstring():
  layout = blocks.from_lengths([[[3, 2, 3]]], 8)
  documented = re.findall(r'(?m)^.{6}(\d)((?:  [1.])+)', blocks.__doc__)   # up to the diagonal, what follows is empty
  drawn = [line.split() for line in blocks.picture(layout).splitlines()]
  assert [int(row) for row, _ in documented] == list(range(8))
  assert drawn == [cells.split() + ['.'] * (7 - int(row)) for row, cells in documented]


@pytest.mark.parametrize('name, drawn', [
    ('full attention', '1 11 111 1111 11111 111111'), ('Block-Attention', '1 11 ..1 ..11 11111 111111'),
    ('Star Attention', '1 11 111 1..1 1..11 111111'), ('parallel context windows', '1 11 ..1 ..11 11111 111111'),
    ('KVLink', '1 11 111 ...1 ...11 111111 1111111 11111111')])
def test_layouts_of_others_are_the_lines_of_the_docstring(name, drawn):
  line = re.search(rf'(?m)^  {name}  +(.*)', blocks.__doc__)[1]
  rows = blocks.picture(eval(line, vars(blocks))).splitlines()
  assert [row.replace(' ', '').rstrip('.') for row in rows] == drawn.split()


def test_one_block_is_causal_attention():
  np.testing.assert_array_equal(mask_of([[[8]]], 8)[0], causal(8))
  layout = blocks.from_lengths([[[3, 2, 3]]], 8)
  np.testing.assert_array_equal(may_attend(blocks.as_one_block(layout))[0], causal(8))


def test_all_readers_is_causal_attention():
  layout = blocks.from_lengths([[[3, 2, 3]]], 8)
  np.testing.assert_array_equal(may_attend(layout.replace(reader=np.ones((1, 8), bool)))[0], causal(8))


def test_packed_documents_do_not_meet():
  mask = mask_of([[[3], [4]]], 8)[0]
  expected = np.zeros((8, 8), bool)
  expected[:3, :3], expected[3:7, 3:7] = causal(3), causal(4)
  np.testing.assert_array_equal(mask, expected)


def test_last_block_reads_the_others():
  expected = np.zeros((7, 7), bool)
  expected[:2, :2], expected[2:5, 2:5], expected[5:] = causal(2), causal(3), causal(7)[5:]
  np.testing.assert_array_equal(mask_of([[[2, 3, 2]]], 7)[0], expected)


def test_a_shared_first_block_is_an_anchor_of_every_block():
  mask = mask_of([[[2, 3, 2]]], 7, shared_first=True)[0]
  expected = mask_of([[[2, 3, 2]]], 7)[0]
  expected[:, :2] = causal(7)[:, :2]
  np.testing.assert_array_equal(mask, expected)


def test_parallel_windows():
  """No reader: windows that share a prefix and nothing else."""
  layout = blocks.from_lengths([[[2, 3, 2]]], 7, shared_first=True)
  mask = np.asarray(may_attend(layout.replace(reader=np.zeros((1, 7), bool))))[0]
  expected = np.zeros((7, 7), bool)
  expected[2:5, 2:5], expected[5:, 5:], expected[:, :2] = causal(3), causal(2), causal(7)[:, :2]
  np.testing.assert_array_equal(mask, expected)


def test_a_hidden_block_is_seen_by_itself_only():
  layout = blocks.from_lengths([[[2, 3, 2]]], 7)
  hidden = layout.replace(hidden=np.asarray(layout.block == 1))
  expected = mask_of([[[2, 3, 2]]], 7)[0]
  expected[5:, 2:5] = False
  np.testing.assert_array_equal(may_attend(hidden)[0], expected)


@several
@given(layouts)
def test_padding_sees_nothing_and_is_seen_by_nobody(layout):
  mask, nobody = np.asarray(may_attend(layout)), np.asarray(layout.doc) == 0
  assert not mask[nobody].any() and not mask.swapaxes(1, 2)[nobody].any()


# From lengths.

def test_from_lengths():
  layout = blocks.from_lengths([[[2, 1], [1, 1, 2]]], 9, shared_first=True)
  assert layout.doc.tolist() == [[1, 1, 1, 2, 2, 2, 2, 0, 0]]
  assert layout.block.tolist() == [[0, 0, 1, 0, 1, 2, 2, 0, 0]]
  assert layout.position.tolist() == [[0, 1, 2, 0, 1, 2, 3, 0, 0]]
  assert np.flatnonzero(layout.reader).tolist() == [2, 5, 6]
  assert np.flatnonzero(layout.shared).tolist() == [0, 1, 3]
  assert not layout.hidden.any()
  assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(layout))


@pytest.mark.parametrize('rows, says', [
    ([[[3, 0, 2]]], 'row 0, document 1: block 1 has 0 tokens'),
    ([[[3]], [[4, 5]]], 'row 1 holds 9 tokens, but T is 8'),
    ([[3, 3]], 'rows must be rows of documents'), ([3, 3], 'rows must be rows of documents')])
def test_from_lengths_refuses(rows, says):
  with pytest.raises(ValueError, match=says):
    blocks.from_lengths(rows, 8)


# Positions.

def naive_positions(layout, scheme):
  """`with_positions` in loops of Python."""
  reader, shared = fields(layout, 'reader', 'shared')
  position = np.zeros((ROWS, layout.doc.shape[1]), np.int32)
  for b in range(ROWS):
    by_doc = {}
    for (doc, _), tokens in runs(layout, b).items():
      by_doc.setdefault(doc, []).append(tokens)
    for doc_blocks in by_doc.values():
      prefix = longest = read_until = count = 0
      for tokens in doc_blocks:
        if scheme == 'sequential':
          start = count
        elif reader[b, tokens[0]] and not shared[b, tokens[0]]:
          start = max(longest, read_until)
          read_until = start + len(tokens)
        else:
          start = prefix
          longest = max(longest, start + len(tokens))
          prefix += len(tokens) * shared[b, tokens[0]]
        count += len(tokens)
        position[b, tokens] = start + np.arange(len(tokens))
  return position


def unread_prefix(layout):
  """The same layout without readers that are shared: the shared prefix is a context block."""
  reader, shared = fields(layout, 'reader', 'shared')
  return layout.replace(shared=shared & ~reader)


@pytest.mark.parametrize('scheme', blocks.POSITION_SCHEMES)
@several
@given(layout=layouts.map(unread_prefix))
def test_positions(scheme, layout):
  np.testing.assert_array_equal(with_positions(layout, scheme).position, naive_positions(layout, scheme))


@pytest.mark.parametrize('scheme', blocks.POSITION_SCHEMES)
@pytest.mark.parametrize('shared', [False, True])
def test_a_prompt_is_placed_as_its_layout_says(scheme, shared):
  for lengths in ((4, 2, 5, 3), (2, 6), (5,)):
    prompt, options = [[7] * n for n in lengths], blocks.BlockOptions((1, 2), scheme, 4, shared_first=shared)
    layout = blocks.from_lengths([[lengths]], 14)
    tokens, layout, _ = blocks.block_mode(np.where(layout.doc, 7, 0), layout, options)
    placed = blocks.place_prompt(prompt, options)
    valid = np.asarray(layout.doc[0]) != 0
    assert np.asarray(tokens)[0, valid].tolist() == [token for block in placed for token in block.tokens]
    assert np.asarray(layout.position)[0, valid].tolist() == [
        position for block in placed for position in range(block.start, block.start + len(block.tokens))]
  with pytest.raises(ValueError, match='a prompt must be a list of blocks, none of them empty'):
    blocks.place_prompt([[1], []], options)


def test_unknown_position_scheme():
  with pytest.raises(ValueError, match='choose one of sequential, local'):
    blocks.from_lengths([[[3]]], 8, positions='relative')


@several
@given(shipped)
def test_as_one_block_counts_each_document_from_zero(layout):
  one = blocks.as_one_block(layout)
  np.testing.assert_array_equal(one.position, naive_positions(layout, 'sequential'))
  np.testing.assert_array_equal(one.doc, layout.doc)


# Sinks.

def naive_sinks(tokens, layout, sink_ids, length):
  """`insert_sinks` with lists: (tokens, doc, block, reader, hidden, shared) rows, and where each token went."""
  names = ('doc', 'block', 'reader', 'hidden', 'shared')
  old = fields(layout, *names)
  new = np.zeros((6, ROWS, length), np.int32)
  index = np.zeros((ROWS, T), np.int32)
  for b in range(ROWS):
    out, blocks_seen = [], set()
    for t in range(T):
      facts = [int(x[b, t]) for x in old]
      starts = facts[0] and tuple(facts[:2]) not in blocks_seen
      if starts:
        out += [[sink, *facts] for sink in sink_ids]
      if facts[0]:
        blocks_seen.add(tuple(facts[:2]))
      index[b, t] = len(out)
      out.append([int(tokens[b, t]), *facts])
    kept = np.array(out[:length], np.int32).T
    new[:, b, :kept.shape[1]] = kept
  return new, index


@pytest.mark.parametrize('sink_ids', [(), (7,), (100, 101, 102)])
@several
@given(layout=layouts)
def test_insert_sinks(sink_ids, layout):
  tokens = np.arange(1, ROWS * T + 1, dtype=np.int32).reshape(ROWS, T)
  got_tokens, got, index = insert_sinks(tokens, layout, sink_ids=sink_ids, length=LENGTH, positions='sequential')
  expected, expected_index = naive_sinks(tokens, layout, sink_ids, LENGTH)
  np.testing.assert_array_equal(got_tokens, expected[0])
  for field, wanted in zip(fields(got, 'doc', 'block', 'reader', 'hidden', 'shared'), expected[1:]):
    np.testing.assert_array_equal(field, wanted)
  np.testing.assert_array_equal(index, expected_index)
  np.testing.assert_array_equal(got.position, naive_positions(got, 'sequential'))


@several
@given(shipped)
def test_sinks_align_with_the_text_by_index(layout):
  tokens = np.arange(1, ROWS * T + 1, dtype=np.int32).reshape(ROWS, T)
  most = max(len(runs(layout, row)) for row in range(ROWS))
  got_tokens, got, index = insert_sinks(tokens, layout, sink_ids=(0, 0), length=blocks.padded_length(T, 2, 20),
                                        positions='local')
  assert most <= 20
  np.testing.assert_array_equal(np.take_along_axis(np.asarray(got_tokens), np.asarray(index), axis=1), tokens)
  # Text tokens see the same text as before: sinks are added to the context, nothing is lost.
  seen = np.asarray(may_attend(got))
  for b in range(ROWS):
    np.testing.assert_array_equal(seen[b][np.ix_(index[b], index[b])], np.asarray(may_attend(layout))[b])


# Block dropout.

def context_blocks(layout, row):
  """{(doc, block): tokens} of the blocks that may be dropped."""
  reader, shared = fields(layout, 'reader', 'shared')
  return {name: tokens for name, tokens in runs(layout, row).items()
          if not reader[row, tokens[0]] and not shared[row, tokens[0]]}


def drop(layout, rate, mode, seed=0):
  return drop_blocks(layout, jax.random.key(seed), rate=rate, mode=mode, positions='local')


def changed_blocks(before, after):
  """For each row the context blocks that `lift`, `isolate` or `remove` changed, each as a whole."""
  names = ('doc', 'reader', 'hidden')
  changed = np.any([old != new for old, new in zip(fields(before, *names), fields(after, *names))], axis=0)
  names = []
  for b in range(ROWS):
    droppable = context_blocks(before, b)
    for name, tokens in runs(before, b).items():
      assert changed[b, tokens].all() or not changed[b, tokens].any(), 'a block changed in part'
      if changed[b, tokens[0]]:
        assert name in droppable, 'a reader or a shared block was dropped'
        names.append((b, name))
  return names


@pytest.mark.parametrize('mode', blocks.DROP_MODES)
@several
@given(layout=shipped, seed=st.integers(0, 99))
def test_rate_zero_changes_nothing_but_positions(mode, layout, seed):
  dropped = drop(layout, 0.0, mode, seed)
  for name in ('doc', 'block', 'reader', 'hidden', 'shared'):
    np.testing.assert_array_equal(*fields(dropped, name), *fields(layout, name))
  np.testing.assert_array_equal(dropped.position, naive_positions(layout, 'local'))


@pytest.mark.parametrize('mode', ['lift', 'isolate', 'remove'])
@several
@given(layout=shipped, seed=st.integers(0, 99), rate=st.sampled_from([0.5, 1.0]))
def test_lift_isolate_and_remove(mode, layout, seed, rate):
  dropped = drop(layout, rate, mode, seed)
  changed = changed_blocks(layout, dropped)
  if rate == 1:
    assert changed == [(b, name) for b in range(ROWS) for name in context_blocks(layout, b)]
  was_dropped = np.zeros((ROWS, T), bool)
  for b, name in changed:
    was_dropped[b, runs(layout, b)[name]] = True
  expected = layout.replace(
      doc=np.where(was_dropped & (mode == 'remove'), 0, layout.doc),
      reader=layout.reader | (was_dropped & (mode != 'remove')),
      hidden=layout.hidden | (was_dropped & (mode == 'isolate')))
  for name in ('doc', 'block', 'reader', 'hidden', 'shared'):
    np.testing.assert_array_equal(*fields(dropped, name), *fields(expected, name))
  np.testing.assert_array_equal(dropped.position, naive_positions(dropped, 'local'))


@several
@given(layout=shipped, seed=st.integers(0, 99), rate=st.sampled_from([0.5, 1.0]))
def test_merge_removes_boundaries_between_context_blocks_only(layout, seed, rate):
  merged = drop(layout, rate, 'merge', seed)
  for name in ('doc', 'reader', 'hidden', 'shared'):
    np.testing.assert_array_equal(*fields(merged, name), *fields(layout, name))
  for b in range(ROWS):
    old, new = runs(layout, b), runs(merged, b)
    owner = {t: name for name, tokens in new.items() for t in tokens}
    droppable = context_blocks(layout, b)
    for (doc, block), tokens in old.items():
      assert len({owner[t] for t in tokens}) == 1, 'a block was cut'
      joined = block > 0 and owner[tokens[0]] == owner[old[doc, block - 1][0]]
      may_join = (doc, block) in droppable and (doc, block - 1) in droppable
      assert may_join or not joined, 'merged across a document, a reader or a shared block'
      assert joined or not may_join or rate < 1
    for doc in {name[0] for name in new}:
      numbers = [block for name, block in new if name == doc]
      assert numbers == list(range(len(numbers))), 'blocks are not numbered from zero without gaps'
  np.testing.assert_array_equal(merged.position, naive_positions(merged, 'local'))


def test_merge_does_not_join_a_reader():
  """A block lifted to a reader earlier keeps its boundaries on both sides."""
  layout = blocks.from_lengths([[[3, 3, 3, 3]]] * ROWS, T)
  lifted = layout.replace(reader=layout.reader | (layout.block == 1))
  assert np.asarray(drop(lifted, 1.0, 'merge').block)[0, :12].tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3


def test_dropout_is_a_function_of_the_key_and_hits_the_rate():
  layout = blocks.from_lengths([[[1] * 1000 + [1]]] * ROWS, 1001)
  drop_many = functools.partial(drop_blocks, layout, rate=0.2, mode='lift', positions='sequential')
  one, again, other = (drop_many(jax.random.key(seed)).reader for seed in (1, 1, 2))
  np.testing.assert_array_equal(one, again)
  assert (one != other).any()
  assert 0.15 < np.asarray(one).mean() < 0.25


def test_unknown_dropout_mode():
  with pytest.raises(ValueError, match='choose one of lift, isolate, merge, remove'):
    drop(blocks.from_lengths([[[3]]] * ROWS, T), 0.5, 'mask')
