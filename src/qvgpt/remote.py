"""Texts from an OpenAI-compatible server: ours, llama.cpp's, vLLM's or another.

Only the given address is asked, without proxies and redirects, so that the key goes nowhere else.
"""

import contextlib
import http.client
import json
import random
import re
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any
from urllib.parse import SplitResult, urlsplit

from qvgpt.data.rows import Row
from qvgpt.decode.engine import Text
from qvgpt.decode.policy import Guidance
from qvgpt.errors import QvgptError

TRIES = 8
"""Of each request, where the server is busy or gone for a while: about two minutes in all."""
LONGEST_PAUSE = 60.0
_SECONDS = 600.0  # for one answer
_MOST_BYTES = 64 << 20  # of one answer
_BUSY = (408, 409, 425, 429)
_ASKED = re.compile(r"https?://[!-~]+ [!-~]*")  # host and path, which hold no space


class Server:
    """One that writes texts. Raises `QvgptError` where it refuses, or answers what is no answer."""

    def __init__(self, base_url: str, model: str, key: str | None = None, as_chat: bool = False):
        self._parts = _address(base_url)
        self._key = (key or "").strip()
        if not self._key.isprintable():
            raise QvgptError("api_key_env: the key in this variable is no line of text")
        self.url, self.model, self._as_chat = base_url, model, as_chat
        self._path = self._parts.path.rstrip("/")
        self._local = threading.local()
        self._open: set[http.client.HTTPConnection] = set()
        self._ended = threading.Event()

    def prompt(self, row: Row) -> dict[str, Any]:
        """What a request says of a row's prompt."""
        prompt = row.fields.get("prompt")
        if isinstance(prompt, str):
            if not self._as_chat:
                return {"prompt": prompt}
            return {"messages": [{"role": "user", "content": prompt}]}
        if isinstance(prompt, list) and prompt:
            return {"messages": prompt}
        raise row.fault("prompt", "a server needs a text or messages here")

    def guided(self, guidances: Sequence[Guidance]) -> list[dict[str, Any]]:
        """What a request says of each guidance.

        Only our own server knows how to guide; others would not say that they do not.
        """
        if self._is_ours():
            return [{"guidance": asdict(guidance)} for guidance in guidances]
        if any(guidance.guides for guidance in guidances):
            raise QvgptError(f"{self.url}: is no qvgpt server, and guides by no values: beta 0")
        names = ("temperature", "top_p", "top_k", "min_p")
        every = [{name: getattr(guidance, name) for name in names} for guidance in guidances]
        return [{k: v for k, v in said.items() if v is not None} for said in every]

    def _is_ours(self) -> bool:
        try:
            answer = self._ask("GET", "/models")
        except QvgptError as error:
            if " 404" in str(error) or " 405" in str(error):
                return False
            raise
        finally:
            self._close()
        cards = answer.get("data")
        first = cards[0] if isinstance(cards, list) and cards else None
        return isinstance(first, dict) and first.get("owned_by") == "qvgpt"

    def write(
        self,
        requests: Sequence[Mapping[str, Any]],
        at_once: int,
        told: Callable[[int, int], None] = lambda texts, tokens: None,
    ) -> list[Text]:
        """A text for each request, so many at a time; `told` counts texts and tokens."""
        lock = threading.Lock()

        def one(request: Mapping[str, Any]) -> Text:
            try:
                text, tokens = self._text({**request, "model": self.model})
            finally:
                if self._ended.is_set():  # nobody is left to close what this thread opened
                    self._drop()
            with lock:
                told(1, tokens)
            return text

        with ThreadPoolExecutor(min(at_once, max(1, len(requests))), "collect") as pool:
            try:
                return list(pool.map(one, requests))
            except BaseException:  # a fault, or Ctrl-C: the others need not go on trying
                self._ended.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
            finally:
                self._close()

    def _text(self, request: Mapping[str, Any]) -> tuple[Text, int]:
        chat = "messages" in request
        answer = self._ask("POST", "/chat/completions" if chat else "/completions", request)
        try:
            choice = answer["choices"][0]
            text = choice["message"]["content"] if chat else choice["text"]
            if text is None:
                text = ""
            used = answer.get("usage") or {}
            tokens = used.get("completion_tokens") or 0
            if not isinstance(text, str) or not isinstance(tokens, int):
                raise TypeError
            return Text(text=text, terminated=choice["finish_reason"] == "stop"), tokens
        except (KeyError, IndexError, TypeError, AttributeError):
            raise QvgptError(f"{self.url}: its answer is no completion: {_short(answer)}") from None

    # ── HTTP ─────────────────────────────────────────────────────────────────────────────────

    def _ask(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        """The JSON of an answer; tries again, later and later, where the server is busy or gone."""
        content = None if body is None else json.dumps(body).encode()
        fault = ""
        for attempt in range(TRIES):
            after = None
            try:
                status, data, after = self._once(method, path, content)
            except (OSError, http.client.HTTPException) as error:
                self._drop()
                fault = f"cannot be reached ({error or type(error).__name__})"
            else:
                if status == 200:
                    return self._json(data)
                fault = f"answers {status}: {_message(data)}"
                if status < 500 and status not in _BUSY:
                    break
            if attempt + 1 < TRIES and self._ended.wait(_pause(attempt, after)):
                break
        raise QvgptError(f"{self.url}: {fault}")

    def _once(self, method: str, path: str, content: bytes | None) -> tuple[int, bytes, str | None]:
        connection = self._connection()
        headers: dict[str, str | bytes] = {"Accept": "application/json"}
        if content is not None:
            headers["Content-Type"] = "application/json"
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}".encode()
        connection.request(method, self._path + path, content, headers)
        answer = connection.getresponse()
        data = answer.read(_MOST_BYTES)
        if answer.will_close or not answer.isclosed():
            self._drop()
        return answer.status, data, answer.getheader("Retry-After")

    def _connection(self) -> http.client.HTTPConnection:
        """That of this thread, kept from one request to the next until `_close` ends it."""
        if getattr(self._local, "connection", None) not in self._open:
            secure = self._parts.scheme == "https"
            kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
            assert self._parts.hostname is not None
            self._local.connection = kind(self._parts.hostname, self._parts.port, timeout=_SECONDS)
            self._open.add(self._local.connection)
        return self._local.connection

    def _drop(self) -> None:
        if (connection := getattr(self._local, "connection", None)) is not None:
            connection.close()
            self._open.discard(connection)
        self._local.connection = None

    def _close(self) -> None:
        """End all connections; who waits for an answer on one need wait no more."""
        for connection in list(self._open):
            if connection.sock is not None:
                with contextlib.suppress(OSError):
                    connection.sock.shutdown(socket.SHUT_RDWR)
            connection.close()
        self._open.clear()

    def _json(self, data: bytes) -> dict[str, Any]:
        try:
            answer = json.loads(data)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise QvgptError(f"{self.url}: its answer is no JSON object: {_short(data)}")
        return answer


