"""The files of a Hugging Face folder: finding them, reading and writing safetensors shards, copying the tokenizer."""

import contextlib
import dataclasses
import os
import pathlib
import shutil
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import safetensors
import safetensors.numpy
import tokenizers

from blockattn import blocks, hub
from blockattn.disk import check_form, read_json, read_tokenizer
from blockattn.errors import UserError
from blockattn.metrics import write_json

META = 'blockattn.json'
SINGLE = 'model.safetensors'
INDEX = 'model.safetensors.index.json'
WRAPPERS = 'wrappers.safetensors'   # learned sinks and tails alone, of a model that lies elsewhere
TOKEN_IDS = ('bos_token_id', 'eos_token_id', 'pad_token_id')
# What an export takes over from the folder that its tokenizer comes from. Licences travel with the weights.
COPIED = ('tokenizer.json', 'tokenizer_config.json', 'chat_template.jinja', 'special_tokens_map.json',
          'added_tokens.json', 'vocab.json', 'merges.txt', 'tokenizer.model', 'generation_config.json')
STOPS = ('generation_config.json', 'config.json')   # where the tokens stand that end an answer, the first that says so
LICENCES = ('LICENSE*', 'NOTICE*', 'USE_POLICY*')
PICKLES = ('*.bin', '*.pt', '*.pth', '*.ckpt', '*.pkl')
ADAPTER = 'adapter_config.json'
CARD = 'README.md'
_CONVERT_FIRST = 'a GGUF file is converted first: python -m tools.convert from_hf {} WORK; then name WORK'
DOWNLOADED = ('config.json', META, ADAPTER, '*.safetensors', INDEX, CARD, *COPIED, *LICENCES)


@dataclasses.dataclass(frozen=True)
class Stored:
  """One tensor of a folder: the file that holds it, its shape there, and its dtype as safetensors calls it ('BF16')."""
  file: pathlib.Path
  shape: tuple[int, ...]
  dtype: str


def locate(name: os.PathLike | str, wanted: Sequence[str] = DOWNLOADED) -> pathlib.Path:
  """The local folder of a model: `name` itself if it is a folder, else a download of the hub's `owner/model`.

  A local folder never touches the network. A hub name may end in `@revision`. Only the files `wanted` are downloaded,
  pickled weights never.

  Raises:
    FileNotFoundError: `name` is no folder, and no hub name either or one that cannot be downloaded.
    ValueError: it is a GGUF file.
  """
  folder = pathlib.Path(name).expanduser()
  if folder.is_dir():
    return folder
  if is_gguf(name):
    raise UserError(f'{name}: {_CONVERT_FIRST.format(name)}')
  if not hub.is_name(name):
    raise FileNotFoundError(f'no folder {name}, and it is no hub name (owner/model or owner/model@revision) either')
  return hub.fetch(name, wanted)


def is_gguf(name: os.PathLike | str) -> bool:
  """Whether this is the name of a GGUF file."""
  return str(name).endswith('.gguf') and not pathlib.Path(name).expanduser().is_dir()


def check_kind(folder: pathlib.Path):
  """Raises ValueError if there is no model in the folder, but something in its place that other programs read."""
  if (folder / SINGLE).exists() or (folder / INDEX).exists():
    return
  if (folder / ADAPTER).exists():
    base = read_json(folder / ADAPTER).get('base_model_name_or_path')
    raise UserError(f'{folder} holds an adapter of PEFT ({ADAPTER}), no model; merge it with its base, {base}, first '
                    '(peft: PeftModel.from_pretrained, merge_and_unload, save_pretrained)')
  quantized = sorted(path.name for path in folder.glob('*.gguf'))
  if quantized:
    raise UserError(f'{folder} holds only GGUF: {_CONVERT_FIRST.format(folder / quantized[0])}')


