"""Checkpoints: what is on disk, what is read back and where to, and what a broken folder says."""

import dataclasses
import errno
import pathlib
import shutil
import subprocess
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import train_cases

from blockattn import checkpoint, optim, tree
from blockattn.models import spec, transformer
from blockattn.train import job, loop

META = {'model': {'width': 16}, 'kind': 'distill', 'blocks': {'sink_ids': [7], 'positions': 'local'}}


@pytest.fixture(scope='module')
def state():
  with jax.numpy_dtype_promotion('standard'):
    return loop.init_state(train_cases.params(place=train_cases.placement(8, fsdp=4, tensor=2)),
                           optim.make_optimizer(train_cases.OPTIM))


@pytest.fixture(scope='module')
def written(state, tmp_path_factory):
  """A folder to which steps 1 to 4 were saved, of which three are kept. Not to be changed."""
  folder = tmp_path_factory.mktemp('run') / 'checkpoints'
  with checkpoint.Checkpoints(folder, keep=3) as saved:
    for step in (1, 2, 3, 4):
      params = jax.tree.map(lambda p, s=step: p * s, state.params)
      saved.save(step, params, state.opt_state, {'next_step': step}, META | {'step': step})
  return folder


@pytest.fixture
def folder(written, tmp_path):
  """A copy to break."""
  return shutil.copytree(written, tmp_path / 'checkpoints')


def abstract(dtype='float32', cfg=train_cases.MODEL, **shape):
  return spec.abstract(transformer.spec(cfg), dtype, train_cases.placement(8, **shape or {'fsdp': 8}))


def assert_equal(got, expected):
  jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.usefixtures('standard_promotion')
def test_the_state_of_muon_is_placed_and_comes_back(tmp_path):
  config = dataclasses.replace(train_cases.OPTIM, name='muon')
  place, optimizer = train_cases.placement(8, fsdp=4, tensor=2), optim.make_optimizer(config)
  state = loop.init_state(train_cases.params(place=place), optimizer)
  moments = lambda end: [x for name, x in tree.named_leaves(state.opt_state) if name.endswith(end)]
  [q], embed = moments('u/layers/q'), moments('u/embed')   # mu of the one, mu and nu of the other
  assert len(embed) == 2 and q.sharding == state.params['layers']['q'].sharding
  abstract_state = job.abstract_state(transformer.spec(train_cases.MODEL), 'float32', optimizer, place)
  assert jax.tree.map(lambda x: x.sharding, abstract_state.opt_state) == jax.tree.map(lambda x: x.sharding, state.opt_state)
  with checkpoint.Checkpoints(tmp_path / 'checkpoints') as saved:
    marked = jax.tree.map(lambda x: x + 1, state.opt_state)
    saved.save(1, state.params, marked, {}, META)
    saved.wait()
    assert_equal(saved.restore(1, state.params, state.opt_state)[1], marked)
  assert_equal(checkpoint.load_opt_state(tmp_path / 'checkpoints', checkpoint.abstract_like(state.opt_state)), marked)
  other = loop.init_state(state.params, optim.make_optimizer(train_cases.OPTIM)).opt_state
  with pytest.raises(ValueError, match="holds the optimizer's state of another model, or of another optimizer"):
    checkpoint.load_opt_state(tmp_path / 'checkpoints', checkpoint.abstract_like(other))


def test_a_step_comes_back_whole(state, written):
  with checkpoint.Checkpoints(written) as saved:
    assert saved.newest() == 4
    saved.verify(4)
    data = saved.data(4)
    meta = saved.meta(4)
    params, opt_state = saved.restore(4, state.params, state.opt_state)
  assert_equal(params, jax.tree.map(lambda p: 4 * p, state.params))
  assert_equal(opt_state, state.opt_state)
  assert jax.tree.structure(opt_state) == jax.tree.structure(state.opt_state)
  assert jax.tree.map(lambda x: x.sharding, params) == jax.tree.map(lambda x: x.sharding, state.params)
  assert data == {'next_step': 4} and meta == META | {'step': 4}


