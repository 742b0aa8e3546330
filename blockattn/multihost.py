"""Several processes as one run: they find each other, check that they run the same, and end together.

    with multihost.joined('auto'):          # or 'ADDRESS:PORT,N,I'; None: this process alone, and nothing here does a thing
      multihost.check_equal('config', {...})
      ...

Without this, an exception in one process leaves the others waiting for it: minutes in JAX's shutdown barrier, or for ever
in a collective. Here the process that fails says so through the coordinator's key-value store, and all end within seconds
with its text and its exit code.

Everything goes through that store rather than through collectives: it works before the first device is touched, and where
processes have different numbers of devices.
"""

import contextlib
import dataclasses
import ipaddress
import json
import os
import socket
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from jax._src import distributed  # its client is JAX's only door to the key-value store; orbax goes through it too
from jax.experimental import multihost_utils

from blockattn import errors
from blockattn.errors import UserError

EXIT_LOST = 76   # a device or another process was lost: nothing is wrong with the run, start it again

# Of `auto`, where neither JAX nor a cluster knows: set by launch/local.sh, or by hand.
COORDINATOR, COUNT, INDEX = 'BLOCKATTN_COORDINATOR', 'BLOCKATTN_PROCESSES', 'BLOCKATTN_PROCESS'
SKYPILOT = ('SKYPILOT_NODE_IPS', 'SKYPILOT_NUM_NODES', 'SKYPILOT_NODE_RANK')
PORT = 8476   # where the environment names hosts only

HEARTBEAT_S = 30     # a process that is silent for so long is dead, and all end
MEET_S = 300         # wait so long for all to start
AGREE_S = 120        # and so long for all to say what they run
LEAVE_S = 1800       # the first to finish waits so long for the others, one of which may be writing files
WATCH_S = 1.0        # between two looks at whether another process failed
LOOK_S = 0.2         # between two looks at where this process stands
PUBLISH_S = 5.0      # a process that fails tries for so long to say so
LAST_WORDS_S = 4.0   # process 0, who keeps what was said, stays so long, so that all hear of it
_PREFIX = 'blockattn'   # of the keys in the store
_FAILED = 'failed'
_SHOWN = 5           # differing keys in an error


@dataclasses.dataclass(frozen=True)
class Place:
  """Where a process stands among those of its run.

  Attributes:
    address: HOST:PORT where process 0 is reached.
    count: number of processes.
    index: of this one, from 0.
  """
  address: str
  count: int
  index: int


def read_place(text: str, environ: Mapping[str, str] = os.environ) -> Place | None:
  """What `--multihost` says.

  Args:
    text: 'ADDRESS:PORT,N,I', or 'auto': from BLOCKATTN_COORDINATOR, BLOCKATTN_PROCESSES and BLOCKATTN_PROCESS, or from
      SkyPilot's variables.

  Returns:
    None for 'auto' without these variables: JAX is to find out (TPU pods, Slurm, Kubernetes, Open MPI).

  Raises:
    ValueError: not of this form, or only some of the variables are set.
  """
  if text != 'auto':
    parts = text.split(',')
    if len(parts) != 3:
      raise UserError(f"--multihost={text}: give 'auto', or ADDRESS:PORT,N,I: where process 0 is reached, the number of "
                      'processes, and the number of this one, from 0')
    return _place(f'--multihost={text}', *parts)
  own = [environ[name] for name in (COORDINATOR, COUNT, INDEX) if name in environ]
  if len(own) == 3:
    return _place(f'{COORDINATOR}={own[0]}, {COUNT}={own[1]}, {INDEX}={own[2]}', *own)
  if own:
    raise UserError(f'--multihost=auto: of {COORDINATOR}, {COUNT} and {INDEX} only some are set; set all, or none')
  if all(name in environ for name in SKYPILOT):
    nodes, count, index = (environ[name] for name in SKYPILOT)
    return _place(', '.join(f'{name}={environ[name]}' for name in SKYPILOT), f'{nodes.split()[0]}:{PORT}', count, index)
  return None


