"""Excerpts of a made-up document, and ways to cut them; tools.study is tested with the rest."""

import data_cases
import numpy as np
import pytest

from blockattn.data import encode
from blockattn.segmentation.semanticseg import schema
from tools import excerpts


def test_an_excerpt_begins_at_a_block_and_reads_from_the_end_of_a_sentence():
  text = [f'{word} one two. three four.\n' for word in 'abcdefgh']
  document = schema.Document('x', 'books', '', '', tuple(text))
  by_word = lambda texts: [np.flatnonzero([c in ' \n' for c in text]) + 1 for text in texts]
  one = excerpts.cut_out(document, 'known', 16, by_word, np.random.default_rng(0))
  assert one.text[:one.read].endswith(('.\n', '. ')) and one.gold and all(one.text[cut - 1] == '\n' for cut in one.gold)
  assert excerpts.cut_out(document, 'known', 60, by_word, np.random.default_rng(0)) is None


def test_the_size_whose_number_of_cuts_is_nearest():
  cut = lambda size: list(range(size, 100, size))
  assert len(excerpts.nearest(cut, 100, 4)) == 4
  assert excerpts.nearest(lambda size: [], 100, 4) == []


def test_what_is_measured_is_the_same_block_however_the_context_is_cut():
  one = excerpts.Excerpt('x', 'books', 'known', 'One two. Three four. Five six.', 21, (9,))
  encoder = encode.Encoder(data_cases.tiny_tokenizer())
  (cut, whole), examples = excerpts.encoded([one, one], [[9], []], encoder)
  assert [example.blocks for example in examples] == [('One two.', ' Three four.', ' Five six.'),
                                                      ('One two. Three four.', ' Five six.')]
  assert len(cut.lengths) == 3 and len(whole.lengths) == 2
  assert np.array_equal(cut.tokens[cut.answer[0]:], whole.tokens[whole.answer[0]:])
  assert cut.answer == (len(cut.tokens) - cut.lengths[-1] + 1, len(cut.tokens)) and encoder.eos not in cut.tokens


def test_ways_to_cut_give_about_as_many_blocks():
  pytest.importorskip('langchain_text_splitters')
  pytest.importorskip('semchunk')
  words = ('river', 'stone', 'boat', 'house', 'wheel', 'horse')
  text = ''.join(f'{word} is a word. It has {len(word)} letters.\n\n' for word in words)
  ways = excerpts.ways_to_cut(data_cases.tiny_tokenizer(), [text])
  for name, cut in ways.items():
    cuts = cut(text, 5)
    assert cuts == sorted(set(cuts)) and all(0 < at < len(text) for at in cuts), name
    assert len(cuts) == 0 if name == excerpts.GOLD else 3 <= len(cuts) <= 7, name
