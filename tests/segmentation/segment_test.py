"""blockattn.segment, tools.segment and its page, with a stand-in for the model."""

import gzip
import html.parser
import io
import itertools
import json
import os
import pathlib
import shutil
import subprocess
import sys
import unicodedata

import data_cases
import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import regex
import segment_cases

import blockattn
from blockattn.data import encode
from blockattn.segmentation import api, granularity
from tools import segment, segment_page

MODEL = segment_cases.StandIn()
EMBEDDED = pathlib.Path(blockattn.__file__).parent / 'assets' / 'tiny_segmenter'
SECTIONS = ''.join(f'Section {i}\n' + f'A line about {i}. And more of it.\n' * 6 + '\n' for i in range(8))
NASTY = ('a </script><script>alert(1)</script> & <!-- <b>\n\n\0\x01\x7f\x85 \u2028 \ufeff\r\n'
         'lone \ud83d, \udc00 end.\n\n🙂 語。語\r\n')
few = hypothesis.settings(max_examples=25, deadline=None)


def joined(text, blocks):
  assert all(a < b for a, b in blocks)
  assert [a for a, _ in blocks] == [0, *(b for _, b in blocks[:-1])][:len(blocks)]
  return ''.join(text[a:b] for a, b in blocks)


def run(capsys, *args, model=MODEL):
  """(exit code, records, messages) of the tool."""
  try:
    code = segment.main([str(arg) for arg in args], model=model)
  except SystemExit as ended:   # of the parser
    code = ended.code
  out, err = capsys.readouterr()
  return code, [json.loads(line) for line in out.splitlines()], err


# The function.


@few
@hypothesis.given(st.lists(st.text(st.characters() | st.characters(categories=['Cs']) | st.sampled_from('\n\r. '),
                                   max_size=60), max_size=3),
                  st.sampled_from([{}, {'threshold': 0.1}, {'depth': 2}, {'target_tokens': 3},
                                   {'min_tokens': 2, 'max_tokens': 5}]))
def test_any_text_is_its_blocks(texts, options):
  for text, blocks in zip(texts, blockattn.segment_many(texts, model=MODEL, **options), strict=True):
    assert joined(text, blocks) == text


def test_granularity():
  count = lambda **options: len(blockattn.segment(SECTIONS, model=MODEL, **options))
  assert count() == 8
  assert len(blockattn.segment(SECTIONS, model=segment_cases.StandIn(threshold=-3))) > 20
  assert count(threshold=0) > 80 and count(threshold=1) == 1
  assert count(depth=1) == 16 and count(depth=1, max_tokens=10**6) == 8
  assert count(target_tokens=10**6) == 1
  sizes = np.diff(blockattn.segment(SECTIONS, target_tokens=40, model=MODEL))
  assert 25 * 3 < sizes.mean() < 55 * 3


@pytest.mark.parametrize('text', [SECTIONS, 'QUJD' * 400, 'word ' * 300, '語' * 500, 'no full stop\r\n' * 60])
def test_bounds_hold_for_the_tokens_of_each_block(text):
  for minimum, maximum in ((20, 40), (30, 45), (5, 11)):
    blocks = blockattn.segment(text, min_tokens=minimum, max_tokens=maximum, model=MODEL)
    counts = [len(ends) for ends in segment_cases.words_as_tokens(text[a:b] for a, b in blocks)]
    assert minimum <= min(counts) and max(counts) <= maximum, (minimum, maximum)


LANGUAGES = ['\U0001f1e9\U0001f1ea\U0001f1eb\U0001f1f7' * 15, unicodedata.normalize('NFD', '한국어 문장입니다. ' * 15),
             'e\u0301' * 80, '\U0001f468\u200d\U0001f469\u200d\U0001f467 ' * 12, '漢字を読む。' * 20, SECTIONS[:900],
             'QUJD' * 120]


