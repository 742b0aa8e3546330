"""Speed of this project against its peers, measured in one run on one machine.

  python -m tools.bench attention --quick                      less than a minute
  python -m tools.bench attention --json attention.json        some minutes; one core
  python -m tools.bench attention --cores 2 --devices 2        two cores; the heads divided over two CPU devices
  python -m tools.bench step                                   a distillation step against block fine-tuning
  python -m tools.bench step --variants                        the method's family, against it
  python -m tools.bench step --torch --size smollm2_135m --rows 2 --devices 2 --length 1152 --blocks 8 --samples 3
  python -m tools.bench memory                                 the loss's peak memory against T and V
  python -m tools.bench overhead                               what the loop, its data and its metrics add to a step
  python -m tools.bench gpu                                    our kernels on a GPU against torch, cuDNN and tokamax
  python -m tools.bench segment --data FOLDER                  where texts are cut, against splitters
  python -m tools.bench ttft                                   time to the first token over cached blocks
  python -m tools.bench decode --model FOLDER                  tokens per second after a cached prompt
  python -m tools.bench serve --model FOLDER                   a server in vLLM that reuses blocks, under load

Every peer computes the same numbers (this is checked) from the same arrays. Peers take turns, sample by sample, so that
a change of the machine's load hits all of them; ratios are between minima. A peer that cannot run is named with the
reason. Torch is optional.
"""

import sys

from tools import arguments
from tools.bench import attention, decode, gpu, measuring, overhead, segment, serve, step, ttft


def main(argv: list[str] | None = None) -> int:
  parser = arguments.Parser(prog='python -m tools.bench', description=__doc__)
  commands = parser.add_subparsers(required=True, metavar='command')
  for module in (attention, step, overhead, gpu, segment, ttft, decode, serve):
    module.add(commands)
  args = parser.parse_args(argv)

  def run():
    measuring.set_up(args)
    args.run(args)

  return arguments.run('bench', run)


if __name__ == '__main__':
  sys.exit(main())
