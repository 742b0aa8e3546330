"""How far a model in some mode is from its teacher: cross-entropy and KL on answer tokens, and greedy answers.

A `Subject` is a model in a mode; the teacher is a Subject in full mode. Documents are evaluated one per row, so the
figures do not depend on how training packs them: `measure` makes a row of figures per document, and goes on where it was
stopped; `summarize` and `share_closed` make means of them. A subject reads a document once, its answer included: no token of
the prompt sees the answer, so that the same keys and values serve what is written in its place.
"""

import dataclasses
import functools
import hashlib
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from blockattn import blocks, loading, losses
from blockattn.data import encode, packing
from blockattn.data.example import Example
from blockattn.errors import UserError
from blockattn.evals import answers, scores
from blockattn.hf import files
from blockattn.models import decode, transformer

MODES = ('full', 'block')
TEACHER, BEFORE, STUDENT = 'teacher_full', 'teacher_block', 'student_block'   # names of subjects
DOCUMENTS = 'documents.jsonl'
BINS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096, 16384)   # lower edges of the distance bins, in tokens
Array = jax.Array
Put = Callable[[dict], dict]   # the rows of a batch on the host -> where they are computed with
_ROW = {'document': int, 'key': str, 'models': {str: dict}}   # what each line has
_STEP = 128       # tokens: the lengths of rows are multiples of it
_CHUNK = 32       # tokens per row whose logits exist at a time: answers are short


@dataclasses.dataclass(frozen=True)
class Reading:
  """How a subject reads the rows of a batch: as its mode's mask says, in one forward pass. Others are rivals of it."""

  def __call__(self, params, view, cfg, compute, room) -> tuple[Array, tuple | None]:
    """What is read of `view`, which `_view` makes, see `read`; jitted."""
    return read(params, view, cfg, compute, room)

  def recomputed(self, lengths: Sequence[int], options: blocks.BlockOptions) -> int:
    """How many tokens of a prompt's context, blocks of so many, are computed again when the question is asked."""
    return sum(min(options.seam, length) for length in lengths[1:])


@dataclasses.dataclass(frozen=True)
class Subject:
  """A model as it is evaluated. Without its parameters it is what a compiled function is specialised to."""
  params: Any
  cfg: transformer.ModelConfig
  compute: transformer.Compute
  mode: str   # 'full': plain causal attention, no sinks. 'block': the block mask with the sinks of `options`
  options: blocks.BlockOptions   # of block mode; max_blocks is set by the documents at hand
  chat: bool = False   # whether its prompts are to be put into the chat template
  reading: Reading = Reading()

  def __post_init__(self):
    if self.mode not in MODES:
      raise UserError(f'evaluation mode {self.mode!r}; choose one of {", ".join(MODES)}')


def load(path: str | os.PathLike, mode: str, compute: transformer.Compute, template_args: str | None = None,
         chat: bool | None = None) -> tuple[Subject, Any]:
  """(a model to evaluate, its parameters in compute.dtype; its tokenizer); see `loading.load`, and what it raises.
  `dataclasses.replace(subject, mode=...)` gives the other mode without loading again."""
  loaded = loading.load(path, compute.dtype, template_args=template_args, chat=chat)
  return Subject(loaded.params, loaded.cfg, compute, mode, loaded.blocks, loaded.chat), loaded.tokenizer


def seam_name(seam: int) -> str:
  """The subject that is the student in block mode with seams of so many tokens."""
  return f'{STUDENT}_seam_{seam}'


def recomputed(docs: Sequence[encode.EncodedDoc], subject: Subject) -> float:
  """The share of the context's text tokens that a subject computes again for every prompt, whatever is cached."""
  context = [doc.lengths[:-1] for doc in docs]
  again = sum if subject.mode == 'full' else lambda lengths: subject.reading.recomputed(lengths, subject.options)
  return sum(map(again, context)) / max(sum(map(sum, context)), 1)


def block_facts(options: blocks.BlockOptions) -> dict[str, Any]:
  """What of block mode decides figures, JSON values; what came later is said where it is in use."""
  said = {'sink_ids': list(options.sink_ids), 'positions': options.positions, 'shared_first': options.shared_first}
  later = {'tail_ids': list(options.tail_ids), 'links': options.links, 'seam': options.seam, 'align': options.align,
           'hide_starts': options.hide_starts, 'overlap': options.overlap}
  return said | {name: later[name] for name in later if getattr(options, name) != getattr(options.bare, name)}


