"""How good is a text: rewards by name, their sums, and their shaping over every token.

Each is listed in docs/rewards.md with its range, direction and cost. References are
`row["references"]`, else `[row["completion"]]`; of several the best counts (BLEU and chrF join them
as sacreBLEU does).
"""

import importlib
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real

from qvgpt.envs.rewards import form, overlap
from qvgpt.envs.rewards.bleu import bleu, bleu_prefixes
from qvgpt.envs.rewards.classifier import classifier
from qvgpt.envs.rewards.command import command
from qvgpt.envs.rewards.metric import Metric, Row, expected, references
from qvgpt.envs.rewards.shaping import shape
from qvgpt.errors import QvgptError, nearest

__all__ = [
    "KINDS",
    "Kind",
    "Metric",
    "bleu_prefixes",
    "compares",
    "expected",
    "get_reward",
    "references",
    "shape",
]


@dataclass(frozen=True)
class Kind:
    """A reward that is known by name, as docs/rewards.md lists it."""

    make: Callable[[str], Metric]
    """What stands after the name's colon (else "") → the reward."""
    range: str
    direction: str
    """What a higher reward means."""
    cost: str
    """Of one text of 20 words, on one CPU core."""
    argument: str = ""
    """What may stand after the name; in brackets where it may be left out."""
    compares: bool = False
    """Whether it reads references."""


def _plain(name: str, score: Callable[[str, Row], float]) -> Callable[[str], Metric]:
    return lambda _: Metric(name, score)


_CHEAP = "< 0.1 ms"
KINDS: dict[str, Kind] = {
    "bleu": Kind(bleu, "0..1", "nearer to a reference, by one to four words in a row",
                 _CHEAP, "[:zh]", True),
    "chrf": Kind(lambda _: overlap.chrf(), "0..1", "nearer to a reference, by characters",
                 "0.1 ms", "", True),
    "rouge_1": Kind(lambda _: overlap.rouge("1"), "0..1", "shares more words with a reference",
                    _CHEAP, "", True),
    "rouge_2": Kind(lambda _: overlap.rouge("2"), "0..1", "shares more pairs of words",
                    _CHEAP, "", True),
    "rouge_l": Kind(lambda _: overlap.rouge("L"), "0..1", "shares a longer subsequence of words",
                    "< 0.1 ms, more for long texts", "", True),
    "exact_match": Kind(_plain("exact_match", overlap.exact_match), "0 or 1",
                        "equals a reference, as SQuAD normalises", _CHEAP, "", True),
    "token_f1": Kind(_plain("token_f1", overlap.token_f1), "0..1",
                     "shares more words with a reference, as SQuAD normalises", _CHEAP, "", True),
    "number": Kind(_plain("number", overlap.number), "0 or 1",
                   "its last number is that of a reference", _CHEAP, "", True),
    "length": Kind(form.length, "words; with N 0..1", "longer; with N nearer to N words", _CHEAP,
                   "[:N]"),
    "distinct": Kind(form.distinct, "0..1", "fewer runs of N words (2) said twice", _CHEAP,
                     "[:N]"),
    "repetition": Kind(form.repetition, "−1..0", "fewer words said again within N words (16)",
                       _CHEAP, "[:N]"),
    "regex": Kind(form.regex, "0 or 1", "Python's pattern is found", "the pattern's", ":PATTERN"),
    "json": Kind(form.json_object, "0 or 1", "is one JSON object, which has the keys", _CHEAP,
                 "[:KEY,KEY]"),
    "command": Kind(command, "0 or 1, or what it prints", "the program says so",
                    "the program's, and 2 ms", ":[timeout=S ]PROGRAM ARGUMENTS"),
    "classifier": Kind(classifier, "0..1; logits and regressors any",
                       "the label is likelier, the value higher", "a forward pass, in batches",
                       ":DIR[#LABEL[:logit]]"),
}  # fmt: skip
_WEIGHTED = re.compile(r"\s*([+-]?\s*-?\s*)((?:\d+\.?\d*|\.\d+)(?:e-?\d+)?)\s*\*\s*")


