"""Documentation pages, from a made-up library and once from the real one, and the tokenizer of the tiny teacher."""

import collections
import dataclasses
import re
import textwrap

import numpy as np
import pytest

from blockattn.data import stdlib
from tools import tiny_tokenizer

NOUNS = ('anchors', 'baskets', 'candles', 'drawers', 'engines', 'feathers', 'glaciers', 'hammers', 'islands', 'jackets')
VERBS = ('opens', 'closes', 'counts', 'sorts', 'splits')
STYLE = stdlib.PageStyle(members=(2, 4), renamed=0.0, split_words=0, seed=3)
PAGES = range(150)
TEST, VALIDATION = [11, 12, 18, 58], [3, 15, 43, 53]


def write(root, files):
  for name, source in files.items():
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(source if isinstance(source, bytes) else textwrap.dedent(source).encode())
  return root


def class_source(noun):
  """A class of five methods; its name and theirs stand in no docstring."""
  methods = ''.join(f'  def {verb[:3]}_{noun[:3]}(self, x, *rest):\n'
                    f'    """It {verb} {noun} of every kind that it {verb}.\n\n'
                    f'    Whoever {verb} {noun} has to wait for a while, and then a little longer.\n    """\n'
                    for verb in VERBS)
  return f'class {noun.capitalize()[:-1]}Holder:\n  """Holds {noun} that somebody made."""\n{methods}'


@pytest.fixture(scope='module')
def containers(tmp_path_factory):
  root = tmp_path_factory.mktemp('library')
  return stdlib.read_containers(write(root, {f'{noun}.py': class_source(noun) for noun in NOUNS}))


def pages(containers, **changes):
  style = dataclasses.replace(STYLE, **changes)
  return [stdlib.make_page(i, containers, style) for i in PAGES]


def names_of(page):
  """(member, container) of the answer."""
  return re.fullmatch(r'\.(\w+) of ([\w.]+)', page['response']).groups()


def words(text):
  return re.findall(r'\w+', text)


# Reading.

def test_reading_a_library(tmp_path):
  two = '"""{}"""\n  def first(self): """Does the first thing."""\n  def second(self): """Does the second thing."""\n'
  root = write(tmp_path, {
      'one.py': '''
          """A module with documented functions. And more."""
          def alpha(a, /, b, *args, c, **rest):
            """Does alpha to everything. Then stops."""
          async def beta(x=1, *, a, b, c, d):
            """Waits until beta is done."""
          def undocumented(): pass
          def short(): """Too short."""
          def same(): """Waits until beta is done."""
          ''',
      'pack/__init__.py': 'class Inner:\n  ' + two.format('Stands in a package.'),
      'pack/part.py': 'def outer():\n  class Hidden(Exception):\n    ' + two.format('Inside a function.').replace(
          '\n  ', '\n    '),
      'pack/property.py': '''
          class Value:
            """Has a value that can be set."""
            @property
            def value(self): """The value as it is now."""
            @value.setter
            def value(self, x): """Sets the value anew."""
            @classmethod
            def make(cls, x): """Makes a value of something."""
          ''',
      'lonely.py': 'class One:\n  """Has a single method only."""\n  def first(self): """Does the first thing."""\n',
      'undocumented.py': 'class None_:\n  ' + two.format(''),
      'long.py': 'class Long:\n  ' + two.format('x' * 200),
      'test/test_one.py': 'class Skipped:\n  ' + two.format('Stands among the tests.'),
      'config-3.11/one.py': 'class Skipped:\n  ' + two.format('Stands among settings.'),
      'broken.py': 'class (:\n', 'latin.py': b'# \xe9\n', 'one.txt': 'no source',
  })
  found = {c.where: c for c in stdlib.read_containers(root)}
  assert list(found) == ['one', 'pack.Inner', 'pack.part.Hidden', 'pack.property.Value']
  module = found['one']
  assert (module.kind, module.name) == ('module', 'one')
  assert module.doc == 'A module with documented functions. And more.'
  assert module.sentence == 'A module with documented functions.'
  assert [(m.name, m.arguments, m.sentence) for m in module.members] == [
      ('alpha', '(a, b, *args, c, ...)', 'Does alpha to everything.'),
      ('beta', '(x, a, b, c, ...)', 'Waits until beta is done.')]
  assert module.members[0].doc == 'Does alpha to everything. Then stops.'
  value = found['pack.property.Value']
  assert (value.kind, value.name) == ('class', 'Value')
  assert [(m.name, m.arguments) for m in value.members] == [('value', '()'), ('make', '(x)')]
  assert value.members[0].sentence == 'The value as it is now.'


