"""Texts of a comparison, kept on disk until all of its methods have written theirs."""

import hashlib
import json
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qvgpt.decode.engine import Text
from qvgpt.decode.guide import Alternative, TokenReport
from qvgpt.run import write_json


@dataclass(frozen=True)
class Sample:
    """One text that a method wrote."""

    prompt: int
    """Index of the prompt."""
    written: Text
    score: float


class WrittenTexts:
    """A file a method in a folder; texts written from other sources than now are not seen."""

    def __init__(self, folder: Path, sources: Iterable[Path]):
        """`sources` are files and directories of what writes and judges, compared by size and
        time of change: their weights may be many GB."""
        self.folder = folder
        files = (
            inner
            for path in sources
            for inner in ([path] if path.is_file() else sorted(path.rglob("*")))
        )
        stats = [(str(file), file.stat()) for file in files if file.is_file()]
        self._stamp = [[name, found.st_size, found.st_mtime_ns] for name, found in stats]

    def find(self, method: str) -> list[Sample] | None:
        """What the method wrote, with scores and KL; None where that is not there."""
        try:
            found = json.loads(self._file(method).read_text("utf-8"))
        except (OSError, ValueError):
            return None
        if not isinstance(found, dict) or found.get("sources") != self._stamp:
            return None
        return [_sample(**sample) for sample in found["samples"]]

    def keep(self, method: str, samples: Iterable[Sample]) -> None:
        """In one piece: a method's file is there whole or not at all."""
        self.folder.mkdir(exist_ok=True)
        kept = {"sources": self._stamp, "samples": [asdict(sample) for sample in samples]}
        write_json(self._file(method), kept)

    def drop(self) -> None:
        """Where all have written."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, method: str) -> Path:
        return self.folder / f"{hashlib.sha256(method.encode()).hexdigest()[:16]}.json"


def _sample(prompt: int, written: dict[str, Any], score: float) -> Sample:
    """A sample as it was before `asdict`."""
    reports = [
        TokenReport(**{**report, "alternatives": _alternatives(report["alternatives"])})
        for report in written["reports"]
    ]
    return Sample(prompt, Text(**{**written, "reports": reports}), score)


def _alternatives(found: list[dict[str, Any]]) -> tuple[Alternative, ...]:
    return tuple(Alternative(**each) for each in found)
