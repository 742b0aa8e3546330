"""Cuts texts into blocks where a person would.

  python -m tools.segment README.md docs/ 'src/**/*.py'            one JSON line a file on the standard output
  python -m tools.segment texts.jsonl --out blocks.jsonl --target-tokens 512 --max 768
  cat notes.txt | python -m tools.segment - --html notes.html

In: files, folders (all files below that are not hidden), globs, `-` for the standard input; files that end in .jsonl or
.jsonl.gz, and with --jsonl all of them, hold a JSON object with "text", and maybe "id", on each line. Text is UTF-8 and
taken as it stands: line ends, byte order marks and NUL characters are part of it.

Out: {"id", "blocks": [[start, stop], ...]} a line, in the order of the input. Offsets count characters (code points) of
the text; blocks follow each other from 0 to its end. The id is the line's, else the file's path or path:line.

Granularity: --threshold P cuts where the probability of a cut is at least P (by default what the model was
tuned to); --depth D then cuts blocks longer than
--max again at their best place, up to D times; --target-tokens N takes the best cuts for blocks of about N tokens. --min
and --max are kept by every block (with --depth, see there), if need be by cuts inside a sentence.

The exit code is 0; 1 if some of the input could not be read and was skipped; 2 if an argument or the model must be mended.
"""

import contextlib
import dataclasses
import glob
import json
import os
import pathlib
import sys
import time
from collections.abc import Iterable, Iterator

import rich.progress

from blockattn.data import encode, json_lines
from blockattn.errors import UserError
from blockattn.segmentation import api, granularity
from tools import arguments, segment_page

BATCH = 1 << 20   # characters that are scored together
_BEGIN = '{"id": '   # of every line
PART = '.part'    # what --out has so far is kept in a file of this ending until it is complete


@dataclasses.dataclass(frozen=True)
class Text:
  """One text to cut; `size` is what the progress bar counts, in bytes of the input."""
  id: str | int
  text: str
  size: int


@dataclasses.dataclass(frozen=True)
class Unreadable:
  """A file, or a line of one, that is skipped."""
  place: str
  reason: str

  def __str__(self):
    return f'{self.place}: {self.reason}; skipped'


def _arguments(argv):
  parser = arguments.Parser(prog='python -m tools.segment', description=__doc__)
  parser.add_argument('paths', nargs='+', metavar='PATH', help='file, folder, glob, or - for the standard input')
  parser.add_argument('--jsonl', action='store_true', help='every file, and the standard input, holds JSON lines')
  parser.add_argument('--text-key', default='text', metavar='KEY', help='of the JSON lines')
  parser.add_argument('--out', metavar='FILE', help='write here, in one move at the end, instead of standard output')
  parser.add_argument('--resume', action='store_true', help='keep what --out holds, also of a run that was stopped, '
                      'and skip the ids in it; give the same options again')
  parser.add_argument('--with-text', action='store_true', help='add "texts", the text of each block, to every line')
  parser.add_argument('--html', metavar='FILE', help='write a page that shows the blocks, with sliders for how fine')
  parser.add_argument('--threshold', type=float, metavar='P', help='0 to 1 (default: what the model was tuned to, lower in '
                      'short texts)')
  parser.add_argument('--depth', type=int, metavar='D', help='rounds of cutting again')
  parser.add_argument('--target-tokens', type=int, metavar='N', help='wanted length of a block')
  parser.add_argument('--min', type=int, metavar='N', help='tokens of a block at least (default: a quarter of the target)')
  parser.add_argument('--max', type=int, metavar='N', help='tokens of a block at most (default: twice the target)')
  parser.add_argument('--tokenizer', help='whose tokens are counted: that of the model that will read the blocks, a local '
                      "folder or a name on the hub (default: the segmenter's own)")
  parser.add_argument('--model', help='a local folder, or a name on the hub (default: the one of the package)')
  args = parser.parse_args(argv)
  if args.resume and not args.out:
    parser.error('--resume needs --out, the file to go on with')
  return args


# Input.


