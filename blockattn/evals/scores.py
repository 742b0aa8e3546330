"""Scores of answers, 0 to 1: SQuAD's, and those of LongBench v1, number for number its published scorer's, traps included.

A score of LongBench takes (prediction, answer, classes); a task takes the best over the accepted answers, see
`longbench.score`. Where they surprise:

- F1 without a common word is 0, also where nothing is left of both texts.
- ROUGE-L is that of the package `rouge` (1.0.1), not of Google's `rouge_score`: texts are cut into sentences at every
  full stop, words are counted once each, and what counts is the union of the words on one longest common subsequence
  per pair of sentences. A text without any sentence scores 0. A sentence of nothing but white space is one empty word;
  so is the line end behind the last full stop. The package walks its table recursively and gives up, which the published
  scorer counts as 0, where two sentences have together about as many words as Python allows calls (1,000); ours does not.
- Classification takes class names out of the list that it is reading, so the one behind a removed one is passed over.
- Counting and retrieval divide by all numbers of the prediction, a right one said twice counting twice.
- Code is compared with the first line without one of '`', '#' and '//', wherever they stand, by fuzzywuzzy's ratio on top
  of difflib, in whole per cents. With python-Levenshtein installed, or by rapidfuzz, numbers differ.
"""

import collections
import difflib
import functools
import re
import string
from collections.abc import Sequence

import numpy as np

from blockattn import errors
from blockattn.errors import UserError

# Punctuation of Chinese texts that is taken off a word, beside that of ASCII.
_CHINESE_PUNCTUATION = ('！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』'
                        '【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏.')
_EPSILON = 1e-8   # what the package adds to the denominator of F


def normalize(answer: str) -> str:
  """SQuAD's normalisation: lower case, no punctuation, no articles, single spaces."""
  answer = ''.join(c for c in answer.lower() if c not in string.punctuation)
  return ' '.join(re.sub(r'\b(a|an|the)\b', ' ', answer).split())


def score(prediction: str, answers: Sequence[str]) -> dict[str, float]:
  """{'exact_match', 'substring', 'f1'} of one prediction, each the best over the accepted answers, 0 to 1.

  `exact_match` compares the texts to the letter but for white space at the ends, the others after normalisation.
  """
  exact = max(float(prediction.strip() == a.strip()) for a in answers)
  return {'exact_match': exact, 'substring': substring(prediction, answers), 'f1': f1(prediction, answers)}


def normalized_match(prediction: str, answers: Sequence[str]) -> float:
  """Exact match as SQuAD and open-domain question answering have it: 1 if an answer is equal after normalisation."""
  said = normalize(prediction)
  return max(float(said == normalize(a)) for a in answers)


def substring(prediction: str, answers: Sequence[str]) -> float:
  """1 if an accepted answer stands in the prediction, both normalised."""
  said = normalize(prediction)
  rights = map(normalize, answers)
  return max(float(right in said if right else not said) for right in rights)   # the empty string is in every text


def f1(prediction: str, answers: Sequence[str]) -> float:
  """F1 of the bags of words, the best over the accepted answers; 1 where nothing is left of either."""
  said = normalize(prediction).split()
  words = [normalize(a).split() for a in answers]
  return max(bag_f1(said, right) if said or right else 1.0 for right in words)


def bag_f1(said: Sequence[str], right: Sequence[str]) -> float:
  """F1 of two bags of words, each word counted as often as it stands there; 0 without a common one."""
  common = sum((collections.Counter(said) & collections.Counter(right)).values())
  return 2 * common / (len(said) + len(right)) if common else 0.0


# LongBench.

def qa_f1(prediction: str, answer: str, classes: Sequence[str] | None = None) -> float:
  """F1 of the bags of words after SQuAD's normalisation."""
  return bag_f1(normalize(prediction).split(), normalize(answer).split())


def qa_f1_zh(prediction: str, answer: str, classes: Sequence[str] | None = None) -> float:
  """F1 of the bags of jieba's words, in lower case, without punctuation and white space."""
  marks = string.punctuation + _CHINESE_PUNCTUATION
  normalize = lambda word: ''.join(c for c in word.lower() if c not in marks and not c.isspace())
  return bag_f1(*([word for word in map(normalize, _words_zh(said)) if word] for said in (prediction, answer)))


