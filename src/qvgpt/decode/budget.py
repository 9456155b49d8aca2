"""β that spends a budget of KL, token by token."""

import torch
from jaxtyping import Float
from torch import Tensor

MOST_UNDER_BUDGET = 64
"""The most candidates that β is solved for."""
_HALVINGS = 60


def solve_beta(
    base_logprob: Float[Tensor, "rows candidates"],
    q: Float[Tensor, "rows candidates"],
    kl_budget: float,
    beta_max: float,
) -> tuple[Float[Tensor, "rows"], Float[Tensor, "rows"]]:
    """β with KL(π_β ‖ π₀) = `kl_budget`, at most `beta_max`, and the KL it gives.

    π_β ∝ π₀·exp(β·q) over the candidates, −inf ones aside. dKL/dβ = β·Var_{π_β}(q) ≥ 0: bisection
    finds it, in float64, to the last digits.
    """
    base = base_logprob.double().log_softmax(-1)
    q = q.double().where(base.isfinite(), 0.0)
    q = q - q.amax(-1, keepdim=True)

    def kl(beta: Tensor) -> Tensor:
        log_pi = (base + beta[:, None] * q).log_softmax(-1)
        p = log_pi.exp()
        return (p * (log_pi - base)).where(p > 0, 0.0).sum(-1)

    low = torch.zeros_like(base[:, 0])
    high = torch.full_like(low, beta_max)
    low = low.where(kl(high) > kl_budget, beta_max)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        below = kl(middle) <= kl_budget
        low, high = middle.where(below, low), high.where(below, middle)
    return low.to(base_logprob.dtype), kl(low).to(base_logprob.dtype)
