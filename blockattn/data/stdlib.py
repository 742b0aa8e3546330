"""The embedded default corpus: questions over the documentation of Python's own standard library.

Nothing is downloaded and nothing is imported: the library's source files are parsed, and every class or module with
documented members becomes a `Container`. One example is one documentation page: a header, a few of the container's
members, then the question. The question gives the first sentence of a member's docstring; the answer is the member's
name and its container's:

    class OrderedDict
    Dictionary that remembers insertion order
    Remove and return a                             block 0
     (key, value) pair.
    .popitem(last)
    ...
    Move an existing element to                     block 1
     the end.
    .move_to_end(key, last)
    ...                                             block 2
    Which member: Remove and return a (key, value) pair.
    .popitem of OrderedDict                         the answer

The container's name stands in another block than the member's, and with `PageStyle.split_words` each sentence begins in
one block and ends in the next, as cuts by length leave it. The words that stay with the name tell a page's members
apart, so a reader of blocks can know all that a reader of the whole page knows.
"""

import ast
import dataclasses
import functools
import hashlib
import pathlib
import re
import sysconfig
import warnings

import numpy as np

from blockattn import errors
from blockattn.errors import UserError

# Tests, tools with a user interface of their own, generated tables: little prose, or prose that repeats itself.
_SKIPPED = frozenset({'test', 'tests', 'idlelib', 'idle_test', 'site-packages', 'lib2to3', 'turtledemo', 'pydoc_data',
                      'ensurepip', '__pycache__', '__phello__', '_pyrepl'})
_LONGEST_SENTENCE = 160   # characters; longer "sentences" are tables and listings
_SHORTEST_SENTENCE = 12
SPLITS = ('train', 'validation', 'test')
_MOST_DRAWS = 1000         # of containers for one page, before it is called impossible


@dataclasses.dataclass(frozen=True, eq=False)   # by identity: tuples of these are keys of a cache
class Member:
  name: str
  arguments: str   # '(key, last)'
  doc: str         # the cleaned docstring
  sentence: str    # its first sentence


@dataclasses.dataclass(frozen=True, eq=False)
class Container:
  kind: str        # 'class' or 'module'
  name: str        # 'OrderedDict', 'shutil'
  where: str       # 'collections.OrderedDict', 'shutil': unique, decides the split
  doc: str         # the cleaned docstring
  sentence: str    # its first sentence
  members: tuple[Member, ...]


@dataclasses.dataclass(frozen=True)
class PageStyle:
  """How pages are drawn from containers.

  Attributes:
    members: fewest and most members of a page, both included.
    questions: fewest and most questions, both included, each about another member. All but the last are answered in the
      prompt. There are never more than members.
    doc_chars: what follows a docstring's first sentence is cut at this many characters, between words.
    renamed: share of pages whose container and members get other names, made up or of others. A reader of such a page
      cannot answer from memory of the library; it has to copy.
    split_words: how many words at the end of a member's sentence share a block with its name; the words before them end
      the previous block, as a cut by length leaves them. No two members of a page end in the same words. 0: every block
      begins with its sentence.
    seed: together with a page's index it decides everything about the page.
  """
  members: tuple[int, int] = (2, 4)
  questions: tuple[int, int] = (1, 1)
  doc_chars: int = 40
  renamed: float = 0.7
  split_words: int = 3
  seed: int = 0

  def __post_init__(self):
    where = 'config.data.pages.'
    for name in ('members', 'questions'):
      pair = getattr(self, name)
      if len(pair) != 2 or not all(isinstance(number, int) for number in pair):
        raise UserError(f'{where}{name}={pair}; give two numbers, the fewest and the most: 2,4')
      errors.check_number(where + name, pair[0], 1)
      errors.check_number(where + name, pair[1], pair[0])
    for name, most in (('renamed', 1), ('doc_chars', None), ('split_words', None), ('seed', None)):
      errors.check_number(where + name, getattr(self, name), 0, most)


