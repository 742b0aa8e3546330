"""tools.bench segment: everybody is tuned and measured on the same texts, and shown in the same tables."""

import dataclasses
import re
import types

import numpy as np
import pytest

from blockattn.segmentation import markers, measures, splitters
from blockattn.segmentation.semanticseg import schema
from tools.bench import segment


class Threshold:
  """A stand-in for a segmenter: sure of every candidate in front of a line that starts with '#'."""

  def score(self, texts):
    places = [markers.candidates(text) for text in texts]
    odds = [np.array([5.0 if text[place] == '#' else -5.0 for place in found]) for text, found in zip(texts, places)]
    return [types.SimpleNamespace(candidates=found, log_odds=values) for found, values in zip(places, odds)]

  def embed(self, texts):
    return splitters.hashed_words(texts, 64)


def documents(category, count, sections):
  block = lambda i, j: f'# Part {i}\n\n' + 'It is a sentence of some length. ' * (5 + (i * j) % 7) + '\n\n'
  return [schema.Document(f'{category}/{i}', category, 'here', 'CC0-1.0',
                          tuple(block(i, j) for j in range(sections))) for i in range(count)]


@pytest.fixture
def folder(tmp_path):
  for split, count in (('validation', 3), ('test', 4)):
    schema.write(tmp_path / f'{split}_short.jsonl.gz', documents('short', count, 3))
    schema.write(tmp_path / f'{split}_long.jsonl', documents('long', count, 9))
  schema.write(tmp_path / 'test_rare.jsonl', documents('rare', 1, 2))   # without validation texts
  return tmp_path


def test_the_bench_tunes_on_validation_and_measures_on_test(folder):
  texts = {split: segment.load([folder], split, None, 'kept') for split in ('validation', 'test')}
  assert [text.category for text in texts['test']] == ['long'] * 4 + ['rare'] + ['short'] * 4
  segmenter = Threshold()
  every = [text.text for split in texts.values() for text in split]
  ways = segment.ways_to_cut(segmenter, dict(zip(every, segmenter.score(every))), None, remember=True)
  ways = {name: ways[name] for name in ('segmenter', 'blank lines', 'fixed characters', 'random', 'valleys (backbone)')}
  rows = segment.compare(ways, texts['validation'], texts['test'], log=lambda text: None)
  assert len(rows) == 4 * len(ways)
  first = segment.pick(rows, name='segmenter', objective='f1', scope='corpus')[0]
  assert first['macro']['f1'] == 1 and first['macro']['pk'] == 0 and abs(first['options']['log_odds']) < 5
  blank, = segment.pick(rows, name='blank lines', objective='f1', scope='corpus')
  assert blank['by_category']['long']['recall'] == 1 and 0.4 < blank['by_category']['long']['precision'] < 0.6
  by_category, = segment.pick(rows, name='fixed characters', objective='f1', scope='category')
  corpus, = segment.pick(rows, name='fixed characters', objective='f1', scope='corpus')
  assert by_category['options']['rare'] == corpus['options']
  report = segment.report('kept', rows, dict.fromkeys(ways, 1e6))
  assert 'points to the best baseline tuned on the corpus (blank lines); behind the best of a category in: none' in report
  shown = re.findall(r'>(\d\.\d\d)</text>', segment.picture({'kept': rows}))
  assert len(shown) == len(ways) * 4 and shown[:4] == ['1.00'] * 4   # the best first, macro and three categories


def test_options_are_chosen_by_f1_by_pk_and_by_number_of_cuts():
  way = splitters.Baseline('', splitters.fixed_characters, ({'size': 1}, {'size': 2}, {'size': 3}))
  found = lambda f1, pk, predicted: dict.fromkeys(measures.MEASURES, f1) | {
      'pk': pk, 'gold': 10, 'predicted': predicted}
  results = {0: {'a': found(0.9, 0.5, 40), 'b': found(0.1, 0.5, 40)},
             1: {'a': found(0.8, 0.1, 25), 'b': found(0.8, 0.6, 25)},
             2: {'a': found(0.2, 0.6, 10), 'b': found(0.3, 0.2, 10)}}
  assert segment.choose(way, results, 'f1') == {'': 1, 'a': 0, 'b': 1}
  assert segment.choose(way, results, 'pk') == {'': 1, 'a': 1, 'b': 2}
  assert segment.choose(dataclasses.replace(way, by_count=True), results, 'f1') == {'': 2, 'a': 2, 'b': 2}


def test_hints_are_removed_before_anything_is_measured(folder):
  text = segment.load([folder], 'test', 1, 'removed')[0]
  assert '#' not in text.text and '\n\n' not in text.text and len(text.cuts) == 8
  assert set(text.cuts) <= set(text.candidates.tolist())


def test_a_limit_is_spread_over_the_documents():
  assert segment.spread(range(10), 3) == [0, 3, 6] and segment.spread('ab', 3) == ['a', 'b']


def test_a_folder_without_the_split_is_named(folder):
  with pytest.raises(ValueError, match='no file train_'):
    segment.load([folder], 'train', None, 'kept')


@pytest.mark.data
def test_gold_cuts_are_candidates_with_and_without_hints(data_dir):
  for hints in ('kept', 'removed'):
    for text in segment.load([data_dir / 'seg'], 'validation', 1, hints):
      assert set(text.cuts) <= set(text.candidates.tolist()), text.category
