"""Best of N by Q: several candidates of a text, of which the one is kept that the values like best.

What is compared is Q of a text's last token, which has the whole text in its history. Values of
whole turns (`ILQL(level="turn")`) know no other Q. Of two language models' difference it is the sum
over the text, Σ log π₊ − log π₋: the last token's says nothing of the others. It costs N texts
where guidance costs one.
"""

import hashlib
import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from qvgpt.decode.engine import OnStep, Request, Text, write
from qvgpt.decode.guide import Guide
from qvgpt.decode.sources import Contrast, ValueSource, leaves
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
    spent: list[int] | None = None,
) -> list[Text]:
    """One text per request, the best of `best_of`; of one, what `write` gives.

    The first candidate is the text that `write` would give. `kl` of a chosen text is its own
    log π − log π₀: values prefer what guidance by them makes likelier, so that the KL of the states
    would be too small. The mean of that and `choice_kl` bound the KL. `values` guide and rank
    instead of the model's own; `spent` is told the tokens read, as by `write`. Raises `QvgptError`
    where there are no values.
    """
    how: dict[str, Any] = {"max_batch": max_batch, "on_step": on_step, "values": values}
    if best_of == 1:
        return write(model, requests, report=report, keep_reports=keep_reports, spent=spent, **how)
    if best_of < 1:
        raise QvgptError("best_of: at least 1")
    guide = Guide.of(model, values)
    guide.refuse_to_judge(whole=True)
    sums = any(isinstance(leaf, Contrast) for leaf in leaves(guide.source))
    candidates = [
        replace(request, seed=candidate_seed(request.seed, k))
        for request in requests
        for k in range(best_of)
    ]
    written = write(model, candidates, report=True, spent=spent, **how)
    found = []
    for i in range(len(requests)):
        best = max(
            written[i * best_of :][:best_of], key=advantages if sums else last_q
        )  # of equals the first
        best.kl = sum(r.logprob - r.base_logprob for r in best.reports)
        if not report or (keep_reports is not None and i not in keep_reports):
            best.reports = []
        found.append(best)
    return found


def choice_kl(best_of: int) -> float:
    """How far the best of N is from one sample, KL(chosen ‖ π), at most: log N − (N − 1)/N nats.

    Beirami et al., 2024, arXiv:2401.01879.
    """
    return math.log(best_of) - (best_of - 1) / best_of


def last_q(text: Text) -> float:
    """Q of the last token: what the whole text is expected to earn, as far as it is not over."""
    q = text.reports[-1].q
    assert q is not None
    return q


def advantages(text: Text) -> float:
    """Σ A over the tokens. Raises `QvgptError` where a part of the values knows no V."""
    found = [report.advantage for report in text.reports]
    if None in found:
        raise QvgptError("best_of: a contrast and values that know no V cannot rank together")
    return sum(a for a in found if a is not None)


def candidate_seed(seed: int, k: int) -> int:
    """The seed of a request's k-th candidate; the first one has the request's own."""
    if k == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed} {k}".encode()).digest()[:8])