def first_sentence(doc: str) -> str:
  """The first sentence of a docstring's first paragraph, on one line."""
  paragraph = ' '.join(doc.strip().split('\n\n')[0].split())
  match = re.match(r'(.+?[.!?])(?= [A-Z]|$)', paragraph)
  return match.group(1) if match else paragraph


def _sentence(doc):
  """The first sentence if it is of a length that a question can hold, else ''."""
  sentence = first_sentence(doc)
  return sentence if _SHORTEST_SENTENCE <= len(sentence) <= _LONGEST_SENTENCE else ''


def _arguments(arguments):
  names = [a.arg for a in arguments.posonlyargs + arguments.args]
  names += ['*' + arguments.vararg.arg] if arguments.vararg else []
  names += [a.arg for a in arguments.kwonlyargs]
  names += ['**' + arguments.kwarg.arg] if arguments.kwarg else []
  names = [n for n in names if n not in ('self', 'cls')]
  return ', '.join(names[:4] + ['...'] * (len(names) > 4))


def _container(kind, name, where, node):
  members = {}
  for one in node.body:
    if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef):
      doc = ast.get_docstring(one) or ''
      sentence = _sentence(doc)
      # A sentence that two members share has no single answer; a name that occurs twice is a property's setter.
      if sentence and one.name not in members and all(sentence != m.sentence for m in members.values()):
        members[one.name] = Member(one.name, f'({_arguments(one.args)})', ' '.join(doc.split()), sentence)
  doc = ast.get_docstring(node) or ''
  return Container(kind, name, where, ' '.join(doc.split()), _sentence(doc), tuple(members.values()))


def _statements(tree):
  """Those of a module, outer ones first. `ast.walk` would visit all expressions, too, which takes longer than parsing."""
  found = [tree]
  for node in found:
    for name in ('body', 'handlers', 'orelse', 'finalbody', 'cases'):
      inner = getattr(node, name, ())
      found += inner if isinstance(inner, list) else ()   # of a conditional expression it is one node
  return found


@functools.cache
def read_containers(root=None):
  """Every documented class and module with at least two documented members, sorted by `where`.

  Args:
    root: the folder of the library's source; None: the running interpreter's own.

  Raises FileNotFoundError: it holds no Python source (an interpreter that ships compiled files only)."""
  root = pathlib.Path(root or sysconfig.get_paths()['stdlib'])
  containers = {}
  for path in sorted(root.rglob('*.py')):
    parts = path.relative_to(root).with_suffix('').parts
    if any(part in _SKIPPED or part.startswith('config-') for part in parts):
      continue
    module = '.'.join(parts).removesuffix('.__init__')
    try:
      with warnings.catch_warnings():
        warnings.simplefilter('ignore')   # invalid escapes in old modules are not our concern
        tree = ast.parse(path.read_text(encoding='utf-8'))
    except (SyntaxError, UnicodeDecodeError):
      continue                            # the library ships templates and samples that are not valid source
    found = [_container('module', module, module, tree)]
    found += [_container('class', node.name, f'{module}.{node.name}', node)
              for node in _statements(tree) if isinstance(node, ast.ClassDef)]
    containers.update({c.where: c for c in found if c.sentence and len(c.members) >= 2})
  if not containers:
    raise FileNotFoundError(f'{root}: no Python source with docstrings; install the full standard library')
  return tuple(containers[where] for where in sorted(containers))


def split_of(container):
  """'train', 'validation' (one container in sixteen) or 'test' (one in sixteen), by a hash of its name."""
  digit = hashlib.sha256(container.where.encode()).digest()[0] // 16
  return {0: 'test', 1: 'validation'}.get(digit, 'train')


def split_containers(containers, split):
  """The containers of a split, in order, as a tuple."""
  errors.check_choice('split', split, SPLITS)
  return tuple(c for c in containers if split_of(c) == split)


@functools.cache
def _name_pools(containers):
  """What other names are made of: {'class', 'module', 'member': real names, 'words': pieces of them}."""
  classes, modules = (sorted({c.name for c in containers if c.kind == kind}) for kind in ('class', 'module'))
  members = sorted({m.name for c in containers for m in c.members})
  pieces = {p.lower() for n in classes + members for p in re.findall(r'[A-Z]?[a-z]+|[A-Z]+(?![a-z])', n)}
  return {'class': classes, 'module': modules, 'member': members, 'words': sorted(p for p in pieces if 2 <= len(p) <= 8)}


