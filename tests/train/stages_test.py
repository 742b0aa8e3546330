"""Trainings that begin from other trainings, that are made longer, and that have another model as their teacher."""

import dataclasses

import hf_cases
import jax
import numpy as np
import optax
import pytest
import run_cases
import train_cases

from blockattn import checkpoint, loading
from blockattn.data import teacher_logits
from blockattn.hf import convert
from blockattn.train import distill, finetune, inputs, job, teach
from tools import convert as cli

folder = run_cases.folder   # a teacher, examples and a config file of both

pytestmark = pytest.mark.usefixtures('standard_promotion')   # optax

# Deeper and wider, with rows behind the vocabulary that no token has.
LARGE = dataclasses.replace(run_cases.MODEL, width=24, layers=3, vocab=run_cases.MODEL.vocab + 8)


def write_large(folder, seed):
  convert.save(hf_cases.random_params(LARGE, 'float32', seed), LARGE, folder / 'large', source=folder / 'tokenizer', meta={},
               card='', dtype='float32', overwrite=True)
  return folder / 'large'


@pytest.fixture(scope='module')
def large(folder):
  return write_large(folder, seed=5)


@pytest.fixture(scope='module')
def tuned(folder):
  """The work directory of a fine-tuning with learned sinks."""
  with jax.numpy_dtype_promotion('standard'):
    finetune.run(finetune.read(config_of(folder, 'finetune')), folder / 'tuned')
  return folder / 'tuned'


def config_of(folder, trainer='distill', **changes):
  config = run_cases.get_config(folder, trainer)
  config.update_from_flattened_dict({'steps': 2, 'save_every': 2, 'optim.warmup': 1, 'mesh.data': 2, 'mesh.fsdp': 2,
                                     'mesh.tensor': 2} | changes)
  return config


def started(options, cfg, params):
  """(job, state at step 0) of a distillation."""
  place = job.make_placement(options)
  made = distill.build(options, place, cfg, platform='cpu')
  trained, _ = job.student_params(options, made.cfg, params, 5, place)
  return made, job.first_state(made, options, trained)


@pytest.mark.slow
def test_a_student_goes_on_from_a_run_with_its_sinks_and_its_moments(folder, tuned):
  options = distill.read(config_of(folder, **{'model.source': str(tuned), 'model.keep_moments': True}))
  origin = loading.find(tuned)
  assert origin.cfg.learned_sinks == 2 and job.load_tokenizer(options, origin.cfg)
  _, state = started(options, origin.cfg, job.load_language_model(options, job.make_placement(options), origin.cfg))
  jax.tree.map(np.testing.assert_array_equal, state.params, origin.read('float32'))
  kept = checkpoint.load_opt_state(tuned / 'checkpoints', checkpoint.abstract_like(state.opt_state))
  adam, schedule = state.opt_state[1][0], state.opt_state[1][-1]
  jax.tree.map(np.testing.assert_array_equal, adam, kept[1][0])
  assert int(adam.count) == 2 and np.any(adam.mu['sinks']) and int(state.step) == 0
  assert isinstance(schedule, optax.ScaleByScheduleState) and int(schedule.count) == 0 < int(kept[1][-1].count)


def test_an_exported_student_goes_on_with_its_sinks(folder, tuned, tmp_path):
  assert cli.main(['to_hf', str(tuned), str(tmp_path / 'out')]) == 0
  options = distill.read(config_of(folder, **{'model.source': str(tmp_path / 'out')}))
  cfg = job.model_config(options.model)
  assert job.load_tokenizer(options, cfg).convert_tokens_to_ids('<|sink_1|>') == cfg.vocab + 1
  made, state = started(options, cfg, job.load_language_model(options, job.make_placement(options), cfg))
  np.testing.assert_array_equal(state.params['sinks'], loading.find(tuned).read('float32')['sinks'])
  assert made.teacher.cfg == run_cases.MODEL and 'sinks' not in made.frozen.teacher   # the teacher never sees them
  for change in ({'blocks.sinks': 3}, {'blocks.sink_kind': 'token'}):
    with pytest.raises(ValueError, match='has 2 learned sinks, and config.blocks says . of kind .*; go on with its own: '
                                         '--config.blocks.sink_kind=learned --config.blocks.sinks=2'):
      started(distill.read(config_of(folder, **{'model.source': str(tmp_path / 'out')} | change)), cfg, None)