def check_bounds(tokenizer, maximums):
  """The maximum holds for the tokens that `tokenizer` makes of each block, and no character is divided, or it is refused."""
  count = lambda piece: len(tokenizer.encode(piece, add_special_tokens=False).ids)
  refused = 0
  for text, maximum in itertools.product(LANGUAGES, maximums):
    characters = regex.findall(r'\X', text)
    try:
      blocks = blockattn.segment(text, max_tokens=maximum, model=MODEL, tokenizer=tokenizer)
    except ValueError as error:
      assert 'cannot hold' in str(error) and max(map(count, characters)) > maximum
      refused += 1
      continue
    assert joined(text, blocks) == text and max(count(text[a:b]) for a, b in blocks) <= maximum
    assert {b for _, b in blocks} <= set(itertools.accumulate(map(len, characters)))
  return refused


def test_bounds_hold_in_the_tokens_of_the_reader():
  tokenizer = data_cases.tiny_tokenizer().backend_tokenizer
  assert check_bounds(tokenizer, (1, 3, 50)) > 1
  text = 'word ' * 300
  blocks = blockattn.segment(text, min_tokens=20, max_tokens=40, model=MODEL, tokenizer=len)   # a function counts
  assert 20 <= min(b - a for a, b in blocks) and max(b - a for a, b in blocks) <= 40


@pytest.mark.slow
@pytest.mark.data
def test_bounds_hold_in_the_tokens_of_published_models():
  for folder in sorted((pathlib.Path(os.environ['BLOCKATTN_DATA']) / 'tokenizers').iterdir()):
    if (folder / 'tokenizer.json').exists():
      check_bounds(encode.plain(encode.load_tokenizer(folder)), (33,))


def test_batches_and_progress():
  model, seen = segment_cases.StandIn(), []
  many = blockattn.segment_many([SECTIONS, '', 'one'], model=model, progress=seen.append)
  assert model.batches == [3] and seen[-1] == len(SECTIONS) + 3
  assert many == [blockattn.segment(text, model=MODEL) for text in (SECTIONS, '', 'one')]
  assert many[1:] == [[], [(0, 3)]]


def test_wrong_calls():
  with pytest.raises(TypeError, match='for one text use segment'):
    blockattn.segment_many('text', model=MODEL)
  with pytest.raises(TypeError, match='text 1 is bytes, not str'):
    blockattn.segment_many(['a', b'b'], model=MODEL)
  with pytest.raises(ValueError, match='minimum=5, maximum=2'):
    blockattn.segment('a', min_tokens=5, max_tokens=2, model=MODEL)
  with pytest.raises(ValueError, match='choose one'):
    blockattn.segment('a', depth=1, target_tokens=2, model=MODEL)


def test_importing_the_package_imports_nothing_else():
  code = 'import sys, blockattn; sys.exit(any(name in sys.modules for name in ("numpy", "jax", "transformers")))'
  assert subprocess.run([sys.executable, '-c', code], cwd=pathlib.Path(__file__).parents[2]).returncode == 0


@pytest.mark.skipif(not EMBEDDED.is_dir(), reason='there is no embedded segmenter')
def test_the_embedded_model(tmp_path, capsys):
  text = SECTIONS + 'x' * 3000 + NASTY
  assert joined(text, blockattn.segment(text)) == text
  assert api.load_segmenter() is api.load_segmenter()
  assert blockattn.segment('') == [] and blockattn.segment('a') == [(0, 1)]
  blocks = blockattn.segment(text, target_tokens=100, min_tokens=30, max_tokens=150)
  ends = api.load_segmenter().token_ends([text[a:b] for a, b in blocks])
  assert 30 <= min(map(len, ends)) and max(map(len, ends)) <= 150
  (tmp_path / 'a.txt').write_text(SECTIONS)
  code, records, _ = run(capsys, tmp_path / 'a.txt', '--html', tmp_path / 'a.html', model=None)
  assert code == 0 and joined(SECTIONS, records[0]['blocks']) == SECTIONS


