"""Ways to spend forwards on values: reward against KL to the base, tokens read, and time.

    python reproductions/search/run.py random_walk       five seeds, some minutes
    python reproductions/search/run.py translation --model DIR --plus DIR --data FILE
    python reproductions/search/run.py sentiment --work DIR
    python reproductions/search/run.py --quick           one short seed of walks, nothing written

Walks: each seed's model is the demo's, the contrast that of two language models of the best and
the worst fifth of its logs. Translation: the models of reproductions/translation/run.py (`--model`:
with values, `--plus`: "rival: best of K", contrasted with the model's own trunk), the first
`--rows` pairs of FILE, reward: sentence BLEU. Sentiment: the models that
reproductions/sentiment/run.py left in its --work (of the first seed values by Monte Carlo, base and
experts of both labels), the first `--rows` test prompts, reward: P(positive) by the judge, which no
model learned from. Writes TASK.json, TASK.md and TASK.html; sentiment with --quick takes a few
prompts and writes nothing.
"""

import argparse
import io
import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.console import Console

from qvgpt.compare import CompareOptions, Method, Row, Score, compare
from qvgpt.data.rows import Row as DataRow
from qvgpt.data.rows import row_to_trajectories
from qvgpt.decode.beam import BeamSearch
from qvgpt.decode.blocks import BlockSearch
from qvgpt.decode.policy import Guidance
from qvgpt.decode.search import Search
from qvgpt.decode.searches import search_name
from qvgpt.decode.sources import Contrast
from qvgpt.decode.tree import TreeSearch
from qvgpt.demo import FIT, GUIDANCE, MAX_NODES, DemoConfig, demo
from qvgpt.envs.random_walk import RandomWalks
from qvgpt.envs.rewards import bleu_prefixes, get_reward
from qvgpt.loop import fit
from qvgpt.models.gpt import GPT
from qvgpt.models.value_model import ValueModel
from qvgpt.objectives import parse_objectives
from qvgpt.report import Section, Series, line_chart, write_report
from qvgpt.run import write_json

HERE = Path(__file__).parent
BEST_OF = 8
SHORT, ROOM, PHRASE = {"max_tokens": MAX_NODES + 1}, {"max_tokens": 64}, {"max_tokens": 24}
"""Of a walk, of a translation, and of a review's sentence."""


@dataclass(frozen=True)
class Ways:
    """How a task's texts are written: the strengths, the searches, and who samples them."""

    base: Guidance
    betas: Sequence[float]
    contrasts: Sequence[float]
    """Strengths of the contrast of two language models."""
    sampled: Sequence[Search]
    greedy: Sequence[Search]
    max_tokens: int


@dataclass(frozen=True)
class Prompted:
    """A model, its prompts and the reward of their completions."""

    model: ValueModel
    contrast: Contrast
    prompts: list[list[int]]
    score: Score
    base: ValueModel | None = None
    """What writes unguided, and what KL is to; None: the model itself."""


