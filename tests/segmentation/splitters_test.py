"""Baselines of cutting: each gives valid cuts of any text, what its rule says, and what its library says."""

import importlib
import itertools

import numpy as np
import pytest

from blockattn.segmentation import splitters

WORDS = ('river stone bridge water flood bank', 'violin music orchestra concert song choir', 'engine fuel piston gear oil')
PROSE = '\n\n'.join(' '.join(f'The {word} of the {other} was there.' for word, other in itertools.permutations(
    topic.split(), 2)) for topic in WORDS)
TEXTS = {
    'empty': '', 'one character': 'a', 'only blank': ' \n \n ', 'no separator': 'x' * 1000,
    'CRLF': 'One.\r\n\r\nTwo. Three.\r\n' * 30, 'NUL and surrogate': 'a\x00b. \ud800 c.\n' * 40,
    'CJK': '日本語の文章です。次の文。' * 40, 'spaces': 'word    ' * 100 + '\n\n\n\t x ' * 20,
    'code': 'def f(x):\n    if x:\n\n        return 1\n\n\nclass A:\n\tpass\n' * 20, 'prose': PROSE,
}
WAYS = splitters.baselines()


def build(name, **options):
  try:
    return WAYS[name].build(**options)
  except ImportError as error:
    pytest.skip(str(error))


@pytest.mark.parametrize('name', WAYS)
def test_every_baseline_gives_cuts_of_any_text(name):
  finest, coarsest = WAYS[name].grid[0], WAYS[name].grid[-1]
  for options in (finest, coarsest):
    cutter = build(name, **options)
    for kind, text in TEXTS.items():
      found = cutter(text)
      edges = [0, *found, len(text)]
      assert all(isinstance(cut, int) for cut in found), (kind, found)
      assert not found or all(a < b for a, b in itertools.pairwise(edges)), (kind, edges)
      assert cutter(text) == found, kind


@pytest.mark.parametrize('name', [name for name, way in WAYS.items() if 'size' in way.grid[0]])
def test_a_coarser_granularity_gives_no_more_cuts(name):
  text = PROSE.replace('. ', '.\n') * 4
  options = {key: value for key, value in WAYS[name].grid[-1].items() if key != 'size'}
  counts = [len(build(name, **options, size=size)(text)) for size in (200, 800, 3200, 25600)]
  assert counts == sorted(counts, reverse=True) and counts[0] > 5 and counts[-1] == 0


def test_lengths_and_sentences():
  assert splitters.fixed_characters(4)('0123456789') == [4, 8]
  assert splitters.fixed_characters(4)('01234567') == [4]
  assert splitters.fixed_tokens(lambda text: range(0, len(text), 2), 2)('0123456789') == [4, 8]
  assert splitters.sentences(2)('A b. C d. E f. G h. I') == [10, 20]


def test_random_takes_its_share_of_the_candidates():
  text = 'A sentence. ' * 4000
  assert 0.08 < len(splitters.random_candidates(0.1)(text)) / 4000 < 0.12
  assert splitters.random_candidates(0.1)(text) != splitters.random_candidates(0.1, seed=1)(text)


def test_blank_lines_end_the_earlier_block():
  text = 'a\nb\n\nc\n \t\nd\r\n\r\n\r\ne\n'
  pieces = [text[a:b] for a, b in itertools.pairwise([0, *splitters.blank_lines()(text), len(text)])]
  assert pieces == ['a\nb\n\n', 'c\n \t\n', 'd\r\n\r\n\r\n', 'e\n']


def test_the_separator_rule():
  text = 'a\n\nb---c===d\n\te\nf'
  pieces = lambda cuts: [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]
  assert pieces(splitters.separator_rule(0)(text)) == ['a\n\n', 'b---', 'c===', 'd\n\t', 'e\n', 'f']
  assert pieces(splitters.separator_rule(0, kinds=1)(text)) == ['a\n\n', 'b---c===d\n\te\nf']
  assert pieces(splitters.separator_rule(8)(text)) == ['a\n\nb---', 'c===d\n\t', 'e\nf']


