"""JSON and safetensors from disk, where a fault is one clear error. Pickles are never read."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from qvgpt.errors import QvgptError


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or a `QvgptError` that names it."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise QvgptError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise QvgptError(f"{path}: broken JSON: {error}") from None
    if not isinstance(content, dict):
        raise QvgptError(f"{path}: a JSON object was expected")
    return content


def load_tensors(path: Path) -> dict[str, Tensor]:
    """A safetensors file, or a `QvgptError` that names it. Pickles are never read."""
    if not path.exists():
        raise QvgptError(f"{path}: no such file (weights are read from safetensors only)")
    try:
        return load_file(path)
    except Exception as error:
        raise QvgptError(f"{path}: no readable safetensors file: {error}") from None
