"""The token loop: requests of any length share a batch and a KV cache, and stream their tokens.

    engine = Engine(model)
    engine.submit(Request(prompt, max_tokens=64, guidance=Guidance(beta=2.0), seed=1))
    while engine.busy:
        for event in engine.step(): ...

`write` is this loop over a list of requests, `generate` over a list of prompts. `values` says
what guides (`sources.py`), by default the model's own heads; each model read has its own cache.
"""

import random
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from qvgpt.decode.guide import Guide, TokenReport
from qvgpt.decode.next_token import NextToken
from qvgpt.decode.policy import Guidance
from qvgpt.decode.reading import Reading, States
from qvgpt.decode.sources import ValueSource
from qvgpt.errors import QvgptError
from qvgpt.models.value_model import ValueModel
from qvgpt.trajectory import Completion


@dataclass(frozen=True)
class Request:
    """One text to be written."""

    tokens: Sequence[int]
    """The prompt, template tokens included."""
    max_tokens: int = 128
    """Where the text is cut if no end token came."""
    guidance: Guidance = field(default_factory=Guidance)
    """How tokens are picked."""
    seed: int = 0
    """The same seed gives the same text, alone or in a full batch."""
    stop: Sequence[str] = ()
    """Strings that end the text when they appear. `Text.text` is what stands before the first;
    the tokens stay as sampled."""
    alternatives: int | None = None
    """Report on every token, so many of the likeliest beside it. At temperature 0 reports are of
    the distribution at temperature 1, whose mode is written. None: as the engine does."""


@dataclass(frozen=True)
class TokenEvent:
    """One new token of one request."""

    request_id: int
    token: int
    finished: Literal["end", "length", "stop"] | None
    report: TokenReport | None = None


OnStep = Callable[[list[TokenEvent]], None]
"""Told the events of each step."""


@dataclass
class Text:
    """What was written to one request."""

    tokens: list[int] = field(default_factory=list)
    """As sampled, the end token or stop string included where one came."""
    text: str = ""
    """The same as text, without either, where the model has a tokenizer."""
    terminated: bool = False
    """False if the length limit cut it."""
    kl: float = 0.0
    """Σ over its tokens of KL(π ‖ π₀), where reports were asked for; of a text that was chosen
    among several see `write_best`."""
    reports: list[TokenReport] = field(default_factory=list)


@dataclass
class _Row:
    """A request at work in a slot of the batch."""

    request_id: int
    request: Request
    random: random.Random
    written: list[int] = field(default_factory=list)

    @property
    def length(self) -> int:
        return len(self.request.tokens) + len(self.written)


