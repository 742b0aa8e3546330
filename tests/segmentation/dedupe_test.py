"""Finding documents that stand twice."""

import random

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from blockattn.segmentation.semanticseg import dedupe, schema

pytest.importorskip('datasketch')

WORDS = st.lists(st.sampled_from('a b c d'.split()), min_size=1, max_size=30)
few = settings(max_examples=40, deadline=None, derandomize=True, database=None)


def prose(seed, words=400):
  draw = random.Random(seed)
  return [f'w{draw.randrange(500)}' for _ in range(words)]


def document(id, words, category='wiki'):
  return schema.Document(id, category, 'somewhere', 'CC0', (' '.join(words),))


def find(documents, **kwargs):
  return dedupe.find(lambda: iter(documents), **kwargs)


@few
@given(WORDS, WORDS)
def test_similarity_is_that_of_the_sets_of_shingles(a, b):
  sets = [{tuple(words[i:i + 5]) for i in range(max(1, len(words) - 4))} for words in (a, b)]
  expected = len(sets[0] & sets[1]) / len(sets[0] | sets[1])
  assert dedupe.jaccard(dedupe.shingles_of(a), dedupe.shingles_of(b)) == expected


def test_words_know_no_case_no_punctuation_and_cut_chinese_by_character():
  assert dedupe.words_of('The "Cat",\n\n sat — on STRASSE x_1!') == ['the', 'cat', 'sat', 'on', 'strasse', 'x_1']
  assert dedupe.words_of('GPU的速度') == ['gpu', '的', '速', '度']
  assert dedupe.words_of('?!') == ['?!']


def test_near_and_exact_pairs_across_splits():
  text = prose(1)
  changed = [*text[:200], 'another', *text[201:]]   # 5 of some 400 shingles differ on either side
  half = text[:200] + prose(2)[:200]
  pairs = find([('train', document('same', [word.upper() for word in text])), ('train', document('other', prose(3))),
                ('validation', document('near', changed, 'specs')), ('train', document('half', half)),
                ('test', document('gold', text))])
  same = ('train', 'wiki', 'same')
  assert {(pair.a, pair.b) for pair in pairs} == {(('test', 'wiki', 'gold'), same), (('validation', 'specs', 'near'), same)}
  exact, near = pairs
  assert exact.exact and exact.similarity == 1
  assert not near.exact and near.similarity == pytest.approx(391 / 401)
  assert list(dedupe.counts_of(pairs)) == [('specs, wiki', 'validation-train', 0, 1), ('wiki', 'test-train', 1, 0)]
  assert dedupe.dropped(pairs) == {('wiki', 'same')}
  assert dedupe.to_json(pairs)[1] == {'a': ['validation', 'specs', 'near'], 'b': ['train', 'wiki', 'same'],
                                      'similarity': round(391 / 401, 4), 'exact': False}


def test_every_copy_in_train_is_dropped_whichever_was_compared():
  text = prose(1)
  near = [*text[:-1], 'end']
  pairs = find([('train', document('b', text)), ('train', document('a', text)), ('test', document('t', near))])
  assert dedupe.dropped(pairs) == {('wiki', 'a'), ('wiki', 'b')}
  pairs = find([('train', document('b', text)), ('train', document('a', text))])
  assert len(pairs) == 1 and not dedupe.dropped(pairs)


def test_the_order_of_reading_does_not_matter_for_what_is_dropped():
  documents = [('train', document(f'd{i}', prose(i))) for i in range(6)]
  documents += [('test', document(f't{i}', prose(i)[:395])) for i in range(3)]
  expected = {('wiki', f'd{i}') for i in range(3)}
  assert dedupe.dropped(find(documents)) == dedupe.dropped(find(documents[::-1])) == expected


def test_pairs_at_the_threshold_are_found():
  # The index looks at a pair of similarity 0.8 but once in 20,000 times not: all of 30 are there.
  documents = []
  for i in range(30):
    text = prose(100 + i, 404)
    documents += [('train', document(f'd{i}', text)), ('test', document(f't{i}', text[:-44] + prose(500 + i, 44)))]
  pairs = find(documents, threshold=0.75)
  assert len(pairs) == 30 and all(0.78 < pair.similarity < 0.82 for pair in pairs)
  assert not find(documents, threshold=0.9)


def test_short_and_unusual_texts():
  pairs = find([('train', document('a', ['one'])), ('test', document('b', ['ONE!'])), ('test', document('c', ['…']))])
  assert [(pair.a[2], pair.b[2], pair.exact) for pair in pairs] == [('b', 'a', True)]


@pytest.mark.parametrize('threshold', [0.5, 1.01, -1])
def test_thresholds_out_of_range(threshold):
  with pytest.raises(ValueError, match='similarity above 0.5'):
    find([], threshold=threshold)


def test_a_long_text_is_hashed_in_parts_with_the_same_result(monkeypatch):
  shingles = dedupe.shingles_of(prose(1))
  whole = dedupe.signature(shingles)
  monkeypatch.setattr(dedupe, '_BATCH', 7)
  np.testing.assert_array_equal(dedupe.signature(shingles).hashvalues, whole.hashvalues)


def test_hashes_do_not_depend_on_the_process():
  # Python's own hash() of text does; the numbers are from another process.
  shingles = dedupe.shingles_of('a b c d e f'.split())
  assert shingles.tolist() == [1807665361903110282, 9213832215895255490]
  assert dedupe.signature(shingles).hashvalues[:2].tolist() == [519427588162870949, 5672504243487211646]
  assert dedupe.digest_of(['a']).hex() == '27c35e6e9373877f29e562464e46497e'
