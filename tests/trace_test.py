"""What a run reports while it goes: traces of some steps, MFU, and metrics that no device waits for."""

import re
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import train_cases
from run_cases import ROOT, Numbers, run_loop, traced

from blockattn import blocks, metrics, optim, trace
from blockattn.models import flops, transformer
from blockattn.train import distill, finetune, job, loop
from configs import common, tiny

pytestmark = pytest.mark.usefixtures('standard_promotion')   # optax


@pytest.mark.parametrize('text, steps', [('', None), ('10:15', (10, 15)), ('1:2', (1, 2)), ('20:21', (20, 21))])
def test_a_range_of_steps(text, steps):
  assert trace.parse_steps(text, last=20) == steps


@pytest.mark.parametrize('text', ['10', '10-15', '5:5', '6:5', '0:3', '18:22', '-1:3', 'a:b', '1:2:3'])
def test_a_bad_range_is_refused(text):
  with pytest.raises(ValueError, match=re.escape(f'profile={text!r}')):
    trace.parse_steps(text, last=20)


def test_a_bad_range_ends_the_trainer_before_anything_is_loaded(tmp_path):
  command = [sys.executable, '-m', 'blockattn.train.distill', '--config=configs/distill.py', f'--workdir={tmp_path}/run',
             '--profile=400:600']
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
  assert done.returncode == 2 and "error: profile='400:600': the run has the steps 1 to 500" in done.stderr
  assert not (tmp_path / 'run').exists()


@pytest.mark.slow
def test_a_trace_has_the_steps_asked_for_and_the_names_of_the_parts(tmp_path):
  cfg, place, optimizer = train_cases.MODEL, train_cases.placement(), optim.make_optimizer(train_cases.OPTIM)
  options = finetune.FinetuneOptions('block', text_weight=1.0, prompt_weight=0.0, answer_weight=1.0, chunk=16, accumulate=1)
  step = finetune.make_step(cfg, transformer.Compute(impl='reference', placement=place),
                            blocks.BlockOptions((), 'sequential', train_cases.MAX_BLOCKS), options, optimizer,
                            optim.learning_rate(train_cases.OPTIM))
  batches = Numbers()
  config = loop.LoopConfig(steps=5, log_every=1, save_every=5, keep=1, tokens_per_step=1, profile=(3, 5))
  loop.run(lambda state, n: step(state, None, place.put_batch(train_cases.batch(int(n)))),
           loop.init_state(train_cases.params(place=place), optimizer), batches, config, tmp_path,
           put_batch=lambda n: n, meta={})
  names, planes = traced(tmp_path / 'profile')
  assert sorted(name for name in set(names) if name.startswith('train')) == ['train']
  assert names.count('train') == 2
  for part in (b'embed', b'layer', b'attention', b'mlp', b'norm', b'head'):
    assert re.search(rb'[/"(]' + part + rb'[/")]', planes), part


def test_a_trace_that_the_run_ends_in(tmp_path):
  run_loop(tmp_path, steps=4, profile=(3, 5))
  assert traced(tmp_path / 'profile')[0].count('train') == 2


def test_no_trace_behind_its_steps_and_none_without(tmp_path):
  run_loop(tmp_path, steps=4)
  run_loop(tmp_path, steps=8, profile=(2, 4))   # goes on at step 5
  assert not (tmp_path / 'profile').exists()


def test_metrics_are_fetched_when_the_next_step_has_begun(tmp_path):
  """The device never waits for the host: but for the last step and checkpoints, a step's numbers are asked for after the
  next one was dispatched."""
  said = []

  class Value:
    def __init__(self, n):
      self.n = n

    def __array__(self, *args, **kwargs):
      said.append(f'fetch {self.n}')
      return np.float32(self.n)

  def report(n):
    said.append(f'begin {int(n) + 1}')
    return {'loss': Value(int(n) + 1), 'grad_norm': 1.0}

  run_loop(tmp_path, report=report, steps=4, save_every=4)
  order = list(dict.fromkeys(said))
  assert order == ['begin 1', 'begin 2', 'fetch 1', 'begin 3', 'fetch 2', 'begin 4', 'fetch 3', 'fetch 4']


def test_what_looks_at_the_state_takes_no_time_from_training(tmp_path, capsys):
  """Its numbers follow those of the step that it looked at."""
  class Slow(loop.Watch):
    def due(self, step):
      return step in (4, 8)

    def __call__(self, step, state):
      time.sleep(0.5)
      return 'looked', {'seen': int(state.step)}

  run_loop(tmp_path, watches=[Slow()])
  lines = metrics.read_metrics(tmp_path / 'metrics.jsonl')
  assert [(line['step'], line['seen']) for line in lines if 'seen' in line] == [(4, 4), (8, 8)]
  assert [line for line in capsys.readouterr().out.splitlines() if 'looked' in line] == ['step 4: looked', 'step 8: looked']
  assert [line['step'] for line in lines] == [1, 2, 3, 4, 4, 5, 6, 7, 8, 8, 9, 10]
  assert lines[-1]['time'] - lines[0]['time'] > 1 > 9 / lines[-1]['steps_per_s']


