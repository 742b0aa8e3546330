"""tools.bench ttft: what it counts, and one short run."""

import json
import xml.etree.ElementTree as ET

import hf_cases
import numpy as np
import pytest

from blockattn import blocks
from tools.bench import __main__ as bench, measuring, ttft

CFG = hf_cases.MODELS['qwen3_tied']   # V 48, D 24, L 2, N 4, K 2, H 16, F 40


def test_operations_and_bytes_of_a_first_token():
  lengths = [5, 7, 3]   # 15 tokens, the last block 3
  weights = 2 * (24 * (4 + 2 + 2) * 16 + 4 * 16 * 24 + 3 * 24 * 40)
  layout = blocks.from_lengths([[lengths]], 15)
  pairs = int(np.asarray(blocks.may_attend(layout)).sum())
  reading = int(np.asarray(blocks.may_attend(layout))[0, -3:].sum())
  per_pair, head = 4 * 4 * 16 * 2, 48 * 24
  found = ttft.cost(CFG, lengths, 4)
  assert found['full']['flops'] == 2 * weights * 15 + per_pair * 15 * 16 / 2 + 2 * head
  assert found['none']['flops'] == 2 * weights * 15 + per_pair * pairs + 2 * head
  assert found['all']['flops'] == 2 * weights * 3 + per_pair * reading + 2 * head
  assert ttft.bytes_per_token(CFG, 4) == 2 * 2 * 2 * 16 * 4
  assert {x['bytes'] for x in found.values()} == {4 * (weights + head) + 15 * 512}


@pytest.mark.parametrize('length', [300, 1024])
def test_a_prompt_has_its_length_and_blocks_of_all_lengths(length):
  prompt = ttft.make_prompt(length, 64, 32, 100)
  sizes = [len(block) for block in prompt.blocks]
  assert prompt.tokens == sum(sizes) == length and sizes[-1] == 32
  assert len(set(sizes[:-1])) > 2 and all(20 <= size <= 110 for size in sizes)
  assert prompt.with_sinks() == [size + 4 for size in sizes]
  assert prompt == ttft.make_prompt(length, 64, 32, 100)


@pytest.mark.slow
def test_a_run_prints_every_way_and_keeps_the_samples(monkeypatch, capsys, tmp_path):
  monkeypatch.setattr(ttft, 'SMALL', hf_cases.MODELS['qwen3_tied'])
  monkeypatch.setattr(measuring, 'set_up', lambda args: None)
  assert bench.main(['ttft', '--lengths', '96', '--block', '32', '--last', '16', '--samples', '1', '--no-torch',
                     '--peak-tflops', '1', '--bandwidth-gbs', '100', '--impl', 'reference',
                     '--json', str(tmp_path / 'x.json'), '--plot', str(tmp_path / 'x.svg')]) == 0
  said = capsys.readouterr().out
  result = json.loads((tmp_path / 'x.json').read_text())['results'][0]
  assert set(result['seconds']) == {'full', *ttft.STATES}
  for name, times in result['seconds'].items():
    assert f'| 96 | {name} | {1e3 * times[0]:.1f} |' in said
  assert result['limit']['full'] > result['limit']['none'] > result['limit']['all'] > 0
  assert all(set(result['parts'][name]) == set(ttft.PARTS) for name in ('all', 'memory'))
  labels = [t.text for t in ET.parse(tmp_path / 'x.svg').iter('{http://www.w3.org/2000/svg}text')]
  assert {'full', *ttft.STATES} <= set(labels)
