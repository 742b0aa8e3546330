"""Token losses over chunks: the logits of a whole row never exist.

The hidden states of the loss tokens are moved to the front of each row, and a scan multiplies `chunk` of them at a time
by the head, inside the jitted step; chunks without a loss token are skipped at run time. The gradient is made in the same
pass, while a chunk's logits are there; only where weights are means of documents, known after all chunks, does the backward
pass compute the logits again. Peak memory is B * chunk * V instead of B * T * V, and the work is proportional to the number
of loss tokens.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from blockattn.errors import UserError
from blockattn.models import transformer

Array = jax.Array
Head = tuple[Array, Array]   # (x_BTD, head_VD)

WEIGHT_FORMS = ('relu', 'exp', 'none')
GAP_SOURCES = ('student', 'teacher')
WEIGHTED = ('both', 'kl', 'ce')
WEIGHT_MEANS = ('batch', 'document')
DIVERGENCES = ('forward', 'reverse', 'jsd')
POSITION_BINS = 8      # of the KL by position: the last is the second half of a row, the one before it the quarter before
# The least probability that a student's rest of the vocabulary is taken to have: float32's rounding of a sum of K of its
# probabilities, below which the difference from 1 is noise and its logarithm anything.
_LEAST_REST = 1e-6


@dataclasses.dataclass(frozen=True)
class TokenWeights:
  """How much a token counts, by gap = log p_teacher(x | full) - log p(x | block), arXiv 2605.15913 (our reading).

  Attributes:
    form: 'relu': floor + clip(gap, 0, cap). 'exp': exp(min(gap, cap)). 'none': 1.
    source: whose block-mode probability: the 'student' as it is now, or the frozen 'teacher' under the block mask.
    floor: of 'relu'.
    cap: of the gap, in nats.
    on: what they count of: 'both' divergence and cross-entropy (and the output matching), or one of them, 'kl' or 'ce',
      beside the other unweighted.
    mean: over what a mean is weighted: the 'batch'; or each 'document', whose share of the loss is then that of its
      tokens. With 'exp', this is a softmax of the capped gaps over the document.
  """
  form: str = 'relu'
  source: str = 'student'
  floor: float = 0.1
  cap: float = 5.0
  on: str = 'both'
  mean: str = 'batch'

  def __post_init__(self):
    for name, choices in (('form', WEIGHT_FORMS), ('source', GAP_SOURCES), ('on', WEIGHTED), ('mean', WEIGHT_MEANS)):
      if getattr(self, name) not in choices:
        raise UserError(f'token weight {name} {getattr(self, name)!r}; choose one of {", ".join(choices)}')
    if self.form == 'none' and (self.source, self.on, self.mean) != ('student', 'both', 'batch'):
      raise UserError("token weight form 'none' has no source, no part of the loss that it counts in (on), and no other "
                      'mean; choose the form relu or exp, or leave them out')


def token_weight(gap: Array, weights: TokenWeights) -> Array:
  """The weight of each token before normalisation; no gradient."""
  gap = jax.lax.stop_gradient(gap)
  if weights.form == 'relu':
    return weights.floor + jnp.clip(gap, 0.0, weights.cap)
  if weights.form == 'exp':
    return jnp.exp(jnp.minimum(gap, weights.cap))
  return jnp.ones_like(gap)


def divergence(teacher_logits: Array, student_logits: Array, temperature: float, kind: str = 'forward') -> Array:
  """How far the student's distribution p_S is from the teacher's p_T, both at `temperature`: [..., V] -> [...], nats.

  Args:
    kind: 'forward': KL(p_T || p_S). 'reverse': KL(p_S || p_T), which lets a student leave out what the teacher also says.
      'jsd': the Jensen-Shannon divergence, the mean of both to their mixture; log 2 at most (arXiv 2306.13649).
  """
  log_p, log_q = (jax.nn.log_softmax(x / temperature) for x in (teacher_logits, student_logits))
  return _divergence(kind, jnp.exp(log_p), log_p, log_q)


def divergence_of_top(top_log_p: Array, top_ids: Array, student_logits: Array, temperature: float,
                      kind: str = 'forward') -> Array:
  """A lower bound on `divergence` from a teacher's K likeliest tokens: all others count as one token, "the rest".

  Joining outcomes can only lower such a divergence (data-processing inequality); it is exact where the student spreads the
  rest over tokens as the teacher does. The bound holds to float32's rounding, about 1e-6 nats, and needs log-probabilities
  of that precision: those of float16 are another teacher's, some 1e-4 nats away.

  Args:
    top_log_p: [..., K], log-probabilities at `temperature`.
    top_ids: int [..., K], their tokens.
    student_logits: [..., V].

  Returns:
    [...], nats.
  """
  log_q = jnp.take_along_axis(jax.nn.log_softmax(student_logits / temperature), top_ids, axis=-1)
  with_rest = lambda x, rest: jnp.concatenate([x, rest[..., None]], axis=-1)
  log_rest = lambda rest: jnp.log(jnp.maximum(rest, _LEAST_REST))
  p = jnp.exp(top_log_p)
  p_rest = jnp.maximum(1 - jnp.sum(p, axis=-1), 0)
  return _divergence(kind, with_rest(p, p_rest), with_rest(top_log_p, log_rest(p_rest)),
                     with_rest(log_q, log_rest(1 - jnp.sum(jnp.exp(log_q), axis=-1))))


def _divergence(kind, p, log_p, log_q):
  """Over the last axis; p is exp(log_p), or 0 where log_p is a stand-in."""
  if kind == 'forward':
    return _mean(p, log_p - log_q)
  if kind == 'reverse':
    return _mean(jnp.exp(log_q), log_q - log_p)
  log_m = jnp.logaddexp(log_p, log_q) - jnp.log(2.0)
  return 0.5 * (_mean(p, log_p - log_m) + _mean(jnp.exp(log_q), log_q - log_m))


def _mean(p, x):
  """Of x under probabilities p, over the last axis. A sum of products, as a fusion of XLA's CPU backend, took three times as
  long as this product of vectors, and with it a training step 15 % longer."""
  return jnp.einsum('...v,...v->...', p, x, precision='highest')


def log_prob(logits: Array, targets: Array) -> Array:
  """log p(target) of each token: [..., V], [...] -> [...]."""
  picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  return picked - jax.nn.logsumexp(logits, axis=-1)


def sum_over_tokens(token_fn: Callable[..., Any], heads: Any, states: Any, per_token: Any, mask: Array, chunk: int,
                    parts: int = 1, of: str | None = None) -> Any:
  """Sums `token_fn` over the tokens where `mask` holds, `chunk` tokens of each row at a time.

  Args:
    token_fn: (heads, states, per_token, mask) of one chunk, arrays [B, chunk, ...] -> pytree of float32 scalars.
    heads: pytree of whatever token_fn needs whole (the output matrices); differentiable.
    states: pytree of [B, T, D], hidden states; differentiable.
    per_token: pytree of [B, T], differentiable where it is float.
    mask: bool [B, T].
    chunk: static number of tokens per row and chunk.
    parts: of a row that are on different devices: each gathers and sums its own tokens.
    of: of a dict of sums, the only one that has a gradient, which is made together with it, so that each chunk's logits are
      made once. None: every sum has one, and the backward pass makes each chunk's logits again.

  Returns:
    The pytree of sums.
  """
  states, per_token, mask = jax.tree.map(functools.partial(_cut_rows, parts=parts), (states, per_token, mask))
  chunk = min(chunk, mask.shape[1])
  # Loss tokens first; a stable sort keeps their order, so that nothing depends on the sort's whims.
  order = jnp.argsort(~mask, axis=1, stable=True)
  chunks = jax.tree.map(functools.partial(_gather_chunks, order=order, chunk=chunk), (states, per_token, mask))
  return _sums(token_fn, heads, chunks) if of is None else _sums_with_gradient(token_fn, of, heads, chunks)


def _sums(token_fn, heads, chunks):
  zeros = lambda: _zeros(token_fn, heads, chunks)

  # The checkpoint is around the cond: what a cond saves for its backward pass is saved once per chunk, heads included.
  @functools.partial(jax.checkpoint, prevent_cse=False)
  def one_chunk(heads, x):
    return jax.lax.cond(jnp.any(x[2]), lambda: token_fn(heads, *x), zeros)

  def add(total, x):
    return jax.tree.map(jnp.add, total, one_chunk(heads, x)), None

  return jax.lax.scan(add, zeros(), chunks)[0]


def _sums_with_gradient(token_fn, of, heads, chunks):
  """As `_sums`; the gradient of the sum `of`, where it is asked for, is made beside the sums, and scaled backwards."""
  sums_of = jax.custom_vjp(functools.partial(_sums, token_fn))

  def forward(heads, chunks):
    asked = jax.tree.map(lambda x: x.perturbed, (heads, chunks))
    heads, chunks = jax.tree.map(lambda x: x.value, (heads, chunks))
    return _scan_with_gradient(token_fn, of, heads, chunks, asked)

  def backward(grads, cotangents):
    others = [x for name, x in cotangents.items() if name != of]
    if not all(isinstance(x, jax.custom_derivatives.SymbolicZero) for x in others):
      raise TypeError(f'of these sums only {of!r} has a gradient; pass the others through jax.lax.stop_gradient')
    return jax.tree.map(lambda x: (cotangents[of] * x.astype(jnp.float32)).astype(x.dtype), grads)

  sums_of.defvjp(forward, backward, symbolic_zeros=True)
  return sums_of(heads, chunks)


def _scan_with_gradient(token_fn, of, heads, chunks, asked):
  """(sums, gradients of the sum `of` by heads and chunks, with None where `asked`, a tree of bool, does not hold)."""
  head_asked, chunk_asked = asked

  def add(total, x):
    changing, fixed = _only((heads, x), asked, True), _only((heads, x), asked, False)

    def loss(changing):
      heads, x = jax.tree.map(lambda a, b: b if a is None else a, changing, fixed, is_leaf=lambda a: a is None)
      sums = token_fn(heads, *x)
      return sums[of], sums

    (of_heads, of_chunk), sums = jax.grad(loss, has_aux=True)(changing)
    return jax.tree.map(lambda total, x: total + x.astype(total.dtype), total, (sums, of_heads)), of_chunk

  def skip(total, x):
    return total, jax.tree.map(jnp.zeros_like, _only(x, chunk_asked, True))

  changing = _only(heads, head_asked, True)
  # Those of many chunks are added in float32, whatever the head's precision.
  start = _zeros(token_fn, heads, chunks), jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), changing)
  one_chunk = lambda total, x: jax.lax.cond(jnp.any(x[2]), add, skip, total, x)
  (sums, of_heads), of_chunks = jax.lax.scan(one_chunk, start, chunks)
  return sums, (jax.tree.map(lambda g, x: g.astype(x.dtype), of_heads, changing), of_chunks)


def _zeros(token_fn, heads, chunks):
  """The sums of no tokens."""
  shapes = jax.eval_shape(token_fn, heads, *jax.tree.map(lambda x: x[0], chunks))
  return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


def _only(tree, chosen, wanted):
  """The tree with None for every leaf where `chosen`, a tree of bool, is not what is wanted."""
  return jax.tree.map(lambda x, here: x if here == wanted else None, tree, chosen)


def _cut_rows(x, *, parts):
  """[B, T, ...] -> [B parts, T / parts, ...]."""
  return x if parts == 1 else x.reshape(x.shape[0] * parts, x.shape[1] // parts, *x.shape[2:])


def _gather_chunks(x, *, order, chunk):
  """[B, T, ...] -> [T / chunk, B, chunk, ...] in the given token order, padded with zeros."""
  index = order.reshape(order.shape + (1,) * (x.ndim - 2))
  x = jnp.take_along_axis(x, index, axis=1)
  rows, length = x.shape[:2]
  x = jnp.pad(x, [(0, 0), (0, -length % chunk)] + [(0, 0)] * (x.ndim - 2))
  return jnp.moveaxis(x.reshape(rows, -1, chunk, *x.shape[2:]), 1, 0)


def map_chunks(fn: Callable[[Any], Any], tree: Any, chunk: int) -> Any:
  """fn of `chunk` tokens of each row at a time: arrays [B, T, ...] -> arrays [B, T, ...]; fn sees [B, chunk, ...]."""
  rows, length = jax.tree.leaves(tree)[0].shape[:2]
  chunk = min(chunk, length)
  cut = lambda x: jnp.moveaxis(jnp.pad(x, [(0, 0), (0, -length % chunk)] + [(0, 0)] * (x.ndim - 2)).reshape(
      rows, -1, chunk, *x.shape[2:]), 1, 0)
  join = lambda x: jnp.moveaxis(x, 0, 1).reshape(rows, -1, *x.shape[3:])[:, :length]
  return jax.tree.map(join, jax.lax.map(fn, jax.tree.map(cut, tree)))


class Reading(NamedTuple):
  """What a model makes of the text tokens of a batch.

  Attributes:
    head: function from hidden states [..., D] to float32 logits [..., V] that JAX can pass on, such as
      jax.tree_util.Partial; the loss calls it on some tokens at a time.
    x_BTD: its hidden states.
    blocked_BTD: those of a teacher under the block mask; only where the token weights ask for them.
  """
  head: Any
  x_BTD: Array
  blocked_BTD: Array | None = None


class StoredTeacher(NamedTuple):
  """What is kept of a teacher's reading, see data.teacher_logits: the likeliest tokens' ids and log-probabilities
  [B, T, K], and the log-probability of the target [B, T], with full attention and under the block mask."""
  ids: Array
  log_p: Array
  target_log_p: Array
  blocked_log_p: Array


class _Token(NamedTuple):
  """What the loss knows of each token beside hidden states."""
  target: Array
  position: Array
  document: Array | None
  stored: StoredTeacher | None
  match: Array | None


def distillation_sums(student: Reading, teacher: Reading | StoredTeacher, targets: Array, position: Array, mask: Array, *,
                      weights: TokenWeights, temperature: float, ce_weight: float, chunk: int, kind: str = 'forward',
                      document: Array | None = None, match: Array | None = None, match_weight: float = 0.0,
                      parts: int = 1) -> dict[str, Array]:
  """The distillation loss as sums: loss = sums['loss'] / sums['weight'].

  loss = sum_t m_t w_t [ temperature^2 D(p_T, p_S)_t + ce_weight * CE_t + match_weight * match_t ] / sum_t m_t w_t, with D
  the KL divergence or another one. The weights carry no gradient. D's gradient shrinks as 1 / temperature^2, so the factor
  (Hinton et al., arXiv 1503.02531) keeps it as large as it is at temperature 1, and ce_weight means the same at every
  temperature.

  Where the weights count of one of both only, all else has weight 1 and the sum is divided by the number of loss tokens.
  Where they are means of documents, w is divided by its mean over the document's loss tokens first.

  Args:
    teacher: at work, or what was stored of it (offline distillation).
    targets: int32 [B, T], the token that each position predicts.
    position: int32 [B, T], in its document.
    mask: bool [B, T], the loss tokens m.
    kind: of D, see `divergence`.
    document: int32 [B, T] below T + 1, the document of each token in its row; needed for weights.mean='document' only.
    match: float32 [B, T], how far the student's layers are from the teacher's at each token; None: that is no part of it.
    parts: see `sum_over_tokens`.

  Returns:
    {'loss', 'weight', 'weight_sum', 'weight_sq', 'at_floor', 'at_cap', 'tokens', 'kl', 'ce', 'teacher_ce', 'gap'}: float32
    scalars, each a sum over the loss tokens, `weight_sum` and `weight_sq` of w as it is before any division, `kl` (always
    the forward one) and the rest unweighted, `at_floor` and `at_cap` the tokens whose gap is outside of 0 ... cap; 'kl_at',
    'tokens_at' [POSITION_BINS]: sums over the tokens of each bin, see `position_bin`; 'match', unweighted, where given.
    Only 'loss' has a gradient.
  """
  length, by_document = mask.shape[1], weights.mean == 'document'
  if by_document and document is None:
    raise UserError("weights.mean='document' needs to know which document each token is of; give `document`")

  def chunk_sums(heads, states, token, mask):
    m = mask.astype(jnp.float32)
    logits = heads[0](states[0].x_BTD)
    if token.stored is None:
      found = _against(logits, states[1]._replace(head=heads[1]), token.target, temperature, kind)
    else:
      found = _against_stored(logits, token.stored, token.target, temperature, kind)
    blocked = found.blocked_log_p if weights.source == 'teacher' else found.log_q
    gap = jax.lax.stop_gradient(found.log_p - blocked)
    w = m * token_weight(gap, weights)
    terms = {'kl': temperature ** 2 * found.divergence, 'ce': -ce_weight * found.log_q}
    if token.match is not None:
      terms['match'] = match_weight * token.match
    nothing = jnp.zeros_like(m)
    weighted = sum((x for name, x in terms.items() if weights.on in (name, 'both')), nothing)
    plain = sum((m * x for name, x in terms.items() if weights.on not in (name, 'both')), nothing)
    at = m[..., None] * jax.nn.one_hot(position_bin(token.position, length), POSITION_BINS)
    sums: dict[str, Any] = {
        'loss': jnp.sum(plain + (nothing if by_document else w * weighted)),
        'weight_sum': jnp.sum(w), 'weight_sq': jnp.sum(w * w),
        'at_floor': jnp.sum(m, where=gap <= 0), 'at_cap': jnp.sum(m, where=gap >= weights.cap),
        'tokens': jnp.sum(m), 'kl': jnp.sum(m * found.kl), 'ce': -jnp.sum(m * found.log_q),
        'teacher_ce': -jnp.sum(m * found.log_p), 'gap': jnp.sum(m * gap),
        'kl_at': jnp.sum(found.kl[..., None] * at, axis=(0, 1)), 'tokens_at': jnp.sum(at, axis=(0, 1))}
    if token.match is not None:
      sums['match'] = jnp.sum(m * token.match)
    if by_document:
      rows = jnp.arange(m.shape[0])[:, None]
      of = lambda x: jnp.zeros((m.shape[0], length + 1)).at[rows, token.document].add(x)
      sums['documents'] = {'weighted': of(w * weighted), 'weight': of(w), 'tokens': of(m)}
    return sums

  stored, models = (teacher, (student,)) if isinstance(teacher, StoredTeacher) else (None, (student, teacher))
  heads = tuple(model.head for model in models)
  states = tuple(model._replace(head=None) for model in models)
  token = _Token(targets, position, document if by_document else None, stored, match)
  sums = sum_over_tokens(chunk_sums, heads, states, token, mask, chunk, parts, of=None if by_document else 'loss')
  if by_document:
    sums['loss'] += _sum_of_document_means(**jax.tree.map(lambda x: x.reshape(-1, parts, length + 1).sum(axis=1),
                                                          sums.pop('documents')))
  weight = sums['weight_sum' if weights.on == 'both' and not by_document else 'tokens']
  return sums | {'weight': jax.lax.stop_gradient(weight)}


def _sum_of_document_means(weighted, weight, tokens):
  """Each document's weighted mean, times its tokens, summed; of sums over its tokens [B, documents]."""
  return jnp.sum(tokens * weighted / jnp.maximum(weight, jnp.finfo(jnp.float32).tiny))