def _place(said, address, count, index) -> Place:
  host, colon, port = address.strip().rpartition(':')
  try:
    place = Place(address.strip(), int(count), int(index))
  except ValueError:
    raise UserError(f'{said}: the number of processes and the number of this one are integers') from None
  if not (colon and host and port.isdecimal() and 0 < int(port) < 65536):
    raise UserError(f'{said}: the address of process 0 is HOST:PORT, as 10.0.0.2:{PORT}, with a port from 1 to 65535')
  if not 0 <= place.index < place.count:
    raise UserError(f'{said}: processes have the numbers 0 to {place.count - 1}')
  return place


def check_alone(environ: Mapping[str, str] = os.environ):
  """Raises ValueError if this process was started as one of several: each of them would train alone, in one folder."""
  for name in (COUNT, 'SKYPILOT_NUM_NODES', 'SLURM_STEP_NUM_TASKS', 'OMPI_COMM_WORLD_SIZE'):
    if name in environ and environ[name].isdigit() and int(environ[name]) > 1:
      raise UserError(f'{environ[name]} processes were started ({name}), each of which would train alone in the same '
                      f'workdir: add --multihost=auto; or unset {name} if this is the only one')


@contextlib.contextmanager
def joined(text: str | None, environ: Mapping[str, str] = os.environ) -> Iterator[None]:
  """Within the block this process is one of those that `text` speaks of; they leave it together.

  To be entered before the first computation. If one process leaves with an exception, all end: see `failing_ends_all`.

  Raises:
    ValueError: see `read_place` and `check_alone`, or `auto` and there is no cluster.
  """
  if text is None:
    check_alone(environ)
    yield
    return
  _start(read_place(text, environ))
  watch = _Watch(name='multihost-watch', daemon=True)
  watch.start()
  try:
    with failing_ends_all(agreed=(SystemExit,)):
      yield
      # JAX itself would wait 30 s for the others, who may be at work yet.
      _client().wait_at_barrier(f'{_PREFIX}/leave', LEAVE_S * 1000)
  finally:
    watch.end()


def _start(place: Place | None):
  where = {} if place is None else {'coordinator_address': place.address, 'num_processes': place.count,
                                    'process_id': place.index}
  if place is not None and 'JAX_LOCAL_DEVICE_IDS' not in os.environ:
    where['cluster_detection_method'] = 'deactivate'   # else Slurm's number of a task would choose its GPU too
  if place is not None and _is_loopback(place.address):
    where['coordinator_bind_address'] = place.address   # else process 0 listens to every machine of the network
  if place is not None:
    _say(f'process {place.index} of {place.count} on {socket.gethostname()}: process 0 is to be at {place.address}')
  try:
    jax.distributed.initialize(**where, initialization_timeout=MEET_S, heartbeat_timeout_seconds=HEARTBEAT_S,
                               shutdown_timeout_seconds=HEARTBEAT_S)
  except ValueError as error:
    if place is not None:
      raise
    raise UserError(f'--multihost=auto: JAX finds no cluster here ({error}); it knows TPU pods, Slurm (under srun), '
                    f'Kubernetes and Open MPI. Elsewhere set {COORDINATOR}=HOST:PORT, {COUNT} and {INDEX}, or give '
                    '--multihost=HOST:PORT,N,I') from error


def _is_loopback(address: str) -> bool:
  host = address.rpartition(':')[0].strip('[]')
  with contextlib.suppress(ValueError):   # a name
    return ipaddress.ip_address(host).is_loopback
  return host == 'localhost'


def is_started() -> bool:
  """Whether this process is one of a run of several, or of one that was started as such."""
  return distributed.global_state.client is not None


def _client():
  """Of the key-value store, where this process is one of several."""
  client = distributed.global_state.client
  if client is None:
    raise RuntimeError('this process is alone: there is no store to speak through')
  return client


