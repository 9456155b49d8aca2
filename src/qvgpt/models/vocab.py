"""Operations over the whole vocabulary, in chunks of rows, and gathers that avoid it.

Rows are decisions, flattened; `weight` is a matrix with one row per token. No function here
keeps a [rows, vocab] tensor of more than `CHUNK_ELEMENTS`, and none is kept for the backward pass:
its gradients are products of softmax(features @ weight.T), so they are taken while that is there.
One product more forward, two fewer backward: 6 N operations where recomputing costs 8 N.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from qvgpt.models import softmax_gpu
from qvgpt.models.blocked import Blocked, product

CHUNK_ELEMENTS = 2**26  # 128 MiB in bf16; a chunk of fewer than 1000 rows slows the products
_BLOCK_ELEMENTS = 2**19  # of the softmax within a chunk: on a CPU it stays in the cache


def wide(x: Tensor) -> Tensor:
    """In fp32 at least, where what is computed is short of digits else."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def pick(
    weight: Float[Tensor, "vocab features"], tokens: Int[Tensor, "*shape"]
) -> Float[Tensor, "*shape features"]:
    """weight[tokens], which takes three times as long (a CPU, rows of 6 KB)."""
    return weight.index_select(0, tokens.flatten()).view(*tokens.shape, weight.size(1))


def gather_dot(
    features: Float[Tensor, "rows features"],
    weight: Float[Tensor, "vocab features"],
    token: Int[Tensor, "rows"],
) -> Float[Tensor, "rows"]:
    """(features @ weight.T)[i, token[i]] without the product: only the taken rows are read."""
    return (features * torch.nn.functional.embedding(token, weight)).sum(-1)


def lookup_tied(
    weight: Float[Tensor, "vocab embed"], tokens: Int[Tensor, "*shape"]
) -> tuple[Float[Tensor, "*shape embed"], Float[Tensor, "vocab embed"]]:
    """The rows of some tokens, and the matrix itself to be used as LM head.

    The gradient of the rows is added to that of the head in its place: no other matrix of that
    size is made. The head's must be nobody else's, as those of this file are.
    """
    return _LookupTied.apply(weight, tokens)  # type: ignore[return-value]


def logits(
    hidden: Float[Tensor, "rows embed"],
    weight: Float[Tensor, "vocab embed"] | Blocked,
    softcap: float | None = None,
) -> Float[Tensor, "rows vocab"]:
    """hidden @ weight.T in fp32; with a cap c, c·tanh(· / c) of it (Gemma 2)."""
    plain = wide(product(hidden, weight))
    return plain if softcap is None else softcap * torch.tanh(plain / softcap)


def log_prob(
    hidden: Float[Tensor, "rows embed"],
    weight: Float[Tensor, "vocab embed"],
    token: Int[Tensor, "rows"],
    softcap: float | None = None,
    even: bool = True,
) -> Float[Tensor, "rows"]:
    """log softmax(logits)[i, token[i]], in fp32. `even` as in `taken_and_logsumexp`."""
    taken, total = taken_and_logsumexp(hidden, weight, token, softcap, even)
    return taken - total


def taken_and_logsumexp(
    features: Float[Tensor, "rows features"],
    weight: Float[Tensor, "vocab features"],
    token: Int[Tensor, "rows"],
    softcap: float | None = None,
    even: bool = True,
    centred: bool = False,
) -> tuple[Float[Tensor, "rows"], Float[Tensor, "rows"]]:
    """z[i, token[i]] and log Σₐ exp z[i, a] of z = features @ weight.T, both fp32.

    The products over the vocabulary are taken as autocast takes them; z of the token is exact
    whatever it says. `centred`: of weight − its mean over the vocabulary. `even` says that the loss
    will weigh the log-sums of all rows alike, as a mean does: then the gradient of `weight` is
    summed up at once. Where that turns out wrong the gradient is right all the same, but takes
    longer.
    """
    dtype = product_dtype(features.device) or weight.dtype
    return _TakenAndLogSumExp.apply(features, weight, token, softcap, even, centred, dtype)  # type: ignore[return-value]


