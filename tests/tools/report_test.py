"""The page about a run: what each file becomes, that it fetches nothing, and what broken files are told."""

import html
import html.parser
import json
import re

import numpy as np
import pytest

from tools import charts, report


def write(folder, name, value):
  path = folder / name
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(value if isinstance(value, bytes) else (value if isinstance(value, str) else json.dumps(value)).encode())
  return path


def lines(values):
  return ''.join(json.dumps(value) + '\n' for value in values)


def page_of(folder):
  """The page without the white space between tags."""
  return re.sub(r'>\s+<', '><', report.render(folder).read_text())


def hovers_of(page):
  """What the pointer shows, by title: {name: [(value, what its place is called)]}."""
  figures = re.findall(r'<figure class="\w+"><h3>(.*?)</h3>.*?data-chart="(.*?)"', page)
  return {title: {s['name']: [(v, at) for _, v, at in s['points']] for s in json.loads(html.unescape(data))['series']}
          for title, data in figures}


def titles_of(page):
  return re.findall(r'<figure class="curve"><h3>(.*?)</h3>', page)


class Tags(html.parser.HTMLParser):
  """Checks that tags are closed in order, and collects what would be fetched."""
  EMPTY = {'meta', 'br', 'line', 'path', 'rect', 'circle', 'polyline'}

  def __init__(self, page):
    super().__init__()
    self.open, self.fetched = [], []
    self.feed(page)
    assert not self.open

  def handle_starttag(self, tag, attrs):
    self.fetched += [value for name, value in attrs if name in ('src', 'href', 'xlink:href')
                     and not value.startswith(('#', 'data:'))]
    if tag not in self.EMPTY:
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.fetched += [value for name, value in attrs if name in ('src', 'href', 'xlink:href')
                     and not value.startswith(('#', 'data:'))]

  def handle_endtag(self, tag):
    assert self.open.pop() == tag


def test_stored_logits_have_a_page(tmp_path):
  top = {str(count): {'kl': 2.0 * (1 - 1 / count), 'rest': 0.3 / count} for count in (16, 2, 256)}
  write(tmp_path, 'bias.json', {'kl': 2.0, 'tokens': 13653.0, 'top': top})
  write(tmp_path, 'meta.json', {'source': 'some/teacher', 'top_k': 64, 'blocked': False})
  page = page_of(tmp_path)
  assert not Tags(page).fetched and '2.0000 nats per token, over\n13,653 tokens' in page and 'some/teacher' in page
  cells = re.findall(r'<tr><td>(\d+)</td><td>([\d.]+)</td><td>([\d.]+%)</td>', page)
  assert cells == [('2', '1.0000', '50.0%'), ('16', '1.8750', '93.8%'), ('256', '1.9922', '99.6%')]
  write(tmp_path, 'bias.json', {'kl': 2.0})
  with pytest.raises(ValueError, match='bias.json.*tokens'):
    page_of(tmp_path)


@pytest.fixture
def run(tmp_path):
  """A workdir with every file."""
  write(tmp_path, 'run.json', {'command': ['python', '-m', 'x'], 'commit': 'abc123', 'jax': '0'})
  write(tmp_path, 'config.json', {'steps': 3})
  write(tmp_path, 'metrics.jsonl', lines({'step': s, 'time': 0, 'loss': 3.0 / s, 'lr': 0.1} for s in (1, 2, 3)))
  write(tmp_path, 'other/metrics.jsonl', lines({'step': s, 'time': 0, 'loss': 4.0 / s} for s in (1, 2)))
  write(tmp_path, 'summary.json', {
      'teacher_full': {'exact_match': 0.9, 'ce': 0.1, 'kl': 0.0, 'n': 100},
      'teacher_block': {'exact_match': 0.5, 'ce': 0.6, 'kl': 0.5, 'n': 100},
      'student_block': {'exact_match': 0.8, 'ce': 0.2, 'kl': 0.1, 'n': 100},
      'seconds': {'distill': 75.0, 'evaluate': 30.0}, 'dtype': 'float32'})
  write(tmp_path, 'layout.json', {'lengths': [2, 1], 'mask': ['1..', '11.', '111']})
  write(tmp_path, 'segmented.jsonl', lines([{'id': 'page <1>', 'blocks': ['<i>a</i>', 'b', 'c']}]))
  write(tmp_path, 'examples.jsonl', lines([{'blocks': ['<b>one</b>', 'two'], 'prompt': 'Which?', 'response': 'A & B',
                                            'answers': {'teacher_full': ' a & b', 'student_block': 'C'}}]))
  return tmp_path