class _Found(NamedTuple):
  """Of each token: the divergence asked for, the KL, and log p(target) of the student, of the teacher with full attention,
  and of the teacher under the block mask (of the student, if the teacher has not read so)."""
  divergence: Array
  kl: Array
  log_q: Array
  log_p: Array
  blocked_log_p: Array


def _against(logits, teacher: Reading, target, temperature, kind) -> _Found:
  full = jax.lax.stop_gradient(teacher.head(teacher.x_BTD))
  student, full = common_vocabulary(logits, full)
  log_q = blocked = log_prob(student, target)
  if teacher.blocked_BTD is not None:
    blocked = log_prob(common_vocabulary(teacher.head(teacher.blocked_BTD), full)[0], target)
  kl = divergence(full, student, temperature)
  other = kl if kind == 'forward' else divergence(full, student, temperature, kind)
  return _Found(other, kl, log_q, log_prob(full, target), blocked)


def _against_stored(logits, stored: StoredTeacher, target, temperature, kind) -> _Found:
  of = functools.partial(divergence_of_top, stored.log_p, stored.ids, logits, temperature)
  kl = of()
  return _Found(kl if kind == 'forward' else of(kind), kl, log_prob(logits, target), stored.target_log_p,
                stored.blocked_log_p)


def distillation_loss(student: Head, teacher: Head, targets: Array, mask: Array, *, weights: TokenWeights | None = None,
                      temperature: float = 1.0, ce_weight: float = 0.0, kind: str = 'forward', document: Array | None = None,
                      chunk: int = 128) -> Array:
  """The loss of block distillation, for any two models: `distillation_sums` of a batch, as one number.

  Args:
    student, teacher: (hidden states x_BTD in front of the head, head [V, D]) of the same text tokens. Logits are made a
      chunk at a time. The teacher gets no gradient.
    targets: int32 [B, T], the token that each position predicts.
    mask: bool [B, T], the tokens that count; without one the loss is 0.
    weights: of tokens, by the student's own gap to the teacher; None: the default ones.
    temperature, ce_weight, kind, document: see `distillation_sums`.
    chunk: tokens of a row whose logits exist at a time.

  Returns:
    float32 scalar, differentiable in what `student` is made of.
  """
  weights = weights or TokenWeights()
  if weights.source != 'student':
    raise UserError(f"weights.source must be 'student' here, got {weights.source!r}; with the teacher's hidden states "
                    'under the block mask too, call distillation_sums')
  reading = lambda x_BTD, head_VD: Reading(jax.tree_util.Partial(transformer.project, head_VD), x_BTD)
  sums = distillation_sums(reading(*student), jax.lax.stop_gradient(reading(*teacher)), targets, jnp.zeros_like(targets),
                           mask, weights=weights, temperature=temperature, ce_weight=ce_weight, kind=kind,
                           document=document, chunk=chunk)
  return sums['loss'] / jnp.maximum(sums['weight'], jnp.finfo(jnp.float32).tiny)