def find_inputs(paths: Iterable[str]) -> list[str]:
  """The files that paths, folders and globs name, each once; '-' stays.

  Raises:
    FileNotFoundError: a path names nothing.
  """
  files = {}
  for name in paths:
    path = pathlib.Path(name).expanduser()
    if name == '-':
      found = [name]
    elif path.is_dir():
      found = [str(p) for p in sorted(path.rglob('*')) if p.is_file() and not _hidden(p.relative_to(path))]
    elif path.exists():
      found = [str(path)]
    else:
      found = sorted(p for p in glob.glob(str(path), recursive=True) if os.path.isfile(p))
    if not found:
      raise FileNotFoundError(f'{name}: no file here; give a file, a folder, a glob, or - for the standard input')
    files.update(dict.fromkeys(found))
  return list(files)


def _hidden(path):
  return any(part.startswith('.') for part in path.parts)


def read_texts(files: Iterable[str], *, jsonl: bool = False, text_key: str = 'text') -> Iterator[Text | Unreadable]:
  """The texts of files, in order; what cannot be read is named in its place."""
  for file in files:
    try:
      if jsonl or file.endswith(json_lines.SUFFIXES):
        for number, line in json_lines.numbered_lines(file):
          yield _parse(line, f'{file}:{number}', text_key)
      else:
        data = sys.stdin.buffer.read() if file == '-' else pathlib.Path(file).read_bytes()
        yield Text(file, data.decode(), len(data))
    except UnicodeDecodeError as error:
      yield Unreadable(file, f'not UTF-8 (byte {error.start:,} is 0x{error.object[error.start]:02x})')
    except (OSError, UserError) as error:   # gone, not ours to read, or damaged compression
      yield Unreadable(file, f'cannot be read ({error})')


def _parse(line, place, text_key) -> Text | Unreadable:
  try:
    record = json_lines.load_object(line)
  except json_lines.Malformed as error:
    return Unreadable(place, str(error))
  text, name = record.get(text_key), record.get('id')
  if not isinstance(text, str):
    has = f'{text_key!r} is {type(text).__name__}' if text_key in record else f'its keys are {", ".join(list(record)[:8])}'
    return Unreadable(place, f'no text under the key {text_key!r} ({has}); see --text-key')
  return Text(name if isinstance(name, str | int) else place, text, len(line))


def batches(texts: Iterable[Text], characters: int) -> Iterator[list[Text]]:
  """Neighbouring texts of together at least so many characters; the last batch holds the rest."""
  batch, size = [], 0
  for text in texts:
    batch.append(text)
    size += len(text.text)
    if size >= characters:
      yield batch
      batch, size = [], 0
  if batch:
    yield batch


# Output.


def finished_lines(out: str) -> dict[str, str]:
  """The whole lines that a run before left in its output, by id as JSON; of a stopped run, those of its part."""
  done = {}
  for path in filter(os.path.exists, (out, out + PART)):
    with open(path, encoding='utf-8') as file:
      for number, line in enumerate(file, start=1):
        if path != out and not line.endswith('\n') and _BEGIN.startswith(line[:len(_BEGIN)]):
          break   # a stopped run was writing it; what has the name --out was whole
        try:
          record = json.loads(line if line.endswith('\n') else '')
          done[json.dumps(record['id'])] = line
          record['blocks']
        except (ValueError, KeyError, TypeError) as error:
          raise UserError(f'{path}:{number}: not a line of this tool; --resume continues its own output only, '
                          'name another --out') from error
  return done


@contextlib.contextmanager
def open_output(out: str | None, kept: Iterable[str]):
  """A text file to write lines to; it takes the name `out` when all is written, until then it has PART behind it."""
  if out is None:
    yield sys.stdout
    sys.stdout.flush()
    return
  part, temporary = out + PART, out + '.tmp'
  with open(temporary, 'w', encoding='utf-8') as file:
    file.writelines(kept)
  os.replace(temporary, part)
  with open(part, 'a', encoding='utf-8') as file:
    yield file
  os.replace(part, out)


def line_of(text: Text, blocks: list[tuple[int, int]], with_text: bool) -> str:
  record = {'id': text.id, 'blocks': blocks}
  if with_text:
    record['texts'] = [text.text[start:stop] for start, stop in blocks]
  return json.dumps(record) + '\n'


