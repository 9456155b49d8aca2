"""Question answering: made-up stories of two and three facts, bAbI's task 1, MCTest.

    python reproductions/qa/run.py DATA --work DIR [--seeds N] [--tasks 'two facts' 'bAbI 1' …]
    python reproductions/qa/run.py --quick              a toy of the same form, nothing kept

DATA holds babi_qa1.train.jsonl, mctest.{train,dev}.jsonl and, in ../text, tinystories.jsonl. The
language model learns from few stories; values learn from what it answers to others, scored by
their answers. Writes results.json, table.md and picture.html beside itself.
"""

import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path

from stories import stories

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent))

from texts.program import Task, main  # noqa: E402
from texts.steps import Files, Row, divided, read, write  # noqa: E402

LEARNT, ASKED, JUDGED = 1500, 8000, 1000
"""Stories of the language model, of the values, of validation and of test."""


def generated(
    kind: str, learnt: int = LEARNT, asked: int = ASKED, judged: int = JUDGED
) -> Callable[[Path, Path], Files]:
    """The preparation of made-up stories: no story is in two files."""

    def prepare(data: Path, to: Path) -> Files:
        files = Files(*(to / f"{n}.jsonl" for n in ("train", "prompts", "validation", "test")))
        if not files.test.exists():
            shares = {"train": 0.8, "validation": 0.1, "test": 0.1}
            drawn = divided(_different(kind, learnt + asked + 20 * judged), shares, facts)
            write(files.train, drawn["train"][:learnt])
            write(files.prompts, drawn["train"][learnt:][:asked])
            write(files.validation, drawn["validation"][: judged // 2])
            write(files.test, drawn["test"][:judged])
        return files

    return prepare


def _different(kind: str, count: int) -> list[Row]:
    """So many rows whose facts differ."""
    found: dict[str, Row] = {}
    for row in stories(kind):
        found.setdefault(facts(row), row)
        if len(found) == count:
            break
    return list(found.values())


def facts(row: Row) -> str:
    """A prompt without its question."""
    return row["prompt"].rpartition("\n")[0]


def babi(data: Path, to: Path) -> Files:
    """bAbI 1: stories (a row that begins with all of the row before goes on with it) by hash."""
    files = Files(*(to / f"{n}.jsonl" for n in ("train", "prompts", "validation", "test")))
    if not files.test.exists():
        first, before, owner = "", "\n", {}
        rows = read(data / "babi_qa1.train.jsonl")
        for row in rows:
            first = first if facts(row).startswith(before) else facts(row)
            before = facts(row)
            owner[id(row)] = first
        shares = {"train": 0.4, "prompts": 0.3, "validation": 0.1, "test": 0.2}
        parts = divided(rows, shares, lambda row: owner[id(row)])
        for name, rows in parts.items():
            write(to / f"{name}.jsonl", rows)
    return files


def mctest(data: Path, to: Path) -> Files:
    """MCTest: a fifth of the training stories, by hash, to choose on; dev is reported."""
    files = Files(*(to / f"{n}.jsonl" for n in ("train", "prompts", "validation", "test", "text")))
    if not files.test.exists():
        learnt, held = divided(
            _in_lines(read(data / "mctest.train.jsonl")),
            {"learnt": 0.8, "held": 0.2},
            lambda row: row["prompt"][:100],  # a story has several questions
        ).values()
        write(files.train, learnt)
        write(files.prompts, learnt)
        write(files.validation, held)
        write(files.test, _in_lines(read(data / "mctest.dev.jsonl")))
        write(to / "text.jsonl", read(data.parent / "text" / "tinystories.jsonl"))
    return files


def _in_lines(rows: list[Row]) -> list[Row]:
    """A story's lines were broken to fit a page."""
    return [{**row, "prompt": " ".join(row["prompt"].split())} for row in rows]


def toy(data: Path) -> None:
    """bAbI's and MCTest's form."""
    rows = [
        {"prompt": f"{r['prompt']}", "completion": "garden"} for r in islice(stories("two"), 60)
    ]
    for name in ("babi_qa1.train", "mctest.train", "mctest.dev"):
        write(data / f"{name}.jsonl", rows)
    texts = [{"text": row["prompt"]} for row in rows[:8]]
    write(data.parent / "text" / "tinystories.jsonl", texts)


METRICS = ("exact_match", "token_f1")
TASKS = {
    "two facts": Task(HERE / "stories.yaml", METRICS, generated("two"), toy),
    "three facts": Task(HERE / "stories.yaml", METRICS, generated("three"), toy),
    "bAbI 1": Task(HERE / "babi.yaml", METRICS, babi, toy),
    "MCTest": Task(HERE / "mctest.yaml", ("token_f1", "exact_match"), mctest, toy, seeds=1),
}

if __name__ == "__main__":
    if "--quick" in sys.argv:
        few = generated("two", learnt=40, asked=20, judged=8)
        TASKS = {
            "two facts": Task(HERE / "stories.yaml", METRICS, few, toy),
            "MCTest": TASKS["MCTest"],
        }
    main(HERE, "Question answering", TASKS)
