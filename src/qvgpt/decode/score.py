"""What a model thinks of given texts: Q, V, A and KL of every action, teacher-forced.

It serves to judge and rank candidates, to draw the lens, and to sum the exact KL of a sequence.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qvgpt.decode.engine import TokenReport
from qvgpt.decode.policy import NEG_INF, Guidance, joined_q, next_token
from qvgpt.errors import QvgptError
from qvgpt.models import vocab
from qvgpt.models.value_model import ValueModel
from qvgpt.trajectory import Trajectory, collate


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

    Texts of like length share a forward. Raises `QvgptError` for a text longer than the context,
    and as `collate` does.
    """
    guidance, limit = guidance or Guidance(), model.trunk.seq_len
    for i, t in enumerate(trajectories):
        if len(t.tokens) > limit:
            raise QvgptError(
                f"text {i + 1} has {len(t.tokens)} tokens, more than the context of {limit}"
            )
    model.eval()
    scores: dict[int, TextScore] = {}
    order = sorted(range(len(trajectories)), key=lambda i: len(trajectories[i].tokens))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        found = _score_batch(model, [trajectories[i] for i in chosen], guidance)
        scores |= dict(zip(chosen, found, strict=True))
    return [scores[i] for i in range(len(trajectories))]


def _score_batch(
    model: ValueModel, trajectories: Sequence[Trajectory], guidance: Guidance
) -> list[TextScore]:
    batch = collate(trajectories).to(model.device)
    hidden = model.trunk.hidden(batch.tokens)
    row = torch.arange(len(hidden), device=hidden.device)[:, None]
    states = hidden[row, batch.state_index]  # [batch, steps+1, embed]
    flat, action = states[:, :-1][batch.mask], batch.action[batch.mask]
    size = max(1, vocab.CHUNK_ELEMENTS // model.trunk.vocab_size)
    chunks = zip(flat.split(size), action.split(size), strict=True)
    reports = (r for h, a in chunks for r in _reports(model, h, a, guidance))
    ends: list[float | None] = [None] * len(trajectories)
    if model.heads is not None:
        last = hidden[row[:, 0], batch.attention_mask.sum(1) - 1]
        ends = model.heads.v(last.float()).tolist()
        ends = [0.0 if t.terminated else v for t, v in zip(trajectories, ends, strict=True)]
    counted = zip(batch.mask.sum(1).tolist(), batch.action.tolist(), ends, strict=True)
    return [TextScore(a[:n], list(islice(reports, n)), end) for n, a, end in counted]


def _reports(
    model: ValueModel,
    hidden: Float[Tensor, "rows embed"],
    action: Int[Tensor, "rows"],
    guidance: Guidance,
) -> list[TokenReport]:
    """Reports on the given next tokens, which need not be candidates."""
    policy = next_token(model, hidden, guidance)
    taken = policy.tokens == action[:, None]
    columns = [
        vocab.log_prob(hidden, model.trunk.output_weight, action).tolist(),
        policy.logprob.where(taken, NEG_INF).amax(-1).tolist(),
        policy.kl().tolist(),
    ]
    if model.heads is None:
        columns += [[None] * len(action)] * 2
    else:
        q = joined_q(model, hidden, action[:, None], guidance.twins)[:, 0]
        columns += [q.tolist(), model.heads.v(hidden.float()).tolist()]
    return [TokenReport(*values) for values in zip(*columns, strict=True)]
