"""π_ref: the language model as it was when learning began, beside the one that learns."""

from collections.abc import Set
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from qvgpt.models.decision_time import scatter, states_of, used_states
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
        states: Float[Tensor, "batch states embed"],
        needs: Set[str],
        dummy: int | None,
    ) -> dict[str, Tensor]:
        """`ref_logprob`; `max_ratio` of `trunk`, whose `states` these are, to π_ref."""
        ref, found = self.trunk, {}
        there = states_of(self.hidden(batch), batch)
        if "ref_logprob" in needs:
            taken, action = there[:, :-1][batch.mask], batch.action[batch.mask]
            flat = log_prob(taken, ref.output_weight, action, ref.softcap)
            found["ref_logprob"] = scatter(flat, batch.mask)
        if dummy is not None:
            used = used_states(batch.mask)
            ratio = max_ratio(trunk, states[used], ref, there[used], dummy)
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
