"""Rewards of a text's form, which look at nothing but the text."""

import json
import re
from collections.abc import Callable

from qvgpt.envs.rewards.metric import Metric, words
from qvgpt.errors import QvgptError


def length(target: str = "") -> Metric:
    """The number of words, or how near it is to `target`: max(0, 1 − |words − target| / target)."""
    if not target:
        return _of_text("length", lambda text: float(len(words(text))))
    wanted = _whole(f"length:{target}", target)
    return _of_text(
        f"length:{target}", lambda text: max(0.0, 1 - abs(len(words(text)) - wanted) / wanted)
    )


def distinct(order: str = "") -> Metric:
    """Different n-grams of words over all n-grams of the text (Li et al., 2016), n = `order` or 2.

    0 where the text is shorter than n words.
    """
    n = _whole(f"distinct:{order}", order or "2")

    def score(text: str) -> float:
        said = words(text)
        grams = [tuple(said[i : i + n]) for i in range(len(said) - n + 1)]
        return len(set(grams)) / len(grams) if grams else 0.0

    return _of_text(f"distinct:{n}", score)


def repetition(window: str = "") -> Metric:
    """Minus the share of words that stand among the `window` (16) words before them.

    rep/l of Welleck et al. (2020, arXiv:1908.04319), over the text's own words and negated.
    """
    size = _whole(f"repetition:{window}", window or "16")

    def score(text: str) -> float:
        said = words(text)
        repeated = sum(word in said[max(0, i - size) : i] for i, word in enumerate(said))
        return -repeated / len(said) if said else 0.0

    return _of_text(f"repetition:{size}", score)


def regex(pattern: str) -> Metric:
    """1 if Python's `re.search` finds the pattern, else 0."""
    try:
        wanted = re.compile(pattern)
    except re.error as error:
        raise QvgptError(f"regex:{pattern}: no pattern of Python's `re`: {error}") from None
    return _of_text(f"regex:{pattern}", lambda text: float(wanted.search(text) is not None))


def json_object(keys: str = "") -> Metric:
    """1 if the text is one JSON object that has all `keys` (separated by commas), else 0."""
    wanted = {key.strip() for key in keys.split(",") if key.strip()}

    def score(text: str) -> float:
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            return 0.0
        return float(isinstance(found, dict) and wanted <= found.keys())

    return _of_text(f"json:{keys}" if keys else "json", score)


def _of_text(name: str, score: Callable[[str], float]) -> Metric:
    return Metric(name, lambda text, row: score(text))


def _whole(spec: str, said: str) -> int:
    if not said.isdecimal() or int(said) < 1:
        raise QvgptError(f"{spec}: a whole number of at least 1 was expected, not {said!r}")
    return int(said)
