"""SemanticSeg: documents cut into blocks, as a TFDS dataset of ArrayRecord files, read without TensorFlow.

  for config in builder.configs(schema.find('seg/')):
    builder.build(config, 'out/')
  source = builder.open_split('out/', 'books', 'train')   # source[0] is a schema.Document
  dataset = grain.MapDataset.source(source).shuffle(seed=0)

  out/semantic_seg/{category}/1.0.0/semantic_seg-{split}.array_record-00000-of-00001
  out/semantic_seg/all/1.0.0/...

There is a config for each category that the files have, and `all`. A record is a tf.Example with `id`, `category`,
`source`, `license` and `blocks`. metadata.json beside the records lists licences with counts, what became of the lines
(bad ones by reason, with file and line) and the size of every file.

A config appears under its name when it is whole (TFDS writes into a folder incomplete.* and renames it). A finished
one is recognised by a fingerprint of the input's bytes and the version, and by its files' sizes, so a build that was
killed and started again makes only what is missing. The same input gives the same bytes, wherever it is built. One
build at a time in a folder: what an earlier one left incomplete is removed.

With `Beam` the lines go through an Apache Beam pipeline, a file a work item, on any runner. The records, their order and
metadata.json's report are the same; only where a split has several shards they end at other records.
"""

import collections
import dataclasses
import hashlib
import json
import os
import shlex
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from blockattn import errors
from blockattn.data import json_lines
from blockattn.errors import UserError
from blockattn.segmentation.semanticseg import schema

try:
  import tensorflow_datasets as tfds
  from etils import epath
  from tensorflow_datasets.proto import tf_example_pb2
except ImportError as error:
  raise ImportError("the SemanticSeg dataset needs tensorflow-datasets (without TensorFlow): "
                    "pip install 'blockattn[semanticseg]'") from error

ALL = 'all'
NAME = 'semantic_seg'
DUPLICATE = 'duplicate of another split'


@dataclasses.dataclass(frozen=True)
class Beam:
  """Reads through Apache Beam, on one of its runners, such as FlinkRunner or DataflowRunner. For one on other machines all
  files and the output have to be on storage that they see, and `blockattn` has to be installed there."""
  runner: str = 'FnApiRunner'   # the direct one for batches; DirectRunner would first try to download another, Prism
  options: str = ''   # as on a command line: '--direct_num_workers=8 --direct_running_mode=multi_processing'

  def pipeline_options(self) -> Any:
    options = [f'--runner={self.runner}', *shlex.split(self.options)]
    return _beam().options.pipeline_options.PipelineOptions(options)


@dataclasses.dataclass(eq=False)
class SemanticSegConfig(tfds.core.BuilderConfig):
  """A part of the dataset."""
  files: tuple[schema.File, ...] = dataclasses.field(default=(), repr=False)   # its files
  dropped: frozenset[str] = dataclasses.field(default=frozenset(), repr=False)   # ids of training documents to leave out
  fingerprint: str = ''   # of all that decides the records
  beam: Beam | None = None   # None reads in this process


@dataclasses.dataclass
class Summary:
  """What became of a split's lines; `licenses` counts the documents that were kept."""
  report: json_lines.Report = dataclasses.field(default_factory=json_lines.Report)
  licenses: collections.Counter = dataclasses.field(default_factory=collections.Counter)

  def __add__(self, other: 'Summary') -> 'Summary':
    """Both together, in any order the same."""
    listed = sorted(self.report.listed + other.report.listed, key=lambda bad: (bad.file, bad.line))
    report = dataclasses.replace(self.report + other.report, listed=listed[:json_lines.LISTED])
    return Summary(report, self.licenses + other.licenses)

  def to_json(self) -> dict:
    ordered = lambda counter: dict(sorted(counter.items()))
    report = self.report.to_json() | {'bad': ordered(self.report.bad), 'dropped': ordered(self.report.dropped)}
    return {'report': report, 'licenses': ordered(self.licenses)}

  @classmethod
  def from_json(cls, values: dict) -> 'Summary':
    return cls(json_lines.Report.from_json(values['report']), collections.Counter(values['licenses']))


