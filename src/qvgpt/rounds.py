"""`qvgpt rounds`: collect with the guided model, learn from all texts so far, and again.

Values of what one policy wrote say little of where guidance by them leads. So the guided policy
writes the next texts, and values are learned of the union of all (DAgger: Ross et al., 2011,
arXiv:1011.0686; Q♯: Zhou et al., 2025, two rounds). A round is `collect`, `train` and `evaluate`,
each in a directory of its own: a stopped run goes on where it was, and what is finished stays.

    output/round-1/samples  model  evaluation        output/round-2/samples  …
"""

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from qvgpt.collect import CollectConfig, collect, prepare
from qvgpt.data.rows import load_trajectories
from qvgpt.envs.rewards import get_reward
from qvgpt.errors import QvgptError
from qvgpt.evaluate import EvaluateConfig, evaluate, refuse_options
from qvgpt.model_card import card_of
from qvgpt.models.value_model import ValueModel
from qvgpt.objectives import parse_objectives
from qvgpt.processes import processes
from qvgpt.run import alone_in, changed_settings, check_run, open_run, settings_of, write_json
from qvgpt.sampling import check_references, load_prompts
from qvgpt.train_config import TrainConfig, as_begun
from qvgpt.trainer import check_training, train

COLLECT, TRAIN = CollectConfig("", "", "", ""), TrainConfig([], "")
"""The options of `collect` and `train` as they are unless said otherwise."""
_OURS = {
    "collect": (
        "model",
        "data",
        "reward",
        "output",
        "beta",
        "kl_budget",
        "value_models",
        "contrast",
        "weights",
        "resume",
    ),
    "train": ("data", "output", "model", "resume", "accept_changes", "dry_run"),
}


@dataclass(frozen=True)
class RoundsConfig:
    """Several rounds of collecting with the guided model and learning from all texts so far."""

    model: str
    """Directory of the language model to begin with: the base, which all rounds are compared to."""
    data: str
    """Rows with prompts to write from (and what the reward needs: references, completion, …)."""
    reward: str
    """As of `collect`: bleu, chrf, classifier:DIR#LABEL … (docs/rewards.md)."""
    output: str
    """A new directory, with one for each round in it."""
    beta: float
    """Strength of guidance when collecting and when judging; 0 where collect.best_of chooses."""
    rounds: int = 2
    """How many; a finished run takes more of them, with resume."""
    logs: list[str] = field(default_factory=list)
    """Files of rows with rewards that there are already: every round learns from them too."""
    start: Literal["base", "last"] = "base"
    """What each training starts from. base: the model of round 0, so that values do not depend on
    the way they came, and a frozen language model stays the base. last: the model of the round
    before, which is cheaper; then the trunk, where it is trained, moves from round to round."""
    eval_data: str | None = None
    """Rows with prompts to judge on; none: those of `data`, with other random numbers."""
    eval_samples: int = 1
    """Texts per prompt to judge by."""
    judge: str | None = None
    """The reward that base and guided models are judged by; none: `reward`, but where that is a
    classifier, whose rewards are learned from: then another judge is to be named."""
    collect: CollectConfig = field(default_factory=lambda: COLLECT)
    """Options of `collect`: how texts are written, and judged as well. Model, data, reward, output,
    beta and resume are said here above."""
    train: TrainConfig = field(default_factory=lambda: TRAIN)
    """Options of `train`. Data, model, output and resume follow from the round."""
    resume: bool = False
    """Go on with rounds that were stopped."""