def stored_tensors(folder: pathlib.Path) -> dict[str, Stored]:
  """Every tensor of the folder's safetensors files, read from their headers only.

  Raises:
    ValueError: only pickled weights; weights in several files without an index, or beside it; a key that the index
      places in another file, or that two files hold; a broken file.
    FileNotFoundError: no weights, or a file that the index names is missing.
  """
  placed = _placement(folder)
  found: dict[str, Stored] = {}
  for file in sorted(set(placed.values())) if placed else [folder / SINGLE]:
    with open_tensors(file) as tensors:
      for key in tensors.keys():
        if key in found:
          raise UserError(f'{key} stands twice: in {found[key].file} and in {file}')
        if placed and placed.get(key) != file:
          raise UserError(f'{file} holds {key}, which {INDEX} places in {placed.get(key)}')
        part = tensors.get_slice(key)
        found[key] = Stored(file, tuple(part.get_shape()), part.get_dtype())
  for key in placed:
    if key not in found:
      raise UserError(f'{placed[key]} does not hold {key}, though {INDEX} says so')
  return found


def _placement(folder):
  """{key: file} by the index, empty if the folder holds one file without an index."""
  names = {path.name for path in folder.glob('model*.safetensors')}
  if (folder / INDEX).exists():
    weight_map = read_json(folder / INDEX).get('weight_map')
    if not isinstance(weight_map, dict):
      raise UserError(f'{folder / INDEX} has no weight_map')
    there = {path.name for path in folder.glob('*.safetensors')}   # whatever it calls its shards, beside it
    missing, stray = set(weight_map.values()) - there, names - set(weight_map.values())
    if missing:
      raise FileNotFoundError(f'{folder}: {sorted(missing)[0]} is missing, though {INDEX} names it')
    if stray:
      raise UserError(f'{folder / sorted(stray)[0]} is not named by {INDEX}; remove one of the two')
    return {key: folder / file for key, file in weight_map.items()}
  if names == {SINGLE}:
    return {}
  if names:
    raise UserError(f'{folder} holds {", ".join(sorted(names))} but no {INDEX}; which belong together is not known')
  pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
  if pickles:
    raise UserError(f'{folder} holds only pickled weights ({pickles[0]}), which run code when they are opened and are '
                    'not read here; convert them to safetensors first (transformers: save_pretrained)')
  raise FileNotFoundError(f'{folder} holds no {SINGLE} and no {INDEX}')


@contextlib.contextmanager
def open_tensors(file: pathlib.Path):
  """safetensors.safe_open giving numpy arrays; what is wrong with the file is said with its name."""
  try:
    tensors = safetensors.safe_open(file, framework='np')
  except (safetensors.SafetensorError, OSError) as e:
    raise UserError(f'{file} is no readable safetensors file: {e}') from e
  with tensors:
    yield tensors


def plan_shards(sizes: dict[str, int], max_bytes: float) -> dict[str, list[str]]:
  """{file name: its keys in order}: as few files as hold `sizes` bytes each, none above `max_bytes` unless one tensor
  alone is."""
  groups: list[list[str]] = [[]]
  room = max_bytes
  for key, size in sizes.items():
    if size > room and groups[-1]:
      groups.append([])
      room = max_bytes
    groups[-1].append(key)
    room -= size
  if len(groups) == 1:
    return {SINGLE: groups[0]}
  return {f'model-{i:05d}-of-{len(groups):05d}.safetensors': keys for i, keys in enumerate(groups, start=1)}


def write_shard(path: pathlib.Path, tensors: dict[str, np.ndarray]):
  path.touch()
  mode = path.stat().st_mode   # as the umask says; safetensors puts a file of 0600 in its place
  safetensors.numpy.save_file(tensors, path, metadata={'format': 'pt'})
  path.chmod(mode)


def write_index(folder: pathlib.Path, shards: dict[str, list[str]], sizes: dict[str, int]):
  """The index beside several shards; nothing if there is one file only."""
  if list(shards) == [SINGLE]:
    return
  weight_map = {key: file for file, keys in shards.items() for key in keys}
  write_json(folder / INDEX, {'metadata': {'total_size': sum(sizes.values())}, 'weight_map': weight_map})


