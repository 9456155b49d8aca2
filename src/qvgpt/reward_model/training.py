"""The loop: batches of like length, early stop on the held-out loss, the best model kept.

Accelerate places and steps; the rest of Hugging Face's Trainer is not needed for a model that
trains in minutes, and its checkpoints hold pickles.
"""

import hashlib
import json
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Float
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor, nn

from qvgpt.checkpoint import (
    TrainState,
    optimizer_state,
    put_optimizer_state,
    replace_directory,
)
from qvgpt.data.batches import batches
from qvgpt.envs.rewards.classifier import encode
from qvgpt.errors import QvgptError
from qvgpt.fit_options import FitOptions, learning_rate_factor, step_seed
from qvgpt.models.disk import load_tensors, read_json, writing
from qvgpt.reward_model.examples import Examples, Kind
from qvgpt.reward_model.judged import judged, loss
from qvgpt.run import Interruption, RunProgress


@dataclass(frozen=True)
class Rates:
    """How a reward model trains."""

    epochs: float = 4.0
    """Passes over the data, at most."""
    patience: int = 2
    """Stop after so many evaluations without a lower loss."""
    evals_per_epoch: int = 2
    """Evaluations in each pass."""
    batch_size: int = 32
    """Examples per step."""
    lr: float | None = None
    """Peak learning rate; none: 5e-4 from scratch, 3e-5 from a given model."""
    weight_decay: float = 0.01
    """AdamW's, on matrices only."""
    warmup: float = 0.06
    """Share of the steps over which the rate rises; it then falls by a cosine, to a tenth."""
    clip: float = 1.0
    """Largest gradient norm."""
    bf16: bool = False
    """Autocast to bfloat16."""

    def __post_init__(self) -> None:
        """Refuse what has no meaning, naming the key."""
        for name in ("epochs", "patience", "evals_per_epoch", "batch_size", "clip"):
            if not getattr(self, name) > 0:
                raise QvgptError(f"rates.{name}: must be above 0, not {getattr(self, name)}")
        if not 0 <= self.warmup <= 1 or (self.lr is not None and not self.lr > 0):
            raise QvgptError("rates: warmup lies in 0..1, and lr above 0")


