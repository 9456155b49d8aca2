"""How far what was written is from the guidance and the values it stands for.

It is the written files that are judged, read by `transformers` (and peft), at states of texts that
nothing was fitted on. KL(exact guided ‖ exported) is at temperature 1, over the whole vocabulary.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from qvgpt.decode.policy import Guidance, next_token
from qvgpt.export.linear import value_errors
from qvgpt.export.source import Source, Text
from qvgpt.models import vocab
from qvgpt.models.value_model import ValueModel


@dataclass(frozen=True)
class Rows:
    """The two vocabulary rows that tell V: V(s) = (log p_v − log p_0) / c + bias."""

    zero: int
    value: int
    c: float
    bias: float


@dataclass(frozen=True)
class Fidelity:
    """How far an exported model is from exact guidance, over `states` states of some texts."""

    states: int
    max_abs_logit_difference: float
    """Largest difference of two logits, a constant per state taken off."""
    greedy_agreement: float
    """Share of the states where both would pick the same token."""
    mean_kl: float
    """KL(exact guided ‖ exported) per token, in nats."""
    max_kl: float
    """That of the worst state."""
    twins_kl: float | None = None
    """KL(twins joined by their minimum ‖ by their mean) per token; None where there is one Q."""
    recommended_kl: float | None = None
    """KL(guided as recommended, with its truncation ‖ exported) per token; None where nothing
    is truncated."""
    v: dict[str, float | None] | None = None
    """Errors of V as read from the value rows, in units of reward."""
    value_rows_mass: float | None = None
    """What the value rows take of the probability, where nobody bans them, in the mean."""


@torch.no_grad()
def fidelity(source: Source, theirs: Any, rows: Rows | None = None) -> Fidelity:
    """Compare exact guidance with what a causal LM of `transformers` says of the held-out texts."""
    model, guidance = source.model, source.guidance
    heads = model.heads
    assert heads is not None
    kls, worst, agreed, mass, extra = [], 0.0, 0, 0.0, dict[str, float]()
    values: list[tuple[Tensor, Tensor]] = []
    for h, found in _both(model, theirs, source.held_out):
        if rows is not None:
            pair = found.log_softmax(-1)[:, [rows.zero, rows.value]]
            mass += float(pair.exp().sum())
            told = (pair[:, 1] - pair[:, 0]) / rows.c + rows.bias
            values.append((heads.state_value(h.float()), told))
            found[:, [rows.zero, rows.value]] = -torch.inf
        exact = next_token(model, h, guidance).logprob
        found = found.log_softmax(-1)[:, : exact.size(-1)]
        kls.append(divergence(exact, found))
        agreed += int((exact.argmax(-1) == found.argmax(-1)).sum())
        real = exact.isfinite() & found.isfinite()
        difference = (found - exact).where(real, 0.0)
        difference = difference - difference.sum(-1, keepdim=True) / real.sum(-1, keepdim=True)
        worst = max(worst, float(difference.where(real, 0.0).abs().max()))
        for name, one, other in _others(source, model, h, found):
            extra[name] = extra.get(name, 0.0) + float(divergence(one, other).sum())
    kl = torch.cat(kls)
    count = len(kl)
    more: dict[str, Any] = {name: max(0.0, total / count) for name, total in extra.items()}
    if rows is not None:
        more["v"] = value_errors(*(torch.cat(x) for x in zip(*values, strict=True)))
        more["value_rows_mass"] = mass / count
    mean, most = max(0.0, float(kl.mean())), max(0.0, float(kl.max()))
    return Fidelity(count, worst, agreed / count, mean, most, **more)


def _others(
    source: Source, model: ValueModel, h: Float[Tensor, "rows embed"], found: Tensor
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The other divergences that a report holds: name, exact and other log-probs."""
    assert model.heads is not None
    guidance = source.guidance
    if model.heads.config.num_q > 1 and guidance.guides:
        both = [
            next_token(model, h, Guidance(**{**vars(guidance), "twins": twins})).logprob
            for twins in ("min", "mean")
        ]
        yield "twins_kl", both[0], both[1]
    if source.full.truncates:
        full = Guidance(**{**vars(source.full), "temperature": 1.0})
        picked = next_token(model, h, full)
        yield "recommended_kl", picked.logprob, found.gather(1, picked.tokens)


@torch.no_grad()
def value_fidelity(source: Source, critic: Any, offset: float) -> dict[str, float | None]:
    """Errors of a sequence classifier's score + `offset` as V at the held-out states."""
    model, true, found = source.model, [], []
    assert model.heads is not None
    for tokens, at in source.held_out:
        tokens, at = tokens.to(model.device), at.to(model.device)
        true.append(model.heads.state_value(model.trunk.hidden(tokens[None])[0, at].float()))
        score = critic.score(_hidden(critic, tokens)[at])
        found.append(score[:, 0].float() + offset)
    return value_errors(torch.cat(true), torch.cat(found))


def _both(
    model: ValueModel, theirs: Any, texts: list[Text]
) -> Iterator[tuple[Float[Tensor, "rows embed"], Float[Tensor, "rows words"]]]:
    """Our hidden states and their logits, a chunk of states at a time."""
    head: Callable[[Tensor], Tensor] = theirs.get_output_embeddings()
    size = vocab.chunk_rows(model.trunk.vocab_size, tensors=6)
    for tokens, at in texts:
        tokens, at = tokens.to(model.device), at.to(model.device)
        ours = model.trunk.hidden(tokens[None])[0, at]
        other = _hidden(theirs, tokens)[at]
        for h, g in zip(ours.split(size), other.split(size), strict=True):
            yield h, head(g).float()


def _hidden(theirs: Any, tokens: Tensor) -> Float[Tensor, "time embed"]:
    everything = torch.ones_like(tokens)[None]
    return theirs.base_model(tokens[None], attention_mask=everything).last_hidden_state[0]


def divergence(
    exact: Float[Tensor, "rows words"], found: Float[Tensor, "rows words"]
) -> Float[Tensor, "rows"]:
    """KL of rows of log-probs, in float64; 0·log 0 is 0."""
    p = exact.double().exp()
    return (p * (exact.double() - found.double())).where(p > 0, 0.0).sum(-1)
