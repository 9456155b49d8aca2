"""Ways to spend forwards on values, on random walks: optimality, and tokens read per token.

    python reproductions/random_walk/search.py            five seeds, some minutes
    python reproductions/random_walk/search.py --quick    one seed, cut short, nothing written

Each seed's model is the demo's. All methods take tokens that are at least a tenth as likely as the
likeliest (the demo's min_p). Writes search.json, search.md and search.html beside itself.
"""

import argparse
import io
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from rich.console import Console

from qvgpt.compare import CompareOptions, Row, compare
from qvgpt.decode.beam import BeamSearch
from qvgpt.decode.blocks import BlockSearch
from qvgpt.decode.policy import Guidance
from qvgpt.decode.search import Search
from qvgpt.decode.searches import search_name
from qvgpt.decode.tree import TreeSearch
from qvgpt.demo import GUIDANCE, MAX_NODES, DemoConfig, demo
from qvgpt.envs.random_walk import RandomWalks
from qvgpt.models.value_model import ValueModel
from qvgpt.report import Section, Series, line_chart, write_report

HERE = Path(__file__).parent
ROOM = {"max_tokens": MAX_NODES + 1}
BASE = replace(GUIDANCE, beta=0.0)
GREEDY = replace(BASE, temperature=0.0)
BETAS = (4.0, 16.0, GUIDANCE.beta)
SEARCHES: list[tuple[Guidance, Search]] = [
    (BASE, BlockSearch(1, 8, 1, **ROOM)),
    (BASE, BlockSearch(1, 8, 2, **ROOM)),
    (BASE, BlockSearch(1, 8, 4, **ROOM)),
    (BASE, BlockSearch(2, 4, 2, **ROOM)),
    (BASE, BlockSearch(1, 8, 2, keep=0.5, **ROOM)),
    (GREEDY, BeamSearch(5, **ROOM)),
    (GREEDY, BeamSearch(5, value_weight=GUIDANCE.beta, **ROOM)),
    (GREEDY, TreeSearch(4, **ROOM)),
    (GREEDY, TreeSearch(16, **ROOM)),
    (GREEDY, TreeSearch(64, **ROOM)),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one short seed, nothing written")
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    quick = {"steps": 20, "samples": 1, "walks": 200} if options.quick else {}
    found: dict[str, list[Row]] = {}
    for seed in range(1 if options.quick else options.seeds):
        with tempfile.TemporaryDirectory() as directory:
            demo(DemoConfig(output=directory, seed=seed, **quick), Console(file=io.StringIO()))
            model = ValueModel.from_pretrained(directory)
        for row in _rows(model, RandomWalks.draw(seed), 1 if options.quick else 20):
            found.setdefault(row.method, []).append(row)
        print(f"seed {seed} done", flush=True)
    results = [
        {
            "method": name,
            "optimality": fmean(row.score.value for row in rows),
            "worst_seed": min(row.score.value for row in rows),
            "read_per_token": fmean(row.forward_tokens_per_token or 0.0 for row in rows),
            "us_per_token": 1e6 * fmean(row.s_per_token or 0.0 for row in rows),
            "kl": fmean(row.kl_per_sequence for row in rows),
        }
        for name, rows in found.items()
    ]
    table = _table(results)
    print(table)
    if not options.quick:
        (HERE / "search.json").write_text(json.dumps(results, indent=2) + "\n")
        (HERE / "search.md").write_text(table)
        _picture(results)


def _rows(model: ValueModel, walks: RandomWalks, samples: int) -> list[Row]:
    """Every method, over all starts."""
    assert model.tokenizer is not None
    guidances = {
        "base": BASE,
        "base, greedy": GREEDY,
        "best of 8": BASE,
        **{f"guided, β = {beta:g}": replace(GUIDANCE, beta=beta) for beta in BETAS},
        f"guided, β = {GUIDANCE.beta:g}, greedy": replace(GUIDANCE, temperature=0.0),
    }
    searches = {search_name(search): search for _, search in SEARCHES}
    guidances |= {search_name(search): guidance for guidance, search in SEARCHES}
    starts = walks.starts

    def score(texts: list[str], index: list[int]) -> list[float]:
        return [walks.optimality(starts[i] + text) for text, i in zip(texts, index, strict=True)]

    options = CompareOptions(samples, MAX_NODES + 1, max_batch=256, seed=1, timing=400)
    prompts = [model.tokenizer.encode_prompt(start) for start in starts]
    return compare(
        model, prompts, score, guidances, options, best_of={"best of 8": 8}, searches=searches
    )


def _table(results: list[dict]) -> str:
    lines = [
        "| method | optimality | worst seed | tokens read per token | µs per token | KL |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in results:
        lines.append(
            f"| {row['method']} | {row['optimality']:.3f} | {row['worst_seed']:.3f} "
            f"| {row['read_per_token']:.2f} | {row['us_per_token']:.0f} | {row['kl']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def _picture(results: list[dict]) -> None:
    """Optimality against what it costs: KL to the base, tokens read, time."""
    kinds = ("base", "best of", "guided", "block", "beam", "tree")
    charts = []
    for key, what in {
        "kl": "KL to the base, nats a text (for searches and best of N a bound)",
        "read_per_token": "tokens read for each token written",
        "us_per_token": "µs for each token written",
    }.items():
        series = []
        for kind in kinds:
            of = [row for row in results if row["method"].startswith(kind)]
            shown = [row["method"].removeprefix("guided, ").split("(")[-1] for row in of]
            labels = [name.rstrip(")") if kind in ("guided", "block") else "" for name in shown]
            ys = [row["optimality"] for row in of]
            series.append(Series(kind, [row[key] for row in of], ys, labels=labels))
        figure = line_chart(
            series,
            title=f"Optimality and {what}",
            x_label=what,
            y_label="optimality",
            style="points",
        )
        charts.append(figure)
    section = Section("Ways to spend forwards on values, five seeds", body_html="".join(charts))
    write_report(HERE / "search.html", "Random walks: guided and searched", [section])


if __name__ == "__main__":
    main()
