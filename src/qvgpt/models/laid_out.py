"""What decoding on a CPU keeps beside a module's weights: matrices laid out, a GPT's own step.

    lay_out(trunk)
    read(trunk, tokens, mask, cache)               # trunk.hidden
    with laid_out(heads): heads.target_q[0](hidden)

The second copy costs the memory of the weights, as long as the trunk lives.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from qvgpt.models import graph
from qvgpt.models.blocked import Blocked
from qvgpt.models.gpt import GPT
from qvgpt.models.step import Step


class _LaidOut:
    """What takes the place of a module's layers, of its LM head and of a step of it."""

    def __init__(self, module: Any, dtype: torch.dtype | None):
        self.state, self.dtype = _state(module), dtype
        layers = _layers(module)
        short = set(map(id, module.hidden_layers)) if dtype == torch.bfloat16 else set()
        matrices = {
            id(layer): Blocked(layer.weight.to(dtype) if id(layer) in short else layer.weight)
            for layer in layers
        }
        self.forwards = [(layer, _forward(matrices[id(layer)], layer.bias)) for layer in layers]
        self.step = Step(module, matrices) if _suits(module) else None
        head = getattr(module, "output_weight", None)
        self.head = Blocked(head) if head is not None and Blocked.suits(head) else head

    def __enter__(self) -> None:
        for layer, forward in self.forwards:
            layer.__dict__["forward"] = forward

    def __exit__(self, *error: object) -> None:
        for layer, _ in self.forwards:
            del layer.__dict__["forward"]


_known: WeakKeyDictionary[nn.Module, _LaidOut] = WeakKeyDictionary()


def lay_out(module: Any, dtype: torch.dtype | None = None) -> None:
    """Lay out the weights of a trunk or of value heads; again where they are others by now.

    `dtype` is that of the states that value heads are told: their hidden layers, which autocast
    makes short of digits in training too, are read in it.
    """
    known = _known.get(module)
    if known is None or known.state != _state(module) or known.dtype != dtype:
        _known[module] = _LaidOut(module, dtype)


def head_of(trunk: Any) -> Tensor | Blocked:
    """The LM head's matrix, laid out where `lay_out` did."""
    head = _known[trunk].head if trunk in _known else None
    return trunk.output_weight if head is None else head


def step_of(trunk: Any) -> Step | None:
    """The step that `lay_out` made; None where the trunk is no GPT that it suits."""
    return _known[trunk].step if trunk in _known else None


def read(
    trunk: Any,
    tokens: Int[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"] | None,
    cache: Any,
) -> Float[Tensor, "batch time embed"]:
    """`trunk.hidden` by what `lay_out` made, where it did. Gradients do not pass there."""
    known = _known.get(trunk)
    if tokens.size(1) == 1 and graph.suits(trunk, cache):
        return graph.step(trunk, tokens, mask, cache)
    if known is None:
        return trunk.hidden(tokens, mask, cache=cache)
    if known.step is not None and tokens.size(1) == 1:
        return known.step(tokens, mask, cache)
    with known:
        return trunk.hidden(tokens, mask, cache=cache)


def laid_out(module: Any) -> AbstractContextManager[Any]:
    """Let a module's layers multiply with what `lay_out` made. Gradients do not pass there."""
    return _known.get(module) or nullcontext()


def _layers(module: Any) -> list[nn.Linear]:
    head = getattr(module, "output_weight", None)
    found = (m for m in module.modules() if type(m) is nn.Linear and "forward" not in vars(m))
    return [m for m in found if m.weight is not head and Blocked.suits(m.weight)]


def _forward(matrix: Blocked, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    dtype = matrix.weight.dtype
    b = None if bias is None else bias.detach().to(dtype)
    return lambda x: matrix(x.to(dtype), b).to(x.dtype)


def _suits(module: Any) -> bool:
    return isinstance(module, GPT) and Step.suits(module)


def _state(module: Any) -> list[Any]:
    """Tells other weights from these: fused optimizers leave a tensor's version as it is."""
    weights: list[Any] = [layer.weight for layer in _layers(module)]
    head = getattr(module, "output_weight", None)
    if head is not None and Blocked.suits(head):  # sharded ones and other devices' are let alone
        weights.append(head)
    found: list[Any] = [
        (w.data_ptr(), w._version, float(w.detach()[0].float().sum())) for w in weights
    ]
    if _suits(module):  # all else it reads where it lies
        found.append([p.data_ptr() for p in module.parameters()])
    return found
