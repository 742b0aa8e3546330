"""Checkpoints: `<folder>/<step>/{params,opt_state,data,meta}`, each item readable alone.

`params` and `opt_state` are orbax arrays, `data` (where the data stream stands) and `meta` (what the model is) are JSON.
A step's folder appears under its name only when it is complete, so a run that is killed while it saves finds the step
before.

Beside the items stand `checksums-<i>-of-<n>.json`, each with the size and CRC-32 of its share of the step's files, and
nothing is read before they agree: the arrays' own format checks its index, but gives flipped bits of a large array back
as other values. They are written after the step, by every process its share; a step without them is read unchecked.
"""

import collections
import concurrent.futures
import contextlib
import logging
import os
import pathlib
import re
import shutil
import sys
import time
import zlib
from collections.abc import Iterable, Sequence

import jax
import orbax.checkpoint as ocp
from etils import epath

from blockattn import disk, metrics, tree
from blockattn.errors import UserError

ARRAYS = ('params', 'opt_state')
ITEMS = (*ARRAYS, 'data', 'meta')
_SUMS = 'checksums-*-of-*.json'
_PART = '.orbax-checkpoint-tmp'   # in the name of a step that is being written
_REMOVALS = 20                    # tries to remove such a part
_READERS, _PIECE = 8, 1 << 22     # threads that read files to check them, and bytes that each reads at a time


class NotSaved(UserError):
  """A step could not be written; the steps before it stand."""


class Damaged(UserError):
  """Files of a step are not what was written."""


class Checkpoints:
  """The checkpoints of a run, to be entered and left by all of its processes.

  Args:
    folder: made if absent.
    keep: how many of the newest steps stay.
  """

  def __init__(self, folder, *, keep: int = 2):
    self.folder = pathlib.Path(folder).absolute()
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, cleanup_tmp_directories=True)
    self._manager = ocp.CheckpointManager(self.folder, options=options)
    self._writer, self._quiet = concurrent.futures.ThreadPoolExecutor(1, 'checkpoint'), contextlib.ExitStack()
    self._write: concurrent.futures.Future | None = None   # of the step that was saved last

  def __enter__(self) -> 'Checkpoints':
    self._quiet.enter_context(_without_echoes())
    self._quiet.enter_context(self._writer)
    self._hook, sys.unraisablehook = sys.unraisablehook, _without_late_writes(sys.unraisablehook)
    return self

  def __exit__(self, kind, *_):
    if kind is None:   # else threads of a write that failed may yet come to their end
      sys.unraisablehook = self._hook
    with self._quiet:
      # An error that is on its way says more than that of a write beside it.
      with contextlib.suppress(*(() if kind is None else (Exception,))):
        self.wait()
        self._manager.close()

  def newest(self) -> int | None:
    """The newest complete step, None without one."""
    return self._manager.latest_step()

  def save(self, step: int, params, opt_state, data: dict, meta: dict):
    """Saves all four items of a step. A step that stands already is kept as it is.

    Raises:
      NotSaved: this step, or the one whose writing was not waited for.
    """
    self.wait()
    if step in self._manager.all_steps():
      return
    args = ocp.args.Composite(params=ocp.args.StandardSave(params), opt_state=ocp.args.StandardSave(opt_state),
                              data=ocp.args.JsonSave(data), meta=ocp.args.JsonSave(meta))
    path = self.folder / str(step)
    with _writing(path):
      self._manager.save(step, args=args)   # returns when the values have been taken
    self._write = self._writer.submit(self._finish, path)

  def _finish(self, path: pathlib.Path):
    with _writing(path):
      self._manager.wait_until_finished()
      _write_sums(path, jax.process_index(), jax.process_count())

  def check(self):
    """Raises NotSaved if a write that goes on in the background has failed. Costs nothing: to be asked at every step."""
    if self._write is not None and self._write.done():
      self._write.result()

  def wait(self):
    """Returns when the last step that was saved stands, with its checksums. Raises NotSaved."""
    if self._write is not None:
      self._write.result()

  def verify(self, step: int):
    """Checks this process's share of a step's files; all processes together check them all. Raises Damaged."""
    verify(self.folder, step, index=jax.process_index(), count=jax.process_count())

  def data(self, step: int) -> dict:
    """The `data` item of a step. Raises Damaged."""
    return _restored(self._manager, step, data=ocp.args.JsonRestore())['data']

  def meta(self, step: int) -> dict:
    """The `meta` item of a step. Raises Damaged."""
    return _restored(self._manager, step, meta=ocp.args.JsonRestore())['meta']

  def restore(self, step: int, params, opt_state):
    """Reads (params, opt_state) of a step back, unchecked: see `verify`.

    Args:
      params, opt_state: trees of arrays or of jax.ShapeDtypeStruct with shardings: where and in which dtype they go.

    Raises:
      Damaged: an item is not there, or cannot be read.
    """
    got = _restored(self._manager, step, params=ocp.args.StandardRestore(abstract_like(params)),
                    opt_state=ocp.args.StandardRestore(abstract_like(opt_state)))
    return got['params'], got['opt_state']


