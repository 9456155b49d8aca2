"""`qvgpt serve`: options, checks, and the server's life. Heavy imports wait until it begins."""

import contextlib
import ipaddress
import logging
import os
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from qvgpt.errors import QvgptError
from qvgpt.source_options import SourceOptions


@dataclass(frozen=True)
class ServeConfig(SourceOptions):
    """An OpenAI-compatible server over a model, guided by its values."""

    model: str
    """Directory of the model."""
    host: str = "127.0.0.1"
    """Where to listen; beyond this machine only with a key."""
    port: int = 8000
    """0: any that is free."""
    name: str | None = None
    """What clients call the model; none: the directory's name."""
    api_key_env: str = "QVGPT_API_KEY"
    """The environment variable that holds the key; where it is set, every route asks for it but
    /health and /ready."""
    allowed_hosts: list[str] = field(default_factory=list)
    """Names that a request's Host may have besides those of this machine itself; with a key and
    none given: any."""
    max_batch: int = 64
    """Texts written at the same time."""
    max_waiting: int = 256
    """Texts that may wait; further requests are answered with 429."""
    max_connections: int = 512
    """Connections at once; further ones are answered with 503."""
    drain_seconds: float = 30.0
    """How long texts may take to be finished once SIGTERM or Ctrl-C came."""


def serve(config: ServeConfig) -> dict[str, Any]:
    """Serve until SIGTERM or Ctrl-C."""
    key, hosts = check(config)
    try:
        import qvgpt.serve.server  # noqa: F401
    except ImportError as error:
        if (error.name or "").startswith("qvgpt"):
            raise
        raise QvgptError(
            f"serve needs the package {error.name}: pip install 'qvgpt[serve]'"
        ) from None
    with _alone() as threads:
        _serve(config, key, hosts, threads)
    return {}


def _serve(
    config: ServeConfig, key: str | None, hosts: frozenset[str] | None, threads: int
) -> None:
    from qvgpt.decode.policy import recommended
    from qvgpt.guidance_options import GuidanceOptions
    from qvgpt.serve.server import Limits, LogFormatter, make_server
    from qvgpt.serve.service import Service

    model, values = config.load(config.model)
    if model.tokenizer is None:
        raise QvgptError(f"{config.model}: has no tokenizer to read prompts with")
    service = Service(
        model,
        config.name or os.path.basename(os.path.abspath(config.model)),
        guidance=recommended(model.info, config.model) if values is None else None,
        values=values,
        max_batch=config.max_batch,
        max_waiting=config.max_waiting,
        threads=threads,
    )
    limits = Limits(config.max_connections, config.drain_seconds)
    with _listening(config.host, config.port) as listener, _logging(LogFormatter()):
        place = listener.getsockname()
        shown = f"[{place[0]}]" if ":" in place[0] else place[0]
        print(f"serving {service.name} at http://{shown}:{place[1]}", file=sys.stderr)
        options = GuidanceOptions(value_models=config.value_models, contrast=config.contrast)
        words = options.in_words(model, service.guidance, values).partition("; the model has")[0]
        print(f"{words}, where a request says no other", file=sys.stderr, flush=True)
        make_server(service, key, hosts, limits).run(sockets=[listener])


@contextlib.contextmanager
def _alone() -> Iterator[int]:
    """Let this thread compute by itself; how many the one that writes may take.

    A thread that computes with several keeps them. Were there two such teams, OpenMP would find
    more threads than cores, and let all of them sleep wherever they now wait for each other for
    some microseconds: two thirds of the speed.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def _listening(host: str, port: int) -> socket.socket:
    """A socket that listens there; an `OSError` says why not."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise QvgptError(f"serve: cannot listen on {host}:{port}: {error.strerror or error}") from (
            None
        )


def check(config: ServeConfig) -> tuple[str | None, frozenset[str] | None]:
    """Key and Hosts (None: any). Raises `QvgptError` for what would be unsafe or cannot be."""
    for name in ("max_batch", "max_connections"):
        if getattr(config, name) < 1:
            raise QvgptError(f"serve: {name} must be at least 1")
    if config.max_waiting < 0 or config.drain_seconds < 0 or not 0 <= config.port < 65536:
        raise QvgptError("serve: max_waiting, drain_seconds, port: 0 or more, port below 65536")
    key = os.environ.get(config.api_key_env)
    key = None if key is None else key.strip()
    if key is not None and not (key and key.isprintable()):
        raise QvgptError(
            f"serve: the key in {config.api_key_env} is empty or no line of text: set or unset it"
        )
    if not _is_loopback(config.host) and key is None:
        raise QvgptError(
            f"serve: {config.host} is reached from other machines: put a key into the environment "
            f"variable {config.api_key_env}, or listen on 127.0.0.1"
        )
    if key is not None and not config.allowed_hosts:
        return key, None
    return key, frozenset({"localhost", "127.0.0.1", "::1", config.host, *config.allowed_hosts})


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@contextlib.contextmanager
def _logging(formatter: logging.Formatter) -> Iterator[None]:
    """Lines on stderr, ours and uvicorn's warnings."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    levels = {"qvgpt.serve": logging.INFO, "uvicorn.error": logging.WARNING}
    loggers = [logging.getLogger(name) for name in levels]
    for logger in loggers:
        logger.setLevel(levels[logger.name])
        logger.addHandler(handler)
        logger.propagate = False
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
            logger.propagate = True
