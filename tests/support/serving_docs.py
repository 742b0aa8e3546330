"""The snippets of the page on serving that ask a server."""

import pathlib
import re

PAGE = pathlib.Path(__file__).resolve().parents[2] / 'docs' / 'serving.md'


def snippets() -> list[str]:
  found = re.findall(r'<!-- needs: a server -->\n```python\n(.*?)```', PAGE.read_text(encoding='utf-8'), re.S)
  assert len(found) == 3
  return found
