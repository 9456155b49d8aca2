"""One self-contained `report.html` out of plain numbers: charts, tables, coloured text.

`line_chart`, `table` and `coloured_text` return HTML fragments; `write_report` binds them into a
page that loads nothing from anywhere, follows the reader's light or dark mode and fits a phone.
Text handed in is escaped. What is no finite number (NaN, ±inf, None) becomes a gap.
"""

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from qvgpt.report_page import MARKERS, PAGE_HEAD, PAGE_TAIL, escape, write_page

Number = float | int | None
"""What a figure may hold; None (JSON's null) reads as NaN."""


@dataclass(frozen=True)
class Series:
    """One line or cloud of a chart: equally long sequences, in the order to be drawn."""

    name: str
    x: Sequence[Number]
    y: Sequence[Number]
    low: Sequence[Number] | None = None
    """Lower ends of the intervals: error bars on points, a band around a line."""
    high: Sequence[Number] | None = None
    labels: Sequence[str] | None = None
    """A text beside each point ("" for none), such as "β = 2"."""


@dataclass(frozen=True)
class TokenValue:
    """A token and what the values say of it; of a prompt token only `text` is shown."""

    text: str
    advantage: Number = math.nan
    q: Number = math.nan
    v: Number = math.nan
    base_prob: Number = math.nan
    guided_prob: Number = math.nan
    is_action: bool = True


@dataclass(frozen=True)
class Section:
    """A part of the page: `heading` and `paragraph` are text, `body_html` is trusted HTML."""

    heading: str
    paragraph: str = ""
    body_html: str = ""


def _float(value: object) -> float:
    """The number, or NaN for whatever cannot be drawn (beyond 1e300, differences overflow)."""
    return float(value) if isinstance(value, float | int) and abs(value) < 1e300 else math.nan


def _number(value: object, decimals: int | None = None) -> str:
    """A number for readers: 4 significant digits, or fixed `decimals`; "–" if not finite."""
    number = _float(value)
    if math.isnan(number):
        return "–"
    if decimals is None and (isinstance(value, int) or 1e4 <= abs(number) < 1e7):
        decimals = 0
    text = f"{number:.4g}" if decimals is None else f"{number:.{decimals}f}"
    return re.sub(r"^-(?=0(\.0*)?$)", "", text).replace("-", "−")


class _Point(NamedTuple):
    x: float
    y: float
    low: float
    high: float
    label: str


