"""A reward: what it is, which texts of a row it compares with, and what it calls a word."""

import importlib
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from qvgpt.data.files import kind_of
from qvgpt.errors import QvgptError

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Metric:
    """A named reward."""

    name: str
    score: Callable[[str, Row], float]
    """(completion, row) → score."""
    prefix_scores: Callable[[list[str], Row, bool], list[float]] | None = None
    """(growing prefixes, row, brevity) → one score each, where that is cheaper than one by one."""
    batch: Callable[[Sequence[str], Sequence[Row]], list[float]] | None = None
    """(completions, their rows) → one score each, where that is cheaper than one by one."""
    models: frozenset[str] = frozenset()
    """SHA-256 of the weights of every model that judges here."""

    def __call__(self, completions: list[str], rows: list[Row]) -> list[float]:
        """One score per completion. Raises `QvgptError` for one that is no finite number."""
        if self.batch is not None:
            scores = self.batch(completions, rows)
        else:
            pairs = zip(completions, rows, strict=True)
            scores = [float(self.score(text, row)) for text, row in pairs]
        for i, (score, row) in enumerate(zip(scores, rows, strict=True), start=1):
            if not math.isfinite(score):
                prompt = str(row.get("prompt", ""))[:60]
                raise QvgptError(
                    f"reward {self.name!r} is {score} for row {i} of {len(rows)} "
                    f"(prompt {prompt!r}): expected a finite number"
                )
        return scores


def references(row: Row) -> tuple[str, ...]:
    """The texts a completion is compared with. Raises `QvgptError` if the row has none."""
    given = row.get("references")
    if given and not isinstance(given, list | tuple):
        raise QvgptError(f"`references` is a list of texts, not {kind_of(given)}")
    texts = given or [row.get("completion")]
    if texts == [None]:
        raise QvgptError(
            f"this reward needs `references` or a `completion` to compare with; "
            f"the row has {sorted(row)}"
        )
    for text in texts:
        if not isinstance(text, str):
            column = "references" if given else "completion"
            raise QvgptError(f"a text to compare with was expected in `{column}`: {kind_of(text)}")
    return tuple(texts)


def expected(reward: Metric) -> Metric:
    """The mean of the reward over a row's references, each taken as the only one.

    With samples of a model as references it is the reward that the model itself expects: the
    utility of minimum-Bayes-risk decoding (Kumar & Byrne, 2004).
    """

    def weighted(row: Row) -> list[tuple[float, Row]]:
        counts = Counter(references(row))
        return [(n / counts.total(), {**row, "references": [r]}) for r, n in counts.items()]

    def score(text: str, row: Row) -> float:
        return sum(w * reward.score(text, one) for w, one in weighted(row))

    in_one = reward.prefix_scores
    if in_one is None:
        return Metric(f"expected {reward.name}", score, models=reward.models)

    def prefix_scores(texts: list[str], row: Row, brevity: bool) -> list[float]:
        columns = [[w * x for x in in_one(texts, one, brevity)] for w, one in weighted(row)]
        return [sum(column) for column in zip(*columns, strict=True)]

    return Metric(f"expected {reward.name}", score, prefix_scores, models=reward.models)


_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
_IS_CJK = re.compile(f"[{_CJK}]")
_WORD = re.compile(f"[{_CJK}]|[^{_CJK}\\s]+")


def words(text: str) -> list[str]:
    """What stands between white space; a Chinese character or a kana is a word of its own."""
    return _WORD.findall(text)


def is_cjk(character: str) -> bool:
    """Whether it is Chinese or a kana, or their punctuation."""
    return (
        bool(_IS_CJK.match(character))
        or "\u3000" <= character <= "\u303f"
        or ("\uff01" <= character <= "\uff20")
    )


def optional(module: str, reward: str) -> ModuleType:
    """A module of the extra `text`. Raises `QvgptError` with the line that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0].replace("_", "-")
        raise QvgptError(f"reward {reward!r} needs {package}: pip install 'qvgpt[text]'") from error
