"""What decoding on a CPU keeps beside a module's weights: matrices laid out, a GPT's own step.

    lay_out(trunk)
    read(trunk, tokens, mask, cache)               # trunk.hidden
    with laid_out(heads): heads.target_q[0](hidden)

The second copy costs the memory of the weights, as long as the trunk lives.
"""

import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from qvgpt.models import graph
from qvgpt.models.blocked import Blocked
from qvgpt.models.gpt import GPT
from qvgpt.models.heads import ValueHeads, version
from qvgpt.models.step import HeadsStep, Step


class _LaidOut:
    """What takes the place of a module's layers, of its LM head and of a step of it."""

    def __init__(self, module: Any, dtype: torch.dtype | None):
        self.state, self.dtype = _state(module), dtype
        self.lock = _lock_of(module)
        layers = _layers(module)
        short = set(map(id, module.hidden_layers)) if dtype == torch.bfloat16 else set()
        there = set(map(id, layers))
        groups = [g for g in getattr(module, "side_by_side", ()) if {*map(id, g)} <= there]
        self.together = [(group, _Together(group, short)) for group in groups]
        joined = {id(layer) for group in groups for layer in group}
        alone = [layer for layer in layers if id(layer) not in joined]
        matrices = {id(layer): Blocked(_weight([layer], short)) for layer in alone}
        self.forwards = [(layer, _forward(matrices[id(layer)], layer.bias)) for layer in alone]
        self.forwards += [(x, t.of(i)) for group, t in self.together for i, x in enumerate(group)]
        self.step = Step(module, matrices) if _suits(module) else None
        self.values: HeadsStep | None = None
        if isinstance(module, ValueHeads) and HeadsStep.suits(module):
            stored = {key: matrix.weight for key, matrix in matrices.items()}
            stored |= {id(x): w for group, t in self.together for x, w in t.weights(group)}
            self.values = HeadsStep.of(module, dtype or torch.float32, stored)
        head = getattr(module, "output_weight", None)
        self.head = Blocked(head) if head is not None and Blocked.suits(head) else head

    def __enter__(self) -> None:
        self.lock.acquire()
        for layer, forward in self.forwards:
            layer.__dict__["forward"] = forward

    def __exit__(self, *error: object) -> None:
        try:
            for layer, _ in self.forwards:
                del layer.__dict__["forward"]
            for _, together in self.together:
                together.forget()
        finally:
            self.lock.release()


class _Together:
    """Layers that read the same states, as one product: whoever asks first computes all of it."""

    def __init__(self, layers: Sequence[nn.Linear], short: Collection[int]):
        self.matrix = matrix = Blocked(_weight(layers, short))
        biases: list[Tensor] = [layer.bias for layer in layers if layer.bias is not None]
        self.forward = _forward(matrix, torch.cat(biases) if biases else None)
        self.sizes = [len(layer.weight) for layer in layers]
        self.forget()

    def weights(self, layers: Sequence[nn.Linear]) -> Iterable[tuple[nn.Linear, Tensor]]:
        """Each layer's own part of the matrix."""
        return zip(layers, self.matrix.weight.split(self.sizes), strict=True)

    def forget(self) -> None:
        """The states are read, and may change."""
        self.states: Tensor | None = None
        self.found: tuple[Tensor, ...] = ()

    def of(self, place: int) -> Callable[[Tensor], Tensor]:
        """What one of the layers makes of states."""
        return lambda x: self(x)[place]

    def __call__(self, x: Float[Tensor, "*rows in"]) -> tuple[Tensor, ...]:
        """What each makes of them."""
        if self.states is not x:
            self.states, self.found = x, self.forward(x).split(self.sizes, dim=-1)
        return self.found


_known: WeakKeyDictionary[nn.Module, _LaidOut] = WeakKeyDictionary()
_locks: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
_finding_locks = threading.Lock()


def _lock_of(module: nn.Module) -> Any:
    """One thread at a time lays a module out, or finds its layers replaced."""
    with _finding_locks:
        return _locks.setdefault(module, threading.RLock())


def lay_out(module: Any, dtype: torch.dtype | None = None) -> None:
    """Lay out the weights of a trunk or of value heads; again where they are others by now.

    `dtype` is that of the states that value heads are told: their hidden layers, which autocast
    makes short of digits in training too, are read in it.
    """
    with _lock_of(module):
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


def values_of(heads: Any) -> HeadsStep | None:
    """What `lay_out` made of value heads; None where they are not as it knows them."""
    return _known[heads].values if heads in _known else None


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


def _weight(layers: Sequence[nn.Linear], short: Collection[int]) -> Float[Tensor, "out in"]:
    """Side by side, in bf16 where they are among the `short`."""
    weights: list[Tensor] = [layer.weight for layer in layers]
    weight = torch.cat(weights) if weights[1:] else weights[0]
    return weight.bfloat16() if id(layers[0]) in short else weight


def _forward(matrix: Blocked, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    dtype = matrix.weight.dtype
    b = None if bias is None else bias.detach().to(dtype)
    return lambda x: matrix(x.to(dtype), b).to(x.dtype)


def _suits(module: Any) -> bool:
    return isinstance(module, GPT) and Step.suits(module)


def mark(weight: Tensor, rows: bool = True) -> tuple[int | float, ...]:
    """Tells another matrix from this one: fused optimizers, and who writes to its `.data`, leave a
    tensor's version as it is. With `rows` a single row of another content is seen too, of 50,257 ×
    768 numbers in a quarter of a millisecond, from afar in one.
    """
    w = weight.detach()
    read = (w[0], w[:, 0]) if rows else (w[0],)
    return weight.data_ptr(), version(weight), *(float(x.sum(dtype=torch.float32)) for x in read)


def _state(module: Any) -> list[Any]:
    """Tells other weights from these."""
    found: list[Any] = [mark(layer.weight, rows=False) for layer in _layers(module)]
    head = getattr(module, "output_weight", None)
    if head is not None and Blocked.suits(head):  # sharded ones and other devices' are let alone
        found.append(mark(head))  # tokens have rows, which are written to one by one
    if _suits(module):  # all else it reads where it lies
        found.append([p.data_ptr() for p in module.parameters()])
    if isinstance(module, ValueHeads) and HeadsStep.suits(module):  # it keeps a mean of rows
        found += [(p.data_ptr(), version(p)) for p in module.target_q.parameters()]
    return found
