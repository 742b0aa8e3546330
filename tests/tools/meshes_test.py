"""tools.meshes without its runs: which meshes there are, and what counts as the same training."""

import json
import math

import pytest

from tools import meshes


def test_every_shape_of_the_mesh_once():
  shapes = meshes.shapes(8)
  assert len(shapes) == len(set(shapes)) == 20 and all(math.prod(shape) == 8 for shape in shapes)
  assert meshes.name(1, 8, (2, 1, 1, 4)) == 'data=2 x context=4'
  assert meshes.name(4, 2, (8, 1, 1, 1)) == '4 processes: data=8' and meshes.name(1, 1, (1,) * 4) == 'one device'


def test_the_chain_passes_through_other_numbers_of_processes_and_devices():
  for processes, devices, shape in meshes.CHAIN:
    assert math.prod(shape) == processes * devices
  assert len({where[:2] for where in meshes.CHAIN}) >= 4


def test_runs_are_compared_step_by_step(tmp_path):
  write = lambda losses: (tmp_path / 'metrics.jsonl').write_text(
      ''.join(json.dumps({'step': step, 'loss': loss}) + '\n' for step, loss in losses))
  reference = {1: 2.0, 2: 1.5}
  write([(1, 2.0), (2, 1.2)])
  assert meshes.apart(tmp_path, reference) == pytest.approx(0.2)
  for broken in ([(1, 2.0)], [(1, 2.0), (2, 1.5), (2, 1.5)], [(1, 2.0), (3, 1.5)]):
    write(broken)
    with pytest.raises(RuntimeError, match=r'steps \[.*\], expected \[1, 2\]'):
      meshes.apart(tmp_path, reference)
