"""Surface hints: what is removed, what stays, and that nothing but hints changes."""

import gzip
import itertools
import json
import random

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from blockattn.segmentation.semanticseg import hints

few = settings(max_examples=150, deadline=None, derandomize=True, database=None)
PIECES = st.sampled_from([
    '# ', '## 3.2 ', 'Title', '\n', '\n\n', '\r\n', '\r', ' ', '====', '---', '~~~~', '~~~', '```', '```py\n', 'CHAPTER IX.',
    'Item\n', '7. ', '§ 12-34 ', 'Q: ', 'A: ', 'word', '\\section{', '}', '\\label{section-x}', '\u200b', '\f', '**', '== ',
    ' ==', '<h2>', '</h2>', '[10:21] ', '> ', 'On a day x wrote:', '.', 'Scene 2', 'IV. ', '1. ', '# ---- #', '_____',
    '* * *', '4:06 pm on 3 May, 2023', ' ?', '\0', '\ue000', '😀'])
TEXTS = st.lists(PIECES, max_size=14).map(''.join)
CATEGORIES = st.sampled_from([*hints.KINDS, 'books', 'medical', 'something else'])


def plain(text, category='manuals'):
  return ''.join(hints.remove_hints([text], category)) if text else ''


def is_subsequence(short, long):
  rest = iter(long)
  return all(character in rest for character in short)


@pytest.mark.parametrize('text, expected', [
    ('# One\n\nA b.\n\n\n## Two ##\nC.\n', 'One\nA b.\nTwo\nC.\n'),
    ('### 3.2 Fixed {#fixed}\ntext', 'Fixed\ntext'),
    ('#hashtag\n##Old style\n#include <x>\n', '#hashtag\nOld style\n#include <x>\n'),
    ('## [**Training**]\nx\n**Bold line**\n**a** b\n', 'Training\nx\nBold line\n**a** b\n'),
    ('One\n===\n\nTwo\n---\ntext\n\n***\n* * *\nend', 'One\nTwo\ntext\nend'),
    ('*****\nTitle\n*****\n\n2. Part\n-------\nx\n\nsub\n~~~~\ny\n', 'Title\nPart\nx\nsub\ny\n'),
    ('---\ntitle: x\n---\n\ntext\n', 'title: x\ntext\n'),
    ('= Title =\n== Sub ==\n=== Deep\n a = b\n', 'Title\nSub\nDeep\n a = b\n'),
    ('<h2 class="x">One</h2>\n<p>two</p>\n', 'One\n<p>two</p>\n'),
    ('.SH "NAME"\nx\n=head1 SYNOPSIS\n', 'NAME\nx\nSYNOPSIS\n'),
    ('.. _anchor:\n\nx\n<a name="y"></a>\n\\phantomsection\n', 'x\n'),
    ('\\section*{A \\emph{b}\n c}\n\\label{section-a}\n\n\\begin{lemma}\n\\label{lemma-b}\n',
     'A \\emph{b}\n c\n\\begin{lemma}\n\\label{lemma-b}\n'),
    ('\\olfileid{a}{b}{c}\n\n\\olsection{X}\ny\n', 'X\ny\n'),
    ('CHAPTER IX.\n\nTHE END\n\nCHAPTER XVI.IN HOUSE\n\nPART THE FIRST.\nBook Two: Sea\n', 'THE END\nIN HOUSE\nSea\n'),
    ('PHASE FOURTH\n\nSea\n\nX\n\nCHAP. VII. THE JUPITER.\n\nChapter VI ~ Home\n', 'Sea\nTHE JUPITER.\nHome\n'),
    ('II.\n\nx\n\n42.\n\ny\n\nXI.—The End\n\nz', 'x\ny\nThe End\nz'),
    ('Item 7. Data\nItem\n2.\nMore\nNote 3 — Leases\nNOTE 15: X\nPART I - Y\nITEM 1C. Z\n', 'Data\nMore\nLeases\nX\nY\nZ\n'),
    ('§ 49-1003.02a Purposes.\n§§ 5-101, 5-102. Repealed.\n§ 3\nText.\n', 'Purposes.\nRepealed.\nText.\n'),
    ('Act 3\nScene 1\nA room.\nACT I. SCENE 2. A heath.\nx', 'A room.\nA heath.\nx'),
    ('Q: Why?\nA: So.\nQuestion 2: How?\nAnswer: Thus.\n', 'Why?\nSo.\nHow?\nThus.\n'),
    ('a\r\n\r\n \t\r\nb\r\rc\n\u200b\n\f\nd', 'a\r\nb\rc\nd'),
])
def test_what_goes(text, expected):
  assert plain(text) == expected


@pytest.mark.parametrize('text', [
    'Part of the plan.\nNote I think so.\nSection 4 of the act says\nBook a room.\nExhibit 3.1 of the report\n',
    'See § 5.\n§ 5-101 shall be\n',
    'A: hi\nB: ho\nA: bye\n',                       # speakers, not answers
    '```\n# comment\n==\nItem 7. X\n```\nx\n',
    '~~~ c\n## x\n~~~\n',
    '\\begin{verbatim}\n\\section{x}\n\\end{verbatim}\n',
    '    # indented\n',
    '(a) First\n(1) Second\n1. Third\n- x\n| --- | --- |\n===== ====\n',
    'Name ______\n_________\nSignature\n',
    '$$\na\n= \\b =\n$$\n',
    '1984 was a year.\n',
])
def test_what_stays(text):
  assert plain(text) == text


