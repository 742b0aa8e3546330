"""Layouts: who may attend to whom, positions, sinks and block dropout, each against plain Python."""

import collections
import dataclasses
import functools
import itertools
import re

import jax
import layout_cases
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from blockattn import blocks

ROWS, T = 2, 40
several = settings(max_examples=30, deadline=None, derandomize=True, database=None)
few = settings(several, max_examples=8)
layouts = layout_cases.layouts(ROWS, T)
shipped = layout_cases.shipped_layouts(ROWS, T)

with_positions = jax.jit(blocks.with_positions, static_argnums=1)
drop_blocks = jax.jit(blocks.drop_blocks, static_argnames=('mode', 'positions'))
block_mode = jax.jit(blocks.block_mode, static_argnums=2)
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


@pytest.mark.parametrize('name', ['sinks', 'links', 'all', 'all_in_blocks', 'hidden', 'hidden_seam', 'hidden_all', 'overlap',
                                  'overlap_all'])
@pytest.mark.parametrize('scheme', blocks.POSITION_SCHEMES)
@pytest.mark.parametrize('shared', [False, True])
def test_a_prompt_is_placed_as_its_layout_says(scheme, shared, name):
  options = dataclasses.replace(options_of(name, scheme), shared_first=shared, max_blocks=4)
  for lengths in ((4, 2, 5, 3), (2, 6), (5,)):
    layout = blocks.from_lengths([[lengths]], 14)
    continued = goes_on(layout, len(lengths))
    kinds = [blocks.Continued if continued[0, start] else list for start in itertools.accumulate(lengths[:-1], initial=0)]
    tokens, layout, _ = block_mode(np.where(layout.doc, 7, 0), layout, options, continued=continued)
    placed = blocks.place_prompt([kind([7] * n) for kind, n in zip(kinds, lengths, strict=True)], options)
    valid = np.asarray(layout.doc[0]) != 0
    assert np.asarray(tokens)[0, valid].tolist() == [token for block in placed for token in block.tokens]
    whole = blocks.prompt_layout([placed], layout.doc.shape[1], shared)
    for field in ('doc', 'position', 'reader', 'hidden', 'shared'):
      np.testing.assert_array_equal(*fields(layout, field), *fields(whole, field), err_msg=field)
    np.testing.assert_array_equal(may_attend(layout), may_attend(whole))
  with pytest.raises(ValueError, match='a prompt must be a list of blocks, none of them empty'):
    blocks.place_prompt([[1], []], options)


def test_blocks_that_do_not_go_on_have_no_overlap():
  options = blocks.BlockOptions((), 'sequential', 8, hide_starts=True, overlap=2)
  on = blocks.Continued
  placed = blocks.place_prompt([on([1, 2, 3]), [4, 5], on([6]), on([7]), [8]], options)
  assert [block.tokens for block in placed] == [(1, 2, 3), (4, 5), (4, 5, 6), (6, 7), (8,)]
  assert [block.hidden for block in placed] == [(0, 0), (0, 1), (0, 2), (0, 1), (0, 0)]
  assert [block.start for block in placed] == [0, 2, 2, 4, 6]
  rows = blocks.from_lengths([[[3, 2, 1, 1, 1]]], 8)
  with pytest.raises(ValueError, match='overlap=2: say with `continued`, bool .1, 8., of each token'):
    block_mode(np.zeros((1, 8), np.int32), rows, options)
  with pytest.raises(ValueError, match='overlap=2, hide_starts=False'):
    dataclasses.replace(options, hide_starts=False)


def test_unknown_position_scheme():
  with pytest.raises(ValueError, match='choose one of sequential, local'):
    blocks.from_lengths([[[3]]], 8, positions='relative')


@several
@given(shipped)
def test_as_one_block_counts_each_document_from_zero(layout):
  one = blocks.as_one_block(layout)
  np.testing.assert_array_equal(one.position, naive_positions(layout, 'sequential'))
  np.testing.assert_array_equal(one.doc, layout.doc)


# What is inserted.

