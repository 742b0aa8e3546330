"""Questions that a program makes, of any length and in any number of blocks, after the kinds of RULER (arXiv 2404.06654):
needles in a haystack, variables that are traced, the most common words. Nothing is read but the documentation of Python's
own standard library, whose sentences are the haystack; words and texts are ours, so figures are none of that paper's.

    needles    'The number of amber-query is 8163524.' somewhere in the text, by numbers of keys, values of a key, and keys
               asked for; what is not asked for distracts
    variables  'Let kudzu be 51034.' ... 'Let baxter be kudzu.': which names have that value, over so many hops; a second
               chain distracts
    words      lists in which a few words stand more often than all others: which
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from blockattn import errors
from blockattn.data import stdlib

KINDS = ('needles', 'variables', 'words')
_REPEATS = 3    # more of the words that are asked for than of any other, about; each stands there once more than the next
_AT_ONCE = 64   # sentences that are counted together

Count = Callable[[Sequence[str]], Sequence[int]]


@dataclasses.dataclass(frozen=True)
class Shape:
  """
  Attributes:
    kind: one of KINDS.
    tokens: of the context, about.
    blocks: that it is cut into, between sentences, about equally long.
    keys: needles: how many there are to tell apart.
    values: needles: numbers of each key.
    queries: needles: keys that are asked for.
    hops: variables: links of a chain.
    words: words: how many are asked for.
  """
  kind: str
  tokens: int = 4096
  blocks: int = 16
  keys: int = 4
  values: int = 1
  queries: int = 1
  hops: int = 4
  words: int = 3

  def __post_init__(self):
    errors.check_choice('kind', self.kind, KINDS)
    for name in ('tokens', 'blocks', 'keys', 'values', 'queries', 'hops', 'words'):
      errors.check_number(name, getattr(self, name), 1)
    errors.check_number('queries', self.queries, 1, self.keys, hint=', which is the number of keys')

  @property
  def name(self) -> str:
    """'needles_k4_v1_q1_4096_b16': all that decides its questions."""
    own = {'needles': f'k{self.keys}_v{self.values}_q{self.queries}', 'variables': f'h{self.hops}', 'words': f'w{self.words}'
           }[self.kind]
    return f'{self.kind}_{own}_{self.tokens}_b{self.blocks}'


@functools.cache
def haystack() -> tuple[str, ...]:
  """Sentences of documentation, each once, in an order of their own."""
  said = (one.sentence for container in stdlib.read_containers() for one in (container, *container.members))
  return tuple(dict.fromkeys(sentence for sentence in said if re.search(r'[a-z]{3}.*\.$', sentence)))


@functools.cache
def vocabulary() -> tuple[str, ...]:
  """Words of four to eight small letters, from those sentences."""
  return tuple(sorted({word for sentence in haystack() for word in re.findall(r'\b[a-z]{4,8}\b', sentence)}))


def make(index: int, shape: Shape, count: Count) -> dict[str, Any]:
  """Question `index` of a shape, any integer from 0; always the same.

  Args:
    count: texts -> the number of tokens of each, by which lengths are kept.

  Returns:
    {'id', 'blocks', 'prompt', 'response', 'answers', 'gold'}, of the blocks form of `data.prompts`. The id says for each
    piece of the answer which block holds it and how many characters behind its start.

  Raises:
    ValueError: the context is too short for what has to stand in it.
  """
  rng = np.random.default_rng([KINDS.index(shape.kind), shape.tokens, shape.blocks, shape.keys, shape.values, shape.queries,
                               shape.hops, shape.words, index])
  told, distracting, prompt, response = _TASKS[shape.kind](rng, shape)
  sentences = _between(rng, told, distracting, shape, count)
  blocks = _cut(sentences, count([text for text, _ in sentences]), shape.blocks)
  places = [(i, sum(len(text) + 1 for text, _ in block[:j]))
            for i, block in enumerate(blocks) for j, (_, is_told) in enumerate(block) if is_told]
  return {'id': f'{shape.name}:{index}@{",".join(f"{block}+{offset}" for block, offset in places)}',
          'blocks': [''.join(f'{text}\n' for text, _ in block) for block in blocks], 'prompt': prompt,
          'response': f' {response}', 'answers': [response], 'gold': sorted({block for block, _ in places})}


def _needles(rng, shape):
  """(sentences that answer, sentences that distract, question, answer)."""
  words = rng.choice(vocabulary(), 2 * shape.keys, replace=False)
  names = [f'{a}-{b}' for a, b in zip(words[::2], words[1::2])]
  numbers = rng.choice(9_000_000, (shape.keys, shape.values), replace=False) + 1_000_000
  say = lambda i: [f'The number of {names[i]} is {number}.' for number in numbers[i]]
  asked = range(shape.queries)
  many = 'numbers' if shape.values * shape.queries > 1 else 'number'
  return ([text for i in asked for text in say(i)], [text for i in range(shape.queries, shape.keys) for text in say(i)],
          f'What {many} does the text above give for {" and ".join(names[i] for i in asked)}?\nAnswer:',
          ', '.join(str(number) for i in asked for number in numbers[i]))


def _variables(rng, shape):
  names = rng.choice(vocabulary(), 2 * (shape.hops + 1), replace=False)
  values = rng.choice(90_000, 2, replace=False) + 10_000
  chain = lambda names, value: [f'Let {names[0]} be {value}.', *(f'Let {b} be {a}.' for a, b in itertools.pairwise(names))]
  mine, others = names[::2], names[1::2]
  return (chain(mine, values[0]), chain(others, values[1]),
          f'Which names in the text above are {values[0]}, by themselves or through others?\nAnswer:', ', '.join(mine))


def _words(rng, shape):
  drawn = rng.choice(vocabulary(), len(vocabulary()), replace=False)
  asked, rest = drawn[:shape.words], drawn[shape.words:]
  rounds = -(-shape.tokens // len(rest))   # how often any other word stands there, at most: a word is a token or more
  told = [word for i, word in enumerate(asked) for _ in range(rounds + _REPEATS + shape.words - i)]
  prompt = f'Which words stand most often in the list above? The {shape.words} most common, in order.\nAnswer:'
  return told, list(rest), prompt, ', '.join(asked)


_TASKS = {'needles': _needles, 'variables': _variables, 'words': _words}


def _between(rng, told, distracting, shape, count) -> list[tuple[str, bool]]:
  """(sentence, whether it answers) in the order of the text: what answers and distracts at random places of as much else as
  makes up the length; of a chain in its order."""
  kept = told + distracting
  if shape.kind == 'words':   # a word more in the list is what distracts
    kept, hay = told, distracting
  else:
    hay = [haystack()[i] for i in rng.permutation(len(haystack()))]
  room = shape.tokens - sum(count(kept))
  if room < 0:
    raise errors.UserError(f'{shape.name}: what has to stand in the text takes {shape.tokens - room} tokens; give it more, '
                           'or ask for less')
  filling = _first(hay, room, count)
  order = rng.permutation(len(kept) + len(filling))
  at = {place: i for i, place in enumerate(order[:len(kept)])}
  if shape.kind == 'variables':
    places = sorted(order[:len(kept)])
    mine = sorted(rng.choice(len(places), len(told), replace=False))
    rest = [i for i in range(len(places)) if i not in mine]
    at = {places[p]: i for i, p in enumerate([*mine, *rest])}
  others = iter(filling)
  return [(kept[at[i]], at[i] < len(told)) if i in at else (next(others), False) for i in range(len(order))]


def _first(texts, room, count):
  """As many of the texts, over and over, as fit into so many tokens."""
  chosen, endless = [], itertools.cycle(texts)
  while True:
    some = list(itertools.islice(endless, _AT_ONCE))
    for text, size in zip(some, count(some), strict=True):
      if size > room:
        return chosen
      room -= size
      chosen.append(text)


def _cut(sentences, sizes, blocks):
  """The sentences in so many blocks, or as many as there are sentences, each ending nearest to its share of the tokens."""
  ends = np.cumsum(sizes)
  cuts = [int(np.abs(ends - ends[-1] * i / blocks).argmin()) + 1 for i in range(1, blocks)]
  edges = sorted({0, *(cut for cut in cuts if cut < len(sentences)), len(sentences)})
  return [sentences[a:b] for a, b in itertools.pairwise(edges)]
