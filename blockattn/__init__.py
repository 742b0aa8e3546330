"""Block attention for long prompts: what one wants first. Everything is loaded when it is first asked for.

  block_attention     attention under a BlockLayout, in a model of one's own
  BlockLayout, from_lengths, may_attend, picture    who may attend to whom, and a drawing of it
  distillation_loss   KL to a full-attention teacher, tokens weighted by what blocks cost them
  segment, segment_many    text cut into blocks
  load                a model from a folder, a hub name or a work directory, as a Loaded
  Engine, Request, Store    answers over cached blocks
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = '0.1.0'

if TYPE_CHECKING:
  from blockattn.blocks import BlockLayout, from_lengths, may_attend, picture
  from blockattn.inference.cache import Store
  from blockattn.inference.engine import Engine
  from blockattn.inference.plan import Request
  from blockattn.kernels.api import block_attention
  from blockattn.loading import Loaded, load
  from blockattn.losses import distillation_loss
  from blockattn.segmentation.api import segment, segment_many

__all__ = ['BlockLayout', 'Engine', 'Loaded', 'Request', 'Store', 'block_attention', 'distillation_loss', 'from_lengths',
           'load', 'may_attend', 'picture', 'segment', 'segment_many']

_HOME = {   # where each name comes from
    **dict.fromkeys(('BlockLayout', 'from_lengths', 'may_attend', 'picture'), 'blocks'),
    'Engine': 'inference.engine', 'Request': 'inference.plan', 'Store': 'inference.cache',
    'block_attention': 'kernels.api', 'distillation_loss': 'losses',
    **dict.fromkeys(('Loaded', 'load'), 'loading'), **dict.fromkeys(('segment', 'segment_many'), 'segmentation.api')}


def __getattr__(name: str) -> Any:
  if name not in _HOME:
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  return getattr(importlib.import_module(f'{__name__}.{_HOME[name]}'), name)


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__})
