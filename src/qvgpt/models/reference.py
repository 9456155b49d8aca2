"""π_ref: the language model as it was when learning began, beside the one that learns."""

from collections.abc import Set
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from qvgpt.models.decision_time import decides, rows_of, scatter
from qvgpt.models.vocab import log_prob, max_ratio
from qvgpt.trajectory import TrajectoryBatch


@dataclass(frozen=True)
class Reference:
    """A trunk that stays as it is. Not a module, so that it is neither saved nor trained."""

    trunk: Any
    """A frozen trunk of its own; or the one that learns, whose adapters are then switched off."""

    @torch.no_grad()
    def read(
        self,
        batch: TrajectoryBatch,
        trunk: Any,
        rows: Float[Tensor, "rows embed"],
        used: Bool[Tensor, "batch states"],
        needs: Set[str],
        dummy: int | None,
    ) -> dict[str, Tensor]:
        """`ref_logprob`; `max_ratio` of `trunk`, whose `rows` at `used` states are given, to it."""
        ref, found = self.trunk, {}
        there = rows_of(self.hidden(batch), batch, used)
        if "ref_logprob" in needs:
            taken, action = there[decides(batch.mask, used)], batch.action[batch.mask]
            flat = log_prob(taken, ref.output_weight, action, ref.softcap)
            found["ref_logprob"] = scatter(flat, batch.mask)
        if dummy is not None:
            ratio = max_ratio(trunk, rows, ref, there, dummy)
            found["max_ratio"] = scatter(ratio, used)
        return found

    def hidden(self, batch: TrajectoryBatch) -> Float[Tensor, "rows time embed"]:
        """Hidden states of all tokens, without dropout."""
        trunk = self.trunk.to(batch.tokens.device)
        was_training = trunk.training
        trunk.eval()
        with nullcontext() if trunk.lora is None else trunk.without_adapters():
            hidden = trunk.hidden(batch.tokens, positions=batch.positions)
        trunk.train(was_training)
        return hidden
