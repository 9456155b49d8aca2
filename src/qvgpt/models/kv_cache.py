"""The KV cache of the GPT: one buffer a layer."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

BUCKET = 32
"""Attention over the cache is cut to a multiple of this many slots."""

_Layer = tuple[Tensor, Tensor, Tensor]


class KVCache:
    """Keys and values of the tokens read so far, one buffer a layer.

    Slot i of a row holds that row's i-th real token: padding, left or right, is never stored,
    so rows of any length sit in one batch and slot = position. The last slot of a buffer takes
    what padding would write. On a CPU they are kept in fp32, whatever the weights are: what
    one token does with them is faster there, in bf16 up to eight times (benchmarks/decode.py).

    There the buffers also grow by a bucket at a time: a slot or more that nobody looks at, between
    one row's keys and the next one's, halves the speed they are read at, which is why a buffer has
    no room to spare. A GPU's are as large as they may ever be, for graphs of steps to lie still.
    """

    def __init__(self, kv: list[Tensor], length: Int[Tensor, "batch"], capacity: int | None = None):
        self.kv = kv  # per layer [keys and values, batch, heads, room + 1, head_dim]
        self.length = length
        self.capacity = self.room if capacity is None else capacity
        """How many tokens a row may hold."""
        self.longest = 0  # an upper bound of `length`, kept on the host to spare a device sync
        self.graphs: dict[int, Any] = {}
        """A step on a GPU (`graph.py`), by how many slots are looked at."""
        self._of_one: tuple[int, Tensor, Tensor, list[_Layer]] | None = None

    @classmethod
    def new(
        cls, like: Tensor, layers: int, batch: int, heads: int, capacity: int, head_dim: int
    ) -> "KVCache":
        """An empty one, on the device of `like`; there is room for whole buckets."""
        capacity = -(-capacity // BUCKET) * BUCKET
        dtype = like.dtype
        if like.device.type == "cpu":
            dtype = torch.promote_types(dtype, torch.float32)
        kv = [like.new_zeros((2, batch, heads, 1, head_dim), dtype=dtype) for _ in range(layers)]
        cache = cls(kv, torch.zeros(batch, dtype=torch.long, device=like.device), capacity)
        cache.grow(0)
        return cache

    @property
    def room(self) -> int:
        """How many tokens of a row the buffers have slots for."""
        return self.kv[0].size(3) - 1

    def grow(self, tokens: int) -> None:
        """Every row may become so many tokens longer: there is room for them then."""
        self.longest = min(self.longest + tokens, self.capacity)
        more = self._needed - self.room
        if more > 0:
            self._of_one = None
            for layer, buffer in enumerate(self.kv):
                self.kv[layer] = F.pad(buffer, (0, 0, 0, more))

    @property
    def _needed(self) -> int:
        return self.extent if self.length.device.type == "cpu" else self.capacity

    @property
    def extent(self) -> int:
        """How many slots attention has to look at: whole buckets."""
        return self.extent_of(self.longest)

    def extent_of(self, longest: int) -> int:
        """The same, were the longest row so long."""
        return min(-(-longest // BUCKET) * BUCKET, self.capacity)

    def slots(self, mask: Bool[Tensor, "batch time"]) -> Int[Tensor, "batch time"]:
        """Where the next tokens go; the last slot for padding."""
        slot = self.length[:, None] + mask.cumsum(1) - 1
        return slot.where(mask, self.room)

    def write(
        self,
        layer: int,
        slot: Int[Tensor, "batch time"],
        key: Float[Tensor, "batch time heads head_dim"],
        value: Float[Tensor, "batch time heads head_dim"],
    ) -> None:
        """Store the keys and values of new tokens."""
        row = torch.arange(slot.size(0), device=slot.device)[:, None]
        for place, new in enumerate((key, value)):
            self.kv[layer][place, row, :, slot] = new.to(self.kv[layer].dtype)

    def visible(self, slot: Int[Tensor, "batch time"]) -> Bool[Tensor, "batch 1 time slots"]:
        """Each token sees the slots up to its own."""
        return (torch.arange(self.extent, device=slot.device) <= slot[:, :, None])[:, None]

    def attend(
        self,
        layer: int,
        query: Float[Tensor, "batch time heads head_dim"],
        visible: Bool[Tensor, "batch 1 time slots"],
    ) -> Float[Tensor, "batch time heads head_dim"]:
        """softmax(query · keyᵀ / √head_dim) · value over the `visible` slots."""
        key, value = self.kv[layer][:, :, :, : visible.size(-1)].to(query.dtype)
        query = query.transpose(1, 2)
        return F.scaled_dot_product_attention(query, key, value, visible).transpose(1, 2)

    def for_one(
        self, slot: Int[Tensor, "batch"]
    ) -> tuple[
        Int[Tensor, "batch_kv_heads"],
        Float[Tensor, "batch_heads 1 slots"],
        list[_Layer],
    ]:
        """What one new token a row needs (`step.py`), all of it views of the buffers.

        Where its keys and values go, what is added to its scores (0, or −inf where a slot is not
        to be seen); and a layer's keys [batch · heads, head_dim, slots], values [batch · heads,
        slots, head_dim], and cells [2 · batch · heads · (room + 1), head_dim].
        """
        extent, (_, batch, heads, slots, head_dim) = self.extent, self.kv[0].shape
        slot = slot.clamp(max=slots - 1)  # rows that idle may say more
        if self._of_one is None or self._of_one[0] != extent:
            row = torch.arange(batch * heads).view(batch, 1, heads)
            first = (row + torch.tensor([[0], [batch * heads]])) * slots
            flat = [x.view(2, -1, slots, head_dim) for x in self.kv]
            layers = [
                (x[0, :, :extent].transpose(1, 2), x[1, :, :extent], x.view(-1, head_dim))
                for x in flat
            ]
            self._of_one = extent, first, torch.arange(extent), layers
        _, first, every, layers = self._of_one
        seen = torch.where(every <= slot[:, None], 0.0, float("-inf"))
        cells = (first + slot[:, None, None]).view(-1)
        return cells, seen.repeat_interleave(heads, 0)[:, None], layers

    def clear(self, rows: Int[Tensor, "rows"]) -> None:
        """Let rows begin anew."""
        self.length[rows] = 0

    def select(self, rows: Int[Tensor, "rows"]) -> "KVCache":
        """A copy with the given rows, in the given order; a row may be taken more than once."""
        cut, room = min(self.longest, self.capacity), self._needed
        kv = [_pick(x, rows, cut, room) for x in self.kv]
        length = self.length[rows].clamp(max=room)  # rows that idle may say more than `longest`
        picked = KVCache(kv, length, self.capacity)
        picked.longest = self.longest
        return picked

    def reorder(self, rows: Int[Tensor, "rows"]) -> None:
        """Let row i be what row `rows[i]` was, in place; at most as many rows as there were."""
        cut = min(self.longest, self.capacity)
        for layer, buffer in enumerate(self.kv):
            buffer[:, : len(rows), :, :cut] = buffer[:, rows, :, :cut]
            self.kv[layer] = buffer[:, : len(rows)].contiguous()
        if len(rows) < len(self.length):
            self._of_one = None
        self.graphs.clear()  # of the buffers that were
        self.length = self.length[rows]

    def insert(self, rows: Int[Tensor, "rows"], other: "KVCache") -> None:
        """Overwrite the given rows with those of another cache of no larger capacity."""
        self.longest = max(self.longest, other.longest)
        self.grow(0)
        cut = min(other.longest, self.capacity)
        for mine, theirs in zip(self.kv, other.kv, strict=True):
            mine[:, rows, :, :cut] = theirs[:, :, :, :cut]
        self.length[rows] = other.length


def _pick(buffer: Tensor, rows: Tensor, cut: int, room: int) -> Tensor:
    two, _, heads, _, head_dim = buffer.shape
    picked = buffer.new_zeros((two, len(rows), heads, room + 1, head_dim))
    picked[:, :, :, :cut] = buffer[:, rows, :, :cut]
    return picked
