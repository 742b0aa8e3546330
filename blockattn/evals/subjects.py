"""What is compared: a student in its modes, and its teacher."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

from blockattn import loading
from blockattn.errors import UserError
from blockattn.evals import gap
from blockattn.models import transformer

TEACHER, BEFORE, STUDENT = 'teacher_full', 'teacher_block', 'student_block'   # names of subjects


def load(path: str | os.PathLike, mode: str, compute: transformer.Compute, template_args: str | None = None,
         chat: bool | None = None) -> tuple[gap.Subject, Any]:
  """(a model to evaluate, its parameters in compute.dtype; its tokenizer).

  Args:
    mode: 'full' or 'block'; `dataclasses.replace(subject, mode=...)` gives the other without loading again.
    path, template_args, chat: see `loading.load`, and what it raises.
  """
  loaded = loading.load(path, compute.dtype, template_args=template_args, chat=chat)
  return gap.Subject(loaded.params, loaded.cfg, compute, mode, loaded.blocks, loaded.chat), loaded.tokenizer


def load_pair(model: str | os.PathLike, teacher: str | os.PathLike, modes: Sequence[str], compute: transformer.Compute,
              **prompts: Any) -> tuple[dict[str, gap.Subject], gap.Subject, Any]:
  """({name: Subject} of the teacher and of the student by mode, the teacher, the student's tokenizer).

  With block mode comes the teacher under the student's block mask, without sinks: it never saw one.

  Raises:
    ValueError: the two tokenizers differ, so that tokens of one mean nothing to the other.
  """
  teacher_subject, teacher_tokenizer = load(teacher, 'full', compute)
  student, tokenizer = load(model, 'block', compute, **prompts)
  ours = tokenizer.get_vocab()
  other = [text for text, i in teacher_tokenizer.get_vocab().items() if text not in ours or ours[text] != i]
  if other:
    raise UserError(f'{model} and {teacher} have different tokenizers: {len(other)} tokens of the teacher, first '
                    f'{other[0]!r}, are not the student\'s; name the teacher that the student was distilled from')
  subjects = {TEACHER: teacher_subject}
  if 'block' in modes:
    options = dataclasses.replace(student.options, sink_ids=())
    subjects[BEFORE] = dataclasses.replace(teacher_subject, mode='block', options=options)
  for mode in modes:
    subjects[f'student_{mode}'] = dataclasses.replace(student, mode=mode)
  return subjects, teacher_subject, tokenizer
