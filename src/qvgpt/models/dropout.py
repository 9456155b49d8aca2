"""Dropout. On a CPU torch draws each entry by itself and spends an eighth of a training on it; here
four are decided by one number of the same generator."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int16
from torch import Tensor, nn

_LEVELS = 1 << 16


def drawn(shape: Sequence[int], rate: float) -> tuple[Int16[Tensor, "..."], float]:
    """1 for what stays and 0 for what is dropped, on the CPU, and what the rest is multiplied by.

    The rate is taken to the next 1/65536, and the factor is that of the rate as taken.
    """
    count = math.prod(shape)
    level = min(round(rate * _LEVELS), _LEVELS - 1)  # not all
    numbers = torch.empty((count + 3) // 4, dtype=torch.int64).random_(-(1 << 63), None)
    kept = numbers.view(torch.int16)[:count].view(*shape).ge_(level - _LEVELS // 2)
    return kept, _LEVELS / (_LEVELS - level)


class Dropout(nn.Dropout):
    """`nn.Dropout`, faster on a CPU."""

    def forward(self, input: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Zero some entries while training, and scale the others so that the mean stays."""
        drops = self.training and 0 < self.p < 1
        if not drops or input.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(input)
        return _Dropped.apply(input, *drawn(input.shape, self.p))  # type: ignore[return-value]


class _Dropped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(kept)
        ctx.scale = scale
        return x.mul(kept).mul_(scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (kept,) = ctx.saved_tensors
        return gradient.mul(kept).mul_(ctx.scale), None, None
