"""Model cards: the README.md that lies beside weights, in the form of the Hugging Face Hub.

Exports and reward models have texts of their own (`export.card`, `reward_model.card`); what they
share, the card of a training and what an evaluation adds to it, is here. No card holds a time or a
path: a training that was stopped and goes on writes the same one.
"""

import hashlib
import os
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qvgpt.errors import QvgptError
from qvgpt.models.disk import sha256, writing
from qvgpt.models.value_model import ValueModel

NAME, ASIDE = "README.md", "README.qvgpt.md"
_EVALUATION = "## Evaluation"
_EVALUATED = ("<!-- by qvgpt evaluate -->", "<!-- until here -->")
"""What stands between them is replaced by the next evaluation."""
_MARK = "<!-- written by qvgpt"


def front_matter(task: str | None = None) -> str:
    """The YAML head that the Hub reads; `task` is its `pipeline_tag`."""
    tag = [] if task is None else [f"pipeline_tag: {task}"]
    return "\n".join(["---", "library_name: transformers", *tag, "tags: [qvgpt]", "---"])


def table(rows: Iterable[tuple[str, Any]]) -> str:
    """Two columns, without a head; numbers to four digits."""
    shown = ((name, f"{x:.4g}" if isinstance(x, float) else str(x)) for name, x in rows)
    lines = [f"| {cell(name)} | {cell(x)} |" for name, x in shown]
    return "\n".join(["| | |", "| --- | --- |", *lines])


def cell(text: str) -> str:
    """What stands in a table: `|` would end it there."""
    return text.replace("|", "\\|")


def write_card(directory: Path, card: str, say: Callable[[str], None]) -> None:
    """Write a card in one piece; somebody else's README.md stays, and the card lies beside it."""
    file = directory / NAME
    if file.exists() and not _is_ours(file):
        file = directory / ASIDE
        say(f"{directory / NAME} is not ours and stays; the model card is {file}")
    head, _, rest = card.partition("\n#")
    _write(file, f"{head}\n{_MARK}; keep this line, or the file is yours -->\n#{rest}")


def _write(file: Path, text: str) -> None:
    staged = file.with_name(f".{NAME}.{os.getpid()}-{threading.get_ident()}.staged")
    with writing(file, "go on with --resume"):
        staged.write_text(text, "utf-8")
        os.replace(staged, file)


def _is_ours(file: Path) -> bool:
    return _MARK in file.read_text("utf-8", errors="replace")


def card_of(directory: Path) -> Path | None:
    """The card that qvgpt wrote there; None where there is none, whatever else there is."""
    files = (directory / name for name in (NAME, ASIDE))
    return next((file for file in files if file.is_file() and _is_ours(file)), None)


def add_evaluation(directory: Path, section: str) -> None:
    """Put an evaluation into the card of a model, in the place of an earlier one.

    Raises `QvgptError` where `card_of` finds none.
    """
    file = card_of(directory)
    if file is None:
        raise QvgptError(f"{directory}: holds no model card that qvgpt wrote")
    _write(file, with_evaluation(file.read_text("utf-8", errors="replace"), section))


def with_evaluation(card: str, section: str) -> str:
    """The card with this section as its only evaluation, before its limits where it has some."""
    begin, end = _EVALUATED
    card = re.sub(rf"\n{begin}\n.*?\n{end}\n", "", card, flags=re.DOTALL)
    head, limits, rest = card.partition("\n## Limits\n")
    return f"{head.rstrip()}\n\n{begin}\n{section}\n{end}\n{limits}{rest}"


def evaluation_section(summary: Mapping[str, Any]) -> str:
    """What summary.json of `evaluate` says of a model, for its card; Markdown."""
    rows, base = summary["rows"], summary["base"]
    said = (
        f"By `qvgpt evaluate` {version('qvgpt')}, seed {rows[0]['seed']}: {summary['prompts']:,} "
        f"prompts of {_name(summary['data'])} (SHA-256 `{summary['data_sha256']}`); "
        f"texts a prompt where sampled: {summary['samples']}. The base is "
        + ("the model itself, unguided" if base is None else f"`{_name(base)}`")
        + ". Intervals are 95 %, bootstrapped over prompts; differences are to the base at the "
        "same temperature, paired by prompt."
    )
    judges = ", ".join(f"`{judge}`" for judge in summary["judged_by"])
    notes = [f"The judge's weights have the SHA-256 {judges}."] if judges else []
    notes += [
        f"{_metric(name)} gave the rewards that the model learned from: it is no evidence."
        for name in summary["judges_trained_on"]
    ]
    if summary["recommended"] is not None:
        notes.append("The recommended guidance was chosen by these figures, so that the best of "
                     "them flatters a little.")  # fmt: skip
    return evaluation(" ".join([said, *notes]), summary["metric"], rows)


