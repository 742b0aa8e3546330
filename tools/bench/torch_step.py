"""Training steps as a user writes them in torch, on transformers' model: the peers of `tools.bench step --torch`."""

import functools
import importlib.util
from collections.abc import Callable

import jax
import numpy as np

from blockattn import blocks
from blockattn.hf import adapter, config as hf_config, files
from blockattn.models import lora, transformer

FULL, LORA, DISTILLED = 'torch, full fine-tuning', 'torch, LoRA of rank 16 (peft)', 'torch, distillation'


def calls(cfg: transformer.ModelConfig, batch: dict, low_rank: lora.LoraOptions,
          lr: float) -> dict[str, Callable[[], Callable[[], float]]]:
  """name -> () -> call, which makes one step of AdamW in float32 and gives its loss; LoRA only where peft is installed.

  Fine-tuning has a loss on all tokens. Distillation has one on those of the last blocks, whose logits alone are made; the
  teacher is the same model with full attention, the student reads the block mask, dense, through torch's
  scaled_dot_product_attention. There are no sinks.
  """
  import torch
  import torch.nn.functional as F
  layout = jax.device_get(batch['layout'])
  tokens, targets = (torch.tensor(np.asarray(batch[name]), dtype=torch.long) for name in ('tokens', 'targets'))
  text, reads = (torch.tensor(np.asarray(mask)) for mask in (batch['text'], batch['text'] & layout.reader))
  mask = torch.tensor(np.asarray(blocks.may_attend(layout)))[:, None]

  def step_of(model, loss):
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0, fused=True)

    def step():
      optimizer.zero_grad(set_to_none=True)
      value = loss(model)
      value.backward()
      torch.nn.utils.clip_grad_norm_(trained, 1.0)
      optimizer.step()
      return value.item()
    return step

  def cross_entropy(model):
    return F.cross_entropy(model(tokens, use_cache=False).logits[text], targets[text])

  def divergence(model, teacher):
    with torch.no_grad():
      said = F.log_softmax(teacher.lm_head(teacher.model(tokens, use_cache=False)[0][reads]), dim=-1)
    student = model.model(tokens, attention_mask=mask, use_cache=False)[0][reads]
    return F.kl_div(F.log_softmax(model.lm_head(student), dim=-1), said, reduction='batchmean', log_target=True)

  def adapted():
    import peft
    said = adapter.to_dict(cfg, low_rank, '')
    config = peft.LoraConfig(r=said['r'], lora_alpha=said['lora_alpha'], target_modules=said['target_modules'])
    return peft.get_peft_model(_model(cfg), config)

  made = {FULL: lambda: step_of(_model(cfg), cross_entropy),
          DISTILLED: lambda: step_of(_model(cfg), functools.partial(divergence, teacher=_model(cfg).eval()))}
  if importlib.util.find_spec('peft') is not None:
    made[LORA] = lambda: step_of(adapted(), cross_entropy)
  return made


def _model(cfg):
  import transformers
  made = hf_config.to_dict(cfg, 'float32', dict.fromkeys(files.TOKEN_IDS))
  config = transformers.AutoConfig.for_model(**made)
  return transformers.AutoModelForCausalLM.from_config(config, attn_implementation='sdpa')
