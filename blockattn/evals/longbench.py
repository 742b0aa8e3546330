"""LongBench v1: its 21 tasks as items of blocks, and their scores (arXiv 2308.14508).

Prompts, lengths of answers, truncation, chat template or none, and scores are the published ones; what is added is where a
context is cut into blocks. Joined, header, blocks and question are the published prompt, byte for byte:

  multi_news, hotpotqa, 2wikimqa, musique, dureader     a block per passage
  passage_count, passage_retrieval_*                    a block per paragraph
  trec, triviaqa, samsum, lsht                          a block per solved example
  the others, and a context without two such headings   as the segmenter cuts

What a prompt's template says before the context is the header; what it says behind it is the question.

Differences from the published code, none of which moves a score but by accident: it generates with each model's own chat
format, ours with the tokenizer's template; truncation never writes a broken character (see `truncate`); in samsum it
forbids a line end as the first token and stops at later ones, ours goes on and the score takes the first line.

Data are JSON lines as published, {"input", "context", "answers", "length", "dataset", "language", "all_classes", "_id"}, in
a folder (TASK.jsonl, or data/TASK.jsonl), in the published data.zip, or on the hub. Tasks of LongBench-E are called
TASK_e; their items are also averaged by length, in the published ranges.
"""

import dataclasses
import functools
import itertools
import json
import os
import pathlib
import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from blockattn import hub
from blockattn.data import chat_template, json_lines
from blockattn.data.example import Example, cut_texts, pieces
from blockattn.errors import UserError
from blockattn.evals import answers, scores

ASSETS = pathlib.Path(__file__).resolve().parents[1] / 'assets' / 'longbench'
ARCHIVE = 'data.zip'   # on the hub and in its folder

Cut = Callable[[Sequence[str]], list[list[tuple[int, int]]]]   # texts -> (start, stop) of the blocks of each


@dataclasses.dataclass(frozen=True)
class Task:
  """What the published code says of a task, and where we cut."""
  category: str   # the published group of tasks
  score: Callable[..., float]   # see `scores`
  heading: str = ''   # a regular expression that begins a block; '' where the segmenter cuts
  chat: bool = True   # a chat model gets its template
  first_line: bool = False   # only the first line of an answer is scored
  language: str = 'en'   # 'en', 'zh'; code counts in both


_PASSAGE, _PARAGRAPH = r'^Passage \d+:', r'^Paragraph \d+:'
_SHOTS = {'category': 'few-shot', 'chat': False, 'first_line': True}
TASKS = {
    'narrativeqa': Task('single-document QA', scores.qa_f1),
    'qasper': Task('single-document QA', scores.qa_f1),
    'multifieldqa_en': Task('single-document QA', scores.qa_f1),
    'multifieldqa_zh': Task('single-document QA', scores.qa_f1_zh, language='zh'),
    'hotpotqa': Task('multi-document QA', scores.qa_f1, _PASSAGE),
    '2wikimqa': Task('multi-document QA', scores.qa_f1, _PASSAGE),
    'musique': Task('multi-document QA', scores.qa_f1, _PASSAGE),
    'dureader': Task('multi-document QA', scores.rouge_l_zh, r'^文章\s*\d+', language='zh'),
    'gov_report': Task('summarization', scores.rouge_l),
    'qmsum': Task('summarization', scores.rouge_l),
    'multi_news': Task('summarization', scores.rouge_l, _PASSAGE),
    'vcsum': Task('summarization', scores.rouge_l_zh, language='zh'),
    'trec': Task(score=scores.classification, heading=r'^Question:', **_SHOTS),
    'triviaqa': Task(score=scores.qa_f1, heading=r'^Passage:', **_SHOTS),
    'samsum': Task(score=scores.rouge_l, heading=r'^Dialogue:', **_SHOTS),
    'lsht': Task(score=scores.classification, heading=r'^新闻(内容)?[:：]', language='zh', **_SHOTS),
    'passage_count': Task('synthetic', scores.count, _PARAGRAPH),
    'passage_retrieval_en': Task('synthetic', scores.retrieval, _PARAGRAPH),
    'passage_retrieval_zh': Task('synthetic', scores.retrieval_zh, r'^段落\s*\d+', language='zh'),
    'lcc': Task('code', scores.code_similarity, chat=False, language='code'),
    'repobench-p': Task('code', scores.code_similarity, chat=False, language='code'),
}
EVEN = '_e'   # behind a task's name: of LongBench-E
EVEN_TASKS = tuple(task + EVEN for task in (
    'qasper', 'multifieldqa_en', 'hotpotqa', '2wikimqa', 'gov_report', 'multi_news', 'trec', 'triviaqa', 'samsum',
    'passage_count', 'passage_retrieval_en', 'lcc', 'repobench-p'))
_RANGES = ((4000, '0-4k'), (8000, '4-8k'), (float('inf'), '8k+'))   # below so many words


