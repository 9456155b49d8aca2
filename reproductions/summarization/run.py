"""Summaries of dialogues on DialogSum: ROUGE.

    python reproductions/summarization/run.py DATA --work DIR [--seeds N]
    python reproductions/summarization/run.py --quick     a toy of the same form, nothing kept

DATA holds dialogsum.{train,dev}.jsonl: dev is reported, and a hash of the dialogue takes a
twentieth of the training rows to choose on. Writes results.json, table.md and picture.html beside
itself.
"""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent))

from texts.program import Task, main  # noqa: E402
from texts.steps import Files, divided, read, write  # noqa: E402


def prepare(data: Path, to: Path) -> Files:
    train, validation = to / "train.jsonl", to / "validation.jsonl"
    if not validation.exists():
        rows = read(data / "dialogsum.train.jsonl")
        parts = divided(rows, {"train": 0.95, "validation": 0.05})
        write(train, parts["train"])
        write(validation, parts["validation"])
    return Files(train, train, validation, data / "dialogsum.dev.jsonl")


def toy(data: Path) -> None:
    names = ("Ann", "Bob", "Eve", "Max")
    said = [(x, y, n) for n in range(8) for x in names for y in names if x != y]
    rows = [
        {"prompt": f"{x}: Hello, {y}.\n{y}: I have {n} apples.", "completion": f"{y} has {n}."}
        for x, y, n in said
    ]
    write(data / "dialogsum.train.jsonl", rows)
    write(data / "dialogsum.dev.jsonl", rows[:6])


if __name__ == "__main__":
    metrics = ("rouge_l", "rouge_1", "rouge_2")
    task = Task(HERE / "recipe.yaml", metrics, prepare, toy, seeds=1)
    main(HERE, "Summaries of dialogues", {"DialogSum": task})
