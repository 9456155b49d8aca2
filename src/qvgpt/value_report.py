"""What a report says of values: how right they are, and how they came to be so in training."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from qvgpt.report import Section, Series, line_chart, table

_CURVE_POINTS = 200
_NO_LOSS = ("step", "grad_norm", "tokens_per_second")
_POSITION = "tenth of the text's decisions"
_ROWS = {
    "slope": "slope of return on V (1 is right; below: V is spread too far)",
    "intercept": "intercept of return on V (0 is right)",
    "ece": "expected calibration error of V",
    "rank": "rank correlation of V with the return to come, all decisions",
    "q_rank": "rank correlation of Q of the token taken with it, all decisions",
    "rank_across": "rank correlation across prompts: V at the prompt, mean return",
    "rank_within": "rank correlation within prompts: return foretold half-way, return",
    "advantage_rank": "rank correlation of A with what V did not foretell, all decisions",
    "advantage_within": "rank correlation within prompts: sum of A, return",
    "td_error": "mean TD error",
    "td_error_abs": "mean size of the TD error",
    "overestimation": "best Q among likely tokens, over Q of the token taken",
    "overestimation_return": "best Q among likely tokens, over the return that came",
    "overestimation_any": "best Q among all tokens, over Q of the token taken",
    "v_abs": "mean |V|",
    "v_spread": "spread of V",
    "q_abs": "mean |Q|",
    "q_spread": "spread of Q",
    "advantage_abs": "mean |A|",
    "advantage_spread": "spread of A",
    "advantage_to_logits": "spread of A among likely tokens, in spreads of log π",
    "expectile_gap": "V over mean Q of the tokens taken",
    "twin_gap": "disagreement of the Q heads",
    "out_of_reach": "out of reach of all returns (more than 1 is far)",
}
_CURVES = {
    "Rank correlations": ("rank", "rank_across", "rank_within", "advantage_within"),
    "Calibration": ("slope", "ece"),
    "Sizes": ("v_abs", "q_abs", "advantage_abs", "td_error_abs"),
    "Overestimation and gaps": (
        "overestimation",
        "overestimation_return",
        "overestimation_any",
        "expectile_gap",
        "twin_gap",
    ),
    "Out of reach of all returns": ("out_of_reach",),
}


def values_text(values: Mapping[str, Any]) -> str:
    """What `value_diagnostics` found, in a paragraph."""

    def number(x: float | None) -> str:
        return "undefined" if x is None else f"{x:.3f}".replace("-", "−")

    within = values["within_prompt"]["total_middle"]
    return (
        f"On {values['texts']} texts of the base. Rank correlation with the return: Q "
        f"{number(values['q']['spearman'])}, V {number(values['v']['spearman'])}; of the advantage "
        f"with what V did not foretell: {number(values['advantage']['spearman'])}; among the "
        f"samples of one prompt, half-way through: {number(within['mean'])} "
        f"({within['groups']} prompts). Only the last two say what guidance can use."
    )


def value_charts(values: Mapping[str, Any]) -> str:
    """What `value_diagnostics` found: reliability, TD errors by position, all figures."""
    series = []
    for name, key in (("V at the prompt", "v_at_prompt"), ("V", "v"), ("Q of tokens", "q")):
        if points := values[key]["calibration"]:
            x, y = ([p[which] for p in points] for which in ("predicted", "actual"))
            series.append(Series(name, x, y))
    by_position = values["td_error"]
    at = [p["position"] + 1 for p in by_position]
    errors = [
        Series(name, at, [p[key] for p in by_position])
        for name, key in (("size", "abs"), ("mean", "mean"))
    ]
    return _reliability(series) + _td_chart(errors) + _figures_table(values["figures"])


def learning_section(log: Sequence[Mapping[str, Any]]) -> list[Section]:
    """Learning curves of the lines of a `log.jsonl`; empty where there are none."""
    curves = _learning_curves(log)
    return [Section("Learning curves", "As logged in training.", curves)] if curves else []


def watched_section(log: Sequence[Mapping[str, Any]]) -> list[Section]:
    """The values on held-out texts while training; empty where nobody looked at them."""
    lines = [line for line in log if any(key.startswith("values/") for key in line)]
    if not lines:
        return []
    said = (
        f"On the evaluation texts; the table is of step {lines[-1]['step']}. Calibration is "
        "against the policy that wrote the texts: methods that seek better than its mean (ILQL, "
        "DoubleQ) rightly predict more than came."
    )
    if max(line.get("values/diverging", 0) for line in lines) >= 3:
        said += " The values diverged: they lay far outside all returns that there are."
    return [Section("Values while training", said, _watched_charts(lines))]


def _watched_charts(lines: Sequence[Mapping[str, Any]]) -> str:
    """The first and the last evaluation's curves, then every figure over the steps."""
    ends = {line["step"]: line for line in (lines[0], lines[-1])}
    reliability, errors = [], []
    for step, line in ends.items():
        tenths = range(sum(key.startswith("values/reliability/") for key in line) // 2)
        v, came = ([line[f"values/reliability/{k}/{x}"] for k in tenths] for x in ("v", "return"))
        reliability.append(Series(f"V at step {step}", v, came))
        at = [k for k in range(10) if f"values/td/{k}/abs" in line]
        for name in ("abs", "mean"):
            found = [line[f"values/td/{k}/{name}"] for k in at]
            what = "size" if name == "abs" else "mean"
            errors.append(Series(f"{what} at step {step}", [k + 1 for k in at], found))
    charts = [_reliability(reliability), _td_chart(errors)]
    steps = [line["step"] for line in lines]
    for title, names in _CURVES.items():
        columns = {name: [line.get(f"values/{name}") for line in lines] for name in names}
        series = [Series(name, steps, y) for name, y in columns.items() if any(map(_known, y))]
        if series:
            charts.append(line_chart(series, title=title, x_label="step", y_label="", style="both"))
    last = {k.removeprefix("values/"): x for k, x in lines[-1].items() if k.startswith("values/")}
    return "".join([*charts, _figures_table(last)])


def _known(x: float | None) -> bool:
    return x is not None


def _reliability(series: Sequence[Series]) -> str:
    return line_chart(
        series,
        title="Calibration, by tenths of the predictions",
        x_label="predicted return",
        y_label="actual return",
        style="both",
        diagonal=True,
    )


def _td_chart(series: Sequence[Series]) -> str:
    title, y_label = "TD error by position in the text", "r + γ V′ − Q"
    return line_chart(series, title=title, x_label=_POSITION, y_label=y_label, style="both")


def _figures_table(figures: Mapping[str, float]) -> str:
    found = {text: figures[name] for name, text in _ROWS.items() if name in figures}
    return table([{"figure": text, "value": value} for text, value in found.items()])


def _learning_curves(log: Sequence[Mapping[str, Any]]) -> str:
    """One chart for each loss part that was evaluated, else for each that was logged."""
    names = dict.fromkeys(name for line in log for name in line if name not in _NO_LOSS)
    names = [name for name in names if not name.startswith("values/")]
    tested = [n.removeprefix("eval/") for n in names if n.startswith("eval/")]
    charts = []
    for name in tested or names:
        series = []
        for label, key in (("training", name), ("evaluation", f"eval/{name}")):
            points = [(line["step"], line[key]) for line in log if key in line]
            size = max(1, len(points) // _CURVE_POINTS)
            means = [
                [fmean(column) for column in zip(*points[i : i + size], strict=True)]
                for i in range(0, len(points), size)
            ]
            if means:
                series.append(Series(label, [m[0] for m in means], [m[1] for m in means]))
        charts.append(line_chart(series, title=name, x_label="step", y_label="loss"))
    return "".join(charts)
