"""Every shipped config, its arguments, and what a slip on the command line says."""

import contextlib
import importlib
import json
import math
import pathlib
import re
import sys
import types

import pytest
from flax import traverse_util

from blockattn import errors, mesh, options
from blockattn.models import sizes
from blockattn.train import command, distill, finetune, job, segment, workdir as workdir_lib
from configs import common
from launch import sweep

ROOT = pathlib.Path(__file__).resolve().parents[2]
TINY = f'--config={ROOT}/configs/tiny.py'
TRAINERS = {'distill': distill, 'finetune': finetune, 'segment': segment}
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
  part = job.trainer_of(config)
  assert config.is_locked and config[part].is_locked
  read = TRAINERS[part].read(config)
  assert options.as_json(read) == json.loads(config.to_json_best_effort())
  if not config.model.source:
    job.architecture(read.model)


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
  config = common.base('distill')
  for node, key in ((config, 'step'), (config.optim, 'lrr'), (config.distill.weights, 'frm'), (config.lora, 'rnk')):
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
    command.read_config([TINY, '--workdir=w', '--config.steps=3', override])


@pytest.mark.parametrize('args, message', [
    (['--workdir=w'], '--config is missing: give --config FILE'), (['--config'], '--config: a file is missing behind it'),
    ([TINY, '--config.optim.lr'], 'lacks its value'), ([TINY, '--config.steps=1.5'], "^--config.steps=1.5: .*'1.5'$"),
    ([f'{TINY}:basline=1'], r"^config argument 'basline': did you mean 'baseline'\?$")])
def test_a_command_line_that_cannot_be_used(args, message):
  with pytest.raises(ValueError, match=message):
    command.read_config(args)


def test_what_the_command_line_says():
  """In whatever order and form; what is not about the config is handed back."""
  config, rest = command.read_config([
      '--config.optim.lr=1', '--config.optim.b1', '0.5', '--config.data.chat', '--noconfig.data.strict', '--workdir', 'w',
      '--config', TINY.partition('=')[2], '-config.steps=7', '--config.blocks.sink_text=a,b'])
  assert (config.optim.lr, config.optim.b1, config.data.chat, config.data.strict) == (1.0, 0.5, True, False)
  assert config.steps == 7 and config.blocks.sink_text == 'a,b' and rest == ['--workdir', 'w'] and config.is_locked


@pytest.mark.parametrize('key, texts, value', [
    ('data.files', ['a.jsonl,b.jsonl'], ('a.jsonl', 'b.jsonl')), ('data.files', ['a.jsonl, more/'], ('a.jsonl', 'more/')),
    ('data.files', ['/x/my data/train.jsonl'], ('/x/my data/train.jsonl',)), ('data.files', ['2024,7'], ('2024', '7')),
    ('data.files', ['a', 'b,c'], ('a', 'b', 'c')), ('data.files', ["'a,b','c'"], ('a,b', 'c')), ('data.files', [''], ()),
    ('lora.targets', ['q,k'], ('q', 'k')), ('lora.targets', ["('q', 'v')"], ('q', 'v')), ('lora.targets', ['q'], ('q',)),
    ('compute.tiles', ['64,128'], (64, 128)), ('data.pages.members', ['(1, 2)'], (1, 2)),
    ('data.pages.members', ['1', '2'], (1, 2)),
    ('teacher.rules', ["(('batch', ('data', 'fsdp')), ('mlp', None))"], (('batch', ('data', 'fsdp')), ('mlp', None)))])
def test_a_list_on_the_command_line(key, texts, value):
  config, _ = command.read_config([TINY, *(f'--config.{key}={text}' for text in texts)])
  assert options.flat(config.to_dict())[key] == value
  again, _ = command.read_config([TINY, f'--config.{key}={sweep.value_text(value)}'])   # as a sweep writes it
  assert options.flat(again.to_dict())[key] == value


def test_a_file_of_overrides(tmp_path):
  file, other, run = tmp_path / 'a.yaml', tmp_path / 'b.json', tmp_path / 'config.json'
  file.write_text('optim: {lr: 1e-3, warmup: 3}\ndata.files: [a, b c]\nsteps: 7\nmodel.fields.vocab: 9\n')
  other.write_text('{"optim": {"warmup": 4}}')
  config, _ = command.read_config(['--config.steps=8', f'--overrides={file}', '--overrides', str(other), TINY])
  assert (config.optim.lr, config.optim.warmup, config.steps) == (1e-3, 4, 8)   # the command line has the last word
  assert config.data.files == ('a', 'b c') and config.model.fields.vocab == 9 and config.is_locked
  run.write_text(config.to_json_best_effort())
  assert command.read_config([TINY, f'--overrides={run}'])[0].to_dict() == config.to_dict()
  for text, message in (('optim: {lrr: 1}', "a.yaml: optim.lrr: no such key; did you mean 'optim.lr'"),
                        ('steps: many', "a.yaml: steps='many'; this key takes int"),
                        ('[1, 2]', 'a.yaml: give keys and values'), ('a: [', 'a.yaml: neither YAML nor JSON')):
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
      command.read_config([TINY, f'--overrides={file}'])


