"""JSON and safetensors on disk, where a fault is one clear error. Pickles are never read."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
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


@contextmanager
def writing(path: Path, then: str = "try again") -> Iterator[None]:
    """What is written of `path` in here and fails, as on a full disk, is one clear error."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise QvgptError(
            f"{path}: cannot be written ({reason}): make room there, then {then}"
        ) from error
