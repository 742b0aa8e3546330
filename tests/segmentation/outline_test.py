"""The headings of a text, and what they add to a segmenter's scores."""

import dataclasses
import json
import re

import numpy as np
import pytest
import segment_cases
from hypothesis import given, settings, strategies as st

from blockattn.hf import files
from blockattn.segmentation import markers, outline, segmenter as inference
from tools import fit_outline

BODY = 'word ' * 40 + '\n'   # 201 characters


def levels(text):
  return outline.levels(text, markers.candidates(text))


def ranks(text):
  """{line: rank} of the headings at candidates."""
  places, found = markers.candidates(text), levels(text)
  return {text[at:].splitlines()[0]: rank for at, rank in zip(places[found.place].tolist(), found.rank.tolist())}


def shift(**numbers):
  """A Shift of zeros but for what is given, as {index: number}."""
  arrays = {name: np.zeros(shape) for name, shape in outline._SHAPES.items()}
  for name, values in numbers.items():
    for index, value in values.items():
      arrays[name][index] = value
  return outline.Shift(**{name: array.tolist() for name, array in arrays.items()})


def test_headings_of_all_kinds_and_their_levels():
  text = ('# One\nx\n### Deep\n```\n# a comment\n```\n\\section{Two}\n\\subsubsection*{T}\nTitle\n=====\nx\nOther\n-----\n'
          'Again\n=====\n2.1 Numbered Heading\n3 apples were eaten.\nCHAPTER IV\nScene 2\nItem 7. Data\n§ 12-3 Terms\n')
  found = [(text[offset:].split('\n')[0], level) for offset, level in outline.heading_lines(text)]
  assert found == [('# One', 1), ('### Deep', 3), ('\\section{Two}', 2), ('\\subsubsection*{T}', 4), ('Title', 1),
                   ('Other', 2), ('Again', 1), ('2.1 Numbered Heading', 2), ('CHAPTER IV', 2), ('Scene 2', 2),
                   ('Item 7. Data', 2), ('§ 12-3 Terms', 2)]


@pytest.mark.parametrize('code, after', [
    ('```\n# in\n```\n', '# out'), ('```\n# in\n`````\n', '# out'), ('````\n```\n# in\n````\n', '# out'),
    ('```py a=1\n# in\n```\n', '# out'), ('```\n``` x\n# in\n```\n', '# out'), ('~~~ ```\n# in\n```\n~~~\n', '# out'),
    ('   ```\n# in\n   ```\n', '# out'), ('- a\n\n  ```\n  # in\n  ```\n', '# out'), ('``` a`b\n', '# out'),
    ('    ```\n', '# out'), ('```\n# in\n', None), ('```\r\n# in\r\n```\r\n', '# out')])
def test_headings_in_fenced_code_are_none(code, after):
  text = f'words\n\n{code}{after or "# in, too"}\n'
  found = [text[offset:].splitlines()[0] for offset, _ in outline.heading_lines(text)]
  assert found == ([after] if after else [])


def test_the_highest_level_that_cuts_has_rank_2():
  assert ranks(f'intro\n# A\n{BODY}## B\n{BODY}# C\n{BODY}') == {'# A': 2, '## B': 3, '# C': 2}
  assert ranks(f'Hi.\n# Title\n## A\n{BODY}### B\n{BODY}## C\n{BODY}') == {'# Title': 1, '## A': 2, '### B': 3, '## C': 2}
  assert ranks(f'# A\n{BODY}') == {}   # the beginning of a text is no place to cut
  assert ranks('no heading\na # b\n= x\n') == ranks('') == {}


def test_lengths_of_sections():
  text = f'intro\n# One\n{BODY * 2}# Two\nshort\n# Three\n{BODY * 8}'
  at = [text.index(f'# {name}') for name in ('One', 'Two', 'Three')]
  steps = lambda length: 1 + int(2 * (np.log2(max(length, 32)) - 5))
  found = levels(text)
  assert found.average.tolist() == [steps(len(text) / 2)] * 3   # two of four sections are not short
  assert found.since.tolist() == [steps(at[0]), steps(at[1] - at[0]), steps(at[2] - at[1])]
  assert found.until.tolist() == [steps(at[1] - at[0]), steps(at[2] - at[1]), steps(len(text) - at[2])]
  cuts = outline.cuts(outline.heading_lines(text), len(text))
  assert cuts == [at[1]] and found.chosen.tolist() == [0, 1, 0]   # of a short section and its next one, the first begins


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.lists(st.sampled_from(['# A\n', '## B\n', '### C\n', 'Title\n=====\n', BODY, 'text\n', '\n', '```\n',
                                 'end. More']), max_size=30))
