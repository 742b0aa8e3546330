"""The embedded default corpus: questions over the documentation of Python's own standard library.

Nothing is downloaded and nothing is imported: the library's source files are parsed, and every class or module with
documented members becomes a `Container`. One example is one documentation page: for each of a few containers a header
block, then one block for each of a few of its members; then the question. The question gives the first sentence of a
member's docstring; the answer is the member's name and its container's:

    class OrderedDict                                           block 0
    Dictionary that remembers insertion order
    Remove and return a
     (key, value) pair.                                         block 1
    .popitem(last)
    ...
    Which member: Remove and return a (key, value) pair.
    .popitem of OrderedDict                                     the answer

The container's name stands in another block than the member's, and with `PageStyle.split_words` each sentence begins in
one block and ends in the next, as cuts by length leave it: no block answers alone.
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

# Tests, tools with a user interface of their own, generated tables: little prose, or prose that repeats itself.
_SKIPPED = frozenset({'test', 'tests', 'idlelib', 'idle_test', 'site-packages', 'lib2to3', 'turtledemo', 'pydoc_data',
                      'ensurepip', '__pycache__', '__phello__', '_pyrepl'})
_LONGEST_SENTENCE = 160   # characters; longer "sentences" are tables and listings
_SHORTEST_SENTENCE = 12
_MOST_DRAWS = 1000         # of containers for one page, before it is called impossible


@dataclasses.dataclass(frozen=True, eq=False)   # by identity: tuples of these are keys of a cache
class Member:
  name: str
  arguments: str   # '(self, last=True)'
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
    containers: fewest and most containers of a page, both included.
    members: fewest and most members of each container.
    doc_chars: what follows a docstring's first sentence is cut at this many characters, between words.
    renamed: share of pages whose containers and members get other names, made up or of others. A reader of such a page
      cannot answer from memory of the library; it has to copy.
    listed: share of pages whose headers list the members.
    split_words: how many words at the end of a member's sentence share a block with its name; the words before them end
      the previous block, as a cut by length leaves them. 0: every block begins with its sentence. The text of the page
      is the same either way.
    seed: together with a page's index it decides everything about the page.
  """
  containers: tuple[int, int] = (1, 1)
  members: tuple[int, int] = (2, 4)
  doc_chars: int = 40
  renamed: float = 0.0
  listed: float = 0.0
  split_words: int = 0
  seed: int = 0


def first_sentence(doc):
  """The first sentence of a docstring's first paragraph, on one line."""
  paragraph = ' '.join(doc.strip().split('\n\n')[0].split())
  match = re.match(r'(.+?[.!?])(?= [A-Z]|$)', paragraph)
  return match.group(1) if match else paragraph


def _sentence(doc):
  """The first sentence if it is of a length that a question can hold, else None."""
  sentence = first_sentence(doc or '')
  return sentence if _SHORTEST_SENTENCE <= len(sentence) <= _LONGEST_SENTENCE else None


def _member(node):
  doc = ast.get_docstring(node)
  sentence = _sentence(doc)
  if sentence is None:
    return None
  return Member(node.name, f'({_arguments(node.args)})', ' '.join(doc.split()), sentence)


def _arguments(arguments):
  names = [a.arg for a in arguments.posonlyargs + arguments.args]
  if arguments.vararg:
    names.append('*' + arguments.vararg.arg)
  names += [a.arg for a in arguments.kwonlyargs]
  if arguments.kwarg:
    names.append('**' + arguments.kwarg.arg)
  names = [n for n in names if n not in ('self', 'cls')]
  return ', '.join(names[:4] + (['...'] if len(names) > 4 else []))


def _container(kind, name, where, doc, body):
  functions = (ast.FunctionDef, ast.AsyncFunctionDef)
  members = [_member(node) for node in body if isinstance(node, functions)]
  unique = {}
  for member in members:
    # A sentence that two members share has no single answer; a name that occurs twice is a property's setter.
    if member and member.name not in unique and all(member.sentence != m.sentence for m in unique.values()):
      unique[member.name] = member
  return Container(kind, name, where, ' '.join((doc or '').split()), _sentence(doc), tuple(unique.values()))


