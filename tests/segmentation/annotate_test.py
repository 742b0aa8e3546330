"""The annotator, against a server on this machine that answers well or badly."""

import collections
import contextlib
import datetime
import email.utils
import http.server
import itertools
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
from hypothesis import given, settings, strategies as st

from blockattn.data import json_lines
from blockattn.segmentation.semanticseg import annotate, completions, schema
from tools import annotate as tool

ROOT = pathlib.Path(__file__).resolve().parents[2]
TEXT = ''.join(f'Line {i} of the text.\n' for i in range(1, 13))
DEFAULT = annotate.Options()
QUICK = completions.Limits(timeout=5, attempts=4, backoff=0)
few = settings(max_examples=60, deadline=None, derandomize=True, database=None)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
  for name in [name for name in os.environ if name.lower().endswith('_proxy')]:
    monkeypatch.delenv(name)


def lines_of(text):
  """Candidates after each line."""
  return [match.end() for match in re.finditer('\n', text) if match.end() < len(text)]


def completion(content, finish='stop', **usage):
  return json.dumps({'choices': [{'message': {'content': content}, 'finish_reason': finish}], 'usage': usage}).encode()


def every(step):
  """An answer that cuts at every marker whose line has a number divisible by `step`."""
  def answer(request, number):
    shown = request['messages'][1]['content']
    marked = re.findall(r'Line (\d+) of the text\.\n<cut (\d+)>', shown)
    cuts = [int(marker) for line, marker in marked if int(line) % step == 0]
    return completion(json.dumps({'cuts': cuts}), prompt_tokens=100, completion_tokens=9)
  return answer


class Server:
  """A chat-completions endpoint. `behave(request, number)` returns the bytes of a reply, (status, bytes, headers), or
  'hang up' or a number of seconds to say nothing for."""

  def __init__(self, behave):
    self.behave, self.requests, self.headers = behave, [], []
    self.lock = threading.Lock()
    owner = self

    class Handler(http.server.BaseHTTPRequestHandler):
      def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
        with owner.lock:
          owner.requests.append(request)
          owner.headers.append((self.path, dict(self.headers)))
          number = len(owner.requests)
        owner.reply(self, owner.behave(request, number))

      def log_message(self, *_):
        pass

    self.http = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    self.http.daemon_threads = True
    self.url = f'http://127.0.0.1:{self.http.server_port}/v1'

  def reply(self, handler, action):
    if action == 'hang up':
      handler.close_connection = True
      return
    if isinstance(action, float):
      time.sleep(action)
      return
    status, data, headers = action if isinstance(action, tuple) else (200, action, {})
    handler.send_response(status)
    for name, value in {'Content-Length': len(data), **headers}.items():
      handler.send_header(name, str(value))
    handler.end_headers()
    with contextlib.suppress(OSError):
      handler.wfile.write(data)


@contextlib.contextmanager
def serving(*behaviour):
  """A server that behaves in each of these ways for one request, then as the last."""
  ways = list(behaviour)

  def behave(request, number):
    way = ways[min(number, len(ways)) - 1]
    return way(request, number) if callable(way) else way

  server = Server(behave)
  thread = threading.Thread(target=server.http.serve_forever, kwargs={'poll_interval': .01}, daemon=True)
  thread.start()
  try:
    yield server
  finally:
    server.http.shutdown()
    server.http.server_close()


def plain(text=TEXT, name='a'):
  return annotate.Plain(name, 'letters', 'here', 'CC0', text)


def ask(server, text=TEXT, options=DEFAULT, usage=None, limits=QUICK, sleeps=None):
  sleep = None if sleeps is None else sleeps.append
  with completions.Completions(server.url, 'm', 'secret', limits=limits, sleep=sleep) as endpoint:
    return annotate.annotate(plain(text), endpoint.ask, lines_of, options, usage)


# Asking


def test_a_document_is_cut_where_the_model_says():
  usage = collections.Counter()
  with serving(every(4)) as server:
    document = ask(server, usage=usage)
  assert document.text == TEXT and (document.id, document.license) == ('a', 'CC0')
  assert [block[:7] for block in document.blocks] == ['Line 1 ', 'Line 5 ', 'Line 9 ']
  assert usage == {'requests': 1, 'tokens_in': 100, 'tokens_out': 9}
  path, headers = server.headers[0]
  assert path == '/v1/chat/completions' and headers['Authorization'] == 'Bearer secret'
  system, user = server.requests[0]['messages']
  assert server.requests[0]['model'] == 'm' and '<cut 7>' in system['content']
  assert re.sub(r'<cut \d+>', '', user['content']).endswith(TEXT)


