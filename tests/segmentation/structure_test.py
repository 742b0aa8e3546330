"""Documents out of files that show their structure."""

import gzip
import itertools
import json
import pathlib

import pytest
from hypothesis import given, settings, strategies as st

from blockattn.segmentation.semanticseg import (
  schema,
  structure,
  structure_code,
  structure_talk,
  structure_text,
)
from tools import structure as tool

few = settings(max_examples=60, deadline=None, derandomize=True, database=None)
EVERY = structure_text.Options(average=0, shortest=0, smallest=0)
NoStructure = structure_text.NoStructure
PIECES = st.sampled_from([
    '# A\n', '## B', '\n', '\r\n', '\r', '\n\n', 'word ', '====', '----\n', '```\n', '---\n', '> # q\n', '%',
    '\\section{A}\n', '\\begin{verbatim}', '\\end{verbatim}', '~~~~\n', 'def f():\n  pass\n', '@x\n', '\f',
    'class A:\n  x = 1\n', '# c\n', '{', '}', 'int f() {\n}\n', '// c\n', '<h1>', '</h1>', '&amp;', '<pre>',
    '<![x[', '<!--', '😀', '\u2028', 'é', '\t', '/* c */'])
TEXTS = st.lists(PIECES, max_size=20).map(''.join)


def cut_at(headings_of, options=structure_text.DEFAULT):
  """A builder from a reader of headings."""
  return lambda text: structure_text.cut_at_headings(*headings_of(text), options)


def blocks_of(builder, text, *args):
  blocks = builder(text, *args)
  assert ''.join(blocks) == text
  return blocks


# Headings


def test_markdown():
  blocks = ['---\ntitle: x\n---\nIntro\n\n', '# One\n\n```\n# no\n```\n\n',
            'Two\n---\n- # no\n\n> # no\n\n    # no\n\n', '## 3 ##\nx']
  text = ''.join(blocks)
  assert blocks_of(cut_at(structure_text.markdown, EVERY), text) == blocks
  assert blocks_of(cut_at(structure_text.markdown, EVERY), text.replace('\n', '\r\n'))[1].startswith('# One\r\n')
  with pytest.raises(NoStructure, match='no headings'):
    cut_at(structure_text.markdown)('plain\n')


def test_rst():
  text = ('=====\nTitle\n=====\n\nOne\n---\ntext\n\n::\n\n  no\n  --\n\nTwo\n---\n\nDeep\n~~~~~\n\nno, too long\n---\n\n'
          '====  ====\na     b\n====  ====\n')
  blocks = blocks_of(cut_at(structure_text.rst, EVERY), text)
  assert [block.split('\n')[0] for block in blocks] == ['=====', 'One', 'Two', 'Deep']
  assert [h.level for h in structure_text.rst(text)[1]] == [0, 1, 1, 2]


def test_latex():
  text = ('\\documentclass{a}\n\\section{One}\nx % \\section{no}\n%\\section{no}\n'
          '\\begin{verbatim}\n\\section{no}\n\\end{verbatim}\n50\\% \\verb|%| y\n'
          '  \\subsection*[s]{Two}\n\\newcommand{\\a}{\\section{no}}\n\\olsection{Three}\n')
  blocks = blocks_of(cut_at(structure_text.latex, EVERY), text)
  assert [block.strip()[:9] for block in blocks] == ['\\document', '\\section{', '\\subsecti', '\\olsectio']
  assert [h.level for h in structure_text.latex(text)[1]] == [2, 3, 2]


def test_html():
  page = ('<html><head><title>no</title><style>no</style></head><body><h1>A  <i>b</i></h1><p>One &amp; two<br>three</p>'
          '<ul><li>x</li>\n<li>y</li></ul><script>no("<h1>")</script><h2></h2><pre>a\n  b</pre><h2>C</h2>'
          '<table><tr><td>1<td>2<tr><td>3</table>')
  text, headings = structure_text.html_text(page)
  assert text == 'A b\n\nOne & two\nthree\n\n- x\n- y\n\na\n  b\n\nC\n\n1 2\n3\n'
  assert [(text[h.offset], h.level) for h in headings] == [('A', 1), ('C', 2)]
  assert cut_at(structure_text.html_text, EVERY)(page) == [text[:text.index('C\n')], 'C\n\n1 2\n3\n']


