"""The server's page against the real server, as Chromium shows it."""

import re
import threading

import pytest
from lens_rows import EVIL
from served import BYTES, scripted, serving
from test_page import card, figures_of, percent, rgb, shown

from qvgpt.decode.policy import Guidance
from qvgpt.models.value_model import ValueModel
from qvgpt.serve.service import Service


@pytest.fixture(scope="module")
def server(folder):
    model = ValueModel.from_pretrained(folder / "model")
    with serving(Service(model, "tiny", guidance=Guidance(beta=2.0, min_p=0.01))) as running:
        yield running


@pytest.fixture
def open_page(visit):
    """The page of a server, once it knows the model."""

    def open_it(server, **options):
        page = visit(server.url, **options)
        page.locator("#name:not(:empty)").wait_for()
        return page

    return open_it


def write(page, prompt="a", seed=3, length: int | str = 12):
    page.fill("#prompt", prompt)
    page.fill("#length", str(length))
    page.fill("#seed", str(seed))
    page.click("#go")
    page.locator("#go:enabled").wait_for()


def texts(page):
    """What stands in the panes, special tokens left out."""
    panes = page.locator(".pane .text").all()
    return ["".join(p.locator(".token:not(.special)").all_text_contents()) for p in panes]


# ── what is written ──────────────────────────────────────────────────────────────────────────


def test_both_answers_are_those_of_the_interface(server, open_page):
    page = open_page(server)
    assert page.locator("#name").inner_text() == "tiny"
    assert page.input_value("#beta") == "2"  # what the model recommends
    page.fill("#beta", "8")
    write(page, length=30)
    signs = set()
    for pane, beta in zip(page.locator(".pane").all(), (0, 8), strict=True):
        guidance = {"beta": beta, "temperature": 1, "min_p": 0.01}
        asked = {"prompt": "a", "max_tokens": 30, "seed": 3, "values": 5, "guidance": guidance}
        [choice] = server.post(**asked).json()["choices"]
        spans = pane.locator(".token:not(.special)").all_text_contents()
        assert "".join(spans) == choice["text"]
        by_span = pane.locator(".token").all()
        records = choice["values"]
        for span in by_span:
            taken = 1 if "special" in span.get_attribute("class") else None
            size = taken or len(span.text_content().encode())
            some, records = records[:size], records[size:]
            advantage = sum(r["advantage"] for r in some)
            red, _, blue, _ = rgb(span)
            assert (blue > red) == (advantage >= 0)
            signs.add(advantage >= 0)
        assert records == []
    assert signs == {True, False}
    names = page.locator(".pane h3:not([hidden])").all_inner_texts()
    assert names == ["base (β = 0)", "guided (β = 8)"]


def test_hover_and_focus_show_what_the_interface_says(server, open_page):
    page = open_page(server)
    write(page)
    guidance = {"beta": 2, "temperature": 1, "min_p": 0.01}
    asked = {"prompt": "a", "max_tokens": 12, "seed": 3, "values": 5, "guidance": guidance}
    records = server.post(**asked).json()["choices"][0]["values"]
    last = page.locator(".pane").nth(1).locator(".token").last
    last.hover()
    figures, rows = card(page)
    assert figures == figures_of(records[-1])
    for row, other in zip(rows, records[-1]["alternatives"], strict=True):
        chances = percent(other["base_logprob"]), percent(other["logprob"])
        assert row[1:] == [shown(other["q"]), *chances]
    page.mouse.move(1, 1)
    assert page.locator(".card").is_hidden()
    last.focus()
    assert card(page)[0] == figures


