"""How good is a reward model on texts that it did not learn from."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from qvgpt.bootstrap import calibration, mean_ci, pearson, spearman
from qvgpt.reward_model.examples import Kind


def loss(
    kind: Kind, logits: Float[Tensor, "texts labels"], targets: Float[Tensor, "examples"]
) -> Float[Tensor, "examples"]:
    """Of each example: cross-entropy, squared error, or −log σ(r_chosen − r_rejected).

    The last is Bradley & Terry's, of texts that come as all the chosen, then all the rejected.
    """
    if kind == "classes":
        return F.cross_entropy(logits, targets.long(), reduction="none")
    values = logits.squeeze(1)
    if kind == "scores":
        return (values - targets).square()
    chosen, rejected = values.chunk(2)
    return -F.logsigmoid(chosen - rejected)


def judged(
    kind: Kind,
    logits: Float[Tensor, "texts labels"],
    targets: Float[Tensor, "examples"],
    labels: Sequence[str],
) -> dict[str, Any]:
    """The figures of held-out examples; `calibration` holds tenths of equal size."""
    each = loss(kind, logits, targets).numpy().astype(float)
    found: dict[str, Any] = {"loss": float(each.mean()), "examples": len(each)}
    if kind == "classes":
        return found | _classes(logits, targets, labels)
    if kind == "preferences":
        chosen, rejected = logits.squeeze(1).chunk(2)
        right = (chosen > rejected).numpy().astype(float)
        margin = chosen - rejected
        confidence = torch.sigmoid(margin.abs()).numpy().astype(float)
        return found | _accuracy(right) | _calibration(confidence, right)
    values, wanted = logits.squeeze(1).numpy().astype(float), targets.numpy().astype(float)
    low, high = mean_ci(each.tolist()).ci95
    return found | {
        "rmse": float(np.sqrt(each.mean())),
        "rmse_ci95": [math.sqrt(low), math.sqrt(high)],
        "rmse_of_the_mean": float(wanted.std()),
        "pearson": pearson(values, wanted),
        "spearman": spearman(values, wanted),
        "calibration": calibration(values, wanted),
    }


def _classes(
    logits: Float[Tensor, "texts labels"],
    targets: Float[Tensor, "examples"],
    labels: Sequence[str],
) -> dict[str, Any]:
    chances, wanted = logits.softmax(-1).numpy().astype(float), targets.long().numpy()
    said = chances.argmax(1)
    right = (said == wanted).astype(float)
    counts = np.bincount(wanted, minlength=len(labels))
    one_hot = np.eye(len(labels))[wanted]
    return {
        **_accuracy(right),
        "accuracy_of_the_commonest": float(counts.max() / counts.sum()),
        "recall": {n: float(right[wanted == i].mean()) for i, n in enumerate(labels) if counts[i]},
        "brier": float(((chances - one_hot) ** 2).sum(1).mean()),
        **_calibration(chances.max(1), right),
    }


def _accuracy(right: Float[np.ndarray, "n"]) -> dict[str, Any]:
    found = mean_ci(right.tolist())
    return {"accuracy": found.value, "accuracy_ci95": list(found.ci95)}


def _calibration(
    confidence: Float[np.ndarray, "n"], right: Float[np.ndarray, "n"]
) -> dict[str, Any]:
    """How far chances are from shares, over tenths: expected calibration error."""
    bins = calibration(confidence, right)
    error = sum(b["n"] * abs(b["predicted"] - b["actual"]) for b in bins) / len(right)
    return {"calibration_error": float(error), "calibration": bins}
