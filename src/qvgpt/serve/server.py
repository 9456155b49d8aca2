"""uvicorn with what it lacks: a bound on connections, time-outs for the slow, an orderly end."""

import asyncio
import contextlib
import logging
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from qvgpt.serve.api import create_app
from qvgpt.serve.faults import fault, printable
from qvgpt.serve.gate import LOOPBACK, Gate
from qvgpt.serve.service import Service

HEAD_SECONDS = 10.0
"""For the head of a request, once the connection stands or the last answer is taken."""
STALL_SECONDS = 30.0
"""A client that takes nothing of what is to be sent for so long is cut off."""
_FULL = fault(503, "too many connections")
_ANSWER_FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\n"
    b"Connection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(_FULL), _FULL)
)


def protocol(most_connections: int) -> type[H11Protocol]:
    """HTTP for at most so many connections at once."""

    class Protocol(H11Protocol):
        """Cuts off who says or takes nothing."""

        _head: asyncio.TimerHandle | None = None
        _stall: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > most_connections:
                transport.write(_ANSWER_FULL)
                transport.close()
            else:
                self._expect_head()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._head_came()

        def on_response_complete(self) -> None:
            self._expect_head()
            super().on_response_complete()  # may go on with a request that came already
            self._head_came()

        def timeout_keep_alive_handler(self) -> None:
            if not self.transport.get_write_buffer_size():  # else the last answer is on its way
                self.transport.abort()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._expect_taking()

        def resume_writing(self) -> None:
            super().resume_writing()
            self._disarm(self._stall)

        def connection_lost(self, exc: Exception | None) -> None:
            self._disarm(self._head)
            self._disarm(self._stall)
            super().connection_lost(exc)

        def _expect_head(self) -> None:
            self._disarm(self._head)
            seconds = STALL_SECONDS if self.transport.get_write_buffer_size() else HEAD_SECONDS
            self._head = self._cut_off_after(seconds, self._expect_head)

        def _expect_taking(self) -> None:
            self._stall = self._cut_off_after(STALL_SECONDS, self._expect_taking)

        def _cut_off_after(self, seconds: float, again: Callable[[], None]) -> asyncio.TimerHandle:
            """Unless the client takes something meanwhile: then `again`."""
            before = self.transport.get_write_buffer_size()

            def late() -> None:
                if self.transport.get_write_buffer_size() < before:
                    again()
                else:
                    self.transport.abort()  # closing would wait for a client that takes nothing

            return self.loop.call_later(seconds, late)

        def _head_came(self) -> None:
            if self.cycle is not None and not self.cycle.response_complete:
                self._disarm(self._head)

        @staticmethod
        def _disarm(timer: asyncio.TimerHandle | None) -> None:
            if timer is not None:
                timer.cancel()

    return Protocol


class Server(uvicorn.Server):
    """Ends in order: SIGTERM or Ctrl-C lets texts be finished, a second one cuts them."""

    def __init__(self, config: uvicorn.Config, service: Service, drain_seconds: float):
        super().__init__(config)
        self._service, self._drain_seconds = service, drain_seconds
        self._deadline = 0.0

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Unlike uvicorn's own, signals are not raised again once all is done."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {s: signal.signal(s, self._end) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _end(self, *_: Any) -> None:
        if self._service.draining:
            self.should_exit = self.force_exit = True
        self._deadline = time.monotonic() + self._drain_seconds
        self._service.draining = True

    async def on_tick(self, counter: int) -> bool:
        """Every tenth of a second: whether to end."""
        service = self._service
        if service.draining and not (service.live or service.calls):
            self.should_exit = True
        if self._deadline and time.monotonic() > self._deadline:
            self.should_exit = True
        return await super().on_tick(counter)


@dataclass(frozen=True)
class Limits:
    """Of a server, all in all."""

    connections: int = 512
    drain_seconds: float = 30.0


def make_server(
    service: Service,
    key: str | None = None,
    hosts: Collection[str] | None = LOOPBACK,
    limits: Limits | None = None,
) -> Server:
    """The whole server around a service; `run(sockets=[…])` serves.

    Without a key nobody is asked for one; `hosts` None: any.
    """
    limits, app = limits or Limits(), create_app(service)
    routes = {getattr(route, "path", "") for route in app.routes}
    settings = uvicorn.Config(
        Gate(app, service, key=key, hosts=hosts, routes=routes),
        http=protocol(limits.connections),
        ws="none",
        lifespan="on",
        loop="asyncio",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=5,
        h11_max_incomplete_event_size=16384,
    )
    return Server(settings, service, limits.drain_seconds)


class LogFormatter(logging.Formatter):
    """Nothing that a client said steers a terminal or forges a line."""

    def format(self, record: logging.LogRecord) -> str:
        """One line; of an error more, each marked."""
        when = time.strftime("%H:%M:%S", time.localtime(record.created))
        line = f"{when} {record.levelname.lower()} {printable(record.getMessage(), 2000)}"
        if record.exc_info:
            trace = self.formatException(record.exc_info).splitlines()
            line += "".join(f"\n  | {printable(each)}" for each in trace)
        return line
