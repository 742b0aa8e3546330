"""On-policy distillation: in some rows, what the student itself answers stands where the answer stood.

A student that is taught on given answers never sees where its own would lead it. Here the answers of some rows are replaced
by what the student now generates for their prompts in block mode, through `inference.engine` with its cached blocks; the
teacher then says in full attention what it would have said there, in the same step as always: the batch has other tokens,
and nothing else is new. No gradient goes through the choice of the tokens (GKD, arXiv 2306.13649).

What a step generates is a function of the parameters, the batch and the number of the step, so that a run that is
stopped goes on as if it had not been. An answer keeps at most the room that the given one had; behind its end nothing is
learned.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from blockattn import blocks as blocks_lib, errors
from blockattn.errors import UserError
from blockattn.inference import engine as engine_lib, pool
from blockattn.inference.plan import Request
from blockattn.models import transformer

MOST_REQUESTS = 64   # answered together


@dataclasses.dataclass(frozen=True)
class OnPolicyOptions:
  """
  Attributes:
    share: of the rows whose answers are the student's own; 0: none
    max_new: most tokens of such an answer, which has no more room than the given one
    temperature: of its tokens; 0: always the most probable one
    every: in one of so many steps, the others train on what is given; generating takes time
  """
  share: float = 0.0
  max_new: int = 128
  temperature: float = 1.0
  every: int = 1

  def __post_init__(self):
    errors.check_number('config.distill.on_policy.share', self.share, 0, 1)
    errors.check_number('config.distill.on_policy.max_new', self.max_new, 1)
    errors.check_number('config.distill.on_policy.temperature', self.temperature, 0)
    errors.check_number('config.distill.on_policy.every', self.every, 1)


@dataclasses.dataclass(frozen=True)
class Asked:
  """A document with an answer: its row and its tokens start ... stop there, of which the answer is first ... end.

  Attributes:
    prompt: token ids of each context block and, last, of the question, as `plan.Request` has them; `Continued` of a block
      that goes on.
  """
  row: int
  start: int
  stop: int
  first: int
  end: int
  prompt: tuple[Sequence[int], ...]


def asked_in(batch: Mapping[str, Any], rows: Sequence[int]) -> list[Asked]:
  """The documents in these rows of a host batch that have an answer, and a question in front of it."""
  found = []
  for row in rows:
    tokens, loss, doc, block, continued = (np.asarray(x)[row] for x in (
        batch['tokens'], batch['loss'], batch['layout'].doc, batch['layout'].block, batch['continued']))
    for number in range(1, int(doc.max(initial=0)) + 1):
      own = np.flatnonzero(doc == number)
      predicting = own[loss[own]]
      if not len(predicting):
        continue
      # A token of the answer stands behind the one that predicts it.
      first, end = int(predicting[0]) + 1, int(predicting[-1]) + 2
      before = np.arange(own[0], first)
      cuts = np.flatnonzero(np.diff(block[before])) + 1
      if block[first - 1] == block[first]:
        prompt = tuple((blocks_lib.Continued if continued[part[0]] else list)(tokens[part].tolist())
                       for part in np.split(before, cuts))
        found.append(Asked(row, int(own[0]), int(own[-1]) + 1, first, end, prompt))
  return found


def with_answers(batch: Mapping[str, Any], documents: Sequence[Asked], answers: Sequence[engine_lib.Answer]) -> dict:
  """A copy of a host batch with these answers in place of those given.

  Behind an answer that ended stands the document's own last token of the answer, an end of text. What follows it in the
  document, as far as the room goes that was there, predicts nothing.
  """
  new = {name: np.array(batch[name]) for name in ('tokens', 'targets', 'loss', 'text')}
  for one, answer in zip(documents, answers, strict=True):
    tokens, targets, loss, text = (new[name][one.row] for name in ('tokens', 'targets', 'loss', 'text'))
    room, last_token = one.end - one.first, tokens[one.end - 1]
    said = [*answer.tokens, *([last_token] if answer.ended == 'token' else [])][:room]
    end = one.first + len(said)
    tokens[one.first:one.stop] = last_token   # nobody reads what is left of it
    tokens[one.first:end] = said
    targets[one.first - 1:one.stop], loss[one.first - 1:one.stop], text[one.first - 1:one.stop] = 0, False, False
    targets[one.first - 1:end - 1] = tokens[one.first:end]
    loss[one.first - 1:end - 1] = text[one.first - 1:end - 1] = True
  return {**batch, **new}


def chosen_rows(options: OnPolicyOptions, seed: int, step: int, rows: int) -> list[int]:
  """Those of a batch's rows that are on-policy in the step after so many."""
  if step % options.every:
    return []
  return np.flatnonzero(np.random.default_rng((seed, step)).random(rows) < options.share).tolist()