class SemanticSeg(tfds.core.GeneratorBasedBuilder):
  """`build` runs it; `tfds.builder_from_directory` reads its output without this class."""
  name = NAME
  VERSION = tfds.core.Version('1.0.0')
  RELEASE_NOTES = {'1.0.0': 'First version.'}

  def _info(self) -> tfds.core.DatasetInfo:
    text = tfds.features.Text
    features = {'id': text(), 'category': text(), 'source': text(), 'license': text(),
                'blocks': tfds.features.Sequence(text())}
    return tfds.core.DatasetInfo(
        builder=self, features=tfds.features.FeaturesDict(features), metadata=tfds.core.MetadataDict(),
        description='Documents with the blocks that their authors or annotators made; the blocks joined are the text. '
                    'Every document carries its source and its licence.')

  def _split_generators(self, dl_manager):
    del dl_manager
    config = self.builder_config
    self._summaries = {split: Summary() for split in schema.SPLITS if _files_of(config, split)}
    # TFDS fails on a split without a record.
    filled = [split for split in self._summaries if next(self._read(split, Summary()), None)]
    if not filled:
      raise UserError(f'{config.name}: not one good document in ' + ', '.join(f.path for f in config.files))
    return {split: self._generate_examples(split) for split in filled}

  def _generate_examples(self, split):
    config = self.builder_config
    if config.beam is None:
      return self._read(split, self._summaries[split])
    files, dropped = _files_of(config, split), config.dropped if split == 'train' else frozenset()
    return _beam().ptransform_fn(_read_in_pipeline)(files, dropped, self._summary_path(split))

  def _read(self, split, summary):
    """(key, record) of every document to keep; the summary is complete at the end."""
    files = _files_of(self.builder_config, split)
    for document in schema.read(files, summary.report) if files else ():
      yield from _kept(document, self.builder_config.dropped if split == 'train' else (), summary)

  def _summary_path(self, split):
    return os.path.join(self.data_dir, f'{split}.summary.json')

  def _example_writer(self):
    return _StableWriter(file_format=self.info.file_format)

  def _generate_splits(self, dl_manager, download_config):
    infos = super()._generate_splits(dl_manager, download_config)
    folder = epath.Path(self.data_dir)
    for split, summary in self._summaries.items():
      path = epath.Path(self._summary_path(split))
      if path.exists():   # written by a pipeline
        self._summaries[split] = Summary.from_json(json.loads(path.read_text()))
        path.unlink()
      elif summary.report.lines == 0:   # a split without a good document: read, but not generated
        collections.deque(self._read(split, summary), maxlen=0)
    whole = sum(self._summaries.values(), Summary())
    self.info.metadata.update(
        fingerprint=self.builder_config.fingerprint, licenses=whole.to_json()['licenses'],
        splits={split: summary.to_json() for split, summary in self._summaries.items()},
        files={path.name: path.stat().length for path in sorted(folder.iterdir()) if '.array_record' in path.name})
    return infos


class _StableWriter(tfds.core.ExampleWriter):
  """Writes the same bytes for the same record: protobuf leaves the order of a map's keys to chance, here it is sorted."""

  def write(self, path, examples):
    parse = tf_example_pb2.Example.FromString
    return super().write(path, ((key, parse(data).SerializeToString(deterministic=True)) for key, data in examples))


def _kept(document, dropped, summary):
  """(key, record as TFDS takes it) of a document, unless it is to be dropped; counted."""
  if document.id in dropped:
    summary.report.dropped[DUPLICATE] += 1
  else:
    summary.report.docs += 1
    summary.licenses[document.license] += 1
    yield document.id, {**dataclasses.asdict(document), 'blocks': list(document.blocks)}


