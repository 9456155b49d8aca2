"""The KV cache of a Hugging Face trunk: rows of any length in columns, as transformers has them."""

from functools import partial
from typing import Any

import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from qvgpt.models.vocab import wide

_ROOM = 64  # columns that a buffer has to spare when it is made
_BUCKET = 32  # columns that a buffer on a CPU grows by
_SLACK = 32  # columns that no row needs any more are cut off once there are so many


class _RoomyLayer(DynamicLayer):
    """Keys and values that grow in place, in buffers with columns to spare.

    With `fp32` they are kept in that: on a CPU `attend_once` is faster with it. One token's
    attention is there handed the whole buffers, of which the mask hides what is empty: memory is
    read at half its speed where columns between two heads are left out (see `KVCache`).
    """

    def __init__(self, fp32: bool):
        super().__init__()
        self.fp32 = fp32
        self._grown: dict[str, tuple[Tensor, Tensor]] = {}  # name → buffer, the part in use

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many columns attention is handed, and which is the first."""
        return self._width(self.get_seq_length() + query_length, query_length), 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add columns; returns all."""
        if self.fp32:
            key_states, value_states = wide(key_states), wide(value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.keys, keys = self._grow("keys", key_states)
        self.values, values = self._grow("values", value_states)
        return keys, values

    def _width(self, used: int, new: int) -> int:
        """Columns to be handed out; of the first ones nobody asks for a mask."""
        return -(-used // _BUCKET) * _BUCKET if self.fp32 and used > new == 1 else used

    def _grow(self, name: str, new: Float[Tensor, "batch heads time dim"]) -> tuple[Tensor, Tensor]:
        """The part in use, and what attention is handed."""
        used = getattr(self, name)
        buffer, known = self._grown.get(name, (None, None))
        start, end = used.size(2), used.size(2) + new.size(2)
        width = self._width(end, new.size(2))
        if buffer is None or used is not known or width > buffer.size(2):
            columns = width if self.fp32 else end + _ROOM
            buffer = new.new_zeros((new.size(0), new.size(1), columns, new.size(3)))
            buffer[:, :, :start] = used
        buffer[:, :, start:end] = new
        self._grown[name] = (buffer, buffer[:, :, :end])
        return self._grown[name][1], buffer[:, :, :width]


class ColumnCache:
    """Keys and values as `transformers` keeps them: a column for every step, whatever a row did.

    A row's real tokens stand side by side and end in the last column, so that columns count as
    positions do, for sliding windows too; what stands before them is masked. A row that was fed
    padding (it idles) must be overwritten before it is read again.
    """

    def __init__(self, mask: Bool[Tensor, "batch columns"], capacity: int, fp32: bool = False):
        self.mask = mask
        self.capacity = capacity
        self.fp32 = fp32
        self.past: Any = DynamicCache()
        self.past.layer_class_to_replicate = partial(_RoomyLayer, fp32)
        self.longest = 0

    @property
    def length(self) -> Int[Tensor, "batch"]:
        """Real tokens of each row."""
        return self.mask.sum(1)

    def clear(self, rows: Int[Tensor, "rows"]) -> None:
        """Let rows begin anew."""
        self.mask[rows] = False

    def trim(self) -> None:
        """Cut off the columns before those that `longest` says are needed."""
        spare = self.mask.size(1) - self.longest
        if spare > _SLACK:
            self._map(lambda x: x[:, :, spare:])
            self.mask = self.mask[:, spare:]

    def select(self, rows: Int[Tensor, "rows"]) -> "ColumnCache":
        """A copy with the given rows, in the given order; a row may be taken more than once."""
        picked = ColumnCache(self.mask[rows], self.capacity, self.fp32)
        for i, layer in enumerate(self._layers()):
            at = rows.to(layer.keys.device)
            picked.past.update(layer.keys[at], layer.values[at], i)
        picked.longest = self.longest
        return picked

    def reorder(self, rows: Int[Tensor, "rows"]) -> None:
        """Let row i be what row `rows[i]` was."""
        self._map(lambda x: x[rows.to(x.device)])
        self.mask = self.mask[rows]

    def insert(self, rows: Int[Tensor, "rows"], other: "ColumnCache") -> None:
        """Overwrite the given rows with those of another cache."""
        width = max(self.mask.size(1), other.mask.size(1))
        theirs = [(x.keys, x.values) for x in other._layers()]
        if not self._layers():
            for i, (keys, values) in enumerate(theirs):
                size = (self.mask.size(0), keys.size(1), 0, keys.size(3))
                self.past.update(keys.new_zeros(size), values.new_zeros(size), i)
        for layer, (keys, values) in zip(self._layers(), theirs, strict=True):
            layer.keys, layer.values = _widen(layer.keys, width), _widen(layer.values, width)
            at = rows.to(keys.device)
            layer.keys[at], layer.values[at] = _widen(keys, width), _widen(values, width)
        self.mask = F.pad(self.mask, (width - self.mask.size(1), 0))
        self.mask[rows] = F.pad(other.mask, (width - other.mask.size(1), 0))
        self.longest = max(self.longest, other.longest)

    def _layers(self) -> list[Any]:
        layers: list[Any] = self.past.layers
        return [layer for layer in layers if layer.is_initialized]

    def _map(self, function: Any) -> None:
        for layer in self._layers():
            layer.keys, layer.values = function(layer.keys), function(layer.values)


def _widen(x: Float[Tensor, "batch heads columns dim"], width: int) -> Tensor:
    """Empty columns before the first."""
    return F.pad(x, (0, 0, width - x.size(2), 0))
