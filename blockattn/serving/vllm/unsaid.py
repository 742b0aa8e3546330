"""Learned sinks and tails are rows of the embedding, to which vLLM gives logits as to any; they are never generated."""

import torch
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor

from blockattn.hf import config


class Unsaid(LogitsProcessor):
  """`--logits-processors blockattn.serving.vllm.unsaid:Unsaid`."""

  def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool):
    self._said = config.read(vllm_config.model_config.model).vocab

  def apply(self, logits: torch.Tensor) -> torch.Tensor:
    logits[:, self._said:] = -torch.inf
    return logits

  def is_argmax_invariant(self) -> bool:
    return False

  def update_state(self, batch_update: BatchUpdate | None) -> None:
    pass
