"""JSON and safetensors on disk, where a fault is one clear error. Pickles are never read."""

import hashlib
import json
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from qvgpt.errors import QvgptError

# what `attn_implementation` and its like may say without a kernel being loaded for it
_AT_HAND = (None, "eager", "sdpa", "flex_attention", "grouped_mm", "batched_mm")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or a `QvgptError` that names it."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise QvgptError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:  # numbers and nesting too long for Python too
        raise QvgptError(f"{path}: broken JSON: {error}") from None
    if not isinstance(content, dict):
        raise QvgptError(f"{path}: a JSON object was expected")
    return content


def read_config(directory: Path) -> dict[str, Any]:
    """`config.json` of a model, refused where code from elsewhere would be run to read the model.

    `transformers` would otherwise follow `adapter_config.json` to another base model, and an
    attention by name to the Hub.
    """
    if (directory / "adapter_config.json").exists():
        raise QvgptError(f"{directory}: holds an adapter of peft; merge it into its base model")
    config = read_json(directory / "config.json")
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        if "auto_map" in part:
            raise QvgptError(
                f"{directory}/config.json: auto_map names code of the model's own, which is never "
                "run; only architectures that transformers knows are read"
            )
        for key, value in part.items():
            if key.endswith("_implementation") and value not in _AT_HAND:
                raise QvgptError(
                    f"{directory}/config.json: {key} {value!r} may be code to fetch; leave it out"
                )
    return config


def one_line(error: Exception) -> str:
    """What an exception of other packages says, in one line of bearable length."""
    return textwrap.shorten(str(error), 300, placeholder=" …") or type(error).__name__


def load_tensors(path: Path) -> dict[str, Tensor]:
    """A safetensors file, or a `QvgptError` that names it. Pickles are never read."""
    if not path.exists():
        raise QvgptError(f"{path}: no such file (weights are read from safetensors only)")
    try:
        return load_file(path)
    except Exception as error:
        raise QvgptError(f"{path}: no readable safetensors file: {one_line(error)}") from None


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


def sha256(file: Path) -> str:
    """Of a file's bytes, in hexadecimal."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def add_to_json(path: Path, more: dict[str, Any]) -> None:
    """Write the file's keys anew with these, others as they are; there need be no file yet."""
    said = read_json(path) if path.exists() else {}
    path.write_text(json.dumps(said | more, indent=2) + "\n")
