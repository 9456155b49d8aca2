"""Options that say how text is guided, shared by the commands that write or judge it."""

from dataclasses import dataclass, replace
from typing import Literal

from qvgpt.categorical import Functional
from qvgpt.decode.policy import Guidance, recommended
from qvgpt.decode.sources import HeadValues, ValueSource, describe, own_values
from qvgpt.models.value_model import ValueModel
from qvgpt.source_options import SourceOptions


@dataclass(frozen=True, kw_only=True)
class GuidanceOptions(SourceOptions):
    """`Guidance`, whose fields may be left to what the model recommends."""

    beta: float | None = None
    """Strength of guidance; none: what the model recommends, as for all options down to
    beta_max. Where value_models or contrast are given nothing is recommended."""
    temperature: float | None = None
    """0 is greedy."""
    top_k: int | None = None
    """Keep the k likeliest tokens; 0: all."""
    top_p: float | None = None
    """Keep the smallest set of tokens that holds this probability."""
    min_p: float | None = None
    """Keep tokens at least this likely, relative to the likeliest."""
    candidates: Literal["base", "guided"] | None = None
    """Which distribution top_k, top_p and min_p look at."""
    twins: Literal["mean", "min"] | None = None
    """How several Q heads are joined."""
    functional: Functional | None = None
    """What is read as Q from a distribution of returns: mean, soft (Q♯, η = 1 / beta) or cvar."""
    alpha: float | None = None
    """Of cvar: the share of returns that are the worst."""
    beta_end: float | None = None
    """Where beta goes in a straight line over beta_tokens tokens, to stay there."""
    beta_tokens: int | None = None
    """The token, counted from 0, that has beta_end."""
    kl_budget: float | None = None
    """In the place of beta: the KL to the base, in nats, that each token may take; needs top_k."""
    beta_max: float | None = None
    """The greatest beta that a kl_budget may lead to."""

    def guidance(self, model: ValueModel, name: str, values: ValueSource | None) -> Guidance:
        """What the model in `name` recommends, with what was said put over it; other `values`
        recommend nothing."""
        said = {n: value for n in vars(Guidance()) if (value := getattr(self, n)) is not None}
        if said.get("top_k") == 0:
            said["top_k"] = None
        start = recommended(model.info, name) if values is None else None
        start = start or Guidance()
        if self.kl_budget is not None and self.beta is None:  # else two would say how much
            start = replace(start, beta=0.0, beta_end=None, beta_tokens=0)
        if self.beta is not None and self.kl_budget is None:
            start = replace(start, kl_budget=None)
            if self.beta_end is None and self.beta_tokens is None:  # it is for all tokens
                start = replace(start, beta_end=None, beta_tokens=0)
        return replace(start, **said)

    def in_words(
        self, model: ValueModel, guidance: Guidance, values: ValueSource | None, chosen: str = ""
    ) -> str:
        """The guidance in use in one line, lest a model with values is unguided in silence.

        `chosen` says how a text is chosen among others, where it is.
        """
        standard = vars(Guidance())
        shown = [f"temperature {guidance.temperature:g}"]
        shown += [
            f"{name} {value}"
            for name, value in vars(guidance).items()
            if name not in ("beta", "temperature") and value != standard[name]
        ]
        options = [name for name in standard if getattr(self, name) is not None]
        recommends = values is None and model.info.recommended_guidance is not None
        if recommends and len(options) < len(standard):
            but = f" but for {', '.join(options)}" if options else ""
            shown[-1] += f" (recommended by the model{but})"
        if not guidance.guides and chosen:
            return f"guidance: none (beta 0), {chosen}, {', '.join(shown)}"
        if not guidance.guides:
            way = "--best_of" if model.info.level == "turn" else "--beta"
            silent = model.heads is None or self.beta == 0
            hint = "" if silent else f"; the model has values: try {way}"
            return f"guidance: none (beta 0), {', '.join(shown)}{hint}"
        shown += [chosen] * bool(chosen)
        strength = [] if guidance.kl_budget is not None else [f"beta {guidance.beta:g}"]
        source = values or own_values(model)
        own_q = values is None and isinstance(source, HeadValues)
        whose = "" if own_q or source is None else f"; values: {describe(source)}"
        if values is not None:
            whose += f", from {', '.join([*self.value_models, *self.contrast])}"
        return f"guidance: {', '.join(strength + shown)}{whose}"
