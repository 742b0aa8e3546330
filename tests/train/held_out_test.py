"""Held-out figures while a model trains: the same as those of an evaluation, the best step kept, an end, exports."""

import dataclasses
import functools
import json
import shutil

import data_cases
import jax
import numpy as np
import pytest
import run_cases
from run_cases import Numbers, get_config, run_loop

from blockattn import checkpoint, loading, metrics
from blockattn.data import encode
from blockattn.evals import gap
from blockattn.hf import config as hf_config, convert
from blockattn.models import transformer
from blockattn.train import command, distill, finetune, held_out, inputs, job, loop
from configs import common
from tools import evaluate, report

folder = run_cases.folder   # a teacher, examples and a config file of both
MESH = {'mesh.data': 2, 'mesh.fsdp': 2, 'mesh.tensor': 2}
HELD = {'eval.every': 2, 'eval.rows': 6, 'eval.batch': 4, 'eval.answers': 3, 'eval.max_new': 2}


@pytest.fixture(scope='module')
def held(folder):
  """Files that nothing is trained on."""
  for name, numbers in (('a', range(50, 54)), ('b', range(60, 70))):
    lines = [{'blocks': [f'{i} is {i * i}. ' * (1 + j % 2) for j in range(1 + i % 2)], 'prompt': f'what is {i}? ',
              'response': str(i * i)} for i in numbers]
    data_cases.write_lines(folder / f'held_{name}.jsonl', lines)
  return folder / 'held_a.jsonl', folder / 'held_b.jsonl'


def changed(config, **more):
  config.update_from_flattened_dict(MESH | {'steps': 6, 'save_every': 3, 'optim.warmup': 0} | more)
  return config


def lines_of(workdir):
  """{step: the held-out figures}."""
  return {line['step']: {name: x for name, x in line.items() if name.startswith('eval/')}
          for line in metrics.read_metrics(workdir / 'metrics.jsonl') if 'eval/best' in line}


