"""Runs of several processes: how they find each other, agree, and end together; on loopback, with the real trainer."""

import pathlib
import re
import signal
import textwrap

import jax
import numpy as np
import pytest
import run_cases

from blockattn import metrics, multihost

ROOT = pathlib.Path(__file__).resolve().parents[1]
folder = run_cases.folder   # a teacher, examples and a config file of both
def trainer(folder, workdir, *overrides, when=None, sign=None):
  """The arguments of a distillation, one that sends itself a signal at a batch if `when` says so."""
  interrupted = str(ROOT / 'tests/support/interrupted.py')
  command = ['-m', 'blockattn.train.distill'] if when is None else [interrupted, str(when), sign.name]
  return [*command, f'--config={folder}/config.py', f'--workdir={workdir}', *overrides]


@pytest.mark.slow
def test_two_processes_that_are_stopped_and_one_that_goes_on_train_as_one_does(folder):
  measured = '--config.peak_tflops=0.001', '--config.profile=4:6'
  single = run_cases.start(folder, folder / 'single', overrides=measured[:1])
  assert single.returncode == 0, single.stderr
  workdir = folder / 'pair'
  ends, _ = run_cases.pair(folder, trainer(folder, workdir, *measured),
                 trainer(folder, workdir, *measured, when=9, sign=signal.SIGTERM))
  assert [code for code, _ in ends] == [75, 75], ends
  [saved] = re.findall(r'SIGTERM: saved step (\d+) in', ends[0][1])
  assert 9 < int(saved) < run_cases.STEPS == run_cases.newest(folder / 'single')
  assert run_cases.newest(workdir) == int(saved) and 'SIGTERM: saved' not in ends[1][1]

  # What a step needs is counted from the rows of one process, and its time over all: two devices have twice the peak.
  needed = lambda workdir, peak: [line['mfu'] / line['steps_per_s'] * peak
                                  for line in metrics.read_metrics(workdir / 'metrics.jsonl') if 'mfu' in line]
  np.testing.assert_allclose(needed(workdir, 2e9)[-1], needed(folder / 'single', 1e9)[-1], rtol=0.5)
  assert run_cases.traced(workdir / 'profile')[0].count('train') == 2   # of one process

  rest = run_cases.start(folder, workdir)
  assert rest.returncode == 0, rest.stderr
  steps, values = run_cases.losses(workdir)
  assert steps == list(range(1, run_cases.STEPS + 1))
  alone = run_cases.losses(folder / 'single')[1]
  np.testing.assert_allclose(values[:4], alone[:4], rtol=2e-5)
  np.testing.assert_allclose(values, alone, rtol=1e-3)   # sums in another order, and what Adam makes of that in 24 steps


@pytest.mark.slow
def test_ctrl_c_in_one_saves_the_same_step_in_both(tmp_path):
  """In the middle of a run, between steps that wait for each other; JAX alone would wait for 305 s."""
  script = str(ROOT / 'tests/support/tiny_run.py')
  many = '--config.steps=20000', '--config.save_every=20000'   # JAX chooses a step that none has passed
  ends, seconds = run_cases.pair(tmp_path, *[[script, f'--config={script}', f'--workdir={tmp_path}/run', *many]] * 2,
                       env=run_cases.own_environment(tmp_path, devices=2, BLOW='interrupt:9:1'))
  assert [code for code, _ in ends] == [75, 130], ends
  assert seconds < 120, f'{seconds:.0f} s'
  assert 'Ctrl-C: saving after the step under way' in ends[1][1], ends
  assert all('Traceback' not in output for _, output in ends), ends
  [saved] = re.findall(r'SIGTERM: saved step (\d+) in', ends[0][1])
  assert 9 <= int(saved) == run_cases.newest(tmp_path / 'run')