def test_a_library_without_source_is_named(tmp_path):
  (tmp_path / 'module.pyc').touch()
  with pytest.raises(FileNotFoundError, match=f'{tmp_path}: no Python source with docstrings; install the full'):
    stdlib.read_containers(tmp_path)


@pytest.mark.parametrize('doc, sentence', [
    ('One sentence.', 'One sentence.'),
    ('  Two sentences. Here.', 'Two sentences.'),
    ('Over\n  two lines. And on.', 'Over two lines.'),
    ('No full stop\n\nAnother paragraph.', 'No full stop'),
    ('Is it? Yes.', 'Is it?'),
    ('Stop! Now.', 'Stop!'),
    ('Reads x.y and 3.5 of e.g. these files. Then more.', 'Reads x.y and 3.5 of e.g. these files.'),
    ('Ends... Somewhere', 'Ends...'),
    ('Without an end', 'Without an end'),
    ('', '')])
def test_first_sentence(doc, sentence):
  assert stdlib.first_sentence(doc) == sentence


def test_the_splits_are_the_same_for_ever():
  container = lambda where: stdlib.Container('class', where, where, '', '', ())
  split = lambda i: stdlib.split_of(container(f'module.C{i}'))
  assert {name: [i for i in range(60) if split(i) == name] for name in ('test', 'validation')} == {
      'test': TEST, 'validation': VALIDATION}
  everything = [container(f'm{i}.C') for i in range(2000)]
  train, validation, test = (stdlib.split_containers(everything, name) for name in stdlib.SPLITS)
  assert sorted(c.where for c in train + validation + test) == sorted(c.where for c in everything)
  assert all(80 < len(part) < 170 for part in (validation, test))   # one in sixteen, +- 4 standard deviations
  with pytest.raises(ValueError, match="split='dev'; choose one of train, validation, test"):
    stdlib.split_containers(everything, 'dev')


# Pages.

def test_a_page_by_hand(tmp_path):
  library = stdlib.read_containers(write(tmp_path, {f'{NOUNS[0]}.py': class_source(NOUNS[0])}))
  page = stdlib.make_page(0, library, stdlib.PageStyle(members=(2, 2), doc_chars=24, renamed=0.0, split_words=0))
  (member, name), index = names_of(page), page['gold']
  verb = next(v for v in VERBS if member == f'{v[:3]}_anc')
  sentence = f'It {verb} anchors of every kind that it {verb}.'
  assert len(page['blocks']) == 3 and index in ([0, 1], [0, 2])
  assert page['blocks'][0] == 'class AnchorHolder\nHolds anchors that somebody made.\n' and name == 'AnchorHolder'
  assert page['blocks'][index[1]] == f'{sentence}\n.{member}(x, *rest)\nWhoever {verb} anchors ...\n'
  assert page['prompt'] == f'Which member: {sentence}\n'
  assert page['id'] == f'anchors.AnchorHolder.{member}#0'


def test_pages_depend_on_seed_and_index_alone(containers):
  first = pages(containers)
  assert first == pages(containers)
  assert first[7] == stdlib.make_page(7, tuple(containers), dataclasses.replace(STYLE))
  assert len({page['id'].split('#')[0] for page in first}) > 40
  assert sum(a == b for a, b in zip(first, pages(containers, seed=4), strict=True)) == 0


@pytest.mark.parametrize('renamed', [0.0, 1.0])
def test_the_answer_stands_in_its_two_blocks(containers, renamed):
  """The container's name in the header only, the member's beside its sentence only."""
  for page in pages(containers, renamed=renamed):
    member, name = names_of(page)
    header, entry = page['gold']
    asked = page['prompt'].removeprefix('Which member: ').strip()
    assert [i for i, block in enumerate(page['blocks']) if asked in block] == [entry]
    assert header == 0 and page['blocks'][0].split()[1] == name
    assert page['blocks'][entry].split('\n')[1].startswith(f'.{member}(')
    assert [i for i, block in enumerate(page['blocks']) if f'.{member}' in re.findall(r'\.\w+', block)] == [entry]
    if not renamed:   # a made-up name may happen to be a word of the text
      assert [i for i, block in enumerate(page['blocks']) if name in words(block)] == [header]
      assert member not in words(page['prompt']) and name not in words(page['prompt'])


