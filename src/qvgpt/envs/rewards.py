"""How good is a text: metrics as rewards by name, and their shaping over every token.

    bleu         sentence BLEU as sacreBLEU's (13a, effective order, exponential smoothing), 0..1
    chrf         sacreBLEU's chrF2, 0..1
    rouge_l      F1 of the longest common subsequence of words, 0..1 (rouge-score)
    rouge_2      F1 of word pairs, 0..1 (rouge-score)
    exact_match  1 if equal to a reference after SQuAD's normalisation, else 0
    token_f1     F1 of the bag of words after SQuAD's normalisation, 0..1
    length       words between white space; positive, so it teaches *longer* text
    module:function   any callable of (completion, row), looked up from the working directory too

References are `row["references"]`, else `[row["completion"]]`; of several the best counts (BLEU
and chrF join them as sacreBLEU does).
"""

import importlib
import math
import os
import re
import string
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from types import ModuleType
from typing import Any

from qvgpt.data.files import kind_of
from qvgpt.data.tokenizer import Tokenizer
from qvgpt.envs.env import Reward
from qvgpt.errors import QvgptError, nearest

Row = Mapping[str, Any]
_ORDERS = 4  # BLEU's longest n-gram


@dataclass(frozen=True)
class Metric:
    """A named reward that scores one completion at a time."""

    name: str
    score: Callable[[str, Row], float]
    """(completion, row) → score."""
    prefix_scores: Callable[[list[str], Row, bool], list[float]] | None = None
    """(growing prefixes, row, brevity) → one score each, where that is cheaper than one by one."""

    def __call__(self, completions: list[str], rows: list[Row]) -> list[float]:
        """One score per completion. Raises `QvgptError` for one that is no finite number."""
        scores = [float(self.score(text, row)) for text, row in zip(completions, rows, strict=True)]
        for i, (score, row) in enumerate(zip(scores, rows, strict=True), start=1):
            if not math.isfinite(score):
                prompt = str(row.get("prompt", ""))[:60]
                raise QvgptError(
                    f"reward {self.name!r} is {score} for row {i} of {len(rows)} "
                    f"(prompt {prompt!r}): expected a finite number"
                )
        return scores


def get_reward(spec: str) -> Metric:
    """The reward of that name, or the callable `module:function`.

    Raises `QvgptError` for an unknown name, a missing package, module or function.
    """
    if ":" in spec:
        return _from_module(spec)
    if spec not in _BUILT_IN:
        names = ", ".join(_BUILT_IN)
        hint = nearest(spec, _BUILT_IN)
        raise QvgptError(f"no reward {spec!r}{hint}; there are {names} and module:function")
    return _BUILT_IN[spec]()


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


def compares(name: str) -> bool:
    """Whether the reward of that name reads `references`; what a callable reads is not known."""
    return name in _BUILT_IN and name != "length"


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
        return Metric(f"expected {reward.name}", score)

    def prefix_scores(texts: list[str], row: Row, brevity: bool) -> list[float]:
        columns = [[w * x for x in in_one(texts, one, brevity)] for w, one in weighted(row)]
        return [sum(column) for column in zip(*columns, strict=True)]

    return Metric(f"expected {reward.name}", score, prefix_scores)


def shape(
    reward: Reward,
    tokens: Sequence[Sequence[int]],
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    *,
    brevity: bool = True,
) -> list[list[float]]:
    """Spread a text's score over its tokens: r_t = Φ(tokens[:t]) − Φ(tokens[:t−1]), Φ() = 0.

    `tokens` are completions as sampled, end token included, which earns 0 since it adds no text.
    Σ_t r_t is the score of the whole text, so the return and the best policy stay what they were
    (potential-based shaping: Ng, Harada & Russell 1999); only the credit comes earlier.

    BLEU's brevity penalty holds every early prefix near 0, so that most reward arrives late.
    `brevity=False` leaves it out of Φ except for the last token, which settles the difference:
    it then carries a negative reward where the text is too short. The sum is unchanged.

    Every prefix of every completion is scored: a metric other than BLEU costs time × its price.
    Raises `QvgptError` for an empty completion, or `brevity=False` with another metric than BLEU.
    """
    if any(not completion for completion in tokens):
        raise QvgptError("an empty completion has no token to carry a reward")
    prefixes = [
        [tokenizer.decode(whole[:t]) for t in range(1, len(whole))]
        + [tokenizer.decode_completion(whole)]
        for whole in tokens
    ]
    in_one = getattr(reward, "prefix_scores", None)
    if in_one is not None:
        pairs = zip(prefixes, rows, strict=True)
        return [_differences(in_one(texts, row, brevity)) for texts, row in pairs]
    if not brevity:
        raise QvgptError("brevity=False is for the reward 'bleu': others have no brevity penalty")
    repeated = [row for texts, row in zip(prefixes, rows, strict=True) for _ in texts]
    scores = iter(reward([text for texts in prefixes for text in texts], repeated))
    return [_differences([next(scores) for _ in texts]) for texts in prefixes]


