"""Rewards that compare a text with references, by words or characters.

In Chinese and Japanese, which put no space between words, a character counts as a word.
"""

import re
import string
from collections import Counter
from decimal import Decimal, InvalidOperation

from qvgpt.envs.rewards.metric import Metric, Row, optional, references, words


def chrf() -> Metric:
    """sacreBLEU's chrF2, 0..1."""
    scorer = optional("sacrebleu.metrics", "chrf").CHRF()
    return Metric(
        "chrf", lambda text, row: scorer.sentence_score(text, references(row)).score / 100
    )


class _RougeWords:
    """Lower-cased words: on ASCII text rouge-score's own, elsewhere it would drop the letters."""

    _WORD = re.compile(
        r"[^\x00-\x20!-/:-@\[-`{-\x7f\x80-\xa9\xab-\xb4\xb6-\xb9\xbb-\xbf\s"
        r"\u2010-\u205e\u3000-\u303f\uff01-\uff0f\uff1a-\uff20]+"  # “ ” ’ – … 。 ，
    )

    def tokenize(self, text: str) -> list[str]:
        return [w for part in self._WORD.findall(text.lower()) for w in words(part)]


def rouge(kind: str) -> Metric:
    """F1 of rouge-score's `kind` (1, 2 or L), 0..1; of several references the best counts."""
    name, key = f"rouge_{kind.lower()}", f"rouge{kind}"
    scorer = optional("rouge_score.rouge_scorer", name).RougeScorer([key], tokenizer=_RougeWords())
    return Metric(name, lambda text, row: scorer.score_multi(references(row), text)[key].fmeasure)


def normalise_answer(text: str) -> str:
    """SQuAD's normalisation: lower case, no ASCII punctuation, no a/an/the, single spaces.

    Beyond SQuAD's, as in CMRC 2018: no Chinese punctuation either, and a Chinese character stands
    alone.
    """
    text = text.lower().translate(_NO_PUNCTUATION)
    return " ".join(words(re.sub(r"\b(a|an|the)\b", " ", text)))


def exact_match(completion: str, row: Row) -> float:
    """1 if a reference equals the completion after normalisation, else 0."""
    answers = map(normalise_answer, references(row))
    return float(normalise_answer(completion) in answers)


def token_f1(completion: str, row: Row) -> float:
    """The best F1 of shared words over the references; two empty answers agree (SQuAD 2.0)."""
    said = normalise_answer(completion).split()
    return max(_f1(said, normalise_answer(r).split()) for r in references(row))


def number(completion: str, row: Row) -> float:
    """1 if the last number in the completion is the last one of a reference, else 0."""
    said = _last_number(completion)
    return float(said is not None and said in map(_last_number, references(row)))


def _last_number(text: str) -> Decimal | None:
    found = _NUMBER.findall(text)
    try:
        return Decimal(found[-1].replace(",", "").replace("−", "-")) if found else None
    except InvalidOperation:
        return None


def _f1(said: list[str], wanted: list[str]) -> float:
    if not said or not wanted:
        return float(said == wanted)
    shared = (Counter(said) & Counter(wanted)).total()
    return 2 * shared / (len(said) + len(wanted))


_CHINESE_PUNCTUATION = "。，、；：？！（）《》〈〉【】「」『』～．"
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation + _CHINESE_PUNCTUATION)
_NUMBER = re.compile(
    r"(?:(?<![\w.])[-−])?"
    r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d|,\d)|\d+)(?:\.\d+)?|(?<![\w.])\.\d+)"
    r"(?:[eE][+-]?\d+)?"
)
