"""SemanticSeg: reading documents, building the dataset, reading it back, its statistics."""

import collections
import gzip
import itertools
import json
import os
import pathlib
import pickle
import re
import signal
import subprocess
import sys
import types

import data_cases
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from blockattn.data import encode, json_lines
from blockattn.segmentation.semanticseg import schema, statistics

ROOT = pathlib.Path(__file__).resolve().parents[2]
GOOD = {'id': 'a', 'category': 'wiki', 'source': 'here', 'license': 'CC0', 'blocks': ['One.\n\n', 'Two.']}
BLOCKS = st.lists(st.text(st.characters(exclude_categories=('Cs',), exclude_characters='\0'), min_size=1, max_size=9)
                  .filter(str.strip), min_size=1, max_size=5)
few = settings(max_examples=40, deadline=None, derandomize=True, database=None)


def row(i, category='wiki', **values):
  return GOOD | {'id': f'{category}/{i}', 'category': category, 'license': ('CC0', 'MIT')[i % 2],
                 'blocks': [f'Title {i}\n\n', *(f'Paragraph {j} of {i}.\n' for j in range(i % 3 + 1))]} | values


def write_corpus(folder, rows=6):
  """Three files of two categories; two bad lines."""
  folder.mkdir(parents=True, exist_ok=True)
  data_cases.write_lines(folder / 'train_wiki.jsonl.gz', [row(i) for i in range(rows)])
  data_cases.write_lines(folder / 'test_wiki.jsonl', [row(10), b'{"id": ', row(11), row(10)])
  data_cases.write_lines(folder / 'train_chat.jsonl', [row(i, 'chat') for i in range(3)])
  return folder


def read(path, **kwargs):
  report = json_lines.Report()
  return list(schema.read(path, report, **kwargs)), report


# Reading and writing


@few
@given(BLOCKS)
def test_cuts_are_where_the_blocks_meet(blocks):
  document = schema.Document('a', 'wiki', 'here', 'CC0', tuple(blocks))
  ends = (0, *document.cuts, len(document.text))
  assert tuple(document.text[a:b] for a, b in itertools.pairwise(ends)) == document.blocks
  assert schema.parse(schema.to_line(document)) == document


@pytest.mark.parametrize('name', ['train_wiki.jsonl', 'train_wiki.jsonl.gz'])
def test_written_documents_are_read_back(name, tmp_path):
  documents = [schema.parse(json.dumps(row(i))) for i in range(3)]
  for folder in 'ab':
    assert schema.write(tmp_path / folder / name, documents) == 3
  assert (tmp_path / 'a' / name).read_bytes() == (tmp_path / 'b' / name).read_bytes()
  found, report = read(tmp_path / 'a')
  assert found == documents and (report.lines, report.examples) == (3, 3)


def test_a_failed_write_leaves_what_was_there(tmp_path):
  path = tmp_path / 'a.jsonl'
  schema.write(path, [schema.parse(json.dumps(GOOD))])

  def broken():
    yield schema.parse(json.dumps(row(1)))
    raise RuntimeError

  with pytest.raises(RuntimeError):
    schema.write(path, broken())
  assert [document.id for document in schema.read(path)] == ['a'] and os.listdir(tmp_path) == ['a.jsonl']
  with pytest.raises(ValueError, match='must end in .jsonl'):
    schema.write(tmp_path / 'a.json', [])


MALFORMED = [
    (b'{"id": "a"', 'bad JSON'), (b'{"id": "\xff"}', 'invalid UTF-8'), (GOOD | {'source': '\ud800'}, 'invalid UTF-8'),
    (b'{"id": "\0"}', 'NUL character'), (GOOD | {'blocks': ['a\0']}, 'NUL character'), ([GOOD], 'not an object'),
    *(({k: v for k, v in GOOD.items() if k != key}, 'missing key') for key in GOOD),
    *((GOOD | {key: 1}, 'wrong type') for key in GOOD), (GOOD | {'blocks': ['a', None]}, 'wrong type'),
    (GOOD | {'license': ' '}, 'empty text'), (GOOD | {'id': ''}, 'empty text'), (GOOD | {'blocks': []}, 'empty blocks'),
    (GOOD | {'blocks': ['a', '']}, 'empty block'), (GOOD | {'blocks': ['\n\n', 'a']}, 'empty block'),
    (row(0), 'duplicate id'), (row(2, 'chat'), 'other category'),
]


