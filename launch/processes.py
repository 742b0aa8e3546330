"""Starts a program several times on this machine, as the processes of one run; launch/local.sh --processes calls it.

    python -m launch.processes --processes 2 --devices 4 -m blockattn.train.distill --config ... --workdir ...

Every process sees where the first one is reached, how many there are and which it is (BLOCKATTN_COORDINATOR,
BLOCKATTN_PROCESSES, BLOCKATTN_PROCESS), and has `--devices` simulated CPU devices; what --multihost=auto makes of it stands
in blockattn/multihost.py, and a trainer is given that flag. Their lines are printed with the process's number in front.

If one fails, the others get ten seconds to end with it, then SIGTERM, then SIGKILL, and the exit code is that of the first
that failed. SIGTERM and SIGINT are handed on to all.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence

from blockattn import errors, multihost

PATIENCE_S = 10.0
_TRAINERS = 'blockattn.train.'


def start_all(command: Sequence[str], processes: int, devices: int,
              environ: Mapping[str, str]) -> Iterator[subprocess.Popen]:
  """Starts the processes of one run of `python COMMAND`, on a free port of the loopback device, one after the other."""
  shared = {**environ, multihost.COORDINATOR: f'127.0.0.1:{free_port()}', multihost.COUNT: str(processes),
            'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': str(devices), 'PYTHONUNBUFFERED': '1'}
  for i in range(processes):
    yield subprocess.Popen([sys.executable, *as_one_of_several(command)], env=shared | {multihost.INDEX: str(i)},
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors='replace')


def as_one_of_several(command: Sequence[str]) -> list[str]:
  """The command of a trainer with --multihost=auto, any other as it is."""
  is_trainer = len(command) > 1 and command[0] == '-m' and command[1].startswith(_TRAINERS)
  told = any(arg.lstrip('-').split('=')[0] == 'multihost' for arg in command)
  return [*command, '--multihost=auto'] if is_trainer and not told else list(command)


def free_port() -> int:
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    return s.getsockname()[1]


def show(index: int, process: subprocess.Popen):
  """Prints the lines of a process as they come, each whole and with its number in front."""
  for line in process.stdout:
    sys.stdout.write(f'[{index}] {line.rstrip(chr(10))}\n')
    sys.stdout.flush()


def wait_for_all(started: Sequence[subprocess.Popen], patience_s: float = PATIENCE_S) -> int:
  """Waits until all have ended, which they are made to if one fails. Returns the exit code of the first that failed.

  Of processes that are seen to have failed at once, one that ended itself is the first: a signal may be what another's
  end did to it.
  """
  code, since, killed = 0, None, False
  while any(p.poll() is None for p in started):
    time.sleep(0.05)
    failed = [p.returncode for p in started if p.poll() not in (None, 0)]
    if failed and since is None:
      since = time.monotonic()
      code = max(failed)
    waited = 0 if since is None else time.monotonic() - since
    if waited > patience_s * (2 if killed else 1):
      send(started, signal.SIGKILL if killed else signal.SIGTERM)
      killed = True
  if since is None:
    code = max((p.returncode for p in started if p.returncode), default=0)
  return code if code >= 0 else 128 - code


def send(started: Sequence[subprocess.Popen], sign: int):
  for process in started:
    if process.poll() is None:
      process.send_signal(sign)


def _arguments(argv: Sequence[str]):
  parser = errors.Parser(prog='python -m launch.processes', description=__doc__, allow_abbrev=False,
                         usage='%(prog)s [--processes N] [--devices M] COMMAND',
                         formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--processes', type=int, default=1, metavar='N', help='how many (default: 1)')
  parser.add_argument('--devices', type=int, default=1, metavar='M', help='simulated CPU devices of each (default: 1)')
  own = own_arguments(argv)
  options = parser.parse_args(argv[:own])
  if options.processes < 1 or options.devices < 1:
    parser.error(f'--processes {options.processes} --devices {options.devices}: give numbers from 1')
  if own == len(argv):
    parser.error('nothing to run: add -m MODULE or a file, with its arguments')
  return options, argv[own:]


def own_arguments(argv: Sequence[str]) -> int:
  """How many of the arguments, from the first, are not yet what Python is given."""
  at = 0
  while at < len(argv) and argv[at].partition('=')[0] in ('--processes', '--devices', '-h', '--help'):
    at += 1 if '=' in argv[at] or argv[at] in ('-h', '--help') else 2
  return min(at, len(argv))


def main(argv: Sequence[str] | None = None) -> int:
  """The command line. Returns the exit status."""
  options, command = _arguments(sys.argv[1:] if argv is None else argv)
  started, came = [], []

  def hand_on(sign, _):
    came.append(sign)
    send(started, sign)

  for sign in (signal.SIGTERM, signal.SIGINT):   # before the first is started: none is to be left alone
    signal.signal(sign, hand_on)
  for process in start_all(command, options.processes, options.devices, os.environ):
    started.append(process)
    if came:   # while it was started, and not yet known
      send([process], came[-1])
      break
  readers = [threading.Thread(target=show, args=(i, p)) for i, p in enumerate(started)]
  for reader in readers:
    reader.start()
  code = wait_for_all(started)
  for reader in readers:
    reader.join()
  return code


if __name__ == '__main__':
  sys.exit(main())
