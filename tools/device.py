"""All that waits for an accelerator, in two commands: measured part by part within a budget of seconds.

  launch/device.sh WHEELS -m tools.device OUT --budget 560                              the first call
  launch/device.sh WHEELS -m tools.device OUT --parts train --budget 280 --model FILE --data FOLDER  the second

Every part is a process of its own with a share of the budget, and writes OUT/PART.json after every case that it has
measured. What a part does not use goes to those behind it. A part that raises, is killed or runs out of time is recorded
with the end of what it printed, and the next one starts. A second call with the same OUT measures what is missing: parts
that are done are left alone, of others the cases that failed or were not reached.

The parts, the most valuable first:

  card       what the device is; the rates of a bfloat16 matrix product and of copies, which others are compared with
  tests      tests marked `device` of tests/kernels/kernels_test.py: every kernel against the float32 reference, both passes
  kernels    attention of long prompts against flex_attention, cuDNN and tokamax, forward and with the backward pass
  ttft       time to the first token with Qwen3-4B's shapes: full prefill, and none, half and all blocks cached
  step       distillation, block fine-tuning, a stored teacher: time, MFU and memory of a step, shapes of Qwen3-0.6B and 4B
  train      a real model distilled as long as there is time, and evaluated before and after

--toy does all of it at sizes that a CPU manages in a minute. The exit code is 0 if every part is done, else 1; 2 if the
arguments are refused.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

from blockattn import metrics
from tools import arguments

# Seconds of a budget of 560, and why. A part may use what earlier ones left of theirs.
SHARES = {
    'card': 30,       # start of JAX 10, three programs to compile, some hundred products and copies
    'tests': 100,     # a dozen programs of three kernels each at about 5 s to compile; running them takes none
    'kernels': 180,   # 2 lengths x 2 passes of ours at 5 s, flex compiles 6 times at 8 s, causal peers twice each
    'ttft': 140,      # 4B random weights 10, three lengths with four programs at about 8 s; 64k full prefill 5 a sample
    'step': 110,      # seven steps of 28 to 36 layers at 10 to 15 s to compile
    'train': 280,     # a call of its own: evaluation 60, training 130, evaluation 60
}
FIRST_CALL = ('card', 'tests', 'kernels', 'ttft', 'step')
_PATIENCE_S = 3.0   # between SIGTERM and SIGKILL
_LAST_CHARS = 3000  # kept of what a part printed


@dataclasses.dataclass(frozen=True)
class Part:
  """A part to run.

  Attributes:
    name: of its file.
    command: what runs it; writes `path` as it goes.
    path: OUT/NAME.json.
    until: seconds from the start of the call at which it is ended.
  """
  name: str
  command: list[str]
  path: pathlib.Path
  until: float


def read(path: pathlib.Path) -> dict:
  """What is known of a part: {} if there is no file yet, or one that is broken."""
  try:
    found = json.loads(path.read_text())
  except (OSError, ValueError):
    return {}
  return found if isinstance(found, dict) else {}


def deadlines(names: list[str], budget: float) -> list[float]:
  """When each part has to end, in seconds from the start: the budget is shared in proportion to SHARES."""
  total, ends, so_far = sum(SHARES.get(name, 60) for name in names), [], 0.0
  for name in names:
    so_far += SHARES.get(name, 60)
    ends.append(budget * so_far / total)
  return ends


def run_part(part: Part, start: float, environ: dict) -> dict:
  """Runs one part to its end, or to its time's. Returns what its file then holds."""
  began = time.monotonic()
  with tempfile.TemporaryFile() as log:
    process = subprocess.Popen(part.command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environ,
                               start_new_session=True)
    try:
      code = process.wait(timeout=max(0.0, start + part.until - _PATIENCE_S - time.monotonic()))
      state = 'done' if code == 0 else 'failed' if code > 0 else f'killed by signal {-code}'
    except subprocess.TimeoutExpired:
      state = 'out of time'
    finally:
      _end(process)   # and what it may have started, also if this process is interrupted
    size = log.seek(0, os.SEEK_END)
    log.seek(max(0, size - 4 * _LAST_CHARS))
    said = log.read().decode(errors='replace')[-_LAST_CHARS:]
  found = {'part': part.name, 'cases': {}} | read(part.path)
  found |= {'state': state, 'seconds': round(time.monotonic() - began, 1), 'command': ' '.join(part.command), 'said': said}
  metrics.write_json(part.path, found)
  return found


def _end(process):
  """Ends the process and all of its group."""
  for sign in (signal.SIGTERM, signal.SIGKILL):
    try:
      os.killpg(process.pid, sign)
    except ProcessLookupError:
      break
    if sign == signal.SIGTERM:
      try:
        process.wait(_PATIENCE_S)
      except subprocess.TimeoutExpired:
        pass
  process.wait()


