"""Softmax attention: torch's, and one for what learns on a CPU from short texts or with dropout.

There torch's flash kernel spends most of its time in the backward pass (at 256 tokens three times
what plain matrix products take; benchmarks/train.py), and with dropout it is not to be had. Where
all pairs of tokens fit the cache the products win; what is kept is what flash keeps, the
probabilities are computed anew.

Texts that share rows are taken out of them, those of like length together: causal attention over
each needs no mask, and no product of one text with another.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from qvgpt.models.dropout import drawn

SHORT = 512
"""Tokens up to which plain products are faster on a CPU (without dropout)."""
_STEP = 32  # lengths of texts are rounded up to a multiple, in which kernels of a CPU are faster


@dataclass(frozen=True)
class Packed:
    """Where the texts of packed rows lie; those of like length form a group.

    A cell is the vector of one head for one token. The network gives queries, keys and values as
    [token, 3, head], attention takes them as [group, 3, text, head, token], where a text is filled
    up with its last token.
    """

    groups: list[tuple[int, int]]
    """Texts · heads of each group, and the tokens of each of them."""
    order: Int[Tensor, "cells"]
    """The cells of queries, keys and values, group by group."""
    place: Int[Tensor, "tokens_3_heads"]
    """Where in `order` each of them stands."""
    found: Int[Tensor, "tokens_heads"]
    """Where, group by group, what is found for each token and head stands."""

    @classmethod
    def of(cls, positions: Int[Tensor, "rows time"], heads: int) -> "Packed":
        """Of tokens' positions within their texts: a text goes on where they count up by one."""
        begins = positions.diff(dim=1, prepend=positions[:, :1] - 1) != 1
        begins[:, 0] = True
        token = torch.arange(begins.numel(), device=begins.device)
        start = begins.flatten().nonzero()[:, 0]
        end = torch.cat([start[1:], token[-1:] + 1])
        size = end - start
        size = torch.where(size > 1, (size + _STEP - 1) // _STEP * _STEP, 1)  # 1: of padding
        head = torch.arange(heads, device=token.device)[:, None]
        groups, cells = [], {1: ([], []), 3: ([], [])}
        for length in size.unique().tolist():
            texts = size == length
            places = torch.arange(length, device=token.device)
            at, last = start[texts, None] + places, end[texts, None] - 1
            groups.append((heads * len(at), length))
            for parts, (order, real) in cells.items():
                part = torch.arange(parts, device=token.device)[:, None, None, None]
                order.append((torch.minimum(at, last)[:, None] * parts + part) * heads + head)
                real.append((at <= last)[:, None].expand_as(order[-1]))
        order, place = _there_and_back(*cells[3])
        return cls(groups, order, place, _there_and_back(*cells[1])[1])


def seen_in_rows(positions: Int[Tensor, "rows time"]) -> Bool[Tensor, "rows 1 time time"] | None:
    """What each token of a row sees where texts share a prompt; None: no row's texts do.

    A text that begins at position p > 0 goes on after the first p tokens of the last one that
    began at 0.
    """
    begins = positions.diff(dim=1, prepend=positions[:, :1] - 1) != 1
    begins[:, 0] = True
    if not (begins & (positions > 0)).any():
        return None
    time = torch.arange(positions.size(1), device=positions.device)
    part = time.where(begins, 0).cummax(1).values  # where the part of a token begins
    whole = time.where(begins & (positions == 0), 0).cummax(1).values  # and the one before at 0
    start = positions.gather(1, part)
    of_prompt = (whole[:, :, None] == whole[:, None, :]) & (part == whole)[:, None, :]
    of_prompt &= positions[:, None, :] < start[:, :, None]
    same_part = part[:, :, None] == part[:, None, :]
    return (same_part | of_prompt).tril()[:, None]


def _there_and_back(order: list[Tensor], real: list[Tensor]) -> tuple[Tensor, Tensor]:
    """All groups' cells, and where among them each one stands."""
    there, counts = (torch.cat([x.flatten() for x in found]) for found in (order, real))
    back = torch.empty_like(there[counts])
    back[there[counts]] = counts.nonzero()[:, 0]
    return there, back


def attention(
    query: Float[Tensor, "batch heads time head_dim"],
    key: Float[Tensor, "batch heads keys head_dim"],
    value: Float[Tensor, "batch heads keys head_dim"],
    visible: Bool[Tensor, "batch 1 time keys"] | None,
    dropout: float = 0.0,
) -> Float[Tensor, "batch heads time head_dim"]:
    """softmax(query · keyᵀ / √head_dim) · value over the `visible` keys; None: causal."""
    if by_products(query, key, dropout):
        mask = _additive(visible, query)
        flat = (x.reshape(-1, x.size(2), x.size(3)) for x in (query, key, value))
        return _Products.apply(*flat, mask, dropout).view_as(query)  # type: ignore[union-attr]
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=visible, is_causal=visible is None, dropout_p=dropout
    )


