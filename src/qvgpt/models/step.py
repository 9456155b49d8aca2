"""One new token a row through the GPT on a CPU, in as few calls as can be.

A step of a small model is mostly the cost of calling: modules, views, casts, one operator after
the other. Here it is eleven operators a layer: bias, GELU and residual belong to the products, keys
and values of a token are stored at once. What it computes is `GPT.hidden`.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from qvgpt.models.blocked import Blocked, affine
from qvgpt.models.gpt import GPT, Attention, Block
from qvgpt.models.kv_cache import KVCache

_KNOWN = (GPT, Attention, Block, nn.Linear, nn.LayerNorm, nn.Embedding, nn.Dropout, nn.ModuleList)


class Step:
    """The weights of a GPT as they lie now; it keeps none of its modules."""

    def __init__(self, gpt: GPT, matrices: Mapping[int, Blocked]):
        """`matrices`: those that are laid out, by the `id` of their layer."""
        self.seq_len, self.embed = gpt.seq_len, (gpt.embed_dim,)
        self.tokens = gpt.token_embedding.weight.detach()
        self.positions = gpt.position_embedding.weight.detach()
        self.norm = _norm(gpt.norm)
        self.blocks = []
        for block in gpt.blocks:
            assert isinstance(block, Block)
            layers = (block.attention.qkv, block.attention.out, block.up, block.down)
            products = (_product(layer, matrices.get(id(layer))) for layer in layers)
            self.blocks.append((_norm(block.norm_1), _norm(block.norm_2), *products))

    @staticmethod
    def suits(gpt: GPT) -> bool:
        """Whether all of it is as this file knows it: on a CPU, of one dtype, nothing hooked in."""
        dtype = gpt.output_weight.dtype
        plain = all(
            type(p) in (Tensor, nn.Parameter) and p.device.type == "cpu" and p.dtype == dtype
            for p in gpt.parameters()
        )
        own = all(
            type(m) in _KNOWN and not m._forward_hooks and not m._forward_pre_hooks
            and "forward" not in vars(m)
            for m in gpt.modules()
        )  # fmt: skip
        return plain and own and dtype in (torch.float32, torch.bfloat16)

    def __call__(
        self,
        tokens: Int[Tensor, "batch 1"],
        mask: Bool[Tensor, "batch 1"] | None,
        cache: KVCache,
    ) -> Float[Tensor, "batch 1 embed"]:
        """Hidden states after the last norm, like `GPT.hidden`; the cache grows by the tokens."""
        batch, layer_norm, embed = len(tokens), F.layer_norm, self.embed
        slot = cache.length  # of a row that idles too: what it leaves there is written over
        cache.grow(1)
        cells, seen, layers = cache.for_one(slot)
        at = slot.clamp(max=self.seq_len - 1)
        x = F.embedding(tokens[:, 0], self.tokens) + F.embedding(at, self.positions)
        short = x.dtype != seen.dtype
        heads, head_dim = cache.kv[0].size(2), cache.kv[0].size(4)
        scale = head_dim**-0.5
        for (norm_1, norm_2, qkv, out, up, down), (keys, values, written) in zip(
            self.blocks, layers, strict=True
        ):
            found = qkv(layer_norm(x, embed, *norm_1))
            if short:
                found = found.to(seen.dtype)
            found = found.view(batch, 3, heads, head_dim)
            written.index_copy_(0, cells, found[:, 1:].reshape(-1, head_dim))
            query = found[:, 0].reshape(-1, 1, head_dim)
            probability = torch.baddbmm(seen, query, keys, alpha=scale).softmax(-1)
            attended = torch.bmm(probability, values).view(batch, -1)
            x = out(attended.to(x.dtype) if short else attended, onto=x)
            x = down(up(layer_norm(x, embed, *norm_2), gelu=True), onto=x)
        cache.length = cache.length + (1 if mask is None else mask[:, 0])
        return layer_norm(x, embed, *self.norm)[:, None]


def _norm(norm: nn.LayerNorm) -> tuple[Tensor, Tensor, float]:
    return norm.weight.detach(), norm.bias.detach(), norm.eps


def _product(layer: nn.Linear, matrix: Blocked | None) -> Any:
    bias = layer.bias.detach()
    if matrix is None:
        return partial(affine, weight=layer.weight.detach(), bias=bias)
    return partial(matrix, bias=bias)