def test_files_that_are_not_there():
  for args in (['--config=/nowhere/x.py'], [TINY, '--overrides=/nowhere/x.py']):
    with pytest.raises(FileNotFoundError, match='/nowhere/x.py: no such'):
      command.read_config(args)


@pytest.mark.parametrize('trainer', TRAINERS)
def test_help_shows_every_key_with_what_it_means(trainer):
  cls = TRAINERS[trainer].Options
  shown = [line.strip() for line in command.help_text([], cls).splitlines()]
  said = options.all_docs(cls)
  for key in options.flat(common.base(trainer).to_dict()):
    assert said[key], f'{key} is not said of in the Attributes of its dataclass'
    assert any(line.startswith(f'{key}=') for line in shown), key
  assert [line for line in shown if line.startswith('optim.clip=1.0 ') and line.endswith('0: never')]
  own = command.help_text([f'--config={ROOT}/configs/tiny.py'], distill.Options)
  assert 'data.files=' in own and 'optim.lr=0.0003' in own and '--overrides FILE' in own


# Numbers.

def numeric_keys(config) -> dict:
  """{dotted key: value} of all numbers of a config, and of all lists of numbers."""
  is_number = lambda value: isinstance(value, (int, float)) and not isinstance(value, bool)
  return {key: value for key, value in options.flat(config.to_dict()).items()
          if is_number(value) or (isinstance(value, tuple) and value and all(map(is_number, value)))}


# What may be -1. Nothing may be NaN or infinite.
MAY_BE_MINUS_1 = {f'mesh.{axis}' for axis in mesh.AXES}


@pytest.mark.parametrize('name, arg', [('distill', ''), ('finetune', ''), ('segment', ''), ('segment_tiny', ''),
                                       ('tiny', ''), ('tiny', 'baseline'), ('tiny_teacher', '')])
def test_every_number_has_a_range(name, arg):
  config = module(name).get_config(arg)
  with config.unlocked():
    config.compute.tiles = (64, 64)
    config.compute.far_queries = 64
    if 'segment' in config.data:
      config.data.segment.update(target=64, minimum=32, maximum=128)
  trainer = TRAINERS[job.trainer_of(config)]
  trainer.read(config)
  keys = numeric_keys(config)
  assert len(keys) > 40
  for key, value in keys.items():
    for bad in (math.nan, math.inf, -math.inf, -1, 10 ** 30):
      if bad == -1 and key in MAY_BE_MINUS_1 or bad == 10 ** 30 and key not in BOUNDED:
        continue
      section, last = config, key.rpartition('.')[2]
      for part in key.split('.')[:-1]:
        section = section[part]
      with config.ignore_type():
        section[last] = (bad,) * len(value) if isinstance(value, tuple) else bad
      with pytest.raises(ValueError) as refused:
        trainer.read(config)
      assert f'config.{key}' in str(refused.value) and '\n' not in str(refused.value), (key, bad, refused.value)
      with config.ignore_type():
        section[last] = value
  trainer.read(config)


# Numbers that would be computed with for ever, or be read as others.
BOUNDED = {'seed', 'steps', 'batch', 'blocks.sinks', 'blocks.tails', 'blocks.seam', 'blocks.align', 'data.length',
           'data.max_blocks', 'distill.drop_rate', 'optim.final_lr', 'optim.b1', 'optim.b2', 'optim.warmup',
           'data.segment.pages', 'data.pages.renamed', 'segment.draw.join'}


@pytest.mark.parametrize('name, changes, message', [
    ('tiny', {'steps': 0}, 'config.steps=0; give a number from 1 to'), ('tiny', {'compute.tiles': (64,)}, 'two numbers'),
    ('tiny', {'compute.dtype': 'float8'}, "config.compute.dtype='float8'; choose one of float32, bfloat16"),
    ('tiny', {'teacher.dtype': 'int4'}, "config.teacher.dtype='int4'; choose one of float32, bfloat16, int8"),
    ('tiny', {'optim.warmup': 150}, 'config.optim.warmup=150; give a number from 0 below 150, which is config.steps'),
    ('tiny', {'data.pages.members': (3, 2)}, 'config.data.pages.members=2; give a number from 3'),
    ('segment', {'segment.export_dtype': 'foo'}, "config.segment.export_dtype='foo'; choose one of float32, bfloat16"),
    ('segment_tiny', {'model.fields.heads': 0}, 'config.model.fields.heads=0; give a number from 1')])
