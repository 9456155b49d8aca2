"""Sizes of a new model, and what follows for them from the logs where nothing is said.

The steps are those of the reproductions, from 36,000 tokens (docs/your_logs.md) to 2 million
(reproductions/summarization); larger ones were not tried. docs/your_logs.md has them as a table.
"""

from dataclasses import dataclass, replace
from typing import Literal

from qvgpt.errors import QvgptError

SHAPES = ((300_000, 64, 2), (800_000, 192, 3))
"""Below so many tokens: width and depth."""
LARGEST = (256, 4)
VOCABULARY = (500, 8000)
"""Least and most tokens of a BPE; between them one for so many characters:"""
CHARACTERS_A_TOKEN = 600
ROOM = 128
"""What is written after a text of the logs must fit too: `collect` and `evaluate` cut there."""
CONTEXTS = (64, 2048)
"""A context is a multiple of the first and at most the second, unless said."""


def context_for(longest: int, asked: int | None = None) -> int:
    """The context, in tokens, of a new model for texts of at most `longest`.

    There is room for texts of `asked` tokens in any case.
    """
    step, most = CONTEXTS
    return max(min(most, _up(longest + ROOM, step)), _up(asked or 0, step))


def _up(number: int, step: int) -> int:
    return -(-number // step) * step


@dataclass(frozen=True)
class TokenizerConfig:
    """The tokenizer of a model from scratch."""

    kind: Literal["bpe", "char"] = "bpe"
    """What to train on the data: byte-level BPE, or characters."""
    vocab_size: int | None = None
    """At most so many tokens, special ones included; none: of bpe 500 to 8000, one for 600
    characters of text, of char 8000."""
    path: str | None = None
    """A directory with a tokenizer to take instead."""

    def fitted_to(self, characters: int) -> "TokenizerConfig":
        """With nothing left open, for so many characters of text."""
        if self.vocab_size is not None or self.path is not None:
            return self
        least, most = VOCABULARY
        asked = characters // CHARACTERS_A_TOKEN if self.kind == "bpe" else most
        return replace(self, vocab_size=min(most, max(least, asked)))


@dataclass(frozen=True)
class GPTShape:
    """A GPT from scratch; what is left open is fitted to the data."""

    embed_dim: int | None = None
    """Width (none: 64; from 300,000 tokens of text 192, from 800,000 256)."""
    num_heads: int | None = None
    """Attention heads a layer, of which embed_dim is a multiple (none: 2 to a width of 128, above
    it one for 64)."""
    num_layers: int | None = None
    """Depth (none: 2, from 300,000 tokens 3, from 800,000 4)."""
    seq_len: int | None = None
    """The context, in tokens (none: the longest text and 128 tokens more, at most 2048, or
    max_length)."""
    dropout: float = 0.1
    """Share of activations dropped while training."""
    tied: bool = True
    """Let the LM head be the token embedding."""

    def __post_init__(self) -> None:
        """Refuse what has no meaning, naming the key."""
        for name in ("embed_dim", "num_heads", "num_layers", "seq_len"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise QvgptError(f"gpt.{name}: must be at least 1, not {value}")
        if not 0 <= self.dropout <= 1:
            raise QvgptError(f"gpt.dropout: must be between 0 and 1, not {self.dropout}")

    @property
    def is_open(self) -> bool:
        """Whether something is left to be fitted."""
        return None in (self.embed_dim, self.num_heads, self.num_layers, self.seq_len)

    def fitted_to(self, tokens: int, longest: int, asked: int | None = None) -> "GPTShape":
        """With nothing left open, for so many tokens of text, the longest text of `longest`, and
        room for texts of `asked`."""
        fitting = (shape for below, *shape in SHAPES if tokens < below)
        width, layers = next(fitting, LARGEST)
        if self.embed_dim is not None:
            width = self.embed_dim
        elif self.num_heads is not None:  # that divides it
            width = -(-width // self.num_heads) * self.num_heads
        heads = next(n for n in range(max(2, width // 64), 0, -1) if width % n == 0)
        return replace(
            self,
            embed_dim=width,
            num_heads=heads if self.num_heads is None else self.num_heads,
            num_layers=layers if self.num_layers is None else self.num_layers,
            seq_len=context_for(longest, asked) if self.seq_len is None else self.seq_len,
        )
