"""A content-addressed store of block states: host memory before disk. The device's tier is `pool`.

A block's state, its keys before rotation and its values in every layer, depends on its own tokens, on the model, and on a
shared prefix if the prompt has one: all that `Keys` hashes. The same block in another prompt, in another place or in
another process has the same key.

  memory   least recently used first out, by bytes
  disk     a safetensors file per block, written under another name and renamed, so that nobody sees half of it; a checksum
           in its header, so that a flipped or missing byte is a miss; least recently used first out, by bytes

Several processes may use one folder. Whatever happens to the disk costs recomputation, never an answer.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import os
import pathlib
import threading
import time
import warnings
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from blockattn import errors, tree
from blockattn.errors import UserError
from blockattn.models.transformer import ModelConfig

FORMAT = 'blockattn-state-1'
QUANTIZE = ('none', 'int8')
_SUFFIX = '.safetensors'
_STALE = 3600          # seconds after which a half-written file is one that nobody finishes
_PENDING = 8           # blocks that may wait for the disk
_RESCAN = 16           # the folder is measured anew after this part of its bound was written


@dataclasses.dataclass(frozen=True)
class Keys:
  """The keys of a model's blocks; `model` is everything but the tokens that decides a state, see `keys_of`."""
  model: bytes

  def of(self, tokens: Sequence[int], prefix: str = '') -> str:
    """The key, hexadecimal, of a block of these tokens, sinks included, that reads the shared prefix of that key."""
    return _hash(self.model, prefix.encode(), np.asarray(tokens, '<i4').tobytes())


def keys_of(params: Any, cfg: ModelConfig, dtype: str, quantize: str = 'none') -> Keys:
  """The keys of a model's blocks.

  Args:
    params, cfg: the model; every bit of the parameters' values counts.
    dtype: of activations, hence of states.
    quantize: of what is stored, so that exact states and others are told apart in one folder.
  """
  return keys_from(tree.fingerprint(params), cfg, dtype, quantize)


def keys_from(fingerprint: str, cfg: ModelConfig, dtype: str, quantize: str = 'none') -> Keys:
  """`keys_of` parameters of this `tree.fingerprint`."""
  said = (FORMAT, 'keys unrotated', repr(cfg), dtype, quantize)
  return Keys(_hash(*(text.encode() for text in (*said, fingerprint))).encode())


def _hash(*parts: bytes) -> str:
  digest = hashlib.sha256()
  for part in parts:
    digest.update(len(part).to_bytes(8, 'little') + part)
  return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class State:
  """A block's state, on the host.

  Attributes:
    k, v: [L, n, K, H], keys not rotated; int8 if they are quantised.
    k_scale, v_scale: float32 [L, 1, K, H], what a step of an int8 is worth; None of a state that is not quantised.
  """
  k: Any
  v: Any
  k_scale: Any = None
  v_scale: Any = None

  @property
  def tokens(self) -> int:
    return self.k.shape[1]

  @property
  def nbytes(self) -> int:
    return sum(x.nbytes for x in self.arrays().values())

  def arrays(self) -> dict[str, np.ndarray]:
    return {name: x for name, x in vars(self).items() if x is not None}


def quantized(state: State) -> State:
  """The state in int8, symmetric, a scale for each channel of each head in each layer.

  A value that comes back is off by at most half its channel's scale, which is the channel's largest absolute value in the
  block over 127 (and by what its dtype rounds away).
  """
  k, k_scale = _to_int8(state.k)
  v, v_scale = _to_int8(state.v)
  return State(k, v, k_scale, v_scale)


def _to_int8(x):
  x = np.asarray(x, np.float32)
  scale = np.maximum(np.abs(x).max(axis=1, keepdims=True), np.finfo(np.float32).tiny) / np.float32(127)
  return np.rint(x / scale).astype(np.int8), scale


def relative_error(state: State, stored: State) -> float:
  """Root mean square of what quantisation changed, over that of the values."""
  wrong = right = 0.0
  for name in ('k', 'v'):
    exact = np.asarray(getattr(state, name), np.float32)
    back = getattr(stored, name) * getattr(stored, f'{name}_scale')
    wrong, right = wrong + float(np.square(exact - back).sum()), right + float(np.square(exact).sum())
  return (wrong / right) ** 0.5 if right else 0.0


