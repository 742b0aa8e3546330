"""Compiled programs that outlive their process: JAX's persistent cache of them, in the user's cache folder."""

import os
import pathlib

import filelock
import jax

SETTINGS = {
    'jax_compilation_cache_max_size': 4 << 30,           # bytes of the folder; what was used least recently goes first
    'jax_persistent_cache_min_compile_time_secs': 0.1,   # what is quicker is not worth a file
}


def keep() -> None:
  """Keeps what this process compiles for later ones, and takes from the folder what earlier ones have compiled.

  To be called before the first computation. Nothing is done where the user has named a folder (JAX_COMPILATION_CACHE_DIR);
  where ours cannot be written or locked; or in a run of several processes, which has to have one that all of them share. JAX
  itself leaves out platforms whose programs cannot be stored, and compiles anew what it cannot read.
  """
  if jax.config.values['jax_compilation_cache_dir'] is not None or jax.distributed.is_initialized():
    return
  try:
    folder = pathlib.Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache').expanduser() / 'blockattn' / 'compiled'
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)   # who writes here decides what we run
    with filelock.FileLock(folder / '.lockfile', timeout=10):   # as JAX does at every entry of a folder with a bound
      pass
  except (OSError, RuntimeError):   # no such place; no home, or no locks
    return
  jax.config.update('jax_compilation_cache_dir', str(folder))
  for name, value in SETTINGS.items():
    if name.upper() not in os.environ:
      jax.config.update(name, value)