@pytest.mark.slow
@pytest.mark.usefixtures('standard_promotion')   # optax
def test_a_distillation_measures_what_an_evaluation_does(folder, held, capsys, monkeypatch):
  """On a mesh of eight devices, against one device that reads what the run kept."""
  config, workdir = get_config(folder), folder / 'measured'
  changed(config, **HELD, **{'data.eval_files': tuple(map(str, held)), 'export_every': 3, 'optim.lr': 3e-2})
  distill.run(distill.read(config), workdir)
  lines = lines_of(workdir)
  assert list(lines) == [2, 4, 6]
  kls = {step: line['eval/block/kl'] for step, line in lines.items()}
  best = min(kls, key=kls.get)
  assert lines[6]['eval/best'] == kls[best] and checkpoint.steps(workdir / 'best') == [best]
  meta = checkpoint.load_meta(workdir / 'best')
  assert (meta['step'], meta['eval'], meta['kind']) == (best, {'figure': 'block/kl', 'value': kls[best]}, 'distill')
  assert checkpoint.load_meta(workdir / 'checkpoints')['eval']['step'] == best

  # What stands for the run is its best step; any other one is asked for by its folder.
  subjects, teacher, tokenizer = gap.load_pair(workdir, folder / 'teacher', gap.MODES, transformer.Compute(impl='reference'))
  a, b = (evaluate.file_docs([str(file)], tokenizer, chat=subjects['student_block'].chat)[:2] for file in held)
  docs, examples = ([x for pair in zip(*(part[i][:3] for part in (a, b)), strict=True) for x in pair] for i in (0, 1))
  measure_of = functools.partial(gap.measure, teacher=teacher, tokenizer=tokenizer, batch=6)
  rows = measure_of(subjects, docs=docs, examples=examples, max_new=0)
  known, found = gap.figures(rows), lines[best]
  for mine, theirs in (('block', 'student_block'), ('full', 'student_full'), ('start_full', gap.TEACHER),
                       ('start_block', gap.BEFORE)):
    for measure in ('ce', 'kl'):
      np.testing.assert_allclose(found[f'eval/{mine}/{measure}'], known[theirs][measure], rtol=2e-4, atol=1e-6)
    assert {f'eval/{mine}/{measure}' for measure in held_out.SCORES} <= found.keys()
  student = {'it': subjects['student_block']}
  scored = gap.figures(measure_of(student, docs=docs[:3], examples=examples[:3], max_new=2))['it']
  assert [found[f'eval/block/{measure}'] for measure in held_out.SCORES] == [scored[m] for m in held_out.SCORES]
  for at in known['student_block']['by_distance']:
    np.testing.assert_allclose(found[f'eval/block/kl_by_distance/{at["from"]}'], at['kl'], rtol=2e-4)
  closed = gap.share_closed(rows, gap.TEACHER, gap.BEFORE, 'student_block')
  assert {name for name in found if name.startswith('eval/closed/') and name.endswith(('kl', 'ce'))} == {
      f'eval/closed/{m}' for m in closed if m in held_out.DISTANCES}
  several = [row for row, doc in zip(rows, docs, strict=True) if 2 <= len(doc.lengths) < 4]
  np.testing.assert_allclose(found['eval/block/ce_by_blocks/2'], gap.figures(several)['student_block']['ce'], rtol=2e-4)

  # Exports, each the model at its step.
  assert sorted(path.name for path in (workdir / 'exports').iterdir()) == ['step_3', 'step_6']
  assert hf_config.read_meta(workdir / 'exports/step_3')['step'] == 3
  _, exported = convert.load(workdir / 'exports/step_6', 'float32')
  jax.tree.map(np.testing.assert_array_equal, exported, loading.load(workdir / 'checkpoints' / '6').params)
  page = report.render(workdir).read_text()
  assert 'eval/block/kl by step' in page and 'eval/block/kl_by_distance, by part' in page

  # What was found is said in a line, and so is what was written.
  out = capsys.readouterr().out
  told = [f'{name} {lines[best][f"eval/{name}"]:.4g}' for name in ('block/kl', 'closed/kl', 'block/ce', 'block/f1')
          if f'eval/{name}' in lines[best]]
  assert f'step {best}: held out {told[0]} (best), {", ".join(told[1:])}' in out
  assert f'step 3: exported to {workdir}/exports/step_3\n' in out

  # A finished run that is started again measures nothing; the command loads nothing either.
  text = (workdir / 'metrics.jsonl').read_text()
  distill.run(distill.read(config), workdir)
  assert (workdir / 'metrics.jsonl').read_text() == text and 'finished already: step 6' in capsys.readouterr().out
  options = distill.read(config)
  assert job.finished(options, workdir).startswith(f'finished already: step 6 of 6 is saved in {workdir}/checkpoints. To ')
  assert not job.finished(options, folder)
  monkeypatch.setattr(command, 'read_config', lambda argv: (config, [f'--workdir={workdir}']))
  with pytest.raises(SystemExit):
    command.main(distill.Options, lambda *_: pytest.fail('it was run'))
  assert 'finished already: step 6' in capsys.readouterr().out
  config.seed += 1
  with pytest.raises(ValueError, match='holds a run with another config: seed was'):
    job.finished(distill.read(config), workdir)


@pytest.mark.slow
@pytest.mark.usefixtures('standard_promotion')
def test_a_lora_student_is_fine_tuned_exported_and_measured_by_cross_entropy(folder, held):
  config, workdir = get_config(folder, 'finetune'), folder / 'tuned'
  changed(config, **HELD | {'data.eval_files': (str(held[0]),), 'export_every': 2, 'steps': 2, 'save_every': 2,
                            'lora.rank': 2, 'eval.answers': 0, 'blocks.sink_kind': 'token', 'blocks.sinks': 1})
  finetune.run(finetune.read(config), workdir)
  line = lines_of(workdir)[2]
  assert line['eval/best'] == line['eval/block/ce'] and checkpoint.steps(workdir / 'best') == [2]
  assert not [name for name in line if 'kl' in name or 'f1' in name]
  _, exported = convert.load(workdir / 'exports/step_2', 'float32')
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), exported, loading.load(workdir).params)


