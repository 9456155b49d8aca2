"""Tensors that several processes hold parts of (FSDP2): to the whole and back."""

import sys
from typing import Any

from torch import Tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on the CPU if it was sharded: then every process must ask, and gets it."""
    found: Any = tensor
    return found.full_tensor().cpu() if _is_sharded(tensor) else tensor


def sharded_like(value: Tensor, own: Tensor) -> Tensor:
    """This process's part of `value`, if `own` is such a part; else `value` itself."""
    if not _is_sharded(own) or value.dim() == 0:
        return value
    from torch.distributed.tensor import distribute_tensor

    part: Any = own
    return distribute_tensor(value.to(own.device), part.device_mesh, part.placements)


def _is_sharded(tensor: Tensor) -> bool:
    """Whoever made such a tensor imported its module, which takes a second."""
    module: Any = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)