@pytest.mark.parametrize('line, reason', MALFORMED, ids=[f'{i} {reason}' for i, (_, reason) in enumerate(MALFORMED)])
def test_a_bad_line_is_named_and_survived(line, reason, tmp_path):
  path = data_cases.write_lines(tmp_path / 'train_wiki.jsonl', [row(0), line, row(1)])
  documents, report = read(path)
  assert [document.id for document in documents] == ['wiki/0', 'wiki/1']
  [bad] = report.listed
  assert (bad.file, bad.line, bad.reason) == (path, 2, reason)
  assert report.bad == {reason: 1} and (report.lines, report.examples) == (3, 2)
  str(bad).encode()
  with pytest.raises(json_lines.BadLineError, match=re.escape(f'{path}:2: {reason}')):
    read(path, strict=True)


def test_an_id_may_come_again_in_another_split_only(tmp_path):
  for name in ('train_wiki-00000-of-00002', 'train_wiki-00001-of-00002', 'test_wiki'):
    data_cases.write_lines(tmp_path / f'{name}.jsonl', [GOOD])
  documents, report = read(tmp_path)
  assert len(documents) == 2
  assert str(report.listed[0]) == (f"{tmp_path}/train_wiki-00001-of-00002.jsonl:1: duplicate id: 'a' is also at "
                                   f'{tmp_path}/train_wiki-00000-of-00002.jsonl:1')


def test_files_are_found_by_their_names(tmp_path):
  for name in ('test_wiki.jsonl', 'train_wiki.jsonl.gz', 'validation_wiki-00001-of-00002.jsonl.gz', 'train_a_b.jsonl'):
    (tmp_path / name).touch()
  found = [(file.category, file.split) for file in schema.find(tmp_path)]
  assert found == [('a_b', 'train'), ('wiki', 'train'), ('wiki', 'validation'), ('wiki', 'test')]
  assert [file.category for file in schema.find(tmp_path, ['a_b'])] == ['a_b']
  with pytest.raises(ValueError, match='no files of wikki here; there are a_b, wiki'):
    schema.find(tmp_path, ['wikki'])
  with pytest.raises(ValueError, match=r'dev_wiki.jsonl: the name must be \{split\}_\{category\}'):
    schema.find(str((tmp_path / 'test_wiki.jsonl').rename(tmp_path / 'dev_wiki.jsonl')))
  with pytest.raises(FileNotFoundError, match='nowhere'):
    schema.find(tmp_path / 'nowhere')


# Statistics


def test_statistics_by_hand():
  documents = [schema.Document(str(i), 'wiki', 's', 'MIT|x' if i else 'CC0', ('ab', 'cdef')) for i in range(3)]
  measured = {('wiki', 'train'): statistics.measure(documents), ('chat', 'test'): statistics.measure(documents[:1])}
  values = statistics.to_json(measured)
  assert [(category, list(splits)) for category, splits in values.items()] == [
      ('chat', ['test', 'all']), ('wiki', ['train', 'all']), ('all', ['train', 'test', 'all'])]
  assert values['all']['all'] == {
      'documents': 4, 'characters': 24, 'tokens': None, 'blocks': 8, 'block_characters':
      {'5': 2, '25': 2, '50': 2, '75': 4, '95': 4}, 'block_tokens': None, 'documents_of_2k_to_32k_tokens': None,
      'licenses': {'CC0': 2, 'MIT|x': 2}}
  lines = statistics.to_markdown(values).splitlines()
  assert '| wiki | train | 3 | 18 | - | 6 | 2.0 | 2 | 2 | 2 | 4 | 4 | - |' in lines
  assert '| wiki | MIT\\|x | 2 |' in lines
  assert len({line.count(' | ') for line in lines[:9]}) == 1


def test_tokens_are_those_of_the_blocks_apart(monkeypatch):
  encoder = encode.Encoder(data_cases.tiny_tokenizer(), bos='never')
  documents = [schema.Document(str(i), 'wiki', 's', 'CC0', ('the question ', 'of the answer') * i) for i in (1, 2, 3)]
  monkeypatch.setattr(statistics, '_BATCH', 2)
  measured = statistics.measure(documents, encoder)
  a, b = (len(ids) for ids in encoder.texts(documents[0].blocks))
  assert measured.block_tokens.tolist() == [a, b] * 6
  assert measured.document_tokens.tolist() == [a + b, 2 * (a + b), 3 * (a + b)]
  monkeypatch.setattr(statistics, 'WANTED', (a + b, 2 * (a + b)))
  assert measured.to_json()['documents_of_2k_to_32k_tokens'] == 2
  assert statistics.quantiles(np.zeros(0, np.int64)) is None


