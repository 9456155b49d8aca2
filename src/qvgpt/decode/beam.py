"""Beam search: of each prompt the texts of highest Σ log π, π plain or guided.

    score = Σ log π(a|s) / length^length_penalty      length: tokens written, the end token included

Batched over prompts and beams on one KV cache, which is re-ordered instead of recomputed. The
rules are those of Hugging Face's `generate` with `early_stopping=False`: of the 2K best
continuations the end tokens among the K best are finished texts and the K best others go on; a
prompt is done once it has K finished texts and its best running one, at its present length, is
no better than the worst of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qvgpt.decode.guide import Guide
from qvgpt.decode.policy import NEG_INF, Guidance
from qvgpt.decode.reading import Reading
from qvgpt.decode.sources import ValueSource
from qvgpt.errors import QvgptError
from qvgpt.models.value_model import ValueModel


@dataclass(frozen=True)
class Hypothesis:
    """One text that a search found."""

    tokens: list[int]
    """The end token included where there is one."""
    terminated: bool
    """False if the length limit cut it."""
    logprob: float
    """Σ log π of its tokens, in nats."""
    score: float
    """What the search ranks by."""


@dataclass(frozen=True)
class Found:
    """What a search found, and what it cost."""

    texts: list[list[Hypothesis]]
    """Up to `beams` of each prompt, best first."""
    forward_tokens: int
    """Tokens that any trunk has read, prompts and tried candidates included."""

    @property
    def best(self) -> list[Hypothesis]:
        """The first of each prompt."""
        return [several[0] for several in self.texts]


@dataclass(frozen=True)
class BeamSearch:
    """How to search."""

    beams: int = 5
    """Texts kept at every length; 1 is greedy."""
    length_penalty: float = 1.0
    """0: the likeliest text, which is short. 1: the likeliest token on average. More: longer."""
    max_tokens: int = 128
    """Where a text is cut if no end token came."""
    max_batch: int = 256
    """Texts written at the same time, over all prompts."""

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        for name in ("beams", "max_tokens", "max_batch"):
            if getattr(self, name) < 1:
                raise QvgptError(f"beam search: {name} must be at least 1, not as in {self}")

    @torch.no_grad()
    def __call__(
        self,
        model: ValueModel,
        prompts: Sequence[Sequence[int]],
        guidance: Guidance | None = None,
        values: ValueSource | None = None,
    ) -> Found:
        """Search for the texts of each prompt; `values` guide instead of the model's own.

        Guidance's temperature is ignored: π is that of temperature 1. Raises `QvgptError` for a
        prompt that does not fit, and for guidance that the model cannot give.
        """
        guidance, guide = guidance or Guidance(), Guide.of(model, values)
        for prompt in prompts:
            guide.refuse(prompt, self.max_tokens, guidance)
        texts: list[list[Hypothesis]] = [[] for _ in prompts]
        forward_tokens = 0
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        size = max(1, self.max_batch // self.beams)
        for start in range(0, len(order), size):
            part = order[start : start + size]
            search = _Search(self, guide, [prompts[i] for i in part], guidance)
            for i, several in zip(part, search.run(), strict=True):
                texts[i] = several
            forward_tokens += sum(search.reading.counts)
        return Found(texts, forward_tokens)


class _Search:
    """Some prompts searched side by side; those that are done leave the batch."""

    def __init__(
        self,
        how: BeamSearch,
        guide: Guide,
        prompts: Sequence[Sequence[int]],
        guidance: Guidance,
    ):
        self.how, self.guide, self.guidance = how, guide, guidance
        self.prompts, model = prompts, guide.model
        device = model.device
        template = model.tokenizer.template if model.tokenizer else None
        self.end_ids = torch.tensor(sorted(template.end_ids) if template else [], device=device)
        self.finished: list[list[Hypothesis]] = [[] for _ in prompts]
        self.alive = list(range(len(prompts)))
        room = min(max(map(len, prompts)) + how.max_tokens, guide.context)
        read = Reading.of(guide.trunks, [p[:-1] for p in prompts], room)
        self.reading = read.select(torch.arange(len(prompts)).repeat_interleave(how.beams))
        last = torch.tensor([p[-1] for p in prompts], device=device)
        self.last = last[:, None].expand(-1, how.beams)
        self.logprob = torch.full((len(prompts), how.beams), NEG_INF, device=device)
        self.logprob[:, 0] = 0.0  # at first all beams are the same text: one of them goes on
        self.written = last.new_zeros(len(prompts), how.beams, 0)

    def run(self) -> list[list[Hypothesis]]:
        """Write until every prompt is done."""
        for length in range(1, self.how.max_tokens + 1):
            self.step(length)
            if not self.alive:
                break
        return [sorted(texts, key=lambda t: -t.score) for texts in self.finished]

    def step(self, length: int) -> None:
        """Let every text grow by one token, to `length` of them."""
        k = self.how.beams
        guidance, beta = self._at_one(), None
        states = self.reading.read(self.last.reshape(-1), None, self._texts)
        if guidance.beta_end is not None:
            beta = self.logprob.new_full((len(states),), guidance.beta_at(length - 1))
        picked = self.guide.next_token(states, guidance, beta)
        grown = (self.logprob.reshape(-1, 1) + picked.logprob).view(len(self.alive), -1)
        each = picked.tokens.size(1)
        top = grown.topk(min(k * (1 + len(self.end_ids)), grown.size(1)), dim=1)
        source = top.indices // each
        token = picked.tokens.reshape(len(self.alive), -1).gather(1, top.indices)
        ends = torch.isin(token, self.end_ids)
        self._finish(top.values, source, token, ends, length)
        # the best of those that go on; where candidates run out, a text of probability 0
        logprob, place = top.values.masked_fill(ends, NEG_INF).topk(min(k, top.values.size(1)))
        self._go_on(logprob, source.gather(1, place), token.gather(1, place), length)

    def _texts(self) -> list[list[int]]:
        both = zip(self.alive, self.written.tolist(), strict=True)
        return [[*self.prompts[i], *text] for i, beams in both for text in beams]

    def _at_one(self) -> Guidance:
        return Guidance(**{**vars(self.guidance), "temperature": 1.0})

    def _finish(
        self,
        logprob: Float[Tensor, "prompts top"],
        source: Int[Tensor, "prompts top"],
        token: Int[Tensor, "prompts top"],
        ends: Tensor,
        length: int,
    ) -> None:
        """Put away the texts that end here."""
        k = self.how.beams
        rows, places = (ends[:, :k] & logprob[:, :k].isfinite()).nonzero().unbind(1)
        texts = self.written[rows, source[rows, places]].tolist()
        values, tokens = logprob[rows, places].tolist(), token[rows, places].tolist()
        for row, text, t, value in zip(rows.tolist(), texts, tokens, values, strict=True):
            self._keep(row, [*text, t], value, length, terminated=True)

    def _keep(
        self, row: int, tokens: list[int], value: float, length: int, terminated: bool
    ) -> None:
        score = value / length**self.how.length_penalty
        texts = self.finished[self.alive[row]]
        texts.append(Hypothesis(tokens, terminated, value, score))
        texts.sort(key=lambda t: -t.score)
        del texts[self.how.beams :]

    def _go_on(
        self,
        logprob: Float[Tensor, "prompts beams"],
        source: Int[Tensor, "prompts beams"],
        token: Int[Tensor, "prompts beams"],
        length: int,
    ) -> None:
        """Take the chosen texts further, and leave out the prompts that are done."""
        k = self.how.beams
        missing = k - logprob.size(1)
        if missing:
            pad = torch.nn.functional.pad
            logprob = pad(logprob, (0, missing), value=NEG_INF)
            source, token = pad(source, (0, missing)), pad(token, (0, missing))
        written = self.written.gather(1, source[:, :, None].expand(-1, -1, self.written.size(2)))
        self.written = torch.cat([written, token[:, :, None]], dim=2)
        if length == self.how.max_tokens:
            rows, places = logprob.isfinite().nonzero().unbind(1)
            for row, place in zip(rows.tolist(), places.tolist(), strict=True):
                text, value = self.written[row, place].tolist(), float(logprob[row, place])
                self._keep(row, text, value, length, terminated=False)
            self.alive = []
            return
        best = (logprob[:, 0] / length**self.how.length_penalty).tolist()
        on = [row for row, value in enumerate(best) if not self._is_done(row, value)]
        kept = torch.tensor(on, dtype=torch.long, device=logprob.device)
        rows = (kept[:, None] * k + source[kept]).reshape(-1)
        self.reading.reorder(rows)
        self.logprob, self.last, self.written = logprob[kept], token[kept], self.written[kept]
        self.alive = [self.alive[row] for row in on]

    def _is_done(self, row: int, best_running: float) -> bool:
        texts = self.finished[self.alive[row]]
        full = len(texts) == self.how.beams
        return best_running == NEG_INF or (full and best_running <= texts[-1].score)