# The tool: input.


@pytest.mark.parametrize('text', ['', 'no line end', 'a\r\n\r\nb\rc\n', '\0 NUL \0\n\n\0', '\ufeffwith a byte order mark\n',
                                  'ไทย 日本語。中文 العربية\n\nрусский', '\n\n\n', ' ' * 100])
def test_files_are_taken_as_they_stand(text, tmp_path, capsys):
  path = tmp_path / 'a.txt'
  path.write_bytes(text.encode())
  code, records, err = run(capsys, path, '--with-text', '--max', 5)
  assert code == 0 and [r['id'] for r in records] == [str(path)]
  assert joined(text, records[0]['blocks']) == ''.join(records[0]['texts']) == text
  assert f'1 texts, {len(records[0]["blocks"])} blocks, {len(text)} characters' in err


def test_folders_globs_and_standard_input(tmp_path, capsys, monkeypatch):
  for name in ('b.txt', 'a.md', 'sub/c.txt', '.hidden', '.git/d.txt', '[odd].txt'):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(name)
  names = lambda *paths: [os.path.relpath(r['id'], tmp_path) for r in run(capsys, *paths)[1]]
  assert names(tmp_path) == ['[odd].txt', 'a.md', 'b.txt', 'sub/c.txt']
  assert names(tmp_path / '*.txt', tmp_path / 'b.txt') == ['[odd].txt', 'b.txt']
  assert names(tmp_path / '[odd].txt') == ['[odd].txt'] and names(tmp_path / '.hidden') == ['.hidden']
  monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO('é\r\n\r\n'.encode())))
  assert run(capsys, '-')[1] == [{'id': '-', 'blocks': [[0, 5]]}]


def test_json_lines(tmp_path, capsys, monkeypatch):
  lines = [{'id': 'x', 'text': 'one\n\ntwo', 'other': 1}, {'text': 'lone \ud83d'}, {'id': 7, 'text': '\u2028'},
           {'id': 'e', 'text': ''}]
  data = '\n'.join(map(json.dumps, lines)).encode() + b'\n\n'
  for name, content in (('a.jsonl', data), ('b.jsonl.gz', gzip.compress(data))):
    (tmp_path / name).write_bytes(content)
    code, records, _ = run(capsys, tmp_path / name, '--with-text')
    assert code == 0 and [r['id'] for r in records] == ['x', f'{tmp_path / name}:2', 7, 'e']
    assert [''.join(r['texts']) for r in records] == [line['text'] for line in lines]
  monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO(data.replace(b'"text"', b'"body"'))))
  code, records, _ = run(capsys, '-', '--jsonl', '--text-key', 'body')
  assert code == 0 and [r['id'] for r in records] == ['x', '-:2', 7, 'e']


def test_what_cannot_be_read_is_named_and_skipped(tmp_path, capsys):
  (tmp_path / 'bad.txt').write_bytes(b'fine \xff\xfe')
  (tmp_path / 'cut.jsonl.gz').write_bytes(gzip.compress(b'{"text": "a"}\n' * 50)[:-9])
  (tmp_path / 'good.txt').write_text('good')
  (tmp_path / 'mixed.jsonl').write_bytes(b'{"text": 5}\n{"tex": "a"}\n[1]\n{"id"\n"\xff"\n{"id": "ok", "text": "a"}\n')
  code, records, err = run(capsys, tmp_path)
  assert code == 1 and [r['id'] for r in records][-2:] == [str(tmp_path / 'good.txt'), 'ok']
  for message in ("bad.txt: not UTF-8 (byte 5 is 0xff); skipped", 'cut.jsonl.gz: cannot be read (',
                  "mixed.jsonl:1: no text under the key 'text' ('text' is int); see --text-key; skipped",
                  "mixed.jsonl:2: no text under the key 'text' (its keys are tex)", 'mixed.jsonl:3: not an object',
                  'mixed.jsonl:4: bad JSON', 'mixed.jsonl:5: invalid UTF-8',
                  '7 skipped'):
    assert message in err, err


