"""Distillation that interrupts itself, for the tests: python tests/support/interrupted.py
WHEN SIGNAL --config ... --workdir ...

WHEN is the number of a batch, at whose reading the signal is sent, or `save:STEP`, while that checkpoint is written.
"""

import os
import signal
import sys
import time

from blockattn import checkpoint
from blockattn.data import stream
from blockattn.train import command, distill


class InterruptedBatches(stream.Batches):
  """Batches of which one is not handed out before the signal was sent."""
  when, sign = None, None

  def __next__(self):
    if self.get_state()['next_step'] == self.when:
      os.kill(os.getpid(), self.sign)
    return super().__next__()


def interrupt_save(step, sign):
  save = checkpoint.Checkpoints.save

  def save_and_die(saved, at, *args):
    save(saved, at, *args)
    if at == step:
      # Saving goes on in the background: wait for its first trace on disk.
      while not any(path.name.startswith(str(step)) for path in saved.folder.iterdir()):
        time.sleep(1e-4)
      os.kill(os.getpid(), sign)

  checkpoint.Checkpoints.save = save_and_die


if __name__ == '__main__':
  when, sign = sys.argv[1], signal.Signals[sys.argv[2]]
  del sys.argv[1:3]
  if when.startswith('save:'):
    interrupt_save(int(when.removeprefix('save:')), sign)
  else:
    InterruptedBatches.when, InterruptedBatches.sign = int(when), sign
    stream.Batches = InterruptedBatches
  command.main(distill.Options, distill.run)
