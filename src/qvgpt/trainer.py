"""`qvgpt train`: from files of rows and a configuration to a model directory."""

import json
import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from rich.console import Console

from qvgpt.checkpoint import newest_checkpoint
from qvgpt.data.files import read_rows, row_texts
from qvgpt.data.rows import LoadReport, load_trajectories
from qvgpt.data.sizes import CONTEXTS, GPTShape, TokenizerConfig
from qvgpt.data.tokenizer import Tokenizer
from qvgpt.errors import QvgptError
from qvgpt.fit_options import FitOptions
from qvgpt.loop import fit
from qvgpt.model_card import files_of, training_card, write_card
from qvgpt.models.backbone import Dtype
from qvgpt.models.gpt import GPT
from qvgpt.models.heads_config import HeadsConfig
from qvgpt.models.lora import LoraConfig
from qvgpt.models.value_model import ValueModel, load_trunk, stored_heads
from qvgpt.objectives import Objectives, parse_objectives
from qvgpt.plan import plan
from qvgpt.processes import processes
from qvgpt.refusals import (
    refuse,
    refuse_centring,
    refuse_no_rewards,
    refuse_options,
    refuse_shared_prompts,
)
from qvgpt.run import alone_in, changed_settings, check_run, open_run, settings_of, write_json
from qvgpt.trajectory import Trajectory, centred, repeated_share, scaled

# settings that a run keeps, whatever it accepts: the weights it began with, their shape, what of
# them is trained, and what the best so far is the best of
_FIXED = ("gpt.", "heads.", "model.", "lora.", "dtype.", "freeze_trunk.", "tokenizer.kind.",
          "tokenizer.vocab_size.", "fit.keep_best.", "fit.slow_trunk.",
          "reward_scale.")  # fmt: skip
_FITTED = {
    "gpt": ("embed_dim", "num_heads", "num_layers", "seq_len"),
    "tokenizer": ("vocab_size",),
    "fit": ("epochs", "lr", "value_lr"),
}
"""What follows from the data where it is not said."""
_MUCH_REPEATED = 0.3
"""The share of all tokens from which on it is said that prompts could be shared."""


@dataclass(frozen=True)
class TrainConfig:
    """Train a model on text (LM), or teach it what text is worth (ILQL, MonteCarlo)."""

    data: list[str]
    """Files of rows: .jsonl, .csv, or a directory that `datasets` saved."""
    output: str
    """Directory for the model, its card README.md, log.jsonl, checkpoints and summary.json; new or
    empty."""
    eval_data: list[str] = field(default_factory=list)
    """Files of rows to evaluate on while training."""
    model: str | None = None
    """Directory of the model to start from; none: a GPT from scratch. Its value heads, if any, are
    left out of the result where the trunk is trained without teaching them (LM, AWAC, AWR)."""
    gpt: GPTShape = field(default_factory=GPTShape)
    """Shape of a GPT from scratch. What is not said of it, of the vocabulary, of epochs and rates
    follows from the data, is printed, and stands in run.json."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """Tokenizer of a GPT from scratch; a model to start from brings its own."""
    objectives: list[str | dict[str, Any]] = field(default_factory=lambda: ["LM"])
    """What to learn: LM, AWAC, AWR, MonteCarlo, SARSA, ILQL, DoubleQ, ReturnDistribution, FUDGE,
    ControlledDecoding, PathConsistency, QSFT, or several, with options and weights."""
    heads: HeadsConfig | None = None
    """Value heads, where the objectives learn values and the model has none yet."""
    centred: bool = False
    """Count returns from the mean of a prompt's texts: learn which of them are better, not how
    hard the prompt is. Values then are differences to that mean, and the model says so."""
    reward_scale: float | None = None
    """Multiply rewards by this, to learn from numbers of about 1; none: what the values to start
    from were learned with, else 1. It is kept with the model and undone where values are read, so
    that beta stays in the rewards' own units. All options here that are in units of reward
    (temperature, min_return, eta, heads.low and high) are in the multiplied ones."""
    freeze_trunk: bool = False
    """Leave the language model as it is and train the value heads only."""
    dtype: Dtype = "float32"
    """Of the weights of the model to start from, in memory and in the result; auto: as they are
    stored. Other than float32 only with lora or freeze_trunk; the value heads are float32."""
    lora: LoraConfig | None = None
    """Train low-rank adapters in the place of the language model (needs a model and the extra
    `peft`). The result is merged; the adapters alone lie in `adapter`, for peft."""
    fit: FitOptions = field(default_factory=FitOptions)
    """How to train."""
    max_length: int | None = None
    """Longest text in tokens; none: the model's context."""
    on_too_long: Literal["error", "drop", "cut"] = "error"
    """What to do with longer texts; cut drops those whose reward sits on a cut-off token."""
    resume: bool = False
    """Go on from the newest checkpoint in output."""
    accept_changes: bool = False
    """Go on although settings, data or tokenizer are not those the run began with."""
    dry_run: bool = False
    """Write nothing: try the heaviest batch and say what memory and time the training needs."""


