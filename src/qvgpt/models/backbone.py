"""What a trunk must offer to carry value heads."""

from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from qvgpt.models.dtype import Dtype as Dtype


@runtime_checkable
class Cache(Protocol):
    """Keys and values of the tokens read so far, for a batch of rows."""

    longest: int

    @property
    def length(self) -> Int[Tensor, "batch"]: ...  # noqa: D102

    @property
    def capacity(self) -> int: ...  # noqa: D102

    def clear(self, rows: Int[Tensor, "rows"]) -> None: ...  # noqa: D102

    def select(self, rows: Int[Tensor, "rows"]) -> "Cache": ...  # noqa: D102

    def reorder(self, rows: Int[Tensor, "rows"]) -> None: ...  # noqa: D102

    def insert(self, rows: Int[Tensor, "rows"], other: Any) -> None: ...  # noqa: D102


@runtime_checkable
class Backbone(Protocol):
    """A causal language model seen as hidden states and an output matrix: `GPT`, `CausalLM`."""

    embed_dim: int
    vocab_size: int
    seq_len: int
    softcap: float | None
    """c where logits are c·tanh(hidden @ output_weight.T / c), as Gemma 2 caps them."""
    lora: Any
    """The `LoraConfig` of adapters that are trained in the place of the trunk, or None."""

    @property
    def output_weight(self) -> Float[Tensor, "vocab embed"]:
        """The LM head's matrix."""
        ...

    def hidden(
        self,
        tokens: Int[Tensor, "batch time"],
        mask: Bool[Tensor, "batch time"] | None = None,
        positions: Int[Tensor, "batch time"] | None = None,
        cache: Any = None,
    ) -> Float[Tensor, "batch time embed"]:
        """States after the last norm: logits = hidden @ output_weight.T (see `softcap`).

        `mask` is False on padding, left or right (None: no padding, or right padding whose output
        nobody reads). `positions` count the real tokens unless given; given without a mask, each
        that is not one more than the one before it begins another text, which sees only itself,
        and one that begins at p > 0 the first p tokens of the last that began at 0.
        With a `cache` the tokens continue what it holds, and it grows by the real ones.
        """
        ...

    @property
    def blocks(self) -> Iterable[nn.Module]:
        """The layers: what is compiled, recomputed or sharded one by one."""
        ...

    def with_head(self, weight: Float[Tensor, "vocab embed"]) -> "Backbone":
        """A copy whose LM head is `weight`, untied from the token embedding."""
        ...

    def set_dropout(self, rate: float) -> None:
        """Drop another share of activations while training."""
        ...

    def set_gradient_checkpointing(self, on: bool) -> None:
        """Keep a layer's input alone while training; the backward pass computes the rest anew."""
        ...

    def new_cache(self, batch: int, capacity: int) -> Cache:
        """An empty cache for `batch` rows of at most `capacity` tokens."""
        ...


def as_module(backbone: Any) -> nn.Module:
    """A backbone is always a torch module too; protocols cannot say so."""
    assert isinstance(backbone, nn.Module)
    return backbone