def test_the_level_is_the_deepest_that_is_long_enough():
  section = '## S\n' + 'x' * 400 + '\n'
  sub = '### T\n' + 'y' * 600 + '\n'
  text = '# Title\n' + (section + sub) * 3
  assert len(cut_at(structure_text.markdown)(text)) == 3 + 1   # sections with their sub-sections: 1000 each
  assert len(cut_at(structure_text.markdown, structure_text.Options(average=300))(text)) == 7
  deep = '# Title\n' + ''.join(f'{"#" * level} H\n{"z" * 900}\n' for level in (2, 3, 4, 5, 2))
  assert len(cut_at(structure_text.markdown)(deep)) == 5   # of the levels below the title only three: 2, 3 and 4
  short = '# a\n' + 'x' * 130 + '\n# b\n' + 'y' * 130
  assert len(cut_at(structure_text.markdown)(short)) == 2   # none is long enough: the highest


def test_short_sections_are_joined():
  assert structure_text.join_short(['ab', 'cde', 'f\n', '\n', 'gh'], 3) == ['abcde', 'f\n\ngh']
  assert structure_text.join_short(['abc', ' \n', 'd'], 3) == ['abc \nd']
  assert structure_text.join_short(['a', '\n', ' b'], 0) == ['a', '\n b']
  assert structure_text.join_short(['\n'], 5) == ['\n'] and structure_text.join_short([], 5) == []


@few
@given(st.lists(st.integers(1, 60), min_size=1, max_size=40), st.integers(0, 40))
def test_long_works_become_documents(sizes, smallest):
  options = structure_text.Options(longest=100, smallest=smallest, shortest=0)
  blocks = ['x' * size for size in sizes]
  parts = structure_text.split_work(blocks, options)
  assert list(itertools.chain.from_iterable(parts)) == blocks
  assert all(parts) and all(sum(map(len, part)) <= 100 for part in parts)
  if len(parts) > 1 and sum(sizes) <= 100:
    raise AssertionError('a work that fits was cut')


def test_options_are_checked():
  with pytest.raises(ValueError, match='between 0 and longest'):
    structure_text.Options(longest=100)


# Code


PYTHON = '''import a
X = 1

# about f
@a.b(
    1)
def f():
  """# no"""
  return 1
# behind f

# Section

# about A
class A:
  def g(self): pass

Y = f()
Z = 2
def h(): pass
'''


def test_python():
  blocks = blocks_of(structure_code.python, PYTHON)
  assert [block.split('\n')[0] for block in blocks] == ['import a', '# about f', '# Section', 'Y = f()', 'def h(): pass']
  assert blocks_of(structure_code.python, '\ufeff' + PYTHON.replace('\n', '\r\n'))
  with pytest.raises(NoStructure, match='not Python 3'):
    structure_code.python('print "x"\n')
  with pytest.raises(NoStructure, match='no definitions'):
    structure_code.python('x = 1\n\ny = 2\n')


def test_members_of_big_python_classes():
  text = 'import x\n\nclass A:\n  """doc"""\n  x = 1\n\n' + ''.join(
      f'  # about {i}\n  @d\n  def f{i}(self):\n    return {"1 + " * 500}1\n\n' for i in range(3))
  blocks = blocks_of(structure_code.python, text)
  assert [block.split('\n')[0] for block in blocks] == ['import x', 'class A:', '  # about 0', '  # about 1', '  # about 2']


SOURCES = {
    'java': ('package a;\nimport b;\n\n/** B. */\n@C\nclass B {\n  int x;\n\n'
             '  /** f. */\n  @T\n  void f() {\n    a();\n  }\n\n  void g() {\n    b();\n  } // end\n}\n',
             ['package a;', '/** B. */', '  /** f. */', '  void g() {']),
    'c': ('/* licence */\n#include <a.h>\n#ifdef X\n#include <b.h>\n#endif\n\n'
          '/* f */\nint f(void)\n{\n  return 1;\n}\n'
          '#ifdef Y\nint g(void)\n{\n  return 2;\n}\n#endif\n\nstruct s {\n  int a;\n};\n',
          ['/* licence */', '/* f */', '#ifdef Y', 'struct s {']),
    'ruby': ('require "x"\n\n# A.\nmodule A\n  # f\n  def f\n    1\n  end\n\n'
             '  def g\n    2\n  end\n  alias h g\nend\n',
             ['require "x"', '# A.', '  # f', '  def g']),
    'rust': ('use a;\n\n/// A.\n#[derive(B)]\nstruct A {\n  a: u8,\n}\n\nfn f() {\n  g();\n}\n',
             ['use a;', '/// A.', 'fn f() {']),
    'go': ('package a\n\nimport (\n  "b"\n)\n\n// F does.\nfunc F() {\n  g()\n}\n\ntype T struct {\n  a int\n}\n',
           ['package a', '// F does.', 'type T struct {']),
    'typescript': ('import {\n  a,\n} from "b";\n\n// I\nexport interface I {\n  a: number\n}\n\n'
                   'const f = () => {\n  g();\n};\n',
                   ['import {', '// I', 'const f = () => {']),
}


