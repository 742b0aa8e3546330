"""From log-odds to cuts: nothing is lost, bounds hold on any text, and the chain is the best there is."""

import itertools
import math
import types
import unicodedata

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import regex
import segment_cases

from blockattn.segmentation import forced, granularity

few = hypothesis.settings(max_examples=60, deadline=None)
Granularity = granularity.Granularity

# Texts that are hard to cut: line ends, surrogates paired and alone, marks, joined emoji, blobs, wide spaces.
ODD = st.lists(st.sampled_from(['a', 'b', ' ', '\n', '\r\n', '\ud83d\ude00', '\ud83d', 'e\u0301', '\u200d', '\0', '。', '.',
                                '\U0001f44d\U0001f3fd', '\u3000', '\U0001f1e9\U0001f1ea']), max_size=60).map(''.join)
BOUNDS = st.tuples(st.integers(1, 9), st.integers(0, 12)).map(lambda pair: (pair[0], pair[0] + pair[1]))


@st.composite
def scored(draw, texts=ODD):
  """(text, candidates, log-odds, lengths in characters)."""
  text = draw(texts)
  places = [i for i in range(1, len(text)) if text[i - 1:i + 1] != '\r\n' and not pair_at(text, i)]
  candidates = sorted(draw(st.sets(st.sampled_from(places), max_size=12))) if places else []
  log_odds = draw(st.lists(st.floats(-9, 9, width=32), min_size=len(candidates), max_size=len(candidates)))
  return (text, np.array(candidates, np.int64), np.array(log_odds, np.float32),
          np.array([*candidates, len(text)], np.int64))


def pair_at(text, i):
  return '\ud800' <= text[i - 1] < '\udc00' <= text[i] < '\ue000'


def sizes_of(cuts, length):
  return np.diff([0, *cuts, length])


def objective(cuts, case, want):
  """The docstring's formula."""
  _, candidates, log_odds, lengths = case
  sizes = sizes_of(cuts, lengths[-1])
  gain = sum(float(log_odds[candidates == c][0]) - granularity.logit(want.threshold) for c in cuts)
  return gain - (want.weight * sum(abs(size / want.target - 1) for size in sizes) if want.target else 0)


@few
@hypothesis.given(scored(), st.one_of(
    st.builds(Granularity, threshold=st.floats(0, 1)),
    st.builds(Granularity, depth=st.integers(1, 4), maximum=st.none() | st.integers(1, 20)),
    BOUNDS.map(lambda b: Granularity(minimum=b[0], maximum=b[1]))))
def test_blocks_join_to_the_text(case, want):
  text = case[0]
  cuts = granularity.choose_cuts(*case, want)
  assert all(0 < c < len(text) for c in cuts) and (np.diff(cuts) > 0).all()
  blocks = granularity.to_blocks(cuts, len(text))
  assert ''.join(text[a:b] for a, b in blocks) == text and all(a < b for a, b in blocks)
  assert (blocks == []) == (text == '')


@few
@hypothesis.given(scored(), BOUNDS, st.none() | st.integers(0, 12))
@hypothesis.example(('\ud83d\ude00\u200d', np.array([], np.int64), np.array([], np.float32), np.array([3])), (1, 1), None)
def test_bounds_hold_on_any_text(case, bounds, wish):
  text = case[0]
  want = Granularity(minimum=bounds[0], maximum=bounds[1],
                     target=None if wish is None else min(bounds[0] + wish, bounds[1]))
  cuts = granularity.choose_cuts(*case, want)
  sizes = sizes_of(cuts, len(text))
  minimum, maximum = want.bounds(len(text))
  assert minimum <= bounds[0] and maximum == bounds[1]
  assert not any(text[c - 1:c + 1] == '\r\n' or pair_at(text, c) for c in cuts)
  if text and some_chain(text, minimum, maximum):
    assert minimum <= sizes.min() and sizes.max() <= maximum
  elif text:
    whole = np.diff(sorted({*range(len(text) + 1)} - inside_characters(text)))
    assert sizes.max() <= max(maximum, whole.max())   # only what cannot be divided is longer


