"""Hugging Face folders <-> (ModelConfig, parameter tree), without torch and without running a checkpoint's code.

Both directions work through one parameter kind or one shard at a time, so that the host never holds a second copy of
the model, and account for every tensor: each name stands exactly once, with the shape that config.json implies.
"""

import collections
import contextlib
import functools
import json
import math
import os
import pathlib
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from blockattn import errors, metrics, tree
from blockattn.errors import UserError
from blockattn.hf import config, files, names
from blockattn.models import classifier, spec as spec_lib
from blockattn.models.transformer import ModelConfig

DTYPES = {'bfloat16': 'BF16', 'float32': 'F32'}
READABLE = ('BF16', 'F32', 'F16')
Report = Callable[[int, int], None]   # called with (bytes done, bytes in all)
Read = Callable[[Iterable[names.Slot]], Iterable[tuple[names.Slot, np.ndarray]]]
Place = Callable[[str, np.ndarray], Any]   # (name of a parameter, its host array) -> what stands in the tree


def load(name: os.PathLike | str, dtype: str, mesh: Mesh | None = None, rules: Any = None,
         report: Report | None = None) -> tuple[ModelConfig, Any]:
  """Reads a model in the Hugging Face format, or wrappers with the model that they stand beside.

  Args:
    name: a local folder, or the hub's owner/model or owner/model@revision.
    dtype: of the parameters, 'float32' or 'bfloat16'.
    mesh, rules: where the parameters go (`models.spec.shardings`); without, to the default device. On several
      processes each reads the whole checkpoint and keeps its own parts.
    report: progress callback.

  Returns:
    (ModelConfig, parameter tree of jax arrays). Host memory above the parameters: the largest stacked kind.

  Raises:
    ValueError: anything that does not fit exactly, naming file and key, before any weight is read; or a weight is NaN or
      infinite.
    FileNotFoundError: a missing folder or file.
  """
  errors.check_choice('dtype', dtype, DTYPES)
  folder = files.locate(name)
  cfg = config.read(folder)
  if (folder / files.WRAPPERS).exists():
    return cfg, _load_wrapped(folder, cfg, dtype, mesh, rules, report)
  stored = _checked(folder, cfg)
  return cfg, assemble(cfg, stored, functools.partial(_read, stored), dtype, _placer(cfg, mesh, rules), report)


def fingerprint(folder: pathlib.Path, dtype: str) -> str:
  """`tree.fingerprint` of what `load` gives, of which no more than a stacked kind is there at a time.

  Raises as `load`; wrappers alone are refused.
  """
  cfg, facts = config.read(folder), {}
  stored = _checked(folder, cfg)

  def look(name, host):
    facts[name] = host.shape, jax.device_get(_bit_sums(host))
    return np.abs(host).max()   # not finite if a value is not

  assemble(cfg, stored, functools.partial(_read, stored), dtype, look)
  return tree.fingerprint_of(facts)


def _checked(folder, cfg) -> dict[str, files.Stored]:
  """The tensors that a model is made of."""
  stored = files.stored_tensors(folder)
  _check_tied_head(cfg, stored)
  stored = {key: at for key, at in stored.items() if not (cfg.tied and key == names.HEAD or names.is_buffer(key))}
  check_stored(names.slots(cfg), stored, folder)
  return stored


_bit_sums = jax.jit(tree.bit_sums)


def assemble(cfg: ModelConfig, stored: Mapping[str, files.Stored], read: Read, dtype: str, place: Place,
             report: Report | None = None) -> Any:
  """The parameter tree of tensors that were checked (`check_stored`).

  Args:
    stored: what lies where, by name.
    read: reads the tensors of some slots.
    dtype, report: as of `load`.
    place: what becomes of each parameter's host array.

  Raises:
    ValueError: a weight is NaN or infinite, or a learned sink is predicted; names the file and the tensor.
  """
  slots, done, flat = names.slots(cfg), 0, {}
  total = sum(math.prod(at.shape) for at in stored.values())
  for kind, members in _by_kind(slots).items():
    host = _stack(members, read(members), dtype)
    for part, value in _split_sinks(kind, host, cfg, stored).items():
      flat[part] = place(part, value)
    done += host.size
    if report:
      report(done * jnp.dtype(dtype).itemsize, total * jnp.dtype(dtype).itemsize)
  _check_finite(flat, slots, stored, read, dtype)
  return traverse_util.unflatten_dict(flat, sep='/')


