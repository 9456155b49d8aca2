"""From token time to decision time and back: see the head of `trajectory.py`."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from qvgpt.trajectory import TrajectoryBatch


def states_of(
    hidden: Float[Tensor, "rows time embed"], batch: TrajectoryBatch
) -> Float[Tensor, "batch states embed"]:
    """The state of each decision, then that of the end."""
    at = batch.row[:, None] * hidden.size(1) + batch.state_index
    return hidden.flatten(0, 1)[at]


def used_states(mask: Bool[Tensor, "batch steps"]) -> Bool[Tensor, "batch steps+1"]:
    """The states that a decision that counts begins or ends in, and each text's first."""
    used = F.pad(mask, (0, 1)) | F.pad(mask, (1, 0))
    return used | F.pad(torch.ones_like(mask[:, :1]), (0, mask.size(1)))


def rows_of(
    hidden: Float[Tensor, "rows time embed"],
    batch: TrajectoryBatch,
    used: Bool[Tensor, "batch states"],
) -> Float[Tensor, "used embed"]:
    """`states_of`, where they are used alone."""
    at = batch.row[:, None] * hidden.size(1) + batch.state_index
    return hidden.flatten(0, 1)[at[used]]


def decides(
    mask: Bool[Tensor, "batch steps"], used: Bool[Tensor, "batch states"]
) -> Bool[Tensor, "used"]:
    """Which of the used states a decision that counts begins in."""
    return F.pad(mask, (0, 1))[used]


def scatter(
    flat: Float[Tensor, "rows *more"], mask: Bool[Tensor, "batch steps"]
) -> Float[Tensor, "batch steps *more"]:
    """Rows back to their places; 0 elsewhere."""
    shape = (*mask.shape, *flat.shape[1:])
    places = mask.view(*mask.shape, *[1] * (flat.dim() - 1)).expand(shape)
    return torch.zeros(shape, dtype=flat.dtype, device=flat.device).masked_scatter(places, flat)
