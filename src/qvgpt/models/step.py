"""One new token a row through the GPT on a CPU, in as few calls as can be.

A step of a small model is mostly the cost of calling: modules, views, casts, one operator after
the other. With few rows it is one call of what was compiled (`native.py`), with more six a layer,
since oneDNN multiplies many rows faster; where nothing could be compiled it is eleven operators of
torch: bias, GELU and residual belong to the products, keys and values of a token are stored at
once. What it computes is `GPT.hidden`.
"""

from collections.abc import Callable, Mapping
from functools import partial
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from qvgpt.models import native
from qvgpt.models.blocked import Blocked, affine
from qvgpt.models.gpt import GPT, Attention, Block
from qvgpt.models.kv_cache import KVCache
from qvgpt.models.native import NativeStep

_KNOWN = (GPT, Attention, Block, nn.Linear, nn.LayerNorm, nn.Embedding, nn.Dropout, nn.ModuleList)


class Step:
    """The weights of a GPT as they lie now; it keeps none of its modules."""

    def __init__(self, gpt: GPT, matrices: Mapping[int, Blocked]):
        """`matrices`: those that are laid out, by the `id` of their layer."""
        self.seq_len, self.embed = gpt.seq_len, (gpt.embed_dim,)
        self.tokens = gpt.token_embedding.weight.detach()
        self.positions = gpt.position_embedding.weight.detach()
        self.norm = _norm(gpt.norm)
        self.blocks, weights = [], []
        for block in gpt.blocks:
            assert isinstance(block, Block)
            layers = (block.attention.qkv, block.attention.out, block.up, block.down)
            products = (_product(layer, matrices.get(id(layer))) for layer in layers)
            norms = _norm(block.norm_1), _norm(block.norm_2)
            self.blocks.append((*norms, *products))
            weights.append([w for norm in norms for w in norm[:2]])
            weights[-1] += [w.detach() for x in layers for w in (x.weight, x.bias)]
        every = [self.tokens, self.positions, *self.norm[:2], *chain.from_iterable(weights)]
        compiled = native.of(self.tokens.dtype)
        fits = NativeStep.suits(gpt.embed_dim, gpt.embed_dim // gpt.num_heads, every)
        self.compiled = compiled if fits else None
        self.whole: NativeStep | None = None
        if self.compiled is not None:
            embedded = self.tokens, self.positions
            self.whole = NativeStep(self.compiled, *embedded, self.norm, weights, gpt.num_heads)

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
        cache.grow(1)
        if self.whole is not None and self.whole.few(len(tokens)):
            found = self.whole(tokens, cache)
        else:
            found = self._by_products(tokens, cache)
        cache.length = cache.length + (1 if mask is None else mask[:, 0])
        return found[:, None]

    def _by_products(
        self, tokens: Int[Tensor, "batch 1"], cache: KVCache
    ) -> Float[Tensor, "batch embed"]:
        layer_norm, embed = F.layer_norm, self.embed
        slot = cache.length  # of a row that idles too: what it leaves there is written over
        at = slot.clamp(max=self.seq_len - 1)
        x = F.embedding(tokens[:, 0], self.tokens) + F.embedding(at, self.positions)
        attend = self._attention(cache, x.dtype)
        for layer, (norm_1, norm_2, qkv, out, up, down) in enumerate(self.blocks):
            x = out(attend(qkv(layer_norm(x, embed, *norm_1)), layer), onto=x)
            x = down(up(layer_norm(x, embed, *norm_2), gelu=True), onto=x)
        return layer_norm(x, embed, *self.norm)

    def _attention(self, cache: KVCache, dtype: torch.dtype) -> Callable[[Tensor, int], Tensor]:
        """(queries, keys and values of the new tokens, layer) → what is found; they are stored."""
        if (compiled := self.compiled) is not None:
            return lambda qkv, layer: compiled.attend(qkv, cache.kv[layer], cache.length)
        cells, seen, layers = cache.for_one(cache.length)
        _, batch, heads, _, head_dim = cache.kv[0].shape
        scale = head_dim**-0.5

        def attend(qkv: Tensor, layer: int) -> Tensor:
            keys, values, written = layers[layer]
            qkv = qkv.to(seen.dtype).view(batch, 3, heads, head_dim)
            written.index_copy_(0, cells, qkv[:, 1:].reshape(-1, head_dim))
            query = qkv[:, 0].reshape(-1, 1, head_dim)
            probability = torch.baddbmm(seen, query, keys, alpha=scale).softmax(-1)
            return torch.bmm(probability, values).view(batch, -1).to(dtype)

        return attend


def _norm(norm: nn.LayerNorm) -> tuple[Tensor, Tensor, float]:
    return norm.weight.detach(), norm.bias.detach(), norm.eps


def _product(layer: nn.Linear, matrix: Blocked | None) -> Any:
    bias = layer.bias.detach()
    if matrix is None:
        return partial(affine, weight=layer.weight.detach(), bias=bias)
    return partial(matrix, bias=bias)
