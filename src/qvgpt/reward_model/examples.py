"""Rows with a judgement → what a reward model learns from."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from qvgpt.data.files import Row, kind_of, read_rows
from qvgpt.envs.rewards.classifier import Reads, read_text
from qvgpt.errors import QvgptError
from qvgpt.model_card import files_of

Kind = Literal["classes", "scores", "preferences"]
Text = tuple[str, str | None]
"""A text, and its pair or None."""


@dataclass(frozen=True)
class Example:
    """One judged text; of a preference two, the better first."""

    texts: tuple[Text, ...]
    target: float
    """The index of the class, the score, or 1 for a preference."""
    group: str = ""
    """What is held out together: of preferences and several samples the prompt, else the text."""


@dataclass(frozen=True)
class Examples:
    """All examples of some files."""

    kind: Kind
    items: list[Example]
    labels: list[str] = field(default_factory=list)
    """Names of the classes, in the order of their indices."""
    values: list[str] = field(default_factory=list)
    """What the data call them."""
    files: list[dict[str, Any]] = field(default_factory=list)
    """What they were read from, as `model_card.files_of` has it."""

    @property
    def texts(self) -> list[str]:
        """Every text, to train a tokenizer on."""
        return [part for e in self.items for text in e.texts for part in text if part is not None]

    def counts(self) -> dict[str, Any]:
        """For the summary."""
        found: dict[str, Any] = {"examples": len(self.items), "files": self.files}
        if self.kind == "classes":
            by_class = Counter(int(e.target) for e in self.items)
            found["of_label"] = {name: by_class[i] for i, name in enumerate(self.labels)}
        return found


def load_examples(
    paths: Sequence[str],
    reads: Reads,
    target: str | None = None,
    known: Sequence[str] | None = None,
    names: Sequence[str] = (),
) -> Examples:
    """The examples of files of rows (`data/files.py` says which).

    A row is `text`, or `prompt` and `completion` (of which `reads` says what is read), with a class
    in `label` or a number in `score` or `reward`; `completions` with `rewards`; or `chosen` and
    `rejected`. `target` names another column: of numbers that are not all whole scores, else
    classes. `known` are the values of label that training has
    seen, in order; `names` what to call them. Raises `QvgptError`, naming the row, for one that is
    not like the first.
    """
    found: list[tuple[tuple[Text, ...], Any, Row]] = []
    column = target
    for path in paths:
        for row in read_rows(path):
            if column is None:
                column = _column(row)
            found += [(texts, value, row) for texts, value in _judged(row, column, reads)]
    if not found:
        raise QvgptError("data: there is no row to learn from")
    assert column is not None
    files = files_of(paths)
    if column == "chosen":
        items = [Example(t, 1.0, _group(t, row)) for t, _, row in found]
        return Examples("preferences", items, files=files)
    scores = column in ("score", "reward", "rewards")
    if scores or (column != "label" and _are_scores([v for _, v, _ in found])):
        items = [Example(t, _number(row, column, v), _group(t, row)) for t, v, row in found]
        return Examples("scores", items, files=files)
    values = [_label(row, column, value) for _, value, row in found]
    order = list(known) if known else _ordered(values)
    index = {value: i for i, value in enumerate(order)}
    for value, (_, _, row) in zip(values, found, strict=True):
        if value not in index:
            raise row.fault(column, f"label {value!r} is not among those trained on: {order}")
    if len(order) < 2:
        raise QvgptError(f"data: every label is {order[0]!r}; two classes or more are needed")
    if names and len(names) != len(order):
        raise QvgptError(f"labels: {len(order)} names were expected, for the values {order}")
    items = [
        Example(t, float(index[v]), _group(t, row))
        for (t, _, row), v in zip(found, values, strict=True)
    ]
    return Examples("classes", items, list(names) or order, order, files)


def split(examples: Examples, share: float) -> tuple[Examples, Examples]:
    """Examples to learn from and to hold out, told by a hash of the text.

    Equal texts are on the same side; of preferences and of several samples all of one prompt, where
    they have one. Raises `QvgptError` where one side is empty.
    """
    alike = len({e.group for e in examples.items}) == 1  # one prompt for all: it tells nothing
    groups = [_whole(e.texts[0]) if alike else e.group for e in examples.items]
    held = [_fraction(group) < share for group in groups]
    sides = [
        replace(examples, items=[e for e, h in zip(examples.items, held, strict=True) if h is side])
        for side in (False, True)
    ]
    if not sides[0].items or not sides[1].items:
        raise QvgptError(
            f"eval_share: {share:g} of {len(examples.items)} examples leaves none to learn from or "
            "none to judge by; give eval_data"
        )
    return sides[0], sides[1]


def _group(texts: tuple[Text, ...], row: Row) -> str:
    if {"chosen", "completions"} & row.fields.keys() and "prompt" in row.fields:
        return json.dumps(row.fields["prompt"])
    return _whole(texts[0])


def _whole(text: Text) -> str:
    return "\0".join(part or "" for part in text)


def _fraction(group: str) -> float:
    digest = hashlib.sha256(group.encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64


def _column(row: Row) -> str:
    for column in ("chosen", "label", "score", "rewards", "reward"):
        if column in row.fields:
            return column
    raise row.fault(None, "nothing to learn: `label`, `score`, `reward` or `chosen` was expected")


def _judged(row: Row, column: str, reads: Reads) -> list[tuple[tuple[Text, ...], Any]]:
    """The texts of a row, each with what was thought of it."""
    fields = row.fields
    if column == "chosen":
        texts = [_text(row, name, fields.get(name)) for name in ("chosen", "rejected")]
        return [(tuple(read_text(reads, fields, text) for text in texts), None)]
    if column not in fields:
        raise row.fault(column, f"missing, where other rows have it; found {sorted(fields)}")
    if isinstance(fields.get("completions"), list):
        values = fields[column]
        if not isinstance(values, list) or len(values) != len(fields["completions"]):
            raise row.fault(column, "one for each of `completions` was expected")
        texts = [_text(row, "completions", text) for text in fields["completions"]]
        return [((read_text(reads, fields, t),), v) for t, v in zip(texts, values, strict=True)]
    if "text" in fields:
        return [(((_text(row, "text", fields["text"]), None),), fields[column])]
    text = _text(row, "completion", fields.get("completion"))
    return [((read_text(reads, fields, text),), fields[column])]


def _text(row: Row, column: str, value: Any) -> str:
    if not isinstance(value, str):
        raise row.fault(column, f"a text was expected, not {kind_of(value)}")
    return value


def _are_scores(values: Sequence[Any]) -> bool:
    """Numbers, not all of them whole; a CSV cell of a column of one's own is text."""
    try:
        numbers = [math.nan if isinstance(v, bool) else float(v) for v in values]
    except (TypeError, ValueError):
        return False
    whole = all(str(v).strip().removeprefix("-").isdecimal() for v in values)
    return all(map(math.isfinite, numbers)) and not whole


def _number(row: Row, column: str, value: Any) -> float:
    try:
        number = float(value)  # a CSV cell of a column of one's own is text
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise row.fault(column, f"a number was expected, not {kind_of(value)}")
    return number


def _label(row: Row, column: str, value: Any) -> str:
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, str | int) and str(value).strip():
        return str(value)
    raise row.fault(column, f"a class was expected, a text or a whole number: {kind_of(value)}")


def _ordered(values: Sequence[str]) -> list[str]:
    """Numbers by size, names by the alphabet."""
    different = set(values)
    if all(v.removeprefix("-").isdecimal() for v in different):
        return sorted(different, key=int)
    return sorted(different)