def test_the_newest_steps_are_kept(written):
  assert sorted(path.name for path in written.iterdir()) == ['2', '3', '4']
  assert checkpoint.newest_step(written) == 4


@pytest.mark.parametrize('dtype, shape', [('float32', {'tensor': 2, 'data': 4}), ('bfloat16', {'fsdp': 8})])
def test_params_alone_go_to_another_mesh_and_dtype(state, folder, dtype, shape):
  for item in ('opt_state', 'data'):
    shutil.rmtree(folder / '3' / item)
  like = abstract(dtype, **shape)
  params = checkpoint.load_params(folder, like, step=3)
  for array, wanted in zip(jax.tree.leaves(params), jax.tree.leaves(like), strict=True):
    assert array.dtype == jnp.dtype(dtype) and array.sharding == wanted.sharding
  assert_equal(params, jax.tree.map(lambda p: (3 * p).astype(dtype), state.params))


def test_meta_alone(folder):
  for item in ('params', 'opt_state', 'data'):
    shutil.rmtree(folder / '4' / item)
  assert checkpoint.load_meta(folder) == META | {'step': 4}
  assert checkpoint.load_meta(folder, step=2) == META | {'step': 2}


def test_reading_writes_nothing_and_says_nothing(folder, caplog):
  """Not even the remains of an interrupted save go away: its process may still be at it."""
  (folder / '5.orbax-checkpoint-tmp').mkdir()
  before = {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob('*')]}
  checkpoint.newest_step(folder)
  checkpoint.load_meta(folder)
  checkpoint.load_params(folder, abstract())
  assert {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob('*')]} == before
  assert not [record for record in caplog.records if record.levelname == 'WARNING']


def test_parameters_without_a_run(state, tmp_path):
  checkpoint.save_params(tmp_path / 'converted', state.params, META)
  assert checkpoint.newest_step(tmp_path / 'converted') == 0
  assert checkpoint.load_meta(tmp_path / 'converted') == META
  assert_equal(checkpoint.load_params(tmp_path / 'converted', abstract()), state.params)


@pytest.mark.parametrize('changes, message', [
    ({'mlp': 32}, r'layers/down is \(2, 24, 16\) there, and \(2, 32, 16\) in the model that was asked for'),
    ({'learned_sinks': 2}, r'sinks is absent there, and \(2, 16\)'),
    ({'tied': True}, r'head is \(96, 16\) there, and absent')])
def test_another_model_is_refused(written, changes, message):
  with pytest.raises(ValueError, match=f'{written} holds another model: {message}'):
    checkpoint.load_params(written, abstract(cfg=dataclasses.replace(train_cases.MODEL, **changes)))


def test_a_folder_that_is_not_there(tmp_path):
  folder = tmp_path / 'nothing'
  assert checkpoint.newest_step(folder) is None
  for read in (checkpoint.load_meta, lambda folder: checkpoint.load_params(folder, abstract())):
    with pytest.raises(FileNotFoundError, match=f'{folder}: no such checkpoint folder'):
      read(folder)
  assert not folder.exists()   # to ask is not to make


def test_an_empty_folder(tmp_path):
  assert checkpoint.newest_step(tmp_path) is None
  with pytest.raises(FileNotFoundError, match='holds no complete checkpoint'):
    checkpoint.load_meta(tmp_path)


def test_a_step_that_is_not_there(written):
  with pytest.raises(FileNotFoundError, match=r'no checkpoint of step 1; here are \[2, 3, 4\]'):
    checkpoint.load_params(written, abstract(), step=1)


@pytest.mark.parametrize('item', ['params', 'meta'])
def test_an_item_that_is_not_there_is_named(folder, item):
  shutil.rmtree(folder / '4' / item)
  with pytest.raises(FileNotFoundError, match=f'step 4 has no {item}'):
    checkpoint.load_params(folder, abstract()) if item == 'params' else checkpoint.load_meta(folder)


