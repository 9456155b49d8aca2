"""The values on held-out texts, at every evaluation of a training: for its log, with a warning."""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from qvgpt.diagnostics import Foretold, figures, foretold, out_of_reach
from qvgpt.models.value_model import AMONG_CANDIDATES, ValueModel
from qvgpt.objectives import Objectives, Values
from qvgpt.trajectory import Trajectory, TrajectoryBatch

_EVERY = 8  # of how many evaluation batches one is asked what the likeliest tokens are worth
_PATIENCE = 3  # evaluations in a row with values out of reach, before they are said to diverge


class Watch:
    """The values on evaluation texts, at every evaluation of a training."""

    def __init__(
        self,
        model: ValueModel,
        objectives: Objectives,
        texts: Sequence[Trajectory],
        batches: Sequence[Sequence[int]],
        data: Sequence[Trajectory],
    ):
        """`batches`: which of the texts each evaluation batch holds; `data`: what is learned."""
        returns = [t.total_reward for t in data]
        self.model, self.batches, self.returns = model, batches, (min(returns), max(returns))
        self.prompts = [t.prompt for t in texts]
        self._needs = frozenset({"v"} if objectives.teaches_v_alone else {"v", "target_q"})
        self._rows: list[Tensor] = []

    def needs(self, batch: int) -> frozenset[str]:
        """What the model is to be asked for of a batch, beside what losses read.

        Gathers alone; of one batch in eight the language model's logits too.
        """
        asked = batch % _EVERY == min(_EVERY, len(self.batches)) // 2
        more = AMONG_CANDIDATES if asked and "target_q" in self._needs else frozenset()
        return self._needs | more

    def see(self, number: int, values: Values, batch: TrajectoryBatch) -> None:
        """Keep what is said of a batch."""
        info, heads = self.model.info, self.model.heads
        assert heads is not None
        # an empty batch is filled up with one text that does not count
        texts = self.batches[number] or [0]
        how = info.gamma, info.per_turn_discount, heads.reward_scale
        self._rows.append(foretold(values, batch, texts, *how))

    def judge(
        self, before: Mapping[str, float], gathered: Callable[[Tensor], Tensor]
    ) -> dict[str, float]:
        """The `figures` of all that was seen since the last time, and how far out of reach it is.

        `gathered` brings the rows of all processes together. `diverging` counts the evaluations in
        a row, `before` among them, in which values were out of reach by more than once the reach.
        """
        assert self.model.heads is not None
        f, self._rows = Foretold.of(gathered(torch.cat(self._rows))), []
        scale = self.model.heads.reward_scale
        excess = out_of_reach(f, *(r / scale for r in self.returns))
        found = figures(f, self.prompts)
        if not math.isnan(excess):
            in_a_row = before.get("diverging", 0.0) + 1 if excess > 1 else 0.0
            found |= {"out_of_reach": excess, "diverging": in_a_row}
        return found


def headline(found: Mapping[str, float]) -> str:
    """The figures to watch, in a line."""
    shown = ("slope", "ece", "rank", "rank_across", "rank_within", "td_error_abs", "v_abs")
    return "  ".join(f"{name} {found[name]:.3g}" for name in shown if name in found)


def warning(found: Mapping[str, float]) -> str | None:
    """What to say where values have just been found to diverge; else None."""
    if found.get("diverging") != _PATIENCE:
        return None
    return (
        f"warning: values diverge: at {_PATIENCE} evaluations in a row they lay outside all "
        f"returns by more than the whole reach of those, now by {found['out_of_reach']:.3g} times "
        "that; lower fit.value_lr or fit.tau, raise cql_weight, or look at the rewards with "
        "`qvgpt check`"
    )
