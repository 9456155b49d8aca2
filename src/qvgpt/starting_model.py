"""What a training starts from: the texts, and the model they are to teach."""

from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from qvgpt.data.files import read_rows, row_texts
from qvgpt.data.rows import LoadReport, load_trajectories
from qvgpt.data.sizes import CONTEXTS, GPTShape
from qvgpt.data.tokenizer import Tokenizer
from qvgpt.errors import QvgptError
from qvgpt.model_card import files_of
from qvgpt.models.artefact import load_trunk, stored_heads
from qvgpt.models.gpt import GPT
from qvgpt.models.heads_config import HeadsConfig
from qvgpt.models.value_model import ValueModel
from qvgpt.objectives import Objectives
from qvgpt.train_config import TrainConfig
from qvgpt.trajectory import Trajectory


def start(
    config: TrainConfig, newest: Path | None, console: Console
) -> tuple[ValueModel, TrainConfig]:
    """The model to train: that of a checkpoint, a given one, or a new one; heads may lack yet.

    The configuration comes back with what was left open of a new one.
    """
    torch.manual_seed(config.fit.seed)
    if config.lora is not None and (config.model is None or config.freeze_trunk):
        raise QvgptError("lora: adapts a given model: say which, and leave freeze_trunk off")
    # checkpoints hold adapters alone: what they adapt is the model that the run began with
    source = config.model if config.lora is not None else newest or config.model
    if source is None:
        model, config = _new(config)
    else:
        model = _given(config, source, newest)
    if newest is not None:
        _take_tokenizer(config, model, newest, console)
    if model.heads is not None and config.heads is not None:
        own = model.heads.config
        given = replace(config.heads, kind=config.heads.kind or own.kind)
        if given.low is None:
            given = replace(given, low=own.low, high=own.high)
        if given != own:
            raise QvgptError(f"heads: {source} has other ones, {own}; leave heads out")
    return model, config


def equipped(
    config: TrainConfig,
    model: ValueModel,
    objectives: Objectives,
    texts: list[Trajectory],
    newest: Path | None,
    console: Console,
) -> ValueModel:
    """The model with what it lacks: value heads where the objectives learn values, adapters."""
    if model.heads is None and objectives.learns_values:
        if newest is not None and config.lora is None:
            raise QvgptError(
                f"objectives: {newest} has no value heads and a run cannot gain them; give it as "
                "--model of a new run"
            )
        asked, size = config.heads or HeadsConfig(), model.trunk.vocab_size
        if newest is not None:  # beside adapters; what it knows is not to be found anew
            asked = stored_heads(newest)
        given = heads = asked.for_vocabulary(size)
        if given != asked:
            console.print(f"heads: {heads.kind}, for {size:,} tokens (heads.kind says otherwise)")
        if not given.knows_support:
            returns = [g for t in texts for g in objectives.returns_of(t)]
            if not returns:
                raise QvgptError(
                    "heads: no text teaches a return (all were cut, or the objectives learn no "
                    "values): say which returns there are by heads.low and heads.high"
                )
            heads = given.fitted_to(returns)
            console.print(
                f"heads: the returns of the data lie between {min(returns):g} and "
                f"{max(returns):g}; the heads know {heads.low:g} to {heads.high:g}"
            )
        model = ValueModel(model.trunk, heads, model.tokenizer, config.freeze_trunk)
    if config.lora is not None:
        model.trunk.add_lora(config.lora)
    return model


def keep_reference(config: TrainConfig, model: ValueModel) -> None:
    """π_ref is the model that the run began with, which a checkpoint is no more."""
    if config.model is None:
        raise QvgptError("objectives: these learn away from a reference: say which --model")
    adapted = model.trunk.lora is not None
    model.keep_reference(None if adapted else load_trunk(Path(config.model), dtype=config.dtype))


def _take_tokenizer(config: TrainConfig, model: ValueModel, newest: Path, console: Console) -> None:
    """Compare the tokenizer a run began with to that of its source, if there still is one."""
    model.tokenizer = Tokenizer.load(newest)
    source = config.tokenizer.path or config.model
    if source is None or not Path(source).exists():
        return
    tokenizer = Tokenizer.load(source)
    if tokenizer.sha256 == model.tokenizer.sha256:
        return
    if not config.accept_changes:
        raise QvgptError(
            f"{source}: is not the tokenizer the run began with; restore it, train anew "
            "elsewhere, or accept it with --accept_changes true"
        )
    if tokenizer.vocab_size > model.trunk.vocab_size:
        raise QvgptError(
            f"{source}: its {tokenizer.vocab_size} tokens are more than the model's "
            f"{model.trunk.vocab_size}; a run cannot go on with it"
        )
    console.print(f"goes on with another tokenizer, that of {source}", soft_wrap=True)
    model.tokenizer = tokenizer


