"""Options as frozen dataclasses, and configs as trees with the same keys.

A config (an ml_collections.ConfigDict, see configs/common.py) is made from the dataclasses that a trainer reads, and read
back into them once, at the trainer's door. So a key's default stands in its dataclass, and what it means in the
`Attributes:` of that docstring, from where --help has it.
"""

import dataclasses
import functools
import inspect
import json
import re
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from blockattn import tree
from blockattn.errors import UserError


def not_a_key(**default) -> Any:
  """A field that a config does not hold there: whoever reads the config gives it, see `read`."""
  return dataclasses.field(metadata={'key': False}, **default)


@functools.cache
def keys(cls: type) -> dict[str, type]:
  """{name: type} of the fields that a config holds; of `int | None` the int."""
  hints = typing.get_type_hints(cls)
  return {field.name: _certain(hints[field.name]) for field in dataclasses.fields(cls) if field.metadata.get('key', True)}


def _certain(kind):
  if isinstance(kind, types.UnionType):
    kind = next(part for part in typing.get_args(kind) if part is not type(None))
  return typing.get_origin(kind) or kind


def default(cls: type, name: str) -> Any:
  """The default of a field that is no section."""
  field = cls.__dataclass_fields__[name]
  return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def defaults(cls: type) -> dict[str, Any]:
  """A nested dict of the defaults of all keys."""
  return {name: defaults(kind) if dataclasses.is_dataclass(kind) else default(cls, name) for name, kind in keys(cls).items()}


@functools.cache
def docs(cls: type) -> dict[str, str]:
  """{field: what the `Attributes:` of its class, or of one that it inherits from, say of it}."""
  said = {}
  for one in reversed(cls.__mro__):
    listed = inspect.cleandoc(one.__dict__.get('__doc__') or '').partition('Attributes:\n')[2].partition('\n\n')[0]
    for names, text in re.findall(r'^  (\w+(?:, \w+)*): (.*(?:\n    .*)*)', listed, re.M):
      said |= dict.fromkeys(names.split(', '), ' '.join(text.split()))
  return said


def all_docs(cls: type, prefix: str = '') -> dict[str, str]:
  """{dotted key: what it means} of a config, sections included, in the order of the fields."""
  said = {}
  for name, kind in keys(cls).items():
    said[f'{prefix}{name}'] = docs(cls).get(name, '')
    if dataclasses.is_dataclass(kind):
      said |= all_docs(kind, f'{prefix}{name}.')
  return said


def read(cls: type, config: Mapping[str, Any], where: str = 'config', /, **given) -> Any:
  """The dataclass that a config, or a section of one, says; its own checks are made on the way.

  Args:
    where: the config's name, for errors.
    given: values of fields that are no keys, by name, of this dataclass and of all within it.

  Raises:
    ValueError: a key is missing, or is one that this dataclass does not have; or a value is refused.
  """
  known = keys(cls)
  for name in config:
    if name not in known:
      raise UserError(f'{where}.{name} is not read by this trainer; {tree.did_you_mean(name, known)}')
  for name in known:
    if name not in config:
      raise UserError(f'{where}.{name} is missing; make the config with configs.common.base')
  values = {name: given[name] for name in cls.__dataclass_fields__ if name not in known and name in given}
  for name, kind in known.items():
    inner = dataclasses.is_dataclass(kind)
    values[name] = read(kind, config[name], f'{where}.{name}', **given) if inner else _plain(config[name])
  return cls(**values)


def _plain(value):
  """Tuples in place of lists, a dict in place of a ConfigDict."""
  if isinstance(value, (list, tuple)):
    return tuple(map(_plain, value))
  return {name: _plain(x) for name, x in value.items()} if hasattr(value, 'items') else value


def as_json(options: Any) -> dict[str, Any]:
  """The config that options were read from, as config.json holds it."""
  return _json(_tree(options))


def default_json(cls: type) -> dict[str, Any]:
  """`as_json` of the defaults of all keys."""
  return _json(defaults(cls))


def _json(nested):
  return json.loads(json.dumps(nested), parse_constant=str)   # JSON has no infinity


def _tree(value):
  return {name: _tree(getattr(value, name)) for name in keys(type(value))} if dataclasses.is_dataclass(value) else value


def different(configs: Sequence[Mapping[str, Any]]) -> list[str]:
  """The dotted keys, sorted, in which flat configs differ; one that some lack is one of them."""
  return [key for key in sorted(set().union(*configs)) if len({json.dumps(config.get(key)) for config in configs}) > 1]


def flat(nested: Any, prefix: str = '') -> dict[str, Any]:
  """{'optim.lr': 0.1} of {'optim': {'lr': 0.1}}."""
  if not isinstance(nested, dict):
    return {prefix[:-1]: nested}
  return {k: v for key, value in nested.items() for k, v in flat(value, f'{prefix}{key}.').items()}
