"""Two runs side by side: means and differences over what both answered, and what does not match."""

import json

import numpy as np
import pytest

from blockattn import metrics
from tools import compare


def write(folder, rows, **facts):
  """A run's folder from (id, task, scores, key)."""
  folder.mkdir()
  metrics.write_json(folder / 'run.json', {'benchmark': 'qa', 'mode': 'block', 'model': 'abcdefghij'} | facts)
  (folder / 'predictions.jsonl').write_text(''.join(
      json.dumps({'id': name, 'task': task, 'prediction': '', 'scores': scores, 'key': key}) + '\n'
      for name, task, scores, key in rows))
  return folder


@pytest.fixture
def runs(tmp_path):
  a = [(f'x{i}', 'x', {'em': 0.0, 'f1': 0.5}, 'k') for i in range(4)] + [
      ('y0', 'y', {'em': 1.0}, 'k'), ('only', 'y', {'em': 1}, 'k')]
  b = [(f'x{i}', 'x', {'em': float(i > 0), 'f1': 0.25 * i}, 'k') for i in range(4)] + [
      ('y0', 'y', {'em': 0.5}, 'other'), ('more', 'z', {'em': 1}, 'k'), ('even', 'z', {'em': 1}, 'k')]
  return write(tmp_path / 'a', a, mode='full'), write(tmp_path / 'b', b)


def test_means_and_differences_over_common_items(runs):
  made = compare.compare(*runs)
  assert list(made['tasks']) == ['x', 'y']
  x = made['tasks']['x']
  assert (x['n'], x['measure'], x['a'], x['b'], x['wins'], x['ties'], x['losses']) == (4, 'em', 0, 0.75, 3, 1, 0)
  assert x['difference']['mean'] == 0.75 and 0 <= x['difference']['low'] < 0.75 < x['difference']['high'] <= 1
  y = made['tasks']['y']
  assert (y['n'], y['difference'], y['losses']) == (1, {'mean': -0.5, 'low': -0.5, 'high': -0.5}, 1)
  assert made['macro']['mean'] == pytest.approx((0.75 - 0.5) / 2)
  assert (made['only_a'], made['only_b'], made['other_prompt']) == (['only'], ['even', 'more'], ['y0'])
  assert made['a']['mode'] == 'full' and made['b']['folder'].endswith('b')
  back = compare.compare(*runs[::-1])['tasks']['x']
  assert back['difference']['mean'] == -0.75 and (back['wins'], back['losses']) == (0, 3)


def test_another_measure(runs):
  with pytest.raises(ValueError, match="y0: no measure 'f1'; there are em"):
    compare.compare(*runs, measure='f1')
  only_x = [row for row in (runs[0] / 'predictions.jsonl').read_text().splitlines(keepends=True) if '"x"' in row]
  (runs[0] / 'predictions.jsonl').write_text(''.join(only_x))
  made = compare.compare(*runs, measure='f1')
  assert made['tasks']['x']['difference']['mean'] == pytest.approx(0.375 - 0.5) and 'macro' not in made


def test_pairs_are_drawn_together(tmp_path):
  """Items differ much, runs always by 0.1: no doubt about the difference, whatever the spread of the items."""
  scores = np.linspace(0, 0.9, 40)
  a = write(tmp_path / 'a', [(str(i), 't', {'s': s}, 'k') for i, s in enumerate(scores)])
  b = write(tmp_path / 'b', [(str(i), 't', {'s': s + 0.1}, 'k') for i, s in enumerate(scores)])
  made = compare.compare(a, b)['tasks']['t']['difference']
  assert (made['low'], made['high']) == pytest.approx((0.1, 0.1))
  # Drawn apart, the interval would be some 0.25 wide: 2 * 1.96 * sqrt(2) * std / sqrt(40).
  assert 2 * 1.96 * np.sqrt(2) * scores.std() / np.sqrt(40) > 0.2


def test_the_command(runs, tmp_path, capsys):
  a, b = runs
  assert compare.main([str(a), str(b), '--json', str(tmp_path / 'out.json')]) == 0
  printed = capsys.readouterr().out
  assert '+75.0 [' in printed and '-50.0 [-50.0, -50.0]' in printed and 'model abcdefgh)' in printed
  assert "mode: 'full' in A, 'block' in B" in printed
  assert 'only B answered: 2 items (even, more)' in printed and 'another prompt in A than in B: 1 items (y0)' in printed
  assert json.loads((tmp_path / 'out.json').read_text()) == compare.compare(a, b)


@pytest.mark.parametrize('change, message', [
    ({'scores': {}}, 'jsonl:1 has no scores'), ({'scores': {'em': '1'}}, "jsonl:1: 'scores': 'em' is '1', not a number"),
    ({'task': 3}, "jsonl:1: 'task' is 3, not a text"), ({'key': None}, "jsonl:1: 'key' is None, not a text")])
def test_rows_of_another_form_are_named(runs, capsys, change, message):
  path = runs[1] / 'predictions.jsonl'
  first, *more = path.read_text().splitlines(keepends=True)
  path.write_text(json.dumps(json.loads(first) | change) + '\n' + ''.join(more))
  assert compare.main(list(map(str, runs))) == 2 and message in capsys.readouterr().err


def test_what_is_no_run(runs, tmp_path, capsys):
  other = write(tmp_path / 'c', [('z', 'z', {'em': 1}, 'k')])
  for pair, message in (((runs[0], other), "first 'x0' and 'z'; compare runs of one benchmark (mode: 'full' in A, 'block'"),
                        ((runs[0], tmp_path), 'no predictions.jsonl')):
    assert compare.main(list(map(str, pair))) == 2
    assert message in capsys.readouterr().err
  for text, message in ((b'\xff', 'run.json is no UTF-8 text'), (b'{"mode": "full"}', "run.json lacks 'model'")):
    (runs[0] / 'run.json').write_bytes(text)
    assert compare.main(list(map(str, runs))) == 2 and message in capsys.readouterr().err
