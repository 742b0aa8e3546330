"""The study at toy size: the embedded teacher in the place of a real model, documents of a few made-up sentences."""

import json
import pathlib
import shutil
import subprocess
import sys

import data_cases
import pytest
import run_cases

from blockattn.evals import gap
from configs import study as rows_of, tiny
from launch import sweep
from tools import excerpts, study

_SIZES = ['--docs', '4', '--tokens', '96', '--steps', '2', '--texts', '9', '--questions', '2', '--seeds', '2']


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  folder = tmp_path_factory.mktemp('data')
  (folder / 'seg').mkdir()
  for split in ('train', 'test'):
    for category in rows_of.KNOWN + rows_of.NEW:
      blocks = [f'Part {i} of {category}. It is about {word} and {word}. ' + f'A {word} is no {category}. ' * 2 + '\n\n'
                for i, word in enumerate(('rivers', 'stones', 'boats', 'houses', 'wheels', 'horses'))]
      data_cases.write_lines(folder / 'seg' / f'{split}_{category}.jsonl.gz', [
          {'id': f'{category} {i}', 'category': category, 'source': 'here', 'license': 'CC0', 'blocks': blocks[i:]}
          for i in range(2)])
  (folder / 'qa').mkdir()
  data_cases.write_lines(folder / 'qa' / f'test_{study.PASSAGES[0]}.jsonl.gz', [
      {'passages': [{'title': 'Boats', 'text': f'There are {i} boats.'}], 'question': 'How many boats?', 'answers': [str(i)]}
      for i in range(1)])   # fewer than are asked for
  return folder


@pytest.fixture(scope='module')
def workdir(data, tmp_path_factory):
  folder = tmp_path_factory.mktemp('study') / 'run'
  run(data, folder, '--only', 'distilled')
  return folder


def run(data, folder, *more):
  """A process of its own: tests have more devices than four rows can be divided over."""
  done = subprocess.run([sys.executable, '-m', 'tools.study', *arguments(data, folder, *more)], capture_output=True,
                        cwd=pathlib.Path(study.__file__).parents[1], text=True, env=run_cases.environment(folder.parent))
  assert done.returncode == 0, done.stdout + done.stderr


def arguments(data, folder, *more):
  return ['--model', str(tiny.TEACHER), '--data', str(data), '--workdir', str(folder), *_SIZES, *more]


def test_the_rows_that_were_asked_for_are_in_the_table(workdir):
  lines = (workdir / 'table.md').read_text().splitlines()
  names = [line.split('|')[1].strip() for line in lines[2:lines.index('')]]
  assert names == [gap.TEACHER, *rows_of.UNTRAINED['untrained'], 'distilled']
  found = json.loads((workdir / 'results.json').read_text())
  assert found['rows'][gap.TEACHER]['known']['kl']['mean'] == pytest.approx(0, abs=1e-6)
  own = found['rows']['distilled']
  assert own['seeds'] == 2 and own['steps'] == 2 and set(own['full']) >= {'kl', 'ce_rise'}
  assert 'kl_less' in found['rows']['bare']['new'] and 'kl_less' not in own['new']
  assert [found['rows'][name]['recomputed'] for name in ('bare', gap.TEACHER, 'distilled')] == [0, 1, 0]
  assert 'distilled' in (workdir / 'tradeoff.svg').read_text()
  assert {'weights', 'seconds', 'run', 'keys'} <= set(found['trainings'][0])
  asked = [line.split('|')[1:4] for line in lines[lines.index('') + 3:]]   # the teacher alone: it can answer none
  assert asked == [[f' {kind} ', f' {1 if kind in study.PASSAGES else 2} ', f' {gap.TEACHER} '] for kind in sorted(
      [study.PASSAGES[0], *(shape.name for shape in study.QUESTIONS)])]
  held_out = excerpts.read(workdir / 'held_out.jsonl')
  assert [one.part for one in held_out] == [study.KNOWN] * 2 + [study.NEW] * 2
  assert not {one.category for one in held_out if one.part == study.NEW} & set(rows_of.KNOWN)


def test_a_second_start_does_nothing_again(workdir, data, monkeypatch, capsys):
  table = (workdir / 'table.md').read_text()
  monkeypatch.setattr(gap, '_measure_batch', None)
  monkeypatch.setattr(study.job, 'module_of', None)
  assert study.main(arguments(data, workdir, '--only', 'distilled')) == 0
  assert (workdir / 'table.md').read_text() == table and table in capsys.readouterr().out
  assert study.main([*arguments(data, workdir), '--docs', '6']) == 2
  assert '--docs was 4 there and is 6' in ' '.join(capsys.readouterr().err.split())