@dataclass
class Door:
    """Who waits for a slot begins with others, since prompts are read much faster together: a
    sixteenth of the batch at a time, or whoever has a slot after so many steps."""

    max_batch: int
    kept: int = 0
    """Steps that somebody had a slot and was kept for the others."""

    def open(self, at_work: int, waiting: int) -> int:
        """How many begin now; asked once a step."""
        free, some = min(self.max_batch - at_work, waiting), min(waiting, self.max_batch // 16)
        if 0 < free < some and self.kept < some:
            self.kept += 1
            return 0
        self.kept = 0
        return free


class Engine:
    """A batched token loop over a model. With `report`, every event carries a `TokenReport`."""

    def __init__(
        self,
        model: ValueModel,
        max_batch: int = 64,
        report: bool = False,
        values: ValueSource | None = None,
    ):
        if max_batch < 1:
            raise QvgptError(f"max_batch must be at least 1, not {max_batch}")
        self.model, self.guide = model, Guide.of(model, values, look=False)  # `submit` does
        self.max_batch, self.report = max_batch, report
        tokenizer = model.tokenizer
        self.end_ids = frozenset(tokenizer.template.end_ids) if tokenizer else frozenset()
        self.counts = [0 for _ in self.guide.trunks]
        """Tokens that each trunk has read, prompts and tried candidates included; ours first."""
        self._waiting: deque[tuple[int, Request]] = deque()
        self._door = Door(max_batch)
        self._slots: list[_Row | None] = []
        self._reading: Reading | None = None
        self._next_id = 0
        self._failed = False

    @property
    def forward_tokens(self) -> int:
        """Tokens that were read by any trunk: the cost in forwards."""
        return sum(self.counts)

    @property
    def busy(self) -> bool:
        """Whether anything is waiting or being written."""
        return bool(self._waiting) or any(self._slots)

    def submit(self, request: Request) -> int:
        """Queue a request and return its id. Raises `QvgptError` if it cannot be served.

        Weights may have changed while nothing was at work; a model that was put into training mode
        meanwhile is put back into that of evaluation.
        """
        if not self.busy:
            self.guide.look()
        self.guide.refuse(request.tokens, request.max_tokens, request.guidance)
        self.guide.refuse_stops(request.stop)
        self._next_id += 1
        self._waiting.append((self._next_id, request))
        return self._next_id

    def cancel(self, request_id: int) -> None:
        """Forget a request, waiting or at work; unknown ids are ignored."""
        self._waiting = deque(w for w in self._waiting if w[0] != request_id)
        self._slots = [None if r and r.request_id == request_id else r for r in self._slots]

    @torch.no_grad()
    def step(self) -> list[TokenEvent]:
        """Let waiting requests in, then write one token of every request at work.

        Raises `QvgptError` after a step that failed: what it has read of the texts is unknown.
        """
        if self._failed:
            raise QvgptError("a step of this engine failed: begin the texts anew in another engine")
        self._failed = True  # until it is over
        events = self._step()
        self._failed = False
        return events

    def _step(self) -> list[TokenEvent]:
        self._admit()
        if not any(self._slots):
            return []
        assert self._reading is not None
        last = [(row.written or row.request.tokens)[-1] if row else 0 for row in self._slots]
        idle = None in self._slots
        at_work = torch.tensor([row is not None for row in self._slots]) if idle else None
        self._reading.expect(max(row.length for row in self._slots if row) - 1)
        states = self._reading.read(torch.tensor(last), at_work, self._texts)
        events: list[TokenEvent] = []
        kinds: dict[tuple[Guidance, int | None], list[int]] = {}
        for i, row in enumerate(self._slots):
            if row:
                kinds.setdefault((row.request.guidance, row.request.alternatives), []).append(i)
        for (guidance, alternatives), slots in kinds.items():
            some = states if len(slots) == len(states) else states.take(slots)
            events += self._write(slots, some, guidance, alternatives)
        self._shrink()
        return events

    def _texts(self) -> list[list[int]]:
        return [[*row.request.tokens, *row.written] if row else [] for row in self._slots]

    def _write(
        self, slots: list[int], states: States, guidance: Guidance, alternatives: int | None
    ) -> list[TokenEvent]:
        """Sample a token for each of the slots, which all share guidance and reports."""
        rows = [row for i in slots if (row := self._slots[i])]
        positions = [len(row.written) for row in rows]
        report, mode = self.report or alternatives is not None, False
        if alternatives is not None and guidance.temperature == 0:
            guidance, mode = replace(guidance, temperature=1.0), True
        picked = self.guide.next_token(states, guidance, positions, report)
        numbers = [row.random.random() for row in rows]
        uniform = torch.tensor(numbers, dtype=torch.float64, device=self.model.device)
        token, place = picked.greedy().sample(uniform) if mode else picked.sample(uniform)
        if mode:
            place = picked.logprob.argmax(-1)
        count = alternatives or 0
        reports = self._reports(states, guidance, picked, token, place, count) if report else None
        events = []
        for i, (slot, row, t) in enumerate(zip(slots, rows, token.tolist(), strict=True)):
            row.written.append(t)
            finished = self._finished(row, t)
            if finished:
                self._slots[slot] = None
            events.append(TokenEvent(row.request_id, t, finished, reports[i] if reports else None))
        return events

    def _reports(
        self,
        states: States,
        guidance: Guidance,
        picked: NextToken,
        token: Tensor,
        place: Tensor,
        count: int,
    ) -> list[TokenReport]:
        at = place[:, None]
        columns = [
            picked.base_logprob.gather(1, at)[:, 0].tolist(),
            picked.logprob.gather(1, at)[:, 0].tolist(),
            picked.kl().tolist(),
            *self.guide.report(states, token, guidance.twins),
        ]
        for of_budget in (picked.beta, picked.spent):
            columns.append([None] * len(at) if of_budget is None else of_budget.tolist())
        columns.append(self.guide.alternatives(states, picked, count, guidance.twins))
        return [TokenReport(*values) for values in zip(*columns, strict=True)]

    def _finished(self, row: _Row, token: int) -> Literal["end", "length", "stop"] | None:
        if token in self.end_ids:
            return "end"
        if row.request.stop:
            assert self.model.tokenizer is not None
            text = self.model.tokenizer.decode(row.written)
            if any(stop in text for stop in row.request.stop):
                return "stop"
        return "length" if len(row.written) >= row.request.max_tokens else None

    def _admit(self) -> None:
        """Fill free slots: read the prompts but for their last token, which `step` reads."""
        at_work = sum(row is not None for row in self._slots)
        begin = self._door.open(at_work, len(self._waiting))
        if not begin:
            return
        self._make_room()
        assert self._reading is not None
        free = [i for i, row in enumerate(self._slots) if row is None][:begin]
        admitted = [self._waiting.popleft() for _ in range(begin)]
        for slot, (request_id, request) in zip(free, admitted, strict=True):
            self._slots[slot] = _Row(request_id, request, random_of(request.seed))
        # samples of one prompt are read once
        prompts = list(dict.fromkeys(tuple(request.tokens[:-1]) for _, request in admitted))
        which = [prompts.index(tuple(request.tokens[:-1])) for _, request in admitted]
        longest = max(len(p) for p in prompts)
        if longest == 0:
            self._reading.clear(torch.tensor(free))
            return
        read = Reading.of(self.guide.trunks, prompts, longest, self.counts)
        self._reading.insert(torch.tensor(free), read.select(torch.tensor(which)))

    def _make_room(self) -> None:
        """A slot for everyone who waits, up to `max_batch`, each as long as the longest needs."""
        active = [i for i, row in enumerate(self._slots) if row]
        size = min(self.max_batch, len(active) + len(self._waiting))
        capacity = max(len(r.tokens) + r.max_tokens for _, r in self._waiting)
        if active:
            assert self._reading is not None
            if size <= len(self._slots) and capacity <= self._reading.capacity:
                return
            capacity = max(capacity, self._reading.capacity)
        # a cache holds whole buckets, so that its capacity may exceed the context
        capacity = min(capacity, self.guide.context)
        larger = Reading.new(self.guide.trunks, size, capacity, self.counts)
        if active:
            assert self._reading is not None
            kept = self._reading.select(torch.tensor(active))
            larger.insert(torch.arange(len(active)), kept)
        self._reading = larger
        self._slots = [self._slots[i] for i in active] + [None] * (size - len(active))

    def _shrink(self) -> None:
        """Once half of the slots idle and nobody waits, drop them."""
        active = [i for i, row in enumerate(self._slots) if row]
        if self._waiting or not active or 2 * len(active) > len(self._slots):
            return
        assert self._reading is not None
        self._reading = self._reading.select(torch.tensor(active))
        self._slots = [self._slots[i] for i in active]


def random_of(seed: int) -> random.Random:
    """A text's random numbers. Python's own seeds of numbers know no sign: −1 would be 1."""
    return random.Random(seed if seed >= 0 else str(seed))


def row_seed(seed: int, row: int) -> int:
    """The seed of one of many texts; two runs with different `seed`s share none."""
    return seed * 1_000_003 + row


def generate(
    model: ValueModel,
    prompts: Sequence[Sequence[int]],
    guidance: Guidance | None = None,
    *,
    max_tokens: int = 128,
    seed: int = 0,
    max_batch: int = 64,
    stop: Sequence[str] = (),
    values: ValueSource | None = None,
) -> list[Completion]:
    """Write one completion per prompt, in their order; row i is seeded with `row_seed(seed, i)`."""
    guidance = guidance or Guidance()
    requests = [
        Request(prompt, max_tokens, guidance, row_seed(seed, i), stop)
        for i, prompt in enumerate(prompts)
    ]
    texts = write(model, requests, max_batch=max_batch, values=values)
    return [Completion(t.tokens, t.terminated) for t in texts]


def write(
    model: ValueModel,
    requests: Sequence[Request],
    *,
    max_batch: int = 64,
    report: bool = False,
    keep_reports: Collection[int] | None = None,
    on_step: OnStep | None = None,
    values: ValueSource | None = None,
    spent: list[int] | None = None,
) -> list[Text]:
    """One text per request, in their order.

    `report` has every token reported on, which is slower and gives `kl`; the reports themselves
    are kept for the requests whose index is in `keep_reports` (None: for all). `values` guide
    instead of the model's own. To `spent` are added the tokens that were read. Raises `QvgptError`
    for what cannot be served.
    """
    engine = Engine(model, max_batch, report, values)
    place = {engine.submit(request): i for i, request in enumerate(requests)}
    texts = [Text() for _ in requests]
    while engine.busy:
        events = engine.step()
        for event in events:
            i = place[event.request_id]
            texts[i].tokens.append(event.token)
            texts[i].terminated = event.finished in ("end", "stop")
            if event.report is not None:
                texts[i].kl += event.report.kl
                if keep_reports is None or i in keep_reports:
                    texts[i].reports.append(event.report)
        if on_step is not None:
            on_step(events)
    if spent is not None:
        spent.append(engine.forward_tokens)
    if model.tokenizer is not None:
        for text, request in zip(texts, requests, strict=True):
            whole = model.tokenizer.decode_completion(text.tokens)
            ends = [at for stop in request.stop if (at := whole.find(stop)) >= 0]
            text.text = whole[: min(ends, default=None)]
    return texts
