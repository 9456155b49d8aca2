"""English → German on Multi30k: does a GPT with Q and V translate better than the GPT it was?

    python reproductions/translation/run.py DATA       hours on two cores; goes on where it stopped
    python reproductions/translation/run.py --quick    a toy of the same form, nothing kept

DATA holds multi30k.en-de.{train,val,test2016}.jsonl with rows {"prompt", "completion"}. The YAML
files beside this script say how each model is made; everything lands under --work. β, candidates
and the beam's length penalty are chosen on val, the table is made on test2016. Writes results.json,
table.md and picture.html beside itself.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from qvgpt.bootstrap import corpus_bleu_ci, corpus_chrf_ci
from qvgpt.collect import CollectConfig, collect
from qvgpt.decode.policy import Guidance
from qvgpt.models.value_model import ValueModel
from qvgpt.run import write_json
from qvgpt.train_config import TrainConfig
from qvgpt.trainer import train

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent))

from texts.decoding import (  # noqa: E402
    beam,
    best_by,
    corpus,
    mean_kl,
    minimum_bayes_risk,
    relative_seconds,
    write,
)
from texts.reporting import picture  # noqa: E402

ROUNDS = 1
SAMPLES = 8
BEAMS = 5


@dataclass(frozen=True)
class Grid:
    """What is tried on val, and how often time is measured."""

    betas: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0)
    top_k: tuple[int | None, ...] = (None,)
    temperatures: tuple[float, ...] = (0.3, 0.6, 1.0)
    length_penalties: tuple[float, ...] = (0.6, 1.0, 1.4, 1.8)
    rounds: int = 10


QUICK = Grid((1.0,), (None,), (0.6,), (1.0,), rounds=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="?", type=Path, help="directory of the JSONL files")
    parser.add_argument("--work", type=Path, default=Path("runs/translation"))
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.quick:
        with tempfile.TemporaryDirectory() as directory:
            data = _toy(Path(directory) / "data")
            results = run(data, Path(directory) / "work", quick=True)
        print(json.dumps(results, indent=1))
        return
    if options.data is None:
        parser.error("say where the data are, or --quick")
    results = run(options.data, options.work)
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (HERE / "table.md").write_text(_table(results["rows"]))
    picture(HERE / "picture.html", "Translation", {"English to German": _as_charted(results)})
    print((HERE / "table.md").read_text())


def run(data: Path, work: Path, quick: bool = False) -> dict[str, Any]:
    """Every step from the pairs to the table; steps that are finished are not repeated."""
    files = {s: data / f"multi30k.en-de.{s}.jsonl" for s in ("train", "val", "test2016")}
    base = _trained("base", work, quick, data=[files["train"]], eval_data=[files["val"]])
    values, collected = base, []
    for n in range(1, ROUNDS + 1):  # what the last round's model writes is what the next learns of
        collected.append(_collected(f"samples_{n}", work, quick, values, files["train"]))
        output = f"values_{n}"
        values = _trained("values", work, quick, output, model=values, data=[collected[-1]])
    best = _best_of_k(collected, work / "best_of_k.jsonl")
    rival = _trained("best_of_k", work, quick, model=base, data=[best])
    val, test, grid = _rows(files["val"]), _rows(files["test2016"]), QUICK if quick else Grid()
    chosen = _choose(base, values, val, grid)
    write_json(work / "chosen.json", chosen)
    return _compare(base, rival, values, test, chosen, grid)


def _trained(name: str, work: Path, quick: bool, output: str = "", **where: Any) -> Path:
    """Train what `name`.yaml says, from and to files."""
    directory = work / (output or name)
    said = yaml.safe_load((HERE / f"{name}.yaml").read_text())
    if quick:
        said["fit"] |= {"max_steps": 4, "batch_size": 8, "bf16": False, "lr": 1e-3}
        if "gpt" in said:
            said |= {"gpt": {"embed_dim": 16, "num_heads": 2, "num_layers": 1, "seq_len": 192}}
            said["tokenizer"]["vocab_size"] = 300
    given = {k: [str(x) for x in v] if isinstance(v, list) else str(v) for k, v in where.items()}
    said |= given | {"output": str(directory), "resume": (directory / "run.json").exists()}
    parser = ArgumentParser()
    parser.add_class_arguments(TrainConfig, "config")
    config = parser.instantiate(parser.parse_object({"config": said})).config
    train(TrainConfig(**vars(config)))
    return directory


def _collected(name: str, work: Path, quick: bool, model: Path, data: Path) -> Path:
    said = yaml.safe_load((HERE / "collect.yaml").read_text())
    if quick:
        said["limit"] = 16
    output = work / name
    if not (output / "summary.json").exists():
        resume = (output / "run.json").exists()
        where = {"model": str(model), "data": str(data), "output": str(output), "resume": resume}
        collect(CollectConfig(**said, **where))
    return output / "data.jsonl"


def _best_of_k(collected: list[Path], best: Path) -> Path:
    """Of all that the values learned from, each prompt's text with the highest reward."""
    lines = []
    for rows in zip(*map(_rows, collected), strict=True):
        texts = [
            (reward, {"completion": text, "completion_ids": ids})
            for row in rows
            for reward, text, ids in zip(
                row["rewards"], row["completions"], row["completion_ids"], strict=True
            )
        ]
        _, kept = max(texts, key=lambda text: text[0])
        lines.append(json.dumps({"prompt": rows[0]["prompt"], **kept}, ensure_ascii=False) + "\n")
    best.write_text("".join(lines))
    return best