def test_any_text_has_levels_within_the_tables(parts):
  text = ''.join(parts)
  places, found = markers.candidates(text), levels(text)
  assert (np.diff(found.place) > 0).all() and set(places[found.place]) <= {at for at, _ in outline.heading_lines(text)}
  odds = np.linspace(-1, 1, len(places), dtype=np.float32)
  raised = shift(chosen={...: 1.0}).apply(text, places, odds)
  expected = odds.copy()
  expected[found.place] += 1
  np.testing.assert_array_equal(raised, expected)


def test_fitting_finds_what_makes_a_heading_a_cut():
  """Cuts at one rank but where sections are short; the log-odds say nothing of it."""
  random, texts = np.random.default_rng(0), []
  for _ in range(60):
    parts = [f'{"#" * level} Head\n{BODY * int(random.integers(1, 6))}' for level in random.integers(1, 4, 12)]
    texts.append('intro\n# Top\n' + ''.join(parts))
  places = [markers.candidates(text) for text in texts]
  found = [outline.levels(text, at) for text, at in zip(texts, places)]
  odds = [random.normal(size=len(at)).astype(np.float32) for at in places]
  gold = [np.zeros(len(at), bool) for at in places]
  for levels_of, cut in zip(found, gold):
    cut[levels_of.place] = (levels_of.rank == 3) & (levels_of.until > 7)
  fitted = outline.fit(found, odds, gold)
  wrong = before = total = 0
  for text, at, values, cut, of in zip(texts, places, odds, gold, found):
    raised = fitted.apply(text, at, values)
    wrong += ((raised > 0) != cut)[of.place].sum()
    before += ((values > 0) != cut)[of.place].sum()
    total += len(of.place)
    apart = np.setdiff1d(np.arange(len(at)), of.place)
    np.testing.assert_array_equal(raised[apart], values[apart])
  assert before > 0.3 * total and wrong < 0.1 * total
  with pytest.raises(ValueError, match='no headings'):
    outline.fit([outline.levels('plain', markers.candidates('plain'))], [np.zeros(0)], [np.zeros(0, bool)])


def test_a_segmenter_raises_the_scores_of_headings(tmp_path):
  folder = segment_cases.folder_of(tmp_path, 'pooled')
  text = f'intro\n# One\n{BODY}# Two\n{BODY}'
  plain, = inference.Segmenter.load(folder).score([text])
  added = shift(chosen={(2, 1): 1.5}, since={...: 0.25})
  meta = json.loads((folder / files.META).read_text())
  meta['segmenter']['outline'] = dataclasses.asdict(added)
  (folder / files.META).write_text(json.dumps(meta))
  raised, = inference.Segmenter.load(folder).score([text])
  found = levels(text)
  assert len(found.place) == 2
  np.testing.assert_allclose(raised.log_odds - plain.log_odds,
                             added.apply(text, plain.candidates, np.zeros_like(plain.log_odds)), atol=1e-5)
  assert (raised.log_odds != plain.log_odds).sum() == 2
  without, = inference.Segmenter.load(folder, outline=None).score([text])
  np.testing.assert_array_equal(without.log_odds, plain.log_odds)
  meta['segmenter']['outline']['since'] = [0.0]
  (folder / files.META).write_text(json.dumps(meta))
  with pytest.raises(ValueError, match=r'blockattn.json.*since must be numbers of shape \(25,\), not \(1,\)'):
    inference.Segmenter.load(folder)


def test_the_tool_writes_the_shift_and_a_threshold(tmp_path, capsys):
  folder, data = segment_cases.folder_of(tmp_path, 'pooled'), tmp_path / 'data'
  data.mkdir()
  random = np.random.default_rng(0)
  for split, count in (('train', 20), ('validation', 6)):
    lines = [{'id': f'{split} {i}', 'category': 'manuals', 'source': 'x', 'license': 'MIT', 'blocks':
              ['intro\n', *(f'# Head {k}\n{BODY * int(random.integers(2, 6))}' for k in range(8))]} for i in range(count)]
    (data / f'{split}_manuals.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
  before = (folder / files.META).read_text()
  assert fit_outline.main([str(folder), '--data', str(tmp_path / 'nothing')]) == 2
  assert re.search('fit_outline: .*nothing', capsys.readouterr().err) and (folder / files.META).read_text() == before
  assert fit_outline.main([str(folder), '--data', str(data)]) == 0
  rows = [list(map(float, re.findall(r'-?\d+\.\d+', line))) for line in capsys.readouterr().out.splitlines()[1:]]
  best = max(rows, key=lambda row: row[3])
  assert len(rows) == len(fit_outline.THRESHOLDS) and best[3] > best[1] + 0.1
  said = json.loads((folder / files.META).read_text())['segmenter']
  scores = {row[0]: (row[3] + row[4]) / 2 for row in rows}
  assert scores[said['threshold']] >= max(scores.values()) - 0.0051
  assert inference.Segmenter.load(folder).options.outline == outline.Shift(**said['outline'])
