"""How far a model in some mode is from its teacher: cross-entropy and KL on answer tokens, and greedy answers.

A `Subject` is a model in a mode; the teacher is a Subject in full mode. Documents are evaluated one per row, so the
figures do not depend on how training packs them.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from blockattn import blocks, losses
from blockattn.data import encode, packing, text
from blockattn.evals import scores
from blockattn.models import decode, transformer

MODES = ('full', 'block')
BINS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096, 16384)   # lower edges of the distance bins, in tokens
_SHORTEST = 256   # tokens of a row
_CHUNK = 32       # tokens per row whose logits exist at a time: answers are short


@dataclasses.dataclass(frozen=True)
class Subject:
  """A model as it is evaluated.

  Attributes:
    params: its parameters.
    cfg: ModelConfig.
    compute: Compute.
    mode: 'full': plain causal attention, no sinks. 'block': the block mask with the sinks of `options`.
    options: BlockOptions of block mode; its max_blocks is set by the documents at hand.
    chat: whether its prompts are to be put into the chat template.
  """
  params: Any
  cfg: transformer.ModelConfig
  compute: transformer.Compute
  mode: str
  options: blocks.BlockOptions
  chat: bool = False

  def __post_init__(self):
    if self.mode not in MODES:
      raise ValueError(f'evaluation mode {self.mode!r}; choose one of {", ".join(MODES)}')


def evaluate(subjects: Mapping[str, Subject], teacher: Subject, docs: Sequence[encode.EncodedDoc],
             examples: Sequence[text.Example], tokenizer, *, batch: int, max_new: int, stop: str | None = None,
             predictions=None) -> dict:
  """Every figure of every subject.

  Args:
    subjects: by name.
    teacher: what their distance is measured to; one of the subjects may be the teacher itself.
    docs: encoded examples, answers included, in the order of `examples`.
    batch: documents per forward pass.
    max_new: most tokens of an answer.
    stop: an answer ends before this text, as it does at the end-of-text token.
    predictions: a folder for NAME.jsonl, made if absent: {'id', 'prediction', 'answers', 'exact_match'} of each example.

  Returns:
    {name: {'n', 'exact_match', 'substring', 'f1', 'ce', 'kl', 'by_distance': [{'from', 'tokens', 'ce', 'kl'}]}}, names
    in the order of `subjects`. `exact_match` compares the text to the letter, `substring` and `f1` after SQuAD's
    normalisation; ce and kl are means over answer tokens, in nats; `by_distance` has them by the distance of the
    predicted token from the start of its block.
  """
  if len(docs) != len(examples):
    raise ValueError(f'{len(docs)} documents but {len(examples)} examples')
  if not docs:
    raise ValueError('nothing to evaluate: no document was left')
  gaps = token_gap(subjects, teacher, docs, batch=batch)
  results = {}
  for name, subject in subjects.items():
    answers = [tokenizer.decode(a, skip_special_tokens=True)
               for a in answer(subject, docs, tokenizer.eos_token_id, batch=batch, max_new=max_new)]
    if stop is not None:
      answers = [a.partition(stop)[0] for a in answers]
    scored = [scores.score(a, e.answers or (e.response,)) for a, e in zip(answers, examples, strict=True)]
    if predictions is not None:
      _write_lines(pathlib.Path(predictions) / f'{name}.jsonl',
                   [{'id': e.id, 'prediction': a, 'answers': list(e.answers or (e.response,)),
                     'exact_match': s['exact_match']} for a, s, e in zip(answers, scored, examples, strict=True)])
    results[name] = {'n': len(docs)} | {k: float(np.mean([s[k] for s in scored])) for k in scored[0]} | gaps[name]
  return results


def token_gap(subjects: Mapping[str, Subject], teacher: Subject, docs: Sequence[encode.EncodedDoc], *,
              batch: int) -> dict:
  """{name: 'ce', 'kl' and 'by_distance' of `evaluate`}, from teacher-forced answers. The teacher reads a batch once."""
  totals = {name: np.zeros((3, len(BINS))) for name in subjects}
  for _, rows in _batches(docs, batch):
    right = _hidden(teacher.params, rows, _static(teacher, rows))
    for name, subject in subjects.items():
      hidden = right if subject is teacher else _hidden(subject.params, rows, _static(subject, rows))
      heads = tuple(transformer.head_of(s.params, s.cfg) for s in (subject, teacher))
      totals[name] += jax.device_get(_gap_sums(heads, (hidden, right), rows))
  return {name: _gap_figures(*total) for name, total in totals.items()}


def _gap_figures(tokens, ce, kl):
  """From sums by bin."""
  every = max(tokens.sum(), 1)
  by_distance = [{'from': low, 'tokens': int(n), 'ce': float(c / n), 'kl': float(k / n)}
                 for low, n, c, k in zip(BINS, tokens, ce, kl, strict=True) if n]
  return {'ce': float(ce.sum() / every), 'kl': float(kl.sum() / every), 'by_distance': by_distance}


def answer(subject: Subject, docs: Sequence[encode.EncodedDoc], stop_id: int, *, batch: int,
           max_new: int) -> list[list[int]]:
  """The greedy answer to each document's prompt: token ids without the end-of-text token."""
  answers = [[] for _ in docs]
  for numbers, rows in _batches([_prompt_of(doc) for doc in docs], batch):
    static = _static(subject, rows)
    tokens, layout = _view(rows, static)[:2]
    out = decode.greedy(subject.params, tokens, layout, cfg=subject.cfg, compute=subject.compute, length=max_new,
                        stop_id=stop_id, vocab=subject.cfg.vocab)
    for number, row in zip(numbers, np.asarray(out), strict=False):   # the rows after the last document are empty
      answers[number] = [int(t) for t in row if t != stop_id]
  return answers


