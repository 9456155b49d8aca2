"""table.md and the picture of a row."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qvgpt.report import Section, Series, line_chart, write_report

MOST_TIME = 1.1
"""Of a guided token that is read, in terms of the base's."""
KINDS = ("base", "rival", "values", "guided")


def table(tasks: Mapping[str, Mapping[str, Any]]) -> str:
    """Every system of every task, against the base that writes greedily."""
    return "\n".join(_table(name, results) for name, results in tasks.items())


def _table(name: str, results: Mapping[str, Any]) -> str:
    metrics = list(results["rows"][0]["metrics"])
    time = results["relative_decode_time"]
    met = results["delta_ci95"][0] > 0 and time <= MOST_TIME
    lines = [
        f"**{name}**: {results['seeds']} seed{'s' * (results['seeds'] != 1)}, "
        f"{results['test_rows']} test rows; a token read takes guided {time:.2f} times the base's "
        f"time. Target (guided above the base for certain, in at most {MOST_TIME:g} times the "
        f"time): {'met' if met else 'missed (LOG.md)'}.",
        "",
        f"| system | {metrics[0]} | difference to the base | {' | '.join(metrics[1:])} | words "
        "| KL to base | cost |",
        "|" + " --- |" * (len(metrics) + 5),
    ]
    for row in results["rows"]:
        first, *others = row["metrics"].values()
        low, high = first["delta_ci95"]
        kl = "–" if row["kl_to_base"] is None else f"{row['kl_to_base']:.1f}"
        lines.append(
            f"| {row['system']} | {first['value']:.2f} | {first['delta']:+.2f} "
            f"[{low:+.2f}, {high:+.2f}] | "
            f"{' | '.join(format(o['value'], '.2f') for o in others)} | {row['words']:.1f} | {kl} "
            f"| {row['relative_cost']:.2f} |"
        )
    lines += ["", "Guided less others:", ""]
    for name, figures in results["guided_against"].items():
        low, high = figures["delta_ci95"]
        way = " (guided in that way too)" if name.startswith("base") else ""
        lines.append(f"- {name}{way}: {figures['delta']:+.2f} [{low:+.2f}, {high:+.2f}]")
    return "\n".join(lines) + "\n"


def picture(path: Path, title: str, tasks: Mapping[str, Mapping[str, Any]]) -> None:
    """The metric against tokens read, a chart a task."""
    charts = [_chart(name, results) for name, results in tasks.items()]
    write_report(path, title, [Section("Reward against cost", body_html="".join(charts))])


def _chart(name: str, results: Mapping[str, Any]) -> str:
    metric, series = results["metric"], []
    for kind in KINDS:
        rows = [row for row in results["rows"] if row["system"].startswith(kind)]
        of = [row["metrics"][metric] for row in rows]
        series.append(
            Series(
                kind,
                [math.log2(row["relative_cost"]) for row in rows],
                [figures["value"] for figures in of],
                [figures["ci95"][0] for figures in of],
                [figures["ci95"][1] for figures in of],
                [row["system"].removeprefix(kind).strip(",: ") for row in rows],
            )
        )
    return line_chart(
        series,
        title=name,
        x_label="log₂ of the tokens read, in terms of the base's",
        y_label=metric,
        style="points",
    )