def get_reward(spec: str) -> Metric:
    """The reward of that name, a weighted sum of several, or the callable `module:function`.

    A sum is `0.7*rouge_l + 0.3*length:20`: it begins with a weight, and every term has one. Raises
    `QvgptError` for an unknown name, a bad argument, a missing package, module or function.
    """
    parts = _terms(spec)
    if parts is not None:
        return _sum(spec, [(weight, get_reward(term)) for weight, term in parts])
    name, colon, argument = spec.partition(":")
    kind = KINDS.get(name)
    if kind is None:
        return _from_module(spec) if colon else _unknown(spec)
    if colon and not kind.argument:
        raise QvgptError(f"reward {spec!r}: {name} takes nothing after it")
    if not argument and kind.argument.startswith(":"):
        raise QvgptError(f"reward {spec!r}: say {name}{kind.argument}")
    return kind.make(argument)


def compares(spec: str) -> bool:
    """Whether the reward reads `references`; what a callable reads is not known."""
    parts = _terms(spec)
    if parts is not None:
        return any(compares(term) for _, term in parts)
    kind = KINDS.get(spec.partition(":")[0])
    return kind is not None and kind.compares


def _unknown(spec: str) -> Metric:
    names = ", ".join(KINDS)
    is_sum = bool(re.search("[+*]", spec))
    weights = "; in a sum every term has a weight: 0.7*chrf + 0.3*length" if is_sum else ""
    hint = nearest(spec, KINDS)
    raise QvgptError(f"no reward {spec!r}{hint}; there are {names} and module:function{weights}")


def _terms(spec: str) -> list[tuple[float, str]] | None:
    """The weights and rewards of a sum; None where it is none."""
    starts = [m for m in _WEIGHTED.finditer(spec) if m.start() == 0 or m[1][:1] in ("+", "-")]
    if not starts or starts[0].start() > 0:
        return None
    ends = [*(m.start() for m in starts[1:]), len(spec)]
    return [
        ((-1) ** m[1].count("-") * float(m[2]), spec[m.end() : end].strip())
        for m, end in zip(starts, ends, strict=True)
    ]


def _sum(name: str, terms: Sequence[tuple[float, Metric]]) -> Metric:
    def batch(completions: Sequence[str], rows: Sequence[Row]) -> list[float]:
        scores = [reward(list(completions), list(rows)) for _, reward in terms]
        return _weighted(scores)

    def prefix_scores(texts: list[str], row: Row, brevity: bool) -> list[float]:
        return _weighted([
            reward.prefix_scores(texts, row, brevity)
            if reward.prefix_scores
            else reward(texts, [row] * len(texts))
            for _, reward in terms
        ])  # fmt: skip

    def _weighted(scores: Sequence[Sequence[float]]) -> list[float]:
        weights = [weight for weight, _ in terms]
        return [
            sum(w * x for w, x in zip(weights, column, strict=True))
            for column in zip(*scores, strict=True)
        ]

    grows = any(reward.prefix_scores for _, reward in terms)
    return Metric(
        name,
        lambda text, row: batch([text], [row])[0],
        prefix_scores if grows else None,
        batch,
        frozenset().union(*(reward.models for _, reward in terms)),
    )


def _from_module(spec: str) -> Metric:
    module_name, _, name = spec.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # a console script does not look there by itself
    try:
        function: Callable[[str, Row], float] = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise QvgptError(f"reward {spec!r} expected as module:function: {error}") from error
    if not callable(function):
        raise QvgptError(f"reward {spec!r} is no callable of (completion, row)")

    def score(text: str, row: Row) -> float:
        prompt = str(row.get("prompt", ""))[:60]
        try:
            found = function(text, row)
        except QvgptError:
            raise
        except Exception as error:  # theirs: whatever it is, it is named, and where
            frame = traceback.extract_tb(error.__traceback__)[-1]
            raise QvgptError(
                f"reward {spec!r} failed on {text[:60]!r} (prompt {prompt!r}): "
                f"{type(error).__name__}: {error} (at {frame.filename}:{frame.lineno})"
            ) from error
        if not isinstance(found, Real):
            raise QvgptError(
                f"reward {spec!r} gave {found!r} for {text[:60]!r} (prompt {prompt!r}): a number "
                "was expected"
            )
        return float(found)

    return Metric(spec, score)