def load_pair(model: str | os.PathLike, teacher: str | os.PathLike, modes: Sequence[str], compute: transformer.Compute,
              *, seams: Sequence[int] = (), **prompts: Any) -> tuple[dict[str, Subject], Subject, Any]:
  """({name: Subject} of the teacher and of the student by mode, the teacher, the student's tokenizer).

  With block mode comes the teacher under the student's block mask, without sinks: it never saw one; for each of `seams` the
  student in block mode with seams of so many tokens. Raises ValueError: the two tokenizers differ, so that tokens of one
  mean nothing to the other."""
  teacher_subject, teacher_tokenizer = load(teacher, 'full', compute)
  student, tokenizer = load(model, 'block', compute, **prompts)
  encode.check_same_tokens(tokenizer, teacher_tokenizer, model, teacher)
  subjects = {TEACHER: teacher_subject}
  if 'block' in modes:
    subjects[BEFORE] = dataclasses.replace(teacher_subject, mode='block', options=student.options.bare)
  for mode in modes:
    subjects[f'student_{mode}'] = dataclasses.replace(student, mode=mode)
  for seam in seams:
    options = dataclasses.replace(student.options, seam=seam)
    subjects[seam_name(seam)] = dataclasses.replace(student, mode='block', options=options)
  return subjects, teacher_subject, tokenizer


def measure(subjects: Mapping[str, Subject], teacher: Subject | None, docs: Sequence[encode.EncodedDoc],
            examples: Sequence[Example], tokenizer: Any, *, batch: int, max_new: int, stop: str | None = None,
            out: str | os.PathLike | None = None, facts: Mapping[str, Any] | None = None,
            progress: Callable[[int, int], None] | None = None, put: Put | None = None) -> list[dict]:
  """Every subject on every document, the longest documents first.

  Args:
    teacher: what the subjects' distance is measured to; one of them may be the teacher itself. None: each its own, at KL 0.
    docs: encoded examples, answers included, in the order of `examples`.
    batch: documents per forward pass.
    max_new: most tokens of an answer; 0: none is written, and there are no scores.
    stop: an answer ends before this text, as it does at the tokens of `files.stop_ids`.
    out: a folder, made if absent: run.json holds the facts, documents.jsonl gets a line per document as they come. What is
      there is not computed again.
    facts: what decides the figures beside documents, subjects' names, max_new and stop; JSON values.
    progress: called with (readings done, all): every subject reads every document.
    put: brings the `batch` rows of a forward pass to where the subjects compute, of several processes those of each; None:
      they are taken from the host, and may be fewer than `batch`.

  Returns:
    A row per document, in the order of `docs`: {'document': its number, 'id', 'answers', 'key', 'models': {name:
    {'prediction', 'scores': {'exact_match', 'substring', 'f1'}, 'by_distance': [[from, tokens, ce, kl], ...]}}}.
    `exact_match` compares the text to the letter, `substring` and `f1` after SQuAD's normalisation; ce and kl are sums
    over answer tokens, in nats, by the distance of the predicted token from the start of its block.

  Raises ValueError: there is no document, one is longer than a model has positions for or has tokens that it has no rows
  for, or the folder holds another run."""
  if len(docs) != len(examples) or not docs:
    raise UserError(f'{len(docs)} documents but {len(examples)} examples' if docs or examples else
                    'nothing to evaluate: no document was left')
  _check_positions(subjects, docs, examples, max_new)
  for doc, example in zip(docs, examples, strict=True):
    if max_new and doc.answer[0] == sum(doc.lengths[:-1]):
      raise UserError(f'{example.id}: a text without a question, to which nothing can be answered; leave it out')
  for name, subject in subjects.items():
    for doc, example in zip(docs, examples, strict=True):
      encode.check_ids(doc.tokens, subject.cfg.vocab, tokenizer, f'{name}: {example.id}')
  facts = {'subjects': list(subjects), 'max_new': max_new, 'stop': stop} | dict(facts or {})
  keys = {number: _key(doc) for number, doc in enumerate(docs)}

  def batches(todo):
    nonlocal batch
    batch = min(batch, max(len(todo), 1)) if put is None else batch
    todo = sorted(todo, key=lambda number: (-len(docs[number].tokens), number))
    return (todo[start:start + batch] for start in range(0, len(todo), batch))

  def make(numbers):
    made = _measure_batch(subjects, teacher, [docs[n] for n in numbers], [examples[n] for n in numbers], tokenizer, batch,
                          max_new, stop, put or _as_it_is, lambda readings: show(done, len(docs), readings))
    return [{'document': number, **row, 'key': keys[number]} for number, row in zip(numbers, made, strict=True)]

  def show(documents, of, readings=0):
    nonlocal done
    done = documents
    if progress:
      progress(documents * len(subjects) + readings, of * len(subjects))

  done = 0
  return answers.kept_rows(None if out is None else pathlib.Path(out), facts, keys, batches, make, file=DOCUMENTS, form=_ROW,
                           by='document', progress=show)


