"""Summaries of dialogues on DialogSum: ROUGE.

    python reproductions/summarization/run.py DATA --work DIR [--seeds N]
    python reproductions/summarization/run.py --quick     a toy of the same form, nothing kept

DATA holds dialogsum.{train,dev}.jsonl: dev is reported, and a hash of the dialogue takes a
twentieth of the training rows to choose on. A dialogue is told by its letters and digits alone:
many stand there more than once, with other spaces or punctuation, and what is in dev is not
learned from or chosen on. Of a dialogue that is to be summed up (one in ten is
longer) the lines within the first 1,200 characters are read. Writes results.json, table.md and
picture.html beside itself.
"""

import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent))

from texts.program import Task, main  # noqa: E402
from texts.steps import Files, Row, divided, read, write  # noqa: E402

from qvgpt.errors import QvgptError  # noqa: E402

CHARACTERS = 1200


def prepare(data: Path, to: Path) -> Files:
    files = Files(*(to / f"{n}.jsonl" for n in ("train", "prompts", "validation", "test")))
    if not files.test.exists():
        reported = read(data / "dialogsum.dev.jsonl")
        known = set(map(dialogue, reported))
        rows = [r for r in read(data / "dialogsum.train.jsonl") if dialogue(r) not in known]
        parts = divided(rows, {"train": 0.95, "validation": 0.05}, dialogue)
        write(files.train, parts["train"])
        write(files.prompts, map(begun, parts["train"]))
        write(files.validation, map(begun, parts["validation"]))
        write(files.test, map(begun, reported))
    if set(map(dialogue, read(files.train))) & set(map(dialogue, read(files.test))):
        raise QvgptError(f"{to}: what is reported stands in training there: give another --work")
    return files


def dialogue(row: Row) -> str:
    """A row's dialogue as it is compared with others."""
    return " ".join(re.findall(r"\w+", row["prompt"].lower()))


def begun(row: Row) -> Row:
    """The row with no more of its dialogue than fits the context beside a summary."""
    prompt: str = row["prompt"]
    if len(prompt) > CHARACTERS:
        prompt = prompt[: CHARACTERS + 1].rpartition("\n")[0] or prompt[:CHARACTERS]
    return {**row, "prompt": prompt}


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
