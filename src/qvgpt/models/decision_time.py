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
    """The states that a decision that counts begins or ends in."""
    return F.pad(mask, (0, 1)) | F.pad(mask, (1, 0))


def scatter(
    flat: Float[Tensor, "rows *more"], mask: Bool[Tensor, "batch steps"]
) -> Float[Tensor, "batch steps *more"]:
    """Rows back to their places; 0 elsewhere."""
    shape = (*mask.shape, *flat.shape[1:])
    places = mask.view(*mask.shape, *[1] * (flat.dim() - 1)).expand(shape)
    return torch.zeros(shape, dtype=flat.dtype, device=flat.device).masked_scatter(places, flat)
