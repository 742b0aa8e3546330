"""What became of blocks, in vLLM's log and on its page of metrics."""

from typing import Any

from prometheus_client import Counter
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats
from vllm.v1.metrics.utils import create_metric_per_engine

COUNTED = {
    'blocks_memory': 'Blocks that were found in host memory.',
    'blocks_disk': 'Blocks that were found on disk.',
    'blocks_computed': 'Blocks that were read by the model.',
    'loaded_bytes': 'Bytes of states of which prompts were made.',
    'load_seconds': 'Seconds that writing states into pages took.'}


class BlockStats(KVConnectorStats):
  """Sums since the last look, by the names of COUNTED; `data` is {name: number}."""

  def reset(self):
    self.data = {}

  def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
    for name, value in other.data.items():
      self.data[name] = self.data.get(name, 0) + value
    return self

  def reduce(self) -> dict[str, int | float]:
    return self.data

  def is_empty(self) -> bool:
    return not self.data


class BlockMetrics(KVConnectorPromMetrics):
  """`vllm:blockattn_blocks_memory_total` and its like."""

  def __init__(self, *args: Any):
    super().__init__(*args)
    self._counters = {name: create_metric_per_engine(self._counter(name, text), self.per_engine_labelvalues)
                      for name, text in COUNTED.items()}

  def _counter(self, name, text) -> Counter:
    return self._counter_cls(name=f'vllm:blockattn_{name}', documentation=text, labelnames=self._labelnames)

  def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0):
    for name, value in transfer_stats_data.items():
      self._counters[name][engine_idx].inc(value)
