"""What `import blockattn` offers, and that it costs nothing until it is asked for."""

import subprocess
import sys

import pytest

import blockattn


def test_importing_the_package_loads_no_library():
  code = ('import sys, blockattn\nheavy = {"jax", "numpy", "transformers", "flax"} & set(sys.modules)\n'
          'assert not heavy, heavy\nassert blockattn.__version__')
  subprocess.run([sys.executable, '-c', code], check=True)


def test_every_name_is_there_and_comes_from_its_home():
  for name in blockattn.__all__:
    assert getattr(blockattn, name).__module__ == f'blockattn.{blockattn._HOME[name]}', name
  assert set(blockattn.__all__) == set(blockattn._HOME) <= set(dir(blockattn)) and '__version__' in dir(blockattn)
  with pytest.raises(AttributeError, match='no attribute .attend.'):
    getattr(blockattn, 'attend')  # noqa: B009