@pytest.mark.parametrize('language', SOURCES)
def test_other_languages(language):
  pytest.importorskip('tree_sitter_language_pack')
  text, starts = SOURCES[language]
  assert [block.split('\n')[0] for block in blocks_of(structure_code.code, text, language)] == starts
  text = '// é😀\n' * (language != 'ruby') + text
  assert len(blocks_of(structure_code.code, text, language)) == len(starts)   # offsets are characters, not bytes


def test_garbage_ends():
  pytest.importorskip('tree_sitter_language_pack')
  with pytest.raises(NoStructure, match='not c: too many mistakes'):
    structure_code.code('<!--' * 5000, 'c')


def test_every_language_has_a_grammar():
  pack = pytest.importorskip('tree_sitter_language_pack')
  for language in sorted(set(structure_code.LANGUAGES.values())):
    assert pack.get_parser(language).parse(b'x').root_node is not None, language


def test_without_tree_sitter(monkeypatch):
  monkeypatch.setitem(__import__('sys').modules, 'tree_sitter_language_pack', None)
  with pytest.raises(ImportError, match=r'blockattn\[semanticseg\]'):
    structure_code.code('x', 'c')


# Talk


def test_transcript():
  turns = [{'speaker': 'A', 'text': 'One\ntwo', 'topic': 1}, {'speaker': 'B', 'text': 'x'}, {'text': 'y', 'topic': 2},
           {'speaker': 'A', 'text': 'z', 'topic': 1}]
  assert structure_talk.transcript(json.dumps({'turns': turns})) == ['A: One two\nB: x\n', 'y\n', 'A: z\n']
  for bad, why in (('{', 'bad JSON'), ('[]', '"turns"'), ('{"turns": [1]}', '"turns"'),
                   ('{"turns": [{"text": 1}]}', 'turn 0'), (json.dumps({'turns': turns[:2]}), 'one topic')):
    with pytest.raises(NoStructure, match=why):
      structure_talk.transcript(bad)


EML = '''From: =?utf-8?q?J=C3=B6?= <j@x>
Date: Mon, 01 May 2023 10:00:00 +0000
Subject: Re: plan
Message-ID: <2@x>
In-Reply-To: <1@x>
Content-Type: text/plain; charset=utf-8
Content-Transfer-Encoding: quoted-printable

I agree=2E

On Sunday, Ann wrote:
> We should.
> On Saturday, Bob wrote:
>> Shall we?
'''


def test_message():
  assert structure_talk.message(EML) == [
      'From: Jö <j@x>\nDate: Mon, 01 May 2023 10:00:00 +0000\nSubject: Re: plan\n\nI agree.\n\n',
      'On Sunday, Ann wrote:\n> We should.\n', '> On Saturday, Bob wrote:\n>> Shall we?\n\n']
  answered = EML + '\nbut no\n'
  assert len(structure_talk.message(answered)) == 3   # a signature below is no answer in between
  with pytest.raises(NoStructure, match='quoted as a whole'):
    structure_talk.message('Subject: x\n\nOn Sunday, Ann wrote:\n> a?\nyes\n> b?\nno\n')


def test_threads():
  def mail(number, subject, refers, body):
    head = f'Message-ID: <{number}@x>\nSubject: {subject}\n' + (f'In-Reply-To: <{refers}@x>\n' if refers else '')
    return f'From a@b Mon May  1 10:00:0{number} 2023\n{head}\n{body}\n\n'
  box = (mail(1, 'plan', 0, 'one') + mail(2, 'other', 0, 'two') + mail(3, 'Re: plan', 1, '>From three') +
         mail(4, 'RE: [l] Other', 0, '4'))
  assert structure_talk.threads(box) == [['Subject: plan\n\none\n\n', 'Subject: Re: plan\n\n>From three\n\n'],
                                         ['Subject: other\n\ntwo\n\n', 'Subject: RE: [l] Other\n\n4\n\n']]
  with pytest.raises(NoStructure, match='no mbox'):
    structure_talk.threads('Subject: x\n\ny')
  with pytest.raises(NoStructure, match='more than one'):
    structure_talk.threads(mail(1, 'plan', 0, 'one'))
  odd = mail(1, 'x', 0, '').replace('\nSubject', '\nContent-Type: text/html; charset=nobody-knows\nSubject')
  assert len(structure_talk.threads(odd + mail(2, 'x', 0, 'y'))) == 1


# All of them


