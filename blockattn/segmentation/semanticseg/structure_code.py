"""Blocks from the syntax of source code: definitions with what belongs to them, big classes by their members.

A block starts at a definition, with the comments, decorators and attributes that stand right before it, and at the first
statement behind one and a blank line. Python is read by `ast`; every other language by tree-sitter, whose grammars come with
tree-sitter-language-pack before its version 1 (later ones download them when they are first used).
"""

import ast
import itertools
import re
import warnings

from blockattn import errors
from blockattn.segmentation.semanticseg.structure_text import NoStructure, cut_at, line_starts

BIG = 4000   # characters; a class that is longer, or longer than half of its file, is cut at its members
LANGUAGES = {
    '.c': 'c', '.h': 'c', '.cc': 'cpp', '.cpp': 'cpp', '.cxx': 'cpp', '.hpp': 'cpp', '.cu': 'cuda', '.cs': 'csharp',
    '.go': 'go', '.hs': 'haskell', '.java': 'java', '.js': 'javascript', '.jsx': 'javascript', '.mjs': 'javascript',
    '.jl': 'julia', '.kt': 'kotlin', '.lua': 'lua', '.ml': 'ocaml', '.php': 'php', '.pl': 'perl', '.r': 'r', '.rb': 'ruby',
    '.rs': 'rust', '.scala': 'scala', '.sh': 'bash', '.swift': 'swift', '.ts': 'typescript', '.tsx': 'tsx', '.zig': 'zig',
}
_CONTAINER = re.compile(r'class|interface|impl|trait|mod_item|module|namespace|object|protocol|extension|preproc_if|'
                        r'linkage|body|declaration_list|export_statement|template_declaration|^if$|^then$')
_UNDIVIDED = re.compile(r'function|method|constructor|lambda|closure|import|include')
_HEADED = re.compile(r'declaration$|definition$|specifier$|item$|^class$|^module$')
_IMPORT = re.compile(r'import|include|using')
_ATTACHED = re.compile(r'comment|attribute|decorator|annotation')


def python(text: str) -> list[str]:
  """Cuts Python 3 at top-level functions and classes, and at the members of big classes. Raises NoStructure: it is not
  Python 3, or defines nothing."""
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')   # of invalid escapes and the like in somebody else's code
      tree = ast.parse(text.removeprefix('\ufeff'))
  except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
    raise NoStructure(f'not Python 3: {error}') from error
  starts = line_starts(text)
  lines = [text[a:b] for a, b in zip(starts, [*starts[1:], len(text)], strict=True)]
  return _cut(text, [starts[line] for line in _python_cuts(tree.body, lines, starts, len(text))])


def _python_cuts(body, lines, starts, length):
  """Indices of the lines at which blocks start."""
  found, last_end, after_definition = [], 0, False
  for node in body:
    first = min([node.lineno, *(d.lineno for d in getattr(node, 'decorator_list', ()))]) - 1
    definition = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
    comments = [line for line in range(last_end, first)
                if not lines[line][:node.col_offset].strip() and lines[line][node.col_offset:].startswith('#')]
    start, end = _with_comments(first, last_end, comments), node.end_lineno or node.lineno
    if first >= last_end and (definition or after_definition and start > last_end):
      found.append(start)
    if isinstance(node, ast.ClassDef) and _is_big(starts[first], starts[min(end, len(starts) - 1)], length):
      found += _python_cuts(node.body, lines, starts, length)
    last_end, after_definition = end, definition
  return found


def _with_comments(first, last_end, comments):
  """The line at which a block starts: the definition's own, `first`, or that of the first comment above that belongs to it;
  `comments` are lines in order, `last_end` is the first line behind what stands before."""
  own = [line for line in comments if last_end <= line < first]
  if own and own[0] == last_end:   # right behind what stands before: its own, unless it reaches down to the definition
    gap = next((i for i, line in enumerate(own) if line != last_end + i), len(own))
    if gap < len(own) or own[-1] != first - 1:
      own = own[gap:]
  return own[0] if own else first


def _is_big(start, stop, length):
  return stop - start > min(BIG, length / 2)


def code(text: str, language: str) -> list[str]:
  """Cuts source code at what spans several lines, of any language by its name in tree-sitter-language-pack. Raises
  ImportError: tree-sitter-language-pack is not installed; NoStructure: nothing in it spans several lines, or it is nothing
  like that language."""
  root = _parse(text.encode(), language)
  starts = [0, *(match.end() for match in re.finditer('\n', text))]   # tree-sitter's rows
  try:
    return _cut(text, [starts[row] for row in _rows(root, len(text.encode()))])
  except RecursionError as error:
    raise NoStructure('nested too deeply') from error


def _parse(data, language):
  parser = errors.library('tree_sitter_language_pack', 'source code other than Python', 'semanticseg').get_parser(language)
  steps = itertools.count()   # tree-sitter reports a few for every hundred bytes, and has no end with some garbage
  try:
    tree = parser.parse(lambda start, _: data[start:start + 65_536],
                        progress_callback=lambda *_: next(steps) > 1000 + len(data) // 5)
  except ValueError as error:   # stopped
    raise NoStructure(f'not {language}: too many mistakes') from error
  if tree.root_node.type == 'ERROR':
    raise NoStructure(f'not {language}')
  return tree.root_node


def _rows(root, length):
  """Rows at which blocks start, in order."""
  rows, last_end, after_definition, comments = [], -1, False, []
  for node, opens in _items(root, length):
    first, last = node.start_point.row, _last_row(node)
    if _ATTACHED.search(node.type):
      comments += range(first, last + 1)
      continue
    start = _with_comments(first, last_end + 1, comments)
    definition = not opens and _defines(node)
    if first > last_end and (opens or definition or after_definition and start > last_end + 1):
      rows.append(start)
    # What a class says before its first method stays with its name.
    last_end, after_definition, comments = (first if opens else last), definition, []
  return rows


def _items(node, length):
  """(node, True) for a big container before its items, (node, False) for every other item, in order."""
  for child in node.named_children:
    if _is_divided(child) and _is_big(child.start_byte, child.end_byte, length):
      yield child, True
      yield from _inside(child, length)
    else:
      yield child, False


def _is_divided(node):
  return bool(_CONTAINER.search(node.type) and not _UNDIVIDED.search(node.type) and node.named_child_count)


def _inside(node, length):
  """The items of a container, and the comments before them, without its name, bases and modifiers."""
  body = max(node.named_children, key=lambda child: child.end_byte - child.start_byte)
  if not _is_divided(body) or 2 * (body.end_byte - body.start_byte) < node.end_byte - node.start_byte:
    yield from _items(node, length)
    return
  for child in node.named_children:
    if child == body:
      yield from (_inside if _HEADED.search(body.type) else _items)(body, length)
    elif 'comment' in child.type:
      yield child, False


def _defines(node):
  """True for what spans several lines, imports and comments excepted; of conditional code, for what holds such a thing."""
  if _last_row(node) == node.start_point.row or _ATTACHED.search(node.type) or _IMPORT.search(node.type):
    return False
  return not node.type.startswith('preproc_') or any(map(_defines, node.named_children))


def _last_row(node):
  return node.end_point.row - (node.end_point.column == 0 and node.end_point.row > node.start_point.row)


def _cut(text, cuts):
  blocks = cut_at(text, cuts)
  if len(blocks) < 2:
    raise NoStructure('no definitions')
  return blocks
