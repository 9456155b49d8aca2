"""The program that summaries, question answering and translations share.

A row is a directory with `run.py`, which says how its splits are made, and a recipe (steps.py).
Every seed is a cell: a base, what it wrote, values, rivals, and what all of them write to the test
rows. Intervals are bootstrapped over test rows, a row's figure being that of all seeds.
"""

import argparse
import json
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from texts.cell import Cell
from texts.judging import Judge
from texts.reporting import picture, table
from texts.steps import Files, Models, Recipe, Row, read

from qvgpt.run import write_json


@dataclass(frozen=True)
class Task:
    """A task with a metric."""

    recipe: Path
    metrics: tuple[str, ...]
    """The first is what all is chosen by, and the headline."""
    prepare: Callable[[Path, Path], Files]
    """(the data's directory, where the splits go) → splits."""
    toy: Callable[[Path], None]
    """Writes a few rows in the form that `prepare` reads."""
    seeds: int = 3


def main(here: Path, title: str, tasks: Mapping[str, Task]) -> None:
    """`run.py DATA --work DIR [--seeds N] [--quick]`: all tasks of a row, the first one ahead."""
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("data", nargs="?", type=Path, help="directory of the JSONL files")
    parser.add_argument("--work", type=Path, default=Path("runs") / here.name)
    parser.add_argument("--seeds", type=int, help="fewer or more than the row's own")
    parser.add_argument("--tasks", nargs="+", choices=list(tasks), default=list(tasks))
    parser.add_argument("--quick", action="store_true", help="a toy of the same form, nothing kept")
    options = parser.parse_args()
    if options.quick:
        print(json.dumps(quick(tasks), indent=1))
        return
    if options.data is None:
        parser.error("say where the data are, or --quick")
    old = here / "results.json"
    kept = json.loads(old.read_text()).get("tasks", {}) if old.exists() else {}
    for name in options.tasks:
        task = tasks[name]
        kept[name] = run(task, options.data, options.work / name, options.seeds or task.seeds)
        every = {name: kept[name] for name in tasks if name in kept}
        write_json(old, {**next(iter(every.values())), "tasks": every})
        (here / "table.md").write_text(table(every))
        picture(here / "picture.html", title, every)
    print((here / "table.md").read_text())


def quick(tasks: Mapping[str, Task]) -> dict[str, Any]:
    """Every task on a toy, and its figures."""
    every = {}
    with tempfile.TemporaryDirectory() as directory:
        for name, task in tasks.items():
            data, work = Path(directory) / name / "data", Path(directory) / name / "work"
            data.mkdir(parents=True)
            task.toy(data)
            every[name] = run(task, data, work, 1, quick=True)
            picture(work / "picture.html", name, every)
        table(every)
    return {**next(iter(every.values())), "tasks": every}


def run(task: Task, data: Path, work: Path, seeds: int, quick: bool = False) -> dict[str, Any]:
    """Every seed's cell, and what they say together."""
    files, recipe = task.prepare(data, work / "data"), Recipe.read(task.recipe, quick)
    judge, cells = Judge(task.metrics), []
    for seed in range(seeds):
        models = Models(work / f"seed-{seed}", files, recipe, seed)
        cells.append(Cell(models, judge).found())
        print(f"{work.name}: seed {seed} is there", flush=True)
    return summary(cells, read(files.test), judge)


def summary(cells: Sequence[dict[str, Any]], rows: Sequence[Row], judge: Judge) -> dict[str, Any]:
    """What results.json holds of a task."""
    names = [n for n in cells[0]["systems"] if all(n in c["systems"] for c in cells)]
    texts = {
        n: [list(t) for t in zip(*(c["systems"][n]["texts"] for c in cells), strict=True)]
        for n in names
    }
    read_by_base = _mean(cells, "base", "forward_tokens")
    found = []
    for name in names:
        estimates = judge.estimates(texts[name], rows, texts["base"])
        found.append({
            "system": name,
            "metrics": {k: _figures(e) for k, e in estimates.items()},
            "kl_to_base": _mean(cells, name, "kl"),
            "relative_cost": (_mean(cells, name, "forward_tokens") or 0.0) / (read_by_base or 1.0),
            "words": float(np.mean([_words(t) for several in texts[name] for t in several])),
        })  # fmt: skip
    by_name = {row["system"]: row["metrics"][judge.metrics[0]] for row in found}
    base, guided = by_name["base"], by_name["guided"]

    def less(name: str, other: str) -> dict[str, Any]:
        return _figures(judge.estimates(texts[name], rows, texts[other])[judge.metrics[0]])

    against = {n: less("guided", n) for n in names if n.startswith(("rival", "values"))}
    for name in names:  # what is written in the same way, by the base
        twin = name.replace("guided", "base", 1)
        if name.startswith("guided,") and twin in names:
            against[twin] = less(name, twin)
    return {
        "metric": judge.metrics[0],
        "base": base["value"],
        "guided": guided["value"],
        "delta": guided["delta"],
        "delta_ci95": guided["delta_ci95"],
        "relative_decode_time": float(np.mean([c["time"]["median"] for c in cells])),
        "relative_time": {
            key: float(np.mean([c["time"][key] for c in cells]))
            for key in ("per_token_written", "per_text")
        },
        "seeds": len(cells),
        "seconds_per_seed": float(np.mean([c["made_in"] for c in cells])),
        "test_rows": len(rows),
        "chosen": [{k: v for k, v in c["chosen"].items() if k != "greedy"} for c in cells],
        "validation": [c["chosen"]["greedy"] for c in cells],
        "guided_against": against,
        "rows": found,
    }


def _words(text: str) -> int:
    """Each character of Chinese is one."""
    return len(re.findall(r"[\u3400-\u9fff]|[^\s\u3400-\u9fff]+", text))


def _figures(estimate: Any) -> dict[str, Any]:
    return {
        "value": estimate.value,
        "ci95": estimate.ci95,
        "delta": estimate.delta,
        "delta_ci95": estimate.delta_ci95,
    }


def _mean(cells: Sequence[dict[str, Any]], name: str, what: str) -> float | None:
    values = [cell["systems"][name][what] for cell in cells]
    return None if None in values else float(np.mean(values))
