"""LoCoMo: questions about conversations of many sessions, a block per session (arXiv 2402.17753).

Data are the published locomo10.json, also gzipped: conversations of two people over months, with photographs that are
given by their captions, and questions of five categories. Scores are the published ones, number for number:

  multi-hop     gold and prediction split at commas; the mean over the gold parts of the best F1 of a predicted part
  temporal      F1
  open-domain   F1, of the gold answer what stands before its first ';'
  single-hop    F1
  adversarial   the answer is not in the conversation: 1 if the prediction says "no information available" or "not
                mentioned", else 0

F1 is over bags of Porter-stemmed words, without punctuation and the words a, an, the, and. 'overall' is the mean over all
questions, as the published code prints it; 'overall without adversarial' is what many report.

As published, temporal questions ask for an approximate date by the sessions' dates, and adversarial ones offer two
answers, (a) and (b), one of them that it is not mentioned; a bare letter as the answer stands for what it offers. The
wording is ours, the order of the two depends on the question's id instead of chance, and sessions follow each other in
time. Only the first line of an answer counts. Open models like to say more than the letter: with `letters` "anywhere" an
answer that holds one of (a) and (b) chooses it, "Answer: (a)" as well. What an LLM judge would say of the answers is not
measured.
"""

import dataclasses
import functools
import gzip
import os
import pathlib
import re
import string
import zlib
from collections.abc import Callable, Sequence
from typing import Any

from blockattn import disk, errors
from blockattn.data import chat_template
from blockattn.data.example import Example
from blockattn.errors import UserError
from blockattn.evals import answers, scores

FILES = ('locomo10.json', 'locomo10.json.gz')
CATEGORIES = {1: 'multi-hop', 2: 'temporal', 3: 'open-domain', 4: 'single-hop', 5: 'adversarial'}
LETTERS = ('alone', 'anywhere')   # where the (a) or (b) of an adversarial question is looked for; as published: alone
MAX_NEW = 50   # tokens, as published
ABSENT = 'Not mentioned in the conversation'
_REFUSALS = ('no information available', 'not mentioned')
_BEFORE = 'A conversation of {} and {} on several days. Every part begins with its date.\n\n'
_SESSION = 'Date: {}\n{}\n\n'
_TURN = '{}: {}\n'
_PHOTO = ' [shows {}]'
_QUESTION = ('Answer the question about the conversation above with a short phrase, in its own words where they fit.\n\n'
             'Question: {}\nShort answer:')
_CHOICE = 'Answer the question about the conversation above.\n\nQuestion: {}\nShort answer:'
_DATED = ' Answer with an approximate date, going by the date of the conversation.'
_OFFERED = ' Choose the right answer: (a) {} (b) {}.'


@dataclasses.dataclass(frozen=True)
class Conversation:
  """One conversation of the published data; `questions` are its published objects."""
  id: str
  speakers: tuple[str, str]
  dates: tuple[str, ...]
  sessions: tuple[str, ...]    # their turns, a line each
  questions: tuple[dict, ...]


def read_conversations(path: str | os.PathLike) -> list[Conversation]:
  """The conversations of the published file, or of the folder that holds it under its published name. Raises
  FileNotFoundError: there is none; ValueError: it is not of the published form; the message names file, conversation and
  key."""
  place = pathlib.Path(path).expanduser()
  file = next((place / name for name in FILES if (place / name).is_file()), place)
  if not file.is_file():
    raise FileNotFoundError(f'{place}: no {" or ".join(FILES)} here; give the published file or its folder')
  try:
    data = file.read_bytes()
    samples = disk.parse_json(gzip.decompress(data) if file.name.endswith('.gz') else data, str(file), object)
  except (ValueError, EOFError, gzip.BadGzipFile, zlib.error) as error:
    raise UserError(f'{file}: no JSON, or cut off ({error}); fetch the file again') from error
  if not isinstance(samples, list) or not samples:
    raise UserError(f'{file}: a list of conversations is needed, as in the published {FILES[0]}')
  return [_conversation(sample, f'{file}, conversation {i}') for i, sample in enumerate(samples)]


def _conversation(sample, where):
  try:
    name, said, asked = sample['sample_id'], sample['conversation'], sample['qa']
    numbers = sorted(int(match[1]) for match in map(re.compile(r'session_(\d+)').fullmatch, said) if match)
    numbers = [n for n in numbers if said[f'session_{n}']]   # the file has dates of sessions that it lacks
    photo = lambda turn: _PHOTO.format(turn['blip_caption']) if 'blip_caption' in turn else ''
    spoken = lambda turn: _TURN.format(turn['speaker'], turn['text'] + photo(turn))
    sessions = tuple(''.join(map(spoken, said[f'session_{n}'])) for n in numbers)
    dates = tuple(said[f'session_{n}_date_time'] for n in numbers)
    if not numbers:
      raise KeyError('session_1')
    for i, question in enumerate(asked):
      if question['category'] not in CATEGORIES:
        raise UserError(f'{where}, question {i}: category {question["category"]!r}, where 1 to 5 are known')
      if not isinstance(question['question'], str) or not {'answer', 'adversarial_answer'} & set(question):
        raise UserError(f'{where}, question {i}: lacks a question, or both "answer" and "adversarial_answer"')
    return Conversation(name, (said['speaker_a'], said['speaker_b']), dates, sessions, tuple(asked))
  except (KeyError, TypeError, AttributeError) as error:
    raise UserError(f'{where}: not of the published form ({type(error).__name__}: {error})') from error


