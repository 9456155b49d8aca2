"""One new token a row through the GPT on a CUDA GPU, as a graph: one launch for all its kernels.

A step of a small batch is mostly the cost of launching, some fifteen kernels a layer. What is
computed is `GPT.hidden`; a graph belongs to a cache, whose buffers it reads and writes where they
lie, and to how many slots attention looks at.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from qvgpt.models.gpt import GPT
from qvgpt.models.kv_cache import KVCache


@dataclass(frozen=True)
class Graph:
    """A recorded step: what it reads is put into `tokens` and `mask`."""

    recorded: torch.cuda.CUDAGraph
    tokens: Int[Tensor, "batch 1"]
    mask: Bool[Tensor, "batch 1"]
    hidden: Float[Tensor, "batch 1 embed"]

    @classmethod
    def of(cls, gpt: GPT, cache: KVCache, rows: int) -> "Graph":
        """Records; nothing is read or written yet."""
        device, length, longest = gpt.output_weight.device, cache.length, cache.longest
        tokens = torch.zeros(rows, 1, dtype=torch.long, device=device)
        mask = torch.ones(rows, 1, dtype=torch.bool, device=device)
        recorded = torch.cuda.CUDAGraph()
        try:
            # a server has other threads, which may ask the GPU for something meanwhile
            with torch.cuda.graph(recorded, capture_error_mode="thread_local"):
                hidden = gpt.hidden(tokens, mask, cache=cache)
                length.copy_(cache.length)
        finally:
            cache.length, cache.longest = length, longest
        return cls(recorded, tokens, mask, hidden)


def suits(trunk: object, cache: object) -> bool:
    """Whether a step can be recorded: of our GPT on a GPU, without gradients or dropout."""
    if not isinstance(trunk, GPT) or not isinstance(cache, KVCache):
        return False
    return cache.length.is_cuda and not trunk.training and not torch.is_grad_enabled()


def step(
    gpt: GPT, tokens: Int[Tensor, "batch 1"], mask: Bool[Tensor, "batch 1"] | None, cache: KVCache
) -> Float[Tensor, "batch 1 embed"]:
    """`gpt.hidden`: as it is the first time that so many slots are looked at, then recorded."""
    longest = min(cache.longest + 1, cache.capacity)
    extent = cache.extent_of(longest)
    if extent not in cache.graphs:
        cache.graphs[extent], length = None, cache.length
        hidden = gpt.hidden(tokens, mask, cache=cache)
        cache.length = length.copy_(cache.length)  # which the graphs of other extents write to
        return hidden
    graph = cache.graphs[extent]
    if graph is None:
        graph = cache.graphs[extent] = Graph.of(gpt, cache, len(tokens))
    graph.tokens.copy_(tokens)
    graph.mask.fill_(True) if mask is None else graph.mask.copy_(mask)
    graph.recorded.replay()
    cache.longest = longest
    return graph.hidden.clone()
