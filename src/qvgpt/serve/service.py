"""A model at the service of many: what is asked of it, checked, queued, written and told."""

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from qvgpt.data.files import Row
from qvgpt.data.rows import row_to_trajectories
from qvgpt.data.token_bytes import TokenBytes
from qvgpt.decode.engine import Request, row_seed
from qvgpt.decode.policy import Guidance
from qvgpt.decode.score import score
from qvgpt.decode.sources import ValueSource
from qvgpt.errors import QvgptError
from qvgpt.lens.records import number
from qvgpt.models.value_model import ValueModel
from qvgpt.serve.faults import Refusal
from qvgpt.serve.metrics import Metrics
from qvgpt.serve.schema import (
    MOST_CHOICES,
    ChatRequest,
    CompletionRequest,
    GuidanceFields,
    Sampled,
    ValuesRequest,
)
from qvgpt.serve.shown import Form, usage, values
from qvgpt.serve.telling import Sink, Writing
from qvgpt.serve.worker import Job, Piece, Worker
from qvgpt.terminal import TextStream

DEFAULT_MAX_TOKENS = 256
MOST_TOLD = 1 << 18
"""Tokens and alternatives of one answer that something is told of; each is some 300 bytes."""


class Service:
    """A model, the thread that writes, and how much may wait."""

    def __init__(
        self,
        model: ValueModel,
        name: str,
        *,
        guidance: Guidance | None = None,
        values: ValueSource | None = None,
        max_batch: int = 64,
        max_waiting: int = 256,
        threads: int | None = None,
    ):
        """`threads`: that torch may take for writing; None: as it is set."""
        assert model.tokenizer is not None
        self.model, self.name, self.values = model, name, values
        self.tokenizer, self.guidance = model.tokenizer, guidance or Guidance()
        self.shown = TokenBytes(self.tokenizer)
        self.most_characters = self.shown.longest * self.model.trunk.seq_len
        """No longer text can fit the context: it need not even be read."""
        self.max_batch, self.max_waiting = max_batch, max_waiting
        self.metrics = Metrics()
        self.worker = Worker(
            model, self._deliver, values=values, max_batch=max_batch,
            foldable=[self.guidance.beta], step_done=self.metrics.step, threads=threads,
        )  # fmt: skip
        self.worker.guide.refuse([0], 1, self.guidance)
        self.live: set[Job] = set()
        """Texts that are asked for and neither finished nor given up."""
        self.calls = 0
        """Given texts to be looked at."""
        self.draining = False
        self.started = int(time.time())
        self._seconds = 1.0  # a text's, lately
        self._loop: asyncio.AbstractEventLoop | None = None
        # one thread: a Hugging Face tokenizer must not be used by two
        self._reader = ThreadPoolExecutor(1, "tokenizer")
        watch = self.metrics.watch
        watch("qvgpt_at_work", "Texts in the batch", lambda: self.worker.at_work)
        watch("qvgpt_waiting", "Texts that wait for room in it", lambda: self.waiting)

    @contextlib.asynccontextmanager
    async def at_work(self) -> AsyncIterator[None]:
        """Serve from this event loop."""
        self._loop = asyncio.get_running_loop()
        self.worker.start()
        try:
            yield
        finally:
            await asyncio.to_thread(self.worker.stop)
            self._reader.shutdown()

    @property
    def waiting(self) -> int:
        """Texts that are not being written yet."""
        return max(0, len(self.live) + self.calls - self.worker.at_work)

    # ── from the engine's thread ─────────────────────────────────────────────────────────────

    def _deliver(self, told: list[tuple[Job, Piece]]) -> None:
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop has closed: nobody listens any more
            self._loop.call_soon_threadsafe(self._receive, told)

    def _receive(self, told: list[tuple[Job, Piece]]) -> None:
        for job, piece in told:
            job.sink.pieces.append((job, piece))
            job.sink.wake.set()
            if piece.finished:
                self.live.discard(job)
                if piece.finished == "error":
                    self.metrics.failed.inc()

    # ── what is asked ────────────────────────────────────────────────────────────────────────

    async def completion(self, asked: CompletionRequest) -> Writing:
        """Begin to write what `/v1/completions` asks."""
        prompts: Any = asked.prompt
        if isinstance(prompts, str) or isinstance(prompts[0], int):
            prompts = [prompts]
        self._check_size(p for p in prompts if isinstance(p, str))
        read = [await self._read(self._prompt, prompt) for prompt in prompts]
        return self._begin(asked, read, asked.logprobs, chat=False)

    async def chat(self, asked: ChatRequest) -> Writing:
        """Begin to write what `/v1/chat/completions` asks."""
        messages = [message.as_row() for message in asked.messages]
        self._check_size(["".join(message["content"] for message in messages)])
        read = await self._read(self.tokenizer.encode_history, messages)
        if asked.max_completion_tokens is not None:
            asked = asked.model_copy(update={"max_tokens": asked.max_completion_tokens})
        if asked.top_logprobs and not asked.logprobs:
            raise Refusal(400, "top_logprobs needs logprobs: true", "top_logprobs")
        return self._begin(asked, [read], asked.top_logprobs or 0 if asked.logprobs else None, True)

    def _prompt(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer.encode_prompt(prompt)
        size = self.worker.guide.known
        if max(prompt) >= size:
            raise QvgptError(f"token id {max(prompt)}: the vocabulary has {size}")
        return prompt

    def _check_size(self, texts: Iterable[str]) -> None:
        for text in texts:
            if len(text) > self.most_characters:
                raise Refusal(
                    400,
                    f"{len(text)} characters do not fit the context of "
                    f"{self.worker.guide.context} tokens",
                    "prompt",
                    "context_length_exceeded",
                )

    async def _read(self, function: Callable[[Any], list[int]], given: Any) -> list[int]:
        """Text as tokens, in a thread of its own: a long text must not keep others waiting."""
        assert self._loop is not None
        try:
            return await self._loop.run_in_executor(self._reader, function, given)
        except QvgptError as error:
            raise Refusal(400, str(error), "prompt") from None

    def _begin(
        self, asked: Sampled, prompts: list[list[int]], logprobs: int | None, chat: bool
    ) -> Writing:
        self._check_name(asked.model)
        if asked.stream_options is not None and not asked.stream:
            raise Refusal(400, "stream_options needs stream: true", "stream_options")
        count, n = len(prompts) * (asked.n or 1), asked.n or 1
        if count > MOST_CHOICES:
            raise Refusal(400, f"{count} texts of one request, at most {MOST_CHOICES}", "n")
        guidance = self._guidance(asked.guidance, asked.temperature, asked.top_p)
        lengths = [self._length(prompt, asked.max_tokens) for prompt in prompts]
        self._refuse([0], 1, guidance)
        wanted = [k for k in (asked.alternatives, logprobs) if k is not None]
        alternatives, seed = max(wanted, default=None), asked.seed
        if alternatives is not None:
            self._check_told(n * sum(lengths), alternatives)
        self._admit(count)
        seed = secrets.randbits(62) if seed is None else seed
        sink = Sink()
        jobs = [
            Job(
                Request(
                    prompt, length, guidance, row_seed(seed, p * n + k), alternatives=alternatives
                ),
                asked.stops, bool(asked.stream), sink, p * n + k, TextStream(self.tokenizer),
            )
            for p, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
            for k in range(n)
        ]  # fmt: skip
        form = Form(
            chat, self.name, self.shown, frozenset(self.tokenizer.template.end_ids),
            asked.alternatives, logprobs,
        )  # fmt: skip
        self.live.update(jobs)
        self.worker.submit(jobs)
        tokens = sum(map(len, prompts))
        self.metrics.prompt_tokens.inc(tokens)
        with_usage = asked.stream_options is not None and asked.stream_options.include_usage
        return Writing(form, jobs, sink, tokens, time.monotonic(), bool(with_usage))

    def _check_name(self, name: str | None) -> None:
        if name is not None and name != self.name:
            raise Refusal(
                404, f"the model served here is {self.name!r}", "model", "model_not_found"
            )

    def _guidance(
        self, asked: GuidanceFields | None, temperature: float | None, top_p: float | None
    ) -> Guidance:
        guidance = self.guidance
        try:
            if asked is not None:
                guidance = Guidance(**asked.model_dump(exclude_none=True))
            said = {"temperature": temperature, "top_p": top_p}
            return replace(guidance, **{k: v for k, v in said.items() if v is not None})
        except QvgptError as error:
            raise Refusal(400, str(error).partition(", not as in")[0], "guidance") from None

    def _length(self, prompt: list[int], max_tokens: int | None) -> int:
        context = self.worker.guide.context
        room = context - len(prompt)
        if room < (max_tokens or 1):
            raise Refusal(
                400,
                f"a prompt of {len(prompt)} tokens and max_tokens {max_tokens or 1} do not fit "
                f"the context of {context}",
                "max_tokens",
                "context_length_exceeded",
            )
        return max_tokens or min(DEFAULT_MAX_TOKENS, room)

    def _check_told(self, tokens: int, alternatives: int) -> None:
        if tokens * (1 + alternatives) > MOST_TOLD:
            raise Refusal(
                400,
                f"values or logprobs of {tokens} tokens, each with {alternatives} alternatives: at "
                f"most {MOST_TOLD} in all",
                "values",
            )

    def _refuse(self, tokens: list[int], max_tokens: int, guidance: Guidance) -> None:
        try:
            self.worker.guide.refuse(tokens, max_tokens, guidance)
        except QvgptError as error:
            raise Refusal(400, str(error), "guidance") from None

    def _admit(self, count: int) -> None:
        if self.draining:
            raise Refusal(503, "the server is about to end", headers={"Retry-After": "5"})
        room = self.max_batch + self.max_waiting
        if count > room:
            raise Refusal(400, f"{count} texts of one request, at most {room} here", "n")
        if len(self.live) + self.calls + count > room:
            after = min(60, max(1, round(self._seconds * self.waiting / self.max_batch)))
            raise Refusal(
                429,
                f"{self.waiting} texts are waiting: try again later",
                code="rate_limit_exceeded",
                headers={"Retry-After": str(after)},
            )

    # ── what is told ─────────────────────────────────────────────────────────────────────────

    def give_up(self, writing: Writing) -> None:
        """Stop writing for a client that is gone; nothing happens where all is written."""
        left = [job for job in writing.jobs if job in self.live]
        writing.sink.gone = True
        writing.sink.wake.set()
        if left:
            self.metrics.cancelled.inc(len(left))
            self.live.difference_update(left)
            self.worker.cancel(left)

    async def pieces(self, writing: Writing) -> AsyncIterator[list[tuple[Job, Piece]]]:
        """Pieces as they come, until every text is finished or the client gone.

        Raises `Refusal` where a text cannot be written.
        """
        sink, left = writing.sink, len(writing.jobs)
        first = True
        while left and not sink.gone:
            await sink.wake.wait()
            sink.wake.clear()
            found, sink.pieces = sink.pieces, []
            if first and found and found[0][0].streams:
                self.metrics.first_token_seconds.observe(time.monotonic() - writing.started)
                first = False
            left -= sum(piece.finished is not None for _, piece in found)
            if any(piece.finished == "error" for _, piece in found):
                self.give_up(writing)
                raise Refusal(500, "the text could not be written", code="internal_error")
            if found:
                yield found
        self._seconds += 0.1 * (time.monotonic() - writing.started - self._seconds)

    # ── given texts ──────────────────────────────────────────────────────────────────────────

    async def values_of(self, asked: ValuesRequest) -> bytes:
        """What is thought of every token of a given text."""
        self._check_name(asked.model)
        names = ("text", "prompt", "completion", "messages")
        given = {n: getattr(asked, n) for n in names if getattr(asked, n) is not None}
        if set(given) not in ({"text"}, {"prompt", "completion"}, {"messages"}):
            raise Refusal(400, "give text, or prompt and completion, or messages")
        if asked.messages is not None:
            given["messages"] = [message.as_row() for message in asked.messages]
        self._check_size(["".join(m["content"] for m in given.get("messages", []))])
        self._check_size(value for value in given.values() if isinstance(value, str))
        guidance = self._guidance(asked.guidance, None, None)
        row = Row("the request", {**given, "truncated": not asked.ended})
        assert self._loop is not None
        try:
            [text] = await self._loop.run_in_executor(
                self._reader, row_to_trajectories, row, self.tokenizer
            )
        except QvgptError as error:
            raise Refusal(400, str(error)) from None
        context = self.worker.guide.context
        if len(text.tokens) > context:
            raise Refusal(
                400, f"a text of {len(text.tokens)} tokens does not fit the context of {context}",
                code="context_length_exceeded",
            )  # fmt: skip
        self._check_told(len(text.tokens), asked.alternatives)
        self._refuse([0], 1, guidance)
        found = await self._between_steps(
            lambda: score(
                self.model, [text], guidance, values=self.values, alternatives=asked.alternatives
            )[0]
        )
        answer = {
            "object": "values",
            "model": self.name,
            "values": values(self.shown, found.tokens, found.reports, asked.alternatives),
            "end_value": number(found.end_value),
            "usage": usage(len(text.tokens), 0),
        }
        return json.dumps(answer).encode()

    async def _between_steps(self, function: Callable[[], Any]) -> Any:
        """What the function returns, called in the thread of the engine."""
        self._admit(1)
        loop, done = asyncio.get_running_loop(), asyncio.get_running_loop().create_future()

        def settle(result: Any, error: Exception | None) -> None:
            self.calls -= 1
            if not done.cancelled():
                done.set_result(result) if error is None else done.set_exception(error)

        def run() -> None:
            try:
                result, error = function(), None
            except Exception as found:
                result, error = None, found
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(settle, result, error)

        self.calls += 1
        self.worker.call(run)
        return await done
