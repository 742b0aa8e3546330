"""The list of runs and checkpoints: what it says of each, the check of their files, and what may be deleted."""

import json

import jax.numpy as jnp
import pytest

from blockattn import checkpoint, locks, metrics, options
from blockattn.train import distill
from configs import common
from tools import runs


@pytest.fixture
def folder(tmp_path):
  """Two runs: one with held-out figures that is stopped, one deeper down that is finished."""
  for name, changes, steps in (('few', {'blocks.sinks': 1}, (2, 4)), ('deep/many', {'blocks.sinks': 8}, (6,))):
    config = common.base('distill')
    config.update_from_flattened_dict({'model.source': 'teacher', 'steps': 6, 'optim.warmup': 1} | changes)
    workdir = tmp_path / name
    workdir.mkdir(parents=True)
    metrics.write_json(workdir / 'config.json', options.as_json(distill.read(config)))
    for step in steps:
      checkpoint.save_params(workdir / 'checkpoints', {'w': jnp.zeros(9)}, {}, step=step)
    with metrics.MetricWriter(workdir, tensorboard=False) as writer:
      for step in range(1, steps[-1] + 1):
        writer.write(step, {'loss': 1 / step})
        if name == 'few' and step % 2:
          writer.write(step, {'eval/block/kl': 10.0 + step})
      writer.write(steps[-1], {'eval/seconds': 1.0})   # the last line has no loss
  checkpoint.save_params(tmp_path / 'few/best', {'w': jnp.zeros(9)}, {'eval': {'figure': 'block/kl', 'value': 11.0}}, step=1)
  return tmp_path


def test_what_is_said_of_runs(folder, capsys):
  assert runs.main([str(folder), '--json', str(folder / 'runs.json')]) == 0
  printed = capsys.readouterr().out
  assert all(text in printed for text in ('4 of 6', 'blocks.sinks', 'few/best/1', 'deep/many/checkpoints/6'))
  assert 'optim.lr' not in printed and 'other quantities' in printed   # only what differs is a column
  said = json.loads((folder / 'runs.json').read_text())
  few, many = said[str(folder / 'few')], said[str(folder / 'deep/many')]
  assert (few['state'], few['figure'], few['best'], many['state'], many['best']) == (
      'stopped', 'block/kl', [1, 11.0], 'finished', None)
  assert [(c['folder'], c['step'], c['loss'], c['value']) for c in few['checkpoints']] == [
      ('checkpoints', 2, 0.5, 11.0), ('checkpoints', 4, 0.25, 13.0), ('best', 1, 1.0, 11.0)]
  assert few['loss'] == 0.25 and many['loss'] == 1 / 6
  assert all(c['bytes'] > 36 and c['age'] >= 0 for c in few['checkpoints'])
  with locks.held(folder / 'few/run.lock'):
    assert runs.describe(folder / 'few', 0.0)['state'] == 'at work'


def test_checkpoints_are_read_and_checked(folder, capsys):
  assert runs.main([str(folder), '--verify']) == 0
  assert '4 checkpoints read, 0 damaged' in capsys.readouterr().out
  file = next(path for path in (folder / 'few/checkpoints/2/params').rglob('d/*') if path.is_file())
  file.write_bytes(file.read_bytes()[:-1])
  assert runs.main([str(folder), '--verify']) == 1
  printed = capsys.readouterr().out
  assert 'DAMAGED: ' in printed and 'few/checkpoints/2' in printed and '1 damaged' in printed


def test_only_what_is_named_is_deleted(folder, capsys):
  gone = lambda name: runs.main([str(folder), '--delete', name])
  for name, message in (('few/checkpoints/3', 'no such step; there are [2, 4]'), ('deep', 'no run in'),
                        ('none', 'no run in'), ('few/checkpoints', 'no run in'), ('..', 'no run in')):
    assert gone(name) == 2 and message in capsys.readouterr().err
  with locks.held(folder / 'few/run.lock'):
    for name in ('few', 'few/checkpoints/2'):
      assert gone(name) == 2 and 'a run is at work there' in capsys.readouterr().err
  assert gone('few/checkpoints/2') == 0 and checkpoint.steps(folder / 'few/checkpoints') == [4]
  assert len(list((folder / 'few/checkpoints').iterdir())) == 1
  assert gone('few') == 0 and not (folder / 'few').exists() and (folder / 'deep/many').exists()


def test_a_folder_without_runs(tmp_path, capsys):
  assert runs.main([str(tmp_path)]) == 2 and 'no run in it' in capsys.readouterr().err
