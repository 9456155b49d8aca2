"""SST-2 in halves that share no sentence, prompts to write from, and a toy in the same form.

SST-2's training texts are sentences and phrases out of them. A phrase belongs to the longest text
that contains it, and goes where that goes: to half A (language model, reward model), half B (judge,
the language model that perplexity is of) or to validation.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qvgpt.errors import QvgptError

VALIDATION = 0.06
SIDES = ("A", "B", "validation")


@dataclass(frozen=True)
class Files:
    """What `prepare` writes."""

    folder: Path

    def labelled(self, side: str) -> Path:
        """Rows {"text", "label"}."""
        return self.folder / f"{side}.labelled.jsonl"

    def texts(self, side: str, label: str = "all") -> Path:
        """Rows {"prompt", "completion"}: texts of four words or more, cut after one to four."""
        return self.folder / f"{side}.{label}.jsonl"

    def prompts(self, name: str) -> Path:
        """Rows {"prompt"}: train (of A), validation, test (of SST-2's dev set, and neutral)."""
        return self.folder / f"prompts.{name}.jsonl"


def prepare(data: Path, folder: Path, test: int) -> Files:
    """Write all files, unless they are there; `test` prompts of each of two kinds.

    No prompt that is reported or chosen on is that of a row that is learned from.
    """
    files = Files(folder)
    if (folder / "done").exists():
        known = {row["prompt"] for row in read(files.texts("A"))}
        for name in ("validation", "test"):
            if known & {row["prompt"] for row in read(files.prompts(name))}:
                raise QvgptError(f"{folder}: prompts of {name} are learned from there: remove it")
        return files
    folder.mkdir(parents=True, exist_ok=True)
    labels = {_spaced(row["text"]): row["label"] for row in read(data / "sst2.train.jsonl")}
    dev = [_spaced(row["text"]) for row in read(data / "sst2.dev.jsonl")]
    neutral = [_spaced(_as_sst(r["prompt"])) for r in read(data / "prompts.neutral.jsonl")]
    owners = containing(labels)
    sides = {text: side_of(owner) for text, owner in owners.items()}
    for side in SIDES:
        mine = [text for text in labels if sides[text] == side]
        write(files.labelled(side), ({"text": t, "label": labels[t]} for t in mine))
        for name, wanted in {"all": (0, 1), "negative": (0,), "positive": (1,)}.items():
            write(files.texts(side, name), _cut(t for t in mine if labels[t] in wanted))
    whole = {side: [t for t in labels if owners[t] == t and sides[t] == side] for side in SIDES}
    write(files.prompts("train"), _prompts(_begun(whole["A"]), "sst", set()))
    seen = {row["prompt"] for row in read(files.texts("A"))}
    write(files.prompts("validation"), _prompts(_begun(whole["validation"]), "sst", seen))
    rows = _prompts(_begun(dev), "sst", seen)[:test]
    write(files.prompts("test"), rows + _prompts(neutral, "neutral", seen)[:test])
    (folder / "done").write_text("")
    return files


def containing(texts: Iterable[str]) -> dict[str, str]:
    """Text → the longest one that contains it, word by word (itself, if none does)."""
    known = set(texts)
    owners: dict[str, str] = {}
    for text in sorted(known, key=lambda t: (-len(t.split()), t)):
        if text in owners:
            continue
        words = text.split()
        for start in range(len(words)):
            for end in range(start + 1, len(words) + 1):
                part = " ".join(words[start:end])
                if part in known:
                    owners.setdefault(part, text)
    return owners


def side_of(sentence: str) -> str:
    """By a hash of the sentence: neither seeds nor the order of the file matter."""
    share = _hash(sentence) / 2**64
    if share < VALIDATION:
        return "validation"
    return "A" if share < (1 + VALIDATION) / 2 else "B"


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines() if line]


def write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])


def _spaced(text: str) -> str:
    return " ".join(text.split())


def _as_sst(text: str) -> str:
    """Lower case, with spaces around what SST-2 puts spaces around."""
    text = re.sub(r"(n't|'(?:s|re|ve|ll|d|m))\b", r" \1", text.lower())
    return re.sub(r"([.,!?;:()\"])", r" \1 ", text)


def _cut(texts: Iterable[str]) -> list[dict[str, str]]:
    rows = []
    for text in texts:
        words = text.split()
        if len(words) >= 4:
            k = 1 + _hash(text) % min(4, len(words) - 1)
            rows.append({"prompt": " ".join(words[:k]), "completion": " ".join(words[k:])})
    return rows


def _begun(sentences: Sequence[str]) -> list[str]:
    """The first one to four words of sentences, in an order of chance."""
    return [row["prompt"] for row in _cut(sorted(sentences, key=_hash))]


def _prompts(prompts: Iterable[str], kind: str, seen: set[str]) -> list[dict[str, str]]:
    """Those that are not `seen` yet, each once; they are now."""
    fresh = [p for p in dict.fromkeys(prompts) if p and p not in seen]
    seen.update(fresh)
    return [{"prompt": prompt, "kind": kind} for prompt in fresh]


def toy(directory: Path) -> Path:
    """Reviews of three words that decide and some that do not, in the files a run expects."""
    directory.mkdir(parents=True)
    things = ("film", "plot", "cast", "end", "score", "joke", "scene", "story")
    rows = [
        {"text": f"{a} or {b} is {word} .", "label": label}
        for a in things
        for b in things
        for word, label in {"great": 1, "fine": 1, "bad": 0, "dull": 0}.items()
        if a != b
    ]
    write(directory / "sst2.train.jsonl", rows)
    dev = [{"text": f"a {x} and its {y} are fine .", "label": 1} for x in things for y in things]
    write(directory / "sst2.dev.jsonl", dev)
    neutral = [{"prompt": f"This {x} and"} for x in things]
    write(directory / "prompts.neutral.jsonl", neutral)
    return directory