@pytest.mark.parametrize('bad, why', [
    ('Here are the cuts: 1, 2', 'not JSON'), ('[1, 2]', 'not an object'), ('{"cut": [1]}', 'not an object'),
    ('{"cuts": ["1"]}', 'integers'), ('{"cuts": [true]}', 'integers'), ('{"cuts": [1.0]}', 'integers'),
    ('{"cuts": [0]}', 'no marker 0'), ('{"cuts": [12]}', 'markers go from 1 to 11'),
    ('{"cuts": [3, 2]}', 'increase'), ('{"cuts": [2, 2]}', 'increase'),
    ('', 'not JSON'), ('{"cuts": [1, ', 'not JSON'), ('[' * 100_000, 'not JSON'),
    (f'{{"cuts": [{"9" * 5000}]}}', 'not JSON')],
    ids=lambda value: str(value)[:20])
def test_an_unusable_answer_is_asked_for_again_with_the_reason(bad, why):
  usage = collections.Counter()
  with serving(completion(bad), every(6)) as server:
    assert len(ask(server, usage=usage).blocks) == 2
  assert usage['asked again'] == 1 and usage['requests'] == 2
  _, _, answer, reason = server.requests[1]['messages']
  assert answer == {'role': 'assistant', 'content': bad[:2000] or '(nothing)'}
  assert why in reason['content'] and 'cannot be used' in reason['content']


def test_answers_that_are_wrapped_or_cut_off():
  for said in ('```json\n{"cuts": [6]}\n```', '<think>{"cuts": [1]} no\n</think>\n\n{"cuts": [6]}',
               ' {"cuts":[6], "why": "x"} '):
    assert annotate.read_answer(completions.Answer(said), 11) == [6]
  assert annotate.read_answer(completions.Answer('{"cuts": []}'), 0) == []
  with pytest.raises(annotate.Unusable, match='cut off'):
    annotate.read_answer(completions.Answer('{"cuts": [6]}', 'length'), 11)


def test_unusable_answers_fail_in_the_end():
  usage = collections.Counter()
  with serving(completion('no')) as server, pytest.raises(completions.Failed, match='no usable answer in 3.*not JSON'):
    ask(server, usage=usage)
  assert len(server.requests) == 3 and usage['asked again'] == 2
  assert [len(request['messages']) for request in server.requests] == [2, 4, 4]


# A server that misbehaves


@pytest.mark.parametrize('bad', [
    b'{', b'[]', b'{}', b'{"choices": []}', b'{"choices": [{}]}', b'{"choices": [{"message": 1}]}', b'\xff\xfe', b'null',
    (500, b'oops', {}), (503, b'', {}), (408, b'', {}), (429, b'slow down', {}), 'hang up',
    (200, b'{"choices"', {'Content-Length': 500}), (200, b'x', {'Content-Encoding': 'gzip'})],
    ids=lambda value: str(value)[:30])
def test_a_failed_request_is_repeated(bad):
  sleeps = []
  with serving(bad, bad, every(6)) as server:
    assert len(ask(server, sleeps=sleeps).blocks) == 2
  assert len(server.requests) == 3 and len(sleeps) == 2


def test_attempts_end():
  with serving((500, b'<b>over\nloaded</b>', {})) as server:
    with pytest.raises(completions.Failed, match=r'500: <b>over loaded.*attempt 4'):
      ask(server)
  assert len(server.requests) == 4


def test_null_content_is_no_answer():
  with serving(completion(None), every(6)) as server:
    assert len(ask(server).blocks) == 2
  assert len(server.requests) == 2


def test_waits_grow_and_the_server_decides():
  sleeps = []
  limits = completions.Limits(attempts=5, backoff=8, longest_wait=20)
  with serving((500, b'', {}), (500, b'', {}), (500, b'', {}), (429, b'', {'Retry-After': '7'}), every(6)) as server:
    ask(server, sleeps=sleeps, limits=limits)
  for wait, (low, high) in zip(sleeps, [(4, 8), (8, 16), (10, 20), (7, 7)], strict=False):
    assert low <= wait <= high
  assert 0 < sleeps[4] <= 7   # the next request looks at the time that the server asked for
  with serving((429, b'', {'Retry-After': '21'})) as server:
    with pytest.raises(completions.Failed, match='wait 21 s, longer than 20'):
      ask(server, sleeps=sleeps, limits=limits)


