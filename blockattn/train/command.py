"""The command line of the trainers: `--config FILE[:ARG] --workdir DIR [--overrides FILE] [--config.KEY=VALUE ...]`."""

import argparse
import ast
import contextlib
import difflib
import functools
import itertools
import json
import operator
import os
import pathlib
import platform
import re
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

import jax
from flax import traverse_util
from ml_collections import ConfigDict

from blockattn import checkpoint, compiled, disk, errors, multihost, options as options_lib, tree
from blockattn.errors import UserError
from blockattn.kernels import api
from blockattn.train import job, workdir as workdir_lib

_OVERRIDE = re.compile(r'--?(no)?config\.([^=]+)(?:=(.*))?', re.S)
HELP = frozenset(('--help', '-help', '-h', '--helpshort', '--helpfull'))


def quiet_libraries():
  """Keeps what libraries say in passing (orbax at every save, jax about absent TPUs) out of the progress line."""
  from absl import logging
  logging.set_verbosity(logging.WARNING)


def main(options_type: type, run, finished=job.finished):
  """Command line of a trainer.

  Args:
    options_type: the `Options` that it reads.
    run: (options, workdir) -> anything.
    finished: (options, workdir) -> what to say of a workdir with nothing left to do, '' of any other; before all that takes
      long.
  """
  from absl import app
  argv = sys.argv[1:]
  with _errors_as_a_line():
    if HELP & set(argv):
      print(help_text([arg for arg in argv if arg not in HELP], options_type))
      return
    config, rest = read_config(argv)
    args = _parser().parse_args(rest)
    if not args.workdir:
      raise UserError('--workdir is empty: name the folder of the run, for its checkpoints, metrics and config')
    if args.profile is not None:
      config.profile = args.profile

    def start(_):
      quiet_libraries()
      options = job.read(options_type, config)
      check_local(options)
      with multihost.joined(args.multihost):
        job.use_cpu_cores(options)
        compiled.keep()
        check_hosts(options, args.workdir)
        if jax.process_index() == 0:
          print(f'platform: {jax.default_backend()}, {jax.device_count()} devices\n'
                f'{api.choose(options.compute.impl, jax.devices()[0])}', flush=True)
        with workdir_lib.only_run_in(args.workdir):
          said = multihost.from_first('finished', finished(options, args.workdir))
          if said and jax.process_index() == 0:
            print(said, flush=True)
          elif not said:
            run(options, args.workdir)

    app.run(start, argv=sys.argv[:1])


def _parser() -> argparse.ArgumentParser:
  main_spec = getattr(sys.modules['__main__'], '__spec__', None)
  parser = errors.Parser(
      prog=f'python -m {main_spec.name}' if main_spec else None, add_help=False, allow_abbrev=False,
      usage='%(prog)s --config FILE[:ARG] --workdir DIR [--overrides FILE] [--config.KEY=VALUE ...]')
  add = parser.add_argument
  # The first two are taken by `read_config` before they come here.
  add('--config', metavar='FILE[:ARG]', help='config file, with an optional argument of its get_config')
  add('--overrides', metavar='FILE', help='values of the config, YAML or JSON, nested or with dotted keys; also the '
      'config.json of a run. What --config.KEY says goes before it')
  add('--workdir', metavar='DIR', required=True,
      help='folder of the run: checkpoints, metrics, the resolved config')
  add('--multihost', metavar='WHERE', help='one of several processes of a run: auto, or ADDRESS:PORT,N,I '
      '(where process 0 is reached, the number of processes, the number of this one)')
  add('--profile', metavar='FIRST:END', help='such as 10:15: writes a trace of these steps, END not included, '
      'into WORKDIR/profile; short for --config.profile')
  return parser


