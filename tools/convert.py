"""Hugging Face folders and GGUF files <-> checkpoints.

  python -m tools.convert from_hf Qwen/Qwen3-4B-Instruct-2507 work/qwen3
  python -m tools.convert from_hf model-Q4_K_M.gguf work/qwen3
  python -m tools.convert to_hf work/distilled exported --step 2000   # default: WORKDIR/best, else the newest checkpoint
  python -m tools.convert to_peft work/lora adapter

Weights keep their dtype, unless --dtype says another; what that rounds is said.

`from_hf` makes a work directory of step 0: `checkpoints/0` holds the parameters and what the model is, `hf` the
tokenizer and config files, so that `to_hf` needs nothing else. Quantized weights of a GGUF file become float32.

`to_hf` takes any trainer's work directory: the tokenizer comes from its `hf` folder, else from the model that the run
started from, else from --source. With --wrappers it writes the learned sinks and tails alone, some rows that are read beside
the model that the run started from. `to_peft` writes what a LoRA run has trained, as an adapter that PEFT adds to that
model.
"""

import contextlib
import dataclasses
import pathlib
import resource
import sys

import jax
import tokenizers
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from blockattn import checkpoint, loading, mesh
from blockattn.data import encode
from blockattn.errors import UserError
from blockattn.hf import adapter, card as card_lib, config, convert, files, gguf, names
from blockattn.models import lora, spec
from blockattn.train import export
from tools import arguments

_WRAPPERS_CARD = '''# Learned sinks and tails

{rows} embedding rows that were trained beside {source}, whose weights stay as they are. The commands of
`blockattn` read this folder as a model; `blockattn.json` says where the other weights are, and how the rows are used.
'''


def from_hf(source: str, out: str, dtype: str | None = None, overwrite: bool = False):
  """Hugging Face folder, hub name or GGUF file -> work directory `out` with a checkpoint of step 0.

  Args:
    dtype: of the checkpoint; None: the smaller of float32 and bfloat16 that rounds nothing.

  Raises:
    FileExistsError, FileNotFoundError, ValueError: naming the file and the key at fault; `out` is then untouched.
  """
  if files.is_gguf(source):
    _from_gguf(source, out, dtype, overwrite)
    return
  folder = files.locate(source)
  _check_tokenizer(folder, config.read(folder))
  stored = convert.stored_dtypes(folder)
  dtype = dtype or convert.dtype_for(stored)
  _say_rounding(stored, dtype)
  with files.new_folder(pathlib.Path(out), overwrite) as new:
    (new / 'hf').mkdir()
    files.copy_companions(folder, new / 'hf', also=('config.json', files.META, files.CARD))
    with _progress(f'reading {folder}') as report:
      cfg, params = convert.load(folder, dtype, report=report)
    _save_first(new, source, cfg, params, export.carried(config.read_meta(folder)))


def _from_gguf(source, out, dtype, overwrite):
  with gguf.opened(source) as model:
    stored = convert.dtypes(model.stored)
    dtype = dtype or convert.dtype_for(stored)
    _say_rounding(stored, dtype)
    with files.new_folder(pathlib.Path(out), overwrite) as new:
      (new / 'hf').mkdir()
      gguf.write_companions(model, new / 'hf', dtype)
      with _progress(f'reading {source}') as report:
        params = gguf.load(model, dtype, report)
      _save_first(new, source, model.cfg, params, {})


def _save_first(new, source, cfg, params, carried):
  """The checkpoint of step 0."""
  meta = {'kind': 'from_hf', 'blocks': None} | carried
  meta |= {'source': str(source), 'source_weights': convert.weights_facts(params), 'model': dataclasses.asdict(cfg)}
  checkpoint.save_params(new / loading.CHECKPOINTS, params, meta)


def to_hf(workdir: str, out: str, dtype: str | None = None, step: int | None = None, source: str | None = None,
          card: str | None = None, overwrite: bool = False, wrappers: bool = False):
  """A checkpoint of `workdir`, by default see `loading.checkpoint_of`, -> Hugging Face folder `out`; None: in its own
  dtype. `wrappers`: the learned sinks and tails alone, of a run that trained nothing else."""
  checkpoints, step = loading.checkpoint_of(workdir, step)
  meta = checkpoint.load_meta(checkpoints, step)
  companions = _companions(pathlib.Path(workdir), meta, source)
  files.check_free(pathlib.Path(out), overwrite)
  if wrappers and (not meta.get('lora') or meta['lora']['targets']):
    raise UserError(f'--wrappers: {workdir} trained more than wrappers (config.model.train_only); export all of it')
  if wrappers:
    _check_base(workdir, source or meta['source'], 'wrappers cannot stand beside')
  config.check_exportable(loading.model_of(meta))
  _check_tokenizer(companions, loading.model_of(meta))
  stored = _stored_dtypes(checkpoints, step, loading.model_of(meta))
  dtype = dtype or convert.dtype_for(stored)
  _say_rounding(stored, dtype)
  one = mesh.Placement(mesh.make_mesh({}, jax.local_devices(backend='cpu')[:1]))
  cfg, params, _ = loading.load_run(workdir, dtype, one, step, source)
  carried = export.carried(meta)
  card = pathlib.Path(card).read_text(encoding='utf-8') if card else (
      _WRAPPERS_CARD.format(rows=cfg.learned_sinks, source=carried['source']) if wrappers else card_lib.text(
          cfg, carried | {'source': meta.get('source')}, companions, facts=export.training_facts(pathlib.Path(workdir))))
  if wrappers:
    convert.save_wrappers(params['sinks'], cfg, out, source=companions, card=card, overwrite=overwrite,
                          meta=carried | {'source': _absolute(source or meta['source'])})
    return
  with _progress(f'writing {out}') as report:
    convert.save(params, cfg, out, source=companions, meta=carried, dtype=dtype, overwrite=overwrite, report=report,
                 card=card)


