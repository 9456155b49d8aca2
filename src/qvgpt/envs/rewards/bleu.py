"""Sentence BLEU of texts that grow: one n-gram count for each new word."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

from qvgpt.envs.rewards.metric import Metric, Row, optional, references
from qvgpt.errors import QvgptError

_ORDERS = 4  # BLEU's longest n-gram
_TOKENIZERS = {
    "13a": ("sacrebleu.tokenizers.tokenizer_13a", "Tokenizer13a"),
    "zh": ("sacrebleu.tokenizers.tokenizer_zh", "TokenizerZh"),
}


def bleu(tokenize: str = "") -> Metric:
    """The reward; `tokenize` is sacreBLEU's "13a" or, for Chinese, "zh"."""
    kind = tokenize or "13a"
    if kind not in _TOKENIZERS:
        raise QvgptError(f"bleu:{tokenize}: BLEU's words are those of {' or '.join(_TOKENIZERS)}")
    _tokenizer(kind)  # a missing package shows here, not after an hour of sampling

    def prefix_scores(texts: list[str], row: Row, brevity: bool) -> list[float]:
        return bleu_prefixes(texts, row, brevity, kind)

    name = f"bleu:{tokenize}" if tokenize else "bleu"
    return Metric(name, lambda text, row: prefix_scores([text], row, True)[0], prefix_scores)


def bleu_prefixes(
    texts: list[str], row: Row, brevity: bool = True, tokenize: str = "13a"
) -> list[float]:
    """Sentence BLEU, 0..1, of each text: quick where each only adds to the one before.

    Equals sacreBLEU's `sentence_score` (effective order, exponential smoothing). With
    `brevity=False` only the last text pays the brevity penalty.
    """
    reference = _bleu_reference(references(row), tokenize)
    growing = _GrowingBleu(reference)
    scores: list[float] = []
    for i, text in enumerate(texts):
        last = i == len(texts) - 1
        if i and text == texts[i - 1] and (brevity or not last):
            scores.append(scores[-1])
            continue
        growing.read(_words(text, tokenize))
        scores.append(growing.score(brevity or last))
    return scores


@dataclass(frozen=True)
class _BleuReference:
    """What BLEU needs of a row's references."""

    most: dict[tuple[str, ...], int]
    """n-gram → its largest count in one reference."""
    lengths: tuple[int, ...]
    """Words of each reference, ascending: of two equally close lengths the shorter counts."""


@lru_cache(maxsize=4096)  # the samples of one prompt come one after the other
def _bleu_reference(texts: tuple[str, ...], tokenize: str) -> _BleuReference:
    most: dict[tuple[str, ...], int] = {}
    lengths = []
    for words in (_words(text, tokenize) for text in texts):
        counts = Counter(
            tuple(words[i : i + n])
            for n in range(1, _ORDERS + 1)
            for i in range(len(words) - n + 1)
        )
        for gram, count in counts.items():
            most[gram] = max(most.get(gram, 0), count)
        lengths.append(len(words))
    return _BleuReference(most, tuple(sorted(lengths)))


@dataclass
class _GrowingBleu:
    """BLEU of a text that grows (or loses its last words) with one n-gram count per new word."""

    reference: _BleuReference
    words: list[str] = field(default_factory=list)
    seen: dict[tuple[str, ...], int] = field(default_factory=dict)
    correct: list[tuple[int, ...]] = field(default_factory=lambda: [(0,) * _ORDERS])
    """Clipped matches of each order in the first 0, 1, … words."""

    def read(self, words: list[str]) -> None:
        """Become the text `words`, keeping what it shares with the text before."""
        shared = 0
        for old, new in zip(self.words, words, strict=False):
            if old != new:
                break
            shared += 1
        while len(self.words) > shared:
            for gram in self._known_endings():
                self.seen[gram] -= 1
            self.words.pop()
            self.correct.pop()
        for word in words[shared:]:
            self.words.append(word)
            correct = list(self.correct[-1])
            for gram in self._known_endings():
                count = self.seen[gram] = self.seen.get(gram, 0) + 1
                correct[len(gram) - 1] += count <= self.reference.most[gram]
            self.correct.append(tuple(correct))

    def _known_endings(self) -> list[tuple[str, ...]]:
        """The n-grams that end the text and occur in a reference, short to long."""
        endings = []
        for n in range(1, min(_ORDERS, len(self.words)) + 1):
            gram = tuple(self.words[-n:])
            if gram not in self.reference.most:
                break  # nor does any longer n-gram with this ending
            endings.append(gram)
        return endings

    def score(self, brevity: bool) -> float:
        """exp(mean log precision), times exp(1 − reference/length) for a text too short."""
        length, correct = len(self.words), self.correct[-1]
        if not any(correct):
            return 0.0
        smoothing, logs = 1.0, 0.0
        orders = min(_ORDERS, length)
        for n in range(1, orders + 1):
            matches = float(correct[n - 1])
            if not matches:
                smoothing *= 2
                matches = 1 / smoothing
            logs += math.log(matches / (length - n + 1))
        closest = min(self.reference.lengths, key=lambda r: abs(r - length))
        penalty = min(0.0, 1 - closest / length) if brevity else 0.0
        return math.exp(logs / orders + penalty)


@lru_cache(maxsize=2)
def _tokenizer(kind: str) -> Callable[[str], str]:
    module, name = _TOKENIZERS[kind]
    return getattr(optional(module, "bleu"), name)()


def _words(text: str, tokenize: str) -> list[str]:
    return _tokenizer(tokenize)(text.rstrip()).split()
