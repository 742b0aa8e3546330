"""Sources of rows, their batches, the cache, and the tool that prepares files."""

import concurrent.futures
import itertools
import json
import os
import time

import data_cases
import jax
import numpy as np
import pytest

from blockattn.data import encode, pipeline, stdlib, text as text_lib
from blockattn.train import finetune, sources
from launch import sweep
from tools import prepare

STYLE = stdlib.PageStyle(renamed=0.0, split_words=0)
LENGTH = 256
OPTIONS = pipeline.FileOptions(LENGTH, max_blocks=12)


@pytest.fixture(scope='module')
def tokenizer():
  return data_cases.tiny_tokenizer()


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Two files of 40 examples and three malformed lines in all."""
  folder = tmp_path_factory.mktemp('files')
  lines = [data_cases.passages_line(i, passages=1 + i % 4, words=1 + i % 3) for i in range(40)]
  data_cases.write_lines(folder / 'a.jsonl', [*lines[:15], b'{', b'[]'])
  data_cases.write_lines(folder / 'b.jsonl.gz', [b'', b'{', *lines[15:]])
  return folder


@pytest.fixture(scope='module')
def files(folder, tokenizer, tmp_path_factory):
  return pipeline.FileRows(str(folder), tokenizer, OPTIONS, tmp_path_factory.mktemp('cache'))


@pytest.fixture(scope='module')
def containers(tmp_path_factory):
  """Documented classes, read from a made-up library."""
  root = tmp_path_factory.mktemp('library')
  words = ('opens', 'closes', 'counts', 'sorts', 'splits')
  for number, noun in enumerate(('files', 'words', 'lists', 'trees')):
    methods = ''.join(f'  def {verb}_{noun}(self, x):\n    """It {verb} {noun} of every kind."""\n' for verb in words)
    (root / f'{noun}.py').write_text(f'class C{number}:\n  """Holds {noun} that somebody made."""\n{methods}')
  return tuple(stdlib.read_containers(root))


@pytest.fixture(scope='module')
def pages(containers, tokenizer):
  return pipeline.PageRows(containers, STYLE, tokenizer, length=900, max_blocks=20, rows=50)


@pytest.fixture(scope='module')
def mixture(files, tokenizer, tmp_path_factory):
  folder = tmp_path_factory.mktemp('small')
  path = data_cases.write_lines(folder / 'c.jsonl', map(data_cases.passages_line, range(100, 110)))
  small = pipeline.FileRows(path, tokenizer, OPTIONS, folder / 'cache')
  return pipeline.Mixture((files, small), (3.0, 1.0))


@pytest.fixture(params=['files', 'pages', 'mixture'])
def source(request):
  return request.getfixturevalue(request.param)


def take(source, count, **kwargs):
  it = pipeline.batches(source, **{'batch': 4, 'seed': 3} | kwargs)
  try:
    return list(itertools.islice(it, count))
  finally:
    it.close()


def assert_same(got, want):
  assert len(got) == len(want)
  for g, w in zip(got, want, strict=True):
    jax.tree.map(np.testing.assert_array_equal, g, w)


def row_ids(batches):
  """What tells rows apart: their tokens."""
  return [row.tobytes() for batch in batches for row in batch['tokens']]


# Batches


def test_a_batch(source):
  [batch] = take(source, 1)
  shape = (4, source.length)
  assert sorted(batch) == ['gold', 'layout', 'loss', 'targets', 'text', 'tokens']
  assert all(x.shape == shape for x in jax.tree.leaves(batch))
  assert {name: x.dtype.name for name, x in batch.items() if name != 'layout'} == {
      'tokens': 'int32', 'targets': 'int32', 'loss': 'bool', 'text': 'bool', 'gold': 'bool'}
  assert (batch['loss'] <= batch['text']).all() and (batch['text'] <= (batch['layout'].doc > 0)).all()
  assert batch['loss'].any(axis=1).all()


@pytest.mark.parametrize('step', [0, 1, 7])
def test_resuming_gives_the_same_batches(source, step):
  straight = take(source, 12)
  assert_same(take(source, 12 - step, start_step=step), straight[step:])
  it = pipeline.batches(source, batch=4, seed=3)
  first = [next(it) for _ in range(9)]
  assert it.get_state() == {'next_step': 9, 'source': it.fingerprint}
  assert it.fingerprint and json.loads(json.dumps(it.get_state())) == it.get_state()
  it.set_state({'next_step': step})   # back, with batches read ahead
  assert_same([next(it) for _ in range(12 - step)], straight[step:])
  assert_same(first, straight[:9])
  assert it.get_state()['next_step'] == 12
  it.close()


@pytest.mark.parametrize('count', [2, 4])
def test_any_number_of_processes_sees_the_same_global_batches(source, count):
  whole = take(source, 6)
  parts = [take(source, 6, rows=range(i * 4 // count, (i + 1) * 4 // count)) for i in range(count)]
  glued = [jax.tree.map(lambda *rows: np.concatenate(rows), *step) for step in zip(*parts, strict=True)]
  assert_same(glued, whole)


def test_reading_ahead_changes_nothing(source):
  assert_same(take(source, 5, prefetch=0), take(source, 5, prefetch=4))


def test_seeds_and_orders(files):
  orders = [row_ids(take(files, 3, seed=seed)) for seed in (3, 4)]
  assert orders[0] != orders[1]
  assert row_ids(take(files, 2, shuffle=False)) == [files[i]['tokens'].tobytes() for i in range(8)]


def test_an_epoch_holds_every_row_once(files):
  n = len(files)
  assert n % 4, 'the test is about batches that straddle epochs'
  ids = row_ids(take(files, n))   # four epochs
  epochs = [ids[i:i + n] for i in range(0, 4 * n, n)]
  every = sorted(files[i]['tokens'].tobytes() for i in range(n))
  assert all(sorted(epoch) == every for epoch in epochs)
  assert len({tuple(epoch) for epoch in epochs}) == 4   # each in another order


def test_rows_left_over_at_the_end(files):
  n = len(files)
  dropped, padded = take(files, None, epochs=1), take(files, None, epochs=1, remainder='pad')
  assert len(dropped) == n // 4 and len(padded) == n // 4 + 1
  assert_same(padded[:-1], dropped)
  real = padded[-1]['layout'].doc.any(axis=1)
  assert real.tolist() == [i < n % 4 for i in range(4)]
  assert not padded[-1]['loss'][~real].any() and not padded[-1]['tokens'][~real].any()
  assert len(set(row_ids(padded)) - {bytes(4 * LENGTH)}) == n
  shards = [take(files, None, epochs=1, remainder='pad', rows=[i]) for i in range(4)]
  assert {len(shard) for shard in shards} == {len(padded)}   # no process stops before another
  assert len(take(files, None, epochs=3)) == 3 * n // 4


def test_a_mixture_keeps_its_weights(mixture):
  large, small = ([source[i]['tokens'].tobytes() for i in range(len(source))] for source in mixture.sources)
  assert not set(large) & set(small)
  from_small = [row for row in row_ids(take(mixture, 10)) if row in small]
  assert len(from_small) == 10
  assert sorted(from_small[:len(small)]) == sorted(small)   # its first epoch


def test_equal_sources_of_a_mixture_are_not_read_in_step(files):
  ids = row_ids(take(pipeline.Mixture((files, files), (1.0, 1.0)), 4))
  assert ids[::2] != ids[1::2]


def test_weights_are_shares_of_rows(files):
  class Constant:
    length = 4

    def __init__(self, token):
      self.token = token

    def __len__(self):
      return 5

    def __getitem__(self, i):
      return {'tokens': np.full(4, self.token, np.int32)}

  mixed = pipeline.Mixture((Constant(0), Constant(1), Constant(2)), (0.5, 0.3, 0.2))
  tokens = np.concatenate([batch['tokens'][:, 0] for batch in take(mixed, 25)])
  assert np.bincount(tokens).tolist() == [50, 30, 20]
  assert abs(np.bincount(tokens[:20]) - [10, 6, 4]).max() <= 1   # not only in the end


def test_what_does_not_go_together(files, mixture):
  cases = [
      ('some of its rows, each once, ascending', files, {'rows': [1, 0]}),
      ('some of its rows', files, {'rows': [1, 1]}),
      ('some of its rows', files, {'rows': [3, 4]}),
      ('some of its rows', files, {'rows': []}),
      ('a batch of 0', files, {'batch': 0}),
      ("remainder='keep'; choose one of drop, pad", files, {'remainder': 'keep'}),
      ('rows are less than one batch of 1000', files, {'batch': 1000, 'epochs': 1}),
      ('a mixture has no epochs', mixture, {'epochs': 1}),
      ('step 99 is behind the last batch', files, {'epochs': 1, 'start_step': 99}),
      ("next_step': an integer from 0.*not.*-1", files, {'start_step': -1}),
  ]
  for match, source, kwargs in cases:
    with pytest.raises(ValueError, match=match):
      take(source, 1, **kwargs)
  it = pipeline.batches(files, batch=4, seed=0, prefetch=0)
  it.set_state({'next_step': 1})   # as it was saved before there were fingerprints
  for state in (5, None, {}, {'next_step': 1.0}, {'next_step': True}, {'next_index': 1}, {'next_step': 1, 'more': 2}):
    with pytest.raises(ValueError, match='the state of the data is'):
      it.set_state(state)
  for weights in ((1.0,), (1.0, 0.0), (1.0, -1.0)):
    with pytest.raises(ValueError, match='positive weight'):
      pipeline.Mixture((files, files), weights)


# Sources


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
  examples = list(text_lib.read_examples(folder))
  assert len(examples) == 40
  for i, example in enumerate(examples):
    doc = files.doc(i)
    assert tokenizer.decode(doc.tokens) == ''.join(example.blocks) + example.prompt + example.response + '<|im_end|>'
    assert len(doc.lengths) == len(example.blocks) + 1


def test_statistics(files, pages, mixture):
  facts = pipeline.describe(files)
  assert (facts['docs'], facts['rows'], facts['lines'], facts['bad']) == (40, len(files), 43,
                                                                          {'bad JSON': 2, 'not an object': 1})
  used = np.array([files[i]['layout'].doc > 0 for i in range(len(files))])
  assert facts['tokens'] == used.sum() and facts['padding'] == pytest.approx(1 - used.mean())
  assert facts['block_tokens']['min'] <= facts['block_tokens']['p50'] <= facts['block_tokens']['max'] < LENGTH
  few = pipeline.describe(pages, rows=4)
  assert few['rows'] == 4 and few['docs'] == sum(len(pages.docs(i)) for i in range(4)) and few['padding'] < 0.6
  assert [part['docs'] for part in pipeline.describe(mixture)['sources']] == [40, 10]


def test_pages_are_a_function_of_their_number(pages, containers, tokenizer):
  again = pipeline.PageRows(containers, STYLE, tokenizer, length=900, max_blocks=20, rows=50)
  assert_same([again[i] for i in (9, 2)], [pages[i] for i in (9, 2)])
  k = pages.pages_per_row
  shifted = pipeline.PageRows(containers, STYLE, tokenizer, length=900, max_blocks=20, first_page=2 * k,
                              pages_per_row=k)
  assert_same([shifted[0]], [pages[2]])
  assert len({pages[i]['tokens'].tobytes() for i in range(20)}) == 20
  row = pages[5]
  own = row['layout'].doc == 1
  example = pages.example(5 * k)
  assert tokenizer.decode(row['tokens'][own]) == (''.join(example.blocks) + example.prompt + example.response
                                                  + '<|im_end|>')
  assert tokenizer.decode(row['targets'][own & row['loss']]) == example.response + '<|im_end|>'


def test_pages_that_cannot_fit(containers, tokenizer):
  for bounds in ({'length': 50}, {'length': 900, 'max_blocks': 2}):
    with pytest.raises(ValueError, match='no page fits into a row of .* make rows longer, or pages shorter'):
      pipeline.PageRows(containers, STYLE, tokenizer, **bounds)


def test_no_document_left(tmp_path, tokenizer):
  path = data_cases.write_lines(tmp_path / 'a.jsonl', [b'{', data_cases.passages_line(0, words=200)])
  with pytest.raises(ValueError, match=r'a.jsonl: no document to train on\n2 lines.*1 bad JSON, 1 too long'):
    pipeline.FileRows(path, tokenizer, OPTIONS, tmp_path / 'cache')


def test_strict_reading_stops(folder, tokenizer, tmp_path):
  for _ in range(2):   # nothing is left behind that could hide the error the second time
    with pytest.raises(text_lib.BadLineError, match='a.jsonl:16: bad JSON'):
      pipeline.FileRows(str(folder), tokenizer, OPTIONS, tmp_path, strict=True)
    assert all(name.endswith('.lock') for name in os.listdir(tmp_path))
  pipeline.FileRows(str(folder), tokenizer, OPTIONS, tmp_path)
  with pytest.raises(text_lib.BadLineError, match='a.jsonl:16: bad JSON'):   # from the cache, too
    pipeline.FileRows(str(folder), tokenizer, OPTIONS, tmp_path, strict=True)


# The cache


@pytest.fixture
def cached(tmp_path, tokenizer, monkeypatch):
  """A file in a filled cache, and a function that opens it: (whether the file was encoded again, all its tokens)."""
  path = data_cases.write_lines(tmp_path / 'a.jsonl', [*map(data_cases.passages_line, range(5)), b'{'])
  calls, real = [], encode.encode_examples
  monkeypatch.setattr(encode, 'encode_examples', lambda *args, **kwargs: calls.append(1) or real(*args, **kwargs))

  def use(path=path, options=OPTIONS, tokenizer=tokenizer):
    before = len(calls)
    source = pipeline.FileRows(path, tokenizer, options, tmp_path / 'cache')
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
    {'template': text_lib.QuestionTemplate(response='{answer}')}])
def test_options_that_decide_the_tokens_are_part_of_the_key(cached, change):
  values = {field: getattr(OPTIONS, field) for field in OPTIONS.__dataclass_fields__}
  assert cached(options=pipeline.FileOptions(**values | change))[0]
  assert not cached(options=pipeline.FileOptions(**values | {'window': 3, 'shared_first': True}))[0]


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
    pipeline.FileRows(str(tmp_path / 'a.jsonl'), data_cases.tiny_tokenizer(), OPTIONS, tmp_path / 'cache')
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
    sources = list(pool.map(lambda _: pipeline.FileRows(path, tokenizer, OPTIONS, tmp_path / 'cache'), range(3)))
  assert len(calls) == 1 and sorted(source.stores[0].built for source in sources) == [False, False, True]
  assert_same([sources[0][0]], [sources[1][0]])
  assert len(stored(tmp_path)) == 1


# Data that changes, and data that cannot be read


def reopen(path, tokenizer, tmp_path, **kwargs):
  source = pipeline.FileRows(path, tokenizer, OPTIONS, tmp_path / 'cache')
  return pipeline.batches(source, batch=2, seed=0, prefetch=0, **kwargs)


def test_other_data_is_refused_and_named(tokenizer, tmp_path):
  paths = [data_cases.write_lines(tmp_path / name, map(data_cases.passages_line, range(5)))
           for name in ('a.jsonl', 'b.jsonl')]
  state = reopen(paths, tokenizer, tmp_path, start_step=3).get_state()
  state = json.loads(json.dumps(state))
  os.utime(paths[0])   # touched, not changed
  again = reopen(paths, tokenizer, tmp_path)
  again.set_state(state)
  assert again.get_state() == state
  lines = [*map(data_cases.passages_line, range(4)), data_cases.passages_line(7)]
  size = os.path.getsize(paths[1])
  data_cases.write_lines(tmp_path / 'b.jsonl', lines)
  assert os.path.getsize(paths[1]) == size   # only its content tells
  with pytest.raises(pipeline.DataChanged, match=f'{paths[1]} has changed.* Put the data back as it was') as refused:
    reopen(paths, tokenizer, tmp_path).set_state(state)
  assert 'a.jsonl' not in str(refused.value) and 'another --workdir' in str(refused.value)
  with pytest.raises(pipeline.DataChanged, match=f'{paths[1]} is gone'):
    reopen(paths[:1], tokenizer, tmp_path).set_state(state)
  with pytest.raises(pipeline.DataChanged, match='a.jsonl has changed, or what reads it'):
    reopen(paths, data_cases.tiny_tokenizer(data_cases.TRIMMING), tmp_path).set_state(state)


def test_what_pages_and_mixtures_are_made_of(pages, containers, mixture, tokenizer):
  same = pipeline.PageRows(containers, STYLE, tokenizer, length=900, max_blocks=20, rows=99)
  assert same.fingerprint() == pages.fingerprint()
  fewer = pipeline.PageRows(containers[:3], STYLE, tokenizer, length=900, max_blocks=20)
  assert fewer.fingerprint().keys() == pages.fingerprint().keys() and fewer.fingerprint() != pages.fingerprint()
  names = list(mixture.fingerprint())
  assert [name.split(':')[0] for name in names] == ['source 0', 'source 0', 'source 1'] and names[2].endswith('c.jsonl')


@pytest.mark.parametrize('prefetch', [0, 2])
def test_a_row_that_cannot_be_read_is_named(folder, tokenizer, tmp_path, prefetch, monkeypatch):
  """Also out of the thread that reads ahead, and only once the batch is asked for."""
  source = pipeline.FileRows(str(folder), tokenizer, OPTIONS, tmp_path)
  bad = int(source.plan[2][0])
  file = source.files[0] if bad < len(source.stores[0]) else source.files[1]
  doc = pipeline.FileRows.doc
  monkeypatch.setattr(pipeline.FileRows, 'doc', lambda self, i: doc(self, i) if i != bad else {}['lost'])
  it = pipeline.batches(source, batch=1, seed=0, shuffle=False, prefetch=prefetch)
  next(it), next(it)
  with pytest.raises(pipeline.UnreadableRow, match=rf'row 2 of the data, .*{file} \(document \d+\).*, cannot be read: Key'):
    next(it)


# The tool


@pytest.fixture(scope='module')
def arguments(tmp_path_factory, tokenizer):
  folder = tmp_path_factory.mktemp('tokenizer')
  tokenizer.save_pretrained(folder)
  return ['--tokenizer', str(folder), '--length', str(LENGTH)]


def test_prepare_prints_a_table(folder, arguments, tmp_path, capsys):
  assert prepare.main([str(folder), *arguments, '--cache', str(tmp_path)]) == 0
  table, problems = capsys.readouterr().out.split('malformed lines: ')
  cells = {line.split('│')[1].strip(): [c.strip() for c in line.split('│')[2:-1]] for line in table.split('\n')
           if line.startswith('│')}
  assert cells['a.jsonl'][:6] == ['17', '15', '2', '0', '0', '15'] and cells['b.jsonl.gz'][:3] == ['26', '25', '1']
  assert cells['all'][:6] == ['43', '40', '3', '0', '0', '40'] and cells['all'][7] != 'cached'
  assert problems.startswith('2 bad JSON, 1 not an object\n') and f'{folder}/b.jsonl.gz:2: bad JSON' in problems
  assert prepare.main([str(folder), *arguments, '--cache', str(tmp_path)]) == 0
  assert 'cached' in capsys.readouterr().out


def test_prepare_without_a_cache_leaves_nothing(folder, arguments, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr('tempfile.tempdir', str(tmp_path))
  assert prepare.main([str(folder / 'a.jsonl'), *arguments, '--chat', '--too-long', 'cut']) == 0
  assert not os.listdir(tmp_path) and 'a.jsonl' in capsys.readouterr().out


def test_prepare_reads_what_the_training_will(folder, arguments, tmp_path, capsys):
  (tmp_path / 'own.py').write_text(f'''
from configs import common

def get_config(arg=''):
  config = common.base('finetune')
  config.data.tokenizer = {arguments[1]!r}
  config.data.length, config.data.max_blocks, config.data.cache = {LENGTH}, 9, {str(tmp_path / 'cache')!r}
  return config
''')
  files = [str(folder / 'a.jsonl')]
  assert prepare.main([*files, f'--config={tmp_path}/own.py', '--config.data.too_long=cut']) == 0
  config = sweep.parse([f'--config={tmp_path}/own.py', '--config.data.too_long=cut'])
  config.data.files = tuple(files)
  data = finetune.read(config).data
  source = sources.load_rows(data, sources.load_tokenizer(data, ''))
  assert not source.stores[0].built and source.options.chat   # the tokenizer has a template
  assert prepare.main([*files, '--length', '9']) == 2 and prepare.main(['--tokenizer', arguments[1]]) == 2
  err = capsys.readouterr().err
  assert 'give --tokenizer, or a --config' in err and 'give files, --length, or a --config' in err


def test_prepare_fails_as_it_says(folder, arguments, tmp_path, capsys):
  cache = ['--cache', str(tmp_path / 'cache')]
  assert prepare.main([str(folder), *arguments, *cache, '--strict']) == 1
  assert 'a.jsonl:16: bad JSON' in capsys.readouterr().err
  assert prepare.main([str(folder / 'missing.jsonl'), *arguments, *cache]) == 2
  assert 'missing.jsonl: no .jsonl' in capsys.readouterr().err
  assert prepare.main([str(folder), '--tokenizer', str(tmp_path), '--length', '9']) == 2
  assert 'no tokenizer.json' in capsys.readouterr().err
  (tmp_path / 'empty.jsonl').touch()
  assert prepare.main([str(tmp_path / 'empty.jsonl'), *arguments]) == 2
  assert 'not one document' in capsys.readouterr().err
  for option, value in (('--length', '0'), ('--length', '-5'), ('--max-blocks', '0'), ('--max-blocks', '-1')):
    with pytest.raises(SystemExit) as end:
      prepare.main([str(folder), *arguments, option, value])
    assert end.value.code == 2 and f"{option}: '{value}' is not a number from 1 on" in capsys.readouterr().err


def test_prepare_with_nothing_but_malformed_lines(arguments, tmp_path, capsys):
  path = data_cases.write_lines(tmp_path / 'a.jsonl', [b'[bold]', b'x' * 10] + [b'{'] * 150)
  assert prepare.main([path, *arguments]) == 2
  out, err = capsys.readouterr()
  assert f'not one document to train on in 152 lines of {path}' in err
  assert '152 bad JSON' in out and '... and 52 more' in out and f'{path}:1: bad JSON' in out
