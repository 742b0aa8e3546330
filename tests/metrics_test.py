import io
import json
import math
import sys

import numpy as np
import pytest

from blockattn import errors, metrics


class Clock:
  def __init__(self):
    self.seconds = 0.0

  def __call__(self):
    return self.seconds


class Terminal(io.StringIO):
  def isatty(self):
    return True


def lines(workdir):
  return (workdir / metrics.FILE_NAME).read_text().splitlines()


def write_steps(workdir, steps, **kwargs):
  with metrics.MetricWriter(workdir, tensorboard=False, **kwargs) as writer:
    for step in steps:
      writer.write(step, {'loss': step / 2})


def steps_of(workdir):
  return [entry['step'] for entry in metrics.read_metrics(workdir / metrics.FILE_NAME)]


def test_a_line_is_valid_json_even_when_the_loss_is_not_finite(tmp_path):
  with metrics.MetricWriter(tmp_path, tensorboard=False) as writer:
    writer.write(1, {'loss': math.nan, 'grad_norm': math.inf, 'low': -math.inf, 'lr': np.float32(0.5)})

  def reject(name):
    raise AssertionError(f'{name} is not JSON')

  entry = json.loads(lines(tmp_path)[0], parse_constant=reject)
  assert (entry['step'], entry['loss'], entry['grad_norm'], entry['low'], entry['lr']) == (1, None, None, None, 0.5)
  with (tmp_path / metrics.FILE_NAME).open('a') as file:   # as runs wrote it before
    file.write('{"step": 2, "loss": "NaN", "grad_norm": "Infinity", "low": "-Infinity"}\n')
  for back in metrics.read_metrics(tmp_path / metrics.FILE_NAME):
    assert all(math.isnan(back[name]) for name in ('loss', 'grad_norm', 'low'))
  metrics.write_json(tmp_path / 'a.json', {'kl': [math.nan, (1.5, math.inf)]})
  assert json.loads((tmp_path / 'a.json').read_text(), parse_constant=reject) == {'kl': [None, [1.5, None]]}


def test_resume_drops_later_steps_and_appends(tmp_path):
  write_steps(tmp_path, range(1, 8))
  write_steps(tmp_path, [5, 6], resume_step=4)
  assert steps_of(tmp_path) == [1, 2, 3, 4, 5, 6]
  write_steps(tmp_path, [7])
  assert steps_of(tmp_path) == [1, 2, 3, 4, 5, 6, 7]
  write_steps(tmp_path, [1], resume_step=0)
  assert steps_of(tmp_path) == [1]
  assert [p.name for p in tmp_path.iterdir()] == [metrics.FILE_NAME]


def test_a_half_written_last_line_is_dropped(tmp_path):
  write_steps(tmp_path, [1, 2])
  path = tmp_path / metrics.FILE_NAME
  with path.open('a') as f:
    f.write('{"step": 3, "lo')
  assert steps_of(tmp_path) == [1, 2]
  write_steps(tmp_path, [3])
  assert steps_of(tmp_path) == [1, 2, 3]


def test_a_broken_line_is_named(tmp_path):
  path = tmp_path / metrics.FILE_NAME
  for line, message in (('[1, 2]', 'is a list, not a JSON object'), ('loss 3', 'is no valid JSON'), ('{}', "lacks 'step'"),
                        ('{"step": "2"}', "'step' is '2', not a whole number"), ('[' * 100_000, 'is no valid JSON'),
                        ('{"step": 2, "loss": [3]}', "'loss' is a list, not a number"),
                        ('{"step": 2, "loss": 1' + '0' * 400 + '}', "'loss' is 10*, not a number")):
    path.write_text(f'{{"step": 1}}\n{line}\n')
    with pytest.raises(ValueError, match=rf'metrics\.jsonl:2:? {message}.*; repair or delete the line'):
      metrics.MetricWriter(tmp_path, resume_step=1)
  path.write_bytes(b'\xff\n')
  with pytest.raises(ValueError, match=r'metrics\.jsonl is no UTF-8 text'):
    metrics.read_metrics(path)