def to_peft(workdir: str, out: str, dtype: str | None = None, step: int | None = None, source: str | None = None,
            card: str | None = None, overwrite: bool = False):
  """What a LoRA run has trained -> adapter in PEFT's format. `source`: the model that it adds to, if it has moved; the
  others as of `to_hf`."""
  checkpoints, step = loading.checkpoint_of(workdir, step)
  meta = checkpoint.load_meta(checkpoints, step)
  cfg, base = loading.model_of(meta), source or meta['source']
  options = lora.LoraOptions(**meta['lora']) if meta.get('lora') else None
  adapter.check(cfg, options)
  _check_base(workdir, base, 'PEFT cannot load')
  companions = _companions(pathlib.Path(workdir), meta, source)
  files.check_free(pathlib.Path(out), overwrite)
  stored = [convert.DTYPES[name] for name in checkpoint.param_dtypes(checkpoints, step).values()]
  dtype = dtype or convert.dtype_for(stored)
  _say_rounding(stored, dtype)
  one = mesh.Placement(mesh.make_mesh({}, jax.local_devices(backend='cpu')[:1]))
  trained = checkpoint.load_params(checkpoints, spec.abstract(lora.spec(cfg, options), dtype, one), step)
  carried = export.carried(meta)
  card = pathlib.Path(card).read_text(encoding='utf-8') if card else card_lib.adapter_text(
      cfg, carried, str(base), companions, facts=export.training_facts(pathlib.Path(workdir)))
  adapter.save(trained, cfg, options, out, base=str(base), source=companions, meta=carried, card=card, dtype=dtype,
               overwrite=overwrite)


def _absolute(source):
  """A folder's path from anywhere on this machine; a hub name."""
  return str(pathlib.Path(source).resolve()) if pathlib.Path(source).is_dir() else source


def _stored_dtypes(checkpoints, step, cfg) -> list[str]:
  """The dtype of each tensor that a checkpoint becomes, as safetensors calls it. What a LoRA student adds to counts as what
  it has trained."""
  known = checkpoint.param_dtypes(checkpoints, step)
  trained = next(iter(known.values()))
  return [convert.DTYPES[known.get(slot.name, trained)] for slot in names.slots(cfg).values()]


def _say_rounding(stored, dtype):
  if said := convert.rounding(stored, dtype):
    print(f'{said}, as --dtype {dtype} says')


def _check_base(workdir, base, why):
  """Raises ValueError if a student of part of a model adds to a run."""
  if loading.find(base).is_run:
    raise UserError(f'{workdir} adds to the run {base}, which {why}: export that one (to_hf), and name the folder with '
                    '--source')


def _companions(workdir, meta, source):
  """The folder that tokenizer files are copied from."""
  if source:
    return files.locate(loading.tokenizer_of(source))
  if (workdir / 'hf').is_dir():
    return workdir / 'hf'
  if meta.get('source'):
    try:
      return files.locate(loading.tokenizer_of(meta['source']))
    except FileNotFoundError as error:
      raise FileNotFoundError(f'{workdir} started from {meta["source"]}, which is not there now: say where it is with '
                              f'--source ({error})') from error
  raise FileNotFoundError(f'{workdir} holds no hf folder with a tokenizer, and the run did not start from a model; '
                          'name one with --source')


def _check_tokenizer(folder, cfg):
  """Raises ValueError if its tokenizer has tokens that the model has no rows for."""
  if (folder / 'tokenizer.json').is_file():
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / 'tokenizer.json'))
    encode.check_tokenizer(tokenizer, cfg.vocab, str(folder / 'tokenizer.json'), cfg.learned_sinks)


@contextlib.contextmanager
def _progress(title):
  """A bar on the terminal; yields the callback that moves it."""
  columns = (TextColumn(title), BarColumn(), DownloadColumn(), TimeRemainingColumn())
  with Progress(*columns) as bars:
    task = bars.add_task(title, total=None)
    yield lambda done, total: bars.update(task, completed=done, total=total)


def run(options: dict) -> None:
  command = {'from_hf': from_hf, 'to_hf': to_hf, 'to_peft': to_peft}[options.pop('command')]
  with jax.default_device(jax.local_devices(backend='cpu')[0]):   # nothing is computed: leave accelerators alone
    command(**options)
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)
  print(f'wrote {options["out"]}; peak memory {peak / 2**30:.2f} GiB')


def main(argv: list[str] | None = None) -> int:
  parser = arguments.Parser(prog='python -m tools.convert', description=__doc__)
  commands = parser.add_subparsers(dest='command', required=True)
  for name, first in (('from_hf', 'source'), ('to_hf', 'workdir'), ('to_peft', 'workdir')):
    command = commands.add_parser(name)
    command.add_argument(first)
    command.add_argument('out')
    command.add_argument('--dtype', choices=sorted(convert.DTYPES), help='of the weights written (default: that of '
                         'the weights read, so that nothing is rounded)')
    command.add_argument('--overwrite', action='store_true', help='replace OUT if it is there')
    if first == 'workdir':
      command.add_argument('--step', type=int, help='default: the best one that the run kept, else the newest')
      command.add_argument('--source', help='the model that a LoRA run started from, or the folder or hub name to copy the '
                           'tokenizer from')
      command.add_argument('--card', help='file that becomes README.md')
    if name == 'to_hf':
      command.add_argument('--wrappers', action='store_true', help='learned sinks and tails alone, to be read beside the '
                           'model that the run started from (config.model.train_only=wrappers)')
  options = parser.parse_args(argv)
  return arguments.run('convert', lambda: run(vars(options)))


if __name__ == '__main__':
  sys.exit(main())