def on_device(name: str, host: np.ndarray) -> jax.Array:
  """Where `assemble` places a parameter by default: the default device."""
  del name
  return jnp.asarray(host)


def dtypes(stored: Mapping[str, files.Stored]) -> list[str]:
  return [at.dtype for at in stored.values()]


def stored_dtypes(folder: pathlib.Path) -> list[str]:
  """The dtype of each tensor of a model, of wrappers with those of the model beside them, as safetensors calls it."""
  if not (folder / files.WRAPPERS).exists():
    return dtypes(files.stored_tensors(folder))
  with files.open_tensors(folder / files.WRAPPERS) as tensors:
    own = [tensors.get_slice(key).get_dtype() for key in tensors.keys()]
  return stored_dtypes(files.locate(config.read_meta(folder)['source'])) + own


def dtype_for(stored: Iterable[str]) -> str:
  """The smallest of DTYPES that holds numbers of these dtypes, safetensors' names of them, as they are."""
  return 'bfloat16' if set(stored) == {'BF16'} else 'float32'


def rounding(stored: Collection[str], dtype: str) -> str:
  """A line about the tensors that lose digits in `dtype`; '' if none does.

  Args:
    stored: their dtypes, safetensors' names of them.
  """
  lossy = collections.Counter(name for name in stored if dtype == 'bfloat16' and name != 'BF16')
  return '; '.join(f'{count} of {len(stored)} tensors are rounded from {name} to {DTYPES[dtype]}'
                   for name, count in sorted(lossy.items()))


def save(params: Any, cfg: ModelConfig, folder: os.PathLike | str, *, source: os.PathLike | str, meta: dict, card: str,
         dtype: str, max_shard_bytes: float = 5e9, overwrite: bool = False,
         report: Report | None = None) -> None:
  """Writes a model in the Hugging Face format, whole or not at all.

  Learned sinks become vocabulary: their rows follow the embedding, the tokenizer gets the tokens <|sink_i|> with the
  ids V + i, and blockattn.json says how many there are, so that `load` finds them again. An untied head gets zero rows
  for them (logit 0); a tied one is the embedding, rows of the sinks included. Logits of the first V ids are ours either
  way, and generation_config.json suppresses the sinks.

  Args:
    params: tree of numpy or jax arrays, sharded over several processes or not; then every process must call.
    source: folder whose tokenizer, generation config and licence files are copied.
    meta: what blockattn.json shall say about block attention (sinks, separator, positions, teacher, ...).
    card: text of README.md.
    dtype: of the weights in the files, 'float32' or 'bfloat16'.
    max_shard_bytes: a file is not longer than this unless one tensor is.
    overwrite: replace a folder that is not empty.
    report: progress callback.

  Raises:
    FileExistsError: the folder is not empty.
    FileNotFoundError: `source` has no tokenizer.
    ValueError: parameters, architecture or meta that cannot be written, before anything is.
  """
  errors.check_choice('dtype', dtype, DTYPES)
  flat = _check_params(params, cfg)
  raw_config = config.to_dict(cfg, dtype, files.token_ids(pathlib.Path(source)))
  meta = check_meta(meta, cfg)
  slots = names.slots(cfg)
  sizes = {key: math.prod(slot.hf_shape) * jnp.dtype(dtype).itemsize for key, slot in slots.items()}
  shards = files.plan_shards(sizes, max_shard_bytes)
  done = 0
  new_folder = files.new_folder(pathlib.Path(folder), overwrite) if jax.process_index() == 0 else contextlib.nullcontext()
  with new_folder as new:   # None where another process writes
    for file, keys in shards.items():
      tensors = {key: _tensor(flat, slots[key], cfg, dtype) for key in keys}   # all processes: gathers are collective
      if new is not None:
        files.write_shard(new / file, tensors)
      done += sum(sizes[key] for key in keys)
      if report:
        report(done, sum(sizes.values()))
    if new is not None:
      files.write_index(new, shards, sizes)
      _write_companions(new, pathlib.Path(source), cfg, raw_config, meta, card)
      verify(new, cfg, dtype)