@pytest.mark.parametrize('category, text, expected', [
    ('code', '# ---- #\nx = 1\n\n\n# note\n//=====\n/* --- */\n  -----\n#if 0\n', 'x = 1\n# note\n  -----\n#if 0\n'),
    ('chat', '[10:21] <a> # hi\n[10:05] <b> ho\n', '<a> # hi\n<b> ho\n'),
    ('conversations_locomo', '4:06 pm on 23 January, 2023\nA: hi\n', 'A: hi\n'),
    ('meetings', 'A: # one\n\nB: two', 'A: # one\nB: two'),
    ('medical', 'What is X ? ?\nIt is y.\n', 'What is X\nIt is y.\n'),
    ('email', 'From a@b Mon May 1 10:00:00 2023\nFrom: a\nSubject: x\n\nhi\n\nOn Monday, b wrote:\n> > old\n', 'hi\nold\n'),
])
def test_kinds_by_category(category, text, expected):
  assert plain(text, category) == expected


def test_marks_go_wherever_they_stand_and_cuts_stay():
  blocks = ('# One\n\ntext\n\n', '## Sub\n\nmore\n\n', 'Plain.\n\n### Inner\nx')
  assert hints.remove_hints(blocks, 'web_text') == ('One\ntext\n', 'Sub\nmore\n', 'Plain.\nInner\nx')
  assert hints.remove_hints((), 'books') == ()


def test_code_may_reach_across_a_cut():
  blocks = ('a\n```\n# one\n', '# two\n```\n', '# three\n')
  assert hints.remove_hints(blocks, 'manuals') == ('a\n```\n# one\n', '# two\n```\n', 'three\n')


def test_a_block_of_hints_only_is_kept():
  blocks = hints.remove_hints(('a\n\n', 'Scene 2\n\n', '\n', '====\n', 'b'), 'drama')
  assert blocks == ('a\n', 'Scene 2\n', '\n', '====\n', 'b')
  with pytest.raises(ValueError, match='block 1 of 2 is empty'):
    hints.remove_hints(('a', ''), 'drama')


@few
@given(st.lists(TEXTS.filter(bool), max_size=4), CATEGORIES, st.integers(0, 99))
def test_only_deletes_and_is_idempotent(blocks, category, seed):
  once = hints.remove_hints(blocks, category)
  assert hints.remove_hints(once, category) == once
  some = hints.random_hints(blocks, category, random.Random(seed), 0.5)
  for result in (once, some):
    assert len(result) == len(blocks) and all(result)
    assert all(is_subsequence(new, old) for new, old in zip(result, blocks, strict=True))


def test_random_hints_take_whole_kinds():
  blocks = ('# 1. One\n\nSection 2: x\n\n', '# 2. Two\n\ny\n\n') * 5
  rng = np.random.default_rng(0)
  seen = {hints.random_hints(blocks, 'specs', rng, 0.5) for _ in range(60)}
  assert len(seen) == 8   # blank, heading, number: in or out
  assert all(result[:2] * 5 == result for result in seen)
  assert hints.random_hints(blocks, 'specs', rng, 0) == blocks
  assert hints.random_hints(blocks, 'specs', rng, 1) == hints.remove_hints(blocks, 'specs')
  same = [hints.random_hints(blocks, 'specs', np.random.default_rng(7), 0.5) for _ in range(2)]
  assert same[0] == same[1]


@pytest.mark.parametrize('text', [
    '```\n' * 20_001, '~~~a\n' * 20_000, '# ' * 50_000, '1. ' * 50_000, ' ' * 100_000, '\n' * 100_000, '= ' * 50_000,
    '\\section{' * 12_000, 'a' * 200_000, '**' * 50_000, 'Item\n' * 20_000, '§ 1, ' * 20_000, '-' * 100_000, '> ' * 50_000,
    '\\begin{verbatim}' * 8_000])
@pytest.mark.parametrize('category', ['manuals', 'code', 'email'])
def test_long_odd_texts_take_no_time(text, category):
  assert hints.remove_hints([text], category)


def real_documents(path, count):
  with gzip.open(path, 'rt', encoding='utf-8') as lines:
    return [json.loads(line)['blocks'] for line in itertools.islice(lines, count)]


@pytest.mark.data
def test_real_documents_lose_their_marks(data_dir):
  for category, rest in (('specs', '## '), ('legal', '§ '), ('finance', 'Item '), ('math_latex', '\\section')):
    documents = real_documents(data_dir / 'seg' / f'validation_{category}.jsonl.gz', 8)
    for blocks in documents:
      new = hints.remove_hints(blocks, category)
      assert len(new) == len(blocks) and '\n\n' not in ''.join(new)
      starts = sum(block.startswith(rest) for block in new)
      assert starts <= 0.05 * len(new), (category, [block[:40] for block in new if block.startswith(rest)])
