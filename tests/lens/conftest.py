"""A small model that learned that 好 is good and "no" is not, and Debian's Chromium."""

import io
import json
import shutil

import pytest
import torch
from lens_rows import DIALOGUE, ROWS
from playwright.sync_api import sync_playwright
from rich.console import Console

from qvgpt.data.rows import load_trajectories
from qvgpt.data.tokenizer import Tokenizer
from qvgpt.fit_options import FitOptions
from qvgpt.loop import fit
from qvgpt.models.gpt import GPT
from qvgpt.models.heads_config import HeadsConfig
from qvgpt.models.value_model import ValueModel
from qvgpt.objectives import parse_objectives


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """`model` and `rows.jsonl`: a byte is a token, so that every Chinese character is of three."""
    place = tmp_path_factory.mktemp("lens")
    talk = {"messages": DIALOGUE, "reward": 1.0}
    for name, rows in {"rows.jsonl": ROWS, "talk.jsonl": [talk]}.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (place / name).write_text("".join(lines), "utf-8")
    tokenizer = Tokenizer.train(["a"], "bpe", 261)
    texts, _ = load_trajectories([place / "rows.jsonl", place / "talk.jsonl"], tokenizer)
    torch.manual_seed(0)
    trunk = GPT(tokenizer.vocab_size, 32, 2, 1, seq_len=200)
    model = ValueModel(trunk, HeadsConfig("linear", num_q=1), tokenizer)
    options = FitOptions(epochs=1000.0, max_steps=60, batch_size=6, lr=1e-2, tau=0.2)
    quiet = Console(file=io.StringIO())
    fit(model, texts, parse_objectives(["LM", "MonteCarlo"]), options, console=quiet)
    model.info.recommended_guidance = {"beta": 2.0}
    model.save(place / "model")
    return place


@pytest.fixture(scope="module")  # its event loop would stand in the way of others'
def browser():
    """Chromium from the system."""
    program = shutil.which("chromium")
    if program is None:  # .ci/run sees to it that there is one
        pytest.skip("the pages are tested in Chromium, and there is none: apt-get install chromium")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield started
        started.close()


class Pages:
    """A page for each set of options, used again and again: to make one takes longer than to fill
    it. What pages say on their consoles is kept."""

    def __init__(self, browser):
        self.browser, self.pages, self.said = browser, {}, []

    def visit(self, url, **options):
        """The address in a page of these options, as if it were new."""
        if repr(options) not in self.pages:
            context = self.browser.new_context(viewport={"width": 1000, "height": 800}, **options)
            page = self.pages[repr(options)] = context.new_page()
            page.set_default_timeout(8000)
            page.on("console", lambda message: self.said.append(message.text))
            page.on("pageerror", lambda error: self.said.append(str(error)))
        page = self.pages[repr(options)]
        page.unroute_all()
        page.set_viewport_size({"width": 1000, "height": 800})
        page.mouse.move(0, 0)
        page.goto(url)
        return page


@pytest.fixture(scope="module")
def pages(browser):
    return Pages(browser)


@pytest.fixture
def visit(pages):
    """Opens pages, and fails where one said anything on its console or broke its policy."""
    pages.said.clear()
    yield pages.visit
    assert pages.said == []
