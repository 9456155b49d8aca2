"""Checkpoints of a run, in safetensors and JSON: staged, synced, renamed, so never half there.

A manifest, written last, holds the size and SHA-256 of every file: what a broken disk or a careless
hand did to a checkpoint is noticed, and the one before it is taken. Random numbers need no place
here: every step draws its own from its number (`fit_options.step_seed`).
"""

import json
import os
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from qvgpt.errors import QvgptError
from qvgpt.models.artefact import load_trunk
from qvgpt.models.backbone import as_module
from qvgpt.models.disk import load_tensors, read_json, sha256, writing
from qvgpt.models.gpt import GPT
from qvgpt.models.lora import ADAPTER
from qvgpt.models.reference import SlowTrunk
from qvgpt.models.sharded import sharded_like, whole
from qvgpt.models.value_model import ValueModel

MANIFEST = "manifest.json"
_SLOW = "slow_trunk.safetensors"


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
    values: dict[str, float] = field(default_factory=dict)
    """What it found of the values: see `watch.Watch`."""
    data_sha256: str = ""
    """Of the texts trained on, as tokens with their rewards."""
    eval_sha256: str = ""
    """Of those evaluated on."""


def save_checkpoint(
    directory: Path,
    model: ValueModel,
    optimizer: Mapping[str, Tensor],
    state: TrainState,
    keep: int = 1,
    slow: SlowTrunk | None = None,
) -> Path:
    """Write `directory/step-N` in one piece (N = state.step), then drop all but the last `keep`.

    Those of later steps, which the run did not go on from, are dropped too: they are damaged.
    `optimizer` is what `optimizer_state` gives, `slow` the trunk's slow copy, where there is one.
    """

    def add(staged: Path) -> None:
        save_file(dict(optimizer), staged / "optimizer.safetensors")
        if slow is not None:
            tensors = {name: x.contiguous() for name, x in slow.state_dict().items()}
            save_file(tensors, staged / _SLOW)
        (staged / "trainer.json").write_text(json.dumps(asdict(state), indent=1) + "\n")

    final = step_directory(directory, state.step)
    earlier = sorted(path for path in directory.glob("step-*") if path < final)
    return save_model(directory, model, state.step, earlier[::-1][: keep - 1], add)


def save_best(directory: Path, model: ValueModel, step: int, checkpoints: Path) -> Path:
    """Write the artefact alone as `directory/step-N`; drop those that no checkpoint names as best.

    A run that is stopped goes on from a checkpoint, and may then find nothing better than it names.
    """
    named: list[Path] = []
    for path in checkpoints.glob("step-*"):
        with suppress(QvgptError, LookupError, TypeError, ValueError):  # a damaged one
            best_step = read_json(path / "trainer.json")["best_step"]
            named.append(step_directory(directory, best_step))
    return save_model(directory, model, step, named)


def parameter_names(model: ValueModel, optimizer: torch.optim.Optimizer) -> list[str]:
    """The names of the optimizer's parameters, in the order in which its state counts them.

    To be asked before the weights are sharded. By hand: torch.distributed.checkpoint.state_dict
    invents a state for parameters that have none (heads under LM alone), by a hidden optimizer
    step, and takes 0.4 s to import.
    """
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return [names[p] for p in _parameters(optimizer)]