def _choose(base: Path, values: Path, val: list[dict], grid: Grid) -> dict[str, Any]:
    """β and candidates for greedy, β for each temperature, length penalties: by BLEU on val."""
    prompts, references = _columns(val)
    model = ValueModel.from_pretrained(values)

    def bleu(guidance: Guidance) -> float:
        texts, _ = write(model, prompts, guidance)
        return corpus([t[0] for t in texts], references)["bleu"]

    greedy = {
        (beta, k): bleu(Guidance(beta=beta, temperature=0.0, top_k=k))
        for beta in grid.betas
        for k in grid.top_k
    }
    beta, top_k = max(greedy, key=greedy.__getitem__)
    sampled = {
        t: max(grid.betas, key=lambda b, t=t: bleu(Guidance(beta=b, temperature=t, top_k=top_k)))
        for t in grid.temperatures
    }
    guided = Guidance(beta=beta, top_k=None if top_k is None else max(top_k, 2 * BEAMS))
    searched = {"base": (ValueModel.from_pretrained(base), Guidance()), "guided": (model, guided)}
    penalties = {
        name: max(
            grid.length_penalties,
            key=lambda p, how=how: corpus(beam(how[0], prompts, BEAMS, p, how[1])[0], references)[
                "bleu"
            ],
        )
        for name, how in searched.items()
    }
    return {
        "beta": beta,
        "top_k": top_k,
        "beta_sampled": {str(t): b for t, b in sampled.items()},
        "beam_top_k": guided.top_k,
        "length_penalty": penalties,
        "val_greedy": [{"beta": b, "top_k": k, "bleu": v} for (b, k), v in greedy.items()],
    }


def _compare(
    base_path: Path,
    rival_path: Path,
    values_path: Path,
    test: list[dict],
    chosen: dict,
    grid: Grid,
) -> dict[str, Any]:
    """The table on the test set."""
    prompts, references = _columns(test)
    base, rival, values = map(ValueModel.from_pretrained, (base_path, rival_path, values_path))
    greedy = Guidance(temperature=0.0)
    guided = Guidance(beta=chosen["beta"], temperature=0.0, top_k=chosen["top_k"])
    texts: dict[str, list[str]] = {}
    costs: dict[str, dict] = {}

    def add(name: str, found: tuple[list, dict], how: Guidance | None = None) -> None:
        texts[name] = [t if isinstance(t, str) else t[0] for t in found[0]]
        costs[name] = found[1]
        if how is not None:  # one pass of sampling or greedy: its KL to the base is exact
            model = base if name.startswith("base") else values
            model = rival if name.startswith("best-of-K") else model
            costs[name]["kl"] = mean_kl(model, how, base, prompts, texts[name])

    add("base, greedy", write(base, prompts, greedy), greedy)
    add("best-of-K fine-tuned, greedy", write(rival, prompts, greedy), greedy)
    add("values, β = 0, greedy", write(values, prompts, greedy), greedy)
    add("guided, greedy", write(values, prompts, guided), guided)
    for t in grid.temperatures:
        beta = chosen["beta_sampled"][str(t)]
        plain = Guidance(temperature=t)
        add(f"base, T = {t}", write(base, prompts, plain), plain)
        at = Guidance(beta=beta, temperature=t, top_k=chosen["top_k"])
        add(f"guided, T = {t}", write(values, prompts, at), at)
    for name, model in {"base": base, "guided": values}.items():
        beta = chosen["beta_sampled"]["0.6"] if name == "guided" else 0.0
        many, cost = write(model, prompts, Guidance(beta=beta, temperature=0.6), samples=SAMPLES)
        add(
            f"{name}, best of {SAMPLES} by log-prob",
            (best_by(model, prompts, many, "logprob"), cost),
        )
        add(f"{name}, MBR over {SAMPLES}", (minimum_bayes_risk(many), cost))
        if name == "guided":
            add(f"guided, best of {SAMPLES} by V", (best_by(model, prompts, many, "value"), cost))
    penalty = chosen["length_penalty"]
    wide = Guidance(beta=chosen["beta"], top_k=chosen["beam_top_k"])
    add(f"base, beam {BEAMS}", beam(base, prompts, BEAMS, penalty["base"]))
    add(f"best-of-K fine-tuned, beam {BEAMS}", beam(rival, prompts, BEAMS, penalty["base"]))
    add(f"guided, beam {BEAMS}", beam(values, prompts, BEAMS, penalty["guided"], wide))
    rows = [_row(name, texts, costs, references) for name in texts]
    first = next(r for r in rows if r["system"] == "guided, greedy")
    time = relative_seconds(base, greedy, values, guided, prompts, grid.rounds)
    return {
        "metric": "bleu",
        "base": rows[0]["bleu"],
        "guided": first["bleu"],
        "seeds": 1,
        "bleu_greedy_base": rows[0]["bleu"],
        "bleu_greedy_guided": first["bleu"],
        "delta": first["delta"],
        "delta_ci95": first["delta_ci95"],
        "chrf_greedy_base": rows[0]["chrf"],
        "chrf_greedy_guided": first["chrf"],
        "relative_decode_time": time["median"],
        "relative_decode_time_ci95": time["ci95"],
        "guidance": asdict(guided),
        "chosen": chosen,
        "rows": rows,
    }