def test_a_page_with_every_part(run):
  page = page_of(run)
  assert Tags(page).fetched == []
  assert re.findall(r'<h2>(.*?)</h2>', page) == ['Results', 'Curves', 'Who attends to whom', 'Blocks from the segmenter',
                                                   'Examples', 'Config']
  assert 'python -m x' in page and 'abc123' in page and '&#34;steps&#34;: 3' in page
  assert not list(run.glob('*.tmp'))


def test_the_table_compares_with_the_teacher(run):
  page = page_of(run)
  row = next(row for row in re.findall(r'<tr class="">(.*?)</tr>', page) if 'Student, blocks' in row)
  cells = re.findall(r'<td>(.*?)</td>', row)
  assert cells == ['Student, blocks', '80.0 %<small class="bad">−10.0</small>', '0.200<small class="bad">+0.100</small>',
                   '0.100<small class="bad">+0.100</small>', '100']
  assert 'lost to blocks (40.0 points), training gives back: Student, blocks: 75%' in page
  assert 'at most 5.0 points' in page   # 50 / sqrt(100)
  assert re.search(r'distill</td><td>1m15s</td>.*?width:100.0%.*?evaluate</td><td>30s</td>.*?width:40.0%', page, re.S)


def test_examples_are_text_and_are_judged(run):
  page = page_of(run)
  assert '<b>one</b>' not in page and '&lt;b&gt;one&lt;/b&gt;' in page
  segmented, example = re.findall(r'<article class="example">.*?</article>', page, re.S)
  assert 'page &lt;1&gt;: 3 blocks' in segmented and re.findall(r'<span class="(\w+)">', segmented) == ['t0', 't1', 't0']
  assert '&lt;i&gt;a&lt;/i&gt;' in segmented
  assert re.findall(r'<span class="(\w+)">', example) == ['t0', 't1', 'prompt']
  judged = re.findall(r'<td>([^<]*)</td><td class="answer">([^<]*)</td><td class="(good|bad)">', example)
  assert judged == [('Teacher, full attention', ' a &amp; b', 'good'), ('Student, blocks', 'C', 'bad')]


def test_the_mask_is_drawn_cell_by_cell():
  grey, there = len(charts.COLOURS), 0.12
  cells = charts.mask_cells([2, 1], ['1...', '11..', '111.', '....'], 1)   # the last token is padding
  assert cells[..., 0].tolist() == [[0, grey, grey, grey], [0, 0, grey, grey], [0, 0, 1, grey], [grey] * 4]
  assert cells[..., 1].tolist() == [[1, there, there, 0], [1, 1, there, 0], [1, 1, 1, 0], [0] * 4]


def test_a_large_mask_is_scaled_down(tmp_path):
  size = 3 * report.MAX_CELLS - 1
  mask = ['1' * (i + 1) + '.' * (size - i - 1) for i in range(size)]
  write(tmp_path, 'layout.json', {'lengths': [size], 'mask': mask})
  assert 'One cell stands for 3 × 3 tokens' in page_of(tmp_path)
  cells = charts.mask_cells([size], mask, 3)
  assert cells.shape == (report.MAX_CELLS, report.MAX_CELLS, 2)
  assert np.diag(cells[..., 1]) == pytest.approx([6 / 9] * (report.MAX_CELLS - 1) + [3 / 4])   # of the pairs are read


