"""The command lines of the tools."""

import argparse
import sys

from blockattn import disk


class Parser(argparse.ArgumentParser):
  """argparse's, which refuses paths on other machines (gs://...), whatever argument they are given to."""

  def parse_known_args(self, args=None, namespace=None):
    args = sys.argv[1:] if args is None else list(args)
    try:
      disk.check_local(args)
    except ValueError as error:
      self.error(str(error))
    return super().parse_known_args(args, namespace)
