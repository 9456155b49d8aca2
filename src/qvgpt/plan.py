"""`train --dry_run`: what a training will need, found by trying its heaviest batch.

Memory is measured, not computed: attention kernels, chunked losses and allocators make formulas
wrong by factors. On a CPU it is the resident set of the process (Linux lets its peak begin anew),
on a GPU what torch's allocator reserved. What is certain beforehand is told apart from the rest:

    peak = program + weights (+ slow trunk) + gradients + optimizer state + activations
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from torch import nn

from qvgpt.errors import QvgptError
from qvgpt.fit_options import FitOptions
from qvgpt.loop import Training
from qvgpt.memory import available_memory, begin_peak, held_memory, peak_memory, return_freed
from qvgpt.models.gpt import GPT
from qvgpt.models.value_model import ValueModel
from qvgpt.objectives import Objectives
from qvgpt.trajectory import Trajectory, TrajectoryBatch

MIB = 2**20
_TEXTS_SEARCHED = 2_000_000  # for the heaviest batch, some seconds; of more, the longest texts
_SLACK = 0.95  # of the available memory may be planned with: other programs move, too


def plan(
    model: ValueModel,
    data: Sequence[Trajectory],
    objectives: Objectives,
    options: FitOptions,
    eval_data: Sequence[Trajectory] = (),
    console: Console | None = None,
) -> dict[str, Any]:
    """Train a few steps on the heaviest batch and say what the whole run needs, in MiB and hours.

    Writes nothing, but moves the weights of `model`. Where one long text already shows that the
    heaviest batch would not fit, that is not tried: `measured` is then false, the activations are
    those of one text times the tokens.
    """
    console = console or Console(stderr=True)
    loaded = peak_memory(torch.device("cpu"))  # reading data may need more than training on them
    training = Training(model, data, objectives, options, eval_data)
    device = training.accelerator.device
    available = available_memory(device)
    step = _heaviest_step(training)
    micro_batches = training.my_batches(data, step.indices, options.micro_batch_size)
    heaviest = max(micro_batches, key=_padded)
    # with the gradients of another micro-batch there already, as in the middle of a step
    tried = [*[b for b in micro_batches if b is not heaviest][:1], heaviest]
    try:
        program, one_text, static = _try_one_text(training, step.indices)
    except torch.OutOfMemoryError:
        raise QvgptError(
            f"not even one text fits into the {available / MIB:,.0f} MiB of {device}: take a "
            "smaller model, lora or freeze_trunk"
        ) from None
    forecast = program + sum(static.values()) + one_text * _padded(heaviest)
    seconds = eval_seconds = 0.0
    measured = forecast <= _SLACK * available
    peak = int(forecast)
    if measured:
        try:
            peak, seconds, eval_seconds = _try(training, tried)
        except torch.OutOfMemoryError:  # more than one text let expect
            measured = False
    activations = max(0, peak - program - sum(static.values()))
    peak = max(peak, loaded) if device.type == "cpu" else peak
    seconds *= step.padded_mean / sum(map(_padded, tried))
    evaluations = training.total_steps // (options.eval_every or training.steps_per_epoch) + 1
    hours = (seconds * training.total_steps + eval_seconds * evaluations) / 3600
    memory = {"program": program, **static, "activations": activations}
    fits = measured and peak <= _SLACK * available
    advice = [] if fits else _advice(training, heaviest, static, activations, peak - available)
    found = {
        "fits": fits,
        "measured": measured,
        "device": str(device),
        "parameters": _parameters(model),
        "memory_mib": {name: round(size / MIB, 1) for name, size in memory.items()},
        "predicted_peak_mib": round(peak / MIB, 1),
        "available_mib": round(available / MIB, 1),
        "heaviest_batch": {"texts": len(heaviest.action), "padded_tokens": _padded(heaviest)},
        "steps": training.total_steps,
        "seconds_per_step": seconds if measured else None,
        "predicted_hours": hours if measured else None,
        "advice": advice,
    }
    console.print(_verdict(found), soft_wrap=True)
    return found


def _verdict(found: dict[str, Any]) -> str:
    sizes = f"{found['predicted_peak_mib']:,.0f} of {found['available_mib']:,.0f} MiB"
    if not found["fits"]:
        best = [f"; what saves most: {a['change']} ({a['note']})" for a in found["advice"][:1]]
        return f"does not fit: {sizes}{''.join(best)}"
    return f"fits: {sizes}; about {found['predicted_hours']:.2g} hours"


# ── the heaviest batch ───────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Step:
    indices: list[int]
    """The texts of the step with the heaviest micro-batch."""
    padded_mean: float
    """Padded tokens of a step, in the mean."""


def _heaviest_step(training: Training) -> _Step:
    """Of all steps to come: batches are a pure function of seed and epoch."""
    options, rows = training.options, training.rows

    def weight(indices: Sequence[int]) -> tuple[int, int]:
        return rows.padded_tokens(indices), len(indices)

    heaviest, most, total, steps, epoch = [], (0, 0), 0, 0, 0
    while steps < training.total_steps and epoch * len(rows.lengths) < _TEXTS_SEARCHED:
        found = rows.batches(options.batch_size, options.seed, epoch)
        for indices in found[: training.total_steps - steps]:
            parts = training.my_parts(indices, options.micro_batch_size)
            total += sum(weight(part)[0] for part in parts)
            worst = max(map(weight, parts))
            if worst > most:
                heaviest, most = indices, worst
            steps += 1
        epoch += 1
    if steps < training.total_steps:
        longest = sorted(range(len(rows.lengths)), key=lambda i: -rows.lengths[i])
        heaviest = longest[: options.batch_size]
    return _Step(heaviest, total / steps)


def _padded(batch: TrajectoryBatch) -> int:
    return batch.tokens.numel()


# ── trying ───────────────────────────────────────────────────────────────────────────────────


def _try_one_text(training: Training, indices: Sequence[int]) -> tuple[int, float, dict[str, int]]:
    """Bytes of the program, activations per token, and the certain rest, from the longest text.

    The first of two steps loads what is loaded on first use, and makes the optimizer's state.
    """
    device = training.accelerator.device
    longest_first = sorted(indices, key=lambda i: -training.rows.lengths[i])
    of_one = (training.collate([training.data[i]]) for i in longest_first)
    text = next((b for b in of_one if bool(b.mask.any())), training.collate([training.data[0]]))
    training.learn([text])
    static = _static(training)
    return_freed()
    before = held_memory(device)
    begin_peak(device)
    training.learn([text])
    one_text = max(0, peak_memory(device) - before - static["gradients"]) / _padded(text)
    there = sum(size for name, size in static.items() if name != "gradients")
    program = max(0, before - there)
    return program, one_text, static


def _try(training: Training, micro_batches: list[TrajectoryBatch]) -> tuple[int, float, float]:
    """Peak of two steps and an evaluation; seconds of a step and of all evaluation batches."""
    device = training.accelerator.device
    begin_peak(device)
    started = 0.0
    for _ in range(2):
        started = time.perf_counter()
        training.learn(micro_batches)
    seconds = time.perf_counter() - started
    eval_seconds = 0.0
    if counting := [b for b in training.eval_batches if bool(b.mask.any())]:
        heaviest = max(counting, key=_padded)
        started = time.perf_counter()
        training.model.eval()
        with torch.no_grad():
            training.measure([heaviest], learn=False)
        share = sum(map(_padded, training.eval_batches)) / _padded(heaviest)
        eval_seconds = (time.perf_counter() - started) * share
    return peak_memory(device), seconds, eval_seconds


def _static(training: Training) -> dict[str, int]:
    """Bytes that follow from the model alone, once there is a step behind it."""
    state = training.optimizer.state
    tensors = [t for of_one in state.values() for t in of_one.values()]
    weights = [*training.bare.parameters(), *training.bare.buffers()]
    slow = training.bare.slow
    copied = {"slow_trunk": sum(w.nbytes for w in slow.state_dict().values())} if slow else {}
    return {
        "weights": sum(w.nbytes for w in weights),
        **copied,
        "gradients": sum(p.nbytes for p in state),
        "optimizer": sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor)),
    }


def _parameters(model: ValueModel) -> dict[str, dict[str, int]]:
    parts = {"trunk": model.trunk}
    if model.heads is not None:
        parts |= {"q": model.heads.q, "v": model.heads.v, "slow_targets": model.heads.target_q}
    found, counted = {}, set[nn.Parameter]()  # heads may share some
    for name, part in parts.items():
        own = [p for p in part.parameters() if p not in counted]
        counted.update(own)
        found[name] = {
            "trainable": sum(p.numel() for p in own if p.requires_grad),
            "frozen": sum(p.numel() for p in own if not p.requires_grad),
        }
    return found


# ── advice ───────────────────────────────────────────────────────────────────────────────────


def _advice(
    training: Training,
    heaviest: TrajectoryBatch,
    static: dict[str, int],
    activations: int,
    missing: int,
) -> list[dict[str, Any]]:
    """What would save memory, best first, with rough numbers of what it saves.

    The shares of the activations were measured on small GPTs (8 layers of 256, batches of 32).
    """
    model, options = training.bare, training.options
    texts, longest = len(heaviest.action), heaviest.tokens.size(1)
    found: list[tuple[str, float, str]] = []
    if texts > 1:
        room = 1 - missing / max(activations, 1)  # the share of the activations that fits
        size = max(1, min(texts - 1, int(texts * room * 0.9)))
        saved = activations * (1 - size / texts)
        found.append((f"fit.micro_batch_size: {size}", saved, "the same result, a little slower"))
    if longest > 2:
        found.append((f"max_length: {longest // 2}", activations / 2, "drops or cuts longer texts"))
    if not options.bf16:
        found.append(("fit.bf16: true", 0.3 * activations, "activations only"))
    trunk: Any = model.trunk
    trained = sum(p.nbytes for p in trunk.parameters() if p.requires_grad)
    if trained and not options.gradient_checkpointing:
        saved = 0.6 * activations
        found.append(("fit.gradient_checkpointing: true", saved, "a third more time"))
    if trained and trunk.lora is None and not isinstance(trunk, GPT):
        found.append(("lora: {rank: 16}", 3 * trained, "a new run"))
    if trained and training.objectives.teaches_values:
        saved = 3 * trained + 0.7 * activations  # gradients, two moments
        found.append(("freeze_trunk: true", saved, "a new run, from a trained model; values only"))
    if options.slow_trunk:
        saved = static["slow_trunk"] + 0.1 * activations
        found.append(("fit.slow_trunk: false", saved, "slow targets of the heads alone"))
    if model.heads is not None and model.heads.config.kind in ("linear", "mlp"):
        matrix: Any = model.heads.q[0].weight
        rank = min(64, matrix.size(1))
        copies = 5 * model.heads.config.num_q  # weight, gradient, two moments, slow target
        saved = copies * matrix.nbytes * (1 - rank / matrix.size(1))
        found.append((f"heads: {{kind: low_rank, rank: {rank}}}", saved, "a new run"))
    return [
        {"change": change, "saves_mib": round(saved / MIB, 1), "note": note}
        for change, saved, note in sorted(found, key=lambda f: -f[1])
        if saved >= MIB
    ]
