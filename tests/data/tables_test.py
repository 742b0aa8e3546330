"""Tables of records: the same rows from every kind of file, in pieces, and what is said of files that are none."""

import gzip
import itertools
import json
import pathlib
import re
import tracemalloc

import data_cases
import datasets
import pyarrow
import pytest
import source_cases
from pyarrow import feather, ipc, parquet
from source_cases import OPTIONS

from blockattn.data import prompts, sources, stream, tables
from blockattn.data.tables import Origin

tokenizer = source_cases.tokenizer
LINES = [data_cases.passages_line(i, passages=1 + i % 4, words=1 + i % 3) for i in range(40)]
BLOCKS = [{'id': f'b{i}', 'blocks': [f'block {i} ', 'and another '], 'prompt': 'which?', 'response': f' {i}'}
          for i in range(20)]


def write_arrow(path, rows, batch=7):
  table = pyarrow.Table.from_pylist(rows)
  with ipc.new_file(path, table.schema) as writer:
    writer.write_table(table, max_chunksize=batch)


def write_stream(path, rows):
  table = pyarrow.Table.from_pylist(rows)
  with ipc.new_stream(path, table.schema) as writer:
    writer.write_table(table, max_chunksize=7)


WRITERS = {
    'a.jsonl': data_cases.write_lines, 'a.jsonl.gz': data_cases.write_lines, 'a.arrow': write_arrow, 'b.arrow': write_stream,
    'a.parquet': lambda path, rows: parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=7),
    'a.feather': lambda path, rows: feather.write_feather(pyarrow.Table.from_pylist(rows), path, chunksize=7),
    'saved': lambda path, rows: datasets.Dataset.from_list(rows).save_to_disk(path),
    'splits': lambda path, rows: datasets.DatasetDict({'train': datasets.Dataset.from_list(rows)}).save_to_disk(path)}


def write(folder, kind, rows):
  WRITERS[kind](folder / kind, rows)
  return str(folder / kind)


def records(path, piece=tables.PIECE, **origin):
  """[(row's number, record)] of all tables of an origin."""
  return [(table.line(place), record) for table in tables.open_tables(Origin(path, **origin), piece)
          for i in range(table.pieces) for place, record in table.read(i)]


@pytest.mark.parametrize('kind', WRITERS)
@pytest.mark.parametrize('piece', [1, 100, 1 << 20])
def test_every_kind_gives_the_same_records_in_pieces(tmp_path, kind, piece):
  path = write(tmp_path, kind, LINES)
  assert records(path, piece) == list(enumerate(LINES, 1))
  [table] = tables.open_tables(Origin(path), piece)
  assert table.pieces == 1 or piece < 1 << 20 or kind in ('a.parquet', 'a.arrow', 'a.feather')
  backwards = [found for i in reversed(range(table.pieces)) for found in reversed(list(table.read(i)))]
  assert [(table.line(place), record) for place, record in backwards] == list(enumerate(LINES, 1))[::-1]


TEXTS = [{'text': f'The {i}. And\n\nthen ' * 50} for i in range(9)]


class EveryForty:
  fingerprint = ''

  def __call__(self, texts):
    return [range(40, len(text), 40) for text in texts]


@pytest.mark.parametrize('kind', [kind for kind in WRITERS if kind != 'a.jsonl'])
@pytest.mark.parametrize('rows', [LINES, BLOCKS, [data_cases.CHAT] * 9, TEXTS], ids=['passages', 'blocks', 'chats', 'texts'])
def test_every_kind_gives_the_same_batches(tmp_path, tokenizer, kind, rows):
  made = []
  for name in ('a.jsonl', kind):
    source = sources.FileRows(write(tmp_path, name, rows), tokenizer, OPTIONS, text_cutter=EveryForty())
    it = stream.batches(source, batch=2, seed=0)
    made.append(list(itertools.islice(it, 12)))   # several epochs
    it.close()
  data_cases.assert_same(made[1], made[0])


