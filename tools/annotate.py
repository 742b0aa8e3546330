"""Asks a language model where to cut documents: any server that speaks OpenAI's chat completions.

  python -m tools.annotate letters.jsonl --output train_letters.jsonl --base-url http://localhost:8000/v1 --model qwen3 \\
      --category letters --license CC0-1.0 --source 'my archive' --price-in 0.2 --price-out 0.6

Says what it will cost and stops there; with --yes it goes on. Documents come from JSON lines {"id", "text"} (also
"category", "source", "license") or from text files. The model answers with numbers of markers; what it cuts is the text
as it was. Each finished document is appended to the output at once, so that the same command goes on after an
interruption. The key is read from the environment variable that --key-env names. The exit code is 0; 1 if documents
failed (the same command asks for them again); 2 if a file or an option must be mended, or the server refuses.
"""

import collections
import functools
import json
import os
import pathlib
import sys

import rich.progress

from blockattn.data import json_lines
from blockattn.errors import UserError
from blockattn.segmentation import markers
from blockattn.segmentation.semanticseg import annotate, completions
from tools import arguments


def _arguments(argv):
  parser = arguments.Parser(prog='python -m tools.annotate', description=__doc__)
  options, limits = annotate.Options(), completions.Limits()
  add = parser.add_argument
  add('files', nargs='+', help='.jsonl, .jsonl.gz or text files')
  add('--output', required=True, help='a .jsonl file; documents that it holds already are not asked about')
  add('--base-url', required=True, help='up to and without /chat/completions, such as https://api.openai.com/v1')
  add('--model', required=True)
  add('--key-env', default='OPENAI_API_KEY', metavar='NAME', help='environment variable that holds the key; without it '
      'none is sent')
  for name in ('category', 'source', 'license'):
    add(f'--{name}', help='of documents that do not say their own')
  add('--price-in', type=float, metavar='PRICE', help='of a million tokens read, for the estimate')
  add('--price-out', type=float, metavar='PRICE', help='of a million tokens written')
  add('--tokenizer', help='counts tokens for the estimate: a local folder, or a name on the hub (default: characters / 4)')
  add('--yes', action='store_true', help='go on after the estimate')
  add('--instructions', help='a text file instead of the built-in instructions; {example} becomes a marker')
  add('--body', type=json.loads, default={'temperature': 0}, metavar='JSON', help='further keys of each request (default: '
      '{"temperature": 0})')
  arguments.add_numbers(
      parser, concurrency=(4, 'documents at a time'), window=(options.window, 'characters of a request'),
      overlap=(options.overlap, 'characters that windows share'), asks=(options.asks, 'answers until one is valid'),
      timeout=(float(limits.timeout), 'seconds for a reply'), attempts=(limits.attempts, 'of a request that fails'),
      backoff=(float(limits.backoff), 'seconds before the second attempt'),
      longest_wait=(float(limits.longest_wait), 'seconds; if the server asks for more, the document fails'))
  return parser.parse_args(argv)


def _options(args):
  if not isinstance(args.body, dict) or {'model', 'messages', 'stream', 'n'} & set(args.body):
    raise UserError('--body: give a JSON object without "model", "messages", "stream" and "n"')
  told = pathlib.Path(args.instructions).read_text(encoding='utf-8') if args.instructions else annotate.INSTRUCTIONS
  return annotate.Options(args.window, args.overlap, args.asks, told)


def _counter(tokenizer):
  if tokenizer is None:
    return annotate.quarter
  from blockattn.data import encode
  loaded = encode.load_tokenizer(tokenizer)
  return lambda text: len(loaded(text, add_special_tokens=False)['input_ids'])


def _unfinished(args, output, report):
  """The documents that the output does not hold; counts all into the report."""
  defaults = {name: value for name in ('category', 'source', 'license') if (value := getattr(args, name)) is not None}
  for document in annotate.read_plain(args.files, defaults, report):
    if not output.is_finished(document):
      yield document


def print_estimate(estimate, args, report, console):
  console.print(f'{report.examples} documents, {report.examples - estimate.documents} of them finished before; '
                f'{report.bad.total()} bad lines')
  for bad in report.listed:
    console.print(f'  {bad}')
  console.print(f'{estimate.documents} to ask about: {estimate.characters:,} characters, {estimate.requests:,} requests, '
                f'about {estimate.tokens_in:,} tokens to read and {estimate.tokens_out:,} to write')
  if args.price_in is None or args.price_out is None:
    console.print('cost: unknown; give --price-in and --price-out')
  else:
    console.print(f'cost: about {estimate.cost(args.price_in, args.price_out):.4f}, more if requests are repeated')


def run(args, options, output, endpoint, total, err) -> collections.Counter:
  """Annotates all unfinished documents; counts those 'written' and 'failed', and what was used."""
  counts = collections.Counter()
  columns = (*rich.progress.Progress.get_default_columns(), rich.progress.MofNCompleteColumn())
  with rich.progress.Progress(*columns, console=err, transient=True) as bar:
    task = bar.add_task('documents', total=total)
    documents = _unfinished(args, output, json_lines.Report())
    for result in annotate.annotate_all(documents, endpoint.ask, markers.candidates, options, args.concurrency):
      counts.update(result.usage)
      counts['failed' if result.document is None else 'written'] += 1
      if result.document is None:
        err.print(f'{result.id}: failed: {result.reason}')
      else:
        output.add(result.document)
      bar.advance(task)
  return counts


def _annotate(args) -> int:
  options, out, err = _options(args), arguments.console(), arguments.console(stderr=True)
  limits = completions.Limits(args.timeout, args.attempts, args.backoff, args.longest_wait)
  connect = functools.partial(completions.Completions, args.base_url, args.model, os.environ.get(args.key_env, ''),
                              body=args.body, limits=limits)
  with annotate.Output(os.path.expanduser(args.output)) as output, connect() as endpoint:
    report = json_lines.Report()
    estimate = annotate.estimate(_unfinished(args, output, report), markers.candidates, options, _counter(args.tokenizer))
    print_estimate(estimate, args, report, out)
    if not estimate.documents:
      return 0
    if not args.yes:
      out.print('add --yes to go on')
      return 0
    counts = run(args, options, output, endpoint, estimate.documents, err)
  out.print(f'{counts["written"]} documents written, {counts["failed"]} failed; {counts["requests"]:,} answers, '
            f'{counts["asked again"]:,} asked for again, {counts["tokens_in"]:,} tokens read, '
            f'{counts["tokens_out"]:,} written')
  return 1 if counts['failed'] else 0


def main(argv=None) -> int:
  args = _arguments(argv)
  return arguments.run('annotate', lambda: _annotate(args), stopped='the same command goes on',
                       mendable=(completions.Failed, completions.Refused))


if __name__ == '__main__':
  code = main()
  if code == 130:   # whatever is written is on the disk: do not wait for replies that nobody will read
    sys.stdout.flush()
    os._exit(code)
  sys.exit(code)
