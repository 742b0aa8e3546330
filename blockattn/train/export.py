"""What a run says of itself in the Hugging Face folders that are made of it, and those that it makes while it trains."""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from blockattn import disk, loading, options as options_lib
from blockattn.hf import card as card_lib, config as hf_config, convert, files
from blockattn.models import transformer
from blockattn.train import loop

# What blockattn.json of an export takes over from a checkpoint's meta.
CARRIED = ('source', 'source_weights', 'teacher', 'teacher_weights', 'kind', 'blocks', 'prompt', 'step', 'segmenter')
# And what its card says of the run's config.
_SHOWN = ('steps', 'batch', 'seed', 'data.kind', 'data.length', 'optim.lr', 'distill.temperature', 'distill.ce_weight',
          'distill.drop_rate', 'distill.drop_mode', 'distill.weights.form', 'finetune.mode', 'lora.rank')
EXPORTS = 'exports'   # folder of a workdir


def carried(meta: Mapping[str, Any]) -> dict:
  """What blockattn.json of an export says of the meta of its checkpoint."""
  kept = {key: meta[key] for key in CARRIED if key in meta}
  for key in ('source', 'teacher'):
    if key in kept and pathlib.Path(kept[key]).exists():
      kept[key] = pathlib.Path(kept[key]).name   # a path of this machine says nothing to others
  return kept


def training_facts(workdir: pathlib.Path) -> dict:
  """What the card says of the training: the values of its config that decide most, and the commit that it ran at."""
  facts = {}
  if (workdir / 'config.json').exists():
    said = options_lib.flat(disk.read_json(workdir / 'config.json'))
    facts |= {key: said[key] for key in _SHOWN if key in said}
  if (workdir / 'run.json').exists():
    facts['commit of blockattn'] = disk.read_json(workdir / 'run.json').get('commit')
  return facts


class Exports(loop.Watch):
  """Writes the model as WORKDIR/exports/step_N every few steps, each folder in one move.

  Args:
    every: steps between two.
    workdir: of the run.
    cfg: the trained model.
    whole: trained parameters -> the model's, those of a LoRA student merged.
    source: folder with the tokenizer.
    meta: what checkpoints say of the model.
    dtype: of the weights in the files.

  Raises:
    ValueError: no Hugging Face class has this architecture.
  """

  def __init__(self, every: int, workdir, cfg: transformer.ModelConfig, *, whole: Callable[[Any], Any],
               source: pathlib.Path, meta: dict, dtype: str):
    hf_config.check_exportable(cfg)
    self._every, self._workdir, self._cfg, self._whole = every, pathlib.Path(workdir), cfg, whole
    self._source, self._meta, self._dtype = source, meta, dtype

  def due(self, step):
    return step % self._every == 0

  def __call__(self, step, state):
    said = carried(self._meta | {'step': step})
    card = card_lib.text(self._cfg, said | {'source': self._meta.get('source')}, self._source,
                         facts=training_facts(self._workdir))
    folder = self._workdir / EXPORTS / f'step_{step}'
    convert.save(self._whole(state.params), self._cfg, folder, source=self._source, meta=said, card=card, dtype=self._dtype,
                 overwrite=True)
    return f'exported to {folder}', {}


def make(options, made, workdir, *, whole: Callable[[Any], Any], meta: dict) -> list[loop.Watch]:
  """The `Exports` of a run, [] without export_every. `options` is a job.PromptOptions, `made` its job.Job."""
  if not options.export_every:
    return []
  source = files.locate(loading.tokenizer_of(options.data.tokenizer or options.model.source))
  return [Exports(options.export_every, workdir, made.cfg, whole=whole, source=source, meta=meta, dtype=options.model.dtype)]
