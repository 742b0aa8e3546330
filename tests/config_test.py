"""Every shipped config, its arguments, and what a slip on the command line says."""

import importlib
import json
import pathlib
import re
import types

import pytest

from blockattn.train import command, distill, finetune, segment, setup
from configs import common

ROOT = pathlib.Path(__file__).resolve().parents[1]
NAMES = sorted(path.stem for path in (ROOT / 'configs').glob('*.py') if 'def get_config(' in path.read_text())


def module(name) -> types.ModuleType:
  return importlib.import_module(f'configs.{name}')


def documented_args(name) -> list[str]:
  """The arguments that a config's docstring shows: `configs/x.py:ARG` and get_config('ARG')."""
  text = module(name).__doc__
  return ['', *re.findall(rf'configs/{name}\.py:([^\s`]+)', text), *re.findall(r"get_config\('([^']+)'\)", text)]


CASES = [(name, arg) for name in NAMES for arg in dict.fromkeys(documented_args(name))]


def test_configs_are_found():
  assert {'tiny', 'tiny_teacher', 'distill', 'finetune'} <= set(NAMES)
  assert ('tiny', 'baseline') in CASES and len([case for case in CASES if case[0] == 'distill']) > 1


@pytest.mark.parametrize('name, arg', CASES)
def test_a_config_parses(name, arg):
  """It becomes the options of its trainer, and JSON."""
  config = module(name).get_config(arg)
  assert json.loads(config.to_json_best_effort())['seed'] == config.seed
  trainers = {'distill': distill, 'finetune': finetune, 'segment': segment}
  part, trainer = next((part, trainer) for part, trainer in trainers.items() if part in config)
  assert config.is_locked and config[part].is_locked
  assert trainer.options_of(config).accumulate == config.accumulate
  setup.optim_config(config)
  setup.loop_config(config, name)
  if not config.model.source:
    setup.architecture(config.model)


@pytest.mark.parametrize('name', NAMES)
def test_a_config_starts_without_an_argument(name):
  assert module(name).get_config().to_dict() == module(name).get_config('').to_dict()


@pytest.mark.parametrize('name', NAMES)
def test_an_unknown_argument(name):
  with pytest.raises(ValueError, match="config argument 'zebra': known:"):
    module(name).get_config('zebra=1')


@pytest.mark.parametrize('name, arg, nearest', [('tiny', 'basline=1', 'baseline'), ('distill', 'mdoel=x', 'model'),
                                                ('finetune', 'mod=full', 'mode'),
                                                ('distill', 'model=qwen3_4', 'qwen3_4b')])
def test_a_mistyped_argument_names_the_nearest(name, arg, nearest):
  with pytest.raises(ValueError, match=f"did you mean '{nearest}'"):
    module(name).get_config(arg)


def test_a_key_that_does_not_exist_cannot_be_set():
  config = common.base()
  for section in (common.add_distill, common.add_finetune):
    section(config)
  for node, key in ((config, 'step'), (config.optim, 'lrr'), (config.distill.weights, 'frm'), (config.finetune, 'mod')):
    with pytest.raises(AttributeError, match='[Dd]id you mean'):
      setattr(node, key, 1)


# parse_arg


def test_values_have_the_types_of_their_defaults():
  defaults = dict(model='a', ctx=8, rate=0.5, chat=False)
  assert common.parse_arg('', **defaults).to_dict() == defaults == common.parse_arg(None, **defaults).to_dict()
  got = common.parse_arg('ctx=4096,chat,rate=1,model=b=c', **defaults).to_dict()
  assert got == dict(model='b=c', ctx=4096, rate=1.0, chat=True) and isinstance(got['rate'], float)


@pytest.mark.parametrize('text, value', [('chat', True), ('chat=1', True), ('chat=True', True), ('chat=false', False),
                                         ('chat=0', False)])
def test_a_switch(text, value):
  assert common.parse_arg(text, chat=not value).chat is value


@pytest.mark.parametrize('text, message', [
    ('ctx=4k', "'ctx=4k': ctx takes int"), ('ctx=1.5', 'ctx takes int'), ('rate=high', 'rate takes float'),
    ('chat=ture', "'chat=ture': chat takes bool"), ('model', "config argument 'model' needs a value: model=..."),
    ('cxt=1', "'cxt': did you mean 'ctx'"), ('ctx', "'ctx': ctx takes int")])
def test_a_value_of_another_type(text, message):
  with pytest.raises(ValueError, match=message):
    common.parse_arg(text, model='a', ctx=8, rate=0.5, chat=False)


# The command line.


@pytest.mark.parametrize('override, message', [
    ('--config.optim.lrr=1', "--config.optim.lrr: no such key; did you mean 'optim.lr'?"),
    ('--config.lr=1', "did you mean 'optim.lr'?"), ('-config.optimm.lr=1', "did you mean 'optim.lr'?"),
    ('--config.stepps=1', "did you mean 'steps'?"), ('--noconfig.data.chatt', "did you mean 'data.chat'?"),
    ('--config.distil.weights.fomr=relu', "did you mean 'distill.weights.form'?"),
    ('--config.optim.lr.x=1', "did you mean 'optim.lr'?"),
    ('--config.zebra=1', 'known: accumulate, batch, .*weights.source')])
def test_a_mistyped_override_names_the_nearest_key(override, message):
  with pytest.raises(ValueError, match=message):
    command.check_overrides(['x', f'--config={ROOT}/configs/tiny.py', '--workdir=w', '--config.steps=3', override])


def test_overrides_that_exist():
  command.check_overrides(['x', '--config', f'{ROOT}/configs/tiny.py', '--workdir', 'w', '--config.optim.lr=1',
                         '--config.optim.b1', '0.5', '--noconfig.data.chat', '--config.mesh', '{}',
                         '--config.data.files=a,b', '--config.data.pages.members=(1, 2)', '--config.rules[0]=x'])
  command.check_overrides(['x', '--workdir=w'])   # no --config: absl says so


def test_a_config_file_that_cannot_be_used():
  with pytest.raises(FileNotFoundError, match='/nowhere/x.py: no such config file'):
    command.check_overrides(['x', '--config=/nowhere/x.py'])
  with pytest.raises(ValueError, match=r"^config argument 'basline': did you mean 'baseline'\?$"):
    command.check_overrides(['x', f'--config={ROOT}/configs/tiny.py:basline=1'])
