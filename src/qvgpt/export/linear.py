"""Values as matrices: exact where heads are linear in the hidden state, else by ridge regression.

Engines hold one thing of ours, a matrix times the last hidden state h. For a head that is not
linear the matrix is the least-squares one over states that the guided model visits,

    F = (Σ A hᵀ)(Σ h hᵀ + λ I)⁻¹        A: the advantages of all tokens, centred

(ridge regression, closed form). Centred targets give a centred F, Σₐ Fₐ = 0, so that folding it
moves no state's logits as a whole: repetition penalties, which look at their sign, see no shift.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from qvgpt.decode.policy import Guidance, slow_q
from qvgpt.models import vocab
from qvgpt.models.heads import StateHead, ValueHeads

PENALTIES = (1e-8, 1e-6, 1e-4, 1e-2)
"""λ, as shares of the mean square of a hidden state's entry, times the number of states."""


@dataclass(frozen=True)
class LinearV:
    """V(s) = w·h + bias, in units of reward."""

    weight: Float[Tensor, "embed"]
    bias: float
    fit: dict[str, Any] | None
    """None where that is exact; else how well it was fitted, on states held out."""


def is_linear(heads: ValueHeads, guidance: Guidance) -> bool:
    """Whether Q is a matrix; of twins the mean is meant, which stands for their minimum too."""
    return heads.config.folds and guidance.functional == "mean"


@torch.no_grad()
def fitted_q(
    heads: ValueHeads,
    guidance: Guidance,
    hidden: Float[Tensor, "states embed"],
    loss: Callable[[Float[Tensor, "vocab embed"]], float],
) -> tuple[Float[Tensor, "vocab embed"], dict[str, Any]]:
    """F of heads that are not linear, at the penalty where `loss` (of F) is least; also a note."""
    embed, size = hidden.size(1), heads.shape[0]
    gram = hidden.new_zeros(embed, embed, dtype=torch.float64)
    moment = hidden.new_zeros(size, embed, dtype=torch.float64)
    for h in hidden.float().split(vocab.chunk_rows(size, tensors=6)):
        q = slow_q(heads, h, None, guidance.twins, guidance)
        advantage, wide = (q - q.mean(-1, keepdim=True)).double(), h.double()
        gram += wide.T @ wide
        moment += advantage.T @ wide
    found: list[tuple[float, float, Tensor]] = []
    for share in PENALTIES:
        weight = _solve(gram, moment.T, share).T.float().contiguous()
        found.append((loss(weight), share, weight))
    best = min(found, key=lambda x: x[0])
    note = {"kind": heads.config.kind, "method": "ridge", "states": len(hidden), "penalty": best[1]}
    return best[2], note


@torch.no_grad()
def linear_v(
    heads: ValueHeads,
    hidden: Float[Tensor, "states embed"],
    held_out: Float[Tensor, "other embed"],
    intercept: bool = True,
) -> LinearV:
    """V as a vector and a number, exactly or by ridge regression on `hidden`.

    Without `intercept` the number is 0 whatever V is.
    """
    head: StateHead = heads.v
    last: Any = head.layers[-1]
    if heads.config.v == "linear" and heads.config.support is None:
        weight, bias = last.weight[0] / heads.reward_scale, float(last.bias) / heads.reward_scale
        if intercept or bias == 0:
            return LinearV(weight.detach().clone(), bias, None)
    x, y = hidden.double(), heads.state_value(hidden.float()).double()
    mean_x, mean_y = (
        (x.mean(0), y.mean()) if intercept else (x.new_zeros(x.size(1)), y.new_zeros(()))
    )
    centred, target = x - mean_x, (y - mean_y)[:, None]
    other, true = held_out.double(), heads.state_value(held_out.float()).double()
    found: list[tuple[float, float, Tensor, float]] = []
    for share in PENALTIES:
        weight = _solve(centred.T @ centred, centred.T @ target, share)[:, 0]
        bias = float(mean_y - mean_x @ weight)
        error = (other @ weight + bias - true).square().mean().sqrt()
        found.append((float(error), share, weight, bias))
    error, share, weight, bias = min(found, key=lambda each: each[0])
    note = {"method": "ridge", "states": len(hidden), "penalty": share, "intercept": intercept}
    note |= value_errors(true.float(), (other @ weight + bias).float())
    return LinearV(weight.float(), bias, note)


def value_errors(
    true: Float[Tensor, "states"], found: Float[Tensor, "states"]
) -> dict[str, float | None]:
    """Root of the mean square, the largest, and the share of V's variance explained (r2)."""
    error = (found - true).double()
    spread = float(true.double().var(correction=0))
    return {
        "rmse": float(error.square().mean().sqrt()),
        "max_error": float(error.abs().max()),
        "r2": 1 - float(error.square().mean()) / spread if spread > 0 else None,
    }


@torch.no_grad()
def factors(
    heads: ValueHeads,
    weight: Float[Tensor, "vocab embed"],
    hidden: Float[Tensor, "states embed"],
    rank: int | None,
) -> tuple[Float[Tensor, "vocab rank"], Float[Tensor, "rank embed"], str]:
    """B and A with B·A = F (`weight`), or as near as the rank allows; and which of both.

    Low-rank heads are taken as they are; their twins lie side by side. Else it is the best of that
    rank in what it does to the states: ‖(F − BA)·H‖ is least (singular values of F·C^½, C the
    states' second moments).
    """
    config, slow = heads.config, [*heads.target_q]
    if config.kind == "low_rank" and rank in (None, config.rank * config.num_q):
        scale = len(slow) * heads.reward_scale
        parts: list[Any] = slow
        up = torch.cat([head.centred_weight() for head in parts], dim=1) / scale
        return up, torch.cat([head.project.weight for head in parts]).clone(), "exact"
    most = min(weight.shape)
    rank = min(64 if rank is None else rank, most)
    states = hidden.double()
    second = states.T @ states / len(states)
    second += 1e-6 * second.diagonal().mean() * torch.eye(len(second), dtype=second.dtype)
    root = torch.linalg.cholesky(second)
    done = weight.double() @ root
    _, vectors = torch.linalg.eigh(done.T @ done)
    kept = vectors[:, -rank:]
    up = (done @ kept).float()
    down = torch.linalg.solve_triangular(root, kept.T, upper=False, left=False).float()
    return up.contiguous(), down.contiguous(), "exact" if rank == most else "svd"


def _solve(
    gram: Float[Tensor, "embed embed"], moment: Float[Tensor, "embed targets"], share: float
) -> Float[Tensor, "embed targets"]:
    """(G + λ I)⁻¹ M with λ a share of G's mean diagonal entry."""
    penalty = share * gram.diagonal().mean().clamp(min=1e-30)
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve(gram + penalty * eye, moment)
