"""The runner of benchmarks: what is kept, what is asked again, what is refused, and the figures of its summary."""

import dataclasses
import json

import numpy as np
import pytest

from blockattn.blocks import Continued
from blockattn.data.example import Example
from blockattn.evals import answers


def item(name, task='a', words=3, **more):
  return answers.Item(name, task, Example(('one ' * words, 'two '), name, '', name), references=(name,),
                      **{'max_new': 4, 'stop': ('.',)} | more)


def prompt(example):
  """A token per character."""
  return [(Continued if i in example.continued else list)(map(ord, block))
          for i, block in enumerate((*example.blocks, example.prompt))]


class Answerer:
  """Says back what it is asked, and remembers the calls."""

  def __init__(self, dies_at=None):
    self.calls, self.dies_at = [], dies_at

  def __call__(self, prompts, *, max_new, stop):
    if len(self.calls) == self.dies_at:
      raise KeyboardInterrupt
    self.calls.append(([''.join(map(chr, blocks[-1])) for blocks in prompts], max_new, stop))
    return self.calls[-1][0]


def right(item, prediction):
  return {'right': float(prediction == item.references[0]), 'length': len(prediction) / 10}


def run(items, out, answerer=None, *, facts=None, **more):
  return answers.run(items, prompt=prompt, answer=answerer or Answerer(), score=right, out=out,
                     facts=facts or {'model': 'm', 'sinks': (1, 2)}, **{'batch': 2} | more)


def lines(out):
  return [json.loads(line) for line in (out / 'predictions.jsonl').read_text().splitlines()]


def test_items_are_asked_in_batches_by_length_and_kind(tmp_path):
  items = [item('long', words=9), item('other', max_new=8), item('mid', words=5), item('tiny', words=1)]
  said, seen = Answerer(), []
  summary = run(items, tmp_path / 'new' / 'run', said, progress=lambda *at: seen.append(at))
  # The shortest first; what has another length of answer is not asked together.
  assert said.calls == [(['tiny', 'mid'], 4, ('.',)), (['long'], 4, ('.',)), (['other'], 8, ('.',))]
  assert seen == [(0, 4), (2, 4), (3, 4), (4, 4)]
  rows = lines(tmp_path / 'new' / 'run')
  assert rows[1] == {'id': 'mid', 'task': 'a', 'prediction': 'mid', 'references': ['mid'],
                     'scores': {'right': 1.0, 'length': 0.3}, 'tokens': 5 * 4 + 4 + 3, 'blocks': 3, 'key': rows[1]['key']}
  assert summary['tasks']['a'] | {'right': 0} == {
      'n': 4, 'tokens': (18 * 4 + 4 * 4 + 16) / 4, 'blocks': 3.0, 'right': 0, 'length': summary['tasks']['a']['length']}
  assert json.loads((tmp_path / 'new' / 'run' / 'summary.json').read_text()) == json.loads(json.dumps(summary))
  assert not list(tmp_path.rglob('*.tmp'))


def test_a_second_start_answers_what_is_missing(tmp_path):
  items = [item(str(i), words=i) for i in range(1, 8)]
  with pytest.raises(KeyboardInterrupt):
    run(items, tmp_path, Answerer(dies_at=2))
  assert [row['id'] for row in lines(tmp_path)] == ['1', '2', '3', '4'] and not (tmp_path / 'summary.json').exists()
  with open(tmp_path / 'predictions.jsonl', 'a') as file:
    file.write('{"id": "5", "task": "a", "predic')   # killed while it wrote
  said, seen = Answerer(), []
  resumed = run(items, tmp_path, said, progress=lambda *at: seen.append(at))
  assert [call[0] for call in said.calls] == [['5', '6'], ['7']] and seen[0] == (4, 7)
  assert sorted(row['id'] for row in lines(tmp_path)) == list('1234567')
  at_once = run(items, tmp_path / 'again')
  assert resumed['tasks'] == at_once['tasks'] and resumed['n'] == 7
  # Once more: nothing to ask. With fewer items the summary is of these.
  said = Answerer()
  assert run(items[:2], tmp_path, said)['n'] == 2 and not said.calls


def test_blocks_that_go_on_are_asked_as_such(tmp_path):
  seen = []

  def answer(prompts, **how):
    seen.extend([isinstance(block, Continued) for block in blocks] for blocks in prompts)
    return ['x'] * len(prompts)

  own = lambda continued: dataclasses.replace(item('a'), example=dataclasses.replace(item('a').example, continued=continued))
  run([own(())], tmp_path / 'plain', answer)
  run([own((1,))], tmp_path / 'on', answer)
  assert seen == [[False, False, False], [False, True, False]]
  with pytest.raises(ValueError, match='asked'):   # another question than the one that was answered
    run([own((1,))], tmp_path / 'plain', answer)


