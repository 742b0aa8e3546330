"""The documents: Python snippets run, shell commands name what exists, and the README's table is what the demo prints.

A snippet that cannot run everywhere has a comment in front of it, `<!-- needs: a cluster -->`: its Python is only compiled.
BLOCKATTN_DEMO=FOLDER names the work directory of a demo that has run, to compare it with the table.
"""

import contextlib
import dataclasses
import functools
import io
import json
import os
import pathlib
import re
import runpy
import shlex
import sys
import warnings
from unittest import mock

import pytest

from blockattn.train import command
from tools import demo

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *sorted((ROOT / 'docs').rglob('*.md'))]
OURS = ('launch/', './launch/', 'configs/', 'blockattn/', 'docs/', 'examples/', 'tests/', 'tools/')   # paths of the checkout
SHORT = {'demo': 'tools.demo', 'sweep': 'launch.sweep'}   # commands of launch/local.sh that stand for a module
_NATS = 1 / 3   # relative spread of CE and KL


@dataclasses.dataclass(frozen=True)
class Snippet:
  """A fenced block.

  Attributes:
    language: python, sh, ...
    code: its text.
    line: of its first line of code.
    needs: what it cannot do without; '' if it runs anywhere.
  """
  language: str
  code: str
  line: int
  needs: str


def snippets(path, *languages):
  """The fenced blocks of a page in these languages, in order."""
  text, found = path.read_text(encoding='utf-8'), []
  for match in re.finditer(r'(?:^<!-- (needs|CHECK): ([^\n]*?) -->\n)?^```(\w+)\n(.*?)^```$', text, re.M | re.S):
    if match[3] in languages:
      found.append(Snippet(match[3], match[4], text.count('\n', 0, match.start(4)) + 1, match[2] or ''))
  return found


def commands(code):
  """The commands of a shell snippet, each a list of words."""
  lines = re.sub(r'\\\n', ' ', code).splitlines()
  return list(filter(None, (shlex.split(line, comments=True) for line in lines)))


def pages_with(*languages):
  pages = [path for path in PAGES if snippets(path, *languages)]
  return pytest.mark.parametrize('path', pages, ids=[str(path.relative_to(ROOT)) for path in pages])


# Python.


@pages_with('python')
def test_python_snippets_run(path, tmp_path, monkeypatch, standard_promotion):
  """From the checkout, one after the other in one namespace."""
  monkeypatch.chdir(ROOT)
  monkeypatch.setenv('HOME', str(tmp_path))
  namespace = {'__name__': 'snippet'}
  for snippet in snippets(path, 'python'):
    code = compile('\n' * (snippet.line - 1) + snippet.code, str(path), 'exec')
    if not snippet.needs:
      exec(code, namespace)


# Shell.


@functools.cache
def help_of(module, first=''):
  """What `python -m MODULE [FIRST] --help` prints."""
  out, argv = io.StringIO(), [module, *filter(None, [first]), '--help']
  with (mock.patch.object(sys, 'argv', argv), mock.patch.dict(os.environ), contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(out), contextlib.suppress(SystemExit), warnings.catch_warnings()):
    warnings.simplefilter('ignore', RuntimeWarning)   # runpy, of a module that is imported already
    runpy.run_module(module, run_name='__main__', alter_sys=False)
  return out.getvalue()


def check_module(module, args):
  """That a module has these flags, and its config these keys."""
  text = help_of(module)
  own = args and re.escape(args[0])
  if own and not args[0].startswith('-') and re.search(rf'(?m)[{{,]{own}[,}}]|^ +{own} ', text):   # a command of its own
    text += help_of(module, args[0])
  flags = [arg.partition('=')[0] for arg in args if re.match(r'--?[a-z]', arg)]
  for flag in flags:
    if flag != '--help' and not flag.startswith('--config.'):
      assert re.search(rf'{re.escape(flag)}\b', text), f'{module} has no {flag}'
  if '--config' in flags:
    file = args[args.index('--config') + 1]
    command.read_config(['--config', file, *(arg for arg in args if arg.startswith('--config.'))])


def check_command(words):
  for word in words:
    if word.startswith(OURS) and not re.search(r'[*?]', word):
      assert (ROOT / word.partition(':')[0]).exists(), f'{word} does not exist'
  if words[0] == './launch/local.sh' and not words[1].startswith('-'):
    assert re.search(rf'^  {words[1]}\b', (ROOT / 'launch' / 'local.sh').read_text(), re.M), f'local.sh has no {words[1]}'
    if words[1] in SHORT:
      check_module(SHORT[words[1]], words[2:])
  elif '-m' in words:
    at = words.index('-m')
    check_module(words[at + 1], words[at + 2:])


@pages_with('sh')
def test_shell_commands_name_what_exists(path):
  for snippet in snippets(path, 'sh'):
    for words in commands(snippet.code):
      try:
        check_command(words)
      except (AssertionError, ValueError, FileNotFoundError, ImportError) as error:
        pytest.fail(f'{path.name}:{snippet.line}: {shlex.join(words)}: {error}')


# The README.


def test_the_readme_is_short_and_its_links_lead_somewhere():
  text = (ROOT / 'README.md').read_text(encoding='utf-8')
  assert text.count('\n') <= 150
  for target in re.findall(r'\]\(([^)#]+)[^)]*\)', text):
    assert target.startswith('http') or (ROOT / target).exists(), target


def table():
  """[(exact match in percent, CE, KL, spread of exact match in points)], by demo.MODELS."""
  text = (ROOT / 'README.md').read_text(encoding='utf-8')
  rows = re.search(r'<!-- demo -->\n(.*)<!-- /demo -->', text, re.S)[1].splitlines()[2:]
  return [tuple(float(re.search(r'[\d.]+', cell)[0]) for cell in row.split('|')[2:-1]) for row in rows]


def test_the_table_has_a_row_for_each_model():
  assert len(table()) == len(demo.MODELS) and {len(row) for row in table()} == {4}


@pytest.mark.skipif('BLOCKATTN_DEMO' not in os.environ, reason='BLOCKATTN_DEMO names no work directory of a demo')
@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the table is of pages of Python 3.11's library")
def test_the_table_is_what_the_demo_prints():
  summary = json.loads((pathlib.Path(os.environ['BLOCKATTN_DEMO']) / 'summary.json').read_text())
  for name, (match, ce, kl, spread) in zip(demo.MODELS, table(), strict=True):
    found = summary[name]
    assert 100 * found['exact_match'] == pytest.approx(match, abs=spread), name
    assert (found['ce'], found['kl']) == pytest.approx((ce, kl), rel=_NATS, abs=2e-3), name
