"""Beam search: of each prompt the texts of highest Σ log π, π plain or guided, and highest value.

    score = Σ log π(a|s) / length^length_penalty + value_weight · Q(s, a) of the last token
                                                    length: tokens written, the end token included

Batched over prompts and beams on one KV cache, which is re-ordered instead of recomputed. The
rules are those of Hugging Face's `generate` with `early_stopping=False`: of the 2K best
continuations the end tokens among the K best are finished texts and the K best others go on; a
prompt is done once it has K finished texts and its best running one, at its present length, is
no better than the worst of them.

The second term makes it the beam search with a value network of He et al., 2017 (Decoding with
Value Networks for Neural Machine Translation, NeurIPS), in units of reward and added: a beam is
ranked by what its text is expected to earn too. Values of all candidates are read (see
`sources.py`), so that it costs what guidance by them costs.

Cost: one token read for each beam and token, prompts once; by values that are read after each
candidate, `top_k` times as many.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qvgpt.decode.guide import Guide
from qvgpt.decode.policy import NEG_INF, Guidance
from qvgpt.decode.reading import Reading, States
from qvgpt.decode.search import (
    Found,
    Hypothesis,
    Judge,
    at_least,
    at_one,
    end_ids,
    in_parts,
)
from qvgpt.decode.sources import ValueSource
from qvgpt.errors import QvgptError
from qvgpt.models.value_model import ValueModel


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
    value_weight: float = 0.0
    """What a unit of expected reward weighs against nats of probability; 0: nothing."""
    per_token: bool = False
    """Rewards come on the way: Σ advantages in the place of Q. A contrast's are summed always."""

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        at_least(self, beams=1, max_tokens=1, max_batch=1)
        for name in ("length_penalty", "value_weight"):
            if not abs(getattr(self, name)) < float("inf"):
                raise QvgptError(f"BeamSearch: {name} must be finite, not as in {self}")

    @torch.no_grad()
    def __call__(
        self,
        model: ValueModel,
        prompts: Sequence[Sequence[int]],
        guidance: Guidance | None = None,
        values: ValueSource | None = None,
        seeds: Sequence[int] | None = None,
    ) -> Found:
        """Up to `beams` texts of each prompt; `values` guide and rank instead of the model's own.

        Guidance's temperature is ignored: π is that of temperature 1. Raises `QvgptError` for a
        prompt that does not fit, and for values that the model does not have.
        """
        guidance, guide = at_one(guidance or Guidance()), Guide.of(model, values)
        judge = None
        if self.value_weight:
            judge = Judge.of(guide, guidance, self.per_token)
            guide.refuse_values(guidance)
        for prompt in prompts:
            guide.refuse(prompt, self.max_tokens, guidance)
        texts: list[list[Hypothesis]] = [[] for _ in prompts]
        forward_tokens = 0
        for part in in_parts(prompts, self.max_batch // self.beams):
            search = _Search(self, guide, [prompts[i] for i in part], guidance, judge)
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
        judge: Judge | None,
    ):
        self.how, self.judge = how, judge
        self.guide, self.guidance = guide, guidance
        self.prompts, model = prompts, guide.model
        device = model.device
        self.end_ids = torch.tensor(sorted(end_ids(model)), device=device)
        self.finished: list[list[Hypothesis]] = [[] for _ in prompts]
        self.alive = list(range(len(prompts)))
        room = min(max(map(len, prompts)) + how.max_tokens, guide.context)
        read = Reading.of(guide.trunks, [p[:-1] for p in prompts], room)
        self.reading = read.select(torch.arange(len(prompts)).repeat_interleave(how.beams))
        last = torch.tensor([p[-1] for p in prompts], device=device)
        self.last = last[:, None].expand(-1, how.beams)
        self.logprob = torch.full((len(prompts), how.beams), NEG_INF, device=device)
        self.logprob[:, 0] = 0.0  # at first all beams are the same text: one of them goes on
        self.value = torch.zeros_like(self.logprob)
        """What each text is worth, where values have a weight."""
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
        k, alive = self.how.beams, len(self.alive)
        states = self.reading.read(self.last.reshape(-1), None, self._texts)
        positions = [length - 1] * len(states)
        picked = self.guide.next_token(states, self.guidance, positions)
        grown = (self.logprob.reshape(-1, 1) + picked.logprob).view(alive, -1)
        score, value = grown / length**self.how.length_penalty, torch.zeros_like(grown)
        if self.judge is not None:
            value = self._worth(states, picked.tokens).view(alive, -1)
            score = score + self.how.value_weight * value
        each = picked.tokens.size(1)
        top = score.topk(min(k * (1 + len(self.end_ids)), score.size(1)), dim=1)
        source = top.indices // each
        best = _Beams(
            top.values,
            grown.gather(1, top.indices),
            value.gather(1, top.indices),
            source,
            picked.tokens.reshape(alive, -1).gather(1, top.indices),
        )
        ends = torch.isin(best.token, self.end_ids)
        self._finish(best, ends, length)
        # the best of those that go on; where candidates run out, a text of probability 0
        score = best.score.masked_fill(ends, NEG_INF)
        on = replace(best, score=score, logprob=best.logprob.masked_fill(ends, NEG_INF))
        self._go_on(on.take(score.topk(min(k, score.size(1))).indices), length)

    def _worth(
        self, states: States, tokens: Int[Tensor, "rows candidates"]
    ) -> Float[Tensor, "rows candidates"]:
        """What each text is worth with each candidate."""
        assert self.judge is not None
        everything = tokens.size(1) == self.guide.model.trunk.vocab_size
        q = self.judge.q(states, None if everything else tokens)
        if not self.judge.per_token:
            return q
        v = self.judge.v(states)
        assert v is not None
        return self.value.reshape(-1, 1) + q - v[:, None]

    def _texts(self) -> list[list[int]]:
        both = zip(self.alive, self.written.tolist(), strict=True)
        return [[*self.prompts[i], *text] for i, beams in both for text in beams]

    def _finish(self, best: "_Beams", ends: Tensor, length: int) -> None:
        """Put away the texts that end here."""
        k = self.how.beams
        rows, places = (ends[:, :k] & best.logprob[:, :k].isfinite()).nonzero().unbind(1)
        texts = self.written[rows, best.source[rows, places]].tolist()
        tokens = best.token[rows, places].tolist()
        logprob, score = best.logprob[rows, places].tolist(), best.score[rows, places].tolist()
        for row, text, t, *figures in zip(
            rows.tolist(), texts, tokens, logprob, score, strict=True
        ):
            self._keep(row, Hypothesis([*text, t], True, *figures))

    def _keep(self, row: int, found: Hypothesis) -> None:
        texts = self.finished[self.alive[row]]
        texts.append(found)
        texts.sort(key=lambda t: -t.score)
        del texts[self.how.beams :]

    def _go_on(self, best: "_Beams", length: int) -> None:
        """Take the chosen texts further, and leave out the prompts that are done."""
        k = self.how.beams
        best = best.padded(k)
        at = best.source[:, :, None].expand(-1, -1, self.written.size(2))
        self.written = torch.cat([self.written.gather(1, at), best.token[:, :, None]], dim=2)
        if length == self.how.max_tokens:
            rows, places = best.logprob.isfinite().nonzero().unbind(1)
            for row, place in zip(rows.tolist(), places.tolist(), strict=True):
                figures = float(best.logprob[row, place]), float(best.score[row, place])
                self._keep(row, Hypothesis(self.written[row, place].tolist(), False, *figures))
            self.alive = []
            return
        running = best.score[:, 0].tolist()
        on = [row for row, score in enumerate(running) if not self._is_done(row, score)]
        kept = torch.tensor(on, dtype=torch.long, device=best.score.device)
        self.reading.reorder((kept[:, None] * k + best.source[kept]).reshape(-1))
        self.logprob, self.value = best.logprob[kept], best.value[kept]
        self.last, self.written = best.token[kept], self.written[kept]
        self.alive = [self.alive[row] for row in on]

    def _is_done(self, row: int, best_running: float) -> bool:
        texts = self.finished[self.alive[row]]
        full = len(texts) == self.how.beams
        return best_running == NEG_INF or (full and best_running <= texts[-1].score)


@dataclass(frozen=True)
class _Beams:
    """Continuations of some prompts' texts, the best first."""

    score: Float[Tensor, "prompts several"]
    logprob: Float[Tensor, "prompts several"]
    value: Float[Tensor, "prompts several"]
    source: Int[Tensor, "prompts several"]
    """The beam that is continued."""
    token: Int[Tensor, "prompts several"]

    def take(self, places: Int[Tensor, "prompts fewer"]) -> "_Beams":
        """Those at the given places."""
        return _Beams(*(x.gather(1, places) for x in vars(self).values()))

    def padded(self, size: int) -> "_Beams":
        """`size` of them; those that are missing have no probability."""
        missing = size - self.score.size(1)
        if missing <= 0:
            return self
        pad = torch.nn.functional.pad
        score, logprob, *others = vars(self).values()
        dead = [pad(x, (0, missing), value=NEG_INF) for x in (score, logprob)]
        return _Beams(*dead, *(pad(x, (0, missing)) for x in others))
