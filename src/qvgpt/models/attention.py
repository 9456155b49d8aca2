"""Softmax attention: torch's, and one for short texts that learn on a CPU.

There torch's flash kernel spends most of its time in the backward pass (at 256 tokens three times
what plain matrix products take; benchmarks/train.py). Where all pairs of tokens fit the cache the
products win; what is kept is what flash keeps, the probabilities are computed anew.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

SHORT = 512
"""Tokens up to which plain products are faster on a CPU."""


def attention(
    query: Float[Tensor, "batch heads time head_dim"],
    key: Float[Tensor, "batch heads keys head_dim"],
    value: Float[Tensor, "batch heads keys head_dim"],
    visible: Bool[Tensor, "batch 1 time keys"] | None,
    dropout: float = 0.0,
) -> Float[Tensor, "batch heads time head_dim"]:
    """softmax(query · keyᵀ / √head_dim) · value over the `visible` keys; None: causal."""
    if is_short(query, key, dropout):
        mask = _additive(visible, query)
        flat = (x.reshape(-1, x.size(2), x.size(3)) for x in (query, key, value))
        return _ShortAttention.apply(*flat, mask).view_as(query)  # type: ignore[union-attr]
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=visible, is_causal=visible is None, dropout_p=dropout
    )


def is_short(query: Tensor, key: Tensor, dropout: float) -> bool:
    """Whether plain products take less time than torch's kernel; in fp32 they do not."""
    learns = torch.is_grad_enabled() and query.requires_grad
    short = query.dtype == torch.bfloat16 and key.size(2) <= SHORT
    return learns and short and query.device.type == "cpu" and not dropout


def _additive(visible: Tensor | None, query: Tensor) -> Tensor:
    """0 where a key is visible, −inf elsewhere: [time, keys] for all, or one a row of the batch."""
    if visible is None:
        time = query.size(2)
        return query.new_full((time, time), float("-inf")).triu(1)
    mask = torch.zeros_like(visible[:, 0], dtype=query.dtype)
    return mask.masked_fill_(~visible[:, 0], float("-inf"))


class _ShortAttention(torch.autograd.Function):
    """On [batch · heads, time, head_dim]."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(query, key, value, mask)
        return torch.bmm(_probabilities(query, key, mask), value)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, mask = ctx.saved_tensors
        p = _probabilities(query, key, mask)
        to_value = torch.bmm(p.transpose(1, 2), gradient)
        to_p = torch.bmm(gradient, value.transpose(1, 2))
        to_scores = torch.ops.aten._softmax_backward_data(to_p, p, -1, p.dtype)
        to_scores *= query.size(-1) ** -0.5
        to_query = torch.bmm(to_scores, key)
        to_key = torch.bmm(to_scores.transpose(1, 2), query)
        return to_query, to_key, to_value, None


def _probabilities(query: Tensor, key: Tensor, mask: Tensor) -> Tensor:
    """Of every pair, [batch · heads, time, keys]; the softmax adds up in fp32."""
    scale = query.size(-1) ** -0.5
    if mask.dim() == 3:
        mask = mask.repeat_interleave(query.size(0) // mask.size(0), 0)
    return torch.baddbmm(mask, query, key.transpose(1, 2), alpha=scale).softmax(-1)
