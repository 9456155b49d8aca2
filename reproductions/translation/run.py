"""Translation: BLEU, of Chinese on characters.

    python reproductions/translation/run.py DATA --work DIR [--tasks en-de …] [--seeds N]
    python reproductions/translation/run.py --quick     a toy of the same form, nothing kept

DATA holds multi30k.en-de.{train,val,test2016}.jsonl: test2016 is reported, val is chosen on.
multi30k.en-fr.{train,val}.jsonl: val is reported, and a hash of the English sentence takes a
thirtieth of the training pairs to choose on. tatoeba.en-zh.train.jsonl, one file: such a hash says
whether a pair is learned from, chosen on or reported; all Chinese texts of a sentence are its
references. Writes results.json, table.md and picture.html beside itself.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent))

from texts.program import Task, main  # noqa: E402
from texts.steps import Files, Row, divided, read, write  # noqa: E402


def german(data: Path, to: Path) -> Files:
    train, validation, test = (
        data / f"multi30k.en-de.{split}.jsonl" for split in ("train", "val", "test2016")
    )
    return Files(train, train, validation, test)


def french(data: Path, to: Path) -> Files:
    train, validation = to / "train.jsonl", to / "validation.jsonl"
    if not validation.exists():
        shares = {"train": 0.967, "validation": 0.033}
        parts = divided(read(data / "multi30k.en-fr.train.jsonl"), shares)
        write(train, parts["train"])
        write(validation, parts["validation"])
    return Files(train, train, validation, data / "multi30k.en-fr.val.jsonl")


def chinese(data: Path, to: Path) -> Files:
    files = Files(*(to / f"{n}.jsonl" for n in ("train", "prompts", "validation", "test")))
    if not files.test.exists():
        shares = {"train": 0.86, "validation": 0.05, "test": 0.09}
        parts = divided(read(data / "tatoeba.en-zh.train.jsonl"), shares)
        write(files.train, parts["train"])
        write(files.prompts, joined(parts["train"]))
        write(files.validation, joined(parts["validation"]))
        write(files.test, joined(parts["test"]))
    return files


def joined(rows: Sequence[Row]) -> list[Row]:
    """A row for each prompt, with all its completions as references."""
    references: dict[str, list[str]] = {}
    for row in rows:
        references.setdefault(row["prompt"], []).append(row["completion"])
    return [{"prompt": p, "completion": r[0], "references": r} for p, r in references.items()]


def toy(name: str, splits: Sequence[str], words: str, between: str = " ") -> Callable[[Path], None]:
    """Pairs of made-up languages, in the files that a task expects: all of them in the first."""

    def made(data: Path) -> None:
        other = dict(zip(("dog", "cat", "man", "sees", "a"), words.split(), strict=True))
        nouns = ("dog", "cat", "man")
        prompts = [f"a {x} sees a {y} {n}" for n in range(8) for x in nouns for y in nouns]
        rows = [
            {"prompt": p, "completion": between.join(other.get(w, w) for w in p.split())}
            for p in prompts
        ]
        for split in splits:
            write(data / f"{name}.{split}.jsonl", rows if split == splits[0] else rows[:6])

    return made


TASKS = {
    "en-de": Task(
        HERE / "en_de.yaml",
        ("bleu", "chrf"),
        german,
        toy("multi30k.en-de", ("train", "val", "test2016"), "Hund Katze Mann sieht ein"),
        seeds=1,
    ),
    "en-fr": Task(
        HERE / "en_fr.yaml",
        ("bleu", "chrf"),
        french,
        toy("multi30k.en-fr", ("train", "val"), "chien chat homme voit un"),
        seeds=1,
    ),
    "en-zh": Task(
        HERE / "en_zh.yaml",
        ("bleu:zh", "chrf"),
        chinese,
        toy("tatoeba.en-zh", ("train",), "狗 猫 男人 看见 一个", ""),
        seeds=1,
    ),
}

if __name__ == "__main__":
    main(HERE, "Translation", TASKS)
