"""Learning Q and V from logged text with rewards."""

from dataclasses import dataclass
from typing import ClassVar

from qvgpt.losses import expectile_loss
from qvgpt.objectives.base import Loss, Values, check_options, discount, weighted_loss
from qvgpt.returns import lambda_returns
from qvgpt.trajectory import TrajectoryBatch


@dataclass(frozen=True)
class ILQL:
    """Implicit language Q-learning (Snell et al., 2022): the best of the data, stitched together.

    L_Q = Σᵢ (r + γ v′ − Qᵢ)²,  L_V = expectile loss of v against minᵢ Q̄ᵢ,
    L_CQL = Σᵢ (log Σₐ exp Qᵢ(s, a) − Qᵢ(s, a_taken)).
    """

    gamma: float = 0.99
    """Discount per decision."""
    expectile: float = 0.7
    """τ of the value loss: 0.5 evaluates the data, towards 1 it seeks the best in it."""
    cql_weight: float = 0.01
    """Weight of the conservative term; at 0.1 and more Q turns into a copy of the logits."""
    per_turn_discount: bool = False
    """Apply γ at the ends of turns only."""

    needs: ClassVar[frozenset[str]] = frozenset({"q", "target_q", "v", "q_logsumexp"})

    def __post_init__(self) -> None:
        """Refuse what has no meaning; drop a need that nobody has."""
        checks = {
            "gamma must lie in [0, 1]": 0 <= self.gamma <= 1,
            "expectile must lie in (0, 1)": 0 < self.expectile < 1,
            "cql_weight must be 0 or more": self.cql_weight >= 0,
        }
        check_options(self, checks)
        if self.cql_weight == 0:
            object.__setattr__(self, "needs", self.needs - {"q_logsumexp"})

    def __call__(self, values: Values, batch: TrajectoryBatch) -> Loss:
        """Q regresses on r + γ v′; v regresses on the expectile of the slow Q."""
        assert values.q is not None
        assert values.target_q is not None
        assert values.v is not None
        v, next_v = values.v[:, :-1], values.v[:, 1:].detach()
        gamma = discount(batch, self.gamma, self.per_turn_discount)
        target = lambda_returns(batch.reward, gamma, next_v, batch.mask, lambda_=0.0)
        terms = {
            "q": (1.0, (values.q - target).square().sum(dim=0)),
            "v": (1.0, expectile_loss(v, values.target_q.amin(dim=0), self.expectile)),
        }
        if values.q_logsumexp is not None and self.cql_weight:
            terms["cql"] = (self.cql_weight, (values.q_logsumexp - values.q).sum(dim=0))
        return weighted_loss(batch.mask, **terms)


@dataclass(frozen=True)
class MonteCarlo:
    """Values of the policy that wrote the data: Q and V regress on the λ-return.

    λ = 1 is the observed return itself; below 1 the value of what follows is trusted too
    (TD(λ), Sutton & Barto, ch. 12).
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
        checks = {
            "gamma must lie in [0, 1]": 0 <= self.gamma <= 1,
            "lambda_ must lie in [0, 1]": 0 <= self.lambda_ <= 1,
        }
        check_options(self, checks)

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
