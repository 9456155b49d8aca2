"""Trunks beside the one that learns: π_ref, as it was when learning began, and its slow copy."""

import copy
from collections.abc import Mapping, Set
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


class SlowTrunk:
    """A copy of a trunk that follows it slowly, for slow heads to read (ILQL's target network).

    Weights that are not trained are shared: beside adapters, the copy is of the adapters alone. Not
    a module, so that no artefact holds it; checkpoints do, as the state of the training it is.
    """

    def __init__(self, trunk: Any):
        shared: dict[int, Any] = {id(p): p for p in trunk.parameters() if not p.requires_grad}
        self._follows = [name for name, p in trunk.named_parameters() if p.requires_grad]
        self.trunk = copy.deepcopy(trunk, shared).requires_grad_(False).eval()

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors that follow, by their names in the trunk; themselves, not copies."""
        own = dict(self.trunk.named_parameters())
        return {name: own[name].data for name in self._follows}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take their values back, in place."""
        for name, own in self.state_dict().items():
            own.copy_(state[name])

    @torch.no_grad()
    def update(self, trunk: Any, tau: float) -> None:
        """θ̄ ← (1 − τ) θ̄ + τ θ, once per optimizer step."""
        self.trunk.to(trunk.output_weight.device)
        fast = dict(trunk.named_parameters())
        for name, slow in self.state_dict().items():
            slow.lerp_(fast[name], tau)

    @torch.no_grad()
    def hidden(self, batch: TrajectoryBatch) -> Float[Tensor, "rows time embed"]:
        """Hidden states of all tokens, without dropout."""
        trunk = self.trunk.to(batch.tokens.device)
        return trunk.hidden(batch.tokens, positions=batch.positions)
