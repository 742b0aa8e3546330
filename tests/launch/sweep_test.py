"""Sweeps: the points of a config file, checked and named, run one after the other or handed to a cluster."""

import json
import os
import pathlib
import signal
import stat
import subprocess
import sys
import time

import jax.numpy as jnp
import pytest
import yaml

from blockattn import checkpoint, metrics, options
from blockattn.train import distill
from configs import common
from launch import sweep
from tools import compare

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG = '''
from configs import common

def get_config(arg=''):
  config = common.base('distill')
  config.model.source = 'teacher'
  config.steps = int(arg or 5)
  config.optim.warmup = 1
  return config

def sweep(add, arg=''):
  if arg == 'one':
    add()
  elif arg != 'none':
    add({'blocks.sinks': 0})
    add({'blocks.sinks': 8, 'data.chat': True}, seed=1)
'''


@pytest.fixture
def config_file(tmp_path):
  path = tmp_path / 'config.py'
  path.write_text(CONFIG)
  return path


def with_sweep(tmp_path, *lines):
  """A config file whose sweep has these lines."""
  path = tmp_path / 'other.py'
  path.write_text(CONFIG[:CONFIG.index('def sweep')] + 'def sweep(add):\n' + ''.join(f'  {line}\n' for line in lines))
  return path


def finish(workdir, config, step=None):
  """What a run leaves behind."""
  workdir.mkdir(parents=True)
  metrics.write_json(workdir / 'config.json', options.as_json(distill.read(config)))
  checkpoint.save_params(workdir / 'checkpoints', {'w': jnp.zeros(1)}, {}, step=config.steps if step is None else step)


def get_config(path, **changes):
  config = sweep.parse([f'--config={path}'])
  config.update_from_flattened_dict(changes)
  return config


def test_points_are_named_by_what_they_change(config_file, tmp_path):
  first, second = sweep.plan(f'{config_file}:7', tmp_path / 'runs', common=['--config.batch=8'])
  assert first == sweep.Point('blocks.sinks=0', tmp_path / 'runs' / 'blocks.sinks=0', {'blocks.sinks': 0}, (
      '-m', 'blockattn.train.distill', f'--config={config_file}:7', '--config.batch=8', '--config.blocks.sinks=0',
      f'--workdir={tmp_path}/runs/blocks.sinks=0'), steps=7, step=None)
  assert second.name == 'blocks.sinks=8,data.chat=true,seed=1' and not second.finished
  assert [p.name for p in sweep.plan(str(config_file), tmp_path, 'one')] == ['base']
  # The command gives the trainer exactly this config.
  config = sweep.parse(second.command[2:-1])
  assert (config.steps, config.batch, config.blocks.sinks, config.data.chat, config.seed) == (7, 8, 8, True, 1)


def test_a_point_may_change_names_with_dots(tmp_path):
  path = with_sweep(tmp_path, "add({'data.columns': {'answers.text': 'answers'}})")
  [point] = sweep.plan(str(path), tmp_path / 'runs')
  assert sweep.parse(point.command[2:-1]).data.columns.to_dict() == {'answers': {'text': 'answers'}}


def test_names_that_no_folder_takes():
  name = sweep.point_name({'model.source': 'org/name of it'})
  assert name.startswith('model.source=org_name_of_it-') and name != sweep.point_name({'model.source': 'org/name_of it'})
  long = sweep.point_name({'data.files': tuple(f'file{i}' for i in range(100))})
  assert len(long) == sweep.MAX_NAME + 9
  assert sweep.point_name({'compute.tiles': (64, 32), 'optim.lr': 1e-05}) == 'compute.tiles=64,32,optim.lr=1e-05'


@pytest.mark.parametrize('line, message', [
    ("add({'blocks.sink': 1})", "point blocks.sink=1: --config.blocks.sink: no such key; did you mean 'blocks.sinks'?"),
    ("add({'blocks.sinks': 'four'})", 'point blocks.sinks=four: .*four'),
    ("add({'optim.lr': 1}); add({'blocks.sinks': 1.5})", 'point blocks.sinks=1.5: '),
    ("add({'distill.drop_mode': 'lit'})",
     "point distill.drop_mode=lit: config.distill.drop_mode='lit'; choose one of lift"),
    ("add({'steps': 0})", 'point steps=0: config.steps=0'),
    ("add({'wandb': ''}); add({'data.pages.members': (True, 2)})", 'members: the command line cannot say this value'),
    ("add({'compute.tiles': (True, 64)})", 'compute.tiles: the command line cannot say this value'),
    ('add(seed=1); add({"seed": 1})', 'adds seed=1 twice'),
    ('pass', 'adds no point')])
