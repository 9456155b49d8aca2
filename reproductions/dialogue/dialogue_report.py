"""The figures of all seeds as results.json, table.md and a picture."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from turns import Turns, by_turn, clustered, figures

from qvgpt.bootstrap import calibration, mean_ci
from qvgpt.report import Section, Series, line_chart, write_report

RIVALS = ("mean of the turn", "ridge on the turn", "ridge on turn and words")
COLUMNS = {
    "skill": "skill",
    "rmse": "rmse",
    "slope": "slope",
    "intercept": "intercept",
    "ece": "ece",
    "spearman": "Spearman, all turns",
    "within": "within a turn",
    "after_5": "after 5 questions",
    "after_10": "after 10",
}
NOT_GUIDED = (
    "a dialogue cannot go on without the other side, which no log holds: fqe estimates from logs "
    "what a guided policy would earn, and says so of the logs' own policy too, where it is known"
)


def summarise(
    seeds: Sequence[tuple[Turns, Mapping[str, np.ndarray]]], cities: Sequence[str], resamples: int
) -> dict[str, Any]:
    """Means over seeds; intervals over test games, and over the cities of these."""
    turns, first = seeds[0]
    city = np.array(cities)[turns.game]
    rows, curves = [], {}
    for name in first:
        every = [said[name] for _, said in (seeds[:1] if name in RIVALS else seeds)]
        means = _means(every, turns, first[RIVALS[0]])
        games, by_city = (clustered(means, drawn, resamples) for drawn in (turns.game, city))
        row = {
            key: {
                "value": _number(value),
                "ci95": _pair(games[key]),
                "ci95_cities": _pair(by_city[key]),
            }
            for key, value in means(np.arange(len(city))).items()
        }
        rows.append({"method": name, **row})
        ranks = [by_turn(predicted, turns) for predicted in every]
        curves[name] = {
            "calibration": calibration(np.mean(every, axis=0), turns.to_come),
            "by_turn": {str(t): fmean(r[t] for r in ranks) for t in ranks[0]},
        }
    returns = turns.to_come[turns.turn == 0]
    held = mean_ci(returns.tolist(), resamples=resamples)
    return {
        "metric": "return to come where a question is to be asked",
        "base": held.value,
        "base_ci95": list(held.ci95),
        "guided": None,
        "delta": None,
        "delta_ci95": None,
        "relative_decode_time": None,
        "why_not_guided": NOT_GUIDED,
        "seeds": len(seeds),
        "turns": len(turns.turn),
        "rows": rows,
        "curves": curves,
    }


def _means(
    every: Sequence[np.ndarray], turns: Turns, reference: np.ndarray
) -> Callable[[np.ndarray], dict[str, float]]:
    """Of some turns: the figures of several seeds' predictions, averaged."""

    def of(at: np.ndarray) -> dict[str, float]:
        some = Turns(turns.game[at], turns.turn[at], turns.to_come[at])
        found = [figures(predicted[at], some, reference[at]) for predicted in every]
        return {key: fmean(f[key] for f in found) for key in found[0]}

    return of


def offline(seeds: Sequence[Mapping[str, float]], held_out: float) -> dict[str, Any]:
    """The estimates of each policy, and how far that of the logs' policy is off."""
    found = {name: {"mean": fmean(s[name] for s in seeds), "seeds": [s[name] for s in seeds]}
             for name in seeds[0]}  # fmt: skip
    own = next(iter(found.values()))
    return {"policies": found, "held_out_mean": held_out, "error": own["mean"] - held_out}


def _number(value: float) -> float | None:
    return None if np.isnan(value) else value


def _pair(ends: tuple[float, float]) -> list[float] | None:
    return None if np.isnan(ends).any() else list(ends)


def table(results: Mapping[str, Any]) -> str:
    """table.md"""
    games = results["games"]
    lines = [
        "; ".join(
            f"{side}: {n['games']} games of {n['cities']} cities" for side, n in games.items()
        )
        + f"; {results['seeds']} seeds, {results['turns']} turns of test games. Brackets: 95 % "
        "over games, then over cities.",
        "",
        f"| method | {' | '.join(COLUMNS.values())} |",
        "|" + " --- |" * (1 + len(COLUMNS)),
    ]
    for row in results["rows"]:
        lines.append(f"| {row['method']} | {' | '.join(_cell(row, key) for key in COLUMNS)} |")
    fqe = results["fqe"]
    lines += ["", "| policy | return, estimated from logs | each seed |", "| --- | --- | --- |"]
    for name, found in fqe["policies"].items():
        each = ", ".join(f"{x:.2f}" for x in found["seeds"])
        lines.append(f"| {name} | {found['mean']:.2f} | {each} |")
    low, high = results["base_ci95"]
    lines.append(f"| what test games earned | {results['base']:.2f} [{low:.2f}, {high:.2f}] | |")
    return "\n".join(lines) + "\n"


def _cell(row: Mapping[str, Any], key: str) -> str:
    found = row[key]
    if found["value"] is None:
        return "–"
    text = f"{found['value']:.2f}"
    if key not in ("skill", "spearman", "within", "slope"):
        return text
    ends = [found["ci95"], found["ci95_cities"]] if key in ("skill", "within") else [found["ci95"]]
    return " ".join([text, *("[{:.2f}, {:.2f}]".format(*e) for e in ends if e is not None)])


def picture(path: Path, results: Mapping[str, Any]) -> None:
    """Calibration, and what is known at each turn beyond its number."""
    shown = {name: curve for name, curve in results["curves"].items() if name not in RIVALS[:2]}
    reliability = [
        Series(
            name,
            [t["predicted"] for t in c["calibration"]],
            [t["actual"] for t in c["calibration"]],
        )
        for name, c in shown.items()
    ]
    ranks = [
        Series(name, [int(t) for t in c["by_turn"]], [*c["by_turn"].values()])
        for name, c in shown.items()
    ]
    charts = line_chart(
        reliability, title="Calibration, by tenths of the predictions", x_label="return foretold",
        y_label="return that came", style="both", diagonal=True,
    ) + line_chart(
        ranks, title="Rank correlation with the outcome, among games at the same turn",
        x_label="questions asked before", y_label="Spearman", style="both",
    )  # fmt: skip
    section = Section("Test games, of cities never seen", body_html=charts)
    write_report(path, "Guess my city: what values know", [section])
