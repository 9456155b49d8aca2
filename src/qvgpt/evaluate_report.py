"""What `evaluate` shows: the table on the standard output, and the parts of report.html."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from qvgpt.compare import Row, Sample
from qvgpt.decode.searches import search_name
from qvgpt.models.value_model import ValueModel
from qvgpt.report import Section, Series, TokenValue, coloured_text, line_chart, table
from qvgpt.report_page import side_by_side
from qvgpt.run import output_console, read_log
from qvgpt.value_report import learning_section, value_charts, values_text, watched_section


@dataclass(frozen=True)
class Evaluation:
    """What was compared."""

    model_dir: str
    base: str | None
    """What wrote the texts of β = 0; None: the model."""
    metric: str
    samples: int
    """Texts per prompt, where they are sampled."""
    rows: list[Row]
    values: dict[str, Any] | None
    """Of `value_diagnostics`, where it was asked."""
    partial: list[str] = field(default_factory=list)
    """Which rewards are by models whose rewards the model learned from."""


def show(found: Evaluation, output: Path) -> None:
    """The table and what values are worth, on the standard output."""
    shown, rows = Table(), found.rows
    headings = ("method", found.metric, "difference", "KL", "tokens", "read/token", "µs/token")
    for heading in (*headings, *rows[0].metrics):
        shown.add_column(heading, overflow="fold")
    for row in rows:
        low, high = row.score.delta_ci95 or (math.nan, math.nan)
        shown.add_row(
            row.method,
            f"{row.score.value:.4g} [{row.score.ci95[0]:.4g}, {row.score.ci95[1]:.4g}]",
            f"{row.score.delta:+.4g} [{low:+.4g}, {high:+.4g}]",
            f"{row.kl_per_sequence:.3f}",
            f"{row.tokens_mean:.1f}",
            "–" if row.forward_tokens_per_token is None else f"{row.forward_tokens_per_token:.2f}",
            "–" if row.s_per_token is None else f"{1e6 * row.s_per_token:.0f}",
            *(f"{estimate.value:.4g}" for estimate in row.metrics.values()),
        )
    console = output_console()
    console.print(shown)
    if found.values is not None:
        console.print(values_text(found.values), highlight=False)
    console.print(f"report: {output / 'report.html'}", highlight=False, soft_wrap=True)


def sections(
    found: Evaluation, model: ValueModel, prompts: Sequence[Sequence[int]], texts: int
) -> list[Section]:
    """The parts of the report; of `texts` prompts the texts are shown."""
    rows, values = found.rows, found.values
    warning = "".join(
        f" {name} gave the rewards that the model learned from: its figures are no evidence."
        for name in found.partial
    )
    parts = [
        Section(
            "What guidance brings",
            f"{rows[0].n} prompts, {found.samples} texts each where sampled. The base is "
            f"{found.base or 'the model itself, unguided'}. Intervals are 95 %, "
            "bootstrapped over prompts; differences are to the base at the same temperature, "
            "paired by prompt. KL is that to the base at temperature 1 without truncation, "
            "summed over a text, in nats (greedy: −log of the base's probability; of a best of N "
            "it is at most what is said, log N − (N − 1)/N more than the mean of log π − log π₀ "
            "of its texts, and of a search that samples so much more for each choice; of other "
            f"searches −log of the base's probability).{warning}",
            _reward_chart(rows, found.metric) + _rows_table(rows, found.metric),
        )
    ]
    if values is not None:
        parts.append(Section("Are the values right?", values_text(values), value_charts(values)))
    shown = min(texts, rows[0].n)
    if shown:
        parts.append(
            Section(
                "Texts, coloured by advantage",
                "Blue: the token promises more than what the model would do on average there; "
                "red: less. Hover for Q, V and the probabilities.",
                _texts(model, prompts, rows, shown),
            )
        )
    log = read_log(Path(found.model_dir) / "log.jsonl")
    return [*parts, *learning_section(log), *watched_section(log)]


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
    if row.how.search is not None:
        return search_name(row.how.search)
    if row.how.best_of > 1:
        return f"best of {row.how.best_of}"
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
            "read/token": row.forward_tokens_per_token,
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
    guided = [row for row in rows if row.method != row.baseline]
    if guided:
        best = max(guided, key=lambda row: row.score.value)
        columns = [next(r for r in rows if r.method == best.baseline), best]
    tokens = [[_tokens(model, prompts[i], row.by_prompt()[i][0]) for row in columns]
              for i in range(shown)]  # fmt: skip
    acted = (t.advantage for block in tokens for text in block for t in text if t.is_action)
    sizes = sorted(abs(a) for a in acted if a is not None)
    # one for all, to be compared
    scale = sizes[math.ceil(0.95 * len(sizes)) - 1] or None if sizes else None
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
    found = [TokenValue(piece, is_action=False) for piece in pieces[: len(prompt)]]
    for piece, r in zip(pieces[len(prompt) :], sample.written.reports, strict=True):
        base, guided = math.exp(r.base_logprob), math.exp(r.logprob)
        found.append(TokenValue(piece, r.advantage, r.q, r.v, base, guided))
    return found
