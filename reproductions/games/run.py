"""Games with a known optimum: what does each method make of the same logs?

    python reproductions/games/run.py --work DIR [--answers FILE] [--guesses FILE]
    python reproductions/games/run.py --quick          a toy of the same form, nothing kept

FILE holds Wordle's words, one a line; without --answers the two Wordle games are left out. Every
(game, method, seed) is trained once, one after another, and kept under --work: started again, the
script goes on where it stopped, in the middle of a training too. A seed is that of the game, of
its logs, of the training and of the texts. games.py says how each game is set.

score = (mean return − that of the logs) / (optimum − that of the logs), per seed; policies are
judged by free generation. Writes results.json and table.md beside itself, with what --games and
--methods name replaced and all else left as it was.
"""

import argparse
import io
import json
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from games import METHODS, TOP, Setting, Task, quick_settings, settings
from rich.console import Console

from qvgpt.data.rows import Row, row_to_trajectories
from qvgpt.envs.games import play, row_return, score
from qvgpt.envs.wordle import Wordle
from qvgpt.errors import QvgptError
from qvgpt.loop import fit
from qvgpt.models.gpt import GPT
from qvgpt.models.heads import HeadsConfig
from qvgpt.models.value_model import ValueModel
from qvgpt.objectives import Objectives, parse_objectives
from qvgpt.run import write_json
from qvgpt.sampling import engine_policy

HERE = Path(__file__).parent
SEEDS = 5
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Student's t at 97.5 %, of 1, 2, … degrees of freedom."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a toy of it, nothing written")
    parser.add_argument("--work", type=Path, help="where trainings are kept")
    parser.add_argument("--answers", type=Path, help="Wordle's hidden words")
    parser.add_argument("--guesses", type=Path, help="words that may be guessed besides")
    parser.add_argument("--games", nargs="+", help="only these")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=SEEDS)
    options = parser.parse_args()
    if options.quick:
        with tempfile.TemporaryDirectory() as work:
            results = table(quick_settings(), list(METHODS), 1, Path(work))
        check_order(results)
        print(json.dumps(results, indent=2))
        return
    if options.work is None:
        parser.error("--work says where trainings are kept; --quick needs none")
    games = settings(Wordle.load(options.answers, options.guesses) if options.answers else None)
    if unknown := set(options.games or ()) - set(games):
        parser.error(f"--games: {', '.join(unknown)} not among {', '.join(games)} (words given?)")
    chosen = {name: games[name] for name in options.games or games}
    results = table(chosen, options.methods, options.seeds, options.work)
    kept = HERE / "results.json"
    before = json.loads(kept.read_text()) if kept.exists() else {}
    write_json(kept, results := merged(before, results))
    (HERE / "table.md").write_text(as_markdown(results))


def table(
    games: Mapping[str, Setting], methods: Sequence[str], seeds: int, work: Path
) -> dict[str, Any]:
    """The figures of every game and method, over all seeds."""
    results = {}
    for name, setting in games.items():
        cells: dict[str, list[dict[str, Any]]] = {method: [] for method in methods}
        for seed in range(seeds):
            for method in methods:
                cells[method].append(cell(name, setting, method, seed, work))
        first = cells[methods[0]]
        results[name] = {
            "data_mean": fmean(c["data_mean"] for c in first),
            "optimum": fmean(c["optimum"] for c in first),
            "methods": {method: summary(found) for method, found in cells.items()},
        }
    return results


