"""What every config shares. A config file's `get_config(arg)` starts from `base(trainer)`."""

import dataclasses

import ml_collections
from ml_collections import config_dict

from blockattn import options, tree
from blockattn.errors import UserError
from blockattn.train import job


def parse_arg(arg, **defaults):
  """'model=qwen3_4b,ctx=32768' -> values of the types of `defaults`.

  Raises:
    ValueError: a name that is not among the defaults, or a value that is not of its type.
  """
  values = dict(defaults)
  for part in filter(None, (arg or '').split(',')):
    name, equals, value = part.partition('=')
    if name not in defaults:
      raise UserError(f'config argument {name!r}: {tree.did_you_mean(name, defaults)}')
    kind = type(defaults[name])
    try:
      values[name] = _BOOLS[value.lower()] if kind is bool else kind(value)
    except (KeyError, ValueError):
      raise UserError(f'config argument {part!r}: {name} takes {kind.__name__}') from None
    if kind is not bool and not equals:
      raise UserError(f'config argument {name!r} needs a value: {name}=...')
  return ml_collections.ConfigDict(values)


_BOOLS = {'': True, '1': True, 'true': True, '0': False, 'false': False}


def base(trainer):
  """The keys that a trainer reads, one of job.TRAINERS, with the defaults of its `Options`: what `python -m
  blockattn.train.TRAINER --help` lists. Locked: a config file that sets a key which does not exist is an error."""
  return section(job.module(trainer).Options).lock()


def section(cls):
  """A ConfigDict of the keys of a dataclass."""
  config = ml_collections.ConfigDict()
  for name, kind in options.keys(cls).items():
    if dataclasses.is_dataclass(kind):
      config[name] = section(kind)
    else:
      default = options.default(cls, name)
      config[name] = config_dict.placeholder(kind) if default is None else default
  return config
