"""`qvgpt reward-model`: a classifier or regressor of text, which then judges as a reward.

The output is a plain `transformers` directory, and `classifier:DIR#label` a reward everywhere.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers.utils import logging

from qvgpt.envs.rewards.classifier import (
    Classifier,
    Reads,
    load_model,
    load_tokenizer,
    longest,
)
from qvgpt.errors import QvgptError
from qvgpt.fit_options import step_seed
from qvgpt.model_card import write_card
from qvgpt.models.disk import writing
from qvgpt.reward_model.card import model_card
from qvgpt.reward_model.examples import Examples, load_examples, split
from qvgpt.reward_model.scratch import Family, Size, new_model, new_tokenizer
from qvgpt.reward_model.training import Rates, Training
from qvgpt.run import alone_in, check_run, open_run, write_json


@dataclass(frozen=True)
class RewardModelConfig:
    """Train a judge of text: on classes, on numbers, or on which of two texts is better."""

    data: list[str]
    """Files of rows: `text`, or `prompt` and `completion`, with a class in `label` or a number in
    `score` or `reward`; `completions` with `rewards`; or `chosen` and `rejected`."""
    output: str
    """Directory for the model, README.md, log.jsonl and summary.json; new or empty."""
    eval_data: list[str] = field(default_factory=list)
    """Files of rows to judge it by and to stop by; none: `eval_share` of the data."""
    eval_share: float = 0.1
    """Share of the data held out where there is no eval_data; equal texts are on one side."""
    target: str | None = None
    """The column to learn; none: the first of chosen, label, score, rewards and reward there is."""
    labels: list[str] = field(default_factory=list)
    """Names of the classes, in the order of the values in the data: negative positive for 0 and 1.
    None: the values themselves."""
    reads: Reads = "text"
    """What is read of prompt and completion: both as one text, the completion alone, or a pair."""
    model: str | None = None
    """Directory of a pre-trained encoder (BERT, RoBERTa …) to go on from; none: from scratch."""
    family: Family = "bert"
    """From scratch: bert (WordPiece, lower case) or roberta (byte-level BPE)."""
    size: Size = field(default_factory=Size)
    """Of a model from scratch."""
    max_length: int | None = None
    """Longer texts are cut at so many tokens; none: 256, or what a given model reads."""
    rates: Rates = field(default_factory=Rates)
    """How to train."""
    seed: int = 0
    """Of initial weights, order and dropout."""
    resume: bool = False
    """Go on with a training that was stopped, from its last evaluation or Ctrl-C."""


def train_reward_model(config: RewardModelConfig, console: Console | None = None) -> dict[str, Any]:
    """From files to a directory; returns what summary.json holds.

    Bad input raises `QvgptError` before anything is written.
    """
    console, output = console or Console(stderr=True), Path(config.output)
    goes_on = check_run(output, "reward-model", config, config.resume)
    if goes_on and (output / "summary.json").exists():
        console.print(f"{output}: this run is finished")
        return json.loads((output / "summary.json").read_text("utf-8"))
    learned, held = _examples(config)
    torch.manual_seed(step_seed(config.seed, 0, 0))
    model, tokenizer = _start(config, learned)
    limit = min(config.max_length or 256, longest(model, tokenizer))
    rate = config.rates.lr or (5e-4 if config.model is None else 3e-5)
    training = Training(model, tokenizer, (learned, held), config.rates, rate, config.seed, limit)
    open_run(output, "reward-model", config, config.resume)
    with alone_in(output):
        found = training.run(output, config.resume, console)
        return _written(config, training, learned, held, found, console)


def _examples(config: RewardModelConfig) -> tuple[Examples, Examples]:
    """Those to learn from and those held out."""
    if not 0 < config.eval_share < 1:
        raise QvgptError(f"eval_share: a share between 0 and 1 was expected: {config.eval_share}")
    data = load_examples(config.data, config.reads, config.target, names=config.labels)
    if not config.eval_data:
        return split(data, config.eval_share)
    held = load_examples(config.eval_data, config.reads, config.target, data.values, config.labels)
    if held.kind != data.kind:
        raise QvgptError(f"eval_data: holds {held.kind}, the data {data.kind}")
    return data, held


def _start(config: RewardModelConfig, data: Examples) -> tuple[Any, Any]:
    """The model to train, its head fresh, and its tokenizer."""
    labels = _labels(data)
    if config.max_length is not None and config.max_length < 8:
        raise QvgptError(f"max_length: at least 8 was expected, not {config.max_length}")
    if config.model is not None:
        if config.size != Size():
            raise QvgptError("size: is of a model from scratch; leave it out beside `model`")
        place = Path(config.model)
        return load_model(place, ignore_mismatched_sizes=True, **labels), load_tokenizer(place)
    size = config.size.fitted_to(len(data.items))
    assert size.vocab_size is not None
    tokenizer = new_tokenizer(data.texts, config.family, size.vocab_size)
    positions = config.max_length or 256
    tokenizer.model_max_length = positions
    return new_model(config.family, size, tokenizer, positions, labels), tokenizer


def _labels(data: Examples) -> dict[str, Any]:
    """What `config.json` says of the output."""
    if data.kind != "classes":
        return {"num_labels": 1, "problem_type": "regression"}
    return {
        "num_labels": len(data.labels),
        "id2label": dict(enumerate(data.labels)),
        "label2id": {name: i for i, name in enumerate(data.labels)},
        "problem_type": "single_label_classification",
    }


def _written(
    config: RewardModelConfig,
    training: Training,
    learned: Examples,
    held: Examples,
    found: Mapping[str, Any],
    console: Console,
) -> dict[str, Any]:
    """Write the model, its card and the summary."""
    output, model = Path(config.output), training.model
    logging.disable_progress_bar()
    model.config.qvgpt = {"reads": config.reads}
    with writing(output, "go on with --resume"):
        model.save_pretrained(output)
        training.tokenizer.save_pretrained(output)
    place = str(output)
    specs = [f"classifier:{place}"]
    if learned.kind == "classes":
        specs = [f"classifier:{place}#{name}" for name in learned.labels]
    summary = {
        "kind": learned.kind,
        "model_type": model.config.model_type,
        "data": learned.counts(),
        "eval_data": held.counts(),
        "cut": training.cut,
        "max_length": training.max_length,
        "lr": training.lr,
        "parameters": sum(p.numel() for p in model.parameters()),
        "vocab_size": len(training.tokenizer),
        **found,
        "sha256": Classifier.load(output).sha256,
        "rewards": specs,
    }
    write_card(output, model_card(asdict(config), summary), console.print)
    write_json(output / "summary.json", summary)
    shutil.rmtree(output / "checkpoint", ignore_errors=True)
    return summary