def test_a_wrong_point_is_named_before_anything_starts(tmp_path, line, message, capsys):
  path = with_sweep(tmp_path, line)
  with pytest.raises(ValueError, match=message):
    sweep.plan(str(path), tmp_path / 'runs')
  assert sweep.main(['--config', str(path), '--workdir', str(tmp_path / 'runs'), '--run=local']) == 2
  assert capsys.readouterr().err.startswith('sweep: ') and not (tmp_path / 'runs').exists()


def test_a_wrong_command(config_file, tmp_path, capsys):
  where = ['--workdir', str(tmp_path / 'runs')]
  for args, message in ((['--config', str(config_file), '--points', 'none'], 'adds no point'),
                        (['--config', str(tmp_path / 'no.py')], 'no such config file'),
                        (['--config', str(config_file), '--config.seed=3'], 'the sweep sets seed itself'),
                        (['--config', 'configs/common.py'], 'has no sweep; write `def sweep'),
                        (['--config', str(with_sweep(tmp_path, 'add(seed=1)')), '--points', 'x'], 'takes no argument')):
    assert sweep.main([*args, *where]) == 2
    assert message in capsys.readouterr().err
  for option, value in (('--runs', 'local'), ('--processes', '0'), ('--devices', '0')):
    with pytest.raises(SystemExit, match='2'):
      sweep.main(['--config', str(config_file), *where, option, value])
  (tmp_path / 'runs').write_text('')
  assert sweep.main(['--config', str(config_file), *where, '--run=local']) == 2
  assert f'{tmp_path}/runs is a file; name a folder' in capsys.readouterr().err


def test_finished_points_are_skipped(config_file, tmp_path, capsys):
  runs = tmp_path / 'runs'
  finish(runs / 'blocks.sinks=0', get_config(config_file, **{'blocks.sinks': 0, 'keep': 9}))
  assert sweep.main(['--config', str(config_file), '--workdir', str(runs)]) == 0
  shown = capsys.readouterr()
  assert 'blocks.sinks=0: finished, 5 steps' in shown.err
  [command] = shown.out.splitlines()
  assert command.startswith('python -m blockattn.train.distill --config=') and 'sinks=8' in command

  finish(runs / 'blocks.sinks=8,data.chat=true,seed=1',
         get_config(config_file, **{'blocks.sinks': 8, 'data.chat': True, 'seed': 1}), step=3)
  first, second = sweep.plan(str(config_file), runs)
  assert (first.step, first.finished, second.step, second.finished) == (5, True, 3, False)
  with pytest.raises(ValueError, match='blocks.sinks=0: .* holds a run with another config: batch was .* and is 8'):
    sweep.plan(str(config_file), runs, common=['--config.batch=8'])


@pytest.mark.parametrize('file, points', [('configs/tiny.py', ('', 'dropout')),
                                          ('configs/distill.py', ('', 'sinks', 'dropout', 'weights', 'lr'))])
def test_our_own_sweeps(file, points, tmp_path):
  for arg in points:
    plan = sweep.plan(file, tmp_path, arg)
    assert len(plan) >= 3 and len({p.name for p in plan}) == len(plan)
  with pytest.raises(ValueError, match="sweep argument 'sink'"):
    sweep.plan(file, tmp_path, 'sink')


# Running.

def point(tmp_path, name, code):
  """A point whose command is a line of Python."""
  return sweep.Point(name, tmp_path / name, {}, ('-c', code), 5, None)


def test_a_point_that_fails_does_not_stop_the_others(tmp_path, capsys):
  points = [point(tmp_path, 'a', 'print("well")'), point(tmp_path, 'b', 'import sys; print("oh"); sys.exit("broken")'),
            point(tmp_path, 'c', 'import os; os.kill(os.getpid(), 9)'), point(tmp_path, 'd', 'print("too")')]
  assert sweep.run_local(points) == 1
  said = capsys.readouterr().err
  assert 'b: FAILED with code 1' in said and '    oh\n    broken' in said and 'c: FAILED with code 137' in said
  assert '4/4 d: from the start' in said and said.endswith('2 of 4 points failed: b c\n')
  assert [(p.workdir / 'log.txt').read_text() for p in points][::3] == ['well\n', 'too\n']
  assert sweep.run_local(points[:1]) == 0 and (tmp_path / 'a' / 'log.txt').read_text() == 'well\nwell\n'


