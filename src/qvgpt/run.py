"""What a run leaves and shows: its directory, its summary, its progress and its log.

A directory belongs to one run, named in its `run.json`; another one is refused there. Progress is
a bar on a terminal and lines elsewhere; `log.jsonl` is written always.
"""

import fcntl
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from qvgpt.errors import QvgptError, Terminated
from qvgpt.models.disk import writing

_LOCK = ".lock"
_QUIET_SECONDS = 20.0  # between lines where there is no terminal to draw a bar on


def open_run(
    output: str | Path,
    command: str,
    config: Any,
    resume: bool = False,
    accept_changes: bool = False,
) -> Path:
    """Claim `output` for a run of `command` with this configuration, a dataclass or a mapping.

    Raises `QvgptError`, and touches nothing, where the directory holds anything else: another
    run, the same run while `resume` is off, or a run of another configuration; with
    `accept_changes` that one takes the new configuration.
    """
    path = Path(output)
    if check_run(output, command, config, resume, accept_changes) and not accept_changes:
        return path
    path.mkdir(parents=True, exist_ok=True)
    write_json(path / "run.json", {"command": command, "config": _plain(config)})
    return path


def check_run(
    output: str | Path,
    command: str,
    config: Any,
    resume: bool = False,
    accept_changes: bool = False,
) -> bool:
    """What `open_run` would refuse, said before any work is done; True where a run goes on."""
    path = Path(output)
    if path.exists() and not path.is_dir():
        raise QvgptError(f"{path}: a directory was expected, not a file")
    if not (path / "run.json").exists():
        # a run killed before its first step leaves no more than these
        if path.is_dir() and {p.name for p in path.iterdir()} - {_LOCK, ".run.json.staged"}:
            raise QvgptError(f"{path}: is not empty and holds no run; choose another output")
        return False
    if not resume:
        ways = ", or continue it with --resume true" if "resume" in _items(config) else ""
        raise QvgptError(f"{path}: holds another run already; choose another output{ways}")
    changed = changed_settings(path, command, config)
    if changed and ("command" in changed or not accept_changes):
        known = "accept_changes" in _items(config)
        ways = ", or accept them with --accept_changes true" if known else ""
        raise QvgptError(
            f"{path}: holds a run with other settings ({', '.join(changed.values())}); "
            f"choose another output{ways}"
        )
    return True


def settings_of(path: Path, command: str) -> dict[str, Any]:
    """The configuration that a run of `command` there was begun with; empty where none is."""
    try:
        found = json.loads((path / "run.json").read_text("utf-8"))
        known = found["config"] if found["command"] == command else {}
    except (OSError, ValueError, LookupError, TypeError):  # `check_run` says what is wrong there
        return {}
    return known if isinstance(known, dict) else {}


def changed_settings(path: Path, command: str, config: Any) -> dict[str, str]:
    """Which settings a run was not begun with, each as `fit.lr 0.001 → 0.01`.

    A setting that did not exist yet was at its default.
    """
    try:
        found = json.loads((path / "run.json").read_text("utf-8"))
    except ValueError:
        raise QvgptError(f"{path / 'run.json'}: broken JSON; choose another output") from None
    old, new = flatten(found), flatten({"command": command, "config": _plain(config)})
    parts = {key.rpartition(".")[0] for key in old}
    for key, default in flatten(_plain(_defaults(config)), "config.").items():
        if key.rpartition(".")[0] in parts:  # else that part of the settings was not there
            old.setdefault(key, default)
    names = {key: key.removeprefix("config.") for key in {**old, **new}}
    return {
        name: f"{name} {old.get(key)!r} → {new.get(key)!r}"
        for key, name in names.items()
        if name not in ("resume", "accept_changes", "dry_run") and old.get(key) != new.get(key)
    }


def _items(config: Any) -> Mapping[str, Any]:
    """Settings by name."""
    return config if isinstance(config, Mapping) else vars(config)


def _plain(config: Any) -> dict[str, Any]:
    """As JSON gives it back."""
    return json.loads(json.dumps(_items(config), default=asdict))


def _defaults(config: Any) -> dict[str, Any]:
    """The settings that have a default, at it."""
    found = {name: _defaults(x) for name, x in _items(config).items() if is_dataclass(x)}
    for f in fields(config) if is_dataclass(config) else ():
        default = f.default if f.default_factory is MISSING else f.default_factory()
        if default is not MISSING and f.name not in found:
            found[f.name] = default
    return found


@contextmanager
def alone_in(path: Path) -> Iterator[None]:
    """Be the only process at work in a directory. Raises `QvgptError` where another one is.

    The kernel drops the lock of a process that dies, however it dies, so that the file left behind
    locks nobody out. Who only reads the directory needs no lock.
    """
    with (path / _LOCK).open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise QvgptError(
                f"{path}: another process is at work there ({lock.read().strip() or 'unknown'}); "
                "wait for it, or choose another output"
            ) from None
        except OSError:  # a file system without locks
            pass
        lock.truncate(0)
        print(f"pid {os.getpid()} on {os.uname().nodename}", file=lock, flush=True)
        yield


