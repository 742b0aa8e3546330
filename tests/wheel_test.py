"""What `pip wheel .` makes, installed where no checkout is: attention, cutting, and a model that answers."""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile

import pytest

import blockattn

ROOT = pathlib.Path(__file__).resolve().parents[1]
USES = {
    'attention': '''
import jax.numpy as jnp
layout = blockattn.from_lengths([[[3, 2, 3]]], 8)
x = jnp.ones((1, 8, 2, 16))
out = blockattn.block_attention(x, x, x, layout, impl='xla')
assert out.shape == x.shape and blockattn.picture(layout).splitlines()[3].startswith('. . . 1 .')
''',
    'segment': '''
text = 'One thing is said here. Another follows.\\n\\n' * 20
blocks = blockattn.segment(text, max_tokens=64)
assert ''.join(text[a:b] for a, b in blocks) == text and len(blocks) > 1
''',
    'load and generate': '''
import pathlib
from blockattn.models.transformer import Compute
model = blockattn.load(pathlib.Path(blockattn.__file__).parent / 'assets/tiny_teacher')
engine = blockattn.Engine(model.params, model.cfg, Compute(impl='xla'), model.blocks, model.tokenizer,
                          stop_ids=model.stop_ids)
tokens = lambda text: model.tokenizer.encode(text, add_special_tokens=False)
request = blockattn.Request([tokens('A block of text.\\n'), tokens('A question?')], max_new=2)
first, again = (engine.generate([request])[0] for _ in range(2))
assert first.tokens == again.tokens and again.blocks[0].found == 'device'
'''}


@pytest.fixture(scope='module')
def installed(tmp_path_factory):
  """An empty folder with the package alone."""
  folder = tmp_path_factory.mktemp('wheel')
  pip = lambda *args: subprocess.run([sys.executable, '-m', 'pip', '-q', '--disable-pip-version-check', *args], check=True,
                                     capture_output=True, timeout=300)
  source = folder / 'source'   # a build leaves files beside what it builds
  shutil.copytree(ROOT / 'blockattn', source / 'blockattn', ignore=shutil.ignore_patterns('__pycache__'))
  for name in ('setup.py', 'pyproject.toml', 'README.md', 'LICENSE'):
    shutil.copy(ROOT / name, source)
  pip('wheel', str(source), '--no-deps', '--no-build-isolation', '-w', str(folder))
  pip('install', '--no-deps', '--no-index', '--target', str(folder / 'site'), *map(str, folder.glob('*.whl')))
  return folder


def test_metadata_is_complete(installed):
  wheel, = installed.glob('*.whl')
  with zipfile.ZipFile(wheel) as archive:
    names = archive.namelist()
    said = archive.read(next(name for name in names if name.endswith('METADATA'))).decode()
  assert {'blockattn/py.typed', 'blockattn/assets/tiny_teacher/model.safetensors'} <= set(names)
  assert {name.split('/')[0] for name in names if not name.startswith('blockattn-')} == {'blockattn'}
  assert re.search(rf'(?m)^Version: {re.escape(blockattn.__version__)}$', said) and '# blockattn' in said
  cited = (ROOT / 'CITATION.cff').read_text(encoding='utf-8')
  assert re.search(r'(?m)^version: (.+)$', cited)[1] == blockattn.__version__


@pytest.mark.slow
@pytest.mark.parametrize('use', USES)
def test_the_smallest_uses_run_without_a_checkout(installed, use):
  # -I: neither the folder that we are in nor PYTHONPATH; -S, the path by hand: no editable install of the checkout either.
  paths = [str(installed / 'site'), sysconfig.get_path('purelib'), sysconfig.get_path('platlib')]
  code = (f'import sys; sys.path += {paths!r}\nimport blockattn\n'
          f'assert blockattn.__file__.startswith({str(installed)!r}), blockattn.__file__\n' + USES[use])
  run = subprocess.run([sys.executable, '-I', '-S', '-c', code], cwd=installed, capture_output=True, text=True, timeout=300,
                       env={'JAX_PLATFORMS': 'cpu', 'PATH': os.environ['PATH'], 'HOME': str(installed)})
  assert run.returncode == 0, run.stderr
