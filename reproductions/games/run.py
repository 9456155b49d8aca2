"""Games with a known optimum: what does each method make of the same logs?

    python reproductions/games/run.py --work DIR [--answers FILE] [--guesses FILE]
    python reproductions/games/run.py --quick          a toy of the same form, nothing kept

FILE holds Wordle's words, one a line; without --answers the two Wordle games are left out. Every
(game, method, seed) is trained once, one after another, under --work: started again, the script
goes on where it stopped, in the middle of a training too. What came of each is a line of
cells.jsonl beside this script (but for rows of the full maze, G(2, 3) and the walks' ablation,
which are older than that file), and no cell that stands there is made again. A seed is that of the
game, of its logs, of the training and of the texts. games.py says how each game is set.

MonteCarlo learns trunk and values together, from scratch. Where a game says so that trunk is frozen
then and its states are kept, and the other methods learn values on those alone; those named
`joint` learn all from scratch again, as every method does where a game freezes nothing. (A trunk
that learned to clone alone will not do: amid a move it need not know what the move is worth.)
Where a game begins as an easier one, its trunk is that which MonteCarlo taught there. Where a
method searches, V chooses among the ways that a beam search ends with: it sees at an arm's end what
it may not see at its beginning. Filtered cloning and soft Q-learning go on with the trunk of BC;
what the latter learned, log π/π₀, guides BC, so that its tokens are candidates of the logs like
those of all others.

Seconds are those of training, by the clock, one core, with other work beside it, and so no measure
of one method against another. They include what a row is built on; of the seeds the median, for
by the clock a training that was stopped for a while is a long one. What ran on a GPU says so in its
cell, and has no part in them.

Cells of mazes were made when a text that is no move cost 1; it costs 4 now, as in LMRL-Gym. That
would lower filtered BC alone (its score by about 0.01 in the full maze, 0.05 in the partial one):
no other row of theirs says any such text.

score = (mean return − that of the logs) / (optimum − that of the logs), per seed; policies are
judged by free generation. Writes results.json and table.md beside itself (--ablation, of kinds of
heads: ablation.json and .md), with what --games and --methods name replaced and all else left as
it was.
"""

import argparse
import hashlib
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import torch
from games import ABLATION, METHODS, Setting, quick_settings, settings
from training import DEVICE, EVERY, drawn, objectives_of, train

from qvgpt.decode.beam import BeamSearch
from qvgpt.decode.policy import Guidance
from qvgpt.decode.sources import Contrast, PrefixValues
from qvgpt.envs.games import play, row_return, score
from qvgpt.envs.wordle import Wordle
from qvgpt.errors import QvgptError
from qvgpt.run import write_json
from qvgpt.sampling import engine_policy

HERE = Path(__file__).parent
CELLS = HERE / "cells.jsonl"
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
    parser.add_argument("--ablation", action="store_true", help="kinds of heads, not methods")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    options = parser.parse_args()
    if options.quick:
        with tempfile.TemporaryDirectory() as work:
            kept = Path(work) / CELLS.name
            results = table(quick_settings(), list(METHODS), 1, Path(work), kept)
        check_order(results)
        print(json.dumps(results, indent=2))
        return
    if options.work is None:
        parser.error("--work says where trainings are kept; --quick needs none")
    games = settings(Wordle.load(options.answers, options.guesses) if options.answers else None)
    if unknown := set(options.games or ()) - set(games):
        parser.error(f"--games: {', '.join(unknown)} not among {', '.join(games)} (words given?)")
    chosen = {name: games[name] for name in options.games or games}
    methods = list(ABLATION) if options.ablation else options.methods
    results = table(chosen, methods, options.seeds, options.work, CELLS)
    kept = HERE / ("ablation.json" if options.ablation else "results.json")
    before = json.loads(kept.read_text()) if kept.exists() else {}
    write_json(kept, results := merged(before, results))
    shown = HERE / ("ablation.md" if options.ablation else "table.md")
    shown.write_text(as_markdown(results))


def table(
    games: Mapping[str, Setting], methods: Sequence[str], seeds: int, work: Path, kept: Path
) -> dict[str, Any]:
    """The figures of every game and method, over all seeds."""
    results = {}
    for name, setting in games.items():
        rows = [m for m in methods if m in ABLATION or m in setting.rows]
        if not rows:
            continue
        cells: dict[str, list[dict[str, Any]]] = {method: [] for method in rows}
        for seed in range(seeds):
            for method in rows:
                cells[method].append(cell(name, setting, method, seed, work, kept))
        first = cells[rows[0]]
        results[name] = {
            "data_mean": fmean(c["data_mean"] for c in first),
            "optimum": fmean(c["optimum"] for c in first),
            "methods": {method: summary(found) for method, found in cells.items()},
        }
    return results


