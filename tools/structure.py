"""Documents with cuts out of a folder of files that show their structure: headings, syntax, topics, messages.

  python -m tools.structure docs/ train_manuals.jsonl.gz --category manuals --license MIT --source github.com/me/docs

The ending of a file's name says what it is: .md .rst .tex .html, .py and other source code (tree-sitter), .json transcripts
{"turns": [{"speaker", "text", "topic"}, ...]}, .eml messages and .mbox threads. Writes one line for each document and
prints the files that gave none, with the reason. The exit code is 0; 1 if there is no document at all; 2 if the folder or
an option must be mended.
"""

import collections
import pathlib
import re
import sys

from blockattn.errors import UserError
from blockattn.segmentation.semanticseg import schema, structure
from tools import arguments

LISTED = 20   # skipped files of a reason that are printed; the rest are counted only


def _arguments(argv):
  parser = arguments.Parser(prog='python -m tools.structure', description=__doc__)
  parser.add_argument('folder', type=pathlib.Path, help='hidden files and folders in it are left out')
  parser.add_argument('output', type=pathlib.Path, help='a .jsonl or .jsonl.gz file; call it {split}_{category}.jsonl.gz')
  parser.add_argument('--category', required=True, help='of all documents, such as manuals: a-z, 0-9 and _')
  parser.add_argument('--license', required=True, help='of all documents, such as MIT')
  parser.add_argument('--source', help="where they are from (default: the folder's name)")
  defaults = structure.Options()
  arguments.add_numbers(
      parser,
      average=(defaults.average, 'characters: the deepest of three levels of headings whose sections are so long on average '
               'cuts'),
      shortest=(defaults.shortest, 'characters; shorter sections are joined to the next'),
      longest=(defaults.longest, 'characters; longer works become several documents'),
      smallest=(defaults.smallest, 'characters; the last of these is joined to the one before if it is smaller'))
  return parser.parse_args(argv)


def _options(args):
  if not re.fullmatch('[a-z0-9_]+', args.category):
    raise UserError(f'--category {args.category!r}: use a-z, 0-9 and _ only')
  if not args.license.strip():
    raise UserError('--license is empty; a document without a licence is not to be passed on')
  return structure.Options(args.average, args.shortest, args.longest, args.smallest)


def build(args, skipped):
  """Writes the documents: a Counter of 'documents', 'blocks', 'characters' and 'files'."""
  counts = collections.Counter()
  folder = args.folder.expanduser()
  source = args.source or folder.resolve().name
  files = set()

  def counted():
    for document in structure.read_folder(folder, args.category, source, args.license, _options(args), skipped):
      counts.update(documents=1, blocks=len(document.blocks), characters=len(document.text))
      files.add(document.source)
      yield document

  schema.write(args.output.expanduser(), counted())
  counts['files'] = len(files)
  return counts


def print_skipped(skipped, console):
  """One line for each reason with how many, then the first files of it."""
  for reason, files in sorted(skipped.items(), key=lambda item: -len(item[1])):
    console.print(f'{len(files)} skipped: {reason}')
    for path, error in files[:LISTED]:
      console.print(f'  {path}' + (f': {error}' if str(error) != reason else ''))
    if len(files) > LISTED:
      console.print(f'  ... and {len(files) - LISTED} more')


def run(args) -> int:
  console, skipped = arguments.console(), collections.defaultdict(list)
  counts = build(args, lambda path, error: skipped[error.reason].append((path, error)))
  console.print(f'{counts["documents"]} documents of {counts["files"]} files, {counts["blocks"]} blocks, '
                f'{counts["characters"]:,} characters: {args.output}')
  print_skipped(skipped, console)
  return 0 if counts['documents'] else 1


def main(argv=None) -> int:
  args = _arguments(argv)
  return arguments.run('structure', lambda: run(args))


if __name__ == '__main__':
  sys.exit(main())