def test_an_interrupted_save_is_no_checkpoint(state, folder):
  """What a process killed while it saves step 5 leaves behind; the next save of a run tidies up."""
  half = folder / '5.orbax-checkpoint-tmp'
  shutil.copytree(folder / '4', half)
  shutil.rmtree(half / 'meta')
  assert checkpoint.newest_step(folder) == 4
  assert checkpoint.load_meta(folder)['step'] == 4
  with pytest.raises(FileNotFoundError, match='no checkpoint of step 5'):
    checkpoint.load_meta(folder, step=5)
  with checkpoint.Checkpoints(folder) as saved:
    assert saved.newest() == 4
    saved.save(5, state.params, state.opt_state, {'next_step': 5}, META)
  assert checkpoint.load_meta(folder) == META and not half.exists()


def test_a_step_that_stands_is_kept(state, folder):
  with checkpoint.Checkpoints(folder) as saved:
    saved.save(4, state.params, state.opt_state, {'next_step': 0}, {})
  assert checkpoint.load_meta(folder)['step'] == 4


# Damage.

def files_of(folder, step, item='*'):
  return sorted(file for file in (folder / str(step)).glob(f'{item}/**/*') if file.is_file())


def flip(file):
  data = bytearray(file.read_bytes())
  data[len(data) // 2] ^= 4
  file.write_bytes(data)


def test_every_flipped_byte_and_every_missing_file_is_named(folder):
  files = files_of(folder, 4)
  assert {file.relative_to(folder / '4').parts[0] for file in files} == {'params', 'opt_state', 'data', 'meta'}
  for file in files:
    before = file.read_bytes()
    size = len(before)
    harms = {'has other content than was written': flip, 'is missing': pathlib.Path.unlink,
             f'has {size - 1} bytes, of {size} that': lambda file: file.write_bytes(file.read_bytes()[:-1])}
    for said, harm in harms.items():
      harm(file)
      with pytest.raises(checkpoint.Damaged, match=f'^{file} {said}.* Step 3 stands too: .*mv {folder}/4 {folder}/4.dam'):
        checkpoint.verify(folder, 4)
      file.write_bytes(before)
  checkpoint.verify(folder, 4)


def test_processes_check_all_files_between_them(folder):
  for file in files_of(folder, 4, 'params'):
    before = file.read_bytes()
    flip(file)
    found = []
    for index in range(3):
      try:
        checkpoint.verify(folder, 4, index=index, count=3)
      except checkpoint.Damaged:
        found.append(index)
    assert len(found) == 1
    file.write_bytes(before)


def test_what_is_read_alone_is_checked_alone(state, folder):
  flip(files_of(folder, 4, 'opt_state')[0])
  assert_equal(checkpoint.load_params(folder, abstract()), jax.tree.map(lambda p: 4 * p, state.params))
  flip(files_of(folder, 4, 'params')[-1])
  assert checkpoint.load_meta(folder)['step'] == 4
  with pytest.raises(checkpoint.Damaged, match=f'{folder}/4/params/.* has other content'):
    checkpoint.load_params(folder, abstract())
  flip(files_of(folder, 4, 'meta')[-1])
  with pytest.raises(checkpoint.Damaged, match=f'{folder}/4/meta/.* has other content'):
    checkpoint.load_meta(folder)
  subprocess.run(['mv', folder / '4', folder / '4.damaged'], check=True)   # as the error says
  assert checkpoint.load_meta(folder)['step'] == 3 and checkpoint.newest_step(folder) == 3


def test_another_step_is_offered_only_if_its_files_are_there(folder):
  files_of(folder, 3, 'params')[0].unlink()
  flip(files_of(folder, 4, 'params')[0])
  with pytest.raises(checkpoint.Damaged, match='Step 2 stands too'):
    checkpoint.verify(folder, 4)
  shutil.rmtree(folder / '2')
  with pytest.raises(checkpoint.Damaged, match='No other step stands in'):
    checkpoint.verify(folder, 4)


@pytest.mark.parametrize('text, message', [
    ('{"params/', 'is no valid JSON'), ('[["params/a", 3]]', 'is a list, not a JSON object'),
    ('{"params/a": 3}', "'params/a' is 3, not a list"), ('{"params/a": [3]}', 'other things than sizes')])
def test_damaged_checksums_are_damage(folder, text, message):
  (folder / '4' / 'checksums-0-of-1.json').write_text(text)
  with pytest.raises(checkpoint.Damaged, match=f'checksums-0-of-1.json.*{message}'):
    checkpoint.verify(folder, 4)


@pytest.mark.parametrize('item, damage', [
    ('params', 'gone'), ('opt_state', 'gone'), ('data', 'gone'), ('meta', 'gone'), ('params', 'cut'), ('opt_state', 'cut'),
    ('data', 'cut'), ('meta', 'cut')])
def test_damage_to_a_step_without_checksums_is_a_line_too(state, folder, item, damage):
  """As an interrupted copy leaves it."""
  path = folder / '4'
  (path / 'checksums-0-of-1.json').unlink()
  if damage == 'gone':
    shutil.rmtree(path / item)
  else:
    for file in files_of(folder, 4, item):
      file.write_bytes(file.read_bytes()[:5])

  def resume():
    with checkpoint.Checkpoints(folder) as saved:
      saved.data(4)
      saved.meta(4)
      saved.restore(4, state.params, state.opt_state)

  readers = [resume] + ([lambda: checkpoint.load_meta(folder)] if (item, damage) == ('meta', 'cut') else []) + (
      [lambda: checkpoint.load_params(folder, abstract())] if (item, damage) == ('params', 'cut') else [])
  for read in readers:
    with pytest.raises(checkpoint.Damaged, match=rf'^{path}(:| has) .*{item}.*Step 3 stands too: .*mv {path} {path}.dam'):
      read()


def test_an_empty_folder_with_a_number_is_no_way_out(folder):
  (folder / '9').mkdir()
  with pytest.raises(checkpoint.Damaged, match=rf'{folder}/9 has no data. Step 4 stands too'):
    with checkpoint.Checkpoints(folder) as saved:
      saved.data(saved.newest())
  flip(files_of(folder, 4, 'params')[-1])
  with pytest.raises(checkpoint.Damaged, match='Step 3 stands too'):
    checkpoint.verify(folder, 4)


def test_a_step_without_checksums_is_read_as_it_is(state, folder):
  """One that was written before there were any, or by a process that was killed right after it."""
  (folder / '4' / 'checksums-0-of-1.json').unlink()
  assert_equal(checkpoint.load_params(folder, abstract()), jax.tree.map(lambda p: 4 * p, state.params))


def test_converted_parameters_are_checked_too(state, tmp_path):
  checkpoint.save_params(tmp_path, state.params, META)
  flip(files_of(tmp_path, 0, 'params')[-1])
  with pytest.raises(checkpoint.Damaged, match='No other step stands in'):
    checkpoint.load_params(tmp_path, abstract())


def test_a_failed_write_is_heard_of_before_the_next(state, folder, monkeypatch):
  """It fails in the background, and `check` says so."""
  full = OSError(errno.ENOSPC, 'No space left on device')
  monkeypatch.setattr(checkpoint, '_write_sums', lambda *args: (_ for _ in ()).throw(full))
  with pytest.raises(checkpoint.NotSaved, match=r'step 5 could not be saved in .*: No space left on device \(.* are free'):
    with checkpoint.Checkpoints(folder) as saved:
      saved.save(5, state.params, state.opt_state, {'next_step': 5}, META)
      while True:
        saved.check()
        time.sleep(0.01)