def test_another_run_is_refused(tmp_path):
  run([item('x')], tmp_path)
  differs = r"run.json: .*model was 'm' and is 'n'; new was not there and is 1.*another folder"
  with pytest.raises(ValueError, match=differs):
    run([item('x')], tmp_path, facts={'model': 'n', 'sinks': (1, 2), 'new': 1})
  with pytest.raises(ValueError, match="1 items, first 'x', were asked with another prompt"):
    run([item('x', words=2)], tmp_path)
  with pytest.raises(ValueError, match="first 'x', were asked"):
    run([item('x', max_new=5)], tmp_path)
  (tmp_path / 'run.json').unlink()
  with pytest.raises(ValueError, match='no run.json beside it'):
    run([item('x')], tmp_path)


@pytest.mark.parametrize('line, message', [
    ('{"id": 1', 'predictions.jsonl:1 is no valid JSON'), ('{"id": "y"}', ":1 lacks 'task', ")])
def test_a_broken_line_is_named(tmp_path, line, message):
  run([item('x')], tmp_path)
  path = tmp_path / 'predictions.jsonl'
  path.write_text(line + '\n' + path.read_text())
  with pytest.raises(ValueError, match=message):
    run([item('x')], tmp_path)


def test_items_that_do_not_fit_are_counted(tmp_path):
  items = [item('x', words=1), item('y', words=8)]
  summary = run(items, tmp_path, fits=lambda item, lengths: sum(lengths) + item.max_new <= 20)
  assert summary['n'] == 1 and summary['too_long'] == {'n': 1, 'ids': ['y']}
  with pytest.raises(ValueError, match='of 2 items 2 are too long'):
    run(items, tmp_path / 'none', fits=lambda *_: False)
  with pytest.raises(ValueError, match="two items have the id 'x'"):
    run([items[0], items[0]], tmp_path / 'twice')


def row(task, scores, part=None):
  return {'id': '', 'task': task, 'scores': scores, 'tokens': 10, 'blocks': 2} | ({'part': part} if part else {})


def test_means_and_averages():
  rows = ([row('a', {'s': x}) for x in (0, 1, 1, 1)] + [row('b', {'s': 0.5, 'other': 1})] + [row('c', {'s': 0.1})] * 5)
  averages = answers.Averages(macro={'macro': [['a'], ['b'], ['c']], 'groups': [['a', 'b'], ['c']], 'lacking': [['d']]},
                              pooled={'all': ['a', 'b', 'c'], 'some': ['a', 'c']})
  made = answers.summarize(rows, averages)
  mean = lambda name: made['averages'][name]['s']['mean']
  assert made['tasks']['a']['s']['mean'] == 0.75 and made['tasks']['b']['other']['mean'] == 1
  assert mean('macro') == pytest.approx((0.75 + 0.5 + 0.1) / 3)
  assert mean('groups') == pytest.approx(((0.75 + 0.5) / 2 + 0.1) / 2)
  assert mean('all') == pytest.approx((3 + 0.5 + 0.5) / 10) and mean('some') == pytest.approx(3.5 / 9)
  assert set(made['averages']) == {'macro', 'groups', 'all', 'some'} and list(made['averages']['macro']) == ['s']
  # An item alone, and items that all score the same, leave nothing to draw.
  for task in 'bc':
    assert made['tasks'][task]['s']['low'] == pytest.approx(made['tasks'][task]['s']['high'])
  # A task's interval does not depend on what else is there.
  assert answers.summarize(rows[:4])['tasks']['a'] == made['tasks']['a']
  assert made == answers.summarize(rows, averages)


def test_parts_of_a_task():
  rows = [row('t', {'s': x}, part) for x, part in ((0, 'short'), (1, 'long'), (0.5, 'long'))] + [row('u', {'s': 1})]
  made = answers.summarize(rows)
  assert {part: (own['n'], own['s']['mean']) for part, own in made['parts']['t'].items()} == {
      'long': (2, 0.75), 'short': (1, 0)}
  assert 'u' not in made['parts'] and made['averages']['macro']['s']['mean'] == pytest.approx(0.75)


def test_the_interval_is_that_of_a_mean():
  """Of 400 coins that fell on one side 100 times, the mean's standard error is sqrt(0.25 * 0.75 / 400) = 0.02165."""
  made = answers.summarize([row('coin', {'s': float(i < 100)}) for i in range(400)])['tasks']['coin']['s']
  assert made['mean'] == 0.25
  np.testing.assert_allclose([0.25 - made['low'], made['high'] - 0.25], 1.96 * 0.02165, rtol=0.1)
  assert made['low'] != made['high']
