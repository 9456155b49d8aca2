"""One new token a row through the GPT and its value heads on a CPU, in as few calls as can be.

A step of a small model is mostly the cost of calling: modules, views, casts, one operator after
the other. With few rows it is one call of what was compiled (`native.py`), with more six a layer,
since oneDNN multiplies many rows faster; where nothing could be compiled it is eleven operators of
torch: bias, GELU and residual belong to the products, keys and values of a token are stored at
once. What it computes is `GPT.hidden`, and `of_many` of slow heads.
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
from qvgpt.models.dropout import Dropout
from qvgpt.models.gpt import GPT, Attention, Block
from qvgpt.models.heads import QHead, ReturnHead, StateHead, ValueHeads
from qvgpt.models.kv_cache import KVCache
from qvgpt.models.native import HeadWeights, Native, NativeStep, NativeValues

_KNOWN = (GPT, Attention, Block, nn.Linear, nn.LayerNorm, nn.Embedding, Dropout, nn.ModuleList)
_OF_HEADS = (QHead, ReturnHead, StateHead, nn.Linear, nn.ReLU, nn.Sequential, nn.ModuleList)


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
        return dtype in (torch.float32, torch.bfloat16) and _plain(gpt, _KNOWN, dtype)

    def __call__(
        self,
        tokens: Int[Tensor, "batch 1"],
        mask: Bool[Tensor, "batch 1"] | None,
        cache: KVCache,
    ) -> Float[Tensor, "batch 1 embed"]:
        """Hidden states after the last norm, like `GPT.hidden`; the cache grows by the tokens."""
        cache.grow(1)
        if self.whole is not None and native.few(len(tokens), self.whole.embed):
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
        shape = (batch, 3, heads, head_dim)
        return lambda qkv, layer: _attend(qkv.view(shape), layers[layer], cells, seen).to(dtype)


def _attend(
    qkv: Float[Tensor, "batch 3 heads head_dim"],
    layer: tuple[Tensor, Tensor, Tensor],
    cells: Int[Tensor, "cells"],
    seen: Float[Tensor, "rows 1 capacity"],
) -> Float[Tensor, "batch embed"]:
    """One token a row by products; `layer`: a layer's keys, values and where both are written."""
    keys, values, written = layer
    qkv, head_dim = qkv.to(seen.dtype), qkv.size(-1)
    written.index_copy_(0, cells, qkv[:, 1:].reshape(-1, head_dim))
    query = qkv[:, 0].reshape(-1, 1, head_dim)
    probability = torch.baddbmm(seen, query, keys, alpha=head_dim**-0.5).softmax(-1)
    return torch.bmm(probability, values).view(len(qkv), -1)


class HeadsStep:
    """The slow heads' Q of a few candidates a row, where it is one call; it keeps no module."""

    def __init__(self, heads: ValueHeads, compiled: Native, stored: Mapping[int, Tensor]):
        """`stored`: weights of hidden layers in the dtype of `compiled`, by the `id` of a layer."""
        dtype = compiled.dtype

        def hidden(layer: Any) -> tuple[Tensor, Tensor | None]:
            weight = stored.get(id(layer), layer.weight).detach()
            return weight.to(dtype), None if layer.bias is None else layer.bias.detach().to(dtype)

        def weights(head: Any) -> HeadWeights:
            *before, last = head.baseline.layers
            project = hidden(head.project) if hasattr(head, "project") else None
            base = hidden(before[0]) if before else None
            rest = last.weight, last.bias, head.weight, head.mean_weight()
            return HeadWeights(project, base, *rest)

        found, support = [weights(head) for head in heads.target_q], heads.config.support
        centres = None if support is None else support.centres(found[0].weight)
        relu = heads.config.kind == "mlp"
        self.embed = heads.shape[1]
        self._values = NativeValues(compiled, found, self.embed, relu, centres)

    @classmethod
    def of(
        cls, heads: ValueHeads, dtype: torch.dtype, stored: Mapping[int, Tensor]
    ) -> "HeadsStep | None":
        """None where nothing could be compiled for hidden layers of this dtype."""
        compiled = native.of(dtype)
        return None if compiled is None else cls(heads, compiled, stored)

    @staticmethod
    def suits(heads: ValueHeads) -> bool:
        """Whether all of it is as this file knows it, and its sizes are of whole vectors."""
        slow: list[Any] = [*heads.target_q]
        weights = [w for head in slow for w in (head.weight, head.baseline.layers[-1].weight)]
        plain = _plain(heads.target_q, _OF_HEADS, torch.float32)
        return plain and NativeValues.suits(heads.shape[1], weights)

    def __call__(
        self,
        hidden: Float[Tensor, "rows embed"],
        tokens: Int[Tensor, "rows candidates"],
        least: bool,
        relative: bool,
    ) -> Float[Tensor, "rows candidates"] | None:
        """The heads' mean or (`least`) the least, in the units they were learned in; `relative`: up
        to a number a row. None of so many rows that torch is the faster one."""
        if not native.few(len(hidden), self.embed):
            return None
        return self._values(hidden.float(), tokens, least, relative)


def _plain(module: nn.Module, known: tuple[type, ...], dtype: torch.dtype) -> bool:
    """Whether it is of known modules that nothing is hooked into, on a CPU, of one dtype."""
    own = all(
        type(m) in known and not m._forward_hooks and not m._forward_pre_hooks
        and "forward" not in vars(m)
        for m in module.modules()
    )  # fmt: skip
    return own and all(
        type(p) in (Tensor, nn.Parameter) and p.device.type == "cpu" and p.dtype == dtype
        for p in module.parameters()
    )


def _norm(norm: nn.LayerNorm) -> tuple[Tensor, Tensor, float]:
    return norm.weight.detach(), norm.bias.detach(), norm.eps


def _product(layer: nn.Linear, matrix: Blocked | None) -> Any:
    bias = layer.bias.detach()
    if matrix is None:
        return partial(affine, weight=layer.weight.detach(), bias=bias)
    return partial(matrix, bias=bias)
