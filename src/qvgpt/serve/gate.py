"""What every request passes first: whose page sent it, who asks, and how much it says.

Order: Host and Origin (DNS rebinding, requests of foreign pages), draining, key, size, depth of the
JSON. It also puts the headers on every answer, and writes one line of log for each.
"""

import asyncio
import base64
import binascii
import contextlib
import hashlib
import hmac
import logging
import re
import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qvgpt.serve.faults import Refusal, printable
from qvgpt.serve.service import Service
from qvgpt.serve.static import CSP

logger = logging.getLogger("qvgpt.serve")

MOST_BYTES = 1 << 20
MOST_DEPTH = 32
BODY_SECONDS = 30.0
OPEN = frozenset({"/health", "/ready"})
"""Routes without a key."""
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
_HEADERS = [
    (b"content-security-policy", CSP.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
]
# a string may lack its end: it then reaches to that of the body, and nothing is read twice
_MARKS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)|[\[{]|[\]}]', re.DOTALL)


@dataclass
class _Answered:
    """What became of a request, for the log."""

    status: int = 0


class Gate:
    """ASGI middleware before the application. Without a key nobody is asked for one."""

    def __init__(
        self,
        app: ASGIApp,
        service: Service,
        *,
        key: str | None = None,
        hosts: Collection[str] | None = LOOPBACK,
        routes: Collection[str] = (),
    ):
        self._app, self._service = app, service
        self._digest = None if key is None else _digest(key.encode())
        self._hosts = None if hosts is None else frozenset(h.lower() for h in hosts)
        self._routes = frozenset(routes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse, or hand on with the whole body."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, answered = time.monotonic(), _Answered()

        async def dressed(message: Message) -> None:
            if message["type"] == "http.response.start":
                answered.status = message["status"]
                message = {**message, "headers": [*message.get("headers", []), *_HEADERS]}
            await send(message)

        try:
            headers = dict(scope["headers"])
            self._check(scope, headers)
            body = await self._body(scope, headers, receive)
            if body is not None:
                await self._app(scope, _replay(body, receive), dressed)
        except Refusal as refusal:
            await _refuse(refusal, dressed)
        except Exception:
            logger.exception("%s %s failed", scope["method"], scope["path"])
            if not answered.status:
                await _refuse(Refusal(500, "internal error", code="internal_error"), dressed)
        finally:
            self._note(scope, answered.status, time.monotonic() - started)

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        route = scope["path"] if scope["path"] in self._routes else "other"
        metrics = self._service.metrics
        metrics.requests.labels(route, str(status or "gone")).inc()
        metrics.request_seconds.labels(route).observe(seconds)
        client = scope["client"][0] if scope.get("client") else "-"
        logger.info(
            "%s %s %s %s %.3fs", client, scope["method"], printable(scope["path"]),
            status or "gone", seconds,
        )  # fmt: skip

    # ── before the body ──────────────────────────────────────────────────────────────────────

    def _check(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        host = headers.get(b"host", b"").decode("latin-1").lower()
        if self._hosts is not None and _name(host) not in self._hosts:
            raise Refusal(403, "this Host is none of this server's", code="forbidden_host")
        origin = headers.get(b"origin")
        if origin is not None and origin.decode("latin-1").lower().partition("://")[2] != host:
            raise Refusal(403, "pages of other origins may not ask here", code="forbidden_origin")
        site = headers.get(b"sec-fetch-site")
        if scope["method"] not in ("GET", "HEAD") and site in (b"cross-site", b"same-site"):
            raise Refusal(403, "pages of other origins may not ask here", code="forbidden_origin")
        if self._service.draining and scope["path"] != "/health":
            close = {"Retry-After": "5", "Connection": "close"}
            raise Refusal(503, "the server is about to end", headers=close)
        if scope["path"] not in OPEN and not self._knows_key(headers):
            ask = {"WWW-Authenticate": 'Basic realm="qvgpt", charset="UTF-8"'}
            raise Refusal(401, "a key is needed: Authorization: Bearer KEY", None,
                          "invalid_api_key", ask)  # fmt: skip

    def _knows_key(self, headers: dict[bytes, bytes]) -> bool:
        """Bearer KEY, or Basic with the key as password, which browsers ask for."""
        if self._digest is None:
            return True
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        given = given.strip()
        if scheme.lower() == b"basic":
            try:
                given = base64.b64decode(given, validate=True).partition(b":")[2]
            except (binascii.Error, ValueError):
                given = b""
        elif scheme.lower() != b"bearer":
            given = b""
        return hmac.compare_digest(_digest(given), self._digest)

    # ── the body ─────────────────────────────────────────────────────────────────────────────

    async def _body(
        self, scope: Scope, headers: dict[bytes, bytes], receive: Receive
    ) -> bytes | None:
        """All of it, within its bounds; None where the client has gone."""
        with contextlib.suppress(ValueError):
            if int(headers.get(b"content-length", b"0")) > MOST_BYTES:
                raise Refusal(413, f"a body has at most {MOST_BYTES} bytes")
        body, more = bytearray(), True
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > MOST_BYTES:
                        raise Refusal(413, f"a body has at most {MOST_BYTES} bytes")
        except TimeoutError:
            raise Refusal(
                408, f"the body did not come within {BODY_SECONDS:g} seconds",
                headers={"Connection": "close"},
            ) from None  # fmt: skip
        if scope["method"] == "POST":
            kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
            if kind != b"application/json":
                raise Refusal(415, "expected Content-Type: application/json")
        if depth_exceeds(bytes(body), MOST_DEPTH):
            raise Refusal(400, f"JSON of more than {MOST_DEPTH} levels")
        return bytes(body)


def depth_exceeds(body: bytes, most: int) -> bool:
    """Whether brackets outside of strings are nested deeper."""
    if body.count(b"[") + body.count(b"{") <= most:
        return False
    depth = 0
    for mark in _MARKS.finditer(body):
        first = mark[0][:1]
        if first in b"[{":
            depth += 1
            if depth > most:
                return True
        elif first != b'"':
            depth -= 1
    return False


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _name(host: str) -> str:
    """A Host without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body once more, then whatever comes."""
    told: list[Any] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return told.pop() if told else await receive()

    return replay


async def _refuse(refusal: Refusal, send: Send) -> None:
    body = refusal.body()
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body))}
    pairs = {**headers, **refusal.headers}.items()
    await send({
        "type": "http.response.start",
        "status": refusal.status,
        "headers": [(k.lower().encode(), v.encode()) for k, v in pairs],
    })  # fmt: skip
    await send({"type": "http.response.body", "body": body})
