"""What a model thinks of given texts: Q, V, A and KL of every action, teacher-forced.

It serves to judge and rank candidates, to draw the lens, and to sum the exact KL of a sequence.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from qvgpt.decode.engine import TokenReport
from qvgpt.decode.policy import (
    NEG_INF,
    Guidance,
    NextToken,
    joined_q,
    next_token,
    refuse_v_alone,
)
from qvgpt.decode.sources import PrefixValues, own_values
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
    """V of the state the text ended in: 0 where it terminated, None without value heads."""

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
) -> list[TextScore]:
    """One `TextScore` per trajectory, in their order; rewards are not looked at.

    Texts of like length share a forward. Values are the model's own; where its heads know V alone
    (FUDGE, ControlledDecoding), q is V after the token, and they cannot guide here. Raises
    `QvgptError` for a text longer than the context, and as `collate` does.
    """
    guidance = guidance or Guidance()
    _refuse_long(trajectories, model)
    if guidance.guides:
        refuse_v_alone(model.heads)
    model.eval()
    scores: dict[int, TextScore] = {}
    for chosen in _batches(trajectories, batch_size):
        found = _score_batch(model, [trajectories[i] for i in chosen], guidance)
        scores |= dict(zip(chosen, found, strict=True))
    return [scores[i] for i in range(len(trajectories))]


@torch.no_grad()
def sequence_kl(
    model: ValueModel,
    guidance: Guidance,
    base: ValueModel,
    texts: Sequence[Trajectory],
    batch_size: int = 32,
) -> list[float]:
    """Σ KL(π ‖ π₀) over the states of each text, in nats: π is `model` guided, π₀ plain `base`.

    Exact at every state: π over all of its own candidates, π₀ over the whole vocabulary at
    temperature 1; greedy is a distribution on one token. With `base` the model itself it is the
    `kl` of `score`. Raises `QvgptError` for two vocabularies and for texts longer than a context.
    """
    if base.trunk.vocab_size != model.trunk.vocab_size:
        raise QvgptError(
            f"the base knows {base.trunk.vocab_size} tokens, the model {model.trunk.vocab_size}"
        )
    if guidance.guides:
        refuse_v_alone(model.heads)
    for reader in (model, base):
        _refuse_long(texts, reader)
        reader.eval()
    found: dict[int, float] = {}
    size = vocab.chunk_rows(model.trunk.vocab_size, tensors=4)
    for chosen in _batches(texts, batch_size):
        batch = collate([texts[i] for i in chosen]).to(model.device)
        ours = _states(model, batch)[:, :-1][batch.mask]
        theirs = _states(base, batch.to(base.device))[:, :-1][batch.mask.to(base.device)]
        betas, steps = _betas(batch, guidance), list[float]()
        for h, g in zip(ours.split(size), theirs.split(size), strict=True):
            beta = None if betas is None else betas[len(steps) :][: len(h)]
            policy = next_token(model, h, guidance, beta=beta)
            logprob = next_token(base, g, Guidance()).base_logprob
            logprob = logprob.to(h.device).gather(1, policy.tokens)
            steps += NextToken(policy.tokens, policy.logprob, logprob).kl().tolist()
        each = iter(steps)
        counts = batch.mask.sum(1).tolist()
        found |= {i: sum(islice(each, n)) for i, n in zip(chosen, counts, strict=True)}
    return [found[i] for i in range(len(texts))]


def _refuse_long(texts: Sequence[Trajectory], model: ValueModel) -> None:
    limit = model.trunk.seq_len
    for i, t in enumerate(texts):
        if len(t.tokens) > limit:
            raise QvgptError(
                f"text {i + 1} has {len(t.tokens)} tokens, more than the context of {limit}"
            )


def _batches(texts: Sequence[Trajectory], size: int) -> list[list[int]]:
    """Indices of texts of like length."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i].tokens))
    return [order[start : start + size] for start in range(0, len(order), size)]


def _betas(batch: TrajectoryBatch, guidance: Guidance) -> Float[Tensor, "rows"] | None:
    """β of each decision that counts, by its place within its turn; None: one for all."""
    if guidance.beta_end is None:
        return None
    step = torch.arange(batch.mask.size(1), device=batch.mask.device).expand_as(batch.mask)
    begins = F.pad(batch.ends_turn[:, :-1], (1, 0), value=True)
    place = step - (step * begins).cummax(1).values
    return torch.tensor(
        [guidance.beta_at(i) for i in place[batch.mask].tolist()], device=batch.mask.device
    )


def _states(model: ValueModel, batch: TrajectoryBatch) -> Float[Tensor, "batch states embed"]:
    """The hidden state of every decision, and of the end of each text."""
    return model.states(model.trunk.hidden(batch.tokens), batch)


def _score_batch(
    model: ValueModel, trajectories: Sequence[Trajectory], guidance: Guidance
) -> list[TextScore]:
    batch = collate(trajectories).to(model.device)
    hidden = model.trunk.hidden(batch.tokens)
    states, values = model.states(hidden, batch), own_values(model)
    flat, action = states[:, :-1][batch.mask], batch.action[batch.mask]
    size = vocab.chunk_rows(model.trunk.vocab_size, tensors=4)
    pieces, betas = flat.split(size), _betas(batch, guidance)
    each = [None] * len(pieces) if betas is None else betas.split(size)
    chunks = zip(pieces, action.split(size), each, strict=True)
    found = [r for h, a, beta in chunks for r in _reports(model, h, a, guidance, beta)]
    if isinstance(values, PrefixValues):
        at = batch.row[:, None] * hidden.size(1) + batch.state_index[:, :-1] + 1
        after = hidden.flatten(0, 1)[at[batch.mask]]
        both = zip(values.read(after).tolist(), values.read(flat).tolist(), strict=True)
        found = [replace(r, q=q, v=v) for r, (q, v) in zip(found, both, strict=True)]
    reports = iter(found)
    ends: list[float | None] = [None] * len(trajectories)
    if model.heads is not None:
        last = states[torch.arange(len(states)), batch.mask.sum(1)]
        ends = model.heads.state_value(last.float()).tolist()
        ends = [0.0 if t.terminated else v for t, v in zip(trajectories, ends, strict=True)]
    counted = zip(batch.mask.sum(1).tolist(), batch.action.tolist(), ends, strict=True)
    return [TextScore(a[:n], list(islice(reports, n)), end) for n, a, end in counted]


def _reports(
    model: ValueModel,
    hidden: Float[Tensor, "rows embed"],
    action: Int[Tensor, "rows"],
    guidance: Guidance,
    beta: Float[Tensor, "rows"] | None,
) -> list[TokenReport]:
    """Reports on the given next tokens, which need not be candidates."""
    policy = next_token(model, hidden, guidance, beta=beta)
    taken = policy.tokens == action[:, None]
    base = policy.base_logprob
    if base.size(1) < model.trunk.vocab_size:  # candidates only
        base = next_token(model, hidden, Guidance()).base_logprob
    columns = [
        base.gather(1, action[:, None])[:, 0].tolist(),
        policy.logprob.where(taken, NEG_INF).amax(-1).tolist(),
        policy.kl().tolist(),
    ]
    if model.heads is None:
        columns += [[None] * len(action)] * 2
    else:
        q = joined_q(model, hidden, action[:, None], guidance.twins)[:, 0]
        columns += [q.tolist(), model.heads.state_value(hidden.float()).tolist()]
    for of_budget in (policy.beta, policy.spent):
        columns.append([None] * len(action) if of_budget is None else of_budget.tolist())
    return [TokenReport(*values) for values in zip(*columns, strict=True)]