def test_a_point_that_cannot_start_does_not_stop_the_others(tmp_path, commands, capsys):
  long, folder = point(tmp_path, 'long', 'x' * 200_000), point(tmp_path, 'file', 'print("x")')
  folder.workdir.write_text('')
  for run, word in ((sweep.run_local, 'start'), (sweep.run_slurm, 'submit')):
    assert run([long, folder, point(tmp_path, f'well {word}', 'print("too")')]) == 1
    said = capsys.readouterr().err
    assert f'long: FAILED to {word}: [Errno 7]' in said and f'file: FAILED to {word}: [Errno 17]' in said
    assert (tmp_path / f'well {word}').is_dir() and said.endswith('2 of 3 points failed: long file\n')


def test_a_signal_while_a_point_is_started_reaches_it(tmp_path, monkeypatch):
  popen = subprocess.Popen

  def interrupted(*args, **kwargs):
    process = popen(*args, **kwargs)
    os.kill(os.getpid(), signal.SIGTERM)   # when it runs, and before the sweep knows of it
    return process

  monkeypatch.setattr(sweep.subprocess, 'Popen', interrupted)
  assert sweep.run_local([point(tmp_path, name, 'import time; time.sleep(60)') for name in 'ab']) == 128 + signal.SIGTERM
  assert not (tmp_path / 'b').exists()


@pytest.mark.slow
@pytest.mark.parametrize('saved, code', [(75, 75), (3, 128 + signal.SIGTERM)])
def test_a_signal_reaches_the_point_and_stops_the_sweep(tmp_path, saved, code):
  body = ('import signal, sys, time\n'
          f'signal.signal(signal.SIGTERM, lambda *_: sys.exit({saved}))\n'
          'print("ready", flush=True)\ntime.sleep(60)')
  (tmp_path / 'sweep_it.py').write_text(
      'import pathlib, sys\nfrom launch import sweep\n'
      f'points = [sweep.Point(n, pathlib.Path({str(tmp_path)!r}) / n, {{}}, ("-c", {body!r}), 5, None) for n in "ab"]\n'
      'sys.exit(sweep.run_local(points))\n')
  process = subprocess.Popen([sys.executable, str(tmp_path / 'sweep_it.py')], env=os.environ | {'PYTHONPATH': str(ROOT)})
  log, deadline = tmp_path / 'a' / 'log.txt', time.monotonic() + 60
  while not (log.exists() and log.read_text()):
    assert time.monotonic() < deadline
    time.sleep(0.05)
  process.send_signal(signal.SIGTERM)
  assert process.wait(60) == code and not (tmp_path / 'b').exists()


@pytest.fixture
def commands(tmp_path, monkeypatch):
  """Stand-ins for the commands of a cluster, which write down how they were called; one job is queued already."""
  calls = tmp_path / 'calls'
  calls.touch()
  queued = tmp_path / 'runs' / 'queued'
  for name, body in (('squeue', f'echo "(null)"; echo "{queued}"'),
                     ('sbatch', 'case "$*" in *refused*) echo "no such partition" >&2; exit 1;; esac; echo 17'),
                     ('kubectl', f'cat >> "{calls}"; echo applied')):
    path = tmp_path / 'bin' / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f'#!/bin/sh\necho "{name} $*" >> "{calls}"\n{body}\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
  monkeypatch.setenv('PATH', f'{tmp_path / "bin"}:{os.environ["PATH"]}')
  return calls


def test_a_job_per_point_that_is_not_queued(commands, tmp_path, capsys, monkeypatch):
  monkeypatch.chdir(tmp_path)
  runs = pathlib.Path('runs')
  points = [sweep.Point(name, runs / name, {}, ('-m', 'x', f'--workdir={runs / name}'), 5, None)
            for name in ('queued', 'mine', 'refused')]
  assert sweep.run_slurm(points, ['--nodes=2']) == 1
  calls = commands.read_text().splitlines()
  where = tmp_path / 'runs' / 'mine'
  assert calls[1] == (f'sbatch --parsable --job-name=mine --comment={where} --output={where}/slurm-%j.log --nodes=2 '
                      f'{ROOT}/launch/slurm.sbatch -m x --workdir={where}')
  said = capsys.readouterr().err
  assert len(calls) == 3 and 'queued: queued already' in said and 'mine: job 17' in said
  assert 'refused: FAILED to submit: no such partition' in said and '1 of 3 points failed: refused' in said


