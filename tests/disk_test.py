"""Paths, files and JSON: what is refused, how it appears, and what is said of a value of another type."""

import contextlib
import importlib
import os
import pathlib
import re
import stat
import sys

import numpy as np
import pytest

from blockattn import disk, locks, metrics
from blockattn.hf import files
from blockattn.segmentation.semanticseg import schema
from blockattn.train import command, distill
from configs import common
from tools import arguments

ROOT = pathlib.Path(__file__).resolve().parents[1]
TOOLS = {'.'.join(path.relative_to(ROOT).with_suffix('').parts): path.read_text() for path in (ROOT / 'tools').rglob('*.py')}
COMMANDS = sorted(name for name, text in TOOLS.items() if 'arguments.Parser(' in text) + ['launch.sweep']


# Command lines that would write over what they read: a.jsonl is a file, `run` a folder with some.
OVER_INPUT = {
    'tools.annotate': ['a.jsonl --output ./a.jsonl --base-url http://h/v1 --model m'],
    'tools.bench.__main__': ['segment --data run --json run', 'segment --data a.jsonl --plot=a.jsonl'],
    'tools.build_semanticseg': ['run --out ./run', 'a.jsonl --out a.jsonl', 'r*n --out run'],
    'tools.compare': ['run x --json run/summary.json', 'x run --json run/predictions.jsonl',
                      '--sweep . --html run/config.json', '--sweep . --json x.json --html ./x.json'],
    'tools.convert': ['from_hf run ./run --overwrite', 'from_hf run/hf run --overwrite', 'to_hf run run',
                      'to_hf run a.jsonl --card a.jsonl'],
    'tools.device': ['run --data run'],
    'tools.evaluate': ['run --teacher x --data a.jsonl --out run', 'x --teacher run --data a.jsonl --out ./run',
                       'x --teacher y --data a.jsonl --plot a.jsonl'],
    'tools.generate': ['run a.jsonl --cache run'],
    'tools.judge': ['qa run --data a.jsonl --out run', 'qa x --data a.jsonl --out a.jsonl',
                    'qa x --data a.jsonl --out o --cache o'],
    'tools.ruler': ['run --tokenizer run'],
    'tools.runs': ['. --json run/config.json', 'run --json ./run/config.json'],
    'tools.segment': ['a.jsonl --out a.jsonl', 'run --out run/config.json', '*.jsonl --html=a.jsonl',
                      'a.jsonl --html x --out x'],
    'tools.show': ['--config CONFIG --json CONFIG', '--config=CONFIG --overrides run/config.json --json=run/config.json'],
    'tools.structure': ['a.jsonl a.jsonl --category c --license l'],
    'tools.tiny_segmenter_tokenizer': ['a.jsonl --out a.jsonl'],
}


# Places.

@pytest.mark.parametrize('text', ['gs://bucket/x', '--workdir=s3://bucket/x', '--config.data.files=a.jsonl,gs://bucket/b',
                                  'hdfs://host/x', 'file:///tmp/x'])
def test_paths_on_other_machines_are_refused(text):
  with pytest.raises(ValueError, match='^' + text.replace('.', r'\.') + ': only paths of this machine .*gcsfuse'):
    disk.check_local(['plain', text])


def test_what_only_looks_like_one_is_not():
  disk.check_local(['/data/x', 'configs/a.py:model=b', 'owner/model@main', 'https://example.org/v1', '10.0.0.1:80,2,0',
                    'What is gs://bucket for?', '--beam-options=--temp_location=gs://bucket/x', 'sub/gs://', ''])


def test_the_table_of_outputs_is_whole():
  """Every tool that has an output is in it, or has no files to read."""
  option = re.compile(rf"add(?:_argument)?\('(?:--)?(?:{'|'.join(arguments.OUTPUTS)})'(?!, action)")
  tools = {name for name, text in TOOLS.items() if option.search(text) and name in COMMANDS}
  assert tools - {'tools.meshes', 'tools.smollm2', 'tools.tiny_tokenizer'} <= set(OVER_INPUT)


@pytest.mark.parametrize('name', OVER_INPUT)
def test_no_command_writes_over_what_it_reads(name, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'a.jsonl').write_text('{"text": "my only copy"}')
  for folder in ('hf', 'checkpoints'):
    (tmp_path / 'run' / folder).mkdir(parents=True)
  for file in ('config.json', 'summary.json', 'predictions.jsonl'):
    (tmp_path / 'run' / file).write_text('{"steps": 1}')
  (tmp_path / 'tiny.py').write_text((ROOT / 'configs' / 'tiny.py').read_text())
  before = {path: path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()}
  try:
    module = importlib.import_module(name)
  except ImportError as error:   # of an extra that is not installed
    pytest.skip(str(error))
  for line in OVER_INPUT[name]:
    monkeypatch.setattr(sys, 'argv', [name, *line.replace('CONFIG', 'tiny.py').split()])
    with pytest.raises(SystemExit) as ended:
      sys.exit(module.main())
    said = ' '.join(capsys.readouterr().err.split())
    assert ended.value.code == 2, (line, said)
    assert re.search('is read, and would be replaced|both are .* choose another', said), (line, said)
  assert before == {path: path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()}


def test_only_models_and_runs_are_replaced(tmp_path):
  (tmp_path / 'notes.txt').write_text('mine')
  with pytest.raises(FileExistsError, match='holds neither config.json nor checkpoints, so that it is no model or run'):
    files.check_free(tmp_path, overwrite=True)
  (tmp_path / 'config.json').write_text('{}')
  files.check_free(tmp_path, overwrite=True)