def _address(base_url: str) -> SplitResult:
    """The parts of an address that can be asked."""
    if "@" in re.split("[/?#]", base_url.partition("://")[2])[0] or "?" in base_url:
        raise QvgptError(
            "base_url: leave the key out of it, and any query: api_key_env names the key's variable"
        )
    with contextlib.suppress(ValueError):
        parts = urlsplit(base_url)
        asked = f"{parts.scheme}://{(parts.hostname or '').encode('idna').decode()} {parts.path}"
        if parts.port != 0 and base_url.isprintable() and _ASKED.fullmatch(asked):
            return parts
    raise QvgptError(
        f"base_url: expected an address such as http://127.0.0.1:8000/v1, not {base_url!r}"
    )


def _pause(attempt: int, after: str | None) -> float:
    """Seconds to wait: what the server says, or twice as long each time, by chance a bit less."""
    if after is not None and after.strip().isdigit():
        return min(float(after), LONGEST_PAUSE)
    return min(2.0**attempt, LONGEST_PAUSE) * random.uniform(0.5, 1.0)


def _message(data: bytes) -> str:
    """What an error says."""
    try:
        return str(json.loads(data)["error"]["message"])[:300]
    except (ValueError, KeyError, TypeError):
        return _short(data)


def _short(found: Any) -> str:
    text = found.decode("utf-8", "replace") if isinstance(found, bytes) else str(found)
    return repr(text[:200])
