"""The command line: `qvgpt COMMAND …`. Results go to stdout, progress and errors to stderr.

A command is a function of one frozen dataclass, whose fields are its options. Only the module of
the chosen command is imported, so that `qvgpt --help` costs no torch.
"""

import json
import logging
import math
import os
import re
import sys
import types
import typing
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qvgpt.errors import QvgptError, nearest

if TYPE_CHECKING:
    from rich.console import Console

    from qvgpt.decode.engine import TokenReport
    from qvgpt.decode.policy import Guidance
    from qvgpt.models.value_model import ValueModel


@dataclass(frozen=True)
class Command:
    """Where a command lives."""

    module: str
    function: str
    help: str
    positional: str = ""
    """The option that stands without a name."""


COMMANDS = {
    "demo": Command("qvgpt.demo", "demo", "the whole story on a built-in task, with a report"),
    "train": Command("qvgpt.trainer", "train", "learn text (LM), or what text is worth (ILQL, …)"),
    "collect": Command("qvgpt.collect", "collect", "sample completions and score them"),
    "check": Command("qvgpt.cli", "check", "look through data: counts, rewards, faults", "data"),
    "score": Command("qvgpt.cli", "score", "V, Q and A of given texts, ranked", "model"),
    "generate": Command("qvgpt.cli", "generate", "write text, guided by the values", "model"),
    "evaluate": Command("qvgpt.evaluate", "evaluate", "base against guided, with intervals"),
    "export": Command("qvgpt.cli", "export", "an ordinary checkpoint for other engines", "model"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 1 (faults found), 2 (bad input), 130 (Ctrl-C)."""
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
        return 130


def _run(name: str, argv: list[str]) -> int:
    command = COMMANDS[name]
    function = getattr(import_module(command.module), command.function)
    config_class = next(iter(typing.get_type_hints(function).values()))
    config = _parse(name, command, config_class, argv)
    if config is None:
        return 0
    summary = function(config)
    if command.module != __name__:
        from qvgpt.run import print_summary

        print_summary(summary, _console())
    return int(bool(summary.get("faults")))


def _overview() -> str:
    lines = [f"  {name:<10}{command.help}" for name, command in COMMANDS.items()]
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
    known = _options(config_class)
    try:
        parsed = parser.parse_args(_arguments(argv, known, command.positional))
        ready = parser.instantiate_classes(parsed)
        return config_class(**{name: ready[name] for name in known if "." not in name})
    except QvgptError:
        raise
    except SystemExit:  # --help and --print_config
        return None
    except Exception as error:  # jsonargparse raises several kinds
        raise QvgptError(_one_line(str(error), known, command.positional)) from None


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


def _arguments(argv: list[str], known: dict[str, Any], positional: str) -> list[str]:
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
        if name in ("h", "help", "print_config") or name.endswith(".help"):
            last.append(token)
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
        done.append(f"--{name}=" + (_read_config(text, known) if name == "config" else text))
    return done + last


def _as_list(values: list[str], kind: Any) -> str:
    """Values as a YAML list; entries such as 0.5 or {ILQL: {expectile: 0.8}} are YAML already."""
    if len(values) == 1 and values[0].startswith("["):
        return values[0]
    plain = typing.get_args(kind)[0] in (int, float)
    return f"[{', '.join(v if plain or v.startswith('{') else json.dumps(v) for v in values)}]"


def _read_config(file: str, known: dict[str, Any]) -> str:
    """The file's content as JSON, every key known."""
    from jsonargparse import get_loader

    try:
        content = get_loader("yaml")(Path(file).read_text())
    except (FileNotFoundError, IsADirectoryError):
        raise QvgptError(f"{file}: no such file") from None
    except Exception as error:
        raise QvgptError(f"{file}: broken YAML: {error}") from None
    if not isinstance(content, dict):
        raise QvgptError(f"{file}: expected `key: value` lines")
    return json.dumps(_checked(content, known, file))


def _checked(content: dict[str, Any], known: dict[str, Any], file: str, prefix: str = "") -> Any:
    checked = {}
    for key, value in content.items():
        name = prefix + str(key)
        if name not in known:
            raise QvgptError(f"{file}: unknown key {name!r}{_nearest_option(name, known)}")
        if isinstance(value, dict) and any(other.startswith(name + ".") for other in known):
            value = _checked(value, known, file, name + ".")
        elif typing.get_origin(known[name]) is list and isinstance(value, str):
            value = [value]
        checked[key] = value
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
    key = re.match(r'Parser key "([^"]+)":', flat)
    if key is None or key[1] not in known:
        return flat
    found = re.search(r"Got value: (.*)", flat)
    return f"{key[1]}: expected {_words(known[key[1]])}" + (f", found {found[1]}" if found else "")


def _words(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return " or ".join(map(repr, typing.get_args(kind)))
    if isinstance(kind, types.UnionType):
        return " or ".join(map(_words, typing.get_args(kind)))
    plain = {float: "a number", int: "a whole number", str: "text", bool: "true or false",
             type(None): "null"}  # fmt: skip
    return plain.get(kind, str(kind))


# ── commands that are only files around a function ───────────────────────────────────────────


@dataclass(frozen=True)
class CheckConfig:
    """The data linter: what would be trained on, and every fault with its row."""

    data: list[str]
    """Files of rows: .jsonl, .csv, or a directory that `datasets` saved."""
    tokenizer: str | None = None
    """Directory of a tokenizer or model; none: one is trained on this data."""
    kind: Literal["bpe", "char"] = "bpe"
    """Which to train where none is given."""
    max_length: int | None = None
    """Say how many texts have more tokens than this."""
    output: str | None = None
    """Directory for summary.json; new or empty."""
    json: bool = False
    """Print the figures as JSON."""


def check(config: CheckConfig) -> dict[str, Any]:
    """Print counts, lengths, rewards, a few texts in colours, and the faults."""
    from qvgpt.data import check as linter
    from qvgpt.data.files import Row, row_texts, scan_rows
    from qvgpt.data.tokenizer import Tokenizer

    for path in config.data:
        if not Path(path).exists():
            raise QvgptError(f"{path}: no such file")
    output = _claim(config.output, "check", config)
    if config.tokenizer is not None:
        tokenizer, origin = Tokenizer.load(config.tokenizer), f"from {config.tokenizer}"
    else:
        rows = (row for path in config.data for row in scan_rows(path) if isinstance(row, Row))
        tokenizer = Tokenizer.train((t for row in rows for t in row_texts(row)), config.kind)
        origin = f"{config.kind}, trained on this data"
    report = linter.check(config.data, tokenizer, config.max_length)
    summary = {"tokenizer": origin, "vocab_size": tokenizer.vocab_size, **report.as_dict()}
    if config.json:
        print(json.dumps(summary, indent=2, ensure_ascii=False))
    else:
        console = _console()
        console.print(f"tokenizer: {origin}, {tokenizer.vocab_size} tokens", highlight=False)
        linter.render(report, report.examples, tokenizer, console)
    _finish(output, summary)
    return summary


@dataclass(frozen=True)
class GenerateConfig:
    """Write text, guided by the values."""

    model: str
    """Directory of the model."""
    prompt: str | None = None
    """One prompt: its text is streamed."""
    data: str | None = None
    """A file of rows with prompts: JSONL is written."""
    beta: float | None = None
    """Strength of guidance; none: what the model recommends, as for all options down to twins."""
    temperature: float | None = None
    """0 is greedy."""
    top_k: int | None = None
    """Keep the k likeliest tokens; 0: all."""
    top_p: float | None = None
    """Keep the smallest set of tokens that holds this probability."""
    min_p: float | None = None
    """Keep tokens at least this likely, relative to the likeliest."""
    candidates: Literal["base", "guided"] | None = None
    """Which distribution top_k, top_p and min_p look at."""
    twins: Literal["mean", "min"] | None = None
    """How several Q heads are joined."""
    max_tokens: int | None = None
    """Longest text; none: what the context holds, at most 256."""
    n: int = 1
    """Texts a prompt."""
    seed: int = 0
    """The same seed gives the same texts."""
    max_batch: int = 64
    """Texts written at once."""
    values: bool = False
    """Show the tokens coloured by advantage, with their Q and V."""
    output: str | None = None
    """Directory for completions.jsonl and summary.json; new or empty."""


def generate(config: GenerateConfig) -> dict[str, Any]:
    """Stream one text, or write many as JSONL."""
    import time

    from qvgpt.decode.engine import Request
    from qvgpt.models.value_model import ValueModel

    if (config.prompt is None) == (config.data is None):
        raise QvgptError("generate: give either --prompt or --data")
    model = ValueModel.from_pretrained(config.model)
    if config.values and model.heads is None:
        raise QvgptError(f"--values: {config.model} has no value heads")
    guidance = _guidance(model, config)
    texts, prompts = _prompts(model, config)
    most = [min(config.max_tokens or 256, model.trunk.seq_len - len(p)) for p in prompts]
    requests = [
        Request(prompt, room, guidance, config.seed + i * config.n + k)
        for i, (prompt, room) in enumerate(zip(prompts, most, strict=True))
        for k in range(config.n)
    ]
    output = _claim(config.output, "generate", config)
    started = time.perf_counter()
    streamed = config.prompt is not None and config.n == 1 and not config.values
    rows = _stream(model, requests[0]) if streamed else _write(model, requests, config)
    seconds = time.perf_counter() - started
    tokens = sum(len(row["completion_ids"]) for row in rows)
    for i, row in enumerate(rows):
        row["prompt"] = texts[i // config.n]
    if config.data is not None or output is not None:
        lines = [json.dumps({"prompt": r.pop("prompt"), **r}, ensure_ascii=False) for r in rows]
        if output is not None:
            (output / "completions.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
        else:
            print("\n".join(lines))
    summary = {
        "texts": len(rows),
        "tokens": tokens,
        "seconds": round(seconds, 3),
        "tokens_per_second": round(tokens / max(seconds, 1e-9), 1),
        "guidance": vars(guidance),
    }
    _finish(output, summary)
    return summary


def _guidance(model: "ValueModel", config: GenerateConfig) -> "Guidance":
    """The recommended guidance, with what was said put over it."""
    from qvgpt.decode.policy import Guidance

    names = ("beta", "temperature", "top_k", "top_p", "min_p", "candidates", "twins")
    said = {n: value for n in names if (value := getattr(config, n)) is not None}
    if said.get("top_k") == 0:
        said["top_k"] = None
    return replace(Guidance(**(model.info.recommended_guidance or {})), **said)


def _prompts(model: "ValueModel", config: GenerateConfig) -> tuple[list[Any], list[list[int]]]:
    """The prompts as given and as tokens, each with room for a completion."""
    from qvgpt.data.files import read_rows
    from qvgpt.data.rows import prompt_tokens

    assert model.tokenizer is not None
    if config.n < 1 or (config.max_tokens or 1) < 1 or config.max_batch < 1:
        raise QvgptError("generate: n, max_tokens and max_batch must be at least 1")
    if config.prompt is not None:
        texts, prompts = [config.prompt], [model.tokenizer.encode_prompt(config.prompt)]
    else:
        rows = list(read_rows(config.data or ""))
        prompts = [prompt_tokens(row, model.tokenizer) for row in rows]
        texts = [row.fields.get("prompt", "") for row in rows]
    context, least = model.trunk.seq_len, config.max_tokens or 1
    too_long = sum(len(p) + least > context for p in prompts)
    if too_long:
        raise QvgptError(
            f"{too_long} of {len(prompts)} prompts (the longest has {max(map(len, prompts))} "
            f"tokens) leave less than {least} in the context of {context}: lower --max_tokens, "
            "or shorten the prompts"
        )
    return texts, prompts


def _stream(model: "ValueModel", request: Any) -> list[dict[str, Any]]:
    """Print a text while it is written."""
    from qvgpt.decode.engine import Engine

    assert model.tokenizer is not None
    engine = Engine(model, max_batch=1, report=True)
    engine.submit(request)
    written, shown, reports, cut = [], "", [], False
    while engine.busy:
        for event in engine.step():
            cut = event.finished == "length"
            written.append(event.token)
            reports.append(event.report)
            text = model.tokenizer.decode(written)
            if not text.endswith("\ufffd"):  # half a character waits for the rest
                print(text[len(shown) :], end="", flush=True)
                shown = text
    print()
    return [_row(shown, written, reports, cut)]


def _write(
    model: "ValueModel", requests: list[Any], config: GenerateConfig
) -> list[dict[str, Any]]:
    """All texts in batches, with a progress bar; printed where there is one prompt."""
    from rich.console import Console
    from rich.progress import Progress

    from qvgpt.sampling import write_texts

    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("generate", total=len(requests))
        texts = write_texts(
            model, requests, max_batch=config.max_batch, measure_kl=True,
            keep_reports=range(len(requests)), on_step=lambda n, _: progress.advance(task, n),
        )  # fmt: skip
    for text in texts if config.prompt is not None or config.values else ():
        _show(model, text.tokens, text.reports) if config.values else print(text.text)
    return [_row(t.text, t.tokens, t.reports, not t.terminated) for t in texts]


def _row(
    text: str, tokens: list[int], reports: Sequence["TokenReport"], cut: bool
) -> dict[str, Any]:
    return {
        "completion": text,
        "completion_ids": tokens,
        "truncated": cut,
        "logprob": sum(report.logprob for report in reports),
        "base_logprob": sum(report.base_logprob for report in reports),
    }


def _show(model: "ValueModel", tokens: list[int], reports: Sequence["TokenReport"]) -> None:
    """The text coloured by advantage (green: better than V, red: worse), then its figures."""
    from rich.table import Table
    from rich.text import Text

    assert model.tokenizer is not None
    console, text = _console(), Text()
    table = Table("token", "q", "v", "advantage", "base p", "p")
    most = max([abs(r.advantage or 0.0) for r in reports], default=0.0) or 1.0
    for piece, report in zip(model.tokenizer.pieces(tokens), reports, strict=True):
        advantage = report.advantage or 0.0
        weak = round(255 * (1 - abs(advantage) / most))
        colour = f"rgb({weak},255,{weak})" if advantage >= 0 else f"rgb(255,{weak},{weak})"
        text.append(piece, style=f"black on {colour}")
        figures = (report.q, report.v, advantage)
        chances = (math.exp(report.base_logprob), math.exp(report.logprob))
        cells = [f"{x:+.3f}" for x in figures if x is not None] + [f"{p:.3f}" for p in chances]
        table.add_row(Text(repr(piece)[1:-1]), *cells)
    console.print(text)
    console.print(table)


@dataclass(frozen=True)
class ScoreConfig:
    """V, Q and A of given texts, ranked within each prompt."""

    model: str
    """Directory of a model with value heads."""
    data: list[str] = field(default_factory=list)
    """Files of rows; their rewards are shown but not looked at."""
    output: str | None = None
    """Directory for scores.jsonl and summary.json; new or empty."""
    show: int = 50
    """Rows of the table."""


def score(config: ScoreConfig) -> dict[str, Any]:
    """Judge texts by Σ A, which is the expected return less what the prompt already promised."""
    from qvgpt.data.rows import load_trajectories
    from qvgpt.decode import score as scoring
    from qvgpt.models.value_model import ValueModel
    from qvgpt.run import print_summary

    if not config.data:
        raise QvgptError("--data: missing")
    model = ValueModel.from_pretrained(config.model)
    if model.heads is None or model.tokenizer is None:
        raise QvgptError(f"{config.model}: has no value heads to score with")
    texts, _ = load_trajectories(config.data, model.tokenizer)
    too_long = sum(len(t.tokens) > model.trunk.seq_len for t in texts)
    if too_long:
        context = model.trunk.seq_len
        raise QvgptError(f"{too_long} of {len(texts)} texts are longer than the context, {context}")
    output = _claim(config.output, "score", config)
    rows: list[dict[str, Any]] = []
    for text, found in zip(texts, scoring.score(model, texts), strict=True):
        first, last = found.reports[0], found.reports[-1]
        rows.append({
            "prompt": model.tokenizer.decode(text.prompt),
            "completion": model.tokenizer.decode(text.tokens[len(text.prompt) :]),
            "v": first.v, "q": last.q, "advantage": found.advantage,
            "logprob": found.base_logprob, "reward": text.total_reward,
        })  # fmt: skip
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, text in enumerate(texts):
        groups.setdefault(text.prompt, []).append(i)
    ranked = []
    for group in groups.values():
        group.sort(key=lambda i: -rows[i]["advantage"])
        ranked += [{"rank": k, **rows[i]} for k, i in enumerate(group, 1)]
    print_summary({"texts, best of each prompt first": ranked[: config.show]}, _console())
    if output is not None:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ranked)
        (output / "scores.jsonl").write_text(lines, "utf-8")
    mean = sum(row["advantage"] for row in rows) / len(rows)
    summary = {"texts": len(rows), "prompts": len(groups), "mean_advantage": mean}
    _finish(output, summary)
    return summary


@dataclass(frozen=True)
class ExportConfig:
    """A guided model as an ordinary checkpoint, for engines that know nothing of values."""

    model: str
    """Directory of the model."""
    output: str
    """Directory for the checkpoint; new or empty."""
    to: Literal["hf"] = "hf"
    """Format: Hugging Face."""
    beta: float | None = None
    """Strength of guidance to fold in; none: what the model recommends."""


def export(config: ExportConfig) -> dict[str, Any]:
    """Fold values into the LM head and say how faithful the result is."""
    from qvgpt.export import export_hf
    from qvgpt.run import print_summary

    summary = export_hf(config.model, config.output, config.beta)
    print_summary(summary, _console())
    _finish(Path(config.output), summary)
    return summary


def _console() -> "Console":
    """Standard output; wide enough for whole tables where nobody looks at it."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 160)


def _claim(output: str | None, command: str, config: Any) -> Path | None:
    from qvgpt.run import open_run

    return None if output is None else open_run(output, command, vars(config))


def _finish(output: Path | None, summary: dict[str, Any]) -> None:
    from qvgpt.run import write_json

    if output is not None:
        write_json(output / "summary.json", summary)
        print(f"written to {output}", file=sys.stderr)