WALKS = Ways(
    replace(GUIDANCE, beta=0.0),
    (4.0, 16.0, GUIDANCE.beta),
    (0.5, 1.0, 2.0),
    [
        *(BlockSearch(1, 8, block, **SHORT) for block in (1, 2, 4)),
        BlockSearch(2, 4, 2, **SHORT),
        BlockSearch(1, 8, 2, keep=0.5, **SHORT),
    ],
    [
        BeamSearch(5, **SHORT),
        BeamSearch(5, value_weight=GUIDANCE.beta, **SHORT),
        *(TreeSearch(simulations, **SHORT) for simulations in (4, 16, 64)),
    ],
    **SHORT,
)
TRANSLATION = Ways(
    Guidance(top_k=50),
    (1.0, 4.0, 16.0),
    (0.5, 1.0, 2.0),
    [BlockSearch(1, 8, block, **ROOM) for block in (4, 16)],
    [
        BeamSearch(5, **ROOM),
        BeamSearch(5, value_weight=1.0, **ROOM),
        TreeSearch(8, **ROOM),
    ],
    **ROOM,
)
SENTIMENT = Ways(
    Guidance(top_k=40),
    (2.0, 8.0, 24.0),
    (0.5, 1.0, 2.0),
    [BlockSearch(1, 8, block, **PHRASE) for block in (2, 8)],
    [BeamSearch(5, **PHRASE), TreeSearch(16, **PHRASE)],
    **PHRASE,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", nargs="?", choices=("random_walk", "translation", "sentiment"))
    parser.add_argument("--quick", action="store_true", help="one short seed, nothing written")
    parser.add_argument("--seeds", type=int, default=5, help="of walks")
    parser.add_argument("--model", type=Path, help="of translation: with values")
    parser.add_argument("--plus", type=Path, help="of translation: the better language model")
    parser.add_argument("--data", type=Path, help="of translation: pairs to translate")
    parser.add_argument("--work", type=Path, help="of sentiment: where its models are")
    parser.add_argument("--draw", action="store_true", help="the picture of TASK.json again")
    parser.add_argument("--rows", type=int, default=200, help="of those pairs, or prompts")
    options = parser.parse_args()
    if options.task == "sentiment" and not options.draw:
        if options.work is None:
            parser.error("sentiment: say --work")
        asked = sentiment(options.work, 2 if options.quick else options.rows)
        timing, samples = (0, 1) if options.quick else (64, 2)
        found = spent(SENTIMENT, asked, samples, timing)
        if options.quick:
            print(json.dumps(found, indent=1))
        else:
            keep("sentiment", [found], "P(positive) by the judge")
        return
    if options.quick:
        few = replace(WALKS, greedy=WALKS.greedy[:-2])
        print(json.dumps(spent(few, walks(0, steps=20, logged=200), 1, 8), indent=1))
        return
    if options.task and options.draw:
        kept = json.loads((HERE / f"{options.task}.json").read_text())
        picture(options.task, kept["methods"], kept["reward"])
    elif options.task == "translation":
        if None in (options.model, options.plus, options.data):
            parser.error("translation: say --model, --plus and --data")
        asked = translation(options.model, options.plus, options.data, options.rows)
        keep("translation", [spent(TRANSLATION, asked, samples=1, timing=64)], "sentence BLEU")
    elif options.task == "random_walk":
        seeds = []
        for seed in range(options.seeds):
            seeds.append(spent(WALKS, walks(seed)))
            print(f"seed {seed} done", flush=True)
        keep("random_walk", seeds, "optimality")
    else:
        parser.error("which task?")


def walks(seed: int, steps: int = 400, logged: int = 1000) -> Prompted:
    """The demo's model, and a contrast of what its best and its worst logs say."""
    with tempfile.TemporaryDirectory() as directory:
        config = DemoConfig(output=directory, seed=seed, steps=steps, walks=logged)
        demo(replace(config, samples=1), Console(file=io.StringIO()))
        model = ValueModel.from_pretrained(directory)
    drawn = RandomWalks.draw(seed)
    rows = sorted(drawn.logged_walks(logged, seed), key=lambda row: row["reward"])
    fifth = logged // 5
    contrast = Contrast(*(clone(model, some, steps) for some in (rows[-fifth:], rows[:fifth])))
    starts = drawn.starts

    def score(texts: list[str], index: list[int]) -> list[float]:
        return [drawn.optimality(starts[i] + text) for text, i in zip(texts, index, strict=True)]

    assert model.tokenizer is not None
    return Prompted(model, contrast, [model.tokenizer.encode_prompt(s) for s in starts], score)


def clone(model: ValueModel, rows: Sequence[dict[str, Any]], steps: int) -> ValueModel:
    """A language model of the demo's size that learned from these walks alone."""
    tokenizer = model.tokenizer
    assert tokenizer is not None
    texts = [t for row in rows for t in row_to_trajectories(DataRow("walk", row), tokenizer)]
    torch.manual_seed(0)
    gpt = GPT(tokenizer.vocab_size, embed_dim=64, num_heads=4, num_layers=2, seq_len=16)
    cloned = ValueModel(gpt, None, tokenizer)
    fitting = replace(FIT, max_steps=steps // 4)  # a fifth of the logs is soon known by heart
    fit(cloned, texts, parse_objectives(["LM"]), fitting, console=Console(file=io.StringIO()))
    return cloned


def translation(model_dir: Path, plus_dir: Path, data: Path, count: int) -> Prompted:
    """Sentences to translate, by models trained before."""
    model = ValueModel.from_pretrained(model_dir)
    plain = ValueModel(model.trunk, None, model.tokenizer)
    contrast = Contrast(ValueModel.from_pretrained(plus_dir), plain)
    rows = [json.loads(line) for line in data.read_text().splitlines()[:count]]

    def score(texts: list[str], index: list[int]) -> list[float]:
        references = [{"references": [rows[i]["completion"]]} for i in index]
        return [bleu_prefixes([t], r)[0] for t, r in zip(texts, references, strict=True)]

    assert model.tokenizer is not None
    prompts = [model.tokenizer.encode_prompt(row["prompt"]) for row in rows]
    return Prompted(model, contrast, prompts, score)


def sentiment(work: Path, count: int) -> Prompted:
    """Sentences to go on with, by the models of the first seed."""
    seed = work / "seed-0"
    models = ("positive/MonteCarlo", "base", "expert-positive", "expert-negative")
    model, base, plus, minus = (ValueModel.from_pretrained(seed / name) for name in models)
    judge = get_reward(f"classifier:{work / 'judge'}#positive")
    prompted = (work / "data/prompts.test.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in prompted[:count]]

    def score(texts: list[str], index: list[int]) -> list[float]:
        return judge(texts, [rows[i] for i in index])

    assert model.tokenizer is not None
    prompts = [model.tokenizer.encode_prompt(row["prompt"]) for row in rows]
    return Prompted(model, Contrast(plus, minus), prompts, score, base)


def spent(
    ways: Ways, asked: Prompted, samples: int = 20, timing: int = 400
) -> dict[str, dict[str, Any]]:
    """What every way makes of a model's prompts, and what it costs."""
    greedy = replace(ways.base, temperature=0.0)
    methods: dict[str, Guidance | Method] = {
        "base": ways.base,
        "base, greedy": greedy,
        f"best of {BEST_OF}": Method(ways.base, BEST_OF),
        **{f"guided, β = {beta:g}": replace(ways.base, beta=beta) for beta in ways.betas},
        f"guided, β = {ways.betas[-1]:g}, greedy": replace(greedy, beta=ways.betas[-1]),
        **{search_name(search): Method(ways.base, search=search) for search in ways.sampled},
        **{search_name(search): Method(greedy, search=search) for search in ways.greedy},
    }
    options = CompareOptions(samples, ways.max_tokens, max_batch=256, seed=1, timing=timing)

    def run(model: ValueModel, methods: Mapping[str, Guidance | Method], **how: Any) -> list[Row]:
        return compare(model, asked.prompts, asked.score, methods, options, **how)

    rows = run(asked.model, methods, base=asked.base)
    strengths = {f"contrast, α = {a:g}": replace(ways.base, beta=a) for a in ways.contrasts}
    rows += run(asked.base or asked.model, strengths, values=asked.contrast)
    return {
        row.method: {
            "reward": row.score.value,
            "ci95": list(row.score.ci95),
            "kl": row.kl_per_sequence,
            "read_per_token": row.forward_tokens_per_token,
            "us_per_token": 1e6 * (row.s_per_token or 0.0),
        }
        for row in rows
    }


def keep(task: str, seeds: Sequence[dict[str, dict[str, Any]]], reward: str) -> None:
    """The means over seeds, as figures, table and pictures."""
    found = {
        method: {
            key: first[key] if key == "ci95" else fmean(seed[method][key] for seed in seeds)
            for key in first
        }
        for method, first in seeds[0].items()
    }
    if len(seeds) > 1:  # the interval of a seed's texts says little then
        for method, row in found.items():
            del row["ci95"]
            row["worst_seed"] = min(seed[method]["reward"] for seed in seeds)
    write_json(HERE / f"{task}.json", {"reward": reward, "seeds": len(seeds), "methods": found})
    (HERE / f"{task}.md").write_text(table(found))
    picture(task, found, reward)
    print(table(found))


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    shown: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "reward": lambda row: f"{row['reward']:.3f}",
        "worst seed": lambda row: f"{row['worst_seed']:.3f}",
        "95 %": lambda row: "{:.3f} … {:.3f}".format(*row["ci95"]),
        "KL": lambda row: f"{row['kl']:.2f}",
        "tokens read per token": lambda row: f"{row['read_per_token']:.2f}",
        "µs per token": lambda row: f"{row['us_per_token']:.0f}",
    }
    missing = {"95 %": "ci95", "worst seed": "worst_seed"}
    first = next(iter(found.values()))
    columns = [name for name in shown if missing.get(name, "kl") in first]
    lines = [f"| method | {' | '.join(columns)} |", "|" + " --- |" * (len(columns) + 1)]
    for method, row in found.items():
        lines.append(f"| {method} | {' | '.join(shown[c](row) for c in columns)} |")
    return "\n".join(lines) + "\n"


def picture(task: str, found: Mapping[str, Mapping[str, Any]], reward: str) -> None:
    """Reward against what it costs: KL to the base, tokens read, time."""
    kinds = ("base", "best of", "guided", "contrast", "block", "beam", "tree")
    axes: dict[str, tuple[str, Callable[[float], float]]] = {
        "kl": ("KL to the base, nats a text (of searches and best of N a bound)", float),
        "read_per_token": ("tokens read for each token written", float),
        "us_per_token": ("log₁₀ of the µs for each token written", math.log10),
    }
    charts = []
    for key, (what, scaled) in axes.items():
        series = []
        for kind in kinds:
            of = {name: row for name, row in found.items() if name.startswith(kind)}
            shown = key == "kl" and kind in ("guided", "contrast")  # elsewhere points are close
            labels = [n.split(", ")[1] if shown and "greedy" not in n else "" for n in of]
            xs = [scaled(row[key]) for row in of.values()]
            ys = [row["reward"] for row in of.values()]
            series.append(Series(kind, xs, ys, labels=labels))
        title = f"{reward[0].upper()}{reward[1:]} and {what}"
        charts.append(line_chart(series, title=title, x_label=what, y_label=reward, style="points"))
    section = Section("Ways to spend forwards on values", body_html="".join(charts))
    write_report(HERE / f"{task}.html", f"{task.replace('_', ' ')}: guided and searched", [section])


if __name__ == "__main__":
    main()