def _restored(manager, step: int, **items):
  """{item: what is read of it}. A step without checksums may hold anything: whatever stops the reading is its damage."""
  path = pathlib.Path(manager.directory) / str(step)
  for item in items:
    if not (path / item).is_dir():
      raise Damaged(_what_to_do(path, f'{path} has no {item}'))
  try:
    with _without_echoes():
      return manager.restore(step, args=ocp.args.Composite(**items))
  except (MemoryError, jax.errors.JaxRuntimeError):   # of this process or of another one
    raise
  except Exception as error:
    raise Damaged(_what_to_do(path, f'{path}: its {" or ".join(items)} cannot be read: {_reason(error)}')) from error


@contextlib.contextmanager
def _without_echoes():
  """Within the block orbax does not also log, with their tracebacks, the errors that it raises and that we say in a line."""
  log, is_news = logging.getLogger('absl'), lambda record: not (record.exc_info and 'orbax' in record.pathname)
  log.addFilter(is_news)
  try:
    yield
  finally:
    log.removeFilter(is_news)


def _without_late_writes(hook):
  """`sys.unraisablehook` that is silent where tensorstore's threads, after the first of them has failed to write, find
  nobody whom to tell of the others: on a full disk that is a traceback per file."""
  def hear(raised):
    if raised.exc_type is not RuntimeError or str(raised.exc_value) != 'Event loop is closed':
      hook(raised)
  return hear


@contextlib.contextmanager
def _writing(path: pathlib.Path):
  """Within the block, what keeps a step from being written is NotSaved, and what there is of it is removed."""
  try:
    yield
  except Exception as error:
    if jax.process_index() == 0 and not path.exists():
      _remove_parts(path)
    raise NotSaved(_why_not(path, error)) from error


def _remove_parts(path: pathlib.Path):
  """Makes room, as far as threads let it that write on for a moment after the first of them has failed. What they leave is
  removed by the next start."""
  for _ in range(_REMOVALS):
    parts = list(path.parent.glob(f'{path.name}{_PART}*'))
    for part in parts:
      shutil.rmtree(part, ignore_errors=True)
    time.sleep(0.1)
    if not any(part.exists() for part in parts):
      return


def _why_not(path: pathlib.Path, error: Exception) -> str:
  """What the user is told of a step that was not saved."""
  room = shutil.disk_usage(path.parent)
  before = [step for step in steps(path.parent) if step < int(path.name)]
  go_on = (f'Step {before[-1]} stands: start the same command again to go on from it' if before else
           'No step before it stands: start the same command again')
  return (f'step {path.name} could not be saved in {path.parent}: {_reason(error)} ({_bytes(room.free)} of '
          f'{_bytes(room.total)} are free there). {go_on}, after making room or seeing to what is in the way')


def _reason(error: BaseException) -> str:
  """What the operating system said, if it was that; else the first line of the error."""
  cause = error
  while cause is not None:
    if isinstance(cause, OSError) and cause.strerror:
      return cause.strerror
    if number := re.search(r"os_error_code='(\d+)'", str(cause)):   # as tensorstore writes it
      return os.strerror(int(number[1]))
    cause = cause.__cause__ or cause.__context__
  return (str(error).strip() or repr(error)).splitlines()[0][:300]


def _bytes(count: float) -> str:
  for unit in ('B', 'KiB', 'MiB', 'GiB'):
    if count < 1024:
      return f'{count:.0f} {unit}' if unit == 'B' else f'{count:.1f} {unit}'
    count /= 1024
  return f'{count:.1f} TiB'


# Checksums.

def _write_sums(path: pathlib.Path, index: int, count: int):
  """Writes the sizes and checksums of this process's share of a step's files."""
  try:
    metrics.write_json(path / f'checksums-{index}-of-{count}.json', _facts(path, _share(_files(path), index, count)))
  except FileNotFoundError:
    if path.exists():
      raise
    # else newer steps have pushed this one out meanwhile


def _files(path: pathlib.Path) -> list[str]:
  """The names of the files of a step's items."""
  return sorted(file.relative_to(path).as_posix() for item in ITEMS for file in (path / item).rglob('*') if file.is_file())


def _share(names: Iterable[str], index: int, count: int) -> list[str]:
  """The names that fall to one of `count` processes, whatever other names there are."""
  return [name for name in names if zlib.crc32(name.encode()) % count == index]


