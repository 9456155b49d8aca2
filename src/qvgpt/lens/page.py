"""The lens as one HTML file that loads nothing: texts, their tokens' values, style and script.

The policy in the page names style and script by their hashes, so that no text in it can run or
restyle anything, whatever it holds.
"""

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from qvgpt.lens.records import Record
from qvgpt.report_page import PALETTE, escape

SCRIPTS = ("words.js", "lens.js", "curve.js")
"""What every page with a lens runs first, in this order."""
MARK = b'id="lens-data"'
"""What only pages of ours hold."""


@dataclass(frozen=True)
class LensText:
    """A text of the page."""

    tokens: Sequence[Record]
    """As `read_texts` gives them."""
    title: str = ""
    reward: float | None = None
    """What the text earned, where that is known."""
    returns: Sequence[float] | None = None
    """What came after each decision, to be compared with its V."""
    end_value: float | None = None
    """V where the text stops without being over."""


def lens_page(texts: Sequence[LensText], title: str = "", about: str = "") -> str:
    """The page, by default with a title in the reader's language. All texts are escaped."""
    script = "".join(resource(name) for name in (*SCRIPTS, "standalone.js"))
    style = stylesheet()
    data = {"texts": [_text(text) for text in texts]}
    plain = "".join(f"<pre>{escape(_plain(text))}</pre>" for text in texts)
    parts = {
        "title": escape(title),
        "tab": escape(title or "qvgpt lens"),
        "about": escape(about),
        "plain": plain,
        "style": style,
        "style_hash": _hash(style),
        "data": _json(data),
        "script": script,
        "script_hash": _hash(script),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda m: parts[m[1]], resource("lens.html"))


def site() -> dict[str, tuple[str, str]]:
    """The server's page and what it loads: path → content and its type.

    Nothing in it is inline: a policy may forbid that.
    """
    scripts = (*SCRIPTS, "server_words.js", "server.js")
    return {
        "/": (resource("server.html"), "text/html; charset=utf-8"),
        "/lens.css": (stylesheet(), "text/css; charset=utf-8"),
        **{f"/{s}": (resource(s), "text/javascript; charset=utf-8") for s in scripts},
    }


def resource(name: str) -> str:
    """A file of this package."""
    return (files("qvgpt.lens") / name).read_text("utf-8")


def stylesheet() -> str:
    """The style of all pages with a lens; its colours are those of the reports."""
    return PALETTE + resource("lens.css")


def _text(text: LensText) -> dict[str, Any]:
    return {
        "title": text.title,
        "reward": text.reward,
        "returns": None if text.returns is None else list(text.returns),
        "endValue": text.end_value,
        "tokens": list(text.tokens),
    }


def _plain(text: LensText) -> str:
    """Characters may be spread over tokens; special ones have a name and no bytes."""
    spelled = (bytes(record["bytes"]) or record["token"].encode() for record in text.tokens)
    return f"{text.title}\n{b''.join(spelled).decode(errors='replace')}"


def _json(data: Any) -> str:
    """JSON that ends no script element, whatever its strings hold."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def _hash(text: str) -> str:
    """As a content security policy names a style or script."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