def save_wrappers(rows: Any, cfg: ModelConfig, folder: os.PathLike | str, *, source: os.PathLike | str, meta: dict,
                  card: str, overwrite: bool = False) -> None:
  """Writes the learned sinks and tails alone; the model that they stand beside is read from where meta['source'] says.

  Args:
    rows: [learned_sinks, D].
    source, meta, card, overwrite: as of `save`. Tokenizer and generation config are the base model's: no text is any of
      these rows.

  Raises as `save`.
  """
  meta, source = check_meta(meta, cfg), pathlib.Path(source)
  with files.new_folder(pathlib.Path(folder), overwrite) as new:
    files.write_shard(new / files.WRAPPERS, {'sinks': np.asarray(rows)})
    files.write_companions(new, source, meta, card)
    _write_generation_config(new / 'generation_config.json', files.token_ids(source), files.own_stop_ids(source))


def verify(folder: pathlib.Path, cfg: ModelConfig, dtype: str):
  """Reads the headers of a written folder again; raises ValueError unless it is this architecture in this dtype."""
  read_back = config.read(folder)
  if read_back != cfg:
    raise UserError(f'{folder}: config.json reads back as {read_back}, not as {cfg}')
  stored = files.stored_tensors(folder)
  check_stored(names.slots(cfg), stored, folder)
  for key, at in stored.items():
    if at.dtype != DTYPES[dtype]:
      raise UserError(f'{at.file}: {key} is {at.dtype}, expected {DTYPES[dtype]}')


# Which weights they were: a path says it only as long as nobody writes there.


def weights_facts(params: Any) -> dict:
  """What a checkpoint, stored logits or an export say of the weights that they were made from."""
  return {'fingerprint': tree.fingerprint(params), 'dtype': str(jax.tree.leaves(params)[0].dtype)}


def read_as_made(read: Callable[[str], Any], dtype: str, said: dict | None) -> tuple[Any, dict]:
  """(parameters, their `weights_facts`): as `dtype`, or, where those are not the weights that something was made from, in
  the dtype that they were read in then: of float32 weights, one of the two was rounded.

  Args:
    read: dtype -> parameters.
    said: from `weights_facts`, of what was made; None: not known.
  """
  params = read(dtype)
  facts = weights_facts(params)
  if said and said['dtype'] != dtype and said['fingerprint'] != facts['fingerprint']:
    params = read(said['dtype'])
    facts = weights_facts(params)
  return params, facts


def check_same_weights(said: dict | None, now: dict | None, what: str, source: os.PathLike | str, remedy: str):
  """Checks that the weights are those that something was made from, as far as it says.

  Args:
    said, now: from `weights_facts`; None: not known.
    what: what was made from them, for the error.
    source: where they lie.
    remedy: what else to do than to put the old weights back.

  Raises:
    ValueError: they are others.
  """
  if said and now and said['fingerprint'] != now['fingerprint']:
    old, new = (f'{facts["fingerprint"][:12]}, read as {facts["dtype"]}' for facts in (said, now))
    raise UserError(f'{what} was made from other weights than lie in {source} now (fingerprint {old}; now {new}): put the '
                    f'old ones back, or {remedy}')


# Reading.


def _load_wrapped(folder, cfg, dtype, mesh, rules, report):
  """The parameters of a model with the learned sinks and tails that were trained beside it."""
  meta = config.read_meta(folder)
  said, source = meta.get('source_weights'), meta['source']
  params, facts = read_as_made(lambda dtype: load(source, dtype, mesh, rules, report)[1], dtype, said)
  check_same_weights(said, facts, str(folder), source, 'train its rows again')
  with files.open_tensors(folder / files.WRAPPERS) as tensors:
    rows = tensors.get_tensor('sinks')
  shape = cfg.learned_sinks, cfg.width
  if rows.shape != shape or not np.isfinite(rows.astype(np.float32)).all():
    raise UserError(f'{folder / files.WRAPPERS}: rows of {rows.shape}, where finite ones of {shape} belong')
  params = jax.tree.map(lambda x: x.astype(dtype), params)
  return params | {'sinks': _placer(cfg, mesh, rules)('sinks', rows.astype(jnp.dtype(dtype)))}