@pytest.mark.parametrize('renamed', [0.0, 1.0])
def test_names_of_a_page_are_distinct(containers, renamed):
  counts = collections.Counter()
  for page in pages(containers, renamed=renamed):
    members = [block.split('\n')[1].partition('(')[0] for block in page['blocks'][1:]]
    assert len({page['blocks'][0].split()[1], *members}) == 1 + len(members)
    assert len({block.split('\n')[0] for block in page['blocks'][1:]}) == len(members)
    counts[len(members)] += 1
  assert set(counts) == {2, 3, 4} and min(counts.values()) > 30


def test_questions_about_different_members(containers):
  counts = collections.Counter()
  for plain, page in zip(pages(containers, questions=(1, 1)), pages(containers, questions=(2, 4)), strict=True):
    assert plain['prompt'].count('Which member: ') == 1
    asked = re.findall(r'Which member: (.*)\n(?:\.(\w+) of (\w+)\n)?', page['prompt'])
    assert ''.join(f'Which member: {sentence}\n' + (f'.{member} of {name}\n' if member else '')
                   for sentence, member, name in asked) == page['prompt']
    *answered, last = asked
    assert last[1:] == ('', '')
    for sentence, member, name in [*answered, (last[0], *names_of(page))]:
      holding = [block for block in page['blocks'] if sentence in block]
      assert len(holding) == 1 and f'{sentence}\n.{member}(' in holding[0]
      assert page['blocks'][0].split()[1] == name
    assert len({sentence for sentence, *_ in asked}) == len(asked) <= len(page['blocks']) - 1
    counts[len(asked)] += 1
  assert set(counts) == {2, 3, 4} and min(counts.values()) > 10


def test_other_names_are_other_names(containers):
  theirs = {c.where: c for c in containers}
  changed = 0
  for plain, page in zip(pages(containers), pages(containers, renamed=1.0), strict=True):
    assert plain != page
    member, name = names_of(page)
    where = page['id'].split('#')[0].rpartition('.')[0]   # its own name
    changed += theirs[where].name != name and member not in {m.name for m in theirs[where].members}
  assert changed > 0.75 * len(PAGES)   # by chance a name may be its own


def test_the_share_of_renamed_pages(containers):
  known = {c.name for c in containers}
  share = np.mean([page['blocks'][0].split()[1] not in known for page in pages(containers, renamed=0.3)])
  # Half of the other names are names of others.
  assert abs(share - 0.15) < 4 * (0.15 * 0.85 / len(PAGES)) ** 0.5


@pytest.mark.parametrize('chars, words_kept', [(10, 1), (35, 5), (1000, 13)])
def test_docstrings_are_cut_between_words(containers, chars, words_kept):
  for page in pages(containers, doc_chars=chars):
    for block in page['blocks']:
      if block.startswith('It '):
        sentence, _, rest = block.strip().split('\n')
        _, verb, noun, *_ = sentence.split()
        whole = f'Whoever {verb} {noun} has to wait for a while, and then a little longer.'
        kept = whole[:chars].rpartition(' ')[0] + ' ...' if chars < len(whole) else whole
        assert rest == kept and abs(len(rest.split()) - (chars < len(whole)) - words_kept) <= 1


@pytest.mark.parametrize('count', [1, 3, 50])
def test_sentences_cut_by_length(containers, count):
  """A member's block begins with the last words of its sentence, which no other shares; the rest end the block before."""
  for page in pages(containers, split_words=count):
    member, name = names_of(page)
    header, entry = (page['blocks'][i] for i in page['gold'])
    sentence = page['prompt'].removeprefix('Which member: ').strip()
    asked = sentence.split()
    assert f'\n{sentence}\n.{member}(' in ''.join(page['blocks'])
    assert entry.split('\n')[0].split() == asked[-count:] and entry.split('\n')[1].startswith(f'.{member}(')
    assert header.split()[1] == name
    tails = [block.split('\n')[0] for block in page['blocks'][1:]]
    assert len(set(tails)) == len(tails) >= 2
    if count < len(asked):
      assert not any(sentence in block for block in page['blocks'])
      assert page['blocks'][page['gold'][1] - 1].endswith('\n' + ' '.join(asked[:-count]))


