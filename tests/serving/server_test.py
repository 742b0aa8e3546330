"""A real server process, asked by OpenAI's client."""

import concurrent.futures
import functools
import json
import time

import data_cases
import hf_cases
import httpx
import pytest
import serving_docs

from blockattn import blocks
from blockattn.hf import config, convert
from blockattn.inference import cache
from blockattn.models.transformer import ModelConfig
from tools import warm
from tools.bench import serve

openai = pytest.importorskip('openai')
pytest.importorskip('vllm')
psutil = pytest.importorskip('psutil')
pytestmark = [pytest.mark.vllm, pytest.mark.slow]

OPTIONS = blocks.BlockOptions((3, 3), 'sequential', 8)
PARTS = [{'type': 'text', 'text': text} for text in ('The bridge is long.\n', 'It was built in 1932.\n', 'When?')]
KEY = 'secret'


class Server(serve.Server):
  """`python -m blockattn.serving.vllm`, and a client."""

  def __init__(self, folder, store):
    super().__init__(['-m', 'blockattn.serving.vllm', str(folder), '--blocks', str(store), '--dtype', 'float32',
                      '--enforce-eager', '--max-model-len', '512', '--block-size', '32', '--api-key', KEY])
    self.client = openai.OpenAI(base_url=f'{self.url}/v1', api_key=KEY, max_retries=0, timeout=300)

  def chat(self, content, max_tokens=8, **extra):
    return self.client.chat.completions.create(model=serve.NAME, messages=[{'role': 'user', 'content': content}],
                                               temperature=0, max_tokens=max_tokens, extra_body=extra)

  def text(self, content, **extra):
    return self.chat(content, **extra).choices[0].message.content

  def metrics(self):
    lines = [line.rsplit(' ', 1) for line in httpx.get(f'{self.url}/metrics').text.splitlines()
             if line.startswith('vllm:blockattn_')]
    return {name.split('{')[0].removeprefix('vllm:blockattn_'): float(value) for name, value in lines}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('server') / 'student'
  tokenizer = data_cases.tiny_tokenizer()
  source = folder.with_name('tokenizer')
  tokenizer.save_pretrained(source)
  cfg = ModelConfig('llama', vocab=len(tokenizer), width=64, layers=2, heads=2, kv_heads=1, head_dim=32, mlp=32,
                    max_positions=512)
  convert.save(hf_cases.random_params(cfg, 'float32'), cfg, folder, source=source,
               meta={'blocks': config.blocks_meta(OPTIONS)}, card='', dtype='float32')
  return folder


def cached(answer):
  return answer.usage.prompt_tokens_details.cached_tokens


def test_a_server_answers_reuses_counts_and_comes_back(folder, tmp_path, capfd):
  store = tmp_path / 'blocks'
  with Server(folder, store) as server:
    first = server.chat(PARTS)
    assert cached(first) == 0 < cached(server.chat(PARTS))
    other = server.text([PARTS[1], PARTS[0], PARTS[2]])
    documents = {'documents': [{'title': 'A', 'text': 'one'}, {'text': 'two'}]}
    assert cached(server.chat('When?', **documents)) < cached(server.chat('When?', **documents))
    ask_as_documented(server)
    refused(server)
    assert server.chat('Hello').usage.completion_tokens == 8   # without blocks
    before = server.metrics()['blocks_computed_total']
    asked = [[*PARTS[i % 2:2], {'type': 'text', 'text': f'Number {i % 40}.\n'}, PARTS[2]] for i in range(200)]
    with concurrent.futures.ThreadPoolExecutor(200) as many:   # hits and misses at once
      found = list(many.map(server.text, asked))
      counted = server.metrics()
      for content in [[{'type': 'text', 'text': f'More {i}.\n'}, PARTS[2]] for i in range(100)]:
        many.submit(server.text, content)
      while server.metrics()['blocks_computed_total'] < counted['blocks_computed_total'] + 10:
        time.sleep(0.01)
      server.kill()   # in the middle of writes
  assert counted['blocks_computed_total'] == before + 40 and counted['blocks_memory_total'] > 0
  with cache.Store(folder=store) as states:
    assert all(states.get(path.stem) for path in store.rglob('*.safetensors')) and not states.counts.corrupt

  # What was computed by a tool is served, and the other way round.
  (tmp_path / 'corpus.jsonl').write_text(json.dumps({'text': 'A text that nobody has asked about.'}) + '\n')
  command = functools.partial(warm.main, ['--model', str(folder), '--store', str(store), '--dtype', 'float32', '--whole',
                                          '--impl', 'reference', str(tmp_path / 'corpus.jsonl')])
  capfd.readouterr()
  assert command() == 0 and '1 computed, 1 were there' in capfd.readouterr().err   # the template's opening was there
  with Server(folder, store) as server:
    assert server.text(PARTS) == first.choices[0].message.content
    assert server.text([PARTS[1], PARTS[0], PARTS[2]]) == other
    assert found[:40] == found[40:80] == found[160:] == [server.text(content) for content in asked[:40]]   # one by one
    before = server.metrics()
    server.chat('What?', documents=[{'text': 'A text that nobody has asked about.'}])
    after = server.metrics()
    assert after['blocks_computed_total'] == before.get('blocks_computed_total', 0)
    assert after['blocks_disk_total'] > before['blocks_disk_total'] > 0
    page = httpx.get(f'{server.url}/blocks').text
    assert all(name.removesuffix('_total') in page for name in after if name.endswith('_total'))
    (tmp_path / 'corpus.jsonl').write_text(json.dumps({'title': 'A', 'text': 'one'}) + '\n')
    assert command() == 0 and ': 0 computed, 2 were there' in capfd.readouterr().err
    dies(server)


def ask_as_documented(server):
  """The snippets of the documents; without the package that one is of, it is left out."""
  for code in serving_docs.snippets():
    for old, new in (('http://localhost:8000', server.url), ("'none'", repr(KEY)), ("'exported'", repr(serve.NAME))):
      code = code.replace(old, new)
    before, names = server.metrics()['blocks_computed_total'], {}
    try:
      exec(code, names)
    except ModuleNotFoundError as error:
      assert error.name.startswith(('langchain', 'llama_index'))
      continue
    assert names['answer']
    if 'langchain' in code:   # the blocks of the snippet in front of it
      assert server.metrics()['blocks_computed_total'] == before
      assert names['answer'].usage_metadata['input_token_details']['cache_read'] > 0


def refused(server):
  """Requests that end in an error, each of its own kind."""
  with pytest.raises(openai.BadRequestError, match='"documents" is a list'):
    server.chat('When?', documents=['one'])
  stranger = openai.OpenAI(base_url=f'{server.url}/v1', api_key='guessed', max_retries=0)
  with pytest.raises(openai.AuthenticationError):   # before anything is read
    stranger.chat.completions.create(model=serve.NAME, messages=[{'role': 'user', 'content': 'When?'}],
                                     extra_body={'documents': ['one']})


def dies(server):
  """What runs the model is gone: whoever waits, and whoever comes, is told so, soon."""
  with concurrent.futures.ThreadPoolExecutor(4) as many:
    waiting = [many.submit(server.chat, PARTS, 400, ignore_eos=True) for _ in range(4)]
    time.sleep(0.5)
    for process in psutil.Process(server.process.pid).children(recursive=True):
      if 'EngineCore' in ''.join(process.cmdline()):
        process.kill()
    for answer in waiting:
      with pytest.raises(openai.APIError):
        answer.result(timeout=60)
  with pytest.raises(openai.APIError):
    server.chat(PARTS)
