"""What an objective is given and what it gives back.

One frozen dataclass per method: its fields are the hyper-parameters, its call is the formula.
No tensor here has a vocabulary axis; `models/` has already reduced it.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from qvgpt.categorical import Support
from qvgpt.errors import QvgptError
from qvgpt.losses import masked_mean
from qvgpt.trajectory import TrajectoryBatch


@dataclass(frozen=True)
class Values:
    """What a model says about the decisions of a batch; what no objective needs is None."""

    q: Float[Tensor, "heads batch steps"] | None = None
    """Q of the action taken."""
    target_q: Float[Tensor, "heads batch steps"] | None = None
    """Q of the action taken by the slow copy, without gradient."""
    v: Float[Tensor, "batch states"] | None = None
    """V of each state, one more than steps; the last one is the state the text ended in. 0 where
    no decision that counts begins or ends, but for the first."""
    q_logsumexp: Float[Tensor, "heads batch steps"] | None = None
    """log Σₐ exp Q(s, a)."""
    q_max: Float[Tensor, "batch states"] | None = None
    """maxₐ of the heads' mean Q(s, a), over the vocabulary or the model's `candidates`, without
    gradient."""
    target_q_at_argmax: Float[Tensor, "heads batch states"] | None = None
    """Q by the slow copy of the action that `q_max` is of, without gradient."""
    expected_q: Float[Tensor, "heads batch states"] | None = None
    """Σₐ π(a|s) Q(s, a) by the slow copy, π the policy that is judged, without gradient."""
    candidate_q_max: Float[Tensor, "batch steps"] | None = None
    """The greatest mean Q of the slow copies among the tokens that π is likeliest to say, without
    gradient; so are the next three."""
    any_q_max: Float[Tensor, "batch steps"] | None = None
    """The same among all tokens, likely or not; NaN but at some 100 decisions of a batch."""
    q_spread: Float[Tensor, "batch steps"] | None = None
    """Standard deviation of that Q among the likeliest, under π."""
    logit_spread: Float[Tensor, "batch steps"] | None = None
    """Standard deviation of log π among them, under π."""
    logprob: Float[Tensor, "batch steps"] | None = None
    """log π(a|s) of the action taken."""
    ref_logprob: Float[Tensor, "batch steps"] | None = None
    """log π_ref(a|s) of the action taken, π_ref the model as it was, without gradient."""
    max_ratio: Float[Tensor, "batch states"] | None = None
    """maxₐ π(a|s)/π_ref(a|s) over the tokens that π_ref may well say, without gradient."""
    dummy_logprob: Float[Tensor, "batch steps"] | None = None
    """log π of a token that is never an action."""
    entropy: Float[Tensor, "batch steps"] | None = None
    """−Σₐ π(a|s) log π(a|s), in nats."""
    token_logprob: Float[Tensor, "rows pairs"] | None = None
    """log π of every token but a text's first, prompts included: time − 1 of them."""
    return_logits: Float[Tensor, "heads batch steps bins"] | None = None
    """Of the distribution of returns of the action taken (categorical heads)."""
    v_return_logits: Float[Tensor, "batch states bins"] | None = None
    """Of the distribution of returns of each state (categorical heads)."""
    support: Support | None = None
    """The returns that the bins of both stand for."""

    def __post_init__(self) -> None:
        """The one shape that annotations cannot say, since each of the others may be None."""
        found = (self.q, self.target_q, self.q_logsumexp, self.logprob, self.entropy)
        steps = {x.size(-1) for x in found if x is not None}
        for name in ("v", "q_max", "target_q_at_argmax", "expected_q", "max_ratio"):
            states = getattr(self, name)
            if states is not None and not steps <= {states.size(-1) - 1}:
                n = states.size(-1)
                raise ValueError(
                    f"{name} needs one state more than steps: {n} states, {steps} steps"
                )


NEEDS = frozenset(Values.__dataclass_fields__) - {"support"}


