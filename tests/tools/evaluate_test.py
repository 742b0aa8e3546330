"""tools.evaluate from folders and files to tables, with models of a few thousand random parameters."""

import dataclasses
import io
import json

import data_cases
import hf_cases
import jax
import numpy as np
import pyarrow
import pytest
import rich.console
from pyarrow import parquet

from blockattn import blocks, checkpoint, loading
from blockattn.data import json_lines
from blockattn.evals import gap
from blockattn.hf import config as hf_config
from blockattn.models import transformer
from blockattn.segmentation import segmenter
from blockattn.train import job
from tools import evaluate, report

OPTIONS = blocks.BlockOptions(sink_ids=(5, 6), positions='local', max_blocks=8)
COMPUTE = transformer.Compute(impl='reference')
CHAT = {'messages': [{'role': 'user', 'content': 'a long passage'}, {'role': 'assistant', 'content': 'I see.'},
                     {'role': 'user', 'content': 'what is it?'}, {'role': 'assistant', 'content': 'the answer'}]}
BLOCKS = {'blocks': ['one two ', 'three '], 'prompt': 'count:', 'response': ' four', 'id': 'count'}


def test_a_segmenter_is_no_model_to_ask():
  with pytest.raises(ValueError, match='assets/tiny_segmenter is a segmenter .*ForTokenClassification.: it cuts texts'):
    gap.load(segmenter.EMBEDDED, 'block', COMPUTE)


@pytest.fixture(scope='module')
def models(tmp_path_factory):
  """(teacher folder, student folder); the same architecture, other values, and the student knows its block options."""
  root = tmp_path_factory.mktemp('models')
  tokenizer = data_cases.tiny_tokenizer()
  said = {'kind': 'distill', 'blocks': hf_config.blocks_meta(OPTIONS)}
  return (hf_cases.save_model(root / 'teacher', tokenizer, {})[0],
          hf_cases.save_model(root / 'student', tokenizer, said, seed=1)[0])


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  folder = tmp_path_factory.mktemp('data')
  return data_cases.write_lines(folder / 'test.jsonl', [data_cases.passages_line(0), BLOCKS, b'{', CHAT])


def arguments(models, data, *more):
  teacher, student = models
  return [str(student), '--teacher', str(teacher), '--data', str(data), '--batch', '4', '--max-new', '3',
          '--impl', 'reference', *more]


def test_from_folders_to_summary(models, data, tmp_path, capsys, monkeypatch):
  hashed, key = [], evaluate.weights_key
  monkeypatch.setattr(evaluate, 'weights_key', lambda subject: hashed.append(subject) or key(subject))
  assert evaluate.main(arguments(models, data, '--modes', 'block', '--out', str(tmp_path / 'out'))) == 0
  printed = capsys.readouterr().out
  assert len(hashed) == 2   # of three subjects, two are the teacher
  summary = json.loads((tmp_path / 'out' / 'summary.json').read_text())
  assert summary['malformed_lines'] == 1 and 'test.jsonl:3: bad JSON' in printed
  rows = [json.loads(line) for line in (tmp_path / 'out' / 'documents.jsonl').read_text().splitlines()]
  assert {row['id'] for row in rows} >= {'q0', 'count'} and len(rows) == 3
  for name in ('teacher_full', 'teacher_block', 'student_block'):
    assert name in printed and summary[name]['n'] == 3 and name in rows[0]['models']
    assert sum(row['tokens'] for row in summary[name]['by_distance']) == sum(
        row['tokens'] for row in summary['teacher_full']['by_distance']) > 0
  assert list(summary['seconds']) == ['evaluate']
  assert summary['teacher_full']['kl'] == pytest.approx(0, abs=1e-6)
  assert summary['student_block']['kl'] > 0.01 and summary['teacher_block']['kl'] > 1e-4
  closed = 1 - summary['student_block']['kl'] / summary['teacher_block']['kl']
  assert summary['closed']['kl']['mean'] == pytest.approx(closed)
  assert 'student_block makes good' in printed
  assert not list((tmp_path / 'out').rglob('*.tmp'))
  page = report.render(tmp_path / 'out').read_text()
  assert 'one two ' in page and 'Student, blocks' in page and 'What the student in block mode makes good' in page
  # Again: nothing is computed, and the same is said.
  monkeypatch.setattr(gap, '_measure_batch', None)
  assert evaluate.main(arguments(models, data, '--modes', 'block', '--out', str(tmp_path / 'out'))) == 0
  again = capsys.readouterr()
  assert again.out == printed and 'evaluating 9/9' in again.err
  assert evaluate.main(arguments(models[::-1], data, '--modes', 'block', '--out', str(tmp_path / 'out'))) == 2
  assert 'come from another run' in capsys.readouterr().err


