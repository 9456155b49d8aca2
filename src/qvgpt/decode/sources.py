"""Where the values that guide come from. Each source gives a number for every candidate token.

    HeadValues(model)       Q(s, a) of value heads: on the model's own trunk, or on that of another,
                            smaller model of the same tokenizer      (ILQL; Q♯, RAD-Q)
    PrefixValues(model)     V(s + a), read after each candidate is appended on a fork of the KV
                            cache                     (FUDGE, Controlled Decoding, RAD, VAS)
    Contrast(plus, minus)   log π₊(a|s) − log π₋(a|s) of two language models
                            (DExperts, proxy tuning, the implicit Q of DPO or path consistency)
    TokenScorer(function)   whatever a function of texts and candidates says
    WeightedSum(terms)      Σ weight · source: several objectives at once

They are used alike:

    generate(model, prompts, Guidance(beta=2.0, top_k=20), values=PrefixValues(small))

Only differences within a state matter (π ∝ π₀·exp(β·A)), so a source may add any number per state.
Its values are for β what rewards are: β is in 1 / units of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qvgpt.categorical import read_distribution
from qvgpt.decode.policy import NEG_INF, Guidance, functional_options, slow_q
from qvgpt.decode.reading import States
from qvgpt.errors import QvgptError
from qvgpt.models import vocab
from qvgpt.models.heads import ValueHeads
from qvgpt.models.laid_out import head_of, laid_out, values_of
from qvgpt.models.value_model import ValueModel

MOST_CANDIDATES = 256
"""More candidates than this a state are not read one by one."""
_MEAN = Guidance()
_OF_WHOLE_TEXTS = frozenset({"FUDGE", "ControlledDecoding"})
"""The objectives whose V knows texts that have ended, so that an end token can be judged by it."""


@runtime_checkable
class ValueSource(Protocol):
    """Something that says what each candidate token is worth."""

    @property
    def models(self) -> tuple[ValueModel, ...]:
        """The models whose trunks it reads texts with; each gets a KV cache of its own."""
        ...

    @property
    def most_candidates(self) -> int | None:
        """How many candidates it takes at most; None: any number, the whole vocabulary at once."""
        ...

    def __call__(
        self, states: States, tokens: Int[Tensor, "rows candidates"] | None, guidance: Guidance
    ) -> Float[Tensor, "rows candidates"]:
        """The value of each candidate, in units of reward.

        `tokens` None: of every token there is, [rows, vocab], which is asked only of sources that
        take any number.
        """
        ...

    def state_value(self, states: States) -> Float[Tensor, "rows"] | None:
        """The value of the text so far, which makes an advantage of the above; None: unknown."""
        ...


@dataclass(frozen=True)
class HeadValues:
    """Q(s, a) of the slow value heads of a model, on its own trunk.

    The model may be the one that is guided (the trunk is then read once), or another one.
    """

    model: ValueModel

    most_candidates = None

    def __post_init__(self) -> None:
        """Refuse what has no values."""
        heads_of(self.model)

    @property
    def models(self) -> tuple[ValueModel, ...]:
        """The one model."""
        return (self.model,)

    def __call__(
        self, states: States, tokens: Int[Tensor, "rows candidates"] | None, guidance: Guidance
    ) -> Float[Tensor, "rows candidates"]:
        """Q by `Guidance.twins` and `Guidance.functional`."""
        hidden, heads = states.of(self.model.trunk), heads_of(self.model)
        if tokens is not None:
            tokens = tokens.to(hidden.device)
            if guidance.functional == "mean":
                found = self._at_once(hidden, tokens, guidance, False)
                if found is not None:
                    return found
        with laid_out(heads):
            return slow_q(heads, hidden, tokens, guidance.twins, guidance)

    def relative(
        self, states: States, tokens: Int[Tensor, "rows candidates"], guidance: Guidance
    ) -> Float[Tensor, "rows candidates"]:
        """The same up to a number per state, which guidance does not see, where that is cheaper."""
        heads = heads_of(self.model)
        joined = guidance.twins == "mean" or heads.config.num_q == 1
        if not joined or heads.config.support is not None or guidance.functional != "mean":
            return self(states, tokens, guidance)
        hidden = states.of(self.model.trunk)
        tokens = tokens.to(hidden.device)
        if (at_once := self._at_once(hidden, tokens, guidance, True)) is not None:
            return at_once
        slow: list[Any] = [*heads.target_q]
        with laid_out(heads):
            found = [head.relative(hidden.float(), tokens) for head in slow]
        return torch.stack(found).mean(0) / heads.reward_scale

    def _at_once(
        self, hidden: Tensor, tokens: Tensor, guidance: Guidance, relative: bool
    ) -> Tensor | None:
        heads = heads_of(self.model)
        step = values_of(heads)
        found = step and step(hidden, tokens, guidance.twins == "min", relative)
        return None if found is None else found / heads.reward_scale

    def state_value(self, states: States) -> Float[Tensor, "rows"] | None:
        """V(s)."""
        heads = heads_of(self.model)
        return heads.state_value(states.of(self.model.trunk).float())


@dataclass(frozen=True)
class PrefixValues:
    """V(s + a): the value of the text with the candidate appended (a prefix scorer).

    CD-FUDGE and CD-Q of Controlled Decoding (Mudgal et al., 2024), with `log` the log σ of
    FUDGE (Yang & Klein, 2021). From categorical heads `Guidance.functional` reads what it
    reads from Q: "soft" is then the V-type Q♯ (Zhou et al., 2025). V must have been taught of whole
    texts too (`FUDGE`, `ControlledDecoding`), since one of the candidates is the end token, and
    rewards must come at the end. Costs one token read per candidate: `Guidance.top_k` says how
    many there are.
    """

    model: ValueModel
    log: bool = False
    """The log-probability of the greatest return instead of the mean (heads with two bins)."""

    most_candidates = MOST_CANDIDATES

    def __post_init__(self) -> None:
        """Refuse what has no V, or none that is a probability."""
        support = heads_of(self.model).config.support
        if self.log and (support is None or support.bins != 2):
            raise QvgptError("log values are read from categorical heads of 2 bins (FUDGE's)")

    @property
    def models(self) -> tuple[ValueModel, ...]:
        """The one model."""
        return (self.model,)

    def __call__(
        self, states: States, tokens: Int[Tensor, "rows candidates"] | None, guidance: Guidance
    ) -> Float[Tensor, "rows candidates"]:
        """V of the text that ends in the candidate."""
        assert tokens is not None
        return self.read(states.after(self.model.trunk, tokens), guidance)

    def state_value(self, states: States) -> Float[Tensor, "rows"] | None:
        """V of the text so far, in the same form."""
        return self.read(states.of(self.model.trunk))

    def read(
        self, hidden: Float[Tensor, "*shape embed"], guidance: Guidance = _MEAN
    ) -> Float[Tensor, "*shape"]:
        """V, in this source's form, of texts that end in these hidden states."""
        heads = heads_of(self.model)
        if self.log:
            return heads.v.logits(hidden.float()).log_softmax(-1)[..., -1]
        if guidance.functional == "mean":
            return heads.state_value(hidden.float())
        options = functional_options(heads, guidance)
        logits = heads.v.logits(hidden.float())
        assert heads.v.support is not None
        found = read_distribution(logits, heads.v.support.centres(logits), **options)
        return found / heads.reward_scale