def test_the_speed_is_the_last_that_was_measured(tmp_path):
  path = tmp_path / metrics.FILE_NAME
  path.write_text('{"step": 1, "loss": 3}\n')
  with pytest.raises(ValueError, match=r'metrics\.jsonl: no steps_per_s.*more steps'):
    metrics.measured_speed(tmp_path)
  # A run that went on for one step has no speed in its last line.
  path.write_text('{"step": 1}\n{"step": 2, "steps_per_s": 4}\n{"step": 3, "steps_per_s": 2}\n{"step": 4}\n')
  assert metrics.measured_speed(tmp_path) == 2


def test_only_the_first_process_writes(tmp_path):
  with metrics.MetricWriter(tmp_path / 'run', process_index=1) as writer:
    writer.write(1, {'loss': 1.0})
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('scalars, error', [({'step': 1.0}, ValueError), ({'loss': 'high'}, TypeError),
                                            ({'loss': [1.0, 2.0]}, TypeError)])
def test_bad_scalars_are_refused_by_name(tmp_path, scalars, error):
  with metrics.MetricWriter(tmp_path, tensorboard=False) as writer:
    with pytest.raises(error, match=repr(next(iter(scalars)))):
      writer.write(1, scalars)
  assert lines(tmp_path) == []


def test_tensorboard_event_files_are_written(tmp_path):
  with metrics.MetricWriter(tmp_path, resume_step=0) as writer:
    writer.write(1, {'train/loss': 1.5})
  events = list((tmp_path / 'tensorboard').glob('events.out.tfevents*'))
  assert len(events) == 1 and b'train/loss' in events[0].read_bytes()


WANDB = """
import json
import pathlib

LOG = pathlib.Path(__file__).with_suffix('.log')


def _say(*entry):
  with LOG.open('a') as f:
    f.write(json.dumps(entry) + '\\n')


def init(**options):
  _say('init', options)
  return Run(options)


class Run:
  def __init__(self, options):
    starts = sum(json.loads(line)[0] == 'init' for line in LOG.read_text().splitlines())
    self.id, self.offline = options['id'], options['project'] == 'offline'
    self.dir = pathlib.Path(options['dir'], 'wandb', f'offline-run-{starts}-{self.id}', 'files')
    self.dir.mkdir(parents=True)

  def define_metric(self, *args, **kwargs):
    _say('define_metric', args, kwargs)

  def log(self, values):
    _say('log', values)

  def finish(self):
    _say('finish')
"""


@pytest.fixture
def wandb(tmp_path, monkeypatch):
  """A stand-in for W&B; called, it gives what it was told."""
  (tmp_path / 'wandb.py').write_text(WANDB)
  monkeypatch.syspath_prepend(tmp_path)
  monkeypatch.delitem(sys.modules, 'wandb', raising=False)
  yield lambda: [json.loads(line) for line in (tmp_path / 'wandb.log').read_text().splitlines()]
  sys.modules.pop('wandb', None)


def test_weights_and_biases_get_every_line_and_a_resumed_run_goes_on_in_the_same_one(tmp_path, wandb):
  workdir = tmp_path / 'my_run'
  workdir.mkdir()
  metrics.write_json(workdir / 'config.json', {'optim': {'lr': 1e-3}})
  for steps, resume in (((1, 2), 0), ((2,), 1)):
    write_steps(workdir, steps, resume_step=resume, wandb_project='blocks')
  write_steps(tmp_path / 'other', [1], process_index=1, wandb_project='blocks')   # process 0 alone writes
  said = wandb()
  assert [entry[0] for entry in said] == ['init', 'define_metric', 'log', 'log', 'finish', 'init', 'define_metric', 'log',
                                          'finish']
  first, again = (entry[1] for entry in said if entry[0] == 'init')
  assert first == again and first['project'] == 'blocks' and first['name'] == 'my_run' and first['resume'] == 'allow'
  assert first['config'] == {'optim': {'lr': 1e-3}}
  assert [entry[1] for entry in said if entry[0] == 'log'] == [
      {'loss': 0.5, 'step': 1}, {'loss': 1.0, 'step': 2}, {'loss': 1.0, 'step': 2}]