@dataclasses.dataclass
class Counts:
  """What became of the questions to a store."""
  memory: int = 0          # found there
  disk: int = 0
  missing: int = 0
  corrupt: int = 0         # dropped: checksum, form or length were wrong; these are among the missing
  written: int = 0         # files
  evicted_memory: int = 0
  evicted_disk: int = 0
  int8_blocks: int = 0     # blocks that were quantised, and the sum of their `relative_error`
  int8_error: float = 0.0


class Store:
  """Host memory before disk.

  Args:
    memory_bytes: bound of the states in host memory; 0: none are kept there.
    folder: of the files, made if absent; None: no disk.
    disk_bytes: bound of the files in the folder, which other processes may fill too.
    quantize: 'none', or 'int8', see `quantized`.

  Use it as a context manager, or call `close`: files are written by a thread of its own.

  Raises:
    ValueError: an unknown quantisation, a negative bound.
    NotADirectoryError: `folder` is a file.
  """

  def __init__(self, memory_bytes: int = 4 << 30, folder: str | os.PathLike | None = None, disk_bytes: int = 64 << 30,
               quantize: str = 'none'):
    errors.check_choice('quantize', quantize, QUANTIZE)
    errors.check_number('memory_bytes', memory_bytes, 0)
    errors.check_number('disk_bytes', disk_bytes, 0)
    self.quantize, self.counts = quantize, Counts()
    self._memory_bytes, self._held = memory_bytes, 0
    self._memory: collections.OrderedDict[str, State] = collections.OrderedDict()
    self._disk = None if folder is None else _Disk(pathlib.Path(folder).expanduser(), disk_bytes, self.counts)
    self._lock = threading.Lock()

  def get(self, key: str, shape: tuple[int, ...] | None = None) -> tuple[State, str] | None:
    """(the state, 'memory' or 'disk'), or None. What the disk had is in memory from then on.

    Args:
      shape: [L, n, K, H] of the state; a file that holds another one is a miss. None: any.
    """
    with self._lock:
      state = self._memory.get(key)
      if state is not None:
        self._memory.move_to_end(key)
        self.counts.memory += 1
        return state, 'memory'
    state = None if self._disk is None else self._disk.read(key, shape)
    with self._lock:
      if state is None:
        self.counts.missing += 1
        return None
      self.counts.disk += 1
      self._keep(key, state)
    return state, 'disk'

  def put(self, key: str, state: State) -> None:
    """Keeps the state. The disk is written to later, see `flush`."""
    if self.quantize == 'int8':
      exact, state = state, quantized(state)
      with self._lock:
        self.counts.int8_blocks += 1
        self.counts.int8_error += relative_error(exact, state)
    with self._lock:
      self._keep(key, state)
    if self._disk is not None:
      self._disk.write(key, state)

  def _keep(self, key, state):
    old = self._memory.pop(key, None)
    self._held -= old.nbytes if old is not None else 0
    if state.nbytes > self._memory_bytes:
      return
    self._memory[key] = state
    self._held += state.nbytes
    while self._held > self._memory_bytes:
      self._held -= self._memory.popitem(last=False)[1].nbytes
      self.counts.evicted_memory += 1

  def flush(self) -> None:
    """Waits until every state is on disk, or given up."""
    if self._disk is not None:
      self._disk.flush()

  @property
  def fault(self) -> Exception | None:
    """Why nothing is written to disk any more; None: it is."""
    return None if self._disk is None else self._disk.fault

  def close(self) -> None:
    if self._disk is not None:
      self._disk.close()

  def __enter__(self):
    return self

  def __exit__(self, *exc):
    self.close()