def _files_of(config, split):
  return sorted(file.path for file in config.files if file.split == split)


# The pipeline. Its functions stand in a module, so that other machines find them.

def _read_in_pipeline(pipeline, files, dropped, path):
  """(key, record) of the documents to keep; their summary is written to `path`."""
  beam = _beam()
  documents, read = (pipeline | 'Files' >> beam.Create(list(enumerate(files))) | 'Spread' >> beam.Reshuffle()
                     | 'Read' >> beam.FlatMap(_read_file).with_outputs('summary', main='document'))
  records, chosen = (documents | 'SameId' >> beam.GroupByKey()
                     | 'Choose' >> beam.FlatMap(_choose, dropped).with_outputs('summary', main='record'))
  _ = ((read, chosen) | 'Summaries' >> beam.Flatten() | 'Sum' >> beam.CombineGlobally(_sum)
       | 'Write' >> beam.Map(_write_summary, path))
  return records


def _read_file(numbered):
  """(id, (number of the file, line, file, document)) of every document of a file."""
  index, file = numbered
  report = json_lines.Report()
  for _, line, document in schema.read_numbered(file, report):
    yield document.id, (index, line, file, document)
  yield _beam().pvalue.TaggedOutput('summary', Summary(report))


def _choose(found, dropped):
  """The first document of an id, unless it is to be dropped."""
  (_, line, file, document), *others = sorted(found[1], key=lambda item: item[:2])
  summary = Summary()
  for _, other_line, other_file, other in others:
    try:
      schema.check_new(other, (file, line), (other_file, other_line))
    except json_lines.Malformed as error:
      summary.report.examples -= 1   # the reader of its file took it for a good one
      summary.report.add_bad(json_lines.BadLine(other_file, other_line, error.reason, error.detail))
  yield from _kept(document, dropped, summary)
  yield _beam().pvalue.TaggedOutput('summary', summary)


def _sum(summaries):
  return sum(summaries, Summary())


def _write_summary(summary, path):
  epath.Path(path).write_text(json.dumps(summary.to_json()))


def _beam():
  return errors.library('apache_beam', 'a build through Beam', 'semanticseg,beam')


# Building and reading.

def configs(files: Sequence[schema.File], *, dropped: Iterable[tuple[str, str]] = (),
            beam: Beam | None = None) -> list[SemanticSegConfig]:
  """A config for every category of the files, in order, and `all`; `dropped` as of `dedupe.dropped`. Raises ValueError:
  there are no files, or a category is called 'all'."""
  categories = sorted({file.category for file in files})
  if not files or ALL in categories:
    raise UserError(f'a category {ALL!r}: rename its files, the name is for the whole' if files
                    else 'no files: give some, as `schema.find` names them')
  hashes = {file: _hash_file(file.path) for file in files}
  result = []
  for name in (*categories, ALL):
    own = tuple(file for file in files if name in (file.category, ALL))
    without = frozenset(id for category, id in dropped if name in (category, ALL))
    facts = [str(SemanticSeg.VERSION), [f'{file.split} {hashes[file]}' for file in own], sorted(without)]
    fingerprint = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    result.append(SemanticSegConfig(name=name, files=own, dropped=without, fingerprint=fingerprint, beam=beam))
  return result


def _hash_file(path):
  with open(path, 'rb') as stream:
    return hashlib.file_digest(stream, 'sha256').hexdigest()


