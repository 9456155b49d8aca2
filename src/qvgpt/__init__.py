"""A GPT with Q- and V-functions: learns what each next token is worth, and is guided by it.

    from qvgpt import GPT, ValueModel, ILQL, Guidance, train, generate

Names are imported when first used (PEP 562), so that `import qvgpt` loads no torch.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qvgpt.data.tokenizer import Tokenizer
    from qvgpt.decode.beam import BeamSearch
    from qvgpt.decode.blocks import BlockSearch
    from qvgpt.decode.engine import Engine, Request, generate
    from qvgpt.decode.policy import Guidance
    from qvgpt.decode.sources import (
        Contrast,
        HeadValues,
        PrefixValues,
        TokenScorer,
        WeightedSum,
    )
    from qvgpt.decode.tree import TreeSearch
    from qvgpt.envs.random_walk import RandomWalks
    from qvgpt.errors import QvgptError
    from qvgpt.evaluate import evaluate
    from qvgpt.fit_options import FitOptions
    from qvgpt.loop import fit
    from qvgpt.models.gpt import GPT
    from qvgpt.models.heads_config import HeadsConfig
    from qvgpt.models.value_model import ValueModel
    from qvgpt.objectives import (
        AWAC,
        AWR,
        FQE,
        FUDGE,
        ILQL,
        LM,
        QSFT,
        SARSA,
        ControlledDecoding,
        DoubleQ,
        MonteCarlo,
        PathConsistency,
        ReturnDistribution,
    )
    from qvgpt.trainer import train
    from qvgpt.trajectory import Trajectory, collate

    __version__: str

_HOMES = {
    "AWAC": "objectives",
    "AWR": "objectives",
    "BeamSearch": "decode.beam",
    "BlockSearch": "decode.blocks",
    "Contrast": "decode.sources",
    "ControlledDecoding": "objectives",
    "DoubleQ": "objectives",
    "Engine": "decode.engine",
    "FQE": "objectives",
    "FUDGE": "objectives",
    "FitOptions": "fit_options",
    "GPT": "models.gpt",
    "Guidance": "decode.policy",
    "HeadValues": "decode.sources",
    "HeadsConfig": "models.heads_config",
    "ILQL": "objectives",
    "LM": "objectives",
    "MonteCarlo": "objectives",
    "PathConsistency": "objectives",
    "PrefixValues": "decode.sources",
    "QSFT": "objectives",
    "QvgptError": "errors",
    "RandomWalks": "envs.random_walk",
    "Request": "decode.engine",
    "ReturnDistribution": "objectives",
    "SARSA": "objectives",
    "TokenScorer": "decode.sources",
    "Tokenizer": "data.tokenizer",
    "Trajectory": "trajectory",
    "TreeSearch": "decode.tree",
    "ValueModel": "models.value_model",
    "WeightedSum": "decode.sources",
    "collate": "trajectory",
    "evaluate": "evaluate",
    "fit": "loop",
    "generate": "decode.engine",
    "train": "trainer",
}

__all__ = [
    "AWAC",
    "AWR",
    "FQE",
    "FUDGE",
    "GPT",
    "ILQL",
    "LM",
    "QSFT",
    "SARSA",
    "BeamSearch",
    "BlockSearch",
    "Contrast",
    "ControlledDecoding",
    "DoubleQ",
    "Engine",
    "FitOptions",
    "Guidance",
    "HeadValues",
    "HeadsConfig",
    "MonteCarlo",
    "PathConsistency",
    "PrefixValues",
    "QvgptError",
    "RandomWalks",
    "Request",
    "ReturnDistribution",
    "TokenScorer",
    "Tokenizer",
    "Trajectory",
    "TreeSearch",
    "ValueModel",
    "WeightedSum",
    "__version__",
    "collate",
    "evaluate",
    "fit",
    "generate",
    "train",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("qvgpt")
    if name not in _HOMES:
        raise AttributeError(f"module 'qvgpt' has no attribute {name!r}")
    return getattr(import_module(f"qvgpt.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)


class _Package(ModuleType):
    """Keeps `qvgpt.evaluate` the function once the module of the same name is loaded."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _HOMES or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
