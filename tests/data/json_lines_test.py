"""Files of JSON lines, and reports of what became of the lines."""

import gzip
import json

import data_cases
import pytest
from data_cases import GOOD

from blockattn.data import json_lines


def test_files_folders_globs(tmp_path):
  (tmp_path / 'deep').mkdir()
  a, b, c = (data_cases.write_lines(tmp_path / name, [GOOD | {'id': name}])
             for name in ('a.jsonl', 'b.jsonl.gz', 'deep/c.jsonl'))
  (tmp_path / 'notes.txt').write_text('not data')
  assert json_lines.find_files(tmp_path) == [a, b, c]
  assert json_lines.find_files([f'{tmp_path}/*.gz', a, tmp_path / 'deep', a]) == [b, a, c]
  assert [example.id for example in data_cases.read([b, c])[0]] == ['b.jsonl.gz', 'deep/c.jsonl']
  with pytest.raises(FileNotFoundError, match=r'missing\*: no .jsonl'):
    json_lines.find_files(f'{tmp_path}/missing*')
  with pytest.raises(ValueError, match='notes.txt: .* its name must end in .jsonl or .jsonl.gz'):
    json_lines.find_files(tmp_path / 'notes.txt')


def test_the_mark_that_editors_write_is_no_error(tmp_path):
  path = data_cases.write_lines(tmp_path / 'a.jsonl', [b'\xef\xbb\xbf' + json.dumps(GOOD).encode()])
  examples, report = data_cases.read(path)
  assert len(examples) == report.lines == 1


def test_damaged_compression_is_an_error(tmp_path):
  path = tmp_path / 'a.jsonl.gz'
  path.write_bytes(gzip.compress(json.dumps(GOOD).encode() * 50)[:-12])
  with pytest.raises(ValueError, match=f'{path}: its compressed data is damaged'):
    data_cases.read(path)


def test_reports_add_up_and_survive_json():
  bad = json_lines.BadLine('f', 3, 'bad JSON', 'x')
  one = json_lines.Report(lines=3, examples=2, docs=1)
  one.add_bad(bad)
  one.dropped['too long'] += 1
  both = json_lines.Report.from_json(json.loads(json.dumps(one.to_json()))) + one
  assert (both.lines, both.bad['bad JSON'], both.dropped['too long'], both.listed) == (6, 2, 2, [bad, bad])