def test_curves_of_both_runs(run):
  page = page_of(run)
  assert titles_of(page) == ['loss', 'lr']
  shown = hovers_of(page)
  assert shown['loss'] == {'': [(3.0, 'step 1'), (1.5, 'step 2'), (1.0, 'step 3')],
                           'other': [(4.0, 'step 1'), (2.0, 'step 2')]}
  assert list(shown['lr']) == ['']


def test_kl_by_position_is_a_map_over_the_steps(tmp_path):
  values = lambda step: {f'kl_pos_{i}': float('nan') if i == 3 and step == 2 else float(i * step) for i in range(8)}
  write(tmp_path, 'metrics.jsonl', lines({'step': s, 'time': 0, 'loss': 1.0} | values(s) for s in (1, 2)))
  page = page_of(tmp_path)
  Tags(page)
  assert titles_of(page) == ['loss']   # no curve of every bin
  shown = hovers_of(page)[report.KL_BY_POSITION]
  assert list(shown) == ['1/2 to end', '1/4 to 1/2', '1/8 to 1/4', '1/16 to 1/8', '1/32 to 1/16', '1/64 to 1/32',
                         '1/128 to 1/64', 'start to 1/128']
  assert shown['1/2 to end'] == [(7.0, 'step 1'), (14.0, 'step 2')] and shown['1/32 to 1/16'] == [(3.0, 'step 1')]
  last = re.findall(r'>([\d.]+)</text>', page[page.index(report.KL_BY_POSITION):])
  assert last == ['14', '12', '10', '8', '3', '4', '2', '0']
  assert 'From 0 (pale) to 14 (dark)' in page


def test_scalars_of_many_parts_are_a_map(tmp_path):
  names = [f'val_f1/{name}{hints}' for name in ('code', 'web_text') for hints in ('', '/without_hints')]
  steps = [{'step': s, 'time': 0, 'loss': 1.0} | (dict.fromkeys(names, s / 400) if s % 2 == 0 else {})
           for s in range(1, 401)]
  write(tmp_path, 'metrics.jsonl', lines(steps))
  shown = hovers_of(page_of(tmp_path))['val_f1, by part']
  assert list(shown) == ['code', 'code, without hints', 'web text', 'web text, without hints']
  assert len(shown['code']) == 50 and shown['code'][0] == (0.0125, 'steps 2 to 8')   # means of four steps each


@pytest.mark.parametrize('last, state', [(3, 'step 3 of 3, finished'), (2, 'step 2 of 3, not finished'),
                                         (None, 'no step of 3 is logged')])
def test_how_far_a_run_has_come(tmp_path, last, state):
  """A page of a run that goes on, was stopped, or failed before its first line."""
  write(tmp_path, 'config.json', {'steps': 3})
  write(tmp_path, 'run.json', {'command': ['x'], 'commit': None, 'devices': ['TPU_0', 'TPU_1', 'TPU_2'],
                                'attention': {'impl': 'tpu', 'why': 'auto on tpu'}})
  if last:
    write(tmp_path, 'metrics.jsonl', lines({'step': s, 'time': 60 * s, 'loss': 1.0} for s in range(1, last + 1)) + '{"ste')
  shown = dict(re.findall(r'<dt>(.*?)</dt><dd>(.*?)</dd>', page_of(tmp_path)))
  assert shown['state'] == state and shown['devices'] == '3: TPU_0, …' and shown['command'] == 'x'
  assert shown['attention'] == 'tpu (auto on tpu)'
  assert ('logged' in shown) is bool(last)
  if last:
    assert shown['logged'] == f'1970-01-01 00:01:00 to 1970-01-01 00:0{last}:00 UTC'


def test_a_run_of_one_line(tmp_path):
  write(tmp_path, 'metrics.jsonl', lines([{'step': 1, 'time': 0, 'loss': 0.41901702}]))
  assert hovers_of(page_of(tmp_path)) == {'loss': {'': [(0.41902, 'step 1')]}}