@pytest.mark.slow
def test_what_differs_is_named_before_anything_is_loaded(folder):
  workdir = folder / 'differing'
  ends, _ = run_cases.pair(folder, trainer(folder, workdir),
                           trainer(folder, workdir, '--config.optim.lr=0.5', '--config.seed=3'))
  for code, output in ends:
    assert code == 2 and 'Traceback' not in output, output
    assert 'the 2 processes of this run differ in config.optim.lr: 0.003 in process 0 on ' in output
    assert '0.5 in process 1 on ' in output and 'config.seed: 0 in process 0' in output
  assert not workdir.exists()


# Small programs of two processes.

def run_script(tmp_path, body, overrides=((), ())):
  """Runs the body in two processes that have joined; `me` is the number of each."""
  path = tmp_path / 'script.py'
  path.write_text('import sys, time\nfrom blockattn import multihost\nimport jax\n'
                  'from jax.experimental import multihost_utils\n'
                  "with multihost.joined(sys.argv[-1].removeprefix('--multihost=')):\n  me = jax.process_index()\n"
                  + textwrap.indent(textwrap.dedent(body), '  '))
  return run_cases.pair(tmp_path, *([str(path), *own] for own in overrides))


@pytest.mark.slow
def test_the_slow_one_is_named_while_the_others_wait(tmp_path):
  ends, _ = run_script(tmp_path, '''
      multihost_utils.sync_global_devices('start')
      assert multihost.from_first('word', f'of {me}') == 'of 0'

      def read_slowly():
        if me == 1:
          time.sleep(7)

      with multihost.timed('reading', patience_s=1.0):
        read_slowly()
        multihost_utils.sync_global_devices('read')
      ''')
  assert [code for code, _ in ends] == [0, 0], ends
  assert re.search(r'reading: \d s, 1 of 2 processes wait for 1 on \S+ \(script.py:read_slowly\)', ends[0][1]), ends[0][1]
  summary = re.search(r'reading: ([\d.]+) s in the middle, ([\d.]+) s at most \(process 1 on \S+, a straggler\)', ends[0][1])
  assert float(summary[1]) < 5 < 7 <= float(summary[2]) + 0.3
  assert 'reading' not in ends[1][1]


@pytest.mark.slow
@pytest.mark.parametrize('index', [0, 1])
def test_whoever_fails_first_is_heard_by_both(tmp_path, index):
  ends, seconds = run_script(tmp_path, f'''
      if me == {index}:
        raise KeyError('what process {index} lacks')
      time.sleep(200)
      ''')
  assert [code for code, _ in ends] == [1, 1] and seconds < 60, ends
  assert all(f"KeyError: 'what process {index} lacks'" in output for _, output in ends)


# Without other processes.

@pytest.mark.parametrize('text, environ, place', [
    ('10.0.0.2:1234,4,3', {}, multihost.Place('10.0.0.2:1234', 4, 3)),
    ('[::1]:1234,1,0', {multihost.COUNT: '7'}, multihost.Place('[::1]:1234', 1, 0)),
    ('auto', {}, None),
    ('auto', {multihost.COORDINATOR: 'a:1', multihost.COUNT: '2', multihost.INDEX: '1'}, multihost.Place('a:1', 2, 1)),
    ('auto', {'SKYPILOT_NODE_IPS': '10.0.0.1\n10.0.0.2', 'SKYPILOT_NUM_NODES': '2', 'SKYPILOT_NODE_RANK': '1'},
     multihost.Place('10.0.0.1:8476', 2, 1))])
def test_where_a_process_stands(text, environ, place):
  assert multihost.read_place(text, environ) == place


@pytest.mark.parametrize('text, environ, message', [
    ('yes', {}, "--multihost=yes: give 'auto', or ADDRESS:PORT,N,I"),
    ('host,4,3', {}, 'the address of process 0 is HOST:PORT, as 10.0.0.2:8476'),
    ('host:99999,1,0', {}, 'with a port from 1 to 65535'), ('host:0,1,0', {}, 'with a port from 1 to 65535'),
    ('host:80,4,4', {}, 'processes have the numbers 0 to 3'),
    ('host:80,4,-1', {}, 'processes have the numbers 0 to 3'),
    ('host:80,four,1', {}, 'are integers'),
    ('auto', {multihost.COUNT: '2'}, 'only some are set'),
    ('auto', {multihost.COORDINATOR: 'a:1', multihost.COUNT: '2', multihost.INDEX: '2'}, 'BLOCKATTN_PROCESS=2: processes')])
