"""LoRA through peft: low-rank adapters in a frozen model (Hu et al., 2021, arXiv:2106.09685).

    W′ = W + alpha / rank · B·A        B is 0 at the start: training begins at the base model

Adapters stay apart from W in memory, and in fp32 whatever W is in: bfloat16 has too few digits for
small steps. What is merged is a copy, so that saving changes nothing. On disk an adapter is peft's:
adapter_config.json and adapter_model.safetensors, never a pickle.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from qvgpt.errors import QvgptError, nearest
from qvgpt.models.disk import load_tensors
from qvgpt.models.sharded import sharded_like

ADAPTER = "adapter"
"""The directory of the adapter, within an artefact or a checkpoint."""
_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."  # before every name in peft's files
_NAME = "default"  # of the one adapter there is


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters to train in the place of the language model's own weights."""

    rank: int = 16
    """Rank of each adapter."""
    alpha: int = 32
    """Adapters are scaled by alpha / rank."""
    dropout: float = 0.0
    """Share of an adapter's inputs dropped while training."""
    target_modules: list[str] = field(default_factory=list)
    """Names of the layers to adapt, such as q_proj; none: all linear layers but the LM head."""

    def __post_init__(self) -> None:
        """Refuse what has no meaning, naming the key."""
        for name in ("rank", "alpha"):
            if getattr(self, name) < 1:
                raise QvgptError(f"lora.{name}: must be at least 1, not {getattr(self, name)}")
        if not 0 <= self.dropout < 1:
            raise QvgptError(f"lora.dropout: must be in [0, 1), not {self.dropout}")


def add_lora(model: Any, config: LoraConfig) -> None:
    """Put fresh adapters into a `transformers` model, in place; nothing else is trained from here.

    Draws from torch's generator. Raises `QvgptError` where peft is missing or a target is none.
    """
    try:
        import peft
    except ImportError:
        raise QvgptError(
            "peft is not installed: pip install 'qvgpt[peft]', or leave lora out"
        ) from None
    from transformers.pytorch_utils import Conv1D  # GPT-2's linear layers, stored [in, out]

    _refuse_targets(model, config.target_modules)
    ours = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=list(config.target_modules) or "all-linear",
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        base_model_name_or_path=model.name_or_path,
        task_type="CAUSAL_LM",
    )
    try:
        peft.inject_adapter_in_model(ours, model, _NAME)
    except ValueError as error:  # a target of a kind that peft cannot adapt
        raise QvgptError(f"lora.target_modules: {str(error).splitlines()[0]}") from None
    ours.target_modules = sorted(ours.target_modules or [])  # type: ignore[assignment]
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def _refuse_targets(model: Any, targets: list[str]) -> None:
    names = {name: module for name, module in model.named_modules() if name}
    fixed = (model.get_output_embeddings(), model.get_input_embeddings())
    for target in targets:
        found = [m for n, m in names.items() if n == target or n.endswith(f".{target}")]
        if not found:
            hint = nearest(target, {name.rpartition(".")[2] for name in names})
            raise QvgptError(f"lora.target_modules: the model has no {target!r}{hint}")
        if any(module in fixed for module in found):
            raise QvgptError(
                f"lora.target_modules: {target!r} is frozen, as embeddings and LM head always are"
            )


@torch.no_grad()
def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """The state of the plain model with W′ in the place of W; the model stays as it is."""
    from peft.tuners.lora import LoraLayer

    state = {
        name.replace(".base_layer.", "."): value
        for name, value in model.state_dict().items()
        if ".lora_" not in name
    }
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            weight = state[f"{name}.weight"]
            change: Any = layer.get_delta_weight(_NAME)  # type: ignore[operator]
            state[f"{name}.weight"] = (weight + change).to(weight.dtype)  # added in fp32
    return state


@contextmanager
def base_alone(model: nn.Module) -> Iterator[None]:
    """As long as this lasts, the model is without its adapters."""
    from peft.tuners.lora import LoraLayer

    layers: list[Any] = [m for m in model.modules() if isinstance(m, LoraLayer)]
    for layer in layers:
        layer._disable_adapters = True  # enable_adapters would unfreeze more on its way back
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def base_sha256(model: nn.Module) -> str:
    """Of the weights that adapters leave alone: adapters mean nothing on other ones."""
    found = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if ".lora_" not in name:
            flat = parameter.detach().cpu().contiguous().reshape(-1)
            found.update(flat.view(torch.uint8).numpy().data)
    return found.hexdigest()


def save_adapter(model: Any, path: Path, sha256: str) -> None:
    """Write the adapter in peft's format; `sha256` says of which base it is."""
    path.mkdir(parents=True, exist_ok=True)
    model.peft_config[_NAME].save_pretrained(path)
    state = {f"{_PREFIX}{k}": v.contiguous() for k, v in _adapter(model).items()}
    # one key: safetensors writes several in any order, and equal runs shall leave equal bytes
    save_file(state, path / _FILE, metadata={"base_sha256": sha256})


def load_adapter(model: nn.Module, path: Path, sha256: str) -> None:
    """Put a saved adapter into the model's own, in place.

    Raises `QvgptError` where it is missing, of another shape, or of another base than `sha256`.
    """
    saved, ours = load_tensors(path / _FILE), _adapter(model)
    with safe_open(path / _FILE, "pt") as file:  # type: ignore[no-untyped-call]
        base = (file.metadata() or {}).get("base_sha256")
    if base not in (None, sha256):
        raise QvgptError(
            f"{path}: was trained on another base model than there is now; restore it, or train "
            "anew elsewhere"
        )
    shapes = {f"{_PREFIX}{name}": value.shape for name, value in ours.items()}
    if {name: value.shape for name, value in saved.items()} != shapes:
        raise QvgptError(f"{path}: is the adapter of a model of another shape")
    with torch.no_grad():
        for name, value in ours.items():
            value.copy_(sharded_like(saved[f"{_PREFIX}{name}"], value))


def _adapter(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's own tensors, by the names that peft gives them on disk."""
    state = model.state_dict()
    return {k.replace(f".{_NAME}.", "."): v for k, v in state.items() if ".lora_" in k}
