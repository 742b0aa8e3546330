"""Documents with cuts out of files that show their structure: headings, syntax, topics, messages.

What a file is, its name's ending says (see `FORMS` and `structure_code.LANGUAGES`). All builders give blocks that join to
the text; then sections that are too short are joined to the next, and works that are too long become several documents.
"""

import pathlib
from collections.abc import Callable, Iterator

from blockattn.errors import UserError
from blockattn.segmentation.semanticseg import schema, structure_code, structure_cuts, structure_talk, structure_text
from blockattn.segmentation.semanticseg.structure_cuts import NoStructure, Options

FORMS = {
    '.md': 'markdown', '.markdown': 'markdown', '.rst': 'rst', '.tex': 'latex', '.html': 'html', '.htm': 'html',
    '.xhtml': 'html', '.py': 'python', '.json': 'transcript', '.eml': 'message', '.mbox': 'threads',
    **dict.fromkeys(structure_code.LANGUAGES, 'code'),
}


class Skipped(ValueError):
  """A file that gives no document; `reason` is one of a few, the detail says more."""

  def __init__(self, reason: str, detail: str = ''):
    super().__init__(f'{reason}: {detail}' if detail else reason)
    self.reason = reason


def documents(text: str, suffix: str, options: Options = structure_cuts.DEFAULT) -> list[tuple[str, ...]]:
  """The documents of one text, each as its blocks: one, or several if it is long or a mailbox.

  Args:
    suffix: ending of the file's name, such as '.md'.

  Raises:
    NoStructure: there is nothing to cut at.
    ValueError: no builder reads that ending.
  """
  works = _works(text, suffix.lower(), options)
  joined = [structure_cuts.join_short(blocks, options.shortest) for blocks in works]
  if not any(len(blocks) > 1 for blocks in joined):
    raise NoStructure(f'all sections but one have less than {options.shortest} characters')
  return [tuple(part) for blocks in joined if len(blocks) > 1 for part in structure_cuts.split_work(blocks, options)]


def _works(text, suffix, options):
  headed = {'markdown': structure_text.markdown, 'rst': structure_text.rst, 'latex': structure_text.latex,
            'html': structure_text.html_page}
  form = FORMS.get(suffix)
  if form in headed:
    return [headed[form](text, options)]
  if form == 'code':
    return [structure_code.code(text, structure_code.LANGUAGES[suffix])]
  if form == 'threads':
    return structure_talk.threads(text)
  other = {'python': structure_code.python, 'transcript': structure_talk.transcript, 'message': structure_talk.message}
  if form not in other:
    raise UserError(f'no builder reads {suffix or "a name without ending"}; there are {", ".join(sorted(FORMS))}')
  return [other[form](text)]


def read_text(path: pathlib.Path) -> str:
  """The file's text, line ends as they are.

  Raises:
    Skipped: 'empty', 'binary' (it holds a NUL character) or 'not UTF-8'.
  """
  data = path.read_bytes()
  if b'\0' in data:
    raise Skipped('binary')
  try:
    text = data.decode('utf-8')
  except UnicodeDecodeError as error:
    raise Skipped('not UTF-8', f'byte {error.start}') from error
  if not text.strip():
    raise Skipped('empty')
  return text


def read_folder(folder: pathlib.Path, category: str, source: str, license: str, options: Options,
                skipped: Callable[[pathlib.Path, Skipped], None]) -> Iterator[schema.Document]:
  """Documents of all files below a folder, in order of their paths; hidden files and folders are left out.

  Ids are paths relative to the folder, with #0, #1 .. for the documents of one file; source is 'source:path'.

  Args:
    skipped: called with every file that gives no document, or loses one, and why: 'unknown ending', 'symbolic link',
      'empty', 'binary', 'not UTF-8', 'no structure', 'too long' (one block is longer than a document may be).

  Raises:
    NotADirectoryError: it is no folder.
  """
  if not folder.is_dir():
    raise NotADirectoryError(f'{folder}: no folder; give the one that holds the files')
  for path in sorted(folder.rglob('*')):
    inside = path.relative_to(folder)
    if any(part.startswith('.') for part in inside.parts) or path.is_dir():
      continue
    try:
      for number, blocks in enumerate(_read_file(path, options)):
        if sum(map(len, blocks)) > options.longest:
          skipped(path, Skipped('too long', f'#{number} is a block of {len(blocks[0])} characters'))
          continue
        yield schema.Document(f'{inside.as_posix()}#{number}', category, f'{source}:{inside.as_posix()}', license, blocks)
    except Skipped as error:
      skipped(path, error)


def _read_file(path, options):
  if path.is_symlink() or not path.is_file():
    raise Skipped('symbolic link' if path.is_symlink() else 'no file')
  if path.suffix.lower() not in FORMS:
    raise Skipped('unknown ending', path.suffix or 'none')
  text = read_text(path)
  try:
    return documents(text, path.suffix, options)
  except NoStructure as error:
    raise Skipped('no structure', str(error)) from error
