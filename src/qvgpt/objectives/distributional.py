"""Learning what returns there are, and not their mean alone. Needs categorical heads.

Texts cut short say nothing here: their return was not seen, and a value to bootstrap from is a
mean. Where long texts are the ones that were cut, what is learned is of the short ones.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from qvgpt.errors import QvgptError
from qvgpt.losses import cross_entropy
from qvgpt.objectives.base import Loss, Values, check_options, discount, weighted_loss
from qvgpt.returns import lambda_returns
from qvgpt.trajectory import TrajectoryBatch


@dataclass(frozen=True)
class ReturnDistribution:
    """Monte-Carlo classification: Z(s, a) and Z(s), the returns of the policy that wrote the data.

    L = −Σ_z p_z(G) log Z_z, summed over the Q heads and V, p(G) the target distribution of the
    observed return (`categorical.Support.target`): of 0/1 rewards in two bins the log loss of a
    Bernoulli, in more bins a two-hot histogram, or HL-Gauss.

    What is made of it is said when decoding, by `Guidance.functional`: the mean, the mean of the
    worst returns (CVaR), or Q♯'s η·log E exp(Z/η) with η = 1/β (Zhou et al., 2025). The last is
    the exact optimum of reward − η·KL(π ‖ π₀), with no bootstrapping, where π₀ wrote the data,
    γ = 1 and everything but π₀ is deterministic. Where replies are drawn by chance it takes the
    luck for its own choice: it is too optimistic then (`PathConsistency` is not).
    """

    gamma: float = 1.0
    """Discount per decision."""
    per_turn_discount: bool = False
    """Apply γ at the ends of turns only."""

    needs: ClassVar[frozenset[str]] = frozenset({"return_logits", "v_return_logits"})
    teaches: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        check_options(self, {})

    def __call__(self, values: Values, batch: TrajectoryBatch) -> Loss:
        """Cross-entropies of Z(s, a), summed over the heads, and of Z(s)."""
        assert values.return_logits is not None
        assert values.v_return_logits is not None
        assert values.support is not None
        gamma = discount(batch, self.gamma, self.per_turn_discount)
        nothing = torch.zeros_like(batch.reward)
        seen = lambda_returns(batch.reward, gamma, nothing, batch.mask, lambda_=1.0)
        target = values.support.target(seen)
        return weighted_loss(
            self.counted(batch),
            q=(1.0, cross_entropy(values.return_logits, target).sum(dim=0)),
            v=(1.0, cross_entropy(values.v_return_logits[:, :-1], target)),
        )

    def counted(self, batch: TrajectoryBatch) -> Bool[Tensor, "batch steps"]:
        """The decisions of texts that ended."""
        return batch.mask & ended(batch)[:, None]


@dataclass(frozen=True)
class FUDGE:
    """Will this prefix end well? σ(V(prefix)) = P(the text's reward is 1)  (Yang & Klein, 2021).

    L = −[G log σ(V) + (1 − G) log(1 − σ(V))] at every prefix, the whole text included, G the
    rewards of the whole text, in [0, 1]. V is the log-odds of categorical heads of two bins from
    0 to 1; Q learns nothing. Meant for a reward given at the end. Guidance by it weighs the
    continuation s + a with λ·log σ(V(s + a)).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"v_return_logits"})
    teaches: ClassVar[bool] = True

    def __call__(self, values: Values, batch: TrajectoryBatch) -> Loss:
        """The log loss of each prefix; that of whole texts is told apart as `end`."""
        assert values.v_return_logits is not None
        assert values.support is not None
        if values.support.bins != 2:
            raise QvgptError(f"FUDGE needs categorical heads of 2 bins, not {values.support.bins}")
        good = batch.reward.where(batch.mask, 0.0).sum(dim=1, keepdim=True)
        target = values.support.target(good).expand(-1, batch.mask.size(1), -1)
        at_end = cross_entropy(values.v_return_logits[:, 1:], target)
        return weighted_loss(
            self.counted(batch),
            v=(1.0, cross_entropy(values.v_return_logits[:, :-1], target)),
            end=(1.0, at_end * (1 - batch.nonterminal)),
        )

    def counted(self, batch: TrajectoryBatch) -> Bool[Tensor, "batch steps"]:
        """The decisions of texts that ended."""
        return batch.mask & ended(batch)[:, None]


@dataclass(frozen=True)
class ControlledDecoding:
    """V of every prefix, the whole text included  (Mudgal et al., 2024); Q learns nothing.

    L = (V(s) − G)², G = r + (1 − λ)·V(s′) + λ·G′, and V of a text that ended regresses on its last
    reward. λ = 1 is CD-FUDGE (the observed reward), λ = 0 is CD-Q's Bellman target, the next
    token being the one that was taken. Meant for a reward given at the end. Guidance by it weighs
    the continuation s + a with λ·V(s + a), or picks among sampled blocks.
    """

    lambda_: float = 1.0
    """1: the reward as it was observed. 0: the value of the next prefix."""

    needs: ClassVar[frozenset[str]] = frozenset({"v"})
    teaches: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        check_options(self, {})

    def __call__(self, values: Values, batch: TrajectoryBatch) -> Loss:
        """Squared error of each prefix; that of whole texts is told apart as `end`."""
        assert values.v is not None
        v, next_v = values.v[:, :-1], values.v[:, 1:]
        gamma = discount(batch, 1.0, per_turn=False)
        target = lambda_returns(batch.reward, gamma, next_v.detach(), batch.mask, self.lambda_)
        at_end: Float[Tensor, "batch steps"] = (next_v - batch.reward).square()
        return weighted_loss(
            batch.mask,
            v=(1.0, (v - target).square()),
            end=(1.0, at_end * (1 - batch.nonterminal)),
        )


def ended(batch: TrajectoryBatch) -> Bool[Tensor, "batch"]:
    """Which texts were seen to their end."""
    return ((batch.nonterminal == 0) & batch.mask).any(dim=1)