@dataclasses.dataclass(frozen=True)
class _Static:
  """The part of a Subject that a compiled function is specialised to."""
  cfg: transformer.ModelConfig
  compute: transformer.Compute
  mode: str
  options: blocks.BlockOptions


def _static(subject, rows):
  most = int(rows['layout'].block.max()) + 1
  most = 1 << (most - 1).bit_length()   # few sizes, few compilations
  return _Static(subject.cfg, subject.compute, subject.mode, dataclasses.replace(subject.options, max_blocks=most))


def _view(rows, static):
  if static.mode == 'block':
    return blocks.block_mode(rows['tokens'], rows['layout'], static.options)
  shape = rows['tokens'].shape
  return rows['tokens'], blocks.as_one_block(rows['layout']), jnp.broadcast_to(jnp.arange(shape[1]), shape)


@functools.partial(jax.jit, static_argnames='static')
def _hidden(params, rows, static):
  tokens, layout, index = _view(rows, static)
  x_BTD = transformer.apply(params, tokens, layout, static.cfg, static.compute)
  return jnp.take_along_axis(x_BTD, index[..., None], axis=1)


@jax.jit
def _gap_sums(heads, hidden, rows):
  """[3, bins]: how many answer tokens, their cross-entropy and KL. heads and hidden are (the student's, the teacher's)."""
  def sums(heads, hidden, per_token, mask):
    student, teacher = losses.common_vocabulary(*map(transformer.project, hidden, heads))
    ce = -losses.log_prob(student, per_token['target'])
    kl = losses.forward_kl(teacher, student, 1.0)
    in_bin = mask.astype(jnp.float32)[..., None] * jax.nn.one_hot(per_token['bin'], len(BINS))
    return jnp.einsum('nbt,btk->nk', jnp.stack([jnp.ones_like(ce), ce, kl]), in_bin)

  bins = jnp.searchsorted(jnp.asarray(BINS), blocks.offsets(rows['layout']) + 1, side='right') - 1
  return losses.sum_over_tokens(sums, heads, hidden, {'target': rows['targets'], 'bin': bins}, rows['loss'], _CHUNK)


def _prompt_of(doc):
  start = doc.answer[0]
  return encode.EncodedDoc(tokens=doc.tokens[:start], lengths=(*doc.lengths[:-1], start - sum(doc.lengths[:-1])),
                           answer=(start, start))


def _batches(docs, batch) -> Iterable[tuple[Sequence[int], dict]]:
  """(numbers of the documents, their rows, one document each), shortest documents first.

  Rows are padded to a power of two or one and a half of it: few shapes, few compilations. The last batch is filled up
  with empty rows.
  """
  batch = min(batch, len(docs))
  order = np.argsort([len(doc.tokens) for doc in docs], kind='stable')
  for i in range(0, len(docs), batch):
    numbers = order[i:i + batch]
    length = decode.bucket(len(docs[numbers[-1]].tokens), _SHORTEST)
    rows = [packing.pack_row([docs[n]], length) for n in numbers]
    rows += [packing.pack_row([], length)] * (batch - len(numbers))
    yield numbers, jax.tree.map(lambda *x: np.stack(x), *rows)


def _write_lines(path, rows):
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_suffix('.tmp')
  partial.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  partial.replace(path)
