"""Learning Q and V from logged text with rewards."""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from jaxtyping import Bool
from torch import Tensor

from qvgpt.losses import expectile_loss
from qvgpt.objectives.base import (
    Candidates,
    Loss,
    Values,
    check_options,
    discount,
    weighted_loss,
)
from qvgpt.returns import lambda_returns
from qvgpt.trajectory import TrajectoryBatch


@dataclass(frozen=True)
class ILQL:
    """Implicit language Q-learning (Snell et al., 2022): the best of the data, stitched together.

    L_Q = Σᵢ (r + γ v′ − Qᵢ)²,  L_V = expectile loss of v against minᵢ Q̄ᵢ,
    L_CQL = Σᵢ (log Σₐ exp Qᵢ(s, a) − Qᵢ(s, a_taken)).

    `bootstrap` "turn" trusts v only where another turn begins: within a turn the target is what
    followed in the data, Qᵢ of every token still learns, and v is the expectile of it. Values then
    travel a turn and not a token at a time, and the states within a turn need not know what it is
    worth: better where turns are long or mere form, worse where its tokens are choices that the
    data make badly.

    At level "turn" a whole turn is one decision (their per-utterance form): v of the state it
    begins in, Q of its last token, which has all of it in its history, r the sum of its rewards,
    v′ where the next turn begins, γ once a turn. Turns that were cut do not count (where those are
    the long ones, v is of the short ones). No token alone is then an action: such values rank whole
    turns (`decode.rerank`) and guide no token, and the conservative term, which compares tokens,
    has no meaning.
    """

    gamma: float = 0.99
    """Discount per decision."""
    expectile: float = 0.7
    """τ of the value loss: 0.5 evaluates the data, towards 1 it seeks the best in it."""
    cql_weight: float = 0.01
    """Weight of the conservative term; at 0.1 and more Q turns into a copy of the logits."""
    per_turn_discount: bool = False
    """Apply γ at the ends of turns only."""
    level: str = "token"
    """token: every token is a decision. turn: every turn is one (then cql_weight is 0)."""
    bootstrap: str = "token"
    """token: v stands for all that follows a token (the paper's). turn: all that follows a turn."""

    needs: ClassVar[frozenset[str]] = frozenset({"q", "target_q", "v", "q_logsumexp"})

    def __post_init__(self) -> None:
        """Refuse what has no meaning; drop a need that nobody has."""
        checks = {
            "expectile must lie in (0, 1)": 0 < self.expectile < 1,
            "cql_weight must be 0 or more": self.cql_weight >= 0,
            "level is 'token' or 'turn'": self.level in ("token", "turn"),
            "bootstrap is 'token' or 'turn'": self.bootstrap in ("token", "turn"),
            "cql_weight must be 0 at level 'turn', where no token alone is an action": (
                self.level != "turn" or self.cql_weight == 0
            ),
        }
        check_options(self, checks)
        if self.cql_weight == 0:
            object.__setattr__(self, "needs", self.needs - {"q_logsumexp"})
        if self.level == "turn":
            object.__setattr__(self, "per_turn_discount", True)

    def __call__(self, values: Values, batch: TrajectoryBatch) -> Loss:
        """Q regresses on r + γ v′; v regresses on the expectile of the slow Q."""
        assert values.q is not None
        assert values.target_q is not None
        assert values.v is not None
        v, next_v, reward = values.v[:, :-1], values.v[:, 1:].detach(), batch.reward
        if self.level == "turn":
            first, reward = batch.turns()
            v = v.gather(1, first)
        gamma = discount(batch, self.gamma, self.per_turn_discount)
        goes_on = (self.bootstrap == "turn" and self.level == "token") * (~batch.ends_turn).float()
        target = lambda_returns(reward, gamma, next_v, batch.mask, goes_on)
        terms = {
            "q": (1.0, (values.q - target).square().sum(dim=0)),
            "v": (1.0, expectile_loss(v, values.target_q.amin(dim=0), self.expectile)),
        }
        if values.q_logsumexp is not None and self.cql_weight:
            terms["cql"] = (self.cql_weight, (values.q_logsumexp - values.q).sum(dim=0))
        return weighted_loss(self.counted(batch), **terms)

    def counted(self, batch: TrajectoryBatch) -> Bool[Tensor, "batch steps"]:
        """All decisions, or the last one of every whole turn."""
        return batch.ends_whole_turn if self.level == "turn" else batch.mask