@pytest.mark.slow
def test_the_dial_between_tokens_read_again_and_quality(models, data, tmp_path, capsys):
  out = tmp_path / 'out'
  assert evaluate.main(arguments(models, data, '--modes', 'block', '--seams', '0,2,64', '--out', str(out))) == 0
  summary, printed = json.loads((out / 'summary.json').read_text()), capsys.readouterr().out
  of = [summary[f'student_block_seam_{seam}'] for seam in (0, 2, 64)]
  assert of[0]['kl'] == summary['student_block']['kl'] and min(one['kl'] for one in of) > 0
  assert 0 == of[0]['recomputed'] < of[1]['recomputed'] < of[2]['recomputed'] < 1   # never the first blocks
  assert 'recomputed' in printed and f'{of[1]["recomputed"]:.1%}' in printed
  assert (summary['teacher_full']['recomputed'], summary['student_block']['recomputed']) == (1, 0)


def test_rivals_stand_beside_the_student(models, data, tmp_path, capsys):
  out, plot, asked = tmp_path / 'out', tmp_path / 'plot.svg', 'epic:0,epic:2,star,ape:0.9:0.8:1,cacheblend:0.25'
  more = '--modes', 'block', '--rivals', asked, '--out', str(out), '--plot', str(plot)
  assert evaluate.main(arguments(models, data, *more)) == 0
  summary, printed = json.loads((out / 'summary.json').read_text()), capsys.readouterr().out
  own = {name: summary[f'teacher_{name}'] for name in asked.split(',')}
  assert all(f'teacher_{name}' in printed and one['n'] == 3 for name, one in own.items())
  far = [name for name, one in own.items() if one['kl'] > 1e-4]
  assert far == ['ape:0.9:0.8:1']   # the keys and values of the only layer are those of full attention
  assert [name for name, one in own.items() if one['recomputed'] > 0] == ['epic:2', 'cacheblend:0.25']
  drawn = plot.read_text()
  assert all(f'>{name}<' in drawn for name in ('teacher_full', 'student_block', 'teacher_epic', 'teacher_cacheblend'))
  said = json.loads((out / 'run.json').read_text())['models']
  assert said['teacher_cacheblend:0.25']['reading'] == 'CacheBlend(share=0.25)' and 'reading' not in said['teacher_block']


def test_a_student_is_loaded_once_for_all_modes(models):
  teacher, student = models
  subjects, teacher_subject, _ = gap.load_pair(student, teacher, ('full', 'block'), COMPUTE)
  assert list(subjects) == ['teacher_full', 'teacher_block', 'student_full', 'student_block']
  assert [subject.mode for subject in subjects.values()] == ['full', 'block', 'full', 'block']
  assert subjects['teacher_full'] is teacher_subject
  assert subjects['teacher_block'].options == dataclasses.replace(OPTIONS, sink_ids=())
  assert subjects['student_full'].params is subjects['student_block'].params


def test_subject_of_a_folder_and_of_a_workdir(models, tmp_path):
  teacher, student = models
  from_folder, tokenizer = gap.load(student, 'block', COMPUTE)
  assert from_folder.options == OPTIONS and from_folder.mode == 'block'
  assert gap.load(teacher, 'full', COMPUTE)[0].options.sink_ids == ()
  meta = job.model_meta(from_folder.cfg, OPTIONS, str(student), 'distill')
  checkpoint.save_params(tmp_path / 'checkpoints', from_folder.params, meta)
  from_workdir, same_tokenizer = gap.load(tmp_path, 'block', COMPUTE)
  assert (from_workdir.cfg, from_workdir.options) == (from_folder.cfg, OPTIONS)
  jax.tree.map(np.testing.assert_array_equal, from_workdir.params, from_folder.params)
  assert same_tokenizer.get_vocab() == tokenizer.get_vocab()


