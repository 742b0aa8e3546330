"""Pages that are one file: a template of this folder with its styles and its script in it, all text escaped."""

import functools
import pathlib
import re

import jinja2
import markupsafe

_HERE = pathlib.Path(__file__).parent


@functools.cache
def _templates() -> jinja2.Environment:
  made = jinja2.Environment(loader=jinja2.FileSystemLoader(_HERE), autoescape=True,
                            trim_blocks=True, lstrip_blocks=True)
  made.globals['source'] = lambda name: markupsafe.Markup((_HERE / name).read_text(encoding='utf-8'))
  made.policies['json.dumps_kwargs'] = {'allow_nan': False, 'separators': (',', ':')}
  return made


def render(template: str, **values) -> str:
  """The page that extends page.html: with `title`, `styles` and `script` (files of this folder), perhaps `data` (JSON)."""
  return printable(_templates().get_template(template).render(**values))


def printable(text: str) -> str:
  """The text less characters that HTML may not hold."""
  return re.sub('[\0-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]', '\ufffd', text)
