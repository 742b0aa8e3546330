"""The main job on the embedded default, with as few steps as show that every part runs."""

import json
import pathlib
import subprocess
import sys

import pytest
import run_cases

from configs import tiny
from tools import demo

pytestmark = pytest.mark.slow


def run(folder, *more):
  """What the demo prints."""
  command = [sys.executable, '-m', 'tools.demo', '--workdir', str(folder), '--steps', '2', '--docs', '4', *more]
  done = subprocess.run(command, cwd=pathlib.Path(demo.__file__).parents[1], capture_output=True, text=True,
                        env=run_cases.environment(folder.parent))
  assert done.returncode == 0, done.stdout + done.stderr
  return done.stdout


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  folder = tmp_path_factory.mktemp('demo') / 'run'
  assert 'Next:' in run(folder)
  return folder


def test_a_model_of_a_folder_is_trained_by_lora(tmp_path):
  said = run(tmp_path / 'run', '--model', str(tiny.TEACHER))
  assert 'The first token after 1,024 tokens' in said and 'fine-tuned' not in said
  summary = json.loads((tmp_path / 'run/summary.json').read_text())
  assert {'teacher_full', 'teacher_block', 'student_block', 'closed', 'first_token'} <= set(summary)
  assert {'corpus', 'distill', 'evaluate', 'first token', 'export'} == set(summary['seconds'])
  assert json.loads((tmp_path / 'run/config.json').read_text())['lora']['rank'] == 16
  assert (tmp_path / 'run/student/model.safetensors').is_file() and (tmp_path / 'run/report.html').is_file()


def test_everything_is_left_in_the_workdir(workdir):
  for name in ('config.json', 'run.json', 'metrics.jsonl', 'summary.json', 'report.html', 'checkpoints/2/params',
               'block_finetuned/metrics.jsonl', 'student/model.safetensors', 'student/blockattn.json',
               'student/README.md'):
    assert (workdir / name).exists(), name
  assert list((workdir / 'tensorboard').iterdir())


def test_the_summary_has_every_figure(workdir):
  summary = json.loads((workdir / 'summary.json').read_text())
  for name in demo.MODELS:
    assert {'exact_match', 'ce', 'kl'} <= set(summary[name])
  assert summary['teacher_full']['kl'] == pytest.approx(0, abs=1e-6)
  assert summary['teacher_block']['kl'] > 0
  assert {'corpus', 'distill', 'finetune', 'evaluate', 'first token', 'export'} == set(summary['seconds'])
  assert min(summary['first_token'].values()) > 0


def test_the_export_is_a_subject_of_the_evaluation(workdir):
  from blockattn.evals import gap
  from blockattn.models import transformer
  subject, tokenizer = gap.load(workdir / 'student', 'block', transformer.Compute())
  assert subject.options.overlap == tiny.get_config().blocks.overlap > 0