def train(config: TrainConfig, console: Console | None = None) -> dict[str, Any]:
    """From files to files; returns what it writes to summary.json.

    Bad input raises `QvgptError` before anything is written. A dry run returns what `plan` found.
    Started by `accelerate launch` or `torchrun`, all processes do this together; the main one
    writes, to a directory they all see.
    """
    state, output = processes(), Path(config.output)
    config = as_begun(config, settings_of(output, "train"))
    console = console or Console(stderr=True, quiet=not state.is_main_process)
    with ExitStack() as lock:
        goes_on = (output / "run.json").exists()
        state.wait_for_everyone()  # or one might see what another has just written
        if goes_on and state.is_main_process and not config.dry_run:
            # before anything is read that another run might write
            lock.enter_context(alone_in(output))
        return _train(config, console, goes_on, lock, state)


def _train(
    config: TrainConfig,
    console: Console,
    goes_on: bool,
    lock: ExitStack,
    state: PartialState,
) -> dict[str, Any]:
    output, said = Path(config.output), config
    objectives = parse_objectives(config.objectives)
    check_run(output, "train", config, config.resume, config.accept_changes)
    if goes_on:
        finished = (output / "summary.json").exists()
        _say_what_changed(config, finished, console)
        if finished:
            console.print(f"{output}: this run is finished")
            if state.is_main_process and not config.dry_run:
                _clear(output)
            return json.loads((output / "summary.json").read_text("utf-8"))
    newest = newest_checkpoint(output / "checkpoints")
    model, config = _start(config, newest, console)
    data, counts = _load(config, config.data, model, console)
    config = replace(config, fit=_fitted(config, model, data, objectives.learns_values))
    _say_what_fits(said, config, console)
    eval_data, eval_counts = _load(config, config.eval_data, model, console)
    if objectives.learns_values:
        refuse_no_rewards(config.data, data, counts["rows"], counts["unrewarded"], console)
    refuse_centring(config.centred, model, objectives, data)
    if config.centred:
        data, eval_data = centred(data), centred(eval_data)
    scale = _reward_scale(config, objectives, model)
    if scale != 1:
        data, eval_data = scaled(data, scale), scaled(eval_data, scale)
    objectives = objectives.fitted_to(data)
    judges = model.info.judged_by
    dialogues = model.info.dialogues or _are_dialogues(data, model)
    model = _equipped(config, model, objectives, [*data, *eval_data], newest, console)
    model.info.dialogues = dialogues
    model.info.judged_by = sorted({*judges, *counts["judged_by"]})
    if objectives.needs_reference:
        _keep_reference(config, model)
    refuse(model, data, objectives, config.fit, eval_data)
    _say_what_sharing_saves(config, model, data, objectives, console)
    if config.dry_run:
        return plan(model, data, objectives, config.fit, eval_data, console)
    state.wait_for_everyone()  # all have read what there was
    if state.is_main_process:
        # not config.resume: a run that another process began meanwhile is not ours
        open_run(output, "train", config, goes_on, config.accept_changes)
        if not goes_on:
            lock.enter_context(alone_in(output))
    if objectives.teaches_values and model.heads is not None:
        model.info.centred, model.heads.reward_scale = config.centred, scale
    fitted = fit(
        model, data, objectives, config.fit,
        eval_data=eval_data, output=output, resume=config.resume,
        accept_changes=config.accept_changes, console=console,
    )  # fmt: skip
    parts = {"trunk": model.trunk}
    if model.heads is not None:
        parts |= {"q": model.heads.q, "v": model.heads.v}
    summary = {
        "data": counts,
        "eval_data": eval_counts if config.eval_data else None,
        **fitted,
        "vocab_size": model.trunk.vocab_size,
        "parameters": {k: sum(p.numel() for p in m.parameters()) for k, m in parts.items()},
        "output": str(output),
    }
    if state.is_main_process:
        write_card(output, training_card(asdict(config), summary, model), console.print)
        write_json(output / "summary.json", summary)  # from here on the run counts as finished
        _clear(output)
    return summary


def check_training(config: TrainConfig) -> None:
    """Raise `QvgptError` for what `train` would refuse whatever more texts there will be in `data`.

    What is there of them already is read; nothing is written.
    """
    objectives, quiet = parse_objectives(config.objectives), Console(quiet=True)
    model, config = _start(config, None, quiet)
    eval_data, _ = _load(config, config.eval_data, model, quiet)
    _read(config, config.data, model)
    refuse_centring(config.centred, model, objectives, [])
    _reward_scale(config, objectives, model)
    if config.heads is not None and not config.heads.knows_support:  # the texts will say which
        config = replace(config, heads=replace(config.heads, low=0.0, high=1.0))
    model = _equipped(config, model, objectives, [], None, quiet)
    refuse_options(model, objectives, config.fit, eval_data)


