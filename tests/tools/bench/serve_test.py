"""tools.bench serve: what can be wrong without a server. tests/serving has servers."""

import numpy as np
import pytest

from blockattn.hf import config
from tools.bench import __main__ as bench, serve

LOAD = serve.Load(documents=10, tokens=20, least=2, most=4, system=5, question=3, new=2, zipf=1.0, requests=200)


def test_requests_draw_documents_of_one_corpus():
  asked = serve.prompts(LOAD, 1000, seed=1)
  assert asked == serve.prompts(LOAD, 1000, seed=1) != serve.prompts(LOAD, 1000, seed=2)
  assert len({tuple(prompt[0]) for prompt in asked}) == 1 and len({tuple(prompt[-1]) for prompt in asked}) == 200
  drawn = [tuple(block) for prompt in asked for block in prompt[1:-1]]
  counts = sorted((drawn.count(own) for own in set(drawn)), reverse=True)
  assert len(counts) == 10 and counts[0] > 2 * counts[-1]
  assert {len(prompt) - 2 for prompt in asked} == {2, 3, 4}
  assert all(len(set(map(tuple, prompt))) == len(prompt) for prompt in asked)
  assert min(min(block) for prompt in asked for block in prompt) >= 100


def test_arrivals_have_the_rate_and_figures_are_those_of_answers():
  times = serve.arrivals(4000, 8.0, seed=0)
  assert times[0] == 0 and (np.diff(times) > 0).all() and times[-1] == pytest.approx(500, rel=0.05)
  answers = [serve.Answer(sent=i, first=i + 0.5, end=i + 2, tokens=4, prompt=100, cached=25) for i in range(10)]
  found = serve.figures(answers)
  assert found['p50'] == found['p99'] == 0.5 and found['hits'] == 0.25
  assert found['rate'] == pytest.approx(40 / 11) and found['in_flight'] == pytest.approx(20 / 11)
  assert serve.row_of({'n': 2, 'server': 'x', **found}).count('|') == 9


def test_a_model_that_says_nothing_of_blocks_is_given_sinks(tmp_path):
  folder = tmp_path / 'copy'
  folder.mkdir()
  made = serve.as_student('blockattn/assets/tiny_teacher', folder)
  options = config.block_options(config.read_meta(made))
  assert len(options.sink_ids) == 4 and (made / 'model.safetensors').exists()
  assert config.read(made) == config.read('blockattn/assets/tiny_teacher')
  assert serve.as_student(str(made), tmp_path) == made


def test_what_cannot_be_asked_is_a_line(capsys):
  given = ['serve', '--model', 'blockattn/assets/tiny_teacher', '--documents', '8']
  assert bench.main(given) == 2 and '--least 4 --most 16' in capsys.readouterr().err
  with pytest.raises(SystemExit):
    bench.main([*given, '--log', 'nowhere'])


def test_a_server_that_ends_says_why(tmp_path):
  with pytest.raises(ValueError, match='the server ended: .*no vLLM here'):
    serve.Server(['-c', 'import sys; sys.exit("no vLLM here")'], tmp_path / 'log')