def test_tokens_appear_while_the_text_is_written_and_stop_keeps_them(visit, monkeypatch):
    """The engine waits before the guided text's seventh token until the first ones were seen."""
    seen = threading.Event()
    monkeypatch.setattr("qvgpt.serve.worker.PAUSE", 0.0)
    monkeypatch.setattr("qvgpt.serve.worker._PIECES_PER_SECOND", 1e9)

    def wait(read):
        if read[3:9] == BYTES.encode("你好"):
            assert seen.wait(20)

    with serving(scripted("你好 more and more", wait)) as server:
        page = visit(server.url)
        page.fill("#prompt", "a")
        page.locator("#prompt").press("Control+Enter")
        guided = page.locator(".pane").nth(1)
        guided.locator(".token").nth(1).wait_for()
        assert texts(page)[1] == "你好"
        assert page.locator("#status").inner_text() == "writing …"
        assert page.locator("#go").is_disabled()
        page.click("#stop")
        page.locator("#go:enabled").wait_for()
        assert page.locator("#status").inner_text() == "stopped"
        assert texts(page)[1] == "你好"
        seen.set()
        page.click("#go")
        page.locator("#status", has_text="done").wait_for()
        assert texts(page)[1] == "你好 more and more"


def test_a_dialogue_goes_on_with_the_guided_answer(server, open_page):
    page = open_page(server)
    asked = []
    page.route("**/v1/chat/*", lambda r: (asked.append(r.request.post_data_json), r.continue_())[1])
    page.check("[value=chat]")
    write(page, "a")
    guided = texts(page)[1]
    assert guided
    write(page, EVIL)
    said = page.locator(".said").all_text_contents()
    assert said == ["You " + EVIL, "You a"]  # the newest first
    assert page.locator("img").count() == 0
    assert [m["content"] for m in asked[2]["messages"]] == ["a", guided, EVIL]
    assert asked[2]["messages"] == asked[3]["messages"]
    page.click("#anew")
    assert page.locator(".pane").count() == 0


def test_a_given_text_is_judged(server, open_page):
    page = open_page(server)
    page.check("[value=judge]")
    page.fill("#completion", "好 no")
    write_nothing = {"prompt": "a", "completion": "好 no", "ended": True, "alternatives": 5}
    page.fill("#prompt", "a")
    page.click("#go")
    page.locator(".pane .token.special").wait_for()
    assert page.locator(".pane .token").all_text_contents() == ["好", " ", "n", "o", "<eos>"]
    records = server.post("/v1/values", **write_nothing, guidance={"beta": 2, "min_p": 0.01})
    page.locator(".pane .token").nth(3).hover()
    assert card(page)[0] == figures_of(records.json()["values"][5])


def test_a_budget_of_kl_in_the_place_of_beta(server, open_page):
    page = open_page(server)
    asked = []
    page.route("**/v1/comp*", lambda r: (asked.append(r.request.post_data_json), r.continue_())[1])
    page.check("#limited")
    assert page.locator("#beta").is_disabled()
    page.fill("#budget", "0.25")
    write(page)
    base, guided = (body["guidance"] for body in asked)
    assert guided["kl_budget"] == 0.25
    assert "beta" not in guided
    assert base["beta"] == 0
    assert "kl_budget" not in base
    assert base["top_k"] == guided["top_k"] == 40
    assert (
        page.locator(".pane h3:not([hidden])").nth(1).inner_text() == "guided (KL ≤ 0.25 a token)"
    )
    page.uncheck("#limited")
    page.locator("#beta-slide").fill("0")
    assert page.input_value("#beta") == "0"
    page.locator("#beta-slide").fill("60")
    assert page.input_value("#beta") == "10"


def test_in_chinese_and_in_the_dark(server, open_page):
    page = open_page(server, locale="zh-CN", color_scheme="dark")
    assert page.locator("html").get_attribute("lang") == "zh-CN"
    assert page.locator("#go").inner_text() == "生成（Ctrl+Enter）"
    assert sum(rgb(page.locator("body"))[:3]) < 120
    write(page, "你好，世界")
    assert page.locator("#status").inner_text() == "完成"
    english = re.compile(r"[a-z]{4,}")
    for place in ("form", ".key", ".figures >> nth=0", "figcaption >> nth=0", ".lead"):
        said = page.locator(place).inner_text().replace("Ctrl+Enter", "")
        assert not english.search(said), said
    page.click("#language")
    assert page.locator("#go").inner_text() == "Write (Ctrl+Enter)"
    assert page.locator(".pane h3:not([hidden])").first.inner_text() == "base (β = 0)"


