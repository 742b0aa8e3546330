"""The command lines of the tools."""

import glob
import itertools
import os
import sys
from collections.abc import Iterable

import rich.console

from blockattn import disk, errors
from blockattn.errors import UserError

# Names of arguments, in any tool, that say where to write; all others may be read.
OUTPUTS = ('out', 'output', 'html', 'json', 'plot', 'cache')


class Parser(errors.Parser):
  """One that refuses paths on other machines (gs://...), whatever argument they are given to, and outputs that
  are read too, or written twice."""

  def parse_known_args(self, args=None, namespace=None):
    args = sys.argv[1:] if args is None else list(args)
    try:
      disk.check_local(args)
      parsed, more = super().parse_known_args(args, namespace)
      check_outputs(vars(parsed))
    except ValueError as error:
      self.error(str(error))
    return parsed, more


def consoles() -> tuple[rich.console.Console, rich.console.Console]:
  """Standard output and standard error, which print text as it stands: that of files may look like rich's markup."""
  plain = {'markup': False, 'emoji': False, 'highlight': False, 'soft_wrap': True}
  # A pipe has no width of its own.
  return (rich.console.Console(width=None if sys.stdout.isatty() else 150, **plain),
          rich.console.Console(stderr=True, **plain))


def check_outputs(values: dict):
  """Checks that what is written is none of what is read, under whatever name, and no output is another one.

  Args:
    values: name of each argument -> what it was given: paths, lists of them, and anything else. With a true 'overwrite', an
      output is also no folder that holds what is read.

  Raises:
    ValueError: names the output.
  """
  outputs = {name: path for name in OUTPUTS if name in values for path in _paths(values[name])}
  read = [place for name, value in values.items() if name not in OUTPUTS
          for path in _paths(value) for place in _places(path)]
  for output in outputs.values():
    for place in read:
      if _same(output, place) or values.get('overwrite') and _same(output, *_above(place)):
        raise UserError(f'{output}: is read, and would be replaced by what is written; choose another name')
  for (a, first), (b, second) in itertools.combinations(outputs.items(), 2):
    if os.path.realpath(os.path.expanduser(first)) == os.path.realpath(os.path.expanduser(second)):
      raise UserError(f'--{a} and --{b} both are {first}: choose another name for one of them')


def _paths(value) -> list[str]:
  if isinstance(value, list | tuple):
    return [path for item in value for path in _paths(item)]
  return [os.fspath(value)] if isinstance(value, str | os.PathLike) and value else []


def _places(path) -> list[str]:
  """What a path or glob names that is there."""
  path = os.path.expanduser(path)
  return [path] if os.path.exists(path) else glob.glob(path) if glob.has_magic(path) else []


def _above(place) -> Iterable[str]:
  """The folders that a place is in."""
  place = os.path.realpath(place)
  while place != (place := os.path.dirname(place)):
    yield place


def _same(output, *places) -> bool:
  output = os.path.expanduser(output)
  return os.path.exists(output) and any(os.path.samefile(output, place) for place in places)


def line_of(error: BaseException) -> str:
  """What a command says of an error that ends it: with the name of the file, where the system has one."""
  return errors.line_of(error) or str(error)
