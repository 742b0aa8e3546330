"""What mkdocs calls when it builds the pages: the config reference is made of the keys and their comments."""

import html

from flax import traverse_util
from mkdocs.structure.files import File

from blockattn import options
from blockattn.train import command, job

TRAINERS = {'distill': 'Block distillation', 'finetune': 'Fine-tuning', 'segment': 'The segmenter'}
_HEAD = """# Config reference

Every key of a config, as `--config.KEY=VALUE` on a trainer's command line. Lists take commas. The values are the
defaults; a config file in `configs/` sets some of them. `python -m blockattn.train.TRAINER --help` prints the same.
"""


def on_files(files, config):
  files.append(File.generated(config, 'reference/config.md', content=reference()))
  return files


def reference() -> str:
  """The page."""
  known = {trainer: trainer_keys(trainer) for trainer in TRAINERS}
  shared = set.intersection(*map(set, known.values()))
  parts = [_HEAD, '## All trainers\n', _tables({key: said for key, said in known['distill'].items() if key in shared})]
  for trainer, title in TRAINERS.items():
    own = {key: said for key, said in known[trainer].items() if key not in shared}
    parts += [f'## {title} {{ #{trainer} }}\n', _tables(own)]
  return '\n'.join(parts)


def trainer_keys(trainer: str) -> dict[str, tuple[str, str]]:
  """{dotted key: (default, meaning)} of a trainer's config, in order."""
  kind = job.module(trainer).Options
  values = traverse_util.flatten_dict(options.defaults(kind), keep_empty_nodes=True, sep='.')
  return {key: (command.shown(values[key]), said) for key, said in options.all_docs(kind).items() if key in values}


def _tables(keys) -> str:
  """A table for each section."""
  sections = {}
  for key, (value, meaning) in keys.items():
    sections.setdefault(key.rpartition('.')[0], []).append(f'| `{key}` | {_code(value)} | {_cell(meaning)} |')
  tables = [f'### {name or "The run"}\n\n| key | default | meaning |\n|---|---|---|\n' + '\n'.join(rows) + '\n'
            for name, rows in sections.items()]
  return '\n'.join(tables)


def _code(value) -> str:
  text = value if len(value) <= 60 else f'{value[:57]}...'
  return f'`{text}`'.replace('|', '\\|') if text else 'empty'


def _cell(text) -> str:
  return html.escape(text, quote=False).replace('|', '\\|')
