"""Tensors that several processes hold parts of (FSDP2): to the whole and back."""

from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on the CPU if it was sharded: then every process must ask, and gets it."""
    found: Any = tensor
    return found.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor


def sharded_like(value: Tensor, own: Tensor) -> Tensor:
    """This process's part of `value`, if `own` is such a part; else `value` itself."""
    if not isinstance(own, DTensor) or value.dim() == 0:
        return value
    return distribute_tensor(value.to(own.device), own.device_mesh, own.placements)
