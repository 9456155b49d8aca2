"""The whole story on a game with a known optimum: `qvgpt demo`.

Random walks are logged by a policy that knows nothing; a GPT with Q and V is trained on them from
scratch; guided by its values it finds the short ways, though nobody ever showed it how. Dynamic
programming says how good that is.
"""

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from qvgpt.bootstrap import mean_ci, spearman
from qvgpt.data.rows import load_trajectories
from qvgpt.data.tokenizer import Tokenizer
from qvgpt.decode.engine import Request, generate, write
from qvgpt.decode.policy import Guidance, joined_q
from qvgpt.envs.games import score
from qvgpt.envs.random_walk import RandomWalks
from qvgpt.errors import QvgptError
from qvgpt.fit_options import FitOptions
from qvgpt.loop import fit
from qvgpt.model_card import evaluation, files_of, training_card, with_evaluation, write_card
from qvgpt.models.gpt import GPT
from qvgpt.models.heads_config import HeadsConfig
from qvgpt.models.value_model import ValueModel
from qvgpt.objectives import parse_objectives
from qvgpt.report import Section, Series, TokenValue, coloured_text, line_chart, write_report
from qvgpt.report import table as html_table
from qvgpt.report_page import side_by_side
from qvgpt.run import read_log, write_json
from qvgpt.trajectory import Trajectory
from qvgpt.value_report import watched_section

OBJECTIVES = ["LM", {"ILQL": {"gamma": 1.0, "expectile": 0.95, "cql_weight": 0.0}}]
HEADS = HeadsConfig(kind="mlp")
FIT = FitOptions(epochs=1000.0, max_steps=400, batch_size=100, lr=2e-3, tau=0.1)
GUIDANCE = Guidance(beta=64.0, min_p=0.1)
MAX_NODES = 10


@dataclass(frozen=True)
class DemoConfig:
    """The built-in demonstration; needs no input and no network."""

    output: str = "runs/demo"
    """Where the model, its card README.md, what it learned from (walks.jsonl), summary.json and
    report.html go; an earlier demo there is replaced."""
    seed: int = 0
    """Of the graph, the logged walks and the training."""
    walks: int = 1000
    """Logged walks to learn from."""
    steps: int = 400
    """Optimizer steps."""
    samples: int = 100
    """Walks sampled from each start to judge a policy."""


def demo(config: DemoConfig, console: Console | None = None) -> dict[str, Any]:
    """Log walks, learn from them, compare with the optimum, write the report."""
    started = time.perf_counter()
    console = console or Console(stderr=True)
    if min(config.walks, config.steps, config.samples) < 1:
        raise QvgptError("demo: walks, steps and samples must be at least 1")
    output = _claim(config)
    walks = RandomWalks.draw(config.seed)
    rows = walks.logged_walks(config.walks, config.seed)
    first = rows[0]
    console.print(
        f"{len(rows)} random walks on {walks.num_nodes} nodes, such as "
        f"{first['prompt']}{first['completion']} with reward {first['reward']:.2f}"
    )
    model, learned = learn(walks, rows, config, output, console)
    samples = {
        "base": sample(model, walks, Guidance(), config.samples, config.seed),
        "guided": sample(model, walks, GUIDANCE, config.samples, config.seed),
        "guided, greedy": sample(
            model, walks, Guidance(**{**asdict(GUIDANCE), "temperature": 0.0}), 1, config.seed
        ),
    }
    data_return = fmean(row["reward"] for row in rows)
    optimal = walks.optimal_return()
    base, guided = fmean(samples["base"]), fmean(samples["guided"])
    summary = {
        "data_return": data_return,
        "base_return": base,
        "guided_return": guided,
        "optimal_return": optimal,
        "normalised_guided": score(guided, data_return, optimal),
        "optimality_base": base,
        "optimality_guided": guided,
        "optimality_greedy": fmean(samples["guided, greedy"]),
        "rows": _rows(samples, len(walks.starts)),
        "q_spearman": q_spearman(model, walks, rows),
        "guidance": asdict(GUIDANCE),
        "seed": config.seed,
        "seconds": round(time.perf_counter() - started, 1),
    }
    _report(output, summary, model, walks)
    _write_card(output, config, learned, summary, model, console)
    summary["seconds"] = round(time.perf_counter() - started, 1)
    write_json(output / "summary.json", summary)
    _show(summary, output, console)
    return summary