def product_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast makes of a matrix product here; None where it is off."""
    on = torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if on else None


def entropy(
    hidden: Float[Tensor, "rows embed"],
    weight: Float[Tensor, "vocab embed"],
    softcap: float | None = None,
) -> Float[Tensor, "rows"]:
    """−Σₐ π(a) log π(a) of π = softmax(logits), in nats; the backward pass computes it anew."""

    def of_chunk(chunk: Tensor) -> Tensor:
        log_pi = logits(chunk, weight, softcap).log_softmax(-1)
        return -(log_pi.exp() * log_pi).sum(-1)

    chunks = hidden.split(chunk_rows(weight.size(0)))
    return torch.cat([checkpoint(of_chunk, chunk, use_reentrant=False) for chunk in chunks])


@torch.no_grad()
def best(
    score: Callable[[Tensor], Tensor],
    rows: Float[Tensor, "rows features"],
    vocab_size: int,
    tensors: int = 1,
) -> tuple[Float[Tensor, "rows"], Int[Tensor, "rows"]]:
    """The greatest of score(rows) [rows, vocab] and its token, without gradient.

    `tensors`: how many of that size `score` holds at once.
    """
    chunks = rows.split(chunk_rows(vocab_size, tensors))
    value, token = zip(*(score(chunk).max(-1) for chunk in chunks), strict=True)
    return torch.cat(value), torch.cat(token)


@torch.no_grad()
def max_ratio(
    trunk: Any,
    hidden: Float[Tensor, "rows embed"],
    ref: Any,
    ref_hidden: Float[Tensor, "rows embed"],
    dummy: int,
    least: float = 1e-3,
) -> Float[Tensor, "rows"]:
    """maxₐ π(a)/π_ref(a) of two trunks' hidden states, without gradient.

    `dummy`, and tokens that π_ref gives less than `least`, do not count: they tell nothing.
    """
    found, size = [], chunk_rows(ref.output_weight.size(0), tensors=4)
    for h, g in zip(hidden.split(size), ref_hidden.split(size), strict=True):
        there = logits(g, ref.output_weight, ref.softcap).log_softmax(-1)
        ratio = logits(h, trunk.output_weight, trunk.softcap).log_softmax(-1) - there
        ratio = ratio.masked_fill(there < math.log(least), -math.inf)
        ratio[:, dummy] = -math.inf
        found.append(ratio.amax(-1).exp())
    return torch.cat(found)


def chunk_rows(vocab_size: int, tensors: int = 1) -> int:
    """How many rows of that many [rows, vocab] tensors may be there at once."""
    return max(1, CHUNK_ELEMENTS // (tensors * vocab_size))


class _LookupTied(torch.autograd.Function):
    """See `lookup_tied`."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.tokens, ctx.shape = tokens.flatten(), weight.shape
        return torch.nn.functional.embedding(tokens, weight), weight.view_as(weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, of_rows: Tensor | None, of_head: Tensor | None) -> tuple[Any, None]:  # type: ignore[override]
        if of_rows is None:
            return of_head, None
        if of_head is None:
            of_head = of_rows.new_zeros(ctx.shape)
        return of_head.index_add_(0, ctx.tokens, of_rows.flatten(0, -2).to(of_head.dtype)), None


