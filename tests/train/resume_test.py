"""Runs that are killed and started again, as processes; and the loop alone, with a step that computes nothing."""

import json
import os
import signal

import hf_cases
import jax
import numpy as np
import pytest
import run_cases
import train_cases
from run_cases import MODEL, STEPS, Numbers, get_config, interrupt, losses, newest, overwritten, run_loop, saved_steps, start

from blockattn import checkpoint
from blockattn.train import distill, finetune, loop, workdir as workdir_lib
from configs import common

folder = run_cases.folder   # a teacher, examples and a config file of both


@pytest.fixture(scope='module')
def straight(folder):
  """The workdir of a run that nothing disturbed."""
  result = start(folder, folder / 'straight')
  assert result.returncode == 0, result.stderr
  assert result.stdout.startswith('platform: cpu, 1 devices\nattention: xla (auto on cpu)\n')
  assert 'absl' not in result.stderr and 'checkpoint' not in result.stderr, result.stderr
  return folder / 'straight'


@pytest.mark.slow
def test_a_run_that_is_killed_and_terminated_ends_as_if_nothing_had_happened(folder, straight):
  workdir = folder / 'stopped'
  result = interrupt(folder, workdir, 'save:18', signal.SIGKILL)
  assert result.returncode == -signal.SIGKILL, result.stderr
  assert newest(workdir) in (12, 18)   # 18 if the write was faster than the signal
  assert losses(workdir)[0][-1] >= 17   # some of these lines will be written again

  result = interrupt(folder, workdir, 20, signal.SIGTERM)
  assert result.returncode == loop.EXIT_PREEMPTED, result.stderr
  assert 'SIGTERM: saved step 21 in' in result.stdout and 'start the same command again' in result.stdout
  assert newest(workdir) == 21

  result = start(folder, workdir)
  assert result.returncode == 0, result.stderr
  assert f'going on from step 21 of {STEPS}, saved in {workdir}' in result.stdout
  steps, values = losses(workdir)
  assert steps == list(range(1, STEPS + 1)) == losses(straight)[0]
  np.testing.assert_allclose(values, losses(straight)[1], rtol=1e-6)
  assert sorted(path.name for path in (workdir / 'checkpoints').iterdir()) == ['21', '24']   # no half-written step
  ends = [checkpoint_params(path) for path in (workdir, straight)]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *ends)


def checkpoint_params(workdir):
  like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, 'float32', sharding=train_cases.placement().replicated()),
                      hf_cases.random_params(MODEL, 'float32') | {'sinks': np.zeros((2, MODEL.width))})
  return checkpoint.load_params(workdir / 'checkpoints', like)


def test_facts_of_a_run_are_kept(straight):
  assert json.loads((straight / 'config.json').read_text())['distill']['drop_mode'] == 'isolate'
  facts = json.loads((straight / 'run.json').read_text())
  assert facts['jax'] == jax.__version__ and len(facts['devices']) == 1 and any('--workdir' in a for a in facts['command'])
  assert facts['platform'] == 'cpu' and facts['attention'] == {'impl': 'xla', 'why': 'auto on cpu'}
  meta = checkpoint.load_meta(straight / 'checkpoints')
  assert meta['step'] == STEPS and meta['kind'] == 'distill' and meta['model']['learned_sinks'] == 2
  assert meta['blocks']['sink_ids'] == [304, 305]


def test_a_workdir_of_another_config_is_refused(folder, straight):
  config = get_config(folder)
  config.batch = 8
  config.optim.lr = 1e-4
  before = (straight / 'config.json').read_text()
  with pytest.raises(ValueError, match='straight holds a run with another config: batch was 4 and is 8; optim.lr was '
                                       '.* and is 0.0001. Use a new --workdir, or the old values'):
    distill.run(distill.read(config), straight)
  assert (straight / 'config.json').read_text() == before and newest(straight) == STEPS


