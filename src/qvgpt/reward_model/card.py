"""The model card of a reward model."""

from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qvgpt.model_card import files_table, front_matter, table

_LEARNED = {
    "classes": "to tell classes of text apart",
    "scores": "to give a text a number",
    "preferences": "to tell which of two texts is better (Bradley & Terry)",
}


def model_card(config: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    """README.md of its directory; `config` and `summary` are those of its JSON files."""
    source = config["model"]
    begun = "from scratch" if source is None else f"from `{Path(source).name}`"
    return "\n\n".join(
        [
            f"{front_matter('text-classification')}\n# A reward model",
            f"Trained {begun} by `qvgpt reward-model` {version('qvgpt')} "
            f"{_LEARNED[summary['kind']]}. All settings are in run.json, all figures in "
            "summary.json, their course in log.jsonl.",
            f"## Use\n{_use(summary)}",
            f"## Data\n{_data(config, summary)}",
            f"## Training\n{table(_settings(config, summary))}",
            "## Figures\nOn the held-out examples; intervals are 95 %, bootstrapped over them.\n\n"
            + table(_figures(summary["held_out"])),
            "## Limits\n" + "\n".join(f"- {line}" for line in _limits(config, summary)),
        ]
    ) + "\n"  # fmt: skip


def _use(summary: Mapping[str, Any]) -> str:
    labels = summary["data"].get("of_label")
    specs = [f"classifier:DIR#{name}" for name in labels] if labels else ["classifier:DIR"]
    return (
        "Plain, where this directory is `path`:\n```python\n"
        "from transformers import AutoModelForSequenceClassification, AutoTokenizer\n\n"
        "model = AutoModelForSequenceClassification.from_pretrained(path)\n"
        "tokenizer = AutoTokenizer.from_pretrained(path)\n```\n\n"
        "As a reward of `qvgpt collect`, or as the judge of `qvgpt evaluate`, where this directory "
        f"is DIR: {', '.join(f'`{spec}`' for spec in specs)}."
    )


def _data(config: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    learned, held = summary["data"], summary["eval_data"]
    said = [f"{learned['examples']:,} examples to learn from{_of_labels(learned)}; "]
    if held["files"] == learned["files"]:
        said.append(f"{held['examples']:,} of the same files")
    else:
        said.append(f"{held['examples']:,} of the files below the others")
    said.append(f"{_of_labels(held)}, held out")
    if held["files"] == learned["files"]:
        said.append(f" by a hash of the text (`eval_share` {config['eval_share']:g})")
    files = list(learned["files"])
    files += [file for file in held["files"] if file not in files]
    return f"{''.join(said)}.\n\n{files_table(files)}"


def _of_labels(counts: Mapping[str, Any]) -> str:
    of = ", ".join(f"{name} {n:,}" for name, n in counts.get("of_label", {}).items())
    return f" ({of})" if of else ""


def _settings(config: Mapping[str, Any], summary: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    rates = config["rates"]
    yield "architecture", summary["model_type"]
    yield "parameters", f"{summary['parameters']:,}"
    yield "vocabulary", summary["vocab_size"]
    yield "read of a row", config["reads"]
    yield "longest text, tokens", summary["max_length"]
    yield "optimizer steps, the step kept", f"{summary['steps']}, {summary['best_step']}"
    yield (
        "texts a step, learning rate, seed",
        f"{rates['batch_size']}, {summary['lr']:g}, {config['seed']}",
    )
    yield "SHA-256 of the weights", f"`{summary['sha256']}`"


def _figures(held: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """Those that are numbers, with their interval where they have one, and recalls."""
    for name, value in held.items():
        if name == "recall":
            yield from ((f"recall of {label}", f"{x:.4g}") for label, x in value.items())
        elif name != "examples" and isinstance(value, int | float):
            low, high = held.get(f"{name}_ci95", (None, None))
            interval = "" if low is None else f" [{low:.4g}, {high:.4g}]"
            yield name.replace("_", " "), f"{value:.4g}{interval}"


def _limits(config: Mapping[str, Any], summary: Mapping[str, Any]) -> Iterable[str]:
    yield (
        "A model that was trained to please this judge is not to be judged by it: it has learned "
        "the judge's mistakes too."
    )
    yield "The held-out examples stopped the training, so that their figures flatter a little."
    yield "It holds for texts like those it learned from; what others are worth it may not know."
    if summary["cut"]:
        yield (
            f"It reads the first {summary['max_length']} tokens of a text; {summary['cut']:,} of "
            "the texts above may be longer."
        )
    if summary["kind"] == "preferences":
        yield "Only differences of its values mean something, between texts of one prompt."
    if config["reads"] == "completion":
        yield "It does not see the prompt."
