"""Candidates, units, and where decisions are read in every marker style."""

import collections
import math

import data_cases
import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings, strategies as st

from blockattn.segmentation import labelled, markers

TEXT = 'One. Two!  "Three?" four\nFive 3.14 six\r\n \r\n\r\nSeven\n\n\n  indented\n'


def offline_tokenizer(specials=()) -> tokenizers.Tokenizer:
  tokenizer = tokenizers.Tokenizer.from_str(data_cases.tiny_tokenizer().backend_tokenizer.to_str())
  tokenizer.add_special_tokens([tokenizers.AddedToken(s, special=True, normalized=False) for s in specials])
  return tokenizer


def reader(**options) -> markers.Reader:
  return markers.Reader(offline_tokenizer((markers.CUT_TOKEN, *markers.GAP_TOKENS)), markers.ReadOptions(**options))


def units_of(read, text):
  return read.units(markers.split(text, markers.candidates(text)))


def test_candidates_stand_behind_sentences_and_line_ends():
  parts = markers.split(TEXT, markers.candidates(TEXT))
  assert parts == ['One. ', 'Two!  ', '"Three?" ', 'four\n', 'Five 3.14 six\r\n \r\n\r\n', 'Seven\n\n\n', '  indented\n']


@pytest.mark.parametrize('text, parts', [
    ('', ['']), ('x', ['x']), ('\n\n', ['\n\n']), ('a\x0cb', ['a\x0c', 'b']), ('a\rb\u2028c', ['a\r', 'b\u2028', 'c']),
    ('他来了。她走了！」好。', ['他来了。', '她走了！」', '好。']), ('Wait... what', ['Wait... ', 'what']),
    ('end.\nnext', ['end.\n', 'next']), ('end. \nnext', ['end. \n', 'next']), ('a\0b', ['a\0b']),
])
def test_candidates_in_unusual_texts(text, parts):
  assert markers.split(text, markers.candidates(text)) == parts


@settings(deadline=None, max_examples=80)
@given(st.text(alphabet='ab .!?。」\n\r\t\x0c\u2028"\0\ud800', max_size=60))
def test_candidates_are_inside_and_increase(text):
  cuts = markers.candidates(text)
  assert np.all(np.diff(cuts) > 0) and all(0 < c < len(text) for c in cuts)
  assert ''.join(markers.split(text, cuts)) == text


@pytest.mark.parametrize('piece', ['.', ' ', '\n', '. ', '\n \t', '。', '"', '."'])
def test_candidates_take_linear_time(piece):
  assert len(markers.candidates(piece * 200_000 + 'x')) <= 200_000 * len(piece)


@pytest.mark.parametrize('style', markers.STYLES)
def test_a_decision_is_read_behind_the_unit_that_follows_the_candidate(style):
  read = reader(style=style, head=30, tail=30)
  units = units_of(read, TEXT)
  tokens, at = read.read(units, 0, len(units))
  assert len(at) == len(units) and np.all(np.diff(at) > 0) and at[-1] == len(tokens) - 1
  if style == 'none':
    assert at.tolist() == (np.cumsum(units.sizes) - 1).tolist()
  if style == 'token':
    cut = read._tokenizer.token_to_id(markers.CUT_TOKEN)
    assert tokens[0] == cut and all(tokens[at] == cut) and np.sum(tokens == cut) == len(units) + 1
  if style == 'pooled':
    assert tokens.shape == (len(units), 62)


def test_words_as_markers_are_those_of_the_whole_string():
  """The text style gives what tokenizing '<cut 0>One. <cut 1>Two! ...' in one piece gives."""
  read = reader(style='text')
  parts = markers.split(TEXT, markers.candidates(TEXT))
  whole = '<cut 0>' + ''.join(f'{part}<cut {i}>' for i, part in enumerate(parts, start=1))
  units = read.units(parts)
  tokens, at = read.read(units, 0, len(units))
  encoding = offline_tokenizer().encode(whole)
  assert tokens.tolist() == encoding.ids
  for i, position in enumerate(at):
    end = whole.index(f'<cut {i + 1}>') + len(f'<cut {i + 1}>')
    start, stop = encoding.offsets[position]
    assert start < end <= stop


