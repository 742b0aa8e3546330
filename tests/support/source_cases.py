"""Sources of rows that several tests read: two files of examples, and pages of a small library. A test module takes a
fixture by assigning it to a name of its own."""

import data_cases
import pytest

from blockattn.data import sources, stdlib

OPTIONS = sources.FileOptions(data_cases.LENGTH, max_blocks=12)
STYLE = stdlib.PageStyle(renamed=0.0, split_words=0)


@pytest.fixture(scope='module')
def tokenizer():
  return data_cases.tiny_tokenizer()


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return data_cases.write_folder(tmp_path_factory.mktemp('files'))


@pytest.fixture(scope='module')
def files(folder, tokenizer):
  return sources.FileRows(str(folder), tokenizer, OPTIONS)


@pytest.fixture(scope='module')
def containers(tmp_path_factory):
  return data_cases.containers(tmp_path_factory.mktemp('library'))


@pytest.fixture(scope='module')
def pages(containers, tokenizer):
  return sources.PageRows(containers, STYLE, tokenizer, length=900, max_blocks=20)