def _check_positions(subjects, docs, examples, max_new):
  """Raises ValueError, naming the first document that, with sinks or with its longest answer, has more tokens than a
  subject has positions."""
  for name, subject in subjects.items():
    most, added = subject.cfg.max_positions, subject.options.most_positions if subject.mode == 'block' else lambda count: 0
    needs = [max(len(doc.tokens), doc.answer[0] + max_new) + added(len(doc.lengths)) for doc in docs]
    long = [i for i, need in enumerate(needs) if need > most]
    if long:
      raise UserError(f'{len(long)} of {len(docs)} documents are too long for {name}: {examples[long[0]].id} takes '
                      f'{needs[long[0]]} positions, sinks and answer included, and the model has {most} '
                      '(max_position_embeddings); leave them out, or take a model with more')


def _key(doc):
  said = repr((tuple(map(int, doc.lengths)), tuple(map(int, doc.answer)), tuple(map(bool, doc.continued)))).encode()
  return hashlib.sha256(said + np.asarray(doc.tokens, np.int32).tobytes()).hexdigest()[:16]


def _as_it_is(rows):
  return rows


def _measure_batch(subjects, teacher, docs, examples, tokenizer, batch, max_new, stop, put, show) -> list[dict]:
  """Rows of the documents of one batch, see `measure`; `show` is called with the readings so far."""
  rows = _rows(docs, batch)
  placed, models = put(rows), [{} for _ in docs]
  stop_ids = files.stop_ids(tokenizer.name_or_path, tokenizer.eos_token_id) if max_new else ()
  read = lambda subject, max_new: _read(subject, rows, placed, max_new, stop_ids)
  right = None if teacher is None else read(teacher, max_new if any(s is teacher for s in subjects.values()) else 0)
  for number, (name, subject) in enumerate(subjects.items()):
    if number:
      show(number * len(docs))
    hidden, tokens = right if right and subject is teacher else read(subject, max_new)
    heads = tuple(transformer.head_of(s.params, s.cfg) for s in (subject, teacher or subject))
    sums = _whole(_gap_sums(heads, (hidden, right[0] if right else hidden), placed)).astype(np.float64)
    said = [{'scores': {}}] * len(docs)
    if max_new:
      said = _scored(_whole(tokens)[:len(docs)], stop_ids, examples, tokenizer, stop)
    for own, answered, (count, ce, kl) in zip(models, said, sums[:len(docs)], strict=True):
      own[name] = answered | {'by_distance': [[low, int(n), float(c), float(k)]
                                              for low, n, c, k in zip(BINS, count, ce, kl, strict=True) if n]}
  return [{'id': example.id, 'answers': list(_accepted(example)), 'models': own}
          for example, own in zip(examples, models, strict=True)]


def _scored(answers, stop_ids, examples, tokenizer, stop) -> list[dict]:
  """The texts of answers, up to the one of `stop_ids` that ends them, with their scores."""
  said = [tokenizer.decode([int(t) for t in tokens if t not in stop_ids], skip_special_tokens=True) for tokens in answers]
  said = [text if stop is None else text.partition(stop)[0] for text in said]
  return [{'prediction': text, 'scores': scores.score(text, _accepted(example))}
          for text, example in zip(said, examples, strict=True)]


def _accepted(example):
  return example.answers or (example.response,)


def summarize(rows: Sequence[Mapping]) -> dict:
  """`figures` with 'intervals': {measure: {'mean', 'low', 'high'}} of every subject, from resampling documents, see
  `answers.interval`."""
  intervals = {name: {m: answers.interval(x) for m, x in means.items()} for name, means in sampled(rows).items()}
  return {name: own | {'intervals': intervals[name]} for name, own in figures(rows).items()}


