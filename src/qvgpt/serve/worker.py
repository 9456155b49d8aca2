"""The one thread that writes: jobs join and leave the engine's batch between its steps.

    loop thread                        this thread
    submit(job), cancel(job) ───────▶  between steps
    deliver([(job, piece), …]) ◀─────  after a step, for jobs that have something to tell

A step that fails takes nobody along but the job at fault: all of them begin anew in halves (a seed
gives the same text again, and what was told already is not told twice) until it stands alone.
"""

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from qvgpt.decode.engine import Door, Engine, Request, TokenEvent, TokenReport
from qvgpt.decode.guide import Guide
from qvgpt.decode.sources import ValueSource
from qvgpt.models.value_model import ValueModel
from qvgpt.terminal import TextStream

logger = logging.getLogger("qvgpt.serve")

PAUSE = 0.02
"""Seconds between two pieces of a stream, at least: fifty a second look smooth."""
_PIECES_PER_SECOND = 160  # of all streams together: each stops the computing for 100 to 200 µs
_MOST_FAILURES = 12  # of steps that a job takes part in: enough to be halved out of any batch


@dataclass(frozen=True)
class Piece:
    """What a job has to tell since its last piece."""

    text: str
    tokens: list[int]
    reports: list[TokenReport]
    finished: str | None
    """stop (an end token or a stop string), length, or error."""


@dataclass(eq=False)
class Job:
    """One text to be written, told to `sink` (an object of the loop thread's)."""

    request: Request
    stops: tuple[str, ...]
    streams: bool
    sink: Any
    index: int
    stream: TextStream
    held: str = ""
    """Text that may yet turn out to begin a stop string."""
    tokens: list[int] = field(default_factory=list)
    """Not told yet."""
    reports: list[TokenReport] = field(default_factory=list)
    due: float = 0.0
    position: int = 0
    """Tokens of the engine's present attempt."""
    seen: int = 0
    """Tokens of all attempts, the furthest."""
    proof: int = 0
    """Where the last attempt failed: it has proved harmless beyond."""
    failures: int = 0
    engine_id: int | None = None

    def take(self, event: TokenEvent) -> str | None:
        """Add a token; whether and how the text is finished."""
        self.position += 1
        if self.position > self.seen:
            self.seen = self.position
            self.tokens.append(event.token)
            if event.report is not None:
                self.reports.append(event.report)
            if self.stops:  # else text is decoded when it is told
                self.held += self.stream.add(event.token)
                if self._stop():
                    return "stop"
        return "stop" if event.finished == "end" else event.finished

    def _stop(self) -> bool:
        found = [at for stop in self.stops if (at := self.held.find(stop)) >= 0]
        if found:
            self.held = self.held[: min(found)]
        return bool(found)

    def piece(self, finished: str | None) -> Piece:
        """What was not told yet; text that may begin a stop string waits."""
        if not self.stops:
            self.held += self.stream.add(*self.tokens)
        text, self.held = self.held, ""
        if finished is None:
            kept = max((_overlap(text, stop) for stop in self.stops), default=0)
            text, self.held = text[: len(text) - kept], text[len(text) - kept :]
        piece = Piece(text, self.tokens, self.reports, finished)
        self.tokens, self.reports = [], []
        return piece

    def last_piece(self, finished: str, stopped: bool) -> Piece:
        """The rest, half a character included unless a stop string came."""
        if not stopped:
            if not self.stops:
                self.held += self.stream.add(*self.tokens)
            self.held += self.stream.rest()
            if self.stops and self._stop():
                finished = "stop"
        text, self.held = self.held, ""
        piece = Piece(text, self.tokens, self.reports, finished)
        self.tokens, self.reports = [], []
        return piece


def _overlap(text: str, stop: str) -> int:
    """The longest end of the text that begins the stop string."""
    most = min(len(text), len(stop) - 1)
    return next((n for n in range(most, 0, -1) if text.endswith(stop[:n])), 0)


Deliver = Callable[[list[tuple[Job, Piece]]], None]