class Training:
    """A reward model in training.

    Scores are learned as deviations from their mean in units of their standard deviation; the
    result says them in their own units.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        sides: tuple[Examples, Examples],
        rates: Rates,
        lr: float,
        seed: int,
        max_length: int,
    ):
        """`sides` are the examples to learn from and those held out."""
        self.accelerator = Accelerator()
        if self.accelerator.num_processes > 1:
            raise QvgptError("reward-model: runs in one process; several are not supported")
        self.kind: Kind = sides[0].kind
        self.labels = sides[0].labels
        self.tokenizer, self.rates, self.lr, self.seed = tokenizer, rates, lr, seed
        self.max_length = max_length
        self.learned, self.held = (self._encoded(side) for side in sides)
        self.targets, self.held_targets = (
            torch.tensor([e.target for e in side.items]) for side in sides
        )
        self.mean, self.scale = 0.0, 1.0
        if self.kind == "scores":
            self.mean = float(self.targets.mean())
            self.scale = float(self.targets.std(correction=0)) or 1.0
        decayed = {n: p for n, p in model.named_parameters() if p.dim() >= 2}
        plain = {n: p for n, p in model.named_parameters() if p.dim() < 2}
        self.names = [*decayed, *plain]
        groups = [
            {"params": [*decayed.values()], "weight_decay": rates.weight_decay},
            {"params": [*plain.values()], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=lr)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        learned, held = map(_digest, sides)
        self.state = TrainState(data_sha256=learned, eval_sha256=held)
        self.best: dict[str, Tensor] = {}
        self.order: list[list[int]] = []
        self.each_epoch = -(-len(self.learned) // rates.batch_size)
        self.total = max(1, round(rates.epochs * self.each_epoch))
        self.eval_every = max(1, round(self.each_epoch / rates.evals_per_epoch))

    @property
    def cut(self) -> int:
        """How many texts of both sides are as long as the limit, so that it may have cut them."""
        every = [ids for side in (self.learned, self.held) for texts in side for ids in texts]
        return sum(len(ids["input_ids"]) >= self.max_length for ids in every)

    def run(self, output: Path, resume: bool, console: Console) -> dict[str, Any]:
        """Train to the end, or on from a checkpoint; the model then is the best one."""
        checkpoint, state = output / "checkpoint", self.state
        if resume and (checkpoint / "state.json").exists():
            state = self._load(checkpoint)
        started = time.perf_counter() - state.seconds
        tokens, began = 0, time.perf_counter()
        with (
            RunProgress(self.total, state.step, output, console=console) as shown,
            Interruption() as interruption,
        ):
            while state.step < self.total and state.bad_evals < self.rates.patience:
                parts, read = self._learn()
                tokens += read
                shown.step(state.step, parts, tokens / (time.perf_counter() - began))
                at_eval = state.step % self.eval_every == 0 or state.step == self.total
                if at_eval:
                    self._evaluate(shown)
                state.seconds = time.perf_counter() - started
                if at_eval or interruption.asked:
                    self._save(checkpoint)
                if interruption.asked:
                    raise interruption.asked(f"; {checkpoint} holds it: go on with --resume")
        self.model.load_state_dict(self.best)
        self._in_own_units()
        return {
            "steps": state.step,
            "best_step": state.best_step,
            "seconds": round(state.seconds, 1),
            "held_out": judged(self.kind, self._of_held(), self.held_targets, self.labels),
        }

    def _encoded(self, side: Examples) -> list[list[dict[str, list[int]]]]:
        """The texts of each example as ids."""
        flat = [text for example in side.items for text in example.texts]
        ids = iter(encode(self.tokenizer, flat, self.max_length))
        return [[next(ids) for _ in example.texts] for example in side.items]

    def _logits(
        self, examples: Sequence[list[dict[str, list[int]]]]
    ) -> tuple[Float[Tensor, "texts labels"], int]:
        """Of all first texts, then all second ones; and how many tokens that took."""
        texts = [ids for column in zip(*examples, strict=True) for ids in column]
        padded = self.tokenizer.pad(texts, return_tensors="pt").to(self.accelerator.device)
        kind = self.accelerator.device.type
        with torch.autocast(kind, torch.bfloat16, enabled=self.rates.bf16):
            logits = self.model(**padded).logits
        return logits.float(), int(padded["attention_mask"].sum())

    def _scaled(self, targets: Float[Tensor, "examples"]) -> Float[Tensor, "examples"]:
        return (targets - self.mean) / self.scale

    def _learn(self) -> tuple[dict[str, float], int]:
        """One step: what there is to log, and the tokens read."""
        epoch, position = divmod(self.state.step, self.each_epoch)
        if position == 0 or not self.order:
            lengths = [max(len(ids["input_ids"]) for ids in texts) for texts in self.learned]
            self.order = batches(lengths, self.rates.batch_size, self.seed, epoch)
        chosen = self.order[position]
        torch.manual_seed(step_seed(self.seed, self.state.step, 0))
        self.model.train()
        logits, tokens = self._logits([self.learned[i] for i in chosen])
        targets = self._scaled(self.targets[chosen]).to(logits.device)
        found = loss(self.kind, logits, targets).mean()
        self.accelerator.backward(found)
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.rates.clip)
        parts = {
            "loss": float(found.detach()),
            "grad_norm": math.nan if norm is None else float(norm),
        }
        if not all(map(math.isfinite, parts.values())):
            raise QvgptError(f"step {self.state.step + 1}: the loss became NaN; lower rates.lr")
        schedule = FitOptions(warmup=self.rates.warmup)
        factor = learning_rate_factor(self.state.step, self.total, schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * factor
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.state.step += 1
        return parts, tokens

    @torch.no_grad()
    def _of_held(self) -> Float[Tensor, "texts labels"]:
        """The logits of the held-out examples: all first texts, then all second ones."""
        self.model.eval()
        order = sorted(range(len(self.held)), key=lambda i: len(self.held[i][0]["input_ids"]))
        count = len(self.held[0])
        found: list[list[Tensor]] = [[torch.empty(0)] * len(order) for _ in range(count)]
        for start in range(0, len(order), 64):
            part = order[start : start + 64]
            logits, _ = self._logits([self.held[i] for i in part])
            for side, rows in zip(found, logits.cpu().chunk(count), strict=True):
                for i, row in zip(part, rows, strict=True):
                    side[i] = row
        return torch.stack([row for side in found for row in side])

    def _evaluate(self, shown: RunProgress) -> None:
        """The held-out loss; what is the best so far is kept."""
        targets = self._scaled(self.held_targets)
        figures = judged(self.kind, self._of_held(), targets, self.labels)
        told = {f"eval/{k}": v for k, v in figures.items() if k in ("loss", "accuracy", "spearman")}
        shown.log(self.state.step, told, show=True)
        if not math.isfinite(figures["loss"]):
            raise QvgptError(
                f"step {self.state.step}: the held-out loss is no number any more: lower rates.lr"
            )
        if self.state.best is not None and figures["loss"] >= self.state.best:
            self.state.bad_evals += 1
            return
        self.state.best, self.state.best_step = figures["loss"], self.state.step
        self.state.bad_evals = 0
        self.best = {k: v.clone() for k, v in self.model.state_dict().items()}

    @torch.no_grad()
    def _in_own_units(self) -> None:
        """Let the last layer say scores as the data do."""
        if self.kind == "scores":
            linear = [m for m in self.model.modules() if isinstance(m, nn.Linear)]
            last = next(m for m in reversed(linear) if m.out_features == 1)
            last.weight.mul_(self.scale)
            last.bias.mul_(self.scale).add_(self.mean)

    def _save(self, checkpoint: Path) -> None:
        """Weights now and at their best, the optimizer and the state, in one piece."""
        staged = checkpoint.with_name(".checkpoint.staged")
        shutil.rmtree(staged, ignore_errors=True)
        with writing(checkpoint, "go on with --resume"):
            staged.mkdir()
            for name, weights in {"now": self.model.state_dict(), "best": self.best}.items():
                whole = {k: v.contiguous() for k, v in weights.items()}
                save_file(whole, staged / f"{name}.safetensors")
            optimizer = optimizer_state(self.names, self.optimizer)
            save_file(optimizer, staged / "optimizer.safetensors")
            (staged / "state.json").write_text(json.dumps(asdict(self.state)) + "\n")
            replace_directory(staged, checkpoint)

    def _load(self, checkpoint: Path) -> TrainState:
        state = TrainState(**read_json(checkpoint / "state.json"))
        for name in ("data_sha256", "eval_sha256"):
            if getattr(state, name) != getattr(self.state, name):
                which = "texts to learn from" if name == "data_sha256" else "held-out texts"
                raise QvgptError(
                    f"{checkpoint}: the {which} are no longer those that the run began with: "
                    "restore them, or train anew elsewhere"
                )
        self.model.load_state_dict(load_tensors(checkpoint / "now.safetensors"))
        self.best = load_tensors(checkpoint / "best.safetensors")
        tensors = load_tensors(checkpoint / "optimizer.safetensors")
        put_optimizer_state(tensors, self.names, self.optimizer, checkpoint)
        self.state = state
        return state


def _digest(examples: Examples) -> str:
    """SHA-256 of the texts and what was thought of them."""
    said = json.dumps([(e.texts, e.target) for e in examples.items])
    return hashlib.sha256(said.encode()).hexdigest()
