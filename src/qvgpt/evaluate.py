"""`qvgpt evaluate`: base and guided side by side on a data set, with summary.json and a report."""

import sys
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from qvgpt.bootstrap import corpus_bleu_ci, corpus_chrf_ci
from qvgpt.compare import (
    CompareOptions,
    Method,
    Row,
    Score,
    compare,
    refuse_other_tokens,
)
from qvgpt.decode.policy import Guidance
from qvgpt.decode.sources import HeadValues, ValueSource, describe, leaves, own_values
from qvgpt.diagnostics import value_diagnostics
from qvgpt.envs.rewards import Metric, get_reward, references, shape
from qvgpt.errors import QvgptError
from qvgpt.evaluate_config import EvaluateConfig, methods_of, refuse_options
from qvgpt.evaluate_report import Evaluation, sections, show
from qvgpt.model_card import add_evaluation, card_of, evaluation_section, files_of
from qvgpt.models.value_model import ValueModel
from qvgpt.report import write_report
from qvgpt.run import alone_in, check_run, open_run, write_json
from qvgpt.sampling import (
    TextProgress,
    check_guidance,
    check_references,
    check_room,
    check_values,
    load_prompts,
    load_values,
)
from qvgpt.trajectory import Trajectory, by_prompt
from qvgpt.written import WrittenTexts

CORPUS_METRICS = {
    "corpus_bleu": corpus_bleu_ci,
    "corpus_bleu:zh": partial(corpus_bleu_ci, tokenize="zh"),
    "corpus_chrf": corpus_chrf_ci,
}
"""Metrics of a whole test set, 0..100, which are no mean over its prompts."""


