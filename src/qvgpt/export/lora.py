"""Guidance as an adapter of peft on the LM head: its strength is chosen when it is used.

    logits = W·h + (lora_alpha / r)·B·A·h       lora_alpha = β·r

The directory is the adapter's; the unguided model lies in `base`, its LM head untied, for an engine
that ties it could not tell the two apart.
"""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from qvgpt.errors import QvgptError
from qvgpt.export.hf import load_language_model

BASE = "base"
Factors = tuple[Float[Tensor, "vocab rank"], Float[Tensor, "rank embed"]]
"""B and A."""


def import_peft() -> Any:
    """The package; a hint where it is missing."""
    try:
        import peft
    except ImportError:
        raise QvgptError(
            "an adapter is in peft's format, which is not installed: pip install 'qvgpt[peft]'"
        ) from None
    return peft


def save_adapter(factors: Factors, beta: float, directory: Path) -> None:
    """Write the adapter for the model in `directory/base`."""
    peft, (up, down) = import_peft(), factors
    alpha = beta * len(down)
    config = peft.LoraConfig(
        r=len(down),
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,
        target_modules=["lm_head"],
        task_type="CAUSAL_LM",
        base_model_name_or_path=BASE,
        inference_mode=True,
    )
    config.save_pretrained(directory)
    name = "base_model.model.lm_head.lora_{}.weight"
    tensors = {name.format("A"): down.float(), name.format("B"): up.float()}
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})


@torch.no_grad()
def load_adapted(directory: Path) -> Any:
    """Base model and adapter, as peft puts them together; its scale is the exported β."""
    loaded = import_peft().PeftModel.from_pretrained(
        load_language_model(directory / BASE), directory
    )
    return loaded.get_base_model().eval()
