"""tools.show on every config, on shapes alone, and the configs of published models."""

import importlib
import json
import os
import pathlib
import subprocess
import sys

import hf_cases
import pytest

from blockattn.hf import config as hf_config
from blockattn.models import sizes, spec, transformer
from blockattn.train import job
from configs import distill, finetune
from tools import show

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIGS = sorted(path.stem for path in (ROOT / 'configs').glob('*.py')
                 if path.stem not in ('__init__', 'common', 'variants'))


def qwen(**mesh):
  config = distill.get_config('model=qwen3_4b,ctx=32768')
  config.mesh.update(mesh)
  return config


def describe(config, devices, device=None, **assumed):
  return show.describe(job.options_of(config), devices, device, **assumed)


@pytest.mark.parametrize('name', CONFIGS)
def test_every_config_can_be_shown(name, tmp_path):
  config = importlib.import_module(f'configs.{name}').get_config()
  if config.model.source and not config.model.size:   # a model's folder: its config.json is all that is read
    cfg, ids = hf_cases.MODELS['qwen3_tied'], {'bos_token_id': None, 'eos_token_id': 0, 'pad_token_id': None}
    (tmp_path / 'config.json').write_text(json.dumps(hf_config.to_dict(cfg, 'float32', ids)))
    config.model.source = str(tmp_path)
  shown = describe(config, devices=1)
  count = spec.count(show.build(job.options_of(config), 1, 'cpu').specs)
  assert shown['total'] == {'count': count, 'bytes': 4 * count}
  assert shown['per_device']['parameters'] == 4 * count
  assert shown['per_device']['optimizer'] == 8 * count + 8   # two moments; Adam's and the schedule's step counts
  json.dumps(shown)


def test_the_published_size_over_64_devices():
  shown = describe(qwen(), devices=64)
  memory, rows = shown['per_device'], shown['rows']
  assert shown['mesh'] == {'data': 1, 'fsdp': 64, 'tensor': 1, 'context': 1}
  assert shown['total']['count'] == 4_022_468_096   # "4.0B parameters" of its model card
  assert rows == {'per_device': 1, 'at_a_time': 1, 'tokens': 32768, 'student_tokens': 32768}
  assert memory['parameters'] == pytest.approx(4 * 4_022_468_096 / 64, rel=1e-2)   # norms are whole everywhere
  assert memory['teacher'] * 2 == memory['parameters'] == memory['gradients']
  inputs = 36 * rows['student_tokens'] * 2560 * 2   # of every layer: all that remat 'full' keeps of the layers
  assert inputs < memory['saved'] < 1.2 * inputs
  assert memory['loss: logits'] == 5 * 128 * 151936 * 4
  assert memory['cast'] == 0 and not shown['warnings']


def test_memory_follows_the_config():
  def memory(**keys):
    config = qwen()
    config.update_from_flattened_dict(keys)
    return describe(config, devices=8)['per_device']
  full, none = memory(), memory(**{'compute.remat': 'none'})
  offload = memory(**{'compute.remat': 'offload'})
  assert full['saved'] - offload['saved'] == 8 * 36 * 32768 * 2560 * 2   # what all layers of 8 rows start from
  assert {**offload, 'saved': 0, 'total': 0} == {**full, 'saved': 0, 'total': 0}
  dots, slices = memory(**{'compute.remat': 'dots'}), memory(accumulate=8)
  assert full['saved'] < dots['saved'] < none['saved'] and none['cast'] > 0
  assert slices['saved'] * 8 == pytest.approx(full['saved']) and slices['gradients'] == 2 * full['gradients']
  tensor = memory(**{'mesh.tensor': 4})
  assert tensor['parameters'] == pytest.approx(full['parameters'], rel=1e-2)
  assert tensor['loss: head'] < full['loss: head'] / 2