@pytest.mark.usefixtures('standard_promotion')   # optax
def test_a_run_does_not_go_on_with_another_teacher(folder, straight, monkeypatch):
  config = get_config(folder)
  config.update_from_flattened_dict({'mesh.data': 2, 'mesh.fsdp': 2, 'mesh.tensor': 2})
  with overwritten(folder):
    with pytest.raises(ValueError, match=f'step {STEPS} in {straight}/checkpoints was made from other weights than lie in '
                                         f'{folder}/teacher now .fingerprint .{{12}}, read as float32; now .{{12}}, read as '
                                         'float32.: put the old ones back, or begin again with a new --workdir'):
      distill.run(distill.read(config), straight)
    saved = checkpoint.Checkpoints.meta   # as before there were fingerprints
    monkeypatch.setattr(checkpoint.Checkpoints, 'meta', lambda *args: saved(*args) | {'source_weights': None})
    distill.run(distill.read(config), straight)
  monkeypatch.undo()
  distill.run(distill.read(config), straight)   # on other devices the same weights are the same


@pytest.mark.slow
def test_a_run_that_goes_wrong_stops_with_one_line(folder):
  """A teacher with one broken embedding, which loading it would have found: all is well until the token is read."""
  workdir = folder / 'broken'
  blind = ('from blockattn import tree\nfrom blockattn.train import command, distill\ntree.not_finite = lambda tree: []\n'
           "command.main(distill.Options, distill.run)")
  result = start(folder, workdir, '-c', blind,
                 overrides=[f'--config.model.source={folder}/broken_teacher', '--config.save_every=1', '--config.seed=2'])
  assert result.returncode == 2, result.stderr
  last = losses(workdir)[0][-1]
  assert last > 1
  assert f'error: step {last + 1}: loss = nan, grad_norm = nan. The last good checkpoint is kept' in result.stderr
  assert 'Traceback' not in result.stderr and newest(workdir) == last


def test_a_mistyped_override_is_one_line(folder):
  result = start(folder, folder / 'mistyped', overrides=['--config.optim.lrr=1'])
  assert result.returncode == 2 and not (folder / 'mistyped').exists()
  assert result.stderr.strip() == "error: --config.optim.lrr: no such key; did you mean 'optim.lr'?"


# The loop alone.


def test_lines_hold_means(tmp_path):
  state = run_loop(tmp_path, log_every=4)
  assert losses(tmp_path) == ([4, 8, 10], [1.5, 5.5, 8.5])
  assert float(state.params['w']) == int(state.step) == 10 and saved_steps(tmp_path) == [8, 10]


def test_a_finished_run_started_again_says_so_and_does_nothing(tmp_path, capsys):
  run_loop(tmp_path)
  text = (tmp_path / 'metrics.jsonl').read_text()
  unread = Numbers(before=lambda n: pytest.fail('a batch was read'))
  capsys.readouterr()
  assert float(run_loop(tmp_path, unread).params['w']) == 10 and (tmp_path / 'metrics.jsonl').read_text() == text
  said = capsys.readouterr().out
  assert (f'finished already: step 10 of 10 is saved in {tmp_path}/checkpoints. To train longer, give a larger '
          '--config.steps and say where its schedule ended') in said
  assert float(run_loop(tmp_path, steps=12).params['w']) == 12 and losses(tmp_path)[0] == list(range(1, 13))


@pytest.mark.parametrize('name, value', [('loss', np.nan), ('grad_norm', np.inf)])
@pytest.mark.parametrize('at', [5, 8, 10])
def test_what_is_not_finite_is_never_saved(tmp_path, name, value, at):
  """Wherever it happens: between two checkpoints, at one, in the last step."""
  report = lambda n: {'loss': 1.0, 'grad_norm': 1.0} | ({name: value} if n + 1 == at else {})
  with pytest.raises(loop.NotFinite, match=f'step {at}: {name} = {value}. The last good checkpoint is kept'):
    run_loop(tmp_path, report=report)
  assert saved_steps(tmp_path)[-1] == (at - 1) // 4 * 4 and losses(tmp_path)[0][-1] == at - 1
  assert int(run_loop(tmp_path).step) == 10   # once the cause is gone


def test_sigterm_saves_at_once_and_leaves_the_handler_as_it_was(tmp_path):
  before = signal.getsignal(signal.SIGTERM)
  with pytest.raises(loop.Preempted) as stopped:
    run_loop(tmp_path, Numbers(lambda n: os.kill(os.getpid(), signal.SIGTERM) if n == 5 else None))
  assert stopped.value.code == 75 and saved_steps(tmp_path) == [4, 6]
  assert signal.getsignal(signal.SIGTERM) is before
  assert float(run_loop(tmp_path).params['w']) == 10 and losses(tmp_path)[0] == list(range(1, 11))


