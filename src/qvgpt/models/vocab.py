"""Operations over the whole vocabulary, in chunks of rows, and gathers that avoid it.

Rows are decisions, flattened; `weight` is a matrix with one row per token. No function here
keeps a [rows, vocab] tensor larger than `CHUNK_ELEMENTS`: forward and backward both walk chunks,
the backward recomputing each.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_ELEMENTS = 2**24  # 64 MiB in fp32


def gather_dot(
    features: Float[Tensor, "rows features"],
    weight: Float[Tensor, "vocab features"],
    token: Int[Tensor, "rows"],
) -> Float[Tensor, "rows"]:
    """(features @ weight.T)[i, token[i]] without the product: only the taken rows are read."""
    return (features * F.embedding(token, weight)).sum(-1)


def logits(
    hidden: Float[Tensor, "rows embed"],
    weight: Float[Tensor, "vocab embed"],
    softcap: float | None = None,
) -> Float[Tensor, "rows vocab"]:
    """hidden @ weight.T in fp32; with a cap c, c·tanh(· / c) of it (Gemma 2)."""
    plain = (hidden @ weight.T).float()
    return plain if softcap is None else softcap * torch.tanh(plain / softcap)


def log_prob(
    hidden: Float[Tensor, "rows embed"],
    weight: Float[Tensor, "vocab embed"],
    token: Int[Tensor, "rows"],
    softcap: float | None = None,
) -> Float[Tensor, "rows"]:
    """log softmax(logits)[i, token[i]], in fp32."""

    def of_chunk(h: Tensor, w: Tensor, t: Tensor) -> Tensor:
        return -F.cross_entropy(logits(h, w, softcap), t, reduction="none")

    return _by_chunks(of_chunk, hidden, weight, token)


def logsumexp(
    features: Float[Tensor, "rows features"], weight: Float[Tensor, "vocab features"]
) -> Float[Tensor, "rows"]:
    """log Σₐ exp(features @ weight.T), in fp32."""
    return _by_chunks(lambda f, w: (f @ w.T).float().logsumexp(-1), features, weight)


def _by_chunks(
    function: Callable[..., Tensor], rows: Tensor, weight: Tensor, *more: Tensor
) -> Tensor:
    size = max(1, CHUNK_ELEMENTS // weight.size(0))
    if len(rows) <= size:
        return function(rows, weight, *more)
    chunks = zip(rows.split(size), *(m.split(size) for m in more), strict=True)
    results = [
        checkpoint(function, chunk, weight, *others, use_reentrant=False)
        for chunk, *others in chunks
    ]
    return torch.cat(results)
