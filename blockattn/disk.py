"""Files on disk: names that are no place on this machine, files that appear when they are whole, JSON with its types.

Nothing here sets a mode: what is made has the one that the user's umask, or the folder's access list, gives it.
"""

import contextlib
import json
import os
import pathlib
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO

from blockattn.errors import UserError

NUMBER = (int, float)
_MOST = 2**1023   # a larger whole number is no float
_REMOTE = re.compile(r'(?:[\w.-]+=)?(?!https?:)[a-z][a-z0-9+.-]+://\S+')


# Places.

def check_local(texts: Iterable[str]):
  """Checks that no text is a path on other machines, such as gs://bucket/run, alone, behind '--name=' or in a list with
  commas: it would be taken for a folder called 'gs:'.

  Raises:
    ValueError: gives the first, and the way out.
  """
  for text in texts:
    if any(map(_REMOTE.fullmatch, text.split(','))):
      raise UserError(f'{text}: only paths of this machine are read and written; mount the bucket (gcsfuse, mount-s3) and '
                      'give the path below the mount, or copy the files here first (gcloud storage cp, aws s3 cp)')


# Writing.

@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[BinaryIO]:
  """A file to write to, which takes its name in one move when the block ends well, and vanishes if it does not."""
  path = pathlib.Path(path)
  temporary = path.with_name(f'.{path.name}.{uuid.uuid4().hex}.tmp')
  try:
    with temporary.open('xb') as file:
      yield file
    os.replace(temporary, path)
  except BaseException:
    temporary.unlink(missing_ok=True)
    raise


def write_text(path: str | os.PathLike, text: str):
  """Writes a text in one move: a reader never sees half of it."""
  with replacing(path) as file:
    file.write(text.encode())


# Reading.

def read_json(path: str | os.PathLike, form: Any = dict) -> Any:
  """The JSON in a file, of a form (see `check_form`), by default an object.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it holds something else. Both name the file.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise FileNotFoundError(f'{path} is missing')
  return parse_json(read_text(path), str(path), form)


def read_text(path: str | os.PathLike) -> str:
  """The text of a file. Raises ValueError, naming the file, if it is none."""
  try:
    return pathlib.Path(path).read_text(encoding='utf-8')
  except UnicodeDecodeError as error:
    raise UserError(f'{path} is no UTF-8 text: {error}') from error


def read_tokenizer(path: str | os.PathLike) -> Any:
  """The `tokenizers.Tokenizer` of a tokenizer.json.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it holds something else. Both name the file.
  """
  import tokenizers  # not needed by those who read JSON
  try:
    return tokenizers.Tokenizer.from_file(str(path))
  except Exception as error:   # of no other class
    read_json(path)   # says what is wrong, if it is no JSON
    raise UserError(f'{path} is no tokenizer that tokenizers {tokenizers.__version__} reads ({error}); save it again with '
                    'save_pretrained') from error


def parse_json(text: str | bytes, place: str, form: Any = dict) -> Any:
  """JSON of a form, by default an object. Raises ValueError, naming the place."""
  try:
    value = json.loads(text)
  except (ValueError, RecursionError) as error:   # nested too deep, or a number of too many digits
    raise UserError(f'{place} is no valid JSON: {error}') from error
  check_form(value, form, place)
  return value


def check_form(value: Any, form: Any, place: str):
  """Checks a value that was read against a form.

  Args:
    form: a type or a tuple of types; [form], a list of it; {str: form}, an object of it; {'key': form}, an object that has
      these keys and maybe others. NUMBER is any number that a float can be; True and False are none.

  Raises:
    ValueError: says where in the value, what was expected and what is there.
  """
  if isinstance(form, Mapping):
    check_form(value, dict, place)
    if str in form:
      form = dict.fromkeys(value, form[str])
    if missing := [key for key in form if key not in value]:
      there = ', '.join(map(repr, value)) or 'no keys'
      raise UserError(f'{place} lacks {", ".join(map(repr, missing))}; it has {there:.200}')
    for key, inner in form.items():
      check_form(value[key], inner, f'{place}: {key!r}')
  elif isinstance(form, list):
    check_form(value, list, place)
    for i, item in enumerate(value):
      check_form(item, form[0], f'{place}[{i}]')
  elif not _is_a(value, form):
    raise UserError(f'{place} is {_shown(value)}, not {_named(form)}')


def is_number(value: Any) -> bool:
  """Whether it is a number, small enough for a float."""
  return _is_a(value, NUMBER)


def _is_a(value, form):
  kinds = form if isinstance(form, tuple) else (form,)
  if isinstance(value, bool):
    return bool in kinds
  return isinstance(value, kinds) and not (isinstance(value, int) and abs(value) > _MOST)


_NAMES = {dict: 'a JSON object', list: 'a list', str: 'a text', int: 'a whole number', float: 'a number', NUMBER: 'a number',
          bool: 'true or false', type(None): 'null'}


def _named(form):
  return _NAMES[form] if form in _NAMES else ' or '.join(map(_named, form))


def _shown(value):
  return _named(type(value)) if isinstance(value, (dict, list)) else f'{value!r:.80}'
