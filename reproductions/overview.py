"""Prints the tables of the README, of what results.json of each reproduction says.

    python reproductions/overview.py

A fine-tuned rival is the base that went on with the best of the texts that values learn from: of
each prompt's in the tasks of one right text, the best tenth of all in sentiment.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
METRICS = {
    "bleu": ("BLEU", 1),
    "bleu:zh": ("BLEU of characters", 1),
    "rouge_l": ("ROUGE-L", 1),
    "exact_match": ("exact match", 1),
}
TASKS = {
    "translation": {
        "en-de": "English → German, Multi30k",
        "en-fr": "English → French, Multi30k",
        "en-zh": "English → Chinese, Tatoeba",
    },
    "summarization": {"DialogSum": "Summaries of dialogues, DialogSum"},
    "qa": {
        "two facts": "Questions, two facts",
        "three facts": "Questions, three facts",
        "bAbI 1": "Questions, bAbI's task 1",
    },
}
GAMES = {
    "random_walk": "Random walks",
    "star_graph": "Star graph G(2, 3)",
    "maze_full": "Maze, its cell seen",
    "maze_partial": "Maze, only walls seen",
    "wordle": "Wordle",
    "wordle_adversarial": "Wordle, adversarial logs",
}
HEADINGS = (
    "measured by", "base", "guided", "guided less base", "fine-tuned less base", "time", "seeds",
)  # fmt: skip
METHODS = ("BC", "filtered_BC", "MonteCarlo", "SARSA", "ILQL", "CQL")


def main() -> None:
    print("\n".join([*texts(), "", *games()]))


def texts() -> list[str]:
    """Guided greedy texts (of sentiment: samples) against the base's, a row a task."""
    return [
        f"| | {' | '.join(HEADINGS)} |",
        "|" + " --- |" * (1 + len(HEADINGS)),
        *_texts(),
    ]


def _texts() -> Iterator[str]:
    for folder, names in TASKS.items():
        results = _results(folder)
        for key, name in names.items():
            found = results["tasks"][key]
            measured, places = METRICS[found["metric"]]
            rival = next(r for r in found["rows"] if r["system"] == "rival: best of K")
            rival = rival["metrics"][found["metric"]]
            yield _row(name, folder, measured, found, rival, places, results)
    results = _results("sentiment")
    for way, found in (("positive", results), ("negative", results["negative"])):
        rival = next(
            row
            for row in results["rows"]
            if row["direction"] == way and row["method"] == "filtered, best 10%"
        )
        yield _row(
            f"Sentiment, {way}, SST-2", "sentiment", "judged so, %", found, rival, 1, results, 100
        )


def _row(
    name: str,
    folder: str,
    measured: str,
    found: Mapping[str, Any],
    rival: Mapping[str, Any],
    places: int,
    results: Mapping[str, Any],
    scale: float = 1.0,
) -> str:
    base, guided = (format(scale * found[key], f".{places}f") for key in ("base", "guided"))
    better = found["delta_ci95"][0] > 0
    cells = (
        f"[{name}](reproductions/{folder}/table.md)",
        measured,
        base,
        f"**{guided}**" if better else guided,
        _difference(found, scale),
        _difference(rival, scale),
        f"{found['relative_decode_time']:.2f}",
        str(found.get("seeds", results["seeds"])),
    )
    return f"| {' | '.join(cells)} |"


def _difference(figures: Mapping[str, Any], scale: float) -> str:
    low, high = (scale * bound for bound in figures["delta_ci95"])
    return f"{scale * figures['delta']:+.2f} [{low:+.2f}, {high:+.2f}]".replace("-", "−")


def games() -> list[str]:
    """Scores (the logs' return is 0, the optimum 1), a row a game."""
    results = _results("games")
    lines = [
        f"| | {' | '.join(m.replace('_', ' ') for m in METHODS)} |",
        "|" + " --- |" * (1 + len(METHODS)),
    ]
    for key, name in GAMES.items():
        if key in results:
            cells = (_score(results[key]["methods"][method]) for method in METHODS)
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _score(figures: Mapping[str, Any]) -> str:
    low, high = figures["ci95"]
    return f"{figures['score']:.2f} ± {(high - low) / 2:.2f}".replace("-", "−")


def _results(folder: str) -> dict[str, Any]:
    return json.loads((HERE / folder / "results.json").read_text())


if __name__ == "__main__":
    main()