@hypothesis.settings(max_examples=100, deadline=None, derandomize=True, database=None)
@hypothesis.given(st.text('aabbc \n', min_size=1, max_size=14), st.tuples(st.integers(1, 4), st.integers(0, 3)))
def test_bounds_hold_in_tokens_that_merge_over_cuts(text, wish):
  """Wherever there is a way; and the maximum always."""
  low, high = wish[0], sum(wish)
  ends = lambda texts: [np.array([m.end() for m in regex.finditer(r'a{1,3}|bb|b| ?c+|\s', t)], np.int64) for t in texts]
  places = np.arange(2, len(text), 3)
  units = granularity.tokens_of_units(text, places, ends)
  cuts = granularity.cuts_in_tokens(text, places, np.sin(places * 7.), units, Granularity(minimum=low, maximum=high), ends)
  counts = [len(e) for e in ends([text[a:b] for a, b in granularity.to_blocks(cuts, len(text))])]
  reached = {0}
  for j in range(1, len(text) + 1):
    if any(low <= len(ends([text[i:j]])[0]) <= high for i in reached):
      reached.add(j)
  assert max(counts) <= high and (min(counts) >= low or len(text) not in reached)


def some_chain(text, minimum, maximum):
  """Whether any cuts keep the bounds without dividing a line end or a pair."""
  reached, inside = {0}, inside_characters(text)
  for i in range(1, len(text) + 1):
    if i not in inside and any(minimum <= i - start <= maximum for start in reached):
      reached.add(i)
  return len(text) in reached


def inside_characters(text):
  """Offsets inside what Unicode calls one grapheme cluster, or a pair of surrogates."""
  clusters = [match.span() for match in regex.finditer(r'\X', text)]
  inside = {i for a, b in clusters if b - a <= 32 for i in range(a + 1, b)}
  return inside | {i for i in range(1, len(text)) if pair_at(text, i)}


@few
@hypothesis.given(st.lists(st.sampled_from(['a', '\r', '\n', ' ', '\u0301', '\u200d', '\U0001f1e9', '\U0001f1ea',
                                            '\U0001f468', '\U0001f3fd',
                                            '\u1112', '\u1161', '\u11ab', 'ไ', 'ำ', '\ud83d', '\ude00', '한']),
                           max_size=40).map(''.join))
def test_clusters_are_those_of_unicode(text):
  assert set(forced.inside_clusters(text).tolist()) == inside_characters(text)


@few
@hypothesis.given(scored(), BOUNDS)
def test_bounds_in_tokens(case, bounds):
  text, candidates, log_odds, _ = case
  units = [text[a:b] for a, b in granularity.to_blocks(candidates, len(text))]
  counts = np.array([len(ends) for ends in segment_cases.words_as_tokens(units)] or [0])
  maximum = bounds[1] + 2
  try:
    cuts = granularity.cuts_in_tokens(text, candidates, log_odds, np.cumsum(counts), Granularity(maximum=maximum),
                                      segment_cases.words_as_tokens)
  except ValueError as error:   # marks on marks: one character of more tokens than that
    clusters = regex.findall(r'\X', text)
    assert 'cannot hold' in str(error)
    assert max(len(ends) for ends in segment_cases.words_as_tokens(clusters)) > maximum
    return
  blocks = [text[a:b] for a, b in granularity.to_blocks(cuts, len(text))]
  assert ''.join(blocks) == text
  assert all(len(ends) <= maximum for ends in segment_cases.words_as_tokens(blocks))


@pytest.mark.parametrize('total, bounds, expected', [
    (550, (300, 512), 275), (600, (300, 512), 300), (512, (300, 512), 300), (299, (300, 512), 299), (0, (3, 5), 3),
    (100, (7, 7), 6), (98, (7, 7), 7)])
def test_the_minimum_gives_way_only_where_no_number_of_blocks_fits(total, bounds, expected):
  assert Granularity(minimum=bounds[0], maximum=bounds[1]).bounds(total) == (expected, bounds[1])
  cuts = granularity.choose_cuts('x' * total, [], np.zeros(0), [total], Granularity(minimum=bounds[0], maximum=bounds[1]))
  sizes = sizes_of(cuts, total)
  assert not total or expected <= sizes.min() and sizes.max() <= bounds[1]


@few
@hypothesis.given(scored(), BOUNDS, st.integers(0, 12), st.floats(0.01, 0.99), st.floats(0, 20))
def test_the_chain_is_the_best_of_all(case, bounds, wish, threshold, weight):
  text, candidates = case[:2]
  hypothesis.assume(len(candidates) <= 9)
  want = Granularity(threshold=threshold, target=min(bounds[0] + wish, bounds[1]), minimum=bounds[0], maximum=bounds[1],
                     weight=weight)
  minimum, maximum = want.bounds(len(text))
  subsets = itertools.chain.from_iterable(itertools.combinations(candidates, n) for n in range(len(candidates) + 1))
  allowed = [s for s in subsets if text and minimum <= sizes_of(s, len(text)).min()
             and sizes_of(s, len(text)).max() <= maximum]
  cuts = granularity.choose_cuts(*case, want)
  if allowed:
    assert set(cuts) <= set(candidates)   # nothing is forced where candidates do
    best = max(objective(s, case, want) for s in allowed)
    assert objective(cuts, case, want) == pytest.approx(best, abs=1e-6)