def test_a_jobset_per_point(commands, config_file, tmp_path):
  assert sweep.main(['--config', str(config_file), '--workdir', '/runs/sinks', '--run', 'jobset']) == 0
  applied = commands.read_text()
  assert applied.count('kubectl apply -f -') == 2
  documents = [d for part in applied.split('kubectl apply -f -\n')[1:] for d in yaml.safe_load_all(part)]
  sets = [d for d in documents if d['kind'] == 'JobSet']
  assert [d['metadata']['name'][:-9] for d in sets] == ['blockattn-blocks-sinks-0', 'blockattn-blocks-sinks-8-data-c']
  args = sets[1]['spec']['replicatedJobs'][0]['template']['spec']['template']['spec']['containers'][0]['args']
  assert args == ['-m', 'blockattn.train.distill', f'--config={config_file}', '--config.blocks.sinks=8',
                  '--config.data.chat=true', '--config.seed=1', '--workdir=/runs/sinks/blocks.sinks=8,data.chat=true,seed=1',
                  '--multihost=auto']
  assert sum(d['kind'] == 'ServiceAccount' for d in documents) == 2   # applied again, it stays as it is


@pytest.mark.parametrize('text, message', [
    ('kind: Job\n', 'expected one JobSet'), ('- 1\n- 2\n', 'expected one JobSet'), ('plain', 'expected one JobSet'),
    ('kind: JobSet\nspec: []\n', 'expected one JobSet'), ('{', 'is no YAML'), (b'\xff', 'is no UTF-8 text')])
def test_a_file_that_holds_no_jobset(commands, config_file, tmp_path, capsys, text, message):
  (tmp_path / 'mine.yaml').write_bytes(text if isinstance(text, bytes) else text.encode())
  assert sweep.main(['--config', str(config_file), '--workdir', '/runs', '--run', 'jobset', '--jobset',
                     str(tmp_path / 'mine.yaml')]) == 2
  said = capsys.readouterr().err
  assert f'sweep: {tmp_path}/mine.yaml' in said and message in said and commands.read_text() == ''


# tools/compare.py --sweep

def leave(runs, name, losses, *, val=None, steps=4, saved=None, **changes):
  """The workdir of a point with a loss per step."""
  config = common.base('distill')
  config.model.source = 'teacher'
  config.update_from_flattened_dict({'steps': steps, 'optim.warmup': 1} | changes)
  finish(runs / name, config, saved if saved is not None else steps)
  with metrics.MetricWriter(runs / name, tensorboard=False) as writer:
    for step, loss in enumerate(losses, start=1):
      writer.write(step, {'loss': loss, 'gap': 1.0, 'seconds_left': 3.0})
      if val:
        writer.write(step, {'val_f1': val[step - 1], 'val_ce': 1 - val[step - 1], 'val_f1/code': 0.0, 'val_threshold': 9.0})


def test_the_points_of_a_sweep_side_by_side(tmp_path, capsys):
  leave(tmp_path, 'ten', [3.0, 2.0, 1.0, 0.5], val=[0.1, 0.7, 0.2, 0.3], **{'blocks.sinks': 10})
  leave(tmp_path, 'two', [3.0, float('nan')], saved=2, **{'blocks.sinks': 2})
  (tmp_path / 'notes').mkdir()
  made = compare.read_sweep(tmp_path)
  assert made['keys'] == ['blocks.sinks'] and made['ranked_by'] == 'val_f1'
  ten, two = made['points']   # what has not been measured yet comes last
  assert (ten['state'], ten['step'], ten['steps'], ten['final']['loss']) == ('finished', 4, 4, 0.5)
  assert ten['best'] == {'val_f1': {'value': 0.7, 'step': 2}, 'val_ce': {'value': pytest.approx(0.3), 'step': 2}}
  assert (two['state'], two['step'], two['best']) == ('unfinished', 2, {}) and 'seconds_left' not in two['final']

  html, out = tmp_path / 'sweep.html', tmp_path / 'sweep.json'
  assert compare.main(['--sweep', str(tmp_path), '--html', str(html), '--json', str(out)]) == 0
  printed = capsys.readouterr().out
  assert 'blocks.sinks' in printed and '2 of 4' in printed and '0.7 (2)' in printed and '2 points, 1 finished' in printed
  page = html.read_text()
  assert '<th>gap</th>' in page and 'loss by step' in page and '<td>ten</td>' in page and page.count('<h2>') == 2
  assert json.loads(out.read_text())['points'][0] == json.loads(json.dumps(ten))