def test_every_word_is_in_both_languages(server, open_page):
    page = open_page(server)
    assert page.evaluate(
        "Object.keys(WORDS.en).sort().join() === Object.keys(WORDS.zh).sort().join()"
    )


# ── what goes wrong ──────────────────────────────────────────────────────────────────────────


def refused(pages, status):
    """Forget that the browser noted an answer of this status."""
    kept = [text for text in pages.said if f"status of {status}" not in text]
    assert len(kept) < len(pages.said)
    pages.said[:] = kept


def test_the_key_is_asked_for_and_kept_in_the_page_alone(server, visit, pages):
    keys = []

    def locked(route):
        keys.append(route.request.headers.get("authorization"))
        if keys[-1] == "Bearer secret":
            return route.continue_()
        body = '{"error": {"message": "a key is needed"}}'
        return route.fulfill(status=401, body=body, content_type="application/json")

    page = visit("about:blank")
    page.route("**/v1/**", locked)
    page.goto(server.url)
    page.locator("#key:focus").wait_for()
    assert "asks for a key" in page.locator("#fault").inner_text()
    page.keyboard.type("secret")
    page.keyboard.press("Tab")
    page.locator("#name:not(:empty)").wait_for()
    assert page.locator("#key").is_hidden()
    write(page)
    assert texts(page)[1]
    assert keys == [None] + ["Bearer secret"] * 3
    stored = "() => [localStorage.length, sessionStorage.length, document.cookie]"
    assert page.evaluate(stored) == [0, 0, ""]
    refused(pages, 401)


def test_a_locked_server_is_opened_by_the_browsers_own_question(folder, visit):
    model = ValueModel.from_pretrained(folder / "model")
    with serving(Service(model, "tiny"), key="secret", hosts=None) as server:
        page = visit(server.url, http_credentials={"username": "me", "password": "secret"})
        page.locator("#name:not(:empty)").wait_for()
        write(page)
        assert page.locator(".pane .token").count() > 1


def test_errors_are_said(server, open_page, pages):
    page = open_page(server)
    page.route(
        "**/v1/completions",
        lambda route: route.fulfill(status=429, headers={"Retry-After": "7"}, body="{}"),
    )
    write(page)
    busy = "The server is busy: try again in 7 s."
    assert page.locator(".pane .error").all_inner_texts() == [busy, busy]
    refused(pages, 429)
    page.unroute_all()
    write(page, length="")  # what fits
    assert page.locator(".pane .token").count() > 0
    write(page, length=100000)
    assert "400: " in page.locator(".pane .error").first.inner_text()
    refused(pages, 400)
    page.route("**/v1/completions", lambda route: route.abort())
    write(page)
    assert page.locator(".pane .error").first.inner_text() == "The server cannot be reached."
    pages.said[:] = [text for text in pages.said if "net::ERR_FAILED" not in text]
    broken = 'data: {"choices": [{"index": 0, "text": "ab"}]}\n\n'
    fault = broken + 'data: {"error": {"message": "out of <b>luck</b>"}}\n\n'
    for body, said in ((broken, "The answer broke off."), (fault, "out of <b>luck</b>")):
        page.unroute_all()
        sent = {"status": 200, "body": body, "content_type": "text/event-stream"}
        page.route("**/v1/completions", lambda route, _, sent=sent: route.fulfill(**sent))
        write(page)
        assert page.locator(".pane .error").first.inner_text() == said
        assert page.locator(".pane .text").first.text_content() == "ab"


def test_a_model_without_values_has_one_pane(folder, visit):
    model = ValueModel.from_pretrained(folder / "model")
    model.heads = None
    with serving(Service(model, "plain")) as server:
        page = visit(server.url)
        page.locator("#name", has_text="plain").wait_for()
        assert page.locator("#beta").is_hidden()
        write(page)
        assert page.locator(".pane").count() == 1
        assert page.locator(".pane .token").count() > 1
        assert page.locator(".pane .good, .pane .bad").count() == 0
        assert page.locator(".key").is_hidden()
