"""A text, token by token, with what the values say of each: what the lens shows, ready for JSON.

A token that the model chose, or could have:

    {"token": "den", "bytes": [100, 101, 110], "logprob": -0.2, "base_logprob": -0.7,
     "q": 0.61, "v": 0.52, "advantage": 0.09, "kl": 0.1,
     "alternatives": [{"token": "dem", "logprob": -1.7, "base_logprob": -1.2, "q": 0.4}, …]}

`token` is "" where it only begins a character, which then stands at the token that completes it;
`bytes` is null for special tokens, such as the end. Null numbers are unknown, but for a null
`logprob`: that token is no candidate of the guidance, its probability is 0.
"""

import math
from collections.abc import Sequence
from typing import Any

from qvgpt.data.token_bytes import text_bytes, token_bytes
from qvgpt.data.tokenizer import Tokenizer
from qvgpt.decode.engine import TokenReport
from qvgpt.decode.guide import Alternative
from qvgpt.decode.policy import Guidance
from qvgpt.decode.score import score
from qvgpt.decode.sources import ValueSource
from qvgpt.errors import QvgptError
from qvgpt.models.value_model import ValueModel
from qvgpt.trajectory import Trajectory

Record = dict[str, Any]
MOST_ALTERNATIVES = 20
"""So many alternatives to a token at most."""


def read_texts(
    model: ValueModel,
    texts: Sequence[Trajectory],
    guidance: Guidance | None = None,
    *,
    alternatives: int = 5,
    values: ValueSource | None = None,
) -> list[list[Record]]:
    """Each text's tokens, in their order: with numbers where the model acts, else without.

    Raises `QvgptError` for more than `MOST_ALTERNATIVES`, and as `score` does.
    """
    if not 0 <= alternatives <= MOST_ALTERNATIVES:
        raise QvgptError(f"alternatives: from 0 to {MOST_ALTERNATIVES}, not {alternatives}")
    if model.tokenizer is None:
        raise QvgptError("the model has no tokenizer to show texts with")
    found = []
    scores = score(model, texts, guidance, values=values, alternatives=alternatives)
    for text, scored in zip(texts, scores, strict=True):
        reports, each = iter(scored.reports), list[TokenReport | None]()
        for acts in text.is_action:  # of an action without a target nothing is known
            each.append(next(reports, None) if acts else None)
        found.append(token_records(model.tokenizer, text.tokens, each))
    return found


def token_records(
    tokenizer: Tokenizer, tokens: Sequence[int], reports: Sequence[TokenReport | None]
) -> list[Record]:
    """The tokens of one text, each with its report where it has one."""
    records = []
    both = zip(text_bytes(tokenizer, tokens), reports, strict=True)
    for (piece, spelled), report in both:
        record: Record = {"token": piece, "bytes": None if spelled is None else list(spelled)}
        records.append(record if report is None else record | numbers(tokenizer, report))
    return records


def numbers(tokenizer: Tokenizer, report: TokenReport) -> Record:
    """A report in the words of a record."""
    return {
        "logprob": _finite(report.logprob),
        "base_logprob": _finite(report.base_logprob),
        "q": report.q,
        "v": report.v,
        "advantage": report.advantage,
        "kl": _finite(report.kl),
        "alternatives": [_alternative(tokenizer, each) for each in report.alternatives],
    }


def _alternative(tokenizer: Tokenizer, found: Alternative) -> Record:
    spelled = token_bytes(tokenizer, found.token)
    named = tokenizer.decode([found.token], skip_special=False)
    return {
        "token": named if spelled is None else spelled.decode(errors="replace"),
        "bytes": None if spelled is None else list(spelled),
        "logprob": _finite(found.logprob),
        "base_logprob": _finite(found.base_logprob),
        "q": found.q,
    }


def _finite(number: float) -> float | None:
    """JSON knows no infinity."""
    return number if math.isfinite(number) else None