def figures(rows: Sequence[Mapping]) -> dict:
  """The figures of every subject from the rows of `measure`: {name: {'n', 'exact_match', 'substring', 'f1', 'ce', 'kl',
  'by_distance': [{'from', 'tokens', 'ce', 'kl'}]}}.

  ce and kl are means over answer tokens; scores are there where all of the rows have some."""
  found = {}
  for name in rows[0]['models']:
    measures, sums_NM, counts_NM = _sums(rows, name)
    means = answers.means(sums_NM, counts_NM)
    by_bin = np.sum([_by_bin(row['models'][name]) for row in rows], axis=0)
    found[name] = {'n': len(rows)} | dict(zip(measures, map(float, means), strict=True)) | {
        'by_distance': [{'from': low, 'tokens': int(n), 'ce': float(c / n), 'kl': float(k / n)}
                        for low, n, c, k in zip(BINS, *by_bin, strict=True) if n]}
  return found


def sampled(rows: Sequence[Mapping]) -> dict[str, dict[str, np.ndarray]]:
  """{name: {measure: `answers.resampled` means}}; all subjects by the same draws of documents."""
  found = {}
  for name in rows[0]['models']:
    measures, sums_NM, counts_NM = _sums(rows, name)
    found[name] = dict(zip(measures, answers.resampled(sums_NM, counts_NM, 'documents'), strict=True))
  return found


def _sums(rows, name):
  """(measures, what each document adds to each [N, M], and to how many it adds that [N, M]) of a subject."""
  own = [row['models'][name] for row in rows]
  sums_N3 = np.stack([_by_bin(one).sum(axis=1) for one in own])
  measures = [m for m in own[0]['scores'] if all(m in one['scores'] for one in own)]
  sums_NM = np.concatenate([[[one['scores'][m] for m in measures] for one in own], sums_N3[:, 1:]], axis=1)
  counts_NM = np.ones_like(sums_NM)
  counts_NM[:, -2:] = sums_N3[:, :1]
  return [*measures, 'ce', 'kl'], sums_NM, counts_NM


def share_closed(rows: Sequence[Mapping], teacher: str, before: str, after: str) -> dict[str, dict[str, float]]:
  """How much of what blocks cost a teacher is made good, by measure: (before - after) / (before - teacher), of subjects by
  name: with full attention, the same weights under the block mask, the student.

  Returns {measure: {'mean', 'low', 'high'}}, without the measures where the cost itself is not clear of 0."""
  return share_in(sampled(rows), teacher, before, after)


def share_in(means: Mapping[str, Mapping[str, np.ndarray]], teacher: str, before: str, after: str) -> dict:
  """`share_closed`, of what `sampled` gives."""
  shares = {}
  for measure in means[teacher]:
    cost, gain = (means[before][measure] - means[name][measure] for name in (teacher, after))
    interval = answers.interval(cost)
    if interval['low'] * interval['high'] > 0:
      shares[measure] = answers.interval((gain / np.where(cost == 0, np.nan, cost))[np.sign(cost) == np.sign(cost[0])])
  return shares


def _whole(x) -> np.ndarray:
  """An array on the host, of which other processes may have parts."""
  return np.asarray(x) if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True)


def _by_bin(one) -> np.ndarray:
  """[3, bins]: tokens, ce and kl of a subject on a document."""
  sums = np.zeros((3, len(BINS)))
  for low, *values in one['by_distance']:
    sums[:, BINS.index(low)] = values
  return sums


def _read(subject, rows, placed, max_new, stop_ids):
  """(hidden states of the text tokens [rows, T, D], greedy answers to the prompts [rows, max_new]).

  Arrays are as long as the longest document with what block mode inserts wants them, rounded up; the programs know nothing
  else of mode and blocks, so that the subjects of one architecture share a few.
  """
  form, length = None, rows['tokens'].shape[1]
  if subject.mode == 'block':
    most = int(rows['layout'].block.max()) + 1
    form = dataclasses.replace(subject.options, max_blocks=1 << (most - 1).bit_length())   # few sizes, few compilations
    used = (rows['layout'].doc != 0).sum(axis=1) + form.most_added * (rows['layout'].block.max(axis=1) + 1)
    length = min(_length(int(used.max())), blocks.padded_length(length, form))
  how = dict(cfg=subject.cfg, compute=subject.compute)
  hidden, start = _hidden_and_start(subject.params, _view(placed, form, length), reading=subject.reading,
                                    room=_room(length, max_new), **how)
  if not max_new:
    return hidden, None
  return hidden, decode.greedy(subject.params, *start, length=max_new, stop_ids=np.array(stop_ids, np.int32),
                               vocab=subject.cfg.vocab, **how)


