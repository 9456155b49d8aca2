"""β that spends a budget of KL, token by token."""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from qvgpt.models import native

MOST_UNDER_BUDGET = 64
"""The most candidates that β is solved for."""
_CLOSE = 1e-6  # of the budget: what may be missing
_MOST_STEPS = 200


def solve_beta(
    base_logprob: Float[Tensor, "rows candidates"],
    q: Float[Tensor, "rows candidates"],
    kl_budget: float,
    beta_max: float,
) -> tuple[Float[Tensor, "rows"], Float[Tensor, "rows"]]:
    """β with KL(π_β ‖ π₀) = `kl_budget`, at most `beta_max`, and the KL it gives.

    π_β ∝ π₀·exp(β·q) over the candidates, −inf ones aside. With Z = E₀[exp(β·q)]:
    KL = β·E_β[q] − log Z, and dKL/dβ = β·Var_β[q] ≥ 0. Newton's method finds the root of
    √KL − √budget, which is nearly straight at its beginning; a bracket, halved where a step has not
    halved what is missing, keeps it from going astray. In float64, by what is compiled (`native.c`
    takes the same steps, a row after the other) or by numpy: so few numbers are sooner done there.
    """
    compiled = native.of(torch.float32) if native.reads(base_logprob, q) else None
    if compiled is not None:
        return compiled.spend(base_logprob, q, kl_budget, beta_max, _CLOSE, _MOST_STEPS)
    p = base_logprob.double().softmax(-1).cpu().numpy()
    values = q.double().cpu().numpy()
    values = np.where(p > 0, values, -np.inf)
    values = np.where(p > 0, values - values.max(-1, keepdims=True), 0.0)
    powers = np.stack([np.ones_like(values), values, values * values], axis=-1)

    def kl(beta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """KL and Var_β[q]; the best candidate's exponent is 0, so that Z cannot vanish."""
        weight = p * np.exp(beta[:, None] * values)
        z, first, second = (weight[:, None] @ powers)[:, 0].T
        mean = first / z
        return np.maximum(beta * mean - np.log(z), 0.0), np.maximum(second / z - mean * mean, 0.0)

    mean = (p * values).sum(-1)
    variance = (p * values * values).sum(-1) - mean * mean
    beta, spent = _root(kl, kl_budget, beta_max, -values.min(-1), variance)
    return tuple(torch.from_numpy(x).to(base_logprob) for x in (beta, spent))  # type: ignore[return-value]


def _root(
    kl: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
    budget: float,
    beta_max: float,
    spread: np.ndarray,
    variance: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Where KL reaches the budget, or `beta_max`, and KL there.

    `spread`: max − min of values; `variance`: theirs at β = 0.
    """
    beta, spent = np.zeros_like(spread), np.zeros_like(spread)
    missing, open_ = np.full_like(spread, np.inf), np.ones_like(spread, dtype=bool)
    high = np.full_like(spread, np.nextafter(beta_max, np.inf))  # `beta_max` itself may be tried
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        # Var ≤ spread² / 4, so KL ≤ (β·spread)² / 8: the root lies above this
        low = np.minimum(np.sqrt(8 * budget) / spread, beta_max)
        guess = np.clip(np.sqrt(2 * budget / np.maximum(variance, 0.0)), low, beta_max)
        for _ in range(_MOST_STEPS):
            found, variance = kl(guess)
            beta, spent = np.where(open_, guess, beta), np.where(open_, found, spent)
            before, missing = missing, np.abs(found - budget)
            below = found <= budget
            open_ &= (missing > _CLOSE * budget) & ~(below & (guess >= beta_max))
            if not open_.any():
                break
            low, high = np.where(below, guess, low), np.where(below, high, guess)
            root = np.sqrt(found)
            step = 2 * root * (root - np.sqrt(budget)) / (guess * variance)
            guess = np.minimum(guess - step, beta_max)
            good = (guess > low) & (guess < high) & (missing <= before / 2)
            good |= (guess >= beta_max) & (high > beta_max)  # nobody has been there
            guess = np.where(good, guess, np.sqrt(low * high))
            open_ &= high > low * (1 + 1e-12)  # as close as its digits allow
    return beta, spent
