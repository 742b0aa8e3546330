"""Asking an OpenAI-compatible endpoint: POST {base URL}/chat/completions, with retries, waits and a deadline.

By httpx: of the `openai` package one request would be used, and its own retries cannot be counted, timed or tested from
here.
"""

import asyncio
import concurrent.futures
import dataclasses
import datetime
import email.utils
import json
import random
import re
import threading
import time
from collections.abc import Callable, Sequence

import httpx

from blockattn.errors import UserError

_LARGEST = 8 << 20   # bytes of a reply; indices need a few hundred
_LATER = frozenset({408, 409, 425, 429})    # and all from 500
_REFUSED = frozenset({301, 302, 307, 308, 401, 403, 404})   # URL, key, permission or model: no other request does better


class Failed(RuntimeError):
  """This request got no answer; the message says why."""


class Refused(RuntimeError):
  """The endpoint will answer no request of this kind; the message says why."""


class _Again(Exception):
  """One attempt failed and another may not; `wait` is what the server asks for, in seconds."""

  def __init__(self, reason, wait=None):
    super().__init__(reason)
    self.wait = wait


@dataclasses.dataclass(frozen=True)
class Answer:
  """What the model said."""
  text: str   # the content of its message; '' if there is none
  finish: str = 'stop'   # why it stopped, such as 'stop' or 'length'
  tokens_in: int = 0   # tokens_in, tokens_out: what the endpoint charges for; 0 if it does not say
  tokens_out: int = 0


@dataclasses.dataclass(frozen=True)
class Limits:
  """When to give up."""
  timeout: float = 120   # seconds for one attempt, from its start to the last byte of the reply
  attempts: int = 6   # of one request
  backoff: float = 1   # seconds before the second attempt, twice as long before every further one, half of it by chance
  longest_wait: float = 300   # seconds; a server that asks for more is not waited for, and no backoff is longer

  def __post_init__(self):
    if self.timeout <= 0 or self.attempts < 1 or self.backoff < 0 or self.longest_wait < 0:
      raise UserError(f'{self}: timeout must be positive, attempts at least 1, the waits not negative')