def build(config: SemanticSegConfig, out: str | os.PathLike, *, num_shards: int | None = None) -> bool:
  """Writes a config below `out`, unless it is there already; returns whether it was written.

  One that was made from other input is replaced. A build that is killed leaves nothing under the config's name.

  Args:
    out: a folder; one build at a time in it.
    num_shards: of every split; None: one, and more from 64 MiB on.

  Raises ValueError: not one good document."""
  folder = folder_of(out, config.name)
  _remove_incomplete(folder)
  if is_whole(folder, config.fingerprint):
    return False
  if folder.exists():
    # Renamed at once, then removed: half of a dataset never stands under its name.
    folder.rename(folder.parent / f'incomplete.old_{folder.name}')
    _remove_incomplete(folder)
  download_config = tfds.download.DownloadConfig(
      try_download_gcs=False, num_shards=num_shards, beam_options=config.beam and config.beam.pipeline_options())
  builder = SemanticSeg(config=config, data_dir=os.fspath(out), file_format='array_record')
  # TFDS makes folders for downloads, of which there are none; their name lets them go with the rest.
  builder.download_and_prepare(download_dir=folder.parent / 'incomplete.downloads', download_config=download_config)
  _remove_incomplete(folder)
  return True


def folder_of(out: str | os.PathLike, name: str) -> Any:
  """Where the config of that name lies below `out`, an `epath.Path`."""
  return epath.Path(out) / NAME / name / str(SemanticSeg.VERSION)


def _remove_incomplete(folder):
  """Removes what a killed build left beside a config's folder."""
  for path in folder.parent.glob('incomplete.*') if folder.parent.exists() else ():
    path.rmtree()


def is_whole(folder: Any, fingerprint: str | None = None) -> bool:
  """Whether a config is there with all its files in full length, made from the input with that fingerprint."""
  try:
    metadata = metadata_of(folder)
  except (OSError, ValueError):
    return False
  sizes = {name: path.stat().length for name in metadata['files'] if (path := folder / name).exists()}
  return sizes == metadata['files'] and fingerprint in (None, metadata['fingerprint'])


def metadata_of(folder: Any) -> dict[str, Any]:
  """What the build noted: fingerprint, licenses, splits (a summary each), files. Raises FileNotFoundError: no built config
  there."""
  return json.loads((epath.Path(folder) / 'metadata.json').read_text())


def summary_of(folder: Any) -> Summary:
  """What became of all lines of a built config."""
  splits = metadata_of(folder)['splits'].values()
  return sum((Summary.from_json(values) for values in splits), Summary())


class DocumentSource:
  """The documents of a split, by index: a source for `grain.MapDataset.source`; can be pickled."""

  def __init__(self, records: Any):
    self._records = records

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> schema.Document:
    record = self._records[index]   # text is bytes
    texts = (record[key].decode() for key in schema.KEYS[:-1])
    return schema.Document(*texts, blocks=tuple(block.decode() for block in record['blocks']))

  def __iter__(self) -> Iterator[schema.Document]:
    return (self[i] for i in range(len(self)))

  def __repr__(self) -> str:
    return f'DocumentSource({self._records!r})'   # grain compares it when it restores a checkpoint


def splits_of(out: str | os.PathLike, name: str) -> list[str]:
  """The splits that a built config has."""
  return list(_open(out, name).info.splits)


def open_split(out: str | os.PathLike, name: str, split: str) -> DocumentSource:
  """The documents of a split such as 'train' or 'train[:10%]', in the order of the records. Raises FileNotFoundError: no
  such config below `out`; ValueError: no such split."""
  builder = _open(out, name)
  if split.split('[')[0] not in builder.info.splits:
    raise UserError(f'{name}: no split {split!r}; there are {", ".join(builder.info.splits)}')
  return DocumentSource(builder.as_data_source(split=split))


def _open(out, name):
  folder = folder_of(out, name)
  if not is_whole(folder):
    known = sorted(path.parent.name for path in (epath.Path(out) / NAME).glob(f'*/{SemanticSeg.VERSION}'))
    raise FileNotFoundError(f'{folder}: no whole SemanticSeg config; there are {", ".join(known) or "none"}. '
                            'Make it with: python -m tools.build_semanticseg FOLDER --out ' + os.fspath(out))
  return tfds.builder_from_directory(folder)