class _Frame(NamedTuple):
    """The axes: ticks in data units, the plot's edges in SVG units."""

    x_ticks: list[float]
    y_ticks: list[float]
    left: float
    top: float
    right: float
    bottom: float

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Where a point of the data lies in the SVG."""
        across = (x - self.x_ticks[0]) / (self.x_ticks[-1] - self.x_ticks[0])
        up = (y - self.y_ticks[0]) / (self.y_ticks[-1] - self.y_ticks[0])
        px = self.left + across * (self.right - self.left)
        return round(px, 1), round(self.bottom - up * (self.bottom - self.top), 1)

    def path(self, points: Iterable[tuple[float, float]]) -> str:
        return "M" + "L".join("{},{}".format(*self.at(x, y)) for x, y in points)


def _ticks(values: Iterable[float], count: int = 5) -> list[float]:
    """About `count` steps of 1, 2 or 5 × 10ⁿ whose first and last enclose the finite values."""
    finite = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    size = max(abs(low), abs(high))
    if high - low <= 1e-9 * size:  # one value, or rounding noise around it
        low, high = low - (0.1 * size or 1.0), high + (0.1 * size or 1.0)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next((m * power for m in (1, 2, 5) if m * power >= rough), 10 * power)
    return [i * step for i in range(math.floor(low / step), math.ceil(high / step) + 1)]


def _tick_labels(ticks: Sequence[float]) -> list[str]:
    """All labels of an axis with the same decimals and unit."""
    largest = max(map(abs, ticks))
    units = [(unit, scale) for unit, scale in (("M", 1e6), ("k", 1e3)) if largest >= 10 * scale]
    unit, scale = (units or [("", 1.0)])[0]
    decimals = -math.floor(math.log10((ticks[1] - ticks[0]) / scale) + 1e-9)
    if decimals > 5 or largest > 1e10:
        return [f"{tick:.1e}".replace("-", "−") for tick in ticks]
    return [_number(tick / scale, max(decimals, 0)) + unit for tick in ticks]


def _points(series: Series) -> list[_Point]:
    """The series row by row; ValueError where its columns differ in length."""
    empty = [None] * len(series.x)
    numbers = (series.x, series.y, series.low or empty, series.high or empty)
    rows = zip(*numbers, series.labels or [""] * len(series.x), strict=True)
    return [_Point(*map(_float, row[:4]), label=str(row[4])) for row in rows]


def _runs(points: Sequence[_Point], *fields: str) -> list[list[_Point]]:
    """Stretches of neighbours whose `fields` are all finite; what lies between is a gap."""

    def whole(point: _Point) -> bool:
        return all(math.isfinite(getattr(point, field)) for field in fields)

    return [list(run) for good, run in itertools.groupby(points, whole) if good]


def _draw_series(frame: _Frame, points: Sequence[_Point], style: str, marker: str) -> str:
    """Band or error bars first, so that they pass under line and markers."""
    parts = []
    for run in _runs(points, "x", "y", "low", "high"):
        if style == "line":
            edge = [(p.x, p.high) for p in run] + [(p.x, p.low) for p in reversed(run)]
            parts.append(f'<path class="band" d="{frame.path(edge)}Z"/>')
        for p in run if style != "line" else ():
            (x, low), (_, high) = frame.at(p.x, p.low), frame.at(p.x, p.high)
            caps = f"M{x - 4:.1f},{low}h8M{x - 4:.1f},{high}h8"
            parts.append(f'<path class="bar" d="M{x},{low}V{high}{caps}"/>')
    for run in _runs(points, "x", "y"):
        if style != "points":
            parts.append(f'<path class="line" d="{frame.path(p[:2] for p in run)}"/>')
        if style != "line" or len(run) == 1:  # a line of one point would not be seen
            spots = ("{},{}".format(*frame.at(p.x, p.y)) for p in run)
            parts += [
                f'<path class="mark" d="{marker}" transform="translate({s})"/>' for s in spots
            ]
    return "".join(parts)


def _draw_labels(frame: _Frame, points: Sequence[_Point], drop: int) -> str:
    """The points' own texts, `drop` units under them, inwards at the right edge."""
    parts = []
    for p in itertools.chain(*_runs(points, "x", "y")):
        x, y = frame.at(p.x, p.y)
        end, shift = (" end", -8) if x > frame.right - 70 else ("", 8)
        place = f'class="label{end}" x="{x + shift:.1f}" y="{y + drop:.1f}"'
        parts.append(f"<text {place}>{escape(p.label)}</text>" if p.label else "")
    return "".join(parts)


