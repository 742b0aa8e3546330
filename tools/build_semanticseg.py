"""Builds the SemanticSeg dataset from files of documents that are cut into blocks.

  python -m tools.build_semanticseg seg/ --out semanticseg/ --drop-duplicates --tokenizer Qwen3-4B
  python -m tools.build_semanticseg seg/ --out /shared/seg --beam --beam-runner FlinkRunner --beam-options '...'

The files are {split}_{category}.jsonl or .jsonl.gz, a document a line: {"id", "category", "source", "license", "blocks"}.
In --out: semantic_seg/{category}/1.0.0 and semantic_seg/all/1.0.0 (TFDS, ArrayRecord; see
blockattn/segmentation/semanticseg/builder.py), statistics.md and statistics.json, duplicates.json, and report.json with the
bad lines. Started again, it makes only what is missing or whose input has changed.

Documents that nobody has cut yet become such files by two other commands:

  python -m tools.build_semanticseg structure ...    from headings, code, transcripts, e-mail threads (tools/structure.py)
  python -m tools.build_semanticseg annotate ...     by asking a language model (tools/annotate.py)

The exit code is 0, also with bad lines, which are left out; 2 if a file or an option must be mended.
"""

import contextlib
import hashlib
import importlib
import io
import itertools
import json
import os
import pathlib
import sys
import time

import absl.logging

from blockattn import disk
from blockattn.data import encode, json_lines
from blockattn.segmentation.semanticseg import dedupe, schema, statistics
from tools import arguments

COMMANDS = {'structure': 'tools.structure', 'annotate': 'tools.annotate'}


def _arguments(argv):
  parser = arguments.Parser(prog='python -m tools.build_semanticseg', description=__doc__)
  parser.add_argument('folders', nargs='+', metavar='FOLDER', help='folders, files or globs')
  parser.add_argument('--out', required=True, help='folder of the dataset')
  parser.add_argument('--categories', nargs='+', help='build only these, and not `all`')
  parser.add_argument('--shards', type=arguments.positive,
                      help='files of every split (default: one, and more from 64 MiB on)')
  parser.add_argument('--tokenizer', help='counts tokens too: a local folder, or a name on the hub')
  parser.add_argument('--drop-duplicates', action='store_true',
                      help='leave out training documents that are, nearly too, in validation or test')
  parser.add_argument('--similarity', type=float, default=dedupe.THRESHOLD,
                      help='of the words of near duplicates')
  parser.add_argument('--beam', action='store_true', help='read through Apache Beam')
  parser.add_argument('--beam-runner', default='FnApiRunner', help='of Beam; by default the direct one')
  parser.add_argument('--beam-options', default='', help="for the runner, e.g. '--direct_num_workers=4'")
  args = parser.parse_args(argv)
  if not args.beam and (args.beam_options or args.beam_runner != 'FnApiRunner'):
    parser.error('--beam-runner and --beam-options need --beam')
  return args


def _kept(path, facts, make):
  """What `make()` gives, kept in a JSON file and taken from there as long as the facts are the same."""
  path = pathlib.Path(path)
  fingerprint = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
  with contextlib.suppress(OSError, ValueError):
    kept = json.loads(path.read_text())
    if kept['fingerprint'] == fingerprint:
      return kept['values']
  values = make()
  _write(path, json.dumps({'fingerprint': fingerprint, 'values': values}, indent=1))
  return values


def _write(path, text):
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  disk.write_text(path, text)


def _builder():
  from blockattn.segmentation.semanticseg import builder  # needs tensorflow-datasets
  return builder


def find_duplicates(files, out, similarity):
  """The pairs of `dedupe.find` as JSON, and whom to drop; in `out`/duplicates.json."""
  def documents():
    for (_, split), own in itertools.groupby(files, key=lambda file: (file.category, file.split)):
      yield from ((split, document) for document in schema.read([file.path for file in own]))

  def make():
    pairs = dedupe.find(documents, threshold=similarity)
    return {'pairs': dedupe.to_json(pairs), 'counts': list(dedupe.counts_of(pairs)),
            'dropped': sorted(dedupe.dropped(pairs))}

  [whole] = [config for config in _builder().configs(files) if config.name == _builder().ALL]
  return _kept(os.path.join(out, 'duplicates.json'), ['duplicates 1', similarity, whole.fingerprint], make)