@dataclass(frozen=True)
class Contrast:
    """log π₊(a|s) − log π₋(a|s) of two language models of the same tokenizer.

    DExperts (Liu et al., 2021: expert and anti-expert), proxy tuning (Liu et al., 2024: a
    small model tuned and untuned), emulated fine-tuning (Mitchell et al., 2023). Of a pair of DPO
    it is Q − V over DPO's β (Rafailov et al., 2024), of `PathConsistency` and its base the same
    over `eta`. In nats, whatever rewards were; Guidance's β 1 gives π₀·π₊/π₋.
    """

    plus: ValueModel
    minus: ValueModel

    most_candidates = None

    @property
    def models(self) -> tuple[ValueModel, ...]:
        """Both."""
        return (self.plus, self.minus)

    def __call__(
        self, states: States, tokens: Int[Tensor, "rows candidates"] | None, guidance: Guidance
    ) -> Float[Tensor, "rows candidates"]:
        """The difference of log-probabilities, each over its whole vocabulary."""
        plus, minus = (_logprob(model, states, tokens) for model in self.models)
        minus = minus.to(plus.device)
        if tokens is None:  # the same tokenizer may be padded to two sizes
            size = min(plus.size(1), minus.size(1))
            plus, minus = plus[:, :size], minus[:, :size]
        return plus - minus

    def state_value(self, states: States) -> Float[Tensor, "rows"] | None:
        """0: log Σₐ π₋(a)·exp(A) = 0, so that the difference is an advantage already."""
        return torch.zeros(len(states), device=states.hidden[0].device)


