"""The page that `qvgpt lens` writes, as Chromium shows it from a file."""

import json
import re

import pytest
from lens_rows import EVIL, ROWS

from qvgpt.cli import main
from qvgpt.lens.page import LensText, lens_page
from qvgpt.models.value_model import ValueModel

FIGURES = ["q", "v", "advantage", "base", "guided"]


@pytest.fixture(scope="session")
def written(folder):
    """The page of all rows."""
    page = folder / "page.html"
    words = [str(folder / "model"), "--data", str(folder / "rows.jsonl"), "--output", str(page)]
    assert main(["lens", *words, "--beta", "3"]) == 0
    return page


@pytest.fixture(scope="session")
def texts(written):
    """The records in the page."""
    return data_of(written)["texts"]


def data_of(page):
    return json.loads(re.search(r'id="lens-data">(.*?)</script>', page.read_text("utf-8"))[1])


def actions(text):
    return [record for record in text["tokens"] if "q" in record]


def shown(x, sign=False):
    """A number as the page writes it: four significant digits."""
    text = f"{float(f'{x:.4g}'):.10f}".rstrip("0").rstrip(".")
    text = "0" if text in ("-0", "") else text
    return (("+" if sign and x > 0 and text != "0" else "") + text).replace("-", "−")


def percent(logprob):
    p = 100 * 2.718281828459045**logprob
    if p < 0.01:
        return "< 0.01 %"
    return f"{p:.0f} %" if p >= 99.95 else f"{p:.{2 if p < 10 else 1}f} %"


def card(page):
    """What the card says: its figures by name, then the rows of its table."""
    page.locator(".card").wait_for()
    figures = page.locator(".card dd").all_inner_texts()
    rows = page.locator(".card tbody tr").all()
    return figures, [row.locator("td").all_inner_texts() for row in rows]


def figures_of(record):
    numbers = [shown(record["q"]), shown(record["v"]), shown(record["advantage"], True)]
    return [*numbers, percent(record["base_logprob"]), percent(record["logprob"])]


def rgb(element):
    colour = element.evaluate("e => getComputedStyle(e).backgroundColor")
    return [float(x) for x in re.findall(r"[\d.]+", colour)]


# ── what is shown ────────────────────────────────────────────────────────────────────────────


def test_texts_are_whole_and_nothing_in_them_runs(visit, written):
    page = visit(f"file://{written}")
    completions = [t for row in ROWS for t in row.get("completions", [row.get("completion")])]
    for text, wanted in zip(page.locator(".text").all(), completions, strict=True):
        plain = text.locator(".token:not(.special)").all_text_contents()
        assert "".join(plain) == wanted
        assert text.locator(".token").last.text_content() == "<eos>"
    assert page.locator(".prompt:not(.special)").last.text_content() == EVIL
    assert page.locator("img, main script, iframe").count() == 0
    assert page.evaluate("window.hacked") is None
    assert page.locator(".lens h3").nth(1).text_content() == "rows.jsonl:2"


def test_a_character_is_one_span_that_lists_its_tokens(visit, written, texts):
    page = visit(f"file://{written}")
    pieces = page.locator(".text").nth(2).locator(".token").all_text_contents()
    assert pieces == ["好", " ", "e\u0301", " ", "👩‍👧", "\n", "<eos>"]
    page.locator(".token", has_text="好").first.hover()
    figures, rows = card(page)
    assert figures == []
    found = [[row[0], *row[1:]] for row in rows]
    spelled = zip(["E5", "A5", "BD"], actions(texts[0])[:3], strict=True)
    assert found == [[byte, *figures_of(record)] for byte, record in spelled]


def test_colours_follow_the_sign_of_the_advantage(visit, written, texts):
    page = visit(f"file://{written}")
    seen = set()
    for element, record in zip(
        page.locator(".text").nth(1).locator(".token").all(), actions(texts[1]), strict=True
    ):
        red, _, blue, alpha = rgb(element)
        sign = record["advantage"] >= 0
        seen.add(sign)
        assert (blue > red) == sign
        full = float(
            page.locator(".lens").first.evaluate("e => e.style.getPropertyValue('--scale')")
        )
        assert alpha == pytest.approx(min(1, abs(record["advantage"]) / full) * 0.68, abs=0.01)
    good = page.locator(".token", has_text="好").first
    assert "good" in good.get_attribute("class")
    assert False in seen  # "no" is worse than what the model would do