@dataclass(frozen=True)
class MonteCarlo:
    """Values of the policy that wrote the data: Q and V regress on the λ-return.

    L = Σᵢ (G − Qᵢ)² + (G − v)²,  G = r + γ·[(1 − λ) v′ + λ G′]  (TD(λ), Sutton & Barto, ch. 12).
    λ = 1 is the observed return itself; below 1 the value of what follows is trusted too.
    """

    gamma: float = 1.0
    """Discount per decision."""
    lambda_: float = 1.0
    """1: the return as it was observed. 0: one step, then the value."""
    per_turn_discount: bool = False
    """Apply γ at the ends of turns only."""

    needs: ClassVar[frozenset[str]] = frozenset({"q", "v"})

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        check_options(self, {})

    def __call__(self, values: Values, batch: TrajectoryBatch) -> Loss:
        """Squared errors of Q (summed over the heads) and of v."""
        assert values.q is not None
        assert values.v is not None
        v, next_v = values.v[:, :-1], values.v[:, 1:].detach()
        gamma = discount(batch, self.gamma, self.per_turn_discount)
        target = lambda_returns(batch.reward, gamma, next_v, batch.mask, self.lambda_)
        return weighted_loss(
            batch.mask,
            q=(1.0, (values.q - target).square().sum(dim=0)),
            v=(1.0, (v - target).square()),
        )


@dataclass(frozen=True)
class SARSA:
    """Values of the policy that wrote the data, from the action it took next  (TD(λ) on Q).

    L = Σᵢ (G − Qᵢ)² + (v − Q̄(s, a))²,  G = r + γ·[(1 − λ) Q̄(s′, a′) + λ G′],  Q̄ the mean of the
    slow heads (Rummery & Niranjan, 1994; Sutton & Barto, ch. 12). λ = 1 is the observed return.
    Where a text was cut the next action is not known: v of its last state stands for it.
    """

    gamma: float = 1.0
    """Discount per decision."""
    lambda_: float = 0.9
    """1: the return as it was observed. 0: one step, then the value."""
    per_turn_discount: bool = False
    """Apply γ at the ends of turns only."""

    needs: ClassVar[frozenset[str]] = frozenset({"q", "target_q", "v"})

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        check_options(self, {})

    def __call__(self, values: Values, batch: TrajectoryBatch) -> Loss:
        """Squared errors of Q (summed over the heads) and of v."""
        assert values.q is not None
        assert values.target_q is not None
        assert values.v is not None
        v, slow = values.v[:, :-1], values.target_q.mean(dim=0)
        has_next = F.pad(batch.mask[:, 1:], (0, 1))
        next_value = F.pad(slow[:, 1:], (0, 1)).where(has_next, values.v[:, 1:].detach())
        gamma = discount(batch, self.gamma, self.per_turn_discount)
        target = lambda_returns(batch.reward, gamma, next_value, batch.mask, self.lambda_)
        return weighted_loss(
            batch.mask,
            q=(1.0, (values.q - target).square().sum(dim=0)),
            v=(1.0, (v - slow).square()),
        )


