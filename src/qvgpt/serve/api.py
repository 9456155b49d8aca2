"""The routes, as FastAPI serves them."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from qvgpt.serve import static
from qvgpt.serve.faults import Refusal, fault, printable
from qvgpt.serve.schema import ChatRequest, CompletionRequest, ErrorBody, ValuesRequest
from qvgpt.serve.service import Service
from qvgpt.serve.telling import Writing, stream, whole

logger = logging.getLogger("qvgpt.serve")

_FAULTS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody}
    for status in (400, 401, 403, 404, 405, 408, 413, 415, 429, 500, 503)
}


_NO_TELEMETRY: Any = dict.fromkeys(
    ("tracing", "metrics", "logs", "operation_spans", "auto_configure"), False
)


def create_app(service: Service) -> FastAPI:
    """The application around a service; `secure` puts the gate before it."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with service.at_work():
            yield

    app = FastAPI(
        title="qvgpt",
        lifespan=lifespan,
        docs_url=None,  # these pages come from a CDN
        redoc_url=None,
        responses=_FAULTS,
        telemetry=_NO_TELEMETRY,
    )
    app.add_exception_handler(Refusal, _refusal)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _internal)

    streamed: dict[int | str, Any] = {200: {"content": {"text/event-stream": {}}}}

    @app.post("/v1/completions", responses=streamed)
    async def completions(asked: CompletionRequest) -> Response:
        return _Answer(service, await service.completion(asked), bool(asked.stream))

    @app.post("/v1/chat/completions", responses=streamed)
    async def chat(asked: ChatRequest) -> Response:
        return _Answer(service, await service.chat(asked), bool(asked.stream))

    @app.post("/v1/values")
    async def values(asked: ValuesRequest) -> Response:
        return Response(await service.values_of(asked), media_type="application/json")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_card(service)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        if name != service.name:
            raise Refusal(404, "no such model", "model", "model_not_found")
        return _card(service)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> dict[str, str]:
        if service.draining:
            raise Refusal(503, "the server is about to end", headers={"Retry-After": "5"})
        return {"status": "ready"}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        content = service.metrics
        return Response(content.page(), headers={"content-type": content.content_type})

    for path, (body, kind) in static.load().items():
        _serve(app, path, body, kind)
    return app


def _serve(app: FastAPI, path: str, body: bytes, kind: str) -> None:
    @app.get(path, include_in_schema=False)
    async def page() -> Response:
        return Response(body, headers={"content-type": kind})


def _card(service: Service) -> dict[str, Any]:
    """A model as OpenAI lists it, and what a client of ours wants to know."""
    guide = service.worker.guide
    return {
        "id": service.name,
        "object": "model",
        "created": service.started,
        "owned_by": "qvgpt",
        "context": guide.context,
        "has_values": guide.source is not None,
        "guidance": vars(service.guidance),
    }


class _Answer(Response):
    """Texts as they are written, or all at once; given up once the client has gone."""

    def __init__(self, service: Service, writing: Writing, streams: bool):
        super().__init__(media_type="text/event-stream" if streams else "application/json")
        self._service, self._writing, self._streams = service, writing, streams

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Tell what is written, and watch the client meanwhile."""
        watch = asyncio.create_task(self._watch(receive))
        try:
            if self._streams:
                await self._tell(send)
            else:
                body = await whole(self._writing, self._service.pieces(self._writing))
                if not self._writing.sink.gone:
                    response = Response(body, media_type="application/json")
                    await response(scope, receive, send)
        finally:
            watch.cancel()
            self._service.give_up(self._writing)

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._service.give_up(self._writing)

    async def _tell(self, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async for piece in stream(self._writing, self._service.pieces(self._writing)):
            if self._writing.sink.gone:
                return
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


# ── errors ───────────────────────────────────────────────────────────────────────────────────


def _respond(status: int, body: bytes, headers: dict[str, str] | None = None) -> Response:
    return Response(body, status, headers, media_type="application/json")


async def _refusal(_: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return _respond(error.status, error.body(), error.headers)


async def _invalid(_: Request, error: Exception) -> Response:
    """The first fault, by the name of its field; of its types the one that fits the most."""
    assert isinstance(error, RequestValidationError)
    found = [(_place(each, error.body), each) for each in error.errors()]
    field = found[0][0]
    place, first = min(
        (each for each in found if each[0][: len(field)] == field),
        key=lambda each: (each[1]["type"].endswith("_type"), -len(each[0])),
    )
    name = printable(".".join(place), 100) or None
    message = first["msg"] if name is None else f"{name}: {first['msg']}"
    if first["type"] == "json_invalid":
        name, message = None, "the body is no JSON"
    return _respond(400, fault(400, printable(message), name))


def _place(found: dict[str, Any], body: Any) -> list[str]:
    """Where in the body a fault is, without the names of types, which pydantic puts between."""
    place, path = [], found["loc"][1:]
    for part in path:
        try:
            body = body[part]
        except (LookupError, TypeError):
            if found["type"] != "missing" or part != path[-1]:
                continue
        place.append(str(part))
    return place


async def _http(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    body = fault(error.status_code, printable(str(error.detail)))
    return _respond(error.status_code, body, dict(error.headers or {}))


async def _internal(_: Request, error: Exception) -> Response:
    """Nothing of it is told; the gate logs it."""
    return _respond(500, fault(500, "internal error", code="internal_error"))