def optimizer_state(names: Sequence[str], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's tensors, whole, by the names of the parameters.

    Where weights are sharded every process must ask.
    """
    return {
        f"{names[index]}.{key}": whole(torch.as_tensor(value)).contiguous()
        for index, entries in optimizer.state_dict()["state"].items()
        for key, value in entries.items()
    }


def save_model(
    directory: Path,
    model: ValueModel,
    step: int,
    keep: Collection[Path] = (),
    add: Callable[[Path], None] | None = None,
) -> Path:
    """Write the artefact alone as `directory/step-N` in one piece, then drop all others but `keep`.

    Raises `QvgptError` where the disk does not take it; those there before are then as they were.
    """
    final = step_directory(directory, step)
    staged = directory / f".staged-{final.name}"
    shutil.rmtree(staged, ignore_errors=True)
    try:
        with writing(final, "go on with --resume; what was saved before is whole"):
            model.save(staged, merged=False)
            if add is not None:
                add(staged)
            manifest = {
                str(f.relative_to(staged)): {"bytes": f.stat().st_size, "sha256": sha256(f)}
                for f in sorted(staged.rglob("*"))
                if f.is_file()
            }
            (staged / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
            replace_directory(staged, final)
    except QvgptError:
        shutil.rmtree(staged, ignore_errors=True)  # what there is no room for takes none
        raise
    spent = {*directory.glob("step-*")} - {final, *keep}
    for path in [*spent, *directory.glob(".staged-step-*")]:
        shutil.rmtree(path)
    return final


def step_directory(directory: Path, step: int) -> Path:
    """Where what belongs to a step lies."""
    return directory / f"step-{step:08d}"


def newest_checkpoint(directory: Path, say: Callable[[str], None] = lambda _: None) -> Path | None:
    """The latest `step-N` that is whole, or None where there is none at all.

    What is skipped is said, with the reason. Raises `QvgptError` where none of several is whole.
    """
    faults: list[str] = []
    for path in sorted(directory.glob("step-*"), reverse=True):
        found = fault(path)
        if found is None:
            for skipped in faults:
                say(f"skipped {skipped}")
            return path
        faults.append(f"{path}: {found}")
    if faults:
        raise QvgptError(f"no checkpoint is whole ({'; '.join(faults)}): train anew elsewhere")
    return None


def fault(path: Path) -> str | None:
    """What is wrong with the files of a checkpoint; None where they are as they were written."""
    try:
        manifest = read_json(path / MANIFEST)
        for name, said in manifest.items():
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != said["bytes"]:
                return f"{name} has {file.stat().st_size} bytes, not {said['bytes']}"
            if sha256(file) != said["sha256"]:
                return f"{name} was changed"
    except QvgptError as error:
        return str(error)
    except (OSError, KeyError, TypeError) as error:
        return f"{MANIFEST} cannot be followed: {error!r}"
    return None


def load_checkpoint(
    path: Path, model: ValueModel, names: Sequence[str], optimizer: torch.optim.Optimizer
) -> TrainState:
    """Put model and optimizer back as they were; returns the saved state.

    Rates and decays of the optimizer's groups stay as they are: they follow from the settings.
    """
    load_model(path, model)
    if model.slow is not None:
        model.slow.load_state_dict(load_tensors(path / _SLOW))
    put_optimizer_state(load_tensors(path / "optimizer.safetensors"), names, optimizer, path)
    return TrainState(**read_json(path / "trainer.json"))


def put_optimizer_state(
    tensors: Mapping[str, Tensor],
    names: Sequence[str],
    optimizer: torch.optim.Optimizer,
    path: Path,
) -> None:
    """Put back what `optimizer_state` gave; `path` is where it was read, for the error."""
    indices = {name: index for index, name in enumerate(names)}
    parameters = _parameters(optimizer)
    state: dict[int, dict[str, Tensor]] = {}
    for full, value in tensors.items():
        name, _, key = full.rpartition(".")
        if name not in indices:
            raise QvgptError(f"{path}: there {name} was trained, which now it is not")
        own = parameters[indices[name]]
        state.setdefault(indices[name], {})[key] = sharded_like(value, own)
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def load_model(path: Path, model: ValueModel) -> None:
    """Put the weights of an artefact into a model of the same shape."""
    if model.trunk.lora is not None:  # their base is in the model already, and stays as it is
        model.trunk.load_adapter(path / ADAPTER)
        trunk = model.trunk
    else:
        trunk = as_module(load_trunk(path, as_causal_lm=not isinstance(model.trunk, GPT)))
    saved = {f"trunk.{k}": v for k, v in trunk.state_dict().items()}
    heads = path / "value_heads.safetensors"
    if heads.exists():
        saved |= {f"heads.{k}": v for k, v in load_tensors(heads).items()}
    own = model.state_dict()
    try:
        model.load_state_dict({k: sharded_like(v, own.get(k, v)) for k, v in saved.items()})
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


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]