def test_hover_and_keyboard_show_the_records(visit, written, texts):
    page = visit(f"file://{written}")
    records = actions(texts[1])
    tokens = page.locator(".text").nth(1).locator(".token")
    tokens.nth(1).hover()
    figures, rows = card(page)
    assert figures == figures_of(records[1])
    for row, other in zip(rows, records[1]["alternatives"], strict=True):
        chances = percent(other["base_logprob"]), percent(other["logprob"])
        assert row[1:] == [shown(other["q"]), *chances]
    page.mouse.move(500, 2)
    page.locator("#language").focus()
    assert page.locator(".card").is_hidden()
    for _ in range(3):  # first text, its table, second text: one stop of Tab each
        page.keyboard.press("Tab")
    assert card(page)[0] == figures_of(records[0])
    described = tokens.nth(0).get_attribute("aria-describedby")
    assert page.locator(f"#{described}").is_visible()
    for key, place in {"ArrowRight": 1, "End": len(records) - 1, "ArrowLeft": 1, "Home": 0}.items():
        page.keyboard.press(key)
        if key == "ArrowLeft":
            place = len(records) - 2
        assert tokens.nth(place).evaluate("e => e === document.activeElement"), key
        assert card(page)[0] == figures_of(records[place])
    page.keyboard.press("Escape")
    assert page.locator(".card").is_hidden()
    page.keyboard.press("Enter")
    assert page.locator(".card").is_visible()


def test_lines_are_gone_through_by_up_and_down(visit, written):
    page = visit(f"file://{written}")
    page.set_viewport_size({"width": 420, "height": 800})
    tokens = page.locator(".text").nth(3).locator(".token")
    tokens.first.focus()
    top = "e => e.getClientRects()[0].top"
    before = page.locator(":focus").evaluate(top)
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowUp")
    assert page.locator(":focus").evaluate(top) > before
    page.keyboard.press("ArrowUp")
    assert page.locator(":focus").evaluate(top) == before


def test_the_curve_and_the_tokens_are_linked(visit, written, texts):
    page = visit(f"file://{written}")
    lens = page.locator(".lens").nth(1)
    assert lens.locator(".dot").count() == len(actions(texts[1]))
    heights = [
        float(y) for y in lens.locator(".dot").evaluate_all("d => d.map(e => e.getAttribute('cy'))")
    ]
    q = [record["q"] for record in actions(texts[1])]
    assert sorted(range(len(q)), key=lambda i: -q[i]) == sorted(
        range(len(q)), key=lambda i: heights[i]
    )
    lens.locator(".token").nth(2).hover()
    at = lens.locator(".dot").nth(2).get_attribute("cx")
    assert lens.locator(".cursor").get_attribute("x1") == at
    box = lens.locator(".plot").bounding_box()
    page.mouse.move(
        box["x"] + float(lens.locator(".dot").nth(1).get_attribute("cx")), box["y"] + 40
    )
    assert "at" in lens.locator(".token").nth(1).get_attribute("class")
    assert card(page)[0] == figures_of(actions(texts[1])[1])
    assert lens.locator(".line.returns").count() == 1
    assert texts[0]["returns"] == [1.0] * 4
    assert texts[3]["reward"] == 0.0


def test_the_table_says_the_same(visit, written, texts):
    page = visit(f"file://{written}")
    lens = page.locator(".lens").nth(1)
    assert lens.locator("table").count() == 0
    lens.locator("summary").press("Enter")
    lens.locator("details tbody tr").first.wait_for()
    rows = lens.locator("details tbody tr").all()
    for row, record in zip(rows, actions(texts[1]), strict=True):
        assert row.locator("td").all_inner_texts()[1:6] == figures_of(record)


# ── how it is shown ──────────────────────────────────────────────────────────────────────────