class Worker:
    """Owns the engine. `deliver` is called in this thread."""

    def __init__(
        self,
        model: ValueModel,
        deliver: Deliver,
        *,
        values: ValueSource | None = None,
        max_batch: int = 64,
        foldable: Sequence[float] = (),
        step_done: Callable[[int, float], None] = lambda tokens, seconds: None,
        threads: int | None = None,
    ):
        self.max_batch, self.deliver, self.step_done = max_batch, deliver, step_done
        self.guide = replace(Guide.of(model, values), foldable=frozenset(foldable))
        self._model, self._values, self._threads = model, values, threads
        self._engine = self._new_engine()
        self._commands: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()
        self._waiting: deque[Job] = deque()
        self._door = Door(max_batch)
        self._groups: list[list[Job]] = []
        self._at_work: dict[int, Job] = {}
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.failures = 0
        """Steps that failed."""

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread after its step; what was not written is never told."""
        self._commands.put(None)
        if self._thread.ident is not None:
            self._thread.join()

    @property
    def at_work(self) -> int:
        """Texts in the batch."""
        return len(self._at_work)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue texts; from any thread."""
        self._commands.put(lambda: self._waiting.extend(jobs))

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Forget texts, wherever they are; from any thread."""
        self._commands.put(lambda: [self._forget(job) for job in jobs])

    def call(self, function: Callable[[], None]) -> None:
        """Have something done between two steps; it sees to its own errors."""
        self._commands.put(function)

    # ── in the thread ────────────────────────────────────────────────────────────────────────

    def _new_engine(self) -> Engine:
        engine = Engine(self._model, self.max_batch, values=self._values)
        engine.guide = self.guide  # with what it has folded
        return engine

    def _run(self) -> None:
        if self._threads is not None:
            torch.set_num_threads(self._threads)
        while True:
            idle = not (self._at_work or self._waiting or self._groups)
            while idle or not self._commands.empty():
                command = self._commands.get()
                if command is None:
                    return
                command()
                idle = False
            self._admit()
            if self._at_work:
                self._step()

    def _admit(self) -> None:
        if any(job.position < job.proof for job in self._at_work.values()):
            return  # suspects are tried among themselves
        joining: list[Job] = []
        while self._groups and not joining:
            joining = self._groups.pop()
        if not joining:
            begin = self._door.open(len(self._at_work), len(self._waiting))
            joining = [self._waiting.popleft() for _ in range(begin)]
        for job in joining:
            try:
                job.engine_id = self._engine.submit(job.request)
            except Exception as error:
                self._fail(job, error)
            else:
                job.position = 0
                self._at_work[job.engine_id] = job

    def _step(self) -> None:
        started = time.perf_counter()
        try:
            events = self._engine.step()
        except Exception as error:
            self._recover(error)
            return
        now = time.monotonic()
        pause = max(PAUSE, len(self._at_work) / _PIECES_PER_SECOND)
        told: list[tuple[Job, Piece]] = []
        for event in events:
            job = self._at_work[event.request_id]
            finished = job.take(event)
            if finished:
                del self._at_work[event.request_id]
                if event.finished is None:
                    self._engine.cancel(event.request_id)
                told.append((job, job.last_piece(finished, event.finished is None)))
            elif job.streams and now >= job.due and job.tokens:
                job.due = now + pause
                told.append((job, job.piece(None)))
        self.step_done(len(events), time.perf_counter() - started)
        if told:
            self.deliver(told)

    def _forget(self, job: Job) -> None:
        if job.engine_id is not None and self._at_work.pop(job.engine_id, None):
            self._engine.cancel(job.engine_id)
        for group in (self._waiting, *self._groups):
            if job in group:
                group.remove(job)

    def _fail(self, job: Job, error: Exception) -> None:
        logger.error("a text could not be written", exc_info=error)
        self.deliver([(job, Piece("", [], [], "error"))])

    def _recover(self, error: Exception) -> None:
        """A new engine; those that may be at fault in halves, the others later."""
        self.failures += 1
        logger.warning("a step of %d texts failed: %r", len(self._at_work), error)
        jobs, self._at_work = list(self._at_work.values()), {}
        self._engine = self._new_engine()
        suspects = [job for job in jobs if job.position < job.proof] or jobs
        for job in jobs:
            job.failures += 1
        if len(suspects) == 1:
            self._fail(suspects[0], error)
        else:
            for job in suspects:
                job.proof = max(job.proof, job.position + 1)
            half = (len(suspects) + 1) // 2
            for group in (suspects[half:], suspects[:half]):
                self._groups.append([j for j in group if not self._given_up(j, error)])
        harmless = [job for job in jobs if job not in suspects]
        self._waiting.extendleft(reversed([j for j in harmless if not self._given_up(j, error)]))

    def _given_up(self, job: Job, error: Exception) -> bool:
        if job.failures < _MOST_FAILURES:
            return False
        self._fail(job, error)
        return True