def test_retry_after():
  assert completions.retry_after('2.5') == 2.5 and completions.retry_after('-1') == 0
  soon = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=30)
  assert 28 <= completions.retry_after(email.utils.format_datetime(soon, usegmt=True)) <= 30
  assert completions.retry_after('Wed, 21 Oct 2015 07:28:00 GMT') == 0
  for nothing in (None, '', 'soon', 'nan', 'inf', 'Thu, 01 Jan 99999999999 00:00:00 GMT'):
    assert completions.retry_after(nothing) is None, nothing


def test_all_threads_wait_when_one_is_told_to():
  with serving((429, b'', {'Retry-After': '0.3'}), every(6)) as server:
    with completions.Completions(server.url, 'm', limits=QUICK) as endpoint:
      first = threading.Thread(target=endpoint.ask, args=([{'role': 'user', 'content': ''}] * 2,))
      first.start()
      while endpoint.not_before == 0:
        time.sleep(.001)
      start = time.monotonic()
      endpoint.ask([{'role': 'user', 'content': ''}] * 2)
      assert time.monotonic() - start > .15
      first.join()


def test_a_stall_is_not_waited_for():
  limits = completions.Limits(timeout=.15, attempts=2, backoff=0)
  start = time.monotonic()
  with serving(.6, every(6)) as server:
    assert len(ask(server, limits=limits).blocks) == 2
  assert len(server.requests) == 2 and time.monotonic() - start < 3


@pytest.mark.parametrize('first, then', [(b'HTTP/1.1 200 OK\r\n\r\n', b' '), (b'HTTP/1.1 200 OK\r\n', b'X-More: 1\r\n'),
                                         (b'', b'HTTP/1.1 102 Processing\r\n\r\n'), (b'', b'H')])
def test_a_slow_trickle_is_not_waited_for(monkeypatch, first, then):
  class Trickle(Server):
    def reply(self, handler, action):
      if len(self.requests) > 1:
        super().reply(handler, action)
        return
      with contextlib.suppress(OSError):
        handler.wfile.write(first)
        for _ in range(40):
          handler.wfile.write(then)
          time.sleep(.03)
      handler.close_connection = True
  monkeypatch.setattr(f'{__name__}.Server', Trickle)
  usage = collections.Counter()
  start = time.monotonic()
  with serving(every(6)) as server:
    ask(server, usage=usage, limits=completions.Limits(timeout=.2, attempts=2, backoff=0))
  assert len(server.requests) == 2 and time.monotonic() - start < 1


@pytest.mark.parametrize('status', [307, 401, 403, 404])
def test_a_refusal_ends_everything(status):
  documents = [plain(name=str(i)) for i in range(30)]
  with serving((status, b'bad key', {})) as server, completions.Completions(server.url, 'm', limits=QUICK) as endpoint:
    with pytest.raises(completions.Refused, match=f'{status}: bad key; check the key'):
      list(annotate.annotate_all(documents, endpoint.ask, lines_of, DEFAULT, 2))
  assert len(server.requests) < 10


def test_what_is_under_way_ends_with_the_endpoint():
  limits = completions.Limits(timeout=60, attempts=9, backoff=100)
  with serving(every(6), (500, b'', {}), 1.) as server:
    start = time.monotonic()
    with completions.Completions(server.url, 'm', limits=limits) as endpoint:
      results = annotate.annotate_all([plain(name=str(i)) for i in range(9)], endpoint.ask, lines_of, DEFAULT, 3)
      assert next(results).document
      while len(server.requests) < 3:
        time.sleep(.001)
      results.close()
    threads = [thread for thread in threading.enumerate() if thread.name.startswith('ThreadPoolExecutor')]
    for thread in threads:
      thread.join(5)
    assert not any(thread.is_alive() for thread in threads) and time.monotonic() - start < 4
    assert len(server.requests) == 3


@pytest.mark.parametrize('url, key, why', [
    ('http://h:port/v1', '', 'base URL'), ('localhost:8000/v1', '', 'must start with http'),
    ('http://h/v1', 'a\nb', 'white space'), ('http://h/v1', 'é', 'not ASCII')])
def test_bad_urls_and_keys_are_named(url, key, why):
  with pytest.raises(ValueError, match=why):
    completions.Completions(url, 'm', key)