def test_headings_go_as_deep_as_sections_are_long():
  body = 'some words here ' * 20 + '\n'
  text = ''.join(f'# Part\n## A\n{body}## B\n{body}' for _ in range(3))
  parts = [i for i in range(1, len(text)) if text.startswith('# Part', i) and text[i - 1] == '\n']
  assert splitters.headings(500)(text) == parts
  assert len(splitters.headings(0)(text)) == 5                 # `## A` stands right behind `# Part`: one section
  assert set(parts) < set(splitters.headings(0)(text))


def test_white_space_that_a_library_drops_stays_with_the_earlier_block():
  text = 'one two\n\n  three'
  assert splitters.starts(['one', 'two', 'three'], text) == [0, 4, 11]
  assert splitters.behind_space([7, 9], text) == [11]
  with pytest.raises(ValueError, match='the splitter changed the text'):
    splitters.starts(['one', 'three'], text)


@pytest.mark.parametrize('name', ['langchain recursive', 'semchunk', 'chonkie recursive'])
def test_libraries_keep_their_limit_and_prefer_paragraphs(name):
  found = build(name, size=1200)(PROSE)
  second, third = (PROSE.index(f'The {topic.split()[0]}') for topic in WORDS[1:])
  assert second in found and third in found
  assert max(len(PROSE[a:b].rstrip()) for a, b in itertools.pairwise([0, *found, len(PROSE)])) <= 1200


def test_texttiling_finds_the_topics():
  text = '\n\n'.join([PROSE[:PROSE.index('The violin')].strip().replace('. ', '.\n\n', i) for i in (0, 1)] + [PROSE])
  assert build('texttiling', w=10, k=5)(text)


@pytest.mark.parametrize('w, k', [(5, 2), (10, 5), (20, 10)])
def test_block_comparison_is_that_of_nltk(w, k):
  module = pytest.importorskip('nltk.tokenize.texttiling')
  tiler = module.TextTilingTokenizer(w=w, k=k, stopwords=splitters.STOPWORDS)
  text = PROSE.lower()
  sequences = tiler._divide_to_tokensequences(text)
  table = tiler._create_token_table(sequences, [0, len(text) // 2])
  assert splitters.block_comparison(k, sequences) == pytest.approx(tiler._block_comparison(sequences, table))


def test_valleys_are_where_the_words_change():
  second, third = (PROSE.index(f'The {topic.split()[0]}') for topic in WORDS[1:])
  assert splitters.embedding_valleys(splitters.hashed_words, window=400, size=len(PROSE) // 3)(PROSE) == [second, third]


def test_windows_and_depths_by_hand():
  units = np.array([[1., 0], [1, 0], [0, 1], [1, 1]])
  edges = np.array([0, 10, 20, 30, 40])
  # At 10: unit 0 | unit 1; at 20: unit 1 | unit 2; at 30: unit 2 | unit 3.
  assert splitters.window_similarities(units, edges, 10) == pytest.approx([1, 0, 0.5 ** 0.5])
  # Of 20 characters: (1,0) | (1,1); (2,0) | (1,2); (1,1) | (1,1).
  assert splitters.window_similarities(units, edges, 20) == pytest.approx([0.5 ** 0.5, 1 / 5 ** 0.5, 1])
  assert splitters.valley_depths(np.array([3., 1, 2, 2, 0, 4])).tolist() == [0, 2 + 1, 0, 0, 2 + 4, 0]
  assert splitters.valley_depths(np.array([1., 1, 1])).tolist() == [0, 0, 0]


def test_a_missing_library_is_named_with_its_extra(monkeypatch):
  def missing(name):
    raise ImportError(f'No module named {name!r}')
  monkeypatch.setattr(importlib, 'import_module', missing)
  with pytest.raises(ImportError, match=r'needs semchunk: .*pip install "blockattn\[text\]"'):
    splitters.semchunk_chunks(100)
