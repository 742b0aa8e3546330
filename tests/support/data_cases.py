"""What the tests of the data share: a tokenizer made on the spot, and files of examples."""

import functools
import gzip
import json

import jax
import numpy as np

from blockattn.data import json_lines, prompts, stdlib

LENGTH = 256   # tokens of a row
GOOD = {'blocks': ['one', 'two'], 'prompt': 'which?', 'response': ' one'}
CHAT = {'messages': [{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': 'Hello'},
                     {'role': 'assistant', 'content': 'Hi.'}, {'role': 'user', 'content': 'Who?'},
                     {'role': 'assistant', 'content': 'Me.'}]}
MESSAGE = {'role': 'user', 'content': 'x'}
ANSWER = {'role': 'assistant', 'content': 'y'}
CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
# As Llama 3 has it: a beginning-of-text token, and white space at the ends of a message goes.
TRIMMING = ("{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n\n' + m['content'] | trim + "
            "'<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}")
SPECIALS = ('<|endoftext|>', '<|im_start|>', '<|im_end|>', '<|begin|>')


@functools.cache
def tiny_tokenizer(template: str | None = CHATML, eos: str = '<|im_end|>', adds_bos: bool = False):
  """A byte-level BPE of some 300 tokens as a transformers tokenizer."""
  import tokenizers
  import transformers
  from tokenizers import decoders, models, pre_tokenizers, processors, trainers
  bpe = tokenizers.Tokenizer(models.BPE())
  bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  bpe.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=list(SPECIALS), show_progress=False,
                                initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
  bpe.train_from_iterator(['the question of the answer is in the passage about the answer'] * 4, trainer)
  if adds_bos:
    bpe.post_processor = processors.TemplateProcessing(single='<|begin|> $A', special_tokens=[('<|begin|>', 3)])
  tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=eos, bos_token='<|begin|>',
                                                   pad_token='<|endoftext|>')
  tokenizer.chat_template = template
  return tokenizer


def passages_line(i: int, passages: int = 3, words: int = 4) -> dict:
  """A well-formed line of the passages form, different for every i; passage i % passages is gold."""
  return {'id': f'q{i}', 'passages': [{'title': f'Title {i}.{j}', 'text': f'passage {j} about {i} ' * words}
                                      for j in range(passages)],
          'question': f'what is {i}?', 'answers': [f'answer {i}', f'the answer {i}'], 'gold': [i % passages]}


def write_lines(path, lines) -> str:
  """Writes lines, bytes as they are and anything else as JSON, compressed if the name ends in .gz."""
  data = b''.join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b'\n' for line in lines)
  path.write_bytes(gzip.compress(data) if path.name.endswith('.gz') else data)
  return str(path)


def read(path, **kwargs):
  """(examples, report) of a file."""
  report = json_lines.Report()
  return list(prompts.read_examples(path, report=report, tokenizer=tiny_tokenizer(), **kwargs)), report


def joined(example):
  """The whole text of an example."""
  return ''.join(example.texts)


def from_template(example):
  """The text that the template wrote, of every part."""
  return [[part[a:b] for a, b in ranges] for part, ranges in
          zip(example.texts, example.template, strict=True)]


def write_folder(folder):
  """Two files of 40 examples and three malformed lines in all."""
  lines = [passages_line(i, passages=1 + i % 4, words=1 + i % 3) for i in range(40)]
  write_lines(folder / 'a.jsonl', [*lines[:15], b'{', b'[]'])
  write_lines(folder / 'b.jsonl.gz', [b'', b'{', *lines[15:]])
  return folder


def containers(root):
  """Documented classes, read from a made-up library."""
  words = ('opens', 'closes', 'counts', 'sorts', 'splits')
  for number, noun in enumerate(('files', 'words', 'lists', 'trees')):
    methods = ''.join(f'  def {verb}_{noun}(self, x):\n    """It {verb} {noun} of every kind."""\n' for verb in words)
    (root / f'{noun}.py').write_text(f'class C{number}:\n  """Holds {noun} that somebody made."""\n{methods}')
  return tuple(stdlib.read_containers(root))


def assert_same(got, want):
  assert len(got) == len(want)
  for g, w in zip(got, want, strict=True):
    jax.tree.map(np.testing.assert_array_equal, g, w)