# The dataset


@pytest.fixture(scope='module')
def builder():
  pytest.importorskip('tensorflow_datasets')
  pytest.importorskip('importlib_resources')
  from blockattn.segmentation.semanticseg import builder
  builder.tfds.disable_progress_bar()
  return builder


@pytest.fixture(scope='module')
def built(builder, tmp_path_factory):
  """(files, folder) of a dataset; not to be changed."""
  folder = tmp_path_factory.mktemp('built')
  files = schema.find(write_corpus(folder / 'in'))
  assert build(builder, files, folder / 'out') == {'chat': True, 'wiki': True, 'all': True}
  return files, folder / 'out'


def build(builder, files, out, **kwargs):
  return {config.name: builder.build(config, out) for config in builder.configs(files, **kwargs)}


def contents(folder):
  """{name below the folder: bytes} of every file."""
  return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob('*')) if path.is_file()}


def test_documents_come_back_as_they_were(builder, built):
  files, out = built
  for name in ('chat', 'wiki', 'all'):
    for split in builder.splits_of(out, name):
      paths = [file.path for file in files if file.split == split and name in (file.category, 'all')]
      found = list(builder.open_split(out, name, split))
      assert sorted(found, key=lambda d: d.id) == sorted(schema.read(paths), key=lambda d: d.id)
  assert builder.splits_of(out, 'chat') == ['train']
  assert len(builder.open_split(out, 'all', 'train[:5]')) == 5


def test_licences_and_bad_lines_stand_beside_the_records(builder, built):
  files, out = built
  metadata = builder.metadata_of(builder.folder_of(out, 'all'))
  assert metadata['licenses'] == {'CC0': 6, 'MIT': 5}
  report = builder.summary_of(builder.folder_of(out, 'wiki')).report
  path = next(file.path for file in files if file.split == 'test')
  assert [(bad.file, bad.line, bad.reason) for bad in report.listed] == [(path, 2, 'bad JSON'), (path, 4, 'duplicate id')]
  assert (report.lines, report.examples, report.docs) == (10, 8, 8)


def test_read_by_tfds_alone_and_without_tensorflow(built):
  code = ('import sys, tensorflow_datasets as tfds\n'
          'source = tfds.builder_from_directory(sys.argv[1]).as_data_source("test")\n'
          'print(sorted(r["id"].decode() for r in source), source[0]["blocks"][0].decode().strip(),\n'
          '      [m for m in sys.modules if m.split(".")[0] in ("tensorflow", "blockattn")])')
  output = subprocess.run([sys.executable, '-c', code, built[1] / 'semantic_seg/wiki/1.0.0'], check=True, text=True,
                          capture_output=True).stdout
  assert re.fullmatch(r"\['wiki/10', 'wiki/11'\] Title 1[01] \[\]\n", output)


def test_a_source_for_grain(builder, built):
  grain = pytest.importorskip('grain')
  source = pickle.loads(pickle.dumps(builder.open_split(built[1], 'wiki', 'train')))
  dataset = grain.MapDataset.source(source).shuffle(seed=1).map(lambda document: (document.id, document.cuts))
  assert sorted(dataset) == sorted((document.id, document.cuts) for document in source)
  assert dataset[0] != dataset.repeat(2)[len(source)]   # another order in every epoch


def test_the_same_input_gives_the_same_bytes(builder, built, tmp_path):
  # In another process and from another folder. Protobuf's own order of keys differs between any two records.
  code = ('import sys\nfrom blockattn.segmentation.semanticseg import builder, schema\n'
          'for config in builder.configs(schema.find(sys.argv[1])):\n  builder.build(config, sys.argv[2])')
  write_corpus(tmp_path / 'in')
  subprocess.run([sys.executable, '-c', code, tmp_path / 'in', tmp_path / 'out'], check=True, capture_output=True,
                 cwd=ROOT)
  expected, found = contents(built[1]), contents(tmp_path / 'out')
  assert list(found) == list(expected)
  differ = [name for name in expected if found[name] != expected[name]]
  assert not [name for name in differ if not name.endswith('metadata.json')]   # it names the files of bad lines
  assert found['semantic_seg/chat/1.0.0/metadata.json'] == expected['semantic_seg/chat/1.0.0/metadata.json']


