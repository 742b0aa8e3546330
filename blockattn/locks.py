"""Locks on files, released by the death of their holder.

The library filelock does less of what is needed here: its file does not say who holds it, another user's cannot be locked,
and where a filesystem has no locks it leaves files of its own that outlive a killed process.
"""

import contextlib
import datetime
import fcntl
import os
import socket
from collections.abc import Iterator


class Held(RuntimeError):
  """Another process holds the lock; says which."""


@contextlib.contextmanager
def held(path: str | os.PathLike) -> Iterator[None]:
  """Within the block no other process is in such a block with the same file.

  The file is made if absent, says who has locked it last, and stays. It is its lock that counts (flock), not that it is
  there, so a process that was killed leaves nothing behind that must be cleaned up. On NFS the lock holds among hosts,
  if the server keeps locks. Where there are none at all (some cluster filesystems, mounted buckets) nothing is locked.

  Raises:
    Held: another process has it.
  """
  with _open(path) as file:
    if _lock(file) and file.writable():
      file.truncate(0)
      file.write(f'process {os.getpid()} on {socket.gethostname()}, since {datetime.datetime.now():%Y-%m-%d %H:%M:%S}')
      file.flush()
    yield


def is_held(path: str | os.PathLike) -> bool:
  """Whether a process is in a block of `held` with this file, which is looked at and left as it is."""
  try:
    with open(path) as file:
      _lock(file)
  except Held:
    return True
  except OSError:   # there is none
    pass
  return False


def _open(path):
  try:
    return open(path, 'a+')
  except PermissionError as error:   # another user's, which can be locked all the same
    try:
      return open(path)
    except OSError:
      raise error from None


def _lock(file) -> bool:
  """Whether the file is locked now; False: here are no locks."""
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    file.seek(0)
    raise Held(file.read().strip() or 'another process') from None
  except OSError:
    return False
  return True
