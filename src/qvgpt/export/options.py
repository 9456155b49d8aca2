"""What an export can be told."""

from dataclasses import dataclass
from typing import Literal

from qvgpt.errors import QvgptError

Format = Literal["hf", "lora", "gguf", "gguf_lora", "critic"]
DType = Literal["float32", "bfloat16", "float16", "q8_0"]
_STORED: dict[str, tuple[str, ...]] = {
    "hf": ("float32", "bfloat16", "float16"),
    "lora": ("float32", "bfloat16", "float16"),
    "critic": ("float32", "bfloat16", "float16"),
    "gguf": ("float32", "float16", "bfloat16", "q8_0"),
    "gguf_lora": ("float32", "float16", "bfloat16", "q8_0"),
}


@dataclass(frozen=True)
class ExportOptions:
    """Which form, how strong, how precise."""

    to: Format = "hf"
    """Form. hf: a Hugging Face directory, guidance merged. lora: that of the unguided model and an
    adapter of peft on its LM head. gguf: one file for llama.cpp. gguf_lora: file and adapter for
    llama.cpp. critic: V as a sequence classifier of transformers."""
    beta: float | None = None
    """Strength of guidance to fold in; none: what the model recommends. Of an adapter: the strength
    at scale 1."""
    twins: Literal["mean", "min"] | None = None
    """How two Q heads are joined in the guidance to be stood for; none: as recommended. Weights
    always hold their mean."""
    dtype: DType = "float32"
    """Of the weights that are written; q8_0 for GGUF alone. Adapters stay float32."""
    rank: int | None = None
    """Of an adapter; none: that of low-rank heads, which are exact, else at most 64."""
    value_rows: bool = False
    """Two more vocabulary rows, never to be sampled, that tell V by their log-probs."""

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        stored = _STORED.get(self.to)
        if stored is None:
            raise QvgptError(f"export: to is one of {', '.join(_STORED)}, not {self.to!r}")
        if self.dtype not in stored:
            raise QvgptError(f"export: {self.to} holds {', '.join(stored)}, not {self.dtype}")
        if self.rank is not None and (self.rank < 1 or self.to not in ("lora", "gguf_lora")):
            raise QvgptError("export: rank is that of a lora or gguf_lora, and at least 1")
        if self.value_rows and self.to == "critic":
            raise QvgptError("export: a critic has no vocabulary: value_rows are for the others")
        if self.to == "critic" and (self.beta is not None or self.twins is not None):
            raise QvgptError("export: a critic holds V alone: beta and twins mean nothing there")