def task_of(name: str) -> Task:
  """The task of that name, of LongBench or LongBench-E; ValueError, with a list of them, if there is none."""
  if name not in TASKS and name not in EVEN_TASKS:
    raise UserError(f'LongBench has no task {name!r}; it has {", ".join(TASKS)}; LongBench-E has {", ".join(EVEN_TASKS)}')
  return TASKS[name.removesuffix(EVEN)]


# Data.

@dataclasses.dataclass(frozen=True)
class Record:
  """A line of the published data; `where` is 'file:line'."""
  id: str
  input: str
  context: str
  answers: tuple[str, ...]
  length: int
  classes: tuple[str, ...]
  where: str


def read_records(data: str | os.PathLike, task: str, limit: int | None = None) -> list[Record]:
  """The published lines of a task, at most `limit`, in a folder, a zip file, or on the hub ('THUDM/LongBench', also with
  '@revision'). Raises FileNotFoundError: no such place, or no such task there; json_lines.BadLineError: a line is not of the
  published form: a benchmark that lacks a line is another one."""
  task_of(task)
  return [_record(line, where) for where, line in itertools.islice(_lines(data, task), limit)]


def _lines(data, task) -> Iterator[tuple[tuple[str, int], bytes]]:
  """((file, number), line) of a task."""
  place = pathlib.Path(data).expanduser()
  if place.is_dir():
    folders = (place, place / 'data')
    for path in (folder / f'{task}.jsonl' for folder in folders):
      if path.is_file():
        yield from (((str(path), number), line) for number, line in json_lines.numbered_lines(str(path)))
        return
    if not (place / ARCHIVE).is_file():
      there = sorted({path.stem for folder in folders for path in folder.glob('*.jsonl')} & {*TASKS, *EVEN_TASKS})
      raise FileNotFoundError(f'{place}: no {task}.jsonl, data/{task}.jsonl or {ARCHIVE} in this folder; '
                              + (f'judge what is there with --tasks {" ".join(there)}' if there else
                                 'give the folder of the published files, or the name of the data on the hub'))
    place = place / ARCHIVE
  yield from _zipped_lines(place if place.is_file() else _download(data), task)


def _zipped_lines(archive, task):
  try:
    with zipfile.ZipFile(archive) as file:
      name = next((name for name in file.namelist() if name.split('/')[-1] == f'{task}.jsonl'), None)
      if name is None:
        raise FileNotFoundError(f'{archive}: no {task}.jsonl in it; name the tasks that are there with --tasks')
      with file.open(name) as stream:
        yield from (((f'{archive}/{name}', number), line) for number, line in enumerate(stream, start=1) if line.strip())
  except zipfile.BadZipFile as error:
    raise UserError(f'{archive}: no zip file, or a damaged one ({error}); fetch it again') from error


def _download(name):
  if not hub.is_name(name):
    raise FileNotFoundError(f'{name}: no folder and no zip file, and no name on the hub (owner/dataset) either')
  archive = hub.fetch(name, [ARCHIVE], 'dataset') / ARCHIVE
  if not archive.is_file():
    raise FileNotFoundError(f'{name}: no {ARCHIVE} in this dataset of the hub; name the one that has the published files')
  return archive


def _record(line, where):
  try:
    record = json_lines.load_object(line)
    # Texts from PDF files may hold anything; only what is no text at all is refused.
    get = functools.partial(json_lines.get_value, record)
    name, asked, context = get('_id', str), get('input', str), get('context', str)
    accepted, length, classes = get('answers', list), get('length', int), record.get('all_classes')
    for i, answer in enumerate(accepted):
      if not isinstance(answer, str):
        raise json_lines.Malformed('wrong type', f'"answers"[{i}] is {type(answer).__name__}, not str')
    if classes is not None and not isinstance(classes, list):
      raise json_lines.Malformed('wrong type', f'"all_classes" is {type(classes).__name__}, not list or null')
    # Half surrogates, which no tokenizer takes, go.
    asked, context = (said.encode('utf-8', 'replace').decode() for said in (asked, context))
    return Record(name, asked, context, tuple(accepted), length, tuple(classes or ()), f'{where[0]}:{where[1]}')
  except json_lines.Malformed as error:
    raise json_lines.BadLineError(json_lines.BadLine(where[0], where[1], error.reason, error.detail)) from error


# Prompts.

def load_prompts() -> tuple[dict[str, str], dict[str, int]]:
  """(template, most tokens of an answer) of every task, as published."""
  return tuple(json.loads((ASSETS / name).read_text(encoding='utf-8'))
               for name in ('dataset2prompt.json', 'dataset2maxlen.json'))


@dataclasses.dataclass(frozen=True)
class Prompt:
  """A prompt in pieces; joined, it is what the model reads, but for a chat template."""
  before: str   # with context and after: of the template, see `truncate` for what is left of them
  context: str
  after: str
  seam: int = 0   # where in the context its middle was left out; 0 where nothing was