@dataclass(frozen=True)
class _Asked:
    """What an evaluation needs, read and found to belong together."""

    model: ValueModel
    base: ValueModel | None
    values: ValueSource | None
    """What guides instead of the model's own."""
    methods: dict[str, Method]
    fields: Sequence[Mapping[str, Any]]
    """Of each prompt's row, for rewards."""
    prompts: list[list[int]]
    rewards: dict[str, Metric]
    partial: list[str]
    """Judges whose rewards the model learned from."""

    def judges(self) -> dict[str, Score]:
        """Each reward as a score of texts and the indices of their prompts."""
        return {name: self._judge(reward) for name, reward in self.rewards.items()}

    def _judge(self, metric: Metric) -> Score:
        return lambda texts, index: metric(texts, [self.fields[i] for i in index])

    def texts(self, samples: int, without: Collection[str]) -> int:
        """How many are written in all, but for those of the methods `without`."""
        each = (
            how.samples(samples) * how.best_of
            for name, how in self.methods.items()
            if name not in without
        )
        return sum(each) * len(self.prompts)


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Run base and guided over the same prompts; returns what summary.json holds."""
    started = time.perf_counter()
    _refuse_another_run(config)
    refuse_options(config)
    asked = _read(config)
    output = open_run(config.output, "evaluate", config, config.resume)
    with alone_in(output):
        return _evaluated(asked, config, output, started)


def _evaluated(
    asked: _Asked, config: EvaluateConfig, output: Path, started: float
) -> dict[str, Any]:
    [data_file] = files_of([config.data])
    kept = WrittenTexts(output / "texts", _sources(config))
    rows = _add_corpus_metrics(_compared(asked, config, kept), asked.fields, config)
    judged = asked.values or own_values(asked.model)
    right = _diagnosed(judged, asked, rows, config)
    found = Evaluation(
        config.model, config.base, config.reward, config.samples, rows, right, asked.partial
    )
    parts = sections(found, asked.model, asked.prompts, config.texts)
    write_report(output / "report.html", f"Evaluation of {config.model}", parts)
    summary = {
        "metric": config.reward,
        "model": config.model,
        "base": config.base,
        "judged_by": sorted(asked.rewards[config.reward].models),
        "judges_trained_on": asked.partial,
        "guided_by": None if judged is None else describe(judged),
        "data": config.data,
        "data_sha256": data_file["sha256"],
        "prompts": len(asked.prompts),
        "samples": config.samples,
        "rows": [row.as_dict() for row in rows],
        "values": right,
        "recommended": _recommend(asked.model, rows, config) if config.recommend else None,
        "seconds": round(time.perf_counter() - started, 1),
    }
    write_json(output / "summary.json", summary)
    kept.drop()
    show(found, output)
    if config.card:
        add_evaluation(Path(config.model), evaluation_section(summary))
    if config.recommend:
        print(_in_words(summary["recommended"], config.model), file=sys.stderr)
    return summary


def _read(config: EvaluateConfig) -> _Asked:
    """Models, prompts and rewards. Raises `QvgptError` where they do not go together."""
    names = [config.reward, *(n for n in config.metrics if n not in CORPUS_METRICS)]
    rewards = {name: get_reward(name) for name in names}
    placed: dict[str, Any] = {"dtype": config.dtype, "device_map": config.device_map}
    model = ValueModel.from_pretrained(config.model, **placed)
    values = load_values(
        model, config.model, config.value_models, config.contrast, config.weights, **placed
    )
    methods = methods_of(config)
    guidances = [how.guidance for how in methods.values()]
    strengths = [s for g in guidances for s in (g.beta, g.kl_budget)]
    searches = [how.search for how in methods.values() if how.search is not None]
    check_values(model, config.model, strengths, config.best_of, values, searches)
    for name in ("recommend", "card"):
        if getattr(config, name) and values is not None:
            raise QvgptError(f"{name}: what guides here are not the model's own values")
    if config.recommend and model.heads is None:
        raise QvgptError(f"{config.model}: recommend: there are no value heads to be guided by")
    data, prompts = load_prompts(config.data, model, config.max_tokens, config.limit)
    check_guidance(model, guidances, prompts, config.max_tokens, values)
    base = None
    if config.base is not None:
        base = ValueModel.from_pretrained(config.base, **placed)
        refuse_other_tokens(model, base)
        check_room(prompts, base, config.max_tokens)
    check_references(data, [config.reward, *config.metrics])
    partial = judges_trained_on(rewards, model, values, base)
    _refuse_partial(partial, config)
    fields = [row.fields for row in data]
    return _Asked(model, base, values, methods, fields, prompts, rewards, partial)


def _compared(asked: _Asked, config: EvaluateConfig, kept: WrittenTexts) -> list[Row]:
    """What each method writes, but for what it has written already, and earns."""
    known = {name for name in asked.methods if kept.find(name) is not None}
    if known:
        told = f"evaluate: {len(known)} of {len(asked.methods)} methods have written"
        print(told, file=sys.stderr)
    options = CompareOptions(
        samples=config.samples,
        max_tokens=config.max_tokens,
        max_batch=config.max_batch,
        seed=config.seed,
        keep_reports=config.texts,
    )
    judges = asked.judges()
    metrics = {name: judges[name] for name in config.metrics if name not in CORPUS_METRICS}
    with TextProgress("evaluate", asked.texts(config.samples, known)) as progress:
        return compare(
            asked.model, asked.prompts, judges[config.reward], asked.methods, options,
            base=asked.base, metrics=metrics, on_step=progress.step, values=asked.values, kept=kept,
        )  # fmt: skip


def _diagnosed(
    judged: ValueSource | None, asked: _Asked, rows: list[Row], config: EvaluateConfig
) -> dict[str, Any] | None:
    """How right the values are about the base's texts, where heads know those of tokens."""
    if not isinstance(judged, HeadValues) or judged.model.info.level != "token":
        return None
    logged = _logged(asked.model, asked.prompts, asked.fields, rows, config)
    if judged.model.info.centred and all(len(several) == 1 for several in by_prompt(logged)):
        said = "centred values are judged by several samples a prompt, at a temperature above 0"
        print(f"evaluate: {said}", file=sys.stderr)
        return None
    return value_diagnostics(judged.model, logged)


def _sources(config: EvaluateConfig) -> list[Path]:
    """What writes and guides, and the prompts."""
    named = [config.model, config.base, *config.value_models, *config.contrast, config.data]
    return [Path(name) for name in named if name is not None]


def _refuse_another_run(config: EvaluateConfig) -> None:
    """Raise `QvgptError` where results must not go, or the model has no card to add them to."""
    if not config.resume and (Path(config.output) / "run.json").exists():
        raise QvgptError(
            f"{config.output}: holds another run already; choose another output, or go on with the "
            "same one (finished, it is made anew) with --resume true"
        )
    check_run(config.output, "evaluate", config, config.resume)
    if config.card and card_of(Path(config.model)) is None:
        raise QvgptError(
            f"card: {config.model} holds no model card that qvgpt wrote, and no other README.md is "
            "touched: leave card out"
        )