class Completions:
  """An endpoint and a model; `ask` may be called from several threads. Close it, or use it as a context manager."""

  def __init__(self, base_url: str, model: str, key: str = '', *, body: dict | None = None, limits: Limits = Limits(),
               sleep: Callable[[float], object] | None = None):
    """Args:
      base_url: up to and without /chat/completions, such as https://api.openai.com/v1. ValueError if it or the key is none.
      key: sent as a bearer token; '' sends none, which local servers are content with.
      body: further keys of the request, such as {"temperature": 0}.
      sleep: called with seconds to wait; None: really waits, until the endpoint is closed.
    """
    shown = redacted(base_url)
    try:
      url = httpx.URL(base_url)
    except httpx.InvalidURL as error:
      raise UserError(f'base URL {shown!r}: {redacted(str(error))}') from None
    if url.scheme not in ('http', 'https') or not url.host:
      raise UserError(f'base URL {shown!r}: it must start with http:// or https:// and name a host')
    if not key.isascii() or not key.isprintable() or ' ' in key:
      raise UserError('the key holds white space, or characters that are not ASCII; it must be the key alone')
    self.url = base_url.rstrip('/') + '/chat/completions'
    self._secrets = [secret for secret in (key, url.password, url.userinfo.decode()) if secret]
    self.body = {'model': model, **(body or {})}
    self.limits = limits
    self.closed = threading.Event()
    self.sleep = sleep or self.closed.wait
    # An event loop, since only there a deadline holds for a whole exchange: httpx's own is for each read of it.
    self.client = httpx.AsyncClient(headers={'Authorization': f'Bearer {key}'} if key else {}, timeout=None)
    self.loop = asyncio.new_event_loop()
    self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
    self.thread.start()
    self.not_before = 0.   # monotonic time until which the server wants to be left alone, by all threads
    self.lock = threading.Lock()

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.close()

  def close(self):
    """Ends waits and requests of all threads; `ask` fails from now on."""
    with self.lock:
      if self.closed.is_set():
        return
      self.closed.set()
    asyncio.run_coroutine_threadsafe(self._end(), self.loop).result()
    self.loop.call_soon_threadsafe(self.loop.stop)
    self.thread.join()
    self.loop.close()

  async def _end(self):
    under_way = asyncio.all_tasks() - {asyncio.current_task()}
    for task in under_way:
      task.cancel()
    await asyncio.gather(*under_way, return_exceptions=True)
    await self.client.aclose()

  def ask(self, messages: Sequence[dict]) -> Answer:
    """The answer to a chat of {"role", "content"}. Raises Failed: none after all attempts, or the request itself is wrong
    (too long, say); Refused: the key, the permission, the URL or the model is wrong."""
    for attempt in range(self.limits.attempts):
      try:
        with self.lock:
          wait = self.not_before - time.monotonic()
        if wait > 0:
          self.sleep(wait)
        return self._attempt(messages)
      except _Again as error:
        if attempt + 1 == self.limits.attempts:
          raise Failed(f'{redacted(str(error), self._secrets)} (attempt {attempt + 1}, the last)') from None
        self._wait(error, attempt)
      except (Failed, Refused) as error:   # servers and proxies repeat what they were sent
        raise type(error)(redacted(str(error), self._secrets)) from None
    raise AssertionError('no attempt')

  def _wait(self, error, attempt):
    longest = self.limits.longest_wait
    if error.wait is None:
      self.sleep(min(longest, self.limits.backoff * 2 ** attempt) * random.uniform(.5, 1))
      return
    if error.wait > longest:
      raise Failed(f'{redacted(str(error), self._secrets)}, and asks to wait {error.wait:.0f} s, longer than '
                   f'{longest:.0f} s') from None
    with self.lock:
      self.not_before = max(self.not_before, time.monotonic() + error.wait)
    self.sleep(error.wait)

  def _attempt(self, messages):
    content = json.dumps({**self.body, 'messages': list(messages)}).encode()   # ASCII, also of half a surrogate pair
    with self.lock:   # of what is begun before `close`, that sees the end
      if self.closed.is_set():
        raise Failed('the endpoint was closed')
      reply = asyncio.run_coroutine_threadsafe(self._exchange(content), self.loop)
    try:
      response, data = reply.result()
    except concurrent.futures.CancelledError:
      raise Failed('the endpoint was closed') from None
    except TimeoutError:
      raise _Again(f'no whole reply within {self.limits.timeout} s') from None
    except httpx.TransportError as error:
      raise _Again(f'{type(error).__name__}: {error}') from error
    except httpx.DecodingError as error:
      raise _Again(f'the reply cannot be decoded: {error}') from error
    _check_status(response, data)
    return _read_reply(data)

  async def _exchange(self, content) -> tuple[httpx.Response, bytes]:
    """One request and its whole reply, from looking the host up to the last byte within the timeout."""
    headers = {'Content-Type': 'application/json'}
    async with asyncio.timeout(self.limits.timeout), self.client.stream('POST', self.url, content=content,
                                                                        headers=headers) as response:
      data = bytearray()
      async for piece in response.aiter_bytes():
        data += piece
        if len(data) > _LARGEST:
          raise _Again(f'a reply of more than {_LARGEST} bytes')
      return response, bytes(data)


def redacted(message: str, secrets: Sequence[str] = ()) -> str:
  """The message with `***` for each secret, for what follows `Bearer`, and for the name and password of a URL."""
  for secret in sorted(secrets, key=len, reverse=True):
    message = message.replace(secret, '***')
  message = re.sub(r'(?i)(\bbearer\s+)[^\s"\',;}]+', r'\1***', message)
  return re.sub(r'(://)[^/\s@]*@', r'\1***@', message)


def _check_status(response, data):
  code = response.status_code
  if code == 200:
    return
  reason = f'status {code}: {" ".join(data[:300].decode(errors="replace").split())}'
  if code in _LATER or code >= 500:
    raise _Again(reason, retry_after(response.headers.get('retry-after')))
  if code in _REFUSED:
    raise Refused(f'{reason}; check the key, the base URL and the name of the model')
  raise Failed(reason)


def retry_after(value: str | None) -> float | None:
  """Seconds that a Retry-After header asks for, given as seconds or as a date; None if it says nothing of the kind."""
  if value is None:
    return None
  try:
    return max(0., float(value)) if float(value) < float('inf') else None
  except ValueError:
    pass
  try:
    then = email.utils.parsedate_to_datetime(value)
  except (ValueError, OverflowError):
    return None
  now = datetime.datetime.now(datetime.UTC)
  return max(0., ((then if then.tzinfo else then.replace(tzinfo=datetime.UTC)) - now).total_seconds())


def _read_reply(data):
  try:
    reply = json.loads(data)
    choice = reply['choices'][0]
    text, finish = choice['message']['content'], choice.get('finish_reason')
  except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
    raise _Again(f'the reply is no chat completion ({type(error).__name__}: {error})') from error
  usage = reply.get('usage')
  usage = usage if isinstance(usage, dict) else {}
  counts = (usage.get(key) for key in ('prompt_tokens', 'completion_tokens'))
  return Answer(text if isinstance(text, str) else '', str(finish or 'stop'),
                *(count if isinstance(count, int) and count >= 0 else 0 for count in counts))
