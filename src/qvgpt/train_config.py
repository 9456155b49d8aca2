"""What `train` can be told."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from qvgpt.data.sizes import GPTShape, TokenizerConfig
from qvgpt.fit_options import FitOptions
from qvgpt.models.backbone import Dtype
from qvgpt.models.heads_config import HeadsConfig
from qvgpt.models.lora import LoraConfig

FITTED = {
    "gpt": ("embed_dim", "num_heads", "num_layers", "seq_len"),
    "tokenizer": ("vocab_size",),
    "fit": ("epochs", "lr", "value_lr"),
}
"""What follows from the data where it is not said."""


@dataclass(frozen=True)
class TrainConfig:
    """Train a model on text (LM), or teach it what text is worth (ILQL, MonteCarlo)."""

    data: list[str]
    """Files of rows: .jsonl, .csv, or a directory that `datasets` saved."""
    output: str
    """Directory for the model, its card README.md, log.jsonl, checkpoints and summary.json; new or
    empty."""
    eval_data: list[str] = field(default_factory=list)
    """Files of rows to evaluate on while training."""
    model: str | None = None
    """Directory of the model to start from; none: a GPT from scratch. Its value heads, if any, are
    left out of the result where the trunk is trained without teaching them (LM, AWAC, AWR)."""
    gpt: GPTShape = field(default_factory=GPTShape)
    """Shape of a GPT from scratch. What is not said of it, of the vocabulary, of epochs and rates
    follows from the data, is printed, and stands in run.json."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """Tokenizer of a GPT from scratch; a model to start from brings its own."""
    objectives: list[str | dict[str, Any]] = field(default_factory=lambda: ["LM"])
    """What to learn: LM, AWAC, AWR, MonteCarlo, SARSA, ILQL, DoubleQ, ReturnDistribution, FUDGE,
    ControlledDecoding, PathConsistency, QSFT, or several, with options and weights."""
    heads: HeadsConfig | None = None
    """Value heads, where the objectives learn values and the model has none yet."""
    centred: bool = False
    """Count returns from the mean of a prompt's texts: learn which of them are better, not how
    hard the prompt is. Values then are differences to that mean, and the model says so."""
    reward_scale: float | None = None
    """Multiply rewards by this, to learn from numbers of about 1; none: what the values to start
    from were learned with, else 1. It is kept with the model and undone where values are read, so
    that beta stays in the rewards' own units. All options here that are in units of reward
    (temperature, min_return, eta, heads.low and high) are in the multiplied ones."""
    freeze_trunk: bool = False
    """Leave the language model as it is and train the value heads only."""
    dtype: Dtype = "float32"
    """Of the weights of the model to start from, in memory and in the result; auto: as they are
    stored. Other than float32 only with lora or freeze_trunk; the value heads are float32."""
    lora: LoraConfig | None = None
    """Train low-rank adapters in the place of the language model (needs a model and the extra
    `peft`). The result is merged; the adapters alone lie in `adapter`, for peft."""
    fit: FitOptions = field(default_factory=FitOptions)
    """How to train."""
    max_length: int | None = None
    """Longest text in tokens; none: the model's context."""
    on_too_long: Literal["error", "drop", "cut"] = "error"
    """What to do with longer texts; cut drops those whose reward sits on a cut-off token."""
    resume: bool = False
    """Go on from the newest checkpoint in output."""
    accept_changes: bool = False
    """Go on although settings, data or tokenizer are not those the run began with."""
    dry_run: bool = False
    """Write nothing: try the heaviest batch and say what memory and time the training needs."""


def as_begun(config: TrainConfig, begun: Any) -> TrainConfig:
    """What is left open is what these settings of a run, if there is one, say."""
    sections: dict[str, Any] = {}
    for section, names in FITTED.items():
        own, known = getattr(config, section), begun.get(section) if begun else None
        if isinstance(known, dict):
            left = [name for name in names if getattr(own, name) is None]
            numbers = {name: x for name in left if isinstance(x := known.get(name), int | float)}
            sections[section] = replace(own, **numbers)
    return replace(config, **sections)