class _Disk:
  """The folder of files; written to by one thread."""

  def __init__(self, folder, limit, counts):
    if folder.exists() and not folder.is_dir():
      raise NotADirectoryError(f'{folder} is no folder; name one for the states of blocks')
    folder.mkdir(parents=True, exist_ok=True)
    self._folder, self._limit, self._counts = folder, limit, counts
    self._writer = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix='blockattn-cache')
    self._room = threading.BoundedSemaphore(_PENDING)
    self.fault: Exception | None = None   # of a write; none is tried after it
    self._unmeasured = limit   # bytes written since the folder was measured: measure at the first write

  def _path(self, key):
    return self._folder / key[:2] / f'{key}{_SUFFIX}'

  def read(self, key, shape) -> State | None:
    path = self._path(key)
    try:
      state = _load(path, shape)
    except (ValueError, safetensors.SafetensorError):
      self._counts.corrupt += 1
      with contextlib.suppress(OSError):
        path.unlink()
      return None
    except OSError:   # not there, or not for us to read: it may be whole, and serve others
      return None
    with contextlib.suppress(OSError):   # another user's file, or a folder that is only read
      os.utime(path)   # used now: the last to go
    return state

  def write(self, key, state):
    self._room.acquire()   # wait, rather than hold ever more states for a slow disk
    self._writer.submit(self._write, key, state).add_done_callback(lambda _: self._room.release())

  def _write(self, key, state):
    if self.fault is not None:
      return
    path = self._path(key)
    partial = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
      if path.exists():
        return
      if not path.parent.exists():
        path.parent.mkdir(exist_ok=True)
        path.parent.chmod(self._folder.stat().st_mode & 0o7777)   # who may write to the folder may write here
      _save(partial, state)
      partial.replace(path)
      self._counts.written += 1
      self._unmeasured += state.nbytes
      if self._unmeasured * _RESCAN >= self._limit:
        self._evict()
    except Exception as error:   # a thread's exception would be lost, and no answer may depend on the disk
      self.fault = error
      with contextlib.suppress(OSError):
        partial.unlink(missing_ok=True)
      warnings.warn(f'{self._folder}: {error!r}; block states are kept in memory only from here on, and computed again '
                    'where they are gone', RuntimeWarning, stacklevel=2)

  def _evict(self):
    """Measures the folder and takes the files that were not used for longest, until it is within its bound."""
    found, now = [], time.time()
    for path in self._folder.glob('??/*'):
      with contextlib.suppress(OSError):   # another process may take it at the same time
        stat = path.stat()
        if path.suffix == _SUFFIX:
          found.append((stat.st_mtime, stat.st_size, path))
        elif path.suffix == '.tmp' and now - stat.st_mtime > _STALE:
          path.unlink(missing_ok=True)
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
      if total <= self._limit:
        break
      with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
      total -= size
      self._counts.evicted_disk += 1
    self._unmeasured = 0

  def flush(self):
    self._writer.submit(lambda: None).result()   # one thread writes them in turn

  def close(self):
    self._writer.shutdown(wait=True)


def _save(path, state):
  arrays = {name: np.ascontiguousarray(x) for name, x in state.arrays().items()}
  path.write_bytes(safetensors.numpy.save(arrays, metadata={'format': FORMAT, 'checksum': _checksum(arrays)}))


def _load(path, shape) -> State:
  """Raises ValueError or SafetensorError of a file that is not as it was written, OSError of one that cannot be read."""
  if not path.is_file():   # to open a pipe is to wait for its writer
    raise FileNotFoundError(path)
  with safetensors.safe_open(path, framework='np') as tensors:
    arrays = {name: tensors.get_tensor(name) for name in tensors.keys()}
    said = tensors.metadata() or {}
  if said.get('format') != FORMAT or said.get('checksum') != _checksum(arrays):
    raise UserError(f'{path}: not what was written')
  state = _state_of(arrays)
  if state is None or shape not in (None, state.k.shape):
    raise UserError(f'{path}: a state of another form')
  return state


def _state_of(arrays) -> State | None:
  """The state that arrays are, None if they are none."""
  shapes = {name: x.shape for name, x in arrays.items()}
  exact = shapes.get('k')
  if exact is None or len(exact) != 4:
    return None
  forms = {'k': exact, 'v': exact}
  if arrays['k'].dtype == np.int8:
    forms |= dict.fromkeys(('k_scale', 'v_scale'), (exact[0], 1, *exact[2:]))
  return State(**arrays) if shapes == forms else None


def _checksum(arrays) -> str:
  value = 0
  for name, x in sorted(arrays.items()):
    value = zlib.crc32(x.reshape(-1).view(np.uint8), zlib.crc32(f'{name}{x.shape}{x.dtype}'.encode(), value))
  return f'{value:08x}'