@dataclass(frozen=True)
class Candidates:
    """The tokens that a language model might say, as `Guidance` takes them from the base."""

    top_k: int | None = None
    """The k likeliest; None: all."""
    min_p: float | None = None
    """At least this likely, relative to the likeliest; None: all."""

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        if self.top_k is not None and self.top_k < 1:
            raise QvgptError(f"candidates: top_k must be at least 1, not {self.top_k}")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise QvgptError(f"candidates: min_p must lie in [0, 1], not {self.min_p}")

    @property
    def are_all(self) -> bool:
        """Whether nothing is left out."""
        return self.top_k is None and not self.min_p

    def among(self, logits: Float[Tensor, "rows vocab"]) -> Bool[Tensor, "rows vocab"]:
        """Which tokens are candidates; of equally likely ones at the edge of top_k all are."""
        floor = logits.amax(-1, keepdim=True)
        floor = floor + (math.log(self.min_p) if self.min_p else -math.inf)
        if self.top_k is not None and self.top_k < logits.size(-1):
            floor = floor.maximum(logits.topk(self.top_k, dim=-1).values[:, -1:])
        return logits >= floor


@dataclass(frozen=True)
class Loss:
    """The scalar to minimise, and its parts for the log."""

    total: Float[Tensor, ""]
    parts: dict[str, Float[Tensor, ""]]


@runtime_checkable
class Objective(Protocol):
    """Anything that turns values and a batch into a loss; `needs` names the `Values` it reads.

    The loss is a mean over `batch.mask`; a method that takes it over something else has a
    `counted(batch)` too, so that batches in parts weigh as one would. One that weighs its
    log-probs says so by a class variable `weighs`, which spares time and changes nothing else.
    """

    needs: ClassVar[frozenset[str]]

    def __call__(self, values: Values, batch: TrajectoryBatch) -> Loss: ...  # noqa: D102


def counted(objective: Objective, batch: TrajectoryBatch) -> Bool[Tensor, "_ _"]:
    """What the objective takes its mean over: the decisions, unless it says otherwise."""
    own = getattr(objective, "counted", None)
    return batch.mask if own is None else own(batch)


def teaches_values(objective: Objective) -> bool:
    """Whether it trains Q or V: it reads Q, unless a class variable `teaches` says more."""
    return getattr(objective, "teaches", "q" in objective.needs)


def check_options(method: object, checks: Mapping[str, bool]) -> None:
    """Raise `QvgptError` with the first of the messages that does not hold.

    Where there are a `gamma` and a `lambda_`, they are checked too.
    """
    shares = [name for name in ("gamma", "lambda_") if hasattr(method, name)]
    inside = {f"{n} must lie in [0, 1]": 0 <= getattr(method, n) <= 1 for n in shares}
    for message, holds in (inside | dict(checks)).items():
        if not holds:
            raise QvgptError(f"{type(method).__name__}: {message}, not as in {method}")


def weighted_loss(
    mask: Bool[Tensor, "batch steps"], **terms: tuple[float, Float[Tensor, "batch steps"]]
) -> Loss:
    """Σ weight · mean over the masked decisions; the unweighted means are the parts."""
    means = {name: (weight, masked_mean(x, mask)) for name, (weight, x) in terms.items()}
    total = torch.stack([weight * mean for weight, mean in means.values()]).sum()
    return Loss(total, {name: mean.detach() for name, (_, mean) in means.items()})


def sum_losses(losses: Iterable[tuple[str, float, Loss]]) -> Loss:
    """Several objectives at once: (name, weight, loss) → their weighted sum, parts prefixed."""
    losses = list(losses)
    total = torch.stack([weight * loss.total for _, weight, loss in losses]).sum()
    parts = {f"{n}/{k}": v for n, _, loss in losses for k, v in loss.parts.items()}
    return Loss(total, parts)


def discount(batch: TrajectoryBatch, gamma: float, per_turn: bool) -> Float[Tensor, "batch steps"]:
    """γ where the episode goes on and 0 where it ended.

    Per turn, γ applies at the ends of turns only, so that a long utterance costs no more
    than a short one.
    """
    if not per_turn:
        return gamma * batch.nonterminal
    return batch.nonterminal * torch.where(batch.ends_turn, gamma, 1.0)
