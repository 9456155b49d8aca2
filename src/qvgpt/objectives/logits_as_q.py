"""The language model's own logits as Q: no head over the vocabulary is learned."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from qvgpt.objectives.base import Loss, Values, check_options, discount, weighted_loss
from qvgpt.returns import lambda_returns
from qvgpt.trajectory import TrajectoryBatch


@dataclass(frozen=True)
class PathConsistency:
    """Soft Q-learning in the logits: A(s, a) = η·log π(a|s)/π_ref(a|s)  (Nachum et al., 2017).

    Along every path of the policy that makes the most of reward − η·KL(π ‖ π_ref), whoever
    walked it,  V(s) = r − η·log π/π_ref + γ V(s′).  With G the λ-return of r − η·log π/π_ref,

        L_V = (V − G)²,   L_π = (η·log π/π_ref − [G + η·log π/π_ref − V])²,

    brackets and G without gradient: the current token alone learns, as in OREO (Wang et al., 2024).
    λ = 1 is OREO's and multi-step consistency, λ = 0 single-step (Guo et al., 2022).
    With `whole_path` L = (V − G)² alone, and all tokens and values of the path learn from it.

    What is learned is the trunk, guided already: plain decoding is its optimum. π_ref is the
    model as it was when training began. Data from anybody will do, and replies drawn by chance too.
    """

    eta: float = 0.03
    """What a nat away from π_ref costs, in units of reward: 1 / β of guidance."""
    gamma: float = 1.0
    """Discount per decision."""
    lambda_: float = 1.0
    """1: whole paths. 0: single steps."""
    per_turn_discount: bool = False
    """Apply γ at the ends of turns only."""
    whole_path: bool = False
    """Nachum's own: least squares, which many tokens to a path do not make diverge. Where replies
    are drawn by chance it is wrong: later tokens then learn to make up for luck."""

    needs: ClassVar[frozenset[str]] = frozenset({"logprob", "ref_logprob", "v"})
    weighs: ClassVar[bool] = True
    teaches: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        checks = {
            "eta must be above 0": self.eta > 0,
        }
        check_options(self, checks)

    def __call__(self, values: Values, batch: TrajectoryBatch) -> Loss:
        """The squared residual twice: V learns from the one, log π from the other."""
        assert values.logprob is not None
        assert values.ref_logprob is not None
        assert values.v is not None
        v, next_v = values.v[:, :-1], values.v[:, 1:]
        bonus = self.eta * (values.logprob - values.ref_logprob)
        gamma = discount(batch, self.gamma, self.per_turn_discount)
        target = lambda_returns(batch.reward - bonus, gamma, next_v, batch.mask, self.lambda_)
        if self.whole_path:
            return weighted_loss(batch.mask, path=(1.0, (v - target).square()))
        target = target.detach()
        advantage = target + bonus.detach() - v.detach()
        return weighted_loss(
            batch.mask,
            v=(1.0, (v - target).square()),
            pi=(1.0, (bonus - advantage).square()),
        )


@dataclass(frozen=True)
class QSFT:
    """Q-learning as fine-tuning: Q(s, a) = π(a|s)/π_ref(a|s)  (Hong et al., 2025).

    L = −[w log π(a|s) + (1 − w) log π(∅|s)],  w = r + γ maxₐ′ π(a′|s′)/π_ref(a′|s′) in [0, 1],

    ∅ a token that is never an action: its share is what the others leave, so that where π_ref wrote
    the data π(a|s) → π_ref(a|s)·Q*(s, a). Returns must lie in [0, 1], and π_ref, the model that
    training begins with, must be a clone of the data. The maximum is over tokens to which π_ref
    gives a thousandth at least; w is taken of the model itself, without gradient, and not of a slow
    copy. Sampled from without ∅, the trunk that is learned says π_ref·Q*.
    """

    gamma: float = 0.99
    """Discount per decision."""
    per_turn_discount: bool = False
    """Apply γ at the ends of turns only."""

    needs: ClassVar[frozenset[str]] = frozenset({"logprob", "dummy_logprob", "max_ratio"})
    weighs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        check_options(self, {})

    def __call__(self, values: Values, batch: TrajectoryBatch) -> Loss:
        """The weighted cross-entropy, and the mean weight, which weighs nothing."""
        assert values.logprob is not None
        assert values.dummy_logprob is not None
        assert values.max_ratio is not None
        gamma = discount(batch, self.gamma, self.per_turn_discount)
        weight = (batch.reward + gamma * values.max_ratio[:, 1:]).detach().clamp(0, 1)
        nll = -torch.lerp(values.dummy_logprob, values.logprob, weight)
        return weighted_loss(batch.mask, nll=(1.0, nll), weight=(0.0, weight))
