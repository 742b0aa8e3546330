"""Blocks for retrieval libraries: a LangChain TextSplitter, a LlamaIndex NodeParser, a Chonkie chunker.

Each is made by a function, so that none of the libraries is needed to import this module (ImportError says which is
missing), and takes the options of `blockattn.segment_many` (target_tokens=512, model=...). Chunks are blocks as they stand:
joined, they are the text, and the offsets that a library keeps are exact, also where a text repeats itself.

What is made can be pickled, as pipelines of several processes do: a class is known by the function here that makes it, and
a model by its name, so that each process loads its own.
"""

import functools
from collections.abc import Callable
from typing import Any

from blockattn import errors
from blockattn.data import encode
from blockattn.segmentation import api

_library = functools.partial(errors.library, who='this adapter', extra='text')


def langchain_splitter(*, add_start_index: bool = True, **options: Any):
  """A `langchain_text_splitters.TextSplitter` whose documents have `start_index` in their metadata.

  Args:
    add_start_index: as in LangChain.
    options: of `blockattn.segment_many`.
  """
  # LangChain looks for a chunk from the end of the one before it, less the overlap: there it stands.
  return _langchain_class()(blocks_of=functools.partial(api.segment_many, **options), chunk_overlap=0,
                            add_start_index=add_start_index, strip_whitespace=False)


@functools.cache
def _langchain_class():
  base = _library('langchain_text_splitters').TextSplitter

  class BlockSplitter(base):
    """Splits texts into blocks."""

    def __init__(self, *, blocks_of, **kwargs):
      super().__init__(**kwargs)
      self._blocks_of = blocks_of

    def __reduce__(self):
      return _splitter, (self.__dict__,)

    def split_text(self, text: str) -> list[str]:
      return [text[start:stop] for start, stop in self._blocks_of([text])[0]]

  return BlockSplitter


def llama_index_parser(*, include_metadata: bool = True, include_prev_next_rel: bool = True, **options: Any):
  """A `llama_index.core.node_parser.NodeParser` whose nodes have `start_char_idx` and `end_char_idx`.

  Args:
    include_metadata, include_prev_next_rel: as in LlamaIndex.
    options: of `blockattn.segment_many`.
  """
  fields = {'options': {name: str(value) for name, value in options.items()}, 'include_metadata': include_metadata,
            'include_prev_next_rel': include_prev_next_rel}
  return _parser(fields, functools.partial(api.segment_many, **options))


@functools.cache
def _llama_index_class():
  library = _library('llama_index.core.node_parser')
  node_utils = _library('llama_index.core.node_parser.node_utils')
  import pydantic  # llama-index's own

  class BlockNodeParser(library.NodeParser):
    """Parses documents into nodes that are blocks; `options` tell parsers apart in LlamaIndex's caches."""
    options: dict[str, str]
    _blocks_of: Callable = pydantic.PrivateAttr()

    def __reduce__(self):
      return _parser, (self.__dict__, self._blocks_of)

    def _parse_nodes(self, nodes, show_progress=False, **kwargs):
      texts = [node.get_content() for node in nodes]
      parsed = []
      for node, text, blocks in zip(nodes, texts, self._blocks_of(texts), strict=True):
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

  return BlockNodeParser


def chonkie_chunker(**options: Any):
  """A `chonkie.BaseChunker` whose chunks have `start_index`, `end_index` and `token_count`, in the tokens that
  `tokenizer=` counts, by default the segmenter's."""
  return _chonkie_class()(options)


@functools.cache
def _chonkie_class():
  base = _library('chonkie').BaseChunker
  chunk_type = _library('chonkie.types').Chunk

  class BlockChunker(base):
    """Chunks texts into blocks, a batch at a time."""

    def __init__(self, options):
      self._options = options
      self._count = _counter(options)
      super().__init__(tokenizer=self._count)

    def __reduce__(self):
      return _chunker, (self._options,)

    def chunk(self, text):
      return self.chunk_batch([text])[0]

    def chunk_batch(self, texts, show_progress=True):
      cut = api.segment_many(texts, **self._options)
      return [self._chunks(text, blocks) for text, blocks in zip(texts, cut, strict=True)]

    def _chunks(self, text, blocks):
      return [chunk_type(text=text[start:stop], start_index=start, end_index=stop,
                         token_count=self._count(text[start:stop])) for start, stop in blocks]

  return BlockChunker


def _counter(options):
  """Text -> its tokens, as `blockattn.segment_many` counts them with these options."""
  if options.get('tokenizer') is not None:
    ends = encode.token_ends(options['tokenizer'])
  else:
    ends = lambda texts: api.load_segmenter(options.get('model')).token_ends(texts)
  return lambda text: len(ends([text])[0])


# What pickle calls.

def _splitter(state):
  splitter = _langchain_class().__new__(_langchain_class())
  splitter.__dict__.update(state)
  return splitter


def _parser(fields, blocks_of):
  parser = _llama_index_class()(**fields)
  parser._blocks_of = blocks_of
  return parser


def _chunker(options):
  return chonkie_chunker(**options)
