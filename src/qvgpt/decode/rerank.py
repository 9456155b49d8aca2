"""Best of N by Q: several candidates of a text, of which the one is kept that the values like best.

What is compared is Q of a text's last token, which has the whole text in its history. Values of
whole turns (`ILQL(level="turn")`) know no other Q. It costs N texts where guidance costs one.
"""

import hashlib
import math
from collections.abc import Collection, Sequence
from dataclasses import replace

from qvgpt.decode.engine import OnStep, Request, Text, write
from qvgpt.decode.sources import ValueSource
from qvgpt.errors import QvgptError
from qvgpt.models.value_model import ValueModel


def write_best(
    model: ValueModel,
    requests: Sequence[Request],
    best_of: int = 1,
    *,
    max_batch: int = 64,
    report: bool = False,
    keep_reports: Collection[int] | None = None,
    on_step: OnStep | None = None,
    values: ValueSource | None = None,
) -> list[Text]:
    """One text per request, the best of `best_of`; of one, what `write` gives.

    The first candidate is the text that `write` would give. `kl` of a text is that of the sampling:
    what the choice adds to it is not known, see `choice_kl`. Guided by other `values` there is no
    choice. Raises `QvgptError` where there are no values.
    """
    if best_of == 1:
        return write(
            model, requests, max_batch=max_batch, report=report, keep_reports=keep_reports,
            on_step=on_step, values=values,
        )  # fmt: skip
    if values is not None:
        raise QvgptError("best_of: texts are ranked by the model's own values alone")
    if best_of < 1 or model.heads is None:
        what = "this model has no value heads to rank texts by" if best_of > 1 else "at least 1"
        raise QvgptError(f"best_of: {what}")
    candidates = [
        replace(request, seed=candidate_seed(request.seed, k))
        for request in requests
        for k in range(best_of)
    ]
    written = write(model, candidates, max_batch=max_batch, report=True, on_step=on_step)
    found = []
    for i in range(len(requests)):
        best = max(written[i * best_of :][:best_of], key=last_q)  # of equals the first
        if not report or (keep_reports is not None and i not in keep_reports):
            best.reports = []
        found.append(best)
    return found


def choice_kl(best_of: int) -> float:
    """How far the best of N is from one sample, at most: log N − (N − 1)/N nats a text.

    Beirami et al., 2024, arXiv:2401.01879.
    """
    return math.log(best_of) - (best_of - 1) / best_of


def last_q(text: Text) -> float:
    """Q of the last token: what the whole text is expected to earn, as far as it is not over."""
    q = text.reports[-1].q
    assert q is not None
    return q


def candidate_seed(seed: int, k: int) -> int:
    """The seed of a request's k-th candidate; the first one has the request's own."""
    if k == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed} {k}".encode()).digest()[:8])
