"""English → Chinese on Tatoeba: BLEU on characters.

    python reproductions/translation_en_zh/run.py DATA --work DIR [--seeds N]
    python reproductions/translation_en_zh/run.py --quick     a toy of the same form, nothing kept

DATA holds tatoeba.en-zh.train.jsonl, one file: a hash of the English sentence says whether a pair
is learned from, chosen on or reported. All Chinese texts of a sentence are its references. Writes
results.json, table.md and picture.html beside itself.
"""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent))

from texts.program import Task, main  # noqa: E402
from texts.steps import Files, Row, divided, read, write  # noqa: E402

SHARES = {"train": 0.86, "validation": 0.05, "test": 0.09}


def prepare(data: Path, to: Path) -> Files:
    files = Files(*(to / f"{n}.jsonl" for n in ("train", "prompts", "validation", "test")))
    if not files.test.exists():
        parts = divided(read(data / "tatoeba.en-zh.train.jsonl"), SHARES)
        write(files.train, parts["train"])
        write(files.prompts, joined(parts["train"]))
        write(files.validation, joined(parts["validation"]))
        write(files.test, joined(parts["test"]))
    return files


def joined(rows: list[Row]) -> list[Row]:
    """A row for each prompt, with all its completions as references."""
    references: dict[str, list[str]] = {}
    for row in rows:
        references.setdefault(row["prompt"], []).append(row["completion"])
    return [{"prompt": p, "completion": r[0], "references": r} for p, r in references.items()]


def toy(data: Path) -> None:
    words = {"dog": "狗", "cat": "猫", "man": "男人", "sees": "看见", "a": "一个"}
    nouns = ("dog", "cat", "man")
    prompts = [f"a {x} sees a {y} {n}" for n in range(8) for x in nouns for y in nouns]
    rows = [
        {"prompt": p, "completion": "".join(words.get(w, w) for w in p.split())} for p in prompts
    ]
    write(data / "tatoeba.en-zh.train.jsonl", rows)


if __name__ == "__main__":
    metrics = ("bleu:zh", "chrf")
    main(HERE, "English → Chinese", {"en-zh": Task(HERE / "recipe.yaml", metrics, prepare, toy)})
