"""How values change what is sampled: π(a|s) ∝ π₀(a|s)·exp(β·A(s,a)), and in which order.

    base log-probs → candidates → + β·Q → ÷ temperature → sample     (temperature 0: the best one)

V(s) is the same for every next token, so it cancels: only Q is added. Candidates (top_k, top_p,
min_p) are taken from the base distribution, so that values choose among what the model might
say; `candidates="guided"` truncates afterwards, as stock engines must. Where the values come from
(these heads, another model, two language models …) changes nothing of it: see `sources.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from qvgpt.categorical import Functional
from qvgpt.decode.budget import MOST_UNDER_BUDGET, solve_beta
from qvgpt.decode.next_token import NextToken
from qvgpt.errors import QvgptError, nearest
from qvgpt.models import vocab
from qvgpt.models.artefact import ValueInfo
from qvgpt.models.blocked import Blocked
from qvgpt.models.heads import ValueHeads
from qvgpt.models.value_model import ValueModel

NEG_INF = float("-inf")
_MOST_BETA = 1e20  # with it and the lowest temperature values of 1e12 do not overflow
V_ALONE = (
    "these value heads know V and no Q: they cannot guide here (while writing, V is read after "
    "each candidate where FUDGE or ControlledDecoding taught it; a model of PathConsistency is the "
    "better policy itself, and guides another as contrast with its base)"
)

Values = Callable[[Int[Tensor, "rows candidates"] | None], Float[Tensor, "rows candidates"]]
"""Candidates of each state (None: every token) → their values."""


@dataclass(frozen=True)
class Guidance:
    """How to pick the next token."""

    beta: float = 0.0
    """Strength, in 1 / units of reward; 0 is the plain model."""
    temperature: float = 1.0
    """Divides base log-probs and guidance alike; 0 is greedy."""
    top_k: int | None = None
    """Keep the k likeliest tokens."""
    top_p: float | None = None
    """Keep the smallest set of tokens that holds this probability."""
    min_p: float | None = None
    """Keep tokens at least this likely, relative to the likeliest."""
    candidates: Literal["base", "guided"] = "base"
    """Which distribution top_k, top_p and min_p look at."""
    twins: Literal["mean", "min"] = "mean"
    """How several Q heads are joined; mean folds into the LM head."""
    functional: Functional = "mean"
    """What is read as Q from a distribution of returns (categorical heads). mean: the expected
    return. soft: η·log E exp(return / η), η = 1 / beta (Q♯). cvar: mean of the worst returns."""
    alpha: float = 0.1
    """Of cvar: the share of returns that are the worst."""
    beta_end: float | None = None
    """Where beta goes in a straight line over `beta_tokens` tokens, to stay there."""
    beta_tokens: int = 0
    """The token, counted from 0, that has `beta_end`."""
    kl_budget: float | None = None
    """In the place of `beta`: the largest KL(π ‖ π₀) of a token in nats, both over the candidates
    at temperature 1. β is solved for at each token, from 0 to `beta_max`. Needs a top_k of at most
    64, from the base."""
    beta_max: float = 1000.0
    """The greatest β that a `kl_budget` may lead to."""

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        checks = {
            "temperature must be finite, and 0 (greedy) or at least 1e-6": (
                self.temperature == 0 or 1e-6 <= self.temperature < float("inf")
            ),
            "top_k must be at least 1": self.top_k is None or self.top_k >= 1,
            "top_p must lie in (0, 1]": self.top_p is None or 0 < self.top_p <= 1,
            "min_p must lie in [0, 1]": self.min_p is None or 0 <= self.min_p <= 1,
            "candidates is 'base' or 'guided'": self.candidates in ("base", "guided"),
            "twins is 'mean' or 'min'": self.twins in ("mean", "min"),
            "functional is 'mean', 'soft' or 'cvar'": self.functional in ("mean", "soft", "cvar"),
            "alpha must lie in (0, 1]": 0 < self.alpha <= 1,
            "beta must be finite, and 1e20 at most": abs(self.beta) <= _MOST_BETA,
            "beta_end must be finite, and 1e20 at most": abs(self.beta_end or 0) <= _MOST_BETA,
            "beta_end and beta_tokens (1 or more) belong together": (
                self.beta_tokens >= 1 if self.beta_end is not None else self.beta_tokens == 0
            ),
            "kl_budget must be above 0": self.kl_budget is None or self.kl_budget > 0,
            "beta_max must be above 0, and 1e20 at most": 0 < self.beta_max <= _MOST_BETA,
            "kl_budget finds beta: leave beta and beta_end out": (
                self.kl_budget is None or (self.beta == 0 and self.beta_end is None)
            ),
            f"kl_budget needs a top_k of at most {MOST_UNDER_BUDGET} with candidates 'base'": (
                self.kl_budget is None
                or (1 <= (self.top_k or 0) <= MOST_UNDER_BUDGET and self.candidates == "base")
            ),
            "functional 'soft' needs one fixed beta": self.functional != "soft" or self.fixed,
        }
        for message, holds in checks.items():
            if not holds:
                raise QvgptError(f"guidance: {message}, not as in {self}")

    @property
    def guides(self) -> bool:
        """Whether values change anything."""
        return bool(self.beta or self.beta_end) or self.kl_budget is not None

    @property
    def fixed(self) -> bool:
        """Whether every token has the same β."""
        return self.beta_end is None and self.kl_budget is None

    def beta_at(self, position: int) -> float:
        """β of the token that is written at this place, from 0 (unless there is a `kl_budget`)."""
        if self.beta_end is None:
            return self.beta
        return self.beta + (self.beta_end - self.beta) * min(position / self.beta_tokens, 1.0)

    @property
    def truncates(self) -> bool:
        """Whether the candidates are fewer than the vocabulary."""
        return any(x is not None for x in (self.top_k, self.top_p, self.min_p))


def recommended(info: ValueInfo, model_dir: str | Path) -> Guidance | None:
    """What a model in `model_dir` recommends; None where it recommends nothing.

    Raises `QvgptError` that names file and key where it is no guidance at all.
    """
    found: Any = info.recommended_guidance
    if found is None:
        return None
    where = f"{model_dir}/value_config.json: recommended_guidance"
    if not isinstance(found, dict):
        raise QvgptError(f"{where}: an object was expected, not {found!r}")
    kinds: dict[str, tuple[type, ...]] = {
        "beta": (float, int), "temperature": (float, int), "top_k": (int, type(None)),
        "top_p": (float, int, type(None)), "min_p": (float, int, type(None)),
        "candidates": (str,), "twins": (str,), "functional": (str,), "alpha": (float, int),
        "beta_end": (float, int, type(None)), "beta_tokens": (int,),
        "kl_budget": (float, int, type(None)), "beta_max": (float, int),
    }  # fmt: skip
    for key, value in found.items():
        if key not in kinds:
            raise QvgptError(f"{where}: unknown key {key!r}{nearest(key, kinds)}")
        if not isinstance(value, kinds[key]) or isinstance(value, bool):
            raise QvgptError(f"{where}.{key}: {value!r} is of the wrong type")
    numbers = {k: float(v) for k, v in found.items() if kinds[k][0] is float and v is not None}
    try:
        return Guidance(**{**found, **numbers})
    except QvgptError as error:
        raise QvgptError(f"{where}: {error}") from None


def guided_logits(
    base_logits: Float[Tensor, "rows candidates"],
    q: Float[Tensor, "rows candidates"] | None,
    guidance: Guidance,
    beta: Float[Tensor, "rows"] | None = None,
) -> Float[Tensor, "rows candidates"]:
    """log π over the given candidates up to a number per row: truncation, guidance and temperature
    in their order.

    `beta` says that of each row; None: the guidance's. At temperature 0 that of temperature 1: its
    mode is what greedy decoding picks.
    """
    logits = base_logits
    if guidance.candidates == "base":
        logits = _truncate(logits, guidance)
    if q is not None and (beta is not None or guidance.beta):
        logits = logits + (guidance.beta if beta is None else beta[:, None]) * q
    if guidance.candidates == "guided":
        logits = _truncate(logits, guidance)
    if guidance.temperature not in (0.0, 1.0):
        logits = logits / guidance.temperature
    return logits


def next_token(
    model: ValueModel,
    hidden: Float[Tensor, "rows embed"],
    guidance: Guidance,
    folded: Float[Tensor, "vocab embed"] | None = None,
    values: Values | None = None,
    beta: Float[Tensor, "rows"] | None = None,
) -> NextToken:
    """The guided distribution after each hidden state.

    Three ways, same result: with `folded` (LM head + β·Q as one matrix) it costs what the plain
    model costs but knows no base log-probs; with base top-k only the candidates' rows of the
    heads are read; else Q of the whole vocabulary is formed. Greedy has one candidate left.
    `values` takes the place of the model's own Q, `beta` (of each row) that of `guidance.beta`.
    """
    trunk, known = model.trunk, None
    if model.tokenizer is not None and model.tokenizer.vocab_size < trunk.vocab_size:
        known = model.tokenizer.vocab_size
    if values is None and guidance.guides and folded is None:
        values = own_q(model.heads, hidden, guidance)
    return distribution(
        trunk.output_weight, hidden, guidance, values, folded, trunk.softcap, known, beta
    )


def distribution(
    weight: Float[Tensor, "vocab embed"] | Blocked,
    hidden: Float[Tensor, "rows embed"],
    guidance: Guidance,
    values: Values | None,
    folded: Float[Tensor, "vocab embed"] | Blocked | None = None,
    softcap: float | None = None,
    known: int | None = None,
    beta: Float[Tensor, "rows"] | None = None,
) -> NextToken:
    """`next_token` of any LM head `weight`, whose trunk need not be ours.

    Of a padded vocabulary only the first `known` tokens exist.
    """
    every = vocab.logits(hidden, weight if folded is None else folded, softcap)
    if known is not None:
        every[:, known:] = NEG_INF
    base, tokens, gathered, q, spent = every, _everything(every), None, None, None
    cut = guidance.top_k if (guidance.top_k or base.size(-1)) < base.size(-1) else None
    # folded logits are guided already
    if cut and (guidance.candidates == "base" or folded is not None):
        base, tokens = base.topk(cut, dim=-1)
        gathered = tokens
    if guidance.guides and folded is None:
        assert values is not None
        q = values(gathered)
        if guidance.kl_budget is not None:
            among = _truncate(base, guidance)
            beta, spent = solve_beta(among, q, guidance.kl_budget, guidance.beta_max)
    logits = guided_logits(base, q, guidance, beta)
    if cut and cut < logits.size(-1):  # in the order that folded ones have: a seed's text is one
        logits, places = logits.topk(cut, dim=-1)
        tokens = tokens.gather(1, places)
    picked = NextToken(tokens, logits, every, beta, spent)
    return picked.greedy() if guidance.temperature == 0 else picked


def own_q(
    heads: ValueHeads | None, hidden: Float[Tensor, "rows embed"], guidance: Guidance
) -> Values:
    """Q of heads that read the very hidden states."""
    return lambda tokens: slow_q(heads, hidden, tokens, guidance.twins, guidance)


def joined_q(
    model: ValueModel,
    hidden: Float[Tensor, "rows embed"],
    tokens: Int[Tensor, "rows candidates"] | None,
    twins: Literal["mean", "min"],
) -> Float[Tensor, "rows candidates"]:
    """Q of the candidates (None: of every token) by the slow heads, joined into one."""
    return slow_q(model.heads, hidden, tokens, twins)


def slow_q(
    heads: ValueHeads | None,
    hidden: Float[Tensor, "rows embed"],
    tokens: Int[Tensor, "rows candidates"] | None,
    twins: Literal["mean", "min"],
    guidance: Guidance | None = None,
) -> Float[Tensor, "rows candidates"]:
    """`joined_q` of the heads alone; with a `guidance`, what its functional reads as Q.

    Raises `QvgptError` where there are no heads, or none that the functional can read.
    """
    if heads is None:
        raise QvgptError("this model has no value heads: it can only be run with beta 0")
    h, how = hidden.float(), {} if guidance is None else functional_options(heads, guidance)
    q = [
        head(h, **how) if tokens is None else head.of_many(h, tokens, **how)  # type: ignore[operator]
        for head in heads.target_q
    ]
    stacked = torch.stack(q) / heads.reward_scale
    return stacked.mean(0) if twins == "mean" else stacked.amin(0)


def refuse_v_alone(heads: ValueHeads | None) -> None:
    """Raise `QvgptError` where there is no Q to be guided by.

    Looks through the heads' weights: once a run, not once a token.
    """
    if heads is None:
        raise QvgptError("this model has no value heads: it can only be run with beta 0")
    if heads.know_v_alone:
        raise QvgptError(V_ALONE)


def functional_options(heads: ValueHeads, guidance: Guidance) -> dict[str, Any]:
    """What `read_distribution` is told for these heads; nothing where it is the mean.

    Raises `QvgptError` for heads that know no distribution of returns.
    """
    if guidance.functional == "mean" or (guidance.functional == "soft" and not guidance.guides):
        return {}  # η is 1 / beta; with beta 0 it is without end, and soft the mean
    if heads.config.support is None or heads.config.sigma:
        raise QvgptError(
            f"guidance: functional {guidance.functional!r} reads a distribution of returns, and "
            f"{'smeared heads keep' if heads.config.sigma else 'these value heads know'} only the "
            "mean: train categorical heads with sigma 0"
        )
    eta = heads.reward_scale / guidance.beta if guidance.functional == "soft" else 1.0
    return {"functional": guidance.functional, "eta": eta, "alpha": guidance.alpha}


def folds(heads: ValueHeads | None, guidance: Guidance, softcap: float | None = None) -> bool:
    """Whether LM head and guidance are one matrix: linear features, mean of twins, no base set,
    one β, logits that nothing caps."""
    if heads is None or guidance.beta == 0 or not guidance.fixed or softcap is not None:
        return False
    free = guidance.candidates == "guided" or not guidance.truncates
    joined = guidance.twins == "mean" or heads.config.num_q == 1
    linear = heads.config.folds and guidance.functional == "mean"
    return free and joined and linear


@torch.no_grad()
def fold(
    weight: Float[Tensor, "vocab embed"], heads: ValueHeads, beta: float
) -> Float[Tensor, "vocab embed"]:
    """W + β·F: one matrix that is LM head and guidance at once. Raises `QvgptError` where Q is not
    linear."""
    return heads.folded().mul_(beta).add_(weight).to(weight.dtype)


def _everything(logits: Float[Tensor, "rows vocab"]) -> Int[Tensor, "rows vocab"]:
    return torch.arange(logits.size(-1), device=logits.device).expand(logits.shape)


def _truncate(
    logits: Float[Tensor, "rows candidates"], guidance: Guidance
) -> Float[Tensor, "rows candidates"]:
    """−inf outside top_k, top_p and min_p, applied in that order."""
    if guidance.top_k is not None and guidance.top_k < logits.size(-1):
        kept = logits.topk(guidance.top_k, dim=-1).indices  # k of them, even where some are equal
        logits = logits.masked_fill(_all_but(logits, kept), NEG_INF)
    if guidance.top_p is not None and guidance.top_p < 1:  # 1 would cut what rounding adds up
        ordered, index = logits.sort(dim=-1, descending=True)
        p = ordered.softmax(-1)
        before = p.cumsum(-1) - p  # the probability ahead of each token; the first always stays
        cut = torch.zeros_like(logits, dtype=torch.bool)
        cut = cut.scatter(-1, index, before >= guidance.top_p)
        logits = logits.masked_fill(cut, NEG_INF)
    if guidance.min_p is not None:
        floor = logits.amax(-1, keepdim=True) + torch.tensor(guidance.min_p).log().to(logits)
        logits = logits.masked_fill(logits < floor, NEG_INF)
    return logits


def _all_but(
    logits: Float[Tensor, "rows candidates"], kept: Int[Tensor, "rows k"]
) -> Bool[Tensor, "rows candidates"]:
    return torch.ones_like(logits, dtype=torch.bool).scatter(-1, kept, False)
