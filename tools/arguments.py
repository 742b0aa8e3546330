"""The command lines of the tools: their parser, arguments that several have, and how they end."""

import argparse
import glob
import itertools
import math
import os
import sys
from collections.abc import Callable, Iterable

import rich.console
import rich.table

from blockattn import disk, errors
from blockattn.errors import UserError

# Names of arguments, in any tool, that say where to write; all others may be read.
OUTPUTS = ('out', 'output', 'html', 'json', 'plot', 'cache')


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
  """The description as it stands, and the default of each option that has one."""

  def _get_help_string(self, action):
    has_none = action.default is None or action.default is False or action.default == []   # 0 is one
    return action.help if has_none or '(default' in action.help else super()._get_help_string(action)


class Parser(errors.Parser):
  """One that refuses paths on other machines (gs://...), whatever argument they are given to, and outputs that
  are read too, or written twice."""

  def __init__(self, *args, formatter_class=Help, **more):
    super().__init__(*args, formatter_class=formatter_class, **more)

  def parse_known_args(self, args=None, namespace=None):
    args = sys.argv[1:] if args is None else list(args)
    try:
      disk.check_local(args)
      parsed, more = super().parse_known_args(args, namespace)
      check_outputs(vars(parsed))
    except ValueError as error:
      self.error(str(error))
    return parsed, more


def positive(value: str) -> int:
  if not value.isdigit() or int(value) < 1:
    raise argparse.ArgumentTypeError(f'{value!r} is not a number from 1 on')
  return int(value)


def amount(value: str) -> float:
  """A number from 0 on that is one: neither NaN nor without end."""
  try:
    number = float(value)
  except ValueError:
    number = math.nan
  if not 0 <= number < math.inf:
    raise argparse.ArgumentTypeError(f'{value!r} is not a number from 0 on')
  return number


def add_numbers(parser: argparse.ArgumentParser, **numbers: tuple[float, str]) -> None:
  """An option per number: {name: (default, help)}. Where the default is a whole number it is a count, from 1 on."""
  for name, (default, text) in numbers.items():
    parser.add_argument(f'--{name.replace("_", "-")}', type=positive if isinstance(default, int) else amount,
                        default=default, help=text)


def add_computing(parser: argparse.ArgumentParser, impl: str | None = 'auto') -> None:
  """--dtype and, unless `impl` is None, --impl."""
  parser.add_argument('--dtype', choices=('float32', 'bfloat16'), default='float32', help='of weights and activations')
  if impl is not None:
    parser.add_argument('--impl', default=impl, help='of attention')


def add_prompts(parser: argparse.ArgumentParser) -> None:
  """--chat and --template-args, the same in all commands that ask a model."""
  parser.add_argument('--chat', action=argparse.BooleanOptionalAction, help="the tokenizer's chat template around prompts "
                      '(default: as in the training of the model; of other models, if the tokenizer has one)')
  parser.add_argument('--template-args', metavar='NAME=VALUE,...', help='of the chat template, such as enable_thinking=true '
                      '(default: as in training; enable_thinking=false where the template knows it)')


def compute_of(options, console: rich.console.Console):
  """transformer.Compute of --dtype and --impl; the implementation of attention that this is here is said."""
  import jax  # as in `run`

  from blockattn.kernels import api
  from blockattn.models import transformer
  attention = api.choose(options.impl, jax.devices()[0])
  console.print(str(attention))
  return transformer.Compute(dtype=options.dtype, impl=attention.impl)


def run(name: str, command: Callable[[], int | None], *, stopped: str = '',
        mendable: tuple[type[Exception], ...] = ()) -> int:
  """The exit status of a command: what it returns, or what becomes of the errors that it ends with, each a line.

  Args:
    name: in front of the line.
    stopped: what is said of Ctrl-C.
    mendable: errors, beside those of files and values, that the user can mend.
  """
  err = console(stderr=True)
  if 'jax' in sys.modules:   # those who compute have loaded it already
    from blockattn import compiled
    compiled.keep()
  try:
    return command() or 0
  except (OSError, ValueError, ImportError, *mendable) as error:
    err.print(printable(f'{name}: {errors.line_of(error) or error}'))
    return errors.EXIT_MEND
  except KeyboardInterrupt:
    err.print(f'{name}: stopped' + (f'; {stopped}' if stopped else ''))
    return errors.EXIT_INTERRUPTED


def printable(message: str) -> str:
  """The message less control characters, which a file's name may hold and a terminal obeys."""
  return ''.join(c if c.isprintable() or c in '\n\t' else repr(c)[1:-1] for c in message)


def console(stderr: bool = False) -> rich.console.Console:
  """Prints text as it stands: that of files may look like rich's markup. A pipe has no width of its own."""
  return rich.console.Console(width=None if stderr or sys.stdout.isatty() else 150, stderr=stderr, markup=False,
                              emoji=False, highlight=False, soft_wrap=True)


def table(*columns: str, left: int = 1, **style) -> rich.table.Table:
  """One of rich whose columns but the first `left` are numbers."""
  return rich.table.Table(*(rich.table.Column(name, justify='left' if i < left else 'right')
                            for i, name in enumerate(columns)), **style)


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
