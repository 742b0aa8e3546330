"""Token losses over chunks: the logits of a whole row never exist.

The hidden states of the loss tokens are moved to the front of each row, and a scan multiplies `chunk` of them at a time
by the head, inside the jitted step; chunks without a loss token are skipped at run time, and the backward pass computes
each chunk's logits again. Peak memory is B * chunk * V instead of B * T * V, and the work is proportional to the
number of loss tokens.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from blockattn.errors import UserError

WEIGHT_FORMS = ('relu', 'exp', 'none')
GAP_SOURCES = ('student', 'teacher')
POSITION_BINS = 8      # of the KL by position: the last is the second half of a row, the one before it the quarter before
_LEAST_REST = 1e-6


@dataclasses.dataclass(frozen=True)
class TokenWeights:
  """How much a token counts, by gap = log p_teacher(x | full) - log p(x | block), arXiv 2605.15913 (our reading).

  Attributes:
    form: 'relu': floor + clip(gap, 0, cap). 'exp': exp(min(gap, cap)). 'none': 1.
    source: whose block-mode probability: the 'student' as it is now, or the frozen 'teacher' under the block mask.
    floor: of 'relu'.
    cap: of the gap, in nats.
  """
  form: str = 'relu'
  source: str = 'student'
  floor: float = 0.1
  cap: float = 5.0

  def __post_init__(self):
    if self.form not in WEIGHT_FORMS:
      raise UserError(f'token weight form {self.form!r}; choose one of {", ".join(WEIGHT_FORMS)}')
    if self.source not in GAP_SOURCES:
      raise UserError(f'token weight source {self.source!r}; choose one of {", ".join(GAP_SOURCES)}')


def token_weight(gap, weights: TokenWeights):
  """The weight of each token before normalisation; no gradient."""
  gap = jax.lax.stop_gradient(gap)
  if weights.form == 'relu':
    return weights.floor + jnp.clip(gap, 0.0, weights.cap)
  if weights.form == 'exp':
    return jnp.exp(jnp.minimum(gap, weights.cap))
  return jnp.ones_like(gap)


def forward_kl(teacher_logits, student_logits, temperature: float):
  """KL(p_teacher || p_student) of each token, both at `temperature`, in nats: [..., V] -> [...]."""
  log_p = jax.nn.log_softmax(teacher_logits / temperature)
  log_q = jax.nn.log_softmax(student_logits / temperature)
  return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def forward_kl_of_top(top_log_p, top_ids, student_logits, temperature: float):
  """A lower bound on `forward_kl` from a teacher's K likeliest tokens: all others count as one token, "the rest".

  Joining outcomes can only lower a KL divergence (data-processing inequality); it is exact where the student spreads the
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
  p = jnp.exp(top_log_p)
  p_rest = jnp.maximum(1 - jnp.sum(p, axis=-1), 0)
  # Where K tokens hold all of the student's mass, rounding would leave the rest a log of 0 or of less.
  q_rest = jnp.maximum(1 - jnp.sum(jnp.exp(log_q), axis=-1), _LEAST_REST)
  return jnp.sum(p * (top_log_p - log_q), axis=-1) + jax.scipy.special.xlogy(p_rest, p_rest) - p_rest * jnp.log(q_rest)


def log_prob(logits, targets):
  """log p(target) of each token: [..., V], [...] -> [...]."""
  picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  return picked - jax.nn.logsumexp(logits, axis=-1)


def sum_over_tokens(token_fn, heads, hidden, per_token, mask, chunk: int, parts: int = 1):
  """Sums `token_fn` over the tokens where `mask` holds, `chunk` tokens of each row at a time.

  Args:
    token_fn: (heads, hidden, per_token, mask) of one chunk, arrays [B, chunk, ...] -> pytree of float32 scalars.
    heads: pytree of whatever token_fn needs whole (the output matrices); differentiable.
    hidden: pytree of [B, T, D]; differentiable.
    per_token: pytree of [B, T], not differentiable.
    mask: bool [B, T].
    chunk: static number of tokens per row and chunk.
    parts: of a row that are on different devices: each gathers and sums its own tokens.

  Returns:
    The pytree of sums.
  """
  hidden, per_token, mask = jax.tree.map(functools.partial(_cut_rows, parts=parts), (hidden, per_token, mask))
  chunk = min(chunk, mask.shape[1])
  # Loss tokens first; a stable sort keeps their order, so that nothing depends on the sort's whims.
  order = jnp.argsort(~mask, axis=1, stable=True)
  hidden, per_token, mask = jax.tree.map(functools.partial(_gather_chunks, order=order, chunk=chunk),
                                         (hidden, per_token, mask))
  shapes = jax.eval_shape(token_fn, heads, *jax.tree.map(lambda x: x[0], (hidden, per_token, mask)))
  zeros = lambda: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

  # The checkpoint is around the cond: what a cond saves for its backward pass is saved once per chunk, heads included.
  @functools.partial(jax.checkpoint, prevent_cse=False)
  def one_chunk(heads, x):
    return jax.lax.cond(jnp.any(x[2]), lambda: token_fn(heads, *x), zeros)

  def add(total, x):
    return jax.tree.map(jnp.add, total, one_chunk(heads, x)), None

  return jax.lax.scan(add, zeros(), (hidden, per_token, mask))[0]


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


def map_chunks(fn, tree, chunk: int):
  """fn of `chunk` tokens of each row at a time: arrays [B, T, ...] -> arrays [B, T, ...]; fn sees [B, chunk, ...]."""
  rows, length = jax.tree.leaves(tree)[0].shape[:2]
  chunk = min(chunk, length)
  cut = lambda x: jnp.moveaxis(jnp.pad(x, [(0, 0), (0, -length % chunk)] + [(0, 0)] * (x.ndim - 2)).reshape(
      rows, -1, chunk, *x.shape[2:]), 1, 0)
  join = lambda x: jnp.moveaxis(x, 0, 1).reshape(rows, -1, *x.shape[3:])[:, :length]
  return jax.tree.map(join, jax.lax.map(fn, jax.tree.map(cut, tree)))


