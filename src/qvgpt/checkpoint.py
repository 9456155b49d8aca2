"""Checkpoints of a run, in safetensors and JSON: staged, synced, renamed, so never half there."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from qvgpt.errors import QvgptError
from qvgpt.models.gpt import load_tensors, read_json
from qvgpt.models.value_model import ValueModel


def save_checkpoint(
    directory: Path, model: ValueModel, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> Path:
    """Write `directory/step-N` in one piece (N = state["step"]), then drop older ones."""
    final = directory / f"step-{state['step']:08d}"
    staged = directory / f".staged-{final.name}"
    shutil.rmtree(staged, ignore_errors=True)
    model.save(staged)
    tensors, groups = _flatten(optimizer)
    tensors |= {f"rng.{name}": value for name, value in _random_state().items()}
    save_file(tensors, staged / "optimizer.safetensors")
    record = {"state": state, "param_groups": groups}
    (staged / "trainer.json").write_text(json.dumps(record, indent=1) + "\n")
    replace_directory(staged, final)
    for older in sorted(directory.glob("step-*")):
        if older != final:
            shutil.rmtree(older)
    return final


def newest_checkpoint(directory: Path) -> Path | None:
    """The latest `step-N`, or None."""
    return max(directory.glob("step-*"), default=None)


def load_checkpoint(
    path: Path, model: ValueModel, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Put model, optimizer and random state back as they were; returns the saved state."""
    record = read_json(path / "trainer.json")
    saved = ValueModel.from_pretrained(path)
    try:
        model.load_state_dict(saved.state_dict())
    except RuntimeError as error:
        raise QvgptError(f"{path}: another model's checkpoint: {error}") from None
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
    return record["state"]


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