@pytest.mark.parametrize('name', COMMANDS)
def test_every_command_refuses_them_in_every_argument(name, monkeypatch, capsys):
  """Before it looks at any argument: whatever it is called and wherever it stands."""
  with contextlib.suppress(ImportError):   # of an extra that is not installed
    module = importlib.import_module(name)
    for args in (['gs://bucket/x'], ['a', '--out=gs://bucket/x'], ['a', '--model', 's3://bucket/x']):
      monkeypatch.setattr(sys, 'argv', [name, *args])
      with pytest.raises(SystemExit) as ended:
        sys.exit(module.main())
      assert ended.value.code == 2
      said = capsys.readouterr().err
      assert '://bucket/x: only paths of this machine are read and written' in said.replace('\n', ' '), said


def test_trainers_refuse_them_in_the_config_too():
  config = common.base('distill')
  config.model.source = 'teacher'
  config.data.files = ('train.jsonl', 'gs://bucket/more')
  with pytest.raises(ValueError, match='^config.data.files=gs://bucket/more: only paths of this machine'):
    command.check_local(distill.read(config))
  with pytest.raises(ValueError, match='^--workdir=gs://bucket/x: only'):
    command.read_config(['--config=configs/tiny.py', '--workdir=gs://bucket/x'])


def test_no_tool_makes_a_parser_of_its_own():
  known = {'tools.judge'}   # a parent for its parsers
  assert {name for name, text in TOOLS.items() if 'argparse.ArgumentParser(add' in text} == known


# Modes.

@pytest.mark.parametrize('umask, mode', [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_have_the_mode_that_the_umask_gives(tmp_path, umask, mode):
  old = os.umask(umask)
  try:
    metrics.write_json(tmp_path / 'a.json', {})
    files.write_shard(tmp_path / 'c.safetensors', {'x': np.zeros(2)})
    schema.write(tmp_path / 'd.jsonl', [])
    with locks.held(tmp_path / 'e.lock'):
      pass
  finally:
    os.umask(old)
  assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == dict.fromkeys(
      ('a.json', 'c.safetensors', 'd.jsonl', 'e.lock'), mode)


def test_a_file_appears_whole_or_not_at_all(tmp_path):
  disk.write_text(tmp_path / 'a', 'ä\n')
  with pytest.raises(RuntimeError), disk.replacing(tmp_path / 'a') as file:
    file.write(b'half')
    raise RuntimeError
  assert [path.name for path in tmp_path.iterdir()] == ['a'] and (tmp_path / 'a').read_bytes() == 'ä\n'.encode()


@pytest.mark.skipif(os.geteuid() != 0, reason='becomes another user')
def test_another_users_lock_holds(tmp_path):
  for folder in (tmp_path, *tmp_path.parents[:-1]):
    folder.chmod(folder.stat().st_mode | 0o055)
  with locks.held(tmp_path / 'lock'):
    said = (tmp_path / 'lock').read_text()
    os.seteuid(65534)
    try:
      with pytest.raises(locks.Held, match=f'process {os.getpid()} '), locks.held(tmp_path / 'lock'):
        pass
      with pytest.raises(PermissionError, match='other'), locks.held(tmp_path / 'other'):
        pass
    finally:
      os.seteuid(0)
  os.seteuid(65534)
  try:
    with locks.held(tmp_path / 'lock'):   # free, and not to be written to
      pass
  finally:
    os.seteuid(0)
  assert (tmp_path / 'lock').read_text() == said


# JSON.

@pytest.mark.parametrize('text, message', [
    (b'{"a": \xff}', 'is no UTF-8 text'), (b'{', 'is no valid JSON'),
    (b'[' * 100_000, 'is no valid JSON: maximum recursion'),
    (b'{"a": 1' + b'0' * 5000 + b'}', 'is no valid JSON: Exceeds the limit'), (b'[]', 'is a list, not a JSON object')])
def test_a_file_that_is_no_json_object_is_named(tmp_path, text, message):
  (tmp_path / 'a.json').write_bytes(text)
  with pytest.raises(ValueError, match=f'a.json {message}'):
    disk.read_json(tmp_path / 'a.json')


@pytest.mark.parametrize('value, form, message', [
    ({}, {'a': int}, "x lacks 'a'; it has no keys"), ({'a': True}, {'a': int}, "x: 'a' is True, not a whole number"),
    ({'a': [1, 'b']}, {'a': [disk.NUMBER]}, r"x: 'a'\[1\] is 'b', not a number"),
    ({'a': {'b': None}}, {'a': {str: str}}, "x: 'a': 'b' is None, not a text"),
    ([10 ** 400], [disk.NUMBER], r'x\[0\] is 1000.*, not a number'),
    ({'a': []}, {'a': dict}, 'is a list, not a JSON object'),
    (3, (str, type(None)), 'x is 3, not a text or null')])
def test_what_is_of_another_type_is_said_with_its_place(value, form, message):
  with pytest.raises(ValueError, match=message):
    disk.check_form(value, form, 'x')


def test_what_is_of_the_form_passes():
  disk.check_form({'a': [1, 2.5, float('nan')], 'b': {'c': 'd'}, 'e': None, 'f': True, 'more': []},
                  {'a': [disk.NUMBER], 'b': {str: str}, 'e': (str, type(None)), 'f': bool}, 'x')