def test_a_window_counts_its_markers_from_zero():
  read = reader(style='text')
  units = units_of(read, TEXT)
  tokens, _ = read.read(units, 2, 4)
  assert read._tokenizer.decode(tokens.tolist()).replace(' ', '').startswith('<cut0>"Three?"<cut1>four')


def test_long_units_are_read_by_their_ends():
  read = reader(style='none', head=4, tail=2, inner=1)
  units = units_of(read, 'abcdefghijklmnop. qrstuvwxyzabcdef\nshort\n')
  gap = read._tokenizer.token_to_id(markers.GAP_TOKENS[1])
  assert units.sizes.tolist()[:2] == [7, 4] and units.ids[0][4] == gap and units.counts[0] == 18
  pooled = units_of(reader(style='pooled', head=4, tail=2), 'abcdefghijklmnop. qr\nshort\n')
  assert pooled.ids.shape == (3, 8) and pooled.ids[0][1:].tolist() == units.ids[0].tolist()
  assert pooled.ids[:, 0].tolist() == [0, pooled.ids[0, -1], pooled.ids[1, -1]]   # what stands in front of a unit


@pytest.mark.parametrize('style', markers.STYLES)
def test_units_are_the_same_in_pieces(style, monkeypatch):
  whole = units_of(reader(style=style, head=3, tail=1), TEXT)
  monkeypatch.setattr(markers, '_CHUNK', 2)
  pieces = units_of(reader(style=style, head=3, tail=1), TEXT)
  assert [list(ids) for ids in whole.ids] == [list(ids) for ids in pieces.ids] and whole.texts == pieces.texts
  assert whole.sizes.tolist() == pieces.sizes.tolist() and whole.counts.tolist() == pieces.counts.tolist()


def test_decisions_wait_for_further_units_but_at_the_end():
  read = reader(style='pooled', head=4, tail=2, ahead=3)
  units = units_of(read, 'a\nb\nc\nd\ne\n')
  tokens, at = read.read(units, 0, 4, ended=False)
  assert len(tokens) == 4 and at.tolist() == [2, 3]
  tokens, at = read.read(units, 0, 5)
  assert len(tokens) == 7 and at.tolist() == [2, 3, 4, 5, 6] and not tokens[5:].any()


def plain_cohesion(ids, width, at):
  """The level of one candidate, in dictionaries."""
  held = collections.Counter(word for unit in ids for word in set(unit) - {0})
  weights = [{w: math.log1p(unit.count(w)) * math.log(len(ids) / held[w]) for w in set(unit) - {0}} for unit in ids]
  total = lambda units: {w: sum(unit.get(w, 0) for unit in units) for unit in units for w in unit}
  front, behind = total(weights[max(0, at - width):at]), total(weights[at:at + width])
  size = math.sqrt(sum(x * x for x in front.values()) * sum(x * x for x in behind.values()))
  cosine = sum(x * behind.get(w, 0) for w, x in front.items()) / (size or 1)
  return 1 + min(math.sqrt(cosine) * markers.LEVELS, markers.LEVELS - 1) if at else 0


def test_cohesion_is_what_both_sides_have_in_common():
  ids = np.random.default_rng(0).integers(0, 12, (40, 5))
  levels = markers.cohesion_levels(ids)
  assert levels.shape == (40, len(markers.COHESION)) and levels.dtype == np.int32 and len(set(levels.ravel())) > 8
  for column, width in enumerate(markers.COHESION):
    for at in range(40):
      assert abs(levels[at, column] - plain_cohesion(ids.tolist(), width, at)) <= 1 + 1e-3
  topics = np.array([[1, 2, 3 + i % 2] for i in range(6)] + [[7, 8, 9 + i % 2] for i in range(6)])
  levels = markers.cohesion_levels(topics)
  assert np.all(levels[0] == 0) and np.all(levels[6] == 1) and np.all(levels[[2, 3, 9, 10]] > 10)
  assert markers.cohesion_levels(topics[:1]).tolist() == [[0] * len(markers.COHESION)]