def _words_zh(said):
  return list(_jieba().cut(said, cut_all=False))


@functools.cache
def _jieba():
  jieba = errors.library('jieba', 'the score of a Chinese task', 'eval')
  jieba.setLogLevel('WARNING')   # it tells how it loads its dictionary
  return jieba


def rouge_l(prediction: str, answer: str, classes: Sequence[str] | None = None) -> float:
  """F of ROUGE-L on the level of summaries, as the package `rouge` has it; 0 where it refuses an empty text."""
  said, right = _sentences(prediction), _sentences(answer)
  if not said or not right:
    return 0.0
  common = {word for sentence in right for other in said for word in common_subsequence(sentence, other)}
  recall, precision = (len(common) / len({word for s in sentences for word in s}) for sentences in (right, said))
  return 2.0 * (precision * recall / (precision + recall + _EPSILON))


def _sentences(said):
  """Words of each sentence; of one that is all white space one empty word."""
  return [' '.join(sentence.split()).split(' ') for sentence in said.split('.') if sentence]


def common_subsequence(x: Sequence[str], y: Sequence[str]) -> list[str]:
  """One longest common subsequence; among several the one that the package `rouge` finds.

  From the ends of both: a common word is taken; else x is shortened where that leaves strictly more, else y.
  """
  number = {word: i for i, word in enumerate(dict.fromkeys([*x, *y]))}
  y_numbers = np.array([number[word] for word in y])
  table = np.zeros((len(x) + 1, len(y) + 1), np.int32)
  for i, word in enumerate(x):
    taken = np.where(y_numbers == number[word], table[i, :-1] + 1, table[i, 1:])
    table[i + 1, 1:] = np.maximum.accumulate(taken)
  found, i, j = [], len(x), len(y)
  while i and j:
    if x[i - 1] == y[j - 1]:
      found.append(x[i - 1])
      i, j = i - 1, j - 1
    elif table[i - 1, j] > table[i, j - 1]:
      i -= 1
    else:
      j -= 1
  return found[::-1]


def rouge_l_zh(prediction: str, answer: str, classes: Sequence[str] | None = None) -> float:
  """`rouge_l` of jieba's words."""
  return rouge_l(' '.join(_words_zh(prediction)), ' '.join(_words_zh(answer)))


def classification(prediction: str, answer: str, classes: Sequence[str] | None = None) -> float:
  """1 / (classes whose name stands in the prediction) if the right one is among them."""
  named = [name for name in classes or () if name in prediction]
  at = 0
  while at < len(named):
    # A part of the right name, such as "food" of "Other food", is no rival. The next name moves up to its place, and
    # is not looked at.
    if named[at] in answer and named[at] != answer:
      named.remove(named[at])
    at += 1
  return 1.0 / len(named) if answer in named else 0.0


def count(prediction: str, answer: str, classes: Sequence[str] | None = None) -> float:
  """The share of the prediction's numbers that are the answer, digit for digit."""
  numbers = re.findall(r'\d+', prediction)
  return numbers.count(answer) / len(numbers) if numbers else 0.0


def retrieval(prediction: str, answer: str, classes: Sequence[str] | None = None) -> float:
  """`count` with the number of the answer "Paragraph N"."""
  return count(prediction, _number(answer, r'Paragraph (\d+)'))


def retrieval_zh(prediction: str, answer: str, classes: Sequence[str] | None = None) -> float:
  """`count` with the number of the answer "段落N"."""
  return count(prediction, _number(answer, r'段落(\d+)'))


def _number(answer, pattern):
  match = re.search(pattern, answer)
  if match is None:
    raise UserError(f'the accepted answer {answer!r} is not of the form {pattern}; the data are not of this task')
  return match[1]


def code_similarity(prediction: str, answer: str, classes: Sequence[str] | None = None) -> float:
  """Similarity of the first line that is no comment to the answer, in whole per cents / 100."""
  lines = prediction.lstrip('\n').split('\n')
  said = next((line for line in lines if not any(mark in line for mark in ('`', '#', '//'))), '')
  if said == answer:
    return 1.0
  if not said or not answer:
    return 0.0
  return round(100 * difflib.SequenceMatcher(None, said, answer).ratio()) / 100