class _TakenAndLogSumExp(torch.autograd.Function):
    """See `taken_and_logsumexp`; with p = softmax(z):  ∂lse/∂f = p @ W,  ∂(Σ lse)/∂W = pᵀ @ f."""

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        weight: Tensor,
        token: Tensor,
        softcap: float | None,
        even: bool,
        centred: bool,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        f, w = features.to(dtype), _aligned(weight.to(dtype))
        mean = wide(weight.mean(0)) if centred else None
        taken = (wide(features) * wide(pick(weight, token))).sum(-1)
        slope = torch.ones_like(taken)
        if softcap is not None:
            taken = softcap * torch.tanh(taken / softcap)
            slope = 1 - (taken / softcap).square()
        lse = torch.empty_like(taken)
        of_features, of_weight = ctx.needs_input_grad[:2]
        expected = torch.empty_like(f) if of_features else None
        summed = None
        chunks = _slices(len(f), chunk_rows(len(weight)))
        for rows in chunks:
            p = f[rows] @ w.T
            _to_softmax(p, lse[rows], softcap, len(weight))
            if expected is not None:
                torch.mm(p, w, out=expected[rows])
            if of_weight and even:
                # the last product may overwrite what was made of the weights for this call
                spent = w if rows is chunks[-1] and w is not weight else None
                found = torch.mm(p.T, f[rows], out=spent)
                found = found if len(chunks) == 1 else wide(found)
                summed = found if summed is None else summed.add_(found)
        ctx.softcap, ctx.dtype, ctx.summed = softcap, dtype, summed
        ctx.save_for_backward(features, weight, token, slope, expected, mean)
        if mean is None:
            return taken, lse
        shift = wide(features) @ mean
        return taken - shift, lse - shift

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, of_taken: Tensor, of_lse: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        features, weight, token, slope, expected, mean = ctx.saved_tensors
        of_taken = of_taken * slope
        of_both = of_taken + of_lse
        to_features = to_weight = None
        if expected is not None:
            to_features = wide(expected) * of_lse[:, None]
            to_features.addcmul_(of_taken[:, None], wide(pick(weight, token)))
            if mean is not None:
                to_features -= of_both[:, None] * mean
            to_features = to_features.to(features.dtype)
        if ctx.needs_input_grad[1]:
            shift = torch.zeros_like(wide(weight[0]))
            if mean is not None:
                shift = (of_both @ wide(features)) / -len(weight)
            even = len(of_lse) > 0 and bool(of_lse.min() == of_lse.max())
            if even and ctx.summed is not None:
                scale = float(of_lse[0])
            else:
                ctx.summed, scale = _weighted_sum(ctx, features, weight, of_lse), 1.0
            to_weight = wide(ctx.summed)[: len(weight)]
            torch.add(shift, to_weight, alpha=scale, out=to_weight)
            ctx.summed = None  # may be overwritten: a second backward pass, if any, makes its own
            to_weight.index_add_(0, token, wide(features) * of_taken[:, None])
            to_weight = to_weight.to(weight.dtype)
        return to_features, to_weight, None, None, None, None, None


def _weighted_sum(ctx: Any, features: Tensor, weight: Tensor, of_lse: Tensor) -> Tensor:
    """Σᵢ of_lseᵢ · ∂lseᵢ/∂W, computing the softmax anew."""
    f, w = features.to(ctx.dtype), _aligned(weight.to(ctx.dtype))
    scaled = (wide(features) * of_lse[:, None]).to(ctx.dtype)
    total = torch.zeros_like(wide(w))
    for rows in _slices(len(f), chunk_rows(len(weight))):
        p = f[rows] @ w.T
        _to_softmax(p, torch.empty_like(of_lse[rows]), ctx.softcap, len(weight))
        total += p.T @ scaled[rows]
    return total


def _aligned(weight: Float[Tensor, "vocab features"]) -> Float[Tensor, "rows features"]:
    """With rows of zeros below it up to a multiple of 64, on a GPU: the products with 50,257 rows
    take five times as long there."""
    extra = -len(weight) % 64 if weight.is_cuda else 0
    return torch.nn.functional.pad(weight, (0, 0, 0, extra)) if extra else weight


def _to_softmax(
    z: Float[Tensor, "rows columns"],
    lse: Float[Tensor, "rows"],
    softcap: float | None,
    vocab_size: int,
) -> None:
    """In place: z becomes ∂lse/∂z, which is its softmax; its log-sum-exp goes to `lse`, in fp32.

    Columns beyond the vocabulary are no tokens, and become zero.
    """
    if z.is_cuda and softmax_gpu.is_there():
        softmax_gpu.to_softmax(z, lse, softcap, vocab_size)
        return
    z[:, vocab_size:] = 0
    z = z[:, :vocab_size]
    size = max(1, _BLOCK_ELEMENTS // vocab_size) if z.device.type == "cpu" else len(z)
    for rows in _slices(len(z), size):
        block = wide(z[rows])
        if softcap is not None:
            block = softcap * torch.tanh(block / softcap)
        p = block.softmax(-1)
        lse[rows] = block.amax(-1) - p.amax(-1).log()  # the likeliest token never underflows
        if softcap is not None:
            p *= 1 - (block / softcap).square()
        z[rows] = p


def _slices(total: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, total, size)]
