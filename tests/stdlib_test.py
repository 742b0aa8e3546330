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
STYLE = stdlib.PageStyle(containers=(2, 3), members=(1, 4), listed=0.5, seed=3)
PAGES = range(150)


def write(root, files):
  for name, source in files.items():
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(source if isinstance(source, bytes) else textwrap.dedent(source).encode())
  return root


def class_source(noun):
  """A class of five methods; its name and theirs stand in no docstring."""
  methods = ''.join(f'  def {verb[:3]}_{noun[:3]}(self, x, *rest):\n    """It {verb} {noun} of every kind.\n\n'
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


def test_the_held_out_split_is_the_same_for_ever():
  container = lambda where: stdlib.Container('class', where, where, '', '', ())
  held = lambda where: stdlib.is_held_out(container(where))
  assert [held(f'module.C{i}') for i in range(20)] == [i in (3, 11, 12, 15, 18) for i in range(20)]
  everything = [container(f'm{i}.C') for i in range(2000)]
  test, train = (stdlib.split_containers(everything, held_out) for held_out in (True, False))
  assert not {c.where for c in test} & {c.where for c in train} and len(test) + len(train) == 2000
  assert 200 < len(test) < 300   # one in eight, +- 3 standard deviations


# Pages.

def test_a_page_by_hand(tmp_path):
  root = write(tmp_path, {f'{noun}.py': class_source(noun) for noun in NOUNS[:2]})
  both = stdlib.read_containers(root)
  page = stdlib.make_page(0, both, stdlib.PageStyle(containers=(2, 2), members=(2, 2), doc_chars=22, listed=1.0))
  (member, name), index = names_of(page), page['gold']
  noun = next(n for n in NOUNS if name.startswith(n.capitalize()[:-1]))
  verb = next(v for v in VERBS if member == f'{v[:3]}_{noun[:3]}')
  header, entry, sentence = page['blocks'][index[0]], page['blocks'][index[1]], f'It {verb} {noun} of every kind.'
  listed = re.fullmatch(rf'class {name} has (\.\w+) (\.\w+)\nHolds {noun} that somebody made\.\n', header).groups()
  assert len(page['blocks']) == 6 and f'.{member}' in listed and len(set(listed)) == 2
  assert entry == f'{sentence}\n.{member}(x, *rest)\nWhoever {verb} {noun} ...\n'
  assert page['prompt'] == f'Which member: {sentence}\n'
  assert page['id'] == f'{noun}.{name}.{member}#0'


def test_pages_depend_on_seed_and_index_alone(containers):
  first = pages(containers)
  assert first == pages(containers)
  assert first[7] == stdlib.make_page(7, tuple(containers), dataclasses.replace(STYLE))
  assert len({page['id'].split('#')[0] for page in first}) > 40
  assert sum(a == b for a, b in zip(first, pages(containers, seed=4), strict=True)) == 0


@pytest.mark.parametrize('renamed', [0.0, 1.0])
@pytest.mark.parametrize('listed', [0.0, 1.0])
def test_the_answer_stands_in_its_two_blocks(containers, listed, renamed):
  """The name of the container in its header only; the member's beside its sentence, and in the header if it lists."""
  for page in pages(containers, listed=listed, renamed=renamed):
    member, name = names_of(page)
    header, entry = page['gold']
    asked = page['prompt'].removeprefix('Which member: ').strip()
    assert [i for i, block in enumerate(page['blocks']) if asked in block] == [entry]
    assert page['blocks'][header].split()[1] == name and page['blocks'][entry].split('\n')[1].startswith(f'.{member}(')
    named = [i for i, block in enumerate(page['blocks']) if f'.{member}' in re.findall(r'\.\w+', block)]
    assert named == ([header, entry] if listed else [entry])
    headers = [block.split()[1] for block in page['blocks'] if block.startswith('class ')]
    assert headers.count(name) == 1
    if not renamed:   # a made-up name may happen to be a word of the text
      assert [i for i, block in enumerate(page['blocks']) if name in words(block)] == [header]
      assert member not in words(page['prompt']) and name not in words(page['prompt'])
    # The header of a member is the last one before it.
    assert [i for i in range(entry) if page['blocks'][i].startswith('class ')][-1] == header


@pytest.mark.parametrize('renamed', [0.0, 1.0])
def test_names_of_a_page_are_distinct(containers, renamed):
  counts = collections.Counter()
  for page in pages(containers, renamed=renamed):
    headers = [block.split()[1] for block in page['blocks'] if block.startswith('class ')]
    members = [block.split('\n')[1].partition('(')[0] for block in page['blocks'] if not block.startswith('class ')]
    assert len({*headers, *members}) == len(headers) + len(members)
    sentences = [block.split('\n')[not block.startswith('It ')] for block in page['blocks']]
    assert len(set(sentences)) == len(sentences)
    assert 2 <= len(headers) <= 3 and len(members) <= 4 * len(headers)
    counts[len(headers)] += 1
  assert min(counts[2], counts[3]) > 40


def test_other_names_are_other_names(containers):
  theirs = {c.where: c for c in containers}
  changed = 0
  for plain, page in zip(pages(containers), pages(containers, renamed=1.0), strict=True):
    assert plain != page
    member, name = names_of(page)
    where = page['id'].split('#')[0].removesuffix(f'.{member}')
    changed += theirs[where].name != name and member not in {m.name for m in theirs[where].members}
  assert changed > 0.75 * len(PAGES)   # by chance a name may be its own


def test_shares_of_renamed_and_listed_pages(containers):
  listed = np.mean([' has .' in page['blocks'][0] for page in pages(containers, listed=0.5)])
  known = {c.name for c in containers}
  renamed = np.mean([not known >= {block.split()[1] for block in page['blocks'] if block.startswith('class ')}
                     for page in pages(containers, renamed=0.3)])
  spread = lambda share: 4 * (share * (1 - share) / len(PAGES)) ** 0.5
  assert abs(listed - 0.5) < spread(0.5)
  # Half of the other names are names of others: a page of two headers or three shows none with probability < 1/4.
  assert 0.3 * 3 / 4 - spread(0.3) < renamed < 0.3 + spread(0.3)


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
  """The text stays; a member's block begins with the last words of its sentence, the others end the block before."""
  for plain, page in zip(pages(containers), pages(containers, split_words=count), strict=True):
    assert ''.join(page['blocks']) == ''.join(plain['blocks']) and len(page['blocks']) == len(plain['blocks'])
    assert {key: page[key] for key in page if key != 'blocks'} == {key: plain[key] for key in plain if key != 'blocks'}
    member, name = names_of(page)
    header, entry = (page['blocks'][i] for i in page['gold'])
    asked = page['prompt'].removeprefix('Which member: ').split()
    assert entry.split('\n')[0].split() == asked[-count:] and entry.split('\n')[1].startswith(f'.{member}(')
    assert header.split()[1] == name
    if count < len(asked):
      assert not any(' '.join(asked) in block for block in page['blocks'])
      assert page['blocks'][page['gold'][1] - 1].endswith('\n' + ' '.join(asked[:-count]))


def test_pages_that_cannot_be_drawn(containers):
  three = stdlib.PageStyle(containers=(3, 3))
  with pytest.raises(ValueError, match='2 containers do not give a page of 3 without a name or a sentence twice; ask'):
    stdlib.make_page(0, tuple(containers[:2]), three)
  with pytest.raises(ValueError, match='0 containers do not give a page of 3'):
    stdlib.make_page(0, (), three)


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
  test = stdlib.split_containers(found, held_out=True)
  assert 0.06 < len(test) / len(found) < 0.2
  for i in range(40):
    page = stdlib.make_page(i, found, stdlib.PageStyle(renamed=0.5))
    member, name = names_of(page)
    header, entry = page['gold']
    assert page['blocks'][header].split()[1] == name and f'\n.{member}(' in page['blocks'][entry]
  texts = list(tiny_tokenizer.page_texts(3))
  assert len(set(texts)) == 3 and all(re.search(r'\nWhich member: .+\n\.\w+ of [\w.]+$', text) for text in texts)