def test_the_tokenizer_of_a_run_is_that_of_its_config(models, tmp_path):
  _, student = models
  (tmp_path / 'checkpoints').mkdir()
  (tmp_path / 'config.json').write_text(json.dumps({'data': {'tokenizer': str(student)}, 'model': {'source': ''}}))
  assert loading.tokenizer_of(tmp_path) == str(student)


@pytest.mark.parametrize('change, code, message', [
    (['--strict'], 2, 'test.jsonl:3: bad JSON'),
    (['--modes', 'ful'], 2, '--modes ful'), (['--seams', '1,two'], 2, '--seams 1,two'),
    (['--rivals', 'epik:8'], 2, '--rivals epik:8: give some of epic:tokens'),
    (['--teacher', '/nowhere/teacher'], 2, '/nowhere/teacher'),
    (['--data', '/nowhere/*.jsonl'], 2, '/nowhere/*.jsonl'),
    (['--max-new', '600'], 2, 'documents are too long for teacher_full'),
])
def test_what_is_wrong_is_said(models, data, change, code, message, capsys):
  assert evaluate.main(arguments(models, data, *change)) == code
  assert message in capsys.readouterr().err


def test_parquet_is_read_too(models, tmp_path, capsys):
  file = tmp_path / 'test.parquet'
  parquet.write_table(pyarrow.Table.from_pylist([data_cases.passages_line(0)]), file)
  assert evaluate.main(arguments(models, file, '--max-new', '600')) == 2
  assert '1 of 1 documents are too long for teacher_full' in capsys.readouterr().err


def test_a_teacher_with_another_tokenizer_is_refused(models, data, tmp_path, capsys):
  other = data_cases.tiny_tokenizer()
  other.add_tokens(['one more'])
  teacher = hf_cases.save_model(tmp_path / 'other', other, {})[0]
  data_cases.tiny_tokenizer.cache_clear()   # it has the new token, too
  assert evaluate.main(arguments((teacher, models[1]), data)) == 2
  assert "first 'one more'" in capsys.readouterr().err


def test_students_of_another_rule_for_sinks_are_refused():
  before = json.loads(json.dumps(hf_config.blocks_meta(OPTIONS)))   # as a file gives it
  del before['sinks_stand']
  with pytest.raises(ValueError, match='here: this student was trained with sinks in front of every block but the first'):
    hf_config.block_options({'blocks': before}, where='here')
  assert hf_config.block_options({'blocks': before | {'sink_ids': []}}).sink_ids == ()


def test_documents_and_examples_stay_together(models, data):
  tokenizer = gap.load(models[1], 'full', COMPUTE)[1]
  docs, examples, report = evaluate.file_docs([data], tokenizer, limit=2)
  assert [len(doc.lengths) for doc in docs] == [len(example.blocks) + 1 for example in examples] == [4, 3]
  assert (report.examples, report.docs) == (2, 2)
  with pytest.raises(json_lines.BadLineError):
    evaluate.file_docs([data], tokenizer, strict=True)


def test_the_table_of_distances_has_a_column_per_subject():
  row = {'from': 4, 'tokens': 1200, 'ce': 0.5, 'kl': 0.25}
  figures = {'n': 3, 'exact_match': 0.5, 'substring': 1.0, 'f1': 0.75, 'ce': 0.5, 'kl': 0.25, 'recomputed': 0.125,
             'by_distance': [row], 'intervals': {'exact_match': {'low': 0.4, 'high': 0.6}}}
  console = rich.console.Console(file=io.StringIO(), width=120)
  closed = {'exact_match': {'mean': 0.5, 'low': 0.4, 'high': 0.6}}
  evaluate.print_table({'a': figures, 'b': figures, 'closed': closed, 'seconds': {'a': 1.0}}, console)
  text = console.file.getvalue()
  assert '50.0%' in text and '[40.0%, 60.0%]' in text and '1,200' in text and text.count('0.5000 / 0.2500') == 2