def luminance(colour):
    linear = [
        c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4
        for c in (x / 255 for x in colour)
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_token_is_legible(visit, written, scheme):
    """Contrast of 4.5 or more (WCAG AA) on the ground as it is blended."""
    page = visit(f"file://{written}", color_scheme=scheme)
    ground = rgb(page.locator("body"))[:3]
    assert (luminance(ground) > 0.5) == (scheme == "light")
    read = "all => all.map((e) => [getComputedStyle(e).backgroundColor, getComputedStyle(e).color])"
    worst = 21.0
    for colours in page.locator(".token").evaluate_all(read):
        back, ink = ([float(x) for x in re.findall(r"[\d.]+", colour)] for colour in colours)
        *colour, alpha = [*back, 1.0][:4]
        blended = [alpha * c + (1 - alpha) * g for c, g in zip(colour, ground, strict=True)]
        lights = sorted([luminance(blended), luminance(ink[:3])])
        worst = min(worst, (lights[1] + 0.05) / (lights[0] + 0.05))
    assert worst >= 4.5


def test_chinese(visit, written):
    page = visit(f"file://{written}", locale="zh-CN")
    assert page.locator("html").get_attribute("lang") == "zh-CN"
    assert page.locator("h1").inner_text() == "模型看重什么"
    assert "个词元" in page.locator(".figures").first.inner_text()
    page.locator("#language").click()
    assert page.locator("html").get_attribute("lang") == "en"
    assert "tokens" in page.locator(".figures").first.inner_text()
    page.locator(".token").first.hover()
    assert "tokens that share a character" in page.locator(".card strong").inner_text()


def test_tokens_are_put_together_to_characters(visit, written):
    """Texts cut into tokens anywhere: spans say the text, and none begins within a character."""
    page = visit(f"file://{written}")
    found = page.evaluate(
        """() => {
          const texts = ["né 你好", "e\\u0301x", "👩‍👩‍👧🇩🇪!", "a\\r\\nb", "क्षि த", "\\ufeffx"];
          let seed = 7;
          const random = () => (seed = (seed * 16807) % 2147483647) / 2147483647;
          const faults = [];
          for (const text of texts) for (let round = 0; round < 40; round++) {
            const bytes = [...new TextEncoder().encode(text)];
            const records = [];
            while (bytes.length) {
              const some = bytes.splice(0, 1 + Math.floor(random() * 4));
              records.push({token: "\\ufffd", bytes: some});
            }
            const spans = Lens.spans(records);
            const said = spans.map((s) => s.text).join("");
            const begins = new Set(Array.from(new Intl.Segmenter().segment(text), (s) => s.index));
            let [at, from] = [0, 0];
            for (const span of spans) {
              if (!begins.has(at) || span.from !== from) faults.push([text, round, span]);
              at += span.text.length;
              from = span.to;
            }
            if (said !== text || from !== records.length) faults.push([text, round, said]);
          }
          return faults;
        }"""
    )
    assert found == []
    half = [{"token": "a", "bytes": [97]}, {"token": "\ufffd", "bytes": [0xE5, 0xA5]}]
    spans = "records => [Lens.spans(records, false), Lens.spans(records, true)]"
    waiting, broken = page.evaluate(spans, half)
    assert [s["text"] for s in waiting] == ["a"]
    assert [s["text"] for s in broken] == ["a", "\ufffd"]
    end = [{"token": "<eos>", "bytes": []}, {"token": "<eos>", "bytes": list(b"<eos>")}]
    special, plain = page.evaluate("records => Lens.spans(records)", end)
    assert (special.get("special"), plain.get("special")) == (True, None)


# ── the command ──────────────────────────────────────────────────────────────────────────────


def test_lens_of_one_text(folder, tmp_path, capsys):
    output, model = tmp_path / "a" / "one.html", str(folder / "model")
    assert main(["lens", model, "--text", "好", "--output", str(output)]) == 0
    printed = capsys.readouterr()
    assert "tokens  4" in printed.out
    assert "beta 2" in printed.err  # what the model recommends
    pair = ["--prompt", "a", "--completion", "no", "--contrast", model, model, "--beta", "1"]
    assert main(["lens", model, *pair, "--output", str(output)]) == 0
    page = output.read_text("utf-8")
    assert "log π₊ − log π₋" in page
    assert "no" in re.search("<noscript>(.*?)</noscript>", page, re.S)[1]
    assert data_of(output)["texts"][0]["returns"] is None


@pytest.mark.parametrize(
    ("changes", "returns"),
    [
        ({}, [[2.0, 2.0, 3.0, 2.0], [-1.0] * 3]),
        ({"gamma": 0.5}, [[0.0, 0.0, 2.0, 2.0], [-0.25, -0.5, -1.0]]),
        ({"centred": True}, [None, None]),
    ],
)
def test_returns_are_drawn_as_the_values_count_them(folder, tmp_path, changes, returns):
    model = ValueModel.from_pretrained(folder / "model")
    for name, value in changes.items():
        setattr(model.info, name, value)
    model.save(tmp_path / "model")
    rewarded = {"prompt": "a", "completion": "abc", "token_rewards": [0.0, -1.0, 1.0, 2.0]}
    rows = [rewarded, {"prompt": "a", "completion": "no", "reward": -1}, {"text": "ab"}]
    rows.append({"text": "ab", "label": 1})  # a class, as a reward model learns it
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [str(tmp_path / "model"), "--data", str(tmp_path / "rows.jsonl"), "--beta", "0"]
    output = tmp_path / "page.html"
    assert main(["lens", *words, "--output", str(output)]) == 0
    found = data_of(output)["texts"]
    assert [text["returns"] for text in found] == [*returns, None, None]
    assert [text["reward"] for text in found] == [2.0, -1.0, None, None]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("MODEL", "give --text, or --prompt and --completion, or --data"),
        ("MODEL --text a --data ROWS", "give --text, or --prompt and --completion, or --data"),
        ("MODEL --prompt a", "--completion: missing"),
        ("MODEL --completion a", "--prompt: missing"),
        ("MODEL --data ROWS --rows 0", "--rows: at least 1"),
        ("MODEL --text a --alternatives 21", "alternatives: from 0 to 20, not 21"),
        ("MODEL --text LONG", "1 of 1 texts are longer than the context of 200"),
        ("MODEL --text a --output ROWS", "holds something other than a lens page"),
        ("MODEL --text a --output FOLDER", "a directory; name a file"),
        ("PLAIN --text a", "has no values to show"),
    ],
)
def test_what_cannot_be_shown_is_said_in_one_line(folder, tmp_path, capsys, words, said):
    paths = {"MODEL": folder / "model", "ROWS": folder / "rows.jsonl", "LONG": "x" * 300}
    paths |= {"FOLDER": tmp_path, "PLAIN": tmp_path / "plain"}
    if "PLAIN" in words:
        model = ValueModel.from_pretrained(folder / "model")
        model.heads = None
        model.save(tmp_path / "plain")
    given = ["--output", str(tmp_path / "x.html")] if "--output" not in words else []
    assert main(["lens", *(str(paths.get(w, w)) for w in words.split()), *given]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("qvgpt: error: ")
    assert said in error
    assert not (tmp_path / "x.html").exists()


def test_a_page_in_the_place_of_one_before(folder, tmp_path):
    output = tmp_path / "lens.html"
    words = ["lens", str(folder / "model"), "--text", "好", "--output", str(output)]
    assert [main(words), main(words)] == [0, 0]
    output.write_text("my thesis")
    assert main(words) == 2
    assert output.read_text() == "my thesis"


def test_values_of_turns_are_refused(folder, tmp_path, capsys):
    model = ValueModel.from_pretrained(folder / "model")
    model.info.level = "turn"
    model.save(tmp_path / "turns")
    assert main(["lens", str(tmp_path / "turns"), "--text", "a", "--beta", "0"]) == 2
    assert "of whole turns and say nothing of a token" in capsys.readouterr().err


def test_the_page_holds_what_it_is_given():
    tokens = [{"token": EVIL, "bytes": list(EVIL.encode())}]
    page = lens_page([LensText(tokens, title=EVIL)], EVIL, "{{script}}")
    data = json.loads(re.search(r'id="lens-data">(.*?)</script>', page)[1])
    assert data["texts"][0]["title"] == EVIL
    assert data["texts"][0]["tokens"] == tokens
    assert page.count("<script") == 2
    assert page.count("<img") == 0


def test_characters_of_several_tokens_are_whole_without_the_script():
    first, last = list("你".encode()[:2]), list("你".encode()[2:])
    split = [{"token": "�", "bytes": first}, {"token": "�", "bytes": last}]
    page = lens_page([LensText([*split, {"token": "<eos>", "bytes": []}], title="t")])
    assert "<pre>t\n你&lt;eos&gt;</pre>" in page
