"""Encoded documents on disk: made once, shared, mended."""

import concurrent.futures
import os
import time

import data_cases
import numpy as np
import pytest
import source_cases
from source_cases import OPTIONS

from blockattn.data import encode, prompts, sources, store

tokenizer, folder = source_cases.tokenizer, source_cases.folder


@pytest.fixture
def cached(tmp_path, tokenizer, monkeypatch):
  """A file in a filled cache, and a function that opens it: (whether the file was encoded again, all its tokens)."""
  path = data_cases.write_lines(tmp_path / 'a.jsonl', [*map(data_cases.passages_line, range(5)), b'{'])
  calls, real = [], encode.encode_examples
  monkeypatch.setattr(encode, 'encode_examples', lambda *args, **kwargs: calls.append(1) or real(*args, **kwargs))

  def use(path=path, options=OPTIONS, tokenizer=tokenizer):
    before = len(calls)
    source = sources.FileRows(path, tokenizer, options, tmp_path / 'cache')
    assert source.stores[0].built == (len(calls) > before)
    return len(calls) > before, [(doc.tokens.tolist(), doc.lengths, doc.answer)
                                 for doc in map(source.doc, range(len(source.sizes)))], source.report

  assert use()[0]
  return use


def stored(tmp_path):
  return sorted(path for path in (tmp_path / 'cache').iterdir() if path.suffix != '.lock')


def test_a_store_is_for_those_that_the_umask_lets_in(cached, tmp_path):
  made = tmp_path / 'made'
  made.mkdir()
  assert [path.stat().st_mode for path in stored(tmp_path)] == [made.stat().st_mode]


def test_the_second_use_does_not_encode(cached, tmp_path):
  again, docs, report = cached()
  assert not again and len(docs) == 5
  assert (report.lines, report.examples, report.docs, dict(report.bad)) == (6, 5, 5, {'bad JSON': 1})
  [folder] = stored(tmp_path)
  assert isinstance(np.load(folder / 'tokens.npy', mmap_mode='r'), np.memmap)


def test_a_changed_file_is_encoded_anew(cached, tmp_path):
  data_cases.write_lines(tmp_path / 'a.jsonl', map(data_cases.passages_line, range(1, 6)))
  assert cached()[0] and not cached()[0] and len(stored(tmp_path)) == 2


def test_a_renamed_file_is_not(cached, tmp_path):
  os.rename(tmp_path / 'a.jsonl', tmp_path / 'b.jsonl')
  again, _, report = cached(str(tmp_path / 'b.jsonl'))
  assert not again and report.listed[0].file == str(tmp_path / 'b.jsonl')


@pytest.mark.parametrize('change', [
    {'length': 300}, {'max_blocks': 11}, {'too_long': 'cut'}, {'chat': True}, {'bos': 'never'},
    {'template': prompts.QuestionTemplate(response='{answer}')}])
def test_options_that_decide_the_tokens_are_part_of_the_key(cached, change):
  values = {field: getattr(OPTIONS, field) for field in OPTIONS.__dataclass_fields__}
  assert cached(options=store.FileOptions(**values | change))[0]
  assert not cached(options=store.FileOptions(**values | {'window': 3, 'shared_first': True}))[0]


def test_the_tokenizer_is_part_of_the_key(cached):
  assert cached(tokenizer=data_cases.tiny_tokenizer(data_cases.TRIMMING))[0]
  assert cached(tokenizer=data_cases.tiny_tokenizer(eos='<|endoftext|>'))[0]


def damage_cut(path):
  path.write_bytes(path.read_bytes()[:-4])


def damage_garbled(path):
  path.write_bytes(b'x' * path.stat().st_size)


@pytest.mark.parametrize('name, damage', [
    ('tokens.npy', damage_cut), ('ends.npy', damage_cut), ('meta.json', damage_cut), ('meta.json', damage_garbled),
    ('lengths.npy', damage_garbled), ('answers.npy', os.remove), ('meta.json', os.remove)])
def test_a_damaged_store_is_built_anew(cached, tmp_path, name, damage, caplog):
  _, before, _ = cached()
  [folder] = stored(tmp_path)
  damage(folder / name)
  again, after, _ = cached()
  assert again and after == before and 'damaged' in caplog.text
  assert not cached()[0] and stored(tmp_path) == [folder]


def test_an_interrupted_encoding_leaves_nothing(cached, tmp_path, monkeypatch):
  [folder] = stored(tmp_path)

  def fail(*args, **kwargs):
    yield next(real(*args, **kwargs))
    raise KeyboardInterrupt

  real = encode.encode_examples
  data_cases.write_lines(tmp_path / 'a.jsonl', [data_cases.passages_line(9)])
  monkeypatch.setattr(encode, 'encode_examples', fail)
  with pytest.raises(KeyboardInterrupt):
    sources.FileRows(str(tmp_path / 'a.jsonl'), data_cases.tiny_tokenizer(), OPTIONS, tmp_path / 'cache')
  assert stored(tmp_path) == [folder]


def test_a_store_that_another_process_finished_first_is_used(cached, tmp_path, monkeypatch):
  [folder] = stored(tmp_path)
  os.rename(folder, tmp_path / 'theirs')
  real = os.rename

  def rename(source, target):
    real(tmp_path / 'theirs', target)   # they are done just before us
    real(source, target)

  monkeypatch.setattr(os, 'rename', rename)
  assert cached()[0] and stored(tmp_path) == [folder]


def test_of_those_who_want_a_store_at_once_one_makes_it(folder, tokenizer, tmp_path, monkeypatch):
  """As the processes of a run on one host do; the others wait for it, and then have the same documents."""
  calls, real = [], encode.encode_examples

  def slowly(*args, **kwargs):
    calls.append(1)
    time.sleep(0.3)
    yield from real(*args, **kwargs)

  monkeypatch.setattr(encode, 'encode_examples', slowly)
  path = str(folder / 'a.jsonl')
  with concurrent.futures.ThreadPoolExecutor(3) as pool:
    made = list(pool.map(lambda _: sources.FileRows(path, tokenizer, OPTIONS, tmp_path / 'cache'), range(3)))
  assert len(calls) == 1 and sorted(source.stores[0].built for source in made) == [False, False, True]
  data_cases.assert_same([made[0][0]], [made[1][0]])
  assert len(stored(tmp_path)) == 1