def _row(name: str, texts: dict, costs: dict, references: list[str]) -> dict[str, Any]:
    """One system against the base decoded the same way where there is one, else greedily."""
    twin = name.replace("guided", "base").replace("best-of-K fine-tuned", "base")
    against = twin if twin in texts and twin != name else "base, greedy"
    baseline = texts[against]
    columns = [[r] for r in references]
    bleu = corpus_bleu_ci(texts[name], columns, baseline)
    chrf = corpus_chrf_ci(texts[name], columns, baseline)
    return {
        "system": name,
        "bleu": bleu.value,
        "bleu_ci95": bleu.ci95,
        "delta": bleu.delta,
        "delta_ci95": bleu.delta_ci95,
        "against": against,
        "chrf": chrf.value,
        "chrf_ci95": chrf.ci95,
        "chrf_delta": chrf.delta,
        "chrf_delta_ci95": chrf.delta_ci95,
        "kl_to_base": costs[name].get("kl"),
        "brevity_penalty": corpus(texts[name], references)["brevity_penalty"],
        "forward_tokens": costs[name]["forward_tokens"],
        "relative_cost": costs[name]["forward_tokens"] / costs["base, greedy"]["forward_tokens"],
        "seconds": costs[name]["seconds"],
    }


def _as_charted(results: dict[str, Any]) -> dict[str, Any]:
    """The rows as the picture of all rows reads them."""
    rows = [
        {
            "system": row["system"].replace("best-of-K fine-tuned", "rival: best of K"),
            "metrics": {"bleu": {"value": row["bleu"], "ci95": row["bleu_ci95"]}},
            "relative_cost": row["relative_cost"],
        }
        for row in results["rows"]
    ]
    return {"metric": "bleu", "rows": rows}


def _table(rows: list[dict]) -> str:
    lines = [
        "| system | BLEU | paired difference | chrF | brevity | KL to base | cost |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in rows:
        low, high = r["delta_ci95"]
        lines.append(
            f"| {r['system']} | {r['bleu']:.2f} | {r['delta']:+.2f} [{low:+.2f}, {high:+.2f}] | "
            f"{r['chrf']:.2f} | {r['brevity_penalty']:.3f} | "
            f"{'–' if r['kl_to_base'] is None else format(r['kl_to_base'], '.1f')} | "
            f"{r['relative_cost']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def _rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines() if line]


def _columns(rows: list[dict]) -> tuple[list[str], list[str]]:
    return [r["prompt"] for r in rows], [r["completion"] for r in rows]


def _toy(directory: Path) -> Path:
    """Pairs of made-up languages, in the files a run expects."""
    directory.mkdir(parents=True)
    words = {"dog": "Hund", "cat": "Katze", "man": "Mann", "sees": "sieht", "a": "ein"}
    names = ("dog", "cat", "man")
    pairs = [f"a {x} sees a {y} ." for x in names for y in names]
    for split in ("train", "val", "test2016"):
        lines = [
            json.dumps({"prompt": p, "completion": " ".join(words.get(w, w) for w in p.split())})
            for p in pairs * (4 if split == "train" else 1)
        ]
        (directory / f"multi30k.en-de.{split}.jsonl").write_text("\n".join(lines) + "\n")
    return directory


if __name__ == "__main__":
    main()