# The run.


@dataclasses.dataclass
class Tally:
  texts: int = 0
  blocks: int = 0
  characters: int = 0
  skipped: int = 0
  resumed: int = 0
  seconds: float = 0.0

  def __str__(self):
    rate = f'{self.characters / self.seconds:,.0f}' if self.seconds else '-'
    return (f'{self.texts:,} texts, {self.blocks:,} blocks, {self.characters:,} characters in {self.seconds:.1f} s '
            f'({rate} characters/s)' + (f'; {self.resumed:,} were there already' if self.resumed else '')
            + (f'; {self.skipped:,} skipped' if self.skipped else ''))


def cut_all(args, files, want, model, console) -> Tally:
  done = finished_lines(args.out) if args.resume else {}
  reader = encode.token_ends(args.tokenizer) if args.tokenizer else None
  tally, pages, start = Tally(), [], time.perf_counter()
  with _progress_bar(console) as bar, open_output(args.out, done.values()) as out:
    task = bar.add_task('', total=_size(files))
    texts = _readable(read_texts(files, jsonl=args.jsonl, text_key=args.text_key), done, tally, bar, task)
    for batch in batches(texts, BATCH):
      for text, scored in zip(batch, _score(batch, model, bar, task), strict=True):
        blocks = granularity.blocks_of(text.text, scored, want, model.token_ends, reader)
        out.write(line_of(text, blocks, args.with_text))
        tally.texts, tally.blocks = tally.texts + 1, tally.blocks + len(blocks)
        tally.characters += len(text.text)
        if args.html:
          pages.append(segment_page.page_text(str(text.id), text.text, scored, blocks, model.token_ends, reader))
      out.flush()
  tally.seconds = time.perf_counter() - start
  if args.html:
    segment_page.write(args.html, pages, want)
  return tally


def _readable(texts, done, tally, bar, task):
  """The texts that are left to do; what is skipped is said and counted."""
  for text in texts:
    if isinstance(text, Unreadable):
      bar.console.print(f'segment: {arguments.printable(str(text))}')
      tally.skipped += 1
    elif json.dumps(text.id) in done:
      tally.resumed += 1
      bar.advance(task, text.size)
    else:
      yield text


def _score(batch, model, bar, task):
  """What the model says of a batch, the bar moving on with the characters read."""
  characters, size = sum(len(text.text) for text in batch), sum(text.size for text in batch)
  before = bar.tasks[task].completed
  progress = lambda read: bar.update(task, completed=before + size * min(read / max(characters, 1), 1))
  scored = model.score([text.text for text in batch], progress=progress)
  bar.update(task, completed=before + size)
  return scored


def _size(files):
  """Bytes of all files; None if that cannot be known."""
  if any(file == '-' or file.endswith('.gz') for file in files):
    return None
  return sum(os.path.getsize(file) for file in files if os.path.exists(file))


def _progress_bar(console):
  columns = (rich.progress.BarColumn(), rich.progress.DownloadColumn(), rich.progress.TransferSpeedColumn(),
             rich.progress.TimeRemainingColumn())
  return rich.progress.Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def run(args, model) -> int:
  console = arguments.console(stderr=True)
  want = granularity.wanted(threshold=args.threshold, depth=args.depth, target=args.target_tokens, minimum=args.min,
                            maximum=args.max)
  files = find_inputs(args.paths)
  arguments.check_outputs({'out': args.out, 'html': args.html, 'files': files})
  arguments.check_outputs({'out': args.out and args.out + PART, 'files': files})
  model = api.load_segmenter(model or args.model)
  try:
    tally = cut_all(args, files, granularity.for_model(want, model), model, console)
  except BrokenPipeError:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())   # the reader has enough; nothing is left to flush
    return 0
  console.print(f'segment: {tally}')
  return 1 if tally.skipped else 0


def main(argv=None, model=None) -> int:
  """`model` takes the place of --model."""
  args = _arguments(argv)
  return arguments.run('segment', lambda: run(args, model), stopped=(
      f'what is done stands in {args.out}{PART}, go on with --resume' if args.out else ''))


if __name__ == '__main__':
  sys.exit(main())
