"""Seeds taken together: the headline, the comparisons, the table and the picture."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from judging import Figures

from qvgpt.bootstrap import Estimate, mean_ci
from qvgpt.report import Section, Series, line_chart, write_report

EQUAL_KL = ", equal KL"
"""Ends the name of a rival that goes as far from the base as the headline, on the same prompts."""
BEST_OF_N = "base, best of N"
TUNED = ("filtered", "best of K", "distilled")
"""What is fine-tuned from the base on the same texts, or on guided ones."""
Cells = Sequence[Mapping[str, Any]]
_FARTHEST = 16.0
"""Nats a text that are drawn; nobody reads what lies beyond, and the table has it."""


def summarise(
    cells: Cells, rivals: Sequence[str], facts: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """What results.json holds, and the frontier of each direction.

    Figures are means over seeds; intervals are bootstrapped over prompts, each prompt's figure
    being the mean over samples and seeds.
    """
    rows = {d: _rows(cells, d) for d in ("positive", "negative")}
    positive, negative = (_of(cells, d, rivals) for d in rows)
    results = {
        **positive,
        **facts,
        "reward_accuracy": float(np.mean([c["reward_accuracy"] for c in cells])),
        "negative": negative,
        "rows": [row for direction in rows.values() for row in direction],
    }
    return results, rows


def _of(cells: Cells, direction: str, rivals: Sequence[str]) -> dict[str, Any]:
    """The headline of a direction, and what it is held against."""
    ours = [_one(cell, direction, cell[direction]["headline"]) for cell in cells]
    found = _paired(ours, [_base(cell, direction) for cell in cells], direction)
    time = [cell[direction]["time"] for cell in cells]
    return {
        "metric": f"judge_success: share of texts that the judge calls {direction}",
        "base": found.value - (found.delta or 0.0),
        "guided": found.value,
        "delta": found.delta,
        "delta_ci95": found.delta_ci95,
        "relative_decode_time": float(np.mean([t["median"] for t in time])),
        "time": time,
        "seeds": len(cells),
        "headline": [[c[direction]["headline"], c[direction]["beta"]] for c in cells],
        "against_others": _against(cells, direction, rivals),
        "against_best_of_n": _against_best_of_n(cells, direction),
    }


def _against(cells: Cells, direction: str, rivals: Sequence[str]) -> dict[str, Any]:
    """The headline less each rival at its KL, and less fine-tuning."""
    ours = [_one(cell, direction, cell[direction]["headline"]) for cell in cells]
    there = cells[0][direction]["test"]
    names = [name for rival in (*rivals, BEST_OF_N) if (name := f"{rival}{EQUAL_KL}") in there]
    names += [name for name in there if name.startswith(TUNED)]
    return {
        name: _difference(ours, [_one(cell, direction, name) for cell in cells], direction)
        for name in names
    }


def _against_best_of_n(cells: Cells, direction: str) -> dict[str, Any]:
    """The headline, once and as often as the base, less the base's best of n by the reward."""
    ours = [_one(cell, direction, cell[direction]["headline"]) for cell in cells]
    cost = {}
    for n in [f.strength for f in _figures(cells[0], direction, "base") if f.method == BEST_OF_N]:
        theirs = [_one(c, direction, "base", n, best_of=True) for c in cells]
        cost[f"guided, once, against best of {n:g}"] = _difference(ours, theirs, direction)
        if all(_has(c, direction, n) for c in cells):
            many = [_one(c, direction, c[direction]["headline"], n, best_of=True) for c in cells]
            cost[f"guided, best of {n:g}, against best of {n:g}"] = _difference(
                many, theirs, direction
            )
    return cost


def _figures(cell: Mapping[str, Any], direction: str, name: str) -> list[Figures]:
    return [Figures(**f) for f in cell[direction]["test"][name]]


def _base(cell: Mapping[str, Any], direction: str) -> Figures:
    return next(f for f in _figures(cell, direction, "base") if f.method == "base")


def _has(cell: Mapping[str, Any], direction: str, n: float) -> bool:
    """Whether the headline was written so often that the best of n is known."""
    found = _figures(cell, direction, cell[direction]["headline"])
    wanted = f"β = {cell[direction]['beta']:g}, best of N"
    return any(f.method.endswith(wanted) and f.strength == n for f in found)


def _one(
    cell: Mapping[str, Any],
    direction: str,
    name: str,
    strength: float | None = None,
    best_of: bool = False,
) -> Figures:
    """A method's figures, at the strength that validation chose where none is said."""
    wanted = name
    if best_of:
        at_beta = "" if name == "base" else f", β = {cell[direction]['beta']:g}"
        wanted = f"{name}{at_beta}, best of N"
    found = [f for f in _figures(cell, direction, name) if f.method == wanted]
    if strength is None:
        strength = cell[direction]["beta"] if len(found) > 1 else found[0].strength
    return next(f for f in found if f.strength == strength)


def _mean(figures: Sequence[Figures], direction: str, what: str) -> list[float]:
    return np.mean([f.towards(direction)[what] for f in figures], axis=0).tolist()


def _paired(
    ours: Sequence[Figures], theirs: Sequence[Figures], direction: str, what: str = "success"
) -> Estimate:
    return mean_ci(_mean(ours, direction, what), _mean(theirs, direction, what))


