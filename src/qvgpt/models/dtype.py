"""How weights lie in memory; options name it, so that nothing is imported here."""

from typing import Literal

Dtype = Literal["float32", "bfloat16", "auto"]
"""Of a trunk's weights in memory; auto: as they are stored."""
