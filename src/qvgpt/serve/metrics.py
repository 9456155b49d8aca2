"""What Prometheus reads at /metrics."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120)


class Metrics:
    """Counters of one server. Labels take few values: no request names one."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self):
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "qvgpt_requests", "Answers by route and status", ["route", "status"], registry=registry
        )
        self.prompt_tokens = Counter(
            "qvgpt_prompt_tokens", "Tokens of prompts that were taken", registry=registry
        )
        self.tokens = Counter("qvgpt_tokens", "Tokens written", registry=registry)
        self.cancelled = Counter(
            "qvgpt_cancelled", "Texts whose client went away", registry=registry
        )
        self.failed = Counter("qvgpt_failed", "Texts that could not be written", registry=registry)
        self.step_seconds = Histogram(
            "qvgpt_step_seconds", "Of the engine: a token for every text at work",
            registry=registry, buckets=(0.001, 0.002, *_SECONDS),
        )  # fmt: skip
        self.first_token_seconds = Histogram(
            "qvgpt_first_token_seconds", "From a request that streams to its first token",
            registry=registry, buckets=_SECONDS,
        )  # fmt: skip
        self.request_seconds = Histogram(
            "qvgpt_request_seconds", "From the request to its last byte",
            ["route"], registry=registry, buckets=_SECONDS,
        )  # fmt: skip

    def watch(self, name: str, help: str, read: Callable[[], float]) -> None:
        """A number that is looked up when it is asked for."""
        Gauge(name, help, registry=self._registry).set_function(read)

    def step(self, tokens: int, seconds: float) -> None:
        """Count what the engine did."""
        self.tokens.inc(tokens)
        self.step_seconds.observe(seconds)

    def page(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)