def by_products(query: Tensor, key: Tensor, dropout: float) -> bool:
    """Whether plain products take less time than torch's kernel; in fp32 without dropout they do
    not."""
    learns = torch.is_grad_enabled() and query.requires_grad and query.device.type == "cpu"
    short = query.dtype == torch.bfloat16 and key.size(2) <= SHORT
    return learns and (short or dropout > 0)


def attend_once(
    query: Float[Tensor, "batch heads 1 head_dim"],
    key: Float[Tensor, "batch key_heads keys head_dim"],
    value: Float[Tensor, "batch key_heads keys head_dim"],
    added: Float[Tensor, "batch_key_heads 1 keys"],
    scale: float,
) -> Float[Tensor, "batch heads 1 head_dim"]:
    """`attention` of one token a row in the dtype of keys and values; `added` goes onto the scores.

    On a CPU torch's kernel takes 1.3 (fp32) to 8 (bf16) times as long for it.
    """
    flat = query.to(key.dtype).reshape(-1, query.size(1) // key.size(1), query.size(3))
    keys = key.flatten(0, 1).transpose(1, 2)
    probability = torch.baddbmm(added, flat, keys, alpha=scale).softmax(-1)
    return torch.bmm(probability, value.flatten(0, 1)).to(query.dtype).view_as(query)


def packed_attention(
    qkv: Float[Tensor, "rows time 3 heads head_dim"], packed: Packed, dropout: float = 0.0
) -> Float[Tensor, "rows time heads head_dim"]:
    """Causal attention within each text of packed rows."""
    return _within(qkv, packed, dropout)


def leave_packed_uncompiled() -> None:
    """For whoever compiles layers: else each batch's groups would be compiled anew.

    No decorator: that would import torch's compiler, which takes a second, for all who don't.
    """
    global _within
    _within = torch.compiler.disable()(_within_texts)


def _within_texts(qkv: Tensor, packed: Packed, dropout: float) -> Tensor:
    cells = _Rearrange.apply(qkv.reshape(-1, qkv.size(-1)), packed.order, packed.place)
    parts = iter(cells.split([n * length for n, length in packed.groups for _ in range(3)]))
    found = []
    for n, length in packed.groups:
        query, key, value = (next(parts).view(1, n, length, -1) for _ in range(3))
        found.append(attention(query, key, value, None, dropout).flatten(0, 2))
    return _Rearrange.apply(torch.cat(found), packed.found, None).view_as(qkv[:, :, 0])


_within: Callable[[Tensor, Packed, float], Tensor] = _within_texts


class _Rearrange(torch.autograd.Function):
    """x[index] of rows of x. Its gradient is that of `inverse`, or what is not taken has none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor | None) -> Tensor:
        ctx.rows, ctx.index, ctx.inverse = len(x), index, inverse
        return x.index_select(0, index)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if ctx.inverse is not None:
            return gradient.index_select(0, ctx.inverse), None, None
        found = gradient.new_zeros(ctx.rows, *gradient.shape[1:])
        return found.index_copy_(0, ctx.index, gradient), None, None


def _additive(visible: Tensor | None, query: Tensor) -> Tensor:
    """0 where a key is visible, −inf elsewhere: [time, keys] for all, or one a row of the batch."""
    if visible is None:
        time = query.size(2)
        return query.new_full((time, time), float("-inf")).triu(1)
    mask = torch.zeros_like(visible[:, 0], dtype=query.dtype)
    return mask.masked_fill_(~visible[:, 0], float("-inf"))


class _Products(torch.autograd.Function):
    """On [batch · heads, time, head_dim]; `dropout` is that of the probabilities."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, dropout: float = 0.0
    ) -> Tensor:
        p, ctx.scale = _probabilities(query, key, mask), 1.0
        kept = None
        if dropout:
            kept, ctx.scale = drawn(p.shape, dropout)
            p *= kept
        ctx.save_for_backward(query, key, value, mask, kept)
        return torch.bmm(p, value).mul_(ctx.scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, mask, kept = ctx.saved_tensors
        p = _probabilities(query, key, mask)
        gradient = gradient * ctx.scale
        to_p = torch.bmm(gradient, value.transpose(1, 2))
        to_p = to_p if kept is None else to_p.mul_(kept)
        to_scores = torch.ops.aten._softmax_backward_data(to_p, p, -1, p.dtype)
        to_scores *= query.size(-1) ** -0.5
        p = p if kept is None else p.mul_(kept)
        to_value = torch.bmm(p.transpose(1, 2), gradient)
        to_query = torch.bmm(to_scores, key)
        to_key = torch.bmm(to_scores.transpose(1, 2), query)
        return to_query, to_key, to_value, None, None


def _probabilities(query: Tensor, key: Tensor, mask: Tensor) -> Tensor:
    """Of every pair, [batch · heads, time, keys]; the softmax adds up in fp32."""
    scale = query.size(-1) ** -0.5
    if mask.dim() == 3:
        mask = mask.repeat_interleave(query.size(0) // mask.size(0), 0)
    return torch.baddbmm(mask, query, key.transpose(1, 2), alpha=scale).softmax(-1)
