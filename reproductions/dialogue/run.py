"""Guess my city, offline: what do values know of dialogues that nobody can continue?

    python reproductions/dialogue/run.py DATA_FILE --work DIR [--seeds 3]
    python reproductions/dialogue/run.py --quick           a toy of the same form, nothing kept

DATA_FILE holds dialogues whose assistant asks up to 20 questions (reward −1 each, 0 where the city
is found) and the city as `goal`. Cities are split by a hash, so that no city of a test game was
seen before. Every method learns values on the frozen trunk of one language model, from scratch;
each training keeps what is best on validation games. Judged is V where a question is to be asked,
on test games. What is finished in --work is not done again. Writes results.json, table.md and
calibration.html beside itself.
"""

import argparse
import hashlib
import io
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dialogue_report import offline, picture, summarise, table
from rich.console import Console
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from turns import Rivals, Turns, foretold

from qvgpt.data.rows import load_trajectories
from qvgpt.decode.policy import Guidance
from qvgpt.fit_options import FitOptions
from qvgpt.fqe import evaluate_offline
from qvgpt.loop import fit
from qvgpt.models.heads import HeadsConfig
from qvgpt.models.value_model import ValueModel
from qvgpt.objectives import parse_objectives
from qvgpt.run import write_json
from qvgpt.trainer import GPTShape, TokenizerConfig, TrainConfig, train
from qvgpt.trajectory import Trajectory, scaled

HERE = Path(__file__).parent
QUIET = Console(file=io.StringIO())
SIDES = {"validation": 0.15, "test": 0.4, "train": 1.0}
"""Where a city's hash may lie at most."""
LONGEST = 20
"""Questions in a game; rewards are divided by it while values learn."""


@dataclass(frozen=True)
class Method:
    """How values are learned."""

    objective: str | dict[str, Any]
    heads: HeadsConfig


HEADS = HeadsConfig("low_rank", num_q=1)
METHODS = {
    "MonteCarlo": Method("MonteCarlo", HEADS),
    "SARSA": Method({"SARSA": {"lambda_": 0.9}}, HEADS),
    "ILQL by turns": Method(
        {"ILQL": {"level": "turn", "cql_weight": 0.0, "gamma": 1.0}}, replace(HEADS, num_q=2)
    ),
    "ReturnDistribution": Method(
        "ReturnDistribution",
        HeadsConfig("categorical", num_q=1, bins=LONGEST + 1, low=-1.0, high=0.0),
    ),
}


@dataclass(frozen=True)
class Setting:
    """Sizes and rates; the quick form has others."""

    gpt: GPTShape
    vocab_size: int
    lm_fit: FitOptions
    value_fit: FitOptions
    value_lrs: Sequence[float]
    """Of these the best on validation games is taken, method by method."""
    fqe_fit: FitOptions
    guidances: Mapping[str, Guidance]
    """Policies that are judged offline; the first one wrote the logs."""
    resamples: int


FULL = Setting(
    gpt=GPTShape(128, 4, 2, 2560, 0.0),
    vocab_size=2000,
    lm_fit=FitOptions(epochs=3.0, batch_size=8, lr=2e-3, bf16=True, keep_best="LM/nll"),
    value_fit=FitOptions(epochs=6.0, batch_size=8, tau=0.05),
    value_lrs=(1e-3, 5e-3),
    fqe_fit=FitOptions(epochs=8.0, batch_size=4, lr=1e-2, tau=0.5),
    guidances={
        "the logs'": Guidance(beta=0.0),
        "guided, β = 1": Guidance(beta=1.0, top_k=40),
        "guided, β = 4": Guidance(beta=4.0, top_k=40),
    },
    resamples=500,
)
QUICK = Setting(
    gpt=GPTShape(16, 2, 1, 160, 0.0),
    vocab_size=300,
    lm_fit=FitOptions(max_steps=4, batch_size=8, keep_best="LM/nll"),
    value_fit=FitOptions(max_steps=3, batch_size=16),
    value_lrs=(1e-3, 5e-3),
    fqe_fit=FitOptions(max_steps=2, batch_size=8, lr=3e-3),
    guidances={"the logs'": Guidance(beta=0.0), "guided, β = 1": Guidance(beta=1.0, top_k=40)},
    resamples=10,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="?", type=Path, help="the dialogues, JSONL")
    parser.add_argument("--work", type=Path, help="where trainings are kept")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.quick:
        with tempfile.TemporaryDirectory() as directory:
            work = Path(directory)
            results = run(toy(), work, 1, QUICK)
        print(json.dumps(results, indent=1))
        return
    if None in (options.data, options.work):
        parser.error("say where the dialogues are (DATA_FILE) and where to work (--work)")
    rows = [json.loads(line) for line in options.data.read_text().splitlines()]
    results = run(rows, options.work, options.seeds, FULL)
    write_json(HERE / "results.json", results)
    (HERE / "table.md").write_text(table(results))
    picture(HERE / "calibration.html", results)
    print(table(results))


def run(
    rows: Sequence[Mapping[str, Any]], work: Path, seeds: int, setting: Setting
) -> dict[str, Any]:
    """Every training of every seed, and what they say together."""
    files = split(rows, work / "data")
    cells = [Seed(seed, work / f"seed-{seed}", files, setting) for seed in range(seeds)]
    games = {side: [row for row in rows if side_of(row["goal"]) == side] for side in SIDES}
    cities = [row["goal"] for row in games["test"]]
    counts = {
        side: {"games": len(g), "cities": len({r["goal"] for r in g})} for side, g in games.items()
    }
    found = summarise([cell.foretold() for cell in cells], cities, setting.resamples)
    return {**found, "games": counts, "fqe": offline([cell.fqe() for cell in cells], found["base"])}