def learn(
    walks: RandomWalks,
    rows: list[dict[str, Any]],
    config: DemoConfig,
    output: Path,
    console: Console,
) -> tuple[ValueModel, dict[str, Any]]:
    """Train a small GPT with Q and V on the logged walks, from scratch; and what its card says."""
    tokenizer = Tokenizer.train(walks.letters, "char")
    held_out = walks.logged_walks(max(1, config.walks // 4), config.seed + 1)
    data, counts = _logged(output / "walks.jsonl", rows, tokenizer)
    eval_data, eval_counts = _logged(output / "held_out.jsonl", held_out, tokenizer)
    torch.manual_seed(config.seed)
    gpt = GPT(tokenizer.vocab_size, embed_dim=64, num_heads=4, num_layers=2, seq_len=16)
    model = ValueModel(gpt, HEADS, tokenizer)
    own = {"max_steps": config.steps, "seed": config.seed, "eval_every": -(-config.steps // 8)}
    options = FitOptions(**{**asdict(FIT), **own})
    objectives = parse_objectives(OBJECTIVES)
    fitted = fit(
        model, data, objectives, options, eval_data=eval_data, output=output, console=console
    )
    model.info.recommended_guidance = asdict(GUIDANCE)
    model.save(output)
    return model, {"data": counts, "eval_data": eval_counts, "fit": asdict(options), **fitted}


def _logged(
    file: Path, rows: Sequence[Mapping[str, Any]], tokenizer: Tokenizer
) -> tuple[list[Trajectory], dict[str, Any]]:
    """Walks by way of a file, as a user's own logs would come; and their counts."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts, report = load_trajectories(file, tokenizer)
    return texts, {**asdict(report), "files": files_of([file])}


def _rows(samples: Mapping[str, Sequence[float]], starts: int) -> list[dict[str, Any]]:
    """The means over starts with their intervals, as `evaluate` has them."""
    means = {name: np.reshape(found, (starts, -1)).mean(1) for name, found in samples.items()}
    found = []
    for name, each in means.items():
        e = mean_ci(each.tolist(), means["base"].tolist())
        row = {"method": name, "mean": e.value, "ci95": list(e.ci95), "delta": e.delta}
        found.append(row | {"delta_ci95": list(e.delta_ci95 or ())})
    return found


def _write_card(
    output: Path,
    config: DemoConfig,
    learned: Mapping[str, Any],
    summary: Mapping[str, Any],
    model: ValueModel,
    console: Console,
) -> None:
    """The card of a training, with the figures of the summary."""
    assert model.heads is not None
    settings = {"model": None, "lora": None, "freeze_trunk": False, "fit": learned["fit"]}
    parts = {"trunk": model.trunk, "q": model.heads.q, "v": model.heads.v}
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    found = {**learned, "vocab_size": model.trunk.vocab_size, "parameters": sizes}
    card = training_card(settings, found, model, "demo", "demo.json")
    said = (
        f"{config.samples:,} walks from each start (greedy: one), guided with β {GUIDANCE.beta:g} "
        f"and min_p {GUIDANCE.min_p:g}, seed {config.seed}; optimality is 1 for a shortest way to "
        "the goal and 0 for none. Intervals are 95 %, bootstrapped over the starts; differences "
        "are to the base, paired by start."
    )
    section = evaluation(said, "optimality", summary["rows"])
    write_card(output, with_evaluation(card, section), console.print)


def sample(
    model: ValueModel, walks: RandomWalks, guidance: Guidance, count: int, seed: int
) -> list[float]:
    """Optimality of `count` walks from each start."""
    assert model.tokenizer is not None
    starts = [s for s in walks.starts for _ in range(count)]
    prompts = [model.tokenizer.encode_prompt(s) for s in starts]
    written = generate(model, prompts, guidance, max_tokens=MAX_NODES + 1, seed=seed, max_batch=512)
    texts = [model.tokenizer.decode(c.tokens) for c in written]
    return [walks.optimality(s + text) for s, text in zip(starts, texts, strict=True)]


@torch.no_grad()
def q_spearman(model: ValueModel, walks: RandomWalks, rows: Sequence[dict[str, Any]]) -> float:
    """Rank correlation of learned Q with exact Q*, over legal actions in the logged states."""
    assert model.tokenizer is not None
    exact, tokenizer = walks.solve(), model.tokenizer
    learned, true = [], []
    for length in range(1, MAX_NODES):  # walks of one length need no padding
        whole = (r["prompt"] + r["completion"] for r in rows if len(r["completion"]) >= length)
        walked = sorted({walk[:length] for walk in whole})
        tokens = [tokenizer.encode_prompt(w[0]) + tokenizer.encode(w[1:]) for w in walked]
        if not tokens:
            break
        state = model.trunk.hidden(torch.tensor(tokens, device=model.device))[:, -1]
        found = joined_q(model, state, None, "mean").tolist()
        for walk, q in zip(walked, found, strict=True):
            for action, value in exact.q(walk).items():
                learned.append(q[tokenizer.encode(action)[0] if action else tokenizer.template.eos])
                true.append(value)
    return spearman(np.array(learned), np.array(true))


def _claim(config: DemoConfig) -> Path:
    """An empty directory for the demo; an earlier demo there is replaced, nothing else is."""
    output = Path(config.output)
    marker = output / "demo.json"
    if marker.exists():
        shutil.rmtree(output)
    if output.exists() and any(output.iterdir()):
        raise QvgptError(f"{output}: holds something other than a demo; choose another --output")
    output.mkdir(parents=True, exist_ok=True)
    write_json(marker, {"command": "demo", "config": asdict(config)})
    return output


def _show(summary: dict[str, Any], output: Path, console: Console) -> None:
    table = Table("policy", "optimality", title="Random walks: 1 = always the shortest way")
    for name, key in {
        "the logged walks": "data_return",
        "the GPT that cloned them": "optimality_base",
        "guided by its Q and V": "optimality_guided",
        "guided, greedy": "optimality_greedy",
        "optimum (dynamic programming)": "optimal_return",
    }.items():
        table.add_row(name, f"{summary[key]:.3f}")
    console.print(table)
    console.print(f"{summary['seconds']} s; report: {output / 'report.html'}")


def _report(output: Path, summary: dict[str, Any], model: ValueModel, walks: RandomWalks) -> None:
    log = read_log(output / "log.jsonl")
    steps = [r["step"] for r in log]
    curves = [
        Series(name, steps, [r.get(name) for r in log]) for name in ("LM/nll", "ILQL/q", "ILQL/v")
    ]
    rows = [
        {"policy": "logged walks", "optimality": summary["data_return"]},
        {"policy": "cloned by the GPT", "optimality": summary["optimality_base"]},
        {"policy": f"guided, β = {GUIDANCE.beta:g}", "optimality": summary["optimality_guided"]},
        {"policy": "guided, greedy", "optimality": summary["optimality_greedy"]},
        {"policy": "optimum by dynamic programming", "optimality": summary["optimal_return"]},
    ]
    sections = [
        Section(
            "What was learned",
            f"{walks.num_nodes} nodes, walks of at most {walks.max_length} nodes to node a. The "
            "reward, given at the end, is 1 for a shortest way and 0 for none. The rank "
            f"correlation of the learned Q with the exact Q* is {summary['q_spearman']:.3f}.",
            html_table(rows, best={"optimality": "max"}),
        ),
        Section(
            "Learning curves",
            "",
            line_chart(curves, title="Loss parts", x_label="step", y_label="loss"),
        ),
        Section(
            "Walks, coloured by advantage",
            "Each with its optimality. Blue: better than what the model would do on average; "
            "red: worse.",
            _coloured_walks(model, walks),
        ),
    ]
    sections[-1:-1] = watched_section(log)
    write_report(output / "report.html", "qvgpt demo: random walks", sections)


def _coloured_walks(model: ValueModel, walks: RandomWalks) -> str:
    assert model.tokenizer is not None
    tokenizer, html = model.tokenizer, []
    for start in walks.starts[:4]:
        prompt, cells = tokenizer.encode_prompt(start), []
        for name, guidance in (("base", Guidance()), ("guided", GUIDANCE)):
            [text] = write(model, [Request(prompt, MAX_NODES + 1, guidance, seed=1)], report=True)
            tokens = [TokenValue(start, is_action=False)]
            for piece, r in zip(tokenizer.pieces(text.tokens), text.reports, strict=True):
                probabilities = torch.tensor([r.base_logprob, r.logprob]).exp().tolist()
                tokens.append(TokenValue(piece, r.advantage, r.q, r.v, *probabilities))  # type: ignore[arg-type]
            caption = f"{name}: {walks.optimality(start + text.text):.2f}"
            cells.append((caption, coloured_text(tokens, scale=0.5, legend=not html)))
        html.append(side_by_side(cells))
    return "".join(html)
