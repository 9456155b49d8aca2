"""Prompts out of data rows, and the texts a model writes to them: what `evaluate` and `collect`
have in common."""

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from qvgpt.data.rows import Row, prompt_tokens, read_rows
from qvgpt.decode.engine import Engine, Request, TokenReport
from qvgpt.envs.env import completion_text
from qvgpt.errors import QvgptError
from qvgpt.models.value_model import ValueModel
from qvgpt.run import RunProgress

OnStep = Callable[[int, int], None]
"""Told how many texts were finished and how many tokens written since it was last called."""


@dataclass
class Text:
    """What a model wrote to one request."""

    tokens: list[int] = field(default_factory=list)
    """As sampled, the end token included where one came."""
    text: str = ""
    terminated: bool = False
    """False if the length limit cut it."""
    kl: float = 0.0
    """Σ over its tokens of KL(π ‖ π₀), π₀ being the plain model, untruncated, at temperature 1."""
    reports: list[TokenReport] = field(default_factory=list)


def load_prompts(
    path: str | Path, model: ValueModel, max_tokens: int, limit: int | None = None
) -> tuple[list[Row], list[list[int]]]:
    """The first `limit` rows of a file and the token ids of their prompts.

    Raises `QvgptError` where prompts leave less room than `max_tokens` in the model's context.
    """
    if model.tokenizer is None:
        raise QvgptError("the model has no tokenizer to read prompts with")
    rows = list(islice(read_rows(path), limit))
    prompts = [prompt_tokens(row, model.tokenizer) for row in rows]
    if not prompts:
        raise QvgptError(f"{path}: no prompt left at limit {limit}")
    context = model.trunk.seq_len
    too_long = sum(len(p) + max_tokens > context for p in prompts)
    if too_long:
        raise QvgptError(
            f"{too_long} of {len(prompts)} prompts of {path} (the longest has "
            f"{max(map(len, prompts))} tokens) leave less than max_tokens {max_tokens} in the "
            f"context of {context}: lower max_tokens or remove those prompts"
        )
    return rows, prompts


def write_texts(
    model: ValueModel,
    requests: Sequence[Request],
    *,
    max_batch: int = 64,
    measure_kl: bool = False,
    keep_reports: Collection[int] = (),
    on_step: OnStep | None = None,
) -> list[Text]:
    """One text per request, in their order.

    `measure_kl` makes the engine report on every token, which is slower; the reports themselves
    are kept for the requests whose index is in `keep_reports`.
    """
    if model.tokenizer is None:
        raise QvgptError("the model has no tokenizer to read texts with")
    engine = Engine(model, max_batch, report=measure_kl)
    place = {engine.submit(request): i for i, request in enumerate(requests)}
    texts = [Text() for _ in requests]
    while engine.busy:
        events = engine.step()
        for event in events:
            i = place[event.request_id]
            texts[i].tokens.append(event.token)
            if event.finished:
                texts[i].terminated = event.finished != "length"
            if event.report is not None:
                texts[i].kl += _kl(event.report, requests[i])
            if event.report is not None and i in keep_reports:
                texts[i].reports.append(event.report)
        if on_step is not None:
            on_step(sum(event.finished is not None for event in events), len(events))
    for text in texts:
        text.text = completion_text(model.tokenizer, text.tokens)
    return texts


def _kl(report: TokenReport, request: Request) -> float:
    """Exact KL of one step; rounding may put that of equal distributions a little below 0.

    Greedy decoding is a distribution on one token, and its KL is −log π₀ of that token; the
    report has that of the distribution it is the mode of.
    """
    greedy = request.guidance.temperature == 0
    return max(0.0, -report.base_logprob if greedy else report.kl)


class TextProgress:
    """A bar on stderr (lines where that is no terminal): texts done, tokens/s, time left."""

    def __init__(self, what: str, total: int, done: int = 0):
        self.done, self.tokens, self.started = done, 0, time.monotonic()
        self._run = RunProgress(total, done, None)
        self._run.bar.update(self._run.task, description=what)

    def __enter__(self) -> "TextProgress":
        self._run.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._run.__exit__(*error)

    def step(self, texts: int, tokens: int) -> None:
        """An `OnStep`."""
        self.done, self.tokens = self.done + texts, self.tokens + tokens
        self._run.step(self.done, {}, self.tokens / (time.monotonic() - self.started + 1e-9))