def bleu_prefixes(texts: list[str], row: Row, brevity: bool = True) -> list[float]:
    """Sentence BLEU, 0..1, of each text: quick where each only adds to the one before.

    Equals sacreBLEU's `sentence_score` (13a, effective order, exponential smoothing). With
    `brevity=False` only the last text pays the brevity penalty.
    """
    reference = _bleu_reference(references(row))
    growing = _GrowingBleu(reference)
    scores: list[float] = []
    for i, text in enumerate(texts):
        last = i == len(texts) - 1
        if i and text == texts[i - 1] and (brevity or not last):
            scores.append(scores[-1])
            continue
        growing.read(_words_13a(text))
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
def _bleu_reference(texts: tuple[str, ...]) -> _BleuReference:
    most: dict[tuple[str, ...], int] = {}
    lengths = []
    for words in map(_words_13a, texts):
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


@lru_cache(maxsize=1)
def _tokenizer_13a() -> Callable[[str], str]:
    return _optional("sacrebleu.tokenizers.tokenizer_13a", "bleu").Tokenizer13a()


def _words_13a(text: str) -> list[str]:
    return _tokenizer_13a()(text.rstrip()).split()


def _bleu() -> Metric:
    _tokenizer_13a()  # a missing package shows here, not after an hour of sampling
    return Metric("bleu", lambda text, row: bleu_prefixes([text], row)[0], bleu_prefixes)


def _chrf() -> Metric:
    chrf = _optional("sacrebleu.metrics", "chrf").CHRF()
    return Metric("chrf", lambda text, row: chrf.sentence_score(text, references(row)).score / 100)


class _RougeWords:
    """Lower-cased words: on ASCII text rouge-score's own, elsewhere it would drop the letters."""

    _WORD = re.compile(
        r"[^\x00-\x20!-/:-@\[-`{-\x7f\x80-\xa9\xab-\xb4\xb6-\xb9\xbb-\xbf\s"
        r"\u2010-\u205e\u3000-\u303f]+"  # punctuation outside ASCII: “ ” ’ – … 。
    )

    def tokenize(self, text: str) -> list[str]:
        return self._WORD.findall(text.lower())


def _rouge(name: str, kind: str) -> Metric:
    scorer = _optional("rouge_score.rouge_scorer", name).RougeScorer(
        [kind], tokenizer=_RougeWords()
    )
    return Metric(name, lambda text, row: scorer.score_multi(references(row), text)[kind].fmeasure)


def normalise_answer(text: str) -> str:
    """SQuAD's normalisation: lower case, no ASCII punctuation, no a/an/the, single spaces."""
    text = text.lower().translate(_NO_PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(completion: str, row: Row) -> float:
    """1 if a reference equals the completion after normalisation, else 0."""
    answers = map(normalise_answer, references(row))
    return float(normalise_answer(completion) in answers)


def token_f1(completion: str, row: Row) -> float:
    """The best F1 of shared words over the references; two empty answers agree (SQuAD 2.0)."""
    said = normalise_answer(completion).split()
    return max(_f1(said, normalise_answer(r).split()) for r in references(row))


def _f1(said: list[str], wanted: list[str]) -> float:
    if not said or not wanted:
        return float(said == wanted)
    shared = (Counter(said) & Counter(wanted)).total()
    return 2 * shared / (len(said) + len(wanted))


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
    return Metric(spec, function)


def _optional(module: str, reward: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0].replace("_", "-")
        raise QvgptError(f"reward {reward!r} needs {package}: pip install 'qvgpt[text]'") from error


def _differences(scores: list[float]) -> list[float]:
    return [b - a for a, b in zip([0.0, *scores], scores, strict=False)]


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_BUILT_IN: dict[str, Callable[[], Metric]] = {
    "bleu": _bleu,
    "chrf": _chrf,
    "rouge_l": lambda: _rouge("rouge_l", "rougeL"),
    "rouge_2": lambda: _rouge("rouge_2", "rouge2"),
    "exact_match": lambda: Metric("exact_match", exact_match),
    "token_f1": lambda: Metric("token_f1", token_f1),
    "length": lambda: Metric("length", lambda text, row: float(len(text.split()))),
}