SCHEMES = ('sequential', 'local')
UNSEEN = ('start', 'hidden sink', 'overlap')   # what takes no position
NAMES = ('doc', 'block', 'reader', 'hidden', 'shared')
OPTIONS = {
    'nothing': {}, 'sinks': {'sink_ids': (100, 101, 102)}, 'tails': {'tail_ids': (200, 201)},
    'links': {'sink_ids': (100,), 'tail_ids': (200, 201), 'links': True}, 'aligned': {'sink_ids': (100, 101), 'align': 4},
    'hidden': {'hide_starts': True}, 'hidden_sinks': {'sink_ids': (100, 101), 'hide_starts': True},
    'hidden_seam': {'seam': 2, 'hide_starts': True},
    'hidden_all': {'sink_ids': (100, 101), 'tail_ids': (200,), 'links': True, 'seam': 2, 'align': 3, 'hide_starts': True},
    'overlap': {'hide_starts': True, 'overlap': 3},
    'overlap_all': {'sink_ids': (100, 101), 'tail_ids': (200,), 'links': True, 'seam': 2, 'align': 3, 'hide_starts': True,
                    'overlap': 2},
    'long_seam': {'sink_ids': (100,), 'seam': 30},
    'all': {'sink_ids': (100, 101), 'tail_ids': (200,), 'links': True, 'seam': 2, 'align': 3},
    'all_in_blocks': {'sink_ids': (100, 101), 'tail_ids': (200,), 'seam': 4, 'align': 5}}


def options_of(name, scheme='sequential'):
  return blocks.BlockOptions(**{'sink_ids': (), 'positions': scheme, 'max_blocks': 20} | OPTIONS[name])


insert = jax.jit(blocks.insert, static_argnames=('options', 'length'))


def goes_on(layout, seed):
  """Which blocks go on with the one before, most of them: bool [rows, T]."""
  drawn = np.random.default_rng(seed).random((len(layout.doc), 20, 20)) < 0.7
  return np.stack([own[doc, block] for own, doc, block in zip(drawn, *fields(layout, 'doc', 'block'))])


def naive_insert(tokens, layout, options, seam, continued):
  """`insert` with lists: for each row its slots in order, each with its token, what it is of, and its part: 'text', 'sink',
  'tail', 'copy', or, of what its own block alone sees, 'original' and UNSEEN; and where each text token went."""
  rows, where = [], np.zeros((ROWS, T), np.int32)
  doc, reader, shared, hidden = fields(layout, 'doc', 'reader', 'shared', 'hidden')
  for b in range(ROWS):
    own, out = runs(layout, b), []
    names = list(own)
    block_of = {t: name for name, found in own.items() for t in found}
    for t in range(T):
      name = block_of.get(t)
      if name is None:
        where[b, t] = len(out)
        out.append((int(tokens[b, t]), t, 'text'))
        continue
      text = own[name]
      last = not any(other[0] == name[0] and other > name for other in names)
      has_seam = any(other[0] == name[0] and other < name for other in names) and not reader[b, t] and not shared[b, t]
      copies = text[:seam] if has_seam else []
      hides = has_seam and options.hide_starts
      before = names[names.index(name) - 1]
      follows = has_seam and continued[b, text[0]] and before == (name[0], name[1] - 1)
      last_before = own[before][-options.overlap:] if follows and options.overlap else []
      overlap = [o for o in last_before if not hidden[b, o] and not shared[b, o]]
      start = text[:1] if hides and not options.sink_ids and not overlap and not copies else []
      if t == text[0]:
        out += [(int(tokens[b, c]), c, 'copy') for c in copies]
        size = len(overlap) + len(text) + (0 if options.links else len(options.tail_ids))
        fill = 0 if last else -(size + len(options.sink_ids)) % options.align
        out += [(sink, t, 'hidden sink' if hides else 'sink') for sink in (*options.sink_ids[:1] * fill, *options.sink_ids)]
        out += [(int(tokens[b, o]), t, 'overlap') for o in overlap]
      where[b, t] = len(out)
      out.append((int(tokens[b, t]), t, 'original' if t in copies else 'start' if t in start else 'text'))
      if t == text[-1] and not last:
        out += [(tail, t, 'tail') for tail in options.tail_ids]
    rows.append(out)
  return rows, where


