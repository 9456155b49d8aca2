"""How a training goes: its options, and what follows from them alone."""

import hashlib
import math
from dataclasses import dataclass, replace
from typing import Any

from qvgpt.errors import QvgptError
from qvgpt.models.value_model import ValueModel

_RATE = 1e-3
_TOKENS_SEEN = 14_000_000  # those of a translation model: 14 epochs of a million


@dataclass(frozen=True)
class FitOptions:
    """How to train; what to learn is said by the objectives."""

    epochs: float | None = None
    """Passes over the data. None: `train` takes as many as the amount of text asks for, from
    scratch 1 to 20, on from a model 1 to 3; `fit` in memory takes one."""
    max_steps: int | None = None
    """Stop after this many optimizer steps, whatever the epochs."""
    batch_size: int = 32
    """Texts per optimizer step."""
    micro_batch_size: int | None = None
    """Texts per forward; None: the whole batch at once."""
    packed: bool = False
    """Put several texts into a row, none seeing another, and shuffle without regard to length.
    Off: a text a row, batches of similar lengths."""
    share_prompts: bool = False
    """Put a prompt's texts into one row that holds it once: for several texts of each prompt. A
    batch then holds all texts of a few prompts."""
    lr: float | None = None
    """Peak learning rate of the trunk. None: in `train` 1e-3 at a width of 256 from scratch, and of
    64 on from a model, in inverse proportion to it (at most 4e-3, 1e-3), with lora ten times as
    much (at most 1e-3); in `fit` 1e-3."""
    value_lr: float | None = None
    """Peak learning rate of the value heads; None: that of the trunk (where `train` fits it, 1e-3
    if that is more)."""
    weight_decay: float = 0.01
    """AdamW's decay, on the trunk's matrices only."""
    warmup: float = 0.05
    """Share of the steps over which the rate rises."""
    final_lr: float = 0.1
    """Where the cosine ends, as a share of the peak."""
    clip: float = 1.0
    """Largest gradient norm."""
    tau: float = 0.005
    """Rate of the slow targets, per optimizer step."""
    slow_trunk: bool = False
    """Let the slow Q heads read a slow copy of the trunk too, which follows at the same rate: a
    target that stands stiller, for one more copy of the trained weights and one more forward."""
    dropout: float | None = None
    """Share of activations dropped while training; None: as the model's shape says."""
    bf16: bool = False
    """Autocast to bfloat16; the value heads stay in fp32."""
    compiled: bool = False
    """Compile the trunk's layers (torch.compile): slow to start, needs a C++ compiler on a CPU."""
    gradient_checkpointing: bool = False
    """Compute the trunk's activations anew in the backward pass: less memory, a third more time."""
    eval_every: int | None = None
    """Steps between evaluations; None: once an epoch."""
    save_every: int | None = None
    """Steps between checkpoints; None: at evaluations, at most once a minute."""
    keep: int = 2
    """Checkpoints to keep: should the last one be damaged, the one before it is taken."""
    keep_best: str | None = None
    """An eval loss part (such as LM/nll) or `total`: the model of its lowest value is kept."""
    patience: int | None = None
    """Stop after this many evaluations without a better one (needs keep_best)."""
    seed: int = 0
    """Of initial weights, data order and dropout."""
    tensorboard: bool = False
    """Write TensorBoard events beside the log."""

    def __post_init__(self) -> None:
        """Refuse what has no meaning, naming the key."""
        least = {"max_steps": 1, "batch_size": 1, "micro_batch_size": 1, "eval_every": 1,
                 "save_every": 1, "keep": 1, "patience": 1, "warmup": 0, "final_lr": 0, "tau": 0,
                 "weight_decay": 0, "lr": 0, "value_lr": 0, "dropout": 0}  # fmt: skip
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and not low <= value < math.inf:
                raise QvgptError(f"fit.{name}: must be at least {low}, not {value}")
        for name in ("epochs", "clip"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise QvgptError(f"fit.{name}: must be more than 0, not {value}")
        for name in ("warmup", "tau", "dropout"):
            if (getattr(self, name) or 0) > 1:
                raise QvgptError(f"fit.{name}: must be at most 1, not {getattr(self, name)}")
        if self.packed and self.share_prompts:
            raise QvgptError("fit: packed and share_prompts are two ways to fill a row: choose one")
        if self.patience and not self.keep_best:
            raise QvgptError("fit.patience: needs fit.keep_best, to know what is better")

    @property
    def passes(self) -> float:
        """Epochs, or the one that `fit` takes where nothing is said."""
        return 1.0 if self.epochs is None else self.epochs

    def fitted_to(
        self, texts: int, tokens: int, width: int, *, from_scratch: bool, adapters: bool = False
    ) -> "FitOptions":
        """With epochs and rates for so many texts of so many tokens, and a trunk of that width.

        From scratch a model sees 14 million tokens, in 1 to 20 epochs; on from a model 400 batches,
        in 1 to 3.
        """
        if from_scratch:
            epochs = max(1.0, min(20.0, _TOKENS_SEEN / max(tokens, 1)))
            lr = min(4e-3, _RATE * 256 / width)
        else:
            epochs = max(1.0, min(3.0, 400 * self.batch_size / max(texts, 1)))
            lr = min(_RATE, _RATE * 64 / width * (10 if adapters else 1))
        value_lr = self.value_lr
        if value_lr is None and self.lr is None:
            value_lr = max(_RATE, float(f"{lr:.2g}"))
        return replace(
            self,
            epochs=float(round(epochs)) if self.epochs is None else self.epochs,
            lr=float(f"{lr:.2g}") if self.lr is None else self.lr,
            value_lr=value_lr,
        )


def step_seed(seed: int, step: int, process: int) -> int:
    """The random state of a step, 64 bits: a resumed run drops what it would have dropped.

    Hashed, for generators seeded with neighbouring numbers may be alike.
    """
    digest = hashlib.sha256(f"{seed} {step} {process}".encode()).digest()
    return int.from_bytes(digest[:8])


def learning_rate_factor(step: int, total: int, options: FitOptions) -> float:
    """Linear warm-up, then a cosine down to `final_lr`."""
    warmup = max(1, round(options.warmup * total))
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return options.final_lr + (1 - options.final_lr) * cosine


def parameter_groups(model: ValueModel, options: FitOptions) -> list[dict[str, Any]]:
    """The optimizer's groups with their peak rates: the trunk's matrices, its rest, heads."""
    lr = _RATE if options.lr is None else options.lr
    value_lr = lr if options.value_lr is None else options.value_lr
    trunk = [p for p in model.trunk.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trunk if p.dim() >= 2], "weight_decay": options.weight_decay},
        {"params": [p for p in trunk if p.dim() < 2], "weight_decay": 0.0},
    ]
    for group in groups:
        group |= {"lr": lr, "peak_lr": lr}
    if model.heads is not None:
        params = [p for p in model.heads.parameters() if p.requires_grad]
        groups.append({"params": params, "weight_decay": 0.0, "lr": value_lr, "peak_lr": value_lr})
    return [g for g in groups if g["params"]]
