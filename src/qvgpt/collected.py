"""The file that `collect` leaves: how far it got, and what it holds in all."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from qvgpt.data.files import KNOWN
from qvgpt.data.rows import Row
from qvgpt.errors import QvgptError


def kept_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Prompt, references and metadata of a row, without what it says of its own completions.

    Nor does it keep what `collect` will say under these names, the row being one of its own.
    """
    dropped = (KNOWN | {"judged_by", "length_limited", "sampled"}) - {"prompt", "prompt_ids"}
    kept = {k: v for k, v in fields.items() if k not in dropped}
    own = fields.get("completion")
    if fields.get("references") or isinstance(own, str):
        kept["references"] = list(fields.get("references") or [own])
    return kept


def whole_chunks(file: Path, rows: Sequence[Row], size: int) -> int:
    """How many rows are collected already; what follows the last whole chunk is cut off.

    Raises `QvgptError` where a row is no longer what it was: its texts were written to another
    prompt, or judged by other references.

    Rows of a broken chunk could be kept, but then the rest of it would be sampled in batches of
    another make-up, whose rounding might change a token.
    """
    if not file.exists():
        return 0
    whole = kept = length = 0
    for number, (row, (line, size_of)) in enumerate(zip(rows, lines(file), strict=False), 1):
        for name, value in kept_fields(row.fields).items():
            if json.dumps(line.get(name)) != json.dumps(value):
                raise QvgptError(
                    f"{file}:{number}: another {name} than now at {row.where}; collect anew"
                )
        length += size_of
        if number % size == 0 or number == len(rows):
            whole, kept = number, length
    with file.open("r+b") as content:
        content.truncate(kept)
    return whole


def as_line(row: dict[str, Any]) -> bytes:
    """A row as JSONL. Half a character, as `\\ud83d` in metadata, stays escaped: UTF-8 has none."""
    try:
        return f"{json.dumps(row, ensure_ascii=False)}\n".encode()
    except UnicodeEncodeError:
        return f"{json.dumps(row)}\n".encode()


def lines(file: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """The whole lines of a file up to the first broken one, each with its length in bytes."""
    with file.open("rb") as whole:
        for line in whole:
            try:
                content = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                content = None
            if not isinstance(content, dict):
                return
            yield content, len(line)


def summary(file: Path) -> dict[str, Any]:
    """Counts and rewards of what the model wrote; references that were added count for nothing.

    Of texts from a server the tokens are unknown.
    """
    returns: list[list[float]] = []
    distinct: list[int] = []
    limited: list[bool] = []
    tokens = references_added = 0
    known = True
    for line, _ in lines(file):
        n = line["sampled"]
        given = line.get("rewards") or [float(sum(r)) for r in line["token_rewards"]]
        returns.append(given[:n])
        ids = line.get("completion_ids")
        if ids is None:
            known = False
            distinct.append(len(set(line["completions"][:n])))
        else:
            distinct.append(len({tuple(i) for i in ids[:n]}))
            tokens += sum(map(len, ids[:n]))
        limited += line["length_limited"][:n]
        references_added += len(line["completions"]) - n
    flat = [value for group in returns for value in group]
    return {
        "prompts": len(returns),
        "samples": len(flat),
        "references_added": references_added,
        "tokens": tokens if known else None,
        "reward_mean": fmean(flat),
        "reward_std": pstdev(flat),
        "reward_std_within_prompt": fmean(pstdev(group) for group in returns),
        "distinct_per_prompt": fmean(distinct),
        "length_limited_share": fmean(limited),
    }
