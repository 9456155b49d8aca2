"""Logs to try the recipe with: clerks who write dates as YYYY-MM-DD, a third of them wrongly.

`python examples/your_logs/make_logs.py` writes to runs/your_logs (or the directory named):
logs.jsonl (prompt, completion, references), and the same logs in the other forms that a row may
have: rewarded, rated, preferences, dialogues (.jsonl). `qvgpt check --split` holds prompts out of
these; of dialogues val_dialogues.jsonl has what is to be answered, none of it in dialogues.jsonl.
"""

import json
import random
import sys
from collections.abc import Container, Iterable
from pathlib import Path
from typing import Any

MONTHS = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"]
ASK = "Which day, please?"


def ways(year: int, month: int, day: int) -> tuple[str, str, list[str]]:
    """A date as people say it, as it is to be written, and as it is written wrongly."""
    said = random.choice(
        [f"{day} {MONTHS[month - 1]} {year}", f"{MONTHS[month - 1]} {day}, {year}"]
    )
    swapped = f"{year}-{day:02}-{month:02}"
    return (
        said,
        f"{year}-{month:02}-{day:02}",
        [swapped, f"{day}.{month}.{year}", f"{year}-{month}"],
    )


def rows(count: int, known: Container[str] = ()) -> list[dict[str, Any]]:
    """So many logged answers, to none of the `known` prompts; `reward` says whether right."""
    found = []
    while len(found) < count:
        year, month, day = random.randint(2020, 2029), random.randint(1, 12), random.randint(1, 28)
        if month == day:  # swapped is right there
            continue
        said, right, wrong = ways(year, month, day)
        if said in known:
            continue
        written = random.choice([right] * 6 + wrong)  # two thirds are right
        found.append(
            {"prompt": said, "completion": written, "references": [right], "wrong": wrong,
             "reward": float(written == right)}
        )  # fmt: skip
    return found


def dialogue(row: dict[str, Any]) -> list[dict[str, Any]]:
    """A row as a dialogue of two turns, the second rewarded."""
    return [
        {"role": "user", "content": "I need an appointment."},
        {"role": "assistant", "content": ASK},
        {"role": "user", "content": row["prompt"]},
        {"role": "assistant", "content": row["completion"], "reward": row["reward"]},
    ]


def write(file: Path, found: Iterable[dict[str, Any]]) -> None:
    """One JSON object a line."""
    file.write_text("".join(json.dumps(row) + "\n" for row in found))


def main(folder: Path, count: int = 1900, held_out: int = 200) -> None:
    """Write every file; the same ones whenever it is run."""
    random.seed(0)
    logs = rows(count)
    val = rows(held_out, {row["prompt"] for row in logs})
    folder.mkdir(parents=True, exist_ok=True)
    for name, columns in (
        ("logs", ("prompt", "completion", "references")),
        ("rewarded", ("prompt", "completion", "reward")),
    ):
        write(folder / f"{name}.jsonl", ({k: row[k] for k in columns} for row in logs))
    write(
        folder / "rated.jsonl",
        (
            {"prompt": row["prompt"], "completion": row["completion"], "label": row["reward"] == 1}
            for row in logs
        ),
    )
    write(
        folder / "preferences.jsonl",
        (
            {"prompt": row["prompt"], "chosen": row["references"][0],
             "rejected": random.choice(row["wrong"])}
            for row in logs
        ),
    )  # fmt: skip
    write(folder / "dialogues.jsonl", ({"messages": dialogue(row)} for row in logs))
    write(
        folder / "val_dialogues.jsonl",
        ({"prompt": dialogue(row)[:-1], "references": row["references"]} for row in val),
    )


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/your_logs"))
