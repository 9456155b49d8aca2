"""From rewards to targets: what a value estimate should have been.

All functions work in decision time (see `trajectory.py`): step k+1 follows step k,
and every tensor is [batch, steps].
"""

import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor


def lambda_returns(
    reward: Float[Tensor, "batch steps"],
    discount: Float[Tensor, "batch steps"],
    next_value: Float[Tensor, "batch steps"],
    mask: Bool[Tensor, "batch steps"],
    lambda_: float | Float[Tensor, "batch steps"],
) -> Float[Tensor, "batch steps"]:
    """Multi-step targets Gₖ = rₖ + γₖ [(1 − λ) vₖ₊₁ + λ Gₖ₊₁]  (Sutton & Barto, ch. 12).

    λ = 0 is the one-step TD target, λ = 1 the Monte-Carlo return. `discount` is γ where
    the episode goes on and 0 where it ended; at the last unmasked step Gₖ₊₁ is vₖ₊₁. λ may be
    one for each step k.
    Gₖ = aₖ + bₖ Gₖ₊₁ is taken two, four, eight … steps ahead at a time. Nothing is divided by a
    power of γ: where one underflows, what it would have added is nothing.
    """
    has_next = F.pad(mask[:, 1:], (0, 1))
    weight = lambda_ * has_next.float()
    target = reward + discount * (1 - weight) * next_value
    if not isinstance(lambda_, Tensor) and lambda_ == 0:
        return target
    factor, ahead = discount * weight, 1
    while ahead < reward.size(1):
        later = (0, ahead)
        target = target + factor * F.pad(target[:, ahead:], later)
        factor = factor * F.pad(factor[:, ahead:], later)
        ahead *= 2
    return target


def gae(
    reward: Float[Tensor, "batch steps"],
    discount: Float[Tensor, "batch steps"],
    value: Float[Tensor, "batch steps"],
    next_value: Float[Tensor, "batch steps"],
    mask: Bool[Tensor, "batch steps"],
    lambda_: float,
) -> Float[Tensor, "batch steps"]:
    """Generalised advantage Âₖ = Gₖ(λ) − vₖ  (Schulman et al., 2016)."""
    return lambda_returns(reward, discount, next_value, mask, lambda_) - value
