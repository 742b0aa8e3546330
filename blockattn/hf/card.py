"""README.md of an exported model: what the hub reads of it, and what a person has to know."""

import pathlib
import re
from collections.abc import Mapping
from typing import Any

import huggingface_hub
import yaml

from blockattn.hf import config, files
from blockattn.models.classifier import ClassifierConfig
from blockattn.models.transformer import ModelConfig

# What a model takes over from the card of the one that it began as.
_INHERITED = ('license', 'license_name', 'license_link', 'language')
_HUB_NAME = re.compile(r'([\w-][\w.-]*/[\w-][\w.-]*)(@[\w./-]+)?')

_ENGINE = '''
The passages' keys and values are computed once, and reused in every prompt that holds them:

```sh
python -m tools.generate FOLDER passage.txt another.txt --question 'What ...?' --cache ~/blocks
```

In transformers, with torch:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

from blockattn import hf
from blockattn.hf import config

folder = 'FOLDER'   # where this file is
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
options = config.block_options(config.read_meta(folder))
texts = ['A passage.\\n\\n', 'Another one.\\n\\n', 'Question: What ...?\\nAnswer:']   # the last one reads all others
prompt = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
states = {}   # keep it: a passage that it holds is not read again
answer = hf.cached_generate(model, prompt, options, cache=states, max_new_tokens=64)
print(tokenizer.decode(answer[0]))
```

Loaded without `blockattn`, the model attends to the whole prompt.
'''
_ADAPTER = '''
```python
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained('FOLDER').merge_and_unload()   # where this file is
```

The model then answers prompts of blocks by `blockattn.hf.cached_generate`; without `blockattn` it attends to whole prompts.
'''
_SEGMENTER = '''
```sh
python -m tools.segment text.txt --model FOLDER --target-tokens 512
```

```python
import blockattn

text = open('text.txt').read()
print([text[start:stop] for start, stop in blockattn.segment(text, model='FOLDER')])
```
'''


def text(cfg: ModelConfig, meta: Mapping[str, Any], origin: pathlib.Path | None = None, *, title: str = '',
         facts: Mapping[str, Any] | None = None) -> str:
  """The card of a model.

  Args:
    meta: what its blockattn.json says (kind, blocks, step, ...), with the `source` as the run was given it.
    origin: folder of the model that it began as, whose card says under which licence; None: not known.
    facts: of its training, by name.
  """
  is_segmenter = isinstance(cfg, ClassifierConfig)
  source = meta.get('source') or ''
  head = front_matter(source, origin, 'token-classification' if is_segmenter else 'text-generation',
                      'text-segmentation' if is_segmenter else 'block-attention')
  said = {'architecture': config.architecture(cfg), 'trained by': meta.get('kind'), 'step': meta.get('step'),
          'began as': _hub_name(source) or pathlib.Path(source).name or None}   # a path of this machine says nothing
  parts = [f'---\n{head}---\n', f'# {title or ("Segmenter" if is_segmenter else "Block attention model")}\n', _list(said),
           '## Use\n\nWith `blockattn` installed (`tools` stand in its checkout), FOLDER being where this file is.\n'
           f'{_SEGMENTER if is_segmenter else _ENGINE}']
  if not is_segmenter:
    parts.append(f'## Blocks\n\n{_blocks(cfg, meta.get("blocks"))}')
  if facts:
    parts.append(f'## Training\n\n{_list(facts)}')
  return '\n'.join(parts)


def adapter_text(cfg: ModelConfig, meta: Mapping[str, Any], base: str, origin: pathlib.Path | None = None, *,
                 facts: Mapping[str, Any] | None = None) -> str:
  """The card of an adapter to the model `base`; the other arguments as of `text`."""
  head = front_matter(base, origin, 'text-generation', 'block-attention', library='peft')
  parts = [f'---\n{head}---\n', '# Adapter for block attention\n',
           _list({'trained by': meta.get('kind'), 'step': meta.get('step'), 'adds to': _hub_name(base)}),
           f'## Use\n{_ADAPTER}', f'## Blocks\n\n{_blocks(cfg, meta.get("blocks"))}']
  if facts:
    parts.append(f'## Training\n\n{_list(facts)}')
  return '\n'.join(parts)


def front_matter(source: str, origin: pathlib.Path | None, task: str, tag: str, library: str = 'transformers') -> str:
  """The YAML at the top, which the hub reads: licence and languages are those of the model that it began as."""
  said = _said(origin)
  data = {name: said[name] for name in _INHERITED if said.get(name)}
  # A folder's name says nothing to others; its card may say what it is.
  if base := _hub_name(source) or said.get('base_model'):
    data['base_model'] = base
  return yaml.safe_dump(data | {'library_name': library, 'pipeline_tag': task, 'tags': [tag]}, sort_keys=False,
                        allow_unicode=True)


def _said(origin: pathlib.Path | None) -> dict:
  """The YAML of a model's card; {} where there is none that can be read."""
  path = None if origin is None else origin / files.CARD
  if path is None or not path.is_file():
    return {}
  try:
    return huggingface_hub.metadata_load(path) or {}
  except (ValueError, yaml.YAMLError):   # it is not ours to mend
    return {}


def _hub_name(source: str) -> str | None:
  found = _HUB_NAME.fullmatch(source)
  return found[1] if found and not pathlib.Path(source).exists() else None


def _blocks(cfg: ModelConfig, said: Mapping[str, Any] | None) -> str:
  if said is None:
    return f'It was never trained in blocks; `{files.META}` asks for no sinks.\n'
  ids = list(said['sink_ids'])
  lines = _list({'sinks in front of every block': f'{len(ids)}, token ids {ids}' if ids else 0,
                 'learned tokens behind every context block': len(said.get('tail_ids', ())) or None,
                 'seam tokens that are read again': said.get('seam') or None,
                 'positions': said['positions'], 'most blocks of a row in training': said['max_blocks']})
  learned = (f'\nThe last {cfg.learned_sinks} token ids, from {cfg.vocab} on, are learned sinks: they are never generated.\n'
             if cfg.learned_sinks else '')
  return f'{lines}{learned}\n`{files.META}` says the same to programs.\n'


def _list(facts: Mapping[str, Any]) -> str:
  return ''.join(f'- {name}: {value}\n' for name, value in facts.items() if value is not None)
