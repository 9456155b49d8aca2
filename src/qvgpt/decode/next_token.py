"""What may come next, and how likely: sampled from by one number in [0, 1)."""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qvgpt.models import native

_BLOCK = 256  # tokens whose probabilities are added up first


@dataclass(frozen=True)
class NextToken:
    """The distribution of the next token over its candidates, for a batch of states."""

    tokens: Int[Tensor, "rows candidates"]
    logits: Float[Tensor, "rows candidates"]
    """What is sampled from, up to a number per row: guided, truncated, tempered; −inf where cut."""
    base_logits: Float[Tensor, "rows vocab"]
    """Of the whole vocabulary. Guided already on the folded path."""
    beta: Float[Tensor, "rows"] | None = None
    """β of each row, where it is not the guidance's one for all."""
    spent: Float[Tensor, "rows"] | None = None
    """What each row takes of a `kl_budget`: KL over the candidates, both at temperature 1."""

    @cached_property
    def logprob(self) -> Float[Tensor, "rows candidates"]:
        """log π, normalised."""
        return self.logits.log_softmax(-1)

    @cached_property
    def base_logprob(self) -> Float[Tensor, "rows candidates"]:
        """log π₀ of the candidates, over the whole vocabulary at temperature 1. Meaningless on the
        folded path."""
        every = self.base_logits.log_softmax(-1)
        return every if every.shape == self.tokens.shape else every.gather(1, self.tokens)

    def sample(
        self, uniform: Float[Tensor, "rows"]
    ) -> tuple[Int[Tensor, "rows"], Int[Tensor, "rows"]]:
        """One token per row from one number in [0, 1) per row; also its place among candidates."""
        level = uniform.double()[:, None]
        compiled = native.of(torch.float32) if native.reads(self.logits) else None
        if compiled is not None:
            place = compiled.sample(self.logits, level)
        else:
            place = _place(self.logits.softmax(-1), level)
        return self.tokens.gather(1, place)[:, 0], place[:, 0]

    def kl(
        self, base_logprob: Float[Tensor, "rows candidates"] | None = None
    ) -> Float[Tensor, "rows"]:
        """KL(guided ‖ base) of this step; None: of the model's own base, over its whole vocabulary.

        Rounding may put that of equal distributions a little below 0: it is 0 then.
        """
        base = self.base_logprob if base_logprob is None else base_logprob
        p = self.logprob.exp()
        kl = (p * (self.logprob - base)).where(p > 0, 0.0).sum(-1)
        return kl.clamp(min=0.0)

    def greedy(self) -> "NextToken":
        """All probability on the likeliest candidate, so that log π is 0 and KL is −log π₀."""
        place = self.logits.argmax(-1, keepdim=True)
        return NextToken(
            self.tokens.gather(1, place),
            torch.zeros_like(place, dtype=self.logits.dtype),
            self.base_logits,
            self.beta,
            self.spent,
        )


def _place(p: Float[Tensor, "rows n"], level: Float[Tensor, "rows 1"]) -> Int[Tensor, "rows 1"]:
    """Where the sum of p, from the left, first exceeds `level` (in [0, 1)) of its whole, in fp64.

    Of many, sums of blocks say in which block that is.
    """
    n = p.size(-1)
    if n <= 4 * _BLOCK:
        cumulative = p.double().cumsum(-1)
        return _first_above(cumulative, level * cumulative[:, -1:])
    whole = n // _BLOCK * _BLOCK
    sums = [p[:, :whole].unflatten(-1, (-1, _BLOCK)).sum(-1), p[:, whole:].sum(-1, keepdim=True)]
    blocks = torch.cat(sums, dim=1).double().cumsum(-1)
    level = level * blocks[:, -1:]
    block = _first_above(blocks, level)
    at = block * _BLOCK + torch.arange(_BLOCK, device=p.device)
    inside = p.gather(1, at.clamp(max=n - 1)).double().masked_fill_(at >= n, 0.0).cumsum(-1)
    before = blocks.gather(1, block) - inside[:, -1:]
    left = (level - before).clamp(min=0.0)  # rounded: below 0 a first place of no weight is found
    return block * _BLOCK + _first_above(inside, left)


def _first_above(
    cumulative: Float[Tensor, "rows n"], level: Float[Tensor, "rows 1"]
) -> Int[Tensor, "rows 1"]:
    """Where cumulative sums first exceed the level.

    Rounding may leave none above: then it is the last place that adds something.
    """
    last = (cumulative < cumulative[:, -1:]).sum(-1, keepdim=True)
    return (cumulative <= level).sum(-1, keepdim=True).minimum(last)
