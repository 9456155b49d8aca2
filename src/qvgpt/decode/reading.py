"""Texts side by side, as one or more language models have read them, each with its own KV cache.

reading = Reading.of([model.trunk, values.trunk], prompts, capacity=64)
states = reading.read(last_tokens, mask)      # one more token of every text
states.of(values.trunk)                       # [rows, embed]
states.after(values.trunk, candidates)        # [rows, candidates, embed]: the cache is forked
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from qvgpt.models.backbone import Cache
from qvgpt.models.laid_out import read

_FORKED_ROWS = 512  # rows of a forked cache at a time: each is a copy of its text's keys and values

Texts = Callable[[], list[list[int]]]
"""The tokens of each text so far, for those who ask."""


class Reading:
    """A cache for each trunk, whose rows are the same texts. Used as a `Cache` is."""

    def __init__(self, trunks: Sequence[Any], caches: Sequence[Cache], counts: list[int]):
        self.trunks, self.caches = tuple(trunks), list(caches)
        self.counts = counts
        """Tokens that each trunk has read, candidates included; whoever forks a reading goes on
        with the same list."""

    @classmethod
    def new(
        cls, trunks: Sequence[Any], batch: int, capacity: int, counts: list[int] | None = None
    ) -> "Reading":
        """Room for `batch` texts of at most `capacity` tokens."""
        caches = [trunk.new_cache(batch, capacity) for trunk in trunks]
        return cls(trunks, caches, [0] * len(caches) if counts is None else counts)

    @classmethod
    def of(
        cls,
        trunks: Sequence[Any],
        prompts: Sequence[Sequence[int]],
        capacity: int,
        counts: list[int] | None = None,
    ) -> "Reading":
        """The prompts read, with room for `capacity` tokens a row."""
        reading = cls.new(trunks, len(prompts), capacity, counts)
        longest = max(map(len, prompts))
        if longest:
            tokens = torch.zeros(len(prompts), longest, dtype=torch.long)
            mask = torch.zeros(len(prompts), longest, dtype=torch.bool)
            for i, prompt in enumerate(prompts):
                tokens[i, : len(prompt)] = torch.tensor(prompt, dtype=torch.long)
                mask[i, : len(prompt)] = True
            reading._feed(tokens, mask, sum(map(len, prompts)))
        return reading

    @property
    def capacity(self) -> int:
        """How many tokens a row can hold."""
        return min(cache.capacity for cache in self.caches)

    def expect(self, longest: int) -> None:
        """No row holds more than `longest` tokens any more."""
        for cache in self.caches:
            cache.longest = longest

    def read(
        self,
        tokens: Int[Tensor, "rows"],
        real: Bool[Tensor, "rows"] | None = None,
        texts: Texts | None = None,
    ) -> "States":
        """One more token of every row that is `real` (None: all); the others idle."""
        count = len(tokens) if real is None else int(real.sum())
        hidden = self._feed(tokens[:, None], None if real is None else real[:, None], count)
        return States(self, tuple(h[:, 0] for h in hidden), None, texts)

    def _feed(
        self, tokens: Int[Tensor, "rows time"], mask: Bool[Tensor, "rows time"] | None, count: int
    ) -> list[Tensor]:
        hidden = []
        for i, (trunk, cache) in enumerate(zip(self.trunks, self.caches, strict=True)):
            device = trunk.output_weight.device
            seen = None if mask is None else mask.to(device)
            hidden.append(read(trunk, tokens.to(device), seen, cache))
            self.counts[i] += count
        return hidden

    def clear(self, rows: Int[Tensor, "rows"]) -> None:
        """Let rows begin anew."""
        for cache in self.caches:
            cache.clear(_beside(cache, rows))

    def select(self, rows: Int[Tensor, "rows"]) -> "Reading":
        """A copy with the given rows, in the given order; a row may be taken more than once."""
        picked = [cache.select(_beside(cache, rows)) for cache in self.caches]
        return Reading(self.trunks, picked, self.counts)

    def reorder(self, rows: Int[Tensor, "rows"]) -> None:
        """Let row i be what row `rows[i]` was, in place; at most as many rows as there were."""
        for cache in self.caches:
            cache.reorder(_beside(cache, rows))

    def insert(self, rows: Int[Tensor, "rows"], other: "Reading") -> None:
        """Overwrite the given rows with those of another reading of the same trunks."""
        for mine, theirs in zip(self.caches, other.caches, strict=True):
            mine.insert(_beside(mine, rows), theirs)


def _beside(cache: Cache, rows: Tensor) -> Tensor:
    return rows.to(cache.length.device)


@dataclass(frozen=True)
class States:
    """Texts that wait for their next token, as every trunk has read them."""

    reading: Reading
    hidden: tuple[Tensor, ...]
    """[rows, embed] of each trunk."""
    rows: Int[Tensor, "rows"] | None = None
    """The rows of the reading that these are; None: all."""
    read_texts: Texts | None = None

    def __len__(self) -> int:
        return len(self.hidden[0])

    @property
    def texts(self) -> list[list[int]]:
        """The tokens of each text so far, prompt and what was written."""
        assert self.read_texts is not None
        every = self.read_texts()
        return every if self.rows is None else [every[i] for i in self.rows.tolist()]

    def take(self, rows: Sequence[int]) -> "States":
        """Some of them, by their place in the reading."""
        at = torch.tensor(rows, dtype=torch.long)
        return replace(self, hidden=tuple(h[at.to(h.device)] for h in self.hidden), rows=at)

    def of(self, trunk: Any) -> Float[Tensor, "rows embed"]:
        """Hidden states as one of the trunks sees them."""
        return self.hidden[self._index(trunk)]

    def after(
        self, trunk: Any, tokens: Int[Tensor, "rows candidates"]
    ) -> Float[Tensor, "rows candidates embed"]:
        """Hidden states of one of the trunks after each candidate, read on forks of its cache.

        Costs one token read for each candidate; the cache stays as it is.
        """
        i, (rows, each) = self._index(trunk), tokens.shape
        cache, found = self.reading.caches[i], []
        at = torch.arange(rows) if self.rows is None else self.rows
        tokens = tokens.to(trunk.output_weight.device)
        size = max(1, _FORKED_ROWS // each)
        for part, texts in zip(tokens.split(size), at.split(size), strict=True):
            forked = cache.select(_beside(cache, texts.repeat_interleave(each)))
            found.append(read(trunk, part.reshape(-1, 1), None, forked)[:, 0])
        self.reading.counts[i] += rows * each
        return torch.cat(found).unflatten(0, (rows, each))

    def _index(self, trunk: Any) -> int:
        return next(i for i, other in enumerate(self.reading.trunks) if other is trunk)