def as_begun(config: TrainConfig, begun: Any) -> TrainConfig:
    """What is left open is what these settings of a run, if there is one, say."""
    sections: dict[str, Any] = {}
    for section, names in _FITTED.items():
        own, known = getattr(config, section), begun.get(section) if begun else None
        if isinstance(known, dict):
            left = [name for name in names if getattr(own, name) is None]
            numbers = {name: x for name in left if isinstance(x := known.get(name), int | float)}
            sections[section] = replace(own, **numbers)
    return replace(config, **sections)


def _fitted(
    config: TrainConfig, model: ValueModel, data: Sequence[Trajectory], learns_values: bool
) -> FitOptions:
    """How to train, with nothing left open."""
    tokens, width = sum(len(t.tokens) for t in data), model.trunk.embed_dim
    new, adapters = config.model is None, config.lora is not None
    found = config.fit.fitted_to(len(data), tokens, width, from_scratch=new, adapters=adapters)
    return found if learns_values else replace(found, value_lr=config.fit.value_lr)


def _say_what_fits(said: TrainConfig, config: TrainConfig, console: Console) -> None:
    """Name what was left open, with what it is now."""
    before, now = asdict(said), asdict(config)
    found = [
        f"{section}.{name} {now[section][name]:g}"
        for section, names in _FITTED.items()
        for name in names
        if now[section][name] != before[section][name]
    ]
    if found:
        told = f"fitted to the data (what you say stays): {', '.join(found)}"
        console.print(told, soft_wrap=True, highlight=False)


def _say_what_sharing_saves(
    config: TrainConfig,
    model: ValueModel,
    data: Sequence[Trajectory],
    objectives: Objectives,
    console: Console,
) -> None:
    """Name `fit.share_prompts` where it is off and would save much."""
    if config.fit.share_prompts or (share := repeated_share(data)) < _MUCH_REPEATED:
        return
    with suppress(QvgptError):
        refuse_shared_prompts(model, objectives)
        console.print(
            f"{share:.0%} of the tokens are prompts that other texts have too: "
            "fit.share_prompts true (packed false) reads each prompt once",
            soft_wrap=True,
        )


def _clear(output: Path) -> None:
    """Drop what a finished run needs no more."""
    for spent in ("checkpoints", "best"):
        shutil.rmtree(output / spent, ignore_errors=True)


def _say_what_changed(config: TrainConfig, finished: bool, console: Console) -> None:
    """Print the changed settings a run goes on with; refuse those it cannot go on with."""
    changed = changed_settings(Path(config.output), "train", config)
    fixed = [change for name, change in changed.items() if f"{name}.".startswith(_FIXED)]
    if fixed:
        raise QvgptError(
            f"{config.output}: {', '.join(fixed)}: a run cannot go on with that, it defines the "
            "model or what is trained of it; choose another output"
        )
    if finished and changed:
        raise QvgptError(
            f"{config.output}: is finished and takes no other settings; give it as --model of a "
            "new run"
        )
    if changed:
        console.print(f"goes on with other settings: {', '.join(changed.values())}", soft_wrap=True)


def _start(
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


def _equipped(
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


def _are_dialogues(data: list[Trajectory], model: ValueModel) -> bool:
    """Whether messages end within these texts, by our own template."""
    eot = model.tokenizer.template.eot if model.tokenizer is not None else None
    return eot is not None and any(eot in t.tokens[:-1] for t in data)


def _reward_scale(config: TrainConfig, objectives: Objectives, model: ValueModel) -> float:
    """What to multiply rewards with, which learned values must have been learned with too."""
    given, learned = config.reward_scale, 1.0
    if not objectives.learns_values:
        if given is not None:
            raise QvgptError("reward_scale: is kept with values, which the objectives do not learn")
        return 1.0
    if given is not None and not 0 < given < math.inf:
        raise QvgptError(f"reward_scale: must be above 0, not {given}")
    if model.heads is None or model.heads.are_fresh:
        return learned if given is None else given
    learned = model.heads.reward_scale
    if given not in (None, learned):
        raise QvgptError(
            f"reward_scale: the values to start from were learned with {learned:g}; leave it out"
        )
    return learned


def _keep_reference(config: TrainConfig, model: ValueModel) -> None:
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


def _load(
    config: TrainConfig, paths: list[str], model: ValueModel, console: Console
) -> tuple[list[Trajectory], dict[str, Any]]:
    """The texts of some files, and their counts; says what was cut or dropped."""
    texts, report, limit = _read(config, paths, model)
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


def _read(
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
