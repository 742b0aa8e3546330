"""What a teacher says of every token, written once and read in training in place of the teacher.

A folder of parts, each an ArrayRecord file beside a JSON file with the numbers of its rows, and `meta.json`. A part is
there when its JSON file is, which is written last. A record is a row of the stream, as safetensors bytes, its text tokens
(those with a next token in their document) one after the other:

  ids            uint16 or uint32 [n, K], the K likeliest tokens, likeliest first
  log_p          float32 [n, K], their log-probabilities at the temperature of the loss
  target_log_p   float32 [n], log-probability of the next token, at temperature 1
  blocked_log_p  float32 [n], the same under the block mask; only where the token weights want it
  print          uint32 [1], of the row's tokens: other data is refused rather than misread
"""

import itertools
import json
import os
import pathlib
import zlib
from collections.abc import Mapping

import grain
import numpy as np
import safetensors
from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]
from safetensors import numpy as safetensors_numpy

from blockattn import disk, metrics
from blockattn.errors import UserError

META = 'meta.json'


def row_print(row) -> int:
  """Of the tokens of a packed row and of where its documents and blocks are."""
  layout = row['layout']
  return zlib.crc32(b''.join(np.ascontiguousarray(x, np.int32).tobytes() for x in
                             (row['tokens'], layout.doc, layout.block)))


def write_part(folder: pathlib.Path, name: str, records: Mapping[int, dict[str, np.ndarray]]):
  """Writes rows as one part; a part of this name is replaced.

  Args:
    records: by row number, arrays of the module's docstring.
  """
  folder.mkdir(parents=True, exist_ok=True)
  partial = folder / f'{name}.array_record.tmp'
  writer = array_record_module.ArrayRecordWriter(os.fspath(partial), 'group_size:1')   # rows are read one by one
  for arrays in records.values():
    writer.write(safetensors_numpy.save({key: np.ascontiguousarray(x) for key, x in arrays.items()}))
  writer.close()
  os.replace(partial, folder / f'{name}.array_record')
  metrics.write_json(folder / f'{name}.json', [int(number) for number in records])


def written_rows(folder: pathlib.Path) -> dict[pathlib.Path, list[int]]:
  """{file: numbers of its rows} of the complete parts, in order; empty without a folder."""
  return {listed.with_suffix('.array_record'): json.loads(listed.read_text())
          for listed in sorted(folder.glob('part-*.json'))}


def read_meta(folder: str | os.PathLike) -> dict:
  """meta.json of a folder. Raises FileNotFoundError with the way to make one."""
  path = pathlib.Path(folder) / META
  if not path.is_file():
    raise FileNotFoundError(f'{path} is not there: config.teacher.logits names a folder that `python -m '
                            'blockattn.train.teach` has finished')
  return disk.read_json(path)


class StoredLogits:
  """Adds to the rows of a stream what the teacher says of them, as 'teacher': for `stream.batches`.

  A row's 'teacher' is {'ids' int32 [T, K], 'log_p' float32 [T, K], 'target_log_p', 'blocked_log_p' float32 [T]}, zeros where
  no next token is.

  Args:
    folder: of `blockattn.train.teach`.
    count: rows of the stream that will be read, the first ones.

  Raises:
    ValueError: the folder lacks one of them.
  """

  def __init__(self, folder: str | os.PathLike, count: int):
    self._folder = pathlib.Path(folder)
    self._meta, parts = read_meta(folder), written_rows(self._folder)
    # Where a row is twice, because other processes wrote its part again, the last one counts.
    self._at = {row: i for i, row in enumerate(itertools.chain.from_iterable(parts.values()))}
    missing = np.setdiff1d(np.arange(count), np.fromiter(self._at, np.int64, len(self._at)))
    if missing.size:
      raise UserError(f'{folder} lacks {missing.size} of {count} rows that the training will read, first row '
                      f'{missing[0]}: run blockattn.train.teach with this config and --workdir={folder}; it goes on where '
                      'it stopped')
    self._records = grain.sources.ArrayRecordDataSource([os.fspath(file) for file in parts]) if parts else ()

  def fingerprint(self) -> dict[str, str]:
    """Of what the teacher was."""
    return {'stored logits': repr(sorted(self._meta.items()))}

  def __call__(self, number: int, row: dict) -> dict:
    """Row `number` of the stream."""
    try:
      stored = safetensors_numpy.load(self._records[self._at[number]])
    except safetensors.SafetensorError as error:
      raise UserError(f'{self._folder}: row {number} cannot be read ({error}); delete the part that holds it and run '
                      'blockattn.train.teach again') from error
    if int(stored['print'][0]) != row_print(row):
      raise UserError(f'{self._folder}: row {number} was written for other tokens: the data, the tokenizer or the seed is '
                      'not the one that blockattn.train.teach saw; run it again into a new folder')
    return row | {'teacher': spread(stored, row['text'])}


def spread(stored: Mapping[str, np.ndarray], text: np.ndarray) -> dict[str, np.ndarray]:
  """A record's arrays at the places of their tokens, as `StoredLogits` says.

  Args:
    text: bool [T].
  """
  def place(x, dtype):
    out = np.zeros((*text.shape, *x.shape[1:]), dtype)
    out[text] = x
    return out

  blocked = stored.get('blocked_log_p', np.zeros_like(stored['target_log_p']))
  return {'ids': place(stored['ids'], np.int32), 'log_p': place(stored['log_p'], np.float32),
          'target_log_p': place(stored['target_log_p'], np.float32), 'blocked_log_p': place(blocked, np.float32)}


def empty(length: int, top_k: int) -> dict[str, np.ndarray]:
  """What `StoredLogits` gives of a row without tokens."""
  of_token, of_top = np.zeros(length, np.float32), np.zeros((length, top_k), np.float32)
  return {'ids': of_top.astype(np.int32), 'log_p': of_top, 'target_log_p': of_token, 'blocked_log_p': of_token}


def record(row, said: Mapping[str, np.ndarray], vocab: int) -> dict[str, np.ndarray]:
  """The arrays to write of a row.

  Args:
    row: packed row.
    said: arrays [T, ...] named as in the module's docstring.
    vocab: V, which decides the width of ids.
  """
  types = {'ids': np.uint16 if vocab <= 2 ** 16 else np.uint32}
  arrays = {name: np.asarray(x)[row['text']].astype(types.get(name, np.float32)) for name, x in said.items()}
  return arrays | {'print': np.array([row_print(row)], np.uint32)}