def _difference(
    ours: Sequence[Figures], theirs: Sequence[Figures], direction: str
) -> dict[str, Any]:
    """Ours less theirs, and at what KL each is."""
    found = _paired(ours, theirs, direction)
    return {
        "delta": found.delta,
        "delta_ci95": found.delta_ci95,
        "kl": float(np.mean([f.kl for f in ours])),
        "their_kl": float(np.mean([f.kl for f in theirs])),
        "their_strength": float(np.mean([f.strength for f in theirs])),
    }


def _rows(cells: Cells, direction: str) -> list[dict[str, Any]]:
    """A row for each method and strength, in the order of the first seed."""
    rows = []
    base = [_base(cell, direction) for cell in cells]
    for name in cells[0][direction]["test"]:
        for one in _figures(cells[0], direction, name):
            any_strength = name.endswith(EQUAL_KL)  # it differs from seed to seed
            every = [
                [f for f in _figures(cell, direction, name)
                 if f.method == one.method and (any_strength or f.strength == one.strength)]
                for cell in cells
            ]  # fmt: skip
            figures = [found[0] for found in every]
            success = _paired(figures, base, direction)
            rows.append({
                "direction": direction,
                "method": one.method,
                "strength": float(np.mean([f.strength for f in figures])),
                "success": success.value,
                "success_ci95": success.ci95,
                "delta": success.delta,
                "delta_ci95": success.delta_ci95,
                "judge": float(np.mean(_mean(figures, direction, "judge"))),
                "reward": float(np.mean(_mean(figures, direction, "reward"))),
                "kl": float(np.mean([f.kl for f in figures])),
                "perplexity": float(np.mean([f.perplexity for f in figures])),
                "distinct": np.mean([f.distinct for f in figures], axis=0).tolist(),
                "tokens": float(np.mean([f.tokens for f in figures])),
                "read_per_token": _mean_or_none([f.read_per_token for f in figures]),
            })  # fmt: skip
    return rows


def _mean_or_none(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return float(np.mean(known)) if known else None


def table(results: Mapping[str, Any]) -> str:
    """table.md"""
    lines = [
        f"Judge: accuracy {results['judge_accuracy']:.3f} on validation sentences, reward model "
        f"{results['reward_accuracy']:.3f}; {results['seeds']} seeds. KL of best of N is that of "
        "one text and log N − (N − 1)/N: of guided ones no bound, for both prefer the same tokens.",
        "",
        "| towards | method | β, N or share | success | difference to the base | judge's P "
        "| reward | KL, nats a text | perplexity | distinct 1 / 2 / 3 | tokens | read per token |",
        "|" + " --- |" * 12,
    ]
    directions = {"positive": results, "negative": results["negative"]}
    for r in results["rows"]:
        low, high = r["delta_ci95"]
        read = "" if r["read_per_token"] is None else f"{r['read_per_token']:.2f}"
        lines.append(
            f"| {r['direction']} | {r['method']} | {r['strength']:g} | {r['success']:.3f} | "
            f"{r['delta']:+.3f} [{low:+.3f}, {high:+.3f}] | {r['judge']:.3f} | {r['reward']:.3f} | "
            f"{r['kl']:.2f} | {r['perplexity']:.1f} | "
            f"{' / '.join(f'{d:.2f}' for d in r['distinct'])} | {r['tokens']:.1f} | {read} |"
        )
    for direction, found in directions.items():
        low, high = found["delta_ci95"]
        read, written, text = (
            np.mean([t[key] for t in found["time"]])
            for key in ("median", "per_token_written", "per_text")
        )
        lines += [
            "",
            f"Towards {direction}, guided (β chosen on validation) less the base "
            f"{found['delta']:+.3f} [{low:+.3f}, {high:+.3f}]; a token that is read takes "
            f"{read:.2f} times the base's time, a token that is written {written:.2f}, a text "
            f"{text:.2f}. Less others:",
            "",
        ]
        others = found["against_others"] | found["against_best_of_n"]
        lines += ["| against | difference | KL, theirs |", "| --- | --- | --- |"]
        for name, d in others.items():
            low, high = d["delta_ci95"]
            lines.append(
                f"| {name} | {d['delta']:+.3f} [{low:+.3f}, {high:+.3f}] | {d['kl']:.2f}, "
                f"{d['their_kl']:.2f} |"
            )
    return "\n".join(lines) + "\n"


def picture(path: Path, rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Success against the logarithm of KL, a line a method."""
    charts = []
    for direction, every in rows.items():
        found, series = [r for r in every if "β" not in r["method"]], []  # nor its best of N
        found = [r for r in found if not r["method"].endswith(EQUAL_KL) and r["kl"] <= _FARTHEST]
        for method in dict.fromkeys(_line_of(r["method"]) for r in found):
            of = sorted(
                (r for r in found if _line_of(r["method"]) == method), key=lambda r: r["kl"]
            )
            xs, ys = [math.log10(r["kl"]) for r in of], [r["success"] for r in of]
            low, high = ([r["success_ci95"][i] for r in of] for i in (0, 1))
            series.append(Series(method, xs, ys, low, high, [f"{r['strength']:g}" for r in of]))
        charts.append(
            line_chart(
                series, title=f"Towards {direction}", x_label="log₁₀ of the KL to the base, nats a "
                f"text (of best of N a bound), up to {_FARTHEST:g}", y_label="judge's success",
                style="both", wide=True,
            )
        )  # fmt: skip
    section = Section("Success and distance from the base", body_html="".join(charts))
    write_report(path, "Sentiment: what guidance brings", [section])


def _line_of(method: str) -> str:
    return "filtered" if method.startswith("filtered") else method