def test_mfu_stands_beside_tokens_per_second(tmp_path):
  """The operations of the batch's layers and of the tokens that had a loss, over the devices' peak."""
  report = lambda n: {'loss': 1.0, 'grad_norm': 1.0, 'loss_tokens': 5.0}
  run_loop(tmp_path, report=report, flops=lambda batch: flops.Flops(70.0, 20.0, 2.0), peak_flops=1e4, tokens_per_step=8)
  first, *lines = metrics.read_metrics(tmp_path / 'metrics.jsonl')
  assert 'mfu' not in first and len(lines) == 9
  for line in lines:
    assert line['mfu'] == pytest.approx((70 + 20 + 5 * 2) * line['steps_per_s'] / 1e4)
    assert line['mfu'] == pytest.approx(line['tokens_per_s'] / 8 * 100 / 1e4)


def test_means_leave_out_steps_that_had_nothing_to_measure(tmp_path):
  report = lambda n: {'loss': 1.0, 'grad_norm': 1.0, 'kl_pos_0': np.nan if n % 2 else float(n), 'never': np.nan}
  run_loop(tmp_path, report=report, steps=4, log_every=4)
  line, = metrics.read_metrics(tmp_path / 'metrics.jsonl')
  assert line['kl_pos_0'] == 1.0 and np.isnan(line['never'])


def one_batch(trainer, lengths=(5, 3, 4), **changes):
  """The operations of a step, as a trainer counts them."""
  config = common.base(trainer.__name__.rpartition('.')[2])
  config.update_from_flattened_dict({'model.source': 'x'} | changes)
  return trainer.step_flops(trainer.read(config), flops.one_document(lengths), train_cases.MODEL)


def test_operations_of_the_trainers():
  once = lambda seen: flops.forward(train_cases.MODEL, seen)
  cut = flops.one_document([5, 3, 4])
  full, plain, student = (flops.as_one_block(cut), flops.in_blocks(cut), flops.in_blocks(cut, sinks=4))
  sinks, undropped = {'blocks.sinks': 4}, {'blocks.sinks': 4, 'distill.drop_rate': 0.0}
  assert one_batch(distill, **undropped) == flops.trained(once(student)) + once(full)
  of_teacher = undropped | {'distill.weights.source': 'teacher'}
  assert one_batch(distill, **of_teacher) == flops.trained(once(student)) + once(full) + once(plain)
  assert one_batch(distill, **of_teacher, **{'teacher.logits': 'x'}) == flops.trained(once(student))   # both are stored
  assert one_batch(distill, **sinks, **{'distill.drop_rate': 0.5}).attention > one_batch(distill, **undropped).attention
  modes = {mode: one_batch(finetune, **sinks, **{'finetune.mode': mode}) for mode in finetune.MODES}
  assert modes['full'] == flops.trained(once(full)) and modes['block'] == flops.trained(once(student))
  assert modes['both'].layers == modes['full'].layers + modes['block'].layers
  assert modes['both'].attention == modes['full'].attention + modes['block'].attention
  assert modes['both'].head == modes['full'].head   # of each loss token; the metric counts those of both passes


def test_what_a_config_says_about_reports(monkeypatch):
  config, place = tiny.get_config(), train_cases.placement()
  build = lambda options: distill.build(options, place, train_cases.MODEL, platform='cpu')
  options = distill.read(config)
  settings = job.loop_config(options, build(options))
  assert settings.flops is None and settings.wandb is None and settings.profile is None   # a CPU has no known peak
  config.update({'peak_tflops': 2.0, 'profile': '2:4'})
  options = distill.read(config)
  settings = job.loop_config(options, build(options))
  assert settings.peak_flops == 2e12 * jax.device_count() and settings.profile == (2, 4)
  batch = train_cases.batch(0, rows=config.batch // 2)   # of one process of two
  half = build(options).flops(flops.blocks_of(batch['layout'], batch['continued']))
  assert settings.flops(batch) == half.times(2.0) and half.times(2.0).total(3) == 2 * (half.layers + half.attention) + (
      3 * half.head)
  monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
  config.wandb = 'blocks'
  with pytest.raises(ValueError, match=r"config.wandb='blocks' needs .*blockattn\[log\]"):
    distill.read(config)


def test_time_of_compiling_counts_nothing_twice():
  """What is traced within another function's trace is part of its time; other events are none."""
  with trace.compiling() as seconds:
    time.sleep(0.02)
    for event, duration in (('/jax/core/compile/inner', 0.005), ('/jax/core/compile/outer', 0.015), ('/jax/other', 9.0)):
      jax.monitoring.record_event_duration_secs(event, duration)
    assert seconds() == pytest.approx(0.015, abs=5e-3)
    before = seconds()
    jax.jit(lambda x: x * 3 + 1)(np.float32(2))
    assert seconds() > before
  after = seconds()
  jax.monitoring.record_event_duration_secs('/jax/core/compile/outer', 1.0)
  assert seconds() == after
