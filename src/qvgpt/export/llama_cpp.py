"""GGUF files for llama.cpp, by the `gguf` package: GPT-2, Llama and Qwen 3, and adapters for them.

Tensors have llama.cpp's names and layouts, norms and positions stay float32, and in q8_0 a matrix
whose rows are no multiple of 32 is float16. `output.weight` is written always: an engine that ties
LM head and embedding could hold no guidance.
"""

import io
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor

from qvgpt.errors import QvgptError
from qvgpt.export.gguf_tokenizer import add_tokenizer
from qvgpt.models.disk import one_line, read_json

_ARCHITECTURES = {"gpt2": "GPT2", "llama": "LLAMA", "qwen3": "QWEN3"}
_TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}
_KEPT_WIDE = ("position_embd", "norm")  # names with these, and vectors, stay float32
_HEAD = "output.weight"


def import_gguf() -> Any:
    """The package; a hint where it is missing."""
    try:
        import gguf
    except ImportError:
        raise QvgptError(
            "GGUF files are written by the gguf package, which is not installed: "
            "pip install 'qvgpt[export]'"
        ) from None
    return gguf


def write_model(directory: Path, file: Path, dtype: str) -> None:
    """Turn a Hugging Face directory into one GGUF file, tokenizer included.

    Raises `QvgptError` for families, options and tokenizers that llama.cpp has no twin of.
    """
    gguf, config = import_gguf(), read_json(directory / "config.json")
    family = str(config.get("model_type"))
    if family not in _ARCHITECTURES:
        known = ", ".join(_ARCHITECTURES)
        raise QvgptError(f"gguf: {family} models are not written here, only {known}")
    architecture = getattr(gguf.MODEL_ARCH, _ARCHITECTURES[family])
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[architecture])
    layers = _add_gpt2(writer, config) if family == "gpt2" else _add_llama(writer, config)
    writer.add_file_type(getattr(gguf.LlamaFileType, _file_type(dtype)))
    add_tokenizer(gguf, writer, directory, config)
    names = gguf.get_tensor_name_map(architecture, layers)
    for name, tensor in _tensors(directory):
        new = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if new is None:
            raise QvgptError(f"gguf: llama.cpp knows no tensor {name} of {family} models")
        tensor = _laid_out(family, name, tensor.float(), config)
        _add(gguf, writer, new, tensor, dtype)
    _finish(writer)


def write_adapter(
    directory: Path,
    factors: tuple[Float[Tensor, "vocab rank"], Float[Tensor, "rank embed"]],
    beta: float,
    file: Path,
) -> None:
    """The adapter of the LM head, for llama.cpp's --lora: at scale 1 its strength is β."""
    gguf, (up, down) = import_gguf(), factors
    family = read_json(directory / "config.json")["model_type"]
    architecture = getattr(gguf.MODEL_ARCH, _ARCHITECTURES[family])
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, beta * len(down))
    for name, tensor in (("lora_a", down), ("lora_b", up)):
        _add(gguf, writer, f"{_HEAD}.{name}", tensor.float(), "float32")
    _finish(writer)


def read_model(directory: Path, file: Path) -> Any:
    """What `transformers` makes of the file, with the configuration of the directory it is of."""
    from transformers import AutoConfig, AutoModelForCausalLM

    import_gguf()
    config = AutoConfig.from_pretrained(directory)
    with redirect_stderr(io.StringIO()):  # a progress bar that cannot be told to be still
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, config=config, dtype=torch.float32
        )
    return loaded.eval()


@torch.no_grad()
def adapt(model: Any, file: Path) -> None:
    """Add what an adapter's file says at scale 1 to the model's LM head."""
    reader = import_gguf().GGUFReader(file)
    found = {t.name: torch.from_numpy(t.data.copy()) for t in reader.tensors}
    alpha = float(reader.fields["adapter.lora.alpha"].contents())
    down, up = found[f"{_HEAD}.lora_a"], found[f"{_HEAD}.lora_b"]
    model.get_output_embeddings().weight += (alpha / len(down)) * (up @ down)


def _add_gpt2(writer: Any, config: dict[str, Any]) -> int:
    embed = config["n_embd"]
    writer.add_context_length(config["n_positions"])
    writer.add_embedding_length(embed)
    writer.add_feed_forward_length(config.get("n_inner") or 4 * embed)
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(config.get("layer_norm_epsilon", 1e-5))
    writer.add_block_count(config["n_layer"])
    return config["n_layer"]


def _add_llama(writer: Any, config: dict[str, Any]) -> int:
    heads = config["num_attention_heads"]
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    fixed = {
        "rope scaling": kind == "default",
        "mlp or attention biases": not (config.get("attention_bias") or config.get("mlp_bias")),
        "sliding windows": not config.get("use_sliding_window"),
        "an activation other than silu": config.get("hidden_act", "silu") == "silu",
    }
    for what, fine in fixed.items():
        if not fine:
            raise QvgptError(f"gguf: {what} of {config['model_type']} models are not written here")
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(rope.get("rope_theta", config.get("rope_theta", 10000.0)))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_block_count(config["num_hidden_layers"])
    return config["num_hidden_layers"]


def _file_type(dtype: str) -> str:
    return "ALL_F32" if dtype == "float32" else f"MOSTLY_{_TYPES[dtype]}"


def _tensors(directory: Path) -> Any:
    """Names and tensors of a directory's safetensors files."""
    for file in sorted(directory.glob("*.safetensors")):
        yield from load_file(file).items()


def _laid_out(family: str, name: str, tensor: Tensor, config: dict[str, Any]) -> Tensor:
    """As llama.cpp has it: [out, in], and Llama's rotated pairs side by side."""
    if family == "gpt2" and ".c_" in name and name.endswith(".weight"):
        return tensor.T
    if family == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
        heads = config["num_attention_heads"]
        if "k_proj" in name:
            heads = config.get("num_key_value_heads") or heads
        halves = tensor.unflatten(0, (heads, 2, -1))  # [heads, half, pair, in]
        return halves.transpose(1, 2).reshape(tensor.shape)
    return tensor


def _add(gguf: Any, writer: Any, name: str, tensor: Tensor, dtype: str) -> None:
    kind = _TYPES[dtype]
    if tensor.ndim < 2 or any(part in name for part in _KEPT_WIDE):
        kind = "F32"
    elif kind == "Q8_0" and tensor.size(-1) % 32:
        kind = "F16"
    stored = getattr(gguf.GGMLQuantizationType, kind)
    data = tensor.detach().cpu().contiguous().numpy().astype(np.float32)
    if kind == "F16" and np.abs(data).max() > np.finfo(np.float16).max:
        raise QvgptError(f"gguf: {name} does not fit float16; write bfloat16 or float32")
    data = gguf.quants.quantize(data, stored)
    writer.add_tensor(name, data, raw_dtype=stored)


def _finish(writer: Any) -> None:
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    except ValueError as error:
        raise QvgptError(f"gguf: {one_line(error)}") from None
    finally:
        writer.close()
