"""What is to be exported: the model, its guidance, and texts to fit and to judge with."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from qvgpt.decode.engine import generate
from qvgpt.decode.policy import Guidance, recommended, refuse_v_alone
from qvgpt.errors import QvgptError
from qvgpt.export.linear import is_linear
from qvgpt.models.value_model import ValueModel
from qvgpt.trajectory import Trajectory

_OWN_TEXTS, _OWN_TOKENS = 16, 48  # written by the guided model itself where no texts are given
_TO_FIT = 128  # texts, and as many to judge by, where something has to be fitted
_FOLDED = ("beta", "twins", "functional", "alpha")

Text = tuple[Tensor, Tensor]
"""Tokens [time], cut to the context, and the states [states] in them that are looked at."""


@dataclass(frozen=True)
class Source:
    """A model that was read, and what of its guidance an engine can hold."""

    model: ValueModel
    guidance: Guidance
    """β, twins and functional: what the weights stand for."""
    full: Guidance
    """The same with all that is recommended besides."""
    left_out: dict[str, Any]
    """What `full` has beyond `guidance`; engines are told by their own options."""
    fit: list[Text]
    held_out: list[Text]

    @torch.no_grad()
    def hidden(self, texts: Sequence[Text]) -> Float[Tensor, "states embed"]:
        """The last hidden states of the texts."""
        trunk, device = self.model.trunk, self.model.device
        return torch.cat([trunk.hidden(t[None].to(device))[0, at.to(device)] for t, at in texts])


def read_source(
    model_dir: str | Path,
    beta: float | None,
    twins: Literal["mean", "min"] | None,
    value_rows: bool = False,
    of_v: bool = False,
    texts: Sequence[Trajectory | Sequence[int]] = (),
    prompts: Sequence[list[int]] = (),
) -> Source:
    """Read a model; refuse what no matrix can stand for.

    `of_v`: V alone is wanted, no guidance. Texts are those given, else what the guided model writes
    after the `prompts` (none: after its first token). Where something has to be fitted, every
    second text is fitted on and the others are held out; else all are held out.
    """
    model = ValueModel.from_pretrained(model_dir).eval()
    heads = model.heads
    if heads is None:
        raise QvgptError(f"{model_dir}: has no value heads, so there is nothing to fold")
    if of_v:
        full, guidance, left_out = Guidance(), Guidance(), {}
    else:
        full, guidance, left_out = _guidance(model, model_dir, beta, twins, value_rows)
    fits = (guidance.guides and not is_linear(heads, guidance)) or (
        (of_v or value_rows) and (heads.config.v != "linear" or heads.config.support is not None)
    )
    if texts:
        taken = _states(texts, model.trunk.seq_len)
        fit, held_out = (taken[::2], taken[1::2]) if fits or of_v else (taken, taken)
    elif fits or of_v:
        fit, held_out = _texts_to_fit(model, full, prompts)
    else:
        fit = held_out = _written(model, full, list(prompts) or [_first(model)] * _OWN_TEXTS)
    least = 2 * model.trunk.embed_dim if fits else 1
    if not held_out or sum(len(at) for _, at in fit) < least:
        raise QvgptError(
            f"{model_dir}: its values are not linear in the hidden state and have to be fitted on "
            f"{least} states or more, which the texts do not hold: give prompts, as --data, that "
            "are like those it is for"
        )
    return Source(model, guidance, full, left_out, fit, held_out)


def _guidance(
    model: ValueModel,
    model_dir: str | Path,
    beta: float | None,
    twins: Literal["mean", "min"] | None,
    value_rows: bool,
) -> tuple[Guidance, Guidance, dict[str, Any]]:
    """All the guidance, what of it weights can hold, and what they cannot."""
    assert model.heads is not None
    if model.info.level == "turn":
        raise QvgptError(f"{model_dir}: its values are of whole turns: no token's Q can be folded")
    if model.trunk.softcap is not None:
        raise QvgptError(f"{model_dir}: its logits are capped: no LM head can hold guidance")
    if beta != 0 or not value_rows:
        refuse_v_alone(model.heads)
    said = recommended(model.info, model_dir)
    if beta is None and said is not None and not said.fixed:
        raise QvgptError(
            f"{model_dir}: recommends a beta of each token (kl_budget or beta_end), which weights "
            "cannot hold; say which beta to export"
        )
    if beta is None and (said is None or not said.guides):
        raise QvgptError(f"{model_dir}: recommends no beta; say which one to export")
    said = said or Guidance()
    own = {"beta": said.beta if beta is None else beta, "twins": twins or said.twins}
    free = {} if said.fixed else {"kl_budget": None, "beta_end": None, "beta_tokens": 0}
    full = Guidance(**{**vars(said), **free, **own})
    chosen = Guidance(**{name: getattr(full, name) for name in _FOLDED})
    standard = vars(Guidance())
    left_out = {k: v for k, v in vars(said).items() if k not in _FOLDED and v != standard[k]}
    return full, chosen, left_out


def _first(model: ValueModel) -> list[int]:
    assert model.tokenizer is not None
    return [model.tokenizer.template.bos]


def _texts_to_fit(
    model: ValueModel, guidance: Guidance, prompts: Sequence[list[int]]
) -> tuple[list[Text], list[Text]]:
    """Texts after every second prompt to fit on, and after the others to judge by."""
    given = list(prompts) or [_first(model)]
    seen, unseen = given[::2], given[1::2] or given
    seen, unseen = (some * -(-_TO_FIT // len(some)) for some in (seen, unseen))
    return _written(model, guidance, seen), _written(model, guidance, unseen, seed=1)


def _written(
    model: ValueModel, guidance: Guidance, prompts: Sequence[list[int]], seed: int = 0
) -> list[Text]:
    """The states of what the model writes after the prompts."""
    room = min(_OWN_TOKENS, model.trunk.seq_len - max(map(len, prompts)))
    if model.heads is not None and model.heads.know_v_alone:
        guidance = Guidance()
    texts = generate(model, prompts, guidance, max_tokens=room, seed=seed)
    both = zip(prompts, texts, strict=True)
    return _states([_trajectory(p, text.tokens) for p, text in both], model.trunk.seq_len)


def _trajectory(prompt: list[int], completion: list[int]) -> Trajectory:
    acts = [False] * len(prompt) + [True] * len(completion)
    return Trajectory([*prompt, *completion], acts, [0.0] * len(acts), terminated=True)


def _states(texts: Sequence[Trajectory | Sequence[int]], limit: int) -> list[Text]:
    """Before the actions of trajectories; all of bare lists of tokens."""
    found = []
    for text in texts:
        if isinstance(text, Trajectory):
            tokens = torch.tensor(text.tokens)[:limit]
            at = torch.tensor(text.is_action)[1:limit].nonzero()[:, 0]
        else:
            tokens = torch.tensor(text, dtype=torch.long)[:limit]
            at = torch.arange(len(tokens))
        if len(at):
            found.append((tokens, at))
    return found