def test_loss_comes_first_and_speed_last(tmp_path):
  names = ('mfu', 'weight_mean', 'lr', 'kl', 'loss_tokens', 'steps_per_s', 'loss', 'seconds_left', 'tokens_per_s')
  write(tmp_path, 'metrics.jsonl', lines([{'step': 1, 'time': 0} | dict.fromkeys(names, 1.0)]))
  assert titles_of(page_of(tmp_path)) == ['loss', 'kl', 'loss_tokens', 'lr', 'weight_mean', 'mfu', 'steps_per_s',
                                          'tokens_per_s']


def test_values_that_are_not_finite_leave_gaps(tmp_path):
  values = (1.0, 1.5, float('nan'), 2.0, 1e308, -1e308)   # the span of the last two is no number
  write(tmp_path, 'metrics.jsonl', lines({'step': s, 'time': 0, 'loss': v} for s, v in enumerate(values)))
  page = page_of(tmp_path)
  Tags(page)
  curve = re.search(r'<path d="([^"]*)"[^>]*style="fill: none; stroke: var\(--s0\)', page)[1]
  assert curve.count('M') == 2 and '1 values are not finite' in page and 'NaN' not in page


def test_only_the_parts_that_are_there(tmp_path):
  write(tmp_path, 'config.json', {'steps': 3})
  assert re.findall(r'<h2>(.*?)</h2>', page_of(tmp_path)) == ['Config']


@pytest.mark.parametrize('name, text, message', [
    ('summary.json', '{', 'summary.json is no valid JSON'),
    ('summary.json', '[]', 'summary.json is a list, not a JSON object'),
    ('layout.json', '{"mask": []}', r"layout.json lacks 'lengths'; it has 'mask'"),
    ('layout.json', '{"lengths": [1], "mask": ["1.", "1"]}', r'layout.json: mask row 1 must be 2 characters'),
    ('layout.json', '{"lengths": [3], "mask": ["1"]}', r'layout.json: lengths must .* at most the 1 rows'),
    ('segmented.jsonl', '{"blocks": []}\n', "segmented.jsonl:1 lacks 'id'"),
    ('segmented.jsonl', '{"id": "a", "blocks": [1]}\n', r"segmented.jsonl:1: 'blocks'\[0\] is 1, not a text"),
    ('layout.json', '{"lengths": ["1"], "mask": ["1"]}', r"layout.json: 'lengths'\[0\] is '1', not a whole number"),
    ('layout.json', '{"lengths": [1], "mask": [1]}', r"layout.json: 'mask'\[0\] is 1, not a text"),
    ('bias.json', '{"kl": "1", "tokens": 1, "top": {}}', "bias.json: 'kl' is '1', not a number"),
    ('summary.json', b'\xff', 'summary.json is no UTF-8 text'),
    ('metrics.jsonl', b'\xff\n', 'metrics.jsonl is no UTF-8 text'),
    ('examples.jsonl', '{"blocks": []}\n', r"examples.jsonl:1 lacks 'prompt', 'response', 'answers'"),
])
def test_broken_files_are_named(tmp_path, name, text, message):
  write(tmp_path, name, text)
  with pytest.raises(ValueError, match=message):
    report.render(tmp_path)
  assert not (tmp_path / 'report.html').exists()


def test_odd_values_do_no_harm(tmp_path):
  """Facts of a run that nothing depends on: what is no number, or none of this world, is shown or left out."""
  write(tmp_path, 'config.json', {'steps': 'many'})
  write(tmp_path, 'run.json', {'devices': 3, 'command': {}})
  write(tmp_path, 'summary.json', {'a': {'exact_match': 'x', 'n': 10 ** 400, 'f1': None}, 'seconds': {'b': 10 ** 400}})
  write(tmp_path, 'metrics.jsonl', lines([{'step': 1, 'time': 1e300, 'loss': 1}, {'step': 2, 'time': 1, 'loss': None}]))
  assert 'step 2' in page_of(tmp_path)


def test_nothing_to_report(tmp_path):
  with pytest.raises(FileNotFoundError, match='holds nothing to report'):
    report.render(tmp_path)
  with pytest.raises(FileNotFoundError, match='no folder .*absent; name the workdir'):
    report.render(tmp_path / 'absent')
