"""What a guided model would earn, estimated from logs alone: fitted Q evaluation.

Fresh value heads on the frozen trunk learn the values of the guided policy from texts that another
policy wrote, so that no text has to be written and judged.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from rich.console import Console
from torch import Tensor, nn

from qvgpt.bootstrap import Estimate, mean_ci
from qvgpt.decode.guide import Guide
from qvgpt.decode.policy import Guidance, next_token
from qvgpt.decode.reading import Reading, States
from qvgpt.decode.sources import Contrast, HeadValues, ValueSource, describe, leaves
from qvgpt.errors import QvgptError
from qvgpt.fit_options import FitOptions
from qvgpt.loop import fit
from qvgpt.models.heads_config import HeadsConfig
from qvgpt.models.value_model import ValueModel
from qvgpt.objectives import FQE, Objectives
from qvgpt.trajectory import Trajectory, collate

_FIT = FitOptions(epochs=10.0, tau=0.05)
_HEADS = HeadsConfig("low_rank", num_q=1)


def evaluate_offline(
    model: ValueModel,
    trajectories: Sequence[Trajectory],
    guidance: Guidance,
    options: FitOptions = _FIT,
    objective: FQE = FQE(),  # noqa: B008  frozen
    heads: HeadsConfig = _HEADS,
    values: ValueSource | None = None,
) -> Estimate:
    """The return to be expected of `model` under `guidance`, over the prompts of some logs.

    `values` guide instead of the model's own, where one forward says all of them: Q of heads,
    contrasts, and sums of these. Models stay as they are. At temperature 0 the greedy policy is
    judged. The interval is over the sample of prompts; how wrong the fit is it does not know.
    Raises `QvgptError` for other values (π of every token must be known at every logged state, and
    V after candidates would be read anew for each of them), and as `fit` does.
    """
    guide = Guide.of(model, values)
    _refuse(guide, guidance)
    trunks = guide.trunks if guidance.guides else [model.trunk]
    learns = [p for trunk in trunks for p in trunk.parameters() if p.requires_grad]
    was_training = model.training
    trunk: Any = trunks[0] if len(trunks) == 1 else _SideBySide(trunks)
    judge = ValueModel(trunk, heads, model.tokenizer, freeze_trunk=True).to(model.device)
    judge.judged = lambda hidden: probabilities(guide, trunks, hidden, guidance)
    try:
        terms = Objectives(((1.0, objective),))
        fit(judge, trajectories, terms, options, console=Console(quiet=True))
        return mean_ci(_at_prompts(judge, trajectories))
    finally:
        for parameter in learns:
            parameter.requires_grad_(True)
        model.train(was_training)


def _refuse(guide: Guide, guidance: Guidance) -> None:
    """Raise `QvgptError` for a policy that hidden states alone do not tell."""
    if guidance.beta_end is not None:
        raise QvgptError("beta_end: the policy to be judged must be one of the state alone")
    if not guidance.guides:
        return
    for source in leaves(guide.source):
        if not isinstance(source, HeadValues | Contrast):
            raise QvgptError(
                f"values: {describe(source)} would be read anew at every logged state and step of "
                "the fit: evaluate offline with Q of heads or a contrast, or write texts and judge "
                "those (`evaluate`)"
            )
    guide.refuse([0], 1, guidance)


class _SideBySide(nn.Module):
    """Several trunks that read the same texts, as one: its states are theirs, one after another."""

    softcap = lora = None

    def __init__(self, trunks: Sequence[Any]):
        super().__init__()
        self.trunks = nn.ModuleList(trunks)
        self.vocab_size: int = trunks[0].vocab_size
        self.embed_dim: int = sum(trunk.embed_dim for trunk in trunks)
        self.seq_len: int = min(trunk.seq_len for trunk in trunks)

    @property
    def output_weight(self) -> Float[Tensor, "vocab embed"]:
        """The first one's: of all this is the LM head, though it reads but a part of a state."""
        return self.trunks[0].output_weight  # type: ignore[return-value]

    def hidden(
        self,
        tokens: Tensor,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: Any = None,
    ) -> Float[Tensor, "batch time embed"]:
        """[batch, time, sum of their sizes], in fp32."""
        read: list[Any] = list(self.trunks)
        return torch.cat([t.hidden(tokens, mask, positions).float() for t in read], dim=-1)

    @property
    def blocks(self) -> list[nn.Module]:
        """Those of all."""
        return [block for trunk in self.trunks for block in trunk.blocks]  # type: ignore[union-attr]

    def set_dropout(self, rate: float) -> None:
        """Nothing: they are frozen."""

    def set_gradient_checkpointing(self, on: bool) -> None:
        """Nothing: they are frozen."""

    def with_head(self, weight: Tensor) -> Any:
        """Not there: nothing is exported."""
        raise NotImplementedError

    def new_cache(self, batch: int, capacity: int) -> Any:
        """Not there: nothing is written."""
        raise NotImplementedError


def probabilities(
    guide: Guide, trunks: Sequence[Any], hidden: Float[Tensor, "rows embed"], guidance: Guidance
) -> Float[Tensor, "rows vocab"]:
    """π(·|s) of the guided model, 0 for tokens that are no candidates.

    `hidden` are the states of all `trunks`, one after another.
    """
    sizes = [trunk.embed_dim for trunk in trunks]
    parts = zip(hidden.split(sizes, dim=-1), trunks, strict=True)
    read = tuple(h.to(trunk.output_weight.dtype) for h, trunk in parts)
    states, model = States(Reading(trunks, [], [0] * len(trunks)), read), guide.model
    policy = next_token(
        model, read[0], guidance, values=lambda tokens: guide.values(states, tokens, guidance)
    )
    nothing = torch.zeros(len(hidden), model.trunk.vocab_size, device=hidden.device)
    return nothing.scatter(1, policy.tokens, policy.logprob.exp())


@torch.no_grad()
def _at_prompts(
    judge: ValueModel, trajectories: Sequence[Trajectory], batch_size: int = 32
) -> list[float]:
    """V where each prompt's first token is to be chosen, once a prompt."""
    first = list({t.prompt: t for t in trajectories}.values())
    found: list[float] = []
    for start in range(0, len(first), batch_size):
        batch = collate(first[start : start + batch_size]).to(judge.device)
        values = judge(batch, frozenset({"v"}))
        assert values.v is not None
        found += values.v[:, 0].tolist()
    return found
