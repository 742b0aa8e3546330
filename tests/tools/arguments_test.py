"""What the command lines of the tools have in common."""

from tools import arguments


def test_help_says_the_default_of_each_option_that_has_one():
  parser = arguments.Parser(prog='x')
  arguments.add_numbers(parser, warmth=(0.0, 'of answers'), many=(8, 'of them'))
  parser.add_argument('--seed', type=int, default=0, help='of draws')
  parser.add_argument('--top', type=int, default=0, help='of so many (default: all)')
  parser.add_argument('--strict', action='store_true', help='stop')
  parser.add_argument('--out', help='folder')
  said = ' '.join(parser.format_help().split())
  for text in ('of answers (default: 0.0)', 'of them (default: 8)', 'of draws (default: 0)', 'of so many (default: all) -',
               'stop --out', 'OUT folder'):
    assert text in said, text
  assert said.count('(default') == 4
