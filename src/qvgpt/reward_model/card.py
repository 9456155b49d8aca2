"""The model card of a reward model."""

from collections.abc import Mapping
from typing import Any

from qvgpt.model_card import front_matter


def model_card(source: str | None, reads: str, summary: Mapping[str, Any]) -> str:
    """README.md of its directory, in the form of the Hugging Face Hub."""
    held, kind = summary["held_out"], summary["kind"]
    learned = {
        "classes": "to tell classes of text apart",
        "scores": "to give a text a number",
        "preferences": "to tell which of two texts is better (Bradley & Terry)",
    }[kind]
    begun = "from scratch" if source is None else f"from `{source}`"
    figures = {k: v for k, v in held.items() if isinstance(v, int | float)}
    lines = [
        front_matter("text-classification"),
        "# Reward model",
        f"A {summary['model_type']} of {summary['parameters']:,} parameters, trained {begun} by "
        f"`qvgpt reward-model` {learned}, on {summary['data']['examples']:,} examples.",
        f"Of a prompt and a completion it reads: {reads}.",
        "",
        f"## Held-out figures ({held['examples']:,} examples)",
        *(f"- {name}: {value:.4g}" for name, value in figures.items() if name != "examples"),
        "",
        "They stopped the training, so they flatter a little. A model that was trained to please "
        "this judge is not to be judged by it.",
        "",
        "## Use",
        *(f"    --reward '{spec}'" for spec in summary["rewards"]),
        "",
        f"SHA-256 of the weights: {summary['sha256']}",
    ]
    return "\n".join(lines) + "\n"