def position_bin(position: Array, length: int) -> Array:
  """Bin of a position in its document: the last is length/2 and beyond, each before it half as wide, the first the rest."""
  edges = [-(-length // 2 ** i) for i in range(POSITION_BINS - 1, 0, -1)]
  return jnp.sum(jnp.stack([position >= edge for edge in edges]), axis=0, dtype=jnp.int32)


def common_vocabulary(a: Array, b: Array) -> tuple[Array, Array]:
  """Teacher and student may be padded to different sizes; both predict the smaller vocabulary."""
  size = min(a.shape[-1], b.shape[-1])
  return a[..., :size], b[..., :size]


def cross_entropy_sums(head: Callable[[Array], Array], x_BTD: Array, targets: Array, weight: Array, chunk: int,
                       parts: int = 1) -> dict[str, Array]:
  """Weighted cross-entropy as sums: loss = sums['loss'] / sums['weight'].

  Args:
    head: function from hidden states to float32 logits, such as jax.tree_util.Partial.
    weight: float32 [B, T] >= 0; tokens of weight 0 cost nothing.
    parts: see `sum_over_tokens`.

  Returns:
    {'loss', 'weight', 'tokens', 'ce'}: float32 scalars; `ce` is the unweighted sum over the `tokens` of weight > 0. Only
    'loss' has a gradient.
  """
  def chunk_sums(head, states, per_token, mask):
    m = mask.astype(jnp.float32)
    ce = -log_prob(head(states), per_token['target'])
    w = m * per_token['weight']
    return {'loss': jnp.sum(w * ce), 'weight': jnp.sum(w), 'tokens': jnp.sum(m), 'ce': jnp.sum(m * ce)}

  sums = sum_over_tokens(chunk_sums, head, x_BTD, {'target': targets, 'weight': weight}, weight > 0, chunk, parts, of='loss')
  return sums | {'weight': jax.lax.stop_gradient(sums['weight'])}
