"""A request's texts on their way to the client, at once or in pieces."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from qvgpt.serve.faults import Refusal
from qvgpt.serve.shown import Choice, Form, usage
from qvgpt.serve.worker import Job, Piece

Pieces = AsyncIterator[list[tuple[Job, Piece]]]
"""Some pieces of some texts at a time, as they come. May raise `Refusal`."""


class Sink:
    """Where the pieces of one request come together, in the loop's thread."""

    def __init__(self):
        self.pieces: list[tuple[Job, Piece]] = []
        self.wake = asyncio.Event()
        self.gone = False
        """The client has left."""


@dataclass
class Writing:
    """A request that is being written."""

    form: Form
    jobs: list[Job]
    sink: Sink
    prompt_tokens: int
    started: float
    include_usage: bool = False


async def whole(writing: Writing, pieces: Pieces) -> bytes:
    """All texts at once."""
    choices = [Choice(job.index) for job in writing.jobs]
    async for found in pieces:
        for job, piece in found:
            choices[job.index].add(piece)
    written = sum(len(choice.tokens) for choice in choices)
    form = writing.form
    answer = form.frame([form.choice(c, c.whole(), False) for c in choices], False)
    answer["usage"] = usage(writing.prompt_tokens, written)
    return _json(answer)


async def stream(writing: Writing, pieces: Pieces) -> AsyncIterator[bytes]:
    """Server-sent events, one for each piece; an error is the last of them."""
    form, written = writing.form, 0
    choices = [Choice(job.index) for job in writing.jobs]
    if form.chat:
        delta = {"delta": {"role": "assistant", "content": ""}, "logprobs": None}
        roles = [{"index": c.index, **delta, "finish_reason": None} for c in choices]
        yield _event(writing, roles)
    left = len(writing.jobs)
    try:
        async for found in pieces:
            written += sum(len(piece.tokens) for _, piece in found)
            left -= sum(piece.finished is not None for _, piece in found)
            shown = [form.choice(choices[job.index], piece, True) for job, piece in found]
            events = [_event(writing, [one]) for one in shown]
            if not left:  # with the last piece: each message wakes both ends
                if writing.include_usage:
                    events.append(_event(writing, [], usage(writing.prompt_tokens, written)))
                events.append(b"data: [DONE]\n\n")
            yield b"".join(events)
    except Refusal as refusal:
        yield b"data: " + refusal.body() + b"\n\n"


def _event(
    writing: Writing, choices: list[dict[str, Any]], total: dict[str, int] | None = None
) -> bytes:
    frame = writing.form.frame(choices, True)
    if writing.include_usage:
        frame["usage"] = total
    return b"data: " + _json(frame) + b"\n\n"


def _json(answer: dict[str, Any]) -> bytes:
    try:
        return json.dumps(answer, allow_nan=False).encode()
    except ValueError:
        raise Refusal(500, "the text has values that are no numbers", code="internal_error") from (
            None
        )
