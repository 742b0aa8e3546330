"""Blocks for retrieval libraries: a LangChain TextSplitter, a LlamaIndex NodeParser, a Chonkie chunker.

Each is made by a function, so that none of the libraries is needed to import this module, and takes the options of
`blockattn.segment_many` (target_tokens=512, model=...). Chunks are blocks as they stand: joined, they are the text, and
the offsets that a library keeps are exact, also where a text repeats itself.
"""

import functools
import importlib
from typing import Any

import blockattn


def langchain_splitter(*, add_start_index: bool = True, **options: Any):
  """A `langchain_text_splitters.TextSplitter` whose documents have `start_index` in their metadata.

  Args:
    add_start_index: as in LangChain.
    options: of `blockattn.segment_many`.

  Raises:
    ImportError: langchain-text-splitters is not installed.
  """
  base = _library('langchain_text_splitters', 'langchain-text-splitters').TextSplitter
  blocks_of = _cutter(options)

  class BlockSplitter(base):
    """Splits texts into blocks."""

    def split_text(self, text: str) -> list[str]:
      return [text[start:stop] for start, stop in blocks_of([text])[0]]

  # LangChain looks for a chunk from the end of the one before it, less the overlap: there it stands.
  return BlockSplitter(chunk_overlap=0, add_start_index=add_start_index, strip_whitespace=False)


def llama_index_parser(*, include_metadata: bool = True, include_prev_next_rel: bool = True, **options: Any):
  """A `llama_index.core.node_parser.NodeParser` whose nodes have `start_char_idx` and `end_char_idx`.

  Args:
    include_metadata, include_prev_next_rel: as in LlamaIndex.
    options: of `blockattn.segment_many`.

  Raises:
    ImportError: llama-index-core is not installed.
  """
  library = _library('llama_index.core.node_parser', 'llama-index-core')
  node_utils = _library('llama_index.core.node_parser.node_utils', 'llama-index-core')
  blocks_of = _cutter(options)

  class BlockNodeParser(library.NodeParser):
    """Parses documents into nodes that are blocks; `options` tell parsers apart in LlamaIndex's caches."""
    options: dict[str, str]

    def _parse_nodes(self, nodes, show_progress=False, **kwargs):
      texts = [node.get_content() for node in nodes]
      parsed = []
      for node, text, blocks in zip(nodes, texts, blocks_of(texts), strict=True):
        made = node_utils.build_nodes_from_splits([text[a:b] for a, b in blocks], node, id_func=self.id_func)
        for part, (start, stop) in zip(made, blocks, strict=True):
          part.start_char_idx, part.end_char_idx = start, stop
        parsed += made
      return parsed

    def _postprocess_parsed_nodes(self, nodes, parent_doc_map):
      # The library looks for each node's text behind the start of the one before, and errs in "aaaa".
      places = [(node.start_char_idx, node.end_char_idx) for node in nodes]
      nodes = super()._postprocess_parsed_nodes(nodes, parent_doc_map)
      for node, (start, stop) in zip(nodes, places, strict=True):
        node.start_char_idx, node.end_char_idx = start, stop
      return nodes

  return BlockNodeParser(options={name: str(value) for name, value in options.items()}, include_metadata=include_metadata,
                         include_prev_next_rel=include_prev_next_rel)


def chonkie_chunker(**options: Any):
  """A `chonkie.BaseChunker` whose chunks have `start_index`, `end_index` and `token_count`, in tokens of the model.

  Args:
    options: of `blockattn.segment_many`.

  Raises:
    ImportError: chonkie is not installed.
  """
  base = _library('chonkie', 'chonkie').BaseChunker
  chunk_type = _library('chonkie.types', 'chonkie').Chunk
  blocks_of = _cutter(options)
  model = lambda: blockattn.load_segmenter(options['model'] if 'model' in options else None)
  count = lambda texts: [len(ends) for ends in model().token_ends(texts)]

  class BlockChunker(base):
    """Chunks texts into blocks, a batch at a time."""

    def chunk(self, text):
      return self.chunk_batch([text])[0]

    def chunk_batch(self, texts, show_progress=True):
      return [self._chunks(text, blocks) for text, blocks in zip(texts, blocks_of(texts), strict=True)]

    def _chunks(self, text, blocks):
      counts = count([text[start:stop] for start, stop in blocks])
      return [chunk_type(text=text[start:stop], start_index=start, end_index=stop, token_count=n)
              for (start, stop), n in zip(blocks, counts, strict=True)]

  return BlockChunker(tokenizer=lambda text: count([text])[0])


def _cutter(options):
  return functools.partial(blockattn.segment_many, **options)


def _library(module, package):
  try:
    return importlib.import_module(module)
  except ImportError as error:
    raise ImportError(f'this adapter needs {package}: pip install "blockattn[text]" ({error})') from error