@functools.partial(jax.jit, static_argnames=('form', 'length'))
def _view(rows, form, length):
  """What is read of the rows: (tokens, layout [B, length], where each text token went [B, T], where the prompt's last one
  did [B]).

  Args:
    form: BlockOptions; None: plain causal attention.
  """
  shape = rows['tokens'].shape
  if form is None:
    tokens, layout = rows['tokens'], blocks.as_one_block(rows['layout'])
    index = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)
  else:
    tokens, layout, index = blocks.block_mode(rows['tokens'], rows['layout'], form, continued=rows['continued'])
  tokens, layout = jax.tree.map(lambda x: x[:, :length], (tokens, layout))
  # The token that predicts the answer's first; where there is no answer, the last of all.
  whole = jnp.maximum((rows['layout'].doc != 0).sum(axis=1) - 1, 0)
  last = jnp.where(rows['loss'].any(axis=1), rows['loss'].argmax(axis=1), whole)
  return tokens, layout, index, jnp.take_along_axis(index, last[:, None], axis=1)[:, 0]


def _room(length, max_new):
  """For an answer, so much that caches have fewer lengths than rows: what is not used costs less than a compilation."""
  return max_new and decode.bucket(length + max_new, 2 * _STEP) - length


@functools.partial(jax.jit, static_argnames=('reading', 'cfg', 'compute', 'room'))
def _hidden_and_start(params, view, reading, cfg, compute, room):
  return reading(params, view, cfg, compute, room)


def read(params: Any, view: tuple, cfg: transformer.ModelConfig, compute: transformer.Compute, room: int,
         context: decode.Context | None = None) -> tuple[Array, tuple | None]:
  """(hidden states of the text tokens, what `decode.greedy` continues with so much room for answers, None without).

  Args:
    view: (tokens, layout, index, last) of `_view`.
    context: what the tokens of the layout read beside it.
  """
  tokens, layout, index, last = view
  x_BTD, states = decode.read(params, tokens, layout, cfg, compute, context)
  hidden = jnp.take_along_axis(x_BTD, index[..., None], axis=1)
  if not room:
    return hidden, None
  return hidden, (*decode.start(x_BTD, states, layout, last, cfg, room), None if context is None else decode.gather(context))


@jax.jit
def _gap_sums(heads, hidden, rows):
  """[rows, 3, bins]: how many answer tokens, their cross-entropy and KL. heads and hidden are (the student's, the
  teacher's)."""
  def sums(heads, states, per_token, mask):
    student, teacher = losses.common_vocabulary(*map(transformer.project, heads, states))
    ce = -losses.log_prob(student, per_token['target'])
    kl = losses.divergence(teacher, student, 1.0)
    in_bin = mask.astype(jnp.float32)[..., None] * jax.nn.one_hot(per_token['bin'], len(BINS))
    return jnp.einsum('nbt,btk->bnk', jnp.stack([jnp.ones_like(ce), ce, kl]), in_bin)

  bins = jnp.searchsorted(jnp.asarray(BINS), blocks.offsets(rows['layout']) + 1, side='right') - 1
  return losses.sum_over_tokens(sums, heads, hidden, {'target': rows['targets'], 'bin': bins}, rows['loss'], _CHUNK)


def _rows(docs, batch) -> dict:
  """A document per row, and empty rows up to `batch`."""
  length = _length(max(len(doc.tokens) for doc in docs))
  rows = [packing.pack_row([doc], length) for doc in docs] + [packing.pack_row([], length)] * (batch - len(docs))
  return jax.tree.map(lambda *x: np.stack(x), *rows)


def _length(tokens):
  """So many tokens or up to an eighth more: few shapes, few compilations, and little padding to read."""
  step = max(_STEP, 1 << tokens.bit_length() >> 4)
  return -(-tokens // step) * step