def test_keys_and_passwords_are_in_no_message():
  def of(status, wait='0'):
    body = b'no: {"Authorization": "Bearer secret"} for http://me:pass@h/'
    with serving((status, body, {'Retry-After': wait})) as server:
      with pytest.raises((completions.Failed, completions.Refused)) as error:
        ask(server, sleeps=[])
      assert error.value.__cause__ is None
    return str(error.value)
  for message in (of(401), of(400), of(500), of(500, '9999')):
    assert 'Bearer ***' in message and '//***@h/' in message and 'secret' not in message and 'pass' not in message
  for url in ('ftp://me:secret@h/v1', 'http://me:secret@h:port/v1'):
    with pytest.raises(ValueError) as error:
      completions.Completions(url, 'm')
    assert 'base URL' in str(error.value) and 'secret' not in str(error.value)


def test_half_a_surrogate_pair_in_an_answer_is_sent_back_as_it_is():
  with serving(completion('half \ud83d'), every(6)) as server:
    assert len(ask(server).blocks) == 2
  assert server.requests[1]['messages'][2]['content'] == 'half \ud83d'


def test_a_wrong_request_is_not_repeated():
  with serving((400, b'too long', {})) as server, pytest.raises(completions.Failed, match='status 400: too long'):
    ask(server)
  assert len(server.requests) == 1
  with pytest.raises(completions.Failed, match='ConnectError'):
    ask(server)   # nobody is there any more


# Windows and markers


@few
@given(st.lists(st.integers(1, 30), min_size=1, max_size=60), st.integers(1, 80), st.integers(0, 60))
def test_windows_decide_every_candidate_once(units, window, overlap):
  options = annotate.Options(window, min(overlap, window - 1))
  candidates, length = [sum(units[:i]) for i in range(1, len(units))], sum(units)
  found = annotate.windows(candidates, length, options)
  assert bool(found) == bool(candidates)
  decided = []
  for window_, after in itertools.zip_longest(found, found[1:]):
    inside = [c for c in candidates if window_.start < c < window_.stop]
    assert inside and (window_.stop - window_.start <= window or len(inside) == 1)
    decided += [c for c in inside if window_.low <= c < window_.high]
    assert after is None or window_.start < after.start < window_.stop
  assert decided == candidates


def test_long_texts_are_asked_about_in_windows():
  text = ''.join(f'Line {i} of the text.\n' for i in range(1, 200))
  with serving(every(5)) as server:
    document = ask(server, text, annotate.Options(window=600, overlap=150))
  assert [int(block.split()[1]) for block in document.blocks] == [1, *range(6, 200, 5)] and document.text == text
  assert len(server.requests) > 5
  said = [request['messages'][1]['content'] for request in server.requests]
  assert [('began earlier' in s, 'goes on' in s) for s in (said[0], said[1], said[-1])] == [(0, 1), (1, 1), (1, 0)]


def test_a_text_that_cannot_be_cut_is_not_asked_about():
  def never(messages):
    raise AssertionError
  assert annotate.annotate(plain('one line'), never, lines_of, annotate.Options()).blocks == ('one line',)


@few
@given(st.lists(st.sampled_from(['\n', ' ', 'a', '\r', '<cut 1>', '<<cut 2>>', '<cut', ' 3>', '[[cut 4]]', '😀', '\u2028']),
                max_size=20), st.data())
def test_markers_leave_the_text_alone(pieces, data):
  text = ''.join(pieces)
  offsets = sorted(data.draw(st.sets(st.integers(1, max(1, len(text) - 1))))) if len(text) > 1 else []
  marker = annotate.marker_for(text)
  try:
    marked = annotate.mark(text, offsets, marker)
  except completions.Failed as error:   # a marker that two pieces of the text would make, if it were taken out
    assert 'changes' in str(error)
    return
  numbers = re.findall(re.escape(marker).replace(r'\{\}', r'(\d+)'), marked)
  assert list(map(int, numbers)) == list(range(1, len(offsets) + 1))


def test_a_text_full_of_markers_fails():
  with pytest.raises(completions.Failed, match='every kind of marker'):
    annotate.marker_for('<cut 1> <<cut 1>> [[cut 1]] ⟦cut 1⟧')
  assert annotate.marker_for('<cut 1>') != '<cut {}>'