@pytest.mark.parametrize('kind', WRITERS)
def test_columns_by_other_names(tmp_path, kind):
  rows = [{'context': 'A river. ', 'query': 'What?', 'out': {'text': ' A river', 'score': 1}, 'prompt': 'no', 'n': 7}] * 3
  path = write(tmp_path, kind, rows)
  columns = {'context': 'blocks', 'query': 'prompt', 'out.text': 'response'}
  found = [record for _, record in records(path, columns=columns)]
  assert [{k: record[k] for k in ('blocks', 'prompt', 'response')} for record in found] == [
      {'blocks': ['A river. '], 'prompt': 'What?', 'response': ' A river'}] * 3
  with pytest.raises(ValueError, match="'block'}: no such column is read; did you mean 'blocks'"):
    Origin(path, columns={'context': 'block'})
  wrong = {'contxt': 'blocks'}
  if kind.startswith('a.jsonl'):
    [_, bad], *_ = records(path, columns=wrong)
    assert str(bad).startswith('missing key: "contxt", see columns')
  else:
    with pytest.raises(ValueError, match=f"{re.escape(path)}.*: no column 'contxt', which columns reads as 'blocks'; "
                                         "did you mean 'context'"):
      tables.open_tables(Origin(path, columns=wrong))
    with pytest.raises(ValueError, match='its columns are context, query, out, prompt, n, none of which is "passages"'):
      tables.open_tables(Origin(path))


def test_entries_of_files():
  assert tables.origin('a.jsonl', {'x': 'text'}) == Origin('a.jsonl', columns={'x': 'text'})
  assert tables.origin({'path': 'a', 'weight': 0.3, 'mode': 'full'}) == Origin('a', 0.3, 'full')
  for entry, message in (({'path': 'a', 'wieght': 1}, "has 'wieght'; did you mean 'weight'"),
                         ({'weight': 1}, "has no 'path'"),
                         ({'path': 'a', 'mode': 'both'}, "mode of a='both'; choose one of block, full"),
                         ({'path': 'a', 'weight': 0}, 'weight of a=0; give a number above 0'),
                         ('gs://bucket/a.parquet', 'only paths of this machine')):
    with pytest.raises(ValueError, match=message):
      tables.origin(entry)


# What is wrong with a file.