def test_the_lowest_threshold_gives_every_candidate_and_the_highest_none():
  text, candidates, odds = 'abcdef', np.array([1, 2, 4]), np.array([-50.0, 0, np.inf])
  cuts = lambda t: granularity.choose_cuts(text, candidates, odds, [1, 2, 4, 6], Granularity(threshold=t)).tolist()
  assert cuts(0) == [1, 2, 4] and cuts(0.5) == [2, 4] and cuts(0.51) == [4]
  assert granularity.choose_cuts(text, candidates[:2], odds[:2], [1, 2, 6], Granularity(threshold=1)).tolist() == []


@few
@hypothesis.given(scored(), st.floats(0, 1), st.floats(0, 1))
def test_a_lower_threshold_only_adds_cuts(case, a, b):
  low, high = (set(granularity.choose_cuts(*case, Granularity(threshold=t))) for t in (min(a, b), max(a, b)))
  assert high <= low


@few
@hypothesis.given(scored(), st.floats(0, 1), st.integers(1, 30), st.integers(1, 5))
def test_depths_are_nested_and_cut_only_what_is_long(case, threshold, limit, minimum):
  text, candidates = case[:2]
  deep = lambda d: granularity.choose_cuts(*case, Granularity(threshold=threshold, depth=d, maximum=limit,
                                                              minimum=min(minimum, limit)))
  rounds = [granularity.choose_cuts(*case, Granularity(threshold=threshold)), *map(deep, range(1, 6))]
  for before, after in itertools.pairwise(rounds):
    assert set(before) <= set(after)
    for a, b in granularity.to_blocks(before, len(text)):
      new = [c for c in after if a < c < b]
      assert len(new) <= (b - a > limit)
      assert all(min(c - a, b - c) >= min(minimum, limit) for c in new)
  assert len(deep(5)) <= len(candidates)


def test_depth_takes_the_best_candidate_and_of_equals_the_middle_one():
  text, candidates = 'x' * 100, np.arange(10, 100, 10)
  odds = np.full(9, -5.0)
  cut = lambda depth, maximum=None: granularity.choose_cuts(
      text, candidates, odds, np.append(candidates, 100), Granularity(depth=depth, maximum=maximum)).tolist()
  assert cut(1) == [50] and cut(2) == [20, 50, 70]
  odds[7] = -1
  assert cut(1) == [80] and cut(2, maximum=30) == [40, 80]
  assert cut(20) == candidates.tolist()


def test_bounds_alone_keep_what_the_threshold_takes():
  text, candidates = 'x' * 60, np.array([10, 20, 30, 50])
  odds = np.array([3.0, -1, 4, -6])
  cut = lambda **want: granularity.choose_cuts(text, candidates, odds, [10, 20, 30, 50, 60], Granularity(**want)).tolist()
  assert cut() == cut(maximum=30) == cut(minimum=10) == cut(minimum=10, maximum=30) == [10, 30]
  assert cut(maximum=25) == [10, 30, 50]      # the last block was too long
  assert cut(minimum=20) == [30]              # the first was too short
  assert cut(threshold=0.2, minimum=5) == [10, 20, 30]


def test_forced_cuts_prefer_white_space_and_are_few():
  text = 'word ' * 30 + 'x' * 200 + ' end of it'
  no_candidates = lambda want: granularity.choose_cuts(text, [], np.zeros(0), [len(text)], want).tolist()
  cuts = no_candidates(Granularity(minimum=10, maximum=60))
  behind_spaces = [c for c in cuts if text[c - 1] == ' ']
  assert len(cuts) == math.ceil(len(text) / 60) - 1
  assert len(cuts) - len(behind_spaces) == 3   # what 200 characters need, from blank to blank
  accents = 'e\u0301' * 40
  cuts = granularity.choose_cuts(accents, [], np.zeros(0), [80], Granularity(minimum=5, maximum=11))
  assert not any(unicodedata.combining(accents[c]) for c in cuts)


