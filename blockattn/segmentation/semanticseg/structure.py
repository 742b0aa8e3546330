"""Documents with cuts out of files that show their structure: headings, syntax, topics, messages.

What a file is, its name's ending says (see `SUFFIXES`). All builders give blocks that join to the text; then sections that
are too short are joined to the next, and works that are too long become several documents.
"""

import functools
import pathlib
from collections.abc import Callable, Iterator

from blockattn.errors import UserError
from blockattn.segmentation.semanticseg import schema, structure_code, structure_talk, structure_text
from blockattn.segmentation.semanticseg.structure_text import NoStructure, Options

# Readers of headings, whose level is then chosen, and builders; a mailbox gives several works, all else one.
_HEADED = {'.md': structure_text.markdown, '.markdown': structure_text.markdown, '.rst': structure_text.rst,
           '.tex': structure_text.latex, **dict.fromkeys(('.html', '.htm', '.xhtml'), structure_text.html_text)}
_BUILDERS = {'.py': structure_code.python, '.json': structure_talk.transcript, '.eml': structure_talk.message,
             **{suffix: functools.partial(structure_code.code, language=language)
                for suffix, language in structure_code.LANGUAGES.items()}}
SUFFIXES = frozenset({*_HEADED, *_BUILDERS, '.mbox'})


class Skipped(ValueError):
  """A file that gives no document; `reason` is one of a few, the detail says more."""

  def __init__(self, reason: str, detail: str = ''):
    super().__init__(f'{reason}: {detail}' if detail else reason)
    self.reason = reason


def documents(text: str, suffix: str, options: Options = structure_text.DEFAULT) -> list[tuple[str, ...]]:
  """The documents of one text, each as its blocks: one, or several if it is long or a mailbox. Raises NoStructure: there is
  nothing to cut at; ValueError: no builder reads that ending."""
  works = _works(text, suffix.lower(), options)
  joined = [structure_text.join_short(blocks, options.shortest) for blocks in works]
  if not any(len(blocks) > 1 for blocks in joined):
    raise NoStructure(f'all sections but one have less than {options.shortest} characters')
  return [tuple(part) for blocks in joined if len(blocks) > 1 for part in structure_text.split_work(blocks, options)]


def _works(text, suffix, options):
  if suffix in _HEADED:
    return [structure_text.cut_at_headings(*_HEADED[suffix](text), options)]
  if suffix in _BUILDERS:
    return [_BUILDERS[suffix](text)]
  if suffix == '.mbox':
    return structure_talk.threads(text)
  raise UserError(f'no builder reads {suffix or "a name without ending"}; there are {", ".join(sorted(SUFFIXES))}')


def _text_of(path):
  """The file's text, line ends as they are."""
  if path.is_symlink() or not path.is_file():
    raise Skipped('symbolic link' if path.is_symlink() else 'no file')
  if path.suffix.lower() not in SUFFIXES:
    raise Skipped('unknown ending', path.suffix or 'none')
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

  Raises NotADirectoryError: it is no folder."""
  if not folder.is_dir():
    raise NotADirectoryError(f'{folder}: no folder; give the one that holds the files')
  for path in sorted(folder.rglob('*')):
    inside = path.relative_to(folder)
    if any(part.startswith('.') for part in inside.parts) or path.is_dir():
      continue
    try:
      for number, blocks in enumerate(documents(_text_of(path), path.suffix, options)):
        if sum(map(len, blocks)) > options.longest:
          skipped(path, Skipped('too long', f'#{number} is a block of {len(blocks[0])} characters'))
          continue
        yield schema.Document(f'{inside.as_posix()}#{number}', category, f'{source}:{inside.as_posix()}', license, blocks)
    except NoStructure as error:
      skipped(path, Skipped('no structure', str(error)))
    except Skipped as error:
      skipped(path, error)
