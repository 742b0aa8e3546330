"""The KV connector that vLLM is given: `wanted` where requests are scheduled, `pages` where the model runs."""

import re
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorRole
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import Request

from blockattn.errors import UserError
from blockattn.inference import cache
from blockattn.serving.vllm import student
from blockattn.serving.vllm.messages import Caught, Step
from blockattn.serving.vllm.metrics import BlockMetrics, BlockStats
from blockattn.serving.vllm.pages import Pages
from blockattn.serving.vllm.wanted import Wanted

SCHEDULER = 'BlockScheduler'
DTYPES = {torch.float32: 'float32', torch.bfloat16: 'bfloat16'}


class BlockConnector(KVConnectorBase_V1):
  """Reuses blocks of prompts. `kv_connector_extra_config` is what `cache.Store` takes: folder, memory_bytes, disk_bytes,
  quantize."""
  wanted: Wanted   # where requests are scheduled
  pages: Pages     # where the model runs, once it has pages

  def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig):
    super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
    options = student.read_options(vllm_config.model_config.model)
    check_config(vllm_config)
    if role is KVConnectorRole.SCHEDULER:
      model, store = vllm_config.model_config, cache.Store(**self._kv_transfer_config.kv_connector_extra_config)
      cfg, keys = student.read_keys(model.model, DTYPES[model.dtype], store.quantize)
      self.wanted = Wanted(options, cfg, keys, store, vllm_config.cache_config.block_size)

  @property
  def requires_kv_delivery(self) -> bool:
    return False   # a block that is not kept is computed again

  @classmethod
  def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
    return True   # keys and values are caught between the graph's pieces

  def shutdown(self):
    if self.role is KVConnectorRole.SCHEDULER:
      self.wanted.close()

  # Metrics.

  def get_kv_connector_stats(self) -> BlockStats | None:
    side = self.wanted if self.role is KVConnectorRole.SCHEDULER else self.pages
    return BlockStats(counted) if (counted := side.take_counted()) else None

  @classmethod
  def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> BlockStats:
    return BlockStats(data or {})

  @classmethod
  def build_prom_metrics(cls, *args: Any) -> BlockMetrics:
    return BlockMetrics(*args)

  # Where requests are scheduled.

  def on_new_request(self, request: Request) -> None:
    self.wanted.arrived(request)

  def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
    return self.wanted.matched(request, num_computed_tokens), False

  def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int):
    self.wanted.allocated(request, blocks.get_block_ids()[0], num_external_tokens)

  def build_connector_meta(self, scheduler_output: SchedulerOutput) -> Step:
    pages_of = lambda name: self._kv_cache_manager.get_block_ids(name)[0]
    return self.wanted.step(scheduler_output.num_scheduled_tokens, pages_of)

  def update_connector_output(self, connector_output: KVConnectorOutput):
    if isinstance(connector_output.kv_connector_worker_meta, Caught):
      self.wanted.caught(connector_output.kv_connector_worker_meta)

  def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
    self.wanted.finished(request)
    return False, None

  # Where the model runs.

  def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]):
    layers = self._vllm_config.compilation_config.static_forward_context
    self.pages = Pages(self._vllm_config, {name: layers[name] for name in kv_caches})

  def bind_connector_metadata(self, connector_metadata: Step) -> None:
    super().bind_connector_metadata(connector_metadata)
    self.pages.begin(connector_metadata)

  def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
    self.pages.load()

  def wait_for_layer_load(self, layer_name: str) -> None:
    pass   # all layers are loaded before the first

  def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
    pass   # caught on their way into the pages

  def wait_for_save(self):
    self.pages.end()

  def get_block_ids_with_load_errors(self) -> set[int]:
    return self.pages.take_broken()

  def build_connector_worker_meta(self) -> Caught | None:
    return self.pages.take_caught()


def _name(said: Any) -> str:
  """Of a class, or of the path of one."""
  return re.split('[.:]', getattr(said, '__name__', str(said)))[-1]


def check_config(config: VllmConfig) -> None:
  """Raises ValueError of what would give wrong answers, or none."""
  parallel, model = config.parallel_config, config.model_config
  scheduler = config.scheduler_config.scheduler_cls
  heads = model.get_total_num_kv_heads()
  wrong = {
      f'the scheduler is {scheduler}: add --scheduler-cls blockattn.serving.vllm.scheduler.{SCHEDULER}, or start with '
      'python -m blockattn.serving.vllm': _name(scheduler) != SCHEDULER,
      'answers might hold learned sinks: add --logits-processors blockattn.serving.vllm.unsaid:Unsaid':
          'Unsaid' not in map(_name, model.logits_processors or ()),
      f'dtype {model.dtype}: give --dtype float32 or bfloat16': model.dtype not in DTYPES,
      'adapters change the states of blocks: merge them and serve without --enable-lora': config.lora_config is not None,
      'speculative decoding has a model whose pages nobody fills: serve without': config.speculative_config is not None,
      'layers divided over devices are not served yet: give --pipeline-parallel-size 1': parallel.pipeline_parallel_size > 1,
      'contexts divided over devices are not served yet: give --decode-context-parallel-size 1':
          parallel.decode_context_parallel_size > 1,
      f'{heads} key and value heads cannot be divided over {parallel.tensor_parallel_size} devices evenly: give a '
      '--tensor-parallel-size that divides them': bool(heads % parallel.tensor_parallel_size),
      'what cannot be loaded would be read with full attention: leave kv_load_failure_policy at "fail"':
          config.kv_transfer_config.kv_load_failure_policy != 'fail'}
  for line, is_wrong in wrong.items():
    if is_wrong:
      raise UserError(f'BlockConnector: {line}')
