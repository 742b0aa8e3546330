"""Examples to tokens.

Every block is tokenised alone, so that its tokens, and with them its cached keys and values, depend on the block alone;
the response is tokenised apart from the prompt, as it is when a model writes it. The tokenizer adds nothing by itself:
a beginning-of-text token is put in front of the header, or makes one, if the tokenizer's own encoding starts with one, an
end-of-text token behind the response. The header is a block of its own, the first.

Only a chat template's text (`Example.template`) can become special tokens. Everything else is encoded with them
switched off: "<|im_end|>" in a passage becomes the tokens of these ten characters. What counts as special is the
tokenizer's own marking ("special": true); added tokens without it, such as Qwen's <think>, are ordinary vocabulary.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from blockattn import blocks as blocks_lib, disk, hub
from blockattn.data import chat_template, json_lines
from blockattn.data.example import Example
from blockattn.errors import UserError

# What a tokenizer is made of, beside tokenizer.json.
TOKENIZER_FILES = ('tokenizer_config.json', 'special_tokens_map.json', 'added_tokens.json')
TOO_LONG = ('drop', 'cut')
BOS = ('auto', 'never')
_AT_A_TIME = 64   # examples that are encoded together


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedDoc:
  """Tokens of one example.

  Attributes:
    tokens: int32 [n].
    lengths: tokens of each block, n in all; the last block is the reader: prompt, response and end-of-text.
    answer: (start, stop) of the response and its end-of-text token in `tokens`.
    gold: for each block whether it is known to hold the answer; () where nothing is known.
    continued: for each block whether its text goes on with that of the block before; () where none does.
  """
  tokens: np.ndarray
  lengths: tuple[int, ...]
  answer: tuple[int, int]
  gold: tuple[bool, ...] = ()
  continued: tuple[bool, ...] = ()


@dataclasses.dataclass(frozen=True)
class EncodedParts:
  """Tokens of an example before it is put together: of the header, each context block, the prompt, the response.

  `answer` is how many of the response's tokens are answer; what a chat template writes after the end-of-text token is
  not. `spare` are the context blocks that may be cut, see `fit`; `gold` those known to hold the answer; `continued` those
  whose text goes on with that of the block before. The header is none of them.
  """
  header: list[int]
  blocks: tuple[list[int], ...]
  prompt: list[int]
  response: list[int]
  answer: int
  spare: tuple[bool, ...]
  gold: tuple[bool, ...]
  continued: tuple[bool, ...]


def check_same_tokens(tokenizer: Any, teacher: Any, name: str | os.PathLike, teacher_name: str | os.PathLike):
  """Raises ValueError if tokens of a teacher mean something else to its student, or nothing."""
  ours = tokenizer.get_vocab()
  other = [text for text, i in teacher.get_vocab().items() if ours.get(text) != i]
  if other:
    raise UserError(f'{name} and {teacher_name} have different tokenizers: {len(other)} tokens of the teacher, first '
                    f'{other[0]!r}, are not the student\'s; name a teacher with the tokenizer of the student')


def load_tokenizer(name: str | os.PathLike, template_args: str = '') -> Any:
  """A transformers fast tokenizer, from a local folder without any network access, or by its name on the hub, its chat
  template with its arguments, see `chat_template.set_template_args`.

  Raises:
    FileNotFoundError: `name` is a path, not a hub name, and no such folder with a tokenizer.json exists; or it cannot be
      downloaded.
    ValueError: a file is broken; the tokenizer has no fast version, or its template does not know an argument.
  """
  logging.getLogger('transformers').addFilter(_is_no_advice)
  import transformers  # slow to import
  name = folder = os.path.expanduser(os.fspath(name))
  if not os.path.isdir(name):
    if not hub.is_name(name):
      raise FileNotFoundError(f'{name}: no such folder; give a folder with a tokenizer.json, or a name on the hub')
    folder = str(hub.fetch(name, ('config.json', 'tokenizer.json', 'chat_template.jinja', *TOKENIZER_FILES)))
  if not os.path.isfile(os.path.join(folder, 'tokenizer.json')):
    raise FileNotFoundError(f'{folder}: no tokenizer.json in this folder; save the tokenizer with save_pretrained first')
  with _naming_files(folder):
    kind = transformers.PreTrainedTokenizerFast if _is_plain(folder) else transformers.AutoTokenizer
    tokenizer = kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
  if not tokenizer.is_fast:
    raise UserError(f'{name}: {type(tokenizer).__name__} has no fast version (tokenizer.json), which is needed here')
  tokenizer.name_or_path = name
  chat_template.set_template_args(tokenizer, template_args)
  return tokenizer


def _is_plain(folder) -> bool:
  """Whether tokenizer.json is all there is to a tokenizer: AutoTokenizer would choose the same class for it, after it has
  imported torch wherever that is installed, which takes longer than all else here."""
  path = os.path.join(folder, 'tokenizer_config.json')
  said = disk.read_json(path) if os.path.isfile(path) else {}
  return said.get('tokenizer_class') in ('PreTrainedTokenizerFast', 'TokenizersBackend') and 'auto_map' not in said


def _is_no_advice(record) -> bool:
  """False of what transformers says at its import where there is no torch, which nothing here needs."""
  return 'PyTorch was not found' not in record.getMessage()


@contextlib.contextmanager
def _naming_files(folder):
  """Within the block, what transformers makes of broken files becomes a line that names the file."""
  try:
    yield
  except Exception as error:   # of many classes
    for file in TOKENIZER_FILES:
      if os.path.isfile(path := os.path.join(folder, file)):
        disk.read_json(path)
    disk.read_tokenizer(os.path.join(folder, 'tokenizer.json'))
    said = ' '.join(f'{type(error).__name__}: {error}'.split())
    raise UserError(f'{folder}: transformers cannot make a tokenizer of its files ({said:.300}); save them again with '
                    'save_pretrained') from error


def check_ids(ids: Sequence[int] | np.ndarray, rows: int, tokenizer: Any, where: str):
  """Raises ValueError, naming the token, if an id is no row of a table: a device reads some other row without a word.

  Args:
    ids: token ids.
    rows: of the embedding, without those of learned sinks.
    tokenizer: a transformers tokenizer, or a `tokenizers.Tokenizer`.
    where: what the ids are of.
  """
  ids = np.asarray(ids, np.int64)
  wrong = ids[(ids < 0) | (ids >= rows)]
  if len(wrong):
    first = int(wrong[0])
    text = getattr(tokenizer, 'backend_tokenizer', tokenizer).id_to_token(first) if 0 <= first < 1 << 32 else None
    raise UserError(f'{where}: token {text!r} has the id {first}, and the model has {rows} rows (vocab_size): they do '
                    'not belong together; take the tokenizer of this model (in training config.data.tokenizer)')


def check_tokenizer(tokenizer: Any, vocab: int, where: str, sinks: int = 0):
  """`check_ids` of all that the tokenizer can make; the names that an export gave to learned sinks are none of it."""
  own = blocks_lib.sink_tokens(vocab, sinks)
  check_ids(sorted(i for text, i in tokenizer.get_vocab().items() if own.get(i) != text), vocab, tokenizer, where)


def plain(tokenizer: Any) -> Any:
  """The `tokenizers.Tokenizer` by which blocks are encoded: special tokens are read as text, nothing is cut or filled up.

  Args:
    tokenizer: a transformers fast tokenizer, or a `tokenizers.Tokenizer`; copied.
  """
  import tokenizers  # not needed by those who only want the types above
  made = tokenizers.Tokenizer.from_str(getattr(tokenizer, 'backend_tokenizer', tokenizer).to_str())
  made.no_padding()
  made.no_truncation()
  made.encode_special_tokens = True
  return made


@functools.lru_cache(maxsize=8)   # a copy of a large tokenizer takes seconds
def token_ends(tokenizer: Any) -> Callable[[Sequence[str]], list[np.ndarray]]:
  """What says where the tokens of texts end that are encoded alone, see `segmentation.forced.TokenEnds`.

  Args:
    tokenizer: see `plain`; or a folder or hub name; or a function, text -> its number of tokens, of which the ends are
      then taken to be evenly spaced.
  """
  if isinstance(tokenizer, str | os.PathLike):
    tokenizer = load_tokenizer(tokenizer)
  if not hasattr(tokenizer, 'backend_tokenizer') and not hasattr(tokenizer, 'encode_batch'):
    def ends(text):
      count = tokenizer(text)
      return -(-len(text) * np.arange(1, count + 1, dtype=np.int64) // max(count, 1))
    return lambda texts: [ends(text) for text in texts]
  made = plain(tokenizer)
  encodable = lambda text: re.sub('[\ud800-\udfff]', '\ufffd', text)
  return lambda texts: [np.array([stop for _, stop in e.offsets], np.int64)
                        for e in made.encode_batch([encodable(t) for t in texts], add_special_tokens=False)]


class Encoder:
  """Encodes texts with a tokenizer, special tokens only where a chat template wrote them.

  Args:
    tokenizer: a transformers fast tokenizer; copied, so its own state plays no part.
    bos: 'auto': begin every document with the beginning-of-text token if the tokenizer does so by itself and the chat
      template has not done it; 'never'.

  Raises:
    ValueError: no end-of-text token, an unknown `bos`, or a tokenizer that does not give texts back as they are.
  """

  def __init__(self, tokenizer: Any, *, bos: str = 'auto'):
    if bos not in BOS:
      raise UserError(f'bos={bos!r}; choose one of {", ".join(BOS)}')
    if tokenizer.eos_token_id is None:
      raise UserError(f'{tokenizer.name_or_path}: no end-of-text token; set eos_token in tokenizer_config.json')
    self.eos = tokenizer.eos_token_id
    self.bos = _own_bos(tokenizer) if bos == 'auto' else None
    # Everything that decides the tokens, and through the chat template the texts.
    rendered = chat_template.probe(tokenizer) if tokenizer.chat_template else ''
    specials = sorted(map(str, tokenizer.special_tokens_map.items()))
    self._plain = plain(tokenizer)
    state = json.dumps(json.loads(self._plain.to_str()))   # in Python's form, whatever that of the library is
    facts = (state, tokenizer.chat_template, rendered, specials, self.bos, self.eos)
    self.fingerprint = hashlib.sha256(repr(facts).encode()).hexdigest()
    added = self._plain.get_added_tokens_decoder()
    self._special = {token.content: i for i, token in added.items() if token.special}
    self._pattern = re.compile('|'.join(map(re.escape, sorted(self._special, key=len, reverse=True))) or r'(?!)')
    self._check()

  def _check(self):
    probe = 'a\n\n b "c" <d>.'
    if self._plain.decode(self._encode_plain([probe])[0], skip_special_tokens=False) != probe:
      raise UserError('this tokenizer does not give a text back as it was; use a byte-level one, as Qwen3 and Llama 3')
    for text, tokens in zip(self._special, self._encode_plain(list(self._special)), strict=True):
      if self._special[text] in tokens:
        raise UserError(f'this tokenizer cannot write the special token {text!r} as plain text; '
                        'documents that hold these characters would end or begin turns')

  def _encode_plain(self, texts):
    return [e.ids for e in self._plain.encode_batch_fast(texts, add_special_tokens=False)]

  def texts(self, texts: Sequence[str], ranges: Sequence[Sequence[tuple[int, int]]] | None = None) -> list[list[int]]:
    """Token ids of each text; `ranges[i]` are the character ranges of text i where special tokens are read as such."""
    ranges = ranges or [()] * len(texts)
    pieces = [self._split(text, where) for text, where in zip(texts, ranges, strict=True)]
    encoded = iter(self._encode_plain([p for row in pieces for p in row if isinstance(p, str)]))
    return [[token for p in row for token in (next(encoded) if isinstance(p, str) else (p,))] for row in pieces]

  def _split(self, text, ranges):
    """The text as plain stretches (str) and special tokens (int)."""
    pieces, at = [], 0
    for start, stop in ranges:
      for match in self._pattern.finditer(text, start, stop):
        pieces += [text[at:match.start()], self._special[match.group()]]
        at = match.end()
    return [piece for piece in [*pieces, text[at:]] if piece != '']

  def parts(self, examples: Sequence[Example]) -> list[EncodedParts]:
    """Encodes a batch of examples, in order."""
    texts, ranges = [], []
    for example in examples:
      texts += example.texts
      ranges += example.template or [()] * len(example.texts)
    encoded = iter(self.texts(texts, ranges))
    return [self._finish(example, [next(encoded) for _ in example.texts]) for example in examples]

  def _finish(self, example, encoded):
    header, *blocks, prompt, response = encoded
    spare = tuple(example.gold is not None and i not in example.gold and not (example.template and example.template[i + 1])
                  for i in range(len(blocks)))
    if self.bos is not None and next(filter(None, (header, *blocks, prompt)), [])[:1] != [self.bos]:
      header.insert(0, self.bos)
    # A chat template ends the turn itself; ours is the first end-of-text token there, or one that is appended.
    if self.eos not in response:
      response.append(self.eos)
    gold = tuple(example.gold is not None and i in example.gold for i in range(len(blocks)))
    continued = tuple(i in example.continued for i in range(len(blocks)))
    return EncodedParts(header, tuple(blocks), prompt, response, response.index(self.eos) + 1, spare, gold, continued)

  def prompt(self, example: Example) -> list[list[int]]:
    """Token ids of the header, each context block and, last, the prompt: what a model is given. None is empty; those of
    blocks that go on are `blocks.Continued`."""
    parts = self.parts([example])[0]
    kept = _kept(parts)
    blocks = [blocks_lib.Continued(parts.blocks[i]) if goes_on else parts.blocks[i]
              for i, goes_on in zip(kept, _continued(parts, kept), strict=True)]
    return [tokens for tokens in (parts.header, *blocks, parts.prompt) if tokens]


def _own_bos(tokenizer):
  """The beginning-of-text id if the tokenizer puts it in front of every text by itself, or is configured to."""
  if tokenizer.bos_token_id is None:
    return None
  begins = tokenizer('a')['input_ids'][:1] == [tokenizer.bos_token_id]
  return tokenizer.bos_token_id if begins or getattr(tokenizer, 'add_bos_token', False) else None


def recut(parts: EncodedParts, size: int) -> EncodedParts:
  """The same context in blocks of `size` tokens, cut wherever they end, instead of the blocks that were given.

  What a splitter by length does. The header stays. A new block is gold if it holds a token of a gold block, and spare if it
  holds nothing but tokens of spare ones. It goes on with the one before, unless it begins where a block did that does not.
  """
  if size < 1:
    raise UserError(f'blocks of {size} tokens: the size must be at least 1')
  owner = [i for i, tokens in enumerate(parts.blocks) for _ in tokens]
  tokens = [token for block in parts.blocks for token in block]
  cuts = range(0, len(tokens), size)
  starts = itertools.accumulate(map(len, parts.blocks), initial=0)
  apart = {start for start, goes_on in zip(starts, parts.continued) if not goes_on}
  owners = [set(owner[i:i + size]) for i in cuts]
  return dataclasses.replace(parts, blocks=tuple(tokens[i:i + size] for i in cuts),
                             spare=tuple(all(parts.spare[i] for i in own) for own in owners),
                             gold=tuple(any(parts.gold[i] for i in own) for own in owners),
                             continued=tuple(cut > 0 and cut not in apart for cut in cuts))


def fit(parts: EncodedParts, *, length: int | None = None, max_blocks: int | None = None,
        too_long: str = 'drop') -> tuple[EncodedDoc | None, str]:
  """Puts a document together, no longer than `length` tokens and `max_blocks` blocks (None: no bound).

  Args:
    parts: from `Encoder.parts`.
    length, max_blocks: bounds; the reader and the header, if there is one, count as blocks.
    too_long: 'drop' refuses a document over a bound. 'cut' leaves out context blocks, from the last to the first,
      until it fits: only blocks that hold no gold answer and no text of the chat template.
      Where the line does not say which blocks are gold, none can be left out.

  Returns:
    (the document, 'cut' or ''), or (None, 'too long' or 'too many blocks').
  """
  if too_long not in TOO_LONG:
    raise UserError(f'too_long={too_long!r}; choose one of {", ".join(TOO_LONG)}')
  kept = _kept(parts)
  given = len(kept)
  room = float('inf') if length is None else length - len(parts.header) - len(parts.prompt) - len(parts.response)
  places = float('inf') if max_blocks is None else max_blocks - 1 - bool(parts.header)
  over = lambda: sum(len(parts.blocks[i]) for i in kept) > room or len(kept) > places
  spare = [i for i in kept if parts.spare[i]] if too_long == 'cut' else []
  while over() and spare:
    kept.remove(spare.pop())
  if over():
    return None, 'too long' if sum(len(parts.blocks[i]) for i in kept) > room else 'too many blocks'
  return _doc(kept, parts), 'cut' if len(kept) < given else ''


def whole(parts: EncodedParts) -> EncodedDoc:
  """The document of an example, however long."""
  return _doc(_kept(parts), parts)


def _kept(parts):
  return [i for i, tokens in enumerate(parts.blocks) if tokens]   # a normaliser may leave nothing of a block


def _continued(parts, kept):
  """Of each context block that is kept, whether its text goes on with that of the one before it which is kept."""
  unbroken = lambda i, j: all(parts.continued[i + 1:j + 1]) and not any(parts.blocks[i + 1:j])
  return [False, *itertools.starmap(unbroken, itertools.pairwise(kept))][:len(kept)]


def _doc(kept, parts):
  header = [parts.header] if parts.header else []
  blocks, reader = [*header, *(parts.blocks[i] for i in kept)], parts.prompt + parts.response
  start = sum(map(len, blocks)) + len(parts.prompt)
  tokens = np.fromiter((token for block in (*blocks, reader) for token in block), np.int32)
  return EncodedDoc(tokens, (*map(len, blocks), len(reader)), (start, start + parts.answer),
                    (*(False for _ in header), *(parts.gold[i] for i in kept), False),
                    (*(False for _ in header), *_continued(parts, kept), False))


def windows(parts: EncodedParts, *, length: int, max_blocks: int) -> list[EncodedDoc]:
  """The documents of a text without a question: its blocks in order, as many to a document as fit into `length` tokens and
  `max_blocks` blocks, the header in front of each; a block that is longer than a document is cut.

  The last block of each takes the place of the answer: it alone reads the blocks before it. Its first token is none of it,
  because the token that predicts that one is of a block that reads nothing else.
  """
  room, places = length - len(parts.header), max(1, max_blocks - bool(parts.header))
  blocks = [list(tokens) for tokens in parts.blocks if tokens]
  if not blocks or room < 1:
    return []
  blocks[-1] += parts.response   # the end-of-text token
  groups = [[]]
  for block in (tokens[i:i + room] for tokens in blocks for i in range(0, len(tokens), room)):
    if groups[-1] and (len(groups[-1]) == places or sum(map(len, groups[-1])) + len(block) > room):
      groups.append([])
    groups[-1].append(block)
  return [_text_doc([parts.header] if parts.header else [], group) for group in groups]


def _text_doc(header, text):
  blocks = header + text
  tokens, lengths = np.fromiter(itertools.chain.from_iterable(blocks), np.int32), tuple(map(len, blocks))
  continued = tuple(i > len(header) for i in range(len(blocks)))
  return EncodedDoc(tokens, lengths, (len(tokens) - lengths[-1] + 1, len(tokens)), continued=continued)


def as_one_block(doc: EncodedDoc, *, whole: bool = False) -> EncodedDoc:
  """The same document read with full attention; `whole`: all of it is answer, not what was it in the last block."""
  size = len(doc.tokens)
  return EncodedDoc(doc.tokens, (size,), (1, size) if whole else doc.answer)


def documents(parts: EncodedParts, *, length: int, max_blocks: int = 2 ** 24, too_long: str = 'drop',
              block_tokens: int = 0, full: bool = False, is_text: bool = False) -> tuple[list[EncodedDoc], str]:
  """The documents of an example, and what `fit` says of it.

  Args:
    parts: from `Encoder.parts`.
    length, max_blocks, too_long: see `fit`.
    block_tokens: 0 for the blocks that are given, else see `recut`.
    full: its blocks are one, see `as_one_block`; of a text all tokens are then answer.
    is_text: a text without a question, see `windows`.
  """
  parts = recut(parts, block_tokens) if block_tokens and not full else parts
  if is_text:
    docs = windows(parts, length=length, max_blocks=max_blocks)
    return [as_one_block(doc, whole=True) if full else doc for doc in docs], '' if docs else 'no tokens'
  doc, verdict = fit(parts, length=length, max_blocks=None if full else max_blocks, too_long=too_long)
  return [] if doc is None else [as_one_block(doc) if full else doc], verdict


def encode_examples(examples: Iterable[Example], encoder: Encoder, report: json_lines.Report,
                    **options) -> Iterator[tuple[Example, EncodedDoc]]:
  """(example, a document of it), in order; what `fit` refuses is left out and counted in `report`. `options`: of
  `documents`."""
  waiting = iter(examples)
  while group := list(itertools.islice(waiting, _AT_A_TIME)):
    for example, parts in zip(group, encoder.parts(group), strict=True):
      docs, verdict = documents(parts, is_text=example.is_text, **options)
      if not docs:
        report.dropped[verdict] += 1
      report.docs += len(docs)
      report.cut += verdict == 'cut'
      yield from ((example, doc) for doc in docs)