def _facts(path: pathlib.Path, names: Sequence[str]) -> dict[str, list[int]]:
  """name -> [bytes, CRC-32] of files."""
  with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:   # zlib leaves the other threads to run
    return dict(zip(names, pool.map(lambda name: _fact(path / name), names), strict=True))


def _fact(path: pathlib.Path) -> list[int]:
  size = total = 0
  with open(path, 'rb') as file:
    while piece := file.read(_PIECE):
      size, total = size + len(piece), zlib.crc32(piece, total)
  return [size, total]


def verify(folder, step: int, items: Sequence[str] = ITEMS, *, index: int = 0, count: int = 1):
  """Checks the files of some items of a step, by default all, against their checksums, as far as there are any.

  Args:
    index, count: checks one of `count` shares, which together are all files.

  Raises:
    Damaged: names a file, and the step before.
  """
  path = pathlib.Path(folder).absolute() / str(step)
  known = _known(path)
  mine = _share((name for name in known if name.split('/')[0] in items), index, count)
  for name in mine:
    if wrong := _wrong_size(path / name, known[name][0]):
      raise Damaged(_what_to_do(path, f'{path / name} {wrong}'))
  for name, fact in _facts(path, mine).items():
    if fact != known[name]:
      raise Damaged(_what_to_do(path, f'{path / name} has other content than was written'))


def _known(path: pathlib.Path) -> dict[str, list[int]]:
  known = {}
  for file in path.glob(_SUMS):
    try:
      facts = disk.read_json(file, {str: [int]})
      if any(len(fact) != 2 for fact in facts.values()):
        raise UserError(f'{file} lists other things than sizes and checksums')
    except ValueError as error:
      raise Damaged(_what_to_do(path, str(error))) from None
    known |= facts
  return known


def _wrong_size(file: pathlib.Path, size: int) -> str:
  try:
    found = file.stat().st_size
  except FileNotFoundError:
    return 'is missing'
  return '' if found == size else f'has {found} bytes, of {size} that were written'


def _what_to_do(path: pathlib.Path, wrong: str) -> str:
  whole = [step for step in steps(path.parent) if step != int(path.name) and _has_its_sizes(path.parent / str(step))]
  if not whole:
    return f'{wrong}. No other step stands in {path.parent}: begin again with a new one'
  return (f'{wrong}. Step {whole[-1]} stands too: to go on from there, move this one away '
          f'(mv {path} {path}.damaged) and start the same command again')


def _has_its_sizes(path: pathlib.Path) -> bool:
  try:
    known = _known(path)
    return (all((path / item).is_dir() for item in ('params', 'meta')) and
            not any(_wrong_size(path / name, size) for name, (size, _) in known.items()))
  except Damaged:
    return False


# Reading without a run.

def save_params(folder, params, meta: dict, step: int = 0):
  """Writes a checkpoint of parameters alone, as a conversion makes it, and the best step of a run. Raises NotSaved."""
  path = pathlib.Path(folder).absolute() / str(step)
  path.parent.mkdir(parents=True, exist_ok=True)
  options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False, cleanup_tmp_directories=True)
  with _writing(path), ocp.CheckpointManager(path.parent, options=options) as manager:
    manager.save(step, args=ocp.args.Composite(params=ocp.args.StandardSave(params), meta=ocp.args.JsonSave(meta)))
    _write_sums(path, jax.process_index(), jax.process_count())


def remove(folder, step: int):
  """Deletes a step: at once no step any more, then its files."""
  path = pathlib.Path(folder).absolute() / str(step)
  going = path.with_name(f'{step}{_PART}-removed')
  path.rename(going)
  shutil.rmtree(going)


def load_meta(folder, step: int | None = None) -> dict:
  """The `meta` item of a step, by default of the newest.

  Raises:
    FileNotFoundError: there is none.
    Damaged: its files are not what was written.
  """
  with _reader(folder) as manager:
    step = _step_of(manager, folder, step, 'meta')
    verify(folder, step, ('meta',))
    return _restored(manager, step, meta=ocp.args.JsonRestore())['meta']


def load_params(folder, abstract, step: int | None = None):
  """The `params` item of a step, by default of the newest.

  Args:
    abstract: tree of jax.ShapeDtypeStruct (`models.spec.abstract`): shapes must match, dtype and sharding are chosen.

  Raises:
    FileNotFoundError: no such folder or step, or a step without parameters.
    ValueError: the parameters are those of another architecture.
    Damaged: their files are not what was written.
  """
  with _reader(folder) as manager:
    step = _step_of(manager, folder, step, 'params')
    verify(folder, step, ('params',))
    _check_shapes(folder, _shapes_of(pathlib.Path(manager.directory) / str(step)), abstract)
    return _restored(manager, step, params=ocp.args.StandardRestore(abstract))['params']


