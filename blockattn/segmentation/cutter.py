"""A segmenter as what cuts training data: texts to cuts, with a fingerprint of all that decides them."""

import functools
import hashlib
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from blockattn import mesh as mesh_lib
from blockattn.data import encode
from blockattn.hf import files
from blockattn.segmentation import granularity, segmenter

EMBEDDED = 'tiny'
_VERSION = 4   # of the code: to be raised where the same weights cut otherwise than before


class Cutter:
  """Cuts texts with a segmenter, which is loaded when the first text is there.

  Args:
    name: folder or hub name (FileNotFoundError: none such); EMBEDDED: the segmenter that comes with the package.
    place: the devices that it runs on; by default all.
    tokenizer: of the model that reads the blocks, a transformers fast one: lengths count its tokens.
  """

  def __init__(self, name: str, wanted: granularity.Granularity, place: mesh_lib.Placement | None = None,
               tokenizer: Any = None):
    self._folder = segmenter.EMBEDDED if name == EMBEDDED else files.locate(name)
    self._wanted, self._place = wanted, place
    self._reader = None if tokenizer is None else encode.token_ends(tokenizer)
    self.fingerprint = fingerprint(self._folder, wanted, tokenizer)

  def __call__(self, texts: Sequence[str]) -> list[np.ndarray]:
    """The cuts of each text, strictly increasing character offsets."""
    wanted = granularity.for_model(self._wanted, self._model)
    scored = self._model.score(texts)
    return [granularity.cuts_of(text, s, wanted, self._model.token_ends, self._reader)
            for text, s in zip(texts, scored, strict=True)]

  @functools.cached_property
  def _model(self):
    return segmenter.Segmenter.load(self._folder, place=self._place)


def fingerprint(folder: pathlib.Path, wanted: granularity.Granularity, tokenizer: Any = None) -> str:
  """A hash of the bytes of the segmenter's files, cards apart, and of how fine it is to cut."""
  reader = None if tokenizer is None else encode.plain(tokenizer).to_str()
  digest = hashlib.sha256(repr((_VERSION, wanted, reader)).encode())
  for path in sorted(p for p in folder.iterdir() if p.suffix in ('.json', '.safetensors')):
    digest.update(path.name.encode())
    with open(path, 'rb') as stream:
      digest.update(hashlib.file_digest(stream, 'sha256').digest())
  return digest.hexdigest()[:32]
