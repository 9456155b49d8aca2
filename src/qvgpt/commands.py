"""Commands that are only files around a function: check, generate, score, export."""

import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from rich.table import Table
from rich.text import Text as Coloured

from qvgpt.data import check as linter
from qvgpt.data.files import Row, row_texts, scan_rows
from qvgpt.data.rows import load_trajectories
from qvgpt.data.sizes import TokenizerConfig
from qvgpt.data.split import check_shares, split_rows, write_split
from qvgpt.data.tokenizer import Tokenizer
from qvgpt.decode import score as scoring
from qvgpt.decode.engine import Request, Text, TokenEvent, row_seed, write
from qvgpt.decode.guide import Guide
from qvgpt.decode.rerank import write_best
from qvgpt.decode.search import Search
from qvgpt.decode.searches import is_sampled, parse_search, search_name, write_searched
from qvgpt.decode.sources import ValueSource, describe
from qvgpt.errors import QvgptError
from qvgpt.export import ExportOptions, export_model
from qvgpt.guidance_options import GuidanceOptions
from qvgpt.models.value_model import ValueModel
from qvgpt.run import check_run, open_run, output_console, print_summary, write_json
from qvgpt.sampling import (
    TextProgress,
    check_guidance,
    check_room,
    check_values,
    load_prompts,
    warn_of_unknown,
)
from qvgpt.source_options import SourceOptions
from qvgpt.terminal import TextStream, shade

_FAR = 0.1  # nats a token: an export that far from what was recommended is said to be so


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
    split: list[float] = field(default_factory=list)
    """Shares of the prompts to hold out: one for val.jsonl, perhaps one for test.jsonl; the other
    rows are train.jsonl, all in output. A prompt falls on the same side in whatever file."""
    output: str | None = None
    """Directory for summary.json and the files of a split; new or empty."""
    json: bool = False
    """Print the figures as JSON."""
    resume: bool = False
    """Write anew what the same check left in output."""


def check(config: CheckConfig) -> dict[str, Any]:
    """Print counts, lengths, rewards, a few texts in colours, and the faults.

    Faults make the exit code 2, as bad input does everywhere.
    """
    for path in config.data:
        if not Path(path).exists():
            raise QvgptError(f"{path}: no such file")
    if config.split and config.output is None:
        raise QvgptError("split: say by output where the files go")
    check_shares(config.split)
    if config.output is not None:
        check_run(config.output, "check", config, config.resume)
    if config.tokenizer is not None:
        tokenizer, origin = Tokenizer.load(config.tokenizer), f"from {config.tokenizer}"
    else:
        tokenizer = _trained(config)
        origin = f"{config.kind}, trained on this data"
    report = linter.check(config.data, tokenizer, config.max_length)
    summary = {"tokenizer": origin, "vocab_size": tokenizer.vocab_size, **report.as_dict()}
    sides = split_rows(config.data, config.split) if config.split and report.ok else {}
    output = None
    if config.output is not None:
        output = open_run(config.output, "check", config, config.resume)
        summary["split"] = write_split(sides, output)
    if config.json:
        print(json.dumps(summary, indent=2, ensure_ascii=False))
    else:
        console = output_console()
        console.print(f"tokenizer: {origin}, {tokenizer.vocab_size} tokens", highlight=False)
        linter.render(report, report.examples, tokenizer, console)
        if config.split:
            told = ", ".join(f"{len(rows)} {name}" for name, rows in sides.items())
            console.print(f"\nrows by prompt: {told or 'not split, for there are faults'}")
    _finish(output, summary)
    return summary


def _trained(config: CheckConfig) -> Tokenizer:
    """The tokenizer that `train` would train on these data."""

    def texts() -> Iterator[str]:
        rows = (row for path in config.data for row in scan_rows(path) if isinstance(row, Row))
        return (text for row in rows for text in row_texts(row))

    size = TokenizerConfig(config.kind).fitted_to(sum(map(len, texts()))).vocab_size
    assert size is not None
    return Tokenizer.train(texts(), config.kind, size)