def test_points_are_ranked_by_what_they_measured_on_the_same_held_out_documents(tmp_path, capsys):
  losses = {'a': 0.1, 'b': 0.3, 'c': 0.2}
  for i, (name, loss) in enumerate(losses.items()):
    leave(tmp_path, name, [3.0, loss], **{'blocks.sinks': (8, 0, 4)[i]})
  made = compare.read_sweep(tmp_path)
  assert made['ranked_by'] is None and [p['name'] for p in made['points']] == ['b', 'c', 'a']   # numbers, by size
  assert compare.main(['--sweep', str(tmp_path)]) == 0
  assert 'not ranked: nothing was measured on held-out documents' in capsys.readouterr().out.replace('\n', ' ')
  for name, kl in (('a', 0.5), ('b', 0.4), ('c', 0.6)):
    with metrics.MetricWriter(tmp_path / name, tensorboard=False) as writer:
      for step, value in ((1, kl), (2, kl + 1)):
        writer.write(step, {'eval/block/kl': value, 'eval/block/f1': kl, 'eval/block/kl_by_blocks/4': 9.0, 'eval/best': kl})
  made = compare.read_sweep(tmp_path)
  assert made['ranked_by'] == 'eval/block/kl' and [p['name'] for p in made['points']] == ['b', 'a', 'c']
  assert made['points'][0]['best'] == dict.fromkeys(('eval/block/kl', 'eval/block/f1'), {'value': 0.4, 'step': 1})
  assert compare.main(['--sweep', str(tmp_path)]) == 0
  assert 'ranked by the best eval/block/kl' in capsys.readouterr().out.replace('\n', ' ')
  for name in losses:   # what the runs kept by goes first
    config = json.loads((tmp_path / name / 'config.json').read_text())
    config['eval']['best'] = 'block/f1'
    metrics.write_json(tmp_path / name / 'config.json', config)
  assert [p['name'] for p in compare.read_sweep(tmp_path)['points']] == ['c', 'a', 'b']
  config['eval']['rows'] = 7
  metrics.write_json(tmp_path / 'c' / 'config.json', config)
  made = compare.read_sweep(tmp_path)
  assert made['ranked_by'] is None and 'other held-out documents (eval.rows)' in made['why']


def test_a_point_that_its_held_out_figures_ended_is_finished(config_file, tmp_path):
  workdir, measured = tmp_path / 'blocks.sinks=0', {'data.eval_files': ('pages:validation',), 'eval.patience': 2}
  finish(workdir, get_config(config_file, **{'blocks.sinks': 0} | measured), step=3)
  first = lambda patience=2, files='pages:validation': sweep.plan(str(config_file), tmp_path, common=[
      f'--config.eval.patience={patience}', f'--config.data.eval_files={files}'])[0]
  assert (first().step, first().finished) == (3, False)
  said = {'of': '', 'figure': 'block/kl', 'step': 2, 'value': 1.0, 'since': 2, 'stopped': True}
  checkpoint.save_params(workdir / 'checkpoints', {'w': jnp.zeros(1)}, {'eval': said}, step=4)
  assert (first().step, first().finished) == (4, True)
  assert not first(patience=3).finished and not first(files='pages').finished   # the trainer would go on


def test_what_is_no_sweep(tmp_path, capsys):
  assert compare.main(['--sweep', str(tmp_path)]) == 2
  assert 'no point of a sweep' in capsys.readouterr().err
  (tmp_path / 'x').mkdir()
  (tmp_path / 'x' / 'config.json').write_text('{"other": 1}')
  assert compare.main(['--sweep', str(tmp_path)]) == 2
  assert "x/config.json lacks 'steps'" in capsys.readouterr().err
  for args in (['--sweep', 'a', 'b'], ['a'], ['a', 'b', '--html', 'c']):
    with pytest.raises(SystemExit, match='2'):
      compare.main(args)