def summary(cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One method over its seeds; the interval is that of the mean score, None of one seed."""
    scores = [c["score"] for c in cells]
    return {
        "mean": fmean(c["mean"] for c in cells),
        "score": fmean(scores),
        "ci95": interval(scores),
        "seeds": len(cells),
        "invalid_rate": fmean(c["invalid_rate"] for c in cells),
        "seconds": fmean(c["seconds"] for c in cells),
    }


def interval(values: Sequence[float]) -> list[float] | None:
    """Student's 95 % interval of the mean."""
    if len(values) < 2:
        return None
    t = T_975[min(len(values) - 1, len(T_975)) - 1]  # of more than ten values: a little wide
    half = t * stdev(values) / math.sqrt(len(values))
    return [fmean(values) - half, fmean(values) + half]


def cell(name: str, setting: Setting, method: str, seed: int, work: Path) -> dict[str, Any]:
    """Train and judge, unless that was done before under the same setting."""
    directory = work / name / method / str(seed)
    done, said = directory / "cell.json", described(setting, method)
    if done.exists():
        found = json.loads(done.read_text())
        if found["setting"] != said:
            raise QvgptError(f"{done}: was made with another setting; remove it or change --work")
        return found
    task = drawn(setting.task, seed, setting.episodes)
    data_mean = fmean(map(row_return, task.rows))
    started = time.perf_counter()
    model, objectives = train(task, setting, method, seed, directory)
    seconds = time.perf_counter() - started
    guidance = setting.guidance
    outcome = play(
        [task.new() for _ in range(setting.evaluations)],
        engine_policy(
            model,
            guidance if objectives.teaches_values else replace(guidance, beta=0.0),
            max_tokens=task.max_tokens,
            seed=seed,
        ),
        task.tokenizer,
        seeds=range(setting.evaluations * seed, setting.evaluations * (seed + 1)),
        max_turns=task.max_turns,
        dialogue=task.dialogue,
    )
    found = {
        "mean": outcome.mean,
        "data_mean": data_mean,
        "optimum": task.optimum,
        "score": score(outcome.mean, data_mean, task.optimum),
        "invalid_rate": outcome.invalid_rate,
        "seconds": round(seconds, 1),
        "setting": said,
    }
    write_json(done, found)
    shown = {k: round(v, 3) for k, v in found.items() if k != "setting"}
    print(name, method, seed, shown, flush=True)
    return found


@lru_cache(maxsize=1)
def drawn(task: Callable[[int, int], Task], seed: int, episodes: int) -> Task:
    """The game and its logs, which all methods of a seed share."""
    return task(seed, episodes)


def train(
    task: Task, setting: Setting, method: str, seed: int, directory: Path
) -> tuple[ValueModel, Objectives]:
    """A GPT that learned from the logs by a method, from scratch or from its last checkpoint."""
    objectives = parse_objectives(objectives_of(setting, method, task.rows))
    tokenizer = task.tokenizer
    texts = [
        replace(text, reward=[r / setting.scale for r in text.reward])
        for i, row in enumerate(task.rows, 1)
        for text in row_to_trajectories(Row(f"episode {i}", row), tokenizer)
    ]
    torch.manual_seed(seed)
    trunk = GPT(
        tokenizer.vocab_size,
        embed_dim=setting.embed_dim,
        num_heads=4,
        num_layers=setting.num_layers,
        seq_len=task.context(tokenizer),
    )
    heads = HeadsConfig(kind=setting.heads) if objectives.learns_values else None
    model = ValueModel(trunk, heads, tokenizer)
    directory.mkdir(parents=True, exist_ok=True)
    options = replace(setting.fit, seed=seed)
    quiet = Console(file=io.StringIO())
    fit(model, texts, objectives, options, output=directory, resume=True, console=quiet)
    return model, objectives


def objectives_of(
    setting: Setting, method: str, rows: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The method's objectives with the game's options; `TOP` as a number, where there are rows."""
    returns = sorted(map(row_return, rows))
    top = returns[len(rows) * 4 // 5] / setting.scale if rows else TOP
    found = []
    for entry in METHODS[method]:
        ((kind, own),) = entry.items() if isinstance(entry, dict) else ((entry, {}),)
        options = {**setting.options.get(kind, {}), **own}
        found.append({kind: {o: top if v == TOP else v for o, v in options.items()}})
    return found


def described(setting: Setting, method: str) -> dict[str, Any]:
    """What a cell depends on, beside the code: in the form that JSON gives back."""
    said = {**asdict(replace(setting, task=None)), "objectives": objectives_of(setting, method, [])}
    del said["task"], said["options"]
    return json.loads(json.dumps(said))


def check_order(results: Mapping[str, Any]) -> None:
    """What theory demands even of short trainings, where a game is easy."""
    found = results["random_walk"]["methods"]
    for method in ("MonteCarlo", "ILQL"):
        assert found[method]["score"] > 0, f"{method} is not better than the logs: {found}"
        assert found[method]["score"] > found["BC"]["score"], f"{method} is not guided: {found}"
    assert all(r["data_mean"] < r["optimum"] for r in results.values())


def merged(before: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Old results with new ones in their place, method by method."""
    results = {**before}
    for game, found in new.items():
        methods = {**before.get(game, {}).get("methods", {}), **found["methods"]}
        results[game] = {**found, "methods": methods}
    return results


def as_markdown(results: Mapping[str, Any]) -> str:
    lines = ["| game | method | mean return | score | 95 % | seeds | invalid | seconds |"]
    lines.append("|" + " --- |" * 8)
    for game, found in results.items():
        lines.append(f"| {game} | the logs | {found['data_mean']:.3f} | 0 | | | | |")
        for method, m in found["methods"].items():
            ci = "" if m["ci95"] is None else "{:.3f} … {:.3f}".format(*m["ci95"])
            lines.append(
                f"| | {method} | {m['mean']:.3f} | {m['score']:.3f} | {ci} | {m['seeds']} | "
                f"{m['invalid_rate']:.4f} | {m['seconds']:.0f} |"
            )
        lines.append(f"| | optimum | {found['optimum']:.3f} | 1 | | | | |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
