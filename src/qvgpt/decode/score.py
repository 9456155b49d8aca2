"""What a model thinks of given texts: Q, V, A and KL of every action, teacher-forced.

It serves to judge and rank candidates, to draw the lens, and to sum the exact KL of a sequence.
Values may be those of any source (`sources.py`). Each trunk reads a text in one forward; token by
token only where guidance asks for V after candidates that the text does not go on with.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from qvgpt.decode.guide import Guide, TokenReport
from qvgpt.decode.next_token import NextToken
from qvgpt.decode.policy import NEG_INF, Guidance, next_token
from qvgpt.decode.reading import Reading, States
from qvgpt.decode.sources import Contrast, HeadValues, TokenScorer, ValueSource, leaves
from qvgpt.errors import QvgptError
from qvgpt.models import vocab
from qvgpt.models.value_model import ValueModel
from qvgpt.trajectory import Trajectory, TrajectoryBatch, collate


@dataclass(frozen=True)
class TextScore:
    """The action tokens of one text, and what was thought of each before it was written."""

    tokens: list[int]
    """The actions, in order."""
    reports: list[TokenReport]
    """One per action, as the engine gives them for tokens it writes."""
    end_value: float | None
    """V of the state the text ended in: 0 where it terminated, None where nothing says V."""

    @property
    def base_logprob(self) -> float:
        """log π₀ of all actions together, in nats."""
        return sum(report.base_logprob for report in self.reports)

    @property
    def logprob(self) -> float:
        """log π of all actions together; −inf where one is no candidate of the guidance."""
        return sum(report.logprob for report in self.reports)

    @property
    def kl(self) -> float:
        """Σ KL(π ‖ π₀) over the states visited, in nats."""
        return sum(report.kl for report in self.reports)

    @property
    def advantage(self) -> float | None:
        """Σ (Q − V) over the actions, in units of reward."""
        found = [r.advantage for r in self.reports if r.advantage is not None]
        return sum(found) if found else None


@torch.no_grad()
def score(
    model: ValueModel,
    trajectories: Sequence[Trajectory],
    guidance: Guidance | None = None,
    batch_size: int = 32,
    values: ValueSource | None = None,
    alternatives: int | None = None,
) -> list[TextScore]:
    """One `TextScore` per trajectory, in their order; rewards are not looked at.

    Texts of like length share a forward. q, v and what guides are those of `values`, by default
    the model's own. `alternatives` is that of a `Request`. Raises `QvgptError` for a text longer
    than the context, for values that cannot guide as `guidance` says, and as `collate` does.
    """
    guide, guidance = Guide.of(model, values), guidance or Guidance()
    _refuse(guide, trajectories, guidance)
    if alternatives is not None and guidance.temperature == 0:
        guidance = replace(guidance, temperature=1.0)
    scores: dict[int, TextScore] = {}
    for chosen in _batches(trajectories, batch_size):
        some = [trajectories[i] for i in chosen]
        found = _score_batch(guide, some, guidance, alternatives or 0)
        scores |= dict(zip(chosen, found, strict=True))
    return [scores[i] for i in range(len(trajectories))]


@torch.no_grad()
def sequence_kl(
    model: ValueModel,
    guidance: Guidance,
    base: ValueModel,
    texts: Sequence[Trajectory],
    batch_size: int = 32,
    values: ValueSource | None = None,
) -> list[float]:
    """Σ KL(π ‖ π₀) over the states of each text, in nats: π is `model` guided, π₀ plain `base`.

    Exact at every state: π over all of its own candidates, π₀ over the whole vocabulary at
    temperature 1; greedy is a distribution on one token. With `base` the model itself it is the
    `kl` of `score`. `values` guide instead of the model's own. Raises `QvgptError` for two
    vocabularies, and as `score` does.
    """
    if base.trunk.vocab_size != model.trunk.vocab_size:
        raise QvgptError(
            f"the base knows {base.trunk.vocab_size} tokens, the model {model.trunk.vocab_size}"
        )
    guide = Guide.of(model, values)
    for reader in (guide, Guide(base.eval(), None)):
        _refuse(reader, texts, guidance if reader is guide else Guidance())
    found: dict[int, float] = {}
    for chosen in _batches(texts, batch_size):
        batch = collate([texts[i] for i in chosen])
        betas, steps = _betas(batch, guidance), torch.zeros(int(batch.mask.sum()))
        theirs = base.states(read(base.trunk, batch), batch.to(base.device))[:, :-1]
        theirs = theirs[batch.mask.to(base.device)]
        for at, states in _Read(guide, batch).decisions(guidance):
            policy = _policy(guide, states, guidance, None if betas is None else betas[at])
            plain = next_token(base, theirs[at.to(theirs.device)], Guidance()).base_logprob
            logprob = plain.to(policy.tokens.device).gather(1, policy.tokens)
            steps[at] = policy.kl(logprob).cpu()
        each = iter(steps.tolist())
        counts = batch.mask.sum(1).tolist()
        found |= {i: sum(islice(each, n)) for i, n in zip(chosen, counts, strict=True)}
    return [found[i] for i in range(len(texts))]


def _refuse(guide: Guide, texts: Sequence[Trajectory], guidance: Guidance) -> None:
    limit = guide.context
    for i, t in enumerate(texts):
        if len(t.tokens) > limit:
            raise QvgptError(
                f"text {i + 1} has {len(t.tokens)} tokens, more than the context of {limit}"
            )
    guide.refuse([0], 1, guidance)


def _batches(texts: Sequence[Trajectory], size: int) -> list[list[int]]:
    """Indices of texts of like length."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i].tokens))
    return [order[start : start + size] for start in range(0, len(order), size)]


