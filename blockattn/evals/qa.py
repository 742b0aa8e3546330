"""Questions with short answers over given blocks: any file of the forms of blockattn.data.prompts.

Scores are those of SQuAD and open-domain question answering, after SQuAD's normalisation, the best over the accepted
answers: exact match, whether an answer stands in the prediction, and F1 of the bags of words.

An accepted answer of which nothing is left by the normalisation ('The', '?!') stands in a prediction of which nothing is
left either, and in no other. That is where `substring` differs from `best_subspan_em` of Lost in the Middle, which gives
such an answer to every prediction.
"""

import itertools
import os
from collections.abc import Sequence
from typing import Any

from blockattn.data import json_lines, prompts, tables
from blockattn.errors import UserError
from blockattn.evals import answers, scores

STOP = ('\n',)   # without a chat template a model goes on with questions of its own


def task_of(file: str) -> str:
  """The task that a file's questions make: its name without what says the form."""
  name = os.path.basename(file)
  return next((name.removesuffix(suffix) for suffix in tables.SUFFIXES if name.endswith(suffix)), name)


def read_items(files: Sequence[str], tokenizer: Any, *, chat: bool, max_new: int, stop: tuple[str, ...],
               tasks: Sequence[str] | None = None, limit: int | None = None, strict: bool = False,
               ) -> tuple[list[answers.Item], json_lines.Report]:
  """The questions of files, a task per file.

  Args:
    files: as of tables.find_files.
    tokenizer: of the model; its chat template is put around prompts if `chat`.
    tasks: names of those to read; None: all.
    limit: most questions per task, from its beginning.
    strict: raise json_lines.BadLineError at the first malformed line instead of counting it.

  Raises ValueError: a task of `tasks` is not there, or two files have one name."""
  found: dict[str, str] = {}
  for file in files:
    task = task_of(file)
    if task in found:
      raise UserError(f'{found[task]} and {file} have the same name, which is that of their task; rename one')
    found[task] = file
  unknown = sorted(set(tasks or ()) - set(found))
  if unknown:
    raise UserError(f'no task {", ".join(unknown)} here; there are {", ".join(found)}')
  report, items = json_lines.Report(), []
  for task, file in found.items():
    if tasks is None or task in tasks:
      lines = prompts.read_examples(file, report=report, strict=strict, chat=chat, tokenizer=tokenizer)
      # A line without an id is named by file and number; the folder does not matter.
      items += [answers.Item(f'{task}:{example.id.removeprefix(file).removeprefix(":")}', task, example, max_new, stop,
                             example.answers or (example.response,)) for example in itertools.islice(lines, limit)]
  return items, report


def score(item: answers.Item, prediction: str) -> dict[str, float]:
  """{'exact_match', 'substring', 'f1'}, each the best over the references."""
  return scores.score(prediction, item.references) | {
      'exact_match': scores.normalized_match(prediction, item.references)}
