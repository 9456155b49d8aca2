"""Files of rows: JSONL, CSV or a `datasets` directory → `Row`, every fault with file and row.

Columns that are neither known nor nearly so are metadata, which environments and rewards read
from `Row.fields`. What a row means is said in `rows.py`.
"""

import csv
import difflib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from qvgpt.errors import QvgptError, nearest

_PROMPT = {"prompt", "prompt_ids", "truncated", "references"}
FORMS: dict[str, set[str]] = {
    "chosen": _PROMPT | {"chosen", "rejected", "completion_ids"},
    "completions": _PROMPT | {"completions", "rewards", "completion_ids", "token_rewards"},
    "steps": _PROMPT | {"steps", "rewards"},
    "completion": _PROMPT | {"completion", "reward", "label", "completion_ids", "token_rewards"},
    "messages": {"messages", "reward", "truncated", "references"},
    "text": {"text", "reward", "token_rewards", "truncated", "references", "label"},
}
"""The column that makes each form, first match first, and the known columns that go with it."""
KNOWN = frozenset().union(*FORMS.values())
_LISTS = KNOWN - {"prompt", "completion", "text", "chosen", "rejected", "reward", "label"}


class DataError(QvgptError):
    """A fault in the data: `where` (file and row), `column` (None: the row), `problem`."""

    def __init__(self, where: str, column: str | None, problem: str):
        self.where, self.column, self.problem = where, column, problem
        named = "" if column is None else f"column {column!r}: "
        super().__init__(f"{where}: {named}{problem}")


@dataclass(frozen=True)
class Row:
    """One row as read, with its nulls left out."""

    where: str
    """File and line, as in `file.jsonl:17`."""
    fields: dict[str, Any]

    def fault(self, column: str | None, problem: str) -> DataError:
        """The error to raise for this row."""
        return DataError(self.where, column, problem)


def path_list(paths: str | Path | Iterable[str | Path]) -> list[str | Path]:
    """One path or several, as a list."""
    return [paths] if isinstance(paths, str | Path) else list(paths)


def read_rows(path: str | Path) -> Iterator[Row]:
    """The rows of a JSONL or CSV file or a `datasets` directory; `DataError` at the first fault."""
    for row in scan_rows(path):
        if isinstance(row, DataError):
            raise row
        yield row


def scan_rows(path: str | Path) -> Iterator[Row | DataError]:
    """As `read_rows`, but a faulty row is handed on as its error and reading goes on."""
    file, found = Path(path), False
    if file.is_dir():
        rows = _scan_dataset(file)
    elif not file.is_file():
        rows = iter([DataError(str(path), None, "no such file")])
    elif file.suffix == ".csv":
        rows = _scan_csv(file)
    elif file.suffix in (".jsonl", ".ndjson", ".json"):
        rows = _scan_jsonl(file)
    else:
        expected = "expected .jsonl, .csv or a directory that `datasets` saved"
        rows = iter([DataError(str(path), None, f"unknown kind of file: {expected}")])
    for row in rows:
        found = True
        yield row
    if not found:
        yield DataError(str(path), None, "the file is empty: expected one row a line")


def _scan_jsonl(file: Path) -> Iterator[Row | DataError]:
    with file.open("rb") as lines:  # bytes, so that one line that is not UTF-8 spoils no other
        for number, line in enumerate(lines, 1):
            where = f"{file}:{number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                fields = json.loads(text) if text else None
            except UnicodeDecodeError:
                yield DataError(where, None, "not UTF-8: save the file in that encoding")
                continue
            except json.JSONDecodeError as error:
                yield DataError(where, None, f"not JSON: {error.msg} at character {error.pos + 1}")
                continue
            except (ValueError, RecursionError) as error:  # thousands of digits, or of brackets
                yield DataError(where, None, f"not JSON that can be read: {error}")
                continue
            if text and not isinstance(fields, dict):
                kind = kind_of(fields)
                yield DataError(where, None, f"expected one JSON object a line, found {kind}")
            elif isinstance(fields, dict):
                yield _row(where, fields)


