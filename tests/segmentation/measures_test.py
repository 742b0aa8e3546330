"""Measures of cutting: by hand, against nltk and segeval, and the matching against all matchings."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from blockattn.segmentation import measures

several = settings(max_examples=100, deadline=None, derandomize=True, database=None)
TENS = np.arange(10, 130, 10)   # 12 candidates, 13 units


def test_a_document_measured_by_hand():
  # Units 0..12; gold cuts in front of units 3, 6 and 10, predicted ones in front of 3, 7 and 12.
  measured = measures.measure([30, 60, 100], [30, 70, 120], TENS)
  assert measured.exact == measures.Pairs(3, 3, 1)
  assert measured.near == measures.Pairs(3, 3, 2)             # 60 with 70; 100 and 120 are two candidates apart
  # k = round(13 / 4 / 2) = 2: 11 pairs (i, i + 2). Gold has a cut between for i = 1 2, 4 5, 8 9; predicted for
  # i = 1 2, 5 6, 10. They differ at i = 4 6 8 9 10.
  assert measured.pk == pytest.approx(5 / 11) and measured.window_diff == pytest.approx(5 / 11)
  # One match, one near miss, two misses: 1 - (2 + 1 / 2) / 4.
  assert measured.similarity == pytest.approx(1 - 2.5 / 4)


def test_window_diff_sees_two_cuts_where_pk_sees_a_cut():
  gold, predicted = np.array([4]), np.array([4, 5])
  # k = 3: 10 pairs. Between i and i + 3, gold cuts for i = 2 3 4; predicted one for i = 2, two for i = 3 4, one for 5.
  assert measures.pk(gold, predicted, 12, 3) == pytest.approx(1 / 10)
  assert measures.window_diff(gold, predicted, 12, 3) == pytest.approx(3 / 10)


def test_equal_segmentations_are_perfect():
  for gold in ([], [50], [10, 20, 120]):
    measured = measures.measure(gold, gold, TENS)
    assert measured.exact.f1 == measured.near.f1 == measured.similarity == 1
    assert measured.pk == measured.window_diff == 0


def test_a_document_without_gold_cuts_counts_every_cut_as_wrong():
  measured = measures.measure([], [60], TENS)
  assert measured.exact == measures.Pairs(0, 1, 0)
  assert (measured.exact.precision, measured.exact.recall, measured.exact.f1) == (0, 0, 0)
  assert measures.window(0, 12) == round(13 / 2)              # one block of 13 units
  assert measured.pk == measured.window_diff == pytest.approx(6 / 7)   # all 7 pairs but (6, 12) have the cut between
  assert measured.similarity == 0


def test_cuts_that_are_no_candidates_move_to_the_nearest():
  measured = measures.measure([30], [28, 31, 119], TENS)      # 28 and 31 meet at 30, 119 goes to 120
  assert measured.exact == measures.Pairs(1, 3, 0)
  assert measured.near == measures.Pairs(1, 2, 1)
  assert measures.nearest([1, 15, 16, 500], TENS).tolist() == [0, 1, 11]   # of 10 and 20, 15 takes the earlier
  assert measures.nearest([3, 99], np.array([7])).tolist() == [0]


def test_documents_with_hardly_any_candidates():
  nothing = measures.measure([], [], np.zeros(0, np.int64))
  assert nothing.exact.f1 == 1 and math.isnan(nothing.pk) and math.isnan(nothing.similarity)
  one = measures.measure([5], [], np.array([5]))
  assert (one.pk, one.window_diff, one.similarity) == (1, 1, 0)


def test_offsets_that_do_not_increase_are_refused():
  with pytest.raises(ValueError, match=r'predicted cuts do not increase strictly: \[30\]'):
    measures.measure([10], [10, 30, 30], TENS)


indices = st.integers(2, 40).flatmap(lambda count: st.tuples(
    st.just(count), *[st.sets(st.integers(0, count - 1)).map(lambda s: np.array(sorted(s), np.int64))] * 2))


def as_string(chosen, count):
  return ''.join('1' if i in chosen else '0' for i in range(count))


def as_masses(chosen, count):
  return tuple(np.diff([0, *(chosen + 1), count + 1]).tolist())


@pytest.fixture(scope='module')
def nltk_metrics():
  return pytest.importorskip('nltk.metrics')


@pytest.fixture(scope='module')
def segeval():
  return pytest.importorskip('segeval')


@several
@given(case=indices)
def test_windows_are_those_of_nltk(nltk_metrics, case):
  count, gold, predicted = case
  k = measures.window(len(gold), count)
  strings = as_string(gold, count), as_string(predicted, count)
  assert measures.pk(gold, predicted, count, k) == pytest.approx(nltk_metrics.pk(*strings, k=k))
  assert measures.window_diff(gold, predicted, count, k) == pytest.approx(nltk_metrics.windowdiff(*strings, k=k))


@several
@given(case=indices)
def test_windows_and_similarity_are_those_of_segeval(segeval, case):
  count, gold, predicted = case
  masses = as_masses(gold, count), as_masses(predicted, count)
  k = measures.window(len(gold), count)
  assert k == min(count, segeval.compute_window_size(masses[0]))
  assert measures.pk(gold, predicted, count, k) == pytest.approx(float(segeval.pk(masses[1], masses[0], window_size=k)))
  assert measures.window_diff(gold, predicted, count, k) == pytest.approx(
      float(segeval.window_diff(masses[1], masses[0], window_size=k)))
  if len(gold) or len(predicted):                          # without any boundary segeval raises; ours is 1
    assert measures.similarity(gold, predicted) == pytest.approx(float(segeval.boundary_similarity(*masses, n_t=2)))


@several
@given(st.tuples(*[st.sets(st.integers(0, 9), max_size=5)] * 2), st.integers(0, 2))
def test_no_matching_has_more_pairs(both, within):
  gold, predicted = (sorted(s) for s in both)
  few, many = sorted((gold, predicted), key=len)
  best = max(sum(abs(a - b) <= within for a, b in zip(few, order)) for order in itertools.permutations(many, len(few)))
  assert measures.matches(np.array(gold), np.array(predicted), within) == best


def test_a_category_is_micro_and_the_corpus_is_macro():
  long = measures.measure([30, 60, 100], [30, 70, 120], TENS)
  short = measures.measure([10], [10], np.array([10, 20]))
  books = measures.summary([long, short])
  assert (books['documents'], books['gold'], books['predicted']) == (2, 4, 4)
  assert books['f1'] == books['precision'] == pytest.approx(2 / 4)     # not the mean of 1/3 and 1
  assert books['pk'] == pytest.approx((long.pk + 0) / 2)
  whole = measures.macro({'books': books, 'chat': measures.summary([short])})
  assert set(whole) == set(measures.MEASURES)
  assert whole['f1'] == pytest.approx((0.5 + 1) / 2)


def test_documents_without_candidates_do_not_count_in_means():
  empty = measures.measure([], [], np.zeros(0, np.int64))
  assert measures.summary([empty, measures.measure([10], [], np.array([10, 20]))])['pk'] == 1
  with pytest.raises(ValueError, match='without documents'):
    measures.summary([])