def distillation_sums(heads, hidden, per_token, mask, *, weights: TokenWeights, temperature: float,
                      ce_weight: float, chunk: int, parts: int = 1):
  """The distillation loss as sums: loss = sums['loss'] / sums['weight'].

  loss = sum_t m_t w_t [ temperature^2 KL(p_T || p_S)_t + ce_weight * CE_t ] / sum_t m_t w_t. The weights carry no gradient.
  The KL's gradient shrinks as 1 / temperature^2, so the factor (Hinton et al., arXiv 1503.02531) keeps it as large as
  it is at temperature 1, and ce_weight means the same at every temperature.

  The teacher is a model at work, 'teacher' in `heads` and `hidden`, or what is stored of one, 'teacher' in `per_token`.

  Args:
    heads: {'student', 'teacher': function from hidden states to float32 logits, such as jax.tree_util.Partial}.
    hidden: {'student': x_BTD, 'teacher': x_BTD, 'teacher_block': x_BTD} on text tokens; the last only where
      weights.source is 'teacher'.
    per_token: {'target': int32 [B, T], the token that each position predicts, 'position': int32 [B, T], in its document,
      'teacher': the arrays of data.taught.TaughtRows, of B rows}.
    mask: bool [B, T], the loss tokens m.
    parts: see `sum_over_tokens`.

  Returns:
    {'loss', 'weight', 'weight_sq', 'at_floor', 'at_cap', 'tokens', 'kl', 'ce', 'teacher_ce', 'gap'}: float32 scalars, each
    a sum over the loss tokens, `kl` and the rest unweighted, `at_floor` and `at_cap` the tokens whose gap is outside of
    0 ... cap; 'kl_at', 'tokens_at' [POSITION_BINS]: sums over the tokens of each bin, see `position_bin`.
  """
  length = mask.shape[1]

  def chunk_sums(heads, hidden, per_token, mask):
    m, targets = mask.astype(jnp.float32), per_token['target']
    student = heads['student'](hidden['student'])
    if 'teacher' in per_token:
      stored = per_token['teacher']
      kl = forward_kl_of_top(stored['log_p'], stored['ids'], student, temperature)
      log_q, log_p = log_prob(student, targets), stored['target_log_p']
      blocked = stored['blocked_log_p'] if weights.source == 'teacher' else log_q
    else:
      teacher = jax.lax.stop_gradient(heads['teacher'](hidden['teacher']))
      student, teacher = common_vocabulary(student, teacher)
      kl = forward_kl(teacher, student, temperature)
      log_q, log_p = log_prob(student, targets), log_prob(teacher, targets)
      blocked = log_q
      if weights.source == 'teacher':
        teacher_block = heads['teacher'](hidden['teacher_block'])
        blocked = log_prob(common_vocabulary(teacher_block, teacher)[0], targets)
    gap = jax.lax.stop_gradient(log_p - blocked)
    w = m * token_weight(gap, weights)
    at = m[..., None] * jax.nn.one_hot(position_bin(per_token['position'], length), POSITION_BINS)
    return {'loss': jnp.sum(w * (temperature ** 2 * kl - ce_weight * log_q)),
            'weight': jnp.sum(w), 'weight_sq': jnp.sum(w * w),
            'at_floor': jnp.sum(m, where=gap <= 0), 'at_cap': jnp.sum(m, where=gap >= weights.cap),
            'tokens': jnp.sum(m), 'kl': jnp.sum(m * kl), 'ce': -jnp.sum(m * log_q),
            'teacher_ce': -jnp.sum(m * log_p), 'gap': jnp.sum(m * gap),
            'kl_at': jnp.sum(kl[..., None] * at, axis=(0, 1)), 'tokens_at': jnp.sum(at, axis=(0, 1))}

  return sum_over_tokens(chunk_sums, heads, hidden, per_token, mask, chunk, parts)


def position_bin(position, length: int):
  """Bin of a position in its document: the last is length/2 and beyond, each before it half as wide, the first the rest."""
  edges = [-(-length // 2 ** i) for i in range(POSITION_BINS - 1, 0, -1)]
  return sum((position >= edge).astype(jnp.int32) for edge in edges)


def common_vocabulary(a, b):
  """Teacher and student may be padded to different sizes; both predict the smaller vocabulary."""
  size = min(a.shape[-1], b.shape[-1])
  return a[..., :size], b[..., :size]


def cross_entropy_sums(head, x_BTD, targets, weight, chunk: int, parts: int = 1):
  """Weighted cross-entropy as sums: loss = sums['loss'] / sums['weight'].

  Args:
    head: function from hidden states to float32 logits, such as jax.tree_util.Partial.
    weight: float32 [B, T] >= 0; tokens of weight 0 cost nothing.
    parts: see `sum_over_tokens`.

  Returns:
    {'loss', 'weight', 'tokens', 'ce'}: float32 scalars; `ce` is the unweighted sum over the `tokens` of weight > 0.
  """
  def chunk_sums(head, hidden, per_token, mask):
    m = mask.astype(jnp.float32)
    ce = -log_prob(head(hidden), per_token['target'])
    w = m * per_token['weight']
    return {'loss': jnp.sum(w * ce), 'weight': jnp.sum(w), 'tokens': jnp.sum(m), 'ce': jnp.sum(m * ce)}

  return sum_over_tokens(chunk_sums, head, x_BTD, {'target': targets, 'weight': weight}, weight > 0, chunk, parts)
