"""Softmax and its log-sum-exp over rows of logits, in place, in one kernel of Triton's.

torch's own operators pass over the rows seven times, in fp32; this one reads them twice and writes
them once. Needs a GPU, and Triton, which torch brings along there.
"""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

triton: Any
tl: Any
try:
    triton, tl = import_module("triton"), import_module("triton.language")
except ImportError:
    triton = tl = None

_BLOCK = 4096  # columns at a time


def to_softmax(z: Tensor, lse: Tensor, softcap: float | None, vocab_size: int) -> None:
    """In place: z [rows, columns] becomes ∂lse/∂z; its log-sum-exp goes to `lse` [rows], in fp32.

    With a `softcap` c the logits are c·tanh(z / c). Columns beyond the vocabulary become zero.
    """
    cap, width = (softcap or 1.0, softcap is not None), (vocab_size, z.size(1))
    with torch.cuda.device(z.device):
        _rows[(len(z),)](  # pyright: ignore[reportPossiblyUnbound]
            z, lse, z.stride(0), *width, *cap, _BLOCK, num_warps=8
        )


def is_there() -> bool:
    """Whether Triton is."""
    return triton is not None


if triton is not None:

    @triton.jit
    def _rows(
        z,
        lse,
        stride,
        size,
        width,
        cap,
        capped: tl.constexpr,  # pyright: ignore[reportInvalidTypeForm]
        block: tl.constexpr,  # pyright: ignore[reportInvalidTypeForm]
    ):
        row = tl.program_id(0).to(tl.int64)
        z += row * stride
        most, total = -float("inf"), 0.0
        for start in range(0, size, block):
            at = start + tl.arange(0, block)
            x = tl.load(z + at, mask=at < size, other=0.0).to(tl.float32)
            if capped:
                x = cap * (2 * tl.sigmoid(2 * x / cap) - 1)
            x = tl.where(at < size, x, -float("inf"))
            now = tl.maximum(most, tl.max(x, 0))
            total = total * tl.exp(most - now) + tl.sum(tl.exp(x - now), 0)
            most = now
        found = most + tl.log(total)
        tl.store(lse + row, found)
        for start in range(0, width, block):
            at = start + tl.arange(0, block)
            x = tl.load(z + at, mask=at < size, other=0.0).to(tl.float32)
            slope = 1.0
            if capped:
                x = cap * (2 * tl.sigmoid(2 * x / cap) - 1)
                slope = 1 - (x / cap) * (x / cap)
            p = tl.where(at < size, tl.exp(x - found) * slope, 0.0)
            tl.store(z + at, p.to(z.dtype.element_ty), mask=at < width)
