"""The command line: `qvgpt COMMAND …`. Results go to stdout, progress and errors to stderr.

A command is a function of one frozen dataclass, whose fields are its options. Only the module of
the chosen command is imported, so that `qvgpt --help` costs no torch.
"""

import io
import json
import logging
import os
import re
import signal
import sys
import threading
import types
import typing
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from qvgpt.errors import QvgptError, Terminated, nearest


@dataclass(frozen=True)
class Command:
    """Where a command lives."""

    module: str
    function: str
    help: str
    positional: str = ""
    """The option that stands without a name."""
    prints_summary: bool = False
    """Print what it returns; other commands show their results in a form of their own."""


COMMANDS = {
    "demo": Command("qvgpt.demo", "demo", "the whole story on a built-in task, with a report"),
    "train": Command(
        "qvgpt.trainer",
        "train",
        "learn text (LM), or what text is worth (ILQL, …)",
        prints_summary=True,
    ),
    "collect": Command(
        "qvgpt.collect", "collect", "sample completions and score them", prints_summary=True
    ),
    "reward-model": Command(
        "qvgpt.reward_model",
        "train_reward_model",
        "a classifier or regressor of text, to be a reward",
        prints_summary=True,
    ),
    "rounds": Command(
        "qvgpt.rounds",
        "rounds",
        "collect with the guided model, learn from all, again",
        prints_summary=True,
    ),
    "check": Command(
        "qvgpt.commands", "check", "look through data: counts, rewards, faults", "data"
    ),
    "score": Command("qvgpt.commands", "score", "V, Q and A of given texts, ranked", "model"),
    "lens": Command(
        "qvgpt.lens.command",
        "lens",
        "what each token of given texts is worth, as a page",
        "model",
        prints_summary=True,
    ),
    "generate": Command("qvgpt.commands", "generate", "write text, guided by the values", "model"),
    "chat": Command("qvgpt.chat", "chat", "talk with a model, guided by the values", "model"),
    "serve": Command("qvgpt.serve.command", "serve", "an OpenAI-compatible server", "model"),
    "evaluate": Command("qvgpt.evaluate", "evaluate", "base against guided, with intervals"),
    "export": Command(
        "qvgpt.commands", "export", "an ordinary checkpoint for other engines", "model", True
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 2 (bad input, faulty data), 130 (Ctrl-C),
    143 (SIGTERM)."""
    name, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    try:
        if name in ("-h", "--help"):
            print(_overview())
            return 0
        if name == "--version":
            print(import_module("qvgpt").__version__)
            return 0
        if name not in COMMANDS:
            raise QvgptError(f"unknown command {name!r}{nearest(name, COMMANDS)}; see qvgpt --help")
        with warnings.catch_warnings():
            _quieten()
            with _sigterm_as_exception():
                return _run(name, rest)
    except QvgptError as error:
        return _fail(str(error))
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except KeyboardInterrupt as interrupt:
        print(f"qvgpt: interrupted{interrupt}", file=sys.stderr)
        return 143 if isinstance(interrupt, Terminated) else 130


@contextmanager
def _sigterm_as_exception() -> Iterator[None]:
    """A scheduler's SIGTERM ends a command in order, as Ctrl-C does; in the main thread only."""

    def terminate(*_: object) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(name: str, argv: list[str]) -> int:
    command = COMMANDS[name]
    function = getattr(import_module(command.module), command.function)
    config_class = next(iter(typing.get_type_hints(function).values()))
    config = _parse(name, command, config_class, argv)
    if config is None:
        return 0
    try:
        summary = function(config)
    except KeyboardInterrupt as interrupt:
        raise type(interrupt)(str(interrupt) or _how_to_go_on(name, config)) from None
    first = os.environ.get("RANK", "0") == "0"  # of several processes: what one says all know
    if command.prints_summary and first:
        run: Any = import_module("qvgpt.run")
        run.print_summary(summary, run.output_console())
    return 2 if summary.get("faults") else 0


def _how_to_go_on(name: str, config: Any) -> str:
    """Of an interrupted run, where one has begun; `check` keeps nothing of it."""
    output = getattr(config, "output", None) if name != "check" else None
    if hasattr(config, "resume") and output and (Path(output) / "run.json").exists():
        return f"; what is done is in {output}: go on with --resume"
    return ""


def _overview() -> str:
    lines = [f"  {name:<14}{command.help}" for name, command in COMMANDS.items()]
    return "\n".join(
        ["usage: qvgpt COMMAND [options]", "", "A GPT with Q- and V-functions.", "", *lines, "",
         "qvgpt COMMAND --help lists its options; --config x.yaml reads them from a file."]
    )  # fmt: skip


def _fail(message: str) -> int:
    print(f"qvgpt: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _quieten() -> None:
    """Nothing that other packages say on the way is meant for our users."""
    warnings.simplefilter("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for package in ("torch", "transformers", "accelerate", "datasets", "tensorboard"):
        logging.getLogger(package).setLevel(logging.ERROR)


# ── options ──────────────────────────────────────────────────────────────────────────────────


def _parse(name: str, command: Command, config_class: type, argv: list[str]) -> Any:
    """The configuration, from `--config` files and options; None where help was all."""
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    place = f" {command.positional.upper()}" if command.positional else ""
    parser = ArgumentParser(
        prog=f"qvgpt {name}",
        usage=f"qvgpt {name}{place} [--config x.yaml] [--option value] …",
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="A YAML file with any of these options.")
    parser.add_class_arguments(config_class, None)
    known, texts, shown = _options(config_class), _Texts(), io.StringIO()
    try:
        with redirect_stdout(shown):
            parsed = parser.parse_args(_arguments(argv, known, command.positional, texts))
        for name, value in parsed.items():
            parsed[name] = texts.told.get(value, value) if isinstance(value, str) else value
        ready = parser.instantiate(parsed)
        return config_class(**{name: ready[name] for name in known if "." not in name})
    except QvgptError:
        raise
    except SystemExit:  # --help and --print_config
        print(texts.back(shown.getvalue()), end="")
        return None
    except Exception as error:  # jsonargparse raises several kinds
        raise QvgptError(_one_line(str(error), known, command.positional)) from None


class _Texts:
    """Texts kept from jsonargparse, which reads `str | None` as YAML: `# Title` would be null."""

    def __init__(self):
        self.told: dict[str, str] = {}

    def hide(self, value: Any, kind: Any) -> Any:
        """A name to stand for the value, where it is a text that may be none."""
        if kind != str | None or not isinstance(value, str):
            return value
        name = f"text-{len(self.told)}-as-typed"
        self.told[name] = value
        return name

    def back(self, shown: str) -> str:
        """What is shown, with the texts in it again."""
        for name, value in self.told.items():
            shown = shown.replace(name, json.dumps(value, ensure_ascii=False))
        return shown


def _options(config_class: type, prefix: str = "") -> dict[str, Any]:
    """Dotted name → type of every option, those of nested dataclasses included."""
    found: dict[str, Any] = {}
    hints = typing.get_type_hints(config_class)
    for name in config_class.__dataclass_fields__:  # type: ignore[attr-defined]
        found[prefix + name] = hints[name]
        for kind in (hints[name], *typing.get_args(hints[name])):
            if is_dataclass(kind):
                found |= _options(typing.cast(type, kind), f"{prefix}{name}.")
    return found


def _arguments(argv: list[str], known: dict[str, Any], positional: str, texts: _Texts) -> list[str]:
    """Each option as one `--name=value`: lists gathered, flags completed, config files read."""
    done: list[str] = []
    last: list[str] = []  # --print_config sees what stands before it
    rest = list(argv)
    while rest:
        token = rest.pop(0)
        if not token.startswith("-"):
            if not positional or any(d.startswith(f"--{positional}=") for d in done):
                raise QvgptError(f"unexpected argument {token!r}: options begin with --")
            token, rest = f"--{positional}", [token, *rest]
        name, equals, value = token.lstrip("-").partition("=")
        name = name.replace("-", "_")  # --dry-run is as good as --dry_run
        if name in ("h", "help", "print_config") or name.endswith(".help"):
            last.append("--help" if name == "h" else f"--{name}")
            continue
        kind = str if name == "config" else known.get(name.removesuffix("+"))
        if kind is None:
            raise QvgptError(f"unknown option --{name}{_nearest_option(name, known, '--')}")
        is_list = typing.get_origin(kind) is list and not name.endswith("+")
        values = [value] if equals else []
        while not equals and rest and (not values or is_list) and not rest[0].startswith("--"):
            values.append(rest.pop(0))
        if not values and kind is not bool:
            raise QvgptError(f"--{name}: expected a value")
        text = _as_list(values, kind) if is_list else values[0] if values else "true"
        read = _read_config(text, known, texts) if name == "config" else texts.hide(text, kind)
        done.append(f"--{name}={read}")
    return done + last


def _as_list(values: list[str], kind: Any) -> str:
    """Values as a YAML list; entries such as 0.5 or {ILQL: {expectile: 0.8}} are YAML already."""
    if len(values) == 1 and values[0].startswith("["):
        return values[0]
    plain = typing.get_args(kind)[0] in (int, float)
    return f"[{', '.join(v if plain or v.startswith('{') else json.dumps(v) for v in values)}]"


def _read_config(file: str, known: dict[str, Any], texts: _Texts) -> str:
    """The file's content as JSON, every key known."""
    from jsonargparse import get_loader

    try:
        content = get_loader("yaml")(Path(file).read_text("utf-8"))
    except (FileNotFoundError, IsADirectoryError):
        raise QvgptError(f"{file}: no such file") from None
    except Exception as error:
        raise QvgptError(f"{file}: broken YAML: {error}") from None
    if not isinstance(content, dict):
        raise QvgptError(f"{file}: expected `key: value` lines")
    return json.dumps(_checked(content, known, file, texts))


def _checked(
    content: dict[str, Any], known: dict[str, Any], file: str, texts: _Texts, prefix: str = ""
) -> Any:
    checked = {}
    for key, value in content.items():
        name = prefix + str(key)
        if name not in known:
            raise QvgptError(f"{file}: unknown key {name!r}{_nearest_option(name, known)}")
        if any(other.startswith(name + ".") for other in known):
            if isinstance(value, dict):
                value = _checked(value, known, file, texts, name + ".")
            elif not (isinstance(value, str) if is_dataclass(known[name]) else value is None):
                # a text names another file that holds them; only an optional section may be null
                found = json.dumps(value, default=str)
                raise QvgptError(f"{file}: {name}: expected {_words(known[name])}, found {found}")
        elif typing.get_origin(known[name]) is list and isinstance(value, str):
            value = [value]
        checked[key] = texts.hide(value, known[name])
    return checked


def _nearest_option(name: str, known: dict[str, Any], dashes: str = "") -> str:
    """A hint with the full path: `lr` means `fit.lr`."""
    last = name.rpartition(".")[2]
    same = [k for k in known if k.rpartition(".")[2] == last]
    hint = f" (did you mean {same[0]!r}?)" if same else nearest(name, known)
    if not hint:
        tails = {k.rpartition(".")[2]: k for k in known}
        hint = re.sub(r"'(.*)'", lambda m: f"'{tails[m[1]]}'", nearest(last, tails))
    return hint.replace("mean '", f"mean '{dashes}")


def _one_line(message: str, known: dict[str, Any], positional: str) -> str:
    """jsonargparse's message in our words: which key, what was expected, what was found."""
    flat = " ".join(message.split())
    if missing := re.match(r"the following arguments are required: (.*)", flat):
        names = missing[1].split(", ")
        named = [n.upper() if n == positional else f"--{n}" for n in names]
        return f"{', '.join(named)}: missing"
    keys = re.findall(r'Parser key "([^"]+)":', message)  # a section, then the key in it
    names = [name for name in (".".join(keys), keys[0] if keys else "") if name in known]
    if not names:
        own = re.search(r"Errors:\n\s+- (.*)", message)  # what a section itself says of its keys
        return own[1] if own else flat
    found = re.search(r"(?:Got|Given) value: (.*)", message)
    return f"{names[0]}: expected {_words(known[names[0]])}" + (
        f", found {found[1]}" if found else ""
    )


def _words(kind: Any) -> str:
    if is_dataclass(kind):
        return f"keys ({', '.join(kind.__dataclass_fields__)})"
    if typing.get_origin(kind) is Literal:
        return " or ".join(map(repr, typing.get_args(kind)))
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return " or ".join(map(_words, typing.get_args(kind)))
    plain = {float: "a number", int: "a whole number", str: "text", bool: "true or false",
             type(None): "null"}  # fmt: skip
    return plain.get(kind, str(kind))