def build_all(configs, out, shards, console):
  builder = _builder()
  for config in configs:
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):   # TFDS tells about downloads, of which there are none
      built = builder.build(config, out, num_shards=shards)
    summary = builder.summary_of(builder.folder_of(out, config.name)).report
    what = f'built in {time.perf_counter() - start:.1f} s' if built else 'was there'
    console.print(f'{config.name}: {summary.docs:,} documents, {summary.bad.total():,} bad lines; {what}')


def measure(configs, out, tokenizer):
  """Statistics of the built categories, as JSON."""
  builder = _builder()
  encoder = encode.Encoder(encode.load_tokenizer(tokenizer), bos='never') if tokenizer else None

  def make():
    measured = {}
    for config in configs:
      for split in builder.splits_of(out, config.name):
        measured[config.name, split] = statistics.measure(builder.open_split(out, config.name, split), encoder)
    return statistics.to_json(measured)

  facts = ['statistics 1', [config.fingerprint for config in configs], encoder and encoder.fingerprint]
  return _kept(os.path.join(out, 'statistics.json'), facts, make)


def _report(configs, out, duplicates):
  """Bad lines by category, in `out`/report.json; returns them as one."""
  builder = _builder()
  reports = {config.name: builder.summary_of(builder.folder_of(out, config.name)).report for config in configs}
  values = {'lines': {name: report.to_json() for name, report in reports.items()},
            'duplicates': duplicates['counts'],
            'dropped': sorted(id for config in configs for id in config.dropped)}
  _write(os.path.join(out, 'report.json'), json.dumps(values, indent=1))
  return sum(reports.values(), json_lines.Report())


def _print_duplicates(duplicates, dropping, console):
  console.print('duplicates: ' + (f'{len(duplicates["pairs"])} pairs' if duplicates['pairs'] else 'none'))
  for category, splits, exact, near in duplicates['counts']:
    console.print(f'  {category}, {splits}: {exact} exact, {near} near')
  for pair in duplicates['pairs']:
    if pair['a'][0] != pair['b'][0]:
      console.print(f'  {pair["similarity"]:.2f} {" ".join(pair["a"])} = {" ".join(pair["b"])}')
  verb = 'left out' if dropping else 'would be left out with --drop-duplicates'
  console.print(f'  {len(duplicates["dropped"])} training documents {verb}')


def run(args) -> None:
  builder, console = _builder(), arguments.console()
  # TFDS tells every step, through the log and with bars of its own.
  absl.logging.set_verbosity(absl.logging.ERROR)
  builder.tfds.disable_progress_bar()
  files = schema.find(args.folders)
  schema.find(args.folders, args.categories)   # raises for an unknown category
  duplicates = find_duplicates(files, args.out, args.similarity)
  dropped = map(tuple, duplicates['dropped']) if args.drop_duplicates else ()
  beam = builder.Beam(args.beam_runner, args.beam_options) if args.beam else None
  configs = [config for config in builder.configs(files, dropped=tuple(dropped), beam=beam)
             if not args.categories or config.name in args.categories]
  build_all(configs, args.out, args.shards, console)
  categories = [config for config in configs if config.name != builder.ALL]
  values = statistics.to_markdown(measure(categories, args.out, args.tokenizer))
  _write(os.path.join(args.out, 'statistics.md'), values)
  report = _report(categories, args.out, duplicates)
  console.print(values)
  _print_duplicates(duplicates, args.drop_duplicates, console)
  console.print(report.summary())


def main(argv=None) -> int:
  argv = sys.argv[1:] if argv is None else argv
  if argv and argv[0] in COMMANDS:
    return importlib.import_module(COMMANDS[argv[0]]).main(argv[1:])
  args = _arguments(argv)
  return arguments.run('build_semanticseg', lambda: run(args))


if __name__ == '__main__':
  sys.exit(main())
