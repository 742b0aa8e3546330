"""tools.generate from files and questions to answers on standard output."""

import io
import json
import re

import data_cases
import hf_cases
import jax
import pyarrow
import pytest
import rich.console
from pyarrow import parquet

from blockattn import blocks
from blockattn.data import encode
from blockattn.hf import config
from tools import generate

SINKS = {'blocks': config.blocks_meta(blocks.BlockOptions((5, 6), 'sequential', max_blocks=8))}
LINES = [{'blocks': ['one two ', 'three '], 'prompt': 'count:', 'response': ' four', 'id': 'a'},
         {'blocks': ['three ', 'one two '], 'prompt': 'count:', 'response': ' four', 'id': 'b'}]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('generate')
  hf_cases.save_model(folder / 'model', data_cases.tiny_tokenizer(), SINKS)
  (folder / 'one.txt').write_text('the first text\nhas two lines')
  (folder / 'two.md').write_text('# the second\n')
  (folder / 'bad.txt').write_bytes(b'\xff\xfe')
  (folder / 'empty.txt').write_text('')
  (folder / 'lines.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in LINES))
  parquet.write_table(pyarrow.Table.from_pylist(LINES), folder / 'lines.parquet')
  return folder


@pytest.fixture
def call(folder, capsys, monkeypatch):
  """(exit code, standard output, standard error) of the command on files of the folder."""
  def run(*args, typed=''):
    typed = typed if isinstance(typed, bytes) else typed.encode()
    monkeypatch.setattr('sys.stdin', io.TextIOWrapper(io.BytesIO(typed)))
    files = [str(folder / arg) if '.' in arg and not arg.startswith('-') else arg for arg in args]
    common = ['--max-new', '4', '--impl', 'reference', '--device-tokens', '2048', '--no-chat']
    code = generate.main([str(folder / 'model'), *files, *common])
    return (code, *capsys.readouterr())
  return run


def test_a_question_about_files_and_again_from_the_cache(call, tmp_path):
  asked = ('one.txt', 'two.md', '--question', 'what?', '--cache', str(tmp_path))
  code, out, err = call(*asked)
  assert code == 0 and 'first token' in err and '2 computed' in err
  assert err.startswith('attention: reference (as asked)\n') and 'attention:' not in out
  again, same, err = call(*asked)
  assert (again, same) == (code, out) and '2 disk' in err
  assert re.search(r'8-bit states are 0\.\d\d% off', call(*asked, '--int8')[2])
  assert call('two.md', 'one.txt', '--question', 'what?', '--cache', str(tmp_path))[1] != ''


def test_blocks_have_a_length_in_the_tokens_of_the_model_that_answers(call, folder):
  (folder / 'long.txt').write_text('A sentence about 語 and more.\n' * 12)
  code, _, err = call('long.txt', '--question', 'what?', '--segmenter', 'tiny', '--target-tokens', '32')
  assert code == 0, err
  sizes = [int(size) for size in re.findall(r'^ *\d+ +(\d+) +computed', err, re.MULTILINE)]
  counts = encode.token_ends(str(folder / 'model'))
  text = (folder / 'long.txt').read_text()
  assert sum(sizes) >= len(counts([text])[0]) > 128 and all(8 <= size <= 64 for size in sizes[:-1])


@pytest.mark.parametrize('file', ['lines.jsonl', 'lines.parquet'])
def test_lines_bring_their_own_questions(call, file):
  code, out, err = call(file)
  assert code == 0 and len(out.splitlines()) >= 2
  assert 'a: count:' in err and 'b: count:' in err
  assert len(call(file, '--limit', '1')[2].split('first token')) == 2


@pytest.mark.slow
def test_questions_are_read_until_the_input_ends(call):
  jax.clear_caches()   # what other tests have compiled
  code, out, err = call('one.txt', 'two.md', typed='what?\n\n/blocks\n' + 'very ' * 3000 + '\nwhat?\n')
  assert code == 0
  assert err.count('first token') == 2 and '2 device' in err and 'generate: request 0' in err   # one is too long
  first, second = out.splitlines()[0], out.splitlines()[-1]
  assert first == second
  # What is compiled is said apart, and is no time to the first token; the second answer has nothing to compile.
  cold, warm = (line for line in err.splitlines() if line.startswith('first token'))
  compiled = float(re.search(r'besides, ([\d.]+) s of compiling', cold)[1])
  assert float(re.match(r'first token ([\d.]+)', cold)[1]) < compiled and 'compiling' not in warm
  assert call('lines.jsonl', '--interactive', typed='what?\n')[2].count('first token') == 1
  assert call('-', '--question', 'what?', typed='a text')[0] == 0


def test_commands_of_a_conversation(call):
  code, out, err = call('one.txt', typed=b'/help\n/block\n\xff\xfe?\n/quit\nwhat?\n')
  assert (code, out) == (0, '') and 'first token' not in err   # nothing behind /quit is read
  assert all(name in err for name in generate.COMMANDS) and "no command /block; did you mean '/blocks'?" in err
  assert 'the question is no UTF-8 text (character 0)' in err


class Interrupted:
  """A session whose answers end with Ctrl-C."""
  def answer(self, example, on_text):
    raise KeyboardInterrupt


def test_ctrl_c_ends_an_answer_where_a_person_types(capsys):
  console = rich.console.Console(file=io.StringIO())
  generate._answer(Interrupted(), str, 'what?', console, stops=True)
  assert 'stopped; /quit or Ctrl-D ends' in console.file.getvalue()
  with pytest.raises(KeyboardInterrupt):
    generate._answer(Interrupted(), str, 'what?', console, stops=False)


@pytest.mark.parametrize('option, value', [
    ('--cache-gib', 'inf'), ('--memory-gib', 'nan'), ('--memory-gib', '-1'), ('--limit', '-1'), ('--temperature', 'nan'),
    ('--temperature', 'inf'), ('--device-tokens', '0'), ('--devices', '0'), ('--max-new', '0')])
def test_numbers_are_checked(call, option, value, capsys):
  with pytest.raises(SystemExit) as end:
    call('one.txt', '--question', 'x', option, value)
  assert end.value.code == 2 and f"{option}: '{value}' is not a number from" in capsys.readouterr().err


@pytest.mark.parametrize('args, message', [
    (('one.txt', '--question', 'caf\udce9'), 'the question is no UTF-8 text (character 3)'),
    (('one.txt', '--question', 'x', '--target-tokens', '8'), '--target-tokens 8 is the length of the blocks that'),
    (('bad.txt', '--question', 'x'), 'bad.txt: no UTF-8'),
    (('empty.txt', '--question', 'x'), 'empty.txt: the file is empty'),
    (('missing.txt', '--question', 'x'), 'missing.txt'), (('one.txt', 'lines.jsonl'), 'either JSON lines or text files'),
    (('-',), 'give --question'), (('one.txt', '--question', 'x', '--devices', '99'), '--devices 99'),
    (('one.txt', '--question', 'x', '--top-p', '2'), 'top_p=2.0')])
def test_what_is_wrong_is_said(call, args, message):
  code, out, err = call(*args)
  assert (code, out) == (2, '') and message in err


def test_a_malformed_line_is_named(folder, call):
  (folder / 'bad.jsonl').write_text('{"blocks": 3}\n')
  code, _, err = call('bad.jsonl')
  assert code == 2 and 'bad.jsonl:1' in err
