"""`qvgpt evaluate`: base and guided side by side on a data set, with summary.json and a report."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

from qvgpt.bootstrap import corpus_bleu_ci, corpus_chrf_ci
from qvgpt.categorical import Functional
from qvgpt.compare import (
    CompareOptions,
    Row,
    Sample,
    Score,
    compare,
    refuse_other_tokens,
)
from qvgpt.decode.policy import Guidance
from qvgpt.decode.sources import HeadValues, describe, own_values
from qvgpt.diagnostics import value_diagnostics
from qvgpt.envs.rewards import get_reward, references, shape
from qvgpt.errors import QvgptError
from qvgpt.models.backbone import Dtype
from qvgpt.models.value_model import ValueModel
from qvgpt.report import Section, Series, TokenValue, coloured_text, line_chart, table, write_report
from qvgpt.report_page import side_by_side
from qvgpt.run import check_run, open_run, output_console, read_log, write_json
from qvgpt.sampling import (
    TextProgress,
    check_guidance,
    check_references,
    check_room,
    check_values,
    load_prompts,
    load_values,
)
from qvgpt.trajectory import Trajectory
from qvgpt.value_report import learning_section, value_charts, values_text, watched_section

CORPUS_METRICS = {"corpus_bleu": corpus_bleu_ci, "corpus_chrf": corpus_chrf_ci}
"""Metrics of a whole test set, 0..100, which are no mean over its prompts."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Compare a model with itself guided by its values, on prompts with a reward."""

    model: str
    """Directory of a trained model."""
    data: str
    """Rows with prompts (and what the reward needs: references, completion, …)."""
    reward: str
    """What is compared: bleu, chrf, rouge_l, exact_match, token_f1, length or module:function."""
    output: str
    """Where summary.json and report.html go; a new directory."""
    base: str | None = None
    """Directory of the language model before value learning: it writes the texts of beta 0, and KL
    is measured to it; same tokenizer. None: the model itself, unguided."""
    metrics: list[str] = field(default_factory=list)
    """Further rewards to report; also corpus_bleu and corpus_chrf."""
    betas: list[float] = field(default_factory=lambda: [1.0, 2.0, 4.0])
    """Strengths of guidance, beside the base (0)."""
    best_of: int = 1
    """Beside them: of so many of the base's texts the one whose last token's Q is highest."""
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
    use where nothing is said. Choose it on validation data, never on those of the final figures."""
    dtype: Dtype = "float32"
    """Of the language model's weights in memory; auto: as they are stored."""
    device_map: str | None = None
    """Where the model lies, as accelerate reads it: auto, cuda, cpu …; none: the CPU."""
    resume: bool = False
    """Make the results anew in a directory that holds the same run."""


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Run base and guided over the same prompts; returns what summary.json holds."""
    started = time.perf_counter()
    check_run(config.output, "evaluate", asdict(config), config.resume)
    _refuse(config)
    kept: dict[str, Any] = {"dtype": config.dtype, "device_map": config.device_map}
    model = ValueModel.from_pretrained(config.model, **kept)
    values = load_values(
        model, config.model, config.value_models, config.contrast, config.weights, **kept
    )
    strengths = [*config.betas, *config.kl_budgets]
    check_values(model, config.model, strengths, config.best_of, values)
    guidances = guidances_of(config)
    if config.recommend and values is not None:
        raise QvgptError("recommend: what guides here are not the model's own values")
    if config.recommend and model.heads is None:
        raise QvgptError(f"{config.model}: recommend: there are no value heads to be guided by")
    data, prompts = load_prompts(config.data, model, config.max_tokens, config.limit)
    check_guidance(model, guidances.values(), prompts, config.max_tokens, values)
    base = None
    if config.base is not None:
        base = ValueModel.from_pretrained(config.base, **kept)
        refuse_other_tokens(model, base)
        check_room(prompts, base, config.max_tokens)
    check_references(data, [config.reward, *config.metrics])
    fields = [row.fields for row in data]
    judges = {n: _judge(n, fields) for n in config.metrics if n not in CORPUS_METRICS}
    score = _judge(config.reward, fields)
    best_of = dict.fromkeys((n for n in guidances if n.startswith("best of")), config.best_of)
    options = CompareOptions(
        samples=config.samples,
        max_tokens=config.max_tokens,
        max_batch=config.max_batch,
        seed=config.seed,
        keep_reports=config.texts,
    )
    output = open_run(config.output, "evaluate", asdict(config), config.resume)
    each = (1 if g.temperature == 0 else config.samples for g in guidances.values())
    total = sum(n * best_of.get(name, 1) for n, name in zip(each, guidances, strict=True))
    with TextProgress("evaluate", total * len(prompts)) as progress:
        rows = compare(
            model, prompts, score, guidances, options,
            base=base, metrics=judges, best_of=best_of, on_step=progress.step, values=values,
        )  # fmt: skip
    rows = _add_corpus_metrics(rows, fields, config)
    judged, right = values or own_values(model), None
    if isinstance(judged, HeadValues) and judged.model.info.level == "token":
        right = value_diagnostics(judged.model, _logged(model, prompts, fields, rows, config))
    summary = {
        "metric": config.reward,
        "model": config.model,
        "base": config.base,
        "guided_by": None if judged is None else describe(judged),
        "data": config.data,
        "prompts": len(prompts),
        "samples": config.samples,
        "rows": [row.as_dict() for row in rows],
        "values": right,
        "recommended": _recommend(model, rows, config) if config.recommend else None,
        "seconds": round(time.perf_counter() - started, 1),
    }
    write_json(output / "summary.json", summary)
    sections = _sections(config, model, prompts, rows, right)
    write_report(output / "report.html", f"Evaluation of {config.model}", sections)
    _show(rows, config.reward, right, output)
    return summary


def _refuse(config: EvaluateConfig) -> None:
    """Raise `QvgptError` for what could only fail later, naming the option."""
    for name, least in {"samples": 1, "max_batch": 1, "texts": 0, "seed": 0}.items():
        if getattr(config, name) < least:
            raise QvgptError(f"evaluate: {name} must be at least {least}")
    if not config.temperatures:
        raise QvgptError("evaluate: temperatures must not be empty")


def _recommend(model: ValueModel, rows: list[Row], config: EvaluateConfig) -> str:
    """Let the best method be what the model recommends: its name. The base is none to recommend."""
    alone = [row for row in rows if row.best_of == 1]  # a guidance is all that can be written down
    best = max(alone, key=lambda row: (row.score.value, -row.guidance.beta))
    guided = best.guidance.beta > 0 or best.guidance.kl_budget is not None
    model.info.recommended_guidance = asdict(best.guidance) if guided else None
    model.save_config(config.model)
    return best.method


def guidances_of(config: EvaluateConfig) -> dict[str, Guidance]:
    """Base, every β and the best of N, at every temperature, by name; with the same candidates."""
    common = Guidance(
        top_k=config.top_k,
        top_p=config.top_p,
        min_p=config.min_p,
        candidates=config.candidates,
        twins=config.twins,
        functional=config.functional,
        alpha=config.alpha,
    )
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


def _judge(reward: str, fields: Sequence[Mapping[str, Any]]) -> Score:
    metric = get_reward(reward)
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


def _show(rows: list[Row], metric: str, values: dict[str, Any] | None, output: Path) -> None:
    """The table and what values are worth, on the standard output."""
    shown = Table()
    for heading in ("method", metric, "difference", "KL", "tokens", "µs/token", *rows[0].metrics):
        shown.add_column(heading, overflow="fold")
    for row in rows:
        low, high = row.score.delta_ci95 or (math.nan, math.nan)
        shown.add_row(
            row.method,
            f"{row.score.value:.4g} [{row.score.ci95[0]:.4g}, {row.score.ci95[1]:.4g}]",
            f"{row.score.delta:+.4g} [{low:+.4g}, {high:+.4g}]",
            f"{row.kl_per_sequence:.3f}",
            f"{row.tokens_mean:.1f}",
            "–" if row.s_per_token is None else f"{1e6 * row.s_per_token:.0f}",
            *(f"{estimate.value:.4g}" for estimate in row.metrics.values()),
        )
    console = output_console()
    console.print(shown)
    if values is not None:
        console.print(values_text(values), highlight=False)
    console.print(f"report: {output / 'report.html'}", highlight=False, soft_wrap=True)


def _sections(
    config: EvaluateConfig,
    model: ValueModel,
    prompts: Sequence[Sequence[int]],
    rows: list[Row],
    values: dict[str, Any] | None,
) -> list[Section]:
    """The parts of the report."""
    found = [
        Section(
            "What guidance brings",
            f"{rows[0].n} prompts, {config.samples} texts each where sampled. The base is "
            f"{config.base or 'the model itself, unguided'}. Intervals are 95 %, "
            "bootstrapped over prompts; differences are to the base at the same temperature, "
            "paired by prompt. KL is that to the base at temperature 1 without truncation, "
            "summed over a text, in nats (greedy: −log of the base's probability; of a best of N "
            "it is at most what is said, log N − (N − 1)/N more than that of one text).",
            _reward_chart(rows, config.reward) + _rows_table(rows, config.reward),
        )
    ]
    if values is not None:
        found.append(Section("Are the values right?", values_text(values), value_charts(values)))
    shown = min(config.texts, rows[0].n)
    if shown:
        found.append(
            Section(
                "Texts, coloured by advantage",
                "Blue: the token promises more than what the model would do on average there; "
                "red: less. Hover for Q, V and the probabilities.",
                _texts(model, prompts, rows, shown),
            )
        )
    log = read_log(Path(config.model) / "log.jsonl")
    return [*found, *learning_section(log), *watched_section(log)]


def _reward_chart(rows: list[Row], metric: str) -> str:
    series = []
    for temperature in dict.fromkeys(row.guidance.temperature for row in rows):
        group = [row for row in rows if row.guidance.temperature == temperature]
        group.sort(key=lambda row: (row.guidance.beta, row.guidance.kl_budget or 0.0))
        series.append(
            Series(
                "greedy" if temperature == 0 else f"T = {temperature:g}",
                [row.kl_per_sequence for row in group],
                [row.score.value for row in group],
                [row.score.ci95[0] for row in group],
                [row.score.ci95[1] for row in group],
                [_strength(row) for row in group],
            )
        )
    title, x_label = "Reward against distance from the base", "KL to the base per text, nats"
    return line_chart(series, title=title, x_label=x_label, y_label=metric, style="both")


def _strength(row: Row) -> str:
    if row.best_of > 1:
        return f"best of {row.best_of}"
    budget = row.guidance.kl_budget
    return f"β = {row.guidance.beta:g}" if budget is None else f"KL ≤ {budget:g} a token"


def _rows_table(rows: list[Row], metric: str) -> str:
    lines = []
    for row in rows:
        line = {
            "method": row.method.replace(" ", "\u00a0"),
            metric: (row.score.value, *row.score.ci95),
            f"Δ {metric}": (row.score.delta, *(row.score.delta_ci95 or ())),
            "KL": round(row.kl_per_sequence, 4),
            "tokens": row.tokens_mean,
            "cut": row.cut,
            "µs/token": None if row.s_per_token is None else 1e6 * row.s_per_token,
        }
        for name, estimate in row.metrics.items():
            line[name] = (estimate.value, *estimate.ci95)
            line[f"Δ {name}"] = (estimate.delta, *(estimate.delta_ci95 or ()))
        lines.append(line)
    return table(lines, best=dict.fromkeys((metric, *rows[0].metrics), "max"))


def _texts(model: ValueModel, prompts: Sequence[Sequence[int]], rows: list[Row], shown: int) -> str:
    """The first prompts: the base's text beside that of the best guided method."""
    columns = [rows[0]]
    guided = [row for row in rows if row.guidance.guides or row.best_of > 1]
    if guided:
        best = max(guided, key=lambda row: row.score.value)
        columns = [next(r for r in rows if r.method == best.baseline), best]
    tokens = [[_tokens(model, prompts[i], row.by_prompt()[i][0]) for row in columns]
              for i in range(shown)]  # fmt: skip
    sizes = sorted(abs(t.advantage or 0.0) for block in tokens for text in block for t in text)
    scale = sizes[math.ceil(0.95 * len(sizes)) - 1] or None  # one for all, to be compared
    blocks = []
    for i, block in enumerate(tokens):
        cells = []
        for row, text in zip(columns, block, strict=True):
            caption = f"{row.method}: {row.by_prompt()[i][0].score:.3g}"
            cells.append((caption, coloured_text(text, scale=scale, legend=i == shown - 1)))
        blocks.append(side_by_side(cells))
    return "".join(blocks)


def _tokens(model: ValueModel, prompt: Sequence[int], sample: Sample) -> list[TokenValue]:
    assert model.tokenizer is not None
    pieces = model.tokenizer.pieces([*prompt, *sample.written.tokens])
    found = [TokenValue(piece, 0.0, is_action=False) for piece in pieces[: len(prompt)]]
    for piece, r in zip(pieces[len(prompt) :], sample.written.reports, strict=True):
        base, guided = math.exp(r.base_logprob), math.exp(r.logprob)
        found.append(TokenValue(piece, r.advantage, r.q, r.v, base, guided))
    return found
