"""Exported students in stock vLLM, every block's keys and values computed once: `python -m blockattn.serving.vllm EXPORTED`.

All context blocks of a prompt together are a prefix, so what vLLM offers for prefixes from elsewhere, a KV connector, is all
that is needed:

  front      of the API server: blocks given as documents, message parts or lengths become one prompt with sinks, and the
             lengths of its blocks
  scheduler  vLLM's own; it lets the connector add requests
  unsaid     keeps learned sinks out of answers
  wanted     the connector where requests are scheduled: which blocks a prompt needs, whether the store has them. A missing
             one is read as a request of its own, once for all who wait for it; the prompt is admitted when all are there,
             its whole context reported as computed
  pages      the connector where the model runs: catches the keys and values that the attention backend is given, and writes
             states into vLLM's pages through the backend's own writer, keys rotated to their place

The store is the one of `inference.cache`, with the engine's key for the same block. vLLM has keys after rotation only, which
are turned back: the engine's up to rounding.
"""