@pytest.mark.slow
def test_two_processes_measure_what_one_does(folder, held):
  overrides = [f'--config.{key}={value}' for key, value in HELD.items()] + [
      f'--config.data.eval_files={held[1]}', '--config.steps=2', '--config.save_every=2',
      '--config.optim.warmup=1', '--config.export_every=2']
  trainer = lambda name: ['-m', 'blockattn.train.distill', f'--config={folder}/config.py', f'--workdir={folder / name}',
                          *overrides]
  result = run_cases.start(folder, folder / 'one', overrides=overrides)
  assert result.returncode == 0, result.stderr
  ends, _ = run_cases.pair(folder, *[trainer('two')] * 2)
  assert [code for code, _ in ends] == [0, 0], ends
  one, two = (lines_of(folder / name)[2] for name in ('one', 'two'))
  assert one.keys() == two.keys()
  for name in one.keys() - {'eval/seconds'}:
    np.testing.assert_allclose(two[name], one[name], rtol=1e-3, atol=1e-5, err_msg=name)
  assert checkpoint.steps(folder / 'two/best') == [2]
  checkpoint.verify(folder / 'two/best', 2)
  assert (folder / 'two/exports/step_2/config.json').exists()


# The best step and the end, with figures that are told.


class Told(held_out.Evaluation):
  """Finds at step n the n-th of some values."""

  def __init__(self, workdir, values, patience=0, every=1):
    options = held_out.EvalOptions(every=every, patience=patience)
    super().__init__(held_out.HeldOut([], [], None), options, steps=10, figure='block/kl', subjects=lambda params: params,
                     start={}, teacher=None, tokenizer=None, batch=1, put=None, keep=self._write, folder=workdir / 'best')
    self._values = values

  def _write(self, params, step, found):
    checkpoint.save_params(self._folder, params, {'eval': found}, step)

  def _measure(self, subjects):
    return int(subjects['w'])

  def figures(self, rows):
    return {'block/kl': float(self._values[rows - 1])}


VALUES = (5, 4, 6, 3, 6, 2, 7, 1, 9, 8)


def ended(workdir):
  """All that a run leaves of its figures."""
  lines = {step: (line['eval/block/kl'], line['eval/best']) for step, line in lines_of(workdir).items()}
  return lines, checkpoint.steps(workdir / 'best'), checkpoint.load_meta(workdir / 'checkpoints')['eval']


def test_a_run_that_is_killed_anywhere_ends_as_if_nothing_had_happened(tmp_path):
  class Killed(Exception):
    pass

  def kill(n, at):
    if n == at:
      raise Killed

  run_loop(tmp_path / 'straight', watches=[Told(tmp_path / 'straight', VALUES)])
  known = ended(tmp_path / 'straight')
  assert known[0][6] == (2, 2) and known[0][10] == (8, 1) and known[1] == [8]
  assert (known[2]['step'], known[2]['value'], known[2]['since'], known[2]['stopped']) == (8, 1.0, 2, False)
  for at in (3, 7, 9):
    workdir = tmp_path / str(at)
    with pytest.raises(Killed):
      run_loop(workdir, Numbers(lambda n, at=at: kill(n, at)), watches=[Told(workdir, VALUES)])
    run_loop(workdir, watches=[Told(workdir, VALUES)])
    assert ended(workdir) == known
  shutil.rmtree(tmp_path / '7' / 'best')   # gone with a disk, or moved away: what is found from now on counts
  shutil.rmtree(tmp_path / '7' / 'checkpoints' / '10')
  run_loop(tmp_path / '7', watches=[Told(tmp_path / '7', VALUES)])
  assert ended(tmp_path / '7')[1] == [10]


def test_a_run_ends_when_it_gets_no_better(tmp_path, capsys):
  told = Told(tmp_path, VALUES[:6] + (7, 8, 1, 0), patience=2)
  run_loop(tmp_path, watches=[told])
  assert list(lines_of(tmp_path)) == [1, 2, 3, 4, 5, 6, 7, 8] and checkpoint.steps(tmp_path / 'best') == [6]
  said = 'block/kl no better than at step 6, 2 (config.eval.patience=2); that step stands in'
  out = capsys.readouterr().out
  assert f'ended at step 8 of 10: 2 evaluations in a row found {said}' in out
  assert [line for line in out.splitlines() if line.startswith('step')][-3:] == [
      'step 6: held out block/kl 2 (best)', 'step 7: held out block/kl 7 (best is 2 of step 6)',
      'step 8: held out block/kl 8 (best is 2 of step 6)']
  assert checkpoint.newest_step(tmp_path / 'checkpoints') == 8 and checkpoint.is_finished(tmp_path / 'checkpoints', 10)
  again = Numbers(before=lambda n: pytest.fail('a batch was read'))
  run_loop(tmp_path, again, watches=[Told(tmp_path, VALUES, patience=2)])
  assert 'finished already: step 8 of 10' in capsys.readouterr().out
  run_loop(tmp_path, watches=[Told(tmp_path, VALUES[:6] + (7, 8, 1, 0), patience=3)])   # more patience: it goes on
  assert checkpoint.steps(tmp_path / 'best') == [10] and lines_of(tmp_path)[10]['eval/best'] == 0