def _draw_hover(frame: _Frame, name: str, points: Sequence[_Point], axes: tuple[str, str]) -> str:
    """Invisible targets, larger than the markers, that carry the figures."""
    finite = list(itertools.chain(*_runs(points, "x", "y")))
    parts = []
    for p in finite[:: max(1, len(finite) // 100)]:  # more could not be told apart
        x, y = frame.at(p.x, p.y)
        interval = f" [{_number(p.low)}, {_number(p.high)}]" if p.low <= p.high else ""
        head = " · ".join(filter(None, (name, p.label)))
        text = f"{head}\n{axes[0]}: {_number(p.x)}\n{axes[1]}: {_number(p.y)}{interval}"
        title = f"<title>{escape(text)}</title>"
        parts.append(f'<circle class="hit" cx="{x}" cy="{y}" r="9">{title}</circle>')
    return "".join(parts)


def _draw_axes(frame: _Frame, x_label: str, y_label: str) -> str:
    """Grid, tick labels and names; y's name lies flat on top, where it can be read."""
    grid, texts = [], []
    for tick, label in zip(frame.y_ticks, _tick_labels(frame.y_ticks), strict=True):
        _, y = frame.at(frame.x_ticks[0], tick)
        grid.append(f"M{frame.left},{y}H{frame.right}")
        texts.append(f'<text x="{frame.left - 8}" y="{y}" dy=".35em" class="end">{label}</text>')
    for tick, label in zip(frame.x_ticks, _tick_labels(frame.x_ticks), strict=True):
        x, _ = frame.at(tick, frame.y_ticks[0])
        grid.append(f"M{x},{frame.top}V{frame.bottom}")
        texts.append(f'<text x="{x}" y="{frame.bottom + 8}" dy=".9em" class="mid">{label}</text>')
    middle, below = (frame.left + frame.right) / 2, frame.bottom + 48
    return (
        f'<path class="grid" d="{"".join(grid)}"/>{"".join(texts)}'
        f'<path class="axis" d="M{frame.left},{frame.bottom}H{frame.right}"/>'
        f'<text class="name" x="4" y="16">{escape(y_label)}</text>'
        f'<text class="name mid" x="{middle}" y="{below}">{escape(x_label)}</text>'
    )


def _colour(index: int) -> str:
    return f"--c:var(--c{index % 7})"


def _legend(names: Sequence[str], style: str, diagonal: bool) -> str:
    line, entries = '<path class="line" d="M1,7H25"/>', []
    for index, name in enumerate(names):
        mark = f'<path class="mark" d="{MARKERS[index % 4]}" transform="translate(13,7)"/>'
        swatch = line * (style != "points") + mark * (style != "line")
        entries.append((_colour(index), swatch, escape(name)))
    if diagonal:
        entries.append(("", '<path class="diagonal" d="M1,7H25"/>', "y = x"))
    return "".join(
        f'<span><svg viewBox="0 0 26 14" style="{colour}">{swatch}</svg>{name}</span>'
        for colour, swatch, name in entries
    )


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    style: Literal["line", "points", "both"] = "line",
    diagonal: bool = False,
    wide: bool = False,
) -> str:
    """An SVG figure of the series on common axes, with legend, grid and hover texts.

    Intervals become bands under `style="line"` and error bars otherwise. With `diagonal` both axes
    share one range and y = x is drawn: for calibration, predicted against actual. `wide` is for
    many series.
    """
    data = [_points(one) for one in series]
    drawn = [p for points in data for run in _runs(points, "x", "y") for p in run]
    xs, ys = [p.x for p in drawn], [y for p in drawn for y in (p.y, p.low, p.high)]
    x_ticks, y_ticks = (_ticks(xs + ys),) * 2 if diagonal else (_ticks(xs, 6), _ticks(ys))
    width, height = (470, 430) if diagonal else (1200, 640) if wide else (600, 370)
    frame = _Frame(x_ticks, y_ticks, 62, 32, width - 20, height - 60)
    parts = [_draw_axes(frame, x_label, y_label)]
    if diagonal:
        ends = ((x_ticks[0], x_ticks[0]), (x_ticks[-1], x_ticks[-1]))
        parts.append(f'<path class="diagonal" d="{frame.path(ends)}"/>')
    for index, points in enumerate(data):
        drawing = _draw_series(frame, points, style, MARKERS[index % 4])
        parts.append(f'<g style="{_colour(index)}">{drawing}</g>')
    for index, points in enumerate(data):  # above all series; alternating, as curves run close
        parts.append(_draw_labels(frame, points, drop=17 if index % 2 else -8))
    for one, points in zip(series, data, strict=True):
        parts.append(_draw_hover(frame, one.name, points, (x_label, y_label)))
    if not drawn:
        parts.append(f'<text x="{width / 2}" y="{height / 2}" class="mid">no data</text>')
    legend = _legend([one.name for one in series], style, diagonal)
    return (
        f'<figure class="chart{" wide" * wide}"><figcaption>{escape(title)}</figcaption>'
        f'<div class="legend">{legend}</div>'
        f'<svg viewBox="0 0 {width} {height}" style="max-width:{width}px" role="img" '
        f'aria-label="{escape(title)}">'
        f"{''.join(parts)}</svg></figure>"
    )


def _numbers(cell: object) -> list[float]:
    """The one number of a cell, or the two or three of an interval; empty for anything else."""
    values = cell if isinstance(cell, tuple | list) and len(cell) in (2, 3) else [cell]
    plain = all(isinstance(v, float | int | None) and not isinstance(v, bool) for v in values)
    return [_float(value) for value in values] if plain and cell is not None else []


def _column_decimals(cells: Sequence[object]) -> int | None:
    """Decimals that line a column up: 3 to 4 digits for its largest number, less shared zeros.

    None, each cell for itself: beyond a range of 1 : 1000 that would hide the small ones.
    """
    numbers = [n for cell in cells for n in _numbers(cell) if math.isfinite(n)]
    sizes = [abs(number) for number in numbers if number] or [0.0]
    largest = max(sizes)
    if not 1e-4 <= largest < 1e7 or all(isinstance(cell, int | None) for cell in cells):
        return None
    if largest > 1000 * min(sizes):
        return None
    decimals = max(0, (3 if largest >= 1 else 2) - math.floor(math.log10(largest)))
    while decimals and all(round(n, decimals) == round(n, decimals - 1) for n in numbers):
        decimals -= 1
    return decimals


def _cell(cell: object, decimals: int | None) -> str:
    numbers = _numbers(cell)
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if len(numbers) > 1:
        *value, low, high = (_number(number, decimals) for number in numbers)
        return " ".join([*value, f"[{low}, {high}]"])
    return _number(cell, decimals) if numbers or cell is None else escape(cell)


def table(
    rows: Sequence[Mapping[str, object]],
    columns: Sequence[str] | Mapping[str, str] | None = None,
    *,
    best: Mapping[str, Literal["max", "min"]] | None = None,
) -> str:
    """A table of the rows, numbers right-aligned to 3 to 4 significant digits.

    A cell (value, low, high) reads "0.81 [0.79, 0.83]", (low, high) just the brackets. `columns`
    gives the order, or key → heading; by default every key in order of appearance. `best` names
    columns whose largest or smallest value is set in bold.
    """
    keys = columns or list(dict.fromkeys(key for row in rows for key in row))
    headings = keys if isinstance(keys, Mapping) else {key: key for key in keys}
    head, body = [], [[] for _ in rows]
    for key, heading in headings.items():
        cells = [row.get(key) for row in rows]
        decimals = _column_decimals(cells)
        kind = ' class="end"' if all(c is None or _numbers(c) for c in cells) else ""
        head.append(f'<th scope="col"{kind}>{escape(heading)}</th>')
        choose = {"max": max, "min": min}.get((best or {}).get(key, ""))
        values = [(_numbers(cell) or [math.nan])[0] for cell in cells]
        winner = choose(filter(math.isfinite, values), default=None) if choose else None
        for line, cell, value in zip(body, cells, values, strict=True):
            text = _cell(cell, decimals)
            line.append(f"<td{kind}>{f'<b>{text}</b>' if value == winner else text}</td>")
    lines = "".join(f"<tr>{''.join(line)}</tr>" for line in body)
    return (
        f'<div class="table"><table><thead><tr>{"".join(head)}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div>"
    )


def _token(token: TokenValue, scale: float) -> str:
    """One token as a span; a newline shows as ↵ and breaks the line, an empty token as ∅."""
    text = escape(token.text).replace("\n", "<i>↵</i>\n") or "<i>∅</i>"
    if not token.is_action:
        return f'<span class="prompt">{text}</span>'
    advantage = _float(token.advantage)
    share = 0.0 if math.isnan(advantage) else max(-1.0, min(1.0, advantage / scale))
    sign = "+" if advantage > 0 else ""
    lines = (
        f"A = {sign}{_number(advantage)}",
        f"Q = {_number(token.q)}, V = {_number(token.v)}",
        f"p = {_number(token.base_prob)} base, {_number(token.guided_prob)} guided",
    )
    colour = f'class="token {"good" if share >= 0 else "bad"}" style="--a:{abs(share):.2f}"'
    return f'<span {colour} tabindex="0" title="{"&#10;".join(lines)}">{text}</span>'


def coloured_text(
    tokens: Sequence[TokenValue], *, scale: Number = None, legend: bool = True
) -> str:
    """The text, each action token on a ground of its advantage: blue good, red bad, neutral at 0.

    Full colour is reached at `scale`, by default the 95th percentile of |A|; give one to texts that
    are to be compared. Prompt tokens are grey; hovering or tapping a token shows its figures.
    """
    sizes = (abs(_float(token.advantage)) for token in tokens if token.is_action)
    sizes = sorted(filter(math.isfinite, sizes)) or [0.0]
    # Where nearly all advantages are 0, the percentile is too: then the largest sets the scale.
    full = float(scale or sizes[math.ceil(0.95 * len(sizes)) - 1] or sizes[-1] or 1.0)
    spans = "".join(_token(token, full) for token in tokens)
    key = (
        f'<div class="key"><span>A ≤ −{_number(full)}</span><span class="ramp"></span>'
        f"<span>A ≥ +{_number(full)}</span></div>"
    )
    return f'<div class="text"><p dir="auto">{spans}</p>{key if legend else ""}</div>'


def write_report(path: str | Path, title: str, sections: Sequence[Section]) -> Path:
    """Writes the page, whole or not at all, and returns its path."""
    parts = [f"{PAGE_HEAD}<title>{escape(title)}</title></head><body><h1>{escape(title)}</h1>\n"]
    for section in sections:
        parts.append(f"<section><h2>{escape(section.heading)}</h2>\n")
        lead = re.split(r"\n\s*\n", section.paragraph.strip())
        parts += [f'<p class="lead">{escape(text)}</p>\n' for text in lead if text]
        parts.append(f'<div class="body">{section.body_html}</div></section>\n')
    return write_page(path, "".join([*parts, PAGE_TAIL]))
