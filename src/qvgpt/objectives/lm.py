"""Objectives of the language model itself."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from jaxtyping import Bool
from torch import Tensor

from qvgpt.errors import QvgptError
from qvgpt.losses import awac_weight
from qvgpt.objectives.base import Loss, Values, check_options, discount, weighted_loss
from qvgpt.returns import gae
from qvgpt.trajectory import TrajectoryBatch


@dataclass(frozen=True)
class LM:
    """Next-token prediction, on what the model wrote or on everything: L = −log π(a|s).

    Of the best texts alone (`min_return`, `top_share`) filtered cloning, %BC (Chen et al., 2021).
    """

    on: Literal["completions", "all"] = "completions"
    """completions: the actions only (fine-tuning). all: every token (pre-training)."""
    min_return: float | None = None
    """Learn only texts whose rewards sum to at least this: filtered cloning, of the best samples
    or, where they are among the samples with their full reward, of the references."""
    top_share: float | None = None
    """Learn only this share of the texts, those of the highest return (%BC; Chen et al., 2021).
    Training turns it into the `min_return` that its data have there, so equal texts count alike."""

    needs: ClassVar[frozenset[str]] = frozenset({"logprob", "token_logprob"})

    def __post_init__(self) -> None:
        """Ask the model for the one tensor that is read."""
        share = self.top_share
        checks = {
            "top_share must lie in (0, 1]": share is None or 0 < share <= 1,
            "min_return or top_share, not both": None in (share, self.min_return),
        }
        check_options(self, checks)
        if self.on not in ("completions", "all"):
            raise QvgptError(f"LM: `on` is 'completions' or 'all', not {self.on!r}")
        need = "logprob" if self.on == "completions" else "token_logprob"
        object.__setattr__(self, "needs", frozenset({need}))

    def __call__(self, values: Values, batch: TrajectoryBatch) -> Loss:
        """Mean of −log π per decision, or per token."""
        logprob = values.logprob if self.on == "completions" else values.token_logprob
        assert logprob is not None
        return weighted_loss(self.counted(batch), nll=(1.0, -logprob))

    def fitted_to(self, returns: Sequence[float]) -> "LM":
        """With `min_return` in the place of `top_share`: the least of the best so many texts."""
        if self.top_share is None or not returns:
            return self
        kept = max(1, round(self.top_share * len(returns)))
        least = sorted(returns, reverse=True)[kept - 1]
        return replace(self, min_return=least, top_share=None)

    def counted(self, batch: TrajectoryBatch) -> Bool[Tensor, "_ _"]:
        """The decisions, or the tokens but the first, that the mean is taken over."""
        if self.top_share is not None:
            raise QvgptError("LM: top_share is of the whole data: call `fitted_to` with it first")
        completions = self.on == "completions"
        mask = batch.mask if completions else batch.predicted
        if self.min_return is None:
            return mask
        # sums of many parts, in fp32 here and in fp64 where the threshold was found
        slack = 1e-6 * batch.reward.abs().sum(1).clamp(min=1.0)
        good = batch.reward.sum(1) >= self.min_return - slack
        return mask & (good[:, None] if completions else good[batch.text[:, 1:]])


@dataclass(frozen=True)
class AWAC:
    """Advantage-weighted cloning  (AWAC; Nair et al., 2020).

    L = −min(exp(A / temperature), max_weight)·log π(a|s),  A = minᵢ Q̄ᵢ(s, a) − V(s). Needs a value
    objective beside it to learn Q and V.
    """

    temperature: float = 1.0
    """In units of reward. Large: plain cloning. Small: only the best actions count."""
    max_weight: float = 20.0
    """Clamp of the weight."""

    needs: ClassVar[frozenset[str]] = frozenset({"logprob", "target_q", "v"})
    weighs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        checks = {
            "temperature must be above 0": self.temperature > 0,
            "max_weight must be above 0": self.max_weight > 0,
        }
        check_options(self, checks)

    def __call__(self, values: Values, batch: TrajectoryBatch) -> Loss:
        """Mean weighted −log π per decision; the weights carry no gradient."""
        assert values.logprob is not None
        assert values.target_q is not None
        assert values.v is not None
        advantage = values.target_q.amin(dim=0) - values.v[:, :-1]
        weight = awac_weight(advantage, self.temperature, self.max_weight)
        return weighted_loss(batch.mask, nll=(1.0, -weight * values.logprob))


@dataclass(frozen=True)
class AWR:
    """Advantage-weighted regression  (AWR; Peng et al., 2019).

    L = −min(exp(A / temperature), max_weight)·log π(a|s),  A = G(λ) − V(s): the return that was
    observed, where AWAC asks what Q expected. Needs a value objective beside it to learn V,
    discounted as G is here.
    """

    temperature: float = 1.0
    """In units of reward. Large: plain cloning. Small: only the best texts count."""
    max_weight: float = 20.0
    """Clamp of the weight."""
    gamma: float = 1.0
    """Discount per decision."""
    lambda_: float = 1.0
    """1: the return as it was observed. 0: one step, then the value."""
    per_turn_discount: bool = False
    """Apply γ at the ends of turns only."""

    needs: ClassVar[frozenset[str]] = frozenset({"logprob", "v"})
    weighs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        checks = {
            "temperature must be above 0": self.temperature > 0,
            "max_weight must be above 0": self.max_weight > 0,
        }
        check_options(self, checks)

    def __call__(self, values: Values, batch: TrajectoryBatch) -> Loss:
        """Mean weighted −log π per decision; the weights carry no gradient."""
        assert values.logprob is not None
        assert values.v is not None
        v = values.v.detach()
        gamma = discount(batch, self.gamma, self.per_turn_discount)
        advantage = gae(batch.reward, gamma, v[:, :-1], v[:, 1:], batch.mask, self.lambda_)
        weight = awac_weight(advantage, self.temperature, self.max_weight)
        return weighted_loss(batch.mask, nll=(1.0, -weight * values.logprob))