def test_a_place_that_is_none(text, environ, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    multihost.read_place(text, environ)


@pytest.mark.parametrize('host, inside', [('127.0.0.1', True), ('localhost', True), ('[::1]', True), ('10.0.0.1', False),
                                          ('node-0', False), ('127.example.org', False)])
def test_processes_of_one_machine_are_reached_from_it_alone(monkeypatch, host, inside):
  asked = {}
  monkeypatch.setattr(multihost.jax.distributed, 'initialize', lambda **options: asked.update(options))
  multihost._start(multihost.Place(f'{host}:80', 2, 0))
  assert asked.get('coordinator_bind_address') == (f'{host}:80' if inside else None)


@pytest.mark.parametrize('name', [multihost.COUNT, 'SLURM_STEP_NUM_TASKS', 'OMPI_COMM_WORLD_SIZE', 'SKYPILOT_NUM_NODES'])
def test_one_of_several_does_not_train_alone(name):
  with pytest.raises(ValueError, match=f'3 processes were started .{name}.*add --multihost=auto'):
    with multihost.joined(None, {name: '3'}):
      pytest.fail('it went on')
  with multihost.joined(None, {name: '1'}):
    multihost.check_equal('nothing', {'a': 1})   # nor do the others do anything in a run of one process
    with multihost.timed('nothing'), multihost.failing_ends_all():
      assert not multihost.is_started()


def test_auto_without_a_cluster(folder):
  join = "from blockattn import multihost\nwith multihost.joined('auto'): pass"
  said = run_cases.start(folder, folder / 'nowhere', '-c', join).stderr
  assert 'UserError: --multihost=auto: JAX finds no cluster here' in said and 'BLOCKATTN_COORDINATOR' in said


def test_differences_are_told_with_both_values():
  said = [{'host': h, 'facts': facts} for h, facts in (
      ('a', {'x': 1, 'y': [1], 'z': None}), ('b', {'x': 1, 'y': [1], 'z': None}), ('c', {'x': 2, 'y': [1], 'w': 0}))]
  assert multihost._differences(said[:2]) == ''
  assert multihost._differences(said) == ("w: 'absent' in process 0 on a, 0 in process 2 on c; x: 1 in process 0 on a, 2 in "
                                          "process 2 on c; z: None in process 0 on a, 'absent' in process 2 on c")
  many = [{'host': 'h', 'facts': dict.fromkeys('abcdefgh', i)} for i in range(2)]
  assert multihost._differences(many).endswith('e: 0 in process 0 on h, 1 in process 1 on h; and 3 more')


@pytest.mark.parametrize('error, code', [
    (ValueError('x'), 1), (SystemExit('words'), 1), (SystemExit(75), 75), (KeyboardInterrupt(), 130),
    (jax.errors.JaxRuntimeError('UNAVAILABLE: connection reset by peer'), 76),
    (jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: out of memory'), 1)])
def test_exit_codes(error, code):
  ended, text = multihost._ending(error)
  assert ended == code and ('Start the same command again' in text) == (code == 76)


def test_what_all_agree_on_passes(monkeypatch):
  monkeypatch.setattr(multihost, 'is_started', lambda: True)
  monkeypatch.setattr(multihost, '_end_all', lambda code, text: (_ for _ in ()).throw(RuntimeError(f'ended with {code}')))
  with pytest.raises(SystemExit, match='75'), multihost.failing_ends_all(agreed=(SystemExit,)):
    raise SystemExit(75)
  for mine, code in ((SystemExit('error: no file'), 1), (SystemExit(1), 1), (FileNotFoundError('x'), 2)):
    with pytest.raises(RuntimeError, match=f'ended with {code}'), multihost.failing_ends_all(agreed=(SystemExit,)):
      raise mine
