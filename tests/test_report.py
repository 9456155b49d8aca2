"""report.py: what it writes parses, escapes, survives gaps and loads nothing."""

import math
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qvgpt.report import (
    Section,
    Series,
    TokenValue,
    _ticks,
    coloured_text,
    line_chart,
    table,
    write_report,
)

NAN, INF = math.nan, math.inf
EVIL = "<script>alert('x')</script> & \"y\""
AXES = {"title": "t", "x_label": "x", "y_label": "y"}
numbers = st.one_of(st.none(), st.integers(-(10**20), 10**20), st.floats())


class Balance(HTMLParser):
    """Fails on a tag closed out of turn; keeps the tags, their attributes and the text."""

    VOID = frozenset({"meta", "br", "link", "img"})

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], {}, ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for key, value in attrs:
            self.attributes.setdefault(key, []).append(value)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def parse(page: str) -> Balance:
    parser = Balance()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return parser


def svg_paths(figure: str, kind: str) -> list[str]:
    plot = ElementTree.fromstring(figure).findall("svg")[0]
    return [path.get("d", "") for path in plot.iter("path") if path.get("class") == kind]


def sample_page(path: Path) -> str:
    chart = line_chart(
        [Series("a", [0, 1, 2], [1.0, 2.0, 1.5], labels=["", "β = 1", EVIL])], **AXES
    )
    text = coloured_text([TokenValue("你好\n", 0.1, 0.6, 0.5, 0.2, 0.3)])
    sections = [
        Section("A & B", "One.\n\nTwo <three>.", table([{"m": EVIL, "n": 1}]) + chart),
        Section("Text", body_html=text),
    ]
    return write_report(path, EVIL, sections).read_text(encoding="utf-8")


def test_page_is_well_formed_and_loads_nothing(tmp_path):
    page = sample_page(tmp_path / "new" / "report.html")
    parsed = parse(page)
    assert page.startswith("<!DOCTYPE html>")
    assert parsed.tags.count("script") == 1  # the page's own
    assert "http://" not in page
    assert "https://" not in page
    assert not {"link", "img", "iframe", "object"} & set(parsed.tags)
    assert not {"src", "href", "srcset"} & set(parsed.attributes)
    assert "url(" not in page
    assert "@import" not in page
    assert "Two <three>." in parsed.text
    assert page.count('<p class="lead">') == 2


def test_report_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    before = sample_page(path)
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        write_report(path, "new", [])
    assert path.read_text(encoding="utf-8") == before
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


