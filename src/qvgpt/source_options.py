"""Options that say which model writes and whose values are read, without importing any of it."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qvgpt.models.dtype import Dtype

if TYPE_CHECKING:
    from qvgpt.decode.sources import ValueSource
    from qvgpt.models.value_model import ValueModel


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """Whose values are read."""

    value_models: list[str] = field(default_factory=list)
    """Directories of models, of any size and the same tokenizer, whose values are read instead of
    the model's own; those of several are added up."""
    contrast: list[str] = field(default_factory=list)
    """Two directories of language models, PLUS and MINUS: log π₊ − log π₋ are the values, in nats
    (proxy tuning, DExperts); beside value_models it is added to them."""
    weights: list[float] = field(default_factory=list)
    """Of each of value_models, then of the contrast; none: 1 each."""
    dtype: Dtype = "float32"
    """Of the language model's weights in memory; auto: as they are stored."""
    device_map: str | None = None
    """Where the model lies, as accelerate reads it: auto, cuda, cpu …; none: the CPU."""

    def load(self, directory: str) -> "tuple[ValueModel, ValueSource | None]":
        """The model, and what is read instead of its own values; raises as `load_values` does."""
        from qvgpt.models.value_model import ValueModel
        from qvgpt.sampling import load_values

        how: dict[str, Any] = {"dtype": self.dtype, "device_map": self.device_map}
        model = ValueModel.from_pretrained(directory, **how)
        others = self.value_models, self.contrast, self.weights
        return model, load_values(model, directory, *others, **how)