def preempted(step: int) -> bool:
  """Whether all processes are to stop after this step because one of them got SIGTERM; to be asked at every step.

  JAX notices the signal itself, and chooses a step that no process has passed.
  """
  return multihost_utils.reached_preemption_sync_point(step)


def _put(key: str, value: str, *, again: bool = False):
  """Sets a key, `again`: one that may be set already."""
  _client().key_value_set(f'{_PREFIX}/{key}', value, allow_overwrite=again)


def _peek(key: str) -> str | None:
  """The value of a key, None if it is not set, or if nobody answers."""
  try:
    return _client().key_value_try_get(f'{_PREFIX}/{key}')
  except jax.errors.JaxRuntimeError:
    return None


def _me() -> tuple[int, int]:
  state = distributed.global_state
  return state.process_id, state.num_processes


def _name(index: int, host: str | None = None) -> str:
  return f'process {index} of {_me()[1]} on {host or socket.gethostname()}'


def _say(text: str):
  print(text, file=sys.stderr, flush=True)


# Ending together.

@contextlib.contextmanager
def failing_ends_all(agreed: tuple[type[BaseException], ...] = ()) -> Iterator[None]:
  """An exception in the block ends the processes of the run, all with the exit code and the text of the first that failed.

  To be entered inside of what would wait for other processes when it is left, such as a manager of checkpoints.

  Args:
    agreed: exceptions that all processes raise at the same place; these pass, as all do in a run of one process.
      A SystemExit with a text, or with a code that says of an error, is none that all agree on.
  """
  try:
    yield
  except BaseException as error:
    if not is_started() or (isinstance(error, agreed) and not _is_complaint(error)):
      raise
    _end_all(*_ending(error))


def _is_complaint(error) -> bool:
  return isinstance(error, SystemExit) and (isinstance(error.code, str) or error.code in (1, 2))


def _ending(error) -> tuple[int, str]:
  """The exit code that an error ends its process with, and what is said of it."""
  if (line := errors.line_of(error)) is not None:
    return errors.EXIT_MEND, f'error: {line}'
  if isinstance(error, SystemExit):
    return error.code if isinstance(error.code, int) else 1, str(error.code)
  if isinstance(error, KeyboardInterrupt):
    return errors.EXIT_INTERRUPTED, 'interrupted (Ctrl-C)'
  text = ''.join(traceback.format_exception(error)).rstrip()
  # What a collective says whose other side is gone; too little memory will be so the next time too.
  if isinstance(error, jax.errors.JaxRuntimeError) and 'RESOURCE_EXHAUSTED' not in str(error):
    return EXIT_LOST, (f'{text}\nA device or another process was lost. Start the same command again to go on from the '
                       f'newest checkpoint (exit code {EXIT_LOST}).')
  return 1, text


def _end_all(code: int, text: str):
  """Says why this process ends, to the user and to all others, and ends it, without what would wait for them."""
  for thread in threading.enumerate():
    if isinstance(thread, _Watch):
      thread.end()
  index, _ = _me()
  _say(f'{_name(index)} ends: {text}')
  publish = threading.Thread(target=_publish_failure, args=(code, text), daemon=True)
  publish.start()
  publish.join(PUBLISH_S)   # the coordinator may be gone
  first = _failure()
  if first is not None and first['index'] != index:
    code = first['code']
    if first['text'] != text:
      _say(_first_words(first))
  _leave(code)


def _leave(code: int):
  # Who waits for this one in a collective should hear why it ends, rather than of a broken connection; and JAX aborts all
  # as soon as process 0 is gone.
  time.sleep(LAST_WORDS_S if _me()[0] == 0 else 2 * WATCH_S)
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)   # sys.exit would wait in JAX's shutdown for processes that will never come


def _publish_failure(code, text):
  with contextlib.suppress(jax.errors.JaxRuntimeError):   # the first to write keeps the key
    _put(_FAILED, json.dumps({'index': _me()[0], 'host': socket.gethostname(), 'code': code, 'text': text[-20000:]}))