def load_opt_state(folder, abstract, step: int | None = None):
  """The `opt_state` item of a step, by default of the newest; arguments and errors as of `load_params`."""
  with _reader(folder) as manager:
    step = _step_of(manager, folder, step, 'opt_state')
    verify(folder, step, ('opt_state',))
    _check_moments(manager, step, abstract)
    return _restored(manager, step, opt_state=ocp.args.StandardRestore(abstract))['opt_state']


def check_opt_state(folder, abstract, step: int | None = None):
  """Raises what `load_opt_state` would, but for damage of the values, which are not read."""
  with _reader(folder) as manager:
    _check_moments(manager, _step_of(manager, folder, step, 'opt_state'), abstract)


def _check_moments(manager, step, wanted):
  path = pathlib.Path(manager.directory) / str(step)
  # Names would not do: orbax has others for the nodes of optax.
  shapes = lambda state: collections.Counter(tuple(leaf.shape) for leaf in jax.tree.leaves(state))
  if shapes(_shapes_of(path, 'opt_state')) != shapes(wanted):
    raise UserError(f'{path} holds the optimizer\'s state of another model, or of another optimizer, or of other parts of '
                    'the model (learned sinks and tails alone, or all of it)')


def param_dtypes(folder, step: int | None = None) -> dict[str, str]:
  """Names -> dtypes ('float32') of the `params` item of a step, by default of the newest; for errors see `load_params`."""
  with _reader(folder) as manager:
    step = _step_of(manager, folder, step, 'params')
    stored = _shapes_of(pathlib.Path(manager.directory) / str(step))
    return {name: str(leaf.dtype) for name, leaf in tree.named_leaves(stored)}


def _shapes_of(path: pathlib.Path, item: str = 'params'):
  """The tree of what an item of a step holds, read from its index."""
  try:
    # Not the manager's item_metadata, which reads those of all items: others may be damaged.
    return ocp.StandardCheckpointHandler().metadata(epath.Path(path / item)).tree
  except Exception as error:   # see `_restored`
    raise Damaged(_what_to_do(path, f'{path}: its {item} cannot be read: {_reason(error)}')) from error


def _check_shapes(folder, stored, wanted):
  """orbax would say that shapes differ, but neither where nor that another model was asked for."""
  stored, wanted = ({name: tuple(leaf.shape) for name, leaf in tree.named_leaves(t)} for t in (stored, wanted))
  for name in sorted(stored.keys() | wanted.keys()):
    if stored.get(name) != wanted.get(name):
      raise UserError(f'{folder} holds another model: {name} is {stored.get(name, "absent")} there, and '
                      f'{wanted.get(name, "absent")} in the model that was asked for')


def steps(folder) -> list[int]:
  """The complete steps, ascending. Only looks at names, so that one process of several may ask alone."""
  return sorted(ocp.utils.checkpoint_steps(folder)) if os.path.isdir(folder) else []


def newest_step(folder) -> int | None:
  """The newest complete step, None without one."""
  return max(steps(folder), default=None)


def is_finished(folder, last: int) -> bool:
  """Whether a run of `last` steps is at its end: there, or where its held-out figures ended it, as the newest step says."""
  newest = newest_step(folder)
  return newest is not None and (newest >= last or bool((load_meta(folder).get('eval') or {}).get('stopped')))


def _reader(folder):
  if not os.path.isdir(folder):
    raise FileNotFoundError(f'{folder}: no such checkpoint folder')
  # Not read_only=True, which warns three times that it is; without `create` and a save nothing is written either.
  return ocp.CheckpointManager(pathlib.Path(folder).absolute(),
                               options=ocp.CheckpointManagerOptions(create=False, enable_async_checkpointing=False),
                               item_handlers={name: ocp.StandardCheckpointHandler() if name in ARRAYS else
                                              ocp.JsonCheckpointHandler() for name in ITEMS})


def _step_of(manager, folder, step, item):
  """The step, by default the newest; raises FileNotFoundError unless it is there and has the item."""
  known = sorted(manager.all_steps())
  if not known:
    raise FileNotFoundError(f'{folder}: holds no complete checkpoint')
  if step is not None and step not in known:
    raise FileNotFoundError(f'{folder}: no checkpoint of step {step}; here are {known}')
  step = known[-1] if step is None else step
  if not os.path.isdir(os.path.join(folder, str(step), item)):
    raise FileNotFoundError(f'{folder}: step {step} has no {item}; use another step or another folder')
  return step


def abstract_like(tree):
  """The tree's shapes, dtypes and shardings, to restore into."""
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
