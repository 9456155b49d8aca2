"""The KV cache of the GPT: one static buffer a layer, and attention of one new token over it."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from qvgpt.models.attention import attend_once

BUCKET = 32
"""Attention over the cache is cut to a multiple of this many slots."""


class KVCache:
    """Keys and values of the tokens read so far, one static buffer a layer.

    Slot i of a row holds that row's i-th real token: padding, left or right, is never stored,
    so rows of any length sit in one batch and slot = position. One slot more than `capacity`
    takes what padding would write. On a CPU they are kept in fp32, whatever the weights are: what
    one token does with them is faster there, in bf16 up to eight times (benchmarks/decode.py).
    """

    def __init__(self, keys: list[Tensor], values: list[Tensor], length: Int[Tensor, "batch"]):
        self.keys = keys  # per layer [batch, heads, capacity+1, head_dim]
        self.values = values
        self.length = length
        self.longest = 0  # an upper bound of `length`, kept on the host to spare a device sync

    @classmethod
    def new(
        cls, like: Tensor, layers: int, batch: int, heads: int, capacity: int, head_dim: int
    ) -> "KVCache":
        """An empty one, on the device of `like`; there is room for whole buckets."""
        capacity = -(-capacity // BUCKET) * BUCKET
        dtype = like.dtype
        if like.device.type == "cpu":
            dtype = torch.promote_types(dtype, torch.float32)
        size = (batch, heads, capacity + 1, head_dim)
        keys, values = (
            [like.new_zeros(size, dtype=dtype) for _ in range(layers)] for _ in range(2)
        )
        return cls(keys, values, torch.zeros(batch, dtype=torch.long, device=like.device))

    @property
    def capacity(self) -> int:
        """How many tokens a row can hold."""
        return self.keys[0].size(2) - 1

    def slots(self, mask: Bool[Tensor, "batch time"]) -> Int[Tensor, "batch time"]:
        """Where the next tokens go; the last slot for padding."""
        slot = self.length[:, None] + mask.cumsum(1) - 1
        return slot.where(mask, self.capacity)

    def write(
        self,
        layer: int,
        slot: Int[Tensor, "batch time"],
        key: Float[Tensor, "batch time heads head_dim"],
        value: Float[Tensor, "batch time heads head_dim"],
    ) -> None:
        """Store the keys and values of new tokens."""
        row = torch.arange(slot.size(0), device=slot.device)[:, None]
        self.keys[layer][row, :, slot] = key.to(self.keys[layer].dtype)
        self.values[layer][row, :, slot] = value.to(self.values[layer].dtype)

    def visible(self, slot: Int[Tensor, "batch time"]) -> Tensor:
        """What `attend` is told: each token sees the slots up to its own.

        For one token a row, on a CPU, added to scores [batch · heads, 1, slots]; else a boolean
        mask [batch, 1, time, slots].
        """
        extent = min(-(-self.longest // BUCKET) * BUCKET, self.capacity)
        seen = (torch.arange(extent, device=slot.device) <= slot[:, :, None])[:, None]
        if slot.size(1) > 1 or slot.device.type != "cpu":
            return seen
        added = self.keys[0].new_zeros(seen.shape).masked_fill_(~seen, float("-inf"))
        return added.expand(-1, self.keys[0].size(1), -1, -1).flatten(0, 1)

    def attend(
        self, layer: int, query: Float[Tensor, "batch time heads head_dim"], visible: Tensor
    ) -> Float[Tensor, "batch time heads head_dim"]:
        """softmax(query · keyᵀ / √head_dim) · value over the `visible` slots."""
        key, value = (x[layer][:, :, : visible.size(-1)] for x in (self.keys, self.values))
        query = query.transpose(1, 2)
        if visible.dim() == 4:
            key, value = key.to(query.dtype), value.to(query.dtype)
            return F.scaled_dot_product_attention(query, key, value, visible).transpose(1, 2)
        return attend_once(query, key, value, visible, query.size(-1) ** -0.5).transpose(1, 2)

    def clear(self, rows: Int[Tensor, "rows"]) -> None:
        """Let rows begin anew."""
        self.length[rows] = 0

    def select(self, rows: Int[Tensor, "rows"]) -> "KVCache":
        """A copy with the given rows, in the given order; a row may be taken more than once."""
        cut = min(self.longest, self.capacity)
        picked = KVCache(
            [_pick(k, rows, cut) for k in self.keys],
            [_pick(v, rows, cut) for v in self.values],
            self.length[rows],
        )
        picked.longest = self.longest
        return picked

    def reorder(self, rows: Int[Tensor, "rows"]) -> None:
        """Let row i be what row `rows[i]` was, in place; at most as many rows as there were."""
        cut = min(self.longest, self.capacity)
        for buffers in (self.keys, self.values):
            for layer, buffer in enumerate(buffers):
                buffer[: len(rows), :, :cut] = buffer[rows, :, :cut]
                buffers[layer] = buffer[: len(rows)]
        self.length = self.length[rows]

    def insert(self, rows: Int[Tensor, "rows"], other: "KVCache") -> None:
        """Overwrite the given rows with those of another cache of no larger capacity."""
        cut = min(other.longest, self.capacity)
        for mine, theirs in zip(self.keys + self.values, other.keys + other.values, strict=True):
            mine[rows, :, :cut] = theirs[:, :, :cut]
        self.length[rows] = other.length
        self.longest = max(self.longest, other.longest)


def _pick(buffer: Tensor, rows: Tensor, cut: int) -> Tensor:
    picked = buffer.new_zeros((len(rows), *buffer.shape[1:]))
    picked[:, :, :cut] = buffer[rows, :, :cut]
    return picked
