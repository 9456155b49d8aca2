"""V and its trunk as a sequence classifier of `transformers`, as PPO trainers begin a critic from.

The score is that of the last token that is no padding: V of the text so far, in units of reward.
"""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from qvgpt.errors import QvgptError
from qvgpt.export.hf import load_language_model
from qvgpt.export.linear import LinearV, linear_v
from qvgpt.export.source import Source
from qvgpt.models.disk import one_line
from qvgpt.models.value_model import ValueModel

_WORSE = 1.1  # times the error of a fit with a bias: then the bias is told apart
_LAST_NORMS = ("ln_f", "norm", "final_layer_norm")


@torch.no_grad()
def save_critic(source: Source, directory: Path, dtype: torch.dtype) -> dict[str, Any]:
    """Write the classifier; returns the `offset` of V from its score, and the `fit`, if any.

    Classifiers have no bias. Where the last norm has one, it takes V's in: h + δ with w·δ = bias.
    Else V is fitted without, unless that is much worse: then V is the score and the offset.
    """
    from transformers import AutoModelForSequenceClassification

    model = source.model
    ValueModel(model.trunk, None, model.tokenizer).save(directory)
    loaded = load_language_model(directory)
    try:
        loaded.config.num_labels = 1
        critic: Any = AutoModelForSequenceClassification.from_config(loaded.config)
    except (ValueError, KeyError) as error:
        raise QvgptError(f"transformers has no critic of this kind: {one_line(error)}") from None
    if not isinstance(getattr(critic, "score", None), torch.nn.Linear):
        raise QvgptError(f"{type(critic).__name__}: has no layer `score` to hold V")
    critic.base_model.load_state_dict(loaded.base_model.state_dict())
    v, bias = _fitted(source, critic), _norm_bias(critic.base_model)
    critic.score.weight.copy_(v.weight[None])
    if bias is not None and v.bias:
        bias += v.weight * (v.bias / v.weight.square().sum())
    critic.config.problem_type = "regression"
    for stale in directory.glob("*.safetensors*"):
        stale.unlink()
    critic.to(dtype).save_pretrained(directory)
    (directory / "generation_config.json").unlink(missing_ok=True)
    return {"offset": 0.0 if bias is not None else v.bias, "fit": v.fit}


def _fitted(source: Source, critic: Any) -> LinearV:
    """V as a vector, and a number where the classifier can hold it or where it is worth telling."""
    heads, hidden = source.model.heads, source.hidden(source.fit)
    assert heads is not None
    held_out = source.hidden(source.held_out)
    v = linear_v(heads, hidden, held_out)
    if v.weight.any() and _norm_bias(critic.base_model) is not None:
        return v
    other = linear_v(heads, hidden, held_out, intercept=False)
    if v.weight.any() and _rmse(other) > _WORSE * _rmse(v):
        return v
    return other


def _rmse(v: LinearV) -> float:
    return 0.0 if v.fit is None else v.fit["rmse"]


def load_critic(directory: Path) -> Any:
    """As any user of `transformers` reads it."""
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModelForSequenceClassification.from_pretrained(directory).eval()


def _norm_bias(base: Any) -> Float[Tensor, "embed"] | None:
    """The bias of the last norm, where there is one."""
    for name in _LAST_NORMS:
        bias = getattr(getattr(base, name, None), "bias", None)
        if bias is not None:
            return bias
    return None
