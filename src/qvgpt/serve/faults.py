"""Answers that are no success, all in OpenAI's form."""

import json
from dataclasses import dataclass, field

TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


@dataclass(eq=False)
class Refusal(Exception):
    """Ends a request with a status."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def body(self) -> bytes:
        """{"error": …}; pure ASCII, whatever was asked."""
        return fault(self.status, self.message, self.param, self.code)


def fault(status: int, message: str, param: str | None = None, code: str | None = None) -> bytes:
    """The body of an answer of this status."""
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    error = {"message": message, "type": kind, "param": param, "code": code}
    return json.dumps({"error": error}).encode()


def printable(text: str, longest: int = 300) -> str:
    """Text that cannot steer a terminal or forge a line of a log."""
    shown = text if len(text) <= longest else text[:longest] + "…"
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in shown
    )
