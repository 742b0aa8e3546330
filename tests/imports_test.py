"""The house, kept by reading the imports: what stands on which floor, and who may import whom."""

import ast
import dataclasses
import functools
import graphlib
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
LEVELS = (
    ('blocks', 'errors', 'options', 'mesh', 'multihost', 'tree', 'disk', 'hub', 'locks', 'metrics', 'trace', 'compiled',
     'checkpoint'),
    ('kernels',),
    ('models',),
    ('data', 'hf', 'losses', 'optim'),
    ('loading',),
    ('inference', 'evals', 'segmentation'),
    ('train', 'serving'),
)
LEVEL = {place: level for level, places in enumerate(LEVELS) for place in places}
FACE = ''   # blockattn/__init__.py, on top of everything
LEVEL[FACE] = len(LEVELS)

# Libraries that some machines lack, and the only places of the package that may ask for them.
GUESTS = {'grain': ('data', 'train', 'checkpoint'), 'ml_collections': ('train',),
          **dict.fromkeys(('pyarrow', 'datasets'), ('data',)), 'gguf': ('hf',), 'vllm': ('serving',),
          **dict.fromkeys(('tensorflow_datasets', 'apache_beam', 'datasketch', 'tree_sitter'), ('segmentation',))}
# These must import on a machine without any of them, whatever they import themselves.
PORTABLE = ('blocks', 'errors', 'options', 'mesh', 'multihost', 'tree', 'disk', 'hub', 'locks', 'metrics', 'trace',
            'compiled', 'checkpoint', 'kernels', 'models', 'inference')


@dataclasses.dataclass(frozen=True)
class Import:
  """One import of a dotted name; `late` if it stands inside a function or under TYPE_CHECKING: loading the module does not
  run it."""
  name: str
  line: int
  late: bool