def rounds(config: RoundsConfig, console: Console | None = None) -> dict[str, Any]:
    """Run or resume all rounds; returns what summary.json holds.

    Bad input raises `QvgptError` before anything is written, but for what the texts to come decide:
    until the first training begins, a resumed run may change the options of `train`.
    """
    console = console or Console(stderr=True)
    begun = as_begun(config.train, settings_of(Path(config.output), "rounds").get("train"))
    record = {k: v for k, v in vars(config).items() if k != "rounds"} | {"train": begun}
    config = replace(config, train=replace(config.train, fit=begun.fit))
    goes_on = (Path(config.output) / "run.json").exists()
    with ExitStack() as lock:
        if goes_on and config.resume:  # before what is there changes
            lock.enter_context(alone_in(Path(config.output)))
        changed = _training_changed(config, record)
        check_run(config.output, "rounds", record, config.resume, bool(changed))
        _refuse(config)
        output = open_run(config.output, "rounds", record, config.resume, bool(changed))
        if not goes_on:
            lock.enter_context(alone_in(output))
        if changed:
            console.print(f"goes on with other settings: {', '.join(changed)}", soft_wrap=True)
        rows, summary = [], {}
        for number in range(1, config.rounds + 1):
            console.print(f"round {number} of {config.rounds}", highlight=False)
            rows.append(_round(config, number, console))
            summary = {
                "reward": config.reward,
                "judge": _judge(config),
                "rounds": rows,
                "model": rows[-1]["model"],
            }
            write_json(output / "summary.json", summary)
    return summary


def _training_changed(config: RoundsConfig, record: dict[str, Any]) -> list[str]:
    """The changed options of `train`, where no others changed and no training has begun; or that a
    judge is named, which older runs did not ask for."""
    output = Path(config.output)
    if not (output / "run.json").exists():
        return []
    changed = changed_settings(output, "rounds", record)
    may = () if _has_trained(config) else ("train.",)
    if settings_of(output, "rounds").get("judge") is None:
        may = ("judge", *may)
    return list(changed.values()) if all(name.startswith(may) for name in changed) else []


def _has_trained(config: RoundsConfig) -> bool:
    return (_place(config, 1) / "model/run.json").exists()


def _round(config: RoundsConfig, number: int, console: Console) -> dict[str, Any]:
    """One round, as far as it is not done yet, and its line of the summary."""
    here = _place(config, number)
    samples = _once(here / "samples", lambda: collect(_collecting(config, number)))
    learned = _once(here / "model", lambda: train(_training(config, number), console))
    judged = _once(here / "evaluation", lambda: evaluate(_judging(config, number)))
    base, guided = judged["rows"]
    return {
        "round": number,
        "texts": learned["data"]["trajectories"],
        "collected": samples["reward_mean"],
        "base": base["mean"],
        "guided": guided["mean"],
        "delta": guided["delta"],
        "delta_ci95": guided["delta_ci95"],
        "kl_per_sequence": guided["kl_per_sequence"],
        "judge": judged["metric"],
        "model": str(here / "model"),
    }