def _refuse_partial(partial: Sequence[str], config: EvaluateConfig) -> None:
    """Who trains does not judge; it may choose, where that is said."""
    chooses = [config.reward] if config.recommend else []
    refused = [name for name in partial if name not in chooses]
    if refused and not config.accept_training_judge:
        raise QvgptError(
            f"evaluate: {refused[0]} gave the rewards that this model learned from: what it gains "
            "by it is no evidence. Judge by another one, trained on other labels "
            "(docs/rewards.md), or accept that with --accept_training_judge true"
        )
    for name in partial:
        print(
            f"evaluate: {name} gave the rewards that this model learned from: what it gains by it "
            "is no evidence; judge by another one",
            file=sys.stderr,
        )


def _recommend(model: ValueModel, rows: list[Row], config: EvaluateConfig) -> str:
    """Let the best method be what the model recommends: its name. Where that is the plain model
    with nothing said, it recommends nothing."""
    alone = [row for row in rows if row.how.best_of == 1 and row.how.search is None]
    best = max(alone, key=lambda row: (row.score.value, -abs(row.guidance.beta)))
    plain = best.guidance == Guidance()
    model.info.recommended_guidance = None if plain else asdict(best.guidance)
    model.save_config(config.model)
    return best.method


def _in_words(recommended: str, model: str) -> str:
    """What became of `recommend`."""
    if recommended.startswith("guided"):
        return f"recommended from now on by {model}: {recommended}"
    kept = f"nothing earned more than {recommended}, which is how it writes from now on"
    return f"{model} recommends no values: {kept}"


def judges_trained_on(
    rewards: Mapping[str, Metric],
    model: ValueModel,
    values: ValueSource | None,
    base: ValueModel | None = None,
) -> list[str]:
    """Which rewards are by models whose rewards the model, its base or what guides it has learned
    from."""
    known = {judge for m in (model, base) if m is not None for judge in m.info.judged_by}
    for leaf in leaves(values):
        for source in (getattr(leaf, name, None) for name in ("model", "plus", "minus")):
            known.update(source.info.judged_by if source is not None else ())
    return [name for name, reward in rewards.items() if reward.models & known]


def _add_corpus_metrics(
    rows: list[Row], fields: Sequence[Mapping[str, Any]], config: EvaluateConfig
) -> list[Row]:
    """The rows with corpus BLEU and the like, where they are asked for."""
    named = [name for name in config.metrics if name in CORPUS_METRICS]
    if not named:
        return rows
    wanted = [references(row) for row in fields]
    texts = {r.method: [[s.written.text for s in group] for group in r.by_prompt()] for r in rows}
    found = []
    for row in rows:
        both = (texts[row.method], wanted, texts[row.baseline])
        more = {name: CORPUS_METRICS[name](*both, seed=row.seed) for name in named}
        found.append(replace(row, metrics=row.metrics | more))
    return found


def _logged(
    model: ValueModel,
    prompts: Sequence[Sequence[int]],
    fields: Sequence[Mapping[str, Any]],
    rows: list[Row],
    config: EvaluateConfig,
) -> list[Trajectory]:
    """The base's samples at the first temperature above 0 as trajectories with rewards."""
    assert model.tokenizer is not None
    plain = [row for row in rows if not row.guidance.guides]
    samples = next((row for row in plain if row.guidance.temperature > 0), plain[0]).samples
    tokens = [s.written.tokens for s in samples]
    if config.shaped:
        reward, owners = get_reward(config.reward), [fields[s.prompt] for s in samples]
        rewards = shape(reward, tokens, owners, model.tokenizer, brevity=config.brevity)
    else:
        rewards = [[0.0] * (len(s.written.tokens) - 1) + [s.score] for s in samples]
    return [
        Trajectory(
            [*prompts[s.prompt], *written],
            [False] * len(prompts[s.prompt]) + [True] * len(written),
            [0.0] * len(prompts[s.prompt]) + reward,
            terminated=True,  # the score is final, also where the length limit cut the text
        )
        for s, written, reward in zip(samples, tokens, rewards, strict=True)
    ]