def test_members_that_end_alike_stay_apart(tmp_path):
  source = class_source('anchors').replace('that it opens.', 'that it closes.')   # two members end alike
  library = stdlib.read_containers(write(tmp_path, {'anchors.py': source}))
  both = lambda page: all(f'It {verb} anchors' in ''.join(page['blocks']) for verb in ('opens', 'closes'))
  drawn = lambda count: [both(page) for page in pages(library, split_words=count, members=(4, 4))]
  assert any(drawn(0)) and any(drawn(8)) and not any(drawn(1))


def test_pages_that_cannot_be_drawn(containers):
  with pytest.raises(ValueError, match='10 containers do not give a page of 6 members that can be told apart; ask'):
    stdlib.make_page(0, containers, stdlib.PageStyle(members=(6, 6), renamed=0.0, split_words=0))
  with pytest.raises(ValueError, match='0 containers do not give a page of 2'):
    stdlib.make_page(0, (), STYLE)


# The tokenizer.

@pytest.fixture(scope='module')
def tokenizer(containers):
  texts = [''.join(page['blocks']) + page['prompt'] + page['response'] for page in pages(containers, renamed=0.5)]
  return tiny_tokenizer.train(texts, 400)


def encode(tokenizer, text):
  return tokenizer(text, add_special_tokens=False)['input_ids']


def test_the_tokenizer_gives_texts_back(tokenizer, tmp_path):
  assert len(tokenizer) == 400
  assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.decode([0])) == (0, 0, '<|endoftext|>')
  tokenizer.save_pretrained(tmp_path)
  for text in ('', ' ', 'a\n\n b\t"c" <d>.\r\n', 'self.x_y = 12_345  # two  blanks', " don't , join .",
               'é ü 漢字 \U0001f600', 'x' * 300):
    assert tokenizer.decode(encode(tokenizer, text)) == text
    assert 0 not in encode(tokenizer, text)


def test_names_are_cut_alike_in_page_and_answer(tokenizer, containers):
  joined = 0
  for page in pages(containers, renamed=0.5):
    member, name = names_of(page)
    answer = encode(tokenizer, page['response'])
    point, of = encode(tokenizer, '.'), encode(tokenizer, ' of')
    own, container = encode(tokenizer, member), encode(tokenizer, f' {name}')
    assert answer == [*point, *own, *of, *container]
    header, entry = (encode(tokenizer, page['blocks'][i]) for i in page['gold'])
    holds = lambda tokens, part: any(tokens[i:i + len(part)] == part for i in range(len(tokens)))
    assert holds(header, container) and holds(entry, [*point, *own])
    joined += len(container) < len(f' {name}')
  assert joined > 0.9 * len(PAGES)


# The real library, read once.

def test_the_library_of_this_python():
  found = stdlib.read_containers()
  assert found is stdlib.read_containers()
  assert len(found) > 300 and sum(len(c.members) for c in found) > 3000
  assert {'collections.Counter', 'fractions.Fraction', 'shutil'} <= {c.where for c in found}
  assert not any(c.where.startswith(('test.', 'idlelib.', 'site-packages.')) for c in found)
  for split in ('validation', 'test'):
    assert 0.02 < len(stdlib.split_containers(found, split)) / len(found) < 0.12
  for i in range(40):
    page = stdlib.make_page(i, found, stdlib.PageStyle(renamed=0.5, split_words=0))
    member, name = names_of(page)
    header, entry = page['gold']
    assert page['blocks'][header].split()[1] == name and f'\n.{member}(' in page['blocks'][entry]
  texts = list(tiny_tokenizer.page_texts(3))
  assert len(set(texts)) == 3 and all(re.search(r'\nWhich member: .+\n\.\w+ of [\w.]+$', text) for text in texts)
