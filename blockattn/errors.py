"""What a user is told of what he can mend: one line that names the key or the file, and the remedy.

What he gives is refused with a UserError (a missing file: FileNotFoundError) whose text is that line; `line_of` tells such
errors from faults of ours, whose traceback is needed.
"""

import argparse
import difflib
import errno
import importlib
import math
import numbers
import sys
from collections.abc import Iterable, Sequence
from typing import Any

EXIT_MEND = 2          # the user can mend it; the same command would fail again
EXIT_INTERRUPTED = 130   # Ctrl-C, as shells have it

_NAMED = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError, TimeoutError)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class UserError(ValueError):
  """What the user gave, or what lies around him, is not what it has to be. The text is one line that names it and says
  what to do; a traceback would add nothing."""


class MissingLibrary(UserError, ImportError):
  """A library that is not installed, of an extra."""


class Parser(argparse.ArgumentParser):
  """argparse's, whose refusals are one line, too. It names a mistyped option, not the one that is missing for it."""

  _given: Sequence[str] = ()

  def parse_known_args(self, args=None, namespace=None):
    self._given = sys.argv[1:] if args is None else list(args)
    return super().parse_known_args(args, namespace)

  def error(self, message):
    known = self._option_string_actions
    names = [arg.partition('=')[0] for arg in self._given if arg.startswith('--')]
    unknown = [name for name in names if not any(option.startswith(name) for option in known)]
    if unknown and message.startswith('the following arguments are required'):
      near = difflib.get_close_matches(unknown[0], known, n=1)
      message = f'{unknown[0]}: no such option{"".join(f"; did you mean {option}?" for option in near)}'
    self.exit(EXIT_MEND, f'error: {" ".join(message.split())}; {self.prog} --help lists what it takes\n')


def check_number(name: str, value: Any, low: float | None = None, high: float | None = None, *, above: float | None = None,
                 below: float | None = None, hint: str = ''):
  """Checks that a value is a finite number within its range.

  Args:
    name: as the user writes it: 'config.optim.lr'.
    low, high: the least and the greatest that it may be.
    above, below: bounds that it may not reach itself.
    hint: what else to say of it.

  Raises:
    ValueError: it is not, NaN and infinity included.
  """
  bounds = ((low, 'from {}', lambda a, b: a >= b), (above, 'above {}', lambda a, b: a > b),
            (high, 'to {}', lambda a, b: a <= b), (below, 'below {}', lambda a, b: a < b))
  bounds = [(bound, words, holds) for bound, words, holds in bounds if bound is not None]
  if not (isinstance(value, numbers.Real) and math.isfinite(value) and all(holds(value, b) for b, _, holds in bounds)):
    words = ' '.join(['give a number', *(words.format(bound) for bound, words, _ in bounds)])
    raise UserError(f'{name}={value}; {words}{hint}')


def check_choice(name: str, value: Any, known: Iterable[str]):
  """Raises ValueError if the value of `name`, as the user writes it, is not one of those that are known."""
  if value not in (known := tuple(known)):
    raise UserError(f'{name}={value!r}; choose one of {", ".join(known)}')


def line_of(error: BaseException) -> str | None:
  """The line that tells a user what to mend; None of an error that is none of his."""
  if isinstance(error, UserError) or _is_ours(error):
    return str(error)
  if isinstance(error, OSError) and error.errno in _FULL:
    return f'{error}: make room there, then start the same command again to go on from the newest checkpoint'
  if isinstance(error, OSError) and error.filename is not None:
    return f'{error.filename}: {error.strerror}; repair it, or name another path'
  return None


def _is_ours(error):
  return isinstance(error, OSError) and type(error) in _NAMED and error.errno is None   # without a number: raised by us


def library(module: str, who: str, extra: str) -> Any:
  """A module of a library that an extra brings. Raises MissingLibrary, saying who needs it and how to install it."""
  try:
    return importlib.import_module(module)
  except ImportError as error:
    package = module.partition('.')[0].replace('_', '-')
    raise MissingLibrary(f'{who} needs {package}: pip install "blockattn[{extra}]" ({error})') from error