def evaluation(said: str, metric: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """The section of methods compared: how, in words, and the rows as summary.json has them."""
    names = [metric, "difference", *rows[0].get("metrics", {})]
    lines = [
        f"| {' | '.join(cell(x) for x in ('method', *map(_metric, names)))} |",
        "| --- " * (len(names) + 1) + "|",
    ]
    for row in rows:
        found = [
            _interval(row["mean"], row["ci95"]),
            _interval(row["delta"], row["delta_ci95"]),
            *(_interval(of["value"], of["ci95"]) for of in row.get("metrics", {}).values()),
        ]
        lines.append(f"| {' | '.join([cell(row['method']), *found])} |")
    return "\n".join([_EVALUATION, said, "", *lines])


def _interval(value: float, ci95: Sequence[float]) -> str:
    return f"{value:.4g} [{ci95[0]:.4g}, {ci95[1]:.4g}]"


def _name(path: str) -> str:
    """What a file or directory is called, wherever it lies."""
    return Path(os.path.abspath(path)).name


def _metric(name: str) -> str:
    """A reward without the way to its classifier, program or schema."""
    name = re.sub(r"\bcommand:\S*/(?=[^/\s])", "command:", name)  # arguments stay
    return re.sub(r"\b(classifier|json):[^#*]*/(?=[^/#])", r"\1:", name)


def files_of(paths: Sequence[str | Path]) -> list[dict[str, Any]]:
    """Name, bytes and SHA-256 of files; of a directory those of all files in it, by their names."""
    return [_file(Path(path)) for path in paths]


def _file(path: Path) -> dict[str, Any]:
    inner = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    sums = {str(p.relative_to(path)): sha256(p) for p in inner}
    lines = "".join(f"{found}  {name}\n" for name, found in sums.items())  # as sha256sum writes
    whole = sums["."] if path.is_file() else hashlib.sha256(lines.encode()).hexdigest()
    return {"name": path.name, "bytes": sum(p.stat().st_size for p in inner), "sha256": whole}


def training_card(
    config: Mapping[str, Any],
    summary: Mapping[str, Any],
    model: ValueModel,
    command: str = "train",
    record: str = "run.json",
) -> str:
    """The card of what a training leaves: `config` and `summary` are those of its JSON files.

    `record` is where its settings are, `command` what was run.
    """
    has_values = model.heads is not None
    title = "A language model with Q and V" if has_values else "A language model"
    begun = "from scratch" if config["model"] is None else f"from `{Path(config['model']).name}`"
    return "\n\n".join(
        [
            f"{front_matter('text-generation')}\n# {title}",
            f"Trained {begun} by `qvgpt {command}` {version('qvgpt')}. All settings are in "
            f"{record}, all figures in summary.json, their course in log.jsonl.",
            *_use(model),
            "## Data",
            _data("trained on", summary["data"]),
            *([_data("evaluated on", summary["eval_data"])] if summary["eval_data"] else []),
            f"## Training\n{table(_settings(config, summary, model))}",
            f"## Figures\n{_figures(summary)}",
            "## Limits\n" + "\n".join(f"- {line}" for line in _limits(summary, model)),
        ]
    ) + "\n"  # fmt: skip


def _use(model: ValueModel) -> list[str]:
    parts = [
        "## Use",
        "Plain, where this directory is `path`:\n```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        "model = AutoModelForCausalLM.from_pretrained(path)\n"
        "tokenizer = AutoTokenizer.from_pretrained(path)\n```",
    ]
    if model.tokenizer is not None and model.tokenizer.template.sep is not None:
        parts.append(
            "It read prompts as <bos>prompt<sep>"
            + (", dialogues by its chat template" if model.info.dialogues else "")
            + "; qvgpt writes these tokens by itself, others are to be given them."
        )
    if model.heads is None:
        return parts
    return [
        *parts,
        "Guided by its values, π ∝ π₀·exp(β·A):\n```sh\nqvgpt generate path --prompt '…' --beta 8"
        "\n```\nβ is in 1 / units of reward; `qvgpt evaluate … --recommend` finds one and writes "
        "it to value_config.json, where it is used if nothing is said. In Python "
        "`qvgpt.ValueModel.from_pretrained(path)`; for other engines `qvgpt export`.",
    ]


def _data(what: str, counts: Mapping[str, Any]) -> str:
    said = f"{counts['rows']:,} rows, {counts['trajectories']:,} texts {what}"
    if counts["too_long"]:
        said += f"; {counts['cut']:,} were cut and {counts['dropped']:,} dropped as too long"
    longest = f"the longest of all had {counts['longest']} tokens"
    return f"{said}; {longest}.\n\n{files_table(counts['files'])}"


def files_table(files: Iterable[Mapping[str, Any]]) -> str:
    """What `files_of` found."""
    lines = [f"| {cell(f['name'])} | {f['bytes']:,} | `{f['sha256']}` |" for f in files]
    return "\n".join(["| file | bytes | SHA-256 |", "| --- | --- | --- |", *lines])


def _settings(
    config: Mapping[str, Any], summary: Mapping[str, Any], model: ValueModel
) -> Iterable[tuple[str, Any]]:
    trunk, fit, heads = model.trunk, config["fit"], model.heads
    for entry in summary["objectives"]:
        for name, options in entry.items():
            said = ", ".join(f"{k} {v}" for k, v in options.items() if v is not None)
            yield f"objective {name}", said
    yield "optimizer steps", summary["steps"]
    yield "texts a step, learning rate, seed", f"{fit['batch_size']}, {fit['lr']:g}, {fit['seed']}"
    yield "layers, width, context", f"{len(list(trunk.blocks))}, {trunk.embed_dim}, {trunk.seq_len}"
    yield "vocabulary", summary["vocab_size"]
    yield "parameters", ", ".join(f"{k} {n:,}" for k, n in summary["parameters"].items())
    if config["lora"]:
        yield "adapters", f"LoRA of rank {config['lora']['rank']}, merged; alone in `adapter`"
    if heads is not None:
        yield "heads", f"{heads.config.num_q} × Q {heads.config.kind}, V {heads.config.v}"
        yield "language model", "frozen" if config["freeze_trunk"] else "trained along"
        yield "values learned with reward scale", f"{heads.reward_scale:g}"


def _figures(summary: Mapping[str, Any]) -> str:
    if not summary["eval"]:
        return "None: no `eval_data` were given."
    rows = [(f"loss {name}", float(x)) for name, x in summary["eval"].items()]
    values = {name: x for name, x in summary["values"].items() if "/" not in name}  # no tenths
    rows += [(f"values: {name}", float(x)) for name, x in values.items()]
    kept = "at the last evaluation"
    if summary["best"] is not None:
        kept += f"; the model kept is that of step {summary['best_step']} ({summary['best']:.4g})"
    return f"On the evaluation texts, {kept}. Training gives no intervals.\n\n{table(rows)}"


def _limits(summary: Mapping[str, Any], model: ValueModel) -> Iterable[str]:
    yield (
        "Losses do not say what the texts are worth: `qvgpt evaluate … --card true` measures that, "
        "with 95 % intervals, and writes it here."
    )
    if summary["best"] is not None:
        yield "The evaluation texts chose the step that is kept, so their figures flatter a little."
    if model.heads is None:
        yield "It has no values of its own; others with the same tokenizer can guide it."
        return
    info = model.info
    yield (
        "Values hold for texts like those they were learned from; they may be wrong about tokens "
        "nobody wrote there: a large β finds these, unless `min_p` or `top_k` bounds it."
    )
    if info.level != "token":
        yield "Decisions are whole turns: Q ranks texts and guides no token."
    if info.centred:
        yield "Values are differences to the mean of a prompt's texts, no returns."
    if info.judged_by:
        yield (
            "It learned from rewards of these reward models, which are no judges of it: "
            + ", ".join(f"`{judge}`" for judge in info.judged_by)
        )


def adapter_card(model: ValueModel) -> str:
    """The card of the adapter of a model that learned by LoRA, which lies in the model's directory.

    How to read it is said for peft; what it learned from is in the card of that directory.
    """
    trunk, lora = model.trunk, model.trunk.lora
    base = Path(trunk.model.name_or_path).name or "a model in memory"
    settings = [
        ("rank, alpha, dropout", f"{lora.rank}, {lora.alpha}, {lora.dropout:g}"),
        ("layers", ", ".join(lora.target_modules) or "all linear ones but the LM head"),
        ("base", base),
        ("SHA-256 of the base's weights in memory", f"`{trunk.base_sha256}`"),
    ]
    guided = (
        "\n\nIt was trained along with value heads, which lie beside the merged model: guided, "
        "`qvgpt generate DIR --prompt '…' --beta 8` with that directory."
        if model.heads is not None
        else ""
    )
    return "\n\n".join(
        [
            "---\nlibrary_name: peft\npipeline_tag: text-generation\ntags: [qvgpt, lora]\n---\n"
            "# A LoRA adapter",
            f"Trained by qvgpt {version('qvgpt')}. The directory above holds the same merged, with "
            "data, settings and figures of the training in its README.md; take that along.",
            "## Use",
            "Plain, where `base` is the directory of the base and `path` this one:\n```python\n"
            "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
            "model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), path)\n"
            f"```{guided}",
            f"## Settings\n{table(settings)}",
            "## Limits\n- It means nothing on other weights than those of its base.\n"
            "- Its tokenizer and its template of prompts are those of the directory above.",
        ]
    ) + "\n"  # fmt: skip