@contextlib.contextmanager
def _errors_as_a_line():
  try:
    yield
  except KeyboardInterrupt:
    print('Ctrl-C: ended; the same command starts again, and goes on from what stands in its --workdir, if anything does',
          file=sys.stderr, flush=True)
    _leave(errors.EXIT_INTERRUPTED)
  except Exception as error:
    line = errors.line_of(error)
    if line is None:
      raise
    print(f'error: {line}', file=sys.stderr, flush=True)
    if isinstance(error, checkpoint.NotSaved):
      _leave(errors.EXIT_MEND)
    sys.exit(errors.EXIT_MEND)


def _leave(code: int):
  """Ends the process without its threads, which would have the last words: tracebacks of what this one has said already."""
  sys.stdout.flush()
  os._exit(code)


def check_local(options):
  """Raises ValueError if a value of the config is a path on another machine; names the key."""
  for key, value in options_lib.flat(options_lib.as_json(options)).items():
    disk.check_local(f'config.{key}={one}' for one in (value if isinstance(value, list) else [value]))


def check_hosts(options, workdir):
  """In a run of several processes, checks that all run the same, before anything is loaded or compiled.

  Raises:
    ValueError: names what differs.
  """
  facts = {f'config.{key}': value for key, value in options_lib.flat(options_lib.as_json(options)).items()}
  multihost.check_equal('config', facts | {
      'workdir': str(workdir), 'git commit': workdir_lib.git_commit(), 'Python': platform.python_version(),
      'jax': jax.__version__})
  if multihost.is_started():   # the devices are asked for only now: hosts of different versions may fail over them
    multihost.check_equal('devices', {'local devices': jax.local_device_count(),
                                      'kind of device': jax.local_devices()[0].device_kind})


# The config that a command line speaks of.

def read_config(argv: Sequence[str]) -> tuple[Any, list[str]]:
  """(the locked ConfigDict that the arguments make, the arguments that are not about it).

  It is that of --config, with the values of the --overrides files, one after the other, and then those of --config.KEY,
  wherever they stand.

  Raises:
    FileNotFoundError: no such file.
    ValueError: a path is on another machine, the config file refuses its argument, a key does not exist (names the
      nearest), or a value is not of its type.
  """
  disk.check_local(argv)
  path, files, argv = take_files(argv)
  if path is None:
    near = difflib.get_close_matches('--config', [arg.partition('=')[0] for arg in argv], n=1)
    mistyped = f'{near[0]}: no such option; ' if near else ''
    raise UserError(f'{mistyped}--config is missing: give --config FILE[:ARG], such as configs/tiny.py')
  overrides, rest = _take_overrides(argv, _load([f'--config={path}']))
  config = _load([f'--config={path}', *overrides])
  said = [match[2] for match in map(_OVERRIDE.match, overrides) if match]
  for file in files:
    values = read_overrides(file, config)
    for key in [key for key in values if any(key == name or key.startswith(f'{name}.') for name in said)]:
      del values[key]
    with config.unlocked():
      config.update(traverse_util.unflatten_dict(values, sep='.'))
  return config, rest


def take_files(argv: Sequence[str]) -> tuple[str | None, list[str], list[str]]:
  """(value of --config, values of --overrides, all other arguments)."""
  path, files, rest, given = None, [], [], iter(argv)
  for arg in given:
    match = re.fullmatch(r'--?(config|overrides)(?:=(.*))?', arg, re.S)
    if match is None:
      rest.append(arg)
      continue
    value = next(given, None) if match[2] is None else match[2]
    if not value:
      raise UserError(f'{arg}: a file is missing behind it')
    path, files = (value, files) if match[1] == 'config' else (path, [*files, value])
  return path, files, rest