def imports_of(source: str, package: str) -> list[Import]:
  """Every import in the source of a module of `package`, relative ones resolved; `from a import b` gives `a.b`."""
  found = []
  for_types = lambda node: isinstance(node, ast.If) and ast.unparse(node.test) == 'TYPE_CHECKING'

  def visit(node, late):
    if isinstance(node, ast.Import):
      found.extend(Import(alias.name, node.lineno, late) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      parts = package.split('.')[:len(package.split('.')) - node.level + 1] if node.level else []
      base = '.'.join(parts + ([node.module] if node.module else []))
      found.extend(Import(f'{base}.{alias.name}', node.lineno, late) for alias in node.names)
    for child in ast.iter_child_nodes(node):
      visit(child, late or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or for_types(node))

  visit(ast.parse(source), False)
  return found


@functools.cache
def imports_in(folder: str) -> dict[str, list[Import]]:
  """Imports by dotted module name, for every module of a folder of the checkout."""
  result = {}
  for path in sorted((ROOT / folder).rglob('*.py')):
    parts = path.relative_to(ROOT).with_suffix('').parts
    is_package = parts[-1] == '__init__'
    package = '.'.join(parts[:-1])
    result[package if is_package else '.'.join(parts)] = imports_of(path.read_text(encoding='utf-8'), package)
  return result


def package_imports() -> dict[str, list[Import]]:
  return imports_in('blockattn')


def place_of(name: str) -> str:
  """The file or folder directly under blockattn/ that a dotted name of the package belongs to; FACE for what the package
  itself offers."""
  return (module_of(name).split('.') + [FACE])[1]


def module_of(name: str) -> str:
  """The module of the checkout that a dotted name is, or is a part of."""
  parts, known = name.split('.'), imports_in(name.split('.')[0])
  return next(found for n in range(len(parts), 0, -1) if (found := '.'.join(parts[:n])) in known)


def is_folder(place: str) -> bool:
  return (ROOT / 'blockattn' / place).is_dir()


def may_import(importer: str, imported: str) -> bool:
  """Downward, inside a folder, and between single files of one level; a folder's siblings are out of its reach, and the
  face is out of everybody's."""
  if importer == imported:
    return True
  if LEVEL[importer] == LEVEL[imported]:
    return not is_folder(importer) and not is_folder(imported)
  return LEVEL[importer] > LEVEL[imported]


def where(module: str, line: int) -> str:
  return f'{module}, line {line}'


def test_everything_has_a_level():
  places = {place_of(name) for name in package_imports()}
  assert places <= set(LEVEL), f'give these a level in {__name__}.LEVELS: {sorted(places - set(LEVEL))}'


def test_every_folder_with_code_is_a_package():
  folders = {path.parent for path in (ROOT / 'blockattn').rglob('*.py')}
  missing = sorted(str(f.relative_to(ROOT)) for f in folders if not (f / '__init__.py').exists())
  assert not missing, f'without __init__.py these are not installed: {missing}'


def test_imports_go_downward():
  wrong = [f'{where(module, i.line)}: imports {i.name}' for module, imports in package_imports().items()
           for i in imports if i.name.split('.')[0] == 'blockattn' and not may_import(place_of(module), place_of(i.name))]
  assert not wrong, '\n'.join(['imports go to a lower level only:'] + wrong)


@pytest.mark.parametrize('folder', ['blockattn', 'tools', 'launch'])
def test_no_files_import_each_other_in_a_circle(folder):
  graph = {module: {module_of(i.name) for i in imports if i.name.split('.')[0] == folder}
           for module, imports in imports_in(folder).items()}
  try:
    graphlib.TopologicalSorter(graph).prepare()
  except graphlib.CycleError as error:
    pytest.fail('a circle: ' + ' <- '.join(error.args[1]))


def test_the_package_knows_nothing_of_what_uses_it():
  wrong = [f'{where(module, i.line)}: imports {i.name}' for module, imports in package_imports().items()
           for i in imports if i.name.split('.')[0] in ('tools', 'configs', 'launch', 'tests')]
  assert not wrong, '\n'.join(wrong)


@pytest.mark.parametrize('library', GUESTS)
def test_optional_libraries_stay_where_they_are_used(library):
  wrong = [f'{where(module, i.line)}: imports {i.name}' for module, imports in package_imports().items()
           for i in imports if i.name.split('.')[0] == library and place_of(module) not in GUESTS[library]]
  assert not wrong, '\n'.join([f'only {", ".join(GUESTS[library])} may import {library}:'] + wrong)


def modules_behind(module: str) -> set[str]:
  """All modules of blockattn and all libraries that importing `module` runs."""
  known, reached, queue = package_imports(), set(), [module]
  while queue:
    name = queue.pop()
    if name in reached:
      continue
    reached.add(name)
    for i in known.get(name, ()):
      if not i.late:
        # Importing a.b.c runs a, a.b and, if it is a module, a.b.c.
        parts = i.name.split('.')
        prefixes = ['.'.join(parts[:n]) for n in range(1, len(parts) + 1)]
        queue += [p for p in prefixes if p in known] or parts[:1]
  return reached


@pytest.mark.parametrize('place', PORTABLE)
def test_computing_parts_import_without_optional_libraries(place):
  for module in package_imports():
    if place_of(module) == place:
      assert not modules_behind(module) & set(GUESTS), f'{module} needs {modules_behind(module) & set(GUESTS)}'


def test_no_kernel_is_imported_before_it_is_chosen():
  assert not modules_behind('blockattn.kernels.api') & {f'blockattn.kernels.{impl}' for impl in ('gpu', 'tpu', 'xla')}


def test_the_reader_of_imports():
  source = ('import a.b\nfrom . import c\nfrom ..d import e, f\ndef g():\n  from h import i\n'
            'if TYPE_CHECKING:\n  import j\n')
  assert imports_of(source, 'blockattn.models') == [
      Import('a.b', 1, False), Import('blockattn.models.c', 2, False), Import('blockattn.d.e', 3, False),
      Import('blockattn.d.f', 3, False), Import('h.i', 5, True), Import('j', 7, True)]


@pytest.mark.parametrize('importer, imported, allowed', [
    ('models', 'kernels', True), ('kernels', 'models', False), ('data', 'hf', False), ('data', 'losses', False),
    ('checkpoint', 'tree', True), ('evals', 'inference', False), ('train', 'evals', True), ('train', 'train', True),
    ('', 'train', True), ('segmentation', '', False)])
def test_the_rule_itself(importer, imported, allowed, monkeypatch):
  monkeypatch.setattr(f'{__name__}.is_folder', lambda place: place not in ('checkpoint', 'tree', 'losses', 'optim'))
  assert may_import(importer, imported) == allowed
