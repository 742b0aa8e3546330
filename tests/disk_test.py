"""Paths, files and JSON: what is refused, how it appears, and what is said of a value of another type."""

import contextlib
import importlib
import os
import pathlib
import stat
import sys

import numpy as np
import pytest

from blockattn import disk, locks, metrics
from blockattn.data.semanticseg import schema
from blockattn.hf import files
from blockattn.train import command
from configs import common

ROOT = pathlib.Path(__file__).resolve().parents[1]
COMMANDS = sorted(f'tools.{path.stem}' for path in (ROOT / 'tools').glob('*.py') if path.stem != 'arguments'
                  and 'arguments.Parser(' in path.read_text()) + ['tools.show', 'launch.sweep']


# Places.

@pytest.mark.parametrize('text', ['gs://bucket/x', '--workdir=s3://bucket/x', '--config.data.files=a.jsonl,gs://bucket/b',
                                  'hdfs://host/x', 'file:///tmp/x'])
def test_paths_on_other_machines_are_refused(text):
  with pytest.raises(ValueError, match='^' + text.replace('.', r'\.') + ': only paths of this machine .*gcsfuse'):
    disk.check_local(['plain', text])


def test_what_only_looks_like_one_is_not():
  disk.check_local(['/data/x', 'configs/a.py:model=b', 'owner/model@main', 'https://example.org/v1', '10.0.0.1:80,2,0',
                    'What is gs://bucket for?', '--beam-options=--temp_location=gs://bucket/x', 'sub/gs://', ''])


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
  config = common.base()
  config.data.files = ('train.jsonl', 'gs://bucket/more')
  with pytest.raises(ValueError, match='^config.data.files=gs://bucket/more: only paths of this machine'):
    command.check_local(config)
  with pytest.raises(ValueError, match='^--workdir=gs://bucket/x: only'):
    command.read_config(['--config=configs/tiny.py', '--workdir=gs://bucket/x'])


def test_no_tool_makes_a_parser_of_its_own():
  known = {'judge'}   # a parent for its parsers
  assert {path.stem for path in (ROOT / 'tools').glob('*.py') if 'argparse.ArgumentParser(' in path.read_text()} == known


# Modes.

@pytest.mark.parametrize('umask, mode', [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_have_the_mode_that_the_umask_gives(tmp_path, umask, mode):
  old = os.umask(umask)
  try:
    metrics.write_json(tmp_path / 'a.json', {})
    files.write_json(tmp_path / 'b.json', {})
    files.write_shard(tmp_path / 'c.safetensors', {'x': np.zeros(2)})
    schema.write(tmp_path / 'd.jsonl', [])
    with locks.held(tmp_path / 'e.lock'):
      pass
  finally:
    os.umask(old)
  assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == dict.fromkeys(
      ('a.json', 'b.json', 'c.safetensors', 'd.jsonl', 'e.lock'), mode)


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
