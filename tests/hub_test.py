"""What is fetched from the hub, with the hub's own client, from a stand-in on this machine."""

import errno
import json
import pathlib
import shutil
import subprocess
import sys
import zipfile

import data_cases
import hub_server
import pytest
import run_cases

from blockattn import hub
from configs import tiny

# In a process of its own, since the client reads its address when it is imported: what each call gives, or its line.
_ASK = """
import json, sys
import blockattn
from blockattn import errors
from blockattn.data import encode, tables
from blockattn.evals import longbench
from blockattn.hf import files
from tools import convert

def rows(path, **more):
  return [record for _, record in tables.open_tables(tables.Origin(path, columns={'context': 'blocks'}, **more))[0].read(0)]

calls = {
    'files': lambda name: sorted(file.name for file in files.locate(name).iterdir()),
    'load': lambda name: [blockattn.load(name).cfg.layers, blockattn.load(name).stop_ids],
    'tokenizer': lambda name: [encode.load_tokenizer(name).name_or_path, len(encode.load_tokenizer(name))],
    'rows': rows,
    'split': lambda name: rows(name, split='test'),
    'config': lambda name: rows(name, name='en'),
    'longbench': lambda name: [record.length for record in longbench.read_records(name, 'lcc_e')],
    'convert': lambda name: convert.main(['from_hf', name, sys.argv[2]]),
}
found = []
for call, name in json.loads(sys.argv[1]):
  try:
    found.append(calls[call](name))
  except Exception as error:
    found.append(errors.line_of(error) or repr(error))
print(json.dumps(found))
"""
_REFUSED = {
    'owner/none': 'no such repository, or a private one; correct the name, or `hf auth login`',
    hub_server.GATED: 'access is restricted; ask for it on its page, then `hf auth login`',
    'owner/tiny@v2': 'no such revision; name a branch, a tag or a commit behind the @, or none',
    hub_server.BROKEN: ('Server disconnected without sending a response; fetch it with `hf download` where there is a '
                        'network, and name the folder'),
}
_ROW = {'context': ['Boats are blue.', 'Stones are heavy.'], 'prompt': 'What?', 'response': 'Boats.'}


def _line(name):
  return f'{name}: no folder here, and nothing from the hub: {_REFUSED[name]}'


@pytest.fixture(scope='module')
def asked(tmp_path_factory):
  """(call, name) -> what came of it, and what the hub was asked for."""
  folder = tmp_path_factory.mktemp('hub')
  model = shutil.copytree(tiny.TEACHER, folder / 'models/owner/tiny')
  (model / 'pytorch_model.bin').write_bytes(b'pickled')
  (model / 'modeling_tiny.py').write_text('raise SystemExit(3)')
  (model / 'onnx').mkdir()
  (model / 'onnx' / 'config.json').write_text('{}')
  for repo in ('models/owner/gated', 'datasets/owner/gated', 'models/owner/empty'):
    (folder / repo).mkdir(parents=True)
    (folder / repo / 'LICENSE').write_text('a licence')
  rows = folder / 'datasets/owner/rows'
  rows.mkdir(parents=True)
  data_cases.write_lines(rows / 'train.jsonl', [_ROW] * 3)
  (folder / 'datasets/owner/bench').mkdir()
  with zipfile.ZipFile(folder / 'datasets/owner/bench/data.zip', 'w') as file:
    record = {'_id': 'x', 'input': 'a', 'context': 'b', 'answers': ['c'], 'length': 4000, 'all_classes': None}
    file.writestr('data/lcc_e.jsonl', json.dumps(record) + '\n')
  wanted = [('files', 'owner/tiny'), ('load', 'owner/tiny@v1'), ('tokenizer', 'owner/tiny@v1'), ('convert', 'owner/tiny@v1'),
            *((call, name) for call in ('load', 'tokenizer') for name in ('owner/empty', *_REFUSED)),
            *(('rows', f'hub:owner/{name}') for name in ('rows@v1', 'none', 'gated')), ('split', 'hub:owner/rows'),
            ('config', 'hub:owner/rows'), ('longbench', 'owner/bench@main'), ('longbench', 'owner/rows'),
            ('longbench', 'owner/none')]
  with hub_server.serving(folder) as (address, paths):
    own = run_cases.environment(folder).items()
    env = {name: value for name, value in own
           if not name.startswith(('HF_', 'TRANSFORMERS_')) and 'proxy' not in name.lower()}
    env |= {'HF_ENDPOINT': address, 'HF_HOME': str(folder / 'home')}
    done = subprocess.run([sys.executable, '-c', _ASK, json.dumps(wanted), str(folder / 'run')], capture_output=True,
                          text=True, cwd=pathlib.Path(__file__).parents[1], env=env)
  assert done.returncode == 0, done.stderr
  found = json.loads(done.stdout.splitlines()[-1])
  return dict(zip(wanted, found, strict=True)), paths


