"""Texts of a comparison, kept on disk until all of its methods have written theirs."""

import hashlib
import json
import shutil
from collections.abc import Iterable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qvgpt.decode.engine import Text
from qvgpt.decode.guide import Alternative, TokenReport
from qvgpt.run import write_json


class WrittenTexts:
    """A file a method in a folder; texts that others wrote than would now are not seen."""

    def __init__(self, folder: Path, sources: Iterable[Path]):
        """`sources` are files, and directories of models: what writes, and to which prompts. They
        are compared by size and time of change, for weights may be many GB; cards, hidden files
        and what lies beside `folder` say nothing of the texts."""
        self.folder = folder
        files = (
            inner
            for path in sources
            for inner in ([path] if path.is_file() else sorted(path.rglob("*")))
            if inner.is_file() and inner.name != "README.md" and not inner.name.startswith(".")
        )
        own = folder.parent.resolve()
        stats = [(str(f), f.stat()) for f in files if own not in f.resolve().parents]
        self._stamp = [version("qvgpt"), *([n, s.st_size, s.st_mtime_ns] for n, s in stats)]

    def find(self, method: str) -> list[Text] | None:
        """What the method wrote, with its KL; None where that is not there."""
        try:
            found = json.loads(self._file(method).read_text("utf-8"))
            if found["written_by"] != self._stamp:
                return None
            return [_text(**text) for text in found["texts"]]
        except (OSError, ValueError, LookupError, TypeError):  # cut off, or no file of ours
            return None

    def keep(self, method: str, texts: Iterable[Text]) -> None:
        """In one piece: a method's file is there whole or not at all."""
        self.folder.mkdir(exist_ok=True)
        kept = {"written_by": self._stamp, "texts": [asdict(text) for text in texts]}
        write_json(self._file(method), kept)

    def drop(self) -> None:
        """Where all have written."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, method: str) -> Path:
        return self.folder / f"{hashlib.sha256(method.encode()).hexdigest()[:16]}.json"


def _text(reports: list[dict[str, Any]], **rest: Any) -> Text:
    """A text as it was before `asdict`."""
    return Text(**rest, reports=[_report(**report) for report in reports])


def _report(alternatives: list[dict[str, Any]], **rest: Any) -> TokenReport:
    return TokenReport(**rest, alternatives=tuple(Alternative(**each) for each in alternatives))
