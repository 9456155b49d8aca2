"""What a guided model would earn, estimated from logs alone: fitted Q evaluation.

Fresh value heads on the frozen trunk learn the values of the guided policy from texts that another
policy wrote, so that no text has to be written and judged.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from rich.console import Console
from torch import Tensor

from qvgpt.bootstrap import Estimate, mean_ci
from qvgpt.decode.policy import Guidance, next_token, refuse_v_alone
from qvgpt.errors import QvgptError
from qvgpt.fit_options import FitOptions
from qvgpt.loop import fit
from qvgpt.models.heads import HeadsConfig
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
) -> Estimate:
    """The return to be expected of `model` under `guidance`, over the prompts of some logs.

    The model stays as it is. At temperature 0 the greedy policy is judged. The interval is over the
    sample of prompts; how wrong the fit is it does not know. Raises as `fit` does.
    """
    if guidance.guides:
        refuse_v_alone(model.heads)
    if guidance.beta_end is not None:
        raise QvgptError("beta_end: the policy to be judged must be one of the state alone")
    learns = [p for p in model.trunk.parameters() if p.requires_grad]
    was_training = model.training
    judge = ValueModel(model.trunk, heads, model.tokenizer, freeze_trunk=True).to(model.device)
    judge.judged = lambda hidden: probabilities(model, hidden, guidance)
    try:
        terms = Objectives(((1.0, objective),))
        fit(judge, trajectories, terms, options, console=Console(quiet=True))
        return mean_ci(_at_prompts(judge, trajectories))
    finally:
        for parameter in learns:
            parameter.requires_grad_(True)
        model.train(was_training)


def probabilities(
    model: ValueModel, hidden: Float[Tensor, "rows embed"], guidance: Guidance
) -> Float[Tensor, "rows vocab"]:
    """π(·|s) of the guided model, 0 for tokens that are no candidates."""
    policy = next_token(model, hidden.to(model.trunk.output_weight.dtype), guidance)
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