def _failure() -> dict | None:
  """What the first process that failed says of it."""
  text = _peek(_FAILED)
  return None if text is None else json.loads(text)


def _first_words(first) -> str:
  return f'{_name(first["index"], first["host"])} was the first to fail; its words:\n{first["text"]}'


class _Watch(threading.Thread):
  """Ends this process when another one has failed, until it is ended itself."""

  def __init__(self, **kwargs):
    super().__init__(**kwargs)
    self._ended = threading.Event()

  def run(self):
    while not self._ended.wait(WATCH_S):
      first = _failure()
      if first is not None and not self._ended.is_set():
        _say(f'{_name(_me()[0])} ends with it: {_first_words(first)}')
        _leave(first['code'])

  def end(self):
    self._ended.set()
    self.join()


# Agreeing.

def check_equal(what: str, facts: Mapping[str, Any]):
  """Checks that all processes have the same facts, and returns once all have said theirs.

  Args:
    what: a name that is used for one check only.
    facts: values that JSON can write, by name.

  Raises:
    ValueError: in all processes: names what differs, with the value of process 0 and that of the first that has another.
    TimeoutError: a process said nothing in time; names it.
  """
  if not is_started():
    return
  index, count = _me()
  mine = json.dumps({'host': socket.gethostname(), 'facts': dict(facts)}, sort_keys=True, default=str)
  said = collect(what, mine)
  verdict = from_first(f'verdict/{what}', '' if said is None else _differences([json.loads(text) for text in said]))
  if verdict:
    raise UserError(f'the {count} processes of this run differ in {verdict}; start all of them with the same command, '
                    'checkout and hardware')


def _differences(said: Sequence[Mapping]) -> str:
  """What other processes have otherwise than process 0; empty if nothing."""
  first, found = said[0], {}
  for index, other in enumerate(said):
    for name in sorted(first['facts'].keys() | other['facts'].keys()):
      values = [side['facts'].get(name, 'absent') for side in (first, other)]
      if values[0] != values[1] and name not in found:
        found[name] = (f'{name}: {values[0]!r} in process 0 on {first["host"]}, {values[1]!r} in process {index} on '
                       f'{other["host"]}')
  more = f'; and {len(found) - _SHOWN} more' if len(found) > _SHOWN else ''
  return '; '.join(list(found.values())[:_SHOWN]) + more


def from_first(what: str, text: str) -> str:
  """The text of process 0, in all processes; `what`: a name that is used once in a run."""
  if not is_started():
    return text
  if _me()[0] == 0:
    _put(f'first/{what}', text)
    return text
  return _client().blocking_key_value_get(f'{_PREFIX}/first/{what}', (AGREE_S + 60) * 1000)


def collect(what: str, value: str) -> list[str] | None:
  """Brings a text of every process to process 0.

  Args:
    what: a name that is used once in a run.

  Returns:
    The texts in the order of processes, on process 0; None elsewhere, at once.

  Raises:
    TimeoutError: on process 0: a process said nothing; names those that did not.
  """
  index, count = _me()
  _put(f'collect/{what}/{index}', value)
  if index != 0:
    return None
  deadline, values = time.monotonic() + AGREE_S, {}
  look = lambda: {i: said for i in range(count) if i not in values and (said := _peek(f'collect/{what}/{i}')) is not None}
  while len(values := values | look()) < count:
    if time.monotonic() > deadline:
      missing = [i for i in range(count) if i not in values]
      raise TimeoutError(f'{what}: after {AGREE_S} s, {len(missing)} of {count} processes have said nothing: '
                         f'{_numbers(missing)}; look at their logs')
    time.sleep(0.05)
  return [values[i] for i in range(count)]


def _numbers(indices: Sequence[int]) -> str:
  return ', '.join(map(str, indices[:10])) + (', ...' if len(indices) > 10 else '')