def _betas(batch: TrajectoryBatch, guidance: Guidance) -> Float[Tensor, "rows"] | None:
    """β of each decision that counts, by its place within its turn; None: one for all."""
    if guidance.beta_end is None:
        return None
    step = torch.arange(batch.mask.size(1)).expand_as(batch.mask)
    begins = F.pad(batch.ends_turn[:, :-1], (1, 0), value=True)
    place = step - (step * begins).cummax(1).values
    return torch.tensor([guidance.beta_at(i) for i in place[batch.mask].tolist()])


# ── reading ──────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _WholeTexts(States):
    """States within texts that were read to their end."""

    following: tuple[Tensor, ...] = ()
    """[rows, embed] of each trunk, after the token that the text goes on with."""

    def after(
        self, trunk: Any, tokens: Int[Tensor, "rows candidates"]
    ) -> Float[Tensor, "rows candidates embed"]:
        """Of the one candidate that the text goes on with: nothing has to be read."""
        assert tokens.size(1) == 1
        return self.following[self._index(trunk)][:, None]


class _Read:
    """A batch of texts, one a row, as all trunks of a guide have read them."""

    def __init__(self, guide: Guide, batch: TrajectoryBatch):
        self.guide, self.batch = guide, batch
        self.hidden = [read(trunk, batch) for trunk in guide.trunks]
        self.tokens: list[list[int]] = batch.tokens.tolist()

    def states(self, text: Int[Tensor, "rows"], place: Int[Tensor, "rows"]) -> _WholeTexts:
        """The states at some places of some texts."""
        trunks = self.guide.trunks
        reading = Reading(trunks, [], [0] * len(trunks))
        texts = partial(self._texts, text, place)
        return _WholeTexts(reading, self._at(text, place), None, texts, self._at(text, place + 1))

    def _at(self, text: Int[Tensor, "rows"], place: Int[Tensor, "rows"]) -> tuple[Tensor, ...]:
        """What every trunk knows there; past the end, at the end."""
        place = place.clamp(max=self.batch.tokens.size(1) - 1)
        return tuple(h[text.to(h.device), place.to(h.device)] for h in self.hidden)

    def _texts(self, text: Int[Tensor, "rows"], place: Int[Tensor, "rows"]) -> list[list[int]]:
        both = zip(text.tolist(), place.tolist(), strict=True)
        return [self.tokens[i][: p + 1] for i, p in both]

    def decisions(
        self, guidance: Guidance, alternatives: int = 0
    ) -> Iterator[tuple[Int[Tensor, "rows"], States]]:
        """The states of all decisions that count, in pieces, and which they are."""
        text, step = self.batch.mask.nonzero(as_tuple=True)
        place, trunks = self.batch.state_index[text, step], self.guide.trunks
        at_once = (HeadValues, Contrast, TokenScorer)
        asked = guidance.guides or alternatives > 0
        if not asked or all(isinstance(s, at_once) for s in leaves(self.guide.source)):
            size = vocab.chunk_rows(self.guide.model.trunk.vocab_size, tensors=4 * len(trunks))
            for at in torch.arange(len(text)).split(size):
                yield at, self.states(text[at], place[at])
            return
        length, longest = self.batch.attention_mask.sum(1), self.batch.tokens.size(1)
        reading = Reading.new(trunks, len(self.tokens), longest)
        for t in range(longest - 1):
            reading.expect(t)
            now = self.batch.tokens[:, t]
            states = reading.read(now, length > t, lambda t=t: [x[: t + 1] for x in self.tokens])
            at = (place == t).nonzero()[:, 0]
            if len(at):
                yield at, states.take(text[at].tolist())

    def ends(self, terminated: Sequence[bool]) -> list[float | None]:
        """V where each text ends."""
        if self.guide.source is None:
            return [None] * len(terminated)
        text, last = torch.arange(len(terminated)), self.batch.mask.sum(1)
        v = self.guide.source.state_value(self.states(text, self.batch.state_index[text, last]))
        if v is None:
            return [None] * len(terminated)
        return [0.0 if over else x for over, x in zip(terminated, v.tolist(), strict=True)]


