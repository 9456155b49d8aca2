"""The training loop: trajectories and objectives in, a model directory out.

`fit` trains a model on trajectories in memory; `train` is the command around it, from files to
files. Distribution, device and precision are Accelerate's.
"""

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console

from qvgpt.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint
from qvgpt.errors import QvgptError
from qvgpt.models.value_model import ValueModel
from qvgpt.objectives import Loss, Objectives
from qvgpt.run import RunProgress
from qvgpt.trajectory import Trajectory, TrajectoryBatch, collate


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
    bf16: bool = False
    """Autocast to bfloat16; the value heads stay in fp32."""
    eval_every: int | None = None
    """Steps between evaluations; None: once an epoch."""
    save_every: int | None = None
    """Steps between checkpoints; None: at each evaluation."""
    keep_best: str | None = None
    """An eval loss part (such as LM/nll) or `total`: the model of its lowest value is kept."""
    patience: int | None = None
    """Stop after this many evaluations without a better one (needs keep_best)."""
    seed: int = 0
    """Of data order and dropout."""
    tensorboard: bool = False
    """Write TensorBoard events beside the log."""


def batches(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Indices of each batch of one epoch: shuffled, yet of similar lengths within a batch.

    A pure function of its arguments, so that a resumed run goes on where it stopped.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(lengths), generator=generator).tolist()
    window = 64 * batch_size
    chunks = []
    for start in range(0, len(order), window):
        part = sorted(order[start : start + window], key=lambda i: lengths[i])
        chunks += [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
    shuffled = torch.randperm(len(chunks), generator=generator).tolist()
    return [chunks[i] for i in shuffled]


class _Run:
    """The state of one `fit`: everything the loop touches, in one place."""

    def __init__(
        self,
        model: ValueModel,
        data: Sequence[Trajectory],
        objectives: Objectives,
        options: FitOptions,
        eval_data: Sequence[Trajectory],
    ):
        if not data:
            raise QvgptError("the data set is empty: there is nothing to train on")
        if objectives.learns_values and model.heads is None:
            raise QvgptError("the objectives learn values, but the model has no value heads")
        if options.keep_best and not eval_data:
            raise QvgptError("keep_best needs evaluation data")
        self.data, self.eval_data = data, eval_data
        self.objectives, self.options = objectives, options
        self.lengths = [len(t.tokens) for t in data]
        self.steps_per_epoch = math.ceil(len(data) / options.batch_size)
        total = math.ceil(options.epochs * self.steps_per_epoch)
        self.total_steps = min(total, options.max_steps or total)
        self.accelerator = Accelerator()
        self.pad_id, self.end_ids = 0, ()
        if model.tokenizer is not None:
            template = model.tokenizer.template
            self.pad_id, self.end_ids = template.pad, tuple(template.end_ids)
        torch.manual_seed(options.seed)
        optimizer = torch.optim.AdamW(
            _parameter_groups(model, options), betas=(0.9, 0.95), fused=True
        )
        self.bare = model
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.step, self.best, self.bad_evals = 0, math.inf, 0

    def collate(self, texts: Sequence[Trajectory]) -> TrajectoryBatch:
        batch = collate(texts, self.pad_id, self.end_ids)
        if not bool(batch.mask.any()):
            raise QvgptError(f"step {self.step + 1}: no decision in the whole batch counts")
        return batch.to(self.accelerator.device)

    def optimizer_steps(self) -> Iterator[list[TrajectoryBatch]]:
        """The micro-batches of each step still to come."""
        while self.step < self.total_steps:
            epoch, position = divmod(self.step, self.steps_per_epoch)
            order = batches(self.lengths, self.options.batch_size, self.options.seed, epoch)
            for indices in order[position:]:
                size = self.options.micro_batch_size or len(indices)
                parts = [indices[i : i + size] for i in range(0, len(indices), size)]
                yield [self.collate([self.data[i] for i in part]) for part in parts]
                if self.step >= self.total_steps:
                    return

    def loss(self, batch: TrajectoryBatch) -> Loss:
        # not Accelerator(mixed_precision=...): that is global to the process and set once
        kind = self.accelerator.device.type
        with torch.autocast(kind, torch.bfloat16, enabled=self.options.bf16):
            values = self.model(batch, self.objectives.needs)
        return self.objectives(values, batch)

    def learn(self, micro_batches: list[TrajectoryBatch]) -> dict[str, float]:
        """One optimizer step; returns the loss parts."""
        self.model.train()
        counts = [float(b.mask.sum()) for b in micro_batches]
        parts: dict[str, float] = {}
        for batch, count in zip(micro_batches, counts, strict=True):
            share = count / sum(counts)  # every decision weighs the same, however it is split
            loss = self.loss(batch)
            found = {"total": loss.total.detach(), **loss.parts}
            for name, value in found.items():
                parts[name] = parts.get(name, 0.0) + share * float(value)
            self.stop_if_not_finite(parts)
            self.accelerator.backward(share * loss.total)
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.options.clip)
        parts["grad_norm"] = float(norm) if norm is not None else math.nan
        self.stop_if_not_finite(parts)
        factor = learning_rate_factor(self.step, self.total_steps, self.options)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.bare.heads is not None and self.objectives.learns_values:
            self.bare.heads.update_targets(self.options.tau)
        self.step += 1
        return parts

    def stop_if_not_finite(self, parts: dict[str, float]) -> None:
        bad = [name for name, value in parts.items() if not math.isfinite(value)]
        if bad:
            raise QvgptError(
                f"step {self.step + 1}: {', '.join(bad)} became NaN or infinite; "
                "lower the learning rate or look at the rewards with `qvgpt check`"
            )

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Loss parts over the evaluation data, per decision."""
        self.model.eval()
        order = sorted(range(len(self.eval_data)), key=lambda i: len(self.eval_data[i].tokens))
        sums: dict[str, float] = {}
        weight = 0.0
        size = 2 * (self.options.micro_batch_size or self.options.batch_size)
        for start in range(0, len(order), size):
            batch = self.collate([self.eval_data[i] for i in order[start : start + size]])
            loss = self.loss(batch)
            count = float(batch.mask.sum())
            weight += count
            for name, value in {"total": loss.total, **loss.parts}.items():
                sums[name] = sums.get(name, 0.0) + count * float(value)
        return {name: value / weight for name, value in sums.items()}


def fit(
    model: ValueModel,
    data: Sequence[Trajectory],
    objectives: Objectives,
    options: FitOptions,
    *,
    eval_data: Sequence[Trajectory] = (),
    output: Path | None = None,
    resume: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Train `model` in place and return a summary (steps, tokens/s, last and best losses).

    With `output`, writes log.jsonl, checkpoints and, at the end, the model itself there; where
    `keep_best` is set the model of the best evaluation is what is left in `model` and on disk.
    """
    run = _Run(model, data, objectives, options, eval_data)
    model.info.objectives = objectives.as_list()
    model.info.gamma = min([getattr(o, "gamma", 1.0) for _, o in objectives.terms])
    checkpoints = output / "checkpoints" if output else None
    if checkpoints is not None and resume and (newest := newest_checkpoint(checkpoints)):
        state = load_checkpoint(newest, model, run.optimizer)
        run.step, run.best, run.bad_evals = state["step"], state["best"], state["bad_evals"]
    eval_every = options.eval_every or run.steps_per_epoch
    save_every = options.save_every or eval_every
    last_eval: dict[str, float] = {}
    best_state: dict[str, torch.Tensor] | None = None
    started = time.perf_counter()
    tokens_seen = 0
    with RunProgress(run.total_steps, run.step, output, options.tensorboard, console) as progress:
        for micro_batches in run.optimizer_steps():
            parts = run.learn(micro_batches)
            tokens_seen += sum(int(b.attention_mask.sum()) for b in micro_batches)
            progress.step(run.step, parts, tokens_seen / (time.perf_counter() - started))
            if eval_data and (run.step % eval_every == 0 or run.step == run.total_steps):
                last_eval = run.evaluate()
                progress.log(run.step, {f"eval/{k}": v for k, v in last_eval.items()}, show=True)
                if options.keep_best and _improves(run, last_eval):
                    best_state = {k: v.clone() for k, v in model.state_dict().items()}
                    if output is not None:
                        model.save(output / "best")
                if options.patience and run.bad_evals >= options.patience:
                    break
            if checkpoints is not None and run.step % save_every == 0:
                state = {"step": run.step, "best": run.best, "bad_evals": run.bad_evals}
                save_checkpoint(checkpoints, model, run.optimizer, state)
    seconds = time.perf_counter() - started
    if options.keep_best and best_state is None and output is not None and (output / "best").exists():
        best_state = ValueModel.from_pretrained(output / "best").state_dict()
    if best_state is not None:
        model.load_state_dict(best_state)
    model.eval()
    return {
        "steps": run.step,
        "seconds": round(seconds, 2),
        "tokens_per_second": round(tokens_seen / max(seconds, 1e-9), 1),
        "eval": last_eval,
        "best": run.best if math.isfinite(run.best) else None,
    }


def _improves(run: _Run, found: dict[str, float]) -> bool:
    name = run.options.keep_best
    if name not in found:
        raise QvgptError(f"keep_best: no loss part {name!r}; there are {', '.join(found)}")
    if found[name] < run.best:
        run.best, run.bad_evals = found[name], 0
        return True
    run.bad_evals += 1
    return False


def learning_rate_factor(step: int, total: int, options: FitOptions) -> float:
    """Linear warm-up, then a cosine down to `final_lr`."""
    warmup = max(1, round(options.warmup * total))
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return options.final_lr + (1 - options.final_lr) * cosine


def _parameter_groups(model: ValueModel, options: FitOptions) -> list[dict[str, Any]]:
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
        groups.append(
            {"params": params, "weight_decay": 0.0, "lr": value_lr, "peak_lr": value_lr}
        )
    return [g for g in groups if g["params"]]


def options_as_dict(options: FitOptions) -> dict[str, Any]:
    """JSON-ready."""
    return json.loads(json.dumps(asdict(options)))