def test_a_text_of_one_kind_of_thing():
  zero = np.zeros(0)
  for text in ('\u0301' * 50, '\r\n' * 25, '\ud83d\ude00' * 25, ' ' * 50, '\n' * 50, '\0' * 50):
    cuts = granularity.choose_cuts(text, [], zero, [50], Granularity(target=8))
    sizes = sizes_of(cuts, 50)
    assert 2 <= sizes.min() and sizes.max() <= 16, text
  letters = lambda pieces: [np.repeat(np.arange(1, len(p) + 1), 4) for p in pieces]   # four tokens a character
  cuts = granularity.choose_cuts('漢' * 6, [], zero, [24], Granularity(maximum=2), letters)
  assert cuts.tolist() == [1, 2, 3, 4, 5]   # a character is never divided, even if it is too long


def test_a_megabyte_without_a_blank_takes_seconds():
  text = 'QUJD' * 250_000
  cuts = granularity.choose_cuts(text, [], np.zeros(0), [len(text)], Granularity(target=2000))
  sizes = sizes_of(cuts, len(text))
  assert 500 <= sizes.min() and sizes.max() <= 4000


def test_wishes_that_cannot_be():
  for want, message in (
      (dict(threshold=1.5), 'threshold=1.5; give a number from 0 to 1'),
      (dict(threshold=math.nan), 'threshold=nan'),
      (dict(depth=-1), 'depth=-1'),
      (dict(depth=1, target=5), 'depth=1 and target=5: choose one'),
      (dict(target=0), 'target=0; give a number from 1'),
      (dict(minimum=10, maximum=5), 'minimum=10, maximum=5: needed are minimum <= target <= maximum'),
      (dict(target=100, maximum=50), 'target=100, maximum=50'),
      (dict(weight=math.inf), 'weight=inf')):
    with pytest.raises(ValueError, match=message):
      Granularity(**want)
  assert Granularity(target=100, maximum=120).bounds(1000) == (25, 120)
  assert Granularity(target=1).bounds(10) == (1, 2)


def test_arrays_that_do_not_fit():
  choose = lambda *arrays: granularity.choose_cuts('abcdef', *arrays, Granularity(target=2))
  for arrays, message in (
      (([1], [0.0, 1.0], [1, 6]), r'log_odds \(2,\)'),
      (([1], [0.0], [6]), r'lengths \(1,\)'),
      (([3, 2], [0.0, 1.0], [1, 2, 6]), 'strictly increasing'),
      (([6], [0.0], [6, 6]), 'inside the text of 6 characters'),
      (([1, 2], [0.0, math.nan], [1, 2, 6]), 'log_odds: number 1 is not a number'),
      (([1], [0.0], [5, 4]), 'must not decrease'),
      (([], [], [30]), 'lengths are not characters; bounds then need token_ends')):
    with pytest.raises(ValueError, match=message):
      choose(*arrays)


@few
@hypothesis.given(st.lists(st.floats(-6, 6), min_size=1, max_size=8), st.floats(-2, 2))
def test_a_short_text_is_cut_where_its_own_expected_f1_is_best(odds, base):
  """Against the expected counts of every set of the most probable cuts."""
  p = sorted((1 / (1 + math.exp(-x)) for x in odds), reverse=True)
  best = max(2 * sum(p[:k]) / (k + sum(p)) for k in range(1, len(p) + 1)) / 2
  want = granularity.adapted(Granularity(threshold=1 / (1 + math.exp(-base)), adaptive=True), np.array(odds))
  share = granularity.SHORT / (granularity.SHORT + len(odds))
  assert want.log_odds == pytest.approx(base + share * min(0, granularity.logit(best) - base), abs=1e-6)
  assert not want.adaptive and want.log_odds <= base + 1e-9


def test_only_the_models_own_threshold_is_adapted_and_only_in_short_texts():
  weak = np.full(20, granularity.logit(0.3))
  model = types.SimpleNamespace(options=types.SimpleNamespace(threshold=0.0))
  text, candidates, lengths = 'a' * 21, np.arange(1, 21), np.arange(1, 22)
  cuts = lambda want, odds=weak: len(granularity.choose_cuts(text, candidates, odds, lengths, want))
  assert cuts(granularity.for_model(Granularity(), model)) == 20   # all, each of probability 0.3
  assert cuts(Granularity(threshold=0.5)) == 0 == cuts(granularity.for_model(Granularity(threshold=0.5), model))
  sure = np.where(np.arange(20) == 7, 8.0, -8.0)
  assert cuts(granularity.for_model(Granularity(), model), sure) == 1
  bounded = granularity.for_model(Granularity(maximum=100), model)
  assert cuts(bounded) == 0   # bounds say how many
  long = granularity.adapted(granularity.for_model(Granularity(), model), np.tile(weak, 1000))
  assert long.threshold == pytest.approx(0.5, abs=0.01)
  assert granularity.adapted(granularity.for_model(Granularity(), model), np.zeros(0)).threshold == 0.5
