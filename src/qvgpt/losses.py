"""Per-decision losses. Nothing here averages, so masking stays in one place: `masked_mean`."""

from jaxtyping import Bool, Float
from torch import Tensor


def masked_mean(
    x: Float[Tensor, "batch steps"], mask: Bool[Tensor, "batch steps"]
) -> Float[Tensor, ""]:
    """Mean of x where mask is set; 0 if it is set nowhere. What is masked may even be NaN."""
    return x.where(mask, 0.0).sum() / mask.sum().clamp(min=1)


def expectile_loss(
    prediction: Float[Tensor, "batch steps"],
    target: Float[Tensor, "batch steps"],
    expectile: float,
) -> Float[Tensor, "batch steps"]:
    """|τ − 1(u < 0)| u² with u = target − prediction  (IQL, Kostrikov et al., 2022).

    τ = 0.5 is half the squared error; τ → 1 approaches the maximum of the targets.
    No gradient reaches the target.
    """
    u = target.detach() - prediction
    return (expectile - (u < 0).float()).abs() * u.square()


def cross_entropy(
    logits: Float[Tensor, "*heads batch steps bins"], target: Float[Tensor, "batch steps bins"]
) -> Float[Tensor, "*heads batch steps"]:
    """−Σ_z p_z log softmax(logits)_z: least where the two distributions are the same."""
    return -(target * logits.log_softmax(-1)).sum(-1)


def awac_weight(
    advantage: Float[Tensor, "batch steps"], temperature: float, max_weight: float
) -> Float[Tensor, "batch steps"]:
    """min(exp(A / T), max_weight), without gradient  (AWAC, Nair et al., 2020).

    T → ∞ weighs all actions alike (behaviour cloning); the clamp keeps one lucky action
    from taking the whole batch.
    """
    return (advantage.detach() / temperature).exp().clamp(max=max_weight)
