"""Model cards: the README.md that lies beside weights, in the form of the Hugging Face Hub.

Exports and reward models have texts of their own (`export.card`, `reward_model.card`); what they
share, and the card of a training, is here. No card holds a time or a path: a training that was
stopped and goes on writes the same one.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qvgpt.models.disk import sha256, writing
from qvgpt.models.value_model import ValueModel

NAME, ASIDE = "README.md", "README.qvgpt.md"
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
    if file.exists() and _MARK not in file.read_text("utf-8", errors="replace"):
        file = directory / ASIDE
        say(f"{directory / NAME} is not ours and stays; the model card is {file}")
    head, _, rest = card.partition("\n#")
    staged = directory / f".{NAME}.staged"
    with writing(file, "go on with --resume"):
        text = f"{head}\n{_MARK}; keep this line, or the file is yours -->\n#{rest}"
        staged.write_text(text, "utf-8")
        os.replace(staged, file)


def files_of(paths: Sequence[str | Path]) -> list[dict[str, Any]]:
    """Name, bytes and SHA-256 of files; of a directory those of all files in it, by their names."""
    return [_file(Path(path)) for path in paths]


def _file(path: Path) -> dict[str, Any]:
    inner = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    sums = {str(p.relative_to(path)): sha256(p) for p in inner}
    lines = "".join(f"{found}  {name}\n" for name, found in sums.items())  # as sha256sum writes
    whole = sums["."] if path.is_file() else hashlib.sha256(lines.encode()).hexdigest()
    return {"name": path.name, "bytes": sum(p.stat().st_size for p in inner), "sha256": whole}


def training_card(config: Mapping[str, Any], summary: Mapping[str, Any], model: ValueModel) -> str:
    """The card of what `train` leaves: `config` and `summary` are those of its JSON files."""
    has_values = model.heads is not None
    title = "A language model with Q and V" if has_values else "A language model"
    begun = "from scratch" if config["model"] is None else f"from `{Path(config['model']).name}`"
    return "\n\n".join(
        [
            f"{front_matter('text-generation')}\n# {title}",
            f"Trained {begun} by `qvgpt train` {version('qvgpt')}. All settings are in run.json, "
            "all figures in summary.json, their course in log.jsonl.",
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
    lines = [f"| {cell(f['name'])} | {f['bytes']:,} | `{f['sha256']}` |" for f in counts["files"]]
    said = f"{counts['rows']:,} rows, {counts['trajectories']:,} texts {what}"
    if counts["too_long"]:
        said += f"; {counts['cut']:,} were cut and {counts['dropped']:,} dropped as too long"
    longest = f"the longest of all had {counts['longest']} tokens"
    return "\n".join(
        [f"{said}; {longest}.", "", "| file | bytes | SHA-256 |", "| --- | --- | --- |", *lines]
    )


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
        "Losses do not say what the texts are worth: `qvgpt evaluate` measures that, with 95 % "
        "intervals."
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
