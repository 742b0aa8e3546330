"""vLLM's scheduler, which lets the connector add requests: the blocks that nobody has computed.

A connector cannot do so by itself. What sends missing blocks in front of the engine, a client or a plugin, has to know what
the store holds, runs once in every API server, and waits for the way there and back. Here one place sees all requests: a
block is computed once for all who wait for it, in the same batches as everything else, and whoever calls the engine, `LLM`,
`AsyncLLM` or a server, does nothing. Front ends ignore what is generated for requests that are not theirs.
"""

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from blockattn.serving.vllm.connector import BlockConnector


class BlockScheduler(AsyncScheduler):

  def __init__(self, *args: Any, **kwargs: Any):
    super().__init__(*args, **kwargs)
    if isinstance(self.connector, BlockConnector):
      self.connector.wanted.submit = self.add_request
