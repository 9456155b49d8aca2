"""Text as it is written: whole characters alone, coloured by what tokens are worth."""

from collections.abc import Sequence

from qvgpt.data.tokenizer import Tokenizer
from qvgpt.decode.engine import TokenReport


class TextStream:
    """Tokens come, text goes; half a character waits for the rest.

    Only the last tokens are read again, from one whole character on, so that a text of any length
    costs each token the same.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokens: list[int] = []
        self._tokenizer = tokenizer
        self._context, self._start = 0, 0  # tokens[context:start] are shown, and give the spacing
        self._before = 0  # how long their text is

    def add(self, *tokens: int) -> str:
        """What the tokens let be shown."""
        self.tokens += tokens
        return self._beyond(whole=False)

    def rest(self) -> str:
        """What never became a whole character."""
        return self._beyond(whole=True)

    def _beyond(self, whole: bool) -> str:
        text = self._tokenizer.decode_completion(self.tokens[self._context :])
        new = text[self._before :]
        if not new or (not whole and text.endswith("\ufffd")):
            return ""
        self._context, self._start = self._start, len(self.tokens)
        self._before = len(self._tokenizer.decode_completion(self.tokens[self._context :]))
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