def rewritten(params: Any, batch: Mapping[str, Any], step: int, *, options: OnPolicyOptions, seed: int,
              engine: Callable[[Any], engine_lib.Engine]) -> tuple[dict, dict[str, float]]:
  """A host batch with the student's own answers in some of its rows.

  Args:
    params: what is trained, as it is now.
    batch: all rows of the global batch.
    step: finished steps.
    engine: params -> what answers; made anew for every step that asks, for states of older parameters are of no use.

  Returns:
    (batch, {'on_policy_s': seconds that it took, 'on_policy_tokens': that were generated}).
  """
  begin = time.perf_counter()
  documents = asked_in(batch, chosen_rows(options, seed, step, len(batch['tokens'])))
  if not documents:
    return dict(batch), {'on_policy_s': 0.0, 'on_policy_tokens': 0.0}
  # A seed for each document, far from those of the steps around.
  seeds = np.random.default_rng((seed, step, 1)).integers(2 ** 32, size=len(documents)).tolist()
  answers = engine(params).generate([
      Request(one.prompt, max_new=min(options.max_new, one.end - one.first), temperature=options.temperature, seed=own)
      for one, own in zip(documents, seeds, strict=True)])
  made = with_answers(batch, documents, answers)
  return made, {'on_policy_s': time.perf_counter() - begin,
                'on_policy_tokens': float(sum(len(answer.tokens) for answer in answers))}


def engine_maker(cfg: transformer.ModelConfig, compute: transformer.Compute, form: blocks_lib.BlockOptions, tokenizer: Any,
                 stop_ids: Sequence[int], *, length: int, rows: int,
                 attach: Callable[[Any], Any] | None = None) -> Callable[[Any], engine_lib.Engine]:
  """What `rewritten` asks for, on the first device, whose parameters are taken as they are if they stand there whole.

  Args:
    cfg, compute, form: the student.
    stop_ids: tokens that end an answer.
    length: T.
    rows: whose blocks have room in memory together.
    attach: what is trained -> the student's parameters; None: the same.
  """
  padded = blocks_lib.padded_length(length, form)
  # Positions that training reads are no reason to refuse a prompt.
  cfg = dataclasses.replace(cfg, max_positions=max(cfg.max_positions, padded))
  compute = dataclasses.replace(compute, placement=None, remat='none')
  room = rows * (padded + form.max_blocks * pool.PAGE)   # a block takes whole pages
  return lambda params: engine_lib.Engine(params if attach is None else attach(params), cfg, compute, form, tokenizer,
                                          stop_ids=stop_ids, device_tokens=room, batch=MOST_REQUESTS)


def check(options: OnPolicyOptions, form: blocks_lib.BlockOptions):
  """Raises ValueError where answers cannot be generated: states that cannot be used twice, or several processes."""
  if not options.share:
    return
  blocks_lib.check_cacheable(form)
  if jax.process_count() > 1:
    raise UserError(f'config.distill.on_policy.share={options.share} generates in one process, and this run has '
                    f'{jax.process_count()}; train in one, or set it to 0')