def truncate(prompt: Prompt, tokenizer: Any, most: int) -> Prompt:
  """Leaves out the middle of a prompt that has more than `most` tokens: int(most / 2) of them stay at each end.

  Tokens are counted as published, with those that the tokenizer puts around a text by itself. The published code decodes
  the two halves, so that a character whose bytes fall apart there becomes two marks of a broken one; here it stays whole.
  """
  whole = prompt.before + prompt.context + prompt.after
  spans = tokenizer(whole, return_offsets_mapping=True)['offset_mapping']
  if len(spans) <= most:
    return prompt
  half = int(most / 2)
  if half < 1:
    raise UserError(f'--max-length {most}: a truncated prompt keeps half of that at each end; give at least 2')
  # Tokens around the text have empty spans.
  head = max(stop for _, stop in spans[:half])
  tail = min((start for start, stop in spans[-half:] if stop > start), default=len(whole))
  tail = max(head, tail)
  starts = (len(prompt.before), len(prompt.before) + len(prompt.context))
  # If the question is longer than what stays at the end, what stays of its beginning counts as context.
  before, first = whole[:min(head, starts[0])], whole[min(head, starts[0]):head]
  last, after = whole[tail:max(tail, starts[1])], whole[max(tail, starts[1]):]
  return Prompt(before, first + last, after, seam=len(first))


def cut_at_headings(context: str, heading: str) -> list[int]:
  """Offsets > 0 at which a line begins with the heading; [] if fewer than two lines do."""
  found = [match.start() for match in re.finditer(heading, context, re.MULTILINE)] if heading else []
  return [start for start in found if start] if len(found) > 1 else []


def cut_prompts(prompts: Sequence[Prompt], heading: str, cut: Cut | None) -> list[tuple[tuple[str, ...], tuple[int, ...]]]:
  """Texts of the blocks of each prompt's context, and the numbers of those that go on with the one before; none is empty.
  Joined they are the context. What lacks headings is cut by `cut`; None: it is one block, or two where its middle was left
  out, which are texts of their own."""
  headings = [cut_at_headings(prompt.context, heading) for prompt in prompts]
  texts = [pieces(prompt.context, (*own, prompt.seam)) for own, prompt in zip(headings, prompts)]
  bare = [text for own, some in zip(headings, texts) if not own for text in some]
  spans = iter(cut(bare) if cut is not None and bare else [()] * len(bare))
  starts = lambda own, some: [() if own else [start for start, _ in next(spans)] for _ in some]
  return [cut_texts(some, starts(own, some)) for own, some in zip(headings, texts)]


def make_items(task: str, records: Sequence[Record], tokenizer: Any, *, cut: Cut | None, chat: bool,
               max_length: int | None) -> list[answers.Item]:
  """The items of a task.

  Args:
    tokenizer: a transformers tokenizer, with a chat template if `chat`.
    cut: see `cut_prompts`.
    chat: put the chat template around prompts, in the tasks that are published so.
    max_length: most tokens of a prompt before the chat template; None: any number.

  Raises json_lines.BadLineError: a chat template that cannot take a prompt."""
  known = task_of(task)
  templates, lengths = load_prompts()
  name = task.removesuffix(EVEN)
  before, after = templates[name].split('{context}')
  prompts = [Prompt(before, record.context, after.format(input=record.input)) for record in records]
  if max_length is not None:
    prompts = [truncate(prompt, tokenizer, max_length) for prompt in prompts]
  items = []
  for record, prompt, (blocks, continued) in zip(records, prompts, cut_prompts(prompts, known.heading, cut)):
    example = Example(tuple(blocks), prompt.after, '', record.id, record.answers, header=prompt.before, continued=continued)
    if chat and known.chat:
      try:
        example = chat_template.wrap_in_turn(example, tokenizer)
      except json_lines.Malformed as error:
        file, _, number = record.where.rpartition(':')
        raise json_lines.BadLineError(json_lines.BadLine(file, int(number), error.reason, error.detail)) from error
    part = next(part for below, part in _RANGES if record.length < below) if task.endswith(EVEN) else ''
    items.append(answers.Item(f'{task}:{record.id}', task, example, lengths[name], references=record.answers, part=part,
                              facts={'classes': record.classes}))
  return items


# Scores.

def score(item: answers.Item, prediction: str) -> dict[str, float]:
  """{'score'}: the best over the accepted answers, at least 0."""
  task = task_of(item.task)
  if task.first_line:
    prediction = prediction.lstrip('\n').split('\n')[0]
  return {'score': max([0.0, *(task.score(prediction, right, item.facts['classes']) for right in item.references)])}


def averages(tasks: Sequence[str]) -> answers.Averages:
  """The published averages that these tasks allow, in the names of their tasks.

  A category is the mean over its tasks; 'english' and 'chinese' are means over the six categories, code counting in both;
  'macro' is the mean over all of `tasks`.
  """
  macro = {}
  for language, name in (('en', 'english'), ('zh', 'chinese')):
    groups = {}
    for task, known in TASKS.items():
      if known.language in (language, 'code'):
        groups.setdefault(known.category, []).append(task)
    macro |= {name: list(groups.values())} | {f'{name} {category}': [own] for category, own in groups.items()}
  return answers.Averages(macro=macro | {'macro': [[task] for task in tasks]})