def write_json(path: Path, content: Any) -> None:
    """Write JSON in one piece: a reader sees the old file or the new one."""
    staged = path.with_name(f".{path.name}.staged")
    with writing(path):
        staged.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
        os.replace(staged, path)


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` → `{"a.b": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        inner = isinstance(value, Mapping) and value
        flat |= flatten(value, f"{prefix}{key}.") if inner else {prefix + key: value}
    return flat


def output_console() -> Console:
    """Standard output; wide enough for whole tables where nobody looks at it."""
    return Console(width=None if sys.stdout.isatty() else 160)


def print_summary(summary: Mapping[str, Any], console: Console) -> None:
    """The figures of a `summary.json`, one a line; a list of rows as a table."""
    told = _named(summary)
    width = max((len(name) for name, _ in told), default=0)
    for name, value in told:
        if isinstance(value, list) and value and all(isinstance(v, Mapping) for v in value):
            table = Table(*value[0], title=name)
            for row in value:
                table.add_row(*(Text(_shown(row.get(column))) for column in value[0]))
            console.print(table)
        elif value not in (None, [], {}):
            line = f"{name:<{width}}  {_shown(value)}"
            console.print(line, markup=False, highlight=False, soft_wrap=True)


def _named(summary: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Dotted names and values; in a list of `{name: options}` each has its own."""
    found: list[tuple[str, Any]] = []
    for name, value in flatten(summary).items():
        rows = value if isinstance(value, list) else []
        pairs = [pair for row in rows if isinstance(row, Mapping) for pair in row.items()]
        if rows and len(pairs) == len(rows) and all(isinstance(of, Mapping) for _, of in pairs):
            found += [(f"{name}.{key}", of) for key, of in pairs]
        else:
            found.append((name, value))
    return found


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_shown(of)}" for name, of in value.items() if of is not None)
    return ", ".join(map(_shown, value)) if isinstance(value, list) else str(value)


class Interruption:
    """Holds back the first Ctrl-C or SIGTERM until the step is whole; the second is immediate.

    `asked` says that one came. Does nothing outside the main thread, where no signal arrives.
    """

    def __init__(self):
        self.asked: type[KeyboardInterrupt] | None = None
        """What to raise when the step is whole."""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _: object) -> None:
        self.asked = Terminated if number == signal.SIGTERM else KeyboardInterrupt
        self.__exit__()


class RunProgress:
    """A progress bar with loss parts, tokens/s and time left, and `log.jsonl` in `output`."""

    def __init__(
        self,
        total: int,
        done: int,
        output: Path | None,
        tensorboard: bool = False,
        console: Console | None = None,
        what: str = "train",
    ):
        self.console, self.what = console or Console(stderr=True), what
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
        self.task = self.bar.add_task(what, total=total, completed=done, losses="", rate=0.0)
        self.file = None
        self.writer: Any = None
        if output is not None:
            output.mkdir(parents=True, exist_ok=True)
            if tensorboard:
                self.writer = require_tensorboard()(output / "tensorboard", purge_step=done + 1)
            _forget_after(output / "log.jsonl", done)
            self.file = (output / "log.jsonl").open("ab", buffering=0)

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
            line = f"{self.what} {step}/{self.total}  {losses}  {rate:,.0f} tok/s"
            self.console.print(line, soft_wrap=True)

    def log(self, step: int, values: dict[str, float], show: bool = False) -> None:
        """Append to log.jsonl (and TensorBoard); `show` prints it too."""
        if show:
            self.say(step, "  ".join(f"{k} {v:.4g}" for k, v in values.items()))
        if self.file is not None:
            with writing(Path(self.file.name), "go on with --resume"):
                self.file.write((json.dumps({"step": step, **values}) + "\n").encode())
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)

    def say(self, step: int, text: str) -> None:
        """A line above the bar."""
        self.console.print(f"step {step}/{self.total}  {text}", soft_wrap=True)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The entries of a `log.jsonl`, training and evaluation alike; empty where there is none."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text("utf-8").splitlines() if line]


def _forget_after(log: Path, step: int) -> None:
    """Drop the lines after `step`, which a resumed run takes again."""
    if not log.exists():
        return
    kept = []
    for line in log.read_text("utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError):  # the last line of a killed run may be half there
            continue
    staged = log.with_name(f".{log.name}.staged")
    with writing(log, "go on with --resume"):
        staged.write_text("".join(line + "\n" for line in kept), "utf-8")
        os.replace(staged, log)


def require_tensorboard() -> Any:
    """TensorBoard's writer. Raises `QvgptError` where the package is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise QvgptError(
            "tensorboard is not installed: pip install 'qvgpt[tensorboard]', "
            "or leave fit.tensorboard off"
        ) from None
    return SummaryWriter
