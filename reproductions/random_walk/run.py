"""Random walks over ten seeds (graph, logged walks and training): is the demo's bar held?

    python reproductions/random_walk/run.py            ten seeds, a few minutes
    python reproductions/random_walk/run.py --quick    one seed, cut short, nothing written

Writes results.json and table.md beside itself. The bar: guided optimality of sampled walks at
temperature 1 is at least 0.99 on average and 0.97 in the worst seed.
"""

import argparse
import io
import json
import tempfile
from pathlib import Path
from statistics import fmean

from rich.console import Console

from qvgpt.demo import DemoConfig, demo

HERE = Path(__file__).parent
COLUMNS = (
    "seed",
    "data_return",
    "optimality_base",
    "optimality_guided",
    "optimality_greedy",
    "normalised_guided",
    "q_spearman",
    "seconds",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one short seed, nothing written")
    parser.add_argument("--seeds", type=int, default=10)
    options = parser.parse_args()
    quick = {"steps": 20, "samples": 2, "walks": 200} if options.quick else {}
    runs = []
    for seed in range(1 if options.quick else options.seeds):
        with tempfile.TemporaryDirectory() as directory:
            config = DemoConfig(output=directory, seed=seed, **quick)
            runs.append(demo(config, Console(file=io.StringIO())))
        print({name: _short(runs[-1][name]) for name in COLUMNS}, flush=True)
    guided = [run["optimality_guided"] for run in runs]
    results = {
        "optimality_mean": fmean(guided),
        "optimality_min": min(guided),
        "greedy_mean": fmean(run["optimality_greedy"] for run in runs),
        "greedy_min": min(run["optimality_greedy"] for run in runs),
        "base_mean": fmean(run["optimality_base"] for run in runs),
        "seeds": [run["seed"] for run in runs],
        "seconds_per_seed": fmean(run["seconds"] for run in runs),
        "guidance": runs[0]["guidance"],
        "runs": [{name: run[name] for name in COLUMNS} for run in runs],
    }
    print(json.dumps({k: v for k, v in results.items() if k != "runs"}, indent=2))
    if not options.quick:
        (HERE / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        (HERE / "table.md").write_text(_table(runs))


def _table(runs: list[dict]) -> str:
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    lines += ["| " + " | ".join(str(_short(run[c])) for c in COLUMNS) + " |" for run in runs]
    means = ["mean"] + [str(_short(fmean(run[c] for run in runs))) for c in COLUMNS[1:]]
    lines.append("| " + " | ".join(means) + " |")
    return "\n".join(lines) + "\n"


def _short(value: float | int) -> float | int:
    return round(value, 3)


if __name__ == "__main__":
    main()
