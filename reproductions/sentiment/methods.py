"""How each method's model is made, from files to directories; nothing is done twice."""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from sst2 import Files, read, write

from qvgpt.collect import CollectConfig, collect
from qvgpt.data.sizes import GPTShape, TokenizerConfig
from qvgpt.decode.policy import Guidance
from qvgpt.decode.sources import Contrast, ValueSource
from qvgpt.envs.rewards import get_reward
from qvgpt.fit_options import FitOptions
from qvgpt.models.heads_config import HeadsConfig
from qvgpt.models.value_model import ValueModel
from qvgpt.reward_model import RewardModelConfig, train_reward_model
from qvgpt.reward_model.scratch import Size
from qvgpt.reward_model.training import Rates
from qvgpt.train_config import TrainConfig
from qvgpt.trainer import train

QUIET = Console(file=io.StringIO())


@dataclass(frozen=True)
class Setting:
    """Sizes and rates; the quick form has others."""

    gpt: GPTShape
    vocab_size: int
    lm_fit: FitOptions
    value_fit: FitOptions
    tune_fit: FitOptions
    reward: Size
    judge: Size
    reward_rates: Rates
    prompts: int
    """To collect from."""
    samples: int
    """Of each of them."""
    validation: int
    test: int
    """Prompts of each of two kinds."""
    judged_samples: int
    """Of each prompt, for every method; half as many of those that try every candidate."""
    base_samples: int
    """Of the base, for best of N too."""
    max_n: int
    max_tokens: int = 24
    values: tuple[str, ...] = (
        "MonteCarlo", "MonteCarlo, filtered", "MonteCarlo, bilinear",
        "MonteCarlo, filtered, bilinear", "MonteCarlo, half, bilinear",
        "MonteCarlo, frozen, bilinear", "ILQL", "Q♯", "FUDGE", "CD",
    )  # fmt: skip
    """Of `VALUES`, those that are tried."""
    timed: int = 32
    """Texts to measure every method's cost by."""
    strengths: int | None = None
    """How many of a method's are tried; none: all."""


FULL = Setting(
    gpt=GPTShape(192, 4, 3, 64, 0.2),
    vocab_size=4000,
    lm_fit=FitOptions(
        epochs=6.0, batch_size=64, lr=1e-3, bf16=True, keep_best="LM/nll", patience=2
    ),
    value_fit=FitOptions(epochs=1.0, batch_size=64, lr=1e-3, value_lr=4e-3, bf16=True),
    tune_fit=FitOptions(epochs=1.0, batch_size=64, lr=5e-4, bf16=True),
    reward=Size(128, 2, dropout=0.2),
    judge=Size(160, 2, dropout=0.2),
    reward_rates=Rates(epochs=2.0, evals_per_epoch=4, lr=7e-4, bf16=True),
    prompts=1000,
    samples=12,
    validation=150,
    test=200,
    judged_samples=4,
    base_samples=16,
    max_n=16,
)
QUICK = replace(
    FULL,
    gpt=GPTShape(32, 2, 1, 64, 0.0),
    vocab_size=300,
    lm_fit=FitOptions(max_steps=10, batch_size=16, lr=3e-3),
    value_fit=FitOptions(max_steps=3, batch_size=32, lr=1e-3),
    tune_fit=FitOptions(max_steps=2, batch_size=16, lr=1e-3),
    reward=Size(32, 1, 200),
    judge=Size(32, 1, 300),
    reward_rates=Rates(epochs=2.0, lr=3e-3),
    prompts=24,
    samples=4,
    validation=6,
    test=6,
    judged_samples=2,
    base_samples=4,
    max_n=2,
    max_tokens=6,
    values=("MonteCarlo", "FUDGE"),
    timed=0,
    strengths=2,
)


PLAIN = Guidance(top_k=40)
"""What all methods write with, the base too: no value knows tokens that nobody would write."""


@dataclass(frozen=True)
class Method:
    """What is trained from the base on rewarded samples, and how it guides."""

    objectives: tuple[str | dict[str, Any], ...]
    heads: HeadsConfig | None = None
    betas: tuple[float, ...] = (2.0, 4.0, 8.0, 16.0, 24.0)
    guidance: Guidance = PLAIN
    frozen: bool = False
    """The trunk stays the base's: values alone learn."""


LINEAR, BILINEAR = HeadsConfig("linear", num_q=1), HeadsConfig("bilinear", num_q=1)
WIDE = (4.0, 8.0, 16.0, 32.0, 64.0)
VALUES: dict[str, Method] = {
    "MonteCarlo": Method(("LM", "MonteCarlo"), LINEAR),
    "MonteCarlo, filtered": Method(({"LM": {"top_share": 0.25}}, "MonteCarlo"), LINEAR),
    "MonteCarlo, bilinear": Method(("LM", "MonteCarlo"), BILINEAR, WIDE),
    "MonteCarlo, filtered, bilinear": Method(
        ({"LM": {"top_share": 0.25}}, "MonteCarlo"), BILINEAR, WIDE
    ),
    "MonteCarlo, half, bilinear": Method(
        ({"LM": {"top_share": 0.5}}, "MonteCarlo"), BILINEAR, WIDE
    ),
    "MonteCarlo, frozen, bilinear": Method(("MonteCarlo",), BILINEAR, WIDE, frozen=True),
    "ILQL": Method(("LM", {"ILQL": {"expectile": 0.8}}), HeadsConfig("linear", num_q=2)),
    "Q♯": Method(
        ("LM", {"ReturnDistribution": {"weight": 0.1}}),  # of whole weight it spoils the trunk
        HeadsConfig("categorical", rank=64, num_q=1, bins=21, low=-0.05, high=1.05),
        guidance=replace(PLAIN, functional="soft"),
    ),
    "FUDGE": Method(
        ("LM", "FUDGE"), HeadsConfig("categorical", rank=8, num_q=1, bins=2),
        betas=(1.0, 4.0, 16.0, 64.0),
    ),
    "CD": Method(
        ("LM", "ControlledDecoding"), LINEAR, betas=(4.0, 16.0, 64.0),
    ),
}  # fmt: skip
SHARES = (0.25, 0.1)
CONTRAST_BETAS = (0.5, 1.0, 2.0, 4.0)