@dataclass(frozen=True)
class TokenScorer:
    """Values by a function: (texts, candidates [rows, candidates]) → [rows, candidates].

    A text is the list of its token ids so far, prompt included. Where `most_candidates` is None
    candidates may be None: every token, [rows, vocab].
    """

    function: Callable[[list[list[int]], Tensor], Tensor]
    most_candidates: int | None = MOST_CANDIDATES

    models = ()

    def __call__(
        self, states: States, tokens: Int[Tensor, "rows candidates"] | None, guidance: Guidance
    ) -> Float[Tensor, "rows candidates"]:
        """What the function says. Raises `QvgptError` for another shape, NaN and infinity.

        Of every token it may leave out those that pad the vocabulary.
        """
        found = torch.as_tensor(self.function(states.texts, tokens), dtype=torch.float32)  # type: ignore[arg-type]
        every = (len(states), states.reading.trunks[0].vocab_size)
        shape, wanted = tuple(found.shape), every if tokens is None else tuple(tokens.shape)
        fewer = tokens is None and len(shape) == 2 and shape[0] == every[0] and shape[1] < every[1]
        if shape != wanted and not fewer:
            raise QvgptError(f"values of shape {shape} for candidates of {wanted}")
        if not found.isfinite().all():
            raise QvgptError("the function of values gave NaN or infinity")
        return found

    def state_value(self, states: States) -> Float[Tensor, "rows"] | None:
        """Unknown."""
        return None


@dataclass(frozen=True)
class WeightedSum:
    """Σ weight · source: several objectives at once, each in its own units."""

    terms: tuple[tuple[float, ValueSource], ...]

    def __post_init__(self) -> None:
        """Refuse what is no sum."""
        if not self.terms or not all(abs(weight) < float("inf") for weight, _ in self.terms):
            raise QvgptError("a weighted sum needs sources, and weights that are finite numbers")

    @property
    def models(self) -> tuple[ValueModel, ...]:
        """Those of all terms."""
        return tuple(model for _, source in self.terms for model in source.models)

    @property
    def most_candidates(self) -> int | None:
        """What the choosiest term takes."""
        limits = [n for _, source in self.terms if (n := source.most_candidates) is not None]
        return min(limits, default=None)

    def __call__(
        self, states: States, tokens: Int[Tensor, "rows candidates"] | None, guidance: Guidance
    ) -> Float[Tensor, "rows candidates"]:
        """The sum of the values."""
        return self._sum([source(states, tokens, guidance) for _, source in self.terms])

    def state_value(self, states: States) -> Float[Tensor, "rows"] | None:
        """The sum of the states' values, where all are known."""
        found = [source.state_value(states) for _, source in self.terms]
        return None if any(v is None for v in found) else self._sum(found)  # type: ignore[arg-type]

    def _sum(self, found: Sequence[Tensor]) -> Tensor:
        first = found[0]
        size = min(x.size(-1) for x in found)  # vocabularies may be padded to several sizes
        weighed = [
            w * x[..., :size].to(first.device) for (w, _), x in zip(self.terms, found, strict=True)
        ]
        return torch.stack(weighed).sum(0)


def own_values(model: ValueModel) -> ValueSource | None:
    """What a model's own heads can guide with; None without heads.

    Q, where they know it (fresh heads count as such: they change nothing); else V of appended
    candidates, in the form of the objective that taught it.
    """
    if model.heads is None:
        return None
    taught = _taught(model)
    if model.heads.know_v_alone and taught & _OF_WHOLE_TEXTS:
        return PrefixValues(model, log="FUDGE" in taught)
    return HeadValues(model)


def heads_of(model: ValueModel) -> ValueHeads:
    """Those of the model. Raises `QvgptError` where it has none."""
    if model.heads is None:
        raise QvgptError("a model without value heads has no values to guide with")
    return model.heads


def _taught(model: ValueModel) -> set[str]:
    """The names of the objectives that the artefact says its values were taught by."""
    said: Any = model.info.objectives
    entries = said if isinstance(said, list) else []
    return {str(name) for entry in entries if isinstance(entry, dict) for name in entry}


def leaves(source: ValueSource | None) -> list[ValueSource]:
    """The sources that a sum is of."""
    if isinstance(source, WeightedSum):
        return [leaf for _, term in source.terms for leaf in leaves(term)]
    return [] if source is None else [source]


def _logprob(
    model: ValueModel, states: States, tokens: Int[Tensor, "rows candidates"] | None
) -> Float[Tensor, "rows candidates"]:
    """log π of the candidates, or (None) of the whole vocabulary."""
    trunk = model.trunk
    logits = vocab.logits(states.of(trunk), head_of(trunk), trunk.softcap)
    if model.tokenizer is not None:
        logits[:, model.tokenizer.vocab_size :] = NEG_INF
    logprob = logits.log_softmax(-1)
    if tokens is None:
        return logprob.clamp(min=-1e9)  # of tokens that do not exist: no −inf − −inf
    return logprob.gather(1, tokens.to(logits.device))


def describe(source: ValueSource) -> str:
    """In a word or two, for people."""
    match source:
        case HeadValues():
            return "Q"
        case PrefixValues(log=log):
            return ("log of V" if log else "V") + " after each candidate"
        case Contrast():
            return "log π₊ − log π₋"
        case WeightedSum(terms=terms):
            return " + ".join(f"{w:g}·({describe(s)})" for w, s in terms)
    return "a function"
