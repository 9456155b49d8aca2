"""A text, token by token, with what the values say of each: what the lens shows, ready for JSON.

A token that the model chose, or could have:

    {"token": "den", "bytes": [100, 101, 110], "logprob": -0.2, "base_logprob": -0.7,
     "q": 0.61, "v": 0.52, "advantage": 0.09, "kl": 0.1,
     "alternatives": [{"token": "dem", "logprob": -1.7, "base_logprob": -1.2, "q": 0.4}, …]}

One that was given has `token` and `bytes` alone. Special tokens, such as the end, have a name and
no bytes. Null numbers are unknown, but for a null `logprob`: that token is no candidate of the
guidance, its probability is 0. Numbers have eight significant digits.
"""

import math
from collections.abc import Sequence
from typing import Any

from qvgpt.data.token_bytes import TokenBytes
from qvgpt.decode.engine import TokenReport
from qvgpt.decode.policy import Guidance
from qvgpt.decode.score import score
from qvgpt.decode.sources import ValueSource
from qvgpt.errors import QvgptError
from qvgpt.models.value_model import ValueModel
from qvgpt.trajectory import Trajectory

Record = dict[str, Any]
MOST_ALTERNATIVES = 20
"""So many likely tokens beside one at most."""


def read_texts(
    model: ValueModel,
    texts: Sequence[Trajectory],
    guidance: Guidance | None = None,
    *,
    alternatives: int = 5,
    values: ValueSource | None = None,
) -> tuple[list[list[Record]], list[float | None]]:
    """Each text's tokens in their order, with numbers where the model acts; and V at its end.

    Where the guidance is greedy, probabilities are those at temperature 1. Raises `QvgptError` for
    more than `MOST_ALTERNATIVES`, and as `score` does.
    """
    if not 0 <= alternatives <= MOST_ALTERNATIVES:
        raise QvgptError(f"alternatives: from 0 to {MOST_ALTERNATIVES}, not {alternatives}")
    if model.tokenizer is None:
        raise QvgptError("the model has no tokenizer to show texts with")
    shown, found = TokenBytes(model.tokenizer), []
    scores = score(model, texts, guidance, values=values, alternatives=alternatives)
    for text, scored in zip(texts, scores, strict=True):
        reports = iter(scored.reports)
        both = zip(text.tokens, text.is_action, strict=True)
        # of an action without a target nothing is known
        found.append([record(shown, t, next(reports, None) if acts else None) for t, acts in both])
    return found, [scored.end_value for scored in scores]


def record(
    shown: TokenBytes, token: int, report: TokenReport | None, alternatives: int | None = None
) -> Record:
    """A token as said above, with at most so many alternatives (None: all that were reported)."""
    spelled: Record = {"token": shown.name(token), "bytes": list(shown[token])}
    if report is None:
        return spelled
    return spelled | {
        "logprob": number(report.logprob),
        "base_logprob": number(report.base_logprob),
        "q": number(report.q),
        "v": number(report.v),
        "advantage": number(report.advantage),
        "kl": number(report.kl),
        "alternatives": [
            {
                "token": shown.name(other.token),
                "bytes": list(shown[other.token]),
                "logprob": number(other.logprob),
                "base_logprob": number(other.base_logprob),
                "q": number(other.q),
            }
            for other in report.alternatives[:alternatives]
        ],
    }


def number(value: float | None) -> float | None:
    """As JSON knows it: nothing that is not finite."""
    return float(f"{value:.8g}") if value is not None and math.isfinite(value) else None