def failures(found: dict) -> list[str]:
  return [name for name, case in found.get('cases', {}).items() if 'error' in case]


def line_of(name: str, found: dict) -> str:
  """'kernels: done, 12 cases in 140 s; 1 failed: ...'."""
  cases, failed = found.get('cases', {}), failures(found)
  text = f'{name}: {found["state"]}, {len(cases) - len(failed)} of {len(cases)} cases measured, {found["seconds"]:.0f} s'
  if failed:
    text += f'; failed: {failed[0]} ({cases[failed[0]]["error"].strip().splitlines()[-1][:120]})'
  elif found['state'] != 'done':
    text += f'; {(found["said"].strip().splitlines() or ["said nothing"])[-1][:160]}'
  return text


def run(names: list[str], out: pathlib.Path, budget: float, command_of) -> dict[str, dict]:
  """Runs the parts that are not done yet; returns {name: what its file holds}, also of those that were done before.

  Args:
    command_of: (name, path of its file, seconds that it may take) -> what runs the part.
  """
  start, found = time.monotonic(), {name: read(out / f'{name}.json') for name in names}
  missing = [name for name in names if found[name].get('state') != 'done']
  cache = pathlib.Path(tempfile.gettempdir()) / 'blockattn-device-programs'   # a second call need not compile again
  environ = {'JAX_COMPILATION_CACHE_DIR': str(cache), 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '2',
             'XLA_PYTHON_CLIENT_MEM_FRACTION': '0.9'} | os.environ
  for name, until in zip(missing, deadlines(missing, budget), strict=True):
    seconds = until - (time.monotonic() - start)
    path = out / f'{name}.json'
    part = Part(name, command_of(name, path, max(1.0, seconds - 2 * _PATIENCE_S)), path, until)
    print(f'{name}: has {seconds:.0f} s', flush=True)
    # These share the device with others: torch, or the processes that they start.
    shares = {'XLA_PYTHON_CLIENT_PREALLOCATE': 'false'} if name in ('kernels', 'train') else {}
    found[name] = run_part(part, start, environ | shares)
    print(line_of(name, found[name]), flush=True)
  return found


def summary(found: dict[str, dict]) -> str:
  """The last line: what was measured, and what was not."""
  count = lambda f: len(f.get('cases', {})) - len(failures(f))
  done = [f'{name} ({count(f)})' for name, f in found.items() if count(f)]
  left = [f'{name} ({f.get("state", "not run")})' for name, f in found.items() if f.get('state') != 'done']
  return f'measured: {", ".join(done) or "nothing"}' + (f'; left: {", ".join(left)}' if left else '')


def _arguments(argv):
  parser = arguments.Parser(prog='python -m tools.device', description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('out', type=pathlib.Path, help='folder for a JSON file per part')
  parser.add_argument('--budget', type=float, default=560, metavar='S', help='seconds for all (default %(default)s)')
  parser.add_argument('--parts', default=','.join(FIRST_CALL), help=f'of {", ".join(SHARES)} (default %(default)s)')
  parser.add_argument('--toy', action='store_true', help='small sizes, for a CPU')
  parser.add_argument('--impl', help='attention of ttft, step and train (default: gpu where its tests pass, else xla)')
  parser.add_argument('--model', help='train: a GGUF file, or a folder in the Hugging Face format (default: the embedded '
                                      'teacher, on pages of the standard library)')
  parser.add_argument('--data', type=pathlib.Path, help='train: a folder with train*.jsonl[.gz] and test*.jsonl[.gz]')
  options = parser.parse_args(argv)
  options.parts = options.parts.split(',')
  if unknown := [name for name in options.parts if name not in SHARES]:
    parser.error(f'--parts: no part {unknown[0]!r}; choose from {", ".join(SHARES)}')
  if not 5 * _PATIENCE_S <= options.budget < 1e6:
    parser.error(f'--budget {options.budget:g}: give from {5 * _PATIENCE_S:g} seconds on')
  if bool(options.model) != bool(options.data):
    parser.error('--model and --data go together')
  return options


def main(argv=None) -> int:
  options = _arguments(argv)
  options.out.mkdir(parents=True, exist_ok=True)

  def command_of(name, path, seconds):
    given = [f'--{key}={value}' for key in ('impl', 'model', 'data') if (value := getattr(options, key))]
    return [sys.executable, '-m', 'tools.device_parts', name, str(path), f'--seconds={seconds:.0f}', *given,
            *(['--toy'] if options.toy else [])]

  found = run(options.parts, options.out, options.budget, command_of)
  print(summary(found), flush=True)
  return 0 if all(part.get('state') == 'done' for part in found.values()) else 1


if __name__ == '__main__':
  sys.exit(main())