def _take_overrides(argv, config) -> tuple[list[str], list[str]]:
  """(overrides in the form --config.KEY=VALUE that config_flags takes, all other arguments)."""
  known, overrides, lists, rest, given = config.to_dict(), [], {}, [], iter(argv)
  for arg in given:
    match = _OVERRIDE.fullmatch(arg)
    if match is None:
      rest.append(arg)
      continue
    no, key, text = match.groups()
    _check_key(key, known, f'--config.{key}')
    kind = _type_of(config, key)
    if text is None and (no or kind is bool):
      text = 'false' if no else 'true'
    elif text is None:
      text = next(given, None)
    if text is None:
      raise UserError(f'{arg} lacks its value: {arg}=...')
    if kind is tuple:
      lists[key] = lists.get(key, ()) + read_list(text, texts=key.endswith('files'))
    else:
      overrides.append(f'--config.{key}={read_names(text) if kind is ConfigDict else text}')
  return overrides + [f'--config.{key}={value!r}' for key, value in lists.items()], rest


def _type_of(config, key: str) -> type:
  """Of a key with dots, also where no value is set."""
  *sections, name = key.split('.')
  section = functools.reduce(operator.getitem, sections, config)
  return section.get_type(name) if name in section else type(None)


def read_list(text: str, texts: bool = False) -> tuple:
  """'a.jsonl,more/' -> ('a.jsonl', 'more/'); '64,128' -> (64, 128).

  What is in brackets or quotes is read as Python reads it, which is how to write a text with a comma in it.

  Args:
    texts: what looks like a number is a text, too; a dict in braces is one.
  """
  try:
    value = ast.literal_eval(text)
  except (ValueError, SyntaxError):
    value = None
  value = tuple(value) if isinstance(value, (tuple, list)) else (value,)
  kinds = (str, dict) if texts else (str, int, float, tuple, list)
  if all(isinstance(part, kinds) and not isinstance(part, bool) for part in value):
    return value
  return tuple(part.strip() for part in text.split(',') if part.strip())


def read_names(text: str) -> str:
  """`without_dots` of a text that is a dict: "{'a.b': 1}" -> "{'a': {'b': 1}}"."""
  try:
    value = ast.literal_eval(text)
  except (ValueError, SyntaxError):   # whoever takes it says so
    return text
  return repr(without_dots(value))


def without_dots(value: Any) -> Any:
  """A value as a ConfigDict holds it, which has no names with dots: they are dicts within dicts.

  Raises:
    ValueError: one name goes on where another one ends.
  """
  if not isinstance(value, dict):
    return value
  names = options_lib.flat(value)
  _check_apart(names, str(value))
  return traverse_util.unflatten_dict(names, sep='.')


def _check_apart(names, said):
  for name in names:
    if longer := next((other for other in names if other.startswith(f'{name}.')), None):
      raise UserError(f'{said}: a config holds {name!r} or {longer!r}, not both; columns of both kinds are given in an '
                      'entry of config.data.files')


def _load(args):
  """The ConfigDict of `--config=FILE --config.KEY=VALUE ...`; errors as of `read_config`."""
  from absl import flags
  from ml_collections import config_flags
  argv, values = ['', *args], flags.FlagValues()
  flag = config_flags.DEFINE_config_file('config', lock_config=True, flag_values=values, sys_argv=argv)
  try:
    values(argv)
  except flags.Error as error:   # also of a get_config that raised, with its traceback as text
    text = str(error).strip()
    if 'Traceback' not in text:
      raise UserError(f'--{" ".join(text.removeprefix("flag ").removeprefix("--").split())}') from None
    kind, _, said = text.splitlines()[-1].partition(': ')
    if kind.rpartition('.')[2] not in ('ValueError', 'UserError'):
      raise   # no text for the user: all of it is needed
    raise UserError(said) from None
  if not isinstance(flag.value, ConfigDict):
    raise FileNotFoundError(f'{args[0].removeprefix("--config=").partition(":")[0]}: no such config file')
  return flag.value


def _check_key(name, config: dict, said: str):
  """Raises ValueError if the config has no such key."""
  known = traverse_util.flatten_dict(config, keep_empty_nodes=True, sep='.')
  if name in known or any(key.startswith(f'{name}.') for key in known):
    return
  same = [key for key in known if key.rsplit('.')[-1] == name.rsplit('.')[-1]]   # the right key of the wrong section
  hint = f'did you mean {same[0]!r}?' if len(same) == 1 else tree.did_you_mean(name, known)
  raise UserError(f'{said}: no such key; {hint}')