@pytest.fixture
def ctrl_c_raises():
  """As in a shell's foreground; the tests may have been started in its background."""
  old = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, old)


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path, ctrl_c_raises, capsys):
  press = lambda n: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)] if n == 5 else None   # a launcher repeats it
  with pytest.raises(loop.Preempted) as stopped:
    run_loop(tmp_path, Numbers(press))
  said = capsys.readouterr()
  assert stopped.value.code == 130 and saved_steps(tmp_path) == [4, 6]
  assert 'Ctrl-C: saving after the step under way; again to end at once' in said.err
  assert f'Ctrl-C: saved step 6 in {tmp_path}/checkpoints; start the same command again to go on' in said.out
  assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
  assert float(run_loop(tmp_path).params['w']) == 10 and 'going on from step 6 of 10' in capsys.readouterr().out


def test_a_second_ctrl_c_ends_at_once(tmp_path, ctrl_c_raises, monkeypatch):
  monkeypatch.setattr(loop._Signals, 'ONE_PRESS_S', -1.0)
  monkeypatch.setattr(os, '_exit', lambda code: (_ for _ in ()).throw(SystemExit(code)))
  with pytest.raises(SystemExit, match='130'):
    run_loop(tmp_path, Numbers(lambda n: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)] if n == 5 else None))
  assert saved_steps(tmp_path) == [4]


def test_sigterm_in_the_last_step_is_the_end(tmp_path):
  state = run_loop(tmp_path, Numbers(lambda n: os.kill(os.getpid(), signal.SIGTERM) if n == 9 else None))
  assert int(state.step) == 10 and saved_steps(tmp_path)[-1] == 10


def test_what_may_change_in_a_workdir(tmp_path):
  """Everything before the first checkpoint; after it what does not change what is learned."""
  config = common.base('finetune')
  workdir_lib.save_run_facts(tmp_path, finetune.read(config))
  config.batch = 32
  workdir_lib.save_run_facts(tmp_path, finetune.read(config))
  run_loop(tmp_path)
  for name in ('log_every', 'save_every', 'keep'):
    config[name] += 1
  config.update_from_flattened_dict({'mesh.fsdp': 4, 'rules': (('embed', None),), 'compute.remat': 'full'})
  workdir_lib.save_run_facts(tmp_path, finetune.read(config))
  assert json.loads((tmp_path / 'config.json').read_text())['keep'] == config.keep
  config.steps *= 2
  with pytest.raises(ValueError, match='steps was 1000 and is 2000. .* to go on with other steps, keep the schedule of '
                                       'those that were done: --config.optim.decay_steps=1000'):
    workdir_lib.save_run_facts(tmp_path, finetune.read(config))
  for steps in (2000, 3000):
    config.update_from_flattened_dict({'steps': steps, 'optim.decay_steps': 1000})
    workdir_lib.save_run_facts(tmp_path, finetune.read(config))
  config.update_from_flattened_dict({'steps': 1000, 'optim.decay_steps': 0})   # the same again
  workdir_lib.save_run_facts(tmp_path, finetune.read(config))
  config.update_from_flattened_dict({'finetune.mode': 'full', 'finetune.answer_weight': 2.0})
  with pytest.raises(ValueError, match='another config: finetune.answer_weight was 1.0 and is 2.0; finetune.mode was'):
    workdir_lib.save_run_facts(tmp_path, finetune.read(config))


def test_a_key_that_is_newer_than_a_run_counts_as_its_default(tmp_path):
  config = common.base('finetune')
  workdir_lib.save_run_facts(tmp_path, finetune.read(config))
  (tmp_path / 'checkpoints' / '1').mkdir(parents=True)
  said = json.loads((tmp_path / 'config.json').read_text())
  del said['blocks']['seam'], said['optim']['name'], said['eval']
  (tmp_path / 'config.json').write_text(json.dumps(said))
  config.blocks.seam = 4
  with pytest.raises(ValueError, match='another config: blocks.seam was 0 and is 4. Use'):
    workdir_lib.save_run_facts(tmp_path, finetune.read(config))
  config.blocks.seam = 0
  workdir_lib.save_run_facts(tmp_path, finetune.read(config))
