"""Scores of short answers after SQuAD's normalisation."""

import pytest

from blockattn.evals import scores


@pytest.mark.parametrize('prediction, answers, exact, substring, f1', [
    ('Paris', ('Paris',), 1, 1, 1),
    (' Paris\n', ('Paris ',), 1, 1, 1),                     # the ends do not count
    ('paris.', ('Paris',), 0, 1, 1),                        # normalised: case and punctuation
    ('The Eiffel Tower', ('an Eiffel tower',), 0, 1, 1),    # articles
    ('it is in Paris', ('Paris',), 0, 1, 0.4),              # 1 word of 4 and of 1: 2 * 1 / 5
    ('Paris', ('Paris, France',), 0, 0, 2 / 3),
    ('red red blue', ('red blue blue',), 0, 0, 2 / 3),      # words are counted: one red, one blue
    ('London', ('Paris', 'London'), 1, 1, 1),               # the best of the accepted
    ('a b', ('b c', 'x'), 0, 0, 2 / 3),                     # 'a' is an article
    ('London', ('Paris',), 0, 0, 0),
    ('', ('Paris',), 0, 0, 0),
    ('the', ('?',), 0, 1, 1),                               # nothing is left of either
    ('London', ('+',), 0, 0, 0)])                           # nothing is left of the answer: it is not everywhere
def test_scores(prediction, answers, exact, substring, f1):
  expected = {'exact_match': exact, 'substring': substring, 'f1': f1}
  assert scores.score(prediction, answers) == pytest.approx(expected)


def test_normalisation():
  assert scores.normalize('  The  cat, (A dog) & an\towl; Theatre!') == 'cat dog owl theatre'


@pytest.mark.parametrize('prediction, answers, match, f1', [
    ('the Paris!', ('London', 'paris'), 1, 1),
    ('in Paris', ('paris',), 0, 2 / 3),
    ('an', ('the',), 1, 1),        # nothing is left of either
    ('an', ('Paris',), 0, 0)])
def test_exact_match_after_normalisation(prediction, answers, match, f1):
  assert scores.normalized_match(prediction, answers) == match
  assert scores.f1(prediction, answers) == pytest.approx(f1)


def test_the_f1_of_nothing_is_nothing():
  assert scores.bag_f1([], []) == scores.bag_f1(['a'], []) == 0   # other than of two answers, which are then equal
  assert scores.bag_f1(['x', 'x', 'y'], ['x', 'x', 'z', 'z', 'z']) == pytest.approx(2 * 2 / 8)
