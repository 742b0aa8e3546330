"""A teacher whose words are written down once, and a distillation that reads them."""

import json
import os
import shutil

import jax
import numpy as np
import pytest
import run_cases

from blockattn import checkpoint, losses as losses_lib, metrics
from blockattn.data import encode, packing, teacher_logits
from blockattn.train import distill, teach

folder = run_cases.folder   # a teacher, examples and a config file of both
STEPS, VOCAB = 6, 304

pytestmark = pytest.mark.usefixtures('standard_promotion')   # optax


def config_of(folder, **changes):
  config = run_cases.get_config(folder)
  config.update_from_flattened_dict({'steps': STEPS, 'save_every': STEPS, 'distill.weights.source': 'teacher',
                                     'distill.temperature': 1.5, 'mesh.fsdp': 2, 'mesh.data': 2, 'mesh.tensor': 2} | changes)
  return config


@pytest.fixture(scope='module')
def written(folder, tmp_path_factory):
  """All but one of the teacher's tokens."""
  with jax.numpy_dtype_promotion('standard'):
    out = tmp_path_factory.mktemp('logits') / 'all'
    teach.run(distill.read(config_of(folder, **{'teacher.top_k': VOCAB - 1})), out)
  return out


def losses(workdir):
  return [line['loss'] for line in metrics.read_metrics(workdir / 'metrics.jsonl')]


@pytest.mark.slow
def test_training_on_what_was_written_is_training_with_the_teacher(folder, written, tmp_path, capfd):
  distill.run(distill.read(config_of(folder)), tmp_path / 'with')
  offline = config_of(folder, **{'teacher.logits': str(written), 'distill.drop_mode': 'isolate'})
  distill.run(distill.read(offline), tmp_path / 'without')
  np.testing.assert_allclose(losses(tmp_path / 'without'), losses(tmp_path / 'with'), rtol=1e-3)
  assert checkpoint.load_meta(tmp_path / 'without/checkpoints')['kind'] == 'distill'


@pytest.mark.slow
def test_few_tokens_are_nearly_enough_and_the_loss_is_told(folder, tmp_path, capfd):
  out = tmp_path / 'few'
  config = config_of(folder, **{'teacher.top_k': 8, 'distill.weights.source': 'student'})
  teach.run(distill.read(config), out)
  said = capfd.readouterr().out
  assert 'KL(full attention || block mask) of the teacher' in said and 'from   16 tokens and the rest' in said
  bias = json.loads((out / 'bias.json').read_text())
  kls = [bias['top'][k]['kl'] for k in ('1', '4', '16', '64', '256')]
  assert kls == sorted(kls) and 0 < kls[0] < kls[-1] <= bias['kl'] * (1 + 1e-4)
  rests = [bias['top'][k]['rest'] for k in ('1', '4', '16', '64', '256')]
  assert rests == sorted(rests, reverse=True) and 0 < rests[-1] < rests[0] < 1
  [part] = out.glob('part-*.array_record')
  whole = part.stat().st_size
  config.teacher.logits = str(out)
  distill.run(distill.read(config), tmp_path / 'run')
  assert all(np.isfinite(losses(tmp_path / 'run')))
  assert whole < 60 * 64 * 8 * 8   # tokens of some 20 rows, 8 of them, 6 bytes each


def test_a_stopped_writing_goes_on(folder, written, tmp_path, monkeypatch):
  monkeypatch.setattr(teach, 'PART_ROWS', 4)
  config, calls = config_of(folder, **{'teacher.top_k': 4}), []
  write = teacher_logits.write_part

  def stop_at_third(out, name, records):
    calls.append(name)
    if len(calls) == 3:
      raise OSError('no space left')
    write(out, name, records)

  monkeypatch.setattr(teacher_logits, 'write_part', stop_at_third)
  with pytest.raises(OSError, match='no space'):
    teach.run(distill.read(config), tmp_path / 'x')
  assert sum(map(len, teacher_logits.written_rows(tmp_path / 'x').values())) == 8
  config.teacher.logits = str(tmp_path / 'x')
  with pytest.raises(ValueError, match=r'lacks \d+ of \d+ rows that the training will read, first row \d+: run '
                                       'blockattn.train.teach with this config'):
    distill.run(distill.read(config), tmp_path / 'run')
  config.teacher.logits = ''
  calls.clear()
  noted = lambda out, name, records: (calls.append(name), write(out, name, records))
  monkeypatch.setattr(teacher_logits, 'write_part', noted)
  teach.run(distill.read(config), tmp_path / 'x')
  assert 'part-00000-0000' not in calls and 'part-00002-0000' in calls
  written = [row for rows in teacher_logits.written_rows(tmp_path / 'x').values() for row in rows]
  assert sorted(written) == list(range(STEPS * config.batch))


@pytest.mark.parametrize('changes, message', [
    ({'distill.temperature': 2.0}, 'was written for temperature=1.5, this config says 2.0'),
    ({'blocks.positions': 'local'}, "was written for positions='sequential', this config says 'local'"),
    ({'data.length': 128}, 'was written for length=64, this config says 128')])
