"""The adapters in the real libraries: offsets are exact, nothing is lost, metadata goes along."""

import builtins
import importlib
import pathlib
import pickle
import subprocess
import sys

import pytest
import segment_cases

import blockattn
from blockattn.segmentation import adapters

SECTIONS = ''.join(f'  Section {i}\n\n' + f'A line about {i}. And more of it.\r\n' * 3 + '\n \n' for i in range(4))
TEXTS = [SECTIONS, 'a' * 400, 'ab ' * 100 + '\n\n', '', 'x', '語。' * 80 + '\0🙂']
OPTIONS = dict(target_tokens=20, max_tokens=30, model=segment_cases.StandIn())


def pieces(text):
  return [text[a:b] for a, b in blockattn.segment(text, **OPTIONS)]


def test_langchain():
  pytest.importorskip('langchain_text_splitters')
  from langchain_core.documents import Document
  splitter = adapters.langchain_splitter(**OPTIONS)
  for text in TEXTS:
    assert splitter.split_text(text) == pieces(text)
  made = splitter.split_documents([Document(page_content=text, metadata={'source': i}) for i, text in enumerate(TEXTS)])
  for i, text in enumerate(TEXTS):
    chunks = [d for d in made if d.metadata['source'] == i]
    assert [d.page_content for d in chunks] == pieces(text)
    assert [d.metadata['start_index'] for d in chunks] == [a for a, _ in blockattn.segment(text, **OPTIONS)]
  bare = adapters.langchain_splitter(add_start_index=False, **OPTIONS).create_documents([SECTIONS])
  assert 'start_index' not in bare[0].metadata


def test_llama_index():
  pytest.importorskip('llama_index.core')
  from llama_index.core.schema import Document, NodeRelationship
  parser = adapters.llama_index_parser(**OPTIONS)
  documents = [Document(text=text, metadata={'source': i}) for i, text in enumerate(TEXTS)]
  nodes = parser.get_nodes_from_documents(documents)
  for document, text in zip(documents, TEXTS, strict=True):
    mine = [node for node in nodes if node.ref_doc_id == document.doc_id]
    assert [node.text for node in mine] == pieces(text)
    assert [(node.start_char_idx, node.end_char_idx) for node in mine] == blockattn.segment(text, **OPTIONS)
    assert all(node.metadata == document.metadata for node in mine)
    for before, after in zip(mine[:-1], mine[1:], strict=True):
      assert before.relationships[NodeRelationship.NEXT].node_id == after.node_id
  other = adapters.llama_index_parser(target_tokens=9, model=OPTIONS['model'])
  assert parser.to_dict() != other.to_dict()   # by which an ingestion pipeline knows what it has done


def test_llama_index_pipeline():
  pytest.importorskip('llama_index.core')
  from llama_index.core.ingestion import IngestionPipeline
  from llama_index.core.schema import Document
  pipeline = IngestionPipeline(transformations=[adapters.llama_index_parser(**OPTIONS)])
  assert [node.text for node in pipeline.run(documents=[Document(text=SECTIONS)])] == pieces(SECTIONS)


@pytest.mark.parametrize('make, use', [
    (adapters.langchain_splitter, lambda made: made.split_text(SECTIONS)),
    (adapters.llama_index_parser, lambda made: [n.text for n in made.get_nodes_from_documents([_document()])]),
    (adapters.chonkie_chunker, lambda made: [chunk.text for chunk in made(SECTIONS)])])
def test_each_goes_to_another_process(make, use):
  try:
    made = make(**OPTIONS)
  except ImportError as error:
    pytest.skip(str(error))
  again = pickle.loads(pickle.dumps(made))
  assert type(again) is type(made) and use(again) == use(made) == pieces(SECTIONS)
  # The model that comes with the package is loaded where it is used.
  assert len(pickle.dumps(make(target_tokens=20))) < 10_000


def _document():
  from llama_index.core.schema import Document
  return Document(text=SECTIONS)


@pytest.mark.slow
def test_a_pipeline_of_two_processes():
  pytest.importorskip('llama_index.core')
  code = ('from llama_index.core.ingestion import IngestionPipeline\nfrom llama_index.core.schema import Document\n'
          'from blockattn.segmentation import adapters\n'
          'if __name__ == "__main__":\n'
          '  pipeline = IngestionPipeline(transformations=[adapters.llama_index_parser(target_tokens=20)])\n'
          '  nodes = pipeline.run(documents=[Document(text="A line.\\n" * 40)] * 2, num_workers=2)\n'
          '  assert "".join(n.text for n in nodes) == "A line.\\n" * 80 and len(nodes) > 4')
  root = pathlib.Path(adapters.__file__).parents[2]
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=root, timeout=120)
  assert done.returncode == 0, done.stderr


def test_chonkie():
  chonkie = pytest.importorskip('chonkie')
  chunker = adapters.chonkie_chunker(**OPTIONS)
  assert isinstance(chunker, chonkie.BaseChunker)
  for text, chunks in zip(TEXTS, chunker(TEXTS), strict=True):
    assert [chunk.text for chunk in chunks] == pieces(text) and chunks == [c for c in chunks if c.token_count <= 30]
    assert [(chunk.start_index, chunk.end_index) for chunk in chunks] == blockattn.segment(text, **OPTIONS)
    assert [chunk.token_count for chunk in chunks] == [chunker.tokenizer.count_tokens(c.text) for c in chunks]
  assert [chunk.text for chunk in chunker(SECTIONS)] == pieces(SECTIONS)
  # A reader's tokens, if one is given, and also of a chunker that was sent to another process.
  for made in (reader := adapters.chonkie_chunker(**OPTIONS, tokenizer=len), pickle.loads(pickle.dumps(reader))):
    chunks = made(SECTIONS)
    assert [chunk.token_count for chunk in chunks] == [len(chunk.text) for chunk in chunks] and len(chunks) > 13
    assert made.tokenizer.count_tokens(SECTIONS) == len(SECTIONS)
  document = chunker.chunk_document(chonkie.Document(content=SECTIONS, metadata={'source': 'a'}))
  assert ''.join(chunk.text for chunk in document.chunks) == SECTIONS
  assert all(chunk.metadata == {'source': 'a'} for chunk in document.chunks)


@pytest.mark.parametrize('make, package', [(adapters.langchain_splitter, 'langchain-text-splitters'),
                                           (adapters.llama_index_parser, 'llama-index'),
                                           (adapters.chonkie_chunker, 'chonkie')])
def test_a_library_that_is_not_there_is_named(make, package, monkeypatch):
  def absent(name, *args):
    raise ImportError(f'No module named {name}')
  monkeypatch.setattr(importlib, 'import_module', absent)
  for known in (adapters._langchain_class, adapters._llama_index_class, adapters._chonkie_class):
    known.cache_clear()
  with pytest.raises(ImportError, match=rf'needs {package}: pip install "blockattn\[text\]"'):
    make(**OPTIONS)


def test_the_module_itself_needs_none_of_them(monkeypatch):
  real = builtins.__import__

  def guarded(name, *args, **kwargs):
    assert name.split('.')[0] not in ('langchain_text_splitters', 'llama_index', 'chonkie'), name
    return real(name, *args, **kwargs)
  monkeypatch.setattr(builtins, '__import__', guarded)
  importlib.reload(adapters)
