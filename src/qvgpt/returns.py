"""From rewards to targets: what a value estimate should have been.

All functions work in decision time (see `trajectory.py`): step k+1 follows step k,
and every tensor is [batch, steps].
"""

import torch
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
    A backward scan: no power of γ is ever formed, so none underflows.
    """
    has_next = F.pad(mask[:, 1:], (0, 1))
    weight = lambda_ * has_next.float()
    target, targets = torch.zeros_like(reward[:, 0]), []
    for k in reversed(range(reward.size(1))):
        future = (1 - weight[:, k]) * next_value[:, k] + weight[:, k] * target
        target = reward[:, k] + discount[:, k] * future
        targets.append(target)
    return torch.stack(targets[::-1], dim=1)


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