def test_what_is_there_is_kept_and_what_changed_is_made_again(builder, tmp_path):
  files = schema.find(write_corpus(tmp_path / 'in'))
  build(builder, files, tmp_path / 'out')
  first = contents(tmp_path / 'out')
  assert build(builder, files, tmp_path / 'out') == {'chat': False, 'wiki': False, 'all': False}
  assert contents(tmp_path / 'out') == first

  data_cases.write_lines(tmp_path / 'in' / 'train_chat.jsonl', [row(7, 'chat')])
  assert build(builder, files, tmp_path / 'out') == {'chat': True, 'wiki': False, 'all': True}
  assert [document.id for document in builder.open_split(tmp_path / 'out', 'chat', 'train')] == ['chat/7']

  [shard] = (tmp_path / 'out/semantic_seg/wiki').rglob('*test*')
  shard.write_bytes(shard.read_bytes()[:-1])
  with pytest.raises(FileNotFoundError, match='no whole SemanticSeg config; there are all, chat, wiki'):
    builder.open_split(tmp_path / 'out', 'wiki', 'train')
  assert build(builder, files, tmp_path / 'out') == {'chat': False, 'wiki': True, 'all': False}
  with pytest.raises(ValueError, match="no split 'dev'; there are train, test"):
    builder.open_split(tmp_path / 'out', 'wiki', 'dev')


KILLED = """
import os, signal, sys
from blockattn.segmentation.semanticseg import builder, schema
write = builder._StableWriter.write

def killed(self, path, examples):
  examples = iter(examples)
  write(self, path, [next(examples)])
  if '/wiki/' in str(path):
    os.kill(os.getpid(), signal.SIGKILL)
  write(self, path, examples)

for config in builder.configs(schema.find(sys.argv[1])):
  if config.name == 'wiki':
    builder._StableWriter.write = killed
  builder.build(config, sys.argv[2])
"""


def test_a_killed_build_goes_on_where_it_was(builder, built, tmp_path):
  process = subprocess.run([sys.executable, '-c', KILLED, os.path.dirname(built[0][0].path), tmp_path], cwd=ROOT,
                           capture_output=True)
  assert process.returncode == -signal.SIGKILL, process.stderr.decode()
  left = list((tmp_path / 'semantic_seg/wiki').iterdir())
  assert left and all(path.name.startswith('incomplete.') for path in left)
  with pytest.raises(FileNotFoundError, match='there are chat'):
    builder.open_split(tmp_path, 'wiki', 'train')
  assert build(builder, built[0], tmp_path) == {'chat': False, 'wiki': True, 'all': True}
  assert contents(tmp_path) == contents(built[1])


def test_documents_to_drop_and_splits_without_a_good_line(builder, tmp_path):
  folder = write_corpus(tmp_path / 'in')
  data_cases.write_lines(folder / 'validation_wiki.jsonl', [b'nonsense'])
  files = schema.find(folder)
  dropped = {('wiki', 'wiki/0'), ('wiki', 'wiki/10'), ('chat', 'chat/1')}   # wiki/10 is in test, where it stays
  build(builder, files, tmp_path / 'out', dropped=dropped)
  assert builder.splits_of(tmp_path / 'out', 'wiki') == ['train', 'test']
  ids = {document.id for split in ('train', 'test') for document in builder.open_split(tmp_path / 'out', 'all', split)}
  assert len(ids) == 9 and not ids & {'wiki/0', 'chat/1'}
  report = builder.summary_of(builder.folder_of(tmp_path / 'out', 'all')).report
  assert report.dropped == {builder.DUPLICATE: 2} and report.bad == {'bad JSON': 2, 'duplicate id': 1}
  with pytest.raises(ValueError, match='broken: not one good document in .*train_broken'):
    build(builder, schema.find(data_cases.write_lines(tmp_path / 'train_broken.jsonl', [b'1'])), tmp_path / 'out')
  with pytest.raises(ValueError, match="category 'all': rename"):
    builder.configs(schema.find(data_cases.write_lines(tmp_path / 'train_all.jsonl', [GOOD])))