def test_a_run_that_is_sent_later_holds_no_step_twice(tmp_path, wandb):
  logged = lambda: [entry[1]['step'] for entry in wandb() if entry[0] == 'log']
  folders = lambda: sorted(path.name.split('-')[2] for path in (tmp_path / 'run' / 'wandb').iterdir())
  options = {'wandb_project': 'offline'}
  write_steps(tmp_path / 'run', (1, 2, 3), resume_step=0, **options)
  write_steps(tmp_path / 'run', (2,), resume_step=1, **options)
  assert logged() == [1, 2, 3, 1, 2] and folders() == ['2']   # the second folder has all that counts
  [folder] = (tmp_path / 'run' / 'wandb').iterdir()
  (folder / 'run.wandb.synced').touch()
  write_steps(tmp_path / 'run', (3,), resume_step=2, **options)
  assert logged()[5:] == [3] and folders() == ['2', '3']   # what has been sent is not sent again


def test_without_weights_and_biases_the_extra_is_named(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'wandb', None)
  with pytest.raises(ImportError, match=r'pip install "blockattn\[log\]"') as raised:
    metrics.MetricWriter(tmp_path, tensorboard=False, wandb_project='blocks')
  assert errors.line_of(raised.value) == str(raised.value)   # and no traceback


def test_clock_leaves_out_the_first_step_and_pauses():
  now = Clock()
  clock = metrics.StepClock(total_steps=14, window=2, now=now)
  now.seconds = 100.0   # compilation
  clock.tick(1, 10)
  assert clock.rates() == {}
  with clock.paused():
    now.seconds += 50.0
  for step in (2, 3, 4):
    now.seconds += 2.0
    clock.tick(step, 10 * step)
  assert clock.rates() == {'steps_per_s': 0.5, 'tokens_per_s': 70 / 4, 'seconds_left': 20.0}


def test_mfu_is_what_was_needed_over_what_the_devices_can_do():
  now = Clock()
  clock = metrics.StepClock(total_steps=9, peak_flops=1000.0, now=now)
  for step, flops in enumerate((5000.0, 600.0, 1000.0), start=1):   # the first one is not counted
    clock.tick(step, 10, flops)
    now.seconds += 2.0
  assert clock.rates()['mfu'] == (600 + 1000) / 4 / 1000
  for unknown in (metrics.StepClock(9, now=now), metrics.StepClock(9, peak_flops=1000.0, now=now)):
    unknown.tick(1, 10, 0.0)
    unknown.tick(2, 10, 600.0 if unknown._peak == 0 else 0.0)   # no peak, or no count
    assert 'mfu' not in unknown.rates()


def test_progress_is_plain_lines_without_a_terminal():
  now, stream = Clock(), io.StringIO()
  with metrics.ProgressLine(5, 'distill', every_s=10, stream=stream, now=now) as line:
    for step in range(1, 6):
      line.update(step, {'loss': 2.0, 'tokens_per_s': 31234.0, 'mfu': 0.4123, 'seconds_left': 92.0, 'lr': 1.0})
      now.seconds += 6
    line.say('saved [step 5]')
  assert stream.getvalue().splitlines() == [
      f'distill {step}/5  loss 2.0000  31.2k tokens/s  41.2% MFU  1m32s left' for step in (1, 3, 5)] + ['saved [step 5]']


def test_progress_on_a_terminal_and_on_other_processes():
  terminal, silent = Terminal(), io.StringIO()
  with metrics.ProgressLine(4, 'distill', stream=terminal) as line:
    line.update(2, {'loss': 1.25})
    line.say('saved [step 2]')
  assert 'distill' in terminal.getvalue() and '2/4' in terminal.getvalue() and 'saved [step 2]' in terminal.getvalue()
  with metrics.ProgressLine(4, stream=silent, enabled=False) as line:
    line.update(4, {})
    line.say('x')
  assert silent.getvalue() == ''


def test_numbers_for_the_eye():
  assert [metrics.short_count(x) for x in (950, 31234, 123456, 4.05e6, 1.2e9, 999.6)] == [
      '950', '31.2k', '123k', '4.05M', '1.20B', '1.0k']
  assert [metrics.short_time(x) for x in (8.2, 92, 11100, 187200, math.inf)] == ['8s', '1m32s', '3h05m', '2d04h', '?']
