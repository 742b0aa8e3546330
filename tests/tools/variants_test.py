"""The variants of a distillation side by side; the trainings themselves are not run here."""

import pytest

from tools import variants


@pytest.mark.parametrize('name', variants.VARIANTS)
def test_every_variant_is_a_config(name):
  options = variants.options_of(name, 3, 12)
  assert (options.seed, options.steps, options.optim.steps, options.optim.warmup) == (3, 12, 12, 6)
  assert (options == variants.options_of('plain', 3, 12)) == (name == 'plain')


def test_the_table_has_means_over_seeds():
  result = lambda name, seed, kl: {'variant': name, 'seed': seed, 'steps': 100, 'seconds': 9.7, 'kl': kl,
                                   'exact_match': 0.5 + kl / 10}
  lines = variants.table([result('jsd', 0, 0.2), result('plain', 0, 0.1), result('jsd', 1, 0.4)]).splitlines()
  assert lines[2:] == ['| plain | 1 | 100 | 10 | 0.1000 ± 0.0000 | 51.0 ± 0.0 |',
                       '| jsd | 2 | 100 | 10 | 0.3000 ± 0.1000 | 53.0 ± 1.0 |']


def test_a_trained_variant_is_not_trained_again(tmp_path):
  (tmp_path / 'result.json').write_text('{"variant": "jsd", "steps": 9, "kl": 0.1, "exact_match": 0.5}')
  assert variants.trained(tmp_path, 'jsd', 0, 9, pytest.fail)['kl'] == 0.1


def test_an_unknown_variant(capsys):
  assert variants.main(['--only', 'plain,jds']) == 2
  assert 'variants: --only jds: choose from plain, weighted, ce' in ' '.join(capsys.readouterr().err.split())
