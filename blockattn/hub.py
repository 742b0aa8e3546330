"""The Hugging Face Hub: names on it, OWNER/NAME or OWNER/NAME@REVISION, and what is fetched by them.

Whatever takes a hub name asks here, so that all of it knows revisions, fetches only the files that it names, and says in one
line why nothing came.
"""

import contextlib
import os
import pathlib
import re
from collections.abc import Iterator, Sequence


def split(name: os.PathLike | str) -> tuple[str, str | None]:
  """(repository, revision or None) of a name."""
  repo, _, revision = str(name).partition('@')
  return repo, revision or None


def is_name(name: os.PathLike | str) -> bool:
  """Whether this is a name on the hub; a relative path of one folder in another may look like one."""
  return bool(re.fullmatch(r'\w[\w.-]*/\w[\w.-]*', split(name)[0], re.ASCII))


def fetch(name: os.PathLike | str, wanted: Sequence[str], kind: str = 'model') -> pathlib.Path:
  """A folder with those files of a repository that match a pattern of `wanted`; files that were fetched before, too.

  Args:
    kind: 'model' or 'dataset'.

  Raises:
    FileNotFoundError: see `explained`.
  """
  import huggingface_hub  # slow to import
  repo, revision = split(name)
  with explained(f'{name}: no folder here, and nothing'):
    # '*' of the patterns matches '/', too: keep out other formats' copies that some repositories hold in folders.
    return pathlib.Path(huggingface_hub.snapshot_download(
        repo, repo_type=kind, revision=revision, allow_patterns=list(wanted), ignore_patterns=['*/*', 'consolidated*']))


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
  """Within the block, what the hub's client raises becomes one line, of `what` from the hub.

  Raises:
    FileNotFoundError: no network, no such repository or revision, or no access to it.
  """
  import huggingface_hub.errors as theirs
  try:
    yield
  except Exception as error:
    of_this_machine = isinstance(error, OSError) and error.errno is not None   # a full disk, say, which names its file
    known = isinstance(error, (OSError, theirs.HFValidationError)) and not of_this_machine
    if not known and not _is_network(error):
      raise
    chain: list[BaseException] = [error]
    while (deeper := chain[-1].__cause__ or chain[-1].__context__) is not None:
      chain.append(deeper)
    of = lambda *kinds: any(isinstance(one, kinds) for one in chain)
    if of(theirs.GatedRepoError):
      said = 'access is restricted; ask for it on its page, then `hf auth login`'
    elif of(theirs.RevisionNotFoundError):
      said = 'no such revision; name a branch, a tag or a commit behind the @, or none'
    elif of(theirs.RepositoryNotFoundError, theirs.HFValidationError):
      said = 'no such repository, or a private one; correct the name, or `hf auth login`'
    elif (network := next(filter(_is_network, chain), None)) is not None:
      said = f'{_line(network)}; fetch it with `hf download` where there is a network, and name the folder'
    else:   # some libraries lose the cause on the way
      said = f'{_line(error)}; see `hf download`, and `hf auth login` if it is private'
    raise FileNotFoundError(f'{what} from the hub: {said}') from error


def _is_network(error):
  # The client asks with httpx or with httpx2, as its version is.
  return isinstance(error, ConnectionError) or any(cls.__name__ == 'TransportError' for cls in type(error).__mro__)


def _line(error):
  return (str(error).splitlines() or [type(error).__name__])[0][:200].rstrip('.')