def test_what_a_model_needs_is_fetched_and_nothing_else(asked):
  found, paths = asked
  assert {'model.safetensors', 'config.json', 'tokenizer.json'} <= {*found['files', 'owner/tiny']}
  resolved = [path.split('/', 5)[-1] for path in paths if path.startswith('/owner/tiny/resolve/')]
  assert 'model.safetensors' in resolved and not [name for name in resolved if name.endswith(('.bin', '.py')) or '/' in name]


def test_a_revision_is_part_of_every_name(asked):
  found, paths = asked
  layers = json.loads((tiny.TEACHER / 'config.json').read_text())['num_hidden_layers']
  assert found['load', 'owner/tiny@v1'] == [layers, [0]]
  assert found['tokenizer', 'owner/tiny@v1'] == ['owner/tiny@v1', 1024]
  assert found['convert', 'owner/tiny@v1'] == 0
  assert found['rows', 'hub:owner/rows@v1'] == [{'blocks': _ROW['context'], 'prompt': 'What?', 'response': 'Boats.'}] * 3
  assert found['longbench', 'owner/bench@main'] == [4000]
  assert {'/api/models/owner/tiny/revision/v1', '/datasets/owner/rows/resolve/v1/README.md'} <= {*paths}


@pytest.mark.parametrize('name', _REFUSED)
def test_why_nothing_came(asked, name):
  found, _ = asked
  assert found['load', name] == found['tokenizer', name] == _line(name)


def test_why_no_data_came(asked):
  found, _ = asked
  assert found['longbench', 'owner/none'] == _line('owner/none')
  assert found['longbench', 'owner/rows'].startswith('owner/rows: no data.zip in this dataset of the hub; name')
  for call, name, said in (
      ('rows', 'none', "hub:owner/none: nothing from the hub: Dataset 'owner/none' doesn't exist"),
      ('rows', 'gated', "hub:owner/gated: nothing from the hub: Dataset 'owner/gated' is a gated dataset"),
      ('split', 'rows', 'hub:owner/rows:test: datasets cannot load it (Unknown split "test"'),
      ('config', 'rows', "hub:owner/rows:en:train: datasets cannot load it (BuilderConfig 'en' not found")):
    assert found[call, f'hub:owner/{name}'].startswith(said)
  for call, file in (('load', 'config.json is missing'), ('tokenizer', 'no tokenizer.json in this folder')):
    assert file in found[call, 'owner/empty']


def test_names():
  for name in ('Qwen/Qwen3-4B', 'Qwen/Qwen3-4B@v1', 'o/m.2_x'):
    assert hub.is_name(name)
  for name in ('/no/such/folder', './model', 'a/b/c', 'model', '../model', '~/model', 'a/', '/a', '-a/b', ''):
    assert not hub.is_name(name)
  assert hub.split('o/m@v1') == ('o/m', 'v1') and hub.split('o/m') == ('o/m', None)


def test_faults_that_are_not_the_hub_s_stay_what_they_are():
  for fault in (OSError(errno.ENOSPC, 'No space left on device', '/cache'), TypeError('ours')):
    with pytest.raises(type(fault)) as raised, hub.explained('x'):
      raise fault
    assert raised.value is fault
  with pytest.raises(FileNotFoundError, match='^x from the hub: .*refused; fetch it'), hub.explained('x'):
    raise ConnectionRefusedError(errno.ECONNREFUSED, 'Connection refused')
