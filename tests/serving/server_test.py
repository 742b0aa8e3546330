"""A real server process, asked by OpenAI's client."""

import concurrent.futures
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import data_cases
import hf_cases
import pytest

from blockattn import blocks
from blockattn.hf import config, convert
from blockattn.models.transformer import ModelConfig

openai = pytest.importorskip('openai')
pytest.importorskip('vllm')
pytestmark = [pytest.mark.vllm, pytest.mark.slow]

OPTIONS = blocks.BlockOptions((3, 3), 'sequential', 8)
PARTS = [{'type': 'text', 'text': text} for text in ('The bridge is long.\n', 'It was built in 1932.\n', 'When?')]


class Server:
  """`python -m blockattn.serving.vllm` on a free port."""

  def __init__(self, folder, store, *more):
    with socket.socket() as free:
      free.bind(('127.0.0.1', 0))
      self.port = free.getsockname()[1]
    env = {**os.environ, 'VLLM_CPU_KVCACHE_SPACE': '1', 'VLLM_NO_USAGE_STATS': '1', 'VLLM_CPU_OMP_THREADS_BIND': 'nobind'}
    command = [sys.executable, '-m', 'blockattn.serving.vllm', str(folder), '--blocks', str(store), '--dtype', 'float32',
               '--enforce-eager', '--max-model-len', '512', '--block-size', '32', '--host', '127.0.0.1', '--port',
               str(self.port), '--served-model-name', 'student', *more]
    self._process = subprocess.Popen(command, env=env, start_new_session=True)
    self.client = openai.OpenAI(base_url=f'http://127.0.0.1:{self.port}/v1', api_key='none', max_retries=0)
    self._wait()

  def _wait(self):
    for _ in range(300):
      assert self._process.poll() is None, 'the server ended'
      try:
        urllib.request.urlopen(f'http://127.0.0.1:{self.port}/health', timeout=5)
        return
      except OSError:
        time.sleep(1)
    raise TimeoutError('no server after 300 s')

  def chat(self, content, **extra):
    return self.client.chat.completions.create(
        model='student', messages=[{'role': 'user', 'content': content}], temperature=0, max_tokens=8, extra_body=extra)

  def metrics(self):
    text = urllib.request.urlopen(f'http://127.0.0.1:{self.port}/metrics').read().decode()
    lines = [line.rsplit(' ', 1) for line in text.splitlines() if line.startswith('vllm:blockattn_')]
    return {name.split('{')[0].removeprefix('vllm:blockattn_'): float(value) for name, value in lines}

  def kill(self):
    os.killpg(self._process.pid, signal.SIGKILL)
    self._process.wait()


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


def test_a_server_answers_reuses_counts_and_comes_back(folder, tmp_path):
  server = Server(folder, tmp_path / 'blocks')
  try:
    first = server.chat(PARTS)
    assert first.usage.prompt_tokens_details.cached_tokens > 0
    other = server.chat([PARTS[1], PARTS[0], PARTS[2]])
    documents = server.chat('When?', documents=[{'title': 'A', 'text': 'one'}, {'text': 'two'}])
    assert documents.usage.prompt_tokens_details.cached_tokens > 0
    with concurrent.futures.ThreadPoolExecutor(32) as many:   # hits and misses at once
      asked = [[*PARTS[i % 2:2], {'type': 'text', 'text': f'Number {i % 40}.\n'}, PARTS[2]] for i in range(80)]
      found = [answer.choices[0].message.content for answer in many.map(server.chat, asked)]
    assert found[:40] == found[40:]
    assert found[:4] == [server.chat(content).choices[0].message.content for content in asked[:4]]
    counted = server.metrics()
    assert counted['blocks_computed_total'] == 3 + 2 + 40 and counted['blocks_memory_total'] > 0
    with pytest.raises(openai.BadRequestError, match='"documents" is a list'):
      server.chat('When?', documents=['one'])
    assert server.chat('Hello').usage.completion_tokens == 8   # without blocks
  finally:
    server.kill()   # in the middle of whatever it does
  server = Server(folder, tmp_path / 'blocks')
  try:
    assert server.chat(PARTS).choices[0].message.content == first.choices[0].message.content
    assert server.chat([PARTS[1], PARTS[0], PARTS[2]]).choices[0].message.content == other.choices[0].message.content
    assert server.metrics()['blocks_disk_total'] > 0
  finally:
    server.kill()
