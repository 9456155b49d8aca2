"""What value heads look like: the options of `heads.py`."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from qvgpt.categorical import Support
from qvgpt.errors import QvgptError

LARGE_VOCABULARY = 1000
"""Tokens: between the largest where a row for each was as good and the smallest where it was not
(450 and 4,000; docs/methods.md, "Which heads?")."""


@dataclass(frozen=True)
class HeadsConfig:
    """What the value heads look like."""

    kind: Literal["linear", "low_rank", "bilinear", "mlp", "categorical"] | None = None
    """linear, low_rank and bilinear fold into an ordinary checkpoint; bilinear tells tokens apart
    as the LM head does, and so needs fewer texts; mlp is ILQL's; categorical knows the distribution
    of returns, low-rank over the vocabulary. None: linear for a vocabulary of fewer than 1,000
    tokens, each of them seen often, and bilinear from there on."""
    rank: int = 64
    """Rank of a low_rank or categorical head."""
    num_q: int = 2
    """Q heads: 2 are twins, whose minimum curbs overestimation."""
    v: Literal["linear", "mlp"] = "mlp"
    """The head of V, and of the baseline b of Q."""
    bins: int = 51
    """Of a categorical head; 2 for rewards of 0 or 1."""
    low: float | None = None
    """The least return that a categorical head knows. None, with high: that of the data, and 5 % of
    their range further; of 2 bins 0 to 1."""
    high: float | None = None
    """The greatest return that a categorical head knows."""
    sigma: float = 0.0
    """Of a categorical head: 0 keeps distributions (two-hot targets); more smears them over that
    many bins (HL-Gauss, 0.75), which helps their means and spoils all else."""

    def __post_init__(self) -> None:
        """Refuse what does not exist."""
        kinds = ("linear", "low_rank", "bilinear", "mlp", "categorical")
        if self.kind not in (*kinds, None) or self.v not in ("linear", "mlp"):
            raise QvgptError(f"heads: unknown kind in {self}")
        if not all(isinstance(n, int) and n >= 1 for n in (self.num_q, self.rank, self.bins)):
            raise QvgptError("heads: num_q, rank and bins must be whole numbers of at least 1")
        if (self.low is None) != (self.high is None):
            raise QvgptError("heads: give low and high, or neither: then the data say both")
        if self.kind == "categorical":
            _ = self.support if self.knows_support else Support(0.0, 1.0, self.bins, self.sigma)

    def for_vocabulary(self, size: int) -> "HeadsConfig":
        """The same with a kind, where none was given."""
        if self.kind is not None:
            return self
        return replace(self, kind="linear" if size < LARGE_VOCABULARY else "bilinear")

    @property
    def knows_support(self) -> bool:
        """Whether low and high were given, or are not needed."""
        return self.kind != "categorical" or self.bins == 2 or self.low is not None

    @property
    def folds(self) -> bool:
        """Whether Q is linear in the hidden state, and so a matrix like an LM head."""
        return self.kind in ("linear", "low_rank", "bilinear")

    @property
    def support(self) -> Support | None:
        """The returns that a categorical head tells apart; None for the other kinds."""
        if self.kind != "categorical":
            return None
        low, high = (0.0, 1.0) if self.bins == 2 and self.low is None else (self.low, self.high)
        if low is None or high is None:
            raise QvgptError(
                "heads: which returns are there? Give low and high, or let `train` take them from "
                "the data (`HeadsConfig.fitted_to`)"
            )
        return Support(low, high, self.bins, self.sigma)

    def fitted_to(self, returns: Sequence[float]) -> "HeadsConfig":
        """The same with a support that holds these returns, where none was given.

        It is 5 % of their range wider at each end; where all are alike, ½.
        """
        if self.knows_support or not returns:
            return self
        low, high = min(returns), max(returns)
        margin = 0.05 * (high - low) or 0.5
        return replace(self, low=low - margin, high=high + margin)