def make_items(conversations: Sequence[Conversation], tokenizer: Any, *, chat: bool, tasks: Sequence[str] | None = None,
               limit: int | None = None, fits: Callable[..., bool] | None = None) -> list[answers.Item]:
  """The questions, a block per session.

  Args:
    tokenizer: with a chat template if `chat`, which is then put around prompts.
    tasks: names of categories; None: all.
    limit: most questions per category, spread over the conversations in their order.
    fits: of an Example, whether it is short enough; None: all are. The last sessions of a conversation are left out until
      it is, as the published code does; one that no session helps stays as it is.

  Raises ValueError: an unknown category."""
  unknown = sorted(set(tasks or ()) - set(CATEGORIES.values()))
  if unknown:
    raise UserError(f'LoCoMo has no category {", ".join(unknown)}; it has {", ".join(CATEGORIES.values())}')
  items, taken = [], dict.fromkeys(CATEGORIES.values(), 0)
  for conversation in conversations:
    for number, question in enumerate(conversation.questions):
      task = CATEGORIES[question['category']]
      if (tasks is None or task in tasks) and (limit is None or taken[task] < limit):
        taken[task] += 1
        items.append(_item(conversation, number, task, tokenizer, chat, fits))
  return items


def _item(conversation, number, task, tokenizer, chat, fits):
  question = conversation.questions[number]
  name, other = f'{conversation.id}/{number}', str(question['answer'] if 'answer' in question else
                                                   question['adversarial_answer'])
  asked, offered = _ask(name, question['question'], task, other)
  reference = ABSENT if task == 'adversarial' else other
  texts = [_SESSION.format(date, turns.rstrip('\n')) for date, turns in zip(conversation.dates, conversation.sessions)]

  def make(count):
    example = Example(tuple(texts[:count]), asked, '', name, (reference,), header=_BEFORE.format(*conversation.speakers))
    return chat_template.wrap_in_turn(example, tokenizer) if chat else example

  count = _most_sessions(make, len(texts), fits) if fits is not None else len(texts)
  return answers.Item(name, task, make(count), MAX_NEW, references=(reference,),
                      facts={'offered': offered, 'sessions_left_out': len(texts) - count})


def _most_sessions(make, count, fits):
  """By halves: a prompt grows with its sessions."""
  if fits(make(count)):
    return count
  low, high = 1, count
  while low < high - 1:
    middle = (low + high) // 2
    low, high = (middle, high) if fits(make(middle)) else (low, middle)
  return low


def _ask(name, asked, task, trap):
  """(the question's text, what '(a)' and '(b)' offer)."""
  if task == 'temporal':
    return _QUESTION.format(asked + _DATED), ()
  if task != 'adversarial':
    return _QUESTION.format(asked), ()
  offered = (ABSENT, trap) if zlib.crc32(name.encode()) % 2 else (trap, ABSENT)
  return _CHOICE.format(asked + _OFFERED.format(*offered)), offered


# Scores.

def score(item: answers.Item, prediction: str, letters: str = 'alone') -> dict[str, float]:
  """{'score'}, by the rule of the item's category; `letters`: of LETTERS."""
  said, gold = prediction.strip().split('\n')[0].strip(), item.references[0]
  if item.task == 'adversarial':
    said = chosen(said, item.facts['offered'], letters)
    return {'score': float(any(refusal in said.lower() for refusal in _REFUSALS))}
  if item.task == 'multi-hop':
    return {'score': multi_f1(said, gold)}
  return {'score': f1(said, gold.split(';')[0].strip() if item.task == 'open-domain' else gold)}


def chosen(said: str, offered: Sequence[str], letters: str = 'alone') -> str:
  """What a choice stands for: of one character, the first offer if that is an "a", else the second; of three characters
  the same with "(a)"; anything longer is itself, unless letters count 'anywhere' and it holds one of "(a)" and "(b)"."""
  said = said.strip().lower()
  if letters == 'anywhere' and ('(a)' in said) != ('(b)' in said):
    return offered['(b)' in said]
  if len(said) in (1, 3):
    return offered[0] if ('a' if len(said) == 1 else '(a)') in said else offered[1]
  return said


def multi_f1(prediction: str, answer: str) -> float:
  """Mean over the answer's parts between commas of the best F1 of a part of the prediction."""
  said, right = ([part.strip() for part in whole.split(',')] for whole in (prediction, answer))
  return sum(max(f1(s, r) for s in said) for r in right) / len(right)


def f1(prediction: str, answer: str) -> float:
  """F1 of the bags of stemmed words."""
  return scores.bag_f1(stems(prediction), stems(answer))


def stems(said: str) -> list[str]:
  said = ''.join(c for c in said.lower() if c not in string.punctuation)
  return [_stemmer().stem(word) for word in re.sub(r'\b(a|an|the|and)\b', ' ', said).split()]


@functools.cache
def _stemmer():
  return errors.library('nltk.stem.porter', 'LoCoMo, which compares stems,', 'eval').PorterStemmer()


def averages() -> answers.Averages:
  every = list(CATEGORIES.values())
  return answers.Averages(macro={'macro': [[task] for task in every]},
                          pooled={'overall': every, 'overall without adversarial': every[:-1]})