def _once(place: Path, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The summary of a part, which is run, or gone on with, unless it is there."""
    done = place / "summary.json"
    return json.loads(done.read_text("utf-8")) if done.exists() else run()


def _place(config: RoundsConfig, number: int) -> Path:
    return Path(config.output) / f"round-{number}"


def _collecting(config: RoundsConfig, number: int) -> CollectConfig:
    """The collection of a round: by the model of the round before, with random numbers of its own.

    What has no values yet is not guided, and does not choose.
    """
    first, given = number == 1, config.collect
    writer = config.model if first else str(_place(config, number - 1) / "model")
    plain = first and not _has_values(config)
    return replace(
        given,
        model=writer,
        data=config.data,
        reward=config.reward,
        output=str(_place(config, number) / "samples"),
        beta=0.0 if plain else config.beta,
        best_of=1 if plain else given.best_of,
        seed=given.seed + number,
        resume=True,
    )


def _training(config: RoundsConfig, number: int) -> TrainConfig:
    """The training of a round: on all logs and all texts collected so far."""
    collected = [_place(config, k) / "samples/data.jsonl" for k in range(1, number + 1)]
    again = config.start == "base" or number == 1
    return replace(
        config.train,
        data=[*config.logs, *map(str, collected)],
        model=config.model if again else str(_place(config, number - 1) / "model"),
        output=str(_place(config, number) / "model"),
        resume=True,
    )


def _judging(config: RoundsConfig, number: int) -> EvaluateConfig:
    """Base against guided, texts written as they are collected."""
    how, here = config.collect, _place(config, number)
    begun = settings_of(here / "evaluation", "evaluate")
    return EvaluateConfig(
        model=str(here / "model"),
        base=config.model,
        data=config.eval_data or config.data,
        reward=_judge(config),
        output=str(here / "evaluation"),
        betas=[config.beta] if config.beta else [],
        best_of=how.best_of,
        temperatures=how.temperatures[:1],
        top_k=how.top_k, top_p=how.top_p, min_p=how.min_p,
        samples=config.eval_samples,
        max_tokens=how.max_tokens,
        max_batch=how.max_batch,
        limit=None if config.eval_data else how.limit,
        seed=how.seed,
        shaped=how.shaped, brevity=how.brevity,
        dtype=how.dtype, device_map=how.device_map,
        card=begun.get("card", False) if begun else card_of(here / "model") is not None,
        resume=True,
    )  # fmt: skip


def _judge(config: RoundsConfig) -> str:
    return config.reward if config.judge is None else config.judge


def _has_values(config: RoundsConfig) -> bool:
    return (Path(config.model) / "value_config.json").exists()


def _refuse(config: RoundsConfig) -> None:
    """Raise `QvgptError` for what could only fail in the middle of the rounds."""
    if config.rounds < 1 or config.eval_samples < 1:
        raise QvgptError("rounds: rounds and eval_samples must be at least 1")
    if (_place(config, config.rounds + 1) / "evaluation/summary.json").exists():
        raise QvgptError(
            f"rounds: {config.output} has finished more than {config.rounds}: give at least as many"
        )
    for section, standard in (("collect", COLLECT), ("train", TRAIN)):
        for name in _OURS[section]:
            if getattr(getattr(config, section), name) != getattr(standard, name):
                raise QvgptError(f"{section}.{name}: is for the rounds to say; leave it out")
    if processes().num_processes > 1:
        raise QvgptError("rounds: one process collects and trains: start it by itself")
    if not config.beta and config.collect.best_of < 2:
        raise QvgptError("rounds: nothing guides: give a beta, or collect.best_of of 2 and more")
    if config.beta and config.collect.best_of > 1:
        raise QvgptError("rounds: beta guides or collect.best_of chooses: give one of them")
    if config.collect.best_of > 1 and 0 in config.collect.temperatures:
        raise QvgptError("collect: temperature 0 writes one text: nothing for best_of to choose")
    objectives = parse_objectives(config.train.objectives)
    if not objectives.teaches_values or objectives.teaches_v_alone:
        raise QvgptError("train.objectives: these teach no Q, so that there is nothing to guide by")
    if config.beta and objectives.level == "turn":
        raise QvgptError("beta: values of whole turns guide no token: 0, and collect.best_of")
    refuse_options(_judging(config, 1))
    _refuse_reading(config)


def _refuse_reading(config: RoundsConfig) -> None:
    """The same of what lies in files: model, prompts, references."""
    if config.collect.base_url is not None:
        raise QvgptError("collect.base_url: a server's model does not learn from round to round")
    model, _, rows, _, _ = prepare(_collecting(config, 1))
    check_references(rows, [config.reward])
    _refuse_partial(config, model)
    judged = rows
    if config.eval_data:
        judged, _ = load_prompts(config.eval_data, model, config.collect.max_tokens)
    check_references(judged, [_judge(config)])
    if config.train.heads is not None and _has_values(config):
        raise QvgptError(f"train.heads: {config.model} has value heads already; leave heads out")
    del model
    if not _has_trained(config):
        check_training(replace(_training(config, 1), data=config.logs))


def _refuse_partial(config: RoundsConfig, model: ValueModel) -> None:
    """Who trains does not judge: `evaluate` would refuse it when the first round has learned."""
    assert model.tokenizer is not None
    _, logged = load_trajectories(config.logs, model.tokenizer)
    trained = {*get_reward(config.reward).models, *model.info.judged_by, *logged.judged_by}
    if get_reward(_judge(config)).models & trained:
        raise QvgptError(
            f"judge: {_judge(config)} gives rewards that the models learn from: what they gain by "
            "it is no evidence. Name another one, such as a classifier trained on other labels "
            "(docs/rewards.md)"
        )