def test_cohesion_is_that_of_the_units_that_are_read():
  plain, read = (reader(style='pooled', head=4, tail=2, ahead=2, cohesion=on) for on in (False, True))
  units = units_of(read, 'one two\nthree one\nfour five\nfive six\nsix four\n')
  assert read.options.unit_tokens == plain.options.unit_tokens + len(markers.COHESION)
  tokens, at = read.read(units, 1, 4)
  own, same = plain.read(units, 1, 4)
  assert np.array_equal(tokens[:, :own.shape[1]], own) and np.array_equal(at, same)
  assert np.array_equal(tokens[:3, own.shape[1]:], markers.cohesion_levels(units.ids[1:4, 1:])) and not tokens[3:].any()


@pytest.mark.parametrize('style', markers.STYLES)
def test_fit_takes_as_many_units_as_there_is_room_for(style):
  read = reader(style=style, head=20, tail=4)
  units = units_of(read, 'Some words here. ' * 40)
  stop = read.fit(units, 3, 30)
  length = lambda stop: len(read.read(units, 3, stop, ended=False)[0])
  assert length(stop) <= 30 < length(stop + 1)
  with pytest.raises(ValueError, match='too short for a unit'):
    read.fit(units, 0, 0)


def test_text_that_looks_like_a_marker_is_text():
  read = reader(style='token')
  units = read.units([f'{markers.CUT_TOKEN} is a word\n', '\ud800 half\n', '<|endoftext|>\n'])
  assert all(read._tokenizer.token_to_id(s) not in ids for s in (markers.CUT_TOKEN, '<|endoftext|>') for ids in units.ids)


def test_token_ends_are_offsets_of_the_text():
  ends = reader().token_ends(['né 走\n', ''])
  assert ends[0][-1] == 5 and np.all(np.diff(ends[0]) >= 0) and len(ends[1]) == 0


@pytest.mark.parametrize('options, message', [
    ({'style': 'words'}, 'choose one of'), ({'head': 0}, 'head=0; give a number from 1'),
    ({'style': 'none', 'ahead': 2}, "ahead=2 with marker style 'none'; give ahead=1"),
    ({'style': 'token', 'cohesion': True}, 'read units pooled'),
])
def test_bad_options_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    markers.ReadOptions(**options)


def test_a_tokenizer_without_the_marker_is_refused():
  with pytest.raises(ValueError, match='has no token'):
    markers.Reader(offline_tokenizer(), markers.ReadOptions(style='token'))


def test_a_cut_that_is_no_candidate_is_that_of_the_nearest():
  labels, moved = labelled.labels_of(['abcd', 'ef\n', 'gh\n', 'ij'], np.array([3, 7, 10]))
  assert labels.tolist() == [1, 1, 1] and moved == 1
  assert labelled.labels_of(['ab', 'cd'], np.zeros(0, np.int64))[1] == 1
  labels, moved = labelled.labels_of(['ab\ncd\n', 'ef\ngh\n'], np.array([3, 6, 9]), tolerance=1)
  assert labels.tolist() == [-100, 1, -100] and moved == 0


@pytest.mark.data
def test_gold_cuts_of_the_real_documents_are_candidates(data_dir):
  from blockattn.segmentation.semanticseg import schema
  documents = [d for file in sorted(data_dir.glob('seg/test_*.jsonl.gz'))[:20]
               for d, _ in zip(schema.read(str(file)), range(3), strict=False)]
  assert documents
  for document in documents:
    assert set(document.cuts) <= set(markers.candidates(document.text).tolist()), document.id