@contextlib.contextmanager
def new_folder(folder: pathlib.Path, overwrite: bool) -> Iterator[pathlib.Path]:
  """A temporary folder beside `folder` that takes its place when the block ends well, and vanishes if it does not.

  Raises:
    FileExistsError: `folder` holds something and `overwrite` is false.
  """
  check_free(folder, overwrite)
  folder.parent.mkdir(parents=True, exist_ok=True)
  temporary = folder.with_name(f'.{folder.name}.tmp-{os.getpid()}')
  temporary.mkdir()
  try:
    yield temporary
    if folder.exists():
      old = folder.with_name(f'.{folder.name}.old-{os.getpid()}')
      folder.rename(old)
      temporary.rename(folder)
      shutil.rmtree(old)
    else:
      temporary.rename(folder)
  except BaseException:
    shutil.rmtree(temporary, ignore_errors=True)
    raise


# One of which a folder has that may be replaced, of a model or of a run.
_OURS = ('config.json', 'checkpoints', ADAPTER, WRAPPERS)


def check_free(folder: pathlib.Path, overwrite: bool):
  """Raises FileExistsError if `folder` is a file, or holds something and may not be replaced, whoever asks: what is no
  model and no run."""
  if folder.is_file():
    raise FileExistsError(f'{folder} is a file; name a new folder')
  if folder.is_dir() and any(folder.iterdir()) and not overwrite:
    raise FileExistsError(f'{folder} is not empty; name a new folder, or replace it with --overwrite (overwrite=True)')
  if folder.is_dir() and any(folder.iterdir()) and not any((folder / name).exists() for name in _OURS):
    raise FileExistsError(f'{folder} holds neither {" nor ".join(_OURS[:2])}, so that it is no model or run to be replaced; '
                          'name a new folder')


def write_companions(new: pathlib.Path, source: pathlib.Path, meta: dict, card: str):
  """What every export has beside its weights: blockattn.json, the card, and what is copied from `source`."""
  write_json(new / META, meta)
  (new / CARD).write_text(card, encoding='utf-8')
  copy_companions(source, new)


def copy_companions(source: pathlib.Path, target: pathlib.Path, also: Iterable[str] = ()):
  """Copies tokenizer, generation config and licence files, and those named by `also`, where `source` has them.

  Raises:
    FileNotFoundError: `source` has no tokenizer.json.
  """
  _check_tokenizer(source)
  licences = [path.name for pattern in LICENCES for path in source.glob(pattern)]
  for name in (*COPIED, *licences, *also):
    if (source / name).is_file():
      shutil.copyfile(source / name, target / name)   # contents only: the source may be read-only


def _check_tokenizer(source):
  if not (source / 'tokenizer.json').is_file():
    raise FileNotFoundError(f'{source} holds no tokenizer.json; name the folder of the model that training began with')


def token_ids(source: pathlib.Path) -> dict:
  """bos_token_id, eos_token_id, pad_token_id as config.json says, or, without one, as the tokenizer's files say."""
  if (source / 'config.json').is_file():
    raw = read_json(source / 'config.json')
    return {key: raw.get(key) for key in TOKEN_IDS}
  return _tokenizer_ids(source)


def _tokenizer_ids(source):
  _check_tokenizer(source)
  path = source / 'tokenizer_config.json'
  raw = read_json(path) if path.is_file() else {}
  tokenizer = read_tokenizer(source / 'tokenizer.json')
  texts = {key: raw.get(key.removesuffix('_id')) for key in TOKEN_IDS}
  texts = {key: text['content'] if isinstance(text, dict) else text for key, text in texts.items()}
  return {key: None if text is None else tokenizer.token_to_id(text) for key, text in texts.items()}


