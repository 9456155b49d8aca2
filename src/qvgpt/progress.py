"""What a long run shows and logs: a bar on a terminal, lines elsewhere, JSONL always."""

import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_QUIET_SECONDS = 20.0  # between lines where there is no terminal to draw a bar on


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