def check_stored(slots: Mapping[str, names.Slot], stored: Mapping[str, files.Stored], place: pathlib.Path,
                 says: str = 'config.json', readable: Collection[str] = READABLE):
  """Checks that every expected tensor is there, with its shape, and nothing else is.

  Args:
    slots, stored: by the name that they have in the file.
    place: where they were looked for.
    says: what implies the shapes.
    readable: dtypes.

  Raises:
    ValueError: they are not; names the file and the tensor.
  """
  unmapped = [key for key in stored if key not in slots]
  if unmapped:
    raise UserError(f'{stored[unmapped[0]].file}: {len(unmapped)} tensors have no place in this architecture, first '
                    f'{unmapped[0]}; {tree.did_you_mean(unmapped[0], slots)}')
  missing = [key for key in slots if key not in stored]
  if missing:
    raise UserError(f'{place}: {len(missing)} tensors are missing, first {missing[0]}')
  for key, at in stored.items():
    if at.shape != slots[key].hf_shape:
      raise UserError(f'{at.file}: {key} has shape {at.shape}, {says} implies {slots[key].hf_shape}')
    if at.dtype not in readable:
      raise UserError(f'{at.file}: {key} is {at.dtype}; supported are {", ".join(readable)}')


def _check_tied_head(cfg, stored):
  """A head beside tied embeddings must be the embedding: transformers would silently use it, and we would not."""
  if not (cfg.tied and names.HEAD in stored and names.EMBED in stored):
    return
  head, embed = (_bits(stored[key].file, key) for key in (names.HEAD, names.EMBED))
  if not np.array_equal(head, embed):
    raise UserError(f'{stored[names.HEAD].file}: {names.HEAD} differs from {names.EMBED}, though config.json says '
                    'tie_word_embeddings=true; set it to false if the head was trained, or delete the tensor')


def _check_finite(flat, slots, stored, read, dtype):
  """A model with a NaN answers nonsense, if anything."""
  broken = {'embed' if name == 'sinks' else name for name in tree.not_finite(flat)}
  for slot, tensor in read([slot for slot in slots.values() if slot.name in broken]):
    if not np.isfinite(tensor.astype(jnp.dtype(dtype)).astype(np.float32)).all():
      raise UserError(f'{stored[slot.key].file}: {slot.key} holds NaN or infinity, read as {dtype}: the file is damaged, or '
                      'the training went wrong; get the weights again, or take an earlier checkpoint')


def _bits(file, key):
  with files.open_tensors(file) as tensors:
    return tensors.get_tensor(key).view(np.uint8)


def _by_kind(slots):
  """{our parameter: its slots, in layer order}."""
  kinds = collections.defaultdict(list)
  for slot in slots.values():
    kinds[slot.name].append(slot)
  return kinds


def _read(stored, slots):
  """(slot, tensor) of each slot. Files are mapped for one kind at a time, so that the map is dropped again."""
  by_file = collections.defaultdict(list)
  for slot in slots:
    by_file[stored[slot.key].file].append(slot)
  for file, group in by_file.items():
    with files.open_tensors(file) as tensors:
      for slot in group:
        yield slot, tensors.get_tensor(slot.key)


def _stack(members, tensors, dtype):
  """All layers of one parameter."""
  first = members[0]
  layers = () if first.layer is None else (len(members),)
  host = np.empty(layers + first.shape, jnp.dtype(dtype))
  for slot, tensor in tensors:
    host[... if slot.layer is None else slot.layer] = slot.from_hf(tensor)
  return host