def test_a_value_that_no_trainer_takes(name, changes, message):
  config = module(name).get_config()
  config.update_from_flattened_dict(changes)
  with pytest.raises(ValueError, match=message):
    TRAINERS[job.trainer_of(config)].read(config)


# What a user is told.


def raised(call) -> BaseException:
  with pytest.raises(BaseException) as caught:
    call()
  return caught.value


def test_what_a_user_can_mend_is_one_line(tmp_path):
  (tmp_path / 'file').write_text('')
  facts = lambda: workdir_lib.save_run_facts(tmp_path, finetune.read(common.base('finetune')))
  facts()
  (tmp_path / 'checkpoints' / '1').mkdir(parents=True)
  (tmp_path / 'config.json').write_bytes(b'{"a": "\xff')
  for call, line in (
      (lambda: (tmp_path / 'file' / 'x').mkdir(), f'{tmp_path}/file/x: Not a directory; repair it, or name another path'),
      (lambda: (tmp_path / 'nothing').read_text(), f'{tmp_path}/nothing: No such file or directory; '),
      (lambda: (tmp_path / ('x' * 300)).touch(), 'File name too long; '),
      (facts, f'{tmp_path}/config.json is no UTF-8 text: '),
      (lambda: job.architecture(job.ModelOptions()), 'config.model.fields lacks family'),
      (lambda: sizes.get('qwen'), "no model size 'qwen'; ")):
    assert line in errors.line_of(raised(call))
  for call in (lambda: int('x'), lambda: {}['x'], lambda: 1 / 0):
    assert errors.line_of(raised(call)) is None   # ours to repair: the traceback is needed


@pytest.mark.parametrize('args, said', [
    ([TINY, '--workdirr', 'x'], '--workdirr: no such option; did you mean --workdir?'),
    ([TINY.replace('config', 'confg', 1), '--workdir', 'x'], '--confg: no such option; --config is missing')])
def test_a_mistyped_option_is_named(args, said, monkeypatch, capsys):
  monkeypatch.setattr(sys, 'argv', ['distill', *args])
  with pytest.raises(SystemExit) as ended:
    command.main(distill.Options, distill.run)
  err = capsys.readouterr().err
  assert ended.value.code == 2 and said in err and err.count('\n') == 1


def test_ctrl_c_before_the_first_step_is_one_line(monkeypatch, capsys):
  def stop(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr(command, 'read_config', stop)
  monkeypatch.setattr(command, '_leave', lambda code: (_ for _ in ()).throw(SystemExit(code)))
  with pytest.raises(SystemExit, match='130'):
    command.main(distill.Options, None)
  assert capsys.readouterr().err.startswith('Ctrl-C: ended; the same command starts again')


def test_only_what_is_raised_for_the_user_is_one_line():
  """A ValueError or a message without a number that other code raises keeps its traceback."""
  def failing(error):
    raise error

  for error, line in ((errors.UserError('mend it'), 'mend it'), (FileNotFoundError('name another'), 'name another'),
                      (ValueError('of ours'), None), (OSError('of a library'), None), (KeyError('x'), None)):
    assert errors.line_of(raised(lambda error=error: failing(error))) == line


ODD = {int: (-1, 0, 1, 2 ** 31, 2 ** 70), float: (-1.0, 0.0, math.nan, math.inf, 1e300), str: ('', 'x', '../y', 'a,b'),
       tuple: ((), ('x',), (1,), (1, 2), (2, 1), (-1, 2), (0.5, 2), ('batch', 'data'), (('embed',),), ((1, 2),),
               (('embed', 'x', 'y'),), (('embed', 1),)),
       type(None): (-1, 0, 1, True, (1,), (0, 0), ('a',)), bool: (True, False)}


@pytest.mark.parametrize('trainer', TRAINERS)
def test_a_value_is_taken_or_refused_in_one_line(trainer):
  """Of every key."""
  for key, now in traverse_util.flatten_dict(common.base(trainer).to_dict(), sep='.').items():
    for value in ODD[type(now)]:
      config = common.base(trainer)
      config.update_from_flattened_dict({'model.source': 'folder', 'optim.warmup': 0})
      with contextlib.suppress(TypeError):   # another type than the config's
        config.update_from_flattened_dict({key: value})
      with contextlib.suppress(errors.UserError):
        job.abstract_placement(TRAINERS[trainer].read(config), devices=1)
