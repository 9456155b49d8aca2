"""The values on held-out texts, at every evaluation of a training: for its log, with a warning."""

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from qvgpt.checkpoint import TrainState
from qvgpt.diagnostics import Foretold, figures, foretold, out_of_reach
from qvgpt.models.value_model import AMONG_CANDIDATES, ValueModel
from qvgpt.objectives import Objectives, Values
from qvgpt.run import RunProgress
from qvgpt.trajectory import Trajectory, TrajectoryBatch

_EVERY = 8  # of how many evaluation batches one is asked what tokens not taken are worth
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

    def seen(self) -> Float[Tensor, "decisions columns"]:
        """What was kept since the last time."""
        rows, self._rows = torch.cat(self._rows), []
        return rows

    def report(
        self, rows: Float[Tensor, "decisions columns"], state: TrainState, progress: RunProgress
    ) -> None:
        """Log the `figures` of what all processes have seen, and warn where values diverge.

        `diverging` counts the evaluations in a row, those before this one in `state`, in which
        values were out of reach by more than once the reach.
        """
        assert self.model.heads is not None
        f, scale = Foretold.of(rows), self.model.heads.reward_scale
        found = figures(f, self.prompts)
        excess = out_of_reach(f, *(r / scale for r in self.returns))
        if not math.isnan(excess):
            in_a_row = state.values.get("diverging", 0.0) + 1 if excess > 1 else 0.0
            found |= {"out_of_reach": excess, "diverging": in_a_row}
        state.values = found
        progress.log(state.step, {f"values/{name}": x for name, x in found.items()})
        for line in filter(None, (f"values: {headline(found)}", warning(found))):
            progress.say(state.step, line)


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