def _scan_csv(file: Path) -> Iterator[Row | DataError]:
    csv.field_size_limit(2**31 - 1)  # the module's own limit, 128 KiB, is less than a long text
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader, start = csv.DictReader(lines, strict=True), 2
        try:
            names = list(reader.fieldnames or ())
            if twice := next((n for i, n in enumerate(names) if n in names[:i]), None):
                yield DataError(f"{file}:1", twice, "stands twice in the header: rename one")
                return
            for cells in reader:
                where, start = f"{file}:{start}", reader.line_num + 1
                if None in cells or None in cells.values():
                    columns = len(reader.fieldnames or ())
                    yield DataError(where, None, f"expected {columns} cells, as in the header")
                else:
                    yield _row(where, {k: _cell(k, v) for k, v in cells.items()})
        except (csv.Error, UnicodeDecodeError) as error:
            yield DataError(f"{file}:{start}", None, f"not CSV in UTF-8: {error}")


def _cell(column: str, text: str) -> Any:
    """A cell of a known column, typed; text that does not parse stays text, to be reported."""
    if text == "" and column in KNOWN - {"prompt", "completion", "text"}:
        return None
    if column in ("label", "truncated") and text.lower() in ("true", "false", "1", "0"):
        return text.lower() in ("true", "1")
    try:
        return float(text) if column == "reward" else json.loads(text) if column in _LISTS else text
    except ValueError:
        return text


def _scan_dataset(folder: Path) -> Iterator[Row | DataError]:
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(p.name for p in folder.iterdir() if p.is_dir())
        yield DataError(str(folder), None, f"holds several splits: name one of {splits} after a /")
        return
    if not (folder / "dataset_info.json").is_file():
        yield DataError(str(folder), None, "a directory, but not one that `datasets` saved")
        return
    try:
        from datasets import load_from_disk  # pyright: ignore[reportMissingImports]
    except ImportError:
        yield DataError(str(folder), None, "to read this, `pip install datasets`")
        return
    for number, fields in enumerate(load_from_disk(str(folder)), 1):
        yield _row(f"{folder}:{number}", dict(fields))


def _row(where: str, fields: dict[str, Any]) -> Row | DataError:
    present = {k: v for k, v in fields.items() if v is not None}
    for column in present:
        meant = _meant(column)
        if meant is not None and meant not in present:
            hint = nearest(meant, KNOWN)
            return DataError(where, column, f"unknown{hint}: rename it, or name it less alike")
    return Row(where, present)


@lru_cache(maxsize=1000)
def _meant(column: str) -> str | None:
    """The known column that an unknown one nearly spells."""
    if column in KNOWN or column == "prompt_id":  # common in public data sets: a row's key
        return None
    plain = column.strip().lower()
    return next(iter(difflib.get_close_matches(plain, sorted(KNOWN), 1, cutoff=0.85)), None)


def row_texts(row: Row) -> list[str]:
    """Every text of a row that becomes tokens: what a tokenizer is trained on.

    Texts with half a character (a lone surrogate) are left out; as rows they are faults.
    """
    found = []
    for column in ("text", "prompt", "completion", "completions", "steps", "chosen", "rejected",
                   "messages"):  # fmt: skip
        value = row.fields.get(column, [])
        for part in value if isinstance(value, list) else [value]:
            inner = part if isinstance(part, list) else [part]  # K samples of messages
            found += [p.get("content") if isinstance(p, dict) else p for p in inner]
    return [text for text in found if isinstance(text, str) and _is_whole(text)]


def _is_whole(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def kind_of(value: Any) -> str:
    """What a value is, in the words of JSON, and the value itself where it is short."""
    words = {list: "a list", dict: "an object", type(None): "nothing"}
    short = repr(value)
    return words.get(type(value), short if len(short) <= 40 else short[:37] + "...")
