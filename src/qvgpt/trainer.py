"""`qvgpt train`: from files of rows and a configuration to a model directory."""

import json
import math
import shutil
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from rich.console import Console

from qvgpt.checkpoint import newest_checkpoint
from qvgpt.errors import QvgptError
from qvgpt.fit_options import FitOptions
from qvgpt.loop import fit
from qvgpt.model_card import training_card, write_card
from qvgpt.models.value_model import ValueModel
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
from qvgpt.starting_model import equipped, keep_reference, load, read_texts, start
from qvgpt.train_config import FITTED, TrainConfig, as_begun
from qvgpt.trajectory import Trajectory, centred, repeated_share, scaled

# settings that a run keeps, whatever it accepts: the weights it began with, their shape, what of
# them is trained, and what the best so far is the best of
_FIXED = ("gpt.", "heads.", "model.", "lora.", "dtype.", "freeze_trunk.", "tokenizer.kind.",
          "tokenizer.vocab_size.", "fit.keep_best.", "fit.slow_trunk.",
          "reward_scale.")  # fmt: skip
_MUCH_REPEATED = 0.3
"""The share of all tokens from which on it is said that prompts could be shared."""


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
    model, config = start(config, newest, console)
    data, counts = load(config, config.data, model, console)
    config = replace(config, fit=_fitted(config, model, data, objectives.learns_values))
    _say_what_fits(said, config, console)
    eval_data, eval_counts = load(config, config.eval_data, model, console)
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
    model = equipped(config, model, objectives, [*data, *eval_data], newest, console)
    model.info.dialogues = dialogues
    model.info.judged_by = sorted({*judges, *counts["judged_by"]})
    if objectives.needs_reference:
        keep_reference(config, model)
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
    model, config = start(config, None, quiet)
    eval_data, _ = load(config, config.eval_data, model, quiet)
    read_texts(config, config.data, model)
    refuse_centring(config.centred, model, objectives, [])
    _reward_scale(config, objectives, model)
    if config.heads is not None and not config.heads.knows_support:  # the texts will say which
        config = replace(config, heads=replace(config.heads, low=0.0, high=1.0))
    model = equipped(config, model, objectives, [], None, quiet)
    refuse_options(model, objectives, config.fit, eval_data)


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
        for section, names in FITTED.items()
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


def _are_dialogues(data: list[Trajectory], model: ValueModel) -> bool:
    """Whether messages end within these texts, by our own template."""
    eot = model.tokenizer.template.eot if model.tokenizer is not None else None
    return eot is not None and any(eot in t.tokens[:-1] for t in data)