def _given(config: TrainConfig, source: str | Path, newest: Path | None) -> ValueModel:
    model = ValueModel.from_pretrained(
        source, config.freeze_trunk, config.lora is not None, config.dtype
    )
    own, path = model.tokenizer.sha256 if model.tokenizer else None, config.tokenizer.path
    usual = asdict(GPTShape())
    if (Path(config.output) / "run.json").exists():  # was looked at when the run began
        usual = asdict(config.gpt)
    for name, asked in asdict(config.gpt).items():
        there = getattr(model.trunk, "shape", {}).get(name)  # that of our GPT; others have none
        if asked != usual[name] and there not in (None, asked):
            raise QvgptError(f"gpt.{name}: {source} has {there}, not {asked}; leave it out")
    if newest is None and path is not None and Tokenizer.load(path).sha256 != own:
        raise QvgptError(f"tokenizer.path: {path} is not the tokenizer of {source}; leave it out")
    return model


def _new(config: TrainConfig) -> tuple[ValueModel, TrainConfig]:
    """A GPT from scratch, and the configuration with what was left open of it."""
    given, shape = config.tokenizer, config.gpt
    if config.freeze_trunk:
        raise QvgptError("freeze_trunk: a GPT from scratch knows nothing yet; give a model")
    if config.dtype != "float32":
        raise QvgptError("dtype: a GPT from scratch has weights of float32")
    if given.path is not None:
        tokenizer = Tokenizer.load(given.path)
    else:
        if given.vocab_size is None:
            given = given.fitted_to(sum(map(len, _texts(config))))
        assert given.vocab_size is not None
        tokenizer = Tokenizer.train(_texts(config), given.kind, given.vocab_size)
    if shape.is_open:
        if config.max_length is not None and config.max_length < 2:
            raise QvgptError(f"max_length: must be at least 2, not {config.max_length}")
        shape = shape.fitted_to(*_amount(config, tokenizer), config.max_length)
    model = ValueModel(GPT(tokenizer.vocab_size, **asdict(shape)), None, tokenizer)
    return model, replace(config, gpt=shape, tokenizer=given)


def _texts(config: TrainConfig) -> Iterator[str]:
    """Every text that a tokenizer is trained on."""
    return (text for path in config.data for row in read_rows(path) for text in row_texts(row))


def _amount(config: TrainConfig, tokenizer: Tokenizer) -> tuple[int, int]:
    """The tokens of all texts to learn from, and how many the longest of any has: of those that
    are not to be dropped, and as far as they are not to be cut."""
    limit = config.max_length or config.gpt.seq_len or CONTEXTS[1]
    lengths = []
    for paths in (config.data, config.eval_data):
        found = [len(t.tokens) for t in load_trajectories(paths, tokenizer)[0]]
        if config.on_too_long == "cut":
            found = [min(n, limit) for n in found]
        lengths.append([n for n in found if n <= limit or config.on_too_long != "drop"])
    return sum(lengths[0]), max((*lengths[0], *lengths[1]), default=2)


def load(
    config: TrainConfig, paths: list[str], model: ValueModel, console: Console
) -> tuple[list[Trajectory], dict[str, Any]]:
    """The texts of some files, and their counts; says what was cut or dropped."""
    texts, report, limit = read_texts(config, paths, model)
    if paths and not texts:
        raise QvgptError(f"{', '.join(paths)}: none of {report.too_long} texts fits {limit} tokens")
    if report.too_long:
        console.print(
            f"{report.too_long} texts are longer than {limit} tokens: {report.cut} cut, "
            f"{report.dropped} dropped"
        )
    if report.unknown:
        console.print(
            f"{report.unknown} texts have characters that the tokenizer does not know: each is "
            "read as <unk>"
        )
    counts = {**asdict(report), "judged_by": [*report.judged_by], "files": files_of(paths)}
    return texts, counts


def read_texts(
    config: TrainConfig, paths: list[str], model: ValueModel
) -> tuple[list[Trajectory], LoadReport, int]:
    """The texts of some files, what came of them, and how long they may be."""
    assert model.tokenizer is not None
    context = model.trunk.seq_len
    limit = context if config.max_length is None else config.max_length
    if not 2 <= limit <= context:
        raise QvgptError(f"max_length: {limit} is not between 2 and the context of {context}")
    texts, report = load_trajectories(
        paths, model.tokenizer, max_length=limit, on_too_long=config.on_too_long
    )
    return texts, report, limit