def test_through_beam_the_dataset_is_the_same(builder, built, tmp_path):
  pytest.importorskip('apache_beam')
  out = tmp_path / 'out'
  [config] = [config for config in builder.configs(built[0], beam=builder.Beam()) if config.name == 'all']
  assert builder.build(config, out)
  expected = {name: data for name, data in contents(built[1]).items() if name.startswith('semantic_seg/all/')}
  assert contents(out) == expected
  assert not builder.build(config, out)


def test_summaries_add_up_in_any_order(builder):
  summaries = [builder.Summary(json_lines.Report(lines=60, bad=collections.Counter(x=60), listed=[
      json_lines.BadLine(file, line, 'x') for line in range(60)]), collections.Counter(CC0=i))
      for i, file in enumerate('cab')]
  expected = sum(summaries, builder.Summary())
  assert expected == sum(summaries[::-1], builder.Summary())
  assert [bad.file for bad in expected.report.listed] == ['a'] * 60 + ['b'] * 40
  assert builder.Summary.from_json(json.loads(json.dumps(expected.to_json()))) == expected


# The command


@pytest.fixture
def command(builder):
  pytest.importorskip('datasketch')
  from tools import build_semanticseg
  return build_semanticseg


def test_the_command_builds_measures_and_reports(command, builder, tmp_path, capsys):
  folder, out = write_corpus(tmp_path / 'in'), tmp_path / 'out'
  data_cases.write_lines(folder / 'validation_wiki.jsonl', [row(4, id='again')])
  arguments = [str(folder), '--out', str(out), '--drop-duplicates']
  assert command.main(arguments) == 0
  printed = capsys.readouterr().out
  assert re.search(r'wiki: 8 documents, 2 bad lines; built in', printed) and 'chat: 3 documents' in printed
  assert '1.00 validation wiki again = train wiki wiki/4' in printed and '1 training documents left out' in printed
  assert f'{folder}/test_wiki.jsonl:2: bad JSON' in printed
  assert {document.id for document in builder.open_split(out, 'wiki', 'train')} == {f'wiki/{i}' for i in (0, 1, 2, 3, 5)}
  report = json.loads((out / 'report.json').read_text())
  assert report['dropped'] == ['wiki/4'] and report['lines']['wiki']['bad'] == {'bad JSON': 1, 'duplicate id': 1}
  assert json.loads((out / 'statistics.json').read_text())['values']['all']['all']['documents'] == 11
  assert (out / 'statistics.md').read_text().startswith('| category | split | documents |')

  before = contents(out)
  assert command.main(arguments) == 0
  assert capsys.readouterr().out.count('was there') == 3 and contents(out) == before
  assert command.main([*arguments, '--categories', 'chat']) == 0
  assert 'wiki:' not in capsys.readouterr().out


def test_the_command_says_what_is_wrong(command, tmp_path, capsys):
  folder = str(write_corpus(tmp_path / 'in'))
  for arguments, message in [([folder, '--categories', 'wikki'], 'no files of wikki here'),
                             ([folder + '/nothing'], 'no .jsonl or .jsonl.gz file here'),
                             ([folder, '--similarity', '0.2'], 'similarity above 0.5'),
                             ([folder, '--tokenizer', './nowhere'], 'no such folder')]:
    assert command.main([*arguments, '--out', str(tmp_path / 'out')]) == 2
    assert message in capsys.readouterr().err
  for arguments in (['--beam-options', '--x'], ['--shards', '0']):
    with pytest.raises(SystemExit):
      command.main([folder, '--out', 'x', *arguments])


@pytest.mark.parametrize('name', ['structure', 'annotate'])
def test_other_commands_are_called(name, command, monkeypatch):
  monkeypatch.setitem(sys.modules, f'tools.{name}', types.SimpleNamespace(main=lambda argv: (name, argv)))
  assert command.main([name, 'x', '--y']) == (name, ['x', '--y'])


# Real documents


@pytest.mark.data
def test_real_documents(data_dir, builder, tmp_path):
  files = schema.find(data_dir / 'seg', ['conversations'])
  build(builder, files, tmp_path)
  documents = list(builder.open_split(tmp_path, 'conversations', 'test'))
  [path] = [file.path for file in files if file.split == 'test']
  with gzip.open(path) as stream:
    rows = {row['id']: row for row in map(json.loads, stream)}
  assert len(documents) == len(rows)
  assert all(document.text == ''.join(rows[document.id]['blocks']) for document in documents)
