"""Checkpoints of a run, in safetensors and JSON: staged, synced, renamed, so never half there."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from qvgpt.errors import QvgptError
from qvgpt.models.gpt import GPT, load_tensors, read_json
from qvgpt.models.value_model import ValueModel


@dataclass
class TrainState:
    """How far a training is, beside the tensors."""

    step: int = 0
    """Optimizer steps done."""
    best: float | None = None
    """The lowest value so far of what `keep_best` names."""
    best_step: int = 0
    """Where it was found."""
    bad_evals: int = 0
    """Evaluations since."""
    tokens: int = 0
    seconds: float = 0.0
    eval: dict[str, float] = field(default_factory=dict)
    """The last evaluation."""


def save_checkpoint(
    directory: Path, model: ValueModel, optimizer: torch.optim.Optimizer, state: TrainState
) -> Path:
    """Write `directory/step-N` in one piece (N = state.step), then drop the others."""
    tensors, groups = _flatten(optimizer)
    tensors |= {f"rng.{name}": value for name, value in _random_state().items()}
    record = {"state": asdict(state), "param_groups": groups}

    def add(staged: Path) -> None:
        save_file(tensors, staged / "optimizer.safetensors")
        (staged / "trainer.json").write_text(json.dumps(record, indent=1) + "\n")

    return save_model(directory, model, state.step, add)


def save_model(
    directory: Path, model: ValueModel, step: int, add: Callable[[Path], None] | None = None
) -> Path:
    """Write the artefact alone as `directory/step-N` in one piece, then drop the other steps."""
    final = directory / f"step-{step:08d}"
    staged = directory / f".staged-{final.name}"
    shutil.rmtree(staged, ignore_errors=True)
    model.save(staged)
    if add is not None:
        add(staged)
    replace_directory(staged, final)
    for other in [*directory.glob("step-*"), *directory.glob(".staged-step-*")]:
        if other != final:
            shutil.rmtree(other)
    return final


def newest_checkpoint(directory: Path) -> Path | None:
    """The latest `step-N`, or None."""
    return max(directory.glob("step-*"), default=None)


def load_checkpoint(path: Path, model: ValueModel, optimizer: torch.optim.Optimizer) -> TrainState:
    """Put model, optimizer and random state back as they were; returns the saved state."""
    record = read_json(path / "trainer.json")
    load_model(path, model)
    tensors = load_tensors(path / "optimizer.safetensors")
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, _, key = name.partition(".")
        if index != "rng":
            state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": record["param_groups"]})
    torch.set_rng_state(tensors["rng.cpu"])
    if "rng.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng.cuda"])
    return TrainState(**record["state"])


def load_model(path: Path, model: ValueModel) -> None:
    """Put the weights of an artefact into a model of the same shape."""
    saved = {f"trunk.{k}": v for k, v in GPT.load(path).state_dict().items()}
    heads = path / "value_heads.safetensors"
    if heads.exists():
        saved |= {f"heads.{k}": v for k, v in load_tensors(heads).items()}
    try:
        model.load_state_dict(saved)
    except RuntimeError:
        raise QvgptError(f"{path}: is the checkpoint of a model of another shape") from None


def replace_directory(staged: Path, final: Path) -> None:
    """Sync every file of `staged` to disk, then rename it to `final`, replacing that."""
    for file in [f for f in staged.rglob("*") if f.is_file()]:
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    if final.exists():
        shutil.rmtree(final)
    staged.rename(final)
    descriptor = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _random_state() -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _flatten(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], list[Any]]:
    content = optimizer.state_dict()
    tensors = {
        f"{index}.{key}": torch.as_tensor(value).contiguous()
        for index, entries in content["state"].items()
        for key, value in entries.items()
    }
    return tensors, content["param_groups"]
