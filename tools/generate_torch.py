"""Answers with an exported student in transformers, with torch: over cached blocks, and checked in one masked pass.

  python -m tools.generate_torch exported/student notes.txt report.md --question 'Who wrote the report?'
  python -m tools.generate_torch exported/student questions.jsonl --limit 5 --max-new 32

MODEL is a folder in the Hugging Face format or a hub name. Every text file is one block; JSON lines, parquet and Arrow
files (in the forms of blockattn.data.prompts) hold their own blocks and questions, and a block that one question has read
is not read again for the next. Every answer is made twice, greedily: by blockattn.hf.cached_generate over blocks that are
read one by one, and by generate under blockattn.hf.block_attention, which reads the whole prompt in one masked pass. They
compute the same in another order: in bfloat16 a near tie may fall to either side.

The exit code is 0 if they agree, 1 if they do not, 2 if model, files or options are refused.
"""

import sys
import time

from blockattn import hf, loading
from blockattn.data import encode, tables
from blockattn.data.example import Example
from blockattn.errors import UserError
from blockattn.hf import config as hf_config, files as hf_files
from blockattn.inference import session
from tools import arguments, generate


def load(name, dtype: str, template_args: str | None = None, chat: bool | None = None):
  """(model of transformers on the GPU if there is one, its BlockOptions, tokenizer, whether its prompts are chats)."""
  folder = hf_files.locate(name)
  meta = hf_config.read_meta(folder)
  options = hf_config.block_options(meta, where=str(folder / hf_files.META))
  tokenizer, chat = loading.prompts_of(meta, folder, template_args, chat)
  try:
    import torch
  except ModuleNotFoundError:
    raise UserError('students run in transformers with torch: python -m pip install "blockattn[torch]"') from None
  import transformers
  model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), local_files_only=True)
  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  return model.to(device).eval(), options, tokenizer, chat


def examples(files, question: str | None, tokenizer, *, chat: bool, limit: int | None) -> list[Example]:
  """The examples of JSON lines, or the one that `question` asks about text files.

  Raises:
    ValueError: text files without a question, or JSON lines with one; not an example.
  """
  lines = [file for file in files if file.endswith(tables.SUFFIXES)]
  if lines and (question is not None or len(lines) < len(files)):
    raise UserError('JSON lines bring their own questions: give either them, or text files and --question')
  if lines:
    return generate.examples_of(lines, tokenizer, chat, limit)
  if question is None:
    raise UserError('text files need a --question')
  return [session.ask(generate.read_texts(files), question, tokenizer, chat)]


def answer_twice(model, prompt, options, cache, max_new: int):
  """((tokens, seconds) over cached blocks, (tokens, seconds) in one masked pass), tokens those of the answer."""
  inputs = hf.block_inputs([prompt], options, device=model.device)
  how = dict(max_new_tokens=max_new, do_sample=False, temperature=None, top_p=None, top_k=None)

  def timed(generate):
    start = time.perf_counter()
    tokens = generate()[0, inputs.input_ids.shape[1]:].tolist()
    return tokens, time.perf_counter() - start

  def masked():
    with hf.block_attention(model, inputs.layout):
      return model.generate(**inputs.tensors(), **how)

  return timed(lambda: hf.cached_generate(model, prompt, options, cache=cache, **how)), timed(masked)


def run(args) -> int:
  """The command. Returns 0 if both ways agreed on every answer."""
  model, options, tokenizer, chat = load(args.model, args.dtype, args.template_args, args.chat)
  encoder, cache, agreed = encode.Encoder(tokenizer), {}, True
  for example in examples(args.files, args.question, tokenizer, chat=chat, limit=args.limit):
    prompt, known = encoder.prompt(example), len(cache)
    (tokens, seconds), (check, check_seconds) = answer_twice(model, prompt, options, cache, args.max_new)
    print(f'{example.id}\n  {tokenizer.decode(tokens, skip_special_tokens=True).strip()}')
    print(f'  {len(prompt) - 1} blocks, {len(cache) - known} of them read now; {seconds:.2f} s, in one masked pass '
          f'{check_seconds:.2f} s')
    if tokens != check:
      agreed = False
      print(f'  NOT the answer of one masked pass: {tokenizer.decode(check, skip_special_tokens=True).strip()}')
  print('both ways give the same tokens' if agreed else 'the two ways differ')
  return 0 if agreed else 1


def main(argv: list[str] | None = None) -> int:
  parser = arguments.Parser(prog='python -m tools.generate_torch', description=__doc__)
  parser.add_argument('model', help='Hugging Face folder or hub name')
  parser.add_argument('files', nargs='+', help='text files, a block each; or JSON lines, parquet or Arrow files')
  parser.add_argument('--question', help='about the text files')
  arguments.add_prompts(parser)
  parser.add_argument('--limit', type=arguments.positive, help='most questions of JSON lines (default: all)')
  arguments.add_numbers(parser, max_new=(64, 'most tokens of an answer'))
  arguments.add_computing(parser, impl=None)
  args = parser.parse_args(argv)
  return arguments.run('generate_torch', lambda: run(args))


if __name__ == '__main__':
  sys.exit(main())