def resumes(output: Path) -> dict[str, Any]:
    return {"output": str(output), "resume": (output / "run.json").exists()}


def language_model(output: Path, files: Files, side: str, setting: Setting, seed: int) -> Path:
    """A GPT from scratch on a half's texts."""
    train(
        TrainConfig(
            data=[str(files.texts(side))],
            eval_data=[str(files.texts("validation"))],
            gpt=setting.gpt,
            tokenizer=TokenizerConfig(vocab_size=setting.vocab_size),
            fit=replace(setting.lm_fit, seed=seed),
            on_too_long="drop",
            **resumes(output),
        ),
        QUIET,
    )
    return output


def judge_model(
    output: Path, files: Files, side: str, setting: Setting, seed: int, judge: bool
) -> Path:
    """A classifier on a half's labels: the reward a BERT, the judge a smaller RoBERTa."""
    size = setting.judge if judge else setting.reward
    train_reward_model(
        RewardModelConfig(
            data=[str(files.labelled(side))],
            eval_data=[str(files.labelled("validation"))],
            labels=["negative", "positive"],
            family="roberta" if judge else "bert",
            size=size,
            max_length=64,
            rates=setting.reward_rates,
            seed=seed,
            **resumes(output),
        ),
        QUIET,
    )
    return output


def samples_of(
    output: Path, base: Path, reward: Path, files: Files, setting: Setting, seed: int
) -> dict[str, Path]:
    """What values learn from, for each direction: samples of the base, and the texts of half A that
    it learned from itself, all with rewards by the reward model."""
    spec = f"classifier:{reward}#positive"
    if not (output / "summary.json").exists():
        collect(
            CollectConfig(
                model=str(base),
                data=str(files.prompts("train")),
                reward=spec,
                samples=setting.samples,
                limit=setting.prompts,
                top_k=PLAIN.top_k,
                max_tokens=setting.max_tokens,
                max_batch=128,
                seed=seed,
                **resumes(output),
            )
        )
    found = {direction: output / f"{direction}.jsonl" for direction in ("negative", "positive")}
    if not found["positive"].exists():
        texts = read(files.texts("A"))
        rewards = get_reward(spec)([row["completion"] for row in texts], texts)
        rows = read(output / "data.jsonl")
        rows += [
            {"prompt": text["prompt"], "completion": text["completion"], "reward": reward}
            for text, reward in zip(texts, rewards, strict=True)
        ]
        write(found["negative"], map(_turned, rows))
        write(found["positive"], rows)
    return found


def best_of(samples: Path) -> Path:
    """Of all texts written to a prompt the one of the highest reward, beside `samples`."""
    best = samples.with_name(f"best.{samples.name}")
    if not best.exists():
        rows = []
        for row in read(samples):
            if "rewards" in row:  # not the texts of half A, each of which is its prompt's only one
                at = row["rewards"].index(max(row["rewards"]))
                text, ids = row["completions"][at], row["completion_ids"][at]
                rows.append({"prompt": row["prompt"], "completion": text, "completion_ids": ids})
        write(best, rows)
    return best


def _turned(row: dict[str, Any]) -> dict[str, Any]:
    """The same with rewards for the other class."""
    if "reward" in row:
        return {**row, "reward": 1 - row["reward"]}
    return {**row, "rewards": [1 - x for x in row["rewards"]]}


def tuned(
    output: Path,
    base: Path,
    data: Path,
    objectives: Sequence[str | dict[str, Any]],
    fit: FitOptions,
    seed: int,
    heads: HeadsConfig | None = None,
    frozen: bool = False,
) -> ValueModel:
    """The base trained further, or values on it alone."""
    train(
        TrainConfig(
            data=[str(data)],
            model=str(base),
            objectives=[*objectives],
            heads=None if heads is None else _fitting(heads, base),
            freeze_trunk=frozen,
            fit=replace(fit, seed=seed),
            on_too_long="drop",
            **resumes(output),
        ),
        QUIET,
    )
    return ValueModel.from_pretrained(output)


def _fitting(heads: HeadsConfig, base: Path) -> HeadsConfig:
    """A rank that the toy's width allows."""
    width = json.loads((base / "config.json").read_text())["n_embd"]
    return replace(heads, rank=min(heads.rank, width // 4))


def contrast(
    work: Path, base: Path, files: Files, setting: Setting, seed: int, direction: str
) -> ValueSource:
    """DExperts: the base tuned on the texts of each label."""
    tuned_to = {
        label: tuned(work / f"expert-{label}", base, files.texts("A", label), ["LM"],
                     setting.tune_fit, seed)
        for label in ("positive", "negative")
    }  # fmt: skip
    other = "negative" if direction == "positive" else "positive"
    return Contrast(tuned_to[direction], tuned_to[other])


def seconds_of(directory: Path) -> float:
    """What a training or collection took."""
    return json.loads((directory / "summary.json").read_text())["seconds"]