def test_rows_that_are_cut_cost_a_device_its_part():
  """And with remat 'none' the keys and values of the others."""
  def memory(context, remat):
    config = qwen(data=1, fsdp=-1, context=context)
    config.update_from_flattened_dict({'compute.remat': remat, 'batch': 8, 'accumulate': context})   # one row at a time
    return describe(config, devices=8)['per_device']
  whole, half = memory(1, 'full'), memory(2, 'full')
  for row in ('saved', 'hidden'):
    assert half[row] == pytest.approx(whole[row] / 2, rel=1e-3), row
  kept = 36 * 2 * 8 * 128 * (32768 // 2) * 2   # layers, keys and values, heads, width, tokens, bytes
  assert memory(2, 'none')['saved'] - memory(1, 'none')['saved'] / 2 == pytest.approx(kept, rel=0.02)


def test_a_teacher_takes_the_room_that_its_config_says():
  def memory(**keys):
    config = qwen()
    config.update_from_flattened_dict(keys)
    return describe(config, devices=8)['per_device']
  plain, small, stored = memory(), memory(**{'teacher.dtype': 'int8'}), memory(**{'teacher.logits': 'taught/x'})
  assert small['teacher'] == pytest.approx(plain['teacher'] / 2, rel=0.01)   # bytes, and a scale per output channel
  whole = memory(**{'teacher.rules': (('embed', None),)})
  assert whole['teacher'] == pytest.approx(8 * plain['teacher'], rel=1e-2) and whole['parameters'] == plain['parameters']
  assert stored['teacher'] == 0 and stored['batch'] > plain['batch']
  assert stored['loss: logits'] == plain['loss: logits'] * 3 / 5


def test_another_teacher_takes_its_own_room_and_operations():
  def shown(**keys):
    config = distill.get_config('model=qwen3_0_6b,ctx=4096')
    config.update_from_flattened_dict(keys)
    return describe(config, devices=8)
  large = {'teacher.source': 'Qwen/Qwen3-8B', 'teacher.size': 'qwen3_8b'}
  own, other, adapted = shown(), shown(**large), shown(**large, **{'lora.rank': 16})
  for row in ('parameters', 'optimizer', 'saved', 'loss: logits', 'frozen'):
    assert own['per_device'][row] == other['per_device'][row], row
  large_count = spec.count(transformer.spec(sizes.get('qwen3_8b')))
  assert other['per_device']['teacher'] == pytest.approx(2 * large_count / 8, rel=0.01)   # bfloat16
  assert other['per_device']['hidden'] > own['per_device']['hidden']
  assert adapted['per_device']['frozen'] == own['per_device']['parameters']   # nothing is shared
  assert other['step']['flops'] > own['step']['flops'] + 2 * 6.9e9 * 8 * 4096
  looked_up = 151936 * 4096   # of an embedding that is no head
  more = large_count - looked_up - own['total']['count']
  assert other['step']['received']['weights'] - own['step']['received']['weights'] == pytest.approx(
      2 * more * 7 / 8, rel=0.01)


def test_the_whole_run():
  shown = describe(qwen(), devices=64, device='v5p', mfu=0.5)
  run, step = shown['run'], shown['step']
  assert (run['steps'], run['rows'], run['tokens']) == (500, 500 * 64, 500 * 64 * 32768)
  assert run['hours'] == 500 * step['seconds'] / 3600 and run['device_hours'] == 64 * run['hours']
  assert 'hours' not in describe(qwen(), devices=64)['run']


def recipes():
  """(line of the table, its cells) of docs/recipes.md."""
  lines = (ROOT / 'docs/recipes.md').read_text().splitlines()
  rows = [[cell.strip() for cell in line.strip('|').split('|')] for line in lines if line.startswith('| qwen3_')]
  return pytest.mark.parametrize('row', rows, ids=[f'{row[0]} on {row[1]}' for row in rows])


@recipes()
def test_a_recipe_is_what_is_shown(row):
  model, devices, keys, memory, step, hours = row
  count, _, kind = devices.partition(' ')
  config = distill.get_config(f'model={model},ctx=32768')
  for key in keys.strip('`').split():
    name, _, value = key.partition('=')
    config.update_from_flattened_dict({name: type(config_dict_value(config, name))(value)})
  shown = describe(config, int(count), kind)
  assert not shown['warnings']
  assert memory == f'{shown["per_device"]["total"] / 1e9:.1f} GB'
  assert (step, hours) == (f'{shown["step"]["seconds"]:.1f} s', f'{shown["run"]["hours"]:.1f} h')


def config_dict_value(config, name):
  for part in name.split('.'):
    config = config[part]
  return config


def test_output_matching_keeps_what_the_teachers_attention_gave():
  def memory(**keys):
    config = qwen()
    config.update_from_flattened_dict({'batch': 8} | keys)   # a row for each device
    return describe(config, devices=8)['per_device']
  plain, full, none = memory(), memory(**{'distill.match_weight': 1.0}), memory(**{
      'distill.match_weight': 1.0, 'compute.remat': 'none'})
  assert plain['matching'] == 0 and full['matching'] == 36 * 32768 * 2560 * 2
  assert full['total'] - plain['total'] == full['matching'] == none['matching'] / 2   # its own, too, without remat


def test_a_lora_student_has_gradients_of_its_own_part_only():
  def shown(make=distill.get_config, **keys):
    config = make('model=qwen3_4b,ctx=32768')
    config.update_from_flattened_dict({'lora.rank': 16} | keys)
    return describe(config, devices=8)
  distilled = shown()
  # 16 (D + N H) of q, ... for 36 layers; see models/lora.py.
  per_layer = 2560 + 32 * 128 + 2 * (2560 + 8 * 128) + 32 * 128 + 2560 + 3 * (2560 + 9728)
  assert distilled['total']['count'] == 36 * 16 * per_layer
  memory = distilled['per_device']
  assert memory['optimizer'] == pytest.approx(2 * memory['parameters'], rel=1e-3)
  assert memory['frozen'] == 0 < memory['teacher']
  for other in (shown(finetune.get_config), shown(**{'teacher.logits': 'taught/x'})):   # no teacher to add to
    assert other['per_device']['frozen'] == pytest.approx(4 * 4_022_468_096 / 8, rel=1e-2)


def test_operations_and_time_of_a_step():
  shown = describe(qwen(), devices=64, device='v5p', mfu=0.5)
  step, tokens = shown['step'], 64 * 32768
  weights = 36 * (2560 * 128 * (32 + 8 + 8) + 32 * 128 * 2560 + 3 * 2560 * 9728)
  assert step['flops'] * 64 > tokens * 2 * 4 * weights   # a forward pass of the teacher, three of the student
  assert step['seconds'] == step['seconds_of_operations'] == pytest.approx(step['flops'] / 0.5 / 459e12)
  assert step['mfu'] == pytest.approx(0.5) and step['tokens_per_s'] == pytest.approx(tokens / step['seconds'])
  slow = describe(qwen(), devices=64, device='v5p', mfu=0.5, links=1e9)['step']
  assert slow['seconds'] == slow['seconds_of_links'] == pytest.approx(sum(step['received'].values()) / 1e9)
  assert slow['mfu'] == pytest.approx(step['flops'] / 459e12 / slow['seconds'])
  assert 'seconds' not in describe(qwen(), devices=64)['step']


def test_bytes_that_a_device_receives():
  received = lambda devices=8, **mesh: describe(qwen(**mesh), devices=devices)['step']['received']
  one = received(devices=1)
  assert one == {'weights': 0, 'gradients': 0, 'activations': 0}
  whole = received(fsdp=1, data=8)   # every device has all weights, and all add up their gradients
  assert whole['weights'] == whole['activations'] == 0
  assert whole['gradients'] == pytest.approx(2 * 2 * 4_022_468_096 * 7 / 8)   # bfloat16
  cut = received(fsdp=8)
  norms = 36 * (2 * 2560 + 2 * 128) + 2560
  assert cut['gradients'] == pytest.approx((2 * (4_022_468_096 - norms) + 4 * norms) * 7 / 8)
  assert cut['weights'] == pytest.approx(3 * 2 * (4_022_468_096 - norms) * 7 / 8)   # twice, and the teacher's
  tensor = received(fsdp=1, tensor=8)
  assert tensor['weights'] == 0 and tensor['gradients'] == pytest.approx(0)
  row = 64 * 2560 * 2
  # Two all-reduces, each 2 * 7/8 of the rows: three times in the student's passes, with remat, and once in the teacher's.
  assert tensor['activations'] == pytest.approx(36 * 2 * 2 * 7 / 8 * row * 4 * 32768)
  assert received(fsdp=4, context=2)['activations'] > 0


def test_bytes_of_rows_that_are_divided():
  """Keys and values of 8 heads of 128 in bfloat16, in 36 layers, three times with remat."""
  def received(**changes):
    config = finetune.get_config('model=qwen3_4b,ctx=32768,mode=block')
    config.update_from_flattened_dict({'mesh.fsdp': 1, 'mesh.context': 8} | changes)
    return describe(config, devices=8)['step']['received']['activations']
  assert received(**{'compute.far_queries': 0}) == pytest.approx(
      3 * 36 * 64 * 32768 * 2 * 8 * 128 * 2 * 7 / 8)
  near = 64 * 32768 / 8 * 2 * 8 * 128 * 2
  assert received(**{'compute.far_queries': 256}) == pytest.approx(
      3 * 36 * (near + 64 * 256 * 32 * 128 * 2 * 7 / 8 * (2 + 4)))
  assert received() > near * 3 * 36


def test_a_device_that_is_too_small_is_named():
  assert any('more than the 16 GB of a v5e' in text for text in describe(qwen(), 64, 'v5e')['warnings'])
  assert not describe(qwen(), 64, 'h200')['warnings']


@pytest.mark.parametrize('text, sizes', [('data=8,fsdp=32', (8, 32, 1, 1)), ('context=2, tensor=4', (1, 1, 4, 2)),
                                         ('fsdp=-1', (1, -1, 1, 1))])
def test_a_mesh_on_the_command_line(text, sizes):
  assert tuple(show.parse_mesh(text).values()) == sizes


@pytest.mark.parametrize('text, message', [
    ('data', 'give every axis once, as data=SIZE'), ('data=0', 'data=SIZE'), ('data=2,data=4', 'every axis once'),
    ('date=8', "did you mean 'data'"), ('data=two', 'data=SIZE'), ('', "no axis ''")])
def test_a_bad_mesh_on_the_command_line(text, message):
  with pytest.raises(ValueError, match=message):
    show.parse_mesh(text)


def test_a_mesh_says_how_many_devices_there_are(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(ROOT)
  config = '--config=configs/distill.py:model=qwen3_4b,ctx=32768'
  assert show.main([config, '--mesh=data=2,fsdp=32', '--device=v6e', f'--json={tmp_path / "shown.json"}']) == 0
  shown = json.loads((tmp_path / 'shown.json').read_text())
  assert shown['mesh'] == {'data': 2, 'fsdp': 32, 'tensor': 1, 'context': 1} == shown['config']['mesh']
  assert 'operations at 40% of 918 TFLOP/s (assumed)' in capsys.readouterr().out
  assert show.main([config, '--mesh=data=8,fsdp=32', '--devices=256']) == 2   # and still something is shown
  said = capsys.readouterr()
  assert 'config.batch=64 must be a multiple of 256' in said.err and 'shown is --config.batch=256' in said.err
  assert 'memory of a device' in said.out
  for arguments, message in ((['--mesh=fsdp=-1'], '--devices=N'),
                             (['--aot=v5e'], 'give a TPU slice such as v5e:2x2'), (['--aot=h100:2x2'], 'v5e:2x2'),
                             (['--mesh=fsdp=32', '--aot=v5e:4x4'], 'needs 32 devices, here are 16'),
                             (['--config.profile=7:3', '--devices=64'], "profile='7:3'")):
    assert show.main([config, *arguments]) == 2
    assert message in capsys.readouterr().err, arguments


def test_fine_tuning_counts_the_views_of_its_mode():
  saved = {}
  for mode in ('full', 'block', 'both'):
    config = finetune.get_config(f'model=qwen3_0_6b,ctx=4096,mode={mode}')
    config.blocks.sinks = 4
    memory = describe(config, devices=1)['per_device']
    saved[mode] = memory['saved']
    assert memory['teacher'] == 0
  assert saved['full'] < saved['block'] and saved['both'] == saved['full'] + saved['block']


def test_learned_sinks_are_parameters():
  config = qwen()
  config.blocks.sink_kind, config.blocks.sinks = 'learned', 4
  shown = describe(config, devices=1)
  assert {'name': 'sinks', 'shape': [4, 2560], 'axes': [None, 'width'], 'mesh_axes': [None, None], 'count': 4 * 2560,
          'bytes': 4 * 4 * 2560} in shown['parameters']


EIGHT = {'mesh': {'data': 1, 'fsdp': 2, 'tensor': 8, 'context': 1}}


@pytest.mark.parametrize('change, message', [
    ({'mesh': {'data': 1, 'fsdp': 1, 'tensor': 16, 'context': 1}},
     r"layers/k: axis 'kv_heads' of size 8 cannot be cut into 16"),
    ({**EIGHT, 'model.fields': {'mlp': 9732}}, r"layers/down: axis 'mlp' of size 9732"),
    ({**EIGHT, 'model.fields': {'vocab': 151938}}, r"embed: axis 'vocab' of size 151938"),
    ({'mesh': {'data': 1, 'fsdp': 1, 'tensor': 1, 'context': 16}, 'data.length': 33000}, r'length = 33000 must be a mult'),
    ({'teacher.rules': (('batch', None),)}, r'teacher.rules places .batch.'),
    ({'teacher.rules': (('layers', 'fsdp'), ('embed', None))}, r"axis 'layers' of size 36 cannot be cut into 16"),
    ({'teacher.dtype': 'int4'}, r'config.teacher.dtype'),
    ({'mesh': {'data': 1, 'fsdp': 3, 'tensor': 1, 'context': 1}}, r'fsdp=3 .* needs 3 devices, here are 16'),
    ({'batch': 24}, r'config.batch=24 must be a multiple of 16'),
    ({'optim.warmup': 10 ** 6}, r'warmup'),
    ({'distill.loss_over': 'sinks'}, r'loss_over'),
    ({'model.size': '', 'model.source': 'Qwen/Qwen3-4B'}, r'Qwen/Qwen3-4B.*set config.model.size'),
])
def test_what_cannot_run_is_named(change, message):
  config = qwen()
  for key, value in change.items():
    config.update_from_flattened_dict({key: value})
  with pytest.raises(ValueError, match=message):
    describe(config, devices=16)


def test_rows_longer_than_the_model_was_made_for():
  config = distill.get_config('model=qwen3_0_6b,ctx=65536')
  assert 'than the 40960 that' in describe(config, devices=1)['warnings'][0]
  config = distill.get_config('model=qwen3_0_6b,ctx=32768')
  config.blocks.overlap = 1024   # which takes room, and no positions
  assert not any('positions' in line for line in describe(config, devices=1)['warnings'])


def test_every_size_has_a_hub_name():
  assert set(distill.HUB) == set(sizes.SIZES)
  with pytest.raises(ValueError, match="did you mean 'llama31_8b'"):
    distill.get_config('model=llama3_8b')
  with pytest.raises(ValueError, match="did you mean 'mode'"):
    finetune.get_config('mod=both')


def test_command_line_touches_no_device(tmp_path):
  """With a platform that does not exist, asking for a device would fail."""
  command = [sys.executable, '-m', 'tools.show', '--config=configs/distill.py:model=qwen3_4b', '--config.chunk=256',
             '--devices=64', f'--json={tmp_path / "shown.json"}']
  result = subprocess.run(command, cwd=ROOT, env=os.environ | {'JAX_PLATFORMS': 'none'}, capture_output=True, text=True)
  assert result.returncode == 0, result.stderr
  assert 'config.chunk = 256' in result.stdout
  assert '4,022,468,096' in result.stdout
  assert json.loads((tmp_path / 'shown.json').read_text())['config']['chunk'] == 256


@pytest.mark.parametrize('argument, message', [
    ('--config.modl.size=x', "did you mean 'model.size'"), ('--config.batch=many', 'invalid literal'),
    ('--config.batch=3', 'config.batch=3'), ('--device=v1', 'choose from'), ('--devces=3', '--devces=3'),
    ('more', "unexpected arguments ['more']")])
def test_a_bad_command_line_is_explained(argument, message, capsys, monkeypatch):
  monkeypatch.chdir(ROOT)
  with pytest.raises(SystemExit) as ended:
    sys.exit(show.main(['--config=configs/distill.py', '--devices=64', argument]))
  assert ended.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize('model, parameters', [('qwen3_0_6b', 596_051_970), ('qwen3_4b', 4_022_473_218)])
def test_the_segmenters_of_published_size_fit(model, parameters):
  """A two-way head stands in place of the output matrix, and its logits need no room."""
  shown = describe(importlib.import_module('configs.segment').get_config(f'model={model},ctx=32768'), 64)
  assert shown['total']['count'] == parameters
  assert shown['per_device']['loss: logits'] < 1e6 and shown['per_device']['total'] < 20e9