def test_a_folder_for_something_else_is_refused(folder, written, tmp_path, changes, message):
  with pytest.raises(ValueError, match=message):
    distill.run(distill.read(config_of(folder, **{'teacher.logits': str(written)} | changes)), tmp_path / 'run')
  with pytest.raises(ValueError, match=message):
    teach.run(distill.read(config_of(folder, **{'teacher.top_k': VOCAB - 1} | changes)), written)


def test_what_other_weights_have_said_is_refused(folder, written, tmp_path):
  config = config_of(folder, **{'teacher.top_k': VOCAB - 1})
  shutil.copytree(written, tmp_path / 'begun')
  for part in (tmp_path / 'begun').glob('part-*.json'):
    part.unlink()
  message = 'was made from other weights than lie in .*/teacher now .*: put the old ones back, or run .*teach into a new'
  with run_cases.overwritten(folder):
    with pytest.raises(ValueError, match=f'begun {message}'):
      teach.run(distill.read(config), tmp_path / 'begun')
    config.teacher.logits = str(written)
    with pytest.raises(ValueError, match=f'all {message}'):
      distill.run(distill.read(config), tmp_path / 'run')


def test_more_tokens_than_there_are(folder, tmp_path):
  with pytest.raises(ValueError, match=r'config.teacher.top_k=304: the vocabulary has 304 tokens; keep fewer'):
    teach.run(distill.read(config_of(folder, **{'teacher.top_k': VOCAB})), tmp_path / 'x')


def test_a_folder_that_is_none(tmp_path):
  with pytest.raises(FileNotFoundError, match='meta.json is not there: config.teacher.logits names a folder'):
    teacher_logits.read_meta(tmp_path)


# Records alone.


def row_of(seed):
  tokens = np.random.default_rng(seed).integers(VOCAB, size=12).astype(np.int32)
  return packing.pack_row([encode.EncodedDoc(tokens[:7], (3, 4), (5, 7)), encode.EncodedDoc(tokens[7:], (5,), (3, 5))], 16)


def said_of(row, k=3):
  rng = np.random.default_rng(1)
  return {'ids': rng.integers(VOCAB, size=(16, k)), 'log_p': -rng.random((16, k)), 'target_log_p': -rng.random(16)}


def test_a_record_comes_back_at_its_tokens(tmp_path):
  rows = list(map(row_of, range(3)))
  said = said_of(rows[0])
  for name, numbers in (('part-00000-0000', (2, 0)), ('part-00000-0001', (1,))):
    teacher_logits.write_part(tmp_path, name, {i: teacher_logits.record(rows[i], said, VOCAB) for i in numbers})
  (tmp_path / teacher_logits.META).write_text('{}')
  add = teacher_logits.StoredLogits(tmp_path, 3)
  for number in range(3):
    got, text = add(number, rows[number]), rows[number]['text']
    assert got['tokens'] is rows[number]['tokens'] and text.sum() == 10
    for name in ('ids', 'log_p', 'target_log_p'):
      np.testing.assert_allclose(got['teacher'][name][text], said[name][text], rtol=1e-3, atol=1e-3)
      assert not np.any(got['teacher'][name][~text])
    assert not np.any(got['teacher']['blocked_log_p']) and got['teacher']['ids'].dtype == np.int32


def test_the_kl_from_what_is_stored_is_a_lower_bound():
  """Of a student close to its teacher, where the KL is smaller than what float16 log-probabilities would be off."""
  rng, row = np.random.default_rng(2), row_of(0)
  teacher = 3 * rng.standard_normal((16, VOCAB)).astype(np.float32)
  student = teacher + 1e-2 * rng.standard_normal((16, VOCAB)).astype(np.float32)
  log_p, ids = jax.lax.top_k(jax.nn.log_softmax(teacher), 64)
  arrays = teacher_logits.record(row, {'ids': ids, 'log_p': log_p, 'target_log_p': log_p[:, 0]}, VOCAB)
  stored = teacher_logits.spread(arrays, row['text'])
  kl = losses_lib.divergence_of_top(stored['log_p'], stored['ids'], student, 1.0)[row['text']]
  whole = losses_lib.divergence(teacher, student, 1.0)[row['text']]
  assert np.all(whole < 1e-4) and np.all(kl <= whole + 1e-6) and np.all(kl > 0.5 * whole)


def test_other_tokens_and_broken_records_are_refused(tmp_path):
  rows = [row_of(0)]
  teacher_logits.write_part(tmp_path, 'part-00000-0000', {0: teacher_logits.record(rows[0], said_of(rows[0]), VOCAB)})
  (tmp_path / teacher_logits.META).write_text('{}')
  with pytest.raises(ValueError, match='row 0 was written for other tokens'):
    teacher_logits.StoredLogits(tmp_path, 1)(0, row_of(5))
  add = teacher_logits.StoredLogits(tmp_path, 1)
  add._records = [b'\x00' * 40]
  with pytest.raises(ValueError, match='row 0 cannot be read'):
    add(0, rows[0])


def test_a_part_is_there_when_its_list_is(tmp_path):
  rows = [row_of(0)]
  teacher_logits.write_part(tmp_path, 'part-00000-0000', {0: teacher_logits.record(rows[0], said_of(rows[0]), VOCAB)})
  os.remove(tmp_path / 'part-00000-0000.json')
  assert teacher_logits.written_rows(tmp_path) == {}
