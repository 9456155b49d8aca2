"""What texts are worth: metrics of a corpus, or means of a reward, 0..100, with intervals."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from qvgpt.bootstrap import Estimate, corpus_bleu_ci, corpus_chrf_ci, mean_ci
from qvgpt.envs.rewards import Metric, get_reward

Row = dict[str, Any]
Texts = Sequence[Sequence[str]]
"""The texts of each row: one a seed."""


@dataclass(frozen=True)
class Judge:
    """The metrics of a task, the first of which is what is chosen by."""

    metrics: tuple[str, ...]
    """`bleu`, `bleu:zh` and `chrf` are of the corpus; others are means of the reward so named."""

    def value(self, texts: Texts, rows: Sequence[Row]) -> float:
        """The first metric, without an interval."""
        return _estimate(self.metrics[0], texts, rows, None, resamples=2).value

    def one(self, text: str, row: Row) -> float:
        """The first metric of a single text."""
        return self._reward.score(text, row)

    def estimates(self, texts: Texts, rows: Sequence[Row], baseline: Texts) -> dict[str, Estimate]:
        """Every metric, with the paired difference to the baseline's texts."""
        return {name: _estimate(name, texts, rows, baseline) for name in self.metrics}

    @cached_property
    def _reward(self) -> Metric:
        return get_reward(self.metrics[0])


def references(row: Row) -> list[str]:
    """What a text is compared with."""
    return row.get("references") or [row["completion"]]


def _estimate(
    name: str, texts: Texts, rows: Sequence[Row], baseline: Texts | None, resamples: int = 2000
) -> Estimate:
    wanted = [references(row) for row in rows]
    if name == "chrf":
        return corpus_chrf_ci(texts, wanted, baseline, resamples)
    if name.startswith("bleu"):
        tokenize = name.partition(":")[2] or "13a"
        return corpus_bleu_ci(texts, wanted, baseline, resamples, tokenize=tokenize)
    reward = get_reward(name)
    ours = _means(reward, texts, rows)
    theirs = None if baseline is None else _means(reward, baseline, rows)
    return mean_ci(ours, theirs, resamples)


def _means(reward: Metric, texts: Texts, rows: Sequence[Row]) -> list[float]:
    """Of each row, a hundredfold."""
    return [
        100 * sum(reward(list(several), [row] * len(several))) / len(several)
        for several, row in zip(texts, rows, strict=True)
    ]
