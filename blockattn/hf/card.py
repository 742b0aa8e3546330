"""README.md of an exported model: what the hub reads of it, and what a person has to know."""

import pathlib
from collections.abc import Mapping
from typing import Any

import huggingface_hub
import yaml

from blockattn import hub
from blockattn.hf import config, files
from blockattn.models.classifier import ClassifierConfig
from blockattn.models.transformer import ModelConfig

# What a model takes over from the card of the one that it began as.
_INHERITED = ('license', 'license_name', 'license_link', 'language')

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
_ADAPTER = '''```python
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
  use = 'With `blockattn` installed (`tools` stand in its checkout), FOLDER being where this file is.\n'
  return _card(head, title or ('Segmenter' if is_segmenter else 'Block attention model'), _list(said),
               Use=use + (_SEGMENTER if is_segmenter else _ENGINE),
               Blocks=None if is_segmenter else _blocks(cfg, meta.get('blocks')), Training=_list(facts or {}))


def adapter_text(cfg: ModelConfig, meta: Mapping[str, Any], base: str, origin: pathlib.Path | None = None, *,
                 facts: Mapping[str, Any] | None = None) -> str:
  """The card of an adapter to the model `base`; the other arguments as of `text`."""
  head = front_matter(base, origin, 'text-generation', 'block-attention', library='peft')
  said = {'trained by': meta.get('kind'), 'step': meta.get('step'), 'adds to': _hub_name(base)}
  return _card(head, 'Adapter for block attention', _list(said), Use=_ADAPTER, Blocks=_blocks(cfg, meta.get('blocks')),
               Training=_list(facts or {}))


def _card(head: str, title: str, said: str, **sections: str | None) -> str:
  """A card of the sections that hold something, each under its name."""
  return '\n'.join([f'---\n{head}---\n', f'# {title}\n', said,
                    *(f'## {name}\n\n{section}' for name, section in sections.items() if section)])


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
  return hub.split(source)[0] if hub.is_name(source) and not pathlib.Path(source).exists() else None


def _blocks(cfg: ModelConfig, said: Mapping[str, Any] | None) -> str:
  if said is None:
    return f'It was never trained in blocks; `{files.META}` asks for no sinks.\n'
  ids = lambda of: f'{len(of)}, token ids {list(of)}' if of else None
  alone = 'read by itself alone'
  behind, align, seam = 'links' if said.get('links') else 'tails', said.get('align', 1), said.get('seam')
  overlap = said.get('overlap')
  kinds = {'sinks': said['sink_ids'], behind: said.get('tail_ids', ())}
  lines = _list({
      'sinks in front of every block': ids(kinds['sinks']) or 0,
      'more of the first sink': f'until a block but the last has a multiple of {align} tokens' if align > 1 else None,
      'tails, the last tokens of every block but the last one': None if behind == 'links' else ids(kinds[behind]),
      'links behind every block but the last, which read all before them': ids(kinds[behind]) if behind == 'links' else None,
      'first tokens of a block that are read again behind those before it': f'{seam}, or as a prompt asks' if seam else None,
      'sinks, or without any the first token, of a block but the first': alone if said.get('hide_starts') else None,
      'last tokens of the block before that a block of the same text is read behind': (
          f'{overlap}, which no other block sees; `Continued` lists of token ids (blockattn.blocks) are such blocks'
          if overlap else None),
      'first block': 'read by all behind it' if said.get('shared_first') else None,
      'positions': said['positions'], 'most blocks of a row in training': said['max_blocks']})
  own = ' and '.join(name for name, of in kinds.items() if max(of, default=0) >= cfg.vocab)
  learned = (f'\nThe last {cfg.learned_sinks} token ids, from {cfg.vocab} on, are learned {own}: they are never generated.\n'
             if cfg.learned_sinks else '')
  return f'{lines}{learned}\n`{files.META}` says the same to programs.\n'


def _list(facts: Mapping[str, Any]) -> str:
  return ''.join(f'- {name}: {value}\n' for name, value in facts.items() if value is not None)