def test_no_block_is_blank():
  assert annotate.blocks_at('\n\na\n\n\nb\n', [1, 2, 4, 5, 6, 7]) == ('\n\na\n\n\n', 'b\n')
  for text, cuts in (('\n\na\n \nb\n\n', [1, 2, 4, 6, 8]), ('a\nb', []), (' a', [1])):
    blocks = annotate.blocks_at(text, cuts)
    assert ''.join(blocks) == text and all(block.strip() for block in blocks)


def test_estimate():
  found = annotate.estimate([plain(), plain('one line')], lines_of, annotate.Options(), annotate.quarter)
  assert (found.documents, found.requests, found.characters) == (2, 1, len(TEXT) + 8)
  assert found.tokens_in > len(TEXT) / 4 and found.tokens_out == 15
  assert found.cost(1e6, 2e6) == found.tokens_in + 30


def test_options_are_checked():
  for bad in ({'window': 10, 'overlap': 10}, {'asks': 0}, {'instructions': 'say {cuts}'}):
    with pytest.raises(ValueError, match='window|instructions'):
      annotate.Options(**bad)
  with pytest.raises(ValueError, match='attempts at least 1'):
    completions.Limits(attempts=0)


# Files


def write_input(path, count=6):
  rows = ({'id': f'd{i}', 'text': f'{TEXT}Document {i}\n'} for i in range(count))
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows), encoding='utf-8')
  return path


def test_reading_documents(tmp_path):
  defaults = {'category': 'c', 'source': 's', 'license': 'l'}
  lines = [{'id': 'a', 'text': 'x'}, {'id': 'a', 'text': 'y'}, {'id': 'b', 'blocks': ['x', 'y'], 'license': 'own'},
           {'id': 'c'}, {'id': 'd', 'text': 'a\0'}]
  (tmp_path / 'in.jsonl').write_text('\n'.join(map(json.dumps, lines)) + '\n{\n', encoding='utf-8')
  (tmp_path / 'a.txt').write_bytes(b'one\r\ntwo')
  (tmp_path / 'b.txt').write_bytes(b'\xff')
  report = json_lines.Report()
  found = list(annotate.read_plain([tmp_path / name for name in ('in.jsonl', 'a.txt', 'b.txt')], defaults, report))
  assert [(d.id, d.text, d.license) for d in found] == [
      ('a', 'x', 'l'), ('b', 'xy', 'own'), (f'{tmp_path}/a.txt', 'one\r\ntwo', 'l')]
  assert report.bad == {'duplicate id': 1, 'missing key': 1, 'NUL character': 1, 'bad JSON': 1, 'invalid UTF-8': 1}


def row(name, text='a\nb'):
  return schema.Document(name, 'c', 's', 'l', (text,))


@pytest.mark.parametrize('tail, kept', [(b'', 1), (b'{"id": "b", "cat', 1), (b'{"id": "\xe2\x82', 1),
                                        (schema.to_line(row('b')).encode(), 2)])
def test_a_half_written_line_is_repaired(tmp_path, tail, kept):
  path = tmp_path / 'out.jsonl'
  path.write_bytes(schema.to_line(row('a')).encode() + b'\n' + tail)
  with annotate.Output(path) as output:
    assert len(output.finished) == kept
    output.add(row('c'))
  assert [d.id for d in schema.read(path, strict=True)] == [*'ab'[:kept], 'c']


def test_the_output_is_guarded(tmp_path):
  path = tmp_path / 'out.jsonl'
  with annotate.Output(path) as output:
    output.add(row('a'))
    assert output.is_finished(plain('a\nb')) and not output.is_finished(plain(name='z'))
    with pytest.raises(ValueError, match="'a' has another text"):
      output.is_finished(plain('other'))
    with pytest.raises(ValueError, match='another process'):
      annotate.Output(path)
  path.write_bytes(b'{"id": 1}\n')
  with pytest.raises(ValueError, match='out.jsonl:1.*correct or remove'):
    annotate.Output(path)
  with pytest.raises(ValueError, match='ends so'):
    annotate.Output(tmp_path / 'out.jsonl.gz')


@pytest.mark.parametrize('foreign', ['{"id": "a", "text": "my only copy"}', '{"id": "a", "text": "my on', 'my notes',
                                     '{"id": "a", "text": "one"}\n{"id": "b", "text": "two"}', '[1, 2]'])
def test_a_file_of_others_stays_as_it_is(tmp_path, foreign):
  path = tmp_path / 'notes.jsonl'
  path.write_text(foreign)
  with pytest.raises(ValueError, match='correct or remove|choose another --output'):
    annotate.Output(path)
  assert path.read_text() == foreign