def naive_sees(layout, b, slots, links):
  """Who may attend to whom among the slots of a row, in words of what they are."""
  doc, block, reader, hidden, shared = (x[b] for x in fields(layout, *NAMES))
  apart = lambda part: part if part == 'copy' or part == 'tail' and links else ''
  mask = np.zeros((len(slots), len(slots)), bool)
  for i, (_, q, what) in enumerate(slots):
    for j, (_, k, seen) in enumerate(slots[:i + 1]):
      if doc[q] == 0 or doc[q] != doc[k]:
        continue
      same = block[q] == block[k] and apart(what) == apart(seen)
      reads = bool(apart(what)) or reader[q]
      offered = not hidden[k] and seen not in ('original', *UNSEEN)
      mask[i, j] = same or (shared[k] and not apart(seen)) or (reads and offered)
  return mask


def naive_slot_positions(doc, slots):
  """Sequential positions of a row's slots: one count of each document, backwards from it where only the block sees them."""
  position, count = [], collections.Counter()
  for i, (_, t, part) in enumerate(slots):
    name = int(doc[t])
    if part in UNSEEN:
      run = [own for _, other, own in slots[i:] if other == t and own in UNSEEN]
      position.append(count[name] - len(run))
    else:
      position.append(count[name] if name else 0)
      count[name] += part != 'copy'
  originals = {t: p for (_, t, part), p in zip(slots, position) if part == 'original'}
  return [originals.get(t, 0) if part == 'copy' else p for (_, t, part), p in zip(slots, position)]


@pytest.mark.parametrize('name', OPTIONS)
@few
@given(layout=layouts, share=st.integers(0, 2), seed=st.integers(0, 9))
def test_insert(name, layout, share, seed):
  """Random layouts, and seams of every length up to the most."""
  options, length = options_of(name), 3 * T
  seam = options.seam * share // 2
  tokens = np.arange(1, ROWS * T + 1, dtype=np.int32).reshape(ROWS, T)
  continued = goes_on(layout, seed)
  got_tokens, got, index = insert(tokens, layout, options, length, np.int32(seam), continued)
  rows, where = naive_insert(tokens, layout, options, seam, continued)
  doc, mask = np.asarray(layout.doc), np.asarray(may_attend(got))
  for b, slots in enumerate(rows):
    slots = slots[:length]   # what does not fit is cut off
    n = len(slots)
    assert np.asarray(got_tokens)[b, :n].tolist() == [token for token, _, _ in slots]
    assert np.asarray(got.doc)[b].tolist() == [doc[b, t] for _, t, _ in slots] + [0] * (length - n)
    np.testing.assert_array_equal(mask[b, :n, :n], naive_sees(layout, b, slots, options.links))
    assert not mask[b, n:].any()
    at_copy = {t: i for i, (_, t, part) in enumerate(slots) if part == 'copy'}
    assert np.asarray(index)[b].tolist() == [at_copy.get(t, where[b, t]) for t in range(T)]
  position = np.zeros((ROWS, length), np.int32)
  for b, slots in enumerate(rows):
    position[b, :len(slots[:length])] = naive_slot_positions(doc[b], slots[:length])
  np.testing.assert_array_equal(got.position, position)


@pytest.mark.parametrize('scheme', SCHEMES)
@pytest.mark.parametrize('name', OPTIONS)
@few
@given(layout=shipped, seed=st.integers(0, 9))
def test_what_is_inserted_aligns_with_the_text_by_index(name, scheme, layout, seed):
  tokens = np.arange(1, ROWS * T + 1, dtype=np.int32).reshape(ROWS, T)
  options = options_of(name, scheme)
  assert max(len(runs(layout, row)) for row in range(ROWS)) <= options.max_blocks
  continued = goes_on(layout, seed)
  got_tokens, got, index = block_mode(tokens, layout, options, continued=continued)
  np.testing.assert_array_equal(np.take_along_axis(np.asarray(got_tokens), np.asarray(index), axis=1), tokens)
  # Text tokens see the same text as before, and those of a seam all that stands before them: nothing is lost.
  seen = np.asarray(may_attend(got))
  again = np.asarray(blocks.first_tokens(layout, options.seam))
  start = np.asarray(blocks.first_tokens(layout, int(options.hide_starts and not options.sink_ids)))
  if options.overlap:   # which stands in front, but not of what follows a shared block, or does not go on
    start = start & (np.pad(np.asarray(layout.shared), ((0, 0), (1, 0)))[:, :-1] | ~continued)
  before = np.asarray(may_attend(layout.replace(hidden=layout.hidden | start & ~again)))
  read = np.asarray(may_attend(layout.replace(reader=layout.reader | again, hidden=layout.hidden | start & ~again)))
  for b in range(ROWS):
    at = index[b]
    rest = ~again[b]   # which read what is not copied of their own block
    np.testing.assert_array_equal(seen[b][np.ix_(at[rest], at[rest])], before[b][np.ix_(rest, rest)])
    np.testing.assert_array_equal(seen[b][np.ix_(at[~rest], at)], read[b][~rest])
  position = np.take_along_axis(np.asarray(got.position), np.asarray(index), axis=1)
  hides = options.hide_starts and not (options.seam and not options.sink_ids)   # a start that is copied has its position
  _, plain, where = block_mode(tokens, layout, dataclasses.replace(options, seam=0, hide_starts=hides), continued=continued)
  np.testing.assert_array_equal(position, np.take_along_axis(np.asarray(plain.position), np.asarray(where), axis=1))