@given(st.lists(numbers, min_size=1, max_size=6))
def test_ticks_cover_the_data(values):
    finite = [float(v) for v in values if v is not None and abs(v) < 1e300] or [0.0]
    ticks = _ticks(finite)
    assert 2 <= len(ticks) <= 9
    tolerance = 1e-9 * (ticks[-1] - ticks[0])
    assert ticks[0] <= min(finite) + tolerance
    assert ticks[-1] >= max(finite) - tolerance
    assert ticks == sorted(set(ticks))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 1], [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        ([3, 97], [0, 20, 40, 60, 80, 100]),
        ([-4, 5], [-4, -2, 0, 2, 4, 6]),
        ([NAN, INF], [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
    ],
)
def test_ticks_are_round_numbers(values, expected):
    assert _ticks(map(float, values)) == pytest.approx(expected)


@given(
    st.lists(st.tuples(numbers, numbers, numbers, numbers), max_size=5),
    st.sampled_from(["line", "points", "both"]),
    st.booleans(),
)
def test_any_data_give_a_well_formed_chart(rows, style, diagonal):
    columns = [[row[i] for row in rows] for i in range(4)]
    series = [Series("s", *columns, labels=["label"] * len(rows)), Series("empty", [], [])]
    figure = line_chart(series, style=style, diagonal=diagonal, **AXES)
    ElementTree.fromstring(figure)
    parse(figure)
    assert not re.search(r"\b(nan|inf)\b", figure)


def test_a_chart_without_data_says_so():
    assert "no data" in line_chart([], **AXES)
    assert "no data" in line_chart([Series("s", [1, 2], [NAN, None])], **AXES)
    assert "no data" not in line_chart([Series("s", [1], [2])], **AXES)


def test_what_is_not_finite_becomes_a_gap():
    series = Series("s", [0, 1, 2, 3, 4, 5], [1, 2, NAN, 2, INF, 3])
    lines = svg_paths(line_chart([series], **AXES), "line")
    assert [line.count("L") for line in lines] == [1, 0, 0]  # 0-1, and two lone points
    assert len(svg_paths(line_chart([series], **AXES), "mark")) == 2  # that show as marks


def test_intervals_are_bands_on_lines_and_bars_on_points():
    series = Series("s", [0, 1, 2], [1, 2, 3], low=[0, 1, NAN], high=[2, 3, 4])
    line, points = line_chart([series], **AXES), line_chart([series], style="points", **AXES)
    assert (len(svg_paths(line, "band")), len(svg_paths(line, "bar"))) == (1, 0)
    assert (len(svg_paths(points, "band")), len(svg_paths(points, "bar"))) == (0, 2)
    assert len(svg_paths(points, "mark")) == 3
    assert "y: 1 [0, 2]" in points


def test_the_diagonal_runs_from_corner_to_corner():
    series = Series("s", [0.1, 0.9], [0.2, 0.7])
    figure = line_chart([series], diagonal=True, **AXES)
    (diagonal,) = svg_paths(figure, "diagonal")
    (x0, y0), (x1, y1) = (map(float, p.split(",")) for p in diagonal[1:].split("L"))
    assert x1 - x0 > 300
    assert y0 - y1 > 300
    assert "y = x" in figure
    assert "y = x" not in line_chart([series], **AXES)


def test_series_of_unequal_columns_are_refused():
    with pytest.raises(ValueError):
        line_chart([Series("s", [1, 2], [1])], **AXES)


def test_names_and_tokens_are_escaped():
    chart = line_chart(
        [Series(EVIL, [1], [1], labels=[EVIL])], title=EVIL, x_label=EVIL, y_label=EVIL
    )
    fragments = (
        chart,
        table([{EVIL: EVIL}]),
        coloured_text([TokenValue(EVIL, 1.0), TokenValue(EVIL, is_action=False)]),
    )
    for fragment in fragments:
        assert "<script" not in fragment
        assert EVIL in parse(fragment).text


def test_tokens_survive_what_no_page_may_hold(tmp_path):
    tokens = [
        TokenValue("\x00\x1b\ud800\ufffe"),
        TokenValue(""),
        TokenValue("\n\n"),
        TokenValue("你"),
    ]
    path = write_report(tmp_path / "r.html", "t", [Section("s", "\ud800", coloured_text(tokens))])
    parsed = parse(path.read_text(encoding="utf-8"))
    assert "\ufffd" * 4 + "∅↵\n↵\n你" in parsed.text


def test_colour_follows_the_advantage():
    small = [TokenValue("s", 0.0)] * 90
    large = [TokenValue("g", 2.0), TokenValue("h", 1.0), TokenValue("b", -2.0)] * 4
    page = coloured_text(
        [*small, *large, TokenValue("n", NAN), TokenValue("p", 9.0, is_action=False)]
    )
    spans = {text: attrs for attrs, text in re.findall(r"<span ([^>]*)>(\w)</span>", page)}
    assert 'class="token good" style="--a:1.00"' in spans["g"]  # 2 is the 95th percentile of |A|
    assert 'class="token good" style="--a:0.50"' in spans["h"]
    assert 'class="token bad" style="--a:1.00"' in spans["b"]
    assert "--a:0.00" in spans["s"]
    assert "--a:0.00" in spans["n"]
    assert spans["p"] == 'class="prompt"'


def test_the_scale_holds_for_outliers_zeros_and_by_request():
    outlier = coloured_text([TokenValue("a", 0.5)] * 99 + [TokenValue("z", 100.0)])
    assert "A ≥ +0.5<" in outlier
    assert "A ≥ +3<" in coloured_text([TokenValue("a", 0.0)] * 99 + [TokenValue("z", 3.0)])
    assert "A ≥ +1<" in coloured_text([TokenValue("a", 0.0)])
    assert "--a:0.25" in coloured_text([TokenValue("a", 0.5)], scale=2)
    assert 'class="key"' not in coloured_text([], legend=False)


def test_hover_shows_the_figures_of_a_token():
    page = coloured_text([TokenValue("a", -0.25, 0.5, 0.75, 0.125, None)])
    (title,) = parse(page).attributes["title"]
    assert title == "A = −0.25\nQ = 0.5, V = 0.75\np = 0.125 base, – guided"


def cells(page: str) -> list[str]:
    return re.findall(r"<td[^>]*>(.*?)</td>", page)


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        ([(0.81, 0.79, 0.83)], ["0.81 [0.79, 0.83]"]),
        ([(0.8123, 0.79, 0.83), (-0.1, NAN, 0)], ["0.812 [0.790, 0.830]", "−0.100 [–, 0.000]"]),
        ([(104.21, 103.9, 104.5)], ["104.2 [103.9, 104.5]"]),
        ([[0.1, 0.2]], ["[0.1, 0.2]"]),
        ([0.5, 1.0, 2, None], ["0.5", "1.0", "2.0", "–"]),
        ([12.8349, 0.4121, NAN], ["12.83", "0.41", "–"]),
        ([0.00112, 0.0089], ["0.00112", "0.00890"]),
        ([3e-7, 0.5, 123456.7], ["3e−07", "0.5", "123457"]),
        ([100000, 7, None], ["100000", "7", "–"]),
        ([True, False], ["yes", "no"]),
        (["a", 1.5, None], ["a", "1.5", "–"]),
        ([-0.0, 0.0], ["0", "0"]),
    ],
)
def test_table_cells(column, expected):
    assert cells(table([{"c": value} for value in column])) == expected


@given(st.lists(st.one_of(numbers, st.text(), st.booleans(), st.tuples(numbers, numbers, numbers))))
def test_any_cells_give_a_well_formed_table(column):
    page = table([{"c": value} for value in column], best={"c": "max"})
    ElementTree.fromstring(page)
    assert len(cells(page.replace("\n", " "))) == len(column)


def test_columns_choose_order_and_headings_and_the_best_is_bold():
    rows = [{"a": "x", "b": 1, "c": (2.0, 1.0, 3.0)}, {"b": 3, "a": "y"}, {"b": 3, "c": NAN}]
    assert re.findall(r"<th [^>]*>(.*?)</th>", table(rows)) == ["a", "b", "c"]
    page = table(rows, {"c": "C", "b": "B"}, best={"b": "max", "c": "min"})
    assert re.findall(r"<th [^>]*>(.*?)</th>", page) == ["C", "B"]
    assert cells(page) == ["<b>2 [1, 3]</b>", "1", "–", "<b>3</b>", "–", "<b>3</b>"]
    assert '<td class="end"><b>3</b>' in page
    parse(table([]))


def test_a_chart_of_many_series_takes_a_whole_row():
    plain, wide = (line_chart([Series("a", [0.0], [1.0])], **AXES, wide=w) for w in (False, True))
    assert 'class="chart"' in plain
    assert 'class="chart wide"' in wide
    assert 'viewBox="0 0 1200 640"' in wide
