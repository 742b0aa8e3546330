"""Pages that no training sees."""

import re

import data_cases

from blockattn.data import stdlib
from blockattn.evals import pages


def test_pages_are_held_out(monkeypatch, tmp_path):
  for number in range(40):
    methods = ''.join(f'  def {verb}_{number}(self, x):\n    """It {verb}s number {number} of what {verb}s."""\n'
                      for verb in ('open', 'close', 'count', 'sort', 'split'))
    (tmp_path / f'm{number}.py').write_text(f'class C{number}:\n  """Holds the {number}."""\n{methods}')
  library = stdlib.read_containers(tmp_path)
  made, make_page = [], stdlib.make_page
  monkeypatch.setattr(stdlib, 'read_containers', lambda: library)
  monkeypatch.setattr(stdlib, 'make_page', lambda number, *args: made.append(number) or make_page(number, *args))
  docs, examples = pages.load(data_cases.tiny_tokenizer(), 3)
  held_out = {c.name for c in library if stdlib.split_of(c) == 'test'}
  assert 0 < len(held_out) < 40 and len(docs) == 3 and made == [0, 1, 2]
  assert {'C' + re.search(r'_(\d+)', example.answers[0])[1] for example in examples} <= held_out