@dataclass(frozen=True)
class DoubleQ:
    """Q-learning: the value of the best next token  (double DQN, van Hasselt et al., 2016; CQL).

    L_Q = Σᵢ (r + γ minⱼ Q̄ⱼ(s′, a*) − Qᵢ)²,  a* = argmaxₐ meanᵢ Qᵢ(s′, a),
    L_CQL = Σᵢ (log Σₐ exp Qᵢ(s, a) − Qᵢ(s, a_taken))  (Kumar et al., 2020); v regresses on
    minⱼ Q̄ⱼ(s, a*). The best is sought among all tokens, seen or not: only the conservative term
    keeps those never seen from being it, so leave it on unless the data hold every action.

    With top_k or min_p it is sought among what the language model might say, as the guided policy
    will do that is sampled with the same options. With min_p that is discrete BCQ (Fujimoto et al.,
    2019): its threshold, too, is relative to the likeliest. π₀ must then be a clone of the data:
    learn LM along, or freeze such a trunk.
    """

    gamma: float = 0.99
    """Discount per decision."""
    cql_weight: float = 0.1
    """Weight of the conservative term; 0 trusts Q of tokens that the data never took."""
    per_turn_discount: bool = False
    """Apply γ at the ends of turns only."""
    top_k: int | None = None
    """Seek the best among the k likeliest tokens of the language model; none: among all."""
    min_p: float | None = None
    """Seek it among those at least this likely, relative to the likeliest; none: among all."""

    needs: ClassVar[frozenset[str]] = frozenset(
        {"q", "v", "q_max", "target_q_at_argmax", "q_logsumexp"}
    )

    def __post_init__(self) -> None:
        """Refuse what has no meaning; drop a need that nobody has."""
        checks = {
            "cql_weight must be 0 or more": self.cql_weight >= 0,
        }
        _ = self.candidates
        check_options(self, checks)
        if self.cql_weight == 0:
            object.__setattr__(self, "needs", self.needs - {"q_logsumexp"})

    @property
    def candidates(self) -> Candidates:
        """Among what the best is sought."""
        return Candidates(self.top_k, self.min_p)

    def __call__(self, values: Values, batch: TrajectoryBatch) -> Loss:
        """Q regresses on r + γ Q̄(s′, a*), v on Q̄(s, a*).

        The part `gap` weighs nothing: how far the best Q is above that of the token taken.
        """
        assert values.q is not None
        assert values.v is not None
        assert values.q_max is not None
        assert values.target_q_at_argmax is not None
        best = values.target_q_at_argmax.amin(dim=0)
        gamma = discount(batch, self.gamma, self.per_turn_discount)
        target = lambda_returns(batch.reward, gamma, best[:, 1:], batch.mask, lambda_=0.0)
        gap = values.q_max[:, :-1] - values.q.detach().mean(dim=0)
        terms = {
            "q": (1.0, (values.q - target).square().sum(dim=0)),
            "v": (1.0, (values.v[:, :-1] - best[:, :-1]).square()),
            "gap": (0.0, gap),
        }
        if values.q_logsumexp is not None and self.cql_weight:
            terms["cql"] = (self.cql_weight, (values.q_logsumexp - values.q).sum(dim=0))
        return weighted_loss(batch.mask, **terms)


@dataclass(frozen=True)
class FQE:
    """Fitted Q evaluation: what another policy would earn, from logs  (Le et al., 2019).

    L = Σᵢ (r + γ Σₐ π(a|s′) Q̄ᵢ(s′, a) − Qᵢ)² + (meanᵢ Σₐ π(a|s) Q̄ᵢ(s, a) − v)²,  Q̄ᵢ the head's own
    slow copy, π the policy that the model was told to judge (`ValueModel.judged`;
    `fqe.evaluate_offline` does all of it). Tokens that π likes and the data never took are
    judged by what the head makes of them: trust it near the data alone.
    """

    gamma: float = 1.0
    """Discount per decision."""
    per_turn_discount: bool = False
    """Apply γ at the ends of turns only."""

    needs: ClassVar[frozenset[str]] = frozenset({"q", "v", "expected_q"})

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        check_options(self, {})

    def __call__(self, values: Values, batch: TrajectoryBatch) -> Loss:
        """Squared errors of Q (summed over the heads) and of v."""
        assert values.q is not None
        assert values.v is not None
        assert values.expected_q is not None
        expected = values.expected_q
        gamma = discount(batch, self.gamma, self.per_turn_discount)
        target = batch.reward + gamma * expected[..., 1:]
        return weighted_loss(
            batch.mask,
            q=(1.0, (values.q - target).square().sum(dim=0)),
            v=(1.0, (values.v[:, :-1] - expected.mean(dim=0)[:, :-1]).square()),
        )