def side_of(city: str) -> str:
    """By a hash of the city: neither seeds nor the order of the file matter."""
    share = int.from_bytes(hashlib.sha256(city.encode()).digest()[:8]) / 2**64
    return next(side for side, most in SIDES.items() if share < most)


def split(rows: Sequence[Mapping[str, Any]], folder: Path) -> dict[str, Path]:
    """A file for each side."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {side: folder / f"{side}.jsonl" for side in SIDES}
    for side, file in files.items():
        mine = [json.dumps(row) + "\n" for row in rows if side_of(row["goal"]) == side]
        file.write_text("".join(mine))
    return files


@dataclass(frozen=True)
class Seed:
    """One seed, all in a directory."""

    seed: int
    work: Path
    files: Mapping[str, Path]
    setting: Setting

    def texts(self, side: str, model: ValueModel) -> list[Trajectory]:
        """A side's games, in a model's tokens."""
        assert model.tokenizer is not None
        return load_trajectories(self.files[side], model.tokenizer)[0]

    def base(self) -> ValueModel:
        """The language model of the training games; it reads each game once."""
        output = self.work / "base"
        config = TrainConfig(
            data=[str(self.files["train"])],
            eval_data=[str(self.files["validation"])],
            gpt=self.setting.gpt,
            tokenizer=TokenizerConfig(vocab_size=self.setting.vocab_size),
            fit=replace(self.setting.lm_fit, seed=self.seed),
            output=str(output),
            resume=(output / "run.json").exists(),
        )
        train(config, QUIET)
        model = ValueModel.from_pretrained(output, freeze_trunk=True)
        remember(model.trunk)
        return model

    def values(self, name: str, base: ValueModel) -> ValueModel:
        """A method's values on the frozen base, at the rate that is best on validation games."""
        held = self.texts("validation", base)
        came = Turns.of(held).to_come
        tried = [self._values(name, base, lr) for lr in self.setting.value_lrs]
        return min(tried, key=lambda m: np.square(foretold(m, held) - came).mean())

    def _values(self, name: str, base: ValueModel, lr: float) -> ValueModel:
        method, output = METHODS[name], self.work / f"{name}, {lr:g}"
        rank = min(method.heads.rank, base.trunk.embed_dim // 2)
        torch.manual_seed(self.seed)
        heads = replace(method.heads, rank=rank)
        model = ValueModel(base.trunk, heads, base.tokenizer, freeze_trunk=True)
        assert model.heads is not None
        if (output / "value_config.json").exists():
            known = ValueModel.from_pretrained(output, freeze_trunk=True)
            known.trunk = base.trunk
            return known
        model.heads.reward_scale = 1 / LONGEST
        fit(
            model,
            scaled(self.texts("train", base), 1 / LONGEST),
            parse_objectives([method.objective]),
            replace(self.setting.value_fit, lr=lr, seed=self.seed),
            console=QUIET,
        )
        model.save(output)
        print(f"seed {self.seed}: {name} at {lr:g}", file=sys.stderr, flush=True)
        return model

    def foretold(self) -> tuple[Turns, dict[str, np.ndarray]]:
        """The test games' turns, and what each method and each rival foretold of them."""
        base = self.base()
        learned, held, test = (self.texts(side, base) for side in ("train", "validation", "test"))
        said = Rivals.of(learned, held).foretell(test)
        said |= {name: foretold(self.values(name, base), test) for name in METHODS}
        return Turns.of(test), said

    def fqe(self) -> dict[str, float]:
        """What policies would earn a game, by the test games alone; kept on disk."""
        done = self.work / "fqe.json"
        if not done.exists():
            model = self.values("MonteCarlo", self.base())
            texts = scaled(self.texts("test", model), 1 / LONGEST)
            options = replace(self.setting.fqe_fit, seed=self.seed)
            found = {
                name: LONGEST * evaluate_offline(model, texts, guidance, options).value
                for name, guidance in self.setting.guidances.items()
            }
            write_json(done, found)
        return json.loads(done.read_text())


def remember(trunk: Any) -> None:
    """Let a frozen trunk read each text once."""
    compute, known = trunk.hidden, {}

    def hidden(tokens: Tensor, *args: Any, **more: Any) -> Tensor:
        texts = [tuple(row[: int(row.count_nonzero())].tolist()) for row in tokens]  # padding is 0
        if not known.keys() >= set(texts):
            states = compute(tokens, *args, **more)
            known.update((t, row[: len(t)].clone()) for t, row in zip(texts, states, strict=True))
        return pad_sequence([known[text] for text in texts], batch_first=True)

    trunk.hidden = hidden


def toy() -> list[dict[str, Any]]:
    """Short games of the same form: one of three answers is right, and is asked for in turn."""
    rows = []
    for i in range(60):
        asked, hidden = ["a", "b", "c"][i % 3 :] + ["a", "b", "c"][: i % 3], "abc"[i % 2]
        messages: list[dict[str, Any]] = []
        for letter in asked[: asked.index(hidden) + 1]:
            right = letter == hidden
            messages += [
                {"role": "assistant", "content": f"Is it {letter}?", "reward": right - 1.0},
                {"role": "user", "content": "Yes." if right else "No."},
            ]
        rows.append({"messages": messages, "goal": f"{hidden} {i}", "solved": True})
    return rows


if __name__ == "__main__":
    main()