def test_arguments_that_will_not_do(tmp_path, capsys):
  (tmp_path / 'a.txt').write_text('a')
  for args, message in (((tmp_path / 'none',), 'no file here'), ((tmp_path / 'a.txt', '--min', 9, '--max', 3), 'minimum=9'),
                        ((tmp_path / 'a.txt', '--threshold', 2), 'threshold=2.0'),
                        ((tmp_path / 'a.txt', '--out', tmp_path / 'no' / 'out'), 'No such file')):
    code, records, err = run(capsys, *args)
    assert code == 2 and not records and message in err
  code, _, err = run(capsys, tmp_path / 'a.txt', '--model', tmp_path / 'no_model', model=None)
  assert code == 2 and 'no_model' in err
  with pytest.raises(SystemExit):
    segment.main(['a', '--resume'])


# The tool: output.


def write_texts(path, count):
  path.write_text(''.join(json.dumps({'id': f't{i}', 'text': f'{i}\n\nb'}) + '\n' for i in range(count)))
  return path


def ids_of(path):
  return [json.loads(line)['id'] for line in path.read_text().splitlines()]


def test_out_and_resume(tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(segment, 'BATCH', 8)
  texts, out = write_texts(tmp_path / 'in.jsonl', 9), tmp_path / 'out.jsonl'

  class Fails(segment_cases.StandIn):
    def score(self, texts, progress=None):
      if len(self.batches) == 2:
        raise KeyboardInterrupt
      return super().score(texts, progress)

  code, _, err = run(capsys, texts, '--out', out, model=Fails())
  assert code == 130 and not out.exists() and 'go on with --resume' in err
  part = tmp_path / 'out.jsonl.part'
  assert ids_of(part) == ['t0', 't1', 't2', 't3']
  part.write_text(part.read_text() + '{"id": "t4", "blo')   # killed while it wrote
  model = segment_cases.StandIn()
  code, records, err = run(capsys, texts, '--out', out, '--resume', model=model)
  assert code == 0 and not records and sum(model.batches) == 5 and '4 were there already' in err
  assert ids_of(out) == [f't{i}' for i in range(9)] and not part.exists()
  whole = out.read_bytes()
  run(capsys, write_texts(texts, 11), '--out', out, '--resume')
  assert out.read_bytes().startswith(whole) and len(ids_of(out)) == 11
  run(capsys, texts, '--out', out)
  assert len(ids_of(out)) == 11 and sorted(os.listdir(tmp_path)) == ['in.jsonl', 'out.jsonl']
  out.write_text('{"name": 1}\n')
  code, _, err = run(capsys, texts, '--out', out, '--resume')
  assert code == 2 and 'out.jsonl:1: not a line of this tool' in err
  for name, extra in (('out.jsonl', ['--resume']), ('out.jsonl.part', ['--resume']), ('in.jsonl', []), ('in.jsonl.gz', [])):
    other = tmp_path / name
    other.write_text('my only copy')   # not ours, and without a line end
    option = '--html' if name.endswith('gz') else '--out'
    code, _, err = run(capsys, texts if extra else other, option, out if extra else other, *extra)
    assert code == 2 and other.read_text() == 'my only copy', name
    other.unlink()


def test_a_terminal_is_not_told_what_names_hold(tmp_path, capsys):
  (tmp_path / 'a\x1b[31m.txt').write_bytes(b'\xff')
  err = run(capsys, tmp_path)[2]
  assert '\x1b' not in err and '\\x1b[31m.txt: not UTF-8' in err


@pytest.mark.slow
def test_a_reader_that_has_enough(tmp_path):
  (tmp_path / 'in.jsonl').write_text(''.join(json.dumps({'text': 'a. ' * 50}) + '\n' for _ in range(2000)))
  code = ('import sys; sys.path[:0] = [".", "tests/support"]; import segment_cases; from tools import segment; '
          'sys.exit(segment.main([sys.argv[1], "--threshold", "0"], model=segment_cases.StandIn()))')
  process = subprocess.Popen([sys.executable, '-c', code, str(tmp_path / 'in.jsonl')], stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, cwd=pathlib.Path(__file__).parents[2])
  process.stdout.readline()
  process.stdout.close()
  assert process.stderr.read() == b'' and process.wait() == 0


# The page.


class Scripts(html.parser.HTMLParser):
  """The contents of the script elements, as a browser divides them, and what would be fetched."""
  def __init__(self, page):
    super().__init__()
    self.scripts, self.fetched, self.inside = [], [], False
    self.feed(page)

  def handle_starttag(self, tag, attrs):
    self.fetched += [value for name, value in attrs if name in ('src', 'href')]
    self.inside = tag == 'script'
    if self.inside:
      self.scripts.append('')

  def handle_endtag(self, tag):
    self.inside = False

  def handle_data(self, data):
    if self.inside:
      self.scripts[-1] += data


def page_of(texts, want=None):
  want = want or granularity.Granularity()
  pages = []
  for name, text in texts:
    scored = MODEL.score([text])[0]
    pages.append(segment_page.page_text(name, text, scored, granularity.blocks_of(text, scored, want, MODEL.token_ends),
                                        MODEL.token_ends))
  return segment_page.render(pages, want)


def data_of(page):
  return json.loads(Scripts(page).scripts[0])


def test_the_page_holds_the_text_and_fetches_nothing():
  want = granularity.Granularity(minimum=3, maximum=9)
  page = page_of([('</title><b>&\0', NASTY), ('empty', ''), ('long', SECTIONS + 'x' * 2000)], want)
  page.encode()
  parsed = Scripts(page)
  assert len(parsed.scripts) == 2 and not parsed.fetched and 'http' not in parsed.scripts[1] and '\0' not in page
  data = json.loads(parsed.scripts[0])
  for shown, text in zip(data['texts'], (NASTY, '', SECTIONS + 'x' * 2000), strict=True):
    assert ''.join(shown['pieces']) == text
    assert len(shown['lengths']) == len(shown['pieces']) == len(shown['gains']) + 1
    ends = list(itertools.accumulate(map(len, shown['pieces'])))
    scored = MODEL.score([text])[0]
    assert [ends[i] for i in shown['cuts']] == [a for a, _ in
                                                granularity.blocks_of(text, scored, want, MODEL.token_ends)[1:]]


def test_the_page_counts_in_the_tokens_of_the_reader():
  text = SECTIONS + 'x' * 200
  reader = encode.token_ends(len)
  scored = MODEL.score([text])[0]
  page = segment_page.page_text('a', text, scored, [(0, len(text))], MODEL.token_ends, reader)
  assert page.lengths == list(itertools.accumulate(map(len, page.pieces)))


def test_the_page_from_the_tool(tmp_path, capsys):
  (tmp_path / 'a.txt').write_text(SECTIONS)
  code, _, _ = run(capsys, tmp_path / 'a.txt', '--html', tmp_path / 'page.html', '--target-tokens', 50)
  data = data_of((tmp_path / 'page.html').read_text())
  assert code == 0 and data['wish'] == 'about 50 tokens' and len(data['texts']) == 1
  run(capsys, tmp_path / 'a.txt', '--html', tmp_path / 'page.html', '--threshold', 0, '--depth', 1, '--max', 9)
  assert data_of((tmp_path / 'page.html').read_text())['wish'] == 'threshold 0, depth 1, max 9'
  assert sorted(os.listdir(tmp_path)) == ['a.txt', 'page.html']


def in_node(calls):
  """What expressions over the page's functions give, by node; each is a function of one argument, given with it."""
  if not shutil.which('node'):
    pytest.skip('needs node')
  page_js = pathlib.Path(segment_page.__file__).with_name('segment_page.js').read_text()
  script = page_js + ';process.stdout.write(JSON.stringify(JSON.parse(require("fs").readFileSync(0)).map(' \
                     '([code, value]) => eval(code)(value))))'
  done = subprocess.run(['node', '-e', script], input=json.dumps(calls), capture_output=True, text=True, check=True)
  return json.loads(done.stdout)


def test_the_page_chooses_what_python_chooses():
  rng = np.random.default_rng(0)
  chains, expected = [], []
  for n in (0, 1, 3, 10, 40, 400):
    for target, minimum, maximum in ((5, 1, 10), (30, 20, 45), (100, 25, 200), (7, 7, 7)):
      lengths = np.cumsum(rng.integers(0, 12, n + 1)).tolist()
      gains = rng.normal(-3, 3, n).astype(np.float32).tolist()
      chains.append(['c => bestChain(c.l, c.g, c.t, c.a, c.b, 8)',
                     {'l': lengths, 'g': gains, 't': target, 'a': minimum, 'b': maximum}])
      expected.append(granularity.best_chain(lengths, gains, target=target, minimum=minimum, maximum=maximum, weight=8))
  assert None in expected and any(expected)
  assert in_node(chains) == expected


def test_the_sliders_cut_as_the_tool_does():
  text = data_of(page_of([('a', SECTIONS)]))['texts'][0]
  scored = MODEL.score([SECTIONS])[0]
  ends = np.cumsum([len(piece) for piece in text['pieces']])
  wishes = [granularity.Granularity(threshold=p) for p in (0.01, 0.3, 0.5, 0.97)]
  wishes += [granularity.Granularity(target=n) for n in (32, 50, 90, 200, 10**5)]
  calls = [['t => thresholdCuts(t[0].gains, t[1])', [text, want.log_odds]] if want.target is None else
           [f't => targetCuts(t[0], t[1], {want.weight})', [text, want.target]] for want in wishes]
  for want, found in zip(wishes, in_node(calls), strict=True):
    cuts = granularity.choose_cuts(SECTIONS, scored.candidates, scored.log_odds, scored.tokens, want, MODEL.token_ends)
    assert ends[found].tolist() == cuts.tolist(), want


def test_targets_hold_in_the_page_where_candidates_do_not():
  text = data_of(page_of([('blob', 'word ' * 300 + 'QUJD' * 500 + SECTIONS)]))['texts'][0]
  for target, cuts in zip((32, 100, 400), in_node([['t => targetCuts(t[0], t[1], 8)', [text, n]] for n in (32, 100, 400)])):
    sizes = np.diff([0, *np.array(text['lengths'])[cuts], text['lengths'][-1]])
    assert target // 4 <= sizes.min() and sizes.max() <= 2 * target


def test_the_page_in_a_browser(tmp_path):
  browser = shutil.which('chromium') or shutil.which('google-chrome')
  if not browser:
    pytest.skip('needs a browser')
  (tmp_path / 'page.html').write_text(page_of([('n', NASTY + SECTIONS)], granularity.Granularity(maximum=60)))
  done = subprocess.run([browser, '--headless', '--no-sandbox', '--disable-gpu', '--virtual-time-budget=500',
                         f'--user-data-dir={tmp_path / "profile"}', '--dump-dom', f'file://{tmp_path}/page.html'],
                        capture_output=True, text=True, timeout=60)
  assert '<dt>blocks</dt>' in done.stdout
  shown = done.stdout[done.stdout.index('id="sheet"'):done.stdout.index('id="data"')]
  assert 'a &lt;/script&gt;&lt;script&gt;alert(1)&lt;/script&gt; &amp; &lt;!-- &lt;b&gt;' in shown and '<b>' not in shown
  assert shown.count('class="part first"') == len(blockattn.segment(NASTY + SECTIONS, max_tokens=60, model=MODEL))
