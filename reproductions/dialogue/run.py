"""Guess my city, offline: what do values know of dialogues that nobody can continue?

    python reproductions/dialogue/run.py DATA_FILE --work DIR [--seeds 3]
    python reproductions/dialogue/run.py --quick           a toy of the same form, nothing kept

DATA_FILE holds dialogues whose assistant asks up to 20 questions (reward −1 each, 0 where the city
is found) and the city as `goal`. Cities are split by a hash, so that no city of a test game was
seen before. A language model from scratch goes on with its values by Monte Carlo, trunk and all;
then every method learns on that trunk, frozen, what it can foretell beyond the mean return of the
turn: rewards are shaped by it (LOG.md says what a frozen language model came to). Judged is V where
a question is to be asked, on test games. What is finished in --work is not done again. Writes
results.json, table.md and calibration.html beside itself.
"""

import argparse
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
from turns import Rivals, Turns, foretold, means, shaped

from qvgpt.data.rows import load_trajectories
from qvgpt.data.sizes import GPTShape, TokenizerConfig
from qvgpt.decode.policy import Guidance
from qvgpt.fit_options import FitOptions
from qvgpt.fqe import evaluate_offline
from qvgpt.loop import fit
from qvgpt.models.heads_config import HeadsConfig
from qvgpt.models.value_model import ValueModel
from qvgpt.objectives import parse_objectives
from qvgpt.run import write_json
from qvgpt.train_config import TrainConfig
from qvgpt.trainer import train
from qvgpt.trajectory import Trajectory, scaled

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent))

from texts.steps import split_of  # noqa: E402

QUIET = Console(file=io.StringIO())
SIDES = {"validation": 0.15, "test": 0.25, "train": 0.6}
"""Shares of the cities."""
LONGEST, SCALE = 20, 0.25
"""Questions in a game, and what rewards are multiplied with while values learn."""


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
        HeadsConfig(
            "categorical", num_q=1, bins=2 * LONGEST + 1, low=-SCALE * LONGEST, high=SCALE * LONGEST
        ),
    ),
}


@dataclass(frozen=True)
class Setting:
    """Sizes and rates; the quick form has others."""

    gpt: GPTShape
    vocab_size: int
    lm_fit: FitOptions
    value_fit: FitOptions
    trunk_fit: FitOptions
    """Of language model and Monte-Carlo values together."""
    fqe_fit: FitOptions
    guidances: Mapping[str, Guidance]
    """Policies that are judged offline; the first one wrote the logs."""
    resamples: int


FULL = Setting(
    gpt=GPTShape(128, 4, 2, 2560, 0.0),
    vocab_size=2000,
    lm_fit=FitOptions(epochs=3.0, batch_size=8, lr=2e-3, bf16=True, keep_best="LM/nll"),
    trunk_fit=FitOptions(epochs=2.0, batch_size=8, lr=1e-3, value_lr=5e-3, bf16=True),
    value_fit=FitOptions(epochs=2.0, batch_size=8, lr=5e-3, tau=0.05),
    fqe_fit=FitOptions(max_steps=60, batch_size=4, lr=5e-3, tau=0.5),
    guidances={
        "the logs'": Guidance(beta=0.0),
        "guided, β = 1": Guidance(beta=1.0, top_k=40),
        "guided, β = 4": Guidance(beta=4.0, top_k=40),
    },
    resamples=200,
)
QUICK = Setting(
    gpt=GPTShape(16, 2, 1, 160, 0.0),
    vocab_size=300,
    lm_fit=FitOptions(epochs=1.0, max_steps=4, batch_size=8, lr=1e-3, keep_best="LM/nll"),
    trunk_fit=FitOptions(epochs=1.0, max_steps=3, batch_size=8, lr=1e-3),
    value_fit=FitOptions(max_steps=3, batch_size=16),
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
    return split_of(city, SIDES)


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

    def learned(self, name: str, fit: FitOptions, **more: Any) -> ValueModel:
        """What a training of a trunk left, begun or gone on with where there is more to do."""
        output = self.work / name
        config = TrainConfig(
            data=[str(self.files["train"])],
            eval_data=[str(self.files["validation"])],
            fit=replace(fit, seed=self.seed),
            output=str(output),
            resume=(output / "run.json").exists(),
            **more,
        )
        train(config, QUIET)
        return ValueModel.from_pretrained(output, freeze_trunk=True)

    def monte_carlo(self) -> ValueModel:
        """A language model of the training games, and then its values with it."""
        setting = self.setting
        tokens = TokenizerConfig(vocab_size=setting.vocab_size)
        self.learned("base", setting.lm_fit, gpt=setting.gpt, tokenizer=tokens)
        return self.learned(
            "MonteCarlo",
            setting.trunk_fit,
            model=str(self.work / "base"),
            objectives=["LM", METHODS["MonteCarlo"].objective],
            heads=self._heads("MonteCarlo"),
            reward_scale=SCALE,
        )

    def _heads(self, name: str) -> HeadsConfig:
        heads = METHODS[name].heads
        return replace(heads, rank=min(heads.rank, self.setting.gpt.embed_dim // 2))

    def values(self, name: str, known: ValueModel, potential: np.ndarray) -> ValueModel:
        """Values of shaped rewards, on the frozen trunk of a model that was trained before."""
        output = self.work / f"{name}, shaped"
        if (output / "value_config.json").exists():
            model = ValueModel.from_pretrained(output, freeze_trunk=True)
            model.trunk = known.trunk
            return model
        torch.manual_seed(self.seed)
        model = ValueModel(known.trunk, self._heads(name), known.tokenizer, freeze_trunk=True)
        assert model.heads is not None
        model.heads.reward_scale = SCALE
        fit(
            model,
            scaled(shaped(self.texts("train", known), potential), SCALE),
            parse_objectives([METHODS[name].objective]),
            replace(self.setting.value_fit, seed=self.seed),
            console=QUIET,
        )
        model.save(output)
        print(f"seed {self.seed}: {name}", file=sys.stderr, flush=True)
        return model

    def foretold(self) -> tuple[Turns, dict[str, np.ndarray]]:
        """The test games' turns, and what each method and each rival foretold of them."""
        model = self.monte_carlo()
        remember(model.trunk)
        learned, held, test = (self.texts(side, model) for side in ("train", "validation", "test"))
        potential, turns = means(learned), Turns.of(test)
        known = potential[turns.turn.clip(max=len(potential) - 1)]
        said = Rivals.of(learned, held).foretell(test)
        said["MonteCarlo with its trunk"] = foretold(model, test)
        for name in METHODS:
            said[f"{name}, shaped"] = known + foretold(self.values(name, model, potential), test)
        return turns, said

    def fqe(self) -> dict[str, float]:
        """What policies would earn a game, by the test games alone; kept on disk."""
        done = self.work / "fqe.json"
        if not done.exists():
            model = self.monte_carlo()
            remember(model.trunk)
            potential = means(self.texts("train", model))
            texts = scaled(shaped(self.texts("test", model), potential), SCALE)
            options = replace(self.setting.fqe_fit, seed=self.seed)
            found = {
                name: potential[0] + evaluate_offline(model, texts, guidance, options).value / SCALE
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