def _other_name(rng, pools, kind):
  if (names := pools[kind]) and rng.random() < 0.5:
    return names[rng.integers(len(names))]
  words = [pools['words'][i] for i in rng.integers(len(pools['words']), size=rng.integers(1, 4))]
  if rng.random() < 0.3:   # letters that are no word at all
    words[0] = ''.join(chr(97 + i) for i in rng.integers(26, size=rng.integers(2, 6)))
  if kind == 'class':
    return words[0].upper() if rng.random() < 0.2 else ''.join(w.capitalize() for w in words)
  if kind == 'module':
    return '.'.join(words)
  return '_'.join(words) if rng.random() < 0.7 else ''.join(words)


def _renamed(rng, container, members, pools):
  """The container and its members under other names, all different."""
  taken: set[str | None] = {None}

  def fresh(kind):
    name = None
    while name in taken:
      name = _other_name(rng, pools, kind)
    taken.add(name)
    return name

  return (dataclasses.replace(container, name=fresh(container.kind)),
          [dataclasses.replace(m, name=fresh('member')) for m in members])


def _cut_sentence(sentence, words):
  """(what ends the previous block, what stands with the member's name); joined they are the sentence."""
  head = ' '.join(sentence.split(' ')[:-words]) if words else ''
  return head, sentence.removeprefix(head)


def _choose(rng, containers, style):
  """(container, its members on the page in page order)."""
  for _ in range(_MOST_DRAWS if containers else 0):
    container = containers[rng.integers(len(containers))]
    wanted = int(rng.integers(style.members[0], style.members[1] + 1))
    members, taken = [], {container.sentence, container.name}
    for i in rng.permutation(len(container.members)):
      member = container.members[i]
      own = {member.name, member.sentence, _cut_sentence(member.sentence, style.split_words)[1].strip()}
      if len(members) < wanted and not own & taken:
        taken |= own
        members.append(member)
    if len(members) >= style.members[0]:
      return container, members
  raise UserError(f'{len(containers)} containers do not give a page of {style.members[0]} members that can be told '
                  'apart; ask for fewer (PageStyle.members), keep more words together (split_words) or read more source')


def _blocks(container, members, style):
  blocks = [f'{container.kind} {container.name}\n{container.sentence}\n']
  for member in members:
    head, tail = _cut_sentence(member.sentence, style.split_words)
    rest = member.doc.removeprefix(member.sentence).strip()
    if len(rest) > style.doc_chars:
      rest = rest[:style.doc_chars].rpartition(' ')[0] + ' ...'
    blocks[-1] += head
    blocks.append(f'{tail}\n.{member.name}{member.arguments}\n' + (f'{rest}\n' if rest else ''))
  return blocks


def make_page(index, containers, style):
  """One example; page `index`, any integer, of a (containers, style) pair is always the same.

  Args:
    containers: tuple of `Container` to draw from.

  Returns:
    {'id', 'blocks', 'prompt', 'response', 'gold'}: the header and member blocks, the questions, the last one's answer,
    and the indices of the two blocks that hold it.

  Raises ValueError: the containers are too few for such a page."""
  rng = np.random.default_rng((style.seed, index))
  container, members = _choose(rng, containers, style)
  asked = rng.permutation(len(members))[:rng.integers(style.questions[0], style.questions[1] + 1)]
  where = f'{container.where}.{members[asked[-1]].name}'
  if rng.random() < style.renamed:
    container, members = _renamed(rng, container, members, _name_pools(containers))
  question = lambda i: f'Which member: {members[i].sentence}\n'
  answer = lambda i: f'.{members[i].name} of {container.name}'
  *answered, last = asked
  return {'id': f'{where}#{index}', 'blocks': _blocks(container, members, style), 'gold': [0, 1 + int(last)],
          'prompt': ''.join(f'{question(i)}{answer(i)}\n' for i in answered) + question(last), 'response': answer(last)}
