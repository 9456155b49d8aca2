"""What was written, as clients read it: texts, values, log-probabilities, usage."""

import codecs
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from qvgpt.data.token_bytes import TokenBytes
from qvgpt.decode.engine import TokenReport
from qvgpt.lens.records import Record, record
from qvgpt.serve.worker import Piece

_LOWEST = -9999.0  # OpenAI's log-probability of what cannot be


def values(
    shown: TokenBytes, tokens: Sequence[int], reports: Sequence[TokenReport], alternatives: int
) -> list[Record]:
    """What was thought of each token, with so many of the likeliest beside it."""
    both = zip(tokens, reports, strict=True)
    return [record(shown, token, report, alternatives) for token, report in both]


@dataclass
class Choice:
    """One text of an answer, as its pieces come."""

    index: int
    text: str = ""
    finished: str | None = None
    count: int = 0
    tokens: list[int] = field(default_factory=list)
    reports: list[TokenReport] = field(default_factory=list)
    length: int = 0
    """Characters of the tokens so far, for `text_offset`."""
    decoder: Any = field(default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace"))

    def add(self, piece: Piece) -> None:
        """Keep a piece, for an answer that is told as a whole."""
        self.text += piece.text
        self.tokens += piece.tokens
        self.reports += piece.reports
        self.finished = piece.finished

    def whole(self) -> Piece:
        """All pieces as one."""
        return Piece(self.text, self.tokens, self.reports, self.finished)


@dataclass(frozen=True)
class Form:
    """How the answers to one request look."""

    chat: bool
    model: str
    shown: TokenBytes
    end_ids: frozenset[int]
    values: int | None
    """How many alternatives; None: no values."""
    logprobs: int | None
    """How many of the likeliest tokens; None: no log-probabilities."""
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def frame(self, choices: list[dict[str, Any]], streams: bool) -> dict[str, Any]:
        """What stands around choices."""
        name, kind = ("chatcmpl-", "chat.completion") if self.chat else ("cmpl-", "text_completion")
        if self.chat and streams:
            kind += ".chunk"
        return {
            "id": name + self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def choice(self, choice: Choice, piece: Piece, streams: bool) -> dict[str, Any]:
        """A piece of one text, or the whole."""
        shown: dict[str, Any] = {"index": choice.index}
        if not self.chat:
            shown["text"] = piece.text
        elif streams:
            shown["delta"] = {"content": piece.text}
        else:
            shown["message"] = {"role": "assistant", "content": piece.text, "refusal": None}
        shown["logprobs"] = None if self.logprobs is None else self._logprobs(choice, piece)
        shown["finish_reason"] = piece.finished
        if self.values is not None:
            shown["values"] = values(self.shown, piece.tokens, piece.reports, self.values)
        return shown

    def _logprobs(self, choice: Choice, piece: Piece) -> dict[str, Any]:
        """Of all tokens but the one that ends the text."""
        pairs = zip(piece.tokens, piece.reports, strict=True)
        kept = [(token, report) for token, report in pairs if token not in self.end_ids]
        if self.chat:
            return {"content": [self._likely(t, r) for t, r in kept], "refusal": None}
        offsets = []
        for token, _ in kept:
            half = choice.decoder.getstate()[0]
            text = choice.decoder.decode(self.shown[token])
            broken = half and text[:1] == "\ufffd"  # what came before is no character any more
            offsets.append(choice.length + bool(broken))
            choice.length += len(text)
        assert self.logprobs is not None
        return {
            "tokens": [self.shown.name(token) for token, _ in kept],
            "token_logprobs": [_finite(report.logprob) for _, report in kept],
            "top_logprobs": [
                {
                    self._unlike(a.token): _finite(a.logprob)
                    for a in report.alternatives[: self.logprobs]
                }
                for _, report in kept
            ],
            "text_offset": offsets,
        }

    def _unlike(self, token: int) -> str:
        """A name that no other token has: halves of characters all look alike."""
        name = self.shown.name(token)
        if "\ufffd" not in name:
            return name
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self.shown[token])

    def _likely(self, token: int, report: TokenReport) -> dict[str, Any]:
        assert self.logprobs is not None
        likeliest = [(a.token, a.logprob) for a in report.alternatives[: self.logprobs]]
        return {
            **self._one(token, report.logprob),
            "top_logprobs": [self._one(*each) for each in likeliest],
        }

    def _one(self, token: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self.shown.name(token),
            "logprob": _finite(logprob),
            "bytes": list(self.shown[token]),
        }


def _finite(logprob: float) -> float:
    return round(max(logprob, _LOWEST), 6)


def usage(prompt: int, completion: int) -> dict[str, int]:
    """Tokens read and written."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }
