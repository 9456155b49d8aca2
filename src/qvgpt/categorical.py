"""Return distributions over a fixed grid: what to learn them from, and what is read from them.

Logits and probabilities have the bins as their last axis.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from qvgpt.errors import QvgptError

Functional = Literal["mean", "soft", "cvar"]


@dataclass(frozen=True)
class Support:
    """Evenly spaced returns, from `low` to `high`."""

    low: float
    high: float
    bins: int
    sigma: float = 0.0
    """Of HL-Gauss targets, in bins (0.75 is usual): they smear what was seen, so that only the mean
    means anything, and the grid is 3σ wider at both ends, lest its edges bend that. 0: two-hot."""

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        checks = {
            "low must be below high": -math.inf < self.low < self.high < math.inf,
            "sigma must be 0 or more": 0 <= self.sigma < math.inf,
            "bins must be 2 or more, beside those that sigma adds": self.bins >= 2 + 2 * self._pad,
        }
        for message, holds in checks.items():
            if not holds:
                raise QvgptError(f"heads: {message}, not as in {self}")

    @property
    def _pad(self) -> int:
        return math.ceil(3 * self.sigma) if self.sigma < math.inf else 0

    @property
    def width(self) -> float:
        """From one bin's centre to the next."""
        return (self.high - self.low) / (self.bins - 1 - 2 * self._pad)

    def centres(self, like: Tensor) -> Float[Tensor, "bins"]:
        """The return that each bin stands for, as a tensor like another one."""
        edge = self._pad * self.width
        return torch.linspace(
            self.low - edge, self.high + edge, self.bins, dtype=like.dtype, device=like.device
        )

    def target(self, value: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape bins"]:
        """The distribution to learn from a return that was seen, kept within low and high.

        Two-hot: the mean of the two bins around it is the return itself (Bellemare et al., 2017).
        HL-Gauss: a normal distribution around it, cut into bins (Imani & White, 2018; Farebrother
        et al., 2024).
        """
        centres = self.centres(value)
        apart = (value.clamp(self.low, self.high)[..., None] - centres) / self.width
        if not self.sigma:
            return (1 - apart.abs()).clamp(min=0)
        scale = self.sigma * math.sqrt(2)
        mass = torch.erf((apart + 0.5) / scale) - torch.erf((apart - 0.5) / scale)
        return mass / mass.sum(-1, keepdim=True)


def read_distribution(
    logits: Float[Tensor, "*shape bins"],
    returns: Float[Tensor, "bins"],
    functional: Functional = "mean",
    eta: float = 1.0,
    alpha: float = 0.1,
) -> Float[Tensor, "*shape"]:
    """One number of a distribution over `returns`, which ascend.

    mean: E Z. soft: η·log E exp(Z/η), between mean (η → ∞) and greatest return (η → 0; below 0 it
    seeks the least). cvar: the mean of the worst share `alpha` of returns.
    """
    if functional == "soft":
        return eta * ((logits + returns / eta).logsumexp(-1) - logits.logsumexp(-1))
    p = logits.softmax(-1)
    if functional == "mean":
        return p @ returns
    before = p.cumsum(-1) - p
    return p.minimum((alpha - before).clamp(min=0)) @ returns / alpha
