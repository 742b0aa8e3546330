"""A model by its name: folders, work directories, their steps, and students that add to other runs."""

import dataclasses
import json

import hf_cases
import jax
import numpy as np
import pytest

from blockattn import checkpoint, loading
from blockattn.hf import convert
from blockattn.models import lora, transformer
from blockattn.train import job
from tools import convert as cli

CFG = hf_cases.MODELS['qwen3_tied']
OPTIONS = lora.LoraOptions(rank=2, alpha=4.0)


@pytest.fixture(scope='module')
def base(tmp_path_factory):
  """(folder of a random model, its parameters)."""
  folder = tmp_path_factory.mktemp('models')
  params = hf_cases.random_params(CFG, 'float32')
  source = hf_cases.write_tokenizer(folder / 'tokenizer', CFG.vocab)
  convert.save(params, CFG, folder / 'base', source=source, meta={'kind': 'distill'}, card='', dtype='float32')
  return folder / 'base', params


def write_run(workdir, params, cfg, source, step=0, low_rank=lora.NONE):
  checkpoint.save_params(workdir / 'checkpoints', params, job.model_meta(cfg, None, str(source), 'distill', low_rank), step)
  (workdir / 'config.json').write_text(json.dumps({'data': {'tokenizer': ''}, 'model': {'source': str(source)}}))
  return workdir


def assert_equal(got, expected):
  assert jax.tree.structure(got) == jax.tree.structure(expected)
  jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_folders_conversions_runs_and_their_steps(base, tmp_path):
  folder, params = base
  assert loading.find(folder).meta['kind'] == 'distill' and not loading.find(folder).is_run
  assert_equal(loading.find(folder).read('float32'), params)
  assert cli.main(['from_hf', str(folder), str(tmp_path / 'converted')]) == 0
  assert loading.find(tmp_path / 'converted').cfg == CFG
  assert loading.tokenizer_of(tmp_path / 'converted') == tmp_path / 'converted/hf'
  student = dataclasses.replace(CFG, learned_sinks=2)
  for step in (1, 2):
    params = hf_cases.random_params(student, 'float32', step)
    run = write_run(tmp_path / 'run', params, student, tmp_path / 'converted', step)
  for name, step in ((run, 2), (run / 'checkpoints/1', 1)):
    origin = loading.find(name)
    assert origin.cfg == student and origin.is_run
    assert_equal(origin.read('float32'), hf_cases.random_params(student, 'float32', step))
    assert loading.tokenizer_of(name) == tmp_path / 'converted/hf'   # of what it began as
  with pytest.raises(FileNotFoundError, match='no folder .*/run/checkpoints/3'):
    loading.find(run / 'checkpoints/3')


def test_a_student_that_adds_to_a_student(base, tmp_path):
  """Of a LoRA run that began from a LoRA run, both differences are merged, and its own learned sinks are the later ones."""
  folder, params = base
  rng = np.random.default_rng(1)
  draw = lambda cfg: jax.tree.map(lambda s: rng.standard_normal(s.shape).astype(np.float32), lora.spec(cfg, OPTIONS))
  cfg = dataclasses.replace(CFG, learned_sinks=1)
  first, second = draw(cfg), draw(cfg)
  one = write_run(tmp_path / 'one', first, cfg, folder, low_rank=OPTIONS)
  two = write_run(tmp_path / 'two', second, cfg, one, low_rank=OPTIONS)
  got = loading.find(two).read('float32')
  expected = lora.merge(lora.merge(params, first, OPTIONS), second, OPTIONS)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, expected)
  np.testing.assert_array_equal(got['sinks'], second['sinks'])
  assert transformer.without_sinks(loading.find(two).cfg) == CFG


def test_moments_of_what_is_no_run(base):
  with pytest.raises(ValueError, match="base is no work directory of a run, and holds no optimizer's moments"):
    loading.find(base[0]).read_optimizer({})