def test_moments_of_another_model_are_refused(folder, tuned, tmp_path, monkeypatch):
  options = distill.read(config_of(folder, **{'model.source': str(tuned), 'model.keep_moments': True}))
  cfg = dataclasses.replace(run_cases.MODEL, learned_sinks=2, width=24)
  with pytest.raises(ValueError, match="holds the optimizer's state of another model, or of another optimizer"):
    started(options, cfg, train_cases.params(cfg, place=job.make_placement(options)))
  config = config_of(folder, **{'model.source': str(tuned), 'model.keep_moments': True, 'lora.rank': 2})
  with pytest.raises(ValueError, match='for which no moments are kept: leave config.model.keep_moments out'):
    distill.read(config)
  with pytest.raises(ValueError, match='keep_moments goes on with the moments of a run: config.model.source names none'):
    job.ModelOptions(size='tiny', keep_moments=True)
  monkeypatch.setattr(inputs, 'load_rows', lambda *_: pytest.fail('data was read'))   # the model comes behind it
  part = {'model.source': str(tuned), 'model.keep_moments': True, 'model.train_only': 'wrappers'}
  for changes, message in ((part, f'{tuned}/checkpoints/2 holds .* or of other parts of the model'),
                           (part | {'model.source': f'{folder}/teacher'}, 'teacher is no work directory of a run')):
    with pytest.raises(ValueError, match=f'config.model.keep_moments: .*{message}.*; leave it out to begin with new'):
      distill.run(distill.read(config_of(folder, **changes)), tmp_path / 'run')


@pytest.mark.slow
def test_a_larger_teacher_and_more_steps(folder, large, tuned, tmp_path):
  """A LoRA student of a run, beside another teacher: its base is not the teacher. Then the run is made longer."""
  config = config_of(folder, **{'model.source': str(tuned), 'teacher.source': str(large), 'lora.rank': 2})
  run = tmp_path / 'run'
  distill.run(distill.read(config), run)
  meta = checkpoint.load_meta(run / 'checkpoints')
  assert (meta['source'], meta['teacher']) == (str(tuned), str(large))
  assert meta['teacher_weights'] == convert.weights_facts(convert.load(large, 'float32')[1])
  rate = lambda: [line['lr'] for line in run_cases.metrics.read_metrics(run / 'metrics.jsonl')]
  before = rate()
  config.steps = 3
  with pytest.raises(ValueError, match='steps was 2 and is 3.*--config.optim.decay_steps=2'):
    distill.run(distill.read(config), run)
  config.optim.decay_steps = 2
  distill.run(distill.read(config), run)
  assert checkpoint.newest_step(run / 'checkpoints') == 3
  assert rate() == [*before, pytest.approx(0.1 * config.optim.lr)]
  merged = loading.find(run).read('float32')
  assert np.abs(merged['layers']['q'] - loading.find(tuned).read('float32')['layers']['q']).max() > 0
  write_large(folder, seed=6)
  with pytest.raises(ValueError, match=f'step 3 in {run}/checkpoints was made from other weights than lie in {large} now'):
    distill.run(distill.read(config), run)


def test_what_a_larger_teacher_says_is_stored_as_its_own(folder, large, tmp_path):
  config = config_of(folder, **{'teacher.source': str(large), 'teacher.top_k': 4})
  teach.run(distill.read(config), tmp_path / 'said')
  assert teacher_logits.read_meta(tmp_path / 'said')['source'] == str(large)
  config.update_from_flattened_dict({'teacher.logits': str(tmp_path / 'said'), 'teacher.source': ''})
  with pytest.raises(ValueError, match='said was written for source=.*/large., this config says .*/teacher'):
    distill.run(distill.read(config), tmp_path / 'run')


def test_teachers_that_cannot_teach(folder, large, tmp_path):
  small = dataclasses.replace(run_cases.MODEL, vocab=run_cases.MODEL.vocab - 1)
  with pytest.raises(ValueError, match="config.teacher.source='x' has 303 rows for tokens, and the student 304"):
    distill.teacher_config(small, run_cases.MODEL, 'x')
  with pytest.raises(ValueError, match="config.teacher.source='org/x' is no folder here.*set config.teacher.size"):
    options = distill.read(config_of(folder, **{'teacher.source': 'org/x'}))
    distill.build(options, job.make_placement(options), run_cases.MODEL, platform='cpu')
  other = hf_cases.write_tokenizer(tmp_path / 'words', 100)
  convert.save(hf_cases.random_params(LARGE, 'float32'), LARGE, tmp_path / 'other', source=other, meta={}, card='',
               dtype='float32')
  options = distill.read(config_of(folder, **{'teacher.source': str(tmp_path / 'other')}))
  with pytest.raises(ValueError, match='have different tokenizers: .* tokens of the teacher, first'):
    distill.load_teacher(options, LARGE, job.load_tokenizer(options, run_cases.MODEL), job.make_placement(options))