def run(capsys, server, tmp_path, *args):
  code = tool.main([str(tmp_path / 'in.jsonl'), '--output', str(tmp_path / 'out.jsonl'), '--base-url', server.url,
                    '--model', 'm', '--category', 'letters', '--source', 'here', '--license', 'CC0', '--backoff', '0',
                    *args])
  printed = capsys.readouterr()
  return code, printed.out + printed.err


def test_the_tool(tmp_path, capsys, monkeypatch):
  monkeypatch.setenv('MY_KEY', 'k')
  write_input(tmp_path / 'in.jsonl')
  with serving(every(4)) as server:
    code, printed = run(capsys, server, tmp_path, '--price-in', '1', '--price-out', '2')
    assert code == 0 and not server.requests
    assert '6 documents, 0 of them finished' in printed and '6 requests' in printed and 'cost: about 0.00' in printed
    assert 'add --yes' in printed
    code, printed = run(capsys, server, tmp_path, '--yes', '--key-env', 'MY_KEY')
    assert code == 0 and '6 documents written, 0 failed' in printed and '600 tokens read' in printed, printed
    assert server.headers[0][1]['Authorization'] == 'Bearer k' and server.requests[0]['temperature'] == 0
    assert {d.id: len(d.blocks) for d in schema.read(tmp_path / 'out.jsonl')} == {f'd{i}': 4 for i in range(6)}
    code, printed = run(capsys, server, tmp_path, '--yes')
    assert code == 0 and '6 of them finished before' in printed and len(server.requests) == 6


def test_failed_documents_are_reported_and_asked_about_next_time(tmp_path, capsys):
  write_input(tmp_path / 'in.jsonl')
  good = every(4)

  def sometimes(request, number):
    return completion('no') if 'Document 3\n' in request['messages'][1]['content'] else good(request, number)
  with serving(sometimes) as server:
    code, printed = run(capsys, server, tmp_path, '--yes', '--asks', '2')
    assert code == 1 and 'd3: failed: no usable answer in 2' in printed and '5 documents written, 1 failed' in printed
  with serving(good) as server:
    code, printed = run(capsys, server, tmp_path, '--yes')
    assert code == 0 and len(server.requests) == 1 and '1 documents written' in printed
  assert len(list(schema.read(tmp_path / 'out.jsonl', strict=True))) == 6


def test_the_tool_refuses(tmp_path, capsys):
  write_input(tmp_path / 'in.jsonl')
  with serving((401, b'who?', {})) as server:
    code, printed = run(capsys, server, tmp_path, '--yes')
    assert code == 2 and 'status 401: who?' in printed
    assert run(capsys, server, tmp_path, '--body', '{"model": "x"}')[0] == 2
    assert run(capsys, server, tmp_path, '--overlap', '99999')[0] == 2
    assert run(capsys, server, tmp_path / 'none')[0] == 2


@pytest.mark.slow
def test_killed_in_the_middle_and_started_again(tmp_path):
  write_input(tmp_path / 'in.jsonl', 14)
  good = every(4)

  def slowly(request, number):
    time.sleep(.03)
    return good(request, number)
  output = tmp_path / 'out.jsonl'
  with serving(slowly) as server:
    command = [sys.executable, '-m', 'tools.annotate', str(tmp_path / 'in.jsonl'), '--output', str(output),
               '--base-url', server.url, '--model', 'm', '--category', 'c', '--source', 's', '--license', 'l', '--yes',
               '--concurrency', '2']
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    while not output.exists() or output.read_bytes().count(b'\n') < 4:
      assert process.poll() is None
      time.sleep(.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    data = output.read_bytes()
    before = {document.id for document in schema.read(output)}
    assert 4 <= len(before) < 14
    output.write_bytes(data[:-20] if data.endswith(b'\n') else data)   # as if the last line had been half written
    kept = {json.loads(line)['id'] for line in output.read_bytes().split(b'\n')[:-1]}
    asked = len(server.requests)
    assert subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=False).returncode == 0
  rows = [json.loads(line) for line in output.read_bytes().splitlines()]
  assert sorted(r['id'] for r in rows) == sorted(f'd{i}' for i in range(14))
  assert len(server.requests) - asked == 14 - len(kept)
  assert all(len(r['blocks']) == 4 for r in rows)