@functools.cache
def read_containers(root=None):
  """Every documented class and module of the library with at least two documented members, sorted by `where`.

  Args:
    root: the folder of the library's source; the running interpreter's own if None.

  Raises:
    FileNotFoundError: the folder holds no Python source (an interpreter that ships compiled files only).
  """
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
    found = [_container('module', module, module, ast.get_docstring(tree), tree.body)]
    found += [_container('class', node.name, f'{module}.{node.name}', ast.get_docstring(node), node.body)
              for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    containers.update({c.where: c for c in found if c.sentence and len(c.members) >= 2})
  if not containers:
    raise FileNotFoundError(f'{root}: no Python source with docstrings; install the full standard library')
  return tuple(containers[where] for where in sorted(containers))


def is_held_out(container):
  """Whether a container belongs to the test split: about one in eight, by a hash of its name."""
  return hashlib.sha256(container.where.encode()).digest()[0] < 32


def split_containers(containers, held_out):
  return [c for c in containers if is_held_out(c) == held_out]


@functools.cache
def _name_pools(containers):
  """What other names are made of: {'class': real names, 'member': real names, 'words': pieces of them}."""
  classes = sorted({c.name for c in containers if c.kind == 'class'})
  members = sorted({m.name for c in containers for m in c.members})
  pieces = {p.lower() for n in classes + members for p in re.findall(r'[A-Z]?[a-z]+|[A-Z]+(?![a-z])', n)}
  return {'class': classes, 'member': members, 'words': sorted(p for p in pieces if 2 <= len(p) <= 8)}


def _other_name(rng, pools, kind):
  if pools[kind] and rng.random() < 0.5:
    return pools[kind][rng.integers(len(pools[kind]))]
  words = [pools['words'][i] for i in rng.integers(len(pools['words']), size=rng.integers(1, 4))]
  if rng.random() < 0.3:   # letters that are no word at all
    words[0] = ''.join(chr(97 + i) for i in rng.integers(26, size=rng.integers(2, 6)))
  if kind == 'class':
    return ''.join(w.capitalize() for w in words)
  return '_'.join(words) if rng.random() < 0.7 else ''.join(words)


def _renamed(rng, chosen, pools):
  """The chosen (container, members) pairs under other names, all different."""
  taken = set()
  def fresh(kind):
    while True:
      name = _other_name(rng, pools, kind)
      if name not in taken:
        taken.add(name)
        return name
  return [(dataclasses.replace(container, name=fresh('class')),
           [dataclasses.replace(m, name=fresh('member')) for m in members]) for container, members in chosen]


def _choose(rng, containers, style):
  """[(container, its members on the page), ...] in page order; no two share a name or a sentence."""
  count = rng.integers(style.containers[0], style.containers[1] + 1)
  chosen, taken = [], set()
  for _ in range(_MOST_DRAWS if containers else 0):
    if len(chosen) == count:
      return chosen
    container = containers[rng.integers(len(containers))]
    size = min(len(container.members), int(rng.integers(style.members[0], style.members[1] + 1)))
    members = [container.members[i] for i in rng.choice(len(container.members), size=size, replace=False)]
    own = {container.sentence, container.name} | {x for m in members for x in (m.sentence, m.name)}
    if not own & taken:
      taken |= own
      chosen.append((container, members))
  raise ValueError(f'{len(containers)} containers do not give a page of {count} without a name or a sentence twice; '
                   'ask for fewer (PageStyle.containers) or read more source')


def _header(container, members, listed):
  names = ' has ' + ' '.join(f'.{m.name}' for m in members) if listed else ''
  return f'{container.kind} {container.name}{names}\n{container.sentence}\n'


def _entry(member, chars):
  rest = member.doc.removeprefix(member.sentence).strip()
  if len(rest) > chars:
    rest = rest[:chars].rpartition(' ')[0] + ' ...'
  return f'{member.sentence}\n.{member.name}{member.arguments}\n' + (f'{rest}\n' if rest else '')


def _cut(header, members, style):
  """The blocks of one container."""
  blocks = [header]
  for member in members:
    entry = _entry(member, style.doc_chars)
    words = member.sentence.split(' ')
    head = ' '.join(words[:-style.split_words]) if style.split_words else ''
    blocks[-1] += head
    blocks.append(entry.removeprefix(head))
  return blocks


def make_page(index, containers, style):
  """One example.

  Args:
    index: any integer; page `index` of a (containers, style) pair is always the same.
    containers: tuple of `Container` to draw from.
    style: `PageStyle`.

  Returns:
    {'id', 'blocks', 'prompt', 'response', 'gold'}: the header and member blocks, the question, its answer, and the
    indices of the two blocks that hold the answer.

  Raises:
    ValueError: the containers are too few for such a page.
  """
  rng = np.random.default_rng((style.seed, index))
  chosen = _choose(rng, containers, style)
  if rng.random() < style.renamed:
    chosen = _renamed(rng, chosen, _name_pools(containers))
  listed = rng.random() < style.listed
  which = int(rng.integers(len(chosen)))
  asked = int(rng.integers(len(chosen[which][1])))
  blocks, gold = [], ()
  for i, (container, members) in enumerate(chosen):
    if i == which:
      gold = [len(blocks), len(blocks) + 1 + asked]
    blocks += _cut(_header(container, members, listed), members, style)
  container, member = chosen[which][0], chosen[which][1][asked]
  return {'id': f'{container.where}.{member.name}#{index}', 'blocks': blocks, 'gold': gold,
          'prompt': f'Which member: {member.sentence}\n', 'response': f'.{member.name} of {container.name}'}
