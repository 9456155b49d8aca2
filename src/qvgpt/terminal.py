"""Text as it is written: whole characters alone, coloured by what tokens are worth."""

from collections.abc import Sequence

from qvgpt.data.tokenizer import Tokenizer
from qvgpt.decode.engine import TokenReport


class TextStream:
    """Tokens come, text goes; half a character waits for the rest."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokens: list[int] = []
        self.shown = ""
        self._tokenizer = tokenizer

    def add(self, token: int) -> str:
        """What the token lets be shown."""
        self.tokens.append(token)
        text = self._tokenizer.decode_completion(self.tokens)
        return "" if text.endswith("\ufffd") else self._beyond(text)

    def rest(self) -> str:
        """What never became a whole character."""
        return self._beyond(self._tokenizer.decode_completion(self.tokens))

    def _beyond(self, text: str) -> str:
        new, self.shown = text[len(self.shown) :], text
        return new


def shade(advantage: float, most: float) -> str:
    """The style of a token: green where it is better than V, red where worse, pale near 0.

    `most` is the size of an advantage of full colour.
    """
    weak = round(255 * (1 - min(abs(advantage) / most, 1.0))) if most else 255
    return (
        f"black on rgb({weak},255,{weak})" if advantage >= 0 else f"black on rgb(255,{weak},{weak})"
    )


def worth(reports: Sequence[TokenReport]) -> str:
    """V at the beginning, and what the text made of it."""
    first, last = reports[0].v, reports[-1].q
    added = [r.advantage for r in reports if r.advantage is not None]
    parts = [] if first is None else [f"V {first:+.3f} at first"]
    parts += [] if last is None else [f"{last:+.3f} at the end"]
    parts += [f"Σ A {sum(added):+.3f}"] if added else []
    return ", ".join([*parts, f"KL {sum(r.kl for r in reports):.2f} nats"])
