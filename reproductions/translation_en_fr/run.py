"""English → French on Multi30k, as English → German but on splits of another kind.

    python reproductions/translation_en_fr/run.py DATA --work DIR [--seeds N]
    python reproductions/translation_en_fr/run.py --quick     a toy of the same form, nothing kept

DATA holds multi30k.en-fr.{train,val}.jsonl: val is reported, and a hash of the English sentence
takes a thirtieth of the training pairs to choose on. Writes results.json,
table.md and picture.html beside itself.
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
        shares = {"train": 0.967, "validation": 0.033}
        parts = divided(read(data / "multi30k.en-fr.train.jsonl"), shares)
        write(train, parts["train"])
        write(validation, parts["validation"])
    return Files(train, train, validation, data / "multi30k.en-fr.val.jsonl")


def toy(data: Path) -> None:
    words = {"dog": "chien", "cat": "chat", "man": "homme", "sees": "voit", "a": "un"}
    nouns = ("dog", "cat", "man")
    prompts = [f"a {x} sees a {y} {n} ." for n in range(8) for x in nouns for y in nouns]
    rows = [
        {"prompt": p, "completion": " ".join(words.get(w, w) for w in p.split())} for p in prompts
    ]
    write(data / "multi30k.en-fr.train.jsonl", rows)
    write(data / "multi30k.en-fr.val.jsonl", rows[:6])


if __name__ == "__main__":
    task = Task(HERE / "recipe.yaml", ("bleu", "chrf"), prepare, toy, seeds=1)
    main(HERE, "English → French", {"en-fr": task})