@dataclass(frozen=True)
class GenerateConfig(GuidanceOptions):
    """Write text, guided by the values."""

    model: str
    """Directory of the model."""
    prompt: str | None = None
    """One prompt: its text is streamed."""
    data: str | None = None
    """A file of rows with prompts: JSONL is written."""
    max_tokens: int | None = None
    """Longest text; none: what the context holds, at most 256."""
    n: int = 1
    """Texts a prompt."""
    best_of: int = 1
    """Each text is the one of so many whose last token's Q is highest."""
    search: dict[str, Any] | str | None = None
    """In the place of sampling: block, beam or tree, with options where they are not the usual
    ones, such as '{block: {samples: 16, block: 4}}'; docs/decoding.md lists them. Values choose,
    beta guides besides."""
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
    if (config.prompt is None) == (config.data is None):
        raise QvgptError("generate: give either --prompt or --data")
    if min(config.n, config.max_batch, 1 if config.max_tokens is None else config.max_tokens) < 1:
        raise QvgptError("generate: n, max_tokens and max_batch must be at least 1")
    model, values = config.load(config.model)
    if config.values and model.heads is None and values is None:
        raise QvgptError(f"--values: {config.model} has no value heads")
    search = _search(config, config.max_tokens or 1)
    if not is_sampled(search):
        config = replace(config, temperature=1.0)  # whatever the model recommends
    guidance = config.guidance(model, config.model, values)
    strengths = [guidance.beta, guidance.beta_end, guidance.kl_budget]
    searches = [] if search is None else [search]
    check_values(model, config.model, strengths, config.best_of, values, searches)
    texts, prompts = _prompts(model, config)
    check_guidance(model, [guidance], prompts, config.max_tokens or 1, values)
    context = Guide.of(model, values).context
    most = [min(config.max_tokens or 256, context - len(p)) for p in prompts]
    requests = [
        Request(prompt, room, guidance, row_seed(config.seed, i * config.n + k))
        for i, (prompt, room) in enumerate(zip(prompts, most, strict=True))
        for k in range(config.n)
    ]
    output = _claim(config.output, "generate", config)
    chosen = "" if search is None else search_name(search)
    if config.best_of > 1:
        chosen = f"best of {config.best_of} by Q"
    print(config.in_words(model, guidance, values, chosen), file=sys.stderr)
    started, spent = time.perf_counter(), list[int]()
    one = config.prompt is not None and config.n == config.best_of == 1
    if one and search is None and not config.values:
        written = [_stream(model, requests[0], values, spent)]
    else:
        written = _write(model, requests, config, values, search, spent)
    seconds = time.perf_counter() - started
    rows = [_row(texts[i // config.n], text) for i, text in enumerate(written)]
    if config.data is not None or output is not None:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        if output is not None:
            (output / "completions.jsonl").write_text(lines, "utf-8")
        else:
            print(lines, end="")
    tokens = sum(len(text.tokens) for text in written)
    summary = {
        "texts": len(rows),
        "tokens": tokens,
        "seconds": round(seconds, 3),
        "tokens_per_second": round(tokens / max(seconds, 1e-9), 1),
        "forward_tokens_per_token": round(sum(spent) / tokens, 3),
        "guidance": vars(guidance),
    }
    _finish(output, summary)
    return summary


def _search(config: GenerateConfig, max_tokens: int) -> Search | None:
    """The search that is asked for."""
    if config.search is None:
        return None
    search = parse_search(config.search, max_tokens, config.max_batch)
    if config.best_of > 1:
        raise QvgptError("generate: search and best_of both choose: give one of them")
    if config.n > 1 and not is_sampled(search):
        raise QvgptError(f"generate: {search_name(search)} finds one text a prompt: n must be 1")
    if config.temperature not in (None, 1.0) and not is_sampled(search):
        raise QvgptError(f"generate: {search_name(search)} has no temperature: leave it out")
    return search


def _prompts(model: ValueModel, config: GenerateConfig) -> tuple[list[Any], list[list[int]]]:
    """The prompts as given and as tokens, each with room for a completion."""
    assert model.tokenizer is not None
    least = config.max_tokens or 1
    if config.data is not None:
        rows, prompts = load_prompts(config.data, model, least)
        return [row.fields.get("prompt", "") for row in rows], prompts
    prompts = [model.tokenizer.encode_prompt(config.prompt or "")]
    check_room(prompts, model, least)
    warn_of_unknown(prompts, model)
    return [config.prompt], prompts


def _stream(
    model: ValueModel, request: Request, values: ValueSource | None, spent: list[int]
) -> Text:
    """Print a text while it is written."""
    assert model.tokenizer is not None
    stream = TextStream(model.tokenizer)

    def show(events: list[TokenEvent]) -> None:
        for event in events:
            print(stream.add(event.token), end="", flush=True)

    [text] = write(model, [request], report=True, on_step=show, values=values, spent=spent)
    print(stream.rest())
    return text


def _write(
    model: ValueModel,
    requests: list[Request],
    config: GenerateConfig,
    values: ValueSource | None,
    search: Search | None,
    spent: list[int],
) -> list[Text]:
    """All texts in batches, with a progress bar; printed where there is one prompt."""
    with TextProgress("generate", len(requests) * config.best_of) as progress:
        how: dict[str, Any] = {"on_step": progress.step, "values": values, "spent": spent}
        if search is not None:
            texts = _searched(search, model, requests, **how)
        else:
            how["max_batch"] = config.max_batch
            texts = write_best(model, requests, config.best_of, report=True, **how)
    for text in texts if config.prompt is not None or config.values else ():
        _show(model, text) if config.values else print(text.text)
    return texts


def _searched(search: Any, model: ValueModel, requests: list[Request], **how: Any) -> list[Text]:
    """The text of each request, those of equal room searched together."""
    texts: dict[int, Text] = {}
    for room in sorted({request.max_tokens for request in requests}):
        some = {i: request for i, request in enumerate(requests) if request.max_tokens == room}
        one = replace(search, max_tokens=room)
        found = write_searched(one, model, [*some.values()], report=True, **how)
        texts |= dict(zip(some, found, strict=True))
    return [texts[i] for i in range(len(requests))]


def _row(prompt: Any, text: Text) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "completion": text.text,
        "completion_ids": text.tokens,
        "truncated": not text.terminated,
        "logprob": sum(report.logprob for report in text.reports),
        "base_logprob": sum(report.base_logprob for report in text.reports),
    }


def _show(model: ValueModel, written: Text) -> None:
    """The text coloured by advantage (green: better than V, red: worse), then its figures."""
    assert model.tokenizer is not None
    console, text = output_console(), Coloured()
    table = Table("token", "q", "v", "advantage", "base p", "p")
    most = max([abs(r.advantage or 0.0) for r in written.reports], default=0.0)
    for piece, report in zip(model.tokenizer.pieces(written.tokens), written.reports, strict=True):
        text.append(piece, style=shade(report.advantage or 0.0, most))
        figures = (report.q, report.v, report.advantage)
        chances = (math.exp(report.base_logprob), math.exp(report.logprob))
        cells = ["–" if x is None else f"{x:+.3f}" for x in figures]
        cells += [f"{p:.3f}" for p in chances]
        table.add_row(Coloured(repr(piece)[1:-1]), *cells)
    console.print(text)
    console.print(table)


@dataclass(frozen=True)
class ScoreConfig(SourceOptions):
    """V, Q and A of given texts, ranked within each prompt."""

    model: str
    """Directory of the model: its own values are read, where no others are named."""
    data: list[str] = field(default_factory=list)
    """Files of rows; their rewards are shown but not looked at."""
    output: str | None = None
    """Directory for scores.jsonl and summary.json; new or empty."""
    show: int = 50
    """Rows of the table."""


def score(config: ScoreConfig) -> dict[str, Any]:
    """Judge texts by Σ A, which is the expected return less what the prompt already promised.

    Of values that know whole turns only, by Q of the last token less V of the prompt.
    """
    if not config.data:
        raise QvgptError("--data: missing")
    model, values = config.load(config.model)
    guide = Guide.of(model, values)
    if guide.source is None or model.tokenizer is None:
        raise QvgptError(
            f"{config.model}: has no value heads to score with; --value_models or --contrast name "
            "other values"
        )
    guide.refuse_to_judge(whole=True)
    texts, _ = load_trajectories(config.data, model.tokenizer)
    too_long = sum(len(t.tokens) > guide.context for t in texts)
    if too_long:
        context = guide.context
        raise QvgptError(f"{too_long} of {len(texts)} texts are longer than the context, {context}")
    warn_of_unknown([t.tokens for t in texts], model)
    output = _claim(config.output, "score", config)
    of_turns = values is None and model.info.level == "turn"
    rows: list[dict[str, Any]] = []
    for text, found in zip(texts, scoring.score(model, texts, values=values), strict=True):
        first, last = found.reports[0], found.reports[-1]
        better = found.advantage
        if of_turns and last.q is not None and first.v is not None:
            better = last.q - first.v  # within a turn nothing is known
        rows.append({
            "prompt": model.tokenizer.decode(text.prompt),
            "completion": model.tokenizer.decode(text.tokens[len(text.prompt) :]),
            "v": first.v, "q": last.q, "advantage": better,
            "logprob": found.base_logprob, "reward": text.total_reward,
        })  # fmt: skip
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, text in enumerate(texts):
        groups.setdefault(text.prompt, []).append(i)
    ranked = []
    for group in groups.values():
        group.sort(key=lambda i: -rows[i]["advantage"])
        ranked += [{"rank": k, **rows[i]} for k, i in enumerate(group, 1)]
    print_summary({"texts, best of each prompt first": ranked[: config.show]}, output_console())
    if output is not None:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ranked)
        (output / "scores.jsonl").write_text(lines, "utf-8")
    mean = sum(row["advantage"] for row in rows) / len(rows)
    summary = {
        "values": describe(guide.source),
        "texts": len(rows),
        "prompts": len(groups),
        "mean_advantage": mean,
    }
    _finish(output, summary)
    return summary


@dataclass(frozen=True, kw_only=True)
class ExportConfig(ExportOptions):
    """A guided model, or its values, for engines that know nothing of them."""

    model: str
    """Directory of the model."""
    output: str
    """Directory for the export; new or empty."""
    data: str | None = None
    """A file of rows, held out from training, whose prompts the fidelity is measured after; needed
    where values are not linear and have to be fitted. None: after the first token alone."""
    max_prompts: int = 256
    """How many of them are taken."""


def export(config: ExportConfig) -> dict[str, Any]:
    """Write the export and say how faithful it is."""
    prompts: list[list[int]] = []
    if config.data is not None:
        model = ValueModel.from_pretrained(config.model)
        _, prompts = load_prompts(config.data, model, 1, config.max_prompts)
    options = {name: getattr(config, name) for name in ExportOptions.__dataclass_fields__}
    summary = export_model(config.model, config.output, ExportOptions(**options), prompts=prompts)
    off = summary["fidelity"].get("recommended_kl")
    if off is not None and off > _FAR:
        left_out = ", ".join(f"{k} {v}" for k, v in summary["not_in_the_weights"].items())
        print(
            f"{config.model}: recommends {left_out}, which no weights hold: without, the export is "
            f"{off:.2f} nats a token from what is recommended; with a smaller --beta it is nearer",
            file=sys.stderr,
        )
    _finish(Path(config.output), summary)
    return summary


def _claim(output: str | None, command: str, config: Any) -> Path | None:

    return None if output is None else open_run(output, command, config)


def _finish(output: Path | None, summary: dict[str, Any]) -> None:

    if output is not None:
        write_json(output / "summary.json", summary)
        print(f"written to {output}", file=sys.stderr)
