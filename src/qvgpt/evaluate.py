"""`qvgpt evaluate`: base and guided side by side on a data set, with summary.json and a report."""

import itertools
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from qvgpt.bootstrap import corpus_bleu_ci, corpus_chrf_ci
from qvgpt.categorical import Functional
from qvgpt.compare import (
    CompareOptions,
    Row,
    Score,
    compare,
    refuse_other_tokens,
)
from qvgpt.decode.policy import Guidance
from qvgpt.decode.search import Search
from qvgpt.decode.searches import is_sampled, parse_search, search_name
from qvgpt.decode.sources import HeadValues, ValueSource, describe, leaves, own_values
from qvgpt.diagnostics import value_diagnostics
from qvgpt.envs.rewards import Metric, get_reward, references, shape
from qvgpt.errors import QvgptError
from qvgpt.evaluate_report import Evaluation, sections, show
from qvgpt.model_card import add_evaluation, card_of, evaluation_section, files_of
from qvgpt.models.backbone import Dtype
from qvgpt.models.value_model import ValueModel
from qvgpt.report import write_report
from qvgpt.run import check_run, open_run, write_json
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
class EvaluateConfig:
    """Compare a model with itself guided by its values, on prompts with a reward."""

    model: str
    """Directory of a trained model."""
    data: str
    """Rows with prompts (and what the reward needs: references, completion, …)."""
    reward: str
    """What is compared, as of `collect`: bleu, chrf, classifier:DIR#LABEL … (docs/rewards.md). A
    classifier whose rewards the model learned from is refused, but where it only chooses
    (recommend)."""
    output: str
    """Where summary.json and report.html go; a new directory."""
    base: str | None = None
    """Directory of the language model before value learning: it writes the texts of beta 0, and KL
    is measured to it; same tokenizer. None: the model itself, unguided."""
    metrics: list[str] = field(default_factory=list)
    """Further rewards to report; also corpus_bleu[:zh] and corpus_chrf."""
    betas: list[float] = field(default_factory=lambda: [1.0, 2.0, 4.0])
    """Strengths of guidance, beside the base (0)."""
    best_of: int = 1
    """Beside them: of so many of the base's texts the one whose last token's Q is highest."""
    searches: list[str | dict[str, Any]] = field(default_factory=list)
    """Beside them: block, beam, tree, with options where they are not the usual ones, such as
    '{block: {samples: 16, block: 4}}'; docs/decoding.md lists them."""
    search_betas: list[float] = field(default_factory=lambda: [0.0])
    """Strengths of guidance of what is searched; 0: the plain model proposes, values choose."""
    kl_budgets: list[float] = field(default_factory=list)
    """Methods whose strength is found at each token: the KL to the base, in nats, that it may take;
    need top_k."""
    value_models: list[str] = field(default_factory=list)
    """Directories of models, of any size and the same tokenizer, whose values guide instead of the
    model's own; those of several are added up."""
    contrast: list[str] = field(default_factory=list)
    """Two directories of language models, PLUS and MINUS: log π₊ − log π₋ guides, in nats (proxy
    tuning, DExperts); beside value_models it is added to them."""
    weights: list[float] = field(default_factory=list)
    """Of each of value_models, then of the contrast; none: 1 each."""
    temperatures: list[float] = field(default_factory=lambda: [1.0])
    """Each is run with the base and with every beta; 0 is greedy."""
    top_k: int | None = None
    """Keep the k likeliest tokens, in the base too, so that only beta differs."""
    top_p: float | None = None
    """Keep the smallest set of tokens that holds this probability."""
    min_p: float | None = None
    """Keep tokens at least this likely, relative to the likeliest."""
    candidates: Literal["base", "guided"] = "base"
    """Which distribution top_k, top_p and min_p look at."""
    twins: Literal["mean", "min"] = "mean"
    """How several Q heads are joined."""
    functional: Functional = "mean"
    """What is read as Q from a distribution of returns: mean, soft (Q♯, η = 1 / beta) or cvar."""
    alpha: float = 0.1
    """Of cvar: the share of returns that are the worst."""
    samples: int = 1
    """Texts per prompt (greedy: always 1)."""
    max_tokens: int = 128
    """Where a text is cut if no end token came."""
    max_batch: int = 64
    """Texts written at the same time."""
    limit: int | None = None
    """Use only this many prompts, from the top."""
    seed: int = 0
    """Of sampling and of the bootstrap; the same for every method."""
    shaped: bool = False
    """The values were learned from shaped rewards: hold them against such."""
    brevity: bool = True
    """As in `collect`: BLEU's brevity penalty in every prefix (only read if shaped)."""
    texts: int = 4
    """Prompts whose texts are shown in the report."""
    recommend: bool = False
    """Write the guidance with the best mean reward into the model, for `generate` and `export` to
    use where nothing is said; not with base, which is another model. Choose it on validation data,
    never on those of the final figures."""
    card: bool = False
    """Write what is found into the model's card too (README.md beside its weights), in the place of
    what an earlier evaluation wrote there."""
    accept_training_judge: bool = False
    """Let a classifier judge though the model learned from its rewards; its figures are no
    evidence, and are marked so."""
    dtype: Dtype = "float32"
    """Of the language model's weights in memory; auto: as they are stored."""
    device_map: str | None = None
    """Where the model lies, as accelerate reads it: auto, cuda, cpu …; none: the CPU."""
    resume: bool = False
    """Go on with the same run: methods whose texts are there write no others. Of a finished one
    the results are made anew."""


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Run base and guided over the same prompts; returns what summary.json holds."""
    started = time.perf_counter()
    _refuse_another_run(config)
    refuse_options(config)
    names = [config.reward, *(n for n in config.metrics if n not in CORPUS_METRICS)]
    rewards = {name: get_reward(name) for name in names}
    placed: dict[str, Any] = {"dtype": config.dtype, "device_map": config.device_map}
    model = ValueModel.from_pretrained(config.model, **placed)
    values = load_values(
        model, config.model, config.value_models, config.contrast, config.weights, **placed
    )
    guidances, searched = guidances_of(config), searches_of(config)
    guidances |= {name: guidance for name, (guidance, _) in searched.items()}
    searches = {name: search for name, (_, search) in searched.items()}
    strengths = [s for g in guidances.values() for s in (g.beta, g.kl_budget)]
    check_values(model, config.model, strengths, config.best_of, values, searches.values())
    for name in ("recommend", "card"):
        if getattr(config, name) and values is not None:
            raise QvgptError(f"{name}: what guides here are not the model's own values")
    if config.recommend and model.heads is None:
        raise QvgptError(f"{config.model}: recommend: there are no value heads to be guided by")
    data, prompts = load_prompts(config.data, model, config.max_tokens, config.limit)
    [data_file] = files_of([config.data])
    check_guidance(model, guidances.values(), prompts, config.max_tokens, values)
    base = None
    if config.base is not None:
        base = ValueModel.from_pretrained(config.base, **placed)
        refuse_other_tokens(model, base)
        check_room(prompts, base, config.max_tokens)
    check_references(data, [config.reward, *config.metrics])
    fields = [row.fields for row in data]
    partial = judges_trained_on(rewards, model, values, base)
    _refuse_partial(partial, config)
    judges = {name: _judge(rewards[name], fields) for name in names[1:]}
    score = _judge(rewards[config.reward], fields)
    best_of = dict.fromkeys((n for n in guidances if n.startswith("best of")), config.best_of)
    options = CompareOptions(
        samples=config.samples,
        max_tokens=config.max_tokens,
        max_batch=config.max_batch,
        seed=config.seed,
        keep_reports=config.texts,
    )
    output = open_run(config.output, "evaluate", config, config.resume)
    kept = WrittenTexts(output / "texts", _sources(config, rewards))
    each = (config.samples if g.temperature and is_sampled(searches.get(name)) else 1
            for name, g in guidances.items())  # fmt: skip
    known = {name for name in guidances if kept.find(name) is not None}
    if known:
        print(f"evaluate: {len(known)} of {len(guidances)} methods have written", file=sys.stderr)
    total = sum(
        n * best_of.get(name, 1)
        for n, name in zip(each, guidances, strict=True)
        if name not in known
    )
    with TextProgress("evaluate", total * len(prompts)) as progress:
        rows = compare(
            model, prompts, score, guidances, options,
            base=base, metrics=judges, best_of=best_of, on_step=progress.step, values=values,
            searches=searches, kept=kept,
        )  # fmt: skip
    rows = _add_corpus_metrics(rows, fields, config)
    judged, right = values or own_values(model), None
    if isinstance(judged, HeadValues) and judged.model.info.level == "token":
        logged = _logged(model, prompts, fields, rows, config)
        if judged.model.info.centred and all(len(several) == 1 for several in by_prompt(logged)):
            said = "centred values are judged by several samples a prompt, at a temperature above 0"
            print(f"evaluate: {said}", file=sys.stderr)
        else:
            right = value_diagnostics(judged.model, logged)
    summary = {
        "metric": config.reward,
        "model": config.model,
        "base": config.base,
        "judged_by": sorted(rewards[config.reward].models),
        "judges_trained_on": partial,
        "guided_by": None if judged is None else describe(judged),
        "data": config.data,
        "data_sha256": data_file["sha256"],
        "prompts": len(prompts),
        "samples": config.samples,
        "rows": [row.as_dict() for row in rows],
        "values": right,
        "recommended": _recommend(model, rows, config) if config.recommend else None,
        "seconds": round(time.perf_counter() - started, 1),
    }
    write_json(output / "summary.json", summary)
    found = Evaluation(
        config.model, config.base, config.reward, config.samples, rows, right, partial
    )
    parts = sections(found, model, prompts, config.texts)
    write_report(output / "report.html", f"Evaluation of {config.model}", parts)
    kept.drop()
    show(found, output)
    if config.card:
        add_evaluation(Path(config.model), evaluation_section(summary))
    if config.recommend:
        print(_in_words(summary["recommended"], config.model), file=sys.stderr)
    return summary


def refuse_options(config: EvaluateConfig) -> None:
    """Raise `QvgptError` for what could only fail later, naming the option."""
    for name, least in {"samples": 1, "max_batch": 1, "texts": 0, "seed": 0}.items():
        if getattr(config, name) < least:
            raise QvgptError(f"evaluate: {name} must be at least {least}")
    for name in ("temperatures", *(["search_betas"] if config.searches else [])):
        if not getattr(config, name):
            raise QvgptError(f"evaluate: {name} must not be empty")
    searches = [parse_search(s, config.max_tokens, config.max_batch) for s in config.searches]
    if max(config.temperatures) == 0 and (config.best_of > 1 or any(map(is_sampled, searches))):
        raise QvgptError(
            "evaluate: best_of and block search choose among sampled texts, and temperature 0 "
            "writes one: add another temperature"
        )
    if config.recommend and config.base is not None:
        raise QvgptError(
            "evaluate: recommend compares the guided model with itself, unguided, and base is "
            "another model: leave base out to choose"
        )
    guidances_of(config)  # refuses what has no meaning


def _sources(config: EvaluateConfig, rewards: Mapping[str, Metric]) -> list[Path]:
    """What writes, guides and judges, and the data."""
    judges = [judge for reward in rewards.values() for judge in reward.models]
    named = [config.model, config.base, *config.value_models, *config.contrast, *judges]
    return [Path(name) for name in (*named, config.data) if name is not None]


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
    alone = [row for row in rows if row.best_of == 1 and row.search is None]
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


def guidances_of(config: EvaluateConfig) -> dict[str, Guidance]:
    """Base, every β and the best of N, at every temperature, by name; with the same candidates."""
    common = _common(config)
    found = {}
    for temperature in dict.fromkeys(config.temperatures):
        how = "greedy" if temperature == 0 else f"T = {temperature:g}"
        for beta in dict.fromkeys([0.0, *config.betas]):
            name = f"guided, β = {beta:g}" if beta else "base"
            found[f"{name}, {how}"] = replace(common, beta=beta, temperature=temperature)
        for budget in dict.fromkeys(config.kl_budgets):
            guidance = replace(common, kl_budget=budget, temperature=temperature)
            found[f"guided, KL ≤ {budget:g} a token, {how}"] = guidance
        if config.best_of > 1 and temperature > 0:
            name = f"best of {config.best_of} by Q, {how}"
            found[name] = replace(common, temperature=temperature)
    return found


def searches_of(config: EvaluateConfig) -> dict[str, tuple[Guidance, Search]]:
    """Every search with every strength of guidance, by name.

    One that samples does so at every temperature above 0; the others write one text a prompt, and
    are compared with the greedy base where there is one.
    """
    found = {}
    for spec in config.searches:
        search = parse_search(spec, config.max_tokens, config.max_batch)
        temperatures = [t for t in dict.fromkeys(config.temperatures) if t > 0]
        if not is_sampled(search):
            temperatures = [min(config.temperatures)]
        for beta, temperature in itertools.product(
            dict.fromkeys(config.search_betas), temperatures
        ):
            name = search_name(search) + (f", β = {beta:g}" if beta else "")
            name += f", T = {temperature:g}" if is_sampled(search) else ""
            found[name] = replace(_common(config), beta=beta, temperature=temperature), search
    return found


def _common(config: EvaluateConfig) -> Guidance:
    """What all methods share."""
    return Guidance(
        top_k=config.top_k,
        top_p=config.top_p,
        min_p=config.min_p,
        candidates=config.candidates,
        twins=config.twins,
        functional=config.functional,
        alpha=config.alpha,
    )


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


def _judge(metric: Metric, fields: Sequence[Mapping[str, Any]]) -> Score:
    return lambda texts, index: metric(texts, [fields[i] for i in index])


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
