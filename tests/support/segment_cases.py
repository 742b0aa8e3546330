"""A segmenter without a model, for tests of what stands around one: blank lines are likely cuts, sentences are not."""

import dataclasses
import types

import data_cases
import hf_cases
import numpy as np
import tokenizers

from blockattn.hf import convert
from blockattn.segmentation import markers, model as model_lib


@dataclasses.dataclass(frozen=True)
class Scored:
  candidates: np.ndarray   # int64 [m]
  log_odds: np.ndarray     # float32 [m]
  tokens: np.ndarray       # int64 [m + 1]


class StandIn:
  """Has what `blockattn.segment` asks of a model; `batches` records the number of texts of each call."""

  def __init__(self, threshold=0.0):
    self.batches = []
    self.options = types.SimpleNamespace(threshold=threshold)

  def score(self, texts, progress=None):
    self.batches.append(len(texts))
    done, scored = 0, []
    for text in texts:
      scored.append(score_text(text))
      done += len(text)
      if progress:
        progress(done)
    return scored

  def token_ends(self, texts):
    return words_as_tokens(texts)


def score_text(text):
  candidates = markers.candidates(text)
  odds = [4.0 if text[:c].endswith(('\n\n', '\r\n\r\n')) else -2.0 if text[c - 1] in '\r\n' else -5.0 for c in candidates]
  jitter = (np.arange(len(candidates)) * 7919 % 101) / 50 - 1
  edges = [0, *candidates.tolist(), len(text)]
  counts = [len(ends) for ends in words_as_tokens(text[a:b] for a, b in zip(edges[:-1], edges[1:]))]
  return Scored(candidates, (np.array(odds) + jitter).astype(np.float32), np.cumsum(counts).astype(np.int64))


def words_as_tokens(pieces):
  """The ends of tokens of up to three characters, of which only the first may be a blank."""
  ends = []
  for piece in pieces:
    found, start = [], 0
    for i in range(1, len(piece) + 1):
      if i == len(piece) or i - start == 3 or piece[i] == ' ':
        found.append(i)
        start = i
    ends.append(np.array(found, np.int64))
  return ends


HEAD, TAIL = 6, 2   # tokens of a long unit that are read


def model(name='qwen3_tied', unit_tokens=0, **fields):
  cfg = model_lib.architecture(dataclasses.replace(hf_cases.MODELS[name], **fields), unit_tokens)
  return cfg, hf_cases.random_params(cfg, 'float32')


def folder_of(path, style, name='qwen3_tied', length=48, **read):
  """A Hugging Face folder of a random segmenter with a tokenizer of some 300 tokens."""
  tokenizer = data_cases.tiny_tokenizer()
  tokenizer.save_pretrained(path / 'tokenizer')
  backend = tokenizers.Tokenizer.from_file(str(path / 'tokenizer' / 'tokenizer.json'))
  backend.add_special_tokens([markers.CUT_TOKEN, *markers.GAP_TOKENS])
  backend.save(str(path / 'tokenizer' / 'tokenizer.json'))
  options = markers.ReadOptions(style=style, head=HEAD, tail=TAIL, **read)
  cfg, params = model(name, options.unit_tokens, vocab=backend.get_vocab_size())
  meta = {'segmenter': {'markers': style, 'head': HEAD, 'tail': TAIL, 'length': length, 'threshold': -0.5, **read}}
  convert.save(params, cfg, path / 'model', source=path / 'tokenizer', meta=meta, card='', dtype='float32')
  return path / 'model'