def _split_sinks(kind, host, cfg, stored):
  """The embedding of an export with learned sinks -> {'embed': [V, D], 'sinks': [n, D]}; others as they are."""
  if not cfg.learned_sinks or kind not in ('embed', 'head'):
    return {kind: host}
  rows, sinks = host[:cfg.vocab], host[cfg.vocab:]
  if kind == 'embed':
    return {'embed': rows, 'sinks': sinks}
  if np.any(sinks):
    raise UserError(f'{stored[names.HEAD].file}: {names.HEAD} has trained rows for the learned sinks, which the model never '
                    f'predicts; set the rows from {cfg.vocab} on to zero')
  return {'head': rows}


def _placer(cfg, mesh, rules):
  if mesh is None:
    return on_device
  shardings = dict(tree.named_leaves(spec_lib.shardings(classifier.spec(cfg), mesh, rules)))
  return lambda name, host: jax.make_array_from_callback(host.shape, shardings[name], lambda index: host[index])


# Writing.


def _check_params(params, cfg):
  """{name: array}; the tree must be that of the architecture."""
  flat = dict(tree.named_leaves(params))
  expected = {name: spec.shape for name, spec in tree.named_leaves(classifier.spec(cfg))}
  if set(flat) != set(expected):
    raise UserError(f'parameters and architecture differ: {sorted(set(flat) ^ set(expected))} stand on one side only')
  for name, value in flat.items():
    if tuple(value.shape) != expected[name]:
      raise UserError(f'parameter {name} has shape {tuple(value.shape)}, the architecture says {expected[name]}')
  return flat


def check_meta(meta: dict, cfg: ModelConfig) -> dict:
  """What blockattn.json says: `meta` and the architecture's rows. Raises ValueError where the two differ."""
  own = {'learned_sinks': cfg.learned_sinks, 'vocab': cfg.vocab}
  for key, value in own.items():
    if key in meta and meta[key] != value:
      raise UserError(f'meta says {key}={meta[key]!r}, the architecture {value!r}')
  json.dumps(meta)   # a TypeError here names the value that is no JSON, before anything is written
  return {**own, **meta}


def _tensor(flat, slot, cfg, dtype):
  """One Hugging Face tensor from the stacked parameters."""
  value = _fetch(flat[slot.name], slot.layer)
  if cfg.learned_sinks and slot.name == 'embed':
    value = np.concatenate([value, _fetch(flat['sinks'], None).astype(value.dtype)])
  if cfg.learned_sinks and slot.name == 'head':
    value = np.concatenate([value, np.zeros((cfg.learned_sinks, cfg.width), value.dtype)])
  return slot.to_hf(value.astype(jnp.dtype(dtype)))


def _fetch(x, layer):
  """One layer of a stacked parameter (or the whole of one without layers) on the host, wherever its parts are."""
  if isinstance(x, np.ndarray):
    return x if layer is None else x[layer]
  whole = None if x.is_fully_addressable else NamedSharding(x.sharding.mesh, PartitionSpec())
  return np.asarray(_picker(whole)(x, layer))


@functools.cache
def _picker(sharding):
  def pick(x, layer):   # the layer is traced: one compilation for all layers of a kind
    return x if layer is None else jax.lax.dynamic_index_in_dim(x, layer, keepdims=False)
  return jax.jit(pick, out_shardings=sharding)


def _write_companions(new, source, cfg, raw_config, meta, card):
  metrics.write_json(new / 'config.json', raw_config)
  files.write_companions(new, source, meta, card)
  _write_generation_config(new / 'generation_config.json', raw_config, files.own_stop_ids(source))
  if cfg.learned_sinks:
    files.add_sink_tokens(new, cfg.vocab, cfg.learned_sinks)


def _write_generation_config(path, raw_config, stops):
  """The one that was copied, or one of the token ids; it says every token that ends an answer."""
  raw = files.read_json(path) if path.exists() else {key: raw_config[key] for key in files.TOKEN_IDS}
  said = raw.get('eos_token_id')
  if stops and set(stops) != set(said if isinstance(said, list) else [said]):
    raw['eos_token_id'] = stops[0] if len(stops) == 1 else list(stops)
  metrics.write_json(path, raw)
