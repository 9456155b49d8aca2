"""How a training goes: its options, and what follows from them alone."""

import hashlib
import math
from dataclasses import dataclass
from typing import Any

from qvgpt.errors import QvgptError
from qvgpt.models.value_model import ValueModel


@dataclass(frozen=True)
class FitOptions:
    """How to train; what to learn is said by the objectives."""

    epochs: float = 1.0
    """Passes over the data."""
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
    lr: float = 1e-3
    """Peak learning rate of the trunk."""
    value_lr: float | None = None
    """Peak learning rate of the value heads; None: that of the trunk."""
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
            if not 0 < getattr(self, name) < math.inf:
                raise QvgptError(f"fit.{name}: must be more than 0, not {getattr(self, name)}")
        for name in ("warmup", "tau", "dropout"):
            if (getattr(self, name) or 0) > 1:
                raise QvgptError(f"fit.{name}: must be at most 1, not {getattr(self, name)}")
        if self.packed and self.share_prompts:
            raise QvgptError("fit: packed and share_prompts are two ways to fill a row: choose one")
        if self.patience and not self.keep_best:
            raise QvgptError("fit.patience: needs fit.keep_best, to know what is better")


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
    value_lr = options.lr if options.value_lr is None else options.value_lr
    trunk = [p for p in model.trunk.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trunk if p.dim() >= 2], "weight_decay": options.weight_decay},
        {"params": [p for p in trunk if p.dim() < 2], "weight_decay": 0.0},
    ]
    for group in groups:
        group |= {"lr": options.lr, "peak_lr": options.lr}
    if model.heads is not None:
        params = [p for p in model.heads.parameters() if p.requires_grad]
        groups.append({"params": params, "weight_decay": 0.0, "lr": value_lr, "peak_lr": value_lr})
    return [g for g in groups if g["params"]]