@pytest.mark.parametrize('name', OPTIONS)
@few
@given(layout=shipped, most=st.sampled_from((T + 1, 2 * T + 3)))   # every other number is shapes to be compiled anew
def test_a_smaller_room_holds_all_that_a_larger_one_does(name, layout, most):
  tokens = np.arange(1, ROWS * T + 1, dtype=np.int32).reshape(ROWS, T)
  needed = max(len(runs(layout, row)) for row in range(ROWS))
  options = dataclasses.replace(options_of(name, 'sequential'), max_blocks=most)
  room = blocks.room_of(layout, options)
  assert needed <= room.blocks <= options.max_blocks and room.blocks - needed <= max(options.max_blocks // blocks.ROOMS, 1)
  continued = goes_on(layout, most)
  large, *of_large = block_mode(tokens, layout, options, continued=continued)
  small, *of_small = block_mode(tokens, layout, options, None, room, continued)
  n = small.shape[1]
  assert n == blocks.padded_length(T, dataclasses.replace(options, max_blocks=room.blocks))
  assert not np.asarray(of_large[0].doc)[:, n:].any()
  np.testing.assert_array_equal(large[:, :n], small)
  jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[:, :n], y), of_large, of_small)


def test_rooms_have_rows_that_devices_can_share():
  layout = blocks.from_lengths([[[4, 3, 2]]], length=96)
  options = blocks.BlockOptions((7,) * 4, 'sequential', 64)
  assert [blocks.room_of(layout, options, multiple).blocks for multiple in (1, 32, 96, 128)] == [16, 16, 48, 64]


def test_the_picture_of_a_seam():
  """Block 1 has one copy in front, which reads block 0; behind it the original is seen within its block only."""
  layout = blocks.from_lengths([[[2, 2, 1]]], 5)
  _, got, index = blocks.block_mode(np.zeros((1, 5), np.int32), layout, blocks.BlockOptions((), 'sequential', 1, seam=1))
  assert index.tolist() == [[0, 1, 2, 4, 5]] and got.position.tolist() == [[0, 1, 2, 2, 3, 4]]
  assert blocks.picture(got).split('\n') == ['1 . . . . .', '1 1 . . . .', '1 1 1 . . .', '. . . 1 . .', '. . . 1 1 .',
                                             '1 1 1 . 1 1']


def test_a_seam_is_drawn_evenly():
  options = blocks.BlockOptions((), 'sequential', 1, seam=3)
  drawn = jax.vmap(lambda key: blocks.draw_seam(options, key))(jax.random.split(jax.random.key(0), 4000))
  assert np.abs(np.bincount(drawn) / 1000 - 1).max() < 0.1


def test_aligned_blocks_fill_whole_pages():
  options = blocks.BlockOptions((5, 6), 'local', 4, tail_ids=(9,), align=16)
  *context, question = blocks.place_prompt([[1] * n for n in (3, 13, 14, 29, 7)], options)
  assert [len(block.tokens) for block in context] == [16, 16, 32, 32] and len(question.tokens) == 9
  assert context[0].tokens == (5,) * 10 + (5, 6) + (1,) * 3 + (9,)


@pytest.mark.parametrize('wrong', [{'seam': -1}, {'align': 0}, {'align': 16}, {'tail_ids': (-1,)}, {'max_blocks': 0}])
def test_options_that_are_no_good(wrong):
  with pytest.raises(ValueError):
    blocks.BlockOptions(**{'sink_ids': (), 'positions': 'local', 'max_blocks': 4} | wrong)


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