def summary(cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One method over its seeds; the interval is that of the mean score, None of one seed."""
    scores = [c["score"] for c in cells]
    seconds = [c["seconds"] for c in cells if "gpu" not in c]
    return {
        "mean": fmean(c["mean"] for c in cells),
        "score": fmean(scores),
        "ci95": interval(scores),
        "seeds": len(cells),
        "invalid_rate": fmean(c["invalid_rate"] for c in cells),
        "seconds": median(seconds) if seconds else None,
    }


def interval(values: Sequence[float]) -> list[float] | None:
    """Student's 95 % interval of the mean."""
    if len(values) < 2:
        return None
    t = T_975[min(len(values) - 1, len(T_975)) - 1]  # of more than ten values: a little wide
    half = t * stdev(values) / math.sqrt(len(values))
    return [fmean(values) - half, fmean(values) + half]


def cell(
    name: str, setting: Setting, method: str, seed: int, work: Path, kept: Path
) -> dict[str, Any]:
    """Train and judge, unless `kept` says what came of it under the same setting."""
    which = {"game": name, "method": method, "seed": seed}
    said = digest(described(setting, method))
    for line in kept.read_text().splitlines() if kept.exists() else ():
        found = json.loads(line)
        if which.items() <= found.items():
            if found["setting"] != said:
                raise QvgptError(
                    f"{kept}: {name} {method} {seed} was made with another setting; remove its line"
                )
            return found
    task = drawn(setting.task, seed, setting.episodes)
    data_mean = fmean(map(row_return, task.rows))
    model, seconds = train(task, setting, method, seed, work / name)
    writes, values, search = model, None, None
    if EVERY[method].searches:
        weight = setting.guidance.beta
        search = BeamSearch(setting.beams, max_tokens=task.max_tokens, value_weight=weight)
    elif EVERY[method].is_policy:
        writes, _ = train(task, setting, "BC", seed, work / name)
        values = Contrast(model, writes)
    elif setting.reads == "prefix" and EVERY[method].has_q:
        values = PrefixValues(model)
    policy = engine_policy(
        writes,
        guided(setting, method),
        max_tokens=task.max_tokens,
        seed=seed,
        values=values,
        search=search,
    )
    outcome = play(
        [task.new() for _ in range(setting.evaluations)],
        policy,
        task.tokenizer,
        seeds=range(setting.evaluations * seed, setting.evaluations * (seed + 1)),
        max_turns=task.max_turns,
        dialogue=task.dialogue,
    )
    found = {
        **which,
        "mean": outcome.mean,
        "data_mean": data_mean,
        "optimum": task.optimum,
        "score": score(outcome.mean, data_mean, task.optimum),
        "invalid_rate": outcome.invalid_rate,
        "seconds": round(seconds, 1),
        "setting": said,
        **({"gpu": torch.cuda.get_device_name()} if DEVICE.type == "cuda" else {}),
    }
    with kept.open("a") as lines:
        lines.write(json.dumps(found) + "\n")
    print(name, method, seed, round(found["score"], 3), flush=True)
    return found


def guided(setting: Setting, method: str) -> Guidance:
    """How the method's policy is sampled."""
    how = EVERY[method]
    if how.is_policy:
        return replace(setting.guidance, beta=1.0)
    if how.searches or not how.has_q:
        return replace(setting.guidance, beta=0.0)
    if how.functional == "soft":
        return replace(setting.guidance, beta=1 / setting.eta, functional="soft")
    return setting.guidance


def described(setting: Setting, method: str) -> dict[str, Any]:
    """What a cell depends on, beside the code: in the form that JSON gives back.

    What is off is left out: an option that came later, and is off here, changes no cell.
    """
    said = asdict(replace(setting, task=None, begins_as=None))
    said |= {"objectives": objectives_of(setting, method, [])}
    if setting.begins_as is not None:
        easier, its_setting = setting.begins_as
        said["begins_as"] = [easier, described(its_setting, "MonteCarlo")]
    said["guidance"] = asdict(guided(setting, method))
    own = asdict(EVERY[method])
    if own := _on({name: own[name] for name in ("heads", "joint", "on", "goes_on")}):
        said["own"] = own
    del said["task"], said["options"], said["eta"], said["methods"]
    if not EVERY[method].searches:
        del said["beams"]
    return json.loads(json.dumps(_on(said)))


def _on(said: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is None or False, in mappings of it too."""
    return {
        key: _on(value) if isinstance(value, Mapping) else value
        for key, value in said.items()
        if value is not None and value is not False
    }


def digest(said: Mapping[str, Any]) -> str:
    """Short, and another one where anything is different."""
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:12]


def check_order(results: Mapping[str, Any]) -> None:
    """What theory demands even of short trainings, where a game is easy.

    Whoever judges the logs' policy is better than it, and ways of random walks can be pieced
    together; the first step in a star graph is a coin for whoever clones, and V(s + a) sees its
    end.
    """
    for game, methods in (("random_walk", ("MonteCarlo", "ILQL")), ("star_graph", ("MonteCarlo",))):
        found = results[game]["methods"]
        for method in methods:
            reached = found[method]["score"]
            assert reached > 0, f"{game}: {method} is not better than the logs: {found}"
            assert reached > found["BC"]["score"], f"{game}: {method} is not guided: {found}"
    assert all(r["data_mean"] < r["optimum"] for r in results.values())


def merged(before: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Old results with new ones in their place, method by method."""
    results = {**before}
    for game, found in new.items():
        methods = {**before.get(game, {}).get("methods", {}), **found["methods"]}
        results[game] = {**found, "methods": methods}
    return results


def as_markdown(results: Mapping[str, Any]) -> str:
    lines = [
        "Score: 0 is what the logs earn, 1 the optimum. Seconds: of training, by the clock, one",
        "core beside other work (median of the seeds); run.py says more. Mazes: 30 moves at most.",
        "",
        "| game | method | mean return | score | 95 % | seeds | invalid | seconds |",
        "|" + " --- |" * 8,
    ]
    for game, found in results.items():
        lines.append(f"| {game} | the logs | {found['data_mean']:.3f} | 0 | | | | |")
        for method, m in found["methods"].items():
            ci = "" if m["ci95"] is None else "{:.3f} … {:.3f}".format(*m["ci95"])
            seconds = "" if m["seconds"] is None else f"{m['seconds']:.0f}"
            lines.append(
                f"| | {method} | {m['mean']:.3f} | {m['score']:.3f} | {ci} | {m['seeds']} | "
                f"{m['invalid_rate']:.4f} | {seconds} |"
            )
        lines.append(f"| | optimum | {found['optimum']:.3f} | 1 | | | | |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
