"""One file of rows → rows to learn from, and rows of other prompts to choose and to judge by."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qvgpt.data.files import Row, read_rows, row_texts
from qvgpt.errors import QvgptError

SIDES = ("train", "val", "test")


def check_shares(shares: Sequence[float]) -> None:
    """Raise `QvgptError` for shares that leave no side a row."""
    if len(shares) > 2 or not all(0 < s < 1 for s in shares) or not sum(shares) < 1:
        raise QvgptError(
            f"split: {[*shares]}: expected a share for val, and perhaps one for test, each above 0,"
            " together below 1"
        )


def split_rows(paths: Sequence[str | Path], shares: Sequence[float]) -> dict[str, list[Row]]:
    """The rows of each side, in their order: `val` gets the first of `shares`, `test` the second.

    All rows of one prompt are on one side, and stay there when rows are added: a hash of its
    letters and digits decides. Raises `QvgptError` for faulty rows and where a side stays empty.
    """
    check_shares(shares)
    sides: dict[str, list[Row]] = {name: [] for name in SIDES[: 1 + len(shares)]}
    prompts = set[str]()
    for path in paths:
        for row in read_rows(path):
            prompts.add(prompt := _prompt(row))
            digest = hashlib.sha256(prompt.encode(errors="replace")).digest()
            place = int.from_bytes(digest[:8]) / 2**64
            held = place < sum(shares)
            name = "train" if not held else "val" if place < shares[0] else "test"
            sides[name].append(row)
    if empty := [name for name, rows in sides.items() if not rows]:
        less = "smaller shares" if empty[0] == "train" else "a larger share"
        raise QvgptError(
            f"split: {empty[0]} would have no rows: there are {len(prompts)} different prompts; "
            f"give {less}, or more data"
        )
    return sides


def write_split(sides: dict[str, list[Row]], folder: Path) -> dict[str, int]:
    """Write `train.jsonl`, `val.jsonl` and `test.jsonl`; returns how many rows each has.

    Those of an earlier split go.
    """
    for name in SIDES:
        (folder / f"{name}.jsonl").unlink(missing_ok=True)
    for name, rows in sides.items():
        lines = (json.dumps(row.fields, ensure_ascii=False, default=str) + "\n" for row in rows)
        file = folder / f"{name}.jsonl"
        file.write_text("".join(lines), "utf-8", errors="backslashreplace")  # half a character
    return {name: len(rows) for name, rows in sides.items()}


def _prompt(row: Row) -> str:
    """The letters and digits of what a row is to be answered: its prompt, of a dialogue all before
    the last answer, else all its text."""
    fields = row.fields
    before: Any = fields.get("prompt", fields.get("prompt_ids"))
    messages = fields.get("messages")
    if isinstance(messages, list):
        before = messages[: _last_answer(messages)]
    elif before is None and isinstance(fields.get("chosen"), list):
        before = fields["chosen"][:-1]
    if isinstance(before, list) and all(isinstance(m, dict) for m in before):
        before = "\n".join(str(m.get("content")) for m in before)
    text = before if isinstance(before, str) else json.dumps(before or "")
    found = "".join(c for c in text.casefold() if c.isalnum())
    return found or "\n".join(row_texts(row))


def _last_answer(messages: list[Any]) -> int | None:
    """The index of the last message of the assistant."""
    answers = [i for i, m in enumerate(messages) if isinstance(m, dict)]
    return max((i for i in answers if messages[i].get("role") == "assistant"), default=None)
