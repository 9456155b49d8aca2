"""Weight matrices laid out as oneDNN multiplies with them, for decoding on a CPU.

    with blocked(trunk): trunk.hidden(tokens, cache=cache)

A product with a matrix as it is stored lays it out anew or reads it at a third of the memory's
speed, and with few tokens to a step that is the step. Laid out once, one core reads 40 GB/s of
weights where it read 16 (benchmarks/decode.py); torch.compile does the same to frozen weights. The
second copy costs the memory of the weights, as long as the trunk lives.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

_LEAST = {torch.bfloat16: 2**13, torch.float32: 2**15}  # elements; below, a call costs more
_LARGE = 2**20  # elements of fp32 from which a single row gains too


class Blocked:
    """x ↦ x Wᵀ + b of a matrix W [out, in] that is laid out for it."""

    def __init__(self, weight: Float[Tensor, "out in"]):
        self.weight = weight
        self.laid_out = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
        self._few = weight.dtype == torch.float32 and weight.numel() < _LARGE

    @staticmethod
    def suits(weight: Tensor) -> bool:
        """Whether there is such a layout, and it is worth it."""
        here = weight.device.type == "cpu" and type(weight.detach()) in (Tensor, nn.Parameter)
        known = hasattr(torch.ops.mkldnn, "_linear_pointwise") and torch.backends.mkldnn.enabled
        return here and known and weight.numel() >= _LEAST.get(weight.dtype, weight.numel() + 1)

    def __call__(
        self, x: Float[Tensor, "*rows in"], bias: Float[Tensor, "out"] | None = None
    ) -> Float[Tensor, "*rows out"]:
        """The product, in the dtype of both."""
        if x.dtype != self.weight.dtype or (self._few and x.numel() < 4 * x.size(-1)):
            return F.linear(x, self.weight, bias)
        return torch.ops.mkldnn._linear_pointwise(x, self.laid_out, bias, "none", [], "")


def product(
    x: Float[Tensor, "*rows in"], weight: Float[Tensor, "out in"] | Blocked
) -> Float[Tensor, "*rows out"]:
    """x Wᵀ, of either kind of matrix."""
    return weight(x) if isinstance(weight, Blocked) else x @ weight.T


class _Layers:
    """The linear layers of a module, and the LM head of a trunk."""

    def __init__(self, module: Any):
        self.state = _state(module)
        self.forwards = [(layer, _forward(layer)) for layer in _layers(module)]
        head = getattr(module, "output_weight", None)
        self.head = Blocked(head) if head is not None and Blocked.suits(head) else head


_known: WeakKeyDictionary[nn.Module, _Layers] = WeakKeyDictionary()


def lay_out(module: Any) -> None:
    """Lay out the weights of a trunk or of value heads; again where they are others by now."""
    if module not in _known or _known[module].state != _state(module):
        _known[module] = _Layers(module)


def head_of(trunk: Any) -> Tensor | Blocked:
    """The LM head's matrix, laid out where `lay_out` did."""
    head = _known[trunk].head if trunk in _known else None
    return trunk.output_weight if head is None else head


@contextmanager
def blocked(module: Any) -> Iterator[None]:
    """Let a module's layers multiply with what `lay_out` made. Gradients do not pass there."""
    forwards = _known[module].forwards if module in _known else []
    for layer, forward in forwards:
        layer.__dict__["forward"] = forward
    try:
        yield
    finally:
        for layer, _ in forwards:
            del layer.__dict__["forward"]


def _layers(module: Any) -> list[nn.Linear]:
    head = getattr(module, "output_weight", None)
    found = (m for m in module.modules() if type(m) is nn.Linear and "forward" not in vars(m))
    return [m for m in found if m.weight is not head and Blocked.suits(m.weight)]


def _forward(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    weight, bias = Blocked(layer.weight), layer.bias
    return lambda x: weight(x, bias)


def _state(module: Any) -> list[tuple[int, int, float]]:
    """Tells other weights from these: fused optimizers leave a tensor's version as it is."""
    weights: list[Any] = [layer.weight for layer in _layers(module)]
    head = getattr(module, "output_weight", None)
    if head is not None and Blocked.suits(head):  # sharded ones and other devices' are let alone
        weights.append(head)
    return [(w.data_ptr(), w._version, float(w.detach()[0].float().sum())) for w in weights]
