"""Matrices of 8 bits, students of low rank, and teachers with rules of their own."""

import dataclasses
import functools
import re

import hf_cases
import jax
import numpy as np
import pytest
import run_cases
import train_cases

from blockattn import blocks, checkpoint, losses, optim, tree
from blockattn.evals import gap
from blockattn.hf import config as hf_config, convert as hf_convert
from blockattn.models import lora, transformer, weights
from blockattn.train import distill, finetune, job, loop
from configs import common
from tools import convert

CFG = dataclasses.replace(train_cases.MODEL, family='qwen3', qk_norm=True, tied=True, learned_sinks=1)
OPTIONS = lora.LoraOptions(rank=3, alpha=6.0)

pytestmark = pytest.mark.usefixtures('standard_promotion')   # optax


def trained(cfg=CFG, options=OPTIONS, seed=3):
  """A student of low rank that has learned something: no matrix is zero."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda s: (0.2 * rng.standard_normal(s.shape)).astype(np.float32), lora.spec(cfg, options))


def hidden(params, cfg=CFG, compute=None, seed=0):
  batch = train_cases.batch(seed, rows=2)
  return transformer.apply(params, batch['tokens'], batch['layout'], cfg, compute or transformer.Compute(impl='xla'))


def test_eight_bits_are_half_a_step_off():
  w = np.random.default_rng(0).standard_normal((3, 5, 4, 6)).astype(np.float32) * np.array([1e-3, 1, 50, 0, 1, 2])
  q = weights.to_int8(w, (1, 2))
  assert q.values.dtype == np.int8 and q.values.shape == w.shape and q.scale.shape == (3, 1, 1, 6)
  assert np.abs(q.values).max() == 127   # the largest of a channel is not rounded
  assert np.all(np.abs(np.asarray(q.values) * q.scale - w) <= q.scale / 2 * (1 + 1e-5))
  assert np.all(np.asarray(q.scale)[..., 3] == 0) and not np.any(np.isnan(np.asarray(q.values) * q.scale))


@pytest.mark.parametrize('tied', [True, False])
def test_a_model_of_eight_bits_is_the_model_of_its_rounded_matrices(tied):
  cfg = dataclasses.replace(CFG, tied=tied, learned_sinks=0)
  params = train_cases.params(cfg)
  small = weights.quantize(params, 'float32')
  rounded = jax.tree.map(lambda w: w.values * w.scale if weights.is_int8(w) else w, small, is_leaf=weights.is_int8)
  assert {name for name, w in small['layers'].items() if weights.is_int8(w)} == set(weights.CONTRACTED)
  x, expected = hidden(small, cfg), hidden(rounded, cfg)
  np.testing.assert_allclose(x, expected, rtol=2e-4, atol=2e-4)
  np.testing.assert_allclose(transformer.logits(small, x, cfg), transformer.logits(rounded, x, cfg), rtol=2e-4, atol=2e-4)
  assert np.abs(np.asarray(expected) - np.asarray(hidden(params, cfg))).max() > 1e-3   # it is another model


def test_a_student_of_low_rank_is_its_merged_model():
  params = train_cases.params(CFG)
  frozen, own = {k: v for k, v in params.items() if k != 'sinks'}, trained()
  attached, merged = lora.attach(frozen, own, OPTIONS), lora.merge(frozen, own, OPTIONS)
  assert jax.tree.structure(merged) == jax.tree.structure(params)
  np.testing.assert_allclose(hidden(attached), hidden(merged), rtol=1e-3, atol=1e-3)
  np.testing.assert_array_equal(merged['sinks'], own['sinks'])
  expected = frozen['layers']['o'][1] + 2.0 * np.tensordot(own['layers']['o']['down'][1], own['layers']['o']['up'][1], 1)
  np.testing.assert_allclose(merged['layers']['o'][1], expected, rtol=1e-5, atol=1e-6)
  assert np.abs(np.asarray(hidden(merged)) - np.asarray(hidden(params))).max() > 0.1


def test_only_what_is_named_is_trained_and_it_starts_as_the_model():
  options = options_with(**{'lora.rank': 4, 'lora.targets': ('q', 'down')})
  place = train_cases.placement(8, fsdp=4, tensor=2)
  params = train_cases.params(CFG, place=place)
  start, frozen = job.student_params(options, CFG, params, 0, place)
  assert [name for name, _ in tree.named_leaves(start)] == ['layers/down/down', 'layers/down/up', 'layers/q/down',
                                                           'layers/q/up', 'sinks']
  assert start['layers']['q']['down'].shape == (2, 16, 4) and start['layers']['down']['up'].shape == (2, 4, 16)
  assert start['layers']['q']['up'].sharding.spec[2] == 'tensor' and start['layers']['q']['down'].sharding.spec[1] == 'fsdp'
  assert frozen.keys() == params.keys() - {'sinks'}
  start |= {'sinks': params['sinks']}
  np.testing.assert_array_equal(hidden(lora.attach(frozen, start, options.lora)), hidden(params))


@pytest.mark.parametrize('fields, message', [
    ({'rank': -1}, 'lora.rank=-1'), ({'rank': 2, 'alpha': 0.0}, 'lora.alpha=0.0'),
    ({'rank': 2, 'targets': ('q', 'gates')}, "did you mean 'gate'")])
def test_options_that_are_no_good(fields, message):
  with pytest.raises(ValueError, match=message):
    lora.LoraOptions(**fields)


def test_a_difference_needs_a_model():
  config = common.base('finetune')
  config.lora.rank = 2
  with pytest.raises(ValueError, match=r'config.lora.rank=2 trains a difference to a model: config.model.source names none'):
    finetune.read(config)


WRAPPED = {'model.source': 'x', 'model.train_only': 'wrappers'}


@pytest.mark.parametrize('changes, message', [
    ({'lora.rank': 2, 'lora.targets': (), 'model.source': 'x'}, 'config.lora.targets=.*name at least one'),
    (WRAPPED, 'leaves nothing to train'), (WRAPPED | {'blocks.tails': 1, 'lora.rank': 2}, 'say what is trained'),
    (WRAPPED | {'blocks.tails': 1, 'model.source': ''}, 'config.model.source'),
    ({'model.train_only': 'heads'}, "config.model.train_only='heads'; choose one of")])
def test_what_cannot_be_trained_alone(changes, message):
  config = common.base('finetune')
  config.update_from_flattened_dict(changes)
  with pytest.raises(ValueError, match=message):
    finetune.read(config)


# Distillation with teachers of all kinds.

DISTILL = distill.DistillOptions(drop_rate=0.3, drop_mode='lift', loss_over='readers', weights=losses.TokenWeights(),
                                 temperature=1.0, ce_weight=0.0, chunk=16, accumulate=1, seed=0)
BASE = dataclasses.replace(CFG, learned_sinks=0)


def options_with(**changes) -> distill.Options:
  config = common.base('distill')
  config.update_from_flattened_dict({'model.source': 'x'} | changes)
  return distill.read(config)


def curve(devices=1, shape=(), low_rank=lora.NONE, steps=3, **changes):
  """(losses of some steps, trained parameters) of a distillation as distill.run sets it up."""
  options = options_with(**changes)
  options = dataclasses.replace(options, lora=low_rank)
  place = train_cases.placement(devices, **dict(shape))
  teacher_place = distill.teacher_placement(options, place)
  params = train_cases.params(BASE, seed=1, place=place)
  frozen = job.Frozen(distill.teacher_from(params, BASE, options.teacher, teacher_place))
  make = lambda place, **kw: transformer.Compute(impl='xla', tiles=(8, 8), placement=place, **kw)
  form = blocks.BlockOptions((0,), 'sequential', train_cases.MAX_BLOCKS)
  model = lambda compute: distill.transformer_model(BASE, compute)
  attach = (lambda base, params: lora.attach(base, params, low_rank)) if low_rank.rank else None
  models = distill.Models(model(make(place)), model(make(teacher_place, dtype=options.teacher.compute_dtype)), form, attach)
  if low_rank.rank:
    frozen = frozen.replace(base=frozen.teacher)
    params, _ = job.student_params(options, BASE, params, 0, place)
  optimizer = optim.make_optimizer(train_cases.OPTIM)
  step = distill.make_step(models, DISTILL, optimizer, optim.learning_rate(train_cases.OPTIM))
  state, history = loop.init_state(params, optimizer), []
  for seed in range(steps):
    state, values = step(state, frozen, place.put_batch(train_cases.batch(seed)))
    history.append(float(values['loss']))
  return history, state.params


@functools.cache
def plain():
  """The losses of a run on one device with a teacher of full precision."""
  return curve()[0]


@pytest.mark.slow
def test_a_teacher_by_other_rules_says_the_same():
  rules = (('heads', None), ('kv_heads', None), ('mlp', 'fsdp'), ('embed', 'tensor'), ('vocab', None))
  got, _ = curve(8, {'data': 2, 'fsdp': 2, 'tensor': 2}, **{'teacher.rules': rules})
  np.testing.assert_allclose(got, plain(), rtol=0, atol=1e-5)


def test_the_teachers_rules_place_its_parameters():
  rules = {'teacher.rules': (('embed', None), ('heads', 'fsdp'))}
  place = train_cases.placement(8, fsdp=2, tensor=2, data=2)
  other = distill.teacher_placement(options_with(**rules), place)
  teacher = distill.teacher_from(train_cases.params(BASE, place=place), BASE, options_with(**rules).teacher, other)
  assert tuple(teacher['layers']['q'].sharding.spec)[:3] == (None, None, 'fsdp')
  eight = distill.TeacherOptions(dtype='int8')
  teacher = distill.teacher_from(train_cases.params(BASE, place=place), BASE, eight, place)
  q, embed = teacher['layers']['q'], teacher['embed']
  assert tuple(q.values.sharding.spec)[:3] == (None, 'fsdp', 'tensor') and tuple(q.scale.sharding.spec)[:3] == (
      None, None, 'tensor')
  assert tuple(embed.scale.sharding.spec)[0] == 'tensor' and embed.scale.shape == (train_cases.VOCAB, 1)


def test_a_teacher_reads_the_students_batch():
  place = train_cases.placement(8, data=4, context=2)
  with pytest.raises(ValueError, match="config.teacher.rules places 'batch' on \\('fsdp',\\)"):
    distill.teacher_placement(options_with(**{'teacher.rules': (('batch', 'fsdp'),)}), place)


@pytest.mark.slow
def test_teachers_of_fewer_bits_say_nearly_the_same():
  eight, _ = curve(**{'teacher.dtype': 'int8'})
  half, _ = curve(**{'teacher.dtype': 'bfloat16'})
  for other in (eight, half):
    assert other != plain()
    np.testing.assert_allclose(other, plain(), rtol=0.05)


def test_a_student_of_low_rank_starts_as_the_teacher_and_learns():
  losses, params = curve(low_rank=lora.LoraOptions(rank=4, alpha=8.0))
  np.testing.assert_allclose(losses[0], plain()[0], rtol=1e-5)
  assert losses[1:] != plain()[1:]
  assert set(params) == {'layers'} and all(np.any(np.asarray(x)) for x in jax.tree.leaves(params))   # `up` has left zero


@pytest.mark.slow
def test_it_learns_the_same_beside_eight_bits_on_a_mesh():
  kinds = {'low_rank': lora.LoraOptions(rank=4, alpha=8.0), 'teacher.dtype': 'int8'}
  one, many = curve(**kinds)[0], curve(8, {'fsdp': 2, 'tensor': 2, 'context': 2}, **kinds)[0]
  np.testing.assert_allclose(many, one, rtol=0, atol=2e-5)


# Whole runs: to_hf and evaluate merge what a run has trained with the model that it started from.

folder = run_cases.folder   # a teacher, examples and a config file of both


def adapted_run(folder, workdir, trainer, **changes):
  """The workdir of a run on eight devices, its model and what it has trained."""
  config = run_cases.get_config(folder, trainer.__name__.rpartition('.')[2])
  config.update_from_flattened_dict({'steps': 3, 'save_every': 3, 'mesh.data': 2, 'mesh.fsdp': 2, 'mesh.tensor': 2,
                                     'lora.rank': 2, 'lora.alpha': 4.0} | changes)
  return workdir, *trainer.run(trainer.read(config), workdir)[:2]


@pytest.fixture(scope='module')
def distilled(folder, tmp_path_factory):
  with jax.numpy_dtype_promotion('standard'):   # optax
    return adapted_run(folder, tmp_path_factory.mktemp('lora') / 'run', distill)


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['distill', 'finetune'])
def test_a_run_is_exported_as_one_model(folder, distilled, tmp_path, kind, capsys):
  run, cfg, own = distilled if kind == 'distill' else adapted_run(folder, tmp_path / 'run', finetune)
  assert cfg.learned_sinks == 2 and set(own) == {'layers', 'sinks'}
  stored = checkpoint.load_meta(run / 'checkpoints')
  assert stored['lora']['rank'] == 2 and stored['source'] == f'{folder}/teacher'
  assert convert.main(['to_hf', str(run), str(tmp_path / 'out'), '--dtype', 'float32']) == 0
  _, exported = hf_convert.load(tmp_path / 'out', 'float32')
  _, base = hf_convert.load(folder / 'teacher', 'float32')
  merged = lora.merge(base, jax.device_get(own), lora.LoraOptions(2, 4.0))
  for (name, got), (_, want) in zip(tree.named_leaves(exported), tree.named_leaves(merged), strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7, err_msg=name)
  assert np.abs(np.asarray(merged['layers']['q']) - np.asarray(base['layers']['q'])).max() > 1e-4
  np.testing.assert_array_equal(merged['embed'], base['embed'])
  subject, _ = gap.load(str(run), 'block', transformer.Compute(impl='xla'))
  np.testing.assert_allclose(subject.params['layers']['down'], merged['layers']['down'], rtol=1e-6, atol=1e-7)


def test_a_base_that_is_gone_or_another_is_named(folder, distilled, tmp_path, capsys):
  run = distilled[0]
  moved = folder / 'moved_teacher'
  (folder / 'teacher').rename(moved)
  try:
    assert convert.main(['to_hf', str(run), str(tmp_path / 'out')]) == 2
    assert 'is not there now: say where it is with --source' in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match='holds a LoRA student, to be merged with the model that it started from'):
      gap.load(str(run), 'block', transformer.Compute(impl='xla'))
    assert convert.main(['to_hf', str(run), str(tmp_path / 'out'), '--source', str(moved), '--dtype',
                         'bfloat16']) == 0   # rounded, but the same
  finally:
    moved.rename(folder / 'teacher')
  said = hf_config.read_meta(tmp_path / 'out')['source_weights']
  assert said == hf_convert.weights_facts(hf_convert.load(folder / 'teacher', 'float32')[1])
  with run_cases.overwritten(folder):
    for command in (['--dtype', 'bfloat16'], []):
      assert convert.main(['to_hf', str(run), str(tmp_path / 'y'), *command]) == 2
      assert re.search('the LoRA student in .*/run was made from other weights than lie in .*/teacher now .* put the old '
                       'ones back, or name the folder that has them with --source', capsys.readouterr().err)
  other = dataclasses.replace(run_cases.MODEL, layers=3)
  hf_convert.save(hf_cases.random_params(other, 'float32'), other, tmp_path / 'other', source=folder / 'tokenizer', meta={},
                  card='', dtype='float32')
  assert convert.main(['to_hf', str(run), str(tmp_path / 'x'), '--source', str(tmp_path / 'other')]) == 2
  assert 'LoRA student of another model' in capsys.readouterr().err


@pytest.mark.slow
def test_wrappers_are_all_that_is_trained_and_saved(folder, tmp_path, capsys):
  changes = {'lora.rank': 0, 'model.train_only': 'wrappers', 'blocks.tails': 2, 'blocks.tail_kind': 'link', 'blocks.seam': 2}
  run, cfg, own = adapted_run(folder, tmp_path / 'run', distill, **changes)
  assert cfg.learned_sinks == 4 and set(own) == {'sinks'} and own['sinks'].shape == (4, cfg.width)
  config = run_cases.get_config(folder)
  config.update_from_flattened_dict(changes)
  base = dataclasses.replace(cfg, learned_sinks=0)
  made = distill.build(distill.read(config), train_cases.placement(1), base, platform='cpu')
  assert {x.shape for x in jax.tree.leaves(made.state)} == {(), (4, cfg.width)}   # no moments of anything else
  assert convert.main(['to_hf', str(run), str(tmp_path / 'out'), '--dtype', 'float32']) == 0
  _, exported = hf_convert.load(tmp_path / 'out', 'float32')
  _, base = hf_convert.load(folder / 'teacher', 'float32')
  np.testing.assert_array_equal(exported.pop('sinks'), own['sinks'])
  for (name, got), (_, want) in zip(tree.named_leaves(exported), tree.named_leaves(base), strict=True):
    np.testing.assert_array_equal(got, want, err_msg=name)
  assert np.ptp(np.asarray(own['sinks']), axis=0).min() > 0   # all began as one token's row
  subject, _ = gap.load(str(tmp_path / 'out'), 'block', transformer.Compute(impl='xla'))
  vocab = subject.cfg.vocab
  assert subject.options == made.blocks and made.blocks.tail_ids == (vocab + 2, vocab + 3) and made.blocks.links
  assert convert.main(['to_hf', str(run), str(tmp_path / 'rows'), '--dtype', 'float32', '--wrappers']) == 0
  alone, _ = gap.load(str(tmp_path / 'rows'), 'block', transformer.Compute(impl='xla'))
  assert alone.cfg == subject.cfg and alone.options == subject.options
  for (name, got), (_, want) in zip(tree.named_leaves(alone.params), tree.named_leaves(subject.params), strict=True):
    np.testing.assert_array_equal(got, want, err_msg=name)
  assert sum(path.stat().st_size for path in (tmp_path / 'rows').glob('*.safetensors')) < 1000
  with run_cases.overwritten(folder), pytest.raises(ValueError, match='made from other weights than lie in'):
    hf_convert.load(tmp_path / 'rows', 'float32')


def test_wrappers_of_a_run_that_trained_more_are_refused(distilled, tmp_path, capsys):
  assert convert.main(['to_hf', str(distilled[0]), str(tmp_path / 'rows'), '--wrappers']) == 2
  assert 'trained more than wrappers' in capsys.readouterr().err
