"""A hub on this machine: as much of the Hugging Face Hub's HTTP interface as its client and `datasets` ask for.

Paths and headers as https://huggingface.co/docs/hub/api has them, and as the client asks for them.
"""

import contextlib
import hashlib
import http.server
import json
import pathlib
import threading
import urllib.parse
from collections.abc import Iterator

REVISION = 'c0ffee' + 34 * '0'   # the commit of every repository
BRANCHES = 'main', 'v1'
GATED, BROKEN = 'owner/gated', 'owner/broken'   # one that asks for a permission, and one at which the connection ends
_KINDS = {'models': '', 'datasets': 'datasets/'}


@contextlib.contextmanager
def serving(folder: pathlib.Path) -> Iterator[tuple[str, list[str]]]:
  """Serves folder/models/OWNER/NAME and folder/datasets/OWNER/NAME: gives the address, for HF_ENDPOINT, and the paths that
  have been asked for so far."""
  asked = []
  handler = type('Handler', (_Handler,), {'folder': folder, 'asked': asked})
  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  try:
    yield f'http://127.0.0.1:{server.server_port}', asked
  finally:
    server.shutdown()
    server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = 'HTTP/1.1'
  folder: pathlib.Path
  asked: list[str]

  def log_message(self, *_):
    pass

  def do_GET(self):
    self.rfile.read(int(self.headers.get('Content-Length', 0)))
    path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
    self.asked.append(path)
    words = path.strip('/').split('/')
    is_api = words[0] == 'api'
    words = words[1:] if is_api else words
    kind = words[0] if words[0] in _KINDS else 'models'
    words = words[1:] if words[0] in _KINDS else words
    repo, (what, revision, *rest) = '/'.join(words[:2]), [*words[2:], '', ''][:max(2, len(words) - 2)]
    there = self.folder / kind / repo
    files = {str(file.relative_to(there)): file for file in sorted(there.rglob('*')) if file.is_file()}
    if repo == BROKEN:
      self.close_connection = True   # without an answer
    elif not files:
      self._refuse(404, 'RepoNotFound', 'Repository not found')
    elif repo == GATED:
      self._refuse(403, 'GatedRepo', f'Access to {repo} is restricted.')
    elif revision not in ('', REVISION, *BRANCHES):
      self._refuse(404, 'RevisionNotFound', f'Invalid rev id: {revision}')
    elif is_api:
      self._send(200, json.dumps(self._facts(repo, what, files, '/'.join(rest))).encode(), {})
    elif what == 'resolve' and (name := '/'.join(rest)) in files:
      self._send(200, files[name].read_bytes(), {'ETag': f'"{_etag(files[name])}"', 'X-Repo-Commit': REVISION})
    else:
      self._refuse(404, 'EntryNotFound', 'Entry not found')

  do_HEAD = do_POST = do_GET

  def _facts(self, repo, what, files, under):
    if what == 'tree':
      return [{'type': 'file', 'path': name, 'size': file.stat().st_size, 'oid': _etag(file)}
              for name, file in files.items() if not under or name.startswith(f'{under}/')]
    return {'id': repo, 'sha': REVISION, 'private': False, 'tags': [], 'siblings': [{'rfilename': name} for name in files]}

  def _refuse(self, status, code, said):
    self._send(status, b'{}', {'X-Error-Code': code, 'X-Error-Message': said, 'X-Repo-Commit': REVISION})

  def _send(self, status, content, headers):
    self.send_response(status)
    for name, value in (headers | {'Content-Length': str(len(content))}).items():
      self.send_header(name, value)
    self.end_headers()
    if self.command != 'HEAD':
      self.wfile.write(content)


def _etag(file):
  return hashlib.sha256(file.read_bytes()).hexdigest()[:40]