def stop_ids(name: os.PathLike | str, eos: int | None) -> tuple[int, ...]:
  """Tokens that end an answer: the tokenizer's own end-of-text token, which stands behind the answers of training, and what
  generation_config.json says, or, where that says nothing, config.json.

  Args:
    name: folder or hub name that the tokenizer comes from (its `name_or_path`); '': it comes from none.
    eos: the tokenizer's `eos_token_id`.

  Raises:
    FileNotFoundError: the hub cannot be reached, and holds what is asked for.
    ValueError: one of the files is broken; names it.
  """
  said = []
  if os.path.isdir(name) or hub.is_name(name):
    folder = locate(name, STOPS)
    for file in STOPS:
      if not said and (folder / file).is_file():
        said = read_json(folder / file).get('eos_token_id')
        said = said if isinstance(said, list) else [] if said is None else [said]
        check_form(said, [int], f'{folder / file}: eos_token_id')
  return tuple(dict.fromkeys(i for i in (eos, *said) if i is not None))


def own_stop_ids(source: pathlib.Path) -> tuple[int, ...]:
  """`stop_ids` of a folder with its tokenizer's files."""
  return stop_ids(source, _tokenizer_ids(source)['eos_token_id'])


def add_sink_tokens(folder: pathlib.Path, vocab: int, count: int):
  """Gives the tokenizer in `folder` the tokens <|sink_0|>, <|sink_1|>, ... with the ids vocab, vocab + 1, ...

  Models whose embedding is padded have fewer tokens than rows; the ids between are filled with <|reserved_ID|> tokens,
  since a tokenizer numbers added tokens on from its last one. Generation is told never to produce any of them. A
  tokenizer that has these tokens already, from an earlier export, stays as it is.

  Raises:
    ValueError: the tokenizer has more tokens than the model has rows, or numbers its tokens otherwise.
  """
  path = folder / 'tokenizer.json'
  tokenizer = read_tokenizer(path)
  sinks = blocks.sink_tokens(vocab, count)
  known = tokenizer.get_vocab_size(with_added_tokens=True)
  fillers = {i: f'<|reserved_{i}|>' for i in range(known, vocab)}
  if any(tokenizer.token_to_id(text) != i for i, text in sinks.items()):
    if known > vocab:
      raise UserError(f'{path} has {known} tokens, but the model only {vocab} embedding rows, so that learned sinks '
                      f'cannot have the ids from {vocab} on; use the tokenizer that the model was trained with')
    _add_special_tokens(tokenizer, path, fillers | sinks)
    _declare_tokens(folder, fillers | sinks)
  _suppress(folder, [*fillers, *sinks])


def _add_special_tokens(tokenizer, path, texts):
  tokenizer.add_special_tokens([tokenizers.AddedToken(text, special=True, normalized=False) for text in texts.values()])
  for i, text in texts.items():
    if tokenizer.token_to_id(text) != i:
      raise UserError(f'{path} gives {text} the id {tokenizer.token_to_id(text)} instead of {i}: its ids have gaps, '
                      'or it has such a token already; use the tokenizer that the model was trained with')
  tokenizer.save(str(path))


def _declare_tokens(folder, texts):
  """transformers 4 lists added tokens in tokenizer_config.json as well; keep such a list complete."""
  path = folder / 'tokenizer_config.json'
  if not path.exists():
    return
  raw = read_json(path)
  if 'added_tokens_decoder' in raw:
    plain = {'lstrip': False, 'normalized': False, 'rstrip': False, 'single_word': False, 'special': True}
    raw['added_tokens_decoder'] |= {str(i): {'content': text, **plain} for i, text in texts.items()}
    write_json(path, raw)


def _suppress(folder, ids):
  path = folder / 'generation_config.json'
  raw = read_json(path)
  raw['suppress_tokens'] = sorted({*(raw.get('suppress_tokens') or ()), *ids})
  write_json(path, raw)