@pytest.mark.parametrize('kind', ['a.parquet', 'a.arrow', 'a.feather'])
@pytest.mark.parametrize('damage', [lambda data: data[:len(data) // 2], lambda data: b'x' * len(data), lambda data: b''])
def test_a_file_that_is_none_is_named(tmp_path, kind, damage):
  path = tmp_path / kind
  write(tmp_path, kind, LINES)
  path.write_bytes(damage(path.read_bytes()))
  with pytest.raises(ValueError, match=f'{path}: cannot be read .*; it is cut off or of another kind: write it again') as e:
    tables.open_tables(Origin(str(path)))
  assert '\n' not in str(e.value)


def test_a_damaged_row_group_is_named(tmp_path):
  path = tmp_path / 'a.parquet'
  write(tmp_path, 'a.parquet', LINES)
  data, column = bytearray(path.read_bytes()), parquet.read_metadata(path).row_group(2).column(0)
  data[column.dictionary_page_offset:column.dictionary_page_offset + 20] = b'\xff' * 20
  path.write_bytes(data)
  [table] = tables.open_tables(Origin(str(path)))
  with pytest.raises(ValueError, match=f'{path}:15: rows cannot be read .*damaged'):
    list(table.read(2))
  assert len(list(table.read(table.pieces - 1))) == 5


def test_a_row_group_that_is_too_large(tmp_path, monkeypatch):
  monkeypatch.setattr(tables, '_GROUP', 100)
  path = write(tmp_path, 'a.parquet', LINES)
  with pytest.raises(ValueError, match='row group 0 has 0 MB.*row_group_size=1000'):
    tables.open_tables(Origin(path))


def test_no_more_of_a_file_is_unpacked_than_is_asked_for(tmp_path, monkeypatch):
  path = write(tmp_path, 'a.jsonl.gz', LINES)
  monkeypatch.setattr(tables, '_decompressed', None)
  assert list(tables.in_order(path)) == list(enumerate(LINES, 1))
  data = pathlib.Path(path).read_bytes()
  pathlib.Path(path).write_bytes(data[:-12])   # nobody comes to where it is damaged
  assert next(prompts.read_examples(path)).id == 'q0'
  assert list(tables.in_order(write(tmp_path, 'a.parquet', LINES))) == list(enumerate(LINES, 1))


def test_damaged_compression(tmp_path):
  path = tmp_path / 'a.jsonl.gz'
  path.write_bytes(gzip.compress(json.dumps(BLOCKS[0]).encode() * 50)[:-12])
  with pytest.raises(ValueError, match=f'{path}: its compressed data is damaged'):
    tables.open_tables(Origin(str(path)))


ROW = {'id': 'x', 'blocks': ['a'], 'prompt': 'p', 'response': 'r'}


@pytest.mark.parametrize('kind', WRITERS)
@pytest.mark.parametrize('change, message', [
    ({'blocks': None}, 'unknown form'), ({'blocks': []}, 'empty blocks: "blocks" is empty'),
    ({'blocks': ['', 'x']}, r'empty blocks: "blocks"\[0\]'), ({'prompt': None}, 'missing key: "prompt"'),
    ({'prompt': ' '}, 'empty text: "prompt"'), ({'response': ''}, 'empty answers: "response"'),
    ({'prompt': 'a\0'}, 'NUL character')])
def test_a_malformed_row_is_named(tmp_path, tokenizer, kind, change, message):
  rows = [*[ROW] * 10, ROW | change, *[ROW] * 10]
  if kind.startswith('a.jsonl'):
    rows = [{name: value for name, value in row.items() if value is not None} for row in rows]
  told = []
  source = sources.FileRows(write(tmp_path, kind, rows), tokenizer, OPTIONS, tell=told.append)
  source.check()
  source.read(range(len(source)), seed=0)
  [bad] = map(str, told)
  assert re.match(rf'{re.escape(source.tables[0][0].name)}:11: {message}', bad), bad
  assert source.report.examples == 20


@pytest.mark.parametrize('kind', [kind for kind in WRITERS if 'jsonl' not in kind])
def test_a_column_of_another_type_is_refused_at_once(tmp_path, tokenizer, kind):
  source = sources.FileRows(write(tmp_path, kind, [ROW | {'prompt': 7}] * 20), tokenizer, OPTIONS)
  with pytest.raises(ValueError, match=r':1: wrong type: "prompt" is int, not str; so are \d+ rows.*correct the column'):
    source.check()


def test_a_library_that_is_not_there(tmp_path, monkeypatch):
  path = write(tmp_path, 'a.parquet', LINES)
  monkeypatch.setitem(__import__('sys').modules, 'pyarrow.parquet', None)
  with pytest.raises(ValueError, match=r'a.parquet: reading it needs pyarrow: pip install "blockattn\[data\]"'):
    tables.open_tables(Origin(path))


def test_a_split_that_is_not_there(tmp_path):
  path = write(tmp_path, 'splits', LINES)
  with pytest.raises(ValueError, match=f"{path}: no split 'test'; give .* of train"):
    tables.open_tables(Origin(path, split='test'))


def test_a_dataset_is_the_same_in_every_cache(tmp_path):
  prints = set()
  for name, rows in (('one', LINES), ('two', LINES), ('three', LINES[::-1])):
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / name)
    prints.add(tables.open_tables(Origin(str(tmp_path / name)))[0].fingerprint)
  assert len(prints) == 2


# Size.


def test_memory_does_not_grow_with_the_file(tmp_path, tokenizer):
  peaks = {}
  for kind, count in itertools.product(('a.jsonl', 'a.parquet'), (1, 8)):
    rows = ({'id': str(i), 'blocks': ['word ' * 200], 'prompt': f'{i}?', 'response': 'yes'} for i in range(300 * count))
    path = str(tmp_path / f'{count}{kind}')
    if kind == 'a.parquet':
      parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path, row_group_size=100)
    else:
      data_cases.write_lines(pathlib.Path(path), rows)
    source = sources.FileRows(path, tokenizer, sources.FileOptions(1024, 8))
    it = stream.batches(source, batch=1, seed=0)
    tracemalloc.start()
    for _ in itertools.islice(it, 40 * count):
      pass
    peaks[kind, count] = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    it.close()
  for kind in ('a.jsonl', 'a.parquet'):
    assert peaks[kind, 8] < 1.5 * peaks[kind, 1] + (1 << 20), peaks


def test_a_fingerprint_is_of_the_content(tmp_path):
  prints = [tables.file_print(write(tmp_path, kind, rows)) for kind, rows in (('a.jsonl', LINES), ('a.jsonl', LINES[::-1]),
                                                                            ('a.jsonl', LINES))]
  assert prints[0] == prints[2] != prints[1]
  large = tmp_path / 'large'
  large.write_bytes(bytes(17 << 20))
  before = tables.file_print(str(large))
  with open(large, 'r+b') as stream_:
    stream_.write(b'x')
  assert tables.file_print(str(large)) != before
