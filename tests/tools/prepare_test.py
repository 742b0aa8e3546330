"""The tool that encodes files and says what becomes of them."""

import os
import re

import data_cases
import pyarrow
import pytest
import source_cases
from pyarrow import parquet

from blockattn.train import finetune, inputs
from launch import sweep
from tools import prepare

LENGTH = data_cases.LENGTH
tokenizer, folder = source_cases.tokenizer, source_cases.folder


@pytest.fixture(scope='module')
def arguments(tmp_path_factory, tokenizer):
  folder = tmp_path_factory.mktemp('tokenizer')
  tokenizer.save_pretrained(folder)
  return ['--tokenizer', str(folder), '--length', str(LENGTH)]


def test_prepare_prints_a_table(folder, arguments, tmp_path, capsys):
  assert prepare.main([str(folder), *arguments]) == 0
  table, problems = capsys.readouterr().out.split('malformed lines: ')
  cells = {line.split('│')[1].strip(): [c.strip() for c in line.split('│')[2:-1]] for line in table.split('\n')
           if line.startswith('│')}
  assert cells['a.jsonl'][:6] == ['17', '15', '2', '0', '0', '15'] and cells['b.jsonl.gz'][:3] == ['26', '25', '1']
  assert cells['all'][:6] == ['43', '40', '3', '0', '0', '40']
  assert problems.startswith('2 bad JSON, 1 not an object (7.0%)\n') and f'{folder}/b.jsonl.gz:2: bad JSON' in problems
  cells = {line.split('│')[1].strip(): [c.strip() for c in line.split('│')[2:-1]] for line in problems.split('\n')
           if line.startswith('│')}
  assert cells['blocks of a document'] == ['3', '5', '6', '6', '6']   # the turn's opening, 1 to 4 passages, the question
  assert int(cells['tokens of an answer'][0]) <= int(cells['tokens of an answer'][-1]) < LENGTH
  first = problems.partition('The first document')[2]
  assert '── block 1, ' in first and first.rstrip().endswith('⟦answer 0<|im_end|>⟧') and '<|im_start|>user' in first


def test_a_file_that_is_read_twice_counts_twice(folder, arguments, capsys):
  assert prepare.main([str(folder / 'a.jsonl')] * 2 + arguments) == 0
  assert re.search(r'│ all +│ +34 │ +30 │', capsys.readouterr().out)


def test_a_table_without_rows_is_named(arguments, tmp_path, capsys):
  empty = tmp_path / 'empty.parquet'
  parquet.write_table(pyarrow.table({'text': pyarrow.array([], pyarrow.string())}), empty)
  assert prepare.main([str(empty), *arguments]) == 2
  assert f'not one document to train on in 0 lines of {empty}' in capsys.readouterr().err


def test_prepare_leaves_nothing(folder, arguments, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr('tempfile.tempdir', str(tmp_path))
  assert prepare.main([str(folder / 'a.jsonl'), *arguments]) == 0
  assert not os.listdir(tmp_path) and 'a.jsonl' in capsys.readouterr().out


def test_prepare_reads_what_the_training_will(folder, arguments, tmp_path, capsys):
  (tmp_path / 'own.py').write_text(f'''
from configs import common

def get_config(arg=''):
  config = common.base('finetune')
  config.data.tokenizer = {arguments[1]!r}
  config.data.length, config.data.max_blocks = {LENGTH}, 9
  return config
''')
  files = [str(folder / 'a.jsonl')]
  assert prepare.main([*files, f'--config={tmp_path}/own.py', '--config.data.too_long=cut']) == 0
  config = sweep.parse([f'--config={tmp_path}/own.py', '--config.data.too_long=cut'])
  config.data.files = tuple(files)
  data = finetune.read(config).data
  source = inputs.load_rows(data, inputs.load_tokenizer(data, ''))
  assert source.options.chat and source.options.too_long == 'cut'   # the tokenizer has a template
  entry = f"--config.data.files={{'path': {files[0]!r}, 'weight': 0.6}}"   # with spaces, as a shell hands it on
  assert prepare.main([f'--config={tmp_path}/own.py', entry]) == 0
  assert prepare.main([*files, f'--config={tmp_path}/own.py', '--config.data.strict']) == 2
  assert f'prepare: {files[0]}:16: bad JSON' in capsys.readouterr().err
  assert prepare.main([*files, '--length', '9']) == 2 and prepare.main(['--tokenizer', arguments[1]]) == 2
  err = capsys.readouterr().err
  assert 'give --tokenizer, or a --config' in err and 'give files, --length, or a --config' in err


def test_prepare_fails_as_it_says(folder, arguments, tmp_path, capsys):
  assert prepare.main([str(folder), *arguments, '--strict']) == 2
  assert f'prepare: {folder}/a.jsonl:16: bad JSON' in capsys.readouterr().err
  assert prepare.main([str(folder / 'missing.jsonl'), *arguments]) == 2
  assert 'missing.jsonl: no .jsonl' in capsys.readouterr().err
  assert prepare.main([str(folder), '--tokenizer', str(tmp_path), '--length', '9']) == 2
  assert 'no tokenizer.json' in capsys.readouterr().err
  (tmp_path / 'empty.jsonl').touch()
  assert prepare.main([str(tmp_path / 'empty.jsonl'), *arguments]) == 2
  assert 'not one document' in capsys.readouterr().err
  for option, value in (('--length', '0'), ('--length', '-5')):
    with pytest.raises(SystemExit) as end:
      prepare.main([str(folder), *arguments, option, value])
    assert end.value.code == 2 and f"{option}: '{value}' is not a number from 1 on" in capsys.readouterr().err


def test_prepare_with_nothing_but_malformed_lines(arguments, tmp_path, capsys):
  path = data_cases.write_lines(tmp_path / 'a.jsonl', [b'[bold]', b'x' * 10] + [b'{'] * 150)
  assert prepare.main([path, *arguments]) == 2
  out, err = capsys.readouterr()
  assert f'not one document to train on in 152 lines of {path}' in err
  assert '152 bad JSON' in out and '... and 52 more' in out and f'{path}:1: bad JSON' in out
