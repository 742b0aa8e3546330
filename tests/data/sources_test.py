"""Sources: rows of files and of pages."""

import os

import data_cases
import pytest
import source_cases
from source_cases import OPTIONS, STYLE

from blockattn.data import json_lines, prompts, sources

tokenizer, folder, files = source_cases.tokenizer, source_cases.folder, source_cases.files
containers, pages = source_cases.containers, source_cases.pages


def test_rows_of_files_hold_every_document_once(files):
  assert (files.report.lines, files.report.examples, files.report.docs) == (43, 40, 40)
  docs = [files.doc(i) for i in range(40)]
  rows = [files[i] for i in range(len(files))]
  starts = [row['tokens'][row['layout'].doc == d] for row in rows for d in range(1, row['layout'].doc.max() + 1)]
  assert sorted(s.tobytes() for s in starts) == sorted(doc.tokens.tobytes() for doc in docs)
  assert max(row['layout'].doc.max() for row in rows) > 1
  for row in rows:
    assert len({*zip(row['layout'].doc.tolist(), row['layout'].block.tolist(), strict=True)} - {(0, 0)}) <= 12


def test_documents_are_the_examples_in_order(files, folder, tokenizer):
  examples = list(prompts.read_examples(folder))
  assert len(examples) == 40
  for i, example in enumerate(examples):
    doc = files.doc(i)
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
  with pytest.raises(ValueError, match=r'a.jsonl: no document to train on\n2 lines.*1 bad JSON, 1 too long'):
    sources.FileRows(path, tokenizer, OPTIONS, tmp_path / 'cache')


def test_strict_reading_stops(folder, tokenizer, tmp_path):
  for _ in range(2):   # nothing is left behind that could hide the error the second time
    with pytest.raises(json_lines.BadLineError, match='a.jsonl:16: bad JSON'):
      sources.FileRows(str(folder), tokenizer, OPTIONS, tmp_path, strict=True)
    assert all(name.endswith('.lock') for name in os.listdir(tmp_path))
  sources.FileRows(str(folder), tokenizer, OPTIONS, tmp_path)
  with pytest.raises(json_lines.BadLineError, match='a.jsonl:16: bad JSON'):   # from the cache, too
    sources.FileRows(str(folder), tokenizer, OPTIONS, tmp_path, strict=True)


def test_what_pages_are_made_of(pages, containers, tokenizer):
  same = sources.PageRows(containers, STYLE, tokenizer, length=900, max_blocks=20)
  assert same.fingerprint() == pages.fingerprint()
  fewer = sources.PageRows(containers[:3], STYLE, tokenizer, length=900, max_blocks=20)
  assert fewer.fingerprint().keys() == pages.fingerprint().keys() and fewer.fingerprint() != pages.fingerprint()
