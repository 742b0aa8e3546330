"""What happens to runs that last for days, done to real processes: they are killed, disks fill up, files break."""

import collections
import contextlib
import json
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
import types

import data_cases
import jax
import numpy as np
import pytest
import run_cases
import tiny_run

from blockattn import checkpoint, mesh
from blockattn.data import sources, stream
from blockattn.train import inputs

SCRIPT = str(pathlib.Path(tiny_run.__file__))
STEPS, SAVE_EVERY = tiny_run.STEPS, tiny_run.SAVE_EVERY


def environment(folder, blow='', devices=4):
  return run_cases.own_environment(folder, devices, BLOW=blow)


def command(workdir, *overrides):
  return [SCRIPT, f'--config={SCRIPT}', f'--workdir={workdir}', *overrides]


def alone(folder, workdir, blow='', *overrides, devices=4):
  """(exit code, output) of a run of one process, by default with all four devices."""
  result = subprocess.run([sys.executable, *command(workdir, *overrides)], env=environment(folder, blow, devices),
                          cwd=run_cases.ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=240)
  return result.returncode, result.stdout


def together(folder, workdir, count, blow=''):
  """The same of `count` processes with four devices in all, and the seconds that they took."""
  return run_cases.pair(folder, *[command(workdir)] * count, env=environment(folder, blow, 4 // count))


def newest(workdir):
  return checkpoint.newest_step(workdir / 'checkpoints')


def left_over(workdir):
  return [path.name for path in (workdir / 'checkpoints').iterdir() if not path.name.isdigit()]


def starts(workdir):
  """What each start of a run read: [{step: numbers of its rows, over all processes}], in order."""
  runs = {}
  for path in sorted((workdir / 'rows').iterdir(), key=lambda path: float(path.name.split('-')[0])):
    key = path.name.split('-', 2)[2]   # of two starts that a test tells apart, by their number of processes
    steps = runs.setdefault(key, {})
    for line in path.read_text().splitlines():
      step, rows = json.loads(line)
      steps.setdefault(step, set()).update(rows)
  return list(runs.values())


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Holds `straight`, the workdir of a run that nothing disturbed."""
  folder = tmp_path_factory.mktemp('hard')
  code, output = alone(folder, folder / 'straight')
  assert code == 0, output
  return folder


def assert_ends_alike(folder, workdir):
  steps, losses = run_cases.losses(workdir)
  assert steps == list(range(1, STEPS + 1)) and newest(workdir) == STEPS and not left_over(workdir)
  np.testing.assert_allclose(losses, run_cases.losses(folder / 'straight')[1], rtol=1e-5)


@pytest.mark.slow
def test_one_of_four_is_killed_and_two_go_on(folder):
  """No row is read twice or never, on half of the hosts, and the losses are those of the undisturbed run."""
  workdir = folder / 'killed'
  ends, seconds = together(folder, workdir, 4, f'kill:{SAVE_EVERY * 2 + 2}:1')
  assert [code for code, _ in ends] == [76, -signal.SIGKILL, 76, 76] and seconds < 90, ends
  for code, output in ends:
    assert code != 76 or 'Start the same command again to go on from the newest checkpoint (exit code 76)' in output
  saved = newest(workdir)
  assert saved in (SAVE_EVERY, 2 * SAVE_EVERY)   # the write of the second may have been under way
  ends, _ = together(folder, workdir, 2)
  assert [code for code, _ in ends] == [0, 0], ends
  assert re.search(rf'^restoring step {saved}: .*seconds by process: 0: [\d.]+, 1: [\d.]+$', ends[0][1], re.M), ends[0][1]
  assert f'tiny {STEPS}/{STEPS}' in ends[0][1] and 'tiny' not in ends[1][1].replace('tiny_run', '')
  assert_ends_alike(folder, workdir)

  before, after = starts(workdir)
  [undisturbed] = starts(folder / 'straight')
  assert min(after) == saved + 1 and max(after) == STEPS
  trained = {step: rows for step, rows in before.items() if step <= saved} | after
  assert trained == undisturbed and all(len(rows) == tiny_run.BATCH for rows in trained.values())
  epoch = [row for step in range(1, tiny_run.ROWS // tiny_run.BATCH + 1) for row in trained[step]]
  assert sorted(epoch) == list(range(tiny_run.ROWS))
  files = [path.name for path in (workdir / 'checkpoints' / str(STEPS)).glob('checksums-*')]
  assert sorted(files) == ['checksums-0-of-2.json', 'checksums-1-of-2.json']


@pytest.mark.slow
@pytest.mark.parametrize('blow, line', [
    ('nan:6', 'step 6: loss = nan. The last good checkpoint is kept'),
    ('unreadable:7', r'row 7 of the data, numbers.txt (7), cannot be read: OSError: /dev/null: stale file handle')])
def test_what_goes_wrong_ends_both_with_one_line(folder, blow, line):
  workdir = folder / blow.replace(':', '')
  ends, seconds = together(folder, workdir, 2, blow)
  assert [code for code, _ in ends] == [2, 2] and seconds < 90, ends
  assert all(line in output and 'Traceback' not in output for _, output in ends), ends
  assert newest(workdir) in (None, SAVE_EVERY) and not left_over(workdir)


@pytest.mark.slow
def test_two_in_one_workdir_a_full_disk_and_a_damaged_checkpoint(folder):
  """One run, which all of this befalls, ends as if nothing had happened."""
  workdir = folder / 'battered'
  first = subprocess.Popen([sys.executable, *command(workdir)], env=environment(folder, 'stop:6'), cwd=run_cases.ROOT,
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
  try:
    wait_for(workdir / 'stopped', first)
    facts = (workdir / 'run.json').read_text()
    code, output = alone(folder, workdir, '', '--config.log_every=1')
    assert code == 2 and 'Traceback' not in output, output
    assert f'error: {workdir}: another run is at work here (process {first.pid} on ' in output
    assert 'another --workdir' in output and (workdir / 'run.json').read_text() == facts
  finally:
    first.kill()   # it could not say goodbye, and still the next one may start
    first.communicate()

  code, output = alone(folder, workdir, f'limit:{SAVE_EVERY + 2}')
  assert code == 2 and 'Traceback' not in output, output
  assert re.search(rf'error: step {2 * SAVE_EVERY} could not be saved in {workdir}/checkpoints: File too large \(.* of .* '
                   rf'are free there\)\. Step {SAVE_EVERY} stands: start the same command again', output), output
  assert newest(workdir) == SAVE_EVERY   # what a thread wrote after the removal goes with the next start

  code, output = alone(folder, workdir, f'late:{2 * SAVE_EVERY + 3}')
  assert code == -signal.SIGKILL, output
  file = max((workdir / 'checkpoints' / str(2 * SAVE_EVERY) / 'params').rglob('d/*'), key=lambda file: file.stat().st_size)
  flip(file)
  code, output = alone(folder, workdir)
  assert code == 2 and 'Traceback' not in output, output
  [advice] = re.findall(rf'error: {file} has other content than was written\. Step {SAVE_EVERY} stands too: to go on from '
                        r'there, move this one away \((mv \S+ \S+)\) and start the same command again', output)
  subprocess.run(advice.split(), check=True)
  code, output = alone(folder, workdir)
  assert code == 0, output
  shutil.rmtree(advice.split()[2])
  assert_ends_alike(folder, workdir)


def wait_for(path, process):
  deadline = time.monotonic() + 120
  while not path.exists():
    assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
    time.sleep(0.05)


def flip(file):
  data = bytearray(file.read_bytes())
  data[len(data) // 2] ^= 1
  file.write_bytes(data)


@pytest.mark.slow
def test_a_disk_that_is_full(folder, tmp_path):
  """A real one, where we may make it."""
  disk = tmp_path / 'disk'
  disk.mkdir()
  if shutil.which('mount') is None or subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=4m', 'none', disk],
                                                     capture_output=True).returncode:
    pytest.skip('needs the right to mount a disk')
  try:
    workdir = disk / 'run'
    code, output = alone(folder, workdir, f'fill:{SAVE_EVERY + 2}')
    assert code == 2
    said = f'error: step {2 * SAVE_EVERY} could not be saved in {workdir}/checkpoints: No space left'
    line, = (line for line in output.splitlines() if said in line)   # threads of the write may speak while it is said
    assert re.search(r' on device \(.* of 4.0 MiB are free there', line), output
    assert newest(workdir) == SAVE_EVERY
    (workdir / 'filler').unlink()
    code, output = alone(folder, workdir)
    assert code == 0, output
    assert_ends_alike(folder, workdir)
  finally:
    subprocess.run(['umount', '-l', disk], check=True)


@pytest.mark.slow
def test_thousands_of_steps_leave_nothing_behind(folder):
  """Neither memory nor compiled programs: 5000 steps of a run that has warmed up in 1000, in which it saved once."""
  code, output = alone(folder, folder / 'long', 'watch', '--config.steps=6000', '--config.save_every=500',
                       '--config.log_every=10', '--config.mesh.data=1', '--config.mesh.tensor=1', devices=1)
  assert code == 0, output
  seen = json.loads(output.splitlines()[-1])
  assert seen['compiled']['6000'] == seen['compiled']['1000'], seen
  grown = seen['rss']['6000'] - seen['rss']['1000']
  assert grown < 8 << 20, f'{grown / 2**20:.1f} MiB more after 5000 steps: {seen["rss"]}'


def test_a_run_does_not_go_on_with_other_data(tmp_path):
  """Refused by the name of the file, before anything is read or written; put back, it goes on."""
  file, tokenizer = tmp_path / 'train.jsonl', data_cases.tiny_tokenizer()

  def go_on(steps):
    source = sources.FileRows(str(file), tokenizer, sources.FileOptions(512, max_blocks=384))
    with contextlib.closing(stream.batches(source, batch=2, seed=0)) as batches:
      return run_cases.run_loop(tmp_path, batches, lambda batch: {'loss': 1.0, 'grad_norm': 1.0}, steps=steps)

  data_cases.write_lines(file, map(data_cases.passages_line, range(6)))
  go_on(10)
  before = file.read_bytes()
  file.write_bytes(before.replace(b'passage 0 about 3', b'passage 0 about 4'))
  with pytest.raises(stream.DataChanged, match=f'{file} has changed'):
    go_on(12)
  assert run_cases.losses(tmp_path)[0] == list(range(1, 11)) and run_cases.saved_steps(tmp_path) == [8, 10]
  file.write_bytes(before)
  assert int(go_on(12).step) == 12


Device = collections.namedtuple('Device', 'id process_index')


class FakePlace:
  """A placement of eight devices, of which so many belong to each process."""

  def __init__(self, per_process, rule=('data', 'fsdp'), **shape):
    self._per_process, self._rule, self._shape = per_process, rule, shape

  def sharding(self, axes):
    held = mesh.Placement(mesh.make_mesh(self._shape), (('batch', self._rule),)).sharding(axes).devices_indices_map
    return types.SimpleNamespace(devices_indices_map=lambda shape: {
        Device(device.id, device.id // self._per_process): part for device, part in held(shape).items()})


@pytest.mark.parametrize('place, rows', [
    (FakePlace(4, data=8), [[0, 1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15]]),
    (FakePlace(8, data=2, tensor=4), [list(range(16))]),
    (FakePlace(2, data=2, tensor=4), [list(range(8))] * 2 + [list(range(8, 16))] * 2),
    (FakePlace(2, tensor=2, context=4), [list(range(16))] * 4),
    (FakePlace(2, ('fsdp', 'data'), data=4, fsdp=2), [[2 * i, 2 * i + 1, 2 * i + 8, 2 * i + 9] for i in range(4)])])
def test_a_process_reads_the_rows_of_its_devices(place, rows, monkeypatch):
  for index, own in enumerate(rows):
    monkeypatch.setattr(jax, 'process_index', lambda index=index: index)
    assert inputs.own_rows(place, 16) == own


def test_processes_that_share_some_of_their_rows_are_refused():
  with pytest.raises(ValueError, match='must divide tensor . context, or be a multiple of it'):
    inputs.own_rows(FakePlace(3, data=4, tensor=2), 16)
