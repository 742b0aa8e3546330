"""tools.bench decode: its limit, and one short run."""

import json

import hf_cases
import pytest

from tools.bench import __main__ as bench, decode, measuring, ttft

CFG = hf_cases.MODELS['qwen3_tied']   # V 48, D 24, L 2, N 4, K 2, H 16, F 40


def test_a_step_reads_every_weight_and_every_state():
  weights = 2 * (24 * (4 + 2 + 2) * 16 + 4 * 16 * 24 + 3 * 24 * 40) + 48 * 24
  assert decode.limit(CFG, 100, 3, 4, 1e9) == pytest.approx((weights * 4 + 3 * 100 * 512) / 1e9)


def test_answers_that_do_not_begin_alike_are_no_comparison():
  assert decode.same((1, 2, 3), (1, 2, 4)) == 2
  with pytest.raises(ValueError, match='begins with the token 1, that of torch with 2'):
    decode.same((1, 2), (2, 2))


@pytest.mark.slow
def test_a_run_compares_with_torch(monkeypatch, capsys, tmp_path):
  pytest.importorskip('torch')
  monkeypatch.setattr(ttft, 'SMALL', CFG)
  monkeypatch.setattr(measuring, 'set_up', lambda args: None)
  assert bench.main(['decode', '--length', '64', '--last', '16', '--new', '4', '--requests', '1', '3', '--samples', '1',
                     '--bandwidth-gbs', '100', '--impl', 'reference', '--json', str(tmp_path / 'x.json')]) == 0
  said = capsys.readouterr().out
  results = json.loads((tmp_path / 'x.json').read_text())['results']
  assert [result['requests'] for result in results] == [1, 3]
  for result in results:
    assert set(result['seconds']) == {decode.OURS, ttft.TORCH} and result['same'][ttft.TORCH] >= 1
    for name, (seconds,) in result['seconds'].items():
      assert f'| {result["requests"]} | {name} | {result["requests"] * 4 / seconds:.1f} |' in said