@few
@given(TEXTS, st.sampled_from(['.md', '.rst', '.tex', '.html', '.py', '.c', '.js', '.rb', '.eml', '.mbox', '.json']),
       st.integers(0, 30))
def test_any_text_is_cut_without_loss_or_refused(text, suffix, shortest):
  if suffix in structure_code.LANGUAGES:
    pytest.importorskip('tree_sitter_language_pack')
  options = structure_text.Options(average=0, shortest=shortest, longest=200, smallest=10)
  try:
    documents = structure.documents(text, suffix, options)
  except NoStructure:
    return
  whole = ''.join(itertools.chain.from_iterable(documents))
  if suffix == '.html':
    text = structure_text.html_text(text)[0]
  assert suffix == '.eml' or suffix == '.mbox' or whole == text
  assert all(block.strip() for blocks in documents for block in blocks)


def test_unknown_ending():
  with pytest.raises(ValueError, match='no builder reads .xyz'):
    structure.documents('x', '.xyz')


def write_folder(folder):
  (folder / 'sub').mkdir(parents=True)
  (folder / '.hidden').mkdir()
  section = '# {}\n' + 'word ' * 200 + '\n'
  for name, data in {'b.md': (section.format('A') + section.format('B')).encode(), 'sub/a.py': PYTHON.encode() * 9,
                     'n.bin': b'x', 'zero.md': b'a\0b', 'latin.md': b'# \xe9\n', 'empty.md': b'\n', 'plain.md': b'plain',
                     '.hidden/x.md': b'# x',
                     'big.md': (section.format('A') * 10 + section.format('B') + 'x' * 20_000).encode()}.items():
    (folder / name).write_bytes(data)
  (folder / 'link.md').symlink_to(folder / 'b.md')
  return folder


def run(capsys, *args):
  code = tool.main([str(arg) for arg in args])
  printed = capsys.readouterr()
  return code, printed.out + printed.err


def test_the_tool(tmp_path, capsys):
  folder, output = write_folder(tmp_path / 'in'), tmp_path / 'train_manuals.jsonl.gz'
  options = ('--category', 'manuals', '--license', 'MIT', '--source', 'here', '--longest', 20_000, '--smallest', 100)
  code, printed = run(capsys, folder, output, *options)
  assert code == 0, printed
  rows = list(schema.read(output))
  assert [row.id for row in rows] == ['b.md#0', 'big.md#0', 'sub/a.py#0'] and len(rows[0].blocks) == 2
  assert (rows[2].category, rows[2].source, rows[2].license) == ('manuals', 'here:sub/a.py', 'MIT')
  assert rows[2].text.startswith(PYTHON[:20])
  for reason in ('1 skipped: binary', 'not UTF-8: byte 2', 'unknown ending: .bin', 'skipped: empty',
                 'no structure: no headings',
                 'symbolic link', 'too long: #1 is a block of'):
    assert reason in printed
  assert '.hidden' not in printed
  first = output.read_bytes()
  run(capsys, folder, output, *options)
  assert output.read_bytes() == first


def test_the_tool_refuses(tmp_path, capsys):
  good = ('--category', 'manuals', '--license', 'MIT')
  assert run(capsys, tmp_path / 'none', tmp_path / 'o.jsonl', *good) == (
      2, f'structure: {tmp_path}/none: no folder; give the one that holds the files\n')
  assert 'use a-z' in run(capsys, tmp_path, tmp_path / 'o.jsonl', '--category', 'A-b', '--license', 'MIT')[1]
  assert 'licence' in run(capsys, tmp_path, tmp_path / 'o.jsonl', '--category', 'a', '--license', ' ')[1]
  assert 'must end in' in run(capsys, tmp_path, tmp_path / 'o.txt', *good)[1]
  assert run(capsys, tmp_path, tmp_path / 'o.jsonl', *good)[0] == 1   # no document


@pytest.mark.data
@pytest.mark.parametrize('category, suffix', [('specs', '.rst'), ('web_text', '.md'), ('textbooks', '.md')])
def test_agrees_with_the_cuts_of_real_documents(data_dir, category, suffix):
  right = found = gold = 0
  with gzip.open(data_dir / 'seg' / f'validation_{category}.jsonl.gz', 'rt', encoding='utf-8') as lines:
    rows = [row for row in map(json.loads, lines) if pathlib.PurePath(row['source']).suffix == suffix][:12]
  for row in rows:
    [blocks] = structure.documents(''.join(row['blocks']), suffix)
    ours, theirs = (set(itertools.accumulate(map(len, b[:-1]))) for b in (blocks, row['blocks']))
    right, found, gold = right + len(ours & theirs), found + len(ours), gold + len(theirs)
  assert rows and 2 * right / (found + gold) >= .97
