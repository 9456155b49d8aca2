"""A weight matrix laid out as oneDNN multiplies with it, for decoding on a CPU.

A product with a matrix as it is stored lays it out anew or reads it at a third of the memory's
speed, and with few tokens to a step that is the step. Laid out once, one core reads 40 GB/s of
weights where it read 16 (benchmarks/decode.py); torch.compile does the same to frozen weights.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from qvgpt.models import native
from qvgpt.models.native import Native

_LEAST = {torch.bfloat16: 2**13, torch.float32: 2**15}  # elements; below, a call costs more
_LARGE = 2**20  # elements of fp32 from which a single row gains too


class Blocked:
    """x ↦ x Wᵀ + b of a matrix W [out, in] that is laid out for it."""

    def __init__(self, weight: Float[Tensor, "out in"]):
        self.weight = weight.detach()
        self.laid_out = torch.ops.mkldnn._reorder_linear_weight(self.weight, None)
        self._native = native.of(weight.dtype) if Native.fits(self.weight) else None
        short = weight.dtype == torch.bfloat16
        self._few = weight.size(1) * (1 if short else 2)  # elements of states
        self._least = 0 if short or weight.numel() >= _LARGE else 4 * weight.size(1)

    @staticmethod
    def suits(weight: Tensor) -> bool:
        """Whether there is such a layout, and it is worth it."""
        here = weight.device.type == "cpu" and type(weight.detach()) in (Tensor, nn.Parameter)
        known = _op is not None and torch.backends.mkldnn.enabled
        return here and known and weight.numel() >= _LEAST.get(weight.dtype, weight.numel() + 1)

    def __call__(
        self,
        x: Float[Tensor, "*rows in"],
        bias: Float[Tensor, "out"] | None = None,
        gelu: bool = False,
        onto: Float[Tensor, "*rows out"] | None = None,
    ) -> Float[Tensor, "*rows out"]:
        """The product, in the dtype of both: through a GELU (tanh), or added `onto` something."""
        if x.dtype != self.weight.dtype:
            return affine(x, self.weight, bias, gelu, onto)
        if self._native is not None and x.numel() <= self._few:
            return self._native.linear(x, self.weight, bias, gelu, onto)
        if x.numel() < self._least:
            return affine(x, self.weight, bias, gelu, onto)
        if onto is not None:
            return _op.binary(x, onto, self.laid_out, bias, "add")
        return _op.default(x, self.laid_out, bias, *(_GELU if gelu else _NOTHING))


_op: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
_NOTHING: tuple[str, list[float], str] = ("none", [], "")
_GELU: tuple[str, list[float], str] = ("gelu", [], "tanh")


def affine(
    x: Float[Tensor, "*rows in"],
    weight: Float[Tensor, "out in"],
    bias: Float[Tensor, "out"] | None,
    gelu: bool = False,
    onto: Float[Tensor, "*rows out"] | None = None,
) -> Float[Tensor, "*rows out"]:
    """What `Blocked` does, of a matrix as it is stored."""
    found = F.linear(x, weight, bias)
    if gelu:
        return F.gelu(found, approximate="tanh")
    return found if onto is None else onto + found


def product(
    x: Float[Tensor, "*rows in"], weight: Float[Tensor, "out in"] | Blocked
) -> Float[Tensor, "*rows out"]:
    """x Wᵀ, of either kind of matrix."""
    return weight(x) if isinstance(weight, Blocked) else x @ weight.T
