"""tools.warm: what it computes is what a request to the server asks for."""

import json
import pathlib

import data_cases
import hf_cases
import pytest

from blockattn import blocks, loading
from blockattn.data import encode
from blockattn.hf import config
from blockattn.inference import cache
from blockattn.serving.vllm import front, student
from tools import warm

OPTIONS = blocks.BlockOptions((5, 6), 'sequential', max_blocks=8, hide_starts=True, overlap=4)
TEXT = ''.join(f'Sentence {i} of a text about bridges. ' for i in range(16))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('warm')
  hf_cases.save_model(folder / 'model', data_cases.tiny_tokenizer(), {'blocks': config.blocks_meta(OPTIONS)})
  corpus = folder / 'corpus' / 'deeper'
  corpus.mkdir(parents=True)
  (corpus / 'one.txt').write_text(TEXT)
  (corpus.parent / 'faq.jsonl').write_text('{"title": "A", "text": "One."}\n\n{"text": "Two."}\n')
  (corpus.parent / 'not_read.png').write_bytes(b'\xff')
  return folder


@pytest.fixture
def call(folder, tmp_path, capsys):
  """(exit code, standard error) of the command."""
  def run(*args, files=('corpus',), store='blocks'):
    code = warm.main([*(str(folder / file) for file in files), '--model', str(folder / 'model'), '--store',
                      str(tmp_path / store), '--impl', 'reference', '--device-tokens', '1024', *args])
    return code, capsys.readouterr().err
  return run


def keys_of(folder, body, dtype):
  """Those of the context blocks of a request, as the server names them."""
  model = loading.load(folder, dtype)
  forms = front.Forms(student.read_options(folder), model.tokenizer, encode.Encoder(model.tokenizer))
  said = forms.rewrite(front.CHAT, body)['kv_transfer_params']
  _, keys = student.read_keys(folder, dtype)
  at, found = 0, []
  for length, start in zip(said['blocks'], [*said['hidden'], []], strict=True):
    found.append(keys.of([*start, *said['prompt_token_ids'][at:at + length]]))
    at += length
  return set(found[:-1])


@pytest.mark.parametrize('args, segment, dtype', [
    (['--target', '40'], {'target': 40}, 'bfloat16'), (['--whole', '--dtype', 'float32'], None, 'float32')])
def test_the_server_finds_every_block(folder, call, tmp_path, args, segment, dtype):
  code, err = call(*args, '--chat')
  assert code == 0 and err.splitlines()[-1].startswith('3 documents')
  documents = [{'text': TEXT}, {'title': 'A', 'text': 'One.'}, {'text': 'Two.'}]
  body = {'messages': [{'role': 'user', 'content': 'Which bridge?'}], 'documents': documents, 'segment': segment}
  wanted = keys_of(folder / 'model', body, dtype)
  assert len(wanted) > 5 if segment else len(wanted) == 4
  assert {path.stem for path in (tmp_path / 'blocks').rglob('*.safetensors')} == wanted


def test_the_same_command_goes_on(call, tmp_path):
  code, err = call('--target', '40')
  computed = int(err.split(' computed')[0].split()[-1])
  assert code == 0 and computed > 5
  files = sorted((tmp_path / 'blocks').rglob('*.safetensors'))
  files[0].unlink()
  code, err = call('--target', '40')
  assert code == 0 and ': 1 computed' in err and sorted((tmp_path / 'blocks').rglob('*.safetensors')) == files
  assert '8-bit states are' in call('--target', '40', '--int8')[1]


def test_what_cannot_be_read_is_a_line(folder, call, tmp_path):
  for name, raw, line in (('bad.txt', b'\xff', 'no UTF-8 text'), ('bad.jsonl', b'{"text": 1}\n', '"documents" is a list'),
                          ('worse.jsonl', b'{"text": "a"}\nno\n', 'worse.jsonl:2: bad JSON')):
    (folder / name).write_bytes(raw)
    code, err = call(files=(name,))
    assert code == 2 and name in err and line in err and 'Traceback' not in err
  code, err = call('--whole', '--device-tokens', '80')
  assert code == 2 and 'one.txt: a block of' in err
  assert call('--min', '600')[0] == 2
  (folder / 'model' / 'blockattn.json').rename(folder / 'kept')
  code, err = call()
  (folder / 'kept').rename(folder / 'model' / 'blockattn.json')
  assert code == 2 and 'says nothing of blocks' in err


def test_a_store_that_cannot_be_written_to_ends_it(call, monkeypatch):
  def full(path, state):
    raise OSError(28, 'No space left on device', str(path))
  monkeypatch.setattr(cache, '_save', full)
  code, err = call('--target', '40')
  assert code == 2 and 'the store cannot be written to' in err and 'No space left' in err


def test_a_state_that_was_written_is_that_of_the_engine(folder, call, tmp_path):
  """`blockattn.inference` has its bits; here: it is of the form that the server reads."""
  call('--whole', '--dtype', 'float32')
  with cache.Store(folder=tmp_path / 'blocks') as store:
    cfg, _ = student.read_keys(folder / 'model', 'float32')
    for path in pathlib.Path(tmp_path / 'blocks').rglob('*.safetensors'):
      state, where = store.get(path.stem)
      assert where == 'disk' and state.k.shape == (cfg.layers, state.tokens, cfg.kv_heads, cfg.head_dim)
  assert json.loads((folder / 'model' / 'blockattn.json').read_text())['blocks']