# Who is slow.

@contextlib.contextmanager
def timed(what: str, *, patience_s: float = 60.0) -> Iterator[None]:
  """Names the process that the others wait for, while they do, and says afterwards how long each was at work.

  A process is at work as long as its main thread is in no barrier. What is waited for is thus known from where each
  process stands, and needs no word from the library that does the work.

  Args:
    what: a name that is used once in a run.
    patience_s: seconds after which, and between which, process 0 says who is still at work.
  """
  if not is_started():
    yield
    return
  start, ended = time.monotonic(), threading.Event()
  clock = _Clock(threading.get_ident(), start)
  threads = [threading.Thread(target=_report_standing, args=(what, clock, ended, patience_s), daemon=True)]
  if _me()[0] == 0:
    threads.append(threading.Thread(target=_name_the_slow, args=(what, ended, patience_s), daemon=True))
  for thread in threads:
    thread.start()
  try:
    yield
  finally:
    ended.set()
    for thread in threads:
      thread.join()
  said = collect(f'{what}/seconds', json.dumps([socket.gethostname(), clock.seconds()]))
  if said is not None:
    _say(f'{what}: {_spread([json.loads(text) for text in said])}')


class _Clock:
  """How long the main thread of this process was at work, not waiting for others."""

  def __init__(self, thread: int, start: float):
    self._thread, self._start, self._end = thread, start, None

  def look(self) -> str:
    """Where the thread stands: a function, or '' if it waits in a barrier."""
    frame, names = sys._current_frames().get(self._thread), []
    while frame is not None:
      names.append(f'{os.path.basename(frame.f_code.co_filename)}:{frame.f_code.co_name}')
      frame = frame.f_back
    waits = any('sync_global' in name or 'barrier' in name for name in names)
    if not waits:
      self._end = None
    elif self._end is None:
      self._end = time.monotonic()
    return '' if waits or not names else names[0]

  def seconds(self) -> float:
    return (self._end or time.monotonic()) - self._start


def _report_standing(what, clock, ended, patience_s):
  last, told = None, 0.0
  while not ended.wait(LOOK_S):
    now = clock.look()
    # A word per change between work and waiting, and now and then where the work stands.
    if last is None or bool(now) != bool(last) or (now != last and time.monotonic() - told > patience_s / 4):
      last, told = now, time.monotonic()
      with contextlib.suppress(jax.errors.JaxRuntimeError):
        _put(f'standing/{what}/{_me()[0]}', json.dumps([socket.gethostname(), now]), again=True)


def _name_the_slow(what, ended, patience_s):
  _, count = _me()
  start = time.monotonic()
  while not ended.wait(patience_s):
    at_work = []
    for i in range(count):
      said = _peek(f'standing/{what}/{i}')
      host, place = json.loads(said) if said else ('?', 'has not begun')
      if place:
        at_work.append(f'{i} on {host} ({place})')
    _say(f'{what}: {time.monotonic() - start:.0f} s, {count - len(at_work)} of {count} processes wait for '
         f'{"; ".join(at_work[:_SHOWN]) or "each other"}{", ..." if len(at_work) > _SHOWN else ""}')


def _spread(said: Sequence[tuple[str, float]]) -> str:
  """'0.4 s in the middle, 12.1 s at most (process 3 on host-3, a straggler)'"""
  seconds = [own for _, own in said]
  middle, slowest = statistics.median_low(seconds), max(range(len(said)), key=lambda i: seconds[i])
  straggles = seconds[slowest] > 2 * middle + 5
  each = ', '.join(f'{i}: {own:.1f}' for i, own in enumerate(seconds)) if len(said) <= 16 else ''
  return (f'{middle:.1f} s in the middle, {seconds[slowest]:.1f} s at most (process {slowest} on {said[slowest][0]}'
          f'{", a straggler" if straggles else ""}){f"; seconds by process: {each}" if each else ""}')