def read(trunk: Any, batch: TrajectoryBatch) -> Float[Tensor, "batch time embed"]:
    """Hidden states of whole texts, in one forward."""
    return trunk.hidden(batch.tokens.to(trunk.output_weight.device))


# ── what is thought ──────────────────────────────────────────────────────────────────────────


def _policy(
    guide: Guide, states: States, guidance: Guidance, beta: Float[Tensor, "rows"] | None
) -> NextToken:
    hidden = states.of(guide.model.trunk)
    return next_token(
        guide.model,
        hidden,
        guidance,
        values=lambda tokens: guide.values(states, tokens, guidance),
        beta=None if beta is None else beta.to(hidden.device),
    )


def _score_batch(
    guide: Guide, trajectories: Sequence[Trajectory], guidance: Guidance, alternatives: int
) -> list[TextScore]:
    batch = collate(trajectories)
    texts, action, betas = _Read(guide, batch), batch.action[batch.mask], _betas(batch, guidance)
    found: dict[int, TokenReport] = {}
    for at, states in texts.decisions(guidance, alternatives):
        beta = None if betas is None else betas[at]
        reports = _reports(guide, states, action[at], guidance, beta, alternatives)
        found |= dict(zip(at.tolist(), reports, strict=True))
    each = (found[i] for i in range(len(found)))
    ends = texts.ends([t.terminated for t in trajectories])
    counted = zip(batch.mask.sum(1).tolist(), batch.action.tolist(), ends, strict=True)
    return [TextScore(a[:n], list(islice(each, n)), end) for n, a, end in counted]


def _reports(
    guide: Guide,
    states: States,
    action: Int[Tensor, "rows"],
    guidance: Guidance,
    beta: Float[Tensor, "rows"] | None,
    alternatives: int,
) -> list[TokenReport]:
    """Reports on the given next tokens, which need not be candidates."""
    action = action.to(guide.model.device)
    policy = _policy(guide, states, guidance, beta)
    taken = policy.tokens == action[:, None]
    base = policy.base_logits.log_softmax(-1)
    columns = [
        base.gather(1, action[:, None])[:, 0].tolist(),
        policy.logprob.where(taken, NEG_INF).amax(-1).tolist(),
        policy.kl().tolist(),
        *guide.report(states, action, guidance.twins),
    ]
    for of_budget in (policy.beta, policy.spent):
        columns.append([None] * len(action) if of_budget is None else of_budget.tolist())
    columns.append(guide.alternatives(states, policy, alternatives, guidance.twins))
    return [TokenReport(*values) for values in zip(*columns, strict=True)]
