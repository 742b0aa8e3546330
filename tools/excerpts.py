"""Excerpts of documents that somebody cut, held out for an evaluation, and ways to cut them anew.

An excerpt ends in the block that is measured; the text in front of it is the context, which may be cut anywhere. All ways
cut a context into about as many blocks as they are asked for, so that they can be compared at one mean length.
"""

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from blockattn import disk
from blockattn.data import encode
from blockattn.data.example import Example, pieces
from blockattn.errors import UserError
from blockattn.segmentation import api, granularity, markers, splitters
from blockattn.segmentation.semanticseg import schema

GOLD = 'gold'   # a way to cut: where those did who wrote or annotated the text
_TRIES = 16       # places of a document at which an excerpt may begin
_CHARACTERS = 8   # of a token, at most, in a text that is looked at
_SHARE = 0.75     # of an excerpt that is context


@dataclasses.dataclass(frozen=True)
class Excerpt:
  """A stretch of a document.

  Attributes:
    part: of the evaluation, which asks several kinds of text.
    read: where the last block begins, the end of a sentence.
    gold: where others begin, by those who wrote or annotated it: offsets in front of `read`.
  """
  id: str
  category: str
  part: str
  text: str
  read: int
  gold: tuple[int, ...]


def cut_out(document: schema.Document, part: str, tokens: int, ends: Callable, rng) -> Excerpt | None:
  """So many tokens from the start of one of its blocks on, of one that several others follow where there is such a block;
  None of a document that is too short."""
  found, starts = None, (0, *document.cuts)
  for start in rng.permutation(starts)[:_TRIES].tolist():
    text = document.text[start:start + _CHARACTERS * tokens]
    [at] = ends([text])
    if len(at) < tokens:
      continue
    text, places = text[:at[tokens - 1]], markers.candidates(text[:at[tokens - 1]])
    if not len(places):
      continue
    read = int(places[np.abs(places - at[int(_SHARE * tokens)]).argmin()])
    own = Excerpt(document.id, document.category, part, text, read,
                  tuple(cut - start for cut in document.cuts if 0 < cut - start < read))
    if 2 <= len(own.gold) <= 8:
      return own
    found = found or own
  return found


def draw(data: pathlib.Path, split: str, count: int, tokens: int, tokenizer, parts: Mapping[str, Sequence[str]],
             seed: int = 0) -> list[Excerpt]:
  """As many of every part, and of every category of it, of documents that are drawn; fewer where there are no more."""
  ends, found = encode.token_ends(tokenizer), []
  for part, categories in parts.items():
    each, rng = -(-count // len(parts) // len(categories)), np.random.default_rng(seed)
    turns = []
    for file in schema.find(f'{data}/seg/{split}_*.jsonl*', categories):
      documents = list(schema.read(file.path))
      drawn = (cut_out(documents[i], part, tokens, ends, rng) for i in rng.permutation(len(documents)))
      turns.append(list(itertools.islice(filter(None, drawn), each)))
    some = [one for turn in itertools.zip_longest(*turns) for one in turn if one][:-(-count // len(parts))]
    if not some:
      raise UserError(f'{data}/seg: not one document of {", ".join(categories)}, split {split!r}, has --tokens {tokens}; '
                      'give a smaller number')
    found += some
  return found


def read(path: pathlib.Path) -> list[Excerpt]:
  rows = map(json.loads, disk.read_text(path).splitlines())
  return [Excerpt(**row | {'gold': tuple(row['gold'])}) for row in rows]


def write(path: pathlib.Path, rows: Iterable[dict]) -> None:
  """JSON lines."""
  disk.write_text(path, ''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in rows))


def encoded(held_out: Sequence[Excerpt], cuts: Sequence[Sequence[int]], encoder: encode.Encoder):
  """(documents, examples) of excerpts whose contexts are cut at these offsets. What is measured is the last block, but for
  its first token; an end-of-text token, which stands at no end here, is none of it."""
  examples = [Example(tuple(pieces(one.text, (*own, one.read))), '', '', one.id)
              for one, own in zip(held_out, cuts, strict=True)]
  parts = [dataclasses.replace(one, response=[], answer=0) for one in encoder.parts(examples)]
  whole = [encode.windows(one, length=1 << 20, max_blocks=1 << 20)[0] for one in parts]
  return whole, examples


# Ways to cut a context into so many blocks.

def nearest(cut: Callable[[int], Sequence[int]], length: int, count: int) -> list[int]:
  """The cuts of a way that takes a size, at the size near length / (count + 1) that gives the number nearest to `count`."""
  sizes = [max(1, round(length / (count + 1) * 1.1 ** power)) for power in sorted(range(-12, 13), key=abs)]
  return list(min((cut(size) for size in dict.fromkeys(sizes)), key=lambda cuts: abs(len(cuts) - count)))


def ways_to_cut(tokenizer, texts: Sequence[str]) -> dict[str, Callable[[str, int], Sequence[int]]]:
  """{name: (text, number of cuts) -> about so many cuts}; GOLD gives none: they are in the data."""
  model, ends = api.load_segmenter(), encode.token_ends(tokenizer)
  scored = dict(zip(texts, model.score(texts), strict=True))
  tokens = {text: len(ends([text])[0]) for text in texts}

  def by_segmenter(text, size):
    want = granularity.for_model(granularity.wanted(target=max(1, round(size * tokens[text] / len(text)))), model)
    return granularity.cuts_of(text, scored[text], want, model.token_ends, ends).tolist()

  def by_chance(text, count):
    places = markers.candidates(text)
    rng = np.random.default_rng([len(text), count])
    return sorted(rng.choice(places, min(count, len(places)), replace=False).tolist())

  starts = lambda text: [0, *ends([text])[0][:-1].tolist()]
  sized = lambda way: lambda text, count: nearest(lambda size: way(text, size), len(text), count)
  return {
      'segmenter': sized(by_segmenter),
      GOLD: lambda text, count: [],
      'fixed length': lambda text, count: splitters.fixed_tokens(starts, -(-tokens[text] // (count + 1)))(text),
      'random': by_chance,
      'recursive': sized(lambda text, size: splitters.langchain_recursive(size)(text)),
      'semchunk': sized(lambda text, size: splitters.semchunk_chunks(size)(text)),
      'separators': sized(lambda text, size: splitters.separator_rule(size)(text)),
  }