def test_what_is_not_finite_is_not_best(tmp_path, capsys):
  run_loop(tmp_path, watches=[Told(tmp_path, (np.nan, 3, np.nan, 2) + (np.nan,) * 6)])
  assert checkpoint.steps(tmp_path / 'best') == [4]
  assert 'step 1: held out block/kl nan (no best yet)' in capsys.readouterr().out


def test_figures_of_other_documents_are_not_compared(tmp_path):
  run_loop(tmp_path, watches=[Told(tmp_path, VALUES)], steps=4)
  other = Told(tmp_path, (9,) * 10)
  other._of = 'other documents'
  run_loop(tmp_path, watches=[other])
  assert checkpoint.steps(tmp_path / 'best') == [5] and lines_of(tmp_path)[5]['eval/best'] == 9


def test_a_watch_that_never_looks_changes_nothing(tmp_path):
  run_loop(tmp_path / 'a', watches=[loop.Watch()])
  run_loop(tmp_path / 'b')
  without_time = lambda name: [line | {'time': 0, 'steps_per_s': 0, 'tokens_per_s': 0, 'seconds_left': 0} for line in
                               metrics.read_metrics(tmp_path / name / 'metrics.jsonl')]
  assert without_time('a') == without_time('b')


# What is read, and what is refused.


def test_documents_are_as_many_of_each_file(folder, held, monkeypatch):
  data = finetune.read(get_config(folder, 'finetune')).data
  data = dataclasses.replace(data, eval_files=tuple(map(str, held)))
  tokenizer = data_cases.tiny_tokenizer()
  made, encoder = [], encode.Encoder
  monkeypatch.setattr(encode, 'Encoder', lambda *args, **more: made.append('encoder') or encoder(*args, **more))
  monkeypatch.setattr(inputs, 'load_cutter', lambda *_: made.append('cutter'))
  found = held_out.read(data, 5, tokenizer)
  assert sorted(made) == ['cutter', 'encoder']   # for all files
  assert [example.response for example in found.examples] == [str(i * i) for i in (50, 60, 51, 61, 52)]
  assert [doc.answer[1] for doc in found.docs] == [len(doc.tokens) for doc in found.docs] and found.stop is None
  with pytest.raises(ValueError, match='not one document with an answer fits into config.data.length=4'):
    held_out.read(dataclasses.replace(data, length=4), 5, tokenizer)


@pytest.mark.parametrize('trainer, changes, message', [
    ('distill', {'eval.best': 'block/loss'}, "config.eval.best='block/loss'; choose one of , block/kl"),
    ('distill', {'eval.patience': 3, 'data.eval_files': ()}, 'config.eval.patience=3 need held-out documents'),
    ('distill', {'teacher.logits': 'x', 'eval.best': 'full/kl'}, "config.eval.best='full/kl': no teacher is at work here"),
    ('distill', {'eval.best': 'block/f1', 'eval.answers': 0}, "config.eval.best='block/f1' is a score of answers"),
    ('distill', {'export_every': 5, 'lora.rank': 4, 'teacher.dtype': 'int8'}, 'export afterwards, with tools.convert to_hf'),
    ('finetune', {'eval.best': 'block/kl'}, "config.eval.best='block/kl': no teacher is at work here; choose block/ce"),
    ('finetune', {'finetune.mode': 'full', 'eval.best': 'block/ce'}, 'this run measures full attention only')])
def test_what_is_refused_is_one_line(trainer, changes, message):
  config = common.base(trainer)
  config.update_from_flattened_dict({'model.source': 'teacher', 'data.eval_files': ('held.jsonl',)} | changes)
  with pytest.raises(ValueError, match=message) as refused:
    {'distill': distill, 'finetune': finetune}[trainer].read(config)
  assert '\n' not in str(refused.value)


def test_without_held_out_documents_there_is_no_watch(folder):
  options = distill.read(get_config(folder))
  assert held_out.make(options, None, None, folder, student=None, compute=None, start=None, meta={}) == []
  assert json.loads(json.dumps(options.data.eval_files)) == []