def test_a_row_that_was_trained_otherwise_is_not_taken(workdir, data, monkeypatch, capsys):
  """Nor is a folder refused that was moved; of its students only figures are needed."""
  moved = shutil.copytree(workdir, workdir.parent / 'moved', ignore=shutil.ignore_patterns('checkpoints'))
  monkeypatch.setattr(study.job, 'module_of', None)
  assert study.main(arguments(data, moved, '--only', 'distilled')) == 0
  monkeypatch.setitem(rows_of.POINTS['parts'], 'distilled', {'optim.lr': 0.5})
  (moved / 'students/parts/seed=0').rename(moved / 'students/parts/optim.lr=0.5,seed=0')
  assert study.main(arguments(data, moved, '--only', 'distilled')) == 2
  said = ' '.join(capsys.readouterr().err.split())
  assert 'students/parts/optim.lr=0.5,seed=0 holds a run with another config: optim.lr was 0.0003 and is 0.5. Use' in said


@pytest.mark.slow
def test_fine_tuning_for_the_same_time(workdir, data):
  run(data, workdir, '--only', 'finetuned_time')
  ours, theirs = (json.loads((workdir / f'students/{name}/seed=0/result.json').read_text())
                  for name in ('parts', 'baseline'))   # neither of which was asked for
  steps = max(2, round(2 * ours['seconds'] / theirs['seconds']))
  assert json.loads((workdir / f'students/baseline_time/steps={steps},seed=1/result.json').read_text())['steps'] == steps


def test_the_sweep_has_the_same_points(workdir, capsys):
  config = 'configs/study.py:ctx=108'
  said = [f'--config.model.source={tiny.TEACHER}', f'--config.data.files={workdir}/train.jsonl', '--config.steps=2',
          '--config.optim.warmup=1']
  points = sweep.plan(config, workdir / 'students' / 'parts', 'parts', said)
  assert [point.finished for point in points] == 2 * [True, *5 * [False]] + 6 * [False]


def test_ways_to_cut_at_the_same_number_of_blocks(workdir, data, capsys):
  pytest.importorskip('langchain_text_splitters')
  pytest.importorskip('semchunk')
  student = workdir / 'students/parts/seed=0'
  more = '--segmentations', '--granularities', 'gold,24', '--student', str(student)
  assert study.main(arguments(data, workdir, *more)) == 0
  found = json.loads((workdir / 'segmentations_seed=0.json').read_text())['granularities']
  assert list(found['gold']) == ['segmenter', 'gold', 'fixed length', 'random', 'recursive', 'semchunk', 'separators']
  assert list(found['24']) == [way for way in found['gold'] if way != 'gold']
  assert found['gold']['gold']['tokens'] == pytest.approx(found['gold']['random']['tokens'], rel=0.1)
  assert found['24']['segmenter']['kl_more']['mean'] == 0
  assert (workdir / 'segmentations_seed=0.svg').is_file()
  assert study.main(arguments(data, workdir, '--segmentations', '--granularities', '24', '--student', 'overlap_16')) == 0
  ahead = json.loads((workdir / 'segmentations_overlap_16.json').read_text())['granularities']['24']
  assert [own['tokens'] for own in ahead.values()] == [own['tokens'] for own in found['24'].values()]
  assert all(ahead[way]['kl']['mean'] != found['24'][way]['kl']['mean'] for way in ahead)


def test_the_plan_trains_nothing(data, tmp_path, capsys):
  assert study.main(arguments(data, tmp_path / 'run', '--plan', '--only', 'parts')) == 0
  assert '| parts | 12 | 0.0 |' in capsys.readouterr().out
  assert [path.name for path in (tmp_path / 'run').iterdir()] == ['study.json']


def test_a_training_of_one_step_is_refused(data, tmp_path, capsys):
  assert study.main([*arguments(data, tmp_path), '--steps', '1']) == 2
  assert '--steps 1: 2 at least' in capsys.readouterr().err and not [*tmp_path.iterdir()]


def test_unknown_rows_are_named(data, tmp_path, capsys):
  assert study.main(arguments(data, tmp_path, '--only', 'distiled')) == 2
  said = ' '.join(capsys.readouterr().err.split())
  assert '--only distiled: choose from groups untrained, untrained_forms, overlaps, rivals, parts, rates, baseline' in said


def test_every_row_is_a_training(data, tmp_path):
  options = study.parsed(arguments(data, tmp_path))
  made = study.Study(options)
  found = [made.options_of(keys, 1, baseline=group.startswith('baseline'))
           for group, rows in rows_of.POINTS.items() if not group.startswith('baseline') for keys in rows.values()]
  assert len({repr(one) for one in found}) == len(found)


def test_seeds_are_pooled():
  one, two = ({'by_distance': rows} for rows in ([[1, 2, 3.0, 4.0]], [[1, 1, 1.0, 1.0], [4, 5, 6.0, 7.0]]))
  assert study.pooled([one, two])['by_distance'] == [[1, 3, 4.0, 5.0], [4, 5, 6.0, 7.0]]
