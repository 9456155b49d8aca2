"""What a run leaves and shows: its directory, its summary, its progress and its log.

A directory belongs to one run, named in its `run.json`; another one is refused there. Progress is
a bar on a terminal and lines elsewhere; `log.jsonl` is written always.
"""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from qvgpt.errors import QvgptError

_QUIET_SECONDS = 20.0  # between lines where there is no terminal to draw a bar on


def open_run(
    output: str | Path, command: str, config: Mapping[str, Any], resume: bool = False
) -> Path:
    """Claim `output` for a run of `command` with this (JSON-ready) configuration.

    Raises `QvgptError`, and touches nothing, where the directory holds anything else: another
    run, a run of another configuration, or the same run while `resume` is off.
    """
    path = Path(output)
    if path.exists() and not path.is_dir():
        raise QvgptError(f"{path}: a directory was expected, not a file")
    record = json.loads(json.dumps({"command": command, "config": config}))
    run_file = path / "run.json"
    if run_file.exists():
        found = json.loads(run_file.read_text())
        if not resume:
            raise QvgptError(
                f"{path}: holds another run already; choose another output, or continue it "
                "with --resume true"
            )
        changed = _differences(found, record)
        if changed:
            raise QvgptError(
                f"{path}: holds a run with other settings ({', '.join(changed)}); "
                "choose another output"
            )
        return path
    if path.is_dir() and any(path.iterdir()):
        raise QvgptError(f"{path}: is not empty and holds no run; choose another output")
    path.mkdir(parents=True, exist_ok=True)
    write_json(run_file, record)
    return path


def write_json(path: Path, content: Any) -> None:
    """Write JSON in one piece: a reader sees the old file or the new one."""
    staged = path.with_name(f".{path.name}.staged")
    staged.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    os.replace(staged, path)


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    if found.get("command") != wanted["command"]:
        return [f"command {found.get('command')!r}"]
    old, new = found.get("config", {}), wanted["config"]
    return [k for k in {**old, **new} if k != "resume" and old.get(k) != new.get(k)]


class RunProgress:
    """A progress bar with loss parts, tokens/s and time left, and `log.jsonl` in `output`."""

    def __init__(
        self,
        total: int,
        done: int,
        output: Path | None,
        tensorboard: bool = False,
        console: Console | None = None,
    ):
        self.console = console or Console(stderr=True)
        self.total, self.last_line = total, time.monotonic()
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[losses]}"),
            TextColumn("{task.fields[rate]:,.0f} tok/s"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.task = self.bar.add_task("train", total=total, completed=done, losses="", rate=0.0)
        self.file = None
        self.writer: Any = None
        if output is not None:
            output.mkdir(parents=True, exist_ok=True)
            self.file = (output / "log.jsonl").open("a")
            if tensorboard:
                from torch.utils.tensorboard import SummaryWriter

                self.writer = SummaryWriter(output / "tensorboard")

    def __enter__(self) -> "RunProgress":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()
        if self.file is not None:
            self.file.close()
        if self.writer is not None:
            self.writer.close()

    def step(self, step: int, parts: dict[str, float], rate: float) -> None:
        """One optimizer step is done."""
        losses = "  ".join(f"{k} {v:.4g}" for k, v in parts.items() if k != "grad_norm")
        self.bar.update(self.task, completed=step, losses=losses, rate=rate)
        self.log(step, {**parts, "tokens_per_second": round(rate, 1)})
        now = time.monotonic()
        if not self.console.is_terminal and now - self.last_line > _QUIET_SECONDS:
            self.last_line = now
            self.console.print(f"step {step}/{self.total}  {losses}  {rate:,.0f} tok/s")

    def log(self, step: int, values: dict[str, float], show: bool = False) -> None:
        """Append to log.jsonl (and TensorBoard); `show` prints it too."""
        if show:
            text = "  ".join(f"{k} {v:.4g}" for k, v in values.items())
            self.console.print(f"step {step}/{self.total}  {text}")
        if self.file is not None:
            self.file.write(json.dumps({"step": step, **values}) + "\n")
            self.file.flush()
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The entries of a `log.jsonl`, training and evaluation alike; empty where there is none."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line]