def read_overrides(path: str, config) -> dict[str, Any]:
  """{dotted key: value} of a file of --overrides, checked against the config.

  Raises:
    FileNotFoundError: no such file.
    ValueError: neither YAML nor JSON, no mapping, a key that does not exist, or a value of another type than the config's.
  """
  import yaml
  file, known = pathlib.Path(path).expanduser(), config.to_dict()
  if not file.is_file():
    raise FileNotFoundError(f'--overrides={path}: no such file')
  try:
    text = file.read_text(encoding='utf-8')
    values = json.loads(text) if text.lstrip().startswith('{') else yaml.safe_load(text)
  except (ValueError, RecursionError, yaml.YAMLError) as error:
    raise UserError(f'{path}: neither YAML nor JSON: {" ".join(str(error).split())}') from error
  if not isinstance(values, dict):
    raise UserError(f'{path}: give keys and values, as in `optim: {{lr: 0.001}}` or `optim.lr: 0.001`')
  now = traverse_util.flatten_dict(known, keep_empty_nodes=True, sep='.')
  values = {key: _tuples(value) for key, value in options_lib.flat(values).items()}
  _check_apart(values, path)
  for key, value in values.items():
    above = itertools.accumulate(key.split('.')[:-1], '{}.{}'.format)
    if any(now.get(name) is traverse_util.empty_node for name in above):   # it says nothing of its keys, as model.fields
      continue
    _check_key(key, known, f'{path}: {key}')
    if value is not None or now.get(key) is not None:   # else it stays unset
      values[key] = _like(_type_of(config, key), value, f'{path}: {key}')
  return values


def _tuples(value):
  return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _like(kind, value, said):
  """The value, if it is of this type."""
  if kind is float and not isinstance(value, bool):
    with contextlib.suppress(TypeError, ValueError):   # YAML reads 1e-4 as a text
      return float(value)
  if type(value) is not kind:
    raise UserError(f'{said}={value!r}; this key takes {kind.__name__}')
  return value


# --help

def help_text(argv: Sequence[str], options_type: type) -> str:
  """The options, and every key of the config with its value and what it means: of --config, else of all that the trainer
  reads."""
  path, said = take_files(argv)[0], options_lib.all_docs(options_type)
  values = _load([f'--config={path}']).to_dict() if path else options_lib.defaults(options_type)
  values = traverse_util.flatten_dict(values, keep_empty_nodes=True, sep='.')
  order, groups = {key: number for number, key in enumerate(said)}, {}
  at = lambda key: order.get(key, order.get(key.rpartition('.')[0], len(order)))
  for key in sorted(values, key=lambda key: ('.' in key, at(key))):
    groups.setdefault(key.rpartition('.')[0], []).append(key)
  lines = [_parser().format_help(), f'keys of {path or "a config"}, each given as --config.KEY=VALUE; lists with commas:']
  for group, keys in groups.items():
    lines += ['', f'  {group or "the run"}{f": {said[group]}" if said.get(group) else ""}']
    lines += [_described(f'{key}={shown(values[key])}', said.get(key, '')) for key in keys]
  return '\n'.join(lines)


def _described(pair: str, said: str) -> str:
  indent = ' ' * 49
  text = textwrap.fill(said, 125, initial_indent=indent, subsequent_indent=indent)
  return f'    {pair}'.ljust(49) + text[49:] if len(pair) <= 44 else f'    {pair}\n{text}'.rstrip()


def shown(value) -> str:
  if value is traverse_util.empty_node:
    return '{}'
  if isinstance(value, tuple) and not any(isinstance(part, tuple) for part in value):
    return ','.join(map(str, value))
  return str(value) if str(value) == str(value).strip() else repr(value)
