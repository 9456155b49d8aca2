"""How sure is a figure: bootstrap intervals, paired differences, rank correlation, calibration.

The unit of resampling is the prompt: samples of one prompt are not independent. Two methods
compared over the same prompts share every resample, so their difference is paired, and that of
a method with itself is exactly 0.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from qvgpt.errors import QvgptError

RESAMPLES = 2000
_CHUNK_ELEMENTS = 2**24  # resamples × prompts at once: 128 MiB
_BLEU_ORDERS, _CHRF_ORDERS = 4, 6


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval and, against a baseline, the paired difference."""

    value: float
    ci95: tuple[float, float]
    delta: float | None = None
    """This minus the baseline."""
    delta_ci95: tuple[float, float] | None = None


def mean_ci(
    values: Sequence[float],
    baseline: Sequence[float] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """The mean of one value per prompt; `baseline` holds another method's, in the same order."""
    both = [np.asarray(v, dtype=float) for v in (values, baseline) if v is not None]
    statistics = [np.stack([v, np.ones_like(v)], axis=1) for v in both]
    return _estimate(lambda sums: sums[:, 0] / sums[:, 1], statistics, resamples, seed)


def corpus_bleu_ci(
    hypotheses: Sequence[str | Sequence[str]],
    references: Sequence[Sequence[str]],
    baseline: Sequence[str | Sequence[str]] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    tokenize: str = "13a",
) -> Estimate:
    """sacreBLEU's corpus BLEU (exponential smoothing), 0..100, with its interval.

    `hypotheses[i]` and `baseline[i]` are the text, or the texts, of prompt i and `references[i]`
    its references. `tokenize` is sacreBLEU's: "13a", "zh" … Only n-gram counts are resampled, so
    2000 resamples cost next to nothing.
    """
    metric = _sacrebleu().BLEU(force=True, tokenize=tokenize)
    statistics = [
        _counts(metric, texts, references) for texts in (hypotheses, baseline) if texts is not None
    ]
    return _estimate(_bleu, statistics, resamples, seed)


def corpus_chrf_ci(
    hypotheses: Sequence[str | Sequence[str]],
    references: Sequence[Sequence[str]],
    baseline: Sequence[str | Sequence[str]] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """sacreBLEU's corpus chrF2, 0..100; arguments as of `corpus_bleu_ci`."""
    metric = _sacrebleu().CHRF()
    statistics = [
        _counts(metric, texts, references) for texts in (hypotheses, baseline) if texts is not None
    ]
    return _estimate(_chrf, statistics, resamples, seed)


def ranks(x: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    """Ranks from 0; ties share their mean rank."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[inverse]


def pearson(x: Float[np.ndarray, "n"], y: Float[np.ndarray, "n"]) -> float:
    """Correlation; NaN where one of the two is constant."""
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])


def spearman(x: Float[np.ndarray, "n"], y: Float[np.ndarray, "n"]) -> float:
    """Rank correlation, ties at their mean rank; NaN where one of the two is constant."""
    return pearson(ranks(x), ranks(y))


def calibration(
    predicted: Float[np.ndarray, "n"], actual: Float[np.ndarray, "n"], bins: int = 10
) -> list[dict[str, float | int]]:
    """Mean prediction and mean outcome of each tenth of the predictions, ascending.

    Equal predictions share a bin, so that a right value for each of a few states has no error.
    """
    which = (bins * (ranks(predicted) + 0.5) / max(len(predicted), 1)).astype(int)
    parts = [which == k for k in np.unique(which)]
    return [
        {
            "predicted": float(predicted[p].mean()),
            "actual": float(actual[p].mean()),
            "n": int(p.sum()),
        }
        for p in parts
    ]


def _estimate(
    metric: Callable[[Float[np.ndarray, "rows counts"]], Float[np.ndarray, "rows"]],
    statistics: Sequence[Float[np.ndarray, "_ counts"]],
    resamples: int,
    seed: int,
) -> Estimate:
    """`metric` of summed statistics, for one method, or for a method and its baseline."""
    size = {len(s) for s in statistics}
    if len(size) != 1 or 0 in size:
        raise QvgptError(f"a figure needs a prompt or more, as many as its baseline: {size}")
    found = [metric(s.sum(0, keepdims=True))[0] for s in statistics]
    drawn: list[list[Any]] = [[] for _ in statistics]
    for weight in _times_drawn(size.pop(), resamples, seed):
        for scores, s in zip(drawn, statistics, strict=True):
            scores.append(metric(weight @ s))
    scores = [np.concatenate(d) for d in drawn]
    if len(found) == 1:
        return Estimate(float(found[0]), _interval(scores[0]))
    delta = float(found[0] - found[1])
    return Estimate(float(found[0]), _interval(scores[0]), delta, _interval(scores[0] - scores[1]))


def _times_drawn(prompts: int, resamples: int, seed: int) -> Iterator[Float[np.ndarray, "rows n"]]:
    """How often each prompt occurs in each resample, in chunks of resamples."""
    generator = np.random.default_rng(seed)
    size = max(1, _CHUNK_ELEMENTS // prompts)
    for start in range(0, resamples, size):
        rows = min(size, resamples - start)
        drawn = generator.integers(prompts, size=(rows, prompts))
        drawn += prompts * np.arange(rows)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=rows * prompts)
        yield counts.reshape(rows, prompts).astype(float)


def _interval(scores: Float[np.ndarray, "resamples"]) -> tuple[float, float]:
    low, high = np.percentile(scores, [2.5, 97.5])
    return float(low), float(high)


def _sacrebleu() -> Any:
    try:
        from sacrebleu import metrics
    except ImportError as error:
        raise QvgptError("corpus metrics need sacrebleu: pip install 'qvgpt[text]'") from error
    return metrics


def _counts(
    metric: Any, texts: Sequence[str | Sequence[str]], references: Sequence[Sequence[str]]
) -> Float[np.ndarray, "prompts counts"]:
    """sacreBLEU's sufficient statistics of each prompt, summed over its texts."""
    if len(texts) != len(references):
        raise QvgptError(f"{len(texts)} prompts' texts, but references of {len(references)}")
    groups = [[t] if isinstance(t, str) else list(t) for t in texts]
    flat = [text for group in groups for text in group]
    each = [r for group, r in zip(groups, references, strict=True) for _ in group]
    most = max(len(r) for r in each)  # sacreBLEU wants columns of references, None where fewer
    columns = [[r[i] if i < len(r) else None for r in each] for i in range(most)]
    # not public, but what sacreBLEU's own significance tests are built on
    rows = np.asarray(metric._extract_corpus_statistics(flat, columns), dtype=float)
    owner = np.repeat(np.arange(len(groups)), [len(g) for g in groups])
    total = np.zeros((len(groups), rows.shape[1]))
    np.add.at(total, owner, rows)
    return total


def _bleu(counts: Float[np.ndarray, "rows counts"]) -> Float[np.ndarray, "rows"]:
    """BLEU, 0..100, of [length, reference length, 4 × correct, 4 × total] in each row."""
    length, reference = counts[:, 0], counts[:, 1]
    correct, total = counts[:, 2 : 2 + _BLEU_ORDERS], counts[:, 2 + _BLEU_ORDERS :]
    with np.errstate(divide="ignore", invalid="ignore"):
        none = (correct == 0) & (total > 0)
        smoothed = np.cumprod(np.where(none, 0.5, 1.0), axis=1)
        precision = np.where(none, smoothed / total, correct / total)
        logs = np.log(precision).sum(1) / _BLEU_ORDERS
        brevity = np.minimum(0.0, 1 - reference / length)
        score = 100 * np.exp(logs + brevity)
    return np.where((correct.sum(1) > 0) & (total.min(1) > 0), score, 0.0)


def _chrf(counts: Float[np.ndarray, "rows counts"]) -> Float[np.ndarray, "rows"]:
    """chrF2, 0..100, of 6 × [hypothesis, reference, match] in each row."""
    hypothesis, reference, match = counts.reshape(-1, _CHRF_ORDERS, 3).transpose(2, 0, 1)
    counted = (hypothesis > 0) & (reference > 0)
    orders = np.maximum(counted.sum(1), 1)
    precision = np.divide(match, hypothesis, out=np.zeros_like(match), where=counted).sum(1)
    recall = np.divide(match, reference, out=np.zeros_like(match), where=counted).sum(1)
    precision, recall = precision / orders, recall / orders
    below = 4 * precision + recall
    return 100 * np.divide(5 * precision * recall, below, out=np.zeros_like(below), where=below > 0)
