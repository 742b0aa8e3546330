"""Sources: rows of files and of pages."""

import data_cases
import pyarrow
import pytest
import source_cases
from pyarrow import parquet
from source_cases import OPTIONS, STYLE

from blockattn.data import json_lines, prompts, sources, tables

tokenizer, folder, files = source_cases.tokenizer, source_cases.folder, source_cases.files
containers, pages = source_cases.containers, source_cases.pages


def test_rows_of_files_hold_every_document_once(files):
  docs = docs_of(files)
  rows = [files.pack(row) for row in files.read(range(len(files)), seed=0)]
  assert len(docs) == 40
  starts = [row['tokens'][row['layout'].doc == d] for row in rows for d in range(1, row['layout'].doc.max() + 1)]
  assert sorted(s.tobytes() for s in starts) == sorted(doc.tokens.tobytes() for doc in docs)
  assert max(row['layout'].doc.max() for row in rows) > 1
  for row in rows:
    assert len({*zip(row['layout'].doc.tolist(), row['layout'].block.tolist(), strict=True)} - {(0, 0)}) <= 12


def docs_of(source):
  """Its documents in the order of the files."""
  return [doc for piece in range(len(source)) for _, doc in source.examples(piece, json_lines.Report())]


def test_documents_are_the_examples_in_order(files, folder, tokenizer):
  examples = list(prompts.read_examples(folder))
  assert len(examples) == 40
  for doc, example in zip(docs_of(files), examples, strict=True):
    assert tokenizer.decode(doc.tokens) == ''.join(example.blocks) + example.prompt + example.response + '<|im_end|>'
    assert len(doc.lengths) == len(example.blocks) + 1


def test_pages_are_a_function_of_their_number(pages, containers, tokenizer):
  again = sources.PageRows(containers, STYLE, tokenizer, length=900, max_blocks=20)
  data_cases.assert_same([again[i] for i in (9, 2)], [pages[i] for i in (9, 2)])
  assert len({pages[i]['tokens'].tobytes() for i in range(20)}) == 20
  row = pages[5]
  own = row['layout'].doc == 1
  example = pages.example(5 * pages.pages_per_row)
  assert tokenizer.decode(row['tokens'][own]) == (''.join(example.blocks) + example.prompt + example.response
                                                  + '<|im_end|>')
  assert tokenizer.decode(row['targets'][own & row['loss']]) == example.response + '<|im_end|>'


def test_pages_that_cannot_fit(containers, tokenizer):
  for bounds in ({'length': 50, 'max_blocks': 384}, {'length': 900, 'max_blocks': 2}):
    with pytest.raises(ValueError, match='no page fits into a row of .* make rows longer, or pages shorter'):
      sources.PageRows(containers, STYLE, tokenizer, **bounds)


def test_no_document_left(tmp_path, tokenizer):
  path = data_cases.write_lines(tmp_path / 'a.jsonl', [b'{', data_cases.passages_line(0, words=200)])
  with pytest.raises(ValueError, match='a.jsonl: no document to train on: 2 lines.*1 bad JSON, 1 too long.*data.length=256'):
    sources.FileRows(path, tokenizer, OPTIONS).check()


@pytest.mark.parametrize('kind', ['jsonl', 'parquet'])
def test_no_document_is_looked_for_for_ever(tmp_path, tokenizer, kind):
  rows = [data_cases.passages_line(i) for i in range(3000)]
  if kind == 'parquet':
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / 'a.parquet', row_group_size=500)
  else:
    data_cases.write_lines(tmp_path / 'a.jsonl', rows)
  source = sources.FileRows(str(tmp_path / f'a.{kind}'), tokenizer, sources.FileOptions(8, max_blocks=12))
  with pytest.raises(ValueError, match=r'no document to train on: 1\d{3} lines.*too long; rows have .*length=8') as refused:
    source.check()
  assert '\n' not in str(refused.value)


def test_malformed_lines_are_told_of_when_they_are_met(folder, tokenizer):
  told = []
  source = sources.FileRows(str(folder), tokenizer, OPTIONS, tell=told.append)
  source.check()
  assert not told
  for _ in range(2):   # once in all epochs
    source.read(range(len(source)), seed=0)
  assert [str(bad).removeprefix(f'{folder}/').partition(': ')[0] for bad in told] == ['a.jsonl:16', 'a.jsonl:17',
                                                                                     'b.jsonl.gz:2']
  assert (source.report.lines, source.report.examples, source.report.docs) == (86, 80, 80)
  strict = sources.FileRows(str(folder), tokenizer, OPTIONS, strict=True)
  with pytest.raises(json_lines.BadLineError, match='a.jsonl:16: bad JSON'):
    strict.read(range(len(strict)), seed=0)


def test_a_file_that_is_read_in_two_ways_has_two_prints(folder, tokenizer):
  path = str(folder / 'a.jsonl')
  entry = lambda **more: tables.Origin(path, **more)
  made = lambda *origins: sources.FileRows(origins, tokenizer, OPTIONS).fingerprint()
  one, two = entry(columns={'passages': 'passages'}), entry(columns={'passages': 'passages', 'id': 'id'})
  assert list(made(path)) == list(made(path, path)) == [path]
  assert list(made(one, two)) == [path, f'{path} (2)'] and list(made(one, entry(mode='full'))) == [path, f'{path} in full']
  assert len({*made(one, two).values()}) == 2 and {*made(one, two).values()} == {*made(two, one).values()}


def test_what_pages_are_made_of(pages, containers, tokenizer):
  same = sources.PageRows(containers, STYLE, tokenizer, length=900, max_blocks=20)
  assert same.fingerprint() == pages.fingerprint()
  fewer = sources.PageRows(containers[:3], STYLE, tokenizer, length=900, max_blocks=20)
  assert fewer.fingerprint().keys() == pages.fingerprint().keys() and fewer.fingerprint() != pages.fingerprint()
