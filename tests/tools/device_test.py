"""tools.device: budget, records, and a rehearsal of everything at toy sizes, with parts that fail in every way."""

import json
import pathlib
import shutil
import subprocess
import sys
import time
import types

import pytest
import run_cases

from blockattn.train import command, distill
from tools import device, device_parts

folder = run_cases.folder   # a teacher, examples and a config file of both

ROOT = pathlib.Path(__file__).resolve().parents[2]
FAILING = {
    'raises': 'raise ValueError("no such luck")',
    'hangs': 'import signal, time; signal.signal(15, signal.SIG_IGN); print("waiting", flush=True); time.sleep(99)',
    'killed': 'import os; print("here", flush=True); os.kill(os.getpid(), 9)',
    'works': 'import json, sys; json.dump({"cases": {"a": {"ms": 1}}}, open(sys.argv[1], "w"))',
}


def command_of(name, path, seconds):
  return [sys.executable, '-c', FAILING[name], str(path)]


def test_parts_that_fail_in_every_way_do_not_stop_the_next(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(device, '_PATIENCE_S', 0.5)
  monkeypatch.setattr(device, 'SHARES', {'raises': 3, 'hangs': 2, 'killed': 3, 'works': 3})
  start = time.monotonic()
  found = device.run(list(FAILING), tmp_path, 11, command_of)
  assert time.monotonic() - start < 11
  assert {name: part['state'] for name, part in found.items()} == {
      'raises': 'failed', 'hangs': 'out of time', 'killed': 'killed by signal 9', 'works': 'done'}
  assert 'no such luck' in found['raises']['said'] and 'waiting' in found['hangs']['said']
  assert device.summary(found) == ('measured: works (1); left: raises (failed), hangs (out of time), killed (killed by '
                                   'signal 9)')
  assert json.loads((tmp_path / 'works.json').read_text()) == found['works']
  assert 'raises: failed, 0 of 0 cases measured' in capsys.readouterr().out

  monkeypatch.setitem(FAILING, 'works', 'raise AssertionError("run twice")')   # what is done is left alone
  monkeypatch.setitem(FAILING, 'raises', 'pass')
  again = device.run(['raises', 'works'], tmp_path, 10, command_of)
  assert {name: part['state'] for name, part in again.items()} == {'raises': 'done', 'works': 'done'}


def test_a_part_passes_on_what_it_does_not_use():
  assert device.deadlines(['card', 'tests'], 260) == pytest.approx([60, 260])
  ends = device.deadlines(list(device.FIRST_CALL), 560)
  assert ends == sorted(ends) and ends[-1] == 560
  assert sum(device.SHARES[name] for name in device.FIRST_CALL) == 560


def test_a_record_measures_what_is_missing_and_what_failed(tmp_path):
  calls = []

  def call(value, fails=False):
    calls.append(value)
    if fails:
      raise RuntimeError('not today')
    return {'value': value}

  record = device_parts.Record(tmp_path / 'x.json', 'x')
  record.measure('a', lambda: call(1))
  assert record.measure('b', lambda: call(2, fails=True)) is None
  found = json.loads((tmp_path / 'x.json').read_text())
  assert found['cases']['a'] == {'value': 1} and 'RuntimeError: not today' in found['cases']['b']['error']
  assert device.failures(found) == ['b']

  record = device_parts.Record(tmp_path / 'x.json', 'x')
  assert record.measure('a', lambda: call(3)) == {'value': 1}
  assert record.measure('b', lambda: call(4)) == {'value': 4} and calls == [1, 2, 4]
  assert device.failures(json.loads((tmp_path / 'x.json').read_text())) == []


@pytest.mark.parametrize('arguments, says', [
    (['x', '--parts', 'cards'], "no part 'cards'; choose from card, tests"),
    (['x', '--budget', '3'], 'give from 15 seconds'),
    (['x', '--model', 'a.gguf'], '--model and --data go together')])
def test_wrong_arguments_are_refused(arguments, says, capsys):
  with pytest.raises(SystemExit) as ended:
    device.main(arguments)
  assert ended.value.code == 2 and says in ' '.join(capsys.readouterr().err.split())


def rehearse(parts, folder, *more):
  """What these parts write at toy sizes, by name."""
  done = subprocess.run([sys.executable, '-m', 'tools.device', str(folder), '--toy', '--budget', '1200', '--parts',
                         ','.join(parts), *map(str, more)], cwd=ROOT, capture_output=True, text=True,
                        env=run_cases.environment(folder) | {'TMPDIR': str(folder)})
  found = {name: device.read(folder / f'{name}.json') for name in parts}
  assert done.returncode == 0, done.stdout + json.dumps(found, indent=1)[-6000:]
  assert done.stdout.splitlines()[-1].startswith(f'measured: {parts[0]} (')
  return {name: part['cases'] for name, part in found.items()}


@pytest.mark.slow
def test_the_first_call_is_rehearsed(tmp_path):
  found = rehearse(device.FIRST_CALL, tmp_path)
  kernels = found['kernels']
  ours = kernels['T=256 block=64 last=32 forward+backward ours']
  assert ours['ms'] > 0 and ours['tflops'] > 0 and len(ours['samples']) == 5
  assert all('ms' in row or 'skipped' in row or 'tflops' in row for row in kernels.values())
  first = next(case for name, case in found['ttft'].items() if 'T=256' in name)
  assert set(first['seconds']) == {'full', 'all', 'half', 'none'}
  assert set(first['parts']['all']) >= {'choose', 'find', 'read'}
  step = found['step']['toy T=256 float32 parameters, distillation']
  assert step['bytes']['temp'] > 0 and step['flops'] > 0


@pytest.mark.slow
def test_the_second_call_is_rehearsed(folder, tmp_path):
  shutil.copy(folder / 'train.jsonl', folder / 'test.jsonl')
  trained = rehearse(('train',), tmp_path, '--model', folder / 'teacher', '--data', folder)['train']
  assert trained['training']['steps'] >= 1 and trained['after']['student_block']['kl'] > 0
  assert (tmp_path / trained['packed']['file']).stat().st_size == trained['packed']['bytes'] > 0


def test_without_a_model_the_embedded_teacher_is_trained(tmp_path):
  plan = device_parts._plan(types.SimpleNamespace(model=None, toy=False), tmp_path, 'xla')
  options = distill.read(command.read_config(plan.trainer)[0])
  assert options.batch == 64 and options.model.source == plan.model and plan.evaluation[:2] == ['--data', 'pages']
